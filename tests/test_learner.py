"The learner under random cancels and errors, and what chapter 2 only shows once"
import copy
import math
import pickle
import random
import warnings
from collections import Counter, deque
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nntrain.aside import acting, aside
from nntrain.batches import unpack
from nntrain.callback import After, Callback, check_callbacks, sort_callbacks
from nntrain.compare import run_seeds, set_seed
from nntrain.data import DataLoaders, TensorLoader
from nntrain.events import CANCELS, EVENTS, LEVELS, CancelFit, CancelStep
from nntrain.history import RecorderCB
from nntrain.learner import Learner
from nntrain.lr_finder import lr_find, smooth_losses
from nntrain.metrics import Accuracy, Mean, MetricsCB
from nntrain.prepare import BatchTransformCB, NormalizeCB, SingleBatchCB
from nntrain.progress import ProgressCB

X, Y = torch.randn(8, 3), torch.randint(0, 2, (8,))
BATCHES = list(zip(X.split(3), Y.split(3)))  # 3, 3 and 2 samples


def learner(*cbs, **kw):
    return Learner(
        nn.Linear(3, 2), DataLoaders(BATCHES, BATCHES), F.cross_entropy, cbs=cbs, **kw)


class Everything(Callback):
    "Notes every event; raises `error` at the n-th one"
    order = 9   # before MetricsCB
    def __init__(self, fail_at, error):
        self.heard, self.fail_at, self.error = [], fail_at, error
    def _hear(self, event):
        self.heard.append(event)
        if len(self.heard)-1 == self.fail_at: raise self.error


def _handler(event): return lambda self, learn: self._hear(event)
for _event in EVENTS: setattr(Everything, _event, _handler(_event))


def events(n_epochs=2):
    noted = Everything(-1, None)
    learner(noted).fit(n_epochs)
    return noted.heard


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, len(events()) - 1), st.sampled_from([*CANCELS.values(), ValueError]))
def test_every_level_that_began_is_cleaned_up(at, error):
    noted = Everything(at, error('on purpose'))
    learn = learner(noted)
    level = (
        LEVELS.index(noted_level(events()[at])) if error in CANCELS.values() else None)
    escapes = error is ValueError or not can_catch(events(), at, error)
    if escapes:
        with pytest.raises(ValueError if error is ValueError else RuntimeError):
            learn.fit(2)
    else: learn.fit(2)
    count = Counter(noted.heard)
    for name in LEVELS:
        assert count['before_'+name] == count['cleanup_'+name], (name, noted.heard)
        assert count['after_'+name] <= count['before_'+name]
    assert noted.heard[-1] == 'cleanup_fit'
    assert level is None or level >= 0
    assert torch.is_grad_enabled()


def noted_level(event):
    return next((name for name in LEVELS if event.endswith('_' + name)), 'batch')


def can_catch(heard, at, error):
    """Is the level of this cancel running at event number `at`? (its clean-up comes too
    late to be caught)"""
    level = next(name for name, cancel in CANCELS.items() if cancel is error)
    running = Counter(heard[:at+1])
    return running['before_'+level] > running['cleanup_'+level]


def test_the_table_of_can_catch_can_fail():
    heard = events()
    assert not can_catch(heard, 0, CANCELS['batch'])
    assert can_catch(heard, heard.index('before_batch'), CANCELS['batch'])
    assert not can_catch(heard, heard.index('cleanup_batch'), CANCELS['batch'])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(2, 5))
def test_metrics_do_not_depend_on_the_cut_into_batches(sizes, n_classes):
    logits, targets = (
        torch.randn(sum(sizes), n_classes), torch.randint(0, n_classes, (sum(sizes),)))
    accuracy, loss = Accuracy(), Mean()
    for lg, tg in zip(logits.split(sizes), targets.split(sizes)):
        accuracy.update(lg, tg)
        loss.update(F.cross_entropy(lg, tg), len(tg))
    assert math.isclose(
        accuracy.compute().item(), (logits.argmax(1) == targets).float().mean().item(),
        abs_tol=1e-6)
    assert math.isclose(
        loss.compute().item(), F.cross_entropy(logits, targets).item(), rel_tol=1e-5)


