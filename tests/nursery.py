"""Runs of one or several processes that are killed. This program loads torch once, and
forks the processes of each life. It reads lines of JSON: {folder, seed, ranks, kill,
…}, and answers each with a line: {codes, places}.

`kill` names who dies and when: [ranks, seconds] after the fork, or [ranks, event, n]
when the event comes for the nth time: 'write' (half of the file is there), 'rename' (it
is not renamed), 'gather' (what differs is told to the main process), 'batch'. With
`term` it is a SIGTERM, for the process and all that it has started."""
import json
import os
import random
import signal
import sys
import time

import accelerate  # noqa: F401  loaded once, here
import numpy as np
import torch
import torch._dynamo  # noqa: F401  what the first optimizer loads
import torch.distributed as dist
from nntrain.accumulate import GradientAccumulationCB
from nntrain.average import WeightAveragingCB
from nntrain.callback import Callback
from nntrain.checkpoint import CheckpointCB
from nntrain.compare import set_seed
from nntrain.cycles import one_cycle
from nntrain.data import DataLoaders
from nntrain.distributed import AccelerateCB
from nntrain.history import RecorderCB
from nntrain.learner import Learner
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.precision import MixedPrecisionCB
from nntrain.prepare import BatchTransformCB
from nntrain.state import training_state
from nntrain.steering import ScheduleCB
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

numbers = torch.Generator().manual_seed(0)
x = torch.randn(107, 6, generator=numbers)
y = torch.randint(0, 3, (107,), generator=numbers)


def augment(batch):
    noise = random.random() + float(np.random.randn()) + torch.randn_like(batch[0])
    return batch[0] + .1*noise, batch[1]


def no_clock(state):
    "A state without seconds"
    rows = [{k: v for k, v in r.items() if k != 'seconds'} for r in state['history']]
    state = state | {'history': rows}
    for _, its in state['callbacks']: its.pop('seconds', None)
    return state


class StatesCB(Callback):
    "Note the state of this process after each batch, and at the end"
    order, watches = 900, True
    def __init__(self): self.states = {}
    def note(self, learn, *place): self.states[place] = no_clock(training_state(learn))
    def after_batch(self, learn):
        if learn.training: self.note(learn, learn.epoch, learn.iter + 1)
    def after_epoch(self, learn): self.note(learn, learn.epoch + 1, 0)


class EndCB(Callback):
    order, watches = 2000, True
    def __init__(self, path): self.path = path
    def after_fit(self, learn):
        torch.save(no_clock(training_state(learn)), self.path)


class DyingCB(Callback):
    "Kill this process in its nth batch, or ask it to end"
    order, watches = 2000, True
    def __init__(self, n, term): self.left, self.term = n, term
    def after_batch(self, learn):
        self.left -= 1
        if not self.left and not self.term: die()
    def after_loss(self, learn):
        if self.left != 1 or not self.term: return
        if not os.fork():                   # as somebody outside
            os.killpg(0, signal.SIGTERM)
            os._exit(0)
        time.sleep(.2)                      # a worker that died would be missed by now


def learner(cbs, loader='tensors', precision=None):
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(),
                          nn.Dropout(.2), nn.Linear(16, 3))
    dls = DataLoaders.from_tensors((x, y), (x[:50], y[:50]), batch_size=16)
    if loader != 'tensors':
        n = 2 if loader == 'workers' else 0
        dls.train = DataLoader(TensorDataset(x, y), 16, shuffle=True, num_workers=n)
        dls.valid = DataLoader(TensorDataset(x[:50], y[:50]), 4, num_workers=n)
    recorder = RecorderCB(lr=lambda learn: learn.opt.param_groups[0]['lr'])
    schedule = ScheduleCB(lr=one_cycle(1e-2), weight_decay=one_cycle(.1))
    if precision:
        scaler = torch.amp.GradScaler('cpu', init_scale=2.**8, growth_interval=5)
        cbs = [MixedPrecisionCB(torch.float16, scaler), *cbs]
    cbs = [MetricsCB(Accuracy()), recorder, BatchTransformCB(augment), schedule,
           WeightAveragingCB(.9), GradientAccumulationCB(2), *cbs]
    loss_func = nn.functional.cross_entropy
    return Learner(model, dls, loss_func, torch.optim.AdamW, .01, cbs)


