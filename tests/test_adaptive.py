"""The limit of Adam's step, the first compiled step, and facts of chapter 12. That its
optimizers equal torch's, and do what its own tests ask, is in test_optimizers.py."""
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nntrain.adaptive import Adam, AdamW, RMSProp
from nntrain.annealing import AdamAnnealed
from nntrain.momentum import EMAMomentum, Momentum

KINDS = Momentum, EMAMomentum, RMSProp, Adam, AdamW, AdamAnnealed
every = pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
compiler = shutil.which('g++') or shutil.which('c++')


def parameters():
    return [
        nn.Parameter(torch.ones(shape, dtype=torch.float64))
        for shape in ((3, 2), (), (0,))]


@every
@pytest.mark.skipif(not compiler, reason='torch.compile needs a C++ compiler here')
def test_torch_compile_traces_the_first_step_too(kind):
    "The state is made inside of the graph"
    for decay in 0., .1:
        a, b = parameters(), parameters()
        compiled = kind(a, lr=torch.tensor(.1, dtype=torch.float64), weight_decay=decay)
        plain = kind(b, lr=.1, weight_decay=decay)
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            step = torch.compile(
                lambda: compiled.step(), backend='eager', fullgraph=True)
            for t in range(3):
                for p, q in zip(a, b): p.grad = q.grad = torch.full_like(p, t - .5)
                step(); plain.step()
        assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize('kind', [Adam, torch.optim.Adam])
@pytest.mark.parametrize('betas', [(.9, .999), (.9, .95), (.5, .9)])
def test_no_step_of_adam_is_longer_than_the_limit(kind, betas):
    "And random growing gradients come near it, so `lr` is not the limit"
    beta1, beta2 = betas
    limit = (1-beta1)/(1-beta2)**.5/(1-beta1**2/beta2)**.5
    p = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    opt = kind([p], lr=1., betas=betas, eps=0.)
    zeros = torch.zeros_like(p)
    opt.state[p] = dict(
        step=torch.tensor(1e6), exp_avg=zeros.clone(), exp_avg_sq=zeros.clone())
    gen, longest = torch.Generator().manual_seed(0), 0.
    growth = torch.linspace(.9, 1.5, 50, dtype=torch.float64)*beta2/beta1
    for t in range(100):
        before = p.detach().clone()
        p.grad = growth**t*(1 + .01*torch.randn(50, generator=gen, dtype=torch.float64))
        opt.step()
        longest = max(longest, (p - before).abs().max().item())
    assert .97*limit < longest < limit + 1e-9
    assert longest > 1.05


def walked(grads, eps, lr=.1):
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = Adam([p], lr=lr, betas=(.9, .99), eps=eps)
    for g in grads: p.grad = g.clone(); opt.step()
    return p.detach()


def test_the_scale_of_the_loss_matters_only_through_eps():
    gen = torch.Generator().manual_seed(0)
    grads = torch.randn(20, 3, generator=gen, dtype=torch.float64)
    plain = walked(grads, eps=1e-2)
    assert_close(walked(1024*grads, eps=10.24), plain, rtol=0, atol=1e-12)
    assert (walked(1024*grads, eps=1e-2) - plain).abs().max() > 1e-3


def test_with_a_huge_eps_adam_steps_along_the_debiased_mean():
    grads = torch.tensor([.3, -.1, .2, .4], dtype=torch.float64)
    mean, way = 0., 0.
    for t, g in enumerate(grads.tolist(), 1):
        mean = .9*mean + .1*g
        way -= mean/(1 - .9**t)
    got = walked([g.expand(3) for g in grads], eps=1e6, lr=1e6)
    assert_close(got, torch.full_like(got, way), rtol=1e-5, atol=0)


@pytest.mark.parametrize('size', [1., 1000.])
def test_a_step_is_as_long_as_the_gradients_agree(size):
    def last_move(signs):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        opt = Adam([p], lr=1., betas=(.9, .99), eps=0.)
        for sign in signs:
            before, p.grad = p.item(), torch.full_like(p, sign*size)
            opt.step()
        return abs(p.item() - before)
    assert last_move([1.]*40) == pytest.approx(1, abs=1e-9)
    assert last_move([1., -1.]*20) < .1


@pytest.mark.parametrize('kind, wrong, text', [
    (RMSProp, dict(alpha=1.), 'alpha must be a number of at least 0 and below 1'),
    (Adam, dict(betas=(.9, 1.)), r'betas\[1\] must be a number of at least 0'),
    (AdamW, dict(eps=-1.), 'eps must be a number of at least 0')])
def test_values_out_of_range_are_refused(kind, wrong, text):
    with pytest.raises(ValueError, match=text): kind(parameters(), **wrong)
