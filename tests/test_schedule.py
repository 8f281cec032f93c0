"Schedules, and the callbacks that write them: properties over random shapes, and torch"
import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from nntrain.adaptive import AdamW
from nntrain.zoo import Lion
from nntrain.callback import Callback
from nntrain.events import CancelBatch, CancelFit, CancelStep
from nntrain.lr_finder import lr_find
from nntrain.learner import Learner
from nntrain.metrics import MetricsCB
from nntrain.history import RecorderCB
from nntrain.momentum import EMAMomentum, Momentum
from nntrain.results import result
from nntrain.sgd import SGD
from nntrain.cycles import momentum_cycle, one_cycle
from nntrain.annealing import AdamAnnealed, AnnealCB, AutoAnnealCB
from nntrain.schedule import (
    at_steps, constant, cosine, exponential, inverse_sqrt, join, linear, polynomial,
    repeat, stairs, step_decay, time_decay, triangular, warm_restarts, warm_up, wsd)
from nntrain.steering import ScheduleCB, find_hyper, hyper_names, set_hyper
from nntrain.torch_schedulers import TorchSchedulerCB

quick = settings(max_examples=40, deadline=None)
values = st.floats(1e-6, 10)
ways = st.sampled_from([linear, cosine, exponential, polynomial, time_decay])


def shares(numbers): return [n/sum(numbers) for n in numbers]


@given(way=ways, a=values, b=values, p=st.floats(0, 1))
@quick
def test_every_way_stays_between_its_ends_and_hits_them(way, a, b, p):
    schedule = way(a, b)
    assert (
        schedule(0.0) == a or way is time_decay
        and math.isclose(schedule(0.0), a, rel_tol=1e-12))
    assert (
        schedule(1.0) == b or way is time_decay
        and math.isclose(schedule(1.0), b, rel_tol=1e-12))
    assert min(a, b)*(1-1e-12) <= schedule(p) <= max(a, b)*(1+1e-12)


@given(way=ways, a=values, b=values, n=st.integers(2, 50))
@quick
def test_every_way_is_monotone(way, a, b, n):
    sign = 1 if b > a else -1
    out = at_steps(way(a, b), n)
    assert all(sign*(y-x) >= -1e-12*max(a, b) for x, y in zip(out, out[1:]))


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 100), values, values), min_size=1, max_size=7
    ).filter(lambda parts: sum(n for n, *_ in parts))
)
@quick
def test_join_hits_its_end_points_and_every_joint(parts):
    fractions, starts, ends = (
        shares([n for n, *_ in parts]), [a for _, a, _ in parts],
        [b for *_, b in parts])
    joined = join(fractions, [linear(a, b) for a, b in zip(starts, ends)])
    seen = [i for i, f in enumerate(fractions) if f > 0]
    assert joined(0.) == starts[seen[0]] and joined(1.) == ends[seen[-1]]
    for i in seen:
        begin = math.fsum(fractions[:i])
        middle = joined(min(begin + fractions[i]/2, 1.))
        assert math.isclose(middle, (starts[i]+ends[i])/2, rel_tol=1e-6, abs_tol=1e-6)
    for i in seen[:-1]:     # where two parts meet, the later one begins
        assert (
            math.isclose(
                joined(math.fsum(fractions[: i + 1])),
                next(starts[j] for j in seen if j > i), rel_tol=1e-6)
            or fractions[i] < 1e-6
        )


@given(
    parts=st.lists(st.integers(1, 100), min_size=2, max_size=6),
    off=st.floats(1e-4, 2) | st.floats(-0.9, -1e-4), drop=st.booleans())
@quick
def test_join_refuses_bad_fractions(parts, off, drop):
    good = shares(parts)
    schedules = [constant(1.)]*len(good)
    join(good, schedules)
    with pytest.raises(ValueError, match='sum to 1'):
        join([f * (1 + off) for f in good], schedules)
    with pytest.raises(ValueError, match='at least 0'):
        join([good[0] + good[1] + 1, -1, *good[2:]], schedules)
    with pytest.raises(ValueError, match='one fraction for each'):
        join(good, schedules[1:] if drop else schedules + schedules)
    for p in -1e-9, 1+1e-9, math.nan:
        with pytest.raises(ValueError, match='progress'): join(good, schedules)(p)
    with pytest.raises(ValueError): join([], [])


@given(
    parts=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    inner=st.lists(st.integers(1, 9), min_size=2, max_size=4), p=st.floats(0, 1))
@quick
def test_a_joined_schedule_is_a_schedule(parts, inner, p):
    nested = join(
        shares(parts),
        [
            join(shares(inner), [constant(float(k)) for k in range(len(inner))])
            for _ in parts],
    )
    assert (
        nested(p) in range(len(inner)) and nested(0.0) == 0
        and nested(1.0) == len(inner) - 1)


@given(n=st.integers(1, 6), growth=st.floats(.5, 3), p=st.floats(.001, .999))
@quick
def test_repeat(n, growth, p):
    cycles = repeat(linear(0., 1.), n, growth)
    assert cycles(0.) == 0 and cycles(1.) == 1
    lengths = shares([growth**k for k in range(n)])
    assert math.isclose(cycles(lengths[0]*p), p, abs_tol=1e-9)
    assert math.isclose(cycles(1 - lengths[-1]*(1-p)), p, abs_tol=1e-6)


@given(epochs=st.integers(1, 40), batches=st.integers(1, 300), way=ways)
@quick
def test_stairs_change_with_the_epoch(epochs, batches, way):
    expected = [v for v in at_steps(way(1., .1), epochs) for _ in range(batches)]
    assert at_steps(stairs(way(1., .1), epochs), epochs*batches) == expected


@given(share=st.floats(.01, .99), lr=values)
@quick
def test_warm_up_and_triangles(share, lr):
    warmed = warm_up(cosine(lr, 0.), share)
    assert (
        warmed(0.0) == 0 and math.isclose(warmed(share), lr, rel_tol=1e-9)
        and warmed(1.0) == 0)
    assert max(at_steps(triangular(0., lr, 2), 9)) == lr
    assert at_steps(warm_restarts(lr, 0., 2, growth=1), 5)[2] == lr


