"""Trackers, read back from what they really wrote; time, memory and rates in the
history"""
import csv
import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import forked
import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from nntrain import profiling
from nntrain.accumulate import GradientAccumulationCB
from nntrain.annealing import AnnealCB
from nntrain.callback import Callback
from nntrain.callbacks import BatchLimitCB
from nntrain.checkpoint import CheckpointCB
from nntrain.compare import set_seed
from nntrain.data import DataLoaders
from nntrain.events import CancelFit, CancelStep
from nntrain.history import ColumnsCB, history_table, plot_history
from nntrain.learner import Learner
from nntrain.logs import (CSVLogCB, LearningRateCB, TrackerCB, group_rates,
                          run_settings)
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.precision import MixedPrecisionCB
from nntrain.processes import Processes
from nntrain.profiling import ProfileCB, ThroughputCB
from nntrain.progress import ProgressCB
from nntrain.schedule import linear
from nntrain.sgd import SGD
from nntrain.steering import ScheduleCB
from nntrain.torch_schedulers import TorchSchedulerCB
from nntrain.trackers import (CSVTracker, MLflowTracker, TensorBoardTracker,
                              WandbTracker)
from torch import nn
from torch.testing import assert_close

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:mlflow')


def learner(*cbs, n=50, opt_func=torch.optim.SGD, lr=.1):
    "7 training batches of 8 samples (the last has 2), 3 of validation"
    set_seed(0)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)
    dls = DataLoaders.from_tensors((x, y), (x[:20], y[:20]), batch_size=8, seed=0)
    return Learner(nn.Linear(4, 3), dls, F.cross_entropy, opt_func, lr, cbs)

class CrashCB(Callback):
    "Fail after a training batch, or in `before_epoch` if the batch is None"
    order, watches = 2000, True
    def __init__(self, epoch, batch, error=KeyError):
        self.at, self.error = (epoch, batch), error
    def _crash(self, at):
        if at == self.at: raise self.error('crash')
    def before_epoch(self, learn): self._crash((learn.epoch, None))
    def after_batch(self, learn):
        if learn.training: self._crash((learn.epoch, learn.iter))


# ---- what was written, read back: {name: {step: value}}, settings, how it ended ------

def read_csv(at):
    with open(at/'run.csv', newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    points = [(name, int(row['step']), float(value)) for row in rows
              for name, value in row.items() if name != 'step' and value]
    settings = json.loads((at/'run.settings.json').read_text(encoding='utf-8'))
    return points, settings

def read_tensorboard(at, n_fits):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(at/'board'), size_guidance={'scalars': 0}).Reload()
    points = [(name, e.step, e.value) for name in found.Tags()['scalars']
              for e in found.Scalars(name)]
    *earlier, text = found.Tensors('settings/text_summary')
    assert len(earlier) == n_fits - 1                    # once for each fit
    rows = text.tensor_proto.string_val[0].decode().splitlines()[2:]
    return points, dict(row.strip('| ').split(' | ') for row in rows)

def read_mlflow(at, all_runs=False):
    from mlflow import MlflowClient
    client = MlflowClient(f'sqlite:///{at}/runs.db')
    place = client.get_experiment_by_name(at.name).experiment_id
    runs = client.search_runs([place])
    if all_runs: return runs
    run, = runs                                         # one run, however often resumed
    points = [(name, m.step, m.value) for name in run.data.metrics
              for m in client.get_metric_history(run.info.run_id, name)]
    return points, run.data.params

@pytest.fixture(scope='module')
def database(tmp_path_factory):
    "An empty store of MLflow: it takes seconds to make, and a moment to copy"
    pytest.importorskip('mlflow', reason='needs mlflow-skinny')
    pytest.importorskip('sqlalchemy', reason='needs sqlalchemy and alembic')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MLFLOW_DISABLE_TELEMETRY', 'true')
        from mlflow import MlflowClient
        path = tmp_path_factory.mktemp('mlflow')/'runs.db'
        MlflowClient(f'sqlite:///{path}').search_experiments()
        yield path.read_bytes()

