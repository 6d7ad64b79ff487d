"""Ctrl-C and SIGTERM end a command with one line on stderr and exit code 130 or 143.

The handler raises `SystemExit` as soon as Python runs again, for example after a compilation. A training calls `hold`
to save its state first. A second signal ends the process at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_continuation = ""  # how to continue after the process has ended
_unit: str | None = None  # after which a state is saved before the process ends
_signal: int | None = None  # that waits until the state is saved
_exit_code: int | None = None  # once a signal ends the process


def watch(continuation: str = "") -> None:
    """End this process on Ctrl-C and SIGTERM from now on, if this is the main thread.

    `continuation` tells how to continue afterwards.
    """
    global _continuation, _exit_code
    _continuation = continuation
    _exit_code = None  # of a command that this process ran before
    if threading.current_thread() is threading.main_thread():
        for number in _NAMES:
            signal.signal(number, _stop)


def hold(unit: str) -> None:
    """Let the next signal wait until `release`, because a state is saved after a unit of work, such as this step."""
    global _unit
    _unit = unit


def asked() -> bool:
    """Return whether a signal waits for `release`."""
    return _signal is not None


def exit_code() -> int | None:
    """Return the exit code if a signal has ended the process. C code turns `SystemExit` into other errors."""
    return _exit_code


def release() -> None:
    """End the process if a signal has waited for this, and let the next one end it at once."""
    global _unit
    _unit = None
    if _signal is not None:
        _end(_signal)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Release what the block holds at its end. After an error the process continues, to report it."""
    global _unit
    try:
        yield
        release()
    finally:
        _unit = None


def _stop(number: int, frame: object) -> None:
    global _signal
    for signal_number in _NAMES:
        signal.signal(signal_number, signal.SIG_DFL)
    if _unit is None:
        _end(number)
    _say(
        f"{_NAMES[signal.Signals(number)]}: saving after {_unit}. Once more stops at once"
    )
    _signal = number


def _end(number: int) -> None:
    global _exit_code
    _exit_code = 128 + number
    name = _NAMES[signal.Signals(number)]
    _say(f"stopped by {name}{_continuation and f': {_continuation}'}")
    raise SystemExit(_exit_code)


def _say(line: str) -> None:
    # Not with sys.stderr, which the main thread may hold. On a terminal a progress bar may be on the line.
    with contextlib.suppress(OSError):
        os.write(2, f"{chr(10) if os.isatty(2) else ''}{line}\n".encode())
