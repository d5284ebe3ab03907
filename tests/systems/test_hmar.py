"""HMAR: scales alone, no cache, the passes of a schedule, its loss weights, the two stages of its training."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from arvis import cost
from arvis.dist import Categorical
from arvis.nn.attention import attend
from arvis.nn.neighbourhood import InsideScales
from arvis.nn.scales import Condition
from arvis.nn.trunk import Call
from arvis.noise import Noise
from arvis.rows import render, same
from arvis.sampling import lowest
from arvis.systems import hmar, var
from arvis.systems.hmar import HMAR, HMARConfig, HMARSampling, Refined, left_over, token_weights
from arvis.systems.var import VARConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.tokens import Pin, pyramid
from arvis.walk import finish, generate

SIDES = (1, 2, 3, 4)
SCHEDULE = ((1,), (1, 3), (1, 3, 5), (4, 12))
PATCH = PatchConfig(grid=(4, 4), z_channels=4, width=8, heads=2, encoder_depth=1, decoder_depth=1, refine=4)


def config(**changes) -> HMARConfig:
    tokenizer = PyramidVQConfig(patch_nums=SIDES, vocab_size=11, z_channels=4, patch=PATCH)
    scale = VARConfig(tokenizer=tokenizer, depth=3, width=16, heads=2, num_classes=3, adaln_init=1.0)
    return HMARConfig(**{"scale": scale, "mask_layers": 2, "learns": "mask", **changes})


def lively(**changes) -> HMAR:
    """A small one in float64 whose weights are all random."""
    torch.manual_seed(0)
    system = hmar.build(config(**changes))
    for parameter in (*system.transformer.parameters(), *system.tokenizer.quantize.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return system.double().eval()


SYSTEM = lively()
LAYOUT = SYSTEM.tokenizer.layout()
COND = SYSTEM.prepare({"class_labels": [0, 1, 2]})


def tokens(seed: int = 0, items: int = 3) -> Tensor:
    return (Noise.of(seed, items).uniform("tokens", 0, (LAYOUT.n, 1)) * 11).long()


# -- scales alone ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_pass_over_all_scales_is_as_many_passes_over_one() -> None:
    x, transformer = tokens(), SYSTEM.transformer.scales
    c, rows = transformer.conditioner(COND, torch.zeros(3, dtype=torch.bool)), []
    for k in range(LAYOUT.K):
        features = SYSTEM.tokenizer.inputs(x, LAYOUT, k, k + 1) if k else None
        rows.append(transformer.head(transformer(c, features, k, k + 1, same), c.vector))
    together = SYSTEM.teacher(x, COND).logits[:, :, 0]
    assert (torch.cat(rows, 1) - together).abs().max() < 1e-12
    seen = VARlike().teacher(x, COND).logits[:, :, 0]
    assert (seen - together)[:, 1:].abs().max() > 1e-3, "the same weights must give something else where all is seen"


def VARlike() -> var.VAR:
    """The same weights under VAR's own rule and attention."""
    system = copy.deepcopy(SYSTEM)
    for block in system.transformer.scales.trunk.blocks:
        block.attn.look = lambda q, k, v, call, scale: attend(q, k, v, call.mask, scale)
    return var.VAR(system.tokenizer, system.transformer.scales, label_drop=0.0)


@torch.no_grad()
def test_attention_inside_scales_is_what_the_mask_of_the_rule_shows() -> None:
    rows = SYSTEM.transformer.scales.rows(*range(LAYOUT.K))
    mask = render(same, rows, rows)
    assert mask is not None and int(mask.sum()) == sum(n * n for n in LAYOUT.sizes)
    q, k, v = (Noise.of(i, 2).normal("x", 0, (2, LAYOUT.n, 8)) for i in range(3))
    call = Call(mask=mask, rows=rows)
    assert (InsideScales(LAYOUT)(q, k, v, call, 1.0) - attend(q, k, v, mask, 1.0)).abs().max() < 1e-12


@torch.no_grad()
def test_nothing_is_kept_from_scale_to_scale_and_every_pair_is_one_of_the_schedule() -> None:
    class Counting(list):
        def __call__(self, q, k, v, call, scale):
            self.append(sum(at.stop - at.start for _, at in call.rows.runs) ** 2)
            return InsideScales(LAYOUT)(q, k, v, call, scale)

    system, pairs = copy.deepcopy(SYSTEM), Counting()
    for block in (*system.transformer.scales.trunk.blocks, *system.transformer.trunk.blocks):
        block.attn.look = pairs
    s = finish(generate(system, COND, HMARSampling(schedule=SCHEDULE), Noise.of(0, 3)))
    assert s.cache == {}
    further = sum((len(row) - 1) * n * n for row, n in zip(SCHEDULE, LAYOUT.sizes, strict=True))
    assert sum(pairs) == 3 * (sum(n * n for n in LAYOUT.sizes) + further)


