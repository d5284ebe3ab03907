import numpy as np
import pytest
import torch

from arvis.evaluation.metrics import psnr, ssim
from arvis.evaluation.statistics import Rate


def pictures(seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 256, (2, 3, 24, 20), generator=g, dtype=torch.uint8)
    b = (a.float() + 12 * torch.randn(a.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    return a, b


def test_psnr_has_its_closed_form():
    a = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    assert psnr(a, a + 255.0)[0] == 0
    assert abs(float(psnr(a, a + 2.55)[0]) - 40) < 1e-9
    assert psnr(a, a)[0] == float("inf")
    assert abs(float(psnr(a, a + 0.2, data_range=2.0)[0]) - 20) < 1e-5


def test_both_agree_with_scikit_image():
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is an extra of development")
    a, b = pictures()
    for i in range(2):
        x, y = (t[i].permute(1, 2, 0).numpy().astype(np.float64) for t in (a, b))
        assert abs(float(psnr(a, b)[i]) - skimage.peak_signal_noise_ratio(x, y, data_range=255)) < 1e-9
        theirs = skimage.structural_similarity(
            x, y, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert abs(float(ssim(a, b)[i]) - theirs) < 1e-6


def test_wrong_shapes_are_named():
    a, _ = pictures()
    with pytest.raises(ValueError, match=r"\(2, 3, 24, 20\).*\(1, 3, 24, 20\)"):
        psnr(a, a[:1])
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(a[..., :8, :8], a[..., :8, :8])


def test_intervals_cover_the_truth():
    g = torch.Generator().manual_seed(0)
    for p, n in ((0.1, 60), (0.5, 115), (0.9, 500)):
        hits = (torch.rand(2000, n, generator=g) < p).sum(1).tolist()
        covered = sum(low <= p <= high for low, high in (Rate(hits=h, n=n).interval for h in hits)) / 2000
        assert 0.93 <= covered <= 0.98
    with pytest.raises(ValueError, match="3 of 2"):
        Rate(hits=3, n=2)
