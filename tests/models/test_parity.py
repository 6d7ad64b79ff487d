"""Every family against transformers and PEFT, on tiny random models made here: an entry in `_FAMILIES` is a test.

transformers gets every row alone and without padding; here each row is in the batch twice, padded on the right and on
the left. What a fusion should give is computed in PyTorch from the adapters' files, by the definition.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft_models
import pytest
from flax import nnx
from peft_models import fused

import lorafusion_jax as lf
from lorafusion_jax.adapters import expand
from lorafusion_jax.io import fused_adapter, lora_adapter, write_adapter
from lorafusion_jax.models import linear_shapes
from lorafusion_jax.training import cross_entropy

pytestmark = pytest.mark.peft

_VOCABULARY = 97
_WINDOW = 5
_TOKENS = 8
_PROMPT = 4
_SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_TWO_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def _rope(rope_type="default", theta=100.0, **fields):
    return {"rope_type": rope_type, "rope_theta": theta} | fields


_LOCAL = _rope(theta=50.0)
_HALF = {"rope_parameters": _rope(partial_rotary_factor=0.5)}
_YARN = _rope("yarn", factor=8.0, original_max_position_embeddings=8)
_GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": _WINDOW}
# Every family with what sets it apart, strong enough to matter.
_FAMILIES = {
    "t5": {
        "vocab_size": _VOCABULARY,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
    },
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": _WINDOW, "tie_word_embeddings": False},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": _WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 12},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "gemma3_text": _GEMMA
    | {
        "layer_types": _TWO_KINDS,
        "rope_parameters": {
            "full_attention": _rope("linear", 1000.0, factor=4.0),
            "sliding_attention": _LOCAL,
        },
    },
    "phi3": _HALF | {"sliding_window": _WINDOW, "tie_word_embeddings": False},
    "gemma4_text": {
        "num_hidden_layers": 6,
        "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 3,
        # With larger weights the gradients of transformers in float32 are 1e-3 off those in float64.
        "initializer_range": 0.15,
        "head_dim": 4,
        "global_head_dim": 8,
        "sliding_window": _WINDOW,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": _VOCABULARY,
        "final_logit_softcapping": 2.0,
        "rope_parameters": {
            "full_attention": _rope("proportional", partial_rotary_factor=0.5),
            "sliding_attention": _LOCAL,
        },
    },
    "qwen3_5_text": _HALF
    | {
        "num_hidden_layers": 6,
        "layer_types": 2 * ["linear_attention", "linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 10,
    },
}
_GRANITE_4 = {
    "layer_types": ["attention"] * 3,
    "num_local_experts": 0,
    "shared_intermediate_size": 40,
}
_GRANITE_4 |= {"mamba_n_heads": 4, "logits_scaling": 5.0}
# Families whose linear maps are Llama's: their fusions are tested at length only.
_FURTHER = {
    "gemma": {"head_dim": 12},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 5.0,
    },
    "granitemoehybrid": _GRANITE_4,
    "ministral": {
        "head_dim": 12,
        "sliding_window": _WINDOW,
        "layer_types": _TWO_KINDS,
    },
    "smollm3": {
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": _WINDOW,
    },
    "olmo2": {},
    "gpt2": {"num_key_value_heads": 4, "n_inner": 40},
    "gpt_neox": {"num_key_value_heads": 4},
    "falcon": {},
    "phi": {},
    "stablelm": {},
    "hunyuan_v1_dense": {
        "head_dim": 12,
        "rope_parameters": _rope("dynamic", 50.0, factor=1.0, alpha=30.0),
    },
    "olmo3": {
        "sliding_window": _WINDOW,
        "layer_types": _TWO_KINDS,
        "rope_parameters": {
            "full_attention": _YARN | {"attention_factor": 1.3},
            "sliding_attention": _LOCAL,
        },
    },
    "ministral3": {
        "head_dim": 12,
        "sliding_window": _WINDOW,
        "rope_parameters": _YARN
        | {
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.5,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    },
}
_VIT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_VIT |= {"image_size": 28, "patch_size": 14}
_QWEN_VIT = {
    "depth": 1,
    "num_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": 32,
}
_MROPE = _rope(mrope_section=[1, 1, 2])
# Models for images and text: the fields of the text model, and of the others.
_WITH_IMAGES = {
    "gemma3": (
        _FAMILIES["gemma3_text"],
        {"vision_config": _VIT, "mm_tokens_per_image": 4},
    ),
    "gemma4": (_FAMILIES["gemma4_text"], {"vision_config": _VIT | {"head_dim": 8}}),
    "qwen2_vl": (
        {"rope_parameters": _MROPE},
        {
            "vision_config": {
                "depth": 1,
                "num_heads": 2,
                "embed_dim": 16,
                "hidden_size": 32,
            }
        },
    ),
    "qwen2_5_vl": (
        {"rope_parameters": _MROPE},
        {"vision_config": _QWEN_VIT, "tie_word_embeddings": True},
    ),
    "qwen3_vl": (
        {
            "head_dim": 12,
            "rope_parameters": _MROPE
            | {"mrope_section": [2, 2, 2], "mrope_interleaved": True},
        },
        {
            "vision_config": _QWEN_VIT
            | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        },
    ),
    "qwen3_5": (
        _FAMILIES["qwen3_5_text"],
        {"vision_config": _QWEN_VIT | {"num_position_embeddings": 16}},
    ),
    "mistral3": (
        _FURTHER["ministral3"] | {"model_type": "ministral3"},
        {
            "vision_config": _VIT | {"model_type": "pixtral"},
            "tie_word_embeddings": False,
        },
    ),
    "llava": (
        {"model_type": "llama"},
        {"vision_config": _VIT | {"model_type": "clip_vision_model"}},
    ),
    "idefics3": ({"model_type": "llama"}, {"vision_config": _VIT}),
    "smolvlm": ({"model_type": "llama"}, {"vision_config": _VIT}),
}
_LONGROPE = _rope(
    "longrope",
    short_factor=[1.0, 1.3, 1.1, 2.0],
    long_factor=[2.0, 3.0, 5.0, 9.0],
    partial_rotary_factor=1.0,
)


def _in_layers_of_one_kind(scaling):
    """Return models in which only some layers have this scaling of rotary positions."""
    two_kinds = {"layer_types": _TWO_KINDS, "sliding_window": _WINDOW}
    full = {"full_attention": scaling, "sliding_attention": _LOCAL}
    sliding = {"full_attention": _LOCAL, "sliding_attention": scaling}
    gemma = {"query_pre_attn_scalar": 20, "head_dim": 8} | two_kinds
    return {
        "smollm3": {"no_rope_layers": [1, 0, 1], "rope_parameters": scaling},
        "granitemoehybrid": _GRANITE_4 | {"rope_parameters": scaling},
        "gemma3_text": gemma | {"rope_parameters": sliding},
        "olmo3": two_kinds | {"rope_parameters": full},
    }


_VARIANTS = {
    "plain": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": _rope("linear", factor=3.0)},
    "partial": _HALF,
    # Rows are longer than these contexts.
    "dynamic": {
        "max_position_embeddings": 6,
        "rope_parameters": _rope("dynamic", factor=3.0),
    },
    "llama3": {
        "rope_parameters": _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8,
        )
    },
    # Rows have 12, 5 and 9 tokens, and those that are longer than the context have other frequencies.
    **{
        f"longrope after {context} tokens": {
            "model_type": "phi3",
            "original_max_position_embeddings": context,
            "rope_parameters": _LONGROPE | {"attention_factor": 1.2},
        }
        for context in (4, 40)
    },
    "yarn": {"rope_parameters": _YARN},
    "yarn between pairs": {
        "rope_parameters": _YARN
        | {"truncate": False, "beta_fast": 3.0, "beta_slow": 0.2}
    },
    "mt5": {"model_type": "mt5", "vocab_size": _VOCABULARY},
    "Gemma 4 without inputs of layers": _FAMILIES["gemma4_text"]
    | {
        "model_type": "gemma4_text",
        "layer_types": 3 * ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
    },
    "Gemma 4, small groups": _FAMILIES["gemma4_text"]
    | {
        "model_type": "gemma4_text",
        "layer_types": 3 * ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
    },
    "GPT-NeoX in turn": {
        "model_type": "gpt_neox",
        "num_key_value_heads": 4,
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "new Falcon": {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "bias": True,
    },
    "Falcon in turn": {
        "model_type": "falcon",
        "parallel_attn": False,
        "multi_query": False,
    },
    "parallel StableLM": {
        "model_type": "stablelm",
        "use_parallel_residual": True,
        "use_qkv_bias": True,
    },
    "no rope": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "rope in a Granite 4": _GRANITE_4
    | {"model_type": "granitemoehybrid", "position_embedding_type": "rope"},
    **{
        f"{kind}, {scaling['rope_type']} in some layers": {"model_type": kind} | changes
        for scaling in (
            _YARN | {"attention_factor": 1.6, "llama_4_scaling_beta": 0.5},
            _LONGROPE
            | {"attention_factor": 1.6, "original_max_position_embeddings": 4},
        )
        for kind, changes in _in_layers_of_one_kind(scaling).items()
    },
    **{kind: changes | {"model_type": kind} for kind, changes in _FURTHER.items()},
    **{kind: {"model_type": kind} for kind in _WITH_IMAGES},
}
_ADAPTERS = {
    "small": {"r": 2, "lora_alpha": 3, "use_rslora": True},
    "large": {"r": 4, "lora_alpha": 2},
    "other": {"r": 4, "lora_alpha": 5},
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True},
}
_LONG_GRADIENTS = [
    pytest.param(kind, "sum", marks=pytest.mark.long)
    for kind in (*_FURTHER, "qwen3_vl")
]
_FUSED = {"sum": ("small", "large"), "mix": ("large", "other")}
_SCALE = 0.6  # of a DoRA adapter

_ROWS = [
    np.random.default_rng(0).integers(3, _VOCABULARY, length).tolist()
    for length in (12, 5, 9)
]
_WIDTH = 14
_ANSWER = [0, 8, 5, 13, 21]  # what the decoder of an encoder-decoder has read


def _made(folder, model_type, changes):
    """Save a random model; norms and biases are random too."""
    import torch
    import transformers

    torch.manual_seed(0)
    if model_type in ("t5", "mt5"):
        model = peft_models.t5(model_type.upper(), **changes)
    else:
        if model_type in _WITH_IMAGES:
            text, changes = _WITH_IMAGES[model_type]
            fields = changes | {"text_config": _SIZES | text}
            kind = "ImageTextToText"
        else:
            fields = _SIZES | changes
            kind = "CausalLM"
        config = transformers.AutoConfig.for_model(model_type, **fields)
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    with torch.no_grad():
        scalars = [b for name, b in model.named_buffers() if "layer_scalar" in name]
        for parameter in [*model.parameters(), *scalars]:
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def _read(folder):
    import transformers

    if (config := lf.read_config(folder)).causal:
        kind = "ImageTextToText" if config.model_type in _WITH_IMAGES else "CausalLM"
        load = getattr(transformers, f"AutoModelFor{kind}").from_pretrained
        return load(folder, attn_implementation="eager").eval()
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def _read_adapted(folder, adapter):
    import peft

    return peft.PeftModel.from_pretrained(_read(folder), adapter).eval()


def _inputs(model, row):
    import torch

    both = (
        {"decoder_input_ids": torch.tensor([_ANSWER])}
        if model.config.is_encoder_decoder
        else {}
    )
    return {"input_ids": torch.tensor([row])} | both


def _forget(model):
    """Read a short row: until then transformers keeps the dynamic frequencies of the longest row that it has read."""
    import torch

    with torch.no_grad():
        model(**_inputs(model, [3]))


def _theirs(model):
    import torch

    found = []
    for row in _ROWS:
        _forget(model)
        with torch.no_grad():
            found.append(model(**_inputs(model, row)).logits[0].numpy())
    return found


def _padded():
    """Every row, padded on the right, and again, padded on the left."""
    ids = np.full((2 * len(_ROWS), _WIDTH), 7, np.int32)
    mask = np.zeros(ids.shape, bool)
    for number, row in enumerate(_ROWS):
        for at, place in (
            (number, slice(len(row))),
            (len(_ROWS) + number, slice(_WIDTH - len(row), None)),
        ):
            ids[at, place] = row
            mask[at, place] = True
    return jnp.asarray(ids), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames="graph")
def _run(graph, weights, adapters):
    model = nnx.merge(graph, weights)
    rows = _padded()
    answers = (
        ()
        if model.config.causal
        else (jnp.tile(jnp.array(_ANSWER), (len(rows[0]), 1)),)
    )
    return model(*rows, *answers, adapters)


@functools.partial(jax.jit, static_argnames="graph")
def _say(graph, weights, adapters):
    return lf.generate(
        nnx.merge(graph, weights), *_padded(), adapters, max_new_tokens=_TOKENS
    )


def _check(theirs, model, adapters=None):
    """Check the logits of every real token, to 1e-4 of the largest."""
    graph, weights = nnx.split(model)
    ours = np.asarray(_run(graph, weights, adapters or {}))
    mask = np.asarray(_padded()[1])
    mask = mask if model.config.causal else np.ones(ours.shape[:2], bool)
    tolerance = 1e-4 * max(np.abs(row).max() for row in theirs)
    for got, real, wanted in zip(ours, mask, 2 * theirs, strict=True):
        np.testing.assert_allclose(got[real], wanted, rtol=0, atol=tolerance)


def _check_said(theirs, model, adapters=None):
    """Check the ids of greedy generation."""
    import torch

    graph, weights = nnx.split(model)
    ours = np.asarray(_say(graph, weights, adapters or {}))
    for number, row in enumerate(_ROWS):
        prompt = torch.tensor([row])
        _forget(theirs)
        how = {
            "attention_mask": torch.ones_like(prompt),
            "do_sample": False,
            "max_new_tokens": _TOKENS,
        }
        wanted = theirs.generate(prompt, **how)[
            0, len(row) if model.config.causal else 1 :
        ].numpy()
        for got in (ours[number], ours[len(_ROWS) + number]):
            np.testing.assert_array_equal(got[: len(wanted)], wanted)
            assert (got[len(wanted) :] == 0).all()


def _differ(a, b):
    return all(
        np.abs(x - y).max() > 1e-2 * np.abs(y).max() for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(
    scope="module",
    params=[
        *_FAMILIES,
        *(
            pytest.param(kind, marks=pytest.mark.long)
            for kind in (*_FURTHER, *_WITH_IMAGES)
        ),
    ],
)
def base(request, tmp_path_factory):
    """A base model of a family, with adapters on all its linear maps as PEFT saves them."""
    import peft

    folder = tmp_path_factory.mktemp(request.param)
    _made(folder / "base", request.param, (_FAMILIES | _FURTHER).get(request.param, {}))
    for name, fields in _ADAPTERS.items():
        task = "SEQ_2_SEQ_LM" if request.param == "t5" else "CAUSAL_LM"
        linear = (
            r".*(language|text)_model\..*_proj(_\w+)?"
            if request.param in _WITH_IMAGES
            else "all-linear"
        )
        if request.param.startswith("gemma4"):
            # All but the map that makes the inputs of all layers.
            linear = r"(?!.*vision).*layers\.\d+\..*(_proj|_projection|_gate)"
        config = peft.LoraConfig(task_type=task, target_modules=linear, **fields)
        config.fan_in_fan_out = request.param == "gpt2"
        if name == "small":
            # One module has another rank and the same scaling.
            path = next(iter(linear_shapes(lf.read_config(folder / "base"))))
            config.rank_pattern = {path: 8}
            config.alpha_pattern = {path: 6}
        adapted = peft.get_peft_model(_read(folder / "base"), config)
        peft_models.randomise(adapted, std=0.2).save_pretrained(folder / name)
    return folder / "base"


@pytest.fixture(scope="module")
def model(base):
    return lf.load_base(base)


@pytest.fixture(scope="module")
def plain(base):
    """transformers' logits of the base model."""
    return _theirs(_read(base))


