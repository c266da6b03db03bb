"""The benchmarks' baseline is the same model, and the programs run. No time is asserted: it depends
on the machine, while the agreement of both sides does not.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import exactflow
from exactflow.models import registry
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from test_data import write_idx

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SIZES = {"image_shape": (3, 8, 8), "patch_size": 2, "width": 64, "layers_per_block": 2}
CONFIGS = {
    "unconditional": TarFlowConfig(**SIZES, blocks=3),
    "conditional": TarFlowConfig(**SIZES, blocks=2, num_classes=3),
    "volume-preserving": TarFlowConfig(**SIZES, blocks=2, volume_preserving=True),
}


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    """Let benchmarks import each other as scripts do, and forget these modules afterwards."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    names = ("baseline", "measure", "tarflow", "sampling", "families", "gpu_solvers", "gpu")
    for name in (*names, "reversible", "ablation", "showcase", "compare"):
        sys.modules.pop(name, None)


def script(name: str) -> ModuleType:
    return __import__(name)


def perturbed(config: TarFlowConfig) -> TarFlow:
    model = script("tarflow").perturbed_model(config, torch.device("cpu"))
    if config.volume_preserving:
        model.get_buffer("variance").uniform_(0.5, 2.0)
    return model


def close(first: Tensor, second: Tensor) -> bool:
    return script("measure").relative_error(first, second) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_baseline_is_the_same_model(name: str) -> None:
    config = CONFIGS[name]
    model = perturbed(config)
    baseline = script("baseline").from_exactflow(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((4, *config.image_shape), generator=generator) * 2 - 1
    noise = torch.randn((4, config.num_tokens, config.token_dim), generator=generator)
    label = torch.tensor([0, 2, 1, 3]) if config.num_classes else None  # 3: dropped
    with torch.no_grad():
        z, log_abs_det = model.encode(x, label)
        their_z, their_log_abs_det = baseline.encode(x, label)
    assert close(their_z, z)
    if config.volume_preserving:
        assert not their_log_abs_det.any()
    else:
        assert close(their_log_abs_det, log_abs_det)
        assert (
            float(log_abs_det.abs().min()) > 0.1
        )  # weights are perturbed: the test says something
    assert close(baseline.sample(noise, label), model.decode(model.prior.from_noise(noise), label))


@pytest.mark.parametrize("name", ["unconditional", "conditional"])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_baseline_guides_alike(name: str, schedule: str) -> None:
    model = perturbed(CONFIGS[name])
    baseline = script("baseline").from_exactflow(model)
    label = [0, 1, 2] if model.num_classes else None
    rule = exactflow.Guidance(1.5, schedule=schedule, temperature=1.0 if label else 0.5)
    ours = exactflow.sample(model, 3, label, guidance=rule)
    z = script("tarflow").latents(model.config, 3, torch.device("cpu"))
    theirs = baseline.decode(
        z,
        None if label is None else torch.tensor(label),
        1.5,
        temperature=rule.temperature,
        ramp=schedule == "linear",
    )
    assert close(theirs, ours.x)
    assert not close(theirs, exactflow.sample(model, 3, label).x)  # guidance does something


def test_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="public formulation"):
        script("baseline").Baseline(TarFlowConfig(**SIZES, soft_clip=4.0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*training noise:UserWarning")
@pytest.mark.parametrize("case", ["uncond", "cond", "vp"])
def test_baseline_gives_the_published_numbers(case: str, golden: Path) -> None:
    folder = golden / "tarflow"
    if not (folder / f"{case}.json").is_file():
        pytest.skip(f"tests/golden/tarflow has no {case}")
    told = json.loads((folder / f"{case}.json").read_text())
    expected = torch.load(folder / f"{case}.expected.pt", weights_only=True)
    model = exactflow.convert(folder / told["checkpoint"])
    baseline = script("baseline").from_exactflow(model)
    label = expected.get("y")
    with torch.no_grad():
        z, log_abs_det = baseline.encode(expected["x"], label)
    assert close(z, expected["z"])
    if told["nvp"]:
        assert close(log_abs_det / model.dims, expected["mean_logdet"])
    assert close(baseline.sample(expected["noise"], label), expected["sample"])
    if "sample_guided" in expected and told["guidance"]:
        guided = baseline.decode(
            expected["noise"] * baseline.variance.sqrt(),
            label,
            told["guidance"],
            temperature=told["attn_temp"],
            ramp=told["annealed_guidance"],
        )
        assert close(guided, expected["sample_guided"])


def test_comparison_runs_and_checks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = script("tarflow")
    cpu = torch.device("cpu")
    jobs = benchmark.jobs(benchmark.QUICK, (1, 2), compiled=False)
    report = benchmark.run(jobs, 1, cpu, memory=False)
    json.dumps(report)
    assert len(report["results"]) == len(jobs) == 9
    for job, result in zip(jobs, report["results"], strict=True):
        assert not job.checked or result["error"] <= benchmark.TOLERANCE
        assert benchmark.row(result).count("|") == benchmark.HEADER.splitlines()[0].count("|")
        assert all(len(took) == 1 for took in result["seconds"].values())

    def skewed(model: TarFlow) -> torch.nn.Module:
        other = script("baseline").from_exactflow(model)
        with torch.no_grad():
            other.blocks[0].place.add_(0.01)
        return other

    monkeypatch.setattr(benchmark, "from_exactflow", skewed)
    for job in jobs:
        if job.checked:
            with pytest.raises(AssertionError, match="differ"):
                benchmark.run_job(job, 1, cpu, memory=False, at_least=0.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Matplotlib.*:DeprecationWarning")
def test_all_solvers_are_compared_on_trained_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    benchmark = script("sampling")
    out, plot, profile = (tmp_path / "made" / name for name in ("r.json", "r.png", "p.png"))
    arguments = ["--quick", "--pairs", "1", "--models", str(tmp_path / "none")]
    arguments += ["--out", str(out), "--plot", str(plot), "--profile", str(profile)]
    report = benchmark.main(arguments)
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    for picture in (plot, profile):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert [result["batch"] for result in report["results"]] == [1, 3, 1, 3]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [side["side"] for side in report["results"][0]["sides"]]
    assert len(names) == 9 + benchmark.compiled.available()
    assert len(table) == 2 + 4 * len(names)
    assert {line.count("|") for line in table} == {11}
    for result in report["results"]:
        assert [side["side"] for side in result["sides"]] == names
        for side in result["sides"]:
            assert side["error"] < 1e-4, side
            assert len(side["seconds"]) == 1
            if not side["side"].startswith("baseline"):
                assert side["certificate"] < 1e-4
                assert len(side["passes"]) == 2
                assert max(side["passes"]) <= 16
                assert side["tokens"] >= side["passes"]
    for name in report["models"]:
        assert report["models"][name]["training"]["steps"] == benchmark.QUICK_STEPS


def test_a_side_that_fails_costs_the_others_nothing() -> None:
    benchmark = script("sampling")
    config = CONFIGS["unconditional"]
    model = perturbed(config)
    z = script("tarflow").latents(config, 2, torch.device("cpu"))
    sequential = [benchmark.Sequential()] * 3
    runs = iter([model.decode(z)])  # works for the check and fails when timed
    sides = {
        "sequential": benchmark.solver_side(model, sequential, z),
        "two for three": benchmark.solver_side(model, sequential[:2], z),
        "once": benchmark.plain_side(lambda: next(runs)),
        "adaptive": benchmark.solver_side(model, [benchmark.Adaptive()] * 3, z),
    }
    rows = benchmark.compare(sides, model.decode(z), pairs=2)
    assert [row["side"] for row in rows] == list(sides)
    assert rows[1] == {
        "side": "two for three",
        "failed": "ValueError: expected a solver for every block, got 2",
    }
    assert rows[2]["failed"].startswith("StopIteration")
    for row in (rows[0], rows[3]):
        assert row["error"] < 1e-5
        assert len(row["seconds"]) == 2
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    result = {"model": "m", "batch": 2}
    assert "failed: ValueError" in benchmark.row(result, rows[1])
    assert benchmark.row(result, rows[1]).count("|") == 11


def test_the_floor_is_the_larger_of_reading_and_multiplying() -> None:
    benchmark = script("sampling")
    config = CONFIGS["unconditional"]
    model = perturbed(config)
    per_block = (12 + 24) * 64 + 2 * 12 * 64**2
    assert benchmark.matrix_elements(model) == 3 * per_block
    limits = benchmark.Limits(bandwidth=4e9, flops=8e9)  # alike at batch 4
    reading = 15 * 3 * per_block / 1e9
    assert limits.floor(model, 1) == limits.floor(model, 4) == pytest.approx(reading)
    assert limits.floor(model, 8) == pytest.approx(2 * reading)


@pytest.mark.slow
def test_gpu_sections_run_on_a_tiny_model() -> None:
    gpu = script("gpu")
    cpu = torch.device("cpu")
    smoke = gpu.section_smoke(gpu.TINY, cpu)
    assert smoke["ok"], smoke
    sections = {"smoke": smoke}
    for name in ("training", "training, small patches", "likelihood", "sampling"):
        sections[name] = gpu.SECTIONS[name][0](gpu.TINY, cpu)
        assert sections[name]["rows"]
    for name in ("solvers", "solvers, small patches"):
        found = sections[name] = gpu.SECTIONS[name][0](gpu.TINY, cpu)
        json.dumps(found)
        assert found["training"]["steps"] >= 1
        assert all(isinstance(passes, list) for passes in found["convergence"].values())
        sides = [(row["batch"], row["side"]) for row in found["rows"]]
        for batch in (1, 2):
            assert sides.count((batch, "sequential, graph")) == 2
            for side in ("baseline", "sequential, eager", "adaptive, eager", "adaptive, graph"):
                assert (batch, side) in sides
            assert (batch, "plan") in sides
        for row in found["rows"]:
            assert row["error"] < 0.2, row  # bfloat16
            assert row["over_floor"] > 0
    text = gpu.markdown({"model": "tiny", "hardware": {}, "sections": sections})
    assert "FAILED" not in text
    assert "failed" not in text
    assert {line.count("|") for line in text.splitlines() if "adaptive, graph" in line} == {11}
    # [4-1024-8-8] at 64: 817 M parameters, 256 tokens
    assert gpu.training_flop(gpu.LARGE.config) == pytest.approx(1.28e12, rel=0.02)


def test_a_group_that_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_solvers = script("gpu_solvers")

    def full(*_: object) -> int:
        raise torch.OutOfMemoryError("no memory for the baseline")

    monkeypatch.setattr(gpu_solvers, "affordable", full)
    found = gpu_solvers.section(gpu_solvers.TINY[0], torch.device("cpu"), math.inf)
    failed = [row["failed"] for row in found["rows"] if "failed" in row]
    assert failed == ["OutOfMemoryError: no memory for the baseline"] * 2
    assert len(found["rows"]) == 2 * (1 + 3 + 1)
    assert "\n".join(gpu_solvers.markdown(found)).count("failed: OutOfMemoryError") == 2


def test_planning_ends_when_time_is_up() -> None:
    gpu_solvers = script("gpu_solvers")
    model = perturbed(CONFIGS["unconditional"])
    limits = gpu_solvers.Limits(1e9, 1e9)
    (row,) = gpu_solvers.planned(gpu_solvers.TINY[0], model, 1, limits, -math.inf)
    assert row["failed"].startswith("TimeoutError: no time left to plan")


@pytest.mark.slow
def test_ways_of_training_are_weighed_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = script("reversible")
    arguments = [
        "--quick",
        "--pairs",
        "1",
        "--only",
        "denseflow",
        "--out",
        str(tmp_path / "r.json"),
    ]
    report = benchmark.main(arguments)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report))
    (result,) = report["results"]
    assert result["gradients"]["plain"] == 0 < result["gradients"]["reversible"]
    assert all(result["memory_mib"][way]["peak"] > 0 for way in benchmark.WAYS)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(benchmark.WAYS)
    assert {line.count("|") for line in table} == {10}
    monkeypatch.setattr(benchmark, "TOLERANCE", 0.0)
    with pytest.raises(AssertionError, match="reversible: loss"):
        benchmark.main([*arguments, "--no-memory"])


def test_masking_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.json"
    words = ["--quick", "--pairs", "1", "--ratios", "0", "0.5", "--out", str(file)]
    (result,) = script("masking").main(words)
    assert set(json.loads(file.read_text())["results"][0]["seconds"]) == {"0.0", "0.5"}
    assert result["speedup"][0.0]["median"] == 1
    assert len([line for line in capsys.readouterr().out.splitlines() if "| maskdit" in line]) == 2


@pytest.mark.parametrize("size", ["1m", "10m"])
def test_trained_families_have_about_as_many_parameters(size: str) -> None:
    families = script("families")
    for name, recipe in families.MODELS[size].items():
        for of, shape in (("fashion", (1, 28, 28)), ("cifar", (3, 32, 32))):
            model = recipe.build(of, shape, 256)
            assert model.event_shape == shape
            if name not in families.CLOSED_FORM:
                wanted = {"1m": 1e6, "10m": 1e7}[size]
                assert 0.85 * wanted < model.num_parameters < 1.15 * wanted, (name, of)
                assert families.Plan(1.0).first % recipe.common["batch_size"] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Matplotlib.*:DeprecationWarning")
def test_families_are_compared_and_results_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    families = script("families")
    out, plot = tmp_path / "made" / "r.json", tmp_path / "made" / "r.png"
    arguments = ["--quick", "--threads", "1", "--out", str(out)]
    first = families.main([*arguments, "--only", "tarflow"])
    results = families.main([*arguments, "--only", "whitening", "tarflow", "--plot", str(plot)])
    told = capsys.readouterr()
    assert "tarflow on digits: there" in told.err
    assert results[:1] == first  # not measured again
    assert json.loads(out.read_text())["results"] == results
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert families.main(["--table", str(out)]) == results
    assert told.out.endswith(capsys.readouterr().out)  # the table is made from the file alone
    assert families.main([*arguments, "--only", "tarflow", "--again"]) != results

    trained, fitted = results
    assert (trained["fitted"], fitted["fitted"]) == (False, True)
    assert trained["images"] == 32 * trained["steps"]
    at = [point["images"] for point in trained["curve"]]
    doublings = [256 * 2**i for i in range(20) if 256 * 2**i < trained["images"]]
    assert at == [*doublings, trained["images"]]
    seconds = [point["seconds"] for point in trained["curve"]]
    assert seconds == sorted(seconds)
    assert seconds[-1] == trained["seconds"]
    for result in results:
        assert "failed" not in result
        assert result["score"]["kind"] == "dequantized"
        assert result["data"]["held_out"]["split"] == "test"
        assert result["score"]["images"] == result["data"]["held_out"]["count"] == 100
        assert result["sampling"]["certificate"] < 1e-3
    lines = [line for line in told.out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {13}
    score = f"{trained['score']['bits_per_dim']:.3f} ± {trained['score']['standard_error']:.3f}"
    assert sum(score in line for line in lines) == 2  # in the first table and in the second


@pytest.mark.slow
def test_a_family_that_fails_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    families = script("families")
    tarflow = families.MODELS["quick"]["tarflow"]
    broken = families.Recipe("tarflow", {"digits": {"patch_size": 3}}, tarflow.common)
    monkeypatch.setitem(families.MODELS, "quick", {"broken": broken, "tarflow": tarflow})
    out = tmp_path / "r.json"
    arguments = ["--quick", "--threads", "1", "--out", str(out)]
    results = families.main(arguments)
    assert results[0]["failed"].startswith("ValueError: ")
    assert "expected a patch size" in results[0]["failed"]
    assert "failed" not in results[1]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {13}
    repaired = families.Recipe("tarflow", tarflow.configs, tarflow.common)
    monkeypatch.setitem(families.MODELS, "quick", {"broken": repaired, "tarflow": tarflow})
    results = families.main(arguments)
    assert [result["model"] for result in results] == ["tarflow", "broken"]
    assert not any("failed" in result for result in results)


def test_kinds_of_likelihood_are_not_ranked_together() -> None:
    families = script("families")

    def result(model: str, kind: str, bits: float, doublings: int) -> dict[str, object]:
        score = {"kind": kind, "k": 1, "bits_per_dim": bits, "standard_error": 0.1}
        drawn = {"samples": 16, "seconds": [1.0], "evaluations": 1, "certificate": None}
        drawn["nonfinite"] = 0
        counts = [4096 * 2**index for index in range(doublings)]
        curve = [families.point(count, 1.0, bits) for count in (*counts, 33000)]
        common = {"fitted": False, "parameters": 1, "seconds": 1.0, "images": 33000, "curve": curve}
        run = {"minutes": 1.0, "set": "cifar", "identity": {"plan": {"watched": 5}}}
        data = {"id": "c", "version": "v", "split": "s", "count": 1, "fingerprint": "f"}
        hardware = {"date": "today", "load at the end": "1.0"}
        told = {"hardware": hardware, "data": {"training": data, "held_out": data}}
        return {"model": model, "score": score, "sampling": drawn, **common, **run, **told}

    scores = [("a", "dequantized", 4.0, 4), ("b", "bound", 3.0, 2), ("c", "dequantized", 2.0, 3)]
    text = families.table([result(*score) for score in scores])
    assert [line[2] for line in text.splitlines()[2:5]] == ["b", "c", "a"]
    assert "bits/dim at 8,192 images" in text
    assert "JPEG" in text


def test_results_of_another_benchmark_are_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    out.write_text('{"results": []}')
    with pytest.raises(SystemExit, match="expected results of benchmarks"):
        script("families").main(["--quick", "--only", "tarflow", "--out", str(out)])
    assert out.read_text() == '{"results": []}'


@pytest.mark.slow
def test_recipes_are_ablated_and_results_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row, at equal images and at equal seconds, over seeds."""
    ablation = script("ablation")
    data = tmp_path / "data"
    (data / "fashion-mnist").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    for name, count in (("train", 24), ("t10k", 16)):
        labels = np.arange(count, dtype=np.uint8) % 10
        write_idx(data / "fashion-mnist", name, pixels[:count], labels)
    small = ("model.width=40", "model.head_dim=40", "model.blocks=1", "training.batch_size=8")
    place, rows = ablation.ROWS["fashion-mnist"]
    rows = [row._replace(words=(*row.words, *small)) for row in rows]
    monkeypatch.setattr(ablation, "ROWS", {"fashion-mnist": (place, rows)})
    words = ["--data", data, "--out", tmp_path / "out", "--seeds", 0, 1]
    words += ["--images", 128, "--seconds", 0.2]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, words)])
    ablation.main()
    said = capsys.readouterr().out
    assert said.count("| plain: affine, AdamW |") == 2
    images, seconds = said.split("fashion-mnist, equal seconds")
    assert images.count("| 128 |") == len(rows)
    assert seconds.count("| 2 |") == len(rows)
    ablation.main()
    assert capsys.readouterr().out == said


def test_two_models_are_shown_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    showcase = script("showcase")
    results = []
    for name in ("ours", "theirs"):
        folder = tmp_path / "models" / name / "samples"
        folder.mkdir(parents=True)
        for part in range(2):
            images = np.full((32, 1, 28, 28), 100 * part, np.uint8)
            np.savez(folder / f"{part}.npz", images=images)
        samples = {"seconds_per_sample": 0.004, "frechet": 9.0}
        results.append({"name": name, "samples": samples, "training": {"step_seconds": 300.0}})
    (tmp_path / "report.json").write_text(json.dumps({"results": results}))
    out = tmp_path / "showcase.png"
    monkeypatch.setattr(sys, "argv", ["showcase.py", str(tmp_path), str(out), "ours", "theirs"])
    showcase.main()
    assert Image.open(out).size[0] > 1000


def test_the_comparison_names_presets() -> None:
    compare = script("compare")
    fashion, digits = compare.words("fashion-mnist"), compare.words(None)
    assert fashion[-2:] == ["--data", "fashion-mnist"]
    assert digits[-2:] == ["--data", "digits"]
    for name in (*fashion[:-2], *digits[:-2]):
        assert name in registry.names()
