"""The map of the book on the home page: it holds every chapter, its arrows say what the
chapters need and what their modules import, and its paths can be walked"""
import json
import os
import re
from dataclasses import replace

import project_checks as checks
import pytest
from conftest import ROOT
from site_checks import start_browser

from nntrain import bookmap

NBS = ROOT/'nbs'


def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def topic(path): return path.stem[3:]

@pytest.fixture(scope='module')
def home():
    "Names that the cells of the home page define (the training run left out)"
    before = os.getcwd()
    os.chdir(NBS)
    try:
        space = {'__name__': '__page__'}
        for cell in read(NBS/'index.ipynb')['cells']:
            skipped = re.search(r'learn\.(fit|history)|explore\(|%pip', source(cell))
            if cell['cell_type'] == 'code' and not skipped: exec(source(cell), space)
    finally: os.chdir(before)
    return space

@pytest.fixture(scope='module')
def imported():
    """{topic: topics of chapters whose modules its exported code imports}; an appendix
    that serves chapters from one on counts as a part of that chapter"""
    shared, home_of, found = checks.shared_modules(ROOT), {}, {}
    books = checks.notebooks(ROOT)
    numbers = {checks.chapter(p): topic(p) for p in books if p.name[0] in '01234567'}
    def part_of(path): return numbers.get(
        checks.SHARED_FROM.get(path.stem, checks.chapter(path)))
    for path, nb in books.items():
        own = part_of(path) or topic(path)
        home_of.update({name: own for name, _ in checks.exporting_to(nb)})
    for path, nb in books.items():
        if not (own := part_of(path)): continue
        modules = {m for _, src in checks.exporting_to(nb)
                   for m in checks.imported_modules(src)} - shared
        needed = {home_of[m] for m in modules if m in home_of}
        found[own] = found.get(own, set()) | needed - {own}
    return found

def map_problems(book, imported):
    "What the map leaves out, or says without a reason"
    problems = [f'{t} is not on the map' for t in sorted(imported.keys() - book.keys())]
    for t in sorted(imported.keys() & book.keys()):
        c, met = book[t], bookmap.behind(book, t)
        problems += [f'{t} imports {n}, and does not say that it needs it'
                     for n in sorted(imported[t] - met - set(c.helps))]
        problems += [f'{t} needs {n}, which comes later' for n in c.needs
                     if book[n].file >= c.file]
        if not c.minutes: problems.append(f'{t} does not say how long it takes: '
                                          '"**Time**: … 40 minutes"')
    return problems

def test_map_is_true(home, imported):
    assert not (found := map_problems(home['BOOK'], imported)), '\n'.join(found)

def test_map_problems_are_found(home, imported):
    book = home['BOOK']
    def found(t, **change): return map_problems(book | {t: replace(book[t], **change)},
                                                imported)
    assert 'momentum does not say how long' in ' '.join(found('momentum', minutes=0))
    assert 'momentum imports optimizers, and does not say that it needs it' in found(
        'momentum', needs=['mechanics'])
    assert 'data needs recipe, which comes later' in found('data', needs=['recipe'])
    assert map_problems(book, imported | {'none': set()}) == ['none is not on the map']

@pytest.mark.parametrize('text, needs, helps, minutes', [
    ('**You need** [chapter 0](00_a.ipynb), [1](01_b.ipynb#x). [2](02_c.ipynb) helps.'
     '\n**Time**: reading takes about 40 minutes.', ['a', 'b'], ['c'], 40),
    ('**You need** [a](00_a.ipynb), [a](00_a.ipynb#y). The last section uses '
     '[b](01_b.ipynb).', ['a'], ['b'], 0),
    ('Python, and 3 apples', [], [], 0),
])
def test_what_a_chapter_says(text, needs, helps, minutes):
    nb = dict(cells=[dict(cell_type='markdown', source=[text])])
    assert bookmap.said(nb) == (needs, helps, minutes)

