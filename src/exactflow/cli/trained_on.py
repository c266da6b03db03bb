"""What a model was trained on, where that is not what it is measured on."""

from dataclasses import replace

from exactflow.core.model import GenerativeModel
from exactflow.data import DataConfig, ImageDataset, load
from exactflow.metrics.baselines import FIT_IMAGES
from exactflow.models.pretrained import recorded_data

COMPARED = FIT_IMAGES  # images: a larger training split is not read only to be compared


def trained_on(model: GenerativeModel, data: DataConfig, held_out: ImageDataset) -> str:
    """What a model was trained on, if not on the training split of the data; else nothing.

    Args:
        model: as it was loaded.
        data: how the data are read.
        held_out: one of their splits.
    """
    card = recorded_data(model)
    if not card:
        return ""
    known = f"{card['id']}, version {card['version']}"
    if card["version"] != held_out.version:
        return known
    unread = "" if card["id"] == held_out.id else known
    if card["count"] > COMPARED:
        return unread
    limit = card["count"] + card["skipped"]  # as then, whatever is asked for now
    try:
        training = load(replace(data, limit=limit), "train")
    except (ValueError, OSError, ImportError):  # only held-out images are here
        return unread
    if training.fingerprint == card["fingerprint"]:
        return ""
    return (
        f"{known}: {card['count']:,} images, fingerprint {card['fingerprint'][:12]}; the training "
        f"split as it is read here is another, {training.fingerprint[:12]}, so that held-out "
        "images may be among those it was trained on"
    )
