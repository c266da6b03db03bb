"""Run every command and example of the README and of docs/, shortened to a few steps.

Pages share one folder, in which `exactflow demo` has been run; no command is run twice. Commands in
blocks marked ```bash parse-only are parsed and not run.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import exactflow
from exactflow.cli import arguments, early, main, running
from exactflow.likelihood import log_likelihood as scoring
from exactflow.models import registry
from exactflow.paths.ode import Midpoint
from exactflow.sampling import planner
from flows import blueprint
from processes import run
from test_prepare import samples, tar

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
VERBS = set(arguments.VERBS)
BLOCK = re.compile(r"^```(bash|python)( parse-only)?\n(.*?)^```", re.MULTILINE | re.DOTALL)

TRAINING = ["training.steps=12", "training.warmup_steps=4", "training.batch_size=16"]
SHORT = {  # what is appended to the commands of a verb
    "train": [*TRAINING, "run.samples=4"],
    "demo": [*TRAINING, "run.samples=4", "run.evaluate_every=6"],
    "evaluate": ["data.limit=16"],
    "classify": ["--n", "16", "--calibrate-on", "16"],
    "outliers": ["--n", "16", "--training", "16"],
    "inpaint": ["--steps", "6"],
}
ELSEWHERE = {("info",)}  # builds all presets: tests/test_cli.py


@dataclass
class Newcomer:
    """A user who types the commands of the pages, in a folder with photographs."""

    folder: Path
    typed: set[tuple[str, ...]] = field(default_factory=set)

    def types(self, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Run a command of exactflow unless it was run before."""
        command = tuple(words)
        if command in self.typed | ELSEWHERE:
            return
        self.typed.add(command)
        monkeypatch.setattr(sys, "argv", ["exactflow", *words, *SHORT.get(words[0], [])])
        try:
            main()
        except SystemExit as stop:
            pytest.fail(f"{shlex.join(sys.argv)} ended with {stop.code}, see stderr")

    def launches(self, words: list[str]) -> None:
        """Run a command of exactflow in two processes."""
        words = ["-m", "exactflow", *words, *SHORT.get(words[0], [])]
        said = run(*words, cwd=self.folder, torchrun=2)
        assert said.returncode == 0, f"{shlex.join(words)}\n{said.stderr[-3000:]}"


def blocks(page: Path) -> list[tuple[str, bool, str]]:
    """(language, parse only, text) of every block of a page that can be run."""
    return [(found[1], bool(found[2]), found[3]) for found in BLOCK.finditer(page.read_text())]


def commands(text: str) -> list[list[str]]:
    lines = os.path.expandvars(text.replace("\\\n", " ")).splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 36, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "photos" / f"{index}.png")
    for first, name in ((0, "train-0"), (10, "train-1"), (20, "val-0")):
        tar(folder / "shards" / f"{name}.tar", samples(pixels[first : first + 10], first))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        newcomer = Newcomer(folder)
        newcomer.types(["demo"], patch)
    return newcomer


@pytest.mark.slow
def test_the_demo_leaves_a_report(newcomer: Newcomer) -> None:
    report = (newcomer.folder / "runs" / "demo" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4
    for part in ("TarFlow", "full-covariance Gaussian", "independent pixels", "fingerprint"):
        assert part in report


@pytest.mark.slow
def test_examples_run(newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the pages, since a page may use files of an earlier one."""
    monkeypatch.chdir(newcomer.folder)
    monkeypatch.setenv("PWD", str(newcomer.folder))
    monkeypatch.setattr(planner, "ENOUGH", 0.01)  # seconds of timing: the choice is not tested
    coarse = scoring.Effort(solver=Midpoint(4))  # nor is the number
    monkeypatch.setattr(scoring, "FULL", coarse)
    for page, name in zip(PAGES, NAMES, strict=True):
        try:
            follow(page, newcomer, monkeypatch)
        except BaseException as error:
            error.add_note(f"in an example of {name}")
            raise


def follow(page: Path, newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every example of a page."""
    namespace = {"__name__": "example"}  # of all examples of the page
    for language, parse_only, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), namespace)
            continue
        for words in commands(text):
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:.*##", (ROOT / "Makefile").read_text(), re.M)
                continue
            launched = words[0] == "torchrun"
            if launched:
                words = words[words.index("-m") + 1 :]
            assert words[0] == "exactflow", words
            if parse_only:
                parse(words[1:], monkeypatch)
            elif launched:
                newcomer.launches(words[1:])
            else:
                newcomer.types(words[1:], monkeypatch)


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command as `exactflow` does, without running it."""
    taken = []
    with monkeypatch.context() as patch:
        verb = SimpleNamespace(run=taken.append)
        patch.setattr(running, "import_module", lambda _: verb)
        patch.setattr(early, "answered", lambda _: False)  # files that are not there
        patch.setattr(sys, "argv", ["exactflow", *words])
        main()
    assert [type(command) for command in taken] == [arguments.VERBS[words[0]]]


def test_the_two_commands_of_the_readme() -> None:
    found = [words for _, _, text in blocks(PAGES[0]) for words in commands(text)]
    assert {words[1] for words in found if words[0] == "make"} == {"demo", "test"}
    assert "exactflow demo" in (ROOT / "Makefile").read_text()
    (example,) = (text for language, _, text in blocks(PAGES[0]) if language == "python")
    assert len(example.strip().splitlines()) <= 12


def test_every_verb_is_explained_with_an_example() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    sections = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    explained = dict(zip(sections[::2], sections[1::2], strict=True))
    assert set(explained) == VERBS
    for verb, section in explained.items():
        assert re.search(rf"^```bash.*?^exactflow {verb}\b", section, re.M | re.S), verb


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_every_family_has_a_page_with_its_presets(family: str) -> None:
    presets = registry.FAMILIES[family].presets
    pages = [page for page in PAGES if page.parent.name == "models"]
    (text,) = (p.read_text() for p in pages if all(f"| `{n}` |" in p.read_text() for n in presets))
    for name, preset in presets.items():
        if not preset.published:  # the counts of published ones are tested with their families
            model = blueprint(name)
            shape = "x".join(map(str, model.event_shape))
            assert f"| `{name}` | {shape} | {model.num_parameters:,} |" in text


def test_every_public_name_is_in_the_api() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    for name in exactflow._HOMES:
        assert re.search(rf":: exactflow\.{name}$", text, re.MULTILINE), name


def test_measured_numbers_of_the_model_pages_are_recorded() -> None:
    sources = ("README.md", "docs/BENCHMARKS.md", "docs/LOG.md", "docs/comparison.md")
    recorded = "".join((ROOT / name).read_text() for name in sources)
    for page in (ROOT / "docs" / "models").glob("*.md"):
        for number in re.findall(r"\d+\.\d+ ± \d+\.\d+", page.read_text()):
            assert number in recorded, f"{page.name}: {number}"


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=["CONTRIBUTING", *NAMES])
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(page)):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sphinx") is None, reason="needs the extra `docs`")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    done = subprocess.run(
        [*build, "-d", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in PAGES[1:]}
    assert all((tmp_path / "site" / page).exists() for page in pages)
