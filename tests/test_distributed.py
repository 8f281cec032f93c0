"""Several processes train as one: two real processes (gloo, loopback) against one with
the whole batch"""
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nntrain.accumulate import GradientAccumulationCB
from nntrain.average import WeightAveragingCB
from nntrain.checkpoint import CheckpointCB
from nntrain.clip import GradientClipCB
from nntrain.precision import MixedPrecisionCB
from nntrain.callbacks import StopOnNonFiniteCB
from nntrain.data import DataLoaders
from nntrain.tensor_loader import TensorLoader
from nntrain.distributed import AccelerateCB
from nntrain.processes import Processes
from nntrain.world import is_main, part_of
from nntrain.batches import tensors_of
from nntrain.shards import (ListShard, LoaderShard, TensorShard, made_up_row,
                            shard)
from nntrain.compare import MomentumLearner
from nntrain.callback import Callback
from nntrain.events import CancelEpoch, CancelStep
from nntrain.lr_finder import lr_find
from nntrain.compare import set_seed
from nntrain.learner import Learner
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.prepare import DeviceCB
from nntrain.history import RecorderCB
from nntrain.progress import ProgressCB
from nntrain.matrix import Muon
from nntrain.momentum import Momentum
from nntrain.parts import sgd_step
from nntrain.schedule import linear
from nntrain.split import split
from nntrain.steering import ScheduleCB
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

IMPORTS = '''
import os, sys, time
import torch
import torch.nn.functional as F
from functools import partial
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from nntrain.callback import Callback
from nntrain.accumulate import GradientAccumulationCB
from nntrain.average import WeightAveragingCB
from nntrain.clip import GradientClipCB
from nntrain.precision import MixedPrecisionCB
from nntrain.checkpoint import CheckpointCB
from nntrain.compare import MomentumLearner, set_seed
from nntrain.data import DataLoaders
from nntrain.distributed import *
from nntrain.events import CancelEpoch, CancelStep
from nntrain.history import RecorderCB
from nntrain.learner import Learner
from nntrain.callbacks import BatchLimitCB
from nntrain.logs import CSVLogCB
from nntrain.lr_finder import lr_find
from nntrain.matrix import Muon
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.momentum import Momentum
from nntrain.callbacks import StopOnNonFiniteCB
from nntrain.parts import sgd_step
from nntrain.prepare import SingleBatchCB
from nntrain.progress import ProgressCB
from nntrain.saving import SaveBestCB
from nntrain.schedule import cosine
from nntrain.shards import *
from nntrain.split import split
from nntrain.steering import ScheduleCB
from nntrain.tensor_loader import TensorLoader
from nntrain.torch_schedulers import TorchSchedulerCB
from nntrain.world import *
'''


