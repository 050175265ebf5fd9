"""`python3 -I -S /usr/lib/picket/slots VERB`: the package beside this file, without an installation."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.exit(importlib.import_module("slots.service").main(sys.argv[1:]))
