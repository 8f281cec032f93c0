"""Every pair of callbacks, asked four questions"""
from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import inspect
import json
import pkgutil
import sys
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import nntrain
from nntrain import run_folder, state
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
from nntrain.history import ColumnsCB, RecorderCB
from nntrain.logs import CSVLogCB, LearningRateCB, TrackerCB
from nntrain.lr_finder import LRFinderCB
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.monitors import EarlyStoppingCB, MonitorCB, ReduceOnPlateauCB
from nntrain.pairs import Asker
from nntrain.small_runs import Answer, first_difference, small_learner
from pair_by_hand import ByHand
from nntrain.photo_runs import ProgressiveCB
from nntrain.photo_transforms import RandomResizedCrop
from nntrain.precision import MixedPrecisionCB
from nntrain.prepare import BatchTransformCB, DeviceCB, NormalizeCB, SingleBatchCB
from nntrain.profiling import ProfileCB, ThroughputCB
from nntrain.progress import ProgressCB
from nntrain.run_folder import SaveRunCB
from nntrain.saving import SaveBestCB
from nntrain.schedule_free import ScheduleFreeCB, ScheduleFreeSGD
from nntrain.sequences import ModelResetCB, RNNRegularizerCB
from nntrain.soft_targets import CutMixCB, MixUpCB
from nntrain.steering import ScheduleCB
from nntrain.tape import TapeCB
from nntrain.torch_schedulers import TorchSchedulerCB
from nntrain.transforms import RandomFlip


HERE = Path(__file__).parent


class Net(nn.Module):
    "As in `small_learner`, but it can carry a memory, and give its states"
    def __init__(self, remembers, gives):
        super().__init__()
        self.first, self.act, self.head = nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)
        self.remembers, self.gives = remembers, gives
        self.reset()
    def reset(self): self.memory = None
    def forward(self, x):
        if x.shape[-1] != 4: x = F.interpolate(x, (4, 4))       # a crop has grown
        h = self.act(self.first(x.flatten(1)))
        if self.remembers:
            if self.memory is not None: h = h + .5*self.memory[:len(h)]
            self.memory = h.detach()
        out = self.head(h)
        return (out, h[:, None], h[:, None]) if self.gives else out


class CountsCB(Callback):
    "Counts by itself, and complains at the end of those who have counted otherwise"
    order, watches = 10, True
    def before_fit(self, learn):
        self.batches = self.tries = self.steps = self.epochs = 0
        self.losses, self.rates, self.resumed = [], [], False
    def before_phase(self, learn): self.phase_rows = 0
    def after_loss(self, learn):
        if not learn.training:
            self.phase_rows += learn.world.sum(torch.tensor(learn.count())).item()
            self.rows = self.phase_rows
            return
        self.batches += 1
        self.losses.append(learn.loss.float().item())
    def after_backward(self, learn): self.tries += 1
    def after_step(self, learn):
        self.steps += 1
        self.rates.append(float(learn.opt.param_groups[0]['lr']))
    def after_epoch(self, learn): self.epochs += 1
    def cleanup_fit(self, learn):
        if self.resumed or sys.exc_info()[1] is not None: return
        notes = [(type(cb).__name__, *row) for cb in learn.active
                 if learn.world.hears(cb, 'after_step')
                 for row in self.expected(cb, learn)]
        wrong = [f'{name}: {what} is {got}, expected {want}'
                 for name, what, got, want in notes if got != want]
        if wrong: raise AssertionError('; '.join(wrong))
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
        if kind is LearningRateCB and self.tries == steps:
            yield 'rate', learn.history[-1]['lr'], self.rates[-1]
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
        vars(self).update({k: copy.copy(v) for k, v in its.items()}, resumed=True)


def learner(*cbs):
    "The learner for these callbacks"
    learn = small_learner(*cbs)
    def there(cls): return any(isinstance(cb, cls) for cb in cbs)
    model = Net(there(ModelResetCB), there(RNNRegularizerCB))
    old = [p for p in learn.model.parameters()]
    with torch.no_grad():
        for p, q in zip(model.parameters(), old): p.data = q.data.clone()
    learn.model = model
    crops = (AugmentCB(cb.crop) for cb in cbs if isinstance(cb, ProgressiveCB))
    learn.cbs = (*learn.cbs, *crops, CountsCB())
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
def grows(sizes=(2, 3)): return ProgressiveCB(RandomResizedCrop(4), sizes)


