"""Which steps of a chain to train on: importance sampling by the second moment of the loss."""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from exactflow.parallel import shared_batch as batch

HISTORY = 10  # last losses of each step that its second moment is taken of
UNIFORM_SHARE = 0.001  # of the draws, whatever the losses


@final
class StepImportance(nn.Module):
    """Draws step t with p_t ~ sqrt(E[L_t^2]) (Nichol and Dhariwal, arXiv 2102.09672, eq. 18).

    E[L_t^2] is the mean over the last 10 losses seen at t; until every step has been seen 10 times
    the law is uniform, and it keeps a uniform share of 0.001. Weights 1 / (T p_t) make a weighted
    loss unbiased whatever the history. The history is part of the model's state, from which a run
    resumes. Processes that train together draw and record the steps of the whole batch, so that all
    have the same history.

    Args:
        steps: T.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(steps, HISTORY))
        self.register_buffer("seen", torch.zeros(steps, dtype=torch.int64))

    def probabilities(self) -> Float[Tensor, " steps"]:
        """p_t, float64."""
        losses, seen = self.get_buffer("losses").double(), self.get_buffer("seen")
        size = losses.square().mean(1).sqrt()
        uniform = torch.full_like(size, 1 / len(size))
        law = (1 - UNIFORM_SHARE) * size / size.sum() + UNIFORM_SHARE * uniform
        return torch.where((seen >= HISTORY).all(), law, uniform)

    def draw(
        self, count: int, generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, " count"], Float[Tensor, " count"]]:
        """Random steps and the weights 1 / (T p_t) of their losses."""
        law = self.probabilities()
        step = batch.own_rows(
            lambda rows: torch.multinomial(law, rows, replacement=True, generator=generator), count
        )
        return step, 1 / (len(law) * law[step])

    @torch.no_grad()
    def record(self, step: Int[Tensor, " count"], loss: Float[Tensor, " count"]) -> None:
        """Add the unweighted losses of steps to the history, in order."""
        losses, seen = self.get_buffer("losses"), self.get_buffer("seen")
        order = torch.argsort(step, stable=True)
        step, loss = step[order], loss[order]
        first = torch.searchsorted(step, step)
        place = torch.arange(len(step), device=step.device)
        last = torch.searchsorted(step, step, right=True) - 1
        cell = (seen[step] + place - first) % HISTORY
        newest = last - (last - place) % HISTORY  # of the losses for one cell, the one that stays
        losses[step, cell] = loss[newest].to(losses.dtype)
        seen.index_add_(0, step, torch.ones_like(step))
