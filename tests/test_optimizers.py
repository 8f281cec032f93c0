"""Our optimizers take the same steps as torch's, in double precision, whatever the
hyperparameters, groups and gradients are.

A further optimizer is one more line in `PAIRS`. The second half asks of *every*
optimizer of the book what torch's own suite asks of its optimizers; there a further one
is one more line in `ALL` (optimizer_checks.py).
"""
import copy
import inspect
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
from optimizer_checks import (
    ALL,
    Exact,
    class_of,
    parameters as some_parameters,
    same_parameters,
    set_gradients,
    step_alike,
    train,
)
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.testing import assert_close

from nntrain.adaptive import Adam, AdamW, RMSProp
from nntrain.data import DataLoaders
from nntrain.hypers import check_hyper, check_names
from nntrain.learner import Learner
from nntrain.momentum import Momentum
from nntrain.optimizer import SCHEDULER_KEYS, Optimizer, step_counter
from nntrain.sgd import SGD, add_l2, add_scaled, decay_groups

rates = st.one_of(st.just(0.), st.floats(1e-4, .5))
decays = st.one_of(st.just(0.), st.floats(1e-4, .5))
shares = st.one_of(st.just(0.), st.floats(.1, .95))
def hypers(**more):
    "Draws the hyperparameters that all have, and `more`"
    common = dict(lr=rates, weight_decay=decays, maximize=st.booleans())
    return st.fixed_dictionaries({**common, **more})


eps = st.floats(1e-8, .1)
adam_hypers = hypers(eps=eps, betas=st.tuples(st.floats(0, .99), st.floats(0, .999)))
momentum_hypers = hypers(momentum=shares, dampening=shares)
torch_momentum = partial(torch.optim.SGD, momentum=.9)
torch_nesterov = partial(torch.optim.SGD, momentum=.9, nesterov=True)

# name: (ours, torch's, hyperparameters that both take)
PAIRS = {
    'SGD': (SGD, torch.optim.SGD, hypers()),
    'Momentum': (Momentum, torch_momentum, momentum_hypers),
    'Nesterov': (partial(Momentum, nesterov=True), torch_nesterov,
                 hypers(momentum=st.floats(.1, .95))),
    'RMSProp': (RMSProp, torch.optim.RMSprop,
                hypers(alpha=st.floats(0, .999), eps=eps)),
    'Adam': (Adam, torch.optim.Adam, adam_hypers),
    'AdamW': (AdamW, torch.optim.AdamW, adam_hypers),
}

SHAPES = [(3, 4), (4,), (), (2, 2, 2), (1, 3)]
quick = settings(max_examples=15, deadline=None)
every = pytest.mark.parametrize('name', PAIRS)
both = pytest.mark.parametrize('foreach', [True, False])


def parameters(seed):
    gen = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=gen, dtype=torch.float64))
        for shape in SHAPES]


def in_groups(params, overrides):
    "Two or three groups: `overrides` for the first ones"
    cuts = [0, 2, 3, len(params)] if len(overrides) == 2 else [0, 2, len(params)]
    return [
        {'params': params[a:b], **extra}
        for a, b, extra in zip(cuts, cuts[1:], [*overrides, {}])]


