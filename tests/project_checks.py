"""What must hold for the whole project. Each function returns the problems that it
finds as a list of lines; an empty list means all is well.

Folders are passed in, so that tests can feed every check a bad sample and see that it
fails."""
import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from datetime import date
from functools import lru_cache

import yaml

MAX_NOTEBOOK = 500_000                                             # bytes
HEAVY = (
    'matplotlib', 'datasets', 'torchvision', 'ipywidgets', 'pandas',
    'torchmetrics')  # must load only when used
FASTCORE = {
    'patch', 'AttrDict', 'call_parse', 'delegates', 'store_attr',
    'L'}  # in fastcore 1 (which nbdev 2 needs) and 2 (which readers get) alike
# Appendices whose modules any chapter may import; they import no chapter
SHARED_PAGES = {'81_xray', '82_cards', '89_processes', '90_pictures', '92_figures',
                '93_recording', '94_tools', '98_site'}
# Appendices that build on the chapters up to a number: their modules import no later
# one, and every chapter from that number on may import them
SHARED_FROM = {'80_tape': 4, '83_listening': 26, '84_looks': 26,
               '85_second_room': 26, '86_panels': 4, '87_logging': 16,
               '88_photo_files': 22}
FOLDERS = 'home|Users|root|tmp|private|work|opt|mnt|srv|var/folders'
MACHINE_PATH = re.compile(rf'(?<![\w.:/-])(?:/(?:{FOLDERS})/|[A-Z]:\\+Users\\+)[\w.-]+')
# ruff: undefined and unused names, mutable defaults, useless comparisons and
# expressions,
# `global`, comparisons with None and True, bare except, plain errors, forgotten
# breakpoints
RULES = 'F,B006,B015,B018,PLW0603,E71,E72,PLE,T10'
SNEAKY = {'globals', 'locals', 'sys._getframe', 'inspect.currentframe', 'inspect.stack'}
EVENT = re.compile(r'(before|after|cleanup)_')
CHECK_CALL = re.compile(r'(test|assert|check)_\w+|expect_fail')


# ---- reading -------------------------------------------------------------------------

def settings(root):
    "The values of settings.ini"
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def notebooks(root):
    "{path: notebook as a dict}, in the order of the book"
    return {
        p: json.loads(p.read_text(encoding='utf-8'))
        for p in sorted((root / 'nbs').glob('*.ipynb'))}

