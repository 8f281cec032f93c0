"""The pages around the chapters: home page, results, and links from page to page.

They say things about the rest of the project (what was measured, where a thing is
built). Each saying is compared with its source, and each comparison is fed something
false, too."""
import ast
import copy
import json
import re
import shutil

import pytest
from conftest import ROOT
from page_places import (
    NBS, PAGES, anchor, anchors, ok, outputs, prose, read, small, source)

import nntrain.results


def trains(cell):
    return '.fit(' in source(cell)  # shows times: another text on every run

def shown(nb):
    """Texts that the code cells of a page show (Markdown, else plain text), in order;
    pictures and set-up cells left out"""
    texts = []
    for cell in nb['cells']:
        for out in () if trains(cell) else cell.get('outputs', ()):
            data = out.get('data', {})
            if 'image/png' in data: continue
            text = data.get('text/markdown') or data.get('text/plain')
            texts.append(''.join(text or out.get('text', '')))
    return texts

def text_of(value):
    "What a notebook would show of a value"
    if hasattr(value, '_repr_mimebundle_'): forms = value._repr_mimebundle_()
    elif hasattr(value, '_repr_markdown_'):
        forms = {'text/markdown': value._repr_markdown_()}
    else: forms = {}
    return forms.get('text/markdown') or forms.get('text/plain') or repr(value)

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
        if cell['cell_type'] != 'code' or '%pip' in source(cell): continue
        if trains(cell) or re.search(r'\blearn\.', source(cell)): continue
        *body, last = ast.parse(source(cell)).body
        if not isinstance(last, ast.Expr): body, last = [*body, last], None
        exec(compile(ast.Module(body, []), 'page', 'exec'), space)
        if last is None: continue
        value = eval(compile(ast.Expression(last.value), 'page', 'eval'), space)
        if value is not None: texts.append(text_of(value))
    plt.close('all')
    return texts

def drift(nb, monkeypatch):
    "What a page shows and what it would show now differ here"
    old, new = shown(nb), show_again(nb, monkeypatch)
    pairs = [(x.splitlines(), y.splitlines()) for x, y in zip(old, new)]
    lines = [(a, b) for x, y in pairs for a, b in zip(x, y) if a != b]
    found = [f'{a!r} is now {b!r}' for a, b in lines]
    if len(old) != len(new): found.append(f'{len(old)} outputs, now {len(new)}')
    return found + [f'{len(x)} lines, now {len(y)}: {x[0][:60]!r}'
                    for x, y in pairs if len(x) != len(y)]


# ---- results -------------------------------------------------------------------------

RESULTS = '95_results.ipynb'
ROW = 'schedulers-one-cycle'

@pytest.fixture
def other_results(tmp_path, monkeypatch):
    "A copy of the recorded rows that the pages read instead"
    folder = tmp_path/'results'
    shutil.copytree(ROOT/'results', folder)
    monkeypatch.setattr(nntrain.results, '_results_dir', lambda: folder)
    return folder

@pytest.mark.parametrize('name', ['index.ipynb', RESULTS])
def test_page_shows_what_results_say(name, monkeypatch):
    ok(drift(read(NBS/name), monkeypatch),
       f'run: nntrain_execute nbs/{name}; nntrain_sync')

def test_a_changed_row_is_noticed(monkeypatch, other_results):
    path = other_results/f'{ROW}.json'
    path.write_text(json.dumps(read(path) | dict(mean=0.9171)))
    assert any(ROW in line for line in drift(read(NBS/RESULTS), monkeypatch))

def test_changed_rows_are_noticed_on_the_home_page(monkeypatch, other_results):
    now = show_again(read(NBS/'index.ipynb'), monkeypatch)
    for path in other_results.glob('*.json'):
        row = read(path)
        values = [v + .01 for v in row['values']]
        path.write_text(json.dumps(row | dict(mean=row['mean'] + .01, values=values)))
    assert show_again(read(NBS/'index.ipynb'), monkeypatch) != now

def test_a_new_row_and_a_new_benchmark_are_noticed(monkeypatch, other_results):
    nb, row = read(NBS/RESULTS), read(other_results/f'{ROW}.json')
    before = drift(nb, monkeypatch)
    new = row | dict(experiment='schedulers-zzz')
    (other_results/'schedulers-zzz.json').write_text(json.dumps(new))
    bench = row | dict(experiment='bench-a-b', against='a', limit=1.1, per='step',
                       values=[1.0, 1.2, 1.05])
    (other_results/'bench-a-b.json').write_text(json.dumps(bench))
    # the table of the chapter and the one of benchmarks
    found = [line for line in drift(nb, monkeypatch) if line not in before]
    assert sum('lines, now' in line for line in found) >= 2, found
    assert any('| a-b |' in text and 'at most 1.1: met' in text
               for text in show_again(nb, monkeypatch))

