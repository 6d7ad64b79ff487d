"""A command that is stopped says one line, ends with the signal's exit code, and leaves nothing half done."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_READY = """
import ctypes, sys, threading, time
from pathlib import Path
from lorafusion_jax import interrupts
interrupts.watch()
folder = Path(sys.argv[1])
def ready():
    print("ready", flush=True)
"""
_WORK = {
    "Python": "ready()\nwhile True: pass",
    "C without a way back to Python": "ready()\nctypes.CDLL(None).sleep(60)",
    "code that swallows every exception": """
ready()
while True:
    try: time.sleep(60)
    except BaseException: pass
""",
    "a destructor": """
class Slow:
    def __del__(self): ready(); time.sleep(60)
del [Slow()][0]
""",
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
    "another thread": """
def wait(): ready(); time.sleep(60)
thread = threading.Thread(target=wait); thread.start(); thread.join()
""",
}


def _start(code: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", _READY + code, str(folder)]
    process = subprocess.Popen(command, cwd=_ROOT, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


@pytest.mark.parametrize("number", _SIGNALS)
@pytest.mark.parametrize("work", _WORK)
def test_a_signal_ends_any_work_with_one_line(work, number, tmp_path):
    process = _start(_WORK[work], tmp_path)
    began = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said == f"stopped by {_SIGNALS[number]}\n"
    assert time.monotonic() - began < 10


def test_a_signal_ends_a_script_of_experiments_while_it_imports(tmp_path):
    # The first library that it imports; JAX comes later.
    (tmp_path / "tyro.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    path = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(_ROOT)))}
    command = [sys.executable, _ROOT / "experiments" / "small_pool.py"]
    process = subprocess.Popen(command, env=os.environ | path, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()[1]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said == "stopped by Ctrl-C\n"


def test_every_script_of_experiments_handles_signals_before_it_imports_a_library():
    scripts = [path for path in (_ROOT / "experiments").glob("*.py") if not path.name.startswith("_")]
    assert scripts
    for path in scripts:
        lines = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in lines]
        others = [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names]
        assert others[0] == "_script", path


_HELD = """
interrupts.hold("after this step; it is saved")
ready()
while not interrupts.asked(): time.sleep(0.01)
%s
(folder / "saved").write_text("")
interrupts.release()
(folder / "went on").write_text("")
"""


def test_a_state_is_saved_first(tmp_path):
    process = _start(_HELD % "", tmp_path)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert said == "SIGTERM: stopping after this step; it is saved. Once more stops at once\n"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_the_second_signal_does_not_wait_for_the_state(tmp_path):
    process = _start(_HELD % "print('asked', flush=True); time.sleep(60)", tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[1:] == ["stopped by Ctrl-C"]
    assert list(tmp_path.iterdir()) == []


_HELD_TWICE = """
def save(): %s
interrupts.hold("after this step; it is saved", save)
ready()
%s
interrupts.hold("after this step; it is saved")
(folder / "went on").write_text("")
interrupts.release()
"""
_BUSY = "time.sleep(60)"


def _signals(process: subprocess.Popen, numbers: list[int]) -> str:
    """Send signals, each when the line about the one before it is there; return what was said."""
    said = []
    with process:
        assert process.stderr is not None
        for number in numbers:
            process.send_signal(number)
            said.append(process.stderr.readline())
        said.append(process.stderr.read())  # not `communicate`, which passes over what is buffered
    return "".join(said)


def test_the_second_signal_saves_what_there_was_before_the_step(tmp_path):
    process = _start(_HELD_TWICE % ("time.sleep(0.5); (folder / 'before').write_text('')", _BUSY), tmp_path)
    said = _signals(process, [signal.SIGTERM, signal.SIGINT])
    assert process.returncode == 130
    assert said.splitlines() == [
        "SIGTERM: stopping after this step; it is saved. Once more saves the state before it, and stops",
        "Ctrl-C: saving what there is. Once more stops at once",
        "stopped by Ctrl-C",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


def test_the_third_signal_does_not_wait_for_what_the_second_one_saves(tmp_path):
    process = _start(_HELD_TWICE % ("time.sleep(60)", _BUSY), tmp_path)
    said = _signals(process, [signal.SIGINT] * 3)
    assert process.returncode == 130 and said.splitlines()[2:] == ["stopped by Ctrl-C"]


def test_nothing_changes_while_the_second_signal_saves(tmp_path):
    step = "while not (folder / 'begun').exists(): time.sleep(0.01)"
    save = "(folder / 'begun').write_text(''); time.sleep(1); (folder / 'before').write_text('')"
    process = _start(_HELD_TWICE % (save, step), tmp_path)
    _signals(process, [signal.SIGINT] * 2)
    assert process.returncode == 130 and {path.name for path in tmp_path.iterdir()} == {"begun", "before"}


def test_an_error_of_what_the_second_signal_saves_is_said(tmp_path):
    process = _start(_HELD_TWICE % ("raise OSError('the disk is full')", _BUSY), tmp_path)
    said = _signals(process, [signal.SIGINT] * 2)
    assert process.returncode == 130 and said.splitlines()[2:] == ["error: the disk is full", "stopped by Ctrl-C"]


def test_an_error_while_the_state_is_saved_is_not_hidden(tmp_path):
    code = "with interrupts.released():" + (_HELD % "raise SystemExit('full')").replace("\n", "\n    ")
    process = _start(code, tmp_path)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.splitlines()[1:] == ["full"]


def test_a_folder_that_is_being_written_is_removed(tmp_path):
    code = """
(partial := folder / ".pool.partial").mkdir()
with interrupts.removed(partial):
    (partial / "file").write_text("")
    ready()
    time.sleep(60)
"""
    process = _start(code, tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and list(tmp_path.iterdir()) == []


def test_nothing_is_said_of_a_folder_that_is_removed(tmp_path):
    code = """
(partial := folder / ".pool.partial").mkdir()
for number in range(2000): (partial / str(number)).write_text("")
def write():
    ready()
    while partial.exists(): pass
    while True: print("WARNING: it is gone", file=sys.stderr, flush=True)
threading.Thread(target=write, daemon=True).start()
with interrupts.removed(partial): time.sleep(60)
"""
    process = _start(code, tmp_path)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143 and said == "stopped by SIGTERM\n"


def test_a_command_that_has_ended_ends_as_it_would_have(tmp_path):
    code = """
class Last:
    def __del__(self, ready=ready, sleep=time.sleep): ready(); sleep(0.5)
sys.modules["last"] = Last()  # goes when Python takes down its modules
sys.exit(2)
"""
    process = _start(code, tmp_path)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2 and said == ""
