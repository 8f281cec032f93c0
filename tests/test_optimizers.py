"""Our optimizers take the same steps as torch's, in double precision, whatever the hyperparameters, groups and gradients are.

A further optimizer is one more line in `PAIRS`.
"""
import copy
import io
import math
import pickle
import shutil
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_checks import same_parameters, set_gradients, step_alike
from torch import nn
from torch.testing import assert_close

from nntrain.adaptive import Adam, AdamW, RMSProp
from nntrain.momentum import Momentum
from nntrain.optimizer import SGD, Optimizer, add_scaled, check_hyper, check_names, decay_groups

rates = st.one_of(st.just(0.), st.floats(1e-4, .5))
decays = st.one_of(st.just(0.), st.floats(1e-4, .5))
shares = st.one_of(st.just(0.), st.floats(.1, .95))
adam_hypers = st.fixed_dictionaries(dict(lr=rates, weight_decay=decays, maximize=st.booleans(), eps=st.floats(1e-8, .1),
                                         betas=st.tuples(st.floats(0, .99), st.floats(0, .999))))

# name: (ours, torch's, hyperparameters that both take)
PAIRS = {
    'SGD': (SGD, torch.optim.SGD, st.fixed_dictionaries(dict(lr=rates, weight_decay=decays, maximize=st.booleans()))),
    'Momentum': (Momentum, partial(torch.optim.SGD, momentum=.9), st.fixed_dictionaries(dict(lr=rates, weight_decay=decays, momentum=shares, dampening=shares, maximize=st.booleans()))),
    'Nesterov': (partial(Momentum, nesterov=True), partial(torch.optim.SGD, nesterov=True, momentum=.9),
                 st.fixed_dictionaries(dict(lr=rates, weight_decay=decays, momentum=st.floats(.1, .95), maximize=st.booleans()))),
    'RMSProp': (RMSProp, torch.optim.RMSprop, st.fixed_dictionaries(dict(lr=rates, weight_decay=decays, maximize=st.booleans(), alpha=st.floats(0, .999), eps=st.floats(1e-8, .1)))),
    'Adam': (Adam, torch.optim.Adam, adam_hypers),
    'AdamW': (AdamW, torch.optim.AdamW, adam_hypers),
}

SHAPES = [(3, 4), (4,), (), (2, 2, 2), (1, 3)]
quick = settings(max_examples=15, deadline=None)
every = pytest.mark.parametrize('name', PAIRS)
both = pytest.mark.parametrize('foreach', [True, False])


def parameters(seed):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=gen, dtype=torch.float64)) for shape in SHAPES]


def in_groups(params, overrides):
    "Two or three groups: `overrides` for the first ones"
    cuts = [0, 2, 3, len(params)] if len(overrides) == 2 else [0, 2, len(params)]
    return [{'params': params[a:b], **extra} for a, b, extra in zip(cuts, cuts[1:], [*overrides, {}])]


def pair(name, data, foreach=True, seed=0):
    ours, theirs, hypers = PAIRS[name]
    kw = data.draw(hypers)
    overrides = [{k: v for k, v in data.draw(hypers).items() if k != 'maximize'} for _ in range(data.draw(st.integers(1, 2)))]
    a, b = parameters(seed), parameters(seed)
    return a, ours(in_groups(a, overrides), foreach=foreach, **kw), b, theirs(in_groups(b, overrides), **kw)


@every
@both
@given(data=st.data(), seed=st.integers(0, 10_000), rows=st.booleans())
@quick
def test_fifty_steps_with_groups_and_missing_gradients(name, foreach, data, seed, rows):
    a, ours, b, theirs = pair(name, data, foreach, seed)
    gen = torch.Generator().manual_seed(seed)
    for _ in range(50):
        set_gradients(gen, a, b, rows=rows)
        step_alike((a, ours), (b, theirs))


@every
@given(data=st.data(), seed=st.integers(0, 10_000))
@quick
def test_scheduled_hyperparameters(name, data, seed):
    "Any number in a group may be moved at any time; momentum and betas are, where there are some"
    a, ours, b, theirs = pair(name, data, seed=seed)
    gen = torch.Generator().manual_seed(seed)
    for t in range(50):
        for opt in ours, theirs:
            for group in opt.param_groups:
                group['lr'] = .1*(1 + math.cos(math.pi*t/50))
                if group.get('momentum'): group['momentum'] = .85 + .1*t/50
                if 'betas' in group: group['betas'] = (.85 + .1*t/50, group['betas'][1])
        set_gradients(gen, a, b)
        step_alike((a, ours), (b, theirs))


@every
@given(data=st.data(), seed=st.integers(0, 10_000), steps=st.integers(0, 12))
@quick
def test_state_dict_into_torch_and_back(name, data, seed, steps):
    a, ours, b, theirs = pair(name, data, seed=seed)
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        set_gradients(gen, a, b)
        step_alike((a, ours), (b, theirs))
    swapped_a, swapped_b = ours.state_dict(), theirs.state_dict()
    theirs.load_state_dict(copy.deepcopy(swapped_a))
    ours.load_state_dict(copy.deepcopy(swapped_b))
    for _ in range(20):
        set_gradients(gen, a, b)
        step_alike((a, ours), (b, theirs))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file))
    for _ in range(20):
        set_gradients(gen, a, b)
        step_alike((a, ours), (b, theirs))


