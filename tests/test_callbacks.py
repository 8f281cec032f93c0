"Combinations and faults of the callbacks"
import contextlib
import copy
import csv
import math
import os
import re
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import nntrain.files
from nntrain.accumulate import GradientAccumulationCB
from nntrain.average import WeightAveragingCB
from nntrain.budgets import has_bfloat16
from nntrain.clip import GradientClipCB
from nntrain.precision import MixedPrecisionCB
from nntrain.callbacks import BatchLimitCB, StopOnNonFiniteCB
from nntrain.confusion import ConfusionMatrixCB
from nntrain.logs import CSVLogCB, TrackerCB
from nntrain.profiling import ProfileCB
from nntrain.trackers import CSVTracker
from nntrain.monitors import EarlyStoppingCB, MonitorCB, ReduceOnPlateauCB
from nntrain.files import write_whole
from nntrain.saving import SaveBestCB
from nntrain.sequences import ModelResetCB, RNNRegularizerCB
from nntrain.data import DataLoaders
from nntrain.compare import MomentumLearner
from nntrain.prepare import SingleBatchCB
from nntrain.callback import After, Callback, sort_callbacks
from nntrain.events import (CancelBatch, CancelEpoch, CancelFit, CancelPhase,
                            CancelStep)
from nntrain.lr_finder import lr_find
from nntrain.compare import set_seed
from nntrain.learner import Learner, World
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.history import RecorderCB
from nntrain.progress import ProgressCB
from nntrain.schedule import linear
from nntrain.steering import ScheduleCB
from nntrain.torch_schedulers import TorchSchedulerCB


def learner(
    *cbs, n=50, batch_size=8, model=None, opt_func=torch.optim.SGD, lr=0.1, cls=Learner,
    **kwargs):
    set_seed(0)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)
    dls = DataLoaders.from_tensors(
        (x, y), (x[:20], y[:20]), batch_size=batch_size, seed=0)
    return cls(
        model or nn.Linear(4, 3), dls, F.cross_entropy, opt_func, lr, cbs, **kwargs)

def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

class EndCB(Callback):
    "Note weights after each epoch, the steps taken, what is planned"
    order = 500
    def before_fit(self, learn): self.weights, self.lrs = [], []
    def after_epoch(self, learn):
        self.weights.append(weights(learn))
        self.lrs.append(learn.opt.param_groups[0]['lr'] if learn.opt else None)


# ---- orders --------------------------------------------------------------------------

def all_callbacks(tmp_path):
    return [
        BatchLimitCB(5), GradientAccumulationCB(2), MixedPrecisionCB(torch.bfloat16),
        GradientClipCB(1.0), StopOnNonFiniteCB(), WeightAveragingCB(0.9),
        ScheduleCB(lr=linear(0.1, 0.01)), MetricsCB(Accuracy()),
        CSVLogCB(tmp_path / 'log.csv'), EarlyStoppingCB(),
        SaveBestCB(tmp_path / 'best.pt', restore=True), ConfusionMatrixCB('abc'),
        RecorderCB()]

@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False))
def test_given_order_does_not_matter(tmp_path_factory, random):
    tmp_path = tmp_path_factory.mktemp('orders')
    fits = []
    for shuffle in False, True:
        cbs = all_callbacks(tmp_path)
        if shuffle: random.shuffle(cbs)
        learn = learner(*cbs)
        learn.fit(3)
        fits.append(
            (
                weights(learn).tolist(),
                [
                    {k: v for k, v in row.items() if k != 'seconds'}
                    for row in learn.history],
                learn.n_taken,
            )
        )
    assert fits[0] == fits[1] and fits[0][2] == 9

def test_gradient_passes_accumulation_scaling_clipping_in_this_order():
    names = [
        type(cb).__name__
        for cb in sort_callbacks(
            [
                GradientClipCB(1.0), Callback(), MixedPrecisionCB(),
                GradientAccumulationCB(2), BatchLimitCB(1)]
        )
    ]
    assert names == [
        'BatchLimitCB', 'GradientAccumulationCB', 'MixedPrecisionCB', 'GradientClipCB',
        'Callback']

def test_lr_find_works_with_all_of_them(tmp_path):
    learn = learner(
        *all_callbacks(tmp_path), EarlyStoppingCB(patience=1), ReduceOnPlateauCB())
    before = weights(learn)
    assert len(lr_find(learn, n_steps=20).losses) > 1
    assert_close(weights(learn), before, rtol=0, atol=0)
    assert not (tmp_path/'log.csv').exists() and not (tmp_path/'best.pt').exists()

def test_no_handler_leaks_into_the_next_fit(tmp_path):
    cbs = all_callbacks(tmp_path)
    learn, states = learner(*cbs), []
    for _ in range(2):
        learn.model.load_state_dict(learner().model.state_dict())
        learn.dls.train.epoch = 0
        learn.fit(2)
        states.append((weights(learn), len(learn.history)))
    assert_close(states[0][0], states[1][0], rtol=0, atol=0)
    assert states[0][1] == states[1][1] == 2


# ---- accumulation --------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_accumulation_equals_the_large_batch_for_any_sizes(sizes, n_batches):
    g = torch.Generator().manual_seed(sum(sizes))
    batches = [
        (
            torch.randn(k, 4, generator=g, dtype=torch.float64),
            torch.randint(0, 3, (k,), generator=g))
        for k in sizes
    ]
    groups = [batches[i:i+n_batches] for i in range(0, len(batches), n_batches)]
    large = [tuple(torch.cat(part) for part in zip(*group)) for group in groups]
    fits = []
    for train, cbs in (batches, [GradientAccumulationCB(n_batches)]), (large, []):
        set_seed(0)
        learn = Learner(
            nn.Linear(4, 3).double(), DataLoaders(train, train), F.cross_entropy,
            torch.optim.Adam, 0.05, cbs)
        learn.fit(2)
        fits.append((weights(learn), learn.n_taken))
    assert_close(fits[0][0], fits[1][0], rtol=0, atol=1e-10)
    assert fits[0][1] == fits[1][1] == 2*len(groups)

def test_accumulation_survives_left_out_batches():
    class SkipCB(Callback):
        def after_loss(self, learn):
            if learn.training and learn.iter in (1, 2): raise CancelBatch()
    class Grads(Callback):
        def __init__(self): self.grads = []
        def after_backward(self, learn):
            self.grads.append(learn.model.weight.grad.clone())
    # batches 0, 3 | 4
    learn = learner(
        GradientAccumulationCB(2), SkipCB(), grads := Grads(), n=40, lr=1e-9)
    learn.fit(1, valid=False)
    order = learn.dls.train.order(0)
    x, y = learn.dls.train.x[order], learn.dls.train.y[order]
    for grad, rows in zip(grads.grads, ([*range(8), *range(24, 32)], [*range(32, 40)])):
        learn.model.zero_grad()
        F.cross_entropy(learn.model(x[rows]), y[rows]).backward()
        assert_close(grad, learn.model.weight.grad, rtol=0, atol=1e-6)
    assert learn.n_taken == 2

def test_accumulation_takes_samples_of_all_processes_if_it_is_told():
    class Several(World):
        def n_rows(self, learn): return torch.tensor(float(3 if learn.iter == 0 else 1))
    class ToldCB(Callback):
        order = -30
        def before_fit(self, learn): learn.world = Several()
    learn = learner(GradientAccumulationCB(2), ToldCB(), seen := GradsCB(), n=16)
    learn.fit(1, valid=False)
    a, b = seen.single
    assert_close(seen.grads[0], (3*a + b)/4, rtol=0, atol=1e-6)

