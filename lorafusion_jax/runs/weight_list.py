"""The list of weights of modules that `lorafusion merge` combines, as a start of a fusion or of a LoRA.

It is a JSON file, or merge.json in a folder that `lorafusion merge` wrote.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..adapters.basis import Pool
from ..adapters.coefficients import column_names, refined
from ..io.digests import Digests
from ..loading.model import LoadedModel, check_digests
from ..methods.entry import basis_of
from ..methods.fusion import CoefficientsRecipe, Fusion, choice_of
from ..methods.lora import LoRARecipe
from ..support.reading import read_json
from ..support.text import some
from .options import FuseOptions

Weights = dict[str, float | dict[str, float]]
"""Weight of every module, or its weights by block, named STACK.LAYER."""
RECORD = "merge.json"


class Merged(TypedDict):
    """Contents of merge.json: the weights, and the digests of the base and of the modules."""

    weights: Weights
    digests: Digests


def read_weights(source: Path) -> tuple[Weights, Digests | None] | None:
    """Return the weights in a JSON file, or in a folder that `merge` wrote with its digests; None for another folder.

    Raises:
      ValueError: there is no such file or folder, or the file is not such a list.
    """
    if not source.exists():
        raise ValueError(
            f"--from {source}: no such file or folder: give a run, a merged folder or a list of weights"
        )
    if source.is_file():
        return read_json(source, Weights, "weights by module", allow_unknown=True), None
    if not (source / RECORD).is_file():
        return None
    merged = read_json(source / RECORD, Merged, "a merged list")
    return merged["weights"], merged["digests"]


def typed_weights(weights: Sequence[str], file: Path | None) -> Weights:
    """Return the weights in options such as name=0.7, and in a JSON file.

    Raises:
      ValueError: there is no weight, a module has two, or one is not a number.
    """
    read_weights: Weights = {}
    if file is not None:
        if not file.is_file():
            raise ValueError(
                f'{file}: no such file: expected JSON such as {{"sort_dash": 0.7}}'
            )
        read_weights |= read_json(
            file, Weights, "weights by module", allow_unknown=True
        )
    for text in weights:
        name, _, number = text.rpartition("=")
        if name in read_weights:
            raise ValueError(
                f"{name} has two weights, one in --weights {text!r}: give one"
            )
        try:
            read_weights[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(
                f"--weights {text!r}: expected name=number, such as sort_dash=0.7"
            )
    if not read_weights:
        raise ValueError(
            "no weights: give some with --weights name=0.7 or --weights-file"
        )
    return read_weights


def check_modules(
    chosen: Iterable[str], names: Sequence[str], pool: str | None
) -> None:
    """Raise a ValueError for names that are not modules of a pool."""
    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(
            f"{pool} has no module {some(unknown)}: it has {some(names)}; correct the names"
        )


def coefficients_of(weights: Weights, pool: Pool) -> Float[Array, "N blocks"]:
    """Return the coefficients of every module of a pool by block, zero for those without a weight.

    Raises:
      ValueError: a weight is not a finite number, a block is not the pool's, or a module has no weights.
    """
    blocks = column_names(pool, "block")
    coefficients = np.zeros((len(pool), len(blocks)), np.float32)
    for row, name in enumerate(pool.names):
        module_weight = weights.get(name, 0.0)
        if isinstance(module_weight, Mapping):
            by_block = module_weight
        else:
            by_block = dict.fromkeys(blocks, module_weight)
        if not by_block:
            raise ValueError(
                f"{name} has no weights: expected a number, or numbers by block, of {some(blocks)}"
            )
        for block, weight in by_block.items():
            if block not in blocks:
                raise ValueError(
                    f"the weights of {name} name a block {block!r}: expected one of {some(blocks)}"
                )
            if not abs(weight) <= float(np.finfo(np.float32).max):
                raise ValueError(
                    f"the weight of {name} is {weight!r}: expected a finite number of float32"
                )
            coefficients[row, blocks.index(block)] = weight
    return jnp.asarray(coefficients)


def with_listed_modules(options: FuseOptions) -> FuseOptions:
    """Return the options with the modules of the list of weights that the run starts from, if it starts from one.

    Raises:
      ValueError: the options choose other modules, or their method does not start from a weighted sum.
    """
    if (
        options.start_from is None
        or (listed := read_weights(options.start_from)) is None
    ):
        return options
    names = tuple(listed[0])
    recipe = options.recipe
    method = options.entry
    lora = isinstance(recipe, LoRARecipe)
    for wrong, message in (
        (not names, "it has none: give a weight for each module to fuse"),
        (
            lora and options.pool is None,
            "the modules are those of a pool: give it with --pool",
        ),
        (
            not lora
            and (
                not isinstance(recipe, CoefficientsRecipe)
                or "coefficients" not in method.groups
            ),
            f"the method {method.name} cannot start from them: use fusion, coefficients, lora or dora",
        ),
        (
            getattr(recipe, "composition", "sum") != "sum",
            "they belong to a sum: use the composition sum",
        ),
        (
            not lora
            and options.adapters not in ((), names)
            or choice_of(recipe) != "draw",
            "they name the modules already: leave out --adapters and --choose",
        ),
    ):
        if wrong:
            raise ValueError(
                f"--from {options.start_from} is a list of weights: {message}"
            )
    return options if lora else dataclasses.replace(options, adapters=names)


def listed_params(
    setup: LoadedModel,
    options: FuseOptions,
    current: Digests,
    weights: Weights,
    recorded: Digests | None,
) -> dict[str, Any]:
    """Return the parameters of all seeds that give the model of a list of weights, from the digests of both sides."""
    problem = setup.problem
    source = options.start_from
    method = problem.method
    pool = problem.frozen.pool
    assert isinstance(method, Fusion) and pool is not None and source is not None
    if recorded is not None:
        if (
            basis_of(options.recipe) is not None
        ):  # modules in a basis have digests of other arrays
            recorded = {"base": recorded["base"], "modules": {}}
        check_digests(source, recorded, current, options)
    if missing := sorted(weights.keys() - {*setup.modules[0]}):
        raise ValueError(
            f"{options.pool} has no module {some(missing)}, which {source} names: correct the names"
        )
    if options.control != "none":  # its modules are named after those that they replace
        pool = dataclasses.replace(
            pool,
            names=tuple(
                name.removeprefix(f"{options.control} ") for name in pool.names
            ),
        )
    by_block = coefficients_of(weights, pool)
    by_block = by_block[
        jnp.array([pool.names.index(name) for name in setup.modules[0]])
    ]
    if method.granularity != "global":
        coefficients = refined(by_block, pool, "block", method.granularity)
    elif any(isinstance(weight, dict) for weight in weights.values()):
        raise ValueError(
            f"{source} has weights by block: use the granularity block, site or rank"
        )
    else:
        coefficients = by_block[:, 0]
    params = jax.jit(method.start_at)(coefficients, problem.frozen, problem.index[0])
    return jax.tree.map(
        lambda p: jnp.broadcast_to(p, (len(options.seeds), *p.shape)), params
    )
