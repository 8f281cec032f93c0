"""Pages as Quarto gets them (nbdev's processing, no Quarto needed): links, pictures,
citations, headings, code, prose, YAML. What Quarto makes of them: test_built.py.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fastcore.basics import AttrDict
yaml = pytest.importorskip('yaml', reason='the site checks need pyyaml')

import page_checks as checks
from conftest import ROOT
from site_checks import start_browser

from nntrain import diagram, drawing, listing, reference, site, terms
from nntrain.site import TitleProc
from nntrain.tools import _settings

NBS = ROOT/'nbs'
CHAPTERS = sorted(NBS.glob('*.ipynb'))


# ---- links that nbdev makes of names -------------------------------------------------

def test_names_of_other_libraries_are_no_links():
    "`fit` of fastai is not ours, in a typed table as in one that a cell has made"
    fit = '[`fit`](https://x.org/a.html#fit)'
    head = '| here | fastai |\n|---|---|\n'
    table = cell('markdown', f'{head}| {fit} | {fit}, [`fit` ours](02_b.ipynb) |')
    made = cell('code', 'names()', {'text/markdown': [
        '| [[`run`](https://x.org/a.html#run)](02_b.ipynb) |', f' {fit} |']})
    typed, shown = (AttrDict(c) for c in (table, made))
    relink = TitleProc(SimpleNamespace(cells=[]))
    for c in typed, shown: relink(c)
    assert typed.source == f'{head}| {fit} | `fit`, [`fit` ours](02_b.ipynb) |'
    assert shown.outputs[0]['data']['text/markdown'] == (
        '| [`run`](02_b.ipynb) | `fit` |')


def test_a_page_between_two_chapters_keeps_its_letter():
    head = AttrDict(cell_type='raw', source='---\ntitle: Ones\n---\n')
    nb = SimpleNamespace(path_='11b_ones.ipynb', cells=[head])
    TitleProc(nb).begin()
    assert nb.cells[1].source == '# 11b Ones {.unnumbered}'


def titled(name):
    head = "---\ndescription: 'Steps: small'\ntitle: Ones\n---\n"
    nb = SimpleNamespace(path_=name, cells=[AttrDict(cell_type='raw', source=head)])
    TitleProc(nb).begin()
    return [c.source for c in nb.cells]

def test_the_head_of_a_page_describes_it_where_a_card_is_shown():
    head, *below = titled('11_one.ipynb')
    card = {'description': 'Steps: small'}
    assert yaml.safe_load(head.strip().strip('-')) == {
        **card, 'open-graph': card, 'twitter-card': card}
    assert below == ['# 11 Ones {.unnumbered}', '::: {.lead}\nSteps: small\n:::']
    home, *below = titled('index.ipynb')
    assert 'image: images/card.png' in home and 'title: Ones' in home and below == []


def relinked(text):
    made = AttrDict(cell('markdown', text))
    TitleProc(SimpleNamespace(cells=[]))(made)
    return made.source

def test_links_to_names_that_nobody_describes_are_taken_back():
    one, shown = ('[`%s`](https://x.org/%s.html#%s)' % names for names in (
        ('fit', 'a', 'fit'), ('Learner', 'learner', 'learner')))
    assert relinked('[`_run`](x.html#_run) and [`run`](x.html#run)') == (
        '`_run` and [`run`](x.html#run)')
    assert relinked(f'{shown} and [`step`](https://x.org/bugs.html#step)') == (
        f'{shown} and `step`')                                       # a museum's
    assert relinked(f'[{one}](02_b.ipynb#runs), [what {one} does](02_b.ipynb)') == (
        '[`fit`](02_b.ipynb#runs), [what `fit` does](02_b.ipynb)')

@pytest.mark.parametrize('sources, kept', [
    (['# One\n\n> Steps:\n> small\n\nYou **need** two.\n\n- time: an hour'],
     ['# One\n\n> Steps: small', 'You **need** two.\n\n- time: an hour']),
    (['Before.\n\n# One\n\nAfter.\n\n> A quotation'],
     ['# One', 'Before.\n\nAfter.\n\n> A quotation']),
    *((whole, whole) for whole in (
        ['# One\n\n> Steps'], ['# One', 'more'], ['## no title']))])
def test_the_first_cell_loses_nothing(sources, kept):
    nb = SimpleNamespace(cells=[AttrDict(cell('markdown', s)) for s in sources])
    TitleProc(nb)
    assert [c.source for c in nb.cells] == kept


# ---- the reference and diagrams ------------------------------------------------------

def test_comments_belong_to_the_parameter_they_are_at():
    text = """__all__ = ['f']
