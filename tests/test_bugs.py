"""The bug museum: what hangs on the walls is what was trained. The parts and their
checks run in the notebook itself."""
import ast
import codecs
import json
import random
import re

import pytest
import torch
from conftest import ROOT

from nntrain import museum
from nntrain.part_checks import check_evaluate

NOTEBOOK = json.loads((ROOT / 'nbs/25_bugs.ipynb').read_text(encoding='utf-8'))
CELLS = [(c['cell_type'], ''.join(c['source'])) for c in NOTEBOOK['cells']]
CODE = [src for kind, src in CELLS if kind == 'code']
TEXT = '\n\n'.join(src for kind, src in CELLS if kind == 'markdown')


def exhibits(cells):
    "{number: (part, healthy line, broken line)}"
    secret = re.search(r"SECRET = r'''\n(.*?)\n'''", '\n'.join(cells), re.S)[1]
    entries = codecs.decode(secret, 'rot13').split('\n\n')
    return {n: edit for n, *edit in map(ast.literal_eval, entries)}

def part_cell(cells, name):
    "Source of a part: of a class, the whole cell, which holds nothing else"
    found = (re.search(rf'^(def|class) {name}\b.*?(?=^\S|\Z)', src, re.S | re.M)
             for src in cells)
    return next(hit for hit in found if hit)[0].strip()

def answer(n):
    "The answer to an exhibit, inside of the folded answers of its room"
    return re.search(rf'^\*\*Exhibit {n}: (.*?)(?=^\*\*Exhibit|^</details>)', TEXT,
                     re.S | re.M)[1]

EXHIBITS = exhibits(CODE)
each = pytest.mark.parametrize('n', EXHIBITS)


def test_a_metric_that_broadcasts_is_found_whatever_the_draw():
    "If a network gives all samples one class, the wrong metric tells the truth"
    exhibit = museum.variant(museum.EXHIBITS[2][1:])
    for seed in range(1000):
        torch.manual_seed(seed), random.seed(seed)
        with pytest.raises(AssertionError, match='are right, that is'):
            check_evaluate(exhibit.evaluate)


@each
def test_the_line_stands_once_in_its_part(n):
    part, old, new = EXHIBITS[n]
    healthy = part_cell(CODE, part)
    assert healthy.count(old) == 1
    ast.parse(healthy.replace(old, new))

@each
def test_no_code_shows_the_broken_line(n):
    "A room can be played: faulty lines stand in the secret and in folded answers only"
    part, old, new = EXHIBITS[n]
    healthy, broken = part_cell(CODE, part), part_cell(CODE, part).replace(old, new)
    was = [line.strip() for line in healthy.splitlines()]
    faulty = {line.strip() for line in broken.splitlines()} - set(was)
    shown = [line.strip() for src in CODE for line in src.splitlines()]
    assert not faulty & set(shown)

@each
def test_answer_shows_the_exchanged_lines(n):
    part, old, new = EXHIBITS[n]
    healthy, broken = part_cell(CODE, part), part_cell(CODE, part).replace(old, new)
    lines = re.search(r'```text\n(.*?)\n```', answer(n), re.S)[1].splitlines()
    gone, back = (
        [' '.join(line[1:].split()) for line in lines if line[0] == sign]
        for sign in '-+')
    assert gone or back
    for sign, those, text in ('-', gone, broken), ('+', back, healthy):
        there = [' '.join(s.split()) for s in text.splitlines()]
        assert all(line in there for line in those), sign

@each
def test_answer_is_folded_and_says_what_to_look_at(n):
    reply = answer(n)
    assert '**What gives it away**' in reply and '**Repair**' in reply
    in_view = re.sub('<details>.*?</details>', '', TEXT, flags=re.S)
    assert f'Exhibit {n}:' not in in_view, 'something of the answer is in view'
    hints = re.findall(
        r'<summary>Hints for room \d</summary>(.*?)</details>', TEXT, re.S)
    assert sum(len(re.findall(rf'^- \*\*{n}\*\* \S', h, re.M)) for h in hints) == 1

