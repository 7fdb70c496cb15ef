"""The group of all commands. It turns an error into one line on stderr and an exit code.

0 done · 1 a NacError or the operating system's refusal · 2 wrong usage · 3 drift (watch) · 130 interrupted
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

import click

from nacpipe.cli.convert import convert
from nacpipe.cli.data import data
from nacpipe.cli.doctor import doctor
from nacpipe.cli.evaluate import evaluate
from nacpipe.cli.export import export
from nacpipe.cli.extract import extract
from nacpipe.cli.inspect import inspect
from nacpipe.cli.models import layers, models
from nacpipe.cli.output import printable
from nacpipe.cli.rank import rank
from nacpipe.cli.report import report
from nacpipe.cli.reproduce import reproduce
from nacpipe.cli.run import run
from nacpipe.cli.score import score
from nacpipe.cli.search import search
from nacpipe.cli.streams import standard_streams
from nacpipe.cli.verify import repair, verify
from nacpipe.cli.watch import watch
from nacpipe.errors import NacError
from nacpipe.text import command_line
from nacpipe.version import __version__

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXTRACT_MODULES = ("torch", "torchvision", "PIL")  # of the extra `extract`


class CommandGroup(click.Group):
    """A group whose commands end with one line and an exit code where they fail."""

    def main(self, args: Any = None, *more_args: Any, **options: Any) -> Any:
        """Run, and keep the command line as the context's `obj`: messages name it as the way to go on."""
        words = list(sys.argv[1:] if args is None else args)
        with standard_streams(exits=options.get("standalone_mode", True)):
            return super().main(words, *more_args, obj=command_line(*words), **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error becomes one line on stderr and an exit code."""
        interrupted: list[int] = []

        def interrupt(number: int, _frame: FrameType | None) -> None:
            interrupted.append(number)
            raise KeyboardInterrupt

        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {number: signal.signal(number, interrupt) for number in numbers}
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            _exit_interrupted(ctx)
        except Exception as error:
            if interrupted:  # a library that was being imported raised an error of its own in place of it
                _exit_interrupted(ctx)
            if ctx.params.get("debug") or (described := _describe_error(error)) is None:
                raise
            line, code = described
            click.echo(printable(f"nacpipe: {line}".replace("\n", " ")), err=True)
            sys.exit(code)
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by no Python code


def _exit_interrupted(ctx: click.Context) -> NoReturn:
    click.echo(f"\nnacpipe: interrupted; what was written is safe, go on with: {ctx.obj}", err=True)
    sys.exit(130)


def _describe_error(error: Exception) -> tuple[str, int] | None:
    """Return the line to print and the exit code; None where a traceback is to be shown."""
    match error:
        case NacError():
            return error.one_line(), 1
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "nacpipe"
            return f"{error.format_message()} See: {command} --help", 2
        case ModuleNotFoundError() if str(error.name).split(".")[0] in _EXTRACT_MODULES:
            return f"this needs {error.name}; install it with: pip install 'nacpipe[extract]'", 1
        case BrokenPipeError():
            return None
        case MemoryError():
            return f"there is not enough memory for this ({error})" if str(error) else "there is not enough memory", 1
        case OSError():
            file = f": {error.filename}" if error.filename else ""
            full = "; what was written is safe: free some space, and the same command goes on"
            return f"{error.strerror or error}{file}{full if error.errno in _DISK_FULL else ''}", 1
        case _:
            return None


@click.command(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nacpipe")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Find the images on which a trained classifier should not be trusted.

    Neuron Activation Coverage (NAC-UE, ICLR 2024): extract a network's states once, search the parameters on the CPU,
    evaluate on out-of-distribution sets.

    \b
    nacpipe run digits                      # everything, on the packaged benchmark
    nacpipe extract cifar10 --model resnet20 --checkpoint resnet20.th --data-root data
    nacpipe search cache/cifar10-resnet20.zarr
    nacpipe evaluate cache/cifar10-resnet20.zarr
    """


for _command in (
    extract, search, evaluate, inspect, report, run, reproduce, export, score, watch, rank, verify, repair, convert,
    data, models, layers, doctor,
):  # fmt: skip
    main.add_command(_command)
