"""Search over paths: what goes on follows its law, states move whole, nothing else changes; on several models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from arvis import parity
from arvis.noise import Noise
from arvis.rewards import reward
from arvis.search import copies, multinomial, search
from arvis.systems import system as module_of
from arvis.systems import tts_var
from arvis.systems.code import collaborate
from arvis.systems.tts_var import (
    ENCODER_KEYS,
    OFFICIAL,
    DINOv2Features,
    Paths,
    PathSearch,
    TTSVARConfig,
    best_of,
    clustering,
    colours,
    encoder_of,
    members,
    named,
    normalised,
    principal,
    schedule,
    weights,
)
from arvis.tokens import Pin, pyramid
from arvis.walk import finish, walk
from arvis.weights import to_official
from chance import chi_square
from small import request, small

KINDS = ("var", "infinity", "brush")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def strong(kind: str, seed: int = 0):
    """A tiny system whose weights are strong enough to say something, in float64."""
    torch.manual_seed(seed)
    system = module_of(kind).tiny().double().eval()
    for p in system.transformer.parameters():
        p.add_(torch.randn_like(p), alpha=0.3)
    return system


def start(system, items: int = 1, plain: bool = False, **more):
    asked = {"class_labels": [1] * items, "prompt": ["a red apple"] * items}
    sampling = system.Sampling.plain() if plain else system.Sampling()
    return system.start(system.prepare(asked), sampling, Noise.of(3, items), **more)


def redness(image, asked):
    return image[:, 0].double().mean((1, 2))


# -- what goes on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_choice_it_is_the_best_of_plain_copies(kind):
    system = strong(kind)
    plain = start(system, 2).take_(copies(2, 5))
    plain = finish(walk(system, plain))
    score = redness(system.tokenizer.decode(plain.tokens, plain.layout), None).view(2, 5)
    steps = list(PathSearch(redness, best_of(5, 3))(system, start(system, 2), [None, None]))
    found = steps[-1].state
    assert len(found) == 2 and [step.k for step in steps] == [1, 2, 3]
    assert torch.equal(found.tokens, plain.tokens[score.argmax(1) + torch.tensor([0, 5])])


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_paths_go_on_as_if_they_had_been_alone(kind):
    """Fails if a cache row, a sum of codes or a guidance half of another path is read after a choice."""
    system, seen = strong(kind), {}
    s = start(system)
    config = TTSVARConfig(paths=(4, 2, 2), cluster=(), resample=(1,), strength=100.0)
    paths = Paths(PathSearch(redness, config), s, [None])
    s.take_(copies(1, 4))

    def choose(step):
        rows = paths.choose(step)
        if step.k == 2:
            seen["kept"] = step.state.tokens[rows].clone()
        return rows if step.k < 3 else None

    for step in search(walk(system, s), choose):
        if step.k == 2:
            seen["next"] = system.predict(step.state).logits
    n = s.layout.offsets[2]
    known = torch.arange(s.layout.n)[None].expand(2, -1) < n
    alone = start(system, 2, given=Pin(known, seen["kept"]))
    torch.testing.assert_close(seen["next"], system.predict(alone).logits)
    assert torch.equal(s.tokens[:, :n], seen["kept"][:, :n])


def test_with_a_strength_of_zero_the_law_is_the_models():
    """4,000 searches of four paths each: the first token has the model's distribution, whatever the reward."""
    system, runs = told_early(strong("var")), 4000
    s = system.start({"class_labels": torch.ones(runs, dtype=torch.int64)}, system.Sampling.plain(), Noise.of(7, runs))
    config = TTSVARConfig(paths=(2, 1, 1), cluster=(), resample=(0, 1), strength=0.0)
    found = finish(PathSearch(redness, config)(system, s, [None] * runs))
    probs = system.teacher(found.tokens[:1], {"class_labels": torch.ones(1, dtype=torch.int64)}).probs[0, 0, 0]
    assert chi_square(torch.bincount(found.tokens[:, 0, 0], minlength=5), probs) > 0.01


