"""Local tasks in lm-evaluation-harness's own format: a YAML file and a file of rows each, read offline."""

import json

import yaml


def write_task(folder, name, rows, **config):
    """Write a task of the rows into a folder that the harness takes with `--include_path`.

    Args:
      folder: folder of tasks, which must exist.
      name: of the task.
      rows: rows of its test set.
      config: entries of its YAML file, such as `output_type`, `doc_to_text` and `doc_to_target`.
    """
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(file.absolute())},
            "cache_dir": str(folder.absolute() / "cache"),
        },
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data | config, sort_keys=False))


def multiple_choice(folder, name, rows):
    """Write a task whose rows have a `question`, `choices` and the number of the right one, `answer`."""
    metrics = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ]
    write_task(
        folder,
        name,
        rows,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=metrics,
    )


def perplexity(folder, name, texts):
    """Write a task that measures the perplexity of whole texts."""
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    write_task(
        folder,
        name,
        [{"text": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": metric} for metric in metrics],
    )


def cloze(folder, name, rows):
    """Write a task that measures how likely the `target` is behind a `prompt`, and whether it is the greedy answer."""
    write_task(
        folder,
        name,
        rows,
        output_type="loglikelihood",
        doc_to_text="{{prompt}}",
        doc_to_target=" {{target}}",
        metric_list=[
            {
                "metric": "perplexity",
                "aggregation": "perplexity",
                "higher_is_better": False,
            },
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    )
