"""Measure models of any kind on the same images."""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from exactflow.comparison.protocol import (
    CHUNK,
    Contender,
    Protocol,
    draw,
    sampling_plans,
    scored,
    subset,
    subset_rows,
)
from exactflow.core.grey_levels import bits_per_dim
from exactflow.core.model import GenerativeModel
from exactflow.data.datasets import ImageDataset
from exactflow.metrics.bits_per_dim import check_fits
from exactflow.metrics.extractors import FeatureExtractor
from exactflow.metrics.memo import Arrays, Memo
from exactflow.metrics.memory import PeakMemory
from exactflow.metrics.quality import SampleQuality

Result = dict[str, Any]


@final
@dataclass(frozen=True)
class Bench:
    """The images and the protocol by which all models are measured.

    Attributes:
        training: images that are searched for the nearest neighbours of samples.
        held_out: images that are scored, and that samples are compared with.
        extractor: of the features that distances are taken in.
        protocol: how much is measured.
        folder: where results are kept.
        progress: show bars.
    """

    training: ImageDataset
    held_out: ImageDataset
    extractor: FeatureExtractor
    protocol: Protocol
    folder: Path
    progress: bool = False

    @cached_property
    def quality(self) -> SampleQuality:
        """The measure of samples."""
        folder = self.folder / "features"
        return SampleQuality(
            self.training, self.held_out, self.extractor, folder, self.protocol.seed, self.progress
        )

    def measure(self, contender: Contender) -> Result:
        """Measure one model; the result is JSON-able. Kept measurements are not repeated.

        Raises:
            ValueError: the model is not made for these images.
            NonFiniteError: a likelihood is not finite, or a sample of a model on a path.
        """
        model, protocol = contender.model, self.protocol
        check_fits(model, self.held_out)
        memo = self._memo(contender.name, {"weights": fingerprint(model)})
        likelihood = self._likelihood(model, memo)
        drawn = []
        for index, each in enumerate(sampling_plans(model, protocol)):
            count = protocol.few_samples if index else protocol.samples
            drawn.append(self._samples(contender, memo, each, count))
        memory = memo.keep("memory", asdict(protocol), lambda: self._memory(contender))
        return {
            "name": contender.name,
            "family": model.kind,
            "parameters": model.num_parameters,
            "num_classes": model.num_classes,
            "guidance": contender.guidance,
            "training": dict(contender.training),
            "curve": [dict(point) for point in contender.curve],
            "likelihood": likelihood,
            "samples": drawn[0],
            "other_steps": drawn[1:],
            "memory": memory,
        }

    def floor(self) -> Result:
        """The quality of training images, in the place of samples: that of a perfect model."""
        images, _ = self.training.tensors(subset_rows(self.training, self.protocol.samples))
        memo = self._memo("training-images", {})
        names = ("quality of few", "quality")
        return {"count": len(images), **self._quality(images, memo, names, {})}

    def drawn(self, name: str, count: int) -> Tensor:
        """The first main samples of a measured model, as grey levels."""
        parts = sorted((self.folder / name / "samples").glob("*.npz"))
        found: list[Tensor] = []
        while parts and sum(map(len, found)) < count:
            found.append(torch.from_numpy(np.load(parts.pop(0))["images"]))
        return torch.cat(found)[:count]

    def _memo(self, name: str, identity: Mapping[str, Any]) -> Memo:
        data = {"training": self.training.fingerprint, "held out": self.held_out.fingerprint}
        return Memo(self.folder / name, {**identity, **data}, self.progress)

    def _likelihood(self, model: GenerativeModel, memo: Memo) -> Result:
        """Mean over images with its kind and error."""
        protocol = self.protocol
        images, label = subset(self.held_out, protocol.scored_images(model), model)
        how = {"seed": protocol.seed, "images": len(images)}
        if model.iterative:
            how |= {
                "bound": protocol.bound_evaluations,
                "ode": [protocol.ode_solver, protocol.ode_steps],
            }

        def score(rows: range) -> Arrays:
            began = time.perf_counter()
            chosen = slice(rows.start, rows.stop)
            chunk = None if label is None else label[chosen]
            found = scored(model, images[chosen], chunk, protocol, first=rows.start)
            facts = {"kind": found.kind, "k": found.k, "dequantization": found.dequantization}
            return {
                "nats": found.nats.numpy(),
                "seconds": np.array([time.perf_counter() - began]),
                "facts": np.array([json.dumps({**facts, **found.details})]),
            }

        parts = memo.collect("likelihood", how, len(images), CHUNK, score)
        bits = bits_per_dim(parts["nats"], model.dims)
        facts = json.loads(str(parts["facts"][0]))
        noisy = facts["kind"] == "noisy-density"
        return {
            **facts,
            "bits_per_dim": None if noisy else float(bits.mean()),
            "standard_error": None if noisy else float(bits.std(ddof=1)) / math.sqrt(len(bits)),
            "images": len(bits),
            "seconds_per_image": float(parts["seconds"].sum()) / len(bits),
        }

    def _samples(
        self, contender: Contender, memo: Memo, plan: tuple[str, int | None], count: int
    ) -> Result:
        """Cost and quality of `count` samples."""
        model, (solver, steps) = contender.model, plan
        main = plan == sampling_plans(model, self.protocol)[0]
        name = "samples" if main else f"samples-{steps}"
        how = {"seed": self.protocol.seed, "solver": solver, "steps": steps, "count": count}
        if contender.guidance:
            how["guidance"] = contender.guidance

        def measure(rows: range) -> Arrays:
            drawn = draw(model, rows, plan, contender.guidance, self.protocol.seed)
            return {
                "images": drawn.images.cpu().numpy(),
                "seconds": np.array([drawn.seconds]),
                "evaluations": np.array([drawn.evaluations]),
                "failures": np.array([len(drawn.failures)]),
            }

        parts = memo.collect(name, how, count, CHUNK, measure)
        names = (f"quality of few {name}", f"quality of {name}")
        return {
            "solver": solver,
            "steps": steps,
            "count": count,
            "nonfinite": int(parts["failures"].sum()),
            "evaluations": float(parts["evaluations"].mean()),
            "seconds_per_sample": float(parts["seconds"].sum()) / count,
            **self._quality(torch.from_numpy(parts["images"]), memo, names, how),
        }

    def _memory(self, contender: Contender) -> Result:
        """Peak bytes of scoring and of drawing one chunk."""
        model, protocol = contender.model, self.protocol
        images, label = subset(self.held_out, CHUNK, model)
        peak = PeakMemory(model.device)
        scored(model, images, label, protocol)
        scoring, peak = peak.bytes(), PeakMemory(model.device)
        plan = sampling_plans(model, protocol)[0]
        draw(model, range(CHUNK), plan, contender.guidance, protocol.seed)
        return {"scoring": scoring, "sampling": peak.bytes(), "images": len(images)}

    def _quality(
        self, images: Tensor, memo: Memo, names: tuple[str, str], identity: Mapping[str, Any]
    ) -> Result:
        """Distances of images from the held-out ones, and from the nearest training image.

        The Frechet distance falls with the number of images. "curve_frechet" is that of the first
        few, as many as every point of a curve has. `names` are those of the two measurements.
        """
        if len(images) < 2:
            return {}
        found = []
        for part, name in zip((images[: self.protocol.few_samples], images), names, strict=True):
            how = {**identity, "extractor": self.extractor.name, "images": len(part)}
            found.append(memo.keep(name, how, partial(self.quality, part)))
        few, whole = found
        return {**whole, "curve_frechet": few["frechet"]}


def fingerprint(model: GenerativeModel) -> str:
    """Hash of kind, configuration and weights."""
    digest = hashlib.sha256(f"{model.kind} {model.config}".encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
