"""Distributions state what they draw, draw what is pinned as pinned, and the rest in its presence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arvis.denoise import euler
from arvis.dist import Categorical, Chain, Guess, Solved
from arvis.noise import Noise
from arvis.tokens import Pin
from chance import chi_square

ITEMS = 8000
WHERE = torch.tensor([[0, 1]])


def categorical(items: int = ITEMS) -> Categorical:
    logits = Noise.of(1).normal("logits", 0, (2, 2, 3))
    logits[0, 0, 1, 2] = float("-inf")  # ragged alphabets
    return Categorical(WHERE, logits.expand(items, -1, -1, -1), at=4)


def chain(items: int = ITEMS) -> Chain:
    weight = Noise.of(2).normal("weight", 0, (3, 3, 5))[0]

    def next_logits(z: Tensor, drawn: Tensor) -> Tensor:
        shift = F.one_hot(drawn, 3).double().sum(2) @ weight[0][:, :3] if drawn.shape[-1] else 0.0
        return z @ weight[drawn.shape[-1]].T + shift

    return Chain(WHERE, Noise.of(3).normal("z", 0, (2, 5)).expand(items, -1, -1), next_logits, depth=3, at=4)


def index(x: Tensor) -> Tensor:
    return (x * 3 ** torch.arange(x.shape[-1])).sum(-1)


@pytest.mark.parametrize(("make", "depth"), [(categorical, 2), (chain, 3)], ids=["categorical", "chain"])
def test_the_mass_is_one_and_samples_follow_it(make, depth: int) -> None:
    codes = torch.cartesian_prod(*[torch.arange(3)] * depth)
    d = make(len(codes))
    p = d.log_prob(codes[:, None].expand(-1, 2, -1)).exp()  # [codes, positions]
    assert torch.allclose(p.sum(0), torch.ones(2).double())
    x = make().sample(Noise.of(5, ITEMS))
    assert x.dtype == torch.int64 and x.shape == (ITEMS, 2, depth)
    for n in range(2):
        order = index(codes).argsort()
        assert chi_square(torch.bincount(index(x[:, n]), minlength=len(codes)), p[order, n]) > 0.001
    first = torch.stack([p[codes[:, 0] == code].sum(0) for code in range(3)])  # of the first sub-token
    both = torch.bincount(3 * x[:, 0, 0] + x[:, 1, 0], minlength=9)
    assert chi_square(both, (first[:, None, 0] * first[None, :, 1]).flatten()) > 0.001  # positions are independent
    again = make().sample(Noise.of(5, ITEMS))
    assert torch.equal(again, x)


def test_a_chain_draws_the_rest_given_what_is_pinned() -> None:
    value = torch.tensor([[[2, 0, 1], [0, 0, 0]]]).expand(ITEMS, -1, -1)
    pin = Pin(torch.tensor([[True, False]]).expand(ITEMS, -1), value)
    x = chain().sample(Noise.of(5, ITEMS), pin)
    assert torch.equal(x[:, 0], value[:, 0])
    assert torch.equal(x[:, 1], chain().sample(Noise.of(5, ITEMS))[:, 1])  # positions are independent
    assert torch.equal(categorical().sample(Noise.of(5, ITEMS), Pin(pin.mask, value[..., :2]))[:, 0], value[:, 0, :2])


def test_a_chain_of_one_is_a_categorical() -> None:
    logits = Noise.of(1).normal("logits", 0, (2, 3)).expand(6, -1, -1)
    a = Chain(WHERE, torch.zeros(6, 2, 1), lambda z, drawn: logits, depth=1, at=2)
    b = Categorical(WHERE, logits[:, :, None], at=2)
    noise = Noise.of(8, 6)
    assert torch.equal(a.sample(noise), b.sample(noise))
    assert torch.allclose(a.log_prob(a.sample(noise)), b.log_prob(b.sample(noise)))


def test_the_step_keys_the_noise() -> None:
    logits, noise = torch.zeros(4, 2, 1, 50), Noise.of(8, 4)

    def at(step: int | Tensor) -> Tensor:
        return Categorical(WHERE, logits, at=step).sample(noise)

    assert not torch.equal(at(0), at(1))
    assert torch.equal(at(torch.tensor([0, 1, 0, 1]))[[0, 2]], at(0)[[0, 2]])
    assert torch.equal(at(torch.tensor([0, 1, 0, 1]))[[1, 3]], at(1)[[1, 3]])


def test_low_precision_logits_are_summed_in_float32() -> None:
    logits = (3 * Noise.of(1).normal("logits", 0, (1, 1, 4096))).bfloat16()
    d = Categorical(torch.zeros(1, 1), logits)
    assert d.probs.dtype == torch.float32 and float(d.probs.sum()) == pytest.approx(1, abs=1e-5)
    assert d.log_prob(torch.zeros(1, 1, 1, dtype=torch.int64)).dtype == torch.float32


def test_a_solved_distribution_has_no_likelihood() -> None:
    d = Solved(WHERE, lambda x, t: -x, euler((0, 1)), (2, 3))
    assert d.sample(Noise.of(1, 4)).shape == (4, 2, 3)
    with pytest.raises(NotImplementedError, match="no likelihood"):
        d.log_prob(torch.zeros(4, 2, 3))


def test_guesses_are_drawn_as_codes_and_have_no_joint() -> None:
    codes = categorical(50)
    guess = Guess(codes.where, codes.logits, at=4)
    pin = Pin(torch.tensor([[True, False]]).expand(50, -1), torch.full((50, 2, 2), 2))
    x = guess.sample(Noise.of(7, 50), pin)
    assert torch.equal(x, codes.sample(Noise.of(7, 50), pin)) and bool((x[:, 0] == 2).all())
    assert torch.equal(guess.marginal(x), codes.log_prob(x))
    with pytest.raises(NotImplementedError, match="no likelihood"):
        guess.log_prob(x)
