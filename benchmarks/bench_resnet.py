"""One training epoch of a ResNet: our learner (in-memory data, channels_last, float32
and bfloat16) against the same network trained as its ancestors train it"""
import argparse
import ctypes
import sys

import torch
import torch.nn.functional as F
from _timing import compare, refuse_if_busy
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor

from nntrain.adaptive import AdamW
from nntrain.precision import MixedPrecisionCB
from nntrain.budgets import default_device
from nntrain.data import DataLoaders
from nntrain.sources import FASHION_MEAN, FASHION_STD
from nntrain.sources import fashion_mnist, fashion_tensors
from nntrain.blocks import conv_block
from nntrain.prepare import DeviceCB
from nntrain.learner import Learner
from nntrain.memory import keep_freed_memory
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.resnet import resnet
from nntrain.cycles import momentum_cycle, one_cycle
from nntrain.steering import ScheduleCB

DEVICE = default_device()


class AncestorBlock(nn.Module):
    """Widens in the first convolution, halves in the second; 1×1 convolution, then
    pooling on the identity path"""
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.convs = nn.Sequential(
            conv_block(n_in, n_out, stride=1),
            conv_block(n_out, n_out, stride=stride, act=None))
        self.identity = nn.Sequential(
            nn.Conv2d(n_in, n_out, 1),
            *[nn.AvgPool2d(2, ceil_mode=True)] * (stride == 2))
    def forward(self, x): return F.relu(self.convs(x) + self.identity(x))


def ancestor_net():
    widths = 1, 8, 16, 32, 64, 128, 256
    return nn.Sequential(
        *[
            AncestorBlock(a, b, 2 if i else 1)
            for i, (a, b) in enumerate(zip(widths, widths[1:]))],
        nn.Flatten(),
        nn.Linear(256, 10, bias=False),
        nn.BatchNorm1d(10),
    )


def give_memory_back():
    """Undo `keep_freed_memory` of our candidates: glibc's thresholds where they end up
    by themselves in a training"""
    try: mallopt = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError): return
    mallopt(-3, 32 << 20), mallopt(-1, 64 << 20)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def ancestors_way(dataset, batch_size, workers):
    """PNG files decoded one by one, collated, contiguous tensors, float32, a bare loop
    without metrics"""
    def decode(rows):
        return {
            'image': [to_tensor(image) for image in rows['image']],
            'label': rows['label']}
    loader = DataLoader(
        dataset.with_transform(decode), batch_size, shuffle=True, num_workers=workers)
    net = ancestor_net().to(DEVICE)
    def epoch():
        give_memory_back()
        opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
        cycle = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=len(loader))
        net.train()
        for batch in loader:
            xb, yb = batch['image'].to(DEVICE), batch['label'].to(DEVICE)
            loss = F.cross_entropy(net((xb - FASHION_MEAN)/FASHION_STD), yb)
            loss.backward()
            opt.step(); opt.zero_grad(); cycle.step()
    return epoch


def our_way(tensors, batch_size, make_model, *cbs):
    """The learner with metrics and schedule, pixels in memory, channels_last; on a CPU
    freed memory is kept"""
    dls = DataLoaders.from_tensors(
        tensors, tensors, batch_size=batch_size, device=DEVICE, mean=FASHION_MEAN,
        std=FASHION_STD)
    learn = Learner(
        make_model().to(memory_format=torch.channels_last),
        dls,
        F.cross_entropy,
        AdamW,
        1e-2,
        cbs=[
            DeviceCB(), MetricsCB(Accuracy()),
            ScheduleCB(lr=one_cycle(1e-2), momentum=momentum_cycle()), *cbs],
    )
    def epoch():
        if DEVICE.type == 'cpu': keep_freed_memory()
        learn.fit(1, valid=False)
    return epoch


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--rounds', type=int, default=3, help='interleaved rounds (default 3)')
    parser.add_argument(
        '--batches', type=int, default=10,
        help='measure this many batches instead of a whole epoch; 0: a whole epoch '
        '(default 10)')
    parser.add_argument(
        '--batch-size', type=int, default=1024, help="the ancestors' (default 1024)")
    parser.add_argument(
        '--workers', type=int, default=0,
        help="processes of the ancestors' loader (default 0, as theirs)")
    parser.add_argument(
        '--record', action='store_true',
        help='write rows to results/ (on an idle machine)')
    args = parser.parse_args()
    if args.record: refuse_if_busy()
    tensors = fashion_tensors()
    dataset, (x, y) = fashion_mnist()['train'], tensors['train']
    n = min(len(y), args.batches*args.batch_size or len(y))
    n_batches, whole = -(-n//args.batch_size), -(-len(y)//args.batch_size)
    def ours(make_model, *cbs):
        return our_way((x[:n], y[:n]), args.batch_size, make_model, *cbs)
    found = compare(
        {
            'ancestors': ancestors_way(
                dataset.select(range(n)), args.batch_size, args.workers),
            'same net, ours': ours(ancestor_net),
            'same net, ours, bf16': ours(
                ancestor_net, MixedPrecisionCB(torch.bfloat16)),
            'resnet(), ours': ours(resnet),
            'resnet(), ours, bf16': ours(resnet, MixedPrecisionCB(torch.bfloat16)),
        },
        rounds=args.rounds,
        per=n_batches,
        unit='batch',
        sync=torch.cuda.synchronize if DEVICE.type == 'cuda' else None,
        limits={'same net, ours': 1 / 2.2, 'same net, ours, bf16': 1 / 3.3},
        title=f'Training, batches of {args.batch_size}, {torch.get_num_threads()} '
        f'threads, {DEVICE.type}',
        record=f'resnet-{DEVICE.type}' if args.record else '',
        source='toy' if tensors.source == 'toy' else 'real',
    )
    print(f'\nScaled from {n_batches} batches to an epoch of {whole}:')
    for name, r in found.items():
        print(
            f"{name:22} {r['median'] * whole:6.1f} s an epoch, {1 / r['ratio']:.2f} "
            "times as fast as the ancestors")
    sys.exit(any(r['ok'] is False for r in found.values()))