def test_accuracy_per_pixel():
    "Class dimension 1, as in F.cross_entropy"
    accuracy = Accuracy()
    # (1, 2, 1, 2) and (1, 1, 2)
    accuracy.update(torch.tensor([[[[1., 0.]], [[0., 1.]]]]), torch.tensor([[[0, 0]]]))
    assert accuracy.compute().item() == .5


@settings(deadline=None)
@given(st.permutations([(0, None), (5, None), (10, None), (None, 1), (None, 'one'), (None, 0)]))
def test_order_holds_whatever_the_order_of_listing(parts):
    numbers = [type(f'N{n}', (Callback,), {'order': n}) for n in (0, 5, 10)]
    one = type('after1', (Callback,), {'order': After(numbers[1])})
    two = type('after_after1', (Callback,), {'order': After(one)})
    zero = type('after0', (Callback,), {'order': After(numbers[0])})
    made = {(0, None): numbers[0], (5, None): numbers[1], (10, None): numbers[2],
            (None, 1): one, (None, 'one'): two, (None, 0): zero}
    names = [type(cb).__name__ for cb in sort_callbacks([made[p]() for p in parts])]
    assert names == ['N0', 'after0', 'N5', 'after1', 'after_after1', 'N10']


@pytest.mark.parametrize(
    'name',
    [
        'before_batches', 'after_pred', 'begin_epoch', 'cleanup_fits', 'after_bacth',
        'Before_fit'],
)
def test_names_that_look_like_events_are_refused(name):
    with pytest.raises(TypeError, match='did you mean'):
        type('SomeCB', (Callback,), {name: lambda self, learn: None})


@pytest.mark.parametrize(
    'name', ['update', 'plot', 'reset', '_before_everything', 'predict', 'value'])
def test_other_names_are_not(name):
    type('SomeCB', (Callback,), {name: lambda self, learn: None})


def test_one_transfer_per_phase(monkeypatch):
    "Metrics and recorder must not read the device batch by batch"
    reads = Counter()
    for method in 'item', 'tolist', '__float__', '__bool__', 'cpu':
        original = getattr(torch.Tensor, method)
        def counted(self, *args, _original=original, _method=method, **kw):
            reads[_method] += 1
            return _original(self, *args, **kw)
        monkeypatch.setattr(torch.Tensor, method, counted)
    learn = learner(
        MetricsCB(Accuracy()),
        RecorderCB(lr=lambda learn: learn.opt.param_groups[0]['lr']))
    learn.fit(3)
    # an epoch: one for the history, one for the recorder
    assert 0 < sum(reads.values()) <= 3*2, reads


def test_terminal_table_and_no_bar_in_a_log(capsys):
    learn = learner(MetricsCB(Accuracy()), ProgressCB())
    learn.fit(3)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == [
        'epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy',
        'seconds']
    assert [line.split()[0] for line in lines[1:]] == ['0', '1', '2'] and err == ''


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


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(0, .99))
def test_smoothing_is_a_weighted_mean(losses, beta):
    for i, smoothed in enumerate(smooth_losses(losses, beta), 1):
        weights = [beta**(i-1-k) for k in range(i)]
        assert math.isclose(
            smoothed, sum(w * v for w, v in zip(weights, losses)) / sum(weights),
            rel_tol=1e-6, abs_tol=1e-6)


def test_harness_keeps_seeds_apart():
    runs = run_seeds('x', lambda: learner(MetricsCB(Accuracy())), 1, [3, 4, 3])
    assert (
        runs.histories[0][0]['train_loss'] == runs.histories[2][0]['train_loss']
        != runs.histories[1][0]['train_loss'])


