"""The built site, where Quarto is installed or NNTRAIN_SITE names one: its files, and
each page in a headless Chromium that reaches nobody else, light, dark and narrow, with
axe-core (`npm install axe-core`, or NNTRAIN_AXE=…/axe.min.js). What is missing is
skipped, with its name.
"""
import json
import os
import re
import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
import site_checks
import site_files
import site_speed
from conftest import ROOT
from project_checks import machine_paths
from test_offline import offline_page, offline_script

from nntrain.tools import _settings

NBS = ROOT/'nbs'
BASE = 'https://nntrain.example/book/'
CHAPTERS = sorted(re.sub(r'^\d+_', '', p.stem) + '.html' for p in NBS.glob('*.ipynb'))
PAGES = CHAPTERS + sorted(p.stem + '.html' for p in NBS.glob('*.qmd')) + sorted(
    f'api/{p.stem}.html' for p in (ROOT/'nntrain').glob('[a-z]*.py'))
NO_AXE = ('accessibility was not checked: axe-core is not there (npm install axe-core, '
          'or NNTRAIN_AXE=…/axe.min.js)')


@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "Folder of the built pages: the one that NNTRAIN_SITE names, or made here"
    given = os.environ.get('NNTRAIN_SITE')
    if given:
        there = (Path(given)/'index.html').is_file()
        assert there, f'NNTRAIN_SITE={given} holds no built site'
        return Path(given)
    if not shutil.which('quarto'):
        pytest.skip('Quarto is not installed and NNTRAIN_SITE names no built site: '
                    'built pages are not checked, only the processed notebooks')
    return site_files.build(tmp_path_factory.mktemp('built')/'clone')

@pytest.fixture(scope='module')   # two at the same time in one process do not work
def browser():
    with site_checks.start_browser() as b: yield b

@pytest.fixture(scope='session')
def home():
    s = _settings(ROOT)
    return s['doc_host'] + s['doc_baseurl'] + '/'

@pytest.fixture
def visit(browser, built, home):
    "Opens pages of the site and closes them in the end"
    pages = []
    def go(name, **how):
        pages.append(site_checks.open_page(browser, built, home, name, **how))
        return pages[-1]
    yield go
    for page in pages: page.context.close()


# ---- the checkers can fail -----------------------------------------------------------

GOOD = ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width"><title>t</title><link rel="icon" href="data:,">')

def write_site(folder, **pages):
    for name, body in pages.items():
        (folder/f'{name}.html').write_text(GOOD + body, encoding='utf-8')
    return folder

def test_file_checks_can_fail(tmp_path):
    site = write_site(
        tmp_path,
        index='<h1 id="a">a</h1><a href="two.html#b">b</a><a href="#a">a</a>'
              '<a href="https://elsewhere.org">e</a><img src="data:," alt="a dot">',
        two='<b id="b"></b><a href="none.html">1</a><a href="index.html#nowhere">2</a>'
            '<img src="none.png"><script src="https://cdn.example/x.js"></script>'
            f'<a href="{BASE}index.html#a">fine</a><p>?@fig-none</p>'
            '<p><a href="index.html">[<code>f</code>](https://x.org/f.html)</a> '
            '<code>[a](https://x.org)</code></p><div data-bs-target=".callout-1">')
    bad = site_files.file_problems(site, BASE)
    assert len(bad) == 8 and all(b.startswith('two.html') for b in bad), bad
    for word in ('dead link none.html', 'no #nowhere', 'dead link none.png',
                 'without alt text', 'asks another site', 'unresolved',
                 'Markdown in view', 'only opens with JavaScript'):
        assert any(word in b for b in bad), word

BAD = ('<main><div style="width:900px">wide</div><div class="cell-output">'
       f'<pre style="overflow-x:auto">{"long "*300}</pre></div>'
       '<div class="cell"><code class="sourceCode" style="line-height:20px">'
       f'<span style="display:inline-block;width:9em">{"word "*30}</span></code></div>'
       '<svg><path d="M0 0"/></svg><input type="range">'
       '<script src="https://cdn.example/x.js"></script><script>nothing()</script>'
       '</main>')

