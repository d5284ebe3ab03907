"""MAR learns to draw digits: 1,500 real ones, both stages and a denoiser for itself, some minutes on one core.

The claims: every token is drawn once, by the cosine schedule; a step reads what is known and nothing else; the denoiser
draws from a distribution and not its mean; without guidance nothing but the condition counts; the class is what is
drawn; latents have unit deviation by themselves; the official sizes have the official numbers of parameters.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, mean
from arvis.checks.digits import CLASSES, Digits, digits, recognised
from arvis.checks.mutants import of_system, swap_guidance
from arvis.data.images import to_bytes
from arvis.denoise import ddpm
from arvis.diffusion import strided
from arvis.evaluation.metrics import psnr
from arvis.nn.mlp_denoiser import MLPDenoiser
from arvis.noise import Noise
from arvis.systems.mar import MAR, PRESETS, MARConfig, MARSampling, build
from arvis.tokenizers.kl import KLConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokens import at
from arvis.training.fit import FitConfig, fit
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss
from arvis.walk import finish, generate, walk

PARAMETERS = {"mar-b": 207_924_768, "mar-l": 478_326_304, "mar-h": 942_403_104}
"""Of the official transformers; the autoencoder has 66,456,019."""

PEAKS = torch.tensor([[[-1.2, 0.9], [0.8, -0.7]], [[0.3, 1.5], [-0.9, 0.2]]])
"""Of the two classes of the denoiser's own task: two equally likely points each, in two channels."""
SPREAD = 0.25


@dataclass
class Trained:
    """What is examined: the system, and a denoiser that has learned two mixtures of two Gaussians."""

    system: MAR
    head: MLPDenoiser
    digits: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of the tokenizer, of the transformer, and of the denoiser alone."""

    tokenizer: int = 300
    transformer: int = 500
    head: int = 3000


def config() -> MARConfig:
    """32x32 pixels, 8x8 tokens of 4 channels."""
    patch = PatchConfig(patch=4, grid=(8, 8), z_channels=4, double_z=True, width=96, refine=8)
    return MARConfig(
        tokenizer=KLConfig(z_channels=4, grid=(8, 8), scale=None, patch=patch),
        width=96,
        depth=2,
        heads=4,
        num_classes=CLASSES,
        buffer=4,
        denoiser_width=96,
        denoiser_depth=2,
        attn_dropout=0.0,
        proj_dropout=0.0,
        diffusion_batch_mul=2,
    )


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """Tokenizer, transformer, denoiser, in run folders that are gone afterwards."""
    data = digits() if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = build(config())
        head = MLPDenoiser(2, 4, 2, 96, 2)
    with tempfile.TemporaryDirectory(prefix="arvis-check-") as folder:
        _train_tokenizer(system, data, length.tokenizer, Path(folder) / "tokenizer", on_step)
        _train_transformer(system, data, length.transformer, Path(folder) / "transformer", on_step)
        _train_head(system, head, length.head, Path(folder) / "head", on_step)
    return Trained(system.eval(), head.eval(), data)


def _settings(steps: int, batch: int, lr: float) -> FitConfig:
    return FitConfig(
        steps=steps, batch=batch, lr=lr, warmup=20, schedule="cosine", final=0.02, clip=3.0, precision="float32"
    )


def _train_tokenizer(system: MAR, data: Digits, steps: int, run: Path, on_step: OnStep) -> None:
    tokenizer, terms = system.tokenizer, TokenizerLossConfig(l1=0.0, l2=1.0, kl=1e-5)
    fit(
        tokenizer,
        lambda batch, noise: tokenizer_loss(tokenizer, batch, noise, terms, updates=batch["step"]),
        lambda step: {"image": data.images[_rows(step, 32, data)]},
        _settings(steps, 32, 2e-3),
        run,
        on_step=lambda info: on_step(),
    )
    tokenizer.eval().requires_grad_(False)


def _train_transformer(system: MAR, data: Digits, steps: int, run: Path, on_step: OnStep) -> None:
    moments = torch.cat([system.latents(part)["moments"] for part in data.images.split(250)])

    def batch(step: int) -> dict[str, Any]:
        rows = _rows(step, 64, data)
        return {"moments": moments[rows], "class_labels": data.labels[rows]}

    fit(system.transformer, system.loss, batch, _settings(steps, 64, 2e-3), run, on_step=lambda info: on_step())


def _train_head(system: MAR, head: MLPDenoiser, steps: int, run: Path, on_step: OnStep) -> None:
    def loss(batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        label, x0 = batch["label"], batch["x"]
        t = (noise.uniform("time", 0, ()) * len(system.diffusion)).long()
        eps = noise.normal("eps", 0, (2,)).float()
        out = head(system.diffusion.noisy(x0, eps, t), t, head.condition(torch.eye(2)[label]))
        return {"loss": sum(term.mean() for term in system.diffusion.terms(out, x0, eps, t))}  # type: ignore[dict-item]

    def batch(step: int) -> dict[str, Any]:
        label = torch.arange(512) % 2
        return {"label": label, "x": mixture(label, Noise.of(step, 512))}

    fit(head, loss, batch, _settings(steps, 512, 2e-3), run, on_step=lambda info: on_step())


def mixture(label: Tensor, noise: Noise) -> Tensor:
    """Draws [B, 2] of the mixtures of their classes."""
    peak = (noise.uniform("peak", 0, ()) < 0.5).long()
    return (PEAKS[label, peak] + SPREAD * noise.normal("spread", 0, (2,))).float()


def _rows(step: int, batch: int, data: Digits) -> Tensor:
    return (Noise.of(1, batch).uniform("rows", step, ()) * len(data.images)).long()


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's five conditions, in its order, and what the tokenizer promises."""
    system, data = trained.system, trained.digits
    return [
        ordered(system),
        *visible(system),
        *calibrated(trained),
        *unguided(system),
        *recognised(system, data, MARSampling(cfg_scale=3.0, num_iter=16, diffusion_steps=25, spacing="strided"), 0.7),
        *autoencoded(system, data),
        *parameters(),
    ]


