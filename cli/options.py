"""The one table of flags: every spelling, in one place.

Names are written with hyphens; the pre-parser (``expand.py``) makes ``--true_cfg_scale`` the same word. ``also`` lists
the other spellings a flag is known by, written as the tools they come from write them, and is what ``--help`` shows.
"""

from __future__ import annotations

from collections.abc import Iterable

from .axes import FLAGS as SWEEP
from .blend import BLEND, CONDITIONING, KNOBS, RECORDED_CONDITIONING, VL
from .flag import Flag
from .steer import CHAIN, KEEP, REFERENCE, SIZES, TEMPLATE
from .zimage import INIT_IMAGE, START, START_BESIDE_EDITS

DEFAULT_SEED = 0

OUTPUT_TYPES = {
    "images": "images",
    "latents": "latents",
    "both": "both",
    "latent": "latents",
    "latent_images": "both",
}
DTYPES = ("auto", "float32", "bfloat16", "fp32", "bf16")
MODEL_VERSIONS = ("original", "edit", "edit-2509", "edit-2511", "z-image", "z-image-turbo")

REQUEST = (
    Flag(
        name="--prompt", short="-p", metavar="TEXT", help="What to make or change; the positional PROMPT does the same."
    ),
    Flag(
        name="--negative-prompt",
        also=("--negative_prompt",),
        metavar="TEXT",
        help="What to steer away from; used with --true-cfg-scale above 1.",
    ),
    Flag(
        name="--ref",
        short="-i",
        also=("--image", "--reference", "--control_image_path"),
        metavar="FILE...",
        many=True,
        help="A picture to edit or look at; repeat it, or give several files after one flag.",
    ),
    Flag(
        name="--steps",
        also=("--infer_steps", "--num_inference_steps"),
        kind="int",
        metavar="N",
        help="Denoising steps; the default is the model's (qengine info MODEL).",
    ),
    Flag(
        name="--true-cfg-scale",
        also=("--cfg", "--true_cfg_scale"),
        kind="float",
        metavar="X",
        help="Guidance by two forward passes; 1 switches it off.",
    ),
    Flag(
        name="--guidance-scale",
        also=("--guidance_scale",),
        kind="float",
        metavar="X",
        help="Z-Image: g of p + g (p - n), 0 switches it off. Qwen-Image models have none: there it sets "
        "--true-cfg-scale when that is not given, and is ignored with a warning when it is.",
    ),
    Flag(
        name="--seed",
        short="-s",
        kind="int",
        metavar="N",
        help=f"Seed of the noise; {DEFAULT_SEED} when not given, so that the same command makes the same picture.",
    ),
    Flag(name="--count", short="-n", kind="int", metavar="N", help="Make N pictures, of seed, seed+1, ..."),
    Flag(name="--size", metavar="WxH", help="Size in pixels, exact; any size is taken."),
    Flag(
        name="--image-size",
        also=("--image_size",),
        metavar="H W",
        words=2,
        help="Size as height, then width; both must be multiples of 16.",
    ),
    Flag(
        name="--flow-shift",
        also=("--flow_shift",),
        kind="float",
        metavar="X",
        help="Static schedule shift; by default it follows the size of the picture.",
    ),
)

VARIANT = (
    Flag(name="--edit", kind="switch", help="The files are Qwen-Image-Edit (as --model-version edit)."),
    Flag(
        name="--edit-plus",
        also=("--edit_plus",),
        kind="switch",
        help="The files are Qwen-Image-Edit-2509 (as --model-version edit-2509).",
    ),
)

MODEL = (
    Flag(
        name="--model",
        short="-m",
        metavar="MODEL",
        help="A diffusers folder, a hub id, or tiny, the small model inside qengine.",
    ),
    Flag(name="--dit", metavar="FILE", help="Transformer file; needs --vae and --text_encoder too."),
    Flag(name="--vae", metavar="FILE", help="VAE file; needs --dit and --text_encoder too."),
    Flag(
        name="--text-encoder",
        also=("--text_encoder",),
        metavar="FILE",
        help="Text encoder file; needs --dit and --vae too.",
    ),
    Flag(name="--tokenizer", metavar="DIR", help="Tokenizer folder, where the files do not say it."),
    Flag(
        name="--model-version",
        also=("--model_version",),
        choices=MODEL_VERSIONS,
        help="What single files are, where their headers cannot tell.",
    ),
    Flag(name="--offline", kind="switch", help="Use no network; models must be on this machine."),
)

DEVICE = (
    Flag(name="--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N; auto when not given."),
    Flag(name="--dtype", choices=DTYPES, help="Compute type; auto is float32 on a CPU and bfloat16 on CUDA."),
)

