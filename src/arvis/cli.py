"""The command line: each command is a function, its parameters are the flags."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from arvis import __version__, systems
from arvis.config import from_dict, override

Set = Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")]


def generate(
    prompt: Positional[str],
    /,
    model: str = systems.DEFAULT,
    n: Annotated[int, arg(aliases=["-n"])] = 1,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("out.png"),
    seed: int = 0,
    preview: bool = False,
    image: Path | None = None,
    mask: Path | None = None,
    set: Set = (),
) -> None:
    """Paint pictures of a prompt (or of a class, where the model has classes: give its number).

    Args:
        prompt: What to paint, such as "a red apple"; a class number for class-conditional models.
        model: A model by name or folder; `arvis systems` lists the names.
        n: How many pictures.
        out: Where to write; several pictures become one grid.
        seed: The same seed paints the same pictures.
        preview: Write the picture after each step beside the result, too.
        image: A picture to repaint in part, together with --mask.
        mask: White where --image is painted anew.
        set: Sampling settings, such as cfg_scale=3 top_k=100.
    """
    import arvis
    from arvis.data.images import grid, save_image

    began = time.perf_counter()
    loaded = arvis.load(model)
    settings = _settings(set, loaded)
    what: dict[str, Any] = {"prompt": prompt}
    if "class_labels" in _conditions(loaded):
        what = {"class_labels": _number(prompt, loaded.name)}
    ready = time.perf_counter()
    _makable(out)
    request = {"model": loaded.name, **what, "n": n, "seed": seed, "settings": {**loaded.settings, **settings}}
    last = None
    with _bar(total=None, unit="step") as bar:
        for last in loaded.stream(**what, n=n, seed=seed, settings=settings, image=image, mask=mask):
            bar.total = last.K
            bar.update(last.k - bar.n)
            if preview and not last.done:
                save_image(grid(last.pictures(), _columns(n)), out.with_stem(f"{out.stem}-{last.k}"), request)
    if last is None:
        raise ValueError("the mask leaves nothing to paint: white marks what is painted anew")
    pictures = last.pictures()
    about = {"arvis": __version__, "request": request}
    save_image(grid(pictures, _columns(n)) if n > 1 else pictures[0], out, about)
    spent = time.perf_counter() - ready
    print(f"{out}: {n} picture{'s' * (n > 1)} in {spent:.1f} s ({n / spent:.1f}/s), loaded in {ready - began:.1f} s")


def train(
    name: Positional[str],
    /,
    stage: Literal["tokenizer", "generator"] = "generator",
    data: str = "emoji+scenes",
    run: Path = Path("runs/new"),
    init: Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
    set: Set = (),
) -> None:
    """Train one stage of a model; the run folder keeps settings, curves, pictures, checkpoints and the model.

    Args:
        name: A preset, such as brush-64.
        stage: The tokenizer first, then the generator on its tokens.
        data: "emoji", "scenes", "emoji+scenes", a folder of pictures, .parquet or .tar files.
        run: The run folder.
        init: A folder with weights to start from (RUN/model of an earlier stage).
        steps: Updates; the length of the schedule.
        minutes: Stop after this time, and save; --resume goes on.
        resume: Go on where the run in this folder stopped, by whatever.
        set: Further settings: fit.lr=3e-4 fit.batch=32 model.scale.depth=6 levels=4 size=64.
    """
    from arvis import recipes
    from arvis.training.fit import FitConfig

    _, _, preset = systems.preset(name)
    fit = {"steps": 1000, "batch": 64, **preset.training.get(stage, {})}
    fit |= {key: value for key, value in (("steps", steps), ("minutes", minutes)) if value is not None}
    model = tuple(text.removeprefix("model.") for text in set if text.startswith("model."))
    request = recipes.TrainRequest(
        name=name,
        stage=stage,
        data=data,
        run=run,
        fit=from_dict(FitConfig, fit),
        init=init,
        set=model,
        resume=resume,
    )
    request = override(request, [text for text in set if not text.startswith("model.")])
    _log_to_stderr()
    with _bar(total=request.fit.steps, unit="step") as bar:

        def show(info: Any) -> None:
            bar.update(info.step - bar.n)
            shown = {"loss": f"{info.metrics['loss']:.3f}", "img/s": f"{info.images_per_second:.0f}"}
            bar.set_postfix({**shown, "left": _duration(info.eta_seconds)}, refresh=False)

        result = recipes.train(request, on_step=show)
    print(f"{result.stopped} at step {result.step}; the model is {run / 'model'}, the report {run / 'report.html'}")


def finetune(
    folder: Positional[Path],
    /,
    model: str = systems.DEFAULT,
    run: Path = Path("runs/finetune"),
    steps: int = 500,
    minutes: float | None = None,
    resume: bool = False,
    set: Set = (),
) -> None:
    """Continue the training of a model on your own pictures; says first how well its tokenizer can show them.

    Args:
        folder: Pictures: one sub-folder per class, or captions beside them (captions.jsonl, or a .txt per picture).
        model: The model to start from, by name or folder.
        run: The run folder.
        steps: Updates.
        minutes: Stop after this time, and save.
        resume: Go on where the run stopped.
        set: Further settings, as in `arvis train`.
    """
    import arvis
    from arvis.recipes import tokenizer_psnr

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give one with pictures in it")
    loaded = arvis.load(model)
    start = run / "start"
    if not resume:
        loaded.save_pretrained(start)
    psnr = tokenizer_psnr(loaded.system, str(folder), loaded.size[0])
    verdict = "good" if psnr >= 24 else "the tokenizer is the bottleneck"
    print(f"the tokenizer shows these pictures at {psnr:.1f} dB ({verdict})")
    low = ("fit.lr=0.0002", "fit.warmup=20")
    train(loaded.name, "generator", str(folder), run, start, steps, minutes, resume, (*low, *set))


def reconstruct(
    pictures: Positional[tuple[Path, ...]],
    /,
    model: str = systems.DEFAULT,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("out.png"),
) -> None:
    """Show what a model's tokenizer keeps of pictures: originals above, reconstructions below.

    Args:
        pictures: Picture files.
        model: A model by name or folder.
        out: Where to write the pairs.
    """
    import arvis
    from arvis.data.images import centre_crop, grid, read_image, save_image, to_tensor
    from arvis.evaluation.metrics import psnr

    if not pictures:
        raise ValueError("give at least one picture to reconstruct")
    loaded = arvis.load(model)
    before = [centre_crop(read_image(p), loaded.size[0]) for p in pictures]
    after = loaded.reconstruct(before)
    _makable(out)
    save_image(grid([*before, *after], len(before)), out, {"arvis": __version__, "model": loaded.name})
    for path, a, b in zip(pictures, before, after, strict=True):
        print(f"{path}: {float(psnr(to_tensor(a)[None], to_tensor(b)[None])):.2f} dB")


def evaluate(
    what: Positional[Literal["emoji"]] = "emoji",
    /,
    model: str = systems.DEFAULT,
    out: Path = Path("evaluation"),
    seed: int = 0,
    quick: bool = False,
    set: Set = (),
) -> None:
    """Measure a model: reconstruction, retrieval by name, held-out compositions, the six scene skills, speed.

    Args:
        what: The benchmark.
        model: A model by name or folder.
        out: A folder for report.md, report.json and sample sheets.
        seed: Chooses prompts and pictures.
        quick: Fewer pictures, wider intervals.
        set: Sampling settings, such as cfg_scale=3.
    """
    import arvis
    from arvis.recipes import evaluate_emoji

    loaded = arvis.load(model)
    with _bar(total=None, unit="picture") as bar:
        report = evaluate_emoji(loaded, _settings(set, loaded), seed=seed, quick=quick, out=out, on_picture=bar.update)
    print(report)
    print(f"report: {out / 'report.md'}")


def list_systems() -> None:
    """List the systems, their models, and what they are."""
    for slug, row in systems.SYSTEMS.items():
        print(f"{slug:<16} {row.kind:<12} {row.title}")
        for name, preset in systems.system(slug).PRESETS.items():
            print(f"    {name:<24} {preset.licence or 'no published weights'}")


def info(name: Positional[str], /) -> None:
    """Show a model's configuration, size, layout and published results.

    Args:
        name: A preset, such as var-d16.
    """
    import torch

    from arvis.config import to_dict

    slug, full, preset = systems.preset(name)
    module, config = systems.system(slug), preset.config()
    with torch.device("meta"):
        system = module.build(config)
    print(f"{full}: {systems.SYSTEMS[slug].title}")
    for part, net in system.parts().items():
        count = sum(p.numel() for p in net.parameters())
        file = preset.files.get(part)
        print(f"  {part:<12} {count / 1e6:10.2f} M parameters  {f'{file.repo}/{file.name}' if file else ''}")
    layout = system.tokenizer.layout()
    levels = ", ".join("x".join(map(str, level)) for level in layout.levels)
    print(f"  layout       {layout.n} tokens in {layout.K} groups: {levels}")
    print(f"  licence      {preset.licence or 'no published weights'}")
    print(f"  sampling     {preset.sampling or system.Sampling()}")
    for result in module.RESULTS:
        if result.preset == full:
            print(f"  published    {result.metric} {result.value} ({result.settings}; {result.source})")
    print(json.dumps(to_dict(config), indent=2))


def parity(slug: Positional[str], /, fixture: Path | None = None, keys: Path | None = None) -> None:
    """Compare with recordings of the official code, tensor by tensor; exits with 1 if any differs.

    Args:
        slug: A system, such as var.
        fixture: A folder with config.json, weights.safetensors and io.safetensors; the search path has the default.
        keys: A full-size key layout (.json) to map on the meta device in both directions instead.
    """
    from arvis import parity as room

    systems.system(slug)
    if keys is not None:
        report = room.map_keys(slug, keys)
        print(report)
        sys.exit(0 if report.ok else 1)
    rows = room.run(slug, room.find(slug) if fixture is None else room.Fixture(fixture))
    for row in rows:
        print(row)
    failed = [row for row in rows if not row.ok]
    print(f"{len(rows) - len(failed)} of {len(rows)} tensors of {slug} agree with the official recording")
    sys.exit(1 if failed else 0)


def check(slug: Positional[str], /, mutants: bool = False) -> None:
    """Run a system's claim at laptop scale; exits with 1 if it does not hold.

    Args:
        slug: A system, such as var.
        mutants: Also break the trained model on purpose, and require that the check notices.
    """
    from arvis import checks

    systems.system(slug)
    _log_to_stderr()
    with _bar(total=None, unit="step") as bar:
        claims = checks.run(slug, mutants, bar.update)
    for claim in claims:
        print(claim)
    sys.exit(0 if all(claim.ok for claim in claims) else 1)


def convert(
    name: Positional[str], out: Positional[Path], /, weights: tuple[str, ...] = (), official: bool = False
) -> None:
    """Convert official weights to our folder, or one of our folders to official files.

    Args:
        name: A preset (var-d16), or with --official a folder of ours.
        out: The folder to write.
        weights: Official files on disk, PART=FILE (tokenizer=vae.pth transformer=var_d16.pth); else from the hub.
        official: The other way round: one safetensors file per part, with the official names.
    """
    import arvis

    if official:
        from safetensors.torch import save_file

        from arvis.weights import to_official

        loaded = arvis.load(name)
        keys = systems.system(loaded.slug).keys(loaded.config)
        out.mkdir(parents=True, exist_ok=True)
        for part, net in loaded.system.parts().items():
            tensors = {k: v.contiguous().clone() for k, v in to_official(net, keys[part]).items()}
            partial = out / f".{part}.partial"
            save_file(tensors, partial)
            partial.replace(out / f"{part}.safetensors")
            print(f"{out / part}.safetensors: {len(tensors)} tensors")
        return
    pairs = dict(text.split("=", 1) for text in weights if "=" in text)
    if len(pairs) != len(weights):
        raise ValueError(f"--weights takes PART=FILE, got {' '.join(weights)}")
    loaded = arvis.load(name, weights=pairs)
    print(f"{loaded.save_pretrained(out)}: {loaded.name}, licence {loaded.source.get('licence') or 'unknown'}")


def doctor() -> None:
    """Say what this machine has, what arvis makes of it, and what to do about what is missing."""
    from arvis import doctor as room

    for finding in room.examine():
        print(finding)


COMMANDS = {
    "generate": generate,
    "train": train,
    "finetune": finetune,
    "reconstruct": reconstruct,
    "evaluate": evaluate,
    "systems": list_systems,
    "info": info,
    "parity": parity,
    "check": check,
    "convert": convert,
    "doctor": doctor,
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: errors of the user's making are one line on stderr and exit code 2; Ctrl-C is 130."""
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"arvis {__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="arvis", description="Autoregressive visual generation.", args=args, sort_subcommands=False
        )
    except (ValueError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"arvis: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("arvis: interrupted", file=sys.stderr)
        sys.exit(130)


# -- small change -------------------------------------------------------------------------------------------------


def _settings(texts: Sequence[str], loaded: Any) -> dict[str, Any]:
    """--set key=value as sampling settings, checked against the model's."""
    from arvis.config import to_dict

    kind = loaded.sampling()
    changed = override(kind, list(texts))
    return {f.name: to_dict(changed)[f.name] for f in fields(kind) if any(t.split("=")[0] == f.name for t in texts)}


def _conditions(loaded: Any) -> tuple[str, ...]:
    return loaded.system.conditions


def _number(text: str, name: str) -> int:
    with suppress(ValueError):
        return int(text)
    raise ValueError(f"{name} paints classes: give a class number instead of {text!r}")


def _makable(out: Path) -> None:
    """Fail before the work, not after it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; give the name of a picture, such as {out / 'apple.png'}")


def _columns(n: int) -> int:
    return next(c for c in range(1, n + 1) if c * c >= n)


def _bar(total: int | None, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, dynamic_ncols=True, disable=None if sys.stderr.isatty() else True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


if __name__ == "__main__":
    main()
