"""Recorded results: rows, bands, paired differences."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from nntrain import intervals
from nntrain import results as store
from nntrain.intervals import in_band, paired_difference
from nntrain.kept import KeptRuns
from nntrain.races import best_rate, race_table, read_race, usable
from nntrain.results import record, result, results, results_table

KW = dict(split='test', seconds=1., source='real')

def test_record_writes_only_for_a_full_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, '_results_dir', lambda: tmp_path)
    monkeypatch.delenv('NNTRAIN_RECORD', raising=False)
    record('a', [.1, .2], **KW)
    assert (
        not list(tmp_path.iterdir())
        and 'not recorded: only nntrain_execute' in capsys.readouterr().out)
    monkeypatch.setenv('NNTRAIN_RECORD', '1')
    record('a', [.1, .2], budget='quick', **KW)
    assert not list(tmp_path.iterdir()) and 'a quick budget' in capsys.readouterr().out
    record('a', [.1, .2], budget='full', **KW)
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']
    record('a', [.5, .6], **{**KW, 'source': 'toy'})
    assert (
        result('a', tmp_path)['values'] == [0.1, 0.2]
        and 'real data, which is kept' in capsys.readouterr().out)
    monkeypatch.setattr(store, '_checkout', lambda: None)
    record('b', [.1], **KW)
    assert 'checkout' in capsys.readouterr().out and list(results(tmp_path)) == ['a']

@pytest.mark.parametrize(
    'message, kw',
    [
        ('finite', dict(values=[float('inf')])), ('finite', dict(values=[])),
        ('seeds', dict(values=[1.0], seeds=[0, 1])),
        ('names the file', dict(experiment='A b')),
        ('seconds', dict(seconds=float('nan'))), ('better', dict(better='more')),
        ('source', dict(source='somewhere'))],
)
def test_record_refuses(tmp_path, message, kw):
    with pytest.raises(ValueError, match=message):
        record(**{**dict(experiment='a', values=[0.1], folder=tmp_path), **KW, **kw})
    assert not list(tmp_path.iterdir())

def test_in_band_needs_a_spread(tmp_path):
    record('one-seed', [.5], folder=tmp_path, **KW)
    with pytest.raises(ValueError, match='no spread'):
        in_band(0.6, 'one-seed', folder=tmp_path)
    record(
        'loss', [0.5, 0.6], better='lower', hint='is the rate right?', folder=tmp_path,
        **KW)
    assert 'is the rate right?' in str(
        in_band(2.0, 'loss', folder=tmp_path)
    ) and 'better than ours' in str(in_band(-2.0, 'loss', folder=tmp_path))

def test_bands_hold_as_many_healthy_runs_as_they_say(tmp_path):
    """3 sd of three runs raise the alarm for 9 healthy runs in 100, not for 0.3: the
    few runs know their spread badly"""
    draws = np.random.default_rng(0).normal(.8, .01, (1000, 4))
    outside = {level: 0 for level in (.9, .95)}
    for i,(*ours,yours) in enumerate(draws):
        record('drawn', ours, folder=tmp_path, **KW)
        for level in outside:
            outside[level] += not in_band(yours, 'drawn', level=level, folder=tmp_path)
    for level,n in outside.items(): assert abs(n/1000-(1-level)) < .03, (level, n)

def test_a_recorded_value_is_not_judged_by_the_band_that_it_made(tmp_path):
    record('drawn', [.5, .6, .9], seeds=[4, 7, 5], folder=tmp_path, **KW)
    assert str(in_band(0.9, 'drawn', folder=tmp_path)).startswith(
        '0.9 is exactly what seed 5 gave (ours: ')
    assert 'nothing to judge' in str(in_band(.9, 'drawn', folder=tmp_path))
    with pytest.raises(ValueError, match='level=3 must be a share'):
        in_band(0.7, 'drawn', level=3, folder=tmp_path)

def test_t_bounds_hold_their_share_of_the_density():
    for df in (1, 2, 3, 4, 7, 30, 99):
        scale = np.exp(math.lgamma((df+1)/2)-math.lgamma(df/2))/math.sqrt(df*math.pi)
        for level in (.5, .95, .99):
            t = np.linspace(-1, 1, 200_001)*intervals._t_bound(level, df)
            share = np.trapezoid(scale*(1+t**2/df)**(-(df+1)/2), t)
            assert share == pytest.approx(level, abs=1e-6), (df, level)

def test_intervals_of_paired_differences_hold_zero_as_often_as_they_say():
    """Two equal methods: a share of 1-level of the comparisons tells them apart by
    chance"""
    noise = np.random.default_rng(1).normal(0, .01, (2000, 2, 3))
    apart = sum(bool(paired_difference(a, b)) for a,b in noise)
    assert abs(apart/2000-.05) < .02

def test_pairs_are_made_by_seed(tmp_path, capsys):
    a = record('a', [.1, .2, .3], seeds=[2, 0, 1], folder=tmp_path, **KW)
    b = record('b', [.2, .3, .1], seeds=[0, 1, 2], folder=tmp_path, **KW)
    same = paired_difference(a, result('b', tmp_path))
    assert (
        (same.mean, same.low, same.high, same.n) == (0, 0, 0, 3) and not same
        and 'not told apart' in str(same))
    with pytest.raises(ValueError, match='same seeds on both sides'):
        paired_difference(a, [0.1, 0.2])
    with pytest.raises(ValueError, match='must be a share'):
        paired_difference(a, b, level=95)

@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o027, 0o640)])
def test_written_files_have_the_mode_of_ordinary_files(tmp_path, umask, mode):
    """A temporary file is private; what is put in its place is as readable as any new
    file of this user, or as the file before"""
    before = os.umask(umask)
    try: record('a', [.1, .2], folder=tmp_path, **KW)
    finally: os.umask(before)
    row = tmp_path/'a.json'
    assert row.stat().st_mode & 0o777 == mode
    row.chmod(0o604)
    record('a', [.1, .3], folder=tmp_path, **KW)
    assert row.stat().st_mode & 0o777 == 0o604

def test_recorded_rows_are_complete():
    for name,row in results().items():
        assert (
            row.experiment == name and row.n == len(row['values']) == len(row.seeds)
            and row.hardware and row.versions['torch'])


def test_kept_runs_need_a_checkout_or_a_path(monkeypatch, tmp_path):
    "Nothing is written into an installed package"
    monkeypatch.setattr('nntrain.kept._checkout', lambda: None)
    monkeypatch.setattr('nntrain.kept._results_dir', lambda: tmp_path)
    with pytest.raises(ValueError, match='cnn, seed 3 is not among the runs that came'):
        KeptRuns('night').get('cnn', 3, lambda: dict(accuracy=.9))
    assert not list(tmp_path.iterdir())
    kept = KeptRuns(tmp_path/'own.json')
    assert kept.get('cnn', 3, lambda: dict(accuracy=.9)) == dict(accuracy=.9)


def test_two_programs_may_keep_runs_in_one_file(tmp_path):
    one, two = (KeptRuns(tmp_path/'own.json') for _ in range(2))
    one.get('a', 0, lambda: dict(loss=1))
    two.get('b', 0, lambda: dict(loss=2))
    found = KeptRuns(tmp_path/'own.json')
    assert [found.row(name, 'loss')['values'] for name in 'ab'] == [[1.], [2.]]


# ---- careless calls ------------------------------------------------------------------

def says(error, match, f):
    with pytest.raises(error, match=match): f()


@pytest.mark.parametrize('match, kw', [
    ('each value needs a seed of its own', dict(values=[.1, .2], seeds=[0, 0])),
    ('a seed must be a whole number', dict(seeds=[.5])),
    (r'best must be \(value, who\)', dict(best=(.7,))),
    ('seconds must be a finite number', dict(seconds='long'))])
def test_a_row_that_a_table_could_not_use_is_refused(tmp_path, match, kw):
    says(ValueError, match, lambda: record(
        **dict(experiment='a', values=[.1], folder=tmp_path) | KW | kw))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', ['{"mean"', '[]', '3', '{"mean": 1}'])
def test_a_damaged_row_is_named(tmp_path, text):
    record('good', [.5], folder=tmp_path, **KW)
    (tmp_path/'other.json').write_text(text)
    says(ValueError, 'other.json is no recorded row', lambda: result('good', tmp_path))


def test_an_empty_list_of_rows_is_an_empty_table(tmp_path):
    record('a', [.5], folder=tmp_path, **KW)
    assert len(results_table([], tmp_path).splitlines()) == 2
    assert results_table('a', tmp_path) == results_table(None, tmp_path)
    race = dict(network='x', tried={'AdamW': {'1': .5}}, final={})
    assert len(race_table(race, []).splitlines()) == 2


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    (tmp_path/'a').write_text('old')
    seen, sync = [], os.fsync
    monkeypatch.setattr(store.os, 'fsync', lambda f: seen.append(
        (tmp_path/'a').read_text()) or sync(f))
    store._write(tmp_path/'a', 'new')
    assert seen == ['old'] and (tmp_path/'a').read_text() == 'new'


@pytest.mark.parametrize('runs', [
    dict(seeds=[0, 0], values=[.1, .2]), dict(seeds=[0, 1, 2], values=[.1, .2])])
def test_pairs_lose_no_value_in_silence(runs):
    says(ValueError, 'one value for each seed',
         lambda: paired_difference(runs, [.1, .2]))


@pytest.mark.parametrize('final', [
    {'A': [1]}, {'A': {'1.0': {'0': 'x'}}}, {'A': {'1.0': {'x': .5}}},
    {'A': {'1.0': 3}}])
def test_the_end_of_a_race_is_read_as_it_will_be_used(tmp_path, final):
    path = tmp_path/'toy.json'
    path.write_text(json.dumps(dict(network='toy', tried={}, seconds={}, final=final)))
    says(ValueError, 'toy.json is damaged', lambda: read_race(path))


def test_nan_is_never_the_best():
    tried = {'1': math.nan, '2': .5, '3': .495}
    assert best_rate(tried) == 2. and usable(tried) == [2., 3.]
    says(ValueError, 'no rate was tried yet', lambda: best_rate({}))


def half(): return dict(accuracy=.5)

@pytest.mark.parametrize('seed', [0., 'a', None, -1, True, math.nan])
def test_a_seed_that_could_not_be_read_back_is_refused(tmp_path, seed):
    kept = KeptRuns(tmp_path/'k.json')
    kept.get('a', 0, half)
    says(ValueError, 'seed must be a whole number', lambda: kept.get('b', seed, half))
    assert list(KeptRuns(tmp_path/'k.json').found['runs']) == ['a']


@pytest.mark.parametrize('made', [[1], 3, None, dict(accuracy='high')])
def test_a_run_gives_a_dictionary_of_numbers(tmp_path, made):
    says(TypeError, 'must give a dictionary of numbers',
         lambda: KeptRuns(tmp_path/'k.json').get('a', 0, lambda: made))
    says(TypeError, 'name must be a text',
         lambda: KeptRuns(tmp_path/'k.json').get(3, 0, half))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told_before_the_run(tmp_path):
    (tmp_path/'file').touch()
    def run(): raise AssertionError('hours are lost')
    says(ValueError, 'is a folder: name a file in it',
         lambda: KeptRuns(tmp_path).get('a', 0, run))
    says(OSError, 'k.json could not be written',
         lambda: KeptRuns(tmp_path/'file'/'k.json').get('a', 0, run))


def test_a_number_that_was_not_kept_is_named(tmp_path):
    kept = KeptRuns(tmp_path/'k.json')
    kept.get('a', 0, half)
    says(ValueError, "a, seed 0 has no number 'loss': there are accuracy",
         lambda: kept.row('a', 'loss'))


FILL = '''
import sys, time
from nntrain import kept
read = kept._read_runs
def slow(*args): found = read(*args); time.sleep(.1); return found
kept._read_runs = slow                  # the other one has time to read the same
for seed in range(4): kept.KeptRuns(sys.argv[1]).get(
    sys.argv[2], seed, lambda: dict(accuracy=.5))
'''

def test_two_programs_at_once_lose_no_run(tmp_path):
    path = tmp_path/'k.json'
    both = [subprocess.Popen([sys.executable, '-c', FILL, path, name]) for name in 'ab']
    assert [p.wait(300) for p in both] == [0, 0]
    runs = KeptRuns(path).found['runs']
    assert {name: len(its) for name, its in runs.items()} == dict(a=4, b=4)
    assert [p.name for p in tmp_path.iterdir()] == ['k.json']
