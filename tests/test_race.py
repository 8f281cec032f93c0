"The race of optimizers: what is left to run, what is refused, and the script"
import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from nntrain import race
from nntrain.budgets import budget
from nntrain.intervals import paired_difference
from nntrain.race import (MORE, N_RATES, NETWORKS, RACERS, race_run, rates,
                          run_race)
from nntrain.races import race_row, race_table, read_race, usable

SCRIPT = Path(__file__).parents[1]/'scripts'/'race.py'


@pytest.fixture
def runs(monkeypatch):
    "Runs that take no time: (racer, rate, seed, share) of each; accuracy grows with lr"
    made = []

    def run(network, racer, lr, seed, share=1., valid='test', budget='full'):
        made.append((racer, lr, seed, share))
        if made.better is None: raise KeyboardInterrupt
        return dict(accuracy=made.better(lr), steps=10, seconds=1.)

    class Runs(list): better = staticmethod(lambda lr: 1/(1 + abs(lr - .01)))
    made = Runs()
    monkeypatch.setattr(race, 'race_run', run)
    return made


def test_a_stopped_race_goes_on_with_what_is_missing(runs, tmp_path):
    path, n = tmp_path/'mlp-1024.json', N_RATES + 8*3
    for i in range(1, 6):
        run_race(path, 0, ['AdamW'])
        assert len(runs) == i                       # one run, then time is up
    runs.better, better = None, runs.better
    with pytest.raises(KeyboardInterrupt): run_race(path, racers=['AdamW'])
    runs.better = better
    runs.pop()                                      # the one that was interrupted
    whole = run_race(path, racers=['AdamW'])
    assert len(runs) == len(set(runs)) == n and whole == read_race(path)
    assert [run[1] for run in runs[:N_RATES]] == rates('AdamW')
    assert {run[1] for run in runs[N_RATES:]} == {.01}          # the best one
    run_race(path, racers=['AdamW'])
    assert len(runs) == n                           # nothing is left


@pytest.mark.parametrize('better, beyond', [
    (lambda lr: lr, [.1, .32]), (lambda lr: -lr, [3.2e-6, 1e-6]),
    (lambda lr: -abs(lr - .06), [.1]),              # which is worse: .032 is inside now
    (lambda lr: -abs(lr - .01), [])], ids=['up', 'down', 'one', 'inside'])
def test_a_best_rate_at_the_edge_gets_up_to_two_more(runs, tmp_path, better, beyond):
    runs.better, name = better, 'RMSProp'           # from 1e-5 to .032
    known = rates(name)
    run_race(tmp_path/'cnn.json', racers=[name])
    tried = [lr for _, lr, seed, _ in runs if seed == race.CHOICE_SEED]
    assert tried[:N_RATES] == known
    assert tried[N_RATES:] == pytest.approx(beyond, rel=.02) and len(beyond) <= MORE


def test_usable_stops_at_a_gap():
    tried = {'.1': .89, '1': .5, '3': .895, '10': .9, '30': .891, '100': .8, '300': .9}
    assert usable(tried) == [3., 10., 30.]
    assert usable(tried, within=.006) == [3., 10.]
    assert usable({'1': .5}) == [1.]


def test_run_race_refuses_what_it_cannot_run(runs, tmp_path):
    for name, kw, says in (
            ('lstm', {}, r"no network 'lstm'; there are mlp-1024, "),
            ('cnn', dict(racers=['AdamW', 'Sophia']), r"no racers 'Sophia'; there are"),
            ('cnn', dict(seconds=-1), 'seconds must be at least 0, got -1'),
            ('cnn', dict(seconds=float('nan')), 'at least 0, got nan')):
        with pytest.raises(ValueError, match=says):
            run_race(tmp_path/f'{name}.json', **kw)
    assert not runs and not list(tmp_path.iterdir())


