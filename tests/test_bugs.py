"""The bug museum: what hangs on the walls is what was trained. The parts and their
checks run in the notebook itself."""
import ast
import codecs
import json
import re

import pytest
from conftest import ROOT

CELLS = [
    (c['cell_type'], ''.join(c['source']))
    for c in json.loads((ROOT / 'nbs/24_bugs.ipynb').read_text(encoding='utf-8'))[
        'cells'
    ]
]
CODE = [src for kind, src in CELLS if kind == 'code']
TEXT = '\n\n'.join(src for kind, src in CELLS if kind == 'markdown')


def exhibits(cells):
    "{number: (part, healthy line, broken line)}"
    secret = re.search(r"SECRET = r'''\n(.*?)\n'''", '\n'.join(cells), re.S)[1]
    return {
        n: edit
        for n, *edit in map(
            ast.literal_eval, codecs.decode(secret, 'rot13').splitlines()
        )
    }

def part_cell(cells, name):
    "The cell that defines a part"
    return next(src for src in cells if re.match(rf'(def|class) {name}\b', src))

def wrong_stub(cells, n):
    """Why the broken code that hangs beside exhibit n is not what the gallery trained;
    None if it is"""
    part, old, new = exhibits(cells)[n]
    healthy = part_cell(cells, part)
    if healthy.count(old) != 1:
        return f'exhibit {n}: {old!r} stands {healthy.count(old)} times in {part}'
    want = re.sub(
        rf'^(def|class) {part}\b', rf'\1 {part}_{n}', healthy.replace(old, new),
        flags=re.M)
    found = [src for src in cells if re.match(rf'(def|class) \w+_{n}\b', src)]
    if [src.strip() for src in found] != [f'{want}\n\nverdict({part}_{n})']:
        return f'exhibit {n}: its stub is not {part} with {new!r} for {old!r}'

def answer(n):
    "What stands under the heading of an exhibit"
    return re.search(rf'^### Exhibit {n}\n(.*?)(?=^##|\Z)', TEXT, re.S | re.M)[1]

EXHIBITS = exhibits(CODE)
each = pytest.mark.parametrize('n', EXHIBITS)


@each
def test_stub_is_what_the_gallery_trained(n): assert wrong_stub(CODE, n) is None

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
        assert all(
            line in [' '.join(s.split()) for s in text.splitlines()] for line in those
        ), sign

@each
def test_answer_is_folded_and_says_what_to_look_at(n):
    hint, reply = re.findall(
        r'<details><summary>(Hint|Answer)</summary>\n\n(.*?)\n\n</details>', answer(n),
        re.S)
    assert (
        (hint[0], reply[0]) == ('Hint', 'Answer')
        and '**The look that decides**' in reply[1] and '**Repair**' in reply[1])
    assert not re.sub('<details>.*?</details>', '', answer(n), flags=re.S).strip(), (
        'something of the answer is in view')

def test_each_exhibit_is_in_the_checklist():
    table = next(src for kind, src in CELLS if src.startswith('## The same looks'))
    assert set(EXHIBITS) == {
        int(k) for group in re.findall(r'\(([\d, ]+)\)', table)
        for k in group.split(',')}

def test_each_room_has_as_many_suspects_as_exhibits():
    rooms = re.findall(r'suspects, in no order:\n\n((?:- .*\n)+)', TEXT)
    assert [len(r.splitlines()) for r in rooms] == [6, 6, 6, 8] and list(
        EXHIBITS) == list(range(1, 27))

def test_a_stub_that_drifts_is_found():
    assert wrong_stub(
        [
            src.replace('opt.zero_grad()\n    opt.step()', 'opt.step()\n    opt.step()')
            for src in CODE],
        3,
    ).endswith('for \'    opt.step()\\n    opt.zero_grad()\'')
    assert 'stands 0 times' in wrong_stub(
        [src.replace('torch.randperm(len(x))', 'torch.randperm(n)') for src in CODE], 5)
