"""MaskGIT's loop against the published one written out, its order, its loss, and recordings at other settings."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from arvis import parity
from arvis.laws import REQUEST, Case, examine
from arvis.noise import Noise
from arvis.orders import cosine_counts
from arvis.systems import maskgit
from arvis.systems.maskgit import MaskGIT, MaskGITSampling, build, tiny
from arvis.tokens import NEVER, Pin
from arvis.walk import finish, generate, walk


@pytest.fixture(scope="module")
def system() -> MaskGIT:
    torch.manual_seed(0)
    return tiny().double().eval()


@pytest.fixture(autouse=True)
def _no_grad(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def start(system, items=3, given=None, **settings):
    cond = system.prepare({"class_labels": [i % 3 for i in range(items)]})
    return system.start(cond, MaskGITSampling(**settings), Noise.of(2, items), given=given)


# -- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 15, 16])
def test_the_kept_sets_are_a_partition_of_the_schedules_sizes(system, steps):
    s = start(system, steps=steps)
    sizes = []
    for step in walk(system, s):
        sizes.append(step.fresh.sum(1).tolist())
    assert sizes == [[count] * 3 for count in cosine_counts(16, steps)]
    assert bool(s.known.all()) and s.group.max() == steps - 1


def test_more_steps_than_positions_guess_the_last_one_again(system):
    s = start(system, steps=20)
    sizes = [step.fresh.sum(1).tolist() for step in walk(system, s)]
    assert len(sizes) == 20 and sizes[:15] == [[1] * 3] * 15 and sizes[15:] == [[0] * 3] * 4 + [[1] * 3]


def test_at_temperature_0_the_likeliest_guesses_are_kept(system):
    s = start(system, choice_temperature=0.0, steps=4)
    d = system.predict(s)
    x = d.sample(s.noise)
    system.commit(s, d, x)
    kept, sure = s.group == 0, d.marginal(x)
    assert kept.sum(1).tolist() == [cosine_counts(16, 4)[0]] * 3
    assert bool((sure.masked_fill(~kept, math.inf).amin(1) > sure.masked_fill(kept, -math.inf).amax(1)).all())
    assert torch.equal(s.tokens[kept], x[kept]) and bool((s.group[~kept] == NEVER).all())


def test_the_noise_fades_out_and_is_that_of_the_item(system):
    """Of the last choice nothing is random: twice the temperature, same order."""
    for temperature, other in ((4.5, 45.0), (1e9, 1e10)):
        states = [start(system, choice_temperature=t, steps=2) for t in (temperature, other)]
        for s in states:
            s.k = s.k + 1
        again = [system.masked_again(s, d, d.sample(s.noise)) for s in states for d in [system.predict(s)]]
        assert torch.equal(*again)
    warm = [start(system, choice_temperature=t, steps=8) for t in (0.0, 1e9)]
    again = [system.masked_again(s, d, d.sample(s.noise)) for s in warm for d in [system.predict(s)]]
    assert not torch.equal(*again)


def test_given_tokens_are_never_changed_and_the_schedule_runs_over_the_rest(system):
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[1, ::2], mask[2, 1:], mask[3] = True, True, True
    value = torch.arange(64).view(4, 16, 1) % 5
    s = start(system, 4, Pin(mask, value), steps=4)
    assert torch.equal(s.known, mask)
    sizes = torch.stack([step.fresh.sum(1) for step in walk(system, s)], 1)
    assert sizes.tolist() == [[*cosine_counts(16, 4)], [*cosine_counts(8, 4)], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert torch.equal(s.tokens[mask], value[mask]) and bool(s.known.all())
    alone = start(system, 4, Pin(mask, value), steps=4).take_(torch.tensor([1]))
    assert torch.equal(finish(walk(system, alone)).tokens, s.tokens[1:2])
    whole = start(system, 4, Pin(torch.ones_like(mask), value))
    assert whole.done.all() and torch.equal(whole.tokens, value)


def test_given_tokens_are_seen_at_the_first_step(system):
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[:, 3] = True
    read = [system.predict(start(system, 1, Pin(mask, torch.full((1, 16, 1), code)))).logits for code in (0, 1)]
    assert not torch.equal(*read)


# -- guidance and settings --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Guided(MaskGITSampling):
    cfg_scale: float = 3.0
    temperature: float = 0.9


def test_guidance_keeps_its_law():
    """As published there is none, so the laws of the registry do not try it."""

    def make(seed: int):
        torch.manual_seed(seed)
        made = tiny().double().eval()
        vars(made)["Sampling"] = Guided
        return made

    case = Case(name="guided", make=make, request=REQUEST)
    assert all(examine(case, law) for law in ("guidance", "seed", "gather", "prefill"))


def test_settings_that_are_none_are_refused():
    with pytest.raises(ValueError, match="a schedule is cosine"):
        MaskGITSampling(schedule="sine")
    with pytest.raises(ValueError, match="at least one step"):
        MaskGITSampling(steps=0)


def test_prompts_stand_before_the_codes():
    config = maskgit.emoji_64()
    torch.manual_seed(0)
    model = build(config).eval()
    cond = model.prepare({"prompt": ["a red apple", "two dogs"]})
    s = finish(generate(model, cond, MaskGITSampling(steps=2, cfg_scale=3.0), Noise.of(1, 2)))
    assert s.tokens.shape == (2, 64, 1) and s.more["prefix"].shape == (2, 2, 17, 256)
    assert model.tokenizer.decode(s.tokens).shape == (2, 3, 64, 64)


def test_the_published_size():
    with torch.device("meta"):
        model = build(maskgit.maskgit_256())
    assert sum(p.numel() for p in model.transformer.parameters()) == 172_456_192
    assert model.tokenizer.layout((256, 256)) == model.transformer.layout
    assert not maskgit.PRESETS["maskgit-256"].files, "the official files are for another framework"


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_smoothed_cross_entropy_of_the_hidden_codes(system):
    tokens, noise = torch.arange(48).view(3, 16, 1) % 5, Noise.of(9, 3)
    seen = []
    hook = system.transformer.register_forward_hook(lambda module, args, out: seen.append((args[1], out)))
    out = system.loss({"tokens": tokens, "class_labels": [0, 1, 2]}, noise)
    hook.remove()
    (known, logits), share = seen[0], noise.uniform("share", 0, ())
    assert (~known).sum(1).tolist() == [math.ceil(16 * math.cos(math.pi / 2 * float(u))) for u in share]
    smooth = 0.1 / 5 + 0.9 * F.one_hot(tokens[..., 0], 5).double()  # on: 1 - 0.1 + 0.1/5, off: 0.1/5
    nats = -(smooth * logits.log_softmax(-1)).sum(-1)
    assert float(out["loss"]) == pytest.approx(float(nats[~known].mean()), rel=1e-12)
    other = system.loss({"tokens": tokens.where(~known[..., None], (tokens + 1) % 5), "class_labels": [0, 1, 2]}, noise)
    assert float(other["loss"]) != float(out["loss"]), "known codes are read"


def test_shares_that_training_hides():
    torch.manual_seed(0)
    noise, model = Noise.of(3, 20000), tiny()
    share = model.hidden_share(noise)
    assert bool((share > 0).all() and (share <= 1).all())
    assert float(share.mean()) == pytest.approx(2 / math.pi, abs=0.01)
    model.mask_normal = (0.55, 0.25, 0.5, 1.0)
    share = model.hidden_share(noise)
    assert bool((share >= 0.5).all() and (share <= 1).all())
    inside = torch.distributions.Normal(0.55, 0.25)
    a, b = (float(inside.cdf(torch.tensor(x))) for x in (0.5, 1.0))
    median = float(inside.icdf(torch.tensor((a + b) / 2)))
    assert float(share.median()) == pytest.approx(median, abs=0.01)


def test_conditions_are_dropped_and_a_gradient_reaches_every_weight():
    torch.manual_seed(0)
    model = tiny().train()
    model.label_drop, batch = 0.5, {"image": torch.rand(8, 3, 16, 16) * 2 - 1, "class_labels": [0, 1, 2, 0] * 2}
    model.loss(batch, Noise.of(0, 8))["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.transformer.parameters())
    assert model.transformer.conditioner.embedding.weight.grad[-1].abs().sum() > 0, "the row of no class"
    model.label_drop, model.transformer.conditioner.embedding.weight.grad = 0.0, None
    model.loss(batch, Noise.of(0, 8))["loss"].backward()
    assert model.transformer.conditioner.embedding.weight.grad[-1].abs().sum() == 0


def test_stored_codes_replace_images():
    torch.manual_seed(0)
    model = tiny().eval()
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    stored = model.latents(image)
    losses = [
        float(model.loss({**x, "class_labels": [0, 1]}, Noise.of(0, 2))["loss"]) for x in ({"image": image}, stored)
    ]
    assert losses[0] == losses[1]


# -- recordings at other settings -------------------------------------------------------------------------------------


def published(A, W, mask_id, start, token_gumbel, choice_gumbel, steps, tau, share, min_fixed, min_masked, weights):
    """The loop of the paper for one sequence, in numpy and plain Python."""
    ids, out = start.copy(), []
    unknown = int((ids == mask_id).sum())
    for k in range(steps):
        w = W[ids]
        logits = A + weights[0] * w.mean(0) + weights[1] * w
        hidden = ids == mask_id
        sampled = np.where(hidden, (logits + token_gumbel[k]).argmax(1), ids)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        r = (k + 1) / steps
        score = log_p[np.arange(len(ids)), np.minimum(sampled, len(log_p[0]) - 1)] + tau * (1 - r) * choice_gumbel[k]
        score = np.where(hidden, score, np.inf)
        m = math.floor(round(unknown * min(1, max(1e-6, share(r, unknown))), 6))
        m = max(min_masked, min(int(hidden.sum()) - min_fixed, m))
        again = np.zeros(len(ids), bool)
        again[np.argsort(score, kind="stable")[:m]] = True
        out.append((sampled, again, m))
        ids = np.where(again, mask_id, sampled)
    return out


SHARES = {
    "cosine": lambda r, u: math.cos(math.pi / 2 * r),
    "linear": lambda r, u: 1 - r,
    "pow2": lambda r, u: 1 - r**2,
    "log": lambda r, u: -math.log2(r) / math.log2(u),
    "exp": lambda r, u: 1 - 2 ** (-math.log2(u) * (1 - r)),
}


@pytest.mark.parametrize(
    ("name", "steps", "length", "codes", "known", "tau", "least"),
    [
        ("cosine", 12, 49, 10, 0, 4.5, (1, 1)),
        ("cosine", 5, 20, 16, 13, 2.0, (1, 1)),
        ("cosine", 9, 12, 7, 8, 4.5, (1, 1)),
        ("linear", 7, 36, 24, 1, 0.0, (1, 1)),
        ("pow2", 8, 25, 5, 5, 10.0, (2, 1)),
        ("log", 6, 64, 12, 20, 4.5, (1, 3)),
        ("exp", 6, 64, 12, 0, 4.5, (1, 1)),
    ],
)
def test_other_recordings_of_the_loop_are_reproduced(tmp_path, name, steps, length, codes, known, tau, least):
    rng, items = np.random.default_rng(length), 2
    A, W = rng.normal(size=(length, codes)), rng.normal(size=(codes + 1, codes))
    token, choice = (rng.gumbel(size=(steps, items, length, *more)) for more in ((codes,), ()))
    A, W, token, choice = (x.astype(np.float32) for x in (A, W, token, choice))
    start = np.full((items, length), codes)
    for row in start:
        where = rng.permutation(length)[:known]
        row[where] = rng.integers(0, codes, known)
    runs = [
        published(A, W, codes, start[i], token[:, i], choice[:, i], steps, tau, SHARES[name], *least, (2.0, 0.25))
        for i in range(items)
    ]
    sampled, again, counts = (np.stack([[step[j] for step in run] for run in runs], 1) for j in range(3))
    values = {
        "choice_gumbel": choice,
        "token_gumbel": token,
        "start_ids": start,
        "sampled_ids_per_step": sampled,
        "mask_after_step": again,
        "masked_count_per_step": counts[:, 0],
        "final_ids": sampled[-1],
    }
    roles = {"choice_gumbel": "noise", "token_gumbel": "noise", "start_ids": "input"}
    about = {n: {"role": roles.get(n, "output"), "run": "decode", "compare": "exact", "atol": None} for n in values}
    table = {"weights_prefix": "", "seq_len": length, "num_codes": codes, "mask_id": codes}
    run = {"steps": steps, "choice_temperature": tau, "batch": items, "num_unknown": length - known}
    run |= {"mask_schedule": name, "min_fixed": least[0], "min_masked": least[1]}
    config = {
        "slug": "maskgit-decode",
        "model": {"logits_function": {**table, "mean_weight": 2.0, "self_weight": 0.25}},
        "runs": {"decode": run},
        "tensors": about,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({n: torch.from_numpy(np.ascontiguousarray(x)) for n, x in values.items()}, tmp_path / "io.safetensors")
    save_file({"A": torch.from_numpy(A), "W": torch.from_numpy(W)}, tmp_path / "weights.safetensors")
    rows = parity.run("maskgit", parity.Fixture(tmp_path))
    assert [str(row) for row in rows if not row.ok] == []
    assert sum(row.verdict == "pass" for row in rows) == 4


def test_there_is_no_layout_of_official_files(tmp_path):
    layout = {"slug": "maskgit", "preset": "x", "parameters": 1, "tensors": {}}
    (tmp_path / "x.json").write_text(json.dumps(layout))
    with pytest.raises(parity.ParityError, match="JAX files"):
        parity.map_keys("maskgit", tmp_path / "x.json")
