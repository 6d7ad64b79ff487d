"""Engines: the local one, and options that are refused. `test_ray.py` has real clusters."""

import sys
from types import ModuleType

import jax
import pytest
from lab.matrix import MatrixOptions
from refusals import refused

from lorafusion_jax.trials import EngineOptions, OutOfMemory, run_items


def _run(item):
    if isinstance(item, Exception):
        raise item
    return 10 * item


def test_a_failure_of_memory_is_a_result_and_other_errors_are_raised():
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nmore")
    items = [1, MemoryError(), full, 2]
    results = [result for _, result in run_items(_run, items, EngineOptions())]
    memory = [OutOfMemory("MemoryError"), OutOfMemory("RESOURCE_EXHAUSTED: 9 bytes")]
    assert results == [10, *memory, 20]
    for error in (jax.errors.JaxRuntimeError("INTERNAL: bug"), ValueError("bad file")):
        with pytest.raises(type(error), match=str(error)):
            list(run_items(_run, [error], EngineOptions()))


def _no_cluster(*_, **__):
    raise ConnectionError("none")


def test_options_that_no_engine_has_are_refused(monkeypatch):
    message = "--address auto is that of a Ray cluster: add --engine ray"
    with refused(message):
        MatrixOptions(base="", pool="", tasks=(), address="auto")
    options = EngineOptions(engine="ray", address="auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    with refused("--engine ray needs ray, .* pip install"):
        list(run_items(_run, [1], options))
    ray = ModuleType("ray")
    vars(ray).update(is_initialized=lambda: False, init=_no_cluster)
    monkeypatch.setitem(sys.modules, "ray", ray)
    message = r"--address auto: no Ray cluster can be joined there \(none\): start"
    with refused(message):
        list(run_items(_run, [1], options))