def pair(name, data, foreach=True, seed=0):
    ours, theirs, drawn = PAIRS[name]
    kw = data.draw(drawn)
    overrides = [data.draw(drawn) for _ in range(data.draw(st.integers(1, 2)))]
    for override in overrides: del override['maximize']
    a, b = parameters(seed), parameters(seed)
    return (
        a, ours(in_groups(a, overrides), foreach=foreach, **kw), b,
        theirs(in_groups(b, overrides), **kw))


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
    """Any number in a group may be moved at any time; momentum and betas are, where
    there are some"""
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
    lists = [
        [
            nn.Parameter(torch.ones(3, dtype=dtype))
            for dtype in (torch.float64, torch.float32, torch.bfloat16)]
        for _ in range(2)
    ]
    opts = ours(lists[0], lr=.25), theirs(lists[1], lr=.25)
    for p, q in zip(*lists):
        p.grad, q.grad = torch.full_like(p, 0.5), torch.full_like(q, 0.5)
    for _ in range(5):
        for opt in opts: opt.step()
    # torch's own two forms are 1.8e-2 apart in bfloat16
    for p, q in zip(*lists):
        assert_close(p, q, rtol=2e-2 if p.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@every
@pytest.mark.parametrize(
    'bad',
    [
        dict(lr=-1.0), dict(lr=math.nan), dict(lr=math.inf), dict(lr='1'),
        dict(lr=torch.ones(2)), dict(weight_decay=-0.1)],
)
def test_bad_values_are_refused_in_constructor_and_group(name, bad):
    make, key = PAIRS[name][0], next(iter(bad))
    with pytest.raises(ValueError, match=f'{key} must be a number of at least 0'):
        make(parameters(0), **({'lr': 0.1} | bad))
    with pytest.raises(ValueError, match=f'{key} must be a number of at least 0'):
        make([{'params': parameters(0), **bad}], lr=0.1)


@every
def test_wrong_names_and_parameters_are_refused(name):
    make, ps = PAIRS[name][0], parameters(0)
    with pytest.raises(TypeError, match="did you mean 'weight_decay'"):
        make(ps, lr=0.1, weigth_decay=0.1)
    with pytest.raises(TypeError, match="did you mean 'weight_decay'"):
        make([{'params': ps, 'weigth_decay': 0.1}], lr=0.1)
    with pytest.raises(ValueError, match='no parameters'): make(iter(()), lr=.1)
    with pytest.raises(ValueError, match='given twice'):
        make([{'params': ps}, {'params': ps[1]}], lr=0.1)
    with pytest.raises(ValueError, match='given twice'): make([ps[0], ps[0]], lr=.1)
    with pytest.raises(ValueError, match='parameter bias of shape'):
        make([('weight', ps[0]), ('bias', ps[0])], lr=0.1)
    with pytest.raises(ValueError, match='complex'):
        make([nn.Parameter(torch.ones(1, dtype=torch.complex64))], lr=0.1)


@every
def test_no_group_moves_before_sparse_gradients_are_refused(name):
    table, p = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    table(torch.tensor([1])).sum().backward()
    p.grad = torch.ones(2)
    groups = [dict(params=[p]), dict(params=table.parameters())]
    opt = PAIRS[name][0](groups, lr=.1)
    with pytest.raises(RuntimeError, match='dense gradients only'): opt.step()
    assert p.equal(torch.ones(2)) and not opt.state


@every
def test_sparse_gradients_are_refused(name):
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match='dense gradients only'):
        PAIRS[name][0](table.parameters(), lr=0.1).step()


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
    other = (
        torch.optim.Adam(ps) if isinstance(kind(ps, lr=0.1), torch.optim.SGD)
        else torch.optim.SGD(ps))
    with pytest.raises(ValueError, match='saved'):
        PAIRS[name][0](ps, lr=0.1).load_state_dict(other.state_dict())


@every
def test_a_loaded_schedule_and_a_fused_optimizer_do_not_disturb(name):
    ours, theirs, _ = PAIRS[name]
    ps = parameters(0)
    saved = theirs(ps, lr=.1).state_dict()
    if 'fused' in saved['param_groups'][0]:
        saved['param_groups'][0]['fused'] = True  # RMSprop has no fused form
    saved['param_groups'][0]['initial_lr'] = .3
    opt = ours(ps, lr=.2)
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert (group['lr'], group['initial_lr'], group['foreach']) == (.1, .3, True)
    assert saved['param_groups'][0].get('fused', True) is True, (
        'the saved state was edited')


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
@pytest.mark.skipif(
    shutil.which('g++') is None and shutil.which('c++') is None,
    reason='torch.compile needs a C++ compiler here')
def test_torch_compile_traces_the_step_whole(name):
    """One graph without a break, and none anew when the rate changes; the backend runs
    it as it is, so no minute of code generation"""
    ours, _, _ = PAIRS[name]
    a, b = parameters(2), parameters(2)
    lr = torch.tensor(.1, dtype=torch.float64)
    compiled, plain = (
        ours(a, lr=lr.clone(), weight_decay=0.01),
        ours(b, lr=lr.clone(), weight_decay=0.01))
    gen = torch.Generator().manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        step = torch.compile(
            lambda: compiled.step(), backend='aot_eager', fullgraph=True)
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
        def __init__(self, params, factor=0.5):
            super().__init__(params, dict(factor=factor))
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
    with pytest.raises(ValueError, match=r'betas\[0\]'):
        check_hyper('betas', (1, 0.99), 0, 1)
    with pytest.raises(TypeError, match="did you mean 'lr'"):
        check_names(['l'], ['lr'], 'x')


@given(
    st.lists(
        st.sampled_from(['linear', 'conv', 'norm', 'embed']), min_size=1, max_size=5))
@quick
def test_decay_groups_hold_every_parameter_once(kinds):
    make = dict(
        linear=lambda: nn.Linear(2, 2), conv=lambda: nn.Conv2d(1, 1, 3),
        norm=lambda: nn.LayerNorm((2, 2)), embed=lambda: nn.Embedding(3, 2))
    model = nn.Sequential(*[make[kind]() for kind in kinds])
    groups = decay_groups(model, .1)
    held = [id(p) for g in groups for p in g['params']]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert [g['weight_decay'] for g in groups] == [.1, 0.]
    assert len(groups[0]['params']) == sum(kind != 'norm' for kind in kinds)


def test_adam_brings_step_counters_home():
    """A fused state keeps them on the device, an old one as numbers; each parameter
    counts its own"""
    ps = parameters(3)
    for p in ps: p.grad = torch.ones_like(p)
    opt = Adam(ps, lr=.1)
    opt.step()
    ps[0].grad = None
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for i, state in saved['state'].items():
        state['step'] = float(state['step']) if i else state['step'].double()
    opt.load_state_dict(saved)
    steps = [opt.state[p]['step'] for p in ps]
    assert [t.item() for t in steps] == [1.] + [2.]*(len(ps)-1)
    assert all(t.dtype == torch.float32 and t.device.type == 'cpu' for t in steps)


