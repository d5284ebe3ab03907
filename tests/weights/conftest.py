"""The hub that tests of weights ask."""

import pytest

from arvis.weights import hub as room
from weights.hub_server import serving


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub on this machine in place of the public one, and an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with serving() as local:
        monkeypatch.setattr(constants, "ENDPOINT", local.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", local.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(room, "PATIENCE", 0.0)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "member")
        close_session()
        yield local
        close_session()
