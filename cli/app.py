"""The commands, and which code each one runs; that code is imported when it runs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import click

from ..errors import RequestError
from ..version import __version__
from . import axes, extract, options, stats
from .command import SETTINGS, Command, Group
from .queue import RENDER_SECTIONS

if TYPE_CHECKING:
    from .progress import Talk

SPELLING_HELP = (
    "Hyphens and underscores in option names are the same. Results go to stdout, everything else to stderr. "
    "Exit codes: 0 done, 1 internal error, 2 usage, 3 bad file, 4 model missing or damaged, "
    "5 does not fit, 6 out of memory, "
    "7 no such device, 8 some jobs of a batch failed, 130 cancelled."
)

EDIT_HELP = (
    "Change pictures by words.\n\n"
    'qengine edit photo.jpg "make it grayscale" -o out.png\n\n'
    "Without --model the tiny model inside qengine is used. Without -o the result is <name>_edited.png "
    "in the current folder; files that exist are not overwritten.\n\n" + SPELLING_HELP
)
GENERATE_HELP = (
    "Make a picture from words; needs --model.\n\n"
    'qengine generate "a red bicycle" --model qwen-image -o out.png\n\n'
    'A picture can be read and blended with the words, once for many shares and strengths: qengine generate "a cat" '
    "--model Z-IMAGE --vl-model QWEN3VL -i ref.png --alphas 0 0.3 0.5 --strengths 0.7 0.8 0.9 -o out/\n\n"
    + SPELLING_HELP
)
INFO_HELP = (
    "Say what made a picture, what a model is, or what a job file holds.\n\n"
    "SUBJECT is a picture made by qengine, a model as --model names it, or a .qx file."
)
PLAN_HELP = (
    "Say what a run would take, before anything is loaded.\n\nqengine plan MODEL --ref photo.jpg --vram 12GiB "
    "--ram 32GiB\n\nqengine plan --extractor QWEN3VL --vram 8GiB\n\n"
    "Reads headers only: sizes of all components, where each block would lie, the peaks of every phase, "
    "and the command that asks for it. Exit code 5 where it does not fit, with what would."
)
PACK_HELP = (
    "Write a model's weights in the form that runs map: 8 bits each, or as they are, in the order of use.\n\n"
    "qengine pack MODEL --weights int8\n\n"
    "The first run that needs such a file makes it by itself; this does it on purpose, or for --packed. The compute "
    "type is part of the file: --dtype, or what a run on --device would take."
)
BATCH_HELP = (
    "Do many jobs with one engine.\n\n"
    'qengine batch photos/ -p "make it grayscale" -o gray/\n\n'
    "JOBS is a folder of pictures, a .jsonl file with one JSON object per line whose keys are the names of edit's "
    "options (and output, a file name), a text file with one prompt per line and options behind it (a red car --w 512 "
    "--h 768 --d 42 --ci photo.png), or - to read such lines as they are typed. Options given here hold for every job "
    "that does not say otherwise. A bad job does not stop the others (exit code 8); --resume goes on where a batch was "
    "stopped, by the manifest.jsonl beside the results."
)
RENDER_HELP = (
    "Work off a queue of extracted jobs.\n\nqengine render queue/ -o out/ --model MODEL\n\n"
    "QUEUE is a folder that qengine extract --jobs made. Any number of these may run at once, on any machines that see "
    "the folder: each takes one job at a time by a rename, and a killed one costs at most the job it was at. Jobs that "
    "fail three times, or can never succeed, go to failed/ with a text that says why (exit code 8)."
)
COMPARE_HELP = (
    "Say what an edit changed where nothing was asked.\n\nqengine compare before.png after.png --mask mask.png\n\n"
    "Prints PSNR, shift by phase correlation, zoom and colour drift outside the mask, and writes a picture of the "
    "differences."
)
HINTS_HELP = (
    "Say what is known to go wrong with a prompt; without one, what to try when a result disappoints, and the tables "
    "of presets and templates."
)
RERUN_HELP = (
    "Repeat the run that made a picture.\n\nOn the same machine's CPU the result is the same "
    "to the bit. Input pictures are looked for at their recorded path, then beside the picture, and must be unchanged; "
    "--ref names others."
)


@cache
def root() -> click.Group:
    """The ``qengine`` command with everything below it."""
    group = Group(
        "qengine",
        callback=_root,
        invoke_without_command=True,
        help="Image editing and generation with Qwen-Image models. Alone it says what is here and what to do next.",
        context_settings=SETTINGS,
        epilog='Start with: qengine edit PHOTO "make it grayscale" -o out.png',
    )
    group.params += [
        click.Option(["--version"], is_flag=True, expose_value=False, callback=_version, help="Show the version."),
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error."),
    ]
    for command in _commands():
        group.add_command(command)
    return group


def _commands() -> list[click.Command]:
    model = [("model", "MODEL", False)]
    return [
        Command("edit", _edit, options.EDIT_SECTIONS, [("words", "[IMAGE]... [PROMPT]", True)], EDIT_HELP),
        Command("generate", _generate, options.GENERATE_SECTIONS, [("words", "[PROMPT]", True)], GENERATE_HELP),
        Command("extract", _extract, extract.SECTIONS, [("words", "[PICTURE]... [PROMPT]", True)], extract.HELP),
        Command("rerun", _rerun, options.RERUN_SECTIONS, [("picture", "PICTURE", False)], RERUN_HELP),
        Command("batch", _batch, options.BATCH_SECTIONS, [("words", "JOBS", True)], BATCH_HELP),
        Command("render", _render, RENDER_SECTIONS, [("words", "QUEUE", True)], RENDER_HELP),
        Command(
            "compare",
            _compare,
            options.COMPARE_SECTIONS,
            [("before", "BEFORE", False), ("after", "AFTER", False)],
            COMPARE_HELP,
        ),
        Command("hints", _hints, options.PLAIN_SECTIONS, [("words", "[PROMPT]", True)], HINTS_HELP),
        Command("plan", _plan, options.PLAN_SECTIONS, [("words", "[MODEL]", True)], PLAN_HELP),
        Command("pack", _pack, options.PACK_SECTIONS, [("words", "[MODEL]", True)], PACK_HELP),
        Command("stats", _stats, stats.SECTIONS, [("words", "[MODEL]", True)], stats.HELP),
        Command("info", _info, options.INFO_SECTIONS, [("words", "[SUBJECT]", True)], INFO_HELP),
        Command("pull", _pull, options.MODEL_SECTIONS, model, "Download a model into the hub's cache; resumes."),
        Command("ls", _ls, options.PLAIN_SECTIONS, (), "List the models that are here."),
        Command("rm", _rm, options.PLAIN_SECTIONS, model, "Delete a model from the hub's cache."),
        Command("verify", _verify, options.PLAIN_SECTIONS, model, "Check a model's files against their hashes."),
        Command("doctor", _doctor, options.PLAIN_SECTIONS, (), "Say what this runs on and what is missing."),
        Command(
            "completion",
            _completion,
            {},
            [("shell", "bash|zsh|fish|powershell", False)],
            'Print a shell\'s completion script.\n\nIn ~/.bashrc: eval "$(qengine completion bash)"',
        ),
        _Whole("bench", callback=_bench, help="Measure speed and memory."),
    ]


def _root() -> int:
    context = click.get_current_context()
    if context.invoked_subcommand is None:
        from .doctor import first_screen

        print(first_screen())
    return 0


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        print(f"qengine {__version__}")
        context.exit()


def _talk(values: dict[str, Any]) -> Talk:
    if values["quiet"] and values["verbose"]:
        raise RequestError("the words on stderr must be fewer or more, got both -q and -v")
    from .heard import heard
    from .progress import Talk

    talk = Talk(quiet=values["quiet"], verbose=values["verbose"])
    click.get_current_context().with_resource(heard(talk))
    return talk


def _edit(words: tuple[str, ...], **values: Any) -> int:
    from . import chain, run
    from .order import edit_order

    order = edit_order(words, values)
    return (chain if order.stages or order.then else run).carry_out(order, _talk(values))


def _generate(words: tuple[str, ...], **values: Any) -> int:
    if axes.asked(values):
        from . import sweep

        return sweep.carry_out(words, values, _talk(values))
    if values["conditioning"] is not None:
        from . import conditioning

        return conditioning.carry_out(conditioning.conditioned_order(words, values), _talk(values))
    from .order import generate_order
    from .run import carry_out

    return carry_out(generate_order(words, values), _talk(values))


def _extract(words: tuple[str, ...], **values: Any) -> int:
    return extract.carry_out(words, values, _talk(values))


def _batch(words: tuple[str, ...], **values: Any) -> int:
    from .batch import carry_out

    return carry_out(words, values, _talk(values))


def _render(words: tuple[str, ...], **values: Any) -> int:
    from .render import carry_out

    return carry_out(words, values, _talk(values))


def _compare(before: str, after: str, **values: Any) -> int:
    from .compare import show

    return show(before, after, values)


def _hints(words: tuple[str, ...], **values: Any) -> int:
    from .hints import show

    return show(words, values)


def _rerun(picture: str, **values: Any) -> int:
    from pathlib import Path

    from . import conditioning, run
    from .rerun import rerun_order

    talk = _talk(values)
    order = rerun_order(Path(picture), values, talk)
    return (run if order.conditioning is None else conditioning).carry_out(order, talk)


def _plan(words: tuple[str, ...], **values: Any) -> int:
    from .plan import show

    return show(words, values)


def _pack(words: tuple[str, ...], **values: Any) -> int:
    from .pack import carry_out

    return carry_out(words, values, _talk(values))


def _stats(words: tuple[str, ...], **values: Any) -> int:
    return stats.carry_out(words, values, _talk(values))


def _info(words: tuple[str, ...], **values: Any) -> int:
    from .info import show

    return show(words, values)


def _pull(model: str, **values: Any) -> int:
    from .models import pull

    return pull(model, values, _talk(values))


def _ls(**values: Any) -> int:
    from .models import list_all

    return list_all(values)


def _rm(model: str, **values: Any) -> int:
    from .models import remove

    return remove(model, values, _talk(values))


def _verify(model: str, **values: Any) -> int:
    from .models import verify

    return verify(model, values, _talk(values))


def _doctor(**values: Any) -> int:
    from .doctor import show

    return show(values)


def _completion(shell: str) -> int:
    from .completion import script

    print(script(root(), shell))
    return 0


class _Whole(click.Command):
    """A command that gets its words as they are, ``--`` among them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Hand every word over."""
        ctx.params["words"] = tuple(args)
        return []


def _bench(words: tuple[str, ...]) -> int:
    from ..bench.run import main

    return main(list(words)) or 0
