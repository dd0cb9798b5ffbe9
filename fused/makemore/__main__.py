"""python -m fused.makemore: the same as the command fused-makemore."""

import sys

from fused.makemore.cli import main

if __name__ == "__main__":
    sys.exit(main())
