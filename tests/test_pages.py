"""The pages around the chapters: home page and map, results, names, glossary,
bibliography.

They say things about the rest of the project (what was measured, who needs whom, where
a term is built). Each saying is compared with its source, and each comparison is fed
something false, too."""
import ast
import copy
import json
import re
import shutil

import pytest
from conftest import ROOT

import nntrain.results

NBS = ROOT/'nbs'


def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])

def trains(cell):
    return '.fit(' in source(cell)  # shows times: another text on every run

def shown(nb):
    """Texts that the code cells of a page show (Markdown, else plain text), in order;
    pictures and set-up cells left out"""
    texts = []
    for cell in nb['cells']:
        for out in () if trains(cell) else cell.get('outputs', ()):
            data = out.get('data', {})
            if 'image/png' not in data:
                texts.append(
                    ''.join(
                        data.get('text/markdown') or data.get('text/plain')
                        or out.get('text', '')))
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
        if (
            cell['cell_type'] != 'code'
            or '%pip' in source(cell)
            or trains(cell)
            or re.search(r'\blearn\.', source(cell))
        ):
            continue
        *body, last = ast.parse(source(cell)).body
        exec(compile(ast.Module(body, []), 'page', 'exec'), space)
        if not isinstance(last, ast.Expr):
            exec(compile(ast.Module([last], []), 'page', 'exec'), space)
            continue
        value = eval(compile(ast.Expression(last.value), 'page', 'eval'), space)
        forms = (
            value._repr_mimebundle_() if hasattr(value, '_repr_mimebundle_')
            else {'text/markdown': value._repr_markdown_()}
            if hasattr(value, '_repr_markdown_') else {})
        if value is not None:
            texts.append(
                forms.get('text/markdown') or forms.get('text/plain') or repr(value))
    plt.close('all')
    return texts

def drift(nb, monkeypatch):
    "What a page shows and what it would show now differ here"
    old, new = shown(nb), show_again(nb, monkeypatch)
    lines = [
        (a, b) for x, y in zip(old, new) for a, b in zip(x.splitlines(), y.splitlines())
        if a != b]
    return (
        [f'{a!r} is now {b!r}' for a, b in lines[:5]]
        + [f'{len(old)} outputs, now {len(new)}'] * (len(old) != len(new))
        + [
            f'{len(x.splitlines())} lines, now {len(y.splitlines())}: {x[:60]!r}'
            for x, y in zip(old, new) if len(x.splitlines()) != len(y.splitlines())]
    )

def ok(problems, todo=''): assert not problems, '\n'.join([*problems, todo])


# ---- results -------------------------------------------------------------------------

RESULTS_PAGES = [p for p in ('index.ipynb', '95_results.ipynb') if (NBS/p).exists()]

@pytest.fixture
def other_results(tmp_path, monkeypatch):
    "A copy of the recorded rows that the pages read instead"
    folder = tmp_path/'results'
    shutil.copytree(ROOT/'results', folder)
    monkeypatch.setattr(nntrain.results, '_results_dir', lambda: folder)
    return folder

@pytest.mark.parametrize('name', RESULTS_PAGES)
def test_page_shows_what_results_say(name, monkeypatch):
    ok(
        drift(read(NBS / name), monkeypatch),
        f'run: nntrain_execute nbs/{name}; nntrain_sync')

@pytest.mark.parametrize('name', RESULTS_PAGES)
def test_a_changed_row_is_noticed(name, monkeypatch, other_results):
    row = read(other_results/'schedulers-one-cycle.json')
    (other_results / 'schedulers-one-cycle.json').write_text(
        json.dumps(row | dict(mean=0.9171)))
    assert any(
        'schedulers-one-cycle' in line or '0.917' in line
        for line in drift(read(NBS / name), monkeypatch))

def test_a_new_row_and_a_new_benchmark_are_noticed(monkeypatch, other_results):
    row = read(other_results/'schedulers-one-cycle.json')
    (other_results / '10-zzz.json').write_text(
        json.dumps(row | dict(experiment='10-zzz')))
    bench = row | dict(
        experiment='bench-a-b', against='a', limit=1.1, per='step',
        values=[1.0, 1.2, 1.05])
    (other_results/'bench-a-b.json').write_text(json.dumps(bench))
    found = drift(read(NBS/'95_results.ipynb'), monkeypatch)
    assert sum('lines, now' in line for line in found) >= 2, (
        found)  # the table of chapter 10 and the one of benchmarks
    assert any(
        '| `a-b` |' in text and '≤ 1.1: met' in text
        for text in show_again(read(NBS / '95_results.ipynb'), monkeypatch))

