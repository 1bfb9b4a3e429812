"""`python -m automagic_bnb.run`, also under `accelerate launch -m`: the same as `automagic-bnb run`."""

import sys

from automagic_bnb.command.start import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
