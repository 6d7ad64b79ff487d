"""Tasks of experiments: found in folders of other projects, and checked."""

from pathlib import Path

from lorafusion_jax.tasks import BBH_DATA, LORAHUB_DATA, Task


def find_task(folder: str | Path, name: str) -> Path:
    """Return the task of this name in a folder or its subfolders: NAME.json, NAME.jsonl or a folder NAME."""
    names = (f"{name}.json", f"{name}.jsonl", name)
    found = sorted(path for path in Path(folder).rglob("*") if path.name in names)
    if not found:
        raise ValueError(
            f"{folder} has no task {name}: expected {names[0]}, {names[1]} or a folder {name} inside it"
        )
    if len(found) > 1:
        raise ValueError(
            f"{folder} has several tasks {name}, {' and '.join(map(str, found))}: keep one of them"
        )
    return found[0]


def lorahub_tasks(data: Path) -> list[Path]:
    """Return the folders of the tasks in LoraHub's own folder, `data_bbh`; raises ValueError if there are none."""
    found = (
        sorted(path for path in data.iterdir() if (path / "example.jsonl").is_file())
        if data.is_dir()
        else []
    )
    if not found:
        got = "has no task" if data.is_dir() else "does not exist"
        raise ValueError(
            f"{data} {got}: give LoraHub's data_bbh, which has a folder for each task with example.jsonl and "
            f"zero_shot.jsonl. It is in LoraHub's release 0.1 ({LORAHUB_DATA}); the same rows are made from "
            f"{BBH_DATA}, which has a JSON file for each task (--bbh)"
        )
    return found


def prompt_overlap(task: Task) -> tuple[int, ...]:
    """Return the numbers of the test rows whose prompt is also that of a training row, with any target."""
    trained = {(example.history, example.input) for example in task.train}
    return tuple(
        row
        for row, example in enumerate(task.test)
        if (example.history, example.input) in trained
    )
