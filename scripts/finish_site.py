#!/usr/bin/env python
"""What Quarto's pages still lack, done to the built files. Quarto calls it at the end.

- Style sheets lose the rules that no page uses (of Bootstrap's 500 KB, 130 are used),
  scripts do not hold up the first picture, images load when they come near the screen.
  Their places are free before, so that no text moves.
- Appendices have the numbers by which the texts name them, not Quarto's letters.
- A link to skip the navigation and a contents list for narrow screens, both without
  JavaScript.
- Old addresses lead on: pages by themselves, places in a page by `moved.json`, which
  page.html asks.
- Each chapter's notebook stands beside its page, to be downloaded.
- The home page offers the whole book as one zip to read offline (offline.py), and its
  text as an e-book (epub.py).
"""
import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path
from urllib.parse import unquote

from epub import make_epub
from offline import OFFER, make_book

HERE = Path(__file__).resolve().parent
OLD_PAGES = HERE/'first_edition.json'  # {page: [places in it]} of the first edition


# ---- style sheets --------------------------------------------------------------------

def end_of(css, i, stop):
    "Where one of the letters `stop` comes first, outside of quotes and brackets"
    quote, depth = None, 0
    while i < len(css):
        c = css[i]
        if c == '\\': i += 1
        elif quote: quote = None if c == quote else quote
        elif c in '"\'': quote = c
        elif depth == 0 and c in stop: return i
        elif c in '([{': depth += 1
        elif c in ')]}': depth -= 1
        i += 1
    return i


def rules(css):
    "A style sheet as [(what stands before the brace, what stands inside, or None)]"
    css, i, found = re.sub(r'/\*.*?\*/', '', css, flags=re.S), 0, []
    while css[i:].strip():
        at = end_of(css, i, '{;')
        if css[at:at + 1] == '{':
            end = end_of(css, at + 1, '}')
            found.append((css[i:at].strip(), css[at + 1:end]))
            i = end + 1
        else:
            found.append((css[i:at + 1].strip(), None))
            i = at + 1
    return found


def selectors(text):
    found, i = [], 0
    while i < len(text):
        at = end_of(text, i, ',')
        found.append(text[i:at].strip())
        i = at + 1
    return found


def is_used(selector, words):
    "Can it match anything? `words`: all classes, ids, tags and what scripts might add"
    text = re.sub(r':(?:not|is|where|has)\((?:[^()]|\([^()]*\))*\)', '', selector)
    text = re.sub(r'\[[^\]]*\]|::?[\w-]+(?:\([^)]*\))?', '', text)
    names = re.findall(r'[.#]((?:[\w-]|\\.)+)', text)
    names = [name.replace('\\', '') for name in names]
    tags = re.findall(r'(?:^|[\s>+~])([a-z]\w*)', text)
    return all(word in words for word in names + tags)


def used_rules(css, words):
    kept = []
    for before, inside in rules(css):
        if inside is None: kept.append(before)
        elif re.match('@(media|supports|layer|container)', before):
            inside = used_rules(inside, words)
            if inside: kept.append(f'{before}{{{inside}}}')
        elif before.startswith('@'): kept.append(f'{before}{{{inside}}}')
        else:
            before = ','.join(s for s in selectors(before) if is_used(s, words))
            if before: kept.append(f'{before}{{{inside}}}')
    return ''.join(kept)


def smaller(css, words):
    "A style sheet without what no page uses; who holds the rights stays on top"
    rights = re.findall(r'/\*!(?:(?!\*/).)*?(?:Copyright|Licensed).*?\*/', css, re.S)
    return ''.join(f'{text}\n' for text in rights) + used_rules(css, words)


def words_of(docs, pages):
    "What a selector may name: classes, ids and tags of the pages, words of the scripts"
    scripts = [p.read_text(encoding='utf-8') for p in docs.rglob('*.js')]
    words = set()
    for text in pages.values():
        for value in re.findall(r'\b(?:class|id)="([^"]*)"', text):
            words |= set(value.split())
        words |= set(re.findall(r'<([a-zA-Z][\w-]*)', text))
        scripts += re.findall(r'<script\b[^>]*>(.*?)</script>', text, re.S)
    for text in scripts: words |= set(re.findall(r'[\w-]+', text))
    return words


