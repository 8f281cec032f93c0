"""Each notebook alone, in a real Jupyter kernel, from an installed wheel, outside the
repository: as in Colab.

The set-up cells also run where nntrain is missing, with a stand-in for pip that
installs the wheel and writes down what it was asked for. Not covered: Colab itself, and
the network that it installs from."""
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import nbformat
import pytest
from conftest import ROOT, made_once, notebook, write_notebook
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))


def python(venv):
    return venv / ('Scripts/python.exe' if sys.platform == 'win32' else 'bin/python')


@pytest.fixture(scope='session')
def installed(tmp_path_factory):
    "A fresh environment with the wheel in it, one for all workers"
    return made_once(tmp_path_factory, 'elsewhere', install)


def install(top):
    "Everything but the wheel comes from the environment that runs the tests"
    from project_checks import run
    source = top/'source'
    skip = shutil.ignore_patterns(
        '.*', '__pycache__', 'build', '*.egg-info', '_proc', '_docs', 'tests',
        'node_modules', 'venv')  # '.*': caches, which other workers change
    shutil.copytree(ROOT, source, ignore=skip)
    done = run(
        source, 'pip', 'wheel', '.', '--no-deps', '--no-build-isolation', '-q', '-w',
        top / 'dist')
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.unpack_archive(wheel(top), environment(top/'venv'), 'zip')
    environment(top / 'bare/venv')  # the same, without nntrain
    shutil.rmtree(source)


def wheel(installed): return next((installed/'dist').glob('*.whl'))


def environment(venv):
    """A fresh environment; what it lacks comes from the one that runs the tests -> its
    folder of packages"""
    import sysconfig
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv], check=True)
    (site,) = (
        venv.glob('lib/python*/site-packages') if sys.platform != 'win32'
        else [venv / 'Lib/site-packages'])
    (site / 'parent.pth').write_text(
        sysconfig.get_paths()['purelib'])  # behind its own packages on the path
    return site


def execute(venv, path, where, **more):
    """Run a notebook in a kernel of the environment `venv`, with `where` as its folder;
    a cell that fails is an error"""
    env = {
        k: v for k, v in os.environ.items()
        if k not in ('PYTHONPATH', 'IN_TEST', 'NNTRAIN_RECORD')}
    env |= {
        'NNTRAIN_BUDGET': 'quick', 'OMP_NUM_THREADS': '1', 'JUPYTER_PLATFORM_DIRS': '1',
        **more}
    # a short path: the names of sockets may not be long
    with tempfile.TemporaryDirectory() as sockets:
        km = KernelManager(
            transport='ipc' if sys.platform != 'win32' else 'tcp',
            connection_file=f'{sockets}/k.json')
        km.kernel_spec.argv[0] = str(python(venv))
        client = NotebookClient(nbformat.read(path, as_version=4), km=km, timeout=300,
                                resources={'metadata': {'path': str(where)}})
        try: client.execute(env=env)
        finally:                        # the client leaves a manager of ours alone, and
            if km.has_kernel: km.shutdown_kernel(now=True)   # 30 kernels fill a memory


def write(path, *sources):
    "A notebook with these cells of code"
    write_notebook(path, notebook(*sources))


def test_the_wheel_is_what_runs(installed, tmp_path):
    write(
        tmp_path / 'where.ipynb',
        "import nntrain, os, sys\nassert 'elsewhere' in nntrain.__file__, "
        "nntrain.__file__\n"
        "assert 'elsewhere' in sys.prefix and os.getcwd() == "
        f"{os.path.realpath(tmp_path)!r}")
    execute(installed/'venv', tmp_path/'where.ipynb', tmp_path)
    write(tmp_path / 'fails.ipynb', 'assert 1 == 2')  # and a failing cell is noticed
    with pytest.raises(CellExecutionError, match='AssertionError'):
        execute(installed/'venv', tmp_path/'fails.ipynb', tmp_path)


# ---- set-up cells, where something is missing ----------------------------------------

