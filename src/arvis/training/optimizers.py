"""The optimisers of a run: AdamW and Muon over the main parameters, and one more for each `Part` with its own loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arvis.training import distributed, schedule


@dataclass(frozen=True, kw_only=True)
class Part:
    """A second optimiser, as for a discriminator: parameters whose names start with one of `names` minimise `loss`.

    `losses[loss]` must reach only these parameters, and the other losses none of them (detach the input of the one,
    freeze the parameters in the other, see `adversarial.frozen`): then one backward pass over the sum serves all.
    """

    names: tuple[str, ...]
    loss: str
    lr: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 0.0
    clip: float = 0.0


class Optimizer:
    """AdamW over named parameters that follow one loss, with its schedule factors, clipping and savable state.

    Matrices whose names hold a fragment of `muon` are updated by Muon instead (orthogonalised momentum, Jordan et al.
    2024), scaled so that the learning rate means the same for both (arXiv 2502.16982).
    """

    def __init__(
        self, part: Part, named: Mapping[str, nn.Parameter], no_decay: tuple[str, ...], muon: tuple[str, ...] = ()
    ) -> None:
        if not named:
            where = f" with a name starting with one of {part.names}" if part.names else ""
            raise ValueError(f"the loss {part.loss!r} has no trainable parameter{where}")
        self.part = part
        self.named = dict(named)
        self._fused = all(type(p.data) is Tensor and p.device.type in ("cpu", "cuda") for p in named.values())
        matrices = {n: p for n, p in named.items() if p.ndim == 2 and any(fragment in n for fragment in muon)}
        if any(type(p.data) is not Tensor for p in matrices.values()):
            raise ValueError("muon needs whole matrices: it does not go with shard=true")
        rest = [(n, p) for n, p in named.items() if n not in matrices]
        self._inner: list[torch.optim.Optimizer] = []
        if rest:
            groups = schedule.groups(rest, no_decay)
            self._inner.append(torch.optim.AdamW(groups, lr=part.lr, betas=part.betas, fused=self._fused or None))
        if matrices:
            groups = schedule.groups(matrices.items(), no_decay)
            self._inner.append(torch.optim.Muon(groups, lr=part.lr, adjust_lr_fn="match_rms_adamw"))
        self._owner = {p: o for o in self._inner for group in o.param_groups for p in group["params"]}

    def clip(self) -> Tensor:
        """Scale the gradients down to the norm `part.clip` (0: leave them) and return the norm they had."""
        norm = torch.nn.utils.clip_grad_norm_(list(self.named.values()), self.part.clip or float("inf"))
        return distributed.whole(norm)

    def step(self, lr_factor: float, weight_decay: float) -> None:
        """One update with `lr * lr_factor` and the given weight decay; gradients are freed."""
        for optimizer in self._inner:
            for group in optimizer.param_groups:
                group["lr"] = self.part.lr * lr_factor
                group["weight_decay"] = weight_decay if group["decay"] else 0.0
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The state as flat tensors, `<loss>/<parameter>/<exp_avg|exp_avg_sq|step|momentum_buffer>`."""
        flat = {}
        for name, parameter in self.named.items():
            for key, value in self._owner[parameter].state.get(parameter, {}).items():
                flat[f"{self.part.loss}/{name}/{key}"] = value
        return flat

    def blank(self) -> dict[str, Tensor]:
        """Empty tensors of the form that `state` has after the first update."""
        flat = {}
        for name, parameter in self.named.items():
            if isinstance(self._owner[parameter], torch.optim.Muon):
                flat[f"{self.part.loss}/{name}/momentum_buffer"] = torch.zeros_like(parameter)
                continue
            flat[f"{self.part.loss}/{name}/step"] = torch.zeros(())
            for key in ("exp_avg", "exp_avg_sq"):
                flat[f"{self.part.loss}/{name}/{key}"] = torch.zeros_like(parameter)
        return flat

    def restore(self, flat: Mapping[str, Tensor]) -> None:
        """Take over the state written by `state`; parameters it does not name start afresh."""
        for name, parameter in self.named.items():
            prefix = f"{self.part.loss}/{name}/"
            found = {key[len(prefix) :]: value for key, value in flat.items() if key.startswith(prefix)}
            if found:
                self._owner[parameter].state[parameter] = {
                    key: self._like(value, parameter) for key, value in found.items()
                }

    def _like(self, value: Tensor, parameter: Tensor) -> Tensor:
        """A loaded value where AdamW keeps it: the step counter stays on the CPU unless the update is fused."""
        return value.clone() if value.dim() == 0 and not self._fused else value.clone().to(parameter.device)


def build(
    module: nn.Module, main: Part, parts: tuple[Part, ...], no_decay: tuple[str, ...], muon: tuple[str, ...] = ()
) -> list[Optimizer]:
    """One optimiser for `main`, which takes every trainable parameter that no part claims, and one for each part."""
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    owner = {name: next((part for part in parts if name.startswith(part.names)), main) for name in trainable}
    return [
        Optimizer(
            part, {n: p for n, p in trainable.items() if owner[n] is part}, no_decay, muon if part is main else ()
        )
        for part in (main, *parts)
    ]
