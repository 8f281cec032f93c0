"""Runs that are killed, and go on: the same bits at the end.
One process (the nursery) loads torch once and forks the lives that are killed."""
import contextlib
import copy
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from nntrain import lock
from nntrain.aside import aside
from nntrain.augment import AugmentCB
from nntrain.erase import RandomErase
from nntrain.soft_targets import MixUpCB
from nntrain.accumulate import GradientAccumulationCB
from nntrain.average import WeightAveragingCB
from nntrain.clip import GradientClipCB
from nntrain.precision import MixedPrecisionCB
from nntrain.callbacks import BatchLimitCB
from nntrain.logs import CSVLogCB
from nntrain.monitors import EarlyStoppingCB, ReduceOnPlateauCB
from nntrain.saving import SaveBestCB
from nntrain.checkpoint import CheckpointCB, _Rest
from nntrain.checkpoint_file import plain, read_checkpoint, write_checkpoint
from nntrain.in_steps import InSteps
from nntrain.lock import RunLock
from nntrain.facts import check_facts, training_facts
from nntrain.schedule_free import ScheduleFreeCB, ScheduleFreeSGD
from nntrain.ranks import differing, in_main, marks, others_of, take_own
from nntrain.state import (chance_state, load_optimizer, load_training_state,
                           loader_state, random_state, set_chance_state,
                           set_loader_state, set_random_state, training_state)
from nntrain.adaptive import Adam, AdamW, RMSProp
from nntrain.annealing import AutoAnnealCB
from nntrain.data import DataLoaders
from nntrain.compare import MomentumLearner
from nntrain.prepare import BatchTransformCB, DeviceCB, NormalizeCB
from nntrain.callback import Callback
from nntrain.events import CancelFit, CancelStep
from nntrain.compare import set_seed
from nntrain.learner import Learner
from nntrain.lr_finder import lr_find
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.history import last_metric
from nntrain.progress import ProgressCB
from nntrain.momentum import Momentum
from nntrain.sgd import SGD
from nntrain.cycles import one_cycle
from nntrain.schedule import at_steps, constant, cosine, linear, step_decay, wsd
from nntrain.steering import ScheduleCB
from nntrain.tensor_loader import TensorLoader
from nntrain.torch_schedulers import TorchSchedulerCB
from nntrain.zoo import LAMB

from same_bits import same_bits

NURSERY = '''
import os, random, signal, sys, time
import numpy as np, torch
from torch import nn
from nntrain.callback import Callback
from nntrain.checkpoint import CheckpointCB
from nntrain.compare import set_seed
from nntrain.cycles import one_cycle
from nntrain.data import DataLoaders
from nntrain.history import RecorderCB, last_metric
from nntrain.learner import Learner
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.prepare import BatchTransformCB
from nntrain.state import training_state
from nntrain.steering import ScheduleCB
import torch._dynamo  # what the first optimizer loads: once here, not in every life

torch.set_num_threads(1)
numbers = torch.Generator().manual_seed(0)
x = torch.randn(203, 6, generator=numbers)
y = torch.randint(0, 3, (203,), generator=numbers)

def augment(batch):
    noise = random.random() + float(np.random.randn()) + torch.randn_like(batch[0])
    return batch[0] + .1*noise, batch[1]

class ReportCB(Callback):
    order, watches = 2000, True
    def before_fit(self, learn): os.write(1, f'life {os.getpid()}\\n'.encode())

def train(folder, seed, n_epochs=40):
    set_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(),
                          nn.Dropout(.2), nn.Linear(16, 3))
    dls = DataLoaders.from_tensors((x, y), (x[:50], y[:50]), batch_size=16)
    recorder = RecorderCB(lr=lambda learn: learn.opt.param_groups[0]['lr'])
    schedule = ScheduleCB(lr=one_cycle(1e-2), momentum=one_cycle(.9))
    cbs = [MetricsCB(Accuracy()), recorder, BatchTransformCB(augment), schedule,
           ReportCB()]
    loss_func = nn.functional.cross_entropy
    learn = Learner(model, dls, loss_func, torch.optim.AdamW, .01, cbs)
    learn.fit(n_epochs, cbs=[CheckpointCB(f'{folder}/run.pt', every_batches=3)])
    state = training_state(learn)
    for row in state['history']: del row['seconds']
    torch.save(state, f'{folder}/result.pt')

def die(): os.kill(os.getpid(), signal.SIGKILL)

def half_written(nth):
    "Die while the nth checkpoint is written: half of its bytes are there"
    left, save = [nth], torch.save
    def torch_save(state, f):
        save(state, f)
        left[0] -= 1
        if not left[0]: f.truncate(f.tell()//2); die()
    torch.save = torch_save

def not_renamed(nth):
    "Die when the nth checkpoint is written, but has not got its name"
    left, replace = [nth], os.replace
    def os_replace(*args):
        left[0] -= 1
        if not left[0]: die()
        replace(*args)
    os.replace = os_replace

for line in sys.stdin:                                   # folder seed how nth
    folder, seed, how, nth = line.split()
    pid = os.fork()
    if not pid:
        if how != 'random': globals()[how](int(nth))
        code = 1
        try: train(folder, int(seed)); code = 0
        except BaseException: import traceback; traceback.print_exc()
        finally: os._exit(code)
    _, status = os.waitpid(pid, 0)
    os.write(1, f'ended {os.waitstatus_to_exitcode(status)}\\n'.encode())
'''


@pytest.mark.skipif(
    not hasattr(os, 'fork') or not hasattr(signal, 'SIGKILL'),
    reason='needs fork and SIGKILL')
def test_killed_at_ten_random_points_and_while_writing(tmp_path):
    (tmp_path/'nursery.py').write_text(NURSERY)
    (tmp_path/'calm').mkdir()
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    nursery = subprocess.Popen(
        [sys.executable, str(tmp_path / 'nursery.py')], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=env)
    def heard(what):
        for line in iter(nursery.stdout.readline, ''):
            if line.startswith(what): return int(line.split()[1])
            assert not line.startswith('ended'), f'{line.strip()} without a checkpoint'
        raise AssertionError(f'the nursery ended without saying {what!r}')
    def live(folder, seed, how='random', nth=0, seconds=None):
        nursery.stdin.write(f'{folder} {seed} {how} {nth}\n')
        nursery.stdin.flush()
        pid = heard('life')  # the first checkpoint is there
        if seconds is not None:
            time.sleep(seconds)
            # unless it has just finished
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        return heard('ended')
    def hunt(folder, longest):
        "Kill until it ends, or 12 times -> number of kills, places, delays"
        folder.mkdir()
        n_killed, places, delays = 0, [], []
        for seed in range(1000):
            how = {2: 'half_written', 5: 'not_renamed'}.get(n_killed, 'random')
            delays.append(random.uniform(0, longest))
            code = live(folder, seed, how, random.randint(2, 4),
                        delays[-1] if how == 'random' else None)
            c = read_checkpoint(folder / 'run.pt')
            places.append((c['epoch'], c['batch']))
            if code == 0: break
            assert code == -signal.SIGKILL, code
            n_killed += 1
            if how != 'random':  # the checkpoint, what was being written, the lock
                assert len(list(folder.iterdir())) == 3
            if n_killed == 12: assert live(folder, 10_000) == 0; break
        return n_killed, places, delays
    try:
        begin = time.perf_counter()
        assert live(tmp_path / 'calm', 0) == 0
        duration = time.perf_counter() - begin
        for share in 20, 40, 80:        # this computer may have been busier before
            hunted = tmp_path / f'hunted{share}'
            n_killed, places, delays = hunt(hunted, duration/share)
            if n_killed >= 10: break
        assert n_killed >= 10, (
            f'finished after {n_killed} kills; an undisturbed run took {duration:.1f} '
            f's, delays {delays}')
        assert places == sorted(places) and places[-2] > (0, 0), places
    finally:
        nursery.kill(); nursery.communicate()
    results = (torch.load(folder / 'result.pt', weights_only=True)
               for folder in (tmp_path / 'calm', hunted))
    same_bits(*results, f'after kills at {places}, delays {delays}: state')
    left = sorted(p.name for p in hunted.iterdir())
    assert left == ['result.pt', 'run.pt']      # what was half-written is swept away


# ---- in one process ------------------------------------------------------------------

X, Y = torch.randn(50, 4), torch.randint(0, 3, (50,))

class PowerFailure(Exception): pass

class CrashCB(Callback):
    order, watches = 2000, True
    def __init__(self, *at): self.at = at
    def after_batch(self, learn):
        if (learn.epoch, learn.phase, learn.iter) == self.at: raise PowerFailure()

