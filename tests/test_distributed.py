"""Laws of training on several processes: their number changes nothing, and a run survives a kill.

Processes are real (tests/ranks.py forks them) and talk over gloo.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from exactflow.core.density_flow import FittedFlow
from exactflow.data.loader import Share, training_batches
from exactflow.models import registry
from processes import carry_out
from test_training import assert_same_bits, final_state, read_log
from training_worker import make_data

pytestmark = pytest.mark.slow
PLAIN = {"precision": "float32"}  # of the toy's training; reduced precision rounds differently
ALONE = {"job": "train", "count": 1}
WAYS = {  # name -> how many processes share the model, and how
    "ddp": {"job": "train", "count": 2, "parallel": "ddp"},
    "ddp of 4": {"job": "train", "count": 4, "parallel": "ddp"},
    "fsdp": {"job": "train", "count": 2, "parallel": "fsdp"},
    "hsdp": {"job": "train", "count": 4, "node": 2, "parallel": "hsdp"},
}
TINY = [
    name
    for name in registry.names()
    if name.endswith("-tiny") and not issubclass(registry.family_of(name).model, FittedFlow)
]
# Masks of dropout are drawn by each process for its own rows, so it is off where numbers of
# processes are compared.
NO_DROPOUT = {"dropout": 0.0}


def round_of(way: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    """A round of the toy's training."""
    way = dict(way)
    config = {**PLAIN, "parallel": way.pop("parallel", "auto"), **options.pop("config", {})}
    return {**way, "options": {"folder": str(folder), "config": config, **options}}


