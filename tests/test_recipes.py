"""Training by name: both stages, what a run folder keeps, fine-tuning, and what is refused before the work."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import arvis
from arvis import loading, recipes, systems
from arvis.data import latents
from arvis.nn.lora import LoraConfig
from arvis.training import checkpoint, metrics
from arvis.weights import read_pretrained
from small import built, picture, small

REGISTERED = [slug for slug, row in systems.SYSTEMS.items() if row.kind == "system"]


@pytest.fixture
def pictures(tmp_path):
    """Two classes of three pictures each."""
    for kind in ("cat", "red_dog"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for i in range(3):
            picture(seed=i).save(tmp_path / "pictures" / kind / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def request_for(tmp_path, pictures):
    """Requests for two updates of a tiny system."""

    def make(stage="tokenizer", slug="brush", **changes):
        plain = recipes.request_for(slug, stage, str(pictures), tmp_path / stage)
        fit = replace(plain.fit, steps=2, batch=2, warmup=0, precision="float32", lr=1e-3, compile=False)
        return replace(plain, **{"fit": fit, "config": built(slug)[1], **changes})

    return make


def test_a_tokenizer_then_a_generator_then_pictures(request_for, tmp_path):
    first = recipes.train(request_for())
    assert (first.step, first.stopped) == (2, "done")
    start = read_pretrained(tmp_path / "tokenizer" / "model").tensors
    recipes.train(request_for("generator", init=tmp_path / "tokenizer" / "model"))
    end = read_pretrained(tmp_path / "generator" / "model")
    changed = {name.partition(".")[0] for name, t in end.tensors.items() if not torch.equal(t, start[name])}
    assert changed == {"transformer"}, "the tokenizer is frozen, the generator learns"
    assert end.source["steps"] == 2 and end.source["sampling"] == systems.preset("brush")[2].sampling
    model = arvis.load(tmp_path / "generator" / "model")
    assert model.name == "brush-64" and model.settings["cfg_scale"] == 2.0
    assert model.generate("cat")[0].size == (24, 24)
    assert (tmp_path / "generator" / "report.html").is_file()


def test_a_resumed_run_knows_its_request(request_for, tmp_path):
    fit, lora = replace(request_for().fit, minutes=1e-6), LoraConfig(rank=3, targets=("ffn",))
    more = {"flip": True, "lora": lora, "base": "x", "cache": "off", "only": ("decoder",), "pictures": {"a.png": "b"}}
    asked = request_for(set=("scale.label_drop=0.25",), fit=fit, **more)
    assert recipes.train(asked).stopped == "time"
    again = recipes.resumed(tmp_path / "tokenizer")
    assert again is not None and again.resume and again.fit.minutes is None
    assert again.lora == lora and again.pictures == {"a.png": "b"}
    assert (again.stage, again.data, again.name) == ("tokenizer", asked.data, "brush-64")
    assert again.config.scale.label_drop == 0.25 and again.fit.steps == 2 and again.kept() == asked.kept()
    assert recipes.train(again).stopped == "done"


def test_a_run_of_an_early_version_keeps_no_request(request_for, tmp_path):
    recipes.train(request_for())
    path = tmp_path / "tokenizer" / "config.json"
    saved = json.loads(path.read_text())
    del saved["request"]
    path.write_text(json.dumps(saved))
    assert recipes.resumed(tmp_path / "tokenizer") is None
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        recipes.resumed(tmp_path / "elsewhere")


def test_labels_without_a_class_are_refused_before_the_first_step(request_for, pictures, tmp_path):
    for i in range(9):
        (pictures / f"more{i}").mkdir()
        Image.new("RGB", (24, 24)).save(pictures / f"more{i}" / "a.png")
    start = small("var").save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=r"has 11 classes, the model has 3; --set model\.num_classes=11"):
        recipes.train(request_for("generator", "var", init=start))
    assert not (tmp_path / "generator" / "config.json").exists()


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        ("generator", {}, "--init"),
        ("generator", {"init": "here", "size": 32}, "paints pictures of 24x24 pixels, got size=32"),
        ("tokenizer", {"size": 25}, "multiples of 8"),
        ("tokenizer", {"levels": -1}, "levels is how many"),
        ("tokenizer", {"levels": 4}, "0 \\(all\\) to 3, got 4"),
        ("tokenizer", {"crops": 0}, "1 to 5, got 0"),
        ("tokenizer", {"only": ("nothing",)}, "only=nothing"),
        ("tokenizer", {"data": "nowhere"}, "no data set 'nowhere'"),
        ("tokenizer", {"device": "toaster"}, "no device 'toaster'"),
        ("tokenizer", {"set": ("scale.dept=1",)}, r"did you mean scale\.depth"),
    ],
)
def test_requests_that_cannot_be_met(request_for, tmp_path, stage, changes, told):
    with pytest.raises(ValueError, match=told):
        recipes.train(request_for(stage, **changes))
    assert not (tmp_path / stage / "config.json").exists(), "nothing is left behind that stands in the way"


def test_a_run_is_not_overwritten(request_for):
    recipes.train(request_for())
    with pytest.raises(FileExistsError, match="already holds a run"):
        recipes.train(request_for())


@pytest.mark.parametrize("frozen", [{"freeze": ("encoder", "quant")}, {"only": ("tokenizer.decoder.",)}])
def test_frozen_parts_keep_their_weights(request_for, tmp_path, frozen):
    """Dead codes are not revived either: tokens keep their meaning."""
    start = small("brush").save_pretrained(tmp_path / "start")
    recipes.train(request_for(init=start, **frozen, loss=replace(request_for().loss, revive_every=1)))
    own, end = read_pretrained(start).tensors, read_pretrained(tmp_path / "tokenizer" / "model").tensors
    parameters = dict(small("brush").system.named_parameters())  # counts of used codes are none, and go on
    changed = {name for name in parameters if not torch.equal(own[name], end[name])}
    assert changed and all(name.startswith("tokenizer.decoder") for name in changed), changed


def test_a_run_of_its_own_learns_the_codebook(request_for, tmp_path):
    """The counterpart of the frozen one: with revivals the codes move."""
    start = small("brush").save_pretrained(tmp_path / "start")
    recipes.train(request_for(init=start, loss=replace(request_for().loss, revive_every=1)))
    own, end = read_pretrained(start).tensors, read_pretrained(tmp_path / "tokenizer" / "model").tensors
    name = "tokenizer.quantize.embedding.weight"
    assert not torch.equal(own[name], end[name])


# -- encoded once -----------------------------------------------------------------------------------------------------


def finals(run):
    return checkpoint.load(checkpoint.paths(run)[-1]).model


@pytest.mark.parametrize("slug", REGISTERED)
def test_encoded_once_is_encoding_each_time(request_for, slug, tmp_path, monkeypatch):
    """The same weights, bit for bit, with half the pictures mirrored; and pictures are encoded before, not again."""
    start, told, calls = small(slug).save_pretrained(tmp_path / "start"), [], []
    for cache in ("on", "off"):
        asked = request_for("generator", slug, init=start, cache=cache, flip=True, run=tmp_path / cache)
        recipes.train(asked, on_picture=lambda n, total: told.append((n, total)))
    assert told[-1] == (12, 12), "six pictures and their mirror images"
    a, b = finals(tmp_path / "on"), finals(tmp_path / "off")
    assert all(torch.equal(a[name], b[name]) for name in b)
    monkeypatch.setattr(latents, "_write", lambda *args: calls.append(args))
    again = recipes.resumed(tmp_path / "on")
    recipes.train(replace(again, fit=replace(again.fit, steps=3)))
    assert not calls, "a resumed run finds them"
    other = replace(again, fit=replace(again.fit, steps=4), flip=False)
    with pytest.raises(FileNotFoundError):
        recipes.train(other)
    assert calls, "other pictures are encoded anew"


def test_whether_encoding_once_pays(request_for, tmp_path):
    start = small("brush").save_pretrained(tmp_path / "start")
    for steps, there in ((5, False), (6, True)):
        asked = request_for("generator", init=start, run=tmp_path / str(steps))
        recipes.train(replace(asked, fit=replace(asked.fit, steps=steps)))
        assert (tmp_path / str(steps) / "latents").is_dir() == there, "six pictures, two a step"


# -- what a run shows -------------------------------------------------------------------------------------------------


def test_samples_use_the_settings_of_the_preset(request_for, tmp_path, monkeypatch):
    from arvis.recipes import stages

    start, seen = small("brush").save_pretrained(tmp_path / "start"), []
    real = stages.generate
    monkeypatch.setattr(stages, "generate", lambda s, c, sampling, n: seen.append(sampling) or real(s, c, sampling, n))
    recipes.train(request_for("generator", init=start, sampling={"cfg_scale": 0.5, "top_k": 3, "unknown": 1}))
    assert seen and all((s.cfg_scale, s.top_k, s.top_p) == (0.5, 3, 0.96) for s in seen)


def test_held_out_pictures_are_measured(request_for, tmp_path, pictures):
    for i in range(40):
        picture(seed=50 + i).save(pictures / "cat" / f"more{i}.png")
    start = small("brush").save_pretrained(tmp_path / "start")
    for stage, name, init in (("tokenizer", "psnr", None), ("generator", "loss", start)):
        asked = request_for(stage, init=init)
        recipes.train(replace(asked, fit=replace(asked.fit, steps=4, sample_every=2)), before=True)
        rows = [r for r in metrics.read(tmp_path / stage) if f"{name}_heldout" in r]
        assert [r["step"] for r in rows] == [0, 2, 4] and all(f"{name}_seen" in r for r in rows)
        page = (tmp_path / stage / "report.html").read_text()
        assert "on pictures held out (dashed)" in page and 'class="second"' in page
        assert {p.name for p in (tmp_path / stage / "samples").iterdir()} == {f"{k:06}.png" for k in (0, 2, 4)}


def test_changes_of_a_request(tmp_path):
    plain = recipes.request_for("brush", "generator", "emoji", tmp_path)
    assert plain.fit.sample_every == plain.fit.steps // 10
    asked = recipes.changed(plain, ("fit.lr=1e-4", "model.scale.depth=3", "lora.rank=4"), 100)
    assert (asked.fit.steps, asked.fit.warmup, asked.fit.sample_every, asked.fit.lr) == (100, 20, 10, 1e-4)
    assert asked.settled.scale.depth == 3 and asked.lora.rank == 4
    with pytest.raises(ValueError, match="did you mean"):
        recipes.changed(plain, ("lora.rnak=4",))


def test_a_bare_system_means_its_small_preset():
    assert recipes.trainable("brush") == "brush-64" and recipes.trainable("var") == "var-emoji-64"
    assert recipes.trainable("var-d16") == "var-d16"
    assert recipes.default_data("var-emoji-64") == "emoji" and recipes.default_data("brush-64") == "emoji+scenes"


@pytest.mark.parametrize("slug", REGISTERED)
def test_every_system_has_a_small_preset_for_both_stages(slug):
    """What `arvis train SLUG` trains: 64 pixels, no official files, settings for both stages."""
    name = recipes.trainable(slug)
    preset = systems.preset(name)[2]
    assert not preset.files and {"tokenizer", "generator"} <= preset.training.keys()
    with torch.device("meta"):
        system = systems.system(slug).build(preset.config())
    assert loading.picture_size(system) == (64, 64)
    plan = recipes.plan_for(name, "emoji")
    assert plan.request("generator", Path("x")).fit.steps > 0
    if "class_labels" in system.conditions:
        assert recipes.class_count(plan.request("tokenizer", Path("x")).settled) >= 9
