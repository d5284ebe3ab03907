"""The detector sees in true pictures what their captions say, and nothing of other captions."""

import pytest
import torch

from arvis.data.emoji import load_emoji
from arvis.data.scenes import SKILLS, Scenes, ScenesConfig
from arvis.evaluation.detectors import Detector
from arvis.evaluation.skills import judge, relation


@pytest.fixture(scope="module")
def world():
    return load_emoji(64)


@pytest.fixture(scope="module")
def detector(world):
    return Detector(emoji=world)


@pytest.mark.parametrize("skill", SKILLS)
def test_true_pictures_pass_and_shuffled_captions_fail(world, detector, skill):
    scenes = Scenes(ScenesConfig(skills=(skill,), seed=77), world)
    truth = [scenes.scene(i) for i in range(5)]
    seen = detector(torch.stack([torch.as_tensor(scenes.render(scene)) for scene in truth]))
    verdicts = [judge(scene, s) for scene, s in zip(truth, seen, strict=True)]
    assert sum(v["skill"] for v in verdicts) >= 4
    assert all(v["background"] for v in verdicts)
    shuffled = [judge(scene, s)["skill"] for scene, s in zip(truth, seen[1:] + seen[:1], strict=True)]
    assert sum(shuffled) <= 1


def test_an_empty_picture_has_no_objects(detector):
    seen = detector(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))[0]
    assert seen.objects == () and seen.background == "white"


def test_relations_follow_the_boxes():
    left, right, below = (0, 20, 20, 40), (40, 20, 60, 40), (0, 50, 20, 64)
    assert relation(left, right) == {"to the left of"}
    assert relation(right, left) == {"to the right of"}
    assert relation(below, left) == {"below"}
    assert relation(left, left) == frozenset()