@pytest.fixture(scope="module")
def fusion(base, model):
    """Function that returns a fusion from its composition and whether it has magnitudes."""
    return functools.cache(functools.partial(_fusion, base, model))


def _fusion(base, model, composition, magnitudes):
    folders = [base.parent / name for name in _FUSED[composition]]
    return fused(
        model, folders, lf.Fusion(composition=composition, magnitudes=magnitudes)
    )


def _in_torch(base, config, composition, params):
    """Return a function that runs the model with the fusion in its weights, and the fusion's numbers as leaves."""
    import torch
    from safetensors.torch import load_file

    model = _read(base)
    files = [
        load_file(base.parent / name / "adapter_model.safetensors")
        for name in _FUSED[composition]
    ]
    scales = [
        fields["lora_alpha"]
        / (fields["r"] ** 0.5 if fields.get("use_rslora") else fields["r"])
        for fields in (_ADAPTERS[name] for name in _FUSED[composition])
    ]
    leaves = jax.tree.map(
        lambda a: torch.tensor(np.array(a), requires_grad=True), params
    )
    blocks = [
        f"{stack}.{layer}"
        for stack, of in config.stacks.items()
        for layer in range(of.layers)
    ]

    def weights():
        found = {}
        for name, site in config.sites.items():
            for layer in range(site.layers):
                path = site.path_of(layer)
                pairs = [
                    [file[f"base_model.model.{path}.lora_{f}.weight"] for f in "AB"]
                    for file in files
                ]
                c = leaves["coefficients"][
                    :, blocks.index(f"{name.partition('.')[0]}.{layer}")
                ]
                if composition == "mix":
                    A = sum(x * A for x, (A, _) in zip(c, pairs, strict=True))
                    B = sum(
                        x * s * B for x, s, (_, B) in zip(c, scales, pairs, strict=True)
                    )
                    update = B @ A
                else:
                    update = sum(
                        x * s * B @ A
                        for x, s, (A, B) in zip(c, scales, pairs, strict=True)
                    )
                weight = model.get_parameter(f"{path}.weight").detach()
                flipped = model.config.model_type == "gpt2"
                weight = (weight.T if flipped else weight) + update
                if "magnitudes" in leaves:
                    # PEFT's DoRA: the norm is a constant.
                    weight = (
                        weight
                        * (
                            leaves["magnitudes"][name][layer]
                            / weight.norm(dim=1).detach()
                        )[:, None]
                    )
                found[f"{path}.weight"] = weight.T if flipped else weight
        return found

    def run(row):
        return torch.func.functional_call(
            model, weights(), (), _inputs(model, row)
        ).logits[0]

    return run, leaves


