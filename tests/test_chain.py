"""The discrete chain: schedules, kernels, the bound's terms and samplers, against closed forms."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import final

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exactflow.core import grey_levels as grey
from exactflow.core.model import NonFiniteError
from exactflow.likelihood.bound import chain_bound, strata_of
from exactflow.likelihood.draws import Draws
from exactflow.paths.chain import (
    MarkovChain,
    Network,
    gaussian_kl,
    kept_steps,
    log_mass_of_level,
    schedule_betas,
)
from exactflow.paths.chain_model import ChainModel
from exactflow.paths.path import DiscreteBetas
from exactflow.paths.path_model import Prediction
from exactflow.sampling.denoiser import ClassifierGuidance, Denoiser
from exactflow.sampling.path_solvers import DDIM, Ancestral, ChainSolver
from exactflow.sampling.sample import sample

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def chain(steps: int = 20, schedule: str = "cosine", **settings: str) -> MarkovChain:
    return MarkovChain(schedule_betas(schedule, steps), **settings)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def wavy(x_t: Tensor, timestep: Tensor, label: Tensor | None) -> tuple[Tensor, None]:
    """An arbitrary network without a learned variance."""
    shift = 0 if label is None else 0.1 * label[:, None, None, None]
    return torch.sin(2 * x_t + 0.1 * timestep[:, None, None, None] + shift), None


def posterior_of_gaussian(chain: MarkovChain, mean: float, std: float) -> tuple[Tensor, ...]:
    """For data N(mean, std^2): a, b with E[x0 | x_t] = a + b x_t, and Var(x0 | x_t), by step."""
    total = chain.alpha_bar * std**2 + 1 - chain.alpha_bar
    slope = chain.alpha_bar.sqrt() * std**2 / total
    offset = mean * (1 - slope * chain.alpha_bar.sqrt())
    return offset, slope, std**2 * (1 - chain.alpha_bar) / total


def marginal_variance(chain: MarkovChain, std: float) -> Tensor:
    """Var(x_{t-1} | x_t) by step, for data N(mean, std^2)."""
    (*_, variance), before = posterior_of_gaussian(chain, 0.0, std), chain.previous_alpha_bar
    posterior = chain.betas * (1 - before) / (1 - chain.alpha_bar)
    share = before.sqrt() * chain.betas / (1 - chain.alpha_bar)
    return posterior + share.square() * variance


def ideal_network(chain: MarkovChain, mean: float, std: float) -> Network:
    """The ideal network: every reverse kernel is the true one."""
    offset, slope, _ = posterior_of_gaussian(chain, mean, std)
    small, large = chain.posterior_log_variance, chain.largest_log_variance
    place = 2 * (marginal_variance(chain, std).log() - small) / (large - small) - 1

    def network(
        x_t: Tensor, timestep: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        step = torch.searchsorted(chain.timesteps, timestep)
        a, b, v = (c[step][:, None, None, None].to(x_t) for c in (offset, slope, place))
        return chain.eps_from_x0(a + b * x_t, x_t, step), v.expand_as(x_t)

    return network


@final
class Oracle(ChainModel):
    """A chain model made of a network and grey levels."""

    kind = "oracle"

    def __init__(self, chain: MarkovChain, network: Network, levels: int = 256) -> None:
        super().__init__()
        self.config = None
        self._chain, self._network, self._levels = chain, network, levels
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    @property
    def event_shape(self) -> tuple[int, int, int]:
        return (1, 4, 4)

    @property
    def levels(self) -> int:
        return self._levels

    @property
    def num_classes(self) -> int:
        return 3

    @property
    def stages(self) -> Sequence[nn.Module]:
        return []

    @property
    def chain(self) -> MarkovChain:
        return self._chain

    @property
    def path(self) -> DiscreteBetas:
        return DiscreteBetas(tuple(self._chain.betas.tolist()))

    @property
    def prediction(self) -> Prediction:
        return "eps"

    def predict(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self._network(x_t, self.path.step_of(t), label)[0]

    def predict_noise(
        self,
        x_t: Tensor,
        timestep: Tensor,
        label: Tensor | None = None,
        low: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return self._network(x_t, timestep, label)

    def loss(
        self,
        images: Tensor,
        label: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        raise NotImplementedError


# Schedules.


def test_linear_betas_are_those_of_ddpm() -> None:
    betas = schedule_betas("linear", 1000)
    assert betas.dtype == torch.float64
    assert float(betas[0]) == pytest.approx(1e-4, rel=1e-12)
    assert float(betas[-1]) == pytest.approx(0.02, rel=1e-12)
    torch.testing.assert_close(schedule_betas("linear", 250)[[0, -1]], 4 * betas[[0, -1]], **EXACT)


@pytest.mark.parametrize(
    ("steps", "first", "last"), [(4000, 9.866e-6, 1.5e-10), (1000, 4.13e-5, 2.4e-9)]
)
def test_cosine_betas(steps: int, first: float, last: float) -> None:
    betas = schedule_betas("cosine", steps)
    assert float(betas[0]) == pytest.approx(first, rel=1e-3)
    assert float((1 - betas).prod()) == pytest.approx(last, rel=0.05)
    assert int((betas == 0.999).sum()) == 1


def test_kept_steps() -> None:
    assert kept_steps(7, "") == tuple(range(7))
    assert kept_steps(6, "3") == (0, 2, 5), "2.5 is rounded to even"
    assert kept_steps(100, "ddim10") == tuple(range(0, 100, 10))
    assert kept_steps(4000, "250") == tuple(np.round(np.arange(250) * (3999 / 249)).astype(int))


@pytest.mark.parametrize("respacing", ["ddim60", "1", "101", "ddim", "2.5", "-3", "fast"])
def test_steps_that_cannot_be_kept(respacing: str) -> None:
    with pytest.raises(ValueError, match=r"respacing|stride"):
        kept_steps(100, respacing)


def test_betas_that_make_no_chain() -> None:
    with pytest.raises(ValueError, match="betas"):
        MarkovChain(torch.tensor([0.1, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="chain of 2 to"):
        schedule_betas("cosine", 1)
    with pytest.raises(ValueError, match="more than 20 steps"):
        schedule_betas("linear", 20)
    with pytest.raises(ValueError, match="timesteps"):
        MarkovChain(torch.tensor([0.1, 0.2], dtype=torch.float64), [0])


def test_a_chain_that_keeps_all_its_steps_is_the_same() -> None:
    whole, again = chain(50), chain(50).respaced("50")
    torch.testing.assert_close(again.betas, whole.betas, **EXACT)
    assert again.timesteps.tolist() == whole.timesteps.tolist()


def test_a_strided_chain_has_the_same_marginals_and_remembers_its_timesteps() -> None:
    whole = chain(100, fixed_variance="small")
    short = whole.respaced("ddim10").respaced("5")
    assert short.timesteps.tolist() == [0, 20, 40, 70, 90]
    torch.testing.assert_close(short.alpha_bar, whole.alpha_bar[short.timesteps], **EXACT)
    assert short.fixed_variance == "small"


# Kernels and terms.


def test_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x0): precisions add."""
    c, x0, x_t = chain(10), normal(9, 1, 2, 2), normal(9, 1, 2, 2, seed=1)
    step = torch.arange(1, 10)
    beta, before = (v[step][:, None, None, None] for v in (c.betas, c.previous_alpha_bar))
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() * x_t / beta + before.sqrt() * x0 / (1 - before)) / precision
    torch.testing.assert_close(c.posterior_mean(x0, x_t, step), mean, **EXACT)
    torch.testing.assert_close(
        c.posterior_log_variance[1:], -precision.flatten().log(), rtol=1e-9, atol=0
    )
    assert c.posterior_log_variance[0] == c.posterior_log_variance[1]


