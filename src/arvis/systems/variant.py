"""VARiant: one set of weights whose late scales run on fewer layers, as few as are asked for at run time.

Progressive Supernet Training for Efficient Visual Autoregressive Modeling, arXiv 2511.16546. No code and no weights are
published: this follows the definition as far as it is known, and what is not known is a setting with a default.

A method for any system over scales that keeps its layers in `transformer.trunk` and its rows in `cache["trunk"]`. Early
scales pass all D layers, late ones an equidistant subset: rows that skip a layer stay as they are, and the layer keeps
no keys of them. Training draws the whole network or a sub-network for every update, less and less often the whole one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from arvis.dist import Dist
from arvis.nn.trunk import Call, Trunk
from arvis.noise import Noise, Source
from arvis.published import Preset, Result
from arvis.rows import Rows
from arvis.state import Cond, State
from arvis.systems import var
from arvis.systems.var import VARConfig
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.tokens import NEVER, Layout, Pin
from arvis.weights import Key

Layers = tuple[tuple[int, ...], ...]
"""The layers that the rows of each scale pass."""


def equidistant(total: int, depths: Sequence[int]) -> Layers:
    """The layers of each scale when scale k passes depths[k] of `total`: floor(i (D - 1) / (d - 1)) for i = 0..d-1 of
    the D layers of the scale before, so that the first and the last are always among them.

    A layer that a scale skips is skipped by all later ones, so the keys of earlier scales are there wherever they are
    needed. ValueError for fewer than two layers, or for more than the scale before has.
    """
    kept, out = tuple(range(total)), []
    for k, depth in enumerate(depths):
        if depth != len(kept):
            if not 2 <= depth <= len(kept):
                raise ValueError(f"scale {k} may pass 2 to {len(kept)} layers, as many as the one before; got {depth}")
            kept = tuple(kept[i * (len(kept) - 1) // (depth - 1)] for i in range(depth))
        out.append(kept)
    return tuple(out)


class Shortened(nn.Module):
    """A trunk of which the rows of a scale pass the layers of that scale alone, in order, and skip the others."""

    def __init__(self, trunk: Trunk, layers: Layers) -> None:
        super().__init__()
        self.trunk = trunk
        self.until = _until(layers, len(trunk))

    def __len__(self) -> int:
        return len(self.trunk)

    @property
    def blocks(self) -> nn.ModuleList:
        """All layers, also those that no row passes."""
        return self.trunk.blocks

    def forward(self, x_RD: Tensor, call: Call, layers: Sequence[int] | None = None) -> Tensor:
        if call.rows is None:
            raise ValueError("which layers a row passes depends on its scale: the call needs rows, got None")
        step, whole = call.rows.step[0], call.rows.count
        for count, run in itertools.groupby(
            range(len(self)) if layers is None else layers, lambda i: int((step < self.until[i]).sum())
        ):  # of rows that lie scale by scale the first so many pass
            if count:
                passed = self.trunk(x_RD[:, :count], _first(call, count), tuple(run))
                x_RD = passed if count == whole else torch.cat((passed, x_RD[:, count:]), 1)
        return x_RD


def _until(layers: Layers, total: int) -> tuple[int, ...]:
    """How many scales pass each layer; those beyond the listed ones pass what the last of them passes."""
    return tuple(NEVER if i in layers[-1] else sum(i in kept for kept in layers) for i in range(total))


def _first(call: Call, count: int) -> Call:
    """What the first rows of a call may read."""
    assert call.rows is not None
    rest = call.rows.count - count
    if rest == 0:
        return call
    mask = call.mask[..., :count, : call.mask.shape[-1] - rest] if isinstance(call.mask, Tensor) else None
    table = None if call.table is None else call.table[:, :count]
    return replace(call, mask=mask, table=table, rows=Rows(*(x[:, :count] for x in call.rows)))


def subnet(system: Any, layers: Layers) -> Any:
    """The same system, the same weights, with rows that pass these layers alone: whole in itself, with its verbs,
    teacher and loss."""
    transformer = system.transformer
    return _with(system, transformer=_with(transformer, trunk=Shortened(transformer.trunk, layers)))


def _with(module: Any, **parts: nn.Module) -> Any:
    """A module with other parts, and for the rest itself."""
    out = copy.copy(module)
    out._modules = {**module._modules, **parts}
    return out


# -- the supernet -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ProgressConfig:
    """How often an update trains the whole network: `whole` of those of the `joint` part of the training, falling to
    none during the `fading` part; after it only sub-networks learn.

    Deviation: the lengths of the stages, and whether one or several depths are trained, are not published; the depths
    of `depths` are drawn alike, without any the one that is run by default.
    """

    whole: float = 0.2
    joint: float = 0.5
    fading: float = 0.25
    depths: tuple[int, ...] = ()

    def share(self, done: float) -> float:
        """The probability of the whole network when a part of the training is done."""
        left = (self.joint + self.fading - done) / self.fading if self.fading else float(done < self.joint)
        return self.whole * min(max(left, 0.0), 1.0)


@cache
def settings(base: type, full_scales: int, depth: int) -> type:
    """Sampling settings of a base with the four that say which layers run."""
    more = [
        ("full_scales", int, field(default=full_scales)),
        ("depth", int, field(default=depth)),
        ("depths", tuple[int, ...], field(default=())),
        ("free", bool, field(default=False)),
    ]
    return make_dataclass("VariantSampling", more, bases=(base,), frozen=True, kw_only=True)


class Variant(nn.Module):
    """Any system over scales as a supernet: its verbs, with a depth for every scale in the sampling settings.

    Settings are those of the base and four more. The first `full_scales` scales pass all layers, the others `depth` (0:
    all, too); or `depths` has a number for each scale, the last one for all that follow. With `free` the keys of layers
    that no later scale passes are given up, and with them the way back.
    """

    def __init__(self, base: Any, full_scales: int, depth: int, progress: ProgressConfig = ProgressConfig()) -> None:
        super().__init__()
        self._base = [base]  # in a list: its parts are parts of this module by their own names, so files fit both
        for name, part in base.named_children():
            self.add_module(name, part)
        self.progress = progress
        self.full_scales, self.depth = full_scales, depth
        self.layers(self.Sampling(), base.tokenizer.layout().K)  # refuses depths that cannot be

    @property
    def base(self) -> Any:
        """The system whose weights these are."""
        return self._base[0]

    @property
    def Sampling(self) -> type:
        """The base's settings and the depths."""
        return settings(self.base.Sampling, self.full_scales, self.depth)

    @property
    def total(self) -> int:
        """Layers of the whole network."""
        return len(self.base.transformer.trunk)

    @property
    def space(self) -> Any:
        return self.base.space

    @property
    def conditions(self) -> tuple[str, ...]:
        return self.base.conditions

    def parts(self) -> dict[str, nn.Module]:
        return self.base.parts()

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self.base.prepare(request)

    def latents(self, image: Tensor) -> dict[str, Tensor]:
        return self.base.latents(image)

    def layers(self, sampling: Any, scales: int) -> Layers:
        """What each of so many scales passes under some settings."""
        late = (sampling.depth or self.total,) * max(scales - sampling.full_scales, 0)
        depths = sampling.depths or ((self.total,) * sampling.full_scales + late)
        return equidistant(self.total, (*depths, *(depths[-1:] * scales))[:scales])

    def at(self, sampling: Any = None, layout: Layout | None = None) -> Any:
        """The sub-network of some settings (by default the default ones) as a system of its own."""
        scales = (self.base.tokenizer.layout() if layout is None else layout).K
        return subnet(self.base, self.layers(self.Sampling() if sampling is None else sampling, scales))

    # -- the three verbs ------------------------------------------------------------------------------------------

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        s = self.base.start(cond, sampling, noise, layout, given)
        layers = self.layers(sampling, s.K)
        until = _until(layers, self.total)
        for store in s.cache.values():
            store.limits = {i: s.layout.offsets[k] for i, k in enumerate(until) if k < s.K}
        s.key = s.key, layers, sampling.free
        return s

    def predict(self, s: State) -> Dist:
        _, layers, free = s.key
        with _own_key(s):
            d = subnet(self.base, layers).predict(s)
        if free:
            given_up = set(range(self.total)) - set(layers[s.at()])
            for store, i in itertools.product(s.cache.values(), given_up):
                store.drop(i)
        return d

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        with _own_key(s):
            self.base.commit(s, d, x_BnS)

    # -- one pass over all scales ---------------------------------------------------------------------------------

    def teacher(self, tokens: Tensor, cond: Cond | None, layout: Layout | None = None) -> Dist:
        """The base's, of the sub-network that is run by default."""
        return self.at(layout=layout).teacher(tokens, cond, layout)

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """The base's, of the network whose turn it is: which one depends on the update alone, so that all parts of a
        batch agree. Without a "step" and "steps" in the batch, of the one that is run by default."""
        if "steps" not in batch:
            return self.at().loss(batch, noise)
        depth = self.turn(batch["step"], batch["steps"])
        return self.at(replace(self.Sampling(), depth=depth, depths=())).loss(batch, noise)

    def turn(self, step: int, steps: int) -> int:
        """The depth of late scales in an update, 0 for the whole network."""
        whole, which = Noise.of(0).uniform("network", step, (2,))[0].tolist()
        if whole < self.progress.share(step / steps):
            return 0
        depths = self.progress.depths or (self.Sampling().depth,)
        return depths[int(which * len(depths))]


