"""The map of the book on the home page: its arrows, paths and minutes against what the
chapters say and what their modules import"""
import json
import re

import project_checks as checks
import pytest
from conftest import ROOT

NBS = ROOT/'nbs'


def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def key(path): return path.name.split('_')[0]

def numbers(text):
    """Chapters that a text names: chapter 2, chapters 5 to 8, [chapter 11b](…),
    chapters 1 and 2; {} if none"""
    text = re.sub(
        r'\]\((\d\d[a-z]?)_[^)]*\)', r'] chapter \1 ', text)  # a link names its chapter
    found = set()
    for first, last in re.findall(r'chapters (\d+) to (\d+)', text):
        found |= {str(i) for i in range(int(first), int(last) + 1)}
    for run in re.findall(
        r'[Cc]hapters? ((?:\d+[a-z]?)(?:(?:, | and )\d+[a-z]?)*)', text
    ):
        found |= set(re.findall(r'\d+[a-z]?', run))
    return {n if n[-1].isalpha() else f'{int(n):02}' for n in found}

def says(nb):
    """What the first cells of a chapter say: (chapters needed, minutes of reading or
    None)"""
    text = ' '.join(source(c) for c in nb['cells'][:6] if c['cell_type'] == 'markdown')
    needed = re.search(r'\*\*You need\*\*(.*?)(?=\*\*Time|\n\n|$)', text, re.S)
    sentences = (
        [
            s for s in re.split(r'(?<=\.)\s', needed[1])
            if 'helps' not in s and 'last section' not in s]
        if needed
        else []
    )
    minutes = re.search(
        r'reading takes about (\d+) minutes|(an hour|ten minutes of reading)|(\d+) '
        r'minutes of reading', text)
    if minutes:
        minutes = int(
            minutes[1] or minutes[3]
            or {'an hour': 60, 'ten minutes of reading': 10}[minutes[2]])
    return numbers(' '.join(sentences)), minutes

def imports(root, nb):
    "Chapters whose modules a chapter imports: (in exported cells, in any cell)"
    shared = checks.shared_modules(root)
    chapters = {name: key(path) for path, other in checks.notebooks(root).items()
                for name, _ in checks.exporting_to(other)}
    def of(cells):
        found = {
            m for src in cells if '%' not in src for m in checks.imported_modules(src)
            if m not in shared}
        return {chapters[m] for m in found if m in chapters}
    cells = checks.code_cells(nb)
    return of(filter(checks.is_export, cells)), of(cells)

@pytest.fixture(scope='module')
def home():
    "Names that the cells of the home page define (the trainings left out)"
    import os
    before = os.getcwd()
    os.chdir(NBS)
    try:
        space = {'__name__': '__page__'}
        for cell in read(NBS/'index.ipynb')['cells']:
            if cell['cell_type'] == 'code' and not re.search(
                r'learn\.(fit|history)|explore\(|%pip', source(cell)
            ):
                exec(source(cell), space)
    finally: os.chdir(before)
    return space

def map_problems(book, behind, truth):
    """`truth`: {chapter: (needed by its text, imported by its module, imported by any
    of its cells, minutes)}"""
    problems = [f'{k} is missing' for k in sorted(truth.keys() - book.keys())] + [
        f'{k} is no chapter' for k in sorted(book.keys() - truth.keys())]
    for k in sorted(truth.keys() & book.keys()):
        said, imported, used, minutes = truth[k]
        drawn, borrowed, met = (
            set(book[k].needs), set(book[k].borrows),
            behind(k) | set(book[k].helps) | {k})
        problems += [f'{k} says that it needs {n}' for n in sorted(said - drawn)] + [
            f'{k} imports {n}' for n in sorted(imported - behind(k))]
        problems += [
            f'{k} neither says that it needs {n} nor imports it'
            for n in sorted(drawn - said - imported)]
        problems += [
            f'{k} uses {n}, which it neither needs nor borrows'
            for n in sorted(used - met - borrowed)]
        problems += [
            f'{k} borrows {n} for nothing' for n in sorted(borrowed - (used - met))]
        if book[k].minutes != minutes:
            problems.append(f'{k} takes {minutes} minutes, not {book[k].minutes}')
    return problems

@pytest.fixture(scope='module')
def truth():
    found = {}
    for path, nb in checks.notebooks(ROOT).items():
        if not re.match(r'[012]\d_', path.name): continue
        said, minutes = says(nb)
        found[key(path)] = said, *imports(ROOT, nb), minutes
    return found

