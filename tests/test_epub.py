"""The e-book (scripts/epub.py) of small made-up pages, and of a built site if
NNTRAIN_SITE names one; if NNTRAIN_EPUBCHECK is the path of epubcheck.jar, the checker
of the W3C looks at that book as well."""
import os
import re
import sys
from base64 import b64encode
from pathlib import Path
from subprocess import run
from xml.etree import ElementTree
from zipfile import ZipFile

import pytest
from conftest import ROOT
from epub_checks import bad_container, bad_pages, files_of, spine
from project_checks import settings
from site_checks import start_browser

s = settings(ROOT)
HOME = s['doc_host'] + s['doc_baseurl'] + '/'
PNG = bytes.fromhex('89504e470d0a1a0a')

ITEM = ('<li class="sidebar-item"><div><a href="./{0}" class="sidebar-link">'
        '<span class="chapter-title">{1}</span></a></div></li>')
PART = ('<li class="sidebar-item-section"><div><a><span class="menu-text">{0}</span>'
        '</a></div><ul>{1}</ul></li>')
MENU = '<nav><div class="sidebar-menu-container"><ul>' + ''.join([
    ITEM.format('index.html', 'Home'),
    PART.format('Zoo &amp; more', ITEM.format('z.html', '1 Z') +
                ITEM.format('a.html', '2 A')),
    PART.format('Appendices', ITEM.format('refs.html', 'Bibliography') +
                PART.format('API', ITEM.format('api/m.html', 'm')))
]) + '</ul></div></nav>'
SITE = '''<!DOCTYPE html><html><head><script>if (1 < 2) x("</p>")</script></head><body>
{menu}<main><header id="title-block-header"><nav>crumbs</nav><h1>{title}</h1></header>
<div class="lead"><p>The promise of {title}</p></div>
<details class="contents-here"><summary>On this page</summary><ul>
<li><a href="#one">One</a><ul><li><a href="#no">deep</a></li></ul></li>
<li><a href="#two">Two</a></li></ul></details>
<div class="take-away"><p><a href="notebooks/00_a.ipynb" download>Download</a></p></div>
{body}</main><script>alert(1)</script></body></html>'''
BODY = '''<section id="one"><h2>One</h2><p>a &lt; b &amp; c<br>&nbsp;d\x0c <b>bold</p>
<p>See <a href="./a.html#there">A</a>, <a href="HOMEz.html#two">here</a>, <a href="#no">
none</a>, <a href="./a.html#gone">A's top</a>, <a href="api/m.html#x">api</a>,
<a href="javascript:x()">act</a>, <a href="./">home</a>, <a href="https://x.org">x</a>.
<a href="refs.html#ref-k" role="doc-biblioref">K 1900</a><a href="#fn1" id="fnref1"
role="doc-noteref"><sup>1</sup></a></p>
<p><math display="inline" xmlns="http://www.w3.org/1998/Math/MathML"><semantics><mrow>
<mi>x</mi><mo>&lt;</mo></mrow><annotation encoding="application/x-tex">x &lt; "1"
</annotation></semantics></math> <span class="math inline">$\\odd$</span></p>
<p><math display="block"><semantics><mrow><mi>a</mi><mo>,</mo><mspace width="2.0em">
</mspace><mspace width="2.0em"></mspace><mi>b</mi></mrow><annotation
encoding="application/x-tex">a, \\qquad\\qquad b</annotation></semantics></math></p>
<details class="code-fold"><summary>Imports</summary><div
class="sourceCode" id="cb1"><pre class="sourceCode python"><code
class="sourceCode python"><span id="cb1-1"><span class="im">import</span> torch</span>
<span id="cb1-2"></span>
<span id="cb1-3">         <span class="op">+</span> 1</span></code>
<button>Copy</button></pre></div></details>
<div class="cell"><details class="code-fold"><summary>All imports</summary><pre><code
class="sourceCode python"><span>import os</span>
<span>from a import (b,</span>
<span>               c)</span>
<span></span></code></pre></details></div>
<div class="cell"><pre><code>from z import y</code></pre></div>
<details class="nn-x"><summary>Shapes</summary><i data-x="1 · 2"></i></details>
<p><img src="p/plot.png" loading="lazy"> <img src="data:image/png;base64,DATA"
alt="dots"></p></section>
<section id="two" onclick="x()"><h2>Two</h2>
<div class="nnx nnx-line" id="fig"><style>.nnx .ax{stroke:currentColor}</style>
<div class="nnx-d" style="display:none"><p class="nnx-t">Title</p>
<svg role="img" aria-label="A line that falls" viewbox="0 0 9 9"><clippath id="c"><rect
/></clippath><path class="ax" clip-path="url(#c)" d="M0 0"></path></svg>
<form class="nnx-c" hidden><label for="f-lr">rate</label><input type="range" id="f-lr">
<output for="f-lr">0.06</output></form></div><script>move()</script></div>
<div class="nnx nnx-q" id="q"><div class="nnx-d" style="display:none"><fieldset><legend>
Which curve?</legend><div class="nnx-o"><label><input type="radio"><span>up</span>
</label><label><input type="radio"><span>down</span></label></div></fieldset>
<details><summary>Answer</summary><p>Up it goes.</p></details></div></div>
<details class="recall-card"><summary>Why <em>two</em>?</summary><p>Because.</p>
<p class="recall-knew" hidden><button>I knew it</button></p></details>
<details class="recall-card" hidden><summary>Not now?</summary><p>No.</p></details>
<h3 id="remember">Remember</h3><details><summary>Why three?</summary><p>Since one is
few.</p></details><h3>Further</h3>
<details id="deep"><summary>Going deeper</summary><p>Deep text</p></details>
<h3 id="ex">Warm-up</h3><p>Write it.</p><details><summary>Hint</summary><p>Think.</p>
</details><div class="cell"><details class="code-fold"><summary>Solution</summary><pre>
<code>solved = 1</code></pre></details><pre><code>printed 1</code></pre></div>
<table><colgroup><col></colgroup><thead><tr><th>name</th><th>value</th><th>what</th>
</tr></thead><tbody><tr><td>extraordinarily</td><td style="text-align: right">1</td>
<td>unpronounceable_name</td></tr></tbody></table>
<table><thead><tr><th>rule</th><th>looks at</th><th>change</th></tr></thead><tbody>
<tr><td>momentum</td><td>orthogonality</td><td>exponential</td></tr></tbody></table>
<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr>
</tbody></table></section>
<section class="footnotes" role="doc-endnotes"><ol><li id="fn1">Note <a href="#fnref1"
role="doc-backlink">back</a></li></ol></section>
<div class="about"><p>Last changed on 2026-05-04</p></div>'''


