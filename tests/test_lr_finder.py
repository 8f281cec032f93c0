"The learning-rate finder, and trials that leave no trace"
import copy
import math
import random
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nntrain.aside import acting, aside
from nntrain.callback import Callback
from nntrain.compare import MomentumLearner
from nntrain.data import DataLoaders
from nntrain.tensor_loader import TensorLoader
from nntrain.events import CancelStep
from nntrain.learner import Learner
from nntrain.lr_finder import LRFind, LRFinderCB, lr_find, smooth_losses
from nntrain.metrics import Accuracy, Mean, MetricsCB
from nntrain.prepare import BatchTransformCB
from nntrain.progress import ProgressCB

X, Y = torch.randn(8, 3), torch.randint(0, 2, (8,))
BATCHES = list(zip(X.split(3), Y.split(3)))  # 3, 3 and 2 samples


def learner(*cbs, **kw):
    return Learner(
        nn.Linear(3, 2), DataLoaders(BATCHES, BATCHES), F.cross_entropy, cbs=cbs, **kw)


def found(loss=F.cross_entropy, n_steps=60, cbs=(), n=64, batch_size=16, end_lr=100.):
    "A search on an easy problem"
    torch.manual_seed(0)
    x = torch.randn(n, 4)
    dls = DataLoaders.from_tensors(
        (x, (x.sum(1) > 0).long()), (x, (x.sum(1) > 0).long()), batch_size=batch_size,
        seed=0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    learn = Learner(model, dls, loss, cbs=cbs)
    return lr_find(learn, n_steps=n_steps, end_lr=end_lr)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(0, .99))
def test_smoothing_is_a_weighted_mean(losses, beta):
    for i, smoothed in enumerate(smooth_losses(losses, beta), 1):
        weights = [beta**(i-1-k) for k in range(i)]
        assert math.isclose(
            smoothed, sum(w * v for w, v in zip(weights, losses)) / sum(weights),
            rel_tol=1e-6, abs_tol=1e-6)


def test_lr_find_repeats_and_leaves_the_next_fit_alone():
    def trained(find):
        torch.manual_seed(0)
        learn = learner(MetricsCB(Accuracy()), opt_func=torch.optim.Adam, lr=.01)
        learn.fit(1)
        if find: lr_find(learn, n_steps=10)
        learn.fit(2)
        return learn
    with_search, without = trained(True), trained(False)
    assert torch.equal(with_search.model.weight, without.model.weight)
    assert [
        {k: v for k, v in row.items() if k != 'seconds'} for row in with_search.history
    ] == [{k: v for k, v in row.items() if k != 'seconds'} for row in without.history]


def test_lr_find_puts_back_the_generator_of_a_batch_sampler():
    own = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=torch.utils.data.BatchSampler(
            torch.utils.data.RandomSampler(data, generator=own), 3, False))
    before = own.get_state()
    lr_find(Learner(nn.Linear(3, 2), DataLoaders(loader, loader), F.cross_entropy),
            n_steps=8)
    assert torch.equal(own.get_state(), before)


@pytest.mark.parametrize('shift', [.6, 3., -2.])
def test_a_constant_in_the_loss_changes_nothing(shift):
    plain, shifted = found(), found(lambda p, y: F.cross_entropy(p, y) - shift)
    assert shifted.stopped == plain.stopped and 'rose by 1×' in plain.stopped
    assert shifted.lrs == plain.lrs and len(plain.lrs) < 60
    assert math.isclose(shifted.steep, plain.steep) and math.isclose(
        shifted.minimum, plain.minimum)


def test_a_picture_of_losses_below_zero():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    plain, shifted = found(), found(lambda p, y: F.cross_entropy(p, y) - 5)
    (a, b), (c, d) = (
        one.plot(plt.subplots()[1]).get_ylim() for one in (plain, shifted))
    assert (
        a < min(plain.losses) and math.isclose(a - 5, c, abs_tol=1e-4)
        and math.isclose(b - 5, d, abs_tol=1e-4))
    plt.close('all')


