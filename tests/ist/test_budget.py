"""A bound on the depth of backward that leaves each layer's share of updates as it was."""

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from peft_kernels.ist import IST, BlockCyclic, Fixed, ImportanceSampler, ISTConfig, Uniform
from peft_kernels.ist.budget import MOST, Budgeted, least_depth, shares_and_depth, systematic
from tests.ist.test_ist import llama


def draw(sampler, layers: int, count: int, unimportance=None, draws: int = 4000):
    """Shares, mean depth and largest set over many steps."""
    generator = torch.Generator().manual_seed(0)
    unimportance = torch.zeros(layers) if unimportance is None else unimportance
    sets = [sorted(sampler.sample(step, count, unimportance, generator)) for step in range(draws)]
    assert all(chosen and len(set(chosen)) == len(chosen) for chosen in sets)
    shares = torch.bincount(torch.tensor([i for chosen in sets for i in chosen]), minlength=layers) / draws
    depth = sum(layers - chosen[0] for chosen in sets) / (draws * layers)
    return shares, depth, max(map(len, sets))


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("flat", [True, False])
def test_shares_and_depth_over_many_steps(budget, flat):
    layers, count = 16, 4
    unimportance = torch.zeros(layers) if flat else torch.linspace(2.0, -2.0, layers)
    sampler = Budgeted(ImportanceSampler(), budget)
    shares, depth, largest = draw(sampler, layers, count, unimportance)
    expected, own_depth = shares_and_depth(torch.sigmoid(-unimportance), count)
    # 4000 steps: a share has a standard deviation of at most 0.008; 4.5 of them.
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=0.036)
    promised = sampler.expected_depth(count, unimportance)
    assert depth == pytest.approx(promised, abs=0.025)
    plan, _, _ = sampler.plan(count, unimportance)
    assert promised == pytest.approx(max(min(budget, own_depth), plan.depth), abs=1e-6)
    assert largest <= MOST * count


def least_depth_over_all_sets(shares, most: int) -> float:
    """The same program over every set there is."""
    layers = len(shares)
    sets = [s for size in range(1, most + 1) for s in itertools.combinations(range(layers), size)]
    rows = [[float(i in chosen) for chosen in sets] for i in range(layers)] + [[1.0] * len(sets)]
    found = linprog([layers - chosen[0] for chosen in sets], A_eq=rows, b_eq=[*shares.tolist(), 1.0], method="highs")
    return found.fun / layers


@settings(max_examples=25, deadline=None)
@given(odds=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=7), data=st.data())
def test_no_distribution_over_sets_is_less_deep(odds, data):
    count = data.draw(st.integers(1, len(odds)))
    shares, _ = shares_and_depth(torch.tensor(odds), count)
    most = min(len(odds), MOST * count)
    plan = least_depth(shares, most)
    assert plan.depth == pytest.approx(least_depth_over_all_sets(shares, most), abs=1e-6)
    torch.testing.assert_close(plan.together.sum(0), shares, rtol=0, atol=1e-6)
    assert plan.lowest.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_as_many_layers_every_step_saves_less():
    """Flat importance and a quarter of the layers in each step: 0.625 of the depth is the least there is."""
    shares = torch.full((32,), 0.25, dtype=torch.float64)
    assert least_depth(shares, 8).depth == pytest.approx(0.625, abs=1e-6)
    assert least_depth(shares, 16).depth < 0.41


def test_systematic_draws_keep_their_chances():
    chances = torch.tensor([1.0, 0.2, 0.5, 0.9, 0.4], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = [systematic(chances, generator) for _ in range(4000)]
    assert {len(chosen) for chosen in drawn} == {3} and all(0 in chosen for chosen in drawn)
    shares = torch.bincount(torch.tensor([i for chosen in drawn for i in chosen]), minlength=5) / 4000
    torch.testing.assert_close(shares.double(), chances, rtol=0, atol=0.036)


def test_a_budget_that_is_no_bound_draws_as_the_sampler_does():
    plain, bounded = Uniform(), Budgeted(Uniform(), 1.0)
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for step in range(20):
        torch.rand((), generator=one)  # which of the two ways, which the bounded one asks first
        assert plain.sample(step, 3, torch.zeros(9), one) == bounded.sample(step, 3, torch.zeros(9), other)


def test_what_cannot_be_met_is_said():
    with pytest.warns(
        UserWarning, match=r"backward_budget=0.10 cannot be met .* 2 of 6 layers .* at most 4: .* is 0\."
    ):
        IST(llama(), ISTConfig(backward_budget=0.1, update_fraction=0.34))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        IST(llama(), ISTConfig(backward_budget=0.7, update_fraction=0.34))
    for sampler, line in (
        (Fixed([1, 3]), r"expected a sampler that varies for a backward_budget, got Fixed, of depth 0\.83"),
        (BlockCyclic(), r"expected a sampler with odds for a backward_budget \('ist', 'rst'\), got BlockCyclic"),
    ):
        with pytest.raises(ValueError, match=line):
            IST(llama(), ISTConfig(backward_budget=0.5, sampler=sampler))


def test_skipped_share_is_counted():
    ist = IST(llama(), ISTConfig(backward_budget=0.7, update_fraction=0.34))
    lowest = [ist.before_step(None if step % 10 or not step else batch())[0] for step in range(10)]
    assert ist.skipped == pytest.approx(sum(lowest) / 60)


def batch():
    from tests.ist.test_ist import batch_for

    return batch_for(0)
