"""What is done to the finished pages (scripts/finish_site.py), and the site's fonts."""
import html
import json
import re
from zipfile import ZipFile

import pytest
from conftest import ROOT

NBS = ROOT/'nbs'


@pytest.fixture(scope='module')
def scripts():
    import sys
    sys.path.insert(0, str(ROOT/'scripts'))
    import finish_site
    import fonts
    yield dict(finish=finish_site, fonts=fonts)
    sys.path.remove(str(ROOT/'scripts'))

@pytest.fixture
def finish(scripts): return scripts['finish']

def test_style_sheets_keep_what_pages_use(finish):
    css = ('/*! Copyright A */.a,.b>p{color:red}'
           '@media(min-width:1px){.b{x:y}.a:hover{x:y}}/* no */@import "z.css";'
           '.a:not(.b){c:"}"}@font-face{src:url(a;b)}#c .a{d:e}'
           'nav .a{f:g}.a[data-x="{"]{h:i}.b:is(.a){j:k}')
    kept = finish.smaller(css, {'a', 'p'})
    assert kept == ('/*! Copyright A */\n.a{color:red}'
                    '@media(min-width:1px){.a:hover{x:y}}@import "z.css";'
                    '.a:not(.b){c:"}"}@font-face{src:url(a;b)}'
                    '.a[data-x="{"]{h:i}')
    assert finish.smaller(css, {'a', 'b', 'c', 'p', 'nav'}).count('{') == css.count('{')
    assert finish.smaller(kept, {'a', 'p'}) == kept

def test_words_are_those_of_pages_and_scripts(finish, tmp_path):
    (tmp_path/'x.js').write_text('e.classList.add("late")')
    page = '<body class="a b"><nav id="c"><script>toggle("soon")</script>'
    words = finish.words_of(tmp_path, {'p': page})
    assert words >= {'a', 'b', 'c', 'nav', 'late', 'soon'} and 'never' not in words

def test_appendices_have_the_numbers_of_the_texts(finish, tmp_path):
    for name in '28_browser', '80_tape', '82_cards':
        (tmp_path/f'{name}.ipynb').write_text('{}')
    known = finish.appendices(tmp_path)
    assert known == {'tape.html': '80', 'cards.html': '82'}
    span = '<span class="chapter-title">'
    page = ('<title>Appendix A — Tape</title><a href="./tape.html" class="x">'
            f'{span}Tape</span></a><a href="./cards.html"> <i class="b"></i> '
            f'<span class="nav-page-text">{span}Cards</span></span></a>'
            f'<a href="./browser.html">{span}28 Draw</span></a>'
            f'<a href="./references.html">{span}Books</span>')
    text = finish.numbered(page, 'tape.html', known)
    assert '<title>Appendix 80 — Tape<' in text and f'{span}80 Tape<' in text
    assert f'{span}82 Cards<' in text and f'{span}28 Draw<' in text
    assert f'{span}Books<' in text and finish.numbered(text, 'tape.html', known) == text
    assert finish.numbered('Appendix S — Books', 'references.html', known) == 'Books'
    index = tmp_path/'search.json'
    one = dict(href='cards.html#a', title='Appendix C — Cards')
    index.write_text(json.dumps([one]))
    finish.number_search(tmp_path, known)
    assert json.loads(index.read_text())[0]['title'] == 'Appendix 82 — Cards'

PAGE = '''<html><head><script src="a.js"></script></head><body class="x">
<main id="quarto-document-content"><header id="title-block-header"><h1>T</h1></header>
<div class="lead"><p>L</p></div><p id="here"><img src="a.png" alt="A">
<a href="download:a.ipynb">A</a></p>
<span id="cb1-1"><a href="#cb1-1" aria-hidden="true" tabindex="-1"></a>c</span></main>
<nav id="TOC" role="doc-toc"><h2>Contents</h2><ul><li><a href="#here" id="toc-here"
 class="nav-link">Here</a><ul class="no"><li>sub</li></ul></li></ul></nav></body>'''

def test_pages_are_finished_once(finish):
    text = finish.finished(PAGE)
    assert text.index('skip-link') < text.index('<main')
    assert '<script src="a.js" defer>' in text and 'href="#cb1-1"' not in text
    assert '<a href="notebooks/a.ipynb" download>' in text
    assert '<img loading="lazy"' in text and text.count('id="toc-here"') == 1
    box = re.search(r'class="lead".*?</div>\s*<details class="contents-here">(.*?)'
                    '</details>', text, re.S)
    assert box and box[1].count('<li>') == 2 and ' class' not in box[1]
    assert finish.finished(text) == text
    no_lead = finish.finished(PAGE.replace('<div class="lead"><p>L</p></div>', ''))
    places = [no_lead.index(w) for w in ('</header>', 'contents-here', 'id="here"')]
    assert places == sorted(places)
    no_list = re.sub('<nav.*</nav>', '', PAGE, flags=re.S)
    assert 'contents-here' not in finish.finished(no_list)