def ordered(system: MAR) -> Claim:
    """Positions that are not drawn exactly once, and sets whose size is not that of the schedule."""
    n, wrong = system.tokenizer.layout().n, 0
    for steps in (1, 4, 16, n):
        drawn, hidden = torch.zeros(2, n, dtype=torch.int64), n
        s = system.start(None, MARSampling(cfg_scale=1.0, num_iter=steps, diffusion_steps=1), Noise.of(2, 2))
        for k, step in enumerate(walk(system, s)):
            drawn += step.fresh
            left = max(1, min(hidden - 1, math.floor(n * math.cos(math.pi / 2 * (k + 1) / steps))))
            left = 0 if k == steps - 1 else left
            wrong += int((step.fresh.sum(1) != hidden - left).sum())
            hidden = left
        wrong += int((drawn != 1).sum())
    return exactly("positions and sets that break the schedule, over 1, 4, 16 and 64 steps", wrong, 0)


def visible(system: MAR) -> list[Claim]:
    """What z of the next set depends on: other values in hidden positions, another value in a known one."""
    cond = system.prepare({"class_labels": [3, 7]})
    s = system.start(cond, MARSampling(cfg_scale=1.0, num_iter=8), Noise.of(2, 2))
    tokens = Noise.of(3, 2).normal("tokens", 0, (s.layout.n, system.space.S)).float()
    for _ in range(6):
        d = system.predict(s)
        system.commit(s, d, at(tokens, d.where))
    d = system.predict(s)
    x = tokens[:, : d.where.shape[1]].double()
    before = d.field(x, 500)
    spoilt, moved = s.fork(), s.fork()
    spoilt.tokens = torch.where(s.known[..., None], s.tokens, 1e3)
    moved.tokens[torch.arange(2), s.known.float().argmax(1)] += 1
    changed, least = system.predict(spoilt).field(x, 500), system.predict(moved).field(x, 500)
    return [
        exactly("numbers of a prediction that hidden tokens move", int((changed != before).sum()), 0),
        at_least("numbers that one known token moves", mean(least != before), 0.99),
    ]


