"""Weights of the goldens' models and adapters, made from a seed instead of stored.

Every tensor has the same bits on every machine and with every version of NumPy. Philox is a counter-based generator
whose stream of 64-bit words NumPy keeps for good. The sum of a word's four 16-bit parts is an integer that float32
holds exactly, so a single multiplication rounds.
"""

import argparse
import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
# Chosen so that no generated token hangs on a small difference of two logits.
SEEDS = {"fusion/t5a": 1, "fusion/t5b": 0, "fusion/llama": 0}
_PREFIX = "base_model.model."


def target(folder):
    """Return the folder that a script writes in: `folder`, or that of its option --out."""
    parser = argparse.ArgumentParser(
        description=f"Make the goldens of {folder.name} again."
    )
    parser.add_argument("--out", type=Path, default=folder, help="folder to write in")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    return out


def _words(name, count):
    return np.random.Philox(key=zlib.crc32(name.encode())).random_raw(count)


def normal(name, shape, std, mean=0.0):
    """Return a float32 tensor that the name determines: sums of four uniform numbers, close to normal ones."""
    words = _words(name, int(np.prod(shape)))
    total = sum(
        ((words >> np.uint64(16 * part)) & np.uint64(0xFFFF)).astype(np.int64)
        for part in range(4)
    )
    # A uniform 16-bit integer has the mean 65535 / 2 and the variance (65536^2 - 1) / 12.
    step = np.float32(std / ((65536**2 - 1) / 3) ** 0.5)
    return ((total - 2 * 65535).astype(np.float32) * step + np.float32(mean)).reshape(
        shape
    )


def integers(name, shape, low, high):
    """Return integers from low to high - 1 that the name determines."""
    words = _words(name, int(np.prod(shape)))
    return (low + (words % np.uint64(high - low)).astype(np.int64)).reshape(shape)


def matrices(config):
    """Return [out, in] of every linear map of the blocks of a T5 or a Llama, by Hugging Face's path."""
    if config["model_type"] != "t5":
        d = config["hidden_size"]
        ff = config["intermediate_size"]
        heads = config["num_attention_heads"]
        kv = config["num_key_value_heads"] * (d // heads)
        maps = {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
        }
        maps |= {
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (ff, d),
            "mlp.up_proj": (ff, d),
        }
        maps["mlp.down_proj"] = (d, ff)
        layers = range(config["num_hidden_layers"])
        return {
            f"model.layers.{layer}.{name}": shape
            for layer in layers
            for name, shape in maps.items()
        }
    d = config["d_model"]
    inner = config["num_heads"] * config["d_kv"]
    ff = config["d_ff"]
    attention = {"q": (inner, d), "k": (inner, d), "v": (inner, d), "o": (d, inner)}
    names = ("wi_0", "wi_1") if config["is_gated_act"] else ("wi",)
    parts = {"SelfAttention": attention, "EncDecAttention": attention}
    parts["DenseReluDense"] = dict.fromkeys(names, (ff, d)) | {"wo": (d, ff)}
    stacks = {
        "encoder": (config["num_layers"], ("SelfAttention", "DenseReluDense")),
        "decoder": (config["num_decoder_layers"], tuple(parts)),
    }
    return {
        f"{stack}.block.{block}.layer.{number}.{part}.{name}": shape
        for stack, (blocks, layers) in stacks.items()
        for block in range(blocks)
        for number, part in enumerate(layers)
        for name, shape in parts[part].items()
    }


def base(kind, config):
    """Return the tensors of one of the small models by Hugging Face's names."""
    # Small queries, since T5 does not scale its scores; logits spread over about 10.
    shapes = {f"{path}.weight": shape for path, shape in matrices(config).items()}
    std = {
        name: 0.05 if name.endswith(".q.weight") else shape[1] ** -0.5
        for name, shape in shapes.items()
    }
    if config["model_type"] == "t5":
        d = config["d_model"]
        own = {"shared.weight": 1.0}
        blocks = {name.split(".layer.")[0] for name in shapes}
        norms = {name.rsplit(".", 3)[0] + ".layer_norm.weight" for name in shapes}
        norms |= {
            f"{stack}.final_layer_norm.weight" for stack in ("encoder", "decoder")
        }
        for block in sorted(name for name in blocks if name.endswith(".0")):
            name = f"{block}.layer.0.SelfAttention.relative_attention_bias.weight"
            shapes[name] = (
                config["relative_attention_num_buckets"],
                config["num_heads"],
            )
            std[name] = 0.5
    else:
        d = config["hidden_size"]
        own = {"model.embed_tokens.weight": 1.0}
        layers = range(config["num_hidden_layers"])
        norms = {
            f"model.layers.{i}.{name}.weight" for i in layers for name in _LLAMA_NORMS
        } | {"model.norm.weight"}
    if not config["tie_word_embeddings"]:
        own["lm_head.weight"] = 0.3
    shapes |= dict.fromkeys(own, (config["vocab_size"], d))
    seed = f"{kind}/{SEEDS[kind]}"
    std = std | own
    tensors = {
        name: normal(f"{seed}/{name}", shape, std[name])
        for name, shape in shapes.items()
    }
    return tensors | {
        name: normal(f"{seed}/{name}", (d,), 0.1, mean=1.0) for name in norms
    }


_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")


def adapter(name, config, shapes):
    """Return the tensors of a PEFT adapter of the base's matrices."""
    tensors = {}
    for path, (d_out, d_in) in shapes.items():
        if path.rsplit(".", 1)[1] not in config["target_modules"]:
            continue
        patterns = (
            config.get("rank_pattern") or {}
        )  # the first that matches, as in PEFT
        rank = next(
            (r for key, r in patterns.items() if re.match(rf"(.*\.)?({key})$", path)),
            config["r"],
        )
        key = f"{_PREFIX}{path}"
        tensors[f"{key}.lora_A.weight"] = normal(
            f"{name}/{path}.A", (rank, d_in), d_in**-0.5
        )
        tensors[f"{key}.lora_B.weight"] = normal(f"{name}/{path}.B", (d_out, rank), 0.1)
        if config.get("use_dora"):
            tensors[f"{key}.lora_magnitude_vector"] = normal(
                f"{name}/{path}.m", (d_out,), 0.1, mean=0.8
            )
    return tensors


def unfold(folder):
    """Copy the goldens into a folder, and write there the weights that are not stored. Return the folder."""
    shutil.copytree(
        HERE,
        folder,
        ignore=shutil.ignore_patterns("*.py", "__pycache__"),
        dirs_exist_ok=True,
    )
    for path in folder.glob("*/**/base/config.json"):
        config = json.loads(path.read_text())
        kind = path.parent.parent.relative_to(folder).as_posix()
        if kind.startswith("fusion/"):  # SmolLM2 comes from its package
            _save(base(kind, config), path.parent / "model.safetensors")
        for options in sorted(
            path.parent.parent.glob("adapters/*/adapter_config.json")
        ):
            if not list(options.parent.glob("adapter_model.*")):
                name = f"{kind}/{options.parent.name}"
                tensors = adapter(
                    name, json.loads(options.read_text()), matrices(config)
                )
                _save(tensors, options.parent / "adapter_model.safetensors")
    return folder


def _save(tensors, path):
    save_file(tensors, path, metadata={"format": "pt"})
