"""What the tests of optimizers share: all optimizers of the book, the same gradients
for several of them, and whether these agree"""
from functools import partial

import torch
from torch import nn
from torch.testing import assert_close

from nntrain.adaptive import Adam, AdamW, RMSProp, adam_direction
from nntrain.annealing import AdamAnnealed
from nntrain.compose import Composed, compose
from nntrain.kronecker import SOAP, Shampoo
from nntrain.matrix import Muon
from nntrain.momentum import EMAMomentum, Momentum
from nntrain.optimizer import Optimizer
from nntrain.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from nntrain.sgd import SGD
from nntrain.split import split
from nntrain.parts import (
    add_decay,
    average_grad,
    average_sqr_grad,
    exact_direction,
    rms_direction,
    sgd_step,
    square_average,
    step_count,
    sum_grad,
    weight_sums,
)
from nntrain.zoo import LAMB, LARS, Lion, RAdam, with_lookahead

# float64; the second for weights that a drawn setting blew up to 10⁴ and more, whose
# last bit alone is above the first
ATOL, RTOL = 1e-12, 1e-13

adam = average_grad, average_sqr_grad, step_count, adam_direction


class OneAdam(Composed):
    parts, hypers = (add_decay, *adam, sgd_step), dict(lr=1e-3)
    torch_keys = Optimizer.torch_keys | dict(
        amsgrad=False, capturable=False, decoupled_weight_decay=False)

class OneAdamW(Composed):
    parts = *adam, add_decay, sgd_step
    hypers = dict(lr=1e-3, weight_decay=1e-2)
    torch_keys = OneAdam.torch_keys | dict(decoupled_weight_decay=True)

class OneRMSProp(Composed):
    parts = add_decay, square_average, step_count, rms_direction, sgd_step
    hypers = dict(lr=1e-2)
    torch_keys = Optimizer.torch_keys | dict(
        momentum=0, centered=False, capturable=False)

class OneMomentum(Composed):
    parts, hypers = (add_decay, sum_grad, sgd_step), dict(lr=1e-3)
    torch_keys = Optimizer.torch_keys | dict(dampening=0, nesterov=False)

class OneSGD(Composed):
    parts, hypers = (add_decay, sgd_step), dict(lr=1e-3)
    torch_keys = SGD.torch_keys

class Users(Composed):
    "As a user writes one, with a method of its own"
    parts, hypers = (sum_grad, sgd_step), dict(lr=1e-3)
    def doubled(self): return 2*self.param_groups[0]['lr']


Exact = compose(
    average_grad, average_sqr_grad, weight_sums, exact_direction, sgd_step,
    name='Exact', lr=1e-3)

def by_shape(name, p): return 'matrix' if p.ndim > 1 else 'rest'

Split = split(dict(matrix=LAMB, rest=OneAdamW), by_shape, name='Split', lr=1e-3)

def for_matrices(kind, **hypers):
    "An optimizer that takes matrices only, beside the parts of AdamW for the rest"
    return split(dict(matrix=kind, rest=(*adam, add_decay, sgd_step)), by_shape,
                 name=f'Split{kind.__name__}', lr=1e-3, rest=dict(betas=(.9, .99)),
                 matrix=hypers)

# bfloat16 would make the last bit of an order of summation a change of 2⁻⁸
SplitMuon = for_matrices(Muon, ns_dtype='float64')

# every optimizer of the book: called with parameters and, if need be, lr and foreach
ALL = {
    'SGD': SGD, 'Momentum': Momentum, 'Nesterov': partial(Momentum, nesterov=True),
    'EMAMomentum': EMAMomentum, 'RMSProp': RMSProp, 'Adam': Adam, 'AdamW': AdamW,
    'AdamAnnealed': AdamAnnealed, 'OneSGD': OneSGD, 'OneMomentum': OneMomentum,
    'OneRMSProp': OneRMSProp, 'OneAdam': OneAdam, 'OneAdamW': OneAdamW, 'LAMB': LAMB,
    'LARS': partial(LARS, trust=0.1), 'Lion': Lion, 'RAdam': RAdam, 'Exact': Exact,
    'Lookahead': with_lookahead(OneAdam), 'LookaheadUsers': with_lookahead(Users),
    'Split': Split, 'Muon': SplitMuon, 'Shampoo': for_matrices(Shampoo, every=2),
    'SOAP': for_matrices(SOAP, every=2, betas=(.95, .95)),
    'ScheduleFreeSGD': ScheduleFreeSGD, 'ScheduleFreeAdamW': ScheduleFreeAdamW}


def class_of(make): return make.func if isinstance(make, partial) else make


def parameters(seed=0, shapes=((3, 4), (4,), (), (2, 2, 2)), dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype))
        for shape in shapes]


def set_gradients(gen, *lists, missing=.3, rows=False):
    """The same random gradients for the parameters of all `lists`; some are missing, or
    (`rows`) touch only one row"""
    for ps in zip(*lists, strict=True):
        absent = torch.rand((), generator=gen) < missing
        grad = (
            None if absent
            else torch.randn(ps[0].shape, generator=gen, dtype=torch.float64))
        if grad is not None and rows and grad.ndim > 0:
            keep = torch.zeros_like(grad)
            keep[0] = 1
            grad = grad*keep
        for p in ps: p.grad = None if grad is None else grad.to(p.dtype, copy=True)


def same_parameters(ours, theirs):
    for p, q in zip(ours, theirs, strict=True): assert_close(p, q, rtol=RTOL, atol=ATOL)


def step_alike(*runs):
    """One step of each (parameters, optimizer): all must agree with the first one,
    without editing a gradient, and go on from its parameters. Comparing only at the
    end would be wrong: where the decay is part of the gradient, the rate large and
    the memory short, fifty steps blow up the last bit a million times (chaos), which
    says nothing about a formula"""
    (first, _), *others = runs
    grads = [None if p.grad is None else p.grad.clone() for p in first]
    for _, opt in runs: opt.step()
    untouched = all(p.grad is None if g is None else torch.equal(p.grad, g)
                    for p, g in zip(first, grads, strict=True))
    assert untouched, 'p.grad was edited'
    for ps, _ in others:
        same_parameters(ps, first)
        with torch.no_grad():
            for p, q in zip(ps, first, strict=True): p.copy_(q)


def train(seed, n_steps, *runs, missing=.3, before=lambda group, t: None):
    """The same random gradients, some of them missing, for each (parameters,
    optimizer); all agree after each step"""
    gen = torch.Generator().manual_seed(seed)
    for t in range(n_steps):
        set_gradients(gen, *(ps for ps, _ in runs), missing=missing)
        for _, opt in runs:
            for group in opt.param_groups: before(group, t)
        step_alike(*runs)