def toy(n):
    x = torch.randn(
        n, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, (x.sum(1) > 0).long() + (x[:, 0] > 0)


def loader(kind, n, batch_size=16):
    x, y = toy(n)
    if kind == 'seeded tensors':
        return TensorLoader(x, y, batch_size, shuffle=True, seed=3)
    if kind == 'tensors': return TensorLoader(x, y, batch_size, shuffle=True)
    if kind == 'in order': return TensorLoader(x, y, batch_size)
    if kind == 'dict':
        return [
            dict(x=x[i : i + batch_size], label=y[i : i + batch_size])
            for i in range(0, n, batch_size)]
    generator = (
        torch.Generator().manual_seed(5) if kind == 'seeded DataLoader' else None)
    return DataLoader(
        TensorDataset(x, y), batch_size, shuffle=True, generator=generator)


def model(): return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(
    kind='seeded tensors', n=103, cbs=(), opt_func=Momentum, metrics=(), n_epochs=2,
    learner=Learner, n_valid=41):
    "Final weights, history without seconds, losses of the batches"
    set_seed(0)
    valid = (
        TensorLoader(*toy(n_valid), 8) if kind != 'dict' else loader('dict', n_valid))
    learn = learner(
        model(), DataLoaders(loader(kind, n), valid), F.cross_entropy, opt_func, lr=0.1,
        cbs=[MetricsCB(Accuracy(), *metrics), rec := RecorderCB(), *cbs])
    learn.fit(n_epochs)
    return (
        [p.detach() for p in learn.model.state_dict().values()],
        [{k: v for k, v in r.items() if k != 'seconds'} for r in learn.history],
        rec.values['loss'])


def gap(a, b): return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


def same(two, kind='seeded tensors', n=103, cbs='', *rest):
    "Train alone here and in two processes; `cbs`: further callbacks for both, as text"
    exec(IMPORTS, space := {})
    alone = train(kind, n, eval(f'[{cbs}]', space), *rest)
    assert gap(alone[0], model().state_dict().values()) > 1e-3
    two.run(
        f'def with_cbs(*args): return train({kind!r}, {n}, [AccelerateCB(), {cbs}], '
        '*args)')
    def together(*args): return with_cbs(*args)
    results = two.run(together, *rest, show=False)
    for weights, history, losses in results:
        assert gap(weights, alone[0]) < 1e-12
        assert len(history) == len(alone[1]) and len(losses) == len(alone[2])
        for r, s in zip(history, alone[1]):
            assert r.keys() == s.keys() and all(abs(r[k] - s[k]) < 1e-6 for k in r), (
                r, s)
        assert max(abs(p - q) for p, q in zip(losses, alone[2])) < 1e-6
    # to the last bit
    for other in results[1:]:
        assert gap(results[0][0], other[0]) == 0 and results[0][1:] == other[1:]


@pytest.fixture(scope='module')
def running():
    procs = []
    yield procs
    for p in procs: p.close()


@pytest.fixture
def two(running):
    "Two processes, the same for all tests; new ones after a test in which they ended"
    if not (running and running[-1].close.alive):
        running.append(Processes(2))
        running[-1].run(IMPORTS)
        running[-1].define(toy, loader, model, train)
    return running[-1]


@given(n=st.integers(0, 200), world=st.integers(1, 17))
def test_parts_are_a_partition_into_nearly_equal_sizes(n, world):
    parts = [range(n)[part_of(n, rank, world)] for rank in range(world)]
    assert [i for p in parts for i in p] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and len(parts[0]) == max(
        map(len, parts))


@given(
    n=st.integers(1, 40), batch_size=st.integers(1, 12), world=st.integers(1, 5),
    shuffle=st.booleans(), drop_last=st.booleans())
def test_parts_of_a_tensor_loader_are_its_batches(
    n, batch_size, world, shuffle, drop_last):
    x = torch.arange(n)
    if drop_last and n < batch_size: drop_last = False
    make = lambda: TensorLoader(
        x, x, batch_size, shuffle=shuffle, drop_last=drop_last, seed=1)
    parts = [list(TensorShard(make(), rank, world)) for rank in range(world)]
    whole = list(make())
    assert all(len(p) == len(whole) for p in parts)
    for i, (_, yb) in enumerate(whole):
        assert torch.equal(torch.cat([p[i][1] for p in parts]), yb)


def test_parts_of_a_tensor_loader_share_its_tensors_and_count_epochs_of_their_own():
    x = torch.arange(5.)[:, None]
    whole = TensorLoader(x, torch.arange(5), 2, shuffle=True, seed=0)
    parts = [TensorShard(whole, rank, 2) for rank in (0, 1)]
    served = [[len(yb) for _, yb in part] for part in parts]
    assert served == [[1, 1, 1], [1, 1, 0]]       # one row is left: none for part 1
    assert (len(parts[1]), parts[1].n, parts[1].epoch, whole.epoch) == (3, 5, 1, 0)
    assert all(part.x.data_ptr() == whole.x.data_ptr() for part in parts)   # no copy
    with pytest.raises(ValueError, match='got rank 2 of 2'): TensorShard(whole, 2, 2)


def test_a_made_up_row_has_the_form_of_an_empty_batch():
    Pair = namedtuple('Pair', 'x y')
    for batch in (
        Pair(torch.ones(0, 3), torch.ones(0).long()),
        dict(x=torch.ones(0, 3), more=[torch.ones(0, 2, 2)]),
    ):
        row = made_up_row(batch)
        assert type(row) is type(batch)
        assert all(len(t) == 1 and not t.any() for t in tensors_of(row))
        shapes, own = ([(t.shape[1:], t.dtype) for t in tensors_of(b)]
                       for b in (row, batch))
        assert shapes == own


def test_loaders_that_cannot_be_cut_are_refused_and_named_tuples_stay():
    x = torch.arange(6)
    class Stream(IterableDataset):
        def __iter__(self): return iter(x)
    class Brighter(TensorLoader):
        def _batch(self, order, i): xb, yb = super()._batch(order, i); return xb + 1, yb
    for loader in (
        DataLoader(Stream(), 2),
        DataLoader(Stream(), None),
        Brighter(x, x, 2),
    ):
        with pytest.raises(
            TypeError, match=f'cut the batches of a {type(loader).__name__}'
        ):
            shard(loader, 0, 2)
    for loader in DataLoader(Stream(), 2), DataLoader(Stream(), None):
        with pytest.raises(TypeError, match='cut the batches of a DataLoader'):
            LoaderShard(loader, 0, 2)
    Pair = namedtuple('Pair', 'x y')
    data = [Pair(a, a) for a in x[:5]]
    for loader in DataLoader(data, 2), list(DataLoader(data, 2)):
        parts = [list(shard(loader, rank, 2)) for rank in (0, 1)]
        assert [type(b) for part in parts for b in part] == 6*[Pair]
        assert [[b.y.tolist() for b in part] for part in parts] == [
            [[0], [2], [4]], [[1], [3], []]]

def test_parts_of_other_loaders():
    x = torch.arange(11)
    data = TensorDataset(x, x)
    lists = [
        [list(shard(dl, r, 3)) for r in range(3)]
        for dl in (
            DataLoader(data, 5),
            list(DataLoader(data, 5)),
            DataLoader(data, batch_sampler=[[0, 1], [5, 4, 3, 2], [9]]),
        )
    ]
    for parts in lists: assert all(len(p) == 3 for p in parts)
    assert [sum([p[i][1].tolist() for p in lists[0]], []) for i in range(3)] == [
        [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10]]
    assert [sum([p[i][1].tolist() for p in lists[2]], []) for i in range(3)] == [
        [0, 1], [5, 4, 3, 2], [9]]
    part = shard(DataLoader(data, 5), 1, 2)
    assert (
        isinstance(part, LoaderShard) and part.dataset is data and part.batch_size == 5
        and len(part) == 3)
    assert isinstance(shard([(x, x)], 0, 2), ListShard)
    class Own:
        def shard(self, rank, world): return [rank, world]
    assert shard(Own(), 1, 2) == [1, 2]
    with pytest.raises(TypeError, match='no way to cut the batches of a generator'):
        shard((b for b in [(x, x)]), 0, 2)
    with pytest.raises(ValueError, match='rank'): LoaderShard(DataLoader(data, 5), 3, 3)


@pytest.mark.parametrize(
    'kind',
    [
        'seeded tensors', 'tensors', 'in order', 'dict', 'DataLoader',
        'seeded DataLoader'],
)
def test_weights_and_history_of_one_process(two, kind):
    same(two, kind)


# a full last batch; one row: nothing for process 1; one row each; one sample in all
@pytest.mark.parametrize('n', [96, 97, 98, 1])
def test_last_batch_of_any_size(two, n):
    same(two, 'seeded tensors', n)


def test_one_row_is_left_of_a_data_loader(two): same(two, 'DataLoader', 97)


@pytest.mark.parametrize('opt_func', [torch.optim.AdamW, torch.optim.SGD])
def test_torchs_optimizers(two, opt_func):
    same(two, 'seeded tensors', 103, '', opt_func)


def muon(params, lr):
    "Matrices by Muon, in float64; vectors by SGD"
    kinds = dict(matrix=Muon, rest=(sgd_step,))
    return split(kinds, lambda name, p: 'matrix' if p.ndim > 1 else 'rest', lr=lr,
                 matrix=dict(ns_dtype='float64'))(params)


def test_muon_beside_another_kind(two):
    alone = train(opt_func=muon)
    two.define(muon)
    def together(): return train('seeded tensors', 103, [AccelerateCB()], muon)
    (a, *_), (b, *_) = two.run(together, show=False)
    assert gap(a, b) == 0 and gap(a, alone[0]) < 1e-12
    assert gap(alone[0], model().state_dict().values()) > 1e-3


def test_torchmetrics(two):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
    same(
        two, 'seeded tensors', 97, '', Momentum,
        [MulticlassAccuracy(3, average='micro'), MulticlassF1Score(3)])


@pytest.mark.parametrize(
    'cbs',
    [
        'ScheduleCB(lr=cosine(.2, 0.), momentum=cosine(.5, .9))',
        'TorchSchedulerCB(partial(torch.optim.lr_scheduler.StepLR, step_size=3))',
        'GradientClipCB(.1)', 'WeightAveragingCB(.9)',
        'BatchLimitCB(n_train=3, n_valid=2)', 'SingleBatchCB()', 'StopOnNonFiniteCB()',
        'GradientAccumulationCB(3)'],
)
def test_with_other_callbacks(two, cbs):
    same(two, 'seeded tensors', 97, cbs)


# the last batch holds targets that count: a loss of 0/0 is NaN, for one process and for
# two
UNEVEN = """type('UnevenCB', (Callback,), dict(before_fit=lambda self, learn: setattr(
    learn, 'loss_func', partial(F.cross_entropy, ignore_index=1,
                                weight=torch.tensor([1., 2., 9.]).double()))))()"""


@pytest.mark.parametrize('cbs', [UNEVEN, UNEVEN + ', GradientAccumulationCB(3)'])
def test_a_weighted_loss_counts_what_it_divides_by(two, cbs):
    same(two, 'seeded tensors', 103, cbs)


def test_a_gradient_that_is_kept_is_not_counted_twice(two):
    same(two, 'seeded tensors', 103, '', torch.optim.SGD, (), 2, MomentumLearner)


def test_three_processes():
    with Processes(3) as three:
        three.run(IMPORTS)
        three.define(toy, loader, model, train)
        same(three, 'seeded tensors', 97)  # parts of 6, 5, 5, and at last 1, 0, 0


def test_everything_is_put_back(two):
    def twice():
        set_seed(0)
        learn = Learner(
            model(), DataLoaders(loader('seeded tensors', 97), loader('in order', 20)),
            F.cross_entropy, Momentum, lr=0.1, cbs=[MetricsCB(), AccelerateCB()])
        kept = learn.model, learn.dls, learn.dls.train
        learn.fit(1)
        assert (learn.model, learn.dls, learn.dls.train) == kept and type(
            learn.opt) is Momentum
        assert learn.dls.train.epoch == 1 and learn.model.training is False
        learn.fit(1, train=False)
        learn.fit(2, valid=False)
        assert not any(
            hasattr(learn.model, a)
            for a in ('_is_accelerate_prepared', '_original_forward'))
        return [p.detach() for p in learn.model.parameters()], learn.dls.train.epoch
    two.define(model)
    (a, epoch), (b, _) = two.run(twice)
    set_seed(0)
    learn = Learner(
        model(), DataLoaders(loader('seeded tensors', 97), loader('in order', 20)),
        F.cross_entropy, Momentum, lr=0.1)
    learn.fit(1); learn.fit(2, valid=False)
    assert epoch == learn.dls.train.epoch == 3 and gap(a, b) == 0
    assert gap(a, [p.detach() for p in learn.model.parameters()]) < 1e-12


def test_others_see_the_plain_model_and_the_whole_loss(two):
    def watched():
        seen = []
        class LookCB(Callback):
            def after_predict(self, learn): seen.append(type(learn.model).__name__)
            def after_loss(self, learn): seen.append(round(learn.loss.item(), 12))
            def after_step(self, learn): seen.append(sorted(learn.model.state_dict()))
        train(n=20, cbs=[AccelerateCB(), LookCB()], n_epochs=1)
        return seen
    a, b = two.run(watched)
    assert (
        a == b and {o for o in a if isinstance(o, str)} == {'Sequential'}
        and ['0.bias', '0.weight', '2.bias', '2.weight'] in a)


def test_only_the_main_process_prints_and_saves(two, tmp_path, capsys):
    def main_only(folder):
        class SaveCB(Callback):
            main_only = True
            def before_fit(self, learn): self.saved = 0
            def after_epoch(self, learn):
                with open(os.path.join(folder, f'epoch{learn.epoch}'), 'x') as f:
                    f.write('')  # 'x': the file must not be there yet
                self.saved += 1
        class PartlyCB(Callback):
            main_only = ('after_epoch',)
            n_fit = n_epoch = 0
            def before_fit(self, learn): self.n_fit += 1
            def after_epoch(self, learn): self.n_epoch += 1
        partly = PartlyCB()
        train(cbs=[SaveCB(), partly, AccelerateCB(), ProgressCB()])
        return partly.n_fit, partly.n_epoch
    assert two.run(main_only, str(tmp_path)) == [(1, 2), (1, 0)]
    assert {p.name for p in tmp_path.iterdir()} == {'epoch0', 'epoch1'}
    printed = capsys.readouterr().out
    assert (
        'process 0 │' in printed and 'train_loss' in printed
        and 'process 1' not in printed)


def test_callbacks_that_write_do_so_once_and_read_everywhere(two, tmp_path):
    def saved(folder, name):
        before, moved = os.replace, []
        os.replace = lambda a, b: (moved.append(b), before(a, b))
        try:
            weights, history, _ = train(
                cbs=[
                    AccelerateCB(), SaveBestCB(f'{folder}/best.pt', restore=True),
                    CSVLogCB(f'{folder}/{name}.csv')]
            )
        finally:
            os.replace = before
        best = torch.load(f'{folder}/best.pt')
        return len(moved), gap(weights, best.values()), len(history)
    two.define(gap)
    (n, off, n_epochs), (n_too, off_too, _) = two.run(saved, str(tmp_path), 'log')
    assert n == 2*n_epochs and n_too == 0 and off == off_too == 0
    assert len((tmp_path/'log.csv').read_text().splitlines()) == 1 + n_epochs


def test_a_checkpoint_is_one_file_and_refused_by_all(two, tmp_path):
    def fitted(path, n_epochs=2, opt_func=Momentum):
        saved = CheckpointCB(path, every_batches=2)
        cbs = [AccelerateCB(), saved, SaveBestCB(path + '.best')]
        try: result = train(cbs=cbs, n_epochs=n_epochs, opt_func=opt_func)
        except ValueError as e: return str(e)
        return gap(result[0], train()[0]), len(result[1]), saved.resumed
    two.define(gap)
    path = str(tmp_path/'c.pt')
    for resumed in None, (2, 0):
        for off, n_epochs, its in two.run(fitted, path):
            assert off < 1e-12 and n_epochs == 2 and its == resumed
    assert {p.name for p in tmp_path.iterdir()} == {'c.pt', 'c.pt.best'}
    content = (tmp_path/'c.pt').read_bytes()
    for args, said in [
        ((path, 3), 'n_epochs was 2, is 3'),
        ((path, 2, torch.optim.SGD), 'optimizer was Momentum, is SGD'),
    ]:
        a, b = two.run(fitted, *args)
        assert a == b and said in a
    assert (tmp_path/'c.pt').read_bytes() == content
    (tmp_path/'c.pt').write_bytes(content[:-99])
    a, b = two.run(fitted, path)
    assert a == b and 'damaged, cut short' in a
    with pytest.raises(ValueError, match='leave it out of main_only'):
        train(cbs=[AccelerateCB((CheckpointCB,)), CheckpointCB(tmp_path/'d.pt')])


def test_what_only_the_main_process_hears_is_saved_there(two, tmp_path):
    def resumed(path):
        class CountCB(Callback):
            def before_fit(self, learn): self.n = 0
            def after_epoch(self, learn): self.n += 1
            def state_dict(self): return {'n': self.n}
            def load_state_dict(self, state): self.n = state['n']
        class CutCB(Callback):
            order = 2000
            def after_epoch(self, learn):
                if learn.epoch == 1: raise KeyError('cut')
        for more in [CutCB()], []:
            count = CountCB()
            cbs = [AccelerateCB((CountCB, RecorderCB)), count, CheckpointCB(path)]
            try: train(cbs=[*cbs, *more], n_epochs=3)
            except KeyError: pass
            except AttributeError: pass      # `train` reads the recorder of process 1
        return vars(count).get('n')
    assert two.run(resumed, str(tmp_path/'c.pt')) == [3, None]


def test_random_numbers_differ_and_first_weights_do_not(two):
    def unequal():
        torch.manual_seed(rank)
        learn = Learner(
            nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double(),
            DataLoaders(loader('tensors', 32), loader('in order', 8)), F.cross_entropy,
            cbs=[AccelerateCB()])
        if rank: learn.model[1].running_mean += 5
        numbers = []
        class LookCB(Callback):
            def before_phase(self, learn):
                if learn.training:
                    numbers.append(
                        [p.sum().item() for p in learn.model.state_dict().values()])
            def before_batch(self, learn): numbers.append(torch.rand(()).item())
        learn.fit(1, cbs=[LookCB()])
        return numbers[0], numbers[1:], [v for v in learn.model.state_dict().values()]
    (first, dice, weights), (first_too, dice_too, weights_too) = two.run(unequal)
    assert (
        first == first_too and not set(dice) & set(dice_too)
        and gap(weights, weights_too) == 0)


def test_with_one_seed_every_process_draws_its_own_numbers():
    """As a script does, which seeds all processes alike: Python's, NumPy's and torch's
    numbers differ from each to each"""
    def drawn():
        import random
        import numpy as np
        numbers = []
        class DrawCB(Callback):
            def before_batch(self, learn):
                if learn.training:
                    numbers.append(
                        (random.random(), np.random.rand(), torch.rand(()).item()))
        set_seed(0)
        Learner(
            model(), DataLoaders(loader('in order', 16), loader('in order', 16)),
            F.cross_entropy, cbs=[AccelerateCB(), DrawCB()]).fit(1)
        return numbers[0]
    with Processes(3) as three:
        three.run(IMPORTS)
        three.define(toy, loader, model)
        results = three.run(drawn)
    for kind in zip(*results): assert len(set(kind)) == 3, results


def test_batchnorm_averages_its_statistics(two):
    """Mean over the processes of what each has seen: for one training batch it can be
    computed by hand"""
    def one_batch():
        bn = nn.BatchNorm1d(5).double()
        set_seed(0)
        Learner(
            nn.Sequential(bn, nn.Linear(5, 3).double()),
            DataLoaders(loader('in order', 16), loader('in order', 8)), F.cross_entropy,
            lr=1e-9, cbs=[AccelerateCB()]).fit(1)
        return bn.running_mean, bn.running_var
    x = toy(16)[0]
    for mean, var in two.run(one_batch):
        assert torch.allclose(mean, 0.1 * x.mean(0)) and torch.allclose(
            var, 0.9 + 0.1 * (x[:8].var(0) + x[8:].var(0)) / 2)


def test_decisions_are_taken_by_all(two):
    def with_nan(where):
        class SpoilCB(Callback):
            order = -40
            def after_loss(self, learn):
                if learn.phase == where and learn.iter == 1 and rank == 1:
                    learn.loss = learn.loss * float('nan')
        class SkipCB(Callback):
            def after_epoch(self, learn):
                if learn.epoch == 0: raise CancelEpoch()
        stop = StopOnNonFiniteCB()
        train(cbs=[AccelerateCB(), SkipCB(), SpoilCB(), stop])
        return stop.stopped
    for where in 'train', 'valid':
        a, b = two.run(with_nan, where, show=False)
        assert a == b and f'{where} loss nan' in a


def test_lr_find(two):
    def find():
        dl = loader('seeded tensors', 97)
        learn = Learner(model(), DataLoaders(dl, dl), F.cross_entropy, Momentum,
                        cbs=[AccelerateCB(), ProgressCB(), MetricsCB()])
        return lr_find(learn, n_steps=30, stop_at=1.5)
    two.run('from nntrain.lr_finder import lr_find')
    two.define(model)
    set_seed(0); alone = find()
    two.run('set_seed(0)')
    a, b = two.run(find)
    assert (
        a.lrs == b.lrs and a.losses == b.losses and a.stopped == b.stopped
        and a.lrs == alone.lrs)
    assert torch.allclose(torch.tensor(a.losses), torch.tensor(alone.losses), rtol=1e-5)


@pytest.mark.parametrize(
    'change, what',
    [
        ('n=97+rank', 'train targets'), ('n=103+16*rank', 'train batches'),
        ('n_epochs=1+rank', 'n_epochs'),
        ("kind='tensors' if rank else 'seeded tensors'", 'train seed')],
)
def test_plans_that_differ_are_refused_by_all(two, change, what):
    two.run(f'def differ(): return train(cbs=[AccelerateCB()], **dict({change}))')
    def message():
        try: differ()
        except ValueError as e: return str(e)
    a, b = two.run(message)
    assert a == b and f'do not plan the same run: {what} is [' in a


def test_metrics_that_cannot_be_added_are_refused(two):
    def refused():
        class Last:
            def reset(self): pass
            def update(self, preds, targets): pass
            def compute(self): return 0.
        try: train(cbs=[AccelerateCB()], metrics=[Last()])
        except TypeError as e: return str(e)
    assert two.run(refused)[0].startswith('Last cannot be added up over processes')


class BackwardCB(Callback):
    def backward(self, learn): learn.backward()


def test_the_verbs_are_free_for_others(two):
    two.define(BackwardCB)
    plain = train(cbs=[BackwardCB()])
    def together(): return train(cbs=[AccelerateCB(), BackwardCB()])
    for weights, *_ in two.run(together): assert gap(weights, plain[0]) < 1e-12


def test_a_predict_that_goes_past_the_averaging_is_refused(two):
    def past():
        class PastLearner(Learner):
            def predict(self): self.preds = self.model(*self.xb)
        try: train(cbs=[AccelerateCB()], learner=PastLearner)
        except RuntimeError as e: return str(e)
    def through():
        class ThroughLearner(Learner):
            def predict(self): self.preds = self.forward(*self.xb)
        return train(cbs=[AccelerateCB()], learner=ThroughLearner)[0]
    for said in two.run(past): assert 'let it call learn.forward, not' in said
    for weights in two.run(through): assert gap(weights, train()[0]) < 1e-12


def test_accelerates_own_float16_is_refused(monkeypatch):
    with pytest.raises(ValueError, match='put MixedPrecisionCB.torch.float16. beside'):
        train(cbs=[AccelerateCB(mixed_precision='fp16')])
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'fp16')
    with pytest.raises(ValueError, match='put MixedPrecisionCB.torch.float16. beside'):
        train(cbs=[AccelerateCB()])


