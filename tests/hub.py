"""A Hugging Face Hub on this machine: a server for repositories, and its client made to ask it."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from core import hub_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of models as the Hub does, and keeps a list of what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        """OWNER/NAME -> names of files and their contents, at COMMIT."""
        self.errors: dict[str, tuple[int, str]] = {}
        """File, or OWNER/NAME for all of one -> status and X-Error-Code that it is answered with."""
        self.cut: set[str] = set()
        """Files whose connection breaks in their middle, once."""
        self.asked: list[str] = []
        """Method and path of each request, the query left out; of a resumed file also its first byte."""
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def downloaded(self) -> list[str]:
        """The files whose content was asked for."""
        return sorted(
            line.split("/", 5)[5] for line in self.asked if line.startswith("GET") and "/resolve/" in line
        )


class Handler(BaseHTTPRequestHandler):
    """Answers a request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """The page of the Hub, what a model consists of, or one of its files."""
        path = self.path.partition("?")[0]
        first = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        self.server.asked.append(f"{self.command} {path}" + (f" from {first}" if first != "0" else ""))
        parts = path.strip("/").split("/")
        if parts == [""]:
            return self.answer(b"a page")
        listed = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if listed else parts
        model = f"{owner}/{name}"
        files = self.server.models.get(model)
        wanted = "/".join(rest[2:])
        error = self.server.errors.get(model) or (not listed and self.server.errors.get(wanted))
        if error or files is None:
            status, code = error or (404, "RepoNotFound")
            return self.answer(b"no", status, {"X-Error-Code": code})
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "v1", COMMIT):
            return self.answer(b"no", 404, {"X-Error-Code": "RevisionNotFound"})
        if listed and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": f, "size": len(c), "oid": etag(c)} for f, c in files.items()]
            return self.answer(json.dumps(tree).encode())
        if listed:
            siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
            info = {"id": model, "sha": COMMIT, "siblings": siblings}
            return self.answer(json.dumps(info).encode())
        content = files[wanted]
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT}
        self.answer(content, 206 if int(first) else 200, headers, int(first), wanted)

    def answer(
        self,
        content: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        first: int = 0,
        file: str = "",
    ) -> None:
        """Sends a content from a byte on, or half of it."""
        content = content[first:]
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file in self.server.cut:
            self.server.cut.remove(file)
            self.close_connection = True
            content = content[: len(content) // 2]
        self.wfile.write(content)


def etag(content: bytes) -> str:
    """What the cache names a content by."""
    return hashlib.sha1(content).hexdigest()


def point_at(patch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Has the Hub's client ask an address and keep its cache in a folder."""
    patch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_models._fetch.cache_clear()


def write_snapshot(cache: Path, model: str, files: dict[str, bytes], shared: bool = False) -> Path:
    """A model in a cache as the Hub's client lays it out; gives its snapshot.

    shared: contents lie in the blobs of the whole cache, as those of its newer versions do.
    """
    repository = cache / f"models--{model.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file, content in files.items():
        blob = repository / "blobs" / etag(content)
        if shared:
            name = hashlib.sha256(content).hexdigest()
            stored = cache / "blobs" / name[:2] / name
            stored.parent.mkdir(parents=True, exist_ok=True)
            stored.write_bytes(content)
            blob.symlink_to(f"../../blobs/{name[:2]}/{name}")
        else:
            blob.write_bytes(content)
        (snapshot / file).symlink_to(f"../../blobs/{blob.name}")
    return snapshot