@pytest.mark.parametrize(
    'theirs, ours, extra',
    [
        (torch.optim.Adam, Adam, dict(amsgrad=True)),
        (torch.optim.AdamW, AdamW, dict(amsgrad=True)),
        (torch.optim.RMSprop, RMSProp, dict(momentum=0.9)),
        (torch.optim.RMSprop, RMSProp, dict(centered=True)),
        (torch.optim.Adam, AdamW, {}), (torch.optim.AdamW, Adam, {})],
)
def test_states_that_cannot_be_continued_are_refused(theirs, ours, extra):
    saved = theirs(parameters(0), lr=.1, **extra).state_dict()
    if not extra and 'decoupled_weight_decay' not in saved['param_groups'][0]:
        pytest.skip('this torch does not write down which decay it was')
    with pytest.raises(ValueError, match=f'which {ours.__name__} lacks'):
        ours(parameters(0)).load_state_dict(saved)


# ---- what torch's own suite asks of an optimizer, asked of every one of the book

all_of_them = pytest.mark.parametrize('name', ALL)


def prepared(name, n_steps=3, lr=.01, seed=0, **kw):
    "(parameters, optimizer) after some steps"
    ps = some_parameters(seed, **kw)
    run = ps, ALL[name](ps, lr=lr)
    train(seed, n_steps, run, missing=0)
    return run


def numbers_of(opt):
    "The states that are one number: {(parameter, name): tensor}"
    return {
        (i, name): value for i, state in enumerate(opt.state.values())
        for name, value in state.items() if isinstance(value, torch.Tensor)
        and value.ndim == 0
        and (name in ('step', 'since_sync', 'trust', 'weight1', 'weight2'))}


@all_of_them
def test_groups_with_the_keys_of_schedulers(name):
    """Cyclic momentum and SWA write into the groups; such groups can be given to a new
    optimizer"""
    ps, opt = prepared(name)
    if 'momentum' in opt.defaults or 'betas' in opt.defaults:
        lr_scheduler.OneCycleLR(opt, .1, total_steps=5)
        lr_scheduler.CyclicLR(opt, .01, .1)
    else: lr_scheduler.OneCycleLR(opt, .1, total_steps=5, cycle_momentum=False)
    swa_utils.SWALR(opt, swa_lr=.05)
    again = ALL[name](opt.param_groups, lr=7.)
    assert again.param_groups[0]['lr'] == opt.param_groups[0]['lr']
    late = nn.Parameter(torch.ones(2))
    opt.add_param_group({'params': [late], **dict.fromkeys(SCHEDULER_KEYS, .1)})
    assert [opt.param_groups[-1][key] for key in SCHEDULER_KEYS] == [.1]*6
    with pytest.raises(
        TypeError, match="has no hyperparameter 'swa_rate': did you mean"
    ):
        opt.add_param_group({'params': [nn.Parameter(torch.ones(2))], 'swa_rate': .1})


@every
def test_groups_of_torchs_optimizer_can_be_given(name):
    ours, theirs, _ = PAIRS[name]
    ps = parameters(0)
    opt = ours(theirs(ps, lr=.3).param_groups, lr=.1)
    assert opt.param_groups[0]['lr'] == .3 and opt.param_groups[0]['foreach'] is True
    groups = theirs(ps, lr=.3).param_groups
    groups[0]['differentiable'] = True
    with pytest.raises(
        ValueError, match="sets {'differentiable': True}, which .* lacks"
    ):
        ours(groups)


def test_torchs_namesake_with_an_option_that_we_lack():
    with pytest.raises(
        ValueError,
        match="a parameter group of SGD sets {'momentum': 0.9}, which SGD lacks",
    ):
        SGD(torch.optim.SGD(parameters(0), lr=.1, momentum=.9).param_groups)


@all_of_them
def test_live_groups_and_saved_groups_have_the_same_keys(name):
    _, opt = prepared(name)
    assert [set(g) for g in opt.param_groups] == [
        set(g) for g in opt.state_dict()['param_groups']]
    old = pickle.loads(pickle.dumps(opt))
    for group in old.param_groups:
        for key in 'maximize', 'foreach', *opt.torch_keys:
            del group[key]  # as older versions wrote it
    old.__setstate__({'state': old.state, 'param_groups': old.param_groups})
    assert set(old.param_groups[0]) == set(opt.param_groups[0])


@all_of_them
def test_torchs_swap_in_of_parameters_and_state(name):
    stateless = pytest.importorskip(
        'torch.optim._stateless', reason='torch has no swap-in yet')
    ps, opt = prepared(name)
    others, plain = copy.deepcopy((ps, opt))
    before = [p.detach().clone() for p in ps]
    gen = torch.Generator().manual_seed(5)
    set_gradients(gen, ps, others, missing=0)
    mine = [p.detach().clone() for p in ps]
    for p, q in zip(mine, ps): p.grad = q.grad.clone()
    saved = copy.deepcopy(opt.state_dict())
    new = {id(p): q for p, q in zip(ps, mine)}      # torch goes by the order of groups
    held = [p for group in opt.param_groups for p in group['params']]
    named = {str(i): new[id(p)] for i, p in enumerate(held)}
    with stateless.swap_in_optimizer_params_and_state(opt, named, saved): opt.step()
    plain.step()
    same_parameters(mine, [p.detach() for p in others])
    same_parameters(ps, before)


