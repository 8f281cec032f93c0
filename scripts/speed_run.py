"""How many seconds does each way take to 90, 92 and 94 % test accuracy?

    python scripts/speed_run.py [--ways ours,miniai] [--goals .90,.92] [--n 5]
        [--lengths 1,2,3] [--threads 2] [--runs FILE] [--tries]

Ways: ours, miniai, fastai, lightning, airbench; one whose library is missing is left
out, with a line that says so. A way drops out of a goal when a run that falls short of
it has taken five times as long as our mean to that goal. What was run is in
results/runs/speed.json, and only what is missing is run. Run it on a machine that does
nothing else, on a CPU or on a GPU. The page is nbs/23_challenge.ipynb.
"""
import argparse
import math
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from statistics import mean

import torch
import torch.nn.functional as F
from torch import nn

from nntrain.budgets import budget, default_device, has_bfloat16
from nntrain.challenge_parts import DATA, NETWORKS
from nntrain.compare import set_seed
from nntrain.data import fashion_dls
from nntrain.kept import KeptRuns
from nntrain.recipe_data import run_recipe
from nntrain.speed_run import GOALS, LENGTHS, SPRINTS, speed_runs, sprint_tries

DEVICE, PLAN = default_device(), budget('full')     # `--budget` sets another plan


def data(batch_size, valid):
    dls = fashion_dls(batch_size, valid, budget=PLAN, device=DEVICE, normalize=True)
    return dls.train, dls.valid


@torch.no_grad()
def accuracy(model, loader):
    model.eval()
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
    return right/loader.n


def stop(begin):
    "Seconds since `begin`, when the device is done"
    if DEVICE.type != 'cpu': torch.accelerator.synchronize()
    return time.perf_counter() - begin


# --- ours
def ours(epochs, seed, valid, goal):
    return sprint(replace(SPRINTS[goal], epochs=epochs), seed, valid)


def sprint(recipe, seed, valid):
    found = run_recipe(recipe, seed, valid, PLAN)
    return {name: found[name] for name in ('accuracy', 'seconds')}


# --- miniai's way, written anew from its description
def miniai_conv(n_in, n_out, ks=3, stride=1, act=True, norm=True):
    layers = [nn.Conv2d(n_in, n_out, ks, stride, ks//2)]
    if norm: layers.append(nn.BatchNorm2d(n_out))
    if act: layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class MiniaiBlock(nn.Module):
    def __init__(self, n_in, n_out, stride=2, ks=3):
        super().__init__()
        self.convs = nn.Sequential(
            miniai_conv(n_in, n_out, ks),
            miniai_conv(n_out, n_out, ks, stride, act=False))
        self.identity = miniai_conv(n_in, n_out, 1, act=False, norm=False)
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()

    def forward(self, x): return F.relu(self.convs(x) + self.identity(self.pool(x)))


def miniai_net(widths=(16, 32, 64, 128, 256, 512)):
    "4,907,588 parameters"
    model = nn.Sequential(
        MiniaiBlock(1, widths[0], 1, 5),
        *[MiniaiBlock(a, b) for a, b in zip(widths, widths[1:])],
        nn.Flatten(), nn.Linear(widths[-1], 10, bias=False), nn.BatchNorm1d(10))
    for m in model.modules():
        if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight)
    return model


def miniai(epochs, seed, valid, goal):
    train, judge = data(1024, valid)
    set_seed(seed)
    model = miniai_net().to(DEVICE)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, epochs*len(train))
    begin = time.perf_counter()
    for _ in range(epochs):
        model.train()
        for x, y in train:
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            cycle.step()
    return dict(seconds=stop(begin), accuracy=accuracy(model, judge))


# --- fastai and Lightning: our network, their usual way
def our_network(goal):
    recipe = SPRINTS[goal]
    return NETWORKS[recipe.network](recipe, DATA[recipe.data][1])


def loaders(valid, make=torch.utils.data.DataLoader):
    "Loaders of the library, over tensors that are normalised"
    train, judge = data(256, valid)
    def whole(loader):
        mean, std = loader.stats
        return torch.utils.data.TensorDataset(
            (loader.x.float()/255 - mean)/std, loader.y)
    return make(whole(train), batch_size=256, shuffle=True), judge


