"""Schedule-Free against a plain loop, and beside all else that touches weights"""
import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from optimizer_checks import OneSGD, parameters, set_gradients
from torch import nn
from torch.testing import assert_close

import nntrain.steering  # noqa: F401  adds fit_one_cycle
from nntrain.accumulate import GradientAccumulationCB
from nntrain.aside import aside
from nntrain.average import WeightAveragingCB
from nntrain.callback import Callback
from nntrain.checkpoint import CheckpointCB
from nntrain.clip import GradientClipCB
from nntrain.compose import compose
from nntrain.data import DataLoaders
from nntrain.events import CancelFit, CancelPhase
from nntrain.learner import Learner
from nntrain.lr_finder import lr_find
from nntrain.matrix import orthogonalize, shape_scale
from nntrain.metrics import MetricsCB
from nntrain.parts import add_decay, sgd_step, step_count
from nntrain.precision import MixedPrecisionCB
from nntrain.saving import SaveBestCB
from nntrain.schedule import constant, linear, warm_up
from nntrain.schedule_free import (
    ScheduleFreeAdamW,
    ScheduleFreeCB,
    ScheduleFreeSGD,
    averaged,
    schedule_free_step,
    two_points,
    use_average,
    use_fast,
)
from nntrain.sgd import SGD
from nntrain.split import split
from nntrain.steering import ScheduleCB

KINDS = {'SGD': ScheduleFreeSGD, 'AdamW': ScheduleFreeAdamW}
kinds = pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS.keys())
foreachs = pytest.mark.parametrize('foreach', [True, False])


class Reference:
    "The loop of facebookresearch/schedule_free, which keeps y and z and no x"
    def __init__(self, ps, lr, beta, beta2=None, eps=1e-8, decay=0., warm=0):
        self.ps, self.lr, self.beta, self.beta2, self.eps = ps, lr, beta, beta2, eps
        self.decay, self.warm, self.k = decay, warm, 0
        self.lr_max, self.weight_sum = -1., 0.
        self.zs = [p.detach().clone() for p in ps]
        self.vs = [torch.zeros_like(p) for p in ps]

    @torch.no_grad()
    def step(self):
        lr = self.lr*((self.k+1)/self.warm if self.k < self.warm else 1.)
        self.lr_max = max(lr, self.lr_max)
        weight = (self.k+1)**0. * self.lr_max**2.
        self.weight_sum += weight
        c = weight/self.weight_sum if self.weight_sum else 0
        for y, z, v in zip(self.ps, self.zs, self.vs):
            grad = y.grad.clone()
            if self.beta2 is not None:
                v.mul_(self.beta2).addcmul_(grad, grad, value=1-self.beta2)
                grad.div_(v.div(1 - self.beta2**(self.k+1)).sqrt_().add_(self.eps))
            grad.add_(y, alpha=self.decay)
            y.lerp_(z, c)
            y.add_(grad, alpha=lr*(self.beta*(1-c)-1))
            z.sub_(grad, alpha=lr)
        self.k += 1

    def averages(self):
        return [y.detach().lerp(z, 1-1/self.beta) for y, z in zip(self.ps, self.zs)]


def pair(kind, ps, qs, lr=.05, beta=.9, decay=0., warm=0, foreach=True):
    "Our optimizer for `ps` and the reference for `qs`, with the same settings"
    own = dict(betas=(beta, .99)) if kind is ScheduleFreeAdamW else dict(momentum=beta)
    given = dict(lr=lr, weight_decay=decay, warmup_steps=warm)
    beta2 = .99 if kind is ScheduleFreeAdamW else None
    return (kind(ps, foreach=foreach, **own, **given),
            Reference(qs, lr, beta, beta2, decay=decay, warm=warm))

def agree(ps, qs, atol=1e-10):
    for p, q in zip(ps, qs, strict=True): assert_close(p, q, rtol=0, atol=atol)

def run(*lists_and_opts, n=50, seed=1, missing=0.):
    lists, opts = zip(*lists_and_opts)
    gen = torch.Generator().manual_seed(seed)
    for _ in range(n):
        set_gradients(gen, *lists, missing=missing)
        for opt in opts: opt.step()


