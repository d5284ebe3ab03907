"""Moving averages, k-means, the frozen table, the rotation trick, and random choices."""

from itertools import pairwise

import pytest
import torch

from arvis.noise import Noise
from arvis.quant import VQ, VQConfig
from arvis.quant.ema import EMAVQ, EMAVQConfig
from arvis.quant.factorised import disentanglement
from arvis.quant.kmeans import KMeans, KMeansConfig, kmeans
from arvis.quant.rotation import rotate_to
from arvis.quant.simvq import SimVQ, SimVQConfig
from arvis.quant.stochastic import gumbel_softmax, keep_some, noise_substitution, sample_codes
from arvis.quant.usage import count, used
from arvis.quant.vq import nearest, unit

NOISE = Noise.of(1)


# -- moving averages ------------------------------------------------------------------------------------------------


def ema(cosine=False, size=8, epsilon=1e-5):
    torch.manual_seed(0)
    return EMAVQ(EMAVQConfig(size=size, width=4, cosine=cosine, decay=0.9, epsilon=epsilon))


@pytest.mark.parametrize("cosine", [False, True])
def test_one_update_is_the_formula(cosine):
    """Check 6. Fails for counts without smoothing, ids of the new table, and sums of vectors that should be unit."""
    quantizer, z = ema(cosine, epsilon=0.2), torch.randn(100, 4)
    out = quantizer(z)
    x, ids = unit(z) if cosine else z, out.tokens[:, 0]
    counts = torch.bincount(ids, minlength=8).float()
    sums = torch.stack([x[ids == k].sum(0) for k in range(8)])
    n, m = 0.9 * quantizer.cluster_size + 0.1 * counts, 0.9 * quantizer.embed_avg + 0.1 * sums
    smooth = (n + 0.2) / (n.sum() + 8 * 0.2) * n.sum()
    old = quantizer.embed.clone()
    assert torch.allclose(out.values, old[ids], atol=1e-6)  # the output is that of the old table
    quantizer.update_(z, out.tokens)
    table = m / smooth[:, None]
    assert torch.allclose(quantizer.embed, unit(table) if cosine else table, atol=1e-6)
    assert not torch.allclose(quantizer.embed, old)


def test_repeated_batches_pull_codes_to_the_means():
    """Check 6: after t updates the distance to the mean of a cell is at most decay^t of what it was, but for the
    smoothing. Fails for averages that forget at another rate, and for codes that stay."""
    quantizer, z = ema(), torch.randn(200, 4)
    quantizer.init_(z, NOISE, iterations=30)
    tokens = quantizer.encode(z)
    counts = torch.bincount(tokens[:, 0], minlength=8).float()
    means = torch.stack([z[tokens[:, 0] == k].mean(0) for k in range(8)])
    quantizer.cluster_size.copy_(counts)
    quantizer.embed_avg.copy_((means + torch.randn(8, 4)) * counts[:, None])
    before = (quantizer.embed_avg / counts[:, None] - means).norm(dim=1)
    for t in range(1, 101):
        quantizer.update_(z, tokens)
        left = (quantizer.embed - means).norm(dim=1)
        assert (left <= 0.9**t * before + 1e-4).all() and (t > 30 or (left >= 0.9**t * before - 1e-4).all())
    assert torch.allclose(quantizer.embed, means, atol=1e-3)


def test_the_order_inside_a_batch_does_not_matter_and_nothing_moves_without_an_update():
    a, b, z = ema(), ema(), torch.randn(100, 4)
    order = torch.randperm(100)
    before = a.embed.clone()
    a.train()(z), a.eval()(z)
    assert torch.equal(before, a.embed) and list(a.parameters()) == []
    a.update_(z, a.encode(z))
    b.update_(z[order], b.encode(z[order]))
    assert torch.allclose(a.embed, b.embed, atol=1e-6)
    again = ema()
    again.load_state_dict(a.state_dict())
    again.update_(z, again.encode(z)), a.update_(z, a.encode(z))  # the averages are saved, too
    assert torch.equal(a.embed, again.embed) and set(a.state_dict()) == {"embed", "embed_avg", "cluster_size"}


def test_rare_codes_are_revived():
    """Check 13. Fails for revived codes without a count, which the next update divides away."""
    quantizer = ema(size=64)
    quantizer.embed[32:] = 100
    for step in range(20):
        z = torch.randn(512, 4, generator=torch.Generator().manual_seed(step))
        quantizer.update_(z, quantizer.encode(z))
        gone = quantizer.cluster_size < 0.8
        assert quantizer.revive_(z, NOISE, step, threshold=0.8) == gone.sum()
        assert torch.allclose(quantizer.embed_avg[gone], 0.8 * quantizer.embed[gone])
        assert (quantizer.cluster_size >= 0.8).all()
    assert used(count(quantizer.encode(torch.randn(20000, 4)), 64)) >= 0.95