@pytest.fixture
def kept(request, tmp_path, monkeypatch):
    "make() gives a tracker of the same place again; read() what is there"
    kind = request.param
    if kind == 'csv':
        return SimpleNamespace(make=lambda: CSVTracker(tmp_path/'run.csv'),
                               read=lambda n_fits=1: read_csv(tmp_path))
    if kind == 'tensorboard':
        pytest.importorskip('tensorboard', reason='needs tensorboard')
        from tensorboard.summary.writer import event_file_writer as files
        # files are read by name, second and number: 10 would come before 9
        monkeypatch.setattr(files, '_global_uid', files.AtomicCounter(0))
        return SimpleNamespace(make=lambda: TensorBoardTracker(tmp_path/'board'),
                               read=lambda n_fits=1: read_tensorboard(tmp_path, n_fits))
    monkeypatch.setenv('MLFLOW_DISABLE_TELEMETRY', 'true')
    monkeypatch.chdir(tmp_path)
    (tmp_path/'runs.db').write_bytes(request.getfixturevalue('database'))
    uri = f'sqlite:///{tmp_path}/runs.db'
    return SimpleNamespace(make=lambda: MLflowTracker(tmp_path.name, 'one', uri),
                           read=lambda n_fits=1: read_mlflow(tmp_path))

every_kind = pytest.mark.parametrize('kept', ['csv', 'tensorboard', 'mlflow'],
                                     indirect=True)

def flat(calls):
    return {(name, step): value for numbers, step in calls
            for name, value in numbers.items()}

@every_kind
def test_what_is_reported_can_be_read_back(kept):
    calls = []
    learn = learner(MetricsCB(Accuracy()), ScheduleCB(lr=linear(.1, 0.)),
                    TrackerCB(lambda *call: calls.append(call), every=3),
                    TrackerCB(kept.make(), every=3))
    learn.fit(2)
    points, settings = kept.read()
    wanted = flat(calls)
    assert len(points) == len(wanted)                   # each of them once
    for name, step, value in points:
        assert value == pytest.approx(wanted[name, step], rel=1e-6)
    assert {step for _, step, _ in points} == {3, 6, 7, 9, 12, 14}
    assert settings['optimizer'] == 'SGD' and float(settings['lr']) == .1
    assert int(settings['n_steps']) == 14 and int(settings['parameters']) == 15
    assert settings['ScheduleCB'].startswith('ScheduleCB(lr: 0.1 → 0.075')

@every_kind
@pytest.mark.parametrize('at', [(0, 4), (1, 2), (1, 6), (2, None)])
def test_a_resumed_run_logs_each_step_once(kept, tmp_path, at):
    "The curve of a run that crashed is that of the same run without a crash"
    class MetricCB(ColumnsCB):                # no seconds: they differ
        def columns(self, learn): return {'norm': learn.model.weight.norm().item()}
    def fit(tracker, *cbs):
        calls = []
        logs = [TrackerCB(lambda *call: calls.append(call), every=1)]
        if tracker: logs = [TrackerCB(tracker, every=1)]
        learn = learner(MetricsCB(), MetricCB(), *logs, opt_func=torch.optim.Adam)
        learn.fit(3, cbs=cbs)
        return flat(calls)
    wanted = fit(None)
    def saved(): return CheckpointCB(tmp_path/'run.pt', every_batches=3, quiet=True)
    with pytest.raises(KeyError): fit(kept.make(), saved(), CrashCB(*at))
    fit(kept.make(), again := saved())
    assert again.resumed is not None
    points, settings = kept.read()
    assert len(points) == len({point[:2] for point in points}) == len(wanted)
    for name, step, value in points:
        if name != 'seconds': assert value == pytest.approx(wanted[name, step])
    assert int(settings['n_epochs']) == 3                # as at the start

class KillCB(Callback):
    "End the process without a word, after so many steps"
    order, watches = 2000, True
    def __init__(self, n): self.n = n
    def after_step(self, learn):
        if learn.n_taken == self.n: os.kill(os.getpid(), signal.SIGKILL)

def trained(folder, *cbs):
    trackers = [CSVTracker(folder/'run.csv'), TensorBoardTracker(folder/'board')]
    saved = CheckpointCB(folder/'run.pt', every_batches=4, quiet=True)
    logs = [TrackerCB(tracker, every=1) for tracker in trackers]
    learner(MetricsCB(), *logs, saved, *cbs).fit(3)
    return saved.resumed

@pytest.mark.skipif(not forked.CAN_FORK, reason='needs SIGKILL and a fork server')
def test_a_killed_process_leaves_logs_that_go_on(tmp_path):
    pytest.importorskip('tensorboard', reason='needs tensorboard')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(forked.PRELOAD)
    process = context.Process(target=trained, args=(tmp_path, KillCB(13)))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert max(step for _, step, _ in read_csv(tmp_path)[0]) == 13
    assert max(step for _, step, _ in read_tensorboard(tmp_path, 1)[0]) == 13
    time.sleep(1)          # TensorBoard reads its files in the order of their seconds
    time.sleep(1)           # TensorBoard tells its files apart by the second
    assert trained(tmp_path) == (1, 4)                   # after 11 steps
    for points, _ in read_csv(tmp_path), read_tensorboard(tmp_path, 1):
        steps = [step for name, step, _ in points if name == 'batch_loss']
        assert sorted(steps) == [*range(1, 22)]

