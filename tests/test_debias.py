"Properties of the averages of 11_debiasing: exact for every path of decays and start"
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR
from torch.testing import assert_close

from nntrain.debias import ExactEMA, debias, ema_step, ema_weights
from nntrain.lr_finder import smooth_losses
from nntrain.momentum import ema

quick = settings(max_examples=60, deadline=None)
values = st.floats(-1e3, 1e3, allow_subnormal=False)
decays = st.one_of(
    st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0]), st.floats(0, 1, allow_subnormal=False)
)
steps = st.lists(st.tuples(values, decays), min_size=1, max_size=40)
close = dict(rtol=0, atol=1e-7)


def written_out(path, dampened, start=0., weight=0.):
    """The weighted mean by its definition, in exact sums of Python:
    (mean or None, sum of weights)"""
    kept = weight*math.prod(b for _, b in path)
    total, mass = [start*kept], [kept]
    for j, (x, beta) in enumerate(path):
        w = (1-beta if dampened else 1.)*math.prod(b for _, b in path[j+1:])
        total.append(w*x); mass.append(w)
    mean = math.fsum(total)/math.fsum(mass) if math.fsum(mass) > 1e-6 else None
    return mean, math.fsum(mass)


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


# ---- β that moves: what the chapter on debiasing says in words

def one_cycle_betas(n_steps, low=.85, high=.95, pct_start=.3):
    progress = torch.arange(n_steps, dtype=torch.float64)/(n_steps-1)
    down, up = progress/pct_start, (progress-pct_start)/(1-pct_start)
    share = torch.where(progress < pct_start, down, 1-up)
    return high - (high-low)*(1-torch.cos(math.pi*share))/2


def usual_error(betas):
    "How much too small an average is that is divided by 1 - β**t instead of 1 - Πβ"
    steps = torch.arange(1., len(betas)+1, dtype=torch.float64)
    return 1 - (1 - betas.cumprod(0))/(1 - betas**steps)


def test_the_path_of_one_cycle():
    betas = one_cycle_betas(177)
    assert_close(betas[[0, -1]], torch.full((2,), .95, dtype=torch.float64), **close)
    assert .85 <= betas.min() < .8501 and abs(betas.argmin() - 53) <= 1


def test_a_constant_stays_under_one_cycle():
    avg, seven = ExactEMA(), torch.tensor(7., dtype=torch.float64)
    for b in one_cycle_betas(177):
        assert_close(avg.update(seven, b).mean, seven, rtol=0, atol=1e-12)


@pytest.mark.parametrize('n_epochs, shortest', [(3, .882), (5, .925), (20, .989)])
def test_torchs_adam_is_off_by_this_error(n_epochs, shortest):
    """On a constant gradient each step ought to be one learning rate long.
    OneCycleLR moves β₁, and torch divides by 1 - β₁**t"""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt, lengths, path = torch.optim.Adam([p], lr=1., eps=0.), [], []
    schedule = OneCycleLR(opt, max_lr=.01, total_steps=n_epochs*59)
    for _ in range(n_epochs*59):
        group, before = opt.param_groups[0], p.item()
        lr = group['lr']
        path.append(group['betas'][0])
        p.grad = torch.full_like(p, 7.)
        opt.step(); schedule.step()
        lengths.append((before - p.item())/lr)
    lengths, path = (torch.tensor(xs, dtype=torch.float64) for xs in (lengths, path))
    assert_close(lengths, 1 - usual_error(path), rtol=0, atol=1e-6)
    assert lengths.min().item() == pytest.approx(shortest, abs=6e-4)


def test_torchs_adam_is_right_at_a_constant_beta():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = torch.optim.Adam([p], lr=.01, eps=0.)
    for _ in range(50): p.grad = torch.full_like(p, 7.); opt.step()
    assert p.item() == pytest.approx(-.5, abs=1e-12)           # fifty steps of one rate


def test_nadam_keeps_a_product():
    p = torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    opt = torch.optim.NAdam([p])
    opt.step()
    assert 'mu_product' in opt.state[p]


def test_undampened_momentum_is_divided_by_nothing():
    "Under one cycle its steps are up to twenty rates long: the sum of its weights"
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt, total = torch.optim.SGD([p], lr=1., momentum=.9), 0.
    schedule, gains = OneCycleLR(opt, max_lr=.01, total_steps=590), []
    for _ in range(590):
        group, before = opt.param_groups[0], p.item()
        lr, total = group['lr'], group['momentum']*total + 1
        p.grad = torch.ones_like(p)
        opt.step(); schedule.step()
        gains.append((before - p.item())/lr)
        assert gains[-1] == pytest.approx(total, abs=1e-6)
    assert gains[0] == pytest.approx(1)
    assert min(gains[100:]) == pytest.approx(6.7, abs=.1)
    assert gains[-1] == pytest.approx(19.6, abs=.1)


