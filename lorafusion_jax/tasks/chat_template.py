"""Chat templates, rendered in a separate process with bounds of memory and time.

A template is a stranger's program. The sandbox of jinja2 does not limit its memory and time, and no thread can stop it
within one call of Python, such as `'x' * 10**10`. The process runs this file, which imports nothing of the package.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import transformers

MOST_SECONDS = 5  # of CPU time of one rendering
MOST_MEMORY = 1 << 30  # bytes that the renderings may take
LONGEST = 1 << 20  # characters of a rendered text

_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None
_owner = 0  # process that started it: after a fork, the child starts its own


def render(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
) -> str:
    """Return the text of a conversation, as `tokenizer.apply_chat_template` renders it.

    Raises a ValueError for a template that fails, or exceeds one of the bounds.
    """
    asked = {
        "conversations": [messages],
        "chat_template": tokenizer.get_chat_template(),
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        **tokenizer.special_tokens_map,
    }
    line = json.dumps(asked, default=str) + "\n"
    with _lock:
        process = _started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BaseException:  # also Ctrl-C: the next rendering must not read this one's answer
            _stop()
            raise
        if not answer.endswith("\n"):
            _stop()
            raise ValueError(f"it takes more than {MOST_SECONDS} s or {MOST_MEMORY >> 30} GiB to render")
    rendered = json.loads(answer)
    if "error" in rendered:
        raise ValueError(rendered["error"])
    return rendered["text"]


def _started() -> "subprocess.Popen[str]":
    global _process, _owner
    if _process is None or _process.poll() is not None or _owner != os.getpid():
        _owner = os.getpid()
        _process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            start_new_session=True,  # Ctrl-C is for the process that waits
        )
    return _process


@atexit.register
def _stop() -> None:
    global _process
    if _process is not None and _owner == os.getpid():
        _process.kill()
        _process.communicate()
        _process = None


def _serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer each line of JSON, the arguments of transformers' function, by one with a text or an error."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # SIGPROF ends the process
        try:
            rendered: Any = render_jinja_template(**json.loads(line))
            text = str(rendered[0][0])
            if len(text) > LONGEST:
                fix = "shorten the row, or leave out --chat"
                raise ValueError(f"it renders {len(text):,} characters: expected at most {LONGEST:,}: {fix}")
            answer = {"text": text}
        except MemoryError:
            answer = {"error": f"it takes more than {MOST_MEMORY >> 30} GiB to render"}
        except Exception as error:  # a template may raise anything; most raise jinja2's errors
            answer = {"error": str(error)[:2000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _limit_memory() -> None:
    if not os.path.exists("/proc/self/statm"):  # only Linux reports the memory in use, and enforces the limit
        return
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_MEMORY, taken + MOST_MEMORY))


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
