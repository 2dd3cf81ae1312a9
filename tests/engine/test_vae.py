"""The 2-D image VAE against diffusers' 3-D one, and bands against whole maps."""

from __future__ import annotations

# pyright: reportPrivateImportUsage=false
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import kept_bytes, tensors_of
from qengine.engine.vae import ImageVAE
from qengine.engine.vae.bands import Split
from qengine.engine.vae.config import VaeConfig, expected_shapes
from qengine.engine.vae.cut import Cut
from qengine.engine.vae.layers import Rows
from qengine.engine.vae.model import PARTS
from qengine.errors import CheckpointError, RequestError
from qengine.kernels.quant import dequantise_rows
from qengine.loaders.checkpoint import Checkpoint
from qengine.loaders.component import Component
from safetensors.torch import save_file

TINY = {"base_dim": 16, "dim_mult": [1, 2, 4], "z_dim": 16, "temperal_downsample": [False, True]}
FOUR_LEVELS = {"base_dim": 16, "dim_mult": [1, 2, 4, 4], "z_dim": 16, "temperal_downsample": [False, True, True]}
FOUR_CHANNELS = FOUR_LEVELS | {"z_dim": 4, "temperal_downsample": [True, True, False]}
LAYERED = TINY | {"input_channels": 4}
CONFIGS = {"tiny": TINY, "four levels": FOUR_LEVELS, "four channels": FOUR_CHANNELS, "layered": LAYERED}
SIZES = [(1, 5, 7), (2, 9, 4), (1, 1, 1)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Maps of a few pixels: on a busy machine a second thread costs more to wait for than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _random_model(**sizes: Any) -> AutoencoderKLQwenImage:
    """Random weights in which every tensor matters: gains around one, no bias zero."""
    generator = torch.Generator().manual_seed(1)
    latent = sizes["z_dim"]
    mean = torch.randn(latent, generator=generator).tolist()
    std = (torch.rand(latent, generator=generator) + 0.5).tolist()
    model = AutoencoderKLQwenImage(**sizes, latents_mean=mean, latents_std=std).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("gamma"):
            tensor.copy_(1 + 0.1 * noise)
        elif name.endswith("bias"):
            tensor.copy_(0.1 * noise)
        else:
            tensor.copy_(noise * tensor[0].numel() ** -0.5)
    return model


def _component(folder: Path, model: AutoencoderKLQwenImage, **changed: torch.Tensor | None) -> Component:
    """The model as a checkpoint; ``changed`` replaces tensors, or leaves them out where it says None."""
    tensors = {
        name: tensor.contiguous() for name, tensor in (model.state_dict() | changed).items() if tensor is not None
    }
    path = folder / "vae.safetensors"
    save_file(tensors, path)
    return Component("vae", dict(model.config), Checkpoint.open([path]))


@functools.cache
def _model(kind: str) -> AutoencoderKLQwenImage:
    return _random_model(**CONFIGS[kind])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vae")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> ImageVAE:
    return ImageVAE.load(_component(folder, _model("tiny")), device="cpu", dtype=torch.float32)


@pytest.fixture
def tiny(loaded: ImageVAE) -> ImageVAE:
    loaded.cut = Cut.of("cpu")
    return loaded


def _scales(model: AutoencoderKLQwenImage) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(model.config["latents_mean"]).view(shape), torch.tensor(model.config["latents_std"]).view(shape)


def _encoded(model: AutoencoderKLQwenImage, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = _scales(model)
    return (model.encode(pixels.unsqueeze(2), return_dict=False)[0].mode() - mean) / std


def _decoded(model: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    mean, std = _scales(model)
    return model.decode(latents * std + mean, return_dict=False)[0][:, :, 0]


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) * 2 - 1


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_encode_and_decode_equal_diffusers_within_1e_5(tmp_path: Path, kind: str, size: tuple[int, int, int]) -> None:
    model = _model(kind)
    vae = ImageVAE.load(_component(tmp_path, model), device="cpu", dtype=torch.float32)
    batch, height, width = size
    pixels = _pixels(batch, model.config["input_channels"], height * vae.scale_factor, width * vae.scale_factor)
    latents = _noise(batch, vae.latent_channels, 1, height, width)
    torch.testing.assert_close(vae.encode(pixels), _encoded(model, pixels), atol=1e-5, rtol=0)
    expected = _decoded(model, latents)
    assert expected.abs().lt(1).float().mean() > 0.5
    torch.testing.assert_close(vae.decode(latents), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "factor"), [("four levels", 8), ("tiny", 4)])
def test_R01_a_picture_becomes_a_normalised_latent_of_16_channels(tmp_path: Path, kind: str, factor: int) -> None:
    model = _model(kind)
    vae = ImageVAE.load(_component(tmp_path, model), device="cpu", dtype=torch.float32, parts=("encoder",))
    pixels = _pixels(1, 3, 48, 32)
    latents = vae.encode(pixels)
    assert vae.scale_factor == factor
    assert latents.shape == (1, 16, 1, 48 // factor, 32 // factor)
    assert latents.is_contiguous()
    mean, std = _scales(model)
    raw = model.encode(pixels.unsqueeze(2), return_dict=False)[0].mode()
    torch.testing.assert_close(latents * std + mean, raw, atol=1e-5, rtol=0)


WHOLE = Cut(1 << 40)


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 11),
    width=st.integers(1, 6),
    cut=st.builds(Cut, st.sampled_from([1, 3000, 20_000])) | st.builds(Cut, st.just(1), st.integers(1, 45)),
)
def test_bands_of_any_height_give_the_whole_map_within_1e_6(
    loaded: ImageVAE, height: int, width: int, cut: Cut
) -> None:
    pixels, latents = _pixels(1, 3, height * 4, width * 4), _noise(1, 16, 1, height, width)
    results = []
    for loaded.cut in (WHOLE, cut):
        results.append((loaded.encode(pixels), loaded.decode(latents)))
    (encoded, decoded), (banded_encoded, banded_decoded) = results
    # Relative to the largest value: latents reach 4, pixels 1.
    torch.testing.assert_close(banded_encoded, encoded, atol=1e-6 * max(1.0, float(encoded.abs().max())), rtol=0)
    torch.testing.assert_close(banded_decoded, decoded, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tile", [1, 7, 8, 33, 64, 1000])
def test_three_downsamplings_in_tiles_give_the_whole_map_within_1e_6(tmp_path: Path, tile: int) -> None:
    component = _component(tmp_path, _model("four levels"))
    vae = ImageVAE.load(component, device="cpu", dtype=torch.float32, vae_tile=tile)
    pixels, latents = _pixels(1, 3, 72, 40), _noise(1, 16, 1, 9, 5)
    tiled = vae.encode(pixels), vae.decode(latents)
    vae.cut = WHOLE
    whole = vae.encode(pixels)
    torch.testing.assert_close(tiled[0], whole, atol=1e-6 * max(1.0, float(whole.abs().max())), rtol=0)
    torch.testing.assert_close(tiled[1], vae.decode(latents), atol=1e-6, rtol=0)


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_a_tile_is_the_height_of_the_bands_that_meet_the_image(tiny: ImageVAE, half: str) -> None:
    heights: list[int] = []
    split = Split.bands

    def record(self: Split, rows: torch.Tensor) -> Any:
        bands = split(self, rows)
        heights.extend(band.shape[2] for band in bands if band.shape[3] == 24)
        return bands

    tiny.cut = Cut.of("cpu", 10)
    with mock.patch.object(Split, "bands", record):
        tiny.encode(_pixels(1, 3, 32, 24)) if half == "encode" else tiny.decode(_noise(1, 16, 1, 8, 6))
    assert max(heights) <= 10
    assert len(heights) >= 4
    assert sum(heights) == 32


def test_images_of_a_batch_do_not_see_each_other(tiny: ImageVAE) -> None:
    pixels, latents = _pixels(3, 3, 32, 24), _noise(3, 16, 1, 8, 6)
    encoded, decoded = tiny.encode(pixels), tiny.decode(latents)
    for index in range(3):
        assert torch.equal(tiny.encode(pixels[index : index + 1])[0], encoded[index])
        assert torch.equal(tiny.decode(latents[index : index + 1])[0], decoded[index])


@pytest.mark.parametrize(("weight_format", "least_psnr"), [("int8", 35), ("fp8", 25)])
def test_weights_of_one_byte_are_their_dequantised_rows_and_stay_near(
    tmp_path: Path, weight_format: str, least_psnr: float
) -> None:
    component = _component(tmp_path, _model("four levels"))
    plain = ImageVAE.load(component, device="cpu", dtype=torch.float32)
    vae = ImageVAE.load(component, device="cpu", dtype=torch.float32, weight_format=weight_format)
    assert kept_bytes(vae._half("decoder")) < 0.4 * kept_bytes(plain._half("decoder"))
    latents, pixels = _noise(1, 16, 1, 6, 5), _pixels(1, 3, 48, 40)
    error = vae.decode(latents) - plain.decode(latents)
    assert 0 < error.abs().max()
    assert 10 * torch.log10(4 / error.square().mean()) > least_psnr
    assert 0 < (vae.encode(pixels) - plain.encode(pixels)).abs().mean() < 0.2

    def whole(rows: Rows) -> torch.Tensor:
        return dequantise_rows(rows.stored, rows.scale, rows.group).view(-1).clone()

    convs = [
        (a, b)
        for a, b in zip(*(tensors_of([v._half(part) for part in PARTS]) for v in (vae, plain)), strict=True)
        if isinstance(a, Rows)
    ]
    assert len(convs) > 40
    for rows, weight in convs:
        assert isinstance(weight, torch.Tensor)
        matrix = weight.permute(0, 2, 3, 1).flatten(1)
        step = matrix.abs().amax(1, keepdim=True) * (1 / 60 if weight_format == "int8" else 1 / 14)
        assert ((whole(rows).view_as(matrix) - matrix).abs() <= step).all()


def test_an_unknown_weight_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="weight format"):
        ImageVAE.load(_component(tmp_path, _model("tiny")), device="cpu", dtype=torch.float32, weight_format="int4")


