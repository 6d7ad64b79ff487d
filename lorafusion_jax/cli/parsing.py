"""Parse arguments into the dataclass of a subcommand's options."""

import dataclasses
import inspect
import os
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from ..support.checks import flags_given
from ..support.reading import expand_user
from ..support.text import DATASET_ID, HUB_ID, is_file_name

Options = TypeVar("Options")

# Titles of groups in the help text, and the names of their options, in the order in which they are shown.
GROUPS = {
    "data and base": (
        "base", "run", "runs", "run_seed", "pool", "adapter", "adapters", "adapters_file", "alpha", "weights",
        "weights_file", "shape", "task", "prompt", "input", "target", "source", "chat", "text", "tokens", "file",
        "train_rows", "test_rows", "max_length", "dtype", "load_in",
    ),
    "method": (
        "method", "control", "control_draw", "basis", "modules", "rank", "vera_rank", "targets", "bases", "rate",
        "rate_low_rank", "arms", "folds",
    ),
    "training": ("epochs", "batch_size"),
    "generation": ("max_new_tokens", "stream", "temperature", "top_k", "top_p", "sampling_seed"),
    "hardware": (
        "crossbar", "device", "vary", "loss", "train_chip", "chip", "chips", "chip_key", "keep_digital", "age", "ages",
        "compensate", "norm",
        "restore", "in_advance", "read_noise", "adc_bits", "lora_in", "calibration_rows", "calibration_task",
        "constants", "report",
    ),
    "plan": ("plan", "plan_for", "utilisation", "price", "devices"),
    "run": (
        "seed", "seeds", "out", "format", "name", "json", "plot", "reference", "dry_run", "skip_bad", "resume",
        "overwrite", "eval_batch", "save_seconds", "seed_mode", "mesh", "distributed", "minutes", "engine", "address",
    ),
}  # fmt: skip
# Flags of files or folders, and of those that may also be a model or a data set of the hub.
_SOURCES = {
    "run",
    "runs",
    "reference",
    "pool",
    "from",
    "weights-file",
    "file",
    "text",
}
_HUB_SOURCES = {"base": HUB_ID, "task": DATASET_ID, "calibration-task": DATASET_ID}


def parse(
    options: type[Options],
    arguments: Sequence[str],
    name: str,
    *,
    groups: Mapping[str, Sequence[str]] = GROUPS,
    defaults: Mapping[str, Any] | None = None,
    others: list[str] | None = None,
) -> Options:
    """Return the options that the arguments of a subcommand give; the docstring of their class is the help text.

    Fields of the dataclass may be dataclasses too; all options are spelled without a prefix. The help text shows
    options without a group first. `defaults` replace the dataclass's, by option name. Other arguments are added to
    `others`, or refused.
    """
    import tyro

    shown = _shown(options, groups, defaults or {})
    text = inspect.cleandoc(options.__doc__ or "").partition("\nAttributes:")[0]
    description = "\n\n".join(map(_wrapped, text.strip().split("\n\n")))
    parsed: Any = tyro.cli(
        shown,
        args=list(arguments),
        prog=f"lorafusion {name}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
        return_unknown_args=others is not None,
    )
    if others is not None:
        parsed, unknown = parsed
        others += unknown
    values = dict(vars(parsed))
    for title in groups:
        if (attribute := _attribute(title)) in values:
            values |= vars(values.pop(attribute))
    return _built(options, values)


def _wrapped(paragraph: str) -> str:
    """Return a paragraph in lines of 90 columns; the lines of examples end in a backslash where they are broken."""
    if not paragraph.startswith("Examples:"):
        # tyro joins lines unless they are indented.
        return textwrap.fill(paragraph, 90, subsequent_indent="  ")
    lines = []
    for line in paragraph.splitlines():
        start, *arguments = re.split(r" (?=--)", line)
        lines.append(start)
        for argument in arguments:
            if len(lines[-1]) + len(argument) > 87:
                lines[-1] += " \\"
                lines.append(f"      {argument}")
            else:
                lines[-1] += f" {argument}"
    return "\n".join(lines)


def peek(options: type[Options], arguments: Sequence[str]) -> Options:
    """Return the options of a dataclass from the arguments, ignoring all other options."""
    import tyro

    parsed, _ = tyro.cli(
        options, args=list(arguments), return_unknown_args=True, add_help=False
    )
    return parsed


