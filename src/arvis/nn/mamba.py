"""Mamba-2: rows mixed by a selective state space (arXiv 2405.21060), in plain PyTorch.

Each head carries a matrix S from row to row, at a cost that does not grow with what came before:

    S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_t^T        y_t = S_t c_t

dt, x, b and c are made of row t, a < 0 is learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arvis.nn.wide import unrounded


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Sizes of a mixer; names as in the public module. `ngroups` groups of heads have a b and a c of their own."""

    d_state: int = 64
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    norm_eps: float = 1e-5


def scan(
    x_RTHP: Tensor,
    dt_RTH: Tensor,
    a_H: Tensor,
    b_RTGN: Tensor,
    c_RTGN: Tensor,
    state_RHPN: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """y [R, T, H, P] of the recurrence above, and the state [R, H, P, N] after the last row.

    Rows of a chunk meet as in attention, c_t b_s^T exp(sum of dt a over s < i <= t); only the states at the borders of
    chunks go one after another (section 6 there). G groups of heads share b and c; without a state it starts at 0.
    """
    count, groups = x_RTHP.shape[1], b_RTGN.shape[2]
    size = min(chunk, count)

    def folded(rows: Tensor) -> Tensor:
        """[R, T, H or G, .] -> [R, chunks, G, heads of a group, size, .]; padding has dt = 0: it does nothing."""
        rows = F.pad(rows, (0, 0, 0, 0, 0, -count % size))
        return rows.unflatten(2, (groups, -1)).unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2, 5)

    x, b, c = folded(x_RTHP * dt_RTH[..., None]), folded(b_RTGN), folded(c_RTGN)
    decay = folded((dt_RTH * a_H)[..., None])[..., 0].cumsum(-1)  # log, from the start of the chunk: [R, n, G, h, size]
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, -math.inf).exp()
    y = ((c @ b.mT) * between) @ x
    ends = (x * (decay[..., -1:] - decay).exp()[..., None]).mT @ b  # what each chunk adds by its end
    state = ends.new_zeros(ends[:, 0].shape) if state_RHPN is None else state_RHPN.unflatten(1, (groups, -1))
    starts = []
    for i in range(ends.shape[1]):
        starts.append(state)
        state = state * decay[:, i, ..., -1, None, None].exp() + ends[:, i]
    y = y + (c @ torch.stack(starts, 1).mT) * decay[..., None].exp()
    return y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :count], state.flatten(1, 2)


class Mamba2(nn.Module):
    """out(norm(y silu(z)) w) with y from the scan over rows that a short causal convolution has blurred.

    Parameters are named as in the public module. The gate comes before the norm.
    """

    def __init__(self, width: int, config: Mamba2Config) -> None:
        super().__init__()
        inner = config.expand * width
        if inner % config.headdim or inner // config.headdim % config.ngroups:
            raise ValueError(f"{config.expand} x width {width} is no multiple of {config.ngroups} x {config.headdim}")
        self.config, self.inner, self.heads = config, inner, inner // config.headdim
        blurred = inner + 2 * config.ngroups * config.d_state  # x, b, c
        self.in_proj = nn.Linear(width, inner + blurred + self.heads, bias=False)
        self.conv1d = nn.Conv1d(blurred, blurred, config.d_conv, groups=blurred)
        step = torch.exp(torch.rand(self.heads) * math.log(100.0) + math.log(1e-3)).clamp_min(1e-4)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus gives 0.001..0.1
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(inner, config.norm_eps)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, u_RTD: Tensor, memory: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Mixed rows [R, T, D], and the memory to go on from: the state [R, H, P, N] and the last rows that the
        convolution has seen [R, C, d_conv - 1]. Without a memory the sequence starts here."""
        config, groups = self.config, self.config.ngroups
        z, xbc, dt = self.in_proj(u_RTD).split((self.inner, self.conv1d.in_channels, self.heads), -1)
        state, past = memory or (None, xbc.new_zeros(len(xbc), xbc.shape[2], config.d_conv - 1))
        blurred = torch.cat((past.to(xbc.dtype), xbc.mT), -1)
        recent = blurred[..., blurred.shape[-1] - (config.d_conv - 1) :]
        with unrounded(u_RTD):
            wide = torch.promote_types(u_RTD.dtype, torch.float32)
            weight, bias = self.conv1d.weight.to(wide), None if self.conv1d.bias is None else self.conv1d.bias.to(wide)
            xbc = F.silu(F.conv1d(blurred.to(wide), weight, bias, groups=self.conv1d.groups)).mT
            x, b, c = xbc.split((self.inner, groups * config.d_state, groups * config.d_state), -1)
            x = x.unflatten(-1, (self.heads, -1))
            b, c = (rows.unflatten(-1, (groups, -1)) for rows in (b, c))
            dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
            y, state = scan(x, dt, -self.A_log.to(wide).exp(), b, c, state)
            y = (y + self.D.to(wide)[:, None] * x).flatten(2) * F.silu(z.to(wide))
            y = F.rms_norm(y.unflatten(-1, (groups, -1)), (self.inner // groups,), eps=config.norm_eps).flatten(2)
            y = (y * self.norm.weight.to(wide)).to(u_RTD.dtype)
        return self.out_proj(y), [state, recent]
