"""Tasks of real language, and their roles: sources of the pool, tasks to tune on, and unseen ones.

All are function-vector data sets (Todd et al., ICLR 2024; github.com/ericwtodd/function_vectors, MIT, the folder
dataset_files), other than the inflections, which are in examples/smollm2/tasks.
"""

from pathlib import Path

from _smollm2 import EXAMPLES

from lorafusion_jax.tasks import Task, find_task, load_task

PROMPT = "Q: {input}\nA:"
TRAIN_ROWS, TEST_ROWS, LEAST_TEST_ROWS = 100, 200, 90
# Rows that train a source's adapter, and passes over them: 30 steps of 16 rows, in one program for all sources.
SOURCE_ROWS = {500: 1, 250: 2, 166: 3, 100: 5}

SOURCES = {
    "words": ("past", "plural", "comparative", "next_item"),
    "translation": ("english-french",),
    "knowledge": ("country-capital", "national_parks", "person-instrument", "person-occupation", "product-company"),
    "letters": (
        "capitalize",
        "capitalize_first_letter",
        "capitalize_last_letter",
        "lowercase_first_letter",
        "next_capital_letter",
    ),
    "extraction": (
        "adjective_v_verb_3",
        "verb_v_adjective_5",
        "animal_v_object_3",
        "color_v_animal_5",
        "concept_v_object_3",
        "object_v_concept_5",
        "fruit_v_animal_5",
        "choose_first_of_3",
        "choose_last_of_3",
    ),
}
TUNING = ("landmark-country", "capitalize_second_letter")
# What the pool holds for an unseen task: a near relative (another language, case or direction), only others of its
# family, or none of its kind.
UNSEEN = {
    "near": {"english-spanish": "translation", "lowercase_last_letter": "letters", "prev_item": "words"},
    "far": {"country-currency": "knowledge", "person-sport": "knowledge", "alphabetically_first_3": "extraction"},
    "none": {"sentiment": "sentiment", "word_length": "counting", "synonym": "meaning"},
}


def find(name: str, folder: Path) -> Path:
    """Return the file or folder of a task; `folder` holds the function-vector data sets.

    Raises:
      ValueError: the task is not there.
    """
    own = EXAMPLES / "tasks" / name
    return own if own.is_dir() else find_task(folder, name)


def load(path: Path, train_rows: int = TRAIN_ROWS) -> Task:
    """Read a task with the prompt of all of them.

    Raises:
      ValueError: fewer than 90 rows are left to test on.
    """
    task = load_task(path, prompt=PROMPT, train_rows=train_rows)
    if path.is_file() and len(task.test) < LEAST_TEST_ROWS:
        raise ValueError(
            f"{path} has {train_rows + len(task.test)} different inputs, and {len(task.test)} of them to test on when "
            f"{train_rows} train: wanted at least {LEAST_TEST_ROWS} to test on"
        )
    return task


def source_rows(path: Path) -> int:
    """Return how many rows of a source train its adapter: the most that leave 200 to test on, but at least 100."""
    if path.is_dir():
        rows = len(load_task(path, need=("train",)).train)
    else:
        rows = len(load_task(path, train_rows=0, need=("test",)).test) - TEST_ROWS
    return next((count for count in SOURCE_ROWS if count <= rows), min(SOURCE_ROWS))
