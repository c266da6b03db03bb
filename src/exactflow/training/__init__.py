"""Training: `fit` a model to a data set; running the same command again resumes it, bit for bit."""

from exactflow.training.optim import TrainConfig
from exactflow.training.progress import Callback, FitResult, Progress
from exactflow.training.session import Interrupted
from exactflow.training.trainer import fit

__all__ = ["Callback", "FitResult", "Interrupted", "Progress", "TrainConfig", "fit"]
