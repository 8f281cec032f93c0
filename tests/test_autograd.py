"""The small autograd: random graphs of all its operations against torch in double
precision, broadcasting, repeated use, deep and wide graphs, constants, and what it
refuses."""
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from nntrain.autograd import Value, as_value, backward, topological_order

seeds = st.integers(0, 2**32 - 1)
many = settings(max_examples=60, deadline=None)


def exact(ours, theirs): assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def uniform(gen, shape):
    "Numbers between ½ and 1½: logarithms are safe, and no number lies at ReLU's corner"
    return .5 + torch.rand(shape, generator=gen, dtype=torch.float64)


def keepdim_sum(v, axis=None):
    if axis is None: return v.sum()
    return v.sum(axis) if isinstance(v, Value) else v.sum(axis, keepdim=True)


# what both can do with one array, and with two of fitting shapes; numbers stay moderate
ONE = dict(
    relu=lambda v, r: (v - 1.).relu(), exp=lambda v, r: (v*.1).exp(),
    log=lambda v, r: ((v*v) + .5).log(), neg=lambda v, r: -v, scale=lambda v, r: .3*v,
    sum=lambda v, r: keepdim_sum(v)*.1, mean=lambda v, r: v.mean(),
    rows=lambda v, r: keepdim_sum(v, 0)*.3, columns=lambda v, r: keepdim_sum(v, 1)*.3,
    both=lambda v, r: keepdim_sum(v, (0, 1))*.1, left=lambda v, r: 2. - v,
    taken=lambda v, r: v[torch.tensor([r.randrange(v.shape[0]) for _ in range(5)])],
    part=lambda v, r: v[r.randrange(v.shape[0]):, ::r.choice([1, 2])],
    mask=lambda v, r: v[[True]*v.shape[0]])
TWO = dict(
    add=lambda a, b: a + b, sub=lambda a, b: a - b, mul=lambda a, b: a*b*.5,
    matmul=lambda a, b: (a @ b)*.2)


def matrix(v):
    "Torch's and our arrays as (rows, columns)"
    while len(v.shape) < 2: v = v[None]
    return v


def broadcasts(a, b):
    return all(m == n or 1 in (m, n) for m, n in zip(a.shape[::-1], b.shape[::-1]))


def build(leaves, seed, n_operations):
    "The same random graph for our values or torch's tensors: a number"
    r, made = random.Random(seed), list(leaves)
    for _ in range(n_operations):
        a, b = matrix(r.choice(made)), matrix(r.choice(made))
        fits = [n for n in ('add', 'sub', 'mul') if broadcasts(a, b)]
        fits += ['matmul'] if a.shape[1] == b.shape[0] else []
        name = r.choice([*ONE, *fits*4])
        made.append(TWO[name](a, b) if name in TWO else ONE[name](a, r))
    total = 0.
    for v in made: total = total + (v*v).mean()    # all of them count, some many times
    return total


@many
@given(seed=seeds, n_operations=st.integers(1, 25))
def test_random_graphs(seed, n_operations):
    gen = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (4, 3), (4,), (1, 4), (3, 1), (1,), ()]
    arrays = [uniform(gen, shape) for shape in shapes]
    ours = [Value(a.clone()) for a in arrays]
    theirs = [a.clone().requires_grad_() for a in arrays]
    loss, expected = build(ours, seed, n_operations), build(theirs, seed, n_operations)
    loss.backward()
    expected.backward()
    exact(loss.data, expected.detach())
    for v, q in zip(ours, theirs): exact(v.grad, q.grad)


shapes = st.lists(st.integers(1, 3), max_size=3)


@many
@given(seed=seeds, full=shapes, ones=st.lists(st.booleans(), min_size=3, max_size=3),
       dropped=st.integers(0, 3), op=st.sampled_from(['add', 'sub', 'mul']))
