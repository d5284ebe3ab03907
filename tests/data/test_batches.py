import threading

import numpy as np
import pytest
import torch

from arvis.data.batches import Batches, BatchesConfig, collate, crop_and_flip, permuted
from arvis.data.mixture import Mixture


class Numbers:
    """Item i is a picture whose every pixel is i."""

    classes = ("even", "odd")

    def __init__(self, count, size=4):
        self.count, self.size, self.calls = count, size, []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        self.calls.append(i)
        image = torch.full((3, self.size, self.size), i % 256, dtype=torch.uint8)
        return {"image": image, "caption": f"number {i}", "label": i % 2}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_permuted_is_a_permutation(count):
    position = np.arange(count)
    orders = [permuted(position, count, seed, np.full(count, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(count))
    if count >= 16:
        assert len({tuple(order.tolist()) for order in orders}) == 4
    some = permuted(position[::-1][:3], count, 0, np.zeros(min(3, count), int))
    assert some.tolist() == orders[0][::-1][:3].tolist()  # each position on its own


def test_permuted_mixes_well():
    # where 0 and its neighbour go, over many seeds: uniform (chi-square, 15 degrees) and not next to each other
    count, seeds = 16, 3200
    ends = np.array([permuted(np.arange(2), count, seed, np.zeros(2, int)) for seed in range(seeds)])
    for column in ends.T:
        expected = seeds / count
        assert ((np.bincount(column, minlength=count) - expected) ** 2 / expected).sum() < 45
    distance = (ends[:, 1] - ends[:, 0]) % count
    expected = seeds / (count - 1)
    assert ((np.bincount(distance, minlength=count)[1:] - expected) ** 2 / expected).sum() < 45


def test_every_item_once_an_epoch_across_batch_borders():
    batches = Batches(Numbers(10), BatchesConfig(batch=4, seed=3))
    rows = [i for step in range(5) for i in batches.indices_at(step)]
    assert sorted(rows[:10]) == list(range(10)) == sorted(rows[10:])
    assert rows[:10] != rows[10:] and rows[:10] != list(range(10))
    assert batches.steps_per_epoch == 2.5
    plain = Batches(Numbers(3), BatchesConfig(batch=4, shuffle=False))
    assert plain.indices_at(1) == [1, 2, 0, 1]
    assert Batches(Numbers(10), BatchesConfig(batch=4, seed=4)).indices_at(0) != batches.indices_at(0)


def test_batch_of_the_contract():
    batches = Batches(Numbers(300), BatchesConfig(batch=5, seed=1))
    batch = batches(7)
    rows = batches.indices_at(7)
    assert set(batch) == {"image", "prompt", "class_labels"}
    assert batch["image"].dtype == torch.float32 and batch["image"].shape == (5, 3, 4, 4)
    assert torch.allclose(batch["image"][:, 0, 0, 0], torch.tensor([i % 256 for i in rows]) / 127.5 - 1)
    assert batch["prompt"] == [f"number {i}" for i in rows]
    assert batch["class_labels"].dtype == torch.int64 and batch["class_labels"].tolist() == [i % 2 for i in rows]


def test_a_batch_does_not_depend_on_what_was_asked_before():
    config = BatchesConfig(batch=6, seed=5)
    augment = crop_and_flip(3)
    first = Batches(Numbers(50), config, augment)
    wanted = [first(step) for step in range(8)]
    resumed = Batches(Numbers(50), config, augment).stream(first=5)
    for step in (5, 6, 7):
        batch = next(resumed)
        assert batch["prompt"] == wanted[step]["prompt"] and torch.equal(batch["image"], wanted[step]["image"])
    resumed.close()
    threaded = Batches(Numbers(50), BatchesConfig(batch=6, seed=5, workers=3), augment)
    assert threaded(2)["prompt"] == wanted[2]["prompt"] and torch.equal(threaded(2)["image"], wanted[2]["image"])


def _makers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("arvis-batch")]


def test_stream_works_ahead_and_stops():
    numbers = Numbers(1000)
    stream = Batches(numbers, BatchesConfig(batch=2)).stream(ahead=3)
    next(stream)
    assert _makers()
    stream.close()
    assert 2 <= len(numbers.calls) <= 10
    assert not _makers()
    plain = Batches(numbers, BatchesConfig(batch=2)).stream(ahead=0)
    assert len(next(plain)["prompt"]) == 2 and not _makers()


def test_errors_of_the_background_arrive():
    class Broken(Numbers):
        def __getitem__(self, i):
            raise OSError("the disk is gone")

    stream = Batches(Broken(4), BatchesConfig(batch=2)).stream()
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_crop_and_flip():
    image = torch.arange(3 * 6 * 8, dtype=torch.uint8).view(3, 6, 8)
    crops = [crop_and_flip(4)(image, np.random.default_rng(k)) for k in range(200)]
    flipped = sum(bool(crop[0, 0, 0] > crop[0, 0, 1]) for crop in crops)
    assert 70 < flipped < 130
    corners = {int(min(crop[0, 0])) for crop in crops}
    assert corners == {8 * y + x for y in range(3) for x in range(5)}
    still = [crop_and_flip(4, flip=False)(image, np.random.default_rng(k)) for k in range(20)]
    assert all(crop[0, 0, 1] - crop[0, 0, 0] == 1 for crop in still)
    with pytest.raises(ValueError, match="cannot crop 9 x 9"):
        crop_and_flip(9)(image, np.random.default_rng(0))


def test_wrong_settings():
    with pytest.raises(ValueError, match="empty"):
        Batches(Numbers(0), BatchesConfig(batch=1))
    with pytest.raises(ValueError, match="batch=0"):
        Batches(Numbers(3), BatchesConfig(batch=0))
    with pytest.raises(ValueError, match="from 0"):
        Batches(Numbers(3), BatchesConfig(batch=1))(-1)
    with pytest.raises(ValueError, match="one shape"):
        collate([Numbers(1, 4)[0], Numbers(1, 5)[0]])


def test_mixture_keeps_its_proportions_and_covers_everything():
    small, large = Numbers(7), Numbers(400)
    mixture = Mixture([small, large], [1, 3])
    sources = [mixture.source_of(i) for i in range(len(mixture))]
    share = np.array([k for k, _ in sources])
    assert abs((share == 0).mean() - 0.25) < 0.01
    for start in range(0, len(mixture) - 40, 40):
        assert 9 <= (share[start : start + 40] == 0).sum() <= 11  # evenly, not in lumps
    seen = [j for k, j in sources if k == 1]
    assert seen[:400] == list(range(400)) and len(seen) <= 800
    again = [j for k, j in sources if k == 0]
    assert again[:14] == [*range(7), *range(7)]
    assert mixture.classes == ("even", "odd", "even", "odd")
    i = sources.index((1, 5))
    assert mixture[i]["label"] == 3 and mixture[i]["caption"] == "number 5"
    with pytest.raises(IndexError):
        mixture[len(mixture)]


@pytest.mark.parametrize("weights", [[1.0], [1, 0], [1, -1], [1, 1e-9]])
def test_mixture_weights(weights):
    with pytest.raises(ValueError, match="mixture"):
        Mixture([Numbers(3), Numbers(3)], weights)
