"""The flux-type autoencoder against diffusers: pixels, latents, bands and bytes."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from kept import kept_bytes
from qengine.engine.ceiling import AllocationMeter
from qengine.engine.kl import KlVAE
from qengine.engine.kl.config import KlConfig
from qengine.engine.kl.cut import kl_cut
from qengine.engine.kl.memory import decode_bytes, encode_bytes, weight_bytes
from qengine.engine.vae.cut import Cut
from qengine.errors import CheckpointError, RequestError
from qengine.loaders.component import Component
from qengine.loaders.zimage.shapes import vae_shapes
from zpipelines import VAE, open_zimage, reference_zimage, shared_zimage

RELEASED = VAE | {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
OTHERS = {
    "one level": {"block_out_channels": [8], "layers_per_block": 2},
    "equal levels": {"block_out_channels": [8, 8], "layers_per_block": 1},
    "narrow to wide": {"block_out_channels": [4, 8, 16], "layers_per_block": 2},
}


def load(**options: Any) -> KlVAE:
    return KlVAE.load(open_zimage(shared_zimage()).vae, **{"device": "cpu", "dtype": torch.float32} | options)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels_of(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def reference_encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    mean = vae.encode(pixels).latent_dist.mode()
    return ((mean - vae.config.shift_factor) * vae.config.scaling_factor)[:, :, None]


@torch.no_grad()
def reference_decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents[:, :, 0] / vae.config.scaling_factor + vae.config.shift_factor).sample


@pytest.mark.parametrize(("height", "width"), [(64, 96), (8, 8), (40, 24), (136, 16)])
def test_pixels_and_latents_equal_diffusers(height: int, width: int) -> None:
    stock, vae = reference_zimage().vae, load()
    pixels, latents = pixels_of(height, width), noise(1, 16, 1, height // 8, width // 8)
    expected = reference_encode(stock, pixels)
    assert expected.shape == vae.encode(pixels).shape and expected.std() > 0.1
    torch.testing.assert_close(vae.encode(pixels), expected, atol=1e-5, rtol=0)
    expected = reference_decode(stock, latents)
    assert expected.std() > 0.1
    torch.testing.assert_close(vae.decode(latents), expected.clamp(-1, 1), atol=1e-5, rtol=0)


class Stock:
    """The tensors of a diffusers model as a checkpoint."""

    def __init__(self, vae: Any) -> None:
        self.tensors = dict(vae.state_dict())

    def require(self, expected: Mapping[str, tuple[int, ...]], subject: str) -> None:
        assert {name: tuple(tensor.shape) for name, tensor in self.tensors.items()} == dict(expected), subject

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.tensors[name].to(dtype, copy=True)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_numbers_of_levels_equal_diffusers(kind: str) -> None:
    config = VAE | OTHERS[kind]
    levels = len(config["block_out_channels"])
    types = {f"{way}_block_types": config[f"{way}_block_types"][:levels] for way in ("down", "up")}
    stock: Any = AutoencoderKL(**(config | types)).eval()
    component: Any = SimpleNamespace(name="vae", config=config, checkpoint=Stock(stock))
    vae = KlVAE.load(component, device="cpu", dtype=torch.float32, vae_tile=4)
    assert vae.scale_factor == 2 ** (levels - 1)
    pixels = pixels_of(12 * vae.scale_factor, 20 * vae.scale_factor)
    torch.testing.assert_close(vae.encode(pixels), reference_encode(stock, pixels), atol=1e-5, rtol=0)
    latents = noise(1, 16, 1, 12, 20)
    expected = reference_decode(stock, latents).clamp(-1, 1)
    torch.testing.assert_close(vae.decode(latents), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tile", [8, 24, 104])
def test_the_height_of_the_bands_does_not_change_the_result(tile: int) -> None:
    pixels, latents = pixels_of(104, 64), noise(1, 16, 1, 13, 8)
    whole, cut = load(vae_tile=4096), load(vae_tile=tile)
    torch.testing.assert_close(cut.encode(pixels), whole.encode(pixels), atol=1e-6, rtol=0)
    torch.testing.assert_close(cut.decode(latents), whole.decode(latents), atol=1e-6, rtol=0)


def test_a_batch_is_its_pictures_one_by_one_and_inputs_stay_as_they_are() -> None:
    vae, pixels, latents = load(), pixels_of(16, 24).repeat(2, 1, 1, 1), noise(2, 16, 1, 2, 3)
    pixels[1] *= -1
    kept = pixels.clone(), latents.clone()
    assert torch.equal(vae.encode(pixels), torch.cat([vae.encode(image) for image in pixels.split(1)]))
    assert torch.equal(vae.decode(latents), torch.cat([vae.decode(image) for image in latents.split(1)]))
    assert torch.equal(pixels, kept[0]) and torch.equal(latents, kept[1])


def test_every_tensor_is_felt(monkeypatch: pytest.MonkeyPatch) -> None:
    part = open_zimage(shared_zimage()).vae
    read, zeroed = part.checkpoint.read, ""
    monkeypatch.setattr(part.checkpoint, "read", lambda name, dtype=None: read(name, dtype) * (name != zeroed))
    pixels, latents = pixels_of(16, 16), noise(1, 16, 1, 2, 2)

    def run(half: str) -> torch.Tensor:
        vae = KlVAE.load(part, device="cpu", dtype=torch.float32, parts=[half])
        return vae.encode(pixels) if half == "encoder" else vae.decode(latents)

    base, names = {half: run(half) for half in ("encoder", "decoder")}, list(part.checkpoint.tensors)
    assert set(names) == set(vae_shapes(part.config)) and len(names) > 100
    # A constant added to all keys of an attention moves every score of a query alike, which softmax does not see.
    blind = {f"{half}.mid_block.attentions.0.to_k.bias" for half in ("encoder", "decoder")}
    for zeroed in names:
        half = zeroed.partition(".")[0]
        change = (run(half) - base[half]).abs().max()
        assert (change < 1e-5) if zeroed in blind else (change > 1e-5), f"{zeroed}: {change}"


def test_latents_come_back_as_pixels_and_parts_can_be_released() -> None:
    vae = load()
    vae.release("encoder")
    assert vae.parts == ("decoder",)
    with pytest.raises(RequestError, match="encoder must be loaded"):
        vae.encode(pixels_of(8, 8))
    assert load(parts=["encoder"]).parts == ("encoder",)


def test_bfloat16_differs_from_float32_by_no_more_than_twice_the_reference_in_bfloat16() -> None:
    pixels, latents = pixels_of(64, 64), noise(1, 16, 1, 8, 8)
    stock = AutoencoderKL.from_pretrained(shared_zimage() / "vae", torch_dtype=torch.bfloat16).eval()
    exact, half = load(), load(dtype=torch.bfloat16)
    for ours, wanted, other in (
        (half.encode(pixels), exact.encode(pixels), reference_encode(stock, pixels.bfloat16())),
        (half.decode(latents), exact.decode(latents), reference_decode(stock, latents.bfloat16()).clamp(-1, 1)),
    ):
        error, allowed = ((value.float() - wanted).square().mean().sqrt() for value in (ours, other))
        assert ours.dtype == torch.float32
        assert 0 < error <= 2 * allowed


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_one_byte_weights_change_the_pixels_a_little(weight_format: str) -> None:
    latents = noise(1, 16, 1, 4, 4)
    exact, stored = load().decode(latents), load(weight_format=weight_format).decode(latents)
    error = (stored - exact).square().mean().sqrt() / exact.std()
    # Rows of a hundred random numbers in 8 bits; real weights are measured elsewhere.
    assert 0 < error < 0.2


def test_wrong_input_is_refused() -> None:
    vae = load()
    with pytest.raises(RequestError, match="multiple of 8 wide and high, got 20x16"):
        vae.encode(pixels_of(16, 20))
    with pytest.raises(RequestError, match=r"latents must be of shape \[any, 16, 1, any, any\]"):
        vae.decode(noise(1, 4, 1, 2, 2))
    with pytest.raises(RequestError, match="parts must be some of encoder, decoder"):
        load(parts=["middle"])
    with pytest.raises(RequestError, match="dtype must be float32 or bfloat16"):
        load(dtype=torch.float16)
    part = open_zimage(shared_zimage()).vae
    config = {key: value for key, value in part.config.items() if key != "shift_factor"}
    with pytest.raises(CheckpointError, match="must name shift_factor"):
        KlVAE.load(Component("vae", config, part.checkpoint), device="cpu", dtype=torch.float32)


class Flat:
    """A checkpoint of numbers that are not there: bytes do not depend on values, nor on having any."""

    def __init__(self, config: Mapping[str, Any], device: str) -> None:
        self.shapes, self.device = vae_shapes(config), device

    def require(self, expected: Mapping[str, tuple[int, ...]], subject: str) -> None:
        pass

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full(self.shapes[name], 0.01, dtype=dtype, device=self.device)


@functools.cache
def flat(kind: str, dtype: torch.dtype, device: str = "meta", weight_format: str = "bf16") -> KlVAE:
    config = {"released": RELEASED, "tiny": VAE}[kind]
    component: Any = SimpleNamespace(name="vae", config=config, checkpoint=Flat(config, device))
    return KlVAE.load(component, device=device, dtype=dtype, weight_format=weight_format)


def measured(run: Callable[[], Any]) -> int:
    with AllocationMeter() as meter:
        run()
    return meter.peak


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_decoding_512_pixels_takes_less_than_a_third_of_what_diffusers_takes(kind: str) -> None:
    with torch.device("meta"), torch.no_grad():
        stock: Any = AutoencoderKL(**RELEASED).eval()
        theirs = measured(lambda: stock.decode(torch.zeros(1, 16, 64, 64)))
    vae = flat("released", torch.float32)
    vae.cut = kl_cut(kind)
    latents = torch.zeros(1, 16, 1, 64, 64, device="meta")
    ours = measured(lambda: vae.decode(latents))
    assert sum(torch.Size(shape).numel() for shape in vae_shapes(RELEASED).values()) == 83_819_683
    assert 4 * 128 * 512 * 512 < ours < theirs / 3


@pytest.mark.parametrize("cut", [Cut(1 << 18), Cut(1, 16), Cut(1 << 30)], ids=["values", "rows", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "height", "width"), [("released", 64, 96), ("tiny", 72, 40), ("tiny", 8, 8)])
def test_predicted_bytes_are_never_below_those_measured_and_at_most_twice(
    kind: str, height: int, width: int, dtype: torch.dtype, cut: Cut
) -> None:
    vae = flat(kind, dtype)
    vae.cut, config = cut, KlConfig.parse({"released": RELEASED, "tiny": VAE}[kind])
    pixels = torch.zeros(1, 3, height, width, device="meta")
    latents = torch.zeros(1, 16, 1, height // 8, width // 8, device="meta")
    for predict, run in ((decode_bytes, lambda: vae.decode(latents)), (encode_bytes, lambda: vae.encode(pixels))):
        predicted, found = predict(config, height, width, dtype.itemsize, cut), measured(run)
        assert found <= predicted <= 2 * found, predict.__name__


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_bytes_are_exact(weight_format: str, dtype: torch.dtype) -> None:
    vae, config = flat("tiny", dtype, "cpu", weight_format), KlConfig.parse(VAE)
    pixels, latents = torch.zeros(1, 3, 24, 16), torch.zeros(1, 16, 1, 3, 2)
    runs = {
        "decoder": (decode_bytes, lambda: vae.decode(latents)),
        "encoder": (encode_bytes, lambda: vae.encode(pixels)),
    }
    for part, (predict, run) in runs.items():
        assert weight_bytes(config, part, dtype.itemsize, weight_format) == kept_bytes(vae._half(part))
        assert measured(run) <= predict(config, 24, 16, dtype.itemsize, vae.cut, weight_format)


def test_predicting_needs_no_torch() -> None:
    code = "import sys, qengine.engine.kl.memory, qengine.engine.zimage.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