def f(
    # the
    # first
    a,
    b,  # behind
        # it
    c,
    # above
    d): ..."""
    [entry] = reference.entries(text)
    assert [m for *_, m in entry.params] == ['the first', 'behind it', '', 'above']

EMA = '''def ema(
    xs,        # (T,) values,
               # any unit
    beta=0.9,  # share that is kept
)->list:       # (T,) averages
    "Running mean of `xs`"
'''
AVERAGES = f'''"Averages"
__all__ = ['ema', 'Mean', 'BETA', 'LOW', 'HIGH']
# %% ../nbs/10_momentum.ipynb #abc
BETA = .9  # the usual one
LOW, (HIGH, _inner) = 0, (1, 2)
{EMA}
class Mean(Base):
    "Mean so far"
    def add(self, x): "Take in `x`"
    def _hide(self): "Not for you"
@patch
def reset(self:Mean): "Forget all"
'''

def test_entries_of_a_module():
    names = 'BETA LOW HIGH ema Mean Mean.add Mean.reset'.split()
    found = {e.name: e for e in reference.entries(AVERAGES)}
    assert list(found) == names
    assert {e.notebook for e in found.values()} == {'10_momentum.ipynb'}
    assert found['ema'].signature == 'ema(xs, beta=0.9) -> list'
    assert found['ema'].params == [
        ('xs', '', '', '(T,) values, any unit'),
        ('beta', '', '0.9', 'share that is kept'),
        ('returns', 'list', '', '(T,) averages')]

def test_a_page_of_the_reference(tmp_path):
    text = reference.reference_page('momentum', AVERAGES, {'Mean': 'momentum'})
    assert '## `Mean` {#Mean}' in text and '### `Mean.add` {#Mean.add}' in text
    assert '| `xs` |  |  | (T,) values, any unit |' in text
    assert '[built here](../10_momentum.ipynb#mean.add)' in text
    assert reference._to_entries('a `Mean` of `xs`', {'Mean': 'momentum'}) == (
        'a [`Mean`](momentum.qmd#Mean) of `xs`')
    assert reference._escaped('in [0, 1) or `x[0]`') == r'in \[0, 1) or `x[0]`'
    (tmp_path/'momentum.py').write_text(AVERAGES, encoding='utf-8')
    assert reference.reference_names(tmp_path)['Mean.reset'] == 'momentum'

def test_a_diagram_is_read_and_drawn():
    assert diagram._wrapped('collect parameters with a gradient') == (
        'collect parameters', 'with a gradient')
    d = diagram.read_diagram(
        'flowchart LR\n A[one] -->|then| B & C --> D(["the <b>end</b>"])')
    assert [a[:2] for a in d.arrows] == [('A', 'B'), ('A', 'C'), ('B', 'D'), ('C', 'D')]
    assert [b.lines for b in d.boxes.values()] == [
        ('one',), ('B',), ('C',), ('the <b>end</b>',)]
    assert d.arrows[0] == ('A', 'B', 'then', False, False)
    picture = drawing.draw_diagram(
        'flowchart LR\n A["x &lt; <b>y</b>"] -.->|why?| B([C])')
    assert 'aria-label="Diagram: x &lt; y → C (why?)"' in picture
    assert 'x &lt; <tspan font-weight="700">y</tspan>' in picture
    assert 'dasharray' in picture

@pytest.mark.parametrize('wrong', [
    'sequenceDiagram\n A', 'flowchart LR\n A ==> B', 'flowchart LR\n --> B'])
def test_a_diagram_that_cannot_be_read_is_refused(wrong):
    with pytest.raises(ValueError): diagram.read_diagram(wrong)

def test_a_long_arrow_has_a_place_in_each_row():
    d = diagram.read_diagram('flowchart TD\n A --> B --> C\n A --> C')
    ways = diagram._rows(d)
    assert {n: b.row for n, b in d.boxes.items()} == dict(A=0, B=1, C=2) | {'2@1': 1}
    assert ways[2] == ['A', '2@1', 'C']
    a, b = diagram._arranged(d, ways)[1]
    assert b.x - a.x >= (a.width + b.width)/2 + 22 - 1e-6      # side by side, 22 apart
    with pytest.raises(ValueError, match='circle'):
        diagram._rows(diagram.read_diagram('flowchart TD\n A --> B --> A'))
    assert diagram._wrapped('one<br>two') == ('one', 'two')
    assert diagram._text_width('wide') > diagram._text_width('till')

def test_a_place_that_a_heading_names():
    assert listing._slug('A *b* {#sec-x}') == 'sec-x'


# ---- the checkers can fail -----------------------------------------------------------

def cell(kind, text, data=None):
    outs = [dict(output_type='display_data', data=data)] if data else []
    return dict(cell_type=kind, source=text, metadata={},
                **(dict(outputs=outs) if kind == 'code' else {}))

def page(*cells): return dict(metadata={}, cells=[cell(*c) for c in cells])

def prose(*texts): return page(*(['markdown', text] for text in texts))

def test_headings_can_fail():
    assert len(checks.heading_problems(prose('## a\n\n#### b'))) == 2
    assert len(checks.heading_problems(prose('# a\n\n#### b', '# c'))) == 2

def test_links_can_fail(tmp_path):
    (tmp_path/'api.qmd').write_text('## f {#f}')
    bad = prose('see [x](99_none.ipynb), [y](#nowhere), ![z](images/none.png), '
                '[ok](03_data.ipynb), [f](api.qmd#f), [g](api.qmd#g) and [here](#a-b)'
                '\n\n## A b')
    found = checks.link_problems(bad, tmp_path, {'03_data.ipynb'})
    assert len(found) == 4 and 'api.qmd has no #g' in found

def test_citations_can_fail():
    bad = prose('[@nobody1999] and @fig-none, not a@b.c, `@x`, @good')
    assert checks.citation_problems(bad, {'good'}) == ['unknown @nobody1999',
                                                       'unknown @fig-none']

def test_syntax_can_fail():
    bad = prose('$\\sqrtβ$ and $\\sqrt{β}$', '::: {.lead}\nx\n:::',
                '::: {.callout-note title="say "boot""}')
    assert len(checks.syntax_problems(bad)) == 2

def test_alt_can_fail():
    picture, figure = {'image/png': 'x'}, '<svg role="img" aria-label="no">'
    bad = page(['markdown', '![](a.png)'], ['code', 'plot()', picture],
               ['code', '#| fig-alt: "short"\nplot()', picture],
               ['code', 'explore()', {'text/markdown': figure}])
    assert len(checks.alt_problems(bad)) == 4

def test_html_can_fail():
    script = '<script src="https://cdn.example/x.js">'
    bad = page(['code', 'a', {'text/html': '<b>'}],
               ['code', 'b', {'text/markdown': script}],
               ['code', 'c', {'application/vnd.jupyter.widget-view+json': {}}],
               ['markdown', '```mermaid\nsequenceDiagram\n```'])
    bad['metadata']['widgets'] = {}
    assert len(checks.html_problems(bad)) == 5

def test_colab_can_fail():
    s = _settings(ROOT)
    blob = 'https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/'
    def under(name, taken):
        link = f'[Open in Colab]({blob.format(**s)}{name})'
        link += f' [Notebook](download:{taken})'
        nb = page(['raw', ''], ['markdown', link], ['code', '1'])
        return checks.colab_problems(nb, name)
    nothing = page(['raw', ''], ['markdown', 'no link'], ['code', '1'])
    assert checks.colab_problems(nothing, '94_tools.ipynb')
    assert under('99_none.ipynb', '99_none.ipynb')
    assert under('94_tools.ipynb', '93_recording.ipynb')
    assert not under('94_tools.ipynb', '94_tools.ipynb')

def test_drift_can_fail():
    data = '{"fn":"f","src":"0000000000","id":"nnx-f-1"}'
    html = {'text/html': f'<script>/*data*/{data}/*end*/</script>'}
    assert checks.drift_problems(page(['code', 'def f(a): return a'],
                                      ['code', 'explore(f)', html]))

def test_options_can_fail():
    bad = page(['code', '#| code-fold: show\n#| code-fold: true\n1'],
               ['code', '#| code-fold: true'])
    assert checks.option_problems(bad) == ['option code-fold twice in one cell']

def test_titles_can_fail():
    bad = page(['raw', '---\ntitle: 6\n---'], ['markdown', '# Momentum'])
    assert len(checks.title_problems(bad, '10_momentum.ipynb')) == 2

def test_hidden_code_can_fail():
    stored = page(['code', '#| export\ndef f(): pass'])
    assert checks.hidden_code(page(['code', 'show_doc(f)']), stored) == [
        "not shown: 'def f(): pass'", "signature table: 'show_doc(f)'"]

def test_lost_text_can_fail():
    stored = prose('# Title\n\n> Promise\n\nYou **need** `two` [things](a.md).\n\n'
                   '<details><summary>Hint</summary>')
    shown = page(['raw', '---\ndescription: Promise\ntitle: Title\n---'],
                 ['markdown', 'You need [`two`](https://x.org/a_b.html) '
                              '[things](a.html){.term data-meaning="x"}.'])
    assert checks.lost_text(shown, stored) == [
        "lost: '<details><summary>Hint</summary>'"]
    nothing = page(['raw', '---\ntitle: Title\n---'])
    assert len(checks.lost_text(nothing, stored)) == 3


# ---- the book ------------------------------------------------------------------------

DRIVER = """
import json, traceback
import nbdev.serve, nbdev.serve_drv
one, failed = nbdev.serve_drv.main, {}
def main(job):
    try: one(job)
    except Exception: failed[job[0].name] = traceback.format_exc()[-2000:]
