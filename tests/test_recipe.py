"The command nntrain_fit as a process of its own"
import csv
import json
import math
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import nntrain.recipe
import nntrain.run_folder
import nntrain.run_options
from nntrain.callback import Callback, sort_callbacks
from nntrain.checkpoint_file import read_checkpoint, write_checkpoint
from nntrain.command import nntrain_fit
from nntrain.compare import set_seed
from nntrain.cycles import one_cycle
from nntrain.data import DataLoaders, fashion_dls
from nntrain.engine import assemble, validated_weights
from nntrain.launch import launch
from nntrain.learner import Learner
from nntrain.lock import RunLock
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.recipe import OPTIMIZERS, resume_fashion, train_fashion
from nntrain.run_folder import new_run_folder
from nntrain.tensor_loader import TensorLoader

COMMAND = forked.command()
FILES = ['checkpoint.pt', 'curves.png', 'history.csv', 'options.json', 'test.json',
         'weights.pt']
TINY = ['--model', 'mlp', '--source', 'toy', '--device', 'cpu']
ENGINE = ['--precision', 'bf16', '--accumulate', '3', '--clip', '1', '--ema', '.9']
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
    monkeypatch.setattr(nntrain.run_options, 'fashion_dls', watched)
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
    write = nntrain.run_folder._write_rows
    def fails_in_the_second_epoch(history, path):
        write(history, path)
        if len(history) == 2:
            path.write_text(path.read_text()[:20])
            raise OSError('the disk is full')
    monkeypatch.setattr(nntrain.run_folder, '_write_rows', fails_in_the_second_epoch)
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


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(nntrain.run_folder.time, 'strftime', lambda form: 'now')
    folders = [new_run_folder(tmp_path, 'run') for _ in range(3)]
    assert [folder.name for folder in folders] == ['now-run', 'now-run-2', 'now-run-3']
    assert all(folder.is_dir() and not [*folder.iterdir()] for folder in folders)


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
        words.count('(default: ') == 10
        and 'same seed, same run (on the same machine) (default: 0)' in words)
    options = ('epochs lr batch-size model optimizer schedule augment precision '
               'accumulate clip ema processes source seed device out resume')
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
            "interrupted; runs/a b holds the last checkpoint; "
            "go on with: nntrain_fit --resume 'runs/a b'"),
        (
            ['--resume', 'old'], '',
            'interrupted; old holds the last checkpoint; go on with: nntrain_fit '
            '--resume old'),
    ],
)
def test_ctrl_c_names_a_folder_only_where_a_run_can_go_on(
    tmp_path, monkeypatch, capsys, words, where, said):
    monkeypatch.chdir(tmp_path)
    for folder in 'runs/a b', 'old':
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'options.json').write_text('{}')
    def stop(*args, **kwargs):
        e = KeyboardInterrupt()
        if where: e.folder = where
        raise e
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
        (['--precision', 'fp8'], "invalid choice: 'fp8'"),
        (['--accumulate', '0'], 'at least 1'),
        (['--clip', '-1'], 'finite number above 0'),
        (['--clip', 'inf'], 'finite number above 0'),
        (['--ema', '1.1'], 'number from 0 to 1'),
        (['--ema', 'nan'], 'number from 0 to 1'),
        (['--processes', '0'], 'at least 1'),
        (['--device', 'toaster'], 'choose cpu, cuda'),
        (['--device', 'meta'], 'is not there'),
        (['--device', 'cuda:99'], "'cuda:99' is not there: choose from"),
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
    """SIGKILL in the middle, --resume, SIGTERM, --resume: history and weights of an
    undisturbed run"""
    words = [
        *TINY, *ENGINE, '--epochs', '12', '--augment', '--batch-size', '64']
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
    process = subprocess.Popen(
        [*COMMAND, '--resume', str(killed)], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    rows_before = len(rows_of(killed))
    while len(rows_of(killed)) == rows_before: time.sleep(.02)
    process.terminate()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 143 and 'ended by SIGTERM' in out
    assert err.count('\n') == 1 and f'nntrain_fit --resume {killed}' in err, err
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


# ---- the engine ----------------------------------------------------------------------

def toy_loaders(batch_size, n=104):
    "Seeded tensors whose last batch of an epoch is smaller"
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64)
    y = (x.sum(1) > 0).long() + (x[:, 0] > 0)
    train = TensorLoader(x, y, batch_size, shuffle=True, seed=3)
    return DataLoaders(train, TensorLoader(x[:40], y[:40], batch_size))


def toy_model():
    set_seed(0)
    layers = torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers).double()


