"""Bundles of machine code that a TPU's compiler scheduled for each instruction; a core issues one a cycle.

Every loop counts as often as it runs, and every branch as taken. Waits for memory are left out.
"""

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

_BUNDLE = re.compile(r"\s*0(?:x[0-9a-f]+)? +(\w\w)? *: *(>*) *(\{\}?)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")
_STAGE = re.compile(r"iteration index, stage = (\d+)")


def dump() -> Path:
    """Have libtpu, which must not have been loaded yet, write its machine code to a new folder, which is returned."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final_bundles$"
    )
    return Path(folder)


def bundles(folder: Path) -> dict[str, int]:
    """Return the bundles of each instruction of the only program whose machine code is in the folder."""
    named = [
        (re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", file.name), file)
        for file in folder.iterdir()
    ]
    return {name.group(1): _count(file.read_text()) for name, file in named if name}


def _count(text: str) -> int:
    loops = [
        [0, 0, 0, 0]
    ]  # depth, bundles, number that the loop ends at, stages of it that are one step behind

    def leave(depth: int) -> None:
        while loops[1:] and loops[-1][0] > depth:
            _, own, end, stages = loops.pop()
            loops[-1][1] += own * max(end - stages, 1)

    begins = 0  # whether a loop has begun since the last bundle that says its depth, as empty ones do not
    for line in text.splitlines():
        if not (bundle := _BUNDLE.match(line)):
            continue
        begins += bundle.group(1) == "LB"
        if bundle.group(3) == "{":
            depth = len(bundle.group(2))
            leave(depth - begins)
            loops.extend([[depth, 0, 0, 0]] * begins)
            begins = 0
        inner = loops[-1]
        inner[1] += 1
        inner[2] = max([inner[2], *map(int, _EXIT.findall(line))])
        inner[3] = max([inner[3], *map(int, _STAGE.findall(line))])
    leave(0)
    return loops[0][1]
