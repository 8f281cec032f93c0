"""Steps for matrices: Muon equals torch's, Shampoo and SOAP equal plain loops, and all
of them work with schedules, callbacks and checkpoints"""
import copy
import io
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_checks import adam, by_shape, for_matrices, set_gradients, train
from torch import nn
from torch.optim import lr_scheduler
from torch.testing import assert_close

import nntrain.steering  # noqa: F401  adds fit_one_cycle
from nntrain.accumulate import GradientAccumulationCB
from nntrain.average import WeightAveragingCB
from nntrain.callback import Callback
from nntrain.checkpoint import CheckpointCB
from nntrain.clip import GradientClipCB
from nntrain.compare import set_seed
from nntrain.compose import compose, stat
from nntrain.cycles import momentum_cycle, one_cycle
from nntrain.data import DataLoaders
from nntrain.kronecker import SOAP, Shampoo, average_update, inverse_root
from nntrain.kronecker import shampoo_direction, soap_direction, sum_sides
from nntrain.kronecker import _turned, turned_squares
from nntrain.learner import Learner
from nntrain.matrix import COEFFICIENTS, SCALES, Muon, as_matrix, finite_grads
from nntrain.matrix import inner_weights, nesterov_average, newton_schulz
from nntrain.matrix import orthogonalize, polar, shape_scale
from nntrain.parts import add_decay, sgd_step, step_count
from nntrain.precision import MixedPrecisionCB
from nntrain.split import split
from nntrain.steering import ScheduleCB

KINDS = {'Muon': Muon, 'Shampoo': Shampoo, 'SOAP': SOAP,
         'polar': compose(nesterov_average, polar, shape_scale, add_decay,
                          sgd_step, name='Polar', lr=1e-3)}
every_kind = pytest.mark.parametrize('name', KINDS)
both = pytest.mark.parametrize('foreach', [True, False])
adamw = *adam, add_decay, sgd_step


def normal(*shape, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)


def weights(*shapes, dtype=torch.float64):
    return [nn.Parameter(normal(*shape, seed=i, dtype=dtype))
            for i, shape in enumerate(shapes)]


def step(opt, ps, n=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(n):
        set_gradients(gen, ps, missing=0)
        opt.step()


# ---- Newton and Schulz

def polynomial(s, steps=5):
    "What happens to one singular value, as a share of the length of the matrix"
    a, b, c = COEFFICIENTS
    for _ in range(steps): s = a*s + b*s**3 + c*s**5
    return s


def test_where_the_polynomial_brings_singular_values():
    """For any share: at most 1.2024. From .002 of the length on: at least .6818.
    Smaller ones are on their way, at first times 3.4445 a step"""
    s = torch.logspace(-9, 0, 100_001, dtype=torch.float64)
    for steps in 5, 10:
        done = polynomial(s, steps)
        assert done.min() > 0 and done.max() < 1.2024
        assert done[s >= .002].min() > .6818
    assert polynomial(s[s >= 1e-3]).min() < .6 < .68 < polynomial(s[s > .0017]).min()
    assert polynomial(1e-9) == pytest.approx(1e-9*COEFFICIENTS[0]**5)


def with_singular_values(m, n, condition, size, seed):
    k = min(m, n)
    u = torch.linalg.qr(normal(m, k, seed=seed))[0]
    v = torch.linalg.qr(normal(n, k, seed=seed+1))[0]
    s = torch.logspace(0, -math.log10(condition), k, dtype=torch.float64)
    return u, s/s.norm(), v, size*u*s @ v.T


sizes = st.integers(1, 70)


@given(m=sizes, n=sizes, condition=st.floats(1, 1e6), size=st.floats(1e-3, 1e6),
       seed=st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_bounds_of_singular_values(m, n, condition, size, seed):
    """In float32 the result is the polynomial of the singular values. In bfloat16 only
    this holds: none is above 1.22, and where the share was .01 or more, none is below
    .65; smaller ones drown in rounding (measured: .673 to 1.208)"""
    u, share, v, g = with_singular_values(m, n, condition, size, seed)
    wide = newton_schulz(g, dtype=torch.float32)
    assert wide.shape == g.shape and wide.dtype == torch.float32
    assert_close(wide.double(), u*polynomial(share) @ v.T, rtol=0, atol=1e-4)
    half = newton_schulz(g, dtype=torch.bfloat16)
    assert half.shape == g.shape and half.dtype == torch.bfloat16
    assert torch.linalg.svdvals(half.double()).max() < 1.22
    large = share >= .01
    along = u[:, large].T @ half.double() @ v[:, large]
    assert torch.linalg.svdvals(along).min() > .65


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1), (4, 7), (7, 4), (0, 3),
                                   (3, 0)])
def test_zeros_stay_zeros_and_nothing_is_edited(shape, dtype):
    zeros = torch.zeros(shape, dtype=dtype)
    assert_close(newton_schulz(zeros, dtype=dtype), zeros, rtol=0, atol=0)
    g = normal(*shape).to(dtype)
    before = g.clone()
    newton_schulz(g, dtype=dtype)
    assert g.equal(before)