def by_hand(n_epochs, dls, schedule, accumulate=1, clip=None, ema=None):
    "The loop that `assemble` should be, written out; weights and their average"
    model, lr = toy_model(), .1
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    n, taken, total, weight = math.ceil(len(dls.train)/accumulate), 0, 0., 0.
    for _ in range(n_epochs):
        batches = list(dls.train)
        for i in range(0, len(batches), accumulate):
            group = batches[i:i+accumulate]
            rows = sum(len(y) for _, y in group)
            for x, y in group: (F.cross_entropy(model(x), y)*len(y)/rows).backward()
            if clip: torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            if schedule: opt.param_groups[0]['lr'] = schedule(taken/(n_epochs*n - 1))
            opt.step(), opt.zero_grad()
            taken += 1
            if ema is None: continue
            flat = torch.cat([p.detach().flatten() for p in model.parameters()])
            total, weight = ema*total + (1-ema)*flat, ema*weight + (1-ema)
    trained = torch.cat([p.detach().flatten() for p in model.parameters()])
    return trained, trained if ema is None else total/weight


@pytest.mark.parametrize('options', [
    {}, {'accumulate': 3}, {'clip': .3}, {'ema': .8}, {'schedule': one_cycle(.5)},
    {'accumulate': 3, 'clip': .3, 'ema': .8, 'schedule': one_cycle(.5)}],
    ids=lambda options: ' '.join(options) or 'plain')
def test_the_engine_is_the_loop_that_one_would_write(tmp_path, options):
    learn = assemble(
        toy_model(), toy_loaders(16), F.cross_entropy, torch.optim.SGD, .1,
        device='cpu', checkpoint=tmp_path/'c.pt', **options)
    learn.fit(3)
    options = {'schedule': None} | options
    trained, average = by_hand(3, toy_loaders(16), **options)
    def flat(model):
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(flat(learn.model), trained, rtol=0, atol=1e-12)
    with validated_weights(learn) as model:
        torch.testing.assert_close(flat(model), average, rtol=0, atol=1e-12)
    torch.testing.assert_close(flat(learn.model), trained, rtol=0, atol=1e-12)
    assert ('ema' in options) == ((trained - average).abs().max() > 1e-3)


def parts_of(learn): return [type(cb).__name__ for cb in sort_callbacks(learn.cbs)]


def test_the_engine_holds_what_was_asked_for_and_nothing_else(tmp_path):
    args = toy_model(), None, F.cross_entropy, torch.optim.SGD, .1
    few = ['DeviceCB', 'StopOnNonFiniteCB', 'MetricsCB', 'ProgressCB']
    assert parts_of(assemble(*args)) == few
    assert parts_of(assemble(
        *args, one_cycle(.1), 'float16', 2, 1., .9, 1, 'cpu', tmp_path/'c.pt')) == [
        'DeviceCB', 'GradientAccumulationCB', 'MixedPrecisionCB', 'GradientClipCB',
        'StopOnNonFiniteCB', 'ScheduleCB', 'WeightAveragingCB', 'MetricsCB',
        'ProgressCB', 'CheckpointCB']
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('option, value, said', [
    ('precision', 'fp8', 'choose one of float32, bfloat16, float16'),
    ('accumulate', 0, 'at least 1'), ('accumulate', 1.5, 'whole number'),
    ('clip', 0., 'above 0'), ('clip', math.nan, 'above 0'), ('ema', 1.5, r'\[0, 1\]'),
    ('processes', 3, '3 processes should train as one, but 1 were started')])
def test_the_engine_refuses_an_option_before_anything_is_made(
    tmp_path, option, value, said):
    with pytest.raises(ValueError, match=said):
        assemble(
            toy_model(), None, F.cross_entropy, torch.optim.SGD, .1,
            checkpoint=tmp_path/'c.pt', **{option: value})
    assert not list(tmp_path.iterdir())


def rows_of(run):
    return [
        {k: float(v) for k, v in row.items() if k != 'seconds'}
        for row in csv.DictReader((run/'history.csv').open())]


def weights_of(run): return torch.load(run/'weights.pt', weights_only=True)


