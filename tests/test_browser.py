"""A network in the browser: rounded weights, folded BatchNorm, the list of operations,
its file; the same network in JavaScript; and the view on which readers draw."""
import base64
import copy
import json
import math
import re
import struct
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from site_checks import axe_problems, axe_source, start_browser
from torch import nn
from torch.testing import assert_close

from nntrain.adaptive import AdamW
from nntrain.blocks import cnn, conv_block
from nntrain.compare import set_seed
from nntrain.cycles import one_cycle
from nntrain.data import DataLoaders
from nntrain.drawable import _DRAW_CSS, _DRAW_JS, DrawView, draw_view
from nntrain.figure_web import _squeeze_css, _squeeze_js, _web
from nntrain.learner import Learner
from nntrain.operations import round_operations, run_operations, to_operations
from nntrain.portable import (PortableNetwork, export_network, load_network,
                              make_portable)
from nntrain.quantize import dequantize, fold_norm, quantize
from nntrain.resnet import Stack, resnet, strided_conv
from nntrain.site import _outside
from nntrain.sketch import RandomSketch, fit_drawing
from nntrain.sources import FASHION_CLASSES, FASHION_MEAN, FASHION_STD, fashion_tensors
from nntrain.steering import ScheduleCB

NOTEBOOK = ROOT/'nbs/28_browser.ipynb'
SCALING = dict(mean=FASHION_MEAN, std=FASHION_STD)
ALT = 'An area to draw on, and a bar for each of ten classes.'


def random_norms(model):
    "A network whose BatchNorms have something to do, as after training"
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if not isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)): continue
        m.running_mean.copy_(torch.randn(m.num_features, generator=g)*.3)
        m.running_var.copy_(torch.rand(m.num_features, generator=g)*2 + .3)
        if m.weight is None: continue
        m.weight.data.copy_(torch.rand(m.num_features, generator=g) + .5)
        m.bias.data.copy_(torch.randn(m.num_features, generator=g)*.3)
    return model.eval()

def odd_one():
    "Pooling of all sorts, GELU of both, a convolution with a bias and uneven strides"
    return nn.Sequential(
        nn.Conv2d(1, 4, (3, 5), stride=(1, 2), padding=(0, 2)), nn.GELU(),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Dropout(.5),
        nn.Conv2d(4, 6, 4, stride=3, padding=1), nn.BatchNorm2d(6), nn.GELU('tanh'),
        nn.AvgPool2d(2, 1, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d((2, 3), (2, 1), (1, 1), ceil_mode=True), nn.Flatten(),
        nn.LazyLinear(10))

def mlp_with_norm():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 20, bias=False),
                         nn.BatchNorm1d(20, affine=False), nn.ReLU(), nn.Dropout(.2),
                         nn.Identity(), nn.Linear(20, 10))

NETWORKS = {
    'cnn': cnn, 'without norm': partial(cnn, (4, 8), norm=None, act=nn.GELU),
    'resnet': partial(resnet, (4, 8, 16)), 'deep': partial(resnet, (4, 4), n_blocks=3),
    'strided': partial(resnet, (4, 8), identity=strided_conv, act=nn.GELU),
    'mlp': mlp_with_norm, 'odd': odd_one,
}

