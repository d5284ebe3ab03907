"""The vectors of AdaLN made once per picture: the same numbers as made at every step, and indeed made once."""

from collections import Counter

import pytest
import torch

from arvis.noise import Noise
from arvis.rows import upto
from arvis.walk import finish, generate
from small import built, request

OWN = ("var", "flexvar", "sar", "infinity", "m-var", "nfig", "brush", "variant")
"""Systems whose transformer over scales modulates its blocks by the condition."""


@pytest.mark.parametrize("slug", OWN)
@torch.no_grad()
def test_rows_under_vectors_made_ahead_are_the_same_bits(slug):
    system = built(slug)[0].eval()
    t, layout = system.transformer, system.tokenizer.layout()
    c = t.conditioner(system.prepare(request(slug)), torch.zeros(1, dtype=torch.bool))
    tokens = (Noise.of(3).uniform("tokens", 0, (layout.n, system.space.S)) * 2).long()
    x = system.tokenizer.inputs(tokens, layout)
    told = (layout, 0, layout.K) if slug in ("flexvar", "sar", "infinity") else (0, layout.K)
    wanted, c = t(c, x, *told, upto), t.once(c)
    assert c.ahead.shape[:2] == (1, len(t.trunk)) and c.ahead.dtype == torch.float32
    assert torch.equal(t(c, x, *told, upto), wanted)
    assert not torch.allclose(t(c._replace(ahead=c.ahead + 0.1), x, *told, upto), wanted, atol=1e-3), "they are read"


@pytest.mark.parametrize("slug", OWN)
@torch.no_grad()
def test_a_picture_makes_them_once_for_each_guidance_row(slug):
    system, calls = built(slug)[0].eval(), Counter()
    blocks = system.transformer.trunk.blocks
    hooks = [b.modulation.register_forward_hook(lambda *_, i=i: calls.update([i])) for i, b in enumerate(blocks)]
    s = finish(generate(system, system.prepare(request(slug)), system.Sampling(), Noise.of(0)))
    for hook in hooks:
        hook.remove()
    assert s.K > 2 and calls == {i: s.weights.shape[-1] for i in range(len(blocks))} and calls[0] == 2
