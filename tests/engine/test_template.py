"""Slabs, their alignment, and the rebinding of a template."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from qengine.engine.layout import SlabLayout
from qengine.engine.template import Template, aligned_bytes
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


def test_a_parameter_that_a_slab_leaves_out_cannot_be_used() -> None:
    with torch.device("meta"):
        template = Template(nn.Linear(64, 64))
    weight = torch.randn(64, 64)
    assert template.bind({"weight": weight, "bias": torch.zeros(64)}).bias.device == CPU
    assert template.bind({"weight": weight}).weight.data_ptr() == weight.data_ptr()
    assert template.bind({"weight": weight}).bias.is_meta