class Entry(NamedTuple):
    make: object           # makes the callback
    other: object = None   # makes it with another setting
    why: str = ''          # why there is none


WATCHES = 'it only watches'
PLACE = 'a place is no setting'
NONE = 'it has no arguments'
PAIRS = {
    # batches and models
    'DeviceCB': Entry(partial(DeviceCB, 'cpu'), why=PLACE),
    'BatchLimitCB': Entry(partial(BatchLimitCB, 2, 1), partial(BatchLimitCB, 1, 1)),
    'SingleBatchCB': Entry(SingleBatchCB, why=NONE),
    'BatchTransformCB': Entry(partial(BatchTransformCB, brighter),
                              partial(BatchTransformCB, partial(brighter, by=.2))),
    'NormalizeCB': Entry(partial(NormalizeCB, .1, 2.), partial(NormalizeCB, .1, 3.)),
    'AugmentCB': Entry(augment, partial(augment, .6)),
    'ProgressiveCB': Entry(grows, partial(grows, (2,))),
    'MixUpCB': Entry(MixUpCB, partial(MixUpCB, .5)),
    'CutMixCB': Entry(CutMixCB, partial(CutMixCB, .9)),
    'ModelResetCB': Entry(ModelResetCB, why=NONE),
    'RNNRegularizerCB': Entry(
        partial(RNNRegularizerCB, .5, .5), partial(RNNRegularizerCB, .4, .5)),
    # steps
    'GradientAccumulationCB': Entry(
        partial(GradientAccumulationCB, 3), partial(GradientAccumulationCB, 2)),
    'MixedPrecisionCB': Entry(
        partial(MixedPrecisionCB, torch.bfloat16), partial(MixedPrecisionCB)),
    'MixedPrecisionCB float16': Entry(float16, partial(float16, 2.**7)),
    'GradientClipCB': Entry(
        partial(GradientClipCB, max_norm=.3), partial(GradientClipCB, max_norm=.4)),
    # rates
    'ScheduleCB': Entry(schedule, partial(schedule, .1)),
    'TorchSchedulerCB': Entry(steps, partial(steps, 3)),
    'AnnealCB': Entry(partial(AnnealCB, .9, 'epoch'),
                      partial(AnnealCB, .8, 'epoch')),
    'AutoAnnealCB': Entry(partial(AutoAnnealCB, .95), partial(AutoAnnealCB, .9)),
    'ReduceOnPlateauCB': Entry(
        partial(ReduceOnPlateauCB, min_delta=9., patience=1),
        partial(ReduceOnPlateauCB, min_delta=9., patience=1, factor=.2)),
    'LRFinderCB': Entry(partial(LRFinderCB, 1e-2, 1., 30, 1e9),
                        partial(LRFinderCB, 1e-2, 2., 30, 1e9)),
    # averages
    'WeightAveragingCB': Entry(
        partial(WeightAveragingCB, .9), partial(WeightAveragingCB, .8)),
    'ScheduleFreeCB': Entry(ScheduleFreeCB, why=NONE),
    # ends, files and processes
    'StopOnNonFiniteCB': Entry(StopOnNonFiniteCB, why=WATCHES),
    'EarlyStoppingCB': Entry(
        partial(EarlyStoppingCB, min_delta=9., patience=1),
        partial(EarlyStoppingCB, min_delta=9., patience=2)),
    'MonitorCB': Entry(MonitorCB, partial(MonitorCB, 'train_loss')),
    'SaveBestCB': Entry(
        partial(SaveBestCB, 'best.pt', 'train_loss', 'max', restore=True),
        partial(SaveBestCB, 'best.pt', 'train_loss', 'max')),
    'CheckpointCB': Entry(
        partial(CheckpointCB, 'run.pt', every_batches=2, quiet=True), why=WATCHES),
    'AccelerateCB': Entry(AccelerateCB, why=PLACE),
    # who only watches
    'MetricsCB': Entry(partial(MetricsCB, Accuracy()), why=WATCHES),
    'RecorderCB': Entry(RecorderCB, why=WATCHES),
    'ColumnsCB': Entry(ColumnsCB, why=WATCHES),
    'LearningRateCB': Entry(LearningRateCB, why=WATCHES),
    'ThroughputCB': Entry(ThroughputCB, partial(ThroughputCB, 1)),
    'CSVLogCB': Entry(partial(CSVLogCB, 'log.csv'), why=WATCHES),
    'TrackerCB': Entry(tracker, why=WATCHES),
    'ProgressCB': Entry(ProgressCB, why=WATCHES),
    'SaveRunCB': Entry(partial(SaveRunCB, '.', {}), why=WATCHES),
    'ProfileCB': Entry(partial(ProfileCB, 0, 1), why=WATCHES),
    'ConfusionMatrixCB': Entry(partial(ConfusionMatrixCB, 'abc'), why=WATCHES),
    'UpdateRatioCB': Entry(UpdateRatioCB, why=WATCHES),
    'ActivationStatsCB': Entry(ActivationStatsCB, why=WATCHES),
    'TapeCB': Entry(partial(TapeCB, 6), why=WATCHES),
}


