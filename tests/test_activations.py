"""Hooks that always let go, statistics that never wait, and a summary that counts like
torch and leaves no trace."""
import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nntrain.activations import ActivationStatsCB, Hooks, activation_stats, find_modules
from nntrain.summary import layer_macs, summary, untouched
from nntrain.callback import Callback
from nntrain.events import CancelBatch, CancelEpoch, CancelFit, CancelPhase
from nntrain.lr_finder import lr_find
from nntrain.learner import Learner


def n_hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules())

def torch_macs(model, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(*inputs)
    return counter.get_total_flops()/2

def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(4 * 9, 3), nn.ReLU(), nn.Linear(3, 2))

class Data:
    def __init__(self, n=3, size=5):
        self.train = self.valid = [
            (torch.randn(size, 1, 8, 8), torch.randint(2, (size,))) for _ in range(n)]

def learner(*cbs, model=None):
    return Learner(model or small(), Data(), F.cross_entropy, lr=0.1, cbs=cbs)


# ---- hooks ---------------------------------------------------------------------------

class RaiseCB(Callback):
    def __init__(self, event, error):
        self.error = error
        setattr(self, event, self._raise)
    def _raise(self, learn): raise self.error

@pytest.mark.parametrize(
    'event',
    [
        'before_fit', 'before_phase', 'before_batch', 'after_predict', 'after_loss',
        'after_batch', 'after_epoch', 'cleanup_batch'],
)
@pytest.mark.parametrize(
    'error',
    [
        None, CancelFit, CancelEpoch, CancelPhase, CancelBatch, ValueError,
        KeyboardInterrupt],
)
def test_hooks_are_gone_after_any_end(event, error):
    learn = learner(ActivationStatsCB())
    cbs = [] if error is None else [RaiseCB(event, error)]
    try:
        learn.fit(2, cbs=cbs)
    # a cancel outside of its level is an error
    except (ValueError, KeyboardInterrupt, RuntimeError) + ((error,) if error else ()):
        pass
    assert n_hooks(learn.model) == 0

def test_hooks_are_gone_after_an_error_in_the_hook():
    model = small()
    learn = learner(
        ActivationStatsCB([m for m in model if isinstance(m, nn.ReLU)]), model=model)
    learn.cbs[0]._note = lambda *args: 1/0
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert n_hooks(model) == 0

def test_hooks_are_gone_when_another_callback_fails_first():
    stats = ActivationStatsCB()
    learn = learner(RaiseCB('before_fit', ValueError), stats)
    with pytest.raises(ValueError): learn.fit(1)
    assert n_hooks(learn.model) == 0
    learn.cbs = (stats,)
    learn.fit(1)
    assert n_hooks(learn.model) == 0 and len(stats.means['2']) == 3

def test_backward_hooks_see_what_torch_sees():
    model, x = small(), torch.randn(4, 1, 8, 8)
    convs, theirs = find_modules(model, (nn.Conv2d, nn.Linear)), []
    handles = [
        m.register_full_backward_hook(lambda m, gi, go: theirs.append(go[0]))
        for m in reversed(convs.values())]
    with (
        Hooks(
            convs, lambda hook, m, i, grad: setattr(hook, 'grad', grad), backward=True
        ) as hooks,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter(
            'ignore')  # newer torch warns that no inputs require gradients
        model(x).square().sum().backward()
    for handle in handles: handle.remove()
    for hook, grad in zip(hooks, reversed(theirs), strict=True):
        torch.testing.assert_close(hook.grad, grad, rtol=0, atol=0)
    assert n_hooks(model) == 0

def test_what_a_hook_returns_is_ignored():
    model, x = small().eval(), torch.randn(4, 1, 8, 8)
    want = model(x)
    with Hooks(find_modules(model), lambda *args: torch.zeros(1)):
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)