def network(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    model(torch.zeros(2, 1, 28, 28))                 # lazy layers learn their shapes
    return random_norms(model)

@cache
def portable(name='resnet'): return make_portable(
    network(name), FASHION_CLASSES, **SCALING)


# ---- numbers -------------------------------------------------------------------------

@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('per', ['channel', 'layer'])
def test_quantize_keeps_within_half_a_step(bits, per):
    torch.manual_seed(bits)
    w = torch.randn(7, 3, 3, 2)*torch.logspace(-3, 3, 7)[:, None, None, None]
    w[2] = 0
    codes, scale = quantize(w, bits, per)
    most = 2**(bits - 1) - 1
    assert codes.dtype == torch.int8 and codes.shape == w.shape and (scale > 0).all()
    assert codes.abs().max() == most
    assert (scale.unique().numel() == 1) == (per == 'layer')
    error = (dequantize(codes, scale) - w).abs().flatten(1).amax(1)
    assert (error <= scale*.5001).all()
    assert (codes[2] == 0).all()
    again = quantize(dequantize(codes, scale), bits, per)
    assert torch.equal(again.codes, codes)                     # rounding twice is once

@pytest.mark.parametrize('error, says, make', [
    (ValueError, 'bits must be from 2 to 8, got 9', lambda: quantize(
        torch.ones(1, 1), 9)),
    (ValueError, 'bits must be a whole number', lambda: quantize(torch.ones(1, 1), 2.)),
    (ValueError, "per must be 'channel' or 'layer'", lambda: quantize(
        torch.ones(1, 1), per='row')),
    (TypeError, 'tensor of floats', lambda: quantize(torch.ones(1, 1).long())),
    (ValueError, 'one row per output channel', lambda: quantize(torch.ones(3))),
    (ValueError, 'NaN or infinite', lambda: quantize(torch.tensor([[float('inf')]]))),
    (TypeError, 'only a BatchNorm', lambda: fold_norm(
        torch.ones(2, 2), torch.ones(2), nn.LayerNorm(2))),
    (ValueError, 'track_running_stats=False', lambda: fold_norm(
        torch.ones(2, 2), torch.ones(2), nn.BatchNorm1d(2, track_running_stats=False))),
    (ValueError, 'of 3 channels does not fit behind 2', lambda: fold_norm(
        torch.ones(2, 2), torch.ones(2), nn.BatchNorm1d(3))),
    (ValueError, 'use it before NormalizeCB', lambda: RandomSketch()(
        torch.full((1, 1, 4, 4), -.1))),
    (ValueError, 'use it before NormalizeCB', lambda: RandomSketch()(
        torch.zeros(1, 3, 4, 4))),
    (ValueError, 'p must lie in', lambda: RandomSketch(2)),
    (ValueError, 'a square of grey levels', lambda: fit_drawing(torch.zeros(3, 4))),
])
def test_refused(error, says, make):
    with pytest.raises(error, match=re.escape(says)) as e: make()
    assert len(str(e.value).splitlines()) == 1

def test_sketches_are_drawn_anew_and_leave_the_pictures_alone():
    x = fashion_tensors('toy')['test'][0][:64].float()/255
    seeded = lambda: RandomSketch(.5, generator=torch.Generator().manual_seed(3))
    before, one, two = x.clone(), seeded()(x), seeded()(x)
    assert_close(x, before)
    assert_close(one, two)
    changed = (one != x).flatten(1).any(1)
    assert 16 < changed.sum() < 48 and one.shape == x.shape
    assert one.min() >= 0 and one.max() <= 1
    assert (RandomSketch(1.)(x) != x).flatten(1).any(1).all()


# ---- operations and the file ---------------------------------------------------------

@pytest.mark.parametrize('name', NETWORKS)
def test_operations_answer_as_the_network(name):
    model, x = network(name), torch.randn(5, 1, 28, 28)
    before = copy.deepcopy(model.state_dict())
    operations = to_operations(model)
    with torch.no_grad(): assert_close(run_operations(operations, x), model(x),
                                       rtol=1e-4, atol=1e-4)
    for key, value in model.state_dict().items(): assert torch.equal(value, before[key])
    rounded = round_operations(operations, 8)
    assert_close(make_portable(model, range(10))(x.clamp(0, 1)),
                 run_operations(rounded, x.clamp(0, 1)))

class Twice(nn.Sequential):
    def forward(self, x): return 2*super().forward(x)

@pytest.mark.parametrize('says, model', [
    ('layer 0: SiLU is not supported', nn.Sequential(nn.SiLU())),
    ('layer 0: Stack is not supported', Stack(2)),
    ('layer 1.0: Twice is not supported', nn.Sequential(
        nn.ReLU(), nn.Sequential(Twice(nn.ReLU())))),
    ('layer 0: a BatchNorm can only be folded', nn.Sequential(nn.BatchNorm2d(1))),
    ('layer 2: a BatchNorm can only be folded', nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2))),
    ('groups=1', nn.Conv2d(2, 2, 3, groups=2)),
    ('dilation=1', nn.Conv2d(2, 2, 3, dilation=2)),
    ('given as numbers', nn.Conv2d(2, 2, 3, padding='same')),
    ('padding of zeros', nn.Conv2d(2, 2, 3, padding=1, padding_mode='reflect')),
    ('must give 1×1, not 7', nn.AdaptiveAvgPool2d(7)),
    ('keep the first axis alone', nn.Flatten(2)),
    ('no dilation', nn.MaxPool2d(2, dilation=2)),
    ('divisor of its own', nn.AvgPool2d(2, divisor_override=3)),
])
def test_unsupported_layers_are_named(says, model):
    with pytest.raises(ValueError, match=re.escape(says)) as e: to_operations(model)
    assert len(str(e.value).splitlines()) == 1

def test_a_hook_that_changes_the_answer_is_noticed():
    model = network('resnet')
    handle = model[0].register_forward_hook(lambda m, a, out: 2*out)
    with pytest.raises(ValueError, match='answers differently'):
        make_portable(model, FASHION_CLASSES)
    handle.remove()
    make_portable(model, FASHION_CLASSES)

def test_export_takes_a_learner_and_leaves_its_mode(tmp_path):
    model = network('resnet').train()
    learn = Learner(model, DataLoaders([], []), F.cross_entropy, AdamW, 1e-3, [])
    path = export_network(learn, tmp_path/'a.bin', FASHION_CLASSES, **SCALING)
    assert model.training and export_network(learn, path, FASHION_CLASSES) == path
    loaded = load_network(path)
    assert loaded.classes == FASHION_CLASSES and loaded.shape == (1, 28, 28)
    x = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    assert_close(loaded(x), loaded(x/255.))
    with pytest.raises(ValueError, match='takes pictures'): loaded(x[0])
    assert list(tmp_path.iterdir()) == [path]

def test_the_books_resnet_fits_into_a_file(tmp_path):
    model = random_norms(resnet())
    path = export_network(model, tmp_path/'a.bin', FASHION_CLASSES, **SCALING)
    assert path.stat().st_size <= 1_500_000
    again = load_network(path)
    assert again.content == make_portable(model, FASHION_CLASSES, **SCALING).content
    line, numbers = again.content.split(b'\n', 1)
    shapes = [op['weight'].shape for op in every(again.operations) if 'weight' in op]
    assert len(numbers) == sum(math.prod(s) + 8*s[0] for s in shapes)
    assert set(json.loads(line)) == {
        'format', 'version', 'classes', 'shape', 'mean', 'std', 'layers'}

def every(operations):
    "All operations in the order of the file, those inside of sums as well"
    for op in operations:
        for path in op.get('paths', ()): yield from every(path)
        yield op

def changed(first=None, numbers=lambda b: b, **line):
    "A good file with other entries in its line, first layer or numbers"
    head, rest = portable().content.split(b'\n', 1)
    head = {**json.loads(head), **line}
    if first: head['layers'][0].update(first)
    return json.dumps(head).encode() + b'\n' + numbers(rest)

def swapped(numbers):
    "The same numbers, but the highest byte of each float stands first"
    out, at = b'', 0
    for op in every(portable().operations):
        if 'weight' not in op: continue
        end, n = at + op['weight'].numel(), 2*len(op['bias'])
        floats = struct.unpack_from(f'<{n}f', numbers, end)
        out += numbers[at:end] + struct.pack(f'>{n}f', *floats)
        at = end + 4*n
    return out

