"""A search over paths with the model in the box, which is trained on nothing for it, in about a minute.

The claims: without choices it is plain drawing; paths that were chosen go on as if they had been alone; paths are drawn
by their weights; every group of pictures keeps a path; and where coarse scales tell the reward, many paths there and
few later find more of it than as many token passes of whole pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arvis import load
from arvis.checks.claims import Claim, OnStep, at_least, at_most, exactly, mean
from arvis.data.emoji import load_emoji
from arvis.data.images import to_bytes, to_network
from arvis.noise import Noise
from arvis.search import copies, search
from arvis.state import State
from arvis.systems import DEFAULT
from arvis.systems.tts_var import Chosen, Paths, PathSearch, TTSVARConfig, best_of, clustered
from arvis.tokens import Pin
from arvis.walk import Step, finish, walk

EARLY = TTSVARConfig(paths=(24, 24, 2, 2, 2), cluster=(), resample=(2,), strength=200.0)
"""Twenty-four paths over the first three of five scales, of which two go on."""

PICTURES = 40


@dataclass
class Trained:
    """A model, and the parts of the search that can be broken."""

    system: Any
    paths: Callable[..., Paths] = Paths
    clusters: Chosen = clustered

    def find(self, config: TTSVARConfig, items: int) -> State:
        """Pictures of no prompt by a search for red."""
        s = self.start(items)
        paths = self.paths(PathSearch(redness, config, self.clusters), s, [None] * items)
        s.take_(copies(items, paths.n))
        return finish(search(walk(self.system, s), paths.choose))

    def start(self, items: int, given: Pin | None = None) -> State:
        cond = self.system.prepare({"prompt": [""] * items})
        return self.system.start(cond, self.system.Sampling.plain(), Noise.of(1, items), given=given)


def redness(image: Tensor, asked: Sequence[Any]) -> Tensor:
    """How much more red than other colours, on average."""
    x = to_bytes(image).double() / 255
    return (x[:, 0] - x[:, 1:].mean(1)).clamp_min(0).mean((1, 2))


def train(on_step: OnStep) -> Trained:
    """The shipped model: nothing is trained here."""
    return Trained(load(DEFAULT).system)


@torch.inference_mode()
def examine(trained: Trained) -> list[Claim]:
    """The sheet's five conditions, in its order."""
    return [plain(trained), alone(trained), drawn(trained), grouped(trained), better(trained)]


def plain(trained: Trained, items: int = 3, n: int = 4) -> Claim:
    """Tokens of a search that never chooses, against the best of plain copies."""
    s = finish(walk(trained.system, trained.start(items).take_(copies(items, n))))
    score = redness(trained.system.tokenizer.decode(s.tokens, s.layout), []).view(items, n)
    wanted = s.tokens[score.argmax(1) + n * torch.arange(items)]
    found = trained.find(best_of(n, s.K), items).tokens
    return exactly("share of tokens that are those of the best plain copy", mean(found == wanted), 1.0)


def alone(trained: Trained) -> Claim:
    """Logits after a choice, over gathered caches, against those of the chosen tokens from the start."""
    system, seen = trained.system, {}
    s = trained.start(2)
    paths = trained.paths(PathSearch(redness, EARLY, trained.clusters), s, [None, None])
    s.take_(copies(2, paths.n))

    def choose(step: Step) -> Tensor | None:
        rows = paths.choose(step) if step.k <= 3 else None
        if step.k == 3 and rows is not None:
            seen["tokens"] = step.state.tokens[rows].clone()
        return rows

    for step in search(walk(system, s, until=3), choose):
        if step.k == 3:
            seen["logits"] = system.predict(step.state).logits
    known = torch.arange(s.layout.n)[None].expand(len(s), -1) < s.layout.offsets[3]
    fresh = system.predict(trained.start(len(s), Pin(known, seen["tokens"]))).logits
    gap = float((seen["logits"] - fresh).abs().max())
    return at_most("largest difference of logits after a choice and from scratch", gap, 1e-3)