def test_learner_saves_nothing_of_a_failed_fit():
    learn = learner(MetricsCB(Accuracy()))
    learn.fit(1)
    opt, weight = learn.opt, learn.model.weight.clone()
    for bad in dict(n_epochs=0), dict(lr=-1.), dict(cbs=[MetricsCB]):
        with pytest.raises((ValueError, TypeError)): learn.fit(**bad)
    assert (
        learn.opt is opt and torch.equal(learn.model.weight, weight)
        and len(learn.history) == 1)


def test_callbacks_may_come_from_an_iterator(capsys):
    noted = Everything(-1, None)
    l = learner()
    l.fit(1, cbs=(cb for cb in [noted]))
    assert noted.heard and l.active == []  # a guest of that fit only
    l.show_loop(iter([noted]))
    assert 'Everything' in capsys.readouterr().out


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


# --- clean-up: for those who began, and never instead of the error under way

class OpenCB(Callback):
    "Notes what it opened and closed; fails where it is told to"
    def __init__(self, name, log, fails=None):
        self.name, self.log, self.fails = name, log, fails
    def _note(self, event):
        self.log.append((self.name, event))
        if self.fails == event: raise OSError(f'{self.name} {event}')
    def before_fit(self, learn): self._note('before_fit')
    def cleanup_fit(self, learn): self._note('cleanup_fit')


def test_who_never_began_has_nothing_to_clean_up():
    log = []
    learn = learner(OpenCB('a', log), OpenCB('b', log, 'before_fit'), OpenCB('c', log))
    with pytest.raises(OSError, match='b before_fit'): learn.fit(1)
    assert log == [(n, when) for when in ('before_fit', 'cleanup_fit') for n in 'ab']
    log.clear()
    learn.cbs[1].fails = None
    learn.fit(1)
    assert log == [(n, when) for when in ('before_fit', 'cleanup_fit') for n in 'abc']


def test_what_an_earlier_batch_reached_does_not_count():
    class Skip(Callback):
        def before_batch(self, learn):
            if learn.iter == 1: raise CANCELS['batch']()
    class Later(Callback):
        order = 1
        def __init__(self): self.seen = []
        def cleanup_batch(self, learn): self.seen.append(learn.iter)
    later = Later()
    learner(Skip(), later).fit(1, valid=False)
    assert later.seen == [0, 2]


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit, ZeroDivisionError])
@pytest.mark.parametrize(
    'event', ['before_batch', 'after_loss', 'before_phase', 'after_epoch'])
def test_an_error_in_clean_up_does_not_hide_the_one_under_way(error, event):
    class Bad(Callback):
        def _fail(self, learn):
            if raised: raise OSError('clean-up')
    for level in LEVELS: setattr(Bad, 'cleanup_'+level, Bad._fail)
    class Stop(Callback): pass
    raised = []
    def stop(self, learn): raised.append(event); raise error('mine')
    setattr(Stop, event, stop)
    with pytest.raises(error, match='mine'):
        learner(Bad(), Stop(), MetricsCB(Accuracy())).fit(1)


def test_a_cancel_does_not_hide_an_error_in_clean_up():
    class Bad(Callback):
        def cleanup_batch(self, learn): raise OSError('clean-up')
        def after_loss(self, learn): raise CancelFit()
    with pytest.raises(OSError, match='clean-up'): learner(Bad()).fit(1)


def test_ctrl_c_in_clean_up_comes_out_and_the_others_clean_up():
    log = []
    class Interrupted(OpenCB):
        def cleanup_fit(self, learn):
            super().cleanup_fit(learn)
            raise KeyboardInterrupt()
    bad, after = OpenCB('a', log, 'cleanup_fit'), OpenCB('c', log)
    with pytest.raises(KeyboardInterrupt):
        learner(bad, Interrupted('b', log), after).fit(1)
    assert log[-3:] == [(n, 'cleanup_fit') for n in 'abc']


