"""Run the command line with `python -m graphlora`, as launchers such as `accelerate launch -m` need it."""

import sys

from graphlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
