"""The key-value cache: batch-first tensors whose slots carry the same rows as the mask rules.

A slot holds what its row says: its step and tag. Padding, roll-back and tree branches are therefore data, and the mask
of any cached call is `render(see, rows, cache.rows)`: no index can be forgotten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arvis.rows import Rows, See, render
from arvis.tokens import NEVER


class Cache:
    """Keys and values of every layer, [B, G, H, slots, h], allocated once as zeros at the first use of a layer.

    Guidance rows live inside the item, so one gather on axis 0 moves everything. `extra` holds recurrent state or a
    second stream; a system that writes there gives up roll-back.
    """

    def __init__(self, items: int, slots: int) -> None:
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.extra: dict[str, Tensor] = {}
        self.step = torch.full((items, slots), NEVER, dtype=torch.int32)
        self.tag = torch.zeros((items, slots), dtype=torch.int32)
        self.end = 0
        self._at: int | Tensor = 0
        self._keep = True

    @property
    def slots(self) -> int:
        return self.step.shape[1]

    def place(self, see: See, rows: Rows, keep: bool = True, at: Tensor | None = None) -> Tensor | None:
        """Announce the rows of the next trunk call; returns the mask of their attention over the cache and themselves.

        Kept rows take the slots after `end` (or slots `at` [B, R], one list per item, when items stand at different
        lengths). Rows that are not kept are read in this call only and overwritten by the next; when no slot is left
        for them they are joined by a copy instead, so rows that nothing reads later need no memory.
        """
        count = rows.count
        self._keep, self._at = keep, self.end if at is None else at
        if at is None:
            stop = self.end + count
            if stop > self.slots and keep:
                raise ValueError(f"the cache has {self.slots} slots, {self.end} taken: no room for {count} more rows")
            if stop > self.slots:
                step = torch.cat((self.step[:, : self.end], rows.step.expand(len(self.step), -1)), 1)
                tag = torch.cat((self.tag[:, : self.end], rows.tag.expand(len(self.tag), -1)), 1)
                return render(see, rows, Rows(step, tag))
            self.step[:, self.end : stop], self.tag[:, self.end : stop] = rows.step, rows.tag
            seen = Rows(self.step[:, :stop], self.tag[:, :stop])
            mask = render(see, rows, seen)
            if keep:
                self.end = stop
            else:  # transient rows leave no trace: their slots are empty again for every later mask
                self.step[:, self.end : stop] = NEVER
            return mask
        stop = int(at.max()) + 1
        if stop > self.slots:
            raise ValueError(f"the cache has {self.slots} slots, rows were placed up to slot {stop - 1}")
        self.step.scatter_(1, at, rows.step.expand_as(at))
        self.tag.scatter_(1, at, rows.tag.expand_as(at))
        self.end = max(self.end, stop)
        return render(see, rows, Rows(self.step[:, : self.end], self.tag[:, : self.end]))

    def join(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [B*G, H, R, h] of the placed rows; return all visible slots as views where possible."""
        items, count = self.step.shape[0], k.shape[2]
        if layer not in self.k:
            shape = (items, k.shape[0] // items, k.shape[1], self.slots, k.shape[3])
            self.k[layer], self.v[layer] = k.new_zeros(shape), v.new_zeros(shape)
        out = []
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            fresh = new.view(items, -1, *new.shape[1:])
            if isinstance(self._at, Tensor):
                at = self._at.to(new.device)
                store[torch.arange(items, device=new.device)[:, None], :, :, at] = fresh.permute(0, 3, 1, 2, 4)
                seen = store[:, :, :, : self.end]
            elif self._at + count > self.slots:
                seen = torch.cat((store[:, :, :, : self._at], fresh), 3)
            else:
                store[:, :, :, self._at : self._at + count] = fresh
                seen = store[:, :, :, : self._at + count]
            out.append(seen.flatten(0, 1))
        return out[0], out[1]

    def forget(self, step: int | Tensor) -> None:
        """Roll back: slots of step >= `step` (one for all, or one per item) become empty. ValueError if recurrent."""
        if self.extra:
            raise ValueError(f"a cache with recurrent state ({sorted(self.extra)}) cannot be rolled back")
        limit = step.cpu()[:, None] if isinstance(step, Tensor) else step
        self.step[self.step >= limit] = NEVER
        used = (self.step < NEVER).any(0).nonzero()
        self.end = int(used[-1]) + 1 if len(used) else 0

    def move(self, src: Tensor, dst: Tensor) -> None:
        """Copy slots src [B, P] to dst [B, P] in every layer (an accepted path of a tree becomes contiguous)."""
        for store in (*self.k.values(), *self.v.values()):
            a, b = src.to(store.device), dst.to(store.device)
            item = torch.arange(len(store), device=store.device)[:, None]
            store[item, :, :, b] = store[item, :, :, a].clone()
        for store in (self.step, self.tag):
            store.scatter_(1, dst, store.gather(1, src))

    def take(self, rows: Tensor) -> Cache:
        """The cache of items `rows`."""
        host, out = rows.cpu(), Cache(0, 0)
        out.step, out.tag, out.end = self.step[host], self.tag[host], self.end
        for name in ("k", "v", "extra"):
            setattr(out, name, {key: x[rows.to(x.device)] for key, x in getattr(self, name).items()})
        return out

    @staticmethod
    def stack(caches: list[Cache]) -> Cache:
        """One cache of all items; they must hold equally many slots."""
        if len({(c.end, c.slots, tuple(c.k)) for c in caches}) != 1:
            raise ValueError(f"caches of different fill cannot be joined: {[(c.end, c.slots) for c in caches]}")
        out, first = Cache(0, 0), caches[0]
        out.step, out.tag, out.end = torch.cat([c.step for c in caches]), torch.cat([c.tag for c in caches]), first.end
        for name in ("k", "v", "extra"):
            setattr(
                out, name, {key: torch.cat([getattr(c, name)[key] for c in caches]) for key in getattr(first, name)}
            )
        return out
