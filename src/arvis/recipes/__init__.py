"""Training by name. A model has two stages, and each is a run with a folder of its own:

    tokenizer    pictures -> tokens -> pictures
    generator    conditions -> the tokens of a trained tokenizer

`request.py` is what to train as plain data, `stages.py` the two modules that learn, `run.py` one stage from the request
to `run/model`, `whole.py` both by one command, `finetune.py` a model continued on somebody's folder, `classes.py` its
new classes, `benchmark.py` the measure of what came out. A run leaves the whole system in `run/model`, so that the next
stage, sampling and evaluation start from that folder.
"""

from arvis.recipes.benchmark import evaluate_emoji
from arvis.recipes.classes import class_count, class_field, with_classes
from arvis.recipes.finetune import GOOD, Fidelity, fidelity, finetuning, outcome
from arvis.recipes.request import (
    STAGES,
    Stage,
    TrainRequest,
    changed,
    refuse_among,
    refuse_existing,
    request_for,
    resumed,
    trainable,
)
from arvis.recipes.run import train
from arvis.recipes.stages import GeneratorStage, TokenizerStage
from arvis.recipes.whole import Plan, default_data, plan_for, planned, train_whole

__all__ = [
    "GOOD",
    "STAGES",
    "Fidelity",
    "GeneratorStage",
    "Plan",
    "Stage",
    "TokenizerStage",
    "TrainRequest",
    "changed",
    "class_count",
    "class_field",
    "default_data",
    "evaluate_emoji",
    "fidelity",
    "finetuning",
    "outcome",
    "plan_for",
    "planned",
    "refuse_among",
    "refuse_existing",
    "request_for",
    "resumed",
    "train",
    "train_whole",
    "trainable",
    "with_classes",
]
