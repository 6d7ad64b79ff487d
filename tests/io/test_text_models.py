"""Text models inside models for images and text, in the spellings of several versions of transformers."""

from pathlib import Path

import numpy as np
import pytest
import small_llama
from json_files import write_json
from refusals import refused
from safetensors.numpy import load_file, save_file

import lorafusion_jax as lf
from lorafusion_jax.io import open_base, read_adapter, write_adapter
from lorafusion_jax.models import linear_shapes
from lorafusion_jax.models.decoder import FAMILY

_TEXT = small_llama.CONFIG | {
    "vocab_size": 40,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
_CONFIG = {
    "model_type": "mistral3",
    "tie_word_embeddings": False,
    "text_config": _TEXT | {"model_type": "mistral"},
}
_IMAGES = (
    "vision_tower.patch_conv.weight",
    "model.multi_modal_projector.linear_1.weight",
)
# The modules around the text model, and those around the head.
_SPELLINGS = {
    "model.language_model.": "",
    "language_model.model.": "language_model.",
    "model.": "",
}


def _spelled(name, around):
    inner = name.removeprefix("model.language_model.")
    return _SPELLINGS[around] + name if inner == name else around + inner


@pytest.fixture(scope="module", params=_SPELLINGS)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    rng = np.random.default_rng(0)
    write_json(folder / "config.json", _CONFIG)
    small_llama.make_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    model = FAMILY.abstract(FAMILY.read_config(_CONFIG))
    slots = FAMILY.checkpoint(model.config).slots(model)
    tensors = {
        name: rng.standard_normal(slot.shape, np.float32)
        for slot in slots
        for name in slot.names
    }
    tensors = {
        _spelled(name, request.param): tensor for name, tensor in tensors.items()
    }
    save_file(
        tensors | {name: np.ones((2, 2), np.float16) for name in _IMAGES},
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def digest():
    return {}


def test_every_spelling_is_one_model_whose_merged_files_have_the_base_s_names(
    base, digest, tmp_path
):
    assert digest.setdefault("", open_base(base).digest) == open_base(base).digest
    lf.save_base(lf.load_base(base), tmp_path / "merged", base)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    stored = load_file(base / "model.safetensors")
    assert (
        merged.keys() == stored.keys()
        and (tmp_path / "merged" / "preprocessor_config.json").is_file()
    )
    assert all(
        (merged[name] == stored[name]).all()
        and merged[name].dtype == stored[name].dtype
        for name in stored
    )


def _adapter(folder, path, **fields):
    tensors = {
        f"base_model.model.{path}.lora_{factor}.weight": np.ones(shape, np.float32)
        for factor, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    write_adapter(
        folder, {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | fields, tensors
    )
    return str(folder)


@pytest.mark.parametrize("around", [*_SPELLINGS, ""])
def test_an_adapter_in_every_spelling_is_read(around, tmp_path):
    config = FAMILY.read_config(_CONFIG)
    path = f"{around}layers.1.self_attn.q_proj"
    pool = lf.read_pool(
        [_adapter(tmp_path / "adapter", path, alpha_pattern={path: 6})], config
    )
    assert np.asarray(pool.rank["decoder.self_attn.q_proj"]).tolist() == [[0], [2]]
    assert np.asarray(pool.scaling["decoder.self_attn.q_proj"]).tolist() == [[0], [3]]


@pytest.mark.parametrize(
    "path",
    [
        "model.visual.blocks.0.attn.proj",
        "vision_tower.transformer.layers.1.attention.q_proj",
        "model.mm_projector.0",
    ],
)
def test_the_part_for_images_is_left_out_with_a_note(path, tmp_path):
    config = FAMILY.read_config(_CONFIG)
    folder = Path(_adapter(tmp_path / "adapter", path))
    message = "no lora_A and lora_B .*of a part that text never runs through"
    with refused(message):
        lf.read_pool([str(folder)], config)
    text = _adapter(tmp_path / "text", "model.layers.1.self_attn.q_proj")
    file = "adapter_model.safetensors"
    images = load_file(folder / file)
    save_file(images | load_file(Path(text) / file), folder / file)
    adapter = read_adapter(str(folder), shapes=linear_shapes(config))
    assert set(adapter.kept) == set(images) and len(adapter.factors) == 1
    assert adapter.notes == (
        f"ignored: 2 tensors such as {next(iter(adapter.kept))}, of a part that text never runs through",
    )


def test_a_text_model_that_cannot_be_read_is_refused():
    text = {"text_config": _TEXT | {"model_type": "mamba"}}
    with refused("the text model of this mistral3 is 'mamba': expected one of"):
        FAMILY.read_config(_CONFIG | text)
