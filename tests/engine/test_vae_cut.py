"""Where the image VAE cuts its maps."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from qengine.engine.vae.cut import ATTENTION_ROWS, Cut, split_evenly
from qengine.engine.vae.layers import Attention, Conv, Norm
from qengine.errors import RequestError


def test_the_cut_depends_on_size_and_tile_alone() -> None:
    cuts = [Cut.of(kind, tile) for kind in ("cpu", "cuda") for tile in (None, 64)]
    with mock.patch("torch.cuda.mem_get_info", side_effect=AssertionError("free memory was asked for")):
        again = [Cut.of(kind, tile) for kind in ("cpu", "cuda") for tile in (None, 64)]
    assert again == cuts
    assert [cut.rows(1024, 192, 2) for cut in cuts] == [8, 32, 341, 32]
    assert [split_evenly(rows, 4) for rows in (1, 4, 9, 10)] == [[1], [4], [3, 3, 3], [4, 3, 3]]
    with pytest.raises(RequestError, match="vae_tile must be at least 1"):
        Cut.of("cpu", 0)


def test_attention_over_many_chunks_equals_that_over_one() -> None:
    generator = torch.Generator().manual_seed(0)
    channels = 8
    weights = [torch.randn(n, channels, 1, 1, generator=generator) / 2 for n in (3 * channels, channels)]
    to_qkv, proj = (Conv(weight, torch.randn(len(weight), generator=generator)) for weight in weights)
    attention = Attention(Norm(torch.ones(1, channels, 1, 1), silu=False), to_qkv, proj)
    x = torch.randn(1, channels, 37, 29, generator=generator)
    assert x[0, 0].numel() > 2 * ATTENTION_ROWS
    tokens = torch.nn.functional.normalize(x.double(), dim=1).flatten(2)[0].T
    qkv = tokens @ to_qkv.weight[:, :, 0, 0].double().T + to_qkv.bias.double()
    query, key, value = qkv.chunk(3, 1)
    mixed = (query @ key.T / channels**0.5).softmax(1) @ value
    expected = (mixed @ proj.weight[:, :, 0, 0].double().T + proj.bias.double()).T.view(x.shape) + x
    torch.testing.assert_close(attention.apply(x), expected.float(), atol=1e-5, rtol=0)
