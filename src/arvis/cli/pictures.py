"""Commands that make and measure pictures: generate, reconstruct, evaluate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from arvis import __version__, systems
from arvis.cli.settings import Set
from arvis.cli.terminal import log_lines, place_for_folder, place_for_picture, progress
from arvis.config import override, to_dict

FURTHER = ("load.", "search.")


@dataclass(frozen=True, kw_only=True)
class Load:
    """`--set load.*`: the arguments of `arvis.load` of these names."""

    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    fast: bool = True
    quantize: Literal["int8", "int4"] | None = None
    compile: bool = False
    offload: bool = False


@dataclass(frozen=True, kw_only=True)
class Looking:
    """`--set search.*`: the reward that a search looks for, and the features that it tells pictures apart by."""

    reward: str = "emoji"
    features: str = "colours"


@dataclass(frozen=True, kw_only=True)
class Further:
    """What `--set` can say besides sampling settings."""

    load: Load = Load()
    search: Looking = Looking()


def generate(
    prompt: Positional[str],
    /,
    model: str = systems.DEFAULT,
    n: Annotated[int, arg(aliases=["-n"])] = 1,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("out.png"),
    seed: int = 0,
    preview: bool = False,
    image: Path | None = None,
    mask: str | None = None,
    search: str | None = None,
    device: str = "auto",
    set: Set = (),
) -> None:
    """Paint pictures of a prompt (or of a class, where the model has classes: give its number or name).

    Args:
        prompt: What to paint, such as "a red apple"; a class, by number or name, for class-conditional models.
        model: A model by name or folder; `arvis systems` lists the names.
        n: How many pictures.
        out: Where to write; several pictures become one grid.
        seed: The same seed paints the same pictures.
        preview: Write the picture after each step beside the result, too.
        image: A picture to repaint in part, together with --mask.
        mask: A picture that is white where --image is painted anew, or a box y0,x0,y1,x1 in fractions of it.
        search: Make each picture the best of several paths: tts-var, or tts-var:16 for so many instead of eight.
        device: cpu, cuda, or auto: a GPU where there is one.
        set: Sampling settings, such as cfg_scale=3 top_k=100; load.* says how weights are kept and multiplied
            (precision, fast, quantize, compile, offload: the arguments of arvis.load), search.reward what a search
            looks for (emoji, scene, picture, clip, clip:MODEL), search.features what it tells unfinished pictures
            apart by (colours, dinov2, dinov2:MODEL).
    """
    import arvis
    from arvis.data.images import grid, read_image, save_image

    began = time.perf_counter()
    place_for_picture(out)
    texts = [text for text in set if not text.startswith(FURTHER)]
    further = override(Further(), [text for text in set if text.startswith(FURTHER)])
    if search is None and further.search != Looking():
        raise ValueError("search.* says what a search looks for, and there is none: add --search tts-var")
    where = None if mask is None else _box(mask) or Path(mask)
    if isinstance(where, Path) and max(read_image(where).convert("L").tobytes()) < 128:
        raise ValueError(f"{mask} has no white, and white marks what is painted anew")
    with log_lines():
        loaded = arvis.load(model, device=device, **vars(further.load))
    settings = _settings(texts, loaded)
    what: dict[str, Any] = {"prompt": prompt}
    if "class_labels" in loaded.system.conditions:
        what = {"class_labels": _number(prompt, loaded.name, loaded.source.get("classes", ()))}
    ready = time.perf_counter()
    request = {"model": loaded.name, **what, "n": n, "seed": seed, "settings": to_dict(loaded.sampling(settings))}
    request |= {name: str(path) for name, path in (("image", image), ("mask", mask)) if path is not None}
    way = None if search is None else _search(search, further.search, loaded.layout.K)
    request |= {} if search is None else {"search": search, **to_dict(further.search)}
    columns = math.isqrt(max(n - 1, 0)) + 1
    last = None
    with progress(None, "step") as bar:
        for last in loaded.stream(**what, n=n, seed=seed, settings=settings, image=image, mask=where, search=way):
            bar.total = last.K
            bar.update(last.k - bar.n)
            if preview and not last.done:
                about = {"arvis": __version__, "request": request, "step": last.k, "of": last.K}
                save_image(grid(last.pictures(), columns), out.with_stem(f"{out.stem}-{last.k}"), about)
        bar.refresh()  # steps may be quicker than the bar is redrawn
    assert last is not None, "a stream has at least one step"
    pictures, about = last.pictures(), {"arvis": __version__, "request": request}
    save_image(grid(pictures, columns) if n > 1 else pictures[0], out, about)
    spent = time.perf_counter() - ready
    print(f"{out}: {n} picture{'s' * (n > 1)} in {spent:.1f} s ({n / spent:.1f}/s), loaded in {ready - began:.1f} s")


def reconstruct(
    pictures: Positional[tuple[Path, ...]],
    /,
    model: str = systems.DEFAULT,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("out.png"),
    device: str = "auto",
) -> None:
    """Show what a model's tokenizer keeps of pictures: originals above, reconstructions below.

    Args:
        pictures: Picture files.
        model: A model by name or folder.
        out: Where to write the pairs.
        device: cpu, cuda, or auto: a GPU where there is one.
    """
    import arvis
    from arvis.data.images import centre_crop, grid, read_image, save_image, to_tensor
    from arvis.evaluation.metrics import psnr

    if not pictures:
        raise ValueError("give at least one picture to reconstruct")
    place_for_picture(out)
    opened = [read_image(path) for path in pictures]
    with log_lines():
        loaded = arvis.load(model, device=device)
    before = [centre_crop(image, loaded.size) for image in opened]
    after = loaded.reconstruct(before)
    about = {"arvis": __version__, "model": loaded.name, "pictures": [path.name for path in pictures]}
    save_image(grid([*before, *after], len(before)), out, about)
    for path, a, b in zip(pictures, before, after, strict=True):
        print(f"{path}: {float(psnr(to_tensor(a)[None], to_tensor(b)[None])):.2f} dB")


def evaluate(
    what: Positional[Literal["emoji"]] = "emoji",
    /,
    model: str = systems.DEFAULT,
    out: Path = Path("evaluation"),
    seed: int = 0,
    quick: bool = False,
    device: str = "auto",
    set: Set = (),
) -> None:
    """Measure a model: reconstruction, retrieval by name, held-out compositions, the six scene skills, speed.

    Args:
        what: The benchmark.
        model: A model by name or folder.
        out: A folder for report.md, report.json and sample sheets.
        seed: Chooses prompts and pictures.
        quick: Fewer pictures, wider intervals.
        device: cpu, cuda, or auto: a GPU where there is one.
        set: Sampling settings, such as cfg_scale=3.
    """
    import arvis
    from arvis.recipes import evaluate_emoji

    place_for_folder(out)
    with log_lines():
        loaded = arvis.load(model, device=device)
    with progress(None, "picture") as bar:
        report = evaluate_emoji(loaded, _settings(set, loaded), seed=seed, quick=quick, out=out, on_picture=bar.update)
    print(report)
    print(f"report: {out / 'report.md'}")


def _settings(texts: Sequence[str], loaded: Any) -> dict[str, Any]:
    """--set key=value as sampling settings, checked against the model's."""
    changed = to_dict(override(loaded.sampling(), list(texts)))
    return {name: value for name, value in changed.items() if any(t.split("=")[0].strip() == name for t in texts)}


