"""The moving-average convention of momentum, Nesterov's step and the function `ema`;
`Momentum` itself is in the table of test_optimizers.py."""
import copy
import io
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_checks import set_gradients
from torch import nn
from torch.testing import assert_close

from nntrain.compare import MomentumLearner
from nntrain.learner import Learner
from nntrain.momentum import EMAMomentum, Momentum, ema
from nntrain.sgd import SGD

quick = settings(max_examples=15, deadline=None)
shares = st.floats(.05, .95)


def parameters():
    return [
        nn.Parameter(torch.ones(shape, dtype=torch.float64))
        for shape in ((2, 3), (), (4,))]


def same(a, b):
    for p, q in zip(a, b, strict=True): assert_close(p, q, rtol=0, atol=1e-12)


@given(
    lr=st.floats(1e-3, 0.5), beta=shares,
    decay=st.one_of(st.just(0.0), st.floats(1e-3, 0.5)), maximize=st.booleans(),
    foreach=st.booleans(), seed=st.integers(0, 999))
@quick
def test_an_average_at_lr_is_torchs_sum_at_lr_times_one_minus_beta(
    lr, beta, decay, maximize, foreach, seed):
    a, b = parameters(), parameters()
    ours = EMAMomentum(
        a, lr=lr, beta=beta, weight_decay=decay, maximize=maximize, foreach=foreach)
    theirs = torch.optim.SGD(
        b, lr=lr * (1 - beta), momentum=beta, weight_decay=decay, maximize=maximize)
    gen = torch.Generator().manual_seed(seed)
    for t in range(50):
        ours.param_groups[0]['lr'] = rate = (
            lr * (1 + math.cos(math.pi * t / 50)) / 2)  # scheduled rates too
        theirs.param_groups[0]['lr'] = rate*(1-beta)
        set_gradients(gen, a, b)
        ours.step(); theirs.step()
    same(a, b)