nbdev.serve_drv.main = main
out = nbdev.serve.proc_nbs(force=True, n_workers=0)
(out/'failed.json').write_text(json.dumps(failed))
"""

@pytest.fixture(scope='session')
def processed(tmp_path_factory):
    """What `nbdev_docs` hands to Quarto, made in a copy so that the checkout stays
    clean: {name: notebook}"""
    pytest.importorskip('nbdev', reason='the site checks need nbdev')
    top = tmp_path_factory.mktemp('site')
    leave = shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__')
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/name, top)
    for name in ('nbs', 'nntrain'):
        shutil.copytree(ROOT/name, top/name, symlinks=True, ignore=leave)
    done = subprocess.run([sys.executable, '-c', DRIVER], cwd=top, capture_output=True,
                          text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr[-3000:]
    out = top/'_proc'
    assert (out/'_quarto.yml').is_file() and not (out/'_quarto.yml').is_symlink()
    for name in ('images/favicon.svg', 'fonts/math.woff2'):
        assert (out/name).is_file(), f'no {name}: recursive = True in settings.ini?'
    failed = json.loads((out/'failed.json').read_text(encoding='utf-8'))
    pages = {p.name: json.loads(p.read_text(encoding='utf-8'))
             for p in sorted(out.glob('*.ipynb'))}
    return {'folder': out, **pages, **failed}

def bib_keys():
    text = (NBS/'references.bib').read_text(encoding='utf-8')
    return re.findall(r'^@\w+\{([^,\s]+),', text, re.M)

@pytest.mark.parametrize('name', [p.name for p in CHAPTERS])
def test_page(processed, name):
    nb = processed[name]
    stored = json.loads((NBS/name).read_text(encoding='utf-8'))
    assert isinstance(nb, dict), f'nbdev_docs fails:\n{nb}'
    found = {
        'title': checks.title_problems(nb, name),
        'options': checks.option_problems(nb),
        'headings': checks.heading_problems(nb),
        'links': checks.link_problems(nb, processed['folder'], set(processed)),
        'citations': checks.citation_problems(nb, set(bib_keys())),
        'alt': checks.alt_problems(nb),
        'syntax': checks.syntax_problems(nb),
        'html': checks.html_problems(nb),
        'colab': checks.colab_problems(nb, name),
        'code': checks.hidden_code(nb, stored),
        'prose': checks.lost_text(nb, stored)}
    assert not any(found.values()), {k: v for k, v in found.items() if v}

@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.name)
def test_stored_notebook(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert not checks.drift_problems(nb), checks.drift_problems(nb)
    assert 'widgets' not in nb['metadata'], (
        'metadata.widgets makes "Invalid notebook" on GitHub: run nntrain_execute')
    widgets = [checks.source(c)[:60] for c, data in checks.outputs(nb)
               if 'application/vnd.jupyter.widget-view+json' in data]
    assert not widgets, f'views of a lost kernel: run nntrain_execute: {widgets}'

def places(nb):
    texts = [checks.source(c) for c in nb['cells'] if c['cell_type'] == 'markdown']
    return checks.slugs('\n'.join(
        re.sub(r'^```.*?^```', '', text, flags=re.M | re.S) for text in texts))

def test_reference(processed):
    "A page a module, which Quarto is told of; each entry leads back to the code"
    modules = {p.stem for p in (ROOT/'nntrain').glob('[a-z]*.py')}
    pages = {p.stem: p.read_text(encoding='utf-8')
             for p in (processed['folder']/'api').glob('*.qmd')}
    assert set(pages) == modules
    cfg = (ROOT/'_quarto.yml').read_text(encoding='utf-8')
    assert set(re.findall(r'- api/(\w+)\.qmd', cfg)) == modules, 'run nntrain_sync'
    for name, text in pages.items():
        for nb, place in re.findall(r'\[built here\]\(\.\./([\w.]+)#([\w.]+)\)', text):
            assert place in places(processed[nb]), f'{name}: no #{place} in {nb}'

def listed(parts):
    for c in parts: yield from [c] if isinstance(c, str) else c['chapters']

def test_quarto_yaml():
    cfg = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    s, html, book = _settings(ROOT), cfg['format']['html'], cfg['book']
    link = NBS/'_quarto.yml'
    assert link.is_symlink() and not os.path.isabs(os.readlink(link))
    assert cfg['project']['output-dir'] == s['doc_path'], 'nbdev_docs moves that folder'
    assert not (NBS/s['readme_nb']).exists(), (
        'nbdev_docs would render README.md itself, which fails in a book project')
    assert (ROOT/'_proc'/cfg['project']['post-render']).resolve().is_file()
    pages = [p for p in listed(book['chapters'] + book['appendices'])
             if not p.startswith('api/')]
    notebooks = sorted(p for p in pages if p.endswith('.ipynb'))
    assert notebooks == [p.name for p in CHAPTERS], (
        'chapters in _quarto.yml and notebooks in nbs/ differ')
    numbered = [p for p in pages if p[0].isdigit()]
    assert numbered == sorted(numbered) and pages[0] == 'index.ipynb'
    themes = [t for mode in html['theme'].values() for t in mode if t.endswith('.scss')]
    for f in [cfg['bibliography'], html['css'], html['include-after-body'],
              book['favicon'], book['image'], '404.qmd', 'references.qmd',
              *cfg['project']['resources'], *themes]:
        assert (NBS/f).exists(), f

def test_social_card(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'scripts')
    import social_card
    assert social_card.stale() is None
    assert social_card.stale(social_card.COVER) is None
    assert 'run scripts/social_card.py' in social_card.stale(tmp_path/'none.png')
    monkeypatch.setattr(social_card, 'numbers', lambda: 'others')
    assert 'the rows say others' in social_card.stale()

def test_bibliography():
    assert len(bib_keys()) == len(set(bib_keys())), 'a key stands twice'


def test_names_of_an_assignment_to_several_are_several():
    source = "A, (B, *_c) = 1, (2, 3)\nC = D = 3\nE['x'] = 4\nE.y = 5\nF: int = 6"
    top, _ = listing._defined(source)
    assert top == ['A', 'B', '_c', 'C', 'D']
    text = f"__all__ = ['A', 'B', 'C', 'D', 'E', 'F']\n{source}"
    assert [e.name for e in reference.entries(text)] == ['A', 'B', 'C', 'D', 'F']


# ---- the processors, each on a notebook of its own -----------------------------------

def as_cell(source, kind='code', **directives):
    return AttrDict(cell_type=kind, source=source, directives_=directives, id='1')

@pytest.fixture
def notebook(tmp_path):
    "A maker of notebooks in a small project"
    (tmp_path/'settings.ini').write_text(
        '[DEFAULT]\nuser = me\nrepo = mini\nbranch = main\nlib_path = mini\n'
        'author = Me\ndoc_host = https://me.org\ndoc_baseurl = /mini\n'
        'git_url = https://github.com/me/mini\n', encoding='utf-8')
    for folder in 'mini', 'nbs', '_proc': (tmp_path/folder).mkdir()
    (tmp_path/'mini/momentum.py').write_text(AVERAGES, encoding='utf-8')
    def make(*cells, name='10_momentum.ipynb'):
        return SimpleNamespace(path_=str(tmp_path/'nbs'/name), cells=list(cells))
    return make

def test_places_and_names_of_a_cell():
    assert listing._slug('Where `eps` *stands*?') == 'where-eps-stands'
    assert listing._slug('2. β₂ and v1.0') == 'β₂-and-v1.0'
    assert listing._defined(
        'A = 1\nclass B:\n  def f(self): ...\n@patch\ndef g(self:B): ...') == (
            ['A', 'B', 'B.g'], ['B.f'])

def test_names_stand_above_their_cell(notebook, tmp_path):
    nb = notebook(
        as_cell('# Averages', 'markdown'), as_cell('import torch'),
        as_cell('class Mean: ...', default_exp=['momentum']),
        as_cell('class Mean:\n  def add(self, x): ...', export=[]))
    proc = listing.SourceProc(nb)
    del nb.cells[2]  # nbdev takes this cell away
    proc.begin()
    assert nb.cells[2].source == (
        '::: {.exported}\n[`Mean`](api/momentum.qmd#Mean){#mean}[]{#mean.add}\n:::')
    assert [list(c.directives_) for c in nb.cells[3:]] == [['exports']]
    page = (tmp_path/'_proc/api/momentum.qmd').read_text(encoding='utf-8')
    assert '{#Mean.reset}' in page
    proc(nb.cells[1])
    assert nb.cells[1].source.startswith('#| code-fold: true\n')

def test_where_a_page_runs_and_how_to_cite_it(notebook, tmp_path):
    nb = notebook(as_cell('title: Means', 'raw'), as_cell('1+1'))
    site.TakeAwayProc(nb).begin()
    assert '/me/mini/blob/main/nbs/10_momentum.ipynb)' in nb.cells[1].source
    assert '(download:10_momentum.ipynb)' in nb.cells[1].source
    assert '@misc{mini-momentum,\n  title = {Means},' in nb.cells[-1].source
    assert site._changed(tmp_path, 'nbs') is None  # no repository

@pytest.mark.parametrize('name, title', [
    ('00_a.ipynb', '# 0 Ones'), ('09_a.ipynb', '# 9 Ones'), ('80_a.ipynb', '# Ones')])
def test_only_chapters_have_numbers(name, title):
    assert titled(name)[1] == title + ' {.unnumbered}'

def test_figures_that_need_nothing_go_as_they_are():
    made = as_cell('explore(…)')
    made.outputs = [
        dict(data={'text/html': '<b>ours</b><p class="nnx-n">Run it</p>',
                   'application/vnd.jupyter.widget-view+json': {}}),
        dict(data={'text/html': '<script src="https://x.org/a.js"></script>'})]
    site.InlineHTMLProc(None)(made)
    ours, theirs = (o['data'] for o in made.outputs)
    assert ours == {'text/markdown': '````{=html}\n<b>ours</b>\n````'}
    assert list(theirs) == ['text/html']  # the checks of pages complain

def test_boxes_and_diagrams():
    text = 'a\n\n> ⚠ **You would expect "x" · it is y**\n>\n> b\n>\n> c\n\nd'
    assert site._for_quarto(text) == (
        'a\n\n::: {.callout-warning title="You would expect “x” · it is y"}\n'
        'b\n\nc\n:::\n\nd')
    quoted = '> **Both** are quoted.\n>\n> b'
    cells = [as_cell(s, 'markdown') for s in (
        '> **Predict**\n>\n> b', quoted, '```mermaid\nflowchart LR\n A --> B\n```')]
    site.BoxesProc(SimpleNamespace(cells=[*cells, as_cell('1 > 0')]))
    assert cells[0].source == '::: {.callout-note title="Predict"}\nb\n:::'
    assert cells[1].source == quoted
    assert cells[2].source.startswith('````{=html}\n<div class="diagram"><svg')

def test_a_term_says_its_meaning_once(notebook, tmp_path):
    entry = '**epoch**: one `round` over the data. [Chapter 4](04_learner.ipynb#levels)'
    (tmp_path/'nbs/97_glossary.ipynb').write_text(
        json.dumps(dict(cells=[dict(source=entry)])), encoding='utf-8')
    assert terms._glossary(tmp_path/'nbs')[0] == {
        'epoch': ('one round over the data.', '04_learner.ipynb')}
    def seen(name, text):
        nb = notebook(as_cell('# T', 'markdown'), as_cell(text, 'markdown'), name=name)
        terms.GlossaryProc(nb)
        return nb.cells[1].source
    link = ('[Epochs](97_glossary.ipynb#term-epoch)'
            '{.term data-meaning="one round over the data."}')
    before = '## Epoch\n\n`epoch` $epoch$. '
    assert seen('10_momentum.ipynb', f'{before}Epochs: an epoch') == (
        f'{before}{link}: an epoch')
    assert seen('04_learner.ipynb', 'An epoch') == 'An epoch'  # the page that builds it
    assert seen('97_glossary.ipynb', entry) == '[]{#term-epoch}' + entry


# ---- our script and style, on a phone ------------------------------------------------

DEEP = 'return torch.stack([(dL_dtp * t_u).sum(),', ' '*24 + 'dL_dtp.sum()])'
PHONE = '''<!DOCTYPE html><html><head><style>{style}
body {{ margin: 0 16px; --bs-body-bg: white }} figure {{ margin: 0 }}
</style></head><body><main>
<pre class="sourceCode"><code class="sourceCode">{code}</code></pre>
<div class="cell-output cell-output-display"><div><figure><p><img alt="plot"
src="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='700'
height='200'/%3E"></p><figcaption>{words}</figcaption></figure></div></div>
<math display="block"><mrow>{sum}</mrow></math></main>{script}</body></html>'''

def test_plots_code_and_formulas_on_a_phone():
    """A wide plot is larger than the screen, scrolls, and can be reached by keyboard,
    as can a long formula, with a shadow where there is more; a line of code that is
    far to the right has room for its words"""
    html = PHONE.format(
        style=(NBS/'styles.css').read_text('utf-8'), words='words '*30,
        script=(NBS/'page.html').read_text('utf-8'),
        code='\n'.join(f'<span>{line}</span>' for line in DEEP),
        sum='<mi>x</mi><mo>+</mo>'*40)
    with start_browser() as browser:
        page = browser.new_page(viewport=dict(width=360, height=700))
        page.set_content(html, wait_until='load')
        wide, plot, inside = page.evaluate('''() => {
          const img = document.querySelector('img'), box = img.parentElement
          return [document.documentElement.scrollWidth, img.clientWidth,
                  [box.scrollWidth > box.clientWidth, box.tabIndex]] }''')
        assert wide <= 360 and 500 < plot < 600 and inside == [True, 0]
        formula = page.evaluate('''() => { const e = document.querySelector('math')
          const style = getComputedStyle(e)
          return [e.tabIndex, style.backgroundImage.includes('radial')] }''')
        assert formula == [0, True]
        high = page.evaluate('''[...document.querySelectorAll('pre span')]
            .map(e => e.getBoundingClientRect().height)''')
        assert max(high) < 45, 'a line of code takes more than two lines'
