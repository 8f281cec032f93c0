"""Hooks that always let go, statistics that never wait, update ratios by hand."""
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nntrain import activation_plots
from nntrain.activations import ActivationStatsCB, UpdateRatioCB, activation_stats
from nntrain.callback import Callback
from nntrain.events import CancelBatch, CancelEpoch, CancelFit, CancelPhase
from nntrain.hooks import Hook, Hooks, find_modules
from nntrain.learner import Learner
from nntrain.lr_finder import lr_find


def n_hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules())

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


# ---- hooks -----------------------------------------------------------------------

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

def note_mean(hook, module, inputs, output): hook.mean = output.detach().mean()

def test_a_removed_hook_is_not_called():
    double = nn.Linear(1, 1, bias=False)
    with torch.no_grad(): double.weight.fill_(2.)
    hook = Hook(double, note_mean, name='double')
    double(torch.tensor([[1.], [4.]]))
    hook.remove()
    double(torch.tensor([[100.]]))
    assert hook.mean == 5
    hook = Hook(double, note_mean, backward=True)
    double(torch.tensor([[1.], [4.]])).square().sum().backward()
    assert hook.mean == 10
    # no graph, no gradient: nothing to report
    with torch.no_grad(): double(torch.ones(1, 1))
    assert hook.mean == 10
    loss = double(torch.ones(1, 1)).sum()
    hook.remove()                                # between forward and backward
    loss.backward()
    assert hook.mean == 10

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

def note(hook, module, inputs, output): hook.output = output

def test_what_is_no_hook_is_refused():
    layer = nn.Linear(1, 1)
    wrong = lambda module, inputs, output: None
    four = r'four arguments, \(hook, module, inputs, output\)'
    with pytest.raises(TypeError, match=four): Hook(layer, wrong)
    with pytest.raises(TypeError, match='needs a module'): Hook('relu1', note)
    with pytest.raises(ValueError, match='the list is empty'): Hooks([], note)
    with pytest.raises(TypeError, match='put Linear into a list'): Hooks(layer, note)
    with pytest.raises(TypeError, match='got 3'): Hooks([layer, 3], note)
    assert n_hooks(layer) == 0                             # the first one is off again
    there = "there is .'0 Linear'."
    with Hooks([layer], note) as hooks, pytest.raises(KeyError, match=there):
        hooks['head']

def test_what_is_not_found_is_said():
    model = small()
    there = 'Sequential: Sequential, 0: Conv2d, 1: BatchNorm2d'
    with pytest.raises(ValueError, match=f"no module matches 'Tanh'; there is {there}"):
        find_modules(model, nn.Tanh)
    for kind in 'relu', nn.ReLU(), (nn.ReLU, 3):
        with pytest.raises(TypeError, match='class such as nn.ReLU'):
            find_modules(model, kind)

def test_a_model_that_is_one_layer_goes_by_its_class():
    relu = nn.ReLU()                                       # it has no name inside
    assert find_modules(relu, nn.ReLU) == find_modules(relu) == {'ReLU': relu}

def test_backward_hook_on_a_layer_that_is_changed_in_place():
    "Torch's own full hook raises a RuntimeError here"
    grads, model = [], nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    with Hooks([model[0]], lambda hook, m, i, grad: grads.append(grad), backward=True):
        model(torch.ones(4, 2)).sum().backward()
    assert [g.shape for g in grads] == [(4, 3)]


# ---- statistics ------------------------------------------------------------------

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

def test_what_lies_outside_counts_in_the_outermost_bins():
    "torch.histc drops it: a map of its counts gets darker where activations explode"
    exploded = torch.tensor([[.5, -300., 40., 7e8]])
    assert torch.histc(exploded, 4, -1, 1).tolist() == [0, 0, 0, 1]
    hist = activation_stats(exploded, bins=4, range=(-1, 1))[2]
    assert hist.tolist() == [1, 0, 0, 3]

def test_weights_of_all_layers_get_the_same_share():
    "Without biases ⟨W, ∂L/∂W⟩ is the same number for each layer"
    torch.manual_seed(0)
    layers = [nn.Linear(5, 5, bias=False).double() for _ in range(4)]
    x = torch.randn(7, 5, dtype=torch.float64)
    for layer in layers: x = F.relu(layer(x))
    F.cross_entropy(x, torch.arange(7) % 5).backward()
    sums = torch.stack([(m.weight*m.weight.grad).sum() for m in layers])
    torch.testing.assert_close(sums, sums[:1].expand(4))

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

def test_what_was_seen_until_the_end_is_there():
    class EndCB(Callback):
        def __init__(self, error): self.error = error
        def after_batch(self, learn): raise self.error
    for error in CancelFit, ValueError, KeyboardInterrupt:
        stats = ActivationStatsCB(nn.Linear)
        learn = learner(stats)
        try: learn.fit(1, cbs=[EndCB(error)])
        except error: pass
        assert (n_hooks(learn.model), len(stats.means['5'])) == (0, 1)

