"""Compiled steps give what plain ones give; the plain path is the specification."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import arvis
from arvis.laws import case_of
from arvis.nn.compiled import CompiledStep, traceable
from arvis.nn.packed import pack
from arvis.noise import Noise
from arvis.state import Compilable
from arvis.systems import SYSTEMS, llamagen
from arvis.training import compiled
from arvis.walk import finish, generate

SLUGS = [slug for slug, row in SYSTEMS.items() if row.kind == "system"]
COMPILABLE = [slug for slug in SLUGS if isinstance(case_of(slug).system, Compilable)]

LACK = compiled.missing(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(LACK is not None, reason=str(LACK)),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # of the compiler's own code
]


class Counted(CompiledStep):
    """Counts the calls by the graph."""

    def __init__(self, net: nn.Module, whole: bool) -> None:
        super().__init__(net, whole)
        graph, self.calls = self.step, 0

        def step(*given: Any) -> torch.Tensor:
            self.calls += 1
            return graph(*given)

        self.step = step


def tokens(system: Any, cond: dict[str, Any], items: int) -> torch.Tensor:
    with torch.inference_mode():
        return finish(generate(system, cond, system.Sampling(), Noise.of(0, items))).tokens


def by_graph(system: Any, whole: bool, packed: bool) -> tuple[Any, Counted]:
    out = copy.deepcopy(system)
    if packed:
        pack(out)
    out._compiled = step = Counted(out.transformer, whole)
    return out, step


@pytest.mark.parametrize(("whole", "packed"), [(False, True), (True, False)])
@pytest.mark.parametrize("name", COMPILABLE)
def test_the_same_tokens(name: str, whole: bool, packed: bool) -> None:
    case = case_of(name, torch.float32)
    system, step = by_graph(case.system, whole, packed)
    for items in (1, 3):  # a graph for each
        cond = {key: x[:1].expand(items, *x.shape[1:]) for key, x in case.cond.items()}
        step.calls = 0
        assert torch.equal(tokens(system, cond, items), tokens(case.system, cond, items))
        assert step.calls >= system.tokenizer.layout().n - 2, "all but the first and the last row go by the graph"


@pytest.mark.parametrize("whole", [False, True])
def test_prompts_of_unequal_lengths_are_masked(whole: bool) -> None:
    torch.manual_seed(0)
    plain = llamagen.build(replace(llamagen.emoji_64(), depth=1)).eval()
    nn.init.normal_(plain.transformer.output.weight, std=0.5)
    system, step = by_graph(plain, whole, packed=True)
    cond = plain.prepare({"prompt": ["red apple", "a very happy blue cat"]})
    assert torch.equal(tokens(system, cond, 2), tokens(plain, cond, 2))
    assert step.calls == 62 + whole


def test_a_step_in_bfloat16_is_as_near_as_autocast() -> None:
    """Rounded by the graph, a row differs from float32's by at most twice what autocast's does."""
    case = case_of("llamagen", torch.float32)

    def row(system: Any) -> torch.Tensor:
        with torch.inference_mode():
            s = system.start(case.cond, system.Sampling.plain(), case.noise)
            for _ in range(3):
                d = system.predict(s)
                system.commit(s, d, torch.ones(len(s), 1, 1, dtype=torch.int64))
            return d.logits.float()

    exact = row(case.system)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, quick = row(case.system), row(by_graph(case.system, False, True)[0])
    allowed = 2 * (rounded - exact).abs().max() + 1e-3 * exact.abs().max()
    assert 0 < (quick - exact).abs().max() <= allowed


def test_a_traceable_network_shares_its_weights() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    pack(net)
    twin = traceable(net)
    x = torch.randn(2, 32)
    with torch.inference_mode():
        assert torch.equal(twin(x), net(x))
    assert twin.get_submodule("1").weight is net[1].weight
    assert type(net[0]) is nn.Linear, "the network itself stays as it is"


def test_systems_of_many_codes_per_step_are_refused() -> None:
    with pytest.raises(ValueError, match="compile is for systems of one code per step, and brush-64 is none"):
        arvis.load("brush", compile=True)


def test_without_a_compiler_a_model_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    found = case_of("llamagen", torch.float32).system
    model = arvis.Model(found, slug="llamagen", name="tiny", config=None, settings={}, source={}, compile=True)
    assert model.system._compiled is None and "no C++ compiler" in caplog.text
