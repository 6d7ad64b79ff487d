"""Engines: the local one, and options that are refused. `test_ray.py` has real clusters."""

import sys
from types import ModuleType

import jax
import pytest

from lorafusion_jax.trials import EngineOptions, MatrixOptions, OutOfMemory, run_items


def _run(item):
    if isinstance(item, Exception):
        raise item
    return 10 * item


def test_a_failure_of_memory_is_a_result_and_other_errors_are_raised():
    errors = (
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nmore"),
    )
    found = list(run_items(_run, [1, *errors, 2], EngineOptions()))
    memory = [OutOfMemory("MemoryError"), OutOfMemory("RESOURCE_EXHAUSTED: 9 bytes")]
    assert found == [(1, 10), *zip(errors, memory, strict=True), (2, 20)]
    for error in (jax.errors.JaxRuntimeError("INTERNAL: bug"), ValueError("bad file")):
        with pytest.raises(type(error), match=str(error)):
            list(run_items(_run, [error], EngineOptions()))


def _no_cluster(*_, **__):
    raise ConnectionError("none")


def test_options_that_no_engine_has_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match="--address auto is that of a Ray cluster: add --engine ray"
    ):
        MatrixOptions(base="", pool="", tasks=(), address="auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ValueError,
        match=r'--engine ray needs ray, .* pip install "lorafusion-jax\[ray\]"',
    ):
        list(run_items(_run, [1], EngineOptions(engine="ray")))
    monkeypatch.setitem(sys.modules, "ray", fake := ModuleType("ray"))
    vars(fake).update(is_initialized=lambda: False, init=_no_cluster)
    with pytest.raises(
        ValueError,
        match=r"--address auto: no Ray cluster can be joined there \(none\): start",
    ):
        list(run_items(_run, [1], EngineOptions(engine="ray", address="auto")))
