"""A hub that means harm: names that are paths, answers without an end, and answers that its library cannot take."""

import itertools
import json
import time

import datasets
import pytest
from hub_server import COMMIT
from huggingface_hub import constants

from lorafusion_jax import hub_answers
from lorafusion_jax.io.hf import load_tokenizer, read_config
from lorafusion_jax.io.source import resolve
from lorafusion_jax.tasks import load_task

_INFO = "/api/models/org/base/revision/main"
_CONFIG = f"/org/base/resolve/{COMMIT}/config.json"
_TREE = f"/api/models/org/base/tree/{COMMIT}"
_OUT = "../../../../outside"


def _outside(folder):
    return list(folder.rglob("*outside*"))


_INFO_OF_A_PATH = {"id": "org/base", "sha": _OUT, "siblings": [], "tags": [], "private": False}
_LISTED = {"type": "file", "path": "config.json", "size": 2, "oid": 40 * "0", "lfs": {"oid": _OUT, "size": 2}}


@pytest.mark.parametrize("fetch", [read_config, load_tokenizer])
@pytest.mark.parametrize(
    ("path", "headers", "content", "message"),
    [
        *(
            (_CONFIG, {header: f'"{name}"'}, {}, f"{header.lower()} .*part of a path")
            for header in ("ETag", "X-Linked-Etag", "X-Repo-Commit")
            for name in (_OUT, "/nowhere/outside", "..", "a\\b")
        ),
        (_INFO, {}, _INFO_OF_A_PATH, "sha '../../../../outside'"),
        (_TREE, {}, [_LISTED], "oid"),
    ],
)
def test_names_that_are_paths_are_refused(hub, tmp_path, fetch, path, headers, content, message):
    body = json.dumps(content).encode()
    sent = {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))} | headers
    hub.answers[path] = (200, sent, [body])
    with pytest.raises(ValueError, match=f"org/base.* the hub sends {message}"):
        fetch("org/base")
    assert not _outside(tmp_path)


def _endless(parts):
    return itertools.chain(parts, itertools.repeat(b" " * (1 << 20)))


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        (_TREE, lambda: (200, {}, _endless([b"["])), "the hub lists more than 64 MiB"),
        (_CONFIG, lambda: (200, {"ETag": '"1"', "X-Repo-Commit": COMMIT}, _endless([])), "a file of more than 2 MiB"),
        (_INFO, lambda: (200, {"Content-Encoding": "gzip"}, [b""]), r"a compressed answer \(gzip\), which was not"),
    ],
)
def test_endless_and_compressed_answers_are_refused(hub, monkeypatch, path, answer, message):
    monkeypatch.setattr(hub_answers, "UNKNOWN", 1 << 21)
    hub.answers[path] = answer()
    with pytest.raises(ValueError, match=message):
        resolve("org/base", patterns=("config.json",))


def test_pages_of_a_listing_end(hub, monkeypatch):
    monkeypatch.setattr(hub_answers, "LISTED", 1 << 17)
    headers = {"Link": f'<{constants.ENDPOINT}{_TREE}>; rel="next"', "Content-Length": "2"}
    hub.answers[_TREE] = (200, headers, [b"[]"])
    with pytest.raises(ValueError, match="the hub lists more than"):
        resolve("org/base", patterns=("config.json",))


def _slowly(part: bytes):
    while True:
        time.sleep(0.05)
        yield part


@pytest.mark.parametrize("path", [_INFO, _CONFIG])
def test_slow_answers_end(hub, monkeypatch, path):
    monkeypatch.setattr(hub_answers, "PATIENCE", 0.2)
    monkeypatch.setattr(hub_answers, "LONGEST_ANSWER", 0.2)
    hub.answers[path] = (200, {"ETag": '"1"', "X-Repo-Commit": COMMIT}, _slowly(b" "))
    with pytest.raises(ValueError, match="the hub (took more than 0.2 s|sends less than 1,000 bytes a second)"):
        resolve("org/base", patterns=("config.json",))


def test_a_busy_hub_cannot_ask_for_a_long_pause(hub, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    hub.answers[_TREE] = (429, {"Retry-After": "1000000000", "ratelimit": '"api";r=0;t=1000000000'}, [])
    with pytest.raises(ValueError, match="429"):
        resolve("org/base", patterns=("config.json",))
    assert max(pauses, default=0) < 600


def test_a_commit_of_data_that_is_a_path_is_refused(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "a" / "datasets"))
    hub.repositories["org/data"] = {"train.jsonl": b'{"input": "a", "target": "b"}\n'}
    for path in ("/api/datasets/org/data", "/api/datasets/org/data/revision/main"):
        hub.answers[path] = (200, {}, [json.dumps(_INFO_OF_A_PATH | {"id": "org/data"}).encode()])
    with pytest.raises(ValueError, match="org/data .* the hub sends sha"):
        load_task("org/data")
    assert not _outside(tmp_path)


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        (_INFO, (200, {}, [b'{"id": "org/base"}'])),  # AssertionError
        (_INFO, (200, {}, [b"[]"])),  # TypeError
        (_INFO, (200, {}, [b"[" * 200_000])),  # RecursionError
        (_TREE, (200, {}, [b'{"a": 1}'])),
        (_TREE, (200, {}, [b"[1]"])),
        (_INFO, (302, {"Location": _INFO}, [])),  # TooManyRedirects
        (_CONFIG, (302, {"Location": "ftp://127.0.0.1/x", "ETag": '"1"', "X-Repo-Commit": COMMIT}, [])),
    ],
)
@pytest.mark.parametrize("fetch", [read_config, load_tokenizer])
def test_answers_that_the_library_cannot_take_are_a_value_error(hub, fetch, path, answer):
    hub.answers[path] = answer
    with pytest.raises(ValueError, match="org/base"):
        fetch("org/base")


def test_sessions_of_a_user_are_used(hub, small):
    import huggingface_hub
    from huggingface_hub.utils import _http

    made = []
    before = _http.default_client_factory

    def make():
        made.append(before())
        return made[-1]

    huggingface_hub.set_client_factory(make)
    try:
        assert read_config("org/base") == read_config(small[0])
        assert made
    finally:
        huggingface_hub.set_client_factory(before)