@pytest.mark.parametrize('fast', [True, False])
def test_the_type_is_one_that_the_hardware_computes_in(fast, monkeypatch):
    "Emulated bfloat16 took 40 times as long for a matrix of 256×2,304"
    monkeypatch.setattr('nntrain.matrix.has_bfloat16', lambda device: fast)
    name = 'bfloat16' if fast else 'float32'
    assert newton_schulz(normal(4, 7)).dtype == getattr(torch, name)
    a, b = weights(*SHAPES), weights(*SHAPES)
    step(Muon(a, lr=.1), a)
    step(Muon(b, lr=.1, ns_dtype=name), b)
    for p, q in zip(a, b): assert p.equal(q)


@pytest.mark.parametrize('n', [1, 2, 50])
def test_one_row_or_column_keeps_its_direction(n):
    g = normal(1, n, seed=3)
    want = polynomial(1.)*g/g.norm()
    assert_close(newton_schulz(g, dtype=torch.float64), want, rtol=1e-12, atol=0)
    assert_close(newton_schulz(g.T, dtype=torch.float64), want.T, rtol=1e-12, atol=0)
    half = newton_schulz(g, dtype=torch.bfloat16)
    assert_close(half.double(), want, rtol=.03, atol=.003)


def test_the_size_of_a_matrix_does_not_matter():
    "By a power of two to the last bit; but below `eps` a matrix counts as short"
    g = normal(20, 30, dtype=torch.float32)
    for power in -10, 7: assert newton_schulz(g).equal(newton_schulz(g*2.**power))
    a, b = (newton_schulz(x, dtype=torch.float32) for x in (g, g*.003))
    assert_close(a, b, rtol=0, atol=1e-5)
    assert newton_schulz(g*1e-12).norm() < .1*newton_schulz(g).norm()
    assert newton_schulz(g*1e-12, eps=1e-20).norm() > .9*newton_schulz(g).norm()


# ---- Muon

def torch_muon(*args, **kwargs):
    if not hasattr(torch.optim, 'Muon'): pytest.skip('this torch has no Muon')
    return torch.optim.Muon(*args, **kwargs)


coefficients = st.sampled_from([COEFFICIENTS, (2., -1.5, .5), (3.4, -4.7, 2.)])
muon_hypers = st.fixed_dictionaries(dict(
    lr=st.sampled_from([0., 1e-3, .1]), weight_decay=st.sampled_from([0., .1, .5]),
    momentum=st.sampled_from([0., .5, .95]), nesterov=st.booleans(),
    ns_steps=st.integers(1, 8), ns_coefficients=coefficients,
    eps=st.sampled_from([1e-7, 1e-3]),
    adjust_lr_fn=st.sampled_from([None, 'original', 'match_rms_adamw'])))
SHAPES = (4, 9), (9, 4), (1, 5), (5, 1), (6, 6), (30, 2)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@both
@given(hypers=muon_hypers, seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_muon_equals_torchs(foreach, dtype, hypers, seed):
    a, b = weights(*SHAPES, dtype=dtype), weights(*SHAPES, dtype=dtype)
    ours = Muon(a, foreach=foreach, ns_dtype='bfloat16', **hypers)
    theirs = torch_muon(b, **hypers)
    gen = torch.Generator().manual_seed(seed)
    for t in range(6):
        set_gradients(gen, a, b)
        ours.step()
        theirs.step()
        for p, q in zip(a, b):
            tol = 1e-12 if dtype == torch.float64 else 1e-6*q.abs().max().item()
            assert_close(p, q, rtol=0, atol=tol)


def test_every_scale_of_torch_is_ours_and_means_the_same():
    a, b = weights((4, 9), (9, 4)), weights((4, 9), (9, 4))
    for name in SCALES.keys() - {'none'}:
        ours = Muon(a, lr=.1, adjust_lr_fn=name, ns_dtype='bfloat16')
        try: theirs = torch_muon(b, lr=.1, adjust_lr_fn=name)
        except ValueError: continue                    # an older torch has fewer
        step(ours, a)
        step(theirs, b)
        for p, q in zip(a, b): assert_close(p, q, rtol=0, atol=1e-12)
    square = shape_scale(normal(9, 4), adjust_lr_fn='spectral_unclamped')
    assert_close(square, 1.5*normal(9, 4))
    assert shape_scale(normal(9, 4), adjust_lr_fn='none') is None
    assert_close(shape_scale(normal(9, 4)), 1.5*normal(9, 4))
    assert shape_scale(normal(4, 9)) is None                       # 1: left as it is


def muon_loop(p, state, g, lr, momentum, nesterov, weight_decay):
    "One step by hand, with the exact direction"
    m = state['m'] = momentum*state.get('m', 0.) + (1-momentum)*g
    u = (1-momentum)*g + momentum*m if nesterov else m
    u, _, vh = torch.linalg.svd(u.reshape(len(u), -1), full_matrices=False)
    scale = math.sqrt(max(1, u.shape[0]/vh.shape[1]))
    return p - lr*(scale*(u @ vh).reshape(p.shape) + weight_decay*p)


@both
@pytest.mark.parametrize('nesterov', [True, False])
def test_muon_of_exact_directions_equals_a_loop(foreach, nesterov):
    ps = weights((4, 9), (9, 4), (4, 2, 3, 3))
    kw = dict(lr=.1, momentum=.9, nesterov=nesterov, weight_decay=.3)
    opt, states = KINDS['polar'](ps, foreach=foreach, **kw), [{} for _ in ps]
    gen = torch.Generator().manual_seed(0)
    for _ in range(10):
        set_gradients(gen, ps, missing=0)
        want = [muon_loop(p.detach(), s, p.grad, **kw) for p, s in zip(ps, states)]
        opt.step()
        for p, q in zip(ps, want): assert_close(p.detach(), q, rtol=0, atol=1e-10)


def test_a_state_goes_to_torchs_muon_and_back():
    a, b = weights(*SHAPES), weights(*SHAPES)
    ours, theirs = Muon(a, lr=.02, ns_dtype='bfloat16'), torch_muon(b, lr=.05)
    step(ours, a)
    step(theirs, b, seed=9)
    for saved in ours.state_dict(), theirs.state_dict():
        runs = []
        for make in Muon, torch_muon:
            ps = weights(*SHAPES)
            opt = make(ps, lr=1.)
            opt.load_state_dict(copy.deepcopy(saved))
            step(opt, ps)
            runs.append(ps)
        for p, q in zip(*runs): assert_close(p, q, rtol=0, atol=1e-12)
        assert opt.param_groups[0]['lr'] == saved['param_groups'][0]['lr']
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]['ns_dtype'] == 'bfloat16'


