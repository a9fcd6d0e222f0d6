"""`python -m firth`: the command line, for launchers that start modules (torchrun)."""

from firth.cli import main

if __name__ == "__main__":
    main()
