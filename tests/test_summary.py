"""A summary that counts like torch and leaves no trace."""
import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nntrain.summary import LayerRow, Summary, layer_macs, summary, untouched


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


# ---- summary ---------------------------------------------------------------------

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

def test_macs_of_other_layers():
    x = torch.zeros(1, 4, 6, 6)
    for layer in nn.BatchNorm2d(4), nn.ReLU(): assert layer_macs(layer, (x,), x) == 0
    assert layer_macs(nn.LSTM(6, 6), (x[0],), None) is None  # of an unknown kind

def test_macs_depend_on_where_a_layer_runs():
    conv, pool, x = nn.Conv2d(8, 16, 1), nn.AvgPool2d(2), torch.zeros(1, 8, 14, 14)
    assert summary(nn.Sequential(conv, pool), x).macs == 14*14*8*16
    assert summary(nn.Sequential(pool, conv), x).macs == 7*7*8*16  # a quarter

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

def test_a_table_by_hand():
    found = Summary(
        [LayerRow('lin', 'Linear', 2, '4×3', '4×5', 20, 30),
         LayerRow('rnn', 'GRU', 1, '4×5', '4×5', 150, None)], n_samples=4, trainable=20)
    assert (found.params, found.macs, found.exact) == (170, 30, False)  # 30 + unknown
    row = '| lin | Linear (2 calls) | 4×3 | 4×5 | 20 | 30 |'
    assert found._repr_markdown_().splitlines()[2] == row
    assert '150 of 170 parameters are frozen. ?' in repr(found)

def test_rows_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU())
    found = summary(model, torch.zeros(16, 1, 28, 28))
    conv, relu = found.rows
    shapes = '16×1×28×28', '16×8×14×14'
    assert conv == LayerRow(
        '0', 'Conv2d', 1, *shapes, params=8*25 + 8, macs=14*14*8*25)
    assert relu == LayerRow('1', 'ReLU', 1, shapes[1], shapes[1], params=0, macs=0)
    assert found.exact and (found.n_samples, found.trainable) == (16, 208)

def test_user_hooks_stay():
    model, calls = small(), []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    summary(model, torch.randn(3, 1, 8, 8))
    assert n_hooks(model) == 1 and len(calls) == 1

def test_one_layer_twice_one_never_and_one_of_an_unknown_kind():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.unused = nn.Linear(4, 4), nn.Linear(4, 100)
            self.rnn = nn.GRU(4, 3, batch_first=True)
        def forward(self, x): return self.rnn(self.twice(self.twice(x)))
    odd = summary(Odd(), torch.zeros(2, 5, 4))
    rows = [(row.name, row.calls, row.params, row.macs) for row in odd.rows]
    want = [('twice', 2, 20, 2*5*16), ('rnn', 1, 81, None), ('unused', 0, 500, 0)]
    assert rows == want
    assert (odd.rows[1].output, odd.exact, odd.macs) == ('2×5×3, 1×2×3', False, 160)
    assert '≥ 160' in repr(odd) and '?' in repr(odd)

def test_frozen_weights_are_counted():
    model = small()
    model[0].weight.requires_grad_(False)
    found = summary(model, torch.randn(2, 1, 8, 8))
    assert found.params - found.trainable == 36 and '36 of ' in str(found)   # 4·1·3·3

def test_bad_batches_are_refused():
    x = torch.randn(2, 1, 8, 8)
    conv = "fails in layer '0', Conv2d.1, 4, kernel_size=.3, 3., stride=.2, 2.."
    with pytest.raises(ValueError, match=f'{conv}, which was given 2×3×8×8'):
        summary(small(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="fails in layer '0'"):
        summary(small(), x[0, 0])
    with pytest.raises(ValueError, match='cannot tell inputs from target'):
        summary(small(), dict(image=x, label=0, y=0))
    with pytest.raises(ValueError, match='run the model once'):
        summary(nn.LazyLinear(3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match='the batch is empty'): summary(small(), x[:0])


# ---- compiled models -------------------------------------------------------------

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