def test_revived_codes_come_from_the_positions_that_are_asked_for():
    quantizer, z = ema(size=16), torch.randn(30, 4, 4)  # 30 pictures of four positions
    quantizer.cluster_size.zero_()
    assert quantizer.revive_(z, NOISE, 0, 0.5, weight=torch.tensor([0.0, 0, 1, 0]).expand(30, 4)) == 16
    assert torch.equal(quantizer.embed, z[nearest(quantizer.embed, z[:, 2]), 2])


# -- k-means --------------------------------------------------------------------------------------------------------


def test_kmeans_centres_are_means_and_the_error_falls():
    x = torch.randn(500, 3)
    errors = []
    for iterations in (0, 1, 3, 10, 60):
        centres, counts = kmeans(x, 12, NOISE, iterations=iterations)
        errors.append((x - centres[nearest(x, centres)]).square().sum().item())
    assert all(b <= a + 1e-3 for a, b in pairwise(errors)) and errors[-1] < 0.9 * errors[0]
    ids = nearest(x, centres)
    assert torch.allclose(centres, torch.stack([x[ids == k].mean(0) for k in range(12)]), atol=1e-4)
    assert torch.equal(counts, torch.bincount(ids, minlength=12).float())
    sphere, _ = kmeans(x, 12, NOISE, cosine=True)
    assert torch.allclose(sphere.norm(dim=1), torch.ones(12))


def test_a_centre_without_vectors_stays():
    """Fails where the mean of nothing moves it to the origin."""
    points = torch.tensor([[5.0, 5], [6, 5], [5, 7]])
    centres, counts = kmeans(points.repeat(20, 1), 9, NOISE)
    assert (torch.cdist(centres, points) == 0).any(1).all()
    assert counts.sum() == 60 and (counts == 0).sum() == 6


def test_kmeans_tokens_find_blobs_and_have_no_gradient():
    means = torch.tensor([[5.0, 0], [-5, 0], [0, 5]])
    quantizer = KMeans(KMeansConfig(size=3, width=2))
    quantizer.fit_(means.repeat(50, 1) + 0.1 * torch.randn(150, 2), Noise.of(0))  # starts with one of each
    assert torch.cdist(means, quantizer.centroids).min(1).values.max() < 0.1
    assert list(quantizer.parameters()) == [] and not quantizer(means).values.requires_grad


# -- the frozen table -----------------------------------------------------------------------------------------------


def test_a_transformed_table_is_used_more_than_a_free_one():
    """Check 14, with its sizes. Fails where the frozen table is trained, or its map is not."""
    torch.manual_seed(0)

    def blobs(n):
        x = 0.5 * torch.randn(n, 8)
        return x + 3 * torch.nn.functional.one_hot(torch.randint(2, (n,)), 8)

    free, frozen = VQ(VQConfig(size=1024, width=8)), SimVQ(SimVQConfig(size=1024, width=8))
    torch.nn.init.normal_(free.embedding.weight, std=8**-0.5)
    before, results = frozen.frozen_codebook.clone(), {}
    for name, quantizer, rate in (("free", free, 1e-3), ("frozen", frozen, 1e-2)):
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=rate)
        for _ in range(600):
            optimizer.zero_grad()
            quantizer(blobs(1024)).losses["vq"].backward()
            optimizer.step()
        x = blobs(40_000)
        with torch.no_grad():
            out = quantizer(x)
        results[name] = (used(count(out.tokens, 1024)).item(), (out.values - x).square().sum(1).mean().item())
    assert torch.equal(before, frozen.frozen_codebook)
    assert {n for n, _ in frozen.named_parameters()} == {"code_transform.weight"}
    assert results["frozen"][0] >= 0.3 and results["free"][0] <= 0.15
    assert results["frozen"][1] <= 0.5 * results["free"][1]


def test_any_module_can_be_the_map_of_the_frozen_table():
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 6))
    quantizer, z = SimVQ(SimVQConfig(size=20, width=6), mlp), torch.randn(30, 6)
    out = quantizer(z)
    assert torch.equal(out.tokens[:, 0], torch.cdist(z, mlp(quantizer.frozen_codebook)).argmin(1))
    out.losses["vq"].backward()
    assert all(p.grad.abs().sum() > 0 for p in mlp.parameters())
    assert set(quantizer.state_dict()) == {"frozen_codebook", *(f"code_transform.{n}" for n in mlp.state_dict())}


# -- gradients ------------------------------------------------------------------------------------------------------


def dense_rotation(a, b):
    """The rotation in the plane of two unit vectors that takes a to b, from its definition."""
    cos = (a * b).sum()
    c = unit(b - cos * a)  # the second axis of the plane
    sin = (b * c).sum()
    plane = torch.outer(a, a) + torch.outer(c, c)
    turn = cos * plane + sin * (torch.outer(c, a) - torch.outer(a, c))
    return torch.eye(len(a), dtype=a.dtype) - plane + turn


