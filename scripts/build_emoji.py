"""Render every fully-qualified emoji of Unicode with the Noto Color Emoji font into one compact file.

    apt-get install fonts-noto-color-emoji unicode-data
    python scripts/build_emoji.py                     # src/arvis/data/emoji64.zip, the file in the package
    python scripts/build_emoji.py --size 128 --output emoji128.zip

The font holds bitmaps of one size (136 x 128 pixels at 109 pixels per em); they are centred in a square and resized by
Lanczos in premultiplied alpha. A sequence is kept only when the font draws it as one glyph. The file is a zip of
`index.json` (names, attributes, source versions) and lossless WebP sheets of 16 x 16 tiles in premultiplied RGBA. A
skin tone variant is stored as its difference (modulo 256) to its medium-toned sibling, which saves a tenth of the file.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

STRIKE = 109  # the one bitmap size of the font, pixels per em
GLYPH_WIDTH, GLYPH_HEIGHT = 136, 128
SHEET = 16  # tiles along each side of a sheet

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
SIGNS = {"2640": "woman", "2642": "man"}
PEOPLE = {"1F468": "man", "1F469": "woman", "1F9D1": "person"}
# code points with a gender of their own -> (gender, the neutral sequence)
NEUTRAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "1F468": ("man", ("1F9D1",)),
    "1F469": ("woman", ("1F9D1",)),
    "1F466": ("man", ("1F9D2",)),
    "1F467": ("woman", ("1F9D2",)),
    "1F474": ("man", ("1F9D3",)),
    "1F475": ("woman", ("1F9D3",)),
    "1F934": ("man", ("1FAC5",)),
    "1F478": ("woman", ("1FAC5",)),
    "1F385": ("man", ("1F9D1", "200D", "1F384")),
    "1F936": ("woman", ("1F9D1", "200D", "1F384")),
    "1FAC3": ("man", ("1FAC4",)),
    "1F930": ("woman", ("1FAC4",)),
    "1F46B": ("woman+man", ("1F9D1", "200D", "1F91D", "200D", "1F9D1")),
    "1F46C": ("man", ("1F9D1", "200D", "1F91D", "200D", "1F9D1")),
    "1F46D": ("woman", ("1F9D1", "200D", "1F91D", "200D", "1F9D1")),
}
# gendered pictures without a neutral sibling: code point -> (gender, base)
ALONE = {
    "1F57A": ("man", "dancing"),
    "1F483": ("woman", "dancing"),
    "1F9D5": ("woman", "woman with headscarf"),
    "1F931": ("woman", "breast-feeding"),
}
PERSON_SUBGROUPS = frozenset(
    f"person{suffix}" for suffix in ("", "-gesture", "-role", "-fantasy", "-activity", "-sport", "-resting")
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One emoji: its CLDR name, where it stands in Unicode's chart, and what is drawn on whom."""

    name: str
    group: str
    subgroup: str
    base: str
    gender: str | None
    skin_tone: str | None
    codepoints: tuple[str, ...]


def read_emoji_test(text: str) -> tuple[list[Row], str]:
    """Rows of emoji-test.txt in chart order, and the version and date its header states."""
    group = subgroup = ""
    plain: list[tuple[str, str, str, tuple[str, ...]]] = []
    for line in text.splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif match := re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E\d+\.\d+ (.+)", line):
            plain.append((match[2].strip(), group, subgroup, tuple(match[1].split())))
    names = {_key(codes): name for name, _, _, codes in plain}
    rows = [Row(name=n, group=g, subgroup=s, codepoints=c, **_attributes(n, s, c, names)) for n, g, s, c in plain]
    header = dict(re.findall(r"^# (Date|Version): (.+)$", text, re.MULTILINE))
    return rows, f"Unicode emoji-test.txt {header.get('Version', '?')} ({header.get('Date', '?')})"


def _key(codes: Sequence[str]) -> tuple[str, ...]:
    return tuple(code for code in codes if code != "FE0F")