def _search(text: str, looking: Looking, scales: int) -> Any:
    """A search by name, perhaps with its number of paths, that looks for a reward and tells pictures apart."""
    from arvis import rewards

    name, _, paths = text.partition(":")
    module = systems.system(name)
    if not hasattr(module, "searching"):
        known = [slug for slug in systems.SYSTEMS if hasattr(systems.system(slug), "searching")]
        raise ValueError(f"{name} is no search; there are {', '.join(known)}")
    if paths and (not paths.isdigit() or int(paths) < 1):
        raise ValueError(f"the number of paths is a whole number, at least 1, got {paths!r}")
    return module.searching(rewards.reward(looking.reward), scales, int(paths or 8), looking.features)


def _box(text: str) -> tuple[float, float, float, float] | None:
    """Four numbers with commas between them; None for a file."""
    try:
        y0, x0, y1, x1 = map(float, text.split(","))
    except ValueError:
        return None
    return y0, x0, y1, x1


def _number(text: str, name: str, classes: Sequence[str]) -> int:
    if text in classes:
        return classes.index(text)
    try:
        return int(text)
    except ValueError:
        known = f", or one of {', '.join(classes[:12])}" if classes else ""
        raise ValueError(f"{name} paints classes: give a class number instead of {text!r}{known}") from None
