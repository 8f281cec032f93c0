import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def root():
    "Top folder of the project"
    return ROOT


def notebook(*sources, outputs=()):
    "A clean notebook: sources that start with `# ` or `> ` are prose, the others code; `outputs` belong to the last cell"
    cells = []
    for i, src in enumerate(sources):
        cell = dict(cell_type='markdown', id=f'c{i}', metadata={}, source=src.splitlines(True))
        if not src.startswith(('# ', '> ')): cell |= dict(cell_type='code', execution_count=None, outputs=[])
        cells.append(cell)
    if outputs: cells[-1]['outputs'] = list(outputs)
    return dict(cells=cells, metadata=dict(kernelspec=dict(display_name='python3', language='python', name='python3')), nbformat=4, nbformat_minor=5)


def write_notebook(path, nb):
    "Write as nbdev does"
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


@pytest.fixture(scope='session')
def exported(tmp_path_factory):
    "A project of two chapters, in step: made once"
    from project_checks import run
    top = tmp_path_factory.mktemp('mini')
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, top)
    (top/'nbs').mkdir(), (top/'nntrain').mkdir()
    shutil.copy(ROOT/'nntrain/__init__.py', top/'nntrain')
    write_notebook(top/'nbs/01_one.ipynb', notebook('# One\n\n> Adds one', '#| default_exp one', '#| export\ndef inc(x): return x + 1', 'assert inc(1) == 2'))
    write_notebook(top/'nbs/02_two.ipynb', notebook('# Two\n\n> Adds two', '#| default_exp two', '#| export\nfrom nntrain.one import inc',
                                                    '#| export\ndef inc2(x): return inc(inc(x))', 'assert inc2(1) == 3'))
    done = run(top, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    assert done.returncode == 0, done.stderr
    return top


@pytest.fixture
def mini(exported, tmp_path):
    "A copy of that project, free to be spoilt"
    return Path(shutil.copytree(exported, tmp_path/'mini'))