def test_step_decay_cuts_at_its_places():
    assert at_steps(step_decay(8., .5, (0., .5, 1.)), 5) == [4., 4., 2., 2., 1.]
    assert at_steps(step_decay(8., .5, at=()), 2) == [8., 8.]


@pytest.mark.parametrize('a, b', [(a, b) for a in range(1, 9) for b in range(1, 10-a)])
def test_join_of_tenths_ends_exactly(a, b):
    fractions = [a/10, b/10, (10-a-b)/10]      # some of them do not sum to 1
    parts = [linear(.1, 5.), constant(5.), linear(5., .7)]
    assert join(fractions, parts)(1.) == .7


def test_restarts_have_their_middle_in_the_middle():
    grows = warm_restarts(1., 0., n=3, growth=2)
    for p in 1/14, 2/7, 5/7: assert abs(grows(p) - .5) < 1e-12


@given(peak=values, up=st.floats(.01, .9), rest=st.floats(.01, 1), end=st.floats(0, 1),
       way=st.sampled_from([linear, cosine]))
@quick
def test_warm_up_stable_decay(peak, up, rest, end, way):
    down = (1-up)*rest
    schedule = wsd(peak, up, down, end*peak, way)
    assert schedule(0.) == 0 and schedule(1.) == end*peak
    if up + down < .99: assert schedule(up + (1-up-down)/2) == peak
    assert all(v <= peak*(1 + 1e-9) for v in at_steps(schedule, 50))


@given(peak=values, share=st.floats(.01, 1.), p=st.floats(0, 1))
@quick
def test_inverse_square_root(peak, share, p):
    at_p = inverse_sqrt(peak, share)(p)
    expected = peak*min(p/share, (share/p)**.5) if p else 0.
    assert math.isclose(at_p, expected, rel_tol=1e-6, abs_tol=1e-12)


def test_three_phases_by_hand():
    three = one_cycle(1., .25, 4., 100., linear, three_phase=True)
    assert at_steps(three, 5) == pytest.approx([.25, 1., .25, .13, .01])


def torch_pct_start(pct_start, n_steps):
    "The share with which `one_cycle` takes the values of OneCycleLR"
    return (pct_start*n_steps - 1)/(n_steps - 1)


def test_no_first_phase_starts_at_the_peak_and_torchs_a_little_below():
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1., momentum=.9)
    lr_scheduler.OneCycleLR(opt, 1., total_steps=10, pct_start=0.)
    assert opt.param_groups[0]['lr'] < .99
    assert one_cycle(1., pct_start=0.)(0.) == 1.
    assert at_steps(one_cycle(1., pct_start=1/9), 10)[1] == 1.


T = 41


@pytest.mark.parametrize('ours, theirs', [
    (cosine(1., .1), partial(lr_scheduler.CosineAnnealingLR, T_max=T-1, eta_min=.1)),
    (linear(1., .2), partial(lr_scheduler.LinearLR, start_factor=1., end_factor=.2,
                             total_iters=T-1)),
    (exponential(1., .01), partial(lr_scheduler.ExponentialLR, gamma=.01**(1/(T-1)))),
    (polynomial(1., 0., 3.), partial(lr_scheduler.PolynomialLR, total_iters=T-1,
                                     power=3.)),
    (triangular(.1, 1., 2), partial(lr_scheduler.CyclicLR, base_lr=.1, max_lr=1.,
                                    step_size_up=10, cycle_momentum=False)),
    (step_decay(1., .1, (.25, .5)), partial(lr_scheduler.MultiStepLR,
                                            milestones=[10, 20])),
    (warm_restarts(1., 0., 2, growth=1.),
     partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=20)),
], ids=['cosine', 'linear', 'exponential', 'polynomial', 'cyclic', 'steps', 'restarts'])
def test_ours_against_torchs_which_count_differently(ours, theirs):
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    scheduler, used = theirs(opt), []
    for _ in range(T):
        used.append(opt.param_groups[0]['lr'])
        opt.step(), scheduler.step()
    restarts = isinstance(scheduler, lr_scheduler.CosineAnnealingWarmRestarts)
    # its last step starts a third
    if restarts: assert (ours(1.), used[-1]) == (0., 1.)
    n = T - restarts
    assert at_steps(ours, T)[:n] == pytest.approx(used[:n], abs=1e-12)


def test_one_step_too_many_and_torchs_cycle_comes_back():
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1., momentum=.9)
    scheduler = lr_scheduler.OneCycleLR(opt, .01, total_steps=59)
    for _ in range(59): last = opt.param_groups[0]['lr']; opt.step(); scheduler.step()
    assert opt.param_groups[0]['lr'] > 10*last
    with pytest.raises(ValueError, match='total steps is 59'): scheduler.step()
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    scheduler = lr_scheduler.CosineAnnealingLR(opt, T_max=20)
    for _ in range(40): opt.step(); scheduler.step()
    assert opt.param_groups[0]['lr'] == pytest.approx(1.)


@given(
    total=st.integers(2, 400), pct=st.floats(0, 1), max_lr=values,
    div=st.floats(1, 100), final=st.floats(1, 1e5), linear_=st.booleans(),
    three=st.booleans(), low=st.floats(0.5, 0.8), high=st.floats(0.8, 0.99),
    kind=st.sampled_from([torch.optim.SGD, torch.optim.AdamW]))
@settings(max_examples=80, deadline=None)
def test_one_cycle_is_torchs_step_by_step(
    total, pct, max_lr, div, final, linear_, three, low, high, kind):
    most = .5 if three else 1
    q = (
        torch_pct_start(1 / total + 1e-3 + pct * (most - 1 / total - 2e-3), total)
        if total * most > 1.1 else None)
    if q is None or not 0 < q < most - 1e-3: return
    pct = (q*(total-1) + 1)/total
    opt = kind([nn.Parameter(torch.zeros(1))], lr=1.)
    group = opt.param_groups[0]
    theirs = lr_scheduler.OneCycleLR(
        opt, max_lr, total_steps=total, pct_start=pct,
        anneal_strategy='linear' if linear_ else 'cos', base_momentum=low,
        max_momentum=high, div_factor=div, final_div_factor=final, three_phase=three)
    shape = dict(
        pct_start=torch_pct_start(pct, total), anneal=linear if linear_ else cosine,
        three_phase=three)
    rates, moms = (
        at_steps(one_cycle(max_lr, div=div, div_final=div * final, **shape), total),
        at_steps(momentum_cycle((high, low, high), **shape), total))
    for i in range(total):
        key, at = find_hyper(group, 'momentum')
        momentum = group[key] if at is None else group[key][at]
        assert math.isclose(
            group['lr'], rates[i], rel_tol=1e-6, abs_tol=1e-9 * max_lr
        ) and math.isclose(momentum, moms[i], rel_tol=1e-9), i
        if i < total-1:
            opt.step()
            theirs.step()


