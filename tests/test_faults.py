"""Faults survived: an error, Ctrl-C and signals at every event of a fit, a full disk, a
folder that cannot be written to, two processes that fill one cache, a bad hub"""
import multiprocessing
import os
import pickle
import random
import shutil
import signal
from errno import EFBIG, ENOSPC, EROFS
from pathlib import Path

import forked
import pytest
import torch
from fault_hub import Hub, client, hub_files
from fault_runs import (FILES, N_EPOCHS, FaultCB, TrainedCB, command_on_a_bad_disk,
                        disk_bad_for_a_while, ended, killed_while_writing,
                        on_a_bad_disk, report, signalled, usual)
from tqdm import tqdm

from nntrain.checkpoint_file import read_checkpoint
from nntrain.compare import set_seed
from nntrain.events import EVENTS
from nntrain.learner import World
from nntrain.logs import TrackerCB, _read_log
from nntrain.run_folder import SaveRunCB
from nntrain.state import random_state, set_random_state
from nntrain.trackers import CSVTracker


# ---- at every event of a fit ---------------------------------------------------------

def same_bits(a, b):
    torch.testing.assert_close(
        a, b, rtol=0, atol=0, equal_nan=True) if isinstance(a, torch.Tensor) else None
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for k in a: same_bits(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for v, w in zip(a, b): same_bits(v, w)
    elif not isinstance(a, torch.Tensor): assert a == b

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed')
    learn = usual(folder)
    learn.fit(N_EPOCHS)
    return ended(learn, folder)

def check_files(folder):
    "Every file is whole, and there is no other"
    names = {p.name for p in folder.iterdir()}
    assert names <= set(FILES)
    if 'run.pt' in names: read_checkpoint(folder/'run.pt')
    if 'best.pt' in names: torch.load(folder/'best.pt', weights_only=True)
    if 'log.csv' in names: assert all(len(r) > 3 for r in _read_log(folder/'log.csv'))

def check_sane(learn, trained, handlers):
    "Nothing of the fit is left in the learner or in torch"
    same_bits(dict(learn.model.state_dict()), dict(trained.state))
    assert not learn.fitting and type(learn.world) is World and not learn.verbs
    assert learn.dl is None and {*learn.active} == {*learn.cbs}
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu')
    for m in learn.model.modules():
        hooks = [v for k, v in vars(m).items() if k.endswith('_hooks')]
        assert hooks and not any(hooks)
    for p in learn.model.parameters(): assert not p._backward_hooks
    assert [signal.getsignal(s) for s in SIGNALS] == handlers
    assert not [bar for bar in tqdm._instances if not bar.disable]

SIGNALS = [signal.SIGINT, signal.SIGTERM]

class PowerFailure(Exception): pass

def strikes(kind):
    def strike(): raise kind('at this place')
    return strike

INSIDE = '_phase', '_batch', 'predict', 'loss'    # also in a validation
PLACES = [(event, phase, order) for event in EVENTS for order in (-4000, 4000)
          for phase in ('train', 'valid')
          if phase == 'train' or event.endswith(INSIDE)]

@pytest.mark.parametrize('event, phase, order', PLACES)
@pytest.mark.parametrize('kind', [PowerFailure, KeyboardInterrupt])
def test_an_error_at_any_event(tmp_path, undisturbed, kind, event, phase, order):
    """A new learner goes on after an error; after Ctrl-C the same one does, as in a
    notebook"""
    trained = TrainedCB()
    fault = FaultCB(event, strikes(kind), phase, order)
    learn = usual(tmp_path)
    handlers = [signal.getsignal(s) for s in SIGNALS]
    dice = random_state()
    with pytest.raises(kind, match='at this place'):
        learn.fit(N_EPOCHS, cbs=[trained, fault])
    check_files(tmp_path)
    check_sane(learn, trained, handlers)
    begun = (tmp_path/'run.pt').exists()
    if kind is PowerFailure: learn = usual(tmp_path)
    if begun: set_seed(random.randrange(1000))
    else: set_random_state(dice)
    learn.fit(N_EPOCHS)
    same_bits(ended(learn, tmp_path), undisturbed)

@pytest.mark.parametrize('event', ['after_backward', 'cleanup_phase', 'after_epoch'])
def test_the_best_weights_come_back_after_ctrl_c(tmp_path, event):
    "They are in the model then, and the run goes on from the trained ones all the same"
    (tmp_path/'whole').mkdir(), (tmp_path/'cut').mkdir()
    whole = usual(tmp_path/'whole', restore=True)
    whole.fit(N_EPOCHS)
    learn = usual(tmp_path/'cut', restore=True)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(N_EPOCHS, cbs=[FaultCB(event, strikes(KeyboardInterrupt))])
    best = torch.load(tmp_path/'cut/best.pt', weights_only=True)
    same_bits(dict(learn.model.state_dict()), dict(best))
    learn.fit(N_EPOCHS)
    same_bits(ended(learn, tmp_path/'cut'), ended(whole, tmp_path/'whole'))


# ---- in processes of their own -------------------------------------------------------

needs_fork = pytest.mark.skipif(
    not forked.CAN_FORK or not hasattr(signal, 'SIGKILL'), reason='needs fork, SIGKILL')

def forking():
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([*forked.PRELOAD, 'fault_runs'])
    return context

def in_a_process(target, *args, timeout=120):
    "Call `target` of fault_runs in a forked process -> its exit code"
    process = forking().Process(target=target, args=args)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill(), process.join()
        raise TimeoutError(f'{target.__name__}{args} took longer than {timeout} s')
    return process.exitcode

def goes_on(folder, undisturbed):
    "A new learner ends as if nothing had happened"
    learn = usual(folder)
    if (folder/'run.pt').exists(): set_seed(random.randrange(1000))
    learn.fit(N_EPOCHS)
    same_bits(ended(learn, folder), undisturbed)

@needs_fork
@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('name', ['SIGKILL', 'SIGTERM'])
def test_a_signal_at_any_event(tmp_path, undisturbed, name, event):
    number, i = getattr(signal, name), EVENTS.index(event)
    phase = 'valid' if event.endswith(INSIDE) and i % 2 else 'train'
    order = 4000*(-1)**(i//2)
    code = in_a_process(signalled, str(tmp_path), number, event, phase, order)
    check_files(tmp_path)
    if name == 'SIGKILL': assert code == -number
    else:       # a checkpoint at the end of the batch, or of the phase without steps
        assert code == 128 + number
        found = read_checkpoint(tmp_path/'run.pt')
        first, last = {'before_fit': [(0, 1)]*2, 'after_fit': [(3, 0)]*2,
                       'cleanup_fit': [(3, 0)]*2}.get(event, [(1, 1), (2, 1)])
        assert first <= (found['epoch'], found['batch']) <= last
    goes_on(tmp_path, undisturbed)

@needs_fork
@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('name', FILES)
def test_killed_while_writing(tmp_path, undisturbed, name, half):
    "The earlier file is whole, and nothing unfinished is left once the run has gone on"
    code = in_a_process(killed_while_writing, str(tmp_path), name, 2, half)
    assert code == -signal.SIGKILL
    unfinished = [p for p in tmp_path.iterdir() if p.name not in FILES]
    assert [p.suffix for p in unfinished] == [(tmp_path/name).suffix]
    for p in unfinished: p.rename(tmp_path.parent/p.name)
    check_files(tmp_path)
    for p in unfinished: (tmp_path.parent/p.name).rename(p)
    goes_on(tmp_path, undisturbed)

@pytest.mark.parametrize('name', [*FILES, 'points.csv', 'points.settings.json', *(
    pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=(
        'SaveRunCB does not sweep away what killed writers have left')))
    for name in ('options.json', 'history.csv', 'curves.png'))])