def test_a_typed_number_is_noticed(monkeypatch):
    nb = copy.deepcopy(read(NBS/'95_results.ipynb'))
    for cell in nb['cells']:
        for out in cell.get('outputs', ()):
            if 'text/markdown' in out.get('data', {}):
                out['data']['text/markdown'] = ''.join(
                    out['data']['text/markdown']
                ).replace('`initialization-cnn`', '`04-cnm`')
    assert any('04-cnm' in line for line in drift(nb, monkeypatch))


# ---- links from page to page ---------------------------------------------------------

def anchor(heading):
    "Identifier that pandoc, and so Quarto, gives to a heading"
    found = re.search(r'\{[^}]*#([\w.-]+)[^}]*\}\s*$', heading)
    if found: return found[1]
    text = re.sub(
        r'!?\[([^\]]*)\]\([^)]*\)', r'\1', re.sub(r'\s*\{[^}]*\}\s*$', '', heading)
    ).lower()
    return (
        re.sub(
            r'\s', '-', re.sub(r'^[^a-z]+', '', re.sub(r'[^\w\s.-]', '', text).strip()))
        or 'section'
    )

def no_code(text): return re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)

def anchors(nb):
    "All places in a page that a link can lead to"
    texts = [no_code(source(c)) for c in nb['cells'] if c['cell_type'] == 'markdown']
    return {anchor(h) for t in texts for h in re.findall(r'^#+\s+(.*)$', t, re.M)} | {
        i for t in texts for i in re.findall(r'\{#([\w-]+)\}', t)
    }

def marked(nb):
    return [
        ''.join(o.get('data', {}).get('text/markdown', '')) for c in nb['cells']
        for o in c.get('outputs', ())]

def dead_anchors(nb, pages):
    """Links of a page (in its text, and in the Markdown and the HTML that it shows) to
    a page or a heading that is not there; `pages`: {name: anchors}"""
    texts = (
        [no_code(source(c)) for c in nb['cells'] if c['cell_type'] == 'markdown']
        + marked(nb)
        + [
            ''.join(o.get('data', {}).get('text/html', '')) for c in nb['cells']
            for o in c.get('outputs', ())]
    )
    links = {
        t
        for text in texts
        for t in re.findall(
            r'\]\((?!https?:)([\w.-]+\.ipynb(?:#[^)\s]+)?)\)|href="(?!https?:)([\w.-]+\.ipynb(?:#[^"]+)?)"',
            text,
        )
        for t in t
        if t
    }
    return [
        f'{link}: no such {"page" if page not in pages else "heading"}'
        for link in sorted(links)
        for page, _, place in [link.partition('#')]
        if page not in pages or place and place not in pages[page]
    ]

PAGES = {p.name: anchors(read(p)) for p in sorted(NBS.glob('*.ipynb'))}

@pytest.mark.parametrize('name', PAGES)
def test_links_lead_to_headings(name): ok(dead_anchors(read(NBS/name), PAGES))

def test_dead_anchors_can_fail():
    cell = lambda kind, text, **out: dict(
        cell_type=kind, source=text, outputs=[dict(data=out)] if out else [])
    nb = dict(
        cells=[
            cell(
                'markdown',
                '## A *b*: c?\n\n[x](p.ipynb#a-b-c) [x](p.ipynb#a-b-d) [x](q.ipynb) '
                '[x](https://x.org/q.ipynb#z)',
            ),
            cell(
                'code',
                'x.fit(1)',
                **{
                    'text/markdown': '[x](p.ipynb#none)',
                    'text/html': '<a href="p.ipynb#nil">',
                },
            ),
        ]
    )
    assert anchors(nb) == {'a-b-c'}
    assert [
        line.split(':')[0] for line in dead_anchors(nb, {'p.ipynb': {'a-b-c'}})
    ] == ['p.ipynb#a-b-d', 'p.ipynb#nil', 'p.ipynb#none', 'q.ipynb']

@pytest.mark.parametrize(
    'heading, identifier',
    [
        ('How large may a step be?', 'how-large-may-a-step-be'),
        ('Where `eps` stands', 'where-eps-stands'),
        ("PyTorch's schedulers", 'pytorchs-schedulers'),
        ('One-cycle, once', 'one-cycle-once'),
        ('A *b* {#sec-x}', 'sec-x'),
        ('3 things', 'things'),
        ('`init_weights`', 'init_weights'),
        ('[Link](x.ipynb) here', 'link-here'),
    ],
)
def test_anchor_is_that_of_pandoc(heading, identifier):
    assert anchor(heading) == identifier


# ---- names ---------------------------------------------------------------------------

