"""A whole model by one command: its tokenizer, then its generator, each a run of its own that can be resumed.

    RUN/  plan.json  tokenizer/  generator/  model/  samples.png  reconstructions.png  report.html

`plan.json` says what was asked for and which stages are done; it is rewritten in one piece after each stage, so that a
process killed at any moment goes on with the right one.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from arvis import systems
from arvis.config import from_dict, to_dict
from arvis.data import open_data
from arvis.data.latents import OnPicture
from arvis.loading import picture_size, resolve_device
from arvis.recipes.classes import class_count, class_field
from arvis.recipes.request import (
    STAGES,
    Stage,
    TrainRequest,
    changed,
    refuse_existing,
    request_for,
    resumed,
)
from arvis.recipes.run import opened, train
from arvis.training import distributed, folder, report
from arvis.training.checkpoint import write_text
from arvis.training.fit import FitResult
from arvis.training.progress import OnStep

FILE = "plan.json"

SHARE = {"tokenizer": 0.35, "generator": 0.65}
"""How the time of a plan is divided."""

LATE = 1.15
"""How far beyond its share a stage may go."""

OnStage = Callable[[TrainRequest], object]
"""Told about each stage before it starts."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Both stages of the preset `name` on the data set `data`.

    `steps` updates each (0: the preset's), or as many as fit into `minutes` (0: no limit). `set` are changes of both
    requests; those that begin with "tokenizer." or "generator." are of one alone ("generator.fit.lr=1e-3").
    """

    name: str
    data: str
    steps: int = 0
    minutes: float = 0.0
    set: tuple[str, ...] = ()
    done: tuple[str, ...] = ()

    def request(self, stage: Stage, run: Path) -> TrainRequest:
        """The request of a stage that was not begun."""
        plain = request_for(self.name, stage, self.data, run / stage)
        init = run / "tokenizer" / "model" if stage == "generator" else None
        texts = [text for text in self.set if not text.startswith(tuple(f"{other}." for other in STAGES))]
        own = [text.removeprefix(f"{stage}.") for text in self.set if text.startswith(f"{stage}.")]
        return changed(replace(plain, init=init), [*texts, *own], self.steps or None)


def plan_for(
    name: str, data: str | None = None, *, steps: int = 0, minutes: float = 0.0, set: tuple[str, ...] = ()
) -> Plan:
    """The plan of a preset: a model of classes gets as many as the data has, where it has fewer."""
    plan = Plan(name=name, data=data or default_data(name), steps=steps, minutes=minutes, set=set)
    config = plan.request("tokenizer", Path()).settled
    with torch.device("meta"):
        system = systems.system(systems.preset(name)[0]).build(config)
    if "class_labels" in system.conditions and (field := class_field(config)):
        count = len(open_data(plan.data, picture_size(system)[0]).classes)
        if count > class_count(config):
            return replace(plan, set=(*set, f"model.{field}={count}"))
    return plan


def default_data(name: str) -> str:
    """What a preset learns from if nothing is said: models of prompts from the whole emoji world, others from emoji."""
    slug, _, preset = systems.preset(name)
    with torch.device("meta"):
        system = systems.system(slug).build(preset.config())
    return "emoji+scenes" if "prompt" in system.conditions else "emoji"


def planned(run: Path) -> Plan | None:
    """The plan of a run folder, or None where it has none."""
    path = run / FILE
    return from_dict(Plan, json.loads(path.read_text())) if path.is_file() else None


def train_whole(
    plan: Plan,
    run: Path,
    *,
    resume: bool = False,
    minutes: float | None = None,
    device: str = "auto",
    on_stage: OnStage | None = None,
    on_step: OnStep | None = None,
    on_picture: OnPicture | None = None,
) -> FitResult:
    """Train both stages, or go on with the plan of the run folder; `RUN/model` is the whole model in the end.

    `minutes` limits this call. At first they are those of the plan, too: a bit more than a third goes to the tokenizer,
    and each stage has as many updates as fit into its share, so that both schedules end. Returns how the last stage
    that was worked on ended.
    """
    ranks = distributed.init(resolve_device(device).type)
    if not resume:
        refuse_existing(run)
        if planned(run) is not None:
            raise FileExistsError(f"{run} already holds a run; go on with --resume, or choose another --run")
        requests = [plan.request(stage, run) for stage in STAGES]
        for request in requests:  # what is wrong with settings and data is told before anything is written
            _ = opened(request)[1][0]
        if ranks.first:
            _write(plan, run)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    result = None
    for stage in STAGES:
        if stage in plan.done and stage != STAGES[-1]:
            continue
        begun = folder.exists(run / stage)
        request = resumed(run / stage) if begun else None
        request = replace(request or plan.request(stage, run), device=device)
        left = None if deadline is None else max((deadline - time.monotonic()) / 60, 1e-6)
        share = _share(plan, stage, None if resume else left)
        # a stage of a first call that is late makes room for the next; a call that resumes may simply end
        limit = LATE * share if share and not resume and stage != STAGES[-1] else left
        request = replace(request, fit=replace(request.fit, minutes=limit))
        if on_stage is not None:
            on_stage(request)
        within = None if begun or not share else 60 * share
        result = train(request, on_step, on_picture, within=within)
        if result.stopped == "interrupted" or (result.stopped == "time" and resume):
            return result
        plan = replace(plan, done=tuple(dict.fromkeys((*plan.done, stage))))
        if ranks.first:
            _write(plan, run)
    assert result is not None, "the last stage is always looked at"
    if ranks.first:
        _finish(plan, run)
    ranks.barrier()
    return result


def _share(plan: Plan, stage: Stage, left: float | None) -> float | None:
    """Minutes for a stage: its share of the plan's; what is left for the last one, where that is known."""
    if not plan.minutes:
        return None
    return left if left is not None and stage == STAGES[-1] else SHARE[stage] * plan.minutes


def _write(plan: Plan, run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / FILE, json.dumps(to_dict(plan), indent=1))


def _finish(plan: Plan, run: Path) -> None:
    """The model, the last pictures of both stages and a page about both, in the run folder itself."""
    partial, target = run / ".model.partial", run / "model"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(run / "generator" / "model", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for stage, name in (("tokenizer", "reconstructions.png"), ("generator", "samples.png")):
        shutil.copyfile(sorted((run / stage / "samples").glob("*.png"))[-1], run / name)
    report.overview(run, f"{plan.name} on {plan.data}", STAGES)