def net(n=6, p=0.3):
    return nn.Sequential(
        nn.Linear(4, n), nn.BatchNorm1d(n), nn.Dropout(p), nn.Linear(n, 3))

def noise(batch):
    return batch[0] + 0.1 * random.random() + 0.1 * float(np.random.randn()), batch[1]

def learner(*cbs, model=net, opt_func=torch.optim.Adam, kind=Learner, train=None,
            batch_size=16, n=50, seed=0, order_seed=None,
            loss_func=nn.functional.cross_entropy, **kwargs):
    set_seed(seed)
    dls = DataLoaders.from_tensors((X[:n], Y[:n]), (X, Y), batch_size=batch_size,
                                   seed=order_seed)
    if train is not None: dls.train = train()
    cbs = [MetricsCB(Accuracy()), BatchTransformCB(noise), *cbs]
    return kind(model(), dls, loss_func, opt_func, 0.01, cbs=cbs, **kwargs)

def result(learn):
    return plain(
        {
            'model': learn.model.state_dict(),
            'optimizer': learn.opt.state_dict(),
            'random': random_state(),
            'grads': [p.grad for p in learn.model.parameters()],
            'memory': [
                cb.state_dict() for cb in learn.active
                if hasattr(cb, 'state_dict') and not isinstance(cb, MetricsCB)],
            'history': [
                {k: v for k, v in row.items() if k != 'seconds'}
                for row in learn.history],
        }
    )

def check_resume(tmp_path, make, at, n_epochs=3, every_batches=1):
    whole = make()
    whole.fit(n_epochs)
    expected, path = result(whole), tmp_path/'c.pt'
    path.unlink(missing_ok=True)
    with contextlib.suppress(PowerFailure):
        make().fit(
            n_epochs,
            cbs=[CheckpointCB(path, every_batches=every_batches), CrashCB(*at)])
    resumed = make()
    set_seed(random.randrange(1000))
    for p in resumed.model.parameters(): nn.init.normal_(p)
    resumed.fit(
        n_epochs, cbs=[callback := CheckpointCB(path, every_batches=every_batches)])
    assert callback.resumed is not None
    same_bits(expected, result(resumed))


class NoisyDataset(torch.utils.data.Dataset):
    def __len__(self): return 40
    def __getitem__(self, i): return X[i] + .1*torch.randn(4), Y[i]

def torch_loader(**kwargs):
    return torch.utils.data.DataLoader(NoisyDataset(), 8, **kwargs)

@pytest.mark.parametrize(
    'train',
    [
        partial(torch_loader, shuffle=True),
        partial(torch_loader, shuffle=True, num_workers=2),
        lambda: torch_loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
        lambda: torch_loader(
            sampler=torch.utils.data.RandomSampler(
                range(40), replacement=True, num_samples=40,
                generator=torch.Generator().manual_seed(3))),
        lambda: torch_loader(
            sampler=torch.utils.data.WeightedRandomSampler([1.0] * 40, 40)),
        lambda: [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:24], Y[16:24])],
    ],
    ids=[
        'global generator', 'workers', 'own generator', 'replacement', 'weighted',
        'list'],
)
def test_loaders(tmp_path, train):
    check_resume(tmp_path, lambda: learner(train=train), (1, 'train', 1))


def test_the_rest_of_an_epoch_begins_with_the_state_of_its_middle():
    events = []
    def loader():
        for i in range(4): events.append(f'fetch {i}'); yield i
    assert list(_Rest(loader(), 2, lambda: events.append('then'))) == [2, 3]
    assert events == ['fetch 0', 'fetch 1', 'then', 'fetch 2', 'fetch 3']


class EveryThirdCB(Callback):
    def after_backward(self, learn):
        if learn.iter % 3 != 2: raise CancelStep()

def test_gradients_that_stay(tmp_path):
    for i in range(4):
        check_resume(tmp_path, lambda: learner(EveryThirdCB()), (1, 'train', i))
    check_resume(
        tmp_path,
        lambda: learner(kind=MomentumLearner, momentum=0.8, opt_func=torch.optim.SGD),
        (1, 'train', 1))

@pytest.mark.parametrize(
    'opt_func',
    [
        partial(torch.optim.SGD, momentum=0.9, nesterov=True), torch.optim.RMSprop,
        torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, SGD, Momentum,
        RMSProp, Adam, AdamW, LAMB],
    ids=str,
)
def test_optimizers(tmp_path, opt_func):
    check_resume(
        tmp_path, lambda: learner(ScheduleCB(lr=one_cycle(0.01)), opt_func=opt_func),
        (1, 'train', 2))

def two_schedulers(opt):
    warm = torch.optim.lr_scheduler.LinearLR(opt, total_iters=3)
    cuts = torch.optim.lr_scheduler.MultiStepLR(opt, [2, 4, 4], gamma=.5)
    return torch.optim.lr_scheduler.SequentialLR(opt, [warm, cuts], [3])

@pytest.mark.parametrize(
    'schedule',
    [
        lambda: TorchSchedulerCB(
            partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)),
        lambda: TorchSchedulerCB(
            lambda opt, n_steps: torch.optim.lr_scheduler.OneCycleLR(
                opt, 0.02, total_steps=n_steps)),
        lambda: TorchSchedulerCB(
            partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0),
            per='epoch', metric='train_loss'),
        lambda: TorchSchedulerCB(
            lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.9**i)),
        lambda: TorchSchedulerCB(two_schedulers),
    ],
    ids=['step', 'one cycle', 'plateau', 'lambda', 'sequence'],
)
def test_torch_schedulers(tmp_path, schedule):
    for at in (2, 'train', 1), (1, 'valid', 0):
        check_resume(tmp_path, lambda: learner(schedule()), at, n_epochs=4)

class EverySecondCB(Callback):
    order = 5
    def after_backward(self, learn):
        if learn.iter % 2 == 0: raise CancelStep()

@pytest.mark.parametrize(
    'cbs',
    [
        lambda folder: [EarlyStoppingCB(patience=1, min_delta=0.5)],
        lambda folder: [ReduceOnPlateauCB(patience=1, min_delta=0.5)],
        lambda folder: [SaveBestCB(folder / 'best.pt', restore=True)],
        lambda folder: [GradientAccumulationCB(3), GradientClipCB(0.1)],
        lambda folder: [MixedPrecisionCB()],
        lambda folder: [MixedPrecisionCB(torch.float16), GradientAccumulationCB(2)],
        lambda folder: [
            MixedPrecisionCB(
                torch.float16, torch.amp.GradScaler('cpu', init_scale=2.0**8)),
            EverySecondCB(),
        ],
        lambda folder: [WeightAveragingCB(0.9), SaveBestCB(folder / 'best.pt')],
        lambda folder: [WeightAveragingCB(1, start=0.4)],
        lambda folder: [BatchLimitCB(2)],
        lambda folder: [AutoAnnealCB(share=0.99)],
        lambda folder: [AutoAnnealCB(share=0.99, every='batch')],
    ],
    ids=[
        'stop', 'plateau', 'best', 'accumulate and clip', 'bfloat16', 'float16',
        'float16 cancelled', 'average', 'mean', 'limit', 'anneal', 'anneal by batch'],
)
def test_callbacks_of_the_gallery(tmp_path, cbs):
    for at in (1, 'train', 0), (2, 'train', 1), (2, 'valid', 0):
        check_resume(tmp_path, lambda: learner(*cbs(tmp_path)), at, n_epochs=4)

def test_torchmetrics_in_the_middle_of_an_epoch(tmp_path):
    classification = pytest.importorskip('torchmetrics.classification')
    def make():
        learn = learner()
        learn.cbs[0].metrics['theirs'] = classification.MulticlassAccuracy(
            num_classes=3)
        return learn
    check_resume(tmp_path, make, (1, 'train', 1))

def test_metric_without_a_state_is_refused_inside_epochs_only(tmp_path):
    class Count:
        def reset(self): self.n = 0
        def update(self, preds, targets): self.n += len(targets)
        def compute(self): return torch.tensor(float(self.n))
    def make():
        return Learner(
            net(), DataLoaders.from_tensors((X, Y), (X, Y), batch_size=16),
            nn.functional.cross_entropy, cbs=[MetricsCB(Count())])
    make().fit(1, cbs=[CheckpointCB(tmp_path/'a.pt')])
    with pytest.raises(TypeError, match="metric 'count' has no state_dict"):
        make().fit(1, cbs=[CheckpointCB(tmp_path / 'b.pt', every_batches=1)])

