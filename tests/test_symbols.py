"""Tables of symbols say what is there, and a symbol lights up in formula, code and
figure: by mouse, keyboard and touch, in its own section only."""
import base64
import io
import json
import re
import shutil
import subprocess

import pytest
import site_checks
from conftest import ROOT
from page_places import NBS, ok, read, source
from page_places import anchors as places_of

from nntrain.figure_web import _script, _squeeze_js, _style, _web
from nntrain.listing import _prose
from nntrain.symbols import (SymbolsProc, _boxes, _keys, _legend, _picture_text,
                             _written, read_symbols, symbols_drawn, symbols_in,
                             symbols_table)

BASE = 'https://nntrain.example/book/'
TOPICS = 'initialization', 'momentum', 'debiasing', 'adaptive'
CHAPTERS = [p for p in sorted(NBS.glob('[0-7]*_*.ipynb')) if p.stem[3:] in TOPICS]

def markdown(nb):
    return '\n\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'markdown')


def as_cell(c):
    cell = _prose(source(c), c.get('id'))
    cell.update(cell_type=c['cell_type'], outputs=c.get('outputs', ()))
    return cell


# ---- what the tables say -------------------------------------------------------------

def table_problems(nb):
    "Names that no code has, symbols that no formula has, places that are not there"
    text, anchors = markdown(nb), places_of(nb)
    code = '\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'code')
    prose = re.sub(r'^\| \$.*', '', text, flags=re.M)  # without the table
    tex = ' '.join(map(''.join, re.findall(r'\$\$(.+?)\$\$|\$([^$\n]+)\$', prose,
                                           re.S)))
    used = {k for keys in _keys(tex) for k in keys}
    shown = json.dumps([c.get('outputs', []) for c in nb['cells']], ensure_ascii=False)
    shown += ' '.join(_picture_text(as_cell(c)) for c in nb['cells'])
    for s in read_symbols(text):
        for name in s.names:
            if not re.search(rf'\b{name}\b', code): yield f'{s.tex}: no {name} in code'
        for word in s.figures:
            if word not in shown: yield f'{s.tex}: no figure says {word}'
        if _keys(s.tex)[0][0] not in used: yield f'no formula has {s.tex}'
        yield from (f'{s.tex}: no section #{p}' for p in s.places if p not in anchors)
    found = read_symbols(text)
    twice = [(s.tex, p) for s in found for p in s.places or ('',)]
    yield from (f'{t} means two things in #{p}' for t, p in sorted(set(twice))
                if twice.count((t, p)) > 1)

@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_tables_say_what_is_there(path):
    nb = read(path)
    assert len(read_symbols(markdown(nb))) >= 8
    ok(list(table_problems(nb)))

TABLE = '''<details><summary>The symbols of this chapter</summary>

| symbol | in code | meaning | values | where |
|---|---|---|---|---|
| $β_1$ | `beta1` | share that is kept | [0, 1) | |
| $λ$ | `curvature` | curvature | | [One](#one) |
| $λ$ | `decay` | strength of the decay | | [Two](#two) |
| $\\hat m$ | `m_hat`, “compass” | mean | | |

</details>
'''
SYMBOLS = read_symbols(TABLE)

@pytest.mark.parametrize('old, new, problem', [
    ('', '', None), ('`beta1`', '`gamma`', 'no gamma in code'),
    ('“compass”', '“ruler”', 'no figure says ruler'), ('$β_1$', '$β_2$', 'no formula'),
    ('#two', '#three', 'no section #three'), ('#two', '#one', 'two things in #one')])
def test_wrong_tables_are_found(old, new, problem):
    text = '## One\n\n$β_1 λ \\hat m$\n\n## Two\n\n' + TABLE.replace(old, new, 1)
    cells = [dict(cell_type='markdown', source=text),
             dict(cell_type='code', source='beta1, curvature, decay, m_hat',
                  outputs=[dict(text='compass')])]
    found = list(table_problems(dict(cells=cells)))
    assert found == [] if problem is None else problem in '; '.join(found)

PICTURES = {  # chapter: pictures that name symbols, and which
    'initialization': {'products': 'σ'},
    'momentum': {'turned': r'β λ p', 'roots': r'\text{lr} λ β z', 'memory': 'β',
                 'effective-rate': r'\text{lr} β'},
    'debiasing': {'missing': 'β', 'bias-variance': 'β', 'scheduled': 'S β',
                  'training': r'\text{lr} β'},
    'adaptive': {'gradient-sizes': 'g', 'eps-floor': r'ε \hat-v'},
}