# ---- the callbacks

class Skip(Callback):
    "Skip the steps of some batches"
    def __init__(self, skipped): self.skipped = set(skipped)
    def after_backward(self, learn):
        if learn.epoch*len(learn.dl) + learn.iter in self.skipped: raise CancelStep()


def learner(cbs=(), opt_func=torch.optim.SGD, n_batches=4, lr=.01, **kwargs):
    gen = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(3, 2, generator=gen, dtype=torch.float64),
            torch.randn(3, 1, generator=gen, dtype=torch.float64))
        for _ in range(n_batches)
    ]
    class Loaders: train, valid = batches, batches[:1]
    torch.manual_seed(0)
    return Learner(
        nn.Linear(2, 1).double(), Loaders, F.mse_loss, opt_func, lr, [MetricsCB(), *cbs]
    )


def used(): return RecorderCB(lr=lambda learn: learn.opt.param_groups[0]['lr'])


@given(
    n_epochs=st.integers(1, 3), n_batches=st.integers(1, 5),
    skipped=st.sets(st.integers(0, 14)))
@settings(max_examples=25, deadline=None)
def test_a_skipped_step_does_not_advance_the_schedule(n_epochs, n_batches, skipped):
    total, schedule = n_epochs*n_batches, linear(.1, 0.)
    sched, seen = ScheduleCB(lr=schedule), used()
    learner([sched, seen, Skip(skipped)], n_batches=n_batches).fit(n_epochs)
    planned, taken, expected = at_steps(schedule, total), 0, []
    for i in range(total):
        expected.append(planned[taken])
        taken += i not in skipped
    assert seen.values['lr'] == expected
    assert sched.values['lr'] == planned[:taken]


def test_more_steps_than_planned_stay_at_the_end():
    class FewerCB(Callback):
        order = -5
        def before_fit(self, learn): learn.n_steps = 3
    sched = ScheduleCB(lr=linear(.1, 0.))
    learner([sched, FewerCB()]).fit(2)
    assert sched.values['lr'] == [*at_steps(linear(.1, 0.), 3), *[0.]*5]


def test_each_fit_starts_anew_and_validation_alone_needs_no_optimizer():
    sched = ScheduleCB(lr=linear(.1, 0.))
    learn = learner([sched])
    for _ in range(2):
        learn.fit(1)
        assert sched.values['lr'] == at_steps(linear(.1, 0.), 4)
    for cb in sched, TorchSchedulerCB(partial(lr_scheduler.ExponentialLR, gamma=0.5)):
        learner([cb]).fit(1, train=False)


@pytest.mark.parametrize('cancel', [CancelBatch, CancelFit])
def test_cancelled_batches_do_not_count(cancel):
    class CancelCB(Callback):
        def after_loss(self, learn):
            if learn.training and learn.iter == 1: raise cancel()
    sched = ScheduleCB(lr=linear(.3, 0.))
    learner([sched, CancelCB()]).fit(1)
    assert (
        sched.values['lr']
        == at_steps(linear(0.3, 0.0), 4)[: 3 if cancel is CancelBatch else 1])


@pytest.mark.parametrize(
    'opt_func, schedules, error, says',
    [
        (SGD, dict(momentum=0.9), TypeError, 'constant'),
        (SGD, dict(momentum=constant(0.9)), TypeError, 'moms=None'),
        (SGD, dict(learning_rate=constant(0.9)), TypeError, 'did you mean'),
        (AdamW, dict(beta3=constant(0.9)), TypeError, "did you mean 'beta"),
        (AdamW, dict(params=constant(0.9)), TypeError, 'no hyperparameter'),
        (AdamW, dict(foreach=constant(1.0)), TypeError, 'no hyperparameter'),
        (
            AdamW, dict(lr=[constant(0.1), constant(0.1)]), ValueError,
            '2 schedules for 1 parameter groups'),
        (AdamW, dict(lr=[]), ValueError, '0 schedules'),
        (
            AdamW, dict(beta1=constant(0.1), betas=constant((0.1, 0.2))), ValueError,
            'keep one'),
        (
            AdamW, dict(momentum=constant(0.9), beta1=constant(0.9)), ValueError,
            'both write betas'),
        (AdamW, dict(momentum=constant(1.0)), ValueError, 'below 1'),
        (Momentum, dict(momentum=constant(-0.1)), ValueError, 'at least 0'),
        (torch.optim.SGD, dict(lr=lambda p: math.inf), ValueError, 'lr'),
        (
            torch.optim.SGD, dict(lr=lambda p: None), TypeError,
            'lr must be a number, got None .*progress 0'),
        (
            torch.optim.SGD, dict(lr=linear(0.1, -0.1)), ValueError,
            'lr must be a number of at least 0.*progress 0.66'),
        (
            torch.optim.SGD, dict(momentum=constant(1.5)), ValueError,
            'momentum must be a number.*below 1'),
        (
            torch.optim.Adam, dict(weight_decay=constant(-1.0)), ValueError,
            'weight_decay'),
        (
            SGD, dict(lr=lambda p: 0.1 / (1 - p)), ValueError,
            'the schedule of lr fails at progress 1: ZeroDivisionError'),
        (
            torch.optim.AdamW, dict(betas=constant((0.9, 0.99, 0.999))), ValueError,
            'needs 2 values'),
    ],
)
def test_schedule_cb_refuses(opt_func, schedules, error, says):
    with pytest.raises(error, match=says):
        learner([ScheduleCB(**schedules)], opt_func).fit(1)