def test_resume_again_and_again(tmp_path):
    "One training, cut after every single batch"
    whole = learner()
    whole.fit(2)
    for epoch in range(2):
        for i in range(4):
            with pytest.raises(PowerFailure):
                learner(seed=i).fit(
                    2,
                    cbs=[
                        CheckpointCB(tmp_path / 'c.pt', every_batches=1),
                        CrashCB(epoch, 'train', i)],
                )
    last = learner(seed=99)
    last.fit(2, cbs=[CheckpointCB(tmp_path/'c.pt', every_batches=1)])
    same_bits(result(whole), result(last))

def test_a_file_of_another_run_touches_nothing(tmp_path):
    path = tmp_path/'c.pt'
    learner().fit(2, cbs=[CheckpointCB(path)])
    content = path.read_bytes()
    for learn, n_epochs, said in [
        (learner(model=partial(net, 7)), 2, 'shape of 0.weight was (6, 4), is (7, 4)'),
        (learner(opt_func=torch.optim.SGD), 2, 'optimizer was Adam, is SGD'),
        (learner(n=49), 2, 'samples of the train data was 50, is 49'),
        (learner(batch_size=15), 2, 'batch_size of the train data was 16, is 15'),
        (learner(order_seed=1), 2, 'seed of the train data was None, is 1'),
        (learner(loss_func=nn.functional.nll_loss), 2, 'cross_entropy, is nll_loss'),
        (learner(opt_func=partial(torch.optim.Adam, weight_decay=.1)), 2,
         'weight_decay of parameter group 0 was 0, is 0.1'),
        (learner(WeightAveragingCB(.9)), 2, "callbacks was ['BatchTransformCB', "),
        (learner(), 3, 'n_epochs was 2, is 3'),
    ]:
        before = copy.deepcopy(learn.model.state_dict())
        with pytest.raises(ValueError) as error:
            learn.fit(n_epochs, cbs=[CheckpointCB(path)])
        assert said in str(error.value) and 'resume=False' in str(error.value)
        same_bits(dict(before), dict(learn.model.state_dict()))
        assert path.read_bytes() == content

def mixes(alpha): return MixUpCB(alpha)

def drop(*at): return ScheduleCB(lr=step_decay(.1, .1, at))
def steps(size):
    return TorchSchedulerCB(partial(torch.optim.lr_scheduler.StepLR, step_size=size))
CALLBACKS = [
    (
        partial(drop, 0.3, 0.8), partial(drop, 0.45, 0.95),
        'lr of ScheduleCB was (0.1, … 0.1, … '),
    (
        partial(EarlyStoppingCB, patience=2), partial(EarlyStoppingCB, patience=9),
        'patience of EarlyStoppingCB was 2, is 9'),
    (
        EarlyStoppingCB, partial(EarlyStoppingCB, 'train_loss'),
        "monitor of EarlyStoppingCB was 'valid_loss', is 'train_loss'"),
    (
        EarlyStoppingCB, partial(EarlyStoppingCB, mode='max'),
        "mode of EarlyStoppingCB was None, is 'max'"),
    (
        partial(ReduceOnPlateauCB, factor=0.1), partial(ReduceOnPlateauCB, factor=0.2),
        'factor of ReduceOnPlateauCB was 0.1, is 0.2'),
    (
        partial(SaveBestCB, 'a.pt'), partial(SaveBestCB, 'a.pt', min_delta=0.1),
        'min_delta of SaveBestCB was 0.0, is 0.1'),
    (
        MixedPrecisionCB, partial(MixedPrecisionCB, torch.bfloat16),
        'dtype of MixedPrecisionCB was None, is torch.bfloat16'),
    (
        partial(BatchLimitCB, 5), partial(BatchLimitCB, 6),
        'n_train of BatchLimitCB was 5, is 6'),
    (
        partial(NormalizeCB, 0.5, 1.0), partial(NormalizeCB, 0.25, 1.0),
        'mean of NormalizeCB was [0.5], is [0.25]'),
    (
        partial(NormalizeCB, torch.zeros(20), torch.ones(20)),
        partial(NormalizeCB, torch.eye(20)[3], torch.ones(20)),
        'mean of NormalizeCB was (20,) #',
    ),
    (
        partial(steps, 2), partial(steps, 3),
        'StepLR(step_size=2), is StepLR(step_size=3)'),
    (
        lambda: TorchSchedulerCB(
            lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.9**i)),
        lambda: TorchSchedulerCB(
            lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.8**i)),
        'factory of TorchSchedulerCB was',
    ),
    (
        AugmentCB, partial(AugmentCB, on_valid=True),
        'on_valid of AugmentCB was False, is True'),
]

SIGMA, TAU, BLUR = .1, .2, torch.ones(3)
def scaled(by): return lambda batch: (batch[0]*by, batch[1])
def add(x): return x + .5
def more(x): return x + .6
class Shift:
    def __init__(self, by): self.by, self.n = by, 0
    def __call__(self, batch): self.n += 1; return batch[0] + self.by, batch[1]
FUNCTIONS = [
    (scaled(2.0), scaled(3.0)),
    (lambda b: (b[0] + 0.1, b[1]), lambda b: (b[0] + 0.2, b[1])),
    (Shift(1.0), Shift(2.0)),
    (lambda b: (b[0] + SIGMA, b[1]), lambda b: (b[0] + TAU, b[1])),
    (lambda b, s=1.0: (b[0] + s, b[1]), lambda b, s=2.0: (b[0] + s, b[1])),
    (lambda b: (add(b[0]), b[1]), lambda b: (more(b[0]), b[1])),
    (partial(map, add), partial(map, more)), (scaled(BLUR), scaled(2 * BLUR)),
    (Shift(1.0).__call__, Shift(2.0).__call__), (scaled((1, 2)), scaled((1, 3))),
    (scaled(torch.arange(99.0)), scaled(torch.arange(99.0) + 1))]

def augments(p): return AugmentCB(RandomErase(p=p))

@pytest.mark.parametrize(
    'then, now, said',
    [
        (
            dict(loss_func=partial(nn.functional.cross_entropy, label_smoothing=0.1)),
            dict(loss_func=partial(nn.functional.cross_entropy, label_smoothing=0.2)),
            'was cross_entropy(label_smoothing=0.1), is '
            'cross_entropy(label_smoothing=0.2)'),
        (
            dict(loss_func=nn.CrossEntropyLoss()),
            dict(loss_func=nn.CrossEntropyLoss(label_smoothing=0.2)),
            'label_smoothing=0.2'),
        (
            dict(loss_func=nn.CrossEntropyLoss()),
            dict(loss_func=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))),
            'weight=[1.0, 2.0, 3.0]'),
        (
            dict(
                loss_func=partial(
                    nn.functional.cross_entropy, weight=torch.tensor([1.0, 2.0, 3.0]))),
            dict(
                loss_func=partial(
                    nn.functional.cross_entropy, weight=torch.tensor([1.0, 2.0, 4.0]))),
            'is cross_entropy(weight=[1.0, 2.0, 4.0])',
        ),
        (
            dict(model=partial(net, p=0.2)), dict(model=partial(net, p=0.3)),
            'settings of module 2 was p=0.2, inplace=False, is p=0.3, inplace=False'),
        (
            dict(cbs=[lambda: ScheduleCB(lr=one_cycle(0.01))]),
            dict(cbs=[lambda: ScheduleCB(lr=one_cycle(0.02))]), 'lr of ScheduleCB was'),
        (
            dict(cbs=[lambda: GradientClipCB(1.0)]),
            dict(cbs=[lambda: GradientClipCB(2.0)]),
            'max_norm of GradientClipCB was 1.0, is 2.0'),
        (
            dict(cbs=[lambda: GradientAccumulationCB(2)]),
            dict(cbs=[lambda: GradientAccumulationCB(3)]),
            'n_batches of GradientAccumulationCB was 2, is 3'),
        (
            dict(cbs=[lambda: WeightAveragingCB(0.9)]),
            dict(cbs=[lambda: WeightAveragingCB(0.99)]),
            'beta of WeightAveragingCB was 0.9, is 0.99'),
        (dict(cbs=[lambda: augments(0.5)]), dict(cbs=[lambda: augments(0.6)]), 'p=0.6'),
        (
            dict(cbs=[]), dict(cbs=[lambda: mixes(0.4)]),
            "callbacks was [], is ['MixUpCB']"),
        (
            dict(cbs=[lambda: mixes(0.4)]), dict(cbs=[lambda: mixes(0.3)]),
            'alpha of MixUpCB was 0.4, is 0.3'),
        *[
            (dict(cbs=[MetricsCB, then]), dict(cbs=[MetricsCB, now]), said)
            for then, now, said in CALLBACKS],
        *[
            (
                dict(cbs=[partial(BatchTransformCB, then)]),
                dict(cbs=[partial(BatchTransformCB, now)]),
                'tfm of BatchTransformCB was')
            for then, now in FUNCTIONS
        ],
    ],
)
def test_other_settings_are_another_run(tmp_path, then, now, said):
    def facts(model=net, loss_func=nn.functional.cross_entropy, cbs=()):
        class FactsCB(Callback):
            order = 1000
            def before_fit(self, learn):
                self.facts = training_facts(learn)
                raise CancelFit()
        seen, dls = (
            FactsCB(),
            DataLoaders.from_tensors((X[:9], Y[:9]), (X[:9], Y[:9]), batch_size=3))
        Learner(
            model(), dls, loss_func, torch.optim.Adam, 0.01,
            cbs=[seen, *(cb() for cb in cbs)]).fit(1)
        return seen.facts
    before = facts(**then)
    check_facts(
        before, facts(**then), 'c.pt')  # objects that are made anew, at other addresses
    with pytest.raises(ValueError, match=re.escape(said)):
        check_facts(before, facts(**now), 'c.pt')

