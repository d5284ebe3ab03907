"""What every quantiser promises: round trip of all ids, idempotence, shapes, gradients, one interface."""

from itertools import pairwise

import pytest
import torch

from arvis.noise import Noise
from arvis.quant import VQ, CosineVQ, VQConfig
from arvis.quant.ema import EMAVQ, EMAVQConfig
from arvis.quant.kmeans import KMeans, KMeansConfig
from arvis.quant.lookup_free import LFQ, LFQConfig
from arvis.quant.product import Product, join_ids, split_ids
from arvis.quant.residual import Residual
from arvis.quant.rotation import rotate_to
from arvis.quant.scalar import FSQ, FSQConfig, gaussian_bins, uniform_bins
from arvis.quant.simvq import SimVQ, SimVQConfig
from arvis.quant.sphere import BSQ, BSQConfig


def kmeans_of_noise():
    quantizer = KMeans(KMeansConfig(size=50, width=6))
    quantizer.fit_(torch.randn(2000, 6), Noise.of(0))
    return quantizer


MAKERS = {
    "vq": lambda: VQ(VQConfig(size=50, width=6)),
    "rotation": lambda: VQ(VQConfig(size=50, width=6), estimator=rotate_to),
    "cosine": lambda: CosineVQ(VQConfig(size=50, width=6)),
    "ema": lambda: EMAVQ(EMAVQConfig(size=50, width=6)),
    "ema cosine": lambda: EMAVQ(EMAVQConfig(size=50, width=6, cosine=True)),
    "simvq": lambda: SimVQ(SimVQConfig(size=50, width=6)),
    "kmeans": kmeans_of_noise,
    "lfq": lambda: LFQ(LFQConfig(bits=6)),
    "lfq little": lambda: LFQ(LFQConfig(bits=6, little_endian=True, scale=0.5)),
    "bsq": lambda: BSQ(BSQConfig(bits=6)),
    "fsq": lambda: FSQ(FSQConfig(levels=(4, 3, 2, 5, 3, 2))),
    "uniform": lambda: uniform_bins(8, -2, 2, 6),
    "gaussian": lambda: gaussian_bins(8, -2, 2, 6),
    "product": lambda: Product([VQ(VQConfig(size=8, width=2)), CosineVQ(VQConfig(size=9, width=4))], (2, 4)),
}


@pytest.fixture(params=MAKERS)
def quantizer(request):
    torch.manual_seed(0)
    return MAKERS[request.param]()


def every_token(sizes):
    total = 1
    for size in sizes:
        total *= size
    if total > 65536:  # a sample of a large product
        return torch.stack([torch.randint(size, (5000,)) for size in sizes], -1)
    return split_ids(torch.arange(total)[:, None], sizes)


def test_every_id_makes_the_round_trip(quantizer):
    tokens = every_token(quantizer.sizes)
    found = quantizer.encode(quantizer.preimage(tokens) if isinstance(quantizer, FSQ) else quantizer.codes(tokens))
    assert torch.equal(found, tokens)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"fsq"}))  # tanh moves its codes: no fixed points
def test_quantising_twice_changes_nothing(name):
    torch.manual_seed(0)
    quantizer = MAKERS[name]()
    once = quantizer(torch.randn(40, 6))
    twice = quantizer(once.values)
    assert torch.equal(once.tokens, twice.tokens)
    assert torch.allclose(once.values, twice.values, atol=1e-6)


def test_one_interface(quantizer):
    z = torch.randn(2, 5, 6, requires_grad=True)
    out = quantizer(z)
    assert out.tokens.shape == (2, 5, len(quantizer.sizes)) and out.tokens.dtype == torch.int64
    assert (out.tokens >= 0).all() and (out.tokens < torch.tensor(quantizer.sizes)).all()
    assert torch.equal(out.tokens, quantizer.encode(z))
    assert out.values.shape == z.shape
    assert torch.allclose(out.values, quantizer.codes(out.tokens).to(out.values), atol=1e-6)
    assert all(loss.dim() == 0 for loss in out.losses.values())
    assert not any(stat.requires_grad for stat in out.stats.values())
    if not isinstance(quantizer, KMeans):  # frozen features: no gradient wanted
        (grad,) = torch.autograd.grad(out.values.square().sum() + sum(out.losses.values()), z)
        assert grad.abs().sum() > 0
    assert ("vq" in out.losses) == bool(out.losses)
    half = quantizer(z.detach().bfloat16())
    assert half.values.dtype == torch.float32


def test_residual_stages():
    torch.manual_seed(0)
    stages = [VQ(VQConfig(size=16, width=4)) for _ in range(3)]
    for stage in stages:
        torch.nn.init.normal_(stage.embedding.weight)
        stage.embedding.weight.data[0] = 0  # no stage can make it worse
    quantizer, z = Residual(stages), torch.randn(50, 4, requires_grad=True)
    out = quantizer(z)
    rest = z.detach()
    errors = [rest.norm(dim=1)]
    for i, stage in enumerate(stages):
        ids = stage.encode(rest)
        assert torch.equal(out.tokens[:, i : i + 1], ids)
        rest = rest - stage.codes(ids)
        errors.append(rest.norm(dim=1))
        assert torch.equal(quantizer(z, first=i + 1).tokens, out.tokens[:, : i + 1])
        assert torch.allclose(quantizer.codes(out.tokens[:, : i + 1]), z.detach() - rest, atol=1e-6)
    assert all((after <= before + 1e-6).all() for before, after in pairwise(errors))
    assert torch.allclose(out.values, quantizer.codes(out.tokens), atol=1e-6)
    assert quantizer.sizes == (16, 16, 16)
    (grad,) = torch.autograd.grad(out.values.sum(), z)
    assert torch.allclose(grad, torch.ones_like(grad))
    out = quantizer(z)
    out.losses["vq"].backward()
    assert all(stage.embedding.weight.grad.abs().sum() > 0 for stage in stages)
    shared = Residual([stages[0]] * 2)
    assert len(list(shared.parameters())) == 1 and shared(z).tokens.shape == (50, 2)
    with pytest.raises(ValueError, match="do not end at a stage"):
        quantizer.codes(torch.zeros(1, 4, dtype=torch.int64))


def test_joined_ids_count_the_first_part_fastest():
    sizes = (3, 4, 5)
    assert join_ids(torch.tensor([[1, 2, 3]]), sizes).item() == 1 + 3 * 2 + 12 * 3
    tokens = split_ids(torch.arange(60)[:, None], sizes)
    assert len({tuple(t) for t in tokens.tolist()}) == 60
    assert torch.equal(join_ids(tokens, sizes)[:, 0], torch.arange(60))
    with pytest.raises(ValueError, match="63 bits"):
        join_ids(torch.zeros(1, 16, dtype=torch.int64), (64,) * 16)
