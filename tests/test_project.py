"""The project as a whole: package in step with notebooks, notebooks clean, imports
forward, texts true. Every check is fed a bad sample, too."""
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from zipfile import ZipFile

import conftest
import project_checks as checks
import pytest
from conftest import ROOT, notebook, write_notebook

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
RESULTS = sorted((ROOT/'results').glob('*.json'))
WORKFLOWS = sorted((ROOT/'.github/workflows').glob('*.yml'))
TEST_COMMAND = "pip install -e '.[dev]' && nbdev_test && pytest"

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)


def ok(problems): assert not problems, '\n' + '\n'.join(problems)

def read(path): return json.loads(path.read_text(encoding='utf-8'))


# ---- the project ---------------------------------------------------------------------

def test_package_in_step_with_notebooks(root, tmp_path):
    ok(checks.out_of_step(root, tmp_path))

def test_notebooks_clean(root, tmp_path): ok(checks.not_clean(root, tmp_path))

def test_imports_strictly_forward(root): ok(checks.backward_imports(root))

@each_notebook
def test_notebook_tidy(path): ok(checks.untidy(read(path), path.stat().st_size))

@each_notebook
def test_every_export_checked(path): ok(checks.unchecked_exports(read(path)))

# the package is what the notebooks export, and lists of names that nbdev writes
CODE = [p for folder in ('tests', 'benchmarks', 'scripts')
        for p in sorted((ROOT/folder).glob('*.py'))]

@each_notebook
def test_titles_of_folds_cite_nothing(path):
    # Quarto takes what follows an @ for a source
    lines = [line for cell in read(path)['cells']
             for line in ''.join(cell['source']).split('\n')]
    ok([line for line in lines if line.startswith('#| code-summary') and '@' in line])

@each_notebook
def test_lines_of_code_fit_a_page(path): ok(checks.long_code(read(path)))

@pytest.mark.parametrize('path', CODE, ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_lines_fit_a_page(path):
    ok(checks.long_lines(path.read_text(encoding='utf-8')))

@pytest.mark.parametrize('path', [p for p in sorted((ROOT/'nntrain').glob('*.py'))
                                  if p.stem != '_modidx'], ids=lambda p: p.stem)
def test_modules_are_short(path):
    ok(checks.long_module(path.read_text(encoding='utf-8')))

def test_a_long_module_is_found():
    assert not checks.long_module('x = 1\n'*250 + '#| export\n# %% cell\n')
    assert checks.long_module('x = 1\n'*251)

@each_notebook
def test_chapters_are_named_by_links(path): ok(checks.typed_numbers(read(path)))

def test_labels_of_links_are_right(root): ok(checks.wrong_labels(root))

@each_notebook
def test_any_fastcore_will_do(path): ok(checks.fragile_fastcore(read(path)))

@each_notebook
def test_callbacks_are_named_so(path): ok(checks.misnamed_callbacks(read(path)))

@each_notebook
def test_exported_code_reads_no_frames(path): ok(checks.sneaky_calls(read(path)))

def test_modules_import_alone_and_light(root): ok(checks.bad_imports(root))

def test_no_undefined_or_unused_names(root): ok(checks.lint(root))

@pytest.mark.parametrize(
    'path', sorted((ROOT / 'nntrain').glob('[a-z]*.py')), ids=lambda p: p.stem)
def test_nothing_defined_twice(path):
    ok(checks.defined_twice(path))

def test_readme_and_setup_cells_in_step(root):
    done = checks.run(
        root, '-c', 'from nntrain.sync import nntrain_sync; nntrain_sync(check=True)')
    assert done.returncode == 0, done.stdout + done.stderr

def test_one_version(root):
    try: installed = version('nntrain')
    except PackageNotFoundError: installed = None
    ok(checks.wrong_versions(root, installed))

@pytest.mark.parametrize('path', RESULTS, ids=lambda p: p.stem)
def test_result_row(path): ok(checks.bad_result(path))

def test_no_artefact_in_git(root): ok(checks.tracked_artefacts(root))

def project_files(root):
    return [
        f for f in checks.project_files(root) if f.name != 'test_project.py'
    ]  # this file holds the bad samples

def test_no_machine_paths(root): ok(checks.machine_paths(project_files(root)))

@pytest.mark.parametrize(
    'name', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'benchmarks/README.md'])
