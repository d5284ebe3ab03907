"""The public face: `load` a model by name or folder; `generate`, `stream`, `reconstruct`, `log_prob`, save and load."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from arvis.config import from_dict, to_dict
from arvis.data.images import centre_crop, read_image, to_network, to_pil, to_tensor
from arvis.editing import Box, box_picture, keep_tokens, refuse_other_axes
from arvis.loading import Loaded, by_name, compile_steps, from_folder, picture_size, resolve_device, with_adapters
from arvis.nn import packed
from arvis.nn.rounded import STORES, Bits
from arvis.noise import Noise
from arvis.search import Search
from arvis.state import Parallel, Resizable
from arvis.tokens import Layout, Pin
from arvis.training.precision import Choice, Precision, pick
from arvis.walk import likelihood, walk
from arvis.weights import save_pretrained

BATCH = 64
"""Pictures that pass through a network together; more are done one batch after another, in the same memory."""

MOST_BYTES = 2**30
"""Pixels that one call returns at most."""

RANGES = {"temperature": (0.0, math.inf), "top_k": (0, math.inf), "top_p": (0.0, 1.0)}
"""What sampling settings of these names can be, in every system that has them; 0 turns the filters off."""

Picture = Image.Image | str | Path


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of a generation: `k` of `K` groups are decided, counted over all batches.

    `pictures()` decodes what is known so far, `tokens()` is [B, N, S]; both of the batches that were begun, and before
    the next step only.
    """

    k: int
    K: int
    pictures: Callable[[], list[Image.Image]]
    tokens: Callable[[], Tensor]

    @property
    def done(self) -> bool:
        return self.k >= self.K


