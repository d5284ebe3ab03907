"""The rotation trick: a gradient that keeps the angle between vector and code (arXiv 2410.06424)."""

from __future__ import annotations

from torch import Tensor


def rotate_to(z: Tensor, q: Tensor) -> Tensor:
    """The value of q with the gradient of (|q| / |z|) R z, R the rotation that turns z towards q: [..., D].

    R and the ratio of lengths are constants, so the gradient of z is that of q, rotated back and scaled. Opposite
    vectors have no such rotation in one plane; they get the reflection. Takes the place of `straight_through`.
    """
    z_length, q_length = (x.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6) for x in (z, q))
    u, v = z.detach() / z_length, q.detach() / q_length
    w = u + v
    w = w / w.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    turned = z - 2 * w * (w * z).sum(-1, keepdim=True) + 2 * v * (u * z).sum(-1, keepdim=True)
    turned = turned * (q_length / z_length)
    return turned + (q - turned).detach()  # without the rounding of the rotation