# ---- turned weights

def turn(n, seed): return torch.linalg.qr(normal(n, n, seed=seed))[0]


def path(parts, q=None, r=None, n=30, **hypers):
    "Weights along a run on a loss that a turn of weights and data leaves as it is"
    x, y = normal(40, 6, seed=1), normal(40, 5, seed=2)
    w, opt = normal(5, 6, seed=3), compose(*parts)
    if q is not None: w, x, y = q @ w @ r, x @ r, y @ q.T
    p, seen = nn.Parameter(w), []
    opt = opt([p], **hypers)
    for _ in range(n):
        p.grad = None
        residual = x @ p.T - y
        (residual**2).sum(1).add(1).log().mean().backward()
        opt.step()
        seen.append(p.detach().clone())
    return torch.stack(seen)


def test_turned_weights_take_the_turned_path():
    "With exact directions; Adam's path is another one (the loss of axes)"
    q, r = turn(5, 4), turn(6, 5)
    def gap(parts, **hypers):
        back = q.T @ path(parts, q, r, **hypers) @ r.T
        return (back - path(parts, **hypers)).abs().max().item()
    average = nesterov_average,
    assert gap((*average, polar, sgd_step), lr=.05) < 1e-9
    assert gap((*average, orthogonalize, shape_scale, add_decay, sgd_step), lr=.05,
               ns_dtype='float64', weight_decay=.1) < 1e-9
    assert gap((sum_sides, shampoo_direction, sgd_step), lr=.05, every=1) < 1e-6
    assert gap((*adam, sgd_step), lr=.05) > .05


# ---- Shampoo

def test_without_a_sum_shampoo_is_the_exact_direction():
    for shape in (5, 5), (4, 9), (9, 4), (1, 3), (3, 2, 2, 2):
        p = nn.Parameter(normal(*shape))
        p.grad, before = normal(*shape, seed=7), p.detach().clone()
        compose(sum_sides, shampoo_direction, sgd_step)([p], lr=1.).step()
        assert_close(before - p.detach(), polar(p.grad), rtol=0, atol=1e-9)


def power(a, k):
    "a to the power of −1/k, of eigenvalues that are all far above 0"
    values, vectors = torch.linalg.eigh(a)
    return vectors @ torch.diag(values**(-1/k)) @ vectors.T


