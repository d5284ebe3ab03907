"""TTS-VAR's search against its official code: bits, rewards and the rows that go on, over a recorded model of bits; and
the encoder of its features against that of the package transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arvis.nn.dinov2 import DINOv2
from arvis.noise import Recorded
from arvis.parity.harness import Fixture
from arvis.parity.infinity import build, configured, keys
from arvis.search import search
from arvis.systems.tts_var import ENCODER_KEYS, Paths, PathSearch, TTSVARConfig, encoder_config
from arvis.walk import Step, walk
from arvis.weights import Key, load_official

RECORDINGS = ("tts-var", "dinov2")


class InOrder(Recorded):
    """Uniform numbers in the order in which a run consumed them, whoever is in the batch."""

    def __init__(self, numbers: Mapping[str, Iterator[Tensor]], items: int) -> None:
        super().__init__({}, {}, items)
        self.numbers = numbers

    def uniform(self, what: str, at: int | Tensor, shape: Sequence[int]) -> Tensor:
        items = 1 if what == "resample" else len(self)  # the paths of the one prompt are drawn together
        count = items * torch.Size(shape).numel()
        drawn = torch.stack([next(self.numbers[what]) for _ in range(count)])
        return drawn.view(items, *shape).expand(len(self), *shape)

    def take(self, rows: Tensor) -> InOrder:
        return InOrder(self.numbers, len(rows))


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes and settings."""
    if fixture.slug == "dinov2":
        yield from _features(fixture)
        return
    system, io = model(fixture), fixture.io
    for given in fixture.runs.values():
        yield from _searched(system, io, given)


def _features(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """What each recorded encoder says of each picture."""
    pictures = {name.removeprefix("image_"): x for name, x in fixture.io.items() if name.startswith("image_")}
    for kind in fixture.runs:
        encoder = DINOv2(encoder_config(fixture.model(kind))).eval()
        load_official(encoder, ENCODER_KEYS, fixture.weights(kind), source=f"{fixture.folder}: {kind}")
        for name, picture in pictures.items():
            summary, patches = encoder(picture)
            yield f"{kind}_summary_{name}", summary
            yield f"{kind}_patches_{name}", patches


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """It has no weights of its own."""
    raise ValueError(f"a search has no official weights, got a layout of {layout['preset']!r}")


def model(fixture: Fixture) -> Any:
    """The recorded transformer; its pictures are the first channels of the sum of codes, times a gain, clamped."""
    tokenizer, transformer = fixture.model("tokenizer"), fixture.model("transformer")
    if tuple(tokenizer["decoder_clamp"]) != (-1, 1) or not tokenizer.get("new_quant", True):
        raise ValueError(f"pictures are clamped to -1 and 1, and bits are signs over sqrt(d), got {tokenizer}")
    smallest = {"base_ch": 32, "ch_mult": [1], "patch_size": 1, "num_res_blocks": 1}
    config = configured({"codebook_dim": tokenizer["codebook_dim"], **smallest}, transformer)
    system = build(config).eval()
    official = fixture.weights("transformer")
    load_official(system.transformer, keys(config)["transformer"], official, source=f"{fixture.folder}: transformer")
    decoder = nn.Conv2d(tokenizer["codebook_dim"], tokenizer["decoder_channels"], 1, bias=False)
    decoder.weight.data = tokenizer["decoder_gain"] * torch.eye(*decoder.weight.shape[:2])[..., None, None]
    system.tokenizer.decoder = decoder
    return system


class Red:
    """The recorded stand-in for a reward: the mean of red over 255, of bytes without their fractions."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, image: Tensor, asked: Sequence[Any]) -> Tensor:
        pixels = ((image + 1) / 2).permute(0, 2, 3, 1).mul(255).to(torch.uint8)
        score = pixels[..., 0].double().mean((1, 2)) / 255
        self.calls.append((pixels, score))
        return score


def _searched(system: Any, io: Mapping[str, Tensor], given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    if given["reward"] != "mean_red_over_255" or given.get("num_processes", 1) != 1:
        raise ValueError(f"the recorded reward is mean_red_over_255, in one process, got {dict(given)}")
    layout, reward, bits, kept = system.tokenizer.layout(), Red(), {}, {}
    config = TTSVARConfig(
        paths=tuple(given["bs_sis"]),
        cluster=tuple(given["extract_sis"]),
        resample=tuple(given["resample_sis"]),
        strength=given["_lambda"],
        potential=given["cal_type"],
    )
    numbers = {"draw": iter(io["bit_uniforms"]), "resample": iter(io["resample_uniforms"])}
    cond = system.prepare({"text_features": io["text_features"][None, : given["text_len"]]})
    s = system.start(cond, _sampling(system, given), InOrder(numbers, 1), layout)
    step_of_rows = iter([io[f"ids_after_s{k}"] for k in sorted(config.cluster)])  # k-means is another package's
    paths = Paths(PathSearch(reward, config, lambda image, n, m: next(step_of_rows)), s, [None])
    s.take_(torch.zeros(config.most, dtype=torch.int64))

    def choose(step: Step) -> Tensor | None:
        k = step.k - 1
        h, w = layout.levels[k]
        bits[k] = step.state.tokens[:, layout.span(k)].view(len(step.state), 1, h, w, -1)
        rows = paths.choose(step)
        if rows is not None:
            kept[k] = rows
        return rows

    for _ in search(walk(system, s), choose):
        pass
    for k, drawn in bits.items():
        yield f"bits_s{k}", drawn
    for k, rows in kept.items():
        yield f"ids_after_s{k}", rows
    for i, (_, score) in enumerate(reward.calls):
        yield f"reward_call{i}", score
    pixels, score = reward.calls[-1]
    yield "final_image_u8_bgr", pixels.flip(-1)
    yield "final_scores", score


def _sampling(system: Any, given: Mapping[str, Any]) -> Any:
    if given["guidance"] != "constant":
        raise ValueError(f"guidance is constant or a list, got {given['guidance']!r}")
    places = given["cfg_insertion_layer"]
    lists = {
        (f"{name}_list" if isinstance(value, Sequence) else one): tuple(value) if isinstance(value, Sequence) else value
        for name, one, value in (("cfg", "cfg_scale", given["cfg"]), ("temperature", "temperature", given["tau"]))
    }
    places = tuple(places) if isinstance(places, Sequence) else (places,)
    return system.Sampling(**lists, top_k=given["top_k"], top_p=given["top_p"], guide_after=places)
