"""Every solver equals the reference inverse on every autoregressive flow; its records."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exactflow.core.conditional import Affine
from exactflow.core.model import Flow, NonFiniteError
from exactflow.core.transform import AutoregressiveTransform, Decoding, Solver
from exactflow.data import DataConfig, load
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.sampling.certificate import backward_error, solved
from exactflow.sampling.flow_solvers import Adaptive, GaussSeidelJacobi, Jacobi, Sequential
from exactflow.sampling.guidance import Guidance, GuidedTransform
from exactflow.sampling.inversion import CountedTransform, Inversion
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.sample import sample
from exactflow.sampling.solvers import sampling_of, solver_for
from exactflow.training.optim import TrainConfig, make_optimizer
from flows import CONFIGS, NAMES, blocks, make, perturb, some_labels
from test_convergence import golden_jacobi

OMIT = SamplingOptions(on_nonfinite="omit")
SOLVERS: dict[str, Solver] = {
    "jacobi": Jacobi(),
    "jacobi from zeros": Jacobi(start="zeros"),
    "gauss-seidel-jacobi": GaussSeidelJacobi(),
    "three segments from zeros": GaussSeidelJacobi(3, start="zeros"),
    "as many segments as tokens": GaussSeidelJacobi(10**6),
    "window 1": Adaptive(window=1),
    "window 2": Adaptive(window=2),
    "window 7": Adaptive(window=7),
    "all tokens": Adaptive(lookahead=10**6),
    "lookahead 1": Adaptive(lookahead=1),
    "adaptive": Adaptive(),
    "exact": Adaptive(tolerance=0),
    "static passes": Adaptive(decoding=Decoding(step="graph")),
    "static steps": Sequential(Decoding(step="graph")),
    "compiled steps": Sequential(Decoding(step="compiled")),
    "compiled steps and windows": Adaptive(2, decoding=Decoding(step="compiled")),
}


def some_latents(model: Flow, count: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, *model.prior.shape, generator=generator, dtype=torch.float64)
    return z.to(torch.promote_types(model.dtype, torch.float32))


def close(u: Tensor, expected: Tensor) -> bool:
    """1e-9 in float64, 1e-4 of the range in float32."""
    extent = float(expected.max() - expected.min())
    limit = 1e-9 if u.dtype == torch.float64 else 1e-4 * extent
    return float((u - expected).abs().max()) <= limit


@pytest.fixture(scope="module")
def trained() -> TarFlow:
    """A small model after some seconds of training on digits with Gaussian noise."""
    torch.manual_seed(0)
    config = TarFlowConfig(
        (1, 8, 8), 1, 64, blocks=2, layers_per_block=1, levels=17, num_classes=10, noise_std=0.1
    )
    model = TarFlow(config)
    recipe = TrainConfig(learning_rate=3e-3, weight_decay=0.0)
    optimizer = make_optimizer(model, recipe)
    data = load(DataConfig("digits"), "train")
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        rows = torch.randint(len(data), (64,), generator=generator)
        images = torch.as_tensor(data.images[rows.numpy()])
        labels = torch.as_tensor(data.labels[rows.numpy()])
        optimizer.zero_grad()
        model.loss(images, labels, generator=generator).mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_every_solver_is_the_reference_inverse(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    label = some_labels(model)
    for block in blocks(model):
        v = some_latents(model, 3)
        before = v.clone()
        expected = block.inverse(v, label)
        for title, solver in SOLVERS.items():
            assert close(solver(block, v, label), expected), title
            assert torch.equal(v, before), title


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guidance", "dtype"),
    [
        (None, torch.float64),
        (None, torch.float32),
        (Guidance(1.5), torch.float64),
        (Guidance(0.7, temperature=0.5), torch.float32),
    ],
)
def test_every_solver_inverts_trained_weights(
    trained: TarFlow, guidance: Guidance | None, dtype: torch.dtype
) -> None:
    model = trained.to(dtype)
    label = torch.tensor([3, 10, 7])  # 10: dropped
    tokens = some_latents(model, 3)
    for block in reversed(blocks(model)):
        system = block if guidance is None else GuidedTransform(block, guidance, 10)
        v = block.arrange(tokens)
        expected = system.inverse(v, label)
        for title, solver in SOLVERS.items():
            assert close(solver(system, v, label), expected), title
        tokens = block.arrange(expected)


@pytest.mark.parametrize("name", list(sampling_of(make("rgb")).names))
def test_named_solvers_sample_the_same_images(trained: TarFlow, name: str) -> None:
    model = trained.double()
    expected = sample(model, 3, [1, 2, 3], seed=4, solver="sequential")
    drawn = sample(model, 3, [1, 2, 3], seed=4, solver=name, guidance=0.0)
    torch.testing.assert_close(drawn.x, expected.x, rtol=0, atol=1e-9)
    assert float(drawn.certificate.max()) < 1e-9
    assert drawn.repairs == (0, 0)
    guided = sample(model, 3, [1, 2, 3], seed=4, solver=name, guidance=1.0)
    expected = sample(model, 3, [1, 2, 3], seed=4, solver="sequential", guidance=1.0)
    torch.testing.assert_close(guided.x, expected.x, rtol=0, atol=1e-9)


@given(
    tokens=st.integers(1, 9),
    dim=st.integers(1, 3),
    batch=st.integers(1, 4),
    window=st.one_of(st.none(), st.integers(1, 10)),
    lookahead=st.integers(1, 12),
    segments=st.integers(1, 10),
)
def test_any_shape(
    tokens: int, dim: int, batch: int, window: int | None, lookahead: int, segments: int
) -> None:
    config = TarFlowConfig((dim, 1, tokens), 1, 64, blocks=1, layers_per_block=1)
    model = perturb(TarFlow(config)).double()
    (block,) = blocks(model)
    v = 3 * some_latents(model, batch)
    expected = block.inverse(v)
    for solver in (
        Adaptive(lookahead, window),
        Adaptive(lookahead, window, decoding=Decoding(step="graph")),
        GaussSeidelJacobi(segments),
        Jacobi(),
    ):
        assert close(solver(block, v, None), expected)


def test_jacobi_is_exact_for_one_more_token_at_every_iteration() -> None:
    """It is exact with as many iterations as tokens, from any start."""
    model = make("one channel, patch 1")
    block = blocks(model)[1]
    v = 10 * some_latents(model, 2)  # far from contracting
    expected = block.inverse(v)
    for iterations in range(1, block.num_tokens + 1):
        for start in ("latent", "zeros"):
            u = Jacobi(iterations, start, tolerance=0)(block, v, None)
            exact = u[:, : iterations + 1]
            torch.testing.assert_close(exact, expected[:, : iterations + 1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_jacobi_gives_the_published_iterates(iterations: int) -> None:
    model, expected = golden_jacobi()
    for index, block in enumerate(blocks(model)):
        v = block.arrange(expected[f"block.{index}.output"])
        u = block.arrange(Jacobi(iterations, tolerance=0)(block, v, None))
        wanted = expected[f"block.{index}.jacobi_{iterations}"]
        torch.testing.assert_close(u, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["latent", "zeros"])
def test_chains_of_jacobi_give_the_published_results(start: str) -> None:
    model, expected = golden_jacobi()
    tokens = expected["noise"]
    name = "chain.jacobi_3" if start == "latent" else "chain.jacobi_3_zero_start"
    for index in reversed(range(len(model.stages))):
        block = blocks(model)[index]
        tokens = block.arrange(Jacobi(3, start, tolerance=0)(block, block.arrange(tokens), None))
        wanted = expected[f"{name}.after_block.{index}"]
        torch.testing.assert_close(tokens, wanted, rtol=0, atol=2e-5)


def test_a_segment_sees_the_final_values_of_those_before_it() -> None:
    """Even without convergence, each segment is computed from the final values before it."""
    model = make("one channel, patch 1")
    block = blocks(model)[1]
    v = 5 * some_latents(model, 2)
    lengths = (2, 3, 4)
    u = GaussSeidelJacobi(lengths, iterations=1, tolerance=0)(block, v, None)
    by_hand = v.clone()
    for begin, end in ((0, 2), (2, 5), (5, 9)):
        log_scale, shift = block.conditioner(by_hand).chunk(2, -1)
        by_hand[:, begin:end] = (v * log_scale.exp() + shift)[:, begin:end]
    torch.testing.assert_close(u, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("title", ["jacobi", "gauss-seidel-jacobi", "adaptive", "window 7"])
def test_a_sample_does_not_depend_on_its_batch_mates(trained: TarFlow, title: str) -> None:
    block = blocks(trained.double())[0]
    v = some_latents(trained, 5)
    v[3] *= 4  # the hardest by far
    together = SOLVERS[title](block, v, None)
    for row in range(5):
        alone = SOLVERS[title](block, v[row : row + 1], None)
        # relative: the hard one reaches 1e4 with some processors' rounding in its training
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("title", ["jacobi", "gauss-seidel-jacobi", "adaptive", "static passes"])
def test_a_sample_that_is_not_finite_does_not_disturb_the_others(
    trained: TarFlow, title: str
) -> None:
    block = blocks(trained.double())[0]
    v = some_latents(trained, 3)
    expected = block.inverse(v)
    v[1, 20] = float("nan")
    counted = CountedTransform(block)
    u = SOLVERS[title](counted, v, None)
    torch.testing.assert_close(u[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-10)
    assert not bool(u[1].isfinite().all())
    assert counted.evaluations <= block.num_tokens


def with_scale(log_scale: float, tokens: int = 12) -> TarFlow:
    """One block that multiplies all tokens but the first by e^log_scale, and shifts a little."""
    torch.manual_seed(0)
    config = TarFlowConfig((1, 1, tokens), 1, 64, blocks=1, layers_per_block=1)
    model = perturb(TarFlow(config)).double()
    with torch.no_grad():
        model.blocks[0].output.weight[0] = 0
        model.blocks[0].output.bias[0] = log_scale
    return model


@pytest.mark.parametrize("title", SOLVERS)
@pytest.mark.parametrize("log_scale", [3.0, 14.0])
def test_true_values_are_never_clamped(title: str, log_scale: float) -> None:
    """A token of e^14 = 1e6 is larger than guesses may be, and still returned."""
    model = with_scale(log_scale)
    (block,) = blocks(model)
    v = some_latents(model, 3)
    expected = block.inverse(v)
    assert float(expected.abs().max()) > (3 if log_scale == 3 else 1e5)
    u = SOLVERS[title](block, v, None)
    torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(sampling_of(make("rgb")).names))
def test_a_model_that_overflows_ends_in_the_diagnosis(name: str) -> None:
    model = perturb(TarFlow(CONFIGS["rgb"]))
    with torch.no_grad():
        model.blocks[0].output.bias[: model.prior.shape[1]] = 1000.0
    with pytest.raises(NonFiniteError, match=r"seed 5 .*block 2 in generation order, token 1"):
        sample(model, 2, seed=5, solver=name)
    drawn = sample(model, 2, solver=name, options=OMIT)
    assert drawn.seeds == ()
    assert drawn.failures.keys() == {0, 1}


@pytest.mark.slow
def test_trained_scales_that_explode_are_diagnosed_or_honest() -> None:
    """With uniform noise, constant images and large steps, scales grow without bound."""
    torch.manual_seed(0)
    model = TarFlow(TarFlowConfig((1, 4, 4), 1, 64, blocks=3, layers_per_block=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 1, 4, 4), generator=generator).repeat(32, 1, 1, 1)
    images[16:] = 128
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(images, generator=generator).mean().backward()
        optimizer.step()
    model.eval()
    expected = sample(model, 8, solver="sequential", options=OMIT)
    for name in ("jacobi", "gauss-seidel-jacobi", "adaptive"):
        drawn = sample(model, 8, solver=name, options=OMIT)
        assert drawn.failures == expected.failures
        for row, seed in enumerate(drawn.seeds):
            own = expected.certificate[expected.seeds.index(seed)]
            worse = float(drawn.certificate[row]) > max(10 * float(own), 1e-2)
            assert not worse, (name, seed)
        if drawn.seeds:  # the certificate is what an independent encoding finds
            again = sample(
                model, 8, solver=name, options=SamplingOptions(on_nonfinite="omit", trace=True)
            )
            assert torch.equal(again.certificate, drawn.certificate)


@pytest.mark.parametrize("iterations", [1, 2])
def test_what_a_cap_leaves_undone_is_repaired_and_counted(
    trained: TarFlow, iterations: int
) -> None:
    model = trained.double()
    expected = sample(model, 3, seed=1, solver="sequential")
    drawn = sample(model, 3, seed=1, solver=Jacobi(iterations))
    torch.testing.assert_close(drawn.x, expected.x, rtol=0, atol=1e-9)
    assert drawn.repairs == (3, 3)
    assert drawn.iterations == (63 + iterations,) * 2  # the repair is paid for


def test_repair_is_per_sample() -> None:
    model = make("rgb")

    def careless(transform: AutoregressiveTransform, z: Tensor, label: Tensor | None) -> Tensor:
        u = transform.inverse(z, label)
        u[1, 2] += 0.01
        return u

    drawn = sample(model, 3, solver=careless)
    assert drawn.repairs == (1, 1)
    assert float(drawn.certificate.max()) < 1e-9
    tolerant = Inversion(careless, range(3), tolerance=1.0)
    z = torch.randn(3, *model.prior.shape, dtype=torch.float64)
    with torch.no_grad():
        found, _ = model.encode(model.decode(z, solver=tolerant))
    assert float((found - z)[1].abs().max()) > 1e-3
    assert not any(bool(record.repaired.any()) for record in tolerant.records)
    loose = sample(model, 3, solver=Jacobi(1, tolerance=100.0))
    assert loose.repairs == (0, 0)
    assert loose.beyond_tolerance == ()


def test_certificate_is_the_identity_of_backward_and_forward() -> None:
    """f(u) - v = (u - F(u)) exp(-a), for any u."""
    model = make("conditional")
    block, label = blocks(model)[1], some_labels(model)
    u, v = some_latents(model, 3), some_latents(model, 3, seed=9)
    log_scale, shift = block.conditioner(u, label).chunk(2, -1)
    image = v * log_scale.exp() + shift
    residual = ((u - image) * (-log_scale).exp()).abs().amax((1, 2))
    torch.testing.assert_close(backward_error(block, u, v, label), residual)
    # and solved holds the same quantity to the tolerance
    one = torch.tensor([[[1.0]]])
    for error, expected in ((0.9e-3, True), (1.1e-3, False), (math.nan, False)):
        identity = torch.zeros(1, 1, 2)
        assert bool(solved(Affine(1), one + error, one, one, identity, 1e-3)) is expected


def observed(
    solver: Solver | Sequence[Solver], model: Flow, count: int = 3
) -> tuple[Inversion, Tensor]:
    inversion = Inversion(solver, range(count), observe=True)
    x = model.decode(some_latents(model, count), solver=inversion)
    return inversion, x


@pytest.mark.parametrize("title", ["adaptive", "window 7", "all tokens", "exact", "lookahead 1"])
def test_the_frontier_moves_at_every_pass_and_evaluations_are_counted(
    trained: TarFlow, title: str
) -> None:
    model = trained.double()
    inversion, _ = observed(SOLVERS[title], model)
    for record in inversion.records:
        assert record.passes[-1].least == 64
        tokens = 0
        for before, after in pairwise(record.passes):
            assert before.least is not None
            assert after.least is not None
            assert after.start >= before.start + 1
            assert after.least >= before.least > before.start
            assert after.start <= before.least <= before.greatest
        for step in record.passes:
            tokens += step.stop - 1 - max(step.start - 1, 0)
        assert record.evaluations == sum(step.stop > 1 for step in record.passes) <= 64
        assert record.tokens == tokens


def test_convergence_saves_passes_on_trained_weights(trained: TarFlow) -> None:
    """True of this model, not of all; otherwise the solver would be useless."""
    model = trained.float()
    inversion, _ = observed(Adaptive(), model)
    assert sum(record.evaluations for record in inversion.records) < 0.7 * 2 * 63
    fixed, _ = observed(Adaptive(window=1), model)
    assert all(record.evaluations == 63 for record in fixed.records)


@pytest.mark.parametrize("title", ["adaptive", "jacobi", "gauss-seidel-jacobi", "static passes"])
def test_bfloat16_networks_are_inverted_to_their_own_rounding(trained: TarFlow, title: str) -> None:
    model = trained.to(torch.bfloat16)
    drawn = sample(model, 3, [1, 2, 3], solver=SOLVERS[title])
    reference = sample(model, 3, [1, 2, 3], solver="sequential")
    model.float()
    assert drawn.x.dtype == torch.float32
    assert float(drawn.certificate.max()) <= max(0.1, 3 * float(reference.certificate.max()))


def test_autocast_is_decoded_with_its_own_tolerance(trained: TarFlow) -> None:
    model = trained.float()
    with torch.autocast("cpu", torch.bfloat16):
        drawn = sample(model, 2, [1, 2], solver="adaptive")
        with pytest.raises(ValueError, match="expected step 'eager' under autocast"):
            sample(model, 2, [1, 2], solver=Sequential(Decoding(step="graph")))
    assert float(drawn.certificate.max()) < 0.5


@pytest.mark.slow
def test_large_batches_and_reused_memory(trained: TarFlow) -> None:
    block = blocks(trained.double())[1]
    decoding = Decoding()
    for count in (130, 1, 130):
        v = some_latents(trained, count, seed=count)
        got = Adaptive(decoding=decoding)(block, v, None)
        torch.testing.assert_close(got, block.inverse(v), rtol=0, atol=1e-9)
    with torch.no_grad():
        block.output.bias.add_(0.1)  # what is kept belongs to the weights as they were
    got = Adaptive(decoding=decoding)(block, v, None)
    expected = block.inverse(v)
    with torch.no_grad():
        block.output.bias.sub_(0.1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Jacobi(0), "at least one iteration, got 0"),
        (lambda: GaussSeidelJacobi(0), "segments of at least one token"),
        (lambda: GaussSeidelJacobi(()), "segments of at least one token"),
        (lambda: Adaptive(0), "lookahead and window of at least 1, got 0"),
        (lambda: Adaptive(window=0), "lookahead and window of at least 1"),
        (lambda: solver_for(make("rgb"), "magic"), "auto | sequential | jacobi"),
        (
            lambda: GaussSeidelJacobi((2, 3))(*one_block(), None),
            r"sum to 4 tokens, got \(2, 3\)",
        ),
        (
            lambda: Jacobi(tolerance=-1.0),
            "tolerance >= 0, got -1.0",
        ),
        (
            lambda: (
                Inversion([Sequential()], [0])(*one_block(), None) is None
                or sample(make("rgb"), 1, solver=[Sequential()])
            ),
            "a solver for every block, got 1",
        ),
    ],
)
def test_bad_input(make_it, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message.replace("|", r"\|")):
        make_it()


def one_block() -> tuple[AutoregressiveTransform, Tensor]:
    model = make("rgb")
    return blocks(model)[0], some_latents(model, 1)


def test_samples_that_are_done_leave_the_jacobi_iteration(trained: TarFlow) -> None:
    inversion, _ = observed(Jacobi(), trained.float(), count=8)
    for record in inversion.records:
        rows = [step.rows for step in record.passes]
        assert rows == sorted(rows, reverse=True)
        assert rows[0] == 8
        assert all((step.least is None) == (step.rows < 8) for step in record.passes)
    assert any(step.rows < 8 for record in inversion.records for step in record.passes)
