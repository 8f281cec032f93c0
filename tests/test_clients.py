"""Our optimizers in other people's training loops: each library must end where a plain
loop ends.

The libraries come with `pip install -e '.[clients]'`, best in an environment of its
own: fastai wants a newer fastcore than nbdev. A test of one that is missing is skipped
by name."""
import copy
import logging
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from optimizer_checks import ALL, Users
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

from nntrain.zoo import with_lookahead
from nntrain.processes import Processes

FEW = [
    'SGD', 'Nesterov', 'AdamW', 'AdamAnnealed', 'LAMB', 'LARS', 'RAdam',
    'LookaheadUsers']
few = pytest.mark.parametrize('name', FEW)
LR, N_EPOCHS, BATCH = .02, 2, 8


class Points(Dataset):
    "24 points and their class, in order"
    def __init__(self):
        self.x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
        self.y = (self.x.sum(1) > 0).long()
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def loader(): return DataLoader(Points(), batch_size=BATCH)

def weights(model): return [p.detach().clone() for p in model.parameters()]

def plain(name, n_epochs=N_EPOCHS, gamma=1., lr=LR):
    """What the loop of five lines makes of the network; the rate is multiplied by
    `gamma` after each step"""
    model = Net()
    opt = ALL[name](model.parameters(), lr=lr)
    for xb, yb in list(loader())*n_epochs:
        opt.zero_grad()
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        for group in opt.param_groups: group['lr'] *= gamma
    return weights(model)

def same(ours, theirs):
    for p, q in zip(ours, theirs, strict=True): assert_close(p, q, rtol=0, atol=1e-6)


@few
def test_lightning(name, tmp_path):
    "With a scheduler; stopped after one epoch, and gone on from a checkpoint"
    lightning = pytest.importorskip('lightning')
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
        def training_step(self, batch, i):
            return F.cross_entropy(self.net(batch[0]), batch[1])
        def configure_optimizers(self):
            opt = ALL[name](self.parameters(), lr=LR)
            schedule = torch.optim.lr_scheduler.ExponentialLR(opt, .9)
            return [opt], [{'scheduler': schedule, 'interval': 'step'}]
    def trainer(n_epochs):
        off = dict.fromkeys(
            (
                'logger', 'enable_checkpointing', 'enable_progress_bar',
                'enable_model_summary'),
            False,
        )
        return lightning.Trainer(
            max_epochs=n_epochs, accelerator='cpu', default_root_dir=tmp_path, **off)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        first, second = trainer(1), trainer(2)
        first.fit(Module(), loader())
        first.save_checkpoint(tmp_path/'half.ckpt')
        second.fit(module := Module(), loader(), ckpt_path=tmp_path/'half.ckpt')
    same(weights(module.net), plain(name, gamma=.9))


@few
def test_fastai(name, tmp_path):
    pytest.importorskip('fastai')
    import fastai.callback.progress
    import fastai.callback.schedule  # noqa: F401  both add methods to the learner
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    learn = Learner(
        DataLoaders(loader(), loader()), model := Net(), F.cross_entropy, path=tmp_path,
        opt_func=partial(OptimWrapper, opt=ALL[name]), lr=LR, train_bn=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(N_EPOCHS, lr=LR)
    same(weights(model), plain(name))
    # writes rate and momentum
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, lr_max=LR)
    assert all(p.isfinite().all() for p in model.parameters())


@few
def test_accelerate(name, tmp_path):
    "State saved after the first epoch and loaded into a fresh optimizer"
    accelerate = pytest.importorskip('accelerate')
    def prepared():
        accelerator, model = accelerate.Accelerator(cpu=True), Net()
        opt = ALL[name](model.parameters(), lr=LR)
        return accelerator, *accelerator.prepare(model, opt, loader())
    def epoch(accelerator, model, opt, batches):
        for xb, yb in batches:
            opt.zero_grad()
            accelerator.backward(F.cross_entropy(model(xb), yb))
            opt.step()
    first = prepared()
    epoch(*first)
    first[0].save_state(tmp_path/'state')
    second = prepared()
    second[0].load_state(tmp_path/'state')
    epoch(*second)
    same(weights(second[1]), plain(name))


@few
def test_transformers_trainer(name, tmp_path):
    transformers = pytest.importorskip('transformers')
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
        def forward(self, x, labels):
            return {'loss': F.cross_entropy(self.net(x), labels)}
    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args): return None
    rows = [dict(x=x, labels=y) for x, y in Points()]
    model = WithLoss()
    args = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=N_EPOCHS, per_device_train_batch_size=BATCH,
        use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type='constant',
        max_grad_norm=0.0, save_strategy='no', logging_strategy='no')
    opt = ALL[name](model.parameters(), lr=LR)
    InOrder(model, args, train_dataset=rows, optimizers=(opt, None)).train()
    same(weights(model), plain(name))


