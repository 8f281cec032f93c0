"""The book as one zip (scripts/offline.py): the same bytes each time, and pages that
work when a browser opens them from a disk without a network. What Quarto makes of the
real pages is checked in test_built.py."""
import json
import re
import sys
from contextlib import contextmanager
from zipfile import ZipFile

import pytest
from conftest import ROOT
from project_checks import settings
from site_checks import start_browser

s = settings(ROOT)
HOME = s['doc_host'] + s['doc_baseurl'] + '/'

MODULE = '''import * as tabsets from "./tabsets/tabsets.js";
const inner = 1
document.body.dataset.quarto = tabsets.init()
'''
TABSETS = "// tabs\n\nexport function init() {\n  return 'tabs'\n}\n"
SEARCH = '''if (window.location.protocol === "file:" && !shownWarning) {
  alert('no search') } else {
fetch('search.json?a=1').then(r => r.json()).then(found => {
  document.body.dataset.found = found[0].text })
fetch('none.json').catch(() => { document.body.dataset.none = 'refused' }) }
'''
PAGE = f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>T</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="site_libs/s.css">
<link rel="canonical" href="{HOME}a.html">
<script src="site_libs/quarto-html/quarto.js" type="module"></script>
<script src="site_libs/quarto-html/tabsets/tabsets.js" type="module"></script>
<script src="site_libs/quarto-search/quarto-search.js" defer></script></head>
<body><main><h1>T</h1><p><a href="{HOME}api/m.html#x">m</a>
<a href="{HOME}none.html">n</a> <a href="{s['git_url']}/blob/main/x">repo</a></p>
<span class="offline"> · <a href="nntrain-book.zip">zip</a></span></main></body></html>
'''


@contextmanager
def offline_script():
    "The script as a module"
    sys.path.insert(0, str(ROOT/'scripts'))
    try:
        import offline
        yield offline
    finally: sys.path.remove(str(ROOT/'scripts'))

def offline_page(browser, path):
    "-> (the page, opened from the disk with the network off; what went wrong with it)"
    context = browser.new_context(reduced_motion='reduce')
    context.set_default_timeout(180_000)
    context.set_offline(True)
    page, bad = context.new_page(), []
    page.on('console', lambda m: bad.append(f'{m.type}: {m.text}')
            if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: bad.append(f'exception: {e}'))
    page.on('requestfailed', lambda r: bad.append(f'failed: {r.url}'))
    page.on('request', lambda r: None if r.url.startswith(('file:', 'data:', 'blob:'))
            else bad.append(f'request: {r.url}'))
    page.on('dialog', lambda d: (bad.append(f'dialog: {d.message}'), d.dismiss()))
    page.goto(path.as_uri(), wait_until='load')
    return page, bad

@pytest.fixture(scope='module')
def offline():
    with offline_script() as script: yield script

@pytest.fixture
def site(tmp_path):
    "A small site of Quarto's form"
    docs = tmp_path/'docs'
    for name, text in {
            'index.html': PAGE, '404.html': PAGE,
            'api/m.html': f'<html><head></head><body><a href="{HOME}">home</a></body>',
            'search.json': json.dumps([dict(text='</script> ⟨found⟩\u2028')]),
            'nntrain-book.zip': 'an older one', 'site_libs/s.css': 'p{color:red}',
            'site_libs/quarto-html/quarto.js': MODULE,
            'site_libs/quarto-html/tabsets/tabsets.js': TABSETS,
            'site_libs/quarto-search/quarto-search.js': SEARCH}.items():
        (docs/name).parent.mkdir(parents=True, exist_ok=True)
        (docs/name).write_text(text, encoding='utf-8')
    (tmp_path/'nbs/images').mkdir(parents=True)
    (tmp_path/'nbs/images/a.svg').write_text('<svg/>')
    return docs

def make(offline, site, name='book.zip'):
    return offline.make_book(site, site.parent/'nbs', site.parent/name)

def test_the_zip_is_the_same_each_time(offline, site):
    one = make(offline, site).read_bytes()
    for p in sorted(site.rglob('*.html')): p.touch()
    assert make(offline, site, 'again.zip').read_bytes() == one
    assert offline.make_book(site, site.parent/'nbs') == site/'nntrain-book.zip'
    assert (site/'nntrain-book.zip').read_bytes() == one       # it holds no older zip
    with ZipFile(site.parent/'book.zip') as z:
        names = z.namelist()
        assert names == sorted(names) and all(
            i.date_time == (1980, 1, 1, 0, 0, 0) for i in z.infolist())
        assert {n.removeprefix('nntrain-book/') for n in names} == {
            'README.txt', 'index.html', 'api/m.html', 'search.json.js',
            'site_libs/s.css', 'site_libs/quarto-html/quarto.js',
            'site_libs/quarto-search/quarto-search.js', 'notebooks/images/a.svg'}
        readme = z.read('nntrain-book/README.txt').decode()
    assert 'index.html' in readme and s['git_url'] in readme and '{' not in readme

def test_links_to_the_book_lead_to_the_file_beside(offline, site):
    with ZipFile(make(offline, site)) as z:
        text = z.read('nntrain-book/index.html').decode()
        inner = z.read('nntrain-book/api/m.html').decode()
    assert re.findall('<a href="([^"]*)"', text) == [
        'api/m.html#x', f'{HOME}none.html', f"{s['git_url']}/blob/main/x"]
    assert f'canonical" href="{HOME}a.html"' in text and 'class="offline"' not in text
    assert '<a href="../index.html">' in inner
    assert text.count('window.bookFile =') == inner.count('window.bookFile =') == 1

def test_a_browser_reads_it_from_a_disk(offline, site):
    with ZipFile(make(offline, site)) as z: z.extractall(site.parent)
    with start_browser() as browser:
        page, bad = offline_page(browser, site.parent/'nntrain-book/index.html')
        page.wait_for_function('document.body.dataset.none')
        assert page.evaluate('document.body.dataset.found') == '</script> ⟨found⟩\u2028'
        assert page.evaluate('document.body.dataset.quarto') == 'tabs'
        assert page.evaluate('typeof inner') == 'undefined'     # a scope of its own
        # what is not there is missed, and nothing else
        assert [b for b in bad if 'none.json' not in b and 'ERR_FILE' not in b] == []
        page, bad = offline_page(browser, site/'index.html')    # the site itself cannot
        page.wait_for_timeout(300)
        assert bad != []

@pytest.mark.parametrize('name, text, words', [
    ('site_libs/quarto-html/quarto.js', 'x()', 'this Quarto is unknown'),
    ('site_libs/quarto-html/quarto.js', MODULE + 'import y from "./y.js"',
     'imports or exports more'),
    ('site_libs/quarto-search/quarto-search.js', 'x()', 'this Quarto is unknown'),
    ('new.html', '<script src="m.js" type="module"></script>', 'new.html: ')])
def test_what_it_does_not_know_is_refused(offline, site, name, text, words, capsys):
    (site/name).write_text(text)
    kept = (site/'nntrain-book.zip').read_bytes()
    assert offline.main([str(site)]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count('\n') == 1
    assert (site/'nntrain-book.zip').read_bytes() == kept
    assert not list(site.glob('*.part'))

def test_a_folder_without_a_site_is_refused(offline, tmp_path, capsys):
    assert offline.main([str(tmp_path)]) == 1
    assert 'give the folder of a built site' in capsys.readouterr().err
    assert offline.main([]) == 2 and list(tmp_path.iterdir()) == []
