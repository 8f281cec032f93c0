"The pages as Quarto gets them (nbdev's processing, no Quarto needed): links, pictures, citations, headings, Colab links, YAML."
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
yaml = pytest.importorskip('yaml', reason='the site checks need pyyaml')

from nntrain.book import _outside, _settings, figure_data

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
CHAPTERS = sorted(NBS.glob('*.ipynb'))


def source(cell): return ''.join(cell['source'])
def prose(nb): return [re.sub(r'```.*?```|`[^`]*`', '', source(c), flags=re.S) for c in nb['cells'] if c['cell_type']=='markdown']
def outputs(nb): return [(c, o.get('data', {})) for c in nb['cells'] if c['cell_type']=='code' for o in c['outputs']]

def front_matter(nb):
    first = nb['cells'][0]
    return yaml.safe_load(source(first).strip().strip('-')) if first['cell_type']=='raw' else {}

# --- checkers: each returns what is wrong -------------------------------------------------------------------------------

def heading_problems(nb):
    bad, level = [], 1  # the front matter's title is the page's h1
    if not front_matter(nb).get('title'): bad.append('no title')
    for text in prose(nb):
        for marks,words in re.findall(r'^(#+)\s+(.*)$', text, re.M):
            if len(marks)==1: bad.append(f'second h1: {words}')
            elif len(marks)>level+1: bad.append(f'h{len(marks)} after h{level}: {words}')
            level = len(marks)
    return bad

def link_problems(nb, folder, known):
    "`known`: names of the pages; relative links and pictures must exist, anchors in the same page must have a target"
    text = '\n'.join(prose(nb))
    ids = set(re.findall(r'\{#([\w-]+)', text)) | {re.sub(r'[^\w\s-]', '', h.lower()).strip().replace(' ', '-') for h in re.findall(r'^#+\s+(.*?)(?:\s*\{.*)?$', text, re.M)}
    bad = []
    for target in re.findall(r'\]\(([^)\s]+)[^)]*\)', text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r'[a-z]+:', target): continue
        path,_,anchor = target.partition('#')
        if path and path not in known and not (folder/path).exists(): bad.append(f'dead link {target}')
        if not path and anchor not in ids: bad.append(f'no target for #{anchor}')
    return bad

def citation_problems(nb, keys):
    text = '\n'.join(prose(nb))
    labels = set(re.findall(r'\{#([\w-]+)', text)) | set(re.findall(r'^#\|\s*label:\s*(\S+)', '\n'.join(source(c) for c in nb['cells']), re.M))
    bad = []
    for key in re.findall(r'(?<![\w/.])@([A-Za-z][\w:-]*)', text):
        if re.match(r'(fig|tbl|eq|sec|lst|exr|exm)-', key): ok = key in labels or key.startswith('sec-')
        else: ok = key in keys
        if not ok: bad.append(f'unknown @{key}')
    return bad

def alt_problems(nb):
    bad = []
    for alt,target in re.findall(r'!\[([^\]]*)\]\(([^)]*)\)', '\n'.join(prose(nb))):
        if len(alt.split())<3: bad.append(f'picture {target} without alt text')
    for c,data in outputs(nb):
        if any(k.startswith('image/') for k in data):
            hit = re.search(r'^#\|\s*fig-alt:\s*(.*)$', source(c), re.M)
            if not hit or len(hit[1].split())<4: bad.append(f'output picture without fig-alt: {source(c)[:60]!r}')
        for figure in re.findall(r'<svg role="img" aria-label="([^"]*)"', ''.join(data.get('text/markdown', ''))):
            if len(figure.split())<4: bad.append(f'interactive figure without alt text: {source(c)[:60]!r}')
    return bad

def html_problems(nb):
    bad = ['widget state in the metadata'] if 'widgets' in nb['metadata'] else []
    for c,data in outputs(nb):
        if 'text/html' in data: bad.append(f'text/html left, Quarto would add require.js: {source(c)[:60]!r}')
        if 'application/vnd.jupyter.widget-view+json' in data: bad.append(f'widget, dead on a page: {source(c)[:60]!r}')
        if _outside.search(''.join(data.get('text/markdown', ''))): bad.append(f'output asks another site: {source(c)[:60]!r}')
    return bad

