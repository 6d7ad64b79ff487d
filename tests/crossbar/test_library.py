"""The crossbar's imports: it works without Flax, except for its folder `flax`."""

import ast
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[2] / "lorafusion_jax" / "crossbar"
_THIRD_PARTY = {"jax", "numpy", "yaml", "jaxtyping", "safetensors"}


def test_only_its_folder_flax_imports_flax_and_nothing_imports_that_folder():
    wrong = []
    for path in (files := sorted(_FOLDER.rglob("*.py"))):
        depth = len(path.relative_to(_FOLDER).parts)
        allowed = _THIRD_PARTY | sys.stdlib_module_names | ({"flax"} if path.parent == _FOLDER / "flax" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wrong += [(path, a.name) for a in node.names if a.name.partition(".")[0] not in allowed]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
                other = not node.level and names[0].partition(".")[0] not in allowed
                of_flax = node.level == depth and "flax" in (names[0].partition(".")[0], *names)
                wrong += [(path, names)] if other or of_flax else []
    assert len(files) > 30 and not wrong
