"""Every benchmark of the folder, one after the other: `make bench`."""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    scripts = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "run.py")
    failed = 0
    for script in scripts:
        print(f"== {script.name}", flush=True)
        failed |= subprocess.run([sys.executable, str(script)]).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
