"""Layouts, spaces and pins."""

from __future__ import annotations

import pytest
import torch

from arvis.tokens import Layout, Pin, Space, at, pyramid


def test_a_layout_counts_its_positions() -> None:
    layout = Layout(((1, 1), (2, 3), (4,)))
    assert (layout.K, layout.n, layout.sizes, layout.offsets) == (3, 11, (1, 6, 4), (0, 1, 7, 11))
    assert layout.span(1) == slice(1, 7)
    assert layout.level_N.tolist() == [0] + [1] * 6 + [2] * 4
    assert layout.coords_NA[1:7].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert layout.coords_NA[7:].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert pyramid((1, 2, 3)) == Layout(((1, 1), (2, 2), (3, 3))) and hash(pyramid((1, 2))) == hash(pyramid((1, 2)))


def test_a_layout_stays_on_the_host_when_models_are_built_elsewhere() -> None:
    with torch.device("meta"):
        layout = pyramid((1, 2))
        assert layout.level_N.tolist() == [0, 1, 1, 1, 1] and layout.coords_NA.sum() == 4


@pytest.mark.parametrize("levels", [(), ((),), ((2, 0),)])
def test_a_layout_needs_positions(levels: tuple) -> None:
    with pytest.raises(ValueError, match="at least one level of positive lengths"):
        Layout(levels)


def test_a_space_is_codes_or_channels() -> None:
    assert Space(sizes=(2, 3)).S == 2 and Space(width=16).S == 16
    for wrong in ({}, {"sizes": (2,), "width": 1}):
        with pytest.raises(ValueError, match="either sizes or width"):
            Space(**wrong)
    with pytest.raises(ValueError, match="positive sizes"):
        Space(sizes=(2, 0))


def test_tokens_and_pins_at_positions() -> None:
    x = torch.arange(24).view(2, 4, 3)
    assert torch.equal(at(x, torch.tensor([[3, 0]])), x[:, [3, 0]])
    assert torch.equal(at(x, torch.tensor([[3, 0], [1, 1]])), torch.stack((x[0, [3, 0]], x[1, [1, 1]])))
    pin = Pin(torch.tensor([[True, False, True, False], [False, False, True, True]]), x)
    part = pin.at(torch.tensor([[2, 3]]))
    assert part.mask.tolist() == [[True, False], [True, True]] and torch.equal(part.value, x[:, 2:])
    assert pin.take(torch.tensor([1])).mask.tolist() == [[False, False, True, True]]
