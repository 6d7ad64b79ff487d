"""Checks of an `adapter_config.json`, and the scaling that it gives every module.

The rules come from the source of PEFT 0.2 to 0.21. The tensors decide which matrices an adapter is for and its rank.
The configuration supplies alpha, rslora, the patterns and the DoRA flag, and shows which adapters change more than a
low-rank update can and are therefore refused.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import regex

from ...files import shown, some
from ...models.registry import last_part, types_of_name
from .patterns import Clock, PatternError, check, compiled

# The regular expressions by which PEFT matches a module to a key of a pattern: since 0.15, and up to 0.13.
_PATTERN = r"(.*\.)?({})$"
_OLD_PATTERN = r".*\.{}$"
_MAX_KEYS, _MAX_CHARACTERS = 2_000, 200_000

# Fields that do not affect a trained adapter's output, or whose content the tensors show more reliably.
_IDLE = (
    "auto_mapping corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config "
    "merge_weights monteclora_config peft_version revision runtime_config task_type velora_config"
).split()
_HUB_ID = re.compile(r"([a-z0-9][\w.-]*)/[\w.-]+(?:@.+)?")
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
_OTHER_KINDS = {
    "IA3": "merge it into the base with PEFT (merge_and_unload), and give that base",
    "LN_TUNING": "merge it into the base with PEFT (merge_and_unload), and give that base",
}
_BASE_KEPT = ("gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGED = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}


class KnownBase(NamedTuple):
    """The base model that adapters are read for.

    Attributes:
        source: Folder, hub id or GGUF file.
        config: The content of its config.json.
    """

    source: str
    config: Mapping[str, Any]


class AdapterError(ValueError):
    """An adapter cannot be used. The message names the file and key, what came, what was expected and how to fix it."""


def check_config(config: Mapping[str, Any], *, where: str, compare_saved: bool = False) -> tuple[str, ...]:
    """Raise an error if the configuration shows that the adapter is more than a low-rank update.

    Args:
        config: The content of `adapter_config.json`; missing fields take PEFT's defaults.
        where: The file, for messages.
        compare_saved: The caller will compare modules that were trained in full with the base's weights. Otherwise a
            configuration that lists such modules is an error.

    Returns:
        Notes on fields that have no effect here and on unknown ones; a re-saved adapter keeps these fields.

    Raises:
        AdapterError: The configuration is of another format or kind, or a field has an impossible value.
    """
    foreign = _foreign_format(config)
    if foreign:
        raise AdapterError(f"{where}: {foreign}: expected a LoRA adapter saved by PEFT (peft_type LORA)")
    if config["peft_type"] != "LORA":
        fix = _OTHER_KINDS.get(config["peft_type"], "retrain as LoRA")
        raise AdapterError(
            f"{where}: peft_type is {shown(config['peft_type'])}: expected LORA or another kind whose update is a "
            f"matrix; {fix}"
        )
    for field, name in _OTHER_FORWARD.items():
        # PEFT reads an empty dict as the variant with its default settings.
        if config.get(field) not in (None, False, []):
            raise AdapterError(
                f"{where}: {field} is set: {name}, is not supported; retrain as plain LoRA (PEFT's default)"
            )
    bias = config.get("bias") or "none"
    if bias != "none":
        raise AdapterError(
            f"{where}: bias is {shown(bias)}: trained biases are absolute values that cannot be mixed; "
            "retrain with bias='none'"
        )
    _check_init(config, where)
    if config.get("modules_to_save") and not compare_saved:
        raise AdapterError(
            f"{where}: modules_to_save is {shown(config['modules_to_save'])}: modules trained in full cannot be "
            "mixed; retrain without them, or give the base's weights: modules equal to the base are ignored"
        )
    _check_types(config, where)
    _check_numbers(config, where)
    return tuple(_notes(config))


def check_base(config: Mapping[str, Any], base: KnownBase, *, where: str) -> tuple[str, ...]:
    """Compare the base that an adapter names with the one that it is read for; return a note if the names differ.

    Shapes alone do not show the base: adapters of one family often fit models of another.

    Raises:
        AdapterError: By its name, the adapter's base is of another family.
    """
    theirs = config.get("base_model_name_or_path")
    if not isinstance(theirs, str) or not theirs.strip():
        return ()
    kind = base.config.get("model_type")
    # A fork's config may hold the name of the model that it is made from.
    names = [name for name in (base.source, base.config.get("_name_or_path")) if isinstance(name, str)]
    possible = types_of_name(theirs)
    if possible and not possible & {kind}.union(*map(types_of_name, names)):
        raise AdapterError(
            f"{where}: it was trained on {shown(theirs)}, and the base is {shown(base.source)}, a model of another "
            f"family ({shown(kind)}): give the base that the adapter was trained on, or, if the name misleads, "
            "correct base_model_name_or_path"
        )
    owners = {owned[1] for name in (theirs, base.source) if (owned := _HUB_ID.fullmatch(name.lower()))}
    if last_part(theirs) == last_part(base.source) and len(owners) < 2:  # a path here has no owner
        return ()
    return (f"warning: trained on {shown(theirs)}, and the base is {shown(base.source)}: do they belong together?",)


def scalings(config: Mapping[str, Any], ranks: Mapping[str, int], *, where: str) -> tuple[dict[str, float], list[str]]:
    """Return the factor on B A of every module, alpha / r or (rslora) alpha / sqrt(r), and warnings.

    Patterns are looked up by the rule of PEFT since 0.15, separately for rank and alpha. Up to 0.13 one key was used
    for both; a warning names the modules where that would have given another scaling.

    Args:
        config: The content of `adapter_config.json`, checked by `check_config`.
        ranks: The rank of every module's tensors, by path.
        where: The file, for messages.

    Raises:
        AdapterError: A rank in the tensors differs from the configuration's, or the patterns take too long to match.
    """
    try:
        return _scalings(config, ranks, where)
    except PatternError as error:
        raise AdapterError(f"{where}: rank_pattern and alpha_pattern of adapter_config.json: {error}") from None


def _scalings(config: Mapping[str, Any], ranks: Mapping[str, int], where: str) -> tuple[dict[str, float], list[str]]:
    rank_of, alpha_of = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    default_rank, default_alpha = config.get("r", 8), config.get("lora_alpha", 8)
    rank_patterns, alpha_patterns = _compile(_PATTERN, rank_of), _compile(_PATTERN, alpha_of)
    # A file with a version in it (0.18 and later) was trained by the current rule.
    old_patterns = None if config.get("peft_version") else _old_patterns([*rank_of, *alpha_of])
    found, warnings, clock = {}, [], Clock()
    for path, rank in ranks.items():
        r = rank_of.get(_first_match(rank_patterns, path, clock), default_rank)
        alpha = alpha_of.get(_first_match(alpha_patterns, path, clock), default_alpha)
        if rank != r:
            raise AdapterError(
                f"{where}: {path} has rank {rank} in the tensors, but r and rank_pattern of adapter_config.json "
                f"give {shown(r)}: the two files do not belong together; fetch both again, or correct r if you know it"
            )
        found[path] = float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
        if old_patterns:
            key = _first_match(old_patterns, path, clock)
            old_rank, old_alpha = rank_of.get(key, default_rank), alpha_of.get(key, default_alpha)
            if (old_rank, old_alpha) != (r, alpha):
                warnings.append(
                    f"{path}: rank {r} and alpha {alpha} by the current rule for patterns; "
                    f"PEFT up to 0.13 would have taken rank {old_rank} and alpha {old_alpha}"
                )
    return found, warnings


def configured(config: Mapping[str, Any], paths: Iterable[str], *, where: str) -> dict[str, tuple[int, int | float]]:
    """Return the rank and alpha that the configuration gives every module, by PEFT's rule since 0.15.

    Raises:
        AdapterError: A number or a pattern is impossible, or the patterns take too long to match.
    """
    _check_numbers(config, where)
    rank_of, alpha_of = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    clock = Clock()
    try:
        ranks, alphas = _compile(_PATTERN, rank_of), _compile(_PATTERN, alpha_of)
        return {
            path: (
                rank_of.get(_first_match(ranks, path, clock), config.get("r", 8)),
                alpha_of.get(_first_match(alphas, path, clock), config.get("lora_alpha", 8)),
            )
            for path in paths
        }
    except PatternError as error:
        raise AdapterError(f"{where}: rank_pattern and alpha_pattern of adapter_config.json: {error}") from None


def _compile(rule: str, keys: Iterable[str]) -> dict[str, regex.Pattern]:
    return {key: compiled(rule.format(key)) for key in keys}


def _old_patterns(keys: Sequence[str]) -> dict[str, regex.Pattern] | None:
    """Return the patterns of the rule up to PEFT 0.13, or None if a key is not valid under that rule."""
    try:
        return _compile(_OLD_PATTERN, keys)
    except PatternError:
        return None


def _first_match(patterns: Mapping[str, regex.Pattern], path: str, clock: Clock) -> str | None:
    return next((key for key, pattern in patterns.items() if clock.match(pattern, path)), None)


def _foreign_format(config: Mapping[str, Any]) -> str | None:
    """Name the format of a configuration without peft_type."""
    if config.get("peft_type"):
        return None
    if "model_class" in config and isinstance(config.get("config"), Mapping):
        return "a configuration of AdapterHub (the adapters library)"
    if "lora_parameters" in config or "fine_tune_type" in config:
        return "a configuration of MLX (mlx-lm)"
    framework = config.get("framework")
    if "lora_rank" in config or isinstance(framework, str) and ("tunix" in framework or "qwix" in framework):
        return "a configuration of tunix / qwix (JAX)"
    if "format" in config:
        return f"a configuration of another tool's own format, {shown(config['format'])}"
    return f"no peft_type among its fields {shown(sorted(config))}, so not a configuration of PEFT"


def _check_init(config: Mapping[str, Any], where: str) -> None:
    init = config.get("init_lora_weights")
    if init is None or isinstance(init, bool):
        return
    kind = init.lower() if isinstance(init, str) else ""
    if kind in _BASE_KEPT:
        return
    name = next((name for key, name in _BASE_CHANGED.items() if kind.startswith(key)), None)
    if name:
        advice = "re-save with path_initial_model_for_weight_conversion"
        if name == "LoftQ":
            advice = "PEFT has no path_initial_model_for_weight_conversion for it: retrain with another"
        raise AdapterError(
            f"{where}: init_lora_weights is {shown(init)}: {name} changes the base weights, so that the factors "
            f"alone are not the update; {advice}"
        )
    raise AdapterError(
        f"{where}: init_lora_weights is {shown(init)}, which is unknown and may change the base weights: "
        f"expected true, false, or one of {', '.join(_BASE_KEPT)}"
    )


def _check_types(config: Mapping[str, Any], where: str) -> None:
    for field in ("use_dora", "use_rslora"):
        if config.get(field) not in (None, False, True):
            raise AdapterError(f"{where}: {field} is {shown(config[field])}: expected true or false")
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else [] if targets is None else [targets]
    if not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{where}: target_modules is {shown(targets)}: expected names of modules, or one pattern")


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for field, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(patterns, dict):
            raise AdapterError(f"{where}: {field} is {shown(patterns)}: expected numbers by module name")
        if len(patterns) > _MAX_KEYS:
            raise AdapterError(f"{where}: {field} has {len(patterns):,} keys: expected at most {_MAX_KEYS:,}")
        for key in patterns:
            try:
                check(_PATTERN.format(key))
            except PatternError as error:
                raise AdapterError(f"{where}: {field} has the key {shown(key)}, not a pattern: {error}") from None
    if (length := sum(map(len, (*ranks, *alphas)))) > _MAX_CHARACTERS:
        raise AdapterError(
            f"{where}: the keys of rank_pattern and alpha_pattern have {length:,} characters: expected at most "
            f"{_MAX_CHARACTERS:,}"
        )
    for r in (config.get("r", 8), *ranks.values()):
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise AdapterError(f"{where}: r or rank_pattern holds {shown(r)}: expected a positive integer")
    limit = float(np.finfo(np.float32).max)
    for alpha in (config.get("lora_alpha", 8), *alphas.values()):
        # Compared as it is: JSON holds integers that no float does.
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not -limit <= alpha <= limit:
            raise AdapterError(
                f"{where}: lora_alpha or alpha_pattern holds {shown(alpha)}: expected a number that float32 holds"
            )


def _notes(config: Mapping[str, Any]) -> list[str]:
    notes = []
    idle = [field for field in _IDLE if config.get(field) not in (None, False, [], {})]
    if idle:
        notes.append(f"without effect on the trained adapter, kept for re-saving: {', '.join(idle)}")
    unknown = sorted(set(config) - set(_KNOWN) - set(_IDLE) - set(_OTHER_FORWARD))
    if unknown:
        notes.append(f"warning: unknown to PEFT up to 0.21, ignored: {some(unknown)}")
    return notes