# two classes, whose turned scales are positive and finite, and too small to be true
TURNED = json.dumps(dict(
    format='nntrain network', version=2, classes=['a', 'b'], shape=[1, 28, 28], mean=0.,
    std=1., layers=[dict(op='flatten'), dict(op='linear', shape=[2, 784])])
    ).encode() + b'\n' + bytes(1568) + bytes.fromhex('39302010')*2 + bytes(8)

FOREIGN = 'not a network file', 'it is not a network of this book'
BAD_FILES = [  # what a file holds; what Python says of it; what the page says of it
    (b'', *FOREIGN), (b'{', *FOREIGN), (b'[]\n', *FOREIGN), (b'"a"\n', *FOREIGN),
    (b'null\n', *FOREIGN), (b'\xff\xfe\n', *FOREIGN), (b'{"a": 1}\nbc', *FOREIGN),
    (b'[' * 100_000 + b'\n', *FOREIGN), (changed(format='zip'), *FOREIGN),
    (changed().decode('latin1').encode('utf-16'), *FOREIGN), (changed()[:99], *FOREIGN),
    (changed(version=1), 'has version 1, and this package reads 2', 'its version is 1'),
    (changed(numbers=lambda b: b[:-1]), 'is cut short', 'it is cut short'),
    (changed(numbers=lambda b: b''), 'is cut short', 'it is cut short'),
    (changed(numbers=lambda b: b + b'ab'), 'has 2 bytes that belong to no operation',
     'it has 2 bytes that belong to no layer'),
    (TURNED, 'another byte order', 'have their bytes in another'),
    (changed(numbers=swapped), 'another byte order', 'have their bytes in another'),
    (changed(first=dict(shape=[10**9, 10**9, 3, 3])), 'is cut short', 'is cut short'),
    (changed(first=dict(shape=[-4, 1, -3, 3])), 'damaged', 'its shapes are damaged'),
    (changed(first=dict(shape=[4.5, 1, 2, 4])), 'damaged', 'its shapes are damaged'),
    (changed(first=dict(padding=[10**6, 10**6])), 'the windows of', 'its windows are'),
    (changed(first=dict(stride=[0, 0])), 'damaged', 'its windows are damaged'),
    (changed(first=dict(stride=None)), 'damaged', 'its content is damaged'),
    (changed(first=dict(op='toString')), "the operation 'toString' is not known",
     'which this page does not know'),
    (changed(layers=None), 'damaged', 'its content is damaged'),
    (changed(layers=[]), 'that belong to no operation', 'that belong to no layer'),
    (changed(classes=['a']), 'there are 1 names', 'gives 10 numbers for its classes a'),
    (changed(classes=3), 'classes must be a list of 10 names, got 3',
     'it gives 10 numbers for its classes 3'),
    (changed(layers='ab'), 'is damaged (TypeError)', 'its content is damaged'),
    (changed(shape=[1, 10**6, 10**6]), 'at most a million numbers',
     'it wants pictures of the shape 1,1000000,1000000'),
    (changed(shape=[3, 28, 28]), 'damaged', 'it wants pictures of the shape 3,28,28'),
    (changed(mean='a'), "mean must be a finite number, got 'a'",
     'its mean and its spread are not numbers'),
    (changed(std=0), 'std must be a finite number above 0',
     'its mean and its spread are not numbers'),
]

@pytest.mark.parametrize('i', range(len(BAD_FILES)))
def test_bad_files_are_one_sentence(tmp_path, i):
    content, says, _ = BAD_FILES[i]
    path = tmp_path/'a.bin'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(says)) as e: load_network(path)
    assert len(str(e.value).splitlines()) == 1 and str(path) in str(e.value)
    with pytest.raises(FileExistsError, match='choose another name'):
        export_network(network('resnet'), path, FASHION_CLASSES)
    assert path.read_bytes() == content

def test_the_file_that_is_changed_is_a_good_one(tmp_path):
    assert changed(numbers=swapped) != changed()
    loaded = PortableNetwork(changed())
    assert_close(loaded(torch.ones(1, 1, 28, 28)), portable()(torch.ones(1, 1, 28, 28)))

def test_two_channels_in_another_byte_order():
    "With few channels, turned numbers may all be positive and finite"
    taken = 0
    for seed in range(40):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        content = make_portable(net, ['a', 'b'], shape=(1, 2, 2)).content
        line, numbers = content.split(b'\n', 1)
        floats = struct.pack('>4f', *struct.unpack('<4f', numbers[8:]))
        try: PortableNetwork(line + b'\n' + numbers[:8] + floats)
        except ValueError: continue
        taken += 1
    assert taken <= 1

def test_tiny_weights_are_no_damage():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    for size in 1e-43, 1e-12:                      # such as weight decay leaves
        with torch.no_grad(): net[1].weight[:2] = size
        make_portable(net, ['a', 'b', 'c'], shape=(1, 2, 2))

PICTURES = 'pictures must be bytes, or floats from 0 to 1: this network normalises'

@pytest.mark.parametrize('given, says', [
    ([[1.]], 'as a tensor (N, 1, 28, 28), got list'),
    (None, 'as a tensor (N, 1, 28, 28), got NoneType'),
    (torch.zeros(1, 28, 28), 'got (1, 28, 28)'),
    (torch.full((1, 1, 28, 28), -.8), PICTURES),
    (torch.full((1, 1, 28, 28), 9), PICTURES),
    (torch.full((1, 1, 28, 28), math.nan), PICTURES)])
def test_what_a_network_is_not_asked(given, says):
    with pytest.raises(ValueError, match=re.escape(says)): portable()(given)

