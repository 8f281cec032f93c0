"""Interactive figures: what they refuse, what they carry, and what a browser with the
network refused shows of them."""
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from site_checks import start_browser

from nntrain.drawable import _DRAW_JS
from nntrain.explore import check_frames, explore, figure_data
from nntrain.figure_frames import _series
from nntrain.figure_graph import _numbers_at, _told
from nntrain.figure_lines import _COLOURS, _pack_lines, _paths
from nntrain.figure_numbers import _GAP, _LO, _SPAN, _decode, _encode, _thick, _thin
from nntrain.figure_tiles import _palette, _places
from nntrain.figure_web import (_DRAG_JS, _EXPLORE_JS, _GRAPH_JS, _PREDICT_JS,
                                _squeeze_css, _squeeze_js, _web)
from nntrain.prediction import predict
from nntrain.site import _outside
from nntrain.sync import nntrain_sync
from nntrain.tape_view import _TAPE_JS

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
ALT = 'A line that moves when the slider moves.'


# ---- figures to try ------------------------------------------------------------------

def waves(shift, shape):
    x = np.linspace(0, 6, 40)
    y = {'sine': np.sin, 'cosine': np.cos}[shape]
    return {
        f'<wave> {i}': (
            x, y(x + shift + i) + (np.where(x > 3, np.nan, 0) if i == 3 else 0))
        for i in range(4)
    }

def spiral(turn):
    t = np.linspace(0, 1, 30)
    path = np.stack([t*np.cos(turn*t), t*np.sin(turn*t)], 1)
    path[25:] *= 40  # leaves the picture
    return path

def roll(lr, a, b):
    "Gradient descent in a bowl from a start on a grid"
    w, res = np.array([a, b]), []
    for _ in range(6): res.append(w); w = w - lr*w
    return np.stack(res)

def steep(rate):
    s = np.logspace(-5, 1, 50)
    return {'loss': (s, 1+(s/rate)**2), 'noise': (s, 1+np.sin(s*50)**2)}

def cloud(angle):
    a = np.random.default_rng(0).normal(size=(30, 2))*[3, 1]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return {'one': a@turn, '<two>': (a[:, 0], a[:, 1]+angle)}