def test_a_device_callback_that_moves_the_model_elsewhere_is_refused():
    "On several GPUs `DeviceCB('cuda:0')` would bring all models to the first one"
    said = 'model on cpu, and DeviceCB would move it to meta: leave DeviceCB out'
    with pytest.raises(ValueError, match=said):
        train(cbs=[AccelerateCB(), DeviceCB('meta')])
    train(cbs=[AccelerateCB(), DeviceCB('cpu')])


def test_synchronised_batchnorm_asks_for_cuda(two):
    def synchronised():
        try: train(cbs=[AccelerateCB(sync_batchnorm=True)])
        except ValueError as e: return str(e)
    a, b = two.run(synchronised)
    assert a == b and 'asks for CUDA' in a


def test_shuffled_without_a_seed_the_main_process_draws(two):
    def one_epoch(kind):
        torch.manual_seed(rank)                     # on purpose: generators that differ
        x = torch.arange(11)
        if kind == 'tensors': loader = TensorLoader(x, x, 4, shuffle=True)
        else: loader = DataLoader(TensorDataset(x, x), 4, shuffle=True)
        return [yb.tolist() for _, yb in shard(loader, rank, world)]
    for kind in 'tensors', 'DataLoader':
        a, b = two.run(one_epoch, kind)
        x = torch.arange(11)
        torch.manual_seed(0)                          # the order of a process alone
        if kind == 'tensors': alone = TensorLoader(x, x, 4, shuffle=True)
        else: alone = DataLoader(TensorDataset(x, x), 4, shuffle=True)
        assert [p + q for p, q in zip(a, b)] == [yb.tolist() for _, yb in alone]
        assert sorted(sum(a + b, [])) == list(range(11)) != sum(a + b, [])