def fastai(epochs, seed, valid, goal):
    from fastai.callback.schedule import Learner    # with fit_one_cycle
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    train, judge = loaders(valid, partial(DataLoader, drop_last=True))
    set_seed(seed)
    learn = Learner(DataLoaders(train, train, device=DEVICE), our_network(goal),
                    loss_func=F.cross_entropy)
    learn.validate = learn._do_epoch_validate = lambda *args, **kwargs: None
    begin = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    return dict(seconds=stop(begin), accuracy=accuracy(learn.model, judge))


def lightning(epochs, seed, valid, goal):
    import lightning as L
    train, judge = loaders(valid)
    set_seed(seed)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = our_network(goal)
        def training_step(self, batch, i):
            x, y = batch
            return F.cross_entropy(self.model(x), y)
        def configure_optimizers(self):
            opt = torch.optim.Adam(self.parameters(), lr=1e-2)
            cycle = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, epochs*len(train))
            return [opt], [dict(scheduler=cycle, interval='step')]
    module = Module()
    trainer = L.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)
    begin = time.perf_counter()
    trainer.fit(module, train)
    return dict(seconds=stop(begin), accuracy=accuracy(module.model.to(DEVICE), judge))


# --- airbench: its network for grey pictures of 28 pixels, its optimizer and schedule
class AirGroup(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.first = self.conv(n_in, n_out)
        self.second = self.conv(n_out, n_out)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n_out, eps=1e-12, momentum=.4)
                                   for _ in range(2))
        for norm in self.norms: norm.weight.requires_grad_(False)

    @staticmethod
    def conv(n_in, n_out):
        conv = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        nn.init.dirac_(conv.weight.data[:n_in])
        return conv

    def forward(self, x):
        x = F.gelu(self.norms[0](F.max_pool2d(self.first(x), 2)))
        return F.gelu(self.norms[1](self.second(x)))


class AirNet(nn.Module):
    "Whitened 2×2 patches and their negatives, three groups, a linear layer"
    def __init__(self, images):
        super().__init__()
        self.whiten = nn.Conv2d(1, 8, 2)
        self.whiten.weight.requires_grad_(False)
        self.groups = nn.Sequential(AirGroup(8, 64), AirGroup(64, 256),
                                    AirGroup(256, 256))
        self.head = nn.Linear(256, 10, bias=False)
        self.head.weight.data /= self.head.weight.data.std()
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).reshape(-1, 4)
        values, vectors = torch.linalg.eigh(patches.T @ patches/len(patches))
        filters = (vectors/(values + 5e-4).sqrt()).T.reshape(4, 1, 2, 2)
        self.whiten.weight.data[:] = torch.cat([filters, -filters])

    def forward(self, x):
        x = self.groups(F.gelu(self.whiten(x)))
        x = F.adaptive_max_pool2d(x, 1).flatten(1)
        return self.head(x)/x.shape[1]


def air_optimizers(model):
    "Its Muon for filters, Nesterov for the rest, as they were published"
    batch, bias, head = 2000, .053, .67
    decay = 2e-6*batch
    def group(params, lr): return dict(params=list(params), lr=lr,
                                       weight_decay=decay/lr)
    norms = (p for name, p in model.named_parameters()
             if 'norm' in name and p.requires_grad)
    filters = [p for p in model.groups.parameters() if p.ndim == 4]
    return [torch.optim.SGD(
        [group([model.whiten.bias], bias), group(norms, bias),
         group([model.head.weight], head)], momentum=.85, nesterov=True),
        AirMuon(filters, lr=.24, momentum=.6)]


class AirMuon(torch.optim.Optimizer):
    "Nesterov momentum, whitened; the weight keeps its length"
    def __init__(self, params, lr, momentum):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        from nntrain.matrix import newton_schulz
        for group in self.param_groups:
            for p in group['params']:
                state, beta = self.state[p], group['momentum']
                buffer = state.setdefault('buffer', torch.zeros_like(p))
                buffer.mul_(beta).add_(p.grad)
                update = p.grad + beta*buffer
                p.mul_(math.sqrt(len(p))/p.norm())
                white = newton_schulz(update.flatten(1), steps=3).to(p.dtype)
                p.add_(white.view(p.shape), alpha=-group['lr'])


