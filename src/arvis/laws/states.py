"""Laws of states: who is in a batch, where it started and how it was moved about does not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.laws.case import Case, gap, walked
from arvis.noise import Noise
from arvis.state import State, Windowed, join_states
from arvis.tokens import Pin


def seed(case: Case) -> str:
    """An item's tokens depend on its condition, its seed and the settings, not on who is in the batch with it."""
    guided = case.system.Sampling()
    together = walked(case, case.start(sampling=guided)).tokens
    count = len(together)
    for items in [torch.tensor([i]) for i in range(count)] + [torch.arange(count).flip(0)]:
        alone = walked(case, case.start(items, sampling=guided)).tokens
        if gap(alone.double(), together[items].double()) > case.tolerance:
            raise case.broken("seed", f"items {items.tolist()} differ from themselves in a batch of {count}")
    return f"{count} items are the same in three batches"


def gather(case: Case) -> str:
    """Gathering or joining states in the middle changes nothing for the items, and copies go their own way."""
    guided = case.system.Sampling()
    whole = walked(case, case.start(sampling=guided)).tokens.double()
    for k in case.steps[1:]:
        s = walked(case, case.start(sampling=guided), until=k)
        rows = torch.arange(len(s)).flip(0)
        rows[-2] = rows[-1]  # the first item twice, the middle one dropped
        s.take_(rows)
        u = s.noise.uniform("law", 0, (8,))
        if bool((u[-1] == u[-2]).any()):
            raise case.broken("gather", "a copy continues with the noise of its original")
        done = walked(case, s).tokens.double()
        if gap(done[:-1], whole[rows[:-1]]) > case.tolerance:
            raise case.broken("gather", f"items {rows[:-1].tolist()} continue differently after a gather at step {k}")
        s = walked(case, case.start(sampling=guided), until=k)
        parts = [s.fork().take_(torch.tensor([i])) for i in range(len(s))]
        if gap(walked(case, join_states(parts)).tokens.double(), whole) > case.tolerance:
            raise case.broken("gather", f"items that were split and joined at step {k} continue differently")
    return f"gathered, split and joined at {len(case.steps) - 1} steps"


def prefill(case: Case) -> str:
    """Starting from a given prefix equals walking there, and given tokens come out as given wherever they lie.

    An order that is arranged around what is given (masked sets, whose schedule runs over the rest) has no prefix: what
    is given is known at once, and under the walk's own order the next prediction is the walk's.
    """
    tokens, worst = case.tokens("true"), 0.0
    for k in case.steps:
        for later in sorted({k, case.steps[-1]}):
            there = case.reach(tokens, k)
            s = case.start(given=Pin(there.known, tokens))
            if k and bool((s.k == 0).all()) and torch.equal(s.known, there.known):
                later, s.group, s.k, s.K = k, there.group, there.k, there.K
            s = walked(case, s, until=k)
            if int(s.k.min()) != k:
                raise case.broken("prefill", f"a start from {k} given groups stands at step {s.k.tolist()}")
            states = (case.reach(tokens, later, s), case.reach(tokens, later, there))
            error = gap(*(case.read(case.system.predict(x)) for x in states))
            worst = max(worst, error)
            if error > case.tolerance:
                raise case.broken("prefill", f"prediction {later} after {k} given groups differs by {error:.1e}")
    mask = Noise.of(7, len(tokens)).uniform("mask", 0, (case.N,)) < 0.5
    s = walked(case, case.start(sampling=case.system.Sampling(), given=Pin(mask, tokens)))
    if not torch.equal(s.tokens[mask], tokens[mask].to(s.tokens)):
        raise case.broken("prefill", f"{int((s.tokens[mask] != tokens[mask]).sum())} given tokens came out changed")
    return f"given prefixes equal walked ones to {worst:.1e}; {int(mask.sum())} scattered tokens came out as given"