@pytest.mark.parametrize(
    'make, says',
    [
        (lambda: one_cycle(0.1, div=0), 'div must be a finite number above 0, got 0'),
        (
            lambda: one_cycle(0.1, div_final=0),
            'div_final must be a finite number above 0'),
        (lambda: one_cycle(0.1, div=-2.0), 'div must be a finite number above 0'),
        (lambda: one_cycle(math.inf), 'max_lr must be a finite number'),
        (lambda: one_cycle('.1'), "max_lr must be a finite number, got '.1'"),
        (
            lambda: one_cycle(0.1, pct_start=math.nan),
            'pct_start must lie in .* got nan'),
        (lambda: one_cycle(0.1, pct_start=0.6, three_phase=True), r'in \[0, 0.5\]'),
        (
            lambda: momentum_cycle((0.95, 1.5, 0.95)),
            r'moms\[1\] must be a number .* below 1'),
        (lambda: momentum_cycle((0.95, 0.85)), 'moms must be three numbers'),
        (lambda: momentum_cycle(pct_start=25), 'pct_start must lie in'),
        (
            lambda: polynomial(1.0, 0.0, power=-1),
            'power must be a finite number above 0'),
        (
            lambda: polynomial(1.0, 0.0, power=0),
            'power must be a finite number above 0'),
        (lambda: linear(0.1, math.nan), 'end must be a finite number'),
        (lambda: cosine(True, 0.0), 'start must be a finite number'),
        (lambda: constant((0.9, math.nan)), 'value must be a finite number'),
        (lambda: exponential(0.1, math.inf), 'end must be a finite number'),
        (lambda: exponential(0.0, 0.1), 'start must be above 0'),
        (lambda: time_decay(0.1, 0.0), 'end must be above 0'),
        (
            lambda: step_decay(0.1, factor=-1.0),
            'factor must be a finite number of at least 0'),
        (lambda: step_decay(0.1, at=(30, 60)), 'not as a step or an epoch'),
        (lambda: stairs(linear(1.0, 0.0), 2.5), 'n must be a whole number'),
        (lambda: repeat(linear(1.0, 0.0), 0), 'n must be a whole number'),
        (
            lambda: repeat(linear(1.0, 0.0), 2, growth=0),
            'growth must be a finite number above 0'),
        (lambda: warm_up(linear(1.0, 0.0), 1.5), 'share must lie in'),
        (lambda: at_steps(linear(1.0, 0.0), 2.5), 'n_steps must be a whole number'),
        (
            lambda: learner().fit_flat_cos(1, div_final=0),
            'div_final must be a finite number above 0'),
        (
            lambda: learner(opt_func=AdamW).fit_one_cycle(1, lr=[]),
            'lr is an empty list'),
    ],
)
def test_numbers_are_checked_when_a_schedule_is_made(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_what_is_no_schedule_is_refused_when_it_is_given():
    for make in (
        lambda: join([0.5, 0.5], [linear(1.0, 0.0), 0.1]),
        lambda: warm_up(0.1),
        lambda: ScheduleCB(lr=0.1),
        lambda: stairs(0.1, 3),
    ):
        with pytest.raises(
            TypeError,
            match='is not a schedule: give a function of progress, such as constant',
        ):
            make()
    # one place needs no tuple
    assert at_steps(step_decay(8., .5, at=.5), 3) == [8., 4., 4.]


# ---- one writer for each hyperparameter

def torch_cycle(**kwargs):
    return TorchSchedulerCB(
        lambda opt, n_steps: lr_scheduler.OneCycleLR(
            opt, 0.1, total_steps=n_steps, **kwargs))


@pytest.mark.parametrize(
    'cbs',
    [
        [ScheduleCB(lr=linear(0.1, 0.0)), ScheduleCB(lr=constant(0.5))],
        [
            ScheduleCB(lr=linear(0.1, 0.0)),
            TorchSchedulerCB(partial(lr_scheduler.StepLR, step_size=2))],
        [
            TorchSchedulerCB(partial(lr_scheduler.StepLR, step_size=2)),
            TorchSchedulerCB(lr_scheduler.ConstantLR)],
        [ScheduleCB(momentum=constant(0.9)), ScheduleCB(beta1=constant(0.5))],
        [ScheduleCB(betas=constant((0.9, 0.99))), ScheduleCB(beta2=constant(0.5))],
        [torch_cycle(), ScheduleCB(momentum=constant(0.9))],
        [ScheduleCB(beta1=constant(0.9)), torch_cycle()],
    ],
)
def test_two_writers_of_one_hyperparameter_are_refused(cbs):
    learn = learner(cbs, AdamW)
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError) as refused: learn.fit(1)
    assert '\n' not in str(refused.value) and any(
        name in str(refused.value) for name in ('lr', 'betas', 'momentum'))
    assert all(torch.equal(p, q) for p, q in zip(before, learn.model.parameters()))


def test_one_cycle_and_flat_cos_beside_another_writer_are_refused():
    for other in ScheduleCB(lr=constant(.5)), TorchSchedulerCB(lr_scheduler.ConstantLR):
        for fit in 'fit_one_cycle', 'fit_flat_cos':
            with pytest.raises(ValueError, match='lr'):
                getattr(learner([other], AdamW), fit)(1)
    with pytest.raises(ValueError, match='beta1'):
        learner([ScheduleCB(beta1=constant(0.5))], AdamW).fit_one_cycle(1)


def test_two_schedules_for_different_hyperparameters_stay_fine():
    one, two = (
        ScheduleCB(lr=linear(0.1, 0.0)),
        ScheduleCB(momentum=linear(0.9, 0.5), weight_decay=constant(0.1)))
    learner([one, two, torch_cycle_of_decay()], AdamW).fit(1)
    assert one.values['lr'] == at_steps(linear(0.1, 0.0), 4) and two.values[
        'momentum'] == at_steps(linear(0.9, 0.5), 4)
    learner([two, torch_cycle(cycle_momentum=False)], AdamW).fit(1)
    learner([ScheduleCB(weight_decay=constant(.1))], AdamW).fit_one_cycle(1)
    # what it wrote in an earlier fit is no second writer
    for _ in range(2): learner([one], AdamW).fit(1)


