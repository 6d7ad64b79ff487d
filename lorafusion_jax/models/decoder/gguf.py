"""Layout of these models in llama.cpp's GGUF files: keys of the configuration, names of tensors and changes to them.

Source: llama.cpp's conversion scripts, and the defaults of its models (src/models) for missing keys.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from ..architecture import GGUFLayout, GGUFTensor
from .config import DecoderConfig

# general.architecture -> model_type and architecture of a config.json. Mistral's files are of llama's architecture.
_MODELS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
}
_MISTRAL = ("mistral", "MistralForCausalLM")
_OLMO3 = ("olmo3", "Olmo3ForCausalLM")
# Kinds whose rows of queries and keys are interleaved in a file, and those whose config tells of biases.
_INTERLEAVED = ("llama", "mistral", "granite", "smollm3")
_ATTENTION_BIAS = ("llama", "qwen3", "granite", "smollm3", "olmo2")
_MLP_BIAS = ("llama", "granite", "smollm3")

_LARGEST = 10_000_000  # number that the file gives for a size
_HEAD = "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"
_LONGROPE = {
    f"rope_factors_{kind}.weight": f"{kind}_factor" for kind in ("short", "long")
}
OF_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    _HEAD: "lm_head.weight",
}
_PARTS = ("weight", "bias")
_OF_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
MODULES = _NORMS | {
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_MODULES = MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI_MODULES = MODULES | {
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_up": "mlp.gate_up_proj",
}
_OLMO_MODULES = {
    name: module
    for name, module in _GEMMA_MODULES.items()
    if name not in ("attn_norm", "ffn_norm")
}
_MODULES_OF = {
    "gemma2": _GEMMA_MODULES,
    "gemma3_text": _GEMMA_MODULES,
    "phi3": _PHI_MODULES,
    "olmo2": _OLMO_MODULES,
    "olmo3": _OLMO_MODULES,
}
# Granite's factors: key of a file -> field of a config.json.
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}

# Gemma's largest models divide their queries by the width of a head as it would be without head_dim.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
# Keys that do not change the model's numbers, or that repeat the shapes of the tensors.
_WITHOUT_EFFECT = {"vocab_size", "rope.scaling.finetuned", "rope.dimension_sections"}
# Tokens that end a turn of a chat, which llama.cpp too finds by their texts if the metadata do not name one.
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


class Keys:
    """The metadata of one architecture. Keys that are left at the end name something that the decoder lacks."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.name = metadata["general.architecture"]
        self._left = {
            key.removeprefix(f"{self.name}."): value
            for key, value in metadata.items()
            if key.startswith(f"{self.name}.")
        }

    def take(self, key: str, default: Any = ...) -> Any:
        """Return a number, or a text where the default is one; the default if there is none."""
        value = self._left.pop(key, default)
        if value is ...:
            raise ValueError(
                f"the metadata lack {self.name}.{key}: fetch the file again"
            )
        if isinstance(value, list):
            raise ValueError(
                f"{self.name}.{key} is a list: expected one number for all layers"
            )
        kind, words = (
            (str, "a text")
            if isinstance(default, str)
            else (int | float, "a number of 0 or more")
        )
        right_type = isinstance(value, kind) and not isinstance(value, bool)
        if not right_type or (not isinstance(value, str) and not 0 <= value < np.inf):
            raise ValueError(f"{self.name}.{key} is {value!r}: expected {words}")
        return value

    def size(self, key: str, default: Any = ...) -> int:
        """Return a number of 1 or more."""
        value = self.take(key, default)
        if not isinstance(value, int) or not 1 <= value <= _LARGEST:
            raise ValueError(
                f"{self.name}.{key} is {value!r}: expected an integer from 1 to {_LARGEST:,}"
            )
        return value

    def pattern(self, default: int, layers: int) -> list[bool]:
        """Return which layers have a sliding window: all but every n-th one, or those of a list."""
        if not isinstance(self._left.get("attention.sliding_window_pattern"), list):
            period = self.take("attention.sliding_window_pattern", default)
            return [
                period == 0 or layer % period < period - 1 for layer in range(layers)
            ]
        slides = self._left.pop("attention.sliding_window_pattern")
        if len(slides) != layers:
            key = f"{self.name}.attention.sliding_window_pattern"
            raise ValueError(
                f"{key} has {len(slides)} entries: expected one for each of {layers} layers"
            )
        return [bool(sliding) for sliding in slides]

    def finish(self) -> None:
        for key, value in self._left.items():
            if value and key not in _WITHOUT_EFFECT:
                raise ValueError(
                    f"{self.name}.{key} is {value!r}, which is not implemented for {self.name}: give another base"
                )