def test_what_killed_writers_have_left_is_swept_away(tmp_path, name):
    "By the callback that writes the file, and nothing else of a like name"
    stem, suffix, mark = Path(name).stem, Path(name).suffix, '0123456789abcdef'*2
    left = tmp_path/f'.{stem}.unfinished-{mark}{suffix}'
    kept = [tmp_path/f'.{stem}.unfinished-notes{suffix}', tmp_path/f'my-{name}',
            tmp_path/f'.other.unfinished-{mark}{suffix}']
    for path in left, *kept: path.write_text('mine')
    points = TrackerCB(CSVTracker(tmp_path/'points.csv'))
    usual(tmp_path, SaveRunCB(tmp_path, {}), points).fit(1)
    assert [path.read_text() for path in kept] == ['mine']*3
    assert not left.exists()


# ---- disks ---------------------------------------------------------------------------

def heard_from(target, *args, timeout=120):
    "What `target(*args)` of fault_runs gives in a forked process"
    mine, theirs = forking().Pipe(duplex=False)
    process = forking().Process(target=report, args=(theirs, target, *args))
    process.start()
    theirs.close()
    try:
        if not mine.poll(timeout): raise TimeoutError(f'{target.__name__}{args}')
        said = pickle.loads(mine.recv_bytes())
    finally: process.kill(), process.join()
    if isinstance(said, Exception): raise said
    if isinstance(said, str): pytest.skip(said)
    return said

