"The command nntrain_fit as a process of its own"
import csv
import json
import os
import signal
import subprocess
import sys
import time

import forked
import pytest
import torch
from conftest import ROOT

import nntrain.recipe
import nntrain.run_folder
from nntrain.data import fashion_dls
from nntrain.command import nntrain_fit
from nntrain.learner import Learner
from nntrain.recipe import OPTIMIZERS, train_fashion

COMMAND = forked.command()
FILES = ['checkpoint.pt', 'curves.png', 'history.csv', 'options.json', 'test.json']
TINY = ['--model', 'mlp', '--source', 'toy', '--device', 'cpu']
command = forked.run   # in a process that need not load torch


def wait_for_history(folder, process, seconds=600):
    """Until the first epoch is written; on a busy machine it takes its time to load
    torch"""
    end = time.monotonic() + seconds
    while not list(folder.glob('*/history.csv')):
        assert process.poll() is None, (
            f'ended before its first epoch: {process.returncode}')
        assert time.monotonic() < end, f'no first epoch within {seconds} s'
        time.sleep(.02)


@pytest.fixture
def env(monkeypatch):
    monkeypatch.delenv('NNTRAIN_DATA', raising=False)
    monkeypatch.delenv(
        'PYTHONUNBUFFERED', raising=False
    )  # with it argparse itself drops what nobody reads
    return os.environ | {'NNTRAIN_BUDGET': 'quick', 'OMP_NUM_THREADS': '1'}


def test_a_run_and_its_folder(tmp_path, env):
    done = command('--epochs', '2', '--model', 'mlp', '--out', str(tmp_path), env=env)
    assert done.returncode == 0, done.stderr
    assert (
        'notice: ' in done.stdout and 'toy_fashion' in done.stdout
    )  # no data, no network under the quick budget: it says so
    (run,) = tmp_path.iterdir()
    assert sorted(p.name for p in run.iterdir()) == FILES
    rows = list(csv.DictReader((run/'history.csv').open()))
    assert len(rows) == 2 and float(rows[1]['train_loss']) < float(
        rows[0]['train_loss'])
    assert (run/'curves.png').read_bytes()[:4] == b'\x89PNG'
    state = torch.load(run/'checkpoint.pt', weights_only=True)
    assert {'model', 'optimizer', 'random', 'facts'} <= set(state) and (
        state['epoch'], state['batch']) == (2, 0)


@pytest.mark.parametrize('rank', ['0', '8'])
def test_a_rank_in_the_environment_of_a_single_process_changes_nothing(
    tmp_path, env, rank):
    done = command(*TINY, '--epochs', 1, '--out', tmp_path, env=env | {'RANK': rank})
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.iterdir()
    assert sorted(p.name for p in run.iterdir()) == FILES


def test_validates_on_training_images_and_opens_the_test_split_once(
    tmp_path, env, monkeypatch, capsys):
    monkeypatch.setenv('NNTRAIN_BUDGET', 'quick')
    seen, make = [], fashion_dls
    class Watched:
        "A loader that notes when it is iterated over"
        def __init__(self, name, loader): self.name, self.loader = name, loader
        def __getattr__(self, name): return getattr(self.loader, name)
        def __len__(self): return len(self.loader)
        def __iter__(self): seen.append(self.name); return iter(self.loader)
    def watched(*args, **kwargs):
        dls = make(*args, **kwargs)
        for name in 'train', 'valid', 'test':
            setattr(dls, name, Watched(name, getattr(dls, name)))
        return dls
    monkeypatch.setattr(nntrain.recipe, 'fashion_dls', watched)
    run = train_fashion(3, model='mlp', source='toy', device='cpu', out=tmp_path)
    assert seen == ['train', 'valid']*3 + ['test']
    out, test = capsys.readouterr().out, json.loads((run/'test.json').read_text())
    split = make(256, valid='split', source='toy', device='cpu')
    assert (
        f'{split.train.n:,} images to train on, {split.valid.n:,} held out to validate'
        in out)
    assert (
        f'test accuracy {test["accuracy"]:.4f} on {split.test.n:,} images' in out
        and test['images'] == split.test.n)
    last = list(csv.DictReader((run/'history.csv').open()))[-1]
    assert (
        f'valid accuracy {float(last["valid_accuracy"]):.4f} after 3 epochs, on '
        f'{split.valid.n:,} held-out images' in out)
    seen.clear()
    # finished: its test figure is known
    nntrain.recipe.resume_fashion(run)
    assert (
        'test' not in seen
        and f'test accuracy {test["accuracy"]:.4f}' in capsys.readouterr().out)


