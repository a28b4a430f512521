"""``python -m recipes <corpus> [options]``."""

from __future__ import annotations

import sys

from recipes.cli import main

if __name__ == "__main__":
    sys.exit(main())
