"""STAR: positions are those of the picture and not of the grid; a scale is drawn as the plan says, and its tokens with
regard to each other; what the released code mixes up in a batch stays inside an item."""

import json
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from arvis.laws import REQUEST, Case, examine
from arvis.nn.clip import ClipConditioner, CLIPConfig, _encoder, clip_features
from arvis.nn.rotary_scales import normalised_table
from arvis.nn.trunk import Call
from arvis.noise import Noise
from arvis.parity.star import FirstOfBatch
from arvis.reveal import Plan, Revealed, reveal_counts
from arvis.systems.star import FirstRow, Inside, STARSampling, build, plan, tiny
from arvis.tokens import Pin, pyramid
from arvis.walk import finish, generate
from small import built

# -- positions ------------------------------------------------------------------------------------------------------


def test_equal_places_of_two_scales_have_equal_positions():
    layout = pyramid((1, 4, 7))
    table = normalised_table(layout, 16, 10000.0, 64.0)[0]
    coarse, fine = table[layout.span(1)].view(4, 4, 8, 2), table[layout.span(2)].view(7, 7, 8, 2)
    torch.testing.assert_close(fine[::2, ::2], coarse, atol=2e-5, rtol=0)
    counted = normalised_table(layout, 16, 10000.0, -1.0)[0]
    coarse, fine = counted[layout.span(1)].view(4, 4, 8, 2), counted[layout.span(2)].view(7, 7, 8, 2)
    assert (fine[::2, ::2] - coarse).abs().max() > 0.5


def test_columns_come_before_rows_and_a_single_cell_is_not_turned():
    table = normalised_table(pyramid((1, 3)), 8, 10000.0, 64.0)[0]
    assert table[0, :, 0].eq(1).all() and table[0, :, 1].eq(0).all()
    grid = table[1:].view(3, 3, 4, 2)
    assert torch.equal(grid[0, :, :2], grid[2, :, :2]) and not torch.equal(grid[:, 0, :2], grid[:, 2, :2])
    assert torch.equal(grid[:, 0, 2:], grid[:, 2, 2:]) and not torch.equal(grid[0, :, 2:], grid[2, :, 2:])


# -- the sampler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 8, 15])
@pytest.mark.parametrize("n", [0, 1, 4, 9, 64, 4096])
def test_every_token_is_placed_once(n, steps):
    counts = reveal_counts(torch.tensor([n, 2 * n]), steps)
    assert counts.shape == (2, steps) and counts.sum(1).tolist() == [n, 2 * n] and counts.min() >= 0
    if n == 64 and steps == 8:
        wanted = torch.arccos(torch.linspace(1, 0, 8))
        wanted = wanted / wanted.sum() * 64
        assert counts[0, 0] == 1 and (counts[0, 1:] - wanted[1:]).abs().max() <= 1.5


def copying(codes: int = 4):
    """A law of tokens that are all alike: any code first, then that of the placed ones; and what it was asked."""
    seen = []

    def law(x, known, step):
        seen.append((x.clone(), known.clone()))
        probs = torch.full((*known.shape, codes), 1 / codes)
        told = known.any(1)
        first = x[..., 0].gather(1, known.long().argmax(1, keepdim=True))
        one = torch.nn.functional.one_hot(first, codes).float().expand(-1, known.shape[1], -1)
        return torch.where(told[:, None, None], one, probs)

    return law, seen


def test_tokens_that_belong_together_are_drawn_alike_and_independent_ones_are_not():
    law, seen = copying()
    d = Revealed(torch.arange(9)[None], law, Plan(4, 0, 2), items=200)
    x = d.sample(Noise.of(0, 200))[..., 0]
    assert (x == x[:, :1]).all() and x[:, 0].bincount(minlength=4).min() > 20
    assert [int(known.sum(1).max()) for _, known in seen] == [0, *reveal_counts(torch.tensor([9]), 4)[0, :3].cumsum(0)]
    for (x0, known), (x1, _) in pairwise(seen):
        assert torch.equal(x0[known], x1[known]), "what is placed stays"
    one = Revealed(torch.arange(9)[None], copying()[0], Plan(1, 0, 0), items=200).sample(Noise.of(0, 200))[..., 0]
    assert (one == one[:, :1]).all(1).float().mean() < 0.1


