"""What to train, as data: one stage of a model, its pictures, its settings; and how a run folder keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from arvis import systems
from arvis.config import from_dict, override, to_dict
from arvis.nn.lora import LoraConfig
from arvis.training import folder
from arvis.training.fit import FitConfig
from arvis.training.fit_config import load_config
from arvis.training.tokenizer_losses import TokenizerLossConfig

Stage = Literal["tokenizer", "generator"]

STAGES: tuple[Stage, ...] = ("tokenizer", "generator")
"""In the order in which a model is trained."""

_PLAIN = (
    "stage",
    "data",
    "size",
    "crops",
    "flip",
    "cache",
    "levels",
    "objective",
    "tokenizer",
    "freeze",
    "only",
    "lpips",
    "gan_start",
    "base",
)
"""Fields of a request that its run folder keeps as they are."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train: one stage of the preset `name` on the data set `data`, for `fit`, in the run folder `run`.

    `init` is a folder with weights of the same system (the generator stage needs a trained tokenizer); `set` overrides
    the preset ("scale.depth=4"), or `config` where one is given. `tokenizer` is a folder whose tokenizer replaces the
    one in `init`. `sampling` are the settings that the trained model is used with, by default the preset's.

    Pictures have `size` pixels, by default the model's; `crops` of each are cut from a slightly larger one, and `flip`
    adds their mirror images. The generator stage encodes each once and keeps the latents (`cache` "auto": where the run
    shows a picture twice or more; "on", "off").

    Parameters whose names hold a fragment of `freeze` are not trained; where `only` is given, none but those with one
    of its fragments ("decoder": better pictures from the same tokens). With `lora.rank` the generator itself is frozen
    and adapters are trained; `base` is the model they belong to, by name or folder.

    `levels` teaches a generator only so many coarse levels first, at a fraction of the cost. `objective` is the name of
    a training method of the registry that takes the place of the generator's own loss, then settings ("name=value"). A
    tokenizer is trained with the terms of `loss`: LPIPS where its weight files are in `lpips`, a PatchGAN from step
    `gan_start` on (-1: none). `pictures` are the names and captions of further pictures in the run folder, for its
    report.
    """

    name: str
    stage: Stage
    data: str
    run: Path
    fit: FitConfig
    device: str = "auto"
    size: int = 0
    crops: int = 1
    flip: bool = False
    cache: Literal["auto", "on", "off"] = "auto"
    tokenizer: str = ""
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    lora: LoraConfig = field(default_factory=LoraConfig)
    base: str = ""
    levels: int = 0
    objective: tuple[str, ...] = ()
    loss: TokenizerLossConfig = field(default_factory=lambda: TokenizerLossConfig(edges=1.0))
    lpips: tuple[str, ...] = ()
    gan_start: int = -1
    init: Path | None = None
    config: Any = None
    sampling: Mapping[str, Any] | None = None
    set: tuple[str, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False

    @property
    def settled(self) -> Any:
        """The configuration of the model: the preset's or `config`, with the overrides."""
        return override(systems.preset(self.name)[2].config() if self.config is None else self.config, list(self.set))

    def kept(self) -> dict[str, Any]:
        """What the run folder keeps of it, beside the FitConfig and the configuration of the model."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {**plain, "init": str(self.init or ""), "loss": to_dict(self.loss), "lora": to_dict(self.lora)}


def request_for(name: str, stage: Stage, data: str, run: Path) -> TrainRequest:
    """The request with the preset's own settings for a stage; pictures are drawn ten times on the way."""
    _, full, preset = systems.preset(name)
    config = from_dict(FitConfig, {"steps": 1000, "batch": 64, **preset.training.get(stage, {})})
    if not config.sample_every:
        config = replace(config, sample_every=max(config.steps // 10, 1))
    return TrainRequest(name=full, stage=stage, data=data, run=run, fit=config)


def trainable(name: str) -> str:
    """The preset that a name means for training: of a bare system, its first one that has settings for both stages and
    no official files, if any."""
    slug, full, _ = systems.preset(name)
    presets = systems.system(slug).PRESETS.items()
    own = (n for n, preset in presets if not preset.files and set(STAGES) <= preset.training.keys())
    return next(own, full) if name == slug else full


def changed(request: TrainRequest, texts: Sequence[str] = (), steps: int | None = None) -> TrainRequest:
    """A request with "name=value" changes: fields of it, "fit.NAME" and "model.NAME"; a number of steps comes first.

    With other steps, warm-up is at most a fifth of them, and pictures are still drawn ten times. ConfigError names the
    nearest setting for an unknown one.
    """
    if steps is not None:
        every, warmup = max(steps // 10, 1), min(request.fit.warmup, steps // 5)
        request = replace(request, fit=replace(request.fit, steps=steps, warmup=warmup, sample_every=every))
    model = [text.removeprefix("model.") for text in texts if text.startswith("model.")]
    request = replace(request, set=(*request.set, *model))
    return override(request, [text for text in texts if not text.startswith("model.")])


def resumed(run: Path) -> TrainRequest | None:
    """The request that a run folder keeps, to go on with; None for a folder that keeps none (of an early version).

    Raises FileNotFoundError where there is no run.
    """
    if not folder.exists(run):
        raise FileNotFoundError(f"{run} holds no run to resume; leave --resume out to start one")
    config, saved = load_config(run)
    kept = saved.get("request")
    if kept is None:
        return None
    slug, name, _ = systems.preset(saved["preset"])
    plain: dict[str, Any] = {k: tuple(kept[k]) if isinstance(kept[k], list) else kept[k] for k in _PLAIN if k in kept}
    return TrainRequest(
        name=name,
        run=run,
        fit=replace(config, minutes=None),
        init=Path(kept["init"]) if kept["init"] else None,
        config=from_dict(systems.system(slug).CONFIG, saved["model"]),
        sampling=saved.get("sampling"),
        loss=from_dict(TokenizerLossConfig, kept["loss"]),
        lora=from_dict(LoraConfig, kept.get("lora", {})),
        pictures=saved.get("pictures", {}),
        resume=True,
        **plain,
    )


def refuse_existing(run: Path) -> None:
    """FileExistsError where a folder holds a run, which a new one would overwrite."""
    if folder.exists(run):
        raise FileExistsError(f"{run} already holds a run; go on with --resume, or choose another --run")


def refuse_among(run: Path, data: Path) -> None:
    """ValueError where a run folder lies in the folder of the pictures, which would be trained on its own samples."""
    if data.is_dir() and run.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"the run folder {run} lies among the pictures in {data}; choose another --run")
