"""An `adapter_config.json`: reading, writing and checking it, and the scaling that it gives every module.

The rules come from the source of PEFT 0.2 to 0.21. The tensors determine the adapted matrices and the rank. The
configuration supplies alpha, rslora, the patterns and the DoRA flag, and shows adapters that are more than a low-rank
update and are therefore refused.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
from msgspec import Meta

from ...models.registry import last_part, types_of_name
from ...support.reading import decode, decode_as
from ...support.text import some
from ..hf import Base
from ..source import other_layout, split_revision

CONFIG = "adapter_config.json"
_AGAIN = "fetch the file again"

_PATTERNS = ("rank_pattern", "alpha_pattern")

# Fields without effect on a trained adapter's output, or about which the tensors are more reliable; then those that are
# read, and two whose defaults PEFT writes into every file.
_KNOWN = (
    "auto_mapping corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config "
    "merge_weights monteclora_config peft_version revision runtime_config task_type velora_config "
    "alpha_pattern base_model_name_or_path bias init_lora_weights lora_alpha modules_to_save peft_type r "
    "rank_pattern target_modules use_dora use_rslora megatron_core qalora_group_size"
).split()
_HUB_ID = re.compile(r"([a-z0-9][\w.-]*)/[\w.-]+(?:@.+)?")
# Fields that change the forward pass once they are set.
_OTHER_FORWARD = {
    "alora_invocation_tokens": "aLoRA, which acts only after its invocation tokens",
    "arrow_config": "Arrow routing between adapters",
    "enable_lora": "the MergedLinear of PEFT 0.2, with several factors in one tensor",
    "kasa_config": "KaSA, which also truncates the base weights",
    "layer_replication": "replicated layers, a base model of another depth",
    "lora_bias": "a bias on lora_B",
    "target_parameters": "LoRA on bare parameters instead of linear modules",
    "trainable_token_indices": "retrained rows of the embedding",
    "use_bdlora": "BD-LoRA, with block-diagonal factors",
    "use_qalora": "QA-LoRA, which pools the inputs in groups",
}
# Remedies for other kinds of adapters, by `peft_type`.
_MERGE = "merge it into the base with PEFT's merge_and_unload, and give that base"
_OTHER_KINDS: Mapping[str, str] = {
    **dict.fromkeys(("BOFT", "IA3", "LN_TUNING", "OFT"), _MERGE),
    **dict.fromkeys(
        ("LOHA", "LOKR", "RANDLORA", "VERA"),
        f"convert it with PEFT's save_as_lora, or {_MERGE}",
    ),
}
_BASE_KEPT = ("gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGED = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}


_LARGEST = float(np.finfo(np.float32).max)
_Rank = Annotated[int, Meta(ge=1)]
Alpha = Annotated[
    float, Meta(ge=-_LARGEST, le=_LARGEST, description="a number that float32 holds")
]


class _Fields(TypedDict, total=False):
    alpha_pattern: dict[str, Alpha] | None
    init_lora_weights: bool | str | None
    lora_alpha: Alpha
    r: _Rank
    rank_pattern: dict[str, _Rank] | None
    use_dora: bool | None
    use_rslora: bool | None


class Stored(NamedTuple):
    """An adapter of any format, with PEFT's fields and names."""

    weights: Path  # file of the tensors
    config_text: bytes
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    notes: list[str]