def test_links_lead_to_files(root, name):
    ok(checks.dead_links(root / name))

def test_one_home(root):
    config = checks.settings(root)
    ok(checks.foreign_home(project_files(root), config['user'], config['repo']))

@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_workflow(path): ok(checks.bad_workflow(path.read_text(encoding='utf-8')))

def test_workflow_covers_every_python(root):
    wanted = re.findall(
        r'Python :: (3\.\d+)',
        subprocess.run(
            [sys.executable, 'setup.py', '--classifiers'], cwd=root,
            capture_output=True, text=True).stdout)
    matrix = checks.yaml.safe_load(
        (root / '.github/workflows/test.yml').read_text(encoding='utf-8')
    )['jobs']['test']['strategy']['matrix']
    assert (
        matrix['python-version'] == wanted
        and wanted[0] == checks.settings(root)['min_python'])
    assert matrix['torch'] == ['newest'] and matrix['include'] == [
        {'python-version': wanted[0], 'torch': 'oldest'}]

def test_oldest_torch_is_that_of_the_settings(root):
    "What `.ci/run --oldest` installs, and the lowest version that pip accepts"
    needs = checks.settings(root)['requirements'].split()
    (lowest,) = [r.removeprefix('torch>=') for r in needs if r.startswith('torch>=')]
    oldest = (root/'.ci/oldest.txt').read_text(encoding='utf-8').splitlines()
    assert f'torch=={lowest}.*' in oldest

@pytest.mark.skipif(sys.platform == 'win32', reason='a bash script')
def test_ci_runs_the_command_of_the_readme(root):
    assert TEST_COMMAND in (root/'README.md').read_text(encoding='utf-8')
    shown = subprocess.run(
        ['bash', '.ci/run', '--show'], cwd=root, capture_output=True, text=True)
    assert shown.stdout.strip() == TEST_COMMAND, shown.stderr