@contextmanager
def _own_key(s: State) -> Iterator[None]:
    """The state as its base made it."""
    key = s.key
    s.key = key[0]
    try:
        yield
    finally:
        s.key = key


# -- assembly and presets -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """A VAR, what is run where nothing else is asked for, and how it is trained."""

    scale: VARConfig
    full_scales: int = 6
    depth: int = 16
    progress: ProgressConfig = field(default_factory=ProgressConfig)


def build(config: VariantConfig) -> Variant:
    """A supernet over a VAR with freshly initialised weights."""
    return Variant(var.build(config.scale), config.full_scales, config.depth, config.progress)


CONFIG = VariantConfig


def _preset(name: str, depth: int) -> Preset:
    """VAR's own files, run at a depth, and finetuned at a tenth of its rate."""
    base = var.PRESETS[name]
    generator = {**base.training["generator"], "lr": base.training["generator"]["lr"] / 10}
    return replace(
        base, config=lambda: VariantConfig(scale=base.config(), depth=depth), training={"generator": generator}
    )


def emoji_64() -> VariantConfig:
    """The VAR of the emoji world: the first three of five scales pass eight layers, the others four (or two)."""
    return VariantConfig(scale=var.emoji_64(), full_scales=3, depth=4, progress=ProgressConfig(depths=(2, 4)))


PRESETS = {
    **{f"variant-d{depth}": _preset("var-d30", depth) for depth in (16, 8, 4, 2)},
    "variant-emoji-64": replace(var.PRESETS["var-emoji-64"], config=emoji_64),
}

RESULTS = tuple(
    Result(
        preset=f"variant-d{depth}",
        metric="FID",
        value=fid,
        settings="ImageNet 256",
        source="arXiv 2511.16546, abstract",
    )
    for depth, fid in ((16, 2.05), (8, 2.12), (2, 2.97))
)


def keys(config: VariantConfig) -> dict[str, tuple[Key, ...]]:
    """VAR's official names: no weight is new."""
    return var.keys(config.scale)


def tiny() -> Variant:
    """The smallest complete supernet, for the laws."""
    tokenizer = PyramidVQConfig(
        patch_nums=(1, 2, 3),
        vocab_size=5,
        z_channels=4,
        cnn=CNNConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4),
    )
    scale = VARConfig(tokenizer=tokenizer, depth=4, width=16, heads=2, num_classes=3, adaln_init=1.0)
    return build(VariantConfig(scale=scale, full_scales=1, depth=2))