def tosses(n, way):
    draws = np.random.default_rng(0).normal(size=(n, 2))
    return {
        'first': draws[:, 0],
        'second': draws[:, 1] if way == 'values' else draws[: n // 2, 1]}

def hill(width, tilt):
    x, y = np.logspace(-2, 2, 9), np.linspace(-1, 1, 6)
    z = np.exp(-(np.log10(x)/width)**2) * (1+tilt*y[:, None])
    z[0, 0] = np.nan
    return x, y, z

def greys(power, flip):
    p = np.linspace(0, 1, 30).reshape(5, 6)**power
    return {
        '<left>': p[:, ::-1] if flip == 'yes' else p,
        'right': p.T[:5, :5].repeat(2, 1)[:, :6]}

def colours(red):
    p = np.random.default_rng(0).integers(0, 256, size=(3, 3, 4, 5)).astype(np.uint8)
    p[:, 0] = red
    return p  # a batch in torch's order

def waves_figure():
    return explore(
        waves, shift=[0, 0.5, 1], shape=['sine', 'cosine'], start={'shape': 'cosine'},
        title='Four & more waves', xlabel='x (rad)', ylabel='<height>', alt=ALT)

def roll_figure(**kw):
    axis = np.linspace(-2, 2, 11)
    return explore(
        roll, kind='path', lr=[0.1, 0.5, 0.9, 1.5], a=[-1.5, -0.5, 0.5, 1.5],
        b=[-1, 0, 1], start=dict(lr=0.5, a=-1.5, b=1), drag=['a', 'b'], step=True,
        surface=(axis, axis, axis[None] ** 2 + axis[:, None] ** 2), title='A bowl',
        labels=dict(a='start <a>'), alt=ALT, **kw)

def chain(w, b):
    "relu(2w + b)², with gradients; the first node has none"
    z, on = 2*w + b, 2*w + b > 0
    a = max(z, 0)
    return {'<two>': 2, 'w': (w, 4*a*on), 'b': (b, 2*a*on), 'sum': (z, 2*a*on),
            'relu': (a, 2*a), 'L': (a*a, 1)}

PLACES = {'<two>': (0, 0), 'w': (0, 1), 'b': (0, 2), 'sum': (1, 1), 'relu': (2, 1),
          'L': (2, 2)}
ARROWS = [('<two>', 'sum'), ('w', 'sum'), ('b', 'sum'), ('sum', 'relu'), ('relu', 'L')]

def graph_figure(fn=chain, nodes=PLACES, arrows=ARROWS, **kw):
    ranges = dict(w=[-1, -0.5, 0, 0.5, 1], b=[-0.1, 0.1, 1/3])
    return explore(
        fn, kind='graph', graph=dict(nodes=nodes, arrows=arrows), title='A chain',
        alt=ALT, start=dict(w=0.5), **{**ranges, **kw})

def figures():
    axis = np.linspace(-1, 1, 21)
    return [
        explore(
            cloud, kind='scatter', angle=[0, 0.5, 1], title='Clouds', xlabel='a',
            ylabel='b', alt=ALT),
        explore(
            tosses, kind='hist', n=[10, 100], way=['values', 'half'],
            start=dict(n=100, way='half'), n_bins=12, xlabel='value', ylabel='count',
            alt=ALT),
        explore(
            hill, kind='heat', width=[0.5, 1, 2], tilt=[0, 0.5],
            start=dict(width=1, tilt=0.5), xlog=True, xlabel='rate', ylabel='<b>',
            zlabel='height (m)', shades=17, alt=ALT),
        explore(
            greys, kind='image', power=[1, 2, 0.5], flip=['no', 'yes'], title='Greys',
            alt=ALT),
        explore(colours, kind='image', red=[0, 99, 200], ncols=2, alt=ALT),
        waves_figure(),
        roll_figure(),
        explore(
            spiral, kind='path', turn=[1, 3, 6, 9], start=3, step=True,
            surface=(axis, axis, axis[None] ** 2 + axis[:, None] ** 2), xlabel='a',
            ylabel='b', alt=ALT),
        explore(
            steep, rate=[0.01, 0.1, 1], xlog=True, ylim=(0, 5), dots=['noise'],
            xlabel='rate', ylabel='loss', alt=ALT),
        graph_figure(),
    ]

def as_page(body, dark=False):
    colours = (
        'background:#181a1f;color:#dcdfe4' if dark else 'background:#fff;color:#222'
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width"><title>t</title>'
        '<link rel="icon" '
        f'href="data:,"><style>body{{margin:8px;{colours}}}</style><body>{body}')

def stored_figures(path, mark='/*data*/'):
    """HTML of the interactive figures stored in a notebook; those of `predict` have
    another mark"""
    nb = json.loads(path.read_text(encoding='utf-8'))
    html = (
        ''.join(o.get('data', {}).get('text/html', '')) for c in nb['cells']
        for o in c.get('outputs', ()))
    return [h for h in html if mark in h]


# ---- what explore refuses ------------------------------------------------------------

def line(a): return {'y': [0., a]}
def two_lengths(a): return {'y': np.ones(a)}
def two_names(a): return {f'y{a}': [0., 1.]}
def two_values(a): return {f'y{a}': a}
def only_nan(a): return {'y': [np.nan, np.nan]}
def five(a): return {str(i): [0, a] for i in range(5)}
def bare(a): return [0, a]
def torn(a): return {'y': (np.arange(3), np.arange(4))}
def negative(a): return {'y': [-1, -a]}
def long_line(a): return {'y': np.arange(500.)*a}
def one_picture(a): return [np.full((2, 3), a)]
def strips(a):
    return np.random.default_rng(a).integers(0, 256, size=(4, 60, 60)).astype(np.uint8)
def labelled(a): return {f'a long label {i}': np.ones((2, 2)) for i in range(6)}
def matrix(a): return np.full((2, 3), a, dtype=float)
def other_x(a): return [0, a], [0, 1], np.eye(2)
def falling(a): return [1, 0], [0, 1], np.eye(2)

@pytest.mark.parametrize(
    'message, make',
    [
        (
            "unknown kind 'lin': did you mean 'line'",
            lambda: explore(line, kind='lin', alt=ALT, a=[1])),
        ('too short', lambda: explore(line, alt='line', a=[1])),
        ('too short', lambda: explore(line, alt=None, a=[1])),
        ('no parameters', lambda: explore(line, alt=ALT)),
        ('a has an empty range', lambda: explore(line, alt=ALT, a=[])),
        ('list of values', lambda: explore(line, alt=ALT, a=0.5)),
        ('a value twice', lambda: explore(line, alt=ALT, a=[1, 1])),
        (
            'not on its grid: use one of 1, 2',
            lambda: explore(line, alt=ALT, a=[1, 2], start=1.5)),
        ("start names ['b']", lambda: explore(line, alt=ALT, a=[1, 2], start={'b': 1})),
        (
            'write start=dict(',
            lambda: explore(waves, alt=ALT, shift=[0, 1], shape=['sine'], start=0)),
        (
            'only_nan(a=1): \'y\' holds no finite point',
            lambda: explore(only_nan, alt=ALT, a=[1])),
        ('same series and lengths', lambda: explore(two_lengths, alt=ALT, a=[1, 2])),
        ('same series and lengths', lambda: explore(two_names, alt=ALT, a=[1, 2])),
        ('1 to 4 series', lambda: explore(five, alt=ALT, a=[1])),
        ('must return a dict', lambda: explore(bare, alt=ALT, a=[1])),
        ('equally long', lambda: explore(torn, alt=ALT, a=[1])),
        (
            'ylog=True needs positive',
            lambda: explore(negative, alt=ALT, a=[1], ylog=True)),
        ('low < high', lambda: explore(line, alt=ALT, a=[1], ylim=(1, 0))),
        (
            "dots=['z'] names no series",
            lambda: explore(line, alt=ALT, a=[1], dots=['z'])),
        ('shape (T, 2)', lambda: explore(line, kind='path', alt=ALT, a=[1])),
        ("step=True needs kind='path'", lambda: explore(line, alt=ALT, step=True)),
        ('1001 frames are too many', lambda: explore(line, alt=ALT, a=range(1001))),
        (
            'thin a range (a has 100 values)',
            lambda: explore(long_line, alt=ALT, a=range(100))),
        ('named function', lambda: explore(lambda a: a, alt=ALT, a=[1])),
        ("did you mean 'heat'", lambda: explore(matrix, kind='heart', alt=ALT, a=[1])),
        (
            "n_bins=5 needs kind='hist', not 'line'",
            lambda: explore(line, alt=ALT, a=[1], n_bins=5)),
        (
            "xlim=(0, 1) needs kind='line' or 'path' or 'scatter' or 'hist', not "
            "'image'",
            lambda: explore(one_picture, kind='image', alt=ALT, a=[1], xlim=(0, 1))),
        (
            'from 0 to 2, not from 0 to 1: undo the normalisation',
            lambda: explore(one_picture, kind='image', alt=ALT, a=[0, 2.0])),
        (
            "labels names 'c', which is no parameter: they are ['a']",
            lambda: explore(line, alt=ALT, a=[1], labels=dict(c='sea'))),
        (
            "drag names 'c', which is no parameter",
            lambda: explore(spiral, kind='path', alt=ALT, turn=[1, 2], drag='c')),
        (
            "drag=['a'] needs kind='path', not 'line'",
            lambda: explore(line, alt=ALT, a=[1], drag=['a'])),
        (
            'shades=300 must be from 2 to 256',
            lambda: explore(one_picture, kind='image', alt=ALT, a=[1], shades=300)),
        (
            'return smaller or fewer pictures, or set shades',
            lambda: explore(strips, kind='image', alt=ALT, a=range(10))),
        (
            "label 'a long label 0' is too long for 6 pictures in a row: at most 9 "
            "letters", lambda: explore(labelled, kind='image', alt=ALT, a=[1])),
        (
            "picture 0 must be (H, W)",
            lambda: explore(bare, kind='image', alt=ALT, a=[1])),
        (
            'matrix(a=nan) holds no finite value',
            lambda: explore(matrix, kind='heat', alt=ALT, a=[1, np.nan])),
        (
            'zlog=True needs positive z',
            lambda: explore(matrix, kind='heat', alt=ALT, a=[-1, -2], zlog=True)),
        (
            'x of a heat map must be the same',
            lambda: explore(other_x, kind='heat', alt=ALT, a=[1, 2])),
        (
            'x of a heat map must rise in even steps',
            lambda: explore(falling, kind='heat', alt=ALT, a=[1])),
        (
            'must return a matrix or (x, y, z), not shape (2,)',
            lambda: explore(bare, kind='heat', alt=ALT, a=[1])),
        (
            "'y': (edges, counts) needs rising edges",
            lambda: explore(torn, kind='hist', alt=ALT, a=[1])),
        ('no finite point', lambda: explore(only_nan, kind='hist', alt=ALT, a=[1])),
        ("needs graph=dict(nodes={name: (column, row)}, arrows=[(from, to), …]), not "
         "None", lambda: explore(chain, kind='graph', alt=ALT, w=[1], b=[1])),
        ("graph={'nodes': {}} needs kind='graph', not 'line'",
         lambda: explore(line, alt=ALT, a=[1], graph=dict(nodes={}))),
        ("the arrow ('w', 'W') must join two different nodes of ['<two>', 'w',",
         lambda: graph_figure(arrows=[*ARROWS, ('w', 'W')])),
        ("the arrow ('w', 'w') must join", lambda: graph_figure(arrows=[('w', 'w')])),
        ("nodes 'w' and 'b' overlap: place them 1 apart",
         lambda: graph_figure(nodes={**PLACES, 'b': (0.5, 1.5)})),
        ("more than 5 columns are too small on a phone",
         lambda: graph_figure(nodes={**PLACES, 'L': (4.5, 2)})),
        ("node 'a long name' needs a name of 1 to 9 letters",
         lambda: graph_figure(nodes={**PLACES, 'a long name': (2, 0)})),
        ("node 'L' has no place in graph", lambda: graph_figure(
            nodes={k: v for k, v in PLACES.items() if k != 'L'}, arrows=ARROWS[:-1])),
        ("node 'c' has a place, but no value",
         lambda: graph_figure(nodes={**PLACES, 'c': (1, 2)})),
        ("must return a dict {node: (value, gradient)} or {node: value}, not [0, 1]",
         lambda: explore(
             bare, kind='graph', graph=dict(nodes=PLACES, arrows=[]), alt=ALT, a=[1])),
        ("only_nan(a=1): node 'y' needs a finite number or (value, gradient), not [nan",
         lambda: explore(only_nan, kind='graph', graph=dict(nodes=PLACES, arrows=[]),
                         alt=ALT, a=[1])),
        ('must return the same nodes in every frame: first',
         lambda: explore(two_values, kind='graph', alt=ALT, a=[1, 2], graph=dict(
             nodes={'y1': (0, 0)}, arrows=[]))),
    ],
)
def test_explore_refuses(message, make):
    with pytest.raises(ValueError, match=re.escape(message)): make()

def test_figures_are_deterministic_small_and_self_contained():
    for one,again in zip(figures(), figures()):
        assert one.to_html() == again.to_html()
        assert len(one.to_html()) < 60_000
        assert not _outside.search(one.to_html())
        assert not re.search(
            '<(wave|height|two|left|b)>', one.to_html())  # names are escaped
        check_frames(one)
        check_frames(one.to_html(), one.fn)
        assert figure_data(one.to_html()).series == one.data['series']

def test_check_frames_finds_drift():
    fig = explore(line, alt=ALT, a=[1, 2])
    with pytest.raises(ValueError, match='source of line changed'):
        check_frames(fig, bare)
    fig.data['series'][0]['y'][1] = fig.data['series'][0]['y'][0]
    with pytest.raises(ValueError, match='other frames'): check_frames(fig)

gain = 1.
def driven(a): return [0, 1], [0, 1], np.array([[0, 1], [a, gain]])
def driven_picture(a): return [np.array([[0, 1], [a, gain]])]
def driven_colour(a): return [np.full((2, 2, 3), [a, gain, 0.])]
def driven_bars(a): return np.array([a, gain, gain])

@pytest.mark.parametrize(
    'fn, kind',
    [
        (driven, 'heat'), (driven_picture, 'image'), (driven_colour, 'image'),
        (driven_bars, 'hist')],
)
def test_check_frames_finds_drift_of_other_code(fn, kind, monkeypatch):
    stored = explore(
        fn, kind=kind, a=[0, 0.5], shades=20 if kind == 'image' else None, alt=ALT
    ).to_html()
    check_frames(stored, fn)
    monkeypatch.setitem(globals(), 'gain', .999)
    if kind != 'hist':
        check_frames(stored, fn)  # rounding of the last shade is no drift
    monkeypatch.setitem(globals(), 'gain', .7)
    with pytest.raises(ValueError, match='other frames'): check_frames(stored, fn)

def driven_graph(a): return {'y': (a*gain, 0), 'z': 1}

def test_check_frames_finds_drift_of_a_graph(monkeypatch):
    places = dict(nodes={'y': (0, 0), 'z': (1, 0)}, arrows=[('y', 'z')])
    stored = explore(
        driven_graph, kind='graph', a=[0, 0.5], graph=places, alt=ALT).to_html()
    check_frames(stored, driven_graph)
    monkeypatch.setitem(globals(), 'gain', .999)
    check_frames(stored, driven_graph)
    for drift in (.97, -1):
        monkeypatch.setitem(globals(), 'gain', drift)
        with pytest.raises(ValueError, match=r'other frames .*\(numbers\)'):
            check_frames(stored, driven_graph)

def test_only_a_graph_carries_its_script():
    other = waves_figure().to_html()
    assert 'graph' not in other and 'numbersAt' in graph_figure().to_html()
    assert 'function paths' not in graph_figure().to_html()

def test_same_tile_is_stored_once():
    def still(a): return [np.ones((4, 4)), np.zeros((4, 4))]
    fig = explore(still, kind='image', a=range(50), alt=ALT)
    assert fig.data['series'][0]['cells'] == ['AAAB'] and len(fig.to_html()) < 10_000

def test_same_frame_is_stored_once():
    rng = np.random.default_rng(0)
    words = [_encode(rng.integers(0, 4096, 40)) for _ in range(5)]
    mixed = [words[i] for i in rng.integers(0, 5, 99)]
    for texts in (words, words[:1]*9, words*20, mixed):
        thin = _thin(texts)
        assert [_thick(thin)[i if len(_thick(thin)) > 1 else 0]
                for i in range(len(texts))] == texts
        assert len(json.dumps(thin)) <= len(json.dumps(texts))
    assert _thin(words) == words and set(_thin(words*20)) == {'texts', 'which'}
    def two(a, b): return {'moves': np.arange(60.)*(a + 9*b), 'rests': np.arange(60.)*a}
    fig = explore(two, a=[1, 2], b=list(range(1, 20)), alt=ALT)
    assert fig.to_html().count('"texts":["') == 3  # the words of a and b, and `rests`
    assert figure_data(fig.to_html()).series == fig.data['series']
    check_frames(fig.to_html(), two)

def test_true_and_false_are_values():
    def flip(a, up): return {'y': [0, a if up else -a]}
    fig = explore(flip, a=[1, 2, 3, 4], up=[False, True], start=dict(up=True), alt=ALT)
    assert fig.data['params'][1]['texts'] == ['False', 'True'] and fig.start == [0, 1]
    check_frames(fig.to_html(), flip)

def test_labels_say_words():
    def f(lr, beta, my_own, lrλ, at): return {'y': [lr, beta]}
    html = explore(
        f, lr=[1, 2, 3, 4], beta=[1, 2, 3, 4], my_own=[1, 2], lrλ=[1],
        at=['here', 'there & back'], labels=dict(at='<place>'), alt=ALT).to_html()
    said = re.findall(r'<label for="[^"]*">(.*?)</label>|<span id="[^"]*">(.*?)</span>',
                      html)
    assert [a or b for a, b in said] == [
        'learning rate lr', 'decay β', 'my own', 'lrλ', '&lt;place&gt;']
    assert html.count('type="radio"') == 4 and 'there &amp; back</label>' in html

@pytest.mark.parametrize('values, buttons', [
    ([1], False), ([1, 2], True), ([1, 2, 3], True), ([1, 2, 3, 4], False),
    (['one', 'two', 'three', 'four'], True), (['.1', '.2', '.3', '.4'], False),
    (list('abcdefg'), False)])
def test_few_values_are_buttons(values, buttons):
    def g(a): return {'y': [0., 1.]}
    html = explore(g, a=values, alt=ALT).to_html()
    assert ('type="radio"' in html) == buttons != ('type="range"' in html)

def test_one_colour_bar_for_all_frames():
    fig = next(f for f in figures() if f.fn is hill)
    assert fig.data['zlim'] == [
        min(np.nanmin(hill(w, t)[2]) for w in (0.5, 1, 2) for t in (0, 0.5)),
        max(np.nanmax(hill(w, t)[2]) for w in (0.5, 1, 2) for t in (0, 0.5))]
    assert (
        'height (m)' in fig.to_html() and fig.to_html().count('data:image/png') == 2
    )  # the tiles and the bar

def test_live_view_of_tiles():
    pytest.importorskip('ipywidgets')
    fig = next(f for f in figures() if f.fn is greys)
    view, power, flip = fig.widget().children
    assert [power.description, flip.description] == ['power', 'flip']
    before = view.value
    flip.value = 1
    assert view.value != before and 'data:image/png' in view.value

def says(code):
    "What a fresh interpreter prints"
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return done.stdout.strip()

HEAVY = 'torch', 'matplotlib', 'ipywidgets', 'nbclient', 'nbdev', 'IPython', 'nbformat'

def test_only_python_and_numpy_are_loaded():
    imports = 'import sys, nntrain.explore, nntrain.prediction\n'
    assert says(imports + f'print(sorted({set(HEAVY)} & set(sys.modules)))') == '[]'

def test_works_without_nbdev():
    code = """
import sys
for m in ('nbdev', 'execnb', 'nbclient', 'nbformat', 'ipywidgets'):
    sys.modules[m] = None
import nntrain.site
from nntrain.explore import explore
def f(a): return {'y': [0, a]}
print('/*data*/' in explore(f, a=[1, 2], alt='A line that moves').to_html())
"""
    assert says(code) == 'True'

def test_live_kernel_shows_the_widget(tmp_path, monkeypatch):
    nbformat, nbclient = map(pytest.importorskip, ('nbformat', 'nbclient'))
    pytest.importorskip('ipykernel', reason='needs a kernel')
    pytest.importorskip('ipywidgets')
    monkeypatch.delenv('NNTRAIN_STATIC', raising=False)
    source = (
        "from nntrain.explore import explore\ndef f(a): return {'y': [0, a]}\n"
        "explore(f, a=[1, 2], alt='A line that moves with its slider')")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(
        nb, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}
    ).execute()
    assert {
        'text/html', 'text/plain',
        'application/vnd.jupyter.widget-view+json'} <= set(nb.cells[0].outputs[0].data)


# ---- the files for the browser -------------------------------------------------------

WEB = sorted(p.name for p in (NBS/'figures').iterdir())
SCRIPTS = [name for name in WEB if name.endswith('.js')]

def test_the_package_carries_the_files_of_the_notebook():
    assert SCRIPTS and WEB == sorted(p.name for p in (ROOT/'nntrain/web').iterdir())
    for name in WEB:
        assert _web(name) == (NBS/'figures'/name).read_text(encoding='utf-8'), name
    ours = {*_EXPLORE_JS, *_PREDICT_JS, *_DRAG_JS, *_GRAPH_JS, *_TAPE_JS, *_DRAW_JS}
    pages = {'cards.js', 'symbols.js', 'xray.js'}    # of whole pages, not of a figure
    assert set(SCRIPTS) == ours | pages
    assert 'pointerdown' in roll_figure().to_html()
    assert 'pointerdown' not in waves_figure().to_html()  # only where it is needed

def test_sync_copies_the_files(tmp_path):
    shutil.copytree(NBS/'figures', tmp_path/'nbs/figures')
    (tmp_path/'nntrain').mkdir()
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/name, tmp_path)
    nntrain_sync(root=tmp_path)
    assert sorted(p.name for p in (tmp_path/'nntrain/web').iterdir()) == WEB
    nntrain_sync(check=True, root=tmp_path)
    (tmp_path/'nntrain/web'/WEB[0]).write_text('old')
    with pytest.raises(SystemExit): nntrain_sync(check=True, root=tmp_path)