def test_keyword_inputs_are_seen():
    class Sum(nn.Module):
        def forward(self, a, b): return a + b
    with Hooks(
        [m := Sum()],
        lambda hook, module, inputs, output: setattr(hook, 'n', len(inputs)),
    ) as hooks:
        m(torch.ones(1), b=torch.ones(1))
    assert hooks[0].n == 2


# ---- statistics ----------------------------------------------------------------------

class NoSync(TorchDispatchMode):
    "Fails on whatever needs the value of a tensor in Python"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
            torch.ops.aten._to_copy,
        ):
            if (
                func.overloadpacket is not torch.ops.aten._to_copy
                or (kwargs or {}).get('device') is not None
            ):
                raise AssertionError(f'{func} waits for the device')
        return func(*args, **(kwargs or {}))

def test_statistics_never_wait():
    with NoSync(), pytest.raises(AssertionError): torch.ones(1).item()
    class Watch(Callback):
        order = -100
        def before_batch(self, learn): self.mode = NoSync(); self.mode.__enter__()
        def cleanup_batch(self, learn): self.mode.__exit__(None, None, None)
    stats = ActivationStatsCB((nn.ReLU, nn.Conv2d), on_valid=True)
    learner(stats, Watch()).fit(2)
    assert all(len(m) == 12 for m in stats.means.values())

@pytest.mark.parametrize(
    'shape, dim',
    [((7, 3), 1), ((7, 3, 4), 1), ((7, 4, 3), -1), ((5, 3, 2, 6), 1), ((7,), 1)])
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_statistics_are_right(shape, dim, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape)*3).to(dtype)
    mean, std, hist, rates = activation_stats(
        x, bins=8, range=(-2, 2), hist_samples=None, unit_dim=dim)
    y = x.double()
    torch.testing.assert_close(mean.double(), y.mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std.double(), y.std(correction=0), rtol=1e-5, atol=1e-5)
    assert hist.sum() == x.numel() and hist[0] == (y < -1.5).sum()
    units = y.reshape(-1, 1) if y.ndim == 1 else y.movedim(dim, -1).flatten(0, -2)
    torch.testing.assert_close(
        rates.double(), (units > 0).double().mean(0), rtol=1e-6, atol=1e-6)

def test_not_a_number_counts_as_silent():
    mean, std, hist, rates = activation_stats(torch.full((4, 2), float('nan')))
    assert mean.isnan() and (rates == 0).all()

def test_watching_changes_no_number():
    plain, watched = learner(), learner(ActivationStatsCB(nn.Linear))
    for learn in plain, watched:
        torch.manual_seed(3)
        learn.dls = Data()
        learn.fit(2)
    for a, b in zip(
        plain.model.state_dict().values(), watched.model.state_dict().values()
    ):
        assert torch.equal(a, b)

def test_one_module_at_two_places():
    class Shared(nn.Module):
        def __init__(self, widths):
            super().__init__()
            self.a, self.b, self.act, self.flat = (
                nn.Linear(64, widths[0]), nn.Linear(widths[0], widths[1]), nn.ReLU(),
                nn.Flatten())
        def forward(self, x): return self.act(self.b(self.act(self.a(self.flat(x)))))
    stats = ActivationStatsCB()
    learner(stats, model=Shared((3, 3))).fit(1)
    assert len(stats.means['act']) == 6                      # twice per batch
    with pytest.raises(ValueError, match='module of its own at each place'):
        learner(stats, model=Shared((4, 3))).fit(1)

def test_lr_find_leaves_the_statistics_out():
    stats = ActivationStatsCB()
    lr_find(learner(stats), n_steps=5)
    assert not stats.means


# ---- summary -------------------------------------------------------------------------

