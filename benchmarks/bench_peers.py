"""One epoch of training with loss and accuracy: our Learner, a bare loop that counts
the same, and the peers that are installed (fastai, Lightning, accelerate, skorch)"""
import argparse
import contextlib
import io
import logging
import os
import sys
import warnings

import torch
import torch.nn.functional as F
from _timing import compare, refuse_if_busy
from torch import nn

from nntrain.blocks import cnn
from nntrain.learner import Learner
from nntrain.metrics import Accuracy, MetricsCB


class Batches(list):
    "Batches in memory, with what fastai asks of a loader"
    bs, device, n_inp, dataset, fake_l = 1, 'cpu', 1, (), None
    def to(self, device): return self
    def one_batch(self): return self[0]


class Data: train, valid = None, None


def tiny():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))


def small_cnn(): return cnn().to(memory_format=torch.channels_last)


# name -> what is trained, batches of an epoch, batch size
TASKS = {'tiny': (tiny, 300, 32), 'cnn': (small_cnn, 20, 256)}


def bare_loop(make, batches):
    def run():
        model = make().train()
        opt = torch.optim.SGD(model.parameters(), lr=.01)
        loss_sum, right, n = 0., 0, 0
        for xb, yb in batches:
            preds = model(xb)
            loss = F.cross_entropy(preds, yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            loss_sum += loss.detach()*len(xb)
            right += (preds.argmax(1) == yb).sum()
            n += len(xb)
        return loss_sum/n, right/n
    return run


def ours(make, batches):
    class Loaders(Data): train = batches
    def run():
        with contextlib.redirect_stdout(io.StringIO()):
            Learner(make(), Loaders, F.cross_entropy, lr=.01,
                    cbs=[MetricsCB(Accuracy())]).fit(1, valid=False)
    return run


def fastai(make, batches):
    import fastai.callback.progress                  # adds no_bar
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner as FastaiLearner
    from fastai.optimizer import SGD
    class AccuracyCB(Callback):                  # fastai's metrics only validate
        def before_epoch(self): self.right = 0
        def after_pred(self): self.right += (self.pred.argmax(1) == self.yb[0]).sum()
    def run():
        learn = FastaiLearner(DataLoaders(batches, Batches()), make(), F.cross_entropy,
                              SGD, lr=.01, cbs=AccuracyCB(), train_bn=True)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return run


def lightning(make, batches):
    import lightning
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.right, self.loss_sum = make(), 0, 0.
        def training_step(self, batch, i):
            xb, yb = batch
            preds = self.model(xb)
            loss = F.cross_entropy(preds, yb)
            self.right += (preds.argmax(1) == yb).sum()
            self.loss_sum += loss.detach()*len(xb)
            return loss
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=.01)
    def run():
        lightning.Trainer(
            max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(Module(), batches)
    return run


def accelerate(make, batches):
    from accelerate import Accelerator
    def run():
        acc = Accelerator(cpu=True)
        model = make().train()
        model, opt = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=.01))
        loss_sum, right = 0., 0
        for xb, yb in batches:
            preds = model(xb)
            loss = F.cross_entropy(preds, yb)
            acc.backward(loss)
            opt.step()
            opt.zero_grad()
            loss_sum += loss.detach()*len(xb)
            right += (preds.argmax(1) == yb).sum()
    return run


def skorch(make, batches):
    from skorch import NeuralNetClassifier
    x, y = (torch.cat(parts) for parts in zip(*batches))
    def run():
        NeuralNetClassifier(
            make, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=.01,
            max_epochs=1, batch_size=len(batches[0][0]), train_split=None, verbose=0,
            classes=range(10)).fit(x, y)
    return run


PEERS = dict(fastai=fastai, lightning=lightning, accelerate=accelerate, skorch=skorch)


def candidates(task):
    "All that can run here; says which peers are not installed"
    make, n, size = TASKS[task]
    batches = Batches((torch.randn(size, 1, 28, 28), torch.randint(0, 10, (size,)))
                      for _ in range(n))
    found = {'bare loop': bare_loop(make, batches), 'Learner': ours(make, batches)}
    for name, peer in PEERS.items():
        try: found[name] = peer(make, batches)
        except ImportError as e: print(f'{name}: not measured ({e})')
    return found, n


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--rounds', type=int, default=7, help='interleaved rounds (default 7)')
    parser.add_argument(
        '--record', action='store_true',
        help='write rows to results/ (on an idle machine)')
    args = parser.parse_args()
    if args.record: refuse_if_busy()
    warnings.filterwarnings('ignore')
    os.environ.setdefault('TQDM_DISABLE', '1')
    torch.set_num_threads(1)
    missed = False
    for task, words in dict(tiny='A tiny model, batches of 32',
                            cnn='The small CNN, batches of 256').items():
        found, n = candidates(task)
        result = compare(
            found, rounds=args.rounds, per=n, unit='batch', limits={'Learner': 1.15},
            title=f'{words}, loss and accuracy counted, 1 thread',
            record=f'peers-{task}' if args.record else '')
        missed |= any(r['ok'] is False for r in result.values())
    sys.exit(missed)
