"""Laws of single predictions: what they see, that they are whole distributions, how they are guided."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from arvis.laws.case import Case, gap
from arvis.nn.trunk import Call, Trunk
from arvis.noise import Noise
from arvis.state import Parallel
from arvis.tokens import at
from arvis.walk import likelihood


def blind(case: Case) -> str:
    """What is not decided yet does not change a prediction by a single bit; what was decided last does change it."""
    tokens = case.tokens("true")
    other = case.others(tokens)
    predict, least = case.system.predict, math.inf
    for k in case.steps:
        s = case.reach(tokens, k)
        before, seen = case.read(predict(s)), s.known
        s = case.reach(tokens, k)
        hidden = other if case.system.space.sizes else torch.full_like(other, math.nan)
        s.tokens = torch.where(s.known[..., None], s.tokens, hidden.to(s.tokens))
        after = case.read(predict(s))
        if not torch.equal(before, after):
            raise case.broken("blind", f"filling undecided positions moves prediction {k} by {gap(after, before):.1e}")
        if isinstance(case.system, Parallel):
            where = predict(case.reach(tokens, k)).where
            both = [case.system.teacher(torch.where(seen[..., None], tokens, x), case.cond) for x in (tokens, other)]
            before, after = (at(case.read(d), where) for d in both)
            if not torch.equal(before, after):
                raise case.broken("blind", f"the teacher's prediction {k} reads later tokens: {gap(after, before):.1e}")
        if k > 0:
            last = (case.reach(tokens, k).group == k - 1)[..., None]
            moved = gap(
                case.read(predict(case.reach(torch.where(last, other, tokens), k))),
                case.read(predict(case.reach(tokens, k))),
            )
            least = min(least, moved)
            if moved == 0:
                raise case.broken("blind", f"other tokens in group {k - 1} leave prediction {k} as it is")
    return f"{len(case.steps)} predictions blind to what is undecided; the last group moves them by >= {least:.1e}"


def again(case: Case) -> str:
    """Asking for a prediction twice gives the same prediction, so a cancelled step can be repeated."""
    tokens = case.tokens("true")
    for k in case.steps:
        s = case.reach(tokens, k)
        case.read(case.system.predict(s))
        second = gap(case.read(case.system.predict(s)), case.read(case.system.predict(case.reach(tokens, k))))
        if second > case.tolerance:
            raise case.broken("again", f"a second prediction at step {k} differs by {second:.1e}")
    return f"{len(case.steps)} predictions repeated"


def row(case: Case) -> str:
    """Which input rows move which output rows of a trunk at depth d is the d-th power of its mask, nothing else."""
    calls = list(trunk_calls(case))
    for trunk, x, call, layers in calls:
        count = x.shape[1]
        reach = torch.eye(count, dtype=torch.bool).expand(len(x), -1, -1)
        mask = call.mask[:, 0].cpu() if isinstance(call.mask, Tensor) else torch.ones_like(reach)
        mask = reach | mask.repeat_interleave(len(x) // len(mask), 0)
        for depth in range(1, len(layers) + 1):
            reach = (reach.double() @ mask.double()) > 0
            base = trunk(x, call, layers[:depth])
            for r in range(count):
                bumped = x.clone()
                bumped[:, r] += Noise.of(r, len(x)).normal("row", 0, x.shape[2:]).to(x)
                moved = (trunk(bumped, call, layers[:depth]) - base).abs().amax(-1) > 0
                if not torch.equal(moved, reach[:, :, r]):
                    much, little = moved & ~reach[:, :, r], reach[:, :, r] & ~moved
                    raise case.broken(
                        "row",
                        f"input row {r} of {count}, depth {depth}: it moves output rows {_where(much)} that the mask "
                        f"hides from it, and leaves rows {_where(little)} that the mask opens to it",
                    )
    return f"{len(calls)} trunk calls, patterns equal at every depth"


def cache(case: Case) -> str:
    """Step-by-step predictions over a cache equal those of one pass over everything."""
    tokens, worst = case.tokens("true"), 0.0
    one_pass = case.read(cast(Parallel, case.system).teacher(tokens, case.cond))
    for k in case.steps:
        d = case.system.predict(case.reach(tokens, k))
        error = gap(case.read(d), at(one_pass, d.where))
        worst = max(worst, error)
        if error > case.tolerance:
            raise case.broken("cache", f"prediction {k} differs from the one pass by {error:.1e}")
    return f"step by step equals one pass to {worst:.1e}"


def mass(case: Case) -> str:
    """Probabilities sum to 1 over all sequences (where they can be listed) or codes, and samples follow them."""
    sizes, n = case.system.space.sizes, case.N
    codes = torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, len(sizes))  # [V, S]
    count = len(codes) ** n
    if count <= 2048:
        index = torch.cartesian_prod(*[torch.arange(len(codes))] * n).view(count, n)
        cond = {name: x[:1].expand(count, *x.shape[1:]) for name, x in case.cond.items()}
        noise = Noise(case.noise.seed_B[:1].expand(count))  # one order for all
        total = float(likelihood(case.system, codes[index], cond, noise).exp().sum())
        said = f"{count} sequences have total probability {total:.12f}"
    else:
        total = 1.0
        for k in case.steps:
            d = case.system.predict(case.reach(case.tokens("true"), k))
            shape = (len(case.noise), d.where.shape[1], len(sizes))
            sums = torch.stack([d.log_prob(code.expand(shape)).exp() for code in codes]).sum(0)
            total = max(total, float(sums.max()), key=lambda x: abs(x - 1))
            total = max(total, float(sums.min()), key=lambda x: abs(x - 1))
        said = f"{len(codes)} codes have total probability {total:.12f} at every position"
    if not abs(total - 1) < 10 * case.tolerance:
        raise case.broken("mass", said)
    items, worst = 1500, 0.0
    noise = Noise.of(3, items)
    cond = {name: x[:1].expand(items, *x.shape[1:]) for name, x in case.cond.items()}
    tokens = case.tokens("true")[:1].expand(items, -1, -1)
    for k in (case.steps[0], case.steps[-1]):
        s = case.reach(tokens, k, case.system.start(cond, case.system.Sampling.plain(), noise))
        d = case.system.predict(s)
        x = d.sample(s.noise)
        for code in codes[:16]:
            p = d.log_prob(code.expand_as(x)).exp()
            hits = (x == code).all(-1).double() - p
            score = (hits.sum(0) / (p * (1 - p)).sum(0).clamp_min(1e-9).sqrt()).abs().max()
            worst = max(worst, float(score))
            if score > 5:
                raise case.broken("mass", f"code {code.tolist()} is drawn {score:.1f} deviations off at step {k}")
    return f"{said}; samples follow within {worst:.1f} deviations"


def guidance(case: Case) -> str:
    """One-hot guidance weights equal the single row: the first is the condition, the last is none; both matter."""
    tokens, predict, worst = case.tokens("true"), case.system.predict, 0.0
    nulls, mixes = 0.0, 0.0
    for k in case.steps:
        read = {}
        for name, hot in (("mixed", None), ("first", 0), ("last", -1)):
            s = case.start(sampling=case.system.Sampling())
            if hot is not None:
                s.weights = torch.zeros_like(s.weights)
                s.weights[..., hot] = 1
            read[name] = case.read(predict(case.reach(tokens, k, s)))
        for name, cond in (("cond", True), ("null", False)):
            alone = case.start(cond=cond)
            alone.knobs = s.knobs
            read[name] = case.read(predict(case.reach(tokens, k, alone)))
        for hot, alone in (("first", "cond"), ("last", "null")):
            error = gap(read[hot], read[alone])
            worst = max(worst, error)
            if error > case.tolerance:
                raise case.broken("guidance", f"all weight on the {hot} row is {error:.1e} off {alone} at step {k}")
        nulls, mixes = max(nulls, gap(read["null"], read["cond"])), max(mixes, gap(read["mixed"], read["cond"]))
    if nulls == 0 or mixes == 0:
        raise case.broken("guidance", f"the condition moves predictions by {nulls:.1e}, the mixture by {mixes:.1e}")
    return f"one-hot weights equal single rows to {worst:.1e}; condition and mixture move {nulls:.1e}, {mixes:.1e}"


def trunk_calls(case: Case) -> Iterator[tuple[Trunk, Tensor, Call, Sequence[int]]]:
    """The trunk calls without a cache: those of the one pass, else those of all predictions."""
    calls: list[tuple[Trunk, Tensor, Call, Sequence[int]]] = []

    def note(trunk: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(Trunk.forward).bind(trunk, *args, **kwargs).arguments
        calls.append((trunk, bound["x_RD"], bound["call"], bound.get("layers") or range(len(trunk))))

    trunks = [m for m in cast(nn.Module, case.system).modules() if isinstance(m, Trunk)]
    hooks = [trunk.register_forward_pre_hook(note, with_kwargs=True) for trunk in trunks]
    tokens = case.tokens("true")
    if isinstance(case.system, Parallel):
        case.read(case.system.teacher(tokens, case.cond))
    else:
        for k in case.steps:
            case.read(case.system.predict(case.reach(tokens, k)))
    for hook in hooks:
        hook.remove()
    yield from (c for c in calls if c[2].cache is None)


def _where(hit_BR: Tensor) -> list[int]:
    return hit_BR.any(0).nonzero()[:, 0].tolist()
