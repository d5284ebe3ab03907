"""FlexVAR: random lists, resized positions, any list at sampling, true codes as inputs, and all that is zero-shot."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from arvis.editing import keep_tokens
from arvis.nn.scales import ScaleTransformer
from arvis.noise import Noise
from arvis.rows import upto
from arvis.systems.flexvar import (
    STEPS,
    FlexVARSampling,
    ListConfig,
    block,
    build,
    kept_codes,
    tiny_config,
    waves,
    weigh,
)
from arvis.tokens import Layout, Pin, at, pyramid
from arvis.walk import finish, generate
from small import picture, small

LISTS = [
    pyramid((1, 2, 3)),
    pyramid((1, 3)),
    pyramid((1, 1, 2, 2, 3, 3)),
    pyramid((1, 2, 3, 4, 6)),
    Layout(((1, 1), (2, 3), (3, 5))),
    Layout(((1, 1), (4, 2), (6, 3))),
]
"""Of other lengths, sizes and shapes than those in training, also beyond the grid of positions (4 x 4)."""


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(0)
    system = build(tiny_config()).double().eval()
    for p in system.transformer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return system


@pytest.fixture(autouse=True)
def _no_grad(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def classes(system, items=3):
    return system.prepare({"class_labels": [i % 3 for i in range(items)]})


def some(layout, items=3, seed=0):
    return (Noise.of(seed, items).uniform("tokens", 0, (layout.n, 1)) * 5).long()


def stepped(system, tokens, layout, sampling=None, given=None):
    """Logits [B, N, V] step by step along given tokens, of the groups that are not given."""
    sampling = sampling or FlexVARSampling.plain()
    s, logits = system.start(classes(system), sampling, Noise.of(0, len(tokens)), layout, given), []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits[:, :, 0])
        system.commit(s, d, at(tokens, d.where))
    return torch.cat(logits, 1)


# -- lists ------------------------------------------------------------------------------------------------------------


def test_random_lists_are_the_published_distribution():
    config, own = ListConfig(), STEPS[10]
    drawn = [config.draw(own, Noise.of(seed)) for seed in range(2000)]
    others = [sides for sides in drawn if sides != own]
    assert 1 - len(others) / 2000 == pytest.approx(0.05, abs=0.015)
    for sides in others:
        assert sides[:2] == (1, 2) and list(sides) == sorted(set(sides)) and sum(p * p for p in sides) <= 680
        assert all(3 <= p <= 16 for p in sides[2:]) and len(sides) <= 10
    whole = [sides for sides in others if len(sides) == 10]
    assert all(sum(3 <= p <= 10 for p in s) == 5 and sum(11 <= p <= 15 for p in s) == 2 and s[-1] == 16 for s in whole)
    roomy = ListConfig(own=0.0, most=10**6)  # without the limit on tokens: gaps alone
    free = [roomy.draw(own, Noise.of(seed)) for seed in range(2000)]
    lengths = Counter(map(len, free))
    for length, share in ((10, 0.9), (9, 0.05), (8, 0.03), (7, 0.01), (6, 0.01)):
        assert lengths[length] / 2000 == pytest.approx(share, abs=0.02), length
    assert 0 < sum(sides[-1] != 16 for sides in others) < 1000, "the limit may take the last scale away"
    places = Counter(p for sides in free for p in sides if p in range(3, 11))
    assert max(places.values()) / min(places.values()) < 1.2, "every side is as likely as any other"


def test_a_batch_shares_one_list_and_the_first_item_draws_it():
    config, own = ListConfig(), STEPS[10]
    assert config.draw(own, Noise.of(7, 5)) == config.draw(own, Noise.of(7, 1))
    with pytest.raises(ValueError, match="as many sides between"):
        ListConfig(picks=((4, 3, 5),))


def test_published_lists():
    assert all(len(sides) == steps and sides[:2] == (1, 2) for steps, sides in STEPS.items())
    counts = {steps: sum(p * p for p in sides) for steps, sides in STEPS.items()}
    assert {6: 413, 8: 613, 9: 629, 10: 680, 12: 900, 13: 981, 14: 1102, 15: 2534}.items() <= counts.items()


# -- positions --------------------------------------------------------------------------------------------------------


def test_positions_begin_as_waves_along_rows_and_columns():
    found = waves(8, 5)[0]
    for m in range(4):
        w = 10000 ** (-2 * m / 8)
        rows, columns = torch.sin(torch.arange(5.0) * w), torch.cos(torch.arange(5.0) * w)
        assert torch.allclose(found[2 * m], rows[:, None].expand(5, 5))
        assert torch.allclose(found[2 * m + 1], columns.expand(5, 5))


@pytest.mark.parametrize("layout", LISTS)
def test_a_list_is_the_transformer_over_scales_with_these_positions_and_without_levels(system, layout):
    """Against VAR's own transformer, whose positions are set to the averaged grid and whose levels to zero."""
    ours, config = system.transformer, tiny_config()
    theirs = ScaleTransformer(
        ours.conditioner, [block(config, i) for i in range(2)], layout=layout, channels=4, codes=5, width=16
    ).double()
    own = {n: t for n, t in ours.state_dict().items() if n != "position"}
    grid = [F.adaptive_avg_pool2d(ours.position, level).flatten(2).mT for level in layout.levels]
    theirs.load_state_dict({**own, "position": torch.cat(grid, 1), "level.weight": torch.zeros(layout.K, 16).double()})
    tokens, cond = some(layout), classes(system)
    c = ours.conditioner(cond, torch.zeros(3, dtype=torch.bool))
    x = system.tokenizer.inputs(tokens, layout)
    wanted = theirs.head(theirs(c, x, 0, layout.K, upto), c.vector)
    assert torch.allclose(system.teacher(tokens, cond, layout).logits[:, :, 0], wanted, atol=1e-10)


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LISTS)
def test_every_list_runs_with_the_same_weights_and_the_cache_is_the_one_pass(system, layout):
    tokens = some(layout)
    wanted = system.teacher(tokens, classes(system), layout).logits[:, :, 0]
    assert torch.allclose(stepped(system, tokens, layout), wanted, atol=1e-10)
    drawn = finish(generate(system, classes(system), FlexVARSampling.plain(), Noise.of(0, 3), layout))
    size = [2 * side for side in layout.levels[-1]]
    assert drawn.K == layout.K and list(system.tokenizer.decode(drawn.tokens, layout).shape) == [3, 3, *size]


