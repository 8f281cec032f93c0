"""One epoch of batches: from tensors in memory against decoding PNG pictures through
`datasets` and collate.

    # uses NNTRAIN_DATA, the hub or toy_fashion, like the book
    python benchmarks/bench_data.py

Goal: TensorLoader at least 60 times faster than the loader that decodes."""
import argparse
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset
from nntrain.collate import collate_tuple
from nntrain.tensor_loader import TensorLoader
from nntrain.sources import fashion_mnist, fashion_tensors
from _timing import compare, refuse_if_busy


def consume(loader):
    for _ in loader: pass


def main(batch_size=1024, rounds=5, record=''):
    data, dd = fashion_tensors(), fashion_mnist()
    x, y = data['train']
    xf = x.float().div(255)
    loaders = {
        'datasets + collate, PNG': DataLoader(
            dd['train'], batch_size, shuffle=True, collate_fn=collate_tuple),
        'torch TensorDataset, floats': DataLoader(
            TensorDataset(xf, y), batch_size, shuffle=True),
        'TensorLoader': TensorLoader(x, y, batch_size, shuffle=True),
        'TensorLoader, normalised': TensorLoader(
            x, y, batch_size, shuffle=True, mean=0.286, std=0.353),
    }
    return compare(
        {k: lambda v=v: consume(v) for k, v in loaders.items()}, rounds=rounds,
        limits={'TensorLoader': 1 / 60, 'TensorLoader, normalised': 1 / 60}, per=1,
        unit='epoch',
        title=f'One epoch of {len(x):,} pictures (source: {data.source}), batch size '
        f'{batch_size}, {torch.get_num_threads()} threads', record=record,
        source='toy' if data.source == 'toy' else 'real')


if __name__=='__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--rounds', type=int, default=5, help='interleaved rounds (default 5)')
    parser.add_argument(
        '--record', action='store_true',
        help='write rows to results/ (on an idle machine)')
    args = parser.parse_args()
    if args.record: refuse_if_busy()
    result = main(rounds=args.rounds, record='data' if args.record else '')
    print(
        f"TensorLoader is {1 / result['TensorLoader']['ratio']:.0f}× faster than "
        "decoding (goal: 60×)")
    sys.exit(any(r['ok'] is False for r in result.values()))
