"""Help, version, completion, the first screen and doctor: what they say, and what they do not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from qengine import __version__

HEAVY = ("torch", "transformers", "diffusers", "PIL", "rich", "numpy", "safetensors", "huggingface_hub", "typer")
REPORT = (
    "import sys; from qengine.cli import main; code = main(sys.argv[1:]); print(code, *sys.modules, file=sys.stderr)"
)


def imported_by(*words: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", REPORT, *words], capture_output=True, text=True, check=True)
    code, *modules = done.stderr.split()
    assert code == "0" and done.stdout
    return {name for name in modules if name in HEAVY}


@pytest.mark.parametrize("words", [["--help"], ["edit", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert imported_by(*words) == set()


def test_M44_help_names_every_option_of_the_seed(run) -> None:
    seed = ["--dit", "--vae", "--text_encoder", "--prompt", "--negative_prompt", "--image_size", "--infer_steps"]
    seed += ["--guidance_scale", "--save_path", "--output_type", "--seed", "--flow_shift"]
    ours = [
        "--true-cfg-scale",
        "--cfg",
        "--size",
        "--count",
        "--model",
        "--offline",
        "--json",
        "--preview",
        "--no-metadata",
    ]
    editing = [
        "--edit",
        "--edit_plus",
        "--control_image_path",
        "--append_original_name",
        "--ref",
        "--image",
        "--reference",
    ]
    for command, names in (("generate", seed + ours), ("edit", seed + ours + editing)):
        code, out, _ = run(command, "--help")
        words = set(out.replace("[", " ").replace("]", " ").replace(",", " ").split())
        assert code == 0
        assert not [name for name in names if name not in words]


def test_help_lists_every_command(run) -> None:
    out = run("--help")[1]
    for name in ("edit", "generate", "info", "rerun", "doctor", "pull", "ls", "rm", "verify", "completion", "bench"):
        assert f"\n  {name} " in out


def test_the_default_seed_is_said(run) -> None:
    assert "0 when not given" in " ".join(run("edit", "--help")[1].split())


def test_version(run) -> None:
    assert run("--version")[1] == f"qengine {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell", "pwsh"])
def test_completion_prints_a_script(run, shell: str) -> None:
    code, out, _ = run("completion", shell)
    assert code == 0 and "_QENGINE_COMPLETE" in out


def test_completion_of_an_unknown_shell_is_refused(run) -> None:
    code, _, err = run("completion", "tcsh")
    assert code == 2 and "shell must be one of bash, zsh, fish, powershell, got 'tcsh'" in err


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"_QENGINE_COMPLETE": "bash_complete", "COMP_WORDS": "qengine ed", "COMP_CWORD": "1"}, "plain,edit"),
        (
            {"_QENGINE_COMPLETE": "bash_complete", "COMP_WORDS": "qengine edit --infer", "COMP_CWORD": "2"},
            "plain,--infer-steps",
        ),
        (
            {"_QENGINE_COMPLETE": "powershell_complete", "COMP_WORDS": "edit\n--true", "COMP_INCOMPLETE": "--true"},
            "--true-cfg-scale\t",
        ),
    ],
)
def test_completion_answers_the_shell(
    run, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, _ = run()
    assert code == 0
    assert any(line.startswith(expected) for line in out.splitlines())


def test_the_first_screen_says_what_is_here_and_one_next_command(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    code, out, _ = run()
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert __version__ in rows["qengine"] and "device" in rows and "models" in rows
    assert rows["next"].split(maxsplit=1)[1].startswith("qengine ")


def test_E17_doctor_names_versions_devices_native_library_and_caches(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "cache"))
    _, out, _ = run("doctor", "--json")
    rows = {row["subject"]: row["words"] for row in json.loads(out)}
    assert rows["qengine"] == __version__
    assert {"torch", "transformers", "torch device", "native", "tiny model"} <= set(rows)
    assert rows["models"].startswith(str(tmp_path / "hf")) and "free" in rows["models"]
    assert rows["cache"].startswith(str(tmp_path / "cache"))
    code, text, _ = run("doctor")
    assert code == (1 if "bad " in text else 0)


def test_bench_gets_its_words(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    module = types.ModuleType("qengine.bench.run")
    seen: list[list[str]] = []
    monkeypatch.setattr(module, "main", lambda words: seen.append(words) or 0, raising=False)
    monkeypatch.setitem(sys.modules, "qengine.bench.run", module)
    import qengine.bench

    monkeypatch.setattr(qengine.bench, "run", module, raising=False)
    assert run("bench", "--quick", "-k", "vae", "--", "-x", "--help")[0] == 0
    assert seen == [["--quick", "-k", "vae", "--", "-x", "--help"]]
