"""Long commands show progress on stderr: a bar on a terminal, otherwise occasional lines."""

import re
import sys
from pathlib import Path

import pytest

from exactflow.cli import main
from exactflow.core import progress
from exactflow.core.progress import tracked
from exactflow.models import registry

SOURCES = Path(__file__).parents[1] / "src" / "exactflow"


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    registry.build("tarflow-tiny", image_shape=(1, 8, 8), levels=17).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "titles"),
    [
        (["evaluate", "--batch-size", "4", "data.limit=8"], ["scoring"]),
        (["inpaint", "--n", "1", "--steps", "4", "--draws", "1"], ["inpainting"]),
        (["outliers", "--n", "4", "--training", "4", "--outside", "photos"], ["scoring", "gradie"]),
    ],
)
def test_verbs_say_how_far_they_are(
    words: list[str],
    titles: list[str],
    flow: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    if "photos" in words:
        from PIL import Image

        (tmp_path / "photos").mkdir()
        for index in range(12):
            Image.new("L", (8, 8), 20 * index).save(tmp_path / "photos" / f"{index}.png")
    verb, *options = words
    argv = ["exactflow", verb, str(flow), *options, "data.source=digits", "--out", "out"]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    printed = capsys.readouterr()
    for title in titles:
        assert re.search(rf"^{title}.*: \d+ of \d+, .* left$", printed.err, re.MULTILINE)
    assert " left" not in printed.out


def test_items_pass_unchanged(capsys: pytest.CaptureFixture) -> None:
    assert list(tracked(iter("abc"), 3, "letters", shown=False)) == ["a", "b", "c"]
    assert list(tracked("abc", 3, "letters", shown=True)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_no_bar_goes_to_stdout() -> None:
    """By default rich writes bars to stdout, which may be redirected to a file."""
    for path in SOURCES.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"from rich\.progress import .*\btrack\b", text), path
        for call in re.findall(r"(?<!\w)Progress\((?:[^()]|\([^()]*\))*\)", text):
            if "transient" in call or "Column" in call:
                assert "console" in call, f"{path}: {call}"
