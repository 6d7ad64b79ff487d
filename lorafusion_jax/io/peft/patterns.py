"""Regular expressions from files, matched in bounded time.

Python's `re` backtracks: it tries one way after another, and a short pattern can make it try 2 ** 60. Here all ways
are followed at once. A set of positions in the text, held as the bits of an integer, goes through the pattern that
`re` itself has parsed. The matches are the same. Back-references and possessive repeats are refused because sets of
positions cannot follow them; flags are refused too.
"""

import functools
import importlib
import re
import warnings
from typing import Any

# The private parser of `re`, the same in Python 3.11 to 3.14. A parser of our own could disagree with it.
_parser: Any = importlib.import_module("re._parser")

_MAX_LENGTH = 10_000
_MAX_DEPTH = 30
# The limit for all patterns and texts of one file, about 4 seconds. An adapter that has a separate key for each of 432
# matrices in both patterns takes 4.3 million steps.
_MAX_STEPS = 10_000_000
_CATEGORIES = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda character: character.isalnum() or character == "_",
}

_ONE_CHARACTER = ("ANY", "NOT_LITERAL", "IN")

# The parts of a pattern, in order: (kind, its arguments ...).
_Nodes = list[tuple[Any, ...]]


class PatternError(ValueError):
    """A pattern that is not valid, or that cannot be matched in bounded time."""


class Steps:
    """Number of steps that matching the patterns of one file may still take."""

    def __init__(self) -> None:
        self.left = _MAX_STEPS

    def take(self, count: int = 1) -> None:
        self.left -= count
        if self.left < 0:
            raise PatternError(f"the patterns take more than {_MAX_STEPS:,} steps to match: use simpler or fewer ones")


