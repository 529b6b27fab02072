"""The command line: one module per command, and `main`, which `lowra` and `python -m lowra` run."""

from __future__ import annotations


def main() -> None:
    """Run the command line of this process and exit with its code."""
    from lowra.cli.app import app

    app(prog_name="lowra")
