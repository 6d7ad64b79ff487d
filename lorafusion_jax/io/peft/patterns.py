"""Regular expressions from files: the matches of `re`, in bounded time.

`re` backtracks without a limit: a short pattern can make it try 2 ** 60 ways. The package `regex` stops after a timeout
and has the same matches in texts that are not empty. Syntax that the two read differently is refused: approximate
matches (`{e<=1}`), operations on sets, flags, and characters beyond ASCII, for which their tables differ.
"""

import math
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import regex

_MAX_LENGTH = 10_000
_MAX_REPEATS = 10_000  # product of the least numbers of all repeats, which `regex` writes out
# CPU seconds for all patterns and texts of a file. A key for each of 432 matrices in both patterns takes half a second.
_SECONDS = 4.0
_REPEAT = re.compile(r"\{(\d+)")
# A flag or a comment, a brace that begins no repeat, an operation on sets.
_UNLIKE = re.compile(r"\(\?[aiLmsux#-]|\{(?!\d+,?\d*\}|,\d+\})|\[\^?\[|--|&&|~~|\|\|")


class PatternError(ValueError):
    """A pattern that is not valid, or that cannot be matched in bounded time."""


class Clock:
    """CPU time left for matching the patterns of one file."""

    def __init__(self) -> None:
        self.left = _SECONDS

    def matches(self, match: Callable[..., Any], text: str) -> bool:
        """Return whether a text matches; `match` is a pattern's method `match` or `fullmatch`."""
        if not text.isascii():
            raise PatternError(f"{text!a} has characters beyond ASCII: expected ASCII names")
        began = time.process_time()
        try:
            return match(text, timeout=max(self.left, 1e-3)) is not None
        except TimeoutError:
            raise PatternError(f"the patterns take more than {_SECONDS:g} s to match: use simpler ones") from None
        finally:
            self.left -= time.process_time() - began


def compiled(text: str) -> regex.Pattern:
    """Return a regular expression; raises PatternError unless it is short and `re` and `regex` read it alike."""
    if len(text) > _MAX_LENGTH or not text.isascii():
        raise PatternError(f"expected at most {_MAX_LENGTH:,} ASCII characters, got {len(text):,}")
    if unlike := _UNLIKE.search(text):
        raise PatternError(f"it has {unlike[0]}: write it without flags, comments, sets in sets and braces")
    try:
        if math.prod(max(int(number), 1) for number in _REPEAT.findall(text)) > _MAX_REPEATS:
            raise PatternError(f"its repeats come to more than {_MAX_REPEATS:,} items: use smaller numbers")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets that a future `re` may read in another way
            re.compile(text)
        return regex.compile(text)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise PatternError(f"{error}; correct it") from None
