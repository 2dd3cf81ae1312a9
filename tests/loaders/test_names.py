import pytest
import torch
from qengine.loaders import shapes
from qengine.loaders.names import text_encoder_name, transformer_renamer


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("language_model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("model.norm.weight", "language_model.norm.weight"),
        ("visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_every_spelling_of_the_text_encoder_comes_to_one(stored, ours) -> None:
    assert text_encoder_name(stored) == ours


def test_the_other_parts_of_an_all_in_one_file_are_dropped() -> None:
    rename = transformer_renamer(["model.diffusion_model.img_in.bias", "vae.x", "text_encoders.y"])
    assert rename("model.diffusion_model.img_in.bias") == "img_in.bias"
    assert rename("vae.x") is None
    assert transformer_renamer(["img_in.bias"])("img_in.bias") == "img_in.bias"


@pytest.mark.parametrize("zero_cond_t", [True, False])
def test_the_transformers_shape_table_is_that_of_diffusers(zero_cond_t) -> None:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=2, zero_cond_t=zero_cond_t)
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes.transformer_shapes(model.config) == real


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"base_dim": 16, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [False, True]},
        {"base_dim": 8, "dim_mult": [1, 1], "num_res_blocks": 3, "temperal_downsample": [False]},
    ],
)
def test_the_vaes_shape_table_is_that_of_diffusers(config) -> None:
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        model = AutoencoderKLQwenImage(**config)
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes.vae_shapes(model.config) == real


def test_the_text_encoders_shape_table_is_that_of_transformers() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"hidden_size": 3584, "num_hidden_layers": 2, "intermediate_size": 18944, "num_attention_heads": 28}
    config = Qwen2_5_VLConfig(
        text_config=text | {"num_key_value_heads": 4}, vision_config={"hidden_size": 1280, "depth": 2}
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    real = {text_encoder_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    real.pop("lm_head.weight")
    assert shapes.text_encoder_shapes(config.to_dict()) == real
