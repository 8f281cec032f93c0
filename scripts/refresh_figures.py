"""Give stored figures the scripts, styles and controls of today's package.

    python scripts/refresh_figures.py [--check] [NOTEBOOK …]     default: nbs/*.ipynb

A figure of `explore`, `predict` or `draw_view`, or a training tape, holds everything it
shows, so nothing is executed: the picture, frames, words and network stay as they are
stored. Do this after a change of nbs/figures (and `nntrain_sync`). With --check nothing
is written. Exit status 1: something is out of date (--check), or a figure cannot be
read and its cell must be executed again.
"""
import ast
import json
import re
import sys
from pathlib import Path

from nntrain.drawable import _DRAW_CSS, _DRAW_JS
from nntrain.explore import figure_data
from nntrain.figure_web import _PREDICT_JS, _script, _style
from nntrain.figures import _controls, _program
from nntrain.results import _write
from nntrain.tape_view import stored_view

# form: the controls of today; div: those of the first edition, all of them sliders
EXPLORE = re.compile(
    r'(?P<head><div class="nnx nnx-\w+" id="[^"]*" role="group".*?>)'
    r'<style>.*?</style>(?P<picture>.*?)<(?P<tag>div|form) class="nnx-c" hidden>'
    r'(?P<controls>.*?)</(?P=tag)><script>.*?</script>(?=<small>)', re.S)
PREDICT = re.compile(
    r'(?P<head><div class="nnx nnx-q" id="[^"]*">)<style>.*?</style>(?P<body>.*?)'
    r'<script>(?:(?!</script>).)*?\((?P<data>\{"id":(?:(?!</script>).)*\})\);?\s*'
    r'(?:\}\)\(\))?</script>', re.S)
DRAW = re.compile(
    r'(?P<head><div class="nnx nnx-draw" id="[^"]*" role="group" aria-label="[^"]*">)'
    r'<style>.*?</style>(?P<body>.*?)<script>(?:(?!</script>).)*?'
    r'drawing\((?P<data>\{"network":.*?\})\);\s*\}\)\(\)</script>', re.S)


def given_labels(source, fn):
    "The literal `labels=` of the call `explore(fn, …)` in the text of a cell"
    try: tree = ast.parse(re.sub(r'^\s*[%!].*$', '', source, flags=re.M))
    except SyntaxError: return {}
    for n in ast.walk(tree):
        if not (isinstance(n, ast.Call) and ast.unparse(n.func) == 'explore' and n.args
                and ast.unparse(n.args[0]) == fn): continue
        for v in (k.value for k in n.keywords if k.arg == 'labels'):
            if isinstance(v, ast.Call) and ast.unparse(v.func) == 'dict':
                return {k.arg: ast.literal_eval(k.value) for k in v.keywords}
            return ast.literal_eval(v)  # what is not literal is an error here
    return {}


def positions(data, controls):
    "Where the controls stand at first"
    for p in data['params']:
        key = re.escape(f"{data['id']}-{p['name']}")
        slider = rf'<input type="range" id="{key}"[^>]* value="(\d+)"'
        button = rf'<input type="radio" name="{key}" value="(\d+)"[^>]* checked>'
        yield int((re.search(slider, controls) or re.search(button, controls))[1])


def refreshed(html, source=''):
    "The stored HTML of a cell with the source `source`, as today's package writes it"
    def explored(hit):
        data = dict(figure_data(hit[0]))
        data['series'] = [dict(s) for s in data['series']]
        data['params'] = [dict(p) for p in data['params']]
        controls = _controls(
            data, [*positions(data, hit['controls'])], given_labels(source, data['fn']))
        return (hit['head'] + _style('figure.css') + hit['picture'] + controls
                + _program(data))

    def predicted(hit):
        return (hit['head'] + _style('figure.css', 'predict.css') + hit['body']
                + _script(_PREDICT_JS, 'predict', hit['data']))

    def redrawn(hit):
        return (hit['head'] + _style(*_DRAW_CSS) + hit['body']
                + _script(_DRAW_JS, 'drawing', hit['data']))

    wanted = html.count('<div class="nnx nnx-')
    html, n_explore = EXPLORE.subn(explored, html)
    html, n_predict = PREDICT.subn(predicted, html)
    html, n_draw = DRAW.subn(redrawn, html)
    found = n_explore + n_predict + n_draw
    if found != wanted: raise ValueError(f'{wanted} figures, {found} understood')
    most = 60*(wanted - n_draw) + 200*n_draw  # a network is larger
    if len(html.encode()) > 1024*most: raise ValueError(f'more than {most} KB')
    return html


def refresh(nb):
    "Change a notebook in place -> (cell, figure, bytes before, after) for each figure"
    for i, cell in enumerate(nb['cells']):
        for output in cell.get('outputs', ()):
            stored = output.get('data', {}).get('text/html', '')
            html = ''.join(stored)
            taped = '<div class="nnt"' in html
            if '<div class="nnx nnx-' not in html and not taped: continue
            if taped: new = stored_view(html).to_html()
            else: new = refreshed(html, ''.join(cell['source']))
            many = isinstance(stored, list)
            output['data']['text/html'] = new.splitlines(keepends=True) if many else new
            name = re.search(r'class="nn(?:x nnx-\w+|t)" id="([^"]*)"', html)[1]
            yield i, name, len(html.encode()), len(new.encode())


def main(args):
    check = '--check' in args
    paths = [Path(a) for a in args if a != '--check']
    status, changed = 0, []
    for path in paths or sorted(Path('nbs').glob('*.ipynb')):
        text = path.read_text(encoding='utf-8')
        nb = json.loads(text)
        old = json.dumps(nb)
        try:
            for i, name, before, after in refresh(nb):
                print(f'{path.name:24}{i:4} {name:36}{before:7} ->{after:7}')
        except (ValueError, TypeError) as e:
            print(f'FAILED {path.name}, not changed: {e}')
            status = 1
            continue
        if json.dumps(nb) == old: continue
        changed.append(path.name)
        text = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False)
        if not check: _write(path, text + '\n')
    print('out of date:' if check else 'changed:', *changed or ['nothing'])
    return status or int(check and bool(changed))


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
