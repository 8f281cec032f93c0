"""Run the race of optimizers on one network; stop it at any time, it goes on later.

    python scripts/race.py NETWORK [--seconds S] [--racers AdamW,Muon,…]

NETWORK is one of mlp-1024, mlp-8192, cnn, resnet. What was run is in
results/race/NETWORK.json, and only what is missing is run. The page is
nbs/99_race.ipynb.
"""
import argparse
import sys
from pathlib import Path

from nntrain.race import NETWORKS, run_race

if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('network', help=f'one of {", ".join(NETWORKS)}')
    ask.add_argument('--seconds', type=float,
                     help='stop after the first run that ends later')
    ask.add_argument('--racers', help='names, with commas between them; default: all')
    given = ask.parse_args()
    racers = given.racers
    if racers is not None: racers = [name.strip() for name in racers.split(',')]
    folder = Path(__file__).parents[1]/'results'/'race'
    folder.mkdir(parents=True, exist_ok=True)
    try: run_race(folder/f'{given.network}.json', given.seconds, racers)
    except ValueError as e: sys.exit(f'race.py: {e}')
    except KeyboardInterrupt:
        print('stopped: the same command goes on with what is missing', file=sys.stderr)
        sys.exit(130)