@pytest.fixture(scope='module')
def epub():
    sys.path.insert(0, str(ROOT/'scripts'))
    try:
        import epub
        yield epub
    finally: sys.path.remove(str(ROOT/'scripts'))

@pytest.fixture
def site(tmp_path):
    "A small site of Quarto's form"
    docs = tmp_path/'docs'
    (docs/'p').mkdir(parents=True)
    body = BODY.replace('HOME', HOME).replace('DATA', b64encode(PNG + b'1').decode())
    for name, title, text in (
            ('index.html', 'Home', '<p><a href="z.html">Z</a></p>'),
            ('z.html', '1 Z', body),
            ('a.html', '2 A', '<h2 id="there">There</h2>'),
            ('refs.html', 'Bibliography', '<div id="ref-k">K. 1900.</div>')):
        (docs/name).write_text(SITE.format(menu=MENU, title=title, body=text), 'utf-8')
    (docs/'p/plot.png').write_bytes(PNG)
    (tmp_path/'nbs/images').mkdir(parents=True)
    (tmp_path/'nbs/images/cover.png').write_bytes(PNG + b'cover')
    return docs

def make(epub, site, name='book.epub'):
    return epub.make_epub(site, site.parent/'nbs', site.parent/name)

def chapter(epub, site): return files_of(make(epub, site))['EPUB/z.xhtml'].decode()

def test_it_is_an_epub(epub, site):
    path = make(epub, site)
    assert bad_container(path) == [] == bad_pages(files_of(path))

