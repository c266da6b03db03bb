"""The table of published results, and which of them are compared."""

import json
import re
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exactflow.cli import results
from exactflow.cli.arguments import Results
from exactflow.comparison import published_results as published
from exactflow.comparison.published_results import PublishedRow, arrange, rows
from exactflow.data import ImageDataset
from exactflow.data.decode import Preprocessing
from exactflow.likelihood.log_likelihood import LogLikelihood
from exactflow.metrics.bits_per_dim import Evaluation

ROWS = rows()
VERSIONED = {"imagenet32", "imagenet64"}
COUNTS = {  # counted by hand, column by column: likelihoods and codes, FIDs
    "cifar10": (38 + 8, 5),
    "imagenet32": (34 + 7, 2),
    "imagenet64": (33 + 6, 28),
    "imagenet128": (3, 10),
    "imagenet256": (0, 38),
    "imagenet512": (0, 17),
    "celeba64": (1, 0),
    "celebahq256-5bit": (2, 0),
    "afhq256": (0, 2),
    "ffhq1024": (0, 1),
    "lsun-bedroom256": (0, 1),
    "lsun-cat256": (0, 1),
    "lsun-horse256": (0, 1),
}


def comparable(one: PublishedRow, other: PublishedRow) -> bool:
    """Whether the two stand in one ranking."""
    return one.group == other.group and not one.obstacle and not other.obstacle


def named(row: PublishedRow) -> str:
    return f"{row.model}, {row.dataset}, {row.metric}, {row.value}"


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_every_row_is_sound(row: PublishedRow) -> None:
    assert row.model
    assert row.value is not None
    assert round(row.value, row.digits) == row.value
    likelihood = row.metric == "bits_per_dim"
    assert (row.kind is not None) is likelihood
    assert (row.conditional is None) is likelihood
    assert likelihood <= (row.guided is None and row.space is None and 0.5 < row.value < 5)
    assert likelihood or 1 <= row.value < 50
    assert row.k is None or row.kind in ("IWBO", "ODE")
    assert row.version != "n/a" or not likelihood or row.dataset not in VERSIONED
    assert row.version in ("n/a", "unresolved") or row.dataset in VERSIONED
    assert row.parameters is None or row.parameters > 10**6
    assert row.source is None or re.fullmatch(
        r"arXiv \d{4}\.\d{5}|[A-Z]+ \d{4}.*|.*README", row.source
    )
    assert row.source is not None or "value" in row.unverified
    assert not row.own
    assert not row.own_data


def test_rows_are_counted_and_none_is_there_twice() -> None:
    found = {name: tuple(count.values()) for name, count in published.counts().items()}
    assert found == COUNTS
    assert len(ROWS) == sum(a + b for a, b in COUNTS.values())
    assert len(set(ROWS)) == len(ROWS)


@pytest.mark.parametrize(
    ("dataset", "model", "value", "fields"),
    [
        (
            "imagenet64",
            "TarFlow 2-768-8-8",
            2.99,
            {"version": "unresolved", "parameters": 460142784},
        ),
        ("imagenet64", "DenseFlow-74-10", 3.35, {"version": "new", "k": 200, "kind": "IWBO"}),
        ("imagenet64", "Flow Matching OT", 3.35, {"version": "new", "k": 1, "kind": "ODE"}),
        ("cifar10", "Flow Matching OT", 2.99, {"k": 50}),
        ("imagenet32", "Flow Matching OT", 3.56, {"k": 5}),
        ("imagenet32", "i-DODE", 3.69, {"version": "old"}),
        ("imagenet32", "i-DODE", 3.43, {"version": "new"}),
        ("imagenet64", "VDM", 3.40, {"version": "old", "kind": "ELBO"}),
        ("imagenet64", "MaCow, uniform", 3.75, {"parameters": 117244127, "unverified": ()}),
        ("cifar10", "MaCow, uniform", 3.28, {"parameters": 37197547, "unverified": ("value",)}),
        ("celebahq256-5bit", "MaCow, variational", 0.67, {"source": "arXiv 1902.04208"}),
        ("imagenet64", "Glow", 3.81, {"kind": "dequantised", "source": "arXiv 1807.03039"}),
        ("imagenet128", "Flow Matching OT", 2.90, {"metric": "bits_per_dim"}),
        ("imagenet64", "ADM", 2.07, {"guided": False, "conditional": True}),
        ("imagenet512", "ADM", 7.72, {"guided": True}),
        ("imagenet64", "TarFlow", 18.42, {"conditional": False}),
        ("imagenet128", "iTARFlow", 3.32, {"sign": "≤"}),
        ("imagenet256", "HDiT", 6.92, {"parameters": 557416522, "space": "pixel"}),
        ("lsun-cat256", "ADM", 5.57, {"metric": "fid"}),
        ("imagenet32", "Bit-Swap", 4.50, {"kind": "lossless code", "unverified": ("value",)}),
    ],
)
def test_values_are_those_of_the_papers(
    dataset: str, model: str, value: float, fields: dict[str, Any]
) -> None:
    found = [row for row in rows(dataset) if (row.model, row.value) == (model, value)]
    assert len(found) == 1
    assert {name: getattr(found[0], name) for name in fields} == fields


