"""Speculative decoding: several drafts are checked in one call, and the tokens keep the law of the system exactly.

A draft x that was proposed with probabilities q is accepted with probability min(1, p(x) / q(x)); after a rejection p
becomes norm(max(p - q, 0)) and the next sibling is tried; what is left at the end draws the token that follows
(Leviathan et al., arXiv 2211.17192; siblings: Miao et al., arXiv 2305.09781). This holds for any drafts whose q does
not depend on the uniforms used here. A chain is a tree in which everybody is an only child.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.rows import depths
from arvis.sampling import draw
from arvis.state import State, System, Windowed
from arvis.walk import Step, step_of


class Draft(NamedTuple):
    """Proposed tokens [B, L], the probabilities q [B, L, V] that each was drawn from given its earlier siblings, and
    the parent of each [B, L] (-1: follows what is decided; parents come first), or None for a chain."""

    tokens: Tensor
    q: Tensor
    parent: Tensor | None = None

    @property
    def tree(self) -> Tensor:
        """The parents, spelt out for a chain."""
        items, count = self.tokens.shape
        return torch.arange(-1, count - 1).expand(items, -1) if self.parent is None else self.parent


class Verdict(NamedTuple):
    """The accepted path of drafts [B, P], padded with -1, and tokens [B, P + 1]: the path's, then the one after it."""

    path: Tensor
    tokens: Tensor


class Drafter(Protocol):
    """Where drafts come from; what it remembers about items it keeps in `state.more`."""

    def propose(self, s: State) -> Draft:
        """Drafts for the positions from s.k on."""
        ...

    def learn(self, s: State, p_BWV: Tensor, hidden_BGWD: Tensor, verdict: Verdict) -> None:
        """What the window said, before the state moves on."""
        ...


def independent(q_BLV: Tensor, u_BL: Tensor, parent_BL: Tensor | None = None) -> Draft:
    """Every draft drawn on its own from its q; siblings may repeat each other."""
    return Draft(draw(q_BLV, u_BL), q_BLV, parent_BL)


def distinct(q_BLV: Tensor, u_BL: Tensor, parent_BL: Tensor) -> Draft:
    """Siblings without repetition: each is drawn from its q without the codes of earlier siblings.

    Where no code is left the last one is repeated."""
    q_BLV, tokens = q_BLV.clone(), torch.zeros(u_BL.shape, dtype=torch.int64)
    for node in range(tokens.shape[1]):
        tokens[:, node] = draw(q_BLV[:, node], u_BL[:, node])
        for later in range(node + 1, tokens.shape[1]):
            sibling = parent_BL[:, later] == parent_BL[:, node]
            rest = q_BLV[:, later].scatter(1, tokens[:, node, None], 0)
            rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, q_BLV[:, later])
            q_BLV[:, later] = torch.where(sibling[:, None], rest / rest.sum(1, keepdim=True), q_BLV[:, later])
    return Draft(tokens, q_BLV, parent_BL)


def certain(tokens_BL: Tensor, codes: int, parent_BL: Tensor | None = None) -> Draft:
    """Drafts that were chosen, not drawn: q is 1 at the token."""
    return Draft(tokens_BL, F.one_hot(tokens_BL, codes).double(), parent_BL)


def residual(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """norm(max(p - q, 0)): what p still has to give after a draft from q was rejected; p where nothing is left."""
    rest = (p_BV - q_BV).clamp_min(0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p_BV)


def verify(p_BWV: Tensor, draft: Draft, u_BL: Tensor, last_B: Tensor, room_B: Tensor) -> Verdict:
    """Accept a path of drafts and draw the token after it.

    p [B, 1 + L, V] are the system's probabilities after what is decided and after each draft; uniforms u [B, L] test
    the drafts and last [B] draws the token; drafts deeper than room [B] are left out. Paths are control data: the
    verdict is made, and lies, on the host.
    """
    p, q, proposed, u_BL, last_B = (x.cpu() for x in (p_BWV.double(), draft.q.double(), draft.tokens, u_BL, last_B))
    items, count = proposed.shape
    item, parent, depth = torch.arange(items), draft.tree, depths(draft.tree)
    tip, rest = torch.full((items,), -1), p[:, 0]
    path, length = torch.full((items, int(depth.max())), -1), torch.zeros(items, dtype=torch.int64)
    for node in range(count):
        x, q_BV = proposed[:, node], q[:, node]
        tried = (parent[:, node] == tip) & (depth[:, node] <= room_B)
        yes = tried & (u_BL[:, node] * q_BV[item, x] < rest[item, x])
        rest = torch.where((tried & ~yes)[:, None], residual(rest, q_BV), rest)
        rest = torch.where(yes[:, None], p[:, node + 1], rest)
        path[item[yes], length[yes]] = node
        tip, length = torch.where(yes, node, tip), length + yes
    tokens = F.pad(proposed.gather(1, path.clamp_min(0)), (0, 1))
    tokens[item, length] = draw(rest, last_B)
    return Verdict(path, tokens)


class Speculative(System, Windowed, Protocol):
    """A system whose windows can be verified."""


def speculate(system: Speculative, s: State, drafter: Drafter) -> Iterator[Step]:
    """Decide window after window until the end; a step decides at least one token of every item that is not done.

    The tokens follow the guided, filtered law of the system, whatever the drafter proposes. Given tokens are kept.
    """
    while not bool(s.done.all()):
        before = s.known
        draft = drafter.propose(s)
        p, hidden = system.window(s, draft.tokens, draft.parent)
        p = _given(s, p, s.k[:, None] + F.pad(depths(draft.tree), (1, 0)))
        u = s.noise.uniform("accept", s.k, draft.tokens.shape[1:])
        verdict = verify(p, draft, u, s.noise.uniform("after", s.k, ()), s.K - s.k)
        drafter.learn(s, p, hidden, verdict)
        system.keep(s, verdict.path, verdict.tokens)
        yield step_of(system, s, before)


def _given(s: State, p_BWV: Tensor, position_BW: Tensor) -> Tensor:
    """Probabilities 0 and 1 where the token of a position is given."""
    pin = s.pin(position_BW.clamp(max=s.tokens.shape[1] - 1))
    if pin is None:
        return p_BWV
    return torch.where(pin.mask[..., None], F.one_hot(pin.value[..., 0], p_BWV.shape[-1]).to(p_BWV), p_BWV)