def test_given_tokens_are_placed_before_the_others():
    law, seen = copying()
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:, 4], mask[1, :8] = True, True
    d = Revealed(torch.arange(9)[None], law, Plan(4, 0, 2), items=3)
    x = d.sample(Noise.of(0, 3), Pin(mask, torch.full((3, 9, 1), 3)))
    assert x.eq(3).all() and seen[0][1].equal(mask)
    with pytest.raises(NotImplementedError, match="no likelihood"):
        d.log_prob(x)


def test_after_the_random_steps_the_surest_are_placed():
    def law(x, known, step):
        seen.append(known.clone())
        p = torch.linspace(0.5, 0.99, 6).expand(2, -1)
        return torch.stack((p, 1 - p), -1)

    seen: list[torch.Tensor] = []
    d = Revealed(torch.arange(6)[None], law, Plan(3, 0, 0), items=2)
    d.sample(Noise.of(0, 2))
    first = int(reveal_counts(torch.tensor([6]), 3)[0, 0])
    u = Noise.of(0, 2).uniform("draw", 0, (3, 6))[:, 0]
    p = torch.linspace(0.5, 0.99, 6)
    sure = torch.where(u < p, p, 1 - p)
    assert torch.equal(seen[1], torch.zeros(2, 6, dtype=torch.bool).scatter(1, sure.topk(first).indices, True))


def test_the_released_mixture_places_two_sets_while_it_draws_without_the_sampler():
    assert plan("independent", 8, 5, 9) is None and plan("stable", 6, 5, 13) == Plan(6, 0, 5)
    assert plan("mixed", 8, 5, 12) == Plan(8, 5, 5) and plan("mixed", 8, 5, 13) == Plan(15, 0, 5)
    law, seen = copying()
    Revealed(torch.arange(64)[None], law, Plan(8, 5, 5), items=1).sample(Noise.of(0, 1))
    counts = reveal_counts(torch.tensor([64]), 8)[0]
    placed = [int(known.sum()) for _, known in seen]
    assert placed[1] == 2 * counts[0] and all(placed[s] > counts[:s].sum() for s in range(1, 8))


def stable(seed: int, how: Inside, dtype: torch.dtype = torch.float64):
    """The tiny system, whose unguided and guided settings draw in steps."""

    @dataclass(frozen=True, kw_only=True)
    class InSteps(STARSampling):
        inside: Inside = how
        steps: int = 4
        random: int = 2

        @classmethod
        def plain(cls):
            return cls(cfg_scale=0.0, top_k=0, top_p=0.0)

    torch.manual_seed(seed)
    system = tiny().to(dtype).eval()
    system.Sampling = InSteps
    return system


@pytest.mark.parametrize("inside", ["stable", "mixed"])
@pytest.mark.parametrize("law", ["blind", "again", "guidance", "seed", "gather", "prefill", "round-trip"])
def test_the_laws_hold_where_a_scale_is_drawn_in_steps(law, inside):
    assert examine(Case(name="star in steps", make=lambda seed: stable(seed, inside), request=REQUEST), law)


def test_a_scale_in_steps_needs_a_sampler_and_leaves_the_scales_before_it_alone():
    system, config = built("star")
    system.eval()
    cond = system.prepare(REQUEST)
    runs = [
        finish(generate(system, cond, STARSampling(inside=inside), Noise.of(0, 3))).tokens
        for inside in ("independent", "stable")
    ]
    coarse = system.transformer.layout.offsets[config.sampler_from]
    assert torch.equal(runs[0][:, :coarse], runs[1][:, :coarse]) and not torch.equal(*runs)
    bare = build(replace(config, sampler_from=None))
    with pytest.raises(ValueError, match="has no sampler"):
        bare.start(cond, STARSampling(inside="stable"), Noise.of(0, 3))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        system.start(cond, STARSampling(inside="stable", steps=0), Noise.of(0, 3))


