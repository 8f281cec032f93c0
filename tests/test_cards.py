"""Cards to remember: each stands alone, keeps to what its chapter says, and works on a
page by keyboard, without scripts, and in a browser that keeps nothing."""
import csv
import json
import re
import shutil
import subprocess

import pytest
import site_checks
from conftest import ROOT
from page_places import NBS, ok, read, source
from page_places import anchors as places

from nntrain.cards import _CARD, _HEAD, Card, deck_csv, nntrain_cards, read_cards
from nntrain.cards_page import _box, _list
from nntrain.figure_web import _squeeze_js, _web

CARDS = read_cards(NBS)
CHAPTERS = sorted(NBS.glob('[0-7]*_*.ipynb'))
BASE = 'https://nntrain.example/book/'


# ---- what a card says ----------------------------------------------------------------

NUMBER = re.compile(r'(?<![\w.])(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:e-?\d+)?')
POINTS = (r'\b(?:(?:see|shown|as) (?:above|below)|'
          r'(?:this|the) (?:figure|chapter|section))\b')

def words(html): return re.sub('<[^>]+>', '', html)

def sentences(text):
    text = re.sub(r'`[^`]*`|\$[^$]*\$', 'x', text)
    return len(re.findall(r'[.?!](?=[”’)]*(?:\s|$))', text))

def told(nb):
    "All that a chapter says and prints, without its cards"
    texts = [re.sub(r'^## Remember.*?(?=^## |\Z)', '', source(c), flags=re.M | re.S)
             for c in nb['cells']]
    for c in nb['cells']:
        for o in c.get('outputs', ()):
            texts.append(''.join(o.get('text', '')))
            texts += [''.join(v) for k, v in o.get('data', {}).items()
                      if k.startswith('text/')]
    return '\n'.join(texts)

def card_problems(card, anchors, text):
    "What keeps a card from standing alone; `text`: what its chapter says"
    both = f'{words(card.question)} {card.answer}'
    if '?' not in card.question: yield 'the question asks nothing'
    if sentences(words(card.question)) > 2: yield 'a question of over two sentences'
    if not 1 <= sentences(card.answer) <= 3: yield 'an answer of over three sentences'
    if len(card.answer) > 330: yield f'an answer of {len(card.answer)} letters'
    if '$' in card.question or '`' in card.question: yield 'write <code> and letters'
    if card.place not in anchors: yield f'no section #{card.place}'
    if found := re.search(POINTS, both): yield f'points at the page: {found[0]}'
    known = set(NUMBER.findall(text))
    for n in set(NUMBER.findall(both)) - known:
        if n not in ('0', '1', '2', '3'): yield f'the chapter does not say {n}'

@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_cards_of_a_chapter(path):
    nb, cards = read(path), [c for c in CARDS if c.file == path.name]
    assert 5 <= len(cards) <= 10, f'{len(cards)} cards in the section Remember'
    assert len(nb['cells']) <= 100
    text, anchors = told(nb), places(nb)
    ok([f'{words(c.question)[:40]}…: {problem}' for c in cards
        for problem in card_problems(c, anchors, text)])

@pytest.mark.parametrize('change, problem', [
    ({}, None), ({'question': 'No question.'}, 'asks nothing'),
    ({'question': 'One. Two. Three?'}, 'two sentences'),
    ({'answer': 'One. Two. Three. Four.'}, 'three sentences'),
    ({'answer': 'long '*70 + '.'}, 'letters'), ({'question': '$x$?'}, '<code>'),
    ({'place': 'nowhere'}, 'no section'),
    ({'answer': 'See the figure.'}, 'points at the page'),
    ({'answer': 'It is .37.'}, 'does not say .37')])
def test_bad_cards_are_found(change, problem):
    good = dict(file='10_a.ipynb', title='A', question='Why 7?', answer='As .25 is.',
                heading='H', place='h')
    found = list(card_problems(Card(**good | change), {'h'}, 'the 7 of .25'))
    assert found == [] if problem is None else problem in '; '.join(found)

def test_no_card_comes_twice():
    for name in ('question', 'answer', 'id'):
        seen = [getattr(c, name) for c in CARDS]
        assert len(set(seen)) == len(seen), name

def test_a_section_without_the_form_is_refused(tmp_path):
    folded = '<details><summary>Q?</summary>\n\nA.\n\n→ [H](#h)\n\n</details>'
    def chapter(text):
        nb = dict(cells=[dict(cell_type='markdown', source=['# T\n', text])])
        (tmp_path/'10_a.ipynb').write_text(json.dumps(nb), encoding='utf-8')
        return read_cards(tmp_path)
    assert chapter(f'## Other\n\n{folded}') == []
    assert len(chapter(f'## Remember\n\n{folded}\n\n## Other\n\n{folded}')) == 1
    for bad in (folded.replace('→ ', ''), folded.replace('\n\nA', '\nA')):
        assert not _CARD.fullmatch(bad)
        with pytest.raises(ValueError, match='10_a.ipynb: not a card.*write the'):
            chapter(f'## Remember\n\n{bad}')