# fine for cross_entropy, not for Accuracy
def wrong_targets(y): return F.one_hot(y, 2).float()


def test_metrics_do_not_hide_what_was_wrong():
    batches = [(x, wrong_targets(y)) for x, y in BATCHES]
    learn = Learner(nn.Linear(3, 2), DataLoaders(batches, batches), F.cross_entropy,
                    cbs=[MetricsCB(Accuracy())])
    with pytest.raises(ValueError, match='Accuracy wants'): learn.fit(1)
    class Interrupt(Callback):
        def after_predict(self, learn): raise KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        learner(MetricsCB(Accuracy()), Interrupt()).fit(1)


# --- settings and owners

class Base(Callback):
    def __init__(self, monitor='loss', *, mode='min'):
        self.monitor, self.mode = monitor, mode


class Passes(Base):
    shows = ('twice',)
    def __init__(self, path, *args, patience=3, **kwargs):
        super().__init__(*args, **kwargs)
        self.patience = patience
    @property
    def twice(self): return 2*self.patience


@pytest.mark.parametrize('args, kwargs, monitor, mode', [
    (('p',), {}, 'loss', 'min'), (('p', 'acc'), {'mode': 'max'}, 'acc', 'max'),
    (('p',), {'monitor': 'acc'}, 'acc', 'min')])
def test_settings_of_arguments_that_are_passed_on(args, kwargs, monitor, mode):
    cb = Passes(*args, patience=4, **kwargs)
    assert cb.settings() == dict(
        path='p', patience=4, monitor=monitor, mode=mode, twice=8)
    cb.patience = 5
    again = pickle.loads(pickle.dumps(cb))
    for one in cb, again, copy.deepcopy(cb): assert one.settings()['twice'] == 10


def test_settings_of_our_own():
    cb = RecorderCB(lr=len)
    assert list(cb.settings()) == ['fns'] and list(cb.settings()['fns']) == [
        'loss', 'lr']
    assert SingleBatchCB().settings() == {}
    assert list(MetricsCB(Accuracy(), f1=Accuracy()).settings()['metrics']) == [
        'accuracy', 'f1']
    assert ProgressCB(every=2.).settings() == dict(plot=False, every=2.)


def test_constructors_still_refuse_what_they_do_not_know():
    for bad in lambda: SingleBatchCB(3), lambda: Base(speed=1), lambda: Passes():
        with pytest.raises(TypeError): bad()


def test_one_owner_of_each_hyperparameter():
    class Two(Callback):
        @property
        def owns(self): return self.names
        def __init__(self, *names): self.names = names
    check_callbacks([Two('lr'), Two('momentum'), Two()])
    with pytest.raises(ValueError, match='would both write betas, lr: keep one'):
        check_callbacks([Two('lr', 'betas'), Two(), Two('betas', 'lr', 'eps')])
    with pytest.raises(TypeError, match=r"write \('lr',\)"):
        type('OneCB', (Callback,), {'owns': 'lr'})


# --- aside: no trace

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


# --- what a learner keeps

def test_a_learner_can_be_pickled_and_copied_after_a_fit():
    class Stop(Callback):
        def after_loss(self, learn): raise ZeroDivisionError()
    # a lambda cannot be pickled
    guests = [BatchTransformCB(lambda batch: batch)]
    learn = learner(
        MetricsCB(Accuracy()), ProgressCB(), RecorderCB(), NormalizeCB(0.0, 1.0),
        opt_func=torch.optim.Adam)
    for cbs in guests, [Stop()]:
        try: learn.fit(1, cbs=cbs)
        except ZeroDivisionError: pass
        for other in pickle.loads(pickle.dumps(learn)), copy.deepcopy(learn):
            assert torch.equal(other.model.weight, learn.model.weight)
            other.fit(1, opt=other.opt)
            assert not torch.equal(other.model.weight, learn.model.weight)
        assert not any(t.requires_grad for t in (learn.preds, learn.loss))


