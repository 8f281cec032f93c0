"The loop under random cancels and errors, and what the chapter on it shows only once"
import copy
import math
import pickle
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastcore.basics import patch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nntrain.batches import loss_divisor, unpack
from nntrain.callback import After, Callback, check_callbacks, sort_callbacks
from nntrain.collate import TARGET_KEYS
from nntrain.data import DataLoaders
from nntrain.events import (
    CANCELS, EVENTS, LEVELS, VERBS, CancelFit, CancelStep, run_level)
from nntrain.history import RecorderCB
from nntrain.learner import Learner, World
from nntrain.lr_finder import lr_find
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.prepare import BatchTransformCB, DeviceCB, NormalizeCB, SingleBatchCB
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


@settings(deadline=None)
@given(st.permutations(
    [(0, None), (5, None), (10, None), (None, 1), (None, 'one'), (None, 0)]))
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


def test_settings_are_as_they_are_now():
    cb = Passes('p')
    cb.patience, cb.mode = 7, 'max'
    assert cb.settings() == dict(
        path='p', patience=7, monitor='loss', mode='max', twice=14)


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


class AllVerbs(Callback):
    def predict(self, learn): learn.preds = learn.model(*learn.xb)
    def get_loss(self, learn): learn.loss = learn.loss_func(learn.preds, learn.yb)
    def backward(self, learn): learn.loss.backward()
    def step(self, learn): learn.opt.step()
    def zero_grad(self, learn): learn.opt.zero_grad()


def test_all_verbs_may_come_from_a_callback():
    def fail(): raise AssertionError("the learner's own verb was called")
    own, given = learner(), learner(AllVerbs())
    given.model.load_state_dict(own.model.state_dict())
    for verb in VERBS: setattr(given, verb, fail)
    for learn in own, given: learn.fit(2)
    assert torch.equal(own.model.weight, given.model.weight)


def test_two_callbacks_with_one_verb_are_refused():
    class Predicts(Callback):
        def predict(self, learn): learn.preds = learn.model(*learn.xb)
    learn = learner(AllVerbs(), Predicts())
    before = learn.model.weight.clone()
    with pytest.raises(ValueError, match="all have the method 'predict': keep one"):
        learn.fit(1)
    assert torch.equal(learn.model.weight, before) and not learn.fitting


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




# --- what the chapter shows in one case only

def trace(level, fail_in, error):
    seen = []
    def emit(event):
        seen.append(event)
        if event == fail_in: raise error
    try: run_level(level, lambda: None, emit)
    except Exception as e: seen.append(type(e).__name__)
    return seen


@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('cancelled', LEVELS)
def test_a_cancel_ends_its_own_level_only(level, cancelled):
    error = CANCELS[cancelled]
    assert trace(level, 'before_'+level, error()) == [
        'before_'+level, 'cleanup_'+level] + [error.__name__]*(level != cancelled)


def test_the_first_of_two_errors_counts():
    def emit(event): raise (KeyError if event == 'before_fit' else OSError)(event)
    with pytest.raises(KeyError, match='before_fit') as e:
        run_level('fit', lambda: None, emit)
    notes = getattr(e.value, '__notes__', ['cleanup_fit failed'])   # Python 3.10: none
    assert 'cleanup_fit failed' in notes[0]


def test_every_level_has_its_cancel():
    assert [*CANCELS] == [*LEVELS] and len(EVENTS) == 3*len(LEVELS) + 4
    after = {'after_' + verb.removeprefix('get_') for verb in VERBS[:-1]}
    assert after <= set(EVENTS)


def test_the_whole_order_of_an_epoch():
    training = ['before_batch', 'after_predict', 'after_loss', 'after_backward',
                'after_step', 'after_batch', 'cleanup_batch']
    valid = [e for e in training if e not in ('after_backward', 'after_step')]
    def phase(batch): return ['before_phase', *batch*3, 'after_phase', 'cleanup_phase']
    assert events(1) == ['before_fit', 'before_epoch', *phase(training), *phase(valid),
                         'after_epoch', 'cleanup_epoch', 'after_fit', 'cleanup_fit']


def test_a_cancelled_step_ends_its_batch_as_usual():
    class EverySecond(Callback):
        def after_backward(self, learn):
            if learn.iter % 2 == 0: raise CancelStep()
    noted = Everything(-1, None)
    learner(EverySecond(), noted).fit(1, valid=False)
    skipped = ['before_batch', 'after_predict', 'after_loss', 'after_batch',
               'cleanup_batch']
    assert noted.heard[3:8] == skipped and noted.heard[8:10] == skipped[:2]
    assert noted.heard.count('after_step') == 1          # of three batches


def test_a_real_error_passes_through_four_clean_ups():
    noted = Everything(events(1).index('after_backward'), KeyError('a bug'))
    with pytest.raises(KeyError, match='a bug'): learner(noted).fit(3)
    assert noted.heard[-4:] == ['cleanup_' + level for level in LEVELS[::-1]]