def exported():
    "All callbacks that the modules of the package export, by name"
    found = {}
    for info in pkgutil.iter_modules(nntrain.__path__):
        if info.name.startswith('_'): continue
        module = importlib.import_module(f'nntrain.{info.name}')
        for name in getattr(module, '__all__', ()):
            cls = getattr(module, name)
            kind = inspect.isclass(cls) and issubclass(cls, Callback)
            if kind and cls is not Callback: found[name] = cls
    return found


@contextlib.contextmanager
def cheaply():
    """Leave out what takes most of the time and is tested elsewhere: the 1,249 numbers
    of Python's and NumPy's random states, and the pictures of curves. At the end, what
    was frozen, so that nobody looks for garbage there, is free again"""
    new = {
        (state, 'random_state'): lambda: {'torch': torch.get_rng_state()},
        (state, 'set_random_state'): lambda its: torch.set_rng_state(its['torch']),
        (run_folder, '_write_curves'): lambda history, path: path.touch()}
    old = {place: getattr(*place) for place in new}
    try:
        for place, fn in new.items(): setattr(*place, fn)
        yield
    finally:
        gc.unfreeze()
        for place, fn in old.items(): setattr(*place, fn)


# ---- the walk through all cells ------------------------------------------------------

MAKE = {name: entry.make for name, entry in PAIRS.items()}
HALF = {'MixedPrecisionCB', 'MixedPrecisionCB float16'}


def changed(a, b):
    "The pair with one setting of one of both changed"
    if PAIRS[a].other: yield PAIRS[a].other, MAKE[b]
    if PAIRS[b].other: yield MAKE[a], PAIRS[b].other


def against_hand(asker, *names):
    "Where a fit differs from the plain loop"
    makers = [MAKE[name] for name in names]
    left = asker.left(*makers).state
    hand = ByHand(learner(*(make() for make in makers)), names).run()
    history = [(row['train_loss'], row['valid_loss']) for row in left['history']]
    got = left['n_taken'], history, [*left['model'].values()]
    tol = 1e-3 if HALF & {*names} else 1e-5
    return first_difference(got, (hand.taken, hand.history, hand.weights), tol)


def steps_of(asker, a, b):
    "As `Asker.steps`; two that act are compared with the plain loop as well"
    answer = asker.steps(MAKE[a], MAKE[b])
    if answer.kind != 'equal' or asker.watches(MAKE[a]) or asker.watches(MAKE[b]):
        return answer
    why = against_hand(asker, a, b)
    return Answer('silent', f'by hand: {why}') if why else answer


def resume_there(learner, makers):
    "Interrupted and resumed in several processes; called in each of them"
    from nntrain.distributed import AccelerateCB
    from nntrain.pairs import Asker
    return Asker(learner).resume(AccelerateCB, *makers)


