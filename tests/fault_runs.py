"""A small fit with all that is usual, and faults that strike in it; without pytest,
since every process that is to be killed imports this file"""
import contextlib
import copy
import ctypes
import io
import os
import pickle
import signal
import sys
import traceback
from functools import partial
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
from nntrain.files import write_whole
from nntrain.learner import Learner
from nntrain.logs import CSVLogCB, _read_log
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.precision import MixedPrecisionCB
from nntrain.progress import ProgressCB
from nntrain.results import record
from nntrain.run_folder import SaveRunCB, _write_curves, write_json
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
    learn = usual(Path(folder), fault)
    if number == signal.SIGTERM:        # no other checkpoint inside of an epoch
        cb = next(cb for cb in learn.cbs if isinstance(cb, CheckpointCB))
        cb.every_batches = None
    learn.fit(N_EPOCHS)


def killed_while_writing(folder, name, nth, half):
    "Train until the file `name` is written for the nth time: die before it has it"
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


# ---- disks that are full, and folders that cannot be written to ----------------------

def _own_mounts():
    "From now on this process may mount; nobody else sees it. OSError if it may not"
    if sys.platform != 'linux': raise OSError('this is done on Linux only')
    libc, new_user, new_mounts = ctypes.CDLL(None, use_errno=True), 0x10000000, 0x20000
    def call(name, *args):
        if getattr(libc, name)(*args): raise OSError(ctypes.get_errno(), name)
    if os.geteuid():
        uid, gid = os.geteuid(), os.getegid()
        call('unshare', new_user | new_mounts)
        for file, text in dict(
            setgroups='deny', uid_map=f'0 {uid} 1', gid_map=f'0 {gid} 1').items():
            Path(f'/proc/self/{file}').write_text(text)
    else: call('unshare', new_mounts)
    call('mount', b'none', b'/', None, 0x44000, None)          # private, recursively
    def mount(folder, flags, options):
        call('mount', b'tmpfs', os.fsencode(folder), b'tmpfs', flags, options.encode())
    return mount


def _fill(folder):
    "Write until not one page is left"
    with open(folder/'filler', 'ab', buffering=0) as f, contextlib.suppress(OSError):
        while True: f.write(bytes(4096))


class Disk:
    "A folder in which nothing can be written after `spoil`: full, limited, read-only"
    def __init__(self, folder, how):
        self.folder, self.how = folder, how
        if how == 'limited': return
        self.mount = _own_mounts()
        self.mount(folder, 0, 'size=400k')
    def spoil(self):
        if self.how == 'full': _fill(self.folder)
        if self.how == 'read-only': self.mount(self.folder, 1 | 32, '')    # remounted
        if self.how == 'limited':
            import resource
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    def mend(self):
        if self.how == 'full': (self.folder/'filler').unlink()
        if self.how == 'read-only': self.mount(self.folder, 32, '')
        if self.how == 'limited':
            import resource
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    def content(self):
        paths = sorted(self.folder.iterdir())
        return {p.name: p.read_bytes() for p in paths if p.name != 'filler'}


def _fit(*cbs):
    learn = usual(Path())
    learn.cbs = [cb for cb in learn.cbs if isinstance(cb, (MetricsCB, ProgressCB))]
    learn.fit(1, cbs=list(cbs))


def writers(folder):
    "{name of the file: function that writes it}"
    def row(): record('row', [.5], split='test', seconds=1, source='toy', folder=folder)
    options = {'text': 'a'*100}
    curves = partial(_write_curves, [{
        f'{split}_{what}': 1. for split in ('train', 'valid')
        for what in ('loss', 'accuracy')} | {'epoch': 0}])
    return {
        'run.pt': lambda: _fit(CheckpointCB(folder/'run.pt', resume=False)),
        'best.pt': lambda: _fit(SaveBestCB(folder/'best.pt')),
        'log.csv': lambda: _fit(CSVLogCB(folder/'log.csv')),
        'options.json': lambda: _fit(SaveRunCB(folder, options)),
        'curves.png': lambda: write_whole(folder/'curves.png', curves),
        'values.json': lambda: write_json(options, folder/'values.json'),
        'row.json': row}


def report(pipe, fn, *args):
    "Send what `fn(*args)` gives, or the text of its error"
    quiet()
    try: said = fn(*args)
    except BaseException: said = RuntimeError(traceback.format_exc())
    pipe.send_bytes(pickle.dumps(said))     # `send` would share the memory of tensors


def on_a_bad_disk(folder, how):
    "What each writer says when the disk is bad, and whether nothing changed"
    folder = Path(folder)
    try: disk = Disk(folder, how)
    except OSError as e: return f'no mount here: {e}'
    made = writers(folder)
    for write in made.values(): write()
    disk.spoil()
    before, said = disk.content(), {}
    for name, write in made.items():
        try: write(); said[name] = None
        except Exception as e:
            said[name] = type(e).__mro__[:-1], getattr(e, 'errno', None), str(e)
        said[name] = said[name], disk.content() == before
    return said


def disk_bad_for_a_while(folder, how, event):
    "The disk is bad from an event on; then it is mended, and the run goes on"
    folder = Path(folder)
    try: disk = Disk(folder, how)
    except OSError as e: return f'no mount here: {e}'
    trained = TrainedCB()
    learn = usual(folder, trained, FaultCB(event, disk.spoil, order=-4000))
    try: learn.fit(N_EPOCHS); error = None
    except Exception as e: error = isinstance(e, OSError), str(e)
    sane = {k: v for k, v in learn.model.state_dict().items()}, dict(trained.state)
    names = list(disk.content())
    disk.mend()
    learn = usual(folder)
    learn.fit(N_EPOCHS)
    return error, sane, names, ended(learn, folder)


def command_on_a_bad_disk(folder, how):
    "Exit status of nntrain_fit, its lines on stderr, and what is in the folder"
    from nntrain import command, sources
    folder = Path(folder)
    try: disk = Disk(folder, how)
    except OSError as e: return f'no mount here: {e}'
    draw = sources.draw_clothes
    sources.draw_clothes = lambda n, seed: draw(2000, seed)
    os.environ['NNTRAIN_BUDGET'] = 'quick'
    words = '--source toy --model mlp --epochs 1 --device cpu --out'.split()
    disk.spoil()
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = command.nntrain_fit([*words, str(folder)])
    files = [p.name for p in folder.rglob('*') if p.is_file() and p.name != 'filler']
    return code, err.getvalue().splitlines(), files