@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_pictures_are_followed_by_their_symbols(path):
    class nb: cells = [as_cell(c) for c in read(path)['cells']]
    SymbolsProc(nb).begin()
    found = {}
    for cell, after in zip(nb.cells, nb.cells[1:]):
        if '::: {.sym-list .sym-picture' not in after.source: continue
        label = re.search(r'^#\| label: fig-(\S+)$', cell.source, re.M)[1]
        texs = re.findall(r'^- \[\$([^$]+)\$', after.source, re.M)
        found[label] = ' '.join(t.replace(' ', '-') for t in texs)
    assert found == PICTURES[path.stem[3:]]

LETTERS = {  # of these, the letters in the picture itself light up
    'initialization': {'products': 'σ'},
    'momentum': {'turned': 'p λ', 'roots': r'z β \text{lr} λ', 'memory': 'β',
                 'effective-rate': r'\text{lr} β'},
    'debiasing': {'missing': 'β', 'scheduled': 'S β', 'training': r'\text{lr} β'},
    'adaptive': {'gradient-sizes': 'g', 'eps-floor': r'\hat-v'},
}

@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_pictures_know_where_their_symbols_are(path):
    nb = read(path)
    symbols, found = read_symbols(markdown(nb)), {}
    class page: cells = [as_cell(c) for c in nb['cells']]
    SymbolsProc(page).begin()
    for cell, after in zip(page.cells, page.cells[1:]):
        boxes = re.search(r'::: \{\.sym-list \.sym-picture data-boxes="(.+?)"\}',
                          after.source)
        if not boxes: continue
        label = re.search(r'^#\| label: fig-(\S+)$', cell.source, re.M)[1]
        rows = [list(map(float, b.split())) for b in boxes[1].split(', ')]
        for _, left, top, width, height in rows:
            assert 0 <= left < left + width <= 100 and width < 25
            assert 0 <= top < top + height <= 100 and height < 25
        texs = dict.fromkeys(symbols[int(row[0])].tex for row in rows)
        found[label] = set(t.replace(' ', '-') for t in texs)
    wanted = LETTERS[path.stem[3:]]
    assert found == {label: set(texs.split()) for label, texs in wanted.items()}, (
                             'a picture is drawn anew without its boxes: draw it by '
                             'nntrain_execute, which listens for the symbols')

def test_a_row_that_cannot_be_read_is_refused():
    for old, new in (('$λ$', 'λ'), ('| curvature ', ''), ('| curvature ', '| ')):
        with pytest.raises(ValueError, match=r'not a row of symbols: .*; write \| \$'):
            read_symbols(TABLE.replace(old, new, 1))

@pytest.mark.parametrize('tex, keys', [
    (r'λ_\text{max}', ['λ_max']), (r'\frac{\text{lr}}{n_\text{in}}', ['lr', 'n_in']),
    (r'\sqrt{\hat{v}}', ['hat v']), (r'p_{t+1}', ['p_t+1', 't']),
    (r'\operatorname{sign}(x)', ['x']), (r'\min(a)', ['a'])])
def test_keys_of_a_formula(tex, keys):
    got = [k[0] for k in _keys(tex)]
    assert [k for k in got if k not in 'sign'] == keys

def test_the_glossary_shows_the_tables_of_today():
    nb = read(next(NBS.glob('*_glossary.ipynb')))
    cell, = [c for c in nb['cells'] if 'symbols_table' in source(c)]
    shown = ''.join(cell['outputs'][0]['data']['text/markdown'])
    assert shown == symbols_table(NBS), 'run: nntrain_execute nbs/97_glossary.ipynb'


# ---- letters in pictures -------------------------------------------------------------

HOOK = {'figure.hooks': ['nntrain.picture_words:mark_symbols']}

