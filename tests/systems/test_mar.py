"""MAR: its sets and schedules, guidance, in-painting, loss, conditions, official files."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from arvis import cost, parity
from arvis.nn.text import TextConfig
from arvis.noise import Noise
from arvis.orders import cosine_counts
from arvis.parity.mar import configured, respaced
from arvis.parity.mar import run as run_parity
from arvis.sampling import per_item
from arvis.systems import mar
from arvis.systems.mar import MAR, MARConfig, MARSampling, hidden_count, ramp
from arvis.tokenizers import PatchConfig
from arvis.tokenizers.kl import KLConfig
from arvis.tokens import Layout, Pin, at
from arvis.walk import finish, generate, walk
from arvis.weights import load_official, read, to_official

PATCH = PatchConfig(patch=2, grid=(4, 4), z_channels=2, double_z=True, width=8, heads=2, refine=4)
N = 16


def config(**changes) -> MARConfig:
    settings = {
        "tokenizer": KLConfig(z_channels=2, grid=(4, 4), scale=None, patch=PATCH),
        "width": 16,
        "depth": 1,
        "heads": 2,
        "num_classes": 3,
        "buffer": 2,
        "denoiser_width": 8,
        "denoiser_depth": 1,
        "diffusion_steps": 5,
        **changes,
    }
    return MARConfig(**settings)


def lively(**changes) -> MAR:
    """A small one in float64 whose weights are all random."""
    torch.manual_seed(0)
    system = mar.build(config(**changes))
    for parameter in system.transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return system.double().eval()


SYSTEM = lively()
COND = SYSTEM.prepare({"class_labels": [0, 1, 2]})
PLAIN = MARSampling.plain()


def tokens(seed: int = 0, items: int = 3) -> Tensor:
    return Noise.of(seed, items).normal("tokens", 0, (N, 2))


# -- sets and schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, N, 99])
@torch.no_grad()
def test_every_token_is_drawn_once_and_the_sets_follow_the_cosine(steps: int) -> None:
    sampling, drawn, sizes = MARSampling(cfg_scale=1.0, num_iter=steps), torch.zeros(3, N, dtype=torch.int64), []
    s = SYSTEM.start(COND, sampling, Noise.of(0, 3))
    for step in walk(SYSTEM, s):
        assert (step.fresh.sum(1) == step.fresh[0].sum()).all()
        drawn += step.fresh
        sizes.append(int(step.fresh[0].sum()))
    assert (drawn == 1).all()
    steps = min(steps, N)
    left = [max(1, min(N - k - 1, math.floor(N * math.cos(math.pi / 2 * (k + 1) / steps)))) for k in range(steps - 1)]
    assert len(sizes) == steps and sum(sizes) == N
    if steps < N:
        assert [N - sum(sizes[: k + 1]) for k in range(steps - 1)] == left
    assert (s.group.sort(1).values == s.group[0].sort().values).all() and (
        steps == 1 or not torch.equal(s.group[0], s.group[1])
    )


def test_settings_without_steps_are_refused() -> None:
    for changes in ({"num_iter": 0}, {"diffusion_steps": 0}):
        with pytest.raises(ValueError, match="at least one step"):
            MARSampling(**changes)


@torch.no_grad()
def test_the_number_of_denoising_steps_is_a_setting() -> None:
    whole = (0, 1, 2, 3, 4)
    for steps, spacing, times in (
        (2, "even", (0, 4)),
        (100, "even", whole),
        (3, "strided", (0, 2, 4)),
        (2, "strided", (0, 3)),
    ):
        s = SYSTEM.start(COND, MARSampling(diffusion_steps=steps, spacing=spacing), Noise.of(0, 3))
        assert s.key == times
        d, told = SYSTEM.predict(s), []
        field = d.field
        d.field = lambda x, t, field=field, told=told: told.append(t) or field(x, t)
        d.sample(s.noise)
        assert told == list(reversed(times))


def test_guidance_grows_with_the_share_that_is_drawn() -> None:
    """As published: (L - m) / L with m tokens hidden after the step, and one after the last."""
    s = SYSTEM.start(COND, MARSampling(cfg_scale=3.0, num_iter=4), Noise.of(0, 3))
    hidden = [14, 11, 6, 1]  # floor(16 cos(pi/8 (k + 1)))
    wanted = torch.tensor([1 + 2 * (N - m) / N for m in hidden]).double()
    torch.testing.assert_close(s.weights[0], torch.stack((wanted, 1 - wanted), -1))
    flat = SYSTEM.start(COND, MARSampling(cfg_scale=3.0, cfg_schedule="constant", num_iter=4), Noise.of(0, 3))
    assert (flat.weights == torch.tensor([3.0, -2.0])).all()
    own = ramp("linear", per_item([1.0, 3.0, 2.0], 3), torch.tensor([hidden]), N)
    assert own[0].tolist() == [1] * 4 and torch.equal(own[1], wanted)
    assert SYSTEM.start(COND, MARSampling(cfg_scale=1.0), Noise.of(0, 3)).weights.shape[-1] == 1


@torch.no_grad()
def test_only_the_noise_is_guided_and_the_variance_is_the_conditions_own() -> None:
    alone = {}
    for name, cond in (("cond", COND), ("null", None)):
        d = SYSTEM.predict(SYSTEM.start(cond, PLAIN, Noise.of(0, 3)))
        alone[name] = d.field(tokens()[:, :1], 3).chunk(2, -1)
    sampling = MARSampling(cfg_scale=3.0, cfg_schedule="constant")
    eps, share = SYSTEM.predict(SYSTEM.start(COND, sampling, Noise.of(0, 3))).field(tokens()[:, :1], 3).chunk(2, -1)
    torch.testing.assert_close(eps, 3 * alone["cond"][0] - 2 * alone["null"][0])
    torch.testing.assert_close(share, alone["cond"][1])


@torch.no_grad()
def test_hidden_values_are_never_read_and_visible_ones_are() -> None:
    s = SYSTEM.start(COND, MARSampling(cfg_scale=1.0, num_iter=4), Noise.of(0, 3))
    for _ in range(2):
        SYSTEM.commit(s, d := SYSTEM.predict(s), at(tokens(), d.where))
    x = tokens(1)[:, :5]
    before = SYSTEM.predict(s).field(x, 2)
    assert before.shape == (3, 5, 4)
    spoilt, moved = s.fork(), s.fork()
    spoilt.tokens = torch.where(s.known[..., None], s.tokens, torch.nan)
    assert torch.equal(SYSTEM.predict(spoilt).field(x, 2), before)
    one = s.known.double().argmax(1)
    moved.tokens[torch.arange(3), one] += 1
    assert ((SYSTEM.predict(moved).field(x, 2) - before).abs() > 1e-9).all()


# -- tokens that are given ------------------------------------------------------------------------------------------


def given(counts: list[int], seed: int = 0) -> Pin:
    """So many given tokens in each item."""
    rank = Noise.of(9, len(counts)).uniform("given", 0, (N,)).argsort(1).argsort(1)
    return Pin(rank < torch.tensor(counts)[:, None], tokens(seed, len(counts)))


@torch.no_grad()
def test_given_tokens_are_known_from_the_start_and_the_schedule_runs_over_the_rest() -> None:
    pin, sampling = given([6, 6, 6]), MARSampling(num_iter=4)
    s = SYSTEM.start(COND, sampling, Noise.of(0, 3), given=pin)
    assert s.K == 4 and int(s.k.max()) == 0 and torch.equal(s.known, pin.mask)
    assert torch.equal(s.tokens[pin.mask], pin.value[pin.mask])
    d = SYSTEM.predict(s)
    x = tokens(1)[:, : d.where.shape[1]]
    other = SYSTEM.start(COND, sampling, Noise.of(0, 3), given=Pin(pin.mask, pin.value + 1))
    assert ((SYSTEM.predict(other).field(x, 2) - d.field(x, 2)).abs() > 1e-9).all()
    sizes = [int(step.fresh[0].sum()) for step in walk(SYSTEM, s)]
    assert tuple(sizes) == cosine_counts(10, 4)
    assert torch.equal(s.tokens[pin.mask], pin.value[pin.mask]) and s.known.all()
    few = SYSTEM.start(COND, MARSampling(num_iter=8), Noise.of(0, 3), given=given([13, 13, 13]))
    assert few.K == 3


@pytest.mark.parametrize("counts", [[0, 5, 15], [16, 3, 9], [7, 7, 1]])
@torch.no_grad()
def test_items_with_different_masks_are_what_they_are_alone(counts: list[int]) -> None:
    pin, noise, sampling = given(counts), Noise.of(0, 3), MARSampling(num_iter=5, cfg_scale=2.0)
    together = finish(generate(SYSTEM, COND, sampling, noise, given=pin)).tokens
    assert torch.equal(together[pin.mask], pin.value[pin.mask])
    for i, count in enumerate(counts):
        rows = torch.tensor([i])
        s = SYSTEM.start({"class_labels": COND["class_labels"][rows]}, sampling, noise.take(rows), given=pin.take(rows))
        for _ in walk(SYSTEM, s):
            pass
        torch.testing.assert_close(together[rows], s.tokens, atol=1e-10, rtol=0)
        assert (s.K - int(s.given_groups())) == min(5, N - count) or count == N


@torch.no_grad()
def test_nothing_given_is_plain_generation_and_a_prefix_goes_on_where_it_was() -> None:
    noise, sampling = Noise.of(0, 3), MARSampling(num_iter=5)
    plain = finish(generate(SYSTEM, COND, sampling, noise))
    nothing = finish(generate(SYSTEM, COND, sampling, noise, given=given([0, 0, 0])))
    torch.testing.assert_close(nothing.tokens, plain.tokens)
    s = SYSTEM.start(COND, sampling, noise, given=Pin(plain.group < 3, plain.tokens))
    assert s.k.tolist() == [3, 3, 3] and torch.equal(s.group, plain.group)
    torch.testing.assert_close(finish(walk(SYSTEM, s)).tokens, plain.tokens)


# -- training -------------------------------------------------------------------------------------------------------


def test_one_share_of_hidden_tokens_per_batch_from_the_cut_gaussian() -> None:
    share = torch.tensor([hidden_count(10**6, (i + 0.5) / 1000, 0.7) for i in range(1000)]).double() / 1e6
    assert share.min() >= 0.7 and share.max() <= 1
    below = [torch.special.ndtr((torch.tensor(x).double() - 1) / 0.25) for x in (0.7, 0.9)]
    assert float((share < 0.9).double().mean()) == pytest.approx(
        float((below[1] - below[0]) / (0.5 - below[0])), abs=2e-3
    )
    assert hidden_count(10, 0.01, 0.7) == 8 and hidden_count(10, 1 - 1e-12, 0.7) == 10  # rounded up


def test_the_loss_is_the_weighted_sum_over_hidden_tokens() -> None:
    """Over all tokens with a mask, as it is published, with the noise of the library."""
    system, x, noise = lively(label_drop=0.5), tokens(), Noise.of(4, 3)
    found = system.loss({"tokens": x, "class_labels": [0, 1, 2]}, noise)
    count = hidden_count(N, float(noise.uniform("share", 0, ())[0]), 0.7)
    order = noise.uniform("order", 0, (N,)).argsort(1)
    hidden = torch.zeros(3, N).scatter(1, order[:, N - count :], 1.0)
    where = (hidden == 0).nonzero()[:, 1].view(3, -1)
    dropped = noise.uniform("drop", 0, ()) < 0.5
    assert dropped.any() and not dropped.all()
    buffer = system.transformer.buffer({"class_labels": torch.arange(3)}, dropped)
    with torch.no_grad():
        z = system.transformer(x, where, torch.arange(N).expand(3, -1), buffer)
        total = torch.zeros(3, N).double()
        wanted = order[:, N - count :].sort(1).values
        t = (noise.uniform("time", 0, (4, count)) * 5).long()
        eps = noise.normal("eps", 0, (4, count, 2))
        for m in range(4):
            for b in range(3):
                for i, n in enumerate(wanted[b].tolist()):
                    noisy = system.diffusion.noisy(x[b, n], eps[b, m, i], int(t[b, m, i]))
                    denoiser = system.transformer.denoiser
                    out = denoiser(noisy, int(t[b, m, i]), denoiser.condition(z[b, n]))
                    total[b, n] += sum(system.diffusion.terms(out, x[b, n], eps[b, m, i], t[b, m, i]))
    torch.testing.assert_close(found["loss"].detach(), (total * hidden).sum() / (4 * hidden.sum()))
    torch.testing.assert_close(found["loss"].detach(), found["error"] + found["bits"])


def test_moments_are_sampled_anew_every_time() -> None:
    system, image = lively().float(), torch.rand(3, 3, 8, 8) * 2 - 1
    stored = system.latents(image)
    assert set(stored) == {"moments"} and stored["moments"].shape == (3, 4, 4, 4)
    losses = [
        float(system.loss({**batch, "class_labels": [0, 1, 2]}, Noise.of(seed, 3))["loss"].detach())
        for batch, seed in (({"image": image}, 0), (stored, 0), (stored, 1))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[1] != losses[2]
    drawn = [system.tokenizer.sampled(stored["moments"], Noise.of(seed, 3)) for seed in (0, 1)]
    assert not torch.equal(*drawn)


def test_every_weight_learns_and_dropout_is_for_training() -> None:
    system = lively()
    batch = {"tokens": tokens(), "class_labels": [0, 1, 2]}
    quiet = [float(system.loss(batch, Noise.of(0, 3))["loss"].detach()) for _ in range(2)]
    system.train()
    torch.manual_seed(0)
    loud = [float(system.loss(batch, Noise.of(0, 3))["loss"].detach()) for _ in range(2)]
    assert quiet[0] == quiet[1] and loud[0] != loud[1]
    system.loss(batch, Noise.of(0, 3))["loss"].backward()
    still = {n for n, p in system.transformer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert still <= {"writer.null"}  # no condition was dropped


def test_a_fresh_model_predicts_nothing_and_learns_from_the_first_step() -> None:
    torch.manual_seed(0)
    system = mar.build(config(diffusion_steps=1000))
    loss = system.loss({"tokens": tokens().float(), "class_labels": [0, 1, 2]}, Noise.of(0, 3))
    assert float(loss["error"]) == pytest.approx(1, abs=0.3)
    loss["loss"].backward()
    assert system.transformer.denoiser.linear.weight.grad.abs().sum() > 0


# -- conditions -----------------------------------------------------------------------------------------------------

TEXT = TextConfig(buckets=64, words=4, pieces=6, width=8, depth=1, heads=2)


@torch.no_grad()
def test_prompts_fill_the_buffer_and_the_empty_one_is_none() -> None:
    system = lively(text=TEXT, buffer=5)
    assert system.conditions == ("prompt",)
    cond = system.prepare({"prompt": ["a red apple", "", "two"]})
    rows = system.transformer.buffer(cond, torch.zeros(3, dtype=torch.bool))
    assert rows.shape == (3, 5, 16)
    none = system.transformer.buffer(None, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(rows[1], none[0])
    dropped = system.transformer.buffer(cond, torch.tensor([True, False, True]))
    torch.testing.assert_close(dropped, none)
    blank = system.transformer.writer.project.bias
    torch.testing.assert_close(rows[0, 4], blank)  # what is no word says nothing
    assert (rows[0, :4] - blank).abs().amin(1).gt(0).all()
    s = finish(generate(system, cond, MARSampling(num_iter=3), Noise.of(0, 3)))
    assert s.known.all() and system.tokenizer.decode(s.tokens).shape == (3, 3, 8, 8)


def test_class_labels_are_checked() -> None:
    assert SYSTEM.prepare({"class_labels": 3})["class_labels"].tolist() == [3]
    rows = [SYSTEM.transformer.buffer({"class_labels": torch.tensor([y])}, torch.zeros(1).bool()) for y in (2, 3)]
    torch.testing.assert_close(rows[1][0, 0], SYSTEM.transformer.writer.null[0])
    assert torch.equal(rows[0][0, 0], rows[0][0, 1]) and not torch.equal(*rows)
    for request, told in (({"class_labels": [4]}, "lie in 0..3, got 4..4"), ({}, "3 = no class")):
        with pytest.raises(ValueError, match=told):
            SYSTEM.prepare(request)
    with pytest.raises(ValueError, match="fills 5 buffer rows"):
        config(text=TEXT)
    with pytest.raises(ValueError, match="positions are learned for"):
        SYSTEM.start(COND, PLAIN, Noise.of(0, 3), layout=Layout(((2, 8),)))


# -- sizes, files, recordings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("mar-b", 207_924_768), ("mar-l", 478_326_304), ("mar-h", 942_403_104)])
def test_published_sizes(name: str, count: int) -> None:
    preset = mar.PRESETS[name]
    with torch.device("meta"):
        system = mar.build(preset.config())
    assert sum(p.numel() for p in system.transformer.parameters()) == count
    assert sum(p.numel() for p in system.tokenizer.parameters()) == 66_456_019
    assert system.tokenizer.layout().n == 256 and system.tokenizer.config.scale == 0.2325
    sampling = MARSampling(**preset.sampling)
    assert (sampling.num_iter, sampling.diffusion_steps, sampling.temperature) == (256, 100, 1.0)
    assert system.diffusion.abar.device.type == "cpu"


def test_the_cost_is_counted_on_shapes_alone() -> None:
    with torch.device("meta"):
        system = mar.build(config())
    counted = cost.count(system, MARSampling(num_iter=4), batch=2)
    assert counted.steps == 4 and counted.flops > 0


def test_an_official_checkpoint_gives_its_averaged_weights(tmp_path: Path) -> None:
    system, other = lively().float(), lively().float()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    table = mar.keys(config())["transformer"]
    ema, raw = (to_official(x.transformer, table) for x in (system, other))
    assert "diffloss.net.res_blocks.0.adaLN_modulation.1.weight" in ema and "encoder_blocks.0.attn.qkv.bias" in ema
    args = argparse.Namespace(model="mar_base", num_iter=64)
    torch.save({"model": raw, "model_ema": ema, "epoch": 3, "args": args}, tmp_path / "checkpoint-last.pth")
    save_file({n: t.contiguous().clone() for n, t in ema.items()}, tmp_path / "flat.safetensors")
    fresh = mar.build(config())
    for name in ("checkpoint-last.pth", "flat.safetensors"):
        load_official(fresh.transformer, table, read(tmp_path / name, mar.PRESETS["mar-b"].files["transformer"].inside))
        state = fresh.transformer.state_dict()
        assert all(torch.equal(t, state[n]) for n, t in system.transformer.state_dict().items())


def of_the_paper(w: dict[str, Tensor], heads: int, x: Tensor, hidden: Tensor, condition: Tensor, buffer: int) -> Tensor:
    """z [N, D] of all tokens of one item, from official names and the formulas alone."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-3)

    def blocks(x: Tensor, part: str) -> Tensor:
        for i in range(len({n.split(".")[1] for n in w if n.startswith(f"{part}_blocks.")})):
            b = f"{part}_blocks.{i}"
            q, k, v = (
                t.view(len(x), heads, -1).transpose(0, 1)
                for t in linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").chunk(3, -1)
            )
            seen = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + linear(seen.transpose(0, 1).flatten(1), f"{b}.attn.proj")
            x = x + linear(F.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        return norm(x, f"{part}_norm")

    rows = torch.cat((condition.expand(buffer, -1), linear(x, "z_proj"))) + w["encoder_pos_embed_learned"][0]
    keep = torch.cat((torch.ones(buffer, dtype=torch.bool), ~hidden))
    h = linear(blocks(norm(rows, "z_proj_ln")[keep], "encoder"), "decoder_embed")
    rows = w["mask_token"][0].repeat(len(keep), 1)
    rows[keep] = h
    rows = blocks(rows + w["decoder_pos_embed_learned"][0], "decoder")
    return rows[buffer:] + w["diffusion_pos_embed_learned"][0]


@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_the_networks_follow_the_formulas_at_other_sizes(patch: int) -> None:
    values = {"img_size": 24, "vae_stride": 4, "patch_size": patch, "vae_embed_dim": 3, "class_num": 4}
    values |= {"encoder_embed_dim": 12, "encoder_depth": 2, "encoder_num_heads": 2, "buffer_size": 3}
    values |= {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2, "mlp_ratio": 2.5, "norm_eps": 1e-3}
    values |= {"diffloss_d": 1, "diffloss_w": 6}
    system = mar.build(configured(values)).double().eval()
    torch.manual_seed(1)
    for parameter in system.transformer.parameters():
        nn.init.normal_(parameter, std=0.5)
    w = to_official(system.transformer, mar.keys(configured(values))["transformer"])
    n = (6 // patch) ** 2
    assert system.space.width == 3 * patch**2 and system.tokenizer.layout().n == n
    x = torch.randn(1, n, 3 * patch**2).double()
    hidden = torch.arange(n) % 3 != 1
    where, wanted = (~hidden).nonzero().T, torch.arange(n)[None]
    for label, row in ((2, w["class_emb.weight"][2]), (4, w["fake_latent"][0])):
        buffer = system.transformer.buffer({"class_labels": torch.tensor([label])}, torch.zeros(1).bool())
        found = system.transformer(x, where, wanted, buffer)[0]
        torch.testing.assert_close(found, of_the_paper(w, 2, x[0], hidden, row, 3), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("runs", "model"),
    [
        ({"cfg": 1.0, "cfg_schedule": "linear", "num_iter": 1, "timestep_respacing": "3"}, {"patch_size": 2}),
        ({"cfg": 3.0, "cfg_schedule": "constant", "num_iter": 9, "timestep_respacing": "ddim5"}, {"buffer_size": 1}),
        ({"cfg": 1.5, "cfg_schedule": "linear", "num_iter": 5, "timestep_respacing": "2,2"}, {"diffloss_d": 3}),
    ],
)
def test_recordings_of_other_sizes_and_settings_run(runs: dict, model: dict, tmp_path: Path) -> None:
    """Every output comes in its shape; what a guided solve gives is checked by the one recording that is here."""
    values = {"img_size": 24, "vae_stride": 4, "patch_size": 1, "vae_embed_dim": 2, "class_num": 4}
    values |= {"encoder_embed_dim": 8, "encoder_depth": 1, "encoder_num_heads": 2, "buffer_size": 3}
    values |= {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2, "mlp_ratio": 2, "norm_eps": 1e-6}
    values |= {"diffloss_d": 1, "diffloss_w": 6, "diffusion_steps": 20, "noise_schedule": "linear"} | model
    torch.manual_seed(0)
    system = mar.build(configured(values)).eval()
    for parameter in system.transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    n, s, items = system.tokenizer.layout().n, system.space.width, 2
    counts, steps = cosine_counts(n, runs["num_iter"]), len(respaced(20, runs["timestep_respacing"]))
    io = {
        "latents": torch.randn(items, 2, 6, 6),
        "labels": torch.tensor([1, 3]),
        "orders": torch.stack([torch.randperm(n) for _ in range(items)]),
        "hs_z": torch.randn(4, 8),
        "hs_noise_init": torch.randn(4, s),
        "hs_noise_steps": torch.randn(3, 4, s),
        **{name: torch.randn(6, s) for name in ("head_x", "loss_target", "loss_noise")},
        **{name: torch.arange(6) for name in ("head_t", "head_cfg_t")},
        "head_c": torch.randn(6, 8),
        **{f"gen_noise_init_{k}": torch.randn(items * c, s) for k, c in enumerate(counts)},
        **{f"gen_noise_steps_{k}": torch.randn(steps, items * c, s) for k, c in enumerate(counts)},
    }
    save_file(io, tmp_path / "io.safetensors")
    official = to_official(system.transformer, mar.keys(system.config)["transformer"])
    save_file({k: t.contiguous().clone() for k, t in official.items()}, tmp_path / "weights.safetensors")
    about = {"masked_pass": {"num_masked": 3}, "head_cfg": {"cfg": 2.0}, "tables": {"timestep_respacing": "4"}}
    about["head_sampling"] = {"temperature": 0.7, "cfg": runs["cfg"], "timestep_respacing": "3"}
    about["gen"] = {"batch": items, "temperature": 0.9, **runs}
    told = {"slug": "mar", "model": {"mar": {"weights_prefix": "", **values}}, "runs": about, "tensors": {}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with torch.no_grad():
        found = dict(run_parity(parity.Fixture(tmp_path)))
    official_outputs = {k for k, v in parity.find("mar").tensors.items() if v["role"] == "output"}
    assert set(found) == official_outputs
    assert found["gen_latents"].shape == io["latents"].shape and found["gen_latents"].isfinite().all()
    assert found["gen_tokens_per_step"].tolist() == [items * c for c in counts]
    assert found["hs_out"].shape == (4, s) and found["gen_cfg_per_step"].shape == (runs["num_iter"],)
    assert found["encoder_out"].shape == (items, values["buffer_size"] + n - 3, 8)


def test_respacings() -> None:
    assert respaced(1000, "") == tuple(range(1000))
    assert respaced(1000, "10")[:2] == (0, 111) and respaced(1000, "ddim8")[-1] == 875
    assert respaced(20, "2,2") == (0, 9, 10, 19)
