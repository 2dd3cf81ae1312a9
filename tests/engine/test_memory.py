"""Whole runs under ceilings: placement never changes bits, components follow one another, the ladder ends well."""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import shared_pipeline
from qengine import EditRequest, Engine, Step
from qengine.engine.ceiling import AllocationMeter, make_ceiling
from qengine.engine.defaults import DEFAULTS
from qengine.engine.plan import Budget, Choices
from qengine.engine.session import Engine as Session
from qengine.errors import MemoryLadderError, PlanError, RequestError

KIND = "edit-2511"


@pytest.fixture(autouse=True)
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(
        DEFAULTS["qwen-image-edit-2511"],
        area_pixels=64 * 64,
        condition_area_pixels=64 * 64,
        reference_area_pixels=64 * 64,
    )
    monkeypatch.setitem(DEFAULTS, "qwen-image-edit-2511", small)


def picture(seed: int = 1) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def request(**fields: Any) -> EditRequest:
    common: dict[str, Any] = {
        "prompt": "make it night",
        "num_inference_steps": 2,
        "size": (48, 32),
        "true_cfg_scale": 3.0,
        "seed": 5,
    }
    return EditRequest(images=(picture(),), **common | fields)


def open_engine(cache: Path, **options: Any) -> Engine:
    return Engine.open(shared_pipeline(KIND), device="cpu", cache_dir=cache, **options)


def run(engine: Session, asked: EditRequest | None = None) -> str:
    *_, decoded = engine.stream(asked or request())
    return hashlib.sha256(decoded.latents.numpy().tobytes() + decoded.image.tobytes()).hexdigest()


@pytest.mark.parametrize("weights", ["bf16", "int8", "fp8"])
def test_X01_M26_placement_never_changes_bits(weights: str, tmp_path: Path) -> None:
    hashes = set()
    options: list[dict[str, Any]] = [{}, {"offload": "sequential"}]
    options += [{"blocks_to_swap": count} for count in range(1, _blocks(tmp_path))]
    for extra in options:
        choices = Choices(weights=weights, **extra)
        with open_engine(tmp_path, choices=choices, budget=Budget(vram_bytes=1 << 31)) as engine:
            for event in engine.stream(request()):
                if isinstance(event, Step) and event.index == 1:
                    tape = engine._components.transformer.blocks
                    copies = list(tape.copies)
            hashes.add(hashlib.sha256(event.latents.numpy().tobytes() + event.image.tobytes()).hexdigest())
            streamed = len(tape) if extra.get("offload") else extra.get("blocks_to_swap", 0)
            assert len(copies) == 2 * streamed
            assert {block for _, block, _ in copies} == set(tape.placement.streamed)
    assert len(hashes) == 1


def _blocks(cache: Path) -> int:
    with open_engine(cache) as engine:
        return engine.source.transformer.config["num_layers"]


def test_X01_slabs_from_disk_and_mapped_give_the_same_bits(tmp_path: Path) -> None:
    with open_engine(tmp_path, choices=Choices(weights="int8")) as engine:
        expected = run(engine)
        assert engine._components.transformer.blocks.placement.host == "mapped"
    with open_engine(tmp_path, choices=Choices(weights="int8", offload="sequential")) as engine:
        plan = engine.plan(request())
        assert plan.phase("denoise").blocks.placement.host == "disk"
        assert run(engine) == expected


def test_M26_more_blocks_than_there_are_is_an_error(tmp_path: Path) -> None:
    blocks = _blocks(tmp_path)
    with open_engine(tmp_path, choices=Choices(blocks_to_swap=blocks)) as engine:
        with pytest.raises(RequestError, match=f"0 to {blocks - 1}, got {blocks}"):
            run(engine)


def test_M25_text_encoder_on_the_cpu_gives_the_same_result_and_is_recorded(tmp_path: Path) -> None:
    with open_engine(tmp_path / "a") as engine:
        expected = run(engine)
    with open_engine(tmp_path / "b", choices=Choices(text_encoder_cpu=True)) as engine:
        *_, decoded = engine.stream(request())
        assert decoded.metadata["numerics"]["text_encoder_device"] == "cpu"
        assert run(engine) == expected