def test_only_a_single_number_is_a_loss():
    learn = learner()
    learn.loss_func = partial(F.cross_entropy, reduction='none')
    with pytest.raises(
        ValueError, match=r'the loss must be a single number, got shape \(3,\)'
    ):
        learn.fit(1)
    learn.loss_func = lambda preds, targets: F.cross_entropy(preds, targets)[None]
    with pytest.raises(ValueError, match=r'got shape \(1,\)'): learn.fit(1, train=False)


def test_a_step_that_is_left_out_does_not_count():
    class Never(Callback):
        def step(self, learn): raise CancelStep()
    learn = learner(Never())
    learn.fit(1)
    assert learn.n_taken == 0 and learn.n_steps == 3
    class Fails(Callback):
        def step(self, learn): raise OSError()
    learn.cbs = (Fails(),)
    with pytest.raises(OSError): learn.fit(1)
    assert learn.n_taken == 0


class Graphs:
    "A batch of another kind"
    def __init__(self, n): self.n = n


class GraphLearner(Learner):
    def predict(self): self.preds = self.model(torch.ones(self.batch.n, 3))
    def get_loss(self): self.loss = self.preds.mean()


class CountingLearner(GraphLearner):
    def count(self): return self.batch.n


def test_batches_of_another_kind_say_how_many_samples_they_hold():
    dls = DataLoaders([Graphs(3), Graphs(1)], [Graphs(2)])
    with pytest.raises(
        TypeError, match='how many samples a Graphs holds: override Learner.count'
    ):
        GraphLearner(nn.Linear(3, 1), dls, None, cbs=[MetricsCB()]).fit(1)
    learn = CountingLearner(nn.Linear(3, 1), dls, None, cbs=[MetricsCB()])
    learn.fit(1)
    assert learn.cbs[0].loss.n == 0 and len(learn.history) == 1


def test_samples_of_a_packed_sequence():
    # 4 steps, 2 samples
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    learn = learner()
    for learn.batch in (packed, Y[:2]), {'x': packed, 'y': Y[:2]}:
        assert learn.count() == 2
    learn.batch = {'x': [X[:5], X], 'y': Y}
    assert learn.count() == 5


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(zip(X, Y))


def test_a_stream_without_length(capsys):
    loader = torch.utils.data.DataLoader(Stream(), 3)
    seen = []
    class Note(Callback):
        def before_fit(self, learn): seen.append(learn.n_steps)
    learn = Learner(nn.Linear(3, 2), DataLoaders(loader, loader), F.cross_entropy,
                    cbs=[MetricsCB(), ProgressCB(), Note()])
    learn.fit(2)
    assert seen == [None] and learn.n_taken == 6 and len(learn.history) == 2


# --- metrics

@pytest.mark.parametrize('shape', [(4, 1), (4, 1, 2, 2)])
def test_accuracy_of_one_number_per_sample(shape):
    logits = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    right = (logits > 0).float()
    with pytest.raises(
        ValueError, match=r'say where class 1 begins: Accuracy\(threshold=0'
    ):
        Accuracy().update(logits, right.squeeze(1))
    for preds, limit in (logits, 0.), (logits.sigmoid(), .5):
        for targets in right, right.squeeze(1), right.long():
            accuracy = Accuracy(threshold=limit)
            accuracy.update(preds, targets)
            assert accuracy.compute() == 1.
        wrong = Accuracy(threshold=limit)
        wrong.update(preds, 1-right)
        assert wrong.compute() == 0.
    with pytest.raises(ValueError, match='Accuracy wants'):
        Accuracy(0.0).update(logits, right[:2])