def airbench(epochs, seed, valid, goal):
    from nntrain.challenge_parts import EpochLoader
    from nntrain.transforms import RandomCrop
    train, judge = data(2000, valid)
    mean, std = train.stats
    set_seed(seed)
    begin = time.perf_counter()              # whitening is a part of its time
    model = AirNet((train.x[:5000].float()/255 - mean)/std).to(
        DEVICE, memory_format=torch.channels_last)
    train = EpochLoader(train.x, train.y, 2000, turns=True, draw=seed, shuffle=True,
                        drop_last=True, mean=mean, std=std)
    opts, move = air_optimizers(model), RandomCrop(2)
    peaks = [[g['lr'] for g in opt.param_groups] for opt in opts]
    n_steps = epochs*len(train)
    half = torch.autocast(DEVICE.type, torch.bfloat16, enabled=has_bfloat16(DEVICE))
    for step, (x, y) in enumerate(b for _ in range(epochs) for b in train):
        model.train()
        for opt, rates in zip(opts, peaks):
            for group, peak in zip(opt.param_groups, rates):
                group['lr'] = peak*(1 - step/n_steps)
        with half: loss = F.cross_entropy(model(move(x)), y, label_smoothing=.2)
        model.zero_grad()
        loss.backward()
        for opt in opts: opt.step()
    return dict(seconds=stop(begin), accuracy=accuracy(model, judge))


WAYS = dict(ours=ours, miniai=miniai, fastai=fastai, lightning=lightning,
            airbench=airbench)


def longest(kept, goal):
    "Seconds of a run after which a way drops out: five times our mean to the goal"
    row = kept.row(f'ours, {goal:.2f}', 'seconds')['values']
    return 5*mean(row) if row else math.inf


def numbers(text, kind): return [kind(word) for word in text.split(',')]


def main(words=None):
    global PLAN
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('--ways', help=f'of {", ".join(WAYS)}; default: all')
    ask.add_argument('--goals', help='accuracies; default: .90,.92,.94')
    ask.add_argument('--n', type=int, default=5, help='runs of each; default: 5')
    ask.add_argument('--lengths', help='epochs that a way may take')
    ask.add_argument('--tries', action='store_true',
                     help='only what our own way tried for .92, on held-out pictures')
    ask.add_argument('--threads', type=int, help='default: all cores')
    ask.add_argument('--budget', default='full', choices=('quick', 'short', 'full'),
                     help='quick: a few pictures, to try the script out')
    ask.add_argument('--runs', default='speed', help='file that keeps the runs; '
                     'default: results/runs/speed.json')
    given = ask.parse_args(words)
    if given.threads: torch.set_num_threads(given.threads)
    ways = [way.strip() for way in (given.ways or ','.join(WAYS)).split(',')]
    goals = GOALS if given.goals is None else numbers(given.goals, float)
    lengths = LENGTHS if given.lengths is None else numbers(given.lengths, int)
    warnings.filterwarnings('ignore')        # of the libraries
    try:
        if unknown := [way for way in ways if way not in WAYS]: raise ValueError(
            f'no way {", ".join(unknown)}: choose from {", ".join(WAYS)}')
        if absent := [f'{goal:g}' for goal in goals if goal not in GOALS]:
            raise ValueError(f'no goal {", ".join(absent)}: choose from '
                             f'{", ".join(map(str, GOALS))}')
        PLAN = budget(given.budget)
        kept = KeptRuns(given.runs, given.budget)
        if given.tries:
            for name in sprint_tries(kept, sprint):
                print(f"{name}: {mean(kept.row(name)['values']):.4f} in "
                      f"{mean(kept.row(name, 'seconds')['values']):.1f} s", flush=True)
            return
        for way, goal in ((way, goal) for goal in goals for way in ways):
            if way in ('fastai', 'lightning') and find_spec(way) is None:
                print(f'{way} is not installed: left out')
                continue
            within = math.inf if way == 'ours' else longest(kept, goal)
            name = speed_runs(kept, way, goal, WAYS[way], given.n, lengths, within)
            row = kept.row(name, 'seconds')['values'] if name else []
            print(f'{way} to {goal:.2f}: ' + (
                f'{mean(row):.1f} s, n = {len(row)}' if row else
                f'not reached, in {max(lengths)} epochs or {within:.0f} s'), flush=True)
    except ValueError as e: sys.exit(f'speed_run.py: {e}')
    except KeyboardInterrupt:
        print('stopped: the same command goes on with what is missing', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__': main()
