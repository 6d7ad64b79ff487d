"""Configurations of adapters as PEFT from 0.2 to 0.21, other tools and people write them, with their oddities.

Written for these tests in the form of files that lie in public repositories.
"""

import json
from typing import Any, NamedTuple


class Written(NamedTuple):
    """A file, and what is made of it.

    Attributes:
      data: adapter_config.json.
      scaling: of the adapter that is accepted, None where it is refused.
      reason: part of the refusal.
    """

    data: bytes
    scaling: float | None
    reason: str = ""


# Fields by the version of PEFT that added them, with their defaults.
_ADDED: dict[str, dict[str, Any]] = {
    "0.2": {
        "base_model_name_or_path": "somebody/llama-7b",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    },
    "0.3": {"init_lora_weights": True},
    "0.4": {"auto_mapping": None, "layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.17": {"qalora_group_size": 16, "target_parameters": None, "use_qalora": False},
    "0.18": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.0",
    },
    "0.21": {"kasa_config": None, "lora_ga_config": None, "use_bdlora": None, "velora_config": None},
}
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _fields(version: str, **changes: Any) -> dict[str, Any]:
    names = list(_ADDED)
    fields: dict[str, Any] = {}
    for name in names[: names.index(version) + 1]:
        fields |= _ADDED[name]
    return dict(sorted((fields | changes).items()))


def _peft(version: str, **changes: Any) -> bytes:
    """Write as PEFT does: sorted, indented, without a line break at the end."""
    return json.dumps(_fields(version, **changes), indent=2).encode()


_GPT2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
_UNSLOTH = {
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
        "unsloth_fixed": True,
    },
    "lora_dropout": 0,
}
_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:0c5f5d2d62b4f1d0f0c0b3e0b1a19d4c2f3c4a5b6d7e8f90123456789abcdef0\nsize 1049\n"
)

CONFIGS: dict[str, Written] = {
    "the first version": Written(_peft("0.2"), 2.0),
    "keys of the first version that were dropped": Written(_peft("0.2", enable_lora=None, merge_weights=False), 2.0),
    "MergedLinear": Written(
        _peft("0.2", enable_lora=[True, False, True], target_modules=["query_key_value"], fan_in_fan_out=True),
        None,
        "enable_lora is set: the MergedLinear of PEFT 0.2",
    ),
    "Conv1D": Written(_peft("0.6", lora_alpha=32, **_GPT2), 4.0),
    "the flag of Conv1D on linear maps": Written(_peft("0.9", fan_in_fan_out=True), 2.0),
    "no task": Written(_peft("0.3", task_type=None), 2.0),
    "a sequence to sequence model": Written(
        _peft("0.4", r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"), 2.0
    ),
    "a classifier without a saved head": Written(_peft("0.8", task_type="SEQ_CLS"), 2.0),
    "every map of a Llama": Written(_peft("0.10", r=64, target_modules=_ALL, revision="main"), 0.25),
    "layers by their paths": Written(
        _peft("0.14", target_modules=[f"transformer.h.{i}.attn.c_attn" for i in range(3)], lora_alpha=8), 1.0
    ),
    "targets as a pattern": Written(
        _peft("0.15", target_modules=r"(.*(language_model).*(q_proj|v_proj).*$)", init_lora_weights="gaussian"), 2.0
    ),
    "targets given twice": Written(_peft("0.14", target_modules=["q_proj", "v_proj", "q_proj"], r=16), 1.0),
    "an initialisation that leaves the base alone": Written(_peft("0.17", init_lora_weights="eva"), 2.0),
    "no module saved, as an empty list": Written(_peft("0.18", modules_to_save=[]), 2.0),
    "modules saved": Written(
        _peft("0.14", modules_to_save=["classifier", "score"], task_type="SEQ_CLS"),
        None,
        r"modules_to_save is \['classifier', 'score'\]",
    ),
    "made by unsloth": Written(_peft("0.18", revision="unsloth", **_UNSLOTH), 2.0),
    "rank-stabilised": Written(_peft("0.21", use_rslora=True, r=16, lora_alpha=16), 4.0),
    "DoRA with a pattern of targets, rank-stabilised": Written(
        _peft(
            "0.18", use_dora=True, use_rslora=True, r=64, lora_alpha=32, target_modules=r".*\.(q|v)_proj", **_UNSLOTH
        ),
        4.0,
    ),
    "a large scale": Written(_peft("0.21", r=1, lora_alpha=32, lora_dropout=0), 32.0),
    "a small scale and a high rank": Written(_peft("0.21", r=128, lora_alpha=16), 0.125),
    "ranks and scales by pattern": Written(
        _peft("0.21", r=4, lora_alpha=8, rank_pattern={"v_proj": 8}, alpha_pattern={"v_proj": 16}), 2.0
    ),
    "an escaped name of a base": Written(
        json.dumps(_fields("0.15", base_model_name_or_path="C:\\Modelle\\größer")).encode(), 2.0
    ),
    "line ends of Windows": Written(_peft("0.8").replace(b"\n", b"\r\n"), 2.0),
    "written by hand": Written(
        b'{"peft_type": "LORA",\n "r": 16, "lora_alpha": 32,\n "target_modules": ["q_proj", "v_proj"],'
        b'\n "inference_mode": false}\n',
        2.0,
    ),
    "a field that nobody knows": Written(_peft("0.21", my_notes={"seed": 3}), 2.0),
    "prefix tuning": Written(
        json.dumps({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8, "num_layers": 28, "token_dim": 64}).encode(),
        None,
        "peft_type is 'PREFIX_TUNING': expected LORA or another kind",
    ),
    "AdapterHub": Written(
        json.dumps(
            {
                "config": {
                    "mh_adapter": False,
                    "output_adapter": True,
                    "reduction_factor": 16,
                    "non_linearity": "relu",
                },
                "hidden_size": 768,
                "model_class": "BertAdapterModel",
                "model_type": "bert",
                "name": "task",
                "version": "0.1.0",
            }
        ).encode(),
        None,
        "AdapterHub",
    ),
    "tunix": Written(
        json.dumps(
            {"base_model": "gemma", "framework": "jax-tunix-qwix", "lora_rank": 32, "lora_alpha": 32.0}
        ).encode(),
        None,
        "tunix / qwix",
    ),
    "a format of its own": Written(
        json.dumps({"format": "my-native-lora", "rank": 16, "alpha": 32, "tensor_count": 512}).encode(),
        None,
        "own format, 'my-native-lora'",
    ),
    "the name of the base alone": Written(
        json.dumps({"base_model": "somebody/robot"}).encode(), None, r"no peft_type among its fields \['base_model'\]"
    ),
    "a pointer of Git LFS": Written(_POINTER, None, "this is a Git LFS pointer"),
}
