"""`python -m nacpipe`."""

from nacpipe.cli import main

if __name__ == "__main__":  # not in the processes that decode images
    main()