def test_an_inverse_root_by_its_definition():
    a = normal(6, 6)
    a = a @ a.T + .1*torch.eye(6, dtype=torch.float64)
    for k in 1, 2, 4:
        again = torch.linalg.matrix_power(inverse_root(a, k), k) @ a
        assert_close(again, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(inverse_root(torch.diag(torch.tensor([16., 81.])), 4),
                 torch.diag(torch.tensor([1/2, 1/3])))
    assert_close(inverse_root(torch.tensor([[0., 0.], [0., 1.]]), 2, eps=1e-4),
                 torch.diag(torch.tensor([100., 1.])))
    assert inverse_root(torch.zeros(2, 2), 4).isfinite().all()
    assert inverse_root(torch.zeros(0, 0), 4).shape == (0, 0)


@both
@pytest.mark.parametrize('every', [1, 3])
def test_shampoo_equals_a_loop(foreach, every):
    shapes = (5, 5), (3, 3), (4, 1, 2, 2)     # square as matrices: of full rank
    ps = weights(*shapes)
    opt = Shampoo(ps, lr=.1, weight_decay=.2, every=every, foreach=foreach)
    sides = [[0., 0., None, None] for _ in ps]
    gen = torch.Generator().manual_seed(0)
    for t in range(8):
        set_gradients(gen, ps, missing=0)
        want = []
        for p, side in zip(ps, sides):
            g = p.grad.reshape(len(p), -1)
            side[0], side[1] = side[0] + g @ g.T, side[1] + g.T @ g
            if t % every == 0: side[2:] = power(side[0], 4), power(side[1], 4)
            u = (side[2] @ g @ side[3]).reshape(p.shape)
            u = u*min(1., math.sqrt(len(p))/u.norm())
            want.append(p.detach() - .1*(u + .2*p.detach()))
        opt.step()
        for p, q in zip(ps, want): assert_close(p.detach(), q, rtol=0, atol=1e-9)


@pytest.mark.parametrize('rank', [1, 4, 30])
@pytest.mark.parametrize('size', [1e-3, 1., 1e4])
@pytest.mark.parametrize('dead', [0, 20])
def test_steps_stay_short_in_directions_that_no_gradient_had_yet(rank, size, dead):
    """Where the roots or the basis know of zeros and rounding only, both would jump,
    thousands of rates far; dead columns hardly move"""
    longest = dict(Shampoo=math.sqrt(30), SOAP=3*math.sqrt(30*60))
    for name, most in longest.items():
        p = nn.Parameter(torch.zeros(30, 60))
        opt = KINDS[name]([p], lr=1., weight_decay=0., every=4)
        for t in range(14):
            left, right = (normal(n, rank, seed=2*t+i, dtype=torch.float32)
                           for i, n in enumerate(p.shape))
            before, p.grad = p.detach().clone(), size*left @ right.T
            p.grad[:, :dead] = 0
            opt.step()
            change = p.detach() - before
            assert change.norm() < 1.001*most
            if name == 'SOAP': assert _turned(change, *basis(opt, p)).abs().max() < 10
        share = p[:, :dead].abs().sum()/p.abs().sum()
        assert share <= dict(Shampoo=1e-3, SOAP=.15)[name]


def basis(opt, p): return opt.state[p]['q_left'], opt.state[p]['q_right']


@pytest.mark.parametrize('name', ['Shampoo', 'SOAP'])
def test_gradients_of_zero_move_nothing_at_any_time(name):
    "In float32, where powers of tiny numbers are soon 0 or infinite"
    p = nn.Parameter(normal(3, 4, dtype=torch.float32))
    before, opt = p.detach().clone(), KINDS[name]([p], lr=.1, weight_decay=0., every=2)
    for _ in range(5):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert_close(p.detach(), before, rtol=0, atol=0)
    for size in 1e-25, 1e-12, 1e15:
        p.grad = size*normal(3, 4, dtype=torch.float32, seed=5)
        opt.step()
        assert p.isfinite().all()


# ---- SOAP

def soap_loop(p, s, g, t, lr, betas, side_beta, every, weight_decay, eps=1e-8):
    "One step by hand; `t` from 0"
    shape, p, g = p.shape, p.reshape(len(p), -1), g.reshape(len(p), -1)
    s['m'] = betas[0]*s.get('m', 0.) + (1-betas[0])*g
    s['l'] = side_beta*s.get('l', 0.) + (1-side_beta)*g @ g.T
    s['r'] = side_beta*s.get('r', 0.) + (1-side_beta)*g.T @ g
    if t == 0:
        s['ql'], s['qr'] = (torch.linalg.eigh(s[x])[1].flip(1) for x in 'lr')
    elif t % every == 0:
        for i, x in enumerate('lr'):
            sizes = torch.einsum('ji,jk,ki->i', s['q'+x], s[x], s['q'+x])
            order = sizes.sort(descending=True).indices
            s['q'+x] = torch.linalg.qr(s[x] @ s['q'+x][:, order])[0]
            s['v'] = s['v'][order] if i == 0 else s['v'][:, order]
    turned_g, turned_m = (s['ql'].T @ x @ s['qr'] for x in (g, s['m']))
    s['v'] = betas[1]*s.get('v', 0.) + (1-betas[1])*turned_g**2
    m_hat, v_hat = turned_m/(1-betas[0]**(t+1)), s['v']/(1-betas[1]**(t+1))
    u = s['ql'] @ (m_hat/(v_hat.sqrt() + eps)) @ s['qr'].T
    return (p - lr*(u + weight_decay*p)).reshape(shape)


@both
@pytest.mark.parametrize('every', [1, 3])
def test_soap_equals_a_loop(foreach, every):
    ps = weights((5, 5), (3, 3), (4, 1, 2, 2))      # of full rank: one eigenbasis
    kw = dict(lr=.1, betas=(.8, .9), side_beta=.7, every=every, weight_decay=.2)
    opt, states = SOAP(ps, foreach=foreach, **kw), [{} for _ in ps]
    gen = torch.Generator().manual_seed(0)
    for t in range(8):
        set_gradients(gen, ps, missing=0)
        want = [soap_loop(p.detach(), s, p.grad, t, **kw) for p, s in zip(ps, states)]
        opt.step()
        for p, q in zip(ps, want): assert_close(p.detach(), q, rtol=0, atol=1e-7)


@both
def test_in_the_basis_of_the_axes_soap_is_adamw(foreach):
    def eye(axis):
        return lambda p: torch.eye(as_matrix(p).shape[axis], dtype=p.dtype)
    def squares(p): return torch.zeros_like(as_matrix(p))
    @stat(exp_avg_sq=squares, q_left=eye(0), q_right=eye(1))
    def axes(update): ...
    parts = (average_update, axes, turned_squares, step_count, soap_direction,
             add_decay, sgd_step)
    shapes = (4, 9), (9, 4), (4, 2, 3, 3)
    a, b = weights(*shapes), weights(*shapes)
    kw = dict(lr=.1, betas=(.8, .9), weight_decay=.2, eps=1e-8)
    train(0, 20, (a, compose(*parts, lr=.1)(a, foreach=foreach, **kw)),
          (b, torch.optim.AdamW(b, **kw)))


def test_soap_keeps_an_orthogonal_basis():
    ps = weights((6, 9), (9, 3), dtype=torch.float32)
    opt = SOAP(ps, lr=.01, every=2)
    step(opt, ps, n=40)
    for p in ps:
        for name in 'q_left', 'q_right':
            q = opt.state[p][name]
            assert_close(q.T @ q, torch.eye(len(q)), rtol=0, atol=1e-5)


# ---- all of them: layouts, lists, types, odd parameters

@every_kind
@both
def test_channels_last_and_contiguous_weights_step_alike(name, foreach):
    ends = []
    for layout in torch.contiguous_format, torch.channels_last:
        p = nn.Parameter(normal(6, 4, 3, 3, dtype=torch.float32)
                         .to(memory_format=layout))
        opt = KINDS[name]([p], lr=.05, foreach=foreach)
        for t in range(12):
            p.grad = (normal(6, 4, 3, 3, dtype=torch.float32, seed=t)
                      .to(memory_format=layout))
            opt.step()
        assert p.is_contiguous(memory_format=layout)
        ends.append(p.detach())
    assert_close(*ends, rtol=0, atol=0)


@every_kind
def test_in_lists_and_one_by_one_the_same(name):
    shapes = (4, 9), (9, 4), (1, 5), (5, 1), (3, 2, 2, 2)
    a, b = (weights(*shapes, dtype=torch.float32) for _ in range(2))
    one, two = KINDS[name](a, lr=.05), KINDS[name](b, lr=.05, foreach=False)
    step(one, a, 12)
    step(two, b, 12)
    for p, q in zip(a, b): assert_close(p, q, rtol=0, atol=1e-5)


@every_kind
@both
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_weights_in_half_precision(name, foreach, dtype):
    "The sides of a matrix are summed in float32; a long gradient is no infinite one"
    p, = weights((6, 4), dtype=dtype)
    q, = weights((6, 4), dtype=torch.float32)
    runs = [(x, KINDS[name]([x], lr=.01, foreach=foreach)) for x in (p, q)]
    for t in range(4):
        for x, opt in runs:
            x.grad = normal(6, 4, seed=t).to(dtype).to(x.dtype)
            opt.step()
    assert_close(p.float(), q, rtol=0, atol=.03)
    sides = [v.dtype for k, v in runs[0][1].state[p].items()
             if k in ('left', 'right', 'q_left', 'left_root', 'exp_avg_sq')]
    assert set(sides) <= {torch.float32}
    again = KINDS[name]([p], lr=.01)
    again.load_state_dict(copy.deepcopy(runs[0][1].state_dict()))
    assert [v.dtype for v in again.state[p].values()] == [
        v.dtype for v in runs[0][1].state[p].values()]
    p.grad = torch.full((6, 4), 3e4).to(dtype)      # its length is above 65,504
    finite_grads([p])


@every_kind
@both
def test_odd_weights(name, foreach):
    "Without elements, of one row, frozen, without a gradient; all beside a usual one"
    shapes = (0, 3), (3, 0), (2, 3, 0, 3), (0, 0), (1, 1), (1, 6), (6, 1), (3, 3)
    ps = weights(*shapes, dtype=torch.float32)
    frozen, idle = weights((2, 2), (2, 3), dtype=torch.float32)
    frozen.requires_grad_(False)
    before = [x.detach().clone() for x in (frozen, idle)]
    opt = KINDS[name]([*ps, frozen, idle], lr=.01, foreach=foreach)
    step(opt, ps, 12)
    assert all(p.isfinite().all() for p in ps)
    assert frozen.equal(before[0]) and idle.equal(before[1]) and idle not in opt.state


@every_kind
def test_sparse_gradients_are_refused(name):
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match='dense gradients only'):
        KINDS[name](table.parameters(), lr=.1).step()