@pytest.fixture(scope='module')
def names_page():
    "What the first cells of the page of names define"
    space = {}
    for cell in read(NBS/'96_names.ipynb')['cells']:
        if 'def names(' in source(cell): exec(source(cell), space)
    return space

def test_names_are_looked_up(names_page):
    assert (
        '[`Learner.fit(lr)`](p.ipynb#a)'
        in names_page['names'](
            'p.ipynb', 'learner.Learner.fit(lr) | a | b | c | d | e | f | g').data)

@pytest.mark.parametrize(
    'entry, near',
    [
        ('learner.Lerner', "'Learner'"), ('learner.Learner.fitt', "'fit'"),
        ('adaptive.Adam(beta)', 'no parameter')],
)
def test_a_wrong_name_stops_the_page(names_page, entry, near):
    with pytest.raises(LookupError, match=near):
        names_page['names']('p.ipynb', f'{entry} | a | b | c | d | e | f | g').data

def test_every_table_of_names_is_checked():
    nb = read(NBS/'96_names.ipynb')
    tables = [
        source(c) for c in nb['cells']
        if c['cell_type'] == 'code' and "names('" in source(c)]
    assert len(tables) >= 8 and all(
        'data' in o for c in nb['cells'] if 'names(\'' in source(c)
        for o in c['outputs'])
    assert len(set(re.findall(r'^(\w+\.[\w.]+)', '\n'.join(tables), re.M))) > 70

def built(nb):
    """{heading's place: names of the functions, classes and methods that the code of
    its section defines, subsections included}"""
    found, inside = {}, []
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            for level, heading in re.findall(
                r'^(#+)\s+(.*)$', no_code(source(cell)), re.M
            ):
                inside = [(n, place) for n, place in inside if n < len(level)] + [
                    (len(level), anchor(heading))]
        else:
            for _, place in inside:
                found.setdefault(place, set()).update(
                    re.findall(r'^\s*(?:def|class) (\w+)', source(cell), re.M))
    return found

def built_elsewhere(nb, chapters):
    """Names in the first column of a page's tables whose section does not define them;
    `chapters`: {name: built}"""
    entries = {
        entry
        for text in marked(nb)
        for line in text.splitlines()
        for entry in re.findall(
            r'\[`([\w.]+)[^`]*`\]\(([\w.-]+)#([^)]+)\)', line.split(' | ')[0]
        )
    }
    return [
        f'{name} is not built in {page}#{place}'
        for name, page, place in sorted(entries)
        if name.split('.')[-1] not in chapters.get(page, {}).get(place, ())
    ]

def test_names_link_to_the_section_that_builds_them():
    nb = read(NBS/'96_names.ipynb')
    ok(built_elsewhere(nb, {p.name: built(read(p)) for p in NBS.glob('*.ipynb')}))

def test_built_elsewhere_can_fail():
    cell = lambda kind, text, **out: dict(
        cell_type=kind, source=text, outputs=[dict(data=out)] if out else [])
    chapter = built(
        dict(
            cells=[
                cell('markdown', '# T\n\n## A\n\n### B'),
                cell('code', 'class C:\n    def fit(self): ...'),
                cell('markdown', '## D'),
                cell('code', 'def e(): ...'),
            ]
        )
    )
    assert chapter == {
        't': {'C', 'fit', 'e'}, 'a': {'C', 'fit'}, 'b': {'C', 'fit'}, 'd': {'e'}}
    nb = dict(
        cells=[
            cell(
                'code',
                'x.fit(1)',
                **{
                    'text/markdown': '| [`C`](p.ipynb#a), [`C.fit(lr)`](p.ipynb#b), '
                    '[`e`](p.ipynb#b) | [`x`](p.ipynb#a) | \n| '
                    '[`C`](p.ipynb#d) | – |'
                },
            )
        ]
    )
    assert built_elsewhere(nb, {'p.ipynb': chapter}) == [
        'C is not built in p.ipynb#d',
        'e is not built in p.ipynb#b',
    ]


# ---- glossary ------------------------------------------------------------------------

