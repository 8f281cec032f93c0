"""The site. Pages as Quarto gets them (nbdev's processing, no Quarto needed): links, pictures, citations, headings, Colab links, YAML.

Then, where Quarto is installed or NNTRAIN_SITE names a built site, the built pages: their files, and each page in a headless Chromium that reaches nobody
else, light, dark and on a narrow screen, with axe-core (`npm install axe-core`, or NNTRAIN_AXE=…/axe.min.js). What is missing is skipped, with its name.
"""
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

import site_checks
from nntrain.explore import figure_data
from nntrain.site import _outside
from nntrain.tools import _settings

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
CHAPTERS = sorted(NBS.glob('*.ipynb'))


def source(cell): return ''.join(cell['source'])
def prose(nb):
    return [
        re.sub(r'```.*?```|`[^`]*`', '', source(c), flags=re.S) for c in nb['cells']
        if c['cell_type'] == 'markdown']
def outputs(nb):
    return [
        (c, o.get('data', {})) for c in nb['cells'] if c['cell_type'] == 'code'
        for o in c['outputs']]

def front_matter(nb):
    first = nb['cells'][0]
    return (
        yaml.safe_load(source(first).strip().strip('-')) if first['cell_type'] == 'raw'
        else {})

# ---- checkers: each returns what is wrong --------------------------------------------

def heading_problems(nb):
    # the page's h1 is the first page's title in its front matter, and a heading
    # elsewhere
    bad, level = [], 1
    titles = int('title' in front_matter(nb))
    for text in prose(nb):
        for marks,words in re.findall(r'^(#+)\s+(.*)$', text, re.M):
            if len(marks)==1: titles += 1
            if len(marks) == 1 and titles > 1:
                bad.append(f'second h1: {words}')
            elif len(marks) > level + 1:
                bad.append(f'h{len(marks)} after h{level}: {words}')
            level = len(marks)
    return bad if titles else bad+['no title']

def link_problems(nb, folder, known):
    """`known`: names of the pages; relative links and pictures must exist, anchors in
    the same page must have a target"""
    text = '\n'.join(prose(nb))
    ids = set(re.findall(r'\{#([\w-]+)', text)) | {
        re.sub(r'[^\w\s-]', '', h.lower()).strip().replace(' ', '-')
        for h in re.findall(r'^#+\s+(.*?)(?:\s*\{.*)?$', text, re.M)
    }
    bad = []
    for target in re.findall(r'\]\(([^)\s]+)[^)]*\)', text) + re.findall(
        r'src="([^"]+)"', text
    ):
        if re.match(r'[a-z]+:', target): continue
        path,_,anchor = target.partition('#')
        if path and path not in known and not (folder / path).exists():
            bad.append(f'dead link {target}')
        if not path and anchor not in ids: bad.append(f'no target for #{anchor}')
    return bad

def citation_problems(nb, keys):
    text = '\n'.join(prose(nb))
    labels = set(re.findall(r'\{#([\w-]+)', text)) | set(
        re.findall(
            r'^#\|\s*label:\s*(\S+)', '\n'.join(source(c) for c in nb['cells']), re.M
        )
    )
    bad = []
    for key in re.findall(r'(?<![\w/.])@([A-Za-z][\w:-]*)', text):
        if re.match(r'(fig|tbl|eq|sec|lst|exr|exm)-', key):
            ok = key in labels or key.startswith('sec-')
        else:
            ok = key in keys
        if not ok: bad.append(f'unknown @{key}')
    return bad

def alt_problems(nb):
    bad = []
    for alt, target, more in re.findall(
        r'!\[([^\]]*)\]\(([^)]*)\)(\{[^}]*\})?', '\n'.join(prose(nb))
    ):
        given = re.search('fig-alt="([^"]*)"', more)
        if len((given[1] if given else '').split()) < 4:
            bad.append(
                f'picture {target} without fig-alt: Quarto makes a caption of the '
                'text in brackets')
    for c,data in outputs(nb):
        if any(k.startswith('image/') for k in data):
            hit = re.search(r'^#\|\s*fig-alt:\s*(.*)$', source(c), re.M)
            if not hit or len(hit[1].split()) < 4:
                bad.append(f'output picture without fig-alt: {source(c)[:60]!r}')
        for figure in re.findall(
            r'<svg role="img" aria-label="([^"]*)"',
            ''.join(data.get('text/markdown', '')),
        ):
            if len(figure.split()) < 4:
                bad.append(f'interactive figure without alt text: {source(c)[:60]!r}')
    return bad

