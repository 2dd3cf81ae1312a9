"""The native change mask against the definition: the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from qengine.errors import KernelError
from qengine.kernels import native
from qengine.kernels.rcm import change_mask, reference
from qengine.kernels.rcm import native as rcm

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no native library: {native.reason()}")


@pytest.fixture(params=native.ISAS[1:])
def isa(request: pytest.FixtureRequest) -> str:
    if not native.isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def latents(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    control = torch.randn(shape)
    return control + torch.randn(shape) * torch.rand(shape[-2:]).pow(4), control


@pytest.mark.parametrize("shape", [(16, 24, 36), (3, 10, 14), (1, 2, 2), (1, 16, 38, 20)], ids=str)
def test_masks_have_the_bits_of_the_reference(isa: str, shape: tuple[int, ...]) -> None:
    x, control = latents(shape)
    seen = set()
    for size, relative, dilation in itertools.product((0, 1, 2, 3, 7), (False, True), (0, 1, 3)):
        if max(size, 1) // 2 >= min(shape[-2:]):
            continue
        threshold = 0.5 if relative else 0.3
        wanted = reference.change_mask(x, control, threshold, relative, size, dilation)
        found = rcm.change_mask(x, control, threshold, relative, size, dilation, isa=isa)
        assert torch.equal(found, wanted), (size, relative, dilation)
        seen |= set(found.flatten().tolist())
    assert shape[-1] < 10 or seen >= {0.0, 0.25, 0.5, 0.75, 1.0}


def test_a_relative_threshold_of_1_leaves_the_largest_difference_and_equal_latents_change_everywhere() -> None:
    x, control = latents((4, 20, 20))
    found = rcm.change_mask(x, control, 1.0, True, 3, 0)
    assert sorted(set(found.flatten().tolist())) == [0.0, 0.25] and int((found > 0).sum()) == 1
    assert torch.equal(rcm.change_mask(x, x, 0.5, True, 3, 0), torch.ones(10, 10))
    assert torch.equal(rcm.change_mask(x, x, 0.5, False, 3, 0), torch.zeros(10, 10))


def test_a_dilation_larger_than_the_picture_covers_it() -> None:
    x, control = torch.zeros(1, 12, 8), torch.zeros(1, 12, 8)
    x[0, 0, 0] = 1
    assert int(rcm.change_mask(x, control, 0.5, False, 1, 0).count_nonzero()) == 1
    assert torch.equal(rcm.change_mask(x, control, 0.5, False, 1, 1 << 40), torch.full((6, 4), 0.25))


def test_the_number_of_threads_changes_no_bit_and_views_are_read() -> None:
    x, control = (t.transpose(1, 2) for t in latents((16, 70, 90)))
    wanted = reference.change_mask(x, control, 0.4, True, 5, 1)
    for threads in (1, 2, 7, 64):
        assert torch.equal(rcm.change_mask(x, control, 0.4, True, 5, 1, threads), wanted)
    assert torch.equal(change_mask(x, control, threshold=0.4, relative=True, kernel_size=5, dilate_size=1), wanted)
    found = change_mask(x, control, threshold=0.4, relative=True, kernel_size=5, dilate_size=1, implementation="native")
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(1, 4, 4, dtype=torch.bfloat16)}, "x must be float32 on the CPU, got torch.bfloat16"),
        ({"x": torch.ones(1, 4, 4, device="meta")}, "x must be float32 on the CPU, got .* on meta"),
        ({"x": torch.ones(4, 4)}, r"x must be latents .* got shape \[4, 4\]"),
        ({"x": torch.ones(2, 1, 4, 4)}, r"got shape \[2, 1, 4, 4\]"),
        ({"control": torch.ones(1, 4, 6)}, r"control must be \[1, 4, 4\] as x is, got \[1, 4, 6\]"),
        ({"x": torch.ones(1, 3, 4), "control": torch.ones(1, 3, 4)}, "height and width must be even"),
        ({"kernel_size": 9}, "above half the kernel"),
        ({"dilate_size": -1}, "the dilation 0 or more"),
        ({"threads": 0}, "threads must be 1 to 64, got 0"),
    ],
)
def test_bad_arguments_are_refused(changed: dict, message: str) -> None:
    arguments = {
        "x": torch.ones(1, 4, 4),
        "control": torch.ones(1, 4, 4),
        "threshold": 0.5,
        "relative": False,
        "kernel_size": 3,
        "dilate_size": 0,
    }
    with pytest.raises(KernelError, match=message):
        rcm.change_mask(**(arguments | changed))
