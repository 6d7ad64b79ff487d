"""What commands set before they load JAX: compiled functions that are found again."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorafusion_jax.cli.compile_cache import keep_compiled

_PROGRAM = """
import json, sys
from lorafusion_jax.cli.compile_cache import keep_compiled
keep_compiled()
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
jax.jit(lambda x: x * 2 + 1).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
print(json.dumps([events.count("cache_hits"), events.count("cache_misses")]))
"""
_OWN = {
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The user's folder of caches."""
    for name in _OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def _kept():
    """Do as a command does, and return the folder that JAX would keep compiled functions in."""
    keep_compiled()
    return os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)


def _folder():
    folder = _kept()
    assert folder is not None
    return Path(folder)


def _counts():
    """Compiled functions that a new process found and did not find; it has no messages."""
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    return json.loads(done.stdout)


def test_a_second_process_finds_what_the_first_one_compiled(home):
    assert _counts() == [0, 1]
    assert _counts() == [1, 0]
    folder = _folder()
    assert folder.is_relative_to(home) and folder.stat().st_mode & 0o777 == 0o700
    # A damaged entry is compiled again without a word, and replaced.
    (entry,) = folder.glob("*-cache")
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert _counts() == [0, 1]
    # What another version or processor compiled is not found.
    version = importlib.metadata.version("jaxlib")
    name, features = folder.name.rsplit("-", 1)
    assert name == f"jaxlib-{version}-{os.uname().machine}" and len(features) == 8
    folder.rename(folder.with_name(f"{name}-{'0' * 8}"))
    assert _counts() == [0, 1]


def test_variables_of_the_environment_come_first(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "own"))
    assert _kept() == str(home / "own")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    assert _kept() is None and not [*home.iterdir()]


@pytest.mark.parametrize("fault", ["open to others", "a link", "another user's"])
def test_a_folder_that_is_not_private_is_left_alone(home, capsys, fault):
    folder = _folder()
    if fault == "open to others":
        folder.chmod(0o755)
    elif fault == "a link":
        folder.symlink_to(folder.rename(home / "elsewhere"))
    elif os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
    else:
        pytest.skip("only root can give a folder to another user")
    assert _kept() is None and not [*folder.iterdir()]
    assert (
        "is not private to you: compiled functions are not kept"
        in capsys.readouterr().err
    )


def test_the_oldest_entries_above_the_bound_are_removed():
    folder = _folder()
    for age, name in enumerate(("newest", "middle", "oldest")):
        with (folder / f"{name}-cache").open("wb") as file:
            file.truncate(400 << 20)  # takes no space
        os.utime(folder / f"{name}-cache", (1e9 - age, 1e9 - age))
    assert _folder() == folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "middle-cache",
        "newest-cache",
    ]


@pytest.mark.parametrize("platform", ["cuda", "abacus"])
def test_a_platform_that_jax_lacks_is_one_message(platform):
    command = ["params", "--shape", "flan-t5-small"]
    environment = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run(
        [sys.executable, "-m", "lorafusion_jax.cli", *command],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        f"error: JAX cannot start JAX_PLATFORMS={platform}.*, such as cpu, or unset it\n",
        done.stderr,
    )