def counts(log):
    n = 0
    def tfm(batch):
        nonlocal n
        n += 1; log.append(n)
        return batch
    return tfm

def test_what_a_function_notes_is_no_setting(tmp_path):
    "The same objects go on after an interruption"
    learn = learner(
        BatchTransformCB(counts([])), BatchTransformCB(Shift(1.0)), GradientClipCB(9.0))
    with pytest.raises(PowerFailure):
        learn.fit(2, cbs=[CheckpointCB(tmp_path / 'c.pt'), CrashCB(1, 'train', 1)])
    learn.fit(2, cbs=[again := CheckpointCB(tmp_path/'c.pt')])
    assert again.resumed == (1, 0)

def test_where_things_are_and_who_only_looks_on_is_no_setting(tmp_path):
    (tmp_path/'there').mkdir()
    for folder, cbs in (
        (tmp_path, []),
        (
            tmp_path / 'there',
            [CrashCB(9, 'train', 9), CSVLogCB(tmp_path / 'log.csv'), ProgressCB()])):
        if cbs:
            (
                os.rename(tmp_path / 'c.pt', folder / 'c.pt'),
                os.rename(tmp_path / 'best.pt', folder / 'best.pt'))
        learner(DeviceCB('cpu'), SaveBestCB(folder / 'best.pt'), *cbs).fit(
            1, cbs=[callback := CheckpointCB(folder / 'c.pt')])
    assert callback.resumed == (1, 0)

def tensor_loader(x, y):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)
def numpy_loader(x, y):
    class Held(torch.utils.data.Dataset):
        def __init__(self): self.data, self.targets = x.numpy(), y.tolist()
        def __len__(self): return len(x)
        def __getitem__(self, i): return torch.from_numpy(self.data[i]), self.targets[i]
    return torch.utils.data.DataLoader(Held(), 8)
def list_loader(x, y): return list(zip(x.split(8), y.split(8)))
def part_loader(x, y):
    return torch.utils.data.DataLoader(
        torch.utils.data.Subset(torch.utils.data.TensorDataset(x, y), range(40)), 8)

@pytest.mark.parametrize(
    'make', [None, tensor_loader, numpy_loader, list_loader, part_loader])
@pytest.mark.parametrize('what', ['inputs', 'targets'])
def test_other_data_of_the_same_size(tmp_path, make, what):
    for changed in False, False, True:
        learn = learner()
        x, y = (
            (X + 1, Y) if changed and what == 'inputs' else (X, (Y + 1) % 3) if changed
            else (X, Y))
        if make: learn.dls.train = make(x, y)
        else: learn.dls.train.x, learn.dls.train.y = x, y
        if not changed: learn.fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')]); continue
        with pytest.raises(ValueError, match='belongs to another run: sample of'):
            learn.fit(1, cbs=[CheckpointCB(tmp_path / 'c.pt')])

def test_settings_of_a_learner_and_of_a_module(tmp_path):
    class Scale(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by, self.lin = by, nn.Linear(4, 3)
        def forward(self, x): return self.lin(x)*self.by
    def make(momentum=0.8, by=1.0):
        return learner(
            kind=MomentumLearner, momentum=momentum, model=partial(Scale, by))
    make().fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    for learn, said in (
        (make(0.7), 'momentum of MomentumLearner was 0.8, is 0.7'),
        (make(by=2.0), 'settings of the model was'),
    ):
        with pytest.raises(ValueError, match=said):
            learn.fit(1, cbs=[CheckpointCB(tmp_path / 'c.pt')])

def test_a_state_of_another_class_is_not_taken(tmp_path):
    class One(Callback):
        order = 900
        def state_dict(self): return {}
        def load_state_dict(self, state): pass
    class Other(One): pass
    class LoadCB(Callback):
        order = 1000
        def after_epoch(self, learn): self.state = training_state(learn)
        def before_fit(self, learn):
            if hasattr(self, 'state'): load_training_state(learn, self.state)
    load = LoadCB()
    learner(One()).fit(1, cbs=[load])
    with pytest.raises(ValueError, match=r"those of .*'One'.*are .*'Other'"):
        learner(Other()).fit(1, cbs=[load])

def test_a_callback_without_settings_is_told_not_refused(tmp_path, capsys):
    learner(EveryThirdCB()).fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    learner().fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    assert (
        "callbacks without settings was ['EveryThirdCB'], is []"
        in capsys.readouterr().out)

def test_longer_is_another_plan(tmp_path, capsys):
    learner().fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    with pytest.raises(
        ValueError,
        match=re.escape(
            'finish it with fit(1). To train further after it: fit(n, opt=learn.opt)')):
        learner().fit(2, cbs=[CheckpointCB(tmp_path/'c.pt')])
    learn = learner(); learn.fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    assert (
        'nothing is trained. To train further: fit(n, opt=learn.opt) with a '
        'CheckpointCB of another path' in capsys.readouterr().out)
    step = int(learn.opt.state_dict()['state'][0]['step'])
    learn.fit(
        2, opt=learn.opt, cbs=[CheckpointCB(tmp_path / 'd.pt')])  # what it says works
    assert (
        learn.opt.state_dict()['state'][0]['step'] == 3 * step
        and len(learn.history) == 2)

def test_addresses_are_no_settings(tmp_path):
    for _ in range(2):
        learner(AugmentCB(lambda x: x)).fit(2, cbs=[CheckpointCB(tmp_path/'c.pt')])

def test_a_callback_that_fails_to_load_leaves_nothing_half_loaded(tmp_path):
    class Picky(Callback):
        refuse = False
        def state_dict(self): return {'a': 1}
        def load_state_dict(self, state):
            if self.refuse: Picky.refuse = False; raise KeyError('b')
    learner(Picky()).fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    learn = learner(Picky(), seed=5)
    before, Picky.refuse = copy.deepcopy(learn.model.state_dict()), True
    with pytest.raises(KeyError): learn.fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    same_bits(dict(before), dict(learn.model.state_dict()))
    assert not learn.opt.state

def test_lr_find_and_validation_leave_the_file_alone(tmp_path):
    learn = learner(CheckpointCB(tmp_path/'c.pt'))
    lr_find(learn, n_steps=5)
    learn.fit(1, train=False)
    assert not (tmp_path/'c.pt').exists()

def test_persistent_workers_are_refused(tmp_path):
    learn = learner(train=partial(torch_loader, num_workers=1, persistent_workers=True))
    with pytest.raises(ValueError, match='persistent_workers=False'):
        learn.fit(1, cbs=[CheckpointCB(tmp_path / 'c.pt')])
    assert list(tmp_path.iterdir()) == []

def test_a_loader_without_a_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(X[i] + 0.1 * torch.randn(4), Y[i]) for i in range(40)])
    check_resume(
        tmp_path,
        lambda: learner(train=lambda: torch.utils.data.DataLoader(Stream(), 8)),
        (1, 'train', 2))

def test_lazy_layers_are_refused_until_they_know_their_shape(tmp_path):
    learn = learner(model=lambda: nn.LazyLinear(3))
    with pytest.raises(
        ValueError,
        match=r'weight.* has no shape before the first batch.*run the model once',
    ):
        learn.fit(1, cbs=[CheckpointCB(tmp_path / 'c.pt')])
    learn.model(X)
    learn.fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])

