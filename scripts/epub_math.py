"""A formula of the site as MathML of an e-book (see epub.py).

What stands side by side, with a wide gap, gets a line each: a phone would cut it off.
And EPUB is stricter than a browser about which element may carry which attribute.
"""
import re

from xhtml import Node


def formulas(node):
    "MathML for the eye, and TeX for those who cannot see it"
    tex = node.find('annotation')
    attrs = {k: v for k, v in node.attrs.items() if k in ('display', 'id', 'class')}
    first, said = node.find('semantics'), tex.text() if tex else None
    kids = node.kids
    if first: kids = [k for k in first.kids if isinstance(k, Node)
                      and not k.tag.startswith('annotation')][:1]
    kids = [strict(kid) for kid in kids]
    parts, words = [kids], [said]
    row = [k.tag for k in kids if isinstance(k, Node)] == ['mrow']
    if row and said and attrs.get('display') == 'block':
        parts, words = split(kids[0].kids), re.split(r'(?:\\qquad\s*)+', said)
    if len(parts) != len(words): parts, words = [kids], [said]
    found = [Node('math', dict(attrs, alttext=tex.strip()) if tex else attrs, part)
             for part, tex in zip(parts, words)]
    for later in found[1:]: later.attrs.pop('id', None)
    return found


def strict(node):
    "The same formula, with attributes only where EPUB allows them"
    if isinstance(node, str): return node
    attrs, kids = dict(node.attrs), [strict(kid) for kid in node.kids]
    if node.tag != 'mo':
        for name in 'minsize', 'maxsize': attrs.pop(name, None)
    shown = attrs.pop('displaystyle', None) if node.tag != 'mstyle' else None
    new = Node(node.tag, attrs, kids)
    return Node('mstyle', {'displaystyle': shown}, [new]) if shown else new


def split(kids):
    "Parts of a row of MathML, cut at its wide gaps"
    parts = [[]]
    for kid in kids:
        wide = isinstance(kid, Node) and kid.tag == 'mspace' and re.match(
            r'([2-9]|\d\d)', kid.attrs.get('width', ''))
        if not wide: parts[-1].append(kid)
        elif parts[-1]: parts.append([])
    return [[Node('mrow', (), part)] for part in parts]
