"""A comparison first prints what it will do and how long that takes."""

import sys
from pathlib import Path

import pytest

from exactflow.cli import compare, main
from exactflow.comparison import expected_time
from exactflow.comparison.expected_time import FEW, expected_seconds
from exactflow.comparison.protocol import CHUNK, Protocol
from exactflow.data import DataConfig, ImageDataset, load
from exactflow.models import registry

SMALL = Protocol(
    images=128, estimate_images=64, bound_evaluations=20, ode_steps=20, samples=640,
    evaluations=(40, 10), curve_samples=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def held_out() -> ImageDataset:
    return load(DataConfig(), "test")


@pytest.mark.parametrize(
    ("preset", "chunks"),
    [
        # one second for a chunk of scores, and one for a chunk of samples
        ("tarflow-tiny", 128 / CHUNK + 640 / CHUNK),
        ("flow-matching-tiny", (64 * 20 / FEW + 640 * 20 / FEW + 64 * 5 / FEW) / CHUNK),
        # its chain has 20 steps, fewer than were asked for
        ("iddpm-tiny", (128 * 20 / FEW + 640 * 20 / FEW + 64 * 10 / FEW) / CHUNK),
    ],
)
def test_the_expectation_grows_with_what_is_done(
    preset: str, chunks: float, held_out: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_second(work, model) -> float:
        work()
        return 1.0

    monkeypatch.setattr(expected_time, "_seconds", one_second)
    model = registry.build(preset, image_shape=(1, 8, 8), levels=17).eval()
    assert expected_seconds(model, held_out, SMALL) == pytest.approx(chunks)


def test_a_comparison_says_its_plan_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    said = []

    def nothing(contenders: object, *args: object, **options: object) -> None:
        said.append(capsys.readouterr().err)
        raise ValueError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "compare", nothing)
    words = ["tarflow-tiny", "whitening-tiny", "--budget", "90s", "protocol.samples=64"]
    monkeypatch.setattr(sys, "argv", ["exactflow", "compare", *words])
    with pytest.raises(SystemExit):
        main()
    assert "to do: train tarflow-tiny, whitening-tiny for 90 s each, then measure 2" in said[0]
    assert "expected: about 3 minutes at most" in said[0], "of which the trainings take 180 s"
    assert not list(tmp_path.iterdir()), "nothing is done yet"
