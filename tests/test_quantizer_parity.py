"""The recording of the quantisers: every setting of it is read, other sizes run, what cannot be compared is said."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from arvis import cli, parity
from arvis.parity import quantizers

FOLDER = parity.find("quantizers").folder

CHANGES = [
    ("euclid_ema", "decay", 0.5, "cluster_size1"),
    ("euclid_ema", "commitment_weight", 0.5, "loss"),
    ("euclid_ema", "eps", 0.5, "embed1"),
    ("euclid_ema", "use_cosine_sim", True, "out"),
    ("cosine_ema", "use_cosine_sim", False, "embed1"),
    ("residual", "num_quantizers", 2, "ids"),
    ("simvq", "rotation_trick", False, "grad_x"),
    ("simvq", "input_to_quantize_commit_weight", 0.5, "loss"),
    ("fsq", "levels", [8, 5, 4], "ids"),
    ("fsq", "eps", 0.1, "ids"),
    ("fsq", "codes_listed", 100, "all_codes"),
    ("lfq", "entropy_loss_weight", 0.2, "aux_loss"),
    ("lfq", "commitment_loss_weight", 0.5, "aux_loss"),
    ("lfq", "diversity_gamma", 0.5, "aux_loss"),
    ("lfq", "inv_temperature", 10.0, "sample_entropy"),
    ("lfq", "mode", "eval", "aux_loss"),
    ("bsq", "inv_temperature", 10.0, "sample_entropy"),
    ("dist_entropy", "temperature", 0.02, "loss"),
    ("dist_entropy", "eps", 0.01, "loss"),
]
MODEL_CHANGES = [("beta", 0.5, "loss"), ("quant_resi", 0.3, "fhat"), ("using_znorm", True, "fhat")]


def changed(folder, part, key, name, value):
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    about = json.loads((folder / "config.json").read_text())
    about[part][key][name] = value
    (folder / "config.json").write_text(json.dumps(about))
    return {row.name: row for row in parity.run("quantizers", parity.Fixture(folder))}


@pytest.mark.parametrize(("run", "name", "value", "told"), CHANGES)
def test_every_setting_of_a_run_is_read(tmp_path, run, name, value, told):
    """Fails for a runner that knows one recording by heart."""
    rows = changed(tmp_path, "runs", run, name, value)
    assert not rows[f"{run}.{told}"].ok
    assert all(row.ok for tensor, row in rows.items() if not tensor.startswith(run))


@pytest.mark.parametrize(("name", "value", "told"), MODEL_CHANGES)
def test_every_setting_of_the_pyramid_is_read(tmp_path, name, value, told):
    rows = changed(tmp_path, "model", "multiscale", name, value)
    assert not rows[f"multiscale.{told}"].ok


def test_the_older_gradient_has_the_same_values(tmp_path):
    assert all(row.ok for row in changed(tmp_path, "runs", "bsq", "new_quant", False).values())


def test_what_cannot_be_compared_is_said(tmp_path):
    rows = changed(tmp_path / "a", "runs", "euclid_ema", "threshold_ema_dead_code", 2)
    assert "record it without revival" in rows["euclid_ema.embed1"].note
    assert "4 scales" in changed(tmp_path / "b", "model", "multiscale", "v_patch_nums", [5])["multiscale.fhat"].note
    about = json.loads((FOLDER / "config.json").read_text())
    about["runs"]["gumbel"] = {}
    (tmp_path / "a" / "config.json").write_text(json.dumps(about))
    with torch.no_grad(), pytest.raises(parity.ParityError, match="'gumbel'; known: euclid_ema"):
        list(quantizers.run(parity.Fixture(tmp_path / "a")))
    with pytest.raises(parity.ParityError, match="no key layout"):
        quantizers.skeleton({})


def test_a_part_is_found_like_a_system():
    assert "quantizers" in parity.runners() and parity.covered("quantizers")
    assert "harness" not in parity.runners() and not parity.covered("harness")


@pytest.mark.parametrize("seed", range(3))
def test_a_recording_of_any_size_runs(tmp_path, seed):
    """At other sizes and settings, against formulas written out here."""
    torch.manual_seed(seed)
    d, n, items = (4, 11, 7)[seed], (9, 40, 17)[seed], (2, 5 + seed)
    io, runs = {"x": 2 * torch.randn(*items, d)}, {}
    x = io["x"].flatten(0, 1)
    wanted = {}

    for name, cosine in (("euclid_ema", False), ("cosine_ema", True)):
        g, beta, eps = 0.6 + seed / 10, 0.1 + seed, 1e-3
        about = {"decay": g, "commitment_weight": beta, "eps": eps, "use_cosine_sim": cosine, "mode": "train"}
        runs[name] = {**about, "threshold_ema_dead_code": 0, "rotation_trick": seed == 1}
        z = F.normalize(x, dim=1) if cosine else x
        table, counts = torch.randn(n, d), torch.rand(n) + 0.5
        table = F.normalize(table, dim=1) if cosine else table
        io |= {f"{name}.embed0": table, f"{name}.cluster_size0": counts, f"{name}.embed_avg0": table * 2}
        ids = torch.cdist(z, table).argmin(1)
        one = F.one_hot(ids, n).float()
        counts, sums = g * counts + (1 - g) * one.sum(0), g * 2 * table + (1 - g) * one.T @ z
        after = sums / ((counts + eps) / (counts.sum() + n * eps) * counts.sum())[:, None]
        after = F.normalize(after, dim=1) if cosine else after
        again = torch.cdist(z, after).argmin(1)
        wanted |= {
            f"{name}.out": table[ids].view(*items, d),
            f"{name}.ids": ids.view(items),
            f"{name}.loss": beta * (z - table[ids]).square().mean()[None],
            f"{name}.embed1": after,
            f"{name}.cluster_size1": counts,
            f"{name}.embed_avg1": sums,
            f"{name}.eval_out": after[again].view(*items, d),
            f"{name}.eval_ids": again.view(items),
        }

    stages = 1 + seed
    runs["residual"] = {"num_quantizers": stages, "mode": "eval"}
    rest, ids = x, []
    for i in range(stages):
        io[f"residual.embed{i}"] = torch.randn(n, d) * 0.5**i
        ids.append(torch.cdist(rest, io[f"residual.embed{i}"]).argmin(1))
        rest = rest - io[f"residual.embed{i}"][ids[-1]]
    wanted |= {"residual.out": (x - rest).view(*items, d), "residual.ids": torch.stack(ids, 1).view(*items, stages)}

    runs["simvq"] = {"rotation_trick": False, "input_to_quantize_commit_weight": 0.4}
    io |= {"simvq.frozen": torch.randn(n, d), "simvq.W": torch.randn(d, d), "simvq.upstream": torch.randn(*items, d)}
    table = io["simvq.frozen"] @ io["simvq.W"].T
    ids = torch.cdist(x, table).argmin(1)
    wanted |= {
        "simvq.out": table[ids].view(*items, d),
        "simvq.ids": ids.view(items),
        "simvq.loss": 1.4 * (x - table[ids]).square().mean(),
        "simvq.grad_x": io["simvq.upstream"],
    }

    levels = ([3, 4], [2, 9, 5], [16])[seed]
    runs["fsq"] = {"levels": levels, "eps": 0.01, "codes_listed": 7}
    io["fsq.x"] = torch.randn(*items, len(levels))
    ids, values, base = 0, [], 1
    for i, size in enumerate(levels):
        half, off = (size - 1) * 1.01 / 2, 0.5 * (size % 2 == 0)
        q = (torch.tanh(io["fsq.x"][..., i] + math.atanh(off / half)) * half - off).round()
        values.append(q / (size // 2))
        ids, base = ids + (q.long() + size // 2) * base, base * size
    digits = [(torch.arange(7) // math.prod(levels[:i]) % size) for i, size in enumerate(levels)]
    codes = [(digit - size // 2) / (size // 2) for digit, size in zip(digits, levels, strict=True)]
    wanted |= {"fsq.out": torch.stack(values, -1), "fsq.ids": ids, "fsq.all_codes": torch.stack(codes, -1)}

    bits, tau, gamma = (2, 5, 7)[seed], 3.0, 0.7
    runs["lfq"] = {"bits": bits, "entropy_loss_weight": 0.3, "commitment_loss_weight": 0.2, "diversity_gamma": gamma}
    runs["lfq"] |= {"inv_temperature": tau, "mode": "train"}
    z = io["lfq.x"] = torch.randn(*items, bits) * 0.2
    table = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * bits).view(-1, bits)
    p = (2 * tau * z.flatten(0, 1) @ table.T).softmax(1)
    sample, batch = (-(q * q.clamp_min(1e-5).log()).sum(-1).mean() for q in (p, p.mean(0)))
    commit = (z.abs() - 1).square().mean()
    wanted |= {
        "lfq.ids": ((z > 0) * 2 ** torch.arange(bits - 1, -1, -1)).sum(-1),
        "lfq.out": torch.where(z > 0, 1.0, -1.0),
        "lfq.aux_loss": 0.3 * (sample - gamma * batch) + 0.2 * commit,
        "lfq.sample_entropy": sample,
        "lfq.batch_entropy": batch,
        "lfq.commit": commit,
    }

    runs["bsq"] = {"bits": bits, "inv_temperature": tau, "new_quant": True}
    io["bsq.x"] = torch.randn(*items, bits)
    u = F.normalize(io["bsq.x"], dim=-1)
    p = torch.sigmoid(-4 * tau * u / bits**0.5)
    sample, batch = (-(q * q.log() + (1 - q) * (1 - q).log()).sum(-1).mean() for q in (p, p.mean((0, 1))))
    wanted |= {
        "bsq.out": torch.where(u > 0, 1.0, -1.0) / bits**0.5,
        "bsq.bits": (u > 0).long(),
        "bsq.sample_entropy": sample,
        "bsq.batch_entropy": batch,
    }

    tensors = {name: {"role": "input", "compare": "exact", "atol": None} for name in io}
    for name, tensor in wanted.items():
        exact = not tensor.is_floating_point()
        tensors[name] = {"role": "output", "compare": "exact" if exact else "close", "atol": None if exact else 2e-5}
    model = {"vector": {"weights_prefix": None, "dim": d, "codebook_size": n}}
    about = {"slug": "quantizers", "model": model, "runs": runs, "tensors": tensors}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in (io | wanted).items()}, tmp_path / "io.safetensors"
    )
    rows = parity.run("quantizers", parity.Fixture(tmp_path))
    assert [str(row) for row in rows if not row.ok] == []
    assert sum(row.verdict == "pass" for row in rows) == len(wanted)


def test_the_command_takes_it(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["parity", "quantizers"])
    assert end.value.code == 0 and "tensors of quantizers agree" in capsys.readouterr().out
