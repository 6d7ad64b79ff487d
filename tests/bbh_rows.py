"""Tasks in the form of BIG-Bench Hard's, with its oddities, and an index of a split in the form of LoraHub's.

The rows were written for these tests. Every task has its training rows first.
"""

import hashlib
import json

TRAIN_ROWS = 4


def _yes_no(question):
    return f"{question}\nOptions:\n- Yes\n- No"


def _name(name, *edits):
    question = f"Which of the following is a humorous edit of this artist or movie name: '{name}'?"
    return "\n".join(
        [
            question,
            "Options:",
            *(f"({chr(ord('A') + i)}) {edit}" for i, edit in enumerate(edits)),
        ]
    )


_TWICE = _yes_no(
    "Ann waters the field, and Bo does too. Both were needed. Did Ann cause the flood?"
)

# Name to the description in front of the prompts and to (input, target).
TASKS = {
    # Labels that no prompt states.
    "boolean_expressions": (
        "Evaluate the result of a random Boolean expression.\n\n",
        [
            row
            for a in (True, False)
            for b in (False, True)
            for row in (
                (f"not ( {a} ) and {b} is", str(not a and b)),
                (f"{a} or {b} is", str(a or b)),
            )
        ],
    ),
    # Options with a dash. The last test row repeats a training prompt, with the other answer.
    "causal_judgement": (
        "Answer questions about causal attribution.\n\n",
        [
            (_TWICE, "No"),
            (
                _yes_no(
                    "Cy left the gate open, and the dog ran away. Did Cy cause this?"
                ),
                "Yes",
            ),
            (
                _yes_no(
                    "Di pressed a switch that was not connected. Did Di cause the light to go on?"
                ),
                "No",
            ),
            (_yes_no("Fay pushed the cart, and it rolled. Did Fay cause this?"), "Yes"),
            (_yes_no("Ian broke the jar. Did Ian cause the spill?"), "Yes"),
            (_TWICE, "Yes"),
        ],
    ),
    # No line break in front of the cue. The second test row's target is not a letter: a comma broke its options.
    "ruin_names": (
        "Select the humorous edit that 'ruins' the input movie or musical artist name.\n\n",
        [
            (
                _name(
                    "the long road", "the long toad", "the wrong road", "thy long road"
                ),
                "(A)",
            ),
            (_name("rain men", "rain hen", "train men", "rain mens"), "(A)"),
            (_name("star field", "star fields", "tsar field", "stir field"), "(B)"),
            (
                _name(
                    "the blue band", "the blue bland", "the glue band", "teh blue band"
                ),
                "(B)",
            ),
            (_name("iron hand", "irons hand", "iron ham", "irun hand"), "(B)"),
            (_name("earth, wind", "earth, wine", "dearth, wind"), "earth, wine"),
            (_name("sea view", "pea view", "sea vew"), "(A)"),
        ],
    ),
    # Open answers.
    "object_counting": (
        "Questions that involve enumerating objects and asking the model to count them.\n\n",
        [
            (f"I have{' a cup and' * n} a jug. How many objects do I have?", str(n + 1))
            for n in range(8)
        ],
    ),
}


def lines(name, numbers):
    """Return the lines of a file of LoraHub's folder, for some rows of a task."""
    prefix, rows = TASKS[name]
    prompts = [
        (f"{prefix}Q: {rows[i][0]}{separator(name)}A:", rows[i][1]) for i in numbers
    ]
    return [
        json.dumps({"context": context, "completion": answer}, ensure_ascii=False)
        for context, answer in prompts
    ]


def separator(name):
    """Return what stands between a question and its cue: LoraHub's folder lacks a line break in one task."""
    return "" if name == "ruin_names" else "\n"


def index():
    """Return the index of a split: rows by task, and the digests of the files that they make."""
    found = {}
    for name, (prefix, rows) in TASKS.items():
        parts = {
            "example": list(range(TRAIN_ROWS)),
            "zero_shot": list(range(TRAIN_ROWS, len(rows))),
        }
        digests = {
            f"sha256_{part}": hashlib.sha256(
                "\n".join(lines(name, numbers)).encode()
            ).hexdigest()
            for part, numbers in parts.items()
        }
        found[name] = parts | {"prefix": [prefix], "sep": separator(name)} | digests
    return found


def write(folder):
    """Write the tasks and the index. Return the folder of tasks and the index's file."""
    (folder / "bbh").mkdir(parents=True)
    for name, (_, rows) in TASKS.items():
        examples = [{"input": prompt, "target": target} for prompt, target in rows]
        text = json.dumps({"canary": "none", "examples": examples}, ensure_ascii=False)
        (folder / "bbh" / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / "split.json").write_text(json.dumps(index()), encoding="utf-8")
    return folder / "bbh", folder / "split.json"