@every_kind
def test_a_fit_that_begins_anew_replaces_the_curve(kept):
    for n in 2, 1:
        learner(MetricsCB(), TrackerCB(kept.make(), every=2)).fit(n)
    if type(kept.make()) is MLflowTracker:               # there each fit is a run
        pytest.raises(ValueError, kept.read)
        return
    points, settings = kept.read(n_fits=2)
    assert max(step for _, step, _ in points) == 7
    assert int(settings['n_epochs']) == 1


# ---- opening and closing -------------------------------------------------------------

class Notes:
    "A tracker that notes what it is told"
    def __init__(self): self.told = []
    def open(self, settings, step): self.told.append(('open', step))
    def __call__(self, numbers, step): self.told.append(step)
    def close(self, failed): self.told.append(('close', failed))

@pytest.mark.parametrize('error, failed', [
    (None, False), (CancelFit, False), (KeyError, True), (KeyboardInterrupt, True)])
def test_a_tracker_is_closed_whatever_happens(error, failed):
    crash = [CrashCB(0, 4, error)] if error else []
    notes = Notes()
    learn = learner(MetricsCB(), TrackerCB(notes, every=3), *crash)
    try: learn.fit(1)
    except (KeyError, KeyboardInterrupt): pass
    end = [] if error else [6, 7]
    assert notes.told == [('open', 0), 3, *end, ('close', failed)]

def test_a_fit_inside_an_except_clause_has_not_failed():
    notes = Notes()
    try: raise ValueError('earlier')
    except ValueError: learner(MetricsCB(), TrackerCB(notes)).fit(1)
    assert notes.told == [('open', 0), 7, ('close', False)]

def test_a_fit_that_is_refused_opens_nothing():
    class RefuseCB(Callback):
        order = 3000
        def before_fit(self, learn): raise ValueError('refused')
    notes = Notes()
    with pytest.raises(ValueError, match='refused'):
        learner(MetricsCB(), TrackerCB(notes), RefuseCB()).fit(1)
    assert notes.told == []

def test_a_fit_without_training_leaves_the_logs_alone(tmp_path):
    learn = learner(MetricsCB(), TrackerCB(CSVTracker(tmp_path/'a.csv')),
                    CSVLogCB(tmp_path/'b.csv'), notes := TrackerCB(Notes()))
    learn.fit(2)
    before = [(tmp_path/name).read_bytes() for name in ('a.csv', 'b.csv')]
    told = list(notes.log.told)
    learn.fit(1, train=False)
    assert [(tmp_path/name).read_bytes() for name in ('a.csv', 'b.csv')] == before
    assert notes.log.told == told

def test_mlflow_is_told_how_a_run_ended(database, tmp_path, monkeypatch):
    monkeypatch.setenv('MLFLOW_DISABLE_TELEMETRY', 'true')
    (tmp_path/'runs.db').write_bytes(database)
    def fit(name, *cbs):
        log = MLflowTracker(tmp_path.name, name, f'sqlite:///{tmp_path}/runs.db')
        learner(MetricsCB(), TrackerCB(log), *cbs).fit(1)
    fit('good')
    with pytest.raises(KeyError): fit('bad', CrashCB(0, 1))
    ended = {run.info.run_name: run.info.status
             for run in read_mlflow(tmp_path, all_runs=True)}
    assert ended == {'good': 'FINISHED', 'bad': 'FAILED'}
    import mlflow
    assert mlflow.active_run() is None                   # nobody else's run is touched

@pytest.mark.parametrize('package, make', [
    ('tensorboard', lambda: TensorBoardTracker('runs')),
    ('wandb', lambda: WandbTracker('clothes', 'one')),
    ('mlflow', lambda: MLflowTracker('clothes', 'one'))])
