"""A small fit with all that is usual, and faults that strike in it; without pytest, since
every process that is to be killed imports this file"""
import copy
import os
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nntrain.accumulate import GradientAccumulationCB
from nntrain.average import WeightAveragingCB
from nntrain.callback import Callback
from nntrain.checkpoint import CheckpointCB
from nntrain.checkpoint_file import plain
from nntrain.clip import GradientClipCB
from nntrain.compare import set_seed
from nntrain.cycles import one_cycle
from nntrain.data import DataLoaders
from nntrain.learner import Learner
from nntrain.logs import CSVLogCB, _read_log
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.precision import MixedPrecisionCB
from nntrain.progress import ProgressCB
from nntrain.saving import SaveBestCB
from nntrain.state import random_state
from nntrain.steering import ScheduleCB

N_EPOCHS = 3
FILES = ['best.pt', 'log.csv', 'run.pt']


class FaultCB(Callback):
    "Calls `fault` at one event: in the second epoch, in batch 1 of `phase`"
    watches = True
    def __init__(self, event, fault, phase='train', order=0):
        self.order = order
        def strike(learn):
            if event.endswith('_fit') or learn.epoch == 1 and (
                event.endswith('_epoch') or learn.phase == phase and (
                    event.endswith('_phase') or learn.iter == 1)): fault()
        setattr(self, event, strike)


class TrainedCB(Callback):
    "Notes the trained weights, before anybody else hears of the event"
    order, watches = -5000, True
    def before_fit(self, learn): self._note(learn)
    def after_predict(self, learn):
        if learn.training: self._note(learn)     # BatchNorm has seen the batch
    def after_step(self, learn): self._note(learn)
    def _note(self, learn): self.state = copy.deepcopy(learn.model.state_dict())


def usual(folder, *cbs, restore=False):
    "A learner with a model, data and callbacks, which write into `folder`"
    set_seed(0)
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(.2), nn.Linear(6, 3))
    dls = DataLoaders.from_tensors((x, y), (x[:20], y[:20]), batch_size=8)
    cbs = [
        MetricsCB(Accuracy()), CSVLogCB(folder/'log.csv'), ProgressCB(),
        CheckpointCB(folder/'run.pt', every_batches=2, quiet=True),
        SaveBestCB(folder/'best.pt', restore=restore), WeightAveragingCB(.7),
        ScheduleCB(lr=one_cycle(.05)), GradientClipCB(.5), GradientAccumulationCB(2),
        MixedPrecisionCB(torch.bfloat16), *cbs]
    return Learner(model, dls, F.cross_entropy, torch.optim.Adam, .05, cbs)


def ended(learn, folder):
    "All that should be the same at the end, to the last bit"
    def calm(rows):
        return [{k: v for k, v in r.items() if k != 'seconds'} for r in rows]
    memory = [cb.state_dict() for cb in learn.cbs
              if hasattr(cb, 'state_dict') and not isinstance(cb, MetricsCB)]
    return plain({
        'model': learn.model.state_dict(), 'optimizer': learn.opt.state_dict(),
        'random': random_state(), 'history': calm(learn.history), 'memory': memory,
        'log': calm(_read_log(folder/'log.csv')),
        'best': torch.load(folder/'best.pt', weights_only=True),
        'files': sorted(p.name for p in folder.iterdir())})


# ---- in a process of its own ---------------------------------------------------------

def quiet():
    "Print nothing: what the main process reads comes through files"
    for fd in 1, 2: os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def signalled(folder, number, event, phase, order):
    "Train until the process sends itself a signal at an event"
    quiet()
    fault = FaultCB(event, lambda: os.kill(os.getpid(), number), phase, order)
    usual(Path(folder), fault).fit(N_EPOCHS)


def killed_while_writing(folder, name, nth, half):
    "Train until the file `name` is written for the nth time: die before it has its name"
    quiet()
    replace, left = os.replace, [nth]
    def dies(beside, path):
        left[0] -= Path(path).name == name
        if not left[0]:
            if half: os.truncate(beside, os.path.getsize(beside)//2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(beside, path)
    os.replace = dies
    usual(Path(folder)).fit(N_EPOCHS)
