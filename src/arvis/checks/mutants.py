"""How systems are broken on purpose: the mutants that several checks have in common.

Each function breaks a system in place. `of_system` makes a mutant of it for a check whose trained thing has a `system`.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor, nn

from arvis.nn.adaln import Look, SelfAttention
from arvis.nn.attention import attend
from arvis.rows import Rows, same

Mutant = Callable[[Any], None]


def of_system(break_: Callable[..., None], *where: str) -> Mutant:
    """`break_`, with what it is told of `where`, on the system of what was trained."""
    return lambda trained: break_(trained.system, *where)


def zero_head(system: Any, head: str = "transformer.head.linear") -> None:
    """Every outcome is as likely as any other."""
    for parameter in system.get_submodule(head).parameters():
        parameter.data.zero_()


def ignore_class(system: Any, conditioner: str = "transformer.conditioner") -> None:
    """Every class has the row of "no class"."""
    rows = system.get_submodule(conditioner).embedding.weight.data
    rows.copy_(rows[-1].clone())


def ignore_text(system: Any) -> None:
    """Every prompt is "no prompt"."""
    conditioner = system.transformer.conditioner
    forward = conditioner.forward
    conditioner.forward = lambda cond, null_B: forward(None, null_B)


def ignore_order(system: Any) -> None:
    """In one pass every row sees the later ones."""
    system.see = _everything


def _everything(q: Rows, k: Rows) -> Tensor:
    return (k.step <= q.step) | (k.step > q.step)


def look(module: nn.Module, way: Look) -> None:
    """Let all attention of a module look in some way."""
    for part in module.modules():
        if isinstance(part, SelfAttention):
            part.look = way


def ignore_rule(module: nn.Module) -> None:
    """Every row of a call sees every other."""
    look(module, lambda q, k, v, call, scale: attend(q, k, v, None, scale))


def forget_scales(system: Any) -> None:
    """While sampling, a scale sees itself alone."""
    transformer = system.transformer
    forward = transformer.forward
    names = signature(forward)

    def forgetful(*given: Any, **named: Any) -> Any:
        call = names.bind(*given, **named)
        if call.arguments.get("cache") is not None:
            call.arguments["see"] = same
        return forward(*call.args, **call.kwargs)

    transformer.forward = forgetful


def add_nothing(system: Any) -> None:
    """Each scale replaces the sum instead of adding to it."""
    tokenizer = system.tokenizer
    tokenizer.accumulate_soft = lambda f, h_BnC, k, layout: tokenizer.quantize.spread(h_BnC, k, layout)


def swap_guidance(system: Any) -> None:
    """Guidance leads away from the condition."""
    start = system.start

    def swapped(cond: Any, sampling: Any, noise: Any, layout: Any = None, given: Any = None) -> Any:
        s = start(cond, sampling, noise, layout, given)
        s.weights = s.weights.flip(-1)
        return s

    system.start = swapped
