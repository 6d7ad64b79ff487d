"""Tasks in the form of BIG-Bench Hard's, with its oddities, and an index of a split in the form of LoraHub's.

The rows were written for these tests. Every task has its training rows first.
"""

import hashlib
import json
from pathlib import Path

TRAIN_ROWS = 4


def _chosen(question: str, *options: str, mark: str = "({})") -> str:
    """Return a question with its options; the mark takes their letters."""
    lines = [f"{mark.format(chr(ord('A') + i))} {option}" for i, option in enumerate(options)]
    return "\n".join([question, "Options:", *lines])


def _yes_no(question: str, *options: str) -> str:
    return _chosen(question, *(options or ("Yes", "No")), mark="-")


def _film(*films: str, of: str) -> str:
    return _chosen(f"Find a movie similar to {of}:", *films)


def _name(name: str, *edits: str) -> str:
    return _chosen(f"Which of the following is a humorous edit of this artist or movie name: '{name}'?", *edits)


_FILMS = ("Rain", "A Long Night", "The Fence", "Oslo Street")
_TWICE = _yes_no("Ann waters the field, and Bo does too. Both were needed. Did Ann cause the flood?")
_SAME = 'Is the following sentence plausible? "Kim Oduya hit a triple in the last over."'

# Name to the description in front of the prompts and to (input, target).
TASKS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    # Labels that no prompt states.
    "boolean_expressions": (
        "Evaluate the result of a random Boolean expression.\n\n",
        [
            row
            for a in (True, False)
            for b in (False, True)
            for row in ((f"not ( {a} ) and {b} is", str(not a and b)), (f"{a} or {b} is", str(a or b)))
        ],
    ),
    # The last test row repeats a training prompt, with its answer.
    "sports_understanding": (
        "Determine whether an artificially constructed sentence relating to sports is plausible or not.\n\n",
        [
            (_SAME, "no"),
            ('Is the following sentence plausible? "Lena Voss scored from the penalty spot."', "yes"),
            ('Is the following sentence plausible? "Jo Park was out at second base."', "yes"),
            ('Is the following sentence plausible? "Ida Blom took a corner kick in the first inning."', "no"),
            ('Is the following sentence plausible? "Eva Horn crossed the blue line."', "yes"),
            (_SAME, "no"),
        ],
    ),
    # Options with a dash. The last test row repeats a training prompt, with the other answer.
    "causal_judgement": (
        "Answer questions about causal attribution.\n\n",
        [
            (_TWICE, "No"),
            (_yes_no("Cy left the gate open, and the dog ran away. Did Cy cause this?"), "Yes"),
            (_yes_no("Di pressed a switch that was not connected. Did Di cause the light to go on?"), "No"),
            (_yes_no("Fay pushed the cart, and it rolled. Did Fay cause this?"), "Yes"),
            (_yes_no("Ian broke the jar. Did Ian cause the spill?"), "Yes"),
            (_TWICE, "Yes"),
        ],
    ),
    # A blank behind an option.
    "formal_fallacies": (
        "Distinguish deductively valid arguments from formal fallacies.\n\n",
        [
            (_yes_no(f'"{premises}"\nIs the argument deductively valid or invalid?', "valid ", "invalid"), answer)
            for premises, answer in (
                ("Every cat is a pet. Mia is a cat. So Mia is a pet.", "valid"),
                ("Every cat is a pet. Mia is a pet. So Mia is a cat.", "invalid"),
                ("No fish is a bird. Tim is a fish. So Tim is no bird.", "valid"),
                ("No fish is a bird. Tim is no bird. So Tim is a fish.", "invalid"),
                ("Some oaks are old. So all oaks are old.", "invalid"),
            )
        ],
    ),
    # Letters, more or fewer of them.
    "date_understanding": (
        "Infer the date from context.\n\n",
        [
            (_chosen("Today is 3 May 2010. What is the date tomorrow?", "05/04/2010", "05/03/2010"), "(A)"),
            (_chosen("Yesterday was 31/12/1999. What is today?", "12/31/1999", "01/01/2000", "01/02/2000"), "(B)"),
            (_chosen("In a week it will be 8 June 2003. What is today?", "06/01/2003", "06/15/2003"), "(A)"),
            (_chosen("Today is the last day of 2001. What is today?", "12/30/2001", "12/31/2001"), "(B)"),
            (_chosen("Today is 9/9/1999. What is tomorrow?", *(f"09/{day}/1999" for day in range(10, 16))), "(A)"),
            (_chosen("Today is 1/1/1900. What is the date tomorrow?", "01/02/1900", "01/01/1900"), "(A)"),
        ],
    ),
    # The first test row's target is none of its letters: a comma in a name broke the list of options.
    "movie_recommendation": (
        "Recommend movies similar to the given list of movies.\n\n",
        [
            (_film(*_FILMS, of="The Kettle, Grey Harbour"), "(B)"),
            (_film(*_FILMS[::-1], of="The Kettle, Two Ladders"), "(C)"),
            (_film(*_FILMS, of="Ships, The Last Tram"), "(A)"),
            (_film(*_FILMS[1:], of="A Quiet Year"), "(D)"),
            (_film("Robots", "Inc", *_FILMS[:2], of="Toys, Robots, Inc, Wheels"), "Robots, Inc"),
            (_film(*_FILMS, of="Blue Hour, The Mill"), "(B)"),
        ],
    ),
    # No line break in front of the cue. The second test row's target is not a letter.
    "ruin_names": (
        "Select the humorous edit that 'ruins' the input movie or musical artist name.\n\n",
        [
            (_name("the long road", "the long toad", "the wrong road", "thy long road"), "(A)"),
            (_name("rain men", "rain hen", "train men", "rain mens"), "(A)"),
            (_name("star field", "star fields", "tsar field", "stir field"), "(B)"),
            (_name("the blue band", "the blue bland", "the glue band", "teh blue band"), "(B)"),
            (_name("iron hand", "irons hand", "iron ham", "irun hand"), "(B)"),
            (_name("earth, wind", "earth, wine", "dearth, wind"), "earth, wine"),
            (_name("sea view", "pea view", "sea vew"), "(A)"),
        ],
    ),
    # Open answers.
    "object_counting": (
        "Questions that involve enumerating objects and asking the model to count them.\n\n",
        [(f"I have{' a cup and' * n} a jug. How many objects do I have?", str(n + 1)) for n in range(8)],
    ),
    "word_sorting": (
        "Sort a list of words.\n\n",
        [
            (f"Sort the following words alphabetically: List: {words}", " ".join(sorted(words.split())))
            for words in ("oak elm ash", "blue red", "zinc iron tin", "über été naïve", "two one")
        ],
    ),
}


