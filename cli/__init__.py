"""The command `ranvier`: a thin shell over the Python functions."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and leaves with its exit status: 0 fine, 1 a check failed, 2 bad input."""
    from ranvier.cli.app import run_app

    sys.exit(run_app(sys.argv[1:]))
