"""The commands that run notebooks and keep everything in step."""
import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nntrain.symbols import symbols_drawn
from nntrain.sync import nntrain_sync
from nntrain.tools import _dumps, _small_png, nntrain_execute

ROOT = Path(__file__).resolve().parent.parent


# ---- nntrain_execute -----------------------------------------------------------------

def test_pictures_get_smaller_and_lose_nothing_that_you_see():
    from PIL import Image
    def png_of(picture):
        out = io.BytesIO()
        picture.save(out, 'PNG')
        return base64.b64encode(out.getvalue()).decode()
    noise = Image.effect_noise((60, 60), 80).convert('RGBA')   # more than 128 greys
    small = _small_png(png_of(noise))
    found = Image.open(io.BytesIO(base64.b64decode(small)))
    assert len(small) < len(png_of(noise)) and len(found.getcolors(1000)) <= 128
    pairs = zip(found.convert('L').tobytes(), noise.convert('L').tobytes())
    assert max(abs(a - b) for a, b in pairs) < 20
    assert _small_png(small) == small                  # a second time changes nothing
    noise.putalpha(100)                                # transparent parts stay
    assert _small_png(png_of(noise)) == png_of(noise)

def test_a_smaller_picture_still_says_where_its_symbols_are():
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    out, note = io.BytesIO(), PngInfo()
    note.add_text('Symbols', '[["\\u03b2",1,2,3,4]]')
    note.add_text('Software', 'any')
    Image.effect_noise((60, 60), 80).convert('RGBA').save(out, 'PNG', pnginfo=note)
    png = base64.b64encode(out.getvalue()).decode()
    small = _small_png(png)
    assert len(small) < len(png)
    assert symbols_drawn(small) == symbols_drawn(png) == [['β', 1, 2, 3, 4]]
    assert _small_png(small) == small and b'Software' not in base64.b64decode(small)