@pytest.mark.parametrize('name', WEB)
def test_browser_files_can_be_read(name):
    text = _web(name)
    comment = '// ' if name.endswith('.js') else '/* '
    assert text.startswith(comment), 'say in a comment what the file does'
    assert max(map(len, text.splitlines())) <= 88 and '\t' not in text
    if name.endswith('.js'):  # _squeeze_js knows no other comments
        code = re.sub(r'^ *//.*', '', text, flags=re.M)
        assert not re.search(r'//|/\*|`', code)

def test_the_notebook_shows_the_files_as_they_are():
    nb = json.loads((NBS/'92_figures.ipynb').read_text(encoding='utf-8'))
    shown = ''.join(
        ''.join(o.get('data', {}).get('text/markdown', ''))
        for c in nb['cells'] for o in c.get('outputs', ()))
    for name in ('numbers.js', 'paths.js', 'explore.js', 'predict.js', 'graph.js'):
        assert _web(name) in shown, f'{name} changed: run nntrain_execute'

def test_squeezed_files_lose_nothing_but_comments_and_blanks():
    for name in WEB:
        text = _web(name)
        if name.endswith('.js'):
            short, text = _squeeze_js(text), re.sub(r'^ *//.*', '', text, flags=re.M)
        else:
            short, text = _squeeze_css(text), re.sub(r'/\*.*?\*/', '', text, flags=re.S)
        assert ''.join(short.split()) == ''.join(text.split()), name