def test_browser_checks_can_fail(browser, tmp_path):
    site = write_site(tmp_path, bad=BAD, good=(
        '<main><h1>t</h1><p style="overflow-x:auto" tabindex="0">'
        '<span style="display:block;width:900px">x</span></p></main>'))
    def problems(name):
        page = site_checks.open_page(browser, site, BASE, name)
        return site_checks.page_problems(page)
    bad = problems('bad.html')
    for word in ('wider than the screen', 'printed results are cut off',
                 'without a name', 'does not change its picture',
                 'request: https://cdn.example',
                 'nothing is not defined', 'lines of code do not fit'):
        assert any(word in b for b in bad), (word, bad)
    assert problems('good.html') == []

def test_axe_can_fail(browser, tmp_path):
    axe = site_checks.axe_source()
    if not axe: pytest.skip(NO_AXE)
    site = write_site(tmp_path, bad=(
        '<main><h1>t</h1><img src="data:,"><p style="color:#bbb;background:#fff">pale'
        '</p><input type="range"></main>'))
    page = site_checks.open_page(browser, site, BASE, 'bad.html')
    bad = site_checks.axe_problems(page, axe)
    for word in ('image-alt', 'color-contrast', 'label'):
        assert any(word in b for b in bad), (word, bad)


# ---- files ---------------------------------------------------------------------------

def test_built_files(built, home):
    missing = [p for p in PAGES if not (built/p).is_file()]
    assert not missing, missing
    for name in ('llms.txt', 'search.json', 'moved.json', 'fonts/math.woff2'):
        assert (built/name).is_file(), name
    bad = site_files.file_problems(built, home)
    assert not bad, '\n'.join(bad[:40])
    head = (built/'index.html').read_text(encoding='utf-8').split('</head>')[0]
    card = f'<meta property="og:image" content="{home}images/card.png">'
    assert card in head and (built/'images/card.png').is_file()

def test_pages_describe_themselves(built, home):
    "Cards beside a link say what *this* page is about; each page knows its one address"
    said = {}
    for name in PAGES:
        head = (built/name).read_text(encoding='utf-8').split('</head>')[0]
        words = dict(re.findall(r'<meta (?:name|property)="((?:og:|twitter:)?'
                                r'description)" content="([^"]*)"', head))
        # cards are cut at 200 letters
        assert len(words) == 3, (name, words)
        assert len({w[:100] for w in words.values()}) == 1, (name, words)
        assert words['description'] not in said, (name, said[words['description']])
        said[words['description']] = name
        canonical = re.findall(r'<link [^>]*rel="canonical"[^>]*>', head)
        assert len(canonical) == 1 and f'href="{home}{name}"' in canonical[0], name

@pytest.mark.parametrize('name', CHAPTERS)
def test_pictures_keep_their_place_free(built, name):
    text = (built/name).read_text(encoding='utf-8')
    pictures = re.findall(r'<img [^>]*src="[^":]+\.png"[^>]*>', text)
    assert [p for p in pictures if not re.search(r' width="\d+" height="\d+"', p)] == []

def test_old_addresses_lead_on(built, visit):
    old = json.loads((ROOT/'scripts/first_edition.json').read_text(encoding='utf-8'))
    assert not [name for name in old if not (built/name).is_file()]
    moved = json.loads((built/'moved.json').read_text(encoding='utf-8'))
    page, ways = next((p, w) for p, w in moved.items() if any(w) and '' not in w)
    place, to = next((place, to) for place, to in ways.items() if place)
    there = visit(f'{page}#{place}')
    there.wait_for_url(f'**/{to}#{place}')
    assert there.problems == []

def test_chapters_can_be_taken_away_and_cited(built):
    for name in CHAPTERS:
        text = (built/name).read_text(encoding='utf-8')
        if 'Open in Colab' not in text: continue
        taken = re.findall('<a href="notebooks/([^"]+)" download', text)
        assert len(taken) == 1 and (built/'notebooks'/taken[0]).is_file(), name
        assert 'Cite this page' in text and '@misc' in text, name


