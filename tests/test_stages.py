"""Kept measurements are read if their settings are the same, otherwise taken again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exactflow.metrics.memo import Arrays, Memo


def counted(calls: list[range]) -> Callable[[range], Arrays]:
    def measure(rows: range) -> Arrays:
        calls.append(rows)
        return {"square": np.array([row**2 for row in rows]), "parts": np.array([1])}

    return measure


def test_a_killed_collection_goes_on_where_it_was(tmp_path: Path) -> None:
    calls: list[range] = []

    def dying(rows: range) -> Arrays:
        if rows.start == 6:
            raise KeyboardInterrupt
        return counted(calls)(rows)

    with pytest.raises(KeyboardInterrupt):
        Memo(tmp_path, {}).collect("squares", {"seed": 1}, 10, 3, dying)
    assert calls == [range(3), range(3, 6)]
    found = Memo(tmp_path, {}).collect("squares", {"seed": 1}, 10, 3, counted(calls))
    assert calls == [range(3), range(3, 6), range(6, 9), range(9, 10)]
    assert found["square"].tolist() == [row**2 for row in range(10)]
    assert found["parts"].tolist() == [1, 1, 1, 1]


def test_another_identity_is_measured_again(tmp_path: Path) -> None:
    calls: list[range] = []
    for whole, own in (({"w": 1}, {"s": 1}), ({"w": 1}, {"s": 2}), ({"w": 2}, {"s": 2})):
        for _ in range(2):
            Memo(tmp_path, whole).collect("squares", own, 4, 4, counted(calls))
    assert len(calls) == 3


def test_more_rows_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    calls: list[range] = []
    for count in (4, 8):
        found = Memo(tmp_path, {}).collect("squares", {}, count, 4, counted(calls))
        assert len(found["square"]) == count
    assert calls == [range(4), range(4, 8)]


def test_results_are_kept_with_their_identity(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, object]:
        calls.append(1)
        return {"value": (1, 2.5, None)}

    for identity in ({"seed": (0, 1)}, {"seed": (0, 1)}, {"seed": (0, 2)}):
        found = Memo(tmp_path, {}).keep("mean", identity, measure)
        assert found == {"value": [1, 2.5, None]}
    assert len(calls) == 2
