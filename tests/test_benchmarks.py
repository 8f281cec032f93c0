"The measuring stick itself: what `benchmarks/_timing.py` reports and records"
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'))
import _timing
import run_all
from project_checks import bad_result


@pytest.fixture
def clock(monkeypatch):
    "A clock that only work moves on: `clock(2)` is work of two seconds"
    now = [0.]
    monkeypatch.setattr(_timing, 'perf_counter', lambda: now[0])
    def work(seconds): now[0] += seconds
    return work


def test_ratio_per_round_cancels_a_slow_machine(clock, capsys):
    calls = []
    # the machine becomes ten times slower
    def slowing(name, seconds):
        calls.append(name)
        clock(seconds * (10 if len(calls) > 4 else 1))
    found = _timing.compare(
        {'a': lambda: slowing('a', 2), 'b': lambda: slowing('b', 3)}, rounds=4,
        warmup=0, limits={'b': 1.2}, per=2, unit='batch')
    assert calls == list('abbaabba')
    assert found['b']['ratio'] == pytest.approx(1.5) and found['b'][
        'ratio_low'] == pytest.approx(found['b']['ratio_high'])
    assert (
        found['a']['median'] == pytest.approx((1 + 10) / 2) and found['a']['ok'] is None
        and found['b']['ok'] is False)
    assert 'MISSED (limit 1.2×)' in capsys.readouterr().out


def test_warmup_is_thrown_away_and_sync_is_inside(clock):
    costs = iter([100, 1, 1, 1])
    found = _timing.compare(
        {'a': lambda: clock(next(costs))}, rounds=3, warmup=1, sync=lambda: clock(0.5))
    assert found['a']['median'] == pytest.approx(
        1.5)  # the second call of sync waits for the work: it counts


@pytest.mark.parametrize(
    'arguments, problem',
    [
        (dict(candidates={}), 'at least one'),
        (dict(candidates={'a': print}, rounds=0), 'rounds=0'),
        (dict(candidates={'a': print}, limits={'b': 1}), "unknown candidates ['b']")],
)
def test_wrong_arguments(arguments, problem):
    with pytest.raises(ValueError) as e: _timing.compare(**arguments)
    assert problem in str(e.value)


def test_recorded_rows_are_rows(clock, tmp_path, capsys):
    costs = iter([1, 1.5, 1.75, 1, 1, 1.25])
    _timing.compare(
        {
            'torch, plain': lambda: clock(2e-5 * next(costs)),
            'Ours': lambda: clock(2e-5 * next(costs))},
        rounds=3,
        warmup=0,
        limits={'Ours': 1.6},
        unit='step',
        title='a test',
        record='Probe',
        folder=tmp_path,
    )
    assert [p.name for p in tmp_path.iterdir()] == ['bench-probe-ours.json']
    assert not bad_result(tmp_path/'bench-probe-ours.json')
    row = json.loads((tmp_path/'bench-probe-ours.json').read_text(encoding='utf-8'))
    assert row['values'] == pytest.approx([1.5, 1.75, 1.25]) and row[
        'seconds'] == pytest.approx(3e-5)
    assert (row['against'], row['limit'], row['better'], row['n']) == (
        'torch, plain', 1.6, 'lower', 3)


def test_nothing_is_recorded_unless_asked(clock, tmp_path):
    _timing.compare(
        {'a': lambda: clock(1), 'b': lambda: clock(1)}, rounds=1, warmup=0,
        folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'script', sorted((Path(_timing.__file__).parent).glob('bench_*.py')),
    ids=lambda p: p.stem)
def test_every_script_can_record(script):
    text = script.read_text(encoding='utf-8')
    assert "'--record'" in text and 'record=' in text


def test_recorded_rows_come_from_an_idle_machine_only(monkeypatch):
    monkeypatch.setattr(_timing, 'others_busy', lambda: 1.5)
    with pytest.raises(SystemExit, match='other programs keep 1.5 processors busy'):
        _timing.refuse_if_busy()
    for quiet in .1, None:                               # None: the system does not say
        monkeypatch.setattr(_timing, 'others_busy', lambda: quiet)
        _timing.refuse_if_busy()


def test_every_script_refuses_a_busy_machine():
    for script in Path(_timing.__file__).parent.glob('bench_*.py'):
        assert 'if args.record: refuse_if_busy()' in script.read_text(encoding='utf-8')


def test_run_all_reads_the_tables_of_compare(clock, capsys):
    _timing.compare(
        {'torch, plain': lambda: clock(2e-5), 'Ours': lambda: clock(3e-5),
         'ours, folded': lambda: clock(1e-7)},
        rounds=3, limits={'Ours': 1.2, 'ours, folded': .5},
        title='a test: of 1× [1, 1]')
    rows = run_all.ratios(capsys.readouterr().out)
    assert [(r['name'], r['ratio'], r['verdict']) for r in rows] == [
        ('torch, plain', 1, None), ('Ours', 1.5, 'MISSED'),
        ('ours, folded', .005, 'ok')]


def test_run_all_shows_targets_and_failures(monkeypatch, tmp_path, capsys):
    table = ('Ours   3 ms [3 ms, 3 ms]   1.5× [1.4, 1.6]  {} (limit 1.2×)\n')
    answers = {'bench_import': (table.format('MISSED'), 1), 'bench_data': ('oh', 1)}
    monkeypatch.setattr(run_all, 'run', lambda name, record: answers[name])
    monkeypatch.setattr(run_all, 'others_busy', lambda: .25)
    file = tmp_path/'all.json'
    assert run_all.main(['--only', 'import', 'data', '--json', str(file)]) == 1
    shown = capsys.readouterr().out
    assert 'MISSED  1.5× (limit 1.2×)  bench_import: Ours' in shown
    assert 'FAILED  bench_data: see above' in shown
    kept = json.loads(file.read_text(encoding='utf-8'))
    assert kept['others_busy'] == .25
    assert kept['ratios']['bench_import'][0]['low'] == 1.4
    with pytest.raises(SystemExit): run_all.main(['--only', 'nothing'])
    assert 'no script bench_nothing: choose from bench_' in capsys.readouterr().err