def test_runs_of_two_budgets_are_not_mixed(runs, tmp_path):
    path = tmp_path/'cnn.json'
    run_race(path, 0, ['AdamW'], budget='quick')
    assert read_race(path)['budget'] == 'quick'
    before = path.read_text()
    for other in 'full', budget('full'), 'short':
        with pytest.raises(ValueError, match=r"cnn\.json holds runs of the quick budget"
                                             r".* say budget='quick'"):
            run_race(path, 0, ['AdamW'], budget=other)
    assert path.read_text() == before and len(runs) == 1
    run_race(path, 0, ['AdamW'], budget=budget('quick'))
    with pytest.raises(ValueError, match="unknown budget 'tiny'"):
        run_race(tmp_path/'resnet.json', 0, budget='tiny')
    assert len(runs) == 2 and [p.name for p in tmp_path.iterdir()] == ['cnn.json']


def test_runs_of_two_lengths_are_not_mixed(runs, tmp_path):
    path = tmp_path/'cnn.json'
    run_race(path, 0, ['AdamW'])
    race = json.loads(path.read_text())
    assert race['epochs'] == NETWORKS['cnn'][2]
    path.write_text(json.dumps(race | {'epochs': 9}))
    with pytest.raises(ValueError, match=r'cnn\.json holds runs of 9 epochs'):
        run_race(path, 0, ['AdamW'])


def test_a_fault_in_a_step_is_no_overflow(monkeypatch):
    "An infinite gradient counts as chance; any other refusal ends the race"
    def refusing(said):
        class Refusing(torch.optim.SGD):
            def step(self): raise ValueError(said)
        return lambda model, lr: Refusing(model.parameters(), lr)
    overflow = 'a gradient of shape (3,) has infinite or missing numbers, so …'
    monkeypatch.setitem(RACERS, 'SGD', (refusing(overflow), 1))
    assert race_run('mlp-1024', 'SGD', .1, 0, budget='quick')['accuracy'] == .1
    monkeypatch.setitem(RACERS, 'SGD', (refusing('lr must be a number'), 1))
    with pytest.raises(ValueError, match='lr must be'):
        race_run('mlp-1024', 'SGD', .1, 0, budget='quick')


def test_a_race_that_does_not_say_its_budget_was_a_full_one(runs, tmp_path):
    path = tmp_path/'cnn.json'
    path.write_text('{"network": "cnn", "tried": {}, "final": {}, "seconds": {}}')
    with pytest.raises(ValueError, match='the full budget'):
        run_race(path, 0, ['AdamW'], budget='quick')
    run_race(path, 0, ['AdamW'])
    assert json.loads(path.read_text())['budget'] == 'full' and len(runs) == 1


@pytest.mark.parametrize('text', [
    '', '{"network": "cnn", "tried": {"AdamW"', '[]', '{}',
    '{"network": "resnet", "tried": {}, "final": {}, "seconds": {}}',
    '{"network": "cnn", "tried": [], "final": {}, "seconds": {}}',
    '{"network": "cnn", "tried": {}, "final": {}, "seconds": {}, "budget": 3}',
    '{"network": "cnn", "tried": {"AdamW": {"fast": 1}}, "final": {}, "seconds": {}}',
    '{"network": "cnn", "tried": {"AdamW": {"1": null}}, "final": {}, "seconds": {}}'])
def test_a_damaged_file_is_named_and_left_as_it_is(runs, tmp_path, text):
    path = tmp_path/'cnn.json'
    path.write_text(text)
    with pytest.raises(ValueError, match=r'cnn\.json is damaged .*: move it away'):
        run_race(path)
    assert path.read_text() == text and not runs


def test_the_stored_races_are_whole():
    for path in SCRIPT.parents[1].glob('results/race/*.json'):
        race = read_race(path)
        assert set(race['tried']) <= set(RACERS) and race['budget'] == 'full'


