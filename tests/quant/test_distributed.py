"""Codebook statistics and revivals of two processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from arvis.noise import Noise
from arvis.quant import MultiScaleVQ, MultiScaleVQConfig
from arvis.tokens import pyramid

LAYOUT = pyramid((1, 2, 4))


def tended(folder, rank):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizer = MultiScaleVQ(MultiScaleVQConfig(size=40, width=6, levels=3))
    f = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        quantizer.embedding.weight[20:] = 100  # dead
    quantizer.record_(quantizer.encode(f, LAYOUT), LAYOUT, 0)
    quantizer.revive_(f, LAYOUT, Noise.of(rank), 0)  # each has its own vectors and noise
    torch.save(quantizer.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_one_codebook(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, __file__, str(tmp_path)]
    runs = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["embedding.weight"].abs().max() < 50
    assert a["ema_vocab_hit_SV"].sum() >= 2 * 4 * LAYOUT.n  # the hits of both, and the share of the revived


if __name__ == "__main__":
    tended(Path(sys.argv[1]), int(sys.argv[2]))
