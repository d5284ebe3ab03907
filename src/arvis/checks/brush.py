"""brush paints what it is asked for: the model in the box, as it ships, in about half a minute.

The claims: sampling with the cache is the model that was trained; its tokenizer shows the emoji world; pictures are
more likely under their own names than under others; and what it paints is nearest to the picture of that name, which it
is not when no name is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arvis import load
from arvis.checks.claims import Claim, OnStep, at_least, at_most
from arvis.checks.mutants import forget_scales, zero_head
from arvis.data.emoji import Emoji, load_emoji
from arvis.data.images import to_bytes, to_network
from arvis.evaluation.emoji import Nearest
from arvis.evaluation.metrics import psnr
from arvis.noise import Noise
from arvis.walk import finish, generate

NAMES = 48


def train(on_step: OnStep) -> Any:
    """The shipped model: nothing is trained here."""
    return load("brush").system


@torch.inference_mode()
def examine(system: Any) -> list[Claim]:
    world = load_emoji(64).split("train")
    chosen = Noise.of(1).uniform("check", 0, (len(world),))[0].argsort()[:NAMES]
    images, names = world.all_images()[chosen], [world.rows[i].name for i in chosen.tolist()]
    return [
        cached(system, names[:4]),
        shown(system, images),
        named(system, images, names),
        *painted(system, world, names),
    ]


def cached(system: Any, names: list[str]) -> Claim:
    """Logits of a sampled sequence, step by step over the cache, against one masked pass over the same tokens."""
    cond = system.prepare({"prompt": names})
    s, logits = system.start(cond, system.Sampling.plain(), Noise.of(2, len(names))), []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits)
        system.commit(s, d, d.sample(s.noise))
    gap = (torch.cat(logits, 1) - system.teacher(s.tokens, cond).logits).abs().max()
    return at_most("largest difference of cached and one-pass logits", float(gap), 1e-3)


def shown(system: Any, images: Tensor) -> Claim:
    tokens = system.tokenizer.encode(to_network(images))
    return at_least(
        "PSNR of reconstructions, dB", float(psnr(images, to_bytes(system.tokenizer.decode(tokens))).mean()), 21
    )


def named(system: Any, images: Tensor, names: list[str]) -> Claim:
    """How much worse pictures are predicted under the name of another."""
    tokens = system.tokenizer.encode(to_network(images))
    own, other = (
        system.teacher(tokens, system.prepare({"prompt": prompts})).log_prob(tokens).mean()
        for prompts in (names, names[1:] + names[:1])
    )
    return at_least("nats per token by which another name is worse", float(own - other), 0.5)


def painted(system: Any, world: Emoji, names: list[str]) -> list[Claim]:
    """Retrieval: is the painted picture nearest to the one of its name."""
    everything = load_emoji(64)
    nearest, wanted = Nearest(everything), torch.tensor([everything.find(name) for name in names])
    sampling = system.Sampling(cfg_scale=3.0, top_k=100, top_p=0.9)

    def share(prompts: list[str]) -> float:
        s = finish(generate(system, system.prepare({"prompt": prompts}), sampling, Noise.of(3, len(prompts))))
        found = nearest(to_bytes(system.tokenizer.decode(s.tokens, s.layout)))[:, 0]
        return float(nearest.same(found, wanted).float().mean())

    return [
        at_least("share of names whose picture is painted", share(names), 0.5),
        at_most("the same without names", share([""] * len(names)), 0.1),
    ]


# -- broken on purpose ------------------------------------------------------------------------------------------------


def ignore_words(system: Any) -> None:
    """Every word is the same."""
    system.transformer.conditioner.encoder.piece.weight.data.fill_(0.1)


def shuffle_codebook(system: Any) -> None:
    """Every token stands for another code."""
    table = system.tokenizer.quantize.embedding.weight.data
    system.tokenizer.quantize.embedding.weight.data = table.roll(1, 0)


def drop_scale(system: Any) -> None:
    """The coarsest scale adds nothing."""
    accumulate = system.tokenizer.accumulate_soft
    system.tokenizer.accumulate_soft = lambda f, h, k, layout: f if k == 0 else accumulate(f, h, k, layout)


MUTANTS: dict[str, Callable[[Any], None]] = {
    "zeroed head": zero_head,
    "ignored words": ignore_words,
    "forgotten cache": forget_scales,
    "shuffled codebook": shuffle_codebook,
    "dropped scale": drop_scale,
}
