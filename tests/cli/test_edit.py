"""``qengine edit`` and ``generate``: what is asked of the engine, what is written, what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_engine import STEPS, read_metadata
from PIL import Image


def test_E12_edit_writes_stem_edited_png_and_tells_time_size_and_seed(engine, run) -> None:
    code, out, err = run(
        "edit", "--image", "photo.png", "--prompt", "make it grayscale", "--steps", "8", "--seed", "42"
    )
    assert code == 0
    assert out == "photo_edited.png\n"
    assert "32x16" in err and "seed 42" in err and " s\n" in err
    assert engine.request.num_inference_steps == 8 and engine.request.seed == 42
    with Image.open("photo_edited.png") as image:
        assert image.size == (32, 16)


def test_E10_the_output_is_a_png_that_carries_the_run(engine, run) -> None:
    assert run("edit", "photo.png", "make it grayscale", "-o", "out.png")[0] == 0
    with Image.open("out.png") as image:
        assert image.format == "PNG"
    assert read_metadata(Path("out.png"))["request"]["prompt"] == "make it grayscale"


def test_E03_one_or_several_pictures_reach_the_request_in_order(engine, run) -> None:
    assert run("edit", "photo.png", "other.png", "put both together")[0] == 0
    assert run("edit", "photo.png", "put both together", "--ref", "other.png")[0] == 0
    assert [tuple(map(str, request.images)) for request in engine.requests] == [("photo.png", "other.png")] * 2


def test_E04_the_negative_prompt_reaches_the_request(engine, run) -> None:
    assert run("edit", "photo.png", "sharper", "--negative-prompt", " ")[0] == 0
    assert engine.request.negative_prompt == " "


def test_M09_prompt_and_negative_prompt_in_the_seeds_spelling(engine, run) -> None:
    assert run("edit", "--control_image_path", "photo.png", "--prompt", "sharper", "--negative_prompt", "blur")[0] == 0
    assert (engine.request.prompt, engine.request.negative_prompt) == ("sharper", "blur")


@pytest.mark.parametrize("flag", ["--steps", "--infer_steps", "--infer-steps", "--num_inference_steps"])
def test_M11_steps_by_every_spelling(engine, run, flag: str) -> None:
    assert run("edit", "photo.png", "sharper", flag, "25")[0] == 0
    assert engine.request.num_inference_steps == 25


@pytest.mark.parametrize("flag", ["--true-cfg-scale", "--true_cfg_scale", "--cfg"])
def test_E06_true_cfg_by_every_spelling(engine, run, flag: str) -> None:
    assert run("edit", "photo.png", "sharper", flag, "2.5")[0] == 0
    assert engine.request.true_cfg_scale == 2.5


def test_E07_M12_guidance_scale_reaches_the_request_and_the_engines_note_is_shown(engine, run) -> None:
    engine.notes = ("guidance_scale is ignored",)
    code, _, err = run("edit", "photo.png", "sharper", "--guidance_scale", "1.0", "--true_cfg_scale", "4")
    assert code == 0
    assert (engine.request.guidance_scale, engine.request.true_cfg_scale) == (1.0, 4.0)
    assert "note: guidance_scale is ignored" in err


def test_what_is_not_given_is_left_to_the_model(engine, run) -> None:
    assert run("edit", "photo.png", "sharper")[0] == 0
    request = engine.request
    assert request.num_inference_steps is None and request.true_cfg_scale is None and request.size is None
    assert request.negative_prompt is None and request.guidance_scale is None and request.flow_shift is None
    assert request.seed == 0


def test_M10_image_size_is_height_then_width_and_refuses_other_multiples(engine, run) -> None:
    assert run("edit", "photo.png", "sharper", "--image_size", "768", "1376")[0] == 0
    assert engine.request.size == (1376, 768)
    code, _, err = run("edit", "photo.png", "sharper", "--image_size", "770", "768")
    assert code == 2
    assert "multiples of 16, got 770 768" in err and "--size 768x770" in err


def test_size_takes_any_pixel(engine, run) -> None:
    assert run("edit", "photo.png", "sharper", "--size", "101x77")[0] == 0
    assert engine.request.size == (101, 77)


def test_M16_flow_shift_reaches_the_request(engine, run) -> None:
    assert run("edit", "photo.png", "sharper", "--flow_shift", "2.2")[0] == 0
    assert engine.request.flow_shift == 2.2


def test_M15_count_makes_successive_seeds_with_the_seed_in_the_name(engine, run) -> None:
    code, out, _ = run("edit", "photo.png", "sharper", "--seed", "7", "-n", "3", "-o", "out.png")
    assert code == 0
    assert out.split() == ["out_7.png", "out_8.png", "out_9.png"]
    assert [request.seed for request in engine.requests] == [7, 8, 9]
    assert read_metadata(Path("out_8.png"))["request"]["seed"] == 8
    assert len(engine.opened) == 1


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("images", ["out.png"]),
        ("latents", ["out.safetensors"]),
        ("latent", ["out.safetensors"]),
        ("both", ["out.png", "out.safetensors"]),
        ("latent_images", ["out.png", "out.safetensors"]),
    ],
)
def test_M14_output_type_by_every_spelling(engine, run, folder: Path, word: str, names: list[str]) -> None:
    code, out, _ = run("edit", "photo.png", "sharper", "--output_type", word, "--save_path", "out.png")
    assert code == 0
    assert out.split() == names
    assert sorted(path.name for path in folder.glob("out*")) == names


def test_M14_save_path_may_be_a_folder_that_is_made(engine, run, folder: Path) -> None:
    code, out, _ = run("edit", "photo.png", "sharper", "--save_path", "results", "--seed", "5")
    assert code == 0
    assert Path(out.strip()) == Path("results/photo_edited_5.png")
    assert (folder / "results/photo_edited_5.png").is_file()


def test_M17_control_image_path_takes_a_list(engine, run) -> None:
    assert run("edit", "-p", "sharper", "--control_image_path", "photo.png", "other.png", "photo.png")[0] == 0
    assert [str(path) for path in engine.request.images] == ["photo.png", "other.png", "photo.png"]


def test_M17_a_picture_is_required(engine, run) -> None:
    code, _, err = run("edit", "-p", "sharper")
    assert code == 2
    assert "edit must get a picture" in err


def test_M21_append_original_name_adds_the_stem_of_the_first_picture(engine, run) -> None:
    code, out, _ = run("edit", "photo.png", "other.png", "sharper", "-o", "out.png", "--append_original_name")
    assert (code, out) == (0, "out_photo.png\n")


def test_M05_the_three_files_go_together(engine, run) -> None:
    for flags in (
        ["--dit", "a"],
        ["--dit", "a", "--vae", "b"],
        ["--text_encoder", "c"],
        ["--vae", "b", "--text-encoder", "c"],
    ):
        code, _, err = run("edit", "photo.png", "sharper", *flags)
        assert code == 2
        assert "--dit, --vae and --text_encoder must be given together" in err
    assert (
        run("edit", "photo.png", "sharper", "--dit", "a", "--vae", "b", "--text_encoder", "c", "--tokenizer", "d")[0]
        == 0
    )
    assert engine.opened == [
        {
            "dit": "a",
            "vae": "b",
            "text_encoder": "c",
            "tokenizer": "d",
            "offline": False,
            "device": "auto",
            "dtype": "auto",
        }
    ]
    assert run("edit", "photo.png", "sharper")[0] == 0
    assert "model" not in engine.opened[-1]
    assert (
        run("edit", "photo.png", "sharper", "--model", "x", "--dit", "a", "--vae", "b", "--text_encoder", "c")[0] == 2
    )


def test_edit_and_edit_plus_name_the_variant(engine, run) -> None:
    files = ["--dit", "a", "--vae", "b", "--text_encoder", "c"]
    for flag, version in (("--edit", "edit"), ("--edit_plus", "edit-2509"), ("--edit-plus", "edit-2509")):
        assert run("edit", "photo.png", "sharper", *files, flag)[0] == 0
        assert engine.opened[-1]["model_version"] == version
    assert run("edit", "photo.png", "sharper", *files, "--edit", "--edit_plus")[0] == 2
    assert run("edit", "photo.png", "sharper", *files, "--edit", "--model-version", "edit-2509")[0] == 2
    assert run("edit", "photo.png", "sharper", *files, "--edit_plus", "--model-version", "edit-2511")[0] == 0
    assert engine.opened[-1]["model_version"] == "edit-2511"


def test_model_device_and_dtype_reach_the_engine(engine, run) -> None:
    flags = ["--model", "some/folder", "--device", "cuda:1", "--dtype", "bfloat16", "--offline"]
    assert run("edit", "photo.png", "sharper", *flags)[0] == 0
    assert engine.opened == [{"model": "some/folder", "device": "cuda:1", "dtype": "bfloat16", "offline": True}]
    assert engine.closed


def test_the_tiny_model_is_named_when_it_is_used_unasked(engine, run) -> None:
    assert "tiny model inside qengine" in run("edit", "photo.png", "sharper")[2]
    assert "tiny model inside qengine" not in run("edit", "photo.png", "sharper", "--model", "x")[2]


def test_preview_writes_one_png_per_step(engine, run, folder: Path) -> None:
    assert run("edit", "photo.png", "sharper", "-o", "out.png", "--preview", "steps")[0] == 0
    names = sorted(path.name for path in (folder / "steps").iterdir())
    assert names == [f"out_step{number}.png" for number in range(1, STEPS + 1)]


def test_json_is_one_document_on_stdout(engine, run) -> None:
    code, out, _ = run("edit", "photo.png", "sharper", "--json", "-n", "2", "-o", "out.png")
    assert code == 0
    first, second = json.loads(out)["outputs"]
    assert (first["image"], first["seed"], first["width"], first["height"]) == ("out_0.png", 0, 32, 16)
    assert second["metadata"]["request"]["seed"] == 1


def test_quiet_says_nothing_and_the_path_is_still_printed(engine, run) -> None:
    code, out, err = run("edit", "photo.png", "sharper", "-q")
    assert (code, out, err) == (0, "photo_edited.png\n", "")


def test_plain_progress_has_a_line_per_phase_and_step(engine, run) -> None:
    _, _, err = run("edit", "photo.png", "sharper")
    phases = [line.split()[0] for line in err.splitlines()]
    assert phases == ["model", "open", "encode", *["denoise"] * (STEPS + 1), "decode", "done"]
    assert "denoise  1/3" in err and "eta" in err and "s/step" in err and "iB RAM" in err


@pytest.mark.parametrize("skipped", [1, STEPS])
def test_a_run_that_starts_later_counts_the_steps_that_it_does(run, engine, skipped: int) -> None:
    engine.first_step = skipped
    code, _, err = run("edit", "photo.png", "night", "-o", "out.png")
    assert code == 0 and "None" not in err and f"denoise  {STEPS - skipped} steps" in err
    assert (f"denoise  1/{STEPS - skipped}" in err) == (skipped < STEPS) and "decode" in err


def test_verbose_shows_the_resolved_request(engine, run) -> None:
    assert '"prompt": "sharper"' in run("edit", "photo.png", "sharper", "-v")[2]


def test_no_metadata_writes_none(engine, run) -> None:
    assert run("edit", "photo.png", "sharper", "-o", "out.png", "--no-metadata")[0] == 0
    assert read_metadata(Path("out.png")) == {}


def test_default_names_never_overwrite_and_named_files_do(engine, run) -> None:
    outputs = [run("edit", "photo.png", "sharper")[1].strip() for _ in range(3)]
    assert outputs == ["photo_edited.png", "photo_edited-1.png", "photo_edited-2.png"]
    for seed in ("1", "2"):
        assert run("edit", "photo.png", "sharper", "-o", "out.png", "--seed", seed)[1] == "out.png\n"
    assert read_metadata(Path("out.png"))["request"]["seed"] == 2


def test_generate_needs_a_model_and_gives_the_command_to_paste(engine, run, folder: Path) -> None:
    code, out, err = run("generate", "a red bicycle")
    assert (code, out) == (4, "")
    assert "hint: qengine pull qwen-image && qengine generate 'a red bicycle' --model qwen-image" in err
    assert engine.opened == []


def test_generate_writes_a_picture(engine, run) -> None:
    code, out, _ = run("generate", "a red bicycle", "--model", "x", "--size", "64x32")
    assert (code, out) == (0, "generated.png\n")
    assert engine.request.prompt == "a red bicycle" and not hasattr(engine.request, "images")


def test_E17_offline_and_a_local_folder_reach_the_engine(engine, run) -> None:
    assert run("generate", "a", "--model", "./folder", "--offline")[0] == 0
    assert engine.opened[0]["model"] == "./folder" and engine.opened[0]["offline"] is True
