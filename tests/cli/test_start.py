"""What commands set before they load JAX: compiled functions that are found again, and huge pages."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

_PROGRAM = """
import json, sys
from lorafusion_jax.cli import keep_compiled
keep_compiled()
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
jax.jit(lambda x: x * 2 + 1).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
print(json.dumps([events.count("cache_hits"), events.count("cache_misses")]))
"""
_KEEP = "from lorafusion_jax.cli import keep_compiled; keep_compiled()"
_OWN = {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}


def _run(home: Path, code: str = _PROGRAM, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in _OWN}
    environment |= {"XDG_CACHE_HOME": str(home), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)


def _counts(home: Path, **variables: str) -> list[int]:
    """Programs that a new process found and did not find."""
    done = _run(home, **variables)
    assert not done.stderr
    return json.loads(done.stdout)


def _folder(home: Path) -> Path:
    _run(home, _KEEP)
    (found,) = (home / "lorafusion-jax").iterdir()
    return found


def test_a_second_process_finds_what_the_first_one_compiled(tmp_path):
    assert _counts(tmp_path) == [0, 1]
    assert _counts(tmp_path) == [1, 0]
    folder = _folder(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert json.loads(_run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false").stdout) == [0, 0]
    own = tmp_path / "own"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(own), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert _counts(tmp_path, **kept) == [0, 1] and len([*own.iterdir()]) == 1


@pytest.mark.parametrize("content", [lambda entry: entry[: len(entry) // 2], lambda entry: b"foreign"])
def test_a_damaged_entry_is_compiled_again_without_a_word_and_replaced(tmp_path, content):
    assert _counts(tmp_path) == [0, 1]
    (entry,) = _folder(tmp_path).glob("*-cache")
    entry.write_bytes(content(entry.read_bytes()))
    assert _counts(tmp_path) == [0, 1]
    assert _counts(tmp_path) == [1, 0]


@pytest.mark.parametrize("fault", ["open to others", "a link", "another user's"])
def test_a_folder_that_is_not_private_is_left_alone(tmp_path, fault):
    folder = _folder(tmp_path)
    if fault == "open to others":
        folder.chmod(0o755)
    elif fault == "a link":
        folder = folder.rename(tmp_path / "elsewhere")
        (tmp_path / "lorafusion-jax" / _folder(tmp_path / "other").name).symlink_to(folder)
    elif os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
    else:
        pytest.skip("only root can give a folder to another user")
    done = _run(tmp_path)
    assert json.loads(done.stdout) == [0, 0] and not [*folder.iterdir()]
    assert "is not private to you: compiled functions are not kept" in done.stderr


def test_a_home_that_cannot_be_written_to_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    assert _counts(tmp_path / "file") == [0, 0]


def test_the_oldest_entries_above_the_bound_are_removed(tmp_path):
    folder = _folder(tmp_path)
    for age, name in enumerate(("newest", "middle", "oldest")):
        with (folder / f"{name}-cache").open("wb") as file:
            file.truncate(400 << 20)  # takes no space
        os.utime(folder / f"{name}-cache", (1e9 - age, 1e9 - age))
    _run(tmp_path, _KEEP)
    assert sorted(path.name for path in folder.iterdir()) == ["middle-cache", "newest-cache"]


def test_importing_the_package_keeps_nothing(tmp_path):
    code = "import os, lorafusion_jax; lorafusion_jax.fuse; print('JAX_COMPILATION_CACHE_DIR' in os.environ)"
    assert _run(tmp_path, code).stdout == "False\n" and not [*tmp_path.iterdir()]


def test_a_command_keeps_its_programs_and_writes_the_same_again(tmp_path, small):
    (tmp_path / "lines").write_text("double then digit : a b c\n")
    code = (
        "from lorafusion_jax import cli; cli.main(['generate', '--base', "
        f"{str(small[0])!r}, '--file', {str(tmp_path / 'lines')!r}, '--max-new-tokens', '4'])"
    )
    first = _run(tmp_path, code)
    entries = {path.name for path in _folder(tmp_path).iterdir()}
    assert entries
    assert _run(tmp_path, code).stdout == first.stdout
    assert {path.name for path in _folder(tmp_path).iterdir()} == entries


def _malloc(tmp_path: Path, *command: str, **variables: str) -> str | None:
    """GLIBC_TUNABLES of a command, as the kernel has it of the process that waits for text."""
    ours = _OWN | {"PYTEST_VERSION", "GLIBC_TUNABLES"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", **variables}
    with subprocess.Popen([sys.executable, *command], env=environment, stdin=subprocess.PIPE) as process:
        place = Path("/proc", str(process.pid), "environ")
        # The cache's folder is made behind the second start, if there is one.
        while process.poll() is None and not (tmp_path / "lorafusion-jax").exists():
            time.sleep(0.01)
        found = dict(line.split("=", 1) for line in place.read_bytes().decode().split("\0") if line)
        process.kill()
    return found.get("GLIBC_TUNABLES")


_GENERATE = ("-m", "lorafusion_jax.cli", "generate", "--base", "no base")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_a_command_that_computes_uses_huge_pages(tmp_path):
    found = _malloc(tmp_path / "computes", *_GENERATE)
    assert found == "glibc.malloc.hugetlb=1"
    assert _malloc(tmp_path / "counts", "-m", "lorafusion_jax.cli", "cost") is None


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
@pytest.mark.parametrize(
    ("variables", "malloc"),
    [({"GLIBC_TUNABLES": ""}, ""), ({"JAX_PLATFORMS": "cuda"}, None), ({"PYTEST_VERSION": "9"}, None)],
    ids=str,
)
def test_malloc_stays_as_it_is_if_it_is_set_on_accelerators_and_in_tests(tmp_path, variables, malloc):
    assert _malloc(tmp_path, *_GENERATE, **variables) == malloc


def test_another_program_that_calls_commands_is_not_started_again(tmp_path):
    code = "from lorafusion_jax import cli; cli.main()"
    assert _malloc(tmp_path, "-c", code, *_GENERATE[2:]) is None
