"""Programming of a model's weights: rules choose the weights and the configuration of their arrays.

A rule is a path pattern and a configuration, or None for a weight that stays digital. The first rule that matches a
weight decides; a weight without a matching rule stays digital. `*` matches anything:

    {"head": None, "pool.*": isaac, "*": puma}
"""

import dataclasses
import fnmatch
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ...support.platform import is_traced
from ...support.reading import error_context
from ..config.schema import CrossbarConfig
from ..config.structure import Structure, split_config
from ..preparation.preparation import Preparation, check_preparation
from .chip import Chip, one_by_one, stacked_keys, typed_key
from .program import program

Rules = Mapping[str, CrossbarConfig | None]
Indices = Mapping[str, Sequence[Int[Array, " _size"]]]
Preparations = Mapping[str, Preparation]

# purposes of a weight's key
_CHIP = 0
_READ = 1


def program_tree(
    weights: Any,
    rules: Rules,
    key: Array,
    *,
    indices: Indices | None = None,
    preparations: Preparations | None = None,
) -> Any:
    """Return a model's weights with `Chip` leaves.

    A weight's arrays depend only on the key, its path and its indices in a stack, not on other weights or the number of
    devices. The function can be vmapped over keys; chips are then an axis.

    Args:
      weights: a tree of matrices [d_in, d_out], or stacks [L, d_in, d_out] and [L, N, d_in, d_out]. Rules match its
        paths, joined by dots. Vectors, such as biases, stay digital. (Give a stack of vectors a rule of None.)
      key: one PRNG key [].
      indices: path -> for each leading axis of that stack, the indices of its entries on the chip, if the stack is part
        of a larger one. For other stacks they are 0, 1, ...
      preparations: path -> preparation of that weight, or of each matrix of that stack (see `prepare`).

    Raises:
      ValueError: a pattern matches nothing, or only vectors, or never decides; a weight cannot be programmed; the rules
        or the key are something else.
    """
    check_rules(rules)
    key = one_key(key)
    by_path, tree = jax.tree.flatten_with_path(weights)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in by_path
    }
    _check_patterns(rules, leaves)
    indices = indices or {}
    preparations = preparations or {}
    if unknown := [path for path in preparations if path not in leaves]:
        raise ValueError(
            f"preparations of {', '.join(unknown)}, which are no weights: there are {', '.join(leaves)}"
        )
    return tree.unflatten(
        [
            _place(path, leaf, rules, key, indices.get(path), preparations.get(path))
            for path, leaf in leaves.items()
        ]
    )


def _place(
    path: str,
    weight: Float[Array, "..."],
    rules: Rules,
    key: Array,
    indices: Sequence[Int[Array, " _size"]] | None,
    preparation: Preparation | None,
) -> Any:
    """Return a weight programmed by its rules, or as it is."""
    config = first_match(path, rules)
    if weight.ndim < 2 or config is None:
        return weight
    if 0 in weight.shape[:-2]:
        raise ValueError(
            f"{path or 'the model'} of shape {weight.shape} is a stack without matrices: give at least one, or None "
            "as its rule"
        )
    if not is_traced(weight) and not np.isfinite(np.asarray(weight)).all():
        raise ValueError(
            f"{path or 'the model'} holds weights that are NaN or infinite: give finite weights"
        )
    with error_context(path or "the model"):
        check_preparation(preparation, weight.shape, config)
    indices = indices or [jnp.arange(size) for size in weight.shape[:-2]]
    chips, noise = _keys(key, np.uint32(zlib.crc32(path.encode())), indices)
    structure, values = split_config(config)
    # Without its identity, so that weights of one kind share a compiled function.
    bare = preparation and dataclasses.replace(preparation, identity="")
    chip = _program_stack(weight, chips, bare, values, structure=structure)
    noise = noise if config.reads_at_random else None
    return dataclasses.replace(chip, key=noise, name=path, preparation=preparation)


