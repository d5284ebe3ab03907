"""Next-token prediction: a prefix of condition rows, then one row per code, in raster order, under one causal trunk.

The row of step t helps to predict token t: prefix rows have steps 1 - T..0, and token j has step j + 1. The row of step
t lies in slot t + T - 1 of the cache and at that row of the position table. Items may stand at different steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.dist import Categorical, Dist
from arvis.nn.cache import Cache
from arvis.nn.compiled import CompiledStep
from arvis.nn.prefix import Prefix, Prefixer
from arvis.nn.trunk import Call, Trunk
from arvis.noise import Source
from arvis.orders import raster
from arvis.rows import Rows, See, depths, lone_tags, render, tree, tree_tags
from arvis.sampling import mix, nucleus, per_item, temper, top_k
from arvis.state import Cond, State
from arvis.tokens import NEVER, Layout, Pin, Space

Knobs = dict[str, Tensor]

Positions = Callable[[Layout, int], Tensor]
"""(layout, prefix rows T) -> rotary table [1, T + N, h/2, 2]."""

Weigh = Callable[[Any, int, int], Tensor]
"""(sampling settings, items, steps K) -> guidance weights [B, K, G] over the condition and, from two rows on, none."""

Narrow = Callable[[Tensor, Knobs], Tensor]
"""(guided logits [B, n, S, V], settings [B] by name) -> logits, -inf for what is not drawn."""


class TokenTransformer(nn.Module):
    """The network: rows of the condition and of codes, a trunk, the last norm, a linear head.

    The conditioner, the blocks and the norm are given. `positions` makes the rotary table of a layout; `dropout` is
    that of the input rows.
    """

    def __init__(
        self,
        conditioner: Prefixer,
        trunk: Trunk,
        norm: nn.Module,
        *,
        codes: int,
        width: int,
        positions: Positions,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conditioner: Prefixer = conditioner
        self.embedding = nn.Embedding(codes, width)
        self.dropout = nn.Dropout(dropout)
        self.trunk, self.norm = trunk, norm
        self.output = nn.Linear(width, codes, bias=False)
        self.positions = positions

    def table(self, layout: Layout) -> Tensor:
        """The rotary table of all rows of a layout, on the host, at least float32."""
        dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        return self.positions(layout, self.conditioner.length).to(dtype)

    def forward(self, x_RD: Tensor, call: Call) -> Tensor:
        """Hidden rows after the last norm."""
        return self.norm(self.trunk(self.dropout(x_RD), call))

    def head(self, h_RD: Tensor) -> Tensor:
        """Logits [..., V], at least float32."""
        logits = self.output(h_RD)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def init_weights(self, std: float = 0.02) -> None:
        """Normal weights of one size everywhere, and a head of zeros: at first every code is as likely."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output.weight)


