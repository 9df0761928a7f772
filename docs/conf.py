"""Sphinx configuration. Builds without network access."""

import inspect
import re
from pathlib import Path

import gradhpo

project = "gradhpo"
author = "The gradhpo authors"
copyright = "the gradhpo authors"
release = version = gradhpo.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas without a network
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gradhpo {gradhpo.__version__}"
html_static_path = ["_static"]
html_css_files = ["gradhpo.css"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

# `make links`: anchors that scripts make cannot be seen.
linkcheck_anchors = False
linkcheck_retries = 2
linkcheck_timeout = 30

default_role = "code"  # `single backticks` in docstrings
napoleon_custom_sections = ["Source", "Cost", "Status"]
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88

SOURCE = Path(gradhpo.__file__).parent
API = Path(__file__).parent / "api"


def write_api_pages(app):
    """One page per subpackage with a section per module.

    Not autosummary: it finds a module by attribute access, and `gradhpo.estimators.greedy` is
    as an attribute the function, not the module.
    """
    pages = {}
    for path in sorted(SOURCE.rglob("*.py")):
        *parents, stem = path.relative_to(SOURCE).with_suffix("").parts
        if stem == "__init__":
            parts = parents
        elif stem.startswith("_"):
            continue
        else:
            parts = [*parents, stem]
        if 0 < len(parts) < 3:  # a study that is a package is one section, as one of one file
            pages.setdefault(parts[0], []).append(".".join(["gradhpo", *parts]))

    API.mkdir(exist_ok=True)
    for old in API.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for package, (first, *modules) in pages.items():
        title = f"``{first}``"
        is_package = (SOURCE / package).is_dir()
        # A package only gathers names; each is documented in the module that defines it.
        lines = [title, "=" * len(title), "", f".. automodule:: {first}"]
        lines += ["   :no-members:"] if is_package else []
        for name in modules:
            title = f"``{name}``"
            lines += ["", title, "-" * len(title), "", f".. automodule:: {name}"]
        page, text = API / f"{package}.rst", "\n".join(lines) + "\n"
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def groups() -> dict[str, list[str]]:
    """The names of `gradhpo`, grouped as the comments in its `__all__` do."""
    source = (SOURCE / "__init__.py").read_text("utf-8").partition("__all__ = [")[2]
    found: dict[str, list[str]] = {}
    for line in source.splitlines():
        if line.startswith("    # "):
            found[line[6:].partition(":")[0]] = names = []
        elif line.startswith('    "'):
            names.append(line.strip(' ",'))
    return found


def home(name: str) -> str:
    """Where a name of `gradhpo` is documented: the module that defines it."""
    value = getattr(gradhpo, name)
    module = getattr(value, "__module__", "")
    if module.startswith("gradhpo."):
        return f"{module}.{name}"
    return f"gradhpo.core.types.{name}"  # an alias of something else's type


def list_names(app, document, source):
    """`<!-- names: GROUP -->` becomes a table of its names, each with its first sentence."""

    def table(match):
        rows = ["| name | |", "|---|---|"]
        for name in groups()[match[1]]:
            doc = inspect.getdoc(getattr(gradhpo, name)) or ""
            own = not home(name).startswith("gradhpo.core.types.")
            first = " ".join(doc.partition("\n\n")[0].split()).replace("|", "\\|") if own else ""
            rows.append(f"| {{py:obj}}`{name} <{home(name)}>` | {first} |")
        return "\n".join(rows)

    source[0] = re.sub(r"<!-- names: (.+) -->", table, source[0])


def show_equations(app, what, name, obj, options, lines):
    """Print an indented block as it stands (equations, loops): after a line that ends in a colon,
    and in the docstring of a module after any line of prose."""
    for i in reversed(range(len(lines) - 2)):
        here, blank, block = lines[i : i + 3]
        if blank.strip() or indent(block) < indent(here) + 2:
            continue
        if re.search(r"[^:]:$", here):
            lines[i] = here + ":"
        elif what == "module" and re.match(r"[^\s:*-]", here):
            lines[i + 1 : i + 1] = ["", "::"]


def indent(line):
    return len(line) - len(line.lstrip())


def skip_tuple_fields(app, what, name, obj, skip, options):
    """The signature lists the fields of a NamedTuple; "Alias for field number 0" adds nothing."""
    is_field = (inspect.getdoc(obj) or "").startswith("Alias for field number")
    return True if is_field else None


def setup(app):
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", list_names)
    app.connect("autodoc-process-docstring", show_equations, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_tuple_fields)
