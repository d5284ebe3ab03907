"""Collaborative decoding: whose law each scale follows, what is handed over and kept, for several kinds of models."""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from arvis.config import from_dict, to_dict
from arvis.laws import Case, examine, laws_of
from arvis.laws.case import REQUEST
from arvis.noise import Noise
from arvis.state import State
from arvis.systems import system as module_of
from arvis.systems.code import (
    PRESETS,
    CodeConfig,
    CodeSampling,
    Collaborative,
    ModelConfig,
    build,
    collaborate,
    coupled,
    described,
    distilled,
    specialised,
    tiny,
)
from arvis.tokens import Pin, at
from arvis.walk import finish, generate, likelihood, walk
from chance import chi_square
from small import built

KINDS = ("var", "brush", "infinity")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def models(kind: str, count: int = 2, strength: float = 0.3):
    """Different models of a kind over one tokenizer, in float64, whose weights are strong enough to differ much."""
    torch.manual_seed(0)
    found = [module_of(kind).tiny().double().eval() for _ in range(count)]
    for model in found:
        model.tokenizer = found[0].tokenizer
        for p in model.transformer.parameters():
            p.add_(torch.randn_like(p), alpha=strength)
    return found


def drawn(system, sampling, seed=3, items=3, **more) -> State:
    return finish(generate(system, system.prepare(REQUEST), sampling, Noise.of(seed, items), **more))


