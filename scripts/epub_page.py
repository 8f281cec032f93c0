"""A page of the site as a page of the e-book: XHTML that needs no script (see epub.py).

What a reader of e-books cannot do, this page does not need:

- Folded text is open under its title. Hints stand at the end of the page, answers and
  solutions after them, with links there and back: the reader thinks first. Cells that
  only import are left out: they would fill the first pages of a chapter.
- An interactive figure is the picture of its first setting, which the page holds as
  SVG, with its words and the values of its controls below.
- A formula stays MathML, without the copy in TeX that some readers print beside it;
  the copy becomes its `alttext`.
- Buttons, switches, navigation, downloads, and what each line of code makes, are gone.
"""
import re
from base64 import b64decode
from hashlib import sha256

from epub_math import formulas
from xhtml import Node, copy, read

# texts and controls that only scripts use, or that belong to the site
GONE_TAGS = set('script style link meta template noscript nav button input select '
                'textarea output canvas iframe audio video object colgroup'.split())
GONE = set('nn-x nn-x-all nnx-n take-away contents-here about recall-mark recall-says '
           'recall-end recall-knew recall-filter code-copy-button nnd-cursor '
           'callout-icon-container quarto-title-meta'.split())
SHOWN = {'nnx-d', 'nnt-d'}  # hidden only where style sheets are not honoured
RENAMED = dict(form='div', fieldset='div', legend='p', label='span', main='div',
               header='div', footer='div', summary='p', details='div')
KEPT = set('id class href src alt style colspan rowspan start lang dir width height '
           'type role aria-label aria-hidden scope headers'.split())
ROLES = {'img', 'list', 'listitem', 'doc-biblioref', 'doc-noteref', 'doc-backlink',
         'doc-endnotes', 'doc-footnote'}
SVG_ROLES = 'application', 'document', 'img'      # that EPUB allows
REPLY = re.compile(r'(hint|answer|solution)s?\b', re.I)
IMPORTS = re.compile(r'(from|import) |[\s)#]|$')  # how a line of such a cell begins
ALIVE = 'Try it on the site.'