def test_a_missing_package_is_named_with_the_command(package, make, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'nntrain\[{package}\]'"):
        make()

def test_a_file_that_is_no_log_is_left_alone(tmp_path):
    (tmp_path/'run.csv').write_text('name,price\nbread,3\n', encoding='utf-8')
    with pytest.raises(ValueError, match='the column step: move it away'):
        learner(MetricsCB(), TrackerCB(CSVTracker(tmp_path/'run.csv'))).fit(1)
    assert (tmp_path/'run.csv').read_text(encoding='utf-8').endswith('bread,3\n')
    with pytest.raises(ValueError, match='is a folder'): CSVTracker(tmp_path)

def test_steps_that_a_spreadsheet_has_saved(tmp_path):
    path = tmp_path/'run.csv'
    path.write_text('step,loss\n2.0,1.5\n4,1.0\n', encoding='utf-8')
    (tracker := CSVTracker(path)).open({}, 3)
    tracker({'loss': .5}, 4)
    assert path.read_text(encoding='utf-8').split() == ['step,loss', '2,1.5', '4,0.5']
    for step in '', '2.5', 'two', 'nan', 'inf':
        path.write_text(f'step,loss\n{step},1.5\n', encoding='utf-8')
        with pytest.raises(ValueError, match=f'has a row whose step is {step!r}'):
            CSVTracker(path).open({}, 3)

def test_a_tracker_that_is_not_open_says_so(tmp_path):
    pytest.importorskip('tensorboard')
    for tracker in CSVTracker(tmp_path/'run.csv'), TensorBoardTracker(tmp_path):
        with pytest.raises(ValueError, match='is not open: give it to TrackerCB'):
            tracker({'loss': 1.}, 1)
    assert not list(tmp_path.iterdir())


# ---- Weights & Biases, offline -------------------------------------------------------

def read_wandb(path):
    "Points and settings of a file of W&B: records of protobuf in blocks of 32 KiB"
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, part, points, settings = path.read_bytes(), 7, b'', [], {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7: at += 32768 - at % 32768; continue
        length, kind = struct.unpack('<HB', data[at+4:at+7])
        part += data[at+7:at+7+length]
        at += 7 + length
        if kind not in (1, 4): continue                  # not yet whole
        record, part = Record.FromString(part), b''
        for one in record.run.config.update:
            settings[one.key] = json.loads(one.value_json)
        found = {item.key or '.'.join(item.nested_key): json.loads(item.value_json)
                 for item in record.history.item}
        points += [(name, found['_step'], value) for name, value in found.items()
                   if name[0] != '_']
    return points, settings

WANDB = '''
import sys
sys.path.insert(0, 'tests')
from test_trackers import *
calls = []
def fit(name, *cbs):
    tracker = WandbTracker('clothes', name, mode='offline', dir=sys.argv[1])
    learn = learner(MetricsCB(), TrackerCB(lambda *call: calls.append(call), every=3),
                    TrackerCB(tracker, every=3), *cbs)
    learn.fit(2)
    assert not hasattr(tracker, 'run')                   # closed
try: fit('bad', CrashCB(0, 4))
except KeyError: calls.clear()
fit('good')
print(json.dumps(calls))
'''

def test_wandb_offline_writes_a_file_and_sends_nothing(tmp_path, root):
    pytest.importorskip('wandb', reason='needs wandb')
    with socket.create_server(('127.0.0.1', 0)) as nobody:
        address = f'http://127.0.0.1:{nobody.getsockname()[1]}'
        proxies = dict.fromkeys(['HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'], address)
        env = {k: v for k, v in os.environ.items() if not k.startswith('WANDB_')}
        env |= proxies | dict(
            WANDB_BASE_URL=address, WANDB_ERROR_REPORTING='false', WANDB_SILENT='true',
            HOME=str(tmp_path), PYTHONPATH=str(root))     # no login
        done = subprocess.run([sys.executable, '-c', WANDB, str(tmp_path)], env=env,
                              cwd=root, capture_output=True, text=True, timeout=300)
        if 'wandb' in done.stderr and 'service' in done.stderr.lower():
            pytest.skip(f'the service of wandb does not start: {done.stderr[-300:]}')
        assert done.returncode == 0, done.stderr
        nobody.settimeout(0)
        with pytest.raises(BlockingIOError): nobody.accept()   # nobody called
    calls = json.loads(done.stdout.splitlines()[-1])
    wanted = flat(calls)
    path, = tmp_path.glob('wandb/offline-run-*-good/run-good.wandb')
    points, settings = read_wandb(path)
    assert len(points) == len(wanted)
    assert all(value == wanted[name, step] for name, step, value in points)
    assert settings['optimizer'] == 'SGD' and settings['n_epochs'] == 2
    assert list(tmp_path.glob('wandb/offline-run-*-bad/run-bad.wandb'))

def test_wandb_goes_on_with_a_run_of_the_same_name(monkeypatch):
    "What it is asked for, and that steps which it has are not sent again"
    pytest.importorskip('wandb', reason='needs wandb')
    import wandb
    asked, logged, run = [], [], SimpleNamespace(step=5)
    run.log = lambda numbers, step: logged.append(step)
    run.finish = lambda exit_code: logged.append(f'exit code {exit_code}')
    monkeypatch.setattr(wandb, 'init', lambda **how: asked.append(how) or run)
    tracker = WandbTracker('clothes', 'one', group='shirts')
    for step in 0, 3:
        tracker.open({'lr': .1}, step)
        for i in 4, 5, 6: tracker({'loss': 1.}, i)
        tracker.close(failed=bool(step))
    same = dict(project='clothes', id='one', group='shirts', reinit='create_new')
    assert asked == [same | dict(resume='never', config={'lr': .1}),
                     same | dict(resume='allow')]
    assert logged == [5, 6, 'exit code 0', 5, 6, 'exit code 1']


# ---- the settings of a run -----------------------------------------------------------

def test_settings_are_numbers_and_text(tmp_path):
    class Two:
        def __call__(self, preds, targets): return F.cross_entropy(preds, targets)
    seen = []
    class LookCB(Callback):
        def before_epoch(self, learn): seen.append(run_settings(learn))
    learn = learner(
        MetricsCB(), MixedPrecisionCB(torch.bfloat16), GradientAccumulationCB(2),
        TorchSchedulerCB(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 3)),
        LookCB(), LookCB(), CSVLogCB(tmp_path/'a.csv'),
        opt_func=lambda params, lr: torch.optim.Adam(
            [{'params': [p], 'name': name} for p, name in zip(params, 'wb')],
            lr=torch.tensor(lr)))
    learn.loss_func = Two()
    learn.fit(1)
    found = seen[0]
    assert found['loss_func'] == 'Two' and found['n_steps'] == 4
    assert found['lr_w'] == found['lr_b'] == pytest.approx(.1)
    assert found['betas_w'] == '(0.9, 0.999)'
    assert found['MixedPrecisionCB.dtype'] == 'torch.bfloat16'
    assert found['TorchSchedulerCB.scheduler.step_size'] == 3
    assert all(isinstance(v, (int, float, str)) for v in found.values())
    json.dumps(found)


# ---- rates ---------------------------------------------------------------------------

def two_groups(*names):
    def make(params, lr):
        groups = [{'params': [p], 'lr': lr/(k+1)} for k, p in enumerate(params)]
        for group, name in zip(groups, names): group['name'] = name
        return torch.optim.SGD(groups, lr=lr, momentum=.9)
    return make

@pytest.mark.parametrize('opt_func, names', [
    (SGD, ['lr']), (torch.optim.SGD, ['lr', 'momentum']),
    (torch.optim.Adam, ['lr', 'momentum']),
    (two_groups(), ['lr_0', 'lr_1', 'momentum_0', 'momentum_1']),
    (two_groups('body', 'head'), ['lr_body', 'lr_head', 'momentum_body',
                                  'momentum_head']),
    (two_groups('same', 'same'), ['lr_0', 'lr_1', 'momentum_0', 'momentum_1'])])
def test_rates_have_one_name_per_group(opt_func, names):
    calls = []
    learn = learner(
        MetricsCB(), LearningRateCB(),
        TrackerCB(lambda *call: calls.append(call), every=7), opt_func=opt_func)
    learn.fit(1)
    assert [k for k in calls[0][0] if k != 'batch_loss'] == names
    row = learn.history[0]
    assert list(row)[-len(names):] == names and row[names[0]] == .1
    if len(names) == 4: assert row[names[1]] == .05 and row[names[2]] == .9
    if opt_func is torch.optim.Adam: assert row['momentum'] == .9     # beta1

def step_lr(opt): return torch.optim.lr_scheduler.ExponentialLR(opt, .5)

@pytest.mark.parametrize('scheduler', [
    lambda: AnnealCB(.5), lambda: TorchSchedulerCB(step_lr),
    lambda: ScheduleCB(lr=lambda progress: .1*.5**round(13*progress))])
@pytest.mark.parametrize('first', [True, False], ids=['first', 'last'])
def test_rates_are_those_that_the_steps_used(scheduler, first):
    calls = []
    logs = [LearningRateCB(), TrackerCB(lambda *call: calls.append(call), every=1)]
    cbs = [*logs, scheduler()] if first else [scheduler(), *logs]
    learn = learner(MetricsCB(), *cbs)
    learn.fit(2)
    used = [numbers['lr'] for numbers, _ in calls if 'batch_loss' in numbers]
    assert used == pytest.approx([.1*.5**i for i in range(14)])
    assert [row['lr'] for row in learn.history] == pytest.approx([used[6], used[13]])

def test_rates_are_none_of_steps_that_were_left_out():
    "The last group of the epoch is not taken: its rate is no rate of a step"
    class LeaveOutCB(Callback):
        def before_batch(self, learn):
            if learn.training: learn.opt.param_groups[0]['lr'] = .1*(learn.iter + 1)
        def after_backward(self, learn):
            if learn.iter > 3: raise CancelStep()
    learn = learner(MetricsCB(), LearningRateCB(), LeaveOutCB())
    learn.fit(1)
    assert learn.history[0]['lr'] == pytest.approx(.4)


# ---- more columns in the history -----------------------------------------------------

def test_columns_are_there_before_anyone_reads_a_row(tmp_path, capsys):
    rows = []
    def cbs():
        return [LearningRateCB(), ThroughputCB(), ProgressCB(),
                CSVLogCB(tmp_path/'log.csv'),
                TrackerCB(lambda numbers, step: rows.append(numbers)), MetricsCB()]
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        made = cbs()
        learner(*(made[i] for i in order)).fit(1)
        wanted = {'lr', 'momentum', 'samples_per_second', 'peak_gb'}
        assert wanted <= {*rows[-1]}
        with open(tmp_path/'log.csv', newline='', encoding='utf-8') as f:
            assert wanted <= {*next(csv.reader(f))}
        assert 'samples_per_second' in capsys.readouterr().out

def test_columns_are_no_metrics():
    learn = learner(MetricsCB(), LearningRateCB(), ThroughputCB()); learn.fit(1)
    with pytest.raises(ValueError, match=r"it has \['loss'\]"):
        plot_history(learn.history, 'per_second')
    row = dict(epoch=0, lr=1e-5, momentum=0., samples_per_second=123456.7)
    assert history_table([row]).splitlines()[2] == '| 0 | 1.0e-05 | 0.0000 | 123457 |'
    row = dict(epoch=0, train_loss=math.nan, valid_loss=math.inf)
    assert history_table([row]).splitlines()[2] == '| 0 | nan | inf |'

def test_two_may_not_give_the_same_column():
    with pytest.raises(ValueError, match='would both write the column lr'):
        learner(MetricsCB(), LearningRateCB(), LearningRateCB()).fit(1)

def test_who_only_looks_on_changes_nothing(tmp_path):
    plain, seen = learner(), learner(
        MetricsCB(), LearningRateCB(), ThroughputCB(1), ProfileCB(1, 2),
        TrackerCB(CSVTracker(tmp_path/'run.csv'), every=1))
    plain.fit(2), seen.fit(2)
    assert_close(seen.model.weight, plain.model.weight, rtol=0, atol=0)
    assert all(cb.watches for cb in seen.cbs)
    seen.fit(1, train=False)
    assert {*seen.history[0]} == {'epoch', 'valid_loss', 'seconds'}


# ---- samples per second, and memory --------------------------------------------------

class Clock:
    "A clock that only moves when somebody says so"
    def __init__(self): self.now = 0.
    def __call__(self): return self.now

@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profiling.time, 'perf_counter', clock)
    return clock

