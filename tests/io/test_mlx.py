"""Adapters of mlx-lm against its logits, and what is refused."""

import jax.numpy as jnp
import numpy as np
import peft_models
import pytest
from json_files import write_json
from numpy.testing import assert_allclose
from refusals import refused
from safetensors.numpy import save_file

import lorafusion_jax as lf
from lorafusion_jax.io import ConvertOptions, convert, read_adapter


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_logits_are_those_of_mlx_also_from_a_converted_pool(goldens, tmp_path, name):
    base = goldens / "fusion/llama/base"
    golden = dict(np.load(goldens / "mlx/logits.npz"))
    source = goldens / "mlx" / name
    (entry,) = convert(
        ConvertOptions(base=str(base), adapters=(str(source),), out=tmp_path / "pool")
    )["adapters"]
    assert (
        "trained on 'llama-4bit', a quantised base, and converted for the unquantised one"
        in entry["notes"][0]
    )
    model = lf.load_base(base)
    ids = jnp.asarray(golden["rows"], jnp.int32)
    for folder in (source, tmp_path / "pool" / entry["folder"]):
        adapters = peft_models.fused(
            model, [folder], lf.Fusion(magnitudes=False), 1.0
        ).adapters
        logits = model(ids, jnp.ones(ids.shape, bool), adapters)
        assert_allclose(
            logits, golden[name], rtol=0, atol=1e-5 * np.abs(golden[name]).max()
        )


@pytest.mark.peft
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_peft_reads_the_adapter_of_the_pool(goldens, tmp_path, name):
    import peft
    import torch
    import transformers

    base = goldens / "fusion/llama/base"
    golden = dict(np.load(goldens / "mlx/logits.npz"))
    source = str(goldens / "mlx" / name)
    out = tmp_path / "pool"
    (entry,) = convert(ConvertOptions(base=str(base), adapters=(source,), out=out))[
        "adapters"
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, out / entry["folder"]).eval()
    with torch.no_grad():
        logits = model(torch.tensor(golden["rows"])).logits.numpy()
    assert_allclose(
        logits, golden[name], rtol=0, atol=1e-5 * np.abs(golden[name]).max()
    )


_Q = "model.layers.0.self_attn.q_proj"
_FACTORS = {f"{_Q}.lora_a": (6, 2), f"{_Q}.lora_b": (2, 10)}
_SCALE = {"lora_parameters": {"scale": 3.0}}


def _written(folder, fields, shapes=_FACTORS):
    save_file(
        {key: np.ones(shape, np.float32) for key, shape in shapes.items()},
        folder / "adapters.safetensors",
    )
    write_json(folder / "adapter_config.json", fields)
    return str(folder)


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        (_SCALE, None),
        (
            _SCALE
            | {
                "fine_tune_type": None,
                "num_layers": -1,
                "model": "mlx-community/Qwen3-0.6B",
            },
            None,
        ),
        # Some tools write PEFT's fields next to those of mlx-lm.
        (_SCALE | {"peft_type": "LORA", "r": 2, "lora_alpha": 99}, None),
        (
            {"lora_parameters": {"scale": 3.0, "alpha": 16}},
            "ignored: lora_parameters.alpha",
        ),
    ],
)
def test_the_scale_and_the_tensors_suffice(tmp_path, fields, note):
    adapter = read_adapter(_written(tmp_path, fields), shapes={_Q: (6, 10)})
    assert adapter.scaling == {_Q: 3.0} and adapter.config["lora_alpha"] == 6.0
    assert all(note and note in given for given in adapter.notes)


@pytest.mark.parametrize(
    ("fields", "shapes", "message"),
    [
        (
            {"fine_tune_type": "full", "lora_parameters": None},
            _FACTORS,
            "fine_tune_type is 'full': .*mlx_lm.fuse",
        ),
        ({}, _FACTORS, "lora_parameters is missing"),
        (
            {"lora_parameters": {"rank": 8}},
            _FACTORS,
            r"Object missing required field `scale` - at `\$\.lora_parameters`",
        ),
        (
            _SCALE | {"fine_tune_type": "dora"},
            _FACTORS,
            "has lora_A and lora_B but no lora_magnitude_vector",
        ),
        (
            _SCALE,
            {f"{_Q}.lora_a": (4, 2, 6)},
            r"q_proj.lora_a \[4, 2, 6\] is LoRA on a layer of experts",
        ),
        (
            _SCALE,
            {"model.embed_tokens.lora_a": (9, 2)},
            "embed_tokens.lora_a is LoRA on an embedding",
        ),
        (_SCALE, {f"{_Q}.lora_a": (6, 2)}, "has lora_A but no lora_B"),
        (
            _SCALE,
            _FACTORS | {f"{_Q}.lora_a_scales": (6, 1)},
            "lora_a_scales is a tensor that plain LoRA does not have",
        ),
        (
            _SCALE,
            _FACTORS | {"model.norm.weight": (6,)},
            "model.norm.weight.* is a module trained in full",
        ),
    ],
)
def test_refused(tmp_path, fields, shapes, message):
    with refused(message):
        read_adapter(_written(tmp_path, fields, shapes))
