"""What a tokenizer makes of pictures: how its codes are used, level by level, or how its channels are spread.

All statistics are those of one window, the tokens of all pictures together; the mean of per-batch perplexities would be
another, smaller number. A window says little about an alphabet that is not much smaller: a perplexity is at most the
number of tokens seen, so that number stands beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from arvis.data.images import to_bytes
from arvis.evaluation.metrics import psnr, ssim
from arvis.noise import Noise
from arvis.quant.usage import dead_positions, hits, joint_bits, mutual_information, perplexity
from arvis.tokens import Layout


class CodeUse(NamedTuple):
    """The codes of a part of the tokens; of several sub-tokens at once the share in use and the perplexity are means
    (the latter geometric), dead codes and bits are sums."""

    part: str
    codes: str
    seen: int
    used: float
    dead: int
    perplexity: float
    normalised: float
    bits: float


class ChannelUse(NamedTuple):
    """A channel of real tokens: mean and deviation of what a generator is trained on, and where the tokenizer is
    variational, the KL of its latent channel in nats per cell."""

    channel: str
    mean: float
    deviation: float
    kl: float | None


@runtime_checkable
class Variational(Protocol):
    """A tokenizer whose features are the moments of a Gaussian."""

    def features(self, x: Tensor) -> Tensor: ...

    def posterior(self, moments: Tensor) -> Any:
        """It has `mean` and `logvar` [B, C, Y, X]."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenizerReport:
    """What was measured on how many pictures of (Y, X) pixels, with the settings it was measured under.

    `totals` are numbers of all tokens together, by what they are.
    """

    settings: dict[str, Any]
    pictures: int
    pixels: tuple[int, int]
    levels: tuple[tuple[int, ...], ...]
    reconstruction: dict[str, float]
    codes: list[CodeUse] = field(default_factory=list)
    channels: list[ChannelUse] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)

    def table(self) -> list[list[str]]:
        """The uses of codes or channels, a heading first."""
        if self.codes:
            heading = ["part", "codes", "tokens seen", "in use", "dead", "perplexity", "of all codes", "bits/token"]
            return [heading, *([u.part, u.codes, f"{u.seen:,}", *_shown(u)] for u in self.codes)]
        rows = [[c.channel, f"{c.mean:.3f}", f"{c.deviation:.3f}", _optional(c.kl)] for c in self.channels]
        return [["channel", "mean", "deviation", "KL, nats per cell"], *rows]

    def facts(self) -> list[tuple[str, str]]:
        """What is said of all tokens together: (what, value)."""
        quality = ", ".join(f"{value:.{places}f} {name}" for name, value, places in _quality(self.reconstruction))
        return [
            ("pictures", f"{self.pictures} of {self.pixels[1]}x{self.pixels[0]} pixels"),
            ("tokens per picture", f"{sum(map(math.prod, self.levels))} in {len(self.levels)} levels"),
            ("reconstruction", quality),
            *((name, f"{value:.4g}") for name, value in self.totals.items()),
        ]

    def __str__(self) -> str:
        rows, facts = self.table(), self.facts()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        width = max(len(name) for name, _ in facts)
        return "\n".join([*lines, "", *(f"{name:<{width}}  {value}" for name, value in facts)])

    def to_markdown(self) -> str:
        rows = self.table()
        lines = [" | ".join(row) for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
        facts = [f"{name} | {value}" for name, value in [("measured", "value"), ("---", "---"), *self.facts()]]
        tables = ("\n".join(f"| {line} |" for line in part) for part in (lines, facts))
        return "\n\n".join([*tables, f"Settings: `{json.dumps(self.settings)}`"]) + "\n"

    def to_json(self) -> str:
        about = {**asdict(self), "codes": [u._asdict() for u in self.codes]}
        return json.dumps(about | {"channels": [c._asdict() for c in self.channels]}, indent=2)


@torch.inference_mode()
def measure(
    tokenizer: Any,
    batches: Iterable[Tensor],
    layout: Layout | None = None,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    on_picture: Callable[[int], object] = lambda n: None,
) -> TokenizerReport:
    """Measure a tokenizer on batches of pictures [B, 3, Y, X] in [-1, 1], all of one size.

    Codes are those of `encode` without noise; real tokens are samples, with noise of `seed`, as generators see them.
    Reconstructions go through the tokens without noise, and are compared as bytes. ValueError for no picture at all.
    """
    spread, kept, errors, pixels, count = _Spread(tokenizer), [], [], (0, 0), 0
    for x in batches:
        layout = tokenizer.layout(tuple(x.shape[2:])) if layout is None else layout
        assert layout is not None
        tokens = tokenizer.encode(x, layout)
        back, x_bytes = to_bytes(tokenizer.decode(tokens, layout)), to_bytes(x)
        found = {"PSNR": psnr(x_bytes, back)} | ({"SSIM": ssim(x_bytes, back)} if min(x.shape[2:]) >= 11 else {})
        errors.append({name: values.cpu() for name, values in found.items()})
        if tokenizer.space.sizes:
            kept.append(tokens.cpu())
        else:
            spread.add(x, layout, Noise.of(seed + count, len(x), x.device))
        pixels, count = (x.shape[2], x.shape[3]), count + len(x)
        on_picture(len(x))
    if layout is None:
        raise ValueError("a tokenizer is measured on at least one picture, got none")
    area, sizes = math.prod(pixels), tokenizer.space.sizes
    if sizes:
        tokens = torch.cat(kept)
        uses = code_uses(tokens, layout, sizes)
        found = {"codes": uses, "totals": _totals(tokens, layout, sizes, area)}
    else:
        found = {"channels": spread.uses(), "totals": {"numbers per pixel": layout.n * tokenizer.space.S / area}}
    return TokenizerReport(
        settings=dict(settings or {}),
        pictures=count,
        pixels=pixels,
        levels=layout.levels,
        reconstruction={name: float(torch.cat([e[name] for e in errors]).mean()) for name in errors[0]},
        **found,
    )


def code_uses(tokens_BNS: Tensor, layout: Layout, sizes: Sequence[int]) -> list[CodeUse]:
    """Of each level where there are several, of each sub-token where there are several, and of all together."""
    every = []
    if layout.K > 1:
        for k in range(layout.K):
            name = f"level {k} ({'x'.join(map(str, layout.levels[k]))})"
            every.append(_use(name, hits(tokens_BNS[:, layout.span(k)], sizes), sizes))
    whole = hits(tokens_BNS, sizes)
    if len(sizes) > 1:
        every += [_use(f"sub-token {s}", [whole[s]], [size]) for s, size in enumerate(sizes)]
    return [*every, _use("all", whole, sizes)]


def _use(part: str, counts: Sequence[Tensor], sizes: Sequence[int]) -> CodeUse:
    distinct = [int((n > 0).sum()) for n in counts]
    bits = [math.log2(float(perplexity(n))) for n in counts]
    mean = 2 ** (sum(bits) / len(bits))
    alike = len(set(sizes)) == 1 and len(sizes) > 1
    return CodeUse(
        part=part,
        codes=f"{len(sizes)} x {sizes[0]}" if alike else " x ".join(map(str, sizes)),
        seen=int(counts[0].sum()),
        used=sum(d / size for d, size in zip(distinct, sizes, strict=True)) / len(sizes),
        dead=sum(sizes) - sum(distinct),
        perplexity=mean,
        normalised=mean / 2 ** (sum(map(math.log2, sizes)) / len(sizes)),
        bits=sum(bits),
    )


def _totals(tokens_BNS: Tensor, layout: Layout, sizes: Sequence[int], area: int) -> dict[str, float]:
    levels = [_use("", hits(tokens_BNS[:, layout.span(k)], sizes), sizes).bits for k in range(layout.K)]
    bits = sum(n * each for n, each in zip(layout.sizes, levels, strict=True))
    out = {"bits per picture, by the frequencies of each level": bits, "bits per pixel": bits / area}
    if len(sizes) > 1:
        pairs = [mutual_information(tokens_BNS[..., a], tokens_BNS[..., b]) for a, b in _pairs(len(sizes))]
        out["bits per token, sub-tokens jointly"] = float(joint_bits(tokens_BNS))
        out["bits that two sub-tokens share, on average"] = float(torch.stack(pairs).mean())
    if len(tokens_BNS) > 1:
        out["share of positions that never vary"] = float(dead_positions(tokens_BNS))
    return out


def _pairs(parts: int, most: int = 120) -> list[tuple[int, int]]:
    """Pairs of sub-tokens, evenly chosen where there are very many."""
    every = list(combinations(range(parts), 2))
    return every[:: -(-len(every) // most)]


class _Spread:
    """Sums over tokens and moments, in float64."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._count, self._cells = tokenizer, 0, 0
        self._sum = self._square = self._kl = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, layout: Layout, noise: Noise) -> None:
        z = self._tokenizer.encode(x, layout, noise).double().flatten(0, 1).cpu()
        self._count, self._sum, self._square = self._count + len(z), self._sum + z.sum(0), self._square + (z * z).sum(0)
        if isinstance(self._tokenizer, Variational):
            moments = self._tokenizer.posterior(self._tokenizer.features(x))
            mean, logvar = moments.mean.double(), moments.logvar.double()
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)  # [B, C, Y, X]
            self._kl, self._cells = self._kl + kl.sum((0, 2, 3)).cpu(), self._cells + kl[:, 0].numel()

    def uses(self) -> list[ChannelUse]:
        mean = self._sum / self._count
        deviation = (self._square / self._count - mean.square()).clamp_min(0).sqrt()
        kl = [value / self._cells for value in self._kl.tolist()] if self._cells else []
        each = len(mean) // len(kl) if kl else 1  # entries of a token that one latent channel fills, the slowest axis
        rows = [
            ChannelUse(str(c), m, d, kl[c // each] if kl else None)
            for c, (m, d) in enumerate(zip(mean.tolist(), deviation.tolist(), strict=True))
        ]
        whole = float((self._square.mean() / self._count - mean.mean().square()).clamp_min(0).sqrt())
        return [*rows, ChannelUse("all", float(mean.mean()), whole, sum(kl) if kl else None)]


def _shown(u: CodeUse) -> list[str]:
    return [f"{u.used:.1%}", f"{u.dead:,}", f"{u.perplexity:,.1f}", f"{u.normalised:.1%}", f"{u.bits:.2f}"]


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _quality(found: dict[str, float]) -> list[tuple[str, float, int]]:
    return [("dB PSNR" if name == "PSNR" else name, value, 2 if name == "PSNR" else 3) for name, value in found.items()]
