"""Guidance, filters and draws: the exact rules, and items of one batch with settings of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arvis import sampling
from arvis.noise import Noise
from arvis.sampling import (
    cfg,
    confidence,
    draw,
    gumbel,
    lowest,
    mix,
    nucleus,
    per_item,
    temper,
    top_k,
    top_p,
    two_way,
    var_cfg,
)
from chance import chi_square

INF = float("inf")


def logits(items: int = 4, codes: int = 7) -> Tensor:
    return 2 * Noise.of(5, items).normal("logits", 0, (3, 2, codes))


def test_guidance_is_a_weighted_sum() -> None:
    c, t, u = logits(2), logits(3)[1:] + 1, logits(2).flip(0)
    pair = torch.stack((c, u), 1)

    def weights(*w: float) -> Tensor:
        return torch.tensor([w, w])

    assert torch.allclose(mix(pair, weights(*cfg(3.0))), u + 3 * (c - u))
    assert torch.allclose(mix(pair, weights(*var_cfg(1.5))), 2.5 * c - 1.5 * u)
    both = mix(torch.stack((c, t, u), 1), weights(*two_way(5.0, 2.0)))
    assert torch.allclose(both, u + 2 * (t - u) + 5 * (c - t))  # nested conditions
    assert torch.equal(mix(c[:, None], torch.tensor([[9.0], [9.0]])), c)  # one row: no arithmetic
    for made in (cfg(3.0), var_cfg(1.5), two_way(5.0, 2.0)):
        assert sum(made) == pytest.approx(1)
    per_position = torch.tensor([[[1.0, 2, 3], [0, -1, -2]]] * 2)  # [B, G, n]
    mixed = mix(pair, per_position)
    for n in range(3):
        assert torch.allclose(mixed[:, n], mix(pair, per_position[:, :, n])[:, n])


def test_top_k_keeps_ties() -> None:
    x = torch.tensor([[[[1.0, 3, 2, 3, 2, 0]]]])
    assert (top_k(x, 1) > -INF).flatten().tolist() == [False, True, False, True, False, False]
    assert (top_k(x, 3) > -INF).flatten().tolist() == [False, True, True, True, True, False]
    assert top_k(x, 0) is x and top_k(x, 99) is x
    assert torch.equal(top_k(x, 3)[top_k(x, 3) > -INF], x[x >= 2])


def official_top_p(x: Tensor, p: float) -> Tensor:
    """Sort ascending, drop while the cumulative probability is <= 1 - p, always keep the largest."""
    out = x.clone()
    for row in out.view(-1, x.shape[-1]):
        order, total = row.argsort(), 0.0
        probs = row.softmax(-1)
        for i in order[:-1].tolist():
            total += float(probs[i])
            if total <= 1 - p:
                row[i] = -INF
    return out


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_follows_its_rule(p: float) -> None:
    x = logits()
    kept = top_p(x, p)
    assert torch.equal(kept, official_top_p(x, p))
    mass = x.softmax(-1).masked_fill(kept == -INF, 0)
    assert bool((mass.sum(-1) > p).all() | (p < 0.2))  # what is kept exceeds p ...
    smallest = mass.masked_fill(mass == 0, INF).amin(-1)
    many = (kept > -INF).sum(-1) > 1
    assert bool((mass.sum(-1) - smallest <= p + 1e-12)[many].all())  # ... and is the smallest such set


def test_top_p_at_its_edges() -> None:
    even = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    assert int((top_p(even, 0.5) > -INF).sum()) == 2  # a cumulative probability of exactly 1 - p is dropped
    x = logits()
    assert torch.equal(top_p(x, 1e-18).isfinite().sum(-1), torch.ones(x.shape[:-1]))  # the most likely code stays


def test_filters_off() -> None:
    x = logits()
    assert top_p(x, 0) is x and top_p(x, 1.0) is x and temper(x, 1.0) is x


def test_a_temperature_of_zero_is_greedy() -> None:
    x = logits()
    cold = temper(x, 0.0).softmax(-1)
    assert torch.equal(cold.argmax(-1), x.argmax(-1)) and torch.equal(cold.amax(-1), torch.ones(x.shape[:-1]).double())
    assert torch.allclose(temper(x, 2.0), x / 2)


@pytest.mark.parametrize(
    ("function", "settings"),
    [(temper, [0.0, 1.0, 0.5, 2.0]), (top_k, [1, 0, 3, 99]), (top_p, [0.0, 0.3, 0.9, 1.0])],
    ids=["temper", "top_k", "top_p"],
)
def test_settings_per_item_equal_items_one_by_one(function, settings: list[float]) -> None:
    x = logits()
    together = function(x, torch.tensor(settings, dtype=torch.float64))
    for i, setting in enumerate(settings):
        assert torch.equal(together[i], function(x[i : i + 1], setting)[0]), (i, setting)


@pytest.mark.parametrize("many", [1, 90, 2**20])
def test_many_items_are_filtered_and_drawn_in_turn(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One item, two or all at a time (an item has 42 numbers), with one setting and with one for each."""
    x, u = logits(), Noise.of(9, 4).uniform("draw", 0, (3, 2))
    settings = {top_k: (3, torch.tensor([1, 0, 3, 99])), top_p: (0.7, torch.tensor([0.0, 0.3, 0.9, 1.0]).double())}
    settings[nucleus] = settings[top_p]
    wanted = [f(x, setting) for f, both in settings.items() for setting in both]
    codes = draw(x.softmax(-1), u)
    monkeypatch.setattr(sampling, "MANY", many)
    for found, want in zip((f(x, setting) for f, both in settings.items() for setting in both), wanted, strict=True):
        assert torch.equal(found, want)
    assert torch.equal(draw(x.softmax(-1), u), codes) and len(codes.unique()) > 2


