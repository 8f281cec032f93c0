"""One step of our optimizers for matrices: `Muon` against torch's, `SOAP` and `Shampoo`
against `AdamW`, over the matrices of the MLP 784-50-10 and of the book's ResNet"""
import argparse
import sys

import torch
from _timing import compare, refuse_if_busy
from torch import nn

from nntrain.adaptive import AdamW
from nntrain.kronecker import SOAP, Shampoo
from nntrain.matrix import Muon
from nntrain.memory import keep_freed_memory
from nntrain.resnet import resnet

# name: (yardstick, ours, largest ratio; None: only told)
CONTENDERS = {'SOAP': (AdamW, SOAP, None), 'Shampoo': (AdamW, Shampoo, None)}
if hasattr(torch.optim, 'Muon'): CONTENDERS['Muon'] = torch.optim.Muon, Muon, 1.1


def mlp(): return nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))

def matrices(make, device):
    "The weights with two axes or more, as matrices: torch's Muon takes no others"
    torch.manual_seed(0)
    found = [p.detach().flatten(1) for p in make().parameters() if p.ndim > 1]
    params = [nn.Parameter(p.to(device)) for p in found]
    for p in params: p.grad = torch.randn_like(p)
    return params


def bench(name, network, make, args):
    theirs, ours, limit = CONTENDERS[name]
    opts = {theirs.__module__.split('.')[0] + ' ' + theirs.__name__:
                theirs(matrices(make, args.device), lr=1e-4),
            'ours': ours(matrices(make, args.device), lr=1e-4)}
    # ten steps: `SOAP` and `Shampoo` look for a new basis in one of them
    number = {'mlp': 50, 'resnet': 10}[network] if name == 'Muon' else 10
    result = compare(
        {key: opt.step for key, opt in opts.items()}, rounds=args.rounds, number=number,
        warmup=1, sync=torch.cuda.synchronize if args.device == 'cuda' else None,
        limits={'ours': limit} if limit else None, unit='step',
        title=f'{name}, {network}, {args.device}',
        record=f'{name}-{network}-{args.device}' if args.record else '')
    print()
    return result['ours']['ok'] is not False


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--rounds', type=int, default=15, help='interleaved rounds (default 15)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument(
        '--threads', type=int, default=1,
        help='threads of torch on the CPU (default 1: steadier)')
    parser.add_argument(
        '--record', action='store_true',
        help='write rows to results/ (on an idle machine)')
    args = parser.parse_args()
    if args.record: refuse_if_busy()
    torch.set_num_threads(args.threads)
    keep_freed_memory()                     # as chapter 5 advises
    networks = dict(mlp=mlp, resnet=resnet)
    for network, make in networks.items():
        shapes = [tuple(p.shape) for p in matrices(make, 'cpu')]
        print(f'{network}: {len(shapes)} matrices, {sum(a*b for a, b in shapes):,} '
              f'parameters, the largest {max(shapes, key=lambda s: s[0]*s[1])}')
    print(f'torch {torch.__version__}, {args.threads} thread(s)\n')
    sys.exit(not all([bench(name, network, make, args) for name in CONTENDERS
                      for network, make in networks.items()]))
