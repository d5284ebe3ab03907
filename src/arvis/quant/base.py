"""What every quantiser returns, and the interface they share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Quantized(NamedTuple):
    """The result of a quantiser.

    `values` has the shape of the input and carries the gradient estimator; `tokens` int64 [..., S] are the sub-token
    ids; `losses` are scalars by name ("vq" is the one to add to a training loss, others are its parts; empty where the
    quantiser needs none, as FSQ); `stats` are detached numbers to log.
    """

    values: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class Quantizer(Protocol):
    """A quantiser of channel-last vectors [..., d]; `sizes` are the codes of each of the S sub-tokens."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    def __call__(self, z: Tensor) -> Quantized: ...

    def encode(self, z: Tensor) -> Tensor:
        """Ids [..., S] of vectors [..., d]."""
        ...

    def codes(self, tokens: Tensor) -> Tensor:
        """Code vectors [..., d] of ids [..., S]."""
        ...
