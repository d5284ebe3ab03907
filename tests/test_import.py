"""`import arvis` is light and has no side effects; an eager import of torch fails here."""

import subprocess
import sys

import pytest

import arvis

CODE = """
import os, sys, time
folder = set(os.listdir())
start = time.process_time()
import arvis
seconds = time.process_time() - start
heavy = [m for m in ("torch", "numpy", "einops", "PIL", "safetensors", "huggingface_hub", "tyro") if m in sys.modules]
assert not heavy, f"import arvis brings {heavy}"
assert seconds < 0.3, f"import arvis takes {seconds:.2f} s"
assert set(os.listdir()) == folder
assert arvis.list_systems(), "the registry is empty"
assert "torch" not in sys.modules, "listing the systems needs torch"
"""


def test_import_is_light(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_public_names_exist():
    for name in arvis.__all__:
        assert getattr(arvis, name) is not None and name in dir(arvis)
    with pytest.raises(AttributeError, match="no attribute 'lod'; it offers"):
        arvis.lod  # noqa: B018 - the attribute is what is tested
    assert "var" in arvis.list_systems()
