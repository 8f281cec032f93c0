"""Optimizers made of parts take torch's steps, whatever the hyperparameters; a chain
equals the formulas in one block; parts that do not fit are refused with the fix."""
import copy
import inspect
import math
import pickle
import shutil
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_checks import (
    ATOL,
    RTOL,
    Exact,
    OneAdam,
    OneAdamW,
    OneMomentum,
    OneRMSProp,
    OneSGD,
    adam,
    parameters,
    same_parameters,
    train,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.testing import assert_close

from nntrain.compose import REQUIRED, Composed, compose, multi, read_part, stat
from nntrain.parts import (
    add_decay,
    average_grad,
    average_sqr_grad,
    rms_direction,
    scalar,
    sgd_step,
    square_average,
    step_count,
    sum_grad,
)
from nntrain.zoo import (
    LAMB,
    LARS,
    Lion,
    RAdam,
    length,
    lookahead,
    trust_ratio,
    trust_scale,
    with_lookahead,
)


def dicts(**kw):
    rates = st.one_of(st.just(0.), st.floats(1e-4, .1))
    decays = st.one_of(st.just(0.), st.floats(1e-4, .5))
    return st.fixed_dictionaries(
        dict(lr=rates, weight_decay=decays, maximize=st.booleans()) | kw)


shares, floors = st.floats(0, .99), st.floats(1e-6, .1)
betas = dict(betas=st.tuples(shares, st.floats(.3, .999)), eps=floors)
PAIRS = {
    'SGD': (OneSGD, torch.optim.SGD, dicts()),
    'Momentum': (OneMomentum, torch.optim.SGD, dicts(momentum=st.floats(0.01, 0.99))),
    'RMSProp': (OneRMSProp, torch.optim.RMSprop, dicts(alpha=shares, eps=floors)),
    'Adam': (OneAdam, torch.optim.Adam, dicts(**betas)),
    'AdamW': (OneAdamW, torch.optim.AdamW, dicts(**betas)),
    'RAdam': (RAdam, torch.optim.RAdam, dicts(**betas))}
OWN = {
    'LAMB': LAMB, 'LARS': LARS, 'Lion': Lion, 'Lookahead': with_lookahead(OneAdam),
    'Exact': Exact}
quick = settings(max_examples=10, deadline=None)
every = pytest.mark.parametrize('name', PAIRS)
own = pytest.mark.parametrize('name', OWN)


def pair(name, data, foreach, seed):
    ours, theirs, hypers = PAIRS[name]
    kw, other = (
        data.draw(hypers),
        {k: v for k, v in data.draw(hypers).items() if k != 'maximize'})
    a, b = parameters(seed), parameters(seed)
    def groups(ps): return [{'params': ps[:2], **other}, {'params': ps[2:]}]
    return a, ours(groups(a), foreach=foreach, **kw), b, theirs(groups(b), **kw)


@every
@pytest.mark.parametrize('foreach', [True, False])
@given(data=st.data(), seed=st.integers(0, 10_000))
@quick
def test_fifty_steps_equal_torch(name, foreach, data, seed):
    a, ours, b, theirs = pair(name, data, foreach, seed)
    train(seed, 50, (a, ours), (b, theirs))


@every
@given(data=st.data(), seed=st.integers(0, 10_000))
@quick
def test_scheduled_hyperparameters(name, data, seed):
    a, ours, b, theirs = pair(name, data, True, seed)
    def move(group, t):
        group['lr'] = .05*(1 + math.cos(math.pi*t/50))
        if group.get('momentum'): group['momentum'] = .85 + .1*t/50
        if 'betas' in group: group['betas'] = (.85 + .1*t/50, group['betas'][1])
    train(seed, 50, (a, ours), (b, theirs), before=move)


@every
@given(data=st.data(), seed=st.integers(0, 10_000), steps=st.integers(0, 12))
@quick
def test_state_dict_into_torch_and_back(name, data, seed, steps):
    a, ours, b, theirs = pair(name, data, True, seed)
    train(seed, steps, (a, ours), (b, theirs))
    saved = copy.deepcopy(ours.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    theirs.load_state_dict(saved)
    train(seed+1, 20, (a, ours), (b, theirs))


@own
def test_lists_and_one_by_one_agree(name):
    a, b = parameters(), parameters()
    with torch.no_grad(): a[1].zero_(), b[1].zero_()
    train(0, 30, (a, OWN[name](a, lr=.01)), (b, OWN[name](b, lr=.01, foreach=False)))


@pytest.mark.parametrize(
    'cls',
    [
        *(ours for ours, *_ in PAIRS.values()), *OWN.values(),
        compose(add_decay, *adam, sgd_step, name='Unnamed')],
)
def test_copies_pickles_and_saved_states_go_on_alike(cls):
    a = parameters()
    opt = cls(a, lr=.01)
    train(0, 7, (a, opt))
    runs = [(a, opt), copy.deepcopy((a, opt)), pickle.loads(pickle.dumps((a, opt)))]
    ps = copy.deepcopy(a)
    again = cls(ps, lr=5.)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    runs.append((ps, again))
    train(1, 12, *runs)
    for ps, other in runs[1:]:
        assert type(other).__name__ == cls.__name__ and not vars(ps[0])


@pytest.mark.parametrize('cls', [OneMomentum, OneAdam, LAMB, Lion, OWN['Lookahead']])
def test_torchs_schedulers_and_scaler(cls):
    p = nn.Parameter(torch.ones(3))
    opt = cls([p], lr=.1)
    schedules = [
        lr_scheduler.ExponentialLR(opt, 0.5),
        lr_scheduler.OneCycleLR(opt, 0.1, total_steps=5)]
    scaler = torch.amp.GradScaler('cpu', init_scale=8.)
    for _ in range(3):
        opt.zero_grad()
        scaler.scale((p**2).sum()).backward()
        scaler.step(opt)
        scaler.update()
        for s in schedules: s.step()
    assert p.isfinite().all() and (p < 1).all()
    assert opt.param_groups[0]['lr'] != .1


@pytest.mark.parametrize(
    'cls',
    [
        *(ours for ours, *_ in PAIRS.values()), LAMB, LARS, OWN['Lookahead'],
        OWN['Exact']],
)
@pytest.mark.parametrize('foreach', [True, False])
def test_a_nan_is_not_hidden(cls, foreach):
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    p.grad = torch.tensor([math.nan, 1.], dtype=torch.float64)
    cls([p], lr=.1, foreach=foreach).step()
    assert p.isnan()[0]


@pytest.mark.parametrize('cls', [*(ours for ours, *_ in PAIRS.values()), *OWN.values()])
def test_tensor_learning_rate_and_mixed_dtypes(cls):
    for shape in (), (1,):
        a, b = parameters(1), parameters(1)
        train(
            1, 5, (a, cls(a, lr=torch.full(shape, 0.01, dtype=torch.float64))),
            (b, cls(b, lr=0.01)))
    ps = [
        nn.Parameter(torch.ones(3, dtype=dtype))
        for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    for p in ps: p.grad = torch.full_like(p, .5)
    cls(ps, lr=100. if cls is LARS else .25).step()
    assert all(p[0] != 1 for p in ps)
    assert_close(ps[1].double(), ps[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    shutil.which('g++') is None and shutil.which('c++') is None,
    reason='torch.compile needs a C++ compiler here')
@pytest.mark.parametrize('cls', [OneMomentum, OneRMSProp, OneAdamW])
def test_torch_compile_traces_the_step_whole(cls):
    # else the runs count as one function compiled again and again
    torch.compiler.reset()
    a, b = parameters(2), parameters(2)
    compiled, plain = (
        cls(ps, lr=torch.tensor(0.1, dtype=torch.float64), weight_decay=0.01)
        for ps in (a, b))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        step = torch.compile(
            lambda: compiled.step(), backend='aot_eager', fullgraph=True)
        gen = torch.Generator().manual_seed(2)
        for _ in range(3):
            for p, q in zip(a, b):
                p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64)
                q.grad = p.grad.clone()
            step()
            plain.step()
    same_parameters(a, b)


def test_one_cycle_moves_the_rate_and_the_momentum_of_each_group():
    ps = parameters()
    opt = OneMomentum(
        [{'params': ps[:1]}, {'params': ps[1:], 'lr': .01, 'momentum': .5}], lr=.1)
    schedule = lr_scheduler.OneCycleLR(opt, max_lr=[.1, .01], total_steps=11)
    seen = []
    for _ in range(10):
        opt.step(); schedule.step()
        seen.append([(g['lr'], g['momentum']) for g in opt.param_groups])
    tops = [max(groups[i][0] for groups in seen) for i in (0, 1)]
    assert tops[0] > .09 and tops[1] == pytest.approx(tops[0]/10)
    assert len({groups[0][1] for groups in seen}) > 5


def test_sums_have_room_for_small_additions():
    "In bfloat16 the weights of an average stop adding up at one half"
    narrow = torch.zeros((), dtype=torch.bfloat16)
    wide = scalar(0.)(torch.ones(1, dtype=torch.bfloat16))
    for _ in range(3000):
        for sums in narrow, wide: sums.mul_(.999).add_(.001)
    assert narrow <= .5
    assert_close(wide.item(), 1 - .999**3000, rtol=1e-4, atol=0)
    large = torch.full((4,), 6e4, dtype=torch.float16)
    assert_close(length(large), torch.tensor(1.2e5), rtol=1e-3, atol=0)


@given(st.floats(0, 10), st.floats(0, 10))
@quick
def test_trust_ratio_is_finite_and_positive(a, b):
    got = trust_ratio(
        torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    ).item()
    assert got == (a/b if a > 0 and b > 0 else 1.)


@pytest.mark.parametrize('grad, moves', [(1., True), (0., False)])
def test_lamb_and_lars_are_safe_at_zero(grad, moves):
    for cls in LAMB, LARS:
        p = nn.Parameter(torch.zeros(3))
        opt = cls([p], lr=.1)
        for _ in range(5): p.grad = torch.full((3,), grad); opt.step()
        assert p.isfinite().all() and bool(p.any()) == moves


@given(seed=st.integers(0, 1000), cap=st.floats(.5, 20))
@quick
def test_lambs_step_is_a_share_of_the_weights(seed, cap):
    p = nn.Parameter(
        torch.randn(
            5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    p.grad, before = torch.randn(5, dtype=torch.float64), p.detach().clone()
    LAMB([p], lr=.01, max_trust=cap, eps=0.).step()
    assert_close(
        (p.detach() - before).norm(),
        0.01
        * torch.minimum(
            before.norm(), cap * torch.tensor(5.0, dtype=torch.float64).sqrt()),
        rtol=1e-9,
        atol=0,
    )


def test_lamb_trust_is_kept_and_bounded():
    ps = parameters()
    opt = LAMB(ps, lr=.1, max_trust=2.)
    train(0, 5, (ps, opt), missing=0)
    assert all(0 < opt.state[p]['trust'] <= 2 for p in ps)


# ---- refusals

def refused(error, text, *parts, **kw):
    with pytest.raises(error, match=text): compose(*parts, name='Mine', **kw)


def test_parts_that_do_not_fit_are_refused_when_the_class_is_made():
    refused(
        ValueError,
        "Mine: rms_direction asks for 'square_avg', which no earlier part makes: add "
        "a stat", rms_direction, sgd_step)
    refused(ValueError, 'put square_average, which makes it, before rms_direction',
            rms_direction, square_average, sgd_step)
    refused(
        ValueError, "average_grad and average_grad both make 'exp_avg'", average_grad,
        *adam, sgd_step)
    refused(ValueError, 'no part asks for p', sum_grad, step_count)
    refused(ValueError, 'no part asks for p')
    refused(
        TypeError, "did you mean 'weight_decay'", add_decay, sgd_step, weigth_decay=0.1)
    refused(TypeError, 'a part must be a function, got 3', sgd_step, 3)
    def greedy(p, grad, **kwargs): ...
    refused(TypeError, r'greedy takes \*\*kwargs', greedy)
    def mine(p, grad, *, lr=.5): ...
    def other(p, grad, *, lr=.1): ...
    refused(ValueError, 'lr is 0.5 in mine, but 0.1 in other: say which', mine, other)
    assert compose(mine, other, lr=.3).hypers == dict(lr=.3)
    for order in [mine, sgd_step], [sgd_step, mine]:
        assert compose(*order).hypers == dict(lr=0.5)
    def taken(p, *, foreach=1): ...
    refused(ValueError, r"the names \['foreach'\] are taken", taken)
    for name in 'p', 'grad', 'update':
        @stat(**{name: scalar(0.)})
        def clash(p, grad): ...
        refused(ValueError, f"every optimizer and clash both make '{name}'", clash)
    with pytest.raises(ValueError, match='Bad: rms_direction asks'):
        class Bad(Composed): parts = rms_direction, sgd_step


def test_what_the_constructor_refuses():
    ps = parameters()
    make = compose(sum_grad, sgd_step, name='Mine')
    with pytest.raises(TypeError, match='Mine needs a value for lr'): make(ps)
    with pytest.raises(TypeError, match="did you mean 'momentum'"):
        make(ps, lr=0.1, momentun=0.9)
    with pytest.raises(TypeError, match="did you mean 'momentum'"):
        make([{'params': ps, 'momentun': 0.9}], lr=0.1)
    with pytest.raises(ValueError, match='momentum must be'):
        make(ps, lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match='k must be a number of at least 1'):
        with_lookahead(OneAdam)(ps, k=0)
    with pytest.raises(ValueError, match='alpha must be'): OneRMSProp(ps, alpha=1.)
    with pytest.raises(TypeError, match='Composed has no parts'): Composed(ps)
    with pytest.raises(ValueError, match='no parameters'): make([], lr=.1)
    assert make([{'params': ps, 'lr': .1}]).param_groups[0]['lr'] == .1


@pytest.mark.parametrize('foreach', [True, False])
def test_returned_inputs_are_refused(foreach):
    def returns_p(p, grad, *, lr): return p.sub_(lr*grad)
    def returns_grad(p, grad, *, lr): return grad.mul_(lr)
    def returns_update(p, update): return update
    for part in returns_p, returns_grad, returns_update:
        ps = parameters()
        opt = compose(part, sgd_step)(ps, lr=.1, foreach=foreach)
        for p in ps: p.grad = torch.ones_like(p)
        with pytest.raises(TypeError, match='a step changes p in place'):
            opt.step()


def test_a_part_of_your_own_with_and_without_lists():
    @stat(seen=scalar(0.))
    def count(seen): seen += 1
    def step(p, update, seen, *, lr, power=.5): p -= lr*update/seen**power
    make = compose(add_decay, count, step, lr=.1)
    a, b = parameters(), parameters()
    train(
        0, 5, (a, make(a, weight_decay=0.1)),
        (b, make(b, weight_decay=0.1, foreach=False)))
    calls = []
    @multi(step)
    def steps(p, update, seen, *, lr, power):
        calls.append(len(p))
        for xs in zip(p, update, seen): step(*xs, lr=lr, power=power)
    train(0, 1, (a, make(a)), missing=0)
    assert calls == [len(a)]
    with pytest.raises(TypeError, match='must ask for'):
        @multi(step)
        def wrong(p, update, *, lr, power): ...
    assert read_part(step) == (['p', 'update', 'seen'], dict(lr=REQUIRED, power=.5))


@pytest.mark.parametrize('foreach', [True, False])
def test_adagrad_and_ademamix_of_a_users_parts(foreach):
    "Torch's AdaGrad, and AdEMAMix as a loop"
    @stat(sum=torch.zeros_like)
    def sqr_sum(update, sum): sum.addcmul_(update, update)
    def adagrad(update, sum, *, eps=1e-10): return update/(sum.sqrt() + eps)
    a, b = parameters(), parameters()
    train(0, 20, (a, compose(sqr_sum, adagrad, sgd_step)(a, lr=.1, foreach=foreach)),
          (b, torch.optim.Adagrad(b, lr=.1)))

    @stat(slow_avg=torch.zeros_like)
    def slow_average(update, slow_avg, *, slow_beta):
        slow_avg.lerp_(update, 1-slow_beta)
    def ademamix(exp_avg, exp_avg_sq, step, slow_avg, *, betas=(.9, .999), mix=5.):
        t = step.item()
        m_hat, v_hat = exp_avg/(1-betas[0]**t), exp_avg_sq/(1-betas[1]**t)
        return (m_hat + mix*slow_avg)/(v_hat.sqrt() + 1e-8)
    kind = compose(
        average_grad, average_sqr_grad, step_count, slow_average, ademamix, sgd_step)
    gen = torch.Generator().manual_seed(0)
    w, *grads = torch.randn(31, 3, generator=gen, dtype=torch.float64)
    p = nn.Parameter(w.clone())
    opt = kind([p], lr=.05, slow_beta=.95, foreach=foreach)
    m = v = s = torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        p.grad = g.clone()
        opt.step()
        m, v, s = .9*m + .1*g, .999*v + .001*g*g, .95*s + .05*g
        w = w - .05*(m/(1-.9**t) + 5*s)/((v/(1-.999**t)).sqrt() + 1e-8)
    assert_close(p.detach(), w, rtol=0, atol=1e-10)


def test_signature_and_inheritance():
    assert list(inspect.signature(LAMB).parameters) == [
        'params', 'betas', 'eps', 'weight_decay', 'max_trust', 'max_length', 'lr',
        'maximize', 'foreach']
    class Bolder(LAMB): hypers = dict(lr=.5)
    assert (
        Bolder.hypers['lr'] == 0.5 and Bolder.parts == LAMB.parts
        and LAMB.hypers['lr'] == 1e-3 and trust_scale in Bolder.parts)


@given(k=st.integers(1, 6), alpha=st.floats(.1, 1), n=st.integers(1, 20))
@quick
def test_lookahead_by_hand(k, alpha, n):
    p = nn.Parameter(torch.tensor([1.], dtype=torch.float64))
    fast = slow = 1.
    opt = compose(sgd_step, lookahead)([p], lr=.1, k=k, slow_lr=alpha)
    for t in range(1, n+1):
        p.grad = torch.tensor([t*.3 - 1], dtype=torch.float64)
        opt.step()
        fast -= .1*(t*.3 - 1)
        if t % k == 0: slow = fast = slow + alpha*(fast - slow)
    assert p.item() == pytest.approx(fast, abs=ATOL)


# ---- chains

def test_grad_stays_raw_while_update_flows():
    """Of one parameter and in lists; `update` starts as the gradient, also where the
    sign is turned"""
    seen = []
    def double(update): return 2*update
    def note(grad, update): seen.append((grad.item(), update.item()))
    for foreach in True, False:
        for maximize in True, False:
            p = nn.Parameter(torch.tensor(1.))
            p.grad = torch.tensor(3.)
            opt = compose(note, add_decay, double, note, sgd_step)
            opt([p], lr=.1, weight_decay=.5, foreach=foreach, maximize=maximize).step()
            g = -3. if maximize else 3.
            assert seen == [(g, g), (g, 2*(g + .5))]
            assert p.item() == pytest.approx(1 - .2*(g + .5))
            seen.clear()


def lamb_block(p, state, grad, lr, betas, eps, weight_decay, max_trust):
    "LAMB as one block, without a part: Alg. 2 with the cap on the ratio"
    state['t'] = t = state.get('t', 0) + 1
    m = state['m'] = betas[0]*state.get('m', 0.) + (1-betas[0])*grad
    v = state['v'] = betas[1]*state.get('v', 0.) + (1-betas[1])*grad**2
    u = (m/(1-betas[0]**t))/((v/(1-betas[1]**t)).sqrt() + eps) + weight_decay*p
    trust = trust_ratio(p.norm(), u.norm()).clamp(max=max_trust)
    return p - lr*trust*u


def lars_block(p, state, grad, lr, momentum, trust, weight_decay):
    local = trust*trust_ratio(p.norm(), grad.norm() + weight_decay*p.norm())
    state['m'] = momentum*state.get('m', 0.) + local*(grad + weight_decay*p)
    return p - lr*state['m']


def lion_block(p, state, grad, lr, betas, weight_decay):
    m = state.get('m', torch.zeros_like(p))
    state['m'] = betas[1]*m + (1-betas[1])*grad
    return p - lr*(torch.sign(betas[0]*m + (1-betas[0])*grad) + weight_decay*p)


lamb_hypers = dict(
    betas=st.tuples(shares, st.floats(0.3, 0.999)), eps=floors,
    max_trust=st.floats(0.5, 20))
lars_hypers = dict(momentum=shares, trust=st.floats(1e-3, .1))
lion_hypers = dict(betas=st.tuples(shares, shares))


@pytest.mark.parametrize(
    'cls, block, hypers',
    [(LAMB, lamb_block, lamb_hypers), (LARS, lars_block, lars_hypers),
     (Lion, lion_block, lion_hypers)])
@pytest.mark.parametrize('foreach', [True, False])
@given(data=st.data(), seed=st.integers(0, 10_000))
@quick
def test_a_chain_of_parts_equals_the_block(cls, block, hypers, foreach, data, seed):
    kw = data.draw(
        st.fixed_dictionaries(
            dict(lr=st.floats(1e-4, 0.1), weight_decay=st.floats(0.0, 0.5)) | hypers))
    ps = parameters(seed)
    with torch.no_grad(): ps[1].zero_()
    opt, states = cls(ps, foreach=foreach, **kw), [{} for _ in ps]
    gen = torch.Generator().manual_seed(seed)
    for _ in range(30):
        want = []
        for p, state in zip(ps, states):
            p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            want.append(block(p.detach().clone(), state, p.grad, **kw))
        opt.step()
        for p, q in zip(ps, want): assert_close(p.detach(), q, rtol=RTOL, atol=ATOL)


@given(lr=st.floats(1e-4, .1), decay=st.floats(0., .5), seed=st.integers(0, 10_000))
@quick
def test_where_the_decay_stands(lr, decay, seed):
    "Before the averages it is torch's Adam, behind the direction torch's AdamW"
    for parts, theirs in (
        ((add_decay, *adam, sgd_step), torch.optim.Adam),
        ((*adam, add_decay, sgd_step), torch.optim.AdamW),
    ):
        a, b = parameters(seed), parameters(seed)
        train(
            seed, 30, (a, compose(*parts)(a, lr=lr, weight_decay=decay)),
            (b, theirs(b, lr=lr, weight_decay=decay)))


@pytest.mark.parametrize('foreach', [True, False])
@pytest.mark.parametrize('grads', [(.5, 10.), (10., .5)])
def test_a_new_update_for_some_parameters_only(grads, foreach):
    def clip_large(update):
        if update.norm() > 1: return update/update.norm()
    ps = [nn.Parameter(torch.zeros(1)) for _ in grads]
    for p, g in zip(ps, grads): p.grad = torch.full_like(p, g)
    compose(clip_large, sgd_step)(ps, lr=1., foreach=foreach).step()
    assert [p.item() for p in ps] == [-min(g, 1.) for g in grads]


# ---- small facts about the parts and the zoo

def test_a_partial_is_no_part_since_it_has_no_name():
    refused(TypeError, 'a part must be a function, got functools.partial',
            partial(sgd_step, lr=.1))


def test_without_decay_there_is_no_new_update_and_the_old_one_is_only_read():
    p, update = torch.tensor([2.]), torch.tensor([.5])
    assert add_decay(p, update) is None
    assert_close(add_decay(p, update, weight_decay=.1), torch.tensor([.7]))
    assert (p.item(), update.item()) == (2., .5)


def test_a_class_that_no_module_names_can_be_pickled():
    for cls in (compose(add_decay, *adam, sgd_step, name='Scratch', lr=.1),
                with_lookahead(compose(sgd_step, name='SGD'))):
        again = pickle.loads(pickle.dumps(cls))
        assert (again.__name__, again.parts, again.hypers, type(again)) == (
            cls.__name__, cls.parts, cls.hypers, type(Composed))


def test_defaults_of_the_zoo():
    betas = (.9, .999)
    assert LAMB.hypers == dict(
        betas=betas, eps=1e-6, weight_decay=0., max_trust=10., max_length=1e9, lr=1e-3)
    assert LARS.hypers == dict(weight_decay=0., trust=1e-3, momentum=.9, lr=REQUIRED)
    assert Lion.hypers == dict(betas=(.9, .99), weight_decay=0., lr=1e-4)
    assert RAdam.hypers == dict(weight_decay=0., betas=betas, eps=1e-8, lr=1e-3)
    with pytest.raises(TypeError, match='LARS needs a value for lr'):
        LARS(parameters())


def test_lion_moves_by_the_rate_however_small_the_gradient_and_not_without_one():
    p = nn.Parameter(torch.tensor([1., 2., 3.]))
    p.grad = torch.tensor([1e-9, -5., 0.])
    Lion([p], lr=.1).step()
    assert_close(p.detach(), torch.tensor([.9, 2.1, 3.]))


def hooked(opt, k, alpha):
    "Lookahead around any of torch's optimizers, by a hook after each step"
    ps = [p for group in opt.param_groups for p in group['params']]
    slow, calls = [p.detach().clone() for p in ps], []
    @torch.no_grad()
    def sync(*_):
        calls.append(1)
        if len(calls) % k: return
        for s, p in zip(slow, ps): s.lerp_(p, alpha); p.copy_(s)
    opt.register_step_post_hook(sync)
    return opt


@pytest.mark.parametrize('foreach', [True, False])
@pytest.mark.parametrize('ours, theirs', [(OneSGD, torch.optim.SGD),
                                          (OneAdam, torch.optim.Adam)])
def test_lookahead_as_a_part_equals_a_hook_around_torchs_optimizer(
    ours, theirs, foreach):
    a, b = parameters(), parameters()
    opt = with_lookahead(ours)(a, lr=.1, k=3, slow_lr=.3, foreach=foreach)
    # without missing gradients: a part counts the steps of each parameter
    train(0, 10, (a, opt), (b, hooked(theirs(b, lr=.1), 3, .3)), missing=0)