class EveryNth(Callback):
    "Accumulate: one step per `n` batches"
    def __init__(self, n): self.n, self.i = n, 0
    def before_fit(self, learn): self.i = 0
    def get_loss(self, learn): learn.get_loss(); learn.loss = learn.loss/self.n
    def after_backward(self, learn):
        self.i += 1
        if self.i % self.n: raise CancelStep()


def test_the_finder_counts_steps():
    "Four batches of 4 that share a step are one batch of 16"
    whole, parts = found(), found(batch_size=4, cbs=[EveryNth(4)])
    assert parts.stopped == whole.stopped and len(parts.lrs) == len(whole.lrs)
    torch.testing.assert_close(
        4 * torch.tensor(parts.losses), torch.tensor(whole.losses), rtol=1e-3, atol=1e-3
    )


def test_steps_that_a_scaler_leaves_out_are_no_points():
    class Skips(Callback):
        def step(self, learn):
            if learn.epoch == 0: raise CancelStep()
            learn.step()
    plain, skipped = (
        found(n_steps=20, end_lr=1.0), found(n_steps=20, end_lr=1.0, cbs=[Skips()]))
    assert plain.lrs == skipped.lrs and len(plain.lrs) == 20
    class Never(Callback):
        def step(self, learn): raise CancelStep()
    with pytest.raises(ValueError, match='no two steps were taken'):
        found(n_steps=5, cbs=[Never()])


def test_all_rates_have_their_own_step():
    rates = []
    class Note(Callback):
        order = 60
        def after_backward(self, learn): rates.append(learn.opt.param_groups[0]['lr'])
    walk = found(n_steps=7, cbs=[Note()])
    assert rates[:7] == walk.lrs and len(walk.losses) == 7


def test_lr_find_of_lazy_layers_and_of_callbacks_that_need_the_metrics():
    class Reads(Callback):
        order, needs = 20, (MetricsCB,)
        def after_epoch(self, learn): assert learn.history
    cbs = [MetricsCB(Accuracy()), ProgressCB(), Reads()]
    learn = Learner(
        nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), DataLoaders(BATCHES, BATCHES),
        F.cross_entropy, cbs=cbs)
    assert len(lr_find(learn, n_steps=8).lrs) == 8
    assert (
        list(learn.cbs) == cbs and learn.history == []
        and type(learn.model[0]) is nn.LazyLinear)


def test_the_finder_owns_the_rate():
    class Writes(Callback): owns = ('lr',)
    with pytest.raises(ValueError, match='would both write lr'):
        lr_find(learner(Writes()), n_steps=5)


class Stateful(Callback):
    """State of many kinds: numbers, lists, tensors, generators, a scaler, an object
    with slots of its own"""
    def __init__(self):
        self.n, self.seen, self.last = 0, [], deque(maxlen=2)
        self.scaler = torch.amp.GradScaler('cpu', init_scale=2.**16)
        self.torch, self.numpy = (
            torch.Generator().manual_seed(1), np.random.default_rng(1))
        self.old, self.python = np.random.RandomState(1), random.Random(1)
        self.array, self.tensor = np.zeros(3), torch.zeros(2)
        self.nested, self.few = {'a': [{'b': torch.zeros(1)}]}, {1}
        self.noise = BatchTransformCB(
            partial(lambda gen, b: b, torch.Generator().manual_seed(2)))
    def after_loss(self, learn):
        self.n += 1
        self.seen.append(self.n)
        self.last.append(self.n)
        self.few.add(self.n)
        self.scaler.scale(learn.loss.detach())
        self.scaler.update(self.scaler.get_scale()/2)
        self.tensor += 1; self.array += 1; self.nested['a'][0]['b'] += 1
        self.nested['a'].append({}); self.new = 'an attribute'
        torch.rand(1, generator=self.torch); self.numpy.random(); self.old.rand()
        self.python.random()
        torch.rand(1, generator=self.noise.tfm.args[0])
    def look(self):
        def plain(v):
            if isinstance(v, torch.Generator): return v.get_state().tolist()
            if isinstance(v, np.random.Generator): return str(v.bit_generator.state)
            if isinstance(v, np.random.RandomState): return str(v.get_state())
            if isinstance(v, random.Random): return v.getstate()
            if isinstance(v, torch.amp.GradScaler): return v.state_dict()
            if isinstance(v, (torch.Tensor, np.ndarray)): return v.tolist()
            if isinstance(v, BatchTransformCB):
                return v.tfm.args[0].get_state().tolist()
            return copy.deepcopy(v)
        return {name: plain(v) for name, v in vars(self).items()}