def test_paths_are_drawn_by_their_weights():
    potential = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.0, -1.0, 0.3, 0.3])
    weight = weights(potential, 3.0, 4)
    torch.testing.assert_close(weight, (3.0 * potential.double().view(2, 4)).softmax(1))
    u = Noise.of(1, 2).uniform("u", 0, (6000,))
    rows = multinomial(weight, 6000, u).view(2, 6000)
    for item in (0, 1):
        counts = torch.bincount(rows[item] - 4 * item, minlength=4)
        assert len(counts) == 4 and chi_square(counts, weight[item]) > 0.01 > chi_square(counts, torch.ones(4))


@pytest.mark.parametrize(
    ("potential", "wanted"),
    [
        ([1.0, float("nan"), 1.0, 1.0], [1 / 3, 0, 1 / 3, 1 / 3]),
        ([float("inf"), 1.0, float("inf"), float("nan")], [0.5, 0, 0.5, 0]),
        ([float("nan")] * 4, [0.25] * 4),
        ([-float("inf"), 0.0, 0.0, -float("inf")], [0, 0.5, 0.5, 0]),
        ([1e6, 0.0, 0.0, 0.0], [1, 0, 0, 0]),
    ],
)
def test_odd_rewards_do_no_harm(potential, wanted):
    torch.testing.assert_close(weights(torch.tensor(potential), 10.0, 4)[0], torch.tensor(wanted).double())


@pytest.mark.parametrize("kind", ["value", "diff", "max", "sum"])
def test_potentials_are_of_the_ancestors_rewards(kind):
    """The history follows the rows that went on: path 0 descends from row 3, path 1 from row 0."""
    config = TTSVARConfig(paths=(4, 2, 2), cluster=(), resample=(0, 1), potential=kind)
    paths = Paths(PathSearch(redness, config), start(strong("var")), [None])
    paths.history = torch.tensor([[0.9], [0.0], [0.0], [0.4]]).double()[torch.tensor([3, 0])]
    now = torch.tensor([0.5, 0.6]).double()
    wanted = {"value": [0.5, 0.6], "diff": [0.1, -0.3], "max": [0.5, 0.9], "sum": [0.9, 1.5]}[kind]
    torch.testing.assert_close(paths.potential(now), torch.tensor(wanted).double())


# -- clusters ---------------------------------------------------------------------------------------------------------


