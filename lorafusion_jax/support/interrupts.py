"""Ctrl-C and SIGTERM end a command with one line on stderr and exit code 130 or 143.

An exception from a signal's handler would appear anywhere in the main thread: after a compilation of a minute, inside
an import, in a destructor that swallows it, or in C++ code that aborts. So another thread waits for signals and ends
the process without unwinding, after it removed unfinished folders. A training loop calls `hold` to save its state
first. A second signal ends the process at once.
"""

import atexit
import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_unfinished: set[Path] = set()
_watching = False
_held: str | None = (
    None  # advice for the user while a state must be saved before the end
)
_asked: int | None = None  # the signal that arrived meanwhile


def watch() -> None:
    """End this process on Ctrl-C and SIGTERM from now on. Only the main thread of a command calls this."""
    global _watching
    if _watching or threading.current_thread() is not threading.main_thread():
        return
    _watching = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(
        writer, warn_on_full_buffer=False
    )  # Python's C handler writes signals there at once
    threading.Thread(target=_act, args=(reader,), daemon=True).start()
    for number in _NAMES:
        signal.signal(number, _freeze)
        # Runs last, when everything is done; Python would restore the old handler then.
        atexit.register(signal.signal, number, signal.SIG_IGN)


def hold(advice: str) -> None:
    """Let the next signal wait until `release`, because a state is not saved yet.

    `advice` is when the process stops then, and how to continue from the saved state.
    """
    global _held
    _held = advice


def asked() -> bool:
    """Return whether a signal waits for `release`."""
    return _asked is not None


def release() -> None:
    """End the process if a signal has waited for this, and let the next one end it at once."""
    global _held
    _held = None
    if _asked is not None:
        _end(_asked)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Release what the block holds at its end. After an error the process continues, to report it."""
    global _held
    try:
        yield
        release()
    finally:
        _held = None


@contextlib.contextmanager
def removed(folder: Path) -> Iterator[None]:
    """Remove an unfinished folder if a signal ends the process in this block."""
    _unfinished.add(folder)
    try:
        yield
    finally:
        _unfinished.discard(folder)


def _act(reader: int) -> None:
    """Wait for signals, in another thread."""
    global _asked
    while True:
        (number,) = os.read(reader, 1)
        if number not in _NAMES:
            continue
        name = _NAMES[signal.Signals(number)]
        if (advice := _held) is None or _asked is not None:
            _say(f"stopped by {name}")
            _end(number)
        _say(f"{name}: stopping {advice}. Once more stops at once")
        _asked = number
        if _held is None:  # released meanwhile
            _end(number)


def _freeze(number: int, frame: object) -> None:
    """Stop the main thread while the other one ends the process."""
    while _held is None:
        threading.Event().wait()


def _say(line: str) -> None:
    # Not with sys.stderr, which the main thread may hold. On a terminal a progress bar may be on the line.
    with contextlib.suppress(OSError):
        os.write(2, f"{chr(10) if os.isatty(2) else ''}{line}\n".encode())


def _end(number: int) -> NoReturn:
    # Without an import: the main thread may have stopped inside one and hold its lock.
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 2
    )  # hide complaints of other threads about the removed folders
    for folder in list(_unfinished):
        # Renamed first: this fails if the main thread has just renamed the finished folder.
        aside = folder.with_name(f".{folder.name}.removed.partial")
        with contextlib.suppress(OSError):
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    os._exit(128 + number)
