"""Files of a hub, from a server on this machine: fetched once, resumed, verified, and each failure in a clear word."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from arvis.weights import Hub, WeightsError, read
from arvis.weights import hub as room
from weights.hub_server import LocalHub

REPO, NAME = "someone/weights", "model.pth"
BYTES = os.urandom(300_000)


@pytest.fixture(autouse=True)
def one_large_file(hub):
    hub.repos[REPO] = {NAME: BYTES, "config.json": b"{}"}


def get(repo: str = REPO, name: str = NAME, revision: str = "main", **options) -> Path:
    found = Hub(**options)
    return found.fetch(found.find(repo, name, revision))


def partials(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.incomplete"))


def test_a_file_is_fetched_once_and_told_before(hub, tmp_path):
    session = Hub()
    (remote,) = session.find(REPO, NAME)
    assert (remote.size, remote.to_download, remote.path) == (len(BYTES), len(BYTES), None)
    assert remote.sha256 == hashlib.sha256(BYTES).hexdigest() and remote.commit == hub.commit(REPO)
    assert not hub.of("store"), "asking downloads nothing"
    path = session.fetch([remote])
    assert path.read_bytes() == BYTES and len(hub.of("store")) == 1 and not partials(tmp_path)
    (again,) = Hub().find(REPO, NAME)
    assert again.path == path and again.to_download == 0
    assert get() == path and len(hub.of("store")) == 1
    assert path.parent.name == hub.commit(REPO), "the cache is laid out as the hub's own tools expect it"


def test_the_token_goes_to_the_hub_and_not_to_the_store(hub):
    get()
    assert {a.authorization for a in hub.asked if a.server == "hub"} == {"Bearer member"}
    assert {a.authorization for a in hub.asked if a.server == "store"} == {""}


def test_a_connection_that_is_cut_goes_on_where_it_stopped(hub, tmp_path):
    hub.cut = [100_000, 50_000]
    assert get().read_bytes() == BYTES
    assert [a.range for a in hub.of("store")] == ["", "bytes=100000-", "bytes=150000-"]


def test_a_download_that_is_given_up_is_kept_and_goes_on_another_day(hub, tmp_path, caplog):
    hub.cut = [120_000, *[0] * 6]
    with pytest.raises(WeightsError, match=r"stopped at 120 kB of 300 kB \(.+\); what came is kept: run the same"):
        get()
    assert "trying again" in caplog.text
    (partial,) = partials(tmp_path)
    assert partial.read_bytes() == BYTES[:120_000]
    (remote,) = Hub().find(REPO, NAME)
    assert (remote.begun, remote.to_download) == (120_000, 180_000)
    hub.asked.clear()
    assert get().read_bytes() == BYTES and [a.range for a in hub.of("store")] == ["bytes=120000-"]
    assert not partials(tmp_path)


FETCH = f"""
import logging, sys
from arvis.weights import Hub
logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("httpx").setLevel(logging.WARNING)
hub = Hub(cache_dir=sys.argv[1])
print(hub.fetch(hub.find({REPO!r}, {NAME!r})).stat().st_size)
"""
"""A process of its own that fetches the file."""


def test_a_killed_process_leaves_what_it_has(hub, tmp_path):
    hub.slow = 0.2
    env = {**os.environ, "HF_ENDPOINT": hub.address}
    child = subprocess.Popen([sys.executable, "-c", FETCH, str(tmp_path / "cache")], env=env)
    deadline = time.monotonic() + 30
    while not any(p.stat().st_size for p in partials(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.wait()
    (partial,) = partials(tmp_path)
    kept = partial.stat().st_size
    assert 0 < kept < len(BYTES)
    hub.slow = 0.0
    hub.asked.clear()
    assert get().read_bytes() == BYTES and [a.range for a in hub.of("store")] == [f"bytes={kept}-"]


def test_small_files_come_from_the_hub_itself(hub):
    hub.repos[REPO]["config.json"] = b'{"a": 1}'
    path = get(name="config.json")
    assert path.read_text() == '{"a": 1}' and not hub.of("store")
    (remote,) = Hub().find(REPO, "config.json")
    assert remote.path == path and remote.sha256 == "" and remote.size == 8
    hub.repos[REPO]["empty.json"] = b""
    assert get(name="empty.json").read_bytes() == b""


def test_a_server_without_ranges_starts_again(hub, caplog):
    hub.cut, hub.ranges = [100_000], False
    assert get().read_bytes() == BYTES
    assert "cannot go on in the middle" in caplog.text


def test_a_damaged_download_is_refused_and_nothing_is_deleted(hub, tmp_path):
    hub.damaged = True
    with pytest.raises(WeightsError, match=r"arrived damaged: its checksum is \w+, and the hub says \w+; delete (.+)"):
        get()
    (partial,) = partials(tmp_path)
    hub.damaged = False
    with pytest.raises(WeightsError, match=f"delete {partial}"):
        get()
    partial.unlink()
    assert get().read_bytes() == BYTES


def test_a_pinned_checksum_is_required_before_and_after(hub):
    right, wrong = hashlib.sha256(BYTES).hexdigest(), "0" * 64
    session = Hub()
    with pytest.raises(WeightsError, match=f"has the checksum {right} on the hub, and {wrong} was published"):
        session.find(REPO, NAME, sha256=wrong)
    assert not hub.of("store")
    path = session.fetch(session.find(REPO, NAME, sha256=right))
    path.resolve().write_bytes(BYTES[::-1])  # another content of the same size in the cache
    with pytest.raises(WeightsError, match=f"has the checksum .*, published is {right}; delete it"):
        session.fetch(session.find(REPO, NAME, sha256=right))


def test_a_page_of_a_proxy_is_told_and_does_not_reach_the_disk(hub, tmp_path):
    hub.page = "hub"
    with pytest.raises(WeightsError, match="something else than the hub answers"):
        get()
    hub.page, hub.cut = "", [100_000, *[0] * 6]
    with pytest.raises(WeightsError, match="stopped at 100 kB"):
        get()
    hub.page = "store"
    with pytest.raises(WeightsError, match=r"instead of model\.pth of .* \(300 kB\) came 70 bytes of text/html"):
        get()
    assert partials(tmp_path)[0].read_bytes() == BYTES[:100_000]
    hub.page = ""
    assert get().read_bytes() == BYTES


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_store_that_is_busy_is_asked_some_times(hub, status):
    hub.status = status
    with pytest.raises(WeightsError, match=f"stopped at 0 bytes of 300 kB .*{status}.*run the same again"):
        get()
    assert len(hub.of("store")) == room.RETRIES + 1


def test_what_the_hub_does_not_have(hub):
    hub.repos["someone/closed"] = {NAME: BYTES}
    hub.gated.add("someone/closed")
    cases = {
        "someone/weights has no file x.pth$": (REPO, "x.pth"),
        "no file x.pth at [0-9a-f]{40}$": (REPO, "x.pth", hub.commit(REPO)),
        "someone/weights has no revision v9; leave it out for the newest": (REPO, NAME, "v9"),
        "no repository someone/else, or it is private: check the name, or log in": ("someone/else", NAME),
        "the folder x/ of someone/weights has no weights; looked for": (REPO, "x/"),
        "not the name of a hub repository, which is owner/name": ("a/b/c", NAME),
    }
    for told, asked in cases.items():
        with pytest.raises(WeightsError, match=told):
            get(*asked)
    with pytest.raises(WeightsError, match=r"asks for an accepted licence: accept it .*hf auth login"):
        get("someone/closed", token="stranger")
    assert get("someone/closed", token="member").read_bytes() == BYTES


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (404, r"the hub has no model\.pth of someone/weights \(404\): check the names"),
        (401, r"the hub does not give model\.pth of someone/weights to you \(401\): check the name, or log in"),
        (403, r"the hub does not give model\.pth of someone/weights to you \(403\)"),
        (500, r"the hub did not give model\.pth .*500.*try again later"),
    ],
)
def test_answers_without_a_reason(hub, status, told):
    hub.plain = status
    with pytest.raises(WeightsError, match=told):
        get()


def test_a_revision_is_pinned(hub):
    first = hub.commit(REPO)
    hub.repos[REPO]["config.json"] = b"{} "
    assert get(revision=hub.commit(REPO)).read_bytes() == BYTES
    hub.asked.clear()
    assert get(revision=hub.commit(REPO)).read_bytes() == BYTES and not hub.asked, "a pinned file asks nobody"
    with pytest.raises(WeightsError, match=f"no revision {first}"):
        get(revision=first)


def test_another_commit_with_the_same_file_downloads_nothing(hub):
    old = get()
    hub.repos[REPO]["config.json"] = b"[]"
    (remote,) = Hub().find(REPO, NAME)
    assert remote.to_download == 0
    new = get()
    assert new != old and new.read_bytes() == BYTES and len(hub.of("store")) == 1


@pytest.mark.parametrize("how", ["down", "asked", "environment"])
def test_without_a_network_the_cache_answers(hub, how, monkeypatch, tmp_path):
    from huggingface_hub import constants

    path, why = (
        get(),
        {"down": "the hub cannot be reached", "asked": "local files only", "environment": "HF_HUB_OFFLINE"},
    )
    options = {"local_files_only": how == "asked"}
    if how == "down":
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
        )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    hub.asked.clear()
    assert get(**options) == path and not hub.asked
    session = Hub(**options)
    (remote,) = session.find(REPO, NAME)
    assert remote.sha256 == hashlib.sha256(BYTES).hexdigest() and remote.commit == hub.commit(REPO)
    for name in ("other.pth", "folder/"):
        with pytest.raises(WeightsError, match=f"is not in the cache .* and {why[how]}"):
            session.find(REPO, name)


def test_a_hub_that_cannot_be_reached_is_asked_once(hub, monkeypatch):
    from huggingface_hub import get_hf_file_metadata

    asked = []

    def gone(url, **options):
        asked.append(url)
        raise ConnectionError("no route")

    get()
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", gone)
    session = Hub()
    assert session.fetch(session.find(REPO, NAME)).read_bytes() == BYTES
    with pytest.raises(WeightsError, match=r"the hub cannot be reached \(no route\)"):
        session.find(REPO, "other.pth")
    assert len(asked) == 1 and get_hf_file_metadata is not gone


def test_a_repository_that_was_closed_is_still_in_the_cache(hub, caplog):
    path = get()
    del hub.repos[REPO]
    assert get() == path
    assert "no repository someone/weights" in caplog.text and "the copy in the cache is used" in caplog.text


def test_a_copy_of_another_size_is_told(hub):
    path = get()
    path.resolve().write_bytes(BYTES[:1000])
    with pytest.raises(WeightsError, match=r"has 1,000 bytes and .* has 300,000: it is damaged; delete it"):
        get()


def test_a_full_disk_keeps_what_came(hub, monkeypatch, tmp_path):
    hub.cut = [100_000]
    written = []

    @contextmanager
    def full(path, mode):
        def write(chunk):
            if sum(written) + len(chunk) > 150_000:
                raise OSError(28, "No space left on device")
            written.append(out.write(chunk))

        with open(path, mode) as out:
            yield SimpleNamespace(write=write)

    monkeypatch.setattr(room, "open", full, raising=False)
    with pytest.raises(WeightsError, match=r"the disk is full, and model\.pth of .* takes 300 kB: free some space"):
        get()
    kept = partials(tmp_path)[0].stat().st_size
    assert kept == sum(written) > 0
    monkeypatch.delattr(room, "open")
    hub.asked.clear()
    assert get().read_bytes() == BYTES and hub.of("store")[0].range == f"bytes={kept}-"


def test_a_cache_that_cannot_be_written_to_is_told(hub, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightsError, match=r"could not be fetched \(.*\)"):
        get(cache_dir=tmp_path / "file" / "cache")


def test_who_comes_second_waits(hub, caplog):
    caplog.set_level(logging.INFO, "arvis")
    hub.slow, hub.together = 0.2, 2
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(get().read_bytes())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [BYTES] * 2 and len(hub.of("store")) == 1
    assert "another process downloads model.pth of someone/weights; waiting for it" in caplog.text


@pytest.mark.slow
def test_several_processes_download_a_file_once(hub, tmp_path):
    hub.slow, hub.together = 0.5, 2
    env = {**os.environ, "HF_ENDPOINT": hub.address, "PYTHONWARNINGS": "error"}
    call = [sys.executable, "-c", FETCH, str(tmp_path / "cache")]
    children = [subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    told = [child.communicate(timeout=60) for child in children]
    assert [out.strip() for out, _ in told] == [b"300000"] * 2, told
    assert len(hub.of("store")) == 1
    waited = [b"another process downloads model.pth of someone/weights; waiting for it" in err for _, err in told]
    assert sorted(waited) == [False, True]


STATE = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}


@pytest.mark.parametrize("folder", ["", "deep/er/"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "single"])
def test_a_folder_of_shards(hub, tmp_path, folder, kind):
    ending = "bin" if kind == "bin" else "safetensors"
    write = torch.save if kind == "bin" else save_file
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    names = {key: f"model-{i}-of-2.{ending}" for i, key in enumerate(STATE)}
    if kind == "single":
        names = dict.fromkeys(STATE, "model.safetensors")
    else:
        hub.repos[REPO][folder + index] = json.dumps({"weight_map": names}).encode()
    for name in set(names.values()):
        write({key: STATE[key] for key in STATE if names[key] == name}, tmp_path / name)
        hub.repos[REPO][folder + name] = (tmp_path / name).read_bytes()
    session = Hub()
    found = session.find(REPO, folder)
    assert len(found) == (1 if kind == "single" else 3)
    assert sum(r.to_download for r in found) == sum(len(hub.repos[REPO][folder + n]) for n in set(names.values()))
    tensors = read(session.fetch(found))
    assert tensors.keys() == STATE.keys() and all(torch.equal(tensors[k], STATE[k]) for k in STATE)
    offline = Hub(local_files_only=True)
    assert len(offline.find(REPO, folder)) == len(found)


def test_an_index_that_points_outside_is_refused(hub):
    hub.repos[REPO]["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "../../x.pth"}}).encode()
    with pytest.raises(WeightsError, match="outside its folder"):
        get(name="")


def test_the_whole_protocol_was_spoken(hub):
    """The server is none that says yes to everything: the public hub's answers are what the client library reads."""
    from huggingface_hub import hf_hub_download

    assert Path(hf_hub_download(REPO, NAME)).read_bytes() == BYTES
    assert isinstance(hub, LocalHub) and [a.method for a in hub.of("hub", "HEAD")] == ["HEAD"]
    assert get().read_bytes() == BYTES and len(hub.of("store")) == 1, "what another tool has fetched is found"