@pytest.mark.parametrize('error, says, make', [
    (ValueError, 'classes must be a list of 10 names, got 5', lambda m: make_portable(
        m, 5)),
    (ValueError, "of 10 names, got '0123456789'", lambda m: make_portable(
        m, '0123456789')),
    (ValueError, "mean must be a finite number, got 'x'", lambda m: make_portable(
        m, range(10), mean='x')),
    (ValueError, 'does not take pictures of shape (3, 28, 28): give its own shape=',
     lambda m: make_portable(mlp_with_norm(), range(10), shape=(3, 28, 28))),
    (ValueError, 'answers with NaN or infinite numbers', lambda m: make_portable(
        m.apply(spoilt), range(10))),
    (TypeError, 'a list from to_operations, got Sequential', lambda m: round_operations(
        nn.Sequential(m))),
    (TypeError, 'network must be a PortableNetwork or the path of its file, got ResNet',
     lambda m: draw_view(m, alt=ALT)),
    (ValueError, 'must lie in [0, 1], or be bytes', lambda m: draw_view(
        portable(), torch.full((1, 28, 28), 300), ['a'], alt=ALT)),
    (ValueError, 'a square of grey levels (n, n), got list',
     lambda m: fit_drawing([1])),
    (ValueError, 'divide bytes by 255', lambda m: fit_drawing(
        torch.full((9, 9), 200, dtype=torch.uint8))),
    (ValueError, 'divide bytes by 255', lambda m: RandomSketch()(
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8)))])
def test_bad_input_is_one_sentence(error, says, make):
    with pytest.raises(error, match=re.escape(says)) as e: make(network('resnet'))
    assert len(str(e.value).splitlines()) == 1

@torch.no_grad()
def spoilt(module):
    if isinstance(module, nn.Linear): module.bias[0] = math.nan

def test_no_pictures_give_no_sketches():
    assert RandomSketch()(torch.zeros(0, 1, 8, 8)).shape == (0, 1, 8, 8)

def test_what_is_no_file_of_ours_is_not_read(tmp_path):
    (tmp_path/'large.bin').open('wb').truncate(200_000_000)
    with pytest.raises(ValueError, match='it is larger than 100 MB'):
        load_network(tmp_path/'large.bin')
    with pytest.raises(ValueError, match='cannot be read: Is a directory'):
        load_network(tmp_path)
    with pytest.raises(FileNotFoundError): load_network(tmp_path/'none.bin')
    with pytest.raises(TypeError, match='bytes of a network file, got dict'):
        PortableNetwork({})

def test_where_a_network_is_not_written(tmp_path):
    model = network('resnet')
    for path in tmp_path/'no'/'a.bin', tmp_path/'a.json':
        with pytest.raises(ValueError, match='a .bin file in a folder that exists'):
            export_network(model, path, FASHION_CLASSES)
    with pytest.raises(ValueError, match='there are 1 names'):
        export_network(model, tmp_path/'a.bin', ['a'])
    with pytest.raises(TypeError, match='a Learner or an nn.Module'):
        export_network('model', tmp_path/'a.bin', ['a'])
    for shape in (4,), (0, 28, 28), (1, 10**6, 10**6), 28, (1., 28., 28.):
        with pytest.raises(ValueError, match='shape must be'):
            export_network(nn.Linear(4, 10), tmp_path/'a.bin', ['a'], shape=shape)
    with pytest.raises(ValueError, match='std must be a finite number above 0'):
        export_network(model, tmp_path/'a.bin', FASHION_CLASSES, std=0)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('says, make', [
    ('too short', lambda: draw_view(portable(), alt='a')),
    ('2 pictures need as many names, got 1', lambda: draw_view(
        portable(), torch.zeros(2, 1, 28, 28), ['a'], alt=ALT)),
    ('at most 20 of 28×28', lambda: draw_view(
        portable(), torch.zeros(2, 9, 9), 'ab', alt=ALT)),
    ('must lie in [0, 1]', lambda: draw_view(
        portable(), torch.full((1, 28, 28), 2.), ['a'], alt=ALT)),
    ('this network takes (3, 8, 8)', lambda: draw_view(make_portable(
        cnn((4,), n_in=3), range(10), shape=(3, 8, 8)), alt=ALT)),
    ('let readers choose a file', lambda: draw_view(
        make_portable(nn.Sequential(nn.Flatten(), nn.Linear(784, 2000),
                                    nn.Linear(2000, 10)), range(10)), alt=ALT)),
])
def test_draw_view_refuses(says, make):
    with pytest.raises(ValueError, match=re.escape(says)): make()


# ---- sizes, and what the notebook holds ----------------------------------------------

def stored_view():
    nb = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
    shown = [''.join(o.get('data', {}).get('text/html', '')) for c in nb['cells']
             for o in c.get('outputs', ())]
    html, = (text for text in shown if 'nnx-draw' in text)
    return html, json.loads(re.search(r'drawing\((\{.*\})\);\n', html)[1])

def test_sizes():
    html, data = stored_view()
    assert len(data['network']) <= 150_000 and len(html.encode()) <= 200_000
    assert len(_squeeze_js(_web('network.js'))) < 8000
    assert sum(len(_squeeze_js(_web(name))) for name in _DRAW_JS) < 28_000
    assert NOTEBOOK.stat().st_size < 500_000

def test_the_stored_view_has_the_scripts_of_today():
    html, _ = stored_view()
    for name in _DRAW_JS: assert _squeeze_js(_web(name)) in html, name
    for name in _DRAW_CSS: assert _squeeze_css(_web(name)) in html, name
    assert not _outside.search(html)

def stored_network():
    return PortableNetwork(base64.b64decode(stored_view()[1]['network']))

def test_the_stored_network_knows_clothes():
    kept, tensors = stored_network(), fashion_tensors()
    if tensors.source == 'toy': pytest.skip('the network was trained on Fashion-MNIST')
    x, y = (part[:2000] for part in tensors['test'])
    assert (kept(x).argmax(1) == y).float().mean() > .85

