"""Perceptual and adversarial losses against formulas written out here, and gradients that reach only their own side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from arvis.noise import Noise
from arvis.training.adversarial import Adversary, AdversaryConfig, adaptive_weight, frozen, hinge
from arvis.training.fit import FitConfig, fit
from arvis.training.optimizers import Part
from arvis.training.perceptual import LPIPS, GradientLoss, perceptual
from arvis.weights import WeightsError


@pytest.fixture(scope="module")
def official() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights under the names of vgg16 (with a piece of its classifier) and of the lpips heads."""
    generator = torch.Generator().manual_seed(0)
    state = LPIPS().state_dict()
    random = {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    vgg = {name: value for name, value in random.items() if name.startswith("features.")}
    heads = {name: value.abs() for name, value in random.items() if name.startswith("lin")}
    return {**vgg, "classifier.0.weight": torch.zeros(2, 2)}, heads


def _files(folder: Path, official: tuple[dict[str, Tensor], dict[str, Tensor]]) -> list[Path]:
    paths = [folder / "vgg16.safetensors", folder / "vgg.pth"]
    save_file(official[0], paths[0])
    torch.save(official[1], paths[1])
    return paths


def test_the_graph_is_vgg16_with_the_official_names() -> None:
    shapes = {name: tuple(value.shape) for name, value in LPIPS().state_dict().items()}
    assert sum(value.numel() for name, value in LPIPS().state_dict().items() if "features" in name) == 14_714_688
    numbers = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("features")})
    assert numbers == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert [shapes[f"lin{k}.model.1.weight"] for k in range(5)] == [(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]


def test_lpips_is_its_formula(tmp_path: Path, official: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    model = perceptual(_files(tmp_path, official))
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vgg, heads = official

    def taps(image: Tensor) -> list[Tensor]:
        h = (image - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        found = []
        for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            h = functional.max_pool2d(h, 2) if block[0] else h
            for n in block:
                h = functional.conv2d(h, vgg[f"features.{n}.weight"], vgg[f"features.{n}.bias"], padding=1).relu()
            found.append(functional.normalize(h, dim=1, eps=1e-10))
        return found

    expected = sum(
        torch.einsum("bcyx,c->byx", (a - b) ** 2, heads[f"lin{k}.model.1.weight"].flatten()).mean((1, 2))
        for k, (a, b) in enumerate(zip(taps(x), taps(y), strict=True))
    )
    torch.testing.assert_close(model(x, y), expected)
    assert model(x, x).abs().max() == 0 and not any(p.requires_grad for p in model.parameters())


def test_lpips_has_finite_gradients_where_features_vanish() -> None:
    model = LPIPS()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    model(x, torch.ones(1, 3, 16, 16)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_wrong_weight_files_are_named(tmp_path: Path, official: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    vgg, heads = official
    with pytest.raises(WeightsError, match=r"lin0\.model\.1\.weight.*lpips"):
        perceptual(_files(tmp_path, official)[:1])
    save_file({**vgg, **heads, "lin5.model.1.weight": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError, match=r"unknown tensor lin5"):
        perceptual([tmp_path / "more.safetensors"])
    save_file({**vgg, **heads, "features.0.weight": torch.ones(64, 1, 3, 3)}, tmp_path / "shape.safetensors")
    with pytest.raises(WeightsError, match=r"features\.0\.weight has the shape \(64, 1, 3, 3\)"):
        perceptual([tmp_path / "shape.safetensors"])


def test_the_stand_in_is_a_distance_that_sees_edges() -> None:
    loss = perceptual()
    assert isinstance(loss, GradientLoss)
    x = torch.zeros(1, 3, 16, 16)
    assert float(loss(x, x)) == 0 and float(loss(x + 0.5, x)) == pytest.approx(0.5)
    stripes = torch.tensor([0.5, -0.5]).repeat(8).expand(1, 3, 16, 16)
    assert float(loss(stripes, x)) == pytest.approx((0.5 + 1.0) / 4)  # the finest of four scales alone
    steps = torch.tensor([0.5, -0.5]).repeat_interleave(8).expand(1, 3, 16, 16)
    edges = sum(1.0 / (16 / 2**s - 1) for s in range(4))
    assert float(loss(steps, x)) == pytest.approx((4 * 0.5 + edges) / 4)
    assert float(loss(torch.ones(1, 3, 3, 3), torch.zeros(1, 3, 3, 3))) == pytest.approx(1.0)


def test_hinge_is_its_formula() -> None:
    assert float(hinge(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0]))) == pytest.approx(0.5 * (0.5 + 1.0))


def test_each_loss_leaves_the_other_side_alone() -> None:
    adversary = Adversary(AdversaryConfig(width=4, layers=2))
    fake = torch.rand(2, 3, 24, 24, requires_grad=True)
    real = torch.rand(2, 3, 24, 24, requires_grad=True)
    adversary.generator(fake).backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in adversary.parameters())
    fake.grad = None
    adversary.discriminator(real, fake).backward()
    assert fake.grad is None and real.grad is None
    assert all(p.grad is not None for p in adversary.parameters())
    adversary.eval()
    torch.testing.assert_close(frozen(adversary, fake), adversary(fake))


def test_the_discriminator_is_lipschitz_and_sees_patches() -> None:
    torch.manual_seed(0)
    adversary = Adversary(AdversaryConfig(width=4, layers=2))
    x = torch.randn(1, 3, 64, 64)
    for _ in range(60):
        adversary(x[:, :, :16, :16])  # the power iteration converges in training mode
    adversary.eval()
    first = adversary.layers[0]
    assert float(torch.linalg.matrix_norm(first.weight.detach().flatten(1), ord=2)) == pytest.approx(1.0, rel=1e-3)
    assert adversary(x).shape == (1, 1, 14, 14)
    x.requires_grad_()
    (seen,) = torch.autograd.grad(adversary(x)[0, 0, 7, 7], x)
    rows = seen.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 34  # of the 64


def test_the_adaptive_weight_equals_the_pulls() -> None:
    last = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, adversarial = (3.0 * last).sum(), (0.5 * last).sum()
    assert float(adaptive_weight(reconstruction, adversarial, last)) == pytest.approx(6.0, rel=1e-3)
    assert float(adaptive_weight(reconstruction, 0.0 * last.sum(), last)) == 1e4
    assert not adaptive_weight(reconstruction, adversarial, last).requires_grad
    adversary = Adversary(AdversaryConfig(width=4, layers=1))
    image = last.sum() * torch.ones(1, 3, 16, 16)
    plain = adversary.eval().generator(image)
    scaled = adversary.generator(image, reconstruction=10.0 * plain, last=last)
    torch.testing.assert_close(scaled, 10.0 * plain, rtol=0.05, atol=0.0)


def test_a_gan_is_trained_by_the_loop_and_starts_when_told(tmp_path: Path) -> None:
    """Before `start` the judge keeps its weights; afterwards it tells real from made, and the maker follows it."""
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {"maker": nn.Conv2d(3, 3, 1), "adversary": Adversary(AdversaryConfig(width=8, layers=1, start=5))}
    )
    module["maker"].requires_grad_(True)
    weights: list[Tensor] = []

    def loss(batch: dict[str, Any], noise: Noise) -> dict[str, Tensor]:
        weights.append(module["adversary"].layers[0].parametrizations.weight.original.detach().clone())
        real = 0.9 * torch.ones(8, 3, 8, 8)
        fake = module["maker"](batch["image"])
        adversary: Any = module["adversary"]
        return {
            "loss": adversary.generator(fake, batch["step"]),
            "loss_adversary": adversary.discriminator(real, fake, batch["step"]),
            "level": fake.mean().detach(),
        }

    def data(step: int) -> dict[str, Any]:
        return {"image": torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))}

    part = Part(names=("adversary.",), loss="loss_adversary", lr=2e-3)
    config = FitConfig(
        steps=60, batch=8, lr=1e-2, betas=(0.5, 0.9), parts=(part,), precision="float32", schedule="constant"
    )
    before = module["maker"].weight.detach().clone()
    result = fit(module, loss, data, replace(config, steps=5), tmp_path / "short")
    assert result.metrics["loss_adversary"] == 0 and torch.equal(weights[0], weights[4])
    assert torch.equal(module["adversary"].layers[0].parametrizations.weight.original, weights[0])
    weights.clear()
    torch.testing.assert_close(module["maker"].weight.detach(), before)
    result = fit(module, loss, data, config, tmp_path / "long")
    assert torch.equal(weights[0], weights[5]) and not torch.equal(weights[5], weights[7])
    assert result.metrics["level"] > 0.3 and 0 < result.metrics["loss_adversary"] < 1.0