def close(a, b, tolerance):
    "The same history and weights in two run folders, up to `tolerance`"
    for one, other in zip(rows_of(a), rows_of(b), strict=True):
        assert one == pytest.approx(other, abs=tolerance)
    for one, other in zip(weights_of(a).values(), weights_of(b).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_two_batches_a_step_are_a_batch_of_twice_the_size(tmp_path, monkeypatch):
    monkeypatch.setenv('NNTRAIN_BUDGET', 'quick')
    same = dict(
        epochs=2, lr=.1, model='mlp', optimizer='momentum', source='toy', device='cpu',
        out=tmp_path)
    small = train_fashion(batch_size=64, accumulate=2, **same)
    large = train_fashion(batch_size=128, **same)
    other = train_fashion(batch_size=64, **same)
    close(small, large, 1e-5)
    losses = [rows_of(run)[-1]['train_loss'] for run in (small, other)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_average_is_validated_tested_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('NNTRAIN_BUDGET', 'quick')
    run = train_fashion(
        2, model='cnn', source='toy', device='cpu', ema=.9, out=tmp_path)
    assert (
        ', average 0.9, ' in (out := capsys.readouterr().out)
        and 'images, both with the average of the weights' in out)
    trained = torch.load(run/'checkpoint.pt', weights_only=True)['model']
    kept = weights_of(run)
    assert any(
        (kept[name] - value).abs().max() > 1e-4 for name, value in trained.items()
        if value.is_floating_point())
    dls = fashion_dls(256, valid='split', source='toy', device='cpu', normalize=True)
    test = json.loads((run/'test.json').read_text())
    known = {'valid': rows_of(run)[-1]['valid_accuracy'], 'test': test['accuracy']}
    for split, accuracy in known.items():
        net = nntrain.recipe.MODELS['cnn']()
        net.load_state_dict(kept)
        loaders = DataLoaders(dls.train, getattr(dls, split))
        judge = Learner(net, loaders, F.cross_entropy, cbs=[MetricsCB(Accuracy())])
        judge.fit(1, train=False)
        assert judge.history[0]['valid_accuracy'] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_sixteen_bits_train_on_a_cpu_as_well(tmp_path, monkeypatch, precision):
    monkeypatch.setenv('NNTRAIN_BUDGET', 'quick')
    run = train_fashion(
        1, model='mlp', source='toy', device='cpu', precision=precision, out=tmp_path)
    assert rows_of(run)[0]['valid_accuracy'] > .3
    assert all(v.dtype == torch.float32 for v in weights_of(run).values())
    callbacks = torch.load(run/'checkpoint.pt', weights_only=True)['callbacks']
    (scaler,) = [state for name, state in callbacks if name == 'MixedPrecisionCB']
    assert bool(scaler) == (precision == 'fp16')


def unfinished_run(tmp_path, monkeypatch, **options):
    "The folder of a run that Ctrl-C ended in its second epoch"
    monkeypatch.setenv('NNTRAIN_BUDGET', 'quick')
    class CtrlC(Callback):
        watches = True
        def after_batch(self, learn):
            if learn.epoch == 1 and learn.iter == 1: raise KeyboardInterrupt
    real = nntrain.recipe.assemble
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
        patch.setattr(
            nntrain.recipe, 'assemble',
            lambda cbs, **kwargs: real(cbs=[*cbs, CtrlC()], **kwargs))
        train_fashion(
            3, model='mlp', source='toy', device='cpu', out=tmp_path, **options)
    return stop.value.folder


def test_a_run_from_before_the_engine_goes_on(tmp_path, monkeypatch):
    run = unfinished_run(tmp_path, monkeypatch, seed=3)
    options = json.loads((run/'options.json').read_text())
    for name in nntrain.recipe._ENGINE: del options[name]
    (run/'options.json').write_text(json.dumps(options))
    nntrain.recipe.resume_fashion(run)
    whole = train_fashion(
        3, model='mlp', source='toy', device='cpu', seed=3, out=tmp_path)
    close(run, whole, 0)
    assert json.loads((run/'options.json').read_text())['processes'] == 1


def test_a_run_of_a_gpu_goes_on_on_the_cpu_where_asked_to(
    tmp_path, monkeypatch, capsys):
    run = unfinished_run(tmp_path, monkeypatch)
    options = json.loads((run/'options.json').read_text())
    (run/'options.json').write_text(json.dumps(options | {'device': 'cuda'}))
    state = read_checkpoint(run/'checkpoint.pt')
    state['circumstances']['device'] = 'cuda'
    del state['format']
    write_checkpoint(state, run/'checkpoint.pt')
    if not torch.cuda.is_available():
        assert nntrain_fit(['--resume', str(run)]) == 2
        assert "'cuda' is not there" in capsys.readouterr().err
    assert nntrain_fit(['--resume', str(run), '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert 'device was cuda, is cpu' in out and 'do not expect the same bits' in out
    assert json.loads((run/'options.json').read_text())['device'] == 'cpu'


def test_a_refused_resume_changes_nothing(tmp_path, monkeypatch, capsys):
    run = unfinished_run(tmp_path, monkeypatch)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert nntrain_fit(['--resume', str(run), '--lr', '1', '--clip', '2']) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'leave out --lr, --clip' in err
    assert nntrain_fit(['--resume', str(run), '--epochs', '5']) == 2
    assert capsys.readouterr().err.count('\n') == 1
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_run_becomes_longer_where_no_step_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('NNTRAIN_BUDGET', 'quick')
    same = dict(
        model='mlp', source='toy', device='cpu', schedule='constant', precision='bf16',
        accumulate=3, clip=1., ema=.9, out=tmp_path)
    run, whole = train_fashion(2, **same), train_fashion(4, **same)
    assert nntrain_fit(['--resume', str(run), '--epochs', '1']) == 2
    assert 'cannot become a run of 1' in capsys.readouterr().err
    tested = json.loads((run/'test.json').read_text())
    assert nntrain_fit(['--resume', str(run), '--epochs', '4']) == 0
    close(run, whole, 0)
    test = [json.loads((folder/'test.json').read_text()) for folder in (run, whole)]
    assert test[0] == test[1] and tested['epochs'] == 2 and test[0]['epochs'] == 4
    assert json.loads((run/'options.json').read_text())['epochs'] == 4
    cycle = train_fashion(2, **same | {'schedule': 'one-cycle'})
    before = {path.name: path.read_bytes() for path in cycle.iterdir()}
    assert nntrain_fit(['--resume', str(cycle), '--epochs', '4']) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'of lr would have had' in err, err
    assert {path.name: path.read_bytes() for path in cycle.iterdir()} == before


def test_a_second_run_in_a_folder_is_refused(tmp_path, monkeypatch, capsys):
    run = unfinished_run(tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    (lock := RunLock(run/'checkpoint.pt')).take()
    assert nntrain_fit(['--resume', str(run)]) == 2
    lock.release()
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'is in use by' in err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert nntrain_fit(['--resume', str(run)]) == 0


# ---- several processes ---------------------------------------------------------------

def test_processes_return_what_the_main_one_returned(capsys, monkeypatch, tmp_path):
    assert launch(2, max, 3, 4) == 4
    launch(2, print, 'printed once: ä')
    assert capsys.readouterr().out == 'printed once: ä\n'
    (tmp_path/'own_module.py').write_text('def where(): return __file__')
    monkeypatch.syspath_prepend(tmp_path)
    from own_module import where
    assert launch(2, where) == where()


def test_an_error_in_a_process_is_raised_here():
    with pytest.raises(ZeroDivisionError, match='division by zero'):
        launch(2, operator.truediv, 1, 0)
    with pytest.raises(ChildProcessError, match='without a word .its exit status is 3'):
        launch(2, os._exit, 3)
    with pytest.raises(ValueError, match='is not in a module'):
        exec('def own(): pass', space := {'__name__': '__main__'})
        launch(2, space['own'])


def alive(pids):
    def there(pid):
        try: state = Path(f'/proc/{pid}/stat').read_text().split(') ')[1]
        except OSError: return False
        return state[0] != 'Z'         # it has ended, but nobody has asked
    return [pid for pid in pids if there(pid)]


SLEEPS = """
import os, sys, time
from nntrain.launch import launch
try: launch(2, time.sleep, 600)
except BaseException as e: print(type(e).__name__, flush=True), sys.exit(7)
"""


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='finds children in /proc')
@pytest.mark.parametrize('number, said', [
    (signal.SIGINT, 'KeyboardInterrupt\n'), (signal.SIGTERM, 'SystemExit\n'),
    (signal.SIGKILL, '')])
def test_no_process_outlives_the_one_that_started_it(env, number, said):
    parent = subprocess.Popen(
        [sys.executable, '-c', SLEEPS], env=env, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    children, end = [], time.monotonic() + 60
    while len(children) < 2:
        assert time.monotonic() < end
        time.sleep(.02)
        tasks = Path(f'/proc/{parent.pid}/task')
        children = [int(pid) for task in tasks.glob('*/children')
                    for pid in task.read_text().split()]
    time.sleep(.3)                     # they are asleep, or nearly
    parent.send_signal(number)
    try: out, _ = parent.communicate(timeout=60)
    finally: parent.kill()
    assert out == said and parent.returncode == (7 if said else -number)
    while alive(children):
        assert time.monotonic() < end
        time.sleep(.02)


def children_of(process):
    tasks = Path(f'/proc/{process.pid}/task').glob('*/children')
    return [int(pid) for task in tasks for pid in task.read_text().split()]


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='finds children in /proc')
def test_two_processes_are_killed_stopped_and_resumed(tmp_path, env):
    "They end as they would have ended undisturbed, and nearly as one process does"
    words = [
        *TINY, *ENGINE[2:], '--epochs', '12', '--optimizer', 'momentum',
        '--lr', '.01', '--batch-size', '64']
    def trained(name, *more):
        done = command(*words, *more, '--out', tmp_path/name, env=env)
        assert done.returncode == 0, done.stderr
        return next((tmp_path/name).iterdir())
    one, two = trained('one'), trained('two', '--processes', '2')
    close(one, two, 1e-6)
    def start(*words):
        return subprocess.Popen(
            [*COMMAND, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True)
    process = start(*words, '--processes', '2', '--out', tmp_path/'often')
    wait_for_history(tmp_path/'often', process)
    os.kill(children_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1 and 'process 1 of 2 has ended without a word' in err
    assert err.count('\n') == 1, err
    (run,) = (tmp_path/'often').iterdir()
    process = start('--resume', run)
    rows = len(rows_of(run))
    while len(rows_of(run)) == rows: time.sleep(.02)
    members = children_of(process)
    process.terminate()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 143 and not alive(members), err
    assert out.count('ended by SIGTERM') == 1, out
    assert err.count('\n') == 1 and f'nntrain_fit --resume {run}' in err, err
    done = command('--resume', run, env=env)
    assert done.returncode == 0 and 'going on after' in done.stdout, done.stderr
    close(run, two, 0)


def test_an_error_of_two_processes_is_said_once(tmp_path, env):
    done = command(
        *TINY, '--epochs', 3, '--lr', '1e30', '--processes', 2, '--out', tmp_path,
        env=env)
    assert done.returncode == 3 and done.stderr.count('\n') == 1, done.stderr
    assert done.stdout.count('stopped:') == 1 and 'smaller' in done.stderr


@pytest.mark.parametrize('words', [(), ('--processes', 2)])
def test_preflight_first_changes_no_bit(tmp_path, env, words):
    "The run is the one without it, and nothing is alarmed"
    plain, looked = (
        command(*TINY, '--epochs', 1, '--out', tmp_path/name, *words, *more, env=env)
        for name, more in (('a', ()), ('b', ('--preflight',))))
    assert plain.returncode == looked.returncode == 0, looked.stderr
    assert 'nothing found' in looked.stdout and 'nothing' not in plain.stdout
    weights = [torch.load(next((tmp_path/name).glob('*/weights.pt'))) for name in 'ab']
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_preflight_stops_at_a_fault_before_there_is_a_folder(tmp_path, env):
    made = command(*TINY, '--lr', '1e6', '--preflight', '--out', tmp_path/'runs',
                   env=env)
    assert made.returncode == 2 and 'fault: not finite' in made.stdout
    assert made.stderr.startswith('nntrain_fit: error: preflight has found a fault')
    assert not (tmp_path/'runs').exists()


# ---- careless calls ------------------------------------------------------------------

@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return train_fashion(epochs=1, model='mlp', source='toy', device='cpu')


def test_results_without_a_checkpoint_are_not_replaced(trained):
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    before.pop('checkpoint.pt')
    (trained/'checkpoint.pt').unlink()
    with pytest.raises(ValueError, match='has no checkpoint.pt to go on from'):
        resume_fashion(trained)
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == before


@pytest.mark.parametrize('text', ['', '[]', '{"epochs": 1}'])
def test_a_damaged_test_is_measured_again(trained, text):
    before = json.loads((trained/'test.json').read_text())
    (trained/'test.json').write_text(text)
    resume_fashion(trained)
    assert json.loads((trained/'test.json').read_text()) == before


def test_a_run_stays_in_its_folder(tmp_path):
    with pytest.raises(ValueError, match='name must have no slash'):
        new_run_folder(tmp_path, '../../x')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('error, match, n, function, args', [
    (ValueError, 'n must be a whole number', 0, max, (1, 2)),
    (ValueError, 'n must be a whole number', '2', max, (1, 2)),
    (TypeError, 'launch needs a function of a module, got str', 2, 'max', ()),
    (ValueError, 'cannot be sent to another process', 2, max, (lambda: 1,))])
def test_what_no_process_can_be_given(error, match, n, function, args):
    with pytest.raises(error, match=match): launch(n, function, *args)