def test_compiled_models_keep_their_own_names(tmp_path, capsys):
    "A file of a compiled model is one of the model, and the other way round"
    def compiled(): return torch.compile(net(), backend='eager')
    for at, (then, now) in enumerate(
        [(compiled, net), (net, compiled), (compiled, compiled)]
    ):
        path = tmp_path/f'{at}.pt'
        with pytest.raises(PowerFailure):
            learner(model=then).fit(
                2, cbs=[CheckpointCB(path, every_batches=1), CrashCB(1, 'train', 1)])
        state = read_checkpoint(path)
        assert not any(
            '_orig_mod' in name
            for name in [*state['model'], *state['grads'], *state['facts']])
        learner(model=now).fit(2, cbs=[CheckpointCB(path, every_batches=1)])
        assert ('compiled was' in capsys.readouterr().out) == (then != now)

def test_a_run_of_a_gpu_goes_on_without_one(tmp_path, capsys):
    path = tmp_path/'c.pt'
    with pytest.raises(PowerFailure):
        learner(MixedPrecisionCB()).fit(
            2, cbs=[CheckpointCB(path), CrashCB(1, 'train', 0)])
    state = read_checkpoint(path)
    state['circumstances']['device'], state['random']['cuda'] = (
        'cuda', [torch.get_rng_state()])
    scaler = torch.amp.GradScaler(
        'cpu', init_scale=8.0).state_dict()  # on a GPU it would have chosen float16
    state['callbacks'] = [
        [name, scaler if name == 'MixedPrecisionCB' else its]
        for name, its in state['callbacks']]
    write_checkpoint(state, path)
    learn = learner(mixed := MixedPrecisionCB())
    learn.fit(2, cbs=[CheckpointCB(path)])
    assert 'device was cuda, is cpu' in capsys.readouterr().out
    assert mixed.scaler.get_scale() == 8. and len(learn.history) == 2

class StartCB(Callback):
    "The state with which the first batch begins"
    order, watches = 2000, True
    def before_fit(self, learn): self.state = None
    def before_batch(self, learn): self.state = self.state or training_state(learn)

def test_the_parts_of_a_gpus_run_arrive(tmp_path, capsys):
    """In the middle of an epoch and of an accumulation: the states of optimizer, scaler
    and average, on the device at hand; its own random generators are left out"""
    def make(*cbs, seed=0):
        scaler = torch.amp.GradScaler('cpu', init_scale=2.**9, growth_interval=3)
        return learner(MixedPrecisionCB(torch.float16, scaler), WeightAveragingCB(.9),
                       GradientAccumulationCB(2), *cbs, seed=seed,
                       opt_func=partial(torch.optim.AdamW, fused=True))
    path = tmp_path/'c.pt'
    with pytest.raises(PowerFailure):
        make(CrashCB(2, 'train', 2)).fit(4, cbs=[CheckpointCB(path, every_batches=1)])
    state = read_checkpoint(path)
    scale = dict(state['callbacks'])['MixedPrecisionCB']
    assert scale['scale'] > 2.**9 and state['grads']       # it has grown
    state['random']['cuda'] = [torch.get_rng_state()]*8
    state['circumstances'] |= {'device': 'cuda', 'CPU threads': 64}
    write_checkpoint(state, path)
    start = StartCB()
    (resumed := make(start, seed=5)).fit(4, cbs=[CheckpointCB(path)])
    for part in 'model', 'grads', 'optimizer', 'n_taken', 'history':
        same_bits(start.state[part], state[part], part)
    for name in 'MixedPrecisionCB', 'WeightAveragingCB', 'GradientAccumulationCB':
        same_bits(*(dict(its['callbacks'])[name] for its in (start.state, state)), name)
    out = capsys.readouterr().out
    assert 'device was cuda, is cpu: sums may be rounded' in out
    assert 'CPU threads was 64, is' in out and len(resumed.history) == 4

@pytest.mark.parametrize('name', ['model.pt', 'run[1].pt', 'model'])
def test_only_leftovers_of_its_own_are_swept_away(tmp_path, name):
    suffix, stem = Path(name).suffix, Path(name).stem
    theirs = [
        f'.{stem}_backup1{suffix}', f'.{stem}12345678{suffix}',
        f'.{stem}.unfinished-mine{suffix}', f'.other.unfinished-{"a" * 32}{suffix}',
        '.run1.unfinished-' + 'a' * 32 + '.pt']
    for file in *theirs, f'.{stem}.unfinished-{"a"*32}{suffix}': (tmp_path/file).touch()
    learner().fit(1, cbs=[CheckpointCB(tmp_path/name)])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*theirs, name])

class Pair(NamedTuple): a: int; b: int

def test_classes_come_back_or_are_refused(tmp_path):
    given = {
        'ordered': OrderedDict(a=1), 'counter': Counter([3, 3, 5]),
        'size': torch.Size([2, 3]), 'tuple': (1, [2]), 'complex': 1 + 2j}
    write_checkpoint(plain(given), tmp_path/'c.pt')
    back = read_checkpoint(tmp_path/'c.pt')
    assert {name: (type(value), value) for name, value in given.items()} == {
        name: (type(back[name]), back[name]) for name in given}
    for other in (
        Pair(1, 2),
        defaultdict(int, a=1),
        types.MappingProxyType({}),
        torch.nn.UninitializedParameter(),
    ):
        with pytest.raises((TypeError, ValueError), match=r"the state\['it'\]"):
            plain({'it': other})

def test_random_state_survives_the_file(tmp_path):
    set_seed(1); np.random.randn()
    write_checkpoint({'random': plain(random_state())}, tmp_path/'r.pt')
    def draw():
        return (
            random.random(), np.random.randn(), np.random.randn(),
            torch.randn(3).tolist())
    expected = draw()
    set_seed(2)
    set_random_state(read_checkpoint(tmp_path/'r.pt')['random'])
    assert draw() == expected

def test_all_that_is_random_goes_back():
    (learn := learner()).fit(1)
    def draw():
        batches = [yb.tolist() for _, yb in learn.dls.train]
        return random.random(), np.random.randn(), torch.randn(3).tolist(), batches
    draw()                  # NumPy keeps a second normal number for the next call
    state, expected = chance_state(learn), draw()
    assert draw() != expected
    set_chance_state(learn, state)
    assert draw() == expected

def test_a_loader_goes_back_by_its_epoch_or_by_its_generator():
    pairs = torch.utils.data.TensorDataset(torch.arange(9.), torch.arange(9))
    ours = TensorLoader(*pairs.tensors, 4, shuffle=True, seed=3)
    theirs = torch.utils.data.DataLoader(
        pairs, 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    for loader in ours, theirs:
        def epoch(): return torch.cat([yb for _, yb in loader]).tolist()
        state = loader_state(loader)
        first, second = epoch(), epoch()
        assert first != second
        set_loader_state(loader, state)
        assert (epoch(), epoch()) == (first, second)
    assert loader_state([1, 2]) == {'generators': []}

def test_a_loaded_optimizer_keeps_its_dicts_of_groups():
    opt = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=.1, momentum=.9)
    mine, state = opt.param_groups[0], copy.deepcopy(opt.state_dict())
    state['param_groups'][0]['lr'] = .3
    load_optimizer(opt, state)
    assert opt.param_groups[0] is mine and mine['lr'] == .3

def test_a_process_sends_and_takes_back_what_differs():
    def state(n):
        counts = [['MetricsCB', {'n': n, 'sum': 1.}]]
        return {'w': torch.ones(2), 'history': [], 'cbs': counts}
    main, other = state(3), state(5)
    assert differing(main, marks(main)) == []
    assert (found := differing(other, marks(main))) == [(('cbs', 0, 1, 'n'), 5)]
    assert differing({'w': torch.ones(1, 2)}, marks({'w': torch.ones(2)}))[0][0] == (
        'w',)
    second = types.SimpleNamespace(world=types.SimpleNamespace(rank=1, size=2))
    take_own(second, taken := main | {'others': [found]})
    same_bits(taken, other)
    alone = learner()
    assert (in_main(alone, lambda: 5), others_of(alone, main)) == (5, [])