def read_config_file(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes and the content of a folder's adapter_config.json; raises ValueError if it is not one."""
    path = folder / CONFIG
    if not path.is_file():
        layout = other_layout(folder)
        fix = layout or "expected the folder that PEFT's save_pretrained wrote"
        raise ValueError(f"{folder} has no {CONFIG}: {fix}")
    text = path.read_bytes()
    return text, decode(text, dict[str, Any], path, allow_unknown=True, fix=_AGAIN)


def config_text(config: Mapping[str, Any]) -> bytes:
    """Return the bytes of an adapter_config.json."""
    return json.dumps(dict(config), indent=2, sort_keys=True).encode()


def plain_config(
    base: str | None,
    targets: Iterable[str],
    *,
    rank: int,
    alpha: int | float,
    task_type: str,
    dora: bool = False,
    flipped: bool = False,
) -> dict[str, Any]:
    """Return the configuration of a LoRA, or DoRA, on the modules at these paths of the base model.

    The base's own matrices are [d_in, d_out] if they are `flipped`.
    """
    name, revision = split_revision(base) if base else (None, None)
    return {
        "base_model_name_or_path": name,
        "bias": "none",
        "fan_in_fan_out": flipped,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "revision": revision,
        # Full paths: a last name alone would also match matrices that the adapter has no tensors for.
        "target_modules": sorted(targets),
        "task_type": task_type,
        "use_dora": dora,
        "use_rslora": False,
    }


def check_config(
    config: Mapping[str, Any], *, compare_saved: bool = False
) -> list[str]:
    """Raise a ValueError if the configuration shows that the adapter is more than a low-rank update.

    Missing fields take PEFT's defaults. With `compare_saved` the caller compares modules that were trained in full with
    the base's weights; otherwise a configuration that lists such modules is an error.

    Returns:
        A note on unknown fields, if there are any; a re-saved adapter keeps them.
    """
    foreign = _foreign_format(config)
    if foreign:
        raise ValueError(
            f"{foreign}: expected a LoRA adapter saved by PEFT (peft_type LORA)"
        )
    if config["peft_type"] != "LORA":
        fix = _OTHER_KINDS.get(str(config["peft_type"]), "retrain as LoRA")
        raise ValueError(f"peft_type is {config['peft_type']!r}: expected LORA; {fix}")
    for field, name in _OTHER_FORWARD.items():
        # PEFT reads an empty dict as the variant with its default settings.
        if config.get(field) not in (None, False, []):
            raise ValueError(
                f"{field} is set: {name}, is not supported; retrain as plain LoRA (PEFT's default)"
            )
    bias = config.get("bias") or "none"
    if bias != "none":
        raise ValueError(
            f"bias is {bias!r}: trained biases cannot be mixed; retrain with bias='none'"
        )
    _check_fields(config)
    _check_init(config.get("init_lora_weights"))
    if config.get("modules_to_save") and not compare_saved:
        raise ValueError(
            f"modules_to_save is {config['modules_to_save']!r}: modules trained in full cannot be "
            "mixed; retrain without them, or give the base's weights: modules equal to the base are ignored"
        )
    unknown = sorted(set(config) - set(_KNOWN) - set(_OTHER_FORWARD))
    if unknown:
        return [f"warning: unknown to PEFT up to 0.21, ignored: {some(unknown)}"]
    return []


def check_base(config: Mapping[str, Any], base: Base) -> list[str]:
    """Return notes if an adapter names another base than the given one; ValueError if that is of another family.

    Shapes alone do not show the base: adapters of one family often fit models of another.
    """
    theirs = config.get("base_model_name_or_path")
    if not isinstance(theirs, str) or not theirs.strip():
        return []
    kind = base.raw.get("model_type")
    # A fork's config may name the original model.
    names = [
        name
        for name in (base.source, base.raw.get("_name_or_path"))
        if isinstance(name, str)
    ]
    possible = types_of_name(theirs)
    if possible and not possible & {kind}.union(*map(types_of_name, names)):
        raise ValueError(
            f"it was trained on {theirs!r}, and the base is {base.source!r}, a model of another "
            f"family ({kind!r}): give the base that the adapter was trained on, or, if the name misleads, "
            "correct base_model_name_or_path"
        )
    owners = {
        owned[1]
        for name in (theirs, base.source)
        if (owned := _HUB_ID.fullmatch(name.lower()))
    }
    if (
        last_part(theirs) == last_part(base.source) and len(owners) < 2
    ):  # a path here has no owner
        return []
    return [
        f"warning: trained on {theirs!r}, and the base is {base.source!r}: do they belong together?"
    ]


def scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return the factor on B A of each module, alpha / r or (rslora) alpha / sqrt(r), of a checked configuration.

    Patterns are looked up by the rule of PEFT since 0.15, separately for rank and alpha. A rank in the tensors that
    differs from the configuration's is a ValueError.
    """
    patterns = {
        field: [
            (re.compile(rf"(.*\.)?({key})$"), value)
            for key, value in (config.get(field) or {}).items()
        ]
        for field in _PATTERNS
    }

    def given(field: str, path: str, default: Any) -> Any:
        return next(
            (value for pattern, value in patterns[field] if pattern.match(path)),
            default,
        )

    factors = {}
    for path, rank in ranks.items():
        r = given("rank_pattern", path, config.get("r", 8))
        if rank != r:
            raise ValueError(
                f"{path} has rank {rank} in the tensors, but r and rank_pattern "
                f"give {r!r}: the two files do not belong together; fetch both again, or correct r"
            )
        alpha = given("alpha_pattern", path, config.get("lora_alpha", 8))
        factors[path] = float(
            alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        )
    return factors


def _check_fields(config: Mapping[str, Any]) -> None:
    """Raise a ValueError if a field that is read, or a pattern, is impossible."""
    decode_as(
        config,
        _Fields,
        "",
        allow_unknown=True,
        fix="correct the field, or save the adapter again with PEFT",
    )
    for field in _PATTERNS:
        for key in config.get(field) or {}:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(
                    f"{field} has the key {key!r} ({error}): expected a regular expression for names of modules"
                ) from None


def _foreign_format(config: Mapping[str, Any]) -> str | None:
    """Name the format of a configuration without peft_type."""
    if config.get("peft_type"):
        return None
    if "model_class" in config and isinstance(config.get("config"), Mapping):
        return "a configuration of AdapterHub (the adapters library)"
    if "lora_parameters" in config or "fine_tune_type" in config:
        return "a configuration of MLX, without its adapters.safetensors"
    framework = config.get("framework")
    if (
        "lora_rank" in config
        or isinstance(framework, str)
        and ("tunix" in framework or "qwix" in framework)
    ):
        return "a configuration of tunix / qwix (JAX)"
    if "format" in config:
        return f"a configuration of another tool's own format, {config['format']!r}"
    return f"no peft_type among its fields {sorted(config)!r}, so not a configuration of PEFT"


def _check_init(init: bool | str | None) -> None:
    if not isinstance(init, str) or init.lower() in _BASE_KEPT:
        return
    name = next(
        (name for key, name in _BASE_CHANGED.items() if init.lower().startswith(key)),
        None,
    )
    if name:
        advice = "re-save with path_initial_model_for_weight_conversion"
        if name == "LoftQ":
            advice = "PEFT has no path_initial_model_for_weight_conversion for it: retrain with another"
        raise ValueError(
            f"init_lora_weights is {init!r}: {name} changes the base's own weights; {advice}"
        )
    raise ValueError(
        f"init_lora_weights is {init!r}, which is unknown and may change the base weights: "
        f"expected true, false, or one of {', '.join(_BASE_KEPT)}"
    )
