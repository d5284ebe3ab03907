"""MVAR learns to draw digits on 8x8 cells: 1,500 real ones, both stages, some minutes on one core.

The claims: windows are those of the rule at every border, and reach as far as the layers take them; scales are
independent of each other; learning segments of them in turn is worth learning all at once; nothing is cached and the
pairs are those of the rule; the class is what is drawn; the official sizes have the official numbers of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, sizes
from arvis.checks.digits import CLASSES, Digits, digits, drawn, learn_pictures, learn_tokens
from arvis.checks.mutants import ignore_class, ignore_rule, look, of_system, swap_guidance, zero_head
from arvis.nn.adaln import SelfAttention
from arvis.nn.attention import attend
from arvis.nn.neighbourhood import InsideScales
from arvis.nn.trunk import Call
from arvis.noise import Noise
from arvis.rows import render
from arvis.systems.mvar import MVAR, PRESETS, MVARConfig, MVARSampling, VARConfig, build
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.training.fit_config import FitConfig
from arvis.walk import finish, generate

PARAMETERS = {"mvar-d16": 310_283_520, "mvar-finetune-d20": 600_917_136, "mvar-finetune-d24": 1_033_399_360}
"""Of the official transformers."""

REFINE, KERNEL = 4, 3


@dataclass
class Trained:
    """What is examined, and the nats per token on unseen digits of a twin that learned all segments at once."""

    system: MVAR
    twin: float
    digits: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of the tokenizer, and how often each segment is learned."""

    tokenizer: int = 300
    visits: int = 150


