"""The map of the book on the home page: it holds every chapter, its arrows say what the
chapters need and what their modules import, and its paths can be walked"""
import json
import os
import re
from dataclasses import replace

import project_checks as checks
import pytest
from conftest import ROOT

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

def test_arrows_say_all_and_no_more(home):
    "If you follow the arrows backwards, you meet exactly the chapters that are needed"
    book, into = home['BOOK'], {}
    for a, b, dashed in bookmap.arrows(book):
        if not dashed: into.setdefault(b, set()).add(a)
    def back(t): return {n for a in into.get(t, ()) for n in {a} | back(a)}
    assert {t: back(t) for t in book} == {t: bookmap.behind(book, t) for t in book}

def test_stored_map_is_this_map(home):
    outputs = [''.join(o.get('data', {}).get('text/html', ''))
               for c in read(NBS/'index.ipynb')['cells'] for o in c.get('outputs', ())]
    html = next(text for text in outputs if 'nn-map' in text)
    book, parts = home['BOOK'], home['PARTS']
    run = 'run nntrain_execute nbs/index.ipynb; nntrain_sync'
    assert html == bookmap.draw_map(book, parts), run
    drawn = bookmap.draw_map(book, parts, linked=False) + '\n'
    assert (NBS/'images/map.svg').read_text(encoding='utf-8') == drawn, run
    assert all(f'href="{c.file}"' in html for c in book.values())

def test_boxes_do_not_overlap(home):
    places = [c.place for c in home['BOOK'].values()]
    assert len(set(places)) == len(places) and all(0 <= x <= 3 for x, _ in places)

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