def test_noise_and_image_determine_each_other() -> None:
    c, x0, eps = chain(10), normal(10, 1, 2, 2), normal(10, 1, 2, 2, seed=1)
    step = torch.arange(10)
    x_t = c.diffuse(x0, step, eps)
    torch.testing.assert_close(c.x0_from_eps(eps, x_t, step), x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(c.eps_from_x0(x0, x_t, step), eps, **EXACT)


def test_learned_variance_lies_between_its_bounds() -> None:
    c, step, like = chain(10), torch.arange(10), normal(10, 1, 1, 1)
    low, high, beyond = (c.log_variance(torch.full_like(like, v), step, like) for v in (-1, 1, 3))
    torch.testing.assert_close(low.flatten(), c.posterior_log_variance)
    torch.testing.assert_close(high.flatten(), c.largest_log_variance)
    torch.testing.assert_close(beyond, 2 * high - low)


def test_fixed_variances() -> None:
    step, like = torch.arange(10), normal(10, 1, 1, 1)
    small = chain(10, fixed_variance="small").log_variance(None, step, like).flatten()
    large = chain(10, fixed_variance="large").log_variance(None, step, like).flatten()
    torch.testing.assert_close(small, chain(10).posterior_log_variance)
    torch.testing.assert_close(large[1:], chain(10).betas[1:].log())
    assert large[0] == small[0] == small[1]


def test_clipping_confines_the_predicted_image() -> None:
    c, x_t, step = chain(10), 3 * normal(10, 1, 4, 4), torch.arange(10)
    free = c.reverse_kernel(wavy, x_t, step, clip=False)
    clipped = c.reverse_kernel(wavy, x_t, step, clip=True)
    torch.testing.assert_close(clipped.x0, free.x0.clamp(-1, 1))
    torch.testing.assert_close(clipped.mean, c.posterior_mean(clipped.x0, x_t, step))


def test_kl_of_gaussians() -> None:
    mean, log_variance, other, other_log_variance = (normal(5, seed=s) for s in range(4))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, torch.exp(log_variance / 2)),
        torch.distributions.Normal(other, torch.exp(other_log_variance / 2)),
    )
    torch.testing.assert_close(gaussian_kl(mean, log_variance, other, other_log_variance), expected)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 0.3), (0.9, 0.5), (-1.2, 1.0), (3.0, 1.0), (0.1, 40.0)]
)
def test_masses_of_all_levels_sum_to_one(levels: int, mean: float, std: float) -> None:
    x = grey.center(torch.arange(levels), levels, torch.float64)
    log_variance = torch.full_like(x, 2 * math.log(std))
    masses = log_mass_of_level(x, torch.full_like(x, mean), log_variance, levels).exp()
    assert abs(float(masses.sum()) - 1) < 1e-10


