"""The pages that know words: names in other libraries, glossary, bibliography. Each
comparison with the chapters is fed something false, too."""
import re

import pytest
from conftest import ROOT
from page_places import (
    NBS, PAGES, anchor, no_code, ok, outputs, prose, read, small, source)

NAMES = '96_names.ipynb'
GLOSSARY = '97_glossary.ipynb'


# ---- names ---------------------------------------------------------------------------

@pytest.fixture
def names_page(monkeypatch):
    "What the first cells of the page of names define"
    monkeypatch.chdir(NBS)
    space = {}
    for cell in read(NBS/NAMES)['cells']:
        text = source(cell)
        if cell['cell_type'] != 'code' or '%pip' in text: continue
        if text.lstrip('#| echo:false\n').startswith('names('): break
        exec(text, space)
    return space

LINE = '{} | what | torch | miniai | fastai | Keras | Lightning'

def test_names_are_looked_up(names_page):
    table = names_page['names'](LINE.format('Learner.fit(lr)')).data
    assert re.search(r'\[`Learner\.fit\(lr\)`\]\(\d\d_\w+\.ipynb#[\w-]+\)', table)

def test_names_lead_to_headings_as_pandoc_writes_them(names_page):
    "Greek letters and dots of a heading stay in its place"
    parts = {place: place.partition('#') for place in names_page['PLACES'].values()}
    lost = {place for place, (page, _, heading) in parts.items()
            if '#' in place and heading not in PAGES[page] or place.endswith('#')}
    assert not lost, f'no such headings: {sorted(lost)}'

@pytest.mark.parametrize('entry, near', [
    ('Lerner', "'Learner'"), ('Learner.fitt', "'fit'"), ('Adam(beta)', 'no parameter')])
def test_a_wrong_name_stops_the_page(names_page, entry, near):
    with pytest.raises(LookupError, match=near):
        names_page['names'](LINE.format(entry))

def test_every_table_of_names_is_checked():
    tables = [c for c in read(NBS/NAMES)['cells'] if c['cell_type'] == 'code'
              and re.search(r'^names\(r?\'', source(c), re.M)]
    assert len(tables) >= 8
    assert all('data' in o for c in tables for o in c['outputs'])
    text = '\n'.join(source(c) for c in tables)
    assert len(set(re.findall(r'^([A-Za-z]\w+(?:\.\w+)*)', text, re.M))) > 70

def built(nb):
    """{heading's place: names of the functions, classes and methods that the code of
    its section defines, subsections included}"""
    found, inside = {}, []
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            headings = re.findall(r'^(#+)\s+(.*)$', no_code(source(cell)), re.M)
            for level, heading in headings:
                inside = [(n, place) for n, place in inside if n < len(level)]
                inside.append((len(level), anchor(heading)))
        else:
            names = re.findall(r'^\s*(?:def|class) (\w+)', source(cell), re.M)
            for _, place in inside: found.setdefault(place, set()).update(names)
    return found

ENTRY = re.compile(r'\[`([\w.]+)[^`]*`\]\(([\w.-]+)#([^)]+)\)')

def built_elsewhere(nb, chapters):
    """Names in the first column of a page's tables whose section does not define them;
    `chapters`: {name: built}"""
    text = '\n'.join(outputs(nb, 'text/markdown'))
    entries = {entry for line in text.splitlines()
               for entry in ENTRY.findall(line.split(' | ')[0])}
    return [f'{name} is not built in {page}#{place}'
            for name, page, place in sorted(entries)
            if name.split('.')[-1] not in chapters.get(page, {}).get(place, ())]

def test_names_link_to_the_section_that_builds_them():
    chapters = {p.name: built(read(p)) for p in NBS.glob('*.ipynb')}
    ok(built_elsewhere(read(NBS/NAMES), chapters))

def test_built_elsewhere_can_fail():
    chapter = built(small(('markdown', '# T\n\n## A\n\n### B', None),
                          ('code', 'class C:\n    def fit(self): ...', None),
                          ('markdown', '## D', None), ('code', 'def e(): ...', None)))
    assert chapter == {'t': {'C', 'fit', 'e'}, 'a': {'C', 'fit'}, 'b': {'C', 'fit'},
                       'd': {'e'}}
    table = ('| [`C`](p.ipynb#a), [`C.fit(lr)`](p.ipynb#b), [`e`](p.ipynb#b) '
             '| [`x`](p.ipynb#a) | \n| [`C`](p.ipynb#d) | – |')
    nb = small(('code', 'x.fit(1)', {'text/markdown': table}))
    assert built_elsewhere(nb, {'p.ipynb': chapter}) == [
        'C is not built in p.ipynb#d', 'e is not built in p.ipynb#b']


# ---- glossary ------------------------------------------------------------------------

TERM = re.compile(r'\*\*`?(.+?)`?\*\*: (.+) \[[^\]]+\]\(([\w.-]+)#([^)]+)\)')

