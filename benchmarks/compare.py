"""All families under an equal budget on Fashion-MNIST, or on digits if Fashion-MNIST is not found.

`make compare` runs it; words on the command line are passed on to `exactflow compare`.
"""

import sys

from exactflow.cli import main
from exactflow.data import DataConfig, load

FAMILIES = ("whitening", "macow", "denseflow", "tarflow", "flow-matching", "iddpm", "hdit")
# About a million parameters each, except whitening. Families that need different recipes for
# likelihood and for samples have one model of each; TarFlow also has its published conditional.
FASHION = (
    "whitening-full",
    "macow-fashion-mnist-1m",
    "denseflow-fashion-mnist-1m",
    "tarflow-fashion-mnist-1m-affine",
    "tarflow-fashion-mnist-1m",
    "tarflow-fashion-mnist-1m-samples",
    "flow-matching-fashion-mnist",
    "flow-matching-fashion-mnist-samples",
    "iddpm-fashion-mnist",
    "hdit-fashion-mnist",
)
PLACES = ("fashion-mnist", "hub:zalando-datasets/fashion_mnist")  # on this disk; downloaded
PROTOCOL = (  # measuring takes no longer than training, on two cores
    "protocol.samples=512",
    "protocol.curve_samples=160",
    "protocol.evaluations=[50, 10]",
    "protocol.images=1000",
    "protocol.estimate_images=128",
)


def found_source() -> str | None:
    """The first place that has Fashion-MNIST."""
    for place in PLACES:
        try:
            load(DataConfig(place, limit=1), "test")
        except (ValueError, OSError, ImportError) as error:
            print(f"{place}: {error}", file=sys.stderr)
        else:
            return place
    return None


def words(source: str | None) -> list[str]:
    """The models and where their images are."""
    if source is None:
        tiny = {"whitening": "whitening-tiny"}
        return [*(tiny.get(name, f"{name}-digits") for name in FAMILIES), "--data", "digits"]
    return [*FASHION, "--data", source]


if __name__ == "__main__":
    sys.argv[1:] = ["compare", *words(found_source()), *PROTOCOL, *sys.argv[1:]]
    main()