def test_a_table_shows_what_the_runs_say():
    tried = {'0.1': .7, '0.3': .895, '1.0': .9, '3.0': .6}
    found = {'AdamW': [.80, .81, .82], 'Adam': [.81, .815, .84], 'Lion': [.83, .8401]}
    final = {name: {'1.0': {str(2-i): v for i, v in enumerate(values)}}
             for name, values in found.items()}
    final['Adam']['0.5'] = {'0': .82, '1': .81, '2': .80}
    race = dict(network='cnn', tried=dict.fromkeys(found, tried) | {
        'SGD': {'0.1': .8, '1.0': .9}}, final=final)
    head, _, adamw, adam, lion, sgd = race_table(race, shares=(1., .5)).splitlines()
    assert head == '| | rate | width | accuracy | minus AdamW | 50 % of the steps |'
    assert adamw == '| AdamW | 1 | 3 | 0.8100 | – | not yet |'
    gap = paired_difference(found['Adam'], found['AdamW'])
    assert adam == (f'| Adam | 1 | 3 | 0.8217 | {gap.mean:+.4f} ({gap.low:+.4f} to '
                    f'{gap.high:+.4f}) | +0.0000 (+0.0000 to +0.0000) |')
    assert lion.endswith('| 0.8350 | not yet | not yet |')     # a seed is missing
    assert sgd == '| SGD | 1 (edge) | 1 | not yet | not yet | not yet |'
    assert race_row(race, 'Lion') == dict(seeds=[1, 2], values=[.8401, .83])
    final['Lion']['1.0'] = {str(i): v + .02 + i*1e-4
                            for i, v in enumerate(race_row(race, 'AdamW')['values'])}
    assert '| **+0.0201** (' in race_table(race, ['Lion', 'Adam'])
    assert '0.8100' not in race_table(race, ['Lion'])
    assert race_table(race, ['AdamW'], against='Lion').splitlines()[-1].startswith(
        '| AdamW | 1 | 3 | 0.8100 | -0.0201 (')
    with pytest.raises(ValueError, match=r'Adm: not in the race of cnn; there are Ada'):
        race_table(race, ['Adam', 'Adm'])
    with pytest.raises(ValueError, match='AdamW: not in .* there are none'):
        race_table(dict(network='cnn', tried={}, final={}))


@pytest.fixture
def script(monkeypatch, tmp_path, capsys):
    "Run a copy of the script, which has its own results: (exit status, what it says)"
    copy = tmp_path/'scripts'/'race.py'
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)

    def call(*args):
        monkeypatch.setattr('sys.argv', [str(copy), *args])
        try: runpy.run_path(str(copy), run_name='__main__')
        except SystemExit as e:
            if isinstance(e.code, str): return 1, e.code
            return e.code, capsys.readouterr().err
        return 0, capsys.readouterr().err
    call.results = tmp_path/'results'/'race'
    return call


def test_the_script_runs_and_goes_on(runs, script):
    assert script('cnn', '--seconds', '0', '--racers', 'AdamW, Muon') == (0, '')
    runs.better = None
    assert script('cnn') == (
        130, 'stopped: the same command goes on with what is missing\n')
    stored = json.loads((script.results/'cnn.json').read_text())
    assert len(stored['tried']['AdamW']) == 1


def test_the_script_says_in_a_sentence_what_is_wrong(runs, script):
    script.results.mkdir(parents=True)
    (script.results/'resnet.json').write_text('{"network": ')
    for args, says in ((['lstm'], "no network 'lstm'"),
                       (['cnn', '--racers', 'AdamW,Sophia'], "no racers 'Sophia'"),
                       (['cnn', '--racers', ''], "no racers ''"),
                       (['cnn', '--seconds', '-3'], 'at least 0, got -3'),
                       (['resnet'], 'resnet.json is damaged')):
        status, said = script(*args)
        assert status == 1 and says in said and said.startswith('race.py: ')
        assert said.count('\n') == 0
    status, said = script('cnn', '--seconds', 'long')
    assert status == 2 and "invalid float value: 'long'" in said and not runs