def test_the_order_of_an_epoch_travels_as_numbers(two):
    """What is pickled does not grow with the data, and the dataset meets plain ints;
    keys of another kind are pickled as before"""
    def one_epoch(kind, n):
        met, pickled, send = [], [], dist.broadcast_object_list
        class Seen(torch.utils.data.Dataset):
            def __len__(self): return n
            def __getitem__(self, key): met.append(key); return torch.tensor(int(key))
        def watched(box, src=0):
            pickled.append(len(pickle.dumps(box)))
            send(box, src=src)
        dist.broadcast_object_list = watched
        torch.manual_seed(rank)
        try:
            if kind == 'tensors':
                whole = TensorLoader(torch.arange(n), torch.arange(n), 1000, True)
                got = [v for x, _ in shard(whole, rank, world) for v in x.tolist()]
                return pickled, got, {int}
            keys = range(n) if kind == 'ints' else [str(i) for i in range(n)]
            batches = torch.utils.data.BatchSampler(
                torch.utils.data.RandomSampler(keys) if kind == 'ints' else keys,
                7, drop_last=False)
            whole = DataLoader(Seen(), batch_sampler=batches)
            got = [v for x in shard(whole, rank, world) for v in x.tolist()]
            return pickled, got, set(map(type, met))
        finally: dist.broadcast_object_list = send
    two.run('import pickle')
    for kind, n, types in ('tensors', 9999, {int}), ('ints', 9999, {int}), (
        'names', 20, {str}):
        (_, a, kind_a), (pickled, b, kind_b) = two.run(one_epoch, kind, n)
        assert sorted(a + b) == list(range(n)) and kind_a == kind_b == types
        assert len(pickled) == 1 and (kind == 'names' or pickled[0] < 500), kind


