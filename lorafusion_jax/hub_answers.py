"""Checks of a hub's answers before `huggingface_hub` uses them: names that become paths, sizes, and pauses.

Its client uses the ETag of a file and the hash of a commit as parts of paths, reads listings of any size into memory,
and waits without a limit. The client's session makes the checks while `checked` is active.
"""

import contextlib
import functools
import importlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 60.0  # seconds without an answer, and seconds over which the speed of a file is measured
SLOWEST = 1_000  # bytes a second of a file
LONGEST_ANSWER = 600.0  # seconds of an answer that is not a file
LISTED = 1 << 26  # bytes of all answers of a fetch that are not files
_PAGE = 1 << 12  # bytes that each such answer counts at least, so that pages end too
UNKNOWN = 1 << 28  # bytes of a file of undeclared size
_ERROR = 1 << 20  # bytes of the text of an error or redirection
_LONGEST_PAUSE = 600  # seconds before the next try that a busy hub may set

_HEADERS = ("etag", "x-linked-etag", "x-repo-commit", "x-xet-hash")
_FIELDS = {"sha", "oid", "sha256", "blobId", "xetHash"}
_NAME = re.compile(r"[\w=:+-][\w.=:+-]{0,199}")
_NO_FILES = "lorafusion_no_file"  # marks requests whose answers are read whole

_lock = threading.Lock()
_active = 0
_left = 0


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Check what hubs send in this block; an answer that fails is a ValueError."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    global _active, _left
    with _lock:
        # The sessions that it makes after a lost connection are checked too.
        make = _http._GLOBAL_CLIENT_FACTORY  # a user may have set one, and no public name returns it
        if getattr(make, "func", None) is not _with_checks:
            set_client_factory(functools.partial(_with_checks, make))
        if not _active:
            _left = LISTED
        _active += 1
    try:
        yield
    finally:
        with _lock:
            _active -= 1


def _with_checks(make: Callable[[], Any]) -> Any:
    client = make()
    send = client.send

    def checked_send(request: Any, *, stream: bool = False, **how: Any) -> Any:
        if _active:
            request.headers["Accept-Encoding"] = "identity"  # the size of a compressed answer is unknown
            given = request.extensions.get("timeout", {})
            waits = {of: given.get(of) or PATIENCE for of in ("connect", "read", "write", "pool")}
            request.extensions = {**request.extensions, "timeout": waits, _NO_FILES: not stream}
        response = send(request, stream=stream, **how)
        if _active and not stream:
            _check_fields(response)
        return response

    client.send = checked_send
    # `huggingface_hub` changed from httpx to httpx2.
    http = importlib.import_module(type(client).__module__.partition(".")[0])
    client.event_hooks["response"].append(_hook(http.SyncByteStream))
    return client


def _hook(stream: type) -> Callable[[Any], None]:
    class Checked(stream):
        def __init__(self, content: Any, limited: Callable[[Any], Iterator[bytes]]):
            self._content, self._limited = content, limited

        def __iter__(self) -> Iterator[bytes]:
            yield from self._limited(self._content)

        def close(self) -> None:
            self._content.close()

    def check(response: Any) -> None:
        if not _active:
            return
        for header in _HEADERS:
            found = response.headers.get(header, "")
            if found:
                _check_name(header, found.removeprefix("W/").strip('"'))
        if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
            raise ValueError(f"the hub sends a compressed answer ({encoding[:40]}), which was not requested")
        for header in ("retry-after", "ratelimit"):
            if any(int(number) > _LONGEST_PAUSE for number in re.findall(r"\d{1,9}", response.headers.get(header, ""))):
                del response.headers[header]  # the client's default applies
        limited = _file if response.is_success and not response.request.extensions.get(_NO_FILES) else _whole
        response.stream = Checked(response.stream, lambda content: limited(response, content))

    return check


def _whole(response: Any, content: Any) -> Iterator[bytes]:
    """Yield the parts of an answer that is read into memory."""
    global _left
    began, size = time.monotonic(), 0
    with _lock:
        most = _left if response.is_success else _ERROR
        _left -= _PAGE
    for part in content:
        size += len(part)
        if size > most:
            raise ValueError(f"the hub lists more than {LISTED >> 20} MiB, or sends an error of more than a MiB")
        if time.monotonic() > began + LONGEST_ANSWER:
            raise ValueError(f"the hub took more than {LONGEST_ANSWER:g} s for an answer of {size:,} bytes")
        yield part
    with _lock:
        _left -= size


def _file(response: Any, content: Any) -> Iterator[bytes]:
    """Yield the parts of a file. The HTTP library checks its Content-Length."""
    most = None if "content-length" in response.headers else UNKNOWN
    began, size, since = time.monotonic(), 0, 0
    for part in content:
        size += len(part)
        if most is not None and size > most:
            raise ValueError(f"the hub sends a file of more than {most >> 20} MiB without its size")
        if (now := time.monotonic()) > began + PATIENCE:
            if size - since < SLOWEST * (now - began):
                raise ValueError(f"the hub sends less than {SLOWEST:,} bytes a second")
            began, since = now, size
        yield part


def _check_fields(response: Any) -> None:
    """Check the hashes in an answer of JSON, as the client reads it."""
    try:
        left = [response.json()]
    except RecursionError:
        raise ValueError("the hub sends JSON that is nested too deeply") from None
    except ValueError:
        return
    while left:
        value = left.pop()
        if isinstance(value, dict):
            for field in _FIELDS & value.keys():
                if isinstance(value[field], str):
                    _check_name(field, value[field])
        if isinstance(value, dict | list):
            left.extend(value.values() if isinstance(value, dict) else value)


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"the hub sends {what} {name[:120]!r}, which would be part of a path: expected a hash")
