"""Draw the diagram of the README: python experiments/diagram.py"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import _script

from lorafusion_jax.files import write_text

_OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "lorafusion.svg"
WIDTH, HEIGHT = 760, 270
INK, ARRAY, LINES, TRAINED = "#24292f", "#e7edf3", "#8c99a8", "#f6b26b"


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_OUT, help="SVG file to write")
    out = parser.parse_args(arguments).out
    write_text(out, diagram())
    print(out)


def diagram() -> str:
    """Return the picture: base and pool in arrays, coefficients and magnitudes next to them."""
    parts = [_text(28, 128, "x", size=20), _text(735, 128, "y", size=20)]
    parts += [_array(180, 22, 320, 44, "base W"), _line(44, 122, 90, 122)]
    parts += [_line(90, 122, 90, 44), _line(90, 44, 180, 44), _line(500, 44, 590, 44), _line(590, 44, 590, 107)]
    for i, n in enumerate(("1", "2", "N")):
        y = 88 + 46 * i + (14 if n == "N" else 0)
        middle = y + 17
        parts += [_line(90, 122, 90, middle), _line(90, middle, 180, middle)]
        parts += [_array(180, y, 90, 34, f"A{_sub(n)}"), _array(410, y, 90, 34, f"B{_sub(n)}")]
        parts += [_line(270, middle, 317, middle), _trained(317, y + 2, 46, 30, f"c{_sub(n)}")]
        parts += [_line(363, middle, 410, middle)]
        parts += [_line(500, middle, 590, middle), _line(590, middle, 590, 137)]
    parts += [_text(225, 188, "⋮"), _text(340, 188, "⋮"), _text(455, 188, "⋮")]
    parts += [
        f'<circle cx="590" cy="122" r="15" fill="white" stroke="{INK}"/>',
        _text(590, 128, "+", size=18),
        _line(605, 122, 638, 122),
        _trained(638, 102, 58, 40, "m"),
        _line(696, 122, 722, 122),
        f'<rect x="96" y="246" width="14" height="12" fill="{ARRAY}" stroke="{LINES}"/>',
        _text(116, 257, "frozen, in ReRAM arrays: no cell is rewritten for a new task", anchor="start", size=13),
        f'<rect x="516" y="246" width="14" height="12" rx="4" fill="{TRAINED}" stroke="{INK}"/>',
        _text(536, 257, "trained digital numbers", anchor="start", size=13),
    ]
    title = "The base and the pool of LoRA modules are frozen in arrays; coefficients c and magnitudes m are trained"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" fill="{INK}" role="img" aria-label="{title}">\n'
        f'<title>{title}</title>\n<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _sub(text: str) -> str:
    return f'<tspan dy="5" font-size="11">{text}</tspan>'


def _text(x: int, y: int, text: str, *, anchor: str = "middle", size: int = 16) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{text}</text>'


def _line(x: int, y: int, to_x: int, to_y: int) -> str:
    return f'<path d="M{x} {y} L{to_x} {to_y}" stroke="{INK}" fill="none"/>'


def _array(x: int, y: int, width: int, height: int, name: str) -> str:
    """Return a matrix as a crossbar: word lines, bit lines, and its name."""
    rows = "".join(f"M{x} {y + at} h{width} " for at in range(8, height, 8))
    columns = "".join(f"M{x + at} {y} v{height} " for at in range(8, width, 8))
    label = 18 if len(name) > 5 and "tspan" not in name else 0
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{ARRAY}" stroke="{LINES}"/>'
        f'<path d="{rows}{columns}" stroke="{LINES}" stroke-width="0.4"/>'
        f'<rect x="{x + width // 2 - 18 - label}" y="{y + height // 2 - 12}" width="{36 + 2 * label}" height="24" '
        f'fill="{ARRAY}"/>' + _text(x + width // 2, y + height // 2 + 6, name)
    )


def _trained(x: int, y: int, width: int, height: int, name: str) -> str:
    box = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{TRAINED}" stroke="{INK}"/>'
    return box + _text(x + width // 2, y + height // 2 + 6, name)


if __name__ == "__main__":
    _script.run(main)