class Odd(nn.Module):
    """A model with a buffer that is not saved, a frozen part, an own counter and a tied
    weight"""
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.tied, self.n = self.a.weight, 0
        self.b.bias.requires_grad_(False)
        self.register_buffer('calls', torch.zeros(1), persistent=False)
    def forward(self, x):
        self.n += 1; self.calls += 1
        return self.b(F.dropout(self.norm(self.a(x)), .2, self.training))


def traces(learn):
    model = learn.model
    state = [
        (
            n, t.detach().clone(), t.requires_grad,
            None if t.grad is None else t.grad.clone())
        for n, t in (*model.named_parameters(), *model.named_buffers())
    ]
    opt = None if learn.opt is None else copy.deepcopy(learn.opt.state_dict())
    own = {k: v for k, v in vars(learn).items() if k not in ('model', 'opt', 'history')}
    return dict(
        state=state, opt=opt, own=own, history=copy.deepcopy(learn.history),
        modes=[m.training for m in model.modules()], n=model.n,
        cbs=[cb.look() for cb in learn.cbs if isinstance(cb, Stateful)],
        rest=[copy.deepcopy(vars(cb)) for cb in learn.cbs if isinstance(cb, MetricsCB)],
        chance=(random.getstate(), str(np.random.get_state()), torch.get_rng_state()),
        epochs=[learn.dls.train.epoch, learn.dls.valid.epoch])


def assert_same(a, b, where=''):
    assert type(a) is type(b), (where, a, b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), (where, list(a), list(b))
        for k in a:
            assert_same(a[k], b[k], f'{where}[{k!r}]')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b)):
            assert_same(one, other, f'{where}[{i}]')
    elif isinstance(a, (Mean, Accuracy)):
        assert_same(vars(a), vars(b), where)
    else:
        assert a is b or a == b, (where, a, b)


def odd_learner(*cbs):
    torch.manual_seed(0)
    dls = DataLoaders(TensorLoader(X, Y, 3, shuffle=True), TensorLoader(X, Y, 4))
    return Learner(Odd(), dls, F.cross_entropy, partial(torch.optim.Adam, lr=.1),
                   cbs=[Stateful(), MetricsCB(Accuracy()), *cbs])


def disturb(learn):
    learn.fit(2, lr=3.)
    learn.model.eval()
    learn.model.a.weight.data.mul_(2)           # without a sign on the version counter
    learn.model.a.weight.requires_grad_(False)
    with torch.enable_grad(): learn.model(X).sum().backward()
    learn.lr, learn.extra = 7., 'new'
    for cb in learn.cbs: cb.changed = True
    random.random(); np.random.rand(); torch.rand(1)


def test_aside_leaves_no_trace_before_and_after_a_fit():
    learn = odd_learner()
    for _ in range(2):
        before = traces(learn)
        with aside(learn): disturb(learn)
        assert_same(before, traces(learn))
        learn.fit(1)


@pytest.mark.parametrize('event, n', [('after_epoch', 2), ('after_batch', 10),
                                      ('before_phase', 4), ('after_backward', 6)])
def test_aside_leaves_no_trace_in_the_middle_of_a_fit(event, n):
    class Look(Callback):
        order = -100
        def __init__(self): self.n = 0
        def _look(self, learn):
            self.n += 1
            before = traces(learn)
            with aside(learn): disturb(learn)
            assert_same(before, traces(learn))
    setattr(Look, event, Look._look)
    look = Look()
    def trained(*cbs):
        learn = odd_learner(*cbs)
        learn.fit(2)
        return learn
    looked, plain = trained(look), trained()
    assert look.n == n  # it is not called by what runs aside
    rows = [
        [{k: v for k, v in r.items() if k != 'seconds'} for r in o.history]
        for o in (looked, plain)]
    assert rows[0] == rows[1]
    for a, b in zip(
        looked.model.state_dict().values(), plain.model.state_dict().values()
    ):
        assert torch.equal(a, b)


