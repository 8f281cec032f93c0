"""Per-image augmentation of a batch of 1,024 images: what it adds to a training step of
the small CNN, and torchvision image by image"""
import argparse
import sys

import torch
import torch.nn.functional as F
from _timing import compare, refuse_if_busy
from torchvision.transforms import v2

from nntrain.erase import RandomCopy, RandomErase
from nntrain.transforms import PerImage, RandomCrop, RandomFlip
from nntrain.blocks import cnn
from nntrain.memory import keep_freed_memory

LIMIT = .08  # of a training step


def candidates(device, n=1024):
    "A training step first: the ratios are shares of it"
    if device == 'cpu': keep_freed_memory()  # as chapter 5 advises
    torch.manual_seed(0)
    x, y = (
        torch.rand(n, 1, 28, 28, device=device), torch.randint(10, (n,), device=device))
    net = cnn().to(device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step():
        F.cross_entropy(net(x), y).backward()
        opt.step()
        opt.zero_grad()

    def through(*tfms):
        def run():
            out = x
            for tfm in tfms: out = tfm(out)
        return run

    one_by_one = PerImage(
        v2.Compose([v2.RandomCrop(28, padding=1), v2.RandomHorizontalFlip()]))
    return {
        'training step': step, 'crop, flip': through(RandomCrop(1), RandomFlip()),
        'crop, flip, erase': through(RandomCrop(1), RandomFlip(), RandomErase()),
        'crop, flip, copy': through(RandomCrop(1), RandomFlip(), RandomCopy()),
        'torchvision, one by one': through(one_by_one)}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--rounds', type=int, default=15, help='interleaved rounds (default 15)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument(
        '--record', action='store_true',
        help='write rows to results/ (on an idle machine)')
    args = parser.parse_args()
    if args.record: refuse_if_busy()
    result = compare(
        candidates(args.device), rounds=args.rounds,
        number=1 if args.device == 'cpu' else 20, per=1024, unit='image', warmup=2,
        sync=torch.cuda.synchronize if args.device == 'cuda' else None,
        limits={'crop, flip': LIMIT, 'crop, flip, erase': LIMIT},
        title='augmentation of a batch of 1,024 as a share of a training step '
        f'({args.device})', record=f'augment-{args.device}' if args.record else '')
    sys.exit(any(r['ok'] is False for r in result.values()))