def test_channels_last_and_views(tmp_path):
    """Saved tensors keep their layout and do not drag along the memory of which they
    are a part"""
    big = torch.randn(1000, 100)
    write_checkpoint(
        plain(
            {
                'view': big[:2],
                'image': torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
        ),
        tmp_path / 'v.pt',
    )
    assert (tmp_path/'v.pt').stat().st_size < 10_000
    assert read_checkpoint(tmp_path / 'v.pt')['image'].is_contiguous(
        memory_format=torch.channels_last)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu(tmp_path):
    check_resume(tmp_path, lambda: learner(DeviceCB('cuda')), (1, 'train', 1))
    learner(DeviceCB('cuda')).fit(1, cbs=[CheckpointCB(tmp_path/'g.pt')])
    assert read_checkpoint(tmp_path/'g.pt')['model']['0.weight'].device.type == 'cpu'

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_to_a_gpu_and_back(tmp_path, capsys):
    path, devices = tmp_path/'c.pt', ['cuda', 'cpu', 'cuda', 'cpu']
    for i, device in enumerate(devices):
        mixed = MixedPrecisionCB(torch.float16)
        cbs = [DeviceCB(device), mixed, GradientAccumulationCB(2),
               WeightAveragingCB(.9)]
        learn = learner(*cbs, CrashCB(i, 'train', i), seed=i)
        with contextlib.suppress(PowerFailure):
            learn.fit(3, cbs=[CheckpointCB(path, every_batches=1)])
        assert learn.device.type == device
        for its in learn.opt.state.values(): assert its['exp_avg'].device.type == device
        told = f'device was {devices[i-1]}, is {device}' in capsys.readouterr().out
        assert told == (i > 0)
    assert len(learn.history) == 3


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Each is refused or has no effect. torch.load checks no sums, and a mark in the
    zip's directory, 'this is a folder', makes it give noise for a tensor"""
    write_checkpoint({'w': torch.arange(3), 'n': 1}, tmp_path/'a.pt')
    content = (tmp_path/'a.pt').read_bytes()
    marks = [i+38 for i in range(len(content)) if content[i:i+4] == b'PK\x01\x02']
    assert len(marks) >= 4
    for i, bit in [
        *((i, bit) for i in marks for bit in range(8)),
        *((random.randrange(len(content)), random.randrange(8)) for _ in range(100)),
    ]:
        (tmp_path / 'b.pt').write_bytes(
            content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :])
        try: state = read_checkpoint(tmp_path/'b.pt')
        except ValueError: continue
        assert state['w'].tolist() == [0, 1, 2] and state['n'] == 1, (i, bit)


# ---- what the chapter says and does not show -----------------------------------------

def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    callback = CheckpointCB(tmp_path/'new'/'c.pt')            # the folder is made
    learn = learner(callback); learn.fit(2)
    assert callback.resumed is None
    again = learner(callback, seed=9); again.fit(2)
    assert callback.resumed == (2, 0) and again.history == learn.history
    same_bits(dict(again.model.state_dict()), dict(learn.model.state_dict()))
    same_bits(training_facts(again), read_checkpoint(callback.path)['facts'])
    written = callback.path.stat().st_mtime_ns
    again.fit(1, train=False)                                 # neither reads nor writes
    assert callback.path.stat().st_mtime_ns == written
    capsys.readouterr()
    learner(CheckpointCB(callback.path, quiet=True)).fit(2)
    assert capsys.readouterr().out == ''
    callback.resume = False                                   # anew, in this file
    again.fit(2)
    assert again.history != learn.history

class CalmDownCB(Callback):
    "Halve the learning rate after an epoch whose training loss has risen"
    order = 20
    def before_fit(self, learn): self.last = math.inf
    def after_epoch(self, learn):
        loss = last_metric(learn.history, 'train_loss')
        if loss > self.last:
            for group in learn.opt.param_groups: group['lr'] /= 2
        self.last = loss
    def state_dict(self): return {'last': self.last}
    def load_state_dict(self, state): self.last = state['last']

@pytest.mark.parametrize('epoch', [1, 4])
def test_a_callback_of_your_own_keeps_its_memory(tmp_path, epoch):
    def make(): return learner(CalmDownCB(), opt_func=torch.optim.SGD)
    check_resume(tmp_path, make, (epoch, 'train', 2), n_epochs=6)

def test_another_number_of_threads_is_told(tmp_path, capsys):
    path, kept = tmp_path/'c.pt', torch.get_num_threads()
    with pytest.raises(PowerFailure):
        learner().fit(2, cbs=[CheckpointCB(path), CrashCB(1, 'train', 0)])
    torch.set_num_threads(kept + 1)
    try: learner().fit(2, cbs=[CheckpointCB(path)])
    finally: torch.set_num_threads(kept)
    out = capsys.readouterr().out
    assert f'CPU threads was {kept}, is {kept+1}' in out
    assert 'c.pt: going on after 1 of 2 epochs' in out

def test_a_state_of_a_wider_model_leaves_nothing_half_loaded(tmp_path):
    class LoadWrongCB(Callback):
        order, watches = 1000, True
        def before_fit(self, learn):
            before = training_state(learn)
            wrong = copy.deepcopy(before)
            for value in wrong['model'].values(): value += 1
            wrong['model']['3.weight'] = torch.zeros(4, 6)    # after others were copied
            with pytest.raises(RuntimeError, match='size mismatch'):
                load_training_state(learn, wrong)
            same_bits(before, training_state(learn))
    learner().fit(1, cbs=[LoadWrongCB()])

def test_a_state_that_is_no_plain_value_is_told_when_the_fit_begins(tmp_path):
    class SecretiveCB(Callback):
        def state_dict(self): return {'rule': lambda: 0}
        def load_state_dict(self, state): pass
    with pytest.raises(TypeError, match=r"\[1\]\['rule'\] is a function"):
        learner(SecretiveCB()).fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    assert not (tmp_path/'c.pt').exists()

def test_files_that_are_no_checkpoints(tmp_path):
    path, bad = tmp_path/'c.pt', tmp_path/'bad.pt'
    write_checkpoint({'w': torch.arange(3)}, path)
    torch.load(path, weights_only=True)                       # anyone can read it
    with pytest.raises(FileNotFoundError, match='there is no checkpoint'):
        read_checkpoint(tmp_path/'none.pt')
    for content in b'', b'hello world', path.read_bytes()[:-100]:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match='damaged, cut short'): read_checkpoint(bad)
        with pytest.raises(ValueError, match='damaged, cut short'):
            learner().fit(1, cbs=[CheckpointCB(bad)])
    torch.save(nn.Linear(2, 2).state_dict(), bad)
    with pytest.raises(ValueError, match='written not by CheckpointCB'):
        read_checkpoint(bad)
    torch.save({'format': 'nntrain checkpoint 1'}, bad)
    with pytest.raises(ValueError, match='another version'): read_checkpoint(bad)
    with zipfile.ZipFile(bad, 'w') as archive: archive.writestr('a.txt', 'a')
    with pytest.raises(ValueError, match='not a file of torch.save'):
        read_checkpoint(bad)

def test_arguments(tmp_path):
    for name in 'every_epochs', 'every_batches':
        with pytest.raises(ValueError, match=f'{name} must be a whole number'):
            CheckpointCB(tmp_path/'c.pt', **{name: 0})
    with pytest.raises(ValueError, match='is a folder: name a file in it'):
        CheckpointCB(tmp_path)

def test_plain_values():
    assert type(torch.__version__) is not str and type(plain(torch.__version__)) is str
    assert [type(k) for k in plain({np.int64(1): 2})] == [int]
    with pytest.raises(TypeError, match='is a ndarray'): plain(np.ones(2))
    with pytest.raises(TypeError, match=r"a key of the state\['best'\] is a type"):
        plain({'best': {int: 1}})
    state = nn.BatchNorm1d(2).state_dict()
    assert plain(state)._metadata == state._metadata


# ---- SIGTERM -------------------------------------------------------------------------

class TermCB(Callback):
    "SIGTERM in that batch, between its step and its end"
    order, watches = 30, True
    def __init__(self, *at): self.at = at
    def after_loss(self, learn):
        if (learn.epoch, learn.phase, learn.iter) == self.at:
            signal.raise_signal(signal.SIGTERM)

def handler(): return signal.getsignal(signal.SIGTERM)

@pytest.mark.parametrize('cbs', [
    lambda: [], lambda: [GradientAccumulationCB(3), GradientClipCB(.1)],
    lambda: [WeightAveragingCB(.9), GradientAccumulationCB(2)],
    lambda: [MixedPrecisionCB(torch.float16), GradientAccumulationCB(2)],
    lambda: [EarlyStoppingCB(patience=1, min_delta=.5)]],
    ids=['plain', 'accumulate and clip', 'average', 'float16', 'stop'])
