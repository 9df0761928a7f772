"""The figures of the documents: shown, made by a named command, and no two of one file."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from gradhpo.studies.registry import STUDIES, load
from gradhpo.studies.tutorial.study import DemoConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = {path: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))}
STUDIES_PAGE = ROOT / "docs" / "studies.md"
ROWS = re.findall(
    r"^\| `(\S+\.png)` \| `(\S+\.png)` \| `(gradhpo .+)` \|$", DOCUMENTS[STUDIES_PAGE], re.MULTILINE
)


def test_the_table_has_every_figure_once():
    assert sorted(row[0] for row in ROWS) == sorted(x.name for x in (ROOT / "figures").iterdir())
    made = [(command, file) for _, file, command in ROWS]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("figure, file, command", ROWS, ids=[row[0] for row in ROWS])
def test_a_document_shows_the_figure_and_names_its_command(figure, file, command):
    showing = [text for text in DOCUMENTS.values() if f"figures/{figure})" in text]
    _, verb, *rest = shlex.split(command)
    named = " ".join(["gradhpo", verb, *rest[: verb == "run"]])
    assert showing and all(named in text for text in showing)
    if verb == "run":
        study, *options = rest
        assert {x[2:].replace("-", "_") for x in options if x.startswith("--")} <= {
            field.name for field in fields(load(study).Config)
        }
        home = Path(importlib.import_module(STUDIES[study].module).__file__ or "")
        sources = home.parent.glob("*.py") if home.stem == "__init__" else [home]
        assert any(Path(file).stem in source.read_text() for source in sources)


def test_no_study_writes_where_another_does():
    places = [load(name).Config().out for name in STUDIES] + [DemoConfig().out]
    assert len(set(places)) == len(places)
    assert not any(a in b.parents for a in places for b in places)
