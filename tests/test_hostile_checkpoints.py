"""Loading a shared run folder never runs code from its files."""

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from exactflow.core.split_tensors import read_layout
from exactflow.core.tensor_files import read_pickled
from stopped_runs import go_on, sign, stopped, stopped_split
from test_training import assert_same_bits
from training_worker import make_toy


class Program:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.mkdir, (str(self.trace),))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stopped runs, which tests copy and do not change."""
    folder = tmp_path_factory.mktemp("runs")
    stopped(folder / "whole")
    stopped_split(folder / "split")
    return folder


@pytest.fixture
def whole(runs: Path, tmp_path: Path) -> Path:
    """The newest checkpoint of a run of one process, to be changed."""
    return copied(runs / "whole", tmp_path)


@pytest.fixture
def split(runs: Path, tmp_path: Path) -> Path:
    """The same of a run whose parameters were split."""
    return copied(runs / "split", tmp_path)


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "run")
    return max((folder / "run" / "checkpoints").iterdir())


def test_a_split_checkpoint_goes_on_as_a_whole_one_does(tmp_path: Path, split: Path) -> None:
    alone, parts = make_toy(), make_toy()
    go_on(tmp_path / "alone", alone)
    go_on(tmp_path / "run", parts)
    assert_same_bits(parts.state_dict(), alone.state_dict())


@pytest.mark.parametrize("place", ["whole", "entry", "size", "path"])
def test_a_layout_that_is_a_program_is_not_run(place: str, split: Path, tmp_path: Path) -> None:
    checkpoint, trace = split, tmp_path / "trace"
    file = checkpoint / "tensors" / ".metadata"
    layout, program = pickle.loads(file.read_bytes()), Program(trace)
    entry = next(iter(layout.state_dict_metadata.values()))
    if place == "entry":
        layout.planner_data = {"model": program}
    elif place == "size":
        entry.size = program
    elif place == "path":
        layout.storage_meta.checkpoint_id = program
    file.write_bytes(pickle.dumps(program if place == "whole" else layout))
    sign(checkpoint)
    with pytest.raises(ValueError, match=r"\.metadata: .*asks for posix.mkdir; nothing in it was"):
        go_on(tmp_path / "run")
    assert not trace.exists()


def test_a_part_that_is_a_program_is_not_run(split: Path, tmp_path: Path) -> None:
    """PyTorch unpickles entries that the layout declares as bytes instead of tensors."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    checkpoint, trace = split, tmp_path / "trace"
    file = checkpoint / "tensors" / ".metadata"
    layout = pickle.loads(file.read_bytes())
    name, part = next(iter(layout.storage_data.items()))
    buffer = io.BytesIO()
    torch.save(Program(trace), buffer)
    (checkpoint / "tensors" / part.relative_path).write_bytes(buffer.getvalue())
    part.offset, part.length = 0, len(buffer.getvalue())
    layout.state_dict_metadata[name.fqn] = BytesStorageMetadata()
    file.write_bytes(pickle.dumps(layout))
    sign(checkpoint)
    with pytest.raises(ValueError, match=r"asks for .*BytesStorageMetadata"):
        go_on(tmp_path / "run")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_path": "../../../secret"}, "a part '../../../secret'"),
        ({"relative_path": "/dev/zero"}, "a part '/dev/zero'"),
        ({"length": 10**12}, "which has no such bytes"),
        ({"length": -1}, "-1 in place of a number"),
        ({"offset": 1.5}, "1.5 in place of a number"),
        ({"transform_descriptors": ["zstd"]}, "a part that is packed"),
    ],
)
def test_parts_lie_in_their_folder_and_file(
    change: dict[str, Any], message: str, split: Path, tmp_path: Path
) -> None:
    source = split / "tensors"
    layout = pickle.loads((source / ".metadata").read_bytes())
    vars(next(iter(layout.storage_data.values()))).update(change)
    for part in source.glob("*.distcp"):
        (tmp_path / part.name).write_bytes(part.read_bytes())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(layout))
    with pytest.raises(ValueError, match=message):
        read_layout(tmp_path)


def test_shapes_that_are_not_the_models_take_no_memory(split: Path, tmp_path: Path) -> None:
    checkpoint = split
    file = checkpoint / "tensors" / ".metadata"
    layout = pickle.loads(file.read_bytes())
    name = next(name for name in layout.state_dict_metadata if name.startswith("optimizer."))
    layout.state_dict_metadata[name].size = torch.Size([10**9, 10**9])
    file.write_bytes(pickle.dumps(layout))
    sign(checkpoint)
    with pytest.raises(ValueError, match="expected moments of parameters"):
        go_on(tmp_path / "run")


@pytest.mark.parametrize("raw", [False, True])
def test_an_optimizer_that_is_a_program_is_not_run(raw: bool, whole: Path, tmp_path: Path) -> None:
    checkpoint, trace = whole, tmp_path / "trace"
    path = checkpoint / "optimizer.pt"
    if raw:
        path.write_bytes(pickle.dumps(Program(trace)))
    else:
        torch.save({"state": Program(trace)}, path)
    sign(checkpoint)
    with pytest.raises(ValueError, match="not a PyTorch file of plain tensors") as caught:
        go_on(tmp_path / "run")
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("state", [None, {"state": 3}, {"state": {0: {"exp_avg": torch.ones(2)}}}])
def test_an_optimizer_of_something_else_is_refused(state: Any, whole: Path, tmp_path: Path) -> None:
    checkpoint = whole
    torch.save(state, checkpoint / "optimizer.pt")
    sign(checkpoint)
    with pytest.raises(ValueError, match=r"the state of an optimizer|the optimizer's state"):
        go_on(tmp_path / "run")


def test_views_that_stand_for_more_than_the_file_are_refused(tmp_path: Path) -> None:
    """200 GB of a single number, as one tensor and as many."""
    path, number = tmp_path / "x.pt", torch.ones(1)
    torch.save({"a": number.expand(50 * 10**9)}, path)
    assert path.stat().st_size < 30_000
    with pytest.raises(ValueError, match="stand for 200,000,000,000 bytes"):
        read_pickled(path)
    torch.save([number.expand(10**9)] * 50, path)
    with pytest.raises(ValueError, match="stand for"):
        read_pickled(path)
    torch.save({"tied": [torch.ones(1000)[:]] * 2, "one": number.expand(3)}, path)
    assert read_pickled(path)["one"].tolist() == [1, 1, 1]


def test_an_archive_that_would_grow_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("x/data/0", bytes(2**24))
    with pytest.raises(ValueError, match=r"would grow from .* to 16,777,2\d\d bytes"):
        read_pickled(path)


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="a folder, a pipe or a device"):
            read_pickled(path)
