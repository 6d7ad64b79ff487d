"""YAML and JSON files of settings as plain tables, within bounds on their size and depth."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from ...support.reading import check_once, check_regular, parse_json

_LARGEST = 1 << 20  # bytes
_MOST_VALUES = 100_000
_DEEPEST = 20
_LONGEST_INTEGER = (
    100  # characters: reading one takes time that grows by the square of its length
)


def kind_of(path: Path, purpose: str) -> str:
    """Return `yaml` or `json` by a file's suffix; raises ValueError for another one."""
    kinds = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}
    if path.suffix not in kinds:
        raise ValueError(f"{path}: {purpose} a file ending in {', '.join(kinds)}")
    return kinds[path.suffix]


def read_table(path: Path, kind: str) -> Any:
    """Return the content of a YAML or JSON file.

    Raises a ValueError for one that is larger than 1 MiB, not of its kind, gives a key twice, or holds an integer of
    over 64 bits, 100,000 values or lists 20 deep; aliases of YAML count as often as they occur.
    """
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(
            f"{path} has {size:,} bytes: give a file of at most {_LARGEST:,}"
        )
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8")
        if kind == "json":
            table = parse_json(text, parse_int=_integer)
            _check(table, _values)
            return table
        loader = _Loader(text)
        node = loader.get_single_node()  # before aliases are followed
        if node is None:
            return None
        _check(node, _nodes)
        return loader.construct_document(node)
    except (
        Exception
    ) as error:  # YAML tags that do not fit their values raise errors of many kinds
        raise ValueError(f"{path} cannot be read as {kind.upper()}: {error}") from error


def _check(root: Any, inside: Callable[[Any], Iterable[Any]]) -> None:
    """Raise a ValueError for too many values, or too deep ones."""
    waiting = [(root, 0)]
    values = 0
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if depth > _DEEPEST or values > _MOST_VALUES:
            raise ValueError(
                f"it holds over {_MOST_VALUES:,} values, or tables over {_DEEPEST} deep: shorten it"
            )
        waiting += [(item, depth + 1) for item in inside(value)]


def _values(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _nodes(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        check_once(
            [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        )
        return [child for _, child in node.value]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _integer(text: str, parse: Callable[[str], int] = int) -> int:
    """Return an integer of at most 64 bits, by `parse` or as JSON has it."""
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(
            f"an integer has {len(text):,} characters: expected at most {_LONGEST_INTEGER}"
        )
    number = parse(text)
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{number} is an integer of over 64 bits: give a smaller one")
    return number


# The parser in C reads a file of 1 MiB in 1 s, the one in Python in 10 s.
_Parser: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):
    """Loads integers of 64 bits at most."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return _integer(
            node.value, lambda _: super(_Loader, self).construct_yaml_int(node)
        )


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