@kinds
@foreachs
@pytest.mark.parametrize('beta, decay, warm', [
    (.9, 0., 0), (.9, .1, 0), (.5, .1, 7), (.98, 0., 100)])
def test_equals_the_reference(kind, foreach, beta, decay, warm):
    ps, qs = parameters(0), parameters(0)
    opt, ref = pair(kind, ps, qs, beta=beta, decay=decay, warm=warm, foreach=foreach)
    gen = torch.Generator().manual_seed(1)
    for _ in range(60):
        set_gradients(gen, ps, qs, missing=0.)
        opt.step()
        ref.step()
        agree(ps, qs)
        agree([opt.state[p]['z'] for p in ps], ref.zs)
    use_average(opt)
    agree(ps, ref.averages())
    use_fast(opt)
    agree(ps, qs)


@pytest.mark.parametrize('ours, theirs', [
    (partial(ScheduleFreeSGD, momentum=0., lr=.1), partial(SGD, lr=.1)),
    (partial(ScheduleFreeAdamW, betas=(0., .99), lr=.1, weight_decay=.1),
     partial(torch.optim.AdamW, betas=(0., .99), lr=.1, weight_decay=.1))])
def test_without_beta_the_average_is_that_of_an_old_acquaintance(ours, theirs):
    "With β = 0, z is all: plain SGD, or AdamW without its average of the gradients"
    a, b = (nn.Parameter(torch.tensor([1., -2.], dtype=torch.float64)) for _ in 'ab')
    opts, seen = (ours([a]), theirs([b])), []
    for t in range(20):
        for p, opt in zip((a, b), opts):
            p.grad = p.detach() + math.sin(t)
            opt.step()
        seen.append(b.detach().clone())
    assert_close(a, b, rtol=0, atol=1e-12)
    use_average(opts[0])
    assert_close(a.detach(), torch.stack(seen).mean(0), rtol=0, atol=1e-12)


@kinds
def test_a_rate_that_a_schedule_writes_is_weighted_as_in_the_reference(kind):
    ps, qs = parameters(0), parameters(0)
    opt, ref = pair(kind, ps, qs)
    gen = torch.Generator().manual_seed(1)
    for lr in (0., .02, .05, .03, .01, 0.):      # up from 0, and down again
        opt.param_groups[0]['lr'] = ref.lr = lr
        set_gradients(gen, ps, qs, missing=0.)
        opt.step()
        ref.step()
        agree(ps, qs)


@kinds
@pytest.mark.parametrize('dtype, tight', [
    (torch.float64, dict(rtol=0, atol=1e-13)), (torch.float32, dict(rtol=0, atol=1e-5)),
    (torch.bfloat16, dict(rtol=2e-2, atol=2e-2))], ids=['64', '32', 'bfloat16'])
def test_both_forms_take_the_same_steps(kind, dtype, tight):
    ps, qs = parameters(0, dtype=dtype), parameters(0, dtype=dtype)
    one, many = (kind(x, lr=.1, warmup_steps=5, weight_decay=.1, foreach=way)
                 for x, way in ((ps, False), (qs, True)))
    run((ps, one), (qs, many), missing=.3)
    for p, q in zip(ps, qs): assert_close(p, q, **tight)


def test_in_bfloat16_the_average_is_kept_in_float32():
    p = nn.Parameter(torch.full((3,), 4., dtype=torch.bfloat16))
    opt = ScheduleFreeSGD([p], lr=1e-4)
    for _ in range(500):
        p.grad = torch.ones_like(p)
        opt.step()
    z, x = opt.state[p]['z'], opt.state[p]['x']
    assert z.dtype == x.dtype == torch.float32
    assert_close(z, torch.full((3,), 4 - 500e-4), rtol=0, atol=1e-4)
    assert_close(x, torch.full((3,), 4 - 250.5e-4), rtol=0, atol=1e-4)
    again = ScheduleFreeSGD([p], lr=1e-4)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert again.state[p]['x'].equal(x) and again.state[p]['x'].dtype == torch.float32


