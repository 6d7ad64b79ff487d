"""What an `adapter_config.json` says: which adapters can be used, which are refused and why, and the scaling.

Read from the source of PEFT 0.2 to 0.21. The tensors decide where an adapter sits and of what rank it is; the
configuration supplies alpha, rslora, the patterns and the DoRA flag, and tells the kinds that change more
than a low-rank update would.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

_PATTERN = r"(.*\.)?({})$"

# Fields of no effect on a trained adapter's output, or that the tensors answer better.
_IDLE = (
    "auto_mapping corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config "
    "merge_weights monteclora_config peft_version revision runtime_config task_type velora_config"
).split()
# Fields that are read, and two whose defaults PEFT writes into every file.
_KNOWN = (
    "alpha_pattern base_model_name_or_path bias init_lora_weights lora_alpha modules_to_save peft_type r "
    "rank_pattern target_modules use_dora use_rslora megatron_core qalora_group_size"
).split()
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
_BASE_KEPT = ("gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGED = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}


class AdapterError(ValueError):
    """An adapter that cannot be used: which file and key, what came, what was wanted, how to mend it."""


def check_config(config: Mapping[str, Any], *, where: str, compare_saved: bool = False) -> tuple[str, ...]:
    """Refuse by name what cannot become a low-rank update, from the configuration alone.

    Args:
        config: The content of `adapter_config.json`; missing fields take PEFT's defaults.
        where: The file, for messages.
        compare_saved: Whether the caller will compare modules that were trained in full with the base's
            weights. Otherwise a configuration that lists any is refused.

    Returns:
        Notes on fields without effect here and on unknown ones; they are kept in a re-saved adapter.

    Raises:
        AdapterError: The configuration is of another format or kind, or a field has an impossible value.
    """
    foreign = _foreign_format(config)
    if foreign:
        raise AdapterError(f"{where}: {foreign}: wanted a LoRA adapter saved by PEFT (peft_type LORA)")
    if config["peft_type"] != "LORA":
        raise AdapterError(f"{where}: peft_type is {config['peft_type']!r}: wanted 'LORA'")
    for field, name in _OTHER_FORWARD.items():
        # PEFT reads an empty dict as the variant with its default settings.
        if config.get(field) not in (None, False, []):
            raise AdapterError(f"{where}: {field} is set: {name}, is refused; retrain as plain LoRA (PEFT's default)")
    bias = config.get("bias") or "none"
    if bias != "none":
        raise AdapterError(
            f"{where}: bias is {bias!r}: trained biases are absolute values that cannot be mixed; "
            "retrain with bias='none'"
        )
    _check_init(config, where)
    if config.get("modules_to_save") and not compare_saved:
        raise AdapterError(
            f"{where}: modules_to_save is {config['modules_to_save']}: modules trained in full cannot be "
            "mixed; retrain without them, or give the base's weights: modules equal to the base are ignored"
        )
    _check_numbers(config, where)
    return tuple(_notes(config))


def site_scaling(config: Mapping[str, Any], path: str, rank: int, *, where: str) -> tuple[float, str | None]:
    """Return the factor on B A at one module, alpha / r or (rslora) alpha / sqrt(r), and a warning or None.

    Patterns are looked up by the rule of PEFT since 0.15, for rank and alpha apart. Up to 0.13 one key served
    both; the warning says where that would have given another scaling.

    Raises:
        AdapterError: The rank in the tensors is not the one that the configuration gives the module.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    default_rank, default_alpha = config.get("r", 8), config.get("lora_alpha", 8)
    r = ranks.get(_first_match(ranks, _PATTERN, path), default_rank)
    alpha = alphas.get(_first_match(alphas, _PATTERN, path), default_alpha)
    if rank != r:
        raise AdapterError(
            f"{where}: {path} has rank {rank} in the tensors, but r and rank_pattern of adapter_config.json "
            f"give {r}: the two files do not belong together; fetch both again, or correct r if you know it"
        )
    scaling = float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
    # A file that states its version (0.18 and later) was trained by the current rule.
    if not (ranks or alphas) or config.get("peft_version"):
        return scaling, None
    shared_key = _first_match([*ranks, *alphas], r".*\.{}$", path)
    old_rank, old_alpha = ranks.get(shared_key, default_rank), alphas.get(shared_key, default_alpha)
    if (old_rank, old_alpha) == (r, alpha):
        return scaling, None
    return scaling, (
        f"{path}: rank {r} and alpha {alpha} by the current rule for patterns; "
        f"PEFT up to 0.13 would have taken rank {old_rank} and alpha {old_alpha}"
    )


def _first_match(keys: Collection[str], pattern: str, path: str) -> str | None:
    return next((key for key in keys if re.match(pattern.format(key), path)), None)


def _foreign_format(config: Mapping[str, Any]) -> str | None:
    """Name the format of a configuration without peft_type."""
    if config.get("peft_type"):
        return None
    if "model_class" in config and isinstance(config.get("config"), Mapping):
        return "a configuration of AdapterHub (the adapters library)"
    if "lora_parameters" in config or "fine_tune_type" in config:
        return "a configuration of MLX (mlx-lm)"
    if "lora_rank" in config or re.search("tunix|qwix", str(config.get("framework"))):
        return "a configuration of tunix / qwix (JAX)"
    if "format" in config:
        return f"a configuration of another tool's own format, {config['format']!r}"
    return f"no peft_type among its fields {sorted(config)}, so not a configuration of PEFT"


def _check_init(config: Mapping[str, Any], where: str) -> None:
    init = config.get("init_lora_weights")
    if init is None or isinstance(init, bool) or str(init).lower() in _BASE_KEPT:
        return
    name = next((name for key, name in _BASE_CHANGED.items() if str(init).lower().startswith(key)), None)
    if name:
        mend = "re-save with path_initial_model_for_weight_conversion"
        if name == "LoftQ":
            mend = "PEFT has no path_initial_model_for_weight_conversion for it: retrain with another"
        raise AdapterError(
            f"{where}: init_lora_weights is {init!r}: {name} changes the base weights, so that the factors "
            f"alone are not the update; {mend}"
        )
    raise AdapterError(
        f"{where}: init_lora_weights is {init!r}, which is unknown and may change the base weights: "
        f"wanted true, false, or one of {', '.join(_BASE_KEPT)}"
    )


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for field, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(patterns, dict):
            raise AdapterError(f"{where}: {field} is {patterns!r}: wanted numbers by module name")
        for key in patterns:
            try:
                re.compile(_PATTERN.format(key))
            except re.error as error:
                raise AdapterError(f"{where}: {field} has the key {key!r}, not a pattern: {error}") from None
    for r in (config.get("r", 8), *ranks.values()):
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise AdapterError(f"{where}: r or rank_pattern holds {r!r}: wanted a positive integer")
    for alpha in (config.get("lora_alpha", 8), *alphas.values()):
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise AdapterError(f"{where}: lora_alpha or alpha_pattern holds {alpha!r}: wanted a number")


def _notes(config: Mapping[str, Any]) -> list[str]:
    notes = []
    idle = [field for field in _IDLE if config.get(field) not in (None, False, [], {})]
    if idle:
        notes.append(f"without effect on the trained adapter, kept for re-saving: {', '.join(idle)}")
    unknown = sorted(set(config) - set(_KNOWN) - set(_IDLE) - set(_OTHER_FORWARD))
    if unknown:
        notes.append(f"warning: unknown to PEFT up to 0.21, ignored: {', '.join(unknown)}")
    return notes
