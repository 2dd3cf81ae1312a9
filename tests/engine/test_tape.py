"""Slabs, their alignment, and the rebinding of a template."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from qengine.engine.layout import SlabLayout
from qengine.engine.tape import Tape, Template, aligned_bytes
from torch import nn

CPU = torch.device("cpu")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
SPECS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.tuples(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(sorted(DTYPES))),
    min_size=1,
    max_size=8,
)


@given(SPECS)
def test_fields_are_aligned_and_never_overlap(specs) -> None:
    layout = SlabLayout.of(specs)
    end = 0
    for field, (name, (shape, dtype)) in zip(layout.fields, specs.items(), strict=True):
        assert (field.name, field.shape, field.dtype) == (name, shape, dtype)
        assert field.offset_bytes % 256 == 0 and field.offset_bytes >= end
        end = field.offset_bytes + field.nbytes
    assert layout.nbytes % 4096 == 0 and layout.nbytes >= end


@given(SPECS)
def test_views_are_the_slabs_bytes(specs) -> None:
    layout = SlabLayout.of(specs)
    slab = aligned_bytes(layout.nbytes, CPU)
    assert slab.data_ptr() % 4096 == 0
    slab.zero_()
    for field in layout.fields:
        view = layout.views(slab)[field.name]
        assert view.shape == torch.Size(field.shape) and view.dtype == DTYPES[field.dtype]
        assert field.nbytes == 0 or view.data_ptr() == slab.data_ptr() + field.offset_bytes


class _Source:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read_into(self, items) -> None:
        for name, tensor in items:
            tensor.copy_(self.tensors[name])


def test_one_template_runs_as_every_block() -> None:
    stack = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4))).requires_grad_(False)
    with torch.device("meta"):
        template = Template(nn.Linear(5, 5))
    tape = Tape.load(
        template, _Source(stack.state_dict()), [f"{i}." for i in range(4)], dtype=torch.float32, device=CPU
    )
    x = torch.randn(3, 5)
    y = x
    for index in range(len(tape)):
        y = template.bind(tape.views(index))(y)
    assert torch.equal(y, stack(x))
    assert tape.nbytes == 4 * 4096


def test_a_skipped_parameter_takes_no_space_and_cannot_be_used() -> None:
    with torch.device("meta"):
        template = Template(nn.Linear(64, 64))
    source = _Source({f"{i}.{n}": t for i in range(2) for n, t in nn.Linear(64, 64).state_dict().items()})
    tape = Tape.load(
        template, source, ["0.", "1."], dtype=torch.float32, device=CPU, skip=lambda i: ["bias"] if i == 1 else ()
    )
    assert tape.views(0).keys() == {"weight", "bias"} and tape.views(1).keys() == {"weight"}
    assert template.bind(tape.views(0)).bias.device == CPU
    assert template.bind(tape.views(1)).bias.is_meta
