"""Checkpoints of several processes: killed at any moment, one or all of them, they go
on to the same bits. `nursery.py` forks and kills them (gloo, loopback)."""
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nntrain.checkpoint_file import read_checkpoint

from nursery import no_clock
from same_bits import same_bits

pytestmark = pytest.mark.skipif(
    not hasattr(os, 'fork') or not hasattr(signal, 'SIGKILL'),
    reason='needs fork and SIGKILL')
KILLED = -signal.SIGKILL


@pytest.fixture(scope='module')
def live():
    "live(folder, ranks=…, kill=…) -> exit codes, seconds"
    nursery = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name('nursery.py'))], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    def ask(folder, ranks=2, **kwargs):
        folder.mkdir(exist_ok=True)
        begun = (folder/'run.pt').exists()
        seed = random.randrange(1, 10**6) if begun else 0    # a new life, other numbers
        words = dict(folder=str(folder), seed=seed, ranks=ranks, **kwargs)
        nursery.stdin.write(json.dumps(words) + '\n')
        nursery.stdin.flush()
        answer = json.loads(nursery.stdout.readline())
        return answer['codes'], answer['seconds']
    yield ask
    nursery.stdin.close()
    nursery.wait(60)


def calm_run(live, folder, ranks=2, **kwargs):
    "The undisturbed run: {place: state} of each rank, their ends, seconds"
    codes, seconds = live(folder, ranks, calm=True, **kwargs)
    assert codes == [0]*ranks, errors(folder)
    states = [torch.load(folder/f'states{rank}.pt') for rank in range(ranks)]
    return states, ends(folder, ranks), seconds


def ends(folder, ranks=2):
    return [torch.load(folder/f'end{rank}.pt') for rank in range(ranks)]


def errors(folder): return '\n'.join(p.read_text() for p in folder.glob('errors*'))


def check_file(folder, states):
    "What the checkpoint says of each rank is its state at that place of the calm run"
    found = read_checkpoint(folder/'run.pt')
    place = found['epoch'], found['batch']
    if place == (0, 0): return place
    assert len(found['others']) == len(states) - 1
    for rank, calm in enumerate(states):
        found = read_checkpoint(folder/'run.pt')
        for (*way, last), value in found['others'][rank-1] if rank else ():
            part = found
            for key in way: part = part[key]
            part[last] = value
        expected = calm[place]
        same_bits({k: no_clock(found)[k] for k in expected}, expected, f'{place}')
    return place


def death(longest):
    "Who dies, and when: mostly by the clock, sometimes at a delicate moment"
    who = random.choice([[0, 1], [0], [1]])
    if random.random() < .75: return [who, random.uniform(0, longest)]
    event = random.choice(['write', 'rename', 'gather', 'batch'])
    if event in ('write', 'rename'): who = [0]        # only the main process writes
    return [who, event, random.randint(1, 5)]


def test_two_processes_killed_a_hundred_times(live, tmp_path):
    """Both, or one alone; after each kill the file is that of the undisturbed run, and
    each run ends with its bits"""
    states, expected, seconds = calm_run(live, tmp_path/'calm')
    kills, n_runs, folder = [], 0, tmp_path/'run0'
    while len(kills) < 100:
        kill = death(seconds)
        codes, lived = live(folder, kill=kill)
        if KILLED in codes:
            kills.append(kill)
            if (folder/'run.pt').exists(): check_file(folder, states)
            continue
        assert codes == [0, 0], (codes, errors(folder))
        seconds = lived                     # of a whole life, as busy as things are now
        same_bits(ends(folder), expected, f'after {kills[-9:]}: ends')
        left = sorted(p.name for p in folder.iterdir() if p.suffix == '.pt')
        assert left == ['end0.pt', 'end1.pt', 'run.pt']   # half-written ones are gone
        n_runs += 1
        folder = tmp_path/f'run{n_runs}'
    assert live(folder)[0] == [0, 0], errors(folder)       # the last run
    same_bits(ends(folder), expected, f'after {kills[-9:]}: ends')
    print(f'{len(kills)} kills in {n_runs + 1} runs')
    for what in [0, 1], [0], [1], 'write', 'rename', 'gather', 'batch':
        n = sum(what in kill for kill in kills)
        assert n, f'nobody died like {what}: {kills}'


