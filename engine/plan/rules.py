"""What follows from the architecture and the model alone: weight formats and rates; never from free memory."""

from __future__ import annotations

from dataclasses import dataclass

from .budget import Choices
from .facts import DeviceFacts
from .jobs import JobFacts

OLDEST_INT8, HOPPER, CONSUMER_BLACKWELL = 75, 90, 120

ASSUMED_TFLOPS = {
    80: {"bf16": 200.0, "int8": 350.0, "fp8": 200.0},
    86: {"bf16": 58.0, "int8": 150.0, "fp8": 58.0},
    89: {"bf16": 140.0, "int8": 350.0, "fp8": 280.0},
    90: {"bf16": 620.0, "int8": 1000.0, "fp8": 1000.0},
    100: {"bf16": 1200.0, "int8": 2000.0, "fp8": 2000.0},
    120: {"bf16": 180.0, "int8": 400.0, "fp8": 360.0},
}
"""Sustained rates by architecture where none were measured; only a hint is ever based on them."""

ASSUMED_LINK_BYTES_PER_SECOND = 12e9


@dataclass(frozen=True)
class Formats:
    """Weight formats and compute dtype of a run.

    Attributes:
        transformer: format of the transformer's blocks.
        encoder: format of the text encoder's layers.
        vae: format of the VAE's convolutions.
        plain: safetensors name of the compute dtype.
    """

    transformer: str
    encoder: str
    vae: str
    plain: str


def auto_format(device: DeviceFacts) -> str:
    """``bf16`` (as stored) on a CPU; ``fp8`` on sm90 to sm119; ``int8`` on sm75 to sm89 and from sm120 on."""
    if device.kind == "cpu" or device.architecture is None or device.architecture < OLDEST_INT8:
        return "bf16"
    return "fp8" if HOPPER <= device.architecture < CONSUMER_BLACKWELL else "int8"


def pick_formats(device: DeviceFacts, job: JobFacts, choices: Choices) -> Formats:
    """What is chosen, and the rule where nothing is."""
    main = auto_format(device) if choices.weights == "auto" else choices.weights
    encoder = main if choices.text_encoder_weights == "auto" else choices.text_encoder_weights
    if choices.text_encoder_cpu and choices.text_encoder_weights == "auto":
        encoder = "bf16"
    dtype = job.dtype
    if dtype == "auto":
        dtype = "float32" if device.kind == "cpu" else "bfloat16"
    return Formats(main, encoder, choices.vae_weights, "F32" if dtype == "float32" else "BF16")


def step_seconds(device: DeviceFacts, flops: float, weight_format: str, streamed_bytes: int) -> float | None:
    """The larger of computing and copying, which overlap; None where nothing is known of the device."""
    rates = device.probes.get("tflops") or _assumed(device.architecture)
    if rates is None or weight_format not in rates:
        return None
    link = device.link_bytes_per_second or ASSUMED_LINK_BYTES_PER_SECOND
    return max(flops / (rates[weight_format] * 1e12), streamed_bytes / link)


def _assumed(architecture: int | None) -> dict[str, float] | None:
    if architecture is None:
        return None
    known = [number for number in ASSUMED_TFLOPS if number <= architecture]
    return ASSUMED_TFLOPS[max(known)] if known else None
