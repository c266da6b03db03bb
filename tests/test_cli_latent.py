"""The commands that need a density or a latent, as users see them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exactflow.cli import main
from exactflow.models import registry
from processes import call

pytestmark = pytest.mark.slow  # two models are trained
VERBS = ("attributes", "classify", "outliers", "inpaint", "denoise")
SMALL = ["model.width=64", "model.blocks=2", "model.layers_per_block=1"]
FAST = ["training.steps=120", "training.warmup_steps=20", "training.batch_size=32"]
CONDITIONAL = ["train", "tarflow-digits", "model.num_classes=10", *SMALL, *FAST]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a conditional flow, one trained with Gaussian noise, and photographs."""
    home = tmp_path_factory.mktemp("latent")
    for name, words in (("run", []), ("noisy", ["model.noise_std=0.3"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                sys, "argv", ["exactflow", *CONDITIONAL, *words, "--out", str(home / name)]
            )
            main()
    (home / "photos").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 30, 20, 3))):
        Image.fromarray(pixels.astype(np.uint8)).save(home / "photos" / f"{index}.png")
    for name in ("tarflow-tiny", "iddpm-tiny", "denseflow-tiny"):
        registry.build(name).save_pretrained(home / name)
    flat = registry.build("tarflow-tiny", image_shape=(3, 30, 20), patch_size=10)
    flat.save_pretrained(home / "not-square")
    return home


@pytest.fixture
def cli(home: Path):
    """Runs one command in that folder: its exit status, and what it printed, on one line."""

    def run(*words: object) -> tuple[int, str]:
        said = call(*words, cwd=home, fails=None)
        return said.returncode, " ".join((said.stdout + said.stderr).split())

    return run


def left(home: Path, out: str, name: str) -> dict:
    """The JSON that a command wrote, after a check of its pictures."""
    for picture in (home / out).glob("*.png"):
        assert min(Image.open(picture).size) > 100, picture
    return json.loads((home / out / name).read_text())


def test_classify_is_better_than_chance_and_says_on_what(home: Path, cli) -> None:
    status, printed = cli("classify", "run", "--out", "c")
    assert status == 0, printed
    assert {path.name for path in (home / "c").iterdir()} == {"classify.json", "classify.png"}
    found = left(home, "c", "classify.json")
    assert found["data"]["split"] == "test"
    assert found["calibrated_on"]["split"] == "validation"
    assert found["prior"] == "uniform"
    before, after = found["uncalibrated"], found["calibrated"]
    assert before["accuracy"] == after["accuracy"] > 0.2, "chance is 0.1"
    assert after["negative_log_likelihood"] < np.log(10), "worse than knowing nothing"
    assert np.sum(found["confusion"]) == after["images"] == found["data"]["count"]
    assert np.trace(found["confusion"]) == round(after["accuracy"] * after["images"])
    assert f"{after['accuracy']:.4f}" in printed


def test_labels_against_the_prior_lower_the_temperature(home: Path, cli) -> None:
    prior = [1.0, *[1e-300] * 9]
    words = ["--n", 9, "--calibrate-on", 30, "--prior", *prior, "--out", "p"]
    status, printed = cli("classify", "run", *words)
    assert status == 0, printed
    found = left(home, "p", "classify.json")
    assert found["uncalibrated"]["images"] == 9
    assert found["prior"] == prior
    assert found["temperature"] < 0.05


def test_attributes_moves_images_and_gives_them_back(home: Path, cli) -> None:
    words = ["--n", 3, "--strengths", -1, 0, 1, "--learn-from", 200, "--out", "a"]
    status, printed = cli("attributes", "run", 8, *words)
    assert status == 0, printed
    found = left(home, "a", "attributes.json")
    assert {path.name for path in (home / "a").iterdir()} == {"attributes.json", "attributes.png"}
    assert found["attribute"] == "8"
    assert found["strengths"] == [-1, 0, 1]
    assert found["direction_from"]["data"]["split"] == "train"
    assert found["direction_from"]["data"]["count"] == 200
    assert 0 < found["direction_from"]["with_attribute"] < 200
    assert len(found["images"]) == found["reconstruction"]["images"] == 3
    assert found["reconstruction"]["wrong_grey_levels"] == 0
    assert found["reconstruction"]["largest"] < 1e-3
    assert len(found["certificate"]) == 3
    assert max(found["certificate"]) < 1e-3


def test_outliers_tells_photographs_from_digits(home: Path, cli) -> None:
    words = ["--outside", "photos", "--n", 40, "--training", 60, "--out", "o"]
    status, printed = cli("outliers", "run", *words, "data.limit=50")
    assert status == 0, printed
    names = {path.name for path in (home / "o").iterdir()}
    assert names == {"outliers.json", "outliers.png", "images.png"}
    found = left(home, "o", "outliers.json")
    assert (found["inside"]["count"], found["inside"]["split"]) == (40, "test")
    assert (found["training"]["count"], found["training"]["split"]) == (50, "train")
    assert (found["outside"]["count"], found["outside"]["id"]) == (12, "photos")
    assert found["outside"]["shape"] == found["inside"]["shape"]
    assert "stretched to 17" in found["outside"]["preprocessing"]
    log_likelihood = found["scores"]["log-likelihood"]
    assert log_likelihood["auroc"] > 0.99
    assert log_likelihood["mean_outside"] > log_likelihood["mean_inside"]
    assert abs(found["typical_bits_per_dim"] - log_likelihood["mean_inside"]) < 1
    assert found["scores"]["PNG alone"]["auroc"] < 0.5, "they compress less than digits do"


