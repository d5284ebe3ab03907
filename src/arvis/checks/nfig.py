"""NFIG's tokenizer and VAR's learn the same photographs with the same networks, in minutes.

The claims: bands cut the features into orthogonal parts; the quantiser is the paper's recursion; no level knows of
frequencies above its own; each finer level adds high frequencies; pictures come back as well as VAR's do; sampling with
the cache is the model; the published sizes have VAR's numbers of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, mean, sizes
from arvis.checks.digits import CLASSES, Digits, learn_pictures
from arvis.checks.mutants import add_nothing, forget_scales, of_system
from arvis.checks.var import cached
from arvis.noise import Noise
from arvis.quant.bands import BandTarget, band, low_pass, rings
from arvis.quant.multiscale import area_target, to_rows
from arvis.systems import nfig
from arvis.systems.nfig import VAR, ClassConditioner, VARConfig, assemble
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQ, PyramidVQConfig

PARAMETERS = {"nfig-310m": 310_283_520, "nfig-600m": 600_917_136}
"""Those of VAR-d16 and VAR-d20."""

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
"""Those that come with scikit-image itself."""


@dataclass
class Trained:
    """What is examined: NFIG, VAR's tokenizer trained as its own was, and pieces of photographs."""

    system: VAR
    areas: PyramidVQ
    data: Digits


@dataclass(frozen=True, kw_only=True)
class Length:
    """Updates of each tokenizer."""

    tokenizer: int = 400


@cache
def photographs(side: int = 32) -> Digits:
    """Pieces of photographs at half their size; every eighth to test. They have no labels."""
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError("photographs come with scikit-image: pip install 'arvis[dev]'") from error
    pieces = []
    for name in PHOTOGRAPHS:
        whole = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None, :3].float() / 127.5 - 1
        half = F.interpolate(whole, scale_factor=0.5, mode="area")
        pieces.append(F.unfold(half, side, stride=side)[0].T.unflatten(1, (3, side, side)))
    images = torch.cat(pieces)
    images = images[Noise.of(0).uniform("order", 0, (len(images),))[0].argsort()]
    test = torch.arange(len(images)) % 8 == 0
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Digits(images[~test], labels[~test], images[test], labels[test])


def config() -> VARConfig:
    """32x32 pixels, 8x8 cells at the last of four levels: 85 tokens of 256 codes. The second has no frequency."""
    patch = PatchConfig(
        patch=4, grid=(8, 8), z_channels=16, width=96, encoder_depth=1, decoder_depth=1, heads=4, refine=8
    )
    tokenizer = PyramidVQConfig(patch_nums=(1, 2, 4, 8), vocab_size=256, z_channels=16, patch=patch)
    return VARConfig(tokenizer=tokenizer, depth=2, width=32, heads=2, num_classes=CLASSES, adaln_init=1.0)


def plain(config: VARConfig) -> VAR:
    """The same system with VAR's own tokenizer."""
    return assemble(config, ClassConditioner(config.num_classes, config.width))


def train(on_step: OnStep, length: Length = Length(), data: Digits | None = None) -> Trained:
    """Both tokenizers from the same weights, on the same batches."""
    data = photographs() if data is None else data
    systems = []
    for build in (nfig.build, plain):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            systems.append(build(config()))
        learn_pictures(systems[-1].tokenizer, data, length.tokenizer, on_step)
    return Trained(systems[0].eval(), systems[1].tokenizer, data)


# -- the claims -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's properties and metrics, in its order."""
    tokenizer, images = trained.system.tokenizer, trained.data.test_images
    f = tokenizer.features(images)
    return [
        *cut(tokenizer, f),
        recursive(tokenizer, f),
        unknown(tokenizer, f),
        growing(tokenizer, f),
        *shown(trained),
        cached(trained.system),
        *parameters(),
    ]


def cut(tokenizer: PyramidVQ, f: Tensor) -> list[Claim]:
    """Bands of features sum to them and are orthogonal."""
    layout = tokenizer.layout()
    parts = torch.stack([band(f.double(), k, layout) for k in range(layout.K)])
    products = parts.flatten(1) @ parts.flatten(1).T / f.double().square().sum()
    gap, product = (parts.sum(0) - f).abs().max(), (products - products.diag().diag()).abs().max()
    return [
        at_most("largest difference of features and the sum of their bands", float(gap), 1e-5),
        at_most("largest product of two bands, of the energy", float(product), 1e-5),
    ]


