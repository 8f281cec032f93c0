"""Time of `import nntrain.learner` against `import torch`, each in a fresh interpreter.

Target: at most 1.15 times. Heavy packages (matplotlib, datasets, torchvision,
ipywidgets) must therefore load only where they are used. The start of the interpreter
is part of both times."""
import argparse
import subprocess
import sys

from _timing import compare, refuse_if_busy


def fresh(code): return lambda: subprocess.run([sys.executable, '-c', code], check=True)


def main(rounds, record=''):
    return compare(
        {
            'import torch': fresh('import torch'),
            'import nntrain.learner': fresh('import nntrain.learner')},
        rounds=rounds,
        warmup=2,
        limits={'import nntrain.learner': 1.15},
        unit='start',
        title='Imports in a fresh interpreter',
        record=record,
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--rounds', type=int, default=9, help='interleaved rounds (default 9)')
    parser.add_argument(
        '--record', action='store_true',
        help='write rows to results/ (on an idle machine)')
    args = parser.parse_args()
    if args.record: refuse_if_busy()
    sys.exit(
        not main(args.rounds, 'import' if args.record else '')[
            'import nntrain.learner']['ok']
    )
