"The learner under random cancels and errors, and what chapter 2 only shows once"
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nntrain.data import DataLoaders
from nntrain.learner import (CANCELS, EVENTS, LEVELS, Accuracy, After, Before, Callback, Learner, Mean, MetricsCB, ProgressCB, RecorderCB,
                             run_seeds, smooth_losses, sort_callbacks)

X, Y = torch.randn(8, 3), torch.randint(0, 2, (8,))
BATCHES = list(zip(X.split(3), Y.split(3)))  # 3, 3 and 2 samples


def learner(*cbs, **kw): return Learner(nn.Linear(3, 2), DataLoaders(BATCHES, BATCHES), F.cross_entropy, cbs=cbs, **kw)


class Everything(Callback):
    "Notes every event; raises `error` at the n-th one"
    order = Before(MetricsCB)
    def __init__(self, fail_at, error): self.heard, self.fail_at, self.error = [], fail_at, error
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
@given(st.integers(0, len(events())-1), st.sampled_from([*CANCELS.values(), ValueError]))
def test_every_level_that_began_is_cleaned_up(at, error):
    noted = Everything(at, error('on purpose'))
    learn = learner(noted)
    level = LEVELS.index(noted_level(events()[at])) if error in CANCELS.values() else None
    escapes = error is ValueError or not can_catch(events(), at, error)
    if escapes:
        with pytest.raises(ValueError if error is ValueError else RuntimeError): learn.fit(2)
    else: learn.fit(2)
    count = Counter(noted.heard)
    for name in LEVELS:
        assert count['before_'+name] == count['cleanup_'+name], (name, noted.heard)
        assert count['after_'+name] <= count['before_'+name]
    assert noted.heard[-1] == 'cleanup_fit'
    assert level is None or level >= 0
    assert torch.is_grad_enabled()


def noted_level(event): return next((name for name in LEVELS if event.endswith('_'+name)), 'batch')


def can_catch(heard, at, error):
    "Is the level of this cancel running at event number `at`? (its clean-up comes too late to be caught)"
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
    logits, targets = torch.randn(sum(sizes), n_classes), torch.randint(0, n_classes, (sum(sizes),))
    accuracy, loss = Accuracy(), Mean()
    for lg, tg in zip(logits.split(sizes), targets.split(sizes)):
        accuracy.update(lg, tg)
        loss.update(F.cross_entropy(lg, tg), len(tg))
    assert math.isclose(accuracy.compute().item(), (logits.argmax(1) == targets).float().mean().item(), abs_tol=1e-6)
    assert math.isclose(loss.compute().item(), F.cross_entropy(logits, targets).item(), rel_tol=1e-5)


def test_accuracy_per_pixel():
    "Class dimension 1, as in F.cross_entropy"
    accuracy = Accuracy()
    accuracy.update(torch.tensor([[[[1., 0.]], [[0., 1.]]]]), torch.tensor([[[0, 0]]]))  # (1, 2, 1, 2) and (1, 1, 2)
    assert accuracy.compute().item() == .5


@settings(deadline=None)
@given(st.permutations([(0, None), (5, None), (10, None), (None, ('after', 1)), (None, ('before', 2)), (None, ('after', 0))]))
def test_order_holds_whatever_the_order_of_listing(parts):
    classes = {}
    numbers = [0, 5, 10]
    for i, n in enumerate(numbers): classes[i] = type(f'N{n}', (Callback,), {'order': n})
    made = []
    for number, relative in parts:
        if relative is None: made.append(classes[numbers.index(number)]())
        else:
            side, target = relative
            made.append(type(f'{side}{target}', (Callback,), {'order': (After if side == 'after' else Before)(classes[target])})())
    names = [type(cb).__name__ for cb in sort_callbacks(made)]
    assert names == ['N0', 'after0', 'N5', 'after1', 'before2', 'N10']