@pytest.mark.parametrize("std", [1e-4, 1e-2])
def test_narrow_gaussians_have_the_stated_excess_and_no_more(std: float) -> None:
    x = grey.center(torch.arange(256), 256, torch.float64)
    log_variance = torch.full_like(x, 2 * math.log(std))
    total = log_mass_of_level(x, torch.full_like(x, 0.2), log_variance, 256).exp().sum()
    assert 0 < float(total) - 1 < 256 * 1.01e-12


@pytest.mark.parametrize("levels", [17, 256])
def test_masses_are_those_of_the_normal_distribution(levels: int) -> None:
    x = grey.center(torch.arange(levels), levels, torch.float64)
    mean, std = torch.full_like(x, 0.3), 0.4
    cdf = torch.distributions.Normal(mean, std).cdf
    half = 1 / (levels - 1)
    edges = torch.cat([x[:1] - math.inf, x[1:] - half, x[:1] + math.inf])
    exact = cdf(edges[1:]) - torch.cat([cdf(edges[1:])[:1] * 0, cdf(edges[1:])[:-1]])
    log_mass = log_mass_of_level(x, mean, torch.full_like(x, 2 * math.log(std)), levels)
    torch.testing.assert_close(log_mass.exp(), exact, rtol=0, atol=2e-4)