def _attributes(
    name: str, subgroup: str, codes: Sequence[str], names: Mapping[tuple[str, ...], str]
) -> dict[str, str | None]:
    """Base, gender and skin tone, read from the code points; the name only for couples and families."""
    tones = [TONES[code] for code in codes if code in TONES]
    tone = "+".join(tones) or None
    plain = [code for code in _key(codes) if code not in TONES]
    stem, _, rest = name.partition(": ")
    if stem in ("kiss", "couple with heart", "family"):
        members = [part for part in rest.split(", ") if part and not part.endswith("skin tone")]
        default = ["person", "person"] if stem != "family" else []
        return {"base": stem, "gender": "+".join(members or default) or None, "skin_tone": tone}
    if plain[0] in ALONE:
        gender, base = ALONE[plain[0]]
        return {"base": base, "gender": gender, "skin_tone": tone}
    if plain[-1] in SIGNS and len(plain) > 1:
        gender = SIGNS[plain[-1]]
        neutral = tuple(plain[:-2])
    else:
        found = [PEOPLE.get(code) or NEUTRAL[code][0] for code in plain if code in PEOPLE or code in NEUTRAL]
        is_person = subgroup in PERSON_SUBGROUPS or subgroup == "family"
        gender = (found[0] if len(set(found)) == 1 else "+".join(found)) if found else "person" if is_person else None
        neutral = tuple(part for code in plain for part in (NEUTRAL[code][1] if code in NEUTRAL else (code,)))
    # a base with no neutral picture keeps its own name without the tones
    details = [part for part in rest.split(", ") if part and not part.endswith("skin tone")]
    own = f"{stem}: {', '.join(details)}" if details else stem
    base = names.get(neutral) or names.get(tuple(plain)) or own
    return {"base": base, "gender": gender, "skin_tone": tone}


def siblings(rows: Sequence[Row]) -> list[int]:
    """For each row the row it is stored as a difference to (tones: medium; medium: no tone), or -1 for none."""
    where = {_key(row.codepoints): i for i, row in enumerate(rows)}
    parents = []
    for i, row in enumerate(rows):
        codes = _key(row.codepoints)
        medium = where.get(tuple("1F3FD" if code in TONES else code for code in codes), i)
        toneless = where.get(tuple(code for code in codes if code not in TONES), i)
        parent = medium if medium != i else toneless
        parents.append(parent if parent != i else -1)
    return parents


