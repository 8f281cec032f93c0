"""Checks of a built page in a headless Chromium that reaches nobody else.

Each checker returns a list of what is wrong; test_built.py feeds it the site and a bad
page.
"""
import mimetypes
import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import ROOT

SERIOUS = ('serious', 'critical')
BROWSERS = '/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'


def start_browser():
    "Context manager, or a skip that says what is missing"
    api = pytest.importorskip('playwright.sync_api',
                              reason='browser checks need: pip install playwright')
    from contextlib import contextmanager

    @contextmanager
    def go():
        path = next((p for p in BROWSERS if os.path.exists(p)), None)
        flags = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']
        with api.sync_playwright() as p:
            try: b = p.chromium.launch(executable_path=path, args=flags)
            except api.Error as e:
                pytest.skip('no Chromium to start (playwright install chromium): '
                            f'{str(e).splitlines()[0]}')
            yield b
            b.close()
    return go()


def axe_source():
    """Text of axe-core, the accessibility checker, or None: from NNTRAIN_AXE, or from
    `npm install axe-core` in the checkout"""
    ours = ROOT/'node_modules/axe-core/axe.min.js'
    for path in (os.environ.get('NNTRAIN_AXE'), ours):
        if path and Path(path).is_file(): return Path(path).read_text(encoding='utf-8')


def open_page(browser, docs, base, name, dark=False, width=1280, scripts=True):
    """The page as it will stand at its address; `page.problems` lists console errors,
    exceptions and requests to anybody else

    Nothing moves (reduced motion): colours that fade from one theme to the other would
    be judged half-way."""
    docs = Path(docs)
    context = browser.new_context(
        viewport=dict(width=width, height=900), reduced_motion='reduce',
        color_scheme='dark' if dark else 'light', java_script_enabled=scripts)
    context.set_default_timeout(180_000)
    page = context.new_page()
    page.problems = []

    def heard(message):
        if message.type in ('error', 'warning'):
            page.problems.append(f'console {message.type}: {message.text}')

    def route(r):
        address = re.split('[?#]', r.request.url)[0]
        path = docs/unquote(address[len(base):]) if address.startswith(base) else None
        if path and path.is_file():
            kind = mimetypes.guess_type(path.name)[0] or 'application/octet-stream'
            return r.fulfill(path=path, content_type=kind)
        page.problems.append(f'request: {r.request.url}')
        r.abort()

    page.on('console', heard)
    page.on('pageerror', lambda e: page.problems.append(f'exception: {e}'))
    page.route('**/*', route)
    page.goto(base + name)
    return page


WIDE = '''width => [...document.querySelectorAll('body *')].filter(e => {
  const r = e.getBoundingClientRect()
  if (!r.width || r.right <= width + 1) return false
  for (let p = e.parentElement; p; p = p.parentElement)
    if (getComputedStyle(p).overflowX != 'visible') return false
  return true
})
  .slice(0, 5)
  .map(e => `${e.tagName}.${e.className} “${e.textContent.trim().slice(0, 40)}”`)'''

CUT = """() => [...document.querySelectorAll('main .cell-output pre')]
  .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
  .map(e => `${e.textContent.trim().slice(0, 40)}…`)"""

WRAPPED = """() => [...document.querySelectorAll('main .cell code.sourceCode > span')]
  .filter(e => e.textContent && e.getBoundingClientRect().height >
               1.6*parseFloat(getComputedStyle(e).lineHeight))
  .map(e => e.textContent.trim().slice(0, 40))"""

UNFOLD = "document.querySelectorAll('main details').forEach(e => e.open = true)"

DRAWN = '''e => {
  const figure = e.closest('.nnx, .nnt') || document
  // `use`: which tile of a heat map or picture is shown; `text`: numbers of a graph
  return [...figure.querySelectorAll('svg path, svg use, svg text')]
    .map(p => p.getAttribute('d') ?? p.textContent + p.getAttribute('y')).join()
}'''

