"""The hub, by its own library from a server on this machine: what is read from it, and what goes wrong."""

import hub_server
import numpy as np
import one_block
import pytest
from hub_server import TOKEN

from lorafusion_jax.io.hf import load_tokenizer, read_config
from lorafusion_jax.io.hub import make_repository
from lorafusion_jax.io.peft.adapter import read_adapter
from lorafusion_jax.io.source import resolve


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return one_block.cut(tmp_path_factory.mktemp("small"))


@pytest.fixture
def hub(small, monkeypatch, tmp_path):
    """A hub with a base and an adapter, in place of the real one for this process."""
    base, pool = small
    with hub_server.in_place(monkeypatch, tmp_path) as found:
        found.add("org/base", base)
        found.add("org/adapter", sorted(pool.iterdir())[0])
        yield found


def test_bases_tokenizers_and_adapters_come_by_id(hub, small):
    assert read_config("org/base") == read_config(small[0])
    assert load_tokenizer("org/base").get_vocab() == load_tokenizer(small[0]).get_vocab()
    fetched, local = read_adapter("org/adapter@main"), read_adapter(str(sorted(small[1].iterdir())[0]))
    assert fetched.config == local.config
    for path, factors in local.factors.items():
        for a, b in zip(fetched.factors[path], factors, strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_was_fetched_is_there_offline(hub, monkeypatch):
    from huggingface_hub import constants

    folder = resolve("org/adapter", patterns=None)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/adapter", patterns=None) == folder
    assert len(hub.requests) == asked
    with pytest.raises(ValueError, match=r"'org/other' is not a folder here.*HF_HUB_OFFLINE"):
        resolve("org/other", patterns=None)


def test_a_private_repository_needs_the_token(hub, monkeypatch):
    hub.private.add("org/adapter")
    with pytest.raises(ValueError, match=r"'org/adapter' .*it is private: check the spelling, or run `hf auth login`"):
        read_adapter("org/adapter")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert read_adapter("org/adapter").factors


def test_what_the_hub_refuses_is_said(hub):
    hub.gated.add("org/adapter")
    with pytest.raises(ValueError, match=r"'org/adapter' .*ask for access on its page"):
        resolve("org/adapter", patterns=None)
    with pytest.raises(ValueError, match=r"'org/base@v9' .*no such revision: check what stands after the @"):
        resolve("org/base@v9", patterns=None)
    with pytest.raises(ValueError, match=r"'org/nothing' .*no such repository, or it is private"):
        resolve("org/nothing", patterns=None)


def test_a_download_that_breaks_goes_on_where_it_was(hub, monkeypatch):
    from huggingface_hub import constants

    name, sent = "adapter_model.safetensors", 300
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.broken[name] = sent
    folder = resolve("org/adapter", patterns=None)
    content = hub.repositories["org/adapter"][name]
    assert (folder / name).read_bytes() == content
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(name)]
    assert ranges[-1] == f"bytes={sent}-"


def test_a_hub_that_is_busy_is_said(hub):
    hub.busy = 1
    with pytest.raises(ValueError, match=r"'org/adapter' .* 429 Too Many Requests"):
        resolve("org/adapter", patterns=None)
    assert (resolve("org/adapter", patterns=None) / "adapter_config.json").is_file()


def test_a_name_that_is_none_is_refused(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="the hub did not take a/b/c"):
        make_repository("a/b/c", private=False)