class SlowCB(Callback):
    "Each training batch takes a second, the first three take ten, validation a minute"
    watches = True
    def __init__(self, clock): self.clock, self.n = clock, 0
    def after_predict(self, learn):
        self.n += learn.training
        self.clock.now += 60 if not learn.training else 10 if self.n <= 3 else 1

def test_throughput_is_that_of_training_without_warm_up(clock):
    def fit(skip, *cbs):
        learn = learner(MetricsCB(), ThroughputCB(skip), SlowCB(clock), *cbs)
        learn.fit(2)
        return learn.history
    def speeds(*args): return [row.get('samples_per_second') for row in fit(*args)]
    assert speeds(0) == pytest.approx([50/34, 50/7])
    assert speeds(3) == pytest.approx([26/4, 50/7])      # 8 + 8 + 8 + 2 samples
    assert speeds(7) == [None, pytest.approx(50/7)]      # the first epoch: none left
    assert speeds(3, BatchLimitCB(5)) == pytest.approx([16/2, 40/5])
    with pytest.raises(ValueError, match='skip must be'): ThroughputCB(-1)

@pytest.mark.parametrize('at', [(1, 2), (1, 4), (1, 6), (2, None)])
def test_throughput_and_rates_go_on_after_a_crash(clock, tmp_path, at):
    def fit(*cbs):
        learn = learner(MetricsCB(), ThroughputCB(), LearningRateCB(), SlowCB(clock),
                        ScheduleCB(lr=linear(.1, 0.)))
        clock.now += 1000                                # the way back takes its time
        learn.fit(3, cbs=[*cbs, CheckpointCB(tmp_path/'c.pt', every_batches=1,
                                             quiet=True)])
        return learn.history
    with pytest.raises(KeyError): fit(CrashCB(*at))
    rows = fit()
    assert [row['lr'] for row in rows] == pytest.approx(
        [.1*(1 - i/20) for i in (6, 13, 20)])
    new = [row['samples_per_second'] for row in rows]
    assert new[0] == pytest.approx(50/34)
    left = 7 - at[1] - 1 if at[1] is not None else 0     # slow batches after a restart
    slow = min(3, left)
    assert new[1] == pytest.approx(50/(7 + 9*slow))