def snapshot(model):
    return (
        [t.clone() for t in model.state_dict().values()],
        [m.training for m in model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [id(t) for t in (*model.parameters(), *model.buffers())], torch.get_rng_state(),
        random.getstate(), n_hooks(model))

def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

class Noisy(nn.Module):
    "Everything that a forward pass should not do"
    def __init__(self):
        super().__init__()
        self.bn, self.w, self.drop = (
            nn.BatchNorm1d(4), nn.Parameter(torch.ones(4)), nn.Dropout())
        self.register_buffer('count', torch.zeros((), dtype=torch.long))
    def forward(self, x):
        self.count += 1
        self.bn.running_var = self.bn.running_var*2
        self.bn.train()
        self.w.mul_(2) if not torch.is_grad_enabled() else None
        return self.drop(self.bn(x))*self.w + torch.rand(()) + random.random()

@pytest.mark.parametrize('make', [small, Noisy])
@pytest.mark.parametrize('fails', [False, True])
def test_summary_leaves_everything(make, fails):
    model = make()
    x = torch.randn(6, 1, 8, 8) if make is small else torch.randn(6, 4)
    model.train()
    # gradients, running statistics, num_batches_tracked
    model(x).sum().backward()
    next(model.children()).eval()
    list(model.children())[1].train()
    wrong = torch.randn(6, 3, 8)
    before = snapshot(model)
    assert same(before, snapshot(model)) and not same(
        before, snapshot(copy.deepcopy(model)))
    if fails:
        with pytest.raises(ValueError, match='fails in layer'): summary(model, wrong)
    else: assert summary(model, x).params == sum(p.numel() for p in model.parameters())
    assert same(before, snapshot(model))

def test_summary_between_forward_and_backward():
    model, x = small().train(), torch.randn(6, 1, 8, 8)
    loss = model(x).sum()
    summary(model, x)
    # would fail if a weight had been written to
    loss.backward()

def test_summary_puts_back_what_a_module_keeps_in_attributes():
    class Keeps(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.n_calls, self.seen = 0, []
            self.register_buffer('last', torch.zeros(4), persistent=False)
        def forward(self, x):
            self.n_calls += 1
            self.seen.append(len(x))
            self.last = x[0]
            np.random.rand()
            return super().forward(x)
    model, state = Keeps(), np.random.get_state()[1].copy()
    last = model.last
    summary(model, torch.randn(3, 4))
    assert (
        model.n_calls == 0 and model.seen == [] and model.last is last
        and not last.any())
    assert (np.random.get_state()[1] == state).all()

def test_untouched_restores_on_error():
    model = small().train()
    with pytest.raises(KeyboardInterrupt), untouched(model): raise KeyboardInterrupt
    assert all(m.training for m in model.modules())

GRID = [
    (cls, stride, groups, dilation, ks, bias)
    for cls in (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
    for stride in (1, 2)
    for groups in (1, 2)
    for dilation in (1, 2)
    for ks in (1, 3)
    for bias in (False, True)
]

def test_macs_of_convolutions():
    for cls, stride, groups, dilation, ks, bias in GRID:
        layer = cls(
            4, 6, ks, stride=stride, groups=groups, dilation=dilation, bias=bias,
            padding=ks // 2)
        x = torch.randn(2, 4, *[7]*int(cls.__name__[-2]))
        assert layer_macs(layer, (x,), layer(x)) == torch_macs(layer, x), layer

@pytest.mark.parametrize('shape', [(5, 4), (5, 3, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize('bias', [False, True])
def test_macs_of_linear_layers(shape, bias):
    layer, x = nn.Linear(4, 7, bias=bias), torch.randn(shape)
    assert layer_macs(layer, (x,), layer(x)) == torch_macs(layer, x)

def conv_norm(n_in, n_out, stride, act=True):
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(n_out), nn.ReLU() if act else nn.Identity())

class OldBlock(nn.Module):
    """Residual block of the ancestor: 1×1 convolution first, then pooling; the
    convolution is there even where it is not used"""
    def __init__(self, n_in, n_out, stride=2):
        super().__init__()
        self.convs = nn.Sequential(
            conv_norm(n_in, n_out, 1), conv_norm(n_out, n_out, stride, act=False))
        self.identity_conv, self.pool, self.stride, self.same = (
            nn.Conv2d(n_in, n_out, 1), nn.AvgPool2d(2, ceil_mode=True), stride,
            n_in == n_out)
    def forward(self, x):
        shortcut = x if self.same else self.identity_conv(x)
        return F.relu(
            self.convs(x) + (shortcut if self.stride == 1 else self.pool(shortcut)))

def old_resnet():
    widths = 8, 16, 32, 64, 128, 256
    return nn.Sequential(
        OldBlock(1, 8, 1), *(OldBlock(a, b) for a, b in zip(widths, widths[1:])),
        nn.Flatten(), nn.Linear(256, 10, bias=False), nn.BatchNorm1d(10))

def test_cost_of_the_ancestors_resnet():
    model = old_resnet()
    found = summary(model, torch.randn(4, 1, 28, 28))
    assert (found.params, found.macs, found.exact) == (1_227_900, 8_821_504, True)
    assert found.macs*4 == torch_macs(model.eval(), torch.randn(4, 1, 28, 28))

def test_layer_that_never_runs():
    rows = {
        row.name: row for row in summary(OldBlock(8, 8), torch.randn(2, 8, 14, 14)).rows
    }
    assert (
        rows['identity_conv'].calls, rows['identity_conv'].params,
        rows['identity_conv'].macs) == (0, 72, 0)
    assert 'never ran' in repr(summary(OldBlock(8, 8), torch.randn(2, 8, 14, 14)))

def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    found = summary(model, torch.randn(2, 4))
    assert (found.params, found.macs, [row.params for row in found.rows]) == (
        16, 32, [16, 0])

@pytest.mark.parametrize(
    'batch',
    [
        torch.randn(3, 1, 8, 8), (torch.randn(3, 1, 8, 8), torch.zeros(3)),
        dict(image=torch.randn(3, 1, 8, 8), label=torch.zeros(3))],
)
def test_kinds_of_batches(batch):
    assert summary(small(), batch).n_samples == 3

def test_tables():
    found = summary(small(), torch.randn(3, 1, 8, 8))
    lines = repr(found).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1 and lines[0].startswith(
        'layer')  # aligned
    assert all(
        line.count('|') == 7 for line in found._repr_markdown_().splitlines()[:-2])
    assert f'{found.macs:,}' in lines[-2] and f'{found.params:,}' in lines[-2]

def test_user_hooks_stay():
    model, calls = small(), []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    summary(model, torch.randn(3, 1, 8, 8))
    assert n_hooks(model) == 1 and len(calls) == 1


# ---- compiled models -----------------------------------------------------------------

def compiled_whole(model): return torch.compile(model, backend='eager')
def compiled_in_place(model): model.compile(backend='eager'); return model
def compiled_part(model): return nn.Sequential(torch.compile(model, backend='eager'))

@pytest.mark.parametrize('compiled', [compiled_whole, compiled_in_place, compiled_part])
@pytest.mark.parametrize('used', [False, True])
def test_summary_of_a_compiled_model(compiled, used):
    x, want = torch.randn(3, 1, 8, 8), summary(small(), torch.randn(3, 1, 8, 8))
    model = compiled(small())
    if used: model.eval()(x)
    found = summary(model, x)
    assert (found.macs, found.params, found.exact, len(found.rows)) == (
        want.macs, want.params, True, len(want.rows))
    assert found.macs and not any('_orig_mod' in row.name for row in found.rows)
    with pytest.raises(ValueError, match='fails in layer'):
        summary(model, torch.randn(3, 3, 8))
    assert n_hooks(model) == 0

@pytest.mark.parametrize('compiled', [compiled_whole, compiled_in_place, compiled_part])
def test_hooks_refuse_a_compiled_model(compiled):
    model = compiled(small())
    with pytest.raises(ValueError, match='compiled code does not call hooks'):
        find_modules(model, nn.ReLU)
    for modules in nn.ReLU, {'act': nn.ReLU()}, [nn.ReLU()]:
        with pytest.raises(ValueError, match='compiled code does not call hooks'):
            learner(ActivationStatsCB(modules), model=model).fit(1)
    assert n_hooks(model) == 0
