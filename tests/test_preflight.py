"""Preflight: it finds faults by their names, leaves healthy programs in peace, and
answers bad input with a sentence"""
import json
import random
import re
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from nntrain import flight, listen, preflight, sources
from nntrain.accumulate import GradientAccumulationCB
from nntrain.adaptive import AdamW
from nntrain.average import WeightAveragingCB
from nntrain.blocks import cnn
from nntrain.callback import Callback
from nntrain.clip import GradientClipCB
from nntrain.data import DataLoaders
from nntrain.findings import KINDS, Finding, Findings, page
from nntrain.learner import Learner
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.museum import EXHIBITS
from nntrain.precision import MixedPrecisionCB
from nntrain.probes import losses_at
from nntrain.saving import SaveBestCB
from nntrain.second_room import ROOM, ranks_found, room_program
from nntrain.soft_targets import MixUpCB
from nntrain.tensor_loader import TensorLoader

look = preflight.preflight
NOTEBOOK = json.loads((ROOT/'nbs/26_preflight.ipynb').read_text(encoding='utf-8'))
CODE = [''.join(c['source']) for c in NOTEBOOK['cells'] if c['cell_type'] == 'code']


@pytest.fixture(scope='module')
def chapter():
    "What the chapter defines: programs with faults, their names, healthy networks"
    wanted = ('import matplotlib', 'plan = budget', 'n_images, n_valid', 'NAMES = ',
              'NETS = ')
    toy = sources.fashion_tensors('toy')
    space = {'__name__': '__page__', 'fashion_tensors': lambda *_: toy,
             'preflight': look}
    cells = [next(src for src in CODE if name in src) for name in wanted]
    cells[0] = re.sub(r'FASHION_STD, fashion_tensors', 'FASHION_STD', cells[0])
    cells[2] = cells[2].split('flight = heard')[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('NNTRAIN_BUDGET', 'quick')
        for src in cells: exec(src, space)
    return SimpleNamespace(**space)


# ---- faults --------------------------------------------------------------------------

@pytest.mark.parametrize('n', EXHIBITS)
def test_exhibit_is_found_by_name(chapter, n):
    found = look(chapter.fly(chapter.sick[n], seed=3))
    assert chapter.NAMES[n] in found.names, found
    assert len(found) <= 2 and not found.skipped, found

def test_the_healthy_program_of_the_museum(chapter):
    for seed in 0, 1: assert look(chapter.fly(chapter.healthy, seed)).ok

@pytest.mark.parametrize('name', ROOM)
def test_second_room(chapter, name):
    assert chapter.room_flight(name, 1, True) == [ROOM[name][0]]
    assert chapter.room_flight(name, 1, False) == []

@pytest.mark.parametrize('bad, names', [(True, ['equal ranks']), (False, [])])
def test_equal_ranks(bad, names): assert ranks_found(bad) == names

def line_data(seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(320, 8, generator=g)
    y = x @ torch.randn(8, 1, generator=g) + .1*torch.randn(320, 1, generator=g)
    return x, y

def line(y=None, loss=F.mse_loss, net=None, lr=.05, opt=torch.optim.SGD, **kwargs):
    "A learner for a small regression"
    torch.manual_seed(0)
    x, own = line_data()
    y = own if y is None else y
    net = net or nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    pairs = (x[:256], y[:256]), (x[256:], y[256:])
    dls = DataLoaders.from_tensors(*pairs, batch_size=32)
    return Learner(net, dls, loss, opt, lr, **kwargs)

class Dropping(nn.Sequential):
    def forward(self, x): return F.dropout(super().forward(x), .5)

class Frozen(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        self[0].weight.requires_grad_(False)

def hand_loss(preds, targets): return ((preds - targets)**2).mean()
def part_of(params, lr): return torch.optim.SGD([*params][:2], lr=lr)
def scores(k):  # k classes from the target of the regression
    return (line_data()[1][:, 0]*2).round().clamp(0, k-1).long()

LEARNERS = {
    'broadcast': lambda: line(y=line_data()[1][:, 0], loss=hand_loss),
    'target type': lambda: line(y=scores(2)[:, None]),
    'first loss': lambda: line(y=line_data()[1] + 300, lr=1e-3),
    'not in optimizer': lambda: line(opt=part_of),
    'not finite': lambda: line(lr=1e30),
    'frozen weights': lambda: line(net=Frozen()),
    'training mode': lambda: line(net=Dropping(nn.Linear(8, 64), nn.Linear(64, 1))),
    'softmax twice': lambda: line(
        y=(line_data()[1] > 0).float(), loss=F.binary_cross_entropy_with_logits,
        net=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())),
    'decay inside Adam': lambda: line(
        opt=partial(torch.optim.Adam, weight_decay=.01), lr=.01),
    'no parameters': lambda: line(net=nn.Flatten()),
    'no step': lambda: line(opt=partial(torch.optim.SGD, maximize=False), cbs=[Zero()]),
}

class Zero(Callback):
    def after_backward(self, learn): learn.opt.zero_grad()

@pytest.mark.parametrize('name', LEARNERS)
def test_learner_with_a_fault(name):
    found = look(LEARNERS[name]())
    assert name in found.names and not found.skipped, found

def test_log_probabilities_are_recognised():
    three = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    right = nn.Sequential(*three, nn.LogSoftmax(1))
    assert 'softmax twice' in look(line(scores(3), F.nll_loss, three)).names
    assert 'softmax twice' not in look(line(scores(3), F.nll_loss, right)).names

def test_a_parameter_in_two_optimizers():
    class Both(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params := [*params], lr)
            self.other = torch.optim.SGD(params, lr=lr)
        def step(self): super().step(); self.other.step()
    assert 'counted twice' in look(line(opt=Both)).names

def test_validation_with_drop_last():
    learn, (x, y) = line(), line_data()
    learn.dls.valid = TensorLoader(x[256:], y[256:], 30, drop_last=True)
    found = look(learn)
    assert found.names == ['lost samples'] and 'leaves out 4 of 64' in str(found)

def test_a_leak_between_loaders():
    learn, (x, y) = line(), line_data()
    learn.dls.valid = TensorLoader(x[200:264], y[200:264], 32)
    found = look(learn)
    assert found.names == ['leak'] and '56 of 64' in str(found)

def test_a_fixed_order():
    learn, (x, y) = line(), line_data()
    learn.dls.train = TensorLoader(x[:256], y[:256], 32)
    assert look(learn).names == ['same order']


# ---- no alarm ------------------------------------------------------------------------

@pytest.mark.parametrize('name, seed', [
    ('linear', 0), ('linear', 1), ('MLP', 0), ('MLP', 1), ('CNN', 0), ('ResNet', 0)])
def test_healthy_network(chapter, name, seed):
    found = look(chapter.healthy_learner(name, seed, 'toy'))
    assert found.ok and not found.skipped, found

def small(*cbs, **kwargs):
    torch.manual_seed(0)
    x, y = sources.fashion_tensors('toy')['train']
    x = (x[:1500]/255 - .3)/.35
    dls = DataLoaders.from_tensors((x[:1200], y[:1200]), (x[1200:], y[1200:1500]),
                                   batch_size=64)
    return Learner(cnn((8, 16, 32)), dls, **dict(
        loss_func=F.cross_entropy, opt_func=AdamW, lr=3e-3,
        cbs=[MetricsCB(Accuracy()), *cbs]) | kwargs)

ACTING = [
    [GradientAccumulationCB(2)], [GradientAccumulationCB(4), GradientClipCB(.1)],
    [MixedPrecisionCB(torch.bfloat16)], [WeightAveragingCB(.99)], [MixUpCB(.4)]]

@pytest.mark.parametrize('cbs', ACTING, ids=str)
def test_healthy_callbacks(cbs):
    found = look(small(*cbs))
    assert found.ok and not found.skipped, found

OPTIMIZERS = ['SGD', 'Adam', 'AdamW', 'NAdam', 'RMSprop', 'Adagrad']

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_healthy_optimizer(name):
    lr = {'SGD': .1, 'Adagrad': .02}.get(name, 2e-3)
    found = look(small(opt_func=getattr(torch.optim, name), lr=lr))
    assert found.ok and not found.skipped, found

@pytest.mark.parametrize('make', [
    line, lambda: line(net=nn.Linear(8, 1)), lambda: line(loss=hand_loss),
    lambda: line(opt=AdamW, lr=.01)])
def test_healthy_regression(make):
    found = look(make())
    assert found.ok and not found.skipped, found

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(30, 16), nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, 30)
    def forward(self, x): return self.head(self.rnn(self.embed(x))[0]).transpose(1, 2)

@pytest.mark.parametrize('shuffle', [False, True])
def test_healthy_language_model(shuffle):
    torch.manual_seed(0)
    text = torch.randint(0, 30, (6001,))
    text[1::2] = (text[0::2][:3000] + 1) % 30
    x, y = text[:6000].view(-1, 20), text[1:].view(-1, 20)
    dls = DataLoaders(TensorLoader(x[:240], y[:240], 16, shuffle=shuffle),
                      TensorLoader(x[240:], y[240:], 16))
    found = look(Learner(Reader(), dls, F.cross_entropy, AdamW, 1e-2))
    assert found.ok and not found.skipped, found

def test_batches_that_are_dicts():
    class Net(nn.Linear):
        def forward(self, a): return super().forward(a)
    x, y = line_data()
    both = [{'a': x[i:i+64], 'y': y[i:i+64]} for i in range(0, 256, 64)]
    valid = [{'a': x[256:], 'y': y[256:]}]
    found = look(Learner(Net(8, 1), DataLoaders(both, valid), F.mse_loss, lr=.05))
    assert found.names == ['same order'] and not found.skipped


# ---- no trace ------------------------------------------------------------------------

def all_random():
    return (random.getstate(), np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist())

def test_nothing_is_left_behind():
    before = (nn.Linear.__call__, torch.optim.lr_scheduler.LRScheduler.step,
              torch.amp.GradScaler.unscale_)
    learn = small()
    weights = [t.clone() for t in learn.model.state_dict().values()]
    state, own = all_random(), dict(vars(learn))
    assert look(learn, cbs=[WeightAveragingCB()]).ok
    torch.testing.assert_close([*learn.model.state_dict().values()], weights)
    assert all_random() == state and vars(learn) == own
    assert before == (nn.Linear.__call__, torch.optim.lr_scheduler.LRScheduler.step,
                      torch.amp.GradScaler.unscale_)

class Looking(Callback):
    "Looks at its learner in the middle of a fit"
    def __init__(self): self.found = None
    def after_batch(self, learn):
        if learn.training and learn.iter == 2: self.found = look(learn)

def test_a_look_in_the_middle_of_a_fit_changes_nothing():
    runs = [line(opt=torch.optim.Adam, lr=.01) for _ in range(2)]
    looking = Looking()
    for learn, cbs in zip(runs, ([], [looking])):
        torch.manual_seed(1)
        learn.fit(2, cbs=cbs)
    assert looking.found is not None and looking.found.ok
    torch.testing.assert_close([*runs[0].model.parameters()],
                               [*runs[1].model.parameters()], rtol=0, atol=0)

def test_callbacks_that_write_files_are_left_out(tmp_path):
    path = tmp_path/'best.pt'
    assert look(small(SaveBestCB(path, 'valid_loss', mode='min'))).ok
    assert not path.exists()

def test_listening_ends_after_an_error():
    with pytest.raises(ZeroDivisionError), listen.listen(): 1/0
    with listen.listen() as heard:
        with pytest.raises(RuntimeError): nn.Linear(2, 2)(torch.ones(1, 3))
        nn.Linear(2, 2)(torch.ones(1, 2))
    assert len(heard.calls) == 2 and not heard.troubles

def test_what_the_listener_gets_wrong_does_not_stop_the_program(monkeypatch):
    def broken(*_): raise KeyError('here')
    monkeypatch.setitem(listen._NOTED, 'mse_loss', broken)
    found = look(line())
    assert 'KeyError' in found.skipped['listening']

def test_a_look_that_fails_is_named(monkeypatch):
    def broken(trial): raise KeyError('here')
    monkeypatch.setitem(preflight.LOOKS, 'bend', broken)
    found = look(line())
    assert found.ok and found.skipped == {'bend': "KeyError: 'here'"}
    assert "not looked at: bend: KeyError: 'here'" in str(found)


# ---- bad input -----------------------------------------------------------------------

def without(**loaders):
    learn = line()
    learn.dls = SimpleNamespace(**loaders)
    return learn

BAD = {
    'empty loader': (lambda: without(train=[], valid=[]), 'loader is empty'),
    'no loader': (lambda: without(valid=[]), 'no training loader'),
    'a loss that is a number': (lambda: line(loss=lambda *_: 1.), 'loss is no tensor'),
    'a loss per sample': (lambda: line(loss=lambda p, t: (p-t)**2), 'a single number'),
    'shapes': (lambda: line(y=line_data()[1][:, 0]), 'each with each'),
    'closure': (lambda: line(opt=torch.optim.LBFGS), 'closure'),
    'silent function': (lambda: lambda: None, 'no model was trained'),
    'function with arguments': (lambda: lambda x: None, 'missing 1 required'),
    'function that fails': (lambda: lambda: 1/0, 'ZeroDivisionError'),
}

@pytest.mark.parametrize('name', BAD)
def test_bad_input_gives_a_sentence(name):
    make, said = BAD[name]
    found = look(make())
    assert len(found) == 1 and said in found[0].sentence
    assert '\n' not in found[0].sentence

@pytest.mark.parametrize('bad', [None, 3, 'learn', Learner, nn.Linear(1, 1)])
def test_what_is_neither_a_learner_nor_a_function(bad):
    with pytest.raises(TypeError, match='a learner, or a function'): look(bad)

@pytest.mark.parametrize('error, says, given', [
    (ValueError, "lr must be a finite number above 0, got 'fast'", dict(lr='fast')),
    (ValueError, 'lr must be a finite number above 0, got -1', dict(lr=-1)),
    (ValueError, 'size must be a whole number of at least 1, got 0', dict(size=0)),
    (ValueError, 'size must be a whole number of at least 1, got 2.5', dict(size=2.5)),
    (TypeError, r'such as \[MetricsCB\(\)\], got MetricsCB', dict(cbs=MetricsCB())),
    (TypeError, "cbs must be a list of callbacks", dict(cbs=[MetricsCB])),
    (TypeError, "cbs must be a list of callbacks", dict(cbs=None))])
def test_bad_arguments_are_no_finding(error, says, given):
    with pytest.raises(error, match=says): look(line(), **given)

def test_what_a_fit_refuses_does_not_pass():
    learn = line()
    learn.cbs = (MetricsCB,)
    assert 'pass an object, MetricsCB()' in look(learn)[0].sentence
    learn.cbs = (GradientAccumulationCB(2), GradientAccumulationCB(2))
    assert 'keep one of them' in look(learn)[0].sentence

@pytest.mark.parametrize('keep', [-1, 2.5, 'x', None])
def test_listen_refuses(keep):
    with pytest.raises(ValueError, match='keep must be a whole number'), \
            listen.listen(keep): pass

def test_only_its_own_thread_is_heard():
    "A second program that trains beside the first"
    def train(n, wait=lambda: None):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        opt = torch.optim.SGD(model.parameters(), lr=.1)
        for _ in range(n):
            wait()
            F.cross_entropy(model(torch.ones(8, 4)), torch.arange(8) % 2).backward()
            opt.step(); opt.zero_grad()
    def beside():
        other = threading.Thread(target=train, args=(1,))
        other.start(); other.join()
    with listen.listen() as alone: train(5)
    with listen.listen() as together: train(5, beside)
    assert len(alone.calls) == len(together.calls) == 5
    assert len(alone.steps) == len(together.steps) == 5
    assert alone.stale == together.stale and not together.troubles

def test_a_room_without_that_fault():
    with pytest.raises(ValueError, match="no fault 'leak'; it has reordered"):
        room_program('leak', 0, True, None)

def test_no_validation():
    learn = line()
    learn.dls = SimpleNamespace(train=learn.dls.train, valid=None)
    assert look(learn).ok

@pytest.mark.parametrize('faulty', [False, True])
def test_clear_to_train(faulty, capsys):
    learn = LEARNERS['broadcast']() if faulty else line(net=Frozen())
    assert preflight.clear_to_train(learn) is not faulty
    assert ('broadcast' if faulty else 'frozen weights') in capsys.readouterr().out

def test_every_kind_leads_to_a_chapter():
    topics = {p.stem[3:] for p in (ROOT/'nbs').glob('[0-7]*.ipynb')}
    assert {topic for _, _, topic in KINDS.values()} <= topics
    assert {severity for _, severity, _ in KINDS.values()} == {'fault', 'warning'}
    assert page('bugs').startswith('https://')

def test_a_finding_without_an_entry_costs_no_other_one(monkeypatch):
    with pytest.raises(ValueError, match="'nonsense' is no finding that we know"):
        Finding('nonsense', 'x')
    monkeypatch.setitem(preflight.LOOKS, 'mine', lambda trial: [('landing', 'x')])
    found = look(LEARNERS['broadcast']())
    assert 'broadcast' in found.names and 'add it to KINDS' in found.skipped['mine']
    assert 'broadcast' in repr(found) and 'mine: ValueError' in repr(found)

def test_one_look_is_no_looks():
    assert repr(Findings(looks=['a'])).startswith('preflight, 1 look in 0 s: nothing')
    assert repr(Findings()).startswith('preflight, 0 looks in')

@pytest.mark.parametrize('lr, n, batches, says', [
    (.1, 0, None, 'n must be a whole number of at least 1, got 0'),
    (-1., 3, None, 'lr must be a finite number above 0, got -1.0'),
    (.1, 3, [], 'losses_at needs at least one batch, got none')])
def test_a_probe_says_what_it_needs(lr, n, batches, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        losses_at(line(), lr, n, batches)

def test_a_path_that_leaves_torchs_names_its_length():
    class SGD(torch.optim.SGD):                # right as long as gradients are positive
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group['params']: p.data -= group['lr']*p.grad.abs()
    said = {f.name: f.sentence for f in look(line(opt=SGD))}
    assert said['other steps'].endswith('within 4 steps.')

def test_row_keys_tell_samples_apart():
    x = torch.tensor([[1., 2.], [1., 2.], [2., 1.]])
    a, b, c = flight.row_keys({'x': x, 'y': torch.ones(3)})
    assert a == b != c
    half = [flight.row_keys(x.to(t))[0] for t in (torch.bfloat16, torch.float16)]
    assert half[0] == half[1] == a