def test_a_view_is_deterministic_and_says_its_answer():
    x = torch.zeros(2, 28, 28)
    one, two = (draw_view(portable(), x, ['</script>', 'b'], alt=ALT) for _ in range(2))
    assert isinstance(one, DrawView) and one.to_html() == two.to_html()
    assert one.to_html().count('</script>') == 1
    assert not re.search('https?:|src="(?!data:)', one.to_html())
    text = one._repr_mimebundle_()['text/plain']
    assert text.startswith(ALT) and re.search(r'The first picture \(.*%\.$', text)


# ---- the same network in JavaScript --------------------------------------------------

@pytest.fixture(scope='module')   # two at the same time in one process do not work
def browser():
    with start_browser() as b: yield b

def as_page(body, dark=False):
    colours = 'background:#181a1f;color:#dcdfe4' if dark else (
        'background:#fff;color:#222')
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title>'
            '<meta name="viewport" content="width=device-width"><link rel="icon" '
            'href="data:,">'
            f'<style>body{{margin:8px;{colours}}}</style><body><main><h1>t</h1>{body}'
            '</main>')

@pytest.fixture
def open_page(browser, tmp_path):
    """open_page(html, …) -> page; `page.problems` lists console errors, exceptions and
    requests to anybody else"""
    contexts = []
    def go(html, width=800, **kw):
        contexts.append(browser.new_context(viewport=dict(width=width, height=1000),
                                            **kw))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.problems = []
        page.on('console', lambda m: page.problems.append(m.text)
                if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: page.problems.append(f'exception: {e}'))
        page.on('request', lambda r: page.problems.append(f'request: {r.url}')
                if not r.url.startswith(('file:', 'data:', 'blob:')) else None)
        path = tmp_path/f'page{len(contexts)}.html'
        path.write_text(html, encoding='utf-8')
        page.goto(path.as_uri())
        return page
    yield go
    for context in contexts: context.close()

@pytest.fixture
def lab(open_page):
    "A page with the functions of network.js and ink.js at its top level"
    page = open_page(as_page(''))
    page.add_script_tag(content=_web('network.js') + _web('ink.js')
                        + _web('covering.js'))
    return page

LOGITS = '''({ network, pictures }) => {
  const known = readNetwork(bytesOf(network));
  const bytes = new Uint8Array(bytesOf(pictures));
  return Array.from({ length: bytes.length/784 }, (_, i) => [...known.logits(
    Float32Array.from(bytes.slice(784*i, 784*(i + 1)), v => v/255))]);
}'''

def as_text(content): return base64.b64encode(content).decode()

def in_javascript(page, network, x):
    "Logits for bytes (N, 1, 28, 28)"
    given = dict(network=network.content, pictures=x.numpy().tobytes())
    return torch.tensor(page.evaluate(
        LOGITS, {name: as_text(part) for name, part in given.items()}))

@pytest.mark.parametrize('name', NETWORKS)
def test_parity_of_each_operation(lab, name):
    torch.manual_seed(1)
    ours, x = portable(name), torch.randint(256, (6, 1, 28, 28), dtype=torch.uint8)
    want = ours(x)
    got = in_javascript(lab, ours, x)
    assert ((got - want).abs().amax(1) <= 1e-3*want.abs().amax(1)).all()
    assert lab.problems == []

def after_training(model, tensors, n, n_epochs, batch_size=128):
    x, y = (part[:n] for part in tensors['train'])
    set_seed(0)
    dls = DataLoaders.from_tensors((x, y), (x[:500], y[:500]), seed=0,
                                   batch_size=batch_size, **SCALING)
    learn = Learner(model, dls, F.cross_entropy, AdamW, .01,
                    [ScheduleCB(lr=one_cycle(.01))])
    learn.fit(n_epochs)
    return learn.model.eval(), tensors['test']

@pytest.fixture(scope='module')
def trained():
    "A ResNet after a short training run, and the test pictures"
    set_seed(0)
    return after_training(resnet((8, 16, 32)), fashion_tensors(), 20_000, 3)

def check_parity(lab, model, x, y):
    "The same numbers with the same weights, the same classes as before the rounding"
    rounded = make_portable(model, FASHION_CLASSES, **SCALING)
    with torch.no_grad(): floats = model((x/255. - FASHION_MEAN)/FASHION_STD)
    assert (floats.argmax(1) == y).float().mean() > .7         # it has learned
    got, want = in_javascript(lab, rounded, x), rounded(x)
    assert ((got - want).abs().amax(1) <= 1e-3*want.abs().amax(1)).all()
    same = (got.argmax(1) == floats.argmax(1)).float().mean()
    assert same >= .995, f'{same:.1%} have the class of the network that was trained'

def test_parity_on_a_thousand_pictures(lab, trained):
    model, (x, y) = trained
    check_parity(lab, model, x[:1000], y[:1000])

def test_parity_of_the_books_resnet_on_a_thousand_pictures(lab):
    "Pictures drawn by code are learned in seconds"
    set_seed(0)
    model, (x, y) = after_training(resnet(), fashion_tensors('toy'), 1500, 3, 32)
    assert len(x) >= 1000
    check_parity(lab, model, x[:1000], y[:1000])

def test_a_drawing_is_fitted_as_in_python(lab):
    torch.manual_seed(0)
    for _ in range(8):
        n = int(torch.randint(30, 90, ()))
        levels = torch.zeros(n, n)
        top, left, high, wide = (int(v) for v in torch.rand(4)*(n - 2) + 1)
        levels[top:top + high, left:left + wide] = torch.rand(1)*.8 + .2
        levels *= torch.rand(n, n)
        got = lab.evaluate('([v, n]) => [...fitted(Float32Array.from(v), n) || []]',
                           [levels.flatten().tolist(), n])
        want = fit_drawing(levels)
        assert_close(torch.tensor(got).view(28, 28) if got else 0*want, want,
                     rtol=1e-4, atol=1e-5)
    assert lab.evaluate('fitted(new Float32Array(900), 30)') is None

