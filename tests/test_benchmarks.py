"The measuring stick itself: what `benchmarks/_timing.py` reports"
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'))
import _timing


@pytest.fixture
def clock(monkeypatch):
    "A clock that only work moves on: `clock(2)` is work of two seconds"
    now = [0.]
    monkeypatch.setattr(_timing, 'perf_counter', lambda: now[0])
    def work(seconds): now[0] += seconds
    return work


def test_ratio_per_round_cancels_a_slow_machine(clock, capsys):
    calls = []
    def slowing(name, seconds): calls.append(name); clock(seconds * (10 if len(calls) > 4 else 1))  # the machine becomes ten times slower
    found = _timing.compare({'a': lambda: slowing('a', 2), 'b': lambda: slowing('b', 3)}, rounds=4, warmup=0, limits={'b': 1.2}, per=2, unit='batch')
    assert calls == list('abbaabba')
    assert found['b']['ratio'] == pytest.approx(1.5) and found['b']['ratio_low'] == pytest.approx(found['b']['ratio_high'])
    assert found['a']['median'] == pytest.approx((1 + 10)/2) and found['a']['ok'] is None and found['b']['ok'] is False
    assert 'MISSED (limit 1.2×)' in capsys.readouterr().out


def test_warmup_is_thrown_away_and_sync_is_inside(clock):
    costs = iter([100, 1, 1, 1])
    found = _timing.compare({'a': lambda: clock(next(costs))}, rounds=3, warmup=1, sync=lambda: clock(.5))
    assert found['a']['median'] == pytest.approx(1.5)  # the second call of sync waits for the work: it counts


@pytest.mark.parametrize('arguments, problem', [
    (dict(candidates={}), 'at least one'), (dict(candidates={'a': print}, rounds=0), 'rounds=0'), (dict(candidates={'a': print}, limits={'b': 1}), "unknown candidates ['b']"),
])
def test_wrong_arguments(arguments, problem):
    with pytest.raises(ValueError) as e: _timing.compare(**arguments)
    assert problem in str(e.value)