def test_the_books_own_optimizers(tmp_path, monkeypatch):
    monkeypatch.setenv('NNTRAIN_BUDGET', 'quick')
    assert all(
        factory.__module__.startswith('nntrain.') for factory, _ in OPTIMIZERS.values())
    for name in OPTIMIZERS:
        run = train_fashion(
            1, model='mlp', optimizer=name, source='toy', device='cpu', out=tmp_path)
        kind = torch.load(run/'checkpoint.pt', weights_only=True)['facts']['optimizer']
        assert kind.lower() == name


@pytest.mark.parametrize(
    'words',
    [
        ['--lr', '1e30'],
        ['--lr', '1e30', '--schedule', 'constant', '--optimizer', 'sgd', '--augment']],
)
def test_a_loss_that_is_not_finite_has_a_status_of_its_own(tmp_path, env, words):
    done = command(*TINY, '--epochs', 3, *words, '--out', tmp_path, env=env)
    (run,) = tmp_path.iterdir()
    assert done.returncode == 3 and done.stderr.count('\n') == 1, done.stderr
    assert (
        'loss' in done.stderr and 'in epoch 0' in done.stderr
        and 'smaller learning rate' in done.stderr and str(run) in done.stderr)
    assert 'accuracy 0.' not in done.stdout and not (run/'test.json').exists()
    again = command('--resume', run, env=env)
    assert again.returncode == 3 and again.stderr.count('\n') == 1


@pytest.mark.skipif(sys.platform == 'win32', reason='pipes')
def test_a_reader_that_goes_away_leaves_a_run_that_can_go_on(tmp_path, env):
    process = subprocess.Popen(
        [*COMMAND, *TINY, '--epochs', '6', '--out', str(tmp_path)], env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert 'toy data' in process.stdout.readline()
    process.stdout.close()                              # as `| head -1` does
    assert process.wait(600) == 141 and process.stderr.read() == ''
    process.stderr.close()
    (run,) = tmp_path.iterdir()
    assert {'checkpoint.pt', 'options.json'} <= {
        p.name for p in run.iterdir()} and not (run / 'test.json').exists()
    done = command('--resume', run, env=env)
    assert done.returncode == 0 and 'test accuracy' in done.stdout, done.stderr


@pytest.mark.skipif(sys.platform == 'win32', reason='pipes')
@pytest.mark.parametrize('words', [['--help'], [*TINY, '--epochs', '1']])
def test_nobody_reads_at_all(tmp_path, env, words):
    read, write = os.pipe()
    os.close(read)
    env.pop('PYTHONUNBUFFERED', None)
    done = subprocess.run(
        [*COMMAND, *words], env=env, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE,
        text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, '') and not list(tmp_path.iterdir())


def test_ctrl_c_while_torch_is_loaded_is_one_line(env):
    stop = """
import sys
class Stop:
    def find_spec(self, name, *rest):
        if name == 'torch': raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
from nntrain.tools import start_fit
sys.exit(start_fit(['--epochs', '1']))
"""
    done = subprocess.run(
        [sys.executable, '-c', stop], env=env, capture_output=True, text=True)
    assert done.returncode == 130 and 'Traceback' not in done.stderr
    assert (
        done.stderr.strip()
        == 'nntrain_fit: interrupted before the training began: there is nothing to '
        'go on with')


def test_the_installed_command_is_the_light_one():
    settings = (ROOT/'settings.ini').read_text(encoding='utf-8')
    assert 'nntrain_fit=nntrain.tools:start_fit' in settings


def test_the_history_is_replaced_whole(tmp_path, monkeypatch):
    "A write that fails in the middle leaves the file of the epoch before"
    monkeypatch.setenv('NNTRAIN_BUDGET', 'quick')
    write = nntrain.run_folder._write_history
    def fails_in_the_second_epoch(history, path):
        write(history, path)
        if len(history) == 2:
            path.write_text(path.read_text()[:20])
            raise OSError('the disk is full')
    monkeypatch.setattr(nntrain.run_folder, '_write_history', fails_in_the_second_epoch)
    with pytest.raises(OSError, match='disk is full'):
        train_fashion(3, model='mlp', source='toy', device='cpu', out=tmp_path)
    (run,) = tmp_path.iterdir()
    assert len(list(csv.DictReader((run/'history.csv').open()))) == 1
    assert not [p.name for p in run.iterdir() if p.name.startswith('.')]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path/'a.txt').write_text('a file')
    for out in tmp_path/'a.txt', tmp_path/'a.txt'/'deeper':
        with pytest.raises(OSError, match='choose another folder'):
            nntrain.run_folder.new_run_folder(out, 'run')


