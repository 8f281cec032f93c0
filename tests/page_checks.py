"""Checks of pages as Quarto gets them: notebooks that nbdev's processors have seen.

Each checker returns a list of what is wrong. test_site.py feeds it the book and a bad
page.
"""
import ast
import hashlib
import re
import textwrap
from pathlib import Path

from conftest import ROOT

from nntrain.explore import figure_data
from nntrain.site import _outside
from nntrain.tools import _settings


def source(cell): return ''.join(cell['source'])


def code_cells(nb): return [c for c in nb['cells'] if c['cell_type'] == 'code']


def prose(nb):
    "Texts of a notebook without code"
    return [re.sub(r'```.*?```|`[^`]*`', '', source(c), flags=re.S)
            for c in nb['cells'] if c['cell_type'] == 'markdown']


def outputs(nb):
    return [(c, o.get('data', {})) for c in code_cells(nb) for o in c['outputs']]


def front_matter(nb):
    import yaml
    first = nb['cells'][0]
    if first['cell_type'] != 'raw': return {}
    return yaml.safe_load(source(first).strip().strip('-'))


def heading_problems(nb):
    bad, level = [], 1
    # the first page's h1; elsewhere it is a heading
    titles = int('title' in front_matter(nb))
    for text in prose(nb):
        for marks, words in re.findall(r'^(#+)\s+(.*)$', text, re.M):
            if len(marks) == 1: titles += 1
            if len(marks) == 1 and titles > 1: bad.append(f'second h1: {words}')
            elif len(marks) > level + 1:
                bad.append(f'h{len(marks)} after h{level}: {words}')
            level = len(marks)
    return bad if titles else bad + ['no title']


def slugs(text):
    "Places in a page: what is named, and headings"
    bare = re.sub(r'\[([^][]*)\]\([^)]*\)', r'\1', text)
    headings = re.findall(r'^#+\s+(.*?)(?:\s*\{.*)?$', bare, re.M)
    return set(re.findall(r'\{#([\w.-]+)', text)) | {
        re.sub(r'[^\w\s.-]', '', h.lower()).strip().replace(' ', '-') for h in headings}


def link_problems(nb, folder, known):
    """Relative links and pictures must exist, anchors in the same page and in pages of
    the reference must have a target; `known`: names of the pages"""
    text, bad = '\n'.join(prose(nb)), []
    ids = slugs('\n'.join(re.sub(r'^```.*?^```', '', source(c), flags=re.M | re.S)
                          for c in nb['cells'] if c['cell_type'] == 'markdown'))
    for target in re.findall(r'\]\(([^)\s]+)[^)]*\)|src="([^"]+)"', text):
        target = ''.join(target)
        if re.match(r'[a-z]+:', target): continue
        path, _, anchor = target.partition('#')
        if path and path not in known and not (folder/path).exists():
            bad.append(f'dead link {target}')
        elif path.endswith('.qmd') and anchor:
            if f'{{#{anchor}}}' not in (folder/path).read_text(encoding='utf-8'):
                bad.append(f'{path} has no #{anchor}')
        if not path and anchor not in ids: bad.append(f'no target for #{anchor}')
    return bad


def citation_problems(nb, keys):
    text = '\n'.join(prose(nb))
    code = '\n'.join(source(c) for c in nb['cells'])
    labels = set(re.findall(r'\{#([\w-]+)', text))
    labels |= set(re.findall(r'^#\|\s*label:\s*(\S+)', code, re.M))
    bad = []
    for key in re.findall(r'(?<![\w/.])@([A-Za-z][\w:-]*)', text):
        known = keys
        if re.match(r'(fig|tbl|eq|sec|lst|exr|exm)-', key): known = labels
        if key not in known and not key.startswith('sec-'):
            bad.append(f'unknown @{key}')
    return bad


def syntax_problems(nb):
    "What pandoc stumbles over: a Greek letter glued to a command, a quote in a title"
    bad = []
    for text in prose(nb):
        bad += [f'write \\sqrt{{β}}, not {m}' for m in
                re.findall(r'\\[a-zA-Z]+[α-ωΑ-Ω]', text)]
        for line in re.findall(r'^:::.*', text, re.M):
            box = r':::|::: \{[.#][^"]*(="[^"]*")?\}'
            if not re.fullmatch(box, line): bad.append(line)
    return bad


def alt_problems(nb):
    def short(alt): return len((alt or '').split()) < 4
    bad = []
    pictures = re.findall(r'!\[([^\]]*)\]\(([^)]*)\)(\{[^}]*\})?', '\n'.join(prose(nb)))
    for _, target, more in pictures:
        given = re.search('fig-alt="([^"]*)"', more)
        if short(given and given[1]):
            bad.append(f'picture {target} without fig-alt: Quarto makes a caption of '
                       'the text in brackets')
    for c, data in outputs(nb):
        if any(k.startswith('image/') for k in data):
            hit = re.search(r'^#\|\s*fig-alt:\s*(.*)$', source(c), re.M)
            if short(hit and hit[1]):
                bad.append(f'output picture without fig-alt: {source(c)[:60]!r}')
        text = ''.join(data.get('text/markdown', ''))
        for alt in re.findall(r'<svg role="img" aria-label="([^"]*)"', text):
            if short(alt):
                bad.append(f'interactive figure without alt text: {source(c)[:60]!r}')
    return bad