def torch_cycle_of_decay(): return ScheduleCB(eps=constant(1e-6))


@pytest.mark.parametrize(
    'change',
    [
        dict(lr=step_decay(0.1, 0.1, (0.45, 0.95))),
        dict(lr=[step_decay(0.1, 0.1, (0.3, 0.8))] * 2), dict(momentum=constant(0.9))],
)
def test_settings_tell_schedules_apart_that_look_alike(change):
    one, again, other = (
        ScheduleCB(lr=step_decay(0.1, 0.1, (0.3, 0.8))),
        ScheduleCB(lr=step_decay(0.1, 0.1, (0.3, 0.8))), ScheduleCB(**change))
    assert one.settings() == again.settings() != other.settings()


def test_settings_of_torchs_schedulers():
    def settings(factory, per='batch'):
        cb = TorchSchedulerCB(factory, per)
        learner([cb]).fit(2)
        return cb.settings()
    kinds = [
        partial(s.StepLR, step_size=2), partial(s.StepLR, step_size=3),
        partial(s.ExponentialLR, gamma=0.9)]
    all_settings = [settings(kind) for kind in kinds] + [settings(kinds[0], 'epoch')]
    assert settings(kinds[0]) == all_settings[0]
    assert all(a != b for i, a in enumerate(all_settings) for b in all_settings[:i])


def test_two_hypers_of_one_tuple_fit_together():
    sched = ScheduleCB(beta1=linear(.9, .8), beta2=linear(.99, .9))
    learn = learner([sched], AdamW)
    learn.fit(1)
    assert learn.opt.param_groups[0]['betas'] == (.8, .9)


def test_a_tensor_keeps_its_identity_and_dtype():
    lr = torch.tensor(.1, dtype=torch.float64)
    learn = learner(
        [ScheduleCB(lr=linear(0.1, 0.025))],
        lambda params, lr: torch.optim.AdamW(params, lr=tensor, foreach=False),
        n_batches=3)
    tensor = lr
    learn.fit(1)
    assert learn.opt.param_groups[0]['lr'] is lr and lr.item() == .025


@pytest.mark.parametrize(
    'name',
    [
        name for name in dir(torch.optim)
        if isinstance(getattr(torch.optim, name), type) and name not in ('Optimizer',)],
)
def test_momentum_is_what_torchs_one_cycle_cycles(name):
    kind = getattr(torch.optim, name)
    shape = (2, 2) if name == 'Muon' else (2,)
    opt = kind([nn.Parameter(torch.zeros(shape))], lr=.1)
    group = opt.param_groups[0]
    assert 'lr' in hyper_names(group)
    try:
        lr_scheduler.OneCycleLR(opt, 0.1, total_steps=5)
    except ValueError:
        with pytest.raises(TypeError, match='no momentum'):
            find_hyper(group, 'momentum')
        return
    key, at = find_hyper(group, 'momentum')
    assert (group[key] if at is None else group[key][at]) == .95
    set_hyper(group, 'momentum', .5)
    assert (group[key] if at is None else group[key][at]) == .5


def test_our_optimizers_have_it_too():
    p = nn.Parameter(torch.zeros(2))
    assert [
        find_hyper(kind([p]).param_groups[0], 'momentum')
        for kind in (Momentum, EMAMomentum, AdamW, Lion)
    ] == [('momentum', None), ('beta', None), ('betas', 0), ('betas', 0)]


def test_names_that_torchs_schedulers_leave_in_a_group_are_none_of_ours():
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=.1)
    before = hyper_names(opt.param_groups[0])
    lr_scheduler.OneCycleLR(opt, .1, total_steps=5)
    assert hyper_names(opt.param_groups[0]) == before


s = lr_scheduler
schedulers = [
    partial(s.LambdaLR, lr_lambda=lambda i: 0.9**i),
    partial(s.MultiplicativeLR, lr_lambda=lambda i: 0.9),
    partial(s.StepLR, step_size=3),
    partial(s.MultiStepLR, milestones=[2, 5]),
    s.ConstantLR,
    s.LinearLR,
    partial(s.ExponentialLR, gamma=0.8),
    partial(s.CosineAnnealingLR, T_max=7),
    partial(s.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3),
    s.PolynomialLR,
    partial(s.CosineAnnealingWarmRestarts, T_0=3),
    lambda opt: s.OneCycleLR(opt, max_lr=0.1, total_steps=100, pct_start=0.1),
    lambda opt: s.SequentialLR(
        opt, [s.LinearLR(opt, 0.1, total_iters=4), s.ExponentialLR(opt, 0.9)],
        milestones=[4]),
    lambda opt: s.ChainedScheduler(
        [s.ConstantLR(opt, 0.1, total_iters=4), s.ExponentialLR(opt, 0.9)]),
]


@given(
    factory=st.sampled_from(schedulers),
    opt_func=st.sampled_from([partial(torch.optim.SGD, momentum=0.9), AdamW, Momentum]),
    n_epochs=st.integers(1, 4), per=st.sampled_from(['batch', 'epoch']),
    skipped=st.sets(st.integers(0, 15)))
