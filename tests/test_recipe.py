"The command nntrain_fit as a process of its own"
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nntrain.recipe import nntrain_fit

COMMAND = [sys.executable, '-c', 'import sys; from nntrain.recipe import nntrain_fit; sys.exit(nntrain_fit())']


@pytest.fixture
def env(monkeypatch):
    monkeypatch.delenv('NNTRAIN_DATA', raising=False)
    return os.environ | {'NNTRAIN_BUDGET': 'quick', 'OMP_NUM_THREADS': '1'}


def test_a_run_and_its_folder(tmp_path, env):
    done = subprocess.run([*COMMAND, '--epochs', '2', '--model', 'mlp', '--out', str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'notice: ' in done.stdout and 'toy_fashion' in done.stdout           # no data, no network under the quick budget: it says so
    (run,) = tmp_path.iterdir()
    assert sorted(p.name for p in run.iterdir()) == ['checkpoint.pt', 'curves.png', 'history.csv', 'options.json']
    rows = list(csv.DictReader((run/'history.csv').open()))
    assert len(rows) == 2 and float(rows[1]['train_loss']) < float(rows[0]['train_loss'])
    assert (run/'curves.png').read_bytes()[:4] == b'\x89PNG'
    state = torch.load(run/'checkpoint.pt', weights_only=True)
    assert {'model', 'optimizer', 'random', 'facts'} <= set(state) and (state['epoch'], state['batch']) == (2, 0)


def test_schedule_and_augmentation(tmp_path, env):
    done = subprocess.run([*COMMAND, '--epochs', '1', '--model', 'resnet', '--augment', '--source', 'toy', '--out', str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'resnet, adamw, lr 0.01, one-cycle, augmented' in done.stdout
    (run,) = tmp_path.iterdir()
    options = json.loads((run/'options.json').read_text())
    assert (options['schedule'], options['augment'], options['lr']) == ('one-cycle', True, .01)
    (group,) = torch.load(run/'checkpoint.pt', weights_only=True)['optimizer']['param_groups']
    assert group['lr'] < 1e-4                                                   # the cycle went to its end


@pytest.mark.skipif(sys.platform == 'win32', reason='signals')
def test_ctrl_c_leaves_the_last_complete_epoch(tmp_path, env):
    process = subprocess.Popen([*COMMAND, '--epochs', '1000', '--model', 'mlp', '--source', 'toy', '--out', str(tmp_path)], env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))   # a runner in the background of a shell ignores Ctrl-C, and so would its children
    for _ in range(600):
        if list(tmp_path.glob('*/history.csv')): break
        time.sleep(.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    (run,) = tmp_path.iterdir()
    assert process.returncode == 130 and err.strip().splitlines()[-1].startswith('nntrain_fit: interrupted') and err.strip().endswith(f'nntrain_fit --resume {run}')
    rows, state = list(csv.DictReader((run/'history.csv').open())), torch.load(run/'checkpoint.pt', weights_only=True)
    assert abs(len(rows) - state['epoch']) <= 1 and len(rows) >= 1
    assert not [p for p in run.iterdir() if p.name.startswith('.')]             # nothing half-written lies around


@pytest.mark.parametrize('words, where, said', [
    ([], '', 'interrupted before the training began: there is nothing to go on with'),
    ([], 'runs/new', 'interrupted before the training began: there is nothing to go on with'),
    ([], 'runs/a b', "interrupted; runs/a b holds the last complete epoch, if there was one; go on with: nntrain_fit --resume 'runs/a b'"),
    (['--resume', 'old'], '', 'interrupted; old holds the last complete epoch, if there was one; go on with: nntrain_fit --resume old')])
def test_ctrl_c_names_a_folder_only_where_a_run_can_go_on(tmp_path, monkeypatch, capsys, words, where, said):
    monkeypatch.chdir(tmp_path)
    for folder in 'runs/a b', 'old': (tmp_path/folder).mkdir(parents=True); (tmp_path/folder/'options.json').write_text('{}')
    def stop(*args, **kwargs): raise KeyboardInterrupt(*[where]*bool(where))
    for name in ('train_fashion', 'resume_fashion'): monkeypatch.setattr(f'nntrain.recipe.{name}', stop)
    assert nntrain_fit(words) == 130
    assert capsys.readouterr().err.strip() == f'nntrain_fit: {said}'


@pytest.mark.parametrize('words, said', [
    (['--epochs', '0'], 'at least 1'), (['--batch-size', '-5'], 'at least 1'), (['--lr', 'nan'], 'finite number above 0'), (['--optimizer', 'adamm'], 'invalid choice'), (['--schedule', 'step'], 'invalid choice'),
    (['--device', 'cuda:99'], 'choose one of' if not torch.cuda.is_available() else 'cuda'), (['--source', 'local'], 'NNTRAIN_DATA'), (['extra'], 'unrecognized')])
def test_a_mistake_is_one_line_and_status_2(tmp_path, env, words, said):
    done = subprocess.run([*COMMAND, *words, '--out', str(tmp_path/'new')], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and said in done.stderr, done.stderr
    assert not (tmp_path/'new').exists()                                        # nothing was made


@pytest.mark.skipif(sys.platform == 'win32', reason='signals')
def test_killed_and_resumed(tmp_path, env):
    "SIGKILL in the middle, then --resume: history and weights of an undisturbed run"
    words = ['--epochs', '12', '--model', 'mlp', '--augment', '--source', 'toy', '--device', 'cpu', '--batch-size', '64']
    whole = subprocess.run([*COMMAND, *words, '--out', str(tmp_path/'whole')], env=env, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([*COMMAND, *words, '--out', str(tmp_path/'killed')], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(3000):
        if list((tmp_path/'killed').glob('*/history.csv')): break
        time.sleep(.02)
    process.kill()
    process.wait()
    (whole,), (killed,) = ((list((tmp_path/name).iterdir())) for name in ('whole', 'killed'))
    done = subprocess.run([*COMMAND, '--resume', str(killed)], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and 'going on after' in done.stdout, done.stdout + done.stderr
    def rows(run): return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader((run/'history.csv').open())]
    assert rows(whole) == rows(killed) and len(rows(killed)) == 12
    a, b = (torch.load(run/'checkpoint.pt', weights_only=True) for run in (whole, killed))
    assert all(torch.equal(v, b['model'][k]) for k, v in a['model'].items())
    again = subprocess.run([*COMMAND, '--resume', str(killed)], env=env, capture_output=True, text=True)
    assert again.returncode == 0 and 'finished' in again.stdout
    (killed/'checkpoint.pt').write_bytes((killed/'checkpoint.pt').read_bytes()[:5000])
    damaged = subprocess.run([*COMMAND, '--resume', str(killed)], env=env, capture_output=True, text=True)
    assert damaged.returncode == 2 and damaged.stderr.count('\n') == 1 and 'damaged' in damaged.stderr