def test_the_same_bytes_twice(epub, site):
    one = make(epub, site).read_bytes()
    for p in sorted(site.rglob('*.html')): p.touch()
    assert make(epub, site, 'again.epub').read_bytes() == one
    assert epub.make_epub(site, site.parent/'nbs') == site/'nntrain-book.epub'
    with ZipFile(site.parent/'book.epub') as z:
        assert all(i.date_time == (1980, 1, 1, 0, 0, 0) for i in z.infolist())

def test_order_and_contents(epub, site):
    files = files_of(make(epub, site))
    assert spine(files) == ['cover.xhtml', 'title.xhtml', 'nav.xhtml', 'index.xhtml',
                            'part-1.xhtml', 'z.xhtml', 'a.xhtml', 'part-2.xhtml',
                            'refs.xhtml']
    nav = files['EPUB/nav.xhtml'].decode()
    toc = nav[:nav.index('landmarks')]
    assert re.findall('<a href="(.*?)">(.*?)</a>', toc) == [
        ('index.xhtml', 'Home'), ('part-1.xhtml', 'Zoo &amp; more'), ('z.xhtml', '1 Z'),
        ('a.xhtml', '2 A'), ('part-2.xhtml', 'Appendices'),
        ('refs.xhtml', 'Bibliography')]
    assert 'The promise of 2 A' in files['EPUB/part-1.xhtml'].decode()
    opf = files['EPUB/book.opf'].decode()
    assert s['author'] in opf and f"<dc:title>{s['title']}: " in opf
    assert '>2026-05-04T00:00:00Z<' in opf and 'properties="cover-image"' in opf
    assert files['EPUB/cover.png'] == PNG + b'cover'

def test_links(epub, site):
    text = chapter(epub, site)
    said = dict((words.strip(), href) for href, words in re.findall(
        '<a [^>]*?href="([^"]*)"[^>]*>([^<]*)</a>', text))
    assert said['A'] == 'a.xhtml#there' and said['here'] == '#two'
    assert said["A's top"] == 'a.xhtml' and said['home'] == 'index.xhtml'
    assert said['api'] == HOME + 'api/m.html#x' and said['x'] == 'https://x.org'
    assert said['K 1900'] == 'refs.xhtml#ref-k' and said['back'] == '#fnref1'
    assert 'none' not in said and 'act' not in said and 'act' in text
    assert 'Download' not in text and 'crumbs' not in text and 'deep</a>' not in text

def test_formulas_and_code(epub, site):
    text = chapter(epub, site)
    assert '<math display="inline" alttext="x &lt; &quot;1&quot;" xmlns=' in text
    assert 'annotation' not in text and '$\\odd$' in text
    for tex, row in (('a,', '<mi>a</mi><mo>,</mo>'), ('b', '<mi>b</mi>')):
        assert re.search(f'<math display="block" alttext="{tex}" xmlns="[^"]*"><mrow>'
                         f'{row}</mrow></math>', text)            # a line each
    assert '<span><span class="im">import</span> torch</span>\n<span></span>' in text
    assert '<span class="i8">         + 1</span></code>' in text
    assert 'Imports' in text and 'Shapes' not in text and 'Copy' not in text
    assert 'All imports' not in text and 'import os' not in text  # nothing but imports
    assert 'from z import y' in text                              # these are in view
    assert 'a &lt; b &amp; c<br/>\xa0d\ufffd <b>bold</b></p>' in text
    assert re.findall('<table( class="[a-z]+")?>', text) == [
        ' class="wide"', ' class="snug"', '']
    assert 'data-head="value"' in text and 'data-head="looks at"' in text
    css = files_of(site.parent/'book.epub')['EPUB/book.css'].decode()
    assert 'pre-wrap' in css and 'monospace' in css