@settings(max_examples=40, deadline=None)
def test_wrapped_scheduler_equals_a_plain_loop(
    factory, opt_func, n_epochs, per, skipped):
    seen = used()
    learn = learner([TorchSchedulerCB(factory, per), seen, Skip(skipped)], opt_func)
    learn.fit(n_epochs)
    other = learner()
    opt = opt_func(other.model.parameters(), lr=.01)
    scheduler, rates = factory(opt), []
    for epoch in range(n_epochs):
        stepped = False
        for i, (xb, yb) in enumerate(other.dls.train):
            rates.append(opt.param_groups[0]['lr'])
            F.mse_loss(other.model(xb), yb).backward()
            if 4*epoch + i in skipped: continue
            opt.step(), opt.zero_grad()
            stepped = True
            if per == 'batch': scheduler.step()
        if per == 'epoch' and stepped: scheduler.step()
    assert seen.values['lr'] == rates
    for p, q in zip(learn.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_no_scheduler_is_forgotten():
    names = {(f.func if isinstance(f, partial) else f).__name__ for f in schedulers} | {
        'OneCycleLR', 'SequentialLR', 'ChainedScheduler', 'ReduceLROnPlateau',
        'LRScheduler'}
    there = {
        name for name, cls in inspect.getmembers(s, inspect.isclass)
        if issubclass(cls, s.LRScheduler) and not name.startswith('_')}
    assert there <= names, 'torch has a scheduler that no test runs'


def test_plateau_sees_its_metric():
    seen = used()
    learn = learner(
        [
            TorchSchedulerCB(
                partial(
                    s.ReduceLROnPlateau, factor=0.1, patience=0, threshold=1e9,
                    threshold_mode='abs'),
                'epoch',
                'valid_loss',
            ),
            seen,
        ]
    )
    learn.fit(3)       # nothing is ever an improvement of 1e9 but the first value
    assert [seen.values['lr'][i] for i in (0, 4, 8)] == pytest.approx([.01, .01, .001])


def test_a_schedule_of_exactly_the_right_length_never_rebounds():
    for per, total in ('batch', 12), ('epoch', 3):
        learn = learner(
            [
                TorchSchedulerCB(
                    lambda opt, n_steps: s.OneCycleLR(
                        opt, 0.1, total_steps=n_steps, pct_start=0.5),
                    per,
                )
            ]
        )
        learn.fit(3)
        assert (
            learn.opt.param_groups[0]['lr'] == pytest.approx(0.1 / 25 / 1e4)
            and learn.opt.param_groups[0]['lr'] < 1e-6)


@pytest.mark.parametrize(
    'make',
    [
        lambda: ScheduleCB(lr=linear(0.1, 0.0), momentum=linear(0.9, 0.5)),
        *[partial(TorchSchedulerCB, f) for f in schedulers]],
)
def test_state_of_the_callbacks_resumes_in_the_middle(make):
    class ChangeOverCB(Callback):
        """In the middle of the fit everything goes through state dicts, into fresh
        groups and a fresh scheduler"""
        order = 1000
        def before_epoch(self, learn):
            if learn.epoch != 1: return
            saved, values = cb.state_dict(), learn.opt.state_dict()
            n_steps, n_taken = learn.n_steps, learn.n_taken
            cb.before_fit(learn)     # forgets
            learn.opt.load_state_dict(values)
            cb.load_state_dict(saved)
            assert (learn.n_steps, learn.n_taken) == (n_steps, n_taken)
    rates = []
    for cbs in [], [ChangeOverCB()]:
        cb, seen = make(), used()
        learner([cb, seen, *cbs], partial(torch.optim.SGD, momentum=.9)).fit(3)
        rates.append(seen.values['lr'])
    assert rates[0] == rates[1] and len(set(rates[0])) > 1


def test_lr_find_leaves_schedules_out():
    plain = lr_find(learner(), n_steps=10).losses
    for cb in (
        ScheduleCB(lr=linear(0.1, 0.0)),
        TorchSchedulerCB(partial(s.OneCycleLR, max_lr=0.1, total_steps=4)),
    ):
        learn = learner([cb])
        assert lr_find(learn, n_steps=10).losses == plain
        learn.fit(1)


@pytest.mark.parametrize('pct_start', [0., .25, .6])
def test_the_peak_of_the_rate_is_the_trough_of_the_momentum(pct_start):
    seen = RecorderCB(
        lr=lambda learn: learn.opt.param_groups[0]['lr'],
        beta1=lambda learn: learn.opt.param_groups[0]['betas'][0])
    learner([seen], AdamW, n_batches=21).fit_one_cycle(1, .2, pct_start=pct_start)
    assert seen.values['lr'] == pytest.approx(at_steps(one_cycle(.2, pct_start), 21))
    assert seen.values['beta1'] == pytest.approx(
        at_steps(momentum_cycle(pct_start=pct_start), 21))


def test_fit_one_cycle_passes_on_what_fit_takes():
    seen, learn = used(), learner(opt_func=AdamW)
    opt = AdamW(learn.model.parameters(), lr=1.)
    learn.fit_one_cycle(2, .2, cbs=[seen], opt=opt, valid=False)
    assert (
        learn.opt is opt and seen.values['lr'] == at_steps(one_cycle(0.2), 8)
        and 'valid_loss' not in learn.history[-1])
    learn.fit_flat_cos(2, .2, pct_start=.5, cbs=[seen])
    assert seen.values['lr'][:4] == [.2]*4 and seen.values['lr'][-1] == .2/1e5


def test_fit_one_cycle_leaves_the_momentum_alone_on_request():
    seen = RecorderCB(
        lr=lambda learn: learn.opt.param_groups[0]['lr'],
        beta1=lambda learn: learn.opt.param_groups[0]['betas'][0])
    learn = learner([seen], AdamW)
    learn.fit_one_cycle(3, .1, moms=None, pct_start=.5, div=10, div_final=100)
    assert seen.values['lr'] == pytest.approx(at_steps(one_cycle(.1, .5, 10, 100), 12))
    assert set(seen.values['beta1']) == {.9}


@pytest.mark.parametrize('fit', ['fit_one_cycle', 'fit_flat_cos'])
def test_one_rate_per_group_in_one_line(fit):
    def two_groups(params, lr):
        return torch.optim.AdamW([{'params': [p]} for p in params], lr=lr)
    learn = learner(opt_func=two_groups)
    getattr(learn, fit)(1, lr=[1e-3, 1e-2])
    assert [g['lr'] for g in learn.opt.param_groups] == [1e-3/1e5, 1e-2/1e5]
    with pytest.raises(ValueError, match='3 schedules for 2'):
        getattr(learn, fit)(1, lr=[.1]*3)
    with pytest.raises(ValueError, match='n_epochs'): getattr(learn, fit)(0)


def test_a_loader_without_length_has_no_progress():
    endless = learner([ScheduleCB(lr=constant(.1))])
    batches = endless.dls.train
    class Unsized:
        def __iter__(self): return iter(batches)
    endless.dls.train = Unsized()
    with pytest.raises(ValueError, match='no length'): endless.fit(1)


def test_a_callback_that_takes_fewer_steps_says_so_and_the_end_is_exact():
    class EveryOtherCB(Callback):
        order = -5
        def before_fit(self, learn): learn.n_steps = learn.n_steps//2
        def after_backward(self, learn):
            if learn.iter % 2 == 0: raise CancelStep()
    sched = ScheduleCB(lr=linear(.1, 0.))
    learner([sched, EveryOtherCB()]).fit(3)
    assert sched.values['lr'] == at_steps(linear(.1, 0.), 6)


def test_progress_can_be_something_else():
    class HalfCB(ScheduleCB):
        def progress(self, learn): return super().progress(learn)/2
    sched = HalfCB(lr=linear(.1, 0.))
    learner([sched]).fit(1)
    assert sched.values['lr'] == [linear(.1, 0.)(i/6) for i in range(4)]


one_cycle_of_7 = partial(lr_scheduler.OneCycleLR, max_lr=.1, total_steps=7)
plateau = lr_scheduler.ReduceLROnPlateau


@pytest.mark.parametrize(
    'make, error, says',
    [
        (
            lambda: TorchSchedulerCB(one_cycle_of_7), ValueError,
            'total_steps=7, but this fit has 12'),
        (lambda: TorchSchedulerCB(plateau, 'epoch'), ValueError, 'watches a metric'),
        (
            lambda: TorchSchedulerCB(s.ConstantLR, 'epoch', 'valid_loss'), ValueError,
            'takes no metric'),
        (
            lambda: TorchSchedulerCB(plateau, 'epoch', 'valid_los'), ValueError,
            "did you mean 'valid_loss'"),
        (
            lambda: TorchSchedulerCB(plateau, metric='valid_loss'), ValueError,
            "say per='epoch'"),
        (
            lambda: TorchSchedulerCB(s.ConstantLR, per='step'), ValueError,
            "'batch' or 'epoch'"),
        (
            lambda: TorchSchedulerCB(lambda opt: None), TypeError,
            'must return a scheduler'),
    ],
    ids=[
        'length', 'no metric', 'a metric', 'unknown', 'per batch', 'per step',
        'nothing'],
)
def test_torch_scheduler_cb_refuses(make, error, says):
    with pytest.raises(error, match=says): learner([make()]).fit(3)


# ---- annealing

def test_annealed_adam_by_hand_and_in_groups():
    def positions(**kwargs):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        opt, seen = AdamAnnealed([p], lr=.1, eps=0., **kwargs), []
        for _ in range(3):
            p.grad = torch.ones_like(p)
            opt.step()
            seen.append(-p.item())
        return seen
    assert positions(anneal_rate=.5) == pytest.approx([.1, .15, .175])
    assert positions(anneal_rate=.5, foreach=False) == positions(anneal_rate=.5)
    with pytest.raises(ValueError, match='anneal_rate must be a number of at least 0'):
        AdamAnnealed([nn.Parameter(torch.zeros(1))], anneal_rate=1.5)


@pytest.mark.parametrize('per, expected', [
    ('epoch', [1., 1., .5, .5, .25, .25]), ('step', [2.**-i for i in range(6)])])
def test_annealing_per_step_and_per_epoch(per, expected):
    seen = used()
    learner([AnnealCB(.5, per), seen], lr=1., n_batches=2).fit(3)
    assert seen.values['lr'] == expected


def test_bad_annealing_is_refused():
    with pytest.raises(ValueError, match='anneal_rate must be a number'): AnnealCB(-.5)
    says = "per must be 'step' or 'epoch', got 'batch'"
    with pytest.raises(ValueError, match=says): AnnealCB(per='batch')
    for bad in dict(share=1.), dict(factor=1.), dict(every='step'):
        with pytest.raises(ValueError): AutoAnnealCB(**bad)


def test_one_look_has_nothing_to_compare_with():
    cb = AutoAnnealCB()
    learner([cb], lr=1e-3).fit(1)
    assert cb.lrs == [1e-3] and len(cb.seen) == 1


def test_the_small_cases_by_hand():
    assert at_steps(linear(.5, 0.), 1) == [.5]          # a single step is the first one
    with pytest.raises(ValueError, match='at least 1'): at_steps(linear(.5, 0.), 0)
    assert linear(.9, .1)(1.) == .1                      # exactly, unlike …
    assert .9 + 1.*(.1-.9) != .1                         # … start + p*(end-start)
    assert [one_cycle(.3)(p) for p in (0., .25, 1.)] == [.3/25, .3, .3/1e5]
    with pytest.raises(ValueError, match='share must lie'): warm_up(constant(1.), 1.5)
    with pytest.raises(ValueError, match='down must lie in'): wsd(1., up=.5, down=.6)
    with pytest.raises(ValueError, match=r'in \[0, 1\]'): one_cycle(1., pct_start=25)
    with pytest.raises(ValueError, match='divide counts'):
        join([30, 70], [constant(1.)]*2)
    with pytest.raises(ValueError, match='not as a step'): step_decay(1., at=(30, 60))


def test_the_classics_by_hand():
    uneven = join([.7, .2, .1], [constant(3.), linear(3., .1), cosine(.1, .3)])
    assert (uneven(0.), uneven(1.)) == (3., .3)
    assert at_steps(triangular(0., 1., n=2), 9) == [0, .5, 1, .5, 0, .5, 1, .5, 0]
    grows = warm_restarts(1., 0., n=3, growth=2)         # cycles of 1/7, 2/7 and 4/7
    assert [grows(k/7) for k in (0, 1, 3, 7)] == [1., 1., 1., 0.]
    assert at_steps(warm_up(linear(1., 0.), .5), 5) == [0., .5, 1., .5, 0.]
    falling = [0., 1., .5**.5, (1/3)**.5, .5]            # √(.25/p)
    assert at_steps(inverse_sqrt(1., .25), 5) == pytest.approx(falling)
    trapezoid = at_steps(wsd(1., up=.25, down=.5), 5)
    assert trapezoid == pytest.approx([0., 1., 1., .5, 0.])


def test_one_cycle_of_five_steps_by_hand():
    "The peak at the second step, straight lines"
    small = one_cycle(1., pct_start=.25, div=4., div_final=100., anneal=linear)
    assert at_steps(small, 5) == pytest.approx([.25, 1., .67, .34, .01])
    moms = at_steps(momentum_cycle((.9, .6, .9), .25, linear), 5)
    assert moms == pytest.approx([.9, .6, .7, .8, .9])


def test_a_schedule_for_each_group_notes_all_its_values():
    def groups(params, lr):
        return torch.optim.AdamW([{'params': [p]} for p in params], lr=lr)
    cb = ScheduleCB(lr=[linear(1e-3, 0.), linear(1e-2, 0.)])
    learner([cb], groups).fit(1)
    assert (cb.values['lr'][0], cb.values['lr'][-1]) == ((1e-3, 1e-2), (0., 0.))


def test_a_schedule_shows_five_points_and_writes_whole_tuples():
    shown = 'ScheduleCB(lr: 1 → 0.75 → 0.5 → 0.25 → 0)'
    assert repr(ScheduleCB(lr=linear(1., 0.))) == shown
    def groups(params, lr):
        return torch.optim.AdamW([{'params': [p]} for p in params], lr=lr)
    cb = ScheduleCB(weight_decay=constant(.1), betas=lambda p: (.9 - .1*p, .99))
    learn = learner([cb], groups)
    learn.fit(1)
    for g in learn.opt.param_groups:
        assert (g['betas'], g['weight_decay']) == ((.8, .99), .1)


@pytest.mark.parametrize('moms, expected', [(None, 0), ((.95, .85, .95), .95)])
def test_one_cycle_gives_torchs_plain_sgd_momentum_unless_told(moms, expected):
    learn = learner()
    learn.fit_one_cycle(1, moms=moms)
    assert learn.opt.param_groups[0]['momentum'] == expected


def test_cycles_of_ours_and_torchs_with_the_same_share_come_closer_with_more_steps():
    def gap(n_steps):
        opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
        scheduler = lr_scheduler.OneCycleLR(opt, 1., total_steps=n_steps)
        theirs = []
        for i in range(n_steps):
            theirs.append(opt.param_groups[0]['lr'])
            opt.step()
            if i < n_steps-1: scheduler.step()
        ours = at_steps(one_cycle(1., .3), n_steps)
        return max(abs(a - b) for a, b in zip(theirs, ours))
    assert gap(10) > .1 and gap(1000) < .003


def test_a_power_of_1_is_a_line_and_equal_ends_stay():
    ours = at_steps(polynomial(3., 1., power=1), 5)
    assert ours == at_steps(linear(3., 1.), 5) == [3., 2.5, 2., 1.5, 1.]
    assert [time_decay(.1, .1)(p) for p in (0., 1.)] == [.1, .1]


def test_a_fraction_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match='fractions must be at least 0'):
        join([math.nan, 1.], [constant(1.)]*2)


