"""Run the race of optimizers on one network; stop it at any time, it goes on later.

    python scripts/race.py NETWORK [--seconds S] [--racers AdamW,Muon,…]

NETWORK is one of mlp-1024, mlp-8192, cnn, resnet. What was run stands in
results/race/NETWORK.json, and only what is missing is run. The page is
nbs/99_race.ipynb.
"""
import argparse
from pathlib import Path

from nntrain.race import NETWORKS, RACERS, run_race

if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('network', choices=list(NETWORKS))
    ask.add_argument('--seconds', type=float, help='stop after the first run behind it')
    ask.add_argument('--racers', help='names, with commas between them; default: all')
    given = ask.parse_args()
    racers = given.racers.split(',') if given.racers else list(RACERS)
    if unknown := sorted(set(racers) - set(RACERS)):
        ask.error(f'no racers of these names: {", ".join(unknown)}; '
                  f'there are {", ".join(RACERS)}')
    folder = Path(__file__).parents[1]/'results'/'race'
    folder.mkdir(exist_ok=True)
    run_race(folder/f'{given.network}.json', given.seconds, racers)
