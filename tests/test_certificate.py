"""Certificates equal errors measured in float64, for any model, scales and solver."""

import copy

import pytest
import torch
from torch import Tensor

from exactflow.core.model import Flow
from exactflow.core.randomness import generator, normal_rows
from exactflow.core.transform import AutoregressiveTransform, Decoding
from exactflow.models.tarflow.model import TarFlow, TarFlowConfig
from exactflow.sampling.flow_solvers import Adaptive, Jacobi, Sequential
from exactflow.sampling.guidance import Guidance, GuidedTransform
from exactflow.sampling.request import SamplingOptions
from exactflow.sampling.sample import sample
from exactflow.sampling.samples import Samples
from flows import make, perturb

SOLVERS = {
    "sequential": "sequential",
    "compiled": Sequential(Decoding(step="compiled")),
    "jacobi": "jacobi",
    "jacobi, two iterations": Jacobi(2),
    "gauss-seidel-jacobi": "gauss-seidel-jacobi",
    "adaptive": "adaptive",
    "window 3, loose": [Adaptive(window=3, tolerance=0.1)] * 3,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def exploding(log_scale: float, seed: int, dtype: torch.dtype) -> TarFlow:
    """Three blocks with random log-scales of about that size."""
    torch.manual_seed(seed)
    config = TarFlowConfig((1, 2, 6), 1, 64, blocks=3, layers_per_block=1, final_norm=True)
    model = perturb(TarFlow(config), 0.5)
    with torch.no_grad():
        for block in model.blocks:
            block.output.weight.normal_(0, 0.02 + 0.01 * abs(log_scale))
            block.output.bias[0] = log_scale
    return model.to(dtype).eval()


def found_in_float64(model: Flow, drawn: Samples, guidance: Guidance | None = None) -> Tensor:
    """max |encode(x) - z|, computed block by block without the code of sampling."""
    seeds = [generator(seed, "sample") for seed in drawn.seeds]
    noise = normal_rows(model.prior.shape, seeds).to(drawn.x.dtype)
    z = model.prior.from_noise(noise).double()
    assert isinstance(model, TarFlow)
    exact = copy.deepcopy(model).double()
    tokens = exact.patchify(drawn.x.double())
    with torch.no_grad():
        for block in exact.blocks:
            assert isinstance(block, AutoregressiveTransform)
            u = block.arrange(tokens)
            system = block
            if guidance is not None:
                system = GuidedTransform(block, guidance, model.null_label)
            log_scale, shift = system.conditioner(u, drawn.label).chunk(2, -1)
            tokens = block.arrange((u - shift) * torch.exp(-log_scale))
    return (tokens - z).abs().amax((1, 2))


def claims_hold(model: Flow, drawn: Samples, guidance: Guidance | None = None) -> bool:
    """No certificate is below half of the float64 error, and all beyond it are listed."""
    truth = found_in_float64(model, drawn, guidance)
    unnamed = [s for s in drawn.seeds if s not in drawn.beyond_tolerance]
    named = all(
        float(truth[drawn.seeds.index(seed)]) <= 2 * tolerance(model.dtype) for seed in unnamed
    )
    return named and bool((drawn.certificate >= 0.5 * truth).all())


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-1}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("title", SOLVERS)
def test_the_claim_is_never_below_half_of_what_float64_finds(title: str, dtype: str) -> None:
    """At very large, very small and ordinary scales."""
    if title == "compiled" and dtype == "bfloat16":
        pytest.skip("there is no compiled step in bfloat16")
    if title == "compiled":
        pytest.importorskip("numba")
    finite = 0
    for seed, log_scale in enumerate((-4.0, -1.0, 0.0, 2.0, 4.0)):
        model = exploding(log_scale, seed, DTYPES[dtype])
        drawn = sample(
            model, 3, solver=SOLVERS[title], options=SamplingOptions(on_nonfinite="omit")
        )
        finite += len(drawn.seeds)
        if drawn.seeds:
            assert claims_hold(model, drawn), log_scale
    assert finite >= 9


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_guided_samples_are_encoded_by_guided_blocks(dtype: str) -> None:
    model = make("conditional", DTYPES[dtype])
    guidance = Guidance(1.5)
    drawn = sample(model, 3, [0, 1, 2], guidance=guidance)
    assert claims_hold(model, drawn, guidance)
    assert float(drawn.certificate.max()) < tolerance(DTYPES[dtype])
    assert drawn.beyond_tolerance == ()


def test_rounding_of_a_reduced_network_counts() -> None:
    """A bfloat16 network agrees with itself; only float64 shows its rounding."""
    model = exploding(-2.0, 3, torch.bfloat16)
    drawn = sample(model, 4, options=SamplingOptions(on_nonfinite="omit"))
    assert float(drawn.certificate.max()) > 0.1
    assert set(drawn.beyond_tolerance) == {
        seed
        for seed, claim in zip(drawn.seeds, drawn.certificate.tolist(), strict=True)
        if claim > 0.1
    }


@pytest.mark.parametrize("log_scale", [-3.0, 0.0, 3.0])
def test_what_a_parallel_solver_leaves_above_the_tolerance_is_inverted_again(
    log_scale: float,
) -> None:
    """Whatever the scales: the result is then the reference's, and the repair is counted."""
    model = exploding(log_scale, 1, torch.float64)
    expected = sample(model, 3, solver="sequential")
    drawn = sample(model, 3, solver=Jacobi(1))
    assert drawn.repairs == (3, 3, 3)
    assert torch.equal(drawn.x, expected.x)


def test_the_model_is_left_as_it_was() -> None:
    model = make("conditional", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sample(model, 2, [0, 1], guidance=1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.float32
    x = torch.zeros(1, *model.event_shape)
    assert torch.equal(model.encode(x)[0], make("conditional", torch.float32).encode(x)[0])
