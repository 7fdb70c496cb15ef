"""The command line: options → records → one call → print. Wings are imported inside the commands."""

from nacpipe.cli.main import main

__all__ = ["main"]
