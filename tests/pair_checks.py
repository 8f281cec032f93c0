"""Every pair of callbacks, asked four questions"""
from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import pkgutil
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

import nntrain
from nntrain import state
from nntrain.accumulate import GradientAccumulationCB
from nntrain.activations import ActivationStatsCB, UpdateRatioCB
from nntrain.annealing import AnnealCB, AutoAnnealCB
from nntrain.augment import AugmentCB
from nntrain.average import WeightAveragingCB
from nntrain.callback import Callback
from nntrain.callbacks import BatchLimitCB, StopOnNonFiniteCB
from nntrain.checkpoint import CheckpointCB
from nntrain.clip import GradientClipCB
from nntrain.confusion import ConfusionMatrixCB
from nntrain.cycles import one_cycle
from nntrain.distributed import AccelerateCB
from nntrain.history import RecorderCB
from nntrain.logs import CSVLogCB, TrackerCB
from nntrain.lr_finder import LRFinderCB
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.monitors import EarlyStoppingCB, MonitorCB, ReduceOnPlateauCB
from nntrain.trial import small_learner
from nntrain.precision import MixedPrecisionCB
from nntrain.prepare import BatchTransformCB, DeviceCB, NormalizeCB, SingleBatchCB
from nntrain.profiling import ProfileCB
from nntrain.progress import ProgressCB
from nntrain.run_folder import SaveRunCB
from nntrain.saving import SaveBestCB
from nntrain.schedule_free import ScheduleFreeCB, ScheduleFreeSGD
from nntrain.sequences import ModelResetCB, RNNRegularizerCB
from nntrain.soft_targets import CutMixCB, MixUpCB
from nntrain.steering import ScheduleCB
from nntrain.torch_schedulers import TorchSchedulerCB
from nntrain.transforms import RandomFlip


class Net(nn.Module):
    "As in `small_learner`, but it can carry a memory, and give its states"
    def __init__(self, remembers, gives):
        super().__init__()
        self.first, self.act, self.head = nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)
        self.remembers, self.gives = remembers, gives
        self.reset()
    def reset(self): self.memory = None
    def forward(self, x):
        h = self.act(self.first(x.flatten(1)))
        if self.remembers:
            if self.memory is not None: h = h + .5*self.memory[:len(h)]
            self.memory = h.detach()
        out = self.head(h)
        return (out, h[:, None], h[:, None]) if self.gives else out


class CountsCB(Callback):
    "Counts by itself; at the end, `wrong` names those who have counted otherwise"
    order, watches = 10, True
    def before_fit(self, learn):
        self.batches = self.tries = self.steps = self.epochs = 0
        self.losses, self.rates, self.wrong = [], [], None
    def before_phase(self, learn): self.phase_rows, self.sums = 0, 0.
    def after_loss(self, learn):
        n = learn.count()
        if not learn.training: self.rows = self.phase_rows = self.phase_rows + n; return
        self.batches += 1
        self.losses.append(learn.loss.item())
    def after_backward(self, learn): self.tries += 1
    def after_step(self, learn):
        self.steps += 1
        self.rates.append(float(learn.opt.param_groups[0]['lr']))
    def after_epoch(self, learn): self.epochs += 1
    def cleanup_fit(self, learn):
        notes = [(type(cb).__name__, *row) for cb in learn.active
                 for row in self.expected(cb, learn)]
        self.wrong = [f'{name}: {what} is {got}, expected {want}'
                      for name, what, got, want in notes if got != want]
    def expected(self, cb, learn):
        "(what, as it has counted, as it should have)"
        steps, kind = self.steps, type(cb)
        if kind is MetricsCB: yield 'rows', len(learn.history), self.epochs
        if kind is RecorderCB: yield 'losses', cb.values['loss'], self.losses
        if kind is GradientClipCB: yield 'norms', len(cb.norms), self.tries
        if kind is TorchSchedulerCB: yield 'steps', cb.n_done, steps
        if kind is ScheduleCB: yield 'rates', cb.values['lr'], self.rates
        if kind is UpdateRatioCB:
            yield 'ratios', {*map(len, cb.ratios.values())}, {steps}
        if kind is ActivationStatsCB:
            yield 'batches', {*map(len, cb.means.values())}, {self.batches}
        if kind is ConfusionMatrixCB and hasattr(cb, 'targets'):
            yield 'rows', cb.matrix.sum().item(), self.rows
        if kind is WeightAveragingCB:
            yield 'weight', round(cb.average.weight, 9), round(1 - .9**steps, 9)
        if kind is LRFinderCB: yield 'rates', len(cb.lrs), max(0, steps-1)
        if kind is CSVLogCB:
            yield 'lines', len(cb.path.read_text().splitlines()), 1 + self.epochs
        if kind is TrackerCB:
            told = [row['epoch'] for _, row in cb.log.rows if 'epoch' in row]
            yield 'epochs', told, [*range(self.epochs)]
            told = [step for step, row in cb.log.rows if 'epoch' not in row]
            yield 'steps', told, [*range(2, steps+1, 2)]
    def state_dict(self):
        kept = 'batches', 'tries', 'steps', 'epochs', 'losses', 'rates'
        return {name: getattr(self, name) for name in kept}
    def load_state_dict(self, its):
        vars(self).update({k: copy.copy(v) for k, v in its.items()})


