"""Engines: where the items of an experiment run. One that runs out of memory has a failure as its result."""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax

from ..support.text import printable

Item = TypeVar("Item")
Result = TypeVar("Result")
_LONGEST_ERROR = 500


class OutOfMemory(NamedTuple):
    """The result of an item that ran out of memory; the error has one line."""

    error: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where work runs.

    Attributes:
      engine: in this process, or as tasks of a Ray cluster.
      address: a running Ray cluster: auto, or host:port of its head node; by default one is started on this machine.
    """

    engine: Literal["local", "ray"] = "local"
    address: str | None = None

    def __post_init__(self):
        if self.address is not None and self.engine != "ray":
            raise ValueError(
                f"--address {self.address} is that of a Ray cluster: add --engine ray, or leave it out"
            )


LOCAL = EngineOptions()


def run_items(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    options: EngineOptions,
    *,
    check: Callable[[], Any] | None = None,
    memory: Callable[[Item], int] | None = None,
) -> Iterator[tuple[Item, Result | OutOfMemory]]:
    """Call a function on items, and yield each with its result when it is finished.

    The function, the items and the results are pickled by Ray. Its tasks run in the working folder of this process,
    which is made on nodes that lack it.

    Args:
      function: function of one item.
      items: items; in this process they run in their order.
      options: the engine.
      check: function that Ray calls on every node before any item, such as one that opens files.
      memory: function that returns the bytes of memory that an item needs on a node without accelerators.

    Raises:
      ValueError: Ray is not installed, there is no cluster at the address, or a node has another version of this
        package or of JAX.
      Exception: an error of the function, other than those of memory, or of `check`.
    """
    if options.engine == "ray":
        from .ray_engine import run_on_ray

        yield from run_on_ray(
            function, items, options.address, check=check, memory=memory
        )
    else:
        for item in items:
            yield item, attempt(function, item)


def attempt(function: Callable[[Item], Result], item: Item) -> Result | OutOfMemory:
    """Return the function's result, or that it ran out of memory."""
    try:
        return function(item)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(
            error
        ):
            raise
        failure = OutOfMemory(
            printable(str(error).partition("\n")[0][:_LONGEST_ERROR])
            or type(error).__name__
        )
    gc.collect()  # the error's traceback held the arrays of the run
    return failure