def test_only_the_folder_of_a_run_can_go_on(tmp_path, capsys):
    resume, options = nntrain.recipe.resume_fashion, tmp_path/'options.json'
    with pytest.raises(ValueError, match='is not the folder of a run'): resume(tmp_path)
    options.write_text('{"epochs": 3}')
    with pytest.raises(ValueError, match='was not written by nntrain_fit'):
        resume(tmp_path)
    options.write_text('{"epochs": 3')
    with pytest.raises(ValueError, match='is damaged'): resume(tmp_path)
    assert nntrain_fit(['--resume', str(tmp_path/'none')]) == 2
    assert 'is not the folder of a run' in capsys.readouterr().err


def test_a_run_cannot_be_made_longer_in_its_options(tmp_path, monkeypatch):
    monkeypatch.setenv('NNTRAIN_BUDGET', 'quick')
    run = train_fashion(2, model='mlp', source='toy', device='cpu', out=tmp_path)
    options = json.loads((run/'options.json').read_text())
    (run/'options.json').write_text(json.dumps(options | {'epochs': 3}))
    with pytest.raises(ValueError, match='n_epochs was 2, is 3'):
        nntrain.recipe.resume_fashion(run)


def test_python_says_which_names_there_are(tmp_path):
    with pytest.raises(ValueError, match='choose one of mlp, cnn'):
        train_fashion(1, model='resnet5000', source='toy', out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_folder_needs_a_history(tmp_path):
    save = nntrain.run_folder.SaveRunCB(tmp_path, {})
    learn = Learner(torch.nn.Linear(1, 1), None, torch.nn.functional.mse_loss)
    with pytest.raises(ValueError, match='SaveRunCB needs MetricsCB'):
        learn.fit(1, cbs=[save])


def test_help_says_every_default(capsys):
    words = ' '.join(nntrain_fit_help(capsys).split())
    assert (
        words.count('(default: ') == 8
        and 'same seed, same run (on the same machine) (default: 0)' in words)
    options = ('epochs lr batch-size model optimizer schedule augment source seed '
               'device out resume')
    assert all(f'--{option} ' in words for option in options.split())


def nntrain_fit_help(capsys):
    with pytest.raises(SystemExit) as left: nntrain_fit(['--help'])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_a_seed_that_torch_cannot_take_is_refused_in_python_too(tmp_path):
    for seed in 2**64, -1, 1.5, True:
        with pytest.raises(ValueError, match='seed must be a whole number from 0'):
            train_fashion(
                1, model='mlp', source='toy', device='cpu', seed=seed,
                out=tmp_path / 'new')
    assert not (tmp_path/'new').exists()


def test_schedule_and_augmentation(tmp_path, env):
    done = command(
        '--epochs', '1', '--model', 'resnet', '--augment', '--source', 'toy', '--out',
        str(tmp_path), env=env)
    assert done.returncode == 0, done.stderr
    assert 'resnet, adamw, lr 0.01, one-cycle, augmented' in done.stdout
    (run,) = tmp_path.iterdir()
    options = json.loads((run/'options.json').read_text())
    assert (options['schedule'], options['augment'], options['lr']) == (
        'one-cycle', True, 0.01)
    (group,) = torch.load(run / 'checkpoint.pt', weights_only=True)['optimizer'][
        'param_groups']
    assert group['lr'] < 1e-4  # the cycle went to its end


@pytest.mark.skipif(sys.platform == 'win32', reason='signals')
def test_ctrl_c_leaves_the_last_complete_epoch(tmp_path, env):
    process = subprocess.Popen(
        [
            *COMMAND, '--epochs', '1000', '--model', 'mlp', '--source', 'toy', '--out',
            str(tmp_path)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a runner in the background of a shell ignores Ctrl-C,
        # and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for_history(tmp_path, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    (run,) = tmp_path.iterdir()
    assert (
        process.returncode == 130
        and err.strip().splitlines()[-1].startswith('nntrain_fit: interrupted')
        and err.strip().endswith(f'nntrain_fit --resume {run}'))
    rows, state = (
        list(csv.DictReader((run / 'history.csv').open())),
        torch.load(run / 'checkpoint.pt', weights_only=True))
    assert abs(len(rows) - state['epoch']) <= 1 and len(rows) >= 1
    assert not [
        p for p in run.iterdir() if p.name.startswith('.')
    ]  # nothing half-written lies around


@pytest.mark.parametrize(
    'words, where, said',
    [
        (
            [], '',
            'interrupted before the training began: there is nothing to go on with'),
        (
            [], 'runs/new',
            'interrupted before the training began: there is nothing to go on with'),
        (
            [], 'runs/a b',
            "interrupted; runs/a b holds the last complete epoch, if there was one; "
            "go on with: nntrain_fit --resume 'runs/a b'"),
        (
            ['--resume', 'old'], '',
            'interrupted; old holds the last complete epoch, if there was one; go on '
            'with: nntrain_fit --resume old'),
    ],
)
def test_ctrl_c_names_a_folder_only_where_a_run_can_go_on(
    tmp_path, monkeypatch, capsys, words, where, said):
    monkeypatch.chdir(tmp_path)
    for folder in 'runs/a b', 'old':
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'options.json').write_text('{}')
    def stop(*args, **kwargs): raise KeyboardInterrupt(*[where]*bool(where))
    for name in ('train_fashion', 'resume_fashion'):
        monkeypatch.setattr(f'nntrain.command.{name}', stop)
    assert nntrain_fit(words) == 130
    assert capsys.readouterr().err.strip() == f'nntrain_fit: {said}'


@pytest.mark.parametrize(
    'words, said',
    [
        (['--epochs', '0'], 'at least 1'),
        (['--batch-size', '-5'], 'at least 1'),
        (['--lr', 'nan'], 'finite number above 0'),
        (['--lr', '0'], 'finite number above 0'),
        (['--epochs', '1.5'], 'whole number'),
        (['--seed', '99999999999999999999'], 'from 0 to 2**64 - 1'),
        (['--seed', '1' + 400 * '0'], 'from 0 to 2**64 - 1'),
        (['--seed', '-1'], 'from 0'),
        (['--optimizer', 'adamm'], 'invalid choice'),
        (['--schedule', 'step'], 'invalid choice'),
        (['--model', 'vgg'], "invalid choice: 'vgg'"),
        (['--source', 'web'], "invalid choice: 'web'"),
        (['--seed', 'x'], 'whole number'),
        (['--device', 'toaster'], 'choose cpu, cuda'),
        (['--device', 'meta'], 'is not there'),
        (
            ['--device', 'cuda:99'],
            'choose one of' if not torch.cuda.is_available() else 'cuda'),
        (['--source', 'local'], 'NNTRAIN_DATA'),
        (['extra'], 'unrecognized'),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, env, words, said):
    done = command(*words, '--out', str(tmp_path/'new'), env=env)
    assert (
        done.returncode == 2 and done.stderr.count('\n') == 1 and said in done.stderr
    ), done.stderr
    assert not (tmp_path / 'new').exists()  # nothing was made


def test_a_forked_process_is_as_good_as_a_started_one(tmp_path, env):
    "What the other tests rely on: words, environment, folder, both outputs, status"
    for words in ['--lr', 'nan'], ['--help']:
        kwargs = dict(env=env | {'COLUMNS': '70'}, cwd=tmp_path)
        real = subprocess.run(
            [*COMMAND, *words], capture_output=True, text=True, **kwargs)
        fork = command(*words, **kwargs)
        assert (fork.returncode, fork.stderr) == (real.returncode, real.stderr)
        # usage: the program's name
        assert fork.stdout.splitlines()[1:] == real.stdout.splitlines()[1:]


@pytest.mark.skipif(sys.platform == 'win32', reason='signals')
def test_killed_and_resumed(tmp_path, env):
    "SIGKILL in the middle, then --resume: history and weights of an undisturbed run"
    words = [
        '--epochs', '12', '--model', 'mlp', '--augment', '--source', 'toy', '--device',
        'cpu', '--batch-size', '64']
    whole = command(*words, '--out', str(tmp_path/'whole'), env=env)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*COMMAND, *words, '--out', str(tmp_path / 'killed')], env=env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_history(tmp_path/'killed', process)
    process.kill()
    process.wait()
    (whole,), (killed,) = (
        (list((tmp_path / name).iterdir())) for name in ('whole', 'killed'))
    done = command('--resume', str(killed), env=env)
    assert done.returncode == 0 and 'going on after' in done.stdout, (
        done.stdout + done.stderr)
    def rows(run):
        return [
            {k: v for k, v in row.items() if k != 'seconds'}
            for row in csv.DictReader((run / 'history.csv').open())]
    assert rows(whole) == rows(killed) and len(rows(killed)) == 12
    a, b = (
        torch.load(run / 'checkpoint.pt', weights_only=True) for run in (whole, killed))
    assert all(torch.equal(v, b['model'][k]) for k, v in a['model'].items())
    again = command('--resume', str(killed), env=env)
    assert again.returncode == 0 and 'finished' in again.stdout
    (killed/'checkpoint.pt').write_bytes((killed/'checkpoint.pt').read_bytes()[:5000])
    damaged = command('--resume', str(killed), env=env)
    assert (
        damaged.returncode == 2 and damaged.stderr.count('\n') == 1
        and 'damaged' in damaged.stderr)
