"""The cache: what is attended over slots equals attention over the same rows in one piece."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arvis.nn import attention
from arvis.nn.attention import Mask, attend, grid_angles, rotate
from arvis.nn.cache import Cache
from arvis.nn.trunk import Call, Trunk
from arvis.noise import Noise
from arvis.rows import CLEAN, NOISY, Rows, clean_noisy, render, tree, tree_tags, upto
from arvis.tokens import NEVER

ITEMS, HEADS, SIZE = 2, 2, 4


def qkv(rows: int, what: str, guidance: int = 1) -> tuple[Tensor, ...]:
    x = Noise.of(1, ITEMS).normal(what, 0, (guidance, 3, HEADS, rows, SIZE))
    return tuple(x.flatten(0, 1).unbind(1))


def spread(mask: Tensor | None, guidance: int) -> Tensor | None:
    return mask if mask is None or len(mask) == 1 else mask.repeat_interleave(guidance, 0)


def step(cache: Cache, rows: Rows, x: tuple[Tensor, ...], see=upto, keep: bool = True, at: Tensor | None = None):
    """One attention over the cache."""
    mask = cache.place(see, rows, keep=keep, at=at)
    k, v = cache.join(0, x[1], x[2])
    return attend(x[0], k, v, spread(mask, len(x[0]) // ITEMS), 0.5)


def whole(rows: Rows, x: tuple[Tensor, ...], see=upto) -> Tensor:
    return attend(*x, render(see, rows, rows), 0.5)


def parts(x: tuple[Tensor, ...], *sizes: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(y.split(sizes, 2) for y in x), strict=True))


@pytest.mark.parametrize("guidance", [1, 3])
def test_cached_rows_equal_rows_at_once(guidance: int) -> None:
    steps = torch.tensor([0, 1, 1, 2, 2, 2])
    x = qkv(6, "x", guidance)
    cache = Cache(ITEMS, 6)
    a, b, c = parts(x, 1, 2, 3)
    out = [step(cache, Rows.of(steps[i:j]), y) for i, j, y in ((0, 1, a), (1, 3, b), (3, 6, c))]
    assert torch.allclose(torch.cat(out, 2), whole(Rows.of(steps), x), atol=1e-12)
    assert cache.end == 6 and cache.filled.tolist() == [6, 6]
    assert cache.k[0].shape == (ITEMS, guidance, HEADS, 6, SIZE)


def test_views_not_copies() -> None:
    cache = Cache(ITEMS, 8)
    x = qkv(3, "x")
    cache.place(upto, Rows.of(torch.zeros(3)))
    k, _ = cache.join(0, x[1], x[2])
    assert k.data_ptr() == cache.k[0].data_ptr() and k.shape == (ITEMS, HEADS, 3, SIZE)


@pytest.mark.parametrize("slots", [3, 9])
def test_transient_rows_leave_no_trace_and_need_no_slots(slots: int) -> None:
    """With slots to spare they lie where the next rows will, else they are joined by a copy: the numbers are equal."""
    steps, x = torch.tensor([0, 0, 1]), qkv(3, "x")
    cache = Cache(ITEMS, slots)
    step(cache, Rows.of(steps), x)
    for what in ("a", "b"):
        y = qkv(2, what)
        out = step(cache, Rows.of(torch.tensor([2, 2])), y, keep=False)
        joined = tuple(torch.cat(z, 2) for z in zip(x, y, strict=True))
        assert torch.allclose(out, whole(Rows.of(torch.tensor([0, 0, 1, 2, 2])), joined)[:, :, 3:], atol=1e-12)
        assert cache.end == 3 and int((cache.step < NEVER).sum()) == 3 * ITEMS
    if slots == 3:
        with pytest.raises(ValueError, match=r"has 3 slots, 3 in use: no room for rows up to 5"):
            step(cache, Rows.of(torch.tensor([2, 2])), qkv(2, "c"))


def test_transient_rows_of_several_guidance_rows_over_one_shared_past() -> None:
    """Rows that carry no condition are written once; every guidance row reads them."""
    clean, noisy = qkv(2, "clean"), qkv(2, "noisy", 2)
    cache = Cache(ITEMS, 6)
    rows = Rows.of(torch.tensor([1, 1]), NOISY)
    first = step(cache, rows, noisy, clean_noisy, keep=False)  # nothing is cached yet
    assert torch.allclose(first, attend(*noisy, None, 0.5)) and not cache.k
    step(cache, Rows.of(torch.tensor([1, 1]), CLEAN), clean, clean_noisy)
    out = step(cache, rows, noisy, clean_noisy, keep=False)
    assert cache.k[0].shape[1] == 1
    for g in range(2):
        mine = [torch.cat((a, b.view(ITEMS, 2, HEADS, 2, SIZE)[:, g]), 2) for a, b in zip(clean, noisy, strict=True)]
        alone = attend(mine[0][:, :, 2:], mine[1], mine[2], None, 0.5)
        assert torch.allclose(out.view(ITEMS, 2, HEADS, 2, SIZE)[:, g], alone, atol=1e-12)


def test_forgotten_rows_are_gone_and_their_slots_are_used_again() -> None:
    steps = torch.tensor([0, 1, 2, 3])
    x, y = qkv(4, "x"), qkv(1, "y")
    cache = Cache(ITEMS, 4)
    step(cache, Rows.of(steps), x)
    cache.forget(9)
    assert cache.end == 4
    cache.forget(2)
    assert cache.end == 2 and cache.filled.tolist() == [2, 2]
    out = step(cache, Rows.of(torch.tensor([2])), y)
    joined = tuple(torch.cat((a[:, :, :2], b), 2) for a, b in zip(x, y, strict=True))
    assert torch.allclose(out, whole(Rows.of(torch.tensor([0, 1, 2])), joined)[:, :, 2:], atol=1e-12)


def test_a_recurrent_state_cannot_be_rolled_back() -> None:
    cache = Cache(ITEMS, 4)
    cache.extra["scan"] = torch.zeros(ITEMS, 3)
    step(cache, Rows.of(torch.tensor([0, 1])), qkv(2, "x"))
    cache.forget(2)  # nothing to forget
    with pytest.raises(ValueError, match=r"recurrent state \(\['scan'\]\) cannot be rolled back"):
        cache.forget(1)
    with pytest.raises(ValueError, match="unequal recurrent state"):
        Cache.stack([cache, Cache(1, 4)])


def test_a_recurrent_state_that_is_remembered_can_repeat_the_last_step() -> None:
    cache = Cache(ITEMS, 4)
    for k in range(3):
        cache.place(upto, Rows.of(torch.tensor([k])))
        cache.remember(5, k + 1, [torch.full((ITEMS, 3), k + 1.0), torch.full((ITEMS,), -k - 1.0)])
    assert cache.recall(5, 0) == []
    assert [float(x[0].sum()) for x in cache.recall(5, 3)] == [9.0, -3.0]
    cache.forget(2)
    assert cache.end == 2
    assert [float(x[0].sum()) for x in cache.recall(5, 2)] == [6.0, -2.0]
    cache.place(upto, Rows.of(torch.tensor([2])), keep=False)
    cache.remember(5, 3, [torch.zeros(ITEMS, 3), torch.zeros(ITEMS)])
    assert float(cache.recall(5, 3)[0].sum()) == 9.0 * ITEMS, "rows that are not kept leave no state"
    two = Cache.stack([cache.take(torch.tensor([1])), cache.take(torch.tensor([0]))])
    for c in (cache, two):
        with pytest.raises(ValueError, match=r"recurrent state .* cannot be rolled back to step 1"):
            c.forget(1)
    cache.drop(5)
    assert not cache.extra


def test_a_layer_of_fewer_rows_takes_fewer_slots() -> None:
    cache, x = Cache(ITEMS, 6), parts(qkv(6, "x"), 1, 2, 3)
    cache.limits = {1: 3}
    for k, part in enumerate(x):
        cache.place(upto, Rows.of(torch.full((k + 1,), k)))
        for layer in (0, 1) if k < 2 else (0,):
            k_all, _ = cache.join(layer, *part[1:])
            assert torch.equal(k_all, torch.cat([p[1] for p in x[: k + 1]], 2))
    assert [cache.k[layer].shape[3] for layer in (0, 1)] == [6, 3]
    cache.reserve(8)
    assert [cache.take(torch.tensor([1])).v[layer].shape[3] for layer in (0, 1)] == [8, 3]
    cache.drop(1)
    assert sorted(cache.k) == sorted(cache.v) == [0]


def test_a_layer_cannot_join_late() -> None:
    cache = Cache(ITEMS, 4)
    step(cache, Rows.of(torch.tensor([0])), qkv(1, "x"))
    cache.place(upto, Rows.of(torch.tensor([1])))
    with pytest.raises(ValueError, match="layer 7 runs for the first time, but 1 rows were cached without it"):
        cache.join(7, *qkv(1, "y")[1:])


def test_items_at_different_lengths() -> None:
    """Slots per item, per-item roll-back and growth: each item equals itself alone."""
    x, y = qkv(4, "x"), qkv(2, "y")
    cache = Cache(ITEMS, 4)
    step(cache, Rows.of(torch.arange(4)), x, at=torch.arange(4).expand(ITEMS, -1))
    lengths = torch.tensor([1, 3])
    cache.forget(lengths)
    assert cache.filled.tolist() == [1, 3] and cache.end == 3
    at = lengths[:, None] + torch.arange(2)
    cache.reserve(5)
    assert cache.slots == 5
    out = step(cache, Rows.of(at), y, at=at)
    for i, n in enumerate(lengths.tolist()):
        joined = tuple(torch.cat((a[i : i + 1, :, :n], b[i : i + 1]), 2) for a, b in zip(x, y, strict=True))
        assert torch.allclose(out[i], whole(Rows.of(torch.arange(n + 2)), joined)[0, :, n:], atol=1e-12)
    again = torch.tensor([[0], [1]])  # rows may be placed below the end, too
    step(cache, Rows.of(again), qkv(1, "z"), at=again)
    assert cache.end == 5 and cache.filled.tolist() == [3, 5]
    with pytest.raises(ValueError, match="always kept"):
        cache.place(upto, Rows.of(at), keep=False, at=at)


def test_a_kept_path_of_a_tree_equals_a_sequence() -> None:
    """Items keep paths of different lengths; the next rows see the path and no sibling."""
    parent = torch.tensor([[-1, -1, 1, 1, 3], [-1, 0, -1, 0, 1]])
    path = torch.tensor([[1, 3, 4], [0, 3, -1]])
    past, nodes, last = qkv(2, "past"), qkv(5, "nodes"), qkv(1, "last")
    depth = torch.tensor([[1, 1, 2, 2, 3], [1, 2, 1, 2, 3]])
    cache = Cache(ITEMS, 8)
    step(cache, Rows.of(torch.arange(2)), past, tree)
    slots = 2 + torch.arange(5).expand(ITEMS, -1)
    step(cache, Rows.of(1 + depth, tree_tags(parent)), nodes, tree, at=slots)
    cache.keep(torch.tensor([2, 2]), path)
    assert cache.filled.tolist() == [5, 4] and cache.end == 5 and not bool(cache.tag.any())
    lengths = torch.tensor([5, 4])
    out = step(cache, Rows.of(lengths[:, None]), last, tree, at=lengths[:, None])
    for i, kept in enumerate(([1, 3, 4], [0, 3])):
        joined = tuple(
            torch.cat((a[i : i + 1], b[i : i + 1][:, :, kept], c[i : i + 1]), 2)
            for a, b, c in zip(past, nodes, last, strict=True)
        )
        n = 2 + len(kept)
        assert torch.allclose(out[i], whole(Rows.of(torch.arange(n + 1)), joined)[0, :, n:], atol=1e-12)


def test_gathered_and_stacked_caches() -> None:
    x, y = qkv(3, "x", 2), qkv(1, "y", 2)
    cache = Cache(ITEMS, 4)
    step(cache, Rows.of(torch.arange(3)), x)
    rows = torch.tensor([1, 1, 0])
    taken = cache.take(rows)
    assert torch.equal(taken.k[0], cache.k[0][rows]) and taken.filled.tolist() == [3, 3, 3]
    fresh = Cache(1, 2)  # another length, no layer yet
    both = Cache.stack([cache, fresh])
    assert both.slots == 4 and both.filled.tolist() == [3, 3, 0] and both.end == 3
    assert torch.equal(both.k[0][:2], cache.k[0]) and not bool(both.k[0][2].any())
    assert Cache.stack([Cache(1, 2), cache]).end == 3
    parted = Cache.stack([both.take(torch.tensor([i])) for i in range(2)])
    out = step(parted, Rows.of(torch.tensor([3])), y)
    assert torch.allclose(out, step(cache, Rows.of(torch.tensor([3])), y))


def test_attention_of_a_row_that_sees_nothing_is_zero() -> None:
    q, k, v = qkv(3, "x")
    mask = torch.tensor([[True, True, False], [False] * 3, [True] * 3])[None, None]
    out = attend(q, k, v, mask, 0.5)
    assert not bool(out[:, :, 1].any()) and bool(out.isfinite().all())
    score = (0.5 * q @ k.mT).masked_fill(~mask, float("-inf"))[:, :, [0, 2]]
    assert torch.allclose(out[:, :, [0, 2]], score.softmax(-1) @ v)
    grads = [torch.autograd.grad(attend(q, k, v.requires_grad_(), mask, 0.5).sum(), v)[0] for _ in range(1)]
    assert bool(grads[0].isfinite().all())


def test_attention_is_the_same_with_a_gradient() -> None:
    q, k, v = qkv(3, "x")
    mask = torch.tensor([[True, False, False], [False] * 3, [True] * 3])[None, None]
    for m in (mask, None):
        plain, traced = attend(q, k, v, m, 0.5), attend(q.clone().requires_grad_(), k, v, m, 0.5)
        assert torch.allclose(plain, traced, atol=1e-12)


@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
def test_rotations_keep_lengths_and_depend_on_differences(pairs: str) -> None:
    q, k, _ = qkv(4, "x")
    coords = torch.tensor([[0, 0], [1, 2], [3, 1], [2, 2]])
    table = grid_angles(coords, (2, 2)).double()
    moved = grid_angles(coords + torch.tensor([5, 7]), (2, 2)).double()
    a, b = rotate(q, table, pairs), rotate(k, table, pairs)
    assert torch.allclose(a.norm(dim=-1), q.norm(dim=-1))
    assert torch.allclose(a @ b.mT, rotate(q, moved, pairs) @ rotate(k, moved, pairs).mT, atol=1e-5)
    assert not torch.allclose(a @ b.mT, q @ k.mT)
    assert not bool(rotate(q, torch.zeros_like(table), pairs).any())  # a row of zeros switches a row off


def test_mask_and_table_of_an_item_serve_its_guidance_rows() -> None:
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x: Tensor, call: Call, layer: int) -> Tensor:
            seen.append((call, layer))
            return x

    trunk = Trunk(Spy() for _ in range(3))
    mask, table = torch.rand(ITEMS, 1, 2, 2) < 0.5, torch.rand(1, 2, 2, 2)
    mask[0, 0, 0], mask[..., 1, 0] = False, True
    trunk(torch.zeros(3 * ITEMS, 2, 4), Call(mask=mask, table=table), layers=[2, 0])
    assert [layer for _, layer in seen] == [2, 0] and len(trunk) == 3
    ready, spread = seen[0][0].mask, mask[[0, 0, 0, 1, 1, 1]]
    assert torch.equal(ready.shown & ~ready.blind, spread) and seen[0][0].table.shape == table.shape


def test_a_mask_knows_whether_it_is_causal_and_whether_rows_are_blind() -> None:
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    assert Mask.of(causal).causal and Mask.of(causal).blind is None
    for i in range(5):
        for j in range(i + 1):  # what is missing below the diagonal, even a whole row, is noticed
            holed = causal.clone()
            holed[..., i, j] = False
            assert not Mask.of(holed).causal and (Mask.of(holed).blind is None) == bool(holed.any(-1).all())
    levels = render(upto, Rows.of(torch.tensor([0, 1, 1, 2])), Rows.of(torch.tensor([0, 1, 1, 2])))
    assert not Mask.of(levels).causal and not Mask.of(causal.expand(2, -1, -1, -1)).causal
    assert not Mask.of(causal[..., :3]).causal and not Mask.of(causal[..., 2:, :]).causal  # rows of a cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_causal_attention_and_its_gradients_are_those_of_the_mask(dtype: torch.dtype) -> None:
    """The kernel that knows the mask against the one that reads it, in every branch; a mutant without it fails."""
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    weight, tolerance = torch.randn(2, 3, 40, 8, dtype=dtype), {torch.bfloat16: 5e-2}.get(dtype, 1e-5)
    found, wanted = attend(q, k, v, mask, 0.3), attend(q, k, v, Mask(mask, None, False), 0.3)
    assert torch.allclose(found, wanted, atol=tolerance) and not torch.allclose(
        found, attend(q, k, v, None, 0.3), atol=0.1
    )
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, wanted)), strict=True):
        assert torch.allclose(a, b, atol=tolerance)


def test_rotation_in_training_has_the_gradient_of_the_formula() -> None:
    """The complex product against the four real ones."""
    x, table = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(1, 5, 4, 2)
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), table[:, None].unbind(-1)
    wanted = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    found, weight = rotate(x, table, "interleaved"), torch.randn(2, 3, 5, 8)
    assert torch.allclose(found, wanted, atol=1e-6)
    grads = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, wanted))
    assert torch.allclose(*grads, atol=1e-6)


def test_keys_and_values_in_a_wider_format():
    """A cache of at least float32 holds bfloat16 keys exactly and gives them back in float32."""
    cache, k = Cache(1, 4, torch.float32), torch.randn(1, 1, 2, 3).bfloat16()
    cache.place(upto, Rows.of(torch.arange(2)))
    held, _ = cache.join(0, k, k)
    assert held.dtype == torch.float32 and torch.equal(held, k.float())
    assert cache.take(torch.tensor([0])).at_least == torch.float32


@pytest.mark.parametrize("part", [2**19, 64 * 90, 10])
@pytest.mark.parametrize("masks", [0, 1, 3])
@torch.no_grad()
def test_attention_in_parts_is_that_of_all_at_once(part: int, masks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several heads, of one, and of some rows of one; no mask, one for all, or one per item, with a row that
    sees nothing; keys in a wider format."""
    monkeypatch.setattr(attention, "PART", part)
    q, k, v = torch.randn(3, 4, 200, 16), torch.randn(3, 4, 90, 16), torch.randn(3, 4, 90, 16)
    mask = torch.rand(masks, 1, 200, 90) < 0.2 if masks else None
    if mask is not None:
        mask[-1, 0, 7] = False
    found, exact = attend(q.bfloat16(), k, v, mask, 0.25), attend(q, k, v, mask, 0.25)
    assert found.dtype == torch.bfloat16 and (found - exact).abs().max() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q, k, v, mask, 0.25), found)
    padding = torch.arange(90).expand(3, 1, 1, -1) < torch.tensor([90, 40, 1]).view(3, 1, 1, 1)
    found, exact = attend(q.bfloat16(), k, v, padding, 0.25), attend(q, k, v, padding, 0.25)
    assert (found - exact).abs().max() < 0.03