def test_a_run_twice_gives_the_same_bits_and_leaves_its_inputs_alone(tiny: ImageVAE) -> None:
    pixels, latents = _pixels(1, 3, 32, 24), _noise(1, 16, 1, 8, 6)
    copies = pixels.clone(), latents.clone()
    assert torch.equal(tiny.encode(pixels), tiny.encode(pixels))
    assert torch.equal(tiny.decode(latents), tiny.decode(latents))
    assert torch.equal(pixels, copies[0])
    assert torch.equal(latents, copies[1])
    assert not tiny.decode(latents).requires_grad


def test_strided_inputs_give_the_same_result(tiny: ImageVAE) -> None:
    pixels, latents = _pixels(1, 3, 64, 24)[:, :, ::2], _noise(1, 16, 1, 6, 16)[..., ::2]
    assert torch.equal(tiny.encode(pixels), tiny.encode(pixels.contiguous()))
    assert torch.equal(tiny.decode(latents), tiny.decode(latents.contiguous()))


def test_zeroing_any_one_tensor_that_a_single_frame_meets_changes_the_output(tmp_path: Path) -> None:
    model = _random_model(**TINY | {"base_dim": 4})
    component = _component(tmp_path, model)
    tensors = model.state_dict()
    inputs = {"encoder": _pixels(1, 3, 8, 8), "decoder": _noise(1, 16, 1, 2, 2)}

    def run(half: str, zeroed: str = "") -> torch.Tensor:
        def read(name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
            tensor = tensors[name]
            return torch.zeros_like(tensor) if name == zeroed else tensor.to(dtype or tensor.dtype)

        with mock.patch.object(component.checkpoint, "read", read):
            vae = ImageVAE.load(component, device="cpu", dtype=torch.float32, parts=(half,))
        return vae.encode(inputs[half]) if half == "encoder" else vae.decode(inputs[half])

    before = {half: run(half) for half in inputs}
    for name in tensors:
        half = "encoder" if name.startswith(("encoder", "quant_conv")) else "decoder"
        assert torch.equal(run(half, name), before[half]) == ("time_conv" in name), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_in_float32_equals_the_cpu(tmp_path: Path) -> None:
    component = _component(tmp_path, _model("four levels"))
    latents, pixels = _noise(1, 16, 1, 9, 7), _pixels(1, 3, 72, 56)
    cpu, gpu = (ImageVAE.load(component, device=device, dtype=torch.float32) for device in ("cpu", "cuda"))
    # TF32 convolutions are PyTorch's default on the GPU: 10 bits of mantissa through some thirty layers.
    torch.testing.assert_close(gpu.decode(latents).cpu(), cpu.decode(latents), atol=1e-2, rtol=0)
    torch.testing.assert_close(gpu.encode(pixels).cpu(), cpu.encode(pixels), atol=1e-2, rtol=0)


def test_the_tensor_list_is_exactly_that_of_diffusers() -> None:
    for kind in CONFIGS:
        model = _model(kind)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert expected_shapes(VaeConfig.parse(model.config)) == shapes


def test_of_the_real_vae_only_44_599_603_parameters_are_kept() -> None:
    shapes = expected_shapes(VaeConfig.parse(_real_config()))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 126_892_531
    kept = {name: shape for name, shape in shapes.items() if "time_conv" not in name}
    flat = ((*shape[:2], *shape[3:]) if len(shape) == 5 else shape for shape in kept.values())
    assert sum(torch.Size(shape).numel() for shape in flat) == 44_599_603


def _real_config() -> dict[str, Any]:
    numbers = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16, "num_res_blocks": 2}
    return FOUR_LEVELS | numbers | {"base_dim": 96}