def test_X03_V34_components_follow_one_another(tmp_path: Path) -> None:
    with open_engine(tmp_path, choices=Choices(offload="sequential")) as engine:
        run(engine)
        log = list(engine._components.log)
    order = [entry for entry in log if entry.startswith(("load", "free"))]
    assert order == [
        "load text_encoder",
        "free text_encoder",
        "load vae",
        "free vae",
        "load transformer",
        "free transformer",
        "load vae",
    ]


def test_E14_a_second_request_reads_nothing_again(tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        run(engine)
        read = engine.bytes_read
        run(engine, request(seed=6))
        assert engine.bytes_read == read
        run(engine, request(prompt="make it day"))
        assert engine.bytes_read - read < 1 << 20  # rows of the embedding table alone


def test_a_new_seed_never_loads_the_encoder(tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        run(engine)
    with open_engine(tmp_path) as engine:
        run(engine, request(seed=9))
        assert "load text_encoder" not in engine._components.log


def test_release_frees_and_the_next_run_gives_the_same_bits(tmp_path: Path) -> None:
    with open_engine(tmp_path, choices=Choices(blocks_to_swap=1)) as engine:
        first = run(engine)
        engine.release(ram=False)
        tape = engine._components.tape("transformer")
        assert tape is not None and tape.suspended and tape.host_bytes
        assert run(engine) == first
        with pytest.raises(RequestError, match="vram must be true"):
            engine.release(vram=False)
        engine.release()
        assert engine._components.tape("transformer") is None
        assert run(engine) == first


def _peak(cache: Path) -> tuple[str, AllocationMeter]:
    meter = AllocationMeter()
    with open_engine(cache) as engine:
        engine._ceiling = lambda: meter
        return run(engine), meter


def test_a_vram_limit_holds_on_a_cpu_and_gives_the_same_bits(tmp_path: Path) -> None:
    expected, free = _peak(tmp_path / "free")
    with open_engine(tmp_path / "limited", budget=Budget(vram_bytes=1 << 34), choices=Choices()) as engine:
        predicted = engine.plan(request()).vram_bytes
        assert free.peak <= predicted
    least = _least(tmp_path)
    with open_engine(tmp_path / "limited", budget=Budget(vram_bytes=least)) as engine:
        plan = engine.plan(request())
        assert plan.vram_bytes <= least < predicted
        assert run(engine) == expected
        meter = engine._ceiling()
        assert 0 < meter.peak <= least


def _least(cache: Path) -> int:
    """The smallest ceiling, to 4 KiB, that is not refused."""
    low, high = 1, 1 << 34
    while high - low > 4096:
        middle = (low + high) // 2
        with open_engine(cache, budget=Budget(vram_bytes=middle)) as engine:
            try:
                engine.plan(request())
                high = middle
            except PlanError:
                low = middle
    return high


def test_a_ceiling_that_cannot_be_met_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    with open_engine(tmp_path, budget=Budget(vram_bytes=1 << 20)) as engine:
        with pytest.raises(PlanError, match="--vram must be at least") as caught:
            run(engine)
        assert caught.value.hint and "--vram" in caught.value.hint


class FailingMeter(AllocationMeter):
    """Raises once, at the k-th allocating operation; or at every one from there on."""

    def __init__(self, k: int, *, always: bool = False) -> None:
        super().__init__()
        self._k, self._always = k, always

    def _allocated(self) -> None:
        super()._allocated()
        if self.allocations == self._k or (self._always and self.allocations >= self._k):
            raise torch.OutOfMemoryError(f"injected at allocation {self.allocations}")


def _failing(cache: Path, k: int, *, always: bool = False, **options: Any) -> tuple[Engine, FailingMeter]:
    engine, meter = open_engine(cache, **options), FailingMeter(k, always=always)
    engine._ceiling = lambda: meter
    return engine, meter


def _points(allocations: int, wanted: int) -> list[int]:
    return sorted({1 + round(i * (allocations - 1) / (wanted - 1)) for i in range(wanted)})


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    with pytest.MonkeyPatch.context() as patch:
        small = replace(DEFAULTS["qwen-image-edit-2511"], condition_area_pixels=64 * 64, reference_area_pixels=64 * 64)
        patch.setitem(DEFAULTS, "qwen-image-edit-2511", small)
        expected, meter = _peak(tmp_path_factory.mktemp("counted"))
    return expected, meter.allocations


def _survives(expected: str, k: int, cache: Path) -> None:
    engine, meter = _failing(cache, k, choices=Choices(blocks_to_swap=1))
    with engine:
        assert run(engine) == expected, k
        assert meter.allocations > k
        *_, decoded = engine.stream(request())
        assert decoded.notes == ()


def test_E16_running_out_of_memory_anywhere_ends_in_the_same_picture(counted, tmp_path: Path) -> None:
    expected, allocations = counted
    for index, k in enumerate(_points(allocations, 12)):
        _survives(expected, k, tmp_path / str(index))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_running_out_of_memory_at_300_points_ends_in_the_same_picture(counted, tmp_path: Path) -> None:
    expected, allocations = counted
    points = _points(allocations, 320)
    assert len(points) >= 300
    for k in points:
        engine, _ = _failing(tmp_path / str(k), k, choices=Choices(blocks_to_swap=1))
        with engine:
            assert run(engine) == expected, k


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.99])
def test_E16_memory_that_stays_out_ends_in_exit_6_and_the_next_request_works(counted, share, tmp_path: Path) -> None:
    expected, allocations = counted
    engine, meter = _failing(tmp_path, max(1, int(share * allocations)), always=True)
    with engine:
        with pytest.raises(MemoryLadderError, match="after 3 retries") as caught:
            run(engine)
        assert caught.value.exit_code == 6 and "--offload sequential" in (caught.value.hint or "")
        meter._always = False
        assert run(engine) == expected
    del engine, caught
    gc.collect()
    assert meter.live < 4 << 20


