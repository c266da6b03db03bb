"""Comparisons: separate kinds, costs, kept results, refusals, resuming after a kill."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exactflow
from exactflow.comparison import comparison, protocol
from exactflow.comparison.protocol import Contender, Failure, Protocol
from exactflow.comparison.report import KINDS, Report
from exactflow.core.density_flow import FittedFlow
from exactflow.core.model import GenerativeModel, NonFiniteError
from exactflow.data import DataConfig, ImageDataset, load
from exactflow.data.passes import ImagePasses
from exactflow.likelihood.bound import chain_bound
from exactflow.likelihood.log_likelihood import log_likelihood
from exactflow.likelihood.ode_estimate import ode_log_likelihood
from exactflow.metrics.extractors import pixels
from exactflow.paths.ode import Midpoint
from flows import perturb
from processes import Command, Said, call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*for the covariance of"),  # few images are meant
]
SMALL = Protocol(
    images=20,
    estimate_images=6,
    bound_evaluations=4,
    ode_steps=2,
    samples=20,
    evaluations=(4, 2),
    curve_samples=18,
)
KIND = {
    "whitening": "dequantized",
    "tarflow": "dequantized",
    "denseflow": "bound",
    "iddpm": "bound",
    "flow-matching": "estimate",
    "hdit": "estimate",
}


@pytest.fixture(scope="module")
def splits() -> tuple[ImageDataset, ImageDataset]:
    config = DataConfig("digits", limit=160)
    return load(config, "train"), load(config, "test")


def model_of(name: str, training: ImageDataset, **fields: Any) -> GenerativeModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fields = {"image_shape": (1, 8, 8), "levels": 17, **fields}
        model = exactflow.build(f"{name}-tiny", **fields)
    if isinstance(model, FittedFlow):
        model.fit(ImagePasses(training, 64), seed=0, report=None)
    return model.eval()


@pytest.fixture(scope="module")
def models(splits: tuple[ImageDataset, ImageDataset]) -> dict[str, GenerativeModel]:
    return {name: model_of(name, splits[0]) for name in KIND}


@pytest.fixture(scope="module")
def done(
    models: dict[str, GenerativeModel],
    splits: tuple[ImageDataset, ImageDataset],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("comparison")
    options: dict[str, Any] = {"extractor": pixels(16), "protocol": SMALL}
    return exactflow.compare(models, splits, folder, **options), folder


def by_name(report: Report) -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in report.results}


def without_costs(report: dict[str, Any]) -> dict[str, Any]:
    """The part of a report's JSON that must be the same in every run."""
    kept = json.loads(json.dumps(report))
    kept.pop("setting")
    for result in kept["results"]:
        result.pop("memory")
        for name in ("seconds", "step_seconds", "peak_memory"):
            result["training"].pop(name, None)
        for point in result["curve"]:
            point.pop("step_seconds")
        result["likelihood"].pop("seconds_per_image")
        for samples in (result["samples"], *result["other_steps"]):
            samples.pop("seconds_per_sample")
    return kept


def test_every_likelihood_stands_in_the_column_of_its_kind_alone(
    done: tuple[Report, Path],
) -> None:
    report, _ = done
    table = report.tables()[0]
    columns = [table.header.index(title) for title in KINDS.values()]
    for row in table.rows:
        filled = [list(KINDS)[i] for i, column in enumerate(columns) if row[column]]
        assert filled == [KIND[row[0]]], row


def test_likelihoods_are_those_of_the_verbs(
    done: tuple[Report, Path],
    models: dict[str, GenerativeModel],
    splits: tuple[ImageDataset, ImageDataset],
) -> None:
    held_out = splits[1]

    def images(count: int) -> torch.Tensor:
        rows = np.linspace(0, len(held_out) - 1, count).astype(int)
        return torch.from_numpy(np.array(held_out.images[rows]))

    found = {name: result["likelihood"] for name, result in by_name(done[0]).items()}
    many, few = images(SMALL.images), images(SMALL.estimate_images)
    direct = log_likelihood(models["tarflow"], many).bits_per_dim
    assert found["tarflow"]["bits_per_dim"] == pytest.approx(direct, rel=1e-6)
    nats = chain_bound(models["iddpm"], many, evaluations=4).likelihood.nats
    assert found["iddpm"]["bits_per_dim"] == pytest.approx(float(-nats.mean()) / 64 / np.log(2))
    nats = ode_log_likelihood(models["hdit"], few, solver=Midpoint(2)).nats
    assert found["hdit"]["bits_per_dim"] == pytest.approx(float(-nats.mean()) / 64 / np.log(2))
    assert found["hdit"]["images"] == 6
    for likelihood in found.values():
        assert likelihood["standard_error"] > 0
        assert likelihood["seconds_per_image"] > 0


