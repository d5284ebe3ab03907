import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from arvis.data.images import (
    UnreadableImageError,
    centre_crop,
    grid,
    random_crop,
    random_flip,
    read_image,
    read_metadata,
    save_image,
    to_bytes,
    to_network,
    to_pil,
    to_tensor,
)


def _noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def _encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _adm(array, size):
    """The centre crop of ADM's evaluation, from its description: halve, resize, crop."""
    image = Image.fromarray(array)
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", [(40, 40), (333, 97), (64, 65), (31, 200), (257, 300)])
@pytest.mark.parametrize("size", [16, 32])
def test_centre_crop_is_adm(shape, size):
    image = _noise(*shape)
    ours = centre_crop(image, size)
    assert ours.size == (size, size)
    assert (np.array(ours) == _adm(np.array(image), size)).all()


def test_centre_crop_keeps_the_middle():
    array = np.zeros((50, 150, 3), np.uint8)
    array[:, 50:100] = (255, 0, 0)
    assert (np.array(centre_crop(Image.fromarray(array), 50))[:, 2:-2] == (255, 0, 0)).all()
    with pytest.raises(ValueError, match="positive"):
        centre_crop(_noise(8, 8), 0)


def test_centre_crop_to_a_shape_covers_it():
    array = np.zeros((60, 120, 3), np.uint8)
    array[:, 45:75] = (255, 0, 0)
    assert (np.array(centre_crop(Image.fromarray(array), (60, 30))) == (255, 0, 0)).all()
    for shape in ((20, 40), (40, 20), (7, 90), (60, 120)):
        assert centre_crop(Image.fromarray(array), shape).size == shape[::-1]


def test_random_crop_and_flip_follow_the_generator():
    image = _noise(120, 90)
    first = [np.array(random_crop(image, 32, np.random.default_rng(k))) for k in range(12)]
    again = [np.array(random_crop(image, 32, np.random.default_rng(k))) for k in range(12)]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert len({a.tobytes() for a in first}) == 12 and all(a.shape == (32, 32, 3) for a in first)
    assert (
        np.array(random_crop(_noise(32, 32), 32, np.random.default_rng(0), smallest=1)) == np.array(_noise(32, 32))
    ).all()
    rng = np.random.default_rng(0)
    flipped = sum((np.array(random_flip(image, rng)) == np.array(image)[:, ::-1]).all() for _ in range(200))
    assert 70 < flipped < 130
    with pytest.raises(ValueError, match="smallest"):
        random_crop(image, 32, rng, smallest=0)


def test_reading_every_mode():
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    assert read_image(_encoded(red)).getpixel((0, 0)) == (200, 0, 0)
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert read_image(_encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    half = read_image(_encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))).getpixel((0, 0))
    assert half == (127, 127, 127)
    assert read_image(_encoded(red.convert("P"))).mode == "RGB"
    assert read_image(_encoded(Image.new("L", (4, 4), 77))).getpixel((1, 1)) == (77, 77, 77)
    deep = Image.fromarray(np.full((4, 4), 32896, np.uint16))
    assert read_image(_encoded(deep)).getpixel((0, 0)) == (128, 128, 128)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert read_image(_encoded(_noise(10, 4), "JPEG", exif=turned)).size == (4, 10)


def test_broken_pictures_are_one_clear_error(tmp_path):
    whole = _encoded(_noise(64, 64))
    path = tmp_path / "cut.png"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImageError, match=r"cannot decode .*cut\.png"):
        read_image(path)
    with pytest.raises(UnreadableImageError, match=r"shard:7: not a picture"):
        read_image(b"nothing like a picture", "shard:7")
    jpeg = _encoded(_noise(64, 64), "JPEG")
    with pytest.raises(UnreadableImageError):
        read_image(jpeg[:200])
    with pytest.raises(UnreadableImageError):
        read_image(b"")
    header = struct.pack(">IIBBBBB", 2**16, 2**16, 8, 2, 0, 0, 0)  # a decompression bomb
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(UnreadableImageError):
        read_image(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(FileNotFoundError, match="no picture at"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UnreadableImageError, match="cannot read"):
        read_image(tmp_path)


def test_tensors_and_back():
    image = _noise(7, 5)
    tensor = to_tensor(image)
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 5, 7)
    assert tuple(tensor[:, 1, 2].tolist()) == image.getpixel((2, 1))
    every = torch.arange(256, dtype=torch.uint8)
    assert to_network(every)[0] == -1 and to_network(every)[-1] == 1
    assert torch.equal(to_bytes(to_network(every)), every)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    assert (np.array(to_pil(to_network(tensor))) == np.array(image)).all()
    assert to_pil(torch.zeros(1, 2, 2)).getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(ValueError, match="uint8"):
        to_network(torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        to_pil(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="int64"):
        to_bytes(torch.zeros(3, dtype=torch.int64))


def test_grid():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 4) * 10
    sheet = np.array(grid(images, columns=2, gap=1))
    assert sheet.shape == (14, 9, 3)
    for k in range(5):
        y, x = k // 2 * 5, k % 2 * 5
        assert (sheet[y : y + 4, x : x + 4] == 10 * k).all()
    assert (sheet[4] == 255).all() and (sheet[10:, 5:] == 255).all()
    assert grid([_noise(3, 3)], columns=8, gap=2).size == (3, 3)
    with pytest.raises(ValueError, match="at least one"):
        grid([], columns=2)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_metadata_comes_back(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    wanted = {"prompt": "ein grüner Apfel 🍏", "seed": 2**63, "cfg": [1.0, 2.5], "nested": {"a": None}}
    save_image(_noise(16, 16), path, wanted)
    assert read_metadata(path) == wanted
    save_image(_noise(16, 16), path)
    assert read_metadata(path) is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_png_keeps_pixels_and_standard_text(tmp_path):
    save_image(torch.zeros(3, 4, 4), tmp_path / "a.png", {"seed": 1})
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["arvis"] == '{"seed": 1}'
    assert b"iTXt" in (tmp_path / "a.png").read_bytes()
    image = _noise(9, 9)
    save_image(image, tmp_path / "b.png")
    assert (np.array(read_image(tmp_path / "b.png")) == np.array(image)).all()


def test_a_failed_save_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_image(_noise(8, 8), path)
    before = path.read_bytes()

    def fail(self, stream, *_, **__):
        stream.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_image(_noise(8, 8, seed=1), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_wrong_suffix_and_foreign_descriptions(tmp_path):
    with pytest.raises(ValueError, match=r"\.png"):
        save_image(_noise(4, 4), tmp_path / "a.picture")
    with pytest.raises(ValueError, match="carry no metadata"):
        save_image(_noise(4, 4), tmp_path / "a.bmp", {"a": 1})
    exif = Image.Exif()
    exif[0x010E] = "a holiday"
    _noise(4, 4).save(tmp_path / "b.jpg", exif=exif)
    assert read_metadata(tmp_path / "b.jpg") is None
    (tmp_path / "c.png").write_bytes(b"no")
    with pytest.raises(UnreadableImageError, match=r"c\.png"):
        read_metadata(tmp_path / "c.png")
