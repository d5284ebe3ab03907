"""Speculative decoding draws from exactly the law of the system, in ragged batches, from chains and from trees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arvis import speculative
from arvis.noise import Noise
from arvis.sampling import draw
from arvis.speculative import Draft, Verdict, certain, distinct, independent, residual, speculate, verify
from arvis.state import State
from arvis.tokens import Pin
from arvis.walk import Step, likelihood, walk
from chance import chi_square
from toys import toy
from toys.parts import ToySampling

ITEMS = 5000
CODES = 3
TREE = torch.tensor([[-1, -1, -1, 0, 0, 1, 3]])


@dataclass
class Fixed:
    """Drafts from distributions that know nothing; `how` draws them."""

    how: str = "chain"

    def propose(self, s: State) -> Draft:
        count = 3 if self.how in ("chain", "certain") else TREE.shape[1]
        q = Noise.of(4).uniform("q", 0, (count, CODES)).expand(len(s), -1, -1)
        q = q / q.sum(-1, keepdim=True)
        u = s.noise.uniform("draft", s.k, (count,))
        if self.how == "certain":
            return certain((u * CODES).long(), CODES)
        if self.how == "chain":
            return independent(q, u)
        parent = TREE.expand(len(s), -1)
        q = q[:, parent[0] + 1]  # siblings share their q
        return (distinct if self.how == "distinct" else independent)(q, u, parent)

    def learn(self, s: State, p_BWV: Tensor, hidden_BGWD: Tensor, verdict: Verdict) -> None:
        pass


@dataclass
class Jacobi:
    """Drafts are fresh samples of what the last window said about their positions (arXiv 2410.01699)."""

    count: int = 3

    def propose(self, s: State) -> Draft:
        if "drafts" not in s.more:
            s.more["drafts"] = (s.noise.uniform("begin", 0, (self.count,)) * CODES).long()
            s.more["q"] = F.one_hot(s.more["drafts"], CODES).double()
        return Draft(s.more["drafts"], s.more["q"])

    def learn(self, s: State, p_BWV: Tensor, hidden_BGWD: Tensor, verdict: Verdict) -> None:
        fresh = draw(p_BWV, s.noise.uniform("fresh", s.k, (self.count + 1,)))
        row = (verdict.path >= 0).sum(1, keepdim=True) + 1 + torch.arange(self.count)  # of the positions that come next
        known = row <= self.count
        row = row.clamp(max=self.count)
        zero = torch.zeros_like(row)  # beyond the window: code 0
        s.more["drafts"] = torch.where(known, fresh.gather(1, row), zero)
        q = p_BWV.gather(1, row[..., None].expand(-1, -1, CODES))
        s.more["q"] = torch.where(known[..., None], q, F.one_hot(zero, CODES))


DRAFTERS = {how: Fixed(how) for how in ("chain", "certain", "tree", "distinct")} | {"jacobi": Jacobi()}


def start(items: int, given: Pin | None = None) -> tuple:
    system = toy("raster")
    cond = {"class_labels": torch.ones(items, dtype=torch.int64)}
    return system, system.start(cond, ToySampling(), Noise.of(8, items), given=given)


def drain(steps: Iterator[Step]) -> int:
    return sum(1 for _ in steps)


def joint() -> Tensor:
    """Probabilities of all sequences under guidance and temperature."""
    system, sequences = toy("raster"), torch.cartesian_prod(*[torch.arange(CODES)] * 4)
    cond = {"class_labels": torch.ones(len(sequences), dtype=torch.int64)}
    return likelihood(system, sequences[..., None], cond, Noise.of(0, len(sequences)), sampling=ToySampling()).exp()


def fit(tokens: Tensor, probs: Tensor) -> float:
    index = (tokens[..., 0] * CODES ** torch.arange(3, -1, -1)).sum(1)
    return chi_square(torch.bincount(index, minlength=CODES**4), probs)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_joint_is_that_of_the_system(name: str) -> None:
    """Catches tests after filtering, stale or unnormalised q, a missing residual, and rows that survive rejection."""
    system, s = start(ITEMS)
    steps, ragged = 0, False
    for step in speculate(system, s, DRAFTERS[name]):
        steps, ragged = steps + 1, ragged or len(set(s.k.tolist())) > 1
        assert step.k == int(s.k.min()) and bool(step.fresh.any(1)[s.k < s.K].all())
    assert ragged and steps <= 4
    assert fit(s.tokens, joint()) > 0.01


@pytest.mark.parametrize("break_", ["accept everything", "no residual", "q forgotten"])
def test_broken_acceptance_is_found(break_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if break_ == "no residual":
        monkeypatch.setattr(speculative, "residual", lambda p, q: p)
    else:

        def broken(p: Tensor, draft: Draft, u: Tensor, last: Tensor, room: Tensor) -> Verdict:
            if break_ == "accept everything":
                return verify(p, draft, torch.full_like(u, -1), last, room)
            return verify(p, draft._replace(q=torch.ones_like(draft.q)), u, last, room)

        monkeypatch.setattr(speculative, "verify", broken)
    system, s = start(ITEMS)
    drain(speculate(system, s, DRAFTERS["chain"]))
    assert fit(s.tokens, joint()) < 1e-3


def test_items_do_not_depend_on_their_batch() -> None:
    """Items accept different numbers of drafts; the noise is keyed by each item's own step."""
    for drafter in DRAFTERS.values():
        system, s = start(6)
        alone = s.fork().take_(torch.tensor([4]))
        drain(speculate(system, s, drafter))
        drain(speculate(system, alone, drafter))
        assert torch.equal(alone.tokens[0], s.tokens[4])