def test_dampened_and_undampened_agree_for_a_constant_beta_only():
    def shares(betas, dampened):
        w = ema_weights(torch.tensor(betas, dtype=torch.float64), dampened)
        return w/w.sum()
    same, moving = [.9]*3, [.9, .5, .9]
    assert_close(shares(same, True), shares(same, False), **close)
    a, b = shares(moving, True), shares(moving, False)
    assert a[1] > a[2] and b[1] < b[2]


def test_the_smoothed_loss_is_the_constant_case():
    gen = torch.Generator().manual_seed(0)
    noise = torch.rand(100, generator=gen, dtype=torch.float64)
    losses = [2.3*.99**i + .1*x for i, x in enumerate(noise.tolist())]
    avg = ExactEMA(.9)
    means = [avg.update(x).mean for x in losses]
    assert means == pytest.approx(smooth_losses(losses, .9))


def test_bias_and_spread_of_four_starts():
    "Bias: share of the start times its error; variance: the sum of squared weights"
    gen = torch.Generator().manual_seed(2)
    n, beta = 20_000, .9
    draws = 10 + torch.randn(50, n, generator=gen, dtype=torch.float64)
    t = torch.arange(1., 51, dtype=torch.float64)
    squares = (1-beta)**2*(1-beta**(2*t))/(1-beta**2)
    first = squares - (1-beta)**2*beta**(2*t-2) + beta**(2*t-2)
    plain, weights = ema(draws, beta), 1 - beta**t
    for averages, bias, variance in (
            (plain, -10*beta**t, squares),
            (plain/weights[:, None], 0*t, squares/weights**2),
            (ema(draws, beta, start=draws[0]), 0*t, first),
            (ema(draws, beta, start=6.), -4*beta**t, squares)):
        error = variance.sqrt()/n**.5
        assert ((averages.mean(1) - 10 - bias).abs() < 5*error).all()
        assert_close(averages.std(1), variance.sqrt(), rtol=.03, atol=0)


def test_right_on_average_and_close_are_two_things():
    "Five values around .3: from zero is the closest, because zero happens to be near"
    gen = torch.Generator().manual_seed(3)
    rows = torch.randn(5, 5000, generator=gen, dtype=torch.float64) + .3
    zero, first = ema(rows, .99)[-1], ema(rows, .99, start=rows[0])[-1]
    fair = zero/(1-.99**5)
    off = [(x-.3).square().mean().sqrt() for x in (zero, fair, first)]
    assert abs(zero.mean() - .3*(1-.99**5)) < .01 and abs(fair.mean() - .3) < .03
    assert off[0] < off[1] < off[2] and abs(off[1] - 5**-.5) < .02


def test_the_exponent_is_the_number_of_the_step():
    "Points walked in sorted order, with the index before the sorting: wrong at first"
    gen = torch.Generator().manual_seed(0)
    grid = torch.linspace(-4, 4, 100, dtype=torch.float64)
    xs = grid + .1*torch.randn(100, generator=gen, dtype=torch.float64)
    ys, order = 1 - (grid/3)**2, xs.argsort()
    steps = torch.arange(1, 101)
    by_step, by_index = (ema(ys[order], .7)/(1-.7**n) for n in (steps, order+1))
    assert (steps != order+1).sum() > 20 and (by_step - by_index).abs().max() > .01
    assert_close(by_step[-1].item(), debias(ema(ys[order], .7)[-1].item(), .7, 100))


def test_special_values():
    assert debias(7., beta=0., step=5) == 7.                   # remembers the last only
    assert ExactEMA().update(4., 0.).update(6., 0.).mean == 6.
    assert ExactEMA().update(4., .5).update(6., 1.).mean == 4.  # β = 1: ignored
    undampened = ExactEMA(1., dampened=False)
    assert undampened.update(4.).update(6.).update(8.).mean == 6.
    guess = ExactEMA(.5, start=8., weight=1.).update(4.).update(6.)
    assert guess.mean == pytest.approx(6.)                      # as `ema` from 8
    assert ExactEMA(.5, start=8.).update(4.).mean == pytest.approx(4.)
    assert debias(30., beta=1., step=3, dampened=False) == 10.  # β = 1: the plain mean
    assert debias(2., beta=.5, step=2, dampened=False) == pytest.approx(2/1.5)
    pair = debias([torch.ones(2), torch.ones(1)], .5, 1)
    assert_close(pair, [2*torch.ones(2), 2*torch.ones(1)])
    for empty in ExactEMA(), ExactEMA(1.).update(5.):
        with pytest.raises(ValueError, match='any weight'): empty.mean
    with pytest.raises(ValueError, match='any weight'): debias(0., beta=1., step=3)
    with pytest.raises(ValueError, match='beta must lie'): ema_step(0., 1., -.1)
