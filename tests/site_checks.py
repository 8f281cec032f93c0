"""Checks of a built site: its files alone, and its pages in a headless Chromium that reaches nobody else.

Each checker returns a list of what is wrong; test_site.py feeds it the site and a bad page.
"""
import html.parser
import mimetypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from conftest import ROOT

SERIOUS = ('serious', 'critical')
BROWSERS = '/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'


# ---- files ---------------------------------------------------------------------------

class Page(html.parser.HTMLParser):
    "What a page offers as targets, and what it points to"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.pictures, self.open = set(), [], [], []
        self.text = path.read_text(encoding='utf-8')
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {
            v for k, v in attrs.items()
            if v and (k == 'id' or tag == 'a' and k == 'name')}
        for key in ('href', 'src'):
            if attrs.get(key):
                self.links.append((tag, key, attrs[key], attrs.get('rel') or ''))
        if (
            tag == 'img'
            and attrs.get('role') != 'presentation'
            and attrs.get('aria-hidden') != 'true'
        ):
            self.pictures.append((attrs.get('src', ''), attrs.get('alt')))


def file_problems(docs, base):
    """Links, anchors, pictures, citations and cross-references of all pages of the
    folder `docs`, which will stand at the address `base`"""
    docs = Path(docs)
    pages = {
        p.relative_to(docs).as_posix(): Page(p) for p in sorted(docs.glob('*.html'))}
    bad = []
    for name, page in pages.items():
        for tag, key, target, rel in page.links:
            if re.match(r'(data|mailto|javascript):', target): continue
            address, anchor = urldefrag(urljoin(base + name, target))
            if not address.startswith(base.rstrip('/')):
                if tag != 'a' and 'canonical' not in rel:
                    bad.append(
                        f'{name}: <{tag} {key}="{target[:80]}"> asks another site')
                continue
            path = unquote(address[len(base):]) or 'index.html'
            if not (docs / path).is_file():
                bad.append(f'{name}: dead link {target[:80]}')
            elif anchor and path in pages and tag == 'a':
                spot = unquote(anchor)
                if spot.startswith('nnx'):
                    spot = spot.split('--')[
                        0]  # the rest is the setting of an interactive figure
                if spot not in pages[path].ids:
                    bad.append(f'{name}: {path} has no #{anchor[:60]}')
        bad += [
            f'{name}: picture {src[:60]} without alt text' for src, alt in page.pictures
            if not (alt or '').strip()]
        bad += [
            f'{name}: Markdown in view: {m[:60]}'
            for m in re.findall(
                r'\]\((?:https?:|[\w.-]+\.(?:ipynb|html))[^)<]*',
                re.sub(
                    r'<(pre|code|script|style)\b.*?</\1>', '', page.text, flags=re.S))
        ]
        bad += [
            f'{name}: unresolved reference {m[:60]}'
            for m in re.findall(
                r'quarto-unresolved-ref[^>]*>([^<]*)|\?@[\w-]+|<strong>[\w:-]+\?</strong>',
                page.text,
            )
        ]
    return bad


# ---- pages in a browser --------------------------------------------------------------