NAME = 'e => e.labels.length ? e.labels[0].textContent : e.getAttribute("aria-label")'
BACK = '(e, v) => { e.value = v; e.dispatchEvent(new Event("input", {bubbles: true})) }'
GROUND = 'getComputedStyle(document.body).backgroundColor'
LOADED = f"""was => {GROUND} != was &&
  [...document.querySelectorAll('link[rel=stylesheet]')]
    .every(l => l.disabled || l.sheet)"""


def slider_problems(page):
    """Move every slider with the keyboard: each must have a name and change the picture
    of its own figure"""
    bad = []
    for slider in page.locator('input[type=range]').all():
        name = slider.evaluate(NAME)
        if not name: bad.append('a slider without a name')
        if slider.evaluate('e => (e.min || 0) == (e.max || 100)'): continue
        if not slider.is_visible(): continue
        before, value = slider.evaluate(DRAWN), slider.input_value()
        at_end = slider.evaluate('e => e.value == e.max')
        slider.focus()
        page.keyboard.press('Home' if at_end else 'End')
        if slider.evaluate(DRAWN) == before:
            bad.append(f'slider {name} does not change its picture')
        slider.evaluate(BACK, value)
    return bad


def axe_problems(page, axe, rules=None):
    "Serious and critical findings of axe-core, of all its rules or of some"
    if not axe: return []
    if not page.evaluate('"axe" in window'): page.evaluate(axe)
    options = {'resultTypes': ['violations'], **({'runOnly': rules} if rules else {})}
    found = page.evaluate('o => axe.run(document, o)', options)['violations']

    def where(v):
        first = [(n['target'][-1], (n['any'] + n['all'] + n['none'])[0]['message'])
                 for n in v['nodes'][:3]]
        return '; '.join(f'{place}: {message}' for place, message in first)
    return [f"axe {v['id']} ({v['impact']}, {len(v['nodes'])}×): {where(v)}"
            for v in found if v['impact'] in SERIOUS]


def width_problems(page):
    width = page.viewport_size['width']
    needs = page.evaluate('document.scrollingElement.scrollWidth')
    if needs <= width: return []
    return [f'wider than the screen ({needs} > {width}): {page.evaluate(WIDE, width)}']


def listed(page, script, what):
    found = page.evaluate(script)
    return [f'{len(found)} {what}: {found[:3]}'] if found else []


def is_dark(page): return 'quarto-dark' in page.get_attribute('body', 'class')


def narrow_problems(page, axe, width):
    page.set_viewport_size(dict(width=width, height=900))
    bad = width_problems(page) + listed(page, CUT, 'printed results are cut off')
    if width == 360:
        bad += axe_problems(page, axe, ['scrollable-region-focusable', 'target-size'])
    return [f'{width} px: {b}' for b in bad]


def dark_problems(page, axe):
    switch = page.locator('.quarto-color-scheme-toggle').first
    if not page.locator('.quarto-color-scheme-toggle').count(): return []
    before, ground = is_dark(page), page.evaluate(GROUND)
    switch.evaluate('e => e.click()')
    if is_dark(page) == before: return ['the switch of the theme does nothing']
    page.wait_for_function(LOADED, arg=ground)  # style sheets load late
    return [f'dark: {b}' for b in axe_problems(page, axe, ['color-contrast',
                                                           'link-in-text-block'])]


def page_problems(page, axe=None):
    """One page, as a reader meets it, all folds open: on a wide screen (everything), on
    narrow ones (nothing sticks out or is cut off), and dark (contrast)

    One loading for all: the screen is made narrow, the reader's switch makes it
    dark."""
    page.evaluate(UNFOLD)
    bad = width_problems(page) + listed(page, CUT, 'printed results are cut off')
    bad += listed(page, WRAPPED, 'lines of code do not fit') + slider_problems(page)
    bad += axe_problems(page, axe)
    bad += [b for width in (768, 360, 320) for b in narrow_problems(page, axe, width)]
    page.set_viewport_size(dict(width=1280, height=900))
    return bad + dark_problems(page, axe) + page.problems
