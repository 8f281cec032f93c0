"""The pages around the chapters: home page and map, results, names, glossary, bibliography.

They say things about the rest of the project (what was measured, who needs whom, where a term is built). Each saying is compared with its source, and each
comparison is fed something false, too.
"""
import ast
import copy
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

import nntrain.book

NBS = ROOT/'nbs'


def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])

def trains(cell): return '.fit(' in source(cell)  # shows times: another text on every run

def shown(nb):
    "Texts that the code cells of a page show (Markdown, else plain text), in order; pictures and set-up cells left out"
    texts = []
    for cell in nb['cells']:
        for out in () if trains(cell) else cell.get('outputs', ()):
            data = out.get('data', {})
            if 'image/png' not in data: texts.append(''.join(data.get('text/markdown') or data.get('text/plain') or out.get('text', '')))
    return texts

def show_again(nb, monkeypatch):
    "The same texts, computed now"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    monkeypatch.setattr(plt, 'show', lambda: plt.close('all'))
    monkeypatch.delenv('NNTRAIN_RECORD', raising=False)
    monkeypatch.chdir(NBS)
    texts, space = [], {'__name__': '__page__'}
    for cell in nb['cells']:
        if cell['cell_type'] != 'code' or '%pip' in source(cell) or trains(cell) or re.search(r'\blearn\.', source(cell)): continue
        *body, last = ast.parse(source(cell)).body
        exec(compile(ast.Module(body, []), 'page', 'exec'), space)
        if not isinstance(last, ast.Expr): exec(compile(ast.Module([last], []), 'page', 'exec'), space); continue
        value = eval(compile(ast.Expression(last.value), 'page', 'eval'), space)
        if value is not None: texts.append(value._repr_markdown_() if hasattr(value, '_repr_markdown_') else repr(value))
    plt.close('all')
    return texts

def drift(nb, monkeypatch):
    "What a page shows and what it would show now differ here"
    old, new = shown(nb), show_again(nb, monkeypatch)
    lines = [(a, b) for x, y in zip(old, new) for a, b in zip(x.splitlines(), y.splitlines()) if a != b]
    return [f'{a!r} is now {b!r}' for a, b in lines[:5]] + [f'{len(old)} outputs, now {len(new)}']*(len(old) != len(new)) + \
           [f'{len(x.splitlines())} lines, now {len(y.splitlines())}: {x[:60]!r}' for x, y in zip(old, new) if len(x.splitlines()) != len(y.splitlines())]

def ok(problems, todo=''): assert not problems, '\n'.join([*problems, todo])


# ---- results ------------------------------------------------------------------------------------------------------------

RESULTS_PAGES = [p for p in ('index.ipynb', '91_results.ipynb') if (NBS/p).exists()]

@pytest.fixture
def other_results(tmp_path, monkeypatch):
    "A copy of the recorded rows that the pages read instead"
    folder = tmp_path/'results'
    shutil.copytree(ROOT/'results', folder)
    monkeypatch.setattr(nntrain.book, '_results_dir', lambda: folder)
    return folder

@pytest.mark.parametrize('name', RESULTS_PAGES)
def test_page_shows_what_results_say(name, monkeypatch):
    ok(drift(read(NBS/name), monkeypatch), f'run: nntrain_execute nbs/{name}; nntrain_sync')

@pytest.mark.parametrize('name', RESULTS_PAGES)
def test_a_changed_row_is_noticed(name, monkeypatch, other_results):
    row = read(other_results/'10-one-cycle.json')
    (other_results/'10-one-cycle.json').write_text(json.dumps(row | dict(mean=.9171)))
    assert any('10-one-cycle' in line or '0.917' in line for line in drift(read(NBS/name), monkeypatch))

def test_a_new_row_and_a_new_benchmark_are_noticed(monkeypatch, other_results):
    row = read(other_results/'10-one-cycle.json')
    (other_results/'10-zzz.json').write_text(json.dumps(row | dict(experiment='10-zzz')))
    bench = row | dict(experiment='bench-a-b', against='a', limit=1.1, per='step', values=[1., 1.2, 1.05])
    (other_results/'bench-a-b.json').write_text(json.dumps(bench))
    found = drift(read(NBS/'91_results.ipynb'), monkeypatch)
    assert any('lines, now' in line for line in found) and any('No benchmark' in line for line in found)
    assert any('| `a-b` |' in text and '≤ 1.1: met' in text for text in show_again(read(NBS/'91_results.ipynb'), monkeypatch))

def test_a_typed_number_is_noticed(monkeypatch):
    nb = copy.deepcopy(read(NBS/'91_results.ipynb'))
    for cell in nb['cells']:
        for out in cell.get('outputs', ()):
            if 'text/markdown' in out.get('data', {}): out['data']['text/markdown'] = ''.join(out['data']['text/markdown']).replace('`04-cnn`', '`04-cnm`')
    assert any('04-cnm' in line for line in drift(nb, monkeypatch))
