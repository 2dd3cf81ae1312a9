"""Pulling from a hub that this test runs on 127.0.0.1."""

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from qengine.errors import CheckpointError
from qengine.loaders import download, hub
from qengine.loaders.source import open_model
from qengine.loaders.vl import open_vl
from vlpipelines import build_vl

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
HUB_ID = "Qwen/Qwen-Image-Edit-2511"
VAE = "vae/diffusion_pytorch_model.safetensors"


class Hub(ThreadingHTTPServer):
    """Speaks the few endpoints that a download needs, and fails when told to."""

    daemon_threads = True

    def __init__(self, root: Path, hub_id: str = HUB_ID) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub_id = hub_id
        self.files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        self.altered: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.status: int | None = None

    def listing(self) -> dict[str, Any]:
        return {
            "id": self.hub_id,
            "modelId": self.hub_id,
            "sha": COMMIT,
            "siblings": [self._sibling(name, data) for name, data in self.files.items()],
        }

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if self.server.status:
            self._send(self.server.status, b"{}", body)
        elif path.startswith(f"/api/models/{self.server.hub_id}"):
            self._send(200, json.dumps(self.server.listing()).encode(), body)
        elif path.startswith(files := f"/{self.server.hub_id}/resolve/{COMMIT}/"):
            self._file(path.removeprefix(files), body)
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str, body: bool) -> None:
        data = self.server.files[name]
        etag = hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else git_hash(data)
        data = self.server.altered.get(name, data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted, status = self.headers.get("Range"), 200
        if wanted:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        cuts = self.server.cuts.get(name) if body else None
        self._send(status, data, body, headers, cuts.pop(0) if cuts else None)

    def _send(
        self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True


def git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@pytest.fixture
def server(folder, monkeypatch, hub_home):
    model = folder("served", zero_cond_t=True)
    (model.path / "README.md").write_text("not needed")
    (model.path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"not needed")
    (model.path / "whole.safetensors").write_bytes(b"not needed")
    with serving(Hub(model.path), monkeypatch) as running:
        yield running


@contextlib.contextmanager
def serving(running: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_address[1]}")
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.0)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_reader_of_pictures_is_pulled_listed_verified_and_opened_by_its_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_home
) -> None:
    place = build_vl(tmp_path / "served")
    (place / "README.md").write_text("not needed")
    (place / "original").mkdir()
    (place / "original" / "model.safetensors").write_bytes(b"not needed")
    with pytest.raises(CheckpointError, match="or one that was pulled") as refused:
        open_vl("qwen3-vl-4b")
    assert "qengine pull qwen3-vl-4b" in str(refused.value)
    with serving(Hub(place, "Qwen/Qwen3-VL-4B-Instruct"), monkeypatch) as running:
        pulled = hub.pull("qwen3-vl-4b")
    names = {path.name for path in pulled.iterdir()}
    assert names == {name for name in running.files if "/" not in name and name != "README.md"}
    assert open_vl("qwen3-vl-4b").hidden_size == open_vl(place).hidden_size
    assert hub.verify("qwen3-vl-4b").ok
    assert [(model.hub_id, model.complete) for model in hub.list_models()] == [("Qwen/Qwen3-VL-4B-Instruct", True)]
    (pulled / "model.safetensors").unlink()
    (pulled / "preprocessor_config.json").unlink()
    assert set(hub.list_models()[0].missing) == {"*.safetensors", "preprocessor_config.json"}
    assert hub.remove("qwen3-vl-4b") > 0 and not hub.list_models()


def test_a_pulled_model_opens_and_verifies_and_only_what_is_needed_came(server) -> None:
    seen: list[tuple[int, int, str]] = []
    place = hub.pull("qwen-image-edit-2511", progress=lambda *news: seen.append(news))
    assert place.name == COMMIT and hub.verify(HUB_ID).ok
    names = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert names == set(server.files) - {"README.md", "vae/diffusion_pytorch_model.bin", "whole.safetensors"}
    assert all((place / name).read_bytes() == server.files[name] for name in names)
    total = sum(len(server.files[name]) for name in names)
    done = [news[0] for news in seen]
    assert done == sorted(done) and done[-1] == total and {news[1] for news in seen} == {total}
    assert open_model("qwen-image-edit-2511", offline=True).variant == "qwen-image-edit-2511"
    gets = [path for method, path, _ in server.requests if method == "GET" and "/resolve/" in path]
    assert len(gets) == len(set(gets)) == len(names)