def draw(table, **how):
    "A picture as PNG, with a red β₁ beside its axis, a hidden λ, and one in a formula"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with pytest.MonkeyPatch.context() as patch, plt.rc_context(HOOK):
        patch.setenv('NNTRAIN_SYMBOLS', table)
        fig, ax = plt.subplots(figsize=(5, 2.5), layout='constrained')
    ax.plot([0, 1], label='λ = 1')
    ax.plot([1, 0], label='$λ$')
    ax.legend(loc='center')
    ax.set_ylabel('β₁', color='red', fontsize=20)
    ax.set(xlabel='size of the compass', title='not β₂, but\nλ·β₁')
    ax.text(.5, .5, 'λ', visible=False)
    out = io.BytesIO()
    fig.savefig(out, format='png', dpi=80, **how)
    plt.close(fig)
    return base64.b64encode(out.getvalue()).decode()

def red(png):
    "Where the red letter is: [left, top, width, height], in percent"
    import numpy as np
    from PIL import Image
    rgb = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
    r, g, b = np.asarray(rgb).astype(int).transpose(2, 0, 1)
    rows, columns = ((r > 200) & (g < 120) & (b < 120)).nonzero()
    wide, tall = rgb.size
    return [100*columns.min()/wide, 100*rows.min()/tall,
            100*(columns.max() + 1 - columns.min())/wide,
            100*(rows.max() + 1 - rows.min())/tall]

@pytest.mark.parametrize('how', [{}, dict(bbox_inches='tight'),
                                 dict(bbox_inches='tight', pad_inches=1)],
                         ids=['whole', 'tight', 'wide'])
def test_boxes_lie_on_the_letters_that_are_drawn(how):
    png = draw(TABLE, **how)
    found = symbols_drawn(png)
    assert sorted(word for word, *_ in found) == ['compass', 'β₁', 'β₁', 'λ', 'λ']
    tall = max((b for b in found if b[0] == 'β₁'), key=lambda b: b[4])
    assert tall[1:] == pytest.approx(red(png), abs=2.5)
    lam = min((b for b in found if b[0] == 'λ'), key=lambda b: b[2])
    beta = min((b for b in found if b[0] == 'β₁'), key=lambda b: b[2])
    assert lam[1] < lam[1] + lam[3] < beta[1] and lam[2] == beta[2]  # λ·β₁ in the title

def test_nothing_is_noted_without_symbols():
    plain = draw('')
    assert symbols_drawn(plain) == [] and b'Symbols' not in base64.b64decode(plain)
    none = draw(TABLE.replace('β_1', 'ψ').replace('λ', 'χ').replace('compass', 'ruler'))
    assert none == plain
    noted = draw(TABLE)
    assert len(plain) < len(noted) < len(plain) + 600
    from PIL import Image
    pixels = [Image.open(io.BytesIO(base64.b64decode(p))).tobytes()
              for p in (plain, noted)]
    assert pixels[0] == pixels[1], 'the picture is the same'


# ---- on a page -----------------------------------------------------------------------

def test_lists_stand_under_formulas_and_say_each_meaning_once():
    text = ('## One\n\n$$λ β_1$$\n\nand\n\n$$λ$$\n\n## Two\n\n$$λ$$\n\n'
            '```\n$$λ$$\n```\n\n> $$λ$$')
    class nb: cells = [_prose(text, 'a'), _prose(TABLE, 'b')]
    SymbolsProc(nb).begin()
    got = nb.cells[0].source
    lists = re.findall(r'::: \{\.sym-list\}\n\n(.*?)\n\n:::', got, re.S)
    code = '`<code>{}</code>`{{=html}}'.format
    assert lists == [
        f'- [$λ$ {code("curvature")}]{{.sym data-sym="1"}} curvature\n'
        f'- [$β_1$ {code("beta1")}]{{.sym data-sym="0"}} share that is kept, [0, 1)',
        f'- [$λ$ {code("curvature")}]{{.sym data-sym="1"}}',
        f'- [$λ$ {code("decay")}]{{.sym data-sym="2"}} strength of the decay']
    assert got.endswith('```\n$$λ$$\n```\n\n> $$λ$$')
    class plain: cells = [_prose(text, 'a')]
    SymbolsProc(plain).begin()
    assert plain.cells[0].source == text and len(plain.cells) == 1

B1 = '<msub><mi>β</mi><mn>1</mn></msub>'
MATH = {  # as pandoc writes it
    'β_1 λ': f'{B1}<mi>λ</mi>', 'λ': '<mi>λ</mi>',
    r'\hat m': '<mover><mi>m</mi><mo accent="true">\u0302</mo></mover>',
    r'β_1^t': '<msubsup><mi>β</mi><mn>1</mn><mi>t</mi></msubsup>'}