def drawn(trained: Trained, items: int = 3000) -> Claim:
    """The rows that go on, of paths with known rewards, against the weights: p-value of chi-square."""
    s = trained.start(1)
    score = torch.tensor([0.1, 0.3, 0.2, 0.0]).double()
    config = TTSVARConfig(paths=(4, 1, 1, 1, 1), cluster=(), resample=(1,), strength=5.0)
    state = s.take_(torch.zeros(items, dtype=torch.int64))
    state.noise = Noise.of(2, items)
    paths = trained.paths(PathSearch(lambda image, asked: score.repeat(items), config), state, [None] * items)
    state.take_(copies(items, 4))
    step = Step(k=2, K=5, fresh=torch.empty(0), state=state, preview=lambda: torch.zeros(4 * items, 3, 1, 1))
    rows = paths.choose(step)
    assert rows is not None, "the second scale resamples"
    counts = torch.bincount(rows % 4, minlength=4).double()
    expected = (5 * score).softmax(0) * items
    statistic = ((counts - expected).square() / expected).sum()
    p = torch.special.gammaincc(torch.tensor(1.5).double(), statistic / 2)
    return at_least("p-value of the rows drawn under their weights", float(p), 0.001)


def grouped(trained: Trained, groups: int = 3, each: int = 4) -> Claim:
    """Pictures of three emoji, a little dimmed or brightened: the share of emoji that keep a path."""
    world = load_emoji(64)
    names = ("red heart", "dog face", "soccer ball")
    images = to_network(world.all_images()[[world.find(name) for name in names]])
    dimmed = torch.cat([images * (1 - 0.03 * i) for i in range(each)])
    rows = trained.clusters(dimmed, groups * each, groups)
    return exactly("share of groups that keep a path", len(set((rows % groups).tolist())) / groups, 1.0)


def better(trained: Trained) -> Claim:
    """Red of pictures that were searched for, less that of the best of whole ones of equal cost, in standard errors."""
    layout = trained.system.tokenizer.layout()
    equal = round(EARLY.cost(layout) / layout.n)
    scores = []
    for config in (EARLY, best_of(equal, layout.K)):
        s = trained.find(config, PICTURES)
        scores.append(redness(trained.system.tokenizer.decode(s.tokens, s.layout), []))
    gain = scores[0] - scores[1]
    won = float(gain.mean() / gain.std() * len(gain) ** 0.5)
    return at_least("reward won at equal cost, in standard errors", won, 2)


# -- broken on purpose ------------------------------------------------------------------------------------------------


class Blind(Paths):
    """Paths go on by chance."""

    def potential(self, score: Tensor) -> Tensor:
        return torch.zeros_like(score)


class Worst(Paths):
    """Paths with the least reward go on."""

    def potential(self, score: Tensor) -> Tensor:
        return -score


class First(Paths):
    """The first picture is taken in the end."""

    def choose(self, step: Step) -> Tensor | None:
        if step.k < step.K:
            return super().choose(step)
        return torch.arange(0, len(step.state), self.n)


def go_by_chance(trained: Trained) -> None:
    """Every potential is alike."""
    trained.paths = Blind


def prefer_the_worst(trained: Trained) -> None:
    """The sign of the reward is lost."""
    trained.paths = Worst


def take_the_first(trained: Trained) -> None:
    """The reward of the last pictures is not asked for."""
    trained.paths = First


def keep_caches(trained: Trained) -> None:
    """Keys and values stay where they were when rows are gathered."""
    predict = trained.system.predict

    def stale(s: State) -> Any:
        for cache in s.cache.values():
            for store in (cache.k, cache.v):
                for layer, x in store.items():
                    store[layer] = x.flip(0)
        return predict(s)

    trained.system.predict = stale


def cluster_none(trained: Trained) -> None:
    """The first paths are kept, whatever they show."""
    trained.clusters = lambda image, n, m: torch.cat([torch.arange(m) + i for i in range(0, len(image), n)]) * 0


MUTANTS: dict[str, Callable[[Trained], None]] = {
    "chosen by chance": go_by_chance,
    "the worst chosen": prefer_the_worst,
    "the first taken": take_the_first,
    "stale caches": keep_caches,
    "no clusters": cluster_none,
}
