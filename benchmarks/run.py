"""Every workload, or its counts alone.

    python benchmarks/run.py             all tables: `make bench`; pin it with --core 0
    python benchmarks/run.py --check     the counts again: fails if one has grown by over 2 %
    python benchmarks/run.py --write     new counts into figures.json

Counts are flops, temporary bytes and bytes moved of compiled programs; nothing is run for
them. They belong to one version of JAX, on CPU.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FIGURES = HERE / "figures.json"
WORKLOADS = (
    "w1_tutorial",
    "w2_reverse",
    "w3_implicit",
    "w4_scale",
    "w5_convolution",
    "w6_hypergradient_descent",
    "w7_reversible",
    "w8_stateful",
    "w9_maml",
    "w10_meta",
    "w11_outer",
    "w12_guard",
)
GROWTH = 1.02


def count() -> dict:
    """`{"jax": version, "figures": {name: number}}` of this machine."""
    import jax

    found = {}
    for name in WORKLOADS:
        found |= importlib.import_module(name).figures()
    return {"jax": jax.__version__, "figures": found}


def compare(old: dict[str, float], new: dict[str, float]) -> list[str]:
    """What has grown, appeared or gone."""
    complaints = [
        f"{key}: in figures.json, but no longer counted" for key in old.keys() - new.keys()
    ]
    complaints += [f"{key}: not in figures.json" for key in new.keys() - old.keys()]
    complaints += [
        f"{key}: {old[key]:.6g} -> {new[key]:.6g} (x {new[key] / old[key]:.3f})"
        for key in old.keys() & new.keys()
        if new[key] > GROWTH * old[key]
    ]
    return sorted(complaints)


def check() -> int:
    committed, found = json.loads(FIGURES.read_text()), count()
    if committed["jax"] != found["jax"]:
        print(
            f"figures.json is of jax {committed['jax']}, this is {found['jax']}: the compilers "
            "count differently. Install that version, or renew the figures by --write."
        )
        return 2
    complaints = compare(committed["figures"], found["figures"])
    print(*complaints or [f"{len(found['figures'])} figures, none has grown"], sep="\n")
    return bool(complaints)


def write() -> None:
    FIGURES.write_text(json.dumps(count(), indent=1, sort_keys=True) + "\n")
    print(f"{FIGURES.name} written")


def run_all(passed_on: list[str]) -> int:
    failed = 0
    for name in WORKLOADS:  # a process each, so that none inherits another's memory or threads
        print(f"\n== {name}", flush=True)
        failed |= subprocess.run([sys.executable, str(HERE / f"{name}.py"), *passed_on]).returncode
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description="The benchmarks; other flags go to each of them.")
    parser.add_argument("--check", action="store_true", help="compare the counts")
    parser.add_argument("--write", action="store_true", help="renew the counts")
    args, passed_on = parser.parse_known_args()
    if args.check:
        return check()
    if args.write:
        write()
        return 0
    return run_all(passed_on)


if __name__ == "__main__":
    sys.exit(main())
