"""Run the tables of the chapter on photographs; stop it at any time, it goes on later.

    python scripts/photographs.py [--table T2 T1 …] [--rows NAME …] [--seconds S]
                                  [--seeds N]

What was run is in results/runs/photographs.json, and only what is missing is run.
The pictures come from NNTRAIN_DATA or by a download. The page is
nbs/22_photographs.ipynb.
"""
import argparse
import sys

from nntrain.memory import keep_freed_memory
from nntrain.photo_tables import SOURCE, run_tables

if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('--table', nargs='+', default=list(SOURCE), metavar='T',
                     help=f'one or more of {", ".join(SOURCE)}; default: all')
    ask.add_argument('--seconds', type=float,
                     help='stop after the first run that ends later')
    ask.add_argument('--seeds', type=int, default=3, help='runs of each row')
    ask.add_argument('--rows', nargs='+', help='names of rows; default: all')
    given = ask.parse_args()
    keep_freed_memory()
    try: run_tables(given.table, seconds=given.seconds, n_seeds=given.seeds,
                    rows=given.rows, budget='full')
    except (ValueError, OSError) as e: sys.exit(f'photographs.py: {e}')
    except KeyboardInterrupt:
        print('stopped: the same command goes on with what is missing', file=sys.stderr)
        sys.exit(130)
