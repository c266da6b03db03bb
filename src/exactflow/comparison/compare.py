"""The verb `compare`: models of any kind on the same images, one report."""

import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from exactflow.comparison.comparison import Bench
from exactflow.comparison.protocol import Contender, Failure, Protocol
from exactflow.comparison.report import Report, report_of
from exactflow.core.model import GenerativeModel, NonFiniteError
from exactflow.data.datasets import DataConfig, ImageDataset, load
from exactflow.metrics.extractors import FeatureExtractor, classifier, pixels
from exactflow.parallel.process_group import current

PROTOCOL = Protocol()


def compare(
    models: Mapping[str, GenerativeModel] | Iterable[Contender | Failure],
    data: str | DataConfig | tuple[ImageDataset, ImageDataset],
    folder: str | Path = "runs/compare",
    *,
    extractor: FeatureExtractor | None = None,
    protocol: Protocol = PROTOCOL,
    setting: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Report:
    """Measure all models alike: likelihood by kind, samples, cost; write report.html, .md, .json.

    Measurements in `folder` of the same weights, images and protocol are not repeated: the same
    call resumes a comparison. Numbers depend on the protocol's seed, not on batches. A model whose
    numbers are not finite is reported as failed, and the others are measured. Processes that work
    together share the measurements; the report is the same.

    Args:
        models: by name; or an iterable of contenders, which also know the cost of their training;
            each is measured before the next is taken.
        data: source of the images, as in `DataConfig.source`; how to read them; or the training
            split and the held-out one.
        folder: for the report and all measurements.
        extractor: of the features that samples are compared in; None: those of a small classifier
            trained on these images, or without labels their low frequencies.
        protocol: amounts that are measured.
        setting: further facts for the report.
        progress: show bars.

    Raises:
        ValueError: two models of one name, none at all, or one that does not fit the images.
        NonFiniteError: every model failed.
    """
    folder, group = Path(folder), current()
    training, held_out = _splits(data)
    if extractor is None:
        extractor = pixels()
        if training.labels is not None:
            extractor = group.main_first(lambda: classifier(training, folder / "features"))
    if isinstance(models, Mapping):
        named = cast("Mapping[str, GenerativeModel]", models)
        models = (Contender(name, model.eval()) for name, model in named.items())
    bench = Bench(training, held_out, extractor, protocol, folder / "models", progress)
    results, failures, devices = _measured(bench, models)
    setting = {**(setting or {}), **_machine(devices)}

    def write() -> Report:
        report = report_of(bench, list(results.values()), setting, failures)
        report.save(folder)
        return report

    return group.on_main(write)


def _measured(
    bench: Bench, contenders: Iterable[Contender | Failure]
) -> tuple[dict[str, dict[str, Any]], dict[str, str], set[str]]:
    """Results and reasons of failures by name, and the devices; errors as of `compare`."""
    results: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    devices: set[str] = set()
    for contender in contenders:
        name = contender.name
        if name in results or name in failures:
            raise ValueError(f"expected a name for each model, got {name!r} twice")
        if isinstance(contender, Failure):
            failures[name] = contender.reason
            continue
        devices.add(str(contender.model.device))
        try:
            results[name] = bench.measure(contender)
        except NonFiniteError as error:
            failures[name] = str(error)
    if failures and not results:
        raise NonFiniteError("; ".join(f"{n}: {why}" for n, why in failures.items()))
    if not results:
        raise ValueError("expected models to compare, got none")
    return results, failures, devices


def _splits(
    data: str | DataConfig | tuple[ImageDataset, ImageDataset],
) -> tuple[ImageDataset, ImageDataset]:
    if isinstance(data, tuple):
        return data
    config = DataConfig(data) if isinstance(data, str) else data
    return load(config, "train"), load(config, "test")


def _machine(devices: Iterable[str]) -> dict[str, Any]:
    """The machine and versions that the seconds of a report depend on."""
    return {
        "device": ", ".join(sorted(devices)),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "exactflow": version("exactflow"),
    }
