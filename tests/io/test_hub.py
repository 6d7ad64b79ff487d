"""The hub, by its own library from a server on this machine: what is read from it, what is pushed, what goes wrong."""

import dataclasses
import json
import shutil

import numpy as np
import one_block
import pytest
from hub_server import TOKEN, Hub, serving
from safetensors.numpy import load_file

from lorafusion_jax.hardware.fuse import fuse
from lorafusion_jax.io.hf import load_tokenizer, read_config
from lorafusion_jax.io.hub import make_repository
from lorafusion_jax.io.peft.adapter import read_adapter
from lorafusion_jax.io.source import resolve
from lorafusion_jax.runs.export import ExportOptions, export
from lorafusion_jax.runs.folder import RunFolder
from lorafusion_jax.runs.options import FuseOptions
from lorafusion_jax.training.recipe import PRESETS


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return one_block.cut(tmp_path_factory.mktemp("small"))


@pytest.fixture
def hub(small, monkeypatch, tmp_path):
    """A hub with a base and an adapter, in place of the real one for this process."""
    from huggingface_hub import constants

    found, (base, pool) = Hub(), small
    found.add("org/base", base)
    found.add("org/adapter", sorted(pool.iterdir())[0])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(found) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
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


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    recipe = dataclasses.replace(PRESETS["default"], epochs=1, batch_size=48, modules=2, max_new_tokens=8)
    task = sorted((one_block.SMALL / "tasks").iterdir())[0]
    options = FuseOptions(
        base=str(small[0]), pool=str(small[1]), task=str(task), seeds=(1, 2), out=out, test_rows=8, recipe=recipe
    )
    options = dataclasses.replace(options, name="run", prompt=None)
    return out / "run", fuse(options)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's library
def test_an_export_is_pushed_with_its_card(hub, run, tmp_path, monkeypatch):
    folder, results = run
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for _ in range(2):  # the second time, the repository is there
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        said = export(ExportOptions(run=folder, seed=2, out=tmp_path / "out", push="me/fused", private=True))
    assert said.endswith("/me/fused") and "me/fused" in hub.private
    there = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repositories["me/fused"] == there
    assert there.keys() >= {"README.md", "adapter_config.json", "adapter_model.safetensors"}

    card = there["README.md"].decode()
    names = results["seeds"][1]["modules"]
    assert all(f"| {name} " in card for name in names)
    score = f"{results['seeds'][1]['exact_match']:.1f}"
    assert any(line.startswith("| seed 2, this one") and score in line for line in card.splitlines())
    assert "AutoModelForSeq2SeqLM" in card and 'PeftModel.from_pretrained(base, "me/fused")' in card
    # Nothing of this machine's folders; the hub would refuse one as the base.
    assert str(tmp_path.parent) not in card and "base_model" not in card and "library_name: peft" in card
    pushed = read_adapter("me/fused")
    (tmp_path / "local").mkdir()
    own = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert pushed.config == json.loads(there["adapter_config.json"]) and len(own) >= 2 * len(pushed.factors)


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the hub's library, and of PyTorch
def test_peft_loads_what_was_pushed_and_says_the_same(hub, small, run, tmp_path, monkeypatch):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    folder, _ = run
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export(ExportOptions(run=folder, seed=2, out=tmp_path / "out", push="me/fused"))
    fetched = resolve("me/fused", patterns=None)
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(small[0]), fetched).eval()
    tokenizer = load_tokenizer(small[0])
    said = [row for row in RunFolder(folder).predictions() if row["seed"] == 2]
    asked = tokenizer([row["input"] for row in said], padding=True, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**asked, max_new_tokens=8, do_sample=False)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [row["prediction"] for row in said]


def test_a_push_that_is_refused_writes_nothing(hub, run, tmp_path):
    with pytest.raises(ValueError, match=r"the hub did not take me/fused: .*token by `hf auth login` or in HF_TOKEN"):
        export(ExportOptions(run=run[0], out=tmp_path / "out", push="me/fused"))
    assert not (tmp_path / "out").exists() and "me/fused" not in hub.repositories
    with pytest.raises(ValueError, match="--private is of a repository of the hub: name it with --push"):
        export(ExportOptions(run=run[0], out=tmp_path / "out", private=True))


def test_a_name_that_is_none_is_refused(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="the hub did not take a/b/c"):
        make_repository("a/b/c", private=False)