REASONS = {'full': os.strerror(ENOSPC), 'read-only': os.strerror(EROFS),
           'limited': os.strerror(EFBIG)}

@pytest.fixture(scope='module')
def said_on(tmp_path_factory):
    "{how the disk is bad: {name of a file: what its writer said, nothing changed?}}"
    said = {}
    def ask(how):
        if how not in said:
            folder = str(tmp_path_factory.mktemp(how))
            said[how] = heard_from(on_a_bad_disk, folder, how)
        return said[how]
    return ask

@needs_fork
@pytest.mark.parametrize('how', REASONS)
@pytest.mark.parametrize('name', [
    pytest.param('run.pt', marks=pytest.mark.xfail(strict=True, reason=(
        'the writer of checkpoints forgets why it failed: write_checkpoint should use '
        '_save_tensors'))),
    'best.pt', 'log.csv', 'options.json', 'curves.png', 'values.json', 'row.json'])
def test_a_file_that_cannot_be_written(said_on, name, how):
    "One sentence names the file and the reason; the old file stays, and nothing else"
    error, unchanged = said_on(how)[name]
    assert unchanged
    kinds, number, text = error
    assert OSError in kinds and number is not None, error
    assert name in text and REASONS[how] in text, text
    assert 'unfinished' not in text and '.part' not in text and '\n' not in text, text

@needs_fork
@pytest.mark.parametrize('how', REASONS)
def test_a_disk_that_is_bad_for_a_while(tmp_path, undisturbed, how):
    "The fit ends with the trained weights in the model, and goes on once there is room"
    event = {'full': 'before_epoch', 'read-only': 'after_backward',
             'limited': 'before_phase'}[how]
    error, (state, trained), names, end = heard_from(
        disk_bad_for_a_while, str(tmp_path), how, event)
    assert error is not None and names == FILES
    same_bits(state, trained)
    same_bits(end, undisturbed)

@needs_fork
@pytest.mark.parametrize('how', REASONS)
def test_the_command_on_a_bad_disk(tmp_path, how):
    "Exit status 2 and one line with the reason; no file is left"
    code, lines, files = heard_from(command_on_a_bad_disk, str(tmp_path), how)
    (line,) = lines
    assert code == 2 and line.startswith('nntrain_fit: error: ') and files == []
    assert REASONS[how] in line and str(tmp_path) in line, line


# ---- a hub that refuses, hangs, sends half; two that fill one cache ------------------

