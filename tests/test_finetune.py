"""A model continued on a folder: what is said first, what learns, new classes, adapters and the files they leave."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import arvis
from arvis import recipes, systems
from arvis.config import to_dict
from arvis.data.folders import open_folder
from arvis.data.images import read_image, to_pil, to_tensor
from arvis.noise import Noise
from arvis.recipes.finetune import Fidelity
from arvis.training import metrics
from arvis.weights import read_adapters, read_pretrained
from small import built, picture, small

REGISTERED = [slug for slug, row in systems.SYSTEMS.items() if row.kind == "system"]
CLASSY = [slug for slug in REGISTERED if "class_labels" in built(slug)[0].conditions]


@pytest.fixture
def folder(tmp_path):
    """Two classes of three pictures each."""
    for kind in ("cat", "red_dog"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for i in range(3):
            picture(seed=i).save(tmp_path / "pictures" / kind / f"{i}.png")
    return tmp_path / "pictures"


def request(model, folder, run, **changes):
    """Two quick updates."""
    asked = recipes.finetuning(model, open_folder(folder, max(model.size)), folder, run, **changes)
    fit = replace(asked.fit, steps=2, batch=2, warmup=0, precision="float32", compile=False, lr=1e-2)
    return replace(asked, fit=fit, base=str(run / "start"))


# -- what is said first -----------------------------------------------------------------------------------------------


def test_the_quality_of_a_tokenizer_is_that_of_each_picture(folder, tmp_path):
    model = small("brush")
    pictures = open_folder(folder, 24)
    found = recipes.fidelity(model.system, pictures)
    values = []
    for i in range(6):
        original = pictures[i]["image"].float()
        back = to_tensor(model.reconstruct([to_pil(pictures[i]["image"])])[0]).float()
        values.append(float(10 * torch.log10(255**2 / (original - back).square().mean())))
    assert found.values == pytest.approx(values, abs=1e-3) and found.mean == pytest.approx(sum(values) / 6)
    assert found.worst == pictures.name(values.index(min(values)))
    found.save(tmp_path / "new" / "pairs.png")
    sheet = read_image(tmp_path / "new" / "pairs.png")
    assert sheet.size == (6 * 26 - 2, 50)
    worst = pictures[values.index(min(values))]["image"]
    assert torch.equal(to_tensor(sheet.crop((0, 0, 24, 24))), worst), "the worst one comes first"
    assert sheet.crop((0, 26, 24, 50)).tobytes() == model.reconstruct([to_pil(worst)])[0].tobytes()


def test_the_verdict_has_numbers_and_says_what_to_do():
    bad = Fidelity(values=(22.0, 20.0), worst="cat/1.png", pairs=torch.zeros(2, 3, 4, 4)).sentence
    assert bad.startswith("the tokenizer is the bottleneck at 21.0 dB: ") and "20.0 dB at worst (cat/1.png)" in bad
    assert "--stage tokenizer" in bad
    good = Fidelity(values=(30.0,), worst="a.png", pairs=torch.zeros(2, 3, 4, 4)).sentence
    assert good.startswith("the tokenizer is good enough") and "bottleneck" not in good


def test_the_outcome_tells_overfitting(tmp_path):
    assert recipes.outcome(tmp_path) == ""
    for step, held in ((0, 5.0), (10, 4.0), (20, 4.6)):
        metrics.append(tmp_path, {"step": step, "loss_seen": 5.0 - step / 10, "loss_heldout": held})
    told = recipes.outcome(tmp_path)
    assert "5.00 -> 3.00 on pictures it learned from, 5.00 -> 4.60 on pictures held out" in told
    assert "best at step 10" in told
    metrics.append(tmp_path, {"step": 30, "loss_seen": 1.0, "loss_heldout": 3.9})
    assert "best" not in recipes.outcome(tmp_path)


# -- what learns ------------------------------------------------------------------------------------------------------


def test_the_generator_goes_on_with_its_own_tokenizer(folder, tmp_path):
    model = small("brush")
    model.settings = {"cfg_scale": 0.5}
    asked = request(model, folder, tmp_path / "run")
    plain = recipes.request_for("brush", "generator", "", tmp_path)
    raw = recipes.finetuning(model, open_folder(folder, 24), folder, tmp_path / "run")
    assert raw.fit.batch <= 64 and raw.fit.lr == plain.fit.lr / 5 and not raw.lora.rank
    thin = recipes.finetuning(model, open_folder(folder, 24), folder, tmp_path / "run", lora=2)
    assert thin.fit.lr == plain.fit.lr and not thin.fit.muon and thin.fit.weight_decay == 0.0
    recipes.train(asked)
    end = arvis.load(tmp_path / "run" / "model")
    assert end.settings == {"cfg_scale": 0.5} and end.config == model.config
    own, trained = model.system.state_dict(), end.system.state_dict()
    assert all(torch.equal(own[name], trained[name]) for name in own if name.startswith("tokenizer."))
    assert any(not torch.equal(own[name], trained[name]) for name in own if name.startswith("transformer."))


def test_the_decoder_alone_learns_and_tokens_stay(folder, tmp_path):
    model = small("brush")
    recipes.train(request(model, folder, tmp_path / "run", stage="tokenizer"))
    end = arvis.load(tmp_path / "run" / "model")
    before, after = model.system.state_dict(), end.system.state_dict()
    moved = {n for n, _ in model.system.named_parameters() if not torch.equal(before[n], after[n])}
    assert moved and all(name.startswith("tokenizer.decoder.") for name in moved)
    pictures = [picture(seed=i) for i in range(3)]
    assert torch.equal(model.tokens(pictures), end.tokens(pictures))


@pytest.mark.parametrize("slug", REGISTERED)
def test_adapters_and_the_merged_model_are_the_same(folder, tmp_path, slug):
    model, run = small(slug), tmp_path / "run"
    recipes.train(request(model, folder, run, lora=2))
    found, end = read_adapters(run / "lora.safetensors"), read_pretrained(run / "model")
    start = read_pretrained(run / "start")
    assert found.layers and found.base == str(run / "start")
    assert (run / "lora.safetensors").stat().st_size < (run / "model" / "model.safetensors").stat().st_size
    moved = {n for n, t in end.tensors.items() if not torch.equal(t, start.tensors[n])}
    tables = {n for n in found.tensors if not n.endswith((".down", ".up"))}
    assert moved and moved <= {f"{name}.weight" for name in found.layers} | tables
    assert bool(tables) == (slug in CLASSY), "a new class table is learned whole"
    for other in (arvis.load(run / "start").with_lora(run / "lora.safetensors"), arvis.load(run / "lora.safetensors")):
        assert other.source["steps"] == 2
        assert all(torch.equal(t, end.tensors[n]) for n, t in other.system.state_dict().items())


def test_a_run_with_adapters_resumes(folder, tmp_path):
    model = small("brush")
    for name in ("whole", "cut"):
        asked = request(model, folder, tmp_path / name, lora=2)
        recipes.train(replace(asked, fit=replace(asked.fit, minutes=1e-6 if name == "cut" else None)))
    again = recipes.resumed(tmp_path / "cut")
    assert again is not None and again.lora.rank == 2 and again.base == str(tmp_path / "cut" / "start")
    assert recipes.train(again).stopped == "done"
    one, two = (read_adapters(tmp_path / name / "lora.safetensors").tensors for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute:UserWarning")
def test_compiled_adapters_learn_the_same(folder, tmp_path):
    """Layers that are called, and fused projections whose weight is read; a system without dropout."""
    for compile_ in (False, True):
        asked = request(small("brush"), folder, tmp_path / str(compile_), lora=2)
        recipes.train(replace(asked, fit=replace(asked.fit, compile=compile_, lr=1e-3, log_every=1)))
    rows = [[(r["loss"], r["grad_norm"]) for r in metrics.read(tmp_path / name)] for name in ("False", "True")]
    assert len(rows[0]) == 2 and rows[1] == [pytest.approx(row, rel=1e-3) for row in rows[0]]


def test_large_models_are_adapted_if_nothing_is_said(folder, tmp_path, monkeypatch):
    from arvis.recipes import finetune

    monkeypatch.setattr(finetune, "LARGE", 10)
    model, pictures = small("brush"), open_folder(folder, 24)
    ask = lambda **named: recipes.finetuning(model, pictures, folder, tmp_path / "run", **named).lora.rank  # noqa: E731
    assert ask() == finetune.RANK and ask(lora=0) == 0 and ask(lora=3) == 3


# -- new classes ------------------------------------------------------------------------------------------------------


def one_loss(system, labels) -> Tensor:
    y, x = (side * system.tokenizer.config.downsample for side in system.tokenizer.layout().levels[-1])
    image = torch.rand(3, 3, y, x, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        return system.loss({"image": image, "class_labels": torch.tensor(labels)}, Noise.of(3, 3))["loss"]


def rebuilt(slug, config, tensors):
    system = systems.system(slug).build(config)
    system.load_state_dict(tensors)
    return system.eval()


@pytest.mark.parametrize("slug", CLASSY)
def test_classes_that_are_known_keep_their_rows(slug):
    """The same three classes in another order: what label i was is label j now, "no class" stays."""
    system, config = built(slug)
    known, wanted = ("a", "b", "c"), ("c", "a", "b", "new")
    new, tensors, tables = recipes.with_classes(slug, config, dict(system.state_dict()), known, wanted)
    assert tables and recipes.class_count(new) == 4 and recipes.class_count(config) == 3
    other = rebuilt(slug, new, tensors)
    assert torch.equal(one_loss(system.eval(), [0, 1, 2]), one_loss(other, [1, 2, 0]))
    assert torch.equal(one_loss(system.eval(), [2, 2, 2]), one_loss(other, [0, 0, 0]))
    assert not torch.equal(one_loss(system, [0, 1, 2]), one_loss(other, [0, 1, 2]))
    assert not torch.equal(one_loss(other, [3, 3, 3]), one_loss(other, [0, 0, 0]))


@pytest.mark.parametrize("slug", CLASSY)
def test_a_folder_of_classes_makes_a_model_of_its_classes(slug, folder, tmp_path):
    model = small(slug)
    recipes.train(request(model, folder, tmp_path / "run"))
    end = arvis.load(tmp_path / "run" / "model")
    assert recipes.class_count(end.config) == 2 and end.source["classes"] == ["cat", "red_dog"]
    assert end.generate(class_labels=1)
    again = recipes.finetuning(end, open_folder(folder, max(end.size)), folder, tmp_path / "again")
    assert again.config == end.config and again.lora.also == (), "the same classes: nothing is replaced"
    start = read_pretrained(tmp_path / "again" / "start").tensors
    assert all(torch.equal(t, start[n]) for n, t in end.system.state_dict().items())


def test_pictures_without_classes_are_one_class(tmp_path):
    (tmp_path / "birds").mkdir()
    for i in range(2):
        picture(seed=i).save(tmp_path / "birds" / f"{i}.png")
    model = small("var")
    asked = recipes.finetuning(model, open_folder(tmp_path / "birds", 24), tmp_path / "birds", tmp_path / "run")
    assert asked.config.num_classes == 1
    assert read_pretrained(tmp_path / "run" / "start").source["classes"] == ["birds"]


def test_the_number_of_classes_is_found_in_any_configuration():
    config = built("var")[1]
    assert recipes.class_field(config) == "num_classes" and recipes.class_count(config) == 3
    assert recipes.class_field(built("brush")[1]) is None and recipes.class_count(built("brush")[1]) == 0
    inside = replace(built("brush")[1], scale=replace(built("brush")[1].scale, num_classes=7))
    assert recipes.class_field(inside) == "scale.num_classes" and recipes.class_count(inside) == 7
    assert to_dict(inside)["scale"]["num_classes"] == 7