def test_accuracy_says_that_the_classes_come_last():
    with pytest.raises(
        ValueError, match=r'got \(4, 7, 3\) and \(4, 7\): the classes seem to come last'
    ):
        Accuracy().update(torch.zeros(4, 7, 3), torch.zeros(4, 7))
    with pytest.raises(ValueError, match='got tuple and'):
        Accuracy().update((1,), torch.zeros(4))
    class Sequence(Learner):
        def get_loss(self):
            self.loss = F.cross_entropy(self.preds.flatten(0, 1), self.yb.flatten())
    batches = [(torch.ones(4, 7, 3), torch.zeros(4, 7, dtype=torch.long))]
    learn = Sequence(
        nn.Linear(3, 2), DataLoaders(batches, batches), None,
        cbs=[MetricsCB(Accuracy())])
    with pytest.raises(ValueError, match='the classes seem to come last'): learn.fit(1)


class Several(Mean):
    "A metric that gives what it is told to give"
    def __init__(self, value): super().__init__(); self.value = value
    def update(self, preds, targets): self.n += len(targets)
    def compute(self): return self.value


@pytest.mark.parametrize(
    'value, names',
    [
        (torch.tensor([0.1, 0.2]), ['m_0', 'm_1']),
        (torch.tensor([0.5]), ['m']),
        (0.5, ['m']),
        (
            {'f1': torch.tensor(0.5), 'per': torch.tensor([0.1, 0.2])},
            ['f1', 'per_0', 'per_1']),
    ],
)
def test_metrics_that_give_several_numbers(value, names):
    learn = learner(MetricsCB(m=Several(value)))
    learn.fit(1)
    assert list(learn.history[0])[1:-1] == [
        f'{p}_{k}' for p in ('train', 'valid') for k in ['loss', *names]]
    assert all(isinstance(learn.history[0][f'valid_{k}'], float) for k in names)


def test_metrics_that_do_not_fit_into_a_row():
    with pytest.raises(ValueError, match=r"'m' gives a tensor of shape \(2, 2\)"):
        learner(MetricsCB(m=Several(torch.ones(2, 2)))).fit(1)
    with pytest.raises(ValueError, match='two metrics give train_f1'):
        learner(MetricsCB(m=Several({'f1': 1.}), f1=Several(1.))).fit(1)


def test_collections_of_torchmetrics():
    tm = pytest.importorskip('torchmetrics')
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
    both = tm.MetricCollection({'acc': MulticlassAccuracy(2, average='micro'),
                                'f1': MulticlassF1Score(2, average=None)})
    learn = learner(MetricsCB(Accuracy(), both))
    learn.fit(2)
    row = learn.history[-1]
    assert math.isclose(row['valid_accuracy'], row['valid_acc'], abs_tol=1e-6)
    assert {'train_f1_0', 'valid_f1_1'} <= set(row)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_means_of_16_bit_losses(dtype):
    mean = Mean()
    for i in range(3000):
        mean.update(torch.tensor(1.25 if i % 2 else 0.75, dtype=dtype), 1)
    assert mean.compute().dtype == torch.float32 and mean.compute() == 1.


def test_recorder_notes_numbers():
    recorder = RecorderCB(
        one=lambda learn: torch.ones(1), logits=lambda learn: learn.preds.detach())
    with pytest.raises(ValueError, match=r'logits gave a tensor of shape \(3, 2\)'):
        learner(recorder).fit(1)


@pytest.mark.parametrize(
    'x, dtype',
    [
        (X.bfloat16(), torch.bfloat16), (X.half(), torch.float16),
        (X.double(), torch.float64), ((100 * X).to(torch.int16), torch.float32),
        ((X > 0), torch.float32)],
)
def test_normalisation_of_any_type(x, dtype):
    normalize, y = NormalizeCB([0., 1., 2.], 2.), torch.zeros(8)
    wanted = ((x.float() - torch.tensor([0., 1., 2.]))/2).to(dtype)
    for batch in (x, y), [x, y], {'label': y, 'x': x}, {'x': x, 'label': y}, x:
        out = normalize.tfm(batch)
        got = out if batch is x else out['x'] if isinstance(batch, dict) else out[0]
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted)
        if isinstance(batch, dict): assert out['label'] is y


