"""The parts of interactive figures, by hand: numbers small enough to redo."""
import numpy as np
from fastcore.test import expect_fail, test_eq as eq, test_fail as fails

from nntrain.explore import check_frames, explore, figure_data
from nntrain.figure_axes import _axes, _limits, _ticks
from nntrain.figure_frames import (_frames, _grid, _heat, _nodes, _picture,
                                   _pictures, _series, _start)
from nntrain.figure_graph import (_arrow, _back_graph, _check_graph, _numbers_at,
                                  _pack_graph, _short)
from nntrain.figure_lines import _contours, _outline, _pack_lines, _stroke, _svg
from nntrain.figure_numbers import _LO, _SPAN, _decode, _encode, _quantise
from nntrain.figure_tiles import (_labels, _pack_tiles, _places, _shade, _tiles,
                                  _windows)
from nntrain.prediction import Prediction, Verdict, _sentences, predict

what = 'A line whose slope follows the slider.'


def test_numbers_in_two_letters():
    codes = _quantise([0, .5, 1, 1.2, float('nan'), 99], 0, 1)
    eq(codes, [1023, 2047, 3070, 3479, 4095, 4094])  # 99: the last code, far outside
    eq(_encode([0, 65, 4095]), 'AABB--')
    eq(_decode(_encode(codes)), codes)
    ys = np.random.default_rng(0).uniform(-3, 5, 1000)
    back = (_decode(_encode(_quantise(ys, -3, 5))) - _LO)/_SPAN*8 - 3
    assert np.abs(back - ys).max()/8 <= .5/_SPAN + 1e-12


def test_what_a_function_may_return():
    eq(
        list(_series({'a': [1, 2]}, 'line', 'f()')['a'][0]), [0, 1]
    )  # no x: positions 0, 1, …
    with expect_fail(ValueError, contains='f(b=1) must return a dict'):
        _series([1, 2], 'line', 'f(b=1)')
    with expect_fail(ValueError, contains='no finite point'):
        _series({'a': [np.nan, np.nan]}, 'line', 'f()')
    with expect_fail(ValueError, contains='shape (T, 2)'):
        _series([1, 2], 'path', 'f()')
    eq(list(_series(np.ones((3, 2)), 'scatter', 'f()')), ['scatter'])
    with expect_fail(ValueError, contains='rising edges, one more than counts'):
        _series(([0, 1, 2], [5, 5, 5]), 'hist', 'f()')

def test_heat_and_pictures():
    eq(_heat(np.ones((2, 3)), 'f()')['heat'][0], [0, 1, 2])
    eq(
        _picture(np.full((3, 4, 5), 255, dtype=np.uint8), 'p')[0, 0], [1.0, 1, 1]
    )  # torch's order, whole numbers
    eq(list(_pictures(np.ones((2, 1, 4, 4)), 'f()')), [0, 1])
    with expect_fail(ValueError, contains='(len(y), len(x)) = (2, 2)'):
        _heat(([0, 1], [0, 1], np.ones((2, 3))), 'f()')
    with expect_fail(ValueError, contains='one size'):
        _pictures([np.ones((2, 2)), np.ones((3, 3))], 'f()')
    with expect_fail(ValueError, contains="picture 'a' must be (H, W)"):
        _pictures({'a': np.ones(4)}, 'f()')

def test_grid_and_start():
    grid = _grid(dict(lr=[.1, .2, .3], name=['sgd', 'adam']))
    eq([t for _,_,t in grid], [['0.1', '0.2', '0.3'], ['sgd', 'adam']])
    eq(_start(grid, dict(lr=.1+.2)), [2, 0])  # 0.30000000000000004 is meant to be 0.3
    with expect_fail(ValueError, contains='lr has an empty range'): _grid(dict(lr=[]))
    with expect_fail(
        ValueError, contains="start lr=0.5 is not on its grid: use one of 0.1, 0.2, 0.3"
    ):
        _start(grid, dict(lr=0.5))

def test_round_numbers_and_limits():
    eq(
        [t for _, t in _ticks(-0.03, 1.04, False)],
        ['0', '0.2', '0.4', '0.6', '0.8', '1'])
    eq(
        [t for _, t in _ticks(-5, 1, True)],
        ['10⁻⁵', '10⁻⁴', '10⁻³', '0.01', '0.1', '1', '10'])
    eq(_limits([np.array([1., 2, np.nan])], (0, 5), 'x', False), (0, 5))
    with expect_fail(ValueError, contains='low < high'): _limits([], (5, 0), 'y', False)

def test_axes_of_a_panel():
    panel = _axes((0, 1, 0, 1), (0, 0), (4, 2))
    # without labels: numbers at the ends only
    assert '>1</text>' in panel and '>0.8</text>' not in panel

