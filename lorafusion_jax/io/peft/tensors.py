"""Tensors of an adapter's file, sorted into checked LoRA factors by module."""

import contextlib
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...models.architecture import unwrapped
from ..source import COMPILED

# <path>.lora_A.weight, with or without PEFT's prefix, an adapter's name (`default`) and, for DoRA, `.weight`.
_FACTOR = re.compile(
    r"(?:base_model\.model\.)*(?P<path>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?"
)
_WRAPPERS = re.compile(
    r"^(?:base_model\.model\.)+|\.(?:base_layer|original_module|modules_to_save(?:\.default)?)(?=\.)"
)
_TRAINING_STATE = ("lora_velora_", "lora_monteclora_sampler")
_OTHER_TENSORS = {
    "lora_embedding_": "LoRA on an embedding, which stacks of the base and often its head share",
    "lora_diag": "KaSA",
    "trainable_tokens": "retrained rows of the embedding (trainable_token_indices)",
    "prompt_embeddings": "prompt or prefix tuning",
    "lora_": "a tensor that plain LoRA does not have",
}
MAGNITUDE = "lora_magnitude_vector"
_ZERO = "zero, so it changes nothing"
_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_EMBEDDINGS = ("shared", "embed_tokens", "lm_head", "wte", "word_embeddings")

# Parts for images and sound, and their projectors, in files of several programs.
_NO_TEXT = re.compile(
    r"(^|\.)(visual|vision|image|audio|speech|multi_modal|mm_projector|connector|aligner"
    r"|embed_vision|embed_audio)"
)

# The tensors of one module: {lora_A, lora_B or lora_magnitude_vector: (key, array)}.
Part = dict[str, tuple[str, np.ndarray]]


def collect(
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    *,
    shapes: Mapping[str, tuple[int, int]] | None,
    base_tensor: Callable[[str], np.ndarray] | None,
) -> tuple[dict[str, Part], dict[str, str]]:
    """Return the checked A [r, d_in] and B [d_out, r] by module path, and why each other tensor (by key) is ignored.

    Keys may have any spelling that PEFT or its users have written. Without shapes these are not compared.
    """
    known = {unwrapped(path): path for path in shapes or ()}
    known["unembed_tokens"] = "lm_head"  # in files of Tinker
    parts: dict[str, Part] = {}
    ignored: dict[str, str] = {}
    for key, array in tensors.items():
        if COMPILED in key:
            raise ValueError(
                f"{key!r} is of a compiled model: save the adapter of the model in it (its _orig_mod)"
            )
        if _NO_TEXT.search(_WRAPPERS.sub("", key)):
            ignored[key] = "of a part that text never runs through"
            continue
        match = _FACTOR.fullmatch(key)
        if match is None:
            if "lora_embedding_" in key and _is_zero(tensors, key):
                ignored[key] = _ZERO
            else:
                ignored[key] = _reason_to_ignore(key, array, config, base_tensor)
            continue
        if match["leaf"] == ".bias":
            raise ValueError(
                f"{key} is a bias on a factor: retrain with lora_bias=False"
            )
        part = parts.setdefault(known.get(unwrapped(match["path"]), match["path"]), {})
        if match["kind"] in part:
            raise ValueError(
                f"{part[match['kind']][0]} and {key} are one factor of two adapters: save them apart"
            )
        _check_array(key, array, ndim=1 if match["kind"] == MAGNITUDE else 2)
        part[match["kind"]] = key, array
    dora = bool(config.get("use_dora"))
    _check_pairs(parts, dora=dora)
    if shapes is not None and not dora:
        for path in parts.keys() - shapes.keys():
            if _is_zero(tensors, parts[path]["lora_A"][0]):
                ignored |= {key: _ZERO for key, _ in parts.pop(path).values()}
    if not parts:
        left_out = [f" ({key} is {reason})" for key, reason in ignored.items()][:1]
        raise ValueError(
            f"it has no lora_A and lora_B{''.join(left_out)}: expected a LoRA adapter of the language model"
        )
    if shapes is not None:
        _check_shapes(parts, shapes, config, base_tensor)
    for part in parts.values():
        for key, array in part.values():
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{key} holds NaN or infinity: its training diverged; retrain it"
                )
    return parts, ignored


def path_in_file(key: str) -> str:
    """Return the path of a factor's module as the file spells it."""
    match = _FACTOR.fullmatch(key)
    assert match is not None
    return match["path"]


def _is_zero(tensors: Mapping[str, np.ndarray], key: str) -> bool:
    """Return whether the factor at a key, or the other factor of its module, is zero."""
    other = re.sub("_[AB]", lambda kind: {"_A": "_B", "_B": "_A"}[kind[0]], key)
    return not (tensors[key].any() and tensors.get(other, tensors[key]).any())


