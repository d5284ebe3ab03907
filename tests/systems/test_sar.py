"""Refinement of models over scales, with and without residuals: rollout, targets, gradients, what is bit-identical."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from arvis import recipes, systems
from arvis.config import to_dict
from arvis.noise import Noise
from arvis.published import Preset
from arvis.rows import Rows, render
from arvis.state import Staged
from arvis.systems import flexvar, infinity, sar, var
from arvis.tokens import at
from arvis.training.fit import FitConfig, fit
from arvis.training.refinement import RefinementConfig, predict, refine, start_and_own, student, student_inputs
from arvis.weights import read_pretrained, save_pretrained
from small import built, picture


def bitwise():
    """Bits count alike, so that losses are plain means; nothing is flipped but by the model itself."""
    return infinity.build(replace(built("infinity")[1], reweight=False, flip_strength=0.0))


MODELS = {"flexvar": flexvar.tiny, "var": var.tiny, "infinity": bitwise}
"""Codes of the whole picture, codes that add up, bits that add up."""

REQUEST = {"class_labels": [0, 1, 2], "prompt": ["a red apple", "a cat", "two dogs"]}


@pytest.fixture(params=MODELS)
def system(request):
    torch.manual_seed(0)
    system = MODELS[request.param]().double().eval()
    system.label_drop = 0.5
    for p in system.transformer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return system


@pytest.fixture
def batch(system):
    y, x = (side * system.tokenizer.config.downsample for side in system.tokenizer.layout().levels[-1])
    image = torch.rand(3, 3, y, x, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    return {"image": image, **REQUEST}


def whole(system, batch):
    """Noise under which the lesson has all three scales (lists of FlexVAR are random)."""
    return next(n for n in (Noise.of(s, 3) for s in range(99)) if system.lesson(batch, n).layout.K == 3)


def of_losses(system, loss):
    """Gradients of a loss by name."""
    system.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in system.transformer.named_parameters() if p.grad is not None}


def test_the_students_inputs_are_what_sampling_feeds_after_the_predicted_codes(system, batch):
    """The real sampler, forced to the codes of the first pass up to the last scale but one."""
    with torch.no_grad():
        noise = whole(system, batch)
        lesson = system.lesson(batch, noise)
        layout, predicted = lesson.layout, predict(system, lesson, noise, RefinementConfig())
        assert torch.equal(predicted, lesson.predicted.logits.argmax(-1))
        seen, forward = [], system.transformer.forward
        system.transformer.forward = lambda c, x, *rest: seen.append(x) or forward(c, x, *rest)
        s = system.start(lesson.cond, system.Sampling.plain(), noise, layout)
        while not bool(s.done.all()):
            d = system.predict(s)
            system.commit(s, d, at(predicted, d.where))
        for k in (1, 2):
            assert torch.equal(student_inputs(system, predicted, layout, [k]), seen[k])
        both = student_inputs(system, predicted, layout, [1, 2])
        assert torch.equal(both, torch.cat(seen[1:], 1))


def test_scales_of_the_student_see_the_start_and_themselves(system, batch):
    rows = Rows.of(torch.tensor([0, 1, 1, 2]))
    mask = render(start_and_own, rows, rows)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    with torch.no_grad():
        noise = whole(system, batch)
        lesson = system.lesson(batch, noise)
        c = system.transformer.conditioner(lesson.cond, torch.zeros(3, dtype=torch.bool))
        layout, tokens = lesson.layout, lesson.tokens
        together = student(system, tokens, c, layout, [1, 2])
        assert together.where.tolist() == [list(range(1, layout.n))]
        for k in (1, 2):
            alone = student(system, tokens, c, layout, [k])
            assert torch.allclose(at_where(together, alone), alone.logits, atol=1e-10)
        before = system.transformer.start_position.clone()
        system.transformer.start_position += torch.linspace(-1, 1, 16)
        moved = student(system, tokens, c, layout, [1, 2]).logits
        assert torch.allclose(moved, together.logits, atol=1e-10), "the start row has no position of its own"
        assert not torch.allclose(system.lesson(batch, noise).predicted.logits, lesson.predicted.logits, atol=1e-4)
        system.transformer.start_position.copy_(before)


def at_where(d, part):
    first = int(d.where[0, 0])
    return d.logits[:, part.where[0] - first]


@pytest.mark.parametrize("target", ["teacher", "data"])
@pytest.mark.parametrize("transitions", ["last", "all", "random"])
def test_the_loss_is_the_sum_written_out(system, batch, target, transitions):
    noise = whole(system, batch)
    config = RefinementConfig(sigma=0.3, transitions=transitions, target=target)
    found = refine(system, batch, noise, config)
    lesson = system.lesson(batch, noise)
    layout, T = lesson.layout, lesson.predicted.logits
    u = T.argmax(-1)
    k = 1 + int(float(noise.uniform("transition", 0, ())[0]) * 2)
    scales = {"last": [2], "all": [1, 2], "random": [k]}[transitions]
    null = noise.uniform("drop again", 0, ()) < 0.5
    c = system.transformer.conditioner(lesson.cond, null)
    S = student(system, u, c, layout, scales).logits
    where = torch.cat([torch.arange(layout.n)[layout.span(k)] for k in scales])
    wanted = u if target == "teacher" else lesson.tokens
    student_loss = F.cross_entropy(S.flatten(0, 2), wanted[:, where].flatten())
    teacher_loss = F.cross_entropy(T.flatten(0, 2), lesson.tokens.flatten())
    assert torch.allclose(found["teacher"], teacher_loss) and torch.allclose(found["student"], student_loss)
    assert torch.allclose(found["loss"], teacher_loss + 0.3 * student_loss)
    assert torch.allclose(found["agreement"].double(), (S.argmax(-1) == u[:, where]).double().mean())
    assert (null != (noise.uniform("drop", 0, ()) < 0.5)).any(), "the passes drop conditions by themselves"


def test_gradients_come_through_the_logits_of_each_pass_and_through_no_tokens(system, batch):
    noise = whole(system, batch)
    lesson, losses = system.lesson, {}

    def kept(b, n):
        found = lesson(b, n)
        found.predicted.logits.retain_grad()
        losses["lesson"] = found
        return found

    system.lesson = kept
    found = refine(system, batch, noise, RefinementConfig(sigma=1.0))
    teacher = of_losses(system, losses["lesson"].losses["loss"] + 0.0 * found["loss"].detach())
    assert losses["lesson"].predicted.logits.grad is not None
    found = refine(system, batch, noise, RefinementConfig(sigma=1.0))
    both = of_losses(system, found["loss"])
    expected = losses["lesson"].predicted.logits.grad.clone()
    plain = refine(system, batch, noise, RefinementConfig(sigma=0.0))
    none = of_losses(system, plain["loss"])
    assert torch.equal(losses["lesson"].predicted.logits.grad, expected), "the second pass reaches no teacher logits"
    assert all(torch.equal(none[n], teacher[n]) for n in teacher)
    moved = {n for n in teacher if not torch.allclose(both[n], teacher[n])}
    placed = {"position", "level.weight"} & dict(system.transformer.named_parameters()).keys()
    assert {"word.weight", "head.linear.weight", *placed} <= moved and "start_position" not in moved
    assert all(p.grad is None for p in system.tokenizer.encoder.parameters())


def test_with_a_weight_of_zero_training_is_bit_identical_to_teacher_forcing(system, batch, tmp_path):
    plain, refined, other = (copy.deepcopy(system.float()) for _ in range(3))
    batch = {**batch, "image": batch["image"].float()}
    config = FitConfig(steps=2, batch=3, lr=1e-2, precision="float32", compile=False)
    ends = []
    for name, s, loss in (
        ("plain", plain, plain.loss),
        ("refined", refined, lambda b, n: refine(refined, b, n, RefinementConfig(sigma=0.0, transitions="all"))),
        (
            "sigma",
            other := copy.deepcopy(system.float()),
            lambda b, n: refine(other, b, n, RefinementConfig(sigma=0.5)),
        ),
    ):
        fit(s.transformer, lambda b, n, loss=loss: chosen(loss(b, n)), lambda step: batch, config, tmp_path / name)
        ends.append(s.transformer.state_dict())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    assert any(not torch.equal(ends[0][n], ends[2][n]) for n in ends[0])


def chosen(losses):
    return {"loss": losses["loss"]}


def test_drawn_predictions_follow_the_guided_filtered_law(system, batch):
    with torch.no_grad():
        noise = whole(system, batch)
        lesson = system.lesson(batch, noise)
        layout = lesson.layout
        plain = RefinementConfig(draw=True, cfg_scale=1.0, top_k=0, top_p=0.0)
        own = lesson.predicted.sample(noise)
        assert torch.equal(predict(system, lesson, noise, plain), own)
        top = predict(system, lesson, noise, RefinementConfig(draw=True, cfg_scale=1.0, top_k=1))
        assert torch.equal(top, predict(system, lesson, noise, RefinementConfig()))
        guided = RefinementConfig(draw=True, cfg_scale=3.0, top_k=1)
        null = system.teacher(lesson.tokens, None, layout).logits
        t = (3.0 * 0.5 * (1 + layout.level_N.double() / (layout.K - 1)))[:, None, None]  # the same for all sub-tokens
        wanted = ((1 + t) * lesson.predicted.logits - t * null).argmax(-1)
        found = predict(system, lesson, noise, guided)
        assert torch.equal(found, wanted) and not torch.equal(found, top)


def test_one_scale_alone_is_refused(system, batch):
    with pytest.raises(ValueError, match="all of at least two are needed"):
        refine(system, {**batch, "levels": 1}, Noise.of(0, 3), RefinementConfig())


# -- by name ----------------------------------------------------------------------------------------------------------


def test_the_system_is_flexvar_whose_loss_is_refined():
    torch.manual_seed(0)
    system = sar.tiny().eval()
    batch = {"image": torch.rand(2, 3, 6, 6), "class_labels": [0, 1]}
    noise = Noise.of(3, 2)
    found = system.loss(batch, noise)
    assert {"teacher", "student", "agreement"} <= set(found)
    assert torch.allclose(found["loss"], found["teacher"] + 0.01 * found["student"])
    config = systems.preset("sar-d24")[2].config()
    assert config.base == systems.preset("flexvar-d24")[2].config() and config.refinement == RefinementConfig()
    assert config.refinement.sigma == 0.01 and not config.refinement.draw


@pytest.mark.parametrize("slug", MODELS)
def test_any_model_over_scales_is_refined_by_a_setting(slug, tmp_path, monkeypatch):
    """From a folder, as `arvis train NAME --init FOLDER --set objective=sar,..` does it."""
    system, config = built(slug)
    for kind in ("cat", "dog"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for i in range(2):
            picture(seed=i).save(tmp_path / "pictures" / kind / f"{i}.png")
    about = {"steps": 2, "batch": 2, "lr": 1e-2, "precision": "float32", "log_every": 1}
    preset = Preset(config=lambda: config, licence="MIT", training={"generator": about})
    monkeypatch.setitem(systems.system(slug).PRESETS, f"{slug}-tiny", preset)
    start = save_pretrained(system, to_dict(config), tmp_path / "start", system=slug)
    plain = recipes.request_for(f"{slug}-tiny", "generator", str(tmp_path / "pictures"), tmp_path / "run")
    text = "objective=sar,sigma=0.5,transitions=all"
    result = recipes.train(replace(recipes.changed(plain, [text]), init=start))
    assert {"teacher", "student", "agreement"} <= set(result.metrics)
    assert result.metrics["loss"] == pytest.approx(
        result.metrics["teacher"] + 0.5 * result.metrics["student"], rel=1e-4
    )
    assert recipes.resumed(tmp_path / "run").objective == ("sar", "sigma=0.5", "transitions=all")
    trained = read_pretrained(tmp_path / "run" / "model")
    assert trained.system == slug, "nothing changes at sampling: it is a model of its own system"


def test_objectives_that_are_none_are_refused(tmp_path):
    def asked(name, text):
        plain = recipes.request_for(name, "generator", "emoji", tmp_path / "run")
        return recipes.train(recipes.changed(plain, [text]))

    with pytest.raises(KeyError, match="no system is called 'sarr'"):
        asked("var-emoji-64", "objective=sarr")
    with pytest.raises(ValueError, match="the name of a training method, and 'mar' is none"):
        asked("var-emoji-64", "objective=mar")
    with pytest.raises(ValueError, match="trains models over scales that run on any inputs, and llamagen-emoji-64 is"):
        asked("llamagen-emoji-64", "objective=sar")
    with pytest.raises(ValueError, match="unknown option sigmaa"):
        asked("var-emoji-64", "objective=sar,sigmaa=1")


def test_which_systems_can_be_refined():
    assert all(isinstance(built(slug)[0], Staged) for slug in ("flexvar", "sar", "var", "brush", "infinity"))
    assert not isinstance(built("llamagen")[0], Staged)


def test_bits_are_flipped_by_the_model_alone():
    """The lesson has the tokens of the picture, whatever the loss flips; codes of many bits cannot be put back."""
    config = replace(built("infinity")[1], flip_strength=0.5)
    system = infinity.build(config).eval()
    batch, noise = {"image": torch.rand(3, 3, 8, 8), **REQUEST}, Noise.of(1, 3)
    lesson = system.lesson(batch, noise)
    assert torch.equal(lesson.tokens, system.tokenizer.encode(batch["image"]))
    steady = copy.deepcopy(system)
    steady.config = replace(config, flip_strength=0.0)
    assert torch.equal(lesson.losses["loss"], steady.loss(batch, noise)["loss"])
    assert not torch.equal(lesson.losses["loss"], system.loss(batch, noise)["loss"])
    with pytest.raises(ValueError, match="put back as bits, and this model has labels='codes'"):
        infinity.build(replace(config, labels="codes")).lesson(batch, noise)
