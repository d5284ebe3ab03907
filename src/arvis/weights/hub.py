"""Official files on the hub: what there is before it is fetched; fetched once, resumed where it stopped, verified.

The cache is the one of huggingface_hub, so that whatever any tool has downloaded is found, and the other way round.
Files are streamed here and not by that package because it gives up what it has when it is interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arvis.weights.files import INDEXES, SINGLES, read_index
from arvis.weights.keys import WeightsError
from arvis.weights.memory import free_disk, told

RETRIES = 5
"""Attempts in a row that bring nothing before a download is given up; what is there is kept."""
PATIENCE = 1.0
"""Seconds before the second of these attempts; each further one waits twice as long, four times this at most."""

_log = logging.getLogger("arvis")


class _Absent(WeightsError):
    """The repository has no such file, or the cache has none and nobody else can be asked."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file of a hub repository, as it is now: `etag` is its SHA-256 where it is a large file.

    `path` is where it lies on this machine; else `begun` bytes of an interrupted download do. `pinned` is the checksum
    that it must have.
    """

    repo: str
    name: str
    revision: str
    commit: str
    size: int
    etag: str = ""
    path: Path | None = None
    begun: int = 0
    pinned: str = ""

    @property
    def sha256(self) -> str:
        return self.etag if re.fullmatch("[0-9a-f]{64}", self.etag) else ""

    @property
    def to_download(self) -> int:
        return 0 if self.path else self.size - self.begun

    def __str__(self) -> str:
        return f"{self.name} of {self.repo}" + (f" at {self.revision}" if self.revision != "main" else "")


class Hub:
    """The hub and its cache on this machine. Once it cannot be reached it is not asked again: the cache answers."""

    def __init__(
        self, *, cache_dir: str | Path | None = None, local_files_only: bool = False, token: str | None = None
    ) -> None:
        from huggingface_hub import constants

        self.cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.token = token
        self.offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        if local_files_only:
            self.offline = "local files only were asked for"

    def find(self, repo: str, name: str, revision: str = "main", sha256: str = "") -> tuple[Remote, ...]:
        """A file, or for a name that ends in "/" (or is empty: the whole repository) a folder's index and shards.

        Raises WeightsError, with what to do, where the repository, revision or file does not exist, needs an account,
        or the hub cannot be reached and the cache has no copy; where the hub's file is not the one with this checksum.
        """
        if name and not name.endswith("/"):
            return (_pinned(self._find(repo, name, revision), sha256),)
        for index in (*INDEXES, *SINGLES):
            try:
                first = self._find(repo, name + index, revision)
            except _Absent:
                continue
            if index in SINGLES:
                return (first,)
            path = self._fetch(first)
            shards = sorted(set(read_index(path).values()))
            return (replace(first, path=path), *(self._find(repo, name + shard, revision) for shard in shards))
        where = f"the folder {name} of {repo}" if name else repo
        if self.offline:
            raise _Absent(f"{where} is not in the cache ({self.cache}) and {self.offline}")
        raise _Absent(f"{where} has no weights; looked for {', '.join((*INDEXES, *SINGLES))}")

    def fetch(self, found: Sequence[Remote]) -> Path:
        """Where the file lies, or the folder of several; downloaded where it is not here yet.

        Raises WeightsError, with what to do, where the download stops, the disk is full, or what came is not the file.
        """
        paths = [self._fetch(remote) for remote in found]
        return paths[0] if len(paths) == 1 else paths[0].parent

    # -- what there is ------------------------------------------------------------------------------------------------

    def _find(self, repo: str, name: str, revision: str) -> Remote:
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

        wanted = Remote(repo=repo, name=name, revision=revision, commit="", size=0)
        cached = self._cached(wanted, revision)
        if not self.offline and not (cached and re.fullmatch("[0-9a-f]{40}", revision)):
            about, refused = None, None
            try:
                about = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=self.token)
            except (errors.HFValidationError, errors.HfHubHTTPError) as error:
                refused = _refusal(error, wanted)
            except Exception as error:  # what the client raises without a network differs between its versions
                self.offline = f"the hub cannot be reached ({_reason(error)})"
            if about and about.commit_hash and about.etag:
                return self._described(wanted, about)
            if about:
                refused = WeightsError(
                    f"something else than the hub answers for {wanted} ({about.location}): look at HF_ENDPOINT and the "
                    "proxy, or log in to the network"
                )
            if refused and cached is None:
                raise refused
            if refused:
                _log.warning("%s; the copy in the cache is used", refused)
        if cached is None:
            raise _Absent(f"{wanted} is not in the cache ({self.cache}) and {self.offline}: try again with a network")
        blob, commit = cached.resolve().name, cached.parents[name.count("/")].name
        etag = blob if re.fullmatch("[0-9a-f]{64}", blob) else ""
        return replace(wanted, commit=commit, size=cached.stat().st_size, etag=etag, path=cached)

    def _described(self, wanted: Remote, about: Any) -> Remote:
        """What the hub says of a file, and what of it is here."""
        found = replace(wanted, commit=about.commit_hash, size=about.size or 0, etag=about.etag)
        path = self._cached(found, found.commit) or next((p for p in [self._blob(found)] if p.is_file()), None)
        if path and about.size not in (None, path.stat().st_size):
            raise WeightsError(
                f"{path} has {path.stat().st_size:,} bytes and {found} has {about.size:,}: it is damaged; delete it "
                "and try again"
            )
        partial = _partial(self._blob(found))
        return replace(found, path=path, begun=_size(partial))

    def _cached(self, remote: Remote, revision: str) -> Path | None:
        from huggingface_hub import errors, try_to_load_from_cache

        try:
            path = try_to_load_from_cache(remote.repo, remote.name, cache_dir=self.cache, revision=revision)
        except errors.HFValidationError as error:
            raise _refusal(error, remote) from error
        return Path(path) if isinstance(path, str) else None

    def _blob(self, remote: Remote) -> Path:
        from huggingface_hub.file_download import repo_folder_name

        return self.cache / repo_folder_name(repo_id=remote.repo, repo_type="model") / "blobs" / remote.etag

    # -- downloads ----------------------------------------------------------------------------------------------------

    def _fetch(self, remote: Remote) -> Path:
        from huggingface_hub import hf_hub_download

        path = remote.path
        try:
            if path is None and remote.size:
                self._download(remote)
            if path is None or path == self._blob(remote):  # enter it in the books of the cache
                options = {"revision": remote.revision, "cache_dir": self.cache, "token": self.token}
                path = Path(hf_hub_download(remote.repo, remote.name, **options))
        except WeightsError:
            raise
        except Exception as error:
            raise _refusal(error, remote) from error
        if remote.pinned and (found := checksum(path)) != remote.pinned:
            raise WeightsError(
                f"{path} has the checksum {found}, published is {remote.pinned}; delete it and try again"
            )
        return path

    def _download(self, remote: Remote) -> None:
        """Put a file among the blobs of the cache."""
        from huggingface_hub.utils import tqdm

        blob = self._blob(remote)
        partial, lock = _partial(blob), self.cache / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with _alone(lock, remote):
            if blob.exists():
                return
            shown = {"total": remote.size, "initial": _size(partial), "unit": "B", "unit_scale": True}
            with tqdm(**shown, desc=remote.name, disable=None) as bar:
                self._stream(remote, partial, bar)
            if remote.sha256 and (found := checksum(partial)) != remote.sha256:
                raise WeightsError(
                    f"{remote} arrived damaged: its checksum is {found}, and the hub says {remote.sha256}; delete "
                    f"{partial} and try again"
                )
            os.replace(partial, blob)

    def _stream(self, remote: Remote, partial: Path, bar: Any) -> None:
        """Append to the partial file until it is whole."""
        fruitless, why = 0, ""
        while (begun := _size(partial)) != remote.size:
            if why:
                _log.warning("%s stopped at %s (%s); trying again", remote, _part(begun, remote.size), why)
                time.sleep(PATIENCE * min(2 ** max(fruitless - 1, 0), 4))
            if begun > remote.size:
                raise WeightsError(f"{partial} is longer than {remote}: delete it and try again")
            why = self._attempt(remote, partial, begun, bar)
            now = _size(partial)
            fruitless = 0 if now > begun else fruitless + 1
            if fruitless > RETRIES:
                raise WeightsError(
                    f"the download of {remote} stopped at {_part(now, remote.size)} ({why}); what came is kept: run "
                    "the same again, and it goes on from there"
                )

    def _attempt(self, remote: Remote, partial: Path, begun: int, bar: Any) -> str:
        """One request for what is missing; returns why it ended where another may do better."""
        from huggingface_hub import constants, errors, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(token=self.token), "Accept-Encoding": "identity"}
        if begun:
            headers["Range"] = f"bytes={begun}-"
        url = hf_hub_url(remote.repo, remote.name, revision=remote.revision)
        try:
            with get_session().stream(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
            ) as answer:
                hf_raise_for_status(answer)
                _check(answer, remote, begun)
                if begun and answer.status_code == 200:
                    _log.warning("the server of %s cannot go on in the middle: it starts again", remote)
                    bar.reset()
                with open(partial, "ab" if answer.status_code == 206 else "wb") as out:
                    for chunk in answer.iter_bytes():  # as it comes: what is waited for is lost with the connection
                        out.write(chunk)
                        bar.update(len(chunk))
            return "the connection was closed"
        except errors.HfHubHTTPError as error:
            if error.response.status_code in (408, 429) or error.response.status_code >= 500:
                return _reason(error)
            raise
        except WeightsError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(partial.parent, remote) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return _reason(error)
        except Exception as error:  # the client's own, which differ between its versions
            return _reason(error)


def _pinned(remote: Remote, sha256: str) -> Remote:
    if sha256 and remote.path is None and remote.sha256 not in ("", sha256):
        raise WeightsError(
            f"{remote} has the checksum {remote.sha256} on the hub, and {sha256} was published: it has been changed; "
            "ask its authors, or look for the revision that has it"
        )
    return replace(remote, pinned=sha256)


def _check(answer: Any, remote: Remote, begun: int) -> None:
    """WeightsError where an answer is not the bytes that were asked for: nothing of it may reach the disk."""
    length, kind = answer.headers.get("Content-Length"), answer.headers.get("Content-Type", "")
    if answer.status_code == 206:
        right = answer.headers.get("Content-Range") == f"bytes {begun}-{remote.size - 1}/{remote.size}"
    else:
        right = length in (None, str(remote.size))
    if right and not kind.startswith("text/html"):
        return
    raise WeightsError(
        f"instead of {remote} ({told(remote.size)}) came {f'{int(length):,} bytes' if length else 'something'} of "
        f"{kind or 'no type'}: probably a page of a proxy or a login; open the hub in a browser, or look at HF_ENDPOINT"
    )


@contextmanager
def _alone(lock: Path, remote: Remote) -> Iterator[None]:
    """One process at a time, the others say that they wait."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=0.2))
        except Timeout:
            _log.info("another process downloads %s; waiting for it", remote)
            stack.enter_context(WeakFileLock(lock))
        yield


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.arvis.incomplete")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _part(done: int, whole: int) -> str:
    return f"{told(done)} of {told(whole)}"