@pytest.mark.parametrize('kwargs', [{'loader': 'DataLoader'}, {'precision': True}],
                         ids=['DataLoader', 'float16'])
def test_other_loaders_and_a_scaler(live, tmp_path, kwargs):
    states, expected, _ = calm_run(live, tmp_path/'calm', **kwargs)
    folder = tmp_path/'run'
    for n in 3, 4, 9:                       # batches of training and validation
        codes, _ = live(folder, every=1, kill=[[n % 2], 'batch', n], **kwargs)
        assert KILLED in codes
        assert check_file(folder, states) > (0, 0)
    assert live(folder, every=1, **kwargs)[0] == [0, 0], errors(folder)
    same_bits(ends(folder), expected)


def test_between_epochs_another_number_of_processes_goes_on(live, tmp_path):
    """Within an epoch each process has counted a part: then the number must be the
    same"""
    for then, now in (2, 1), (1, 2), (2, 3):
        folder = tmp_path/f'{then} {now}'
        assert KILLED in live(folder, then, every=100, kill=[[0], 'batch', 13])[0]
        assert live(folder, now, every=100)[0] == [0]*now, errors(folder)
        said = (folder/'said0').read_text()
        assert 'going on after 1 of 3 epochs' in said
        assert f'processes was {then}, is {now}: sums may be rounded' in said
        *others, = (end['random']['torch'] for end in ends(folder, now))
        assert len({tuple(o.tolist()) for o in others}) == now   # each draws its own
        folder = tmp_path/f'{then} {now} within'
        assert KILLED in live(folder, then, every=1, kill=[[0], 'batch', 4])[0]
        content = (folder/'run.pt').read_bytes()
        assert live(folder, now, every=1)[0] == [1]*now
        for rank in range(now):
            said = (folder/f'errors{rank}').read_text().splitlines()[-1]
            assert f'middle of an epoch by {then} process' in said
            assert f'this run has {now}: go on with {then}' in said
        assert (folder/'run.pt').read_bytes() == content


TERMED = 128 + signal.SIGTERM


def test_sigterm_for_one_or_all(live, tmp_path):
    "All save after the same batch, and end; no batch is computed twice"
    states, expected, _ = calm_run(live, tmp_path/'calm')
    for who in [0], [1], [0, 1]:
        folder, place = tmp_path/f'run{who}', (0, 0)
        while True:
            kill = [who, 'batch', random.randint(1, 6)]
            codes, _ = live(folder, every=None, kill=kill, term=True,
                            patience=60)
            if codes == [0, 0]: break
            assert codes == [TERMED]*2, (codes, errors(folder))
            place, before = check_file(folder, states), place
            assert place > before
        same_bits(ends(folder), expected, f'{who}')


def test_sigterm_for_a_loaders_workers_as_well(live, tmp_path):
    "As a scheduler sends it: to every process of the job"
    states, expected, _ = calm_run(live, tmp_path/'calm', 1, loader='workers')
    folder, kwargs = tmp_path/'run', {'loader': 'workers', 'every': None}
    for n, place in (1, (0, 1)), (3, (0, 4)), (5, (1, 0)), (8, (2, 0)):
        codes, _ = live(folder, 1, kill=[[0], 'batch', n], term=True, **kwargs)
        assert codes == [TERMED], errors(folder)
        assert check_file(folder, states) == place   # after a validation
    assert live(folder, 1, **kwargs)[0] == [0], errors(folder)
    same_bits(ends(folder, 1), expected)


def test_three_processes_add_up_in_the_same_order(live, tmp_path):
    """DDP orders the gradients by its first backward pass, and three numbers have other
    last bits in another order: a run that goes on rehearses"""
    states, expected, _ = calm_run(live, tmp_path/'calm', 3)
    folder = tmp_path/'run'
    for n in 1, 3, 8, 2:
        codes, _ = live(folder, 3, every=1, kill=[[n % 3], 'batch', n])
        assert KILLED in codes
        check_file(folder, states)
    assert live(folder, 3, every=1)[0] == [0]*3, errors(folder)
    same_bits(ends(folder, 3), expected)
