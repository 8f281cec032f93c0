"""The training tape: it changes nothing, says what is missing, survives damage, and
shows in a browser what Python draws."""
import base64
import copy
import io
import json
import random
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from site_checks import axe_problems, axe_source, slider_problems, start_browser
from torch import nn

from nntrain.accumulate import GradientAccumulationCB
from nntrain.callback import Callback
from nntrain.clip import GradientClipCB
from nntrain.data import DataLoaders
from nntrain.events import CancelFit
from nntrain.figure_web import _web
from nntrain.learner import Learner
from nntrain.precision import MixedPrecisionCB
from nntrain.prepare import DeviceCB, NormalizeCB
from nntrain.site import _outside
from nntrain.steering import ScheduleCB
from nntrain.cycles import one_cycle
from nntrain.tape import TapeCB, moments
from nntrain.tape_cards import _share_bars, _verdict
from nntrain.tape_file import Tape, book_tape, keep_tape
from nntrain.tape_pack import _BINS, _levels, _pairs, _shares
from nntrain.tape_panels import _bar, _outline, _short
from nntrain.tape_probe import Probe, _same_luck
from nntrain.tape_view import _TAPE_JS, TapeView, stored_view, tape_view


# ---- runs to record ------------------------------------------------------------------

def pictures(n, seed=0):
    "Bright squares whose place is the class, with noise"
    gen = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    x = torch.rand(n, 1, 8, 8, generator=gen)*.5
    for i, c in enumerate(y): x[i, 0, c//2*4:c//2*4+4, c % 2*4:c % 2*4+4] += .5
    return x, y

def loaders(kind='tensors', shuffled=False):
    train, valid = pictures(96), pictures(40, 1)
    if kind == 'tensors': return DataLoaders.from_tensors(
        train, valid, batch_size=8, classes=('<a>', 'b', 'c', 'd'))
    from torch.utils.data import DataLoader, TensorDataset
    gen = torch.Generator().manual_seed(3)
    def load(pair, shuffle):
        return DataLoader(TensorDataset(*pair), 8, shuffle=shuffle, generator=gen)
    return DataLoaders(load(train, True), load(valid, shuffled))

def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.3),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 4))

def fitted(*cbs, model=conv_net, dls=None, n_epochs=2, lr=.1, **kw):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    learn = Learner(model(), dls or loaders(), F.cross_entropy, lr=lr, cbs=cbs, **kw)
    learn.fit(n_epochs)
    return learn

@pytest.fixture(scope='module')
def recorded():
    cb = TapeCB()
    fitted(cb)
    return cb.tape

@pytest.fixture(scope='module')
def hot():
    cb = TapeCB()
    fitted(cb, lr=30.)
    return cb.tape


# ---- a run that is recorded is the run that is not -----------------------------------

def luck(): return torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3]

class LuckyNet(nn.Module):
    "Draws from all three generators, also in evaluation"
    def __init__(self): super().__init__(); self.net = conv_net()
    def forward(self, x):
        more = torch.rand(1)*random.random()*np.random.rand()
        return self.net(x) + more.item()

@pytest.mark.parametrize('model', [conv_net, LuckyNet])
@pytest.mark.parametrize('kind, shuffled', [
    ('tensors', False), ('torch', False), ('torch', True)])
@pytest.mark.parametrize('more', [
    lambda: [], lambda: [GradientAccumulationCB(3)],
    lambda: [MixedPrecisionCB(torch.bfloat16)],
    lambda: [NormalizeCB(.4, .3), GradientClipCB(max_norm=.1),
             ScheduleCB(lr=one_cycle(.1))]])
def test_training_is_the_same_to_the_last_bit(model, kind, shuffled, more):
    ends = []
    for cbs in [], [TapeCB()]:
        learn = fitted(DeviceCB('cpu'), *more(), *cbs, model=model,
                       dls=loaders(kind, shuffled))
        ends.append((learn.model.state_dict(), luck()))
    (plain, before), (taped, after) = ends
    torch.testing.assert_close(taped, plain, rtol=0, atol=0)
    assert torch.equal(after[0], before[0]) and after[1] == before[1]
    assert np.array_equal(after[2][0], before[2][0]) and after[2][1] == before[2][1]