def _reason(error: BaseException) -> str:
    """An error of the network in a few words."""
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__


def _full(folder: Path, remote: Remote) -> WeightsError:
    free = free_disk(folder)
    return WeightsError(
        f"the disk is full, and {remote} takes {told(remote.size)}: free some space ({told(free or 0)} are free in "
        f"{folder}) and run the same again, it goes on from there; or keep the cache elsewhere (cache_dir, HF_HOME)"
    )


def _refusal(error: Exception, remote: Remote) -> WeightsError:
    """What to do about an error of the hub."""
    from huggingface_hub import errors

    repo, revision = remote.repo, remote.revision
    match error:
        case errors.GatedRepoError():
            return WeightsError(
                f"{remote} asks for an accepted licence: accept it on the repository's page and log in (hf auth login)"
            )
        case errors.RevisionNotFoundError():
            return WeightsError(f"{repo} has no revision {revision}; leave it out for the newest")
        case errors.EntryNotFoundError() if not isinstance(error, errors.LocalEntryNotFoundError):
            at = f" at {revision}" if revision != "main" else ""
            return _Absent(f"{repo} has no file {remote.name}{at}")
        case errors.RepositoryNotFoundError():
            return WeightsError(
                f"the hub has no repository {repo}, or it is private: check the name, or log in (hf auth login)"
            )
        case errors.HFValidationError():
            return WeightsError(f"{repo!r} is not the name of a hub repository, which is owner/name: {_reason(error)}")
        case errors.HfHubHTTPError(response=answer) if answer.status_code == 404:
            return _Absent(f"the hub has no {remote} (404): check the names of repository, revision and file")
        case errors.HfHubHTTPError(response=answer) if answer.status_code in (401, 403):
            return WeightsError(
                f"the hub does not give {remote} to you ({answer.status_code}): check the name, or log in (hf auth "
                "login)"
            )
        case errors.HfHubHTTPError():
            return WeightsError(f"the hub did not give {remote} ({_reason(error)}); try again later")
        case OSError(errno=errno.ENOSPC):
            return _full(Path(error.filename or "."), remote)
    return WeightsError(f"{remote} could not be fetched ({_reason(error)})")


def checksum(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(repo: str, name: str, revision: str = "main", sha256: str = "") -> Path:
    """Where a file of a hub repository lies, downloaded on the first call: `Hub` in one step."""
    hub = Hub()
    return hub.fetch(hub.find(repo, name, revision, sha256))