# ---- pages ---------------------------------------------------------------------------

@pytest.mark.parametrize('name', PAGES)
def test_built_page(visit, name):
    axe, page = site_checks.axe_source(), visit(name)
    assert not site_checks.is_dark(page)
    bad = site_checks.page_problems(page, axe)
    assert not bad, '\n'.join(bad)
    if not axe: pytest.skip(f'fine, but {NO_AXE}')

def test_dark_for_readers_who_like_it_dark(visit):
    "Nothing but the wish of the system decides: nobody has pressed a switch"
    for wish in (True, False):
        page = visit('404.html', dark=wish)
        assert page.evaluate('localStorage.getItem("quarto-color-scheme")') is None
        ground = page.evaluate(site_checks.GROUND)
        assert site_checks.is_dark(page) == wish
        assert (ground == 'rgb(24, 26, 31)') == wish, ground
        assert page.problems == []

def test_works_without_scripts(visit, built):
    has_hint = re.compile(r'<summary>\s*Hint')
    name = next(n for n in CHAPTERS if has_hint.search((built/n).read_text('utf-8')))
    page = visit(name, scripts=False, width=360)
    hint = page.locator('main details', has=page.get_by_text('Hint', exact=True)).first
    inside = hint.locator('p, div, ul').first
    assert page.locator('main h1').is_visible() and not inside.is_visible()
    hint.locator('summary').click()
    assert inside.is_visible()
    box = page.locator('.contents-here')
    box.locator('summary').click()
    assert box.locator('a').count() > 4 and box.locator('a').first.is_visible()

def test_the_first_tab_skips_the_navigation(visit):
    page = visit('momentum.html')
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.className') == 'skip-link'
    assert page.evaluate('document.activeElement.getBoundingClientRect().left') >= 0
    page.keyboard.press('Enter')
    page.keyboard.press('Tab')
    assert page.evaluate('!!document.activeElement.closest("main")')

def test_on_paper_there_is_only_the_text(visit):
    page = visit('momentum.html')
    page.emulate_media(media='print')
    for part in ('#quarto-sidebar', '#quarto-margin-sidebar', '.code-copy-button'):
        assert not page.locator(part).first.is_visible(), part
    main = page.evaluate('document.querySelector("main").getBoundingClientRect().width')
    assert main > .9*1280

def test_search_answers_words_and_questions(visit):
    page = visit('momentum.html')
    box = page.locator('#quarto-search input').first
    for asked, found in (('Nesterov', 'Nesterov'), ('What is an epoch?', 'epoch')):
        box.click()
        box.fill('')
        page.keyboard.type(asked)
        page.locator('.aa-Panel').get_by_text(found).first.wait_for()
        page.keyboard.press('Escape')
    assert page.problems == []

def test_words_explain_themselves(visit):
    page = visit('momentum.html')
    term = page.locator('a.term').first
    term.focus()
    shown = 'e => getComputedStyle(e, "::after").content'
    assert term.get_attribute('data-meaning') in term.evaluate(shown)
    assert '#term-' in term.get_attribute('href')


# ---- letters in pictures -------------------------------------------------------------

@pytest.mark.parametrize('width', [1280, 360])
def test_letters_of_pictures_lie_where_the_picture_is(visit, width):
    page = visit('momentum.html', width=width)
    page.locator('main h1').click()                        # marks the symbols
    layers = page.locator('.sym-over')
    assert layers.count() >= 4
    far = layers.evaluate_all("""all => all.map(e => {
      const sides = ['left', 'top', 'width', 'height'];
      const [image, layer] = [...e.children].map(c => c.getBoundingClientRect());
      return Math.max(...sides.map(s => Math.abs(image[s] - layer[s])));
    })""")
    assert max(far) < 1, far
    wide = page.evaluate('document.documentElement.scrollWidth - innerWidth')
    assert wide <= 0