def test_contours():
    axis = np.linspace(-1, 1, 21)
    lines, note = _contours(
        (axis, axis, axis[None] ** 2 + axis[:, None] ** 2), (-1, 1, -1, 1), (3, 2),
        [0.25, 0.5])
    eq((lines.count('<path'), note), (2, 'contours: 0.25 (strong) to 0.5 (faint)'))
    with expect_fail(ValueError, contains='(len(y), len(x)) = (21, 21)'):
        _contours((axis, axis, axis), (-1, 1, -1, 1), (3, 2), None)

def test_a_picture():
    picture = _svg(
        'A falling line', (0, 0, 4, 2), 'c',
        _axes((0, 1, 0, 1), (0, 0), (4, 2), ('step', 'a<b')),
        _stroke('M1000 420L9188 4514', '', 0))
    for part in (
        'aria-label="A falling line"',
        'viewBox="0 0 9488 5274"',
        '>0.8</text>',
        '>a&lt;b</text>',
    ):
        assert part in picture, part

def test_packed_lines_and_bars():
    def two(a): return {'same': [1., 2.], 'moves': [a, 2*a]}

    packed = _pack_lines(
        _frames(two, _grid(dict(a=[1.0, 2.0])), 'line'),
        dict(limits=[0, 1, 0, 4], dots=[], kind='line', log=(0, 0)))
    eq([len(s['y']) for s in packed], [1, 2])
    # two bars, three edges
    eq(
        _outline(np.empty(0), np.array([0.1, 0.2, 0.9, np.nan]), (0, 1, 3)),
        ([0, 0, 0.5, 0.5, 1, 1], [0, 2, 2, 1, 1, 0]))

def test_tiles():
    eq(_shade(np.array([0, .5, 1, 2, np.nan]), 0, 1, 3), [0, 1, 2, 2, 4])
    small = dict(kind='heat', zlim=(0, 1), zlog=0, shades=4)
    (packed,) = _pack_tiles(
        [
            {'heat': (0, 0, np.array([[0.0, 1], [np.nan, 1 / 3]]))},
            {'heat': (0, 0, np.eye(2))}, {'heat': (0, 0, np.eye(2))}],
        small,
    )
    # upside down: the first row is the lowest
    eq(_tiles(packed, 0)[0], [[5, 1], [0, 3]])
    eq(
        [int(_decode(c)[0]) for c in packed['cells']], [0, 1, 1]
    )  # the same frame twice is stored once
    assert 'y="-4"' in _windows(
        packed, 2, [(0, 0, 9, 9)], 'f'
    )  # the second tile: two rows, and one more at each end
    photo = np.random.default_rng(0).uniform(size=(5, 4, 3))
    (packed,) = _pack_tiles(
        [{0: (photo,)}], dict(kind='image', zlim=(0, 1), zlog=0, shades=256))
    assert np.abs(_tiles(packed, 0)[0]/255-photo).max() <= .5/255 + 1e-9

def test_places_of_tiles():
    photo = np.random.default_rng(0).uniform(size=(5, 4, 3))
    (packed,) = _pack_tiles(
        [{0: (photo,)}], dict(kind='image', zlim=(0, 1), zlog=0, shades=256))
    row = dict(kind='image', labels=['a', 'b', 'c'], ncols=2, series=[packed])
    eq([p[:2] for p in _places(row)], [(0, 0), (3160, 0), (0, 4330)])  # two rows
    assert '>b</text>' in _labels(row)[0]
    with expect_fail(ValueError, contains='too long for 2 pictures in a row'):
        _labels(dict(row, labels=['a very long label that fits nowhere', '', '']))

def test_short_numbers():
    eq([_short(v) for v in (
        0, -.5, 1/3, 2.345, 999.6, 12345, 99999, .001, .00099, 1.5e-7, -2e6, 1e100,
        .1 + .2 - .3)],
       ['0', '−0.5', '0.333', '2.35', '1000', '12300', '1e5', '0.001', '9.9e−4',
        '1.5e−7', '−2e6', '1e100', '0'])

def test_nodes_of_a_graph():
    eq([list(v) for (v,) in _nodes({'a': (1, np.float32(.5)), 'b': 2}, 'f()').values()],
       [[1, .5], [2]])
    for wrong in ({}, [1], {'a': (1, 2, 3)}, {'a': (1, np.inf)}, {'a': 'one'}):
        with expect_fail(ValueError, contains='f()'): _nodes(wrong, 'f()')

def test_boxes_and_arrows():
    # in a row and in a column: between the edges of two boxes, 20 units from each
    eq(_arrow((0, 0), (1898, 0), 1000),
       ('M1580 500L1698 500', 'M1878 500L1698 410L1698 590z'))
    eq(_arrow((0, 1340), (0, 0), 1000)[0], 'M780 1320L780 1200')
    nodes, arrows = _check_graph(dict(nodes={'a': (0, 0), 'b<': (1, .5)},
                                      arrows=[('a', 'b<')]))
    eq((nodes['b<'], arrows), ((1., .5), [('a', 'b<')]))
    data = dict(nodes={'a': [0, 0, 1], 'b<': [1898, 700, 2]}, high=1390, arrows=arrows)
    behind, _, note, view = _back_graph(data)
    eq((behind.count('<rect'), 'b&lt;' in behind, note, view),
       (2, True, 'below each name: its value; ∂: its gradient', '-1918 -20 7294 2130'))
    frames = [{'a': (np.array([1.]),), 'b<': (np.array([v, 1.]),)} for v in (.5, 2.)]
    (s,) = _pack_graph(frames, data)
    eq((s['texts'], s['says']), (['1', '0.5', '2'], ['a ', '; b< ', ', gradient ']))
    eq([_numbers_at(s, i) for i in (0, 1)], [['1', '0.5', '1'], ['1', '2', '1']])

