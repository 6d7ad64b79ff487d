"""A killed command resumes to the same bits; and the harness that says so finds commands that do not."""

from pathlib import Path

import kills
import pytest

# Work of a tenth of a second in small pieces. It ends without a line where it is told to stop, and whoever begins again
# finds what was written.
_UNSOUND = """
import pathlib, sys, time
file = pathlib.Path(sys.argv[1]) / "file"
for number in range(20):
    end = time.process_time() + 0.01
    while time.process_time() < end: pass
    file.open('a').write('x')
"""


def test_a_command_that_writes_in_place_or_ends_without_a_line_is_found(tmp_path):
    """It is killed three times, by every signal once, in the middle of the work."""

    def outcome(printed: str, out: Path) -> str:
        return (out / "file").read_text()

    command = kills.Command(
        lambda inputs, out: ["-c", _UNSOUND, str(out)], outcome, writes=False
    )
    inputs = kills.Inputs(tmp_path, tmp_path, tmp_path)
    tally = kills.kill(command, inputs, tmp_path / "made up", 3, seed=2041)
    assert (
        any("other bits" in fault for fault in tally.faults)
        and tally.same < tally.compared
    )
    assert any("exit code -" in fault for fault in tally.faults)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> kills.Inputs:
    return kills.make_inputs(tmp_path_factory.mktemp("inputs"))


# A run compiles anew after each kill.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.long
            if name == "convert --basis"
            else pytest.mark.nightly,
        )
        for name in kills.COMMANDS
    ],
)
def test_a_killed_command_resumes_to_the_same_bits(name, inputs, tmp_path):
    count = {"convert": 5, "convert --basis": 5, "fuse": 3}.get(name, 2)
    tally = kills.kill(kills.COMMANDS[name], inputs, tmp_path / name, count, seed=1)
    assert tally.faults == []
    assert tally.kills.total() == count and tally.same == tally.compared > 0