def test_memory_is_the_peak_so_far():
    learn = learner(MetricsCB(), ThroughputCB())
    learn.fit(1)
    block = torch.ones(100_000_000)                      # 400 MB, really touched
    learn.fit(1)
    after = learn.history[0]['peak_gb']
    del block
    learn.fit(1)
    assert after > .4 and learn.history[0]['peak_gb'] >= after

def test_a_changed_setting_is_noticed(tmp_path):
    def fit(skip, *cbs):
        learner(MetricsCB(), ThroughputCB(skip)).fit(2, cbs=[
            CheckpointCB(tmp_path/'c.pt', quiet=True), *cbs])
    with pytest.raises(KeyError): fit(1, CrashCB(1, 2))
    with pytest.raises(ValueError, match='skip of ThroughputCB was 1, is 2'): fit(2)

def test_a_tracker_may_come_and_go_with_a_resume(tmp_path):
    def fit(*cbs):
        saved = CheckpointCB(tmp_path/'c.pt', quiet=True)
        learner(MetricsCB()).fit(2, cbs=[saved, *cbs])
    with pytest.raises(KeyError): fit(CrashCB(1, 2))
    fit(TrackerCB(CSVTracker(tmp_path/'run.csv'), every=2))
    with open(tmp_path/'run.csv', newline='', encoding='utf-8') as f:
        assert [int(row['step']) for row in csv.DictReader(f)] == [8, 10, 12, 14]


