"""Local tasks in lm-evaluation-harness's own format: a YAML file and a file of rows each, read offline."""

import yaml
from json_files import write_rows


def write_tasks(folder, answers, texts, **generation):
    """Write a task of each kind into a folder that the harness takes with `--include_path`.

    Args:
      folder: folder of tasks, which must exist.
      answers: answer to each prompt. `local_choices` chooses one of all, `local_cloze` measures how likely it is, and
        whether it is the greedy answer, `local_answers` generates one.
      texts: whole texts, whose perplexity `local_text` measures.
      generation: arguments of generation.
    """
    choices = [*answers.values()]
    rows = [
        {"prompt": prompt, "target": answer, "choices": choices, "answer": number}
        for number, (prompt, answer) in enumerate(answers.items())
    ]
    for name, kind, target, metrics, more in (
        (
            "local_choices",
            "multiple_choice",
            "answer",
            ("acc", "acc_norm"),
            {"doc_to_choice": "choices"},
        ),
        ("local_cloze", "loglikelihood", " {{target}}", ("perplexity", "acc"), {}),
        (
            "local_answers",
            "generate_until",
            "{{target}}",
            ("exact_match",),
            {"generation_kwargs": generation},
        ),
        (
            "local_text",
            "loglikelihood_rolling",
            "{{text}}",
            ("word_perplexity", "byte_perplexity", "bits_per_byte"),
            {"doc_to_text": ""},
        ),
    ):
        file = folder / f"{name}.jsonl"
        whole = [{"text": text} for text in texts]
        write_rows(file, whole if name == "local_text" else rows)
        data = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(file.absolute())},
                "cache_dir": str(folder.absolute() / "cache"),
            },
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": "{{prompt}}",
            "doc_to_target": target,
            "metric_list": [{"metric": metric} for metric in metrics],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data | more))
