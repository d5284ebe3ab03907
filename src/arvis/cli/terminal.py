"""What the command line shows and refuses: progress, log lines, errors in one line, places to write to."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Formats that carry the request beside the pixels."""


class Refused(SystemExit):
    """The end of a command that could not do what was asked: exit code 2."""

    def __init__(self) -> None:
        super().__init__(2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of the user's or the machine's making become one line on stderr and exit code 2; Ctrl-C is 130.

    Faults of the program keep their traceback; with ARVIS_TRACEBACK=1 in the environment all errors do.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("arvis: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        text = told(error)
        if text is None or os.environ.get("ARVIS_TRACEBACK"):
            raise
        print(f"arvis: {text}", file=sys.stderr)
        raise Refused from None


def told(error: Exception) -> str | None:
    """An error in one line, or None for one that no user has made."""
    text = " ".join(str(error).split())
    match error:
        case KeyError():
            words = " ".join(str(error.args[0]).split()) if error.args else ""
            return words if " " in words else None  # a bare key is a fault of ours
        case OSError(errno=errno.ENOSPC):
            text = text.removeprefix(f"[Errno {errno.ENOSPC}] ")
            return text if "disk is full" in text else f"the disk is full: {text}; free some space or write elsewhere"
        case OSError(strerror=str(reason), filename=name) if name is not None:
            return f"{name}: {reason}"
        case OSError(strerror=str(reason)):
            return " ".join(reason.split())
        case ValueError() | OSError() | ImportError():
            return text
        case MemoryError():
            return f"out of memory: {text or 'ask for less at once'}"
        case RuntimeError() if "out of memory" in text.lower() or "can't allocate memory" in text:
            return f"out of memory; fewer pictures, a smaller batch or model need less ({text[:200]})"
    return None


def progress(total: int | None, unit: str, layout: str | None = None) -> Any:
    """A tqdm bar on stderr; nothing where that is no terminal, and in all processes of torchrun but the first."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit=unit,
        dynamic_ncols=True,
        disable=not (first_process() and sys.stderr.isatty()),
        bar_format=layout,
        leave=False,
    )


def first_process() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def log_lines(level: int = logging.INFO) -> Iterator[None]:
    """The library's log on stderr, above the bar."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            from tqdm import tqdm

            tqdm.write(self.format(record), file=sys.stderr)

    log, handler = logging.getLogger("arvis"), Lines()
    before = log.level
    log.addHandler(handler)
    log.setLevel(level if first_process() else logging.WARNING)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def place_for_picture(out: Path) -> None:
    """Make the folder of a picture to be written; OSError or ValueError where that will not work, before the work."""
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; give the name of a picture, such as {out / 'apple.png'}")
    if out.suffix.lower() not in PICTURES:
        raise ValueError(f"{out} does not end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    place_for_folder(out.parent)


def place_for_folder(folder: Path) -> None:
    """Make a folder; OSError where it cannot be written to."""
    in_the_way = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if in_the_way is not None:
        raise NotADirectoryError(f"{in_the_way} is a file, and {folder} would be a folder; choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder}: {error.strerror}; choose another place") from None
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to; choose another place")