def test_that_test_can_fail():
    class Careless(Callback):
        "What a tape would do without its care"
        def before_fit(self, learn): next(iter(learn.dls.valid))
    a, b = (fitted(*cbs, dls=loaders('torch')) for cbs in ([], [Careless()]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(a.model.state_dict(), b.model.state_dict())

def n_hooks(model):
    return sum(len(hooks) for m in model.modules() for hooks in (
        m._forward_hooks, m._forward_pre_hooks, m._backward_hooks))

class Failing(nn.Module):
    "Fails at its forward pass number `at`"
    def __init__(self, at, error):
        super().__init__()
        self.net, self.at, self.error = conv_net(), at, error
    def forward(self, x):
        self.at -= 1
        if not self.at: raise self.error
        return self.net(x)

@pytest.mark.parametrize('error', [ValueError('x'), KeyboardInterrupt(), CancelFit()])
@pytest.mark.parametrize('at', [1, 2, 3, 6])       # the first look, a batch, a look
def test_hooks_are_gone_after_an_error(error, at):
    cb, model = TapeCB(), Failing(at, error)
    learn = Learner(model, loaders(), F.cross_entropy, cbs=[cb])
    try: learn.fit(1)
    except (ValueError, KeyboardInterrupt): pass
    assert model.at == 0 and n_hooks(model) == 0
    assert cb._probe is None or cb._probe.learner is None     # holds no model
    modes = {m.training for m in model.modules()}
    assert len(modes) == 1                         # not half in evaluation
    model.at = -1
    learn.fit(1)                                   # and it can go on
    assert cb.tape.steps[-1] == 12

def test_each_module_keeps_its_own_mode():
    class Frozen(Callback):
        def before_phase(self, learn): learn.model[1].eval()
        def after_step(self, learn): self.mode = learn.model[1].training
    frozen = Frozen()
    learn = fitted(frozen, TapeCB())
    assert not frozen.mode and learn.model[1].num_batches_tracked == 0

def test_the_callback_can_be_copied_after_a_run():
    cb = TapeCB()
    fitted(cb)
    assert copy.deepcopy(cb).tape.data == cb.tape.data


# ---- what it records -----------------------------------------------------------------

def test_moments():
    assert moments(2000)[0] == 0 and moments(2000)[-1] == 2000
    assert 40 <= len(moments(60)) <= 48 and moments(3) == [0, 1, 2, 3]
    gaps = np.diff(moments(5000))
    assert gaps[-1] > 3*gaps[0]

def test_numbers_are_those_of_the_run():
    class Note(Callback):
        order = 50
        def before_fit(self, learn): self.losses, self.norms, self.moved = [], [], []
        def after_loss(self, learn):
            if learn.training: self.losses.append(learn.loss.item())
        def after_backward(self, learn):
            grads = torch.cat([p.grad.flatten() for p in learn.model.parameters()])
            self.norms.append(grads.norm().item())
            self.old = learn.model[6].weight.detach().clone()
        def after_step(self, learn):
            new = learn.model[6].weight.detach()
            self.moved.append(((new - self.old).norm()/self.old.norm()).item())
    note, cb = Note(), TapeCB()
    fitted(note, cb)
    data = cb.tape.data
    assert data['steps'] == list(range(25)) and data['loss'][0] is None
    for mine, theirs in ((data['loss'], note.losses), (data['gradient'], note.norms),
                         (data['ratios'][1]['moved'], note.moved)):
        torch.testing.assert_close(torch.tensor(mine[1:]), torch.tensor(theirs),
                                   rtol=1e-3, atol=0)
    assert [row['name'] for row in data['ratios']] == ['0 Conv2d', '6 Linear']
    assert data['rate'][1:] == [.1]*24 and data['epochs'][-1] == 2.
    assert [step for step, _ in data['valid']] == [12, 24]

def test_losses_between_two_moments_are_their_mean():
    losses, cb = [], TapeCB(n_moments=3)
    class Note(Callback):
        def after_loss(self, learn):
            if learn.training: losses.append(learn.loss.item())
    fitted(Note(), cb)
    first, last = cb.tape.steps[1:]
    want = [sum(losses[:first])/first, sum(losses[first:])/(last - first)]
    assert cb.tape.data['loss'][1:] == pytest.approx(want, rel=1e-3)

def test_predictions_and_validation_loss_at_the_end():
    cb = TapeCB()
    learn = fitted(cb)
    learn.model.eval()
    x, y = pictures(40, 1)
    with torch.no_grad(): logits = learn.model(x)
    part = cb.tape.data['pictures']
    shares = torch.tensor(_shares(part['shares'])).reshape(-1, 12, 4)
    want = logits[:12].softmax(1).double()
    torch.testing.assert_close(shares[-1][:4], want[:4], rtol=0, atol=3e-4)
    assert part['targets'] == [0, 1, 2, 3]*3 and part['classes'][0] == '<a>'
    hits = (want.argmax(1) == y[:12]).sum().item()
    assert cb.tape.right[-1] == hits
    valid = cb.tape.data['valid'][-1][1]
    assert valid == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-3)

def test_filters_and_pictures_are_what_they_were():
    "A kernel of three columns is no colour"
    cb = TapeCB()
    learn = fitted(cb)
    part = cb.tape.data['filters']
    image = np.array(Image.open(io.BytesIO(base64.b64decode(part['png']))))
    tiles = image.reshape(len(part['moments']), part['height'] + 2, part['width'])
    w = learn.model[0].weight.detach()[:, 0].numpy()
    want = np.round((w/part['high'] + 1)/2*63)
    last = tiles[-1, 1:-1]
    assert part['moments'][-1] == len(cb.tape.steps) - 1 and part['height'] == 7
    for i, kernel in enumerate(want):           # two rows of three, with gaps
        y, x = i//3*4, i % 3*4
        assert np.abs(last[y:y+3, x:x+3] - kernel).max() <= 1, i
    shown = cb.tape.data['pictures']
    image = np.array(Image.open(io.BytesIO(base64.b64decode(shown['png']))))
    first = pictures(40, 1)[0][0, 0].numpy()
    assert np.corrcoef(image[1:9].ravel(), first.ravel())[0, 1] > .99

def test_accumulated_batches_are_one_step():
    cb = TapeCB()
    fitted(GradientAccumulationCB(3), cb)
    assert cb.tape.steps == list(range(9)) and all(cb.tape.data['gradient'][1:])

def test_the_gradient_is_the_one_that_the_step_uses():
    cb, scaler = TapeCB(), torch.amp.GradScaler('cpu', init_scale=2.**10)
    fitted(MixedPrecisionCB(torch.float16, scaler), GradientClipCB(max_norm=.1), cb)
    assert max(cb.tape.data['gradient'][1:]) <= .101

def test_a_loader_without_length_is_thinned():
    class Endless:
        def __iter__(self):
            x, y = pictures(8)
            return ((x, y) for _ in range(100))
    data = DataLoaders(Endless(), [pictures(8)])
    cb = TapeCB(n_moments=10)
    fitted(cb, dls=data, n_epochs=3)
    assert 10 <= len(cb.tape.steps) <= 20 and cb.tape.steps[-1] == 300
    assert len({b - a for a, b in zip(cb.tape.steps[:-1], cb.tape.steps[1:-1])}) == 1

def test_a_run_left_early_and_a_second_run():
    class Stop(Callback):
        def after_step(self, learn):
            if learn.n_taken == 7: raise CancelFit()
    cb = TapeCB()
    fitted(Stop(), cb)
    assert cb.tape.steps[-1] <= 7
    fitted(cb, n_epochs=1)
    assert cb.tape.steps[0] == 0 and cb.tape.steps[-1] == 12

def lazy_net(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
class WordLearner(Learner):
    def predict(self): self.preds = self.forward(*self.xb).mean(1)

def test_lazy_layers_begin_after_the_first_step():
    cb = TapeCB()
    learn = fitted(cb, model=lazy_net)
    same = fitted(model=lazy_net)
    assert cb.tape.steps[0] == 1
    torch.testing.assert_close(learn.model.state_dict(), same.model.state_dict(),
                               rtol=0, atol=0)

@pytest.mark.parametrize('x, model, kind, missing', [
    (torch.randn(40, 5), lambda: nn.Linear(5, 3), Learner,
     {'pictures': 'the inputs are no pictures', 'filters': 'no layer has'}),
    (torch.randint(0, 9, (40, 6)), lambda: nn.Sequential(
        nn.Embedding(9, 8), nn.Linear(8, 3)), WordLearner,
     {'pictures': 'the inputs are no pictures', 'filters': 'no layer has'})])
def test_what_does_not_exist_is_left_out_with_a_word(x, model, kind, missing):
    y, cb = torch.arange(40) % 3, TapeCB()
    batches = list(zip(x.split(8), y.split(8)))
    torch.manual_seed(0)
    kind(model(), DataLoaders(batches, batches), F.cross_entropy, cbs=[cb]).fit(1)
    tape = cb.tape
    for part, why in missing.items(): assert why in tape.data['missing'][part]
    html = tape_view(tape).to_html()
    assert 'Left out: filters' in html and 'samples right' in html
    assert tape.data['pictures']['png'] is None and len(tape.right) == len(tape.steps)

def test_regression_has_no_classes():
    x, cb = torch.randn(16, 3), TapeCB()
    data = DataLoaders([(x, x.sum(1, keepdim=True))], [(x, x.sum(1, keepdim=True))])
    Learner(nn.Linear(3, 1), data, F.mse_loss, cbs=[cb]).fit(1)
    assert cb.tape.data['pictures'] is None and cb.tape.right == []
    assert 'are no class numbers' in tape_view(cb.tape).to_html() or (
        'not (samples, classes)' in tape_view(cb.tape).to_html())

def test_no_validation_data():
    cb, x = TapeCB(), pictures(16)
    Learner(conv_net(), DataLoaders([x], None) if False else Only([x]), F.cross_entropy,
            cbs=[cb]).fit(2)
    assert 'there are no validation data' in cb.tape.data['missing']['pictures']
    given = TapeCB(pictures=x)
    Learner(conv_net(), Only([x]), F.cross_entropy, cbs=[given]).fit(2)
    assert given.tape.data['pictures']['n'] == 12

class Only:
    def __init__(self, train): self.train, self.valid = train, None

def test_colours_large_pictures_and_dictionaries():
    x, y = torch.rand(12, 3, 40, 60), torch.arange(12) % 3
    batch, cb = [dict(image=x, label=y)], TapeCB()
    model = nn.Sequential(nn.Conv2d(3, 20, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(20, 3))
    Learner(model, DataLoaders(batch, batch), F.cross_entropy, cbs=[cb]).fit(3)
    data = cb.tape.data
    assert data['filters']['n'] == 16 and data['pictures']['width'] == 32
    assert len(json.dumps(data)) < 200_000

def test_a_deep_network_and_a_long_run_stay_small():
    layers = [m for _ in range(40) for m in (nn.Linear(64, 64), nn.ReLU())]
    cb = TapeCB(n_moments=100)
    fitted(cb, model=lambda: nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 4)),
           n_epochs=10)
    data = cb.tape.data
    assert len(data['values']) == 8 and len(data['ratios']) == 10
    assert len(json.dumps(data)) < 200_000

def test_nan_is_a_gap(hot):
    class Poison(Callback):
        def after_step(self, learn):
            if learn.n_taken == 5:
                with torch.no_grad(): learn.model[6].weight.fill_(float('nan'))
    cb = TapeCB()
    fitted(Poison(), cb)
    text = json.dumps(cb.tape.data, allow_nan=False)
    assert cb.tape.data['loss'][-1] is None and cb.tape.right[-1] == 0
    assert 'no number' in tape_view(cb.tape).to_html() and 'NaN' not in text

def test_compiled_models_are_asked_uncompiled():
    net = conv_net()
    compiled = torch.compile(net, backend='eager')
    cb = TapeCB(n_moments=3)
    fitted(cb, model=lambda: compiled, n_epochs=1)
    assert cb.tape.data['model'] == 'Sequential' and cb.tape.data['values']

@pytest.mark.parametrize('make, message', [
    (lambda: TapeCB(n_moments=1), 'n_moments must be a whole number of at least 2'),
    (lambda: TapeCB(n_moments=101), 'n_moments must be at most 100, got 101'),
    (lambda: TapeCB().tape, 'nothing is recorded yet'),
    (lambda: book_tape('shoes'), "the book has no tape 'shoes'; it has"),
    (lambda: moments(10, 1), 'n must be a whole number of at least 2, got 1'),
    (lambda: moments(-5), 'n_steps must be a whole number of at least 1, got -5'),
    (lambda: TapeCB(classes=5), 'classes must be a list of names, got 5'),
    (lambda: TapeCB(classes='ten'), "classes must be a list of names, got 'ten'"),
    (lambda: TapeCB(beside='learner'), "beside must be a Tape, got 'learner'"),
    (lambda: TapeCB(pictures=5), 'pictures must be a batch (input, target) as the '
     'model takes it, got int'),
    (lambda: TapeCB(pictures=()), 'must be a batch (input, target)'),
    (lambda: TapeCB(pictures=(pictures(8)[0], pictures(5)[1])),
     'got [(8, 1, 8, 8), (5,)]'),
    (lambda: TapeCB(pictures=tuple(t[:0] for t in pictures(8))), 'must be a batch'),
    (lambda: Probe(fitted(n_epochs=1), n_shown=-1), 'n_shown must be a whole number'),
    (lambda: fitted(TapeCB(pictures=(torch.zeros(8, 5), torch.arange(8)))),
     'the model does not take the given pictures: '),
    (lambda: Tape(5), "this is no tape, or a damaged one: its 'format' is not"),
    (lambda: Tape({}), 'Tape.save wrote, or cb.tape of a TapeCB'),
    (lambda: keep_tape(5, 'run'), 'this is no tape'),
])
def test_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)): make()