WEIGHTS = ("auto", "bf16", "int8", "fp8")
OFFLOADS = ("auto", "none", "blocks", "sequential")

MEMORY = (
    Flag(
        name="--vram",
        metavar="SIZE",
        help="Never use more device memory: 12GiB, 512MiB, 12GB (10^9 bytes); a bare number is GiB. By default what is "
        "free now, less a margin.",
    ),
    Flag(
        name="--ram",
        metavar="SIZE",
        help="Never use more host memory; weights that do not fit are streamed from the disk. Default as --vram.",
    ),
    Flag(
        name="--weights",
        choices=WEIGHTS,
        help="Weight format. auto is int8 or fp8 by the card's architecture, and as stored on a CPU.",
    ),
    Flag(
        name="--fp8-scaled",
        also=("--fp8_scaled", "--fp8_base"),
        kind="switch",
        help="As --weights fp8: rows with a scale each.",
    ),
    Flag(name="--fp8-vl", also=("--fp8_vl",), kind="switch", help="As --text-encoder-weights fp8."),
    Flag(
        name="--text-encoder-weights",
        choices=WEIGHTS,
        help="Weight format of the text encoder; auto follows --weights.",
    ),
    Flag(
        name="--blocks-to-swap",
        also=("--blocks_to_swap",),
        kind="int",
        metavar="N",
        help="Stream N of the transformer's blocks from host memory; by default the fewest that fit.",
    ),
    Flag(
        name="--offload",
        choices=OFFLOADS,
        help="none keeps every block on the device, sequential streams every block and holds one component at a time.",
    ),
    Flag(
        name="--text-encoder-cpu",
        also=("--text_encoder_cpu",),
        kind="switch",
        help="Run the text encoder on the CPU; it changes the last bits of the picture.",
    ),
    Flag(
        name="--vae-tile", kind="int", metavar="N", help="Rows of pixels that the VAE works at a time; fewer need less."
    ),
    Flag(name="--vae-weights", choices=WEIGHTS[1:], help="Weight format of the VAE's convolutions; bf16 by default."),
)

KERNELS = (
    Flag(
        name="--attn-mode",
        also=("--attn_mode",),
        choices=("sdpa", "torch", "flash", "xformers", "sage", "sageattn", "math"),
        help="What computes the transformer's attention: sdpa (also torch), a library that is installed, or math, the "
        "definition in float32.",
    ),
    Flag(
        name="--kernel",
        metavar="OP=NAME...",
        many=True,
        accepts=r"[a-z_][a-z0-9_.]*=[a-z0-9_-]+",
        help="Run an op in this implementation or not at all: guidance=reference, transformer.linear=triton; repeat "
        "it, or give several after one flag. qengine plan names ops and implementations.",
    ),
)

PACKED = (
    Flag(
        name="--packed",
        metavar="FILE",
        help="Packed file of the transformer, made by qengine pack; --weights follows it. By default one in the cache, "
        "made at the first run that needs it.",
    ),
)
PACK = (
    Flag(name="--weights", choices=WEIGHTS[1:], help="Weight format of the file; must be given."),
    Flag(
        name="--component",
        choices=("transformer", "text_encoder", "both"),
        help="What to pack; the transformer when not given.",
    ),
    Flag(
        name="--layout",
        choices=("slabs", "quanto"),
        help="slabs, what runs use, or quanto: the transformer in optimum-quanto's names, which holds the whole result "
        "in memory while it is made.",
    ),
    Flag(
        name="--output",
        short="-o",
        metavar="FILE",
        help="File to write; an existing one is replaced when the new one is whole. By default the place in the cache "
        "where the next run looks.",
    ),
)

HYPOTHETICAL = (
    Flag(
        name="--architecture",
        kind="int",
        metavar="N",
        help="Plan for a card of this compute capability (86 is 8.6) that is not here; 86 when --vram is given and "
        "there is no card.",
    ),
)
EXTRACTOR = (
    Flag(
        name="--extractor",
        also=("--vl-model", "--vl_model"),
        metavar="DIR",
        help="Plan reading pictures by a Qwen3-VL folder, in place of a run; name the pictures with --ref.",
    ),
    *(flag for flag in VL if flag.key in ("vl_device", "vl_dtype", "vl_weights", "text", "system_prompt")),
    *(flag for flag in VL if flag.key == "mask_tokens"),
    *(flag for flag in KNOBS if flag.key == "hidden_layer"),
)
EXPLAIN = (Flag(name="--explain", kind="switch", help="Say of every kernel why the preferred ones are not used."),)