def test_far_away_levels_have_a_floor_and_finite_gradients() -> None:
    x = torch.tensor([0.2, 0.2, -1.0, 1.0])
    mean = torch.tensor([0.1, 1e30, 1e9, -1e9], requires_grad=True)
    log_mass = log_mass_of_level(x, mean, torch.full((4,), -20.0), 256)
    torch.testing.assert_close(log_mass, torch.full((4,), math.log(1e-12)))
    log_mass.sum().backward()
    assert mean.grad is not None
    assert bool(mean.grad.isfinite().all())


def test_terms_of_an_ideal_gaussian_model_have_their_closed_form() -> None:
    """E KL = ln(variance of the true kernel / of the posterior) / 2, by quadrature.

    A KL is quadratic in data and noise, for which three nodes of Gauss and Hermite are exact.
    """
    c, mean, std = chain(30), 0.2, 0.4
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(3))
    weights = torch.outer(weights, weights) / (2 * math.pi)
    x0 = (mean + std * nodes)[:, None].expand(3, 3)[None, None]
    noise = nodes[None, :].expand(3, 3)[None, None]
    network, expected = ideal_network(c, mean, std), 0.5 * marginal_variance(c, std).log()
    for index in range(1, 30):
        step = torch.tensor([index])
        x_t = c.diffuse(x0, step, noise)
        kernel = c.reverse_kernel(network, x_t, step, clip=False)
        terms = torch.stack(
            [
                c.bound_term(*(_cell(v, i, j) for v in (kernel, x0, x_t)), step, 256)[0]
                for i in range(3)
                for j in range(3)
            ]
        )
        term = float((terms * weights.flatten()).sum())
        half = 0.5 * float(c.posterior_log_variance[index])
        assert term == pytest.approx(float(expected[index]) - half, rel=1e-8, abs=1e-12)


def _cell(value, i: int, j: int):
    if isinstance(value, Tensor):
        return value[:, :, i : i + 1, j : j + 1]
    return type(value)(*(_cell(v, i, j) for v in (value.mean, value.log_variance, value.x0)))


def test_prior_term() -> None:
    c, x0 = chain(5), normal(3, 1, 2, 2)
    last = c.alpha_bar[-1]
    expected = gaussian_kl(
        last.sqrt() * x0, (1 - last).log().expand_as(x0), 0 * x0, torch.zeros_like(x0)
    )
    torch.testing.assert_close(c.prior_term(x0), expected.flatten(1).sum(1))


# The bound.


def gaussian_images(count: int, levels: int, mean: float, std: float) -> Tensor:
    x = (mean + std * normal(count, 1, 4, 4)).clamp(-1, 1)
    return ((x + 1) * ((levels - 1) / 2)).round().long()


@pytest.mark.parametrize("respacing", ["", "10"])
def test_bound_of_an_ideal_model_is_the_likelihood(respacing: str) -> None:
    """With true kernels the bound is tight, except for the difference of q(x_T) and the prior."""
    levels, mean, std, count = 1025, 0.1, 0.2, 1600
    whole = chain(25, "linear")
    c = whole.respaced(respacing)
    model = Oracle(whole, ideal_network(c, mean, std), levels)
    images = gaussian_images(count, levels, mean, std)
    bound = chain_bound(model, images, respacing=respacing, draws=Draws(batch_size=count))
    x = grey.center(images, levels, torch.float64)
    density = torch.distributions.Normal(mean, std).log_prob(x)
    exact = -(float(density.mean()) + math.log(2 / (levels - 1))) / math.log(2)
    found = bound.likelihood
    assert found.kind == "bound"
    assert bound.terms.shape == (count, c.steps + 1)
    # The decoder's term alone varies by 0.7 nats per dimension between draws.
    assert found.bits_per_dim == pytest.approx(exact, abs=0.03)
    assert float(bound.curve.sum()) == pytest.approx(found.bits_per_dim, rel=1e-12)
    assert bound.timesteps == tuple(c.timesteps.tolist())
    torch.testing.assert_close(found.nats, -bound.terms.sum(1))
    assert found.standard_error == pytest.approx(float(found.per_image.std()) / 40)