def test_sigterm_saves_where_it_came(tmp_path, cbs):
    "In training after that batch, in validation after the epoch; all is exact"
    whole = learner(*cbs())
    whole.fit(3)
    for *at, saved in [
            *((1, 'train', i, (1, i+1)) for i in range(4)), (0, 'train', 0, (0, 1)),
            (1, 'valid', 0, (2, 0)), (2, 'valid', 1, (3, 0))]:
        path, before = tmp_path/'c.pt', handler()
        path.unlink(missing_ok=True)
        if saved[0] > len(whole.history): continue       # it has stopped before
        with pytest.raises(SystemExit) as end:
            learner(*cbs(), TermCB(*at)).fit(3, cbs=[CheckpointCB(path, quiet=True)])
        assert end.value.code == 143 and type(end.value).__name__ == 'Terminated'
        state = read_checkpoint(path)
        assert (state['epoch'], state['batch']) == saved and handler() == before
        resumed = learner(*cbs(), seed=5)
        resumed.fit(3, cbs=[again := CheckpointCB(path)])
        assert again.resumed == saved
        same_bits(result(whole), result(resumed), f'{at}')

def test_sigterm_says_where_the_run_stands(tmp_path, capsys):
    with pytest.raises(SystemExit, match='after 1 of 2 epochs and 2 batches'):
        learner(TermCB(1, 'train', 1)).fit(2, cbs=[CheckpointCB(tmp_path/'c.pt')])
    out = capsys.readouterr().out
    assert out == 'c.pt: saved after 1 of 2 epochs and 2 batches, ended by SIGTERM\n'

class LateCB(Callback):
    "SIGTERM when everything is saved"
    order, watches = 2000, True
    def after_fit(self, learn): signal.raise_signal(signal.SIGTERM)

class FailingCB(Callback):
    order, watches = 500, True
    def after_batch(self, learn):
        signal.raise_signal(signal.SIGTERM)
        raise PowerFailure()

def test_sigterm_at_the_very_end_and_beside_an_error(tmp_path):
    before = handler()
    with pytest.raises(SystemExit):
        learner(LateCB()).fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    with pytest.raises(PowerFailure):                    # not hidden by the signal
        learner(FailingCB()).fit(1, cbs=[CheckpointCB(tmp_path/'d.pt')])
    try: raise KeyError()
    except KeyError:                                     # an error that is not ours
        with pytest.raises(SystemExit):
            learner(LateCB()).fit(1, cbs=[CheckpointCB(tmp_path/'e.pt')])
    assert handler() == before
    learner().fit(1, cbs=[CheckpointCB(tmp_path/'f.pt')])
    assert handler() == before

def test_handlers_of_your_own(tmp_path):
    "It is called when the checkpoint is there; who ignores the signal goes on doing so"
    heard, path = [], tmp_path/'c.pt'
    def mine(number, frame): heard.append((number, path.exists() and path.read_bytes()))
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(SystemExit):
            learner(TermCB(0, 'train', 1)).fit(1, cbs=[CheckpointCB(path)])
        assert handler() == mine and heard == [(signal.SIGTERM, path.read_bytes())]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        learner(TermCB(0, 'train', 2)).fit(1, cbs=[CheckpointCB(path)])
        assert handler() == signal.SIG_IGN
        changed = learner(TermCB(0, 'train', 1))
        signal.signal(signal.SIGTERM, mine)
        class TakeCB(Callback):                          # somebody takes the signal
            def before_epoch(self, learn): signal.signal(signal.SIGTERM, mine)
        changed.fit(1, cbs=[TakeCB(), CheckpointCB(tmp_path/'d.pt')])
        assert handler() == mine and len(heard) == 2
    finally: signal.signal(signal.SIGTERM, before)

def test_in_another_thread_no_handler_is_put(tmp_path):
    before, seen = handler(), []
    class LookCB(Callback):
        def after_batch(self, learn): seen.append(handler())
    def work(): learner(LookCB()).fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    thread = threading.Thread(target=work)
    thread.start(); thread.join()
    assert len(seen) > 4 and set(seen) == {before}
    learner(LookCB()).fit(1, train=False, cbs=[CheckpointCB(tmp_path/'c.pt')])
    assert set(seen) == {before}
    learner(LookCB()).fit(1, cbs=[CheckpointCB(tmp_path/'d.pt')])
    assert before not in seen[-5:]


# ---- resume='extend' -----------------------------------------------------------------

def extended(path, **kwargs): return CheckpointCB(path, resume='extend', **kwargs)
def momentum(params, lr): return torch.optim.SGD(params, lr, momentum=.9)
def stable(*lengths, peak=.05):
    "Up in some steps, and down in some at the end"
    up, down = lengths
    parts = linear(0., peak), constant(peak), linear(peak, 0.)
    return lambda: [ScheduleCB(lr=InSteps([up, None, down], parts))]

PLATEAUS = {
    'no schedule': (list, list),
    'constant': (lambda: [ScheduleCB(lr=constant(.05))],)*2,
    'in steps': (stable(5, 0), stable(5, 0)),
    'then down': (stable(5, 0), stable(5, 9)),
    'no warm-up': (lambda: [ScheduleCB(lr=wsd(.05, up=0, down=0))],
                   lambda: [ScheduleCB(lr=wsd(.05, up=0, down=.3))]),
    'two groups': (lambda: [ScheduleCB(lr=constant(.05), momentum=constant(.5))],)*2,
    'gallery': (lambda: [EarlyStoppingCB(patience=9), WeightAveragingCB(.9, every=3),
                         GradientAccumulationCB(3), ReduceOnPlateauCB(patience=1)],)*2,
    'decay': (lambda: [AutoAnnealCB(share=.99)],)*2,
}

@pytest.mark.parametrize('name', PLATEAUS)
@pytest.mark.parametrize('stop', [None, (2, 'train', 1)], ids=['finished', 'cut'])
def test_four_epochs_become_eight(tmp_path, name, stop):
    "A run 4 → 8 on a plateau is that of 8 epochs, bit for bit"
    then, now = PLATEAUS[name]
    whole = learner(*now(), opt_func=momentum)
    whole.fit(8)
    path, cut = tmp_path/'c.pt', [CrashCB(*stop)] if stop else []
    with contextlib.suppress(PowerFailure):
        learner(*then(), *cut, opt_func=momentum).fit(
            4, cbs=[CheckpointCB(path, every_batches=1)])
    with pytest.raises(ValueError, match="resume='extend' if no step already taken"):
        learner(*then(), opt_func=momentum).fit(8, cbs=[CheckpointCB(path)])
    longer = learner(*now(), opt_func=momentum, seed=9)
    longer.fit(8, cbs=[again := extended(path)])
    assert again.resumed == ((2, 2) if stop else (4, 0)) and len(longer.history) == 8
    same_bits(result(whole), result(longer))
    assert read_checkpoint(path)['facts']['n_epochs'] == 8

@pytest.mark.parametrize('cbs, said', [
    (lambda: ScheduleCB(lr=cosine(.05, 0.)),
     'its cosine of lr would have had 0.04987 in step 1, not 0.04945'),
    (lambda: ScheduleCB(lr=one_cycle(.05)), 'its one_cycle of lr would have had'),
    (lambda: ScheduleCB(momentum=wsd(.5)), 'its wsd of momentum would have had'),
    (lambda: ScheduleCB(lr=step_decay(.1)), 'its step_decay of lr would have had'),
    (lambda: WeightAveragingCB(.9, start=.2),
     'start=0.2) starts after a share of the run, so step 4 would'),
    (lambda: TorchSchedulerCB(partial(torch.optim.lr_scheduler.StepLR, step_size=9)),
     'TorchSchedulerCB left out its step after the last one'),
    (lambda: TorchSchedulerCB(lambda opt, n_steps: torch.optim.lr_scheduler.OneCycleLR(
        opt, .02, total_steps=n_steps)), 'scheduler of TorchSchedulerCB was'),
    (lambda: GradientClipCB(.1), "callbacks was ['BatchTransformCB', 'GradientClipCB'"),
])
def test_what_cannot_be_extended_is_refused_by_name(tmp_path, cbs, said):
    path = tmp_path/'c.pt'
    learner(cbs(), opt_func=momentum).fit(4, cbs=[CheckpointCB(path)])
    content = path.read_bytes()
    longer = learner(*[cbs()]*('clip' not in said and 'Clip' not in said), seed=1,
                     opt_func=momentum)
    before = copy.deepcopy(longer.model.state_dict())
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        longer.fit(8, cbs=[extended(path)])
    same_bits(dict(before), dict(longer.model.state_dict()))
    assert path.read_bytes() == content
    if 'would have had' in said:
        assert 'planned with 4 epochs and cannot become a run of 8' in str(error.value)

