"""`gradhpo init`: every file runs as it is."""

import pytest

from gradhpo.tuning import load_task

KINDS = {
    "plain": (),
    "flax": ("--flax", "nnx"),
    "linen": ("--flax", "linen"),
    "eqx": ("--equinox",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_runs(gradhpo, here, kind):
    for package in {"flax": ["flax"], "linen": ["flax"], "eqx": ["equinox"]}.get(kind, []):
        pytest.importorskip(package)
    pytest.importorskip("sklearn")
    status, out, _ = gradhpo("init", f"own_{kind}.py", *KINDS[kind])
    assert status == 0 and f"gradhpo tune own_{kind}:task" in out
    text = (here / f"own_{kind}.py").read_text()
    assert f"gradhpo tune own_{kind}:task" in text and len(text.splitlines()) < 95
    status, out, _ = gradhpo(
        "tune", f"own_{kind}:task", "--episodes", "2", "--steps", "4", "--alone", "--out", "a"
    )
    assert status == 0 and "test_accuracy" in out
    again, task = load_task(f"own_{kind}:task"), load_task(f"own_{kind}:task", ["rate=0.01"], 1)
    assert again.problem is task.problem  # compiled once for all seeds


def test_a_file_that_is_there_stays(gradhpo, here):
    (here / "my_task.py").write_text("mine")
    status, _, err = gradhpo("init")
    assert status == 1 and "my_task.py exists already" in err
    assert (here / "my_task.py").read_text() == "mine"


@pytest.mark.parametrize("options", [["a-b.py"], ["a"], ["--plain", "--equinox"]])
def test_names_and_choices_that_do_not_fit(gradhpo, options, capsys):
    with pytest.raises(SystemExit):
        gradhpo("init", *options)
    assert "gradhpo init --help" in capsys.readouterr().err