# ---- decks for Anki ------------------------------------------------------------------

def test_a_deck_holds_all_cards_and_formulas_anki_knows():
    text = deck_csv(CARDS, 'https://me.org')
    rows = list(csv.reader(text.removeprefix(_HEAD).splitlines()))
    assert len(rows) == len(CARDS) and all(len(row) == 3 for row in rows)
    for (front, back, tags), c in zip(rows, CARDS):
        assert front == c.question and tags.split()[1] == f'nntrain::{c.topic}'
        assert '$' not in back and '`' not in back and '](' not in back
        assert back.count(r'\(') == back.count(r'\)') == c.answer.count('$')/2
        assert f'https://me.org/{c.topic}.html#{c.place}' in back

def test_the_command_says_what_it_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert nntrain_cards([str(tmp_path/'new')]) == 0
    n = len({c.topic for c in CARDS})
    assert f'{n + 1} decks' in capsys.readouterr().out
    assert len(list((tmp_path/'new').iterdir())) == n + 1
    mine = tmp_path/'mine'
    mine.mkdir()
    (mine/'momentum.csv').write_text('1,2\n')
    assert nntrain_cards([str(mine)]) == 2
    said = capsys.readouterr().err
    assert 'momentum.csv is not a deck of cards' in said and said.count('\n') == 1
    assert [p.read_text() for p in mine.iterdir()] == ['1,2\n']


# ---- in a browser --------------------------------------------------------------------

def as_page(text):
    "The Markdown of a box as a page: what Quarto would make of it, in short"
    text = re.sub(r'````\{=html\}\n(.*?)\n````', r'\1', text, flags=re.S)
    text = re.sub(r'`(<code>.*?</code>)`\{=html\}', r'\1', text)
    text = re.sub(r'^### (.*?) \{#(.*?)\}$', r'</section><section id="\2"><h3>\1</h3>',
                  text, flags=re.M)
    text = re.sub(r'^::: \{\.recall( \.recall-box)? (data-.*?)\}$',
                  r'<div class="recall\1" \2>', text, flags=re.M)
    text = re.sub(r'^:::$', '</div>', text, flags=re.M)
    text = text.replace('recall .recall-box', 'recall recall-box')
    text = re.sub(r'\[([^\]\n]*)\]\(([^)\n]*)\)(\{[^}\n]*\})?', r'<a href="\2">\1</a>',
                  text)
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title>'
            '<meta name="viewport" content="width=device-width"><link rel="icon" href='
            f'"data:,"><main><h1>t</h1><section>{text}</section></main>')

ASKED = [c for c in CARDS if c.topic == 'momentum']

@pytest.fixture(scope='module')
def browser():
    with site_checks.start_browser() as b: yield b

@pytest.fixture
def site(tmp_path):
    (tmp_path/'box.html').write_text(as_page(_box(ASKED)), encoding='utf-8')
    (tmp_path/'all.html').write_text(as_page(_list(CARDS)), encoding='utf-8')
    return tmp_path

@pytest.fixture
def visit(browser, site):
    pages = []
    def go(name='box.html', before=None, **how):
        page = site_checks.open_page(browser, site, BASE, name, **how)
        pages.append(page)
        if before:
            page.context.add_init_script(before)
            page.reload()
        return page
    yield go
    for page in pages: page.context.close()

def shown(page): return page.locator('.recall-card:not([hidden])')
def questions(page): return [t.split(' ↻')[0].split(' ✓')[0]
                             for t in shown(page).locator('summary').all_inner_texts()]

def answer(page, i, knew):
    "By keyboard alone: open card number i, go to the button, press it"
    card = shown(page).nth(i)
    card.locator('summary').focus()
    if not card.evaluate('e => e.open'): page.keyboard.press('Enter')
    for _ in range(9):
        page.keyboard.press('Tab')
        if page.evaluate('document.activeElement.dataset.knew') == str(int(knew)): break
    page.keyboard.press('Space')

