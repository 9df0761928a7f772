"""Figures: they are files of the right kind, and pyplot's global state is left alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradhpo.report import drawing, plots
from gradhpo.report.lines import Line, draw_lines

pytest.importorskip("matplotlib")
RNG = np.random.default_rng(0)
LABELS = {"xlabel": "epoch", "ylabel": "loss", "title": "Losses"}


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("band", [False, True])
def test_curves(tmp_path, log_y, band):
    lines = {f"method {i}": RNG.random((3, 5)) - 0.1 for i in range(9)}  # more than the colours
    lines |= {"one seed": RNG.random((1, 5)), "one epoch": RNG.random((3, 1))}
    lines["diverged"] = np.full((3, 5), np.nan)
    path = plots.curves(lines, tmp_path / "new" / "a.png", **LABELS, log_y=log_y, band=band)
    assert is_png(path)


def test_before_after_and_images(tmp_path):
    pairs = {"one": (RNG.random(4), RNG.random(4)), "one seed": ([0.1], [0.2])}
    assert is_png(plots.before_after(pairs, tmp_path / "a.png", "accuracy", "Cleaning"))
    grey, colour = RNG.random((2, 3, 8, 8)), RNG.integers(0, 255, (1, 2, 8, 6, 3), np.uint8)
    assert is_png(plots.images(grey, tmp_path / "b.png", list("abcdef")))
    assert is_png(plots.images(colour, tmp_path / "c.png"))
    assert plots.images(grey, tmp_path / "d.svg").read_text().lstrip().startswith("<?xml")


def test_names_at_the_ends_of_lines_do_not_touch():
    figure = drawing.new_figure(6.4, 4.0)
    axes = drawing.new_axes(figure, "", "", "")
    axes.set_ylim(0, 1)
    ends = [(str(i), "k", np.array([1.0]), np.array([y])) for i, y in enumerate([0.5] * 5 + [0.9])]
    drawing.label_ends(axes, ends)
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert np.diff(heights).min() > 0.06
    assert heights[-1] == 0.9 and np.isclose(np.mean(heights[:5]), 0.5)  # moved only where needed


def drawn(lines, log=False, **options):
    """Axes with these lines, x from 1 where a line is only its y."""
    axes = drawing.new_axes(drawing.new_figure(6.4, 4.0), "", "", "")
    if log:
        axes.set_yscale("log", nonpositive="mask")
    given = {
        name: line if isinstance(line, Line) else Line(np.arange(1, len(line) + 1), line)
        for name, line in lines.items()
    }
    draw_lines(axes, given, **options)
    return axes


def test_lines_that_coincide_are_told_and_their_markers_take_turns():
    falling = np.linspace(1, 0.5, 30)
    axes = drawn({"one_step": falling, "reverse": falling / 2, "t1t2": falling + 1e-4})
    assert [text.get_text() for text in axes.texts][::-1] == ["one_step", "= t1t2", "reverse"]
    turns = [line.get_markevery() for line in axes.lines]
    at = [set(range(start, 30, step)) for start, step in turns]
    assert all(at) and not at[0] & at[2]
    solid, dashed = axes.lines[0], axes.lines[2]
    assert solid.get_linewidth() > dashed.get_linewidth()
    assert solid.get_zorder() < dashed.get_zorder()


def test_episodes_are_whole_numbers():
    ticks = drawn({"a": [1.0, 2.0, 0.5, 3.0]}).get_xticks()
    assert len(ticks) >= 3 and np.array_equal(ticks, np.round(ticks))


def test_intervals_end_where_the_values_can():
    line = Line([1, 2], [0.9, 0.99], [0.8, 0.9], [1.0, 1.08])
    (band,) = drawn({"a": line}, within=(0, 1)).collections
    assert band.get_paths()[0].vertices[:, 1].max() == 1
    pairs = {"a": ([0.5, 0.6], [0.9, 1.0])}
    figure = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda each, path: figure.append(each))
        plots.before_after(pairs, "a.png", "accuracy", "", within=(0, 1))
    tops = [lines.get_segments()[0].max() for lines in figure[0].axes[0].collections]
    assert max(tops) == 1


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda path: plots.curves({}, path, **LABELS), "no curve"),
        (lambda path: plots.curves({"a": [1.0, 2.0]}, path, **LABELS), r"\(seeds, epochs\)"),
        (lambda path: plots.before_after({}, path, "y", "t"), "no method"),
        (lambda path: plots.before_after({"a": ([1.0], [1.0, 2.0])}, path, "y", "t"), "'a'"),
        (lambda path: plots.images(np.zeros((2, 2)), path), "grid has shape"),
        (lambda path: plots.images(np.zeros((1, 2, 3, 3)), path, ["a"]), "1 titles for 2 images"),
    ],
)
def test_wrong_arrays_are_refused(draw, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "a.png")


def test_matplotlib_missing_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[plot\]"'):
        plots.curves({"a": [[1.0, 2.0]]}, tmp_path / "a.png", **LABELS)


def test_pyplot_is_never_imported(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from gradhpo.report import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.images(np.eye(8).reshape(1, 1, 8, 8), {str(tmp_path / 'a.png')!r}, ['eye'])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    source = Path(plots.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, timeout=120)
