"""`load` and `Model`: equal requests give equal pictures, parts are painted anew, folders come back bit for bit."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import arvis
from arvis import loading, model
from arvis.config import ConfigError
from arvis.weights import WeightsError
from small import halves, picture, small

WHAT = {"brush": {"prompt": "red apple"}, "var": {"class_labels": 1}}


def pixels(pictures):
    return [p.tobytes() for p in pictures]


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", WHAT)
def test_picture_i_depends_on_the_seed_and_i_alone(slug):
    m = small(slug)
    three, five = m.generate(**WHAT[slug], n=3, seed=7), m.generate(**WHAT[slug], n=5, seed=7)
    assert pixels(three) == pixels(five[:3]) and len(set(pixels(five))) > 1
    assert pixels(m.generate(**WHAT[slug], n=3, seed=8)) != pixels(three)
    assert all(p.size == (m.size[1], m.size[0]) for p in five)


def test_many_pictures_pass_in_batches_and_stay_the_same(monkeypatch):
    m = small("brush")
    whole = list(m.stream(["red apple", "blue cat"], n=3))
    monkeypatch.setattr(model, "BATCH", 4)
    seen, sizes = [], []
    start = m.system.start
    monkeypatch.setattr(
        m.system, "start", lambda c, s, noise, *rest: sizes.append(len(noise)) or start(c, s, noise, *rest)
    )
    for step in m.stream(["red apple", "blue cat"], n=3):
        seen.append((step.k, step.K, len(step.pictures()), len(step.tokens())))
        last, tokens = step.pictures(), step.tokens()
    assert sizes == [4, 2], "no more than BATCH at once"
    assert seen == [(k, 6, 4, 4) for k in (1, 2, 3)] + [(k, 6, 6, 6) for k in (4, 5, 6)]
    assert step.done and not whole[0].done
    assert torch.equal(tokens, whole[-1].tokens())
    assert len(last) == 6


def test_prompts_come_one_after_the_other_each_with_the_same_seeds():
    m = small("brush")
    strong = {"cfg_scale": 1000.0}
    both = list(m.stream(["red apple", "blue cat"], n=2, seed=3, settings=strong))[-1].tokens()
    alone = [list(m.stream(p, n=2, seed=3, settings=strong))[-1].tokens() for p in ("red apple", "blue cat")]
    assert torch.equal(both, torch.cat(alone))
    assert not torch.equal(*alone)


def test_stopping_cancels():
    m = small("brush")
    steps = m.stream("red apple")
    first = next(steps)
    steps.close()
    assert first.k == 1 and len(first.pictures()) == 1


def test_no_cache_is_kept_while_the_pictures_are_made(monkeypatch):
    m, states = small("brush"), []
    start = m.system.start
    monkeypatch.setattr(m.system, "start", lambda *given: states.append(start(*given)) or states[-1])
    for step in m.stream("red apple"):
        assert bool(states[0].cache) == (not step.done)
    assert len(step.pictures()) == 1


def test_settings_are_those_of_the_model_then_of_the_request():
    m = small("brush")
    m.settings = {"cfg_scale": 3.0, "left over from another version": 1}
    assert m.sampling().cfg_scale == 3.0
    assert m.sampling({"top_k": 2}).top_k == 2 and m.sampling({"cfg_scale": 0}).cfg_scale == 0.0
    greedy = [pixels(m.generate("red apple", n=2, seed=s, settings={"top_k": 1, "cfg_scale": 0})) for s in (0, 1)]
    assert greedy[0] == greedy[1] and greedy[0][0] == greedy[0][1]


def test_bfloat16_computes_in_it_and_keeps_the_weights():
    plain, half = small("brush"), small("brush")
    half.precision = model.pick("cpu", "bfloat16")
    seen = []
    hook = plain.system.transformer.word.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    half.generate("red apple")
    plain.generate("red apple")
    hook.remove()
    assert set(seen[: len(seen) // 2]) == {torch.bfloat16} and set(seen[len(seen) // 2 :]) == {torch.float32}
    assert next(half.system.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("slug", "asked", "told"),
    [
        ("brush", {"prompt": "a", "n": 0}, "at least 1, got 0"),
        ("brush", {"prompt": "a", "n": 10**9}, r"1000000000 pictures of 24x24 take 1,609.* at most \d+"),
        ("brush", {"class_labels": 3}, "takes prompt, not class_labels=3"),
        ("brush", {}, "a prompt is needed"),
        ("brush", {"prompt": []}, "prompt is empty"),
        ("brush", {"prompt": ["a", 3]}, "a prompt is text, got 3 of type int"),
        ("var", {"prompt": "a"}, "takes class_labels, not prompt='a'"),
        ("var", {"class_labels": 1.5}, "whole numbers, got 1.5"),
        ("var", {"class_labels": 99}, r"lie in 0\.\.\d+, got 99"),
        ("brush", {"prompt": "a", "settings": {"cfgscale": 1}}, "did you mean cfg_scale"),
        ("brush", {"prompt": "a", "settings": {"top_k": [1, 2]}}, "expected int"),
        ("brush", {"prompt": "a", "settings": {"cfg_scale": float("nan")}}, "cfg_scale is a number, got nan"),
        ("brush", {"prompt": "a", "settings": {"top_p": 1.5}}, "at least 0 and at most 1, got 1.5"),
        ("brush", {"prompt": "a", "settings": {"temperature": -1}}, "temperature is at least 0, got -1"),
    ],
)
def test_what_cannot_be_painted_is_told(slug, asked, told):
    with pytest.raises(ValueError, match=told):
        small(slug).generate(**asked)


# -- painting a part anew ---------------------------------------------------------------------------------------------


def test_half_a_request_and_masks_of_another_shape_are_refused():
    m = small("brush")
    with pytest.raises(ValueError, match="a mask without an image"):
        m.generate("a", mask=halves())
    with pytest.raises(ValueError, match="an image without a mask"):
        m.generate("a", image=picture())
    with pytest.raises(ValueError, match="the mask is 8x16, the image 40x40"):
        m.generate("a", image=picture(), mask=Image.new("L", (8, 16), 255))


# -- the other direction ----------------------------------------------------------------------------------------------


def test_reconstructions_are_of_the_pictures(monkeypatch, tmp_path):
    m = small("brush")
    given = [picture(seed=s) for s in range(5)]
    given[2].save(tmp_path / "two.png")
    plain = m.reconstruct(given)
    monkeypatch.setattr(model, "BATCH", 2)
    assert pixels(m.reconstruct([*given[:2], tmp_path / "two.png", *given[3:]])) == pixels(plain)
    assert m.tokens(given).shape == (5, m.layout.n, 1)
    with pytest.raises(ValueError, match="at least one picture"):
        m.reconstruct([])


@pytest.mark.parametrize("slug", WHAT)
def test_log_prob_is_the_walks_likelihood(slug, monkeypatch):
    from arvis.noise import Noise
    from arvis.walk import likelihood

    m, given = small(slug), [picture(seed=s) for s in range(3)]
    found = m.log_prob(given, **WHAT[slug])
    with torch.inference_mode():
        cond = m.system.prepare(m._request(WHAT[slug].get("prompt"), WHAT[slug].get("class_labels")))
        cond = {name: value.expand(3, *value.shape[1:]) for name, value in cond.items()}
        walked = likelihood(m.system, m.tokens(given), cond, Noise.of(0, 3))
    assert found.dtype == torch.float64 and torch.allclose(found, walked, atol=1e-4)
    monkeypatch.setattr(model, "BATCH", 2)
    assert torch.allclose(m.log_prob(given, **WHAT[slug]), found, atol=1e-5)
    with pytest.raises(ValueError, match="2 for 3 pictures"):
        m.log_prob(given, **{name: [value, value] for name, value in WHAT[slug].items()})


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", WHAT)
def test_a_saved_model_comes_back_with_its_name_and_settings(slug, tmp_path):
    m = small(slug)
    m.settings = {"cfg_scale": 0.5, "top_k": 3}
    folder = m.save_pretrained(tmp_path / "m")
    again = arvis.load(folder)
    assert (again.slug, again.name, again.config, again.settings) == (slug, m.name, m.config, m.settings)
    assert again.source["licence"] == "MIT" and not again.system.training
    assert pixels(again.generate(**WHAT[slug])) == pixels(m.generate(**WHAT[slug]))
    alone = arvis.Model.from_pretrained(folder / "model.safetensors")
    assert pixels(alone.generate(**WHAT[slug])) == pixels(m.generate(**WHAT[slug]))


def test_weights_stored_in_bfloat16_are_widened(tmp_path):
    folder = small("brush").save_pretrained(tmp_path / "m")
    with_header = json.loads((folder / "config.json").read_text())
    stored = {
        name: t.bfloat16() if t.is_floating_point() else t
        for name, t in load_file(folder / "model.safetensors").items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"arvis": json.dumps(with_header)})
    m = arvis.load(folder)
    assert {p.dtype for p in m.system.parameters()} == {torch.float32}
    name, tensor = next((n, t) for n, t in m.system.state_dict().items() if n.endswith("head.linear.weight"))
    assert torch.equal(tensor, stored[name].float())
    m.generate("red apple")


def test_a_registered_name_wins_over_a_folder_of_this_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "nothing")
    small("brush").save_pretrained("var-d16")
    assert arvis.load("./var-d16").slug == "brush"
    with pytest.raises(WeightsError):
        arvis.load("var-d16", local_files_only=True, cache_dir=tmp_path / "cache")
    small("brush").save_pretrained("mine")
    assert arvis.load("mine").slug == "brush"


def test_the_package_serves_its_own_models(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)
    with pytest.raises(WeightsError, match="train it"):
        arvis.load("brush")
    small("brush").save_pretrained(tmp_path / "brush-64")
    assert arvis.load("brush").size == arvis.load("brush-64").size == (24, 24)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("brsh", "nearest: brush"),
        ("", "arvis systems"),
        ("./nothing", "no file or folder"),
        ("/no/where", "no file or"),
    ],
)
def test_models_that_are_not_there(name, told):
    with pytest.raises((KeyError, WeightsError), match=told):
        arvis.load(name)


def test_devices_that_are_not_there():
    assert loading.resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="no device 'toaster'"):
        arvis.load("brush", device="toaster")
    with pytest.raises(ValueError, match="no cuda:99 on this machine"):
        loading.resolve_device("cuda:99")


def test_an_unknown_field_of_a_configuration_is_named(tmp_path):
    folder = small("brush").save_pretrained(tmp_path / "m")
    header = json.loads((folder / "config.json").read_text())
    header["config"]["scale"]["dept"] = 3
    (folder / "config.json").write_text(json.dumps(header))
    with pytest.raises(ConfigError, match=r"did you mean scale\.depth"):
        arvis.load(folder)


def test_while_shapes_are_built_the_host_still_draws(monkeypatch) -> None:
    """Rows that a network makes on the host hold numbers, and not whatever the memory held."""
    seen = {}

    def build(config: object) -> torch.nn.Linear:
        zeros = torch.zeros(8, device="cpu")
        seen["host"] = zeros.normal_(generator=torch.Generator("cpu").manual_seed(0))
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(loading.systems, "system", lambda slug: SimpleNamespace(build=build))
    assert loading.empty("any", None).weight.is_meta
    assert torch.equal(seen["host"], torch.randn(8, generator=torch.Generator().manual_seed(0)))