def test_a_rate_may_be_a_tensor():
    ps, qs = parameters(0), parameters(0)
    run((ps, ScheduleFreeSGD(ps, lr=torch.tensor(.1, dtype=torch.float64))),
        (qs, ScheduleFreeSGD(qs, lr=.1)))
    assert all(p.equal(q) for p, q in zip(ps, qs))


@kinds
def test_swapping_changes_no_bit_of_the_run(kind):
    ps, qs = (parameters(0, dtype=torch.float32) for _ in range(2))
    a, b = kind(ps, lr=.1), kind(qs, lr=.1)
    gen = torch.Generator().manual_seed(1)
    for _ in range(40):
        set_gradients(gen, ps, qs, missing=.3)
        a.step()
        b.step()
        with averaged(a) as same:
            assert same is a and a.param_groups[0]['averaged']
            for p in ps:
                if 'x' in a.state[p]: assert p.equal(a.state[p]['x'])
            use_average(a)                       # twice is as once
            with averaged(a): pass               # inside: the outer one decides
            assert a.param_groups[0]['averaged']
        use_fast(a)
        assert all(p.equal(q) for p, q in zip(ps, qs))


@kinds
@foreachs
def test_no_step_while_the_average_is_in_the_model_and_nothing_changes(kind, foreach):
    ps = parameters(0)
    opt = kind(ps, lr=.1, foreach=foreach)
    run((ps, opt), n=3)
    use_average(opt)
    before = copy.deepcopy([p.data for p in ps]), copy.deepcopy(opt.state_dict())
    with pytest.raises(RuntimeError, match=r'call use_fast\(opt\) first'): opt.step()
    assert all(p.equal(q) for p, q in zip(ps, before[0]))
    now = opt.state_dict()['state']
    assert all(v.equal(now[k][name]) for k, state in before[1]['state'].items()
               for name, v in state.items())


def test_an_optimizer_without_an_average_is_named():
    for use in (use_average, use_fast, lambda opt: averaged(opt).__enter__()):
        with pytest.raises(ValueError, match='OneSGD keeps no average: take Schedule'):
            use(OneSGD(parameters()))
    with pytest.raises(ValueError, match='OneSGD keeps no average'):
        learner(OneSGD).fit(1)
    with pytest.raises(ValueError, match="put two_points, which makes it, before"):
        compose(step_count, schedule_free_step, two_points)
    with pytest.raises(ValueError, match='momentum must be a number'):
        ScheduleFreeSGD(parameters(), momentum=1.)
    with pytest.raises(ValueError, match='warmup_steps must be a number'):
        ScheduleFreeAdamW(parameters(), warmup_steps=-1)


def test_weights_that_were_replaced_under_the_average_are_refused():
    ps = parameters(0)
    opt = ScheduleFreeSGD(ps, lr=.1)
    run((ps, opt), n=3)
    use_average(opt)
    with torch.no_grad(): ps[1] += 1
    before = [p.detach().clone() for p in ps]
    with pytest.raises(ValueError, match=r'shape \(4,\) no longer is the average'):
        use_fast(opt)
    assert all(p.equal(q) for p, q in zip(ps, before))
    assert opt.param_groups[0]['averaged']
    with torch.no_grad(): opt.state[ps[1]]['x'].fill_(torch.nan)
    with torch.no_grad(): ps[1].fill_(torch.nan)          # a diverged run may go on
    use_fast(opt)


