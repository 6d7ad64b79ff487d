"""The hub, by its own library from a server on this machine: what is read from it, and what goes wrong."""

import hashlib

import datasets
import hub_server
import jax.numpy as jnp
import numpy as np
import pytest
from hub_server import TOKEN
from huggingface_hub import constants
from refusals import refused

from lorafusion_jax import LowRank, load_tokenizer, read_config
from lorafusion_jax.io import lora_adapter, read_adapter
from lorafusion_jax.io.source import resolve
from lorafusion_jax.tasks import load_task


@pytest.mark.parametrize("revision", ["", "@main", f"@{hub_server.COMMIT}"])
def test_bases_tokenizers_and_adapters_come_by_id_and_revision(hub, small, revision):
    source = f"org/base{revision}"
    assert read_config(source) == read_config(small[0])
    assert load_tokenizer(source).get_vocab() == load_tokenizer(small[0]).get_vocab()
    with refused("org/base@v9 gives no tokenizer"):
        load_tokenizer("org/base@v9")
    fetched = read_adapter(f"org/adapter{revision}")
    local = read_adapter(str(sorted(small[1].iterdir())[0]))
    assert fetched.config == local.config
    for path, factors in local.factors.items():
        for a, b in zip(fetched.factors[path], factors, strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_adapter_names_base_and_revision_as_peft_does(small):
    config = read_config(small[0])
    adapters = {
        "encoder.self.q": LowRank(
            jnp.ones((1, config.d_model, 2)), jnp.ones((1, 2, config.d_model))
        )
    }
    for source, name, revision in (
        ("org/base@main", "org/base", "main"),
        (str(small[0]), str(small[0]), None),
    ):
        fields, _ = lora_adapter(config, adapters, base=source)
        assert (fields["base_model_name_or_path"], fields["revision"]) == (
            name,
            revision,
        )


def test_a_base_is_found_in_the_home_folder(small, monkeypatch):
    monkeypatch.setenv("HOME", str(small[0].parent))
    source = f"~/{small[0].name}"
    assert read_config(source) == read_config(small[0])
    assert load_tokenizer(source).get_vocab() == load_tokenizer(small[0]).get_vocab()


def test_fetched_files_are_found_offline(hub, monkeypatch):
    folder = resolve("org/adapter", patterns=None)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/adapter", patterns=None) == folder
    assert len(hub.requests) == asked
    with refused(r"'org/other' is not a folder here.*HF_HUB_OFFLINE"):
        resolve("org/other", patterns=None)


def test_a_private_repository_needs_the_token(hub, monkeypatch):
    hub.private.add("org/adapter")
    with refused(
        r"'org/adapter' .*it is private: check the spelling, or run `hf auth login`"
    ):
        read_adapter("org/adapter")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert read_adapter("org/adapter").factors


def test_refusals_of_the_hub_are_explained(hub):
    hub.gated.add("org/adapter")
    with refused(
        r"'org/adapter' .*access is restricted: request it on the repository's page"
    ):
        resolve("org/adapter", patterns=None)
    with refused(r"'org/base@v9' .*no such revision: check the text after the @"):
        resolve("org/base@v9", patterns=None)
    with refused(r"'org/nothing' .*no such repository, or it is private"):
        resolve("org/nothing", patterns=None)
    hub.gated.clear()
    hub.busy = 1
    with refused(r"'org/adapter' .* 429 Too Many Requests"):
        resolve("org/adapter", patterns=None)
    assert (resolve("org/adapter", patterns=None) / "adapter_config.json").is_file()


@pytest.fixture
def data(hub, monkeypatch, tmp_path):
    """The hub with a data set of two files."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, number in (("train", 3), ("test", 2)):
        rows = [f'{{"input": "{part} {n}", "target": "x"}}\n' for n in range(number)]
        (folder / f"{part}.jsonl").write_text("".join(rows))
    hub.add("org/data", folder)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets")
    )
    datasets.disable_progress_bars()
    yield hub
    datasets.enable_progress_bars()


def test_data_come_by_id_and_revision(data):
    task = load_task(f"org/data@{hub_server.COMMIT}")
    assert [example.input for example in task.test] == ["test 0", "test 1"] and len(
        task.train
    ) == 3
    assert (task.name, task.source) == ("data", f"org/data@{hub_server.COMMIT}")
    assert f"/datasets/org/data/resolve/{hub_server.COMMIT}/test.jsonl" in [
        path for _, path in data.requests
    ]
    with refused(r"org/data@v9 is not a local path.*evision.*v9"):
        load_task("org/data@v9")
    with refused(r"org/data:other is not a local path.*'other' not found"):
        load_task("org/data:other")


def test_private_and_gated_data_need_the_token(data, monkeypatch):
    data.gated.add("org/data")
    with refused("org/data is not a local path.*terms to accept"):
        load_task("org/data")
    data.gated.clear()
    data.private.add("org/data")
    with refused("org/data is not a local path.*need `hf auth login` or HF_TOKEN"):
        load_task("org/data")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(load_task("org/data").test) == 2


# A hub that means harm.


_INFO = "/api/models/org/base/revision/main"
_CONFIG = f"/org/base/resolve/{hub_server.COMMIT}/config.json"
_TREE = f"/api/models/org/base/tree/{hub_server.COMMIT}"


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