def calibrated(trained: Trained, count: int = 2000) -> list[Claim]:
    """Samples of the denoiser for one condition against the data it learned: the smallest p of two-sample tests."""
    head, diffusion = trained.head, trained.system.diffusion
    found = []
    for label in range(2):
        c = head.condition(torch.eye(2)[[label]])
        solver = ddpm(diffusion.sub(strided(len(diffusion), 100)))
        drawn = solver(lambda x, t, c=c: head(x, t, c), Noise.of(4 + label), 0, (count, 2), None, None)[0]
        real = mixture(torch.full((count,), label), Noise.of(6 + label, count))
        found += [kolmogorov_smirnov(drawn[:, i], real[:, i].double()) for i in range(2)]
    return [at_least("smallest p of samples of the denoiser against the mixtures it learned", min(found), 0.01)]


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """The asymptotic p-value of the two-sample test."""
    both = torch.cat((a, b)).sort().values
    gap = [torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (a, b)]
    d = float((gap[0] - gap[1]).abs().max()) * math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    return max(0.0, min(1.0, 2 * sum((-1) ** (j - 1) * math.exp(-2 * (j * d) ** 2) for j in range(1, 100))))


def unguided(system: MAR) -> list[Claim]:
    """Guidance 1 against the loop written out for one row per item, bit for bit; and beside an item that is guided."""
    cond, noise = system.prepare({"class_labels": [3, 7]}), Noise.of(5, 2)

    def drawn(scale: Any) -> Tensor:
        sampling = MARSampling(cfg_scale=scale, num_iter=8, diffusion_steps=10, spacing="strided")
        return finish(generate(system, cond, sampling, noise)).tokens

    alone = written_out(system, cond, noise, 8, 10)
    beside = drawn(torch.tensor([1.0, 4.0]))
    return [
        exactly("numbers that differ between guidance 1 and the loop written out", int((drawn(1.0) != alone).sum()), 0),
        at_most("largest difference of an item with guidance 1 beside a guided one", _gap(beside[0], alone[0]), 1e-3),
        at_least("difference that guidance 4 makes", _gap(beside[1], alone[1]), 0.1),
    ]


def written_out(system: MAR, cond: Any, noise: Noise, steps: int, denoising: int) -> Tensor:
    """Tokens [B, N, S] by the unguided loop of the paper, without state, distribution or solver."""
    transformer, n, width = system.transformer, system.tokenizer.layout().n, system.space.width
    diffusion = system.diffusion.sub(strided(len(system.diffusion), denoising))
    order = noise.uniform("order", 0, (n,)).argsort(1)
    buffer = transformer.buffer(cond, torch.zeros(len(noise), dtype=torch.bool))
    tokens, done = torch.zeros(len(noise), n, width), 0
    for k in range(steps):
        left = max(1, min(n - done - 1, math.floor(n * math.cos(math.pi / 2 * (k + 1) / steps))))
        end = n if k == steps - 1 else n - left
        where, wanted = order[:, :done].sort(1).values, order[:, done:end].sort(1).values
        c = transformer.denoiser.condition(transformer(tokens, where, wanted, buffer))
        denoise = transformer.denoiser.along(diffusion.times[::-1], c)
        x = noise.normal("solver", k, (end - done, width))
        for i, t in enumerate(reversed(range(denoising))):
            eps, share = denoise(x, diffusion.times[t]).double().chunk(2, -1)
            x = diffusion.mean(x, diffusion.clean(x, eps, t), t)
            if t > 0:
                deviation = (diffusion.log_variance(share, t) / 2).exp()
                x = x + deviation * noise.normal(f"solver/{i}", k, (end - done, width))
        tokens = tokens.scatter(1, wanted[..., None].expand(-1, -1, width), x.float())
        done = end
    return tokens


