"""The command line: options → records → one call of the library → print.

A command imports what it needs when it runs, so that --help is fast.
"""

from nacpipe.cli.main import main

__all__ = ["main"]
