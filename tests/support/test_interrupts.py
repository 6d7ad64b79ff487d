"""A command that is stopped prints one line, ends with the signal's exit code, and leaves nothing half done."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_READY = """
import sys, time
from pathlib import Path
from lorafusion_jax import cli
from lorafusion_jax.support.writing import new_folder
from lorafusion_jax.support import interrupts
interrupts.watch()
folder = Path(sys.argv[1])
def ready():
    print("ready", flush=True)
"""


def _start(code, folder):
    command = [sys.executable, "-c", _READY + code, str(folder)]
    return _ready(subprocess.Popen(command, cwd=_ROOT, stdout=-1, stderr=-1, text=True))


def _ready(process):
    assert process.stdout is not None and process.stdout.readline() == "ready\n", (
        process.communicate()[1]
    )
    return process


def _signals(process, *numbers):
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


_COMMAND = """
from lorafusion_jax.cli import convert, fuse, trial
def command(arguments):
    ready()
    time.sleep(60)
convert.convert_command = fuse.fuse_command = trial.trial_command = command
cli.main(["{command}"])
"""
# What the import of a C extension makes of a SystemExit.
_IMPORT = """
def command(arguments):
    try:
        ready()
        time.sleep(60)
    except SystemExit as stopped:
        raise ImportError("Encountered an error while initializing the extension.") from stopped
cli.run(command, [])
"""
_RESUMED = "stopped by Ctrl-C: the same command with --resume continues\n"
_REPEATED = "stopped by SIGTERM: the same command continues\n"


@pytest.mark.parametrize(
    ("code", "number", "line"),
    [
        ("ready()\nwhile True: pass", signal.SIGINT, "stopped by Ctrl-C\n"),
        (_IMPORT, signal.SIGINT, "stopped by Ctrl-C\n"),
        (_COMMAND.format(command="convert"), signal.SIGTERM, "stopped by SIGTERM\n"),
        (_COMMAND.format(command="fuse"), signal.SIGINT, _RESUMED),
        (_COMMAND.format(command="trial"), signal.SIGTERM, _REPEATED),
    ],
    ids=["a loop", "an import", "convert", "fuse", "trial"],
)
def test_a_signal_ends_work_with_one_line_that_tells_how_to_continue(
    code, number, line, tmp_path
):
    process = _start(code, tmp_path)
    assert _signals(process, number) == line
    assert process.returncode == 128 + number


def test_an_error_of_a_command_after_a_stopped_one_is_reported(tmp_path):
    code = """
def command(arguments):
    ready()
    time.sleep(60)
def failing(arguments):
    raise ValueError("give a folder")
try:
    cli.run(command, [])
except SystemExit:
    cli.run(failing, [])
"""
    process = _start(code, tmp_path)
    printed = _signals(process, signal.SIGINT)
    assert printed == "stopped by Ctrl-C\nerror: give a folder\n"
    assert process.returncode == 2


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


_HELD = """
interrupts.hold("this step")
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
            [
                "SIGTERM: saving after this step. Once more stops at once",
                "stopped by SIGTERM",
            ],
            {"saved"},
            id="the state is saved first",
        ),
        pytest.param(
            _HELD % _STEP,
            [2, 2],
            -2,
            [...],
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


def test_a_folder_that_is_being_written_is_removed(tmp_path):
    code = """
with new_folder(folder / "pool") as partial:
    (partial / "file").write_text("")
    ready()
    time.sleep(60)
"""
    process = _start(code, tmp_path)
    assert _signals(process, signal.SIGTERM) == "stopped by SIGTERM\n"
    assert process.returncode == 143 and list(tmp_path.iterdir()) == []
