"""The masked encoder reads visible tokens alone, the decoder puts rows where they belong, and gathering is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from arvis.nn.attention import attend
from arvis.nn.mae import MaskedDecoder, MaskedEncoder
from arvis.nn.trunk import Call
from arvis.nn.vit import ViTBlock
from arvis.noise import Noise

B, N, P, S, D, E = 3, 7, 2, 4, 12, 8


def pair(depth: int = 2) -> tuple[MaskedEncoder, MaskedDecoder]:
    torch.manual_seed(0)
    sizes = {"buffer": P, "tokens": N}
    encoder = MaskedEncoder([ViTBlock(D, 3) for _ in range(depth)], channels=S, width=D, **sizes)
    decoder = MaskedDecoder([ViTBlock(E, 2) for _ in range(depth)], inner=D, width=E, **sizes)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        nn.init.normal_(parameter, std=0.5)
    return encoder.double().eval(), decoder.double().eval()


def drawn(name: str, *shape: int) -> Tensor:
    return Noise.of(1, B).normal(name, 0, shape)


def visible(count: int) -> Tensor:
    return Noise.of(2, B).uniform("order", 0, (N,)).argsort(1)[:, :count].sort(1).values


def gathered(x: Tensor, where: Tensor) -> Tensor:
    return torch.stack([row[w] for row, w in zip(x, where, strict=True)])


EVERYTHING = torch.arange(N).expand(B, -1)


@pytest.mark.parametrize("count", [0, 3, N])
@torch.no_grad()
def test_gathering_equals_masking(count: int) -> None:
    """All rows at once, hidden ones masked out of the encoder: another way to the same numbers."""
    encoder, decoder = pair()
    x, buffer, where = drawn("x", N, S), drawn("buffer", P, D), visible(count)
    h = encoder(gathered(x, where), where, buffer)
    z = decoder(h, where, EVERYTHING)

    seen = torch.zeros(B, N, dtype=torch.bool).scatter(1, where, True)
    rows = torch.cat((buffer, encoder.embed(x)), 1) + encoder.position
    mask = torch.cat((torch.ones(B, P, dtype=torch.bool), seen), 1)[:, None, None]
    rows = encoder.norm(encoder.trunk(encoder.embed_norm(rows), Call(mask=mask)))
    torch.testing.assert_close(h, torch.cat((rows[:, :P], gathered(rows[:, P:], where)), 1), atol=1e-12, rtol=0)
    inner = decoder.embed(rows)
    inner = torch.cat((inner[:, :P], torch.where(seen[..., None], inner[:, P:], decoder.mask)), 1)
    wanted = decoder.norm(decoder.trunk(inner + decoder.position, Call()))[:, P:] + decoder.head_position
    torch.testing.assert_close(z, wanted, atol=1e-12, rtol=0)


@torch.no_grad()
def test_any_rows_can_be_asked_for_in_any_order() -> None:
    encoder, decoder = pair()
    x, where = drawn("x", N, S), visible(3)
    h = encoder(gathered(x, where), where, drawn("buffer", P, D))
    whole = decoder(h, where, EVERYTHING)
    some = Noise.of(3, B).uniform("some", 0, (N,)).argsort(1)[:, :4]
    assert torch.equal(decoder(h, where, some), gathered(whole, some))


@torch.no_grad()
def test_the_decoder_puts_rows_and_mask_tokens_where_they_belong() -> None:
    """Without blocks a row comes out as it went in, normalised, at its own position."""
    _, decoder = pair(depth=0)
    where = visible(3)
    h = drawn("h", P + 3, D)
    z = decoder(h, where, EVERYTHING)
    for b in range(B):
        for n in range(N):
            at = where[b].tolist().index(n) if n in where[b] else None
            row = decoder.mask[0, 0] if at is None else decoder.embed(h[b, P + at])
            row = decoder.norm(row + decoder.position[0, P + n]) + decoder.head_position[0, n]
            torch.testing.assert_close(z[b, n], row, atol=1e-12, rtol=0)


@torch.no_grad()
def test_guidance_rows_share_the_tokens_and_have_their_own_condition() -> None:
    encoder, decoder = pair()
    x, where = drawn("x", N, S), visible(4)
    rows = [drawn(name, P, D) for name in ("condition", "none")]
    both = torch.stack(rows, 1).flatten(0, 1)  # [B*G, P, D]
    h = encoder(gathered(x, where), where, both)
    z = decoder(h, where, EVERYTHING).unflatten(0, (B, 2))
    for g, buffer in enumerate(rows):
        alone = decoder(encoder(gathered(x, where), where, buffer), where, EVERYTHING)
        torch.testing.assert_close(z[:, g], alone, atol=1e-12, rtol=0)
    assert (z[:, 0] - z[:, 1]).abs().amin() > 1e-6


@torch.no_grad()
def test_buffer_rows_are_a_sequence() -> None:
    encoder, _ = pair()
    x, where, buffer = drawn("x", N, S), visible(2), drawn("buffer", P, D)
    there, back = (encoder(gathered(x, where), where, b)[:, P:] for b in (buffer, buffer.flip(1)))
    assert (there - back).abs().amin() > 1e-6
    with pytest.raises(ValueError, match="fills 2 buffer rows, got 3"):
        encoder(gathered(x, where), where, drawn("buffer", P + 1, D))


def test_dropout_is_for_training_alone() -> None:
    torch.manual_seed(0)
    block, x = ViTBlock(D, 3, attn_dropout=0.5, dropout=0.5), torch.randn(2, 5, D)
    plain = ViTBlock(D, 3)
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x, Call(), 0), plain(x, Call(), 0))
    block.train()
    assert not torch.equal(block(x, Call(), 0), block(x, Call(), 0))


@pytest.mark.parametrize("gradients", [True, False])
def test_dropped_attention_keeps_its_mean(gradients: bool) -> None:
    """Both ways of computing attention drop the weights, not the output: of equal values 1 a half arrives as 2 or 0."""
    torch.manual_seed(0)
    q = torch.zeros(64, 2, 8, 4, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        out = attend(q, q, torch.ones_like(q), None, 1.0, dropout=0.5).detach()
    counts = out[..., 0] * 8 / 2
    assert torch.allclose(counts, counts.round(), atol=1e-4) and counts.unique().numel() > 5
    assert abs(float(out.mean()) - 1) < 5 / math.sqrt(out[..., 0].numel() * 8)
    assert torch.equal(out[..., :1].expand_as(out), out)