def test_per_item_settings_are_checked() -> None:
    assert per_item(2, 3).tolist() == [2, 2, 2] and per_item([1, 2, 3], 3).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"one per item \(3\), got shape \(2,\)"):
        per_item([1, 2], 3)


def test_draw_follows_the_probabilities() -> None:
    probs = torch.tensor([0.1, 0.0, 0.4, 0.3, 0.0, 0.2, 0.0])
    codes = draw(probs.expand(20_000, -1), Noise.of(1, 20_000).uniform("draw", 0, ()))
    counts = torch.bincount(codes, minlength=7)
    assert chi_square(counts, probs) > 0.01
    scaled = draw(7 * probs.expand(20_000, -1), Noise.of(1, 20_000).uniform("draw", 0, ()))
    assert torch.equal(scaled, codes)  # any positive total


def test_draw_never_takes_a_code_of_probability_zero() -> None:
    tiny, one = 2.0**-53, 1 - 2.0**-53
    edges = torch.tensor([tiny, 0.1, 0.5 - tiny, 0.5, 0.5 + tiny, 0.9, one], dtype=torch.float64)
    for support in range(1, 32):
        probs = torch.tensor([float(support >> i & 1) for i in range(5)]).double()
        for total in (1.0, 1 / 3, 1e-30, 1e30):
            code = draw((probs * total).expand(len(edges), -1), edges)
            assert bool((probs[code] > 0).all()), (support, total)
            assert int(code[0]) == int(probs.nonzero()[0]) and int(code[-1]) == int(probs.nonzero()[-1])


def test_draw_has_room_for_many_codes() -> None:
    probs = torch.zeros(2, 100_000)
    probs[:, 77_777] = 1e-6
    assert draw(probs, torch.tensor([1e-12, 1 - 1e-12])).tolist() == [77_777, 77_777]


def test_lowest_marks_the_m_lowest() -> None:
    score = torch.tensor([[3.0, 1, 2, 1], [0, 0, 0, 0]])
    assert lowest(score, 2).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert lowest(score, 3).tolist() == [[False, True, True, True], [True, True, True, False]]
    assert not bool(lowest(score, 0).any())
    assert lowest(score, torch.tensor([1, 3])).tolist() == [[False, True, False, False], [True, True, True, False]]


def test_confidence_draws_an_order_by_the_temperature() -> None:
    """At temperature 1 the surest guess is drawn in proportion to its probability, at 0 it is the likeliest."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).double()
    u = Noise.of(1, 20000).uniform("rank", 0, (4,))
    first = confidence(p.log().expand(len(u), -1), 1.0, u).argmax(1)
    assert chi_square(first.bincount(minlength=4), p) > 0.001
    settings = torch.tensor([0.0, 1e6])
    sure = confidence(p.log().expand(2, -1), settings, u[:2])
    assert sure[0].argmax() == 0 and sure[1].argmax() == u[1].argmax()
    assert torch.allclose(gumbel((-(-torch.tensor(0.7).double()).exp()).exp()), torch.tensor(0.7).double())
