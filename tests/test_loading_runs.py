"""Models of runs that were stopped or still run: the averaged weights of the newest checkpoint."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import exactflow
from exactflow.cli.settings import data_of
from exactflow.core.model import GenerativeModel
from exactflow.data.datasets import ImageDataset
from exactflow.models.pretrained import located, recorded_data
from exactflow.training import Progress, TrainConfig, fit
from exactflow.training.fitting import fit_closed_form
from stopped_runs import Stopped, sign
from training_worker import make_data

CONFIG = TrainConfig(batch_size=8, steps=4, log_every=1, checkpoint_every=1, ema_decay=0.5)


def made() -> GenerativeModel:
    torch.manual_seed(0)
    shape = (1, 4, 4)
    return exactflow.build("tarflow-tiny", image_shape=shape, blocks=2, width=8, head_dim=8)


def data(model: GenerativeModel) -> ImageDataset:
    return make_data(16, model.num_classes, model.event_shape, model.levels)


def train(folder: Path, stop: int | None = None, **changes: object) -> GenerativeModel:
    def end(told: Progress) -> dict[str, float]:
        if told.step == stop:
            raise Stopped
        return {}

    model = made()
    try:
        config = replace(CONFIG, **changes)
        fit(model, data(model), config, folder, every={1: end}, progress=False)
    except Stopped:
        pass
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder, stop=3)
    return folder


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "run")


@pytest.mark.parametrize(
    ("inner", "newest"),
    [("", True), ("checkpoints", True), ("checkpoints/step_00000003", False)],
)
def test_the_averaged_weights_are_taken_and_it_is_said(inner: str, newest: bool, run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000003"
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = "took the averaged weights" + " of the newest checkpoint" * newest + " after step 3"
    with pytest.warns(UserWarning, match=message):
        model = exactflow.from_pretrained(run / inner)
    for name, value in load_file(checkpoint / "ema.safetensors").items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.config == made().config
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (model.kind, model.card, recorded_data(model)) == ("tarflow", {}, {})
    assert exactflow.sample(model, 1, solver="sequential").x.shape == (1, 1, 4, 4)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_an_earlier_checkpoint_and_one_without_an_average(run: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="averaged weights after step 2"):
        exactflow.from_pretrained(run / "checkpoints" / "step_00000002")
    train(tmp_path / "plain", stop=2, ema_decay=0.0)
    with pytest.warns(UserWarning, match="took the weights, of which it has no average, of"):
        model = exactflow.from_pretrained(tmp_path / "plain")
    state = load_file(tmp_path / "plain" / "checkpoints" / "step_00000002" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_a_finished_run_gives_its_model_and_a_folder_of_fit_its_last_weights(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = train(tmp_path)
    with pytest.warns(UserWarning, match="after step 4"):
        found = exactflow.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    model.save_pretrained(tmp_path / "model")
    recwarn.clear()
    assert located(tmp_path) == tmp_path / "model"
    assert not recwarn.list


def test_closed_forms_load_too(tmp_path: Path) -> None:
    model = exactflow.build("whitening-tiny")
    config = TrainConfig(batch_size=8)
    fit_closed_form(model, data(model), config, tmp_path, progress=False)
    with pytest.warns(UserWarning, match="after step 1"):
        found = exactflow.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_split_checkpoints_load_in_one_process(run: Path) -> None:
    from torch.distributed import checkpoint as dcp

    step = run / "checkpoints" / "step_00000003"
    averages = load_file(step / "ema.safetensors")
    names = {name for name, _ in made().named_parameters()}
    tensors = {f"model.{k}": v for k, v in load_file(step / "model.safetensors").items()}
    tensors |= {f"average.{k}": v for k, v in averages.items() if k in names}
    for file in ("model.safetensors", "ema.safetensors", "optimizer.pt"):
        (step / file).unlink()
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(tensors, checkpoint_id=step / "tensors", no_dist=True)
    sign(step)
    with pytest.warns(UserWarning, match="took the averaged weights"):
        model = exactflow.from_pretrained(run)
    for name, value in averages.items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_damaged_checkpoint_is_told_and_left_alone(run: Path) -> None:
    path = run / "checkpoints" / "step_00000003" / "ema.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match=r"after step 2|is not whole"):
        exactflow.from_pretrained(run)
    assert path.exists()
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    with (
        pytest.warns(UserWarning, match="is not whole"),
        pytest.raises(ValueError, match="expected a model or a run with a checkpoint"),
    ):
        exactflow.from_pretrained(run)


def test_the_data_of_a_checkpoint_are_those_of_its_run(run: Path) -> None:
    (run / "config.yaml").write_text("data: {source: digits, limit: 7}\n")
    for inner in ("", "checkpoints", "checkpoints/step_00000003"):
        with pytest.warns(UserWarning, match="averaged weights"):
            model = exactflow.from_pretrained(run / inner)
        assert data_of(model, run / inner, []).limit == 7