class Page:
    "One page: `body`, `title`, `pictures` {name: bytes or None} and `styles`"
    def __init__(
        self,
        name,   # its file in the site, such as 'momentum.html'
        text,   # its HTML
        home,   # where the site is on the web, with a slash at the end
    ):
        tree = read(text)
        main = tree.find('main')
        if main is None: raise ValueError(f'{name} has no <main>: not a page of a book')
        self.name, self.home, self.pictures, self.styles = name, home, {}, []
        self.heading, self.question, self.replies = '', None, {'hint': [], 'answer': []}
        kids = self.inside(main)
        self.promise = next((n.text() for n in main.all('div') if 'lead' in n.classes),
                            '')
        title = next((n for kid in kids if isinstance(kid, Node)
                      for n in kid.all('h1')), None)
        self.title = title.text() if title else name
        self.add_contents(kids, tree)
        for kind, said in (('hint', 'Hints'), ('answer', 'Answers')):
            if self.replies[kind]:
                kids.append(Node('section', {'id': f'book-{kind}s', 'class': 'replies'},
                                 [Node('h2', (), [said]), *self.replies[kind]]))
        self.body = Node('section', {'epub:type': 'chapter'}, kids)

    def add_contents(self, kids, tree):
        "The list of the page's sections, below its title"
        box = tree.find('details', class_='contents-here')
        top = box.find('ul') if box else None
        links = [Node('li', (), [self.link(li.find('a'))])
                 for li in (top.kids if top else [])
                 if isinstance(li, Node) and li.find('a')]
        if len(links) < 2: return
        at = next((i for i, k in enumerate(kids) if isinstance(k, Node)
                   and 'lead' in k.classes), None)
        if at is None: at = next((i for i, k in enumerate(kids)
                                  if isinstance(k, Node) and k.find('h1')), -1)
        kids.insert(at + 1, Node('ul', {'class': 'in-chapter'}, links))

    def inside(self, node): return [new for kid in node.kids for new in self.tidy(kid)]

    def tidy(self, node):
        "What stands for `node` in the book: a list, empty if it is left out"
        if isinstance(node, str): return [node]
        classes = set(node.classes)
        if node.tag == 'style': self.styles.append(node.text())
        hidden = 'hidden' in node.attrs or not classes & SHOWN and re.search(
            r'display:\s*none', node.attrs.get('style', ''))
        if node.tag in GONE_TAGS or classes & GONE or hidden: return []
        if node.attrs.get('id') == 'title-block-header':
            return [Node('h1', (), self.inside(h)) for h in node.all('h1')]
        if node.tag == 'details': return self.details(node)
        if node.tag == 'math': return formulas(node)
        if node.tag == 'svg': return [self.drawing(node)]
        if node.tag == 'img': return self.picture(node)
        if node.tag == 'a': return [self.link(node)]
        if 'cell' in classes and only_imports(node): return []
        if 'nnx-q' in classes: return self.quiz(node)
        if classes & {'nnx', 'nnt'}: return self.figure(node)
        if 'cell' in classes and (fold := node.find('details', class_='code-fold')):
            said = fold.find('summary')
            if said and REPLY.match(said.text()):        # its outputs belong to it
                return self.reply(said, [self.plain(node, self.solved(node, fold))])
        if re.fullmatch('h[1-6]', node.tag): self.heading = node.text()
        return [self.plain(node, self.inside(node))]

    def solved(self, cell, fold):
        "A cell with its code out of the fold"
        return [new for kid in cell.kids
                for new in ([n for k in fold.kids if k is not fold.find('summary')
                             for n in self.tidy(k)] if kid is fold else self.tidy(kid))]

    def plain(self, node, kids):
        "The element with what XHTML and a book know of its attributes"
        attrs = {k: v for k, v in node.attrs.items() if k in KEPT}
        if attrs.get('role', 'img') not in ROLES: del attrs['role']
        if 'role' not in attrs and node.tag not in ('section', 'figure', 'a'):
            attrs.pop('aria-label', None)
        if node.tag != 'img': attrs.pop('alt', None)
        if set(node.classes) & SHOWN: attrs.pop('style', None)
        return Node(RENAMED.get(node.tag, node.tag), attrs, kids)

    def details(self, node):
        "Folded text: open under its title; hints and answers at the end of the page"
        said = next((k for k in node.kids if isinstance(k, Node)
                     and k.tag == 'summary'), None)
        if said is None: return [Node('div', {'class': 'fold'}, self.inside(node))]
        rest = Node('div', (), [k for k in node.kids if k is not said])
        card = 'recall-card' in node.classes or self.heading == 'Remember'
        if card or REPLY.match(said.text()):
            return self.reply(said, self.inside(rest), card)
        title = Node('p', {'class': 'fold-title'}, self.inside(said))
        kids = [title, *self.inside(rest)]
        if 'code-fold' in node.classes: return kids
        place = {k: v for k, v in node.attrs.items() if k == 'id'}
        return [Node('div', {'class': 'fold'} | place, kids)]

    def reply(self, said, body, card=False):
        "A link to `body`, which moves to the end of the page, under what was asked"
        kind = 'hint' if said.text().lower().startswith('hint') else 'answer'
        n = len(self.replies[kind]) + 1
        there, here = f'{kind}-{n}', f'to-{kind}-{n}'
        if card: asked, words = self.inside(said), 'Answer'
        else:
            words = said.text()
            asked = [f'{words}: {self.question or self.heading}'.rstrip(': ')]
        back = Node('a', {'href': '#' + here, 'aria-label': 'Back to the question'},
                    ['↩'])
        title = Node('p', {'class': 'asked'}, [*map(copy, asked), ' ', back])
        self.replies[kind].append(Node('div', {'id': there}, [title, *body]))
        link = Node('a', {'href': '#' + there, 'id': here}, [f'{words} →'])
        return [Node('p', {'class': 'ask'}, [*(asked + [' '] if card else []), link])]

    def link(self, node):  # epub_links.py settles where it leads
        return self.plain(node, self.inside(node))

    def drawing(self, node):
        "SVG without anything that acts; pixels in it become files"
        kids = []
        for kid in node.kids:
            if isinstance(kid, Node):
                if kid.tag == 'style': self.styles.append(kid.text())
                if kid.tag in ('style', 'script') or 'hidden' in kid.attrs: continue
                kid = self.drawing(kid)
            kids.append(kid)
        attrs = {k: v for k, v in node.attrs.items()
                 if not re.match('on|data-|xmlns|tabindex|focusable', k)}
        if node.tag == 'image': attrs['href'] = self.file(attrs.get('href', ''))
        if node.tag == 'a': attrs['xlink:title'] = attrs.get('aria-label', node.text())
        if node.tag == 'svg' and attrs.get('role', 'img') not in SVG_ROLES:
            attrs['role'] = 'document'
        return Node(node.tag, attrs, kids)

    def file(self, source):
        "Where a picture stands in the book"
        if re.match(r'\w+:(?!.*base64)|//', source):
            raise ValueError(f'{self.name} shows {source[:80]}, which the book cannot '
                             'hold: give it a file of the site')
        if source.startswith('data:'):
            kind, data = source.split(';base64,', 1)
            data = b64decode(data)
            ending = kind.rpartition('/')[2].replace('svg+xml', 'svg')
            source = f'pictures/{sha256(data).hexdigest()[:16]}.{ending}'
            self.pictures[source] = data
        else: self.pictures.setdefault(source, None)
        return source

    def picture(self, node):
        new = self.plain(node, [])
        new.attrs |= {'src': self.file(node.attrs.get('src', '')),
                      'alt': node.attrs.get('alt', '')}
        return [new]

    def figure(self, node):
        "The picture of the first setting, its words, and the setting"
        new = self.plain(node, self.inside(node))
        shown = new.find(class_='nnx-d') or new
        for svg in [k for k in shown.kids if isinstance(k, Node) and k.tag == 'svg'
                    and k.attrs.get('role') == 'img']:
            words = svg.attrs.pop('aria-label', '')
            del svg.attrs['role']
            svg.attrs['aria-hidden'] = 'true'            # they stand below it for all
            at = shown.kids.index(svg) + 1
            shown.kids.insert(at, Node('p', {'class': 'words'}, [words]))
        values = ' · '.join(settings(node))
        place = node.attrs.get('id', '')
        link = Node('a', {'class': 'on-site',
                          'href': f'{self.home}{self.name}#{place}'}, [ALIVE])
        said = [f'Shown: {values}. ' if values else '', link]
        new.kids.append(Node('p', {'class': 'setting'}, said))
        new.attrs['class'] += ' moves'
        return [new]

    def quiz(self, node):
        "A question with its choices as a list; the answer stands at the end"
        legend = node.find('legend')
        self.question = legend.text() if legend else None
        new = self.plain(node, self.inside(node))
        self.question = None
        for box in new.all('div'):
            if 'nnx-o' not in box.classes: continue
            box.tag, box.attrs['class'] = 'ol', box.attrs['class'] + ' choices'
            for kid in box.kids:
                if isinstance(kid, Node): kid.tag = 'li'
            box.kids = [kid for kid in box.kids if isinstance(kid, Node)]
        return [new]


def only_imports(cell):
    "Is its code folded, nothing but imports, and without an output?"
    lines = [line for pre in cell.all('pre') for line in pre.words().split('\n')]
    folded = cell.find('details', class_='code-fold') and any(map(str.strip, lines))
    return (folded and not cell.find('div', class_='cell-output')
            and all(map(IMPORTS.match, lines)))


def settings(figure):
    "The controls of an interactive figure as they stand: ['momentum 0.6', …]"
    form = figure.find(class_='nnx-c') or figure.find(class_='nnt-s')
    if not form: return []
    said = {n.attrs.get('for'): n.text() for n in form.all('label')}
    found = []
    for node in form.all('output', 'span'):
        if node.tag == 'output' and node.attrs.get('for') in said:
            found.append(f"{said[node.attrs['for']]} {node.text()}")
        elif node.attrs.get('role') == 'radiogroup':
            name = form.find(id=node.attrs.get('aria-labelledby', ''))
            name = name.text() if name else ''
            found += [f'{name} {label.text()}'.strip() for label in node.all('label')
                      if any('checked' in n.attrs for n in label.all('input'))]
    return found