def test_every_planted_group_has_a_path():
    torch.manual_seed(0)
    for order in (torch.arange(9), torch.randperm(9)):
        centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]).repeat_interleave(3, 0)
        x = (centres + 0.3 * torch.randn(9, 2))[order]
        both = torch.cat((x, x + 100))
        rows = members(both, 9, 3)
        assert rows.shape == (6,) and rows[:3].max() < 9 <= rows[3:].min()
        assert sorted((order[rows[:3]] // 3).tolist()) == [0, 1, 2] == sorted((order[rows[3:] - 9] // 3).tolist())
        for row in rows[:3].tolist():  # nearest to the mean of its group
            group = x[order // 3 == order[row] // 3]
            assert torch.equal(x[row], group[(group - group.mean(0)).norm(dim=1).argmin()])


def test_equal_paths_are_filled_up():
    rows = members(torch.zeros(6, 3), 6, 4)
    assert len(set(rows.tolist())) == 4
    assert sorted(members(torch.arange(5.0)[:, None], 5, 5).tolist()) == [0, 1, 2, 3, 4]


def test_pictures_are_told_apart_by_where_things_are():
    """The principal direction's scores: of a known matrix, with a sign that does not depend on the decomposition."""
    image = torch.full((3, 3, 32, 32), -1.0)
    image[0, :, :, :16], image[1, :, :, 16:], image[2, 0, :16] = 1, 1, 1
    score = principal(colours(image, 2))
    assert score.shape == (3, 4) and torch.allclose(score.sum(1), torch.zeros(3).double(), atol=1e-9)
    assert (score[0].sign() == torch.tensor([1, -1, 1, -1])).all() and torch.allclose(score[0], -score[1])
    assert (score[2].sign() == torch.tensor([1, 1, -1, -1])).all()


def test_pictures_are_told_apart_by_any_features():
    """Colours are alike, and what a picture has in its first pixel is not."""

    def first(image):
        row = image[:, :1, 0, 0].double()
        return torch.stack((row, -row, torch.zeros_like(row)), 1)

    image = torch.zeros(6, 3, 8, 8)
    image[:, 0, 0, 0] = torch.tensor([1.0, 5.0, 1.1, 5.1, 9.0, 9.1])
    rows = clustering(first)(image, 6, 3)
    assert sorted((image[rows, 0, 0, 0] // 4).tolist()) == [0, 1, 2]


# -- the encoder ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "registers"])
def published(request, tmp_path):
    """A folder as the hub has it, of the recorded encoder."""
    recording = parity.find("dinov2")
    (tmp_path / "config.json").write_text(json.dumps(recording.model(request.param)))
    save_file(recording.weights(request.param), tmp_path / "model.safetensors")
    yield tmp_path
    encoder_of.cache_clear()


def test_features_of_a_published_encoder(published, monkeypatch):
    image = torch.randint(256, (2, 3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = DINOv2Features(str(published))(image)
    encoder = encoder_of(str(published))
    assert found.shape == (2, 256, 16) and not found.requires_grad and encoder.config.grid == 4
    assert torch.equal(found, encoder(normalised(image, 16 * 7))[1])
    again = named(f"dinov2:{published / 'model.safetensors'}")(image.float() / 127.5 - 1)
    assert torch.allclose(again, found, atol=1e-5), "a file, and pictures as tokenizers give them"
    asked = []
    monkeypatch.setattr(tts_var, "fetch", lambda repo, name: asked.append((repo, name)) or published / name)
    assert torch.equal(named("dinov2")(image), found)
    assert asked == [("facebook/dinov2-small", "model.safetensors"), ("facebook/dinov2-small", "config.json")]
    official = to_official(encoder, ENCODER_KEYS)
    wanted = load_file(published / "model.safetensors")
    wanted.pop("embeddings.mask_token")
    assert official.keys() == wanted.keys() and all(torch.equal(official[n], x) for n, x in wanted.items())


def test_an_encoder_reads_pictures_without_mean_and_deviation():
    x = normalised(torch.full((1, 3, 30, 50), 128, dtype=torch.uint8), 28)
    wanted = (128 / 255 - torch.tensor(tts_var.MEAN)) / torch.tensor(tts_var.DEVIATION)
    assert x.shape == (1, 3, 28, 28) and torch.allclose(x[0, :, 9, 9], wanted, atol=1e-5)


def test_an_encoder_that_cannot_be_is_named(published):
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(KeyError, match="no features are called 'colour'; there are colours, dinov2 and dinov2:MODEL"):
        named("colour")
    with pytest.raises(ValueError, match="at least one patch of 7 pixels, got"):
        encoder_of(str(published))(torch.zeros(1, 3, 28, 6))
    encoder_of.cache_clear()
    settings = json.loads((published / "config.json").read_text())
    for wrong, told in (
        ({"use_swiglu_ffn": True}, "layers have gates"),
        ({"hidden_size": 8}, "does not fit the model"),
    ):
        (published / "config.json").write_text(json.dumps({**settings, **wrong}))
        with pytest.raises(ValueError, match=f"cannot be loaded, from the hub or as a folder: .*{told}"):
            DINOv2Features(str(published))(image)
    (published / "config.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded, from the hub or as a folder: .*No such file"):
        DINOv2Features(str(published))(image)


# -- schedules --------------------------------------------------------------------------------------------------------


def test_the_official_schedule_and_its_cost():
    assert schedule(13) == TTSVARConfig() and TTSVARConfig().paths == OFFICIAL
    five = schedule(5, 16)
    assert (five.paths, five.cluster, five.resample) == ((16, 8, 4, 2, 2), (1,), (2, 3))
    assert five.cost(pyramid((1, 2, 3, 5, 8))) == 16 * 1 + 16 * 4 + 8 * 9 + 4 * 25 + 2 * 64
    assert best_of(3, 5).cost(pyramid((1, 2, 3, 5, 8))) == 3 * 103
    for scales in (1, 2, 3, 10):
        assert len(schedule(scales).paths) == scales
    with pytest.raises(ValueError, match="paths get fewer after scales that cluster or resample"):
        TTSVARConfig(paths=(4, 3, 3), cluster=(), resample=(0,))
    with pytest.raises(ValueError, match="chosen after scales 0 to 1"):
        TTSVARConfig(paths=(2, 2, 1), cluster=(), resample=(2,))
    with pytest.raises(ValueError, match=r"for 13 scales, the model has 3: schedule\(3\) makes one"):
        next(PathSearch(redness, TTSVARConfig())(None, start(strong("var")), [None]))


def told_early(system):
    """Pictures whose red is the mean of the tokens of the first two scales, known when these are."""

    n = system.tokenizer.layout().offsets[2]

    def decode(tokens, layout=None, known=None, noise=None):
        coarse = tokens[:, :n].double().flatten(1)
        if known is not None:
            coarse = coarse * known[:, :n].repeat_interleave(tokens.shape[2], 1)
        return coarse.mean(1)[:, None, None, None].expand(-1, 3, 2, 2)

    system.tokenizer.decode = decode
    return system


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_finds_more_than_plain_pictures_of_equal_cost(kind):
    """Where coarse scales tell the reward, twelve paths there and two later beat as many token passes of whole ones."""
    system, items = told_early(strong(kind)), 200
    layout = system.tokenizer.layout()
    config = TTSVARConfig(paths=(12, 2, 2), cluster=(), resample=(1,), strength=100.0)
    equal = round(config.cost(layout) / layout.n)
    assert equal >= 5
    scores = []
    for plan in (config, best_of(equal, layout.K)):
        found = finish(PathSearch(redness, plan)(system, start(system, items, plain=True), [None] * items))
        scores.append(redness(system.tokenizer.decode(found.tokens), None))
    gain = scores[0] - scores[1]
    assert float(gain.mean()) > 2 * float(gain.std()) / items**0.5


def test_a_pair_of_models_can_be_searched():
    """The state of the model that waits is gathered, too."""
    a, b = strong("var"), strong("var", 1)
    b.tokenizer = a.tokenizer
    pair = collaborate(a, b, 2)
    config = TTSVARConfig(paths=(3, 2, 2), cluster=(1,), resample=(0,))
    s = pair.start(pair.prepare({"class_labels": [1, 2]}), a.Sampling(), Noise.of(0, 2))
    assert len(finish(PathSearch(redness, config)(pair, s, [None] * 2))) == 2


# -- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_models_search(kind):
    model = small(kind)
    plan = PathSearch(redness, TTSVARConfig(paths=(4, 2, 2), cluster=(1,), resample=(), strength=5.0))
    told, asked = [], []

    def noting(image, what):
        asked.append(list(what))
        return redness(image, what)

    plain = model.generate(**request(kind), n=3)
    found = model.generate(**request(kind), n=3, search=PathSearch(noting, plan.config), on_step=told.append)
    assert len(found) == len(plain) == 3 and [p.k for p in told] == [1, 2, 3]
    assert asked == [[next(iter(request(kind).values()))] * 6]
    again = model.generate(**request(kind), n=2, search=plan)
    assert [p.tobytes() for p in again] == [p.tobytes() for p in found[:2]], "picture i does not depend on n"


def test_the_command_searches(tmp_path, capsys):
    from arvis import cli
    from arvis.data.images import read_image, read_metadata, to_tensor

    out = tmp_path / "apple.png"
    cli.main(["generate", "red apple", "--search", "tts-var:4", "--set", "search.reward=picture", "-o", str(out)])
    told = read_metadata(out)["request"]
    assert (told["search"], told["reward"], told["features"]) == ("tts-var:4", "picture", "colours")
    assert float(reward("picture")(to_tensor(read_image(out))[None], ["red apple"])) > -0.2
    for wrong, told in (
        (["--search", "var"], "var is no search; there are tts-var"),
        (["--search", "tts-var:many"], "number of paths is a whole number"),
        (["--search", "tts-var", "--set", "search.reward=nice"], "no reward is called 'nice'"),
        (["--search", "tts-var", "--set", "search.features=nice"], "no features are called 'nice'"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", "red apple", *wrong, "-o", str(out)])
        assert end.value.code == 2 and told in capsys.readouterr().err


def test_a_method_has_no_models():
    from arvis import systems

    with pytest.raises(KeyError, match="tts-var is a method: it has no models of its own"):
        systems.preset("tts-var")