def test_extending_what_is_not_finished(tmp_path):
    "A scheduler of torch, an average before its start; a plan that is shorter"
    for i, (cb, n_then, n) in enumerate([
            (partial(steps, 9), 4, 6), (lambda: GradientClipCB(.1), 6, 3),
            (partial(WeightAveragingCB, .9, start=.75), 4, 6)]):
        whole = learner(cb(), opt_func=momentum); whole.fit(n)
        path = tmp_path/f'{i}.pt'
        with pytest.raises(PowerFailure):
            learner(cb(), CrashCB(1, 'train', 2), opt_func=momentum).fit(
                n_then, cbs=[CheckpointCB(path, every_batches=1)])
        longer = learner(cb(), opt_func=momentum, seed=9)
        longer.fit(n, cbs=[extended(path)])
        same_bits(result(whole), result(longer))
    with pytest.raises(ValueError, match='become a run of 1: it has done 6 epochs and'):
        longer.fit(1, cbs=[extended(path)])
    with pytest.raises(ValueError, match="had schedules, and now .'lr', 'momentum'."):
        for names in ['lr'], ['lr', 'momentum']:
            cb = ScheduleCB(**{name: constant(.1) for name in names})
            learner(cb, opt_func=momentum).fit(
                1 + len(names), cbs=[extended(tmp_path/'s')])
    with pytest.raises(ValueError, match="True, False or 'extend', got 'extended'"):
        CheckpointCB(path, resume='extended')

def test_lengths_in_steps():
    up_down = InSteps([4, None, 2], [linear(0., 1.), constant(1.), linear(1., 0.)])
    assert up_down.fixed == 6
    for n in 7, 8, 50, 1001:
        values = at_steps(up_down.plan(n), n)
        assert values == [0., .25, .5, .75] + [1.]*(n-6) + [.5, 0.]
    one_step = InSteps([0, None], [linear(9., 8.), constant(1.)]).plan(1)
    assert at_steps(one_step, 1) == [1.]
    with pytest.raises(ValueError, match='take 6 steps after the first, and .* has 5'):
        up_down.plan(6)
    with pytest.raises(TypeError, match='give it to ScheduleCB as it is'): up_down(.5)
    for lengths in [1, 2], [None, None], [None], [None, -1], [None, .5]:
        with pytest.raises(ValueError): InSteps(lengths, [constant(1.)]*2)
    callback = ScheduleCB(lr=up_down)
    assert repr(callback) == 'ScheduleCB(lr: 0 → 0.5 → 1 → 1 → 0)'
    learn = learner(callback); learn.fit(2)
    assert callback.values['lr'] == at_steps(up_down.plan(8), 8)
    with pytest.raises(ValueError, match='the run has 3'): learn.fit(1)


# ---- two runs, one file --------------------------------------------------------------

HOLDER = '''
import os, sys, time
from nntrain.lock import RunLock
lock = RunLock(sys.argv[1]); lock.take()
child = os.fork()                    # as a loader's worker: it outlives its parent
if not child: time.sleep(600)
print(child, flush=True)
time.sleep(600)
'''

def test_a_second_run_is_told_who_holds_the_file(tmp_path):
    path = tmp_path/'c.pt'
    learner().fit(1, cbs=[CheckpointCB(path)])
    content = path.read_bytes()
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, str(path)],
                              stdout=subprocess.PIPE, text=True)
    try:
        worker = int(holder.stdout.readline())
        half = tmp_path/f'.c.unfinished-{"a"*32}.pt'       # it may be writing this
        half.touch()
        with pytest.raises(BlockingIOError, match=(
                f'c.pt is in use by process {holder.pid}: wait for its end or stop it, '
                'or give this run a path of its own')):
            learner().fit(1, cbs=[CheckpointCB(path, resume=False)])
        assert path.read_bytes() == content and half.exists()
        learner().fit(1, cbs=[CheckpointCB(tmp_path/'d.pt')])     # another file is free
        learner().fit(1, train=False, cbs=[CheckpointCB(path)])
        holder.kill(); holder.wait()                      # its worker lives
        learner().fit(1, cbs=[CheckpointCB(path)])
        os.kill(worker, signal.SIGKILL)
    finally: holder.kill(); holder.communicate()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['c.pt', 'd.pt']

class InsideCB(Callback):
    "Another fit in the middle of this one"
    order, watches = 500, True
    def __init__(self, other=None): self.other, self.done = other, 0
    def after_epoch(self, learn):
        with aside(learn): (self.other or learn).fit(1)
        self.done += 1

def test_a_fit_inside_a_fit_leaves_the_file_alone(tmp_path):
    path = tmp_path/'c.pt'
    whole = learner(); whole.fit(3)
    inside = InsideCB()
    learn = learner(CheckpointCB(path), inside)
    learn.fit(3)
    assert inside.done == 3 and [p.name for p in tmp_path.iterdir()] == ['c.pt']
    same_bits(result(whole), {**result(learn)})
    lr_find(learn, n_steps=5)
    other = InsideCB(learner(CheckpointCB(path)))         # another one, for this file
    path.unlink()
    with pytest.raises(BlockingIOError, match='in use by another fit of this process'):
        learner(CheckpointCB(path), other).fit(3)
    learner(CheckpointCB(path)).fit(3)                    # the lock was given back
    assert [p.name for p in tmp_path.iterdir()] == ['c.pt']

def test_a_lock_that_is_removed_and_made_anew(tmp_path):
    "Between opening and locking, its holder may have gone, and another one come"
    first, second = RunLock(tmp_path/'c.pt'), RunLock(tmp_path/'c.pt')
    first.take()
    held, real = first.place, lock._locked
    def late(handle):
        if first.handle is not None: first.release()      # it goes, with its file
        return real(handle)
    lock._locked = late
    try: second.take()
    finally: lock._locked = real
    with pytest.raises(BlockingIOError): RunLock(tmp_path/'c.pt').take()
    second.release(); second.release()
    assert not held.exists()

@pytest.mark.parametrize('held', [False, True])
def test_locks_where_there_is_no_fcntl(tmp_path, monkeypatch, held):
    "Windows locks a byte; here a stand-in does, or refuses"
    asked = []
    def locking(handle, mode, n):
        asked.append((mode, n, os.lseek(handle, 0, os.SEEK_CUR)))
        if held: raise PermissionError(13, 'Permission denied')
    monkeypatch.setitem(sys.modules, 'msvcrt', types.SimpleNamespace(
        locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(lock, 'fcntl', None)
    mine = RunLock(tmp_path/'c.pt')
    if held:
        mine.place.write_text('77 ' + socket.gethostname())
        with pytest.raises(BlockingIOError, match='in use by process 77:'): mine.take()
    else: mine.take(); mine.release()
    assert asked == [(2, 1, 2**20)] and mine.place.exists() == held

@pytest.mark.parametrize('note, who', [
    ('', 'in use by process ?:'),
    ('{me} elsewhere', 'in use by process {me} on elsewhere:'),
    ('{me} {here}', 'in use by another fit of this process:')])
def test_who_holds_a_lock_is_told_as_far_as_it_is_known(tmp_path, note, who):
    words = dict(me=os.getpid(), here=socket.gethostname())
    mine = RunLock(tmp_path/'c.pt')
    mine.place.write_text(note.format(**words))
    with pytest.raises(BlockingIOError, match=re.escape(who.format(**words))):
        mine._refuse(os.open(mine.place, os.O_RDONLY))

def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch):
    def flock(handle, mode): raise OSError(95, 'Operation not supported')
    monkeypatch.setattr(lock.fcntl, 'flock', flock)
    learner().fit(1, cbs=[CheckpointCB(tmp_path/'c.pt')])
    assert [p.name for p in tmp_path.iterdir()] == ['c.pt']


def test_pairs_that_spoil_a_checkpoint_are_refused(tmp_path):
    "Two that skip the batches that are done; a log that would hold rows twice"
    two = [CheckpointCB(tmp_path/f'{name}.pt') for name in 'ab']
    with pytest.raises(ValueError, match='would both write the place in the run'):
        learner().fit(1, cbs=two)
    log = CSVLogCB(tmp_path/'log.csv', append=True)
    with pytest.raises(ValueError, match='leave append out'):
        learner(log).fit(1, cbs=two[:1])
    assert not list(tmp_path.glob('*.pt')) and not (tmp_path/'log.csv').exists()

def test_an_average_that_was_left_out_is_noticed(tmp_path):
    "Without ScheduleFreeCB the fast weights would be validated"
    def free(*cbs): return learner(*cbs, opt_func=ScheduleFreeSGD)
    with pytest.raises(PowerFailure):
        free(ScheduleFreeCB(), CrashCB(1, 'train', 0)).fit(
            2, cbs=[CheckpointCB(tmp_path/'c.pt')])
    with pytest.raises(ValueError, match='ScheduleFreeCB'):
        free().fit(2, cbs=[CheckpointCB(tmp_path/'c.pt')])