losses = {
    'weights': partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 7.0]).double()),
    'ignored': partial(F.cross_entropy, ignore_index=2),
    'usual': F.cross_entropy,
    'module': nn.CrossEntropyLoss(
        torch.tensor([1.0, 2.0, 7.0]).double(), label_smoothing=0.1),
    'probabilities': lambda preds, y: F.cross_entropy(
        preds, F.one_hot(y.clamp(min=0), 3).double()),
}

@pytest.mark.parametrize('kind', losses)
def test_accumulation_weighs_as_the_loss_does(kind):
    g = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(n, 4, generator=g, dtype=torch.float64),
            torch.randint(0, 3, (n,), generator=g))
        for n in (5, 8, 3, 7, 8)
    ]
    # with 'ignored' a batch without any target
    batches[1][1][2:] = batches[2][1][:] = 2
    if kind in ('usual', 'module'): batches[0][1][:2] = batches[3][1][:] = -100
    large = [
        tuple(torch.cat(part) for part in zip(*group))
        for group in (batches[:3], batches[3:])]
    fits = []
    for train, cbs in (batches, [GradientAccumulationCB(3)]), (large, []):
        set_seed(0)
        learn = Learner(
            nn.Linear(4, 3).double(), DataLoaders(train, train), losses[kind],
            torch.optim.Adam, 0.05, cbs)
        learn.fit(2)
        fits.append(weights(learn))
    assert_close(*fits, rtol=0, atol=1e-10)

class GradsCB(Callback):
    "The gradient of each batch by itself, and those that reach the step"
    def before_fit(self, learn): self.single, self.grads = [], []
    def after_loss(self, learn):
        if learn.training:
            self.single.append(
                torch.autograd.grad(learn.loss, learn.model.weight, retain_graph=True)[
                    0]
            )
    def after_backward(self, learn): self.grads.append(learn.model.weight.grad.clone())


# ---- mixed precision -----------------------------------------------------------------

class FakeScaler:
    "Scales by 4; says of the given steps that they overflow"
    def __init__(self, bad=()):
        self.scale_now, self.bad, self.i, self.unscaled, self.calls = (
            4.0, bad, 0, False, [])
    def scale(self, loss): return loss*self.scale_now
    def get_scale(self): return self.scale_now
    def unscale_(self, opt):
        assert not self.unscaled, 'unscaled twice'
        self.unscaled = True; self.calls.append('unscale')
        for p in opt.param_groups[0]['params']: p.grad /= self.scale_now
    def step(self, opt):
        assert self.unscaled
        self.calls.append('step')
        if self.i not in self.bad: opt.step()
    def update(self):
        if self.i in self.bad and self.calls[-1] == 'step': self.scale_now /= 2
        if self.calls[-1] == 'step': self.i += 1
        self.unscaled = False

def test_skipped_steps_count_nowhere():
    schedule, average, clip = (
        ScheduleCB(lr=linear(0.1, 0.01)), WeightAveragingCB(1.0), GradientClipCB(0.5))
    learn = learner(
        MixedPrecisionCB(torch.float16, FakeScaler(bad=(0, 1, 4))), schedule, average,
        clip, GradientAccumulationCB(2), MetricsCB(), n=64)
    learn.fit(2)
    assert (
        learn.n_taken, learn.n_steps, average.average.weight,
        len(schedule.values['lr']), len(clip.norms)) == (5, 8, 5.0, 5, 8)
    assert_close(torch.tensor(schedule.values['lr']), torch.linspace(.1, .01, 8)[:5])
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

def test_gradients_of_a_skipped_step_are_gone_also_with_a_momentum_learner():
    class SpoilCB(Callback):
        order = -5                                   # before the accumulation
        def after_backward(self, learn):
            if learn.iter == 0: learn.model.weight.grad.fill_(math.inf)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**4)
    mixed = MixedPrecisionCB(torch.float16, scaler)
    learn = learner(mixed, SpoilCB(), cls=MomentumLearner, momentum=.9)
    learn.fit(1)
    assert (
        mixed.n_skipped == 1 and learn.n_taken == 6 and weights(learn).isfinite().all())

@pytest.mark.parametrize('n_acc', [1, 2])
def test_float16_scaling_changes_nothing_that_float32_can_hold(n_acc):
    class PlainLoss(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(4, 3))
        # no matrix product: not autocast
        def forward(self, x): return (x[:, :, None]*self.w).sum(1)
    fits = []
    for cbs in (
        [
            MixedPrecisionCB(
                torch.float16, torch.amp.GradScaler('cpu', init_scale=2.0**8))
        ],
        [],
    ):
        learn = learner(
            *cbs, GradientAccumulationCB(n_acc), GradientClipCB(0.4), model=PlainLoss())
        learn.fit(2)
        fits.append(weights(learn))
    assert_close(*fits, rtol=0, atol=1e-6)

def test_scaler_state_goes_on():
    a = MixedPrecisionCB(torch.float16, torch.amp.GradScaler('cpu', init_scale=2.**24))
    learner(a).fit(2)
    b = MixedPrecisionCB(torch.float16, torch.amp.GradScaler('cpu'))
    b.load_state_dict(a.state_dict())
    assert b.state_dict() == a.state_dict() and a.state_dict()['scale'] < 2.**24
    with pytest.raises(ValueError, match='same dtype'): b.load_state_dict({})

def test_without_a_dtype_a_training_goes_on_in_its_own():
    "Another kind of device would have chosen another one"
    for theirs, dtype in (
        (torch.amp.GradScaler('cpu', init_scale=8.0).state_dict(), torch.float16),
        ({}, torch.bfloat16),
    ):

        class LoadCB(Callback):
            order = 1000
            def before_fit(self, learn): mixed.load_state_dict(theirs)
            def after_predict(self, learn): assert learn.preds.dtype == dtype
        learn = learner(mixed := MixedPrecisionCB(), LoadCB())
        learn.fit(1)
        assert (mixed.scaler is not None) == bool(theirs) and learn.n_taken
        with pytest.raises(ValueError, match='same dtype'):
            learner(
                mixed := MixedPrecisionCB(torch.bfloat16 if theirs else torch.float16),
                LoadCB()).fit(1)

@pytest.mark.parametrize('cancel', [CancelStep, CancelBatch, CancelFit])
def test_a_given_scaler_survives_a_last_step_that_was_cancelled(cancel):
    class LastCB(Callback):
        order = 10
        def after_backward(self, learn):
            if learn.iter == 6: raise cancel()
    learn = learner(
        MixedPrecisionCB(torch.float16, torch.amp.GradScaler('cpu', init_scale=2.0**8)),
        LastCB())
    learn.fit(1)
    learn.fit(1, opt=learn.opt)
    assert learn.n_taken == 6 and weights(learn).isfinite().all()

@pytest.mark.parametrize(
    'event',
    ['before_batch', 'after_predict', 'after_loss', 'after_backward', 'after_batch'])
def test_autocast_is_left_whatever_happens(event):
    class FailCB(Callback): order = -100 if event == 'before_batch' else 0
    setattr(FailCB, event, lambda self, learn: 1/0)
    with pytest.raises(ZeroDivisionError):
        learner(MixedPrecisionCB(torch.bfloat16), FailCB()).fit(1)
    assert not torch.is_autocast_enabled('cpu')

class BackwardCB(Callback):
    def backward(self, learn): learn.backward()


