"""HTML in, XML out: a page as a tree that one may change.

`read` takes HTML as browsers do, with its gaps; `write` gives XML that every reader of
e-books accepts: each element is closed, SVG has its names with capitals back (HTML
parsers make them small) and namespaces are declared.
"""
import re
from html.parser import HTMLParser

VOID = set('area base br col embed hr img input link meta source track wbr'.split())
SVG, XLINK = 'http://www.w3.org/2000/svg', 'http://www.w3.org/1999/xlink'
MATHML = 'http://www.w3.org/1998/Math/MathML'
CAPITALS = {name.lower(): name for name in '''
    attributeName baseFrequency calcMode clipPath clipPathUnits edgeMode feBlend
    feColorMatrix feComposite feFlood feGaussianBlur feMerge feMergeNode feOffset
    foreignObject gradientTransform gradientUnits lengthAdjust linearGradient
    markerHeight markerUnits markerWidth maskContentUnits maskUnits numOctaves
    pathLength patternContentUnits patternTransform patternUnits preserveAspectRatio
    primitiveUnits radialGradient refX refY repeatCount spreadMethod startOffset
    stdDeviation stitchTiles tableValues targetX targetY textLength textPath viewBox
    viewTarget xChannelSelector yChannelSelector'''.split()}
NO_XML = re.compile('[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]')


class Node:
    "An element: `tag`, `attrs` (a dict) and `kids` (elements and texts)"
    def __init__(self, tag, attrs=(), kids=()):
        self.tag, self.attrs, self.kids = tag, dict(attrs), list(kids)

    @property
    def classes(self): return self.attrs.get('class', '').split()

    def all(self, *tags):
        "This element and all in it, in the order of the page; `tags`: only those"
        if not tags or self.tag in tags: yield self
        for kid in self.kids:
            if isinstance(kid, Node): yield from kid.all(*tags)

    def find(self, tag=None, **attrs):
        "The first element with this tag, these attributes, this class; or None"
        wanted = attrs.pop('class_', None)
        for node in self.all(*([tag] if tag else [])):
            if wanted and wanted not in node.classes: continue
            if all(node.attrs.get(k) == v for k, v in attrs.items()): return node

    def text(self):
        "The words in it, with single spaces"
        return ' '.join(self.words().split())

    def words(self):
        return ''.join(k if isinstance(k, str) else k.words() for k in self.kids)


class Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.root = Node('root')
        self.open = [self.root]

    def add(self, node):
        self.open[-1].kids.append(node)
        return node

    def handle_starttag(self, tag, attrs):  # of two attributes, the first one counts
        node = self.add(Node(tag))
        for name, value in attrs: node.attrs.setdefault(name, value or '')
        if tag not in VOID: self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        foreign = any(n.tag in ('svg', 'math') for n in self.open)
        if foreign and tag not in VOID: self.open.pop()

    def handle_endtag(self, tag):
        for i in reversed(range(1, len(self.open))):
            if self.open[i].tag == tag:
                del self.open[i:]
                break

    def handle_data(self, data): self.add(data)


def read(text):
    "HTML as a tree"
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader.root


def copy(node):
    "The same words once more on the page: without places, and without links"
    if isinstance(node, str): return node
    attrs = {k: v for k, v in node.attrs.items() if k not in ('id', 'href')}
    tag = 'span' if node.tag == 'a' else node.tag
    return Node(tag, attrs, [copy(kid) for kid in node.kids])


def escaped(text):
    text = NO_XML.sub('\ufffd', text)
    return text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')


def write(node, svg=False):
    "A tree, or a text in it, as XML; `svg`: it stands in an SVG picture"
    if isinstance(node, str): return escaped(node)
    attrs, outer = dict(node.attrs), svg
    svg = svg or node.tag == 'svg'
    if svg:
        if 'href' in attrs: attrs['xlink:href'] = attrs.pop('href')
        attrs = {CAPITALS.get(k, k): v for k, v in attrs.items()}
    if node.tag == 'math': attrs['xmlns'] = MATHML
    elif node.tag == 'svg' and not outer: attrs |= {'xmlns': SVG, 'xmlns:xlink': XLINK}
    tag = CAPITALS.get(node.tag, node.tag) if svg else node.tag
    said = ''.join(f' {k}="{escaped(v).replace(chr(34), "&quot;")}"'
                   for k, v in attrs.items())
    inside = ''.join(write(kid, svg) for kid in node.kids)
    closed = svg and not inside or tag in VOID
    return f'<{tag}{said}/>' if closed else f'<{tag}{said}>{inside}</{tag}>'