def test_a_probe_needs_a_learner():
    with pytest.raises(TypeError, match='asks the model of a learner, got 5'): Probe(5)

def test_names_that_do_not_fit_give_way_to_numbers():
    fitted(cb := TapeCB(classes=['a']))
    assert cb.tape.data['pictures']['classes'] == ['0', '1', '2', '3']
    assert 'Left out: names: 4 classes need 4 names, got 1.' in (
        tape_view(cb.tape).to_html())

def test_the_generator_of_the_models_own_device_is_put_back(monkeypatch):
    "With a model on the second GPU, torch's default is that of the first"
    asked = []
    class Module:
        def get_rng_state(self, *at): asked.append(at)
        def set_rng_state(self, state, *at): asked.append(at)
    monkeypatch.setattr(torch, 'get_device_module', lambda device: Module())
    for name in 'cuda:1', 'mps':
        with _same_luck(torch.device(name)): pass
    assert asked == [(torch.device('cuda:1'),)]*2 + [()]*2

def test_several_processes_are_refused():
    class Two(Callback):
        def before_fit(self, learn): learn.world.size = 2
    with pytest.raises(ValueError, match='TapeCB records the run of one process'):
        fitted(Two(), TapeCB())


# ---- files ---------------------------------------------------------------------------

def test_save_and_load(recorded, tmp_path):
    recorded.save(tmp_path/'run.json')
    assert Tape.load(tmp_path/'run.json').data == recorded.data
    assert [p.name for p in tmp_path.iterdir()] == ['run.json']
    with pytest.raises(ValueError, match='is a folder: name a file in it'):
        recorded.save(tmp_path)
    with pytest.raises(ValueError, match='is a folder: name a file in it'):
        Tape.load(tmp_path)
    with pytest.raises(FileNotFoundError): Tape.load(tmp_path/'none.json')
    (tmp_path/'run.json').write_text(json.dumps(recorded.data), encoding='utf-8-sig')
    assert Tape.load(tmp_path/'run.json').data == recorded.data