def as_math(tex):
    return (f'<math display="block"><semantics><mrow>{MATH[tex]}</mrow><annotation '
            f'encoding="application/x-tex">{tex}</annotation></semantics></math>')

def as_list(tex, place):
    found = symbols_in(tex, SYMBOLS, (place,))
    text = re.sub(r'`(<code>.*?</code>)`\{=html\}', r'\1',
                  _legend(found, SYMBOLS, set()))
    text = re.sub(r'\$(.*?)\$', lambda m: f'<math><mi>{m[1]}</mi></math>', text)
    text = re.sub(r'^- \[(.*)\]\{\.sym (.*?)\}(.*)$', r'<li><span class="sym" \2>\1'
                  r'</span>\3</li>', text, flags=re.M)
    return re.sub(r'::: \{\.sym-list\}(.*?):::', r'<div class="sym-list"><ul>\1</ul>'
                  '</div>', text, flags=re.S)

def as_code(*lines):
    rows = '\n'.join(f'<span id="cb{i}">{line}</span>' for i, line in enumerate(lines))
    return f'<pre><code class="sourceCode python">{rows}</code></pre>'

PICTURE = ('<figure><img alt="A line" src="data:,"><figcaption>A compass of β₁, not of '
           'β₂ or compasses, for λ</figcaption></figure><div class="sym-list '
           'sym-picture"><ul><li><span class="sym" data-sym="0">β₁</span></li></ul>'
           '</div>')
FIGURE = ('<div class="nnx"><div class="nnx-d"><ul><li>compass</li><li>size</li></ul>'
          '<form class="nnx-c"><label for="nnx-f-1-beta1">decay of the mean β₁</label>'
          '<input type="range" id="nnx-f-1-beta1"><label for="nnx-f-1-beta2">decay of '
          'the squares β₂</label><input type="range" id="nnx-f-1-beta2"></form></div>'
          '</div>')
LINE = ('<span class="op">*</span>beta1<span class="op">*</span>my_beta1 + x.beta1 '
        '<span class="co"># β₁ of β₂</span>')

@pytest.fixture(scope='module')
def browser():
    with site_checks.start_browser() as b: yield b

@pytest.fixture
def site(tmp_path):
    data = [dict(key=_keys(s.tex)[0][0], written=_written(s), names=s.names,
                 figures=s.figures, places=s.places) for s in SYMBOLS]
    script = _script(['symbols.js'], 'startSymbols', json.dumps(data))
    one = (as_math('β_1 λ') + as_list('β_1 λ', 'one') + as_code(LINE, 'curvature')
           + f'<p>The <code>beta1</code>.</p>{FIGURE}')
    two = (as_math('λ') + as_list('λ', 'two') + as_math(r'\hat m') + as_math('β_1^t')
           + as_code('curvature - <span class="va">self</span>.decay'))
    (tmp_path/'page.html').write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title><meta '
        'name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        '<style>body {--bs-body-color: #222} .co {color: #696969} body.quarto-dark '
        '{background: #181a1f; color: #ddd; --bs-body-color: #ddd} .quarto-dark .co '
        '{color: #999} .visually-hidden '
        '{position: absolute; clip-path: inset(50%)} ul {padding: 0}</style><main><h1>t'
        f'</h1><section id="one"><h2>One</h2>{one}</section><section id="two"><h2>Two'
        f'</h2>{two}</section><section id="three"><h2>Three</h2>'
        f'{PICTURE}</section>{_style("symbols.css")}{script}</main>', encoding='utf-8')
    drawn = _prose('', 'drawn')
    drawn.outputs = [{'data': {'image/png': draw(TABLE, bbox_inches='tight')}}]
    boxes = _boxes(drawn, SYMBOLS, ('one',))
    png = drawn.outputs[0]['data']['image/png']
    below = as_list('β_1 λ', 'one').replace('"sym-list"',
                                            '"sym-list sym-picture"' + boxes)
    (tmp_path/'picture.html').write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title><meta '
        'name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        '<style>* {box-sizing: border-box} img {max-width: 100%; height: auto} '
        'img {vertical-align: middle} .figure-img {margin-bottom: 2rem} '
        'body.quarto-dark img {background: #fff; padding: 6px} '
        '.visually-hidden {position: absolute; clip-path: inset(50%)}'
        '</style><main><h1>t</h1><section id="one"><h2>One</h2>' + as_math('β_1 λ')
        + '<div class="cell-output"><figure><div><img class="figure-img" alt="A line" '
        f'src="data:image/png;base64,{png}"></div></figure></div>{below}</section>'
        f'{_style("symbols.css")}{script}</main>', encoding='utf-8')
    return tmp_path

