"""Training by name: both stages, what a run folder keeps, fine-tuning, and what is refused before the work."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import arvis
from arvis import recipes, systems
from arvis.data import open_data
from arvis.data.images import to_pil, to_tensor
from arvis.weights import read_pretrained
from small import built, picture, small


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
    asked = request_for(set=("scale.label_drop=0.25",), fit=replace(request_for().fit, minutes=1e-6))
    assert recipes.train(asked).stopped == "time"
    again = recipes.resumed(tmp_path / "tokenizer")
    assert again is not None and again.resume and again.fit.minutes is None
    assert (again.stage, again.data, again.name) == ("tokenizer", asked.data, "brush-64")
    assert again.config.scale.label_drop == 0.25 and again.fit.steps == 2 and again.loss == asked.loss
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


def test_fine_tuning_continues_the_generator_with_its_own_tokenizer(pictures, tmp_path):
    model = small("brush")
    model.settings = {"cfg_scale": 0.5}
    start = model.save_pretrained(tmp_path / "start")
    asked = recipes.finetuning(model, pictures, tmp_path / "run", start)
    assert asked.config == model.config and asked.fit.batch <= 64
    assert asked.fit.lr < recipes.request_for("brush", "generator", "", tmp_path).fit.lr
    recipes.train(replace(asked, fit=replace(asked.fit, steps=2, batch=2, precision="float32")))
    end = arvis.load(tmp_path / "run" / "model")
    assert end.settings == {"cfg_scale": 0.5} and end.config == model.config
    own, trained = model.system.state_dict(), end.system.state_dict()
    assert all(torch.equal(own[name], trained[name]) for name in own if name.startswith("tokenizer."))
    assert any(not torch.equal(own[name], trained[name]) for name in own if name.startswith("transformer."))


def test_the_quality_of_a_tokenizer_is_the_mean_over_pictures(pictures):
    model = small("brush")
    data = open_data(str(pictures), 24)
    found = recipes.tokenizer_psnr(model.system, data, most=4)
    values = []
    for i in range(4):
        original = data[i]["image"].float()
        back = to_tensor(model.reconstruct([to_pil(data[i]["image"])])[0]).float()
        values.append(float(10 * torch.log10(255**2 / (original - back).square().mean())))
    assert found == pytest.approx(sum(values) / 4, abs=1e-3)


def test_labels_without_a_class_are_refused_before_the_first_step(request_for, pictures, tmp_path):
    for i in range(9):
        (pictures / f"more{i}").mkdir()
        Image.new("RGB", (24, 24)).save(pictures / f"more{i}" / "a.png")
    start = small("var").save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=r"class_labels lie in 0\.\.\d"):
        recipes.train(request_for("generator", "var", init=start))
    assert not (tmp_path / "generator" / "config.json").exists()


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        ("generator", {}, "--init"),
        ("generator", {"init": "here", "size": 32}, "paints pictures of 24 pixels, got size=32"),
        ("tokenizer", {"size": 25}, "multiples of 8"),
        ("tokenizer", {"levels": -1}, "levels is how many"),
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


def test_frozen_parts_keep_their_weights(request_for, tmp_path):
    start = small("brush").save_pretrained(tmp_path / "start")
    recipes.train(request_for(init=start, freeze=("encoder", "quant")))
    own, end = read_pretrained(start).tensors, read_pretrained(tmp_path / "tokenizer" / "model").tensors
    parameters = dict(small("brush").system.named_parameters())  # counts of used codes are none, and go on
    changed = {name for name in parameters if not torch.equal(own[name], end[name])}
    assert changed and all(name.startswith("tokenizer.decoder") for name in changed), changed
