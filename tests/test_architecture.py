"""Imports point one way, optional packages stay optional, nothing unsafe is called."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
}
MODULES = {name.removesuffix(".__init__") for name in FILES}

# Layer -> what it may import besides itself; an entry is a layer or one module of it.
LOWER = set(
    "utils core checkpoint solvers estimators driver algorithms diagnostics transforms".split()
)
USER = LOWER | {"meta", "datasets", "spaces"}
ALLOWED = {
    "utils": set(),
    "spaces": {"utils"},
    "core": {"utils", "spaces"},
    "solvers": {"utils", "core.types"},
    "estimators": {"utils", "core", "solvers"},
    "transforms": {"utils", "core.types", "core.outer", "spaces.projections"},
    "datasets": {"utils", "core.types"},
    "checkpoint": {"utils", "core"},
    "driver": {"utils", "core", "checkpoint"},
    "algorithms": {"utils", "core", "solvers", "estimators", "driver", "transforms"},
    "diagnostics": {"utils", "core", "estimators", "algorithms"},
    "testing": LOWER,
    "meta": LOWER,
    # Examples state a problem, studies measure it.
    "examples": USER | {"gradhpo", "schedules"},
    "report": {"utils", "core", "checkpoint.lock", "algorithms", "gradhpo"},
    "studies": USER | {"gradhpo", "examples", "report", "schedules", "testing", "tuning"},
    "tuning": USER | {"gradhpo", "report"},
    "schedules": set(),
    "doctor": USER | {"gradhpo", "report", "tuning"},
    "cli": USER | {"gradhpo", "report", "studies", "tuning", "doctor"},
    "outer": {"core"},  # the public name of core.outer
    "gradhpo": USER | {"outer"},  # the package's own __init__
    "__main__": {"cli"},
}
CORE = (
    "utils",
    "core",
    "checkpoint",
    "solvers",
    "estimators",
    "driver",
    "algorithms",
    "transforms",
)
OPTIONAL = set(
    "PIL chex cmaes equinox filelock flax matplotlib optuna orbax pooch scipy sklearn"
    " tensorboardX tqdm tyro".split()
)
UNSAFE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def layer(name: str) -> str:
    parts = name.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_true(node: ast.expr) -> bool:
    return not (isinstance(node, ast.Constant) and not node.value)


def imports(node: ast.AST, name: str) -> list[str]:
    """Full names of what an import statement of module `name` imports, submodules included."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = ".".join([*name.split(".")[: -node.level], node.module or ""] if node.level else [])
    base = base.strip(".") or node.module or ""
    # `from gradhpo import core` imports the module gradhpo.core, not the package's own names.
    inside = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES]
    return inside if len(inside) == len(node.names) else [base, *inside]


def at_import_time(body: list[ast.stmt]):
    """Statements that run when the module is imported: not those inside functions."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "handlers", "finalbody"):
                yield from at_import_time(getattr(node, field, []))


@pytest.mark.parametrize("name", FILES)
def test_module_keeps_the_rules(name):
    tree, here = ast.parse(FILES[name].read_text("utf-8")), layer(name)
    assert here in ALLOWED, f"{name}: say in ALLOWED what the new layer {here!r} may import"
    for node in ast.walk(tree):
        for target in imports(node, name):
            assert target.partition(".")[0] not in UNSAFE, f"{name}:{node.lineno} imports {target}"
            if target.partition(".")[0] == "gradhpo":
                allowed = ALLOWED[here] | {here}
                module = ".".join(target.split(".")[1:3])
                assert {layer(target), module} & allowed, f"{name}:{node.lineno} imports {target}"
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", None)
            assert called not in {"eval", "exec"}, f"{name}:{node.lineno} calls {called}"
            unsafe = [k for k in node.keywords if k.arg == "allow_pickle" and is_true(k.value)]
            assert not unsafe, f"{name}:{node.lineno} unpickles"
    if here in CORE:
        for node in at_import_time(tree.body):
            roots = {target.partition(".")[0] for target in imports(node, name)}
            assert not roots & OPTIONAL, f"{name}:{node.lineno}: import it inside the function"


def test_import_loads_no_optional_package():
    """Compared with what JAX and Optax load themselves: Optax 0.2.5 imports Chex."""
    program = "import sys, jax, optax; before = set(sys.modules); import gradhpo; "
    program += "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & OPTIONAL
