"""`lorafusion forecast`: print whether a pool is worth fusing for a task, before anything is trained."""

import json
from collections.abc import Sequence

import numpy as np

from ..report import load_matplotlib, plot_descent
from ..runs.advantage import LEVEL
from ..runs.forecast import Forecast, ForecastOptions, forecast
from ..support.reading import show
from ..support.text import one_line
from ..support.text_tables import plain
from ..support.writing import check_writable, write_text
from .parsing import parse

GROUPS = {
    "data and base": ("base", "pool", "task", "prompt", "input", "target", "chat", "train_rows"),
    "forecast": ("calibrate", "draws"),
    "run": ("plot", "json"),
}


def main(arguments: Sequence[str]) -> None:
    """Print the modules by gradient norm, the forecast with its interval, and one sentence."""
    options = parse(ForecastOptions, arguments, "forecast", groups=GROUPS)
    if options.plot is not None:
        load_matplotlib()
    for path in (options.plot, options.json):
        if path is not None:
            check_writable(path)
    result = forecast(options)
    show(report(result))
    if options.json is not None:
        descent, prediction = result.descent, result.prediction
        content = {
            "task": result.task,
            "rows": descent.rows,
            "loss": descent.loss,
            "log_ratio": descent.log_ratio,
            "modules": dict(zip(result.modules, descent.modules.tolist(), strict=True)),
            "rotated": dict(zip(result.modules, descent.rotated.T.tolist(), strict=True)),
            "prediction": None if prediction is None else prediction._asdict(),
            "verdict": result.verdict,
        }
        write_text(options.json, json.dumps(content, indent=1) + "\n")
        show(f"written to {options.json}")
    if options.plot is not None:
        plot_descent(result.modules, result.descent.modules, result.descent.rotated, options.plot, title=result.task)
        show(f"written to {options.plot}")


def report(result: Forecast) -> str:
    """Return the modules by gradient norm, the greatest first, and the forecast."""
    descent = result.descent
    lines = [["module", "descent", "rotated", "ratio"]]
    for n in np.argsort(-descent.modules, kind="stable").tolist():
        own, copy = descent.modules[n], descent.of_copies[n]
        lines.append([result.modules[n], f"{own:.4f}", f"{copy:.4f}", f"{own / copy:.2f}" if copy else "-"])
    texts = [
        one_line(
            f"{result.task}: {descent.rows} training rows, loss of the base {descent.loss:.3f} nats per answer token"
        ),
        plain(lines),
        f"descent: nats for a unit of a module's coefficients; rotated: root mean square of {len(descent.rotated)} "
        "rotated copies",
        f"The descent of the whole pool is {np.exp(descent.log_ratio):.2f} times that of its rotated copies.",
    ]
    if result.prediction is not None:
        value, low, high = result.prediction
        texts.append(
            f"Advantage over rotated copies in test loss: {value:.2f} nats per answer token ({LEVEL:.0%} interval "
            f"{low:.2f} to {high:.2f})."
        )
    return "\n".join([*texts, result.verdict])