def test_the_ramp_goes_on_beyond_the_scale_in_long_lists_and_is_even_at_large_scales():
    t = weigh(FlexVARSampling(cfg_scale=2.0), 2, pyramid(STEPS[13]))
    assert torch.allclose(t[0, :, 0] - 1, 2.0 * torch.arange(13).double() / 9) and torch.equal(t[0], t[1])
    assert torch.allclose(t.sum(-1), torch.ones(1).double())
    short = weigh(FlexVARSampling(cfg_scale=2.0), 1, pyramid(STEPS[6]))
    assert torch.allclose(short[0, :, 0] - 1, 2.0 * torch.arange(6).double() / 5)
    large = weigh(FlexVARSampling(cfg_scale=2.0), 1, pyramid(STEPS[15]))[0, :, 0] - 1
    assert torch.allclose(large[:13], 2.0 * torch.arange(13).double() / 9) and large[13:].tolist() == [2.0, 2.0]
    even = weigh(FlexVARSampling(cfg_scale=2.0, guidance="constant"), 1, pyramid((1, 2, 3)))
    assert even[0].tolist() == [[2.0, -1.0]] * 3
    for neutral in (FlexVARSampling.plain(), FlexVARSampling(cfg_scale=1.0, guidance="constant")):
        assert weigh(neutral, 1, pyramid((1, 2))).tolist() == [[[1.0], [1.0]]], "one row where none is needed"


def test_unusual_scales_take_the_likeliest_code():
    assert kept_codes(FlexVARSampling(), 1, pyramid(STEPS[13]))[0].tolist() == [
        *[900] * 6, 1, 900, 1, 900, 1, 1, 900,
    ]  # fmt: skip
    assert kept_codes(FlexVARSampling(), 1, pyramid(STEPS[15]))[0, -2:].tolist() == [1, 1]
    assert kept_codes(FlexVARSampling(largest=32), 1, pyramid(STEPS[15]))[0, -2:].tolist() == [900, 900]
    mixed = Layout(((1, 1), (2, 7), (4, 8)))
    assert kept_codes(FlexVARSampling(top_k=9), 2, mixed).tolist() == [[9, 1, 9]] * 2
    assert kept_codes(FlexVARSampling(drawn=()), 1, mixed)[0].tolist() == [900] * 3


def test_guided_logits_are_the_two_rows_mixed(system):
    layout, tokens = pyramid((1, 2, 3)), some(pyramid((1, 2, 3)))
    sampling = FlexVARSampling(cfg_scale=1.5, top_k=0, top_p=0.0)
    c, u = (system.teacher(tokens, x, layout).logits[:, :, 0] for x in (classes(system), None))
    t = torch.tensor([0.0, 0.75, 1.5]).double()[layout.level_N.long()][:, None]
    assert torch.allclose(stepped(system, tokens, layout, sampling), (1 + t) * c - t * u, atol=1e-10)


def test_settings_say_where_the_tokens_lie():
    m = small("flexvar")
    assert m.size == (6, 6)
    for settings, size, steps in (
        ({}, (6, 6), 3),
        ({"scales": (1, 2)}, (4, 4), 2),
        ({"scales": (1, 2, 3, 4, 5)}, (10, 10), 5),
        ({"shape": (8, 12)}, (12, 8), 3),
        ({"scales": (1, 3), "shape": (12, 6)}, (6, 12), 2),
    ):
        *_, last = m.stream(class_labels=1, settings=settings)
        assert steps == last.K and [p.size for p in last.pictures()] == [size], settings
    with pytest.raises(ValueError, match="begins with one cell"):
        m.generate(class_labels=1, settings={"scales": (2, 3)})
    with pytest.raises(ValueError, match="shape is Y,X pixels"):
        m.generate(class_labels=1, settings={"shape": (8,)})
    with pytest.raises(ValueError, match="multiples of 2"):
        m.generate(class_labels=1, settings={"shape": (7, 8)})


