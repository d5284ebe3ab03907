"""Where pictures enter and leave: PIL on the outside, tensors inside."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

METADATA_KEY = "arvis"


class UnreadableImageError(OSError):
    """A file or byte string that is not a whole picture; the message names it and says why."""


def read_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """A picture file (or its bytes) as RGB, turned as its EXIF data asks, transparency on white.

    Raises FileNotFoundError for a missing file and UnreadableImageError for everything that does not decode completely.
    `name` is what errors call the bytes.
    """
    if isinstance(source, bytes):
        label, stream = name or f"{len(source)} bytes", io.BytesIO(source)
    else:
        label = name or str(source)
        if not Path(source).exists():
            raise FileNotFoundError(f"no picture at {label}")
        try:
            stream = io.BytesIO(Path(source).read_bytes())
        except OSError as error:
            raise UnreadableImageError(f"cannot read {label}: {error.strerror or error}") from error
    try:
        with Image.open(stream) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders of broken files raise nearly anything
        reason = "not a picture file Pillow knows" if "cannot identify" in str(error) else str(error) or repr(error)
        raise UnreadableImageError(f"cannot decode {label}: {reason}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert("RGB") would clip to white
        deep = np.asarray(image, np.float64)
        return Image.fromarray((deep / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """The middle of a picture at `size` x `size`, or (Y, X), with the filters of ADM's evaluation code (2105.05233).

    The picture is halved by box averages while each side is at least twice its size, then resized (bicubic) so that it
    just covers the size, then cropped.
    """
    y, x = (size, size) if isinstance(size, int) else size
    image = _covering(image, y, x)
    left, top = (image.width - x) // 2, (image.height - y) // 2
    return image.crop((left, top, left + x, top + y))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator, smallest: float = 0.8) -> Image.Image:
    """A random square of at least `smallest` of the short side, at `size` x `size`, filtered as in `centre_crop`."""
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest must be in (0, 1], got {smallest}")
    side = int(rng.integers(size, math.ceil(size / smallest) + 1))
    image = _covering(image, side, side)
    left, top = int(rng.integers(image.width - size + 1)), int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def random_flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirrored left to right with probability one half."""
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _covering(image: Image.Image, y: int, x: int) -> Image.Image:
    if min(y, x) < 1:
        raise ValueError(f"a picture needs a positive size, got {y if y == x else (y, x)}")
    while image.width >= 2 * x and image.height >= 2 * y:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(x / image.width, y / image.height)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB")).transpose(2, 0, 1).copy())


def to_network(image: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1], any shape."""
    if image.dtype != torch.uint8:
        raise ValueError(f"expected a uint8 picture, got {image.dtype}")
    return image.float() / 127.5 - 1


def to_bytes(image: Tensor) -> Tensor:
    """Float in [-1, 1] (clamped) -> uint8 in [0, 255], any shape; uint8 passes through."""
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"expected a uint8 or float picture, got {image.dtype}")
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] or [1, H, W], uint8 or float in [-1, 1], on any device."""
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected a picture [3, H, W] or [1, H, W], got shape {tuple(image.shape)}")
    pixels_HWC = to_bytes(image.detach()).cpu().permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    return Image.fromarray(pixels_HWC)


def grid(images: Tensor | Sequence[Tensor | Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures row by row in one; cells have the size of the largest, the last row may be short, gaps are white."""
    cells = [image if isinstance(image, Image.Image) else to_pil(image) for image in images]
    if not cells or columns < 1:
        raise ValueError(f"a grid needs at least one picture and one column, got {len(cells)} and {columns}")
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for k, cell in enumerate(cells):
        sheet.paste(cell, (k % columns * (width + gap), k // columns * (height + gap)))
    return sheet


def save_image(image: Image.Image | Tensor, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a picture whole or not at all; the suffix chooses the format.

    Metadata is stored as JSON: in a PNG as international text under "arvis", in JPEG and WebP as the EXIF description.
    """
    path = Path(path)
    image = to_pil(image) if isinstance(image, Tensor) else image
    formats = Image.registered_extensions()
    if path.suffix.lower() not in formats:
        raise ValueError(f"cannot tell a picture format from {path.name!r}; end it in .png, .jpg or .webp")
    kind = formats[path.suffix.lower()]
    options: dict[str, Any] = {}
    if metadata is not None:
        text = json.dumps(dict(metadata), ensure_ascii=kind != "PNG")
        if kind == "PNG":
            info = PngInfo()
            info.add_itxt(METADATA_KEY, text)
            options["pnginfo"] = info
        elif kind in ("JPEG", "WEBP"):
            exif = Image.Exif()
            exif[ExifTags.Base.ImageDescription] = text
            options["exif"] = exif
        else:
            raise ValueError(f"{kind} files carry no metadata here; save {path.name} as .png, .jpg or .webp")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            image.save(stream, kind, **options)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What `save_image` stored beside the pixels, or None for a picture without it."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with Image.open(path) as image:
            text = image.info.get(METADATA_KEY)
            if text is None:
                text = image.getexif().get(ExifTags.Base.ImageDescription)
    except Exception as error:  # as in read_image
        raise UnreadableImageError(f"cannot read the metadata of {path}: {error}") from error
    try:
        value = json.loads(text) if text else None
    except ValueError:
        return None  # a description some other program wrote
    return value if isinstance(value, dict) else None