class Model:
    """A system with its weights, ready to use. `settings` are the sampling settings it is used with by default.

    Networks run in the number format of `precision`. Weights are float32, unless the model is `fast`: then they lie in
    the format and layout of their products (`arvis.nn.packed`), which is quicker and takes less memory, most of all for
    few pictures; such a model cannot be saved or adapted.
    """

    def __init__(
        self,
        system: Any,
        *,
        slug: str,
        name: str,
        config: Any,
        settings: Mapping[str, Any],
        source: Mapping[str, Any],
        precision: Choice = "float32",
        fast: bool = False,
        quantize: Bits | None = None,
        compile: bool = False,
        offload: torch.device | None = None,
    ) -> None:
        self.system, self.fast = system.eval(), fast or quantize is not None or offload is not None
        if quantize is not None and quantize not in STORES:
            raise ValueError(f"quantize is {' or '.join(STORES)}, got {quantize!r}")
        if offload is not None and quantize is not None:
            raise ValueError(f"offload and quantize={quantize!r} are two ways to save memory: give one of them")
        if offload is not None:
            packed.offload(self.system, offload)
        for role, part in self.system.parts().items() if self.fast and offload is None else ():
            packed.pack(part, STORES[quantize] if quantize and role != "tokenizer" else packed.Forms)
        if compile:
            compile_steps(self.system, name)
        self.slug, self.name, self.config = slug, name, config
        self.settings, self.source = dict(settings), dict(source)
        self.precision: Precision = pick(self.device, precision)

    @property
    def device(self) -> torch.device:
        return next(self.system.parameters()).device

    @property
    def layout(self) -> Layout:
        """Where the tokens of a picture lie."""
        return self.system.tokenizer.layout()

    @property
    def size(self) -> tuple[int, int]:
        """(Y, X) pixels of a picture."""
        return picture_size(self.system)

    def sampling(self, settings: Mapping[str, Any] | None = None) -> Any:
        """The sampling settings, with changes; ConfigError naming the nearest for an unknown one, ValueError for a
        number that is none of its kind."""
        kind = self.system.Sampling
        known = {f.name for f in fields(kind)}
        out = from_dict(kind, {**{k: v for k, v in self.settings.items() if k in known}, **(settings or {})})
        for name, value in to_dict(out).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is a number, got {value}")
            low, high = RANGES.get(name, (-math.inf, math.inf))
            if isinstance(value, int | float) and not low <= value <= high:
                most = f" and at most {high:g}" if math.isfinite(high) else ""
                raise ValueError(f"{name} is at least {low:g}{most}, got {value}")
        return out

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
        mask: Picture | Box | None = None,
        search: Search | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> list[Image.Image]:
        """Pictures of a prompt or class: `n` of each. The same request gives the same pictures.

        Picture i depends on (prompt, settings, seed, i) and on nothing else, so asking for more adds to those there.
        `settings` changes sampling settings ("cfg_scale", "top_k", "top_p", ...). With `image`, only the white part of
        `mask` (or the inside of a box of fractions) is painted anew and the rest is kept (approximately: what is kept
        are tokens); with a mask that is white inside, outside or under another prompt this is in-painting, out-painting
        and editing. With a `search` each picture is the best of several paths.

        Raises ValueError for a condition the model does not take, one of image and mask alone, a mask of another shape
        than its image, and too many pictures.
        """
        last = None
        for last in self.stream(
            prompt,
            class_labels=class_labels,
            n=n,
            seed=seed,
            settings=settings,
            image=image,
            mask=mask,
            search=search,
        ):
            if on_step is not None:
                on_step(last)
        assert last is not None, "a stream has at least one step"
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
        mask: Picture | Box | None = None,
        search: Search | None = None,
    ) -> Iterator[Progress]:
        """The steps of `generate`, coarse to fine. Stop iterating to cancel; call `pictures` before the next step.

        Of a search, the steps show all paths that go on, those of a picture side by side.
        """
        if n < 1:
            raise ValueError(f"n is the number of pictures, at least 1, got {n}")
        sampling = self.sampling(settings)
        layout = self._layout(sampling)
        with self._running():
            request = self._request(prompt, class_labels)
            cond = self.system.prepare(request)
            asked = next(iter(request.values()), [None])
            prompts = len(next(iter(cond.values()), [None]))
            given = self._given(image, mask, layout)
            self._affordable(n * prompts, layout)
            seeds = Noise.of(seed, n, self.device).seed_B.repeat(prompts)
            which = torch.arange(n * prompts, device=self.device) // n
        size = BATCH if search is None else max(1, BATCH // search.most)
        batches = [slice(first, first + size) for first in range(0, n * prompts, size)]
        pictures: list[Image.Image] = []
        tokens: list[Tensor] = []
        for b, rows in enumerate(batches):
            before, drawn = tuple(pictures), tuple(tokens)

            def told(k: int, K: int, now: Callable[[], Tensor], x: Tensor, b=b, before=before, drawn=drawn) -> Progress:
                return Progress(
                    k=b * K + k,
                    K=len(batches) * K,
                    pictures=lambda: [*before, *self._pil(now)],
                    tokens=lambda: torch.cat((*drawn, x)),
                )

            last = None
            with self._running():
                noise = Noise(seeds[rows])
                pin = None if given is None else Pin(*(t.expand(len(noise), *t.shape[1:]) for t in given))
                part = {name: v[which[rows]] for name, v in cond.items()}
                s = self.system.start(part, sampling, noise, layout, pin)
                steps = walk(self.system, s)
                if search is not None:
                    steps = search(self.system, s, [asked[i] for i in which[rows].tolist()])
            while True:
                with self._running():
                    step = next(steps, None)
                if step is None:
                    break
                if step.k >= step.K:
                    step.state.cache.clear()  # nothing reads it any more, and the pictures need room
                last = told(step.k, step.K, step.preview, step.state.tokens)
                yield last
            if last is None and pin is not None:  # everything was given
                x = pin.value
                last = told(layout.K, layout.K, lambda x=x: self.system.tokenizer.decode(x, layout), x)
                yield last
            if last is not None and rows is not batches[-1]:
                pictures, tokens = last.pictures(), [last.tokens()]

    def reconstruct(self, pictures: Sequence[Picture]) -> list[Image.Image]:
        """What the tokenizer keeps of pictures: encode to tokens, decode."""
        tokens = self.tokens(pictures)
        return [
            image
            for part in tokens.split(BATCH)
            for image in self._pil(lambda part=part: self.system.tokenizer.decode(part, self.layout))
        ]

    def tokens(self, pictures: Sequence[Picture]) -> Tensor:
        """The tokens [B, N, S] of pictures, which are cropped to the model's size."""
        if not pictures:
            raise ValueError("at least one picture is needed, got none")
        return self._tokens(pictures, self.layout)

    def log_prob(
        self,
        pictures: Sequence[Picture],
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | Sequence[int] | None = None,
    ) -> Tensor:
        """log p(tokens of each picture | condition) in nats, float64 [B], of the unguided, unfiltered model.

        One condition for all pictures, or one for each; ValueError for other numbers of them.
        """
        tokens = self.tokens(pictures)
        out = []
        with self._running():
            cond = self.system.prepare(self._request(prompt, class_labels))
            count = len(next(iter(cond.values()), tokens))
            if count not in (1, len(tokens)):
                raise ValueError(f"log_prob takes one condition or one per picture: {count} for {len(tokens)} pictures")
            for rows in torch.arange(len(tokens), device=self.device).split(BATCH):
                x = tokens[rows]
                c = {name: v.expand(len(x), *v.shape[1:]) if count == 1 else v[rows] for name, v in cond.items()}
                if isinstance(self.system, Parallel):
                    out.append(self.system.teacher(x, c).log_prob(x).double().sum(1))
                else:
                    out.append(likelihood(self.system, x, c, Noise.of(0, len(x), self.device)))
        return torch.cat(out)

    # -- between pictures and networks ----------------------------------------------------------------------------

    def _running(self) -> ExitStack:
        """No gradients, and the number format of this model."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(self.precision.around())
        return stack

    def _pil(self, decode: Callable[[], Tensor]) -> list[Image.Image]:
        with self._running():
            return [to_pil(x) for x in decode()]

    def _layout(self, sampling: Any) -> Layout:
        """Where the tokens of a generation lie, which is a setting of some systems."""
        return self.system.layout(sampling) if isinstance(self.system, Resizable) else self.layout

    def _pixels(self, layout: Layout) -> tuple[int, int]:
        """(Y, X) pixels of a picture whose tokens lie like this."""
        (y, x), cell = layout.levels[-1], self.system.tokenizer.config.downsample
        return y * cell, x * cell

    def _tokens(self, pictures: Sequence[Picture], layout: Layout) -> Tensor:
        with self._running():
            parts = [pictures[first : first + BATCH] for first in range(0, len(pictures), BATCH)]
            return torch.cat([self.system.tokenizer.encode(self._batch(part, layout), layout) for part in parts])

    def _batch(self, pictures: Sequence[Picture], layout: Layout) -> Tensor:
        cropped = [to_tensor(centre_crop(_open(p), self._pixels(layout))) for p in pictures]
        return to_network(torch.stack(cropped)).to(self.device)

    def _request(
        self, prompt: str | Sequence[str] | None, class_labels: int | Sequence[int] | None
    ) -> dict[str, list[Any]]:
        """The conditions as lists, refused where the model does not take them."""
        takes = tuple(self.system.conditions)
        out: dict[str, list[Any]] = {}
        for name, value in (("prompt", prompt), ("class_labels", class_labels)):
            if value is None:
                continue
            if name not in takes:
                raise ValueError(f"{self.name} takes {' and '.join(takes) or 'no condition'}, not {name}={value!r}")
            out[name] = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
            if not out[name]:
                raise ValueError(f"{name} is empty; give at least one")
        wrong = [p for p in out.get("prompt", ()) if not isinstance(p, str)]
        if wrong:
            raise ValueError(f"a prompt is text, got {wrong[0]!r} of type {type(wrong[0]).__name__}")
        try:
            return {name: [*map(operator.index, v)] if name == "class_labels" else v for name, v in out.items()}
        except TypeError:
            raise ValueError(f"class_labels are whole numbers, got {class_labels!r}") from None

    def _affordable(self, count: int, layout: Layout) -> None:
        """ValueError where so many pictures would not fit into memory."""
        y, x = self._pixels(layout)
        bytes_each = 3 * y * x
        if count * bytes_each > MOST_BYTES:
            raise ValueError(
                f"{count} pictures of {x}x{y} take {count * bytes_each / 2**30:,.1f} GiB; one call makes at most "
                f"{MOST_BYTES // bytes_each}: ask for fewer, several times, with other seeds"
            )

    def _given(self, image: Picture | None, mask: Picture | Box | None, layout: Layout) -> Pin | None:
        """The tokens [1, N, S] of `image` outside the white part of `mask`; None where nothing is kept."""
        if image is None and mask is None:
            return None
        if image is None or mask is None:
            has, lacks = ("a mask", "an image") if image is None else ("an image", "a mask")
            raise ValueError(
                f"got {has} without {lacks}: painting a part anew needs both (white marks what is painted)"
            )
        refuse_other_axes(layout)
        picture = _open(image)
        white = box_picture(mask, picture.size) if isinstance(mask, tuple | list) else _open(mask)
        if abs(picture.width * white.height / (picture.height * white.width) - 1) > 0.02:
            raise ValueError(
                f"the mask is {white.width}x{white.height}, the image {picture.width}x{picture.height}: "
                "a mask has the shape of its image"
            )
        keep = keep_tokens(self._batch([white], layout)[0].mean(0) <= 0, layout)
        if not keep[:, layout.span(layout.K - 1)].any():
            return None
        return Pin(keep.to(self.device), self._tokens([picture], layout))

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors, the hub's layout; atomic. ValueError for a fast model."""
        self._plain("saved")
        source = {**self.source, "name": self.name, "sampling": self.settings}
        return save_pretrained(self.system, to_dict(self.config), folder, system=self.slug, source=source)

    def with_lora(self, path: str | Path) -> Self:
        """This model with the LoRA adapters of a file (`arvis finetune --lora 8` writes one) merged into its weights.

        The model itself stays as it is. Raises WeightsError for adapters of another model, or of other weights.
        """
        self._plain("adapted")
        own = Loaded(**{f.name: getattr(self, f.name) for f in fields(Loaded)})
        out = type(self)(**vars(with_adapters(own, path)))
        out.precision = self.precision
        return out

    def _plain(self, what: str) -> None:
        if self.fast:
            raise ValueError(f"a fast model has no weights that could be {what}: load it with fast=False")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        precision: Choice = "float32",
        fast: bool = False,
        quantize: Bits | None = None,
        compile: bool = False,
        revision: str = "main",
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        anyway: bool = False,
    ) -> Self:
        """A folder that `save_pretrained` wrote, its safetensors file alone, or "owner/name" of one on the hub.

        Raises WeightsError where there is none, or its tensors are not those of its configuration.
        """
        found = from_folder(
            path,
            device,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            anyway=anyway,
        )
        return cls(**vars(found), precision=precision, fast=fast, quantize=quantize, compile=compile)


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    precision: Choice = "float32",
    fast: bool = False,
    quantize: Bits | None = None,
    compile: bool = False,
    offload: bool = False,
    weights: Mapping[str, str | Path] | str | Path | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    anyway: bool = False,
) -> Model:
    """A model by name ("brush", "var-d16", ...), or a folder of `save_pretrained` (one called like a model: "./brush").

    Models in the box load from the package. Others fetch their official files from the public hub, once, and are
    converted; the log says before which files, their size and licence, and the memory it takes. `weights` are files on
    disk instead: by part ({"transformer": "var_d16.pth"}), one official file, or a folder of them. `device` "auto" is a
    GPU where there is one; `precision` "auto" computes in bfloat16 where that pays; `fast` is for painting alone: the
    same pictures sooner, but the model cannot be saved or adapted. `quantize` keeps the generator's weights in 8 or 4
    bits: a quarter or a sixth of the memory, at the loss that docs/performance.md has measured. `compile` runs the
    steps of a system of one code per step as one graph, which takes half a minute to make; ValueError for others.
    `offload` keeps the weights of products in the memory of the host, and copies each to the GPU when it is multiplied:
    slow, for a GPU on which the model does not fit.

    KeyError names the nearest name. WeightsError says what does not fit: a tensor, with both shapes; the memory or the
    disk, with numbers (`anyway` tries it all the same).
    """
    place = resolve_device(device)
    if offload and place.type == "cpu":
        raise ValueError("offload keeps weights on the host for a GPU, and the device is the host's cpu: leave it out")
    found = by_name(
        name,
        "cpu" if offload else place,
        weights=weights,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        anyway=anyway,
    )
    return Model(
        **vars(found),
        precision=precision,
        fast=fast,
        quantize=quantize,
        compile=compile,
        offload=place if offload else None,
    )


def _open(picture: Picture) -> Image.Image:
    return picture.convert("RGB") if isinstance(picture, Image.Image) else read_image(picture)
