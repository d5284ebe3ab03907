"""`arvis doctor` says what is there, and what to do about what is not."""

import shutil
from collections import namedtuple
from importlib import metadata

import pytest
import torch

from arvis import doctor


@pytest.fixture
def lacking(monkeypatch):
    """Makes packages seem absent or old."""

    def pretend(**found: str | None) -> None:
        real = metadata.version

        def version(name: str) -> str:
            wanted = name.replace("-", "_")
            if wanted not in found:
                return real(name)
            if found[wanted] is None:
                raise metadata.PackageNotFoundError(name)
            return found[wanted]

        monkeypatch.setattr(metadata, "version", version)

    return pretend


def by_name(findings) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine_is_described(tmp_path):
    found = by_name(doctor.examine(folder=tmp_path))
    assert found["torch"].value == torch.__version__ == metadata.version("torch")
    assert {
        "python",
        "arvis",
        "numpy",
        "safetensors",
        "huggingface_hub",
        "tyro",
        "tqdm",
        "einops",
        "pillow",
    } <= found.keys()
    assert not any(finding.broken for finding in found.values())
    assert found["number format"].value.startswith(("bfloat16", "float32"))
    assert found["threads"].value.startswith(f"{torch.get_num_threads()} of ")
    assert str(tmp_path) in found["folder"].value and "GB free" in found["cache"].value
    assert {"serve", "text", "data", "video", "ray", "quant", "dev"} <= found.keys()


def test_missing_and_old_packages_are_told(lacking):
    lacking(einops=None, torch="2.8.1+cpu", fastapi=None)
    found = by_name([*doctor.versions(), *doctor.extras()])
    assert found["einops"].broken and "pip install 'einops>=0.8'" in found["einops"].fix
    assert found["torch"].broken and "torch>=2.9" in found["torch"].fix
    assert not found["numpy"].fix
    assert found["serve"].value == "without fastapi>=0.135" and "pip install 'arvis[serve]'" in found["serve"].fix
    assert not found["serve"].broken


def test_versions_are_compared_as_numbers():
    assert doctor._at_least("2.13.0+cpu", "2.9") and doctor._at_least("2.9", "2.9")
    assert not doctor._at_least("2.8.9", "2.9")


def test_a_full_disk_and_too_many_threads_are_told(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 9 * 10**9, 10**9))
    assert "little room" in by_name(doctor.storage(tmp_path / "not" / "there"))["folder"].fix
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert "OMP_NUM_THREADS=" in by_name(doctor.hardware(torch.device("cpu")))["threads"].fix


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = by_name(doctor.hardware(torch.device("cpu")))["compiler"]
    assert "compiler" in found.value and "g++" in found.fix and not found.broken


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_absent_gpu_is_told():
    found = by_name(doctor.examine("cuda"))["device"]
    assert found.broken and "finds no GPU" in found.value and "--device cpu" in found.fix
