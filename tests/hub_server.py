"""A server with the layout of the Hugging Face hub, on this machine: models in memory, faults on request."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"
COMMIT = "c0ffee" + 34 * "0"


class Hub:
    """Repositories by name, and what the server is to do wrong.

    Attributes:
      repositories: name -> path in it -> content.
      private: names that need the token.
      gated: names that nobody was let in to.
      busy: how many requests to answer with 429 first.
      answers: path -> content of an answer to give instead, with the digest of `{}`.
      requests: method and path of every request.
    """

    def __init__(self):
        self.repositories = {}
        self.private = set()
        self.gated = set()
        self.busy = 0
        self.answers = {}
        self.requests = []

    def add(self, name, folder):
        """Put a folder's files into a repository."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.repositories[name] = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in files
        }


@contextlib.contextmanager
def serving(hub):
    """Serve a hub, and yield its address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def in_place(monkeypatch, folder):
    """Serve an empty hub in place of the real one, for this process; `folder` takes what its library caches."""
    from huggingface_hub import constants

    hub = Hub()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(hub) as address:
        values = {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_TOKEN_PATH": str(folder / "token"),
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


def _etag(content):
    return f'"{hashlib.sha256(content).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format, *args):
        pass

    def _answer(self):
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        if hub.busy:
            hub.busy -= 1
            return self._send(429, b"slow down", {"Retry-After": "0"})
        if path in hub.answers:
            headers = {"ETag": _etag(b"{}"), "X-Repo-Commit": COMMIT}
            return self._send(200, hub.answers[path], headers)
        if found := re.fullmatch(
            r"/stored/([\w-]+/[\w.-]+)/(.+)", path
        ):  # where the hub keeps large files
            return self._file(found[1], found[2])
        if found := re.fullmatch(
            r"/api/(?:models|datasets)/([\w-]+/[\w.-]+)/tree/.+", path
        ):
            return self._allowed(found[1]) and self._tree(found[1])
        if found := re.fullmatch(
            r"/api/(?:models|datasets)/([\w-]+/[\w.-]+)(/revision/([^/]+))?", path
        ):
            return self._allowed(found[1], revision=found[3]) and self._info(found[1])
        if found := re.fullmatch(
            r"/(?:datasets/)?([\w-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path
        ):
            return self._allowed(found[1], revision=found[2]) and self._resolve(
                found[1], found[3]
            )
        return self._send(404)

    do_HEAD = do_GET = _answer

    def _allowed(self, name, *, revision=None):
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self.hub.repositories or (
            name in self.hub.private and not known
        ):
            # As the hub does: who may not see a repository cannot tell whether it is there.
            return self._refuse(401, "RepoNotFound", "Repository not found")
        if name in self.hub.gated:
            message = f"Access to model {name} is restricted. You must have access to it and be authenticated."
            return self._refuse(403, "GatedRepo", message)
        if revision not in (None, "main", COMMIT):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return True

    def _refuse(self, status, code, message):
        self._send(status, headers={"X-Error-Code": code, "X-Error-Message": message})

    def _info(self, name):
        siblings = [{"rfilename": path} for path in self.hub.repositories[name]]
        self._json({"id": name, "sha": COMMIT, "siblings": siblings})

    def _tree(self, name):
        self._json(
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for path, content in self.hub.repositories[name].items()
            ]
        )

    def _resolve(self, name, path):
        content = self.hub.repositories[name].get(path)
        headers = {"X-Repo-Commit": COMMIT}
        if content is None:
            return self._send(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
        if not path.endswith(".safetensors"):
            return self._file(name, path)
        headers |= {"X-Linked-Etag": _etag(content), "X-Linked-Size": str(len(content))}
        headers["Location"] = f"http://{self.headers['Host']}/stored/{name}/{path}"
        return self._send(302, headers=headers)

    def _file(self, name, path):
        content = self.hub.repositories[name][path]
        headers = {"ETag": _etag(content), "X-Repo-Commit": COMMIT}
        self._send(200, content, headers)

    def _json(self, content):
        headers = {"Content-Type": "application/json"}
        self._send(200, json.dumps(content).encode(), headers)

    def _send(self, status, content=b"", headers=None):
        self.send_response(status)
        for key, value in (
            {"Content-Length": str(len(content))} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
