"""Costs as text: Markdown tables of ranges, low / typical / high."""

import math
from collections.abc import Mapping, Sequence

from ...crossbar import Constants, Range, WriteCost
from ...support import text_tables
from .bill import Bill, Once
from .comparison import Comparison
from .options import CostOptions

_PREFIXES = {
    -15: "f",
    -12: "p",
    -9: "n",
    -6: "µ",
    -3: "m",
    0: "",
    3: "k",
    6: "M",
    9: "G",
}


def quantity(value: Range, unit: str) -> str:
    """Return a range with the unit prefix of its typical value: `1.2 / 3.4 / 12 mJ`; a single number if exact."""
    exponent = 3 * math.floor(math.log10(value.typical) / 3) if value.typical else 0
    exponent = min(max(exponent, min(_PREFIXES)), max(_PREFIXES))
    return f"{number(value / 10.0**exponent)} {_PREFIXES[exponent]}{unit}"


def number(value: Range) -> str:
    """Return a range of pure numbers."""
    ends = [_digits(end) for end in (value.low, value.typical, value.high)]
    return ends[0] if len(set(ends)) == 1 else " / ".join(ends)


def tables(
    bills: Mapping[str, Bill], once: Mapping[str, Once], options: CostOptions
) -> dict[str, list[list[str]]]:
    """Return the tables of costs by caption: headings, then lines."""
    of_methods = bills.values()
    tokens = f"{options.tokens_per_task:,} tokens"
    return {
        "Written for one new task": [
            [
                "method",
                "trained",
                "cells",
                "pulses",
                "energy",
                "time",
                "cycles of a cell",
                "tasks until wear-out",
            ],
            *([b.method, f"{b.trainable:,}", *_written(b.written)] for b in of_methods),
        ],
        f"Energy of one new task: learning it, and {tokens} with their sources": [
            [
                "method",
                "putting it in place",
                "its update",
                "the base's passes",
                "learned",
                tokens,
            ],
            *(
                [
                    b.method,
                    *(
                        quantity(e, "J")
                        for e in (b.install, b.update, b.base, b.learning, b.inference)
                    ),
                ]
                for b in of_methods
            ),
        ],
        "Energy of one generated token, by component, without its source": [
            ["method", "array", "DAC", "ADC", "shift-and-add", "digital", "all"],
            *(
                [
                    b.method,
                    *(quantity(e, "J") for e in (*b.generated, b.generated.total)),
                ]
                for b in of_methods
            ),
        ],
        "Other costs of inference": [
            [
                "method",
                "one source token",
                "latency, arrays",
                "latency, digital",
                "adapters' arrays",
            ],
            *(
                [
                    *(b.method, quantity(b.source.total, "J")),
                    *(
                        quantity(time, "s")
                        for time in (b.latency_arrays, b.latency_digital)
                    ),
                    f"{b.adapter_arrays:,}",
                ]
                for b in of_methods
            ),
        ],
        "Written once, before any task": [
            [
                "what",
                "arrays",
                "cells",
                "pulses",
                "energy",
                "time",
                "words of tables",
                "their energy",
            ],
            *(
                [
                    name,
                    f"{o.arrays:,}",
                    *_written(o.written)[:4],
                    f"{o.words:,}",
                    quantity(o.tables, "J"),
                ]
                for name, o in once.items()
            ),
        ],
    }


def comparison_table(compared: Mapping[str, Comparison]) -> list[list[str]]:
    """Return the lines of the comparison of LoRA in cells with LoRAFusion."""
    ratios = [
        "putting it in place",
        "with its update",
        "learned",
        "learned, over all constants",
    ]
    return [
        [
            "LoRA's energy over that of",
            *ratios,
            "more for a generated token",
            "break-even, tokens",
        ],
        *(
            [
                name,
                *map(number, c[:4]),
                quantity(c.extra_per_token, "J"),
                number(c.break_even),
            ]
            for name, c in compared.items()
        ),
    ]


def constants_table(constants: Constants) -> list[list[str]]:
    """Return the constants with their sources: headings, then lines."""
    return [
        ["constant", "low / typical / high", "unit", "what", "source"],
        *(
            [name, number(Range(c.low, c.typical, c.high)), c.unit, c.meaning, c.source]
            for name, c in constants.table.items()
        ),
    ]


def markdown(by_caption: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """Return tables with their captions; ranges are low / typical / high."""
    return "\n".join(
        f"{caption}\n\n{text_tables.markdown(lines)}"
        for caption, lines in by_caption.items()
    )


def _written(p: WriteCost) -> list[str]:
    if p.until_worn is None:
        return ["0", *[text_tables.EMPTY] * 5]
    energies = [number(p.pulses), quantity(p.energy, "J"), quantity(p.time, "s")]
    return [f"{p.cells:,}", *energies, number(p.cycles), number(p.until_worn)]


def _digits(value: float) -> str:
    """Return a number with three digits, without an exponent if it is easy to read without; `never` if infinite."""
    if math.isinf(value):
        return "never"
    if value == 0 or 1e-3 <= value < 1e6:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:.2g}"