def learner(*cbs):
    "The learner for these callbacks"
    learn = small_learner(*cbs)
    def there(cls): return any(isinstance(cb, cls) for cb in cbs)
    model = Net(there(ModelResetCB), there(RNNRegularizerCB))
    old = [p for p in learn.model.parameters()]
    with torch.no_grad():
        for p, q in zip(model.parameters(), old): p.data = q.data.clone()
    learn.model = model
    learn.cbs = (*learn.cbs, CountsCB())
    if there(ScheduleFreeCB): learn.opt_func = ScheduleFreeSGD
    return learn


def brighter(batch, by=.1): return batch[0] + by, batch[1]
class Log:
    "What a tracker was told"
    def __init__(self): self.rows = []
    def __call__(self, numbers, step): self.rows.append((step, numbers))
def tracker(): return TrackerCB(Log(), 2)
def schedule(high=.2): return ScheduleCB(lr=one_cycle(high))
def steps(size=2):
    return TorchSchedulerCB(partial(torch.optim.lr_scheduler.StepLR, step_size=size))
def float16(scale=2.**8):
    scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    return MixedPrecisionCB(torch.float16, scaler)
def augment(p=.5): return AugmentCB(RandomFlip(p))


class Entry(NamedTuple):
    make: object           # makes the callback
    other: object = None   # makes it with another setting
    why: str = ''          # why there is none