def test_what_is_inside_an_outline(lab):
    ring = torch.zeros(9, 9)
    ring[2:7, 2:7] = 1
    ring[3:6, 3:6] = 0
    got = lab.evaluate('''v => {
      const isInside = inside(Float32Array.from(v), 9);
      return v.map((_, i) => +isInside(i));
    }''', ring.flatten().tolist())
    want = torch.zeros(9, 9)
    want[2:7, 2:7] = 1                         # the line, and what it surrounds
    assert_close(torch.tensor(got).view(9, 9).float(), want)
    ring[4, 6] = 0                             # a gap
    got = lab.evaluate('v => +inside(Float32Array.from(v), 9)(40)',
                       ring.flatten().tolist())
    assert got == 0

@pytest.mark.parametrize('i', range(len(BAD_FILES)))
def test_javascript_refuses_in_words(lab, i):
    content, _, says = BAD_FILES[i]
    said = lab.evaluate('text => { try { readNetwork(bytesOf(text)); } '
                        'catch (e) { return e.message; } }', as_text(content))
    assert says in said and len(said.splitlines()) == 1

# ---- the view ------------------------------------------------------------------------

@pytest.fixture(scope='module')
def view(trained):
    model, (x, y) = trained
    first = [int((y == c).nonzero()[0, 0]) for c in (7, 8, 9)]
    names = ['Sneaker', 'Bag', 'Ankle boot']
    network = make_portable(model, FASHION_CLASSES, **SCALING)
    made = draw_view(network, x[first], names, title='Draw', alt=ALT)
    made.network, made.pictures = network, x[first]
    return made

SHOE = [(30, 190), (30, 130), (80, 140), (120, 110), (150, 135), (220, 155), (252, 195),
        (30, 195)]

def part(page, name): return page.locator(f'[data-part={name}]').first
def bars(page): return part(page, 'bars').inner_text()
def button(page, name): return page.get_by_role('button', name=name).first
def settled(page): page.evaluate(
    'new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))')

def stroke(page, points):
    box = part(page, 'pad').bounding_box()
    scale = box['width']/280
    places = [(box['x'] + x*scale, box['y'] + y*scale) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]: page.mouse.move(*place, steps=3)
    page.mouse.up()
    settled(page)

def ink(page): return page.evaluate('''() => {
  const c = document.querySelector('[data-part=pad]');
  const { data } = c.getContext('2d').getImageData(0, 0, 280, 280);
  return data.filter((v, i) => i % 4 === 0 && v > 127).length;
}''')

def shares(page): return page.eval_on_selector_all(
    '[data-part=bars] i', 'es => es.map(e => +e.style.getPropertyValue("--p"))')

def test_a_stored_picture_gets_pythons_answer(open_page, view):
    page = open_page(as_page(view.to_html()))
    settled(page)
    for i, name in enumerate(('Sneaker', 'Bag', 'Ankle boot')):
        page.get_by_role('radio', name=name).check()
        settled(page)
        want = view.network(view.pictures[i:i + 1]).softmax(1)[0]
        assert_close(torch.tensor(shares(page)[:10]), want, atol=2e-3, rtol=0)
    page.wait_for_function(                      # said aloud when the hand rests
        '/[%]\\.$/.test(document.querySelector("[data-part=says]").textContent)')
    assert page.problems == []

def test_draw_erase_fill_and_clear(open_page, view):
    page = open_page(as_page(view.to_html()))
    button(page, 'clear').click()
    settled(page)
    assert ink(page) == 0 and '–' in bars(page)
    stroke(page, SHOE)
    drawn, first = ink(page), bars(page)
    assert drawn > 5000 and '%' in first
    page.get_by_role('radio', name='thick').check()
    page.get_by_role('radio', name='eraser').check()
    stroke(page, [(30, 120), (30, 220)])
    assert ink(page) < drawn - 500
    page.get_by_role('radio', name='pen').check()
    stroke(page, [(30, 120), (30, 200)])
    before = ink(page)
    button(page, 'fill').click()
    settled(page)
    assert ink(page) > before + 3000 and bars(page) != first
    button(page, 'clear').click()
    settled(page)
    assert ink(page) == 0 and page.problems == []

def test_draw_by_keyboard(open_page, view):
    page = open_page(as_page(view.to_html()))
    button(page, 'clear').focus()
    page.keyboard.press('Space')
    settled(page)
    pad = part(page, 'pad')
    pad.focus()
    page.keyboard.press('ArrowLeft')
    assert ink(page) == 0                        # the pen is still up
    page.keyboard.press('Space')
    dot = ink(page)
    for key in 8*['Shift+ArrowRight'] + 3*['ArrowDown']: page.keyboard.press(key)
    assert ink(page) > dot + 500 and pad.evaluate('e => document.activeElement === e')
    assert part(page, 'cursor').evaluate(
        'e => getComputedStyle(e).visibility + e.dataset.down') == 'visibletrue'
    page.wait_for_function(                      # the answer comes when the hand rests
        '/%/.test(document.querySelector("[data-part=says]").textContent)')
    page.keyboard.press('Space')
    page.wait_for_function(
        'document.querySelector("[data-part=says]").textContent === "The pen is up."')
    lines = ink(page)
    page.keyboard.press('Shift+ArrowUp')
    assert ink(page) == lines and page.problems == []

