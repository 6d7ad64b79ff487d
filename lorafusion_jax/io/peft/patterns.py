"""Regular expressions from files: the matches of `re`, in bounded time.

`re` backtracks without a limit: a short pattern can make it try 2 ** 60 ways. The package `regex` stops after a timeout
and has the same matches in texts that are not empty. Syntax that the two read differently is refused: approximate
matches (`{e<=1}`), operations on sets, flags, and characters beyond ASCII, for which their tables differ. Large repeat
counts, which `regex` expands, are refused too.
"""

import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import regex

_MAX_LENGTH = 10_000
# Items of a pattern with its least repeats written out, as `regex` compiles them, in 260 bytes each.
_MAX_SIZE = 50_000
_MAX_DEPTH = 30
# CPU seconds for all patterns and texts of a file. A key for each of 432 matrices in both patterns takes half a second.
_SECONDS = 4.0
# An escaped character, a set, a repeat with its least number, or another character.
_ITEM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]|\{(\d*),?\d*\}|.", re.DOTALL)
_FLAGS = re.compile(r"\(\?[aiLmsux#-]")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_SET_OPERATION = re.compile(r"\[|--|&&|~~|\|\|")


class PatternError(ValueError):
    """A pattern that is not valid, or that cannot be matched in bounded time."""


class Clock:
    """CPU time left for matching the patterns of one file."""

    def __init__(self) -> None:
        self.left = _SECONDS

    def matches(self, match: Callable[..., Any], text: str) -> bool:
        """Return whether a text matches; `match` is a pattern's method `match` or `fullmatch`."""
        if not text.isascii():
            raise PatternError(f"{text!a} has characters beyond ASCII, which patterns are not matched with")
        began = time.process_time()
        try:
            return match(text, timeout=max(self.left, 1e-3)) is not None
        except TimeoutError:
            raise PatternError(f"the patterns take more than {_SECONDS:g} s to match: use simpler ones") from None
        finally:
            self.left -= time.process_time() - began


def compiled(text: str) -> regex.Pattern:
    """Return a regular expression; raises PatternError as `check` does."""
    check(text)
    try:
        return regex.compile(text)
    except regex.error as error:
        raise PatternError(str(error)) from None


def check(text: str) -> None:
    """Raise PatternError unless a text is a short regular expression that `re` and `regex` read alike."""
    if len(text) > _MAX_LENGTH:
        raise PatternError(f"it has {len(text):,} characters: expected at most {_MAX_LENGTH:,}")
    if not text.isascii():
        raise PatternError("it has characters beyond ASCII")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets that a future `re` may read in another way: refused below
            re.compile(text)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise PatternError(str(error)) from None
    sizes, last = [0], 0  # the items of every open group, and those that a repeat would repeat
    for item in _ITEM.finditer(text):
        part = item[0]
        if part == "(":
            if _FLAGS.match(text, item.start()):
                raise PatternError("it sets flags or has a comment: write the pattern without them")
            sizes.append(1)
            if len(sizes) > _MAX_DEPTH:
                raise PatternError(f"it nests deeper than {_MAX_DEPTH} levels")
            continue
        if part[0] == "[" and _SET_OPERATION.search(_ESCAPED.sub("", part[1:])):
            raise PatternError("it has [, --, &&, ~~ or || in a set: escape these characters")
        if part in ("{", "{}"):
            raise PatternError("it has a { that begins no repeat: write \\{ for the character")
        if part == ")":
            last = sizes.pop()
        elif item[1] is not None:
            last *= max(int(item[1] or 0) - 1, 0)
        else:
            last = int(part not in "*+?")
        sizes[-1] += last
        if sizes[-1] > _MAX_SIZE:
            raise PatternError(f"its repeats come to more than {_MAX_SIZE:,} items: use smaller numbers")
