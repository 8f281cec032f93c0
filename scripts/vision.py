"""Run what chapters 19 and 20 say about depth and augmentation; stop it at any time.

    python scripts/vision.py [TABLE …] [--seconds S]

TABLE is one of sizes, gamma, epochs, depth (default: all, in this order). What was run
is in results/runs/vision.json, and only what is missing is run. Rates are chosen on
held-out training pictures; the numbers that count are those on the test split.
"""
import argparse
import sys
import time
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from nntrain.adaptive import AdamW
from nntrain.augment import AugmentCB
from nntrain.blocks import cnn
from nntrain.budgets import default_device, has_bfloat16
from nntrain.compare import set_seed
from nntrain.cycles import momentum_cycle, one_cycle
from nntrain.data import DataLoaders, fashion_dls
from nntrain.kept import KeptRuns
from nntrain.learner import Learner
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.momentum import Momentum
from nntrain.precision import MixedPrecisionCB
from nntrain.prepare import DeviceCB, NormalizeCB
from nntrain.resnet import Stack, resnet
from nntrain.sources import FASHION_MEAN, FASHION_STD
from nntrain.steering import ScheduleCB
from nntrain.transforms import RandomCrop, RandomFlip

OPTIMIZERS = {'AdamW': partial(AdamW, weight_decay=.01), 'SGD': Momentum}
SIZES = 500, 2000, 6000, 20000, 60000
STEPS, BATCH = 1920, 125                     # of `sizes`: whole epochs of each size
DEPTHS = 2, 6, 12, 24
RATES = {'AdamW': (1e-3, 3e-3, 1e-2, 3e-2), 'SGD': (3e-3, 3e-2, 1e-1, 3e-1)}
CHOICE_SEED = 100
narrow = partial(resnet, (8, 16, 32, 64), strides=(2, 2, 2, 2))
wider = partial(resnet, (16, 32, 64, 128), strides=(2, 2, 2, 2))    # 303,866 parameters


def fit(make_model, dls, n_epochs, lr, seed, tfms=(), opt='AdamW'):
    "Train once -> accuracy and loss afterwards, loss in the last epoch, seconds"
    set_seed(seed)
    device = default_device()
    half = [MixedPrecisionCB(torch.bfloat16)] if has_bfloat16(device) else []
    schedule = ScheduleCB(lr=one_cycle(lr), momentum=momentum_cycle())
    learn = Learner(
        make_model().to(memory_format=torch.channels_last), dls, F.cross_entropy,
        OPTIMIZERS[opt], lr,
        cbs=[DeviceCB(device), NormalizeCB(FASHION_MEAN, FASHION_STD), *half, schedule,
             MetricsCB(Accuracy()), *([AugmentCB(*tfms)] if tfms else [])])
    begin = time.perf_counter()
    learn.fit(n_epochs, valid=False)
    seconds = time.perf_counter() - begin
    loss = learn.history[-1]['train_loss']
    learn.fit(1, train=False)
    last = learn.history[-1]
    return dict(accuracy=last['valid_accuracy'], loss=last['valid_loss'],
                train_loss=loss, seconds=round(seconds, 1))


def flips(): return RandomCrop(1), RandomFlip()


def first_pictures(n, seed):
    "The same `n` training pictures for all runs of a seed"
    whole = fashion_dls(BATCH, seed=seed)
    order = torch.randperm(whole.train.n, generator=torch.Generator().manual_seed(seed))
    kept = order[:n].to(whole.train.x.device)
    return DataLoaders.from_tensors(
        (whole.train.x[kept], whole.train.y[kept]), (whole.valid.x, whole.valid.y),
        batch_size=BATCH, seed=seed)


def sizes():
    "With and without augmentation, on more and more pictures, in equal steps"
    for seed, n, arm in product(range(8), SIZES, ('none', 'crop and flip')):
        def run():
            dls = first_pictures(n, seed)
            return fit(cnn, dls, STEPS//len(dls.train), 1e-2, seed,
                       flips() if arm != 'none' else ())
        yield f'sizes, {n}, {arm}', seed, run


def gamma():
    "The last γ of each block at 0 and at 1"
    for seed, start in product(range(10), (0, 1)):
        def run():
            make = partial(narrow, zero_init=start == 0)
            return fit(make, fashion_dls(256, seed=seed), 2, 1e-2, seed)
        yield f'gamma, {start}', seed, run


def epochs():
    "All pictures, a residual network, 20 epochs, with and without augmentation"
    for seed, arm in product(range(8), ('none', 'crop and flip')):
        def run():
            dls = fashion_dls(256, seed=seed)
            return fit(wider, dls, 20, 1e-2, seed, flips() if arm != 'none' else ())
        yield f'epochs, 20, {arm}', seed, run


def depth(kept):
    "Four depths, plain and with skip connections, each at the best of its rates"
    kinds = list(product(OPTIMIZERS, ('plain', 'skip'), DEPTHS))
    def trained(opt, kind, n, lr, seed, valid):
        dls = fashion_dls(256, valid, seed=seed)
        return fit(partial(Stack, n, kind == 'skip'), dls, 5, lr, seed, opt=opt)
    for opt, kind, n in kinds:
        for lr in RATES[opt]:
            yield (f'depth, {opt}, {kind}, {n}, rate {lr:g}', CHOICE_SEED,
                   lambda: trained(opt, kind, n, lr, CHOICE_SEED, 'split'))
    for seed, (opt, kind, n) in product(range(3), kinds):
        tried = {lr: kept.row(f'depth, {opt}, {kind}, {n}, rate {lr:g}')['values'][0]
                 for lr in RATES[opt]}
        best = max(tried, key=tried.get)
        yield (f'depth, {opt}, {kind}, {n}', seed,
               lambda: dict(trained(opt, kind, n, best, seed, 'test'), lr=best))


TABLES = dict(sizes=sizes, gamma=gamma, epochs=epochs, depth=depth)


def run_tables(names, kept, seconds=None):
    "Run what is missing; stop after the first run that ends later than `seconds`"
    begin = time.perf_counter()
    for name in names:
        for run in TABLES[name](kept) if name == 'depth' else TABLES[name]():
            if run[:2] not in kept:
                numbers = kept.get(*run)
                print(f'{run[0]}, seed {run[1]}: {numbers}', flush=True)
            if seconds is not None and time.perf_counter() - begin > seconds: return


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('tables', nargs='*', help=f'of {", ".join(TABLES)}; default: all')
    ask.add_argument('--seconds', type=float,
                     help='stop after the first run that ends later')
    given = ask.parse_args()
    if unknown := [name for name in given.tables if name not in TABLES]:
        sys.exit(f'vision.py: no table {", ".join(unknown)}; there are '
                 f'{", ".join(TABLES)}')
    try: run_tables(given.tables or TABLES, KeptRuns('vision'), given.seconds)
    except ValueError as e: sys.exit(f'vision.py: {e}')
    except KeyboardInterrupt:
        print('stopped: the same command goes on with what is missing', file=sys.stderr)
        sys.exit(130)