# -- zero-shot --------------------------------------------------------------------------------------------------------


def test_a_small_picture_is_refined_at_finer_scales(system):
    """Its own scales are given; what is drawn is drawn in their presence, in as many steps as there are finer ones."""
    layout, image = pyramid((1, 2, 3, 5)), torch.rand(3, 3, 6, 6).double() * 2 - 1
    own = system.tokenizer.encode(image, layout)
    given = Pin((layout.level_N < 3).expand(3, -1), own)
    tokens = torch.cat((own[:, : layout.offsets[3]], some(layout)[:, layout.offsets[3] :]), 1)
    logits = stepped(system, tokens, layout, given=given)
    assert logits.shape[1] == 25
    wanted = system.teacher(tokens, classes(system), layout).logits[:, layout.span(3), 0]
    assert torch.allclose(logits, wanted, atol=1e-10)
    s = system.start(classes(system), FlexVARSampling.plain(), Noise.of(1, 3), layout, given)
    seen = system.tokenizer.next_input(s.more["f"], 3, layout)
    codes = F.normalize(system.tokenizer.quantize.embedding.weight, dim=1)[own[:, layout.span(2), 0]]
    assert torch.allclose(seen, F.interpolate(codes.mT.unflatten(2, (3, 3)), size=(5, 5), mode="bicubic").flatten(2).mT)


def test_a_part_is_painted_anew_and_a_canvas_is_expanded_by_the_one_mask():
    m, original = small("flexvar"), picture(40)
    wide = {"scales": (1, 2, 3), "shape": (6, 12), "drawn": ()}
    canvas = original.resize((40, 20))
    for mask in ((0, 0.5, 1, 1), (0, 0, 1, 0.5)):
        *_, last = m.stream(class_labels=1, n=4, settings=wide, image=canvas, mask=mask)
        layout = m.system.layout(m.sampling(wide))
        assert layout == Layout(((1, 1), (2, 4), (3, 6)))
        cells = torch.zeros(3, 6, dtype=torch.bool)
        cells[:, :3] = mask[1] == 0.5
        cells[:, 3:] = mask[1] == 0
        kept = keep_tokens(cells, layout)[0]
        own = m._tokens([canvas], layout)
        assert torch.equal(last.tokens()[:, kept], own[:, kept].expand(4, -1, -1))
        assert (last.tokens() != own)[:, ~kept].any() and 0 < kept[layout.span(2)].sum() < 18


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_true_codes_on_the_drawn_list(system):
    image, labels = torch.rand(3, 3, 6, 6).double() * 2 - 1, [0, 1, 2]
    lists = set()
    for seed in range(12):
        noise = Noise.of(seed, 3)
        lesson = system.lesson({"image": image, "class_labels": labels}, noise)
        layout = pyramid(system.lists.draw((1, 2, 3), noise))
        tokens = system.tokenizer.encode(image, layout)
        assert lesson.layout == layout and torch.equal(lesson.tokens, tokens)
        null = noise.uniform("drop", 0, ()) < 0.1
        cond = {"class_labels": torch.tensor(labels).masked_fill(null, 3)}
        logits = system.teacher(tokens, cond, layout).logits
        wanted = F.cross_entropy(logits.flatten(0, 2), tokens.flatten())
        stored = {**system.latents(image), "class_labels": labels}
        assert torch.allclose(system.loss(stored, noise)["loss"], wanted)
        lists.add(layout)
    assert len(lists) > 1
    two = system.lesson({"image": image, "class_labels": labels, "levels": 2}, Noise.of(0, 3))
    assert two.layout.K == 2 and two.tokens.shape[1] == two.layout.n


def test_gradients_reach_the_positions_and_not_the_pictures(system):
    batch = {"image": torch.rand(3, 3, 6, 6).double() * 2 - 1, "class_labels": [0, 1, 2]}
    system.loss(batch, Noise.of(0, 3))["loss"].backward()
    assert system.transformer.position.grad.abs().sum() > 0
    assert all(p.grad is None for p in system.tokenizer.encoder.parameters())
    system.zero_grad()


def test_other_codes_of_the_scale_before_change_a_prediction_and_earlier_ones_only_by_attention(system):
    layout = pyramid((1, 2, 3, 4))
    tokens = some(layout)
    other = tokens.clone()
    other[:, layout.span(1)] = (other[:, layout.span(1)] + 1) % 5
    x, y = (system.tokenizer.inputs(t, layout) for t in (tokens, other))
    moved = (x != y).any(-1).any(0)
    assert moved[layout.offsets[2] - 1 : layout.offsets[3] - 1].all() and moved.sum() == layout.sizes[2]
    a, b = (system.teacher(t, classes(system), layout).logits for t in (tokens, other))
    assert torch.equal(a[:, : layout.offsets[2]], b[:, : layout.offsets[2]])
    assert all((a != b)[:, layout.span(k)].any() for k in (2, 3))