@all_of_them
def test_a_hook_before_loading_repairs_a_foreign_state(name):
    ps, opt = prepared(name)
    foreign = copy.deepcopy(opt.state_dict())
    for group in foreign['param_groups']: group['learning_rate'] = group.pop('lr')
    other = ALL[name](copy.deepcopy(ps), lr=7.)
    with pytest.raises(ValueError, match=r"\['lr'\]: in the saved state or in"):
        other.load_state_dict(foreign)
    def repair(opt, saved):
        groups = [{**g, 'lr': g['learning_rate']} for g in saved['param_groups']]
        for group in groups: del group['learning_rate']
        return {**saved, 'param_groups': groups}
    hook = other.register_load_state_dict_pre_hook(repair)
    other.load_state_dict(foreign)
    assert (
        other.param_groups[0]['lr'] == 0.01
        and 'learning_rate' in foreign['param_groups'][0])
    hook.remove()
    assert (
        not other._optimizer_load_state_dict_pre_hooks
        and not other._optimizer_load_state_dict_post_hooks)


@all_of_them
def test_hooks_around_step_saving_and_loading(name):
    "They may write into the state, also under keys that are no parameters"
    ps, opt = prepared(name)
    called = []
    def note(what):
        def hook(opt, *args):
            called.append(what)
            if 'step' not in what: opt.state[what] = True
        return hook
    opt.register_state_dict_pre_hook(note('before saving'))
    opt.register_state_dict_post_hook(note('after saving'))
    opt.register_load_state_dict_pre_hook(note('before loading'))
    opt.register_load_state_dict_post_hook(note('after loading'))
    opt.register_step_pre_hook(note('before step'))
    opt.register_step_post_hook(note('after step'))
    opt.load_state_dict(opt.state_dict())
    opt.step()
    assert called == [
        'before saving', 'after saving', 'before loading', 'after loading',
        'before step', 'after step']
    assert opt.state['after loading'] is True
    def flat(opt, saved): return {'everything': saved}
    opt.register_state_dict_post_hook(flat)
    assert list(opt.state_dict()) == ['everything']


@all_of_them
def test_plain_numbers_in_a_saved_state(name):
    "As torch wrote step counts before 1.12"
    ps, opt = prepared(name)
    saved = copy.deepcopy(opt.state_dict())
    for i, key in numbers_of(opt):
        saved['state'][i][key] = saved['state'][i][key].item()
    others = copy.deepcopy(ps)
    other = ALL[name](others, lr=7.)
    other.load_state_dict(saved)
    train(1, 7, (ps, opt), (others, other))


@pytest.mark.parametrize('default', [torch.float64, torch.float16, torch.bfloat16])
@all_of_them
def test_the_default_type_does_not_narrow_what_is_counted(name, default):
    torch.set_default_dtype(default)
    try:
        ps, opt = prepared(name, n_steps=6, dtype=torch.float32)
        counts = {
            key: value for key, value in numbers_of(opt).items() if key[1] == 'step'}
        kept = {value.dtype for value in numbers_of(opt).values()}
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert {value.dtype for value in numbers_of(opt).values()} == kept
        assert step_counter().dtype == (
            torch.float64 if default == torch.float64 else torch.float32)
    finally: torch.set_default_dtype(torch.float32)
    assert all(count == 6 for count in counts.values()) and kept <= {
        torch.float32, torch.float64}


@both
@all_of_them
def test_a_rate_of_shape_one_fits_a_parameter_without_axes(name, foreach):
    a, b = some_parameters(1), some_parameters(1)
    runs = [
        (ps, ALL[name](ps, lr=lr, foreach=foreach))
        for ps, lr in ((a, torch.tensor([0.01], dtype=torch.float64)), (b, 0.01))]
    train(1, 5, *runs)
    assert [p.shape for p in a] == [p.shape for p in b]


@all_of_them
def test_betas_as_tensors_are_refused(name):
    if 'betas' not in inspect.signature(class_of(ALL[name])).parameters:
        pytest.skip('has no betas')
    for betas in (
        (torch.tensor(0.9), torch.tensor(0.99)),
        (0.9, torch.tensor(0.99)),
        (torch.ones(2) / 2, 0.9),
    ):
        with pytest.raises(
            ValueError, match=r'betas\[.\] must be a plain number, got tensor'
        ):
            ALL[name](some_parameters(), betas=betas)