def test_pictures_and_figures(epub, site):
    text = chapter(epub, site)
    files = files_of(site.parent/'book.epub')
    first, second = re.findall('<img src="(.*?)" alt="(.*?)"', text)
    assert first == ('p/plot.png', '') and second[1] == 'dots'
    assert files[f'EPUB/{first[0]}'] == PNG and files[f'EPUB/{second[0]}'] == PNG + b'1'
    assert 'viewBox="0 0 9 9"' in text and '<clipPath id="c">' in text
    assert 'display:none' not in text
    assert '<p class="words">A line that falls</p>' in text
    assert f'Shown: rate 0.06. <a href="{HOME}z.html#fig" class="on-site">' in text
    assert files['EPUB/figures.css'] == b'.nnx .ax{stroke:currentColor}'

def test_hints_and_answers_stand_at_the_end(epub, site):
    text = chapter(epub, site)
    ends = text.index('<h2>Hints</h2>'), text.index('<h2>Answers</h2>')
    assert text.index('printed 1') > ends[1] > text.index('Think.') > ends[0]
    for words in ('Up it goes.', 'Because.', 'Since one is', 'solved = 1'):
        assert text.count(words) == 1 and text.index(words) > ends[1]
    asked = [re.sub('<.*?>|↩', '', t).strip()
             for t in re.findall('<p class="asked">(.*?)</p>', text, re.S)]
    assert asked == ['Hint: Warm-up', 'Answer: Which curve?', 'Why two?', 'Why three?',
                     'Solution: Warm-up']
    assert re.search('<ol[^>]*><li><span>up|<ol[^>]*><li>up', text)
    assert 'Not now?' not in text and 'I knew it' not in text
    assert text.index('Going deeper') < text.index('Deep text') < ends[0]
    for kind, n in (('hint', 1), *(('answer', i) for i in range(1, 5))):
        assert f'href="#{kind}-{n}"' in text and f'href="#to-{kind}-{n}"' in text

def too_wide(files, folder):
    """Pages wider than a phone of 320 pixels with type at 140 %, and what sticks out"""
    for name, data in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data)
    with start_browser() as browser:
        page = browser.new_page(viewport=dict(width=320, height=600))
        for name in sorted(n for n in files if n.endswith('.xhtml')):
            page.goto((folder/name).as_uri())
            page.add_style_tag(content='html { font-size: 140% }')
            if page.evaluate('document.documentElement.scrollWidth') > 320:
                yield name, page.evaluate("""[...document.querySelectorAll('body *')]
                    .filter(e => e.getBoundingClientRect().right > 321)
                    .slice(0, 3).map(e => e.outerHTML.slice(0, 80))""")

def test_nothing_sticks_out_on_a_small_phone_with_large_type(epub, site, tmp_path):
    files = files_of(make(epub, site))
    assert list(too_wide(files, tmp_path/'out')) == []
    css = files['EPUB/book.css'].replace(b'.snug', b'.none')     # the check can fail
    found = list(too_wide(files | {'EPUB/book.css': css}, tmp_path/'out'))
    assert [name for name, _ in found] == ['EPUB/z.xhtml']

def swap(site, name, old, new):
    path = site/name
    assert old in path.read_text('utf-8')
    path.write_text(path.read_text('utf-8').replace(old, new), 'utf-8')

STRICT = '''<style>.za:has(b){color:red}.zb{color:blue}@media print{.zc:is(p):hover{
color:red}.zd{color:blue}}</style><math><semantics><mrow><mfrac displaystyle="true">
<mi minsize="2">x</mi><mo minsize="2">/</mo></mfrac></mrow><annotation
encoding="application/x-tex">x</annotation></semantics></math><svg role="group"><a
href="a.html" aria-label="To A"><rect/></a><a href="a.html"><text>B</text></a></svg>'''

def test_only_what_epub_allows(epub, site):
    swap(site, 'z.html', '<h2>One</h2>', '<h2>One</h2>' + STRICT)
    files = files_of(make(epub, site))
    text = re.sub(r'\s+', ' ', files['EPUB/z.xhtml'].decode())
    assert '<mstyle displaystyle="true"><mfrac> <mi>x</mi><mo minsize="2">' in text
    assert re.findall('<svg[^>]* role="([^"]*)"', text) == ['document']
    assert re.findall('xlink:title="([^"]*)"', text) == ['To A', 'B']
    css = files['EPUB/figures.css'].decode()
    assert [name for name in 'abcd' if f'.z{name}' in css] == ['b', 'd']

