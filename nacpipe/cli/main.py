"""The door: the group of commands, and where errors become one line and an exit code.

0 done · 1 a NacError or the operating system's refusal · 2 wrong usage · 130 interrupted
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

import click

from nacpipe import __version__
from nacpipe.cli.data import data
from nacpipe.cli.evaluate import evaluate
from nacpipe.cli.export import export
from nacpipe.cli.extract import extract
from nacpipe.cli.inspect import inspect
from nacpipe.cli.models import layers, models
from nacpipe.cli.output import printable
from nacpipe.cli.rank import rank
from nacpipe.cli.report import report
from nacpipe.cli.run import run
from nacpipe.cli.score import score
from nacpipe.cli.search import search
from nacpipe.cli.streams import standard_streams
from nacpipe.cli.verify import repair, verify
from nacpipe.errors import NacError
from nacpipe.text import command_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXTRACT = ("torch", "torchvision", "PIL")  # modules of the extra


class Door(click.Group):
    """A group whose commands' errors are dressed."""

    def main(self, args: Any = None, *rest: Any, **more: Any) -> Any:
        """Run, remembering the command line: caches and messages name it as the way to go on."""
        given = list(sys.argv[1:] if args is None else args)
        with standard_streams(exits=more.get("standalone_mode", True)):
            return super().main(given, *rest, obj=command_line(*given), **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what goes wrong becomes one line on stderr and an exit code."""
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
            self._part(ctx)
        except Exception as error:
            if interrupted:  # a library that was being imported made an error of its own of it
                self._part(ctx)
            if ctx.params.get("debug") or (dressed := _dress(error)) is None:
                raise
            line, code = dressed
            click.echo(printable(f"nacpipe: {line}".replace("\n", " ")), err=True)
            sys.exit(code)
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by no Python code

    @staticmethod
    def _part(ctx: click.Context) -> NoReturn:
        click.echo(f"\nnacpipe: interrupted; what was written is safe, go on with: {ctx.obj}", err=True)
        sys.exit(130)


def _dress(error: Exception) -> tuple[str, int] | None:
    """What a person is told and the exit code; None where the traceback is the better answer."""
    match error:
        case NacError():
            return error.one_line(), 1
        case click.UsageError():
            where = error.ctx.command_path if error.ctx else "nacpipe"
            return f"{error.format_message()} See: {where} --help", 2
        case ModuleNotFoundError() if str(error.name).split(".")[0] in _EXTRACT:
            return f"this needs {error.name}; install it with: pip install 'nacpipe[extract]'", 1
        case BrokenPipeError():
            return None
        case MemoryError():
            return f"there is not enough memory for this ({error})" if str(error) else "there is not enough memory", 1
        case OSError():
            safe = "; what was written is safe: free some space, and the same command goes on"
            where = f": {error.filename}" if error.filename else ""
            return f"{error.strerror or error}{where}{safe if error.errno in _FULL else ''}", 1
        case _:
            return None


@click.command(cls=Door, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nacpipe")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Tell which images a trained classifier should not be trusted on.

    Neuron Activation Coverage (NAC-UE, ICLR 2024): extract a network's states once, search the parameters on the CPU,
    evaluate on out-of-distribution sets.

    \b
    nacpipe run digits                      # everything, on the packaged benchmark
    nacpipe extract cifar10 --model resnet20 --checkpoint resnet20.th --data-root data
    nacpipe search cache/cifar10-resnet20.zarr
    nacpipe evaluate cache/cifar10-resnet20.zarr
    """


for _command in (
    extract, search, evaluate, inspect, report, run, export, score, rank, verify, repair, data, models, layers,
):  # fmt: skip
    main.add_command(_command)