def train(rank, folder, seed, ranks, n_epochs=3, every=2, calm=False, **kwargs):
    set_seed(seed)
    cbs = [AccelerateCB(cpu=True)]
    learn = learner([*cbs, *kwargs.pop('cbs', ())], **kwargs)
    more = [EndCB(f'{folder}/end{rank}.pt')]
    if not calm: more.append(CheckpointCB(f'{folder}/run.pt', every_batches=every))
    if calm: more.append(states := StatesCB())
    learn.fit(n_epochs, cbs=more)
    if calm: torch.save(states.states, f'{folder}/states{rank}.pt')


# ---- lives and deaths ----------------------------------------------------------------

def die(): os.kill(os.getpid(), signal.SIGKILL)


def dies_at(event, n):
    "This process dies when the event comes for the nth time"
    places = {'write': (torch, 'save'), 'rename': (os, 'replace'),
              'gather': (dist, 'gather_object')}
    owner, name = places[event]
    left, real = [n], getattr(owner, name)
    def count(*args, **kwargs):
        left[0] -= 1
        if left[0]: return real(*args, **kwargs)
        if event == 'write':
            real(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1])//2)
        die()
    setattr(owner, name, count)


def live(rank, kill, folder, seed, ranks=1, term=False, **kwargs):
    "What a process of a life does"
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    if ranks > 1:
        os.environ |= dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks), ACCELERATE_USE_CPU='true',
            GLOO_SOCKET_IFNAME='lo')
        dist.init_process_group('gloo', init_method=f'file://{folder}/store',
                                rank=rank, world_size=ranks)
    cbs = []
    if len(kill) == 3 and rank in kill[0]:
        _, event, n = kill
        if event == 'batch': cbs = [DyingCB(n, term)]
        else: dies_at(event, n)
    train(rank, folder, seed, ranks, cbs=cbs, **kwargs)
    if ranks > 1: dist.barrier()


def forked(rank, *args, **kwargs):
    pid = os.fork()
    if pid: return pid
    code = 1
    said = f'{kwargs["folder"]}/said{rank}'
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    try:
        live(rank, *args, **kwargs)
        code = 0
    except SystemExit as e: code = e.code
    except BaseException as e:
        with open(f'{kwargs["folder"]}/errors{rank}', 'a') as f: f.write(f'{e!r}\n')
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pids, patience):
    "Exit codes; those that do not end in time are killed, as a launcher would do"
    codes, begin = {}, time.monotonic()
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes: continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done: codes[pid] = os.waitstatus_to_exitcode(status)
        failed = any(codes.values())
        if failed and time.monotonic() - begin > patience:
            for pid in pids:
                if pid not in codes: os.kill(pid, signal.SIGKILL)
        if not failed: begin = time.monotonic()
        time.sleep(.002)
    return [codes[pid] for pid in pids]


def one_life(folder, ranks=1, kill=(), patience=.2, **kwargs):
    if os.path.exists(f'{folder}/store'): os.unlink(f'{folder}/store')
    pids = [forked(rank, kill, folder=folder, ranks=ranks, **kwargs)
            for rank in range(ranks)]
    if len(kill) == 2:
        who, seconds = kill
        time.sleep(seconds)
        for rank in who: os.kill(pids[rank], signal.SIGKILL)
    return ended(pids, patience)


if __name__ == '__main__':
    for line in sys.stdin:
        begin = time.monotonic()
        codes = one_life(**json.loads(line))
        print(json.dumps({'codes': codes, 'seconds': time.monotonic() - begin}),
              flush=True)