@given(lr=st.floats(1e-3, .5), beta=shares, seed=st.integers(0, 999))
@quick
def test_dampening_is_the_average_from_the_first_gradient(lr, beta, seed):
    grads = torch.randn(
        30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for kind in Momentum, torch.optim.SGD:
        p = nn.Parameter(torch.zeros((), dtype=torch.float64))
        opt = kind([p], lr=lr, momentum=beta, dampening=beta)
        for g in grads:
            p.grad = g.clone()
            opt.step()
        assert_close(
            p.detach(), -lr * ema(grads, beta, start=grads[0]).sum(), rtol=0, atol=1e-12
        )


@given(beta=shares, seed=st.integers(0, 999), shape=st.sampled_from([(), (2,), (3, 2)]))
@quick
def test_ema_is_the_weighted_sum_of_the_past(beta, seed, shape):
    xs = torch.randn(
        20, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before, start = xs.clone(), torch.ones(shape, dtype=torch.float64)
    for weight in None, 1, .3:
        got = ema(xs, beta, start=start, weight=weight)
        w = 1-beta if weight is None else weight
        for t in range(20):
            want = beta**(t+1)*start + sum(w*beta**(t-i)*xs[i] for i in range(t+1))
            assert_close(got[t], want, rtol=0, atol=1e-12)
    assert torch.equal(xs, before)


def test_ema_refuses_a_bad_beta():
    for beta in (-.1, 1., 2, math.nan, '0.9'):
        with pytest.raises(
            ValueError, match='beta must be a number of at least 0 and below 1'
        ):
            ema(torch.ones(3), beta)


@pytest.mark.parametrize('foreach', [True, False])
@pytest.mark.parametrize('kw', [{}, dict(weight_decay=.1), dict(maximize=True)])
def test_gradients_are_only_read(foreach, kw):
    for opt_func in (
        lambda ps: Momentum(ps, nesterov=True, foreach=foreach, **kw),
        lambda ps: Momentum(ps, foreach=foreach, **kw),
        lambda ps: EMAMomentum(ps, foreach=foreach, **kw),
    ):
        ps = parameters()
        opt = opt_func(ps)
        for _ in range(3):
            for p in ps: p.grad = torch.ones_like(p)
            opt.step()
            assert all(torch.equal(p.grad, torch.ones_like(p)) for p in ps)
            for p in ps: p.grad.zero_()                       # must not reach a buffer
            for state in opt.state.values():
                assert all(buf.abs().sum() > 0 for buf in state.values())


def test_the_conventions_do_not_take_each_others_state():
    ps = parameters()
    for a, b in (
        (Momentum, EMAMomentum),
        (EMAMomentum, Momentum),
        (torch.optim.SGD, EMAMomentum),
        (torch.optim.Adam, EMAMomentum),
    ):
        with pytest.raises(ValueError, match='saved'):
            b(ps, lr=0.1).load_state_dict(a(ps, lr=0.1).state_dict())


def test_ema_momentum_goes_on_after_saving_and_copying():
    a, gen = parameters(), torch.Generator().manual_seed(0)
    opt = EMAMomentum(a, lr=.1)
    for _ in range(5):
        set_gradients(gen, a)
        opt.step()
    b, copied = copy.deepcopy((a, opt))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file); file.seek(0)
    c = copy.deepcopy(a)
    loaded = EMAMomentum(c, lr=7.)
    loaded.load_state_dict(torch.load(file))
    for _ in range(5):
        set_gradients(gen, a, b, c)
        for o in opt, copied, loaded: o.step()
    same(a, b); same(a, c)


def test_momentum_that_a_schedule_switches_on_and_off():
    a, b, gen = parameters(), parameters(), torch.Generator().manual_seed(0)
    opts = Momentum(a, lr=.1, momentum=0.), torch.optim.SGD(b, lr=.1, momentum=0.)
    for t in range(30):
        for opt in opts:
            opt.param_groups[0]['momentum'] = 0.9 if 5 <= t < 15 or t > 20 else 0.0
        set_gradients(gen, a, b)
        for opt in opts: opt.step()
    same(a, b)


def test_nesterov_is_checked_in_each_group():
    w = parameters()
    for kw in dict(dampening=.1), dict(momentum=0.):
        with pytest.raises(ValueError, match='nesterov needs momentum'):
            Momentum(w, nesterov=True, **kw)
        with pytest.raises(ValueError, match='nesterov needs momentum'):
            Momentum([{'params': w, 'nesterov': True, **kw}])
    with pytest.raises(
        ValueError, match=r'dampening must be a number of at least 0 and below 1'
    ):
        Momentum(w, dampening=1.0)


def test_one_cycle_drives_the_momentum():
    p = nn.Parameter(torch.ones(1))
    opt = Momentum([p], lr=.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1., total_steps=10)
    seen = []
    for _ in range(9):
        p.grad = torch.ones(1)
        opt.step(); schedule.step()
        seen.append(opt.param_groups[0]['momentum'])
    assert min(seen) < .86 and max(seen) > .94


def test_momentum_learner_and_momentum_train_alike():
    batches = [
        (torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 2, (8,)))
        for _ in range(4)]
    class Loaders: train, valid = batches, batches
    def fitted(kind, opt_func, **kw):
        torch.manual_seed(0)
        learn = kind(
            nn.Linear(3, 2).double(), Loaders, nn.functional.cross_entropy, opt_func,
            lr=0.1, **kw)
        # a second fit starts fresh in both
        learn.fit(2); learn.fit(1)
        return list(learn.model.parameters())
    same(fitted(MomentumLearner, SGD, momentum=.9), fitted(Learner, Momentum))


def test_a_decay_of_the_weight_itself_is_not_translated():
    "1-β connects sum and average only where the decay is part of the gradient"
    class Decoupled(EMAMomentum):
        def multi_step(self, params, grads, states, group):
            torch._foreach_mul_(params, 1 - group['lr']*group['weight_decay'])
            super().multi_step(params, grads, states, group | {'weight_decay': 0})
    def end(kind, decay):
        gen, ps = torch.Generator().manual_seed(0), parameters()
        opt = kind(ps, lr=.1, beta=.8, weight_decay=decay)
        for _ in range(50):
            set_gradients(gen, ps)
            opt.step()
        return ps
    same(end(EMAMomentum, 0.), end(Decoupled, 0.))
    gaps = [(p-q).abs().max() for p, q in zip(end(EMAMomentum, .1), end(Decoupled, .1))]
    assert max(gaps) > 1e-3


def test_a_sum_that_starts_with_the_first_value_counts_it_twice():
    gen = torch.Generator().manual_seed(0)
    xs = torch.randn(200, generator=gen, dtype=torch.float64)
    extra = ema(xs, .99, start=xs[0], weight=1) - ema(xs, .99, weight=1)
    assert_close(extra, xs[0]*.99**torch.arange(1, 201, dtype=torch.float64))