# two last places of numbers up to 4
HALVES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize('order', [(0, 1, 2, 0), (1, 0, 2, 1), (2, 2, 1, 0)])
@all_of_them
def test_types_mixed_in_one_group(name, order):
    """Each type goes through `multi_step` on its own, and ends where it would end
    alone; one by one it ends there as well, up to the rounding of its type"""
    dtypes = [list(HALVES)[i] for i in order]
    def run(dtypes, which, **kw):
        gen = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(7, generator=gen).to(dtype)) for dtype in dtypes]
        grads = [torch.randn(3, 7, generator=gen) for _ in ps]
        chosen = [ps[i] for i in which]
        opt = ALL[name](chosen, lr=.02, **kw)
        for t in range(3):
            for p, grad in zip(ps, grads): p.grad = grad[t].to(p.dtype)
            opt.step()
        return chosen, opt
    everything = range(len(dtypes))
    mixed, opt = run(dtypes, everything)
    for p, q in zip(mixed, run(dtypes, everything, foreach=False)[0]):
        assert_close(p, q, rtol=0, atol=HALVES[p.dtype])
    for dtype in HALVES:
        which = [i for i in everything if dtypes[i] == dtype]
        if which:
            assert all(
                torch.equal(p, mixed[i]) for i, p in zip(which, run(dtypes, which)[0]))
    kinds, plain = [], type(opt).multi_step
    class Watched(class_of(ALL[name])):
        def multi_step(self, params, *lists):
            kinds.append({p.dtype for p in params})
            plain(self, params, *lists)
    opt.__class__ = Watched
    opt.step()
    assert sorted(map(len, kinds)) == [1]*len(set(dtypes))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_the_weights_of_averages_are_summed_in_float32(dtype):
    """In half precision .999 is 1 or .9966: after a thousand steps the sums would be
    far off, and so the step"""
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    opt = Exact([p], lr=1e-4)
    for _ in range(1000): p.grad = torch.ones_like(p); opt.step()
    again = Exact([p], lr=1e-4)
    # torch turns numbers into the type of the weights
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for o in opt, again:
        weights = [o.state[p][name] for name in ('weight1', 'weight2')]
        assert [w.dtype for w in weights] == [torch.float32]*2
        assert_close(
            torch.stack(weights), torch.tensor([1.0, 1 - 0.999**1000]), rtol=1e-4,
            atol=0)
    assert opt.state[p]['exp_avg'].dtype == dtype


@pytest.mark.parametrize(
    'name', ['LAMB', 'Lookahead', 'RAdam', 'Exact', 'Adam', 'LookaheadUsers'])
def test_what_a_saved_state_must_hold(name):
    ps, opt = prepared(name)
    saved = copy.deepcopy(opt.state_dict())
    lost, _ = saved['state'][1].popitem()
    with pytest.raises(ValueError, match=f"parameter 1 lacks '{lost}'"):
        opt.load_state_dict(saved)
    with pytest.raises(
        ValueError,
        match='not the state of an optimizer: expected the keys state and param_groups',
    ):
        opt.load_state_dict({'weight': torch.ones(1)})


@all_of_them
def test_saved_states_are_not_changed_and_do_not_depend_on_identity(name):
    ps, opt = prepared(name)
    saved = copy.deepcopy(opt.state_dict())
    given = copy.deepcopy(saved)
    others = copy.deepcopy(ps)
    other = ALL[name](others, lr=7.)
    other.load_state_dict(given)
    def numbers(state):
        groups = [{k: v for k, v in group.items() if not isinstance(v, str)}
                  for group in state['param_groups']]
        return {**state, 'param_groups': groups}
    assert_close(numbers(given), numbers(saved), rtol=0, atol=0)
    assert_close(numbers(other.state_dict()), numbers(saved), rtol=0, atol=0)
    for group in given['param_groups']:
        del group['maximize'], group['foreach']  # older than these options
    other.load_state_dict(given)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(2, 6, (ps, opt), (others, other))


@all_of_them
def test_classes_and_instances_can_be_pickled_and_copied(name):
    "Also classes that no module knows by name"
    ps, opt = prepared(name)
    cls = type(opt)
    made = pickle.loads(pickle.dumps(cls))
    assert (
        made.__name__ == cls.__name__
        and made.__mro__[1].__name__ == cls.__mro__[1].__name__)
    assert copy.deepcopy(cls) is cls and copy.copy(cls) is cls
    runs = [copy.deepcopy((ps, opt)), pickle.loads(pickle.dumps((ps, opt)))]
    def public(opt): return {k for k in vars(opt) if not k.startswith('_')}
    assert all(public(o) == public(opt) for _, o in runs)
    train(3, 6, (ps, opt), *runs)
    assert repr(opt).startswith(cls.__name__ + ' (')


def test_lookahead_keeps_what_a_users_class_has_of_its_own():
    opt = ALL['LookaheadUsers'](some_parameters(), lr=.1)
    assert pickle.loads(pickle.dumps(opt)).doubled() == opt.doubled() == .2


