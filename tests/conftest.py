import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, here or in a process that a test starts: the tensors of the
# tests are tiny, and threads that wait actively for each other take the cores from the
# other workers. A second thread is asked for where a test is about threads.
QUIET = dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', MPLBACKEND='agg')
for name, value in QUIET.items(): os.environ.setdefault(name, value)

ROOT = Path(__file__).resolve().parent.parent

# Generated examples may take long on a busy machine: that is no fault of the code
settings.register_profile('patient', deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('patient')


# ---- in parallel (pytest-xdist) ------------------------------------------------------

MAX_WORKERS = 4
SINGLE = (
    'test_notebook_runs_alone['  # each of these is handed out alone, behind the files
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    "What `-n auto` means: the whole suite in parallel, a choice of it in this process"
    option = config.option
    chosen = option.keyword or option.markexpr or getattr(option, 'lf', False)
    if chosen or any('.py' in arg for arg in config.args): return 0
    try: cores = len(os.sched_getaffinity(0))
    except AttributeError: cores = os.cpu_count() or 1
    # many tests only wait: two on one core, too
    return max(2, min(cores, MAX_WORKERS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "File by file, since the tests of a file share what is dear to make"
    from xdist.scheduler import LoadScopeScheduling

    class FileByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if SINGLE in nodeid else nodeid.split('::')[0]

    config.option.loadscopereorder = False   # the order below, not by number of tests
    return FileByFile(config, log)


def pytest_collection_modifyitems(items):
    "Small units of work come last: so the workers end at nearly the same time"
    # stable: otherwise as collected
    items.sort(key=lambda item: SINGLE in item.nodeid)


# ---- shared by the files of tests ----------------------------------------------------

@pytest.fixture(scope='session')
def root():
    "Top folder of the project"
    return ROOT


def notebook(*sources, outputs=()):
    """A clean notebook: sources that start with `# ` or `> ` are prose, the others
    code; `outputs` belong to the last cell"""
    cells = []
    for i, src in enumerate(sources):
        cell = dict(
            cell_type='markdown', id=f'c{i}', metadata={}, source=src.splitlines(True))
        if not src.startswith(('# ', '> ')):
            cell |= dict(cell_type='code', execution_count=None, outputs=[])
        cells.append(cell)
    if outputs: cells[-1]['outputs'] = list(outputs)
    return dict(
        cells=cells,
        metadata=dict(
            kernelspec=dict(display_name='python3', language='python', name='python3')),
        nbformat=4,
        nbformat_minor=5,
    )


def write_notebook(path, nb):
    "Write as nbdev does"
    path.write_text(
        json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n',
        encoding='utf-8')


def made_once(factory, name, make):
    """Folder that `make(folder)` fills for the worker that asks first; the others wait
    for it"""
    from filelock import FileLock   # comes with torch
    base = factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: base = base.parent   # all workers see it
    folder, ready = base/name, base/f'{name}.ready'
    with FileLock(f'{folder}.lock'):
        if not ready.exists():
            shutil.rmtree(folder, ignore_errors=True)   # left by a worker that failed
            folder.mkdir()
            make(folder)
            ready.touch()
    return folder


@pytest.fixture(scope='session')
def exported(tmp_path_factory):
    "A project of two chapters, in step: made once"
    from project_checks import run
    top = tmp_path_factory.mktemp('mini')
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, top)
    (top/'nbs').mkdir(), (top/'nntrain').mkdir()
    shutil.copy(ROOT/'nntrain/__init__.py', top/'nntrain')
    write_notebook(
        top / 'nbs/01_one.ipynb',
        notebook(
            '# One\n\n> Adds one',
            '#| default_exp one',
            '#| export\ndef inc(x): return x + 1',
            'assert inc(1) == 2',
        ),
    )
    write_notebook(
        top / 'nbs/02_two.ipynb',
        notebook(
            '# Two\n\n> Adds two',
            '#| default_exp two',
            '#| export\nfrom nntrain.one import inc',
            '#| export\ndef inc2(x): return inc(inc(x))',
            'assert inc2(1) == 3',
        ),
    )
    done = run(top, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    assert done.returncode == 0, done.stderr
    return top


@pytest.fixture
def mini(exported, tmp_path):
    "A copy of that project, free to be spoilt"
    return Path(shutil.copytree(exported, tmp_path/'mini'))