def test_a_family_without_adapters(model, plain):
    _check(plain, model)


@pytest.mark.parametrize(
    ("composition", "magnitudes"), [("sum", False), ("sum", True), ("mix", False)]
)
def test_a_fusion_and_its_exported_adapter(
    base, model, fusion, plain, tmp_path, composition, magnitudes
):
    found = fusion(composition, magnitudes)
    run, _ = _in_torch(base, model.config, composition, found.params)
    wanted = [run(row).detach().numpy() for row in _ROWS]
    assert _differ(wanted, plain)
    _check(wanted, model, found.adapters)
    pool = found.frozen.pool
    spread = expand(found.params["coefficients"], pool, "block")
    adapter = fused_adapter(
        model.config,
        pool,
        jnp.arange(2),
        spread,
        composition,
        base=str(base),
        magnitudes=found.params.get("magnitudes"),
    )
    write_adapter(tmp_path / "fused", *adapter)
    _check(_theirs(_read_adapted(base, tmp_path / "fused")), model, found.adapters)


def test_a_merged_fusion_in_transformers(base, model, fusion, tmp_path):
    found = fusion("sum", True)
    lf.save_base(lf.merged_base(model, found.adapters), tmp_path / "merged", base)
    merged = _read(tmp_path / "merged")
    _check(_theirs(merged), model, found.adapters)
    _check_said(merged, model, found.adapters)


