"""Detection of NaN and infinity where they appear: an error, or samples that are left out."""

from collections.abc import Sequence
from typing import Literal, final

from exactflow.core.model import NonFiniteError
from exactflow.core.shapes import Values

OnNonFinite = Literal["raise", "omit"]


@final
class Watch:
    """A check of the results of a batch.

    Args:
        seeds: of the samples, for messages.
        on_nonfinite: raise NonFiniteError, or note the sample in `failures` and go on.
    """

    def __init__(self, seeds: Sequence[int], on_nonfinite: OnNonFinite = "raise") -> None:
        self.seeds = list(seeds)
        self.on_nonfinite = on_nonfinite
        self.failures: dict[int, str] = {}

    def __call__(self, result: Values, place: str) -> None:
        """Note or raise the first place of every sample that is not finite.

        Args:
            result: tokens, (batch, tokens, dim), or images.
            place: block or step that they come from.
        """
        finite = result.isfinite().flatten(2).all(-1)
        if bool(finite.all()):
            return
        for row in (~finite).any(1).nonzero()[:, 0].tolist():
            where = place
            if result.dim() == 3:
                where += f", token {int((~finite[row]).nonzero()[0, 0])}"
            self.failures.setdefault(self.seeds[row], where)
        if self.on_nonfinite == "raise":
            seed, where = next(iter(self.failures.items()))
            raise NonFiniteError(
                f"the sample of seed {seed} became non-finite in {where} "
                f"({len(self.failures)} of {len(self.seeds)} samples of this batch did): "
                "the model overflows there; on_nonfinite='omit' reports such samples and leaves "
                "them out"
            )
