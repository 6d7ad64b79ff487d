"""Forecasts of a pool's advantage: the linear model against its definition, calibration with runs, and refusals."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import one_block
import pytest
import recipes
from safetensors.numpy import load_file, save_file
from scipy import stats

import lorafusion_jax as lf
from lorafusion_jax import cli
from lorafusion_jax.parts import Case, Prediction, run_path
from lorafusion_jax.runs.advantage import LEVEL, WORTH, fit, packaged

_TASKS = ("double_digit", "odd_dash", "sort_next2")


def _cases(count: int, rng: np.random.Generator, noise: float = 0.1) -> list[Case]:
    """Made-up tasks whose advantage is linear in the features."""
    found = []
    for n in range(count):
        log_ratio, loss, rows = rng.normal(), rng.uniform(0.2, 3), int(rng.choice([5, 20, 95]))
        gain = 0.3 + 0.5 * log_ratio - 0.1 * loss - 0.2 * np.log(rows) + noise * rng.normal()
        found.append(Case(task=f"task {n}", log_ratio=log_ratio, loss=loss, rows=rows, advantage=float(gain)))
    return found


def _design(cases: list[Case]) -> np.ndarray:
    return np.array([[1, case["log_ratio"], case["loss"], np.log(case["rows"])] for case in cases])


def test_a_prediction_has_the_t_interval_of_least_squares():
    *cases, new = _cases(13, np.random.default_rng(0))
    model, X = fit(cases), _design(cases)
    slopes, (squares,), *_ = np.linalg.lstsq(X, np.array([case["advantage"] for case in cases]))
    (x,) = _design([new])
    error = np.sqrt(squares / 8 * (1 + x @ np.linalg.inv(X.T @ X) @ x))
    half = stats.t.ppf((1 + LEVEL) / 2, 8) * error
    got = model.predict(new["log_ratio"], new["loss"], new["rows"])
    np.testing.assert_allclose(got, (x @ slopes, x @ slopes - half, x @ slopes + half))


def test_intervals_contain_their_share_of_new_tasks():
    rng, inside = np.random.default_rng(1), []
    for _ in range(400):
        *cases, new = _cases(12, rng)
        found = fit(cases).predict(new["log_ratio"], new["loss"], new["rows"])
        inside.append(found.low <= new["advantage"] <= found.high)
    assert abs(np.mean(inside) - LEVEL) < 0.06


def test_a_feature_without_values_to_compare_is_left_out():
    cases = [Case(**(case | {"rows": 20})) for case in _cases(8, np.random.default_rng(2))]
    model = fit(cases)
    assert model.features == ("log_ratio", "loss") and model.rows == (20, 20)
    with pytest.raises(ValueError, match="3 tasks for 2 slopes: give at least 4"):
        fit(cases[:3])


def test_a_calibration_keeps_slopes_and_takes_mean_and_spread_of_its_tasks():
    rng = np.random.default_rng(3)
    model, others = fit(_cases(12, rng)), [case | {"advantage": case["advantage"] + 2} for case in _cases(5, rng)]
    left = [case["advantage"] - model.predict(case["log_ratio"], case["loss"], case["rows"])[0] for case in others]
    found = model.calibrated(others).predict(0.5, 1.0, 20)
    assert found.advantage == pytest.approx(model.predict(0.5, 1.0, 20).advantage + np.mean(left))
    half = stats.t.ppf((1 + LEVEL) / 2, 4) * np.std(left, ddof=1) * np.sqrt(1 + 1 / 5)
    assert found.high - found.advantage == pytest.approx(half)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.5, "worth it"), (-0.2, 0.04, "not worth it"), (0.01, 0.5, "cannot tell"), (-0.5, 0.5, "cannot tell")],
)
def test_the_verdict_depends_on_the_whole_interval(low, high, verdict):
    assert Prediction((low + high) / 2, low, high).verdict == verdict
    assert WORTH == 0.05


def _options(small: tuple[Path, Path], task: str = "swapends_prev", **changes) -> lf.ForecastOptions:
    base, pool = map(str, small)
    return lf.ForecastOptions(
        base=base, pool=pool, task=str(one_block.SMALL / "tasks" / task), **{"draws": 2} | changes
    )


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory) -> dict[str, list[Path]]:
    """Short runs of three tasks, with the pool and with two rotated pools."""
    out, found = tmp_path_factory.mktemp("runs"), {}
    for task in _TASKS:
        found[task] = []
        for name, changes in (
            ("own", {}),
            ("first", {"control": "rotated"}),
            ("second", {"control": "rotated", "control_draw": 1}),
        ):
            values = {"task": str(one_block.SMALL / "tasks" / task), "epochs": 1, "name": f"{task}-{name}"} | changes
            options = recipes.small_run(small, out, **values)
            lf.fuse(options)
            found[task].append(run_path(options))
    return found


def test_a_base_that_was_not_fitted_has_no_forecast(small):
    found = lf.forecast(_options(small))
    assert found.prediction is None and found.verdict.startswith(
        "Cannot tell: the forecast was not fitted on this base"
    )
    assert "--calibrate" in found.verdict
    assert len(found.modules) == 4 and found.descent.rows == 100


def test_the_base_of_the_fit_has_a_forecast(tmp_path):
    for adapter in sorted((one_block.SMALL / "adapters").iterdir())[:2]:
        (tmp_path / adapter.name).symlink_to(adapter)
    options = _options((one_block.SMALL / "base", tmp_path), train_rows=20)
    found, fitted = lf.forecast(options), packaged()
    assert fitted is not None
    here = found.descent
    assert found.prediction == fit(fitted["cases"]).predict(here.log_ratio, here.loss, here.rows)
    assert found.prediction.low < found.prediction.advantage < found.prediction.high
    assert (
        "fitted on tasks of 20 training rows, and there are 100"
        in lf.forecast(_options(small=(one_block.SMALL / "base", tmp_path))).verdict
    )


def test_runs_of_a_few_tasks_calibrate_a_forecast(small, runs):
    folders = tuple(folder for of_task in runs.values() for folder in of_task)
    found = lf.forecast(_options(small, calibrate=folders))
    cases = []
    for task, of_task in runs.items():
        own, *rotated = (json.loads((folder / "results.json").read_text())["seeds"] for folder in of_task)
        means = [np.mean([seed["loss"] for seed in seeds]) for seeds in (own, *rotated)]
        of = lf.forecast(_options(small, task)).descent
        gain = float(np.mean(means[1:]) - means[0])
        cases.append(Case(task=task, log_ratio=of.log_ratio, loss=of.loss, rows=of.rows, advantage=gain))
    fitted = packaged()
    model = fit(cases, ("log_ratio",)) if fitted is None else fit(fitted["cases"]).calibrated(cases)
    here = found.descent
    np.testing.assert_allclose(found.prediction, model.predict(here.log_ratio, here.loss, here.rows), rtol=1e-5)
    with_few = lf.forecast(_options(small, calibrate=folders, train_rows=20))
    assert "fitted on tasks of 100 training rows, and there are 20" in with_few.verdict


def test_a_forecast_is_printed_drawn_and_written(small, runs, tmp_path, capsys):
    options = _options(small)
    folders = [str(folder) for of_task in runs.values() for folder in of_task]
    plot, file = tmp_path / "plots" / "descent.png", tmp_path / "forecast.json"
    arguments = ["--base", options.base, "--pool", options.pool, "--task", options.task, "--draws", "2"]
    cli.main(["forecast", *arguments, "--calibrate", *folders, "--plot", str(plot), "--json", str(file)])
    out, content = capsys.readouterr().out, json.loads(file.read_text())
    lines = out.splitlines()
    assert lines[0].startswith("swapends_prev: 100 training rows, loss of the base ")
    order = sorted(content["modules"], key=content["modules"].__getitem__, reverse=True)
    assert [line.split()[0] for line in lines[2 : 2 + len(order)]] == order
    assert content["verdict"] in lines and plot.stat().st_size
    assert np.shape(list(content["rotated"].values())) == (4, 2)
    prediction = content["prediction"]
    assert prediction["low"] < prediction["advantage"] < prediction["high"]


def test_a_plot_without_matplotlib_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--base", "none", "--pool", "none", "--task", "none", "--plot", str(tmp_path / "descent.png")]
    with pytest.raises(SystemExit):
        cli.main(["forecast", *arguments])
    assert "a plot needs matplotlib" in capsys.readouterr().err


def _broken(folder: Path, tmp_path: Path, change) -> Path:
    """A copy of a run with a changed file."""
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def _other_base(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["digests"]["base"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))


def _other_rows(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"task_sha256": "0" * 64}))


def _no_loss(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    results["seeds"][0]["loss"] = None
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "results.json").unlink(), "is not complete: continue it"),
        (_other_base, "has another base than the forecast"),
        (_other_rows, "odd_dash has other rows than .* was fused on: restore them, fuse the run again"),
        (_no_loss, "a test loss that is not finite"),
    ],
)
def test_damaged_and_other_runs_are_refused(small, runs, tmp_path, change, message):
    copy = _broken(runs["odd_dash"][0], tmp_path, change)
    with pytest.raises(ValueError, match=message):
        lf.forecast(_options(small, calibrate=(copy, runs["odd_dash"][1])))


def _with_rows(rows: int):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["options"]["train_rows"] = rows
        (folder / "config.json").write_text(json.dumps(config))

    return change


def test_runs_without_their_control_and_too_few_tasks_are_refused(small, runs, tmp_path):
    own, rotated, _ = runs["odd_dash"]
    other = _broken(rotated, tmp_path, _with_protocol)
    sizes = [_broken(run, tmp_path / str(rows), _with_rows(rows)) for rows in (5, 20, 95) for run in (own, rotated)]
    for given, message in (
        (tuple(sizes), "the runs are of 1 tasks: a calibration needs 3 or more"),
        ((own,), r"one or more with `--control rotated`, got 1 and 0"),
        ((own, rotated), "the runs are of 1 tasks: a calibration needs 3 or more"),
        ((own, other), "has another recipe than .*odd_dash-own: only --control may differ"),
    ):
        with pytest.raises(ValueError, match=message):
            lf.forecast(_options(small, calibrate=given))


def _with_chat(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["options"]["chat"] = True
    (folder / "config.json").write_text(json.dumps(config))


def test_a_calibration_uses_the_prompts_of_its_runs(small, runs, tmp_path):
    copies = [_broken(run, tmp_path, _with_chat) for of_task in runs.values() for run in of_task[:2]]
    with pytest.raises(ValueError, match="has no chat template"):  # which is looked up for these runs alone
        lf.forecast(_options(small, calibrate=tuple(copies)))


def _with_protocol(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["options"]["recipe"]["protocol"] = "reference"
    (folder / "config.json").write_text(json.dumps(config))


def test_a_calibration_uses_the_rows_of_its_runs_protocol(small, runs, tmp_path):
    copies = [_broken(run, tmp_path, _with_rows(20)) for of_task in runs.values() for run in of_task[:2]]
    options = _options(small, calibrate=tuple(copies), train_rows=20)
    default = lf.forecast(options).prediction
    for copy in copies:
        _with_protocol(copy)
    assert lf.forecast(options).prediction != default


def test_a_task_of_the_calibration_is_refused(small, runs):
    folders = tuple(folder for of_task in runs.values() for folder in of_task)
    with pytest.raises(ValueError, match="odd_dash is a task of the calibration, so its advantage is known: leave out"):
        lf.forecast(_options(small, "odd_dash", calibrate=folders))


def test_modules_without_an_effect_are_refused(small, tmp_path):
    fresh = tmp_path / "pool" / "fresh"
    shutil.copytree(next(small[1].iterdir()), fresh)
    file = fresh / "adapter_model.safetensors"
    save_file({name: np.zeros_like(a) if "lora_B" in name else a for name, a in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="no module of .*pool has an effect on swapends_prev: give trained adapters"):
        lf.forecast(_options((small[0], fresh.parent)))


def test_a_forecast_without_rotated_copies_is_refused(small):
    with pytest.raises(ValueError, match="draws is 0: expected at least 1"):
        lf.forecast(_options(small, draws=0))