def test_a_tensor_that_is_agreed_on_keeps_shape_type_and_bits(two):
    def agreed():
        made = []
        def draw(t): made.append(rank); return t
        big = torch.arange(6., dtype=torch.double).view(2, 3).t() + rank
        got = [agree(lambda: draw(t)) for t in (
            big, torch.tensor(3 + rank), torch.empty(0, 2), torch.tensor([True]))]
        return made, got, agree(lambda: {'rank': rank}), agree(lambda: None)
    (made, a, said, nothing), (made_too, b, said_too, nothing_too) = two.run(agreed)
    assert made == [0]*4 and made_too == [] and said == said_too == {'rank': 0}
    assert nothing is nothing_too is None
    want = [torch.arange(6., dtype=torch.double).view(2, 3).t(), torch.tensor(3),
            torch.empty(0, 2), torch.tensor([True])]
    for got in a, b: torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize('variables', [{'RANK': '8'}, {'RANK': '1', 'WORLD_SIZE': '4'}])
def test_ranks_left_over_in_the_environment_change_nothing(monkeypatch, variables):
    plain = train()
    for name, value in variables.items(): monkeypatch.setenv(name, value)
    assert is_main()
    with_cb = train(cbs=[AccelerateCB()])
    assert gap(plain[0], with_cb[0]) == 0 and plain[1:] == with_cb[1:]