def without(data, *path):
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]: inner = inner[key]
    del inner[path[-1]]
    return data

def changed(data, value, *path):
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]: inner = inner[key]
    inner[path[-1]] = value
    return data

@pytest.mark.parametrize('damage', [
    lambda d: {}, lambda d: [], lambda d: without(d, 'loss'),
    lambda d: without(d, 'steps'), lambda d: changed(d, [], 'steps'),
    lambda d: changed(d, [3, 2, 1], 'steps'), lambda d: changed(d, ['a'], 'steps'),
    lambda d: changed(d, d['loss'][1:], 'loss'),
    lambda d: changed(d, '2.5', 'loss', 3), lambda d: changed(d, [[1, 2, 3]], 'valid'),
    lambda d: changed(d, 'nntrain tape 9', 'format'),
    lambda d: changed(d, d['values'][0]['bars'][:-1], 'values', 0, 'bars'),
    lambda d: changed(d, '<b>'*8*len(d['steps']), 'values', 0, 'bars'),
    lambda d: changed(d, 5., 'values', 0, 'low'), lambda d: changed(d, None, 'ratios'),
    lambda d: changed(d, 3, 'ratios', 0, 'name'),
    lambda d: changed(d, 9, 'pictures', 'targets', 0),
    lambda d: changed(d, d['pictures']['shares'][2:], 'pictures', 'shares'),
    lambda d: changed(d, '"><script>', 'pictures', 'png'),
    lambda d: changed(d, d['filters']['png'][:200], 'filters', 'png'),
    lambda d: changed(d, d['filters']['png'], 'pictures', 'png'),
    lambda d: changed(d, [99], 'filters', 'moments'),
    lambda d: changed(d, [7], 'pictures', 'classes'),
    lambda d: changed(d, {'x': 3}, 'missing'), lambda d: changed(d, 1, 'model'),
    lambda d: changed(d, '"><script>', 'filters', 'height'),
    lambda d: changed(d, 5, 'filters', 'name'),
    lambda d: changed(d, 10**400, 'loss', 3),
    lambda d: changed(d, dict(zip('0123', 'abcd')), 'pictures', 'classes'),
    lambda d: changed(d, {}, 'valid'), lambda d: changed(d, 5, 'values', 0, 'name'),
])
def test_damage_is_named_in_a_sentence(recorded, tmp_path, damage):
    path = tmp_path/'run.json'
    path.write_text(json.dumps(damage(recorded.data)))
    with pytest.raises(ValueError, match='is no tape, or a damaged one: ') as e:
        Tape.load(path)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400