def test_missing_unexpected_and_misshapen_tensors_are_checkpoint_errors(tmp_path: Path) -> None:
    model = _model("tiny")
    weight = model.state_dict()["decoder.conv_in.weight"]
    changes: list[dict[str, torch.Tensor | None]] = [
        {"encoder.norm_out.gamma": None},
        {"decoder.extra": torch.zeros(1)},
        {"decoder.conv_in.weight": weight[:, :, -1].clone()},
    ]
    for changed in changes:
        component = _component(tmp_path, model, **changed)
        with pytest.raises(CheckpointError, match=next(iter(changed))):
            ImageVAE.load(component, device="cpu", dtype=torch.float32, parts=("encoder",))


@pytest.mark.parametrize(
    "change",
    [
        {"z_dim": None},
        {"base_dim": True},
        {"dim_mult": []},
        {"dim_mult": [1, "2"]},
        {"temperal_downsample": [True]},
        {"latents_mean": [0.0]},
        {"latents_std": [0.0] * 16},
        {"attn_scales": [1.0]},
        {"base_dim": 15},
    ],
)
def test_a_config_that_makes_no_sense_is_a_checkpoint_error(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(change)).replace("base_dim", "base_dim|channel counts")):
        VaeConfig.parse(dict(_model("tiny").config) | change)


