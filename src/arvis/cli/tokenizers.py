"""The command that measures a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from arvis import __version__, systems
from arvis.cli.terminal import place_for_folder, progress

SHOWN = 12
"""Pictures shown beside their reconstructions."""


def tokenizer(
    name: Positional[str] = systems.DEFAULT,
    /,
    data: str = "emoji",
    split: Literal["train", "heldout", "all"] = "train",
    pictures: Annotated[int, arg(aliases=["-n"])] = 1000,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("tokenizer"),
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Measure a model's tokenizer: how its codes are used level by level, or its channels; what pictures lose.

    Args:
        name: A model by name or folder.
        data: "emoji", "scenes", "emoji+scenes", a folder of pictures, .parquet or .tar files.
        split: Which part of the data.
        pictures: How many pictures are measured, at most all of them.
        out: A folder for report.md, report.json and pairs.png (pictures above their reconstructions).
        seed: Chooses the pictures, and the noise where tokens are drawn.
        device: cpu, cuda, or auto: a GPU where there is one.
    """
    import torch

    import arvis
    from arvis.data import open_data
    from arvis.data.batches import Batches, BatchesConfig
    from arvis.data.images import grid, save_image
    from arvis.evaluation.tokenizers import measure
    from arvis.training.checkpoint import write_text

    if pictures < 1:
        raise ValueError(f"a tokenizer is measured on at least one picture, got --pictures {pictures}")
    place_for_folder(out)
    loaded = arvis.load(name, device=device)
    found = open_data(data, loaded.size[0], seed, split)
    count = min(pictures, len(found))
    batches = Batches(found, BatchesConfig(batch=min(count, 25), seed=seed))
    about = {"arvis": __version__, "model": loaded.name, "data": data, "split": split, "seed": seed}

    def read() -> Iterator[torch.Tensor]:
        for first in range(0, count, batches.config.batch):
            x = batches.batch_at(first // batches.config.batch)["image"]
            yield x[: count - first].to(loaded.device)

    with progress(count, "picture") as bar:
        report = measure(loaded.system.tokenizer, read(), loaded.layout, about, seed, bar.update)
    shown = next(read())[:SHOWN]
    with torch.inference_mode():
        tokens = loaded.system.tokenizer.encode(shown, loaded.layout)
        pairs = torch.cat((shown, loaded.system.tokenizer.decode(tokens, loaded.layout)))
    save_image(grid(pairs, len(shown)), out / "pairs.png", about)
    write_text(out / "report.md", report.to_markdown())
    write_text(out / "report.json", report.to_json())
    print(f"{loaded.name}\n\n{report}\n\nreport: {out / 'report.md'}, pictures: {out / 'pairs.png'}")