# ---- pages ---------------------------------------------------------------------------

SKIP = '<a class="skip-link" href="#quarto-document-content">Skip to the text</a>'


def contents(text):
    "The list of contents once more, folded under the title, for screens without margin"
    end = r'\s*(?:<div class="toc-actions|</nav>)'
    toc = re.search(f'<nav id="TOC".*?(<ul>.*?</ul>){end}', text, re.S)
    if not toc: return text
    plain = re.sub(r' (?:id|class|data-scroll-target)="[^"]*"', '', toc[1])
    box = ('<details class="contents-here"><summary>On this page</summary>\n'
           f'<nav aria-label="On this page">{plain}</nav></details>\n')
    start = text.index('<main')
    under = (re.compile('<div class="lead">.*?</div>', re.S).search(text, start)
             or re.compile('</header>').search(text, start))
    at = under.end() if under else text.index('>', start) + 1
    return text[:at] + box + text[at:]


def finished(text):
    "One page, finished; a finished page stays as it is"
    if SKIP in text: return text
    text = re.sub(r'<body\b[^>]*>', lambda m: m[0] + SKIP, text, count=1)
    text = re.sub(r'(<script src="[^"]*\.js")(?=></script>)', r'\1 defer', text)
    numbers = r'<a href="#cb[\d-]+" aria-hidden="true" tabindex="-1"></a>'
    text = re.sub(numbers, '', text)
    text = re.sub(r'<img (?=src=)', '<img loading="lazy" decoding="async" ', text)
    text = re.sub('href="download:([^"]*)"', r'href="notebooks/\1" download', text)
    return contents(text)


PNG = b'\x89PNG\r\n\x1a\n'  # how such a file begins


def png_size(path):
    "Width and height of a PNG file, in pixels; None if there is no such file"
    if not path.is_file(): return None
    with path.open('rb') as file: start = file.read(24)
    whole = len(start) == 24 and start.startswith(PNG)
    return struct.unpack('>II', start[16:]) if whole else None


def sized(text, folder):
    "A page in `folder`; its pictures say how large they are, and keep their place free"
    def with_size(m):
        size = png_size(folder/unquote(m[1]))
        return '<img width="{}" height="{}" '.format(*size) if size else m[0]
    return re.sub(r'<img (?=[^>]*\bsrc="([^":]+\.png)")(?![^>]*\bwidth=)', with_size,
                  text)


# ---- numbers of appendices -----------------------------------------------------------

def appendices(notebooks):
    "{page: number}, such as {'tape.html': '80'}: texts speak of appendix 80"
    return {f'{p.stem[3:]}.html': p.stem[:2]
            for p in sorted(notebooks.glob('[89][0-9]_*.ipynb'))}


LETTER = re.compile('Appendix [A-Z] — ')
LISTED = re.compile(r'(<a href="(?:\./)?(\w+\.html)"[^>]*>(?:\s*<i [^>]*></i>)?\s*'
                    r'(?:<span class="nav-page-text">)?<span class="chapter-title">)'
                    r'(?!\d)')


def numbered(text, name, known):
    "A page with the numbers of appendices in its title, and in its lists of pages"
    mine = f'Appendix {known[name]} — ' if name in known else ''
    text = LETTER.sub(mine, text)
    return LISTED.sub(lambda m: m[1] + f'{known[m[2]]} ' if m[2] in known else m[1],
                      text)


def number_search(docs, known):
    "The same in the index that the search field reads"
    index = docs/'search.json'
    if not index.is_file(): return
    found = json.loads(index.read_text(encoding='utf-8'))
    for one in found:
        page = one.get('href', '').partition('#')[0]
        one['title'] = numbered(one.get('title', ''), page, known)
    index.write_text(json.dumps(found, ensure_ascii=False, indent=2), encoding='utf-8')


# ---- old addresses -------------------------------------------------------------------

