"""The small problem and the methods on it are those of the tests of the classes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
