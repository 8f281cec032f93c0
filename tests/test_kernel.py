"Each notebook alone, in a real Jupyter kernel, from an installed wheel, outside the repository: as in Colab"
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))


def python(venv): return venv/('Scripts/python.exe' if sys.platform == 'win32' else 'bin/python')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "A fresh environment with the wheel in it; everything else comes from the environment that runs the tests"
    import sysconfig
    from project_checks import run
    top = tmp_path_factory.mktemp('elsewhere')
    source = top/'source'
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns('.git', '__pycache__', 'build', '*.egg-info', 'runs', '_proc', '_docs', 'tests'))
    done = run(source, 'pip', 'wheel', '.', '--no-deps', '--no-build-isolation', '-q', '-w', top/'dist')
    assert done.returncode == 0, done.stdout + done.stderr
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', top/'venv'], check=True)
    (site,) = (top/'venv').glob('lib/python*/site-packages') if sys.platform != 'win32' else [top/'venv/Lib/site-packages']
    shutil.unpack_archive(next((top/'dist').glob('*.whl')), site, 'zip')
    (site/'parent.pth').write_text(sysconfig.get_paths()['purelib'])             # behind the wheel on the path
    shutil.rmtree(source)
    return top


CODE = '''
import sys, nbformat
from nbclient import NotebookClient
from jupyter_client import KernelManager
nb = nbformat.read(sys.argv[1], as_version=4)
km = KernelManager(transport='ipc' if sys.platform != 'win32' else 'tcp')
km.kernel_spec.argv[0] = sys.executable
NotebookClient(nb, km=km, timeout=300, resources={'metadata': {'path': '.'}}).execute()
'''


def execute(installed, path, where):
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'IN_TEST', 'NNTRAIN_RECORD')}
    env |= {'NNTRAIN_BUDGET': 'quick', 'OMP_NUM_THREADS': '1', 'JUPYTER_PLATFORM_DIRS': '1'}
    return subprocess.run([python(installed/'venv'), '-c', CODE, path], env=env, cwd=where, capture_output=True, text=True)


def test_the_wheel_is_what_runs(installed, tmp_path):
    nb = {'cells': [{'cell_type': 'code', 'id': 'a', 'metadata': {}, 'outputs': [], 'execution_count': None,
                     'source': "import nntrain\nassert 'elsewhere' in nntrain.__file__, nntrain.__file__"}],
          'metadata': {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}, 'nbformat': 4, 'nbformat_minor': 5}
    (tmp_path/'where.ipynb').write_text(json.dumps(nb))
    done = execute(installed, tmp_path/'where.ipynb', tmp_path)
    assert done.returncode == 0, done.stderr
    nb['cells'][0]['source'] = 'assert 1 == 2'                                   # and a failing cell is noticed
    (tmp_path/'fails.ipynb').write_text(json.dumps(nb))
    assert execute(installed, tmp_path/'fails.ipynb', tmp_path).returncode != 0


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_alone(installed, path, tmp_path):
    shutil.copy(path, tmp_path)
    done = execute(installed, tmp_path/path.name, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