def html_problems(nb):
    bad = ['widget state in the metadata'] if 'widgets' in nb['metadata'] else []
    for c, data in outputs(nb):
        said = f'{source(c)[:60]!r}'
        if 'text/html' in data:
            bad.append(f'text/html left, Quarto would add require.js: {said}')
        if 'application/vnd.jupyter.widget-view+json' in data:
            bad.append(f'widget, dead on a page: {said}')
        if _outside.search(''.join(data.get('text/markdown', ''))):
            bad.append(f'output asks another site: {said}')
    bad += ['Mermaid left: each reader would load its program' for c in nb['cells']
            if re.search(r'^```\{?mermaid', source(c), re.M)]
    return bad


def colab_problems(nb, name):
    s = _settings(ROOT)
    want = 'https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/'
    want = want.format(**s)
    if not code_cells(nb): return []
    head = '\n'.join(source(c) for c in nb['cells'][1:4])
    links = re.findall(r'\((https://colab\.[^)]*)\)', head)
    if len(links) != 1 or not links[0].startswith(want):
        return [f'no Colab link after the title: {links}']
    path = links[0][len(want):]
    if not (ROOT/path).exists() or Path(path).name != name:
        return [f'Colab link to {path}']
    taken = re.findall(r'\(download:([^)]*)\)', head)
    return [] if taken == [name] else [f'no notebook to download: {taken}']


def option_problems(nb):
    "Quarto refuses a cell with the same option twice"
    keys = [re.findall(r'^#\|\s*([\w-]+):', source(c), re.M) for c in code_cells(nb)]
    return [f'option {k} twice in one cell'
            for ks in keys for k in sorted(set(ks)) if ks.count(k) > 1]


def title_problems(nb, name):
    "The chapter's own number stands in the title, and Quarto adds none of its own"
    number = re.match(r'0?(\d+[a-z]?)_', name)
    if not number: return []
    found = re.search(r'^# (.*)$', '\n'.join(prose(nb)[:1]), re.M)
    title = found[1] if found else ''
    bad = []
    if not title.endswith(' {.unnumbered}') or 'title' in front_matter(nb):
        bad.append('Quarto would number this page')
    if name < '80' and not title.startswith(number[1] + ' '):
        bad.append(f'no chapter number in the title {title!r}')
    return bad


def hidden_code(nb, stored):
    "Exported cells whose source the page does not show, and tables that stand for it"
    shown = '\n'.join(source(c) for c in code_cells(nb))
    exported = [re.sub(r'^#\|.*\n', '', source(c), flags=re.M).strip()
                for c in stored['cells']
                if re.match(r'#\| *exports?\b', source(c))
                and '#| hide' not in source(c)]
    return [f'not shown: {e[:60]!r}' for e in exported if e not in shown] + [
        f'signature table: {source(c)[:60]!r}' for c in code_cells(nb)
        if source(c).startswith('show_doc(')]


def plain(text):
    "Letters and digits alone: a page writes links, boxes and folds in another way"
    text = re.sub(r'^```mermaid.*?^```', '', text, flags=re.M | re.S)
    text = re.sub(r'\]\([^)\s]*\)(?:\{[^}]*\})?', ']', text)
    text = re.sub(r'</?(details|summary)>|\{(=html|#|\.(?!callout))[^}]*\}', '', text)
    return re.sub(r'[^\w]|_', '', text)


def lost_text(nb, stored):
    "Lines of the notebook's prose that the page does not hold"
    shown = plain('\n'.join(source(c) for c in nb['cells'] if c['cell_type'] != 'code'))
    texts = [source(c) for c in stored['cells'] if c['cell_type'] == 'markdown']
    texts = [re.sub(r'^```mermaid.*?^```', '', t, flags=re.M | re.S) for t in texts]
    return [f'lost: {line[:80]!r}' for text in texts for line in text.splitlines()
            if plain(line) and plain(line) not in shown]


def _functions(nb):
    "{name of a function: hashes of its sources in the notebook}"
    found = {}
    for c in code_cells(nb):
        try: tree = ast.parse(source(c))
        except SyntaxError: continue  # a cell with magics
        lines = source(c).splitlines()
        for f in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            first = min([f.lineno] + [d.lineno for d in f.decorator_list])
            text = textwrap.dedent('\n'.join(lines[first - 1:f.end_lineno])).strip()
            mark = hashlib.sha256(text.encode()).hexdigest()[:10]
            found.setdefault(f.name, set()).add(mark)
    return found


def drift_problems(nb):
    "Stored figures carry the hash of their function's source: is it the one in here?"
    defined, bad = _functions(nb), []
    for _, data in outputs(nb):
        text = ''.join(data.get('text/html', ''))
        if '/*data*/' not in text: continue
        d = figure_data(text)
        now = defined.get(d.fn)
        if now and d.src not in now:
            bad.append(f'{d.id}: {d.fn} changed since the figure was stored; execute '
                       'the notebook again')
    return bad