class NextToken(nn.Module):
    """The verbs over one code per step. `see` is the visibility between steps; draft trees need `tree` in it.

    `sampling` is the dataclass of settings, which `weigh` makes guidance weights of; `narrow` filters guided logits by
    the settings named in `knobs`. In training conditions are dropped with probability `drop`.
    """

    Sampling: ClassVar[type]

    def __init__(
        self,
        tokenizer: Any,
        transformer: TokenTransformer,
        sampling: type,
        *,
        weigh: Weigh,
        narrow: Narrow,
        knobs: tuple[str, ...],
        see: See = tree,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokenizer, self.transformer = tokenizer, transformer
        vars(self)["Sampling"] = sampling  # to the protocol a variable of the class, here one of each object
        self.weigh, self.narrow, self.knobs, self.see, self.drop = weigh, narrow, knobs, see, drop
        self.space: Space = tokenizer.space
        self._compiled: CompiledStep | None = None

    def compile_step(self) -> None:
        """From now on the steps of a generation run as one compiled graph; `CompiledStep` says the rest."""
        self._compiled = CompiledStep(self.transformer, whole=self.transformer.embedding.weight.is_cuda)

    def parts(self) -> dict[str, nn.Module]:
        """The parts that official files hold."""
        return {"tokenizer": self.tokenizer, "transformer": self.transformer}

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names that `prepare` reads in a request."""
        return self.transformer.conditioner.conditions

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self.transformer.conditioner.prepare(request)

    @property
    def _lead(self) -> int:
        """Rows of the prefix."""
        return self.transformer.conditioner.length

    def _layout(self, layout: Layout | None) -> Layout:
        return self.tokenizer.layout() if layout is None else layout

    # -- the three verbs ------------------------------------------------------------------------------------------

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        items, layout = len(noise), self._layout(layout)
        device = self.transformer.embedding.weight.device
        weights = self.weigh(sampling, items, layout.n)
        # a CPU attends with single queries several times as fast in float32 as in bfloat16
        wide = torch.float32 if device.type == "cpu" else None
        null = torch.zeros(items, dtype=torch.bool, device=device)
        prefixes = [self.transformer.conditioner(cond, null | u) for u in (False, True)[: weights.shape[-1]]]
        more = {"prefix": torch.stack([p.rows for p in prefixes], 1)}
        if prefixes[0].visible is not None:
            more["lone"] = lone_tags(~prefixes[0].visible).cpu()
        s = State(
            tokens=torch.zeros(items, layout.n, 1, dtype=torch.int64, device=device),
            group=raster(layout).to(device).expand(items, -1).clone(),
            k=torch.zeros(items, dtype=torch.int64),
            K=layout.n,
            noise=noise,
            layout=layout,
            cond=cond or {},
            weights=weights,
            knobs={name: per_item(getattr(sampling, name), items) for name in self.knobs},
            given=given,
            cache={"trunk": Cache(items, self._lead + layout.n - 1, wide)},
            more=more,
            ragged=True,
        )
        if given is not None:  # the next predict feeds leading given tokens in one pass
            s.k = given.mask.long().cumprod(1).sum(1).cpu()
            s.tokens = torch.where(s.known[..., None], given.value, s.tokens)
        return s

    def predict(self, s: State) -> Categorical:
        cache, k = s.cache["trunk"], s.k.clamp(max=s.K - 1)
        cache.forget(k)
        first = cache.filled + 1 - self._lead  # the step of the first row that is not cached
        step = first[:, None] + torch.arange(int((k - first).max()) + 1)
        own = step <= k[:, None]
        x = self._rows(s, step)
        slot = step + self._lead - 1
        h = self._feed(s, x, slot, slot, Rows.of(torch.where(own, step, NEVER), self._tags(s, step)))
        last = (k - first).to(h.device)[:, None, None, None].expand(-1, h.shape[1], 1, h.shape[3])
        return Categorical(k[:, None].to(h.device), self._logits(s, h.gather(2, last), k[:, None])[:, :, None], at=s.k)

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        self._append(s, x_BnS[..., 0], torch.ones_like(s.k))

    def _append(self, s: State, tokens_BQ: Tensor, count_B: Tensor) -> None:
        """Write the first count tokens of each item at its own end, as far as there is room."""
        for q, token_B in enumerate(tokens_BQ.to(s.tokens).unbind(1)):
            at = (s.k + q).clamp(max=s.K - 1).to(token_B.device)[:, None, None]
            live = ((q < count_B) & (s.k + q < s.K)).to(token_B.device)[:, None, None]
            s.tokens.scatter_(1, at, torch.where(live, token_B[:, None, None], s.tokens.gather(1, at)))
        s.k = (s.k + count_B).clamp(max=s.K)

    # -- rows -----------------------------------------------------------------------------------------------------

    def _rows(self, s: State, step_BR: Tensor) -> Tensor:
        """Input rows [B, G, R, D] of steps: those of the prefix, and from step 1 on that of the token before."""
        prefix = s.more["prefix"]
        token = (step_BR - 1).clamp(0, s.K - 1).to(s.tokens.device)
        x = self.transformer.embedding(s.tokens[..., 0].gather(1, token))[:, None].expand(-1, prefix.shape[1], -1, -1)
        if bool((step_BR > 0).all()):
            return x
        at = (step_BR + self._lead - 1).clamp(0, self._lead - 1).to(x.device)[:, None, :, None]
        lead = prefix.gather(2, at.expand(-1, prefix.shape[1], -1, prefix.shape[3]))
        return torch.where((step_BR > 0)[:, None, :, None].to(x.device), x, lead)

    def _tags(self, s: State, step_BR: Tensor) -> Tensor:
        """Tags of the rows of steps: 0 but for the padding of the prefix."""
        if "lone" not in s.more:
            return torch.zeros_like(step_BR)
        lone = s.more["lone"].gather(1, (step_BR + self._lead - 1).clamp(0, self._lead - 1))
        return torch.where(step_BR > 0, 0, lone)

    def _feed(self, s: State, x_BGRD: Tensor, place_BR: Tensor, slot_BR: Tensor, rows: Rows) -> Tensor:
        """Hidden rows [B, G, R, D] of rows at places of the position table, which take slots of the cache."""
        cache = s.cache["trunk"]
        cache.reserve(int(slot_BR.max()) + 1)
        side_by_side = bool((slot_BR == cache.end + torch.arange(slot_BR.shape[1])).all())
        mask = cache.place(self.see, rows, at=None if side_by_side else slot_BR)
        table = self.transformer.table(s.layout)
        place = place_BR[:1] if bool((place_BR == place_BR[:1]).all()) else place_BR
        table = table[0, place.clamp(max=table.shape[1] - 1)]
        net = self._compiled or self.transformer
        h = net(x_BGRD.flatten(0, 1), Call(mask=mask, table=table, cache=cache))
        return h.unflatten(0, x_BGRD.shape[:2])

    def _logits(self, s: State, h_BGRD: Tensor, step_BR: Tensor) -> Tensor:
        """Guided, narrowed logits [B, R, V] of rows of steps."""
        logits = mix(self.transformer.head(h_BGRD), s.weight(step_BR))
        return self.narrow(logits[:, :, None], s.knobs)[:, :, 0]

    # -- windows of drafts ----------------------------------------------------------------------------------------

    def window(self, s: State, drafts_BL: Tensor, parent_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        items, count = drafts_BL.shape
        cache, lead = s.cache["trunk"], self._lead
        cache.forget(s.k)
        if bool((cache.filled < s.k + lead - 1).any()):
            self.predict(s)  # feeds what is pending; the row of step k comes again below
            cache.forget(s.k)
        if parent_BL is None:
            parent_BL = torch.arange(-1, count - 1).expand(items, -1)
        step = s.k[:, None] + F.pad(depths(parent_BL), (1, 0))
        tag = torch.cat((self._tags(s, s.k[:, None]), tree_tags(parent_BL)), 1)
        root = self._rows(s, s.k[:, None])
        drafts = self.transformer.embedding(drafts_BL.to(root.device))[:, None].expand(-1, root.shape[1], -1, -1)
        slot = (s.k + lead - 1)[:, None] + torch.arange(count + 1)
        h = self._feed(s, torch.cat((root, drafts), 2), step + lead - 1, slot, Rows.of(step, tag))
        return Categorical(step, self._logits(s, h, step)).probs, h

    def keep(self, s: State, path_BP: Tensor, tokens_BQ: Tensor) -> None:
        s.cache["trunk"].keep(s.k + self._lead, path_BP)
        self._append(s, tokens_BQ, (path_BP >= 0).sum(1) + 1)

    # -- one pass -------------------------------------------------------------------------------------------------

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Categorical:
        """The distribution of every token given the true ones before it, logits [B, N, 1, V]."""
        null = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        h = self.hidden(tokens, self.transformer.conditioner(cond, null), self._layout(layout))
        return Categorical(torch.arange(h.shape[1])[None], self.transformer.head(h)[:, :, None])

    def hidden(self, tokens: Tensor, prefix: Prefix, layout: Layout) -> Tensor:
        """The hidden rows [B, N, D] that predict the tokens [B, N, 1], all in one pass; the last token is not read.

        Leading rows of the prefix that are padding in every item are left out: nothing sees them."""
        (lead_rows, visible), spare = prefix, 0
        if visible is not None:
            spare = min(int((~visible).all(0).long().cumprod(0).sum()), self._lead - 1)
            lead_rows, visible = lead_rows[:, spare:], visible[:, spare:]
        lead = self._lead - spare
        x = torch.cat((lead_rows, self.transformer.embedding(tokens[:, :-1, 0])), 1)
        if visible is None or bool(visible.all()):
            mask = _causal(self.see, lead, layout.n)
        else:
            step = torch.arange(1 - lead, layout.n, dtype=torch.int32, device=x.device)[None]
            rows = Rows(step, F.pad(lone_tags(~visible), (0, layout.n - 1)))
            mask = render(self.see, rows, rows)
        h = self.transformer(x, Call(mask=mask, table=self.transformer.table(layout)[:, spare:-1]))
        return h[:, lead - 1 :]

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """Mean cross-entropy of the tokens in nats; conditions are dropped with probability `drop`.

        batch: "tokens" [B, N, 1], or "image" [B, 3, Y, X] in [-1, 1] to be encoded; and the conditions. With "valid"
        [B] the mean is over the items where it is 1 (0: a broken sample).
        """
        layout = self.tokenizer.layout()
        tokens = batch["tokens"] if "tokens" in batch else self.latents(batch["image"])["tokens"]
        null = noise.uniform("drop", 0, ()).to(tokens.device) < self.drop
        h = self.hidden(tokens, self.transformer.conditioner(self.prepare(batch), null), layout)
        logits = self.transformer.head(h)
        nats_B = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(len(tokens), -1).mean(1)
        valid_B = torch.as_tensor(batch.get("valid", torch.ones(len(tokens)))).to(nats_B)
        hit_B = (logits.detach().argmax(-1) == tokens[..., 0]).to(nats_B).mean(1)
        nats, accuracy = ((x * valid_B).sum() / valid_B.sum().clamp_min(1) for x in (nats_B, hit_B))
        return {"loss": nats, "accuracy": accuracy}

    @torch.no_grad()
    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """What stands for pictures [B, 3, Y, X] in a batch: their tokens."""
        return {"tokens": self.tokenizer.encode(image, self.tokenizer.layout())}


@lru_cache(maxsize=16)
def _causal(see: See, lead: int, n: int) -> Tensor | None:
    """The mask of one pass over a prefix without padding and n - 1 tokens."""
    with torch.inference_mode(False):  # kept masks also serve training
        rows = Rows.of(torch.arange(1 - lead, n, device="cpu"))
        return render(see, rows, rows)


def cfg_until(scale: Tensor, decodes: Tensor, steps: int) -> Tensor:
    """Guidance weights [B, steps, 1 or 2] of scales [B]: a single row where no scale is above 1.

    The first step and `decodes` [B] + 1 further ones are guided, later ones take the condition alone; -1: all are."""
    guided = (scale > 1)[:, None] & ((decodes < 0)[:, None] | (torch.arange(steps) <= decodes[:, None] + 1))
    if not bool((scale > 1).any()):
        return torch.ones(len(scale), steps, 1, dtype=scale.dtype)
    scale = torch.where(guided, scale[:, None], 1.0)
    return torch.stack((scale, 1 - scale), -1)


def temper_k_p(logits: Tensor, knobs: Knobs) -> Tensor:
    """Temperature, the k most likely codes, then their nucleus."""
    return nucleus(top_k(temper(logits, knobs["temperature"]), knobs["top_k"]), knobs["top_p"])
