"""How much of a schedule is run where a run starts from a picture; needs no torch."""

from __future__ import annotations

DEFAULT_STRENGTH = 0.75
"""Where a picture to start from is given and nothing is said of its strength."""


def actual_steps(steps: int, strength: float) -> int:
    """``min(int(n * strength), n)``, the product raised by 1e-9, so that 0.29 of 100 steps are 29.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/pipelines/z_image/pipeline_z_image_img2img.py, which runs
    ``ceil(n * strength)`` steps and so starts 9 steps at strength 0.9 from pure noise.
    """
    return min(int(steps * strength + 1e-9), steps)


def start_notes(strength: float, steps: int, evaluations: int) -> tuple[str, ...]:
    """What a user should hear of where a run starts.

    Args:
        strength: share of the schedule that is run.
        steps: as asked.
        evaluations: network evaluations of the whole schedule.
    """
    actual = actual_steps(evaluations, strength)
    said = f"[img2img] strength={strength:g}, steps={steps}, actual_steps={actual}"
    if not actual:
        return said, "[img2img] no step is run: the result is the picture through the VAE and back"
    return said, f"[img2img] Starting denoising from step {evaluations - actual}, {actual} steps remaining"