def test_a_start_at_the_first_value_is_all_of_the_past():
    "The weight of the first value after t steps: β**(t-1), or its fair share"
    pulse = torch.zeros(100, dtype=torch.float64)
    pulse[0] = 1
    t = torch.arange(1, 101, dtype=torch.float64)
    assert_close(ema(pulse, .99, start=pulse[0]), .99**(t-1))
    assert_close(ema(pulse, .99)/(1-.99**t), .01*.99**(t-1)/(1-.99**t))


def test_a_window_as_calm_as_an_average_lags_as_much():
    for beta in .5, .7, .9, .99:
        n, lag = (1+beta)/(1-beta), beta/(1-beta)
        w = ema(torch.eye(1, 3000, dtype=torch.float64)[0], beta)
        assert (w**2).sum().sqrt().item() == pytest.approx(n**-.5, abs=1e-9)
        assert (n-1)/2 == pytest.approx(lag)


def test_memory_kept_in_the_gradients_is_another_thing_once_weights_decay():
    "MomentumLearner fades p.grad, and the decay of its optimizer stays outside of it"
    batch = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 2, (8,))
    class Loaders: train, valid = [batch]*4, [batch]
    def fitted(kind, opt_func, **kw):
        torch.manual_seed(0)
        model, loss = nn.Linear(3, 2).double(), nn.functional.cross_entropy
        learn = kind(model, Loaders, loss, opt_func, lr=.1, **kw)
        learn.fit(2)
        return learn
    inside = fitted(Learner, partial(Momentum, weight_decay=.1))
    outside = fitted(MomentumLearner, partial(SGD, weight_decay=.1), momentum=.9)
    assert (inside.model.weight - outside.model.weight).abs().max() > 1e-3
    assert not vars(inside.model.weight) and inside.model.weight.grad is None


def walk(opt_func, curvature=1., n_steps=2000):
    "Distance from the minimum of a parabola after many steps"
    p = nn.Parameter(torch.ones((), dtype=torch.float64))
    opt = opt_func([p])
    for _ in range(n_steps):
        p.grad = curvature*p.detach()
        opt.step()
    return p.abs().item()


@pytest.mark.parametrize('beta', [.3, .5, .9, .95])
@pytest.mark.parametrize('nesterov', [False, True])
def test_the_limit_of_the_rate(beta, nesterov):
    "2(1+β)/λ; with Nesterov's step lower by 1+2β"
    limit = 2*(1+beta)/30/(1+2*beta if nesterov else 1)
    below, above = (
        walk(partial(Momentum, lr=scale*limit, momentum=beta, nesterov=nesterov), 30.)
        for scale in (.99, 1.01))
    assert below < 1e-3 and above > 10


def test_the_best_beta_is_where_the_roots_meet():
    "(1-√(lr·λ))²: no other β comes as close in the end"
    for lr in .02, .25, 1.8:
        best = (1-math.sqrt(lr))**2
        left = {beta: walk(partial(Momentum, lr=lr, momentum=beta), n_steps=400)
                for beta in (best-.03, best, best+.03)}
        assert min(left, key=left.get) == best


def test_what_beta_remembers():
    "Half-life, lag, gain and the noise that is left, from the average itself"
    impulse, age = torch.zeros(3000).double(), torch.arange(3000).double()
    impulse[0] = 1
    def closely(a, b): assert_close(a.item(), b, rtol=1e-4, atol=0)
    for beta in .5, .7, .9, .99:
        w, half_life = ema(impulse, beta), math.log(.5)/math.log(beta)
        at_least = w.flip(0).cumsum(0).flip(0)             # of this age or more
        assert at_least[math.ceil(half_life)] <= .5 <= at_least[math.floor(half_life)]
        closely((age*w).sum(), beta/(1-beta))                     # mean age of a value
        closely((age - ema(age, beta))[-1], beta/(1-beta))       # how far behind a ramp
        closely(ema(torch.ones(3000).double(), beta, weight=1)[-1], 1/(1-beta))
        closely((w**2).sum().sqrt(), math.sqrt((1-beta)/(1+beta)))


