"""What can be typed: every verb and its options. Nothing here imports torch: `--help` is quick.

The first sentence of a class is what `exactflow --help` says of its verb.
"""

from exactflow.cli.arguments.data import Index, Prepare
from exactflow.cli.arguments.density import (
    Attributes,
    Classify,
    Denoise,
    Encode,
    Evaluate,
    Inpaint,
    Outliers,
)
from exactflow.cli.arguments.model import Convert, Cost, Info, Plan, Sample, Train
from exactflow.cli.arguments.study import Compare, Convergence, Demo, Results


def verb_of(kind: type) -> str:
    """Name of the verb that takes these arguments; `exactflow.cli.VERB` carries it out."""
    return kind.__name__.lower()


GROUPS: dict[str, tuple[type, ...]] = {
    "Model": (Train, Sample, Plan, Info, Cost, Convert),
    "Data": (Prepare, Index),
    "Uses of a density": (Evaluate, Encode, Attributes, Classify, Outliers, Inpaint, Denoise),
    "Study": (Compare, Results, Convergence, Demo),
}
VERBS = {verb_of(kind): kind for kinds in GROUPS.values() for kind in kinds}
SHARED = (Train, Sample, Evaluate, Compare)  # what the processes of torchrun can work on together
