"""Reversible training: the input of a block is recovered from its output.

Plain training keeps all intermediate tensors of every block, activation checkpointing keeps the
block's input. Here a composition keeps its last output, and the input of each part that is not
reversible. The backward pass goes through the parts from the last to the first: a reversible part
is inverted, which gives the output of the part before; any other is evaluated again from its input.
A network is evaluated twice, as with activation checkpointing.

A recovered input differs from the true one by rounding, and so do the gradients.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from exactflow.core.composition import Composition, Retraced, ReversibleTransform
from exactflow.core.model import Flow, GenerativeModel
from exactflow.training.optim import recomputed


@contextmanager
def reversible(model: GenerativeModel, active: bool) -> Iterator[None]:
    """Keep no recoverable input of compositions inside, and of other stages the input alone.

    Names of parameters do not change. No stage may write to its buffers: it would do so twice.

    Raises:
        ValueError: see `check_reversible`.
    """
    if not active:
        yield
        return
    check_reversible(model)
    compositions = [part for part in model.modules() if isinstance(part, Composition)]
    within = [module for made in compositions for part in made.parts for module in part.modules()]
    inside = {id(module) for module in [*compositions, *within]}
    for made in compositions:
        made.through = partial(_through, made)
    try:
        with recomputed([stage for stage in model.stages if id(stage) not in inside], True):
            yield
    finally:
        for made in compositions:
            del made.through  # uncovers the method of the class


def check_reversible(model: GenerativeModel) -> None:
    """Raise ValueError unless the model is a flow that is trained by gradients."""
    if model.closed_form or not isinstance(model, Flow):
        raise ValueError(
            "TrainConfig.reversible: expected a flow that is trained by gradients, got "
            f"{type(model).__name__}"
        )


def _through(made: Composition, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        return Composition.through(made, x, context)
    parameters = dict.fromkeys(p for part in made.parts for p in part.parameters())
    needed = [parameter for parameter in parameters if parameter.requires_grad]
    return _Through.apply(made.parts, x, context, *needed)


@final
class _Through(torch.autograd.Function):
    """`Composition.through` as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        parts: Sequence[nn.Module],
        x: Tensor,
        context: Tensor | None,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        device = x.device.type
        ctx.parts, ctx.parameters, ctx.device = parts, parameters, device
        ctx.autocast = (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        kept: list[Tensor] = []
        log_abs_det = x.new_zeros(len(x))
        with torch.autocast(device, *ctx.autocast, cache_enabled=False):
            for part in parts:
                if not _is_reversible(part):
                    kept.append(x)
                x, change = part(x, context=context)
                log_abs_det = log_abs_det + change
        if _is_reversible(parts[-1]):
            kept.append(x)
        ctx.save_for_backward(context, *kept)
        return x, log_abs_det

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # only with create_graph=True
            raise NotImplementedError("reversible training has no second derivatives")
        context, *kept = ctx.saved_tensors
        if context is not None:
            context = context.detach().requires_grad_(ctx.needs_input_grad[2])
        walk = _Walk(context, *grads)
        # No cache of autocast: its copies of weights take memory, and one that was made without
        # gradients must not be used where gradients are needed.
        with torch.enable_grad(), torch.autocast(ctx.device, *ctx.autocast, cache_enabled=False):
            z = kept.pop() if _is_reversible(ctx.parts[-1]) else None
            for part in reversed(ctx.parts):
                if _is_reversible(part):
                    for step in reversed(_steps(part)):
                        assert z is not None  # kept, or the input of the part behind
                        z = walk.back(step, step.retrace(z, context))
                else:
                    x = kept.pop().detach().requires_grad_()
                    z = walk.back(part, Retraced((x,), *part(x, context=context)))
        return None, walk.grad, walk.grad_context, *map(walk.grads.get, ctx.parameters)


@final
class _Walk:
    """The gradients of the loss, carried from the last part to the first.

    Args:
        context: of all parts, a leaf; None if there is none.
        grad: with respect to the last part's output.
        grad_log_abs_det: with respect to the sum of the ln |det|.
    """

    def __init__(self, context: Tensor | None, grad: Tensor, grad_log_abs_det: Tensor) -> None:
        self.grad, self.grad_log_abs_det = grad, grad_log_abs_det
        self.grad_context: Tensor | None = None
        self.grads: dict[nn.Parameter, Tensor] = {}
        self._contexts = [] if context is None or not context.requires_grad else [context]

    def back(self, part: nn.Module, retraced: Retraced) -> Tensor:
        """Carry the gradients through `part` and return its input."""
        pairs = [(retraced.z, self.grad), (retraced.log_abs_det, self.grad_log_abs_det)]
        ends, grads = zip(*((end, grad) for end, grad in pairs if end.requires_grad), strict=True)
        parameters = [p for p in part.parameters() if p.requires_grad]
        wanted = [*retraced.inputs, *self._contexts, *parameters]
        found = list(torch.autograd.grad(ends, wanted, grads, allow_unused=True))
        of_parameters = found[len(wanted) - len(parameters) :]
        for parameter, grad in zip(parameters, of_parameters, strict=True):
            total = _sum(self.grads.get(parameter), grad)
            if total is not None:
                self.grads[parameter] = total
        count = len(retraced.inputs)
        if self._contexts:
            self.grad_context = _sum(self.grad_context, found[count])
        self.grad = found[0] if count == 1 else torch.cat(found[:count], dim=1)
        return retraced.x


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of gradients, None standing for zero."""
    return second if first is None else first if second is None else first + second


def _is_reversible(part: nn.Module) -> bool:
    """Whether the part's input can be recovered."""
    if isinstance(part, Composition):
        return all(map(_is_reversible, part.parts))
    return isinstance(part, ReversibleTransform)


def _steps(part: nn.Module) -> list[ReversibleTransform]:
    """The transforms that a reversible part is composed of, or itself, first applied first."""
    if isinstance(part, Composition):
        return [step for inner in part.parts for step in _steps(inner)]
    assert isinstance(part, ReversibleTransform)
    return [part]
