"""The crossbar is a library of its own: its imports, and a copy of it in another project."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).resolve().parents[2] / "lorafusion_jax" / "crossbar"
_THIRD_PARTY = {"jax", "numpy", "yaml", "jaxtyping"}


_USE = """
import sys

import jax
import numpy as np
from flax import nnx

import analogue
import analogue.flax

x = jax.random.normal(jax.random.key(1), (3, 40))
rules = {"a": analogue.CrossbarConfig(adc=analogue.ADC()), "b": None}
weights = jax.random.normal(jax.random.key(0), (40, 6))
placed = analogue.program_tree({"a": weights, "b": weights}, rules, jax.random.key(0))
chip = analogue.calibrated(placed["a"], analogue.probe(x, placed["a"])[1])
analogue.save_chip(chip, "chip.npz")
y, ideal = analogue.matmul(x, analogue.load_chip("chip.npz")), x @ placed["b"]
assert 0 < np.linalg.norm(y - ideal) / np.linalg.norm(ideal) < 0.1
model = nnx.Sequential(nnx.Linear(40, 5, rngs=nnx.Rngs(0)), nnx.relu)
on_arrays = analogue.flax.convert(model, {"*": analogue.PRESETS["ideal"]}, jax.random.key(1))
np.testing.assert_allclose(on_arrays(x), model(x), atol=1e-5)
assert not any(name.startswith("lorafusion_jax") for name in sys.modules)
"""


def _files() -> list[Path]:
    return sorted(_FOLDER.rglob("*.py"))


def test_it_imports_jax_numpy_and_yaml_and_nothing_that_lies_outside():
    """The folder `flax` alone imports Flax, and nothing imports that folder."""
    wrong = []
    for path in _files():
        depth = len(path.relative_to(_FOLDER).parts)
        allowed = _THIRD_PARTY | sys.stdlib_module_names | ({"flax"} if path.parent == _FOLDER / "flax" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wrong += [(path, a.name) for a in node.names if a.name.partition(".")[0] not in allowed]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
                outside = node.level > depth or not node.level and names[0].partition(".")[0] not in allowed
                of_flax = node.level == depth and "flax" in (names[0].partition(".")[0], *names)
                wrong += [(path, names)] if outside or of_flax else []
    assert len(_files()) > 30 and not wrong


@pytest.mark.long
def test_a_copy_under_another_name_works(tmp_path):
    shutil.copytree(_FOLDER, tmp_path / "analogue", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", _USE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