def test_how_callbacks_are_shown_and_sorted_without_their_neighbour():
    class Limit(Callback):
        shows = ('limit',)
        def __init__(self, limit=5): self.limit = limit
    class A(Callback): order = 10
    class B(Callback): order = After(A)
    class E(Callback): order = 11
    assert (repr(Limit(3)), repr(A())) == ('Limit(limit=3)', 'A')
    assert str(sort_callbacks([E(), B()])) == '[B, E]'
    first, second = Callback(), Callback()
    assert sort_callbacks([second, first])[0] is second          # a tie: as given


def test_wrong_lists_of_callbacks_are_refused():
    class Needs(Callback): needs = (MetricsCB,)
    metrics = MetricsCB()
    check_callbacks([Needs(), metrics])
    for bad, why in ([Needs()], 'needs MetricsCB'), ([metrics, metrics], 'given twice'):
        with pytest.raises(ValueError, match=why): check_callbacks(bad)
    with pytest.raises(TypeError, match=r'pass an object, MetricsCB\(\)'):
        check_callbacks([MetricsCB])
    with pytest.raises(ValueError, match='std must be above 0'): NormalizeCB(0., 0.)


def test_targets_of_batches():
    assert unpack(('x1', 'x2', 'y')) == (('x1', 'x2'), 'y')
    assert unpack({'image': 'x'}) == (('x',), None)
    for key in TARGET_KEYS: assert unpack({key: 'y', 'image': 'x'}) == (('x',), 'y')
    with pytest.raises(ValueError, match='cannot tell inputs from target'):
        unpack({'label': 'y', 'target': 'y', 'image': 'x'})
    assert loss_divisor(F.mse_loss, torch.tensor([1, 0])) is None


def test_orders_of_subclasses_of_objects_and_in_circles():
    class A(Callback): order = 10
    class LateA(A): order = After(A)
    class B(Callback): order = After(A)
    class E(Callback): order = 11
    late, early = LateA(), A()
    assert sort_callbacks([late, early])[0] is early     # it does not wait for itself
    assert str(sort_callbacks([LateA(), A(), LateA()])) == '[A, LateA, LateA]'
    early.order = 99                                     # set on the object: it counts
    assert str(sort_callbacks([early, B(), E()])) == '[E, A, B]'
    class X(Callback): pass
    class Y(Callback): order = After(X)
    X.order = After(Y)
    with pytest.raises(ValueError, match='circle'): sort_callbacks([X(), Y()])


def test_events_that_were_patched_in_are_checked():
    class Patched(Callback): pass
    class Child(Patched): pass
    @patch
    def after_epochs(self:Patched, learn): pass
    with pytest.raises(TypeError, match="did you mean 'after_epoch'"):
        check_callbacks([Child()])
    with pytest.raises(TypeError, match=r"write \('limit',\)"):
        type('OneCB', (Callback,), {'shows': 'limit'})


class LateStart(Callback):
    def __init__(self): self.seen = []
    def before_fit(self, learn): learn.epoch = 1
    def before_phase(self, learn):
        if learn.training and learn.epoch == 1:
            learn.iter, learn.dl = 2, list(learn.dl)[2:]
    def before_batch(self, learn):
        self.seen.append((learn.epoch, learn.phase, learn.iter))


def test_a_fit_that_starts_in_the_middle():
    late = LateStart()
    learner(late).fit(3)
    valid = [(1, 'valid', i) for i in range(3)], [(2, 'valid', i) for i in range(3)]
    assert late.seen == [(1, 'train', 2), *valid[0],
                         *((2, 'train', i) for i in range(3)), *valid[1]]


@pytest.mark.parametrize('given, why', [
    *((dict(n_epochs=n), 'n_epochs must be a whole number')
      for n in (0, -1, 1.5, True)),
    *((dict(lr=lr), 'lr must be a finite number above 0')
      for lr in (0, -.1, math.nan, math.inf, 'fast', True)),
    (dict(train=False, valid=False), 'nothing to do')])
def test_arguments_of_fit(given, why):
    with pytest.raises(ValueError, match=why): learner().fit(**given)


def test_a_second_fit_starts_fresh():
    learn = learner(opt_func=partial(torch.optim.SGD, momentum=.9))
    learn.fit(1)
    old = learn.opt
    learn.fit(1); assert learn.opt is not old
    learn.fit(1, opt=old); assert learn.opt is old


def test_cancels_at_the_wrong_place():
    class Early(Callback):
        def before_epoch(self, learn): raise CANCELS['batch']()
    with pytest.raises(RuntimeError, match='no such level was running'):
        learner(Early()).fit(1)
    class TooEarly(Callback):
        def before_epoch(self, learn): raise CancelStep()
    class TooLate(Callback):
        def after_step(self, learn): raise CancelStep()
    for cb in TooEarly(), TooLate():
        with pytest.raises(RuntimeError, match='there is no step to skip'):
            learner(cb).fit(1)