def test_the_rotation_is_a_rotation():
    """Check 5. Fails for a reflection, a gradient that is not scaled, and a rotation that carries gradient itself."""
    torch.manual_seed(0)
    z, q = torch.randn(20, 5, dtype=torch.float64, requires_grad=True), torch.randn(20, 5, dtype=torch.float64)
    out = rotate_to(z, q)
    assert torch.allclose(out, q, atol=1e-12)
    assert torch.allclose(rotate_to(z.float(), q.float()), q.float(), atol=1e-6)
    g = torch.randn(20, 5, dtype=torch.float64)
    (grad,) = torch.autograd.grad((out * g).sum(), z)
    for i in range(20):
        a, b = z[i].detach(), q[i]
        dense = dense_rotation(unit(a), unit(b))
        assert torch.allclose(dense @ dense.T, torch.eye(5, dtype=torch.float64))
        assert torch.isclose(torch.linalg.det(dense), torch.tensor(1.0, dtype=torch.float64))
        assert torch.allclose(dense @ unit(a), unit(b))
        assert torch.allclose(grad[i], dense.T @ g[i] * b.norm() / a.norm())


def test_the_rotation_takes_the_place_of_straight_through():
    torch.manual_seed(0)
    g, z = torch.randn(30, 4), torch.randn(30, 4, requires_grad=True)
    for plain, turned in (
        (SimVQ(SimVQConfig(size=9, width=4)), SimVQ(SimVQConfig(size=9, width=4), estimator=rotate_to)),
        (EMAVQ(EMAVQConfig(size=9, width=4)), EMAVQ(EMAVQConfig(size=9, width=4), estimator=rotate_to)),
    ):
        turned.load_state_dict(plain.state_dict())
        assert torch.equal(plain(z).tokens, turned(z).tokens)
        assert torch.allclose(plain(z).values, turned(z).values, atol=1e-6)
        a, b = (torch.autograd.grad((x(z).values * g).sum(), z)[0] for x in (plain, turned))
        scale = plain(z).values.norm(dim=1) / z.norm(dim=1)
        assert not torch.allclose(a, b, atol=0.1) and torch.allclose(a.norm(dim=1) * scale, b.norm(dim=1), atol=1e-4)


def test_the_rotation_survives_opposite_and_zero_vectors():
    z = torch.tensor([[1.0, 0], [0, 0]], requires_grad=True)
    out = rotate_to(z, torch.tensor([[-1.0, 0], [1, 0]]))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(z.grad).all()


# -- random choices -------------------------------------------------------------------------------------------------


def test_sampled_codes_follow_the_softmax():
    table, z = torch.eye(3), torch.tensor([[[1.0, 0.8, 0.0]]]).expand(1, 20_000, 3)
    ids = sample_codes(z, table, 0.3, NOISE, 0)
    p = (unit(z[0, 0]) / 0.3).softmax(0)
    assert torch.allclose(torch.bincount(ids[0], minlength=3) / 20_000, p, atol=0.015)
    cold = sample_codes(z, table, 1e-3, NOISE, 0)
    assert (cold == 0).all()
    chosen = gumbel_softmax((unit(z) / 0.3), 1.0, NOISE, 0).argmax(-1)
    assert torch.allclose(torch.bincount(chosen[0], minlength=3) / 20_000, p, atol=0.015)


def test_gumbel_choices_are_one_hot_with_a_soft_gradient():
    logits = torch.randn(2, 4, 5, requires_grad=True)
    hard = gumbel_softmax(logits, 0.7, NOISE, 0)
    assert torch.equal(hard.detach().round(), torch.nn.functional.one_hot(hard.argmax(-1), 5).float())
    (a,) = torch.autograd.grad((hard * torch.arange(5)).sum(), logits)
    (b,) = torch.autograd.grad((gumbel_softmax(logits, 0.7, NOISE, 0, hard=False) * torch.arange(5)).sum(), logits)
    assert torch.allclose(a, b) and a.abs().sum() > 0


def test_substitutions():
    z, q = torch.randn(2, 2000, 4), torch.randn(2, 2000, 4)
    out = noise_substitution(z, q, NOISE, 0)
    assert torch.allclose((out - z).norm(dim=-1), (q - z).norm(dim=-1), atol=1e-5)
    direction = unit(out - z).mean((0, 1))
    assert direction.abs().max() < 0.05  # in any direction, not towards q
    a, b = z.clone().requires_grad_(), q.clone().requires_grad_()
    for grad in torch.autograd.grad(noise_substitution(a, b, NOISE, 0).square().sum(), (a, b)):
        assert grad.abs().sum() > 0  # the codes learn as well as the encoder
    mixed = keep_some(z, q, 0.25, NOISE, 0)
    kept = (mixed == z).all(-1)
    assert torch.equal(mixed[~kept], q[~kept]) and 0.2 < kept.float().mean() < 0.3


def test_disentanglement_is_the_mean_squared_cosine():
    a = torch.tensor([[1.0, 0], [1, 1]])
    assert torch.isclose(disentanglement(a, torch.tensor([[0.0, 5], [2, 2]])), torch.tensor(0.5))