def test_every_code_is_from_memory() -> None:
    codes = [row for row in ROWS if row.kind == "lossless code"]
    assert len(codes) == 21
    assert all("value" in row.unverified for row in codes)


@pytest.mark.slow
def test_only_the_same_quantity_on_the_same_images_is_comparable() -> None:
    pairs = 0
    for one, other in product(ROWS, ROWS):
        if not comparable(one, other):
            continue
        pairs += one is not other
        assert (one.metric, one.dataset) == (other.metric, other.dataset)
        assert one.version == other.version != "unresolved"
        assert (one.kind, one.k) == (other.kind, other.k)
        assert (one.conditional, one.guided) == (other.conditional, other.guided)
        assert not {"kind", "version"} & {*one.unverified, *other.unverified}
        assert one.kind not in ("ELBO or IWBO", "ELBO or ODE", "another bound")
        assert one.kind not in ("IWBO", "ODE") or one.k is not None
        assert comparable(other, one)
    assert pairs > 200


@pytest.mark.slow
def test_comparable_is_transitive() -> None:
    after = {row: {other for other in ROWS if comparable(row, other)} for row in ROWS}
    for row, others in after.items():
        assert all(after[other] == others for other in others), row


@pytest.mark.parametrize("dataset", COUNTS)
@pytest.mark.parametrize("metric", ["bits_per_dim", "fid"])
def test_ranks_are_by_value_inside_a_group_only(dataset: str, metric: Any) -> None:
    entries = rows(dataset, metric)
    sections = arrange(entries)
    assert sorted(map(named, (r for s in sections for _, r in s.rows))) == sorted(
        map(named, entries)
    )
    assert len({section.group for section in sections}) == len(sections)
    assert sum(section.main for section in sections) == any(not row.obstacle for row in entries)
    for section in sections:
        placed = [(rank, row) for rank, row in section.rows if rank is not None]
        assert len(placed) != 1, "a row alone has no place"
        assert all(comparable(one, other) for (_, one), (_, other) in product(placed, placed))
        for (rank, row), (next_rank, next_row) in pairwise(placed):
            assert rank <= next_rank
            assert (rank < next_rank) == ((row.value or 0) < (next_row.value or 0))


# ---- runs of one's own ----------------------------------------------------------------------


def written(
    folder: Path,
    *,
    id: str = "cifar10",
    count: int = 10_000,
    split: Any = "test",
    pixel: int = 32,
    channels: int = 3,
    levels: int = 256,
    preprocessing: Preprocessing | None = None,
    fingerprint: str = "f" * 64,
    bits: float = 3.30,
    **likelihood: Any,
) -> Path:
    """Write a result as `exactflow evaluate --out` does, with given bits/dim and images."""
    shape = (channels, pixel, pixel)
    done = preprocessing or Preprocessing()
    images = np.broadcast_to(np.uint8(0), (count, *shape))
    described = ImageDataset(
        images, None, id, "v1", split, levels, (), done.text, done.hash, fingerprint
    )
    dims = int(np.prod(shape))
    nats = torch.full((count,), -bits * dims * np.log(2), dtype=torch.float64)
    fields = {"kind": "dequantized", "k": 1, **likelihood}
    likelihoods = LogLikelihood(nats, dims=dims, levels=levels, **fields)
    result = Evaluation(likelihoods, described.describe(), 1.0, 7_000_000).describe()
    file = folder / f"{id}-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps({"model": "runs/mine", **result, "nats_per_image": [0.0]}))
    return file


