"""Paired timings for the side-by-side measurements in this folder.

On a shared machine one absolute time says little: the clock speed, the caches and the
neighbours change from minute to minute. So `compare` runs the candidates in turn (a b
c, c b a, …) and takes, in each round, every candidate's time as a ratio of the first
one's. Whatever slows the machine slows the neighbours of a round alike and cancels in
the ratio; the median over the rounds ignores the odd round that was disturbed."""
import json
import os
import platform
import re
from pathlib import Path
from statistics import median
from time import perf_counter, sleep


def compare(
    # {name: function of no arguments}; the first one is the yardstick (ratio 1.00)
    candidates,
    rounds=7,      # timed rounds; each one runs every candidate once
    # calls of a candidate per round (more than 1 for work shorter than about 10 ms)
    number=1,
    warmup=1,      # rounds run first and thrown away
    # called before the clock is read, e.g. `torch.cuda.synchronize` on a GPU
    sync=None,
    # {name: largest ratio that counts as fast enough}; shown in the table as ok or
    # MISSED
    limits=None,
    # units of work in one call (batches, images, …); times are shown per unit
    per=1,
    unit='call',   # what one unit of work is called in the table
    title='',      # printed above the table
    # name such as 'import': writes a row `results/bench-<name>-<candidate>.json` for
    # every candidate but the yardstick; '' writes nothing
    record='',
    folder=None,   # where the rows go; default: the project's results/
    source='real', # of the data, for the rows: 'real', or 'toy' for built-in pictures
):  # {name: {'median', 'low', 'high' (seconds per unit; quartiles), 'ratio',
    #  'ratio_low', 'ratio_high', 'ok' (None without a limit)}}
    """Time `candidates` in interleaved rounds, print a table with medians, quartiles
    and ratios, and return it as a dict"""
    if not candidates:
        raise ValueError('compare needs at least one candidate: {name: function}')
    if rounds < 1 or number < 1 or warmup < 0:
        raise ValueError(
            f'rounds={rounds} and number={number} must be at least 1, warmup={warmup} '
            'at least 0')
    limits = limits or {}
    if unknown := set(limits) - set(candidates):
        raise ValueError(
            f'limits for unknown candidates {sorted(unknown)}; known: '
            f'{list(candidates)}')
    names, times = list(candidates), {name: [] for name in candidates}
    for i in range(warmup + rounds):
        # forth and back: no candidate always runs right after the same one
        for name in names if i % 2 == 0 else names[::-1]:
            seconds = _time(candidates[name], number, sync) / (number * per)
            if i >= warmup: times[name].append(seconds)
    result, yardstick = {}, names[0]
    for name in names:
        ratios = [mine / base for mine, base in zip(times[name], times[yardstick])]
        low, mid, high = _quartiles(times[name])
        ratio_low, ratio, ratio_high = _quartiles(ratios)
        ok = ratio <= limits[name] if name in limits else None
        result[name] = dict(
            median=mid, low=low, high=high, ratio=ratio, ratio_low=ratio_low,
            ratio_high=ratio_high, ok=ok)
        if record and name != yardstick:
            _record(
                f'bench-{record}-{name}', ratios, mid, yardstick, limits.get(name),
                unit, title, sync, folder, source)
    _show(result, limits, rounds, unit, title)
    return result


def describe_machine():
    "One line that says what ran: processor, usable cores, operating system, Python"
    from nntrain.results import _processor
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
        else os.cpu_count())
    return (f'{_processor()}, {cores} cores, {platform.system()}, '
            f'Python {platform.python_version()}')


def others_busy(seconds=1.):
    """How many processors other programs keep busy, measured while we wait; None where
    the system does not say (no /proc/stat)"""
    def used():
        with open('/proc/stat') as f: user, nice, system, *_ = f.readline().split()[1:]
        return (int(user) + int(nice) + int(system))/os.sysconf('SC_CLK_TCK')
    try:
        before = used()
        sleep(seconds)
        return (used() - before)/seconds
    except OSError: return None


def refuse_if_busy(limit=.2):
    "End the program if others keep more than `limit` processors busy"
    busy = others_busy()
    if busy is not None and busy > limit:
        raise SystemExit(f'other programs keep {busy:.1f} processors busy, and rows '
                         'are recorded on an idle machine only: end them, or leave out '
                         '--record')


def _record(name, ratios, seconds, yardstick, limit, unit, title, sync, folder, source):
    """Write one row in the form of all rows of results/: one value (a ratio) for each
    round; `in_band` and the results page read it"""
    from nntrain.results import record
    folder = Path(folder or Path(__file__).resolve().parent.parent/'results')
    name = re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')
    row = record(
        name, ratios, split='interleaved rounds', seconds=seconds, source=source,
        metric=f'time, as a share of: {yardstick}', unit='×', better='lower',
        hint='is the machine idle?', note=title,
        hardware=None if sync else describe_machine(), folder=folder)
    # `record` rounds seconds to ms
    row.update(seconds=seconds, per=unit, against=yardstick, limit=limit)
    (folder / f'{name}.json').write_text(
        json.dumps(row, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def _time(fn, number, sync):
    if sync: sync()
    start = perf_counter()
    for _ in range(number): fn()
    if sync: sync()
    return perf_counter() - start


def _quartiles(xs):
    """Lower quartile, median, upper quartile by the nearest rank: with three values or
    fewer the extremes"""
    xs = sorted(xs)
    return xs[(len(xs) - 1) // 4], median(xs), xs[-1 - (len(xs) - 1) // 4]


def _seconds(t):
    for factor, name in ((1, 's'), (1e3, 'ms'), (1e6, 'µs')):
        if t * factor >= 1: return f'{t * factor:.3g} {name}'
    return f'{t * 1e9:.3g} ns'


def _show(result, limits, rounds, unit, title):
    if title: print(title)
    print(f'{describe_machine()}; median of {rounds} interleaved rounds [quartiles]')
    width = max(map(len, result))
    print(f"{'':{width}}  {'time per ' + unit:>31}  {'ratio':>22}")
    for name, r in result.items():
        seconds = (
            f"{_seconds(r['median'])} [{_seconds(r['low'])}, {_seconds(r['high'])}]")
        ratio = f"{r['ratio']:.3g}× [{r['ratio_low']:.3g}, {r['ratio_high']:.3g}]"
        verdict = (
            '' if r['ok'] is None
            else f"  {'ok' if r['ok'] else 'MISSED'} (limit {limits[name]:g}×)")
        print(f'{name:{width}}  {seconds:>31}  {ratio:>22}{verdict}')