def test_only_one_may_do_the_backward():
    with pytest.raises(ValueError, match='backward'):
        learner(MixedPrecisionCB(), BackwardCB()).fit(1)


# ---- averages and files --------------------------------------------------------------

def test_average_covers_batchnorm_and_leaves_integers():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    average, states = WeightAveragingCB(1., validates=False), []
    class StatesCB(Callback):
        def after_step(self, learn):
            states.append(copy.deepcopy(learn.model.state_dict()))
    learner(average, StatesCB(), model=model).fit(2)
    with average.averaged(model):
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                assert_close(
                    value, torch.stack([s[name] for s in states]).mean(0), rtol=0,
                    atol=1e-6)
            else:
                assert value == states[-1][name]
    for name, value in model.state_dict().items():
        assert_close(value, states[-1][name], rtol=0, atol=0)

@pytest.mark.parametrize(
    'cancel', [CancelPhase, CancelFit, CancelBatch, KeyError, KeyboardInterrupt])
def test_trained_weights_come_back(cancel):
    class InValidCB(Callback):
        def after_loss(self, learn):
            if not learn.training: raise cancel()
    reference = learner(); reference.fit(1, valid=False)
    learn = learner(WeightAveragingCB(.5), InValidCB())
    with contextlib.suppress(KeyError, KeyboardInterrupt): learn.fit(1)
    assert_close(weights(learn), weights(reference), rtol=0, atol=0)

def test_of_two_averages_one_can_be_validated():
    with pytest.raises(ValueError, match='validates=False'):
        learner(WeightAveragingCB(0.9), WeightAveragingCB(0.99)).fit(1)
    reference, learn = (
        learner(),
        learner(WeightAveragingCB(0.9), WeightAveragingCB(0.99, validates=False)))
    for it in reference, learn: it.fit(2)
    assert_close(weights(learn), weights(reference), rtol=0, atol=0)

def test_validating_only_uses_the_average_and_keeps_it():
    learn = learner(MetricsCB(), average := WeightAveragingCB(.9))
    learn.fit(2)
    last, before = learn.history[-1]['valid_loss'], average.average.weight
    learn.fit(1, train=False)
    assert (
        learn.history[-1]['valid_loss'] == pytest.approx(last, abs=1e-7)
        and average.average.weight == before)

def test_weights_of_best_epoch_are_restored_after_errors_too(tmp_path):
    class FailCB(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 3: raise KeyError()
    learn = learner(
        MetricsCB(), end := EndCB(),
        best := SaveBestCB(tmp_path / 'best.pt', restore=True), FailCB(), lr=2.0)
    with pytest.raises(KeyError): learn.fit(5)
    assert_close(weights(learn), end.weights[best.best_epoch], rtol=0, atol=0)

def test_validating_only_touches_neither_best_file_nor_weights(tmp_path):
    learn = learner(MetricsCB(), SaveBestCB(tmp_path/'best.pt', restore=True))
    learn.fit(2)
    saved = torch.load(tmp_path/'best.pt')
    with torch.no_grad(): learn.model.weight.zero_()
    learn.fit(1, train=False)
    assert_close(torch.load(tmp_path/'best.pt'), saved, rtol=0, atol=0)
    assert not learn.model.weight.any()

def test_a_file_of_another_training_is_not_restored(tmp_path):
    torch.save({'foreign': 1}, tmp_path/'best.pt')
    class NaNScore:
        higher_is_better = True
        def reset(self): pass
        def update(self, preds, targets): pass
        def compute(self): return torch.tensor(math.nan)
    learner(
        MetricsCB(score=NaNScore()),
        SaveBestCB(tmp_path / 'best.pt', 'valid_score', restore=True)).fit(2)
    assert torch.load(tmp_path/'best.pt') == {'foreign': 1}

def test_nothing_old_is_restored_when_a_second_fit_is_refused(tmp_path):
    learn = learner(
        metrics := MetricsCB(Accuracy()),
        SaveBestCB(tmp_path / 'best.pt', 'valid_accuracy', mode='max', restore=True))
    learn.fit(1)
    with torch.no_grad(): learn.model.weight.zero_()
    del metrics.metrics['accuracy']
    with pytest.raises(ValueError, match='no metric'): learn.fit(1)
    assert not learn.model.weight.any()

def test_only_the_first_process_writes(tmp_path, monkeypatch):
    for name in 'is_initialized', 'get_rank':
        monkeypatch.setattr(torch.distributed, name, lambda: 1)
    learner(MetricsCB(), best := SaveBestCB(tmp_path/'best.pt')).fit(1)
    assert (
        not (tmp_path / 'best.pt').exists() and best.best_epoch == 0
        and CSVLogCB.main_only)

def test_a_variable_of_the_environment_makes_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '8')  # left over from something else
    learner(
        MetricsCB(), SaveBestCB(tmp_path / 'best.pt'), CSVLogCB(tmp_path / 'log.csv')
    ).fit(1)
    assert (tmp_path/'best.pt').exists() and (tmp_path/'log.csv').exists()

def test_write_whole_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / 'missing/a.txt', lambda path: path.write_text('x'))
    def fail(path): path.write_text('half'); raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'): write_whole(tmp_path/'a.txt', fail)
    assert list(tmp_path.iterdir()) == []

class Interrupted:
    "A file in whose `nth` write somebody presses Ctrl-C, or the disk fails"
    def __init__(self, error, nth): self.error, self.left = error, nth
    def __call__(self, path, mode):
        self.file = open(path, mode)
        return self
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, data):
        self.left -= 1
        if self.left == 0: raise self.error
        return self.file.write(data)

@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'disk full')])
def test_an_error_while_tensors_are_written_keeps_its_name(
    tmp_path, monkeypatch, error
):
    "torch closes the half file on its way out, and fails a second time"
    state, ended = nn.Linear(30, 10).state_dict(), 0
    for nth in range(1, 60):
        opened = Interrupted(error, nth)
        monkeypatch.setattr(nntrain.files, 'open', opened, raising=False)
        try: nntrain.files._save_tensors(state, tmp_path/'a.pt')
        except type(error) as e: assert e is error
        else: ended += 1
    assert 0 < ended < 59

def test_log_has_every_digit_and_every_column(tmp_path):
    learn = learner(MetricsCB(Accuracy()), CSVLogCB(tmp_path/'log.csv'), ProgressCB())
    learn.fit(3)
    with open(tmp_path / 'log.csv', newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == learn.history


class StillCB(Callback):
    "Nothing moves"
    def step(self, learn): pass

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('beta', [1., .999])
def test_the_average_of_ones_is_one_in_every_type(tmp_path, dtype, beta):
    model = nn.Linear(1, 1).to(dtype)
    with torch.no_grad():
        for p in model.parameters(): p.fill_(1)
    x = torch.ones(3000, 1, dtype=dtype)
    learn = Learner(
        model,
        DataLoaders.from_tensors((x, x), (x[:1], x[:1]), batch_size=1),
        F.mse_loss,
        cbs=[
            StillCB(), average := WeightAveragingCB(beta), MetricsCB(),
            SaveBestCB(tmp_path / 'best.pt')],
    )
    learn.fit(1)
    assert_close(average.average.mean[0], torch.ones(1, 1), rtol=0, atol=1e-3)
    saved = torch.load(tmp_path/'best.pt')['weight']
    assert saved.dtype == dtype and abs(saved - 1) < 1e-3
    assert abs(learn.history[0]['valid_loss'] - 1) < 1e-2         # (1 + 1 - 1)²

class Wave(nn.Module):
    "A complex weight, and a state that is no tensor"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1 + 1j, 2 - 1j, 0.5j, 1.0]))
    def forward(self, x): return (x*self.w).sum(1).abs()
    def get_extra_state(self): return {'note': 'mine'}
    def set_extra_state(self, state): pass