# ---- where the time of a batch goes --------------------------------------------------

class TimedLearner(Learner):
    "Its verbs take 1, 2, 3, 4 and 5 ms of a clock that they move"
    def _take(self, ms): self.clock.now += ms/1000
    def predict(self): self._take(1); super().predict()
    def get_loss(self): self._take(2); super().get_loss()
    def backward(self): self._take(3); super().backward()
    def step(self): self._take(4); super().step()
    def zero_grad(self): self._take(5); super().zero_grad()

class SlowLoader(list):
    def __iter__(self):
        for batch in list.__iter__(self):
            self.clock.now += .02
            yield batch

class OtherCB(Callback):
    watches = True
    def after_loss(self, learn): learn.clock.now += .006

def timed(clock, *cbs, n=7):
    set_seed(0)
    batch = torch.randn(8, 4), torch.randint(0, 3, (8,))
    loader = SlowLoader([batch]*n)
    loader.clock = clock
    learn = TimedLearner(nn.Linear(4, 3), DataLoaders(loader, [batch]), F.cross_entropy,
                         torch.optim.SGD, .1, [OtherCB(), *cbs])
    learn.clock = clock
    return learn

@pytest.mark.parametrize('skip, n', [(0, 3), (2, 3), (6, 3), (2, 99)])
def test_parts_of_a_batch(clock, skip, n):
    learn = timed(clock, profile := ProfileCB(skip, n))
    learn.fit(1)
    assert profile.parts() == pytest.approx(
        dict(loading=20, forward=1, loss=2, backward=3, step=9, other=6))
    assert learn.verbs == {}
    learn.fit(1)                                         # and again
    assert sum(profile.parts().values()) == pytest.approx(41)

def test_parts_of_batches_whose_steps_are_left_out(clock):
    learn = timed(clock, profile := ProfileCB(0, 4), GradientAccumulationCB(2))
    learn.fit(1)
    assert profile.parts() == pytest.approx(
        dict(loading=20, forward=1, loss=2, backward=3, step=4.5, other=6))

def test_a_resumed_run_can_be_profiled(clock, tmp_path):
    def saved(): return CheckpointCB(tmp_path/'c.pt', every_batches=2, quiet=True)
    with pytest.raises(KeyError): timed(clock).fit(1, cbs=[saved(), CrashCB(0, 3)])
    profile = ProfileCB(1, 2)
    timed(clock).fit(1, cbs=[saved(), profile])
    assert profile.parts()['loading'] == pytest.approx(20)

def test_the_clock_of_a_device_is_asked(monkeypatch):
    "A GPU works through a queue: its own events tell the time"
    class Event:
        def __init__(self, enable_timing): assert enable_timing
        def record(self): self.at = 7
        def elapsed_time(self, other): return other.at - self.at
    monkeypatch.setattr(torch, 'made_up', SimpleNamespace(Event=Event), raising=False)
    a, b = (profiling._mark(SimpleNamespace(type='made_up')) for _ in range(2))
    assert profiling._ms(a, b) == 0 and isinstance(a, Event)

