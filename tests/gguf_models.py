"""Small models as Hugging Face folders, and those of GGUF's families as files of llama.cpp's converter too."""

from pathlib import Path

import gguf
import numpy as np
import tiny
from json_files import read_json
from safetensors.numpy import load_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorafusion_jax.io.gguf.tokenizer import build_tokenizer


def byte_letters():
    """GPT-2's letters of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [
        "<pad>",
        "<s>",
        "</s>",
        "<think>",
        "th",
        "the",
        *byte_letters().values(),
    ],
    "tokenizer.ggml.token_type": [3, 3, 3, 4, *[1] * 258],
    "tokenizer.ggml.merges": ["t h", "th e"],
    "tokenizer.chat_template": "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}",
}
IDS = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


PIECES = {
    "▁": -5.0,
    "a": -6.0,
    "b": -7.0,
    "c": -8.0,
    "ab": -1.0,
    "▁a": -2.0,
    "bc": -0.5,
    "abc": -3.0,
    "▁ab": -4.0,
}
SENTENCE_PIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *PIECES,
        "  ",
        "<turn>",
    ],
    "tokenizer.ggml.scores": [0.0] * 259 + [*PIECES.values(), -1000.0, -1000.0],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4, 3],
    "tokenizer.ggml.unknown_token_id": 0,
} | IDS


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_GRANITE = {
    "attention_multiplier": 0.5,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.25,
}
_GRANITE |= {"logits_scaling": 8.0}
# What differs from `TINY`, by general.architecture and a name.
TINY = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 2.0**-20,
    "rope_theta": 20_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MODELS = {
    "llama": {"model_type": "llama"},
    "llama 3": {
        "model_type": "llama",
        "head_dim": 64,
        "rope_theta": 500_000.0,
        "rope_scaling": _LLAMA3,
    },
    "llama with biases, tied": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "eos_token_id": [2, 5],
    },
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": 32},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 32,
        "sliding_window": 16,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "sliding_window": 16,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention"] * 5
        + ["full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 64, "partial_rotary_factor": 0.5},
    "phi3 with longrope": {
        "model_type": "phi3",
        # llama.cpp decides by its context, not by the row: all rows are longer here.
        "original_max_position_embeddings": 2,
        "rope_scaling": {"rope_type": "longrope", "attention_factor": 1.25}
        | {"short_factor": [1.0, 1.5] * 4, "long_factor": [2.0, 5.0] * 4},
    },
    "qwen2 with yarn": {"model_type": "qwen2", "rope_scaling": _YARN},
    "gemma": {
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "granite": {"model_type": "granite"} | _GRANITE,
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {
        "model_type": "olmo3",
        "num_hidden_layers": 5,
        "sliding_window": 16,
        "rope_theta": 500_000.0,  # of another, transformers 5.24 reads the default in the layers with a window
        "rope_scaling": _YARN,
    },
    "qwen3.5": {
        "model_type": "qwen3_5_text",
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
    },
}
# Families that are read from folders alone.
FOLDERS = {
    "gpt2": {"model_type": "gpt2", "num_key_value_heads": 4, "n_ctx": 128},
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": 4},
    "falcon": {"model_type": "falcon"},
    "phi": {"model_type": "phi"},
    "stablelm": {"model_type": "stablelm"},
    "hunyuan": {"model_type": "hunyuan_v1_dense", "head_dim": 16},
    "ministral3": {
        "model_type": "ministral3",
        "head_dim": 16,
        "sliding_window": 16,
        "rope_parameters": _YARN
        | {"rope_theta": 20_000.0, "llama_4_scaling_beta": 0.1},
    },
    "granite 4": {
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * 2,
        "position_embedding_type": "rope",
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "mamba_n_heads": 4,
    }
    | _GRANITE,
    "gemma4": {
        "model_type": "gemma4_text",
        "head_dim": 16,
        "num_hidden_layers": 6,
        "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 3,
        "global_head_dim": 32,
        "sliding_window": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 272,
        "tie_word_embeddings": True,
    },
}
_ARCHITECTURES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "olmo3": "olmo2",
    "qwen3_5_text": "qwen35",
}
# Keys of a file, and the fields that they are.
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
INTERLEAVED = ("llama", "granite", "smollm3")


def make(folder, name, draw):
    """Write a model's Hugging Face folder, with weights that `draw` makes of a tensor's name and shape."""
    if name in FOLDERS:
        sizes = {key: value for key, value in TINY.items() if key != "head_dim"}
        complete = AutoConfig.for_model(**sizes | FOLDERS[name])
        config = complete.to_dict() | FOLDERS[name]
    else:
        config = TINY | MODELS[name]
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    tiny.write_base(folder, config, draw)
    tokens = SENTENCE_PIECE if name in ("mistral", "gemma3") else BYTE_LEVEL | IDS
    build_tokenizer(tokens | {"tokenizer.ggml.padding_token_id": 0}).save_pretrained(
        folder
    )
    return folder


def interleaved(rows, heads):
    """Rows i and half + i of every head next to each other: llama.cpp's `permute`."""
    return (
        rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def of_delta_net(title, tensor, config):
    """As llama.cpp's `_reorder_v_heads`: heads of values by their number within a head of keys."""
    keys = config[f"linear_{'num_key_heads'}"]
    d_key = config[f"linear_{'key_head_dim'}"]
    d_value = config[f"linear_{'value_head_dim'}"]

    def tiled(rows, width):
        return (
            rows.reshape(keys, -1, width, *rows.shape[1:])
            .swapaxes(0, 1)
            .reshape(rows.shape)
        )

    if "conv1d" in title or "in_proj_qkv" in title:
        of_keys, of_values = np.split(tensor.squeeze(), [2 * keys * d_key])
        return np.concatenate([of_keys, tiled(of_values, d_value)])
    if "in_proj_z" in title:
        return tiled(tensor, d_value)
    if "out_proj" in title:
        return tiled(tensor.T, d_value).T.copy()
    if "norm" in title:
        return tensor
    tensor = tiled(tensor, 1)
    return (
        -np.exp(tensor, dtype=np.float64).astype(np.float32)
        if "A_log" in title
        else tensor
    )


def writer_of(folder, file, changes=None, kinds=lambda name: None):
    """A GGUF file of a Hugging Face folder, not yet written; `changes` replace values or remove them, or tensors."""
    config = read_json(folder / "config.json")
    tensors = load_file(folder / "model.safetensors")
    kind = config["model_type"]
    name = _ARCHITECTURES.get(kind, kind)
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    d_head = config["head_dim"]
    values = {key: config.get(field) for key, field in _KEYS.items()}
    if kind != "gemma2":
        share = config.get("partial_rotary_factor", 1)
        values["rope.dimension_count"] = int(d_head * share)
    if kind == "granite":
        scales = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
        values |= dict(zip(scales, _GRANITE.values(), strict=True))
    if name == "qwen35":
        sizes = {
            "conv_kernel": "conv_kernel_dim",
            "state_size": "key_head_dim",
            "group_count": "num_key_heads",
        }
        sizes["time_step_rank"] = "num_value_heads"
        values |= {
            f"ssm.{key}": config[f"linear_{field}"] for key, field in sizes.items()
        }
        values["ssm.inner_size"] = (
            config["linear_num_value_heads"] * config["linear_value_head_dim"]
        )
        values |= {
            "full_attention_interval": 2,
            "rope.dimension_sections": [2, 1, 1, 0],
        }
    if kind == "olmo3":
        values["attention.sliding_window_pattern"] = [True, True, True, False, True]
    scaling = config.get("rope_scaling", {})
    scaled = scaling.get("rope_type")
    if scaled in ("yarn", "linear"):
        values |= {
            "rope.scaling.type": scaled,
            "rope.scaling.factor": scaling["factor"],
        }
    if scaled in ("yarn", "longrope"):
        original = (config | scaling)["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
    if scaled == "longrope":
        values["rope.scaling.attn_factor"] = scaling["attention_factor"]
        for part in ("short", "long"):
            factors = scaling[f"{part}_factor"]
            tensors[f"rope_factors_{part}"] = np.array(factors, np.float32)
    if scaled == "llama3":
        tensors["rope_freqs"] = _quotients(config["rope_theta"], d_head, scaling)
    ends = np.atleast_1d(config["eos_token_id"]).tolist()
    ids = {
        "bos": config["bos_token_id"],
        "eos": ends[0],
        "padding": config["pad_token_id"],
        "eot": ends[1] if len(ends) > 1 else None,
    }
    values = {f"{name}.{key}": value for key, value in values.items()} | BYTE_LEVEL
    values |= {
        f"tokenizer.ggml.{key}_token_id": token for key, token in ids.items()
    } | (changes or {})
    writer = gguf.GGUFWriter(file, name)
    add = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in values.items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            (add | {bool: writer.add_bool})[type(value)](key, value)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[name.upper()], config["num_hidden_layers"]
    )
    for title, tensor in tensors.items():
        if values.get(title, title) is None:
            continue
        if name in INTERLEAVED and (".q_proj" in title or ".k_proj" in title):
            tensor = interleaved(tensor, heads if ".q_proj" in title else kv_heads)
        plain = not name.startswith("gemma") and (
            name != "qwen35" or "linear_attn.norm" in title
        )
        if title.endswith("norm.weight") and not plain:
            tensor = tensor + 1
        if "linear_attn" in title:
            title, tensor = (
                title.replace("dt_bias", "dt_proj.bias"),
                of_delta_net(title, tensor, config),
            )
        stem, _, suffix = title.rpartition(".")
        to = (
            f"{title}.weight"
            if title.startswith("rope_f")
            else f"{names.get_name(stem)}.{suffix}"
        )
        to = names.get_name(title) if suffix == "A_log" else to
        raw_dtype = None
        quantised = kinds(title) if tensor.ndim == 2 and "conv1d" not in title else None
        if quantised is not None:
            raw_dtype = gguf.GGMLQuantizationType[quantised]
            tensor = gguf.quantize(tensor, raw_dtype)
        writer.add_tensor(to, tensor, raw_dtype=raw_dtype)
    return writer


def written(*arguments, **more):
    return close(writer_of(*arguments, **more))


def _quotients(theta, width, scaling):
    """The stretches of all pairs, as llama.cpp's conversion computes them."""
    found = []
    for i in range(0, width, 2):
        turns = scaling["original_max_position_embeddings"] / (
            2 * np.pi * theta ** (i / width)
        )
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        found.append(1 / ((1 - kept) / scaling["factor"] + kept))
    return np.array(found, np.float32)
