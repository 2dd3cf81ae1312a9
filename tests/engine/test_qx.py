"""Job files: what is written is read bit by bit, anywhere; what is not such a file is refused in words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qengine.engine.given import Given
from qengine.engine.qx import JobFile, read_job, write_job
from qengine.engine.qx.header import FORMAT, sha256_of, tensors_sha256
from qengine.engine.qx.remote import base_name, check_known, shown
from qengine.engine.vl import BlendKnobs, Knobs
from qengine.errors import InputError, OutputError, RequestError
from qxjobs import given_of, job_of, raw_of
from safetensors.torch import load_file, save_file


def same(one: JobFile, other: JobFile) -> bool:
    mine, theirs = one.tensors, other.tensors
    assert mine.keys() == theirs.keys()
    return all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine)


def words(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(json.loads(file.read(length))["__metadata__"]["qengine"])


def rewritten(path: Path, change: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """The file with another document or other tensors, its hashes made to fit."""
    import hashlib

    tensors = load_file(path) if tensors is None else tensors
    said = {**words(path), **change, "tensors": tensors_sha256(tensors)}
    said.pop("sha256")
    text = json.dumps(said, sort_keys=True, ensure_ascii=False)
    said["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, path, {"qengine": json.dumps(said, sort_keys=True, ensure_ascii=False)})
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_job(tmp_path / "job.qx", job_of())
    return tmp_path / "job.qx"


def test_V36_what_is_read_is_what_was_in_memory(tmp_path: Path) -> None:
    job = job_of(
        negative_prompt="blurry",
        knobs=Knobs({-2: 0.7, -6: 0.3}, "image", normalization_mode="per_dim", clip_sigma=None),
        blend=BlendKnobs(0.4, "per_token", alphas=(0.1, 0.2)),
        render={"seed": 7, "size": [48, 32], "prompt": "/imagine a path"},
    )
    write_job(tmp_path / "job.qx", job)
    found = read_job(tmp_path / "job.qx")
    assert same(found, job)
    assert found.raw is not None
    for name in ("prompt", "text", "system_prompt", "variant", "think_block", "pictures", "masked"):
        assert getattr(found.raw, name) == getattr(job.raw, name)
    names = ("kind", "prompt", "negative_prompt", "pictures", "knobs", "blend", "extractor", "model", "render")
    for name in (*names, "written"):
        assert getattr(found, name) == getattr(job, name)
    assert found.given.size == (48, 32)
    assert found.sha256 == sha256_of(tmp_path / "job.qx")


@pytest.mark.parametrize("mode", [None, "attention", "remove"])
def test_several_pictures_and_layers_stand_in_one_file(tmp_path: Path, mode: str | None) -> None:
    raw = raw_of(3, (-1, -2, -6), mode)
    write_job(tmp_path / "job.qx", JobFile(raw=raw))
    found = read_job(tmp_path / "job.qx")
    assert found.raw is not None
    assert set(found.raw.hidden) == {-1, -2, -6}
    assert found.raw.images[found.raw.kinds == 2].unique().tolist() == [0, 1, 2]
    assert torch.equal(found.raw.segments, raw.segments)
    assert len(found.raw.pictures) == 3


def test_bfloat16_states_stay_as_they_are(tmp_path: Path) -> None:
    raw = raw_of()
    half = replace(raw, hidden={layer: states.bfloat16() for layer, states in raw.hidden.items()})
    write_job(tmp_path / "job.safetensors", JobFile(raw=half))
    found = read_job(tmp_path / "job.safetensors").raw
    assert found is not None
    assert all(torch.equal(found.hidden[layer], half.hidden[layer]) for layer in half.hidden)


def test_an_edit_is_kept_with_its_references(tmp_path: Path) -> None:
    job = job_of(kind="qwen-image-edit", raw=None, given=given_of(references=2), pictures=job_of().pictures * 2)
    write_job(tmp_path / "job.qx", job)
    found = read_job(tmp_path / "job.qx")
    assert same(found, job)
    assert len(found.given.references) == 2
    assert found.raw is None


def test_V38_a_file_made_elsewhere_loads_with_the_same_bits(tmp_path: Path) -> None:
    write_job(tmp_path / "here.qx", job_of())
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from qengine.engine.qx import read_job, write_job\n"
        "write_job('there.qx', read_job('here.qx'))\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    assert same(read_job(tmp_path / "there.qx"), job_of())
    assert (tmp_path / "here.qx").read_bytes() == (tmp_path / "there.qx").read_bytes()


def test_V38_a_file_names_no_path_and_no_device(file: Path) -> None:
    header = file.read_bytes()[: 1 << 14].decode("utf-8", "ignore")
    assert str(file.parent) not in header
    assert not re.search(r'"device"|cuda|/home|/tmp|/work', header)


@pytest.mark.parametrize("where", ["render", "model", "extractor"])
@pytest.mark.parametrize("path", ["/home/me/a.png", "C:\\pictures\\a.png"])
def test_V38_an_absolute_path_is_not_written(tmp_path: Path, where: str, path: str) -> None:
    with pytest.raises(RequestError, match="must not be an absolute path"):
        write_job(tmp_path / "job.qx", job_of(**{where: {"fingerprint": "x", "files": [path]}}))
    assert not list(tmp_path.iterdir())


def test_only_the_date_differs_between_two_files_of_one_job(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.qx" for number in range(3)]
    for path, date in zip(paths, ("2026-01-01", "2026-01-01", "2026-01-02"), strict=True):
        write_job(path, job_of(written=date))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    one, other = words(paths[0]), words(paths[2])
    assert {name for name in one if one[name] != other[name]} == {"date", "sha256"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_byte_can_be_altered_unseen(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "job.qx"
    if not path.exists():
        write_job(path, JobFile(raw=raw_of(1, (-2,)), written="2026-01-01"))
        (tmp_path / "whole").write_bytes(path.read_bytes())
    whole = bytearray((tmp_path / "whole").read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(whole) - 1)))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    blank = place < header and whole[place] in b" \t\n\r" and value in b" \t\n\r"
    whole[place] = value
    path.write_bytes(whole)
    if blank:
        return
    with pytest.raises(InputError):
        read_job(path)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.99])
def test_a_cut_file_is_refused(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError) as caught:
        read_job(file)
    assert "qengine extract" in str(caught.value.hint)


def test_foreign_files_are_refused_with_the_command_that_replaces_them(tmp_path: Path) -> None:
    save_file({"embeddings": torch.zeros(3, 4)}, tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "json.qx", {"qengine": "{}"})
    (tmp_path / "text.qx").write_text("not at all")
    (tmp_path / "vl.pt").write_bytes(b"PK\x03\x04 as newer ones begin")
    (tmp_path / "renamed.qx").write_bytes(b"PK\x03\x04 as newer ones begin")
    (tmp_path / "old.qx").write_bytes(b"\x80\x02]K\x01a.")
    for name in ("other.safetensors", "json.qx", "text.qx", "vl.pt", "renamed.qx", "old.qx", "missing.qx", "."):
        with pytest.raises(InputError) as caught:
            read_job(tmp_path / name)
        assert "qengine extract --image" in str(caught.value.hint), name
        assert caught.value.exit_code == 3
    for name in ("vl.pt", "renamed.qx", "old.qx"):
        with pytest.raises(InputError, match="a pickle, which is never read"):
            read_job(tmp_path / name)


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_an_unknown_version_is_refused(file: Path, version: Any) -> None:
    with pytest.raises(InputError, match="must be of version 1"):
        read_job(rewritten(file, {"version": version}))


@pytest.mark.parametrize("text", ['"x": NaN', '"x": 1e999', '"x": "\\ud800"', '"x": ' + "[" * 5000 + "]" * 5000])
def test_what_is_no_plain_json_is_refused(file: Path, text: str) -> None:
    document = '{"format": "qengine-job", "version": 1, ' + text + "}"
    save_file(load_file(file), file, {"qengine": document})
    with pytest.raises(InputError):
        read_job(file)


def test_another_format_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match=f"must be a {FORMAT} file"):
        read_job(rewritten(file, {"format": "something"}))


def changed(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**job_of().tensors, name: value}


def dropped(name: str) -> dict[str, torch.Tensor]:
    return {each: tensor for each, tensor in job_of().tensors.items() if each != name}


def without_one_image_row() -> dict[str, torch.Tensor]:
    kept = torch.ones(len(raw_of().segments), dtype=torch.bool)
    kept[int((raw_of().kinds == 2).nonzero()[0])] = False
    vl = ("vl.hidden", "vl.input_ids", "vl.segment")
    return {name: each[kept] if name.startswith(vl) else each for name, each in job_of().tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "subject"),
    [
        (changed("vl.hidden.-6", torch.full_like(raw_of().hidden[-6], torch.nan)), "finite"),
        (changed("vl.hidden.-6", raw_of().hidden[-6][:, :32].clone()), "one width"),
        (changed("vl.hidden.-6", raw_of().hidden[-6].double()), "dtype"),
        (changed("vl.hidden.-6", raw_of().hidden[-6][:-1].clone()), "one row per token"),
        (changed("vl.input_ids", raw_of().input_ids.long()), "int32"),
        (
            changed("vl.grid_thw", raw_of().grid_thw * torch.tensor([1, 2, 2], dtype=torch.int32)),
            "image tokens must be",
        ),
        (changed("vl.grid_thw", raw_of().grid_thw[:, :2].clone()), "vl.grid_thw"),
        (changed("vl.segment", torch.zeros_like(raw_of().segments)), "image tokens must be"),
        (changed("vl.segment", raw_of().segments | 8), "vl.segment must name pictures below 1"),
        (changed("text.embeds", torch.zeros(5, 63)), "one width"),
        (changed("text.embeds", torch.full((5, 64), torch.inf)), "finite"),
        (changed("latent.init", torch.zeros(1, 16, 1, 9, 9)), "init must be of 48x32 pixels"),
        (changed("latent.init", torch.zeros(16, 4, 6)), "dimensions"),
        (changed("odd", torch.zeros(1)), "tensors that its header names"),
        (dropped("vl.hidden.-6"), "layers"),
        (dropped("vl.segment"), "vl.segment"),
        (dropped("latent.init") | {"latent.ref.1": torch.zeros(1, 16, 1, 4, 6)}, "latent.ref.0"),
        (without_one_image_row(), "image tokens must be"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(
    file: Path, tensors: dict[str, torch.Tensor], subject: str
) -> None:
    with pytest.raises(InputError, match=re.escape(subject)):
        read_job(rewritten(file, {}, tensors))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"size": [1]},
        {"size": "large"},
        {"size": None},
        {"knobs": {"token_selection": "none"}},
        {"knobs": {"unheard": 1}},
        {"knobs": {"hidden_layer": {"x": 1}}},
        {"blend": {"alpha": 7}},
        {"blend": None},
        {"vl": None},
        {"vl": {}},
        {"vl": [1]},
        {"pictures": [{"sha256": "x"}]},
        {"model": {}},
        {"model": 3},
        {"prompt": None},
        {"prompt": 5},
    ],
)
def test_headers_that_make_no_sense_are_refused(file: Path, change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        read_job(rewritten(file, change))


def test_a_job_of_nothing_or_of_another_suffix_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="got none"):
        write_job(tmp_path / "job.qx", JobFile())
    with pytest.raises(RequestError, match="must end in .qx"):
        write_job(tmp_path / "job.pt", job_of())
    with pytest.raises(RequestError, match="width"):
        write_job(tmp_path / "job.qx", job_of(given=given_of(width=32)))
    with pytest.raises(RequestError, match="fingerprint"):
        write_job(tmp_path / "job.qx", job_of(model={}))
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError):
        write_job(tmp_path / "taken" / "job.qx", job_of())
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_given_part_alone_makes_a_job(tmp_path: Path) -> None:
    job = job_of(raw=None, given=Given(torch.ones(3, 8)), pictures=())
    write_job(tmp_path / "job.qx", job)
    assert same(read_job(tmp_path / "job.qx"), job)


def test_files_go_to_and_come_from_urls() -> None:
    pytest.importorskip("fsspec")
    write_job("memory://folder/job.qx", job_of())
    assert same(read_job("memory://folder/job.qx"), job_of())
    with pytest.raises(InputError, match="memory:///folder/none.qx|memory://folder/none.qx"):
        read_job("memory://folder/none.qx")


def test_a_url_of_an_unknown_kind_is_refused_at_once() -> None:
    pytest.importorskip("fsspec")
    check_known("memory://folder/job.qx")
    with pytest.raises(RequestError, match="of a kind that fsspec knows, got odd://"):
        check_known("odd://folder/job.qx")


@pytest.mark.parametrize("url", ["https://me:key@host/a/job.qx?token=secret", "s3://bucket/job.qx", "memory://job.qx"])
def test_a_url_is_shown_without_its_secrets(url: str) -> None:
    assert "secret" not in shown(url) and "key" not in shown(url)
    assert base_name(url) == "job.qx"


def test_a_url_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for call in (
        lambda: read_job("s3://user:secret@bucket/job.qx"),
        lambda: write_job("s3://b/job.qx", job_of()),
        lambda: check_known("s3://b/job.qx"),
    ):
        with pytest.raises(RequestError) as caught:
            call()
        assert "pip install" in str(caught.value.hint)
        assert "secret" not in str(caught.value)