def test_a_model_on_another_device():
    away = Learner(nn.Linear(3, 2, device='meta'), DataLoaders(BATCHES, BATCHES),
                   F.cross_entropy)
    with pytest.raises(ValueError, match=r'add DeviceCB\(\)'): away.fit(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_on_a_gpu():
    learn = learner(DeviceCB('cuda'), MetricsCB(Accuracy()))
    learn.fit(2)
    assert learn.device.type == 'cuda' and len(learn.history) == 2
    learn.cbs = (MetricsCB(),)                     # the batches stay on the CPU now
    with pytest.raises(ValueError, match=r'add DeviceCB\(\)'): learn.fit(1)


def test_mode_and_gradients_of_the_phases():
    class Mode(Callback):
        def __init__(self): self.seen = []
        def after_loss(self, learn):
            module, grad = learn.model[1].training, learn.loss.requires_grad
            self.seen.append((learn.phase, module, grad))
    mode = Mode()
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    Learner(model, DataLoaders(BATCHES, BATCHES), F.cross_entropy, cbs=[mode]).fit(1)
    assert mode.seen == [('train', True, True)]*3 + [('valid', False, False)]*3


@pytest.mark.parametrize('keep', [True, False])
def test_a_frozen_norm_stays_frozen(keep):
    class FrozenNorm(Callback):
        def before_phase(self, learn):
            for m in learn.model.modules():
                norm = isinstance(m, nn.BatchNorm1d)
                if norm and not any(p.requires_grad for p in m.parameters()): m.eval()
    model = nn.Sequential(nn.BatchNorm1d(3).requires_grad_(False), nn.Linear(3, 2))
    Learner(model, DataLoaders(BATCHES, BATCHES), F.cross_entropy,
            cbs=[FrozenNorm()]*keep).fit(1)
    assert bool(model[0].running_mean.any()) != keep


def test_the_loop_as_text(capsys):
    class Skip(Callback):
        def after_loss(self, learn): pass
    class Verb(Callback):
        def step(self, learn): learn.step()
    learner(Skip(), MetricsCB()).show_loop([Verb()])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for name, who in (('after_loss', 'Skip, MetricsCB'), ('get_loss', 'Learner'),
                      ('step', 'Verb')):
        assert [name, who] in lines
    with pytest.raises(TypeError, match='is not a Callback'):
        learner().show_loop([print])


def test_dicts_and_several_inputs():
    class Two(nn.Linear):
        def forward(self, a, b): return super().forward(a + b)
    dicts = [{'image': x, 'label': y} for x, y in BATCHES]
    pairs = [(x, x, y) for x, y in BATCHES]
    for model, batches in (nn.Linear(3, 2), dicts), (Two(3, 2), pairs):
        learn = Learner(model, DataLoaders(batches, batches), F.cross_entropy,
                        cbs=[DeviceCB('cpu'), MetricsCB(Accuracy())])
        learn.fit(1)
        assert math.isfinite(learn.history[0]['valid_loss'])


# --- a world of several processes, acted by one

class Second(World):
    "Of two processes this is the second, whose model is wrapped"
    rank, size = 1, 2
    def __init__(self, learn): self.forward, self.deaf = learn.model.forward, None
    def sum(self, t): return 2*t
    def hears(self, cb, event): return super().hears(cb, event) and cb is not self.deaf


def test_a_callback_may_put_another_world_in_place():
    class Join(Callback):
        order = -30
        def before_fit(self, learn):
            learn.world = Second(learn)
            learn.world.deaf = noted[1]
    class Screen(Everything): main_only = True
    class File(Everything): main_only = ('after_epoch',)
    noted = [cls(-1, None) for cls in (Everything, Everything, Screen, File)]
    learn = learner(Join(), *noted)
    called = []
    learn.model.register_forward_hook(lambda *_: called.append(1))
    learn.fit(1)
    everybody, deaf, screen, file = (cb.heard for cb in noted)
    assert everybody == events(1) and deaf == screen == []
    assert file == [event for event in events(1) if event != 'after_epoch']
    assert called == []                          # the wrapped one was called instead
    assert type(learn.world) is World and learn.world.is_main and not learn.fitting
    with pytest.raises(ZeroDivisionError): learner(Join(), Fails()).fit(1)


class Fails(Callback):
    def after_batch(self, learn): 1/0


def test_what_a_batch_counts_is_asked_from_the_world():
    learn = learner()
    learn.batch = BATCHES[0]
    assert learn.world.n_rows(learn) == learn.loss_weight() == 3
    assert torch.equal(World().sum(torch.ones(2)), torch.ones(2)) and World().size == 1


@pytest.mark.parametrize('where', ['loss', 'model'])
def test_where_warnings_are_errors_a_users_own_comes_through(where):
    class Loud(nn.Linear):
        def forward(self, x):
            if where == 'model': warnings.warn('mine', UserWarning, stacklevel=2)
            return super().forward(x)
    def loss(preds, yb):
        if where == 'loss': warnings.warn('mine', UserWarning, stacklevel=2)
        return F.cross_entropy(preds, yb)
    rows = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    dls = DataLoaders.from_tensors(rows, rows, batch_size=3)
    learn = Learner(Loud(3, 2), dls, loss)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(UserWarning, match='^mine$'): learn.fit(1)