@pytest.fixture
def javascript():
    "javascript(names, code, squeeze=False) -> the value of `code` after these files"
    node = shutil.which('node')
    if not node: pytest.skip('needs node')
    def go(names, code, squeeze=False):
        files = [_squeeze_js(_web(n)) if squeeze else _web(n) for n in names]
        text = '\n'.join([*files, f'console.log(JSON.stringify({code}))'])
        done = subprocess.run([node, '-'], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return go

RULES = {
    r'\bvar\b': 'const or let', r'[^=!]==[^=]|!=[^=]': '=== or !==',
    # a wait only for a function that has a name
    r'\beval\b|\bFunction\(|setTimeout\((?!\w+, \d)': 'no code from text',
    r'(inn|out)erHTML|insertAdjacent|document\.write': 'textContent: names are text',
    r'\bconsole\b|\balert\b|\bprompt\b|\bdebugger\b': 'left from a search for a bug',
    r'\bfetch\b|XMLHttp|\bimport\b|https?:': 'asks another site',
    r'[^\n]{89,}': 'a line of at most 88 characters', r' +$': 'blanks at the end',
    r'^(?:  )* [^ ]': 'indent by two', r'\)\{': 'blank before {',
    r'''^( *)(?!if|for|else|while)[^\n]*[\w\])']\n(?!\1 )''': 'a semicolon',
}

def lint(text):
    "What our rules say against a script"
    code = re.sub(r"'[^'\n]*'", "''", re.sub('^ *//.*\n', '', text + '\n', flags=re.M))
    bad = [f'{why}: {hit[0].strip()[:40]}' for rule, why in RULES.items()
           if (hit := re.search(rule, code, re.M))]
    for name in re.findall(r'\b(?:const|let|function) (\w+)', code):
        if name not in ONCE and len(re.findall(rf'\b{name}\b', code)) < 2:
            bad.append(f'{name} is never used')
    bodies = re.findall(r'^(?:async )?function (\w+)(.*?)^\}', text, re.M | re.S)
    for name, body in bodies:
        if body.count('\n') > 80: bad.append(f'{name} is longer than a screen')
    said = re.findall(r'^(.*)\n(?:async )?function (\w+)', '\n' + text, re.M)
    return bad + [f'say in a comment what {name} does' for before, name in said
                  if not before.startswith('//')]

# called by Python or by another file
ONCE = {'explore', 'graph', 'predict', 'tape', 'once', 'inFrame', 'paths', 'toHash',
        'fromHash', 'drag', 'place', 'LOW', 'SPAN', 'GAP', 'bytesOf', 'readNetwork',
        'softmax', 'levelsOf', 'fitted', 'asItIs', 'inside', 'inkOf', 'drawingPad',
        'followPointer', 'followKeys', 'showMaps', 'showBars', 'inWords', 'showFalls',
        'drawing', 'startCards', 'startSymbols', 'xray'}

@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_keep_the_rules(name): assert lint(_web(name)) == []

@pytest.mark.parametrize('bad', [
    'var a = 1;\na();', 'if (a == 1) b();', 'e.innerHTML = a;', 'console.log(1);',
    'f();  ', '   f();', 'const a = 1;', 'f()', 'function f() {\n}', "fetch('a');",
    f"f({'1' * 90});", 'if (a){ b(); }'])
def test_lint_can_fail(bad): assert lint(bad)

@pytest.mark.parametrize('name', SCRIPTS)
@pytest.mark.parametrize('squeeze', [False, True])
def test_syntax(javascript, name, squeeze):
    assert javascript([name], '1', squeeze) == 1  # nothing runs before it is called

def test_syntax_check_can_fail(javascript):
    with pytest.raises(AssertionError, match='SyntaxError'): javascript([], '1 +')

def test_numbers_in_javascript(javascript):
    codes = np.random.default_rng(0).integers(0, 4096, 200)
    text = _encode(codes)
    assert javascript(['numbers.js'], f"decode('{text}')") == codes.tolist()
    assert javascript(['numbers.js'], "[LOW, SPAN, GAP]") == [_LO, _SPAN, _GAP]
    assert javascript(['numbers.js'], "[0, 1].map(f => inFrame(['AA', 'AB'], f))") == [
        [0], [1]]
    assert javascript(['numbers.js'], "inFrame(['AB'], 7)") == [1]  # the same in all
    thin = _thin(['AAAAAAAA', 'ABABABAB']*9)
    assert javascript(['numbers.js'], f'inFrame({json.dumps(thin)}, 3)') == [1]*4

@pytest.mark.parametrize('kind', ['line', 'path', 'scatter'])
def test_paths_in_javascript(javascript, kind):
    "A path by JavaScript is the path by Python, with gaps, markers and a step slider"
    points = np.random.default_rng(0).normal(size=(3, 30, 2))
    points[1, 5] = np.nan
    dots = ['y'] if kind == 'scatter' else []
    data = dict(kind=kind, limits=[-1, 1, -2, 2], dots=dots, log=(0, 0))
    (s,) = _pack_lines([{'y': tuple(p.T)} for p in points], data)
    box = [1000, 420, 3, 2]
    for frame in range(3):
        for n in (1, 7, 30):
            drawn = javascript(
                ['numbers.js', 'paths.js'],
                f'paths({json.dumps(s)}, {frame}, {n}, {box})', squeeze=True)
            assert drawn == list(_paths(s, frame, n, box[2:]))

def test_graph_in_javascript(javascript):
    "The numbers of a frame and their sentence, as Python writes them"
    (s,) = graph_figure().data['series']
    thin, names = json.dumps({**s, 'x': _thin(s['x'])}), ['numbers.js', 'graph.js']
    for frame in (0, 7, 14):
        code = f'[numbersAt({thin}, {frame}), told({thin}, {frame})]'
        numbers, told = javascript(names, code, squeeze=True)
        assert numbers == _numbers_at(s, frame)
        assert ' Now: ' + told == _told(s, frame)
    assert _told(s, 14) == (  # w = 1, b = 1/3
        ' Now: <two> 2; w 1, gradient 9.33; b 0.333, gradient 4.67; sum 2.33, gradient '
        '4.67; relu 2.33, gradient 4.67; L 5.44, gradient 1.')

def test_address_in_javascript(javascript):
    params = json.dumps([
        dict(name='beta', texts=['0', '0.5', '0.9']),
        dict(name='shape', texts=['sine', 'cosine'])])
    def at(hash):
        return javascript(['address.js'], f"fromHash('{hash}', 'f', {params})")
    hash = javascript(['address.js'], f"toHash('f', {params}, [1, 0])")
    assert hash == '#f--beta_0_5--shape_sine' and at(hash) == [1, 0]
    assert at('#f--shape_cosine') == [-1, 1]  # what is not named stays where it is
    assert at('#other--shape_cosine') is None and at('') is None

def test_frame_in_javascript(javascript):
    sizes = [2, 3, 5]
    params = [dict(texts=['x']*n, step=0) for n in sizes]
    params.append(dict(texts=['x']*9, step=1))
    for i, at in enumerate(np.ndindex(*sizes)):
        code = f'frameAt({json.dumps(params)}, {[*at, 4]})'
        if i % 7 == 0: assert javascript(['explore.js'], code) == [i, 5]
    assert javascript(['explore.js'], 'frameAt([], [])[1] === Infinity')

def test_nearest_start_in_javascript(javascript):
    "For a point of the picture: the computed start that is nearest"
    fig = roll_figure()
    grid, box = {n: v for n, v, _ in fig.grid}, fig.data['box']
    low, high, bottom, top = fig.data['limits']
    for a, b in ((-1.4, .9), (0.1, -0.1), (3, 3), (-9, .4)):
        x = box[0] + box[2]*_SPAN*(a - low)/(high - low)
        y = box[1] + box[3]*_SPAN*(top - b)/(top - bottom)
        wide, high_ = box[2]/(high - low), box[3]/(top - bottom)
        i, j = min(
            np.ndindex(4, 3), key=lambda ij: np.hypot(
                wide*(grid['a'][ij[0]] - a), high_*(grid['b'][ij[1]] - b)))
        code = f'nearest({json.dumps(fig.data)}, [2, 0, 0, 5], {x}, {y})'
        names = ['numbers.js', 'drag.js', 'explore.js']
        assert javascript(names, code, squeeze=True) == [2, i, j, 5]

def test_marks_in_javascript(javascript):
    assert javascript(['predict.js'], '[0, 1, 2].map(i => markOf(i, 2, 0))') == [
        '✓ this one', '', '✗ your pick']
    assert javascript(['predict.js'], '[0, 1].map(i => markOf(i, 1, 1))') == [
        '', '✓ this one']


# ---- predict -------------------------------------------------------------------------

UP, DOWN = '<up> & away', 'down'

def question(n=3, **kw):
    x = np.linspace(0, 1, 30)
    options = dict(
        list(
            {UP: (x, x), DOWN: (x, -x), 'flat': (x, 0 * x), 'late': (x, x**4)}.items()
        )[:n]
    )
    return predict(
        'Which <curve> is it?', options, DOWN, 'The sign is "minus" & stays.',
        remarks={UP: 'Look at the <sign>.'}, title='It falls', xlabel='x (s)',
        ylabel='<y>', alt='A straight line that falls from nought to minus one.',
        **{'given': {'seen': np.zeros(5)}, **kw})

@pytest.mark.parametrize(
    'message, make',
    [
        (
            '2 to 4 curves {label: y or (x, y)}, not dict of 1',
            lambda: predict('q', {'a': [0, 1]}, 'a', 'w', alt=ALT)),
        (
            '2 to 4 curves {label: y or (x, y)}, not list',
            lambda: predict('q', [[0, 1], [1, 0]], 'a', 'w', alt=ALT)),
        (
            'not dict of 5',
            lambda: predict('q', {str(i): [0, i] for i in range(5)}, '1', 'w', alt=ALT),
        ),
        (
            "answer='dwn' is not one of the options: did you mean 'down'",
            lambda: predict('q', {DOWN: [1, 0], UP: [0, 1]}, 'dwn', 'w', alt=ALT)),
        (
            'too short',
            lambda: predict('q', {DOWN: [1, 0], UP: [0, 1]}, DOWN, 'w', alt='')),
        (
            'need words',
            lambda: predict(' ', {DOWN: [1, 0], UP: [0, 1]}, DOWN, 'w', alt=ALT)),
        (
            'no finite point',
            lambda: predict('q', {DOWN: [1, 0], UP: [np.nan] * 2}, DOWN, 'w', alt=ALT)),
        (
            'at least two finite points',
            lambda: predict('q', {DOWN: [1, 0], UP: [1, np.nan]}, DOWN, 'w', alt=ALT)),
        (
            'equally long',
            lambda: predict(
                'q', {DOWN: [1, 0], UP: (np.arange(2), np.arange(3))}, DOWN, 'w',
                alt=ALT)),
        (
            'the same curve',
            lambda: predict('q', {DOWN: [1, 0], UP: [1, 0]}, DOWN, 'w', alt=ALT)),
        ('low < high', lambda: question(ylim=(1, 0))),
        (
            'positive y',
            lambda: predict(
                'q', {DOWN: [-1, 0], UP: [-2, -1]}, DOWN, 'w', alt=ALT, ylog=True)),
        (
            'at most 60): give curves of fewer points (4000 now)',
            lambda: predict(
                'q', {DOWN: -np.arange(4000), UP: np.arange(4000)}, DOWN, 'w', alt=ALT),
        ),
    ],
)
def test_predict_refuses(message, make):
    with pytest.raises(ValueError, match=re.escape(message)): make()

def test_prediction_is_deterministic_small_and_self_contained():
    html = question().to_html()
    assert (
        html == question().to_html() and len(html) < 20_000
        and not _outside.search(html))
    assert (
        '<up>' not in html and '<curve>' not in html and '<sign>' not in html
        and '<y>' not in html)  # what the author writes is text
    text = question()._repr_mimebundle_()['text/plain']
    assert text.splitlines() == [
        'Which <curve> is it?', f'- {UP}', '- down', '- flat',
        "Pick one: .check('…') answers."]


# ---- in a browser --------------------------------------------------------------------

@pytest.fixture(scope='module')   # two at the same time in one process do not work
def browser():
    with start_browser() as b: yield b

@pytest.fixture
def open_page(browser, tmp_path):
    """open_page(html, …) -> page; `page.problems` lists console errors, exceptions and
    requests to anybody else"""
    contexts = []
    def go(html, width=800, hash='', **kw):
        context = browser.new_context(viewport=dict(width=width, height=900), **kw)
        contexts.append(context)
        page = context.new_page()
        page.problems = []
        page.on(
            'console',
            lambda m: (
                page.problems.append(f'console {m.type}: {m.text}')
                if m.type in ('error', 'warning') else None))
        page.on('pageerror', lambda e: page.problems.append(f'exception: {e}'))
        def route(r):
            if r.request.url.startswith('file:'): return r.continue_()
            page.problems.append(f'request: {r.request.url}')
            r.abort()
        page.route('**/*', route)
        (tmp_path/'page.html').write_text(html, encoding='utf-8')
        page.goto((tmp_path/'page.html').as_uri()+hash)
        return page
    yield go
    for c in contexts: c.close()

# lines and markers; which tile stands in a window; numbers
LOOK = (
    '[...f.querySelectorAll(".sr, .nnx-i, .nnx-u")].map(p => p.getAttribute("d") ?? '
    'p.getAttribute("y") ?? p.textContent)')

def drawn(page):
    return page.evaluate('() => { const f = document; return ' + LOOK + '}')

def slider_problems(page):
    """Move every slider by keyboard; each must have a name, change its own picture and
    say its value"""
    bad = []
    for i in range(page.locator('input[type=range]').count()):
        s = page.locator('input[type=range]').nth(i)
        name = s.evaluate(
            'e => (e.labels[0] || {}).textContent || e.getAttribute("aria-label")')
        if not name: bad.append(f'slider {i} has no name')
        figure = s.locator(
            'xpath=ancestor::*[contains(concat(" ", @class, " "), " nnx ")]')
        look = lambda: (
            figure.first.evaluate('f => ' + LOOK + '.join()') if figure.count()
            else page.locator('svg').first.inner_html())
        start, last = s.evaluate('e => [e.value, e.value == e.max]')
        if s.get_attribute('max') == '0': continue
        before, value = look(), s.get_attribute('aria-valuetext')
        s.focus()
        page.keyboard.press('Home' if last else 'End')
        if look() == before: bad.append(f'slider {name} does not change the picture')
        if s.get_attribute('aria-valuetext') == value:
            bad.append(f'slider {name} does not say its value')
        s.evaluate(
            '(e, v) => { e.value = v; e.dispatchEvent(new Event("input", {bubbles: '
            'true})) }', start)  # others may need this one where it was
    return bad

def choice_problems(page):
    """Move every group of buttons by keyboard; each must have a name and change its
    own picture"""
    bad, groups = [], page.get_by_role('radiogroup')
    for group in groups.all():
        name = group.evaluate(
            'g => document.getElementById(g.getAttribute("aria-labelledby"))'
            '.textContent.trim()')
        if not name: bad.append('a group without a name')
        look = lambda: group.evaluate(
            'g => { const f = g.closest(".nnx"); return ' + LOOK + '.join() }')
        before, first = look(), group.locator('input:checked')
        value = first.get_attribute('value')
        first.focus()
        page.keyboard.press('ArrowDown')
        if group.locator('input:checked').get_attribute('value') == value:
            bad.append(f'{name} cannot be chosen by keyboard')
        if look() == before: bad.append(f'{name} does not change the picture')
        group.locator(f'input[value="{value}"]').check()
    return bad

def test_browser_checks_can_fail(open_page):
    page = open_page(
        as_page(
            '<svg><path d="M0 0"/></svg><input type="range"><script '
            'src="https://cdn.example/x.js"></script><script>nothing()</script>'))
    assert len(slider_problems(page)) == 3
    assert any('request: https://cdn.example' in p for p in page.problems) and any(
        'nothing is not defined' in p for p in page.problems)

@pytest.mark.parametrize('width, dark', [(800, False), (800, True), (360, False)])
def test_sliders_move_by_keyboard(open_page, width, dark):
    page = open_page(as_page(''.join(f.to_html() for f in figures()), dark), width)
    assert slider_problems(page) == choice_problems(page) == page.problems == []
    assert page.evaluate('document.scrollingElement.scrollWidth') <= width, (
        'the page is wider than the screen')
    colours = page.eval_on_selector_all(
        '.nnx text', 'ts => [...new Set(ts.map(t => getComputedStyle(t).fill))]')
    assert colours == [page.evaluate('getComputedStyle(document.body).color')]
    small = page.eval_on_selector_all(
        '.nnx text', 'ts => Math.min(...ts.map(t => t.getBoundingClientRect().height))')
    assert small >= 9, f'text {small} pixels high'

@pytest.mark.parametrize('which', range(10))
def test_javascript_draws_what_python_draws(open_page, which):
    fig = figures()[which]
    page = open_page(as_page(fig.to_html()))
    params, scale = fig.data['params'], fig.data['box'][2:]
    for at in np.ndindex(*[min(len(p['texts']), 6) for p in params]):
        keys = [f"{fig.data['id']}-{p['name']}" for p in params]
        page.evaluate(
            '([keys, at]) => { const form = document.querySelector("form"); '
            'keys.forEach((k, i) => { form.elements[k].value = at[i] }); '
            'form.dispatchEvent(new Event("input")) }', [keys, list(map(int, at))])
        frame, n = 0, None
        for p,i in zip(params, at):
            if p['step']: n = i+1
            else: frame = frame*len(p['texts'])+i
        tile = lambda s: [
            str(-k * s['pitch'])
            for k in _decode(s['cells'][frame if len(s['cells']) > 1 else 0])]
        assert drawn(page) == [
            d for s in fig.data['series']
            for d in (tile(s) if 'cells' in s else _numbers_at(s, frame)
                      if 'texts' in s else _paths(s, frame, n, scale))]

def test_first_frame_needs_no_javascript(open_page):
    html = as_page(''.join(f.to_html() for f in figures()))
    without, with_js = open_page(html, java_script_enabled=False), open_page(html)
    assert [
        p.get_attribute('d') or p.get_attribute('y') or p.text_content()
        for p in without.locator('.sr, .nnx-i, .nnx-u').all()] == drawn(with_js)
    assert (
        not without.locator('.nnx-c').first.is_visible()
        and with_js.locator('.nnx-c').first.is_visible())

@pytest.mark.parametrize(
    'make, kind, dark',
    [(hill, 'heat', True), (greys, 'image', False), (colours, 'image', False)])
def test_pixels_of_tiles(open_page, make, kind, dark):
    "What the browser paints in the middle of every cell, after the slider has moved"
    Image = pytest.importorskip('PIL.Image', reason='reads the screenshot')
    fig = next(f for f in figures() if f.fn is make)
    page = open_page(as_page(fig.to_html(), dark), 800)
    page.locator('input').first.focus()
    while not page.locator('input').nth(len(fig.grid[0][1]) - 1).is_checked():
        page.keyboard.press('ArrowRight')
    values = {
        n: v[i]
        for (n, v, _), i in zip(fig.grid, [len(fig.grid[0][1]) - 1, *fig.start[1:]])}
    want = [v[-1] for v in _series(make(**values), kind, 'f()').values()]
    seen = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert('RGB')
    at = page.evaluate(
        '() => { const s = document.querySelector(".nnx-d > svg"), r = '
        's.getBoundingClientRect(); return [r.x, r.y, '
        'r.width/s.viewBox.baseVal.width] }')
    places = [
        (at[0] + x * at[2], at[1] + y * at[2], w * at[2], h * at[2])
        for x, y, w, h in _places(fig.data)]
    assert len(places) == len(want) and at[2] > .05
    palette = _palette('heat', 17)
    for (x, y, w, h), a in zip(places, want):
        if kind == 'heat': a = a[::-1]
        for i, j in np.ndindex(*a.shape[:2]):
            got = seen.getpixel(
                (
                    int(x + (j + 0.5) * w / a.shape[1]),
                    int(y + (i + 0.5) * h / a.shape[0])))
            if kind == 'heat':
                right = (
                    palette[
                        round(
                            float(
                                (a[i, j] - fig.data['zlim'][0])
                                / np.ptp(fig.data['zlim']) * 16))
                    ]
                    if np.isfinite(a[i, j])
                    else None
                )
            else:
                right = np.broadcast_to(a[i, j] * 255, 3)
            # an empty cell shows the dark page and the grid
            if right is None: assert np.ptp(got) < 12 and max(got) < 70
            else: assert np.abs(np.array(got)-right).max() <= 2, (i, j, got, right)

def test_names_for_a_screen_reader(open_page):
    page = open_page(as_page(waves_figure().to_html() + roll_figure().to_html()))
    assert page.get_by_role('img', name=ALT).count() == 2
    assert page.get_by_role('group', name='Four & more waves').count() == 1
    shape = page.get_by_role('radiogroup', name='shape')
    assert shape.get_by_role('radio', name='cosine', exact=True).is_checked()
    slider = page.get_by_role('slider', name='learning rate lr')
    assert slider.get_attribute('aria-valuetext') == '0.5'
    assert page.get_by_role('slider', name='start <a>').count() == 1
    assert page.locator('output').all_text_contents() == [
        '0.5', '-1.5', '5']  # an output is a live region
    for name in ('reset', 'copy link'):
        assert page.get_by_role('button', name=name).count() == 2

def state(page):
    "What stands at the controls of the first figure"
    return page.evaluate(
        '() => { const f = document.querySelector(".nnx form"); return [...f.elements]'
        '.filter(e => e.type == "range" || e.checked).map(e => e.type == "range" ? '
        'e.nextSibling.textContent : e.parentNode.textContent) }')

def light(h):  # how light a colour like #0072B2 is
    c = [int(h[i:i+2], 16)/255 for i in (1, 3, 5)]
    return np.dot(
        [0.2126, 0.7152, 0.0722],
        [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in c])

@pytest.mark.parametrize('width, dark', [(1280, False), (360, False), (360, True)])
def test_graph_in_a_browser(open_page, width, dark):
    fig = graph_figure()
    page = open_page(as_page(2*fig.to_html(), dark), width)
    first = page.locator('.nnx').first
    img, w = first.get_by_role('img'), first.get_by_role('slider', name='weight w')
    told = lambda frame: ALT + _told(fig.data['series'][0], frame)
    assert img.get_attribute('aria-label') == told(3*3)
    w.press('Home')  # the ReLU is off: nothing behind it has a gradient
    assert img.get_attribute('aria-label') == told(0) and (
        'w −1, gradient 0; b −0.1, gradient 0; sum −2.1, gradient 0;' in told(0))
    assert page.get_by_role('img').last.get_attribute('aria-label') == told(3*3)
    link = '#' + page.url.split('#')[1]
    first.get_by_role('button', name='reset').press('Enter')
    assert img.get_attribute('aria-label') == told(3*3)
    page.evaluate('h => { location.hash = h }', link)
    page.wait_for_function(
        'a => document.querySelector(".nnx-d>svg").ariaLabel === a', arg=told(0))
    boxes = page.evaluate("""[...document.querySelectorAll('.nnx:first-of-type rect')]
        .map(r => r.getBoundingClientRect().width)""")
    texts = page.evaluate("""[...document.querySelectorAll('.nnx:first-of-type text')]
        .map(t => t.getBoundingClientRect()).map(r => [r.width, r.height])""")
    assert len(boxes) == 6 and max(t for t, _ in texts) < min(boxes)
    assert min(h for _, h in texts) >= 12 and page.problems == []
    colours = page.eval_on_selector_all(
        '.nnx tspan:not(.nnx-u)', 'ts => [...new Set(ts.map(t => '
        'getComputedStyle(t).fill))]')
    assert len(colours) == 2
    ground = light('#181a1f' if dark else '#ffffff')
    for colour in colours:  # color(srgb r g b)
        parts = [float(v) for v in re.findall(r'[\d.]+', colour)]
        here = light('#' + ''.join(f'{round(255*v):02x}' for v in parts))
        low, high = sorted([here, ground])
        assert (high + .05)/(low + .05) >= 4.5, colour

def test_state_in_the_address(open_page):
    html = as_page(waves_figure().to_html())
    page = open_page(html)
    page.get_by_role('radio', name='0', exact=True).focus()
    page.keyboard.press('ArrowRight')
    hash = page.evaluate('location.hash')
    assert re.fullmatch(r'#[\w-]+--shift_0_5--shape_cosine', hash)
    again = open_page(html, hash=hash)
    assert state(again) == ['0.5', 'cosine'] and drawn(again) == drawn(page)
    assert state(open_page(html, hash='#elsewhere--shift_1')) == ['0', 'cosine']

def test_reset_and_link(open_page):
    html = as_page(roll_figure().to_html())
    page = open_page(html)
    page.context.grant_permissions(['clipboard-read', 'clipboard-write'])
    first, at_first = drawn(page), state(page)
    page.get_by_role('slider', name='start <a>').press('ArrowRight')
    page.get_by_role('radio', name='0', exact=True).check()
    moved, at = drawn(page), state(page)
    page.get_by_role('button', name='copy link').press('Enter')
    page.get_by_text('copied').wait_for()
    link = page.evaluate('navigator.clipboard.readText()')
    assert link == page.evaluate('location.href') and moved != first
    page.get_by_role('button', name='reset').press('Enter')
    assert drawn(page) == first and state(page) == at_first
    assert page.locator('.nnx-b span').text_content() == ''
    again = open_page(html, hash='#' + link.split('#')[1])
    assert drawn(again) == moved and state(again) == at
    again.get_by_role('button', name='reset').click()  # to the start, not to the link
    assert drawn(again) == first and page.problems == again.problems == []

def test_a_link_that_cannot_be_copied_is_shown(open_page):
    page = open_page(as_page(waves_figure().to_html()))
    page.evaluate('delete Navigator.prototype.clipboard')
    page.get_by_role('button', name='copy link').click()
    page.get_by_text('file:').wait_for()
    said = page.locator('.nnx-b span').text_content()
    assert said.startswith(page.url.split('#')[0] + '#nnx-waves-')
    assert page.evaluate('document.scrollingElement.scrollWidth') <= 800

def test_no_link_inside_of_a_notebook(open_page):
    import html
    inner = html.escape(as_page(waves_figure().to_html()))
    frame = f'<iframe title="t" width="700" height="800" srcdoc="{inner}"></iframe>'
    page = open_page(as_page(frame))
    figure = page.frame_locator('iframe')
    figure.get_by_role('radio', name='sine', exact=True).check()
    assert figure.get_by_role('button').all_text_contents() == ['reset']
    jupyter = '<script id="jupyter-config-data" type="application/json"></script>'
    page = open_page(as_page(jupyter + waves_figure().to_html()))
    page.get_by_role('radio', name='sine', exact=True).check()
    assert page.evaluate('location.hash') == '' == page.url.split('.html')[1]
    assert not page.get_by_role('button', name='copy link').is_visible()

def test_enter_leaves_the_page_alone(open_page):
    page = open_page(as_page(waves_figure().to_html()))
    page.evaluate('window.stays = 1')
    for role in ('radio', 'slider'):
        for control in page.get_by_role(role).all(): control.press('Enter')
    assert page.evaluate('window.stays') == 1 and '?' not in page.url

def test_the_same_figure_twice_moves_alone(open_page):
    page = open_page(as_page(2*waves_figure().to_html()))
    assert page.locator('input:checked').count() == 4
    half = 2*len(waves_figure().data['series'])
    before = drawn(page)
    page.get_by_role('radio', name='1', exact=True).first.check()
    after = drawn(page)
    assert before[half:] == after[half:] and before[:half] != after[:half]

@pytest.mark.parametrize('width, touch', [(800, False), (360, True)])
def test_drag_the_start(open_page, width, touch):
    page = open_page(as_page(roll_figure().to_html()), width, has_touch=touch)
    ring = page.locator('.nnx-g')
    def middle():
        box = ring.bounding_box()
        return box['x'] + box['width']/2, box['y'] + box['height']/2
    x, y = middle()
    assert ring.bounding_box()['width'] >= 20  # a finger finds it
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 3, y + 3)
    assert state(page)[1:3] == ['-1.5', '1']   # still the nearest
    wide = page.locator('.nnx-d>svg').bounding_box()['width']
    page.mouse.move(x + .55*wide, y + .3*wide)
    page.mouse.up()
    assert state(page)[1:3] == ['1.5', '-1']
    there = middle()
    assert abs(there[0] - x - .55*wide) < .15*wide and there[1] > y + .2*wide
    page.mouse.move(x, y)                      # let go: nothing follows
    assert middle() == there and page.problems == []
    fig = roll_figure()
    frame = 1*12 + 3*3 + 0
    assert drawn(page)[:2] == list(
        _paths(fig.data['series'][0], frame, None, fig.data['box'][2:]))
    assert page.evaluate('location.hash').endswith('--lr_0_5--a_1_5--b__1--step_5')