def given(arguments: Sequence[str]) -> list[str]:
    """Return the names of the options that arguments give, as names of fields."""
    names = [
        argument[2:].partition("=")[0]
        for argument in arguments
        if argument.startswith("--")
    ]
    return [name.replace("-", "_") for name in names]


def check_sources(arguments: Sequence[str]) -> None:
    """Raise a ValueError that names all sources among arguments that neither exist nor can be on the hub.

    This takes no other library. A plan may be of sources that do not exist.
    """
    if {"-h", "--help", "--plan"} & {*arguments}:
        return
    missing = []
    flag = ""
    for argument in arguments:
        source = argument
        if argument.startswith("--"):
            name, _, source = argument[2:].partition("=")
            flag = name.replace("_", "-")
        hub_id = _HUB_SOURCES.get(flag)
        if not source or (hub_id is None and flag not in _SOURCES):
            continue
        on_hub = hub_id is not None and hub_id.fullmatch(source) is not None
        if on_hub and not is_file_name(source):
            continue
        if not os.path.exists(expand_user(source)):
            missing.append(f"--{flag} {source} does not exist")
    if missing:
        raise ValueError(
            f"{'; '.join(missing)}: give existing paths (a model of the hub is owner/name)"
        )


def part_of(command: Any, use: Callable[..., Any], flag: str) -> dict[str, Any]:
    """Return those options of a command that are arguments of a use, which `flag` chooses; ValueError for others."""
    parameters = inspect.signature(use).parameters
    if flags := flags_given(
        command,
        [
            field.name
            for field in dataclasses.fields(command)
            if field.name not in parameters
        ],
    ):
        raise ValueError(
            f"{flags}: not possible together with {flag}: leave one of them out"
        )
    return {name: getattr(command, name) for name in parameters}


def flat_fields(options: type) -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Yield name, type and field of every option of a dataclass, including those of nested dataclasses."""
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        if (inner := _dataclass(hints[field.name])) is not None:
            yield from flat_fields(inner)
        else:
            yield field.name, hints[field.name], field


def _shown(
    options: type, groups: Mapping[str, Sequence[str]], defaults: Mapping[str, Any]
) -> type:
    """Return a dataclass of the options without a group, with one more dataclass for each group."""
    import tyro

    by_name = {}
    for name, type_, field in flat_fields(options):
        default = defaults.get(name, field.default)
        by_name[name] = (
            name,
            type_,
            dataclasses.field(default=default, default_factory=field.default_factory),
        )
    documented = {"__doc__": f"Options.\n\nAttributes:\n{_documented(options)}"}
    fields: list[Any] = [
        by_name[name]
        for name in by_name
        if not any(name in names for names in groups.values())
    ]
    for title, names in groups.items():
        members = [by_name[name] for name in names if name in by_name]
        if not members:
            continue
        group = dataclasses.make_dataclass(
            "Group",
            members,
            kw_only=True,
            namespace=documented,
        )
        fields.append(
            (_attribute(title), Annotated[group, tyro.conf.arg(name=title, help="")])
        )
    return dataclasses.make_dataclass(
        "Options", fields, kw_only=True, namespace=documented
    )


def _documented(options: type) -> str:
    """Return the lines that describe the options, from subclass to parent: the first line about an option counts."""
    hints = typing.get_type_hints(options, include_extras=True)
    nested = filter(None, map(_dataclass, hints.values()))
    classes = [*options.__mro__, *(each for inner in nested for each in inner.__mro__)]
    docs = (
        inspect.cleandoc(vars(each).get("__doc__") or "")
        for each in classes
        if dataclasses.is_dataclass(each)
    )
    return "\n".join(doc.partition("\nAttributes:\n")[2] for doc in docs)


def _built(options: type[Options], values: Mapping[str, Any]) -> Options:
    """Return the dataclass, with its nested dataclasses, from values by option name."""
    hints = typing.get_type_hints(options, include_extras=True)
    inner = {name: _dataclass(hint) for name, hint in hints.items()}
    return options(
        **{
            field.name: values[field.name]
            if (of := inner[field.name]) is None
            else _built(of, values)
            for field in dataclasses.fields(options)  # pyright: ignore[reportArgumentType]
        }
    )


def _dataclass(hint: Any) -> type | None:
    """Return the dataclass that a type hint names, or None for another type."""
    kind = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return kind if dataclasses.is_dataclass(kind) else None  # pyright: ignore[reportReturnType]


def _attribute(title: str) -> str:
    """Return the attribute of a group: no option has such a name, and a method's name may have hyphens."""
    return "group_" + re.sub(r"\W", "_", title)
