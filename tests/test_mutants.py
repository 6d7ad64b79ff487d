"""The list of mutants follows the package."""

from pathlib import Path

import mutants
import pytest

_ROOT = Path(__file__).resolve().parents[1]


def test_every_mutant_changes_a_text_that_occurs_once_and_names_tests_that_exist(
    tmp_path,
):
    mutants.check(_ROOT)
    assert (
        len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) == 40
    )
    assert all(mutant.old != mutant.new and mutant.tests for mutant in mutants.MUTANTS)
    with pytest.raises(ValueError, match="no file tests/io/test_gguf.py"):
        mutants.check(tmp_path)
