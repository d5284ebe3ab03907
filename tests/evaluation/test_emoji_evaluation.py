"""A perfect painter scores everything, one that ignores its prompt nothing: what a fake evaluation would not tell."""

import torch

from arvis.data.emoji import load_emoji
from arvis.data.scenes import SKILLS
from arvis.evaluation.emoji import EmojiEvaluation, Nearest, _scenes, evaluate

CONFIG = EmojiEvaluation(names=20, scenes=3, pictures=10)


def answers():
    """Every prompt of the benchmark with its true picture."""
    world = load_emoji(64)
    known = dict(zip((row.name for row in world.rows), world.all_images(), strict=True))
    for skill in SKILLS:
        for scene in _scenes(world, CONFIG, skill):
            known[scene.caption] = truth_of(world, scene)
    return known


def truth_of(world, scene):
    from arvis.data.scenes import Scenes, ScenesConfig

    return torch.as_tensor(Scenes(ScenesConfig(), world).render(scene))


def test_a_perfect_painter_is_right_and_a_constant_one_wrong():
    known = answers()
    perfect = evaluate(lambda prompts, seed: torch.stack([known[p] for p in prompts]), lambda x: x, CONFIG)
    assert perfect.rates["retrieval of training names, first"].value == 1
    assert perfect.rates["held-out compositions, all three"].value == 1
    assert min(perfect.rates[f"scenes, {skill.replace('_', ' ')}"].value for skill in SKILLS) >= 2 / 3
    assert all(r["psnr"] == float("inf") and r["ssim"] > 1 - 1e-9 for r in perfect.reconstruction.values())

    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    blind = evaluate(lambda prompts, seed: grey.expand(len(prompts), -1, -1, -1), lambda x: x // 2, CONFIG)
    assert blind.rates["retrieval of training names, among five"].value <= 0.05
    assert blind.rates["held-out compositions, all three"].value <= 0.05
    assert max(blind.rates[f"scenes, {skill.replace('_', ' ')}"].value for skill in SKILLS) == 0
    assert all(r["psnr"] < 20 for r in blind.reconstruction.values())


def test_nearest_counts_twins_as_one():
    world = load_emoji(64)
    nearest = Nearest(world)
    twins = world.twins()
    copy = int((twins != torch.arange(len(twins))).nonzero()[0])
    found = nearest(world.all_images()[copy : copy + 1])
    assert bool(nearest.same(found[:, 0], torch.tensor([copy])))
    assert not bool(nearest.same(torch.tensor([0]), torch.tensor([1])))