def test_complex_weights_are_averaged():
    class PathCB(Callback):
        def before_fit(self, learn): self.path = []
        def after_step(self, learn): self.path.append(learn.model.w.detach().clone())
    x = torch.randn(40, 4)
    learn = Learner(
        Wave(), DataLoaders.from_tensors((x, x[:, 0]), (x, x[:, 0]), batch_size=8),
        F.mse_loss, lr=0.3, cbs=[path := PathCB(), average := WeightAveragingCB(1.0)])
    learn.fit(1)
    assert_close(average.average.mean[0], torch.stack(path.path).mean(0))
    with average.averaged(learn.model):
        assert_close(learn.model.w.detach(), torch.stack(path.path).mean(0))
    # predictions are made with what was validated
    assert WeightAveragingCB.changes_model

def test_the_best_of_an_earlier_fit_is_not_restored_over_other_weights(tmp_path):
    class RefuseCB(Callback):
        def __init__(self, order): self.order = order
        def before_fit(self, learn): raise ZeroDivisionError
    learn = learner(MetricsCB(), SaveBestCB(tmp_path/'best.pt', restore=True))
    # before and after SaveBestCB has begun
    for order in -50, 50:
        learn.fit(1)
        with torch.no_grad(): learn.model.weight.zero_()
        with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=[RefuseCB(order)])
        assert not learn.model.weight.any()

def test_a_best_file_that_somebody_spoilt_is_named(tmp_path, capsys):
    class SpoilCB(Callback):
        order = 99
        def after_epoch(self, learn): (tmp_path/'a.pt').write_bytes(b'junk')
    learn = learner(MetricsCB(), SaveBestCB(tmp_path/'a.pt', restore=True), SpoilCB())
    learn.fit(1)
    assert 'a.pt cannot be read: the weights are those' in capsys.readouterr().out

def test_two_do_not_save_into_one_file(tmp_path):
    first, second = (SaveBestCB(tmp_path/'a.pt') for _ in range(2))
    with pytest.raises(ValueError, match='would both write the file .*a.pt'):
        learner(MetricsCB(), first, second).fit(1)
    learner(MetricsCB(), first, SaveBestCB(tmp_path/'b.pt')).fit(1)

def test_an_average_is_put_only_into_its_own_model():
    average = WeightAveragingCB()
    plain = nn.Linear(4, 3)
    with pytest.raises(ValueError, match='no average for this model yet: fit first'):
        average.averaged(plain).__enter__()
    learn = learner(average)
    learn.fit(1)
    larger = nn.Sequential(learn.model, nn.Linear(3, 3))
    before = [p.detach().clone() for p in larger.parameters()]
    with pytest.raises(ValueError, match='give the model that was trained'):
        average.averaged(larger).__enter__()
    assert_close([*larger.parameters()], before, rtol=0, atol=0)

def test_a_best_file_that_is_gone_is_named(tmp_path, capsys):
    class DeleteCB(Callback):
        order = 500
        def after_fit(self, learn): (tmp_path/'best.pt').unlink()
    learn = learner(
        MetricsCB(), SaveBestCB(tmp_path / 'best.pt', restore=True), DeleteCB())
    learn.fit(1)
    assert 'best.pt is gone' in capsys.readouterr().out

@pytest.mark.parametrize('part', [False, True])
def test_compiled_models_are_saved_under_their_own_names(tmp_path, part):
    def model(compiled):
        body, norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        compile = (
            partial(torch.compile, backend='eager') if compiled
            else lambda module: module)
        return (
            nn.Sequential(compile(body), norm) if part
            else compile(nn.Sequential(body, norm)))
    learn = learner(
        MetricsCB(), SaveBestCB(tmp_path / 'best.pt', restore=True), model=model(True))
    learn.fit(1)
    saved = torch.load(tmp_path/'best.pt')
    plain = model(False)
    assert (
        list(saved) == list(plain.state_dict())
        and saved._metadata == plain.state_dict()._metadata)
    plain.load_state_dict(saved)
    for a, b in zip(plain.parameters(), learn.model.parameters()):
        assert_close(a, b, rtol=0, atol=0)

@pytest.mark.parametrize('name', ['best', 'best.of.all.pt', '.hidden'])
def test_any_name_of_a_file_will_do_but_no_folder(tmp_path, name):
    learner(
        MetricsCB(), SaveBestCB(tmp_path / name, restore=True),
        CSVLogCB(tmp_path / f'{name}-log')).fit(1)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, f'{name}-log'])
    for kind in SaveBestCB, CSVLogCB:
        with pytest.raises(ValueError, match='is a folder: name a file in it'):
            kind(tmp_path)
        with pytest.raises(ValueError, match=r'^\. is a folder: name a file in it'):
            kind('')

@pytest.mark.parametrize('make', [
    CSVLogCB, SaveBestCB, CSVTracker, lambda path: ProfileCB(trace=path),
    lambda path: write_whole(path, lambda path: path.write_text('x'))])
def test_a_path_below_a_file_is_refused_at_once(tmp_path, make):
    (tmp_path/'notes.txt').write_text('mine')
    says = re.escape(f'{tmp_path/"notes.txt"} is a file, not a folder')
    for path in tmp_path/'notes.txt/run.csv', tmp_path/'notes.txt/deep/run.csv':
        with pytest.raises(ValueError, match=says): make(path)
    assert (tmp_path/'notes.txt').read_text() == 'mine'

def test_two_owners_of_one_file_or_profiler_are_refused(tmp_path):
    path = tmp_path/'run.csv'
    pairs = [(CSVLogCB(path), CSVLogCB(path), f'the file {path}'),
             (CSVLogCB(path), TrackerCB(CSVTracker(path)), f'the file {path}'),
             (ProfileCB(), ProfileCB(), 'the profiler of torch')]
    for one, two, what in pairs:
        with pytest.raises(ValueError, match=f'would both write {re.escape(what)}'):
            learner(MetricsCB(), one, two).fit(1)
    learner(MetricsCB(), CSVLogCB(path), CSVLogCB(tmp_path/'b.csv')).fit(1)
    assert path.read_text() == (tmp_path/'b.csv').read_text()

@pytest.mark.skipif(os.name == 'nt', reason='modes of files')
def test_written_files_have_the_mode_of_any_new_file(tmp_path):
    (tmp_path/'new').touch()
    write_whole(tmp_path/'a.txt', lambda path: path.write_text('x'))
    assert stat.S_IMODE((tmp_path / 'a.txt').stat().st_mode) == stat.S_IMODE(
        (tmp_path / 'new').stat().st_mode)