def test_letters_of_a_question_before_a_figure(open_page):
    "The style of the figure that follows leaves the small pictures their large letters"
    for width in (800, 360):
        html = question().to_html() + waves_figure().to_html()
        page = open_page(as_page(html), width)
        high = page.eval_on_selector_all(
            '.nnx-o text',
            'ts => Math.min(...ts.map(t => t.getBoundingClientRect().height))')
        assert high >= 9, high

@pytest.mark.parametrize(
    'width, dark, n',
    [(800, False, 2), (800, True, 3), (800, False, 4), (360, False, 3), (360, True, 4)])
def test_predict_by_keyboard(open_page, width, dark, n):
    page = open_page(as_page(question(n).to_html(), dark), width)
    says, picture = (
        page.get_by_role('status'),
        page.get_by_role('img', name='A straight line that falls'))
    assert (
        page.get_by_role('group', name='Which <curve> is it?').count() == 1
        and not picture.is_visible() and says.text_content() == '')
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.type') == 'radio'
    page.keyboard.press('Tab')
    page.keyboard.press('Enter')
    assert says.text_content() == 'Pick a curve first.' and not picture.is_visible()
    page.get_by_role('radio', name=UP).focus()
    page.keyboard.press('Space')
    page.keyboard.press('Tab')
    page.keyboard.press('Enter')
    assert (
        says.text_content()
        == f'Not “{UP}”. Look at the <sign>. It is “down”. The sign is "minus" & stays.'
        == str(question(n).check(UP)))
    assert (
        picture.is_visible()
        and page.get_by_role('radio', name=f'{UP} ✗ your pick').count()
        == page.get_by_role('radio', name='down ✓ this one').count() == 1)
    panels = page.eval_on_selector_all(
        '.nnx-o .sr', 'ps => ps.map(p => p.getAttribute("d"))')
    mine, _, truth, _ = page.eval_on_selector_all(
        'details .sr', 'ps => ps.map(p => p.getAttribute("d"))')
    assert [mine, truth] == panels[:2] and page.get_by_text(
        'your pick', exact=True).is_visible()
    page.get_by_role('radio', name=UP).focus()
    page.keyboard.press('ArrowDown')  # the browser's own way to pick the next one
    page.get_by_role('button', name='Check my pick').press('Enter')
    assert says.text_content() == 'Right: “down”. The sign is "minus" & stays.'
    assert (
        page.locator('.nnx-m').get_attribute('d') == ''
        and not page.locator('.nnx-k').is_visible()
        and page.get_by_role('radio', name=UP, exact=True).count() == 1)
    assert (
        page.problems == []
        and page.evaluate('document.scrollingElement.scrollWidth') <= width)
    colour = page.evaluate('getComputedStyle(document.body).color')
    assert page.eval_on_selector_all(
        '.nnx text', 'ts => [...new Set(ts.map(t => getComputedStyle(t).fill))]'
    ) == [colour]
    assert (
        page.locator('.nnx-o .sr').first.evaluate('p => getComputedStyle(p).stroke')
        == page.locator('.nnx button').evaluate('b => getComputedStyle(b).color')
        == colour)
    assert (
        page.eval_on_selector_all(
            '.nnx text',
            'ts => Math.min(...ts.map(t => t.getBoundingClientRect().height))')
        >= 9
    )