def terms(nb):
    return [line for c in nb['cells'] if c['cell_type'] == 'markdown'
            for line in source(c).splitlines() if line.startswith('**')]

def glossary_problems(nb, pages):
    """Entries out of order, twice, without text, or without a link to a section of a
    chapter"""
    found = [(line, TERM.fullmatch(line)) for line in terms(nb)]
    bad = [f'no entry: {line[:60]}' for line, entry in found if not entry]
    entries = [entry.groups() for _, entry in found if entry]
    words = [term.casefold() for term, *_ in entries]
    for a, b in zip(words, words[1:]):
        if b < a: bad.append(f'{b} stands behind {a}')
        if a == b: bad.append(f'{a} stands there twice')
    for term, text, page, place in entries:
        if not 20 <= len(text) <= 240: bad.append(f'{term}: {len(text)} characters')
        if place not in pages.get(page, ()): bad.append(f'{term}: no {page}#{place}')
    return bad

def test_glossary():
    nb = read(NBS/GLOSSARY)
    ok(glossary_problems(nb, PAGES))
    assert 70 <= len(terms(nb)) <= 180

@pytest.mark.parametrize('entry, problem', [
    ('**b**: the second letter of them all. [X](p.ipynb#s)', None),
    ('**b**: short. [X](p.ipynb#s)', 'characters'),
    ('**b**: the second letter of them all.', 'no entry'),
    ('**b**: the second letter of them all. [X](p.ipynb#t)', 'no p.ipynb#t'),
    ('**A**: the first letter of them all. [X](p.ipynb#s)', 'twice'),
    ('**`0`**: no letter at all but a digit. [X](p.ipynb#s)', 'behind')])
def test_glossary_problems_are_found(entry, problem):
    first = '## A\n\n**a**: the first letter of them all. [X](p.ipynb#s)'
    found = glossary_problems(small(('markdown', f'{first}\n\n{entry}\n', None)),
                              {'p.ipynb': {'s'}})
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


# ---- bibliography --------------------------------------------------------------------

PLACE = dict(article='journal', inproceedings='booktitle', incollection='booktitle',
             book='publisher')

def bibliography_problems(bib, texts):
    "Entries that are incomplete or that nobody cites"
    text = re.sub(r'`[^`]*`', '', '\n'.join(map(no_code, texts)))
    cited = set(re.findall(r'(?<![\w/.])@([A-Za-z][\w:-]*)', text))
    keys = re.findall(r'^@\w+\{([^,\s]+),', bib, re.M)
    bad = [f'{key} stands twice' for key in sorted(set(keys)) if keys.count(key) > 1]
    for kind, key, body in re.findall(r'^@(\w+)\{([^,\s]+),(.*?)^\}', bib, re.M | re.S):
        if '\n@' in body: bad.append(f'{key} has no end: Quarto stops here')
        pairs = re.findall(r'^\s*(\w+)\s*=\s*\{(.*)\}', body, re.M)
        fields = {name.lower() for name, value in pairs if value.strip()}
        needed = {'author', 'title', 'year', PLACE.get(kind, 'year')}
        bad += [f'{key} lacks {field}' for field in sorted(needed - fields)]
        if not fields & {'url', 'doi', 'howpublished'}:
            bad.append(f'{key} lacks url, doi or howpublished')
        if key not in cited: bad.append(f'{key}: nobody cites it')
    return bad

def test_bibliography():
    texts = [text for path in NBS.glob('*.ipynb') for text in prose(read(path))]
    ok(bibliography_problems((NBS/'references.bib').read_text(encoding='utf-8'), texts))
    assert '::: {#refs}' in (NBS/'references.qmd').read_text(encoding='utf-8')
    assert '- references.qmd' in (ROOT/'_quarto.yml').read_text(encoding='utf-8')

@pytest.mark.parametrize('old, new, problem', [
    ('', '', None), ('  year = {1999}\n', '', 'lacks year'),
    ('author = {A}', 'author = {}', 'lacks author'),
    ('journal = {J}', 'booktitle = {J}', 'lacks journal'),
    ('url = {u}', 'note = {u}', 'lacks url'),
    ('{a1999x', '{b1999x', 'nobody cites'),
    ('@article', '@article{a1998x,\n  year = {1998}\n@article', 'has no end'),
    ('@article', '@article{a1999x,\n}\n\n@article', 'twice')])
def test_bibliography_problems_are_found(old, new, problem):
    good = ('@article{a1999x,\n  title = {T},\n  author = {A},\n  journal = {J},\n'
            '  url = {u},\n  year = {1999}\n}\n')
    found = bibliography_problems(good.replace(old, new, 1) if old else good,
                                  ['as [@a1999x, ch. 1] says, not `@b1999x`'])
    if problem is None: assert found == []
    else: assert any(problem in line for line in found)