def speed_problems(nb, benches):
    "Recorded benchmarks that the page shows not at all, twice, in a wall, or as a slug"
    tables = [text for text in outputs(nb, 'text/markdown') if '(quartiles)' in text]
    lines = [line for text in tables for line in text.splitlines()
             if re.match(r'\| [^|]+ \| [\d.e+-]+\xa0(s|ms|µs) \|', line)]
    bad = [f'a slug: {line[:50]}' for line in lines
           if re.match(r'\| \S*-\S*-\S+ \|', line)]
    if len(lines) != len(benches):
        bad.append(f'{len(benches)} rows, {len(lines)} shown')
    blocks = '\n\n'.join(tables).split('\n\n')
    longest = max(block.count('\n') for block in blocks)
    return bad + [f'a table of {longest} lines']*(longest > 14)

def test_benchmarks_stand_in_short_tables_in_words():
    benches = [p.stem for p in (ROOT/'results').glob('bench-*.json')]
    ok(speed_problems(read(NBS/RESULTS), benches))
    wall = '| what (quartiles) |\n|--|\n' + '| a-b-c | 1\xa0s |\n'*15
    bad = small(('code', 'speed()', {'text/markdown': wall}))
    assert len(speed_problems(bad, benches[:1])) == 17

def test_a_typed_number_is_noticed(monkeypatch):
    nb = copy.deepcopy(read(NBS/RESULTS))
    for cell in nb['cells']:
        for out in cell.get('outputs', ()):
            text = ''.join(out.get('data', {}).get('text/markdown', ''))
            text = text.replace('`initialization-cnn`', '`04-cnm`')
            if text: out['data']['text/markdown'] = text
    assert any('04-cnm' in line for line in drift(nb, monkeypatch))


# ---- links from page to page ---------------------------------------------------------

LINK = re.compile(r'\]\((?!https?:)([\w.-]+\.ipynb(?:#[^)\s]+)?)\)|'
                  r'href="(?!https?:)([\w.-]+\.ipynb(?:#[^"]+)?)"')

def dead_anchors(nb, pages):
    """Links of a page (in its text, and in the Markdown and the HTML that it shows) to
    a page or a heading that is not there; `pages`: {name: anchors}"""
    texts = prose(nb) + outputs(nb, 'text/markdown') + outputs(nb, 'text/html')
    found = []
    for link in sorted({a or b for text in texts for a, b in LINK.findall(text)}):
        page, _, place = link.partition('#')
        if page not in pages: found.append(f'{link}: no such page')
        elif place and place not in pages[page]:
            found.append(f'{link}: no such heading')
    return found

@pytest.mark.parametrize('name', PAGES)
def test_links_lead_to_headings(name): ok(dead_anchors(read(NBS/name), PAGES))

def test_dead_anchors_can_fail():
    nb = small(('markdown', '## A *b*: c?\n\n[x](p.ipynb#a-b-c) [x](p.ipynb#a-b-d) '
                            '[x](q.ipynb) [x](https://x.org/q.ipynb#z)', None),
               ('code', 'x.fit(1)', {'text/markdown': '[x](p.ipynb#none)',
                                     'text/html': '<a href="p.ipynb#nil">'}))
    assert anchors(nb) == {'a-b-c'}
    dead = dead_anchors(nb, {'p.ipynb': {'a-b-c'}})
    assert [line.split(':')[0] for line in dead] == [
        'p.ipynb#a-b-d', 'p.ipynb#nil', 'p.ipynb#none', 'q.ipynb']

@pytest.mark.parametrize('heading, identifier', [
    ('How large may a step be?', 'how-large-may-a-step-be'),
    ('Where `eps` stands', 'where-eps-stands'),
    ("PyTorch's schedulers", 'pytorchs-schedulers'),
    ('One-cycle, once', 'one-cycle-once'),
    ('A *b* {#sec-x}', 'sec-x'),
    ('3 things', 'things'),
    ('`init_weights`', 'init_weights'), ('β₂ and torch.optim', 'β₂-and-torch.optim'),
    ('[Link](x.ipynb) here', 'link-here')])
def test_anchor_is_that_of_pandoc(heading, identifier):
    assert anchor(heading) == identifier
