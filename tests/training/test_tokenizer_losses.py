"""The training loss of tokenizers: its sum, its gradients, and the upkeep of the codebook."""

import math

import pytest
import torch

from arvis.noise import Noise
from arvis.tokenizers import PatchConfig, PyramidVQ, PyramidVQConfig
from arvis.training.adversarial import Adversary, AdversaryConfig
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss

PATCH = PatchConfig(patch=4, grid=(4, 4), width=32, heads=2, z_channels=6, encoder_depth=1, decoder_depth=1, refine=8)
NOISE = Noise.of(0)


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return PyramidVQ(PyramidVQConfig(patch_nums=(1, 2, 4), vocab_size=64, z_channels=6, patch=PATCH))


@pytest.fixture
def batch():
    return {"image": torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1}


def test_the_loss_is_the_weighted_sum_of_its_terms(tokenizer, batch):
    config = TokenizerLossConfig(l1=0.3, l2=0.7, edges=0.2, vq=0.5, perceptual=2.0)
    out = tokenizer_loss(tokenizer, batch, NOISE, config, perceptual=lambda a, b: (a - b).abs().amax(dim=(1, 2, 3)))
    image, quantized = tokenizer(batch["image"])
    error = image - batch["image"]
    assert torch.allclose(out["l1"], error.abs().mean()) and torch.allclose(out["l2"], error.square().mean())
    assert torch.allclose(out["vq"], quantized.losses["vq"])
    total = 0.3 * out["l1"] + 0.7 * out["l2"] + 0.2 * out["edges"] + 0.5 * out["vq"] + 2 * out["perceptual"]
    assert torch.allclose(out["loss"], total)
    mse = (image.clamp(-1, 1) - batch["image"]).square().mean(dim=(1, 2, 3))
    assert math.isclose(out["psnr"], (10 * (4 / mse).log10()).mean().item(), rel_tol=1e-5)
    assert all(value.dim() == 0 for value in out.values())
    assert [name for name, value in out.items() if value.requires_grad] == ["loss"]


def test_validation_changes_nothing_and_training_tends_the_codebook(tokenizer, batch):
    before = {n: t.clone() for n, t in tokenizer.state_dict().items()}
    config = TokenizerLossConfig(revive_every=2)
    out = tokenizer_loss(tokenizer, batch, NOISE, config)
    assert all(torch.equal(t, before[n]) for n, t in tokenizer.state_dict().items())
    assert "revived" not in out
    first = tokenizer_loss(tokenizer, batch, NOISE, config, updates=0)
    assert first["revived"] == 0 and tokenizer.quantize.ema_vocab_hit_SV.sum() == 8 * 21
    second = tokenizer_loss(tokenizer, batch, NOISE, config, updates=1)
    assert second["revived"] > 0
    second["loss"].backward()  # the table moved after the forward pass: its gradient must still be there
    assert tokenizer.quantize.embedding.weight.grad.abs().sum() > 0
    for updates in (2, 3):
        late = tokenizer_loss(tokenizer, batch, NOISE, TokenizerLossConfig(revive_every=2, revive_until=2), updates)
        assert late["revived"] == 0


def test_usage_per_level_comes_from_the_average_of_hits(tokenizer):
    hits = tokenizer.quantize.ema_vocab_hit_SV
    hits[0, 0], hits[1, :4], hits[2] = 8.0, 2.0, 1.0
    found = tokenizer.metrics()
    assert [found[f"usage_{k}"].item() for k in range(3)] == [1 / 64, 4 / 64, 1]
    assert torch.allclose(torch.stack([found[f"perplexity_{k}"] for k in range(3)]), torch.tensor([1.0, 4, 64]))


def test_one_backward_pass_serves_both_sides_of_an_adversary(tokenizer, batch):
    critic, config = Adversary(AdversaryConfig(width=8, layers=1)).eval(), TokenizerLossConfig(adversarial=0.5)
    out = tokenizer_loss(tokenizer, batch, NOISE, config, adversary=critic)
    parameters = list(critic.parameters())
    alone = torch.autograd.grad(out["loss_adversary"], parameters, retain_graph=True)
    assert set(torch.autograd.grad(out["loss"], parameters, retain_graph=True, allow_unused=True)) == {None}
    ours = [p for p in tokenizer.parameters() if p.requires_grad]
    assert all(
        g is None for g in torch.autograd.grad(out["loss_adversary"], ours, retain_graph=True, allow_unused=True)
    )
    (out["loss"] + out["loss_adversary"]).backward()
    assert all(torch.allclose(p.grad, g) for p, g in zip(parameters, alone, strict=True))
    without = tokenizer_loss(tokenizer, batch, NOISE, config)
    assert torch.allclose(out["loss"], without["loss"] + 0.5 * out["adversarial"])


def test_an_adaptive_adversary_pulls_as_hard_as_the_reconstruction(tokenizer, batch):
    critic, plain = Adversary(AdversaryConfig(width=8, layers=1)).eval(), TokenizerLossConfig(vq=0.0, adversarial=0.0)
    config = TokenizerLossConfig(vq=0.0, adversarial=1.0, adaptive=True)
    last = tokenizer.decoder.last_weight
    (alone,) = torch.autograd.grad(tokenizer_loss(tokenizer, batch, NOISE, plain)["loss"], last)
    (both,) = torch.autograd.grad(tokenizer_loss(tokenizer, batch, NOISE, config, adversary=critic)["loss"], last)
    assert 0.9 < ((both - alone).norm() / alone.norm()).item() < 1.001
    silent = Adversary(AdversaryConfig(width=8, layers=1, start=5)).eval()
    early = tokenizer_loss(tokenizer, batch, NOISE, config, updates=4, adversary=silent)
    assert early["adversarial"] == 0 and early["loss_adversary"] == 0
    with torch.no_grad():  # validation has no gradients to balance
        assert torch.isfinite(tokenizer_loss(tokenizer, batch, NOISE, config, adversary=critic)["loss"])