def recursive(tokenizer: PyramidVQ, f: Tensor) -> Claim:
    """Tokens against R_0 = 0; g = R + band; q = nearest(down(g)); R = g - up(q), and what is left at the end."""
    layout, quantize = tokenizer.layout(), tokenizer.quantize
    tokens, rest, equal = quantize.encode(f, layout), torch.zeros_like(f), []
    for k in range(layout.K):
        g = rest + band(f, k, layout)
        found = tokens[:, layout.span(k), 0]
        equal.append(quantize.lookup(to_rows(F.interpolate(g, size=layout.levels[k], mode="area"))) == found)
        rest = g - quantize.spread(quantize.embedding(found), k, layout)
    left = (tokenizer.fhats(tokens, layout)[-1] + rest - f).abs().max()
    share = mean(torch.cat(equal, 1)) if left < 1e-4 else 0.0
    return at_least("share of tokens that are those of the paper's recursion", share, 0.999)


def unknown(tokenizer: PyramidVQ, f: Tensor) -> Claim:
    """What tokens of a level change when the frequencies above its band are taken away."""
    layout, moved = tokenizer.layout(), []
    for k in range(layout.K - 1):
        coarse = slice(0, layout.offsets[k + 1])
        a, b = (tokenizer.quantize.encode(x, layout)[:, coarse] for x in (f, low_pass(f, k, layout)))
        moved.append((a != b).flatten())
    return at_most("share of coarse tokens that know of frequencies above their band", mean(torch.cat(moved)), 0.002)


def growing(tokenizer: PyramidVQ, f: Tensor) -> Claim:
    """How much of the high frequencies, those of the last band, each partial sum has."""
    layout = tokenizer.layout()
    fhats = tokenizer.fhats(tokenizer.quantize.encode(f, layout), layout)
    high = [band(fhat, layout.K - 1, layout).square().mean() for fhat in fhats]
    falls = sum(int(b <= a) for a, b in pairwise(high))
    return exactly("levels that add no high frequencies", falls, 0)


def shown(trained: Trained) -> list[Claim]:
    """The error of pictures that come back from tokens."""
    ours, theirs = (error(t, trained.data.test_images) for t in (trained.system.tokenizer, trained.areas))
    return [
        at_most("error of pictures, of that with VAR's tokenizer", ours / theirs, 1.1),
        at_most("error of pictures, of their variance", ours / float(trained.data.test_images.var()), 0.25),
    ]


def error(tokenizer: PyramidVQ, images: Tensor) -> float:
    return mean((tokenizer.decode(tokenizer.encode(images)) - images).square())


@cache
def parameters() -> tuple[Claim, ...]:
    """The published sizes, counted without memory for them."""
    return sizes(nfig.build, nfig.PRESETS, PARAMETERS)


# -- broken on purpose ------------------------------------------------------------------------------------------------


def ignore_masks(trained: Trained) -> None:
    """Every level codes what is left of all frequencies, as VAR's do."""
    trained.system.tokenizer.quantize.target = area_target


def shift_bands(trained: Trained) -> None:
    """Frequency zero is looked for in the middle."""
    middle = trained.system.tokenizer.layout().levels[-1][0] // 2
    trained.system.tokenizer.quantize.target = BandTarget(lambda layout: rings(layout).roll(middle, 0))


def reverse_bands(trained: Trained) -> None:
    """The highest frequencies come first."""
    trained.system.tokenizer.quantize.target = BandTarget(lambda layout: layout.K - 1 - rings(layout))


def forget_rest(trained: Trained) -> None:
    """A level codes its own band alone, not what lower levels left over."""

    def target(rest: Tensor, f: Tensor, k: int, layout: Any) -> Tensor:
        return area_target(band(f, k, layout), f, k, layout)

    trained.system.tokenizer.quantize.target = target


MUTANTS: dict[str, Callable[[Any], None]] = {
    "ignored masks": ignore_masks,
    "shifted bands": shift_bands,
    "reversed bands": reverse_bands,
    "forgotten rest": forget_rest,
    "no sum": of_system(add_nothing),
    "forgotten cache": of_system(forget_scales),
}