@kinds
@pytest.mark.parametrize('again', [
    lambda ps, opt: copy.deepcopy((ps, opt)),
    lambda ps, opt: pickle.loads(pickle.dumps((ps, opt)))], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize('average', [False, True])
def test_copies_go_on_bit_for_bit_and_know_what_is_in_the_model(kind, again, average):
    ps = parameters(0, dtype=torch.float32)
    opt = kind(ps, lr=.1, warmup_steps=20)
    run((ps, opt), n=10, missing=.3)
    if average: use_average(opt)
    qs, other = again(ps, opt)
    assert other.param_groups[0]['averaged'] == average
    for one in opt, other: use_fast(one)
    run((ps, opt), (qs, other), n=20, seed=3, missing=.3)
    assert all(p.equal(q) for p, q in zip(ps, qs))


@kinds
@pytest.mark.parametrize('average', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_bit_for_bit(kind, average, dtype, tmp_path):
    ps, qs = parameters(0, dtype=dtype), parameters(5, dtype=dtype)
    opt = kind(ps, lr=.1, warmup_steps=20)
    run((ps, opt), n=10, missing=.3)
    if average: use_average(opt)
    torch.save(([p.data for p in ps], opt.state_dict()), tmp_path/'saved.pt')
    weights, state = torch.load(tmp_path/'saved.pt', weights_only=True)
    other = kind(qs, lr=.3)
    with torch.no_grad():
        for q, w in zip(qs, weights): q.copy_(w)
    other.load_state_dict(state)
    for one in opt, other: use_fast(one)
    run((ps, opt), (qs, other), n=20, seed=3, missing=.3)
    assert all(p.equal(q) for p, q in zip(ps, qs))


def test_as_a_kind_of_a_split_optimizer():
    free_muon = (two_points, orthogonalize, shape_scale, add_decay, step_count,
                 schedule_free_step)
    def rule(name, p): return 'matrix' if p.ndim == 2 else 'rest'
    made = split(dict(matrix=free_muon, rest=ScheduleFreeAdamW), rule, lr=.01)
    ps = parameters(0)
    opt = made(ps)
    run((ps, opt), n=5)
    fast = [p.detach().clone() for p in ps]
    use_average(opt)
    assert all(p.equal(opt.state[p]['x']) for p in ps)
    assert not any(p.equal(q) for p, q in zip(ps, fast))
    with pytest.raises(RuntimeError, match='use_fast'): opt.step()
    use_fast(opt)
    assert all(p.equal(q) for p, q in zip(ps, fast))


def test_no_group_moves_while_the_average_of_another_is_in_the_model():
    made = split(dict(plain=(sgd_step,), free=ScheduleFreeSGD), lr=.1)
    p, q = parameters(0)[:2]
    opt = made([dict(params=[p], kind='plain'), dict(params=[q], kind='free')])
    run(([p, q], opt), n=3)
    use_average(opt)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match='use_fast'): run(([p, q], opt), n=1)
    assert p.equal(before)


# ---- in a learner

ROWS = [(torch.randn(6, generator=torch.Generator().manual_seed(i)), i % 3)
        for i in range(40)]

def _collate(rows):
    return torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])

class SeedCB(Callback):
    "The same dropout in each fit"
    order, watches = -100, True
    def before_fit(self, learn): torch.manual_seed(7)

def learner(opt_func=ScheduleFreeAdamW, *cbs, free=True, n=40):
    torch.manual_seed(0)
    dls = DataLoaders.from_dataset_dict(dict(train=ROWS[:n], valid=ROWS[:8]), 8, seed=1,
                                        collate_fn=_collate)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(.1), nn.Linear(5, 3))
    cbs = [SeedCB(), MetricsCB(), *[ScheduleFreeCB()]*free, *cbs]
    return Learner(model, dls, F.cross_entropy, opt_func, .05, cbs)

def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]
def same(a, b): return all(p.equal(q) for p, q in zip(a, b, strict=True))
def is_average(learn):
    state, ps = learn.opt.state, list(learn.model.parameters())
    return all(p.equal(state[p]['x']) for p in ps) and not any(
        p.equal(state[p]['z']) for p in ps)

class Look(Callback):
    "Notes what is in the model in each batch, and may raise there"
    order, watches = 5, True
    def __init__(self, error=None, phase='valid', epoch=1):
        self.error, self.phase, self.epoch, self.seen = error, phase, epoch, []
    def before_batch(self, learn):
        now = learn.opt.param_groups[0]['averaged']
        self.seen.append((learn.training, now))
        if learn.opt.state and not learn.training: assert is_average(learn)
        if (learn.phase, learn.epoch) == (self.phase, self.epoch) and self.error:
            raise self.error


@kinds
def test_validation_and_the_end_have_the_average_and_training_does_not_notice(kind):
    learn, plain = learner(kind, look := Look()), learner(kind, free=False)
    for one in learn, plain: one.fit(3)
    assert look.seen == 3*([(True, False)]*5 + [(False, True)])
    assert is_average(learn)
    use_fast(learn.opt)
    assert same(weights(learn), weights(plain))
    assert [row['train_loss'] for row in learn.history] == [
        row['train_loss'] for row in plain.history]
    use_average(plain.opt)
    plain.fit(1, train=False)
    assert learn.history[-1]['valid_loss'] == plain.history[-1]['valid_loss']