def autoencoded(system: MAR, data: Digits) -> list[Claim]:
    """Digits that nobody trained on: how they come back, and how their latents are scaled."""
    tokens = system.tokenizer.encode(data.test_images)
    back = psnr(to_bytes(data.test_images), to_bytes(system.tokenizer.decode(tokens)))
    drawn = system.tokenizer.encode(data.test_images, noise=Noise.of(7, len(tokens)))
    return [
        at_least("PSNR of reconstructed test digits, dB", mean(back), 22.0),
        at_most("how far the deviation of latents is from 1", float((drawn.std() - 1).abs()), 0.15),
    ]


@cache
def parameters() -> tuple[Claim, ...]:
    """The official sizes, counted without memory for them."""
    claims = []
    for name, count in PARAMETERS.items():
        with torch.device("meta"):
            system = build(PRESETS[name].config())
        found = {part: sum(p.numel() for p in module.parameters()) for part, module in system.parts().items()}
        claims.append(exactly(f"parameters of {name}", found["transformer"], count))
    return (*claims, exactly("parameters of the published autoencoder", found["tokenizer"], 66_456_019))


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# -- broken on purpose ------------------------------------------------------------------------------------------------


def zero_head(trained: Trained) -> None:
    """No noise is ever predicted."""
    for head in (trained.system.transformer.denoiser, trained.head):
        head.linear.weight.data.zero_()
        head.linear.bias.data.zero_()


def predict_the_mean(trained: Trained) -> None:
    """The denoiser alone answers with one point per class: the noise that leads to the mean of the data."""
    diffusion = trained.system.diffusion

    def forward(x: Tensor, t: float | Tensor, c: Tensor) -> Tensor:
        near = [(c - trained.head.condition(row)).abs().max() for row in torch.eye(2)]
        mean = PEAKS.mean(1)[int(near[0] > near[1])]
        eps = diffusion.eps(x, mean.to(x).expand_as(x), int(t))
        return torch.cat((eps, -torch.ones_like(eps)), -1)

    trained.head.forward = forward


def ignore_condition(trained: Trained) -> None:
    """Every class has the row of "no class"."""
    writer: Any = trained.system.transformer.writer
    writer.embedding.weight.data.copy_(writer.null.data.expand_as(writer.embedding.weight))


def show_hidden(trained: Trained) -> None:
    """The encoder reads hidden tokens, too."""
    transformer, n = trained.system.transformer, trained.system.tokenizer.layout().n
    forward = transformer.forward

    def everything(tokens_BNS: Tensor, where_Bv: Tensor, wanted_Bn: Tensor, buffer_RPD: Tensor) -> Tensor:
        return forward(tokens_BNS, torch.arange(n).expand(len(tokens_BNS), -1), wanted_Bn, buffer_RPD)

    transformer.forward = everything


def forget_known(trained: Trained) -> None:
    """The encoder reads the condition alone."""
    transformer = trained.system.transformer
    forward = transformer.forward

    def nothing(tokens_BNS: Tensor, where_Bv: Tensor, wanted_Bn: Tensor, buffer_RPD: Tensor) -> Tensor:
        return forward(tokens_BNS, where_Bv[:, :0], wanted_Bn, buffer_RPD)

    transformer.forward = nothing


def draw_twice(trained: Trained) -> None:
    """The first two sets of every generation are one."""
    system = trained.system
    start = system.start

    def started(cond: Any, sampling: Any, noise: Any, layout: Any = None, given: Any = None) -> Any:
        s = start(cond, sampling, noise, layout, given)
        s.group = (s.group - (s.group > 0).int()).int()
        return s

    system.start = started


def halve_latents(trained: Trained) -> None:
    """The measured deviation of latents is twice what it is."""
    normal: Any = trained.system.tokenizer.normal
    mean, square = normal.mean, normal.square
    normal.load_state_dict({"mean": mean, "square": mean.square() + 4 * (square - mean.square())})


MUTANTS = {
    "zeroed head": zero_head,
    "mean instead of samples": predict_the_mean,
    "ignored condition": ignore_condition,
    "hidden tokens shown": show_hidden,
    "known tokens forgotten": forget_known,
    "a set drawn twice": draw_twice,
    "swapped guidance": of_system(swap_guidance),
    "halved latents": halve_latents,
}