@pytest.mark.parametrize(
    'spoil',
    [
        lambda t: t, lambda t: '\ufeff' + t, lambda t: t.replace(',', '\t'),
        lambda t: t.replace('.', ':').replace(',', ';').replace(':', ',')],
)
def test_a_log_goes_on_after_a_spreadsheet_has_saved_it(tmp_path, spoil):
    path = tmp_path/'log.csv'
    first = learner(MetricsCB(), CSVLogCB(path)); first.fit(2)
    path.write_text(spoil(path.read_text(encoding='utf-8')), encoding='utf-8')
    second = learner(MetricsCB(), CSVLogCB(path, append=True)); second.fit(1)
    with open(path, newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert [
        {k: float(v) for k, v in row.items()} for row in rows
    ] == first.history + second.history

@pytest.mark.parametrize(
    'content', [b'name,price\nbread,3\n', b'\xff\xfe\x00e', b'epoch,a\n1,2,3\n'])
def test_a_file_that_is_no_log_is_left_alone(tmp_path, content):
    (tmp_path/'log.csv').write_bytes(content)
    for append in True, False:
        with pytest.raises(ValueError, match='not a log of a run'):
            learner(MetricsCB(), CSVLogCB(tmp_path/'log.csv', append=append)).fit(1)
        assert (tmp_path/'log.csv').read_bytes() == content


# ---- monitors ------------------------------------------------------------------------

class Script:
    higher_is_better = False
    def __init__(self, values): self.values, self.i = values, -1
    def reset(self): self.i += 1
    def update(self, preds, targets): pass
    def compute(self): return torch.tensor(self.values[self.i], dtype=torch.float32)

numbers = st.lists(
    st.one_of(st.integers(0, 4).map(float), st.just(math.nan), st.just(math.inf)),
    min_size=1, max_size=9)

@settings(max_examples=40, deadline=None)
@given(numbers, st.integers(1, 3))
def test_early_stopping_against_a_plain_loop(values, patience):
    best, best_at, epochs = None, None, 0
    for i, v in enumerate(values):
        epochs = i + 1
        if not math.isnan(v) and (best is None or v < best):
            best, best_at, waited = v, i, 0
        else:
            waited = waited + 1 if i else 1
        if waited >= patience: break
    learn = learner(
        MetricsCB(score=Script(values)),
        stop := EarlyStoppingCB('valid_score', patience=patience), n=8)
    learn.fit(len(values), train=False)
    assert (len(learn.history), stop.best, stop.best_epoch) == (epochs, best, best_at)

def test_a_stopped_training_stays_stopped():
    stop = EarlyStoppingCB('valid_score', patience=1)
    learner(MetricsCB(score=Script([1., 1., 0.])), stop).fit(3, train=False)
    class LoadCB(Callback):
        order = 1000
        def before_fit(self, learn): stop.load_state_dict(state)
    state = stop.state_dict()
    again = learner(MetricsCB(score=Script([0.])), stop, LoadCB())
    again.fit(1, train=False)
    assert again.history == []

class Share(Script): higher_is_better = True
class Mute(Script): higher_is_better = None

@pytest.mark.parametrize(
    'metric, monitor, best',
    [
        (Accuracy(), 'valid_accuracy', max),
        (Share([1.0, 3.0, 2.0]), 'valid_share', max),
        (Script([3.0, 1.0, 2.0]), 'valid_script', min),
        (Accuracy(), 'train_loss', min)],
)
@pytest.mark.parametrize('kind', ['stop', 'save', 'reduce'])
def test_the_metric_says_what_is_better(tmp_path, metric, monitor, best, kind):
    metric = copy.deepcopy(metric)
    make = dict(
        stop=partial(EarlyStoppingCB, patience=9),
        save=partial(SaveBestCB, tmp_path / 'best.pt'),
        reduce=partial(ReduceOnPlateauCB, patience=9))
    learn = learner(MetricsCB(metric), watch := make[kind](monitor), lr=2.)
    learn.fit(3, train=not isinstance(metric, Script))
    assert watch.best == best(row[monitor] for row in learn.history)

def test_where_nobody_knows_what_is_better_it_is_asked():
    for mode, best in ('min', 1.), ('max', 2.):
        learner(
            MetricsCB(Mute([1.0, 2.0])), watch := MonitorCB('valid_mute', mode)
        ).fit(2, train=False)
        assert watch.best == best
    with pytest.raises(
        ValueError, match="is a higher valid_mute better.*mode='max' or mode='min'"
    ):
        learner(MetricsCB(Mute([1.])), MonitorCB('valid_mute')).fit(1)

def test_the_best_of_another_metric_is_no_best():
    watch = MonitorCB('valid_loss')
    learner(MetricsCB(), watch).fit(1)
    for other in MonitorCB('train_loss'), MonitorCB(mode='max'):
        with pytest.raises(ValueError, match='best values cannot be compared'):
            other.load_state_dict(watch.state_dict())

@pytest.mark.parametrize(
    'make',
    [
        lambda: EarlyStoppingCB('valid_acuracy'), lambda: ReduceOnPlateauCB('accuracy'),
        lambda: SaveBestCB('x.pt', 'loss'), lambda: MonitorCB('epoch')],
)
def test_unknown_metrics_are_refused_before_the_first_batch(
    make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = learner(MetricsCB(Accuracy()), make())
    before = weights(learn)
    with pytest.raises(ValueError, match='no metric'): learn.fit(1)
    assert_close(weights(learn), before, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []


# ---- others --------------------------------------------------------------------------

@pytest.mark.parametrize(
    'make',
    [
        lambda: BatchLimitCB(0), lambda: EarlyStoppingCB(patience=1.5),
        lambda: GradientAccumulationCB(-1), lambda: GradientClipCB(),
        lambda: GradientClipCB(math.inf), lambda: MonitorCB(mode='lower'),
        lambda: ReduceOnPlateauCB(factor=2.0), lambda: RNNRegularizerCB(beta=math.nan),
        lambda: StopOnNonFiniteCB(False), lambda: WeightAveragingCB(math.nan),
        lambda: WeightAveragingCB(every=0), lambda: MixedPrecisionCB('float16')],
)
def test_bad_arguments_are_refused_at_once(make):
    with pytest.raises(ValueError, match='got|give'): make()

def test_non_finite_validation_loss_stops_too():
    class SpoilCB(Callback):
        order = -10
        def after_loss(self, learn):
            if not learn.training: learn.loss = learn.loss*math.inf
    learn = learner(stop := StopOnNonFiniteCB(10), SpoilCB())
    learn.fit(3)
    assert stop.stopped == 'valid loss inf in epoch 0, batch 0'

@pytest.mark.parametrize(
    'cbs',
    [
        lambda: [BatchLimitCB(4)], lambda: [BatchLimitCB(4, 1)],
        lambda: [SingleBatchCB()]],
)
@pytest.mark.parametrize('valid', [True, False])
def test_non_finite_loss_is_found_though_the_phase_is_left_early(cbs, valid):
    class SpoilCB(Callback):
        order = -10
        def after_loss(self, learn):
            if learn.training and (learn.epoch, learn.iter) == (1, 0):
                learn.loss = learn.loss * math.nan
    learn = learner(stop := StopOnNonFiniteCB(50), SpoilCB(), *cbs())
    learn.fit(5, valid=valid)
    assert (stop.stopped, learn.epoch) == ('train loss nan in epoch 1, batch 0', 1)

def test_limits_of_batches_plan_the_schedule():
    learn = learner(
        BatchLimitCB(3, 1), GradientAccumulationCB(2),
        schedule := ScheduleCB(lr=linear(1.0, 0.0)), MetricsCB())
    learn.fit(2)
    assert (learn.n_taken, learn.n_steps, schedule.values['lr'][-1]) == (4, 4, 0.)
    learn = learner(BatchLimitCB(100), MetricsCB()); learn.fit(1)
    assert (learn.n_taken, learn.n_steps) == (7, 7)

def test_memory_is_reset_before_each_phase():
    class Memory(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.log = nn.Linear(4, 3), []
        def reset(self): self.log.append('reset')
        def forward(self, x): self.log.append(len(x)); return self.lin(x)
    learn = learner(ModelResetCB(), model=Memory(), n=16)
    learn.fit(2)
    assert learn.model.log == 2*['reset', 8, 8, 'reset', 16]

def test_penalties_keep_no_graph():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(4, 3)
        def forward(self, x):
            states = self.lin(x)[:, None].expand(-1, 2, -1)
            return self.lin(x), states, states * 1
    learner(penalties := RNNRegularizerCB(), model=Net()).fit(1, valid=False)
    assert penalties.states.grad_fn is None and copy.deepcopy(
        penalties).dropped.shape == (2, 2, 3)

def test_confusions_of_the_newest_validation_only():
    learn = learner(table := ConfusionMatrixCB('abc')); learn.fit(2)
    assert (
        table.matrix.sum() == len(table.preds) == 20
        and table.matrix.trace() == (table.preds == table.targets).sum())
    assert (
        sum(count for count, _, _ in table.most_confused(100))
        == (table.preds != table.targets).sum())

def test_a_cancelled_step_keeps_the_gradient_for_the_next():
    class SkipFirstCB(Callback):
        order = 10
        def after_backward(self, learn):
            if learn.iter == 0: raise CancelStep()
    fits = []
    for cbs in [MixedPrecisionCB(torch.float16, FakeScaler())], []:
        set_seed(0)
        learn = learner(*cbs, SkipFirstCB(), n=16, model=nn.Linear(4, 3).double())
        for dl in (learn.dls.train, learn.dls.valid): dl.x = dl.x.double()
        learn.fit(1)
        fits.append(weights(learn))
    assert_close(*fits, rtol=0, atol=1e-12)


# ---- resumed trainings (chapter 11b) -------------------------------------------------

@pytest.mark.parametrize('stop_at', [(1, 0), (1, 3), (2, 1)])
def test_every_memory_survives_an_interruption(tmp_path, stop_at):
    checkpoint = pytest.importorskip('nntrain.checkpoint')
    class KillCB(Callback):
        order, watches = 2000, True
        def before_batch(self, learn):
            if learn.training and (learn.epoch, learn.iter) == stop_at:
                raise KeyboardInterrupt
    def fit(name, kill=False):
        cbs = [
            GradientAccumulationCB(2), MixedPrecisionCB(torch.bfloat16),
            GradientClipCB(1.0), WeightAveragingCB(0.9), MetricsCB(Accuracy()),
            EarlyStoppingCB(patience=3), ReduceOnPlateauCB(patience=1),
            SaveBestCB(tmp_path / f'{name}-best.pt', restore=True),
            checkpoint.CheckpointCB(tmp_path / f'{name}.pt', every_batches=1)]
        learn = learner(*cbs, *[KillCB()]*kill, lr=.5, opt_func=torch.optim.Adam)
        with contextlib.suppress(KeyboardInterrupt): learn.fit(4)
        return learn
    whole = fit('whole')
    fit('cut', kill=True)
    cut = fit('cut')
    assert_close(weights(cut), weights(whole), rtol=0, atol=0)
    assert [
        {k: v for k, v in row.items() if k != 'seconds'} for row in cut.history
    ] == [{k: v for k, v in row.items() if k != 'seconds'} for row in whole.history]


def test_validating_an_average_between_forward_and_backward_keeps_the_graph():
    average = WeightAveragingCB(.5)
    learn = Learner(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), None,
        F.cross_entropy)
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    average.average.update([t.detach()*2 for t in learn.model.state_dict().values()])
    loss = F.cross_entropy(learn.model(x), y)
    with average.averaged(learn.model): pass
    # the weights are those of the forward pass
    loss.backward()
    assert all(p.grad.isfinite().all() for p in learn.model.parameters())


# ---- what the chapter shows in words
# ---------------------------------------------------

def scripted(values, *cbs):
    learn = learner(MetricsCB(score=Script(values)), *cbs, n=8)
    learn.fit(len(values), train=False)
    return learn

def test_small_gains_do_not_count_one_by_one():
    watch = MonitorCB('valid_score', min_delta=.1)
    scripted([3., 2., 1.95, 1.92, 1.95], watch)
    assert (watch.best, watch.best_epoch, watch.waited) == (2., 1, 3)

def test_a_monitor_needs_its_metric():
    with pytest.raises(ValueError, match="no metric 'valid_loss'"):
        learner(MetricsCB(), MonitorCB()).fit(1, valid=False)
    for cb in MonitorCB(), CSVLogCB('never.csv'), TrackerCB(print):
        with pytest.raises(ValueError, match=f'{type(cb).__name__} needs MetricsCB'):
            learner(cb).fit(1)

def rates(values, *cbs):
    scores = [v for value in values for v in (9., value)]
    learner(MetricsCB(score=Script(scores)), end := EndCB(), *cbs, n=8).fit(len(values))
    return end.lrs

def test_no_rate_is_reduced_below_the_limit_or_raised_to_it():
    flat = [1.]*10
    assert (
        min(rates(flat, ReduceOnPlateauCB('valid_score', patience=1, min_lr=0.03)))
        == 0.03)
    assert (
        rates(flat, ReduceOnPlateauCB('valid_score', patience=1, min_lr=0.2))
        == [0.1] * 10)

def test_somebody_who_restores_the_rate_is_noticed():
    class RestoreCB(Callback):
        def before_batch(self, learn): learn.opt.param_groups[0]['lr'] = .1
    with pytest.raises(ValueError, match='a schedule writes them too'):
        rates([1.]*4, ReduceOnPlateauCB('valid_score', patience=1), RestoreCB())

class Unsized:
    "A loader without a length"
    def __init__(self, batches): self.batches = batches
    def __iter__(self): return iter(self.batches)

def unsized(*cbs):
    batches = list(learner(n=48).dls.train)
    dls = DataLoaders(Unsized(batches), batches)
    return Learner(nn.Linear(4, 3), dls, F.cross_entropy, cbs=cbs)

def test_without_a_length_groups_run_over_the_border_of_epochs():
    learn = unsized(GradientAccumulationCB(4))           # 6 batches an epoch
    learn.fit(2)
    assert (learn.n_taken, learn.n_steps) == (3, None)
    with pytest.raises(ValueError, match='no length'):
        unsized(WeightAveragingCB(start=.5)).fit(1)

def test_half_a_group_is_part_of_the_state():
    class BreakCB(Callback):
        def before_batch(self, learn):
            if learn.iter == 2: raise CancelFit()
    cb = GradientAccumulationCB(4)
    learn = learner(cb, BreakCB())
    learn.fit(1, valid=False)
    assert cb.state_dict() == {'count': 2, 'total': 16, 'unit': 8}
    assert learn.model.weight.grad.abs().max() > 0
    other = GradientAccumulationCB(4)
    other.load_state_dict(cb.state_dict())
    assert other.state_dict() == cb.state_dict()

def test_a_schedule_reaches_its_end_under_accumulation():
    schedule = ScheduleCB(lr=linear(.1, 0.))
    learner(GradientAccumulationCB(4), schedule).fit(3)  # 7 batches an epoch: 2 steps
    assert_close(torch.tensor(schedule.values['lr']), torch.linspace(.1, 0, 6))

def test_autocast_covers_predictions_and_not_gradients():
    kinds = []
    class KindCB(Callback):
        def after_predict(self, learn): kinds.append((learn.phase, learn.preds.dtype))
        def after_backward(self, learn): kinds.append(learn.model.weight.grad.dtype)
    learner(MixedPrecisionCB(torch.bfloat16), KindCB(), n=8).fit(1)
    assert kinds[:2] == [('train', torch.bfloat16), torch.float32]
    assert set(kinds[2:]) == {('valid', torch.bfloat16)}
    with pytest.raises(ValueError, match='needs no scaler'):
        MixedPrecisionCB(torch.bfloat16, torch.amp.GradScaler('cpu'))

def test_norms_are_those_of_unscaled_gradients():
    norms = []
    for cbs in [MixedPrecisionCB(torch.float16, FakeScaler())], []:
        learner(
            *cbs, clip := GradientClipCB(max_norm=0.5), GradientAccumulationCB(2)
        ).fit(1)
        norms.append(torch.tensor(clip.norms))
    assert_close(*norms, rtol=1e-2, atol=1e-3)
    assert repr(GradientClipCB(1.)) == 'GradientClipCB(max_norm=1.0, max_value=None)'

def test_averages_start_late_and_take_every_second_step():
    class PathCB(Callback):
        def before_fit(self, learn): self.path = []
        def after_step(self, learn):
            self.path.append(learn.model.weight.detach().clone())
    late = WeightAveragingCB(1., start=.5, every=2, validates=False)
    learner(path := PathCB(), late, n=48).fit(2)         # 12 steps
    expected = torch.stack([path.path[i] for i in (7, 9, 11)]).mean(0)
    assert_close(late.average.mean[0], expected)

def test_a_writer_that_adds_a_suffix_is_told(tmp_path):
    def adds(path): path.with_name(path.name + '.npy').write_text('array')
    with pytest.raises(FileNotFoundError, match='some writers add a suffix'):
        write_whole(tmp_path/'a', adds)
    assert list(tmp_path.iterdir()) == []

def test_a_log_keeps_earlier_rows_only_if_asked(tmp_path):
    def rows():
        with open(tmp_path/'log.csv', newline='', encoding='utf-8') as f:
            return [
                (r['epoch'], bool(r.get('valid_accuracy'))) for r in csv.DictReader(f)]
    learner(MetricsCB(Accuracy()), CSVLogCB(tmp_path/'log.csv')).fit(2)
    learner(MetricsCB(), CSVLogCB(tmp_path/'log.csv', append=True)).fit(1)
    assert rows() == [('0', True), ('1', True), ('0', False)]
    learner(MetricsCB(), CSVLogCB(tmp_path/'log.csv')).fit(1)
    assert rows() == [('0', False)]

def test_confusions_need_as_many_predictions_as_classes():
    with pytest.raises(ValueError, match='for these 2 classes'):
        learner(ConfusionMatrixCB('ab')).fit(1)

def test_leave_out_a_batch_or_an_epoch():
    class SkipBrokenCB(Callback):
        order, n = -8, 0
        def before_batch(self, learn):
            broken = learn.training and not learn.xb[0].isfinite().all()
            if broken: self.n += 1; raise CancelBatch()
    class RestCB(Callback):
        def before_epoch(self, learn):
            if 0 < learn.epoch < learn.n_epochs - 1: raise CancelEpoch()
    learn = learner(skip := SkipBrokenCB(), RestCB(), MetricsCB(), n=48)
    learn.dls.train.x[7] = math.nan
    learn.fit(4)
    assert (skip.n, learn.n_taken) == (2, 10)
    assert [row['epoch'] for row in learn.history] == [0, 3]
    assert weights(learn).isfinite().all()


# ---- trackers and the profiler
# ---------------------------------------------------------

def test_a_tracker_gets_the_loss_itself_and_counts_steps_taken():
    calls = []
    tracker = TrackerCB(lambda numbers, step: calls.append((step, numbers)), every=1)
    scaler = FakeScaler(bad=(0,))
    learn = learner(MixedPrecisionCB(torch.float16, scaler), MetricsCB(), tracker, n=24)
    # 3 batches, one step is skipped
    learn.fit(2)
    assert [step for step, _ in calls] == [1, 2, 2, 3, 4, 5, 5]
    assert all(0 < n['batch_loss'] < 4 for _, n in calls if 'batch_loss' in n)
    assert [n for _, n in calls if 'epoch' in n] == learn.history

def test_a_tracker_like_tensorboards_writer():
    class Writer:
        def __init__(self): self.scalars = []
        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))
    writer = Writer()
    def log(numbers, step):
        for name, value in numbers.items(): writer.add_scalar(name, value, step)
    learner(MetricsCB(), TrackerCB(log)).fit(1)
    assert {name for name, *_ in writer.scalars} >= {'train_loss', 'valid_loss'}
    assert TrackerCB.main_only

@pytest.mark.parametrize(
    'make, error',
    [
        (lambda: TrackerCB('wandb'), TypeError),
        (lambda: TrackerCB(print, every=0), ValueError),
        (lambda: ProfileCB(n_batches=0), ValueError),
        (lambda: ProfileCB(skip=-1), ValueError),
        (lambda: ProfileCB().table(), ValueError)],
)
def test_trackers_and_profilers_refuse(make, error):
    with pytest.raises(error): make()

@pytest.mark.parametrize('limit', [[], [BatchLimitCB(4)]], ids=['whole', 'left early'])
def test_a_profile_of_a_few_batches(tmp_path, limit):
    profile = ProfileCB(skip=3, n_batches=2, trace=tmp_path/'trace.json')
    learn = learner(profile, *limit)
    before = learner()
    learn.fit(2), before.fit(2) if not limit else None
    calls = {e.key: e.count for e in profile.profile.key_averages()}
    assert calls['aten::cross_entropy_loss'] == (1 if limit else 2)
    assert (tmp_path/'trace.json').stat().st_size > 1000
    assert len(profile.table(3).splitlines()) == 3
    if not limit: assert_close(weights(learn), weights(before), rtol=0, atol=0)

def test_a_profile_ends_when_the_fit_is_left():
    class FailCB(Callback):
        def after_predict(self, learn):
            if learn.iter == 3: raise KeyError('a bug')
    profile = ProfileCB(skip=2, n_batches=9)
    with pytest.raises(KeyError): learner(profile, FailCB()).fit(1)
    assert not profile.running and profile.table()
    learner(again := ProfileCB(0, 1)).fit(1)             # another one can begin
    assert again.table()


@pytest.mark.parametrize('ask', [
    lambda cb: cb.matrix, lambda cb: cb.most_confused(), lambda cb: cb.plot()])
def test_a_matrix_needs_a_validation(ask):
    for table in ConfusionMatrixCB('abc'), ConfusionMatrixCB('abc'):
        with pytest.raises(ValueError, match='nothing was validated yet'): ask(table)
        learner(table).fit(1, valid=False)
        with pytest.raises(ValueError, match='nothing was validated yet'): ask(table)

def test_a_matrix_refuses_what_names_no_classes():
    for bad in 5, None:
        with pytest.raises(ValueError, match='classes must be a list of names, got'):
            ConfusionMatrixCB(bad)
    learner(table := ConfusionMatrixCB('abc')).fit(1)
    with pytest.raises(ValueError, match='n must be a whole'): table.most_confused('x')


# ---- edges of the arguments, and what others see

@pytest.mark.parametrize(
    'make, says',
    [
        (lambda: MonitorCB(min_delta=-1.), 'min_delta must be'),
        (lambda: EarlyStoppingCB(patience=0), 'patience must be a whole number'),
        (lambda: ReduceOnPlateauCB(patience=0), 'patience must be a whole number'),
        (lambda: ReduceOnPlateauCB(factor=1.), 'factor must lie'),
        (lambda: ReduceOnPlateauCB(factor=0), 'factor must lie'),
        (lambda: ReduceOnPlateauCB(min_lr=-1.), 'min_lr must be'),
        (lambda: StopOnNonFiniteCB(every=0), 'every must be a whole number'),
        (lambda: BatchLimitCB(n_valid=0), 'n_valid must be a whole number'),
        (lambda: GradientAccumulationCB(0), 'n_batches must be a whole number'),
        (lambda: GradientAccumulationCB(2.5), 'n_batches must be a whole number'),
        (lambda: GradientAccumulationCB(True), 'n_batches must be a whole number'),
        (lambda: GradientClipCB(max_norm=0), 'the limit must be'),
        (lambda: GradientClipCB(max_norm=math.nan), 'the limit must be'),
        (lambda: GradientClipCB(max_value=-1.), 'the limit must be'),
        (lambda: GradientClipCB(1., 1.), 'give one of max_norm and max_value'),
        (lambda: MixedPrecisionCB(torch.float64), 'dtype must be torch.float16'),
        (lambda: WeightAveragingCB(beta=1.5), 'beta'),
        (lambda: WeightAveragingCB(beta=-.1), 'beta'),
        (lambda: WeightAveragingCB(start=1.), r'start must lie in \[0, 1\)'),
        (lambda: RNNRegularizerCB(alpha=-1.), 'alpha must be'),
        (lambda: EarlyStoppingCB(3), "such as 'valid_loss', got 3"),
        (lambda: ReduceOnPlateauCB(factor='x'), 'factor must lie'),
        (lambda: WeightAveragingCB('x'), 'beta must lie'),
        (lambda: MixedPrecisionCB(scaler=5), 'scaler must be a torch.amp.GradScaler'),
        (lambda: GradientClipCB(), 'give one of max_norm and max_value, got neither'),
        (lambda: GradientClipCB(1., 1.), 'got both'),
    ],
)
def test_the_first_number_that_is_too_much_is_refused(make, says):
    with pytest.raises(ValueError, match=says): make()

def test_a_healthy_run_is_not_stopped():
    learn = learner(stop := StopOnNonFiniteCB())
    learn.fit(2)
    assert (stop.stopped, learn.epoch, learn.n_taken) == (None, 1, 14)

def test_who_comes_after_the_clipping_sees_the_clipped_gradient():
    class NormCB(Callback):
        def before_fit(self, learn): self.norms = []
        def after_backward(self, learn):
            grads = [p.grad.norm() for p in learn.model.parameters()]
            self.norms.append(torch.stack(grads).norm().item())
    class EarlierCB(NormCB): order = -100
    class LaterCB(NormCB): order = After(GradientClipCB)
    later, clip, earlier = LaterCB(), GradientClipCB(max_norm=.3), EarlierCB()
    learner(later, clip, earlier).fit(1)
    assert_close(torch.tensor(earlier.norms), torch.tensor(clip.norms))
    assert max(later.norms) < .3001 < max(earlier.norms)

def test_a_model_without_a_memory_to_empty_is_refused_in_words():
    with pytest.raises(TypeError, match=r'Linear has no method reset\(\)'):
        learner(ModelResetCB()).fit(1)

@pytest.mark.parametrize('loss_func, targets, weight', [
    # class 1 is ignored
    (partial(F.cross_entropy, weight=torch.tensor([1., 2., 9.]), ignore_index=1),
     torch.tensor([0, 1, 2, 2]), 1 + 9 + 9),
    (nn.CrossEntropyLoss(), torch.tensor([0, -100]), 1),
    (F.mse_loss, torch.ones(2), 2)])
def test_a_batch_counts_what_its_loss_divides_by(loss_func, targets, weight):
    learn = Learner(nn.Identity(), None, loss_func)
    learn.batch = targets, targets
    assert learn.loss_weight() == weight


# ---- what the chapter says -----------------------------------------------------------

def test_plateaus_are_those_of_torch():
    "Ours reacts to the epoch that was one too many, torch's scheduler one epoch later"
    scores = [3., 2., 2., 2., 1., 1., 1., 1., 1., 0.]
    def lrs_with(*cbs):
        script, end = Script([v for score in scores for v in (9., score)]), EndCB()
        learner(MetricsCB(score=script), end, *cbs).fit(len(scores))
        return end.lrs
    ours = lrs_with(ReduceOnPlateauCB('valid_score', patience=2, factor=.5))
    torchs = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=.5, patience=1,
                     threshold=0.)
    theirs = lrs_with(TorchSchedulerCB(torchs, per='epoch', metric='valid_score'))
    assert ours == [.1]*3 + [.05]*3 + [.025]*2 + [.0125]*2
    assert ours[:9] == theirs[:9]       # torch's is not advanced after the last epoch
    with pytest.raises(ValueError, match='keep one of'):
        lrs_with(ReduceOnPlateauCB('valid_score'), ScheduleCB(lr=linear(.1, .01)))

