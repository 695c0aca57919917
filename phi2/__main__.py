"""`python -m phi2` is `phi2`."""

import sys

from phi2.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
