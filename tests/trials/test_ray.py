"""The engine `ray` on a real cluster: rows of the local engine, lost nodes and drivers, memory, versions.

Drivers are processes of their own, as users start them.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import one_block
import pytest
from lab.matrix import MatrixOptions, run_matrix
from lab.methods import ARMS
from safetensors.numpy import load_file, save_file

from lorafusion_jax.cli import main
from lorafusion_jax.support.checks import load_optional
from lorafusion_jax.trials import key, read_lines, read_rows

# Ray forks this process, where JAX has threads, and starts another program at once.
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]

_OPTIONS = {
    "tasks": tuple(
        str(one_block.SMALL / "tasks" / name) for name in ("double_digit", "odd_dash")
    ),
    "methods": ("zero-shot", "constant answer", "magnitudes only", "coefficients only"),
    "seeds": (1, 2),
    "modules": 2,
    "epochs": 2,
    "test_rows": 5,
}
_MATRIX = """
import sys, tyro
sys.path.append("experiments")
from lorafusion_jax.cli import run
from lab.methods import ARMS
from lab.matrix import MatrixOptions, run_matrix
run(lambda arguments: run_matrix(tyro.cli(MatrixOptions, args=arguments), ARMS))
"""
_COMMAND = """
import sys
from lorafusion_jax.cli import main
main(sys.argv[1:])
"""
# An item waits for its file, or allocates so many bytes.
_ITEMS = """
import sys, time
from pathlib import Path
import numpy as np
from lorafusion_jax.trials import EngineOptions, run_items

def work(item):
    while isinstance(item, str) and not Path(item).exists():
        time.sleep(0.1)
    return item if isinstance(item, str) else np.ones(item, np.int8).size

def main(arguments):
    address, *items = arguments
    numbers = [int(item) if item.isdigit() else item for item in items]
    for item, result in run_items(work, numbers, EngineOptions(engine="ray", address=address)):
        print(item, type(result).__name__, flush=True)

from lorafusion_jax.cli import run
run(main)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The home folder of the cluster's nodes."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster(home):
    """A cluster with one node of one core; tests add others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        # All addresses are 127.0.0.1, which Ray's variable means for other systems.
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = load_optional(
            "ray.cluster_utils", extra="ray", needed_by="this test"
        ).Cluster()
        cluster.add_node()
        yield cluster
        cluster.shutdown()


@contextlib.contextmanager
def _node(cluster, **variables):
    """Another node of one core."""
    node = cluster.add_node(env_vars=variables)
    try:
        yield node
    finally:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def _driver(code, *arguments, **variables):
    """A process that runs code; its output is read as lines."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | variables, **streams) as process:
        limit = threading.Timer(300, process.kill)  # seconds
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()


def _error(driver, code=2):
    """The last line on stderr of a driver that ends with the code."""
    error = driver.communicate(timeout=300)[1]
    assert driver.returncode == code, error
    return error


def _matrix(cluster, small, out):
    where = {
        "engine": "ray",
        "address": cluster.address,
        "base": small[0],
        "pool": small[1],
        "out": out,
    }
    flags = []
    for name, value in (where | _OPTIONS).items():
        flags += [
            f"--{name.replace('_', '-')}",
            *(value if isinstance(value, tuple) else [value]),
        ]
    return _driver(_MATRIX, *flags)


def _wait_for_rows(file, count):
    end = time.monotonic() + 300
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def local(small, tmp_path_factory):
    """The rows of the local engine, without their times, by their keys."""
    out = tmp_path_factory.mktemp("local")
    return _rows(
        run_matrix(
            MatrixOptions(base=str(small[0]), pool=str(small[1]), out=out, **_OPTIONS),
            ARMS,
        )
    )


def _rows(file):
    rows = {key(row): dict(row) for row in read_rows(file)}
    assert len(rows) == file.read_bytes().count(b"\n")
    for row in rows.values():
        row["loss"] = (
            None if row["loss"] is None else pytest.approx(row["loss"], rel=1e-4)
        )
        del row["seconds"]
    return rows