def test_broadcasting_is_undone(seed, full, ones, dropped, op):
    gen = torch.Generator().manual_seed(seed)
    small = [1 if one else n for n, one in zip(full, ones)][min(dropped, len(full)):]
    a, b, w = uniform(gen, full), uniform(gen, small), uniform(gen, full)
    for first, second in ((a, b), (b, a)):
        ours = Value(first), Value(second)
        theirs = [p.clone().requires_grad_() for p in (first, second)]
        (TWO[op](*ours)*w).sum().backward()
        (TWO[op](*theirs)*w).sum().backward()
        for v, q in zip(ours, theirs):
            assert v.grad.shape == v.data.shape
            exact(v.grad, q.grad)


@pytest.mark.parametrize('a, b', [
    ((2, 3), (3, 4)), ((5, 2, 3), (3, 4)), ((2, 3), (5, 3, 4)),
    ((5, 1, 2, 3), (4, 3, 1))])
def test_stacks_of_matrices(a, b):
    gen = torch.Generator().manual_seed(0)
    arrays = [uniform(gen, a), uniform(gen, b)]
    ours = [Value(p) for p in arrays]
    theirs = [p.clone().requires_grad_() for p in arrays]
    (ours[0] @ ours[1]).exp().log().sum().backward()
    (theirs[0] @ theirs[1]).exp().log().sum().backward()
    for v, q in zip(ours, theirs): exact(v.grad, q.grad)


@pytest.mark.parametrize('index', [
    0, -1, slice(None, None, 2), (slice(None), 1), (..., None),
    torch.tensor([0, 0, 2, 0]), [2, 2],
    (torch.tensor([0, 0, 1]), torch.tensor([1, 1, 3])),
    torch.tensor([True, False, True])], ids=str)
def test_index(index):
    a = uniform(torch.Generator().manual_seed(0), (3, 4))
    ours, theirs = Value(a), a.clone().requires_grad_()
    (ours[index]*ours[index]).sum().backward()
    theirs[index].square().sum().backward()
    exact(ours.grad, theirs.grad)


def test_the_corner_of_relu_is_torchs():
    v = Value([-1., 0., 2.])
    v.relu().sum().backward()
    assert v.grad.tolist() == [0, 0, 1]


def test_cross_entropy_of_extreme_logits():
    z = torch.tensor([[1000., -1000., 0.], [0., 0., 0.]], dtype=torch.float64)
    y = torch.tensor([1, 2])
    v, q = Value(z), z.clone().requires_grad_()
    shifted = v - z.amax(1, keepdim=True)
    loss = -(shifted - shifted.exp().sum(1).log())[torch.arange(2), y].mean()
    expected = torch.nn.functional.cross_entropy(q, y)
    loss.backward()
    expected.backward()
    exact(loss.data, expected.detach())
    exact(v.grad, q.grad)


# ---- the walk ------------------------------------------------------------------------

@many
@given(seed=seeds)
def test_parents_come_first(seed):
    gen = torch.Generator().manual_seed(seed)
    loss = build([Value(uniform(gen, shape)) for shape in ((3, 4), (1,))], seed, 12)
    order = topological_order(loss)
    place = {id(v): i for i, v in enumerate(order)}
    assert len(place) == len(order) and order[-1] is loss
    for v in order:
        for p, _ in v.parents:
            assert place[id(p)] < place[id(v)] if p.needs_grad else id(p) not in place


def test_a_wide_graph_is_walked_once():
    v = first = Value(1.)
    for _ in range(60): v = v + v                     # 2⁶⁰ paths
    assert len(topological_order(v)) == 61
    backward(v)
    assert first.grad.item() == 2.**60


def test_a_deep_graph_needs_no_recursion():
    v = first = Value(1.)
    for _ in range(50_000): v = v*1.
    backward(v)
    assert first.grad.item() == 1
    del v                                             # nor does freeing it


def test_constants_get_no_gradient():
    x, w = as_value(torch.ones(2, 3)), Value(torch.ones(3, 1))
    shifted = x*2.
    assert not shifted.needs_grad
    (shifted @ w).sum().backward()
    assert x.grad is None and shifted.grad is None
    assert w.grad.tolist() == [[4.]]*3
    assert x not in topological_order((x @ w).sum())