@pytest.mark.parametrize('name', ['before_batches', 'after_pred', 'begin_epoch', 'cleanup_fits', 'after_bacth', 'Before_fit'])
def test_names_that_look_like_events_are_refused(name):
    with pytest.raises(TypeError, match='did you mean'): type('SomeCB', (Callback,), {name: lambda self, learn: None})


@pytest.mark.parametrize('name', ['update', 'plot', 'reset', '_before_everything', 'predict', 'value'])
def test_other_names_are_not(name): type('SomeCB', (Callback,), {name: lambda self, learn: None})


def test_one_transfer_per_phase(monkeypatch):
    "Metrics and recorder must not read the device batch by batch"
    reads = Counter()
    for method in 'item', 'tolist', '__float__', '__bool__', 'cpu':
        original = getattr(torch.Tensor, method)
        def counted(self, *args, _original=original, _method=method, **kw):
            reads[_method] += 1
            return _original(self, *args, **kw)
        monkeypatch.setattr(torch.Tensor, method, counted)
    learn = learner(MetricsCB(Accuracy()), RecorderCB(lr=lambda learn: learn.opt.param_groups[0]['lr']))
    learn.fit(3)
    assert 0 < sum(reads.values()) <= 3*2, reads  # an epoch: one for the history, one for the recorder


def test_terminal_table_and_no_bar_in_a_log(capsys):
    learn = learner(MetricsCB(Accuracy()), ProgressCB())
    learn.fit(3)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', 'seconds']
    assert [line.split()[0] for line in lines[1:]] == ['0', '1', '2'] and err == ''


def test_lr_find_repeats_and_leaves_the_next_fit_alone():
    def trained(find):
        torch.manual_seed(0)
        learn = learner(MetricsCB(Accuracy()), opt_func=torch.optim.Adam, lr=.01)
        learn.fit(1)
        if find: learn.lr_find(n_steps=10)
        learn.fit(2)
        return learn
    with_search, without = trained(True), trained(False)
    assert torch.equal(with_search.model.weight, without.model.weight)
    assert [{k: v for k, v in row.items() if k != 'seconds'} for row in with_search.history] == [{k: v for k, v in row.items() if k != 'seconds'} for row in without.history]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(0, .99))
def test_smoothing_is_a_weighted_mean(losses, beta):
    for i, smoothed in enumerate(smooth_losses(losses, beta), 1):
        weights = [beta**(i-1-k) for k in range(i)]
        assert math.isclose(smoothed, sum(w*v for w, v in zip(weights, losses))/sum(weights), rel_tol=1e-6, abs_tol=1e-6)


def test_harness_keeps_seeds_apart():
    runs = run_seeds('x', lambda: learner(MetricsCB(Accuracy())), 1, [3, 4, 3])
    assert runs.histories[0][0]['train_loss'] == runs.histories[2][0]['train_loss'] != runs.histories[1][0]['train_loss']


def test_learner_saves_nothing_of_a_failed_fit():
    learn = learner(MetricsCB(Accuracy()))
    learn.fit(1)
    opt, weight = learn.opt, learn.model.weight.clone()
    for bad in dict(n_epochs=0), dict(lr=-1.), dict(cbs=[MetricsCB]):
        with pytest.raises((ValueError, TypeError)): learn.fit(**bad)
    assert learn.opt is opt and torch.equal(learn.model.weight, weight) and len(learn.history) == 1


def test_callbacks_may_come_from_an_iterator(capsys):
    noted = Everything(-1, None)
    l = learner()
    l.fit(1, cbs=(cb for cb in [noted]))
    assert noted.heard and noted in l.active
    l.show_loop(iter([noted]))
    assert 'Everything' in capsys.readouterr().out


def test_lr_find_puts_back_the_generator_of_a_batch_sampler():
    own = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(data, generator=own), 3, False))
    before = own.get_state()
    Learner(nn.Linear(3, 2), DataLoaders(loader, loader), F.cross_entropy).lr_find(n_steps=8)
    assert torch.equal(own.get_state(), before)
