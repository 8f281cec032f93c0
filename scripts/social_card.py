"""Draw nbs/images/card.png, the picture that other sites show beside a link to the
book, and nbs/images/cover.png, the cover of the e-book, from recorded rows.

    python scripts/social_card.py           write both
    python scripts/social_card.py --check   only say whether their numbers are current
"""
import argparse
import json
from pathlib import Path

from PIL import Image

from nntrain.results import result

ROOT = Path(__file__).resolve().parent.parent
CARD, COVER = ROOT/'nbs/images/card.png', ROOT/'nbs/images/cover.png'
SIZES = {CARD.name: (1200, 630), COVER.name: (1200, 1800)}
ROWS = {
    'two layers,\nsmall steps': 'measuring-mlp-sgd-lr01',
    'larger\nsteps': 'measuring-mlp-sgd-lr1', 'momentum': 'measuring-mlp-momentum-lr1',
    'convolutions,\nBatchNorm': 'initialization-cnn',
    'one-cycle\nschedule': 'schedulers-one-cycle'}


def numbers():
    return json.dumps(
        {
            name: f'{result(name).mean:.3f} ± {result(name).se:.3f} (n = '
            f'{result(name).n})' for name in ROWS.values()},
        ensure_ascii=False,
    )

def stale(card=CARD):
    "What is wrong with the card or the cover: nothing, or a sentence"
    if not card.exists(): return f'no {card.name}: run scripts/social_card.py'
    with Image.open(card) as picture:
        if picture.text.get('Rows') != numbers():
            return (f"{card.name} shows {picture.text.get('Rows')}, the rows say "
                    f"{numbers()}: run scripts/social_card.py")
        if picture.size != SIZES[card.name]:
            return f'{card.name} has {picture.size} pixels, not {SIZES[card.name]}'
    if card.stat().st_size > 200_000: return f'{card.name} is larger than 200 KB'

def draw(card=CARD):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    blue, orange = '#0072B2', '#D55E00'
    tall = card.name == COVER.name
    fig = plt.figure(figsize=[side/100 for side in SIZES[card.name]], dpi=100)
    fig.text(.06, .86 if tall else .82, 'nntrain', fontsize=100 if tall else 58,
             weight='bold', color=blue)
    if tall: fig.text(.06, .12, 'The nntrain authors', fontsize=28)
    fig.text(
        .06, .73 if tall else .72,
        'How training a neural network\nreally works: a book of notebooks\nthat builds '
        'a library,\nand checks every step' if tall else
        'How training a neural network really works:\na book of notebooks that builds '
        'a library, and checks every step', fontsize=38 if tall else 21, va='center',
        linespacing=1.4)
    ax = fig.add_axes([.09, .25, .85, .3] if tall else [.09, .2, .85, .4])
    rows = [result(name) for name in ROWS.values()]
    at = range(len(rows))
    ax.plot(at, [r.mean for r in rows], '-', color=blue, lw=3, alpha=.35)
    ax.errorbar(
        at, [r.mean for r in rows], yerr=[r.se for r in rows], fmt='o', ms=15, lw=3,
        capsize=8, color=blue, mfc=orange, mec='w', mew=2)
    for i, r in enumerate(rows):
        ax.annotate(
            f'{r.mean:.3f}', (i, r.mean), (0, 16), textcoords='offset points',
            ha='center', fontsize=19, weight='bold')
    ax.set_xticks(at, ROWS, fontsize=17)
    ax.set(xlim=(-.4, len(rows)-.6), ylim=(.6, 1), yticks=(.6, .7, .8, .9))
    ax.tick_params(axis='y', labelsize=15)
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(axis='y', alpha=.3)
    fig.text(
        0.06,
        0.03,
        'Fashion-MNIST, accuracy after five epochs, mean ± standard error, n = '
        f'{rows[0].n}',
        fontsize=15,
        color='#555',
    )
    fig.savefig(card, metadata={'Rows': numbers(), 'Software': None})
    with Image.open(card) as picture:
        picture, text = picture.convert('RGB').quantize(64), picture.text
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    for k, v in text.items(): info.add_itxt(k, v)
    picture.save(card, optimize=True, pnginfo=info)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    check = parser.parse_args().check
    for card in (CARD, COVER):
        if not check: draw(card)
        if problem := stale(card): raise SystemExit(problem)
        print(f'{card.relative_to(ROOT)}: {card.stat().st_size/1000:.0f} KB')
