"""The acting callbacks once more: one plain loop that knows what each should do.

It uses no callback. Random numbers are drawn in the same order."""
import contextlib
import math
from itertools import islice
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from nntrain.cycles import one_cycle
from nntrain.photo_transforms import RandomResizedCrop
from nntrain.schedule_free import averaged
from nntrain.soft_targets import cutmix, mix_targets, mixup
from nntrain.transforms import RandomFlip


def prepared(has, x, y, training, epoch):
    "The batch, and its soft targets"
    if training and has('AugmentCB'): x = RandomFlip(.5)(x)
    if has('BatchTransformCB'): x = x + .1
    if training and has('ProgressiveCB'): x = RandomResizedCrop((2, 3, 3)[epoch])(x)
    if has('NormalizeCB'): x = (x - torch.tensor(.1))/2
    mixes = training and (has('MixUpCB') or has('CutMixCB'))
    if not mixes: return x, y
    other, alpha = torch.randperm(len(x)), .4 if has('MixUpCB') else 1.
    lam = torch.distributions.Beta(alpha, alpha).sample((len(x),))
    if has('MixUpCB'): x, lam = mixup(x, other, torch.maximum(lam, 1-lam))
    else: x, lam = cutmix(x, other, lam)
    return x, mix_targets(y, other, lam, 3)


class ByHand:
    "A training of three epochs, with the callbacks of these names"
    def __init__(self, learn, names):
        self.has, self.model, self.dls = names.__contains__, learn.model, learn.dls
        self.opt = learn.opt_func(self.model.parameters(), lr=.05)
        self.params = list(self.model.parameters())
        half = {'MixedPrecisionCB': torch.bfloat16, 'float16': torch.float16}
        dtype = next((half[name] for name in names if name in half), None)
        self.cast = torch.autocast('cpu', dtype, enabled=dtype is not None)
        self.scale = 2.**8 if self.has('float16') else 1.
        self.per_epoch = 2 if self.has('BatchLimitCB') else 3
        self.group = 3 if self.has('GradientAccumulationCB') else 1
        self.planned = 3*math.ceil(self.per_epoch/self.group)
        self.taken, self.history, self.rate = 0, [], .05
        self.grads, self.weights = None, 0
        self.mean, self.mean_weight = [0.]*len(self.params), 0.
        self.best, self.level = None, None

    def loss(self, x, y):
        with self.cast:
            preds, states = self.model(x), None
            if self.model.gives: preds, states, _ = preds
            return F.cross_entropy(preds, y), states

    def lr(self):
        if self.has('ScheduleCB'):
            return one_cycle(.2)(min(1, self.taken/max(1, self.planned-1)))
        if self.has('TorchSchedulerCB'): return .05*.1**(self.taken//2)
        if self.has('LRFinderCB'): return .01*100**(self.taken/29)
        return self.rate

    def step(self):
        for p, g in zip(self.params, self.grads): p.grad = g/self.weights
        self.grads, self.weights = None, 0
        if self.has('GradientClipCB'): torch.nn.utils.clip_grad_norm_(self.params, .3)
        squares = sum(p.grad.float().square().sum() for p in self.params)
        self.squares.append((squares/sum(p.numel() for p in self.params)).item())
        for group in self.opt.param_groups: group['lr'] = self.lr()
        self.opt.step()
        self.taken += 1
        self.mean_weight = .9*self.mean_weight + .1
        self.mean = [.9*m + .1*p.detach().double()
                     for m, p in zip(self.mean, self.params)]

    def train(self, epoch):
        self.squares, losses, rows = [], [], []
        limit = 1 if self.has('SingleBatchCB') else self.per_epoch
        for i, (x, y) in enumerate(islice(self.dls.train, limit)):
            loss, states = self.loss(*prepared(self.has, x, y, True, epoch))
            losses.append(loss.item()), rows.append(len(x))
            if self.has('RNNRegularizerCB'):
                loss = loss + .5*states.float().square().mean()
            grads = torch.autograd.grad(loss*self.scale, self.params)
            grads = [g/self.scale*len(x) for g in grads]
            old = self.grads or [0]*len(grads)
            self.grads = [a + b for a, b in zip(old, grads)]
            self.weights += len(x)
            self.waiting = getattr(self, 'waiting', 0) + 1
            if self.waiting == self.group or i + 1 == self.per_epoch:
                self.waiting = 0
                self.step()
        if self.has('AnnealCB'): self.rate *= .9
        whole = i + 1 == self.per_epoch    # an epoch left early does not count
        if self.has('AutoAnnealCB') and whole: self.look()
        return sum(a*n for a, n in zip(losses, rows))/sum(rows)

    def look(self):
        lowest = self.lowest = min(getattr(self, 'lowest', math.inf),
                                   sum(self.squares)/len(self.squares))
        if self.level is None: self.level = lowest
        elif lowest <= .95*self.level: self.level = lowest; self.rate /= 4

    @contextlib.contextmanager
    def validated(self):
        "The weights that are validated"
        if self.has('ScheduleFreeCB'):
            with averaged(self.opt): yield
        elif self.has('WeightAveragingCB') and self.mean_weight:
            kept = [p.detach().clone() for p in self.params]
            for p, m in zip(self.params, self.mean): p.data.copy_(m/self.mean_weight)
            yield
            for p, k in zip(self.params, kept): p.data.copy_(k)
        else: yield

    def run(self):
        waited = 0
        for epoch in range(3):
            if waited and self.has('EarlyStoppingCB'): break
            self.model.reset()
            train_loss = self.train(epoch)
            self.model.reset()
            with self.validated(), torch.no_grad():
                valid_loss = self.loss(*prepared(self.has, *next(iter(self.dls.valid)),
                                                 False, epoch))[0].item()
                if self.best is None or train_loss > self.best:
                    self.best = train_loss
                    self.best_weights = [p.detach().clone() for p in self.params]
            self.history.append((train_loss, valid_loss))
            waited = epoch                       # no gain of 9 after the first epoch
            if self.has('ReduceOnPlateauCB') and waited: self.rate *= .1
        with torch.no_grad():
            if self.has('SaveBestCB'):
                for p, b in zip(self.params, self.best_weights): p.copy_(b)
            elif self.has('ScheduleFreeCB'):
                with averaged(self.opt): return self.result()
        return self.result()

    def result(self):
        return SimpleNamespace(weights=[p.detach().clone() for p in self.params],
                               history=self.history, taken=self.taken)
