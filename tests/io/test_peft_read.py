"""PEFT adapters in and out: what is converted, what is ignored and kept, what is refused in which words."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from json_files import read_json, write_json
from numpy.testing import assert_array_equal
from refusals import refused
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorafusion_jax.io import AdapterError, read_adapter, resave, write_adapter
from lorafusion_jax.io.peft.config import scalings

_Q = "encoder.block.0.layer.0.SelfAttention.q"
_V = "decoder.block.1.layer.1.EncDecAttention.v"
_SHAPES = {_Q: (6, 10), _V: (6, 10), "encoder.block.1.layer.0.SelfAttention.q": (6, 10)}
_PREFIX = "base_model.model."
_CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "base_model_name_or_path": "google/flan-t5-large",
    "target_modules": ["q", "v"],
}


def _factors(r=4, path=_Q, seed=0, d_in=6, d_out=10):
    rng = np.random.default_rng(seed)
    return {
        f"{_PREFIX}{path}.lora_A.weight": rng.standard_normal((r, d_in), np.float32),
        f"{_PREFIX}{path}.lora_B.weight": rng.standard_normal((d_out, r), np.float32),
    }


_TENSORS = _factors() | _factors(path=_V, seed=1)


@pytest.fixture
def write(tmp_path):
    """Write an adapter folder; return its name."""

    def write(tensors=_TENSORS, **fields):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        write_json(folder / "adapter_config.json", _CONFIG | fields)
        arrays = {key: np.asarray(array, order="C") for key, array in tensors.items()}
        save_file(arrays, folder / "adapter_model.safetensors")
        return str(folder)

    return write


def _resaved(adapter, folder):
    """Save an adapter again and return its tensors."""
    resave(adapter, folder)
    return load_file(folder / "adapter_model.safetensors")


def _assert_same(got, want):
    """Compare tensors by name or path: names, dtypes and bytes."""
    assert got.keys() == want.keys()
    for key, array in want.items():
        assert got[key].dtype == array.dtype
        assert_array_equal(got[key], array)


def _refused(folder, message, **kwargs):
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(str(folder), **{"shapes": _SHAPES} | kwargs)
    assert str(folder) in str(caught.value)


# What is converted.


def test_golden_adapters_are_read_and_saved_again_exactly(goldens, tmp_path):
    folders = sorted(goldens.glob("*/**/adapters/*/"))
    assert len(folders) == 14
    for number, folder in enumerate(folders):
        adapter = read_adapter(str(folder))
        text = (folder / "adapter_config.json").read_bytes()
        assert (adapter.name, adapter.source) == (folder.name, str(folder))
        assert (adapter.magnitude is not None) == bool(json.loads(text).get("use_dora"))
        assert not [note for note in adapter.notes if note.startswith("warning")]
        again = _resaved(adapter, tmp_path / str(number))
        if (folder / "adapter_model.safetensors").is_file():
            _assert_same(again, load_file(folder / "adapter_model.safetensors"))
        for path, (a, b) in adapter.factors.items():
            assert_array_equal(a, again[f"{_PREFIX}{path}.lora_A.weight"])
            assert_array_equal(b, again[f"{_PREFIX}{path}.lora_B.weight"])
        assert (tmp_path / str(number) / "adapter_config.json").read_bytes() == text
        with safe_open(
            tmp_path / str(number) / "adapter_model.safetensors", "np"
        ) as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "spell",
    [
        lambda key: key,
        lambda key: key.removeprefix(_PREFIX),
        lambda key: _PREFIX + key,
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix(_PREFIX).replace(".weight", ".my_task.weight"),
    ],
)
def test_every_spelling_of_the_keys_is_read_and_kept(write, tmp_path, spell):
    tensors = {spell(key): array for key, array in _TENSORS.items()}
    adapter = read_adapter(write(tensors), shapes=_SHAPES)
    assert set(adapter.factors) == {_Q, _V}
    for path, (a, b) in adapter.factors.items():
        assert_array_equal(a, _TENSORS[f"{_PREFIX}{path}.lora_A.weight"])
        assert_array_equal(b, _TENSORS[f"{_PREFIX}{path}.lora_B.weight"])
    _assert_same(_resaved(adapter, tmp_path / "again"), tensors)


def test_the_head_has_another_name_in_files_of_tinker(write, tmp_path):
    tensors = _TENSORS | _factors(path="model.unembed_tokens")
    adapter = read_adapter(write(tensors), shapes=_SHAPES | {"lm_head": (6, 10)})
    assert set(adapter.factors) == {_Q, _V, "lm_head"}
    _assert_same(_resaved(adapter, tmp_path / "again"), tensors)


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_dora_magnitudes_with_and_without_weight(write, tmp_path, suffix):
    magnitudes = {_Q: np.arange(10, dtype=np.float32), _V: np.ones(10, np.float32)}
    tensors = _TENSORS | {
        f"{_PREFIX}{path}.lora_magnitude_vector{suffix}": m
        for path, m in magnitudes.items()
    }
    adapter = read_adapter(write(tensors, use_dora=True), shapes=_SHAPES)
    _assert_same(adapter.magnitude, magnitudes)
    _assert_same(_resaved(adapter, tmp_path / "again"), tensors)


# What is ignored and kept.


@pytest.mark.parametrize(
    ("fields", "notes"),
    [
        *(
            ({"init_lora_weights": init}, ())
            for init in (True, False, None, "gaussian", "eva", "orthogonal", "mica")
        ),
        ({"init_lora_weights": "Gaussian"}, ()),
        *(
            ({"target_modules": targets}, ())
            for targets in ("all-linear", r".*\.(q|v)$", None, ["q", "v", "none"])
        ),
        (
            {
                "bias": None,
                "use_dora": None,
                "layer_replication": [],
                "trainable_token_indices": [],
                "layers_to_transform": 3,
                "runtime_config": {"ephemeral_gpu_offload": False},
            },
            (),
        ),
        ({"fan_in_fan_out": True}, ()),  # the flag never transposes a linear map
        (
            {
                "lora_dropout": 0.1,
                "task_type": "SEQ_2_SEQ_LM",
                "modules_to_save": [],
                "from_the_future": 1,
            },
            ("warning: unknown to PEFT up to 0.21, ignored: from_the_future",),
        ),
        ({"enable_lora": None}, ()),
        ({"enable_lora": False, "use_qalora": False}, ()),
        ({"target_parameters": []}, ()),
    ],
)
def test_fields_without_effect_are_noted_and_kept(write, tmp_path, fields, notes):
    adapter = read_adapter(write(**fields), shapes=_SHAPES)
    assert adapter.notes == notes and adapter.scaling == {_Q: 2.0, _V: 2.0}
    assert_array_equal(adapter.factors[_Q][0], _TENSORS[f"{_PREFIX}{_Q}.lora_A.weight"])
    resave(adapter, tmp_path / "again")
    assert read_json(tmp_path / "again" / "adapter_config.json") == _CONFIG | fields


def test_safetensors_come_before_bin(write):
    folder = write()
    (Path(folder) / "adapter_model.bin").write_bytes(b"never read")
    adapter = read_adapter(folder, shapes=_SHAPES)
    assert (
        "ignored: adapter_model.bin, because adapter_model.safetensors is next to it"
        in adapter.notes
    )


_EMBEDDING = np.arange(12, dtype=np.float32).reshape(4, 3) / 7


def _base_tensor(name):
    return {"shared.weight": _EMBEDDING, "lm_head.weight": _EMBEDDING + 1}[name]


@pytest.mark.parametrize(
    ("key", "array"),
    [
        ("base_model.model.shared.weight", _EMBEDDING),
        ("shared.weight", _EMBEDDING.astype(ml_dtypes.bfloat16)),
        ("base_model.model.lm_head.modules_to_save.default.weight", _EMBEDDING + 1),
        ("base_model.model.lm_head.original_module.weight", _EMBEDDING + 1),
        ("base_model.model.shared.base_layer.weight", _EMBEDDING),
    ],
)
def test_copies_of_base_weights_are_ignored_but_kept(write, tmp_path, key, array):
    folder = write(_TENSORS | {key: array}, modules_to_save=["lm_head"])
    adapter = read_adapter(folder, shapes=_SHAPES, base_tensor=_base_tensor)
    assert f"ignored: {key}, equal to the base's" in adapter.notes
    assert set(adapter.factors) == {_Q, _V} and set(adapter.kept) == {key}
    assert_array_equal(_resaved(adapter, tmp_path / "again")[key], array)


@pytest.mark.parametrize(
    "factors",
    [
        {"lm_head.lora_A.weight": (4, 6), "lm_head.lora_B.weight": (9, 4)},
        {"shared.lora_embedding_A": (4, 9), "shared.lora_embedding_B": (6, 4)},
    ],
)
def test_zero_lora_elsewhere_is_left_out_with_a_note(write, factors):
    keys = [_PREFIX + key for key in factors]
    arrays = [np.ones(shape, np.float32) for shape in factors.values()]
    arrays[1][:] = 0
    folder = write(_TENSORS | dict(zip(keys, arrays, strict=True)))
    adapter = read_adapter(folder, shapes=_SHAPES)
    assert set(adapter.kept) == {*keys} and set(adapter.factors) == {_Q, _V}
    note = f"ignored: 2 tensors such as {keys[0]}, zero, so it changes nothing"
    assert adapter.notes == (note,)


def test_state_of_the_training_is_ignored(write):
    state = {f"{_PREFIX}{_Q}.lora_velora_embed": np.ones((2, 3), np.float32)}
    adapter = read_adapter(
        write(_TENSORS | state, velora_config={"num_groups": 2}), shapes=_SHAPES
    )
    assert (
        f"ignored: {_PREFIX}{_Q}.lora_velora_embed, state of the training only"
        in adapter.notes
    )


_Q_PROJ = "model.layers.0.self_attn.q_proj"
_DOWN_PROJ = "model.layers.11.mlp.down_proj"


@pytest.mark.parametrize(
    ("fields", "ranks", "expected"),
    [
        ({}, (8, 8), (1.0, 1.0)),
        ({"r": 1, "lora_alpha": 32}, (1, 1), (32.0, 32.0)),
        ({"lora_alpha": -8}, (8, 8), (-1.0, -1.0)),
        ({"r": 16, "lora_alpha": 32, "use_rslora": True}, (16, 16), (8.0, 8.0)),
        ({"alpha_pattern": {"q_proj": 4}}, (8, 8), (0.5, 1.0)),
        (
            {"alpha_pattern": {"self_attn.q_proj": 4, "q_proj": 16}},
            (8, 8),
            (0.5, 1.0),
        ),
        (
            {"alpha_pattern": {"[qk]_proj": 4, r"layers.[0-9].self_attn\.q_proj": 16}},
            (8, 8),
            (0.5, 1.0),
        ),
        (
            {"alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 24}},
            (8, 8),
            (3.0, 1.0),
        ),
        (
            {"alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 24}},
            (8, 8),
            (1.0, 3.0),
        ),
        ({"rank_pattern": {"q_proj": 4, "down_proj": 2}}, (4, 2), (2.0, 4.0)),
        (
            {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 1}},
            (4, 8),
            (0.25, 1.0),
        ),
        (
            {"r": 4, "rank_pattern": {"q_proj": 16}, "use_rslora": True},
            (16, 4),
            (2.0, 4.0),
        ),
    ],
)
def test_scalings_follow_pefts_rule_and_patterns(fields, ranks, expected):
    paths = (_Q_PROJ, _DOWN_PROJ)
    found = scalings(fields, dict(zip(paths, ranks, strict=True)))
    assert found == dict(zip(paths, expected, strict=True))


# What is refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"peft_type": "IA3"},
            "peft_type is 'IA3': expected LORA; merge it into the base",
        ),
        (
            {
                "peft_type": None,
                "fine_tune_type": "lora",
                "lora_parameters": {"rank": 8},
            },
            "MLX, without its",
        ),
        (
            {"target_parameters": ["w"]},
            "target_parameters is set: LoRA on bare parameters",
        ),
        (
            {"enable_lora": [True, False]},
            "enable_lora is set: the MergedLinear of PEFT 0.2",
        ),
        (
            {"trainable_token_indices": [3]},
            "trainable_token_indices is set: retrained rows of the embedding",
        ),
        (
            {"layer_replication": [[0, 4], [2, 5]]},
            "layer_replication is set: replicated layers",
        ),
        ({"use_qalora": True}, "use_qalora is set: QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set: BD-LoRA"),
        ({"arrow_config": {}}, "arrow_config is set: Arrow"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is set: aLoRA"),
        ({"kasa_config": {}}, "kasa_config is set: KaSA"),
        (
            {"lora_bias": True},
            "lora_bias is set: a bias on lora_B, is not supported; retrain as plain LoRA",
        ),
        (
            {"bias": "all"},
            "bias is 'all': trained biases cannot be mixed; retrain with bias='none'",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save is \['lm_head'\]:.*give the base's weights",
        ),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "PiSSA changes the base's.*path_initial_model_for_weight_conv",
        ),
        (
            {"init_lora_weights": "lora_ga"},
            "LoRA-GA changes the base.*path_initial_model_for_weight_conv",
        ),
        (
            {"init_lora_weights": "loftq"},
            "LoftQ changes the base.*no path_initial_model.*retrain",
        ),
        (
            {"init_lora_weights": "new"},
            "init_lora_weights is 'new', which is unknown.*expected true, false, or",
        ),
        (
            {"lora_alpha": float("inf")},
            r"Expected `float` <= 3\.4028234663852886e\+38 - at `\$\.lora_alpha`",
        ),
        ({"alpha_pattern": {"(q": 1}}, "alpha_pattern has the key .*unterminated"),
        (
            {"use_rslora": "false"},
            r"Expected `bool \| null`, got `str` - at `\$\.use_rslora`",
        ),
        (
            {"r": 8},
            "has rank 4 in the tensors, but r and rank_pattern give 8: .*fetch both",
        ),
        ({"rank_pattern": {"q": 2}}, "has rank 4 in the tensors.* give 2"),
        # Of other tools, and files that are no JSON.
        (
            '{"config": {"mh_adapter": false}, "model_class": "BertAdapterModel", "name": "task"}',
            "AdapterHub",
        ),
        (
            '{"base_model": "gemma", "framework": "jax-tunix-qwix", "lora_rank": 32, "lora_alpha": 32.0}',
            "tunix / qwix",
        ),
        (
            '{"format": "my-native-lora", "rank": 16, "tensor_count": 512}',
            "own format, 'my-native-lora'",
        ),
        (
            '{"base_model": "somebody/robot"}',
            r"no peft_type among its fields \['base_model'\]",
        ),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1049\n",
            "this is a Git LFS pointer",
        ),
        ("{", r"not JSON \(.*\): fetch the file again"),
        ("[1]", r"Expected `object`, got `array`"),
        ("", r"not JSON \(Expecting value"),
        ('{"a":' + "[" * 100_000, r"not JSON \(.*recursion"),
    ],
)
def test_configurations_are_refused_by_name(write, fields, message):
    folder = write(**fields) if isinstance(fields, dict) else write()
    if isinstance(fields, str):
        (Path(folder) / "adapter_config.json").write_text(fields)
    _refused(folder, rf"adapter_config\.json: .*{message}")


def test_missing_files(write):
    folder = Path(write())
    (folder / "adapter_model.safetensors").unlink()
    _refused(
        folder,
        r"has neither adapter_model\.safetensors nor adapter_model\.bin: fetch the weights as well",
    )
    (folder / "adapter_config.json").unlink()
    _refused(
        folder,
        r"has no adapter_config\.json: expected the folder that PEFT's save_pretrained wrote",
    )
    (folder / "checkpoint-7").mkdir()
    _refused(folder, "has no adapter_config.json: it holds checkpoints .*checkpoint-7$")


@pytest.mark.parametrize(
    ("file", "key", "tool"),
    [
        ("adapters.npz", "x", "of MLX"),
        (
            "pytorch_lora_weights.safetensors",
            "unet.mid.attn.to_q.lora_A.weight",
            "of diffusers",
        ),
        (
            "style.safetensors",
            "lora_unet_mid_attn_to_q.lora_down.weight",
            "in the format of Kohya's scripts",
        ),
    ],
)
def test_weights_of_other_tools_are_refused_by_name(tmp_path, file, key, tool):
    save_file({key: np.ones((2, 2), np.float32)}, tmp_path / file)
    _refused(
        tmp_path,
        f"has {file} {tool}, not PEFT's adapter_model.safetensors: save the adapter with PEFT",
    )


_ONE_MORE = _factors(path="encoder.block.1.layer.0.SelfAttention.q")
_NAMES = [
    (f"{_Q}.lora_A.weight", (4, 6), "are one factor of two adapters"),
    (
        f"{_PREFIX}{_Q}.lora_B.bias",
        (10,),
        "is a bias on a factor: retrain with lora_bias=False",
    ),
    (f"{_PREFIX}{_Q}.lora_magnitude_vector", (10,), "is DoRA's: set use_dora"),
    (
        f"{_PREFIX}shared.lora_embedding_A",
        (4, 9),
        "LoRA on an embedding, which stacks of the base",
    ),
    (f"{_PREFIX}{_Q}.lora_diag", (4,), "lora_diag is KaSA"),
    (
        f"{_PREFIX}{_Q}.lora_new.weight",
        (4,),
        "lora_new.weight is a tensor that plain LoRA does not",
    ),
    (
        f"{_PREFIX}shared.token_adapter.trainable_tokens_delta",
        (4,),
        "retrained rows of the embedd",
    ),
    (f"{_PREFIX}prompt_embeddings", (4,), "prompt or prefix tuning"),
    (
        f"{_PREFIX}shared.weight",
        (4, 3),
        r"shared.weight \[4, 3\] is an embedding.*give the base's weights to comp",
    ),
    (f"{_PREFIX}encoder.q.bias", (4,), "encoder.q.bias .* is a trained bias"),
    (
        f"{_PREFIX}{_Q}.weight",
        (10, 6),
        "is a module trained in full .modules_to_save is None",
    ),
    ("encoder.x.lora_A.weight", (4, 6), "encoder.x has lora_A but no lora_B"),
    (
        f"{_PREFIX}_orig_mod.{_Q}.lora_A.weight",
        (4, 6),
        "is of a compiled model: save the adapter of the model in it",
    ),
    (f"{_PREFIX}encoder.x.lora_B.weight", (6, 4), "encoder.x has lora_B but no lora_A"),
]
_FACTORS = [
    (
        "lora_A",
        np.ones((4, 6, 3, 3), np.float32),
        r"lora_A.weight \[4, 6, 3, 3\].*LoRA on a convolution",
    ),
    (
        "lora_B",
        np.ones((10, 4, 1), np.float32),
        r"lora_B.weight \[10, 4, 1\].*MergedLinear",
    ),
    (
        "lora_A",
        np.ones(24, np.float32),
        r"lora_A.weight \[24\].*expected 2 dimensions.*gather shards .DeepSpeed",
    ),
    ("lora_A", np.ones((0, 6), np.float32), r"lora_A.weight \[0, 6\].*none empty"),
    (
        "lora_A",
        np.ones((4, 6), np.uint8),
        "lora_A.weight .* of dtype uint8: expected floats",
    ),
    (
        "lora_A",
        np.full((4, 6), np.nan, np.float32),
        "q.lora_A.weight holds NaN or infinity.*retrain",
    ),
    (
        "lora_B",
        np.full((10, 4), np.inf, ml_dtypes.bfloat16),
        "q.lora_B.weight holds NaN or infinity",
    ),
    (
        "lora_A",
        np.ones((3, 6), np.float32),
        r"lora_A.weight \[3, 6\] has rank 3, .*lora_B.* has rank 4: expected",
    ),
    (
        "lora_A",
        np.ones((4, 7), np.float32),
        r"1 of 3 modules do not fit; first .*lora_A.weight \[4, 7\].*\[r, 6\]",
    ),
    (
        "lora_B",
        np.ones((9, 4), np.float32),
        r"lora_B.weight \[9, 4\]: expected \[r, 6\] and \[10, r\]",
    ),
]
_MAGNITUDES = [
    (
        10,
        (_Q,),
        f"{_V} has lora_A and lora_B but no lora_magnitude_vector .use_dora is true.: the file is incomplete",
    ),
    (9, (_Q, _V), r"lora_magnitude_vector has shape \[9\]: expected \[10\]"),
    ((1, 10), (_Q, _V), r"lora_magnitude_vector \[1, 10\].*expected 1 dimension"),
]
_REFUSED = [
    *(
        ({key: np.ones(shape, np.float32)}, {}, message)
        for key, shape, message in _NAMES
    ),
    *(
        (_ONE_MORE | {f"{_PREFIX}{_Q}.{kind}.weight": array}, {}, message)
        for kind, array, message in _FACTORS
    ),
    *(
        (
            {
                f"{_PREFIX}{path}.lora_magnitude_vector": np.ones(shape, "f4")
                for path in paths
            },
            {"use_dora": True},
            message,
        )
        for shape, paths, message in _MAGNITUDES
    ),
]


@pytest.mark.parametrize(("tensors", "fields", "message"), _REFUSED)
def test_tensors_are_refused_by_name(write, tensors, fields, message):
    _refused(
        write(_TENSORS | tensors, **fields), rf"adapter_model\.safetensors: .*{message}"
    )


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("y" * 10_000), ValueError("z")]
)
def test_every_error_names_the_adapter_and_keeps_its_cause(write, error):
    def fail(_name):
        raise error

    folder = write(_TENSORS | {"shared.weight": _EMBEDDING})
    with pytest.raises(AdapterError, match=f"^{folder}.*: ") as caught:
        read_adapter(folder, base_tensor=fail)
    assert error in (caught.value.__cause__, caught.value.__cause__.__cause__)
    assert len(str(caught.value)) < 2_500
    assert isinstance(error, ValueError) or type(error).__name__ in str(caught.value)


def test_a_path_that_the_base_lacks_and_a_wrong_base(write):
    stray = "encoder.block.7.layer.0.SelfAttention.q"
    tensors = (
        _TENSORS
        | _factors(path="encoder.block.1.layer.0.SelfAttention.q")
        | _factors(path=stray)
    )
    message = (
        rf"safetensors: 1 of 4 modules do not fit; first .*the base has no linear module {stray} .nearest: encoder.*"
        "give the base that the adapter was trained on, 'google/flan-t5-large'"
    )
    _refused(write(tensors), message)
    llama = _factors(path="model.layers.0.self_attn.q_proj") | _factors(
        path="model.layers.0.self_attn.v_proj"
    )
    _refused(
        write(llama),
        "wrong base.* 2 of 2 modules do not fit.*trained on, 'google/flan-t5-large'",
    )
    _refused(
        write(_TENSORS | _factors(path="lm_head")),
        "lm_head.*: the base has no linear module lm_head",
    )
    _refused(write(_TENSORS), "wrong base.* 2 of 2", shapes={_Q: (8, 8), _V: (8, 8)})
    classifier = _factors(path="transformer.encoder.block.0.layer.0.SelfAttention.q")
    message = "safetensors: 1 of 1 modules .*task_type SEQ_CLS names a model with another head: retrain"
    _refused(write(classifier, task_type="SEQ_CLS"), message)


@pytest.mark.parametrize(
    ("fields", "key", "array", "message"),
    [
        (
            {},
            "lm_head.weight",
            _EMBEDDING,
            r"lm_head.weight \[4, 3\] is an embedding.*unlike the base's",
        ),
        (
            {},
            "shared.weight",
            _EMBEDDING[:3],
            r"shared.weight \[3, 3\].*unlike the base's.* \[4, 3\]",
        ),
        (
            {"modules_to_save": ["score"]},
            "score.weight",
            _EMBEDDING,
            r"score.weight .* is a module trained in full .modules_to_save is .*score.*, and the base has",
        ),
        (
            {"task_type": "SEQ_CLS", "modules_to_save": None},
            "classifier.out_proj.weight",
            _EMBEDDING,
            r"the base has no classifier.out_proj.weight \(task_type SEQ_CLS trains another head\)",
        ),
    ],
)
def test_full_weights_that_differ_are_refused(write, fields, key, array, message):
    _refused(
        write(_TENSORS | {_PREFIX + key: array}, **fields),
        message,
        base_tensor=_base_tensor,
    )


def test_a_file_without_lora(write):
    tensors = {"shared.weight": _EMBEDDING}
    _refused(
        write(tensors),
        r"has no lora_A and lora_B \(shared.weight is equal.*: expected a LoRA",
        base_tensor=_base_tensor,
    )


# The way back.


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_adapter(tmp_path / "deep" / "new", {"r": object()}, _TENSORS)
    assert list((tmp_path / "deep").iterdir()) == []
    transposed = {"x.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    write_adapter(tmp_path / "deep" / "new", _CONFIG, transposed)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    with refused("new exists: give a new folder, or remove it first"):
        write_adapter(tmp_path / "deep" / "new", _CONFIG, _TENSORS)
    _assert_same(
        load_file(tmp_path / "deep" / "new" / "adapter_model.safetensors"), transposed
    )
