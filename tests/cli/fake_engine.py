"""An engine that makes grey pictures at once, for tests of words; as a script it runs the command line with it.

As a script, ``QENGINE_FAKE_SLOW=phase`` makes one phase last half a minute; ``at PHASE`` on stderr says it has begun.
``QENGINE_FAKE_PHASE_SECONDS`` makes every phase last.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image, PngImagePlugin
from qengine.cli import backend
from qengine.engine.whole import write_whole
from qengine.errors import InputError

STEPS = 3
STRUCTURED = ("images", "reference", "keep")
FINGERPRINT = "f" * 64


@dataclass
class FakeEvent:
    phase: str
    notes: tuple[str, ...] = ()
    cached: bool = False
    index: int = 0
    total: int = STEPS
    image: Any = None
    latents: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def preview(self) -> Image.Image:
        return Image.new("RGB", (8, 8))


def pause(phase: str) -> None:
    time.sleep(float(os.environ.get("QENGINE_FAKE_PHASE_SECONDS", "0")))
    if os.environ.get("QENGINE_FAKE_SLOW") == phase:
        sys.stderr.write(f"at {phase}\n")
        sys.stderr.flush()
        time.sleep(30)


class FakeEngine:
    """Stands in for qengine.Engine; remembers what it was asked."""

    device = "cpu"
    notes: tuple[str, ...] = ()
    fingerprint = FINGERPRINT
    first_step = 0

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.requests: list[Any] = []
        self.encoded: list[Any] = []
        self.cancelled = self.closed = False
        self.bytes_read = 0
        self.error: BaseException | None = None

    def open(self, progress: Any, **choice: Any) -> FakeEngine:
        pause("open")
        self.opened.append(choice)
        part = SimpleNamespace(checkpoint=SimpleNamespace(nbytes=1 << 20))
        label = choice.get("model") or choice.get("dit") or "tiny"
        self.source = SimpleNamespace(
            label=label,
            variant="qwen-image-edit-2511",
            fingerprint=self.fingerprint,
            transformer=part,
            vae=part,
            text_encoder=part,
        )
        return self

    def stream(self, request: Any) -> Iterator[FakeEvent]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        pause("encode")
        yield FakeEvent("encode", notes=self.notes)
        for index in range(self.first_step, STEPS):
            pause("denoise")
            yield FakeEvent("denoise", index=index)
        pause("decode")
        image = Image.new("RGB", request.size or (32, 16), (request.seed % 256,) * 3)
        yield FakeEvent("decode", image=image, latents="latents", metadata=self.record(request))

    def record(self, request: Any) -> dict[str, Any]:
        images = getattr(request, "images", ())
        values = {each.name: getattr(request, each.name) for each in fields(request) if each.name not in STRUCTURED}
        return {
            "format": 1,
            "kind": "edit" if images else "generate",
            "model": {"label": self.source.label, "variant": self.source.variant, "fingerprint": self.fingerprint},
            "request": values,
            "inputs": [
                {"path": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()} for path in images
            ],
            "device": "cpu",
            "dtype": "float32",
        }

    def encode(self, request: Any) -> FakeEvent:
        self.encoded.append(request)
        return FakeEvent("encode")

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True

    @property
    def request(self) -> Any:
        """The only request that was made."""
        (only,) = self.requests
        return only


def write_picture(path: Path, image: Image.Image, metadata: dict[str, Any] | None) -> None:
    pause("write")
    text = PngImagePlugin.PngInfo()
    if metadata is not None:
        text.add_text("qengine", json.dumps(metadata))
    write_whole(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=text))


def write_latents(path: Path, latents: Any, metadata: dict[str, Any] | None) -> None:
    path.write_text(json.dumps(metadata))


def read_metadata(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.info.get("qengine", "{}"))


def check_picture(path: Path) -> None:
    try:
        with Image.open(path) as image:
            image.load()
    except OSError as error:
        raise InputError(f"{path} must be a picture, got: {error}") from error


def replacements(engine: FakeEngine) -> dict[str, Any]:
    """What of the backend is replaced."""
    return {
        "open_engine": engine.open,
        "phase_of": lambda event: event.phase,
        "write_picture": write_picture,
        "write_latents": write_latents,
        "read_metadata": read_metadata,
        "check_picture": check_picture,
    }


if __name__ == "__main__":
    # A shell may have started the tests with Ctrl-C ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from qengine.cli import main

    for name, value in replacements(FakeEngine()).items():
        setattr(backend, name, value)
    sys.exit(main())
