"""`python -m lowra`: the command line."""

from lowra.cli import main

if __name__ == "__main__":
    main()