WATCHES = 'it only watches'
PLACE = 'a place is no setting'
NONE = 'it has no arguments'
PAIRS = {
    'GradientAccumulationCB': Entry(
        partial(GradientAccumulationCB, 3), partial(GradientAccumulationCB, 2)),
    'ActivationStatsCB': Entry(ActivationStatsCB, why=WATCHES),
    'UpdateRatioCB': Entry(UpdateRatioCB, why=WATCHES),
    'AnnealCB': Entry(partial(AnnealCB, .9, 'epoch'),
                      partial(AnnealCB, .8, 'epoch')),
    'AutoAnnealCB': Entry(partial(AutoAnnealCB, .95), partial(AutoAnnealCB, .9)),
    'AugmentCB': Entry(augment, partial(augment, .6)),
    'WeightAveragingCB': Entry(
        partial(WeightAveragingCB, .9), partial(WeightAveragingCB, .8)),
    'BatchLimitCB': Entry(partial(BatchLimitCB, 2, 1), partial(BatchLimitCB, 1, 1)),
    'StopOnNonFiniteCB': Entry(StopOnNonFiniteCB, why=WATCHES),
    'CheckpointCB': Entry(
        partial(CheckpointCB, 'run.pt', every_batches=2, quiet=True), why=WATCHES),
    'GradientClipCB': Entry(
        partial(GradientClipCB, max_norm=.3), partial(GradientClipCB, max_norm=.4)),
    'ConfusionMatrixCB': Entry(partial(ConfusionMatrixCB, 'abc'), why=WATCHES),
    'AccelerateCB': Entry(AccelerateCB, why=PLACE),
    'RecorderCB': Entry(RecorderCB, why=WATCHES),
    'CSVLogCB': Entry(partial(CSVLogCB, 'log.csv'), why=WATCHES),
    'TrackerCB': Entry(tracker, why=WATCHES),
    'LRFinderCB': Entry(partial(LRFinderCB, 1e-2, 1., 30, 1e9),
                        partial(LRFinderCB, 1e-2, 2., 30, 1e9)),
    'MetricsCB': Entry(partial(MetricsCB, Accuracy()), why=WATCHES),
    'EarlyStoppingCB': Entry(
        partial(EarlyStoppingCB, min_delta=9., patience=1),
        partial(EarlyStoppingCB, min_delta=9., patience=2)),
    'MonitorCB': Entry(MonitorCB, partial(MonitorCB, 'train_loss')),
    'ReduceOnPlateauCB': Entry(
        partial(ReduceOnPlateauCB, min_delta=9., patience=1),
        partial(ReduceOnPlateauCB, min_delta=9., patience=1, factor=.2)),
    'MixedPrecisionCB': Entry(
        partial(MixedPrecisionCB, torch.bfloat16), partial(MixedPrecisionCB)),
    'float16': Entry(float16, partial(float16, 2.**7)),
    'BatchTransformCB': Entry(partial(BatchTransformCB, brighter),
                              partial(BatchTransformCB, partial(brighter, by=.2))),
    'DeviceCB': Entry(partial(DeviceCB, 'cpu'), why=PLACE),
    'NormalizeCB': Entry(partial(NormalizeCB, .1, 2.), partial(NormalizeCB, .1, 3.)),
    'SingleBatchCB': Entry(SingleBatchCB, why=NONE),
    'ProfileCB': Entry(partial(ProfileCB, 0, 1), why=WATCHES),
    'ProgressCB': Entry(ProgressCB, why=WATCHES),
    'SaveRunCB': Entry(partial(SaveRunCB, '.', {}), why=WATCHES),
    'SaveBestCB': Entry(
        partial(SaveBestCB, 'best.pt', 'train_loss', 'max', restore=True),
        partial(SaveBestCB, 'best.pt', 'train_loss', 'max')),
    'ScheduleFreeCB': Entry(ScheduleFreeCB, why=NONE),
    'ModelResetCB': Entry(ModelResetCB, why=NONE),
    'RNNRegularizerCB': Entry(
        partial(RNNRegularizerCB, .5, .5), partial(RNNRegularizerCB, .4, .5)),
    'CutMixCB': Entry(CutMixCB, partial(CutMixCB, .9)),
    'MixUpCB': Entry(MixUpCB, partial(MixUpCB, .5)),
    'ScheduleCB': Entry(schedule, partial(schedule, .1)),
    'TorchSchedulerCB': Entry(steps, partial(steps, 3)),
}


def exported():
    "All callbacks that the modules of the package export, by name"
    found = {}
    for info in pkgutil.iter_modules(nntrain.__path__):
        if info.name.startswith('_'): continue
        module = importlib.import_module(f'nntrain.{info.name}')
        for name in getattr(module, '__all__', ()):
            cls = getattr(module, name)
            if inspect.isclass(cls) and issubclass(cls, Callback) and cls is not Callback:
                found[name] = cls
    return found


@contextlib.contextmanager
def torchs_chance():
    """Of the random states keep torch's only, which all callbacks draw from: the 1,249
    numbers of Python's and NumPy's take most of the time of a checkpoint"""
    old = state.random_state, state.set_random_state
    state.random_state = lambda: {'torch': torch.get_rng_state()}
    state.set_random_state = lambda its: torch.set_rng_state(its['torch'])
    try: yield
    finally: state.random_state, state.set_random_state = old
