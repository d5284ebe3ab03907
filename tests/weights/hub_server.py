"""A hub on this machine: it speaks the protocol of the public one, writes down what it is asked, and fails to order.

As there, large files are told by their SHA-256 and lie behind a redirection to another server, which takes ranges;
small files come from the hub itself and are told by their git hash.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote

LARGE = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
PAGE = b"<!DOCTYPE html><html><body>Please log in to the network.</body></html>"


class Asked(NamedTuple):
    """A request: to the hub or to the "store" behind it."""

    server: str
    method: str
    name: str
    range: str
    authorization: str


@dataclass
class LocalHub:
    """Repositories by name, each a dict of files; what is asked of them; and what goes wrong.

    `pinned` are further (repository, commit) that it has, with the same content as the present one.
    `cut` is how many bytes the store sends before it hangs up, one number for each answer, then all comes. `damaged`
    changes the last byte on its way; `ranges` off ignores them; `page` answers with a web page, "hub" or "store";
    `status` fails each answer of the store, `plain` each of the hub without saying why; `slow` waits before each chunk,
    and the store waits until `together` clients have asked the hub.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    pinned: set[tuple[str, str]] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    asked: list[Asked] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    damaged: bool = False
    ranges: bool = True
    page: str = ""
    status: int = 0
    plain: int = 0
    slow: float = 0.0
    together: int = 0
    address: str = ""
    store: str = ""

    def commit(self, repo: str) -> str:
        """The present commit: it follows from the content."""
        files = sorted(self.repos[repo].items())
        return hashlib.sha1(b"".join(name.encode() + content for name, content in files)).hexdigest()

    def of(self, server: str, method: str = "GET") -> list[Asked]:
        return [a for a in self.asked if (a.server, a.method) == (server, method)]


def _answer(hub: LocalHub, server: str) -> type[BaseHTTPRequestHandler]:
    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.reply()

        def do_GET(self) -> None:
            self.reply()

        def send(self, status: int, headers: dict[str, str], body: bytes = b"", most: int | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                part = body if most is None else body[:most]
                for at in range(0, len(part), 2**16):
                    time.sleep(hub.slow)
                    self.wfile.write(part[at : at + 2**16])
            if most is not None:
                self.close_connection = True

        def reply(self) -> None:
            path = unquote(self.path)
            asked = Asked(
                server, self.command, path, self.headers.get("Range", ""), self.headers.get("Authorization", "")
            )
            hub.asked.append(asked)
            if hub.page == server:
                self.send(200, {"Content-Type": "text/html; charset=utf-8"}, PAGE)
            elif server == "hub" and hub.plain:
                self.send(hub.plain, {})
            elif server == "hub":
                self.resolve(path)
            else:
                self.give(path)

        def resolve(self, path: str) -> None:
            asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if asked is None:
                return self.send(404, {})
            repo, revision, file = asked.groups()
            if repo not in hub.repos:
                return self.send(401, {"X-Error-Code": "RepoNotFound"})
            if repo in hub.gated and self.headers.get("Authorization") != "Bearer member":
                return self.send(403, {"X-Error-Code": "GatedRepo"})
            commit = hub.commit(repo)
            if (repo, revision) in hub.pinned and revision != "main":
                commit = revision
            if revision not in ("main", commit):
                return self.send(404, {"X-Error-Code": "RevisionNotFound"})
            if file not in hub.repos[repo]:
                return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            content = hub.repos[repo][file]
            if not file.endswith(LARGE):
                etag = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
                return self.send(200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, content)
            etag = hashlib.sha256(content).hexdigest()
            self.send(
                302,
                {
                    "Location": f"{hub.store}/{repo}/{etag}?signed=yes",
                    "X-Repo-Commit": commit,
                    "X-Linked-Etag": f'"{etag}"',
                    "X-Linked-Size": str(len(content)),
                },
            )

        def give(self, path: str) -> None:
            repo, _, etag = path.removeprefix("/").partition("?")[0].rpartition("/")
            found = (c for c in hub.repos[repo].values() if hashlib.sha256(c).hexdigest() == etag)
            content = next(found)
            deadline = time.monotonic() + 60
            while len(hub.of("hub", "HEAD")) < hub.together and time.monotonic() < deadline:
                time.sleep(0.02)
            if hub.status:
                return self.send(hub.status, {})
            if hub.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            most = hub.cut.pop(0) if hub.cut else None
            headers = {"Content-Type": "application/octet-stream", "ETag": f'"{etag}"'}
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            if first and hub.ranges:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                return self.send(206, headers, content[first:], most)
            self.send(200, headers, content, most)

    return Answer


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that leaves is no fault of the server
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def serving() -> Iterator[LocalHub]:
    """A hub and its store on two ports of this machine."""
    hub = LocalHub()
    servers = [_Server(("127.0.0.1", 0), _answer(hub, name)) for name in ("hub", "store")]
    hub.address, hub.store = (f"http://127.0.0.1:{s.server_port}" for s in servers)
    threads = [threading.Thread(target=s.serve_forever, args=(0.05,), daemon=True) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