@every
@both
@given(data=st.data(), seed=st.integers(0, 10_000))
@quick
def test_copies_and_pickles_go_on_alike(name, foreach, data, seed):
    a, ours, _, _ = pair(name, data, foreach, seed)
    gen = torch.Generator().manual_seed(seed)
    for _ in range(5):
        set_gradients(gen, a)
        ours.step()
    a2, copied = copy.deepcopy((a, ours))
    a3, pickled = pickle.loads(pickle.dumps((a, ours)))
    for _ in range(10):
        set_gradients(gen, a, a2, a3)
        for opt in ours, copied, pickled: opt.step()
    same_parameters(a, a2)
    same_parameters(a, a3)


@every
@both
def test_a_nan_is_not_hidden_and_nothing_is_stored_on_parameters(name, foreach):
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    p.grad = torch.tensor([math.nan, 1.], dtype=torch.float64)
    PAIRS[name][0]([p], lr=.1, foreach=foreach).step()
    assert p.isnan().tolist() == [True, False]
    assert not vars(p)


@every
def test_tensor_learning_rate(name):
    ours, theirs, _ = PAIRS[name]
    a, b = parameters(1), parameters(1)
    opts = ours(a, lr=torch.tensor(.1, dtype=torch.float64)), theirs(b, lr=.1)
    gen = torch.Generator().manual_seed(1)
    for _ in range(10):
        set_gradients(gen, a, b)
        for opt in opts: opt.step()
    same_parameters(a, b)


@every
def test_mixed_dtypes_in_one_group(name):
    ours, theirs, _ = PAIRS[name]
    lists = [[nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)] for _ in range(2)]
    opts = ours(lists[0], lr=.25), theirs(lists[1], lr=.25)
    for p, q in zip(*lists): p.grad, q.grad = torch.full_like(p, .5), torch.full_like(q, .5)
    for _ in range(5):
        for opt in opts: opt.step()
    for p, q in zip(*lists): assert_close(p, q, rtol=2e-2 if p.dtype == torch.bfloat16 else 1e-6, atol=1e-6)  # torch's own two forms are 1.8e-2 apart in bfloat16


@every
@pytest.mark.parametrize('bad', [dict(lr=-1.), dict(lr=math.nan), dict(lr=math.inf), dict(lr='1'), dict(lr=torch.ones(2)), dict(weight_decay=-.1)])
def test_bad_values_are_refused_in_constructor_and_group(name, bad):
    make, key = PAIRS[name][0], next(iter(bad))
    with pytest.raises(ValueError, match=f'{key} must be a number of at least 0'): make(parameters(0), **({'lr': .1} | bad))
    with pytest.raises(ValueError, match=f'{key} must be a number of at least 0'): make([{'params': parameters(0), **bad}], lr=.1)


@every
def test_wrong_names_and_parameters_are_refused(name):
    make, ps = PAIRS[name][0], parameters(0)
    with pytest.raises(TypeError, match="did you mean 'weight_decay'"): make(ps, lr=.1, weigth_decay=.1)
    with pytest.raises(TypeError, match="did you mean 'weight_decay'"): make([{'params': ps, 'weigth_decay': .1}], lr=.1)
    with pytest.raises(ValueError, match='no parameters'): make(iter(()), lr=.1)
    with pytest.raises(ValueError, match='given twice'): make([{'params': ps}, {'params': ps[1]}], lr=.1)
    with pytest.raises(ValueError, match='given twice'): make([ps[0], ps[0]], lr=.1)
    with pytest.raises(ValueError, match='parameter bias of shape'): make([('weight', ps[0]), ('bias', ps[0])], lr=.1)
    with pytest.raises(ValueError, match='complex'): make([nn.Parameter(torch.ones(1, dtype=torch.complex64))], lr=.1)


@every
def test_sparse_gradients_are_refused(name):
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match='dense gradients only'): PAIRS[name][0](table.parameters(), lr=.1).step()


@every
def test_named_parameters_and_groups_added_later(name):
    layer, late = nn.Linear(2, 1), nn.Parameter(torch.ones(1))
    opt = PAIRS[name][0](layer.named_parameters(), lr=.1)
    assert opt.param_groups[0]['param_names'] == ['weight', 'bias']
    opt.add_param_group({'params': [('late', late)], 'lr': .2})
    late.grad = torch.ones(1)
    opt.step()
    assert late.item() != 1.


@every
def test_the_state_of_torchs_other_optimizers_is_refused(name):
    ps, kind = parameters(0), PAIRS[name][1]
    other = torch.optim.Adam(ps) if isinstance(kind(ps, lr=.1), torch.optim.SGD) else torch.optim.SGD(ps)
    with pytest.raises(ValueError, match='saved'): PAIRS[name][0](ps, lr=.1).load_state_dict(other.state_dict())


