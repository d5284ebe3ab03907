"""The loop: steps, previews, stopping anywhere and going on, states that meet and part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arvis.noise import Noise, Recorded
from arvis.state import State, join_states
from arvis.tokens import Pin
from arvis.walk import finish, generate, likelihood, walk
from toys import TOYS, toy
from toys.parts import ToySampling


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def start(name: str, items: int = 3, given: Pin | None = None, **settings: float) -> tuple:
    system = toy(name)
    cond = {"class_labels": torch.arange(items) % 3}
    return system, system.start(cond, ToySampling(**settings), Noise.of(2, items), given=given)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-10)


@pytest.mark.parametrize("name", TOYS)
def test_steps_count_and_cover_every_position_once(name: str) -> None:
    system, s = start(name)
    fresh = []
    for i, step in enumerate(walk(system, s)):
        assert (step.k, step.K) == (i + 1, s.K) and step.state is s
        fresh.append(step.fresh)
        shown = step.preview()
        known = torch.stack(fresh).any(0)
        assert torch.equal(known, s.known)
        assert bool((shown[~known] == -1).all()) and torch.equal(shown[known], s.tokens[known].to(shown))
    assert torch.equal(torch.stack(fresh).sum(0), torch.ones_like(s.group, dtype=torch.int64))
    assert torch.equal(system.tokenizer.decode(s.tokens), s.tokens) and bool(s.done.all())


@pytest.mark.parametrize("name", TOYS)
def test_given_tokens_are_shown_from_the_first_step_on_and_stay(name: str) -> None:
    """Whichever positions are given, other ones for each item, in every order."""
    system, s = start(name)
    others = s.tokens + 1 if s.tokens.is_floating_point() else (s.tokens + torch.arange(s.layout.n)[:, None]) % 2
    mask = Noise.of(4, 3).uniform("mask", 0, (s.layout.n,)) < 0.5
    mask[0] = False
    system, s = start(name, given=Pin(mask, others))
    drawn = torch.zeros_like(mask)
    for step in walk(system, s):
        shown = step.preview()
        assert torch.equal(shown[mask].to(others), others[mask])
        assert bool((shown[~(mask | s.known)] == -1).all())
        assert not bool((step.fresh & drawn).any())
        drawn |= step.fresh
    assert torch.equal(s.tokens[mask], others[mask]) and bool(s.known.all())
    assert bool((drawn | mask).all())
    nothing = finish(walk(*start(name, given=Pin(torch.zeros_like(mask), others)))).tokens
    assert torch.equal(nothing, finish(walk(*start(name))).tokens), "an empty pin changes nothing"
    assert torch.equal(s.tokens[0], nothing[0]), "nor does what the neighbours are given"


@pytest.mark.parametrize("name", ["masked", "masked-flow", "confident"])
def test_masked_orders_know_what_is_given_and_draw_the_rest_in_as_many_steps(name: str) -> None:
    system, s = start(name)
    mask = torch.tensor([[True] + [False] * (s.layout.n - 1)]).expand(3, -1)
    system, s = start(name, given=Pin(mask, s.tokens))
    assert torch.equal(s.known, mask) and s.at() == 0
    steps = list(walk(system, s))
    assert len(steps) == 3 and not any(bool(step.fresh[mask].any()) for step in steps)
    assert all(bool(step.fresh.any(1).all()) for step in steps)


@pytest.mark.parametrize("name", TOYS)
def test_stopping_and_going_on(name: str) -> None:
    """Until a step, by leaving the loop, or by an error in the middle of a draw: the rest is as if nothing happened."""
    system, s = start(name)
    whole = finish(walk(system, s))
    _, s = start(name)
    assert [step.k for step in walk(system, s, until=1)] == [1]
    assert not list(walk(system, s, until=1))
    for _ in walk(system, s):
        break
    assert s.k.tolist() == [2, 2, 2]
    system.predict(s)  # what a cancelled step leaves behind: its rows may be in the cache
    assert close(finish(walk(system, s)).tokens, whole.tokens)


def test_cancelling_inside_a_solve() -> None:
    system, s = start("clean-noisy")
    whole = finish(walk(system, s)).tokens
    _, s = start("clean-noisy")
    seen = []

    def watch(x: torch.Tensor, i: int, n: int) -> None:
        seen.append((x.shape, i, n))
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _ in walk(system, s, watch=watch):
            pass
    assert s.k.tolist() == [1, 1, 1] and seen[-1] == ((3, 2, 2), 1, 3)
    assert close(finish(walk(system, s)).tokens, whole)


def test_nothing_left_to_decide_is_said() -> None:
    system, s = start("next-scale")
    given = Pin(torch.ones(3, 6, dtype=torch.bool), finish(walk(system, s)).tokens)
    with pytest.raises(ValueError, match="every group was given"):
        finish(generate(system, {"class_labels": torch.arange(3)}, ToySampling(), Noise.of(2, 3), given=given))


@pytest.mark.parametrize("name", TOYS)
def test_joined_states_equal_separate_ones(name: str) -> None:
    """Different settings, prompts and seeds share a batch; each comes out as alone."""

    def one(i: int, **settings: float) -> State:
        return system.start({"class_labels": torch.tensor([i])}, ToySampling(**settings), Noise.of(i))

    system = toy(name)
    settings = [{"cfg_scale": 3.0}, {"temperature": 0.5}, {"top_k": 1, "cfg_scale": 0.5}]
    alone = [finish(walk(system, one(i, **x))).tokens for i, x in enumerate(settings)]
    for k in range(3):
        states = [one(i, **x) for i, x in enumerate(settings)]
        for s in states:
            for _ in walk(system, s, until=k):
                pass
        together = join_states(states)
        assert len(together) == 3 and close(finish(walk(system, together)).tokens, torch.cat(alone))


def test_ragged_systems_join_at_any_step() -> None:
    system, _ = start("raster")
    noise = [Noise.of(i) for i in range(3)]
    cond = [{"class_labels": torch.tensor([i])} for i in range(3)]
    alone = [finish(generate(system, c, ToySampling(), n)).tokens for c, n in zip(cond, noise, strict=True)]
    states = [system.start(c, ToySampling(), n) for c, n in zip(cond, noise, strict=True)]
    for s, until in zip(states, (1, 3, 0), strict=True):
        for _ in walk(system, s, until=until):
            pass
    together = join_states(states)
    assert together.k.tolist() == [1, 3, 0]
    with pytest.raises(ValueError, match=r"different steps: \[1, 3, 0\]"):
        together.at()
    steps = [step.k for step in walk(system, together)]
    assert steps == [1, 2, 3, 4]  # of the slowest item
    assert torch.equal(together.tokens, torch.cat(alone))


def test_states_that_cannot_share_a_batch() -> None:
    system, a = start("next-scale")
    _, later = start("next-scale")
    for _ in walk(system, later, until=1):
        pass
    _, plain = start("next-scale", cfg_scale=1.0)
    given = Pin(torch.arange(6).expand(3, -1) < 1, torch.zeros(3, 6, 1, dtype=torch.int64))
    _, prefilled = start("next-scale", given=given)  # at the same step as `later`, but its first scale is not fed yet
    for pair in ((a, later), (a, plain), (later, prefilled), (a, start("fronts")[1])):
        with pytest.raises(ValueError, match="states of 2 different kinds"):
            join_states(pair)
    _, b = start("masked")  # nothing but the step tells these two apart
    _, c = start("masked")
    b.k = b.k + 1
    stretched = replace(a, weights=a.weights.expand(-1, 3, -1))
    for pair in ((b, c), (a, stretched)):
        with pytest.raises(ValueError, match="states of 2 different kinds"):
            join_states(pair)
    recorded = replace(a, noise=Recorded({}, {}, items=3))
    with pytest.raises(ValueError, match="cannot be joined"):
        join_states([recorded, replace(recorded, noise=Recorded({}, {}, items=3))])


def test_given_tokens_join_states_without() -> None:
    value = torch.ones(3, 6, 1, dtype=torch.int64)
    mask = torch.tensor([[False, False, False, True, True, False]]).expand(3, -1)
    system, a = start("next-scale", given=Pin(mask, value))
    _, b = start("next-scale")
    alone = finish(walk(system, b.fork())).tokens
    s = finish(walk(system, join_states([a, b])))
    assert bool((s.tokens[:3][mask] == 1).all()) and torch.equal(s.tokens[3:], alone)


def test_weights_per_step_and_item() -> None:
    _, s = start("raster")
    assert s.weight(2).shape == (3, 2)
    s.weights = torch.arange(24.0).view(3, 4, 2)
    assert torch.equal(s.weight(1), s.weights[:, 1]) and torch.equal(s.weight(9), s.weights[:, 3])
    assert torch.equal(s.weight(torch.tensor([0, 3, 1])), s.weights[torch.arange(3), torch.tensor([0, 3, 1])])
    many = s.weight(torch.tensor([[0, 1], [2, 3], [3, 9]]))  # [B, G, n]
    assert torch.equal(many[2], s.weights[2, [3, 3]].T) and torch.equal(many[0], s.weights[0, :2].T)


def test_likelihood_under_settings() -> None:
    """Greedy settings give probability one to the greedy sequence and none to others."""
    system, s = start("fronts", temperature=0.0)
    greedy = finish(walk(system, s)).tokens
    cond = {"class_labels": torch.arange(3)}
    cold = ToySampling(temperature=0.0)
    assert likelihood(system, greedy, cond, Noise.of(2, 3), sampling=cold).abs().max() < 1e-12
    assert bool(likelihood(system, 1 - greedy, cond, Noise.of(2, 3), sampling=cold).isneginf().all())
    assert bool((likelihood(system, greedy, cond, Noise.of(2, 3)) < 0).all())
