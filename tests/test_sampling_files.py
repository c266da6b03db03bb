"""What `exactflow sample` reads beside a model: a guiding classifier, images to enlarge."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import exactflow
from exactflow.core import grey_levels as grey
from exactflow.models.diffusion.classifier import ClassifierConfig, ClassifierUNet
from exactflow.models.diffusion.openai import to_published
from processes import call

SMALL = {"image_shape": (3, 4, 4), "diffusion_steps": 4}
CLASSIFIER = ClassifierConfig(
    image_size=8,
    num_classes=3,
    model_channels=64,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_factors=(1,),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chain of images of 8x8 pixels, one of 4x4, an upsampler from these, and a classifier."""
    torch.manual_seed(0)
    plain = exactflow.build("iddpm-tiny", diffusion_steps=4)
    plain.save_pretrained(tmp_path / "plain")
    exactflow.build("iddpm-tiny", **SMALL).save_pretrained(tmp_path / "small")
    larger = exactflow.build("iddpm-tiny", diffusion_steps=4, low_size=4)
    for model in (plain, larger):
        with torch.no_grad():
            for parameter in model.parameters():  # what comes last begins at zero
                parameter.add_(0.02 * torch.randn_like(parameter))
    larger.save_pretrained(tmp_path / "larger")
    torch.save(to_published(ClassifierUNet(CLASSIFIER)), tmp_path / "classifier.pt")
    return tmp_path


def drawn(folder: Path) -> torch.Tensor:
    """The samples that a call wrote, by seed."""
    files = sorted(folder.glob("seed_*.png"))
    return grey.as_tensor([Image.open(file) for file in files], (3, 8, 8))


def test_a_published_classifier_guides(folder: Path) -> None:
    words = ("sample", "plain", "--n", 2, "--classifier", "classifier.pt", "--guidance", 300)
    call(*words, "--label", 1, "--out", "one", cwd=folder)
    call(*words, "--label", 2, "--out", "two", cwd=folder)
    classifier = exactflow.load_classifier(folder / "classifier.pt")
    expected = exactflow.sample(
        exactflow.from_pretrained(folder / "plain"),
        2,
        1,
        guidance=exactflow.ClassifierGuidance(classifier, 300.0),
    )
    assert torch.equal(drawn(folder / "one"), expected.images)
    assert not torch.equal(drawn(folder / "one"), drawn(folder / "two"))
    record = json.loads((folder / "one" / "samples.json").read_text())
    assert (record["classifier"], record["label"]) == ("classifier.pt", [1, 1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--classifier", "classifier.pt"), "guidance needs labels to guide to"),
        (("--classifier", "classifier.pt", "--label", "3"), "the classifier has no class '3'"),
        (("--classifier", "nowhere.pt", "--label", "1"), "nowhere.pt: no such file"),
        (("--classifier", "plain/config.json", "--label", "1"), "plain/config.json"),
        (("--low", "nowhere"), "nowhere/seed_000000.png"),
    ],
)
def test_files_that_do_not_help(words: tuple[str, ...], message: str, folder: Path) -> None:
    said = call("sample", "plain", "--n", 1, *words, cwd=folder, fails=True)
    assert said.returncode == 1
    assert re.search(message, said.stderr), said.stderr


def test_samples_of_a_small_model_are_enlarged(folder: Path) -> None:
    call("sample", "small", "--n", 3, "--seed", 5, cwd=folder)
    small = folder / "runs" / "small" / "sampled"
    small = small if small.is_dir() else folder / "small" / "sampled"
    words = ("sample", "larger", "--low", small, "--out", "large")
    call(*words, "--n", 2, "--seed", 6, cwd=folder)
    images = [Image.open(small / f"seed_{seed:06d}.png") for seed in (6, 7)]
    low = grey.center(grey.as_tensor(images, (3, 4, 4)), 256)
    expected = exactflow.sample(
        exactflow.from_pretrained(folder / "larger"),
        2,
        seed=6,
        options=exactflow.SamplingOptions(low=low),
    )
    assert torch.equal(drawn(folder / "large"), expected.images)
    said = call(*words[:-1], "other", "--n", 2, "--seed", 7, cwd=folder, fails=True)
    assert "seed_000008.png" in said.stderr
    said = call("sample", "larger", "--n", 2, "--seed", 6, cwd=folder, fails=True)
    assert "(2, 3, 4, 4)" in said.stderr
