"""Overhead of the learner with metrics over a bare PyTorch loop that counts the same,
per batch, on a tiny model (batch 32)"""
import argparse
import io
import sys
from contextlib import redirect_stdout

import torch
import torch.nn.functional as F
from _timing import compare, refuse_if_busy
from bench_peers import bare_loop, tiny

from nntrain.learner import Learner
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.progress import ProgressCB

# a tiny model gains nothing from more threads, and one thread gives steadier times
torch.set_num_threads(1)
N_BATCHES = 300
BATCHES = [
    (torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,))) for _ in range(N_BATCHES)]


class Data: train, valid = BATCHES, None


def blind_loop():
    net = tiny().train()
    opt = torch.optim.SGD(net.parameters(), lr=.01)
    for xb, yb in BATCHES:
        loss = F.cross_entropy(net(xb), yb)
        loss.backward()
        opt.step()
        opt.zero_grad()


def learner(*cbs):
    def run():
        with redirect_stdout(io.StringIO()):
            Learner(tiny(), Data, F.cross_entropy, lr=.01, cbs=cbs).fit(1)
    return run


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--rounds', type=int, default=9, help='interleaved rounds (default 9)')
    parser.add_argument(
        '--record', action='store_true',
        help='write rows to results/ (on an idle machine)')
    args = parser.parse_args()
    if args.record: refuse_if_busy()
    result = compare(
        {
            'bare loop': bare_loop(tiny, BATCHES),
            'bare loop that does not count': blind_loop,
            'Learner': learner(),
            'Learner + metrics': learner(MetricsCB(Accuracy())),
            'Learner + metrics + progress': learner(
                MetricsCB(Accuracy()), ProgressCB()),
        },
        rounds=args.rounds,
        per=N_BATCHES,
        unit='batch',
        limits={'Learner + metrics': 1.15},
        title='A tiny model, batches of 32, loss and accuracy counted',
        record='learner' if args.record else '',
    )
    sys.exit(any(r['ok'] is False for r in result.values()))
