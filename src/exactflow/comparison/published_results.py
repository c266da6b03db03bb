"""Published numbers with their conditions, and the rule that says which may be compared.

Importing this module needs no torch, so that the published tables are shown at once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, final, get_args

import yaml

from exactflow.core.config import checked, suggestion

Metric = Literal["bits_per_dim", "fid"]
Version = Literal["old", "new", "blurred", "unresolved", "n/a"]
Doubt = Literal["value", "kind", "version", "parameters", "source"]
Kind = Literal[
    "dequantised",
    "stochastic log-det",
    "ELBO",
    "IWBO",
    "ODE",
    "discrete",
    "lossless code",
    "ELBO or IWBO",
    "ELBO or ODE",
    "another bound",
    "noisy density",
]
_VAGUE: tuple[Kind, ...] = ("ELBO or IWBO", "ELBO or ODE", "another bound")
_COUNTED: tuple[Kind, ...] = ("IWBO", "ODE")  # the number of draws changes their value
_RUN_KINDS: dict[str, Kind] = {
    "dequantized": "dequantised",
    "bound": "ELBO",
    "estimate": "ODE",
    "noisy-density": "noisy density",
}
# Required fields of a result file, and their types.
_RUN_FIELDS: dict[str, Any] = {"kind": str, "k": int, "dequantization": str, "parameters": int}
_RUN_FIELDS |= {"bits_per_dim": float | None, "standard_error": float | None, "data": dict}
_DATA_FIELDS: dict[str, Any] = {"id": str, "fingerprint": str, "split": str, "preprocessing": str}
_DATA_FIELDS |= {"shape": list, "levels": int, "count": int}


@final
@dataclass(frozen=True)
class Group:
    """The conditions that numbers must share to stand in one ranking.

    Attributes:
        metric: of the numbers.
        dataset: id of the data set.
        version: of the data set; for a run on data of one's own, their name.
        protocol: kind and draws of a likelihood, or conditioning and guidance of an FID's samples.
    """

    metric: Metric
    dataset: str
    version: str
    protocol: str

    @property
    def label(self) -> str:
        """Name of the group, in tables and on the command line."""
        return self.protocol if self.version == "n/a" else f"{self.version}, {self.protocol}"


@final
@dataclass(frozen=True)
class PublishedRow:
    """One number of a model on a data set; lower is better.

    Attributes:
        model: name, with its variant.
        metric: "bits_per_dim", or "fid".
        dataset: id of the data set.
        value: the number; None where a run has none.
        version: of the data set. Two downsampled ImageNets, "old" and "new", share their name;
            "blurred" is ImageNet with blurred faces; "unresolved" is one of these, unknown which;
            "n/a" is a set that is one only, or cut out of ILSVRC2012 by the paper itself.
        kind: of a likelihood. "dequantised": density of a flow under noise inside grey levels;
            "stochastic log-det": the same with a random, unbiased log-determinant; "ELBO": a bound,
            one draw; "IWBO": with k draws (arXiv 1509.00519); "ODE": estimate by a probability
            flow with k dequantisation draws; "discrete": log-mass of the integers; "lossless
            code": bytes written. The others are not comparable with anything.
        k: draws, where known.
        conditional: of an FID: samples of given classes.
        guided: of an FID: with guidance; None where it is not said.
        space: what a model of an FID works on: "pixel" or "latent".
        parameters: their number, rounded as it was published.
        source: paper or page; None only for what is unverified.
        unverified: parts of the row that come from memory or from a single listing.
        sign: "≈" or "≤" before the value.
        digits: decimals of the value, as published.
        apart: reason why the row is in no ranking, if it follows from nothing above.
        remark: anything else.
        standard_error: of the value, where it was measured.
        own_data: name of the data of a run that was not measured on the published images.
        own: whether this is a run of one's own.
    """

    model: str
    metric: Metric
    dataset: str
    value: float | None
    version: Version = "n/a"
    kind: Kind | None = None
    k: int | None = None
    conditional: bool | None = None
    guided: bool | None = None
    space: Literal["pixel", "latent"] | None = None
    parameters: int | None = None
    source: str | None = None
    unverified: tuple[Doubt, ...] = ()
    sign: Literal["", "≈", "≤"] = ""
    digits: int = 2
    apart: str = ""
    remark: str = ""
    standard_error: float | None = None
    own_data: str = ""
    own: bool = False

    @property
    def group(self) -> Group:
        """The group of the row; an `obstacle` may keep it from being ranked there."""
        return Group(self.metric, self.dataset, self.own_data or self.version, self.protocol)

    @property
    def protocol(self) -> str:
        """The kind of a likelihood with its draws, or conditioning and guidance of an FID."""
        if self.metric == "fid":
            guidance = {True: "guided", False: "unguided", None: "guidance not stated"}
            classes = "class-conditional" if self.conditional else "unconditional"
            return f"{classes}, {guidance[self.guided]}"
        if self.kind in _COUNTED:
            return f"{self.kind}({self.k or 'K not stated'})"
        return f"{self.kind}({self.k})" if self.k and self.k > 1 else str(self.kind)

    @property
    def obstacle(self) -> str:
        """Reason why the row may not be ranked in its group; empty if it may."""
        reasons = {
            self.apart: bool(self.apart),
            "no value": self.value is None,
            "data version unresolved": self.version == "unresolved" and not self.own_data,
            "data version unverified": "version" in self.unverified,
            "kind not known": self.kind in _VAGUE,
            "kind unverified": "kind" in self.unverified,
            "draws not stated": self.kind in _COUNTED and self.k is None,
            "guidance not stated": self.metric == "fid" and self.guided is None,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")


@final
@dataclass(frozen=True)
class Section:
    """A group of a table: its rows by value, each with its rank or None.

    `main` marks the group that a table shows first and compares.
    """

    group: Group
    rows: tuple[tuple[int | None, PublishedRow], ...]
    main: bool


def rows(dataset: str | None = None, metric: Metric | None = None) -> tuple[PublishedRow, ...]:
    """The published rows of a data set (None: of all), and of a metric (None: of both).

    Raises:
        ValueError: an unknown data set, with a suggestion.
    """
    if dataset is not None:
        _facts(dataset)
    return tuple(
        row for row in _table() if dataset in (None, row.dataset) and metric in (None, row.metric)
    )


def counts() -> dict[str, dict[Metric, int]]:
    """Number of rows of every data set and metric."""
    names = _content()["datasets"]
    return {name: {m: len(rows(name, m)) for m in get_args(Metric)} for name in names}


def notes(dataset: str) -> tuple[str, ...]:
    """A note about a data set, if any, and wrong cells in the tables of other authors."""
    about = [_facts(dataset)["note"]] if "note" in _facts(dataset) else []
    cells = [cell for cell in _content()["suspicious"] if cell["dataset"] == dataset]
    return (*about, *(f"Suspicious elsewhere: {c['cell']}: {c['reason']}." for c in cells))


def arrange(entries: Sequence[PublishedRow], main: str | None = None) -> tuple[Section, ...]:
    """Rows of one metric by group, the main group first; ranked inside a group and nowhere else.

    Args:
        entries: rows of one data set and metric, and runs of one's own.
        main: label of the main group; None takes that of the first run of one's own on the
            published images, else that with the most verified rows that may be ranked.

    Raises:
        ValueError: there is no group of that label, with a suggestion.
    """
    groups = list(dict.fromkeys(row.group for row in entries))
    clear = [row for row in entries if not row.obstacle]
    chosen: Group | None = None
    if main is not None:
        by_label = {group.label: group for group in groups}
        if main not in by_label:
            raise ValueError(f"unknown group {main!r}{suggestion(main, by_label)}")
        chosen = by_label[main]
    elif clear:
        mine = [row.group for row in clear if row.own and not row.own_data]
        verified = [row.group for row in clear if "value" not in row.unverified]
        chosen = mine[0] if mine else max(groups, key=verified.count)
    groups.sort(key=lambda group: (group != chosen, group.label))
    return tuple(
        Section(group, _ranked([row for row in entries if row.group == group]), group == chosen)
        for group in groups
    )


def runs(paths: Iterable[Path], dataset: str) -> tuple[PublishedRow, ...]:
    """Rows of one's own, from the files that `exactflow evaluate --out` wrote.

    A run counts as measured on the published images if its data set has the same id (or id-old,
    id-new where there are two versions), shape, grey levels, split and number of images, and was
    not resized. Any other run has a group with the runs on data of the same fingerprint.

    Args:
        paths: result files, or folders with such files in them or in their subfolders.
        dataset: the published data set to compare with.

    Raises:
        ValueError: a file is not such a result, or a folder has none.
    """
    results = {file.resolve(): file for path in paths for file in _results(path)}
    return tuple(_run(file, _read(file), dataset) for file in results.values())


def _results(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    candidates = sorted({*path.glob("*.json"), *path.glob("*/*.json")})
    found = [f for f in candidates if '"nats_per_image"' in f.read_text(encoding="utf-8")]
    if not found:
        raise ValueError(f"{path}: expected a JSON file of `exactflow evaluate --out` in it")
    return found


def _ranked(members: Sequence[PublishedRow]) -> tuple[tuple[int | None, PublishedRow], ...]:
    """Ranks and rows by value; equal values share a rank, and a single row has none."""
    values = [row.value for row in members if row.value is not None and not row.obstacle]
    ordered = sorted(members, key=lambda row: (bool(row.obstacle), row.value or 0.0))

    def rank(row: PublishedRow) -> int | None:
        if row.obstacle or row.value is None or len(values) < 2:
            return None
        return 1 + sum(value < row.value for value in values)

    return tuple((rank(row), row) for row in ordered)


def _read(file: Path) -> dict[str, Any]:
    hint = f"{file}: expected a JSON file of `exactflow evaluate --out`, found"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{hint} nothing") from None
    except ValueError as error:
        raise ValueError(f"{hint} no JSON: {error}") from error
    for name, fields in (("", _RUN_FIELDS), ("data.", _DATA_FIELDS)):
        part = content["data"] if name else content
        for field, type_ in fields.items():
            if not isinstance(part, dict) or not isinstance(part.get(field, ...), type_):
                raise ValueError(f"{hint} no {name}{field} of the right type")
    if content["kind"] not in _RUN_KINDS:
        raise ValueError(f"{file}: expected a kind of {list(_RUN_KINDS)}, got {content['kind']!r}")
    return content


def _run(file: Path, content: Mapping[str, Any], dataset: str) -> PublishedRow:
    data, k = content["data"], content["k"]
    kind = _RUN_KINDS[content["kind"]]
    if kind == "dequantised" and content["dequantization"] == "variational":
        kind = "ELBO"  # learned noise: a bound, as papers count it
    version, difference = _placed(data, dataset)
    noisy = "no bits/dim: trained with Gaussian noise"
    fields = {
        "model": content.get("model", file.stem),
        "metric": "bits_per_dim",
        "dataset": dataset,
        "value": content["bits_per_dim"],
        "version": version,
        "kind": "IWBO" if kind == "ELBO" and k > 1 else kind,
        "k": k,
        "parameters": content["parameters"],
        "source": str(file),
        "apart": noisy if kind == "noisy density" else "",
        "remark": f"not the published images: {difference}" if difference else "",
        "standard_error": content["standard_error"],
        "own_data": f"your data {data['id']} {data['fingerprint'][:8]}" if difference else "",
        "own": True,
    }
    return PublishedRow(**checked(PublishedRow, fields))


def _placed(data: Mapping[str, Any], dataset: str) -> tuple[Version, str]:
    """Version of a run's data, and their difference from the published images or ""."""
    from exactflow.data.known import KNOWN_SETS  # its package imports torch

    _facts(dataset)
    facts = KNOWN_SETS.get(dataset)
    images = facts.images if facts else {}
    names: dict[str, Version] = {f"{dataset}-{name}": name for name in images if name != "n/a"}
    names[dataset] = "n/a" if "n/a" in images else "unresolved"
    version = names.get(data["id"], "unresolved")
    expected = [count for name, count in images.items() if version in (name, "unresolved")]
    differences = {
        f"the data set is {data['id']!r}": data["id"] not in names,
        f"the published images of {dataset} are not described": facts is None,
        f"shape {data['shape']}": facts and data["shape"] != list(facts.shape),
        f"{data['levels']} grey levels": facts and data["levels"] != facts.levels,
        f"the {data['split']} split": facts and data["split"] != facts.split,
        f"{data['count']:,} images": data["count"] not in expected,
        data["preprocessing"]: not data["preprocessing"].startswith("stored size"),
    }
    return version, next((text for text, differs in differences.items() if differs), "")


def _facts(dataset: str) -> dict[str, Any]:
    datasets = _content()["datasets"]
    if dataset not in datasets:
        raise ValueError(f"unknown data set {dataset!r}{suggestion(dataset, datasets)}")
    return datasets[dataset]


@cache
def _content() -> dict[str, Any]:
    table = files("exactflow.comparison") / "published_results.yaml"
    return yaml.safe_load(table.read_text(encoding="utf-8"))


@cache
def _table() -> tuple[PublishedRow, ...]:
    found = []
    for entry in _content()["entries"]:
        shared = {name: value for name, value in entry.items() if name != "values"}
        found += [checked(PublishedRow, {**shared, **fields}) for fields in entry["values"]]
    return tuple(PublishedRow(**fields) for fields in found)