def test_map_is_true(home, truth):
    assert not (found := map_problems(home['book'], home['behind'], truth)), '\n'.join(
        found)

def test_map_problems_are_found(home, truth):
    book, behind = home['book'], home['behind']
    def found(**change): return map_problems(book, behind, {**truth, **change})
    said, imported, used, minutes = truth['06']
    assert found(**{'06': (said | {'04'}, imported, used, minutes)}) == [
        '06 says that it needs 04']
    assert found(**{'06': (said - {'02'}, imported, used, minutes)}) == [
        '06 neither says that it needs 02 nor imports it']
    assert found(**{'06': (said, imported | {'13'}, used, minutes)}) == [
        '06 imports 13']
    assert found(**{'06': (said, imported, used | {'13'}, minutes)}) == [
        '06 uses 13, which it neither needs nor borrows']
    assert found(**{'06': (said, imported, used, 5)}) == ['06 takes 5 minutes, not 45']
    said, imported, used, minutes = truth['08']
    assert found(**{'08': (said, imported, used - {'04'}, minutes)}) == [
        '08 borrows 04 for nothing']
    assert found(**{'77': (set(), set(), set(), 5)}) == ['77 is missing']

@pytest.mark.parametrize(
    'text, expected',
    [
        ('chapter 0 (loss) and chapter 1 (`x`)', {'00', '01'}),
        ('the ideas of chapters 6 to 8: x', {'06', '07', '08'}),
        ('chapters [12](12_adaptive.ipynb) and [10](10_s.ipynb)', {'08', '10'}),
        (
            'chapters 1 and 2, and [chapter 11b](17_checkpoints.ipynb)',
            {'01', '02', '11b'}),
        ('the [chapter on mechanics](00_mechanics.ipynb)', {'00'}),
        ('Python, and 3 apples', set()),
    ],
)
def test_numbers(text, expected):
    assert numbers(text) == expected

def test_arrows_say_all_and_no_more(home):
    "Whoever follows the arrows backwards meets exactly the chapters that are needed"
    into = {}
    for a, b, dashed in home['arrows']():
        if not dashed: into.setdefault(b, set()).add(a)
    def back(k): return {n for a in into.get(k, ()) for n in {a} | back(a)}
    assert {k: back(k) for k in home['book']} == {
        k: home['behind'](k) for k in home['book']}

def test_stored_map_is_this_map(home):
    outputs = [
        o['data'] for c in read(NBS / 'index.ipynb')['cells']
        for o in c.get('outputs', ()) if 'data' in o]
    html = next(
        text for data in outputs
        if 'nn-map' in (text := ''.join(data.get('text/html', ''))))
    assert html == home['draw_map'](), (
        'run nntrain_execute nbs/index.ipynb; nntrain_sync')
    assert (NBS / 'images/map.svg').read_text(encoding='utf-8') == home['draw_map'](
        linked=False) + '\n'
    assert [f'href="{c.link}"' in html for c in home['book'].values()] == [True] * len(
        home['book'])

def test_boxes_do_not_overlap(home):
    places = [c.place for c in home['book'].values()]
    assert len(set(places)) == len(places) and all(0 <= x <= 3 for x, _ in places)

def test_paths_can_be_walked(home):
    """A reader who follows a path has read what each chapter on it needs, but for the
    basics that his line of the page takes for granted"""
    # readers of other paths know what an optimizer or a convolution is
    for who, keys, _ in home['PATHS'][:1]:
        path = keys.split()
        for i, k in enumerate(path):
            assert set(home['book'][k].borrows) <= set(path[:i]), (
                f'{who}: {k} borrows from a chapter that the path has not met')
    known = {
        'You are new to training': set(), 'You know PyTorch': {'00', '01'},
        'You want the library': set(home['book'])}
    for who, keys, _ in home['PATHS']:
        have = set(known[who])
        for k in keys.split():
            assert set(home['book'][k].needs) <= have | {k}, (
                f'{who}: {k} needs {set(home["book"][k].needs) - have}')
            have.add(k)

def test_picture_shows_the_recorded_rows(home):
    from PIL import Image
    shown = json.loads(Image.open(NBS/'images/errors.png').text['Description'])
    assert shown == home['wrong'], 'run nntrain_execute nbs/index.ipynb; nntrain_sync'