@both
@all_of_them
def test_odd_parameters(name, foreach):
    "None has a gradient; parameters without elements, not contiguous, frozen"
    none = some_parameters()
    ALL[name](none, lr=.1, foreach=foreach).step()
    same_parameters(none, some_parameters())
    # square, since a lower rank leaves SOAP's basis open; and its averages of squares
    # may be near 0 there, which magnifies the last bit
    gen, tol = torch.Generator().manual_seed(0), 1e-6 if name == 'SOAP' else 1e-12
    wide = torch.randn(5, 5, 2, dtype=torch.float64, generator=gen)
    ps = [
        nn.Parameter(torch.empty(0, 3)), nn.Parameter(wide[..., 0]),
        nn.Parameter(torch.ones(2), requires_grad=False)]
    flat = nn.Parameter(wide[..., 0].contiguous())
    a, b = (
        ALL[name](ps, lr=0.1, foreach=foreach),
        ALL[name]([flat], lr=0.1, foreach=foreach))
    for _ in range(7):
        ps[0].grad = torch.empty(0, 3)
        grad = torch.randn(5, 5, dtype=torch.float64, generator=gen)
        ps[1].grad = grad.T.contiguous().T
        flat.grad = ps[1].grad.contiguous()
        a.step(), b.step()
    assert_close(ps[1], flat, rtol=tol, atol=tol)
    assert ps[2].tolist() == [1., 1.] and not ps[1].is_contiguous()


@all_of_them
def test_the_closure_is_called_once_and_its_loss_given_back(name):
    ps, calls = some_parameters(), []
    opt = ALL[name](ps, lr=1e-3)
    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = sum((p**2).sum() for p in ps)
        loss.backward()
        return loss
    losses = [opt.step(closure).item() for _ in range(20)]
    assert calls == [True]*20 and losses[-1] < losses[0]


# ---- what the chapter on optimizers says and only shows once

SCHEDULERS = dict(
    LambdaLR=lambda o: lr_scheduler.LambdaLR(o, lambda t: .9**t),
    MultiplicativeLR=lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: .95),
    StepLR=lambda o: lr_scheduler.StepLR(o, 3),
    MultiStepLR=lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    ConstantLR=lr_scheduler.ConstantLR,
    LinearLR=lr_scheduler.LinearLR,
    ExponentialLR=lambda o: lr_scheduler.ExponentialLR(o, .9),
    PolynomialLR=lambda o: lr_scheduler.PolynomialLR(o, 8),
    CosineAnnealingLR=lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    CosineAnnealingWarmRestarts=partial(
        lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
    CyclicLR=lambda o: lr_scheduler.CyclicLR(o, .01, .5, 3, cycle_momentum=False),
    OneCycleLR=lambda o: lr_scheduler.OneCycleLR(
        o, .5, total_steps=12, cycle_momentum=False),
    ReduceLROnPlateau=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    SequentialLR=lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, .8)], [4]),
    ChainedScheduler=lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, .8)]))


def test_all_schedulers_of_torch_are_tried():
    "A newer torch may have more; those that we know must be there"
    assert set(SCHEDULERS) <= set(lr_scheduler.__all__)


@pytest.mark.parametrize('name', SCHEDULERS)
def test_every_scheduler_drives_ours_as_torchs(name):
    def scheduled(opt_class):
        p, rates = nn.Parameter(torch.tensor([1., -2.], dtype=torch.float64)), []
        opt = opt_class([p], lr=.3, weight_decay=.01)
        schedule = SCHEDULERS[name](opt)
        for t in range(10):
            p.grad = 2*p.detach() + t
            opt.step()
            schedule.step(*[1.] if name == 'ReduceLROnPlateau' else [])
            rates.append(float(opt.param_groups[0]['lr']))
        return p.detach(), rates
    (p, rates), (q, theirs) = scheduled(SGD), scheduled(torch.optim.SGD)
    assert rates == theirs and len(set(rates)) > 1
    assert_close(p, q, rtol=0, atol=1e-12)


def test_a_cycle_of_momentum_needs_momentum():
    with pytest.raises(ValueError, match='must support momentum'):
        lr_scheduler.OneCycleLR(SGD(parameters(0), lr=.1), .5, total_steps=10)


def test_clipping_and_weight_averaging():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    p.grad = torch.tensor([3., 4.], dtype=torch.float64)                  # norm 5
    nn.utils.clip_grad_norm_([p], max_norm=1.)
    SGD([p], lr=.1).step()
    wanted = torch.tensor([-.06, -.08], dtype=torch.float64)
    assert_close(p.detach(), wanted, rtol=1e-5, atol=0)
    model = nn.Linear(1, 1, bias=False)
    average, opt = swa_utils.AveragedModel(model), SGD(model.parameters(), lr=.1)
    schedule = swa_utils.SWALR(opt, .01, anneal_epochs=2, anneal_strategy='linear')
    seen = []
    for _ in range(3):
        model.weight.grad = torch.ones(1, 1)
        opt.step(); schedule.step(); average.update_parameters(model)
        seen.append(model.weight.item())
    assert average.module.weight.item() == pytest.approx(sum(seen)/3, abs=1e-6)
    assert opt.param_groups[0]['lr'] == pytest.approx(.01)


def test_an_optimizer_needs_a_rule():
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    with pytest.raises(NotImplementedError, match='needs a method one_step'):
        Optimizer([p], dict(lr=.1)).step()


