"""Loading models: shipped ones, what `save_pretrained` wrote, here or on a hub, and runs."""

import difflib
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exactflow.core.building import TooLargeError
from exactflow.core.config import made
from exactflow.core.files import read_json
from exactflow.core.model import Flow, GenerativeModel
from exactflow.core.serialization import (
    CLASS_NAMES,
    CONFIG_FILE,
    FORMAT_VERSION,
    GUIDANCE,
    WEIGHTS_FILE,
    file_of,
)
from exactflow.core.tensor_files import read_safetensors, require_regular
from exactflow.models import registry, shipped
from exactflow.models.saved_runs import averaged_model, is_run
from exactflow.sampling.plan import InversionPlan, read_plans

ALIGNMENT = 64  # bytes, of tensors that PyTorch allocates
READING = "read as"  # in the card of a shipped model: `data.*` fields that find its data again
RUNS_FOLDER = "runs"  # where the command line puts runs: no owner of models on the hub


def from_pretrained(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> GenerativeModel:
    """A model in evaluation mode.

    Args:
        path_or_hub_id: a folder that `save_pretrained` wrote; a run folder, of which the finished
            model is taken or, where it has not ended, the newest checkpoint; a checkpoint's folder;
            the name of a model that ships with the package (`models.shipped.NAMES`); or an id
            "owner/name" of the hub, which needs the extra `hub`. Of a checkpoint the averaged
            weights are taken, if it has any, and a warning says which weights these are. A folder
            here that is called like a shipped model is meant only if it holds a model or a run. A
            shipped model is stored in float16 and loaded in float32; any other has the type it was
            saved with.
        device: where to put the model.
        revision: of a model of the hub, to pin it: a branch, a tag or a commit.

    Raises:
        FileNotFoundError: no such folder, and neither a shipped model's name nor a hub id.
        ValueError: a folder that holds no model, a damaged one, or one of a newer format; a device
            that is not here.
    """
    target = _available(device)
    folder = located(path_or_hub_id, revision)
    if not file_of(folder, CONFIG_FILE).exists() and is_run(folder):
        model, state, checkpoint = averaged_model(folder)
        source = str(checkpoint)
    else:
        model, state = _saved_model(folder)
        source = _unlike(folder)
    if shipped_model(folder) is not None:
        state = {name: _widened(value) for name, value in state.items()}
    check_weights(model, state, source)
    placed = {name: _aligned(value).to(target) for name, value in state.items()}
    model.load_state_dict(placed, assign=True)
    if isinstance(model, Flow):
        model.plans = _plans(folder)
    return model.eval()


def shipped_model(location: str | Path) -> Path | None:
    """The folder in the package that `from_pretrained` reads for a location; None: another."""
    path, name = Path(location), str(location)
    nested = path / "model"
    if any(file_of(folder, CONFIG_FILE).exists() for folder in (path, nested)) or is_run(path):
        return path if path.resolve().parent == shipped.FOLDER else None
    return shipped.FOLDER / name if name in shipped.NAMES else None


def _class_names(model: GenerativeModel, folder: Path) -> tuple[str, ...]:
    """The names of the classes in a model's card; empty if none."""
    names, count = model.card.get(CLASS_NAMES, []), model.num_classes
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or (names and len(names) != count):
        raise ValueError(
            f"{folder / CONFIG_FILE}: expected {count} {CLASS_NAMES}, one for each class, got "
            f"{names!r}"
        )
    return tuple(names)


def _plans(folder: Path) -> list[InversionPlan]:
    """The plans beside a model; none, with a warning, if their file is damaged."""
    try:
        return read_plans(folder)
    except ValueError as error:
        warnings.warn(f"no plan is used: {error}", stacklevel=3)
        return []


def check_weights(model: GenerativeModel, state: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError unless these are the model's tensors, of one type of floating numbers.

    Args:
        model: on any device, for the names, shapes and types of its tensors.
        state: tensors by name.
        source: where they come from; the message begins with it.
    """
    expected = model.state_dict()
    _check_shapes({name: tuple(value.shape) for name, value in state.items()}, expected, source)
    parameters = {name for name, _ in model.named_parameters()}
    first = next(name for name in expected if name in parameters)
    for name, value in state.items():
        common = state[first].dtype if expected[name].is_floating_point() else expected[name].dtype
        # Buffers may keep a type of their own, as sums in double precision do.
        if value.dtype != common and (name in parameters or value.dtype != expected[name].dtype):
            raise ValueError(
                f"{source}: expected numbers of one type, got {state[first].dtype} in {first} and "
                f"{value.dtype} in {name}"
            )
    if not state[first].is_floating_point():
        raise ValueError(f"{source}: expected floating numbers, got {state[first].dtype}")


def recorded_data(model: GenerativeModel) -> dict[str, Any]:
    """The training data in the card of a loaded model; empty if none."""
    recorded = model.card.get("training data") or {}
    texts = ("id", "version", "fingerprint", "preprocessing_hash")
    if not isinstance(recorded, dict) or not all(
        isinstance(recorded.get(k, ""), str) for k in texts
    ):
        raise ValueError(
            "expected the card's 'training data' as `exactflow train` writes it, with text for "
            f"{', '.join(texts)}, got {recorded!r}"
        )
    return recorded


def recorded_guidance(model: GenerativeModel) -> float:
    """The scale of guidance that the card of a loaded model names; 0 if none, or no classes."""
    recorded = model.card.get(GUIDANCE, 0.0)
    if not isinstance(recorded, int | float) or not 0 <= recorded < math.inf:
        raise ValueError(f"expected a finite {GUIDANCE} >= 0 in the card, got {recorded!r}")
    return float(recorded) if model.num_classes else 0.0


def recorded_reading(model: GenerativeModel) -> dict[str, Any]:
    """The `data.*` fields that the card of a loaded model says its data are read with, if any."""
    recorded = model.card.get(READING, {})
    if not isinstance(recorded, dict):
        raise ValueError(f"expected fields of the data in the card's {READING!r}, got {recorded!r}")
    return recorded


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json: kind, config, card. Raises ValueError if it is none of ours."""
    path = file_of(folder, CONFIG_FILE)
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a model's {CONFIG_FILE} at {path}: {error}") from error
    if not {"kind", "config"} <= content.keys():
        raise ValueError(f"{path} is not an exactflow configuration: no 'kind' and 'config'")
    known = made(_Description, {k: content[k] for k in content if k in _KNOWN}, path)
    if known.format_version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {known.format_version}, this exactflow reads up to "
            f"{FORMAT_VERSION}"
        )
    return {**content, **asdict(known)}


@final
@dataclass(frozen=True)
class _Description:
    """What a model's config.json holds."""

    kind: str
    config: Mapping[str, Any]
    format_version: int = 0
    card: Mapping[str, Any] = field(default_factory=dict)


_KNOWN = frozenset(_Description.__dataclass_fields__)


def _saved_model(folder: Path) -> tuple[GenerativeModel, dict[str, Tensor]]:
    """The model of a folder without its numbers, and these. Raises ValueError naming the file."""
    description = read_config(folder)
    kind, path = description["kind"], file_of(folder, WEIGHTS_FILE)
    try:
        shapes = _shapes(path)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{_unlike(folder)}: {error}") from error
    numbers = sum(math.prod(shape) for shape in shapes.values())
    try:
        model = registry.without_numbers(kind, description["config"], numbers)
    except TooLargeError as error:
        raise ValueError(f"{_unlike(folder)}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    _check_shapes(shapes, model.state_dict(), _unlike(folder))  # before anything is read
    model.card = description["card"]
    model.class_names = _class_names(model, folder)
    return model, read_safetensors(path)[0]


def _unlike(folder: Path) -> str:
    return f"{folder / WEIGHTS_FILE} does not hold the weights that {CONFIG_FILE} describes"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """What a file says of its tensors."""
    require_regular(path)
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor], source: str
) -> None:
    absent = [name for name in expected if name not in found]
    foreign = [name for name in found if name not in expected]
    other = [
        f"{name} of shape {tuple(value.shape)}, got {found[name]}"
        for name, value in expected.items()
        if name in found and found[name] != tuple(value.shape)
    ]
    if absent or foreign or other:
        wanted = [*other, *(f"{name}, got none" for name in absent)]
        told = f"expected {wanted[0]}" if wanted else f"expected no {foreign[0]}"
        more = len(absent) + len(foreign) + len(other) - 1
        raise ValueError(f"{source}: {told}" + (f" ({more} more differ)" if more else ""))