def test_a_dora_adapter_at_a_coefficient_is_peft_with_its_layers_scaled(
    base, model, plain
):
    adapters = fused(
        model, [base.parent / "dora"], lf.Fusion(magnitudes=False), _SCALE
    ).adapters
    theirs = _read_adapted(base, base.parent / "dora")
    for module in theirs.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(_SCALE)
    wanted = _theirs(theirs)
    assert _differ(wanted, plain)
    _check(wanted, model, adapters)


def test_an_exported_lora_in_peft(base, model, plain, tmp_path):
    method = lf.LoRA(sites=tuple(model.config.sites.items())[::2], rank=3, alpha=5.0)
    frozen = lf.Frozen(nnx.split(model)[1])
    none = jnp.arange(0)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(method.init, frozen, none, jax.random.key(0))
    params = jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape, np.float32)), shapes
    )
    adapters = method.adapters(params, frozen, none)[0]
    write_adapter(
        tmp_path / "lora", *lora_adapter(model.config, adapters, base=str(base))
    )
    wanted = _theirs(_read_adapted(base, tmp_path / "lora"))
    assert _differ(wanted, plain)
    _check(wanted, model, adapters)


@pytest.mark.parametrize(
    ("base", "composition"),
    [
        ("gemma2", "sum"),
        ("phi3", "mix"),
        ("gemma4_text", "sum"),
        ("qwen3_5_text", "sum"),
        *_LONG_GRADIENTS,
    ],
    indirect=["base"],
)
def test_gradients(base, model, fusion, composition):
    """Of the mean loss of the tokens behind each row's first four."""
    import torch

    found = fusion(composition, True)
    run, leaves = _in_torch(base, model.config, composition, found.params)
    answers = [row[_PROMPT:] for row in _ROWS]
    losses = [
        torch.nn.functional.cross_entropy(
            run(row)[_PROMPT - 1 : -1], torch.tensor(row[_PROMPT:]), reduction="sum"
        )
        for row in _ROWS
    ]
    wanted_loss = sum(losses) / sum(map(len, answers))
    wanted_loss.backward()

    width = max(map(len, answers))
    labels = jnp.array([row + [-100] * (width - len(row)) for row in answers])
    prompts = jnp.array([row[:_PROMPT] for row in _ROWS])

    @jax.jit
    @jax.value_and_grad
    def loss(params, frozen):
        adapters, _ = found.method.adapters(params, frozen, jnp.arange(2))
        of_frozen = nnx.merge(nnx.graphdef(model), frozen.base)
        return cross_entropy(
            of_frozen.label_logits(prompts, prompts > 0, labels, adapters), labels
        )

    value, gradients = loss(found.params, found.frozen)
    np.testing.assert_allclose(value, wanted_loss.item(), rtol=1e-5)
    # In float32 the gradients of transformers' two forms of the delta rule differ by 2.3e-4 themselves.
    tolerance = 1e-3 if model.config.family == "qwen3_5" else 1e-4
    for got, leaf in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(leaves), strict=True
    ):
        wanted = leaf.grad.numpy()
        np.testing.assert_allclose(
            got, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max()
        )


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied heads
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_5_text", "t5"])
def test_lora_on_the_head(tmp_path, kind):
    """The heads of a Gemma 2 and of this T5 are tied, and PEFT saves copies of heads and embeddings."""
    import peft

    base = _made(tmp_path / "base", kind, _FAMILIES[kind])
    model = lf.load_base(base)
    folders = [tmp_path / name for name in _FUSED["mix"]]
    for folder in folders:
        config = peft.LoraConfig(
            target_modules=["q_proj", "q", "lm_head"], **_ADAPTERS[folder.name]
        )
        adapted = peft.get_peft_model(_read(base), config)
        peft_models.randomise(adapted, std=0.2).save_pretrained(
            folder, save_embedding_layers=True
        )
    read = functools.partial(fused, model, base=base)
    one = read(folders[:1], lf.Fusion(magnitudes=False), 1.0)
    _check(_theirs(_read_adapted(base, folders[0])), model, one.adapters)

    both = read(folders, lf.Fusion())
    pool = both.frozen.pool
    assert pool.sites[-1] == "head.lm_head"
    adapter = fused_adapter(
        model.config,
        pool,
        jnp.arange(2),
        expand(both.params["coefficients"], pool, "block"),
        "sum",
        base=str(base),
        magnitudes=both.params["magnitudes"],
    )
    write_adapter(tmp_path / "fused", *adapter)
    _check(_theirs(_read_adapted(base, tmp_path / "fused")), model, both.adapters)
    lf.save_base(lf.merged_base(model, both.adapters), tmp_path / "merged", base)
    merged = _read(tmp_path / "merged")
    _check(_theirs(merged), model, both.adapters)
    _check_said(merged, model, both.adapters)


@pytest.mark.parametrize("kind", _VARIANTS)
def test_variants_and_further_families(tmp_path, kind):
    changes = {"model_type": "llama"} | _VARIANTS[kind]
    ours = lf.load_base(_made(tmp_path / "base", changes.pop("model_type"), changes))
    theirs = _read(tmp_path / "base")
    assert ours.config.tied == theirs.config.tie_word_embeddings
    _check(_theirs(theirs), ours)
    _check_said(theirs, ours)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3"])
def test_windows_that_a_family_does_not_read(tmp_path, model_type):
    """A Llama has no window, and a Phi-3 has one in all layers; transformers reads this Mistral as a Ministral."""
    changes = {"sliding_window": _WINDOW, "layer_types": _TWO_KINDS}
    folder = _made(tmp_path / "base", model_type, changes)
    _check(_theirs(_read(folder)), lf.load_base(folder))
