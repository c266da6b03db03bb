"""The command line as users see it: every verb, resuming, and errors in one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import exactflow
from processes import Command
from processes import call as cli

TINY = ["model.width=64", "model.blocks=2", "model.layers_per_block=1", "data.limit=64"]
FAST = ["training.steps=6", "training.warmup_steps=2", "training.batch_size=16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    cli("train", "tarflow-digits", *TINY, *FAST, "--out", "run", cwd=folder)
    return folder / "run"


def test_train_leaves_a_model_its_configuration_and_its_log(run: Path) -> None:
    assert {"model", "config.yaml", "metrics.jsonl", "samples", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    assert "bits_per_dim" in lines[-1]
    model = exactflow.from_pretrained(run)
    assert model.event_shape == (1, 8, 8)
    assert model.levels == 17
    card = json.loads((run / "model" / "config.json").read_text())["card"]
    assert card["training data"]["id"] == "digits"
    assert len(card["training data"]["fingerprint"]) == 64
    assert card["validation"]["kind"] == "dequantized"
    assert card["cost"]["steps"] == 6


def test_the_same_command_again_changes_nothing(run: Path) -> None:
    before = (run / "model" / "model.safetensors").read_bytes()
    cli("train", "tarflow-digits", *TINY, *FAST, "--out", "run", cwd=run.parent)
    assert (run / "model" / "model.safetensors").read_bytes() == before
    cli("train", "--config", run / "config.yaml", "--out", "again", cwd=run.parent)
    again = load_file(run.parent / "again" / "model" / "model.safetensors")
    for name, value in load_file(run / "model" / "model.safetensors").items():
        assert torch.equal(again[name], value), name


def test_the_model_follows_the_data(tmp_path: Path) -> None:
    cli("train", "tarflow-tiny", *TINY, *FAST, "--out", "run", cwd=tmp_path)
    assert exactflow.from_pretrained(tmp_path / "run").event_shape == (1, 8, 8)
    words = ["model.num_classes=1", "model.image_shape=[3,8,8]"]
    done = cli("train", "tarflow-tiny", *words, "--out", "x", cwd=tmp_path, fails=True)
    assert "(3, 8, 8)" in done.stderr


def test_sample_writes_pictures_and_their_cost(run: Path, tmp_path: Path) -> None:
    cli("sample", run, "--n", 3, "--seed", 5, "--trace", "--out", "s", cwd=tmp_path)
    names = {path.name for path in (tmp_path / "s").iterdir()}
    seeds = {f"seed_{seed:06d}.png" for seed in (5, 6, 7)}
    assert names == {"samples.png", "samples.json", "trace.png", *seeds}
    cost = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert cost["seeds"] == [5, 6, 7]
    assert cost["evaluations"] == sum(cost["iterations"]) == 2 * 16
    assert max(cost["certificate"]) < 1e-3
    assert Image.open(tmp_path / "s" / "seed_000005.png").size == (8, 8)
    one = cli("sample", run, "--n", 1, "--seed", 6, "--out", "t", cwd=tmp_path)
    assert "1 samples" in one.stdout
    same = (tmp_path / "t" / "seed_000006.png").read_bytes()
    assert same == (tmp_path / "s" / "seed_000006.png").read_bytes()


def test_evaluate_names_everything_a_number_depends_on(run: Path, tmp_path: Path) -> None:
    done = cli("evaluate", run, "--k", 2, "--out", "e.json", "data.limit=20", cwd=tmp_path)
    assert "bits/dim" in done.stdout
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["kind"] == "dequantized"
    assert result["k"] == 2
    assert result["levels"] == 17
    assert result["images"] == len(result["nats_per_image"]) == 20
    assert result["standard_error"] > 0
    assert result["data"]["split"] == "test"
    assert len(result["data"]["fingerprint"]) == 64


def test_encode_reconstructs_and_interpolates(run: Path, tmp_path: Path) -> None:
    cli("encode", run, "--n", 3, "--steps", 4, "--out", "e", cwd=tmp_path)
    summary = json.loads((tmp_path / "e" / "encode.json").read_text())
    assert summary["wrong_grey_levels"] == 0
    assert max(summary["max_error"]) < 1e-4
    latents = load_file(tmp_path / "e" / "latents.safetensors")
    assert latents["z"].shape == (3, 16, 4)
    assert (tmp_path / "e" / "interpolation.png").exists()
    assert (tmp_path / "e" / "reconstruction.png").exists()


def test_convert_reads_a_published_file(tmp_path: Path, golden: Path) -> None:
    file = golden / "tarflow" / "uncond.pth"
    cli("convert", file, "model", "--noise-std", 0.05, cwd=tmp_path)
    assert exactflow.from_pretrained(tmp_path / "model").num_parameters == 441_472
    done = cli("sample", "model", "--n", 2, cwd=tmp_path)
    assert "2 samples" in done.stdout
    done = cli("evaluate", "model", cwd=tmp_path, fails=True)
    assert "data.source" in done.stderr


@pytest.mark.slow
def test_info(run: Path, tmp_path: Path) -> None:
    listed = cli("info", cwd=tmp_path).stdout
    assert "460,142,784" in listed
    described = cli("info", "tarflow-tiny", cwd=tmp_path).stdout
    for section in ("model:", "training:", "data:", "run:"):
        assert section in described
    assert "fingerprint" in cli("info", run, cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "tarflow-digitz"], "did you mean 'tarflow-digits'"),
        (["train", "tarflow-digits", "training.stesp=3"], "did you mean 'steps'"),
        (["train", "tarflow-digits", "data.source=/nowhere"], "/nowhere"),
        (["sample", "nowhere"], "no such folder"),
        (["convert", "no.pth", "out"], "no such file"),
        (["info", "tarflow-tini"], "did you mean 'tarflow-tiny'"),
        (["smaple"], "sample"),
        (["train", "--out", "x", "trainig.steps=3", "tarflow-digits"], "did you mean 'training'"),
        (["results", "training.steps=3"], "takes no settings"),
        (["info", "training.steps=3"], "expected a preset"),
        (["cost", "tarflow-tiny", "--gpus", "7"], "7 processes"),
        (["cost", "tarflow-tiny", "--memory", "-1"], "--memory: expected more than 0"),
        (["sample", "x", "--seeed", "3"], "--seed"),
    ],
)
def test_errors_are_one_message_without_a_traceback(words: list, message: str, tmp_path) -> None:
    done = cli(*words, cwd=tmp_path, fails=True)
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['exactflow', 'train', '--help']\n"
        "from exactflow.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PRESET" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_does(signum: int, tmp_path: Path) -> None:
    long = [*TINY, "training.steps=4000", "training.log_every=1", "training.batch_size=8"]
    words = ["-m", "exactflow", "train", "tarflow-digits", *long, "--out", "run"]
    log = tmp_path / "run" / "metrics.jsonl"

    def steps() -> list[int]:
        whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
        return [json.loads(line)["step"] for line in whole.splitlines()]

    first = Command(*words, cwd=tmp_path)
    first.wait_until(lambda: len(steps()) > 3)
    os.kill(first.pid, signum)
    said = first.end()
    assert said.returncode == 128 + signum, said
    assert "run the same command to resume" in said.stderr
    assert "Traceback" not in said.stderr
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert saved
    again = Command(*words, cwd=tmp_path)
    reached = int(saved[-1].name.split("_")[1])
    again.wait_until(lambda: steps()[-1] > reached + 2)
    os.kill(again.pid, signal.SIGINT)
    again.end()
    assert steps() == list(range(1, steps()[-1] + 1)), "the log goes on without a gap"
