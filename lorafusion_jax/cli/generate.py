"""`lorafusion generate`: print the answers of a fused run, or of a base model, to new text."""

from collections.abc import Sequence

from ..runs.apply import GenerateOptions, generate_lines, stream_lines
from .parsing import parse

GROUPS = {
    "data and base": ("run", "base", "chat", "file", "seed"),
    "generation": (
        "max_new_tokens", "stream", "temperature", "top_k", "top_p", "sampling_seed", "eval_batch",
    ),
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Print an answer for each line of text."""
    options = parse(GenerateOptions, arguments, "generate", groups=GROUPS)
    if options.stream:
        for answer in stream_lines(options):
            for piece in answer:
                print(piece, end="", flush=True)
            print()
        return
    for line in generate_lines(options):
        print(line)