# --- the learning-rate finder

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


# --- models, batches and losses that do not fit

class Output(dict):
    "What models of transformers return"
    @property
    def logits(self): return self['logits']


class GivesOutput(nn.Linear):
    def forward(self, x): return Output(logits=super().forward(x))


def loss_of_output(out, targets): return F.cross_entropy(out.logits, targets)


class TakesOutput(Learner):
    def predict(self): self.preds = self.model(*self.xb).logits


def test_a_model_that_returns_no_tensor():
    dls = DataLoaders(BATCHES, BATCHES)
    with pytest.raises(
        TypeError, match='the model returned a Output, .* override Learner.predict'
    ):
        Learner(GivesOutput(3, 2), dls, F.cross_entropy).fit(1)
    learn = TakesOutput(
        GivesOutput(3, 2), dls, F.cross_entropy, cbs=[MetricsCB(Accuracy())])
    learn.fit(1)
    assert len(learn.history) == 1
    by_loss = Learner(GivesOutput(3, 2), dls, loss_of_output, cbs=[MetricsCB()])
    by_loss.fit(1)
    pickle.dumps(by_loss)


def test_batches_of_numpy_and_of_text():
    arrays = [(x.numpy(), y.numpy()) for x, y in BATCHES]
    targets = [(x, y.numpy()) for x, y in BATCHES]
    for batches in arrays, targets:
        with pytest.raises(TypeError, match='the batch holds NumPy arrays'):
            Learner(
                nn.Linear(3, 2), DataLoaders(batches, batches), F.cross_entropy,
                cbs=[MetricsCB()]).fit(1)
    names = [(x, ['cat']*len(x)) for x, _ in BATCHES]
    with pytest.raises(TypeError, match="the batch holds text, such as 'cat'"):
        Learner(nn.Linear(3, 2), DataLoaders(names, names), F.cross_entropy).fit(1)


@pytest.mark.parametrize(
    'loss', [F.mse_loss, F.l1_loss, F.smooth_l1_loss, nn.HuberLoss()])
def test_a_regression_that_would_compare_each_with_each(loss):
    batches = [(x, x.sum(1)) for x, _ in BATCHES]
    dls = DataLoaders(batches, batches)
    with pytest.raises(
        ValueError,
        match=r'predictions \(3, 1\) and targets \(3,\) would be compared each with '
        r'each',
    ):
        Learner(nn.Linear(3, 1), dls, loss).fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Learner(nn.Linear(3, 1), dls, lambda p, y: loss(p.squeeze(1), y)).fit(1)


def test_inputs_without_targets():
    for batch in X, (X,), [X], {'image': X}:
        inputs, target = unpack(batch)
        assert len(inputs) == 1 and inputs[0] is X and target is None
    class Predicts(Callback):
        def __init__(self): self.preds = []
        def get_loss(self, learn): learn.loss = torch.zeros(())
        def after_predict(self, learn): self.preds.append(learn.preds)
    new = [x for x, _ in BATCHES]
    learn = Learner(nn.Linear(3, 2), DataLoaders(BATCHES, new), F.cross_entropy)
    with pytest.raises(ValueError, match='a batch of inputs without a target'):
        learn.fit(1)
    predicts = Predicts()
    learn.fit(1, train=False, cbs=[predicts, NormalizeCB(0., 1.)])
    assert torch.equal(torch.cat(predicts.preds), learn.model(X))
    for bad in (), {}, {'label': X}, {'label': X, 'y': X, 'image': X}, 'text':
        with pytest.raises(ValueError, match='cannot tell inputs from target'):
            unpack(bad)


def test_an_error_of_a_verb_stays_what_it_was():
    class Fails(Callback):
        def predict(self, learn): raise KeyError('mine')
    with pytest.raises(KeyError, match='mine'): learner(Fails()).fit(1)
    class Cancels(Callback):
        def get_loss(self, learn): raise CancelFit()
    learner(Cancels()).fit(1)


