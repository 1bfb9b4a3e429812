"""`python -m automagic_bnb`: the same as the command `automagic-bnb`."""

import sys

from automagic_bnb.command.start import main

if __name__ == "__main__":
    sys.exit(main())