def _reason_to_ignore(
    key: str,
    array: np.ndarray,
    config: Mapping[str, Any],
    base_tensor: Callable[[str], np.ndarray] | None,
) -> str:
    """Return the reason why a tensor that is not a factor is ignored, or raise an ValueError."""
    if any(state in key for state in _TRAINING_STATE):
        return "state of the training only"
    for fragment, meaning in _OTHER_TENSORS.items():
        if fragment in key:
            raise ValueError(
                f"{key} is {meaning}: retrain as plain LoRA on linear modules"
            )
    name = _WRAPPERS.sub("", key)
    task = config.get("task_type")
    kind = "a module trained in full"
    if name.endswith("bias"):
        kind = "a trained bias"
    elif name.split(".")[-2:][0] in _EMBEDDINGS:
        kind = "an embedding"
    got = f"{key} {list(array.shape)} is {kind} (modules_to_save is {config.get('modules_to_save')!r})"
    if base_tensor is None:
        raise ValueError(
            f"{got}: give the base's weights to compare it with; a copy of them is ignored"
        )
    try:
        base = base_tensor(name)
    except KeyError:
        head = f" (task_type {task} trains another head)" if task in _HEADS else ""
        raise ValueError(
            f"{got}, and the base has no {name}{head}: it cannot be mixed; retrain without it"
        ) from None
    with np.errstate(over="ignore", invalid="ignore"):
        same = base.shape == array.shape and np.array_equal(
            base.astype(array.dtype), array
        )
    if not same:
        raise ValueError(
            f"{got}, unlike the base's {name} {list(base.shape)}: it cannot be mixed; retrain without it, or give the "
            "base that it was trained with"
        )
    if task in _HEADS and kind == "a module trained in full":
        raise ValueError(
            f"{got}, and task_type {task} names a model with another head: retrain it as a language model"
        )
    return "equal to the base's"


def _check_array(key: str, array: np.ndarray, *, ndim: int) -> None:
    if array.ndim == ndim and 0 not in array.shape and array.dtype.kind not in "biuc":
        return
    got = f"{key} {list(array.shape)} of dtype {array.dtype}"
    if array.ndim > 2:
        raise ValueError(
            f"{got}: LoRA on a convolution, or PEFT 0.2's MergedLinear; expected linear modules"
        )
    if array.dtype.kind in "biuc":
        raise ValueError(
            f"{got}: expected floats; save the adapter without quantisation"
        )
    raise ValueError(
        f"{got}: expected {ndim} dimensions, none empty: gather shards (DeepSpeed, FSDP), then save again"
    )


def _check_pairs(parts: Mapping[str, Part], *, dora: bool) -> None:
    for path, part in parts.items():
        missing = {"lora_A", "lora_B", *([MAGNITUDE] if dora else [])} - set(part)
        if missing:
            raise ValueError(
                f"{path} has {' and '.join(sorted(part))} but no {' and no '.join(sorted(missing))} "
                f"(use_dora is {str(dora).lower()}): the file is incomplete; save the adapter again"
            )
        if MAGNITUDE in part and not dora:
            raise ValueError(
                f"{part[MAGNITUDE][0]} is DoRA's: set use_dora in adapter_config.json if this is a DoRA"
            )
        key_a, a = part["lora_A"]
        key_b, b = part["lora_B"]
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{key_a} {list(a.shape)} has rank {a.shape[0]}, {key_b} {list(b.shape)} has rank "
                f"{b.shape[1]}: expected [r, d_in] and [d_out, r]; save again"
            )
        if dora and part[MAGNITUDE][1].shape != b.shape[:1]:
            key, magnitude = part[MAGNITUDE]
            raise ValueError(
                f"{key} has shape {list(magnitude.shape)}: expected [{b.shape[0]}]"
            )


def _check_shapes(
    parts: Mapping[str, Part],
    shapes: Mapping[str, tuple[int, int]],
    config: Mapping[str, Any],
    base_tensor: Callable[[str], np.ndarray] | None,
) -> None:
    sizes = {
        path: (part["lora_A"][1].shape[1], part["lora_B"][1].shape[0])
        for path, part in parts.items()
    }
    misfits = [path for path in parts if shapes.get(path) != sizes[path]]
    if not misfits:
        return
    path = misfits[0]
    key_a, a = parts[path]["lora_A"]
    key_b, b = parts[path]["lora_B"]
    if path in shapes:
        d_in, d_out = shapes[path]
        got = f"{key_a} {list(a.shape)} and {key_b} {list(b.shape)}: expected [r, {d_in}] and [{d_out}, r]"
    else:
        with contextlib.suppress(KeyError):
            if base_tensor is not None and base_tensor(f"{path}.weight").ndim == 2:
                raise ValueError(
                    f"{key_a} is LoRA on {path}, which is not implemented: retrain without it among target_modules"
                )
        near = difflib.get_close_matches(path, shapes, n=1, cutoff=0)
        got = f"{key_a}: the base has no linear module {path} (nearest: {', '.join(near)})"
    wrong_base = "wrong base? " if 2 * len(misfits) > len(parts) else ""
    fix = f"give the base that the adapter was trained on, {config.get('base_model_name_or_path')!r}"
    if (task := config.get("task_type")) in _HEADS:
        wrong_base = ""
        fix = f"task_type {task} names a model with another head: retrain it as a language model"
    raise ValueError(
        f"{wrong_base}{len(misfits)} of {len(parts)} modules do not fit; first {got}; {fix}"
    )