@pytest.mark.parametrize('phase', ['train', 'valid'])
@pytest.mark.parametrize('error', [CancelFit(), CancelPhase(), KeyError('x'),
                                   KeyboardInterrupt()], ids=repr)
def test_the_average_is_in_the_model_however_the_fit_ends(phase, error):
    learn = learner(ScheduleFreeAdamW, Look(error, phase))
    if isinstance(error, (CancelFit, CancelPhase)): learn.fit(2)
    else:
        with pytest.raises(type(error)): learn.fit(2)
    assert is_average(learn) and learn.opt.param_groups[0]['averaged']
    learn.fit(1, opt=learn.opt)                  # and training can go on
    assert is_average(learn)


def test_going_on_with_the_same_optimizer_is_one_long_fit():
    long, short = learner(), learner()
    long.fit(4)
    short.fit(2)
    short.fit(2, opt=short.opt)
    assert not same(weights(long), weights(learner()))
    ours, theirs = ([row['train_loss'] for row in one.history][-1] for one in
                    (short, long))
    assert ours == pytest.approx(theirs, abs=.2)     # other dropout, the same path
    with pytest.raises(RuntimeError, match='use_fast'):
        learn = learner()
        learn.fit(1)
        learn.cbs = ()
        learn.fit(1, opt=learn.opt)


def test_a_fit_that_only_validates_has_the_average_and_changes_nothing():
    learn = learner()
    learn.fit(2)
    before, loss = weights(learn), learn.history[-1]['valid_loss']
    learn.fit(1, train=False)
    assert learn.history[-1]['valid_loss'] == loss and same(weights(learn), before)
    use_fast(learn.opt)
    learn.fit(1, train=False)
    assert learn.history[-1]['valid_loss'] == loss
    assert not learn.opt.param_groups[0]['averaged']
    learner().fit(1, train=False)                # without any optimizer


class Inside(Callback):
    "Validates in the middle of a training phase"
    def __init__(self): self.losses = []
    def after_step(self, learn):
        if learn.n_taken % 3: return
        with aside(learn):
            learn.fit(1, train=False)
            loss = learn.history[-1]['valid_loss']
        self.losses.append(loss)                 # outside: `aside` takes all back

def test_a_validation_inside_of_a_fit_has_the_average_and_leaves_no_trace():
    learn, plain = learner(ScheduleFreeAdamW, inside := Inside()), learner()
    for one in learn, plain: one.fit(3)
    assert len(inside.losses) == 5 and same(weights(learn), weights(plain))
    assert inside.losses[-1] == learn.history[-1]['valid_loss']   # after the last step


@kinds
@pytest.mark.parametrize('stop', [('train', 1), ('valid', 1), ('train', 2)], ids=str)
def test_a_checkpoint_resumes_to_the_last_bit(kind, stop, tmp_path):
    def make(*cbs): return learner(kind, *cbs)
    def saver(): return CheckpointCB(tmp_path/'run.pt', every_batches=2, quiet=True)
    whole, broken, again = make(), make(Look(KeyError(), *stop), saver()), make(saver())
    whole.fit(4)
    with pytest.raises(KeyError): broken.fit(4)
    again.fit(4)
    assert same(weights(again), weights(whole)) and is_average(again)
    def losses(learn):
        return [(row['train_loss'], row['valid_loss']) for row in learn.history]
    assert losses(again) == losses(whole)
    finished = make(saver())
    finished.fit(4)
    assert same(weights(finished), weights(whole)) and is_average(finished)
    for one in again, whole, finished: use_fast(one.opt)
    assert same(weights(again), weights(whole))
    assert same(weights(finished), weights(whole))