class Pattern:
    """A regular expression that has been parsed and checked.

    Raises:
        PatternError: The text is not a pattern, is too long, or has parts that are not supported here.
    """

    def __init__(self, text: str):
        if len(text) > _MAX_LENGTH:
            raise PatternError(f"it has {len(text):,} characters: wanted at most {_MAX_LENGTH:,}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about syntax that a future `re` may read in another way
                tree = _parser.parse(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(str(error)) from None
        if tree.state.flags != re.UNICODE.value:
            raise PatternError("it sets flags: write the pattern without them")
        self._nodes = _translate(tree, 0)

    def match(self, text: "Text") -> bool:
        """Return whether a start of the text matches, as `re.match` does."""
        return bool(text.ends(self._nodes, 1))

    def fullmatch(self, text: "Text") -> bool:
        """Return whether the whole text matches, as `re.fullmatch` does."""
        return bool(text.ends(self._nodes, 1) >> text.length)


class _Class:
    """Items of a character class, hashed by identity because there may be thousands."""

    def __init__(self, items: list[tuple[str, Any]]):
        self.items = items


def _translate(tree: Any, depth: int) -> _Nodes:
    if depth > _MAX_DEPTH:
        raise PatternError(f"it nests deeper than {_MAX_DEPTH} levels")
    nodes: _Nodes = []
    for opcode, argument in tree:
        kind = str(opcode)
        if kind == "LITERAL":
            literal = nodes.pop()[1] if nodes and nodes[-1][0] == "LITERAL" else ""
            nodes.append((kind, literal + chr(argument)))
        elif kind in ("ANY", "NOT_LITERAL"):
            nodes.append((kind, argument))
        elif kind == "IN":
            nodes.append((kind, _Class([(str(item), value) for item, value in argument])))
        elif kind == "AT":
            nodes.append((kind, str(argument)))
        elif kind == "BRANCH":
            nodes.append((kind, [_translate(part, depth + 1) for part in argument[1]]))
        elif kind == "SUBPATTERN" and not (argument[1] or argument[2]):
            nodes.append(("BRANCH", [_translate(argument[3], depth + 1)]))
        elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, part = argument
            nodes.append(("REPEAT", least, most, _translate(part, depth + 1)))
        elif kind in ("ASSERT", "ASSERT_NOT"):
            direction, part = argument
            back = part.getwidth()[0] if direction < 0 else None
            nodes.append((kind, back, _translate(part, depth + 1)))
        elif kind == "FAILURE":
            nodes.append(("BRANCH", []))
        else:
            raise PatternError(f"it has a {kind.lower().replace('_', ' ')}, which is not supported here")
    return nodes


class Text:
    """A text to match patterns with. Bit p of a set of positions stands for the position before character p."""

    def __init__(self, text: str, steps: Steps):
        steps.take(len(text))
        self.length = len(text)
        self._text, self._steps = text, steps
        self._found: dict[tuple[Any, ...], int] = {}

    @functools.cached_property
    def _characters(self) -> dict[str, int]:
        """The positions of every character."""
        places: dict[str, int] = {}
        for place, character in enumerate(self._text):
            places[character] = places.get(character, 0) | 1 << place
        return places

    def ends(self, nodes: _Nodes, starts: int) -> int:
        """Return the positions where a match that begins at one of `starts` may end."""
        self._steps.take()
        for node in nodes:
            if not starts:
                return 0
            self._steps.take()
            starts = self._follow(node, starts)
        return starts

    def _follow(self, node: tuple[Any, ...], starts: int) -> int:
        kind = node[0]
        if kind == "LITERAL":
            return (starts & self._places(node)) << len(node[1])
        if kind in _ONE_CHARACTER:
            return (starts & self._places(node)) << 1
        if kind == "AT":
            return starts & self._places(node)
        if kind == "BRANCH":
            found = 0
            for part in node[1]:
                found |= self.ends(part, starts)
            return found
        if kind == "REPEAT":
            _, least, most, part = node
            return self._repeat(least, most, part, starts)
        _, back, part = node
        return self._look(back, part, starts, wanted=kind == "ASSERT")

    def _repeat(self, least: int, most: int, part: _Nodes, starts: int) -> int:
        # After as many repeats as there are positions, another repeat changes nothing.
        turns = self.length + 1
        for _ in range(min(least, turns)):
            starts = self.ends(part, starts)
        if most - least >= self.length and len(part) == 1 and part[0][0] in _ONE_CHARACTER:
            # Adding carries a position through a run of such characters: MatchStar of Cameron et al. (PACT 2014).
            places = self._places(part[0])
            return (((starts & places) + places) ^ places) | starts
        found = new = starts
        for _ in range(min(most - least, turns)):
            new = self.ends(part, new) & ~found
            if not new:
                break
            found |= new
        return found

    def _look(self, back: int | None, part: _Nodes, starts: int, *, wanted: bool) -> int:
        """Keep the positions where an assertion holds about what follows, or about the `back` characters before."""
        kept = 0
        while starts:
            here = starts & -starts
            starts ^= here
            # Near the beginning of the text the shift leaves no bit of `here`.
            found = self.ends(part, here) if back is None else self.ends(part, here >> back) & here
            if bool(found) == wanted:
                kept |= here
        return kept

    def _places(self, node: tuple[Any, ...]) -> int:
        """Return the positions where a literal, an item that takes one character, or an anchor matches."""
        if node not in self._found:
            self._found[node] = self._find(*node)
        return self._found[node]

    def _find(self, kind: str, argument: Any) -> int:
        if kind == "LITERAL":
            return self._occurrences(argument)
        if kind == "AT":
            return self._anchor(argument)
        if kind == "IN":
            self._steps.take(len(argument.items) * len(self._characters))
        # Each position has only one character.
        return sum(places for character, places in self._characters.items() if _takes(kind, argument, character))

    def _occurrences(self, literal: str) -> int:
        found, place = 0, self._text.find(literal)
        while place >= 0:
            found |= 1 << place
            place = self._text.find(literal, place + 1)
        return found

    def _anchor(self, name: str) -> int:
        last = 1 << self.length
        if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return 1
        if name == "AT_END_STRING":
            return last
        if name == "AT_END":
            return last | (last >> 1 if self._text.endswith("\n") else 0)
        words = sum(at for character, at in self._characters.items() if _CATEGORIES["WORD"](character))
        # A boundary has a word character on exactly one side. In an empty text `re` matches neither \b nor \B.
        boundary = words ^ (words << 1)
        if name == "AT_BOUNDARY":
            return boundary
        return ~boundary if self._text else 0


def _takes(kind: str, argument: Any, character: str) -> bool:
    if kind == "NOT_LITERAL":
        return ord(character) != argument
    if kind == "ANY":
        return character != "\n"
    negated = argument.items[0][0] == "NEGATE"
    return negated != any(_holds(item, value, character) for item, value in argument.items[negated:])


def _holds(kind: str, value: Any, character: str) -> bool:
    if kind == "LITERAL":
        return ord(character) == value
    if kind == "RANGE":
        return value[0] <= ord(character) <= value[1]
    name = str(value).removeprefix("CATEGORY_")
    return _CATEGORIES[name.removeprefix("NOT_")](character) != name.startswith("NOT_")
