"""`python -m firth`: the command line, where the script is not on the path (torchrun starts modules)."""

from firth.cli import main

if __name__ == "__main__":
    main()