@jax.jit  # compiled, because the operations one by one take 13 ms for a weight
def _keys(
    key: Array, weight: Array, indices: Sequence[Int[Array, " _size"]]
) -> list[Array]:
    """Return the keys of the chip and of the reads for every matrix of a stack."""
    weight_key = jax.random.fold_in(key, weight)
    return [
        stacked_keys(jax.random.fold_in(weight_key, purpose), indices)
        for purpose in (_CHIP, _READ)
    ]


@functools.partial(jax.jit, static_argnames=("structure",))
def _program_stack(
    weight: Array,
    keys: Array,
    preparation: Preparation | None,
    values: list[Array],
    *,
    structure: Structure,
) -> Chip:
    """Program the matrices of a stack one after the other, so that only one's temporaries are in memory."""

    def of_one(matrix: Array, key: Array, preparation: Preparation | None) -> Chip:
        config = structure.config(values)
        chip = program(matrix, config, key, preparation=preparation)
        if chip.plan.path != "lookup":
            return chip
        # Compiled in half the time; reads of 64 vectors or more take 0.7 to 1.15 times as long.
        path = "packed" if chip.plan.bit_fields else "loop"
        return program(matrix, config, key, path=path, preparation=preparation)

    return one_by_one(of_one, weight.shape[:-2])(weight, keys, preparation)


def first_match(path: str, rules: Rules) -> CrossbarConfig | None:
    """Return the configuration of a weight; None for digital."""
    return next(
        (
            config
            for pattern, config in rules.items()
            if fnmatch.fnmatchcase(path, pattern)
        ),
        None,
    )


def check_rules(rules: Any) -> None:
    """Raise a ValueError for rules that are not a table from patterns to configurations or None."""
    if not isinstance(rules, Mapping):
        example = (
            "give a table from path patterns to configurations, such as {'*': config}"
        )
        raise ValueError(f"rules of type {type(rules).__name__}: {example}")
    for pattern, config in rules.items():
        if config is not None and not isinstance(config, CrossbarConfig):
            if isinstance(config, str):
                example = f"load_config({config!r})"
            else:
                example = "a CrossbarConfig"
            raise ValueError(
                f"the rule {pattern!r} gives {config!r}: give {example}, or None for digital"
            )


def one_key(key: Any) -> Array:
    """Return a PRNG key [], typed; raises a ValueError for anything but one key, typed or raw."""
    if isinstance(key, jax.Array):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if typed and key.ndim == 0 or key.dtype == jnp.uint32 and key.ndim == 1:
            return typed_key(key)
    description = (
        f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else repr(key)
    )
    raise ValueError(
        f"the key is {description}: give one PRNG key, such as jax.random.key(0)"
    )


def _check_patterns(rules: Rules, weights: Mapping[str, Array]) -> None:
    earlier: dict[str, set[Any]] = {}
    for pattern, config in rules.items():
        matched = [path for path in weights if fnmatch.fnmatchcase(path, pattern)]
        if not matched:
            choices = (
                ", ".join(weights)
                or "a single layer, which has no name and matches '*'"
            )
            raise ValueError(
                f"the rule {pattern!r} matches no weight: there are {choices}; correct it"
            )
        if config is not None and all(weights[path].ndim < 2 for path in matched):
            raise ValueError(
                f"the rule {pattern!r} matches {', '.join(matched) or 'the model'} of shape "
                f"{weights[matched[0]].shape}, but arrays hold matrices: leave the rule out, or name a matrix or a "
                "stack of them"
            )
        for earlier_pattern, covered in earlier.items():
            # The rule for all others may be left with nothing.
            if (
                pattern != "*"
                and rules[earlier_pattern] is not config
                and covered.issuperset(matched)
            ):
                raise ValueError(
                    f"the rule {pattern!r} never decides, because {earlier_pattern!r} comes first and matches all that "
                    "it matches: put the special rule before the general one"
                )
        earlier[pattern] = set(matched)