def glossary_problems(nb, pages):
    """Entries out of order, twice, without text, or without a link to a section of a
    chapter"""
    lines = [
        line for c in nb['cells'] if c['cell_type'] == 'markdown'
        for line in source(c).splitlines() if line.startswith('**')]
    entries = [
        re.fullmatch(r'\*\*`?(.+?)`?\*\*: (.+) \[[^\]]+\]\(([\w.-]+)#([^)]+)\)', line)
        for line in lines
    ]
    problems = [
        f'no entry: {line[:60]}' for line, found in zip(lines, entries) if not found]
    entries = [found.groups() for found in entries if found]
    terms = [term.casefold() for term, *_ in entries]
    problems += [
        f'{b} stands behind {a}' for a, b in zip(terms, terms[1:]) if b < a
    ] + [f'{a} stands there twice' for a, b in zip(terms, terms[1:]) if a == b]
    problems += [
        f'{term}: {len(text)} characters' for term, text, *_ in entries
        if not 20 <= len(text) <= 240]
    return problems + [
        f'{term}: no {page}#{place}'
        for term, _, page, place in entries
        if place not in pages.get(page, ())
    ]

def test_glossary():
    nb = read(NBS/'97_glossary.ipynb')
    ok(glossary_problems(nb, PAGES))
    assert (
        70
        <= sum(
            line.startswith('**') for c in nb['cells']
            for line in source(c).splitlines())
        <= 140
    )

@pytest.mark.parametrize(
    'entry, problem',
    [
        ('**b**: the second letter of them all. [X](p.ipynb#s)', None),
        ('**b**: short. [X](p.ipynb#s)', 'characters'),
        ('**b**: the second letter of them all.', 'no entry'),
        ('**b**: the second letter of them all. [X](p.ipynb#t)', 'no p.ipynb#t'),
        ('**A**: the first letter of them all. [X](p.ipynb#s)', 'twice'),
        ('**`0`**: no letter at all but a digit. [X](p.ipynb#s)', 'behind'),
    ],
)
def test_glossary_problems_are_found(entry, problem):
    nb = dict(
        cells=[
            dict(
                cell_type='markdown',
                source='## A\n\n**a**: the first letter of them all. '
                f'[X](p.ipynb#s)\n\n{entry}\n',
            )
        ]
    )
    found = glossary_problems(nb, {'p.ipynb': {'s'}})
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


# ---- bibliography --------------------------------------------------------------------

def bibliography_problems(bib, texts):
    "Entries that are incomplete or that nobody cites"
    problems = [
        f'{key} stands twice'
        for key in {
            k
            for k in re.findall(r'^@\w+\{([^,\s]+),', bib, re.M)
            if len(re.findall(rf'^@\w+\{{{re.escape(k)},', bib, re.M)) > 1
        }
    ]
    cited = {
        key
        for text in texts
        for key in re.findall(
            r'(?<![\w/.])@([A-Za-z][\w:-]*)', re.sub(r'`[^`]*`', '', no_code(text))
        )
    }
    for kind, key, body in re.findall(r'^@(\w+)\{([^,\s]+),(.*?)^\}', bib, re.M | re.S):
        fields = {
            name.lower()
            for name, value in re.findall(r'^\s*(\w+)\s*=\s*\{(.*)\}', body, re.M)
            if value.strip()}
        needed = {'author', 'title', 'year'} | {
            dict(
                article='journal', inproceedings='booktitle', incollection='booktitle',
                book='publisher').get(kind, 'year')
        }
        problems += [f'{key} lacks {field}' for field in sorted(needed - fields)]
        if not fields & {'url', 'doi', 'howpublished'}:
            problems.append(f'{key} lacks url, doi or howpublished')
        if key not in cited: problems.append(f'{key}: nobody cites it')
    return problems

def test_bibliography():
    texts = [
        source(c) for path in NBS.glob('*.ipynb') for c in read(path)['cells']
        if c['cell_type'] == 'markdown']
    ok(bibliography_problems((NBS/'references.bib').read_text(encoding='utf-8'), texts))
    assert '::: {#refs}' in (NBS / 'references.qmd').read_text(
        encoding='utf-8'
    ) and '- references.qmd' in (ROOT / '_quarto.yml').read_text(encoding='utf-8')

@pytest.mark.parametrize(
    'old, new, problem',
    [
        ('', '', None), ('  year = {1999}\n', '', 'lacks year'),
        ('author = {A}', 'author = {}', 'lacks author'),
        ('journal = {J}', 'booktitle = {J}', 'lacks journal'),
        ('url = {u}', 'note = {u}', 'lacks url'),
        ('{a1999x', '{b1999x', 'nobody cites'),
        ('@article', '@article{a1999x,\n}\n\n@article', 'twice')],
)
def test_bibliography_problems_are_found(old, new, problem):
    good = '@article{a1999x,\n  title = {T},\n  author = {A},\n  journal = {J},\n  url = {u},\n  year = {1999}\n}\n'
    found = bibliography_problems(
        good.replace(old, new, 1) if old else good,
        ['as [@a1999x, ch. 1] says, not `@b1999x`'])
    assert found == [] if problem is None else any(problem in line for line in found)