def test_errors_of_explore():
    def slope(a): return {'y': [0, a]}
    def flat(a): return {'y': [a, a]}
    def shades_of(a): return [np.full((2, 2), a)]
    def growing(a): return [np.ones((a, a))]
    def uneven_grid(a): return [0, 1, 3], [0, 1], np.ones((2, 3))

    for contains, wrong in {
        "did you mean 'line'": lambda: explore(slope, kind='lines', alt=what, a=[1]),
        'too short': lambda: explore(slope, alt='a line', a=[1]),
        'no parameters': lambda: explore(slope, alt=what),
        'empty range': lambda: explore(slope, alt=what, a=[]),
        'not on its grid': lambda: explore(slope, alt=what, a=[1, 2], start=3),
        'no finite point': lambda: explore(flat, alt=what, a=[1.0, np.nan]),
        'named function': lambda: explore(lambda a: a, alt=what, a=[1]),
        '2000 frames': lambda: explore(slope, alt=what, a=range(2000)),
        "needs kind='heat', not 'line'": lambda: explore(
            slope, alt=what, a=[1], zlog=True),
        'undo the normalisation': lambda: explore(
            shades_of, kind='image', alt=what, a=[-1, 1]),
        'in even steps': lambda: explore(uneven_grid, kind='heat', alt=what, a=[1]),
        'same series and lengths': lambda: explore(
            growing, kind='image', alt=what, a=[2, 3]),
    }.items():
        with expect_fail(ValueError, contains=contains): wrong()

def test_what_a_stored_figure_needs():
    def slope(a): return {'y': [0, a]}
    fig = explore(slope, alt=what, a=[1, 2])
    assert fig._repr_mimebundle_()['text/plain'] == what
    check_frames(fig)          # it knows its function
    with expect_fail(ValueError, contains='needs its function: check_frames(html, sl'):
        check_frames(fig.to_html())
    with expect_fail(ValueError, contains='no figure made by explore'):
        figure_data('<p>text</p>')

def test_shades_of_pictures():
    def ramp(a): return [np.linspace(0, a, 100).reshape(10, 10)]
    fig = explore(ramp, kind='image', alt=what, a=[0, 0.5, 1], shades=16)
    (tiles,) = fig.data['series']
    drawn = [_tiles(tiles, i)[0] for i in range(len(tiles['cells']))]
    assert [np.unique(t).tolist() for t in drawn] == [[0], [*range(9)], [*range(16)]]

def test_too_large():
    def long_line(a): return {'y': np.arange(400.)*a}
    fails(
        lambda: explore(long_line, alt=what, a=range(1, 101)),
        contains='thin a range (a has 100 values)')

def test_sentences_of_a_prediction():
    says = _sentences(
        'flat', ['flat', 'steep'], 'Nothing moves it.', {'steep': 'Who pushes?'})
    eq(
        says,
        {
            'flat': 'Right: “flat”. Nothing moves it.',
            'steep': 'Not “steep”. Who pushes? It is “flat”. Nothing moves it.'},
    )
    asked = Prediction('Which way?', says, 'flat', '<p>')
    assert asked.check('flat') and not asked.check('steep')
    eq(repr(Verdict(True, 'fine')), 'fine')
    with expect_fail(
        ValueError,
        contains="pick='step' is not one of the options: did you mean 'steep'?"
    ):
        asked.check('step')

def test_errors_of_predict():
    def ask(options=None, answer='up', why='It does.', alt=what, **kw):
        return predict(
            'Which?', {'up': [0, 1], 'down': [1, 0]} if options is None else options,
            answer, why, alt=alt, **kw)

    assert ask().check('up')
    for contains,wrong in {
        'too short':               lambda: ask(alt='a line'),
        '2 to 4 curves':           lambda: ask({'up': [0, 1]}),
        "did you mean 'down'":     lambda: ask(answer='dawn'),
        'need words':              lambda: ask(why=''),
        'no finite point':         lambda: ask({'up': [0, 1], 'down': [np.nan]*2}),
        'at least two':            lambda: ask({'up': [0, 1], 'down': [1]}),
        'are the same curve':      lambda: ask({'up': [0, 1], 'too': [0, 1]}),
        'both given and an option': lambda: ask(given={'up': [0, 1]}),
        'not one of the options':  lambda: ask(remarks={'flat': 'No.'}),
    }.items():
        with expect_fail(ValueError, contains=contains): wrong()