# -- schedules ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_schedule_of_single_entries_is_next_scale_prediction_token_for_token() -> None:
    rows = tuple((n,) for n in LAYOUT.sizes)
    drawn = [
        finish(generate(SYSTEM, COND, HMARSampling(schedule=schedule), Noise.of(5, 3))).tokens
        for schedule in (rows, (), SCHEDULE)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    plain = finish(generate(SYSTEM.scales, COND, HMARSampling(), Noise.of(5, 3))).tokens
    assert torch.equal(drawn[0], plain)


@torch.no_grad()
def test_the_least_sure_tokens_are_drawn_again_and_no_others() -> None:
    s, noise = SYSTEM.start(COND, HMARSampling(schedule=SCHEDULE), Noise.of(1, 3)), Noise.of(1, 3)
    for k in range(LAYOUT.K):
        d = SYSTEM.predict(s)
        if k == 0:
            assert isinstance(d, Categorical)
            SYSTEM.commit(s, d, d.sample(noise))
            continue
        assert isinstance(d, Refined)
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def again(x: Tensor, hidden: Tensor, d: Refined = d, seen: list = seen) -> Tensor:
            seen.append((x, hidden, d.again(x, hidden)))
            return seen[-1][2]

        out = replace(d, again=again).sample(noise)
        assert len(seen) == len(SCHEDULE[k]) - 1
        before, logits = torch.ones_like(out[..., 0], dtype=torch.bool), d.logits
        for i, (x, hidden, fresh) in enumerate(seen):
            sure = logits.softmax(-1).gather(-1, x[..., None])[:, :, 0, 0]
            assert torch.equal(hidden, lowest(sure.masked_fill(~before, 9.0), sum(SCHEDULE[k][i + 1 :])))
            following = seen[i + 1][0] if i + 1 < len(seen) else out
            assert torch.equal(following[~hidden], x[~hidden])
            before, logits = hidden, fresh
        assert bool((out != seen[0][0]).any())
        SYSTEM.commit(s, d, out)


@torch.no_grad()
def test_hidden_tokens_are_not_seen_by_the_branch_and_the_others_are() -> None:
    s = SYSTEM.start(COND, HMARSampling(schedule=SCHEDULE), Noise.of(1, 3))
    for _ in range(3):
        d = SYSTEM.predict(s)
        SYSTEM.commit(s, d, d.sample(s.noise))
    d = SYSTEM.predict(s)
    assert isinstance(d, Refined)
    x, hidden = tokens()[:, LAYOUT.span(3)], torch.zeros(3, 16, dtype=torch.bool)
    hidden[:, 5] = True
    other, seen = x.clone(), x.clone()
    other[:, 5], seen[:, 6] = (x[:, 5] + 1) % 11, (x[:, 6] + 1) % 11
    # phi and the bicubic resize blur a code over its neighbours, but at the last scale nothing is resized
    system = copy.deepcopy(SYSTEM)
    for phi in system.tokenizer.quantize.quant_resi.qresi_ls:
        phi.weight.zero_()
    d = system.predict(s)
    assert torch.equal(d.again(x, hidden), d.again(other, hidden))
    assert not torch.equal(d.again(x, hidden), d.again(seen, hidden))


@torch.no_grad()
def test_given_tokens_are_never_drawn_again() -> None:
    mask = Noise.of(3, 3).uniform("mask", 0, (LAYOUT.n,)) < 0.7
    for schedule in (SCHEDULE, ()):
        sampling = HMARSampling(schedule=schedule)
        s = finish(generate(SYSTEM, COND, sampling, Noise.of(0, 3), given=Pin(mask, tokens())))
        assert torch.equal(s.tokens[mask], tokens()[mask])


def test_rows_of_a_schedule_have_to_add_up() -> None:
    left = left_over(SCHEDULE, LAYOUT)
    assert left.tolist() == [[0, 0], [3, 0], [8, 5], [12, 0]]
    assert left_over(((1,), (1, 3)), LAYOUT).tolist() == [[0], [3], [0], [0]]
    for wrong, told in (
        (((1,), (1, 2)), r"row 1 .* 4 tokens .* \(1, 2\)"),
        (((1,), (0, 4)), "row 1"),
        ((*SCHEDULE, (25,)), "at most one row for each of 4 scales, got 5"),
    ):
        with pytest.raises(ValueError, match=told):
            left_over(wrong, LAYOUT)
    with pytest.raises(ValueError, match="scale 0 is drawn at once"):
        left_over(((1, 3),), pyramid((2, 4)))


@torch.no_grad()
def test_the_branch_draws_nothing_before_it_has_learned() -> None:
    system = lively(learns="scales")
    s = system.start(COND, HMARSampling(), Noise.of(0, 3))
    for _ in range(LAYOUT.K):
        d = system.predict(s)
        assert isinstance(d, Categorical)
        system.commit(s, d, d.sample(s.noise))


# -- training -------------------------------------------------------------------------------------------------------


def test_the_weights_of_scales_are_the_published_ones() -> None:
    published = {
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16): [
            0.0247, 0.0642, 0.1150, 0.1379, 0.1402, 0.1329, 0.1208, 0.1054, 0.0882, 0.0709
        ],
        (1, 2, 3, 4, 6, 9, 13, 18, 24, 32): [
            0.0196, 0.0667, 0.1141, 0.1389, 0.1379, 0.1246, 0.1112, 0.1037, 0.0958, 0.0877
        ],
    }  # fmt: skip
    for sides, shares in published.items():
        layout = pyramid(sides)
        weights = token_weights(layout, "lognorm")
        found = torch.stack([weights[layout.span(k)].sum() for k in range(layout.K)])
        assert (found - torch.tensor(shares)).abs().max() < 6e-5
    assert float(token_weights(LAYOUT, "equal").sum()) == pytest.approx(4)
    assert token_weights(LAYOUT, "none").unique().tolist() == pytest.approx([1 / 30])