@pytest.fixture
def visit(browser, site):
    pages = []
    def go(name='page.html', **how):
        pages.append(site_checks.open_page(browser, site, BASE, name, **how))
        return pages[-1]
    yield go
    for page in pages: page.context.close()

def lit(page):
    return page.locator('.sym-on').evaluate_all('es => es.map(e => e.textContent)')

def test_a_symbol_lights_up_where_it_is_meant(visit):
    page = visit()
    before = page.locator('pre').all_inner_texts()
    page.locator('#one > math').first.locator('mi', has_text='β').hover()
    # the formula, its button, code with a comment, inline code, the slider; β₁ above
    # a power; a caption and the list of its picture; not my_beta1, x.beta1, β₂
    assert lit(page) == ['β1', 'β_1 beta1', 'beta1', 'β₁', 'beta1',
                         'decay of the mean β₁', 'β', '1', 'β₁', 'β₁']
    assert page.locator('pre').all_inner_texts() == before
    page.locator('h1').hover()
    assert page.locator('.sym-on').count() == 0
    page.locator('#two > math').nth(1).locator('mi').hover()
    # a legend, and the caption of a picture
    assert lit(page).count('compass') == 2 and 'size' not in lit(page)
    assert not page.problems

def test_a_letter_may_mean_another_thing_in_another_section(visit):
    page = visit()
    page.get_by_role('button', name='λ curvature').click()
    got = page.locator('.sym-on').evaluate_all(
        'es => es.map(e => e.closest("section").id + " " + e.textContent)')
    assert got == ['one λ', 'one λ curvature', 'one curvature']
    page.get_by_role('button', name='λ decay').click()
    got = page.locator('.sym-on').evaluate_all(
        'es => es.map(e => e.closest("section").id + " " + e.textContent)')
    assert got == ['two λ', 'two λ decay', 'two decay']

def test_by_keyboard_and_in_words(visit):
    page = visit()
    page.keyboard.press('Tab')
    stops = page.evaluate('document.activeElement.textContent'), lit(page)
    assert stops[0] == 'β_1 beta1' and len(stops[1]) > 5  # the focus is enough
    page.keyboard.press('Enter')
    button = page.locator('button.sym').first
    assert button.get_attribute('aria-pressed') == 'true'
    says = page.locator('p[aria-live]')
    assert says.inner_text() == ('Marked in 2 formulas, 2 lines of code and 2 figures.')
    page.keyboard.press('Tab')  # another one has the focus, and lights up
    assert 'curvature' in lit(page)
    page.locator('input').first.focus()  # nothing has: back to the pressed one
    assert 'decay of the mean β₁' in lit(page)
    page.keyboard.press('Escape')
    assert not lit(page) and button.get_attribute('aria-pressed') == 'false'
    inside = page.locator('math').evaluate_all(
        'es => es.flatMap(e => [e, ...e.querySelectorAll("*")])'
        '.filter(e => e.tabIndex >= 0 && e.hasAttribute("tabindex")).length')
    assert inside == 0

def test_a_tap_keeps_it_lit_and_a_second_one_does_not(visit):
    page = visit()
    sign = page.locator('#two > math').nth(1).locator('mi')
    sign.dispatch_event('pointerover', {'pointerType': 'touch', 'bubbles': True})
    assert not lit(page)
    sign.dispatch_event('click', {'bubbles': True})
    assert 'compass' in lit(page)
    sign.dispatch_event('click', {'bubbles': True})
    assert not lit(page)
    sign.dispatch_event('click', {'bubbles': True})
    page.locator('h1').dispatch_event('click', {'bubbles': True})
    assert not lit(page) and not page.problems

def test_without_scripts_the_list_is_text(visit):
    page = visit(scripts=False)
    assert page.locator('button').count() == 0
    assert 'share that is kept, [0, 1)' in page.locator('.sym-list').first.inner_text()