def test_a_model_that_is_not_in_the_cache_is_pulled_when_it_is_opened(server) -> None:
    assert open_model(HUB_ID).variant == "qwen-image-edit-2511"
    server.requests.clear()
    assert open_model(HUB_ID).variant == "qwen-image-edit-2511" and server.requests == []


def test_a_second_pull_fetches_no_file_again(server) -> None:
    hub.pull(HUB_ID)
    server.requests.clear()
    hub.pull(HUB_ID)
    assert not [path for method, path, _ in server.requests if method == "GET" and "/resolve/" in path]


def test_a_broken_connection_is_taken_up_where_it_broke(server) -> None:
    server.cuts[VAE] = [5000, 3000]
    hub.pull(HUB_ID)
    ranges = [wanted for method, path, wanted in server.requests if method == "GET" and path.endswith(VAE)]
    assert ranges == [None, "bytes=5000-", "bytes=8000-"] and hub.verify(HUB_ID).ok


def test_an_interrupted_pull_is_resumed_by_the_next_one(server, hub_home) -> None:
    server.cuts[VAE] = [5000, 0, 0, 0, 0, 0]
    with pytest.raises(CheckpointError, match="must be reachable") as caught:
        hub.pull(HUB_ID)
    assert "qengine pull qwen-image-edit-2511" in str(caught.value.hint)
    assert hub.cached_snapshot(HUB_ID) is None
    server.requests.clear()
    hub.pull(HUB_ID)
    ranges = [wanted for method, path, wanted in server.requests if method == "GET" and path.endswith(VAE)]
    assert ranges == ["bytes=5000-"] and hub.verify(HUB_ID).ok
    assert not list(hub_home.rglob("*.qengine-part"))


@pytest.mark.parametrize("name", [VAE, "vae/config.json"])
def test_a_wrong_hash_is_found_and_the_bad_file_deleted(server, hub_home, name) -> None:
    good = server.files[name]
    server.altered[name] = bytes([good[0] ^ 1]) + good[1:]
    with pytest.raises(CheckpointError, match=rf"{name} must .* deleted"):
        hub.pull(HUB_ID)
    assert hub.cached_snapshot(HUB_ID) is None
    server.altered.clear()
    hub.pull(HUB_ID)
    assert hub.verify(HUB_ID).ok


def test_a_file_longer_than_stated_is_refused(server) -> None:
    server.altered[VAE] = server.files[VAE] + b"more"
    with pytest.raises(CheckpointError, match="SHA-256"):
        hub.pull(HUB_ID)


def test_too_little_disk_space_is_said_before_anything_is_fetched(server, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="free space in .* must be at least .* got 1000") as caught:
        hub.pull(HUB_ID)
    assert "HF_HOME" in str(caught.value.hint)
    assert not [path for _, path, _ in server.requests if "/resolve/" in path]


def test_an_unknown_model_of_the_hub_and_a_gated_one_are_told_apart(server) -> None:
    with pytest.raises(CheckpointError, match="must be a model of the hub"):
        hub.pull("nobody/nothing")
    server.status = 500
    with pytest.raises(CheckpointError, match="must be reachable"):
        hub.pull(HUB_ID)


def test_a_hub_that_cannot_be_reached_gives_the_command_to_repeat(monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="must be reachable on the hub") as caught:
        open_model("qwen-image")
    assert "qengine pull qwen-image" in str(caught.value.hint) and caught.value.exit_code == 4


def test_two_pulls_of_one_model_at_a_time_are_refused(server) -> None:
    with download._locked(HUB_ID), pytest.raises(CheckpointError, match="one process at a time"):
        hub.pull(HUB_ID)
