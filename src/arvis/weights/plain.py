"""Torch files of strangers: tensors and plain values come out, nothing else, and nothing runs.

Training scripts leave more than weights: their arguments (argparse.Namespace, paths), numbers of numpy, the state of
the optimiser. torch's reader refuses every name that is not on its list. Here a few names are added, each with an inert
stand-in, so that even those classes are never called.
"""

from __future__ import annotations

import pickle
import re
import struct
import threading
import warnings
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from arvis.weights.keys import WeightsError


class Arguments:
    """Stands for argparse.Namespace: a dict of values."""

    def __setstate__(self, state: Any) -> None:
        self.values = state


class NumberFormat:
    """Stands for numpy.dtype: the name of a plain number or text format."""

    def __init__(self, name: str, *rest: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[biufcUS]\d{1,4}", name):
            raise pickle.UnpicklingError(f"Unsupported format numpy.dtype: {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def number(form: NumberFormat, raw: bytes) -> Any:
    """Stands for numpy's scalar constructor: a Python number."""
    return np.frombuffer(raw, form.dtype, count=1)[0].item()


ALLOWED: list[Any] = [
    (Arguments, "argparse.Namespace"),
    (NumberFormat, "numpy.dtype"),
    (number, "numpy.core.multiarray.scalar"),
    (number, "numpy._core.multiarray.scalar"),
    (PurePosixPath, "pathlib.PosixPath"),
    (PureWindowsPath, "pathlib.WindowsPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),
    (PureWindowsPath, "pathlib._local.WindowsPath"),
]
"""What stands for the names that a file may hold beside torch's own."""

_ONE_AT_A_TIME = threading.Lock()
"""torch's list of names is one for all threads."""


def unpickle(path: Path, mmap: bool) -> Any:
    """What a torch file holds, on the CPU; mapped, its tensors take memory when they are used.

    Raises WeightsError naming an object that is refused, or where the file is truncated or damaged.
    """
    try:
        with _ONE_AT_A_TIME, torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in another protocol than torch writes
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|format) ([\w.]+)", str(error))
        if found is None:
            raise WeightsError(
                f"{path} is no plain torch file, or is damaged: {first_line(error)}; get it again, or save its tensors "
                "as safetensors"
            ) from error
        raise WeightsError(
            f"{path} holds the Python object {found[1]}, and loading such objects can run any code, so it is refused; "
            "if you trust its source, load it elsewhere and save its tensors alone as safetensors"
        ) from error
    except MemoryError as error:
        raise WeightsError(f"{path} states sizes that do not fit into memory: it is damaged, or hostile") from error
    except (
        SafetensorError,  # torch goes by the ending of the name
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        ImportError,
        struct.error,
    ) as error:
        raise _damaged(path, error) from error


def refuse_packed(path: Path) -> None:
    """WeightsError for an archive that would unpack to more than its own size, or holds a program.

    torch writes its records as they are, so that they can be mapped; packed ones are no torch file, or a bomb.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from error
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed or sum(record.file_size for record in records) > path.stat().st_size:
        what = f"{packed[0]} is packed" if packed else "its records lie over each other"
        raise WeightsError(f"{path} is no torch file: {what}, and torch writes records as they are")
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise WeightsError(
            f"{path} is a TorchScript archive, a program with its weights; save its state_dict() as safetensors"
        )


def _damaged(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} is a truncated or damaged torch file; get it again ({first_line(error)})")


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