def html_problems(nb):
    bad = ['widget state in the metadata'] if 'widgets' in nb['metadata'] else []
    for c,data in outputs(nb):
        if 'text/html' in data:
            bad.append(
                f'text/html left, Quarto would add require.js: {source(c)[:60]!r}')
        if 'application/vnd.jupyter.widget-view+json' in data:
            bad.append(f'widget, dead on a page: {source(c)[:60]!r}')
        if _outside.search(''.join(data.get('text/markdown', ''))):
            bad.append(f'output asks another site: {source(c)[:60]!r}')
    return bad

def colab_problems(nb, name):
    s = _settings(ROOT)
    want = f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/"
    if not any(c['cell_type']=='code' for c in nb['cells']): return []
    links = re.findall(
        r'\((https://colab\.[^)]*)\)', '\n'.join(source(c) for c in nb['cells'][1:4]))
    if len(links) != 1 or not links[0].startswith(want):
        return [f'no Colab link after the title: {links}']
    path = links[0][len(want):]
    return (
        [] if (ROOT / path).exists() and Path(path).name == name
        else [f'Colab link to {path}'])

def option_problems(nb):
    "Quarto refuses a cell with the same option twice"
    keys = [
        re.findall(r'^#\|\s*([\w-]+):', source(c), re.M)
        for c in nb['cells']
        if c['cell_type'] == 'code'
    ]
    return [
        f'option {k} twice in one cell' for ks in keys for k in sorted(set(ks))
        if ks.count(k) > 1]

def title_problems(nb, name):
    "The chapter's own number stands in the title, and Quarto adds none of its own"
    number = re.match(r'0?(\d+[a-z]?)_', name)
    if not number: return []
    found = re.search(r'^# (.*)$', '\n'.join(prose(nb)[:1]), re.M)
    title = found[1] if found else ''
    bad = (
        [] if title.endswith(' {.unnumbered}') and 'title' not in front_matter(nb)
        else ['Quarto would number this page'])
    if name < '90' and not title.startswith(number[1] + ' '):
        bad.append(f'no chapter number in the title {title!r}')
    return bad

def hidden_code(nb, stored):
    "Exported cells of the notebook whose source the page does not show"
    shown = '\n'.join(source(c) for c in nb['cells'] if c['cell_type']=='code')
    exported = [
        re.sub(r'^#\|.*\n', '', source(c), flags=re.M).strip()
        for c in stored['cells']
        if re.match(r'#\| *exports?\b', source(c)) and '#| hide' not in source(c)
    ]
    return [f'not shown: {e[:60]!r}' for e in exported if e not in shown]

def plain(text):
    """Letters and digits alone: links, boxes and folds are written in another way on
    the page, their words are the same"""
    text = re.sub(r'\]\([^)\s]*\)', ']', text)
    return re.sub(r'[^\w]|_', '', re.sub(r'</?(details|summary)>|\{#[^}]*\}', '', text))

def lost_text(nb, stored):
    "Lines of the notebook's prose that the page does not hold"
    shown = plain('\n'.join(source(c) for c in nb['cells'] if c['cell_type'] != 'code'))
    lines = [
        line for c in stored['cells'] if c['cell_type'] == 'markdown'
        for line in source(c).splitlines()]
    return [
        f'lost: {line[:80]!r}' for line in lines
        if plain(line) and plain(line) not in shown]

