"""What every quantiser promises: round trip of all ids, idempotence, shapes, gradients, one interface."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from arvis.noise import Noise
from arvis.quant import VQ, CosineVQ, Factorised, Projected, VQConfig
from arvis.quant.bins import gaussian_bins, lloyd_bins, uniform_bins
from arvis.quant.ema import EMAVQ, EMAVQConfig
from arvis.quant.kmeans import KMeans, KMeansConfig
from arvis.quant.lookup_free import LFQ, LFQConfig
from arvis.quant.product import Product, join_ids, split_ids
from arvis.quant.residual import Residual
from arvis.quant.rotation import rotate_to
from arvis.quant.scalar import FSQ, FSQConfig
from arvis.quant.simvq import SimVQ, SimVQConfig
from arvis.quant.sphere import BSQ, BSQConfig
from arvis.quant.vq import unit


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
    "lloyd": lambda: lloyd_bins(torch.randn(2000), 8, 6),
    "product": lambda: Product([VQ(VQConfig(size=8, width=2)), CosineVQ(VQConfig(size=9, width=4))], (2, 4)),
}


COMPOSED = {
    "factorised": lambda: Factorised([nn.Linear(6, 4), nn.Linear(6, 4)], [VQ(VQConfig(size=8, width=4)), cosine(4)]),
    "projected": lambda: Projected(LFQ(LFQConfig(bits=3)), width=6, inner=3),
    "residual": lambda: Residual(
        [VQ(VQConfig(size=8, width=6)), BSQ(BSQConfig(bits=6)), VQ(VQConfig(size=9, width=6))]
    ),
    "product of two kinds": lambda: Product([FSQ(FSQConfig(levels=(5, 4))), cosine(4)], (2, 4)),
}
"""Quantisers made of others, whose codes quantise to other ids."""

PUBLISHED = {
    "cosine 16384 x 8": lambda: cosine(8, 16384),
    "fsq 64000": lambda: FSQ(FSQConfig(levels=(8, 8, 8, 5, 5, 5))),
    "lfq 16 bits": lambda: LFQ(LFQConfig(bits=16)),
    "lfq 16 bits, little endian": lambda: LFQ(LFQConfig(bits=16, little_endian=True)),
    "bsq 16 bits": lambda: BSQ(BSQConfig(bits=16)),
    "product of 256 and 255": lambda: Product([cosine(4, 256), VQ(VQConfig(size=255, width=4))], (4, 4)),
    "64 bins, two channels": lambda: gaussian_bins(64, -5, 5, 2),
}
"""Alphabets of published sizes, all of whose ids are tried."""


def cosine(width, size=9):
    quantizer = CosineVQ(VQConfig(size=size, width=width))
    nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def make(name):
    torch.manual_seed(0)
    return (MAKERS | COMPOSED | PUBLISHED)[name]()


def every_token(sizes):
    total = 1
    for size in sizes:
        total *= size
    if total > 65536:  # a sample of a large product
        return torch.stack([torch.randint(size, (5000,)) for size in sizes], -1)
    return split_ids(torch.arange(total)[:, None], sizes)


@pytest.mark.parametrize("name", MAKERS | PUBLISHED)
def test_every_id_makes_the_round_trip(name):
    """Check 1. Fails for codes and ids that count digits or bits in different orders, and for twin codes."""
    quantizer = make(name)
    tokens = every_token(quantizer.sizes)
    assert len(tokens.unique(dim=0)) == len(tokens) or len(tokens) == 5000
    found = quantizer.encode(quantizer.preimage(tokens) if isinstance(quantizer, FSQ) else quantizer.codes(tokens))
    assert torch.equal(found, tokens)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"fsq"}))  # tanh moves its codes: no fixed points
def test_quantising_twice_changes_nothing(name):
    """Check 2. Fails where values are not codes, as when the straight-through sum is returned unrounded."""
    quantizer = make(name)
    once = quantizer(torch.randn(40, 6))
    twice = quantizer(once.values)
    assert torch.equal(once.tokens, twice.tokens)
    assert torch.allclose(once.values, twice.values, atol=1e-6)


@pytest.mark.parametrize("levels", [(8, 5, 4), (3, 2, 7)])
def test_the_preimage_of_a_finite_scalar_code_is_quantised_to_it(levels):
    """Check 2 for FSQ, by the formula. Fails for a shift with the wrong sign, or one that odd levels get, too."""
    fsq, z = FSQ(FSQConfig(levels=levels)), 2 * torch.randn(300, 3, dtype=torch.float64)
    once, n = fsq(z), torch.tensor(levels, dtype=torch.float64)
    half, off = (n - 1) * (1 + 1e-3) / 2, torch.tensor([0.5 * (k % 2 == 0) for k in levels])
    back = torch.atanh((once.values * (n // 2) + off) / half) - torch.atanh(off / half)
    twice = fsq(back)
    assert torch.equal(once.tokens, twice.tokens) and torch.allclose(once.values, twice.values, atol=1e-12)
    assert torch.allclose(back, fsq.preimage(once.tokens).double(), atol=1e-3)  # float32 close to the poles of atanh


@pytest.mark.parametrize("name", ["vq", "cosine", "ema", "ema cosine", "simvq", "kmeans"])
def test_the_nearest_code_is_chosen(name):
    """Check 3, in float64. Fails for distances without |e|^2, and for cosines where distances are meant."""
    quantizer, z = make(name), torch.randn(2000, 6)
    table, x = quantizer.codes(torch.arange(50)[:, None]).double(), z.double()
    x = unit(x) if "cosine" in name else x
    best = torch.cdist(x, table).square().topk(2, largest=False)
    clear = best.values[:, 1] - best.values[:, 0] > 1e-6
    assert clear.float().mean() > 0.99
    assert torch.equal(quantizer.encode(z)[clear, 0], best.indices[clear, 0])


@pytest.mark.parametrize("name", ["vq", "ema", "simvq", "lfq", "uniform", "cosine", "ema cosine", "bsq", "product"])
def test_the_gradient_goes_straight_through(name):
    """Check 4. Fails where the gradient stops at the code, or passes a normalisation as if it were none."""
    quantizer, z, g = make(name), torch.randn(30, 6, requires_grad=True), torch.randn(30, 6)
    (grad,) = torch.autograd.grad((quantizer(z).values * g).sum(), z)
    if name in ("cosine", "ema cosine", "bsq"):
        wanted = torch.autograd.grad((unit(z) * g).sum(), z)[0]
    elif name == "product":  # its second part is looked up by angle
        wanted = torch.cat((g[:, :2], torch.autograd.grad((unit(z[:, 2:]) * g[:, 2:]).sum(), z)[0][:, 2:]), 1)
    else:
        wanted = g
    assert torch.allclose(grad, wanted, atol=1e-6)


@pytest.mark.parametrize("name", [*MAKERS, *COMPOSED])
def test_one_interface(name):
    quantizer, z = make(name), torch.randn(2, 5, 6, requires_grad=True)
    out = quantizer(z)
    assert out.tokens.shape == (2, 5, len(quantizer.sizes)) and out.tokens.dtype == torch.int64
    assert (out.tokens >= 0).all() and (out.tokens < torch.tensor(quantizer.sizes)).all()
    assert torch.equal(out.tokens, quantizer.encode(z))
    assert out.values.shape[:2] == z.shape[:2]
    assert torch.allclose(out.values, quantizer.codes(out.tokens).to(out.values), atol=1e-6)
    assert all(loss.dim() == 0 for loss in out.losses.values())
    assert [n for n, loss in out.losses.items() if loss.requires_grad] == ["vq"] * ("vq" in out.losses)
    if not isinstance(quantizer, KMeans):  # frozen features: no gradient wanted
        (grad,) = torch.autograd.grad(out.values.square().sum() + sum(out.losses.values()), z)
        assert grad.abs().sum() > 0
    assert ("vq" in out.losses) == bool(out.losses)
    if name not in COMPOSED:
        assert quantizer(z.detach().bfloat16()).values.dtype == torch.float32


@pytest.mark.parametrize("name", [*MAKERS, *COMPOSED])
def test_usage_and_perplexity_are_reported(name):
    """Fails for a usage of pooled sub-tokens, or a perplexity in bits or of another batch."""
    quantizer = make(name)
    out = quantizer(torch.randn(300, 6))
    assert not any(stat.requires_grad for stat in out.stats.values())
    for i, (ids, size) in enumerate(zip(out.tokens.unbind(-1), quantizer.sizes, strict=True)):
        usage, perplexity = out.stats["usage"].reshape(-1)[i], out.stats["perplexity"].reshape(-1)[i]
        p = torch.bincount(ids) / len(ids)
        assert torch.isclose(usage, torch.tensor(len(ids.unique()) / size))
        assert torch.isclose(perplexity, torch.exp(-(p[p > 0] * p[p > 0].log()).sum()), rtol=1e-4)


@pytest.mark.parametrize("name", ["lfq", "lfq little", "bsq", "vq", "cosine", "simvq", "ema", "factorised"])
def test_autocast_changes_nothing(name):
    """Fails for a product of distances or soft choices that autocast rounds to bfloat16."""
    quantizer, z = make(name), torch.randn(200, 6) * 0.1
    if name in ("vq", "cosine"):
        quantizer.config = VQConfig(size=50, width=6, entropy=0.1)
    if name == "factorised":  # what is in front of the quantisers may be rounded
        quantizer.adapters = nn.ModuleList([nn.Linear(6, 4, bias=False) for _ in range(2)])
        nn.init.eye_(quantizer.adapters[0].weight), nn.init.eye_(quantizer.adapters[1].weight)
        z = z.bfloat16().float()
    plain = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = quantizer(z)
    assert torch.equal(plain.tokens, rounded.tokens)
    assert rounded.values.dtype == torch.float32 and torch.allclose(plain.values, rounded.values, atol=1e-6)
    for term, value in plain.losses.items():
        assert torch.allclose(value, rounded.losses[term], rtol=1e-5, atol=1e-7), term


def test_views_are_quantised_apart_and_pushed_apart():
    """Fails for one adapter used twice, codes of the wrong view, or a term that pulls codes together."""
    torch.manual_seed(0)
    parts = [cosine(4, 20) for _ in range(3)]
    adapters = [nn.Linear(6, 4) for _ in range(3)]
    quantizer, z = Factorised(adapters, parts, disentangle=0.3), torch.randn(50, 6)
    out = quantizer(z)
    own = [part(adapter(z)) for part, adapter in zip(parts, adapters, strict=True)]
    assert torch.equal(out.tokens, torch.cat([o.tokens for o in own], 1)) and quantizer.sizes == (20, 20, 20)
    assert torch.allclose(out.values, torch.cat([o.values for o in own], 1))
    a, b, c = (o.values for o in own)
    pairs = [((x * y).sum(1) ** 2).mean() for x, y in ((a, b), (a, c), (b, c))]  # codes have length one
    apart = torch.stack(pairs).mean()
    assert torch.allclose(out.losses["disentangle"], apart)
    assert torch.allclose(out.losses["vq"], sum(o.losses["vq"] for o in own) + 0.3 * apart, rtol=1e-5)
    table = torch.autograd.grad(out.losses["vq"], parts[0].embedding.weight, retain_graph=True)[0]
    alone = torch.autograd.grad(own[0].losses["vq"], parts[0].embedding.weight)[0]
    assert torch.allclose(table, alone)  # the term reaches the encoder alone
    encoder = torch.autograd.grad(out.losses["vq"], adapters[0].weight)[0]
    assert not torch.allclose(
        encoder, torch.autograd.grad(parts[0](adapters[0](z)).losses["vq"], adapters[0].weight)[0]
    )
    assert "disentangle" not in Factorised(adapters[:1], parts[:1])(z).losses
    with pytest.raises(ValueError, match="3 quantisers and 2 adapters"):
        Factorised(adapters[:2], parts)


def test_a_projected_quantiser_looks_up_in_few_channels():
    """Fails where the codes are those in front of the second map, or where a map is left out."""
    torch.manual_seed(0)
    inner = cosine(3, 30)
    quantizer, z = Projected(inner, width=12, inner=3), torch.randn(40, 12)
    out = quantizer(z)
    assert torch.equal(out.tokens, inner.encode(quantizer.project_in(z)))
    assert torch.allclose(out.values, quantizer.project_out(inner.codes(out.tokens)), atol=1e-6)
    assert torch.linalg.matrix_rank(out.values.detach() - quantizer.project_out.bias) == 3


def test_residual_stages():
    """Check 7. Fails for a residual that is not reduced, a stage that sees the input, a stage left out of the sum."""
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