def test_what_you_did_not_know_comes_first_next_time(visit):
    page = visit()
    first = questions(page)
    assert first == [words(c.question) for c in ASKED[:3]]
    answer(page, 1, knew=False)
    answer(page, 0, knew=True)
    says = page.locator('.recall-says')
    assert says.inner_text() == 'Noted: known.'
    assert page.locator(':focus').get_attribute('aria-pressed') == 'true'
    page.reload()
    again = questions(page)
    assert again[0] == first[1] and first[0] not in again
    assert '↻ not yet' in shown(page).first.locator('summary').inner_text()
    kept = page.evaluate('JSON.parse(localStorage["nntrain-cards"])')
    assert set(kept) == {ASKED[0].id, ASKED[1].id}
    assert kept[ASKED[0].id][0] == 1 and kept[ASKED[1].id][0] == 0
    answer(page, 0, knew=True)
    answer(page, 0, knew=True)  # the same card: twice in a row
    kept = page.evaluate('JSON.parse(localStorage["nntrain-cards"])')
    assert kept[ASKED[1].id][0] == 2
    assert not page.problems

def test_all_progress_can_be_deleted(visit):
    page = visit()
    page.evaluate('localStorage["other"] = "mine"')
    answer(page, 0, knew=True)
    page.get_by_role('button', name='Delete all my progress').press('Enter')
    assert page.locator('.recall-says').inner_text() == 'All progress is deleted.'
    assert page.evaluate('Object.keys(localStorage)') == ['other']
    assert '✓' not in shown(page).first.inner_text()
    page.reload()
    assert questions(page) == [words(c.question) for c in ASKED[:3]]

REFUSED = ('Object.defineProperty(window, "localStorage", {get() {'
           'throw new DOMException("no", "SecurityError")}})')
FULL = ('Storage.prototype.setItem = () => {'
        'throw new DOMException("full", "QuotaExceededError")}')

@pytest.mark.parametrize('before, lasts', [
    (REFUSED, False), (FULL, False),
    ('localStorage["nntrain-cards"] = "{"', True),
    ('localStorage["nntrain-cards"] = "[7]"', True),
    (f'localStorage["nntrain-cards"] = \'{{"{ASKED[0].id}": 7}}\'', True)])
def test_a_browser_that_keeps_nothing_or_rubbish(visit, before, lasts):
    page = visit(before=before)
    assert shown(page).count() == 3
    answer(page, 0, knew=False)
    assert 'not yet' in shown(page).first.locator('summary').inner_text()
    said = page.locator('.recall-says').inner_text()
    assert said.startswith('Noted: not yet.') and ('forgotten' in said) != lasts
    page.get_by_role('button', name='Delete all my progress').click()
    assert 'not yet' not in shown(page).first.locator('summary').inner_text()
    assert not page.problems

def test_without_scripts_cards_are_folded_text(visit):
    page = visit(scripts=False)
    assert questions(page) == [words(c.question) for c in ASKED[:3]]
    assert page.locator('button:visible').count() == 0
    shown(page).first.locator('summary').click()
    assert ASKED[0].answer[:20] in shown(page).first.inner_text()

def test_the_page_of_all_cards_is_filtered(visit):
    page = visit('all.html')
    said = page.locator('.recall-n')
    assert said.inner_text() == f'{len(CARDS)} cards'
    page.get_by_label('Chapter').select_option('momentum')
    assert said.inner_text() == f'{len(ASKED)} cards'
    assert page.locator('h3:visible').all_inner_texts() == [f'10 {ASKED[0].title}']
    card = page.locator('.recall-card:visible').first
    card.locator('summary').click()
    card.get_by_role('button', name='I knew it').click()
    page.get_by_label('only what I do not know yet').check()
    assert said.inner_text() == f'{len(ASKED) - 1} cards'
    page.get_by_role('button', name='Delete all my progress').click()
    assert said.inner_text() == f'{len(ASKED)} cards' and not page.problems

@pytest.mark.parametrize('name', ['box.html', 'all.html'])
@pytest.mark.parametrize('dark', [False, True])
def test_phones_and_checkers_are_content(visit, name, dark):
    page = visit(name, dark=dark, width=360)
    page.evaluate(site_checks.UNFOLD)
    assert page.evaluate(site_checks.WIDE, 360) == []
    small = page.locator('button:visible, summary:visible, select').evaluate_all(
        'es => es.filter(e => e.getBoundingClientRect().height < 18).length')
    assert not small and not page.problems
    axe = site_checks.axe_source()
    if axe: assert site_checks.axe_problems(page, axe) == []

def test_a_page_stays_small():
    assert len(as_page(_box(ASKED))) < 20_000 and len(as_page(_list(CARDS))) < 300_000

def test_the_script_is_readable_and_loads_alone(tmp_path):
    text = _web('cards.js')
    assert max(map(len, text.splitlines())) <= 88
    if not (node := shutil.which('node')): pytest.skip('node is not installed')
    (tmp_path/'cards.js').write_text(_squeeze_js(text) + '\nturn', encoding='utf-8')
    done = subprocess.run([node, '--check', tmp_path/'cards.js'], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