@torch.no_grad()
def test_the_first_stage_is_the_weighted_loss_of_all_tokens() -> None:
    system = lively(learns="scales")
    system.label_drop = 0.0
    batch = {"tokens": tokens(), "class_labels": [0, 1, 2]}
    nats = -system.teacher(tokens(), COND).log_prob(tokens())
    loss = system.loss(batch, Noise.of(0, 3))
    assert float(loss["loss"]) == pytest.approx(float((nats * token_weights(LAYOUT, "lognorm")).sum(1).mean()))
    assert float(loss["nats"]) == pytest.approx(float(nats.mean()))


def test_the_second_stage_learns_hidden_tokens_only_and_nothing_but_the_branch() -> None:
    system = lively()
    system.begin_()
    learned = {name for name, p in system.named_parameters() if p.requires_grad and name.startswith("transformer.")}
    assert {name.split(".")[1] for name in learned} == {"mask", "trunk", "head"}
    batch = {"tokens": tokens(), "class_labels": [0, 1, 2]}
    system.loss(batch, Noise.of(0, 3))["loss"].backward()
    for name, p in system.named_parameters():
        if name.startswith("transformer."):
            assert (p.grad is not None and bool(p.grad.any())) == (name in learned), name
    hidden = system.hidden(Noise.of(0, 64))
    counts = torch.stack([hidden[:, LAYOUT.span(k)].sum(1) for k in range(LAYOUT.K)])
    share = Noise.of(0, 64).uniform("share", 0, ())
    assert counts[0].tolist() == [0] * 64
    for k, n in enumerate(LAYOUT.sizes[1:], 1):
        assert counts[k].tolist() == (share * n).ceil().long().tolist()
    with torch.no_grad():
        c = system.transformer.scales.conditioner(COND, torch.zeros(3, dtype=torch.bool))
        logits = system.masked_pass(tokens(), hidden[:3], c)
        right = torch.where(hidden[:3, :, None], tokens(), 0)
        wrong = (tokens() + 1) % 11
        seen_differ = torch.where(hidden[:3, :, None], right, wrong)
        assert torch.equal(
            system.hidden_nats(logits, tokens(), hidden[:3])[0], system.hidden_nats(logits, seen_differ, hidden[:3])[0]
        )


@torch.no_grad()
def test_the_branch_starts_as_a_copy_and_goes_on_as_it_is() -> None:
    system = lively()
    system.transformer.mask.zero_()
    system.begin_()
    c = Condition(*(Noise.of(i, 3).normal("c", 0, (16,)) for i in range(2)))
    x = SYSTEM.tokenizer.inputs(tokens(), LAYOUT, 1)
    nothing = torch.ones(3, LAYOUT.n - 1, dtype=torch.bool)  # with all hidden under the vector of zeros
    logits = system.transformer(c, x, torch.zeros_like(x), nothing, 0, LAYOUT.K)
    base = system.transformer.scales
    assert (logits - base.head(base(c, x, 0, LAYOUT.K, same), c.vector)).abs().max() < 1e-12
    trained = lively()
    before = trained.transformer.head.linear.weight.clone()
    trained.begin_()
    assert torch.equal(trained.transformer.head.linear.weight, before)


# -- memory ---------------------------------------------------------------------------------------------------------


def test_memory_of_sampling_does_not_grow_with_what_was_drawn() -> None:
    sides = (1, 2, 3, 4, 4, 4, 4)
    found = {}
    for name, system in (
        ("few", hmar.build(replaced(config(), sides[:4]))),
        ("many", hmar.build(replaced(config(), sides))),
        ("few seen", var.build(replaced(config(), sides[:4]).scale)),
        ("many seen", var.build(replaced(config(), sides).scale)),
    ):
        found[name] = cost.count(system.to("meta"), HMARSampling(schedule=()), batch=2).cache
    assert found["few"] == found["many"] == 0
    assert found["many seen"] > 2 * found["few seen"] > 0


def replaced(whole: HMARConfig, sides: tuple[int, ...]) -> HMARConfig:
    tokenizer = replace(whole.scale.tokenizer, patch_nums=sides)
    return replace(whole, scale=replace(whole.scale, tokenizer=tokenizer))