def test_a_run_on_the_published_images_is_ranked_with_its_kind(tmp_path: Path) -> None:
    (run,) = published.runs([written(tmp_path)], "cifar10")
    assert (run.own, run.own_data, run.obstacle, run.source) == (True, "", "", str(run.source))
    assert (run.kind, run.k, run.parameters) == ("dequantised", 1, 7_000_000)
    sections = arrange([*rows("cifar10", "bits_per_dim"), run])
    main = sections[0]
    assert main.main
    assert main.group.label == "dequantised"
    place = {row.model: rank for rank, row in main.rows}
    assert (place["MaCow, uniform"], place["runs/mine"], place["CDFlow"]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("likelihood", "protocol"),
    [
        ({"kind": "dequantized"}, "dequantised"),
        ({"kind": "dequantized", "k": 20}, "dequantised(20)"),
        ({"kind": "dequantized", "dequantization": "variational"}, "ELBO"),
        ({"kind": "dequantized", "dequantization": "variational", "k": 5}, "IWBO(5)"),
        ({"kind": "bound"}, "ELBO"),
        ({"kind": "bound", "k": 1000}, "IWBO(1000)"),
        ({"kind": "estimate"}, "ODE(1)"),
        ({"kind": "estimate", "k": 50}, "ODE(50)"),
    ],
)
def test_kinds_of_runs_are_those_of_the_papers(
    likelihood: dict[str, Any], protocol: str, tmp_path: Path
) -> None:
    (run,) = published.runs([written(tmp_path, **likelihood)], "cifar10")
    assert run.protocol == protocol
    published_there = {row for row in rows("cifar10") if comparable(row, run)}
    assert published_there == {
        row for row in rows("cifar10") if row.protocol == protocol and not row.obstacle
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"id": "cifar10-jpeg"}, "cifar10-jpeg"),
        ({"count": 20}, "20 images"),
        ({"split": "validation"}, "the validation split"),
        ({"pixel": 16}, "shape [3, 16, 16]"),
        ({"channels": 1}, "shape [1, 32, 32]"),
        ({"levels": 32}, "32 grey levels"),
        ({"preprocessing": Preprocessing(image_size=32)}, "short side to 32"),
    ],
)
def test_a_run_on_other_images_stands_alone(
    data: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    files = [written(tmp_path, **data), written(tmp_path, bits=3.1, **data)]
    files.append(written(tmp_path, fingerprint="e" * 64, **data))
    mine, again, other = published.runs(files, "cifar10")
    assert reason in mine.remark
    assert mine.group.label.startswith("your data ")
    assert comparable(mine, again), "the same images"
    assert not comparable(mine, other), "other images"
    everything = [*rows("cifar10", "bits_per_dim"), mine, again, other]
    assert not any(comparable(mine, row) for row in everything if not row.own)
    main, *_ = arrange(everything)
    assert not any(row.own for _, row in main.rows)


@pytest.mark.parametrize(
    ("id", "count", "version", "own_data"),
    [
        ("imagenet64-old", 49_999, "old", False),
        ("imagenet64-new", 50_000, "new", False),
        ("imagenet64-old", 50_000, "old", True),
        ("imagenet64", 50_000, "unresolved", False),
        ("imagenet64-small", 50_000, "unresolved", True),
    ],
)
def test_which_downsampled_imagenet_is_said_by_the_id(
    id: str, count: int, version: str, own_data: bool, tmp_path: Path
) -> None:
    file = written(tmp_path, id=id, count=count, pixel=64, split="validation", kind="bound")
    (run,) = published.runs([file], "imagenet64")
    assert (run.version, bool(run.own_data)) == (version, own_data)
    beside = {row.version for row in rows("imagenet64") if comparable(run, row)}
    known = version in ("old", "new") and not own_data
    assert beside <= ({version} if known else set())
    assert bool(beside) == (known and version == "old"), "no verified ELBO is on the new set"
    assert ("unresolved" in run.obstacle) == (version == "unresolved" and not own_data)


def test_a_noisy_density_has_no_value(tmp_path: Path) -> None:
    (run,) = published.runs([written(tmp_path, kind="noisy-density")], "cifar10")
    assert run.value is None
    assert "Gaussian noise" in run.obstacle
    sections = arrange([*rows("cifar10", "bits_per_dim"), run])
    assert [(None, run)] in [list(section.rows) for section in sections]


def test_folders_are_searched_and_no_result_counts_twice(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    file = written(folder)
    (folder / "samples.json").write_text("{}")
    for paths in ([folder], [tmp_path / "runs"], [file, folder, tmp_path / "runs"]):
        assert len(published.runs(paths, "cifar10")) == 1


# ---- the command ----------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", COUNTS)
def test_marks(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.run(Results(dataset=dataset, out=tmp_path / "t.json"))
    results.run(Results(dataset=dataset, out=tmp_path / "t.md"))
    printed = capsys.readouterr().out
    assert "† not comparable" in printed
    listed = json.loads((tmp_path / "t.json").read_text())["rows"]
    lines = [
        re.split(r" (?<!\\)\| ", line) for line in (tmp_path / "t.md").read_text().splitlines()
    ]
    cells = [line for line in lines if len(line) == 6 and line[2] not in ("---", "model")]
    assert len(cells) == len(listed) == len(rows(dataset))
    for row, (_, value, model, parameters, source, remark) in zip(listed, cells, strict=True):
        assert model == row["model"]
        assert f"{row['value']:.{row['digits']}f}" in value
        assert ("†" in value) == (not row["main"] or bool(row["obstacle"]))
        assert row["obstacle"] in remark
        assert bool(row["unverified"]) == ("*" in value + parameters + source)
        assert ("*" in value) == bool(set(row["unverified"]) & {"value", "kind", "version"})


def test_the_main_group_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    results.run(
        Results(dataset="imagenet64", metric="bits/dim", group="old, dequantised", out=file)
    )
    main = [row["model"] for row in json.loads(file.read_text())["rows"] if row["main"]]
    assert "Glow" in main
    assert "VDM" not in main


def test_ones_own_run_is_shown_and_chooses_the_main_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, kind="estimate")
    results.run(Results(dataset="cifar10", runs=(file,)))
    printed = capsys.readouterr().out
    assert "runs/mine (yours)" in printed
    assert "3.3000" in printed
    assert re.search(r"ODE\(1\) \(main", printed)


def test_without_a_name_all_sets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    results.run(Results())
    printed = capsys.readouterr().out
    assert all(name in printed for name in COUNTS)
    assert str(COUNTS["imagenet64"][0]) in printed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "imagenet46"}, "unknown data set 'imagenet46'; did you mean 'imagenet64'"),
        ({"dataset": "imagenet64", "group": "new, ODE(2)"}, "did you mean 'new, ODE"),
        ({"dataset": "celeba64", "metric": "fid"}, "no published fid of celeba64"),
        ({"dataset": "cifar10", "out": Path("t.pdf")}, ".md or .json"),
        ({"metric": "fid"}, "expected a data set"),
        ({"dataset": "cifar10", "runs": (Path("nothing"),)}, "nothing: expected a JSON file"),
        ({"dataset": "cifar10", "runs": (Path("empty"),)}, "expected a JSON file of"),
        ({"dataset": "cifar10", "runs": (Path("text.json"),)}, "found no JSON"),
        ({"dataset": "cifar10", "runs": (Path("list.json"),)}, "found no kind of the right type"),
        ({"dataset": "cifar10", "runs": (Path("half.json"),)}, "no data.levels of the right type"),
        ({"dataset": "cifar10", "runs": (Path("kind.json"),)}, "got 'guess'"),
        ({"dataset": "cifar10", "runs": (Path("a"),), "metric": "fid"}, "asks for FID only"),
    ],
)
def test_bad_input_is_one_clear_error(
    fields: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("bits")
    (tmp_path / "list.json").write_text("[]")
    whole = json.loads(written(tmp_path).read_text())
    data = {**whole["data"], "levels": "many"}
    (tmp_path / "half.json").write_text(json.dumps({**whole, "data": data}))
    (tmp_path / "kind.json").write_text(json.dumps({**whole, "kind": "guess"}))
    with pytest.raises(ValueError, match=re.escape(message)):
        results.run(Results(**fields))


def test_a_doubt_about_kind_or_version_ends_comparison() -> None:
    glow = next(row for row in rows("imagenet64") if row.model == "Glow")
    macow = next(row for row in rows("imagenet64") if row.model == "MaCow, uniform")
    assert comparable(glow, macow)
    for doubt in ("kind", "version"):
        assert not comparable(replace(glow, unverified=(doubt,)), macow)
    assert comparable(replace(glow, unverified=("value",)), macow)
