"""The scripts of examples/ run, with settings that make them small."""

import importlib.util
from pathlib import Path
from types import ModuleType

import lorafusion_jax as lf

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_RECIPE = lf.Recipe(modules=3, epochs=1, batch_size=50, max_new_tokens=8)


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, _EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fuse_in_python_trains_and_answers():
    assert 0 <= _example("fuse_in_python").main(epochs=1, test_rows=4) <= 1


def test_chips_evaluates_digital_numbers_on_two_chips_and_trains_on_one(tmp_path):
    digital = ("decoder.*", "*.ff.*", "encoder.self.[kvo]", "pool.*")
    scores = _example("chips").main(tmp_path, recipe=_RECIPE, test_rows=4, digital=digital)
    assert len(scores) == 1 + 2 * 2 + 1


def test_sweep_on_a_mesh_trains_every_seed(tmp_path):
    results = _example("sweep_on_a_mesh").main(tmp_path, recipe=_RECIPE, test_rows=4)
    assert [seed["seed"] for seed in results["seeds"]] == [1, 2, 3, 4]
