"""The choice of number format is visible, obeyed, and applied to matrix products only."""

from __future__ import annotations

import pytest
import torch

from arvis.training import precision


def test_the_choice_is_obeyed_and_named() -> None:
    assert precision.pick("cpu", "float32").dtype == torch.float32
    picked = precision.pick("cpu", "bfloat16")
    assert picked.dtype == torch.bfloat16 and "bfloat16" in picked.reason
    with pytest.raises(ValueError, match="float16"):
        precision.pick("cpu", "float16")  # type: ignore[arg-type]


def test_bfloat16_reaches_products_and_leaves_weights_alone() -> None:
    layer = torch.nn.Linear(4, 4)
    with precision.pick("cpu", "bfloat16").around():
        y = layer(torch.ones(2, 4))
    assert y.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    with precision.pick("cpu", "float32").around():
        assert layer(torch.ones(2, 4)).dtype == torch.float32


@pytest.mark.parametrize(
    ("unit", "speeds", "expected"),
    [(None, (100, 900), torch.float32), ("AMX", (100, 900), torch.bfloat16), ("AMX", (100, 110), torch.float32)],
)
def test_auto_follows_the_unit_and_the_measurement(
    monkeypatch: pytest.MonkeyPatch, unit: str | None, speeds: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "_cpu_unit", lambda: unit)
    monkeypatch.setattr(precision, "_gigaflops", lambda dtype: speeds[dtype == torch.bfloat16])
    picked = precision.pick("cpu")
    assert picked.dtype == expected
    if unit:
        assert all(str(speed) in picked.reason for speed in speeds)


def test_auto_measures_in_a_moment() -> None:
    picked = precision.pick("cpu")
    assert picked.dtype in (torch.float32, torch.bfloat16) and picked.reason.startswith(str(picked.dtype).split(".")[1])