@every
def test_a_loaded_schedule_and_a_fused_optimizer_do_not_disturb(name):
    ours, theirs, _ = PAIRS[name]
    ps = parameters(0)
    saved = theirs(ps, lr=.1).state_dict()
    if 'fused' in saved['param_groups'][0]: saved['param_groups'][0]['fused'] = True  # RMSprop has no fused form
    saved['param_groups'][0]['initial_lr'] = .3
    opt = ours(ps, lr=.2)
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert (group['lr'], group['initial_lr'], group['foreach']) == (.1, .3, True)
    assert saved['param_groups'][0].get('fused', True) is True, 'the saved state was edited'


@every
def test_closure_runs_with_gradients(name):
    p = nn.Parameter(torch.tensor([3.]))
    opt = PAIRS[name][0]([p], lr=.1)
    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss
    assert opt.step(closure).item() == 9. and p.item() < 3.


@every
@pytest.mark.skipif(shutil.which('g++') is None and shutil.which('c++') is None, reason='torch.compile needs a C++ compiler here')
def test_torch_compile_traces_the_step_whole(name):
    "One graph without a break, and none anew when the rate changes; the backend runs it as it is, so no minute of code generation"
    ours, _, _ = PAIRS[name]
    a, b = parameters(2), parameters(2)
    lr = torch.tensor(.1, dtype=torch.float64)
    compiled, plain = ours(a, lr=lr.clone(), weight_decay=.01), ours(b, lr=lr.clone(), weight_decay=.01)
    gen = torch.Generator().manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        step = torch.compile(lambda: compiled.step(), backend='aot_eager', fullgraph=True)
        for t in range(5):
            set_gradients(gen, a, b, missing=0)
            for opt in compiled, plain: opt.param_groups[0]['lr'].fill_(.1/(t+1))
            with torch._dynamo.config.patch(error_on_recompile=t > 1):
                if t == 0: compiled.step()   # makes the state
                else: step()
            plain.step()
    same_parameters(a, b)


def test_one_step_is_enough():
    class Halve(Optimizer):
        def __init__(self, params, factor=.5): super().__init__(params, dict(factor=factor))
        def one_step(self, p, grad, state, group): p *= group['factor']
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    for opt in Halve([p]), Halve([{'params': [p], 'factor': .1}]): opt.step()
    assert_close(p.detach(), torch.full((2,), .05))
    with pytest.raises(TypeError, match="did you mean 'factor'"): Halve([p], facter=1)


def test_helpers():
    x = torch.ones(2)
    add_scaled([x], [torch.ones(2)], torch.tensor(2.))
    assert x.tolist() == [3., 3.]
    check_hyper('betas', (.9, .99), 0, 1)
    with pytest.raises(ValueError, match=r'betas\[0\]'): check_hyper('betas', (1, .99), 0, 1)
    with pytest.raises(TypeError, match="did you mean 'lr'"): check_names(['l'], ['lr'], 'x')


@given(st.lists(st.sampled_from(['linear', 'conv', 'norm', 'embed']), min_size=1, max_size=5))
@quick
def test_decay_groups_hold_every_parameter_once(kinds):
    make = dict(linear=lambda: nn.Linear(2, 2), conv=lambda: nn.Conv2d(1, 1, 3), norm=lambda: nn.LayerNorm((2, 2)), embed=lambda: nn.Embedding(3, 2))
    model = nn.Sequential(*[make[kind]() for kind in kinds])
    groups = decay_groups(model, .1)
    held = [id(p) for g in groups for p in g['params']]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert [g['weight_decay'] for g in groups] == [.1, 0.]
    assert len(groups[0]['params']) == sum(kind != 'norm' for kind in kinds)


def test_adam_brings_step_counters_home():
    "A fused state keeps them on the device, an old one as numbers; each parameter counts its own"
    ps = parameters(3)
    for p in ps: p.grad = torch.ones_like(p)
    opt = Adam(ps, lr=.1)
    opt.step()
    ps[0].grad = None
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for i, state in saved['state'].items(): state['step'] = float(state['step']) if i else state['step'].double()
    opt.load_state_dict(saved)
    steps = [opt.state[p]['step'] for p in ps]
    assert [t.item() for t in steps] == [1.] + [2.]*(len(ps)-1)
    assert all(t.dtype == torch.float32 and t.device.type == 'cpu' for t in steps)


@pytest.mark.parametrize('theirs, ours, extra', [(torch.optim.Adam, Adam, dict(amsgrad=True)), (torch.optim.AdamW, AdamW, dict(amsgrad=True)),
                                                 (torch.optim.RMSprop, RMSProp, dict(momentum=.9)), (torch.optim.RMSprop, RMSProp, dict(centered=True)),
                                                 (torch.optim.Adam, AdamW, {}), (torch.optim.AdamW, Adam, {})])
def test_states_that_cannot_be_continued_are_refused(theirs, ours, extra):
    saved = theirs(parameters(0), lr=.1, **extra).state_dict()
    with pytest.raises(ValueError, match=f'which {ours.__name__} lacks'): ours(parameters(0)).load_state_dict(saved)
