"""M-VAR: attention never leaves its scale, the scan always does, and sampling over the cache is the one pass."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.cost import Counting
from arvis.nn.cache import Cache
from arvis.nn.mamba import Mamba2Config
from arvis.noise import Noise
from arvis.parity.m_var import configured
from arvis.systems import m_var, var
from arvis.tokenizers.patch import PatchConfig
from arvis.tokenizers.pyramid import PyramidVQConfig
from arvis.weights import load_official, to_official

LAYOUTS = Path(__file__).parents[3] / "shared/keys/m-var"
CODES, CHANNELS, CLASSES = 11, 4, 3


def config(patch_nums: tuple[int, ...] = (1, 2, 3, 5), **sizes) -> m_var.MVarConfig:
    side = patch_nums[-1]
    patch = PatchConfig(
        grid=(side, side), z_channels=CHANNELS, width=8, heads=2, encoder_depth=1, decoder_depth=1, refine=4
    )
    tokenizer = PyramidVQConfig(patch_nums=patch_nums, vocab_size=CODES, z_channels=CHANNELS, patch=patch)
    scale = var.VARConfig(tokenizer=tokenizer, depth=2, width=16, heads=2, num_classes=CLASSES, **sizes)
    return m_var.MVarConfig(scale=scale, mamba=Mamba2Config(d_state=4, headdim=8, ngroups=2))


def lively(given: m_var.MVarConfig) -> var.VAR:
    """Random weights of a size that shows, float64."""
    torch.manual_seed(0)
    system = m_var.build(given).double().eval()
    for p in system.transformer.parameters():
        torch.nn.init.normal_(p, 0.0, 0.4)
    return system


def followed(system: var.VAR, tokens: Tensor, cond) -> tuple[Tensor, Cache]:
    """Logits [B, N, V] step by step along given tokens, and the cache at the end."""
    s, logits = system.start(cond, system.Sampling.plain(), Noise.of(0, len(tokens))), []
    while not bool(s.done.all()):
        d = system.predict(s)
        logits.append(d.logits[:, :, 0])
        system.commit(s, d, tokens[:, s.layout.span(s.at())])
    return torch.cat(logits, 1), s.cache["trunk"]


@pytest.fixture(scope="module")
def system() -> var.VAR:
    return lively(config())


@pytest.fixture(scope="module")
def tokens(system) -> Tensor:
    return torch.randint(CODES, (2, system.tokenizer.layout().n, 1), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_sampling_over_the_cache_is_the_one_pass(system, tokens):
    cond = system.prepare({"class_labels": [0, 2]})
    one_pass = system.teacher(tokens, cond).logits[:, :, 0]
    cached, _ = followed(system, tokens, cond)
    torch.testing.assert_close(cached, one_pass, atol=1e-10, rtol=1e-10)
    assert one_pass.std() > 0.1


@torch.no_grad()
def test_a_state_that_starts_anew_at_every_scale_is_another_model(system, tokens, monkeypatch):
    cond = system.prepare({"class_labels": [0, 2]})
    whole, _ = followed(system, tokens, cond)
    monkeypatch.setattr(Cache, "recall", lambda self, layer, step: [])
    fresh, _ = followed(system, tokens, cond)
    first = system.tokenizer.layout().sizes[0]
    assert torch.equal(fresh[:, :first], whole[:, :first])
    assert (fresh - whole)[:, first:].abs().amax() > 1e-2


def reach(system: var.VAR) -> Tensor:
    """Which scale's input rows move which scale's output rows, bool [K, K]."""
    layout = system.tokenizer.layout()
    out = torch.zeros(layout.K, layout.K, dtype=torch.bool)
    label = torch.zeros(1, dtype=torch.int64)
    c = system.transformer.conditioner({"class_labels": label}, label > 0)
    x = torch.randn(1, layout.n - layout.sizes[0], CHANNELS, dtype=torch.float64)
    base = system.transformer(c, x, 0, layout.K, system.see)
    for j in range(1, layout.K):
        bumped = x.clone()
        bumped[:, layout.offsets[j] - layout.sizes[0]] += 1  # the first row of the scale
        moved = (system.transformer(c, bumped, 0, layout.K, system.see) - base).abs().amax((0, 2)) > 0
        for k in range(layout.K):
            part = moved[layout.span(k)]
            assert bool(part.all()) or not bool(part.any()), "a scale is moved whole or not at all"
            out[k, j] = bool(part.all())
    return out


@torch.no_grad()
def test_attention_stays_inside_a_scale_and_the_scan_reaches_every_finer_one():
    system = lively(config())
    every = torch.ones(4, 4, dtype=torch.bool).tril()
    every[:, 0] = False  # the class alone is there
    assert torch.equal(reach(system), every)
    for block in system.transformer.trunk.blocks:
        block.get_parameter("mamba.out_proj.weight").zero_()
    assert torch.equal(reach(system), every & torch.eye(4, dtype=torch.bool))


@torch.no_grad()
def test_what_is_kept_of_the_past_does_not_grow(tokens):
    """Two states of each block, as a step may be repeated; no keys, no values, however many scales there are."""
    kept = set()
    for scales in ((1, 2, 3, 5), (1, 2, 3, 4, 5, 6, 7)):
        system = lively(config(scales))
        count = system.tokenizer.layout().n
        _, cache = followed(system, torch.zeros(2, count, 1, dtype=torch.int64), None)
        assert not cache.k and not cache.v
        kept.add(sum(x[0].numel() for x in cache.extra.values()))
    inner, state, groups = 32, 4, 2
    assert kept == {2 * 2 * (inner * state + 3 * (inner + 2 * groups * state))}  # depth 2, two states


@torch.no_grad()
def test_a_scale_costs_what_its_own_tokens_cost():
    """Products of the last prediction after few and after many rows: equal here, not in VAR."""
    found = {}
    for name, build in (("here", m_var.build), ("there", lambda c: var.build(c.scale))):
        for scales in ((1, 4), (1, 2, 3, 5, 6, 4)):
            with torch.device("meta"):
                system = build(config(scales)).eval()
            s = system.start(None, system.Sampling.plain(), Noise.of(0, 1, "meta"))
            while s.at() < s.K - 1:
                d = system.predict(s)
                system.commit(s, d, d.sample(s.noise))
            with Counting(4) as counting:
                system.predict(s)
            found[name, len(scales)] = counting.work.flops
    assert found["here", 2] == found["here", 6] > 0
    assert found["there", 2] < found["there", 6]


@torch.no_grad()
def test_the_last_step_can_be_repeated_and_no_earlier_one(system, tokens):
    s = system.start(None, system.Sampling.plain(), Noise.of(0, 2))
    for k in range(3):
        d = system.predict(s)
        assert torch.equal(system.predict(s).logits, d.logits)
        system.commit(s, d, tokens[:, s.layout.span(k)])
    s.k -= 2
    with pytest.raises(ValueError, match=r"recurrent state .* cannot be rolled back to step 1"):
        system.predict(s)


def test_the_gates_of_attention_and_scan_start_small_and_the_third_does_not():
    block = m_var.build(replace(config(), scale=replace(config().scale, adaln_init=1e-3))).transformer.trunk.blocks[0]
    rows = block.get_parameter("modulation.project.weight").detach().unflatten(0, (9, -1)).std((1, 2))
    assert rows[:2].max() < 1e-3 and rows[2:].min() > 0.03
    assert not block.get_parameter("mamba.conv1d.bias").any()


def test_a_shared_modulation_is_refused():
    with pytest.raises(ValueError, match="shared_aln=False"):
        config(shared_aln=True)


# -- official names and settings ------------------------------------------------------------------------------------


def of_the_paper(w, x_BNC, labels, layout, heads, cosine, mamba):
    """M-VAR in official names, from the formulas alone: logits [B, N, V] of inputs without scale 0."""
    c = w["class_emb.weight"][labels]
    x = torch.cat((c[:, None] + w["pos_start"], x_BNC @ w["word_embed.weight"].T + w["word_embed.bias"]), 1)
    x = x + w["pos_1LC"] + w["lvl_embed.weight"][w["lvl_1L"]]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    for i in range(2):
        b = f"blocks.{i}"
        g1, g2, g3, s1, s2, s3, b1, b2, b3 = linear(F.silu(c), f"{b}.ada_lin.1").unflatten(1, (9, 1, -1)).unbind(1)
        bias = torch.cat((w[f"{b}.attn.q_bias"], w[f"{b}.attn.zero_k_bias"], w[f"{b}.attn.v_bias"]))
        qkv = (norm(x) * (1 + s1) + b1) @ w[f"{b}.attn.mat_qkv.weight"].T + bias
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        if cosine:
            q = q / q.norm(dim=-1, keepdim=True) * w[f"{b}.attn.scale_mul_1H11"].clamp(max=math.log(100)).exp()
            score = q @ (k / k.norm(dim=-1, keepdim=True)).mT
        else:
            score = q @ k.mT * 0.25 / q.shape[-1] ** 0.5
        out = (score + w["attn_bias_for_masking"]).softmax(-1) @ v
        x = x + g1 * linear(out.transpose(1, 2).flatten(2), f"{b}.attn.proj")
        x = x + g2 * scanned(w, f"{b}.mamba", norm(x) * (1 + s2) + b2, mamba)
        h = linear(norm(x) * (1 + s3) + b3, f"{b}.ffn.fc1")
        x = x + g3 * linear(F.gelu(h, approximate="tanh"), f"{b}.ffn.fc2")
    scale, shift = linear(F.silu(c), "head_nm.ada_lin.1")[:, None].chunk(2, -1)
    return linear(norm(x) * (1 + scale) + shift, "head")


def scanned(w, name, u, mamba):
    """Mamba-2 row by row."""
    inner, wide = w[f"{name}.norm.weight"].numel(), mamba.ngroups * mamba.d_state
    z, xbc, dt = (u @ w[f"{name}.in_proj.weight"].T).split((inner, inner + 2 * wide, inner // mamba.headdim), -1)
    rows = F.conv1d(F.pad(xbc.mT, (3, 0)), w[f"{name}.conv1d.weight"], w[f"{name}.conv1d.bias"], groups=xbc.shape[2])
    x, b, c = F.silu(rows.mT).split((inner, wide, wide), -1)
    x, dt = x.unflatten(-1, (-1, mamba.headdim)), F.softplus(dt + w[f"{name}.dt_bias"])
    each = x.shape[2] // mamba.ngroups
    b, c = (t.unflatten(-1, (mamba.ngroups, -1)).repeat_interleave(each, 2) for t in (b, c))
    state, out = 0, []
    for t in range(u.shape[1]):
        keep = (-w[f"{name}.A_log"].exp() * dt[:, t]).exp()[..., None, None]
        state = keep * state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        out.append((state * c[:, t, :, None]).sum(-1) + w[f"{name}.D"][:, None] * x[:, t])
    y = (torch.stack(out, 1).flatten(2) * F.silu(z)).unflatten(-1, (mamba.ngroups, -1))
    y = y / (y.square().mean(-1, keepdim=True) + mamba.norm_eps).sqrt()
    return y.flatten(2) * w[f"{name}.norm.weight"] @ w[f"{name}.out_proj.weight"].T


@pytest.mark.parametrize("cosine", [True, False])
@torch.no_grad()
def test_it_follows_the_formulas_in_official_names_and_back(cosine):
    given = config(attn_l2_norm=cosine)
    system, table = lively(given), m_var.keys(given)["transformer"]
    official = to_official(system.transformer, table)
    assert official["blocks.1.attn.patch_nums"].tolist() == [1, 4, 9, 25]
    assert ("blocks.0.attn.scale_mul_1H11" in official) == cosine
    fresh = m_var.build(given).double().eval()
    load_official(fresh.transformer, table, official)
    layout, labels = system.tokenizer.layout(), torch.tensor([0, 3])
    tokens = torch.randint(CODES, (2, layout.n, 1))
    x = fresh.tokenizer.inputs(tokens, layout, 1)
    ours = fresh.teacher(tokens, {"class_labels": labels}).logits[:, :, 0]
    theirs = of_the_paper(official, x, labels, layout, given.scale.heads, cosine, given.mamba)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in m_var.PRESETS if not name.endswith("64")])
def test_presets_are_the_official_constructors(name):
    file = LAYOUTS / f"{name.removeprefix('m-var-')}.json"
    if not file.exists():
        pytest.skip("the layouts of the official files lie beside the repository and are not here")
    values = json.loads(file.read_text())["constructor"]
    quantizer = {"vocab_size": values["vocab_size"], "Cvae": values["Cvae"], "v_patch_nums": values["patch_nums"]}
    given, preset = configured(quantizer, values), m_var.PRESETS[name].config()
    for field in ("depth", "width", "heads", "num_classes", "norm_eps", "shared_aln", "attn_l2_norm"):
        assert getattr(preset.scale, field) == getattr(given.scale, field), field
    assert preset.mamba == given.mamba == Mamba2Config()


def test_a_gate_after_the_norm_is_refused():
    with pytest.raises(ValueError, match="norm_before_gate=True"):
        configured({}, {"mamba": {"norm_before_gate": True}})
