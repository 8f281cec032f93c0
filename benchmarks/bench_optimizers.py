"""One step of our optimizers over the parameters of a ResNet, against torch's
`foreach`, torch's `fused`, and a Python loop that allocates

A further optimizer is one more line in `CONTENDERS`."""
import argparse
import sys

import torch
from _timing import compare, refuse_if_busy
from torch import nn

from nntrain.adaptive import Adam
from nntrain.sgd import SGD


class LoopSGD:
    """The way of the project's direct ancestor: tensor by tensor, a new tensor for each
    intermediate result"""
    def __init__(self, params, lr, weight_decay):
        self.params, self.lr, self.weight_decay = list(params), lr, weight_decay
    def step(self):
        with torch.no_grad():
            for p in self.params:
                p *= 1 - self.lr*self.weight_decay
                p -= p.grad*self.lr


class LoopAdam:
    "The same for Adam"
    def __init__(self, params, lr, betas, eps):
        self.params, self.lr, self.betas, self.eps, self.i = (
            list(params), lr, betas, eps, 0)
    def step(self):
        beta1, beta2 = self.betas
        with torch.no_grad():
            for p in self.params:
                if not hasattr(p, 'avg'):
                    p.avg, p.sqr_avg = (
                        torch.zeros_like(p.grad), torch.zeros_like(p.grad))
                p.avg = beta1*p.avg + (1-beta1)*p.grad
                unbias_avg = p.avg/(1-beta1**(self.i+1))
                p.sqr_avg = beta2*p.sqr_avg + (1-beta2)*p.grad**2
                unbias_sqr_avg = p.sqr_avg/(1-beta2**(self.i+1))
                p -= self.lr*unbias_avg/(unbias_sqr_avg.sqrt() + self.eps)
        self.i += 1


# name: (ours, torch's, loop, hyperparameters, largest ratio ours / torch foreach,
# smallest ratio loop / ours)
CONTENDERS = {
    'SGD': (
        SGD, torch.optim.SGD, LoopSGD, dict(lr=1e-4, weight_decay=1e-2), 1.05, None),
    'Adam': (
        Adam, torch.optim.Adam, LoopAdam, dict(lr=1e-4, betas=(0.9, 0.99), eps=1e-5),
        1.05, 1.8),
}


def resnet_shapes(channels=(1, 8, 16, 32, 64, 128, 256), n_classes=10):
    """Two 3×3 convolutions with batch norms, and a 1×1 convolution beside them, at each
    size"""
    for i, o in zip(channels, channels[1:]):
        yield from (
            (o, i, 3, 3), (o,), (o,), (o, o, 3, 3), (o,), (o,), (o, i, 1, 1), (o,),
            (o,))
    yield from ((n_classes, channels[-1]), (n_classes,))


def with_gradients(device):
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, device=device)) for shape in resnet_shapes()]
    for p in params: p.grad = torch.randn_like(p)
    return params


def bench(name, rounds, device, record):
    ours, theirs, loop, hypers, limit, gain = CONTENDERS[name]
    opts = {'torch foreach': theirs(with_gradients(device), foreach=True, **hypers),
            'ours, multi_step': ours(with_gradients(device), **hypers),
            'ours, one_step': ours(with_gradients(device), foreach=False, **hypers),
            'allocating loop': loop(with_gradients(device), **hypers),
            'torch fused': theirs(with_gradients(device), fused=True, **hypers)}
    result = compare(
        {key: opt.step for key, opt in opts.items()}, rounds=rounds, number=20,
        warmup=2, sync=torch.cuda.synchronize if device == 'cuda' else None,
        limits={'ours, multi_step': limit}, unit='step', title=f'{name}, {device}',
        record=f'{name}-{device}' if record else '')
    faster = result['allocating loop']['ratio']/result['ours, multi_step']['ratio']
    print(
        f'the allocating loop takes {faster:.2f}× the time of ours'
        + (
            '' if gain is None
            else f' (at least {gain}×: {"ok" if faster >= gain else "MISSED"})')
        + '\n'
    )
    return result['ours, multi_step']['ok'] and (gain is None or faster >= gain)


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
    shapes = [torch.Size(s) for s in resnet_shapes()]
    print(
        f'{len(shapes)} tensors, {sum(s.numel() for s in shapes):,} parameters, torch '
        f'{torch.__version__}, {args.threads} thread(s)\n')
    sys.exit(
        not all(
            [bench(name, args.rounds, args.device, args.record) for name in CONTENDERS])
    )