@pytest.mark.parametrize('damage, words', [
    (lambda d: (d/'index.html').unlink(), 'holds no index.html'),
    (lambda d: (d/'index.html').write_text('<main>x</main>'), 'lists no chapters'),
    (lambda d: (d/'a.html').unlink(), 'has no a.html'),
    (lambda d: (d/'a.html').write_text('<p>x'), 'a.html has no <main>'),
    (lambda d: (d/'p/plot.png').unlink(), 'has no picture p/plot.png'),
    (lambda d: swap(d, 'z.html', 'p/plot.png', 'https://x.org/p.png'), 'cannot hold'),
    (lambda d: swap(d, 'z.html', 'p/plot.png', '../nbs/images/cover.png'),
     'no picture'),
    (lambda d: (d/'p/plot.png').rename(d/'p/plot.bmp') and swap(
        d, 'z.html', 'plot.png', 'plot.bmp'), 'no kind of file')])
def test_what_no_book_can_be_made_of(epub, site, damage, words, capsys, tmp_path):
    damage(site)
    assert epub.main([str(site), str(tmp_path/'book.epub')]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count('\n') == 1
    assert list(tmp_path.glob('book*')) == []

def test_targets_that_are_refused(epub, site, tmp_path, capsys):
    (tmp_path/'folder.epub').mkdir()
    (tmp_path/'README.md').write_text('mine')
    for name in ('none/book.epub', 'folder.epub', 'README.md'):
        assert epub.main([str(site), str(tmp_path/name)]) == 1
        said = capsys.readouterr().err
        assert name in said and said.count('\n') == 1
    assert (tmp_path/'README.md').read_text() == 'mine' and epub.main([]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'README.md', 'docs', 'folder.epub', 'nbs']
    (tmp_path/'nbs/images/cover.png').unlink()
    with pytest.raises(ValueError, match='holds no cover.png'): make(epub, site)

def test_the_checks_can_fail(epub, site):
    files = files_of(make(epub, site))
    files['EPUB/z.xhtml'] = files['EPUB/z.xhtml'].replace(
        b'</body>',
        b'<script/><a href="#nowhere" id="two"/><img src="none.png"/></body>')
    files['EPUB/a.xhtml'] += b'<p>'
    said = ' '.join(bad_pages(files))
    for words in ('<script>', '#nowhere', 'id two twice', 'none.png', 'without alt',
                  'a.xhtml: junk'): assert words in said
    bad = site.parent/'bad.epub'
    with ZipFile(bad, 'w') as z:
        for name in sorted(files): z.writestr(name, files[name])
        z.writestr('EPUB/more.png', PNG)
    assert {'mimetype is not first, or is compressed',
            'more.png is not both listed and there'} <= set(bad_container(bad))

def test_the_e_book_of_the_built_site(epub, tmp_path):
    given = os.environ.get('NNTRAIN_SITE')
    if not given: pytest.skip('NNTRAIN_SITE names no built site')
    path = epub.make_epub(Path(given), ROOT/'nbs', tmp_path/'book.epub')
    files = files_of(path)
    assert bad_container(path) == [] == bad_pages(files)
    assert path.stat().st_size < 20e6
    assert list(too_wide(files, tmp_path/'out')) == []
    if jar := os.environ.get('NNTRAIN_EPUBCHECK'):     # of the W3C's checker, for Java
        said = run(['java', '-jar', jar, path], capture_output=True, text=True)
        assert 'No errors or warnings detected' in said.stdout, said.stderr[:2000]
    chapters = {re.sub(r'^\d+_', '', p.stem) for p in (ROOT/'nbs').glob('*.ipynb')}
    order = spine(files)
    assert {f'{name}.xhtml' for name in chapters} <= set(order)
    at = [order.index(f'{name}.xhtml')
          for name in ('index', 'mechanics', 'momentum', 'pairs')]
    assert at == sorted(at)
    counts = [len(list(ElementTree.fromstring(files[f'EPUB/{n}.xhtml']).iter(
        '{http://www.w3.org/1998/Math/MathML}math'))) for n in ('momentum', 'adaptive')]
    assert min(counts) > 20
