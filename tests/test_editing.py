"""Masks over pictures as masks over tokens."""

import pytest
import torch

from arvis.editing import box_mask, keep_tokens
from arvis.tokens import Layout, pyramid


def test_a_box_covers_the_cells_nearest_to_its_edges():
    inside = box_mask((0.2, 0.1, 0.8, 0.7), (6, 6))
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    assert rows.tolist() == [1, 2, 3, 4] and columns.tolist() == [1, 2, 3]
    assert box_mask((0, 0, 1, 1), (3, 5)).all() and not box_mask((0.5, 0.5, 0.5, 0.5), (4, 4)).any()


@pytest.mark.parametrize("box", [(0.5, 0, 0.2, 1), (0, 0, 1, 1.2), (-0.1, 0, 1, 1)])
def test_a_box_that_is_none_is_refused(box):
    with pytest.raises(ValueError, match="a box is"):
        box_mask(box, (4, 4))


def test_a_token_is_kept_where_more_than_half_of_the_resized_mask_is():
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:, :2] = True
    layout = pyramid((1, 2, 3, 4))
    kept = keep_tokens(keep, layout)
    assert kept.shape == (1, 30) and kept.dtype == torch.bool
    assert kept[0, 0], "one token speaks of the whole picture and is kept"
    assert kept[0, layout.span(1)].view(2, 2).tolist() == [[True, False]] * 2
    # the middle column of three lies on the border: exactly one half, which is not more than a half
    assert kept[0, layout.span(2)].view(3, 3).tolist() == [[True, False, False]] * 3
    assert torch.equal(kept[0, layout.span(3)].view(4, 4), keep)


def test_levels_of_three_tokens_are_kept_and_of_four_are_not():
    nothing = torch.zeros(2, 2, 2, dtype=torch.bool)
    kept = keep_tokens(nothing, Layout(((1, 1), (1, 3), (2, 2))))
    assert kept.tolist() == [[True] * 4 + [False] * 4] * 2


def test_pictures_have_their_own_masks():
    keep = torch.stack([torch.ones(4, 4), torch.zeros(4, 4)]).bool()
    kept = keep_tokens(keep, Layout(((4, 4),)))
    assert kept[0].all() and not kept[1].any()


def test_a_cell_is_kept_only_if_all_of_its_pixels_are():
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[3, 5] = False
    kept = keep_tokens(keep, Layout(((2, 2),)))
    assert kept.tolist() == [[True, False, True, True]]


def test_masks_and_layouts_that_are_no_pictures_are_refused():
    with pytest.raises(ValueError, match=r"axes \(128,\)"):
        keep_tokens(torch.ones(4, 4), Layout(((128,),)))
    with pytest.raises(ValueError, match="shape"):
        keep_tokens(torch.ones(1, 1, 4, 4), Layout(((4, 4),)))