def test_outliers_frames_the_other_set(home: Path, cli) -> None:
    words = ["--outside", "photos", "--border", 2, "--n", 20, "--training", 20, "--out", "b"]
    status, printed = cli("outliers", "run", *words)
    assert status == 0, printed
    assert "border of 2" in left(home, "b", "outliers.json")["outside"]["preprocessing"]


def test_inpaint_draws_missing_pixels(home: Path, cli) -> None:
    words = ["--n", 4, "--draws", 2, "--steps", 60, "--missing", "right", "--out", "i"]
    status, printed = cli("inpaint", "run", *words)
    assert status == 0, printed
    assert {path.name for path in (home / "i").iterdir()} == {"inpaint.json", "inpaint.png"}
    found = left(home, "i", "inpaint.json")
    assert found["labels"] == "true classes"
    assert found["missing_pixels"] == 32
    assert len(found["acceptance"]) == len(found["step_size"]) == len(found["log_density"]) == 8
    assert 0.1 < np.mean(found["acceptance"]) < 1
    quality = found["psnr_of_missing_pixels"]
    assert quality["mean of the draws"] > quality["a draw"], "the mean is never worse than a draw"
    assert f"{quality['a draw']:.2f} dB a draw" in printed


def test_denoise_takes_off_the_noise_it_was_trained_with(home: Path, cli) -> None:
    status, printed = cli("denoise", "noisy", "--n", 40, "--out", "d")
    assert status == 0, printed
    found = left(home, "d", "denoise.json")
    assert found["noise_std"] == 0.3
    assert found["images"] == 40
    assert abs(found["psnr_noisy"] - 10 * np.log10(4 / 0.3**2)) < 0.5
    assert found["psnr_denoised"] > found["psnr_noisy"] + 1
    assert found["images_improved"] > 36
    assert f"{found['psnr_denoised']:.2f} dB" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["classify", "tarflow-tiny", "data.source=digits"], "conditional model"),
        (["classify", "run", "--prior", "1", "2"], "prior probability for each of 10 classes"),
        (["classify", "run", "--split", "validation"], "invalid choice 'validation'"),
        (["classify", "run", "data.source=photos"], "photos has (3, 30, 20)"),
        (["attributes", "run", "eight"], "digits has no class 'eight'"),
        (["attributes", "run", "10"], "digits has no class '10'"),
        (["attributes", "run", "8", "--learn-from", "0"], "limit: expected > 0"),
        (["attributes", "run", "8", "--strengths"], "expected strengths"),
        (["attributes", "not-square", "1", "data.source=photos"], "photos has no labels"),
        (["attributes", "iddpm-tiny", "1"], "expected a flow, got a model of kind 'diffusion'"),
        (["outliers", "run"], "other than the model's own, digits"),
        (["outliers", "run", "--outside", "nowhere"], "nowhere"),
        (["outliers", "run", "--outside", "photos", "--border", "4"], "border of 0 .. 3 pixels"),
        (["outliers", "not-square", "data.source=photos"], "square images"),
        (["outliers", "noisy", "--outside", "photos"], "trained with Gaussian noise"),
        (["outliers", "denseflow-tiny"], "'denseflow', whose likelihood is of kind 'bound'"),
        (["inpaint", "iddpm-tiny"], "'diffusion', whose likelihood is of kind 'bound'"),
        (["denoise", "run"], "needs a model trained with Gaussian noise"),
        (["inpaint", "run", "--n", "0"], "n >= 1"),
        (["inpaint", "run", "--draws", "0"], "draws >= 1"),
        (["inpaint", "run", "--steps", "1"], "steps >= 2"),
        (["inpaint", "tarflow-tiny"], "data.source"),
    ],
)
def test_errors_are_one_message_that_leaves_nothing(
    words: list[str], message: str, home: Path, cli
) -> None:
    before = set(home.rglob("*"))
    status, printed = cli(*words, "--out", "nothing")
    assert status != 0, printed
    assert message in printed
    assert set(home.rglob("*")) == before


def test_wrong_number_of_classes_is_an_error(tmp_path: Path, cli) -> None:
    words = ["train", "tarflow-digits", *SMALL, "model.num_classes=5", "training.steps=2"]
    status, printed = cli(*words, "--out", tmp_path / "five")
    assert status == 1
    assert "the model has 5 classes, the data have 10" in printed


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom exactflow.cli import main\n"
        f"for verb in {VERBS}:\n"
        "    sys.argv = ['exactflow', verb, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"exactflow {verb}" in done.stdout
    assert done.stdout.count("MODEL") >= len(VERBS)
    assert "CLASS" in done.stdout