def test_a_first_phase_of_one_step_divides_by_zero_in_torch_and_not_here():
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1., momentum=.9)
    with pytest.raises(ZeroDivisionError):
        lr_scheduler.OneCycleLR(opt, 1., total_steps=10, pct_start=.1)
    for pct_start in 0., .1, 1.:
        rates = at_steps(one_cycle(1., pct_start), 10)
        assert all(math.isfinite(rate) and 0 < rate <= 1 for rate in rates)


def test_where_a_hyperparameter_is_kept():
    p = [nn.Parameter(torch.zeros(2))]
    adam, sum_, plain = (kind(p).param_groups[0] for kind in (AdamW, Momentum, SGD))
    assert [find_hyper(adam, name) for name in (
        'lr', 'betas', 'beta1', 'beta2', 'momentum')] == [
        ('lr', None), ('betas', None), ('betas', 0), ('betas', 1), ('betas', 0)]
    assert find_hyper(sum_, 'momentum') == ('momentum', None)
    for group, name, says in (
        (adam, 'weight_decy', "did you mean 'weight_decay'"),
        (adam, 'maximize', 'no hyperparameter'),        # a switch, nothing to schedule
        (sum_, 'beta1', 'There are: lr, momentum'),
        (plain, 'momentum', 'There are: lr, weight_decay'),
    ):
        with pytest.raises(TypeError, match=says): find_hyper(group, name)