def test_the_ladder_says_what_it_did(counted, tmp_path: Path) -> None:
    engine, _ = _failing(tmp_path, counted[1] // 2)
    with engine:
        result = engine.edit(picture(), "make it night", num_inference_steps=2, size=(48, 32), true_cfg_scale=3.0)
    assert any("ran out of memory and is tried again" in note for note in result.notes)


def test_other_errors_are_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(tmp_path) as engine:
        components = type(engine._components)

        def broken(*_: Any) -> None:
            raise RuntimeError("a fault of another kind")

        monkeypatch.setattr(components, "enter", broken)
        with pytest.raises(RuntimeError, match="another kind"):
            run(engine)


def test_threads_take_turns(tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        expected = {seed: run(engine, request(seed=seed)) for seed in range(3)}
        found: dict[int, str] = {}

        def work(seed: int) -> None:
            result = engine._finish(request(seed=seed))
            data = result.latents.numpy().tobytes() + result.image.tobytes()
            found[seed] = hashlib.sha256(data).hexdigest()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == expected


def test_a_run_inside_a_run_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        for event in engine.stream(request()):
            if isinstance(event, Step):
                with pytest.raises(RequestError, match="one request at a time"):
                    engine.edit(picture(), "x")


def test_the_allocator_limit_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = [1.0]

    class Properties:
        total_memory = 24 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fractions[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda value, device: fractions.append(value))
    with make_ceiling(torch.device("cuda"), 12 << 30, 1 << 30)():
        assert fractions[-1] == pytest.approx((11 - 1 / 16) / 24)
    assert fractions[-1] == 1.0


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture
def cycle(tmp_path: Path) -> Iterator[Any]:
    def once() -> None:
        with Engine.open(device="cpu", cache_dir=tmp_path, choices=Choices(blocks_to_swap=2)) as engine:
            engine.edit(picture(), "make it grayscale", num_inference_steps=1, size=(32, 32))

    yield once


def _settled(cycle: Any, warm: int, count: int) -> tuple[float, int, int]:
    for _ in range(warm):
        cycle()
    gc.collect()
    before = _resident_bytes(), threading.active_count(), _open_files()
    for _ in range(count):
        cycle()
    gc.collect()
    return _resident_bytes() / before[0], threading.active_count() - before[1], _open_files() - before[2]


def test_opening_and_closing_leaves_nothing_behind(cycle) -> None:
    growth, threads, files = _settled(cycle, 10, 20)
    assert growth <= 1.05 and threads == 0 and files == 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_thousand_cycles_leave_memory_threads_and_files_as_they_were(cycle) -> None:
    growth, threads, files = _settled(cycle, 50, 950)
    assert growth <= 1.05 and threads == 0 and files == 0