@few
def test_skorch(name):
    """Cloned as in a grid search, pickled in the middle, and gone on with; the rate is
    a setting of the net"""
    pytest.importorskip('skorch')
    from skorch import NeuralNetClassifier
    from sklearn.base import clone
    if not isinstance(ALL[name], type): pytest.skip('skorch wants a class')
    net = NeuralNetClassifier(
        Net, criterion=nn.CrossEntropyLoss, optimizer=ALL[name], lr=9.0, max_epochs=1,
        batch_size=BATCH, train_split=None, iterator_train__shuffle=False, verbose=0)
    net = clone(net.set_params(lr=LR))
    x, y = Points().x.numpy(), Points().y.numpy()
    net.fit(x, y)
    net = pickle.loads(pickle.dumps(net))
    net.partial_fit(x, y)
    same(weights(net.module_), plain(name))


def test_a_users_class_with_lookahead_and_its_copies():
    "What libraries do with a class: pickle it, copy it, send it to workers"
    made = with_lookahead(Users)
    for cls in pickle.loads(pickle.dumps(made)), copy.deepcopy(made):
        assert (cls.__name__, cls.parts, cls.hypers) == (
            made.__name__, made.parts, made.hypers)


# ---- two processes on this machine

def sharded(names, kind, folder):
    """For each optimizer: the largest distance from a network that one process trains,
    after `kind` has spread weights or states over two; for FSDP2 half of the way
    goes through a distributed checkpoint"""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    torch.manual_seed(1)
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    mine = slice(rank*4, rank*4 + 4)
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))
    def spread(make):
        model = net()
        if kind == 'FSDP2':
            for part in model[0], model[2], model:
                fully_shard(part, mesh=init_device_mesh('cpu', (world,)))
            return model, make(model.parameters(), lr=.05)
        model = nn.parallel.DistributedDataParallel(model)
        if kind == 'ZeRO':
            return model, ZeroRedundancyOptimizer(model.parameters(), make, lr=0.05)
        return model, make(model.parameters(), lr=.05)
    def go(model, opt, rows, n=6):
        for _ in range(n):
            opt.zero_grad()
            ((model(x[rows]) - y[rows])**2).mean().backward()
            opt.step()
    gaps = {}
    for name in names:
        alone = net()
        go(alone, ALL[name](alone.parameters(), lr=.05), slice(None), 12)
        model, opt = spread(ALL[name])
        go(model, opt, mine)
        if kind == 'FSDP2':
            path = f'{folder}/{name}'
            states = dict(zip(('model', 'opt'), get_state_dict(model, opt)))
            dcp.save(states, checkpoint_id=path)
            model, opt = spread(ALL[name])
            states = dict(zip(('model', 'opt'), get_state_dict(model, opt)))
            dcp.load(states, checkpoint_id=path)
            set_state_dict(
                model, opt, model_state_dict=states['model'],
                optim_state_dict=states['opt'])
        go(model, opt, mine)
        whole = [p.full_tensor() if kind == 'FSDP2' else p for p in model.parameters()]
        gaps[name] = max(
            (p - q).abs().max().item() for p, q in zip(alone.parameters(), whole))
    return gaps


@pytest.fixture(scope='module')
def two(root):
    with Processes(2) as processes:
        processes.run(
            f'import sys, warnings; sys.path.insert(0, {str(root / "tests")!r})')
        processes.run(
            'warnings.simplefilter("ignore"); from optimizer_checks import ALL')
        yield processes


@pytest.mark.parametrize('kind', ['DDP', 'ZeRO', 'FSDP2'])
def test_two_processes(two, kind, tmp_path):
    """ZeRO and DDP keep whole parameters; FSDP2 cuts them, and lengths are still those
    of whole layers"""
    if kind == 'FSDP2' and not hasattr(torch.cpu.Stream, 'record_event'):
        pytest.skip('FSDP2 of this torch needs a GPU')
    names = (
        FEW if kind != 'ZeRO' else [name for name in FEW if isinstance(ALL[name], type)]
    )
    for gaps in two.run(sharded, names, kind, str(tmp_path)):
        assert list(gaps) == names and max(gaps.values()) < 1e-5, gaps


def test_lengths_of_sharded_tensors_are_those_of_the_whole(two):
    "Five rows over two processes: three here, two there"
    def steps(spread):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        def given(shape):
            x = torch.arange(1., 1 + shape[0]*shape[1]).view(shape)
            return (
                distribute_tensor(x, init_device_mesh('cpu', (world,)), [Shard(0)])
                if spread else x)
        moved = {}
        for name in 'LAMB', 'LARS':
            p = nn.Parameter(given((5, 3)))
            opt = ALL[name]([p], lr=.1, weight_decay=.1)
            for _ in range(3): p.grad = .5 + given((5, 3)); opt.step()
            moved[name] = (p.full_tensor() if spread else p).detach()
        return moved
    for spread, plain in zip(two.run(steps, True), two.run(steps, False)):
        for name in plain: assert_close(spread[name], plain[name], rtol=1e-5, atol=1e-6)
