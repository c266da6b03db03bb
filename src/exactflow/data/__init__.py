"""Image sets with an identity, and batches that depend on nothing but seed and step."""

from exactflow.data.augmentation import Augmentation
from exactflow.data.config import DataConfig, DataError, Split
from exactflow.data.datasets import ImageDataset, load
from exactflow.data.loader import Batch, Share, evaluation_batches, training_batches
from exactflow.data.preparation import prepare
from exactflow.data.prepared import verify
from exactflow.data.streaming.indexing import index_shards

__all__ = [
    "Augmentation",
    "Batch",
    "DataConfig",
    "DataError",
    "ImageDataset",
    "Share",
    "Split",
    "evaluation_batches",
    "index_shards",
    "load",
    "prepare",
    "training_batches",
    "verify",
]