def test_draw_by_finger(open_page, view):
    page = open_page(as_page(view.to_html()), width=360, has_touch=True, is_mobile=True)
    button(page, 'clear').tap()
    box = part(page, 'pad').bounding_box()
    session = page.context.new_cdp_session(page)
    def touch(kind, *points): session.send('Input.dispatchTouchEvent', dict(
        type=kind, touchPoints=[dict(x=x, y=y) for x, y in points]))
    touch('touchStart', (box['x'] + 40, box['y'] + 40))
    for i in range(10): touch('touchMove', (box['x'] + 40 + 12*i, box['y'] + 40 + 8*i))
    touch('touchEnd')
    settled(page)
    assert ink(page) > 1000 and page.evaluate('scrollY') == 0 and page.problems == []

def test_maps_and_covering(open_page, view):
    page = open_page(as_page(view.to_html()))
    maps, show = part(page, 'maps'), button(page, 'maps')
    assert not maps.is_visible() and show.get_attribute('aria-expanded') == 'false'
    show.click()
    settled(page)
    sheets = maps.locator('canvas')
    assert show.get_attribute('aria-expanded') == 'true' and sheets.count() == 3
    assert maps.inner_text().split('\n')[0] == 'Layer 1: 8 maps of 28×28'
    assert maps.locator('canvas').nth(1).get_attribute('aria-label').startswith(
        'Layer 2: 16 maps of 14×14')
    look = lambda: sheets.first.evaluate('e => e.toDataURL()')
    before = look()
    page.get_by_role('radio', name='Bag').check()
    settled(page)
    assert look() != before
    button(page, 'cover').click()
    page.wait_for_function('!document.querySelector("[data-part=falls]").hidden')
    says = part(page, 'about').inner_text()
    assert re.search('costs most: from|No square takes', says)
    stroke(page, [(5, 5), (9, 9)])     # another picture: the map is out of date
    assert not part(page, 'covered').is_visible() and page.problems == []

