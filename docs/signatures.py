"""Signatures as Sphinx can parse them: of one that it cannot, it shows the text with a tilde before every name."""

import ast
import re


def shorten(signature: str) -> str:
    """Return a signature that Sphinx can parse: `<function f>` becomes `f`, and `Annotated[X, ...]` becomes `X`."""
    text = signature.replace("jaxlib._jax.", "")  # jaxtyping writes modules out
    text = re.sub(
        r"<(?:function|class) '?(?:[\w<>]+\.)*([\w<>]+)'?(?: at \w+)?>", r"\1", text
    )
    text = re.sub(r"<lambda>|<factory>|<object object at \w+>", "...", text)
    while match := re.search(r"~?[\w.]*Annotated\[", text):
        inner, end = _bracket(text, match.end())
        text = text[: match.start()] + inner + text[end:]
    if text.startswith("("):
        ast.parse(f"def f{text}: ...")
    return text


def _bracket(text: str, start: int) -> tuple[str, int]:
    """Return the first of the elements in a bracket that is open, and the place behind the bracket."""
    depth = 0
    first = None
    for place in range(start, len(text)):
        if text[place] in "])" and not depth:
            return text[start : first or place], place + 1
        if text[place] == "," and not depth:
            first = first or place
        depth += (text[place] in "[(") - (text[place] in "])")
    raise ValueError(f"a bracket is not closed: {text}")