@pytest.mark.parametrize('kind, at_peak, at_end', [
    (Momentum, 1/.15, 20.), (EMAMomentum, 1., 1.)])
def test_a_cycle_of_momentum_is_one_of_the_rate_for_a_sum_only(kind, at_peak, at_end):
    "How far a step goes on a slope of 1, in units of the rate"
    p, n, moved = nn.Parameter(torch.zeros(1, dtype=torch.float64)), 600, []
    opt = kind([p], lr=1.)
    rates, moms = at_steps(one_cycle(1.), n), at_steps(momentum_cycle(), n)
    for rate, momentum in zip(rates, moms):
        for name, value in dict(lr=rate, momentum=momentum).items():
            set_hyper(opt.param_groups[0], name, value)
        before, p.grad = p.item(), torch.ones_like(p)
        opt.step()
        moved.append((before - p.item())/rate)
    assert moved[n//4] == pytest.approx(at_peak, rel=.03)
    assert moved[-1] == pytest.approx(at_end, rel=.03)


def test_recorded_schedules_that_come_down_end_above_the_constant_rate():
    def mean(row): return result(f'schedulers-{row}').mean
    for row in ('linear', 'cosine', 'warm-up-cosine', 'one-cycle', 'one-cycle-momentum',
                'flat-cos'):
        assert mean(row) > mean('constant') + .005, row
    assert mean('one-cycle-momentum') > .905 and mean('cosine-three-per-batch') > .887


def test_recorded_rates_that_fall_too_early_end_below_the_constant_one():
    def mean(row): return result(f'schedulers-{row}').mean
    assert mean('anneal-step') < mean('anneal-none')
    small = 'mlp-adam-{}-x3'.format
    assert mean(small('one-cycle')) > mean(small('constant')) + .01
    assert mean(small('annealer-batch')) < mean(small('constant')) - .01
