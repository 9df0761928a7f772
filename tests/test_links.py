"""Links between documents lead somewhere: to a file of the repository, and to a heading in it.

Those to other sites need a network: `make links`, weekly on GitHub.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^()\s]+)\)|\]\(<([^<>]+)>\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and Sphinx make them: lower case, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead(path: Path, text: str) -> list[str]:
    found = []
    for plain, bracketed in LINK.findall(CODE.sub("", FENCED.sub("", text))):
        target = plain or bracketed
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            found.append(target)
        elif anchor and anchor not in anchors(text if file == path else file.read_text("utf-8")):
            found.append(target)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_within_the_repository(path):
    assert dead(path, path.read_text("utf-8")) == []


def test_a_dead_link_is_found():
    text = "# A `b` (c)\n[1](#a-b-c) [2](#absent) [3](absent.md) [4](https://x.y) `[5](no)`\n"
    assert dead(ROOT / "README.md", text) == ["#absent", "absent.md"]