def test_the_sampler_reads_what_is_placed_in_its_own_scale():
    system, _ = built("star")
    t = system.transformer
    torch.manual_seed(0)
    h, placed, pooled = torch.randn(2, 13, 16), torch.randn(2, 13, 4), torch.randn(2, 8)
    both = t.stable(h, placed, pooled, 1, 3)
    alone = t.stable(h[:, 4:], placed[:, 4:], pooled, 2, 3)
    torch.testing.assert_close(both[:, 4:], alone)  # with one block the summary has told nothing of the other scale
    other = placed.clone()
    other[:, 12] = 0
    moved = (t.stable(h, other, pooled, 1, 3) - both).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False] * 4 + [True] * 9


# -- cross-attention ------------------------------------------------------------------------------------------------


def test_the_first_row_of_an_item_speaks_for_it_as_for_a_batch_of_one_picture():
    system, config = built("star")
    cond = system.prepare(REQUEST)

    def logits(how: str, items: slice):
        own = build(replace(config, cross="first" if how == "item" else "own")).eval()
        state = system.state_dict()
        if how == "item":
            state = {name.replace(".cross.", ".cross.cross."): x for name, x in state.items()}
        own.load_state_dict(state)
        for block in own.transformer.trunk.blocks if how == "batch" else ():
            block.cross = FirstOfBatch(block.cross)
        some = {name: x[items] for name, x in cond.items()}
        s = own.start(some, STARSampling(top_k=0, top_p=0.0), Noise.of(0, 3).take(torch.arange(3)[items]))
        out = []
        while not bool(s.done.all()):
            d = own.predict(s)
            out.append(d.logits)
            own.commit(s, d, d.sample(s.noise))
        return torch.cat(out, 1)

    whole = logits("item", slice(0, 3))
    for i in range(3):
        alone = logits("batch", slice(i, i + 1))
        torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, logits("own", slice(0, 3)), atol=1e-3)
    assert not torch.allclose(whole, logits("batch", slice(0, 3)), atol=1e-3)


def test_without_a_cache_every_row_is_an_item():
    system, _ = built("star")
    cross = system.transformer.trunk.blocks[0].cross
    call = Call(context=(torch.randn(3, 5, 8), None))
    x = torch.randn(3, 4, 16)
    assert torch.equal(FirstRow(cross)(x, call), cross(x, call))


# -- training -------------------------------------------------------------------------------------------------------


def batch(system):
    tokens = (Noise.of(3, 3).uniform("tokens", 0, (14, 1)) * 5).long()
    return {"tokens": tokens, "prompt": REQUEST["prompt"]}


def test_the_sampler_learns_hidden_tokens_and_leaves_the_transformer_alone():
    torch.manual_seed(0)
    system = tiny()
    out = system.loss(batch(system), Noise.of(0, 3))
    parts = [out["sampler"].item(), *(_share(out, k) for k in range(3))]
    assert out["loss"].item() == pytest.approx(sum(parts), rel=1e-5)
    out["sampler"].backward()
    grads = {name for name, p in system.transformer.named_parameters() if p.grad is not None}
    assert grads and all(name.startswith("sampler.") for name in grads)
    assert {n.split(".")[1] for n in grads} == {"word", "level", "start_position", "project", "join", "trunk", "head"}


def _share(out, k):
    return float(out[f"nats_{k}"]) * (k + 1) ** 2 / 14


def test_shown_tokens_cost_the_sampler_nothing():
    torch.manual_seed(0)
    system = tiny()

    class All(Noise):
        """Every token is shown."""

        def uniform(self, what, at, shape):
            u = super().uniform(what, at, shape)
            return torch.zeros_like(u) if what in ("shown", "share") else u

    noise = All(Noise.of(0, 3).seed_B)
    assert system.loss(batch(system), noise)["sampler"] == 0