def drift_problems(nb):
    """Stored interactive figures carry the hash of their function's source: is it the
    one in this notebook?"""
    defined = {}
    for c in nb['cells']:
        if c['cell_type']!='code': continue
        try: tree = ast.parse(source(c))
        except SyntaxError: continue  # a cell with magics
        for f in ast.walk(tree):
            if isinstance(f, ast.FunctionDef):
                defined.setdefault(f.name, set()).add(
                    '\n'.join(
                        source(c).splitlines()[
                            min([f.lineno] + [d.lineno for d in f.decorator_list])
                            - 1 : f.end_lineno]
                    )
                )
    bad = []
    for _,data in outputs(nb):
        text = ''.join(data.get('text/html', ''))
        if '/*data*/' not in text: continue
        d = figure_data(text)
        now = {
            hashlib.sha256(textwrap.dedent(t).strip().encode()).hexdigest()[:10]
            for t in defined.get(d.fn, ())}
        if now and d.src not in now:
            bad.append(
                f'{d.id}: {d.fn} changed since the figure was stored; execute the '
                'notebook again')
    return bad

# ---- the checkers can fail -----------------------------------------------------------

def page(*cells):
    make = lambda kind, text, **data: dict(
        cell_type=kind,
        source=text,
        metadata={},
        **(
            {'outputs': [{'output_type': 'display_data', 'data': data}] if data else []}
            if kind == 'code' else {}))
    return dict(
        metadata={}, cells=[make(*c[:2], **(c[2] if len(c) > 2 else {})) for c in cells]
    )

def test_headings_can_fail():
    assert (
        len(heading_problems(page(['markdown', '## a\n\n#### b']))) == 2
        and len(
            heading_problems(page(['markdown', '# a\n\n#### b'], ['markdown', '# c']))
        )
        == 2
    )
def test_links_can_fail():
    bad = page(
        [
            'markdown',
            'see [x](99_none.ipynb), [y](#nowhere), ![z](images/none.png), '
            '[ok](03_data.ipynb) and [here](#a-b)\n\n## A b',
        ]
    )
    assert len(link_problems(bad, NBS, {'03_data.ipynb'}))==3
def test_citations_can_fail():
    assert citation_problems(
        page(['markdown', '[@nobody1999] and @fig-none, not a@b.c, `@x`, @good']),
        {'good'}) == ['unknown @nobody1999', 'unknown @fig-none']
def test_alt_can_fail():
    bad = page(
        ['markdown', '![](a.png)'],
        ['code', 'plot()', {'image/png': 'x'}],
        ['code', '#| fig-alt: "short"\nplot()', {'image/png': 'x'}],
        ['code', 'explore()', {'text/markdown': '<svg role="img" aria-label="no">'}],
    )
    assert len(alt_problems(bad))==4
def test_html_can_fail():
    bad = page(
        ['code', 'a', {'text/html': '<b>'}],
        ['code', 'b', {'text/markdown': '<script src="https://cdn.example/x.js">'}],
        ['code', 'c', {'application/vnd.jupyter.widget-view+json': {}}])
    bad['metadata']['widgets'] = {}
    assert len(html_problems(bad))==4
def test_colab_can_fail():
    s = _settings(ROOT)
    link = lambda name: (
        f"[Open in Colab](https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/nbs/{name})"
    )
    assert colab_problems(
        page(['raw', ''], ['markdown', 'no link'], ['code', '1']), '94_tools.ipynb')
    assert colab_problems(
        page(['raw', ''], ['markdown', link('99_none.ipynb')], ['code', '1']),
        '99_none.ipynb')
    assert not colab_problems(
        page(['raw', ''], ['markdown', link('94_tools.ipynb')], ['code', '1']),
        '94_tools.ipynb')
def test_drift_can_fail():
    html = (
        '<script>/*data*/{"fn":"f","src":"0000000000","id":"nnx-f-1"}/*end*/</script>')
    assert drift_problems(
        page(
            ['code', 'def f(a): return a'], ['code', 'explore(f)', {'text/html': html}])
    )

def test_options_can_fail():
    assert option_problems(
        page(
            ['code', '#| code-fold: show\n#| code-fold: true\n1'],
            ['code', '#| code-fold: true'],
        )
    ) == ['option code-fold twice in one cell']
def test_titles_can_fail():
    assert (
        len(
            title_problems(
                page(['raw', '---\ntitle: 6\n---'], ['markdown', '# Momentum']),
                '10_momentum.ipynb',
            )
        )
        == 2
    )

