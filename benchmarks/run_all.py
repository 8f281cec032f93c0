"""Every measurement of this folder, one after the other, each in a process of its own

    python benchmarks/run_all.py [--record] [--json FILE] [--only NAME …]

Prints all ratios, and last a table of the targets. With --record the rows go to
results/, and a machine that is busy with something else is refused.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from _timing import describe_machine, others_busy, refuse_if_busy

HERE = Path(__file__).resolve().parent
SCRIPTS = sorted(path.stem for path in HERE.glob('bench_*.py'))
LINE = re.compile(r'^(?P<name>\S.*?)  +\S.*?  (?P<ratio>[\d.e-]+)× '
                  r'\[(?P<low>[\d.e-]+), (?P<high>[\d.e-]+)\]'
                  r'(?:  (?P<verdict>ok|MISSED) \(limit (?P<limit>[\d.e-]+)×\))?$')


def ratios(text):
    "The lines of `compare`'s tables -> dicts of name, ratio, quartiles, limit"
    found = [m.groupdict() for line in text.splitlines() if (m := LINE.match(line))]
    for row in found:
        for key in 'ratio', 'low', 'high', 'limit':
            if row[key] is not None: row[key] = float(row[key])
    return found


def run(name, record):
    "One script: its output, shown as it comes, and its exit status"
    command = [sys.executable, str(HERE/f'{name}.py')] + ['--record']*record
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(
        filter(None, [str(HERE.parent), os.environ.get('PYTHONPATH')]))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as p:
        lines = []
        for line in p.stdout:
            print(line, end='', flush=True)
            lines.append(line)
    return ''.join(lines), p.returncode


def main(argv=None):
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('--record', action='store_true',
                     help='write rows to results/ (on an idle machine)')
    ask.add_argument('--json', type=Path, help='write all ratios into this file, too')
    ask.add_argument('--only', nargs='+', metavar='NAME', default=SCRIPTS,
                     help=f'of {", ".join(SCRIPTS)}')
    args = ask.parse_args(argv)
    names = [name if name.startswith('bench_') else f'bench_{name}'
             for name in args.only]
    if unknown := [name for name in names if name not in SCRIPTS]:
        ask.error(f'no script {", ".join(unknown)}: choose from {", ".join(SCRIPTS)}')
    if args.record: refuse_if_busy()
    found, failed = {}, []
    for name in names:
        print(f'\n== {name}', flush=True)
        text, status = run(name, args.record)
        found[name] = ratios(text)
        if status and not any(r['verdict'] == 'MISSED' for r in found[name]):
            failed.append(name)
    print(f'\n== all\n{describe_machine()}')
    for name, rows in found.items():
        for row in rows:
            if row['verdict']:
                print(f"{row['verdict']:6}  {row['ratio']:.3g}× (limit "
                      f"{row['limit']:.3g}×)  {name}: {row['name']}")
    for name in failed: print(f'FAILED  {name}: see above')
    if args.json:
        args.json.write_text(json.dumps(dict(
            machine=describe_machine(), others_busy=others_busy(), ratios=found),
            indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    missed = any(r['verdict'] == 'MISSED' for rows in found.values() for r in rows)
    return 1 if missed or failed else 0


if __name__ == '__main__': sys.exit(main())
