"""Predicted bytes of the image VAE against those that tensors really take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import kept_bytes
from qengine.engine.ceiling import AllocationMeter
from qengine.engine.vae import ImageVAE
from qengine.engine.vae.config import VaeConfig, expected_shapes
from qengine.engine.vae.cut import Cut
from qengine.engine.vae.memory import decode_bytes, encode_bytes, weight_bytes

MIB = 1 << 20


def _config(base: int, dim_mult: list[int], latent: int) -> dict[str, Any]:
    levels = len(dim_mult) - 1
    return {
        "base_dim": base,
        "dim_mult": dim_mult,
        "z_dim": latent,
        "num_res_blocks": 2,
        "temperal_downsample": [False] * levels,
        "latents_mean": [0.0] * latent,
        "latents_std": [1.0] * latent,
    }


REAL = _config(96, [1, 2, 4, 4], 16)
CONFIGS = {"real": REAL, "four levels": _config(16, [1, 2, 4, 4], 16), "wide": _config(32, [1, 2], 4)}


class Flat:
    """A checkpoint of equal numbers: bytes do not depend on values, and on the meta device not even on having any."""

    def __init__(self, config: Mapping[str, Any], device: str) -> None:
        self.device = device
        self.shapes = expected_shapes(VaeConfig.parse(config))

    def require(self, expected: Mapping[str, tuple[int, ...]], subject: str) -> None:
        pass

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full(self.shapes[name], 0.01, dtype=dtype, device=self.device)


def _load(config: Mapping[str, Any], dtype: torch.dtype, device: str, weight_format: str = "bf16") -> ImageVAE:
    component: Any = SimpleNamespace(name="vae", config=config, checkpoint=Flat(config, device))
    return ImageVAE.load(component, device=device, dtype=dtype, weight_format=weight_format)


def test_live_bytes_follow_storages_through_views_and_deletion() -> None:
    given = torch.zeros(1000)
    with AllocationMeter() as mode:
        view = (given + 1)[:3]
        assert mode.live == 4000
        second = view.double() + view
        assert mode.live == 4024
        del view
        assert mode.live == 24
        second.mul_(2)
        del second
    assert mode.live == 0
    assert mode.peak == 4048


def _measured(run: Callable[[], torch.Tensor]) -> int:
    with AllocationMeter() as mode:
        run()
    return mode.peak


VAES = {
    (kind, dtype): _load(config, dtype, "meta")
    for kind, config in CONFIGS.items()
    for dtype in (torch.float32, torch.bfloat16)
}


def _check(vae: ImageVAE, height: int, width: int, cut: Cut) -> None:
    vae.cut = cut
    size = height * vae.scale_factor, width * vae.scale_factor
    pixels = torch.zeros(1, 3, *size, device=vae.device)
    latents = torch.zeros(1, vae.latent_channels, 1, height, width, device=vae.device)
    for predict, run in ((decode_bytes, lambda: vae.decode(latents)), (encode_bytes, lambda: vae.encode(pixels))):
        measured = _measured(run)
        predicted = predict(vae.config, *size, vae.dtype.itemsize, cut)
        assert measured <= predicted <= 2 * measured + MIB, f"{predict.__name__} {predicted} for {measured}"


@settings(max_examples=15, deadline=None)
@given(
    which=st.sampled_from(sorted(VAES, key=str)),
    height=st.integers(1, 6),
    width=st.integers(1, 5),
    cut=st.builds(Cut, st.integers(1, 1 << 20)) | st.builds(Cut, st.just(1), st.integers(1, 50)),
)
def test_predicted_bytes_are_never_below_those_measured_and_at_most_twice(
    which: tuple[str, torch.dtype], height: int, width: int, cut: Cut
) -> None:
    _check(VAES[which], height, width, cut)


@pytest.mark.parametrize("cut", [Cut.of("cuda"), Cut.of("cuda", 256), Cut.of("cuda", 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_hold_at_the_real_size(dtype: torch.dtype, cut: Cut) -> None:
    _check(VAES["real", dtype], 128, 96, cut)


def test_predicted_bytes_hold_on_a_cpu() -> None:
    _check(_load(CONFIGS["four levels"], torch.float32, "cpu"), 5, 3, Cut.of("cpu", 16))


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_bytes_are_exact_and_one_weight_at_a_time_is_made_whole(weight_format: str, dtype: torch.dtype) -> None:
    vae = _load(_config(16, [1, 2], 4), dtype, "cpu", weight_format)
    latents, pixels = torch.zeros(1, 4, 1, 9, 7), torch.zeros(1, 3, 18, 14)
    runs = {
        "decoder": (decode_bytes, lambda: vae.decode(latents)),
        "encoder": (encode_bytes, lambda: vae.encode(pixels)),
    }
    for part, (predict, run) in runs.items():
        predicted = weight_bytes(vae.config, part, dtype.itemsize, weight_format)
        assert predicted == kept_bytes(vae._half(part))
        assert _measured(run) <= predict(vae.config, 18, 14, dtype.itemsize, vae.cut, weight_format)


@pytest.mark.parametrize("predict", [decode_bytes, encode_bytes])
def test_bytes_grow_with_the_tile_and_with_the_height_only_by_the_smallest_map_and_the_picture(
    predict: Callable[..., int],
) -> None:
    config = VaeConfig.parse(REAL)
    by_tile = [predict(config, 1024, 1024, 2, Cut.of("cuda", tile)) for tile in (8, 64, 256, 1024)]
    assert by_tile == sorted(by_tile)
    assert by_tile[0] < by_tile[-1] / 4
    low, high = (predict(config, height, 512, 2, Cut.of("cuda", 64)) for height in (1024, 2048))
    maps = 1024 * 512 * 3 * 4 + 7 * (1024 // 8) * (512 // 8) * 384 * 4 + 512 * (1024 // 8) * (512 // 8) * 4
    assert high - low <= maps


def test_predicting_needs_no_torch() -> None:
    code = "import sys, qengine.engine.vae.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