class Walk:
    "All pairs, asked all questions"
    def __init__(self, two=None):
        self.asker, self.two = Asker(learner, two), two
        self.answers = {pair: {} for pair in combinations(PAIRS, 2)}

    def alone(self):
        "What is asked in one process"
        with cheaply():
            self.each_alone()
            gc.freeze()                                  # what was imported so far
            self.each_pair()
            self.pooled('resume', self.asker.resume)
        return self.answers

    def together(self):
        "What is asked in two processes"
        self.two.run(f'import gc, sys; sys.path.insert(0, {str(HERE)!r})')
        with cheaply():
            self.each_alone()
            self.asker.processes(MAKE['GradientClipCB'])     # imports what is needed
            gc.freeze(), self.two.run('gc.freeze()')
            self.pooled('processes', self.asker.processes)
            self.resumed()
        return self.answers

    def each_alone(self):
        "Each callback alone works, and those that act equal the plain loop"
        for name, make in MAKE.items():
            if answer := self.asker.left(make).answer:
                raise AssertionError(f'{name} fails alone: {answer.says}')
        self.watch = [name for name in PAIRS if self.asker.watches(MAKE[name])]
        self.act = [name for name in PAIRS if name not in self.watch]
        for name in {*self.act} - {'LearningRateCB'}:       # it adds a column
            if why := against_hand(self.asker, name):
                raise AssertionError(f'{name} alone, by hand: {why}')

    def each_pair(self):
        for (a, b), answers in self.answers.items():
            answers['steps'] = steps_of(self.asker, a, b)
            answers['settings'] = self.asker.settings(
                MAKE[a], MAKE[b], [*changed(a, b)])
            self.asker.forget(MAKE[a], MAKE[b])

    def pooled(self, question, ask):
        """Callbacks that only watch run all at once beside each other one: if this
        equals a run without them, so does each pair; if not, each pair is asked"""
        fit = [name for name in self.watch if ask(MAKE[name]).kind == 'equal']
        for first in (None, *self.act):
            names = [first]*bool(first) + fit
            if ask(*map(MAKE.get, names)).kind != 'equal': continue
            for pair in combinations(names, 2):
                if first is None or first in pair:
                    self.of(*pair)[question] = Answer('equal')
        for pair, answers in self.answers.items():
            if question not in answers: answers[question] = ask(*map(MAKE.get, pair))
            self.asker.forget(*map(MAKE.get, pair))

    def of(self, a, b):
        return self.answers[(a, b) if (a, b) in self.answers else (b, a)]

    def resumed(self):
        "Beside AccelerateCB, runs are interrupted and resumed in two processes"
        fit = [name for name in self.watch if name != 'AccelerateCB'
               and self.of('AccelerateCB', name)['processes'].kind == 'equal']
        for names in fit, *([name] for name in self.act):
            makers = list(map(MAKE.get, names))
            zero, one = self.two.run(resume_there, learner, makers, show=False)
            if zero != one: zero = Answer('crash', f'{zero.says}; {one.says}')
            for name in names: self.of('AccelerateCB', name)['resume together'] = zero


# ---- what is told of the answers -----------------------------------------------------

def faults(answers):
    "The cells that are neither equal nor refused, as text"
    return [f'{a} × {b}, {question}: {answer.kind}, {answer.says}'
            for (a, b), its in answers.items()
            for question, answer in its.items() if not answer.fine]


def stored(answers):
    "The answers by question: how many are equal, and the sentences of the others"
    asked = dict.fromkeys(question for its in answers.values() for question in its)
    found = {}
    for question in asked:
        rows = [(pair, its[question]) for pair, its in answers.items()
                if question in its]
        found[question] = {kind: sum(answer.kind == kind for _, answer in rows)
                           for kind in ('equal', 'none')}
        found[question] |= {
            'refused': [[*pair, answer.says] for pair, answer in rows
                        if answer.kind == 'refused'],
            'faults': sum(not answer.fine for _, answer in rows)}
    return found


def as_text(found):
    "What `results/pairs/pairs.json` holds"
    rows = {name: {'module': exported()[name.split()[0]].__module__.split('.')[-1],
                   'no setting': entry.why} for name, entry in PAIRS.items()}
    return json.dumps({'callbacks': rows, 'answers': found}, indent=1,
                      ensure_ascii=False) + '\n'


def missing():
    "What to add for callbacks that the package exports, and that nobody asks"
    if not (new := sorted(exported().keys() - PAIRS.keys())): return ''
    return (f'{", ".join(new)}: add a line to PAIRS in tests/pair_checks.py, with a '
            f'function that makes it, and one that makes it with another setting; if '
            f'it acts on the training, add it to tests/pair_by_hand.py as well; then '
            f'run python scripts/pairs.py')