def test_a_speculative_state_can_be_gathered_joined_and_walked() -> None:
    for drafter in DRAFTERS.values():
        system, s = start(6)
        next(speculate(system, s, drafter))
        whole = s.fork()
        rows = torch.tensor([5, 0, 3])
        s.take_(rows)
        drain(speculate(system, s, drafter))
        drain(speculate(system, whole, drafter))
        assert torch.equal(s.tokens, whole.tokens[rows])
    system, s = start(6)
    next(speculate(system, s, DRAFTERS["tree"]))
    assert len(set(s.k.tolist())) > 1
    done = s.known[..., None].clone()
    before = s.tokens.clone()
    drain(walk(system, s))  # plain steps go on from a ragged state
    assert bool(s.done.all()) and torch.equal(s.tokens[done], before[done])


def test_given_tokens_are_kept() -> None:
    mask = torch.tensor([[True, False, True, False], [False, False, False, True], [False] * 4])
    value = torch.tensor([[2, 0, 1, 0], [0, 0, 0, 2], [0] * 4])[..., None]
    system, s = start(3, Pin(mask, value))
    drain(speculate(system, s, DRAFTERS["tree"]))
    assert torch.equal(s.tokens[mask], value[mask])


def test_the_best_drafts_are_all_accepted() -> None:
    """Proposing the system's own law decides everything in one window of each item."""
    system, s = start(64)
    p = system.window(s.fork(), torch.zeros(64, 1, dtype=torch.int64))[0][:, :1]
    draft = independent(p, s.noise.uniform("draft", 0, (1,)))
    verdict = verify(
        system.window(s, draft.tokens)[0], draft, torch.full((64, 1), 0.999), torch.full((64,), 0.5), s.K - s.k
    )
    assert bool((verdict.path == 0).all())


def test_one_draft_gives_p_in_closed_form() -> None:
    p, q = (x / x.sum(-1, keepdim=True) for x in Noise.of(2, 20).uniform("pq", 0, (2, 16)).unbind(1))
    accepted = torch.minimum(p, q)
    out = accepted + (1 - accepted.sum(1, keepdim=True)) * residual(p, q)
    assert torch.allclose(out, p, atol=1e-12)
    assert torch.equal(residual(p, p), p)


@pytest.mark.parametrize("how", ["independent", "distinct"])
def test_siblings_of_one_node_give_p(how: str) -> None:
    items, codes = 40_000, 6
    noise = Noise.of(6, items)
    p, q = (x / x.sum() for x in Noise.of(9).uniform("pq", 0, (2, codes))[0] ** 2)
    parent = torch.full((items, 3), -1)
    propose = {"independent": independent, "distinct": distinct}[how]
    draft = propose(q.expand(items, 3, -1), noise.uniform("draft", 0, (3,)), parent)
    if how == "distinct":
        assert all(len(set(row)) == 3 for row in draft.tokens[:100].tolist())
        assert torch.allclose(draft.q.sum(-1), torch.ones(1).double())
    room = torch.full((items,), 9)
    verdict = verify(
        p.expand(items, 4, -1), draft, noise.uniform("accept", 0, (3,)), noise.uniform("after", 0, ()), room
    )
    accepted = verdict.path[:, 0] >= 0
    assert 0.5 < float(accepted.double().mean()) < 1
    assert chi_square(torch.bincount(verdict.tokens[:, 0], minlength=codes), p) > 0.01


def test_a_path_follows_its_own_branch() -> None:
    p = torch.full((1, 6, 2), 0.5).double()
    draft = certain(torch.tensor([[0, 1, 0, 1, 1]]), 2, torch.tensor([[-1, -1, 0, 1, 3]]))
    u = torch.tensor([[0.9, 0.1, 0.1, 0.1, 0.4]])  # the first child is refused, so its child is never tried
    verdict = verify(p, draft, u, torch.tensor([0.75]), torch.tensor([9]))
    assert verdict.path.tolist() == [[1, 3, 4]] and verdict.tokens.tolist() == [[1, 1, 1, 1]]
    short = verify(p, draft, u, torch.tensor([0.25]), torch.tensor([2]))
    assert short.path.tolist() == [[1, 3, -1]] and short.tokens[:, :3].tolist() == [[1, 1, 0]]
