"""Shape X-ray: what it says about values, that it changes nothing, `%%xray` in IPython
and in a kernel, the traces of the chapters, and the switch on a page."""
import asyncio
import gc
import inspect
import json
import re
import sys
import traceback
import weakref
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, notebook, write_notebook
from fastcore.basics import AttrDict
from site_checks import start_browser
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from nntrain import traces, xray as live
from nntrain.renumber import renumber
from nntrain.tensor_loader import TensorLoader
from nntrain.traces import cell_key, nntrain_xray, read_trace, stale_cells
from nntrain.xray import Shapes, notes, xray
from nntrain.xray_page import XrayProc, shape_list
from nntrain.xray_words import _PIECE, in_words

NBS = ROOT/'nbs'
TRACED = sorted((NBS/'xray').glob('*.json'))


# ---- values in words -----------------------------------------------------------------

class Marked(torch.Tensor):
    "A tensor that notices every call"
    calls = []
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})

class Endless(IterableDataset):
    def __iter__(self): raise AssertionError('iterated')

@pytest.mark.parametrize('value, said', [
    (torch.zeros(0, 3), '0×3 float32'),
    (torch.tensor(True), 'scalar bool, True'),
    (torch.tensor([[2.5]]), '1×1 float32, 2.5'),
    (torch.tensor([1, 2, 3]), '3 int64, 2 ± 1'),
    (torch.full((5,), .1), '5 float32, 0.1 ± 0'),
    (torch.tensor([1., float('inf'), -float('inf'), float('nan')]),
     '4 float32, 1 ± 0, 1 nan, 2 inf'),
    (torch.tensor([float('nan')]*2), '2 float32, 2 nan'),
    (torch.tensor([1e4, 6e4], dtype=torch.float16), '2 float16, 3.5e+04 ± 3.54e+04'),
    (torch.ones(2, dtype=torch.complex64), '2 complex64'),
    (torch.eye(3).to_sparse(), '3×3 float32'),
    (torch.rand(3, device='meta'), '3 float32 meta'),
    (torch.ones(1).expand(2**40), f'{2**40} float32'),
    (np.float32(.5), '0.5'), (np.array(['a']), '1 <U1'),
    (np.array(3.), 'scalar float64, 3'),
    (True, 'True'), (3, '3'), (.1 + .2, '0.3'), ('abc', "'abc'"), ('a'*41, None),
    (None, None), (object(), None), (int, None), (len, None), (iter([1]), None),
    (torch.Size([2, 3]), '(2, 3)'), ([], 'list of 0'), ([1]*9, 'list of 9'),
    (dict(a=1), 'dict of 1'), ((1, 'a'), "(1; 'a')"), ([object()], 'list of 1'),
    (nn.ReLU(), 'ReLU, 0 parameters'),
    (nn.LazyLinear(3), None),
    (DataLoader(Endless()), None),
    (TensorLoader(torch.zeros(10, 1, 4, 4), torch.zeros(10), 4, shuffle=True),
     '3 batches: 4×1×4×4 and 4'),
], ids=lambda v: str(v)[:20].replace('\n', ' '))
def test_words(value, said):
    if isinstance(value, nn.LazyLinear):   # no parameters yet; left out
        assert xray('y = x', dict(x=value)).rows == []
    else: assert in_words(value) == said