def config() -> MVARConfig:
    """32x32 pixels, 8x8 cells at the last of six scales: 130 tokens; 3x3 windows in the last two."""
    cnn = CNNConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=16)
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 3, 4, 6, 8), vocab_size=128, z_channels=16, cnn=cnn)
    scale = VARConfig(tokenizer=tokenizer, depth=2, width=128, heads=4, num_classes=CLASSES)
    return MVARConfig(scale=scale, kernel_size=KERNEL, refine_step=REFINE, ratio_k=1)


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """The tokenizer; on its tokens the segments in turn, and with the same first weights all at once."""
    data = digits() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = build(config())
        torch.manual_seed(0)
        twin = build(config())
    learn_pictures(system.tokenizer, data, length.tokenizer, on_step)
    twin.tokenizer.load_state_dict(system.tokenizer.state_dict())
    tokens = system.tokenizer.encode(data.images)
    settings = FitConfig(steps=length.visits, batch=32, lr=2e-3, schedule="constant", precision="float32")
    in_turn = replace(settings, steps=length.visits * len(system.segments))
    learn_tokens(system.transformer, system.loss, tokens, data, in_turn, on_step)

    def all_at_once(batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        return twin.loss({name: x for name, x in batch.items() if name != "step"}, noise)

    learn_tokens(twin.transformer, all_at_once, tokens, data, settings, on_step)
    return Trained(system.eval(), unseen(twin.eval(), data), data)


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's conditions, in its order."""
    system, data = trained.system, trained.digits
    return [
        *windows(system),
        reach(system),
        independent(system, data),
        at_most("nats per token of test digits, over those of learning all at once", _over(trained), 1.05),
        *economical(system),
        conditioned(system, data),
        recognised(system, data),
        *parameters(),
    ]


def _over(trained: Trained) -> float:
    return unseen(trained.system, trained.digits) / trained.twin


def window(side: int) -> Tensor:
    """Which cells of a grid each cell sees, bool [n, n], cell by cell."""
    seen = torch.zeros(side, side, side, side, dtype=torch.bool)
    for y in range(side):
        for x in range(side):
            top, left = (min(max(at, KERNEL // 2), side - 1 - KERNEL // 2) - KERNEL // 2 for at in (y, x))
            seen[y, x, top : top + KERNEL, left : left + KERNEL] = True
    return seen.view(side * side, side * side)


def windows(system: MVAR) -> list[Claim]:
    """What each layer looks at in a large scale, against dense attention under the windows."""
    layout, worst = system.tokenizer.layout(), 0.0
    for k in range(REFINE, layout.K):
        q, key, v = (Noise.of(i, 2).normal("x", k, (4, layout.sizes[k], 32)).float() for i in range(3))
        rows = system.transformer.rows(k)
        wanted = attend(q, key, v, window(layout.levels[k][0])[None, None], 1.0)
        for part in _attentions(system):
            found = part.look(q, key, v, Call(mask=render(system.see, rows, rows), rows=rows), 1.0)
            worst = max(worst, float((found - wanted).abs().max()))
    keys = {int(n) for k in range(REFINE, layout.K) for n in _seen(system, k).sum(1)}
    return [
        at_most("largest difference of windows and dense attention under them", worst, 1e-5),
        exactly("cells that a cell sees", max(keys) if len(keys) == 1 else -1, KERNEL**2),
    ]


def _attentions(system: MVAR) -> list[SelfAttention]:
    return [part for part in system.transformer.modules() if isinstance(part, SelfAttention)]


def _seen(system: MVAR, *scales: int) -> Tensor:
    rows = system.transformer.rows(*scales)
    seen = render(system.see, rows, rows)
    return torch.ones(rows.count, rows.count, dtype=torch.bool) if seen is None else seen[0, 0]


def reach(system: MVAR) -> Claim:
    """Pairs of cells of the last scale where an input moves a logit and no path of windows leads there, or the other
    way round."""
    layout, wrong = system.tokenizer.layout(), 0
    k, side = layout.K - 1, layout.levels[-1][0]
    steps = torch.linalg.matrix_power(window(side).double(), len(system.transformer.trunk)) > 0
    c = system.transformer.conditioner({"class_labels": torch.tensor([3])}, torch.zeros(1, dtype=torch.bool))
    x = Noise.of(8, 1).normal("x", 0, (side * side, system.tokenizer.channels)).float()
    base = system.transformer(c, x, k, k + 1, system.see)
    for cell in range(side * side):
        moved = x.clone()
        moved[:, cell] += 1
        changed = (system.transformer(c, moved, k, k + 1, system.see) - base).abs().amax((0, 2)) > 0
        wrong += int((changed != steps[:, cell]).sum())
    return exactly("pairs of cells that reach each other and should not, or the other way round", wrong, 0)


def independent(system: MVAR, data: Digits) -> Claim:
    """Logits of one pass over all scales, against a pass for each scale alone."""
    layout, transformer = system.tokenizer.layout(), system.transformer
    tokens, cond = system.tokenizer.encode(data.test_images[:32]), {"class_labels": data.test_labels[:32]}
    c, logits = transformer.conditioner(cond, torch.zeros(32, dtype=torch.bool)), []
    for k in range(layout.K):
        x = system.tokenizer.inputs(tokens, layout, k, k + 1) if k else None
        logits.append(transformer.head(transformer(c, x, k, k + 1, system.see), c.vector))
    gap = (torch.cat(logits, 1) - system.teacher(tokens, cond).logits[:, :, 0]).abs().max()
    return at_most("largest difference of one-pass and scale-by-scale logits", float(gap), 1e-4)


def unseen(system: MVAR, data: Digits, shift: int = 0) -> float:
    """Nats per token of test digits under their labels, or others."""
    with torch.no_grad():
        tokens = system.tokenizer.encode(data.test_images)
        cond = system.prepare({"class_labels": (data.test_labels + shift) % CLASSES})
        return -float(system.teacher(tokens, cond).log_prob(tokens).double().mean())


def economical(system: MVAR) -> list[Claim]:
    """Pairs that the rule shows, and bytes of keys and values that are kept while sampling."""
    layout = system.tokenizer.layout()
    expected = sum(n * n if k < REFINE else n * KERNEL**2 for k, n in enumerate(layout.sizes))
    s = finish(generate(system, system.prepare({"class_labels": [0]}), MVARSampling(), Noise.of(7, 1)))
    kept = sum(x.numel() * x.element_size() for c in s.cache.values() for x in (*c.k.values(), *c.v.values()))
    return [
        exactly("pairs of rows that see each other", int(_seen(system, *range(layout.K)).sum()), expected),
        exactly("bytes kept from scale to scale", kept, 0),
    ]


def conditioned(system: MVAR, data: Digits) -> Claim:
    """How much worse unseen digits are predicted under wrong labels."""
    cost = unseen(system, data, 1) - unseen(system, data)
    return at_least("nats per token that a wrong class costs on test digits", cost, 0.2)


def recognised(system: MVAR, data: Digits) -> Claim:
    """Drawn digits are taken for their class by their nearest real neighbours."""
    found = drawn(system, data, MVARSampling(cfg_scale=2.0, top_k=0, top_p=0.95))
    return at_least("share of drawn digits recognised as their class", found, 0.8)


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    return sizes(build, PRESETS, PARAMETERS)


# -- broken on purpose ------------------------------------------------------------------------------------------------


def ignore_windows(trained: Trained) -> None:
    """A cell sees the whole of its scale."""
    look(trained.system, InsideScales(trained.system.tokenizer.layout()))


def cut_windows(trained: Trained) -> None:
    """Windows are cut off at borders instead of shifted."""
    layout = trained.system.tokenizer.layout()
    inside = InsideScales(layout, KERNEL, REFINE)

    def cut(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> Tensor:
        runs = call.rows.runs if call.rows is not None else []
        if len(runs) != 1 or runs[0][0] < REFINE:
            return inside(q, k, v, call, scale)
        wide = layout.levels[runs[0][0]][1]
        place = torch.arange(q.shape[2])
        y, x = place // wide, place % wide
        near = ((y[:, None] - y).abs() <= KERNEL // 2) & ((x[:, None] - x).abs() <= KERNEL // 2)
        return attend(q, k, v, near[None, None], scale)

    look(trained.system, cut)


MUTANTS = {
    "zeroed head": of_system(zero_head),
    "ignored condition": of_system(ignore_class),
    "ignored rule": of_system(ignore_rule),
    "whole scales seen": ignore_windows,
    "windows cut at borders": cut_windows,
    "swapped guidance": of_system(swap_guidance),
}