class Client:
    "Asks a hub for Fashion-MNIST, in a process of its own"
    def __init__(self, hub, home):
        self.home = home
        self.pipe, theirs = forking().Pipe()
        self.process = forking().Process(
            target=client, args=(theirs, hub.address, str(home)), daemon=True)
        self.process.start()
        theirs.close()
    def send(self, source): self.pipe.send(source)
    def hear(self, timeout=120):
        assert self.pipe.poll(timeout), 'the client does not answer'
        return self.pipe.recv()
    def ask(self, source): self.send(source); return self.hear()
    def files(self):
        "Those of the data set that a later download would use, and the user's"
        paths = {p.relative_to(self.home): p for p in self.home.rglob('*')}
        return {str(name) for name, p in paths.items()
                if p.is_file() and p.suffix not in ('.lock', '.incomplete')}
    def forget(self):
        for folder in 'hub/datasets--zalando-datasets--fashion_mnist', (
            'datasets/zalando-datasets___fashion_mnist'):
            shutil.rmtree(self.home/folder, ignore_errors=True)

@pytest.fixture(scope='module')
def hub():
    with Hub(hub_files()) as server:
        yield server
        server.shutdown()

@pytest.fixture(scope='module')
def clients(hub, tmp_path_factory):
    "Two, with one cache, which also holds what is the user's own"
    home = tmp_path_factory.mktemp('cache')
    for name in 'hub/datasets--mine/blobs/a', 'datasets/mine/data.arrow', 'token':
        (home/name).parent.mkdir(parents=True, exist_ok=True)
        (home/name).write_text('mine')
    both = Client(hub, home), Client(hub, home)
    for one in both: assert one.hear() == 'ready'
    yield both
    for one in both:
        one.send(None)
        one.process.join(20)
        one.process.kill()

@pytest.fixture
def asking(hub, clients):
    "The first client, with an empty cache and a hub in order"
    hub.mode = 'ok'
    clients[0].forget()
    yield clients[0]
    hub.mode = 'ok'
    for name in 'hub/datasets--mine/blobs/a', 'datasets/mine/data.arrow', 'token':
        assert (clients[0].home/name).read_text() == 'mine'

TROUBLE = {  # what a message says
    'close': 'cannot be reached', '404': 'answered with status 404',
    '500': 'answered with status 500', 'page': 'a page of another kind',
    'hang': 'cannot be reached (ReadTimeout', 'half': 'the download failed (',
    'truncated': 'the download failed (', 'hanging file': 'the download failed (',
    'truncated, no types': 'the download failed ('}

@needs_fork
@pytest.mark.parametrize('mode', TROUBLE)
def test_a_hub_that_fails(hub, asking, mode):
    """Who names the hub gets one sentence; `auto` draws clothes, and says why; a later
    try succeeds"""
    hub.mode = mode
    said = asking.ask('hub')
    assert 'ConnectionError' in said['kinds'] and 'OSError' in said['kinds'], said
    text = said['text']
    assert text.startswith('no Fashion-MNIST from the Hugging Face hub: '), text
    assert TROUBLE[mode] in text and text.endswith('set NNTRAIN_DATA=FOLDER.'), text
    assert '\n' not in text and '..' not in text and not said['notices'], text
    if mode == '404' or mode.startswith('truncated'):
        said = asking.ask('auto')
        assert said['source'] == 'toy' and len(said['notices']) == 1, said
        assert TROUBLE[mode] in said['notices'][0]
    hub.mode = 'ok'
    for source in 'hub', 'auto':
        said = asking.ask(source)
        assert said.get('source') == 'hub' and not said['notices'], said
        assert {k: n for k, (n, *_) in said['sums'].items()} == dict(train=60, test=20)

@needs_fork
def test_a_cache_that_is_whole_asks_nobody(hub, asking):
    assert asking.ask('hub')['source'] == 'hub'
    before, hub.mode = asking.files(), 'close'
    assert asking.ask('auto')['source'] == 'hub' and asking.files() == before

@needs_fork
def test_two_processes_that_fill_one_cache(hub, asking, clients):
    "Both get all data, and so does a third who comes later; each file was fetched once"
    hub.mode, hub.gets[:] = 'slow', []
    for one in clients: one.send('hub')
    first, second = (one.hear() for one in clients)
    assert first == second and first['source'] == 'hub', (first, second)
    assert sorted(hub.gets) == sorted(set(hub.gets))
    hub.mode = 'close'
    assert asking.ask('hub') == first
    assert not [p for p in asking.home.rglob('*') if '.incomplete' in p.name and
                p.suffix != '.lock']
