"""Next-token prediction beyond the laws: padded prefixes, ragged items, guidance that ends, windows, training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from arvis.editing import keep_tokens
from arvis.next_token import NextToken, cfg_until, temper_k_p
from arvis.nn.text import TextConfig
from arvis.noise import Noise, Recorded
from arvis.rows import Rows, lone_tags, render, tree, tree_tags, upto
from arvis.sampling import per_item
from arvis.speculative import certain, speculate
from arvis.state import join_states
from arvis.systems import llamagen
from arvis.systems.llamagen import CaptionConfig, LlamaGenConfig, LlamaGenSampling
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.grid import GridVQConfig
from arvis.tokens import Layout, Pin, at
from arvis.walk import finish, generate, likelihood, walk

ITEMS, CODES, TEXT = 3, 7, 5
PLAIN = LlamaGenSampling.plain()


def system(condition: str = "class", seed: int = 0) -> NextToken:
    """A small system with lively weights, in float64."""
    torch.manual_seed(seed)
    cnn = CNNConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4)
    tokenizer = GridVQConfig(grid=(2, 3), vocab_size=CODES, code_width=4, cnn=cnn)
    config = LlamaGenConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, num_classes=4, ffn_multiple=8)
    if condition == "caption":
        config = replace(config, num_classes=0, caption=CaptionConfig(repo="none", channels=6, rows=TEXT))
    if condition == "text":
        text = TextConfig(buckets=64, words=4, pieces=6, width=8, depth=1, heads=2)
        config = replace(config, num_classes=0, text=text, still=True)
    out = llamagen.build(config)
    for p in out.transformer.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return out.double().eval()


@pytest.fixture(scope="module")
def classes():
    return system()


@pytest.fixture(scope="module")
def captions():
    return system("caption")


def captioned(s: NextToken, lengths: tuple[int, ...] = (2, TEXT, 1)):
    """Conditions of captions of these lengths."""
    features = Noise.of(4, len(lengths)).normal("text", 0, (TEXT, 6))
    visible = torch.arange(TEXT) < torch.tensor(lengths)[:, None]
    return s.prepare({"text_features": features, "text_visible": visible})


def drawn(what: str = "tokens", n: int = 6) -> torch.Tensor:
    return (Noise.of(5, ITEMS).uniform(what, 0, (n, 1)) * CODES).long()


def stepped(s: NextToken, cond, tokens, sampling=PLAIN) -> torch.Tensor:
    """Logits [B, N, V] step by step along given tokens."""
    state, out = s.start(cond, sampling, Noise.of(0, len(tokens)), Layout(((2, 3),))), []
    while not bool(state.done.all()):
        d = s.predict(state)
        out.append(d.logits[:, :, 0])
        s.commit(state, d, at(tokens, d.where))
    return torch.cat(out, 1)


# -- the prefix -----------------------------------------------------------------------------------------------------


def test_padding_is_seen_by_itself_alone():
    hidden = torch.tensor([[True, True, False, False], [False, False, True, False], [True] * 4])
    rows = Rows.of(torch.arange(-3, 1).expand(3, -1), lone_tags(hidden))
    mask = render(tree, rows, rows)
    wanted = torch.tril(torch.ones(4, 4, dtype=torch.bool)) & ~hidden[:, None] | torch.eye(4, dtype=torch.bool)
    assert torch.equal(mask[:, 0], wanted)
    drafts = Rows.of(torch.tensor([[1, 2, 2]]), tree_tags(torch.tensor([[-1, 0, 0]])))
    assert torch.equal(render(tree, drafts, rows)[:, 0], ~hidden[:, None].expand(-1, 3, -1)), "drafts see no padding"


@torch.no_grad()
def test_the_network_is_the_formula_of_the_sheet(captions):
    """The mask of a padded caption, written out: causal, without columns of padding, with the diagonal."""
    cond, tokens, t = captioned(captions), drawn(), captions.transformer
    prefix = t.conditioner(cond, torch.zeros(ITEMS, dtype=torch.bool))
    x = torch.cat((prefix.rows, t.embedding(tokens[:, :-1, 0])), 1)
    count = x.shape[1]
    seen = torch.ones(ITEMS, count, dtype=torch.bool)
    seen[:, :TEXT] = prefix.visible
    mask = torch.tril(torch.ones(count, count, dtype=torch.bool)) & seen[:, None] | torch.eye(count, dtype=torch.bool)
    cells = torch.cartesian_prod(torch.arange(2), torch.arange(3))[: count - TEXT].double()
    rate = 10000.0 ** (-torch.arange(0, 4, 2) / 4)  # heads of 8 channels: two rates for the row, two for the column
    angle = F.pad((cells[:, :, None] * rate).flatten(1), (0, 0, TEXT, 0))
    turn = torch.polar(torch.ones_like(angle), angle) * (torch.arange(count) >= TEXT)[:, None]

    def norm(x, m):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight

    def rotated(x):  # pairs of neighbours as complex numbers
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    for b in t.trunk.blocks:
        q, k, v = (norm(x, b.attn_norm) @ b.attn.qkv.weight.T).view(ITEMS, count, 3, 2, 8).permute(2, 0, 3, 1, 4)
        score = (rotated(q) @ rotated(k).mT / 8**0.5).masked_fill(~mask[:, None], -torch.inf)
        x = x + (score.softmax(-1) @ v).transpose(1, 2).flatten(2) @ b.attn.out.weight.T
        h = norm(x, b.ffn_norm)
        x = x + (F.silu(h @ b.ffn.gate.weight.T) * (h @ b.ffn.up.weight.T)) @ b.ffn.down.weight.T
    wanted = (norm(x, t.norm) @ t.output.weight.T)[:, TEXT - 1 :]
    got = captions.teacher(tokens, cond).logits[:, :, 0]
    assert torch.allclose(got, wanted, atol=1e-6)  # the rotary table is rounded to float32
    assert torch.allclose(stepped(captions, cond, tokens), got, atol=1e-10)


@torch.no_grad()
def test_a_caption_without_words_and_right_padding_are_no_special_cases(captions):
    cond = captioned(captions, (0, 3, TEXT))
    tokens = drawn()
    one_pass = captions.teacher(tokens, cond).logits[:, :, 0]
    assert torch.allclose(stepped(captions, cond, tokens), one_pass, atol=1e-10)
    other = captions.teacher(drawn("other"), cond).logits[:, 0, 0]
    assert torch.equal(other, one_pass[:, 0]), "the row that starts an empty caption sees no tokens"
    given = Pin(torch.arange(6).expand(ITEMS, -1) < 3, tokens)
    d = captions.predict(captions.start(cond, PLAIN, Noise.of(0, ITEMS), given=given))
    assert torch.allclose(d.logits[:, 0, 0], one_pass[:, 3], atol=1e-10)


@pytest.mark.parametrize("lengths", [(2, 3, 1), (0, 0, 0), (2, 2, 2)])
def test_rows_that_are_padding_in_every_item_are_not_computed(lengths):
    """Beside a caption of full length the same items have all rows: hidden rows and gradients are the same."""
    s, tokens, rows, results = system("caption"), drawn(), [], []
    weight = Noise.of(6, ITEMS).normal("weight", 0, (6, 16))
    s.transformer.trunk.register_forward_pre_hook(lambda m, given: rows.append(given[0].shape[1]))
    for more in ((), (TEXT,)):
        items = [*range(ITEMS), *(0 for _ in more)]
        cond = captioned(s, (*lengths, *more))
        prefix = s.transformer.conditioner(cond, torch.tensor([False, True, False, False])[: len(items)])
        s.zero_grad()
        h = s.hidden(tokens[items], prefix, Layout(((2, 3),)))[:ITEMS]
        (h * weight).sum().backward()
        results.append([h.detach(), *(p.grad for p in s.transformer.parameters() if p.grad is not None)])
    assert rows == [max(1, *lengths) + 5, TEXT + 5]
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_the_null_half_has_the_padding_of_its_caption(captions):
    cond, tokens = captioned(captions), drawn()
    guided = stepped(captions, cond, tokens, LlamaGenSampling(cfg_scale=3.0, top_k=0))
    t = captions.transformer
    null = t.conditioner(cond, torch.ones(ITEMS, dtype=torch.bool))
    assert torch.equal(null.visible, cond["text_visible"])
    u = t.head(captions.hidden(tokens, null, Layout(((2, 3),))))
    c = captions.teacher(tokens, cond).logits[:, :, 0]
    assert torch.allclose(guided, u + 3 * (c - u), atol=1e-9)
    free = captions.teacher(tokens, None).logits[:, :, 0]
    assert not torch.allclose(free, u, atol=1e-3), "without a caption every row of the null is seen"


@torch.no_grad()
def test_rows_of_the_condition_act_through_values_alone_unless_they_are_still(classes):
    """Random queries and keys in the row of the condition change nothing where its rotary row is zero."""
    for s, still in ((classes, False), (system("text"), True)):
        lead, tokens = s.transformer.conditioner.length, drawn()
        cond = s.prepare({"class_labels": [0, 1, 2], "prompt": ["a", "b c", "d e f"]})
        before = s.teacher(tokens, cond).logits

        def spoil(module, args, out, lead=lead, part=slice(0, 32)):
            out[:, :lead, part] = torch.randn(len(out), lead, out[:, :, part].shape[2], dtype=out.dtype)
            return out

        def spoil_values(module, args, out, spoil=spoil, lead=lead):
            return spoil(module, args, out, lead, slice(32, 48))

        for hook, changes in ((spoil, still), (spoil_values, True)):
            hooks = [b.attn.qkv.register_forward_hook(hook) for b in s.transformer.trunk.blocks]
            after = s.teacher(tokens, cond).logits
            for h in hooks:
                h.remove()
            assert torch.equal(before, after) != changes


# -- steps ----------------------------------------------------------------------------------------------------------


def test_guidance_ends_after_so_many_decodes():
    weights = cfg_until(torch.tensor([3.0, 3.0, 1.0, 0.5]).double(), torch.tensor([-1.0, 1.0, -1.0, 2.0]), 5)
    assert weights[..., 0].tolist() == [[3] * 5, [3, 3, 3, 1, 1], [1] * 5, [1] * 5]  # the first step is no decode
    assert torch.equal(weights.sum(-1), torch.ones(4, 5).double())
    assert torch.equal(cfg_until(torch.tensor([1.0, 0.0]), torch.tensor([-1, -1]), 3), torch.ones(2, 3, 1))


@torch.no_grad()
def test_guidance_is_the_weighted_sum_and_unguided_items_need_no_second_row(classes):
    tokens, labels = drawn(), torch.tensor([0, 1, 3])
    cond = classes.prepare({"class_labels": labels})
    c = classes.teacher(tokens, cond).logits[:, :, 0]
    u = classes.teacher(tokens, classes.prepare({"class_labels": [4] * ITEMS})).logits[:, :, 0]
    assert torch.equal(u, classes.teacher(tokens, None).logits[:, :, 0])
    scales = [4.0, 1.5, 1.0]
    got = stepped(classes, cond, tokens, LlamaGenSampling(cfg_scale=scales, cfg_interval=1, top_k=0))
    for i, scale in enumerate(scales):
        wanted = u[i] + scale * (c[i] - u[i])
        assert torch.allclose(got[i, :3], wanted[:3], atol=1e-9) and torch.allclose(got[i, 3:], c[i, 3:], atol=1e-9)
    plain = classes.start(cond, LlamaGenSampling(cfg_scale=1.0), Noise.of(0, ITEMS))
    classes.predict(plain)
    assert plain.cache["trunk"].k[0].shape[1] == plain.more["prefix"].shape[1] == 1


def test_the_filters_follow_the_official_order():
    """Temperature, then the k best with ties, then the nucleus of what is left, which keeps the code that crosses p."""
    p = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.06, 0.04])
    logits = p.log()[None, None, None].expand(2, -1, -1, -1)
    knobs = {"temperature": per_item([1.0, 0.5], 2), "top_k": per_item([3, 0], 2), "top_p": per_item([0.7, 0.7], 2)}
    got = temper_k_p(logits, knobs).softmax(-1)[:, 0, 0]
    kept = torch.tensor([0.4, 0.3, 0.0, 0.0, 0.0, 0.0])  # of 0.9 four codes hold 0.44 and 0.33: beyond 0.7
    assert torch.allclose(got[0], kept / kept.sum(), atol=1e-6)
    sharp = torch.tensor([0.16, 0.09, 0, 0, 0, 0])
    assert torch.allclose(got[1], sharp / sharp.sum(), atol=1e-6)


@torch.no_grad()
def test_items_at_different_steps_share_a_batch(classes):
    """Caches of unequal lengths: split, walked apart, joined and walked together gives what each gives alone."""
    cond, guided = classes.prepare({"class_labels": [0, 1, 2]}), LlamaGenSampling(cfg_scale=2.0)
    whole = finish(generate(classes, cond, guided, Noise.of(1, ITEMS))).tokens
    s = classes.start(cond, guided, Noise.of(1, ITEMS))
    parts = [s.fork().take_(torch.tensor([i])) for i in range(ITEMS)]
    for part, k in zip(parts, (0, 2, 5), strict=True):
        for _ in walk(classes, part, until=k):
            pass
    joined = join_states(parts)
    assert joined.k.tolist() == [0, 2, 5]
    assert torch.equal(finish(walk(classes, joined)).tokens, whole)


@torch.no_grad()
def test_given_tokens_lie_anywhere_and_the_leading_ones_are_fed_at_once(classes):
    cond, tokens = classes.prepare({"class_labels": [0, 1, 2]}), drawn()
    mask = torch.tensor([[True, True, False, False, True, False], [False, True] * 3, [True] * 6])
    s = classes.start(cond, LlamaGenSampling(), Noise.of(2, ITEMS), given=Pin(mask, tokens))
    assert s.k.tolist() == [2, 0, 6]
    classes.predict(s)
    assert s.cache["trunk"].filled.tolist() == [3, 1, 6]
    s = finish(walk(classes, s))
    assert torch.equal(s.tokens[mask], tokens[mask])
    kept = keep_tokens(torch.tensor([[True, False, True]] * 2), Layout(((2, 3),))).expand(ITEMS, -1)
    s = finish(generate(classes, cond, LlamaGenSampling(), Noise.of(2, ITEMS), given=Pin(kept, tokens)))
    assert torch.equal(s.tokens[kept], tokens[kept]) and not torch.equal(s.tokens, tokens)


@torch.no_grad()
def test_other_grids_have_positions_of_their_own(classes):
    """A layout is an argument: the same weights on 3 x 2 cells, step by step and in one pass."""
    cond, tokens, tall = classes.prepare({"class_labels": [0, 1, 2]}), drawn(), Layout(((3, 2),))
    s, steps = classes.start(cond, PLAIN, Noise.of(0, ITEMS), tall), []
    while not bool(s.done.all()):
        d = classes.predict(s)
        steps.append(d.logits[:, :, 0])
        classes.commit(s, d, at(tokens, d.where))
    one_pass = classes.teacher(tokens, cond, tall).logits[:, :, 0]
    assert torch.allclose(torch.cat(steps, 1), one_pass, atol=1e-10)
    assert not torch.allclose(one_pass, classes.teacher(tokens, cond).logits[:, :, 0], atol=1e-3)


@torch.no_grad()
def test_recorded_noise_decides_what_is_drawn(classes):
    cond = classes.prepare({"class_labels": [0, 1, 2]})
    u = Noise.of(3, ITEMS).uniform("u", 0, (6,))
    noise = Recorded({"draw": [u[:, k, None, None] for k in range(6)]}, {}, ITEMS)
    s = finish(generate(classes, cond, PLAIN, noise))
    cdf = classes.teacher(s.tokens, cond).probs[:, :, 0].cumsum(-1)
    assert torch.equal((cdf <= u[..., None]).sum(-1), s.tokens[..., 0])


# -- windows --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_window_returns_the_hidden_rows_behind_its_probabilities(captions):
    cond, tokens = captioned(captions), drawn()
    guided = LlamaGenSampling(cfg_scale=2.0, top_k=4, temperature=0.8)
    s = captions.start(cond, guided, Noise.of(0, ITEMS))
    for _ in range(2):
        d = captions.predict(s)
        captions.commit(s, d, at(tokens, d.where))
    p, hidden = captions.window(s, tokens[:, 2:4, 0])
    assert p.shape == (ITEMS, 3, CODES) and hidden.shape == (ITEMS, 2, 3, 16)
    t = captions.transformer
    null = torch.zeros(ITEMS, dtype=torch.bool)
    for row, drop in enumerate((null, ~null)):
        wanted = captions.hidden(tokens, t.conditioner(cond, drop), s.layout)[:, 2:5]
        assert torch.allclose(hidden[:, row], wanted, atol=1e-10)
    u, c = t.head(hidden[:, 1]), t.head(hidden[:, 0])
    knobs = {"temperature": torch.tensor([0.8]), "top_k": torch.tensor([4.0]), "top_p": torch.tensor([1.0])}
    assert torch.allclose(p, temper_k_p((2 * c - u)[:, :, None], knobs).softmax(-1)[:, :, 0], atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "caption"])
def test_certain_drafts_that_are_the_greedy_tokens_are_all_kept(kind):
    s = system(kind)
    cond = captioned(s) if kind == "caption" else s.prepare({"class_labels": [0, 1, 2]})
    greedy = LlamaGenSampling(cfg_scale=2.0, temperature=0.0)
    wanted = finish(generate(s, cond, greedy, Noise.of(0, ITEMS))).tokens[..., 0]

    class Knows:
        def propose(self, state):
            where = (state.k[:, None] + torch.arange(3)).clamp(max=5)
            return certain(wanted.gather(1, where), CODES)

        def learn(self, *told):
            pass

    state = s.start(cond, greedy, Noise.of(0, ITEMS))
    steps = sum(1 for _ in speculate(s, state, Knows()))
    assert torch.equal(state.tokens[..., 0], wanted) and steps == 2


# -- training -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_loss_is_the_likelihood_and_counts_valid_samples():
    captions = system("caption")
    cond, tokens = captioned(captions), drawn()
    nats = -likelihood(captions, tokens, cond, Noise.of(0, ITEMS)) / 6
    captions.drop, batch = 0.0, {"tokens": tokens, **cond}
    assert torch.isclose(captions.loss(batch, Noise.of(0, ITEMS))["loss"], nats.mean(), atol=1e-9)
    some = captions.loss({**batch, "valid": [1, 0, 1]}, Noise.of(0, ITEMS))["loss"]
    assert torch.isclose(some, nats[[0, 2]].mean(), atol=1e-9)
    assert captions.loss({**batch, "valid": [0, 0, 0]}, Noise.of(0, ITEMS))["loss"] == 0
    captions.drop = 1.0
    null = captions.hidden(tokens, captions.transformer.conditioner(cond, torch.ones(ITEMS) > 0), Layout(((2, 3),)))
    wanted = F.cross_entropy(captions.transformer.head(null).flatten(0, 1), tokens.flatten())
    assert torch.isclose(captions.loss(batch, Noise.of(0, ITEMS))["loss"], wanted, atol=1e-9)


def test_conditions_are_dropped_as_often_as_asked(classes):
    seen = []
    conditioner = classes.transformer.conditioner
    hook = conditioner.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    batch = {"tokens": drawn().repeat(200, 1, 1), "class_labels": [0] * 600}
    with torch.no_grad():
        classes.loss(batch, Noise.of(3, 600))
    hook.remove()
    assert 35 <= int(seen[0].sum()) <= 85  # a tenth of 600, within three and a half deviations


def test_images_are_encoded_and_a_short_training_learns_them(classes):
    s = system(seed=1).float().train()
    images = torch.rand(4, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = s.latents(images)["tokens"]
    assert torch.equal(tokens, s.tokenizer.encode(images))
    s.drop = 0.0
    for module in s.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    labels = {"class_labels": [0, 1, 2, 3]}
    first = s.loss({"image": images, **labels}, Noise.of(0, 4))["loss"]
    assert torch.equal(first, s.loss({"tokens": tokens, **labels}, Noise.of(0, 4))["loss"])
    optimizer = torch.optim.Adam(s.transformer.parameters(), lr=1e-2)
    for _ in range(80):
        loss = s.loss({"tokens": tokens, **labels}, Noise.of(0, 4))
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
    assert loss["loss"] < 0.1 < first and loss["accuracy"] == 1
    s.eval()
    greedy = LlamaGenSampling(cfg_scale=1.0, temperature=0.0)
    assert torch.equal(finish(generate(s, s.prepare(labels), greedy, Noise.of(0, 4))).tokens, tokens)


def test_dropout_acts_in_training_alone(classes):
    s, batch = system(), {"tokens": drawn(), "class_labels": [0, 1, 2]}
    with torch.no_grad():
        calm = [s.loss(batch, Noise.of(0, ITEMS))["loss"] for _ in range(2)]
        s.train()
        wild = [s.loss(batch, Noise.of(0, ITEMS))["loss"] for _ in range(2)]
    assert calm[0] == calm[1] and wild[0] != wild[1]


def test_masks_kept_from_inference_serve_training():
    s = system()
    with torch.inference_mode():
        s.teacher(drawn(), None, Layout(((6, 1),)))
    loss = -s.teacher(drawn(), None, Layout(((6, 1),))).log_prob(drawn()).mean()
    loss.backward()
    assert all(p.grad is not None for n, p in s.transformer.named_parameters())


def test_siblings_of_a_window_do_not_see_each_other(classes):
    blind = system()
    blind.see = upto
    tokens, parents = drawn(), torch.tensor([[-1, -1]]).expand(ITEMS, -1)
    with torch.no_grad():
        found = []
        for s in (classes, blind):
            state = s.start(s.prepare({"class_labels": [0, 1, 2]}), PLAIN, Noise.of(0, ITEMS))
            found.append(s.window(state, tokens[:, :2, 0], parents)[0])
    for node, alike in enumerate((True, False, False)):  # under `upto` equal steps see each other
        assert torch.allclose(found[0][:, node], found[1][:, node], atol=1e-9) == alike