def test_a_larger_beta_keeps_its_direction_longer():
    "On noise the sign of the average changes with probability arccos(β)/π"
    noise = torch.randn(
        5000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for beta in .1, .5, .9:
        avg = ema(noise, beta)
        flips = (avg[1:]*avg[:-1] < 0).double().mean().item()
        assert abs(flips - math.acos(beta)/math.pi) < .04


def test_a_debiased_average_is_the_weighted_mean_of_what_was_seen():
    xs = torch.randn(
        200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for beta in .5, .7, .9, .99:
        for t in 1, 2, 17, 200:
            weights = beta**torch.arange(t-1, -1, -1, dtype=torch.float64)
            mean = (weights*xs[:t]).sum()/weights.sum()
            assert_close(ema(xs, beta)[t-1]/(1 - beta**t), mean)


def longest_root(lr, beta, curvature, nesterov):
    "Length of the longer root of the step's polynomial on one parabola"
    keep = 1 - lr*curvature
    b, c = ((1+beta)*keep, beta*keep) if nesterov else (beta + keep, beta)
    root = (b*b - 4*c + 0j)**.5
    return max(abs(b+root), abs(b-root))/2


@pytest.mark.parametrize('nesterov', [False, True])
def test_the_factor_of_a_step_is_that_of_a_walk(nesterov):
    for lr, beta in (.02, .6), (.03, .9), (.01, .3):
        opt = partial(Momentum, lr=lr, momentum=beta, nesterov=nesterov)
        for curvature in 1., 30.:
            factor = longest_root(lr, beta, curvature, nesterov)
            # a swing may pass through zero at a step, but not at two in a row
            early, late = (
                max(walk(opt, curvature, n+k) for k in range(20)) for n in (100, 200))
            assert abs((late/early)**.01 - factor) < .01


def test_tuned_for_the_canyon_momentum_is_ahead_of_nesterov():
    "The best pairs of rate and β at curvatures 1 and 30, by formula and on a grid"
    def worst(lr, beta, nesterov):
        return max(longest_root(lr, beta, c, nesterov) for c in (1., 30.))
    root, nest = math.sqrt(30), math.sqrt(91)
    tuned = {False: ((2/(1+root))**2, ((root-1)/(root+1))**2),
             True: (4/91, (nest-2)/(nest+2))}
    found = {kind: worst(*pair, kind) for kind, pair in tuned.items()}
    assert found[False] == pytest.approx((root-1)/(root+1), abs=1e-6)
    assert found[True] == pytest.approx(1 - 2/nest, abs=1e-6)
    assert found[False] < .7 < .78 < found[True]
    for kind, best in found.items():
        for lr in range(1, 55):
            for beta in range(0, 50):
                assert worst(lr/400, beta/50, kind) > best - 1e-6


def test_how_far_a_weight_scatters():
    "On ½p² with noise of size 1: the exact deviation against a sum over the past"
    for lr, beta in (.05, 0.), (.005, .9), (.05, .9), (.15, .9):
        p, v, squares = 0., 0., 0.
        for t in range(6000):                # the response to one noisy gradient
            v = beta*v + p + (1. if t == 0 else 0.)
            p -= lr*v
            squares += p*p
        exact = lr*(1+beta)/((1-beta)*(2*(1+beta) - lr))
        assert squares == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize('foreach', [True, False])
def test_ema_momentum_steps_along_ema(foreach):
    grads = torch.randn(
        50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p, seen = nn.Parameter(torch.zeros((), dtype=torch.float64)), []
    opt = EMAMomentum([p], lr=1., beta=.8, foreach=foreach)
    for g in grads:
        p.grad = g.clone()
        opt.step()
        seen.append(-p.item())
    assert_close(torch.tensor(seen).double(), ema(grads, .8).cumsum(0))


def test_names_and_values_of_momentum_are_checked():
    for bad in 1.1, 1., -.1:
        says = f'momentum must be a number of at least 0 and below 1, got {bad}'
        with pytest.raises(ValueError, match=says): Momentum(parameters(), momentum=bad)
    says = "Momentum has no hyperparameter 'mom': did you mean 'momentum'?"
    with pytest.raises(TypeError, match=says): Momentum(parameters(), mom=.9)


def test_in_a_canyon_gradients_persist_along_and_alternate_across():
    "So their mean points along; and of momentum, some helps and too much does not"
    curvature = torch.tensor([1., 30.], dtype=torch.float64)
    def descend(beta, n_steps):
        p = nn.Parameter(torch.tensor([-9., 1.2], dtype=torch.float64))
        opt, grads = Momentum([p], lr=.06, momentum=beta), []
        for _ in range(n_steps):
            p.grad = curvature*p.detach()
            grads.append(p.grad.clone())
            opt.step()
        return torch.stack(grads), (curvature*p.detach()**2).sum().item()/2
    along, across = descend(0., 6)[0].T
    assert (along < 0).all() and (across[1:]*across[:-1] < 0).all()
    assert along.mean().abs() > .8*along[0].abs()
    assert across.mean().abs() < .2*across[0].abs()
    plain, some, too_much = (descend(beta, 60)[1] for beta in (0., .6, .95))
    assert some < plain < too_much