# ---- what is refused, and that nothing has changed then

def everything(opt, ps):
    "All that a step or a group may change, as a copy"
    return copy.deepcopy(([p.detach() for p in ps], opt.state_dict()))


@every_kind
@pytest.mark.parametrize('shape', [(3,), ()])
def test_a_weight_that_is_no_matrix_is_refused(name, shape):
    ps, (late,) = weights((3, 3)), weights(shape)
    text = ('takes tensors with 2 axes or more, and parameter bias has shape '
            rf'{re.escape(str(shape))}: see `split`$')
    with pytest.raises(ValueError, match=text): KINDS[name]([('bias', late)], lr=.1)
    opt = KINDS[name]([('weight', *ps)], lr=.1)
    step(opt, ps)
    before = everything(opt, ps)
    with pytest.raises(ValueError, match=text):
        opt.add_param_group(dict(params=[('bias', late)]))
    assert_same(everything(opt, ps), before)


def assert_same(a, b):
    "Of nested states, to the last bit; also words and None"
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a: assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b): assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    else: assert a == b


@pytest.mark.parametrize('kind, bad, text', [
    (Muon, dict(ns_dtype='bf16'), r"ns_dtype must be one of \['bfloat16', 'float32', "
                                  r"'float64', None\], got 'bf16'$"),
    (Muon, dict(ns_dtype=torch.bfloat16), 'ns_dtype must be one of'),
    (Muon, dict(ns_dtype=['bfloat16']), 'ns_dtype must be one of'),
    (Muon, dict(adjust_lr_fn='orginal'), "adjust_lr_fn must be one of .'original'"),
    (Muon, dict(ns_steps=0), 'ns_steps must be a number of at least 1 and below 100'),
    (Muon, dict(ns_steps=100), 'ns_steps must be a number of at least 1 and below 100'),
    (Muon, dict(ns_steps=2.5), 'ns_steps must be a whole number, got 2.5$'),
    (Muon, dict(ns_coefficients=(1, 2)), r'must be three finite numbers, got .1, 2.$'),
    (Muon, dict(ns_coefficients=3.), 'must be three finite numbers, got 3.0$'),
    (Muon, dict(ns_coefficients='abc'), "must be three finite numbers, got 'abc'$"),
    (Muon, dict(ns_coefficients=(1., 2., math.nan)), 'must be three finite numbers'),
    (Muon, dict(momentum=1.), 'momentum must be a number of at least 0 and below 1'),
    (Muon, dict(eps=-1), 'eps must be a number of at least 0'),
    (Shampoo, dict(every=0), 'every must be a number of at least 1'),
    (Shampoo, dict(every=2.5), 'every must be a whole number, got 2.5$'),
    (SOAP, dict(every=2.5), 'every must be a whole number, got 2.5$'),
    (SOAP, dict(side_beta=1.), 'side_beta must be a number of at least 0 and below 1'),
    (SOAP, dict(betas=(.9, 1.)), r'betas\[1\] must be a number')])