def test_covering_as_in_python(lab, view):
    "The fall of the probability, square by square"
    network, levels = view.network, view.pictures[1, 0]/255.
    got = lab.evaluate('''([file, v]) => new Promise(done => {
      const known = readNetwork(bytesOf(file)), ask = x => softmax(known.logits(x));
      coverAll(Float32Array.from(v), ask, 8, () => true, () => {}, f => done([...f]));
    })''', [as_text(network.content), levels.flatten().tolist()])
    covered = levels.expand(196, 1, 28, 28).clone()
    for i in range(196):
        y, x = 2*(i//14) - 3, 2*(i % 14) - 3
        covered[i, 0, max(y, 0):y + 7, max(x, 0):x + 7] = 0
    def share(pictures): return network(pictures).softmax(1)[:, 8]
    assert_close(torch.tensor(got), share(levels[None, None]) - share(covered),
                 atol=1e-4, rtol=0)

def test_files_are_taken_or_refused(open_page, view, tmp_path):
    page = open_page(as_page(view.to_html()))
    named, choose = part(page, 'named'), part(page, 'file')
    def take(path, says):
        choose.set_input_files(path)
        page.wait_for_function('''says => document.querySelector("[data-part=named]")
          .textContent.includes(says)''', arg=says)
        settled(page)
        return bars(page)
    (tmp_path/'bad.bin').write_text('{"format": 1}')
    (tmp_path/'half.bin').write_bytes(changed()[:-9])
    (tmp_path/'large.bin').write_bytes(bytes(4_000_000))
    (tmp_path/'not.png').write_text('no picture')
    before = bars(page)
    for name, says in [('bad.bin', 'it is not a network of this book'),
                       ('half.bin', 'it is cut short'),
                       ('large.bin', 'it is larger than 4 MB'),
                       ('not.png', 'this browser cannot read it as a picture')]:
        assert take(tmp_path/name, f'{name} cannot be used: {says}.') == before
        assert 'Choose a picture, or a .bin file' in named.inner_text()
    export_network(cnn((4, 8)), tmp_path/'other.bin', list('abcdefghij'))
    assert 'j\n' in take(tmp_path/'other.bin', 'The network is now that of other.bin')
    for mode, paper, mark in ('L', 255, 0), ('L', 0, 255), ('RGBA', (0, 0, 0, 0),
                                                            (9, 9, 9, 255)):
        picture = Image.new(mode, (100, 60), paper)
        picture.paste(mark, (20, 20, 80, 50))
        picture.save(tmp_path/'shoe.png')
        button(page, 'clear').click()
        choose.set_input_files([])
        take(tmp_path/'shoe.png', 'The picture is that of shoe.png')
        assert abs(ink(page) - 168*84) < 900     # 60 × 30 points on 2.8 pixels each
    assert page.problems == []

def test_the_line_about_files_says_what_is_true_now(open_page, view, tmp_path):
    "A refusal and the name of a picture go with the picture; the network's name stays"
    page = open_page(as_page(view.to_html()))
    line, choose = part(page, 'named'), part(page, 'file')
    boot = page.get_by_role('radio', name='Ankle boot')
    (tmp_path/'not.png').write_text('no picture')
    Image.new('L', (60, 60), 40).save(tmp_path/'dark.png')
    export_network(cnn((4, 8)), tmp_path/'other.bin', list('abcdefghij'))
    picked = lambda: part(page, 'pictures').locator(':checked').count()
    def take(name, says):
        choose.set_input_files(tmp_path/name)
        page.wait_for_function('''says => document.querySelector("[data-part=named]")
          .textContent.includes(says)''', arg=says)
    take('not.png', 'not.png cannot be used')
    boot.check()
    assert (line.inner_text(), picked()) == ('', 1)
    take('dark.png', 'The picture is that of dark.png.')
    assert picked() == 0
    button(page, 'clear').click()
    assert line.inner_text() == ''
    take('other.bin', 'The network is now that of other.bin.')
    take('not.png', 'The network is now that of other.bin. not.png cannot be used')
    boot.check()
    assert line.inner_text() == 'The network is now that of other.bin.'
    assert page.problems == []

def test_the_same_file_can_be_chosen_twice(open_page, view, tmp_path):
    page, path = open_page(as_page(view.to_html())), tmp_path/'dark.png'
    Image.new('L', (60, 60), 40).save(path)
    choose = part(page, 'file')
    for _ in range(2):
        with page.expect_file_chooser() as asked: choose.click()
        assert choose.evaluate('e => e.files.length') == 0   # so that it changes again
        asked.value.set_files(path)
        page.wait_for_function('''() => document.querySelector("[data-part=named]")
          .textContent.includes('dark.png')''')
        button(page, 'clear').click()
    assert page.problems == []

def test_a_dropped_network_is_taken(open_page, view):
    page = open_page(as_page(view.to_html()))
    content = make_portable(cnn((4, 8)), list('abcdefghij')).content
    page.evaluate('''bytes => {
      const all = new DataTransfer();
      all.items.add(new File([Uint8Array.from(bytes)], 'mine.bin'));
      document.querySelector('.nnx-draw').dispatchEvent(
        new DragEvent('drop', { dataTransfer: all, bubbles: true, cancelable: true }));
    }''', list(content))
    page.wait_for_function('''document.querySelector('[data-part=bars]').innerText
      .startsWith('a')''')
    assert page.problems == []

def test_views_do_not_disturb_one_another(open_page, view):
    "Two different views, and one of them twice"
    other = draw_view(portable(), view.pictures[:2], ['x', 'y'], alt=ALT)
    page = open_page(as_page(view.to_html() + other.to_html() + view.to_html()))
    figures = page.locator('.nnx-draw')
    settled(page)
    texts = lambda: [figures.nth(i).locator('[data-part=bars]').inner_text()
                     for i in range(3)]
    before = texts()
    assert before[0] == before[2] != before[1]
    figures.nth(2).get_by_role('radio', name='Ankle boot').check()
    settled(page)
    after = texts()
    assert after[:2] == before[:2] and after[2] != before[2]
    assert figures.nth(0).get_by_role('radio', name='Sneaker').is_checked()
    assert page.problems == []

@pytest.mark.parametrize('width, dark', [(800, False), (800, True), (360, False),
                                         (360, True)])
def test_it_fits_and_everybody_can_use_it(open_page, view, width, dark):
    axe = axe_source()
    page = open_page(as_page(view.to_html(), dark), width, reduced_motion='reduce')
    for name in 'maps', 'cover': button(page, name).click()
    page.wait_for_function('!document.querySelector("[data-part=falls]").hidden')
    assert page.evaluate('document.scrollingElement.scrollWidth') <= width
    assert axe_problems(page, axe) == page.problems == []
    nameless = page.locator('button, input, canvas[tabindex]').evaluate_all('''es =>
      es.filter(e => !(e.labels && e.labels.length && e.labels[0].textContent.trim())
        && !e.textContent.trim() && !e.ariaLabel).map(e => e.outerHTML)''')
    assert nameless == []
    if not axe: pytest.skip('fine, but axe-core is not there')

def test_without_scripts_there_is_a_picture_and_its_answer(open_page, view):
    page = open_page(as_page(view.to_html()), java_script_enabled=False)
    assert part(page, 'still').is_visible() and not part(page, 'pad').is_visible()
    want = int(view.network(view.pictures[:1]).argmax())
    top = max(range(10), key=lambda i: float(re.findall('--p:([.0-9]+)',
                                                        view.to_html())[i]))
    assert top == want and FASHION_CLASSES[want] in bars(page)
    assert page.locator('button:visible, input:visible').count() == 0

def multiplications(operations, x):
    "How many products of weights one picture takes"
    many = 0
    for op in operations:
        many += sum(multiplications(path, x) for path in op.get('paths', ()))
        x = run_operations([op], x)
        if 'weight' in op: many += op['weight'].numel()*x[0, 0].numel()
    return many

def test_the_books_network_is_small_enough_for_a_phone():
    """In 50 ms, on a processor that is four times slower than a laptop's. The time
    itself is measured by benchmarks/bench_browser.py"""
    linear = dict(op='linear', weight=torch.ones(10, 784), bias=torch.zeros(10))
    flat = [dict(op='flatten'), linear]
    assert multiplications(flat, torch.zeros(1, 1, 28, 28)) == 7840
    operations = stored_network().operations
    assert multiplications(operations, torch.zeros(1, 1, 28, 28)) <= 5_000_000

def test_many_moves_of_the_pen_are_one_answer(open_page):
    "However fast the pen moves: one look at the pad and one answer for each frame"
    html, _ = stored_view()
    page = open_page(as_page(html))
    button(page, 'clear').click()
    box = part(page, 'pad').bounding_box()
    page.mouse.move(box['x'] + 40, box['y'] + 40)
    page.mouse.down()
    settled(page)
    looks, powers, marks = page.evaluate('''([x, y]) => new Promise(done => {
      const pad = document.querySelector('[data-part=pad]'), counts = [0, 0, 0];
      const count = (owner, name, i) => {
        const old = owner[name];
        owner[name] = function (...all) { counts[i]++; return old.apply(this, all); };
      };
      const pen = CanvasRenderingContext2D.prototype;
      count(pen, 'getImageData', 0);
      count(Math, 'exp', 1);
      count(pen, 'stroke', 2);
      for (let i = 0; i < 60; i++)
        pad.dispatchEvent(new PointerEvent('pointermove',
          { pointerId: 1, clientX: x + 2 * i, clientY: y + i }));
      requestAnimationFrame(() => requestAnimationFrame(() => done(counts)));
    })''', [box['x'] + 40, box['y'] + 40])
    page.mouse.up()
    assert marks == 60 and looks == 1      # all moves are drawn
    assert powers == 10                    # softmax takes one power for each class
    assert page.problems == []
