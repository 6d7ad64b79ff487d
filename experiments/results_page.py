"""Make a report of result rows: an HTML page, tables, plots.

    python experiments/results_page.py runs/small_pool/results.jsonl --out runs/small_pool/report

Written: report.html (one file, all inside), table.csv (methods by tasks), paired.csv (--reference minus each other
method), table.tex (both), means.png; with more than 8 tasks tasks.csv too. Several files are merged.
Where they hold both numbers of shots, every file but the page is written for each, with these in its name.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import _script
from lab.common import ROOT
from lab.formats import csv_text, latex
from lab.page import page, save_means

from lorafusion_jax.report import Table, best_method, main_tables, paired_table, scores, write_text
from lorafusion_jax.trials import Arm, MatrixOptions, merge, print_matrix_plan, read_rows, run_matrix


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of result rows, JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--title", default="Results", help="of the page")
    parser.add_argument("--text", type=Path, help="a text file that the page begins with")
    parser.add_argument("--reference", help="method to compare with every other (default: the highest mean)")
    options = parser.parse_args(list(arguments))
    rows = merge(options.results)
    text = options.text.read_text(encoding="utf-8") if options.text else ""
    whole = page(rows, options.title, text, reference=options.reference)
    options.out.mkdir(parents=True, exist_ok=True)
    parts = scores(rows)
    for results in parts:
        suffix = "" if len(parts) == 1 else f"_{results.shots}"
        tables: dict[str, Table] = dict(zip(("table", "tasks"), main_tables(results), strict=False))
        if len(results.methods) > 1:
            tables["paired"] = paired_table(results, options.reference or best_method(results))
        write_text(options.out / f"table{suffix}.tex", "\n".join(map(latex, tables.values())))
        for name, table in tables.items():
            write_text(options.out / f"{name}{suffix}.csv", csv_text(table))
        if any(results.summaries.values()):
            save_means(results, options.out / f"means{suffix}.png")
    write_text(options.out / "report.html", whole)
    print(f"{len(rows)} results; written to {options.out}")


def run_and_report(options: MatrixOptions, arms: Mapping[str, Arm], title: str, reference: str) -> None:
    """Run what is missing of a matrix and report all rows, or print its plan.

    They are compared with the reference if there are rows of it with all numbers of shots.
    """
    if options.plan:
        print_matrix_plan(options, arms)
        return
    file = run_matrix(options, arms, root=ROOT)
    everywhere = all(reference in of.methods for of in scores(read_rows(file)))
    compared = ["--reference", reference] if everywhere else []
    main([str(file), "--out", str(options.out / "report"), "--title", title, *compared])


if __name__ == "__main__":
    _script.run(main)