def window(case: Case) -> str:
    """A window of drafts predicts what walking along each branch predicts; a kept path equals having walked it."""
    system, tokens, worst, kept = case.system, case.tokens("true"), 0.0, 0
    windows, items = cast(Windowed, system), torch.arange(len(tokens))
    drafts = (case.tokens("drafts")[:, :1, 0] + torch.tensor([0, 1, 1, 0, 1])) % system.space.sizes[0]
    chain, tree = (torch.tensor([x]).expand(len(items), -1) for x in ([-1, 0, 1, 2, 3], [-1, -1, 0, 1, 0]))
    paths = torch.tensor([[-1, -1], [1, -1], [0, 2]])[items % 3]
    length = (paths >= 0).sum(1)
    for k in case.steps:
        for name, parent in (("chain", None), ("tree", tree)):
            s = case.reach(tokens, k)
            p_BLV, _ = windows.window(s, drafts, parent)
            for node in range(-1, drafts.shape[1]):
                branch = _branch(chain[0] if parent is None else tree[0], node)
                if k + len(branch) < s.K:
                    line = tokens.clone()
                    line[:, k : k + len(branch), 0] = drafts[:, branch]
                    error = gap(p_BLV[:, node + 1], _code_probs(case, case.reach(line, k + len(branch))))
                    worst = max(worst, error)
                    if error > case.tolerance:
                        raise case.broken("window", f"draft {node} of a {name} at step {k} predicts {error:.1e} off")
        if k + 3 < s.K:  # s holds the window of the tree: keep no draft, one, two, and a token more
            line, fresh = tokens.clone(), F.pad(drafts.gather(1, paths.clamp_min(0)), (0, 1))
            fresh[items, length] = tokens[items, k, 0]
            for item in items:
                line[item, k : k + length[item] + 1, 0] = fresh[item, : length[item] + 1]
            windows.keep(s, paths, fresh)
            if s.k.tolist() != (k + length + 1).tolist():
                raise case.broken(
                    "window", f"{length.tolist()} drafts and a token kept at {k}, items at {s.k.tolist()}"
                )
            after = _code_probs(case, s)
            for item in items:
                error = gap(after[item], _code_probs(case, case.reach(line, int(s.k[item])))[item])
                worst, kept = max(worst, error), kept + 1
                if error > case.tolerance:
                    raise case.broken("window", f"{int(length[item])} drafts kept at step {k} predict {error:.1e} off")
    return f"chains, trees and {kept} kept paths equal walks to {worst:.1e}"


def round_trip(case: Case) -> str:
    """The state dict is the whole model: saved and loaded into other weights it gives the same bits."""
    fresh = case.make(1)
    twin, last, tokens = replace(case, make=lambda _: fresh), case.steps[-1], case.tokens("true")

    def prediction(c: Case) -> Tensor:
        return c.read(c.system.predict(c.reach(tokens, last)))

    if torch.equal(prediction(twin), prediction(case)):
        raise case.broken("round-trip", "two seeds give equal models, so nothing can be tested")
    data = safetensors.torch.save({name: x.clone() for name, x in cast(nn.Module, case.system).state_dict().items()})
    cast(nn.Module, fresh).load_state_dict(safetensors.torch.load(data))
    if not torch.equal(prediction(twin), prediction(case)):
        error = gap(prediction(twin), prediction(case))
        raise case.broken("round-trip", f"a saved and loaded model predicts {error:.1e} off")
    return f"{len(data)} bytes saved and loaded, the same bits predicted"


def _branch(parent_L: Tensor, node: int) -> list[int]:
    """The path of nodes from the root to a node."""
    return [*_branch(parent_L, int(parent_L[node])), node] if node >= 0 else []


def _code_probs(case: Case, s: State) -> Tensor:
    """Probabilities [B, V] of the one code that is drawn next."""
    d = case.system.predict(s)
    codes = torch.arange(case.system.space.sizes[0]).view(-1, 1, 1, 1).expand(-1, len(s), 1, 1)
    return torch.stack([d.log_prob(code)[:, 0].exp() for code in codes], -1)