def start_browser():
    "Context manager, or a skip that says what is missing"
    api = pytest.importorskip(
        'playwright.sync_api', reason='browser checks need: pip install playwright')
    from contextlib import contextmanager
    @contextmanager
    def go():
        path = next((p for p in BROWSERS if os.path.exists(p)), None)
        with api.sync_playwright() as p:
            try:
                b = p.chromium.launch(
                    executable_path=path,
                    args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'])
            except api.Error as e:
                pytest.skip(
                    'no Chromium to start (playwright install chromium): '
                    f'{str(e).splitlines()[0]}')
            yield b
            b.close()
    return go()


def axe_source():
    """Text of axe-core, the accessibility checker, or None: from NNTRAIN_AXE, or from
    `npm install axe-core` in the checkout"""
    for path in (
        os.environ.get('NNTRAIN_AXE'),
        ROOT / 'node_modules/axe-core/axe.min.js',
    ):
        if path and Path(path).is_file(): return Path(path).read_text(encoding='utf-8')


def open_page(browser, docs, base, name, dark=False, width=1200):
    """The page as it will stand at its address; `page.problems` lists console errors, exceptions and requests to anybody else

    Nothing moves (reduced motion): colours that fade from one theme to the other would be judged half-way."""
    docs = Path(docs)
    context = browser.new_context(
        viewport=dict(width=width, height=900), reduced_motion='reduce',
        color_scheme='dark' if dark else 'light')
    context.set_default_timeout(180_000)
    page = context.new_page()
    page.problems = []
    page.on(
        'console',
        lambda m: (
            page.problems.append(f'console {m.type}: {m.text}')
            if m.type in ('error', 'warning') else None))
    page.on('pageerror', lambda e: page.problems.append(f'exception: {e}'))
    def route(r):
        address = re.split('[?#]', r.request.url)[0]
        path = docs/unquote(address[len(base):]) if address.startswith(base) else None
        if path and path.is_file():
            return r.fulfill(
                path=path, content_type=mimetypes.guess_type(path.name)[0]
                or 'application/octet-stream')
        page.problems.append(f'request: {r.request.url}')
        r.abort()
    page.route('**/*', route)
    page.goto(base + name)
    return page


WIDE = '''width => [...document.querySelectorAll('body *')].filter(e => {
  const r = e.getBoundingClientRect()
  if (!r.width || r.right <= width + 1) return false
  for (let p = e.parentElement; p; p = p.parentElement) if (getComputedStyle(p).overflowX != 'visible') return false
  return true
}).slice(0, 5).map(e => `${e.tagName.toLowerCase()}.${e.className} “${e.textContent.trim().slice(0, 40)}”`)'''

CUT = """() => [...document.querySelectorAll('main .cell-output pre')]
  .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
  .map(e => `${e.textContent.trim().slice(0, 40)}…`)"""

DRAWN = '''e => {
  const figure = e.closest('.nnx') || document
  return [...figure.querySelectorAll('svg path, svg use')].map(p => p.getAttribute('d') ?? p.getAttribute('y')).join()  // `use`: which tile of a heat map or picture is shown
}'''

GROUND = 'getComputedStyle(document.body).backgroundColor'

def slider_problems(page):
    """Move every slider with the keyboard: each must have a name and change the picture
    of its own figure"""
    bad = []
    for slider in page.locator('input[type=range]').all():
        name = slider.evaluate(
            'e => e.labels.length ? e.labels[0].textContent : '
            'e.getAttribute("aria-label")')
        if not name: bad.append('a slider without a name')
        if slider.evaluate('e => (e.min || 0) == (e.max || 100)'): continue
        before, value, at_end = (
            slider.evaluate(DRAWN), slider.input_value(),
            slider.evaluate('e => e.value == e.max'))
        slider.focus()
        page.keyboard.press('Home' if at_end else 'End')
        if slider.evaluate(DRAWN) == before:
            bad.append(f'slider {name} does not change its picture')
        slider.evaluate(
            '(e, v) => { e.value = v; e.dispatchEvent(new Event("input", {bubbles: '
            'true})) }', value)
    return bad


def axe_problems(page, axe, rules=None):
    "Serious and critical findings of axe-core, of all its rules or of some"
    if not page.evaluate('"axe" in window'): page.evaluate(axe)
    found = page.evaluate(
        "o => axe.run(document, o)",
        {'resultTypes': ['violations'], **({'runOnly': rules} if rules else {})},
    )['violations']
    where = lambda v: '; '.join(
        f"{n['target'][-1]}: {(n['any'] + n['all'] + n['none'])[0]['message']}"
        for n in v['nodes'][:3])
    return [
        f"axe {v['id']} ({v['impact']}, {len(v['nodes'])}×): {where(v)}" for v in found
        if v['impact'] in SERIOUS]


def width_problems(page):
    width, needs = (
        page.viewport_size['width'],
        page.evaluate('document.scrollingElement.scrollWidth'))
    return (
        [f'wider than the screen ({needs} > {width}): {page.evaluate(WIDE, width)}']
        if needs > width else [])


def cut_problems(page):
    "Printed results of which a reader sees only the left part"
    cut = page.evaluate(CUT)
    return [f'{len(cut)} printed results are cut off: {cut[:3]}'] if cut else []


def is_dark(page): return 'quarto-dark' in page.get_attribute('body', 'class')


def page_problems(page, axe=None):
    """One page, as a reader meets it: on a wide screen (everything), on narrow ones (nothing sticks out or is cut off, what scrolls can be reached), and dark (contrast).

    One loading for all three: the screen is made narrow, and the reader's own switch makes it dark."""
    bad = (
        width_problems(page) + cut_problems(page) + slider_problems(page)
        + (axe_problems(page, axe) if axe else []))
    page.set_viewport_size(dict(width=360, height=900))
    bad += [
        f'360 px: {b}'
        for b in width_problems(page)
        + cut_problems(page)
        + (
            axe_problems(page, axe, ['scrollable-region-focusable', 'target-size'])
            if axe else [])
    ]
    page.set_viewport_size(dict(width=320, height=900))
    bad += [f'320 px: {b}' for b in width_problems(page)]
    page.set_viewport_size(dict(width=1200, height=900))
    if (
        switch := page.locator('.quarto-color-scheme-toggle').first
        if page.locator('.quarto-color-scheme-toggle').count()
        else None
    ):
        before, ground = is_dark(page), page.evaluate(GROUND)
        switch.evaluate('e => e.click()')
        if is_dark(page) == before:
            bad.append('the switch between light and dark does nothing')
        page.wait_for_function(
            f"was => {GROUND} != was && "
            "[...document.querySelectorAll('link[rel=stylesheet]')].every(l => "
            "l.disabled || l.sheet)", arg=ground)  # style sheets load late
        if axe:
            bad += [
                f'dark: {b}'
                for b in axe_problems(
                    page, axe, ['color-contrast', 'link-in-text-block']
                )
            ]
    return bad + page.problems


# ---- the site ------------------------------------------------------------------------

def build(top):
    """`nbdev_docs` in a copy of the checkout, without what git ignores -> folder of the
    pages"""
    shutil.copytree(
        ROOT,
        top,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            '.git', '.hypothesis', '.pytest_cache', '.ruff_cache', '.ipynb_checkpoints',
            '.venv', 'venv', '_proc', '_docs', '__pycache__', 'node_modules', 'runs'))
    done = subprocess.run(
        ['nbdev_docs'], cwd=top, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(top)})
    assert done.returncode == 0 and 'WARN' not in done.stdout + done.stderr, (
        done.stdout + done.stderr)[-3000:]
    return top/'_docs'