def code_cells(nb):
    "Sources of the code cells"
    return [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']

def directive(src, name):
    "What follows `#| name` in the comments of a cell; None if it is not there"
    found = re.search(rf'^#\|\s*{name}\b:?[ \t]*(.*)$', src, re.M)
    return found and found[1].strip()

def is_export(src):
    return any(
        directive(src, name) is not None for name in ('export', 'exports', 'exporti'))

@lru_cache(None)
def parse(src):
    "Syntax tree of a cell, without its magics"
    return ast.parse(re.sub(r'^([ \t]*)[%!].*$', r'\1pass', src, flags=re.M))

def chapter(path):
    """Place of a chapter in the book, 11b_x behind 11_x; a page without a number stands
    behind all of them"""
    found = re.match(r'(\d+)([a-z]?)_', path.name)
    return (
        int(found[1]) + (ord(found[2]) - ord('a') + 1) / 100 if found and found[2]
        else int(found[1]) if found else math.inf)

def exporting_to(nb):
    "[(module, source)] of the exported cells of a notebook, in order"
    cells = code_cells(nb)
    own = next((name for src in cells if (name := directive(src, 'default_exp'))), None)
    return [(target_of(src) or own, src) for src in cells if is_export(src)]

def target_of(src):
    "The module that `#| export NAME` names; '' if it names none"
    return next((to for kind in ('export', 'exports', 'exporti')
                 if (to := directive(src, kind)) is not None), '')

def module_places(root):
    """{module: chapter that exports it, or from which on an appendix may be used}:
    modules and cells of later ones may import it"""
    found = {}
    for path, nb in notebooks(root).items():
        for name, _ in exporting_to(nb):
            found.setdefault(name, SHARED_FROM.get(path.stem, chapter(path)))
    return found

def shared_modules(root):
    "Modules that any chapter may import"
    return {name for path, nb in notebooks(root).items() if path.stem in SHARED_PAGES
            for name, _ in exporting_to(nb)}

def project_files(root):
    """Text files that belong to the project: those that git knows or would add; without
    git none"""
    listed = git(root, 'ls-files', '-z', '--cached', '--others', '--exclude-standard')
    files = [root/name for name in listed.split('\0') if name]
    return [
        f for f in files
        if f.is_file() and f.suffix not in {'.png', '.ico', '.jpg', '.webp', '.woff2'}]

def git(root, *args):
    if not (root/'.git').exists(): return ''
    return subprocess.run(
        ['git', '-C', str(root), *args], capture_output=True, text=True, check=True
    ).stdout

def run(root, *args):
    """Run a command of this environment in `root`, as a person would: not under nbdev's
    test flag"""
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    return subprocess.run(
        [sys.executable, '-m', *args] if args[0] != '-c' else [sys.executable, *args],
        cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300)

def copy_project(root, to):
    "Copy what nbdev reads and writes"
    for name in (
        'settings.ini',
        'setup.py',
        'pyproject.toml',
        'README.md',
        '_quarto.yml',
    ):
        if (root/name).exists(): shutil.copy(root/name, to)
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_*', '.*')
    shutil.copytree(root/'nbs', to/'nbs', ignore=skip)
    (to/'nntrain').mkdir()
    shutil.copy(root/'nntrain/__init__.py', to/'nntrain')
    return to


# ---- notebooks and package in step ---------------------------------------------------

def out_of_step(root, tmp):
    "Modules that are not what `nbdev_export` makes of the notebooks"
    fresh = copy_project(root, tmp)
    done = run(fresh, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    if done.returncode: return [f'nbdev_export fails: {done.stderr.strip()[-500:]}']
    def modules(folder):
        return {
            p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8')
            for p in folder.rglob('*.py')}
    want, have = modules(fresh/'nntrain'), modules(root/'nntrain')
    def how(name):
        if name not in have: return 'is missing'
        if name not in want: return 'comes from no notebook'
        return 'differs from its notebook'
    return [f'nntrain/{name} {how(name)}: run nbdev_export'
            for name in sorted(want | have) if want.get(name) != have.get(name)]

def not_clean(root, tmp):
    "Notebooks that `nbdev_clean` would change"
    fresh = copy_project(root, tmp)
    done = run(fresh, '-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()')
    if done.returncode or 'Failed to clean' in done.stderr:
        return [f'nbdev_clean fails: {done.stderr.strip()[-500:]}']
    return [
        f'nbs/{p.name} is not clean: run nbdev_clean' for p in notebooks(root)
        if p.read_text(encoding='utf-8')
        != (fresh / 'nbs' / p.name).read_text(encoding='utf-8')]

def backward_imports(root):
    """Modules and cells that import what comes later, shared modules that import a
    chapter, modules that import each other"""
    places, shared, problems = module_places(root), shared_modules(root), []
    graph = {name: set() for name in places}
    def problem(path, text): problems.append(f'{path.name}: {text}')
    for path, nb in notebooks(root).items():
        for own, src in exporting_to(nb):
            for module in sorted(imported_modules(src)):
                if module == own: problem(path, f'nntrain.{own} imports itself')
                elif module == '_modidx': pass            # nbdev writes it, of all
                elif module not in places:
                    problem(path, f'exported code imports nntrain.{module}, '
                                  'which no chapter exports')
                if module not in places or module == own: continue
                graph[own].add(module)
                if own in shared and module not in shared:
                    problem(path, f'nntrain.{own} may import no chapter, '
                                  f'but imports nntrain.{module}')
                elif module not in shared and places[module] > places[own]:
                    problem(path, f'nntrain.{own} imports nntrain.{module} of '
                                  f'chapter {places[module]:02}: not an earlier one')
        for src in filter(lambda src: not is_export(src), code_cells(nb)):
            for module in sorted(imported_modules(src) - shared):
                if places.get(module, -1) > chapter(path):
                    problem(path, f'a cell imports nntrain.{module} of the later '
                                  f'chapter {places[module]:02}')
    return problems + [f'nntrain.{a} and nntrain.{b} import each other'
                       for a in graph for b in graph
                       if a < b and b in reached(graph, a) and a in reached(graph, b)]

def reached(graph, start):
    "All that can be reached from a node: {node: nodes}"
    found, todo = set(), [start]
    while todo:
        new = graph.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found

def imported_modules(src):
    "Modules of the package that a piece of code imports, wherever in it"
    found = set()
    for node in ast.walk(parse(src)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(
                filter(None, ['nntrain' if node.level else '', node.module]))
            names = (
                [base] if base != 'nntrain'
                else [f'{base}.{a.name}' for a in node.names])
        else:
            continue
        found |= {n.split('.')[1] for n in names if n.startswith('nntrain.')}
    return {m for m in found if not m.startswith('__')}


# ---- one notebook --------------------------------------------------------------------

def untidy(nb, size=0):
    "What must not be stored in a notebook of `size` bytes"
    ids = [cell.get('id') for cell in nb['cells']]
    problems = [
        f'{ids.count(i)} cells have the id {i}' for i in sorted(set(ids), key=str)
        if ids.count(i) > 1]
    if size > MAX_NOTEBOOK: problems.append(f'{size:,} bytes, over {MAX_NOTEBOOK:,}')
    if set(nb['metadata']) - {'kernelspec'}:
        problems.append(
            f"metadata {sorted(set(nb['metadata']) - {'kernelspec'})}: only "
            "kernelspec belongs there")
    for i, cell in enumerate(nb['cells']):
        if found := MACHINE_PATH.search(''.join(cell['source'])):
            problems.append(f'cell {i}: machine path {found[0]}')
        if cell['cell_type'] == 'markdown' and re.search(
            '^:::', ''.join(cell['source']), re.M
        ):
            problems.append(
                f'cell {i}: a box of Quarto, which other viewers print; '
                'CONTRIBUTING.md says how boxes are written')
        if (
            cell['cell_type'] == 'code'
            and directive(''.join(cell['source']), 'cuda') is not None
            and 'is_available()' not in ''.join(cell['source'])
        ):
            problems.append(
                f'cell {i}: a cuda cell that fails for readers without a GPU; put it '
                'under `if torch.cuda.is_available():`')
        if cell.get('attachments'):
            problems.append(f'cell {i}: an attachment; use a file in nbs/images')
        for out in cell.get('outputs', ()):
            if out['output_type'] == 'error':
                problems.append(f"cell {i}: stored error {out.get('ename')}")
            if out.get('name') == 'stderr':
                problems.append(
                    f"cell {i}: stored stderr {''.join(out['text'])[:60]!r}")
            if 'application/vnd.jupyter.widget-view+json' in out.get('data', {}):
                problems.append(f'cell {i}: a widget without a kernel; store its HTML')
            text = [
                ''.join(v) if isinstance(v, list) else json.dumps(v)
                for k, v in out.get('data', {}).items() if not k.startswith('image/p')]
            if found := MACHINE_PATH.search(''.join(text + list(out.get('text', [])))):
                problems.append(f'cell {i}: machine path {found[0]} in the output')
    return problems

def unchecked_exports(nb):
    "Public names and patched public methods that no check cell uses"
    cells = code_cells(nb)
    names = {
        name for src in cells if is_export(src) and directive(src, 'exporti') is None
        for name in public_names(src)}
    checked = set().union(*(used_names(src) for src in cells if is_check(src)))
    def used(name):
        owner, _, member = name.rpartition('.')
        # a callback's events run when the callback is used
        return (owner if EVENT.match(member) else member) in checked
    return [
        f'{name}: no check cell names it' for name in sorted(names) if not used(name)]

def public_names(src):
    "Names that a cell exports; a method added with @patch as Class.method"
    for node in parse(src).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [qualified(node)]
        elif isinstance(node, ast.Assign):
            names = [
                n.id for t in node.targets for n in ast.walk(t)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        else:
            continue
        yield from (n for n in names if not n.split('.')[-1].startswith('_'))

def qualified(node):
    "Name of a function or class; Class.method for one that @patch adds to a class"
    patched = any(ast.unparse(d).startswith('patch') for d in node.decorator_list)
    first = node.args.args[0].annotation if patched and node.args.args else None
    return (ast.unparse(first) + '.' if first else '') + node.name

def is_check(src):
    "Does the cell run a check? Comments and skipped cells do not count"
    if is_export(src) or directive(src, 'eval') == 'false': return False
    return any(
        isinstance(n, ast.Assert) or isinstance(n, ast.Call)
        and CHECK_CALL.fullmatch(ast.unparse(n.func).split('.')[-1])
        for n in ast.walk(parse(src)))

def used_names(src):
    return {
        getattr(n, 'id', None) or getattr(n, 'attr', None) for n in ast.walk(parse(src))
        if isinstance(n, (ast.Name, ast.Attribute))}


LONGEST = 88   # characters of a line of code, wherever it stands
_NUMBER = re.compile(r'(?<![\w-])[Cc]hapters? \d+(?!\d| of\b)')

def long_lines(source):
    """Lines of code that a page cannot show in one piece; nbdev's directives do not
    count"""
    return [f'{len(line)} characters: {line.strip()[:60]}…'
            for line in source.splitlines()
            if len(line) > LONGEST and not line.startswith('#|')]

def long_module(source, most=250):
    "Is a module longer than a person reads in one go? nbdev's own lines do not count"
    n = sum(not line.startswith(('#|', '# %%')) for line in source.splitlines())
    return [f'{n} lines; a module has at most {most}: what second idea is in it?'
            ]*(n > most)

def long_code(nb):
    "Over-long lines in the code cells of a notebook"
    return [f'cell {i}: {line}' for i, cell in enumerate(nb['cells'])
            if cell['cell_type'] == 'code'
            for line in long_lines(''.join(cell['source']))]

def typed_numbers(nb):
    """Chapters named by a number that is not the label of a link: in prose a link says
    it (its label follows the file), code names the topic"""
    return [f'cell {i}: {found[0]}' for i, cell in enumerate(nb['cells'])
            for found in _NUMBER.finditer(without_labels(''.join(cell['source'])))]

def without_labels(text):
    "A text without the labels of its links to chapters"
    return re.sub(r'\[[^\]]*\](?=\(\d\d_\w+\.ipynb)', '[]', text)

def wrong_labels(root):
    "Files in which a link's number is not its chapter's: nntrain_renumber mends them"
    from nntrain.renumber import renumber
    return [f'{path.relative_to(root)}: run nntrain_renumber'
            for path in renumber(root, {}, check=True)]


# ---- the package ---------------------------------------------------------------------

_IMPORT = '''
import importlib, json, sys
sys.path.insert(0, '.')
import torch
problems, heavy = [], set(json.loads(sys.argv[2]))
for name in json.loads(sys.argv[1]):
    ours = [m for m in sys.modules if m == 'nntrain' or m.startswith('nntrain.')]
    for old in ours: del sys.modules[old]  # each one alone
    try: importlib.import_module('nntrain.' + name)
    except BaseException as e:
        problems.append(f'import nntrain.{name}: {type(e).__name__}: {e}')
    light = name in ('learner', 'data', 'figures', 'results', 'tools', 'site')
    if light and (loaded := heavy & set(sys.modules)):
        problems.append(f'import nntrain.{name} loads {sorted(loaded)}: '
                        'import it where it is used')
        heavy -= set(sys.modules)
print(json.dumps(problems))
'''

def bad_imports(root):
    "Modules that cannot be imported alone, and light ones that load heavy packages"
    first = 'learner', 'data', 'figures', 'results', 'tools', 'site'
    modules = sorted(
        (p.stem for p in (root / 'nntrain').glob('*.py') if not p.stem.startswith('_')),
        key=lambda m: (m not in first, m))
    done = run(root, '-c', _IMPORT, json.dumps(modules), json.dumps(HEAVY))
    return (
        json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0
        else [done.stderr.strip()[-500:]])

def lint(root):
    "What ruff's `RULES` find in the package; for F811 see `defined_twice`"
    done = run(
        root, 'ruff', 'check', '--isolated', '--no-cache', '--select', RULES,
        '--ignore', 'F811', '--output-format', 'concise', 'nntrain')
    return (
        [line for line in done.stdout.splitlines() if re.search(r':\d+:\d+: ', line)]
        or [done.stdout + done.stderr] if done.returncode else [])

def defined_twice(path):
    """Functions and classes that a module defines again. Ruff's F811 takes methods of
    one name that @patch adds to two classes for one"""
    seen, problems = set(), []
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = qualified(node)
            if name in seen:
                problems.append(f'{path.name}:{node.lineno}: {name} is defined again')
            seen.add(name)
    return problems

def fragile_fastcore(nb):
    """Names that exported code takes from fastcore and that may be missing in another
    line of it"""
    return [
        f'fastcore.{a.name}: use one of {sorted(FASTCORE)} or the standard library'
        for src in code_cells(nb) if is_export(src) for node in ast.walk(parse(src))
        if isinstance(node, ast.ImportFrom)
        and (node.module or '').split('.')[0] == 'fastcore' for a in node.names
        if a.name not in FASTCORE]

def misnamed_callbacks(nb):
    "Exported callbacks whose name does not say that they are one"
    return [
        f'{node.name} is a callback: {node.name}CB' for src in code_cells(nb)
        if is_export(src) for node in parse(src).body if isinstance(node, ast.ClassDef)
        and not node.name.endswith('CB')
        and any(re.search(r'(Callback|CB)$', ast.unparse(base)) for base in node.bases)]

def sneaky_calls(nb):
    "Exported code that reads the names or frames of its caller"
    return [
        f'{ast.unparse(node)}: pass in what is needed' for src in code_cells(nb)
        if is_export(src) for node in ast.walk(parse(src))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SNEAKY]

def wrong_versions(root, installed=None):
    "Places where the version differs from settings.ini"
    version = settings(root)['version']
    found = {
        'nntrain/__init__.py': re.findall(
            r'__version__ = "(.+)"',
            (root / 'nntrain/__init__.py').read_text(encoding='utf-8')),
        'CHANGELOG.md': re.findall(
            r'^## (\d\S*)', (root / 'CHANGELOG.md').read_text(encoding='utf-8'), re.M
        )[:1],
    }
    if installed: found['the installed package'] = [installed]
    return [
        f"{place} says {' '.join(v) or 'nothing'}, settings.ini {version}"
        for place, v in found.items() if v != [version]]

def bad_result(path):
    "What is wrong with one row of results/"
    try: row = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e: return [f'{path.name}: no JSON: {e}']
    needed = {
        'experiment', 'metric', 'unit', 'values', 'mean', 'se', 'n', 'seeds', 'split',
        'source', 'seconds', 'hardware', 'versions', 'date'}
    if not isinstance(row, dict) or needed - set(row):
        return [
            f'{path.name}: lacks '
            f'{sorted(needed - set(row if isinstance(row, dict) else ()))}']
    def bad_date():
        try: date.fromisoformat(row['date'])
        except (TypeError, ValueError): return True
    n, values, problems = row['n'], row['values'], []
    if row['experiment'] != path.stem: problems.append(f"is named {row['experiment']}")
    if not values or len(values) != n or len(set(row['seeds'])) != n:
        problems.append(
            f"n={n}, but {len(values)} values and {len(set(row['seeds']))} seeds")
    elif not all(map(math.isfinite, values)):
        problems.append(f'values {values} are not all finite')
    else:
        mean = sum(values) / n
        se = (
            (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5 if n > 1
            else None)
        if not math.isclose(row['mean'], mean, rel_tol=1e-6):
            problems.append(f"mean {row['mean']} is not that of the values, {mean}")
        if (
            (se is None) != (row['se'] is None)
            or se is not None
            and not math.isclose(row['se'], se, rel_tol=1e-6, abs_tol=1e-12)
        ):
            problems.append(f"se {row['se']} is not that of the values, {se}")
    if row['source'] not in ('real', 'toy'):
        problems.append(f"source {row['source']!r} is neither real nor toy")
    if not row['seconds'] >= 0: problems.append(f"seconds {row['seconds']}")
    problems += [
        f'{key} is empty' for key in ('metric', 'split', 'hardware') if not row[key]]
    if not {'python', 'torch'} <= set(row['versions']):
        problems.append('versions lack python or torch')
    if bad_date(): problems.append(f"date {row['date']!r} is not YYYY-MM-DD")
    return [f'{path.name}: {p}' for p in problems]


# ---- repository and texts ------------------------------------------------------------

def tracked_artefacts(root):
    "Files in git that .gitignore keeps out"
    return [
        f'{name} is ignored, but tracked'
        for name in git(
            root, 'ls-files', '--cached', '--ignored', '--exclude-standard'
        ).splitlines()
    ]

def machine_paths(files):
    "Files that name a folder of one machine"
    return [
        f'{f.name}: machine path {found[0]}'
        for f in files
        if (
            found := MACHINE_PATH.search(
                f.read_text(encoding='utf-8', errors='replace')))
    ]

def dead_links(page):
    "Relative links and images of a Markdown page that lead nowhere"
    text = re.sub(
        r'^```.*?^```', '', page.read_text(encoding='utf-8'), flags=re.M | re.S)
    targets = re.findall(r'\]\(<?([^)>\s]+)', text) + re.findall(
        r'(?:src|href)="([^"]+)"', text)
    return [
        f'{page.name} links to {t}, which is not there'
        for t in targets
        if not re.match(r'[a-z]+:|#', t)
        and not (page.parent / t.split('#')[0]).exists()
    ]

def foreign_home(files, user, repo):
    "Links to a home of this project other than the one in settings.ini"
    home = re.compile(
        r'(?:(?:github|githubusercontent)\.com|colab\.research\.google\.com/github)'
        rf'/([\w.-]+)/{repo}\b|\b([\w-]+)\.github\.io/{repo}\b'
    )
    return [
        f'{f.name}: {m[0]} (settings.ini says {user})' for f in files
        for m in home.finditer(f.read_text(encoding='utf-8', errors='replace'))
        if (m[1] or m[2]) != user]

def bad_workflow(text):
    "What is wrong with a GitHub workflow"
    try: flow = yaml.safe_load(text)
    except yaml.YAMLError as e: return [f'no YAML: {e}']
    if not isinstance(flow, dict): return ['no mapping']
    problems = [
        f'lacks {key}'
        for key, there in (
            ('name', 'name' in flow),
            ('on', True in flow),
            ('jobs', flow.get('jobs')),
            ('permissions', 'permissions' in flow),
        )
        if not there
    ]
    for name, job in (flow.get('jobs') or {}).items():
        problems += [
            f'job {name} lacks {key}' for key in ('runs-on', 'steps', 'timeout-minutes')
            if not job.get(key)]
        for step in job.get('steps', ()):
            if ('uses' in step) == ('run' in step):
                problems.append(
                    f'job {name}: a step must either use or run something: {step}')
            if 'uses' in step and '@' not in step['uses']:
                problems.append(f"job {name}: {step['uses']} names no version")
    return problems
