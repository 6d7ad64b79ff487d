"""Programs compiled for TPUs by libtpu, where it is installed, meet their bars."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu: pip install -e '.[aot-tpu]'",
    ),
]


def test_programs_meet_their_bars():
    reads = (
        "read of arrays",
        "read of imperfect arrays",
        "read with noise",
        "read with noise, cell by cell",
    )
    steps = ("mix", "mix, packed rows", "mix on a mesh of 4 x 2")
    programs = (*steps, "generation with the sum", *reads)
    # XLA's flags of the tests are those of a CPU.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XLA_", "JAX_"))
    }
    command = [
        sys.executable,
        _ROOT / "benchmarks" / "accelerators.py",
        "--json",
        "--program",
        *programs,
    ]
    environment |= {"PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path])}
    done = subprocess.run(
        command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    barred = [
        case
        for case in json.loads(done.stdout)["cases"]
        if case["required"] is not None
    ]
    assert len(barred) >= 4
    assert [case["name"] for case in barred if case["ratio"] > case["required"]] == []