def test_a_group_that_is_added_stays_as_it_was():
    mine = {'params': [nn.Parameter(torch.ones(1))], 'lr': .5}
    opt = SGD(parameters(0), lr=.1, weight_decay=.01)
    opt.add_param_group(mine)
    assert list(mine) == ['params', 'lr']
    with pytest.raises(ValueError, match='given twice'): opt.add_param_group(mine)


def test_what_is_no_parameter_is_refused_in_torchs_words():
    p = parameters(0)[0]
    with pytest.raises(TypeError, match='iterable of Tensors'): SGD(p)
    with pytest.raises(TypeError, match='one of the params is int'): SGD([3])
    for unordered in {p}, [{'params': {p}}]:
        with pytest.raises(TypeError, match='a set have no fixed order'): SGD(unordered)


def test_options_that_are_not_there_stand_as_none():
    "So nothing can be scheduled that does not act"
    w = parameters(0)
    back = SGD(w)
    back.load_state_dict(torch.optim.SGD(w, lr=.3).state_dict())
    assert back.param_groups[0]['momentum'] is None
    for saved in torch.optim.SGD(w, lr=.1, momentum=.9), Momentum(w, lr=.1):
        with pytest.raises(ValueError, match='which SGD lacks: load it into'):
            SGD(w).load_state_dict(saved.state_dict())
    adam = torch.optim.Adam(w).state_dict()
    with pytest.raises(ValueError, match=r"\['betas', 'eps'\]: in the saved state or"):
        SGD(w).load_state_dict(adam)


def test_a_narrow_step_count_would_stand_still():
    wide, narrow = step_counter(), torch.zeros((), dtype=torch.float16)
    for _ in range(3000): wide += 1; narrow += 1
    assert (wide.item(), narrow.item(), wide.dtype) == (3000., 2048., torch.float32)


def test_decay_groups_and_what_decays():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.LayerNorm((2, 4, 4)),
        nn.Flatten(), nn.Linear(32, 3), nn.Linear(32, 3))
    model[-1].weight = model[-2].weight                      # shared: listed once
    assert [len(g['params']) for g in decay_groups(model, .01)] == [2, 6]
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    SGD(decay_groups(model, .5), lr=.1).step()             # gradient 0: only decay acts
    assert sum(not torch.equal(p, b) for p, b in zip(model.parameters(), before)) == 2


def test_in_front_of_a_batch_norm_the_size_of_weights_does_not_matter():
    "So decay does not make the function simpler there (van Laarhoven 2017)"
    norm = nn.BatchNorm1d(3, affine=False, eps=1e-12).double()
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, generator=gen, dtype=torch.float64)
    weight = torch.randn(4, 3, generator=gen, dtype=torch.float64)
    assert_close(norm(x @ weight), norm(x @ (.1*weight)), rtol=0, atol=1e-6)


def test_l2_of_lists_reads_only():
    grads, ps = [torch.ones(2)], [torch.full((2,), 3.)]
    assert_close(add_l2(grads, ps, .5), [torch.full((2,), 2.5)])
    assert add_l2(grads, ps, 0) is grads
    assert_close(grads, [torch.ones(2)])


def test_a_second_fit_makes_a_new_optimizer():
    class Counting(SGD):
        def init_state(self, p, group): return {'step': step_counter()}
        def one_step(self, p, grad, state, group): state['step'] += 1
        multi_step = Optimizer.multi_step
    data = DataLoaders([(torch.ones(2, 1), torch.ones(2, 1))]*2, [])
    learn = Learner(nn.Linear(1, 1), data, nn.functional.mse_loss, Counting, lr=.5)
    counts = []
    for n_epochs in 3, 1:
        learn.fit(n_epochs, valid=False)
        counts.append([s['step'].item() for s in learn.opt.state.values()])
    assert counts == [[6.]*2, [2.]*2]


@pytest.mark.parametrize('value', [-.1, math.nan, math.inf, '0.1', None, True,
                                   torch.ones(2), torch.tensor(1j)])
def test_what_is_no_rate(value):
    with pytest.raises(ValueError, match='lr must be a number of at least 0 and'):
        check_hyper('lr', value)


def test_what_is_a_rate():
    for value in 0, .1, 3, torch.tensor(.1), torch.tensor([.1]):
        check_hyper('lr', value)
    below = r'betas\[1\] must be a number of at least 0 and below 1, got 1.0'
    with pytest.raises(ValueError, match=below): check_hyper('betas', (.9, 1.), 0, 1)
    with pytest.raises(ValueError, match=r'betas\[0\] must be a plain number'):
        check_hyper('betas', (torch.tensor(.9), .99), 0, 1)


def test_a_scaler_skips_infinite_gradients():
    p, scaler = nn.Parameter(torch.ones(1)), torch.amp.GradScaler('cpu', 1024.)
    opt = SGD([p], lr=.1)
    scaler.scale((3*p).sum()).backward()
    scaler.step(opt); scaler.update()
    assert_close(p.detach(), torch.tensor([.7]))         # 1 - .1·3, as without a scaler
    opt.zero_grad(); scaler.scale((math.inf*p).sum()).backward()
    scaler.step(opt); scaler.update()
    assert_close(p.detach(), torch.tensor([.7]))
    assert scaler.get_scale() == 512.


