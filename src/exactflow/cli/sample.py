"""`exactflow sample`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exactflow import __version__
from exactflow.cli.arguments import Sample
from exactflow.cli.places import SamplesFolder, own_folder
from exactflow.cli.settings import NULL_LABEL, labels_named, load_model
from exactflow.cli.terminal import say
from exactflow.comparison.comparison import fingerprint
from exactflow.core import grey_levels as grey
from exactflow.core.files import finite, write_atomically, write_json
from exactflow.core.model import GenerativeModel
from exactflow.data.classes import class_number, numbered
from exactflow.data.decode import Preprocessing, decode_image
from exactflow.models.convert import load_classifier
from exactflow.models.diffusion.classifier import ClassifierUNet
from exactflow.parallel.process_group import current
from exactflow.pictures import grids as pictures
from exactflow.pictures.profiles import inversion_plot
from exactflow.sampling.denoiser import ClassifierGuidance
from exactflow.sampling.guidance import Guidance
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.sample import sample
from exactflow.sampling.samples import Samples
from exactflow.sampling.solvers import solver_for


def run(command: Sample) -> None:
    """Draw samples and write them with their cost and all they depend on."""
    seeds = range(command.seed, command.seed + command.n)
    out = command.out or own_folder(command.model, "sampled")
    folder = SamplesFolder(out, seeds, own=command.out is None)
    model = load_model(command.model, command.device)
    classifier = None if command.classifier is None else load_classifier(command.classifier)
    label = _label(command, model, classifier)
    if len(label) not in (0, 1, command.n):
        raise ValueError(
            f"expected no label, one, or {command.n} (one per sample), got {len(label)}"
        )
    solver = solver_for(
        model, command.solver, steps=command.steps, tolerance=command.tolerance, eta=command.eta
    )
    drawn = sample(
        model,
        command.n,
        label[0] if len(label) == 1 else label or None,
        command.seed,
        solver,
        _guidance(command, None if classifier is None else classifier.to(model.device)),
        batch_size=command.batch_size,
        options=SamplingOptions(
            temperature=command.temperature,
            denoise=command.denoise,
            trace=command.trace,
            profile=command.profile,
            low=None if command.low is None else _low(command.low, seeds),
            on_nonfinite="omit",  # one of many that fails does not take the others with it
            progress=True,
        ),
    )
    for seed, where in drawn.failures.items():
        say(f"left out: the sample with seed {seed} became non-finite in {where}")
    if not drawn.seeds:
        raise ArithmeticError(f"none of {command.n} samples is finite")
    current().on_main(lambda: _write(command, folder, model, drawn))
    say(_summary(drawn, out))
    if drawn.failures and command.on_nonfinite == "raise":
        raise ArithmeticError(
            f"{len(drawn.failures)} of {command.n} samples are not finite; the others are in {out}"
        )


def _write(command: Sample, folder: SamplesFolder, model: GenerativeModel, drawn: Samples) -> None:
    """Pictures, and last of all the record of them."""
    out = folder.path
    folder.clear(drawn.seeds)
    pictures.save(pictures.grid(drawn.images, model.levels), out / "samples.png")
    for seed, image in zip(drawn.seeds, drawn.images, strict=True):
        pictures.save(pictures.single(image, model.levels), folder.single(seed))
    if drawn.trace is not None:
        pictures.save(pictures.trajectory_grid(drawn.trace[:, :8]), out / "trace.png")
    if drawn.passes is not None:
        write_atomically(out / "inversion.png", inversion_plot(drawn.passes))
    write_json(out / "samples.json", finite(_record(command, model, drawn)))


def _record(command: Sample, model: GenerativeModel, drawn: Samples) -> dict[str, Any]:
    """What was drawn, from what, how, and at which cost."""
    label = None if drawn.label is None else drawn.label.tolist()
    known = None if model.num_classes == 0 else label  # else they are the classifier's
    names = (*(model.class_names or numbered(model.num_classes)), NULL_LABEL)
    return {
        "exactflow": __version__,
        "torch": torch.__version__,
        "model": command.model,
        "kind": model.kind,
        "fingerprint": fingerprint(model),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seeds": drawn.seeds,
        "label": label,
        "label_names": None if known is None else [names[index] for index in known],
        "solver": command.solver,
        "steps": command.steps,
        "tolerance": command.tolerance,
        "guidance": command.guidance if model.iterative else asdict(_rule(command)),
        "classifier": None if command.classifier is None else str(command.classifier),
        "low": None if command.low is None else str(command.low),
        "eta": command.eta,
        "denoise": command.denoise,
        "temperature": command.temperature,
        "evaluations": drawn.evaluations,
        "iterations": drawn.iterations,
        "seconds": drawn.seconds,
        "loading": drawn.loading,
        "certificate": drawn.certificate.tolist() if drawn.iterations else None,
        "repairs": drawn.repairs,
        "beyond_tolerance": drawn.beyond_tolerance,
        "failures": drawn.failures,
    }


def _summary(drawn: Samples, out: Path) -> str:
    return (
        f"{len(drawn.seeds)} samples in {drawn.seconds:.2f} s, "
        + (f"{drawn.loading:.2f} s of loading compiled steps before, " if drawn.loading else "")
        + (
            f"{drawn.evaluations} evaluations, "
            f"largest round-trip residual {float(drawn.certificate.max()):.1e}"
            if drawn.iterations
            else f"{drawn.evaluations or 1} passes"
        )
        + (f", {sum(drawn.repairs)} repairs" if any(drawn.repairs) else "")
        + (
            f", {len(drawn.beyond_tolerance)} beyond the tolerance"
            if drawn.beyond_tolerance
            else ""
        )
        + f": {out / 'samples.png'}"
    )


def _label(command: Sample, model: GenerativeModel, classifier: ClassifierUNet | None) -> list[int]:
    """Classes to sample; a classifier's where the model has none."""
    if classifier is None or model.num_classes:
        return labels_named(model, command.label)
    names = numbered(classifier.config.num_classes)
    return [class_number(word, names, "the classifier") for word in command.label]


def _low(folder: Path, seeds: range) -> Tensor:
    """The small images of these seeds, in [-1, 1]."""
    small, stored = SamplesFolder(folder, seeds, own=True), Preprocessing()
    files = [small.single(seed) for seed in seeds]
    images = [torch.tensor(decode_image(file, str(file), stored)) for file in files]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"{folder}: expected samples of one size, got {sorted(shapes)}")
    return grey.center(torch.stack(images), grey.PHOTOGRAPHIC_LEVELS)


def _guidance(command: Sample, classifier: ClassifierUNet | None) -> Guidance | ClassifierGuidance:
    if classifier is not None:
        return ClassifierGuidance(classifier, command.guidance)
    return _rule(command)


def _rule(command: Sample) -> Guidance:
    return Guidance(
        command.guidance,
        command.guidance_rule,
        command.guidance_schedule,
        command.attention_temperature,
    )
