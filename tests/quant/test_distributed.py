"""Codebook statistics and revivals of two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arvis.noise import Noise
from arvis.quant import EMAVQ, EMAVQConfig, MultiScaleVQ, MultiScaleVQConfig
from arvis.quant.revive import pick, pick_from_all, pull_
from arvis.quant.usage import gathered_over_ranks
from arvis.quant.vq import nearest
from arvis.tokens import pyramid

LAYOUT = pyramid((1, 2, 4))
RANKS = 2


def vectors():
    """Those of the whole batch: rank r has the r-th half."""
    return torch.randn(200, 6, generator=torch.Generator().manual_seed(5))


def averaged(cosine=False):
    torch.manual_seed(0)
    return EMAVQ(EMAVQConfig(size=20, width=6, decay=0.9, cosine=cosine))


def tended(folder, rank):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    out = {f"pyramid.{name}": tensor for name, tensor in pyramid_of(rank).items()}
    own = vectors().chunk(RANKS)[rank]
    for cosine in (False, True):
        quantizer = averaged(cosine)
        for _ in range(3):
            quantizer.update_(own, quantizer.encode(own))
        out |= {f"ema {cosine}.{name}": tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.embed[10:], quantizer.cluster_size[10:] = 9.0, 0.0
    out["revived"] = torch.tensor(quantizer.revive_(own, Noise.of(rank), 0))  # each has its own noise
    out |= {f"revived.{name}": tensor for name, tensor in quantizer.state_dict().items()}
    out["picked"] = pick_from_all(own, 50, Noise.of(7), 3)
    out["picked again"] = pick_from_all(own[:4], 30, Noise.of(7), 3)  # fewer than are asked for
    table = averaged().embed.clone()
    pull_(table, torch.zeros(20), own)
    out["pulled"] = table
    out["gathered"] = gathered_over_ranks(own[:2, :3])
    torch.save(out, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def pyramid_of(rank):
    torch.manual_seed(0)
    quantizer = MultiScaleVQ(MultiScaleVQConfig(size=40, width=6, levels=3))
    f = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        quantizer.embedding.weight[20:] = 100  # dead
    quantizer.record_(quantizer.encode(f, LAYOUT), LAYOUT, 0)
    quantizer.revive_(f, LAYOUT, Noise.of(rank), 0)  # each has its own vectors and noise
    return quantizer.state_dict()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes are left with."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, __file__, str(folder)]
    runs = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(RANKS)]
    assert [run.wait(timeout=120) for run in runs] == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_two_processes_keep_one_codebook(ranks):
    """Fails for any statistic or draw that stays with the process that made it."""
    a, b = ranks
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_pyramid_is_revived_from_the_vectors_of_both(ranks):
    a = ranks[0]
    assert a["pyramid.embedding.weight"].abs().max() < 50
    assert a["pyramid.ema_vocab_hit_SV"].sum() >= 2 * 4 * LAYOUT.n  # the hits of both, and the share of the revived


@pytest.mark.parametrize("cosine", [False, True])
def test_two_halves_move_averages_like_one_batch(ranks, cosine):
    """Check 6. Fails for means over processes where sums are meant, and for averages before the reduction."""
    whole, z = averaged(cosine), vectors()
    for _ in range(3):
        whole.update_(z, whole.encode(z))
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(ranks[0][f"ema {cosine}.{name}"], tensor, atol=1e-6)


def test_codes_are_revived_from_the_union_of_batches(ranks):
    """Check 15a. Fails where one process draws alone: then all codes come from its half."""
    a, z = ranks[0], vectors()
    assert a["revived"] == 10 and (a["revived.cluster_size"][10:] == 2).all()
    new = a["revived.embed"][10:]
    source = nearest(new, torch.nn.functional.normalize(z, dim=1))
    assert torch.allclose(torch.nn.functional.normalize(z, dim=1)[source], new, atol=1e-6)
    assert len(source.unique()) == 10 and 0 < (source < 100).sum() < 10


def test_a_draw_from_two_halves_is_the_draw_from_the_whole(ranks):
    z = vectors()
    assert torch.equal(ranks[0]["picked"], pick(z, 50, Noise.of(7), 3))
    few = torch.cat((z[:4], z[100:104]))
    again = ranks[0]["picked again"]
    assert torch.equal(again[:8], again[8:16]) and torch.equal(again[:8].sort(0).values, few.sort(0).values)


def test_codes_are_pulled_to_the_nearest_vector_of_any_process(ranks):
    """Check 15b. Fails where each process pulls to its own nearest: then they part."""
    table = averaged().embed.clone()
    pull_(table, torch.zeros(20), vectors())
    assert torch.allclose(ranks[0]["pulled"], table, atol=1e-6)
    assert torch.equal(ranks[0]["gathered"], torch.stack([vectors()[:2, :3], vectors()[100:102, :3]]))


if __name__ == "__main__":
    tended(Path(sys.argv[1]), int(sys.argv[2]))
