"""An estimate says whether the model was trained on the images that it is scored on."""

from typing import Any

import pytest
import torch

import exactflow
from exactflow.comparison.report import Report
from exactflow.likelihood.ode_estimate import ode_log_likelihood
from exactflow.likelihood.value import LogLikelihood
from exactflow.metrics.bits_per_dim import Evaluation
from exactflow.paths.ode import Euler
from exactflow.paths.path_model import PathModel


def scored(name: str, **fields: Any) -> LogLikelihood:
    torch.manual_seed(0)
    model = exactflow.build(name, **fields)
    assert isinstance(model, PathModel)
    images = torch.zeros(2, *model.event_shape, dtype=torch.int64)
    return ode_log_likelihood(model, images, solver=Euler(1))


@pytest.mark.parametrize(
    ("name", "fields", "centred"),
    [("flow-matching-tiny", {}, True), ("hdit-tiny", {}, True),
     ("flow-matching-tiny", {"dequantize": True}, False), ("flow-matching-digits", {}, False)],
)  # fmt: skip
def test_details_records_and_tables_say_it(
    name: str, fields: dict[str, Any], centred: bool
) -> None:
    found = scored(name, **fields)
    assert found.details["trained_on"] == ("centred images" if centred else "dequantised images")
    assert found.off_its_data == centred
    record = Evaluation(found, {}, 1.0, 1).describe()
    expected = "uniform; the model was trained on centred images" if centred else "uniform"
    assert record["dequantization"] == expected
    cells = Report._kinds(
        {"kind": found.kind, "bits_per_dim": 1.0, "standard_error": 0.1, **found.details}
    )
    assert cells == ["", "", "1.000 ± 0.100 †" if centred else "1.000 ± 0.100"]


def test_other_kinds_are_not_marked() -> None:
    density = LogLikelihood(torch.zeros(2), "dequantized", 4, 256, 1)
    assert not density.off_its_data
    assert Evaluation(density, {}, 1.0, 1).describe()["dequantization"] == "uniform"