def test_wheel_carries_results_and_licence(root, tmp_path):
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(root / name, tmp_path)
    for name in ('nntrain', 'results'):
        shutil.copytree(
            root / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path/'results/probe.json').write_text('{}')
    stale = tmp_path/'build/lib/nntrain/results'
    stale.mkdir(parents=True), (stale/'stale.json').write_text('{}')
    done = checks.run(
        tmp_path, 'pip', 'wheel', '.', '--no-deps', '--no-build-isolation', '-w', 'dist'
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = set(ZipFile(next((tmp_path/'dist').glob('*.whl'))).namelist())
    packed = {n.split('/')[-1] for n in names if n.startswith('nntrain/results/')}
    assert packed == {p.name for p in (tmp_path/'results').rglob('*.json')}
    assert {n.name for n in (root / 'nntrain').glob('*.py')} == {
        n.split('/')[1] for n in names if re.fullmatch(r'nntrain/\w+\.py', n)}
    assert any(n.endswith('/LICENSE') for n in names)


PRETEND = dict(  # commands of an environment
    python='',
    pip='test "$*" = "install -e .[dev]" && cat "${PIP_CONSTRAINT:-/dev/null}"',
    pytest='echo NNTRAIN_DATA=${NNTRAIN_DATA:-none} CI=$CI OMP=$OMP_NUM_THREADS; echo '
    '3 passed',
)


@pytest.fixture
def ci(root, tmp_path):
    """ci(*arguments, nbdev_test=…): `.ci/run` in a small repository, with an
    environment whose commands only pretend"""
    top, venv = tmp_path/'top', tmp_path/'venv'
    (top/'.ci').mkdir(parents=True), (venv/'bin').mkdir(parents=True)
    for name in ('.ci/run', '.ci/oldest.txt', 'settings.ini'):
        shutil.copy(root / name, top / name)
    (top/'README.md').write_text(f'# x\n\n```sh\n{TEST_COMMAND}\n```\n')
    for args in (['init', '-q'], ['add', '.']):
        subprocess.run(['git', '-C', top, *args], check=True)
    (venv/'bin/activate').write_text(f'PATH="{venv}/bin:$PATH"')
    unset = 'NNTRAIN_DATA', 'PIP_CONSTRAINT', 'OMP_NUM_THREADS'
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env |= dict(NNTRAIN_CI_VENV=str(venv), TMPDIR=str(tmp_path))

    def run(*arguments, nbdev_test='echo fine'):
        for name, body in (PRETEND | dict(nbdev_test=nbdev_test)).items():
            (venv/'bin'/name).write_text(f'#!/bin/sh\n{body}\n')
            (venv/'bin'/name).chmod(0o755)
        done = subprocess.run(
            [top / '.ci/run', *arguments], env=env, capture_output=True, text=True)
        assert {p.name for p in tmp_path.iterdir()} == {
            'top', 'venv'}  # nothing temporary is left
        return done.returncode, done.stdout + done.stderr
    return run


@pytest.mark.skipif(sys.platform == 'win32', reason='a bash script')
@pytest.mark.parametrize('nbdev_test, expected, said', [
    ('echo fine', 0, 'fine\nNNTRAIN_DATA=none CI=true OMP=1\n3 passed\n'),
    ('exit 3', 3, ''),
    ('echo spoilt >> settings.ini', 1, 'changed the checkout'),
])
def test_ci_stops_at_the_first_failure(ci, nbdev_test, expected, said):
    status, text = ci(nbdev_test=nbdev_test)
    assert status == expected, text
    assert said in text and ('3 passed' in text) == (expected < 3)


@pytest.mark.skipif(sys.platform == 'win32', reason='a bash script')
def test_ci_with_the_oldest_versions(ci):
    status, text = ci('--oldest')
    assert status == 0 and 'torch==' in text and text.endswith('3 passed\n'), text
    assert 'torch==' not in ci()[1]
    status, text = ci('--odlest')
    assert status == 2 and 'unknown option --odlest' in text and 'passed' not in text


# ---- the tests in parallel -----------------------------------------------------------

@pytest.mark.parametrize('cores, given, workers', [
    (1, {}, 2), (2, {}, 2), (64, {}, 4), (2, dict(args=['tests']), 2),
    (2, dict(args=['tests/test_map.py']), 0),
    (2, dict(args=['tests/test_map.py::test_map_is_true']), 0),
    (2, dict(keyword='map'), 0), (2, dict(markexpr='slow'), 0), (2, dict(lf=True), 0),
])
def test_a_choice_of_the_tests_starts_no_workers(monkeypatch, cores, given, workers):
    monkeypatch.setattr(
        os, 'sched_getaffinity', lambda pid: set(range(cores)), raising=False)
    option = SimpleNamespace(**dict(keyword='', markexpr='', lf=False) | given)
    config = SimpleNamespace(args=given.get('args', ['tests']), option=option)
    assert conftest.pytest_xdist_auto_num_workers(config) == workers

WHO = """
import os, sys, pytest
from pathlib import Path
from conftest import made_once

@pytest.fixture(scope='session')
def shared(tmp_path_factory):
    def make(folder): (folder/f"made by {os.environ['PYTEST_XDIST_WORKER']}").touch()
    return made_once(tmp_path_factory, 'shared', make)

def note(name):
    worker = os.environ['PYTEST_XDIST_WORKER']
    with open(Path(__file__).parent/f'{name}.{worker}', 'a') as f: f.write('x')

def test_one(shared):
    assert os.environ['OMP_NUM_THREADS'] == '1' and 'torch' not in sys.modules
    assert len(list(shared.iterdir())) == 1
    note(Path(__file__).stem)
test_two = test_three = test_four = test_one

@pytest.mark.parametrize('n', range(4))
def test_notebook_runs_alone(n): note('alone')
"""

def test_workers_take_whole_files(root, tmp_path, monkeypatch):
    "Three files and four notebooks for two workers; what is dear is made once for both"
    monkeypatch.setenv('PYTEST_DISABLE_PLUGIN_AUTOLOAD', '1')   # they start at once
    (tmp_path/'tests').mkdir()
    shutil.copy(root/'pyproject.toml', tmp_path)
    shutil.copy(root/'tests/conftest.py', tmp_path/'tests')
    for name in 'abc': (tmp_path/f'tests/test_{name}.py').write_text(WHO)
    done = checks.run(tmp_path, 'pytest', '-v', '-n', '2', '-p', 'xdist.plugin')
    assert done.returncode == 0 and '24 passed in' in done.stdout.splitlines()[-1], (
        done.stdout)
    notes = {p.name: len(p.read_text()) for p in (tmp_path/'tests').glob('*.gw*')}
    files = {name: n for name, n in notes.items() if name.startswith('test_')}
    assert len(files) == 3 and set(files.values()) == {4}, notes
    assert sum(n for name, n in notes.items() if name.startswith('alone')) == 12
    begun = min(done.stdout.index(f'test_{name}.py::test_one') for name in 'abc')
    assert begun < done.stdout.index('runs_alone')         # which begin later
    assert '@' not in done.stdout.split('[gw', 1)[1], (
        'names of tests that cannot be given to pytest')


# ---- every check can fail ------------------------------------------------------------

def edit(path, old, new):
    text = path.read_text(encoding='utf-8')
    assert old in text
    path.write_text(text.replace(old, new), encoding='utf-8')

def test_in_step_passes_then_names_the_module(mini, tmp_path_factory):
    ok(checks.out_of_step(mini, tmp_path_factory.mktemp('a')))
    edit(mini/'nntrain/two.py', 'inc(inc(x))', 'x + 2')
    (mini/'nntrain/stray.py').write_text('')
    (mini/'nntrain/one.py').unlink()
    found = '\n'.join(checks.out_of_step(mini, tmp_path_factory.mktemp('b')))
    assert (
        'two.py differs' in found and 'stray.py comes from no notebook' in found
        and 'one.py is missing' in found)

def test_clean_passes_then_names_the_notebook(mini, tmp_path_factory):
    ok(checks.not_clean(mini, tmp_path_factory.mktemp('a')))
    edit(mini/'nbs/02_two.ipynb', '"execution_count": null', '"execution_count": 7')
    assert checks.not_clean(mini, tmp_path_factory.mktemp('b')) == [
        'nbs/02_two.ipynb is not clean: run nbdev_clean']

@pytest.mark.parametrize(
    'src, problem',
    [
        (
            '#| export\ndef f():\n    from nntrain.two import inc2',
            'nntrain.two of chapter 02',
        ),
        ('#| export\nimport nntrain.two as t', 'nntrain.two of chapter 02'),
        ('#| export\nfrom nntrain import two', 'nntrain.two of chapter 02'),
        ('#| exporti\nfrom .two import inc2', 'nntrain.two of chapter 02'),
        ('#| export\nfrom nntrain.one import inc', 'nntrain.one imports itself'),
        ('#| export\nfrom nntrain.nowhere import inc', 'which no chapter exports'),
        ('%matplotlib inline\nfrom nntrain.two import inc2', 'later chapter 02'),
    ],
)
def test_backward_import_is_found(mini, src, problem):
    ok(checks.backward_imports(mini))
    write_notebook(mini/'nbs/01_one.ipynb', notebook('#| default_exp one', src))
    assert problem in ' '.join(checks.backward_imports(mini))

def test_long_lines_are_found():
    long = 'x = ' + '1'*85
    cell = dict(cell_type='code', source=['#| fig-alt: ' + 'a'*99 + '\n', long])
    found = checks.long_code(dict(cells=[cell]))
    assert found == [f'cell 0: 89 characters: {long[:60]}…']

@pytest.mark.parametrize('text, found', [
    ('see [chapter 3](03_data.ipynb#a) and [4](04_learner.ipynb)', []),
    ('[d2l, chapter 12 of the book](https://d2l.ai)', []),
    ('as in chapter 12', ['cell 0: chapter 12']),
    ('# Chapters 2 and 3 do it', ['cell 0: Chapters 2']),
])
def test_typed_numbers_are_found(text, found):
    nb = dict(cells=[dict(cell_type='markdown', source=[text])])
    assert checks.typed_numbers(nb) == found

def test_tools_import_no_chapter_but_serve_all(mini):
    tools, one = mini/'nbs/94_tools.ipynb', mini/'nbs/01_one.ipynb'
    own = '#| default_exp tools', '#| export\ndef tool(): ...'
    write_notebook(
        one, notebook('#| default_exp one', '#| export\nfrom nntrain.tools import tool')
    )
    write_notebook(tools, notebook(*own, 'from nntrain.two import inc2'))
    ok(checks.backward_imports(mini))
    write_notebook(tools, notebook(*own, '#| export\nfrom nntrain.one import inc'))
    assert 'may import no chapter' in checks.backward_imports(mini)[0]

def test_an_appendix_may_build_on_some_chapters(mini, monkeypatch):
    "As the tape on chapter 4: here on the first of two chapters"
    monkeypatch.setitem(checks.SHARED_FROM, '80_tape', 1)
    page, own = mini/'nbs/80_tape.ipynb', '#| default_exp tape'
    def problems(tape, first='', second=''):
        write_notebook(page, notebook(own, tape))
        write_notebook(mini/'nbs/01_one.ipynb', notebook(
            '#| default_exp one', '#| export\ndef inc(x): ...', first or 'inc(1)'))
        write_notebook(mini/'nbs/02_two.ipynb', notebook(
            '#| default_exp two', '#| export\ndef inc2(x): ...', second or 'inc2(1)'))
        return ' '.join(checks.backward_imports(mini))
    good = '#| export\nfrom nntrain.one import inc'
    cell = 'from nntrain.tape import roll'
    assert not problems(good, first=cell, second=f'#| export\n{cell}')
    late = problems('#| export\nfrom nntrain.two import inc2')
    assert 'nntrain.tape imports nntrain.two of chapter 02: not an earlier' in late
    both = problems(good, first=f'#| export\n{cell}')
    assert 'nntrain.one and nntrain.tape import each other' in both
    monkeypatch.setitem(checks.SHARED_FROM, '80_tape', 2)
    assert 'nntrain.tape of the later chapter 02' in problems(good, first=cell)

def test_modules_that_import_each_other_are_found(mini):
    cells = ('#| export early\ndef a(): ...',
             '#| export late\nfrom nntrain.early import a')
    page = mini/'nbs/03_three.ipynb'
    write_notebook(page, notebook(*cells))
    ok(checks.backward_imports(mini))
    back = '#| export early\nfrom nntrain.late import a'
    write_notebook(page, notebook(*cells, back))
    assert 'import each other' in checks.backward_imports(mini)[0]

def output(**data): return dict(output_type='display_data', metadata={}, data=data)
def stream(name, text): return dict(output_type='stream', name=name, text=[text])

@pytest.mark.parametrize(
    'nb, size, problem',
    [
        (notebook('1'), 600_000, 'over'),
        (notebook('1') | dict(metadata=dict(widgets={})), 0, 'widgets'),
        (notebook("open('/home/me/x')"), 0, '/home/me'),
        (notebook("# See\n\n`C:\\Users\\me`"), 0, 'Users'),
        (
            notebook('1', outputs=[stream('stdout', 'saved to /home/abc/model')]), 0,
            '/home/abc'),
        (
            notebook('1', outputs=[output(**{'text/html': ['<a href="/Users/x">']})]),
            0, '/Users/x'),
        (notebook('#| cuda\nnet.cuda()'), 0, 'without a GPU'),
        (notebook('1', outputs=[stream('stderr', 'UserWarning')]), 0, 'stderr'),
        (
            notebook(
                '1',
                outputs=[
                    dict(
                        output_type='error', ename='ValueError', evalue='', traceback=[]
                    )
                ],
            ),
            0,
            'stored error',
        ),
        (
            notebook(
                '1',
                outputs=[output(**{'application/vnd.jupyter.widget-view+json': {}})]),
            0,
            'widget',
        ),
        (
            notebook('# A\n\n::: {.callout-tip title="Hint"}\nb\n:::'),
            0,
            'a box of Quarto',
        ),
    ],
)
def test_untidy_notebook_is_found(nb, size, problem):
    found = checks.untidy(nb, size)
    assert len(found) == 1 and problem in found[0]

def test_tidy_notebook_passes():
    ok(
        checks.untidy(
            notebook(
                '# See https://x.org/home/me',
                '1',
                outputs=[stream('stdout', 'a/home/b 3/home/4')],
            )
        )
    )

@pytest.mark.parametrize(
    'cells, missing',
    [
        (['#| export\ndef f(): pass', 'assert f() is None'], []),
        (['#| export\ndef f(): pass', 'f()'], ['f']),
        (['#| export\ndef f(): pass', 'assert True  # f'], ['f']),
        (['#| export\ndef f(): pass', '#| eval: false\nassert f()'], ['f']),
        (['#| export\ndef f(): pass\nassert f'], ['f']),
        (['#| export\nA, B = 1, 2\ndef _g(): pass', 'test_eq(A, 1)'], ['B']),
        (
            [
                '#| export\nclass C: pass',
                '#| export\n@patch\ndef show(self:C): pass',
                'with expect_fail(): C()',
            ],
            ['C.show'],
        ),
        (
            [
                '#| export\n@patch\ndef show(self:C): pass',
                'torch.testing.assert_close(C().show(), 1)',
            ],
            [],
        ),
        (['#| exporti\ndef f(): pass'], []),
        (
            [
                '#| export\nclass CB: pass',
                '#| export\n@patch\ndef after_fit(self:CB): pass',
                'assert CB()',
            ],
            [],
        ),
    ],
)
def test_unchecked_export_is_found(cells, missing):
    assert [
        line.split(':')[0] for line in checks.unchecked_exports(notebook(*cells))
    ] == missing

def test_fragile_fastcore_is_found():
    nb = notebook(
        '#| export\nfrom fastcore.basics import patch\nfrom fastcore.script import '
        'Param, call_parse',
        'from fastcore.test import test_eq',
    )
    assert [line.split(':')[0] for line in checks.fragile_fastcore(nb)] == [
        'fastcore.Param']

def test_misnamed_callback_is_found():
    good = '#| export\nclass LogCB(Callback): pass\nclass Learner(Base): pass'
    bad = '#| export\nclass Log(Callback): pass\nclass More(bases.LogCB): pass'
    found = checks.misnamed_callbacks(notebook(good, bad, 'class Try(Callback): pass'))
    assert [line.split(' ')[0] for line in found] == ['Log', 'More']

def test_sneaky_call_is_found():
    nb = notebook(
        '#| export\ndef f(): return globals()["x"]',
        '#| export\nimport sys\ndef g(): return sys._getframe(1)',
        'globals()',
    )
    assert [line.split(':')[0] for line in checks.sneaky_calls(nb)] == [
        'globals()', 'sys._getframe(1)']

def test_one_id_for_two_cells_is_found():
    nb = notebook('# T', '1', '2')
    nb['cells'][2]['id'] = nb['cells'][1]['id']
    assert checks.untidy(nb) == ['2 cells have the id c1']

def test_bad_import_is_found(mini):
    (mini/'nntrain/learner.py').write_text('import matplotlib')
    (mini/'nntrain/one.py').write_text('import nntrain.gone')
    # nntrain.two imports nntrain.one: it fails for the same reason
    found = checks.bad_imports(mini)
    assert (
        len(found) == 3 and "nntrain.learner loads ['matplotlib'" in found[0]
        and 'import nntrain.one: ModuleNotFoundError' in found[1])

@pytest.mark.parametrize('old, new, rule', [
    ('inc(inc(x))', 'inc(unknown)', 'F821'), ('inc2(x)', 'inc2(x, memory=[])', 'B006'),
    ('return inc', 'x == 1; return inc', 'B015'),
])
def test_lint_finds_faults(mini, old, new, rule):
    edit(mini/'nntrain/two.py', old, new)
    assert rule in checks.lint(mini)[0]

def test_lint_finds_no_fault_in_good_code(mini): ok(checks.lint(mini))

def test_second_definition_is_found(tmp_path):
    (tmp_path / 'm.py').write_text(
        '@patch\ndef f(self:A): pass\n@patch\ndef f(self:B): pass\ndef f(): pass\n')
    ok(checks.defined_twice(tmp_path/'m.py'))
    (tmp_path / 'm.py').write_text(
        '@patch\ndef f(self:A): pass\n@patch\ndef f(self:A, x): pass\ndef g(): '
        'pass\nclass g: pass\n')
    assert checks.defined_twice(tmp_path / 'm.py') == [
        'm.py:4: A.f is defined again', 'm.py:6: g is defined again']

def test_wrong_version_is_found(mini):
    (mini/'CHANGELOG.md').write_text('## 0.0.9\n\n## 0.1.0\n')
    found = checks.wrong_versions(mini, installed='0.2.0')
    assert [line.split(' says ')[0] for line in found] == [
        'CHANGELOG.md', 'the installed package']

ROW = dict(
    experiment='row', metric='accuracy', unit='', values=[0.7, 0.8, 0.9], mean=0.8,
    se=0.1 / 3**0.5, n=3, seeds=[0, 1, 2], split='test', source='real', seconds=1.5,
    hardware='CPU', versions=dict(python='3.11', torch='2.6'), date='2026-01-31')

@pytest.mark.parametrize(
    'change, problem',
    [
        ({}, None), (dict(values=[0.8], mean=0.8, se=None, n=1, seeds=[4]), None),
        (dict(experiment='other'), 'is named'), (dict(mean=0.81), 'mean'),
        (dict(se=0.1), 'se'), (dict(n=2), 'n=2'), (dict(seeds=[0, 0, 1]), '2 seeds'),
        (dict(values=[0.7, float('nan'), 0.9]), 'finite'),
        (dict(source='hub'), 'source'), (dict(date='31.1.2026'), 'date'),
        (dict(versions={}), 'versions'), (dict(split=''), 'split'),
        (dict(seconds=-1), 'seconds')],
)
def test_bad_result_is_found(tmp_path, change, problem):
    (tmp_path/'row.json').write_text(json.dumps(ROW | change))
    found = checks.bad_result(tmp_path/'row.json')
    assert found == [] if problem is None else problem in found[0]

@pytest.mark.parametrize(
    'text, problem', [('{', 'no JSON'), ('[]', 'lacks'), ('{"n": 1}', 'lacks')])
def test_broken_result_is_found(tmp_path, text, problem):
    (tmp_path/'row.json').write_text(text)
    assert problem in checks.bad_result(tmp_path/'row.json')[0]

def test_tracked_artefact_is_found(mini):
    (mini/'.gitignore').write_text('runs/\n')
    (mini/'runs').mkdir()
    (mini/'runs/history.csv').write_text('')
    for args in (['init', '-q'], ['add', '.'], ['add', '-f', 'runs/history.csv']):
        subprocess.run(['git', '-C', mini, *args], check=True)
    assert checks.tracked_artefacts(mini) == [
        'runs/history.csv is ignored, but tracked']

@pytest.mark.parametrize(
    'text, n',
    [
        ('see [a](a.md), ![b](img/b.png#x), <img src="c.svg">, [d](<d.md>)', 4),
        ('[ok](page.md#top) [web](https://x.org) [here](#top)', 0),
        ('```\n[a](a.md)\n```', 0),
    ],
)
def test_dead_link_is_found(tmp_path, text, n):
    (tmp_path/'page.md').write_text(text)
    assert len(checks.dead_links(tmp_path/'page.md')) == n

@pytest.mark.parametrize(
    'text, n',
    [
        ('https://github.com/me/nntrain https://me.github.io/nntrain', 0),
        ('https://github.com/other/dataset', 0),
        ('git+https://github.com/you/nntrain.git', 1),
        (
            'https://colab.research.google.com/github/you/nntrain/blob/main/x.ipynb',
            1,
        ),
        ('https://you.github.io/nntrain/', 1),
    ],
)
def test_foreign_home_is_found(tmp_path, text, n):
    (tmp_path/'a.md').write_text(text)
    assert len(checks.foreign_home([tmp_path/'a.md'], 'me', 'nntrain')) == n

def test_machine_path_is_found(tmp_path):
    (
        (tmp_path / 'a.md').write_text('see https://x.org/home/a'),
        (tmp_path / 'b.md').write_text('in /Users/me/b'))
    assert checks.machine_paths([tmp_path / 'a.md', tmp_path / 'b.md']) == [
        'b.md: machine path /Users/me']

GOOD_FLOW = """name: x
on: push
permissions: {}
jobs:
  a:
    runs-on: u
    timeout-minutes: 5
    steps:
      - uses: actions/checkout@v4
      - run: ls
"""

@pytest.mark.parametrize(
    'old, new, problem',
    [
        ('', '', None), ('on: push', 'on: [push', 'no YAML'),
        ('on: push\n', '', 'lacks on'), ('@v4', '', 'names no version'),
        ('      - run: ls\n', '      - name: x\n', 'either use or run'),
        ('    timeout-minutes: 5\n', '', 'lacks timeout-minutes'),
        (GOOD_FLOW, 'text', 'no mapping')],
)
def test_bad_workflow_is_found(old, new, problem):
    assert old in GOOD_FLOW
    found = checks.bad_workflow(GOOD_FLOW.replace(old, new) if old else GOOD_FLOW)
    assert found == [] if problem is None else problem in found[0]