GONE = 'This page has moved'
LEAD_ON = '''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="robots" content="noindex"><link rel="canonical" href="{to}">
<meta http-equiv="refresh" content="1; url={to}">
<script>
fetch('moved.json').then(r => r.json()).then(moved => {{
  const place = location.hash.slice(1), page = moved['{name}'][place]
  location.replace(page ? page + '#' + place : '{to}')
}})
</script></head>
<body><main><h1>{title}</h1>
<p>This page is now <a href="{to}">{to}</a>.</p></main></body>
</html>
'''


def places(text): return set(re.findall(r'<[^>]* id="([^"]+)"', text))


def moved(old, now):
    """{old page: {place: the page where it is now}} for places that left their page

    `old`, `now`: {page: places}. Place '' is where most of a page went that is gone."""
    found = {}
    for page, wanted in old.items():
        ways = {}
        for place in sorted(set(wanted) - now.get(page, set())):
            homes = sorted(p for p, ids in now.items() if place in ids and '/' not in p)
            if len(homes) == 1: ways[place] = homes[0]
        if page not in now:
            homes = list(ways.values())
            most = max(sorted(set(homes)), key=homes.count, default='index.html')
            ways[''] = most
        if ways: found[page] = ways
    return found


def lead_on(docs, pages):
    "Write moved.json, and a page for each old one that is gone"
    if not OLD_PAGES.is_file(): return
    old = json.loads(OLD_PAGES.read_text(encoding='utf-8'))
    ways = moved(old, {name: places(text) for name, text in pages.items()})
    for name in sorted(set(ways) - set(pages)):
        page = LEAD_ON.format(title=GONE, name=name, to=ways[name][''])
        (docs/name).write_text(page, encoding='utf-8')
    (docs/'moved.json').write_text(json.dumps(ways, sort_keys=True), encoding='utf-8')


# ---- the book offline ----------------------------------------------------------------

def offer_book(docs, notebooks):
    "Make the zip of the site and the e-book, and offer them on the home page"
    offers = [(make_book(docs, notebooks), 'Read it offline', 'the whole book')]
    try: offers.append((make_epub(docs, notebooks), 'Download the e-book', 'EPUB'))
    except ValueError as e:
        print(f'finish_site.py: no e-book is made: {e}', file=sys.stderr)
    links = ''.join(f' · <a href="{path.name}" download>{says}</a> '
                    f'({what}, {path.stat().st_size/1e6:.1f} MB)'
                    for path, says, what in offers)
    home = docs/'index.html'
    text = OFFER.sub('', home.read_text(encoding='utf-8'))
    text = re.sub(r'(<div class="take-away">.*?)(</p>)',
                  lambda m: f'{m[1]}<span class="offline">{links}</span>{m[2]}', text,
                  count=1, flags=re.S)
    home.write_text(text, encoding='utf-8')


# ---- all of it -----------------------------------------------------------------------

def finish(docs, notebooks):
    "Finish the site in the folder `docs`; `notebooks`: folder of the notebooks"
    pages = {p.relative_to(docs).as_posix(): p.read_text(encoding='utf-8')
             for p in sorted(docs.rglob('*.html'))}
    known = appendices(notebooks)
    pages = {name: numbered(sized(finished(text), (docs/name).parent), name, known)
             for name, text in pages.items() if GONE not in text}
    number_search(docs, known)
    for name, text in pages.items(): (docs/name).write_text(text, encoding='utf-8')
    words = words_of(docs, pages)
    for sheet in sorted(docs.glob('site_libs/**/*.css')):
        css = sheet.read_text(encoding='utf-8')
        sheet.write_text(smaller(css, words), encoding='utf-8')
    lead_on(docs, pages)
    (docs/'notebooks').mkdir(exist_ok=True)
    for path in sorted(notebooks.glob('*.ipynb')): shutil.copy2(path, docs/'notebooks')
    if 'index.html' in pages: offer_book(docs, notebooks)


if __name__ == '__main__':
    if len(sys.argv) == 2: finish(Path(sys.argv[1]), HERE.parent/'nbs')
    elif os.environ.get('QUARTO_PROJECT_RENDER_ALL'):  # not for a page of a preview
        finish(Path(os.environ['QUARTO_PROJECT_OUTPUT_DIR']), HERE.parent/'nbs')