def test_of_the_last_scale_random_rows_are_kept():
    _, config = built("star")
    torch.manual_seed(0)
    system = build(replace(config, sampler_from=None, keep_tokens=10)).eval()
    torch.manual_seed(0)
    whole = build(replace(config, sampler_from=None)).eval()
    kept = system._kept(Noise.of(0, 3), torch.zeros(3, 14, 1))
    assert kept.shape == (3, 10) and torch.equal(kept[:, :5], torch.arange(5).expand(3, -1))
    assert (kept.diff(dim=1) > 0).all() and not torch.equal(kept[0], kept[1]) and kept.max() < 14
    some, every = (x.loss(batch(x), Noise.of(0, 3)) for x in (system, whole))
    for k in (0, 1):
        torch.testing.assert_close(some[f"nats_{k}"], every[f"nats_{k}"])
    nats = (float(some[f"nats_{k}"]) * n for k, n in ((0, 1), (1, 4), (2, 5)))
    assert some["loss"].item() == pytest.approx(sum(nats) / 10, rel=1e-5)
    with pytest.raises(ValueError, match=r"must lie in 6\.\.14, got 5"):
        build(replace(config, sampler_from=None, keep_tokens=5)).loss(batch(system), Noise.of(0, 3))


def test_configurations_that_mean_nothing_are_refused():
    _, config = built("star")
    with pytest.raises(ValueError, match="exactly one of clip and text"):
        replace(config, clip=CLIPConfig())
    with pytest.raises(ValueError, match=r"scales 1\.\.2, got 3"):
        replace(config, sampler_from=3)
    with pytest.raises(ValueError, match="keep_tokens must be 0, got 10"):
        replace(config, keep_tokens=10)


# -- text -----------------------------------------------------------------------------------------------------------


def features(items: int, seed: int, length: int = 5):
    noise = Noise.of(seed, items)
    return {
        "features": noise.normal("states", 0, (length, 8)).float(),
        "pooled": noise.normal("pooled", 0, (8,)).float(),
        "visible": noise.uniform("visible", 0, (length,)) < 0.7,
    }


def test_features_can_be_given_and_the_null_row_has_its_own():
    torch.manual_seed(0)
    conditioner = ClipConditioner(CLIPConfig(channels=8, length=5), 16)
    text, null = features(3, 0), features(1, 1)
    request = {f"text_{n}": x for n, x in text.items()} | {f"negative_{n}": x for n, x in null.items()}
    cond = conditioner.prepare(request)
    c = conditioner(cond, torch.tensor([False, True, False]))
    assert torch.equal(c.vector[[0, 2]], text["pooled"][[0, 2]]) and torch.equal(c.vector[1], null["pooled"][0])
    assert torch.equal(c.context[0][1], null["features"][0]) and torch.equal(c.context[1][1], null["visible"][0])
    assert torch.equal(c.start, conditioner.project(c.vector))
    with pytest.raises(ValueError, match=r"text_pooled \[B, 8\]"):
        conditioner.prepare({**request, "text_pooled": torch.zeros(3, 7)})
    with pytest.raises(ValueError, match="a prompt is needed"):
        conditioner.prepare({})


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A folder as the hub has it: a text encoder of random weights, and a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    letters = "adelpr"
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    yield str(folder)
    _encoder.cache_clear()


def test_prompts_are_read_by_the_frozen_encoder_and_the_summary_is_the_state_of_their_end(repo):
    states, pooled, visible = clip_features(["a red", "", "apple apple apple"], repo, 8)
    assert states.shape == (3, 8, 16) and pooled.shape == (3, 16) and not states.requires_grad
    assert visible.sum(1).tolist() == [6, 2, 8], "with both ends; long ones are cut"
    for i in range(3):
        torch.testing.assert_close(pooled[i], states[i, visible[i].sum() - 1])
    torch.testing.assert_close(clip_features([""], repo, 8)[0][0, :2], states[1, :2])
    conditioner = ClipConditioner(CLIPConfig(repo=repo, channels=16, length=8), 4)
    cond = conditioner.prepare({"prompt": ["a red", "apple"]})
    torch.testing.assert_close(cond["null_text"], states[1:2].expand(2, -1, -1))
    nothing = conditioner(None, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(nothing.vector, pooled[1:2].expand(2, -1))


def test_an_encoder_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="cannot be loaded, from the hub or as a folder"):
        clip_features(["a"], str(tmp_path), 8)
