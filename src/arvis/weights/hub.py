"""Official files from the hub, cached."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from arvis.weights.keys import WeightsError

_log = logging.getLogger("arvis")


def fetch(
    repo: str,
    file: str,
    revision: str = "main",
    *,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    sha256: str = "",
) -> Path:
    """The path of a hub repository's file, downloaded on the first call and cached.

    Raises WeightsError, with what to do, where the repository, revision or file does not exist, needs an account, the
    network is down and the cache has no copy, the disk is full, or the checksum differs.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    what = f"{file} of {repo}" + (f" at {revision}" if revision != "main" else "")
    hand = "or download it by hand and convert it (arvis convert NAME FOLDER --weights PART=FILE)"
    why = "local files only were asked for"
    try:
        if not local_files_only:
            try:
                # asked first because the download itself retries for half a minute
                get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), token=token)
            except (errors.HfHubHTTPError, ValueError):
                raise
            except Exception as error:  # what the client raises without a network differs between its versions
                local_files_only, why = True, f"the hub cannot be reached ({type(error).__name__})"
        path = Path(
            hf_hub_download(
                repo, file, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
            )
        )
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{what} asks for an accepted licence: accept it on the repository's page and log in (hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{repo} has no revision {revision}; leave it out for the newest") from error
    except errors.LocalEntryNotFoundError as error:
        raise WeightsError(f"{what} is not in the cache and {why}; try again with a network, {hand}") from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"{repo} has no file {file}" + (f" at {revision}" if revision != "main" else "")) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"the hub has no repository {repo}, or it is private: check the name, or log in (hf auth login)"
        ) from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{repo!r} is not the name of a hub repository, which is owner/name: {error}") from error
    except errors.HfHubHTTPError as error:
        raise WeightsError(f"the hub did not give {what} ({error}); try again later, {hand}") from error
    except OSError as error:
        raise WeightsError(f"{what} could not be stored or reached: {error}; {hand}") from error
    if sha256 and (found := checksum(path)) != sha256:
        raise WeightsError(f"{path} has the checksum {found}, published is {sha256}; delete it and download it again")
    return path


def checksum(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
