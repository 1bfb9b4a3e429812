"""Where a process of the command line begins: nothing is imported here that takes time in which Ctrl-C could fall."""

import sys
from collections.abc import Sequence

INTERRUPTED = 130
"""The exit status that shells expect after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """`cli.main`; Ctrl-C is one line and a status of 130 while that is being imported, too."""
    try:
        from automagic_bnb.command import cli

        return cli.main(argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
