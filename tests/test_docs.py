"""Every command and example of the README is executed, training shortened to some steps."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = ["training.steps=12", "training.warmup_steps=4", "training.batch_size=16", "run.samples=4"]
SLOW_VERBS = ("train", "demo")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def run(words: list[str], cwd: Path) -> None:
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A newcomer's folder, with photographs of their own."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 36, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "photos" / f"{index}.png")
    return folder


def test_make_targets_are_the_two_commands() -> None:
    targets = {words[1] for words in commands() if words[0] == "make"}
    assert targets == {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "exactflow demo" in makefile


def test_commands_and_python_example(folder: Path) -> None:
    exactflow = [sys.executable, "-m", "exactflow"]
    run([*exactflow, "demo", "run.evaluate_every=6", *SHORT], folder)
    report = (folder / "runs" / "demo" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4
    for part in ("TarFlow", "full-covariance Gaussian", "independent pixels", "fingerprint"):
        assert part in report
    seen = set()
    for words in commands():
        if words[0] == "make":
            continue
        assert words[0] == "exactflow", words
        seen.add(words[1])
        run([*exactflow, *words[1:], *(SHORT if words[1] in SLOW_VERBS else [])], folder)
    assert seen == {"info", "train", "evaluate", "sample", "plan", "convergence", "encode"}
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 12
    run([sys.executable, "-c", example], folder)
    assert (folder / "runs" / "fresh" / "model.safetensors").exists()


def test_links_and_pictures_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "docs/BENCHMARKS.md", "docs/LOG.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"
