"""Search gathers whole states between steps: copies diverge, originals stay what they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arvis.noise import Noise
from arvis.search import best, best_of_n, copies, resample, search
from arvis.state import State
from arvis.walk import Step, finish, likelihood, walk
from toys import TOYS, toy
from toys.parts import ToySampling


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def start(name: str = "next-scale") -> tuple:
    system = toy(name)
    return system, system.start({"class_labels": torch.tensor([0, 1, 2])}, ToySampling(), Noise.of(1, 3))


@pytest.mark.parametrize("name", TOYS)
def test_gathering_between_steps_equals_running_those_items_alone(name: str) -> None:
    system, s = start(name)
    rows = torch.tensor([2, 0, 2])
    for _ in search(walk(system, s), lambda step: rows if step.k == 2 else None):
        pass
    _, plain = start(name)
    for _ in walk(system, plain):
        pass
    assert torch.allclose(s.tokens[:2].double(), plain.tokens[rows[:2]].double(), atol=1e-10)
    assert torch.equal(s.group[:2], plain.group[rows[:2]])


def test_copies_of_copies_have_noise_of_their_own() -> None:
    """The third copy made later must not repeat the second one made earlier."""
    noise = Noise.of(3, 2)
    seeds = {int(x) for x in noise.seed_B}
    for rows in ([0, 0, 1], [0, 0, 1, 2], [0, 0, 0, 1, 2, 3]):
        noise = noise.take(torch.tensor(rows))
        assert len(set(noise.seed_B.tolist())) == len(rows)
        assert seeds <= set(noise.seed_B.tolist())


def test_best_of_n_keeps_the_best_copy_of_each_item() -> None:
    def score(s: State) -> Tensor:
        return s.tokens.sum((1, 2)).double()

    system, s = start()
    _, plain = start()
    plain = finish(walk(system, plain))
    many = finish(walk(system, start()[1].take_(copies(3, 6))))
    s = best_of_n(system, s, 6, score)
    assert len(s) == 3
    assert torch.equal(score(s), score(many).view(3, 6).amax(1))
    assert bool((score(s) >= score(plain)).all()) and bool((score(s) > score(plain)).any())
    assert best(torch.tensor([1.0, 3, 2, 5, 5, 0]), 3).tolist() == [1, 3]


def test_resampling_is_proportional_and_stays_inside_a_prompt() -> None:
    weight = torch.tensor([1.0, 2, 3, 2, 0, 0, 0, 0, 0, 5, 0, 0])
    u = Noise.of(2, 4000).uniform("u", 0, ())
    count = torch.zeros(12)
    for x in u:
        rows = resample(weight, 4, x.expand(3))
        assert rows.tolist() == sorted(rows.tolist()) and (rows // 4).tolist() == [0] * 4 + [1] * 4 + [2] * 4
        count += torch.bincount(rows, minlength=12)
    assert torch.allclose(count[:4] / 4000, torch.tensor([0.5, 1, 1.5, 1]), atol=0.03)
    assert torch.equal(count[4:8], torch.full((4,), 4000.0))  # no weight: all go on
    assert count[8:].tolist() == [0, 16000, 0, 0]


def test_particles_with_the_right_weights_draw_the_tilted_law() -> None:
    """Resampling by the weight of what was drawn turns the law p into p * weight, as particles grow many."""
    system = toy("next-scale")
    n = 4000
    s = system.start({"class_labels": torch.zeros(n, dtype=torch.int64)}, ToySampling.plain(), Noise.of(6, n))

    def select(step: Step) -> Tensor | None:
        if step.k > 1:
            return None
        return resample(1 + 3 * step.state.tokens[:, 0, 0].double(), n, torch.tensor([0.5]))

    for _ in search(walk(system, s), select):
        pass
    cond = {"class_labels": torch.zeros(64, dtype=torch.int64)}
    sequences = torch.cartesian_prod(*[torch.arange(2)] * 6)
    p = likelihood(system, sequences[..., None], cond, Noise.of(0, 64)).exp()
    tilted = p * (1 + 3 * sequences[:, 0])
    tilted = tilted / tilted.sum()
    index = (s.tokens[..., 0] * 2 ** torch.arange(5, -1, -1)).sum(1)
    found = torch.bincount(index, minlength=64) / n
    assert float((found - tilted).abs().sum()) / 2 < 0.06 < float((p - tilted).abs().sum()) / 2