def _widened(value: Tensor) -> Tensor:
    """The tensor, in float32 if it was stored in float16."""
    return value.float() if value.dtype == torch.float16 else value


def _aligned(value: Tensor) -> Tensor:
    """The tensor where an allocator would put it: a product's last bit depends on the address.

    Tensors of a mapped file begin wherever its header ends.
    """
    return value.clone() if value.data_ptr() % ALIGNMENT else value


def _available(device: torch.device | str) -> torch.device:
    """The device. Raises ValueError if there is none such here."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"expected a device that is here, such as 'cpu', got {str(device)!r}: {reason}"
        ) from error
    return found


def located(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a model or run, fetched where it is on the hub; see `from_pretrained`."""
    path = Path(path_or_hub_id)
    text = str(path_or_hub_id)
    local = shipped_model(path_or_hub_id) or path
    if local.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is of a model on the hub, {text!r} is a folder"
            )
        nested = local / "model"
        return nested if file_of(nested, CONFIG_FILE).exists() else local
    if path.exists():
        raise FileNotFoundError(
            f"expected a model folder or a hub id 'owner/name', got {text!r}: no such folder, but "
            "a file (of published weights? then `exactflow convert`)"
        )
    owner = Path(text.partition("/")[0])
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(shipped.no_model(text))
    if owner.is_dir() or owner.name == RUNS_FOLDER:
        raise FileNotFoundError(f"no such run: {text!r}{_nearest(owner, path.name)}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"no folder {text!r} here, and hub ids need the extra: pip install 'exactflow[hub]'"
        ) from error
    patterns = ["*.json", "*.safetensors", "*.md"]
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises dozens of kinds: all mean "not loaded"
        raise FileNotFoundError(
            f"no folder {text!r} here, and the hub did not give it: {error}"
        ) from error


def _nearest(folder: Path, name: str) -> str:
    """The end of a message: what is called nearly so, or what there is."""
    names = (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    )
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {str(folder / near[0])!r}?"
    return f"; {folder} has {', '.join(names[:8]) or 'none'}"
