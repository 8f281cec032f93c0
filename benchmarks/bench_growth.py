"""How the time of a training step grows with the batch, the width and the pictures:
not against a peer, but against the smallest of its own series"""
import argparse

import torch
import torch.nn.functional as F
from _timing import compare, refuse_if_busy

from nntrain.adaptive import AdamW
from nntrain.memory import keep_freed_memory
from nntrain.resnet import resnet

BATCHES = 16, 64, 256, 1024
WIDTHS = 8, 16, 32
SIDES = 28, 40, 56


def step(width=16, batch=64, side=28):
    "One step of a ResNet with three stages, of `width` to 4 × `width` channels"
    model = resnet((width, 2*width, 4*width), strides=(1, 2, 2))
    model = model.to(memory_format=torch.channels_last)
    opt = AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(batch, 1, side, side), torch.randint(0, 10, (batch,))
    x = x.to(memory_format=torch.channels_last)
    def run():
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return run


SERIES = {
    'batch': ('batches; time per picture', BATCHES,
              lambda n: step(batch=n)),
    'width': ('channels of the first stage, batches of 64; time per step', WIDTHS,
              lambda n: step(width=n)),
    'side': ('pixels a side, batches of 64; time per step', SIDES,
             lambda n: step(side=n))}


def measure(name, rounds, record):
    "A series: each member against the first; batches are compared by picture"
    words, values, make = SERIES[name]
    def thinned(n):
        run = make(n)
        if name != 'batch': return run
        def often():                             # the same number of pictures for all
            for _ in range(BATCHES[-1]//n): run()
        return often
    return compare(
        {f'{name} {n}': thinned(n) for n in values}, rounds=rounds,
        per=BATCHES[-1] if name == 'batch' else 1,
        unit='picture' if name == 'batch' else 'step', title=f'ResNet: {words}',
        record='growth' if record else '')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--rounds', type=int, default=5, help='interleaved rounds (default 5)')
    parser.add_argument(
        '--record', action='store_true',
        help='write rows to results/ (on an idle machine)')
    args = parser.parse_args()
    if args.record: refuse_if_busy()
    torch.set_num_threads(1)
    # glibc gives tensors above 32 MB back to the system at once: batches of 1,024 have
    # such tensors, and would pay for new pages at each layer
    keep_freed_memory()
    for name in SERIES: measure(name, args.rounds, args.record)