@pytest.mark.parametrize('dark', [False, True])
def test_phones_and_checkers_are_content(visit, dark):
    page = visit(dark=dark, width=360)
    if dark: page.evaluate('document.body.classList.add("quarto-dark")')
    button = page.locator('button.sym').first
    button.click()
    style = button.evaluate('e => { const s = getComputedStyle(e); '
                            'return [s.outlineStyle, s.textDecorationLine] }')
    assert style == ['solid', 'underline'], 'colour is not the only mark'
    assert button.bounding_box()['height'] >= 24
    assert page.evaluate(site_checks.WIDE, 360) == [] and not page.problems
    axe = site_checks.axe_source()
    if axe:
        bad = site_checks.axe_problems(page, axe)
        assert [b for b in bad if 'axe label' not in b] == []  # sliders of the mock-up

PLACES = """es => es.map(e => {
  const image = e.closest('.sym-over').querySelector('img');
  const pad = parseFloat(getComputedStyle(image).paddingLeft);
  const whole = image.getBoundingClientRect(), r = e.getBoundingClientRect();
  const wide = whole.width - 2*pad, tall = whole.height - 2*pad;
  return [100*(r.x - whole.x - pad)/wide, 100*(r.y - whole.y - pad)/tall,
          100*r.width/wide, 100*r.height/tall];
})"""
ROOM = 'e => JSON.stringify(e.getBoundingClientRect())'

@pytest.mark.parametrize('dark, width', [(False, 1280), (True, 1280), (True, 360)])
def test_letters_in_a_picture_light_up(visit, dark, width):
    page = visit('picture.html', dark=dark, width=width)
    if dark: page.evaluate('document.body.classList.add("quarto-dark")')
    places = [page.locator(w) for w in ('figure', 'img', '.sym-list')]
    before = [p.evaluate(ROOM) for p in places]
    page.locator('math mi', has_text='β').first.hover()
    marks = page.locator('.sym-over .sym-on')
    assert marks.count() == 2
    assert [p.evaluate(ROOM) for p in places] == before, 'nothing moves'
    found = max(marks.evaluate_all(PLACES), key=lambda b: b[3])
    png = page.locator('img').get_attribute('src').partition('base64,')[2]
    assert found == pytest.approx(red(png), abs=2.7)  # so it is not shifted by a rim
    style = marks.first.evaluate('e => getComputedStyle(e).outlineColor')
    assert style == 'rgb(179, 89, 0)', 'on white, also in the dark theme'
    marks.last.hover(force=True)  # and from the picture to the formula and the button
    assert [text for text in lit(page) if text][:2] == ['β1', 'β_1 beta1']
    page.locator('h1').hover()
    assert page.locator('.sym-on').count() == 0
    marks = page.locator('.sym-over [data-sym="0"]')
    marks.first.dispatch_event('click', {'bubbles': True})  # a tap
    assert page.locator('button.sym').first.get_attribute('aria-pressed') == 'true'
    page.keyboard.press('Escape')
    page.locator('button.sym').last.focus()  # by keyboard: λ, in title and legend
    assert page.locator('.sym-over .sym-on').count() == 2
    hidden = page.locator('.sym-over > span').get_attribute('aria-hidden')
    assert hidden == 'true' and not page.problems
    assert page.evaluate(site_checks.WIDE, width) == []
    axe = site_checks.axe_source()
    if axe: assert site_checks.axe_problems(page, axe) == []

def test_a_picture_is_plain_without_scripts(visit):
    page = visit('picture.html', scripts=False)
    assert page.locator('img').is_visible() and page.locator('.sym-over').count() == 0

def test_the_script_is_readable_and_small(tmp_path):
    text = _web('symbols.js')
    assert max(map(len, text.splitlines())) <= 88 and len(_squeeze_js(text)) < 8_000
    if not (node := shutil.which('node')): pytest.skip('node is not installed')
    (tmp_path/'symbols.js').write_text(_squeeze_js(text), encoding='utf-8')
    done = subprocess.run([node, '--check', tmp_path/'symbols.js'], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()

def test_the_processor_is_one_of_the_site():
    assert 'nntrain.symbols:SymbolsProc' in (ROOT/'settings.ini').read_text()
