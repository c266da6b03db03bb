"""The checker of annotations in the tests: beartype with PEP 484's numeric tower.

With the tower, `float` accepts an int and `complex` a float, as in static checkers.

A check takes longer than many functions, so calls are sampled: the first calls of a function are
checked, then one of every so many. Over the thousands of tests all ways of calling are seen.
Functions that are defined inside others are not checked.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

FIRST, EVERY = 16, 32

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


def sparing(*, typechecker: Any) -> Callable[[Any], Any]:
    """The decorator that jaxtyping's import hook puts on every function."""

    def decorate(made: Any) -> Any:
        if "<locals>" in made.__qualname__:
            return made
        if inspect.isclass(made):
            if dataclasses.is_dataclass(made) and "__init__" in vars(made):
                made.__init__ = sampled(made.__init__, typechecker)
            return made
        return sampled(made, typechecker)

    return decorate


def sampled(made: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
    calls, checked = 0, None

    @functools.wraps(made)
    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, checked
        calls += 1
        if calls > FIRST and calls % EVERY:
            return made(*args, **kwargs)
        if checked is None:
            try:
                checked = _jaxtyped(made, typechecker=typechecker)
            except BeartypeDecorHintPep3119Exception:  # a protocol that isinstance cannot tell
                checked = made
        return checked(*args, **kwargs)

    return function


jaxtyping.jaxtyped = sparing
