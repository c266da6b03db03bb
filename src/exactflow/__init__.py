"""exactflow: image models with a likelihood you can trust."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exactflow.comparison.compare import compare as compare
    from exactflow.core.model import Flow as Flow
    from exactflow.core.model import GenerativeModel as GenerativeModel
    from exactflow.data.memory import load_data as load_data
    from exactflow.latent.interpolation import interpolate as interpolate
    from exactflow.latent.interpolation import reconstruct as reconstruct
    from exactflow.likelihood.log_likelihood import log_likelihood as log_likelihood
    from exactflow.likelihood.value import LogLikelihood as LogLikelihood
    from exactflow.metrics.bits_per_dim import evaluate as evaluate
    from exactflow.models import registry
    from exactflow.models.convert import convert as convert
    from exactflow.models.convert import load_classifier as load_classifier
    from exactflow.models.pretrained import from_pretrained as from_pretrained
    from exactflow.models.registry import build as build
    from exactflow.runs import EarlyStopping as EarlyStopping
    from exactflow.runs import Trained as Trained
    from exactflow.runs import ValidationScore as ValidationScore
    from exactflow.runs import train as train
    from exactflow.sampling import solvers
    from exactflow.sampling.denoiser import ClassifierGuidance as ClassifierGuidance
    from exactflow.sampling.guidance import Guidance as Guidance
    from exactflow.sampling.planner import plan as plan
    from exactflow.sampling.request import SamplingOptions as SamplingOptions
    from exactflow.sampling.sample import sample as sample
    from exactflow.sampling.samples import Samples as Samples
    from exactflow.training.optim import TrainConfig as TrainConfig
    from exactflow.training.trainer import fit as fit

__version__ = "0.1.0"

# public name -> module; imported on first use, so that `exactflow --help` needs no torch
_HOMES = {
    "ClassifierGuidance": "exactflow.sampling.denoiser",
    "EarlyStopping": "exactflow.runs",
    "Flow": "exactflow.core.model",
    "GenerativeModel": "exactflow.core.model",
    "Guidance": "exactflow.sampling.guidance",
    "LogLikelihood": "exactflow.likelihood.value",
    "Samples": "exactflow.sampling.samples",
    "SamplingOptions": "exactflow.sampling.request",
    "TrainConfig": "exactflow.training.optim",
    "Trained": "exactflow.runs",
    "ValidationScore": "exactflow.runs",
    "build": "exactflow.models.registry",
    "compare": "exactflow.comparison.compare",
    "convert": "exactflow.models.convert",
    "evaluate": "exactflow.metrics.bits_per_dim",
    "fit": "exactflow.training.trainer",
    "from_pretrained": "exactflow.models.pretrained",
    "interpolate": "exactflow.latent.interpolation",
    "load_classifier": "exactflow.models.convert",
    "load_data": "exactflow.data.memory",
    "log_likelihood": "exactflow.likelihood.log_likelihood",
    "plan": "exactflow.sampling.planner",
    "reconstruct": "exactflow.latent.interpolation",
    "sample": "exactflow.sampling.sample",
    "train": "exactflow.runs",
}

_MODULES = {"registry": "exactflow.models.registry", "solvers": "exactflow.sampling.solvers"}

__all__ = [
    "ClassifierGuidance",
    "EarlyStopping",
    "Flow",
    "GenerativeModel",
    "Guidance",
    "LogLikelihood",
    "Samples",
    "SamplingOptions",
    "TrainConfig",
    "Trained",
    "ValidationScore",
    "__version__",
    "build",
    "compare",
    "convert",
    "evaluate",
    "fit",
    "from_pretrained",
    "interpolate",
    "load_classifier",
    "load_data",
    "log_likelihood",
    "plan",
    "reconstruct",
    "registry",
    "sample",
    "solvers",
    "train",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'exactflow' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