def test_settings_that_cannot_be(kind, bad, text):
    "In a call, in a group, as a default of `split`, and in a group added later"
    with pytest.raises(ValueError, match=text): kind(weights((3, 3)), lr=.1, **bad)
    with pytest.raises(ValueError, match=text):
        kind([dict(params=weights((3, 3)), **bad)], lr=.1)
    made = split(dict(all=kind), lambda name, p: 'all', lr=.1, all=bad)
    with pytest.raises(ValueError, match=text): made(weights((3, 3)))
    ps, late = weights((3, 3)), weights((2, 2))
    opt = kind(ps, lr=.1)
    step(opt, ps)
    before = everything(opt, ps)
    with pytest.raises(ValueError, match=text):
        opt.add_param_group(dict(params=late, **bad))
    assert_same(everything(opt, ps), before)


def test_rules_for_split_that_leave_a_matrix_out_or_give_a_vector():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    kinds, named = dict(inner=Muon, rest=adamw), list(model.named_parameters())
    def refused(rule, text):
        with pytest.raises(ValueError, match=text): split(kinds, rule)(named, lr=.1)
    refused(lambda name, p: None, r'no kind takes parameter 0.weight of shape \(4, 3\)')
    refused(lambda name, p: ('inner', 'rest'), 'gives parameter 0.weight .* to 2 kinds')
    refused(lambda name, p: 'inner', r'parameter 0.bias has shape \(4,\)')
    refused(None, 'there is no rule')
    with pytest.raises(ValueError, match='at least one name'): split({}, by_shape)
    with pytest.raises(ValueError, match="kind 'inner' needs a tuple of parts"):
        split(dict(inner=(), rest=adamw), by_shape)


@every_kind
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(name, value):
    ps = weights((3, 4), (4, 3), dtype=torch.float32)
    opt = KINDS[name](ps, lr=.1)
    step(opt, ps)
    before = everything(opt, ps)
    for p in ps: p.grad = torch.ones_like(p)
    ps[1].grad[1, 2] = value
    text = r'^a gradient of shape \(4, 3\) has infinite or missing numbers'
    with pytest.raises(ValueError, match=text): opt.step()
    assert_same(everything(opt, ps), before)
    one_by_one = KINDS[name](ps[1:], lr=.1, foreach=False)
    with pytest.raises(ValueError, match='has infinite or missing numbers'):
        one_by_one.step()
    assert_same([p.detach() for p in ps], before[0])


