"""The KL autoencoder: tokens of patches, its Gaussian, its scale, previews, and what training asks of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arvis.noise import Noise
from arvis.tokenizers import CNNConfig, PatchConfig, Trainable
from arvis.tokenizers.kl import KLAutoencoder, KLConfig, Posterior, patchify, unpatchify
from arvis.tokens import Layout
from arvis.training.tokenizer_losses import TokenizerLossConfig, tokenizer_loss

PATCH = PatchConfig(patch=4, grid=(4, 4), z_channels=3, double_z=True, width=16, heads=2, refine=4)
CNN = CNNConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=3, double_z=True, decoder_sa=False)


def small(**changes) -> KLAutoencoder:
    torch.manual_seed(0)
    settings = {"z_channels": 3, "grid": (4, 4), "patch": PATCH, **changes}
    return KLAutoencoder(KLConfig(**settings)).eval()


def images(items: int = 4, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.rand(items, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_token_is_a_patch_with_the_channel_slowest() -> None:
    z = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    tokens = patchify(z, 2)
    assert tokens.shape == (2, 6, 12)
    assert tokens[1, 4].tolist() == [int(z[1, c, 2 + p, 2 + q]) for c in range(3) for p in range(2) for q in range(2)]
    assert torch.equal(unpatchify(tokens, (2, 3), 2), z)
    assert torch.equal(patchify(z, 1), z.flatten(2).mT)


def test_the_posterior_is_a_diagonal_gaussian() -> None:
    tokenizer = small()
    moments = torch.randn(2, 6, 4, 5) * 3
    moments[0, 3, 0, :2] = torch.tensor([-99.0, 99.0])
    posterior = tokenizer.posterior(moments)
    assert posterior.logvar[0, 0, 0, :2].tolist() == [-30, 20]
    mean, logvar = posterior
    assert torch.equal(mean, moments[:, :3])
    normal = torch.distributions.Normal(mean.double(), (logvar.double() / 2).exp())
    unit = torch.distributions.Normal(torch.zeros(1).double(), torch.ones(1).double())
    kl = torch.distributions.kl_divergence(normal, unit).sum((1, 2, 3))
    torch.testing.assert_close(Posterior(mean.double(), logvar.double()).kl(), kl)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(posterior.sample(noise), mean + (logvar / 2).exp() * noise)
    clamped = small(logvar_range=(-1.0, 1.0)).posterior(moments).logvar
    assert clamped.min() == -1 and clamped.max() == 1


@pytest.mark.parametrize("p", [1, 2])
def test_tokens_are_means_or_samples_at_the_official_scale(p: int) -> None:
    tokenizer = small(patch_size=p, grid=(4 // p, 4 // p))
    assert tokenizer.space.width == 3 * p * p and tokenizer.layout().n == 16 // p**2
    assert tokenizer.config.downsample == 4 * p
    x, noise = images(), Noise.of(0, 4)
    with torch.no_grad():
        mean, logvar = tokenizer.posterior(tokenizer.features(x))
    torch.testing.assert_close(tokenizer.encode(x), patchify(mean * 0.2325, p))
    drawn = tokenizer.encode(x, noise=noise)
    wanted = mean + (logvar / 2).exp() * noise.normal("posterior", 0, (3, 4, 4)).float()
    torch.testing.assert_close(drawn, patchify(wanted * 0.2325, p))
    torch.testing.assert_close(drawn[2:], tokenizer.encode(x[2:], noise=noise.take(torch.tensor([2, 3]))))
    assert not torch.equal(drawn, tokenizer.encode(x, noise=Noise.of(1, 4)))


def test_decoding_undoes_the_scale_and_the_patches() -> None:
    for tokenizer in (small(patch_size=2, grid=(2, 2)), standardized()):
        x = images()
        with torch.no_grad():
            mean = tokenizer.posterior(tokenizer.features(x)).mean
            wanted = tokenizer.reconstruct(mean).clamp(-1, 1)
        torch.testing.assert_close(tokenizer.decode(tokenizer.encode(x)), wanted, atol=1e-5, rtol=1e-5)


def test_any_size_that_fits_has_its_own_layout() -> None:
    tokenizer = small(patch=None, cnn=CNN)
    x = images(size=(8, 12))
    assert tokenizer.layout((8, 12)) == Layout(((4, 6),))
    tokens = tokenizer.encode(x)
    assert tokens.shape == (4, 24, 3)
    assert tokenizer.decode(tokens, tokenizer.layout((8, 12))).shape == x.shape
    for shape in ((9, 12), (0, 2), (8,)):
        with pytest.raises(ValueError, match="multiples of 2"):
            tokenizer.layout(shape)


def test_previews_ignore_what_is_not_known() -> None:
    tokenizer = small()
    tokens = tokenizer.encode(images())
    known = Noise.of(3, 4).uniform("known", 0, (16,)) < 0.5
    spoilt = torch.where(known[..., None], tokens, torch.nan)
    shown = tokenizer.decode(spoilt, tokenizer.layout(), known)
    assert torch.equal(shown, tokenizer.decode(tokens * known[..., None], tokenizer.layout()))
    assert torch.equal(tokenizer.decode(tokens, known=torch.ones_like(known)), tokenizer.decode(tokens))
    assert not torch.equal(shown, tokenizer.decode(tokens))


def moments(mean: float, deviation: float, noise: float, seed: int, items: int = 64) -> Tensor:
    """Moments whose latents have other means and deviations in every channel."""
    channel = torch.arange(1, 4).view(1, 3, 1, 1)
    means = mean * channel + deviation * channel * Noise.of(seed, items).normal("mean", 0, (3, 4, 4)).float()
    return torch.cat((means, torch.full_like(means, noise).square().log()), 1)


def standardized() -> KLAutoencoder:
    tokenizer = small(scale=None)
    for step in range(30):
        f = moments(2.0, 3.0, 0.5, step)
        tokenizer.tend_(f, torch.empty(0), tokenizer.layout(), Noise.of(0, len(f)), step, None)
    return tokenizer


def test_latents_of_a_trained_tokenizer_have_unit_deviation_by_themselves() -> None:
    tokenizer = standardized()
    f = moments(2.0, 3.0, 0.5, 99, 512)
    tokens = tokenizer.sampled(f, Noise.of(5, 512))
    assert tokens.mean((0, 1)).abs().max() < 0.05 and (tokens.std((0, 1)) - 1).abs().max() < 0.05
    names = set(tokenizer.state_dict()) - set(small().state_dict())
    assert names == {"normal.mean", "normal.square"}
    fresh = small(scale=None)
    assert not torch.allclose(fresh.sampled(f, None), tokenizer.sampled(f, None))
    fresh.load_state_dict(tokenizer.state_dict())
    assert torch.equal(fresh.sampled(f, None), tokenizer.sampled(f, None))


def test_the_measurement_follows_an_encoder_that_changes() -> None:
    tokenizer = standardized()
    for step in range(30, 700):
        f = moments(-1.0, 0.5, 0.1, step % 10)
        tokenizer.tend_(f, torch.empty(0), tokenizer.layout(), Noise.of(0, len(f)), step, None)
    tokens = tokenizer.sampled(moments(-1.0, 0.5, 0.1, 3), None)
    assert tokens.mean((0, 1)).abs().max() < 0.1 and (tokens.std((0, 1)) - 1).abs().max() < 0.1


def test_tokens_of_a_frozen_encoder_keep_their_meaning() -> None:
    tokenizer, f = standardized(), moments(-1.0, 0.5, 0.1, 3)
    before = tokenizer.sampled(f, None)
    for part in (tokenizer.encoder, tokenizer.quant_conv):
        part.requires_grad_(False)
    tokenizer.tend_(f, torch.empty(0), tokenizer.layout(), Noise.of(0, 64), 0, None)
    assert torch.equal(tokenizer.sampled(f, None), before)
    tokenizer.requires_grad_(True)
    tokenizer.tend_(f, torch.empty(0), tokenizer.layout(), Noise.of(0, 64), 0, None)
    assert not torch.equal(tokenizer.sampled(f, None), before)


def test_a_constant_scale_stays_what_it_is() -> None:
    tokenizer, f = small(), moments(2.0, 3.0, 0.5, 0)
    before = tokenizer.sampled(f, None)
    tokenizer.init_(f, tokenizer.layout(), Noise.of(0, 64))
    assert tokenizer.tend_(f, torch.empty(0), tokenizer.layout(), Noise.of(0, 64), 0, 0.5) == 0
    assert torch.equal(tokenizer.sampled(f, None), before)


def test_training_samples_and_weighs_the_kl() -> None:
    tokenizer: Trainable = small(scale=None)
    x, noise = images(8), Noise.of(0, 8)
    quantized = tokenizer.quantized(tokenizer.features(x), tokenizer.layout(), noise)
    assert set(quantized.losses) == {"kl"} and quantized.values.shape == (8, 3, 4, 4)
    again = tokenizer.quantized(tokenizer.features(x), tokenizer.layout(), Noise.of(1, 8))
    assert not torch.equal(quantized.values, again.values)
    base, heavy = (
        tokenizer_loss(tokenizer, {"image": x}, noise, TokenizerLossConfig(kl=weight)) for weight in (0.0, 0.5)
    )
    torch.testing.assert_close(heavy["loss"] - base["loss"], 0.5 * heavy["kl"])
    torch.testing.assert_close(heavy["kl"], quantized.losses["kl"].detach())
    heavy["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*tokenizer.encoder.parameters(),))


def test_a_few_updates_learn_the_pictures_and_their_scale() -> None:
    tokenizer, x = small(scale=None), images(8)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        out = tokenizer_loss(tokenizer, {"image": x}, Noise.of(step, 8), TokenizerLossConfig(), step)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(float(out["l2"]))
    assert losses[-1] < 0.9 * losses[0]
    assert 0.7 < float(tokenizer.encode(x, noise=Noise.of(99, 8)).std()) < 1.4


def test_attention_lies_where_the_configuration_says() -> None:
    cnn = CNNConfig(
        ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=3, double_z=True, using_sa=False, sa_levels=(1,)
    )
    tokenizer = small(patch=None, cnn=cnn)
    names = {name.rpartition(".attn.")[0] for name in tokenizer.state_dict() if ".attn." in name}
    assert names == {"encoder.down.1"}


def test_an_encoder_of_means_alone() -> None:
    tokenizer = small(variational=False)
    assert tokenizer.quant_conv.weight.shape[:2] == (3, 6)
    assert torch.equal(tokenizer.posterior(tokenizer.features(images())).logvar, torch.ones(4, 3, 4, 4))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"patch": PatchConfig()}, "double_z=true"),
        ({"patch_size": 0}, "are positive, got 0"),
        ({"scale": 0.0}, "are positive"),
        ({"cnn": CNN}, "exactly one of cnn and patch"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        small(**changes)