PIP = '''
import json, os, shutil, sys, sysconfig
with open('asked.jsonl', 'a') as f: print(json.dumps(sys.argv[1:]), file=f)
if 'nntrain' in sys.argv[-1]:
    where = sysconfig.get_paths()['purelib']
    shutil.unpack_archive(os.environ['WHEEL'], where, 'zip')
'''

HIDE = """import importlib.util as u
real, asked = u.find_spec, []
def find_spec(name, *args):
    first = not asked and name == 'accelerate'
    if first: asked.append(name)
    return None if first else real(name, *args)
u.find_spec = find_spec"""


def setup_cells(path):
    cells = [
        ''.join(c['source'])
        for c in json.loads(path.read_text(encoding='utf-8'))['cells']
        if c['cell_type'] == 'code']
    return [c for c in cells if re.search(r'^\s+%pip ', c, re.M)]


def asked(installed, where, *sources):
    "Run cells where nntrain is missing -> what pip was asked for"
    (where/'pip').mkdir()
    (where/'pip/__init__.py').write_text('')
    (where / 'pip/__main__.py').write_text(PIP)  # `python -m pip` looks here first
    write(where/'setup.ipynb', *sources)
    (where/'asked.jsonl').write_text('')
    site = next((installed/'bare/venv').rglob('parent.pth')).parent
    for p in site.glob('nntrain*'): shutil.rmtree(p)
    execute(
        installed / 'bare/venv', where / 'setup.ipynb', where,
        WHEEL=str(wheel(installed)))
    return [json.loads(line) for line in (where/'asked.jsonl').read_text().splitlines()]


def test_setup_cell_installs_only_what_is_missing(installed, tmp_path):
    from nntrain.tools import _settings
    cells = {c for p in NOTEBOOKS if p.stem != 'index' for c in setup_cells(p)}
    first = next(c for c in cells if 'import nntrain' in c)
    assert len(cells) == 2, (
        f'other set-up cells than the common one and the one of chapter 11c: {cells}')
    there = "import nntrain, sys\nassert 'bare' in nntrain.__file__, nntrain.__file__"
    assert asked(installed, tmp_path, first, there, first) == [
        ['install', '-q', 'git+' + _settings(ROOT)['git_url']]]


def test_setup_cell_of_an_extra(installed, tmp_path):
    cells = setup_cells(ROOT/'nbs/18_distributed.ipynb')
    assert len(cells) == 2
    assert asked(installed, tmp_path, cells[1], HIDE, cells[1]) == [
        ['install', '-q', 'accelerate>=1']]  # asked for only when missing


def needs(wheel):
    "Names and versions that the wheel asks for, extras left out"
    from zipfile import ZipFile
    with ZipFile(wheel) as z:
        meta = email.message_from_bytes(
            z.read(next(n for n in z.namelist() if n.endswith('METADATA'))))
    return dict(
        re.match(r'([\w.-]+)\s*\(?([^;)]*)', r).groups()
        for r in meta.get_all('Requires-Dist') if 'extra ==' not in r)


def test_an_installed_torch_is_kept(installed):
    found = needs(wheel(installed))
    bounds = {name: found[name] for name in ('torch', 'torchvision', 'numpy')}
    assert all(re.fullmatch(r'(>=[\d.]+)?', b) for b in bounds.values()), (
        f'pip would replace what Colab brings: {bounds}')
    python_ = [
        python(installed / 'bare/venv'), '-m', 'pip', 'install', '--dry-run',
        '--no-index', '--report', '-', '-q', '--disable-pip-version-check']
    done = subprocess.run(
        [*python_, wheel(installed)], cwd=installed, capture_output=True, text=True)
    # nothing is missing here, so nobody is asked
    assert done.returncode == 0, done.stderr
    assert {r['metadata']['name'] for r in json.loads(done.stdout)['install']} <= {
        'nntrain'}, 'pip would touch more than nntrain'
    assert (
        subprocess.run(
            [*python_, wheel(installed), 'torch>=99'], cwd=installed,
            capture_output=True).returncode
        != 0
    )  # and a torch that is too old is noticed


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_alone(installed, path, tmp_path):
    shutil.copy(path, tmp_path)
    execute(installed/'venv', tmp_path/path.name, tmp_path)