OUTPUT = (
    Flag(
        name="--output",
        short="-o",
        metavar="PATH",
        help="File (.png, .jpg, .webp) or existing folder to write to. A file you name is overwritten; one that "
        "qengine names never is.",
    ),
    Flag(
        name="--save-path",
        also=("--save_path",),
        metavar="PATH",
        help="As --output, but a name without a known suffix is a folder, made when the first result is written.",
    ),
    Flag(
        name="--output-type",
        also=("--output_type",),
        choices=tuple(OUTPUT_TYPES),
        help="What to write; latents are a .safetensors file. latent is latents, latent_images is both.",
    ),
    Flag(name="--preview", metavar="DIR", help="Write one small PNG per step into DIR."),
    Flag(name="--no-metadata", also=("--no_metadata",), kind="switch", help="Write no metadata into the files."),
)

NAMING = (
    Flag(
        name="--append-original-name",
        also=("--append_original_name",),
        kind="switch",
        help="Add the name of the first picture to the name of the output.",
    ),
)

COST = (
    Flag(
        name="--cost-per-hour",
        kind="float",
        metavar="RATE",
        help="Say what each picture costs on a machine of this price per hour, and a thousand of them.",
    ),
)
RESUME = (
    Flag(name="--resume", kind="switch", help="Go on with an earlier batch in the same folder: what is done is kept."),
)
COMPARE = (
    Flag(name="--mask", metavar="FILE", help="White where a change was asked; those pixels do not count."),
    Flag(
        name="--output",
        short="-o",
        metavar="FILE",
        help="Picture of the differences to write; <AFTER>_compared.png, or the next free name, when not given.",
    ),
)

TALK = (
    Flag(name="--json", kind="switch", help="Print one JSON document on stdout."),
    Flag(name="--quiet", short="-q", kind="switch", help="Say nothing on stderr but errors."),
    Flag(name="--verbose", short="-v", kind="switch", help="Say more on stderr."),
    Flag(name="--debug", kind="switch", help="Show the traceback of an error."),
)

SEED_AND_COUNT = tuple(flag for flag in REQUEST if flag.key in ("seed", "count", "ref"))

EDIT_SECTIONS = {
    "Request": REQUEST + TEMPLATE,
    "References": REFERENCE + CHAIN,
    "Keeping": KEEP + SIZES,
    "Model": MODEL + VARIANT,
    "Device": DEVICE,
    "Memory": MEMORY + PACKED,
    "Kernels": KERNELS,
    "Output": OUTPUT + NAMING + COST,
    "Words": TALK,
}
JOB_SECTIONS = {**EDIT_SECTIONS, "Starting": START_BESIDE_EDITS}
BATCH_SECTIONS = {"Batch": RESUME, **JOB_SECTIONS}
COMPARE_SECTIONS = {"Comparison": COMPARE, "Words": TALK}
GENERATE_SECTIONS = {
    "Request": tuple(flag for flag in REQUEST if flag.key != "ref") + TEMPLATE,
    "Starting": START,
    "Pictures that are read": SWEEP + VL + CONDITIONING,
    "Pictures as conditioning": KNOBS,
    "Blend with the prompt": BLEND,
    "Model": MODEL,
    "Device": DEVICE,
    "Memory": MEMORY + PACKED,
    "Kernels": KERNELS,
    "Output": OUTPUT + COST,
    "Words": TALK,
}
PLAN_SECTIONS = {
    "Memory": MEMORY + HYPOTHETICAL,
    "Kernels": KERNELS + EXPLAIN,
    "Request": tuple(flag for flag in REQUEST if flag.key not in ("seed", "count")),
    "Starting": START,
    "Extractor": EXTRACTOR,
    "Model": tuple(flag for flag in MODEL if flag.key != "model") + VARIANT,
    "Device": DEVICE,
    "Words": TALK,
}
RERUN_SECTIONS = {
    "Request": (*SEED_AND_COUNT, INIT_IMAGE, *RECORDED_CONDITIONING),
    "Model": MODEL,
    "Device": DEVICE,
    "Memory": MEMORY + PACKED,
    "Kernels": KERNELS,
    "Output": OUTPUT + COST,
    "Words": TALK,
}
PACK_SECTIONS = {
    "File": PACK,
    "Model": tuple(flag for flag in MODEL if flag.key != "model") + VARIANT,
    "Device": DEVICE,
    "Words": TALK,
}
INFO_SECTIONS = {"Model": tuple(flag for flag in MODEL if flag.key != "model"), "Words": TALK}
MODEL_SECTIONS = {"Model": tuple(flag for flag in MODEL if flag.key == "offline"), "Words": TALK}
PLAIN_SECTIONS = {"Words": TALK}


def flags_by_spelling(sections: Iterable[Iterable[Flag]]) -> dict[str, Flag]:
    """Every spelling of the given flags, to the flag it means."""
    return {spelling: flag for section in sections for flag in section for spelling in flag.spellings}