def test_cost_and_quality_of_samples(done: tuple[Report, Path]) -> None:
    report, _ = done
    results = by_name(report)
    for name, result in results.items():
        samples = result["samples"]
        assert samples["count"] == 20
        assert samples["frechet"] > 0
        assert samples["evaluations"] >= 1
        assert 0 <= samples["precision"] <= 1
        assert len(result["other_steps"]) == (1 if KIND[name] == "estimate" else 0) or (
            name == "iddpm"
        )
        assert result["parameters"] > 0
    assert results["flow-matching"]["samples"]["evaluations"] == 4
    assert results["flow-matching"]["other_steps"][0]["evaluations"] == 2
    assert results["iddpm"]["samples"]["solver"] == "ddim"
    assert results["denseflow"]["samples"]["evaluations"] == 1
    assert report.floor["memorised"] == 1.0  # they are training images
    assert all(report.floor["frechet"] < result["samples"]["frechet"] for result in report.results)


def test_the_report_is_written_in_three_forms(done: tuple[Report, Path]) -> None:
    report, folder = done
    described = json.loads((folder / "report.json").read_text())
    assert described["held_out"]["fingerprint"] == report.held_out["fingerprint"]
    assert described["extractor"] == "dct-16"
    page = (folder / "report.html").read_text()
    text = (folder / "report.md").read_text()
    for name in KIND:
        assert f"<td>{name}</td>" in page
        assert f"| {name} |" in text
    assert report.held_out["fingerprint"][:12] in page
    assert "FD-dct-16" in page
    assert page.count("data:image/png;base64,") == 3  # no curve of a training: none was watched
    assert "http" not in page.replace("http-equiv", "")
    for name in ("samples", "nearest", "quality"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in text


def test_nothing_is_measured_twice(
    done: tuple[Report, Path],
    models: dict[str, GenerativeModel],
    splits: tuple[ImageDataset, ImageDataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, folder = done

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(protocol, "sample", refuse)
    monkeypatch.setattr(comparison, "scored", refuse)
    again = exactflow.compare(models, splits, folder, extractor=pixels(16), protocol=SMALL)
    assert again.describe()["results"] == report.describe()["results"]
    changed = {"tarflow": model_of("tarflow", splits[0], width=128)}
    with pytest.raises(AssertionError, match="measured again"):
        exactflow.compare(changed, splits, folder, extractor=pixels(16), protocol=SMALL)


def test_numbers_do_not_depend_on_batches(
    done: tuple[Report, Path],
    models: dict[str, GenerativeModel],
    splits: tuple[ImageDataset, ImageDataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (comparison, protocol):
        monkeypatch.setattr(module, "CHUNK", 7)
    again = exactflow.compare(models, splits, tmp_path, extractor=pixels(16), protocol=SMALL)
    for name, result in by_name(again).items():
        before = by_name(done[0])[name]
        for part, key in (("likelihood", "bits_per_dim"), ("samples", "frechet")):
            assert result[part][key] == pytest.approx(before[part][key], rel=1e-4), (name, part)


def test_a_noisy_density_has_no_number_and_says_so(
    splits: tuple[ImageDataset, ImageDataset], tmp_path: Path
) -> None:
    noisy = model_of("tarflow", splits[0], noise_std=0.1)
    found = exactflow.compare(
        {"noisy": noisy}, splits, tmp_path, extractor=pixels(16), protocol=SMALL
    )
    (row,) = found.tables()[0].rows
    assert row[-1] == "none: noisy density"
    assert not any(row[found.tables()[0].header.index(title)] for title in KINDS.values())
    assert found.results[0]["likelihood"]["bits_per_dim"] is None


def test_a_model_that_is_not_finite_does_not_stop_the_others(
    models: dict[str, GenerativeModel], splits: tuple[ImageDataset, ImageDataset], tmp_path: Path
) -> None:
    broken = model_of("tarflow", splits[0])
    with torch.no_grad():
        next(broken.parameters()).fill_(float("inf"))
    entries = [
        Contender("broken", broken),
        Failure("gone", "in training, step 3 is not finite"),
        Contender("whitening", models["whitening"]),
    ]
    options: dict[str, Any] = {"extractor": pixels(16), "protocol": SMALL}
    found = exactflow.compare(entries, splits, tmp_path, **options)
    assert [result["name"] for result in found.results] == ["whitening"]
    assert set(found.failures) == {"broken", "gone"}
    text = (tmp_path / "report.md").read_text()
    assert "gone was not measured: in training, step 3 is not finite" in text
    assert "broken was not measured: " in text
    with pytest.raises(NonFiniteError, match="broken: "):
        exactflow.compare(entries[:2], splits, tmp_path / "none", **options)


def test_a_conditional_model_is_marked(
    splits: tuple[ImageDataset, ImageDataset], tmp_path: Path
) -> None:
    given = Contender("given", model_of("tarflow", splits[0], num_classes=10))
    found = exactflow.compare([given], splits, tmp_path, extractor=pixels(16), protocol=SMALL)
    assert "Given the class of the image: given." in found.tables()[0].note


def test_samples_of_a_contender_are_guided_as_it_says(
    splits: tuple[ImageDataset, ImageDataset], tmp_path: Path
) -> None:
    """A model of noisy images has a row of samples, without a likelihood."""
    model = model_of("tarflow", splits[0], num_classes=10, noise_std=0.1)
    perturb(model)
    entries = [Contender("plain", model), Contender("guided", model, guidance=2.0)]
    found = exactflow.compare(entries, splits, tmp_path, extractor=pixels(16), protocol=SMALL)
    plain, guided = found.results
    assert plain["samples"]["frechet"] != guided["samples"]["frechet"]
    assert "Guided towards the class of the sample: guided (2)." in found.tables()[1].note
    assert "denoised along the score: plain, guided." in found.tables()[1].note
    assert found.tables()[0].rows[0][-1] == "none: noisy density"
    drawn = exactflow.sample(model, 20, [k % 10 for k in range(20)], guidance=2.0, batch_size=20)
    images = np.load(next((tmp_path / "models" / "guided" / "samples").glob("*.npz")))["images"]
    assert np.array_equal(images, drawn.images.numpy())


def test_two_numbers_of_evaluations_that_take_the_same_steps_are_one_plan() -> None:
    model = exactflow.build("flow-matching-tiny")
    assert protocol.sampling_plans(model, Protocol(evaluations=(5, 4, 2))) == (
        ("heun", 2),
        ("heun", 1),
    )


def test_what_cannot_be_compared_is_refused(
    models: dict[str, GenerativeModel], splits: tuple[ImageDataset, ImageDataset], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"extractor": pixels(16), "protocol": SMALL}
    with pytest.raises(ValueError, match="expected models to compare, got none"):
        exactflow.compare({}, splits, tmp_path, **options)
    twice = [Contender("one", models["whitening"])] * 2
    with pytest.raises(ValueError, match="a name for each model, got 'one' twice"):
        exactflow.compare(twice, splits, tmp_path, **options)
    with pytest.raises(ValueError, match="the model takes images"):
        exactflow.compare({"large": exactflow.build("tarflow-tiny")}, splits, tmp_path, **options)
    with pytest.raises(ValueError, match="images: expected at least 2, got 1"):
        Protocol(images=1)
    with pytest.raises(ValueError, match="fixed grid"):
        Protocol(ode_solver="dopri5")
    with pytest.raises(ValueError, match="evaluations"):
        Protocol(evaluations=())


# ---- the command line ------------------------------------------------------------------------

WORDS = [
    *("--data", "digits", "--budget", "2e10flop", "data.limit=256", "protocol.images=8"),
    *("protocol.estimate_images=4", "protocol.samples=12", "protocol.curve_samples=8"),
    *("protocol.ode_steps=2", "protocol.bound_evaluations=2", "protocol.evaluations=[2]"),
]
CONTENDERS = ["whitening-tiny", "tarflow-digits", "flow-matching-digits"]


def compare(*words: str | Path, cwd: Path, fails: bool = False) -> Said:
    """Run `exactflow compare`; its output."""
    return call("compare", *words, cwd=cwd, fails=fails)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    said = compare(*CONTENDERS, *WORDS, "--out", "runs/compare", cwd=folder)
    assert "open runs/compare/report.html" in said.stdout
    return folder / "runs" / "compare"


def test_presets_are_trained_under_the_same_budget(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    results = {result["name"]: result for result in report["results"]}
    assert list(results) == CONTENDERS
    assert report["extractor"].startswith("cnn-digits-")
    assert report["setting"]["budget of a training"] == "2e+10 FLOP"
    for name in CONTENDERS[1:]:
        training = results[name]["training"]
        batch = training["flops_per_image"] * training["batch_size"]
        assert training["steps"] == max(1, int(2e10 / batch))
        assert results[name]["curve"]
    assert results["tarflow-digits"]["training"]["peak_memory"] > 0
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    model = exactflow.from_pretrained(finished / "models" / "tarflow-digits")
    assert model.event_shape == (1, 8, 8)


def test_a_finished_comparison_measures_nothing_again(finished: Path) -> None:
    kept = [path for name in ("*.json", "*/*.npz") for path in finished.glob(f"models/*/{name}")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    report = json.loads((finished / "report.json").read_text())
    compare(*CONTENDERS, *WORDS, "--out", finished, cwd=finished.parent)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    again = json.loads((finished / "report.json").read_text())
    assert again["results"] == report["results"]


def test_a_killed_comparison_goes_on(finished: Path, tmp_path: Path) -> None:
    """kill -9 as soon as the second model's training or measurement has begun, then the rest."""
    words = [*CONTENDERS, *WORDS, "--out", "out"]
    process = Command("-m", "exactflow", "compare", *words, cwd=tmp_path)
    begun = tmp_path / "out" / "models" / "tarflow-digits" / "budget.json"
    process.wait_until(begun.is_file)
    os.kill(process.pid, signal.SIGKILL)
    process.end()
    assert not (tmp_path / "out" / "report.json").exists()
    kept = tmp_path / "out" / "models" / "whitening-tiny" / "likelihood" / "identity.json"
    before = kept.stat().st_mtime_ns
    compare(*words, cwd=tmp_path)
    assert kept.stat().st_mtime_ns == before  # not measured again
    whole, resumed = (
        json.loads((folder / "report.json").read_text()) for folder in (finished, tmp_path / "out")
    )
    assert without_costs(resumed) == without_costs(whole)


def test_runs_and_model_folders_take_part(finished: Path, tmp_path: Path) -> None:
    run = finished / "models" / "tarflow-digits"
    compare(run, *WORDS, "--out", tmp_path, cwd=tmp_path)
    (found,) = json.loads((tmp_path / "report.json").read_text())["results"]
    whole = json.loads((finished / "report.json").read_text())["results"][1]
    assert found["likelihood"]["bits_per_dim"] == whole["likelihood"]["bits_per_dim"]
    assert found["training"]["images_seen"] == whole["training"]["images_seen"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tarflow-digit"], "unknown preset 'tarflow-digit'"),
        (["nowhere/at-all/x"], "no such folder"),
        (["tarflow-digits", "--budget", "5 minutes"], "such as 90s, 5m, 2h or 1e15flop"),
        (["tarflow-digits", "protocol.image=3"], "image"),
        (["RUN", "RUN/model"], "expected a name for each model"),
        (["RUN", "data.channels=1", "data.image_size=6"], "the model takes images"),
        (["OTHER"], "was trained on elsewhere, version 2"),
    ],
)
def test_bad_input_is_one_error_before_any_training(
    finished: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    run = finished / "models" / "tarflow-digits"
    other = tmp_path / "other"
    card = {"training data": {**load(DataConfig(), "train").describe(), "id": "elsewhere"}}
    card["training data"]["version"] = "2"
    exactflow.from_pretrained(run).save_pretrained(other, card=card)
    places = {"RUN": str(run), "OTHER": str(other)}
    words = [word.replace("RUN", places["RUN"]).replace("OTHER", places["OTHER"]) for word in words]
    said = compare("whitening-tiny", *words, "--out", "out", cwd=tmp_path, fails=True)
    assert said.returncode == 1
    (error,) = (line for line in said.stderr.splitlines() if line.startswith("error: "))
    assert message in error
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "out" / "models").exists()