@every_kind
@both
def test_no_group_moves_before_a_later_one_is_refused(name, foreach):
    "Groups of one kind, of several kinds, of two types of numbers, in any order"
    made = split(dict(rest=adamw, inner=KINDS[name], last=KINDS[name]),
                 lambda name, p: name, lr=.1)
    for kinds in ('rest', 'inner', 'inner'), ('inner', 'rest', 'last'), 3*('inner',):
        ps = weights((3, 4), (2, 5), (4, 3), dtype=torch.float32)
        ps[1].data = ps[1].data.double()
        groups = [dict(params=[p], kind=kind) for p, kind in zip(ps, kinds)]
        for opt in made(groups, foreach=foreach), KINDS[name](ps, foreach=foreach):
            for p in ps: p.grad = torch.ones_like(p)
            opt.step()
            before = everything(opt, ps)
            ps[2].grad[0, 0] = math.nan
            with pytest.raises(ValueError, match=r'shape \(4, 3\) has infinite or mis'):
                opt.step()
            assert_same(everything(opt, ps), before)


def test_a_part_alone_asks_for_finite_gradients():
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.tensor([[1., math.inf], [0., 1.]])
    opt = compose(orthogonalize, sgd_step)([p], lr=.1)
    with pytest.raises(ValueError, match='no weight was changed'): opt.step()
    p.grad = None
    opt.step()                                       # nothing to do, nothing to refuse
    assert p.equal(torch.ones(2, 2))


# ---- states, copies, schedules, scalers

def a_split(model, **hypers):
    "As in the chapter: Muon for the inner weights, AdamW for the others"
    return split(dict(inner=Muon, rest=adamw), inner_weights(model), name='MuonAdamW',
                 lr=.02, rest=dict(lr=.005), **hypers)


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
                         nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def test_inner_weights_are_those_between_the_first_and_the_last():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3),
                          nn.Linear(4, 4), nn.Linear(4, 2))
    rule = inner_weights(model, 'a', 'b')
    kinds = {name: rule(name, p) for name, p in model.named_parameters()}
    assert [name for name, kind in kinds.items() if kind == 'a'] == [
        '2.weight', '3.weight']
    assert set(kinds.values()) == {'a', 'b'} and rule(None, nn.Parameter(
        torch.ones(2, 2))) == 'b'
    for few in nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)):
        assert {inner_weights(few)(None, p) for p in few.parameters()} == {'rest'}


def test_a_weight_that_the_first_and_the_last_layer_share_is_not_an_inner_one():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 4),
                          nn.Linear(4, 9, bias=False))
    model[3].weight = model[0].weight
    rule = inner_weights(model)
    assert [name for name, p in model.named_parameters()
            if rule(name, p) == 'inner'] == ['1.weight', '2.weight']
    model[2].weight = nn.Parameter(model[1].weight.T.clone())
    model[1], model[2] = nn.Linear(4, 4), nn.Linear(4, 4)
    model[2].weight = model[1].weight                # shared, but by inner layers
    rule = inner_weights(model)
    assert [name for name, p in model.named_parameters()
            if rule(name, p) == 'inner'] == ['1.weight']


def test_inner_weights_needs_the_model():
    model = nn.Linear(2, 2)
    for given in model.parameters(), [*model.parameters()], model.state_dict():
        with pytest.raises(TypeError, match='give the model itself'):
            inner_weights(given)


def a_run(name, ps):
    return (KINDS[name](ps, lr=.05) if name in KINDS
            else split(dict(matrix=Muon, rest=adamw), by_shape, lr=.05)(ps))


@pytest.mark.parametrize('name', [*KINDS, 'split'])
def test_states_copies_and_pickles_go_on_to_the_last_bit(name):
    shapes = (4, 6), (6, 4), (3, 2, 2, 2)
    if name == 'split': shapes = *shapes, (5,)
    ps = weights(*shapes, dtype=torch.float32)
    opt = a_run(name, ps)
    step(opt, ps, 13)
    runs = [copy.deepcopy((ps, opt)), pickle.loads(pickle.dumps((ps, opt)))]
    others = copy.deepcopy(ps)
    loaded, file = a_run(name, others), io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    runs.append((others, loaded))
    step(opt, ps, 12, seed=1)
    for qs, other in runs:
        step(other, qs, 12, seed=1)
        assert_same(everything(other, qs), everything(opt, ps))
    assert pickle.loads(pickle.dumps(type(opt))).__name__ == type(opt).__name__


@pytest.mark.parametrize('name', ['Muon', 'SOAP', 'Shampoo', 'split'])
@pytest.mark.parametrize('kind', ['OneCycleLR', 'CosineAnnealingLR'])
def test_torchs_schedulers(name, kind):
    "Torch's cycle of momentum wants the same form of momentum in all groups"
    ps = weights((4, 6), (6,), dtype=torch.float32)[:2 if name == 'split' else 1]
    opt, kw = a_run(name, ps), {}
    if name in ('Shampoo', 'split') and kind == 'OneCycleLR':
        with pytest.raises(ValueError, match='must support momentum or beta1'):
            lr_scheduler.OneCycleLR(opt, .1, total_steps=9)
        kw = dict(cycle_momentum=False)
    schedule = (lr_scheduler.CosineAnnealingLR(opt, 8) if kind != 'OneCycleLR' else
                lr_scheduler.OneCycleLR(opt, .1, total_steps=9, **kw))
    rates, first = [], opt.param_groups[0]
    for t in range(8):
        step(opt, ps, 1, seed=t)
        schedule.step()
        rates.append(first['lr'])
    assert len(set(rates)) > 4 and rates[-1] < 1e-2
    assert all(group['lr'] == first['lr'] for group in opt.param_groups)
    if kind == 'OneCycleLR' and not kw:
        assert first['max_momentum'] == .95
        key = 'betas' if name == 'SOAP' else 'momentum'
        now = first[key][0] if name == 'SOAP' else first[key]
        assert .85 < now <= .95