def test_predict_without_javascript_and_on_paper(open_page):
    html = as_page(question().to_html() + explore(line, a=[1, 2], alt=ALT).to_html())
    page = open_page(html, java_script_enabled=False)
    assert (
        page.locator('.nnx-o svg').count() == 3
        and page.locator('.nnx-o svg').first.is_visible())
    assert (
        not page.locator('input[type=radio]').first.is_visible()
        and not any(b.is_visible() for b in page.locator('button').all()))
    page.locator('summary').press('Enter')
    assert (
        page.get_by_text('The sign is "minus" & stays.').is_visible()
        and page.get_by_role('img', name='A straight line that falls').is_visible())
    page = open_page(html)
    page.emulate_media(media='print')
    assert (
        not page.locator('input[type=radio]').first.is_visible()
        and not any(b.is_visible() for b in page.locator('button').all())
        and page.locator('.nnx-o svg').first.is_visible())

def stripped(html):
    """What a viewer shows that does not trust the page: no styles, no scripts, and of a
    drawing only the words"""
    return re.sub(
        r'<(style|script)>.*?</\1>'
        r'|</?(svg|path|text|g|use|defs|image|clipPath|rect)\b[^>]*>',
        '',
        html,
        flags=re.S,
    )

def test_untrusted_figure_says_what_it_is(open_page):
    figure, asked = waves_figure(), question()
    text = open_page(as_page(stripped(figure.to_html() + asked.to_html()))).inner_text(
        'body')
    lines = text.split('\n\n')
    assert len(lines) == 2 and all(
        'Run this cell to see it' in line for line in lines), text
    assert figure.alt.rstrip('.') in lines[0] and asked.question in lines[1]
    text = open_page(as_page(figure.to_html() + asked.to_html())).inner_text('body')
    assert 'Run this cell' not in text and figure.title in text