def test_hidden_code_can_fail():
    assert hidden_code(
        page(['code', 'show_doc(f)']), page(['code', '#| export\ndef f(): pass'])
    ) == ["not shown: 'def f(): pass'"]

def test_lost_text_can_fail():
    stored = page(
        [
            'markdown',
            '# Title\n\n> Promise\n\nYou **need** `two` '
            '[things](a.md).\n\n<details><summary>Hint</summary>',
        ]
    )
    shown = page(
        ['raw', '---\ndescription: Promise\ntitle: Title\n---'],
        ['markdown', 'You need [`two`](https://x.org/a_b.html) [things](a.html).'])
    assert lost_text(shown, stored) == ["lost: '<details><summary>Hint</summary>'"]
    assert len(lost_text(page(['raw', '---\ntitle: Title\n---']), stored)) == 3

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
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/name, top)
    for name in ('nbs', 'nntrain'):
        shutil.copytree(
            ROOT / name, top / name, symlinks=True,
            ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__'))
    done = subprocess.run(
        [sys.executable, '-c', DRIVER], cwd=top, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode==0, done.stderr[-3000:]
    assert (
        'Traceback' not in done.stderr and 'imports and other code' not in done.stderr
    ), done.stderr[-3000:]
    out = top/'_proc'
    assert (out/'_quarto.yml').is_file() and not (out/'_quarto.yml').is_symlink()
    failed = json.loads((out/'failed.json').read_text(encoding='utf-8'))
    assert (out / 'images/favicon.svg').is_file(), (
        'the folder images is not handed to Quarto: settings.ini needs recursive = True'
    )
    return {
        'folder': out,
        **{
            p.name: json.loads(p.read_text(encoding='utf-8'))
            for p in sorted(out.glob('*.ipynb'))},
        **failed,
    }

def bib_keys():
    return set(
        re.findall(
            r'^@\w+\{([^,\s]+),', (NBS / 'references.bib').read_text(encoding='utf-8'),
            re.M))

@pytest.mark.parametrize('name', [p.name for p in CHAPTERS])
def test_page(processed, name):
    nb, known, stored = (
        processed[name], set(processed),
        json.loads((NBS / name).read_text(encoding='utf-8')))
    assert isinstance(nb, dict), (
        f'nbdev_docs fails (at docs time it runs exports and plain imports):\n{nb}')
    found = {
        'title': title_problems(nb, name), 'options': option_problems(nb),
        'headings': heading_problems(nb),
        'links': link_problems(nb, processed['folder'], known),
        'citations': citation_problems(nb, bib_keys()), 'alt': alt_problems(nb),
        'html': html_problems(nb), 'colab': colab_problems(nb, name),
        'code': hidden_code(nb, stored), 'prose': lost_text(nb, stored)}
    assert not any(found.values()), {k: v for k,v in found.items() if v}

@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.name)
def test_stored_notebook(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert not drift_problems(nb), drift_problems(nb)
    assert 'widgets' not in nb['metadata'], (
        'metadata.widgets makes "Invalid notebook" on GitHub: run nntrain_execute')

def test_quarto_yaml():
    cfg = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert (NBS / '_quarto.yml').is_symlink() and not os.path.isabs(
        os.readlink(NBS / '_quarto.yml'))
    assert cfg['project']['output-dir'] == _settings(ROOT)['doc_path'], (
        'nbdev_docs moves doc_path out of _proc')
    assert not (NBS / _settings(ROOT)['readme_nb']).exists(), (
        'nbdev_docs would render README.md itself, which fails in a book project')
    listed = []
    for c in cfg['book']['chapters'] + cfg['book'].get('appendices', []):
        listed += [c] if isinstance(c, str) else c['chapters']
    for page in [c for c in listed if c.endswith('.qmd')]:
        assert (NBS / page).exists() and listed.pop(listed.index(page))
    assert sorted(listed) == [p.name for p in CHAPTERS], (
        'chapters in _quarto.yml and notebooks in nbs/ differ')
    assert [c for c in listed if c != 'index.ipynb'] == sorted(
        c for c in listed if c != 'index.ipynb')
    html = cfg['format']['html']
    themes = [
        t for mode in html['theme'].values()
        for t in ([mode] if isinstance(mode, str) else mode) if t.endswith('.scss')]
    for f in [
        cfg['bibliography'],
        html['css'],
        html['include-after-body'],
        cfg['book']['favicon'],
        cfg['book']['image'],
        '404.qmd',
        *cfg['project']['resources'],
        *themes,
    ]:
        assert (NBS / f).exists(), f

def test_social_card(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'scripts')
    import social_card
    assert social_card.stale() is None
    assert 'run scripts/social_card.py' in social_card.stale(tmp_path/'none.png')
    monkeypatch.setattr(social_card, 'numbers', lambda: 'others')
    assert 'the rows say others' in social_card.stale()

def test_bibliography():
    keys = re.findall(
        r'^@\w+\{([^,\s]+),', (NBS / 'references.bib').read_text(encoding='utf-8'), re.M
    )
    assert len(keys)==len(set(keys)), 'a key stands twice'

# ---- the built site ------------------------------------------------------------------

BASE = 'https://nntrain.example/book/'
PAGES = sorted(re.sub(r'^\d+[a-z]?_', '', p.stem) + '.html' for p in CHAPTERS) + sorted(
    p.stem + '.html' for p in NBS.glob('*.qmd'))

@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "Folder of the built pages: the one that NNTRAIN_SITE names, or made here"
    given = os.environ.get('NNTRAIN_SITE')
    if given:
        assert (Path(given) / 'index.html').is_file(), (
            f'NNTRAIN_SITE={given} holds no built site')
        return Path(given)
    if not shutil.which('quarto'):
        pytest.skip(
            'Quarto is not installed and NNTRAIN_SITE names no built site: built '
            'pages are not checked, only the processed notebooks')
    return site_checks.build(tmp_path_factory.mktemp('built')/'clone')

@pytest.fixture(scope='session')
def browser():
    with site_checks.start_browser() as b: yield b

@pytest.fixture(scope='session')
def home():
    s = _settings(ROOT)
    return s['doc_host']+s['doc_baseurl']+'/'

GOOD = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>t</title><link rel="icon" href="data:,">'

def write_site(folder, **pages):
    for name, body in pages.items():
        (folder / f'{name}.html').write_text(GOOD + body, encoding='utf-8')
    return folder

def test_file_checks_can_fail(tmp_path):
    site = write_site(
        tmp_path,
        index='<h1 id="a">a</h1><a href="two.html#b">b</a><a href="#a">a</a><a '
        'href="https://elsewhere.org">e</a><img src="data:," alt="a dot">',
        two='<b id="b"></b><a href="none.html">1</a><a '
        'href="index.html#nowhere">2</a><img src="none.png"><script '
        'src="https://cdn.example/x.js"></script>'
        f'<a href="{BASE}index.html#a">fine</a><p>?@fig-none</p><p><a '
        'href="index.html">[<code>f</code>](https://x.org/f.html)</a> '
        '<code>[a](https://x.org)</code></p>',
    )
    bad = site_checks.file_problems(site, BASE)
    assert len(bad)==7 and all(b.startswith('two.html') for b in bad), bad
    for word in (
        'dead link none.html',
        'no #nowhere',
        'dead link none.png',
        'without alt text',
        'asks another site',
        'unresolved',
        'Markdown in view',
    ):
        assert any(word in b for b in bad), word

def test_browser_checks_can_fail(browser, tmp_path):
    site = write_site(
        tmp_path,
        bad='<main><div style="width:900px">wide</div><div class="cell-output"><pre '
        'style="overflow-x:auto">' + 'long ' * 300
        + '</pre></div><svg><path d="M0 0"/></svg><input type="range"><script '
        'src="https://cdn.example/x.js"></script><script>nothing()</script></main>',
        good='<main><h1>t</h1><p style="overflow-x:auto" tabindex="0"><span '
        'style="display:block;width:900px">x</span></p></main>')
    bad = site_checks.page_problems(
        site_checks.open_page(browser, site, BASE, 'bad.html'))
    for word in (
        'wider than the screen',
        'printed results are cut off',
        'without a name',
        'does not change its picture',
        'request: https://cdn.example',
        'nothing is not defined',
    ):
        assert any(word in b for b in bad), (word, bad)
    assert (
        site_checks.page_problems(
            site_checks.open_page(browser, site, BASE, 'good.html'))
        == []
    )

def test_axe_can_fail(browser, tmp_path):
    axe = site_checks.axe_source()
    if not axe:
        pytest.skip(
            'axe-core is not there (npm install axe-core, or NNTRAIN_AXE=…/axe.min.js)')
    site = write_site(
        tmp_path,
        bad='<main><h1>t</h1><img src="data:,"><p '
        'style="color:#bbb;background:#fff">pale</p><input type="range"></main>',
    )
    bad = site_checks.axe_problems(
        site_checks.open_page(browser, site, BASE, 'bad.html'), axe)
    for word in ('image-alt', 'color-contrast', 'label'):
        assert any(word in b for b in bad), (word, bad)

def test_built_files(built, home):
    missing = [p for p in PAGES if not (built/p).is_file()]
    assert (
        not missing and (built / 'llms.txt').is_file()
        and (built / 'search.json').is_file())
    bad = site_checks.file_problems(built, home)
    assert not bad, '\n'.join(bad[:40])
    head = (built/'index.html').read_text(encoding='utf-8').split('</head>')[0]
    assert (
        re.search(
            rf'<meta property="og:image" content="{re.escape(home)}images/card.png">',
            head)
        and (built / 'images/card.png').is_file()
    )

def test_pages_describe_themselves(built, home):
    """Cards beside a link say what *this* page is about, and each page knows its one
    address"""
    said = {}
    for name in PAGES:
        head = (built/name).read_text(encoding='utf-8').split('</head>')[0]
        words = dict(
            re.findall(
                r'<meta (?:name|property)="((?:og:|twitter:)?description)" '
                r'content="([^"]*)"', head))
        # cards are cut at 200 letters
        assert len(words) == 3 and len({w[:100] for w in words.values()}) == 1, (
            name, words)
        assert words['description'] not in said, (name, said[words['description']])
        said[words['description']] = name
        canonical = re.findall(r'<link [^>]*rel="canonical"[^>]*>', head)
        assert len(canonical) == 1 and f'href="{home}{name}"' in canonical[0], (
            name, canonical)

@pytest.mark.parametrize('name', PAGES)
def test_built_page(built, home, browser, name):
    axe = site_checks.axe_source()
    p = site_checks.open_page(browser, built, home, name)
    try:
        assert not site_checks.is_dark(p)
        bad = site_checks.page_problems(p, axe)
    finally: p.context.close()
    assert not bad, '\n'.join(bad)
    if not axe:
        pytest.skip(
            'fine, but accessibility was not checked: axe-core is not there (npm '
            'install axe-core, or NNTRAIN_AXE=…/axe.min.js)')

def test_dark_for_readers_who_like_it_dark(built, home, browser):
    p = site_checks.open_page(browser, built, home, '404.html', dark=True)
    assert site_checks.is_dark(p) and p.problems==[]
    p.context.close()

def test_questions_find_what_they_are_about(built, home, browser):
    p = site_checks.open_page(browser, built, home, 'momentum.html')
    p.locator('#quarto-search input').first.click()
    p.keyboard.type('What is an epoch?')
    p.locator('.aa-Panel .aa-Item').first.wait_for()
    assert p.problems == []
    p.context.close()

def test_search_and_keyboard(built, home, browser):
    """The search box finds a word of a chapter; a folded solution and a callout open
    with the keyboard"""
    p = site_checks.open_page(browser, built, home, 'momentum.html')
    p.locator('#quarto-search input').first.click()
    p.keyboard.type('Nesterov')
    p.locator('.aa-Panel').get_by_text('Nesterov').first.wait_for()
    p.keyboard.press('Escape')
    assert p.problems==[]
    p.context.close()
    p = site_checks.open_page(browser, built, home, 'activations.html')
    for closed in p.locator('.callout-header[aria-expanded=false]').all()[:1]:
        closed.focus()
        p.keyboard.press('Enter')
        p.locator('.callout-collapse.show').first.wait_for()
    p.locator('details:not([open]) > summary').first.press('Enter')
    assert p.locator('details[open] > summary').count()
    p.context.close()
