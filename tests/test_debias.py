"Properties of chapter 07's averages: exact for every path of decays, from every start"
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nntrain.debias import ExactEMA, debias, ema_step, ema_weights
from torch.testing import assert_close

quick = settings(max_examples=60, deadline=None)
values = st.floats(-1e3, 1e3, allow_subnormal=False)
decays = st.one_of(
    st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0]), st.floats(0, 1, allow_subnormal=False)
)
steps = st.lists(st.tuples(values, decays), min_size=1, max_size=40)
close = dict(rtol=0, atol=1e-7)


def written_out(path, dampened, start=0., weight=0.):
    """The weighted mean by its definition, in exact sums of Python: (mean or None, sum
    of weights)"""
    total, mass = (
        [start * weight * math.prod(b for _, b in path)],
        [weight * math.prod(b for _, b in path)])
    for j, (x, beta) in enumerate(path):
        w = (1-beta if dampened else 1.)*math.prod(b for _, b in path[j+1:])
        total.append(w*x); mass.append(w)
    return (
        math.fsum(total) / math.fsum(mass) if math.fsum(mass) > 1e-6 else None
    ), math.fsum(mass)


@given(steps, st.booleans())
@quick
def test_equals_the_written_out_mean(path, dampened):
    avg = ExactEMA(dampened=dampened)
    for x, beta in path: avg.update(x, beta)
    mean, mass = written_out(path, dampened)
    assert abs(avg.weight - mass) < 1e-9*max(1, mass)
    if mean is not None: assert abs(avg.mean - mean) < 1e-6
    betas = torch.tensor([b for _, b in path], dtype=torch.float64)
    assert abs(ema_weights(betas, dampened).sum().item() - mass) < 1e-9*max(1, mass)


@given(steps, st.booleans(), values, st.floats(1e-3, 10))
@quick
def test_any_start(path, dampened, start, weight):
    avg = ExactEMA(dampened=dampened, start=start, weight=weight)
    assert abs(avg.mean - start) < 1e-9
    for x, beta in path: avg.update(x, beta)
    mean, mass = written_out(path, dampened, start, weight)
    assert abs(avg.weight - mass) < 1e-9*max(1, mass)
    if mean is not None: assert abs(avg.mean - mean) < 1e-6


@given(steps)
@quick
def test_sum_of_weights_is_one_minus_the_product(path):
    betas = torch.tensor([b for _, b in path], dtype=torch.float64)
    assert_close(ema_weights(betas).sum(), 1 - betas.prod(), rtol=0, atol=1e-12)


@given(
    st.lists(values, min_size=1, max_size=30),
    st.one_of(
        st.sampled_from([0.0, 0.9, 0.999]), st.floats(0, 0.9999, allow_subnormal=False)
    ),
    st.booleans(),
)
@quick
def test_constant_decay_is_debias(xs, beta, dampened):
    exact, avg = ExactEMA(beta, dampened=dampened), 0.
    for step, x in enumerate(xs, 1):
        avg = ema_step(avg, x, beta, dampened)
        assert abs(exact.update(x).mean - debias(avg, beta, step, dampened)) < 1e-7
        assert min(xs[:step]) - 1e-7 <= exact.mean <= max(xs[:step]) + 1e-7


@given(steps, values)
@quick
def test_a_constant_stays_and_a_restart_forgets(path, constant):
    avg = ExactEMA()
    for _, beta in path:
        avg.update(constant, beta)
        if avg.weight > 1e-6: assert abs(avg.mean - constant) < 1e-6
    avg.reset()
    with pytest.raises(ValueError, match='any weight'): avg.mean
    assert abs(avg.update(7., .9).mean - 7.) < 1e-12


@given(steps, st.booleans(), st.sampled_from([list, tuple]))
@quick
def test_lists_of_tensors_are_as_single_ones(path, dampened, kind):
    one, several = ExactEMA(dampened=dampened), ExactEMA(dampened=dampened)
    for i, (x, beta) in enumerate(path):
        a, b = (
            torch.full((2, 3), x, dtype=torch.float64),
            torch.tensor(x * (i + 1), dtype=torch.float64))
        given = a.clone(), b.clone()
        several.update(kind([a, b]), beta)
        one.update(a, beta)
        assert torch.equal(a, given[0]) and torch.equal(b, given[1])   # only read
        assert_close(several.total[0], one.total, **close)
    if one.weight > 1e-6: assert_close(several.mean[0], one.mean, **close)


def test_a_start_for_a_list():
    avg = ExactEMA(.5, start=[torch.ones(2), torch.zeros(1)], weight=1.)
    for got, expected in zip(
        avg.update([torch.zeros(2), torch.ones(1)]).mean,
        (torch.full((2,), 0.5), torch.full((1,), 0.5)),
        strict=True,
    ):
        assert_close(got, expected)


@given(st.integers(1, 60), st.floats(.5, .99), st.floats(.5, .9999))
@quick
def test_divides_as_torch_does(n_steps, beta1, beta2):
    gen = torch.Generator().manual_seed(n_steps)
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt, m, v = torch.optim.Adam([p], lr=1., betas=(beta1, beta2), eps=0.), 0., 0.
    for step in range(1, n_steps+1):
        p.grad, before = (
            torch.randn(3, dtype=torch.float64, generator=gen), p.detach().clone())
        opt.step()
        m, v = ema_step(m, p.grad, beta1), ema_step(v, p.grad**2, beta2)
        assert_close(
            before - p.detach(), debias(m, beta1, step) / debias(v, beta2, step).sqrt(),
            rtol=1e-9, atol=1e-9)


def test_not_a_number_is_not_hidden():
    avg = ExactEMA().update(1.).update(math.nan)
    assert math.isnan(avg.mean) and avg.weight == pytest.approx(.19)


@pytest.mark.parametrize('bad', [-.1, 1.1, math.nan])
def test_refused(bad):
    with pytest.raises(ValueError, match='beta must lie'): debias(1., bad, 1)
    with pytest.raises(ValueError, match='beta must lie'): ExactEMA(bad)
    with pytest.raises(ValueError, match='beta must lie'): ExactEMA().update(1., bad)
    with pytest.raises(ValueError, match='from 1'): debias(1., .9, 0)
    with pytest.raises(ValueError, match='at least 0'): ExactEMA(weight=math.nan)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('beta, dampened', [(.999, True), (1., False)])
@pytest.mark.parametrize('several', [True, False])
def test_sums_of_16_bits_have_32(dtype, beta, dampened, several):
    ones, avg = torch.ones(2, dtype=dtype), ExactEMA(beta, dampened=dampened)
    for _ in range(3000): avg.update([ones] if several else ones)
    mean = avg.mean[0] if several else avg.mean
    assert_close(mean, torch.ones(2), rtol=0, atol=1e-3)


def test_complex_and_double():
    z = torch.tensor([1+2j])
    assert_close(ExactEMA(.9).update([z]).update([3*z]).mean[0], (.9*z + 3*z)/1.9)
    for dtype in torch.complex64, torch.float64, torch.float32:
        ones = torch.ones(2, dtype=dtype)
        assert ExactEMA(.5).update(ones).mean.dtype == dtype
        assert (
            ExactEMA(0.5, start=[ones], weight=1.0).update([ones]).mean[0].dtype
            == dtype)
