"""`python -m nacpipe`."""

from nacpipe.cli import main

main()