def test_bound_does_not_depend_on_the_batch_size() -> None:
    model = Oracle(chain(8), wavy, 17)
    images, label = gaussian_images(5, 17, 0.0, 0.4), torch.tensor([0, 1, 2, 3, 0])
    together = chain_bound(model, images, label, Draws(seed=3))
    alone = chain_bound(model, images[:3], label[:3], Draws(seed=3, batch_size=1))
    torch.testing.assert_close(alone.terms, together.terms[:3], **EXACT)
    other = chain_bound(model, images, label, Draws(seed=4))
    assert not torch.equal(other.terms, together.terms)
    torch.testing.assert_close(other.terms[:, -1], together.terms[:, -1], **EXACT)


def test_bound_of_a_part_is_that_part_of_the_bound() -> None:
    model = Oracle(chain(8), wavy, 17)
    images = gaussian_images(5, 17, 0.0, 0.4)
    for some in (None, 4):
        whole = chain_bound(model, images, draws=Draws(seed=3), evaluations=some)
        part = chain_bound(model, images[2:4], draws=Draws(seed=3, first=2), evaluations=some)
        torch.testing.assert_close(part.terms, whole.terms[2:4], **EXACT)


def test_bound_from_some_steps_is_the_same_in_expectation() -> None:
    model = Oracle(chain(12), wavy, 17)
    images = gaussian_images(1, 17, 0.0, 0.4).expand(1500, 1, 4, 4)
    whole = chain_bound(model, images, draws=Draws(batch_size=1500))
    assert torch.equal(
        chain_bound(model, images, draws=Draws(batch_size=1500), evaluations=99).terms, whole.terms
    )
    some = chain_bound(model, images, draws=Draws(batch_size=1500), evaluations=4)
    assert some.terms.shape == (1500, 5)
    assert some.strata == strata_of(12, 4) == (0, 1, 2, 6)
    for column, (start, end) in enumerate(pairwise((*some.strata, 12))):
        expected = float(whole.terms[:, start:end].sum(1).mean())
        error = float(some.terms[:, column].std()) / math.sqrt(1500)
        assert abs(float(some.terms[:, column].mean()) - expected) < 5 * error
    assert some.likelihood.standard_error > whole.likelihood.standard_error
    with pytest.raises(ValueError, match="evaluations >= 2"):
        chain_bound(model, images, evaluations=1)


