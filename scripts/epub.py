#!/usr/bin/env python
"""The text of the whole book as an EPUB, for e-readers, tablets and phones.

    python scripts/epub.py _docs [book.epub]       default: nntrain-book.epub in _docs

finish_site.py calls it at the end of every build. An EPUB is a zip of XHTML files with
a list of them (book.opf) and a table of contents (nav.xhtml). All is made from the
finished pages by the standard library alone: their formulas are MathML already, and
the figures hold the picture of their first setting as SVG. So nothing is translated
twice, no browser takes pictures, and the same site gives the same bytes.

epub_page.py says what becomes of a page. The module reference stays on the site: links
to it lead there, as do links to files that are not in the book.
"""
import re
import sys
from pathlib import Path
from posixpath import normpath
from urllib.parse import unquote
from uuid import NAMESPACE_URL, uuid5

from epub_frame import CONTAINER, COVER, PAGE, TITLE, nav, package, part_page
from epub_links import cards, file_of, indents, settle
from epub_page import Page
from offline import NAME, ROOT, settings, write_zip
from xhtml import escaped, read, write

FONT = 'fonts/math.woff2'
FACE = f'@font-face {{ font-family: "Book Math"; src: url("{FONT}"); }}\n'
# rules for pointers, which old readers take for damage
MOVES = re.compile(r'[^{}]*:(?:is|has|hover|focus)[^{}]*\{[^{}]*\}')


# ---- what the site holds -------------------------------------------------------------

def outline(index):
    "[(part, [(page, title)])] as the site lists its pages; part '' for pages before"
    menu, found = read(index).find(class_='sidebar-menu-container'), []

    def look(items, part):
        for li in items.all('li'):
            if li not in items.kids: continue
            if inner := li.find('ul'):
                name = li.find(class_='menu-text')
                look(inner, name.text() if name else part)
            elif (a := li.find('a')) and a.attrs.get('href', '').endswith('.html'):
                page = normpath(unquote(a.attrs['href']))
                if '/' in page or ':' in page: continue      # the module reference
                if not found or found[-1][0] != part: found.append((part, []))
                found[-1][1].append((page, a.text()))
    if menu and (top := menu.find('ul')): look(top, '')
    return found


def pages_of(docs, home):
    "-> (the outline, {page: Page}, the date of the last change)"
    if not (docs/'index.html').is_file():
        raise ValueError(f'{docs} holds no index.html: give the folder of a built site')
    parts = outline((docs/'index.html').read_text(encoding='utf-8'))
    if not parts:
        raise ValueError(f'{docs}/index.html lists no chapters: give the folder of a '
                         'site that Quarto has built')
    pages, dates = {}, ['1980-01-01']
    for name in (name for _, listed in parts for name, _ in listed):
        if not (docs/name).is_file():
            raise ValueError(f'{docs} has no {name}, which its index.html lists: build '
                             'the whole site')
        text = (docs/name).read_text(encoding='utf-8')
        pages[name] = Page(name, text, home)
        dates += re.findall(r'Last changed on (\d{4}-\d\d-\d\d)', text)
    return parts, pages, max(dates)


# ---- the book ------------------------------------------------------------------------

def picture(docs, name):
    path = docs/unquote(name)
    if '..' in Path(name).parts or not path.is_file():
        raise ValueError(f'{docs} has no picture {name}, which a page shows: build the '
                         'whole site')
    return path.read_bytes()


def book(docs, notebooks):
    "{name in the zip: bytes} of a finished site; `notebooks`: their folder, with cover"
    s = settings()
    home = s['doc_host'] + s['doc_baseurl'] + '/'
    parts, pages, date = pages_of(docs, home)
    own = (ROOT/'scripts/epub.css').read_text(encoding='utf-8')
    moving = '\n'.join(dict.fromkeys(css for p in pages.values() for css in p.styles))
    moving = MOVES.sub('', moving)
    files = {'figures.css': moving.encode()}
    if (docs/FONT).is_file(): files[FONT], own = picture(docs, FONT), FACE + own
    files['book.css'] = own.encode()
    cover = notebooks/'images/cover.png'
    if not cover.is_file():
        raise ValueError(f'{cover.parent} holds no cover.png: scripts/social_card.py '
                         'draws it')
    files['cover.png'] = cover.read_bytes()
    for page in pages.values():
        cards(page)
        indents(page)
    settle(pages, home, own + moving)
    words = {k: escaped(s[k]) for k in ('title', 'description', 'author', 'version')}
    words |= dict(site=home, repo=s['git_url'], date=date,
                  uuid=uuid5(NAMESPACE_URL, home))
    subtitle = words['description'].partition(':')[0]
    words['title'] += f': {subtitle}'
    part_files = {part: f'part-{i}.xhtml' for i, (part, _) in enumerate(parts)}

    order = []
    def add(name, title, body):
        order.append(name)
        text = PAGE.format(title=escaped(title), body=body)
        files[name] = text.encode()
    add('cover.xhtml', 'Cover', COVER.format(words['title']))
    add('title.xhtml', s['title'], TITLE.format(**words))
    add('nav.xhtml', 'Contents', nav(parts, part_files))
    for part, listed in parts:
        if part: add(part_files[part], part, part_page(part, listed, pages))
        for name, _ in listed:
            page = pages[name]
            add(file_of(name), page.title, write(page.body))
            for picked, data in page.pictures.items():
                files[unquote(picked)] = data or picture(docs, picked)
    files['book.opf'] = package(files, order, words).encode()
    return {'mimetype': b'application/epub+zip', 'META-INF/container.xml':
            CONTAINER.encode(), **{f'EPUB/{k}': files[k] for k in sorted(files)}}


def make_epub(
    docs,       # folder of a finished site
    notebooks,  # folder of the notebooks, for the cover
    path=None,  # the file to write; None: NAME.epub in `docs`
):              # its path
    "Write the book as an EPUB; a half-written one is never left under its name"
    docs, path = Path(docs), Path(path or Path(docs)/f'{NAME}.epub')
    if path.suffix != '.epub':
        raise ValueError(f'{path}: the name of an e-book ends in .epub')
    files = book(docs, Path(notebooks))
    try: write_zip(path, files, stored={'mimetype'})
    except OSError as e:
        raise ValueError(f'{path} cannot be written: {e.strerror}') from e
    return path


def main(args):
    if not 1 <= len(args) <= 2:
        print('epub.py: give the folder of a built site, and perhaps the .epub to '
              'write', file=sys.stderr)
        return 2
    try: path = make_epub(args[0], ROOT/'nbs', *args[1:])
    except (ValueError, OSError) as e:
        print(f'epub.py: {e}', file=sys.stderr)
        return 1
    print(f'{path.name}: {path.stat().st_size/1e6:.1f} MB')
    return 0


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