def test_decay_first_and_step_first_differ_by_the_square_of_the_rate():
    class StepFirst(SGD):
        def multi_step(self, params, grads, states, group):
            add_scaled(params, grads, -group['lr'])
            torch._foreach_mul_(params, 1 - group['lr']*group['weight_decay'])
    def end(kind, lr, **kw):
        p = nn.Parameter(torch.tensor([3.], dtype=torch.float64))
        opt = kind([p], lr=lr, weight_decay=.5, **kw)
        p.grad = torch.full_like(p, 2.)
        opt.step()
        return p.item()
    # 1·3 - .1·(2 + .5·3), which is also (1 - .1·.5)·3 - .1·2: the decay comes first
    assert end(SGD, .1) == pytest.approx(2.65, abs=1e-12)
    assert end(StepFirst, .1) == pytest.approx(2.66, abs=1e-12)
    for lr in .1, .01:
        gap = end(StepFirst, lr) - end(SGD, lr)
        assert gap == pytest.approx(lr**2*.5*2, abs=1e-12)


def test_adamw_is_adam_with_a_decay_of_the_weights_before_the_step():
    gen, ends = torch.Generator().manual_seed(0), []
    grads = torch.randn(10, 3, generator=gen, dtype=torch.float64)
    for kind, kw in (torch.optim.Adam, {}), (torch.optim.AdamW, dict(weight_decay=.1)):
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))
        opt = kind([p], lr=.01, **kw)
        for g in grads:
            p.grad = g.clone()
            if kind is torch.optim.Adam:
                with torch.no_grad(): p *= 1 - .01*.1
            opt.step()
        ends.append(p.detach())
    assert_close(*ends, rtol=0, atol=1e-12)


def test_robbins_and_monros_steps_average_the_targets():
    class RobbinsMonro(SGD):
        def init_state(self, p, group): return {'step': step_counter()}
        def one_step(self, p, grad, state, group):
            state['step'] += 1
            p -= group['lr']/state['step']*grad
        multi_step = Optimizer.multi_step
    targets = 3 + torch.randn(
        1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = RobbinsMonro([p], lr=1.)
    for target in targets:
        p.grad = p.detach() - target
        opt.step()
    assert_close(p.detach(), targets.mean()[None], rtol=0, atol=1e-6)


def test_on_a_parabola_the_product_of_rate_and_curvature_decides():
    "Each step multiplies by 1 - lr·λ: at once there, for ever across, or away"
    def positions(lr, curvature=1.):
        p = nn.Parameter(torch.tensor(3., dtype=torch.float64))
        opt, seen = SGD([p], lr=lr), [3.]
        for _ in range(12):
            p.grad = curvature*p.detach()
            opt.step()
            seen.append(p.item())
        return torch.tensor(seen, dtype=torch.float64)
    def same(a, b): assert_close(a, b, rtol=1e-12, atol=0)
    same(positions(.1), 3*.9**torch.arange(13, dtype=torch.float64))
    same(positions(.05, curvature=2.), positions(.1))
    assert not positions(1.)[1:].any()                               # lr = 1/λ
    same(positions(2.).abs(), torch.full((13,), 3., dtype=torch.float64))
    same(positions(1.8).abs(), positions(.2).abs())      # one jumps, the other creeps
    assert positions(1.99)[-1].abs() < 3 < positions(2.01)[-1].abs()


def test_two_types_in_one_group_and_a_rate_of_shape_one():
    dtypes = torch.float32, torch.float64, torch.float32
    ps = [nn.Parameter(torch.ones((), dtype=dtype)) for dtype in dtypes]
    for p in ps: p.grad = torch.ones_like(p)
    SGD(ps, lr=torch.tensor([.5])).step()
    assert [(p.item(), p.shape, p.dtype) for p in ps] == [(.5, (), d) for d in dtypes]


def test_a_bare_loop_trains_in_the_learner():
    "Which asks an optimizer for no more than `step` and `zero_grad`"
    class Bare:
        def __init__(self, params, lr): self.params, self.lr = list(params), lr
        def step(self):
            with torch.no_grad():
                for p in self.params: p -= self.lr*p.grad
        def zero_grad(self):
            for p in self.params: p.grad = None
    gen, ends = torch.Generator().manual_seed(0), []
    xs, ys = (torch.randn(8, n, generator=gen) for n in (2, 1))
    batches = list(zip(xs.split(4), ys.split(4)))
    for kind in Bare, SGD, torch.optim.SGD:
        torch.manual_seed(0)
        learn = Learner(nn.Linear(2, 1), DataLoaders(batches, batches),
                        nn.functional.mse_loss, kind, lr=.1)
        learn.fit(3)
        ends.append(learn.model.weight.detach())
    assert_close(ends[0], ends[1]); assert_close(ends[1], ends[2])
