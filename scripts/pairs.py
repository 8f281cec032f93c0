"""Ask all pairs of callbacks all questions, and store the answers.

    python scripts/pairs.py

writes results/pairs/pairs.json, which nbs/27_pairs.ipynb shows, and which the tests
compare with what they find. A cell that is silent or crashes ends it with status 1.
"""
import sys
from pathlib import Path

TOP = Path(__file__).parents[1]
sys.path[:0] = [str(TOP/'tests'), str(TOP)]

if __name__ == '__main__':
    from nntrain.files import write_whole
    from nntrain.processes import Processes
    from pair_checks import Walk, as_text, faults, stored
    path = TOP/'results'/'pairs'/'pairs.json'
    with Processes(2) as two:
        walk = Walk(two)
        answers = walk.alone() and walk.together()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda beside: beside.write_text(as_text(stored(answers))))
    print(f'{len(answers)} pairs: {path.relative_to(TOP)}')
    if found := faults(answers): sys.exit('\n'.join(found))
