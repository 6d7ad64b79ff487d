"""A command that is stopped says one line, ends with the signal's exit code, and leaves nothing half done."""

import ast
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_READY = """
import ctypes, sys, threading, time
from pathlib import Path
from lorafusion_jax.support import interrupts
interrupts.watch()
folder = Path(sys.argv[1])
def ready():
    print("ready", flush=True)
"""
_WORK = {
    "Python": "ready()\nwhile True: pass",
    "C without a way back to Python": "ready()\nctypes.CDLL(None).sleep(60)",
    "an import": """
(folder / "slow.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
sys.path.insert(0, str(folder)); import slow
""",
    "an import of what ends the process": """
import importlib
sys.modules.pop("shutil", None)
lock = importlib._bootstrap._get_module_lock("shutil")
lock.acquire()
ready()
time.sleep(60)
""",
}


def _start(code: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", _READY + code, str(folder)]
    return _ready(subprocess.Popen(command, cwd=_ROOT, stdout=-1, stderr=-1, text=True))


def _ready(process: subprocess.Popen) -> subprocess.Popen:
    assert process.stdout is not None and process.stdout.readline() == "ready\n", (
        process.communicate()[1]
    )
    return process


def _signals(process: subprocess.Popen, *numbers: int) -> str:
    """Send signals, each after the line about the one before it; return what was printed."""
    printed = []
    with process:
        assert process.stderr is not None
        for number in numbers[:-1]:
            process.send_signal(number)
            printed.append(process.stderr.readline())
        process.send_signal(numbers[-1])
        printed.append(
            process.stderr.read()
        )  # not `communicate`, which skips what is buffered
    return "".join(printed)


@pytest.mark.parametrize(
    ("work", "number"), list(zip(_WORK, itertools.cycle(_SIGNALS), strict=False))
)
def test_a_signal_ends_any_work_with_one_line(work, number, tmp_path):
    process = _start(_WORK[work], tmp_path)
    assert _signals(process, number) == f"stopped by {_SIGNALS[number]}\n"
    assert process.returncode == 128 + number


def test_a_signal_ends_a_script_of_experiments_while_it_imports(tmp_path):
    # The first library that it imports; JAX comes later.
    (tmp_path / "tyro.py").write_text(
        "import time; print('ready', flush=True); time.sleep(60)"
    )
    path = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(_ROOT)))}
    command = [sys.executable, _ROOT / "experiments" / "small_pool.py"]
    process = _ready(
        subprocess.Popen(
            command, env=os.environ | path, stdout=-1, stderr=-1, text=True
        )
    )
    assert (
        _signals(process, signal.SIGINT) == "stopped by Ctrl-C\n"
        and process.returncode == 130
    )


def test_every_script_of_experiments_handles_signals_before_it_imports_a_library():
    scripts = [
        path
        for path in (_ROOT / "experiments").glob("*.py")
        if not path.name.startswith("_")
    ]
    assert scripts
    for path in scripts:
        lines = [
            node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [
            node.module or ""
            if isinstance(node, ast.ImportFrom)
            else node.names[0].name
            for node in lines
        ]
        others = [
            name
            for name in names
            if name.partition(".")[0] not in sys.stdlib_module_names
        ]
        assert others[0] == "_script", path


_HELD = """
interrupts.hold("after this step; it is saved")
ready()
while not interrupts.asked(): time.sleep(0.01)
%s
(folder / "saved").write_text("")
interrupts.release()
(folder / "continued").write_text("")
"""
_STEP = "time.sleep(60)"
_FULL = "with interrupts.released():" + (_HELD % "raise SystemExit('full')").replace(
    "\n", "\n    "
)


@pytest.mark.parametrize(
    ("code", "numbers", "code_of_end", "printed", "files"),
    [
        pytest.param(
            _HELD % "",
            [signal.SIGTERM],
            143,
            ["SIGTERM: stopping after this step; it is saved. Once more stops at once"],
            {"saved"},
            id="the state is saved first",
        ),
        pytest.param(
            _HELD % _STEP,
            [2, 2],
            130,
            [..., "stopped by Ctrl-C"],
            set(),
            id="a second one does not wait",
        ),
        pytest.param(
            _FULL, [2], 1, [..., "full"], set(), id="an error of saving is printed"
        ),
    ],
)
def test_signals_while_a_state_is_held(
    code, numbers, code_of_end, printed, files, tmp_path
):
    process = _start(code, tmp_path)
    lines = _signals(process, *numbers).splitlines()
    assert process.returncode == code_of_end
    assert [
        line if part is not ... else ...
        for line, part in zip(lines, printed, strict=True)
    ] == printed
    assert {path.name for path in tmp_path.iterdir()} == files


def test_a_folder_that_is_being_written_is_removed_silently(tmp_path):
    code = """
(partial := folder / ".pool.partial").mkdir()
for number in range(2000): (partial / str(number)).write_text("")
def write():
    ready()
    while partial.exists(): pass
    while True: print("WARNING: it is gone", file=sys.stderr, flush=True)
with interrupts.removed(partial):
    threading.Thread(target=write, daemon=True).start()
    time.sleep(60)
"""
    process = _start(code, tmp_path)
    assert _signals(process, signal.SIGTERM) == "stopped by SIGTERM\n"
    assert process.returncode == 143 and list(tmp_path.iterdir()) == []
