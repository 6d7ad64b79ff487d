"""Base models in and out: goldens, every layout of files, what is refused, and transformers itself."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_llama
import tiny
import torch_files
from flax import nnx
from json_files import change_json, read_json, write_json
from numpy.testing import assert_array_equal
from refusals import refused
from safetensors.numpy import load_file, save_file

import lorafusion_jax as lf
from lorafusion_jax.io import open_base
from lorafusion_jax.io.hf import aligned_zeros
from lorafusion_jax.models import T5Config, dense
from lorafusion_jax.models.registry import family_of
from lorafusion_jax.models.weights import QUANTISED_TYPES

_JSON = {
    "model_type": "t5",
    "vocab_size": 20,
    "d_model": 8,
    "d_kv": 3,
    "d_ff": 10,
    "num_heads": 2,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_EMBEDDED = Path(__file__).resolve().parents[2] / "examples" / "small" / "base"
_V = "decoder.block.1.layer.1.EncDecAttention.v.weight"


def _write_config(folder, **fields):
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in (_JSON | fields).items() if value is not ...}
    write_json(folder / "config.json", config)
    return folder


@pytest.fixture
def base(tmp_path):
    """A folder with a small untied T5 1.1, random weights."""
    rng = np.random.default_rng(0)
    return tiny.write_base(
        tmp_path / "base", _JSON, lambda name, shape: rng.standard_normal(shape)
    )


def _change(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _lay_out(source, folder, layout):
    """Copy a base into another layout of files."""
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    tensors = load_file(source / "model.safetensors")
    name = "pytorch_model.bin" if "bin" in layout else "model.safetensors"
    write = (
        torch_files.write_tensors
        if "bin" in layout
        else lambda path, part: save_file(part, path)
    )
    if "sharded" not in layout:
        write(folder / name, tensors)
        return folder
    stem, _, suffix = name.partition(".")
    files = {
        key: f"{stem}-0000{1 + i % 3}-of-00003.{suffix}"
        for i, key in enumerate(tensors)
    }
    for file in set(files.values()):
        write(
            folder / file,
            {key: array for key, array in tensors.items() if files[key] == file},
        )
    write_json(folder / f"{name}.index.json", {"metadata": {}, "weight_map": files})
    return folder


@pytest.mark.smoke
@pytest.mark.parametrize("layout", ["bin", "sharded safetensors", "sharded bin"])
def test_every_layout_of_files_gives_the_same_model(base, tmp_path, layout):
    tiny.assert_same_model(
        lf.load_base(other := _lay_out(base, tmp_path / "other", layout)),
        lf.load_base(base),
    )
    assert open_base(other).digest == open_base(base).digest


@pytest.mark.parametrize("layout", ["safetensors", "sharded bin"])
def test_golden_with_the_configuration_of_transformers_5(goldens, tmp_path, layout):
    source = goldens / "fusion/t5a/base"
    other = _lay_out(source, tmp_path / "other", layout)
    shutil.copyfile(source / "config.transformers5.json", other / "config.json")
    tiny.assert_same_model(lf.load_base(other), lf.load_base(source))


@pytest.mark.parametrize(
    ("fields", "tied", "scaled"),
    [
        ({"tie_word_embeddings": ...}, True, True),
        ({"tie_word_embeddings": True}, True, True),
        ({}, False, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, False, True),
        ({"model_type": "mt5", "tie_word_embeddings": ...}, False, False),
        ({"model_type": "mt5", "tie_word_embeddings": True}, True, False),
    ],
)
def test_what_the_configuration_says_of_head_and_scale(tmp_path, fields, tied, scaled):
    config = lf.read_config(_write_config(tmp_path / "base", **fields))
    assert (config.tied, config.scale_logits) == (tied, scaled)


def test_the_defaults_of_old_configurations(tmp_path):
    fields = dict.fromkeys(
        ("num_decoder_layers", "feed_forward_proj", "tie_word_embeddings"), ...
    )
    config = lf.read_config(
        _write_config(tmp_path / "base", **fields, relative_attention_num_buckets=16)
    )
    sizes = {
        name: _JSON[name]
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
    }
    assert config == T5Config(
        **sizes,
        num_decoder_layers=3,
        gated=False,
        tied=True,
        scale_logits=True,
        buckets=16,
    )


@pytest.mark.parametrize("none", [-1, None])
def test_no_token_for_padding_is_never_a_token(tmp_path, none):
    config = lf.read_config(_write_config(tmp_path / "base", pad_token_id=none))
    assert config == lf.read_config(_write_config(tmp_path / "base"))
    config = lf.read_config(
        _write_config(tmp_path / "base", pad_token_id=none, decoder_start_token_id=2)
    )
    assert (config.pad_id, config.start_id) == (0, 2)


@pytest.mark.parametrize(
    ("own", "generation", "ends"),
    [
        (
            1,
            {"eos_token_id": [1, 17]},
            (1, 17),
        ),  # as in Gemma's instruction-tuned models
        ([2, 3], {"eos_token_id": 4}, (2, 3, 4)),
        (..., {"eos_token_id": 5}, (5,)),
        (6, {"eos_token_id": 6}, (6,)),
        (7, {}, (7,)),
    ],
)
def test_end_tokens_are_those_of_both_configurations(tmp_path, own, generation, ends):
    folder = _write_config(tmp_path / "base", model_type="llama", eos_token_id=own)
    write_json(folder / "generation_config.json", generation)
    assert lf.read_config(folder).end_ids == ends


def test_the_weights_determine_whether_the_head_is_tied(base):
    _write_config(base, tie_word_embeddings=True, scale_decoder_outputs=False)
    model = lf.load_base(base)
    assert not model.config.tied and not model.config.scale_logits
    assert_array_equal(
        model.head[...].T, load_file(base / "model.safetensors")["lm_head.weight"]
    )
    _change(
        base,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["shared.weight"].copy()}
        ),
    )
    assert lf.load_base(_write_config(base)).config.tied


def test_copies_of_the_embedding_and_the_unused_table_are_let_pass(base):
    before = lf.load_base(base)

    def add(tensors):
        for stack in ("encoder", "decoder"):
            tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].copy()
        unused = (
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        )
        tensors[unused] = np.ones((32, 2), np.float32)

    _change(base, add)
    tiny.assert_same_model(lf.load_base(base), before)
    _change(base, lambda tensors: tensors["decoder.embed_tokens.weight"].__iadd__(1))
    with refused(r"decoder\.embed_tokens\.weight differs from shared\.weight"):
        lf.load_base(base)


def test_weights_are_read_in_place_and_hashed_while_they_are_loaded(small):
    array = aligned_zeros((100, 1000), np.float32)
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
    assert not array.any()
    base = open_base(small[0])
    assert open_base(base) is base
    base.load(hashed=True)
    assert vars(base)["digest"] == open_base(small[0]).digest


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(base, stored, dtype):
    _change(
        base,
        lambda tensors: tensors.update(
            {k: v.astype(stored) for k, v in tensors.items()}
        ),
    )
    model = lf.load_base(base, dtype=dtype)
    assert model.config.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {
        jnp.dtype(dtype)
    }
    expected = load_file(base / "model.safetensors")[_V].T.astype(dtype)
    assert_array_equal(np.asarray(lf.kernels(model)["decoder.cross.v"][1]), expected)


@pytest.mark.parametrize("qtype", QUANTISED_TYPES)
def test_a_model_is_quantised_as_it_loads(base, qtype):
    plain = lf.load_base(base)
    quantised = lf.load_base(base, quantise=qtype)
    for site, kernel in lf.kernels(quantised).items():
        # A tile holds one scale: along d_in, of which 8, 6 and 10 are single tiles.
        layers, _, d_out = lf.kernels(plain)[site].shape
        assert kernel.qtype == qtype and kernel.scale.shape == (layers, 1, d_out)
        at_once = lf.quantise(lf.kernels(plain)[site], qtype, tiled_axis=-2)
        assert jax.tree.structure(kernel) == jax.tree.structure(at_once)
        assert_array_equal(dense(kernel, "float32"), dense(at_once, "float32"))
    assert quantised.head.get_value().qtype == qtype
    assert_array_equal(quantised.embedding[...], plain.embedding[...])


def test_a_saved_model_is_the_same_and_keeps_its_files(base, tmp_path):
    (base / "tokenizer.json").write_text("{}")
    (base / "README.md").write_text("not copied")
    lf.save_base(lf.load_base(base), tmp_path / "again", base)
    tiny.assert_same_model(lf.load_base(tmp_path / "again"), lf.load_base(base))
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "again/config.json").read_bytes() == (
        base / "config.json"
    ).read_bytes()
    assert (
        load_file(tmp_path / "again/model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )
    with refused("exists: give a new folder"):
        lf.save_base(lf.load_base(base), tmp_path / "again", base)


def test_saving_dequantises_and_keeps_the_dtype(base, tmp_path):
    model = lf.load_base(base, dtype="bfloat16", quantise="int8")
    lf.save_base(model, tmp_path / "again", base)
    tensors = load_file(tmp_path / "again/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    expected = dense(lf.kernels(model)["decoder.cross.v"], "bfloat16")[1].T
    assert_array_equal(tensors[_V], np.asarray(expected))


@pytest.mark.parametrize(
    ("stated", "dtype"), [("torch_dtype", "float32"), ("dtype", "bfloat16")]
)
def test_a_saved_model_states_the_dtype_of_its_file(base, tmp_path, stated, dtype):
    """transformers 5 loads weights in the dtype that the configuration states."""
    config = read_json(base / "config.json")
    write_json(base / "config.json", config | {stated: "float16"})
    lf.save_base(lf.load_base(base, dtype=dtype), tmp_path / "again", base)
    assert read_json(tmp_path / "again/config.json") == config | {stated: dtype}


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_ROPE = {"rope_type": "default", "rope_theta": 5e4}


@pytest.mark.parametrize(
    ("fields", "older"),
    [
        ({"model_type": "llama", "rope_parameters": _ROPE}, {"rope_theta": 5e4}),
        (
            {"model_type": "smollm3", "rope_parameters": _YARN | {"rope_theta": 5e4}},
            {
                "rope_theta": 5e4,
                "rope_scaling": _YARN | {"rope_theta": 5e4, "type": "yarn"},
            },
        ),
        (
            {
                "model_type": "phi3",
                "rope_parameters": _ROPE | {"partial_rotary_factor": 0.5},
            },
            {"rope_theta": 5e4, "partial_rotary_factor": 0.5},
        ),
        (
            {
                "model_type": "olmo3",
                "rope_parameters": {
                    "full_attention": _YARN | {"rope_theta": 5e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
                },
            },
            {
                "rope_theta": 5e4,
                "rope_local_base_freq": 3e3,
                "rope_scaling": _YARN | {"rope_theta": 5e4, "type": "yarn"},
            },
        ),
        ({"model_type": "qwen2", "rope_theta": 5e4, "rope_parameters": None}, {}),
    ],
    ids=lambda fields: fields.get("model_type"),
)
@pytest.mark.parametrize("images", [False, True])
def test_rotary_positions_are_also_saved_where_older_readers_look(
    tmp_path, fields, older, images
):
    """mlx-lm reads only `rope_theta` and `rope_scaling` of most families, transformers 5 writes `rope_parameters`."""
    text = small_llama.CONFIG | {"vocab_size": 40, "num_hidden_layers": 2} | fields
    wanted = text | older
    if images:
        around = {"model_type": "llava", "tie_word_embeddings": True}
        text = around | {"text_config": text}
        wanted = around | {"text_config": wanted}
    source = tmp_path / "source"
    source.mkdir()
    save_file({"vision_tower.weight": np.ones(2)}, source / "model.safetensors")
    write_json(source / "config.json", text)
    config = lf.read_config(source)
    model = family_of(config).model(config, rngs=nnx.Rngs(0))
    lf.save_base(model, tmp_path / "saved", source)
    assert read_json(tmp_path / "saved" / "config.json") == wanted
    assert lf.read_config(tmp_path / "saved") == config


def test_a_tensor_of_the_base_by_name(base, tmp_path):
    tensor = lf.base_tensor(base)
    tensors = load_file(base / "model.safetensors")
    assert_array_equal(tensor(_V), tensors[_V])
    assert_array_equal(tensor("lm_head.weight"), tensors["lm_head.weight"])
    assert_array_equal(tensor("encoder.embed_tokens.weight"), tensors["shared.weight"])
    with pytest.raises(KeyError, match="score"):
        tensor("score.weight")
    _change(base, lambda tensors: tensors.pop("lm_head.weight"))
    assert_array_equal(lf.base_tensor(base)("lm_head.weight"), tensors["shared.weight"])
    lazy = lf.base_tensor(_write_config(tmp_path / "no_weights"))
    with refused("has no weights"):
        lazy(_V)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "umt5"},
            "model_type is 'umt5', whose every layer has a relative bias",
        ),
        (
            {"model_type": "bert"},
            r"model_type is 'bert', which is none of the families: T5 1\.0, T5 1\.1, FLAN-T5 or mT5; Llama, Mistral",
        ),
        (
            {"model_type": "mixtral"},
            r"model_type is 'mixtral', .*; dense Qwen 3\.5; dense Gemma 4\. Give a dense model of one of them",
        ),
        (
            {"feed_forward_proj": "gated-silu"},
            r"Invalid enum value 'gated-silu' - at `\$\.feed_forward_proj`",
        ),
        (
            {"num_layers": 10**9},
            r"Expected `int` <= 10000 - at `\$\.num_layers`",
        ),
        (
            {"eos_token_id": {"a": 1}},
            r"Expected `int \| array \| null`, got `object` - at `\$\.eos_token_id`",
        ),
        (
            {"model_type": "llama", "rope_scaling": 3},
            r"Expected `object \| null`, got `int` - at `\$\.rope_scaling`",
        ),
    ],
)
def test_configurations_that_are_refused(tmp_path, fields, message):
    with refused(message):
        lf.read_config(_write_config(tmp_path / "base", **fields))


def _forget(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _forget(_V),
            f"the weights lack {_V}: give a configuration and weights that belong together",
        ),
        (_forget("lm_head.weight"), r"the weights lack lm_head\.weight"),
        (_forget("shared.weight"), r"the weights lack shared\.weight"),
        (
            lambda t: t.update({f"odd.{i}": t[_V].copy() for i in range(5)}),
            "no place for odd.0, odd.1, odd.2",
        ),
        (
            lambda t: t.update({f"_orig_mod.{name}": t.pop(name) for name in [*t]}),
            r"of a compiled model, with names in _orig_mod\.: save the model in it",
        ),
        (
            lambda t: t.update({_V: t[_V][:-1].copy()}),
            rf"{_V} has shape \[5, 8\], not \[6, 8\]",
        ),
        (
            lambda t: t.update({_V: t[_V].T.copy()}),
            rf"{_V} has shape \[8, 6\], not \[6, 8\]",
        ),
    ],
)
def test_weights_that_do_not_fit(base, change, message):
    _change(base, change)
    with refused(message):
        lf.load_base(base)


def _with(number, place):
    def change(array):
        array.flat[place] = number
        return array

    return change


@pytest.mark.parametrize("name", [_V, "decoder.final_layer_norm.weight"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(np.nan, -1), "NaN or infinity"),
        (_with(-np.inf, 0), "NaN or infinity"),
        (lambda a: np.full(a.shape, 1e300), "NaN or infinity in float32"),
        (lambda a: a > 0, "has dtype bool: expected floats"),
        (
            lambda a: a.astype(ml_dtypes.float8_e4m3fn),
            "has dtype float8_e4m3fn: expected floats of 16 bits or more",
        ),
    ],
)
def test_weights_that_are_not_finite_floats_are_refused_by_name(
    base, name, change, message
):
    _change(base, lambda tensors: tensors.update({name: change(tensors[name])}))
    with refused(f"^{base}: {name} (holds )?{message}"):
        lf.load_base(base)


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "a/../../x", "..\\x", ""],
)
def test_shards_outside_the_folder_are_refused_unread(base, tmp_path, name):
    folder = _lay_out(base, tmp_path / "shards", "sharded safetensors")
    shutil.copyfile(base / "model.safetensors", tmp_path / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    files = read_json(index)["weight_map"]
    for weight_map, message in (
        (files | {_V: name}, " is not a file inside this folder: correct the name"),
        (
            files | {"odd": files[_V]},
            r" does not hold odd, though model\.safetensors\.index\.json lists it",
        ),
        (
            files | {"odd": "model-00009-of-00003.safetensors"},
            r"-00009-of-00003\.safetensors: no such file",
        ),
    ):
        write_json(index, {"weight_map": weight_map})
        with refused(f"^{folder}.*{message}"):
            lf.load_base(folder)
    index.write_text("{}")
    with refused("Object missing required field `weight_map`"):
        lf.load_base(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("checkpoint-90/config.json", r"holds checkpoints .* such as .*checkpoint-100"),
        ("consolidated.00.pth", r"has Meta's own layout .*: give the model in Hugging"),
        ("params.json", "has Mistral's own layout .*: give the model in Hugging Face"),
        ("consolidated.safetensors", "has Mistral's own layout"),
    ],
)
def test_other_layouts_are_refused_with_the_remedy(tmp_path, file, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    if "checkpoint" in file:
        (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / file).write_text("{}")
    with refused(rf"has no config\.json: it {message}"):
        lf.read_config(tmp_path)
    with refused(rf"has no weights: .*; it {message}"):
        lf.load_base(tmp_path)


def test_code_that_a_repository_brings_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "builtins.input", lambda _: "y"
    )  # to the offer that transformers makes on a terminal
    base = shutil.copytree(_EMBEDDED, tmp_path / "base")
    before = lf.read_config(base)
    path = base / "config.json"
    auto_map = {
        "auto_map": {
            "AutoConfig": "theirs.Theirs",
            "AutoModelForSeq2SeqLM": "theirs.Theirs",
        }
    }
    change_json(path, auto_map)
    config = {
        "tokenizer_class": "Theirs",
        "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]},
    }
    write_json(base / "tokenizer_config.json", config)
    code = f"""import pathlib