def values(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of a round, which must be the same in all its processes."""
    assert all("value" in each for each in found), found
    assert all(each == found[0] for each in found), found
    return found[0]["value"]


def assert_same_log(ours: Path, theirs: Path) -> None:
    """Assert the same lines, with the same numbers up to rounding."""
    for mine, other in zip(read_log(ours), read_log(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-12, abs=1e-12)


def test_the_number_of_processes_and_the_way_change_nothing(tmp_path: Path) -> None:
    told = carry_out(
        round_of(ALONE, tmp_path / "alone", toy=NO_DROPOUT),
        *(round_of(way, tmp_path / name, toy=NO_DROPOUT) for name, way in WAYS.items()),
    )
    alone, *others = map(values, told)
    for name, found in zip(WAYS, others, strict=True):
        assert found["step"] == alone["step"] == 20
        assert found["sums"] == pytest.approx(alone["sums"], abs=1e-10), name
        assert_same_log(tmp_path / name, tmp_path / "alone")


@pytest.mark.parametrize("preset", TINY)
def test_every_family_learns_the_same_from_a_shared_batch(preset: str, tmp_path: Path) -> None:
    """Statistics, importance of steps and random numbers are those of the whole batch."""
    ways = {"alone": (1, "auto"), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}
    rounds = [
        {
            "job": "family",
            "count": count,
            "options": {
                "folder": str(tmp_path / name),
                "preset": preset,
                "changes": {"parallel": way, "accumulate": 2},
            },
        }
        for name, (count, way) in ways.items()
    ]
    alone, *others = map(values, carry_out(*rounds))
    assert len(set(alone)) == 3
    for losses in others:
        assert losses == pytest.approx(alone, rel=1e-12)


def test_reversible_training_is_shared_too(tmp_path: Path) -> None:
    """Its backward pass has one node for many parameters, and uses statistics of all rows."""
    rounds = []
    for count in (1, 2):
        changes = {"reversible": True, "activation_checkpointing": False}
        options = {"folder": str(tmp_path / str(count)), "preset": "denseflow-tiny"}
        options["changes"] = changes
        rounds.append({"job": "family", "count": count, "options": options})
    alone, two = map(values, carry_out(*rounds))
    assert two == pytest.approx(alone, rel=1e-12)


def test_stages_are_recomputed_and_averaged_in_parts(tmp_path: Path) -> None:
    """Activation checkpointing and the moving average, with whole and with split parameters."""
    rounds = []
    for name, count, way in (("alone", 1, "auto"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        changes = {"parallel": way, "activation_checkpointing": True, "ema_decay": 0.5}
        options = {"folder": str(tmp_path / name), "preset": "hdit-tiny", "changes": changes}
        rounds.append({"job": "family", "count": count, "options": options})
    alone, *others = map(values, carry_out(*rounds))
    for losses in others:
        assert losses == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("preset", ["tarflow-tiny", "macow-tiny"])
def test_reduced_precision_rounds_weights_that_are_gathered_and_no_more(
    preset: str, tmp_path: Path
) -> None:
    rounds = []
    for way in ("ddp", "fsdp"):
        changes = {"parallel": way, "precision": "bfloat16"}
        options = {"folder": str(tmp_path / way), "preset": preset, "changes": changes}
        rounds.append({"job": "family", "count": 2, "options": options})
    whole, split = map(values, carry_out(*rounds))
    assert split == pytest.approx(whole, rel=1e-3)
    assert split != whole


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_any_number_of_processes_goes_on_where_others_stopped(way: str, tmp_path: Path) -> None:
    """2, 1, 4 and 2 processes, whole or split, against one that was never stopped."""
    others = {"ddp": "fsdp", "fsdp": "ddp"}
    plan = [(2, way, 5), (1, "auto", 5), (4, others[way], 5), (2, way, None)]
    rounds, folder = [round_of(ALONE, tmp_path / "alone", toy=NO_DROPOUT)], tmp_path / "parts"
    for count, mode, stop in plan:
        order = None if stop is None else [count - 1, 2 * stop]
        described = {"job": "train", "count": count, "parallel": mode}
        rounds.append(round_of(described, folder, order=order, toy=NO_DROPOUT))
    alone, *parts, last = carry_out(*rounds)
    for step, found in zip((5, 10, 15), parts, strict=True):
        for each in found:
            assert f"Interrupted: stopped by SIGTERM after step {step}" in each["error"]
    assert values(last)["sums"] == pytest.approx(values(alone)["sums"], abs=1e-10)
    assert_same_log(folder, tmp_path / "alone")


@pytest.mark.parametrize("name", ["ddp of 4", "fsdp"])
def test_killing_any_process_at_any_time_is_survived_bitwise(name: str, tmp_path: Path) -> None:
    """Each time a random process is killed at a random micro-batch, and the run is resumed."""
    way, chosen = WAYS[name], random.Random(7)
    options = {"toy": {"dropout": 0.2}, "config": {"steps": 40, "checkpoint_every": 2}}
    kills = [[chosen.randrange(way["count"]), chosen.randrange(1, 8)] for _ in range(8)]
    whole, *struck, last = carry_out(
        round_of(way, tmp_path / "whole", **options),
        *(round_of(way, tmp_path / "parts", kill=kill, **options) for kill in kills),
        round_of(way, tmp_path / "parts", **options),
    )
    for (killed, _), found in zip(kills, struck, strict=True):
        for rank, each in enumerate(found):
            if rank == killed:
                assert each["error"] == "SIGKILL"
            else:
                assert "ProcessLostError" in each["error"]
                assert "run the same command to go on from what is saved" in each["error"]
    assert values(last) == values(whole)
    if way["parallel"] == "ddp":
        assert_same_bits(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")


@pytest.mark.parametrize("preset", ["tarflow-tiny", "iddpm-tiny", "hdit-tiny"])
def test_image_k_and_sample_k_are_the_same_whoever_takes_them(preset: str) -> None:
    rounds = [{"job": "verbs", "count": n, "options": {"preset": preset}} for n in (1, 3)]
    alone, *others = map(values, carry_out(*rounds))
    assert alone["seeds"] == [3, 4, 5, 6, 7]
    for found in others:
        assert (found["seeds"], found["kind"]) == (alone["seeds"], alone["kind"])
        assert found["details"] == pytest.approx(alone["details"])
        assert found["nats"] == alone["nats"]  # in the same batches
        for name in ("x", "one"):
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(alone[name]))


def test_a_comparison_has_the_same_numbers_whoever_measures(tmp_path: Path) -> None:
    rounds = [
        {"job": "comparison", "count": n, "options": {"folder": str(tmp_path / str(n))}}
        for n in (1, 2)
    ]
    alone, two = map(values, carry_out(*rounds))
    assert alone == two
    assert alone.keys() == {"flow", "path"}


@pytest.mark.parametrize("what", ["main", "share"])
def test_an_error_of_one_process_is_raised_by_all(what: str) -> None:
    (found,) = carry_out({"job": "refuse", "count": 4, "options": {"what": what}})
    assert [each["error"] for each in found] == ["ValueError: item 3 cannot be done"] * 4


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_nan_in_one_process_stops_all_before_any_weight_moves(name: str, tmp_path: Path) -> None:
    told = carry_out(
        round_of(WAYS[name], tmp_path, poison=[1, 5]), round_of(WAYS[name], tmp_path, poison=[1, 1])
    )
    for step, found in zip((3, 1), told, strict=True):
        for each in found:
            assert f"NonFiniteError: step {step} is not finite" in each["error"]
            assert "In process 1 of 2: Every stage is finite, the loss is not" in each["error"]
        kept = torch.load(tmp_path / f"nonfinite_step_{step:06d}.pt", weights_only=True)
        assert kept["images"].shape == (8, 1, 2, 3)


def test_a_split_checkpoint_holds_its_step_and_not_a_later_one(tmp_path: Path) -> None:
    """It is written from copies while training continues."""
    config = {"checkpoint_every": 1, "keep_checkpoints": 20}
    way = {"job": "train", "count": 2, "parallel": "fsdp"}
    alone = round_of(ALONE, tmp_path / "alone", config=config, toy=NO_DROPOUT)
    told = carry_out(alone, round_of(way, tmp_path / "split", config=config, toy=NO_DROPOUT))
    assert values(told[1])["step"] == 20
    folders = sorted((tmp_path / "split" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == [f"step_{n:08d}" for n in range(1, 21)]
    for folder in folders:
        twin = tmp_path / "alone" / "checkpoints" / folder.name
        weights = load_file(twin / "model.safetensors")
        expected = {f"model.{name}": value for name, value in weights.items()}
        found = {name: torch.zeros_like(value) for name, value in expected.items()}
        dcp.load(found, checkpoint_id=folder / "tensors", no_dist=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_damaged_split_checkpoint_is_set_aside(tmp_path: Path) -> None:
    way = {"job": "train", "count": 2, "parallel": "fsdp"}
    stopped = round_of(way, tmp_path, order=[0, 22])
    carry_out(stopped)
    newest = max((tmp_path / "checkpoints").glob("step_????????"))
    shard = next((newest / "tensors").glob("__1_*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (last,) = carry_out(round_of(way, tmp_path))
    assert values(last)["step"] == 20
    assert (tmp_path / "checkpoints" / f"{newest.name}.damaged").is_dir()


@pytest.mark.parametrize(
    ("count", "node", "config", "message"),
    [
        (4, None, {"accumulate": 4}, "4 processes times 4 micro-batches divide, got 8"),
        (2, 2, {"parallel": "hsdp", "steps": 4}, None),
        (4, 1, {"parallel": "hsdp"}, "expected nodes of equally many processes, two or more"),
        (4, 3, {"parallel": "hsdp"}, "got 4 processes, 3 on this node"),
        (2, 2, {"parallel": "fsdp", "reversible": True}, "got 'fsdp'"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_all(
    count: int, node: int | None, config: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    way = {"job": "train", "count": count, "node": node}
    (found,) = carry_out(round_of(way, tmp_path, config=config))
    if message is None:
        assert values(found)["step"] == 4  # one node: everything is split, nothing repeated
        return
    for each in found:
        assert "ValueError" in each["error"]
        assert message in each["error"]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_have_their_share_of_every_micro_batch(parts: int, world_size: int) -> None:
    data = make_data(60)
    options = {"seed": 3, "start": 2}
    whole = next(training_batches(data, 24, **options)).indices.chunk(parts)
    shares = [
        next(
            training_batches(data, 24, **options, share=Share(rank, world_size, parts))
        ).indices.chunk(parts)
        for rank in range(world_size)
    ]
    for part, rows in enumerate(whole):
        assert torch.equal(torch.cat([share[part] for share in shares]), rows)