@pytest.mark.parametrize('shape', [(3*_PIECE + 7,), (1000, 3, 1001), (7, _PIECE//2)])
def test_mean_and_std_are_those_of_torch(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    want = f', {x.double().mean():.3g} ± {x.double().std():.3g}'
    assert in_words(x).endswith(want)
    x = x.transpose(0, -1)
    assert in_words(x).endswith(want)
    assert in_words(x.numpy()).endswith(want)

def test_looking_touches_nothing():
    w = torch.rand(4, requires_grad=True)
    y = w*2
    version, state = y._version, torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail(), lambda t: t):
        in_words(y)
    assert y._version == version and y.grad_fn is not None and w.grad is None
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    read_only = np.zeros(3)
    read_only.flags.writeable = False
    with pytest.warns() as heard:
        in_words(read_only)
        import warnings
        warnings.warn('only this', stacklevel=1)
    assert [str(w.message) for w in heard] == ['only this']

def test_nobody_who_listens_to_torch_hears_us():
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    x = torch.rand(3).as_subclass(Marked)
    Marked.calls.clear()
    assert in_words(x) == '3 float32' and not Marked.calls

    class Hears(TorchFunctionMode):
        def __torch_function__(self, func, *args): pytest.fail(f'heard {func}')
    class HearsOps(TorchDispatchMode):
        def __torch_dispatch__(self, func, *args): pytest.fail(f'heard {func}')
    plain = torch.rand(3)
    with Hears(): assert in_words(plain).startswith('3 float32, ')
    with HearsOps(): assert in_words(plain).startswith('3 float32, ')

def test_inside_vmap_there_are_no_numbers():
    space = dict(torch=torch)
    shapes = xray('def f(x):\n    y = x*2\n    return y.sum()\n'
                  'out = torch.func.vmap(torch.func.grad(f))(torch.ones(2, 3))', space)
    torch.testing.assert_close(space['out'], torch.full((2, 3), 2.))
    said = notes(shapes.rows)
    assert said[1] == '3 float32' and said[4] == '2×3 float32, 2 ± 0'


# ---- which lines say something -------------------------------------------------------

def said(code, **space):
    "{line: note}"
    return notes(xray(code, space).rows)

@pytest.mark.parametrize('code, want', [
    ('x = f(1)', {1: '2'}),
    ('x = 1\ny = -1\nz = "a"\nt = (1, 2)\ng = lambda: f(1)', {}),  # seen in the code
    ('x: int = f(1)\ny: int', {1: '2'}),
    ('x = y = f(1)', {1: 'x 2 · y 2'}),
    ('a, (b, *c) = f(1), (f(2), f(3), f(4))', {1: 'a 2 · b 3 · c (4; 5)'}),
    ('_, a = f(1), f(2)', {1: '3'}),
    ('x = 1\nx += f(1)', {2: '3'}),
    ('d = {}\nd["a"] = f(1)', {1: 'dict of 0', 2: '2'}),
    ('class C: pass\nc = C()\nc.w = f(1)', {3: '2'}),
    ('f(1)', {1: '2'}), ('"text"', {}), ('f(1); f(2)', {1: '2 · 3'}),
    ('if (n := f(1)) > 1: pass', {1: '2'}),
    ('[y := f(i) for i in range(3)]', {1: 'y 3 (×3, the last) · (1; 2; 3)'}),
    ('for i in range(3):\n    x = f(i)',
     {1: '2 (×3, the last)', 2: '3 (×3, the last)'}),
    ('for i in range(3): x, y = f(i), i', {1: 'i 2 · x 3 · y 2 (×3, the last)'}),
    ('for i in range(3): pass\nelse: x = f(1)', {1: '2 (×3, the last)', 2: '2'}),
    ('while True:\n    x = f(1)\n    break', {2: '2'}),
    ('try: x = f(1)\nfinally: y = f(2)', {1: '2', 2: '3'}),
    ('match f(1):\n    case 2: x = f(2)', {2: '3'}),
    ('def g(a, *b, c=3, **d):\n    "doc"\n    return a + c\ng(1, 2)',
     {1: 'a 1 · b (2) · c 3 · d dict of 0', 3: '→ 4', 4: '4'}),
    ('def g(a):\n    b = f(a)\n    return b\nfor i in range(3): g(i)',
     {1: '0', 2: '1', 4: '2 (×3, the last)'}),
    ('def g(n):\n    for i in range(n): x = f(i)\ng(4)\ng(9)',
     {1: '4', 2: 'i 3 · x 4 (×4, the last)'}),
    # a recursion: below the inner call, the line runs once for each call
    ('def g(n):\n    m = f(n)\n    if n: g(n - 1)\n    k = f(n)\ng(2)',
     {1: '2', 2: '3', 4: '3 (×3, the last)'}),
    ('def g(n):\n    for i in range(n): yield f(i)\nx = list(g(3))',
     {1: '3', 2: 'i 2 · → 3 (×3, the last)', 3: '(1; 2; 3)'}),
    ('def g():\n    def h(a): return f(a)\n    return h\nx = g()(1)',
     {2: 'a 1 · → 2', 4: '2'}),
    ('from __future__ import annotations\nx = f(1)', {2: '2'}),
    ('"doc"\nx = f(1)', {2: '2'}),
    ('x = f(\n    1)\ny = f(2)', {1: '2', 3: '3'}),
    ('global x\nx = f(1)', {2: '2'}),
    ('class C:\n    a = f(1)\n    b: int = f(2)\n    __slots__ = ()', {2: '2', 3: '3'}),
    ('x = None\ny = object()', {}), ('', {}), ('# nothing', {}),
])
def test_lines(code, want): assert said(code, f=lambda i: i + 1) == want

def test_a_value_that_cannot_be_looked_at_is_left_out():
    class Bad(nn.Module):
        def parameters(self, recurse=True): raise RuntimeError('no')
    shapes = xray('x = Bad()\ny = 1 + 1', dict(Bad=Bad))
    assert notes(shapes.rows) == {2: '2'}


# ---- nothing changes -----------------------------------------------------------------

TRAIN = '''
torch.manual_seed(3)
net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(.5), nn.Linear(8, 1))
opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
def step(xb, yb):
    "One step"
    loss = (net(xb) - yb).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss.item()
losses = [step(torch.randn(16, 4), torch.randn(16, 1)) for _ in range(5)]
last = np.random.rand(), torch.rand(1).item()
'''

def test_training_is_the_same_to_the_last_bit():
    def run(how):
        np.random.seed(0)
        space = dict(torch=torch, nn=nn, np=np, __name__='t')
        how(TRAIN, space)
        return space
    a, b = run(exec), run(xray)
    assert a['losses'] == b['losses'] and a['last'] == b['last']
    assert set(a) == set(b)                      # no name more
    for p, q in zip(a['net'].parameters(), b['net'].parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)

def test_values_die_when_they_would():
    class Thing(list): pass
    watched, seen = [], []
    space = dict(watch=lambda t: watched.append(weakref.ref(t)) or t,
                 alive=lambda: seen.append([r() is not None for r in watched]),
                 make=lambda: torch.zeros(3))
    code = ('def f():\n    a = watch(make())\n    b = a*2\n    return b.sum()\n'
            'f()\nalive()\nx = watch(make())\nx = 1\nalive()\n'
            'for i in range(2): y = watch(make())\ndel y\nalive()')
    gc.disable()                                 # no help from the collector
    try: shapes = xray(code, space)
    finally: gc.enable()
    assert seen == [[False], [False]*2, [False]*4]
    gc.collect()
    held = [o for o in gc.get_referrers(shapes) if isinstance(o, torch.Tensor)]
    assert not held and all(isinstance(t, (int, str)) for r in shapes.rows for t in r)

@pytest.mark.parametrize('code', [
    'x = 1\n\ny = f(x)/0\nz = 2',
    'def g(a):\n    "doc"\n    b = a\n    return (b\n            .missing)\ng(1)',
    'def g(*, a): pass\nx = 1\ng(b=3)',
    'for i in [1, 0]:\n    x = 1/i',
    'a, b = 1, 2, 3', 'x = unknown', 'raise KeyError(3)', 'assert f(1) == 3, "no"',
    'class C:\n    @property\n    def p(self): return self.q\nC().p',
    'def g():\n    yield 1\n    x = f(2)\n    raise ValueError(x)\nlist(g())'])
def test_exceptions_name_the_same_places(code):
    def caught(how):
        try: how(code, dict(f=lambda i: i + 1, __name__='t'))
        except Exception as e:
            frames = [(s.lineno, s.end_lineno, s.colno, s.end_colno, s.name)
                      for s in traceback.extract_tb(e.__traceback__)
                      if s.filename.startswith(('<string>', '<xray'))]
            return type(e), str(e), frames
    plain, seen = caught(exec), caught(xray)
    assert plain is not None and plain == seen

def test_tracebacks_and_getsource_show_the_lines():
    space = {}
    with pytest.raises(ZeroDivisionError) as e:
        xray('def f(a):\n    return a/0\n\nx = f(1)', space)
    text = ''.join(traceback.format_exception(e.value))
    assert 'x = f(1)' in text and 'return a/0' in text and '__xray__' not in text
    assert inspect.getsource(space['f']) == 'def f(a):\n    return a/0\n'

FUNCTIONS = '''
import functools
def deco(f):
    @functools.wraps(f)
    def inner(*a): return f(*a)
    return inner
class C:
    @property
    def p(self): x = 2; return x*2
    @deco
    def m(self, n):
        y = n + 1
        return y
    def s(self): return super().__repr__()
@deco
def outer(n):
    k = n*2
    def add(i):
        nonlocal k
        k = k + i
        return k
    return add
add = outer(3)
pair = lambda a: a + 1, lambda a: a + 2
async def co(): z = 3; return z*2
'''

def test_functions_are_as_if_nobody_had_looked():
    def codes(space):
        name = space['add'].__code__.co_filename
        found = [f.__code__ for f in gc.get_objects() if type(f) is FunctionType]
        return {(c.co_name, c.co_firstlineno): (c.co_names, c.co_code)
                for c in found if c.co_filename == name}
    plain, seen = {}, {}
    exec(compile(FUNCTIONS, '<plain>', 'exec'), plain)
    xray(FUNCTIONS, seen)
    gc.collect()
    assert codes(plain) == codes(seen) and len(codes(seen)) >= 9
    assert seen['add'](1) == 7 and seen['add'](1) == 8 and seen['C']().m(2) == 3
    assert seen['C']().p == 4 and 'C object' in seen['C']().s()
    assert [f(1) for f in seen['pair']] == [2, 3] and asyncio.run(seen['co']()) == 6

def test_a_generator_may_outlive_its_cell():
    space = {}
    xray('def g():\n    x = 1 + 1\n    yield x\n    y = x + 1\n    yield y\n'
         'it = g()\nfirst = next(it)', space)
    assert list(space['it']) == [3]

def test_debuggers_keep_their_trace():
    def tracer(*a): return None
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        xray('x = 1 + 1', {})
        assert sys.gettrace() is tracer
    finally: sys.settrace(before)

def test_compiled_and_scripted_functions():
    space = dict(torch=torch, __name__='t')
    shapes = xray('@torch.compile(backend="eager", fullgraph=True)\n'
                  'def f(x):\n    y = x*2\n    return y + 1\nout = f(torch.ones(3))',
                  space)
    assert notes(shapes.rows)[5] == '3 float32, 3 ± 0'
    xray('@torch.jit.script\ndef g(x):\n    y = x*2\n    return y + 1\n'
         'out = g(torch.ones(3))', space)
    torch.testing.assert_close(space['out'], torch.full((3,), 3.))

def test_names_of_the_reader_are_not_touched():
    space = dict(x=1)
    assert xray('y = x + 1', space).rows == [(1, 'y', '2', 1)]
    assert set(space) - {'__builtins__'} == {'x', 'y'}
    assert xray('y = 1 + 1').rows == [(1, 'y', '2', 1)]

@pytest.mark.parametrize('args, words', [
    ((3,), "code must be a text, got int: write xray('x = 1')"),
    (('x', []), 'namespace must be a dictionary of names or None, got list')])
def test_bad_input_is_refused_in_a_sentence(args, words):
    with pytest.raises(TypeError) as e: xray(*args)
    assert words in str(e.value)

def test_errors_of_syntax_stay_python_s():
    with pytest.raises(SyntaxError) as e: xray('x = 1\ny = = 2')
    assert e.value.lineno == 2


# ---- %%xray in IPython ---------------------------------------------------------------

@pytest.fixture
def shell():
    from IPython.core.interactiveshell import InteractiveShell
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    shell.run_line_magic('load_ext', 'nntrain.xray')
    yield shell
    live.unload_ipython_extension(shell)
    InteractiveShell.clear_instance()

def run_cell(shell, text):
    "-> (result, what was shown, what was printed)"
    from IPython.utils.capture import capture_output
    with capture_output() as got: result = shell.run_cell(text, store_history=True)
    shown = [o.data['text/plain'] for o in got.outputs]
    return result, shown, got.stdout + got.stderr

def test_magic(shell):
    result, shown, printed = run_cell(shell, '%%xray\nx = 1 + 1\nx*3')
    assert result.success and result.result == 6 and shell.user_ns['_'] == 6
    assert shown[-1].splitlines() == [
        '1  %%xray', '2  x = 1 + 1', '       ↳ 2', '3  x*3', '       ↳ 6']
    assert run_cell(shell, 'y = 1 + 1')[1:] == ([], '')       # only that cell

def test_magic_with_other_magics(shell):
    assert run_cell(shell, '%%xray\n%precision 3\nx = 2 + 2')[1][-1].endswith('↳ 4')
    result, shown, printed = run_cell(shell, '%%xray\n%%time\nx = 2 + 2\nx')
    assert 'Wall time' in printed and result.success
    assert shown[-1].splitlines()[2:4] == ['3  x = 2 + 2', '       ↳ 4']
    result, shown, _ = run_cell(shell, '#| label: a\n\n%%xray\nx = 2 + 3')
    assert shown[-1].splitlines()[-1].endswith('↳ 5')
    assert run_cell(shell, '%%xray\n%%html\n<b>')[0].success

def test_magic_and_await(shell):
    code = ('%%xray\nimport asyncio\nawait asyncio.sleep(0)\n'
            'x = await asyncio.sleep(0, 5)')
    result, shown, _ = run_cell(shell, code)
    assert result.success and shell.user_ns['x'] == 5 and shown[-1].endswith('↳ 5')

def test_magic_and_errors(shell):
    result, shown, printed = run_cell(shell, '%%xray\nx = 1 + 1\ny = x/0')
    assert isinstance(result.error_in_exec, ZeroDivisionError)
    assert '----> 3 y = x/0' in re.sub(r'\x1b\[[\d;]*m', '', printed)
    assert shown[-1].splitlines()[2] == '       ↳ 2'           # what it got so far
    result, shown, _ = run_cell(shell, '%%xray\nx = = 1')
    assert isinstance(result.error_before_exec, SyntaxError) and shown == []
    assert run_cell(shell, 'x')[0].result == 2
    for bad in ('%%xray x = 1\ny = 2', '%xray 3'):
        result, _, printed = run_cell(shell, bad)
        assert not result.success and '%%xray stands alone' in printed
    assert 'no line of this cell' in run_cell(shell, '%%xray\npass')[2]
    assert run_cell(shell, '%%xray')[0].success

def test_magic_leaves_plain_functions_and_no_values(shell):
    run_cell(shell, '%%xray\nimport torch\ndef f(a):\n    b = a*2\n    return b + 1\n'
                    'x = torch.zeros(3)\nf(x);')
    f = shell.user_ns['f']
    assert '__xray__' not in f.__code__.co_names and 'b = a*2' in inspect.getsource(f)
    ref = weakref.ref(shell.user_ns.pop('x'))
    gc.collect()
    assert ref() is None

def test_loading_twice_changes_nothing(shell):
    live.load_ipython_extension(shell)
    assert sum('_Watch' in type(t).__name__ for t in shell.ast_transformers) == 1
    live.unload_ipython_extension(shell)
    assert not run_cell(shell, '%%xray\nx = 1')[0].success     # not found

def test_both_forms_say_the_same():
    shapes = Shapes('a = "<b>"\n\nb = f(a)', [(3, 'b', '<3>', 2)])
    assert repr(shapes) == '1  a = "<b>"\n2  \n3  b = f(a)\n       ↳ <3> (×2, the last)'
    page = shapes._repr_html_()
    assert '&lt;b&gt;' in page and '<i>&lt;3&gt; (×2, the last)</i>' in page


# ---- traces of chapters --------------------------------------------------------------

MINI = ['# Seven\n\n> A title',
        '#| export\n#| code-fold: true\n\ndef double(x):\n    y = x*2\n    return y',
        'import time\nimport torch',
        'out = double(torch.ones(3))\nstart = time.perf_counter()\nn = 3 + 4',
        '#| slow\nraise SystemExit',
        'noise = torch.rand(2, 3)\n'
        'with open("xray.txt", "w") as f: size = f.write("a")']

@pytest.fixture(scope='module')
def mini_trace(tmp_path_factory):
    path = tmp_path_factory.mktemp('nbs')/'07_seven.ipynb'
    write_notebook(path, notebook(*MINI))
    assert nntrain_xray([str(path)]) == 0
    return path

def test_a_chapter_is_traced(mini_trace):
    stored = read_trace(mini_trace)
    assert stored == {
        cell_key(MINI[1]): [[1, 'x', '3 float32, 1 ± 0', 1],
                            [2, 'y', '3 float32, 2 ± 0', 1]],
        cell_key(MINI[3]): [[1, 'out', '3 float32, 2 ± 0', 1], [3, 'n', '7', 1]],
        cell_key(MINI[5]): [[1, 'noise', '2×3 float32', 1], [2, 'size', '1', 1]]}
    assert stale_cells(mini_trace) == []
    text = (mini_trace.parent/'xray/07_seven.json').read_text(encoding='utf-8')
    assert json.loads(text)['budget'] == 'quick'
    assert text == traces._text('quick', stored) and text.endswith('\n')

def test_a_trace_moves_with_its_chapter(tmp_path):
    (tmp_path/'nbs/xray').mkdir(parents=True)
    for name, code in (('07_seven', 'a = f(1)'), ('08_eight', 'b = f(1)')):
        write_notebook(tmp_path/f'nbs/{name}.ipynb', notebook('# T\n\n> P', code))
        text = traces._text('quick', {cell_key(code): [[1, code[0], '2', 1]]})
        (tmp_path/f'nbs/xray/{name}.json').write_text(text)
    renumber(tmp_path, dict(seven=8, eight=7))
    names = {p.name for p in (tmp_path/'nbs/xray').iterdir()}
    assert names == {'08_seven.json', '07_eight.json'}
    for name in ('08_seven', '07_eight'):
        assert stale_cells(tmp_path/f'nbs/{name}.ipynb') == []

def test_a_chapter_that_fails_keeps_its_trace(mini_trace, capsys):
    path = mini_trace.parent/'08_bad.ipynb'
    write_notebook(path, notebook('# Eight\n\n> Bad', '1/0'))
    kept = path.parent/'xray/08_bad.json'
    kept.write_text('{"cells": {}}')
    assert nntrain_xray([str(path)]) == 1 and kept.read_text() == '{"cells": {}}'
    assert 'ZeroDivisionError' in capsys.readouterr().err

def test_a_missing_chapter_is_refused_in_a_sentence(capsys):
    assert nntrain_xray(['nbs/none.ipynb']) == 2
    assert capsys.readouterr().err == 'nntrain_xray: no such notebook: nbs/none.ipynb\n'

def test_what_only_one_run_saw_is_dropped():
    one = {'k': [[1, 'a', '(3 int64; 2)', 1], [1, 'b', '7', 1]],
           'l': [[1, 'c', '1', 1]]}
    two = {'k': [[1, 'a', '(3 int64; 4)', 1], [2, 'b', '7', 1]]}
    assert traces._agreed(one, two) == {}

def test_the_chapters_that_matter_most_are_traced():
    names = {p.stem.partition('_')[2] for p in TRACED}
    assert names >= {'data', 'learner', 'activations', 'initialization', 'resnet',
                     'augmentation'}

def misplaced(chapter, cells):
    "Notes that stand at a line which does not hold the name that they speak of"
    nb = json.loads(chapter.read_text(encoding='utf-8'))
    sources = {cell_key(text): text for c in nb['cells'] if c['cell_type'] == 'code'
               for text in [''.join(c['source'])]}
    bad = []
    for key, rows in cells.items():
        text = sources[key].splitlines()
        lines = {n: text[i - 1] for i, n in traces._lines(sources[key]).items()}
        for line, name, *_ in rows:
            words = r'return|yield' if name == '→' else re.match(r'\w*', name)[0]
            if not re.search(f'({words})', lines[line]):
                bad.append((name, lines[line]))
    return bad

def test_a_misplaced_note_is_noticed(tmp_path):
    path = tmp_path/'07_seven.ipynb'
    write_notebook(path, notebook('# T\n\n> P', '#| export\na = f(1)\nb = f(2)'))
    key = cell_key('a = f(1)\nb = f(2)')
    assert misplaced(path, {key: [[1, 'a', '2', 1], [2, '', '3', 1]]}) == []
    assert misplaced(path, {key: [[2, 'a', '2', 1], [1, '→', '2', 1]]}) == [
        ('a', 'b = f(2)'), ('→', 'a = f(1)')]

@pytest.mark.parametrize('path', TRACED, ids=lambda p: p.stem)
def test_trace_of_a_chapter(path):
    chapter = NBS/f'{path.stem}.ipynb'
    stale = stale_cells(chapter)
    assert not stale, f'{len(stale)} cells changed: run nntrain_xray nbs/{chapter.name}'
    cells, text = read_trace(chapter), path.read_text(encoding='utf-8')
    assert len(text.encode()) <= 40_000 and len(cells) > 3
    assert list(cells) == sorted(cells) and text == traces._text('quick', cells)
    assert misplaced(chapter, cells) == []
    html = ''.join(map(shape_list, cells.values()))
    assert len(html.encode()) <= 27_000, 'a page may grow by 30 KB; script and style: 3'

def test_a_stale_trace_is_noticed(tmp_path):
    path = TRACED[0]
    cells = json.loads((NBS/f'{path.stem}.ipynb').read_text(encoding='utf-8'))
    code = [c for c in cells['cells'] if c['cell_type'] == 'code' and cell_key(
        ''.join(c['source'])) in read_trace(NBS/f'{path.stem}.ipynb')]
    code[0]['source'] = ''.join(code[0]['source']) + '\nmore = 1'
    (tmp_path/'xray').mkdir()
    (tmp_path/'xray'/path.name).write_bytes(path.read_bytes())
    write_notebook(tmp_path/f'{path.stem}.ipynb', cells)
    assert len(stale_cells(tmp_path/f'{path.stem}.ipynb')) == 1


# ---- on a page -----------------------------------------------------------------------

def page_cells(tmp_path, *cells):
    "Cells as nbdev's processors know them, with a trace of their code, processed"
    path = tmp_path/'07_seven.ipynb'
    (tmp_path/'xray').mkdir(exist_ok=True)
    rows = {cell_key('x = f(1)\ny = f(2)'): [
        [1, 'x', '3 float32, 0 ± 1', 1], [2, 'y', '<4>', 9]]}
    (tmp_path/'xray/07_seven.json').write_text(traces._text('quick', rows))
    nb = SimpleNamespace(path_=str(path), cells=[
        AttrDict(cell_type='code', id=str(i), source=c) for i, c in enumerate(cells)])
    XrayProc(nb).begin()
    return nb.cells

def test_traced_blocks_get_a_list(tmp_path):
    cells = page_cells(tmp_path, '#| code-fold: true\nx = f(1)\ny = f(2)', 'z = 1',
                       '#| echo: false\nx = f(1)\ny = f(2)')
    assert [c.id for c in cells] == ['shapes', '0', '0-shapes', '1', '2',
                                     'shapes-script']
    assert 'data-x="2 · &lt;4&gt; (×9, the last)"' in cells[2].source
    assert page_cells(tmp_path, 'other = 1') == [dict(
        cell_type='code', id='0', source='other = 1')]

def block(code, i, fold=False):
    lines = '\n'.join(f'<span id="cb{i}-{n}">{line}</span>'
                      for n, line in enumerate(code.split('\n'), 1))
    inner = (f'<div class="sourceCode cell-code" id="cb{i}"><pre class="sourceCode '
             f'python code-with-copy"><code class="sourceCode python">{lines}</code>'
             '<button class="code-copy-button" title="Copy"></button></pre></div>')
    if fold:
        inner = ('<details class="code-fold"><summary>Code</summary>'
                 f'{inner}</details>')
    output = '<div class="cell-output"><pre>1</pre></div>'
    return f'<div class="cell">{inner}{output}</div>'

@pytest.fixture(scope='module')
def browser():
    with start_browser() as b: yield b

@pytest.fixture
def opened(browser, tmp_path):
    "opened(width=…, scripts=…): a page with two traced blocks, one of them folded"
    def go(width=1280, scripts=True, dark=False):
        code = 'x = f(1)\ny = f(2)'
        cells = page_cells(tmp_path, code, code)
        html = {'0': block(code, 1), '1': block(code, 2, fold=True)}
        body = ''.join(
            html.get(c.id)
            or c.source.removeprefix('````{=html}\n').removesuffix('````')
            for c in cells)
        style = (NBS/'styles.css').read_text(encoding='utf-8')
        tone = 'quarto-dark' if dark else 'quarto-light'
        path = tmp_path/'page.html'
        path.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title>'
            f'<style>{style}</style><body class="{tone}"><main><h1>T</h1>{body}</main>',
            encoding='utf-8')
        context = browser.new_context(
            viewport=dict(width=width, height=800), java_script_enabled=scripts)
        page = context.new_page()
        page.problems = []
        page.on('pageerror', lambda e: page.problems.append(str(e)))
        page.on('request', lambda r: page.problems.append(r.url)
                if not r.url.startswith('file:') else None)
        page.goto(path.as_uri())
        return page
    return go

NOTE = 'e => getComputedStyle(e, "::after").content'

def note(page, place): return page.locator(f'#{place}').evaluate(NOTE)

def test_switch_of_a_block(opened):
    page = opened()
    button = page.locator('.nn-x-b').first
    assert not page.locator('details.nn-x').first.is_visible()
    assert note(page, 'cb1-1') == 'none'
    assert button.get_attribute('aria-pressed') == 'false'
    button.focus()
    page.keyboard.press('Enter')                     # a native button: keys work
    assert '3 float32, 0 ± 1' in note(page, 'cb1-1')
    assert '<4> (×9, the last)' in note(page, 'cb1-2') and note(page, 'cb2-1') == 'none'
    assert button.get_attribute('aria-pressed') == 'true'
    assert page.locator('.nn-x-all span').inner_text() == (
        'Shapes are shown in 1 of 2 blocks.')
    assert page.locator('.nn-x-all input').evaluate('e => e.indeterminate')
    page.keyboard.press(' ')
    assert note(page, 'cb1-1') == 'none' and page.problems == []

def test_switch_of_the_page(opened):
    page = opened(dark=True)
    box = page.locator('.nn-x-all input')
    box.focus()
    page.keyboard.press(' ')
    page.locator('details.code-fold summary').click()
    assert all('float32' in note(page, f'cb{i}-1') for i in (1, 2))
    page.locator('.nn-x-b').nth(1).click()
    assert note(page, 'cb2-1') == 'none' and not box.is_checked()
    box.click()
    box.click()
    assert note(page, 'cb1-1') == 'none' and page.problems == []

def test_copied_code_is_clean(opened):
    "What Quarto's copy button takes, and what a reader selects"
    page = opened()
    page.locator('.nn-x-all input').click()
    took = """e => { const code = e.previousElementSibling.cloneNode(true)
      return code.innerText }"""
    button = page.locator('.code-copy-button').first
    assert button.evaluate(took) == 'x = f(1)\ny = f(2)'
    selected = page.evaluate("""() => {
      const s = getSelection(); s.selectAllChildren(document.querySelector('#cb1 pre'))
      return s.toString() }""")
    assert selected.strip() == 'x = f(1)\ny = f(2)'
    assert page.locator('#cb1 code').evaluate('e => e.children.length') == 2

@pytest.mark.parametrize('width', [360, 1280])
def test_notes_stay_inside(opened, width):
    page = opened(width)
    page.locator('.nn-x-all input').click()
    assert page.evaluate('document.scrollingElement.scrollWidth') <= width
    wide = page.locator('#cb1').evaluate('e => e.scrollWidth > e.clientWidth')
    button = page.locator('.nn-x-b').first.bounding_box()
    frame = page.locator('#cb1').bounding_box()
    assert not wide and button['height'] >= 24
    assert button['x'] + button['width'] <= frame['x'] + frame['width']

def test_without_scripts_a_list_unfolds(opened):
    page = opened(scripts=False)
    lists = page.locator('details.nn-x')
    assert lists.count() == 2 and not page.locator('.nn-x-all').is_visible()
    lists.first.locator('summary').click()
    line = lists.first.locator('i').first
    assert line.is_visible() and line.evaluate(
        'e => getComputedStyle(e, "::before").content').count('3 float32, 0 ± 1')

def test_a_page_grows_little():
    from nntrain.figure_web import _script, _style
    both = _style('xray.css') + _script(['xray.js'], 'xray', '')
    assert len(both.encode()) < 4096, len(both.encode())


def test_paths_and_clocks_are_not_said():
    assert in_words('data/train') == "'data/train'" and in_words('/data/train') is None
    assert traces._same([1, 'now', '4.023e+04', 1], [1, 'now', '4.023e+04', 1]) is None
    assert traces._same([1, 'eps', '1e-08', 1], [1, 'eps', '1e-08', 1])


# ---- careless calls ------------------------------------------------------------------

def one_cell(path):
    cell = dict(cell_type='code', source='x = 1', id='1')
    path.write_text(json.dumps(dict(cells=[cell])))


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"cells": 3}'])
def test_a_torn_trace_is_named(tmp_path, text, capsys):
    one_cell(tmp_path/'07_x.ipynb')
    (tmp_path/'xray').mkdir()
    (tmp_path/'xray/07_x.json').write_text(text)
    with pytest.raises(ValueError, match='07_x.json is damaged'):
        read_trace(tmp_path/'07_x.ipynb')
    assert nntrain_xray(['--check', str(tmp_path/'07_x.ipynb')]) == 1
    assert '07_x.json is damaged' in capsys.readouterr().err


@pytest.mark.parametrize('text', [
    '{"cells": [', '[]', '{}', '<<<<<<< HEAD\n{}', '{"cells": [3]}',
    '{"cells": [{"cell_type": "raw"}]}'])
def test_a_notebook_in_the_middle_of_a_merge_is_named(tmp_path, text, capsys):
    (tmp_path/'07_x.ipynb').write_text(text)
    with pytest.raises(ValueError, match='07_x.ipynb is no notebook, or a damaged one'):
        stale_cells(tmp_path/'07_x.ipynb')
    assert nntrain_xray(['--check', str(tmp_path/'07_x.ipynb')]) == 1
    assert '07_x.ipynb is no notebook' in capsys.readouterr().err


def test_notes_that_cannot_be_written_are_told(tmp_path, monkeypatch, capsys):
    one_cell(tmp_path/'07_x.ipynb')
    (tmp_path/'xray').touch()                          # a file is in the way
    monkeypatch.setattr(traces, '_once', lambda *args: {})
    assert nntrain_xray([str(tmp_path/'07_x.ipynb')]) == 1
    assert '07_x.ipynb: ' in capsys.readouterr().err


def test_words_for_what_holds_itself_and_for_what_is_not_made_yet():
    one = []
    one.append(one)
    assert in_words(one) == 'list of 1'
    assert in_words(nn.LazyLinear(3)) is None            # no shape before a batch
