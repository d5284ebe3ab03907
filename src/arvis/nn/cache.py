"""The key-value cache: batch-first tensors whose slots carry the same rows as the mask rules.

A slot holds what its row says: its step and tag. Padding, roll-back and tree branches are therefore data, and the mask
of any cached call is `render(see, rows, cache.rows)`: no index can be forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arvis.rows import Rows, See, render
from arvis.tokens import NEVER


class Cache:
    """Keys and values of every layer, [B, G, H, slots, h], allocated once as zeros at the first use of a layer.

    Guidance rows live inside the item, so one gather on axis 0 moves everything. `extra` holds recurrent state or a
    second stream; a system that writes there gives up roll-back, but for the last step where it is by `remember`.
    `limits` are slots of layers that see fewer rows than the others: the first so many. Keys and values lie in the
    number format in which they come, or in `at_least` where that is wider.
    """

    def __init__(self, items: int, slots: int, at_least: torch.dtype | None = None) -> None:
        self.at_least = at_least
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.extra: dict[str, Tensor] = {}
        self.step = torch.full((items, slots), NEVER, dtype=torch.int32)
        self.tag = torch.zeros((items, slots), dtype=torch.int32)
        self.end = 0
        self.limits: dict[int, int] = {}
        self._at: int | Tensor = 0
        self._keep = True
        self._oldest = NEVER  # the first step that recurrent state can go back to

    @property
    def slots(self) -> int:
        return self.step.shape[1]

    @property
    def filled(self) -> Tensor:
        """Rows held for each item, int64 [B]."""
        return (self.step < NEVER).sum(1)

    def reserve(self, slots: int) -> None:
        """Make room for at least `slots` rows (drafts that come and go need more than the sequence)."""
        more = slots - self.slots
        if more <= 0:
            return
        self.step = torch.cat((self.step, self.step.new_full((len(self.step), more), NEVER)), 1)
        self.tag = torch.cat((self.tag, self.tag.new_zeros(len(self.tag), more)), 1)
        for stores in (self.k, self.v):
            for layer, x in stores.items():
                if layer not in self.limits:
                    stores[layer] = torch.cat((x, x.new_zeros(*x.shape[:3], more, x.shape[4])), 3)

    def place(self, see: See, rows: Rows, keep: bool = True, at: Tensor | None = None) -> Tensor | None:
        """Announce the rows of the next trunk call; returns the mask of their attention over the cache and themselves.

        Rows take the slots after `end`, or slots `at` [B, R], one list per item, when items stand at different lengths.
        Rows that are not kept are read in this call only; they lie where the next rows will, or are joined by a copy
        where that is impossible, so rows that nothing reads later need no memory.
        """
        if at is not None and not keep:
            raise ValueError("rows at slots of their own are always kept; roll back with `forget` or `keep`")
        stop = self.end + rows.count if at is None else int(at.max()) + 1
        if keep and stop > self.slots:
            raise ValueError(f"the cache has {self.slots} slots, {self.end} in use: no room for rows up to {stop}")
        self._keep, self._at = keep, self.end if at is None else at
        if not keep:
            items = len(self.step)
            step = torch.cat((self.step[:, : self.end], rows.step.expand(items, -1)), 1)
            tag = torch.cat((self.tag[:, : self.end], rows.tag.expand(items, -1)), 1)
            return render(see, rows, Rows(step, tag))
        if at is None:
            self.step[:, self.end : stop], self.tag[:, self.end : stop] = rows.step, rows.tag
        else:
            self.step.scatter_(1, at, rows.step.expand_as(at))
            self.tag.scatter_(1, at, rows.tag.expand_as(at))
        self.end = max(self.end, stop)
        return render(see, rows, Rows(self.step[:, : self.end], self.tag[:, : self.end]))

    def join(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [B*G, H, R, h] of the placed rows; return all visible slots as views where possible."""
        return self._join(self.k, layer, k), self._join(self.v, layer, v)

    def _join(self, stores: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        items, count, at = len(self.step), new.shape[2], self._at
        fresh = new.view(items, -1, *new.shape[1:])
        if layer not in stores:
            if not self._keep and at == 0:
                return new
            if isinstance(at, int) and at > 0:
                raise ValueError(f"layer {layer} runs for the first time, but {at} rows were cached without it")
            slots = min(self.limits.get(layer, self.slots), self.slots)
            dtype = torch.promote_types(fresh.dtype, self.at_least or fresh.dtype)
            stores[layer] = fresh.new_zeros(*fresh.shape[:3], slots, fresh.shape[4], dtype=dtype)
        store = stores[layer]
        if isinstance(at, Tensor):
            item = torch.arange(items, device=new.device)[:, None]
            store[item, :, :, at.to(new.device)] = fresh.permute(0, 3, 1, 2, 4).to(store.dtype)
            return store[:, :, :, : self.end].flatten(0, 1)
        if not self._keep and (at + count > store.shape[3] or fresh.shape[1] != store.shape[1]):
            past = store[:, :, :, :at].expand(-1, fresh.shape[1], -1, -1, -1)
            return torch.cat((past, fresh), 3).flatten(0, 1)
        store[:, :, :, at : at + count] = fresh
        return store[:, :, :, : at + count].flatten(0, 1)

    def row(self) -> tuple[dict[int, Tensor], dict[int, Tensor], int, int] | None:
        """Stores of keys and of values, the slot of the one placed row, and the end: None where a row does not go by
        them alone (rows of its own for each item, none kept yet, recurrent state, layers that see less)."""
        at = self._at
        if isinstance(at, Tensor) or not self._keep or not self.k or self.extra or self.limits:
            return None
        return self.k, self.v, at, self.end

    def forget(self, step: int | Tensor) -> None:
        """Roll back: slots of step >= `step` (one for all, or one per item) become empty. ValueError if recurrent."""
        limit = step.cpu()[:, None] if isinstance(step, Tensor) else step
        late = (self.step >= limit) & (self.step < NEVER)
        if not bool(late.any()):
            return
        if self.extra and bool((torch.as_tensor(limit) < self._oldest).any()):
            raise ValueError(
                f"a cache with recurrent state ({sorted(self.extra)}) cannot be rolled back to step {step}; "
                "start anew, or fork the state before the step"
            )
        self.step[late] = NEVER
        self._trim()

    def remember(self, layer: int, step: int, states: Sequence[Tensor]) -> None:
        """Recurrent states [B*G, ...] of a layer before a step, unless the rows placed last are not kept. Those before
        the step before it stay, so that the last step can be repeated."""
        if not self._keep:
            return
        self._oldest = step - 1 if self._oldest == NEVER else max(self._oldest, step - 1)
        for i, state in enumerate(states):
            fresh = state.unflatten(0, (len(self.step), -1))
            if (name := f"{layer}.{i}") not in self.extra:
                self.extra[name] = fresh.new_zeros(*fresh.shape[:2], 2, *fresh.shape[2:])
            self.extra[name][:, :, step % 2] = fresh

    def recall(self, layer: int, step: int) -> list[Tensor]:
        """What was remembered of a layer before a step; nothing before step 0."""
        stores = [self.extra[name] for name in self.extra if step > 0 and name.startswith(f"{layer}.")]
        return [store[:, :, step % 2].flatten(0, 1) for store in stores]

    def drop(self, layer: int) -> None:
        """Free what is held of a layer that does not run again."""
        for store in (self.k, self.v):
            store.pop(layer, None)
        self.extra = {name: x for name, x in self.extra.items() if not name.startswith(f"{layer}.")}

    def keep(self, first_B: Tensor, nodes_BP: Tensor) -> None:
        """Of the rows from slot first_B[b] on, keep nodes_BP[b] (padded with -1) in that order, side by side and
        untagged, and empty all others: an accepted path of a draft tree becomes part of the sequence."""
        path = torch.arange(nodes_BP.shape[1])
        source, target = first_B[:, None] + nodes_BP.clamp_min(0), first_B[:, None] + path
        step = self.step.gather(1, source).masked_fill(nodes_BP < 0, NEVER)
        for store in (*self.k.values(), *self.v.values()):
            item = torch.arange(len(store), device=store.device)[:, None]
            store[item, :, :, target.to(store.device)] = store[item, :, :, source.to(store.device)]
        late = torch.arange(self.slots) >= first_B[:, None]
        self.step[late] = NEVER
        self.tag[late] = 0
        self.step.scatter_(1, target, step)
        self._trim()

    def _trim(self) -> None:
        used = (self.step < NEVER).any(0).nonzero()
        self.end = int(used[-1]) + 1 if len(used) else 0

    def take(self, rows: Tensor) -> Cache:
        """The cache of items `rows`."""
        host, out = rows.cpu(), Cache(0, 0, self.at_least)
        out.step, out.tag, out.end = self.step[host], self.tag[host], self.end
        out.limits, out._oldest = self.limits, self._oldest
        for name in ("k", "v", "extra"):
            setattr(out, name, {key: x[rows.to(x.device)] for key, x in getattr(self, name).items()})
        return out

    @staticmethod
    def stack(caches: list[Cache]) -> Cache:
        """One cache of all items; slots that an item has not filled stay empty for it."""
        if any(tuple(c.extra) != tuple(caches[0].extra) for c in caches):
            raise ValueError(f"caches of unequal recurrent state cannot be joined: {[sorted(c.extra) for c in caches]}")
        out, slots = Cache(0, 0, caches[0].at_least), max(c.slots for c in caches)
        for c in caches:
            c.reserve(slots)
        out.step, out.tag = torch.cat([c.step for c in caches]), torch.cat([c.tag for c in caches])
        out.end = max(c.end for c in caches)
        out.limits, out._oldest = caches[0].limits, max(c._oldest for c in caches)
        for name in ("k", "v"):
            stores = [getattr(c, name) for c in caches]
            like = {layer: x for store in stores for layer, x in store.items()}
            joined = {
                layer: torch.cat(
                    [
                        store.get(layer, x.new_zeros(len(c.step), *x.shape[1:]))
                        for c, store in zip(caches, stores, strict=True)
                    ]
                )
                for layer, x in like.items()
            }
            setattr(out, name, joined)
        out.extra = {key: torch.cat([c.extra[key] for c in caches]) for key in caches[0].extra}
        return out


@dataclass(frozen=True)
class Slots:
    """A cache as a compiled step sees it: stores [B, G, H, slots, h] of all layers, the slot `at` [1] of the one row of
    all items, and how many slots it sees."""

    k: Mapping[int, Tensor]
    v: Mapping[int, Tensor]
    at: Tensor
    seen: int

    def join(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `Cache.join`."""
        return self._join(self.k[layer], k), self._join(self.v[layer], v)

    def _join(self, store: Tensor, new: Tensor) -> Tensor:
        flat = store.flatten(0, 1)
        flat.index_copy_(2, self.at, new.to(store.dtype))
        return flat.narrow(2, 0, self.seen)
