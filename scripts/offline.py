#!/usr/bin/env python
"""The whole book as one zip file that needs no network and no server.

    python scripts/offline.py _docs [book.zip]      default: nntrain-book.zip in _docs

finish_site.py calls it at the end of every build. In the zip is the site with its
notebooks. You unpack it and open index.html, and the browser reads from `file://`,
where it refuses three things that the site does. So the pages in the zip differ:

- A page may not `fetch` a file. Each JSON file becomes a script that hands over its
  text, and a few lines on top of each page (SHIM) load that script instead.
- A script may not be a module. Quarto's two modules become one ordinary script.
- Links to pages of the book by their full address lead to the file beside them. Links
  to the repository, to Colab and to papers stay as they are.

The same site gives the same bytes: names are sorted, dates are fixed.
"""
import json
import os
import re
import sys
from configparser import ConfigParser
from pathlib import Path, PurePosixPath
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

ROOT = Path(__file__).resolve().parent.parent
NAME = 'nntrain-book'
LEFT_OUT = re.compile(
    r'404\.html$|sitemap\.xml$|robots\.txt$|\.zip$|\.epub$|\.nojekyll$')

SHIM = '''<script>
// Read from a disk, a page may not fetch: what it asks for stands in a script of the
// same name with .js behind it, which calls bookFile with the text.
if (location.protocol === 'file:') {
  const texts = {}
  window.bookFile = text => { texts[document.currentScript.src] = text }
  window.fetch = address => new Promise((done, fail) => {
    const script = document.createElement('script')
    script.src = new URL(address, document.baseURI).href.split(/[?#]/)[0] + '.js'
    script.onload = () => done(new Response(texts[script.src]))
    script.onerror = () => fail(new TypeError('not in this copy: ' + address))
    document.head.append(script)
  })
}
</script>'''

README = '''{title} {version}: {description}

How to read it
  Open index.html with a double-click, or from your browser's menu (File, Open).
  Everything is in this folder: text, figures, search. You need no network.
  On a phone, unpack the zip first; a preview inside of the zip shows single pages only.

How to run it
  The folder notebooks holds every chapter as a Jupyter notebook:
      pip install jupyter {package}
      jupyter lab notebooks
  The first cell of each one installs the package if it is missing (with a network).

Where it comes from
  {site}
  {repo}
  Licence: Apache 2.0 for text and code.
'''


def settings():
    "The values of settings.ini"
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


# ---- scripts -------------------------------------------------------------------------

def replaced(text, old, new, where):
    "`text` with `new` for its only `old`; an error if Quarto has become another"
    if text.count(old) != 1:
        raise ValueError(f'{where}: expected once, but found {text.count(old)} times: '
                         f'{old!r}; this Quarto is unknown to scripts/offline.py')
    return text.replace(old, new)


def one_script(text, tabsets):
    "Quarto's module with the one that it imports, as an ordinary script"
    text = replaced(text, 'import * as tabsets from "./tabsets/tabsets.js";',
                    '', 'quarto.js')
    inner = replaced(tabsets, 'export function init()', 'function init()', 'tabsets.js')
    if re.search(r'^\s*(import|export)\b', text + '\n' + inner, re.M):
        raise ValueError('quarto.js imports or exports more than scripts/offline.py '
                         'knows of')
    return ("(() => {\n'use strict'\n"
            f'const tabsets = (() => {{\n{inner}\nreturn {{ init }}\n}})()\n{text}\n'
            '})()\n')


def searching(text):
    "Quarto's search, which would refuse to work from a disk"
    return replaced(text, 'window.location.protocol === "file:" && !shownWarning',
                    'false', 'quarto-search.js')


# ---- pages ---------------------------------------------------------------------------

OFFER = re.compile(r'<span class="offline">.*?</span>')


