"""Windows of cells: the rule, the shorter way to what it shows, at borders and for any tiles; what is multiplied."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from arvis.nn import neighbourhood
from arvis.nn.attention import attend
from arvis.nn.neighbourhood import InsideScales, near, neighbours
from arvis.nn.trunk import Call
from arvis.noise import Noise
from arvis.rows import Rows, looks_back, render, same, upto, window
from arvis.tokens import Layout, pyramid


def visible(layout: Layout, kernel: int, first: int = 0) -> Tensor:
    rows = Rows.of(layout.level_N, layout.place_N)
    mask = render(near(layout, kernel, first), rows, rows)
    return torch.ones(layout.n, layout.n, dtype=torch.bool) if mask is None else mask[0, 0]


def qkv(rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [Noise.of(i, 2).normal("qkv", 0, (3, rows, 4)).to(dtype) for i in range(3)]


@pytest.mark.parametrize(("size", "kernel"), [((6, 6), 3), ((8, 8), 3), ((7, 9), 5), ((13, 13), 7), ((5, 5), 5)])
def test_a_cell_sees_the_window_around_it_shifted_inward_at_borders(size, kernel):
    seen = visible(Layout((size,)), kernel).view(*size, *size)
    assert bool((seen.sum((2, 3)) == kernel**2).all())
    for y in range(size[0]):
        for x in range(size[1]):
            top, left = (min(max(a - kernel // 2, 0), n - kernel) for a, n in ((y, size[0]), (x, size[1])))
            expected = torch.zeros(size, dtype=torch.bool)
            expected[top : top + kernel, left : left + kernel] = True
            assert torch.equal(seen[y, x], expected)


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 5, 99])
@pytest.mark.parametrize(("size", "kernel"), [((6, 6), 3), ((8, 8), 3), ((7, 9), 5), ((13, 13), 7), ((5, 5), 5)])
def test_neighbours_are_masked_attention_whatever_the_tiles(size, kernel, tile):
    n = size[0] * size[1]
    found = neighbours(*qkv(n), size, kernel, 0.7, tile)
    wanted = attend(*qkv(n), visible(Layout((size,)), kernel)[None, None], 0.7)
    assert (found - wanted).abs().max() < 1e-12
    if kernel < min(size):
        assert (found - attend(*qkv(n), None, 0.7)).abs().max() > 1e-2, "windows must matter"


def test_gradients_are_those_of_masked_attention():
    inputs = [[x.requires_grad_() for x in qkv(49)] for _ in range(2)]
    weight = Noise.of(9, 2).normal("w", 0, (3, 49, 4))
    (neighbours(*inputs[0], (7, 7), 3, 1.0) * weight).sum().backward()
    (attend(*inputs[1], visible(Layout(((7, 7),)), 3)[None, None], 1.0) * weight).sum().backward()
    for a, b in zip(*inputs, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-12


@pytest.mark.parametrize("kernel", [0, 3])
def test_scales_together_are_scales_alone(kernel):
    layout = pyramid((1, 2, 3, 6, 8))
    rows = Rows.of(layout.level_N, layout.place_N)
    mask = render(near(layout, 3, 3) if kernel else same, rows, rows)
    look = InsideScales(layout, kernel, 3)
    call = Call(mask=mask, rows=rows)
    assert (look(*qkv(layout.n), call, 1.0) - attend(*qkv(layout.n), mask, 1.0)).abs().max() < 1e-12
    assert look(*qkv(layout.n, torch.float32), call, 1.0).dtype == torch.float32


def multiplied(size: int, kernel: int, tile: int) -> int:
    """Products of a query and a key."""
    pairs = []

    def counting(q, k, v, mask, scale):
        pairs.append(q.shape[1] * q.shape[2] * k.shape[2] // 3)
        return attend(q, k, v, mask, scale)

    with mock.patch.object(neighbourhood, "attend", counting):
        neighbours(*qkv(size * size), (size, size), kernel, 1.0, tile)
    return sum(pairs)


def test_work_grows_with_the_cells_and_not_with_their_square():
    assert multiplied(16, 7, 1) == 256 * 49
    assert multiplied(16, 7, 4) == 256 * 100
    assert multiplied(32, 7, 4) == 4 * multiplied(16, 7, 4)
    assert multiplied(13, 7, 1) == 169 * 49


def test_what_has_no_window_is_refused():
    with pytest.raises(ValueError, match=r"scale of \(2, 2\) cells has no window of 3x3; begin later than at 1"):
        near(pyramid((1, 2, 4)), 3, 1)
    with pytest.raises(ValueError, match=r"odd side.*got 4"):
        near(pyramid((1, 2, 4)), 4, 2)
    with pytest.raises(ValueError, match="says its rows and has no cache"):
        InsideScales(pyramid((1, 2)))(*qkv(5), Call(), 1.0)


def test_markov_rules_look_back_to_nothing():
    assert not looks_back(same, 4) and not looks_back(near(pyramid((1, 2, 4)), 3, 2), 3)
    assert looks_back(upto, 4) and looks_back(window(2), 4)


def test_runs_of_rows_say_where_each_scale_lies():
    layout = pyramid((1, 2, 3))
    assert Rows.of(layout.level_N).runs == [(0, slice(0, 1)), (1, slice(1, 5)), (2, slice(5, 14))]
    assert Rows.of(layout.level_N[1:5]).runs == [(1, slice(0, 4))]
    assert layout.place_N.tolist() == [0, *range(4), *range(9)]
