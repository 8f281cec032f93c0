"""Steps for matrices: Muon equals torch's, Shampoo and SOAP equal plain loops, and all of
them work with schedules, callbacks and checkpoints"""
import copy
import io
import math
import pickle

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
from nntrain.adaptive import AdamW
from nntrain.average import WeightAveragingCB
from nntrain.callback import Callback
from nntrain.checkpoint import CheckpointCB
from nntrain.clip import GradientClipCB
from nntrain.compare import set_seed
from nntrain.compose import compose
from nntrain.compose import stat
from nntrain.cycles import momentum_cycle, one_cycle
from nntrain.data import DataLoaders
from nntrain.kronecker import SOAP, Shampoo, average_update, inverse_root
from nntrain.kronecker import shampoo_direction, soap_direction, sum_sides
from nntrain.kronecker import turned_squares
from nntrain.learner import Learner
from nntrain.matrix import COEFFICIENTS, SCALES, Muon, as_matrix, finite_grad
from nntrain.matrix import inner_weights, nesterov_average, newton_schulz
from nntrain.matrix import orthogonalize, polar, shape_scale
from nntrain.parts import add_decay, sgd_step, step_count
from nntrain.precision import MixedPrecisionCB
from nntrain.split import split
from nntrain.steering import ScheduleCB

KINDS = {'Muon': Muon, 'Shampoo': Shampoo, 'SOAP': SOAP,
         'polar': compose(finite_grad, nesterov_average, polar, shape_scale, add_decay,
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
    """For any share: at most 1.2024. From .002 of the length on: at least .6818; smaller
    ones are on their way, at first times 3.4445 a step"""
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
    half = newton_schulz(g)
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


@pytest.mark.parametrize('n', [1, 2, 50])
def test_one_row_or_column_keeps_its_direction(n):
    g = normal(1, n, seed=3)
    want = polynomial(1.)*g/g.norm()
    assert_close(newton_schulz(g, dtype=torch.float64), want, rtol=1e-12, atol=0)
    assert_close(newton_schulz(g.T, dtype=torch.float64), want.T, rtol=1e-12, atol=0)
    assert_close(newton_schulz(g).double(), want, rtol=.03, atol=.003)


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
    ours, theirs = Muon(a, foreach=foreach, **hypers), torch_muon(b, **hypers)
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
        ours = Muon(a, lr=.1, adjust_lr_fn=name)
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
    ours, theirs = Muon(a, lr=.02), torch_muon(b, lr=.05)
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
    average = finite_grad, nesterov_average
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
            want.append(p.detach() - .1*(u + .2*p.detach()))
        opt.step()
        for p, q in zip(ps, want): assert_close(p.detach(), q, rtol=0, atol=1e-9)


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
    finite_grad(p.grad)


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