def test_print_hides_the_sliders(open_page):
    page = open_page(as_page(waves_figure().to_html()))
    page.emulate_media(media='print')
    assert (
        not page.locator('.nnx-c').is_visible()
        and page.locator('.nnx svg').first.is_visible())

@pytest.mark.parametrize(
    'path', [p for p in sorted(NBS.glob('*.ipynb')) if stored_figures(p)],
    ids=lambda p: p.name)
def test_stored_figures(open_page, path):
    html = stored_figures(path)
    ids = [figure_data(h).id for h in html]
    assert len(set(ids)) == len(ids), (
        'the same figure twice on a page: its sliders share ids')
    page = open_page(as_page(''.join(html)), 360)
    assert slider_problems(page) == choice_problems(page) == page.problems == []
    assert page.evaluate('document.scrollingElement.scrollWidth') <= 360

# ---- stored figures take today's scripts without being executed ----------------------

@pytest.fixture(scope='module')
def tool(): return runpy.run_path(str(ROOT/'scripts/refresh_figures.py'))

def test_this_page_carries_todays_scripts(tool):
    path = NBS/'92_figures.ipynb'
    nb = json.loads(path.read_text(encoding='utf-8'))
    found = list(tool['refresh'](nb))
    assert len(found) == 8 and nb == json.loads(path.read_text(encoding='utf-8'))

