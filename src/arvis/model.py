"""The public face: `load` a model by name or folder; `generate`, `stream`, `reconstruct`, `log_prob`, save and load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from arvis import systems
from arvis.config import from_dict, to_dict
from arvis.data.images import centre_crop, read_image, to_network, to_pil, to_tensor
from arvis.editing import keep_tokens
from arvis.noise import Noise
from arvis.state import Parallel
from arvis.tokens import Layout, Pin
from arvis.walk import Step, generate, likelihood
from arvis.weights import SAME_NAMES, WeightsError, fetch, load_official, read, read_pretrained, save_pretrained

SHIPPED = Path(__file__).parent / "models"
"""Models that come with the package, one folder each."""

Picture = Image.Image | str | Path

_log = logging.getLogger("arvis")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of a generation: `k` of `K` groups are decided; `pictures()` decodes what is known so far."""

    k: int
    K: int
    pictures: Callable[[], list[Image.Image]]

    @property
    def done(self) -> bool:
        return self.k >= self.K


class Model:
    """A system with its weights, ready to use. `settings` are the sampling settings it is used with by default."""

    def __init__(
        self, system: Any, *, slug: str, name: str, config: Any, settings: Mapping[str, Any], source: Mapping[str, Any]
    ) -> None:
        self.system = system.eval()
        self.slug, self.name, self.config = slug, name, config
        self.settings, self.source = dict(settings), dict(source)

    @property
    def device(self) -> torch.device:
        return next(self.system.parameters()).device

    @property
    def size(self) -> tuple[int, int]:
        """(Y, X) pixels of a picture."""
        tokenizer = self.system.tokenizer
        y, x = tokenizer.layout().levels[-1]
        return y * tokenizer.config.downsample, x * tokenizer.config.downsample

    def sampling(self, settings: Mapping[str, Any] | None = None) -> Any:
        """The sampling settings, with changes; ConfigError naming the nearest for an unknown one."""
        kind = self.system.Sampling
        known = {f.name for f in fields(kind)}
        return from_dict(kind, {**{k: v for k, v in self.settings.items() if k in known}, **(settings or {})})

    # -- pictures -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | Sequence[int] | None = None,
        n: int = 1,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        image: Picture | None = None,
        mask: Picture | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> list[Image.Image]:
        """Pictures of a prompt or class: `n` of each. The same request gives the same pictures.

        Picture i depends on (prompt, settings, seed, i) and on nothing else, so asking for more adds to those there.
        `settings` changes sampling settings ("cfg_scale", "top_k", "top_p", ...). With `image`, only the white part of
        `mask` is painted anew and the rest is kept (approximately: what is kept are tokens).
        """
        last = None
        for last in self.stream(
            prompt, class_labels=class_labels, n=n, seed=seed, settings=settings, image=image, mask=mask
        ):
            if on_step is not None:
                on_step(last)
        if last is None:
            raise ValueError("the mask leaves nothing to paint: white marks what is painted anew")
        return last.pictures()

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | Sequence[int] | None = None,
        n: int = 1,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        image: Picture | None = None,
        mask: Picture | None = None,
    ) -> Iterator[Progress]:
        """The steps of `generate`, coarse to fine. Stop iterating to cancel; call `pictures` before the next step."""
        if n < 1:
            raise ValueError(f"n is the number of pictures, at least 1, got {n}")
        request = _request(prompt, class_labels, n)
        with torch.inference_mode():
            cond = self.system.prepare(request)
            items = len(next(iter(cond.values())))
            layout = self.system.tokenizer.layout()
            given = self._given(image, mask, layout, items)
            noise = Noise(Noise.of(seed, n, self.device).seed_B.repeat(items // n))
            steps = generate(self.system, cond, self.sampling(settings), noise, layout, given)
        while True:
            with torch.inference_mode():
                step: Step | None = next(steps, None)
            if step is None:
                return
            yield Progress(k=step.k, K=step.K, pictures=lambda step=step: _pictures(step))

    def reconstruct(self, pictures: Sequence[Picture]) -> list[Image.Image]:
        """What the tokenizer keeps of pictures: encode to tokens, decode."""
        with torch.inference_mode():
            tokens = self.tokens(pictures)
            return [to_pil(x) for x in self.system.tokenizer.decode(tokens, self.system.tokenizer.layout())]

    def tokens(self, pictures: Sequence[Picture]) -> Tensor:
        """The tokens [B, N, S] of pictures, which are cropped to the model's size."""
        with torch.inference_mode():
            return self.system.tokenizer.encode(self._batch(pictures), self.system.tokenizer.layout())

    def log_prob(
        self,
        pictures: Sequence[Picture],
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | Sequence[int] | None = None,
    ) -> Tensor:
        """log p(tokens of each picture | condition) in nats, float64 [B], of the unguided, unfiltered model."""
        with torch.inference_mode():
            tokens = self.tokens(pictures)
            cond = self.system.prepare(_request(prompt, class_labels, 1))
            if len(next(iter(cond.values()))) == 1:
                cond = {name: value.expand(len(tokens), *value.shape[1:]) for name, value in cond.items()}
            if isinstance(self.system, Parallel):
                return self.system.teacher(tokens, cond).log_prob(tokens).double().sum(1)
            return likelihood(self.system, tokens, cond, Noise.of(0, len(tokens), self.device))

    def _batch(self, pictures: Sequence[Picture]) -> Tensor:
        size = self.size[0]
        opened = [p if isinstance(p, Image.Image) else read_image(p) for p in pictures]
        return to_network(torch.stack([to_tensor(centre_crop(p.convert("RGB"), size)) for p in opened])).to(self.device)

    def _given(self, image: Picture | None, mask: Picture | None, layout: Layout, items: int) -> Pin | None:
        """The tokens of `image` outside the white part of `mask`."""
        if image is None and mask is None:
            return None
        if image is None or mask is None:
            raise ValueError("repainting needs both an image and a mask (white marks what is painted anew)")
        tokens = self.tokens([image])
        paint = self._batch([mask])[0].mean(0) > 0
        y, x = layout.levels[-1]
        cells = torch.nn.functional.adaptive_max_pool2d(paint[None, None].float(), (y, x))[0] > 0
        keep = keep_tokens(~cells, layout).to(self.device)
        return Pin(keep.expand(items, -1), tokens.expand(items, -1, -1))

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors, the hub's layout; atomic."""
        source = {**self.source, "name": self.name, "sampling": self.settings}
        return save_pretrained(self.system, to_dict(self.config), folder, system=self.slug, source=source)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """A folder that `save_pretrained` wrote, or its safetensors file alone."""
        found = read_pretrained(path)
        module = systems.system(found.system)
        config = from_dict(module.CONFIG, found.config)
        with torch.device("meta"):
            system = module.build(config)
        load_official(
            system,
            SAME_NAMES,
            {k: v.float() if v.is_floating_point() else v for k, v in found.tensors.items()},
            source=str(path),
        )
        name = found.source.get("name", Path(path).name)
        return cls(
            system.to(device),
            slug=found.system,
            name=name,
            config=config,
            settings=found.source.get("sampling", {}),
            source=found.source,
        )


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    weights: Mapping[str, str | Path] | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Model:
    """A model by name ("brush", "var-d16", ...), or a folder of `save_pretrained`.

    Models in the box load from the package. Others fetch their official files from the public hub, or take the files in
    `weights`, one per part ("tokenizer", "transformer", ...), and are converted. KeyError names the nearest name;
    WeightsError says what does not fit, with both shapes.
    """
    if isinstance(name, Path) or Path(name).is_dir():
        return Model.from_pretrained(name, device=device)
    slug, full, preset = systems.preset(name)
    if (SHIPPED / full).is_dir() and not weights:
        return Model.from_pretrained(SHIPPED / full, device=device)
    module, config = systems.system(slug), preset.config()
    files = {part: Path(path) for part, path in (weights or {}).items()}
    unknown = [part for part in files if part not in preset.files]
    if unknown:
        raise WeightsError(f"{full} has no part {unknown[0]!r}; its parts are {', '.join(preset.files) or 'none'}")
    if not preset.files:
        raise WeightsError(f"no weights of {full} are published: train it (arvis train {full}) and load its folder")
    if preset.licence:
        _log.info("%s: licence of the weights: %s", full, preset.licence)
    for part, file in preset.files.items():
        if part not in files:
            files[part] = fetch(
                file.repo,
                file.name,
                file.revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                sha256=file.sha256,
            )
    with torch.device("meta"):
        system = module.build(config)
    keys = module.keys(config)
    for part, path in files.items():
        load_official(system.parts()[part], keys[part], read(path, preset.files[part].inside), source=str(path))
    source = {"repo": ", ".join(sorted({f.repo for f in preset.files.values()})), "licence": preset.licence}
    return Model(system.to(device), slug=slug, name=full, config=config, settings=preset.sampling, source=source)


def _request(prompt: str | Sequence[str] | None, class_labels: int | Sequence[int] | None, n: int) -> dict[str, Any]:
    """Conditions, each repeated n times."""
    out: dict[str, Any] = {}
    if prompt is not None:
        out["prompt"] = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(n)]
    if class_labels is not None:
        out["class_labels"] = [
            c for c in ([class_labels] if isinstance(class_labels, int) else class_labels) for _ in range(n)
        ]
    return out


def _pictures(step: Step) -> list[Image.Image]:
    with torch.inference_mode():
        return [to_pil(x) for x in step.preview()]
