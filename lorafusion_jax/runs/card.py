"""The model card of an exported run: modules, data, accuracy, and code to load it.

Axis letters: L layer, N modules.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ..io.source import is_hub_id, split_revision
from ..models.architecture import Architecture
from ..report import summary
from ..support.text import printable
from ..support.text_tables import escaped, markdown
from ..support.version import __version__
from ..support.writing import write_text
from .folder import RunFolder
from .options import FuseOptions


def write_card(
    out: Path,
    run: RunFolder,
    options: FuseOptions,
    seed: int,
    config: Architecture,
    *,
    format: str,
    coefficients: Mapping[str, Float[np.ndarray, "_L N _k"]] | None,
) -> None:
    """Write README.md into an exported folder.

    The format is one of `export.Format`. The coefficients, by site, are None if the run fused no modules.
    """
    recorded = run.config()
    results = run.results()
    merged = format not in ("adapter", "gguf")
    gguf = format.startswith("gguf")
    modules = recorded["modules"][options.seeds.index(seed)]
    task = f"{_code(_shown(options.task))} (SHA-256 {_text(recorded['task_sha256'])})"
    tested = (
        "" if results is None else f", and {results['test_rows']:,} rows were tested"
    )
    if options.control == "none":
        control = ""
    else:
        control = f", the control `{options.control}` instead of the pool itself,"
    product = "A LoRA adapter" if gguf else "A PEFT adapter"
    if merged:
        product = "A model"
    parts = [
        _front_matter(options, merged=merged, gguf=gguf),
        f"# {_text(Path(_shown(options.task)).stem)}, by {options.method}\n",
        f"{product}, made of {_code(_shown(options.base))} by lorafusion-jax {__version__} with the method "
        f"`{options.method}`{control} and the seed {seed}.\n",
        _how_to_load(options, config, merged=merged, gguf=gguf),
        f"## Data\n\nThe task {task}: at most {options.train_rows:,} rows were used for training{tested}.\n",
    ]
    if results is not None and results["test_rows"] > 0:
        parts.append(_accuracy(run, results, seed))
    if coefficients:
        table = _by_module(coefficients, modules)
        parts.append(
            f"## The pool\n\nThe adapters that were fused, with their coefficients.\n\n{table}"
        )
    write_text(out / "README.md", "\n".join(parts))


def _front_matter(options: FuseOptions, *, merged: bool, gguf: bool) -> str:
    lines = ["tags:", "- lorafusion", *([] if merged else ["- lora"])]
    library = "transformers" if merged else "peft"
    lines.append(f"library_name: {'gguf' if gguf else library}")
    if is_hub_id(options.base):  # the hub refuses anything else
        lines.append(f"base_model: {split_revision(options.base)[0]}")
    return "\n".join(["---", *lines, "---", ""])


def _shown(source: str) -> str:
    """Return a hub id unchanged, and the last name of a path, because folders are private."""
    return source if is_hub_id(source) else Path(source).name


def _text(name: str) -> str:
    """Return a name as text in Markdown; control characters are spelled out."""
    return escaped(printable(name))


def _code(name: str) -> str:
    """Return a name as code in Markdown, or as text if it would end the code."""
    return _text(name) if "`" in name or "\n" in name else f"`{printable(name)}`"


def _how_to_load(
    options: FuseOptions, config: Architecture, *, merged: bool, gguf: bool
) -> str:
    kind = "AutoModelForCausalLM" if config.causal else "AutoModelForSeq2SeqLM"
    # A string of JSON is also one of Python, whatever the name contains.
    name, revision = split_revision(options.base)
    base = json.dumps(printable(_shown(name)), ensure_ascii=False)
    if revision is not None:
        base += f", revision={json.dumps(printable(revision), ensure_ascii=False)}"
    language = "python"
    if gguf:
        language = "bash"
        code = "llama-cli --model " + (
            "model.gguf" if merged else "BASE.gguf --lora adapter.gguf"
        )
    elif merged:
        code = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("THIS_FOLDER")'
    else:
        code = (
            f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
            f"base = {kind}.from_pretrained({base})\n"
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")'
        )
    prompt = ""
    if options.chat:
        prompt = "\nIts prompts are in the base's chat template.\n"
    elif options.prompt is not None:
        longest = max(map(len, re.findall("`+", options.prompt)), default=0)
        fence = "`" * max(3, longest + 1)
        prompt = (
            f"\nIts prompts:\n\n{fence}text\n{printable(options.prompt)}\n{fence}\n"
        )
    return f"## Load it\n\n```{language}\n{code}\n```\n{prompt}"


def _accuracy(run: RunFolder, results: Mapping[str, Any], seed: int) -> str:
    rows = run.predictions()
    by_seed = {
        seed_results["seed"]: [
            row["correct"] for row in rows if row["seed"] == seed_results["seed"]
        ]
        for seed_results in results["seeds"]
    }
    lines = [["", "exact match, %", "95 % interval"]]
    for name, seeds in (
        (f"seed {seed}, this one", [seed]),
        (f"all {len(by_seed)} seeds", list(by_seed)),
    ):
        accuracy = summary([np.array([by_seed[s] for s in seeds], bool)])
        lines.append(
            [name, f"{accuracy.mean:.1f}", f"{accuracy.low:.1f} to {accuracy.high:.1f}"]
        )
    return f"## Accuracy\n\n{markdown(lines[:2] if len(by_seed) == 1 else lines)}"


def _by_module(
    coefficients: Mapping[str, Float[np.ndarray, "_L N _k"]], modules: Sequence[str]
) -> str:
    """Return a table of each module's mean, least and greatest coefficient, the greatest in size first."""
    flat = np.concatenate(
        [np.moveaxis(c, 1, 0).reshape(len(modules), -1) for c in coefficients.values()],
        axis=1,
    )
    lines = [["adapter", "mean", "least", "greatest"]]
    for i in np.argsort(-np.abs(flat.mean(axis=1)), kind="stable").tolist():
        summary = (flat[i].mean(), flat[i].min(), flat[i].max())
        lines.append([_text(str(modules[i])), *(f"{value:.3f}" for value in summary)])
    return markdown(lines)