def test_aside_puts_back_after_an_error_too():
    learn = odd_learner()
    learn.fit(1)
    before = traces(learn)
    with pytest.raises(ZeroDivisionError):
        with aside(learn): disturb(learn); 1/0
    assert_same(before, traces(learn))


def test_aside_keeps_identities():
    """Who holds the history, a weight or a list of the learner sees the same object as
    before"""
    learn = odd_learner()
    learn.fit(1)
    held = learn.history, learn.opt, learn.model.a.weight, learn.cbs[0].seen, learn.cbs
    with aside(learn): disturb(learn)
    now = learn.history, learn.opt, learn.model.a.weight, learn.cbs[0].seen, learn.cbs
    assert all(a is b for a, b in zip(held, now))


def test_aside_does_not_copy_the_data():
    learn = odd_learner()
    learn.dls.train.x = x = X.clone()
    with aside(learn):
        # the data are not watched: that would take their memory once more
        x += 1
    assert torch.equal(x, X+1)


def test_aside_leaves_alone_what_is_alive():
    import queue, threading
    class Tracker:
        def __init__(self): self.todo, self.lock = queue.Queue(), threading.Lock()
    class Tracks(Callback):
        def __init__(self): self.tracker = Tracker()
        def after_batch(self, learn): self.tracker.todo.put(learn.iter)
    learn = odd_learner(Tracks())
    learn.cbs[-1].tracker.todo.put('first')
    with aside(learn):
        learn.cbs[-1].tracker.todo.get()     # as a thread does that writes to a file
    assert learn.cbs[-1].tracker.todo.empty()


def test_aside_with_lazy_layers():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    learn = Learner(
        model, DataLoaders(BATCHES, BATCHES), F.cross_entropy, cbs=[MetricsCB()])
    with aside(learn): learn.fit(1)
    assert type(model[0]) is nn.LazyLinear and type(model[1]) is nn.LazyBatchNorm1d
    learn.fit(1)
    assert type(model[0]) is nn.Linear and len(learn.history) == 1


def test_aside_with_workers_that_stay():
    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(
        data, 3, num_workers=1, persistent_workers=True)
    class Look(Callback):
        def after_batch(self, learn):
            if learn.iter == 1:
                with aside(learn): learn.fit(1, valid=False)
    counts = []
    class Count(Callback):
        def after_batch(self, learn): counts.append(learn.iter)
    learn = Learner(
        nn.Linear(3, 2), DataLoaders(loader, loader), F.cross_entropy, cbs=[Look()])
    learn.fit(1, valid=False, cbs=[Count()])
    assert counts == [0, 1, 2]


def test_aside_of_anything():
    from types import SimpleNamespace
    model = nn.BatchNorm1d(3)
    with aside(SimpleNamespace(model=model)) as held:
        held.model(X)
        assert not torch.equal(model.running_mean, torch.zeros(3))
    assert torch.equal(model.running_mean, torch.zeros(3)) and vars(held) == {
        'model': model}


def test_predictions_aside_do_not_share_the_copies_of_autocast():
    learn = learner()
    x = X[:2]
    with torch.autocast('cpu', torch.bfloat16):
        with aside(learn), torch.no_grad(): learn.model(x)
        loss = learn.model(x).float().sum()
    loss.backward()
    assert all(p.grad is not None for p in learn.model.parameters())


def test_validation_with_another_model():
    """What validation sees is what a fit aside sees, if callbacks that change the model
    are kept"""
    class Doubled(Callback):
        watches, changes_model = True, True
        def before_phase(self, learn):
            if not learn.training:
                self.kept = learn.model.weight.data.clone()
                learn.model.weight.data *= 2
        def cleanup_phase(self, learn):
            if not learn.training: learn.model.weight.data = self.kept
    learn = learner(MetricsCB(), Doubled())
    learn.fit(1)
    assert acting(learn.cbs) == [] and acting(learn.cbs, predict=True) == [learn.cbs[1]]
    metrics = MetricsCB()
    with aside(learn):
        learn.cbs = tuple(acting(learn.cbs, predict=True))
        learn.fit(1, train=False, cbs=[metrics])
        valid_loss = learn.history[-1]['valid_loss']
    assert valid_loss == learn.history[-1]['valid_loss'] and len(learn.cbs) == 2