def test_a_launcher_is_asked_before_the_processes_have_met(monkeypatch):
    for name, value in {
        'TORCHELASTIC_RUN_ID': 'none',
        'RANK': '1',
        'WORLD_SIZE': '2',
    }.items():
        monkeypatch.setenv(name, value)
    assert not is_main()
    monkeypatch.setenv('RANK', '0')
    assert is_main()


# ---- float16: the scaler of a GPU works on a CPU, too. MixedPrecisionCB stands beside

class ScalerCB(MixedPrecisionCB):
    "Scales, but computes in full precision"
    def __init__(self):
        super().__init__(scaler=torch.amp.GradScaler('cpu', init_scale=2.0**16))
    def before_batch(self, learn): pass


class OverflowCB(Callback):
    "Infinite gradients in some batches of the first epoch"
    order = -20
    def __init__(self, *batches): self.batches = batches
    def after_backward(self, learn):
        if learn.epoch == 0 and learn.iter in self.batches:
            next(learn.model.parameters()).grad.fill_(float('inf'))


class TakenCB(Callback):
    def after_fit(self, learn): self.n = learn.n_taken


def test_float16_clips_unscaled_gradients():
    clips = [GradientClipCB(.2) for _ in range(3)]
    plain, scaled, mixed = (
        train(cbs=[clip, *cbs])
        for clip, cbs in zip(clips, ([], [AccelerateCB(), ScalerCB()], [ScalerCB()])))
    assert gap(scaled[0], mixed[0]) == 0 and clips[1].norms == clips[2].norms
    assert (
        gap(scaled[0], plain[0]) < 1e-12
        and max(abs(a - b) for a, b in zip(clips[0].norms, clips[1].norms)) < 1e-6)
    assert gap(scaled[0], model().state_dict().values()) > .01


