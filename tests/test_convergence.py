"""Metrics and profiles of Jacobi iteration: published numbers, laws, pictures, the command."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import exactflow
from exactflow.cli import convergence as convergence_command
from exactflow.cli.arguments import Convergence
from exactflow.core.model import NonFiniteError
from exactflow.core.transform import AutoregressiveTransform
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.pictures.profiles import convergence_plot, inversion_plot
from exactflow.sampling.convergence import (
    BlockConvergence,
    JacobiProfile,
    convergence,
    crm_percent,
)
from exactflow.sampling.inversion import Pass
from flows import NAMES, make, perturb, some_images, some_labels
from processes import call as cli
from processes import run

GOLDEN = Path(__file__).parent / "golden"


def golden_jacobi() -> tuple[TarFlow, dict[str, torch.Tensor]]:
    """A small model, and the numbers of the GS-Jacobi program (commit f28319b) for it.

    Its clamp to [-3, 3] and its early stop are off. Block k counts from the data; `block.*` and
    `chain.*` are tokens in the image's order: `arrange` turns them into the block's own.
    """
    model = exactflow.convert(GOLDEN / "tarflow" / "uncond.pth", noise_std=0.07)
    assert isinstance(model, TarFlow)
    file = GOLDEN / "flows" / "gsjacobi_uncond.pt"
    return model.eval(), torch.load(file, weights_only=True)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float(((got - expected) / expected).abs().max())


def iterate(
    block: AutoregressiveTransform,
    v: torch.Tensor,
    start: torch.Tensor,
    count: int,
    label: torch.Tensor | None = None,
) -> torch.Tensor:
    u = start
    for _ in range(count):
        log_scale, shift = block.conditioner(u, label).chunk(2, -1)
        u = shift + v * log_scale.exp()
    return u


@pytest.mark.parametrize("norm", ["2", "1", "fro"])
def test_published_metrics(norm: str) -> None:
    model, expected = golden_jacobi()
    blocks = convergence(model, expected["x"], norm=norm)[::-1]  # theirs count from the data
    igm = torch.tensor([[b.igm_latent, b.igm_zeros] for b in blocks], dtype=torch.float64)
    parts = torch.tensor([[*(b.crm_parts or ()), b.crm] for b in blocks], dtype=torch.float64)
    percent = torch.tensor(crm_percent(blocks), dtype=torch.float64)
    assert relative(igm, expected[f"metrics.norm_{norm}.igm"]) < 1e-4
    assert relative(parts, expected[f"metrics.norm_{norm}.crm_parts"]) < 1e-4
    assert relative(parts[:, 3], expected[f"metrics.norm_{norm}.crm"]) < 1e-4
    assert relative(percent, expected[f"metrics.norm_{norm}.crm_percent"]) < 1e-4


@torch.no_grad()
def test_published_iterates() -> None:
    model, expected = golden_jacobi()
    for index, block in enumerate(model.blocks):
        v = block.arrange(expected[f"block.{index}.output"])
        for count in (1, 2, 3, 5):
            u = block.arrange(iterate(block, v, v, count))
            assert float((u - expected[f"block.{index}.jacobi_{count}"]).abs().max()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("start", ["", "_zero_start"])
def test_published_chains(start: str) -> None:
    model, expected = golden_jacobi()
    tokens = expected["noise"]
    for index, block in reversed([*enumerate(model.blocks)]):
        v = block.arrange(tokens)
        guess = v.clone()
        if start:
            guess[:, 1:] = 0
        tokens = block.arrange(iterate(block, v, guess, 3))
        target = expected[f"chain.jacobi_3{start}.after_block.{index}"]
        assert float((tokens - target).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_settles_a_token_with_every_iteration(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    x, label = some_images(model), some_labels(model)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    blocks = convergence(model, x, label, tolerance=tolerance)
    assert len(blocks) == len(model.stages)
    known = 0 if model.config.start_token else 1  # token 0 is its own latent
    affine = model.config.conditional == ("affine",)
    for block in blocks:
        profile = block.jacobi
        tokens = model.encode(x, label)[0].shape[1]
        assert profile.finished
        assert profile.least[-1] == profile.median[-1] == tokens
        assert profile.error[-1] <= tolerance
        assert profile.iterations <= tokens - known
        assert len(profile.error) == len(profile.least) == len(profile.median)
        for n, (least, median) in enumerate(zip(profile.least, profile.median, strict=True)):
            assert n + known <= least <= median
        assert (block.crm_parts is not None) is affine
        if block.crm_parts is not None:
            assert (block.crm_parts[1] == 0) is (name == "volume preserving")
    shares = crm_percent(blocks)
    assert shares == [None] * len(blocks) or sum(map(float, shares)) == pytest.approx(100)


@torch.no_grad()
def test_blocks_come_in_generation_order_under_their_label_and_the_hooks_are_gone() -> None:
    model = make("conditional")
    assert isinstance(model, TarFlow)
    x, label = some_images(model), some_labels(model)
    got = convergence(model, x, label)
    first, last = model.blocks
    u = last.arrange(first(model.patchify(x), label)[0])
    v = last(u, label)[0]
    zeros = v.clone()
    zeros[:, 1:] = 0
    for start, metric in ((v, got[0].igm_latent), (zeros, got[0].igm_zeros)):
        residual = (iterate(last, v, start, 1, label) - u).mean(0)
        assert metric == pytest.approx(float(torch.linalg.matrix_norm(residual, 2)))
    assert not any(stage._forward_hooks for stage in model.stages)
    with pytest.raises(ValueError, match="expected classes"):
        convergence(model, x, torch.full((3,), 7))
    assert not any(stage._forward_hooks for stage in model.stages)


@torch.no_grad()
def test_the_profile_is_what_a_patient_reader_would_count() -> None:
    model, expected = golden_jacobi()
    tolerance = 0.02  # so coarse that some tokens settle before those on which they depend
    block, rows, ahead = model.blocks[0], {}, 0
    for index, image in enumerate(expected["x"][:4, None]):
        u = model.patchify(image)
        v = block(u)[0]
        profile = convergence(model, image, tolerance=tolerance)[-1].jacobi
        for n in range(profile.iterations + 1):
            off = (iterate(block, v, v, n) - u).abs().amax(2)[0]
            settled = [*(off <= tolerance).tolist(), False]
            rows[index, n] = settled.index(False)
            ahead += sum(settled) - rows[index, n]
            assert profile.least[n] == profile.median[n] == rows[index, n]
            assert profile.error[n] == pytest.approx(float(off.max()), abs=1e-5)
    assert ahead > 0
    profile = convergence(model, expected["x"][:4], tolerance=tolerance)[-1].jacobi
    for n in range(profile.iterations + 1):
        frontiers = sorted(rows.get((index, n), model.config.num_tokens) for index in range(4))
        assert (profile.least[n], profile.median[n]) == (frontiers[0], frontiers[1])


def test_a_constant_shift_needs_one_iteration() -> None:
    model = TarFlow(TarFlowConfig((1, 4, 4), 2, 64, 2, 1, volume_preserving=True))
    x = some_images(model)
    blocks = convergence(model, x)
    assert [block.jacobi.iterations for block in blocks] == [1, 1]
    assert [block.igm_latent for block in blocks] == pytest.approx([0, 0], abs=1e-6)
    assert [block.crm for block in blocks] == [0, 0], "fresh output maps are zero"
    assert crm_percent(blocks) == [None, None]


def test_labels_are_used() -> None:
    model = make("conditional")
    x = some_images(model)
    dropped, given = convergence(model, x), convergence(model, x, torch.tensor([0, 1, 2]))
    null = convergence(model, x, torch.full((3,), model.null_label))
    assert dropped[0].igm_latent == pytest.approx(null[0].igm_latent)
    assert dropped[0].igm_latent != pytest.approx(given[0].igm_latent)


def test_rounding_ends_the_iteration_and_is_not_called_settled() -> None:
    model = make("rgb", torch.float32)
    profile = convergence(model, some_images(model), tolerance=0.0)[0].jacobi
    assert not profile.finished or profile.error[-1] == 0
    assert profile.iterations <= 4


def test_overflow() -> None:
    model = make("rgb", torch.float32)
    assert isinstance(model, TarFlow)
    block = model.blocks[-1]
    with torch.no_grad():
        block.output.bias[: model.config.token_dim] = 200.0  # scales of e^200 going back
    x = some_images(model)
    profile = convergence(model, x)[0].jacobi
    assert not profile.finished
    assert profile.error[-1] == math.inf
    assert profile.iterations < 4, "nobody waits for a lost sample"
    with torch.no_grad():
        block.output.bias[: model.config.token_dim] = -200.0
    with pytest.raises(NonFiniteError, match="block 1 in generation order"):
        convergence(model, x)


class Projection(nn.Module):
    """An output map that is not an `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.out_features = linear.out_features


@pytest.mark.parametrize("name", ["rgb", "mixture"])
def test_a_block_without_a_fitting_map_has_no_ranking_metric(name: str) -> None:
    model = make(name)
    assert isinstance(model, TarFlow)
    for block in model.blocks:
        block.output = Projection(block.output)
    blocks = convergence(model, some_images(model))
    assert [block.crm for block in blocks] == [None, None]
    assert crm_percent(blocks) == [None, None]
    assert all(block.jacobi.finished for block in blocks)


def pixels(png: bytes) -> tuple[int, int]:
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    return picture.size


@pytest.mark.slow
def test_pictures_of_convergence() -> None:
    pytest.importorskip("matplotlib")
    several = convergence(make("two heads, deep"), some_images(make("two heads, deep")))
    plain = JacobiProfile((1.0,), (1,), (1,), finished=True)
    nothing = BlockConvergence(math.inf, 0.5, None, plain)
    for blocks in (several, [nothing], [*several, nothing] * 3):
        width, height = pixels(convergence_plot(blocks))
        assert width > 1000 > height > 400


@pytest.mark.slow
def test_pictures_of_passes() -> None:
    pytest.importorskip("matplotlib")
    sequential = [Pass(t, t + 1, 2, t + 1, t + 1) for t in range(1, 16)]
    windows = [Pass(1, 9, 2, 4, 9), Pass(4, 16, 2, 16, 16)]
    for passes, rows in (([sequential], 1), ([sequential, windows] * 3, 2), ([[]], 1)):
        _, height = pixels(inversion_plot(passes))
        assert 300 * rows < height < 450 * rows


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A noise-trained model of a built-in data set, saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("convergence") / "model"
    config = TarFlowConfig((1, 8, 8), 2, 64, 2, 1, num_classes=10, levels=17, noise_std=0.1)
    perturb(TarFlow(config)).save_pretrained(folder)
    return folder


def test_command(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["convergence", digits, "data.source=digits", "--n", 5, "--norm", "fro", "--out", "c"]
    done = cli(*words, cwd=tmp_path)
    assert "5 images of digits, test, with Gaussian noise 0.1" in done.stdout
    result = json.loads((tmp_path / "c" / "convergence.json").read_text())
    assert (result["norm"], result["images"], result["noise_std"]) == ("fro", 5, 0.1)
    assert len(result["data"]["fingerprint"]) == 64
    assert len(result["blocks"]) == 2
    assert sum(block["crm_percent"] for block in result["blocks"]) == pytest.approx(100)
    for block in result["blocks"]:
        assert block["igm_latent"] > 0
        assert block["jacobi"]["least"][-1] == 16
        assert f"{block['crm']:.4g}" in done.stdout
    assert pixels((tmp_path / "c" / "convergence.png").read_bytes())


def test_command_hears_no_unknown_norm(digits: Path, tmp_path: Path) -> None:
    done = cli("convergence", digits, "--norm", "3", cwd=tmp_path, fails=True)
    assert "fro" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    code = (
        "import torch, exactflow; from exactflow.sampling.convergence import convergence\n"
        f"model = exactflow.from_pretrained({str(digits)!r})\n"
        "try: convergence(model, torch.zeros(1, 1, 8, 8), norm='inf')\n"
        "except ValueError as error: print(error)\n"
    )  # without the checker of annotations, which would speak up first
    assert run("-c", code, cwd=tmp_path).stdout == "expected norm 2 | 1 | fro, got 'inf'\n"


def test_command_writes_null_for_infinity(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = exactflow.from_pretrained(digits)
    assert isinstance(model, TarFlow)
    with torch.no_grad():
        model.blocks[-1].output.bias[:4] = 200.0
    model.save_pretrained(tmp_path / "model")
    command = Convergence(
        model=str(tmp_path / "model"), settings=("data.source=digits",), n=3, out=tmp_path
    )
    convergence_command.run(command)
    first, second = json.loads((tmp_path / "convergence.json").read_text())["blocks"]
    assert first["igm_latent"] is None
    assert first["jacobi"]["error"][-1] is None
    assert second["jacobi"]["finished"]