def test_each_exhibit_is_in_the_checklist():
    nb = json.loads((ROOT/'nbs/26_preflight.ipynb').read_text(encoding='utf-8'))
    texts = [''.join(c['source']) for c in nb['cells']]
    table = next(text for text in texts if '### A checklist' in text)
    assert set(EXHIBITS) == {
        int(k) for group in re.findall(r'\(([\d, ]+)\)', table)
        for k in group.split(',')}

def test_each_room_has_as_many_suspects_as_exhibits():
    rooms = re.findall(r'suspects, in no particular order:\n\n((?:- .*\n)+)', TEXT)
    assert [len(r.splitlines()) for r in rooms] == [6, 6, 6, 8]
    assert list(EXHIBITS) == list(range(1, 27))

def test_the_letters_of_a_room_are_those_of_its_suspects():
    secret = re.search(r"^LETTERS = '(.*?)'", '\n'.join(CODE), re.M)[1]
    rooms = codecs.decode(secret, 'rot13').split()
    suspects = re.findall(r'suspects, in no particular order:\n\n((?:- .*\n)+)', TEXT)
    for letters, lines in zip(rooms, suspects, strict=True):
        assert sorted(letters) == re.findall(r'^- \*\*(\w)\*\*', lines, re.M)

def test_what_the_workbench_shows_is_folded():
    shown = [''.join(out['data']['text/html']) for c in NOTEBOOK['cells']
             if ''.join(c['source']).startswith('workbench(') for out in c['outputs']]
    assert len(shown) == 4
    folded = re.compile(r'<details><summary>(?:(?!<details).)*</details>', re.S)
    assert all(folded.fullmatch(text) for text in shown)
    text = ''.join(shown)
    assert [int(n) for n in re.findall(r'<p>Exhibit (\d+)</p>', text)] == [*EXHIBITS]
    assert text.count('is broken: ') == len(EXHIBITS)

def test_no_directive_is_shown_as_code():
    shown = [''.join(out.get('data', {}).get('text/html', '')) for c in
             NOTEBOOK['cells'] for out in c.get('outputs', ())]
    assert '#|' not in ''.join(shown)
    assert not any('#|' in text for text in museum.PARTS.values())

def test_the_module_holds_the_programs_of_the_notebook():
    assert museum.PARTS == {name: part_cell(CODE, name) for name in museum.PARTS}
    assert EXHIBITS == museum.EXHIBITS

@pytest.fixture(scope='module')
def rooms():
    "`guess` as the notebook defines it, with a workbench that notes what it shows"
    cell = next(src for src in CODE if 'def guess(' in src)
    text = re.search(r'^def guess.*?(?=^\S|\Z)', cell, re.S | re.M)[0]
    opened = []
    space = dict(decoded=museum.decoded, LETTERS=museum.LETTERS,
                 workbench=opened.append, ROOMS={1: range(1, 7), 4: range(19, 27)})
    exec(text, space)
    return space['guess'], opened

def test_a_guess_opens_what_is_right_and_nothing_else(rooms, capsys):
    guess, opened = rooms
    right = museum.decoded(museum.LETTERS).split()[0]
    guess(1, right[1] + right[0] + right[2:])
    assert opened.pop() == [3, 4, 5, 6] and not opened
    assert '4 of 6 are right, [3, 4, 5, 6]' in capsys.readouterr().out
    guess(1, right[1:] + right[0])
    assert '0 of 6 are right, none' in capsys.readouterr().out and not opened

@pytest.mark.parametrize('letters', ['abc', 'aabcde', 'abcdeg', ''])
def test_a_guess_of_another_form_is_refused(rooms, capsys, letters):
    guess, opened = rooms
    guess(1, letters)
    assert 'each letter from a to f once' in capsys.readouterr().out and not opened
