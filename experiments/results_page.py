"""Make a report of result rows: an HTML page, tables and plots (`lorafusion_jax.report.write_report`).

    python experiments/results_page.py runs/small_pool/results.jsonl --out runs/small_pool/report

Several files are merged. Where they hold both numbers of shots, tables and plots of each have its name.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import _script
from lab.common import ROOT
from lab.matrix import Arm, MatrixOptions, print_matrix_plan, run_matrix
from lab.scores import Row, Scores, main_tables, paired_table, scores, shots_name

from lorafusion_jax.report import Summary, plot_means, write_report
from lorafusion_jax.trials import merge, read_rows


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", type=Path, help="files of result rows, JSON lines"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--title", default="Results", help="of the page")
    parser.add_argument(
        "--reference",
        help="method to compare with every other (default: the highest mean)",
    )
    options = parser.parse_args(list(arguments))
    rows = merge(options.results)
    if options.reference and options.reference not in (
        there := dict.fromkeys(row["method"] for row in rows)
    ):
        raise ValueError(
            f"no results of {options.reference!r} to compare with: choose one of {', '.join(there)}"
        )
    report(rows, options.out, options.title, options.reference)
    print(f"{len(rows)} results; written to {options.out}")


def report(rows: Sequence[Row], out: Path, title: str, reference: str | None) -> None:
    """Write tables, plots and page of rows, compared with the reference, or without its rows with the highest mean."""
    tables = {}
    figures = {}
    parts = scores(rows)
    for results in parts:
        suffix = "" if len(parts) == 1 else f"_{results.shots}"
        tables |= {
            f"{name}{suffix}": of
            for name, of in zip(("table", "tasks"), main_tables(results), strict=False)
        }
        if len(results.methods) > 1:
            compared = (
                reference if reference in results.methods else best_method(results)
            )
            tables[f"paired{suffix}"] = paired_table(results, compared)
        if means := _means(results):
            name = f"means{suffix}.png"
            shown = f"{len(results.tasks)} tasks, {shots_name(results.shots)}"
            plot_means(means, out / name, title=shown)
            figures[name] = (
                f"Mean exact match of each method with its 95 % interval: {shown}"
            )
    write_report(out, title, tables, figures)


def best_method(scores: Scores) -> str:
    """Return the method with the highest mean, the first of equals; the first of all if none has every task."""
    means = _means(scores)
    return max(means, key=lambda method: means[method].mean, default=scores.methods[0])


def _means(scores: Scores) -> dict[str, Summary]:
    """Return the means of the methods that have all tasks."""
    summaries = scores.summaries.items()
    return {method: summary for method, summary in summaries if summary}


def run_and_report(
    options: MatrixOptions, arms: Mapping[str, Arm], title: str, reference: str
) -> None:
    """Run what is missing of a matrix and report all rows, or print its plan."""
    if options.plan:
        print_matrix_plan(options, arms)
    else:
        report(
            read_rows(run_matrix(options, arms, root=ROOT)),
            options.out / "report",
            title,
            reference,
        )


if __name__ == "__main__":
    _script.run(main)
