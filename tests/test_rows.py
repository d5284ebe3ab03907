"""Masks are rules over rows: every rule against brute force, and the published matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arvis.noise import Noise
from arvis.rows import (
    CLEAN,
    NOISY,
    Rows,
    clean_noisy,
    depths,
    render,
    same,
    tree,
    tree_tags,
    upto,
    window,
)
from arvis.tokens import NEVER, pyramid

RULES: dict[str, tuple] = {
    "upto": (upto, lambda qs, qt, ks, kt: ks <= qs),
    "tree without drafts": (
        lambda q, k: tree(q._replace(tag=0 * q.tag), k._replace(tag=0 * k.tag)),
        lambda qs, qt, ks, kt: ks <= qs,
    ),
    "same": (same, lambda qs, qt, ks, kt: ks == qs),
    "window": (window(2), lambda qs, qt, ks, kt: ks <= qs and (qs - ks < 2 or ks < 0)),
    "window with sink": (window(2, sink=1), lambda qs, qt, ks, kt: ks <= qs and (qs - ks < 2 or ks < 1)),
    "clean_noisy": (
        clean_noisy,
        lambda qs, qt, ks, kt: ks <= qs and (kt == CLEAN or (qt == NOISY and ks == qs)),
    ),
}


def brute(rule: Callable[..., bool], q: Rows, k: Rows) -> Tensor:
    items = max(len(q.step), len(k.step))
    out = torch.zeros(items, q.count, k.count, dtype=torch.bool)
    for b, i, j in itertools.product(range(items), range(q.count), range(k.count)):
        qs, qt = int(q.step[b % len(q.step), i]), int(q.tag[b % len(q.step), i])
        ks, kt = int(k.step[b % len(k.step), j]), int(k.tag[b % len(k.step), j])
        out[b, i, j] = ks < NEVER and rule(qs, qt, ks, kt)
    return out


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("items", [(1, 1), (1, 3), (3, 3)])
def test_a_rule_equals_its_definition(name: str, items: tuple[int, int]) -> None:
    see, rule = RULES[name]

    def rows(items: int, count: int, seed: int) -> Rows:
        u = Noise.of(seed, items).uniform("rows", 0, (2, count))
        step = (u[:, 0] * 8).int() - 2
        return Rows.of(torch.where(step == 5, NEVER, step), (u[:, 1] * 2).int())

    q, k = rows(items[0], 5, 1), rows(items[1], 7, 2)
    mask = render(see, q, k)
    assert mask is not None and mask.shape == (max(items), 1, 5, 7) and mask.dtype == torch.bool
    assert torch.equal(mask[:, 0], brute(rule, q, k))


def test_empty_slots_and_padding_are_never_seen() -> None:
    q, k = Rows.of(torch.tensor([3, NEVER])), Rows.of(torch.tensor([0, NEVER, 3]))
    for see, _ in RULES.values():
        mask = render(see, q, k)
        assert mask is not None and not bool(mask[..., 1].any())
    assert render(upto, q, Rows.of(torch.tensor([0, 3]))) is None  # a padding row as a query sees what is there


def test_no_mask_when_everything_is_visible() -> None:
    k = Rows.of(torch.tensor([0, 1, 1]))
    assert render(upto, Rows.of(torch.tensor([1, 2])), k) is None
    assert render(upto, Rows.of(torch.tensor([0, 2])), k) is not None
    assert render(same, Rows.of(torch.tensor([1, 1])), Rows.of(torch.tensor([1, 1, 1]))) is None


def test_upto_is_the_block_causal_mask_of_a_pyramid() -> None:
    layout = pyramid((1, 2, 3))
    rows = Rows.of(layout.level_N)
    mask = render(upto, rows, rows)
    expected = torch.zeros(14, 14, dtype=torch.bool)
    for end, (a, b) in zip((1, 5, 14), ((0, 1), (1, 5), (5, 14)), strict=True):
        expected[a:b, :end] = True
    assert mask is not None and torch.equal(mask[0, 0], expected)
    full = render(upto, *[Rows.of(pyramid((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).level_N)] * 2)
    assert full is not None and int(full.sum()) == 286_434  # published count of visible pairs


@pytest.mark.parametrize(("blocks", "size"), [(1, 4), (4, 1), (4, 4), (3, 9)])
def test_clean_noisy_is_the_skip_causal_matrix(blocks: int, size: int) -> None:
    block = torch.arange(blocks).repeat_interleave(size)
    step = torch.cat((block + 1, block))  # a clean row helps to predict the next block, a noisy one its own
    rows = Rows.of(step, torch.tensor([CLEAN, NOISY]).repeat_interleave(len(block)))
    mask = render(clean_noisy, rows, rows)
    b, n = block.tolist(), len(block)
    expected = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for i, j in itertools.product(range(n), range(n)):
        expected[i, j] = b[j] <= b[i]
        expected[n + i, j] = b[j] < b[i]
        expected[n + i, n + j] = b[j] == b[i]
    assert mask is not None and torch.equal(mask[0, 0], expected)
    if blocks == 1:
        assert not bool(mask[0, 0, n:, :n].any()) and bool(mask[0, 0, n:, n:].all())


def test_a_tree_shows_ancestors_only() -> None:
    noise, count = Noise.of(3, 20), 12
    parent = (noise.uniform("parent", 0, (count,)) * (torch.arange(count) + 1)).long() - 1  # any earlier node or -1
    depth, tags = depths(parent), tree_tags(parent)
    rows = Rows.of(torch.cat((torch.zeros(20, 2), 5 + depth), 1), torch.cat((torch.zeros(20, 2), tags), 1))
    mask = render(tree, rows, rows)
    assert mask is not None
    for b in range(20):
        for node in range(count):
            line, up = [], node
            while up >= 0:
                line.append(up)
                up = int(parent[b, up])
            assert int(depth[b, node]) == len(line)
            seen = mask[b, 0, 2 + node].nonzero()[:, 0].tolist()
            assert seen == sorted([0, 1, *(2 + x for x in line)])
        assert mask[b, 0, :2].nonzero()[:, 1].tolist() == [0, 1, 0, 1]


def test_a_tree_lists_parents_first() -> None:
    with pytest.raises(ValueError, match="parents before children"):
        tree_tags(torch.tensor([[1, -1]]))
    chain = torch.arange(-1, 200)[None]
    assert int(tree_tags(chain).max()) > 0 and depths(chain)[0, -1] == 201
