"""Run the tries and the final rows of the challenge; stop it at any time.

    python scripts/challenge.py [--tries] [--seconds S] [--names 'Muon; challenge-5']
        [--list] [--runs FILE]

What was run is in results/runs/challenge.json, and only what is missing is run: first
the tries on held-out pictures, then three seeds of each recipe on the test pictures.
Run `--tries` first, choose `RECIPES` by what they say, and only then run the rest.
The page is nbs/23_challenge.ipynb. On a CPU without other work, one thread per core is
fastest; set OMP_NUM_THREADS=1 beside other work.
"""
import argparse
import sys

from nntrain.challenge import PHOTO_TRIES, TRIES, challenge_jobs, run_challenge
from nntrain.kept import KeptRuns


def main(words=None):
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('--seconds', type=float,
                     help='stop after the first run that ends later')
    ask.add_argument('--names', help='of tries and recipes, with semicolons between '
                     'them; default: all')
    ask.add_argument('--tries', action='store_true',
                     help='only the tries, which never see the test pictures')
    ask.add_argument('--list', action='store_true', help='only say what is missing')
    ask.add_argument('--runs', default='challenge',
                     help='file that keeps the runs; default: '
                     'results/runs/challenge.json')
    given = ask.parse_args(words)
    try:
        kept = KeptRuns(given.runs)
        names = given.names and [name.strip() for name in given.names.split(';')]
        if given.tries:
            tries = [*TRIES, *PHOTO_TRIES]
            names = [name for name in names or tries if name in tries]
        if given.list:
            for name, _, seed, _ in challenge_jobs(kept, names): print(name, seed)
        else: run_challenge(kept, given.seconds, names)
    except ValueError as e: sys.exit(f'challenge.py: {e}')
    except KeyboardInterrupt:
        print('stopped: the same command goes on with what is missing', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__': main()
