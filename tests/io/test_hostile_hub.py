"""A hub that means harm: files outside of the cache, damaged ones, and answers that its library cannot take."""

import hashlib

import pytest
from hub_server import COMMIT
from huggingface_hub import constants
from refusals import refused

from lorafusion_jax import load_tokenizer, read_config
from lorafusion_jax.io.source import resolve

_INFO = "/api/models/org/base/revision/main"
_CONFIG = f"/org/base/resolve/{COMMIT}/config.json"
_TREE = f"/api/models/org/base/tree/{COMMIT}"


def test_a_file_of_another_digest_is_refused_and_removed(hub, tmp_path):
    digest = hashlib.sha256(b"{}").hexdigest()
    hub.answers[_CONFIG] = b"[]"
    with refused(
        "config.json: damaged, its SHA-256 is not the one that the hub states: fetch"
    ):
        resolve("org/base", patterns=("config.json",))
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and path.name == digest
    ]


def test_a_file_outside_of_the_cache_is_refused(hub, tmp_path):
    folder = resolve("org/base", patterns=("config.json",))
    assert folder.is_relative_to(constants.HF_HUB_CACHE)
    (tmp_path / "outside").write_text("{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "outside")
    with refused(
        "config.json: outside of the hub's cache: expected a file in .*; remove it"
    ):
        resolve("org/base", patterns=("config.json",))


@pytest.mark.parametrize("path", [_INFO, _TREE])
@pytest.mark.parametrize("fetch", [read_config, load_tokenizer])
def test_answers_that_the_library_cannot_take_are_a_value_error(hub, fetch, path):
    hub.answers[path] = b"[1]"
    with refused("org/base"):
        fetch("org/base")