def test_phases_and_kinds_of_modules():
    model = small()
    stats = ActivationStatsCB({'the ReLU': model[2]}, on_valid=True)
    learner(stats, model=model).fit(3)
    assert stats.stds['the ReLU'].shape == (18,)
    assert stats.starts == [0, 3, 6, 9, 12, 15]
    for modules, message in ((nn.Tanh, "no module matches 'Tanh'"),
                             ([nn.ReLU()], 'is not part of the model')):
        with pytest.raises(ValueError, match=message):
            learner(ActivationStatsCB(modules)).fit(1)
    bad = {'range must be': dict(range=(1, 1)), 'bins must be': dict(bins=0),
           'nothing to watch': dict(on_train=False)}
    for message, kw in bad.items():
        with pytest.raises(ValueError, match=message): ActivationStatsCB(**kw)

class Pair(nn.Module):                                       # as recurrent layers do
    def forward(self, x): return x, x.sum()
class Speaks(nn.Module):
    def forward(self, x): return 'hello'
class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.words, self.lin = Pair(), Speaks(), nn.Linear(64, 2)
    def forward(self, x):
        self.words(x)
        return self.lin(self.pair(x.flatten(1))[0])

def test_layers_that_give_a_tuple_or_no_tensor():
    stats = ActivationStatsCB(Pair)
    learn = learner(stats, model=Odd())
    learn.fit(1)
    # the first tensor of the tuple counts: the input itself
    want = torch.stack([x.mean() for x, _ in learn.dls.train])
    torch.testing.assert_close(stats.means['pair'], want)
    no_tensor = r'words \(Speaks\) returns no tensor but a str'
    with pytest.raises(ValueError, match=no_tensor):
        learner(ActivationStatsCB(Speaks), model=Odd()).fit(1)

def test_a_large_offset_costs_no_digits():
    "√(E[x²] − E[x]²) would lose all of them"
    far = torch.randn(16, 5, 4, 3) + 1000
    want = far.double().std(correction=0).float()
    torch.testing.assert_close(activation_stats(far)[1], want, rtol=1e-4, atol=0)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_statistics_never_wait_for_a_gpu():
    on_gpu = torch.randn(1024, 8, 14, 14, device='cuda')
    torch.cuda.set_sync_debug_mode('error')                # from now on, waiting fails
    try:
        four = activation_stats(on_gpu)
        with pytest.raises(RuntimeError): four[0].item()
    finally: torch.cuda.set_sync_debug_mode('default')
    for got, want in zip(four, activation_stats(on_gpu.cpu())):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('name', 'plot_stats plot_hists plot_dead plot_firing'.split())
def test_pictures_need_something_recorded(name):
    with pytest.raises(ValueError, match='pass this callback to fit'):
        getattr(activation_plots, name)(ActivationStatsCB())
    with pytest.raises(ValueError, match='pass this callback to fit'):
        activation_plots.plot_ratios(UpdateRatioCB())


# ---- update ratios ---------------------------------------------------------------

def test_update_ratios_are_those_of_the_weights():
    class Keep(Callback):
        order = 20
        def before_fit(self, learn): self.seen = []
        def before_batch(self, learn):
            if learn.training: self.seen.append(learn.model[0].weight.detach().clone())
    ratios, keep = UpdateRatioCB(), Keep()
    learn = learner(ratios, keep)
    learn.fit(2)
    weights = [*keep.seen, learn.model[0].weight.detach()]
    want = torch.stack([(b - a).norm()/a.norm() for a, b in zip(weights, weights[1:])])
    torch.testing.assert_close(ratios.ratios['0.weight'], want)
    assert list(ratios.ratios) == ['0.weight', '5.weight', '7.weight']   # weights only

def test_the_picture_of_ratios_has_a_guide_line():
    import matplotlib.pyplot as plt
    ratios = UpdateRatioCB()
    learner(ratios).fit(1)
    assert len(activation_plots.plot_ratios(ratios).lines) == len(ratios.ratios) + 1
    plt.close('all')

def test_update_ratios_of_what_is_wanted_and_learns():
    model = small()
    model[0].requires_grad_(False)
    ratios = UpdateRatioCB(lambda name, p: name.endswith('bias'))
    learner(ratios, model=model).fit(1)
    assert list(ratios.ratios) == ['1.bias', '5.bias', '7.bias']
    assert ratios.ratios['1.bias'][0].isinf()                # it starts at 0
    with pytest.raises(ValueError, match='no such parameter'):
        learner(UpdateRatioCB(lambda name, p: False)).fit(1)


# ---- compiled models -------------------------------------------------------------

def compiled_whole(model): return torch.compile(model, backend='eager')
def compiled_in_place(model): model.compile(backend='eager'); return model
def compiled_part(model): return nn.Sequential(torch.compile(model, backend='eager'))

@pytest.mark.parametrize('compiled', [compiled_whole, compiled_in_place, compiled_part])
def test_hooks_refuse_a_compiled_model(compiled):
    model = compiled(small())
    with pytest.raises(ValueError, match='compiled code does not call hooks'):
        find_modules(model, nn.ReLU)
    for modules in nn.ReLU, {'act': nn.ReLU()}, [nn.ReLU()]:
        with pytest.raises(ValueError, match='compiled code does not call hooks'):
            learner(ActivationStatsCB(modules), model=model).fit(1)
    assert n_hooks(model) == 0
