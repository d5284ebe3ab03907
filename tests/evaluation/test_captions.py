"""The prefix of captions in CLIP scores."""

import pytest
import torch

from arvis import parity
from arvis.evaluation.captions import END, prefixed

START, A, PHOTO, DEPICTS = 49406, 320, 1125, 24970


def test_a_prefix_stands_behind_the_start_token():
    """Fails for a prefix in front of the start token, an end that is written into padding, and a lost end."""
    short = [START, 1, 2, END, 0, 0, 0, 0]
    exact = [START, 1, 2, 3, END, 0, 0, 0]
    cut = [START, 1, 2, 3, 4, 5, 6, END]
    before = torch.tensor([short, exact, cut])
    after = prefixed(before, (A, PHOTO, DEPICTS))
    assert after.tolist() == [
        [START, A, PHOTO, DEPICTS, 1, 2, END, 0],
        [START, A, PHOTO, DEPICTS, 1, 2, 3, END],
        [START, A, PHOTO, DEPICTS, 1, 2, 3, END],
    ]
    assert before[2].tolist() == cut  # not in place
    assert torch.equal(prefixed(before, ()), before)
    assert prefixed(before, (A,), end=7)[2, -1] == 7
    with pytest.raises(ValueError, match="7 tokens of a prefix leave no room in captions of 8"):
        prefixed(before, [9] * 7)


def test_it_is_the_recorded_rule():
    try:
        fixture = parity.find("metrics")
    except parity.ParityError as error:
        pytest.skip(str(error))
    io, given = fixture.io, fixture.runs["clip_prefix"]
    assert io["clip_tokens"].shape[1] == given["max_length"] and given["end_token"] == END
    assert torch.equal(prefixed(io["clip_tokens"], io["clip_prefix"].tolist()), io["clip_tokens_prefixed"])
