"""Confidence decoding against a recording: MaskGIT's loop and order, with a table in the place of the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from arvis.denoise import Watch
from arvis.dist import Guess, pinned
from arvis.nn.prefix import Prefix
from arvis.noise import Recorded, Source
from arvis.orders import hidden_counts, schedule
from arvis.parity.harness import Fixture, ParityError
from arvis.state import Cond, State
from arvis.systems.maskgit import MaskGIT, MaskGITSampling
from arvis.tokens import Layout, Pin, Space
from arvis.walk import walk
from arvis.weights import Key

RECORDINGS = ("maskgit-decode",)

_SCHEDULES = {"linear": "uniform", "square": "pow2", "cubic": "pow3", "sqrt": "pow0.5"}
"""Names of the paper that the official code writes otherwise."""


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes, schedule and number of unknown codes."""
    given, io, weights = fixture.runs["decode"], fixture.io, fixture.weights("logits_function")
    table = Table(fixture.model("logits_function"), weights["A"], weights["W"])
    start = io["start_ids"][..., None]
    known = start[..., 0] != table.mask_id
    for name, found in (("batch", len(start)), ("num_unknown", int((~known).sum(1).max()))):
        if given[name] != found:
            raise ValueError(f"the recording says {name} = {given[name]}, its start_ids have {found}")
    u = (-(-io["choice_gumbel"].double()).exp()).exp()  # Gumbel noise is -log(-log u)
    noise = Recorded({"rank": list(u)}, {}, len(start))
    name: str = given["mask_schedule"]
    sampling = MaskGITSampling(
        steps=given["steps"], schedule=_SCHEDULES.get(name, name), choice_temperature=given["choice_temperature"]
    )
    system = _system(table)
    s = system.start(None, sampling, noise, given=Pin(known, start))
    if (given["min_fixed"], given["min_masked"]) != (1, 1):
        s.more["hidden"] = hidden_counts(
            (~known).sum(1), s.K, schedule(sampling.schedule), given["min_fixed"], given["min_masked"]
        )
    recorded: Any = Followed(system, io["token_gumbel"])
    for _ in walk(recorded, s):
        pass
    again = torch.stack(recorded.again)
    yield "sampled_ids_per_step", torch.stack(recorded.sampled)
    yield "mask_after_step", again.long()
    yield "masked_count_per_step", again.sum(2)[:, 0]
    yield "final_ids", s.tokens[..., 0]


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """There is none: the official weights are JAX files, which have no key layout here."""
    raise ParityError(f"the official weights are JAX files, and no layout of them is known; got {layout.get('slug')!r}")


class Table(nn.Module):
    """logits [b, i] = A[i] + m mean_j W[id[b, j]] + s W[id[b, i]], in the place of the transformer."""

    def __init__(self, values: Mapping[str, Any], A: Tensor, W: Tensor) -> None:
        super().__init__()
        self.layout, self.codes, self.mask_id = Layout(((values["seq_len"],),)), values["num_codes"], values["mask_id"]
        self.mean_weight, self.self_weight = values["mean_weight"], values["self_weight"]
        self.bias, self.W = nn.Parameter(A), nn.Parameter(W)

    def conditioner(self, cond: Cond | None, null_B: Tensor) -> Prefix:
        return Prefix(self.bias.new_zeros(len(null_B), 0, 1))

    def forward(self, tokens_BN1: Tensor, known_BN: Tensor, prefix_RTD: Tensor) -> Tensor:
        w = self.W[torch.where(known_BN, tokens_BN1[..., 0], self.mask_id)]
        return self.bias + self.mean_weight * w.mean(1, keepdim=True) + self.self_weight * w


def _system(table: Table) -> MaskGIT:
    tokenizer: Any = SimpleNamespace(space=Space(sizes=(table.codes,)), layout=lambda: table.layout)
    transformer: Any = table
    return MaskGIT(tokenizer, transformer)


@dataclass
class Gumbel:
    """Guesses that are drawn as the recording draws them: the largest of logits plus given Gumbel noise."""

    guess: Guess
    noise_BNV: Tensor

    def __post_init__(self) -> None:
        self.where, self.at = self.guess.where, self.guess.at

    def sample(self, noise: Source, pin: Pin | None = None, watch: Watch | None = None) -> Tensor:
        return pinned((self.guess.logits + self.noise_BNV[:, :, None]).argmax(-1), pin)

    def log_prob(self, x_BnS: Tensor) -> Tensor:
        return self.guess.log_prob(x_BnS)


@dataclass
class Followed:
    """The system with that way to draw; notes the sequences before re-masking, and what is masked again."""

    system: MaskGIT
    token_gumbel: Tensor
    sampled: list[Tensor] = field(default_factory=list)
    again: list[Tensor] = field(default_factory=list)

    def predict(self, s: State) -> Gumbel:
        return Gumbel(self.system.predict(s), self.token_gumbel[s.at()])

    def commit(self, s: State, d: Gumbel, x_BnS: Tensor) -> None:
        self.sampled.append(torch.where(s.known, s.tokens[..., 0], x_BnS[..., 0]))
        self.again.append(self.system.masked_again(s, d.guess, x_BnS))
        self.system.commit(s, d.guess, x_BnS)