@pytest.mark.parametrize('text', ['', '{', 'NaN', '[[[', '\x00', '{"format": 1}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path/'x.json').write_text(text)
    with pytest.raises(ValueError, match='is no tape, or a damaged one'):
        Tape.load(tmp_path/'x.json')

def test_a_file_cut_anywhere_is_refused(recorded, tmp_path):
    path = tmp_path/'run.json'
    recorded.save(path)
    text = path.read_text()
    for share in np.linspace(.01, .99, 15):
        path.write_text(text[:int(len(text)*share)])
        with pytest.raises(ValueError, match='damaged'): Tape.load(path)

def test_tapes_of_the_book():
    for path in (ROOT/'results/tapes').glob('*.json'):
        tape = book_tape(path.stem)
        assert len(tape.steps) >= 30 and path.stat().st_size < 100_000

def test_names_of_tapes_stay_in_their_folder(recorded, tmp_path):
    folder = tmp_path/'tapes'
    with pytest.raises(ValueError, match='it has none in '): book_tape('x', folder)
    for name in '../evil', '', 5:
        with pytest.raises(ValueError, match='name must be a topic'):
            keep_tape(recorded, name, folder)
    assert not list(tmp_path.iterdir())

def test_only_a_full_run_keeps_a_tape(recorded, monkeypatch):
    monkeypatch.delenv('NNTRAIN_RECORD', raising=False)
    keep_tape(recorded, 'nothing')
    assert not (ROOT/'results/tapes/nothing.json').exists()


# ---- the view ------------------------------------------------------------------------

def test_view_is_small_deterministic_and_alone(recorded, hot):
    for view in tape_view(recorded), tape_view(recorded, hot, names=('<a>', 'b')):
        html = view.to_html()
        assert html == copy.deepcopy(view).to_html() and len(html) < 100_000
        assert not _outside.search(html) and '<a>' not in html
        assert stored_view(html).to_html() == html

def test_view_in_words(recorded, hot):
    data = tape_view(recorded)._repr_mimebundle_()
    assert data['text/plain'].startswith('Training tape. Sequential, 24 steps in 25')
    assert 'of 12 pictures right' in data['text/plain']
    both = repr(tape_view(recorded, hot, names=('one', 'two')))
    assert 'one: Sequential' in both and '\ntwo: Sequential' in both
    assert recorded._repr_mimebundle_()['text/html'] == data['text/html']

@pytest.mark.parametrize('make, message', [
    (lambda t: tape_view(3), 'tape_view shows tapes, got int: give cb.tape'),
    (lambda t: tape_view(t, 'x'), 'tape_view shows tapes, got str'),
    (lambda t: tape_view(t, t, names='ab'), "names='ab' must hold a name for each"),
    (lambda t: tape_view(t, t, names=['a']), 'must hold a name for each of the 2'),
    (lambda t: tape_view(t, t, names=['a', 'b', 'c']), 'must hold a name for each'),
    (lambda t: tape_view(t, names=5), 'names=5 must hold a name for each of the 1'),
    (lambda t: tape_view(t, t, names=(1, 2)), 'names=(1, 2) must hold a name'),
    (lambda t: tape_view(t, title=None), "title must be a text, '' for none, got None"),
    (lambda t: tape_view(t, play='x'), "play must be True or False, got 'x'"),
    (lambda t: stored_view('<p>'), 'there is no training tape in this text'),
    (lambda t: stored_view(None), 'there is no training tape in this text'),
    (lambda t: stored_view('/*tape*/{"a":/*end*/'), 'is damaged (JSONDecodeError: '),
    (lambda t: stored_view('/*tape*/{}/*end*/'), "is damaged (KeyError: 'tapes')"),
    (lambda t: stored_view('/*tape*/[]/*end*/'), 'is damaged (TypeError: '),
    (lambda t: stored_view(tape_view(t).to_html().replace('"loss":[', '"loss":[7,')),
     "'loss' does not hold 25 numbers"),
    (lambda t: stored_view(tape_view(t).to_html().replace('"title":""', '"title":5')),
     'title must be a text'),
])
def test_view_refuses(recorded, make, message):
    with pytest.raises(ValueError, match=re.escape(message)): make(recorded)

@pytest.fixture
def javascript():
    "javascript(code) -> the value of `code` after the scripts of the view"
    node = shutil.which('node')
    if not node: pytest.skip('needs node')
    def go(code):
        text = '\n'.join([*map(_web, _TAPE_JS), f'console.log(JSON.stringify({code}))'])
        done = subprocess.run([node, '-'], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return go

def test_both_languages_write_the_same_numbers(javascript):
    rng = np.random.default_rng(0)
    values = [0., .5, 1, 99.95, 100, 999.5, 1e5, 123456, 2e-5, .000999, -.25, None]
    values += [float(f'{v:.4g}') for v in 10**rng.uniform(-8, 7, 300)]
    assert javascript(f'{json.dumps(values)}.map(short)') == [_short(v) for v in values]
    ratios = [None, 0, 1e-9, 1e-3, .5, 3., *(10**rng.uniform(-7, 1, 50)).tolist()]
    assert javascript(f'{json.dumps(ratios)}.map(bar)') == [_bar(v) for v in ratios]

def test_both_languages_draw_the_same_histogram_and_bars(javascript, recorded):
    part, place = recorded.data['values'][0], dict(x=7, wide=933, high=287)
    bars = part['bars'][-_BINS:]
    assert javascript(f"outline('{bars}', {json.dumps(place)})") == _outline(
        _levels(bars), place)
    shares = np.random.default_rng(0).dirichlet(np.ones(5), 12)
    shares[3] = np.nan
    packed = dict(n=12, classes=list('abcde'), shares=_pairs(shares))
    back = _shares(packed['shares']).reshape(12, 5)
    for i in range(12):
        code = f'sharesAt({json.dumps(packed)}, 0, {i})'
        assert javascript(f'shareBars({code})') == _share_bars(back[i])
        assert javascript(f"verdict({code}, 2, ['a', 'b', 'c', 'd', 'e'])") == _verdict(
            back[i], 2, list('abcde'))

def test_the_moment_of_a_step(javascript):
    code = '[0, 3, 4, 9, 50].map(s => momentAt([0, 4, 9], s))'
    assert javascript(code) == [0, 0, 1, 2, 2]


# ---- in a browser --------------------------------------------------------------------

@pytest.fixture(scope='module')
def browser():
    with start_browser() as b: yield b

@pytest.fixture
def open_page(browser, tmp_path):
    contexts = []
    def go(body, width=800, dark=False, **kw):
        colours = '#181a1f;color:#dcdfe4' if dark else '#fff;color:#222'
        (tmp_path/'page.html').write_text(
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta '
            'name="viewport" content="width=device-width"><title>t</title><link '
            f'rel="icon" href="data:,"><style>body{{margin:8px;background:{colours}}}'
            f'</style><main><h1>t</h1>{body}</main>', encoding='utf-8')
        context = browser.new_context(viewport=dict(width=width, height=900), **kw)
        contexts.append(context)
        page = context.new_page()
        page.problems = []
        page.on('console', lambda m: page.problems.append(m.text))
        page.on('pageerror', lambda e: page.problems.append(str(e)))
        page.route('**/*', lambda r: r.continue_() if r.request.url.startswith('file:')
                   else (page.problems.append(r.request.url), r.abort()))
        page.goto((tmp_path/'page.html').as_uri())
        return page
    yield go
    for c in contexts: c.close()

SHOWN = '''f => [...f.querySelectorAll('[data-key], .now, .nnt-w, output')].map(e =>
  e.getAttribute('d') ?? e.getAttribute('y') ?? e.textContent)'''

def shown(page, i=0): return page.locator('.nnt').nth(i).evaluate(SHOWN)

def cut(data, n):  # the tape of a run that ended at moment n
    data, t = copy.deepcopy(data), n + 1
    data['steps'] = data['steps'][:t]
    for name in 'epochs', 'loss', 'rate', 'gradient': data[name] = data[name][:t]
    for part in data['ratios']: part['moved'] = part['moved'][:t]
    for part in data['values']:
        part['zeros'], part['bars'] = part['zeros'][:t], part['bars'][:t*_BINS]
    k = 2*data['pictures']['n']*len(data['pictures']['classes'])
    data['pictures']['shares'] = data['pictures']['shares'][:t*k]
    data['valid'] = [v for v in data['valid'] if v[0] <= data['steps'][-1]]
    return data

def test_javascript_draws_what_python_draws(open_page, recorded, hot):
    view = tape_view(recorded, hot, names=('a', 'b'))
    page = open_page(view.to_html())
    first = shown(page)
    slider = page.locator('input')
    slider.focus()
    page.keyboard.press('Home')
    assert shown(page) != first
    page.keyboard.press('End')
    assert shown(page) == first                     # all panels as Python drew them
    for n in 0, 7:                                  # and in the middle
        page.keyboard.press('Home')
        for _ in range(n): page.keyboard.press('ArrowRight')
        tapes = [cut(t.data, n) for t in (recorded, hot)]
        short = TapeView(tapes, ['a', 'b'], '', False)
        says = page.locator('.nnt-w').text_content()
        assert re.search(r'role="status">(.*?)</p>', short.to_html())[1] == says
        want = re.findall(r'data-key="shares"[^>]* d="([^"]*)"', short.to_html())
        got = page.eval_on_selector_all('[data-key=shares]', 'es => es.map(e => '
                                        'e.getAttribute("d"))')
        assert got == want and len(got) == 24
        values = re.findall(r'data-key="moved"[^>]*>([^<]*)<', short.to_html())
        assert values == page.locator('[data-key=moved]').all_text_contents()
    assert page.problems == []

@pytest.mark.parametrize('width, dark', [(1000, False), (1000, True), (360, False),
                                         (360, True)])
def test_works_on_every_screen(open_page, recorded, hot, width, dark):
    views = tape_view(recorded, play=True), tape_view(recorded, hot, names=('a', 'b'))
    page = open_page(''.join(v.to_html() for v in views), width, dark,
                     reduced_motion='reduce')
    assert slider_problems(page) == page.problems == []
    assert page.evaluate('document.scrollingElement.scrollWidth') <= width
    assert axe_problems(page, axe_source()) == []
    assert page.locator('button').count() == 0      # nothing plays: reduced motion

def test_two_views_move_alone(open_page, recorded, hot):
    page = open_page(tape_view(recorded).to_html() + tape_view(hot).to_html()
                     + tape_view(recorded).to_html())
    before = [shown(page, i) for i in range(3)]
    page.locator('input').nth(2).focus()
    page.keyboard.press('Home')
    assert [shown(page, i) for i in range(2)] == before[:2]
    assert shown(page, 2) != before[2] and page.problems == []

def test_first_frame_needs_no_javascript(open_page, recorded):
    page = open_page(tape_view(recorded).to_html(), java_script_enabled=False)
    assert page.locator('form').is_hidden()
    assert page.locator('.nnt-p li').count() == 12
    assert page.locator('.nnt-w').is_visible() and page.locator('.now').count() >= 3

def test_words_where_style_and_script_are_stripped(open_page, recorded):
    html = tape_view(recorded).to_html()
    html = re.sub('<style>.*?</style>|<script>.*?</script>', '', html, flags=re.S)
    page = open_page(html)
    assert 'Run this cell to see it' in page.locator('.nnx-n').inner_text()
    assert page.locator('.nnt-d').is_hidden()

def test_play_only_when_asked(open_page, recorded):
    assert 'button' not in re.sub('<script.*', '', re.sub(
        '<style>.*?</style>', '', tape_view(recorded).to_html()), flags=re.S)
    page = open_page(tape_view(recorded, play=True).to_html())
    button, slider = page.locator('button'), page.locator('input')
    assert slider.input_value() == slider.get_attribute('max')   # nothing moves
    button.click()
    page.wait_for_function("document.querySelector('input').value > 0 && "
                           "document.querySelector('input').value < 9")
    button.click()
    assert button.text_content() == 'play'
    value = slider.input_value()
    page.evaluate('new Promise(done => requestAnimationFrame(() => '
                  'requestAnimationFrame(done)))')
    assert slider.input_value() == value and page.problems == []

def test_slider_has_a_name_and_says_its_value(open_page, recorded):
    page = open_page(tape_view(recorded).to_html())
    slider = page.get_by_label('moment of the run')
    slider.focus()
    page.keyboard.press('Home')
    assert slider.get_attribute('aria-valuetext') == 'step 0 of 24'


# ---- stored in the notebooks ---------------------------------------------------------

def stored(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [text for cell in nb['cells'] for out in cell.get('outputs', ())
            if 'class="nnt"' in (text := ''.join(
                out.get('data', {}).get('text/html', '')))]

STORED = [p for p in sorted((ROOT/'nbs').glob('*.ipynb')) if stored(p)]

def test_the_chapters_have_their_tapes():
    topics = {p.stem[3:] for p in STORED}
    assert {'learner', 'activations', 'schedulers', 'resnet', 'bugs', 'tape',
            'panels'} <= topics
    assert {p.stem for p in (ROOT/'results/tapes').glob('*.json')} == (
        topics - {'tape', 'panels'})      # the appendices show tapes of their own

@pytest.mark.parametrize('path', STORED, ids=lambda p: p.name)
def test_stored_tapes(open_page, path):
    views = stored(path)
    for html in views:
        again = stored_view(html)
        assert again.to_html() == html, 'run scripts/refresh_figures.py'
        for data in again.tapes: Tape(data)             # as if it came from a file
        assert len(html.encode()) < 200_000
    assert len(set(views)) == len(views)
    page = open_page(''.join(views), 360)
    assert slider_problems(page) == page.problems == []
    assert page.evaluate('document.scrollingElement.scrollWidth') <= 360

def test_stored_tapes_take_todays_script(recorded):
    tool = runpy.run_path(str(ROOT/'scripts/refresh_figures.py'))
    html = tape_view(recorded).to_html()
    old = html.replace('function momentAt', 'function jadis')
    out = [dict(data={'text/html': old})]
    cell = dict(cell_type='code', source=['cb.tape'], outputs=out)
    found = list(tool['refresh'](dict(cells=[cell])))
    assert out[0]['data']['text/html'] == html != old
    assert found[0][1].startswith('tape-')


# ---- while the run goes on -----------------------------------------------------------


def test_shows_itself_in_a_live_kernel(recorded, monkeypatch):
    import IPython.display as display
    from nntrain import tape as module
    shown = []
    class Handle:
        def update(self, view): shown.append(view)
    def show(view, display_id): shown.append(view); return Handle()
    monkeypatch.setattr(display, 'display', show)
    monkeypatch.setattr(module, '_live', lambda: True)
    cb = TapeCB(show=True, beside=recorded)
    fitted(cb)
    assert len(shown) >= 2 and len(shown[-1].tapes) == 2     # early, and at the end
    assert shown[-1].tapes[0] == cb.tape.data
    assert len(shown) < 5                                    # not at each moment
    monkeypatch.setattr(module, '_live', lambda: False)
    fitted(TapeCB(show=True))
    assert len(shown) < 5

def test_importing_the_tape_stays_light():
    heavy = {'matplotlib', 'PIL', 'IPython'}
    code = f'import sys, nntrain.tape; print({heavy} & {{*sys.modules}})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          cwd=ROOT, timeout=300)
    assert done.stdout.strip() == 'set()', done.stderr


def test_neither_hooks_nor_memories_hear_the_question():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(4, 3)
            self.reset()
        def reset(self): self.memory = None
        def forward(self, x):
            out = self.line(x)
            if self.memory is not None: out = out + self.memory   # same batch size only
            self.memory = out.detach()
            return out
    heard, model = [], Remembers()
    model.line.register_forward_hook(lambda *args: heard.append(1))
    hooks = model.line._forward_hooks
    model(torch.rand(5, 4))
    kept = model.memory
    from nntrain.tape_probe import _in_evaluation
    with _in_evaluation(model): model(torch.rand(2, 4))
    assert model.memory is kept and len(heard) == 1 and model.training
    assert model.line._forward_hooks is hooks