pathlib.Path({str(tmp_path / "ran")!r}).touch()
from transformers import PreTrainedTokenizerFast
class Theirs(PreTrainedTokenizerFast): ...
"""
    (base / "theirs.py").write_text(code)
    assert lf.read_config(base) == before
    assert lf.load_base(base).config.sites == before.sites
    assert lf.load_tokenizer(base)("ab").input_ids
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("snapshot", [True, False])
def test_texts_that_are_links_out_of_a_base_are_not_copied(tmp_path, snapshot):
    blobs = tmp_path / "base" / "blobs"
    folder = tmp_path / "base" / "snapshots" / "0"
    out = tmp_path / "out"
    if not snapshot:
        blobs = tmp_path / "base"
        folder = tmp_path / "base"
    for made in (blobs, folder, out):
        made.mkdir(parents=True, exist_ok=True)
    (blobs / "digest").write_text("{}")
    (folder / "config.json").symlink_to(blobs / "digest")
    (tmp_path / "key").write_text("a secret")
    base = open_base(str(folder)).files
    base.save_texts(out)
    assert (out / "config.json").read_text() == "{}" and not (
        out / "config.json"
    ).is_symlink()
    (folder / "chat_template.jinja").symlink_to(tmp_path / "key")
    with refused(f"{folder}/chat_template.jinja: a link out of its folder"):
        base.save_texts(out)
    assert not (out / "chat_template.jinja").exists()