def test_compiled_models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plain, compiled = copy.deepcopy(model), torch.compile(model, backend='eager')
    fits = []
    for one in plain, compiled:
        learn = Learner(
            one, DataLoaders(BATCHES, BATCHES), F.cross_entropy,
            cbs=[MetricsCB(Accuracy())])
        rates = lr_find(learn, n_steps=6).losses
        learn.fit(2)
        fits.append((rates, [row['valid_loss'] for row in learn.history]))
    for a, b in zip(*fits): assert a == pytest.approx(b, rel=1e-5)
    for a, b in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(a, b)


def test_a_fit_in_a_fit_is_refused_but_not_aside():
    class Nested(Callback):
        def after_batch(self, learn):
            if learn.iter == 0 and learn.training: learn.fit(1)
    learn = learner(Nested())
    with pytest.raises(RuntimeError, match='in the middle of a fit: .* with aside'):
        learn.fit(1)
    learn.cbs, learn.opt_func = (), lambda params, lr: 1/0
    # a fit that fails early is not under way
    for _ in range(2):
        with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=[SingleBatchCB()])
    assert learn.active == []


def test_aside_of_anything():
    from types import SimpleNamespace
    model = nn.BatchNorm1d(3)
    with aside(SimpleNamespace(model=model)) as held:
        held.model(X)
        assert not torch.equal(model.running_mean, torch.zeros(3))
    assert torch.equal(model.running_mean, torch.zeros(3)) and vars(held) == {
        'model': model}


# ---- what a loss counts --------------------------------------------------------------

@pytest.mark.parametrize(
    'loss',
    [
        partial(F.cross_entropy, ignore_index=0),
        nn.CrossEntropyLoss(torch.tensor([1.0, 5.0])),
        nn.CrossEntropyLoss(torch.tensor([1.0, 5.0]), ignore_index=1), F.cross_entropy],
)
def test_the_loss_of_an_epoch_is_that_of_all_its_samples(loss):
    targets = torch.tensor([0, 1, 1, 0, 0, 0, 1, 1])
    batches = list(zip(X.split(3), targets.split(3)))
    learn = Learner(
        nn.Linear(3, 2), DataLoaders(batches, batches), loss, cbs=[MetricsCB()])
    learn.fit(1, train=False)
    with torch.no_grad(): whole = loss(learn.model(X), targets).item()
    assert abs(learn.history[-1]['valid_loss'] - whole) < 1e-6


def test_a_batch_of_ignored_targets_does_not_spoil_the_epoch():
    batches = [(X[:4], torch.tensor([0, 1, -100, 0])), (X[4:], torch.full((4,), -100))]
    learn = Learner(nn.Linear(3, 2), DataLoaders(batches, batches), F.cross_entropy,
                    cbs=[MetricsCB()])
    learn.fit(1)
    assert math.isfinite(learn.history[-1]['train_loss'])
    assert all(p.isfinite().all() for p in learn.model.parameters())
    mean = Mean()                                  # a weight that stays on the device
    mean.update(torch.tensor(2.), torch.tensor(3.))
    mean.update(torch.tensor(math.nan), torch.tensor(0.))
    mean.update(torch.tensor(4.), 1)
    assert mean.compute() == 2.5


@pytest.mark.parametrize('seed', [10**20, -10**20, 1.5, True, 'one'])
def test_seeds_that_no_generator_takes_are_named(seed):
    with pytest.raises(ValueError, match='seed must be a whole number'): set_seed(seed)


def test_predictions_aside_do_not_share_the_copies_of_autocast():
    learn = learner()
    x = X[:2]
    with torch.autocast('cpu', torch.bfloat16):
        with aside(learn), torch.no_grad(): learn.model(x)
        loss = learn.model(x).float().sum()
    loss.backward()
    assert all(p.grad is not None for p in learn.model.parameters())