def write_notebook(path, *cells):
    cell = lambda i, src: dict(
        cell_type='code', id=f'c{i}', source=src, metadata={'tags': ['x']}, outputs=[],
        execution_count=7)
    path.write_text(
        json.dumps(
            dict(
                cells=[cell(i, s) for i, s in enumerate(cells)],
                metadata={
                    'kernelspec': {'name': 'python3', 'display_name': 'x'},
                    'widgets': {}},
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )

@pytest.fixture
def no_env(monkeypatch):
    pytest.importorskip('nbclient', reason='nntrain_execute needs nbclient')
    pytest.importorskip('ipykernel', reason='nntrain_execute needs a kernel')
    for name in ('NNTRAIN_BUDGET', 'NNTRAIN_STATIC', 'NNTRAIN_RECORD'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('IN_TEST', '1')

FIGURE = (
    "from nntrain.explore import explore\ndef f(a): return {'y': [0, a]}\n"
    "explore(f, a=[1, 2], alt='A line that moves with its slider')")

def test_execute_stores_clean_outputs(tmp_path, no_env, capsys):
    nb = tmp_path/'a.ipynb'
    write_notebook(
        nb,
        "import os, sys\nprint(*[os.environ.get(n) for n in ('NNTRAIN_BUDGET', "
        "'NNTRAIN_STATIC', 'NNTRAIN_RECORD', 'IN_TEST')])\nprint('noise', "
        "file=sys.stderr)",
        FIGURE,
        "#| eval: false\n1/0",
        'import ipywidgets; ipywidgets.IntSlider()',
        '#| code-fold: true\n1+1',
    )
    nntrain_execute([str(nb)])
    assert re.search(r'a\.ipynb: \d+ s', capsys.readouterr().out)
    got = json.loads(nb.read_text())
    assert got['cells'][0]['outputs'] == [
        dict(output_type='stream', name='stdout', text=['full 1 1 None\n'])]
    assert set(got['cells'][1]['outputs'][0]['data']) == {'text/html', 'text/plain'}
    assert got['cells'][2]['outputs'] == [] and got['cells'][3]['outputs'] == []
    assert got['metadata'] == {
        'kernelspec': {
            'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    assert all(c['execution_count'] is None for c in got['cells'])
    assert [c['metadata'] for c in got['cells']] == [
        {}, {}, {}, {}, dict(jupyter=dict(source_hidden=True), cellView='form')]
    before = nb.read_bytes()
    if shutil.which('nbdev_clean'):
        subprocess.run(['nbdev_clean', '--fname', str(nb)], cwd=ROOT, check=True)
        assert nb.read_bytes() == before, (
            'nbdev_clean would change what nntrain_execute writes')

def test_execute_stores_pictures_whatever_the_backend(tmp_path, no_env, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'agg')
    nb = tmp_path/'a.ipynb'
    write_notebook(nb, 'import matplotlib\nprint(matplotlib.get_backend())')
    nntrain_execute([str(nb)])
    [said] = json.loads(nb.read_text())['cells'][0]['outputs'][0]['text']
    assert 'inline' in said


def test_execute_notes_where_symbols_are_drawn(tmp_path, no_env):
    plot = ("import os\nimport matplotlib.pyplot as plt\n"
            "plt.plot([0, 1], label='β = 1'); plt.legend()\n"
            "print('NNTRAIN_SYMBOLS' in os.environ)")
    table = ('<details><summary>The symbols of this chapter</summary>\n\n| symbol | in '
             'code | meaning | values | where |\n|---|---|---|---|---|\n'
             '| $β$ | `beta` | share | | |\n\n</details>\n')
    for name, text in ('a', table), ('b', 'No table'):
        nb = tmp_path/f'{name}.ipynb'
        write_notebook(nb, plot)
        found = json.loads(nb.read_text())
        found['cells'].append(dict(cell_type='markdown', id='m', metadata={},
                                   source=text))
        nb.write_text(json.dumps(found))
    nntrain_execute([str(tmp_path)])
    words = {}
    for name in 'ab':
        nb = json.loads((tmp_path/f'{name}.ipynb').read_text())
        printed, drawn = nb['cells'][0]['outputs']
        found = symbols_drawn(drawn['data']['image/png'])
        words[name] = ''.join(printed['text']), [word for word, *_ in found]
    assert words == {'a': ('True\n', ['β']), 'b': ('False\n', [])}

def test_execute_leaves_a_failing_notebook_alone(tmp_path, no_env, capsys):
    good, bad = tmp_path/'b.ipynb', tmp_path/'a.ipynb'
    write_notebook(good, 'print(1)')
    write_notebook(bad, 'print(1)', '1/0')
    before = bad.read_bytes()
    with pytest.raises(SystemExit) as e: nntrain_execute([str(tmp_path)])
    assert (
        e.value.code == 1 and bad.read_bytes() == before
        and sorted(p.name for p in tmp_path.iterdir()) == ['a.ipynb', 'b.ipynb'])
    assert (
        'ZeroDivisionError' in capsys.readouterr().err
        and json.loads(good.read_text())['cells'][0]['outputs'])

# ---- nntrain_sync --------------------------------------------------------------------

@pytest.fixture
def small_project(tmp_path):
    (tmp_path/'nbs').mkdir()
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/name, tmp_path)
    code = lambda src, *outputs: dict(
        cell_type='code', id='x', source=src, metadata={}, outputs=list(outputs),
        execution_count=None)
    show = dict(
        output_type='execute_result', data={'text/markdown': '| a |\n|---|'},
        metadata={}, execution_count=None)
    index = [
        dict(cell_type='raw', id='r', metadata={}, source='---\ntitle: x\n---'),
        dict(
            cell_type='markdown',
            id='m',
            metadata={},
            source='# T\n\n::: {.callout-tip}\n[c](01_a.ipynb)\n:::',
        ),
        code('#| hide\nsecret()'),
        code('#| echo: false\ntable()', show),
        code('train()'),
    ]
    for name, cells in {
        'index': index,
        '01_a': [
            dict(cell_type='markdown', id='m', metadata={}, source='# A'),
            code('#| default_exp a'),
            code('1+1'),
            code('#| code-fold: true\n2'),
        ],
    }.items():
        (tmp_path / f'nbs/{name}.ipynb').write_text(
            _dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return tmp_path

def test_sync(small_project, capsys):
    with pytest.raises(SystemExit): nntrain_sync(check=True, root=small_project)
    assert (
        'out of step: README.md' in capsys.readouterr().out
        and not (small_project / 'README.md').exists())
    nntrain_sync(root=small_project)
    nntrain_sync(check=True, root=small_project)
    readme = (small_project/'README.md').read_text()
    assert (
        readme.endswith(
            '# T\n\n[c](nbs/01_a.ipynb)\n\n| a |\n|---|\n\n```python\ntrain()\n```\n'
        )
        and 'secret' not in readme
    )
    cells = json.loads((small_project/'nbs/01_a.ipynb').read_text())['cells']
    assert [''.join(c['source']).splitlines()[0] for c in cells] == [
        '# A',
        '#| default_exp a',
        '#| hide',
        '1+1',
        '#| code-fold: true',
    ]

@pytest.mark.parametrize(
    'path, old, new',
    [
        ('README.md', 'train()', 'tran()'),
        ('_quarto.yml', 'repo-subdir: "nbs"', 'repo-subdir: "docs"'),
        ('nbs/01_a.ipynb', '%pip', '%pop'),
        ('nbs/01_a.ipynb', '"source_hidden": true', '"source_hidden": false')],
)
def test_sync_check_finds_what_is_out_of_step(small_project, path, old, new, capsys):
    nntrain_sync(root=small_project)
    text = (small_project/path).read_text()
    assert old in text
    (small_project/path).write_text(text.replace(old, new))
    with pytest.raises(SystemExit) as e: nntrain_sync(check=True, root=small_project)
    assert (
        e.value.code and f'out of step: {path}' in capsys.readouterr().out
        and new in (small_project / path).read_text())
