"""What torch's own tests ask of an optimizer, asked of those of chapters 6 and 8; and the
limit of Adam's step. That they equal torch's is in the table of test_optimizers.py."""
import copy
import itertools
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nntrain.adaptive import Adam, AdamAnnealed, AdamW, AnnealCB, RMSProp
from nntrain.momentum import EMAMomentum, Momentum

KINDS = Momentum, EMAMomentum, RMSProp, Adam, AdamW, AdamAnnealed
SHAPES = (3, 2), (), (0,)
every = pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
both_forms = pytest.mark.parametrize('foreach', [True, False])
compiler = shutil.which('g++') or shutil.which('c++')


def parameters(shapes=SHAPES, dtypes=(torch.float64,)):
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in zip(shapes, itertools.cycle(dtypes))]


def walk(opt, params, n_steps=4):
    "Some steps with random gradients, always the same ones"
    gen = torch.Generator().manual_seed(0)
    for _ in range(n_steps):
        for p in params: p.grad = torch.randn(p.shape, generator=gen).to(p)
        opt.step()
    return [p.detach().clone() for p in params]


def walked(kind, params=None, **hypers):
    params = parameters() if params is None else params
    return walk(kind(params, **hypers), params)


@every
def test_hooks_may_leave_entries_of_their_own_in_the_state(kind):
    params = parameters()
    opt = kind(params, lr=.1)
    walk(opt, params)
    opt.register_state_dict_pre_hook(lambda o: o.state.update(before_saving=1))
    opt.register_load_state_dict_post_hook(lambda o: o.state.update(after_loading=True))
    opt.load_state_dict(opt.state_dict())
    assert opt.state['before_saving'] == 1 and opt.state['after_loading'] is True
    walk(opt, params)


@every
def test_hooks_around_a_step_run(kind):
    params, seen = parameters(), []
    opt = kind(params, lr=.1)
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append('before'))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append('after'))
    walk(opt, params, n_steps=2)
    assert seen == ['before', 'after']*2


@every
@both_forms
@pytest.mark.parametrize('shape', [(), (1,)])
def test_a_rate_in_a_tensor_of_one_element(kind, foreach, shape):
    for decay in 0., .1:
        kw = dict(foreach=foreach, weight_decay=decay)
        rate = torch.full(shape, .1, dtype=torch.float64)
        assert_close(walked(kind, lr=rate, **kw), walked(kind, lr=.1, **kw), rtol=0, atol=1e-12)


@every
@pytest.mark.parametrize('decay', [0., .1])
def test_types_mixed_in_one_group(kind, decay):
    "In one group as in a group, and in a call, for each type"
    dtypes = torch.float16, torch.float64, torch.bfloat16, torch.float32
    shapes = (3, 2), (2,), (2,), (), (2,)
    hypers = dict(lr=.1, weight_decay=decay)
    want = []
    for dtype, shape in zip(itertools.cycle(dtypes), shapes):
        p = nn.Parameter(torch.ones(shape, dtype=dtype))
        want.append((p, kind([p], foreach=False, **hypers)))
    together = parameters(shapes, dtypes)
    opt = kind(together, **hypers)
    gen = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, (q, alone) in zip(together, want):
            p.grad = q.grad = torch.randn(p.shape, generator=gen).to(p)
            alone.step()
        opt.step()
    for p, (q, _) in zip(together, want):
        coarse = p.dtype in (torch.float16, torch.bfloat16)
        assert_close(p, q, **(dict(rtol=.02, atol=.02) if coarse else dict(rtol=1e-5, atol=1e-6)))


@pytest.mark.parametrize('kind', [RMSProp, Adam, AdamW, AdamAnnealed], ids=lambda kind: kind.__name__)
def test_steps_saved_as_numbers(kind):
    params = parameters()
    opt = kind(params, lr=.1)
    walk(opt, params)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved['state'].values(): state['step'] = int(state['step'])
    old = copy.deepcopy(params)
    loaded = kind(old, lr=7.)
    loaded.load_state_dict(saved)
    assert {type(state['step']) for state in loaded.state.values()} == {torch.Tensor}
    assert {state['step'].dtype for state in loaded.state.values()} == {torch.float32}
    assert_close(walk(loaded, old), walk(opt, params), rtol=0, atol=1e-12)


@every
@both_forms
def test_half_precision_needs_no_special_case(kind, foreach):
    for dtype in torch.float16, torch.bfloat16:
        params = parameters(dtypes=[dtype])
        got = walked(kind, params, lr=.1, foreach=foreach)
        assert all(p.isfinite().all() and p.dtype == dtype for p in got)
        assert not torch.equal(got[0], torch.ones_like(got[0]))


@pytest.mark.parametrize('kind', [Adam, AdamW, AdamAnnealed], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize('which', [0, 1])
def test_betas_in_tensors_are_refused_in_words(kind, which):
    betas = [.9, .99]
    betas[which] = torch.tensor(betas[which])
    with pytest.raises(ValueError, match=rf'betas\[{which}\] must be a plain number'):
        kind(parameters(), betas=tuple(betas))


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
            step = torch.compile(lambda: compiled.step(), backend='eager', fullgraph=True)
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
    opt.state[p] = dict(step=torch.tensor(1e6), exp_avg=zeros.clone(), exp_avg_sq=zeros.clone())
    gen, longest = torch.Generator().manual_seed(0), 0.
    growth = torch.linspace(.9, 1.5, 50, dtype=torch.float64)*beta2/beta1
    for t in range(100):
        before = p.detach().clone()
        p.grad = growth**t*(1 + .01*torch.randn(50, generator=gen, dtype=torch.float64))
        opt.step()
        longest = max(longest, (p - before).abs().max().item())
    assert .97*limit < longest < limit + 1e-9
    assert longest > 1.05


def test_anneal_cb_says_what_it_writes():
    assert AnnealCB.owns == ('lr',)
    for per in 'step', 'epoch': assert AnnealCB(per=per).owns == ('lr',)
