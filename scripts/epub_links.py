"""Where the links of the e-book lead, and what its pages need no more (see epub.py)."""
import re
from collections import Counter
from posixpath import normpath
from urllib.parse import quote, unquote

from xhtml import Node

WIDE = 40  # letters that fit beside each other on a phone
SNUG = 28  # and on the smallest one, with large type


def file_of(name): return name.removesuffix('.html') + '.xhtml'


def target(href, name, places, home):
    """Where a link on the page `name` leads: (page, place) in the book, an address
    outside, or None for nowhere; `places`: {page: its ids}"""
    if href.startswith(home): href = './' + href[len(home):]
    if re.match('https?:|mailto:', href): return href
    if re.match(r'[\w+.-]+:|//', href): return None
    path, _, place = href.partition('#')
    path = normpath(unquote(path)) if path else name
    path, place = 'index.html' if path == '.' else path, unquote(place)
    if path not in places:
        return home + quote(path) + (f'#{quote(place)}' if place else '')
    if place in places[path]: return path, place
    return (path, '') if path != name else None


def settle(pages, home, css):
    "Let links lead into the book, and keep the ids and classes that something uses"
    places = {name: {n.attrs['id'] for n in page.body.all() if 'id' in n.attrs}
              for name, page in pages.items()}
    used = set()
    for name, page in pages.items():
        for node in page.body.all():
            for value in node.attrs.values():
                used |= {(name, place)
                         for place in re.findall(r'url\(#([^)]+)\)', value)}
            href = node.attrs.get('href')
            if href is None: continue
            if node.tag == 'use': used.add((name, href[1:]))
            if node.tag != 'a' or 'on-site' in node.classes: continue
            to = target(href, name, places, home)
            if to is None: del node.attrs['href']
            elif isinstance(to, str): node.attrs['href'] = to
            else:
                used.add((to[0], to[1]))
                file = '' if to[0] == name and to[1] else file_of(to[0])
                node.attrs['href'] = file + (f'#{to[1]}' if to[1] else '')
    classes = set(re.findall(r'\.([a-zA-Z][\w-]*)', css))
    for name, page in pages.items():
        seen = set()
        for node in page.body.all():
            place = node.attrs.get('id')
            if place in seen or (name, place) not in used: node.attrs.pop('id', None)
            seen.add(place)
            kept = [c for c in node.classes if c in classes]
            node.attrs.pop('class', None)
            if kept: node.attrs['class'] = ' '.join(kept)
        slim(page.body)


def slim(node):
    "Spans that say nothing give way to what is in them; a line of code keeps its own"
    kids = []
    for kid in node.kids:
        if isinstance(kid, Node):
            slim(kid)
            if kid.tag == 'a' and 'href' not in kid.attrs: kid.tag = 'span'
            if kid.tag == 'span' and not kid.attrs and 'sourceCode' not in node.classes:
                kids += kid.kids
                continue
        kids.append(kid)
    node.kids = kids


def cards(page):
    """Mark the tables that a phone is too narrow for, and those that are too wide for
    a small one with large type; each cell then says its column"""
    for table in page.body.all('table'):
        rows = [[c for c in tr.kids if isinstance(c, Node) and c.tag in ('th', 'td')]
                for tr in table.all('tr')]
        heads = [c.text() for c in rows[0]] if rows else []
        widths = Counter()
        for row in rows:
            for i, cell in enumerate(row):
                longest = max(map(len, cell.text().split()), default=0)
                widths[i] = max(widths[i], longest + 2)
        total = sum(widths.values())
        if total <= SNUG: continue
        table.attrs['class'] = 'wide' if total > WIDE and len(heads) > 2 else 'snug'
        for row in rows[1:]:
            for head, cell in zip(heads, row):
                if head: cell.attrs['data-head'] = head


def indents(page):
    "Say how far each line of code is indented: where it is wrapped, it goes on there"
    for code in page.body.all('code'):
        if 'sourceCode' not in code.classes: continue
        for line in code.kids:
            if not isinstance(line, Node): continue
            words = line.words()
            by = min((len(words) - len(words.lstrip(' ')))//4*4, 16)
            if by: line.attrs['class'] = f'i{by}'