@pytest.mark.parametrize('n_batches', [1, 3])
def test_float16_steps_that_overflow_do_not_count(n_batches):
    def run(amp, *cbs):
        clip, average, schedule, taken = (
            GradientClipCB(0.2), WeightAveragingCB(1.0),
            ScheduleCB(lr=linear(0.1, 0.0)), TakenCB())
        weights, history, _ = train(
            cbs=[
                *cbs, amp, OverflowCB(0, 1, 2), clip, average, schedule, taken,
                GradientAccumulationCB(n_batches)]
        )
        return (
            weights, history, clip.norms, average.average.weight, schedule.values['lr'],
            taken.n, amp.n_skipped, amp)
    *ours, accelerated = run(ScalerCB(), AccelerateCB())
    *theirs, mixed = run(ScalerCB())
    assert gap(ours[0], theirs[0]) == 0 and ours[1:] == theirs[1:]
    *_, rates, n_taken, n_skipped = ours
    assert (
        n_skipped == (3 if n_batches == 1 else 1)
        and len(rates) == n_taken == 2 * -(-7 // n_batches) - n_skipped)
    assert (
        accelerated.scaler.get_scale() == mixed.scaler.get_scale()
        == 2.0**16 / 2**n_skipped)


def test_float16_steps_that_somebody_else_cancels():
    class SkipCB(Callback):
        order = 5
        def after_backward(self, learn):
            if learn.iter % 2: raise CancelStep()
    ours, theirs = (
        train(cbs=[*cbs, ScalerCB(), SkipCB(), GradientClipCB(0.2)])
        for cbs in ([AccelerateCB()], []))
    assert gap(ours[0], theirs[0]) == 0


def test_float16_in_two_processes(two):
    two.define(ScalerCB, OverflowCB)
    def together():
        clip, amp = GradientClipCB(.2), ScalerCB()
        cbs = [AccelerateCB(), amp, OverflowCB(0, 1), clip, GradientAccumulationCB(2)]
        weights, history, _ = train(cbs=cbs)
        return weights, clip.norms, amp.n_skipped
    (a, norms, skipped), (b, norms_too, skipped_too) = two.run(together)
    clip, amp = GradientClipCB(.2), ScalerCB()
    alone = train(cbs=[amp, OverflowCB(0, 1), clip, GradientAccumulationCB(2)])
    assert (
        gap(a, b) == 0 and norms == norms_too
        and skipped == skipped_too == amp.n_skipped == 1)
    assert gap(a, alone[0]) < 1e-12


def test_one_process_changes_nothing():
    plain, with_cb = train(), train(cbs=[AccelerateCB()])
    assert gap(plain[0], with_cb[0]) == 0 and plain[1:] == with_cb[1:]


def test_mixed_precision_in_one_process_twice():
    """In a process of its own: accelerate keeps the precision for as long as a process
    lives"""
    done = subprocess.run([sys.executable, '-c', IMPORTS + '''
net, seen = nn.Sequential(nn.Linear(5, 3)), []
x, y = torch.randn(32, 5), torch.arange(32) % 3
net[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
dls = DataLoaders(TensorLoader(x, y, 16), TensorLoader(x, y, 16))
bf16 = AccelerateCB(mixed_precision='bf16', cpu=True)
learn = Learner(net, dls, F.cross_entropy, cbs=[bf16])
for _ in range(2):
    seen.clear(); learn.fit(1)
    assert seen == [torch.bfloat16]*4, seen
    assert net(x).dtype == torch.float32
'''], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not Path('/proc/net/tcp').exists(), reason='reads the tables of Linux')
def test_nothing_listens_beyond_loopback(two):
    def listening():
        mine = {
            os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')
            if os.path.islink(f'/proc/self/fd/{fd}')}
        found = []
        for table in '/proc/net/tcp', '/proc/net/tcp6':
            if not os.path.exists(table): continue
            for line in open(table).readlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == '0A' and f'socket:[{rest[5]}]' in mine:
                    found.append(local.split(':')[0])
        return found
    for found in two.run(listening):
        assert found and set(found) <= {
            '0100007F', '0' * 24 + '01000000'}  # 127.0.0.1, ::1


def test_waiting_in_vain_is_a_timeout():
    with Processes(2) as procs:
        with pytest.raises(TimeoutError, match='not all processes answered within 3 s'):
            procs.run('if rank == 0: dist.barrier()', timeout=3)
        assert all(p.wait(5) for p in procs.procs)


def test_import_stays_light():
    done = subprocess.run(
        [
            sys.executable, '-c',
            'import sys, nntrain.distributed; print("accelerate" in sys.modules)'],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == 'False', done.stderr


def test_an_error_in_one_process_ends_all(two):
    """The last test: it ends the processes of this module. Neither our metrics nor
    those of torchmetrics may wait for the others on the way out"""
    def stumble():
        from torchmetrics.classification import MulticlassAccuracy
        class FailCB(Callback):
            def after_loss(self, learn):
                if rank == 1 and learn.iter == 2: raise KeyError('a bug')
        train(cbs=[FailCB(), AccelerateCB()], metrics=[MulticlassAccuracy(3)])
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="(?s)process 1: .*KeyError: 'a bug'"):
        two.run(stumble, timeout=120)
    assert time.monotonic() - start < 100
    with pytest.raises(RuntimeError, match='have ended'): two.run('1')
