"""Entry point of ``mkrs``: arguments, errors and exit codes.

Exit codes: 0 done; 1 the work could not be done (the message says why and what to do); 2 wrong
usage; 130 interrupted. A user's mistake shows no traceback, unless ``MKRS_TRACEBACK=1``.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from ..version import __version__
from . import convert, demo, dequantize, doctor, generate, inspect, quantize, shard
from .common import Formatter

COMMANDS = (inspect, convert, quantize, dequantize, shard, generate, demo, doctor)

# What bad input, a full disk or a missing package raise. Anything else is a bug and says so.
USER_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    OSError,
    NotImplementedError,
    MemoryError,
    ImportError,
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="mkrs",
        description="Low-bit weights and out-of-core checkpoints for PyTorch.",
        epilog="examples:\n"
        "  mkrs inspect model.gguf\n"
        "  mkrs convert model.gguf model-native\n"
        '  mkrs generate model-native "What is gravity?"\n'
        "  mkrs quantize float-model model-4bit --q-bits 4\n\n"
        "Each command has its own help: mkrs COMMAND --help",
        formatter_class=Formatter,
    )
    top.add_argument("--version", action="version", version=f"mkrs {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return top


def message_of(error: BaseException) -> str:
    """One line for a user."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str() of a KeyError is a repr
    return str(error) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mkrs``; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        return code
    except BrokenPipeError:
        # The reader of our output went away (`mkrs inspect ... | head`), which is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("mkrs: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if os.environ.get("MKRS_TRACEBACK") == "1":
            raise
        print(f"mkrs {args.command}: {message_of(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