def test_rows_are_those_of_the_local_engine_after_a_driver_and_a_node_are_killed(
    cluster, small, local, tmp_path
):
    file = tmp_path / "results.jsonl"
    with _node(cluster) as node:
        with _matrix(cluster, small, tmp_path):
            _wait_for_rows(file, 1)
        before = file.read_bytes()
        with _matrix(cluster, small, tmp_path) as driver:
            _wait_for_rows(file, before.count(b"\n") + 1)
            cluster.remove_node(node, allow_graceful=False)
            _error(driver, 0)
    assert file.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert _rows(file) == local


def test_items_that_run_out_of_memory_fail_alone(cluster, tmp_path):
    """One allocates more than there is, one is killed by Ray's memory monitor, on a node without free memory."""
    more = str(2**50)
    # Either of these may be the one on the other node: Ray does not start items in their order.
    waiting = {str(tmp_path / name) for name in "ab"}
    with _driver(_ITEMS, cluster.address, more, *waiting) as driver:

        def result():  # among lines of Ray
            for line in driver.stdout:
                if line.startswith((more, *waiting)):
                    return line.split()
            return driver.stderr.read()

        assert result() == [more, "OutOfMemory"]
        with _node(cluster, RAY_memory_usage_threshold="0.001"):
            killed, kind = result()
            assert kind == "OutOfMemory"
            (held,) = waiting - {killed}
            Path(held).touch()
            assert result() == [held, "str"]
        _error(driver, 0)


def test_nodes_are_checked_before_anything_runs(cluster, small, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import lorafusion_jax\nlorafusion_jax.__version__ = '9.9'\n"
    )
    path = os.pathsep.join(
        (str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")]))
    )
    with (
        _node(cluster, PYTHONPATH=path),
        _matrix(cluster, small, tmp_path / "out") as driver,
    ):
        assert "error: node 127.0.0.1: lorafusion_jax is 9.9, and 0." in (
            error := _error(driver)
        )
    assert "install the same version" in error
    assert not (tmp_path / "out").exists()


def _trial(base, pool, out, *ray):
    where = (
        f"trial --base {base} --pool {pool} --task {_OPTIONS['tasks'][0]} --out {out}"
    )
    return [*f"{where} --train-rows 12 --folds 2 --epochs 1".split(), *ray]


def test_a_trial_has_the_table_of_one_process_after_a_node_is_killed(
    cluster, small, tmp_path
):
    main(_trial(*small, tmp_path / "local"))
    file = tmp_path / "out" / "double_digit" / "measured.jsonl"
    ray = ("--engine", "ray", "--address", cluster.address)
    command = _trial(*small, tmp_path / "out", *ray)
    with _node(cluster) as node, _driver(_COMMAND, *command) as driver:
        _wait_for_rows(file, 10)
        cluster.remove_node(node, allow_graceful=False)
        _error(driver, 0)
    tables = []
    for out in ("local", "out"):
        text = (tmp_path / out / "double_digit.csv").read_text()
        # Without the minutes, which are the last column.
        tables.append([line.rpartition(",")[0] for line in text.splitlines()])
    assert len(tables[0]) > 8 and tables[0] == tables[1]
    rows = read_lines(file)
    assert len(rows) == len(read_lines(tmp_path / "local" / "double_digit" / file.name))


def test_a_trial_refuses_nodes_with_another_base(cluster, small, home, tmp_path):
    for folder in (home, tmp_path):
        shutil.copytree(small[0], folder / "base")
    (weights,) = (tmp_path / "base").glob("*.safetensors")
    changed = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    out = tmp_path / "out"
    ray = ("--engine", "ray", "--address", cluster.address)
    command = _trial("~/base", small[1], out, *ray)
    with _driver(_COMMAND, *command, HOME=str(tmp_path)) as driver:
        error = _error(driver)
    assert (
        f"{_OPTIONS['tasks'][0]}: this node has another base or pool than the node"
        in error
    )
    assert not [*out.glob("**/measured.jsonl")]