def is_one_glyph(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether the font draws the whole sequence as a single colour glyph (no fall-back to its parts, no empty box)."""
    left, top, right, bottom = font.getbbox(text)
    return (right - left, bottom - top) == (GLYPH_WIDTH, GLYPH_HEIGHT)


def render(font: ImageFont.FreeTypeFont, text: str, size: int) -> np.ndarray:
    """Premultiplied RGBA, uint8 [size, size, 4]."""
    image = Image.new("RGBA", (GLYPH_WIDTH, GLYPH_WIDTH), (0, 0, 0, 0))
    # Pillow pastes the glyph through its own alpha: on transparent black the result is premultiplied colour.
    ImageDraw.Draw(image).text((0, (GLYPH_WIDTH - GLYPH_HEIGHT) // 2), text, font=font, embedded_color=True)
    planes = np.asarray(image, np.float32).transpose(2, 0, 1)
    resized = [np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.LANCZOS)) for plane in planes]
    alpha = resized[3].clip(0, 255)
    colour = [plane.clip(0, alpha) for plane in resized[:3]]  # Lanczos overshoots; colour never exceeds its alpha
    return np.stack([*colour, alpha], -1).round().astype(np.uint8)


def font_names(path: Path) -> dict[int, str]:
    """The `name` table of a TrueType file: 0 copyright, 5 version, 13 licence."""
    data = path.read_bytes()
    tables = {
        data[12 + 16 * i : 16 + 16 * i]: struct.unpack(">II", data[20 + 16 * i : 28 + 16 * i])
        for i in range(struct.unpack(">H", data[4:6])[0])
    }
    start = tables[b"name"][0]
    count, strings = struct.unpack(">HH", data[start + 2 : start + 6])
    names = {}
    for i in range(count):
        platform, _, _, what, length, offset = struct.unpack(">6H", data[start + 6 + 12 * i : start + 18 + 12 * i])
        raw = data[start + strings + offset : start + strings + offset + length]
        names[what] = raw.decode("utf-16-be" if platform == 3 else "latin-1")
    return names


def pack(tiles: np.ndarray, rows: Sequence[Row], sources: Mapping[str, str]) -> bytes:
    """The zip file: `index.json` and WebP sheets. `order[k]` is the row of tile k, `parents` as in `siblings`."""
    size = tiles.shape[1]
    parents = np.array(siblings(rows))
    stored = tiles.copy()
    has_parent = parents >= 0
    stored[has_parent] = tiles[has_parent] - tiles[parents[has_parent]]
    order = np.argsort(has_parent, kind="stable")
    stored = stored[order]
    index = {
        "format": 1,
        "size": size,
        "sheet": SHEET,
        "sources": dict(sources),
        "order": order.tolist(),
        "parents": parents.tolist(),
        "rows": [asdict(row) for row in rows],
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        _add(archive, "index.json", json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode(), deflate=True)
        per_sheet = SHEET * SHEET
        for k, start in enumerate(range(0, len(stored), per_sheet)):
            part = stored[start : start + per_sheet]
            part = np.concatenate([part, np.zeros((per_sheet - len(part), size, size, 4), np.uint8)])
            sheet = part.reshape(SHEET, SHEET, size, size, 4).transpose(0, 2, 1, 3, 4)
            data = io.BytesIO()
            image = Image.fromarray(sheet.reshape(SHEET * size, SHEET * size, 4))
            image.save(data, "webp", lossless=True, quality=100, method=6, exact=True)
            _add(archive, f"sheet{k:02d}.webp", data.getvalue(), deflate=False)
    return buffer.getvalue()


def _add(archive: zipfile.ZipFile, name: str, data: bytes, *, deflate: bool) -> None:
    info = zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))  # fixed, so that equal input gives equal bytes
    info.compress_type = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    archive.writestr(info, data)


def build(font_path: Path, names_path: Path, size: int) -> tuple[bytes, int, int]:
    """The file's bytes, how many emoji it holds, and how many the names file lists."""
    if not features.check("raqm"):
        raise OSError("Pillow was built without raqm, which joins emoji sequences; install the Pillow wheel from PyPI")
    font = ImageFont.truetype(str(font_path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    every, names_version = read_emoji_test(names_path.read_text(encoding="utf-8"))
    texts = {row: "".join(chr(int(code, 16)) for code in row.codepoints) for row in every}
    rows = [row for row in every if is_one_glyph(font, texts[row])]
    tiles = np.stack([render(font, texts[row], size) for row in rows])
    about = font_names(font_path)
    sources = {
        "font": f"Noto Color Emoji, {about.get(5, '?')}",
        "font_sha256": hashlib.sha256(font_path.read_bytes()).hexdigest(),
        "font_copyright": about.get(0, "?"),
        "font_licence": "SIL Open Font License 1.1",
        "names": names_version,
        "names_licence": "Unicode licence, https://www.unicode.org/license.txt",
        "renderer": f"Pillow {Image.__version__}, HarfBuzz {features.version('harfbuzz')}",
    }
    return pack(tiles, rows, sources), len(rows), len(every)


def main() -> None:
    package = Path(__file__).resolve().parent.parent / "src" / "arvis" / "data"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--output", type=Path, help="default: src/arvis/data/emoji<size>.zip")
    parser.add_argument("--font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument("--names", type=Path, default=Path("/usr/share/unicode/emoji/emoji-test.txt"))
    options = parser.parse_args()
    for path, apt in ((options.font, "fonts-noto-color-emoji"), (options.names, "unicode-data")):
        if not path.is_file():
            parser.error(f"{path} does not exist (Debian package {apt})")
    output = options.output or package / f"emoji{options.size}.zip"
    data, kept, listed = build(options.font, options.names, options.size)
    partial = output.with_name(output.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, output)
    print(f"{output}: {kept} of {listed} emoji, {options.size} x {options.size}, {len(data) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
