"""Guidance and filters: functions from tensors to tensors, composed by each system in its official order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mix(h_BG: Tensor, w_BG: Tensor) -> Tensor:
    """Guidance: the weighted sum over G rows (weights sum to 1) of logits, velocities or features [B, G, ...].

    Weights [B, G], or [B, G, n] where positions are at different steps."""
    if h_BG.shape[1] == 1:
        return h_BG[:, 0]
    weight = w_BG.to(h_BG.device, h_BG.dtype).view(*w_BG.shape, *(1,) * (h_BG.dim() - w_BG.dim()))
    first, *others = zip(h_BG.unbind(1), weight.unbind(1), strict=True)
    total = first[0] * first[1]
    for h_B, w_B in others:
        total += h_B * w_B
    return total


def cfg(scale: float) -> tuple[float, float]:
    """Weights of (condition, null) for u + s (c - u)."""
    return scale, 1 - scale


def var_cfg(t: float) -> tuple[float, float]:
    """Weights of (condition, null) for VAR's (1 + t) c - t u."""
    return 1 + t, -t


def two_way(text: float, image: float) -> tuple[float, float, float]:
    """Weights of (both, image only, neither) for two nested conditions."""
    return text, image - text, 1 - image


def per_item(value: float | Sequence[float] | Tensor, items: int) -> Tensor:
    """One setting for all items, or one per item, as float64 [B] on the host."""
    out = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if out.dim() > 1 or (out.dim() == 1 and len(out) != items):
        raise ValueError(f"a setting is one number or one per item ({items}), got shape {tuple(out.shape)}")
    return out.expand(items).clone()


def _column(setting: float | Tensor, logits: Tensor) -> Tensor:
    """A setting that broadcasts over [B, n, S, V]."""
    value = torch.as_tensor(setting, dtype=logits.dtype).to(logits.device)
    return value.view(-1, *(1,) * (logits.dim() - 1))


def temper(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """logits / temperature; a temperature of 0 leaves only the most likely code."""
    if bool((torch.as_tensor(temperature) == 1).all()):
        return logits
    t = _column(temperature, logits)
    best = logits.argmax(-1, keepdim=True)
    greedy = torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    return torch.where(t == 0, greedy, logits / t.clamp_min(torch.finfo(logits.dtype).tiny))


def top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """Drop (-inf) logits below the k-th largest; ties stay. k <= 0 keeps all; k may differ per item [B]."""
    k_B = torch.as_tensor(k).reshape(-1).long()
    k_B = torch.where(k_B > 0, k_B, logits.shape[-1]).clamp(max=logits.shape[-1])
    if int(k_B.min()) == logits.shape[-1]:
        return logits
    return _item_by_item(_top_k, logits, k_B)


def _top_k(logits: Tensor, k_B: Tensor) -> Tensor:
    best = logits.topk(int(k_B.max()), -1).values
    index = (k_B - 1).to(logits.device).view(-1, *(1,) * (logits.dim() - 1)).expand(*logits.shape[:-1], 1)
    return logits.masked_fill(logits < best.gather(-1, index), float("-inf"))


def top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep the smallest set of codes whose probability exceeds p: sorted ascending, codes are dropped while their
    cumulative probability is <= 1 - p; the most likely code always stays. p <= 0 or >= 1 keeps all."""
    p_B = _mass(logits, p)
    return logits if bool(p_B.isinf().all()) else _item_by_item(_top_p, logits, p_B)


def _top_p(logits: Tensor, p_B: Tensor) -> Tensor:
    value, index = logits.sort(-1)
    drop = value.softmax(-1).cumsum(-1) <= 1 - _column(p_B, logits)
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, index, drop), float("-inf"))


def nucleus(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep the most likely codes up to the one with which their probability exceeds p: sorted descending, a code is
    dropped if those before it hold more than p (arXiv 1904.09751). p <= 0 or >= 1 keeps all.

    Where a sum is exactly p this keeps one code more than `top_p`."""
    p_B = _mass(logits, p)
    return logits if bool(p_B.isinf().all()) else _item_by_item(_nucleus, logits, p_B)


def _nucleus(logits: Tensor, p_B: Tensor) -> Tensor:
    value, index = logits.sort(dim=-1, descending=True, stable=True)
    drop = value.softmax(-1).cumsum(-1).roll(1, -1) > _column(p_B, logits)
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, index, drop), float("-inf"))


def _mass(logits: Tensor, p: float | Tensor) -> Tensor:
    """Probabilities [B] or [1] to keep; infinite where all codes are kept."""
    p_B = torch.as_tensor(p, dtype=logits.dtype).reshape(-1)
    return torch.where((p_B > 0) & (p_B < 1), p_B, torch.inf)


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF draw: probs [..., V] (any positive total), u [...] uniform in (0, 1) -> int64 [...].

    One uniform per draw instead of V; a code of probability 0 is never drawn. Sums run in float64. Of NaN the last code
    is drawn, so that the pictures of a diverged model are bad pictures and no error."""
    return _item_by_item(_draw, probs, u)


def _draw(probs: Tensor, u: Tensor) -> Tensor:
    cdf = probs.double().cumsum(-1)
    total = cdf[..., -1:]
    x = torch.minimum(u[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, x, right=True)[..., 0].clamp_max(probs.shape[-1] - 1)


MANY = 2**20
"""Numbers that a CPU takes at once: beyond them, what lies between leaves its cache."""


def _item_by_item(rule: Callable[[Tensor, Tensor], Tensor], rows: Tensor, setting: Tensor) -> Tensor:
    """rule(rows [B, ...], setting), which does the same to every item, on a CPU to a few items at a time; the setting
    is one [1] or one per item [B, ...]."""
    if rows.device.type != "cpu" or rows.numel() <= MANY or len(rows) == 1:
        return rule(rows, setting)
    each = setting if len(setting) == len(rows) else setting.expand(len(rows))
    few = max(1, MANY // rows[0].numel())
    return torch.cat([rule(*some) for some in zip(rows.split(few), each.split(few), strict=True)])


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log u) of uniform numbers in (0, 1)."""
    return -(-u.log()).log()


def confidence(log_p_Bn: Tensor, temperature: float | Tensor, u_Bn: Tensor) -> Tensor:
    """How sure a guess is: log p + temperature g with Gumbel noise g of the uniform numbers u, float64 [B, n].

    At a high temperature the order is random, at 0 the likeliest guesses come first (MaskGIT, arXiv 2202.04200)."""
    t = torch.as_tensor(temperature, dtype=torch.float64).to(log_p_Bn.device).view(-1, 1)
    return log_p_Bn.double() + t * gumbel(u_Bn.to(log_p_Bn.device).double())


def lowest(score_Bn: Tensor, m: int | Tensor) -> Tensor:
    """bool [B, n], True at the m (one for all, or one per item) lowest scores of each item; ties: the earlier one."""
    rank = score_Bn.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < (m.to(rank.device)[:, None] if isinstance(m, Tensor) else m)
