"""The command line: `lorafusion SUBCOMMAND --help`."""

import gc
import importlib
import os
import select
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence

from ..support import interrupts
from .compile_cache import keep_compiled
from .parsing import check_sources

_BROKEN_PIPE = 128 + 13  # what a shell reports of a program that SIGPIPE ends
# Columns of help texts; in a few, tyro would take minutes to lay one out.
_NARROW = 40
_WIDE = 90
_VERBOSE = "--verbose"
_LONGEST_FAULT = 300  # characters
# New objects until garbage is looked for: tracing makes many that stay, and by Python's default the search takes a
# second of a run of 24.
_OBJECTS = 20_000
# How to continue a command that was stopped; the others leave nothing.
_CONTINUATIONS = {
    "fuse": "the same command with --resume continues",
    "trial": "the same command continues",
    "restore": "the same command continues",
}
COMMANDS = {
    "trial": "whether a pool is worth fusing for your task, by a tuned comparison",
    "convert": "adapters -> a pool on disk",
    "fuse": "train coefficients and magnitudes on a task, evaluate by generation",
    "evaluate": "fused runs on a task, digitally or on simulated ReRAM arrays",
    "compare": "runs on the same test rows: means with intervals, and paired differences",
    "generate": "fused runs on new text, from a file or standard input",
    "merge": "modules with your own weights -> a PEFT adapter or a merged base model",
    "lm-eval": "fused runs, bases and adapters on benchmarks of lm-evaluation-harness",
    "export": "a fused run -> a PEFT adapter or a merged base model",
    "crossbar": "prepare a base for arrays, program chips, find the cheapest arrays for a loss",
    "restore": "unlabelled text -> digital corrections of a base model on simulated chips",
    "params": "exact trainable counts of every method, without weights",
    "cost": "writes, energy, time and wear of a new task with every method",
}

# Modules of this folder that have several subcommands; each of the others is called like its subcommand.
_MODULES = {
    "compare": "export",
    "merge": "export",
    "lm-eval": "generate",
    "restore": "crossbar",
    "params": "cost",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand, as `run` does."""
    run(_subcommand, arguments)


def _subcommand(arguments: Sequence[str]) -> None:
    name, *rest = arguments or ("--help",)
    if name in ("-h", "--help"):
        print("Fuse a frozen pool of LoRA modules for a new task.\n\nsubcommands:")
        for command, text in COMMANDS.items():
            print(f"  {command:<11}{text}")
        print(
            "\n`lorafusion SUBCOMMAND --help` lists the options of each. With --verbose it also shows"
            "\nthe messages of XLA, and where an error was raised."
        )
    elif name not in COMMANDS:
        sys.exit(
            f"lorafusion: no subcommand {name!r}: choose one of {', '.join(COMMANDS)}"
        )
    else:
        check_sources(rest)
        fresh = "jax" not in sys.modules  # otherwise another program calls the command
        interrupts.watch(_CONTINUATIONS.get(name, ""))
        if fresh:
            keep_compiled()
            gc.disable()  # looking for garbage in what imports make takes 15 % of the time of a short command
        module = importlib.import_module(f".{_MODULES.get(name, name)}", __package__)
        if fresh:
            gc.freeze()
            gc.set_threshold(_OBJECTS)
            gc.enable()
        getattr(module, f"{name.replace('-', '_')}_command")(rest)


def run(
    command: Callable[[list[str]], None], arguments: Sequence[str] | None = None
) -> None:
    """Call a command, and turn errors about its input into one message on stderr and exit code 2.

    Other errors are one message too, with exit code 1. `--verbose` adds the traceback, and the messages of XLA. If the
    reader of its output ends first, so does the command, without a message. Ctrl-C and SIGTERM end the process (see
    `interrupts`).
    """
    from ..support.reading import check_name, show

    # Otherwise the next file that is opened would get the number of a closed stream.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    interrupts.watch()
    columns = shutil.get_terminal_size().columns
    if not _NARROW <= columns <= _WIDE:
        os.environ["COLUMNS"] = str(min(max(columns, _NARROW), _WIDE))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verbose = _VERBOSE in arguments
    if verbose:
        arguments.remove(_VERBOSE)
    else:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        try:
            for argument in arguments:
                check_name(argument)
            command(arguments)
        finally:
            sys.stdout.flush()  # fails here if the reader of a pipe has ended, not while Python ends
    except Exception as error:
        if (stopped := interrupts.exit_code()) is not None:
            sys.exit(stopped)
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            # As `| head` is, so that there is nobody to tell. What is left in the buffer goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(_BROKEN_PIPE)
        if verbose:
            show(traceback.format_exc(), file=sys.stderr)
        about_input = isinstance(error, ValueError | OSError)
        if about_input:
            message = str(error)
        elif (message := _lacks_backend()) is not None:
            about_input = True
        else:
            message = _fault(error)
        show(f"error: {message}", file=sys.stderr)
        sys.exit(2 if about_input else 1)


def _fault(error: Exception) -> str:
    """Return one line about an error that is not about the input."""
    first_line = next(iter(str(error).splitlines()), "")
    if "RESOURCE_EXHAUSTED" in first_line:
        return (
            "the device has too little memory: use --dtype bfloat16, --load-in int8, smaller batches or another device "
            "(--verbose shows the message of XLA)"
        )
    text = f"{type(error).__name__}: {first_line}"
    if len(text) > _LONGEST_FAULT:
        text = f"{text[:_LONGEST_FAULT]}..."
    return f"{text} (a fault of this program, not of its input: --verbose shows where; please report it)"


def _lacks_backend() -> str | None:
    """Return a message if JAX starts none of the platforms in its variable. It fails a bare assertion for some."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        why = f" ({error})" if str(error) else ""
        return f"JAX cannot start JAX_PLATFORMS={platforms}{why}: give one of this machine, such as cpu, or unset it"
    return None


def _reader_is_gone() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    output = select.poll()
    output.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))