def test_a_figure_made_again_from_itself(tool):
    "… is what its cell would store"
    source = "explore(roll, drag=['a', 'b'], labels=dict(a='start <a>'))"
    for fig in figures():
        html = fig.to_html()
        old = re.sub('<style>.*?</style>', '<style>.nnx{}</style>', html).replace(
            'function paths', 'function pfade')
        assert old != html == tool['refreshed'](old, source)
    html = question().to_html()
    old = html.replace('function once', 'function einmal')
    assert old != html == tool['refreshed'](old)

def test_a_figure_of_the_first_edition_made_again(tool):
    html, fig = waves_figure().to_html(), waves_figure()
    slider = lambda name, last, at: (
        f'<label>x</label><input type="range" id="{fig.data["id"]}-{name}" min="0" '
        f'max="{last}" step="1" value="{at}"><output>x</output>')
    controls = slider('shift', 2, 0) + slider('shape', 1, 1)
    data = json.dumps({**fig.data, 'series': fig.data['series']})
    old = re.sub(
        '<form.*</script>', lambda _: f'<div class="nnx-c" hidden>{controls}</div>'
        f'<script>(D=>1)(/*data*/{data}/*end*/)</script>', html, flags=re.S)
    assert tool['refreshed'](old) == html

def test_what_cannot_be_read_is_said(tool, tmp_path, capsys):
    path = tmp_path/'a.ipynb'
    def stored(html, source='1'):
        cell = dict(cell_type='code', source=[source], outputs=[
            dict(data={'text/html': html})])
        path.write_text(json.dumps(dict(cells=[cell])))
    fig = roll_figure()
    for html, source in (
        ('<div class="nnx nnx-line" id="f">', '1'),
        (fig.to_html(), 'explore(roll, labels=words)')):
        stored(html, source)
        before = path.read_text()
        assert tool['main']([str(path)]) == 1 and path.read_text() == before
        assert 'FAILED a.ipynb' in capsys.readouterr().out
    stored(fig.to_html().replace('function paths', 'function pfade'),
           "explore(roll, labels={'a': 'start <a>'})")
    assert tool['main'](['--check', str(path)]) == 1
    assert 'pfade' in path.read_text()
    assert tool['main']([str(path)]) == tool['main'](['--check', str(path)]) == 0
    assert 'pfade' not in path.read_text()

QUESTION = 'class="nnx nnx-q"'

@pytest.mark.parametrize(
    'path', [p for p in sorted(NBS.glob('*.ipynb')) if stored_figures(p, QUESTION)],
    ids=lambda p: p.name)
def test_stored_predictions(open_page, path):
    page = open_page(as_page(''.join(stored_figures(path, QUESTION))), 360)
    for f in page.locator('.nnx-q').all():
        for i in range(f.get_by_role('radio').count()):
            f.get_by_role('radio').nth(i).check()
            f.get_by_role('button').press('Enter')
            assert (
                re.match('Right: |Not “', f.get_by_role('status').text_content())
                and f.get_by_role('img').is_visible())
    ids = page.eval_on_selector_all('[id]', 'es => es.map(e => e.id)')
    assert len(set(ids)) == len(ids), 'the same question twice on a page'
    assert (
        page.problems == []
        and page.evaluate('document.scrollingElement.scrollWidth') <= 360)

def test_colours_stand_out():
    for colour in _COLOURS:
        for ground in ('#ffffff', '#181a1f'):
            low, high = sorted([light(colour), light(ground)])
            assert (high+.05)/(low+.05) >= 3, (colour, ground)