def test_pictures_keep_their_place_free(finish, tmp_path):
    plot = finish.PNG + b'\0\0\0\rIHDR' + bytes([0, 0, 2, 88, 0, 0, 0, 120]) + b'rest'
    (tmp_path/'a b.png').write_bytes(plot)
    (tmp_path/'half.png').write_bytes(plot[:20])
    page = '<img loading="lazy" src="{}" alt="A">'
    text = finish.sized(page.format('a%20b.png'), tmp_path)
    assert text == '<img width="600" height="120" ' + page.format('a%20b.png')[5:]
    assert finish.sized(text, tmp_path) == text               # once
    for name in 'half.png', 'gone.png', 'https://x.org/a.png', 'data:image/png;base64,':
        assert finish.sized(page.format(name), tmp_path) == page.format(name)

def test_old_places_lead_on(finish):
    old = {'a.html': ['stays', 'went', 'gone', 'twice'], 'b.html': ['x', 'y', 'z']}
    now = {'a.html': {'stays'}, 'c.html': {'went', 'x', 'y', 'twice'},
           'd.html': {'z', 'twice'}, 'api/c.html': {'gone'}}
    assert finish.moved(old, now) == {
        'a.html': {'went': 'c.html'},
        'b.html': {'x': 'c.html', 'y': 'c.html', 'z': 'd.html', '': 'c.html'}}
    assert finish.moved({'e.html': ['q']}, now) == {'e.html': {'': 'index.html'}}

def test_a_whole_site(finish, tmp_path, monkeypatch, capsys):
    docs, notebooks = tmp_path/'docs', tmp_path/'nbs'
    for folder in (docs/'site_libs', docs/'api', notebooks): folder.mkdir(parents=True)
    (docs/'a.html').write_text(PAGE)
    (docs/'api/m.html').write_text(PAGE.replace('id="here"', 'id="there"'))
    (docs/'site_libs/s.css').write_text('.x{a:b}.never{a:b}')
    (notebooks/'00_a.ipynb').write_text('{}')
    (docs/'index.html').write_text(PAGE.replace(
        '<p id="here">', '<div class="take-away"><p>x</p></div><p id="home">'))
    monkeypatch.setattr(finish, 'OLD_PAGES', tmp_path/'old.json')
    (tmp_path/'old.json').write_text(json.dumps({'old.html': ['here']}))
    for _ in range(2):  # once more changes nothing
        finish.finish(docs, notebooks)
        assert (docs/'site_libs/s.css').read_text() == '.x{a:b}'
        assert 'url=a.html' in (docs/'old.html').read_text()
        moved = json.loads((docs/'moved.json').read_text())
        assert moved == {'old.html': {'here': 'a.html', '': 'a.html'}}
        assert (docs/'notebooks/00_a.ipynb').is_file()
        assert 'skip-link' in (docs/'api/m.html').read_text()
        offers = re.findall('<a href="(.*?)" download>Read it offline</a> \\(the whole '
                            r'book, \d+\.\d MB\)', (docs/'index.html').read_text())
        assert offers == ['nntrain-book.zip'] and (docs/offers[0]).is_file()
        assert 'EPUB' not in (docs/'index.html').read_text()  # its list of pages is bad
        assert 'no e-book is made' in capsys.readouterr().err
    item = '<li class="{}"><a href="./a.html">A</a></li>'
    menu = f'<div class="sidebar-menu-container"><ul>{item}</ul></div><main'
    home = (docs/'index.html').read_text().replace('<main', menu, 1)
    (docs/'index.html').write_text(home)
    (notebooks/'images').mkdir()
    for path in (notebooks/'images/cover.png', docs/'a.png'): path.write_bytes(b'')
    for _ in range(2):
        finish.finish(docs, notebooks)
        home = (docs/'index.html').read_text()
        assert re.findall(r'href="(.*?)" download>.*?</a> \((.*?), \d', home) == [
            ('nntrain-book.zip', 'the whole book'), ('nntrain-book.epub', 'EPUB')]
        with ZipFile(docs/'nntrain-book.zip') as z:
            assert not [n for n in z.namelist() if n.endswith('.epub')]

def test_first_edition_is_known(finish):
    old = json.loads(finish.OLD_PAGES.read_text(encoding='utf-8'))
    assert {'mechanics.html', 'book.html', 'learner.html'} <= set(old)
    assert sum(map(len, old.values())) > 700

def formulas():
    for path in sorted(NBS.glob('*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            text = re.sub(r'```.*?```|`[^`]*`', '', ''.join(cell['source']), flags=re.S)
            if cell['cell_type'] != 'markdown': continue
            for found in re.findall(r'\$\$(.+?)\$\$|\$([^$\n]+)\$', text, re.S):
                yield path.name, ''.join(found)

def test_the_font_has_the_letters_of_all_formulas(scripts):
    known = scripts['fonts'].MATH
    missing = {(name, c) for name, text in formulas() for c in html.unescape(text)
               if ord(c) not in known and not c.isspace()}
    assert not missing, f'add to scripts/fonts.py and run it: {sorted(missing)}'

@pytest.mark.parametrize('name, most', [('math.woff2', 40_000), ('icons.woff2', 4_000)])
def test_fonts_are_small(name, most):
    data = (NBS/'fonts'/name).read_bytes()
    assert data[:4] == b'wOF2' and len(data) < most
    assert name in (NBS/'fonts/LICENSE.txt').read_text(encoding='utf-8')
    assert f'fonts/{name}' in (NBS/'styles.css').read_text(encoding='utf-8')