def test_gradients_of_leaves_add_up_and_are_their_own():
    a, b = Value([1., 2.]), Value([3., 4.])
    middle = a + b
    middle.sum().backward()
    a.grad.zero_()                                  # an array of its own, to be edited
    assert b.grad.tolist() == [1, 1]                  # … and not an alias of b's
    (middle*2.).sum().backward()
    assert (a.grad.tolist(), b.grad.tolist()) == ([2, 2], [3, 3])
    assert middle.grad.tolist() == [2, 2]             # of the last loss


def test_data_are_kept_and_torch_records_nothing():
    a = torch.ones(2, requires_grad=True)
    v = Value(a)
    assert not v.data.requires_grad and v.data.data_ptr() == a.data_ptr()
    assert (v*3.).sum().data.grad_fn is None


def test_constants_take_the_type_of_their_partner():
    v = Value(torch.ones(2, dtype=torch.float64))
    for other in (.1, 3, torch.tensor([1, 2]), torch.tensor([True, False])):
        assert (v*other).data.dtype == (other - v).data.dtype == torch.float64
    assert (v*.1).data.tolist() == [.1, .1]           # not .1 in 32 bits
    assert (torch.ones(1, 2).double() @ v[:, None]).data.tolist() == [[2.]]
    assert as_value(v) is v
    assert as_value(2, torch.float64).data.dtype == torch.float64


def test_constants_of_integers_become_floats():
    for v in as_value([1, 2]), Value(torch.tensor([1, 2]), needs_grad=False):
        assert (v*2.5).data.tolist() == [2.5, 5] and v.mean().data == 1.5
        assert (v - Value([1., 1.])).data.tolist() == [0, 1]


def test_numpy_on_either_side():
    a, v = np.arange(6.).reshape(2, 3), Value(W)
    for ours in (a + v, v + a, a[::-1][::-1] + v):
        assert isinstance(ours, Value) and (ours.data == torch.tensor(a) + 1).all()
    assert (a - v).data.tolist() == (a - 1).tolist()
    assert (a.T @ v).data.tolist() == (a.T @ W.numpy()).tolist()
    assert Value(a[::-1]).data.tolist() == a[::-1].tolist()
    copied = Value(a)
    a[:] = 0
    assert copied.data.sum() == 15


def test_an_empty_batch_gives_zeros():
    for shape in ((1, 3), (3,)):
        v = Value(torch.ones(shape))
        (v*torch.ones(0, 3)).sum().backward()
        assert torch.equal(v.grad, torch.zeros(shape))


def test_names_for_messages():
    v = Value(torch.ones(2, 3))
    assert repr(v) == 'Value(2, 3)' and repr(v.exp()) == 'Value(2, 3) exp'
    assert (v @ v[:, :1][torch.tensor([0, 1, 1])]).op == '@'


# ---- what is refused, in one sentence each -------------------------------------------

W = torch.ones(2, 3)


def custom(slope):
    v = Value(W)
    Value(v.data.sum(), [(v, slope)], 'mine').backward()