def config_json(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    models: Mapping[str, tuple[str, str]] = _MODELS,
    further: Callable[[Keys, int], dict[str, Any]] = lambda *_: {},
) -> dict[str, Any]:
    """Return the content of the config.json of the model that was converted.

    `further` fields of some models come from the keys and the number of blocks.
    """
    keys = Keys(metadata)
    kind, title = models[keys.name]
    gemma = kind in ("gemma2", "gemma3_text")
    hidden = keys.size("embedding_length")
    heads = keys.size("attention.head_count")
    d_head = keys.size("attention.key_length", hidden // heads)
    if (width := keys.take("attention.value_length", d_head)) != d_head:
        key = f"{keys.name}.attention.key_length"
        raise ValueError(
            f"{key} is {d_head} and value_length is {width}: expected one width of heads"
        )
    if "token_embd.weight" not in tensors:
        raise ValueError(
            "the tensors lack token_embd.weight: give a model, not an adapter or a projector"
        )
    layers = keys.size("block_count")
    context = keys.size("context_length")
    content = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.take("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": d_head,
        "max_position_embeddings": context,
        "rms_norm_eps": keys.take("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": _HEAD not in tensors,
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh"
        if kind.startswith("gemma")
        else "silu",
    }
    content |= _rope(keys, tensors, d_head, context)
    if gemma:
        content |= _gemma(keys, layers, d_head, hidden // heads)
    elif keys.name in ("llama", "phi3"):
        window = keys.take("attention.sliding_window", 0) or None
        if keys.name == "phi3" or window:
            content["sliding_window"] = window
        if keys.name == "llama" and window:
            kind, title = _MISTRAL
    if keys.name == "phi3":
        content["original_max_position_embeddings"] = metadata.get(
            "phi3.rope.scaling.original_context_length", context
        )
    if keys.name == "granite":
        content |= {field: keys.take(key) for key, field in _GRANITE.items()}
    if keys.name == "olmo2" and (window := keys.take("attention.sliding_window", 0)):
        kind, title = _OLMO3
        sliding = keys.pattern(4, layers)
        content |= {"sliding_window": window, "layer_types": _layer_types(sliding)}
        plain = {"rope_type": "default", "rope_theta": content["rope_theta"]}
        full = plain | content.pop("rope_scaling", {})
        content["rope_parameters"] = {
            "full_attention": full,
            "sliding_attention": plain,
        }
    if keys.name in _ATTENTION_BIAS:
        content["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if keys.name in _MLP_BIAS:
        content["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    content |= further(keys, layers)
    keys.finish()
    return (
        {"architectures": [title], "model_type": kind}
        | content
        | _special_ids(metadata)
    )


def _rope(
    keys: Keys, tensors: Mapping[str, Any], d_head: int, context: int
) -> dict[str, Any]:
    theta = keys.take("rope.freq_base", 10_000.0)
    width = keys.take("rope.dimension_count", d_head)
    kind = keys.take("rope.scaling.type", "linear")
    factor = keys.take("rope.scaling.factor", keys.take("rope.scale_linear", 0.0))
    factors = [name for name in (*_LONGROPE, _ROPE_FACTORS) if name in tensors]
    if kind not in ("linear", "none", "yarn", "longrope"):
        fix = f"expected linear, yarn, longrope, or the factors of llama3 in {_ROPE_FACTORS}"
        raise ValueError(f"the rope scaling is {kind}, which is not implemented: {fix}")
    fields: dict[str, Any] = {"rope_theta": theta}
    if kind in ("linear", "yarn") and factor not in (0, 1):
        fields["rope_scaling"] = {"rope_type": kind, "factor": factor}
        if factors:
            raise ValueError(
                f"the file holds {factors[0]} and a {kind} rope scaling: expected one of them"
            )
    original = {
        "original_max_position_embeddings": keys.take(
            "rope.scaling.original_context_length", context
        )
    }
    if kind == "yarn" and "rope_scaling" in fields:
        fields["rope_scaling"] |= original
    # The converter of Phi-3 does not write the type.
    if (kind == "longrope" or set(factors) & {*_LONGROPE}) and factors != [*_LONGROPE]:
        raise ValueError(
            f"the rope scaling is longrope: expected {' and '.join(_LONGROPE)}: fetch the file again"
        )
    if factors == [*_LONGROPE]:
        quotients = {
            field: [float(x) for x in np.asarray(tensors[name])]
            for name, field in _LONGROPE.items()
        }
        scale = {"attention_factor": keys.take("rope.scaling.attn_factor", 1.0)}
        fields["rope_scaling"] = (
            {"rope_type": "longrope"} | quotients | scale | original
        )
    if _ROPE_FACTORS in tensors:
        fields["rope_scaling"] = _llama3(
            np.asarray(tensors[_ROPE_FACTORS]), theta, width
        )
    if width != d_head:
        if keys.name not in ("phi3", "qwen35"):
            raise ValueError(
                f"{keys.name}.rope.dimension_count is {width}: expected the width of a head, {d_head}"
            )
        fields["partial_rotary_factor"] = width / d_head
    return fields


def _llama3(factors: np.ndarray, theta: float, width: int) -> dict[str, Any] | None:
    """Return the rope scaling from its quotients of frequencies, which is all that llama.cpp keeps.

    Where the quotient is between 1 and the largest one, the share of the unstretched frequency, (turns - low) / (high -
    low), is linear in the turns of a pair within a context. One of the three numbers is free: low is set to 1, as in
    every published model.
    """
    if factors.shape != (width // 2,):
        raise ValueError(
            f"{_ROPE_FACTORS} has shape {list(factors.shape)}: expected [{width // 2}]"
        )
    if not np.all(np.isfinite(factors) & (factors > 0)) or theta <= 0:
        raise ValueError(
            f"the factors in {_ROPE_FACTORS} are not those of a rope scaling: fetch the file again"
        )
    exponents = np.arange(0, width, 2) / width
    angles = theta**-exponents / (2 * np.pi)
    factor = float(factors.max())
    quotients = factors.astype(np.float64)
    if factor == 1 and (factors == 1).all():
        return None
    share = (1 / quotients - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-6) & (share < 1 - 1e-6)
    if between.sum() > 1:
        slope, start = np.polyfit(angles[between], share[between], 1)
        context = round(slope / -start)
        high = round((1 - start) / -start, 3)
        turns = np.clip((context * angles - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - turns) / factor + turns), quotients, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": float(high),
                "original_max_position_embeddings": context,
            }
    raise ValueError(
        f"the factors in {_ROPE_FACTORS} are not those of a rope scaling llama3: give another base"
    )


def _gemma(keys: Keys, layers: int, d_head: int, undeclared: int) -> dict[str, Any]:
    second = keys.name == "gemma2"
    window = keys.take("attention.sliding_window", 4096 if second else 0)
    sliding = [False] * layers
    if window:
        sliding = keys.pattern(2 if second else 6, layers)
    fields = {
        "query_pre_attn_scalar": undeclared
        if layers == _GEMMA_27B_LAYERS[keys.name]
        else d_head,
        "sliding_window": window or None,
        "layer_types": _layer_types(sliding),
        "final_logit_softcapping": keys.take(
            "final_logit_softcapping", 30.0 if second else 0.0
        )
        or None,
    }
    if second:
        return fields | {
            "attn_logit_softcapping": keys.take("attn_logit_softcapping", 50.0) or None
        }
    return fields | {"rope_local_base_freq": keys.take("rope.freq_base_swa", 10_000.0)}


def _layer_types(sliding: Collection[bool]) -> list[str]:
    return ["sliding_attention" if near else "full_attention" for near in sliding]


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens that begin and end texts; those that end a turn of a chat end an answer too."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    names = ("bos", "eos", "padding", "eot", "eom")
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names}
    for name, token in ids.items():
        if token is not None and token >= len(tokens):
            raise ValueError(
                f"the {name} token is {token}, but there are {len(tokens)} tokens: fetch the file again"
            )
    if ids["eot"] is None:
        ids["eot"] = next(
            (tokens.index(text) for text in _ENDS_OF_TURN if text in tokens), None
        )
    ends = [
        token
        for token in dict.fromkeys((ids["eos"], ids["eot"], ids["eom"]))
        if token is not None
    ]
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }


def _modules(content: Mapping[str, Any]) -> Mapping[str, str]:
    """Return Hugging Face's name of every module of a block."""
    return _MODULES_OF.get(content["model_type"], MODULES)


def _stored(
    content: Mapping[str, Any], names: Collection[str]
) -> dict[str, GGUFTensor]:
    """Return Hugging Face's name of every tensor; what the model lacks keeps its own name."""
    kind = content["model_type"]
    modules = _modules(content)
    places = {}
    orders = {}
    if kind in _INTERLEAVED:
        heads = {
            "attn_q": content["num_attention_heads"],
            "attn_k": content["num_key_value_heads"],
        }
        orders = {
            name: functools.partial(_interleaved, number)
            for name, number in heads.items()
        }
    for name in names:
        if name in (_ROPE_FACTORS, *_LONGROPE):
            continue
        block = _OF_BLOCK.fullmatch(name)
        module = block[2] if block else name.removesuffix(".weight")
        title = OF_MODEL.get(name, name)
        if block and module in modules:
            title = f"model.layers.{block[1]}.{modules[module]}.{block[3]}"
        offset = 1.0 if kind.startswith("gemma") and module.endswith("_norm") else 0.0
        places[name] = GGUFTensor(title, orders.get(module), offset=offset)
    return places


def _interleaved(heads: int, rows: int) -> np.ndarray:
    """Return the order in which rows i and half + i of every head lie next to each other."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def _names(content: Mapping[str, Any]) -> list[str]:
    """Return the names of all tensors that a file can hold."""
    blocks = range(content["num_hidden_layers"])
    modules = _modules(content)
    return [
        *OF_MODEL,
        *(
            f"blk.{n}.{module}.{part}"
            for n in blocks
            for module in modules
            for part in _PARTS
        ),
    ]


def metadata(
    config: DecoderConfig, name: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the keys that describe a structure, and the factors of a rope scaling llama3 as a tensor."""
    name = name or GGUF.architectures[config.model_type]
    rope = config.rope
    tensors = {}
    values: dict[str, Any] = {
        "context_length": config.context,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.d_head,
        "attention.value_length": config.d_head,
        "attention.layer_norm_rms_epsilon": config.eps,
        "rope.freq_base": rope.theta,
        "rope.dimension_count": rope.width,
        "vocab_size": config.vocab_size,
    }
    if config.window and not config.model_type.startswith("qwen"):
        values["attention.sliding_window"] = config.window
    if config.model_type == "gemma2":
        values["attn_logit_softcapping"] = config.attention_cap
        values["final_logit_softcapping"] = config.logit_cap
    if config.model_type == "granite":
        factors = (
            config.query_scale,
            config.embedding_scale,
            config.residual_scale,
            1 / config.logit_scale,
        )
        values |= dict(zip(_GRANITE, factors, strict=True))
    if config.model_type == "olmo3":
        values["attention.sliding_window_pattern"] = [*config.sliding]
    if config.model_type == "gemma3_text" and config.local_rope is not None:
        values["rope.freq_base_swa"] = config.local_rope.theta
    if rope.scaling in ("linear", "yarn"):
        values |= {
            "rope.scaling.type": rope.scaling,
            "rope.scaling.factor": rope.factor,
        }
    if rope.scaling in ("yarn", "longrope"):
        values["rope.scaling.original_context_length"] = rope.context
    if rope.scaling == "longrope":
        values["rope.scaling.attn_factor"] = rope.scale
        tensors |= dict(
            zip(
                _LONGROPE,
                (np.array(numbers, np.float32) for numbers in (rope.short, rope.long)),
                strict=True,
            )
        )
    if rope.scaling == "llama3":
        turns = (
            rope.context
            * rope.theta ** -(np.arange(0, rope.width, 2) / rope.width)
            / (2 * np.pi)
        )
        share = np.clip(
            (turns - rope.low_freq) / (rope.high_freq - rope.low_freq), 0, 1
        )
        tensors[_ROPE_FACTORS] = (1 / ((1 - share) / rope.factor + share)).astype(
            np.float32
        )
    return {f"{name}.{key}": value for key, value in values.items()}, tensors


GGUF = GGUFLayout(
    architectures={kind: name for name, (kind, _) in _MODELS.items()}
    | {_MISTRAL[0]: "llama", _OLMO3[0]: "olmo2"},
    config_json=config_json,
    stored=_stored,
    names=_names,
    metadata=metadata,
    lost="query_scale",
)
