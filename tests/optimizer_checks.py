"What the tests of optimizers share: the same gradients for several optimizers, and whether these agree"
import torch
from torch.testing import assert_close

ATOL, RTOL = 1e-12, 1e-13  # float64; the second for weights that a drawn setting blew up to 10⁴ and more, whose last bit alone is above the first


def set_gradients(gen, *lists, missing=.3, rows=False):
    "The same random gradients for the parameters of all `lists`; some are missing, or (`rows`) touch only one row"
    for ps in zip(*lists, strict=True):
        grad = None if torch.rand((), generator=gen) < missing else torch.randn(ps[0].shape, generator=gen, dtype=torch.float64)
        if grad is not None and rows and grad.ndim > 0:
            keep = torch.zeros_like(grad)
            keep[0] = 1
            grad = grad*keep
        for p in ps: p.grad = None if grad is None else grad.clone()


def same_parameters(ours, theirs):
    for p, q in zip(ours, theirs, strict=True): assert_close(p, q, rtol=RTOL, atol=ATOL)


def step_alike(*runs):
    """One step of each (parameters, optimizer): all must agree with the first one, without editing a gradient, and go on from its parameters. Comparing only at the end would
    be wrong: where the decay is part of the gradient, the rate large and the memory short, fifty steps blow up the last bit a million times (chaos), which says nothing about a formula"""
    (first, _), *others = runs
    grads = [None if p.grad is None else p.grad.clone() for p in first]
    for _, opt in runs: opt.step()
    assert all(p.grad is None if g is None else torch.equal(p.grad, g) for p, g in zip(first, grads, strict=True)), 'p.grad was edited'
    for ps, _ in others:
        same_parameters(ps, first)
        with torch.no_grad():
            for p, q in zip(ps, first, strict=True): p.copy_(q)
