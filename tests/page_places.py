"""What the tests of pages read: texts of notebooks, and places that links lead to."""
import json
import re

from conftest import ROOT

NBS = ROOT/'nbs'


def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def ok(problems, todo=''): assert not problems, '\n'.join([*problems[:20], todo])
def no_code(text): return re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)


def anchor(heading):
    "Identifier that pandoc, and so Quarto, gives to a heading"
    found = re.search(r'\{[^}]*#([\w.-]+)[^}]*\}\s*$', heading)
    if found: return found[1]
    text = re.sub(r'\s*\{[^}]*\}\s*$', '', heading)
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text).lower()
    text = re.sub(r'^[\W\d_]+', '', re.sub(r'[^\w\s.-]', '', text).strip())
    return re.sub(r'\s', '-', text) or 'section'


def prose(nb):
    return [no_code(source(c)) for c in nb['cells'] if c['cell_type'] == 'markdown']


def anchors(nb):
    "All places in a page that a link can lead to"
    text = '\n'.join(prose(nb))
    return {anchor(h) for h in re.findall(r'^#+\s+(.*)$', text, re.M)} | set(
        re.findall(r'\{#([\w-]+)\}', text))


def outputs(nb, kind):
    "What the cells of a page show in one form"
    return [''.join(o.get('data', {}).get(kind, ''))
            for c in nb['cells'] for o in c.get('outputs', ())]


def small(*cells):
    "A notebook of (kind, text, {form: output})"
    return dict(cells=[dict(cell_type=kind, source=text,
                            outputs=[dict(data=out)] if out else [])
                       for kind, text, out in cells])


PAGES = {p.name: anchors(read(p)) for p in sorted(NBS.glob('*.ipynb'))}
