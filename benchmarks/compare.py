"""All families under an equal budget on Fashion-MNIST, or on digits where there is none.

`make compare`; words on the command line are handed on to `exactflow compare`.
"""

import sys

from exactflow.cli import main
from exactflow.data import DataConfig, load

FAMILIES = ("whitening", "macow", "denseflow", "tarflow", "flow-matching", "iddpm", "hdit")
OWN_NAMES = {  # of about a million parameters each, but for whitening, which is what it is
    "whitening": "whitening-full",
    "macow": "macow-fashion-mnist-1m",
    "denseflow": "denseflow-fashion-mnist-1m",
    "tarflow": "tarflow-fashion-mnist-1m",
}
PLACES = ("fashion-mnist", "hub:zalando-datasets/fashion_mnist")  # on this disk; or fetched
PROTOCOL = (  # measuring takes no longer than training, on two cores
    "protocol.samples=512",
    "protocol.curve_samples=160",
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
    models = [OWN_NAMES.get(name, f"{name}-fashion-mnist") for name in FAMILIES]
    return [*models, "--data", source]


if __name__ == "__main__":
    sys.argv[1:] = ["compare", *words(found_source()), *PROTOCOL, *sys.argv[1:]]
    main()
