"""The cache on disk: found, listed, verified and removed, with no network."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from qengine.errors import CheckpointError
from qengine.loaders import hub
from qengine.loaders.source import open_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def into_cache(model: Path, cache: Path, hub_id: str = "Qwen/Qwen-Image-Edit-2511") -> Path:
    """Lay a folder out as the hub library does: blobs by hash, a snapshot of links, refs/main."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    for file in (path for path in model.rglob("*") if path.is_file()):
        data = file.read_bytes()
        large = file.suffix == ".safetensors"
        head = b"" if large else f"blob {len(data)}\0".encode()
        digest = (hashlib.sha256 if large else hashlib.sha1)(head + data).hexdigest()
        blob = repository / "blobs" / digest
        blob.write_bytes(data)
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_E17_a_hub_id_is_found_in_the_cache_that_HF_HOME_names(folder, hub_home, monkeypatch, tmp_path) -> None:
    snapshot = into_cache(folder(zero_cond_t=True).path, hub_home)
    for name in ("Qwen/Qwen-Image-Edit-2511", "qwen-image-edit-2511"):
        source = open_model(name, offline=True)
        assert source.label == name and source.variant == "qwen-image-edit-2511"
        assert source.tokenizer_dir == snapshot / "tokenizer"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="must be in the hub cache to be used offline, got none") as caught:
        open_model("qwen-image-edit-2511", offline=True)
    assert caught.value.hint == "qengine pull qwen-image-edit-2511" and caught.value.exit_code == 4


def test_E17_HF_HUB_CACHE_goes_before_HF_HOME(folder, hub_home, monkeypatch, tmp_path) -> None:
    into_cache(folder(zero_cond_t=True).path, tmp_path / "explicit")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "explicit"))
    assert open_model("qwen-image-edit-2511", offline=True).variant == "qwen-image-edit-2511"


def test_E17_a_local_folder_works_with_the_network_forbidden(folder) -> None:
    code = (
        "import socket, sys\n"
        "def no(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = no; socket.getaddrinfo = no\n"
        "from qengine.loaders.source import open_model\n"
        "print(open_model(sys.argv[1], offline=True).variant)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder().path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "qwen-image-edit-2509"


def test_a_cached_2511_without_its_flag_is_refused_by_its_hub_name(folder, hub_home) -> None:
    into_cache(folder().path, hub_home)
    with pytest.raises(CheckpointError, match="named 2511"):
        open_model("Qwen/Qwen-Image-Edit-2511", offline=True)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_offline_variables_are_honoured(monkeypatch, name) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(CheckpointError, match="used offline"):
        open_model("qwen-image")
    with pytest.raises(CheckpointError, match="got an offline run"):
        hub.pull("qwen-image")


def test_an_incomplete_model_is_listed_as_such_and_not_used_offline(folder, hub_home) -> None:
    snapshot = into_cache(folder(zero_cond_t=True).path, hub_home)
    (model,) = hub.list_models()
    assert (model.hub_id, model.complete, model.path) == ("Qwen/Qwen-Image-Edit-2511", True, snapshot)
    assert model.nbytes > 1000
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (model,) = hub.list_models()
    assert not model.complete and model.missing == ("vae/*.safetensors",)
    with pytest.raises(CheckpointError, match=r"got an incomplete one \(without vae/\*\.safetensors\)"):
        open_model("qwen-image-edit-2511", offline=True)


def test_other_models_of_the_cache_are_not_listed_and_an_empty_cache_is_empty(folder, hub_home) -> None:
    assert hub.list_models() == []
    into_cache(folder(pipeline="FluxPipeline").path, hub_home, "someone/flux")
    assert hub.list_models() == []


def test_verify_finds_every_altered_and_every_missing_file(folder, hub_home) -> None:
    snapshot = into_cache(folder().path, hub_home)
    good = hub.verify("qwen-image-edit-2511")
    assert good.ok and len(good.checked) == 9 and not good.unchecked
    for name in good.checked:
        blob = (snapshot / name).resolve()
        data = blob.read_bytes()
        blob.write_bytes(bytes([data[0] ^ 1]) + data[1:] if data else b"x")
        assert hub.verify("qwen-image-edit-2511").altered == (name,)
        blob.write_bytes(data)
    (snapshot / "vae" / "config.json").resolve().unlink()
    found = hub.verify("qwen-image-edit-2511")
    assert found.missing == ("vae/config.json",) and not found.ok


def test_verify_says_which_files_have_no_known_hash(folder, hub_home) -> None:
    snapshot = into_cache(folder().path, hub_home)
    link = snapshot / "vae" / "config.json"
    data = link.read_bytes()
    link.unlink()
    link.write_bytes(data)
    assert hub.verify("qwen-image-edit-2511").unchecked == ("vae/config.json",)


def test_a_model_is_removed_with_its_bytes(folder, hub_home) -> None:
    into_cache(folder().path, hub_home)
    into_cache(folder().path, hub_home, "Qwen/Qwen-Image")
    size = hub.list_models()[0].nbytes
    assert hub.remove("qwen-image") == size
    assert [model.hub_id for model in hub.list_models()] == ["Qwen/Qwen-Image-Edit-2511"]
    for gone in (hub.remove, hub.verify):
        with pytest.raises(CheckpointError, match="got none in"):
            gone("qwen-image")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/../b", "a/b/c", "qwen-imag", "tiny", "a--b/c", "/a", ""])
def test_names_that_are_no_hub_ids_reach_no_folder(name) -> None:
    for action in (hub.remove, hub.verify, hub.pull):
        with pytest.raises(CheckpointError):
            action(name)


@pytest.mark.parametrize("reference", ["", "../../..", "no-commit"])
def test_a_broken_reference_is_no_snapshot(folder, hub_home, reference) -> None:
    into_cache(folder().path, hub_home)
    (hub_home / "models--Qwen--Qwen-Image-Edit-2511" / "refs" / "main").write_text(reference)
    assert hub.cached_snapshot("Qwen/Qwen-Image-Edit-2511") is None


def test_single_files_take_the_tokenizer_of_a_cached_model(folder, hub_home, tmp_path) -> None:
    snapshot = into_cache(folder().path, hub_home)
    model = folder("other")
    (model.path / "tokenizer" / "tokenizer.json").unlink()
    files = {"dit": model.dit, "vae": model.vae, "text_encoder": model.text_encoder}
    source = open_model(**files, model_version="edit")
    assert source.tokenizer_dir == snapshot / "tokenizer" and "hub's cache" in source.notes[-1]