# -- the law of a pair -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_hands_over_to_itself_draws_what_it_draws_alone(kind):
    """Fails if a token, a guidance weight, a number of the noise or a cached row is lost at the hand-over."""
    model, other = models(kind)
    plain = drawn(model, model.Sampling()).tokens
    assert not torch.equal(plain, drawn(other, model.Sampling()).tokens)
    for handover in (1, 2):
        assert torch.equal(drawn(collaborate(model, model, handover), model.Sampling()).tokens, plain)
        assert not torch.equal(drawn(collaborate(model, other, handover), model.Sampling()).tokens, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_keep_the_laws(kind):
    def make(seed):
        drafter, refiner = models(kind, strength=0.1 + 0.1 * seed)
        return collaborate(drafter, refiner, 2)

    case = Case(name=f"a pair of {kind}", make=make, request=REQUEST)
    laws = laws_of(case)
    assert {"blind", "cache", "mass", "gather", "prefill", "seed", "row"} <= set(laws)
    for law in laws:
        assert examine(case, law)


@pytest.mark.parametrize("kind", KINDS)
def test_the_law_is_the_drafters_on_its_scales_and_the_refiners_on_the_others(kind):
    drafter, refiner = models(kind)
    layout = drafter.tokenizer.layout()
    tokens, cond = drawn(refiner, refiner.Sampling.plain()).tokens, drafter.prepare(REQUEST)
    ours = drafter.teacher(tokens, cond).log_prob(tokens)
    theirs = refiner.teacher(tokens, cond).log_prob(tokens)
    for handover in (1, 2):
        n, pair = layout.offsets[handover], collaborate(drafter, refiner, handover)
        wanted = ours[:, :n].sum(1) + theirs[:, n:].sum(1)
        torch.testing.assert_close(likelihood(pair, tokens, cond, Noise.of(0, 3)), wanted)
        torch.testing.assert_close(pair.teacher(tokens, cond).log_prob(tokens).sum(1), wanted)
        assert float((wanted - theirs.sum(1)).abs().max()) > 1e-3


def test_what_is_drawn_follows_both_laws():
    """The first token is the drafter's, the last scale given what was drawn is the refiner's: by chi-square."""
    drafter, refiner = models("var", strength=0.5)
    pair, items = collaborate(drafter, refiner, 1), 4000
    cond = {"class_labels": torch.ones(items, dtype=torch.int64)}
    s = finish(generate(pair, cond, CodeSampling.plain(), Noise.of(5, items)))
    one = {"class_labels": torch.ones(1, dtype=torch.int64)}
    first = drafter.teacher(s.tokens[:1], one).probs[0, 0, 0]
    other = refiner.teacher(s.tokens[:1], one).probs[0, 0, 0]
    counts = torch.bincount(s.tokens[:, 0, 0], minlength=5)
    assert chi_square(counts, first) > 0.01 > chi_square(counts, other)
    prefix = s.tokens[:1, :5].expand(items, -1, -1)
    given = Pin(torch.arange(14)[None].expand(items, -1) < 5, torch.cat((prefix, torch.zeros(items, 9, 1).long()), 1))
    s = finish(generate(pair, cond, CodeSampling.plain(), Noise.of(6, items), given=given))
    wanted, other = (m.teacher(s.tokens[:1], one).probs[0, 5, 0] for m in (refiner, drafter))
    counts = torch.bincount(s.tokens[:, 5, 0], minlength=5)
    assert chi_square(counts, wanted) > 0.01 > chi_square(counts, other)


def test_three_models_in_a_chain():
    a, b, c = models("var", 3)
    chain = Collaborative({"a": a, "b": b, "c": c}, (1, 2)).eval()
    assert set(chain.parts()) == {"tokenizer", "a", "b", "c"}
    tokens, cond = drawn(chain, a.Sampling()).tokens, a.prepare(REQUEST)
    rows = [m.teacher(tokens, cond).log_prob(tokens) for m in (a, b, c)]
    wanted = sum(row[:, span].sum(1) for row, span in zip(rows, (slice(0, 1), slice(1, 5), slice(5, 14)), strict=True))
    torch.testing.assert_close(likelihood(chain, tokens, cond, Noise.of(0, 3)), wanted)
    assert torch.equal(
        drawn(Collaborative({"a": a, "b": a, "c": a}, (1, 2)), a.Sampling()).tokens, drawn(a, a.Sampling()).tokens
    )


# -- the hand-over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("handover", [1, 2])
def test_the_refiner_reads_what_was_drafted_in_one_pass_and_each_scale_once(kind, handover):
    drafter, refiner = models(kind)
    pair, layout, rows = collaborate(drafter, refiner, handover), drafter.tokenizer.layout(), {}
    for name, model in (("drafter", drafter), ("refiner", refiner)):
        rows[name] = []
        model.transformer.trunk.register_forward_pre_hook(lambda m, x, name=name: rows[name].append(x[0].shape[1]))
    drawn(pair, drafter.Sampling.plain())
    assert rows["drafter"] == list(layout.sizes[:handover])
    assert rows["refiner"] == [layout.offsets[handover + 1], *layout.sizes[handover + 1 :]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_drafters_cache_is_gone_and_was_never_larger_than_its_scales(kind):
    drafter, refiner = models(kind)
    pair = collaborate(drafter, refiner, 2)
    s = pair.start(pair.prepare(REQUEST), drafter.Sampling.plain(), Noise.of(0, 3))
    layout, first = s.layout, s.cache["trunk"]
    for step in walk(pair, s):
        if step.k < 2:
            assert s.cache["trunk"] is first and first.slots == layout.offsets[2] and s.then is not None
        if step.k == 2:
            assert s.cache["trunk"] is not first and s.then is None and s.cache["trunk"].end == 0
    assert s.cache["trunk"].slots == layout.offsets[-2]


def test_a_prefix_that_reaches_beyond_the_hand_over_is_the_refiners_from_the_start():
    drafter, refiner = models("var")
    tokens = drawn(drafter, drafter.Sampling()).tokens
    pair, known = collaborate(drafter, refiner, 1), torch.arange(14)[None].expand(3, -1) < 5
    s = pair.start(pair.prepare(REQUEST), CodeSampling(), Noise.of(0, 3), given=Pin(known, tokens))
    assert s.at() == 2 and s.then is None
    alone = refiner.start(pair.prepare(REQUEST), refiner.Sampling.plain(), Noise.of(0, 3), given=Pin(known, tokens))
    s.weights = alone.weights = (
        torch.tensor([1.0, 0.0]).expand(3, 3, 2) if alone.weights.shape[2] > 1 else alone.weights
    )
    plain = replace(CodeSampling.plain())
    s = pair.start(pair.prepare(REQUEST), plain, Noise.of(0, 3), given=Pin(known, tokens))
    torch.testing.assert_close(pair.predict(s).logits, refiner.predict(alone).logits)


def test_models_that_do_not_go_together_are_refused():
    drafter, refiner = models("var")
    for wrong in ((), (0,), (3,), (2, 2), (1, 2)):
        with pytest.raises(ValueError, match=r"2 models over 3 scales need 1 growing hand-overs between 1 and 2, got"):
            Collaborative({"a": drafter, "b": refiner}, wrong)
    other = module_of("var").tiny().double()
    with pytest.raises(ValueError, match="share tokenizer and conditions, and 'refiner' has others than 'drafter'"):
        collaborate(drafter, other, 1)
    other.tokenizer = copy.deepcopy(drafter.tokenizer)
    assert collaborate(drafter, other, 1).tokenizer is other.tokenizer
    with pytest.raises(ValueError, match="share tokenizer and conditions"):
        collaborate(drafter, models("brush")[0], 1)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_temperature_comes_after_the_filters_and_each_scale_has_its_own():
    drafter, refiner = models("var")
    pair, cond = collaborate(drafter, refiner, 2), drafter.prepare(REQUEST)
    plain, seen = replace(CodeSampling.plain(), cfg_scale=2.0), {}
    settings = {"cool": (0.1, 0.5, 1.0), "hot": (7.0, 0.5, 1.0)}
    tokens = drawn(pair, plain).tokens
    for name, temperature in [("raw", (1.0,)), *settings.items()]:
        own = plain if name == "raw" else replace(plain, top_k=(4, 5, 2), top_p=0.7, temperature=temperature)
        s, seen[name] = pair.start(cond, own, Noise.of(0, 3)), []
        while not bool(s.done.all()):
            d = pair.predict(s)
            seen[name].append(d.logits)
            pair.commit(s, d, at(tokens, d.where))
    for k, t in ((0, (0.1, 7.0)), (1, (0.5, 0.5)), (2, (1.0, 1.0))):
        cool, hot, raw = seen["cool"][k], seen["hot"][k], seen["raw"][k]
        kept = cool.isfinite()
        assert torch.equal(kept, hot.isfinite()) and 0 < kept.sum() < kept.numel()
        torch.testing.assert_close(cool[kept], raw[kept] / t[0])
        torch.testing.assert_close(hot[kept], raw[kept] / t[1])
    assert seen["cool"][2].isfinite().sum(-1).max() <= 2 < seen["cool"][1].isfinite().sum(-1).max()
    with pytest.raises(ValueError, match="temperature has one number for all scales or one for each of 3, got 2"):
        pair.start(cond, replace(plain, temperature=(1.0, 1.0)), Noise.of(0, 3))


# -- training ----------------------------------------------------------------------------------------------------------


def test_each_model_learns_its_own_scales():
    torch.manual_seed(0)
    pair = tiny()
    drafter, refiner = pair._models
    tokens, noise = torch.randint(5, (4, 14, 1)), Noise.of(2, 4)
    batch = {"tokens": tokens, "class_labels": [0, 1, 2, 0]}
    null = noise.uniform("drop", 0, ()) < 0.6
    assert bool(null.any()) and not bool(null.all())
    pair.label_drop = drafter.label_drop = 0.6
    labels = torch.where(null, 3, torch.tensor(batch["class_labels"]))
    nats = [-m.teacher(tokens, {"class_labels": labels}).log_prob(tokens) for m in (drafter, refiner)]
    with torch.enable_grad():
        out = pair.loss(batch, noise)
        out["loss"].backward()
    torch.testing.assert_close(out["loss"].detach(), nats[0][:, :5].mean() + nats[1][:, 5:].mean())
    torch.testing.assert_close(out["nats_2"], nats[1][:, 5:].mean())
    assert {f"nats_{k}" for k in range(3)} <= set(out)
    positions = {
        name: pair.get_parameter(f"{name}.position").grad[0].abs().sum(1) > 0 for name in ("drafter", "refiner")
    }
    assert positions["drafter"].tolist() == [True] * 5 + [False] * 9 and positions["refiner"].all()
    assert torch.equal(
        pair.loss({**batch, "levels": 1}, noise)["loss"], drafter.loss({**batch, "levels": 1}, noise)["loss"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_is_its_formula(kind):
    teacher, student = models(kind)
    layout, cond = teacher.tokenizer.layout(), teacher.prepare(REQUEST)
    tokens, null = drawn(teacher, teacher.Sampling.plain()).tokens, torch.tensor([False, True, False])
    n = layout.offsets[1]
    z, w = ([m.teacher(tokens, cond).logits, m.teacher(tokens, None).logits] for m in (student, teacher))
    z, w = (torch.where(null[:, None, None, None], x[1], x[0])[:, n:] for x in (z, w))
    p = (w / 2).softmax(-1)
    divergence = 4 * (p * (p.log() - (z / 2).log_softmax(-1))).sum(-1)
    cross = -z.log_softmax(-1).gather(-1, tokens[:, n:, :, None])[..., 0]
    found = distilled(student, teacher, tokens, cond, null, 1, layout, temperature=2.0, alpha=0.25)
    torch.testing.assert_close(found, 0.25 * divergence + 0.75 * cross)
    assert float(divergence.min()) >= 0 and float(divergence.max()) > 0.01
    only = distilled(teacher, teacher, tokens, cond, null, 1, layout, alpha=1.0)
    torch.testing.assert_close(only, torch.zeros_like(only))
    torch.testing.assert_close(specialised(student, tokens, cond, null, 1, layout.K, layout), cross.sum(-1))


# -- the published sizes -----------------------------------------------------------------------------------------------


def test_presets_are_the_official_pairs():
    var = module_of("var").PRESETS
    for n in (6, 7, 8, 9):
        config = PRESETS[f"code-{n}"].config()
        assert config.handover == n
        for own, name in ((config.drafter, "var-d30"), (config.refiner, "var-d16")):
            assert own.module is module_of("var") and own.config == var[name].config()
    large, small = (Named("var", var[name].config()) for name in ("var-d30", "var-d16"))
    assert coupled(large, small, 8) == PRESETS["code-8"].config()


# -- any two presets ---------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    """As much of a loaded model as a pair has to know."""

    slug: str
    config: Any


@pytest.mark.parametrize("slug", ["var", "m-var", "flexvar", "infinity", "star", "hmar"])
def test_a_configuration_is_a_preset_and_its_changes(slug):
    """The tiny ones, whose tokenizers, encoders and sizes are none of the presets'."""
    found = described(slug, built(slug)[1])
    assert found.config == built(slug)[1] and found.module is module_of(slug) and found.changes
    assert from_dict(ModelConfig, to_dict(found)) == found
    for name, published in module_of(slug).PRESETS.items():
        assert described(slug, published.config()).config == published.config(), name


@pytest.mark.parametrize(("a", "b"), [("var", "m-var"), ("m-var", "var"), ("hmar", "var"), ("brush", "brush")])
def test_models_of_two_systems_over_one_tokenizer_are_a_pair(a, b):
    """Each draws its own scales by its own law, whatever class it is of."""
    large, small = (described(slug, built(slug)[1]) for slug in (a, b))
    pair = build(CodeConfig(drafter=large, refiner=small, handover=2)).double().eval()
    drafter, refiner = pair.models.values()
    assert [type(m) for m in (drafter, refiner)] == [type(built(slug)[0]) for slug in (a, b)]
    for model in (drafter, refiner):
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    s = drawn(pair, CodeSampling.plain())
    cond, n = pair.prepare(REQUEST), s.layout.offsets[2]
    ours, theirs = (m.teacher(s.tokens, cond).log_prob(s.tokens) for m in (drafter, refiner))
    wanted = ours[:, :n].sum(1) + theirs[:, n:].sum(1)
    torch.testing.assert_close(likelihood(pair, s.tokens, cond, Noise.of(0, 3)), wanted)
    assert float((wanted - theirs.sum(1)).abs().max()) > 1e-3


def test_both_models_have_the_classes_of_the_pair():
    large, small = (described(slug, built(slug)[1]) for slug in ("var", "m-var"))
    config = CodeConfig(drafter=large, refiner=small, handover=2, num_classes=7)
    for model in build(config).models.values():
        assert model.transformer.conditioner.num_classes == 7
    assert build(replace(config, num_classes=0)).models["refiner"].transformer.conditioner.num_classes == 3


def test_presets_of_two_tokenizers_are_no_pair():
    large, small = (described(slug, built(slug)[1]) for slug in ("var", "brush"))
    with pytest.raises(ValueError, match="share tokenizer and conditions, and 'refiner' has others than 'drafter'"):
        build(CodeConfig(drafter=large, refiner=small, handover=2))
    with pytest.raises(KeyError, match="no model is called 'var-d17'"):
        build(CodeConfig(drafter=ModelConfig(preset="var-d17"), refiner=small, handover=2))


def test_two_trained_models_become_one_folder(tmp_path):
    from arvis.model import Model, load

    tiny = built("var")[1]
    large, small = (Named("var", replace(tiny, depth=depth)) for depth in (3, 2))
    a, b = (module_of("var").build(named.config) for named in (large, small))
    b.tokenizer = a.tokenizer
    config = coupled(large, small, 1)
    pair = Model(collaborate(a, b, 1), slug="code", name="mine", config=config, settings={"top_k": (3,)}, source={})
    pair.save_pretrained(tmp_path / "pair")
    again = load(tmp_path / "pair")
    assert again.settings["top_k"] == [3] and again.config == config
    pictures = [m.generate(class_labels=1, n=2)[1].tobytes() for m in (pair, again)]
    assert pictures[0] == pictures[1]