@pytest.mark.parametrize('error, words, act', [
    (ValueError, r'\(2, 3\) @ \(2, 3\): these shapes do not fit', lambda: Value(W) @ W),
    (ValueError, r'\(2, 3\) \+ \(2,\): these shapes', lambda: Value(W) + torch.ones(2)),
    (ValueError, r'must be matrices.*x\[:, None\]', lambda: Value(W) @ torch.ones(3)),
    (TypeError, r'float32 and torch.float64 do not mix', lambda: Value(W)*W.double()),
    (TypeError, "numbers, got 'three'", lambda: Value('three')),
    (TypeError, 'numbers, got None', lambda: Value(W) + None),
    (TypeError, 'numbers, got Value', lambda: Value(Value(1.))),
    (TypeError, r'write 2\. instead of 2', lambda: Value(2)),
    (TypeError, 'array of numbers, got .* …', lambda: Value(['a']*999)),
    (TypeError, 'array of numbers', lambda: Value([[1.], [1., 2.]])),
    (TypeError, 'no complex numbers', lambda: Value(W)*torch.ones(3)*(1j*W)),
    (TypeError, "floats, got dtype='float32'", lambda: as_value(1., 'float32')),
    (TypeError, 'floats, got dtype=torch.int64', lambda: as_value(1.7, torch.int64)),
    (TypeError, 'must return a tensor, got 2.0', lambda: custom(lambda g: 2.)),
    (ValueError, r'returned shape \(5,\) for a parent of \(2, 3\)',
     lambda: custom(lambda g: torch.ones(5))),
    (ValueError, 'one is on meta, the other on cpu',
     lambda: Value(W.to('meta')) + torch.ones(2, 3)),
    (ValueError, r'mean of no numbers.*\(0, 3\)', lambda: Value(W[:0]).mean()),
    (TypeError, 'ends in a Value, got Tensor', lambda: backward(W)),
    (ValueError, r'one number, got shape \(2, 3\)', lambda: Value(W).backward()),
    (ValueError, 'no value behind this loss', lambda: as_value(1.).backward()),
    (IndexError, r'^Value\(2, 3\)\[7\]: index 7 is out of bounds', lambda: Value(W)[7]),
    (IndexError, r"\['x'\]: give integers", lambda: Value(W)['x']),
    (IndexError, 'slices that go forwards', lambda: Value(W)[::-1]),
    (TypeError, r'pairs \(Value, function\), got 3$', lambda: Value(1., 3)),
    (TypeError, r'pairs .* got \(1, 2\)', lambda: Value(1., [(1, 2)])),
    (TypeError, r'pairs .* got \(Value\(\), None\)',
     lambda: Value(1., [(Value(1.), None)])),
    (TypeError, r'returned torch.int64 .* parent of torch.float32 .* convert it',
     lambda: custom(lambda g: torch.ones(2, 3, dtype=torch.int64))),
    (TypeError, 'returned torch.float64 on cpu for a parent of torch.float32',
     lambda: custom(lambda g: torch.ones(2, 3).double())),
    (TypeError, 'on meta for a parent of torch.float32 on cpu',
     lambda: custom(lambda g: torch.ones(2, 3, device='meta')))])
def test_refused(error, words, act):
    with pytest.raises(error, match=words) as raised: act()
    assert '\n' not in str(raised.value) and len(str(raised.value)) < 200


def test_backward_twice():
    w = Value(W)
    loss = (w*w).sum()
    loss.backward()
    with pytest.raises(ValueError, match='twice on one graph: compute'): loss.backward()
    assert torch.equal(w.grad, 2*W)


def test_a_slope_that_fails_leaves_everything_as_it_was():
    def broken(g): raise ZeroDivisionError('my slope')
    u, v = Value(W), Value(W)
    u.grad = torch.ones(2, 3)
    loss = Value(torch.tensor(6.), [(u, lambda g: g.expand(2, 3)), (v, broken)])
    with pytest.raises(ZeroDivisionError, match='my slope'): loss.backward()
    assert torch.equal(u.grad, torch.ones(2, 3)) and v.grad is None
    assert loss.grad is None and not loss.used
    loss.parents[1] = v, lambda g: g.expand(2, 3)
    loss.backward()                                          # so it can be repeated
    assert torch.equal(u.grad, 2*torch.ones(2, 3)) and torch.equal(v.grad, W)


def test_grad_of_another_shape():
    w = Value(W)
    w.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r'grad of shape \(3, 2\): clear it'):
        (w*w).sum().backward()


def in_place(v): v.data += 1
def by_index(v): v.data[0] = 7.
def replaced(v): v.data = v.data + 1
def through_a_view(v): v.data.view(-1)[:1].zero_()


@pytest.mark.parametrize('edit', [in_place, by_index, replaced, through_a_view],
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize('which', ['parameter', 'result'])
def test_changed_after_use(edit, which):
    w = Value(torch.ones(2, 3))
    e = w.exp()                                       # keeps its own result
    loss = e.sum()
    edit(w if which == 'parameter' else e)
    with pytest.raises(ValueError, match='was changed after .* was computed'):
        loss.backward()
    assert w.grad is None and e.grad is None and not loss.used   # nothing was done


def test_parameters_may_change_between_graphs():
    w, losses = Value([3.]), []
    for _ in range(50):
        loss = (w*w).sum()
        loss.backward()
        w.data -= .1*w.grad
        w.grad = None
        losses.append(loss.data.item())
    assert losses[0] == 9 and losses[-1] < 1e-6 and math.isfinite(losses[-1])
