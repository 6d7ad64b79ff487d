"""The notebooks in examples/notebooks run from beginning to end."""

import os
import sys
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_NOTEBOOKS = sorted((_EXAMPLES / "notebooks").glob("*.ipynb"))
# The parameters of a short run.
_QUICK = {
    "flax_on_reram": "STEPS, TEST_ROWS, ADC_BITS, CHIPS = 2, 100, (4,), 2",
    "fuse_a_pool": "SEEDS, MODULES, EPOCHS, TRAIN_ROWS, TEST_ROWS = (1,), 3, 1, 20, 4",
    "write_a_method": (
        "SEEDS, MODULES, EPOCHS, TRAIN_ROWS, TEST_ROWS = (1, 2), 3, 1, 20, 4\nTASKS = ('pairswap_numvow',)"
    ),
}


def _run(notebook, tmp_path, monkeypatch, parameters=None):
    """Run a notebook in a folder next to the examples, whose programs are those of this environment."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "small").symlink_to(_EXAMPLES / "small")
    monkeypatch.setenv(
        "PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv(
        "JAX_NUMPY_DTYPE_PROMOTION", "standard"
    )  # as outside of tests; optax relies on it
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "allow")
    cells = nbformat.read(notebook, as_version=4)
    (tagged,) = (
        cell for cell in cells.cells if "parameters" in cell.metadata.get("tags", ())
    )
    tagged.source = parameters or tagged.source
    nbclient.NotebookClient(
        cells, timeout=600, resources={"metadata": {"path": str(folder)}}
    ).execute()


@pytest.mark.long
@pytest.mark.parametrize("name", _QUICK)
def test_a_notebook_runs_with_a_few_rows_and_steps(name, tmp_path, monkeypatch):
    _run(_EXAMPLES / "notebooks" / f"{name}.ipynb", tmp_path, monkeypatch, _QUICK[name])


@pytest.mark.nightly
@pytest.mark.parametrize("notebook", _NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_as_it_is_shown(notebook, tmp_path, monkeypatch):
    _run(notebook, tmp_path, monkeypatch)