def colab_problems(nb, name):
    s = _settings(ROOT)
    want = f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/"
    if not any(c['cell_type']=='code' for c in nb['cells']): return []
    links = re.findall(r'\((https://colab\.[^)]*)\)', source(nb['cells'][1]))
    if len(links)!=1 or not links[0].startswith(want): return [f'no Colab link after the title: {links}']
    path = links[0][len(want):]
    return [] if (ROOT/path).exists() and Path(path).name==name else [f'Colab link to {path}']

def hidden_code(nb, stored):
    "Exported cells of the notebook whose source the page does not show"
    shown = '\n'.join(source(c) for c in nb['cells'] if c['cell_type']=='code')
    exported = [re.sub(r'^#\|.*\n', '', source(c), flags=re.M).strip() for c in stored['cells'] if re.match(r'#\| *exports?\b', source(c)) and '#| hide' not in source(c)]
    return [f'not shown: {e[:60]!r}' for e in exported if e not in shown]

def drift_problems(nb):
    "Stored interactive figures carry the hash of their function's source: is it the one in this notebook?"
    defined = {}
    for c in nb['cells']:
        if c['cell_type']!='code': continue
        try: tree = ast.parse(source(c))
        except SyntaxError: continue  # a cell with magics
        for f in ast.walk(tree):
            if isinstance(f, ast.FunctionDef): defined.setdefault(f.name, set()).add('\n'.join(source(c).splitlines()[min([f.lineno]+[d.lineno for d in f.decorator_list])-1:f.end_lineno]))
    bad = []
    for _,data in outputs(nb):
        text = ''.join(data.get('text/html', ''))
        if '/*data*/' not in text: continue
        d = figure_data(text)
        now = {hashlib.sha256(textwrap.dedent(t).strip().encode()).hexdigest()[:10] for t in defined.get(d.fn, ())}
        if now and d.src not in now: bad.append(f'{d.id}: {d.fn} changed since the figure was stored; execute the notebook again')
    return bad

# --- the checkers can fail ------------------------------------------------------------------------------------------------

def page(*cells):
    make = lambda kind,text,**data: dict(cell_type=kind, source=text, metadata={}, **({'outputs': [{'output_type': 'display_data', 'data': data}] if data else []} if kind=='code' else {}))
    return dict(metadata={}, cells=[make(*c[:2], **(c[2] if len(c)>2 else {})) for c in cells])

def test_headings_can_fail(): assert len(heading_problems(page(['markdown', '## a\n\n#### b'], ['markdown', '# c'])))==3
def test_links_can_fail():
    bad = page(['markdown', 'see [x](99_none.ipynb), [y](#nowhere), ![z](images/none.png), [ok](01_data.ipynb) and [here](#a-b)\n\n## A b'])
    assert len(link_problems(bad, NBS, {'01_data.ipynb'}))==3
def test_citations_can_fail(): assert citation_problems(page(['markdown', '[@nobody1999] and @fig-none, not a@b.c, `@x`, @good']), {'good'})==['unknown @nobody1999', 'unknown @fig-none']
def test_alt_can_fail():
    bad = page(['markdown', '![](a.png)'], ['code', 'plot()', {'image/png': 'x'}], ['code', '#| fig-alt: "short"\nplot()', {'image/png': 'x'}], ['code', 'explore()', {'text/markdown': '<svg role="img" aria-label="no">'}])
    assert len(alt_problems(bad))==4
def test_html_can_fail():
    bad = page(['code', 'a', {'text/html': '<b>'}], ['code', 'b', {'text/markdown': '<script src="https://cdn.example/x.js">'}], ['code', 'c', {'application/vnd.jupyter.widget-view+json': {}}])
    bad['metadata']['widgets'] = {}
    assert len(html_problems(bad))==4
def test_colab_can_fail():
    s = _settings(ROOT)
    link = lambda name: f"[Open in Colab](https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/nbs/{name})"
    assert colab_problems(page(['raw', ''], ['markdown', 'no link'], ['code', '1']), '90_book.ipynb')
    assert colab_problems(page(['raw', ''], ['markdown', link('99_none.ipynb')], ['code', '1']), '99_none.ipynb')
    assert not colab_problems(page(['raw', ''], ['markdown', link('90_book.ipynb')], ['code', '1']), '90_book.ipynb')
def test_drift_can_fail():
    html = '<script>/*data*/{"fn":"f","src":"0000000000","id":"nnx-f-1"}/*end*/</script>'
    assert drift_problems(page(['code', 'def f(a): return a'], ['code', 'explore(f)', {'text/html': html}]))

