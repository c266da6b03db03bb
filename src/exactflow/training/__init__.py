"""Training: `fit` a model to a data set; running the same command again resumes it, bit for bit."""

from exactflow.training.distributed import Interrupted
from exactflow.training.optim import TrainConfig
from exactflow.training.trainer import Callback, FitResult, Progress, fit

__all__ = ["Callback", "FitResult", "Interrupted", "Progress", "TrainConfig", "fit"]
