"""Physical values of a device: numbers or arrays to sweep and to learn, their bounds, and draws like a matrix."""

import dataclasses
import functools
from collections.abc import Callable
from math import inf
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Num

from .normal_draws import normal

if TYPE_CHECKING:
    Physical = float | int | Array | np.ndarray | None
else:
    # JAX rebuilds pytrees with placeholders as leaves, which run-time type checks would refuse.
    Physical = Any

# Types of one number whose value is known, as opposed to arrays, tracers and a pytree's placeholders.
NUMBER = int | float | np.number


_Class = TypeVar("_Class", bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def model(
    *,
    kw_only: bool = False,
    at_least_0: tuple[str, ...] = (),
    above_0: tuple[str, ...] = (),
) -> Callable[[_Class], _Class]:
    """Make a class a frozen dataclass and a pytree; all but physical values, models and functions is structure.

    Named fields have lower bounds (see `check_bounds`), and those with a `Literal` annotation have one of its values.
    """

    def decorate(cls: _Class) -> _Class:
        post_init = getattr(cls, "__post_init__", lambda self: None)

        def check(self: Any) -> None:
            for name in at_least_0 + above_0:
                check_bounds(self, name, 0, open_low=name in above_0)
            for field in dataclasses.fields(self):
                if get_origin(field.type) is Literal:
                    choices = get_args(field.type)
                    remedy = f"choose {', '.join(choices[:-1])} or {choices[-1]}"
                    valid = getattr(self, field.name) in choices
                    require(self, field.name, valid, remedy)
            post_init(self)

        cls.__post_init__ = check
        cls = dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)
        leaves: dict[bool, list[str]] = {True: [], False: []}
        for field in dataclasses.fields(cls):
            leaves[_has_leaves(field.type)].append(field.name)
        return jax.tree_util.register_dataclass(cls, leaves[True], leaves[False])

    return decorate


def _has_leaves(hint: Any) -> bool:
    """Return whether a field of this type may hold a physical value, a model or a function."""
    return any(
        part is Any or dataclasses.is_dataclass(part) or get_origin(part) is Callable
        for part in (hint, *get_args(hint))
    )


def require(part: Any, name: str, holds: bool, remedy: str) -> None:
    """Raise a ValueError for a field unless a condition holds."""
    if not holds:
        value = getattr(part, name)
        value = value.item() if isinstance(value, np.generic) else value
        raise ValueError(
            f"{type(part).__name__.lower()}.{name} = {value!r:.120}: {remedy}"
        )


def check_bounds(
    owner: Any,
    name: str,
    low: float | int,
    high: float | int = inf,
    *,
    open_low: bool = False,
) -> None:
    """Raise a ValueError for a plain number that is infinite or outside [low, high]; other objects pass."""
    value = getattr(owner, name)
    if (
        not isinstance(value, NUMBER)
        or (low < value if open_low else low <= value)
        and value <= high
        and value != inf
    ):
        return
    bound = f"{'above' if open_low else 'at least'} {low:g} and {f'at most {high:g}' if high < inf else 'finite'}"
    raise ValueError(
        f"{type(owner).__name__}.{name} = {value}: give a number {bound}, or None where it is absent"
    )


def like(value: Any, G: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `value` in the dtype of `G`, so that a swept float32 noise level meets float64 conductances."""
    return jnp.asarray(value, G.dtype)


def noise(key: Array, G: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return standard normal draws, one per cell of `G`, in its dtype."""
    return normal(key, G.shape, G.dtype)


def for_each_cell(name: str, values: Any, shape: tuple[int, ...]) -> Any:
    """Return the result of a device model, which may be a user's function; raises a ValueError for another shape."""
    if jnp.shape(values) != shape:
        got = f"Device.{name} returned values of shape {jnp.shape(values)} for cells of shape {shape}"
        raise ValueError(f"{got}: return one for each cell")
    return values


def varying_as(value: Num[Array, "..."], *inputs: Any) -> Num[Array, "..."]:
    """Return a loop's first value as one that differs between devices where any of the inputs does.

    Under `jax.shard_map` the carry of a loop may not begin to differ in the loop.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return value
    for leaf in jax.tree.leaves(inputs):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(leaf)
        else:
            data = leaf
        value = value + jnp.zeros_like(data, dtype=value.dtype, shape=value.shape)
    return value


def is_moved(tangent: Any) -> bool:
    """Return whether a tangent, in a rule with symbolic zeros, belongs to a differentiated value."""
    return not isinstance(tangent, SymbolicZero)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def without_gradient(value: Array, message: str) -> Array:
    """Return `value` [...], whose differentiation raises a ValueError instead of giving zero."""
    return value


@functools.partial(without_gradient.defjvp, symbolic_zeros=True)
def _refuse(message, primals, tangents):
    if is_moved(tangents[0]):
        raise ValueError(message)
    return primals[0], jnp.zeros_like(primals[0])