def test_hidden_code_can_fail(): assert hidden_code(page(['code', 'show_doc(f)']), page(['code', '#| export\ndef f(): pass']))==["not shown: 'def f(): pass'"]

# --- the book -------------------------------------------------------------------------------------------------------------

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
    "What `nbdev_docs` hands to Quarto, made in a copy so that the checkout stays clean: {name: notebook}"
    pytest.importorskip('nbdev', reason='the site checks need nbdev')
    top = tmp_path_factory.mktemp('site')
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/name, top)
    for name in ('nbs', 'nntrain'): shutil.copytree(ROOT/name, top/name, symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__'))
    done = subprocess.run([sys.executable, '-c', DRIVER], cwd=top, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode==0, done.stderr[-3000:]
    assert 'Traceback' not in done.stderr and 'imports and other code' not in done.stderr, done.stderr[-3000:]
    out = top/'_proc'
    assert (out/'_quarto.yml').is_file() and not (out/'_quarto.yml').is_symlink()
    failed = json.loads((out/'failed.json').read_text(encoding='utf-8'))
    return {**{p.name: json.loads(p.read_text(encoding='utf-8')) for p in sorted(out.glob('*.ipynb'))}, **failed}

def bib_keys(): return set(re.findall(r'^@\w+\{([^,\s]+),', (NBS/'references.bib').read_text(encoding='utf-8'), re.M))

@pytest.mark.parametrize('name', [p.name for p in CHAPTERS])
def test_page(processed, name):
    nb, known = processed[name], set(processed)
    assert isinstance(nb, dict), f'nbdev_docs fails (at docs time it runs exports and plain imports):\n{nb}'
    found = {'headings': heading_problems(nb), 'links': link_problems(nb, NBS, known), 'citations': citation_problems(nb, bib_keys()),
             'alt': alt_problems(nb), 'html': html_problems(nb), 'colab': colab_problems(nb, name), 'code': hidden_code(nb, json.loads((NBS/name).read_text(encoding='utf-8')))}
    assert not any(found.values()), {k: v for k,v in found.items() if v}

@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.name)
def test_stored_notebook(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert not drift_problems(nb), drift_problems(nb)
    assert 'widgets' not in nb['metadata'], 'metadata.widgets makes "Invalid notebook" on GitHub: run nntrain_execute'

def test_quarto_yaml():
    cfg = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert (NBS/'_quarto.yml').is_symlink() and not os.path.isabs(os.readlink(NBS/'_quarto.yml'))
    assert cfg['project']['output-dir']==_settings(ROOT)['doc_path'], 'nbdev_docs moves doc_path out of _proc'
    assert not (NBS/_settings(ROOT)['readme_nb']).exists(), 'nbdev_docs would render README.md itself, which fails in a book project'
    listed = []
    for c in cfg['book']['chapters']+cfg['book'].get('appendices', []): listed += [c] if isinstance(c, str) else c['chapters']
    for page in [c for c in listed if c.endswith('.qmd')]: assert (NBS/page).exists() and listed.pop(listed.index(page))
    assert sorted(listed)==[p.name for p in CHAPTERS], 'chapters in _quarto.yml and notebooks in nbs/ differ'
    assert [c for c in listed if c!='index.ipynb']==sorted(c for c in listed if c!='index.ipynb')
    html = cfg['format']['html']
    for f in [cfg['bibliography'], html['css'], cfg['book']['favicon'], '404.qmd'] + [t for t in html['theme']['dark'] if t.endswith('.scss')]: assert (NBS/f).exists(), f

def test_bibliography():
    keys = re.findall(r'^@\w+\{([^,\s]+),', (NBS/'references.bib').read_text(encoding='utf-8'), re.M)
    assert len(keys)==len(set(keys)), 'a key stands twice'

@pytest.mark.skipif(not shutil.which('quarto'), reason='Quarto is not installed: the built site is not checked')
def test_quarto_builds(tmp_path):
    top = tmp_path/'clone'
    shutil.copytree(ROOT, top, symlinks=True, ignore=shutil.ignore_patterns('.git', '_proc', '_docs', '__pycache__'))
    done = subprocess.run(['nbdev_docs'], cwd=top, capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-3000:]
    pages = list((top/'_docs').glob('*.html'))
    assert len(pages)>=len(CHAPTERS)
    for p in pages: assert not re.search(r'<(script|link|img)\b[^>]*(src|href)="https?://', p.read_text(encoding='utf-8')), f'{p.name} asks another site'
