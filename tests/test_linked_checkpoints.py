"""Links in a run folder: a run removes what is its own, never what a link leads to."""

from pathlib import Path

import pytest

from stopped_runs import go_on, names_in


def test_nothing_is_removed_behind_a_link_that_leads_out_of_the_run(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    for name in ("step_00000001", ".step_00000002.partial", "step_00000003.damaged"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "precious").touch()
    run.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    with pytest.warns(UserWarning, match="nothing is removed there|set aside"):
        go_on(run, keep=1)
    assert len(list(elsewhere.glob("*/precious"))) == 3
    # The one that is no checkpoint was set aside, and took nobody's place.
    assert (elsewhere / "step_00000001.damaged" / "precious").exists()
    assert {f"step_0000000{step}" for step in range(1, 7)} <= names_in(elsewhere)


def test_a_link_inside_of_the_run_folder_is_as_good_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / "saved").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to("saved")
    go_on(tmp_path / "run", keep=1)
    assert names_in(tmp_path / "run" / "saved") == {"step_00000006"}


def test_of_a_checkpoint_that_is_a_link_the_link_is_removed(tmp_path: Path) -> None:
    go_on(tmp_path / "run", keep=1, stop=2)
    moved = tmp_path / "kept"
    (step,) = (tmp_path / "run" / "checkpoints").glob("step_????????")
    step.rename(moved)
    step.symlink_to(moved)
    go_on(tmp_path / "run", keep=1)
    assert names_in(tmp_path / "run" / "checkpoints") == {"step_00000006"}
    assert names_in(moved) >= {"state.json", "model.safetensors"}


def test_a_damaged_checkpoint_does_not_replace_an_earlier_one(tmp_path: Path) -> None:
    for content in ("a", "b"):
        folder = tmp_path / "run" / "checkpoints" / "step_00000004"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(content)
        with pytest.warns(UserWarning, match="set aside"):
            go_on(tmp_path / "run", stop=1)
    kept = sorted((tmp_path / "run" / "checkpoints").glob("*.damaged*"))
    assert [folder.name for folder in kept] == [
        "step_00000004.damaged",
        "step_00000004.damaged-2",
    ]
    assert [(folder / "state.json").read_text() for folder in kept] == ["a", "b"]
