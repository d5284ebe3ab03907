"""Captions as found on web pages, cleaned before a text encoder reads them.

What DeepFloyd IF's data preparation takes out, in rules of our own: what is no description (addresses, mark-up, file
names, numbers of articles, advertisements) goes, the rest becomes plain lower case.
"""

from __future__ import annotations

import html
import re
import unicodedata
from urllib.parse import unquote_plus

_FILE = r"(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)"
_CODE = r"\b(?=\w*\d)(?:[a-z]{1,3}\d{3,}|[a-z]+\d+[a-z]\w*|\d+[a-z]+\d\w*)\b"

_NO_DESCRIPTION = (
    (r"(?:https?:|www\.)\S+|\b[\w.-]+\.(?:com|co|ru|net|org|edu|gov|it)\b(?:/\S*)?", ""),  # addresses
    (r"<[^<>]*>", " "),  # mark-up
    (r"@\w+", ""),  # names of accounts
    (r"(?:\d{1,3}\.){3}\d{1,3}|\\n", " "),  # addresses of machines, line breaks that were written out
    (r"\d{1,2}:\d\d\s*$", ""),  # the time of a post
    (r"#(?:\d{1,3}|\d{5,})\b|\b\d{6,}\b", ""),  # numbers of articles
    (rf"\S+\.{_FILE}\b", ""),
    (r"([\"'])[\"']+", '"'),
    (r"\.\.+|\s\.\s", " "),
    (r"[^\w\s.,:;!?\"'%$€£+=<>_-]+", " "),  # ornaments, brackets
)

_ADVERTISEMENTS = (
    (_CODE, ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping|(?:free\s+)?download(?:\s+free)?|\bclick\s+(?:for|on)\s+\w+", ""),
    (rf"\b{_FILE}(?:\s+images?)?\b|\bpage\s+\d+\b|\b[\d.]+\s?x\s?[\d.]+\b", ""),
    (r"\s+:\s+", ": "),
    (r"(?<=\D)([,./])\b", r"\1 "),
    (r"\s+", " "),
)


def clean_caption(text: str) -> str:
    """A caption in plain lower case, without what describes nothing; "" if that is all of it.

    Deviation: characters that were decoded wrongly stay as they are.
    """
    text = "".join(map(_plain, unquote_plus(text).lower()))
    text = html.unescape(html.unescape(text))
    for pattern, by in _NO_DESCRIPTION:
        text = re.sub(pattern, by, text)
    if len(re.findall(r"[-_]", text)) > 3:  # words-joined-like-this
        text = re.sub(r"[-_]", " ", text)
    for pattern, by in _ADVERTISEMENTS:
        text = re.sub(pattern, by, text)
    text = re.sub(r"^([\"'])(.*)\1$", r"\2", text.strip())
    return re.sub(r"^['_,:;-]+|['_,:+-]+$", "", text).strip()


def _plain(character: str) -> str:
    """Every dash as "-", every quotation mark as a plain one, no ideographs."""
    if character.isascii():
        return '"' if character == "`" else character
    kind, name = unicodedata.category(character), unicodedata.name(character, "")
    if kind == "Pd":
        return "-"
    if "QUOTATION MARK" in name or name in ("ACUTE ACCENT", "DIAERESIS"):
        return "'" if name.startswith("SINGLE") or " SINGLE " in name else '"'
    return "" if name.startswith("CJK") else character