# --- what the chapter shows in one case only

def test_smoothing_at_the_ends():
    assert smooth_losses([3., 5.], beta=0) == [3., 5.]
    with pytest.raises(ValueError, match='beta must lie in'):
        smooth_losses([1.], beta=1)


def test_the_steepest_point_at_the_start():
    falls = LRFind(lrs=[.01, .1, 1.], losses=[], smoothed=[5., 4., 3.5], stopped='')
    assert falls.steep == .01                  # by 1 in the first step, then .75 a step


def test_the_rates_lie_on_a_logarithmic_axis():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    heights = [5., 4.5, 3., 2.8, 9.]
    ax = LRFind([.001, .01, .1, 1., 10.], heights, heights, '').plot(plt.subplots()[1])
    assert ax.get_xscale() == 'log' and ax.get_yscale() == 'linear'
    plt.close('all')


def test_rates_have_equal_factors():
    rates = LRFinderCB(1e-3, 1., n_steps=4).lrs_to_try
    assert [round(lr, 6) for lr in rates] == [.001, .01, .1, 1.]


def test_a_search_leaves_numpys_and_a_loaders_generator_alone():
    class Noise(Callback):
        def before_batch(self, learn): np.random.rand()
    own = torch.Generator().manual_seed(3)
    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=own)
    learn = Learner(nn.Linear(3, 2), DataLoaders(loader, loader), F.cross_entropy,
                    cbs=[Noise()])
    places = []
    for _ in range(2):
        places.append((own.get_state().tolist(), str(np.random.get_state())))
        lr_find(learn, n_steps=10)
    assert places[0] == places[1]


def test_gradients_that_a_learner_keeps_stay():
    learn = MomentumLearner(nn.Linear(3, 2), DataLoaders(BATCHES, BATCHES),
                            F.cross_entropy)
    learn.fit(2)
    before = [p.grad.clone() for p in learn.model.parameters()]
    twice = [lr_find(learn, n_steps=12).losses for _ in range(2)]
    assert twice[0] == twice[1] and len(twice[0]) == 12
    for p, grad in zip(learn.model.parameters(), before):
        assert torch.equal(p.grad, grad)


class NaNAfter(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w, self.n = nn.Parameter(torch.ones(())), n
    def forward(self, x): self.n -= 1; return self.w*(math.nan if self.n < 0 else 1.)


def nan_after(n):
    batches = [(torch.zeros(1), torch.zeros(1))]*3
    return Learner(NaNAfter(n), DataLoaders(batches, batches), lambda preds, y: preds)


def test_losses_that_are_not_finite():
    found = lr_find(nan_after(6), n_steps=20)
    assert len(found.lrs) == 6 and found.stopped.startswith('loss nan')
    with pytest.raises(ValueError, match='not finite from the start'):
        lr_find(nan_after(0), n_steps=20)


def test_an_error_in_a_search_comes_out():
    class Fails(Callback):
        def after_backward(self, learn): raise KeyError('a bug')
    learn = learner(Fails())
    before = learn.model.weight.clone()
    with pytest.raises(KeyError): lr_find(learn)
    assert torch.equal(learn.model.weight, before) and not learn.fitting


@pytest.mark.parametrize('given, why', [
    (dict(start_lr=1., end_lr=.1), 'start_lr < end_lr'),
    (dict(n_steps=4), 'n_steps must be'), (dict(stop_at=0), 'stop_at must be'),
    (dict(beta=1), 'beta must lie in')])
def test_arguments_of_the_finder(given, why):
    with pytest.raises(ValueError, match=why): lr_find(learner(), **given)


def test_an_optimizer_without_groups_cannot_be_searched():
    "The finder writes its rates into `param_groups`, as torch's schedulers do"
    class Bare:
        def __init__(self, params, lr): self.params = list(params)
        def step(self): pass
        def zero_grad(self): pass
    learn = learner(opt_func=Bare)
    before = learn.model.weight.clone()
    with pytest.raises(AttributeError, match='param_groups'): lr_find(learn)
    assert torch.equal(learn.model.weight, before) and not learn.fitting