def stored():
    "The map as the home page holds it: HTML"
    outputs = [''.join(o.get('data', {}).get('text/html', ''))
               for c in read(NBS/'index.ipynb')['cells'] for o in c.get('outputs', ())]
    return next(text for text in outputs if 'nn-map' in text)

def test_stored_map_is_this_map(home):
    assert stored() == bookmap.draw_map(home['BOOK'], home['PARTS']), (
        'run nntrain_execute nbs/index.ipynb; nntrain_sync')

def test_parts_are_those_of_the_menu(home):
    menu = checks.yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    parts = [(part['part'], [name[3:-6] for name in part['chapters']])
             for part in menu['book']['chapters'] if 'part' in part]
    assert [(name, topics) for name, topics, *_ in home['PARTS']] == parts

def test_each_chapter_says_what_it_is_and_needs(home):
    book = home['BOOK']
    told = re.findall(
        r'<li class="m-(\w+)"><a href="([\w.]+)"><b>(\d+)</b> (.*?)</a><p>(.*?)</p>'
        r'<p class="needs">needs (.*?) · (\d+)\xa0min', stored())
    assert [t[0] for t in told] == list(book)
    for (t, *found), row in zip(told, bookmap.map_table(book).splitlines()[2:]):
        c, needs = book[t], row.split(' | ')[2]
        plain = [re.sub('</?code>', '`', text).replace('&#x27;', "'") for text in found]
        assert plain == [c.file, c.number, c.title, c.promise, needs or 'nothing',
                         str(c.minutes)]

def test_the_end_of_the_book_is_on_the_home_page():
    shown = ' '.join(source(c) for c in read(NBS/'index.ipynb')['cells'])
    ends = [p.name for p in NBS.glob('[89]*.ipynb')]
    assert not (missing := [name for name in ends if f'({name}' not in shown]), missing

def test_map_is_readable_on_a_phone_and_by_keyboard(home):
    "Nothing is cut off or tiny; under the focus, what a chapter builds on has a frame"
    book = home['BOOK']
    with start_browser() as browser:
        page = browser.new_page(viewport=dict(width=360, height=700))
        page.set_content(f'<body style="margin:0 16px">{stored()}')
        assert page.evaluate('document.documentElement.scrollWidth') <= 360
        sizes = page.evaluate("""[...document.querySelectorAll('.nn-map :is(a, p, b)')]
            .map(e => parseFloat(getComputedStyle(e).fontSize))""")
        assert min(sizes) >= 13
        low = page.evaluate("""[...document.querySelectorAll('.nn-map li li')]
            .map(e => e.getBoundingClientRect().height)""")
        assert min(low) >= 44
        page.keyboard.press('Tab')          # the first chapter
        for topic, c in book.items():
            framed = page.evaluate("""() => Object.fromEntries(
                [...document.querySelectorAll('.nn-map li li')].map(e =>
                [e.className.slice(2), getComputedStyle(e).outlineStyle]))""")
            behind = bookmap.behind(book, topic)
            assert framed == {t: 'solid' if t in behind else 'dashed' if t in c.helps
                              else 'none' for t in book}, topic
            page.keyboard.press('Tab')

def test_paths_can_be_walked(home):
    """A reader who follows a path has read what each chapter on it needs, but for the
    basics that the line on the page takes for granted"""
    known = {'You are new to training': set(),
             'You know PyTorch': {'mechanics', 'generalization'},
             'You want the library': set(home['BOOK'])}
    for who, topics, _ in home['PATHS']:
        have = set(known[who])
        for t in topics.split():
            needs = set(home['BOOK'][t].needs)
            assert needs <= have | {t}, f'{who}: {t} needs {needs - have}'
            have.add(t)

def test_picture_shows_the_recorded_rows(home):
    from PIL import Image
    shown = json.loads(Image.open(NBS/'images/errors.png').text['Description'])
    assert shown == home['wrong'], 'run nntrain_execute nbs/index.ipynb; nntrain_sync'