@pytest.mark.parametrize('name', ['browser.html', 'schedulers.html'])
def test_only_plots_fade_at_the_edge_of_a_phone(visit, name):
    "A pad to draw on and a tape are as wide as the screen: nothing is further right"
    page = visit(name, width=360)
    assert page.locator('main .nnx-draw, main .nnt').count()
    in_figure = page.evaluate('''() => [...document.querySelectorAll('main *')]
      .filter(e => getComputedStyle(e).animationName == 'fade')
      .map(e => e.closest('.nnx, .nnt') != null)''')
    assert in_figure and not any(in_figure)


# ---- shapes beside the code ----------------------------------------------------------

def test_shapes_are_shown_at_their_lines(visit):
    page = visit('data.html')
    notes, lines = (page.locator(s).count() for s in ('.nn-x i', 'code [data-x]'))
    assert notes == lines > 50
    clean = page.locator('main').evaluate('e => e.textContent')
    page.locator('.nn-x-all input').click()
    assert page.locator('code.nn-x-on').count() == page.locator('.nn-x').count()
    page.locator('.nn-x-all span').evaluate('e => { e.textContent = "" }')
    assert page.locator('main').evaluate('e => e.textContent') == clean
    assert site_checks.width_problems(page) == [] == page.problems
    page.set_viewport_size(dict(width=360, height=800))
    assert site_checks.width_problems(page) == []
    bad = site_checks.axe_problems(page, site_checks.axe_source())
    assert not bad, '\n'.join(bad)


# ---- offline -------------------------------------------------------------------------

@pytest.fixture(scope='module')
def unpacked(built, tmp_path_factory):
    "The book of this site, unpacked from its zip; no page has another's machine in it"
    top = tmp_path_factory.mktemp('offline')
    with offline_script() as offline:
        path = offline.make_book(built, NBS, top/'book.zip')
    with ZipFile(path) as z: z.extractall(top)
    book = top/'nntrain-book'
    texts = [p for p in book.rglob('*') if p.suffix in ('.html', '.js', '.txt')]
    assert machine_paths(texts) == []
    return book

@pytest.mark.parametrize('name', [
    *CHAPTERS, 'references.html', 'api/learner.html', 'api/explore.html'])
def test_page_offline(browser, unpacked, name):
    "Opened from a disk, without a network: nothing is missing, nothing complains"
    page, bad = offline_page(browser, unpacked/name)
    page.wait_for_timeout(300)
    fonts = page.evaluate("[...document.fonts].every(f => f.status != 'error')")
    assert bad == [] and fonts and page.locator('main h1').count()
    page.context.close()

def test_search_and_old_places_offline(browser, unpacked):
    page, bad = offline_page(browser, unpacked/'momentum.html')
    page.locator('#quarto-search input').first.click()
    page.keyboard.type('Nesterov')
    page.locator('.aa-Panel').get_by_text('Nesterov').first.wait_for()
    page.locator('.aa-Panel a').first.click()
    page.wait_for_url('**/nntrain-book/**')
    moved = json.loads((unpacked/'moved.json.js').read_text('utf-8')[9:-1])
    old, ways = next((p, w) for p, w in json.loads(moved).items() if '' in w)
    place, to = next((place, to) for place, to in ways.items() if place)
    page.goto(f'{(unpacked/old).as_uri()}#{place}')
    page.wait_for_url(f'**/{to}#{place}')
    assert bad == []
    page.context.close()


# ---- how long a reader waits ---------------------------------------------------------

def test_speed(built, browser, capsys):
    "The heaviest pages, on a slow line and a slow computer"
    heavy = sorted(CHAPTERS, key=lambda n: (built/n).stat().st_size)[-4:]
    with site_speed.served(built) as address:
        for name in ['index.html', *heavy]:
            for _ in range(3):  # this computer may have other work
                row = site_speed.measured(browser, address + name)
                if row['paint'] <= 2.5: break
            with capsys.disabled(): print(f'\n{name}: {row}', end='')
            assert row['kb'] <= 600 and row['paint'] <= 2.5, (name, row)