def lines(name: str, numbers: range | list[int]) -> list[str]:
    """Return the lines of a file of LoraHub's folder, for some rows of a task."""
    prefix, rows = TASKS[name]
    prompts = [(f"{prefix}Q: {rows[i][0]}{separator(name)}A:", rows[i][1]) for i in numbers]
    return [json.dumps({"context": context, "completion": answer}, ensure_ascii=False) for context, answer in prompts]


def separator(name: str) -> str:
    """Return what stands between a question and its cue: LoraHub's folder lacks a line break in one task."""
    return "" if name == "ruin_names" else "\n"


def index() -> dict[str, dict]:
    """Return the index of a split: rows by task, and the digests of the files that they make."""
    found = {}
    for name, (prefix, rows) in TASKS.items():
        parts = {"example": list(range(TRAIN_ROWS)), "zero_shot": list(range(TRAIN_ROWS, len(rows)))}
        digests = {
            f"sha256_{part}": hashlib.sha256("\n".join(lines(name, numbers)).encode()).hexdigest()
            for part, numbers in parts.items()
        }
        found[name] = parts | {"prefix": [prefix], "sep": separator(name)} | digests
    return found


def write(folder: Path) -> tuple[Path, Path]:
    """Write the tasks and the index. Return the folder of tasks and the index's file."""
    (folder / "bbh").mkdir(parents=True)
    for name, (_, rows) in TASKS.items():
        examples = [{"input": prompt, "target": target} for prompt, target in rows]
        text = json.dumps({"canary": "none", "examples": examples}, ensure_ascii=False)
        (folder / "bbh" / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / "split.json").write_text(json.dumps(index()), encoding="utf-8")
    return folder / "bbh", folder / "split.json"