def test_only_the_asked_part_is_loaded_and_a_released_one_is_gone(tmp_path: Path) -> None:
    component = _component(tmp_path, _model("tiny"))
    vae = ImageVAE.load(component, device="cpu", dtype=torch.float32, parts=("decoder",))
    assert vae.parts == ("decoder",)
    with pytest.raises(RequestError, match="encoder"):
        vae.encode(_pixels(1, 3, 8, 8))
    vae.release("decoder")
    with pytest.raises(RequestError, match="decoder"):
        vae.decode(_noise(1, 16, 1, 2, 2))
    with pytest.raises(RequestError, match="parts"):
        ImageVAE.load(component, device="cpu", dtype=torch.float32, parts=("both",))
    with pytest.raises(RequestError, match="dtype"):
        ImageVAE.load(component, device="cpu", dtype=torch.float16)


def test_shapes_that_do_not_fit_are_refused(tiny: ImageVAE) -> None:
    for pixels in (_pixels(1, 3, 10, 8), _pixels(1, 1, 8, 8), _pixels(3, 8, 8), _pixels(1, 3, 0, 8)):
        with pytest.raises(RequestError):
            tiny.encode(pixels)
    for latents in (_noise(1, 16, 2, 2, 2), _noise(1, 4, 1, 2, 2), _noise(1, 16, 2, 2)):
        with pytest.raises(RequestError):
            tiny.decode(latents)


def test_the_rgb_projection_finds_an_affine_map_and_is_made_once(tiny: ImageVAE) -> None:
    true = _noise(17, 3)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        pixels = torch.einsum("bchw,cr->brhw", latents[:, :, 0], true[:-1]) + true[-1].view(1, 3, 1, 1)
        return pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)

    with mock.patch.object(tiny, "decode", decode):
        projection = tiny.rgb_projection()
    assert projection.dtype == torch.float32
    torch.testing.assert_close(projection, true, atol=1e-5, rtol=0)
    assert tiny.rgb_projection() is projection
