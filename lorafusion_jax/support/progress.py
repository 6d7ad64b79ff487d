"""A progress bar on stderr, in the first process: live on a terminal, one line a minute in a log."""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from tqdm import tqdm

_MINUTE = 60.0  # seconds
_COMPILATION = "/jax/core/compile/backend_compile_duration"
_compiled = 0.0  # seconds of compilation in this process


def progress(
    what: str, of: int | Sequence, done: int = 0, *, unit: str = "it"
) -> "tqdm":
    """Return a tqdm bar of so many units, or one that yields a sequence's items, that starts at `done`.

    The time left is estimated from the second update on, without the time of compilation. Where stderr is no terminal,
    nothing is written of what takes less than a minute.
    """
    in_log = {
        "mininterval": _MINUTE,
        "maxinterval": _MINUTE,
        "delay": _MINUTE,
        "ascii": True,
    }
    style: dict[str, Any] = {"leave": False} if sys.stderr.isatty() else in_log
    items, total = (None, of) if isinstance(of, int) else (of, len(of))
    return _bar_class()(
        items,
        desc=what,
        total=total,
        initial=done,
        unit=unit,
        disable=jax.process_index() > 0,
        bar_format=None if items is not None else "{desc}: compiling",
        **style,
    )


@functools.cache
def _bar_class() -> Any:
    """Return the class of bars. tqdm is imported late, because that takes 0.1 s."""
    from tqdm import tqdm

    jax.monitoring.register_event_duration_secs_listener(_count_compilation)

    class Bar(tqdm):
        """A bar whose clock starts after the first update, and stops while JAX compiles."""

        compiled_before: float | None = None

        def update(self, n: int | float | None = 1) -> bool | None:
            if self.disable:
                return None
            if self.compiled_before is None:
                self.compiled_before = _compiled
                self.n += n or 0
                self.initial = self.last_print_n = self.n
                present = self._time()  # pyright: ignore[reportAttributeAccessIssue]
                self.start_t = self.last_print_t = present
                self.bar_format = None
                return self.refresh() if not self.delay else None
            self.start_t += _compiled - self.compiled_before
            self.last_print_t += _compiled - self.compiled_before
            self.compiled_before = _compiled
            return super().update(n)

    return Bar


def _count_compilation(event: str, duration_secs: float, **details: str | int) -> None:
    global _compiled
    if event == _COMPILATION:
        _compiled += duration_secs
