"""Engines: where the items of an experiment run. One that runs out of memory has a failure as its result.

Ray schedules items as tasks of a cluster, and runs them again when a worker or a node dies. Its memory monitor kills
tasks of nodes that run out of memory, which Ray repeats without end: here once. A worker runs one task after the other,
so it compiles each program once.
"""

import contextlib
import functools
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from ..methods import METHODS
from ..support import interrupts
from ..support.checks import load_optional
from ..support.options import EngineOptions as EngineOptions
from ..support.text import printable
from ..support.version import __version__

Item = TypeVar("Item")
Result = TypeVar("Result")
_LONGEST_ERROR = 500
_VERSIONS = {"lorafusion_jax": __version__, "jax": jax.__version__}


class OutOfMemory(NamedTuple):
    """The result of an item that ran out of memory; the error has one line."""

    error: str


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
    if options.engine == "local":
        for item in items:
            yield item, attempt(function, item)
        return
    ray = _load_ray()
    with connected(options):
        # Ray would start a process for each task with an accelerator (max_calls=1).
        task = ray.remote(max_calls=0)(_on_worker())
        nodes = _usable(ray)
        accelerators = _accelerators(nodes)

        def submit(call: Callable[[], Any], **settings: Any) -> Any:
            return task.options(**settings).remote(
                _VERSIONS, os.getcwd(), ray.cloudpickle.dumps((call, METHODS))
            )

        _check(ray, nodes, functools.partial(submit, check or int))
        most = max(int(node["Resources"]["memory"]) for node in nodes)
        running: dict[Any, Item] = {}
        for item in items:
            if interrupts.asked():
                return
            needed = (
                min(memory(item), most)
                if memory is not None and not accelerators
                else None
            )
            running[
                submit(
                    functools.partial(attempt, function, item),
                    memory=needed,
                    **accelerators,
                )
            ] = item
            yield from _finished(ray, running, timeout=0)
        while running and not interrupts.asked():
            yield from _finished(ray, running, timeout=1)


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


def _finished(
    ray: Any, running: dict[Any, Item], timeout: int
) -> Iterator[tuple[Item, Any]]:
    for ref in ray.wait([*running], timeout=timeout)[0]:
        yield running.pop(ref), _result(ray, ref)


def _result(ray: Any, ref: Any) -> Any:
    """Return the result of a task, or raise its error, with the worker's traceback as a note."""
    try:
        return ray.get(ref)
    except ray.exceptions.OutOfMemoryError as error:
        return OutOfMemory(printable(str(error).partition("\n")[0]))
    except ray.exceptions.RayTaskError as error:
        error.cause.add_note(str(error))
        raise error.cause from None


def _on_worker() -> Callable[..., Any]:
    """Return the function of all tasks. As a nested one it is sent as code, also to nodes of another version."""

    def on_worker(versions: dict[str, str], folder: str, pickled: bytes) -> Any:
        import importlib
        import os
        import pickle

        import ray

        for name, version in versions.items():
            try:
                there = importlib.import_module(name).__version__
            except ImportError:
                there = "not installed"
            if there != version:
                raise ValueError(
                    f"{name} is {there}, and {version} where the command runs: install the same version"
                )
        # JAX stays on the accelerator on which it starts. Ray runs this task again, and starts another process.
        devices = str(ray.get_runtime_context().get_accelerator_ids())
        if os.environ.setdefault("LORAFUSION_ACCELERATORS", devices) != devices:
            os._exit(1)
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)
        call, methods = pickle.loads(pickled)
        from lorafusion_jax.methods import METHODS

        METHODS.update(
            {name: entry for name, entry in methods.items() if name not in METHODS}
        )
        return call()

    return on_worker


def _usable(ray: Any) -> list[dict[str, Any]]:
    """Return the nodes that tasks run on: those with accelerators if there are any, or with CPUs."""
    nodes = [
        node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")
    ]
    with_devices = [node for node in nodes if _accelerators([node])]
    if not nodes:
        raise ValueError(
            "no node of the Ray cluster has CPUs for tasks: start Ray on another one"
        )
    return with_devices or nodes


def _accelerators(nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the options of a task that holds an accelerator, if the nodes have any."""
    resources = {name for node in nodes for name in node["Resources"]}
    if "GPU" in resources:
        return {"num_gpus": 1}
    return {"resources": {"TPU": 1}} if "TPU" in resources else {}


def _check(
    ray: Any, nodes: Sequence[dict[str, Any]], submit: Callable[..., Any]
) -> None:
    """Submit a task to each node, and raise a ValueError that names the node where one fails."""
    on = functools.partial(
        ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy, soft=False
    )
    refs = [
        submit(num_cpus=0, scheduling_strategy=on(node["NodeID"])) for node in nodes
    ]
    for node, ref in zip(nodes, refs, strict=True):
        try:
            _result(ray, ref)
        except (ValueError, OSError) as error:
            raise ValueError(f"node {node['NodeManagerAddress']}: {error}") from error
        except ray.exceptions.RayError:  # the node was lost meanwhile
            continue


def _load_ray() -> Any:
    os.environ.setdefault("RAY_task_oom_retries", "1")  # Ray reads it when it is loaded
    return load_optional("ray", extra="ray", needed_by="--engine ray")


@contextlib.contextmanager
def connected(options: EngineOptions) -> Iterator[None]:
    """Stay connected to a Ray cluster, whose workers keep compiled programs between calls of `run_items`.

    The block joins a cluster, or starts one on this machine; a program that has done so already stays connected.
    """
    if options.engine == "local":
        yield
        return
    ray = _load_ray()
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    with interrupts.released():
        interrupts.hold("Ray")  # whose processes would be left
        try:
            ray.init(
                options.address or "local", log_to_driver=False, logging_level="error"
            )
        except ConnectionError as error:
            raise ValueError(
                f"--address {options.address}: no Ray cluster can be joined there ({error}): start its head with "
                "`ray start --head`, or leave out --address"
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGTERM, handler
            )  # Ray's would end the process without its message
        try:
            yield
        finally:
            ray.shutdown()