class NoteWeightsCB(Callback):
    "Keep a copy of the weights after each epoch"
    order = 30
    def before_fit(self, learn): self.seen = []
    def after_epoch(self, learn):
        self.seen.append(copy.deepcopy(learn.model.state_dict()))

def test_the_best_weights_come_back_after_early_stopping(tmp_path):
    scores = 3., 1., 2., 2., 2., 0.
    script = Script([v for score in scores for v in (9., score)])
    best = SaveBestCB(tmp_path/'deep/best.pt', 'valid_score', restore=True)
    stop = EarlyStoppingCB('valid_score', patience=2)
    learn = learner(MetricsCB(score=script), note := NoteWeightsCB(), stop, best)
    learn.fit(6)
    assert len(learn.history) == 4
    saved = torch.load(best.path, weights_only=True)            # a plain state_dict
    assert_close(saved, dict(note.seen[1]), rtol=0, atol=0)     # of the second epoch
    assert_close(learn.model.weight.data, saved['weight'], rtol=0, atol=0)

def test_the_best_file_holds_what_was_validated(tmp_path):
    best = SaveBestCB(tmp_path/'averaged.pt')
    learner(MetricsCB(), ema := WeightAveragingCB(.9), best).fit(1)
    saved = torch.load(best.path, weights_only=True)
    assert_close(saved['weight'], ema.average.mean[0])

def test_class_weights_and_ignored_targets_count_as_in_the_large_batch():
    weight = torch.tensor([1., 2., 9.], dtype=torch.float64)
    uneven = partial(F.cross_entropy, weight=weight, ignore_index=1)
    def final(n_batches, batch_size):
        learn = learner(GradientAccumulationCB(n_batches), n=100, batch_size=batch_size,
                        model=nn.Linear(4, 3).double())
        for dl in learn.dls.train, learn.dls.valid: dl.x = dl.x.double()
        for p in learn.model.parameters(): nn.init.zeros_(p)
        learn.loss_func = uneven
        learn.fit(3)
        return learn.model.weight
    assert_close(final(4, 16), final(1, 64), rtol=0, atol=1e-12)

def test_has_bfloat16_asks_the_hardware():
    cpu = Path('/proc/cpuinfo')                                 # Linux only
    flags = cpu.read_text() if cpu.exists() else ''
    if 'avx2' not in flags: pytest.skip('this machine does not say what it can do')
    assert has_bfloat16('cpu') == ('avx512bw' in flags)