def test_a_scaler_skips_infinite_gradients():
    p, = weights((3, 3), dtype=torch.float32)
    scaler, opt = torch.amp.GradScaler('cpu', 1024.), Muon([p], lr=.1, weight_decay=0.)
    q, = weights((3, 3), dtype=torch.float32)
    plain = Muon([q], lr=.1, weight_decay=0.)
    for x, scale in (p, scaler.scale), (q, lambda loss: loss):
        scale((x**2).sum()).backward()
    scaler.step(opt)
    scaler.update()
    plain.step()
    assert_close(p, q)
    opt.zero_grad()
    scaler.scale((math.inf*p).sum()).backward()
    scaler.step(opt)                                # skipped, so nothing is refused
    scaler.update()
    assert_close(p, q)
    assert scaler.get_scale() == 512.


# ---- in the learner

ROWS = normal(96, 6, dtype=torch.float32)
LABELS = (ROWS[:, 0] > 0).long() + (ROWS[:, 1] > 0).long()


def learner(*cbs, make=a_split):
    set_seed(0)
    model = net()
    kind = make(model)
    def opt_func(params, lr): return kind(params, lr=lr, rest=dict(lr=lr/4))
    dls = DataLoaders.from_tensors((ROWS, LABELS), (ROWS[:32], LABELS[:32]),
                                   batch_size=16, seed=3)
    return Learner(model, dls, F.cross_entropy, opt_func, .02, list(cbs))


CBS = dict(
    plain=lambda: [], cycle=lambda: [ScheduleCB(lr=one_cycle(.02))],
    momentum=lambda: [ScheduleCB(lr=[one_cycle(.02), one_cycle(.005)],
                                 momentum=momentum_cycle())],
    average=lambda: [WeightAveragingCB(.9)], clip=lambda: [GradientClipCB(.1)],
    accumulate=lambda: [GradientAccumulationCB(32)],
    bfloat16=lambda: [MixedPrecisionCB(torch.bfloat16)],
    all=lambda: [ScheduleCB(lr=one_cycle(.02), momentum=momentum_cycle()),
                 WeightAveragingCB(.9), GradientClipCB(.5),
                 GradientAccumulationCB(32)])


class StopCB(Callback):
    "As a power failure in the middle of an epoch"
    watches = True
    def __init__(self, epoch, batch): self.at = epoch, batch
    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.iter) == self.at:
            raise InterruptedError


@pytest.mark.parametrize('name', CBS)
def test_a_run_with_callbacks_resumes_to_the_last_bit(name, tmp_path):
    whole = learner(*CBS[name]())
    first = [p.detach().clone() for p in whole.model.parameters()]
    whole.fit(3)
    assert all(not p.equal(q) for p, q in zip(whole.model.parameters(), first))
    assert [len(g['params']) for g in whole.opt.param_groups] == [2, 6]
    path = tmp_path/'run.pt'
    with pytest.raises(InterruptedError):
        learner(*CBS[name]()).fit(3, cbs=[CheckpointCB(path, every_batches=1),
                                          StopCB(1, 2)])
    again = learner(*CBS[name]())
    for p in again.model.parameters(): nn.init.normal_(p)
    again.fit(3, cbs=[saved := CheckpointCB(path, every_batches=1)])
    assert saved.resumed is not None
    assert_same([p.detach() for p in again.model.parameters()],
                [p.detach() for p in whole.model.parameters()])
    assert_same(again.opt.state_dict(), whole.opt.state_dict())


def test_a_cycle_moves_momentum_of_one_kind_and_betas_of_the_other():
    seen = []
    class LookCB(Callback):
        order = 10_000
        def before_batch(self, learn):
            if learn.training:
                inner, rest = learn.opt.param_groups
                seen.append((inner['momentum'], *rest['betas'], inner['lr'],
                             rest['lr']))
    learn = learner(LookCB())
    learn.fit_one_cycle(2, [.02, .005])
    momentum, beta1, beta2, inner, rest = map(list, zip(*seen))
    assert momentum == pytest.approx(beta1)
    assert min(momentum) < .87 < .94 < max(momentum)
    assert set(beta2) == {.999}
    assert rest == pytest.approx([lr/4 for lr in inner])


@pytest.mark.parametrize('kind', [Shampoo, SOAP, Muon])
def test_every_kind_learns_beside_adamw(kind):
    def make(model):
        return split(dict(inner=kind, rest=adamw), inner_weights(model), lr=.02)
    learn = learner(make=make)
    def loss():
        with torch.no_grad(): return F.cross_entropy(learn.model(ROWS), LABELS).item()
    before, moms = loss(), None if kind is Shampoo else (.95, .85, .95)
    if moms is None:
        with pytest.raises(TypeError, match='has no momentum: leave it out'):
            learn.fit_one_cycle(1, .02)
    learn.fit_one_cycle(15, .05, moms=moms)
    assert loss() < .6*before