def page(text, name, names, home):
    """A page as it stands in the zip; `name`: its place in the site, `names`: all
    places, `home`: where the site is on the web"""
    up = '../'*name.count('/')
    if 'quarto-html/quarto.js' in text:
        text = re.sub(r'<script src="[^"]*/tabsets\.js" type="module"></script>\n?', '',
                      text)
        text = re.sub(r'(<script src="[^"]*/quarto\.js") type="module"', r'\1 defer',
                      text)
    if found := re.search(r'<script[^>]*\bsrc=[^>]*type="module"[^>]*>', text):
        raise ValueError(f'{name}: {found[0]} is a module, which no browser loads from '
                         'a disk: make it an ordinary script')

    def near(m):  # the file beside, if it is there
        path = m[1] or 'index.html'
        return f'<a href="{up}{path}{m[2]}"' if path in names else m[0]
    text = re.sub(rf'<a href="{re.escape(home)}([^"#]*)([^"]*)"', near, text)
    return OFFER.sub('', re.sub(r'<head>', lambda m: m[0] + SHIM, text, count=1))


# ---- the book ------------------------------------------------------------------------

def book(docs, notebooks):
    """{name in the zip: bytes} of a finished site in the folder `docs`; `notebooks`:
    the folder of the notebooks, for the pictures that they show"""
    s = settings()
    home = s['doc_host'] + s['doc_baseurl'] + '/'
    files = {p.relative_to(docs).as_posix(): p for p in sorted(docs.rglob('*'))
             if p.is_file() and not LEFT_OUT.search(p.name)}
    if 'index.html' not in files:
        raise ValueError(f'{docs} holds no index.html: give the folder of a built site')
    out = {}
    for name, path in files.items():
        data = path.read_bytes()
        kind = PurePosixPath(name).suffix
        if kind == '.html':
            data = page(data.decode(), name, files, home).encode()
        elif kind == '.json':
            name, data = name + '.js', f'bookFile({json.dumps(data.decode())})'.encode()
        elif name.endswith('quarto-html/quarto.js'):
            tabsets = path.parent/'tabsets/tabsets.js'
            data = one_script(data.decode(), tabsets.read_text('utf-8')).encode()
        elif name.endswith('tabsets/tabsets.js'): continue
        elif name.endswith('quarto-search.js'): data = searching(data.decode()).encode()
        out[name] = data
    for path in sorted((notebooks/'images').glob('*.*')):
        out[f'notebooks/images/{path.name}'] = path.read_bytes()
    text = README.format(title=s['title'], version=s['version'], package=s['lib_name'],
                         description=s['description'], site=home, repo=s['git_url'])
    out['README.txt'] = text.replace('\n', '\r\n').encode()  # for every editor
    return out


def write_zip(path, files, stored=()):
    """Write {name: bytes} as a zip, in this order, with the same bytes each time;
    `stored`: names that are not compressed"""
    part = path.with_name(path.name + '.part')
    try:
        with ZipFile(part, 'w', ZIP_DEFLATED, compresslevel=9) as z:
            for name, data in files.items():
                info = ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                info.external_attr = 0o644 << 16
                info.compress_type = ZIP_STORED if name in stored else ZIP_DEFLATED
                z.writestr(info, data)
        os.replace(part, path)
    finally: part.unlink(missing_ok=True)


def make_book(
    docs,       # folder of a finished site
    notebooks,  # folder of the notebooks
    path=None,  # the zip to write; None: NAME.zip in `docs`
):              # its path
    "Write the book as one zip; a half-written one is never left under its name"
    docs, path = Path(docs), Path(path or Path(docs)/f'{NAME}.zip')
    files = book(docs, Path(notebooks))
    write_zip(path, {f'{NAME}/{name}': files[name] for name in sorted(files)})
    return path


def main(args):
    if not 1 <= len(args) <= 2:
        print('offline.py: give the folder of a built site, and perhaps the zip to '
              'write', file=sys.stderr)
        return 2
    try: path = make_book(args[0], ROOT/'nbs', *args[1:])
    except (ValueError, OSError) as e:
        print(f'offline.py: {e}', file=sys.stderr)
        return 1
    print(f'{path.name}: {path.stat().st_size/1e6:.1f} MB')
    return 0


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
