"""TTS-VAR: what a search over paths costs at the official schedule, and what it finds here at equal cost."""

from __future__ import annotations

import torch

import arvis
from arvis.data.emoji import load_emoji
from arvis.data.images import to_tensor
from arvis.rewards import Reward, reward
from arvis.systems import preset
from arvis.systems.tts_var import PathSearch, TTSVARConfig, best_of, schedule
from arvis.tokens import Layout
from benchmarks.effects import Effect


def official() -> Layout:
    """The thirteen scales of Infinity at one megapixel."""
    _, _, found = preset("infinity-2b")
    return Layout(found.config().tokenizer.scales)


def counted() -> list[Effect]:
    layout, plan = official(), TTSVARConfig()
    coarse = layout.offsets[7] / layout.n
    return [
        Effect(
            quantity="token passes of the official search with 8 paths over those of one picture, 1M pixels",
            value=plan.cost(layout) / layout.n,
            unit="x",
            how="counted",
            note="the best of 2 pictures costs 2; decoding for the reward is not counted",
        ),
        Effect(
            quantity="part of a picture's tokens that lie in the scales where more than two paths run, 1M pixels",
            value=coarse,
            unit="",
            how="counted",
            note="the first 7 of 13 scales",
        ),
        Effect(
            quantity="the same over VAR's ten scales of 256 pixels",
            value=schedule(len(VAR_SIDES)).cost(Layout(tuple((n, n) for n in VAR_SIDES)))
            / sum(n * n for n in VAR_SIDES),
            unit="x",
            how="counted",
        ),
    ]


VAR_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class Red:
    """How much more red than other colours: decided by coarse scales."""

    def __call__(self, image: torch.Tensor, asked: object) -> torch.Tensor:
        x = (image.double() + 1) / 2 if image.is_floating_point() else image.double() / 255
        return (x[:, 0] - x[:, 1:].mean(1)).clamp_min(0).mean((1, 2))


def found(model: arvis.Model, prompts: list[str], judge: Reward, plan: TTSVARConfig) -> torch.Tensor:
    """Rewards of one picture of each prompt, each the best of a search."""
    pictures = [model.generate(p, seed=i, search=PathSearch(judge, plan))[0] for i, p in enumerate(prompts)]
    return judge(torch.stack([to_tensor(p) for p in pictures]), prompts)


def measured(items: int = 24) -> list[Effect]:
    """Mean rewards of the model in the box at about five pictures' token passes: a search, the best of whole ones."""
    model = arvis.load("brush", fast=True)
    scales, size = model.layout.K, model.layout.n
    early = TTSVARConfig(paths=(24, 24, 2, 2, 2), cluster=(), resample=(2,), strength=200.0)
    held = [row.name for row in load_emoji(64).split("heldout").rows][:items]
    cases = (
        ("red, without a prompt", [""] * items, Red(), early),
        ("nearness to the true picture, held-out names", held, reward("picture"), schedule(scales, 16)),
    )
    out = []
    for name, prompts, judge, plan in cases:
        cost = plan.cost(model.layout) / size
        ours, theirs, one = (
            found(model, prompts, judge, p) for p in (plan, best_of(round(cost), scales), best_of(1, scales))
        )
        gain, note = (
            ours - theirs,
            f"{items} pictures of 64 pixels, {cost:.1f} pictures' token passes, paths {plan.paths}",
        )
        for what, value in (
            ("one picture", one.mean()),
            (f"the best of {round(cost)}", theirs.mean()),
            ("a search", ours.mean()),
        ):
            out.append(
                Effect(quantity=f"reward ({name}): {what}", value=float(value), unit="", how="measured", note=note)
            )
        error = float(gain.std()) / items**0.5
        out.append(
            Effect(
                quantity=f"reward ({name}): a search less the best of {round(cost)}",
                value=float(gain.mean()),
                unit="",
                how="measured",
                published="better than best-of-N",
                note=f"standard error {error:.4f}",
            )
        )
    return out