@pytest.mark.parametrize("steps", [2, 3, 20, 1000])
def test_strata_make_up_the_chain(steps: int) -> None:
    for count in {2, steps // 3 + 2, steps - 1, steps, steps + 5} - {1}:
        starts = strata_of(steps, count)
        assert len(starts) == min(count, steps)
        assert starts[:2] == (0, 1)
        assert list(starts) == sorted(set(starts))
        assert starts[-1] < steps


def test_bound_takes_its_terms_at_the_steps_they_belong_to() -> None:
    """A network that is nonzero at one step changes the term of that step alone."""

    def one(x_t: Tensor, timestep: Tensor, label: Tensor | None) -> tuple[Tensor, None]:
        return torch.where(timestep[:, None, None, None] == 4, x_t, 0 * x_t), None

    def none(x_t: Tensor, timestep: Tensor, label: Tensor | None) -> tuple[Tensor, None]:
        return 0 * x_t, None

    images = gaussian_images(3, 17, 0.0, 0.4)
    first, second = (chain_bound(Oracle(chain(8), f, 17), images).terms for f in (one, none))
    assert (first != second).any(0).nonzero().flatten().tolist() == [4]


def test_bound_refuses_what_is_not_finite_or_no_image() -> None:
    def broken(x_t: Tensor, timestep: Tensor, label: Tensor | None) -> tuple[Tensor, None]:
        return torch.where(timestep[:, None, None, None] == 2, math.nan, x_t), None

    images = gaussian_images(2, 17, 0.0, 0.4)
    with pytest.raises(NonFiniteError, match="term 2 of the bound of image 0"):
        chain_bound(Oracle(chain(4), broken, 17), images)
    with pytest.raises(ValueError, match="grey levels"):
        chain_bound(Oracle(chain(4), wavy, 17), images + 10)
    with pytest.raises(ValueError, match="batch_size"):
        chain_bound(Oracle(chain(4), wavy, 17), images, draws=Draws(batch_size=0))


# Samplers.


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_all_noise_is_ancestral_sampling(clip: bool) -> None:
    model = Oracle(chain(12, fixed_variance="small"), wavy)
    ancestral = sample(model, 4, solver=Ancestral(clip=clip))
    implicit = sample(model, 4, solver=DDIM(eta=1.0, clip=clip))
    torch.testing.assert_close(implicit.x, ancestral.x, rtol=1e-8, atol=1e-9)


def test_ddim_without_noise_is_eulers_method() -> None:
    """In x / alpha against sigma / alpha, the rate of the probability flow is the noise."""
    c = chain(12)
    x = normal(3, 1, 4, 4)
    alpha, sigma = c.alpha_bar.sqrt(), (1 - c.alpha_bar).sqrt()
    expected = x
    for step in reversed(range(12)):
        eps, _ = wavy(expected, torch.full((3,), step), None)
        before = c.previous_alpha_bar[step]
        rate = (1 - before).sqrt() / before.sqrt() - sigma[step] / alpha[step]
        expected = before.sqrt() * (expected / alpha[step] + rate * eps)
        x = DDIM(clip=False).advance(c, Denoiser(Oracle(c, wavy)), x, step, None)
        torch.testing.assert_close(x, expected, **EXACT)


def test_ancestral_samples_of_an_ideal_model_follow_the_data() -> None:
    c, mean, std = chain(40), 0.2, 0.3
    drawn = sample(
        Oracle(c, ideal_network(c, mean, std)), 400, solver=Ancestral(clip=False), batch_size=400
    )
    left = float(posterior_of_gaussian(c, mean, std)[2][0])  # step 0 takes the mean
    assert float(drawn.x.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(6400))
    assert float(drawn.x.var()) == pytest.approx(std**2 - left, rel=4 * math.sqrt(2 / 6400))


@pytest.mark.parametrize("solver", [Ancestral(), DDIM(), DDIM(eta=0.5)])
def test_sample_k_belongs_to_seed_k(solver: ChainSolver) -> None:
    model, label = Oracle(chain(6), wavy), torch.tensor([0, 1, 2, 1, 0])
    together = sample(model, 5, label, 7, solver=solver)
    by_two = sample(model, 5, label, 7, solver=solver, batch_size=2)
    alone = sample(model, 1, label[3:4], 10, solver=solver)
    assert together.seeds == (7, 8, 9, 10, 11)
    torch.testing.assert_close(by_two.x, together.x, **EXACT)
    torch.testing.assert_close(alone.x, together.x[3:4], **EXACT)
    assert torch.equal(together.images, model.to_grey_levels(together.x))
    assert (together.evaluations, by_two.evaluations) == (6, 18)


def test_strided_samples_take_fewer_evaluations() -> None:
    asked = []

    def network(x_t: Tensor, timestep: Tensor, label: Tensor | None) -> tuple[Tensor, None]:
        asked.append(int(timestep[0]))
        return wavy(x_t, timestep, label)

    drawn = sample(Oracle(chain(100), network), 2, solver=DDIM(10))
    assert drawn.evaluations == 10
    assert asked == list(range(99, -1, -11)), "the network is told the original timesteps"


def test_samples_that_are_not_finite_are_an_error() -> None:
    def broken(x_t: Tensor, timestep: Tensor, label: Tensor | None) -> tuple[Tensor, None]:
        return x_t * math.nan, None

    with pytest.raises(NonFiniteError, match="seed 5"):
        sample(Oracle(chain(4), broken), 2, seed=5)


def test_bad_requests_for_samples() -> None:
    model = Oracle(chain(4), wavy)
    with pytest.raises(ValueError, match="n >= 1"):
        sample(model, 0)
    with pytest.raises(ValueError, match="eta"):
        DDIM(eta=1.5)
    with pytest.raises(ValueError, match="scale"):
        ClassifierGuidance(lambda x, t: x, -1.0)
    with pytest.raises(ValueError, match="scale"):
        sample(model, 1, 0, guidance=math.nan)
    guidance = ClassifierGuidance(lambda x, t: x.flatten(1), 1.0)
    with pytest.raises(ValueError, match="needs labels"):
        sample(model, 1, guidance=guidance)


# Guidance.


def logistic(x: Tensor, timestep: Tensor) -> Tensor:
    """Two classes by the sum of the pixels, the more certain the later the step."""
    score = x.flatten(1).sum(1) * (1 + 0.01 * timestep.double())
    return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.mark.parametrize("solver", [Ancestral(), DDIM(), DDIM(eta=0.5)])
def test_guidance_of_scale_zero_changes_nothing(solver: ChainSolver) -> None:
    model, label = Oracle(chain(6), wavy), torch.tensor([0, 1])
    plain = sample(model, 2, label, solver=solver)
    guided = sample(model, 2, label, solver=solver, guidance=ClassifierGuidance(logistic, 0.0))
    torch.testing.assert_close(guided.x, plain.x, rtol=1e-9, atol=1e-9)
    assert guided.evaluations == plain.evaluations == 6


def gradient_of(x: Tensor, timestep: int, label: int) -> Tensor:
    """Gradient of ln softmax(logistic), by hand."""
    certainty = 1 + 0.01 * timestep
    p = torch.sigmoid(certainty * x.flatten(1).sum(1))[:, None, None, None]
    return (certainty * (label - p)).expand_as(x)


def test_a_classifier_shifts_the_mean_of_an_ancestral_step() -> None:
    c, x, label = chain(20).respaced("10"), normal(2, 1, 4, 4), torch.tensor([1, 1])
    kernel = c.reverse_kernel(wavy, x, torch.tensor([5, 5]), label, clip=True)
    shift = 3 * kernel.log_variance.exp() * gradient_of(x, int(c.timesteps[5]), 1)
    denoiser = Denoiser(Oracle(c, wavy), label, ClassifierGuidance(logistic, 3.0))
    with torch.no_grad():
        guided = Ancestral().advance(c, denoiser, x, 5, None)
    torch.testing.assert_close(guided, kernel.mean + shift, **EXACT)


def test_a_classifier_shifts_the_noise_of_a_ddim_step() -> None:
    c, x, label = chain(20), normal(2, 1, 4, 4), torch.tensor([0, 0])

    def shifted(x_t: Tensor, timestep: Tensor, label: Tensor) -> tuple[Tensor, None]:
        eps, _ = wavy(x_t, timestep, label)
        sigma = (1 - c.alpha_bar[timestep]).sqrt()[:, None, None, None]
        return eps - 2 * sigma * gradient_of(x_t, int(timestep[0]), 0), None

    solver, guidance = DDIM(clip=False), ClassifierGuidance(logistic, 2.0)
    guided = solver.advance(c, Denoiser(Oracle(c, wavy), label, guidance), x, 5, None)
    expected = solver.advance(c, Denoiser(Oracle(c, shifted), label), x, 5, None)
    torch.testing.assert_close(guided, expected, **EXACT)


def test_classifier_free_guidance_extrapolates() -> None:
    model, label = Oracle(chain(6), wavy), torch.tensor([2, 1])
    x, t = normal(2, 1, 4, 4), torch.tensor([3, 3])
    eps, v = Denoiser(model, label, 1.5).noise(x, t, label)
    expected = 2.5 * wavy(x, t, label)[0] - 1.5 * wavy(x, t, None)[0]
    assert v is None
    torch.testing.assert_close(eps, expected, **EXACT)
    drawn = sample(model, 2, label, guidance=1.5)
    assert drawn.evaluations == 12
