"""One piece of a stroke in the chapter's view, on a processor that is slowed down four
times like that of a phone, against a pause of 50 ms.

Target: at most 1 time. Measured is what happens between a move of the pen and the
answer: the ink is drawn and read back, cut, shrunk, and given to the network that the
notebook holds. Needs playwright and Chromium."""
import argparse
import json
import re
import sys
from pathlib import Path
from time import sleep

from _timing import compare, refuse_if_busy

ROOT = Path(__file__).resolve().parent.parent
N = 10  # pieces in one measurement
STROKES = '''n => {
  const pen = canvas.getContext('2d', { willReadFrequently: true });
  pen.strokeStyle = '#fff';
  pen.lineWidth = 16;
  let sum = 0;
  for (let i = 0; i < n; i++) {
    pen.beginPath();
    pen.moveTo(40 + 8 * i, 90);
    pen.lineTo(48 + 8 * i, 190);
    pen.stroke();
    sum += softmax(known.logits(fitted(levelsOf(canvas), 280)))[0];
  }
  return sum;
}'''


def network():
    "The file of the network in the view that the notebook holds, as base64"
    nb = json.loads((ROOT/'nbs/28_browser.ipynb').read_text(encoding='utf-8'))
    texts = (''.join(o.get('data', {}).get('text/html', '')) for c in nb['cells']
             for o in c.get('outputs', ()))
    view = next(text for text in texts if 'nnx-draw' in text)
    return json.loads(re.search(r'drawing\((\{.*\})\);\n', view)[1])['network']


def main(rounds, record=''):
    from playwright.sync_api import sync_playwright
    from nntrain.figure_web import _web
    sys.path.insert(0, str(ROOT/'tests'))
    from site_checks import BROWSERS
    path = next((p for p in BROWSERS if Path(p).exists()), None)
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=path, args=['--no-sandbox'])
        page = browser.new_page()
        page.add_script_tag(content=_web('network.js') + _web('ink.js'))
        page.evaluate('''file => {
          globalThis.known = readNetwork(bytesOf(file));
          globalThis.canvas = document.createElement('canvas');
          canvas.width = canvas.height = 280;
        }''', network())
        page.context.new_cdp_session(page).send(
            'Emulation.setCPUThrottlingRate', dict(rate=4))
        stroke = 'a piece of a stroke, 4× slower'
        result = compare(
            {'50 ms': lambda: sleep(.05*N), stroke: lambda: page.evaluate(STROKES, N)},
            rounds=rounds, warmup=2, limits={stroke: 1.}, per=N, unit='piece',
            title='Drawing in the browser', record=record)
        browser.close()
    return result[stroke]['ok']


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--rounds', type=int, default=15, help='interleaved rounds (default 15)')
    parser.add_argument(
        '--record', action='store_true',
        help='write rows to results/ (on an idle machine)')
    args = parser.parse_args()
    if args.record: refuse_if_busy()
    sys.exit(not main(args.rounds, 'browser' if args.record else ''))
