"""Other libraries on the same workloads, and as docs/migration shows them, each in an environment
of its own.

    python benchmarks/peers.py --install          all of them, into benchmarks/.envs
    python benchmarks/peers.py --install jaxopt   one

A peer's environment is the directory named by GRADHPO_PEER_<NAME>, or else
benchmarks/.envs/<name>. A peer that is absent is skipped with a message.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["PEERS", "ask", "interpreter"]

HERE = Path(__file__).parent
PEERS = {
    "gradhpo": ["gradhpo==0.1.3"],  # the public package, before this library
    "jaxopt": ["jaxopt==0.8.5", "optimistix==0.1.0", "optax"],
    "torch": ["torch", "torchopt==0.7.3", "higher==0.2.1", "optax"],  # and ours beside them
}


def interpreter(name: str) -> Path:
    """The Python of a peer's environment, whether it exists or not."""
    folder = os.environ.get(f"GRADHPO_PEER_{name.upper()}", HERE / ".envs" / name)
    return Path(folder) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ask(name: str, script: str, *args: object) -> list[dict]:
    """What `peers/<script>` prints, one JSON object a line; nothing if the peer is absent.

    The script inherits the processor cores of this process and sees of this folder only the
    modules that need NumPy alone.
    """
    python = interpreter(name)
    if not python.exists():
        print(f"  (peer {name} skipped: no environment; python {__file__} --install {name})")
        return []
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [str(python), str(HERE / "peers" / script), *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"  (peer {name} failed in {script}: {last})")
        return []
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def install(name: str) -> None:
    folder = interpreter(name).parent.parent
    venv.create(folder, with_pip=True)
    (folder / ".gitignore").write_text("*\n")
    subprocess.run([interpreter(name), "-m", "pip", "install", "--quiet", *PEERS[name]], check=True)
    print(f"{name}: {', '.join(PEERS[name])} in {folder}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Environments of the peer libraries.")
    parser.add_argument("--install", nargs="*", choices=list(PEERS), metavar="NAME")
    names = parser.parse_args().install
    if names is None:
        for name in PEERS:
            print(f"{name:10s} {'ready' if interpreter(name).exists() else 'absent'}")
        return 0
    for name in names or PEERS:
        install(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