def test_the_picture_says_it_in_words_on_a_telephone(clock):
    learn = timed(clock, profile := ProfileCB()); learn.fit(1)
    ax = profile.plot()
    figure = ax.figure
    figure.canvas.draw()
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        'loading', 'forward', 'loss', 'backward', 'step', 'other']
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([20, 1, 2, 3, 9, 6])
    labels = [t.get_text() for t in ax.texts]
    assert labels[0] == '20.0 ms, 49%' and labels[4] == '9.0 ms, 22%'
    assert ax.get_title() == '41.0 ms a batch, most of it loading'
    assert figure.get_size_inches()[0]*100 <= 450    # at 360 pixels: 10 points are 8
    whole = figure.bbox
    for text in [*ax.texts, ax.title, *ax.get_yticklabels()]:
        box = text.get_window_extent()
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1, text.get_text()
        assert text.get_fontsize() >= 10
    bars = [bar.get_window_extent().y0 for bar in ax.patches]
    assert bars == sorted(bars, reverse=True)            # loading is above
    assert profile.plot(ax := plt.subplots()[1]) is ax
    plt.close('all')

def test_nothing_recorded_is_said(tmp_path):
    profile = ProfileCB(skip=50)
    for ask in profile.table, profile.parts, profile.plot:
        with pytest.raises(ValueError, match='more than skip=50'): ask()
    learner(profile).fit(1)
    with pytest.raises(ValueError, match='nothing was recorded'): profile.parts()
    with pytest.raises(ValueError, match='is a folder'): ProfileCB(trace=tmp_path)

def test_a_trace_is_whole_or_not_there(tmp_path):
    profile = ProfileCB(1, 1, trace=tmp_path/'deep/trace.json')
    learner(profile).fit(1)
    assert json.loads((tmp_path/'deep/trace.json').read_text())['traceEvents']
    assert [p.name for p in (tmp_path/'deep').iterdir()] == ['trace.json']
    with pytest.raises(KeyError): learner(profile, CrashCB(0, 1)).fit(1)
    assert json.loads((tmp_path/'deep/trace.json').read_text())['traceEvents']


# ---- two processes -------------------------------------------------------------------

@pytest.fixture(scope='module')
def two():
    pytest.importorskip('accelerate')
    processes = Processes(2)
    processes.run('''
import os, torch, torch.nn.functional as F
from torch import nn
from nntrain import profiling
from nntrain.callback import Callback
from nntrain.data import DataLoaders
from nntrain.distributed import *
from nntrain.learner import Learner
from nntrain.logs import *
from nntrain.metrics import *
from nntrain.profiling import *
from nntrain.trackers import *
''')
    yield processes
    processes.close()

def test_two_processes_count_all_samples_and_log_once(two, tmp_path):
    def fit(folder):
        clock = [0.]
        profiling.time.perf_counter = lambda: clock[0]
        profiling._peak_gb = lambda device: 1. + learn.world.rank
        class SlowCB(Callback):                          # the second process is slower
            watches = True
            def after_predict(self, learn):
                if learn.training: clock[0] += 1 + learn.world.rank
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(50, 4, generator=g), torch.randint(0, 3, (50,), generator=g)
        dls = DataLoaders.from_tensors((x, y), (x, y), batch_size=7, seed=0)
        torch.manual_seed(0)
        opened = []
        class Notes(CSVTracker):
            def open(self, settings, step):
                super().open(settings, step)
                opened.append(settings['processes'])
        tracker = Notes(os.path.join(folder, 'run.csv'))
        profile = ProfileCB(1, 2)
        learn = Learner(nn.Linear(4, 3), dls, F.cross_entropy, torch.optim.SGD, .1, [
            AccelerateCB(), MetricsCB(), ThroughputCB(), LearningRateCB(), SlowCB(),
            TrackerCB(tracker, every=4), profile])
        learn.fit(2)
        return learn.history, opened, profile.profile is not None
    two.define()
    (rows, opened, profiled), (others, opened_too, profiled_too) = two.run(
        fit, str(tmp_path), show=False)
    assert rows == others                                # all columns, seconds too
    for row in rows:                                     # 8 batches of 7, the last of 1
        assert row['samples_per_second'] == pytest.approx(50/16)
        assert row['peak_gb'] == 2 and row['lr'] == .1
    assert (opened, opened_too) == ([2], [])
    assert (profiled, profiled_too) == (True, False)
    with open(tmp_path/'run.csv', newline='', encoding='utf-8') as f:
        assert [int(row['step']) for row in csv.DictReader(f)] == [4, 8, 12, 16]