def test_one_average_is_validated():
    for cbs in ([WeightAveragingCB(.9)], [ScheduleFreeCB()]):
        with pytest.raises(ValueError, match='would both put an average into'):
            learner(ScheduleFreeAdamW, *cbs).fit(1)
    learn = learner(ScheduleFreeAdamW, other := WeightAveragingCB(1., validates=False))
    plain = learner()
    for one in learn, plain: one.fit(2)
    assert same(weights(learn), weights(plain)) and other.average.weight == 10


@pytest.mark.parametrize('cbs', [
    lambda: [GradientAccumulationCB(2)], lambda: [GradientClipCB(.1)],
    lambda: [GradientAccumulationCB(2), GradientClipCB(max_value=.01)],
    lambda: [MixedPrecisionCB(torch.bfloat16)],
    lambda: [ScheduleCB(lr=warm_up(constant(.05), .5), momentum=linear(.95, .85))],
    lambda: [MixedPrecisionCB(torch.bfloat16), GradientAccumulationCB(3),
             GradientClipCB(.1)]],
    ids='accumulate clip both bfloat16 schedule all'.split())
@foreachs
def test_beside_other_callbacks_only_the_validation_differs(cbs, foreach):
    make = partial(ScheduleFreeAdamW, foreach=foreach)
    learn = learner(make, *cbs(), look := Look())
    plain = learner(make, *cbs(), free=False)
    learn.fit(3)
    plain.fit(3)
    assert is_average(learn) and look.seen[-1] == (False, True)
    use_fast(learn.opt)
    assert same(weights(learn), weights(plain))


def test_steps_with_accumulation_are_those_of_large_batches():
    def steps(learn): return learn.opt.state[next(learn.model.parameters())]['step']
    learn = learner(ScheduleFreeSGD, GradientAccumulationCB(2))
    learn.fit(2)
    assert steps(learn) == learn.n_taken == 6


def test_with_a_scaler_an_overflow_is_no_step():
    ps, qs = (parameters(0, dtype=torch.float32) for _ in range(2))
    ours, plain = ScheduleFreeSGD(ps, lr=.1), ScheduleFreeSGD(qs, lr=.1)
    scaler, gen = torch.amp.GradScaler('cpu', init_scale=8.), torch.Generator()
    for i in range(8):
        set_gradients(gen, ps, qs, missing=0.)
        for p in ps: p.grad *= scaler.get_scale()
        scaler.scale(torch.zeros(()))
        if i in (2, 5): ps[0].grad[0] = torch.inf
        else: plain.step()
        scaler.step(ours)
        scaler.update()
    assert ours.state[ps[0]]['step'] == 6
    agree(ps, qs, 1e-6)
    use_average(ours)
    use_average(plain)
    agree(ps, qs, 1e-6)
    learn = learner(ScheduleFreeAdamW, MixedPrecisionCB(
        torch.float16, torch.amp.GradScaler('cpu', init_scale=2.)))
    learn.fit(2)
    assert is_average(learn)


def test_a_schedule_of_the_rate_is_allowed_and_the_optimizer_reads_it():
    learn = learner(ScheduleFreeSGD, sched := ScheduleCB(lr=linear(.1, 0.)))
    learn.fit(2)
    state = learn.opt.state[next(learn.model.parameters())]
    assert state['lr_max'].item() == .1
    assert state['weight_sum'].item() == pytest.approx(10*.01)
    assert sched.values['lr'][-1] == 0
    learner().fit_one_cycle(1, .01)
    lr_find(learner())


@pytest.mark.parametrize('restore', [False, True])
def test_the_best_weights_are_those_that_were_validated(restore, tmp_path):
    best = SaveBestCB(tmp_path/'best.pt', restore=restore)
    learn = learner(ScheduleFreeAdamW, best)
    learn.fit(3)
    saved, end = torch.load(tmp_path/'best.pt'), learn.model.state_dict()
    check = learner()
    check.model.load_state_dict(saved)
    check.fit(1, train=False)
    assert check.history[-1]['valid_loss'] == pytest.approx(best.best, abs=1e-7)
    equal = all(saved[k].equal(end[k]) for k in saved)
    assert equal or not restore and best.best_epoch < 2
    if best.best_epoch < 2 and restore:
        with pytest.raises(ValueError, match='no longer is the average'):
            learn.fit(1, opt=learn.opt)
