"""Run the command line with `python -m graphlora.cli`, as launchers such as torchrun need it."""

import sys

from graphlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
