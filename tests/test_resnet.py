"""ResNet blocks over the whole grid of shapes, cost against torch's counter, gradients
that reach every weight, bad input."""
import copy
import itertools
import math
import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from nntrain.blocks import conv_block
from nntrain.summary import summary
from nntrain.resnet import (
    ResBlock, ResNet, dead_weights, pool_conv, resnet, strided_conv)
from nntrain.results import result

quick = settings(max_examples=25, deadline=None)


def conv_pool(n_in, n_out, stride, norm=None):
    "An identity path of one's own: the 1×1 convolution in front of the pooling"
    return pool_conv(n_in, n_out, 1, norm) + pool_conv(n_out, n_out, stride)

class Pad(nn.Module):
    def __init__(self, n_out): super().__init__(); self.n_out = n_out
    def forward(self, x): return F.pad(x, (0, 0, 0, 0, 0, self.n_out - x.shape[1]))

def pool_pad(n_in, n_out, stride, norm=None):
    "One without parameters: channels of zeros appended, or the last ones dropped"
    return [*pool_conv(n_in, n_in, stride), Pad(n_out)]

IDENTITIES = pool_conv, strided_conv, conv_pool, pool_pad


def n_dead(model, *shape):
    return sum(mask.sum().item() for mask in dead_weights(model, shape).values())


# ---- shapes --------------------------------------------------------------------------

@pytest.mark.parametrize(
    'identity, channels, stride',
    list(itertools.product(IDENTITIES, [(3, 3), (3, 5), (5, 3)], [1, 2])))
@torch.no_grad()
def test_block_has_the_right_shape_at_every_size(identity, channels, stride):
    n_in, n_out = channels
    block = ResBlock(n_in, n_out, stride, identity, zero_init=False)
    for height, width in itertools.product(range(1, 10), repeat=2):
        x = torch.randn(2, n_in, height, width)
        want = 2, n_out, math.ceil(height/stride), math.ceil(width/stride)
        # nothing is broadcast
        assert block.identity(x).shape == block.convs(x).shape == block(x).shape == want
        assert_close(block.eval()(x), F.relu(block.convs(x) + block.identity(x)))
        block.train()


@pytest.mark.parametrize('identity', IDENTITIES)
def test_fresh_block_is_its_identity_path(identity):
    x = torch.randn(4, 3, 7, 5)
    for n_out, stride in itertools.product((3, 6), (1, 2)):
        block = ResBlock(3, n_out, stride, identity)
        assert_close(block(x), F.relu(block.identity(x)))
        assert not torch.allclose(
            ResBlock(3, n_out, stride, identity, zero_init=False)(x),
            F.relu(block.identity(x)))


def test_pooling_and_1x1_convolution_commute():
    paths = pool_conv, conv_pool
    pool_first, conv_first = (ResBlock(3, 6, 2, f, norm=None).double() for f in paths)
    conv_first.identity[0].load_state_dict(pool_first.identity[1].state_dict())
    conv_first.convs.load_state_dict(pool_first.convs.state_dict())
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    assert_close(pool_first(x), conv_first(x), rtol=0, atol=1e-12)


def test_where_the_shape_stays_the_identity_path_is_empty():
    for f in pool_conv, strided_conv:
        assert f(32, 32, 1, nn.BatchNorm2d) == [] and len(f(32, 64, 2)) > 0
    for wrong in 'pool_conv', None:
        with pytest.raises(TypeError, match='identity must be a function'):
            ResBlock(4, 4, identity=wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_same_on_a_gpu():
    on_cpu, x = resnet().eval(), torch.randn(4, 1, 28, 28)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        on_gpu = copy.deepcopy(on_cpu).cuda()(x.cuda()).cpu()
        assert_close(on_gpu, on_cpu(x), rtol=1e-3, atol=1e-4)
    assert n_dead(resnet().cuda(), 8, 1, 28, 28) == 0


def test_a_block_that_forgets_the_pooling_is_found_at_2x2_only_by_its_shape():
    "1×1 broadcasts: the sum raises nothing"
    block = ResBlock(4, 4, 2)
    block.identity = nn.Sequential()
    with pytest.raises(RuntimeError, match='must match'): block(torch.randn(2, 4, 4, 4))
    assert block(torch.randn(2, 4, 2, 2)).shape == (2, 4, 2, 2)  # should be 1×1


def test_behind_batchnorm_gradients_grow_by_the_derived_factor():
    "√(π/(π-1)) per layer of linear map, normalisation and ReLU, in wide layers"
    n, width, n_layers = 1024, 256, 30
    gen = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=gen)
    h, inputs = normal(n, width).requires_grad_(), []
    for _ in range(n_layers):
        inputs.append(h)
        z = h @ (normal(width, width)*(2/width)**.5)
        h = F.relu((z - z.mean(0))/z.std(0, correction=0))
    grads = torch.autograd.grad(h, inputs, normal(n, width))
    sizes = [g.square().mean().sqrt().item() for g in grads]
    per_layer = (sizes[5]/sizes[25])**(1/20)
    assert abs(per_layer/math.sqrt(math.pi/(math.pi - 1)) - 1) < .02


def test_pairs_that_copy_do_so_in_training_mode_only_without_batchnorm():
    x = torch.randn(8, 4, 5, 5).relu()
    for norm in None, nn.BatchNorm2d:
        pair = nn.Sequential(*[conv_block(4, 4, stride=1, norm=norm) for _ in range(2)])
        for block in pair:
            nn.init.dirac_(block[0].weight)
            if norm is None: nn.init.zeros_(block[0].bias)
        assert_close(pair.eval()(x), x, rtol=1e-4, atol=1e-5)
        assert torch.allclose(pair.train()(x), x, atol=1e-2) == (norm is None)


def test_resnet18_without_the_stem_for_large_pictures():
    models = pytest.importorskip('torchvision.models')
    ours = resnet((64, 64, 128, 256, 512), n_blocks=2, strides=(1, 1, 2, 2, 2), n_in=3)
    def size(model): return sum(p.numel() for p in model.parameters())
    assert size(models.resnet18(num_classes=10)) - size(ours) == 64*3*(7*7 - 3*3)


# ---- the network ---------------------------------------------------------------------

nets = st.tuples(
    st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 2),
    st.integers(1, 3), st.integers(1, 4), st.sampled_from(list(IDENTITIES)), st.data())

@given(nets)
@quick
def test_cost_equals_torchs_counter_and_every_weight_learns(drawn):
    widths, n_blocks, n_in, n_classes, identity, data = drawn
    strides = data.draw(
        st.lists(st.sampled_from([1, 2]), min_size=len(widths), max_size=len(widths)))
    least = 2**strides.count(2) + 1
    height, width = (
        data.draw(st.integers(least, least + 4)),
        data.draw(st.integers(least, least + 4)))
    model = resnet(widths, n_blocks, strides, n_in, n_classes, identity=identity)
    x = torch.randn(3, n_in, height, width)
    with FlopCounterMode(display=False) as counter: out = model(x)
    assert out.shape == (3, n_classes)
    assert 2*3*summary(model, x).macs == counter.get_total_flops()
    dead = dead_weights(model, (16, n_in, height, width))
    assert not any(mask.any() for mask in dead.values()), [
        name for name, mask in dead.items() if mask.any()]
    with pytest.raises(ValueError, match='pixels a side'):
        model(torch.randn(3, n_in, least - 1, width))
    with pytest.raises(ValueError, match=f'n_in={n_in + 1}'):
        model(torch.randn(3, n_in + 1, height, width))


def test_default_network():
    model = resnet()
    cost = summary(model, torch.zeros(2, 1, 28, 28))
    assert (
        isinstance(model, ResNet) and cost.params <= 1_230_000 and cost.macs < 14e6
        and cost.exact)
    assert n_dead(model, 8, 1, 28, 28) == 0
    other = resnet((8, 16), n_blocks=3, n_in=3, n_classes=5)
    assert other(torch.zeros(2, 3, 17, 31)).shape == (2, 5)


def test_an_option_that_there_is_not_is_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'zero_gamma'"):
        resnet(zero_gamma=True)


@pytest.mark.parametrize('row, widths', [
    ('resnet-default', (16, 32, 64, 128, 256)), ('resnet-early', (32, 64, 128, 256))])
def test_rows_say_the_size_that_the_summary_counts(row, widths):
    cost = summary(resnet(widths), torch.zeros(1, 1, 28, 28))
    size = f'{cost.params:,} parameters, {cost.macs/1e6:.1f} M multiply-adds'
    assert size in result(row).note
    # no larger than the network that it is compared with
    assert '1,227,900 parameters' in result('resnet-ancestor-net').note
    assert cost.params <= 1_227_900


def test_without_skip_connections_zero_gamma_makes_all_pictures_alike():
    class Zero(nn.Module):
        def forward(self, x): return 0.
    model = resnet((8, 16, 32), strides=(2, 2, 2), zero_init=True)
    for block in model[1:3]: block.identity = Zero()
    assert not model(torch.randn(8, 1, 28, 28)).std(0).any()


def test_network_survives_copies_and_slices():
    model = resnet((4, 8), n_in=3).eval()
    x = torch.randn(2, 3, 9, 9)
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert_close(other(x), model(x))
        with pytest.raises(ValueError, match='takes'): other(x[:, :1])
    # a slice has no stem, so it checks nothing
    assert model[:2](x).shape == (2, 8, 5, 5) and model[1:2](
        torch.randn(2, 4, 5, 5)).shape == (2, 8, 3, 3)


@pytest.mark.parametrize(
    'norm, act',
    [
        (None, nn.ReLU), (nn.BatchNorm2d, nn.SiLU),
        (lambda n: nn.GroupNorm(1, n), nn.ReLU),
        (lambda n: nn.BatchNorm2d(n, affine=False), None)],
)
def test_other_norms_and_activations(norm, act):
    assert resnet((4, 8), norm=norm, act=act)(torch.randn(4, 1, 9, 9)).shape == (4, 10)


# ---- dead weights --------------------------------------------------------------------

@pytest.mark.parametrize(
    'ks, stride, size', list(itertools.product((1, 3, 5), (1, 2), range(1, 6))))
def test_dead_taps_are_those_that_never_meet_a_pixel(ks, stride, size):
    pad = ks//2
    met = torch.zeros(ks, ks, dtype=torch.bool)
    for i, j in itertools.product(range(0, size + 2*pad - ks + 1, stride), repeat=2):
        for a, b in itertools.product(range(ks), repeat=2):
            met[a, b] |= pad <= i + a < size + pad and pad <= j + b < size + pad
    dead = dead_weights(
        nn.Conv2d(2, 3, ks, stride=stride, padding=pad), (4, 2, size, size))['weight']
    assert torch.equal(dead, (~met).expand(3, 2, ks, ks))


def test_dead_weights_stay_to_the_last_bit_in_training():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    net = nn.Sequential(conv, nn.Flatten(), nn.Linear(8, 3))
    dead, before = dead_weights(conv, (4, 4, 2, 2))['weight'], conv.weight.clone()
    assert dead.sum() == 8*4*5
    opt = torch.optim.SGD(net.parameters(), lr=.05)
    for _ in range(10):
        x, y = torch.randn(32, 4, 2, 2), torch.randint(0, 3, (32,))
        F.cross_entropy(net(x), y).backward()
        opt.step(), opt.zero_grad()
    same = conv.weight == before
    assert same[dead].all() and not same[~dead].any()


def test_the_smallest_pictures_that_a_resnet_takes_leave_no_weight_dead():
    for side, k in (17, 4), (5, 2), (2, 0):
        small = resnet([4]*5, strides=[1]*(5-k) + [2]*k)
        assert n_dead(small, 8, 1, side, side) == 0
        with pytest.raises(ValueError, match='pixels a side'):
            small(torch.zeros(8, 1, side-1, side-1))


def test_dead_weights_is_not_fooled_by_shut_relus_or_zero_weights():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for p in model.parameters(): nn.init.constant_(p, -1.)
    assert n_dead(model, 16, 3) == 0 and n_dead(ResBlock(3, 3), 8, 3, 5, 5) == 0
    assert all((p == -1).all() for p in model.parameters())


def test_dead_weights_waits_for_idle_draws_in_a_row():
    """One more weight is cleared at every other draw: so no two idle draws in a row
    before the last"""
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.n_calls = nn.Parameter(torch.ones(6)), 0
        def forward(self, x):
            chosen = torch.zeros(6)
            if self.n_calls % 2 == 0: chosen[self.n_calls//2 % 6] = 1.
            self.n_calls += 1
            return x*(self.weight*chosen).sum()
    assert not dead_weights(Slow(), (4, 3), patience=2)['weight'].any()


def test_dead_weights_leaves_no_trace():
    class Counting(nn.Sequential):
        n_calls = 0
        def forward(self, x):
            self.n_calls += 1
            random.random()
            return super().forward(x)
    with warnings.catch_warnings():
        warnings.simplefilter(
            'ignore')  # deprecated, and its results cannot be deep-copied
        model = Counting(
            nn.utils.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.ReLU(),
            nn.Linear(4, 2)).eval()
    model(torch.randn(5, 3)).sum().backward()
    model[3].bias.requires_grad_(False)
    state, grads = (
        copy.deepcopy(dict(model.state_dict())),
        [p.grad.clone() for p in model.parameters()])
    drawn = torch.get_rng_state(), random.getstate(), model.n_calls
    assert n_dead(model, 16, 3) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert (
        all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
        and not model[3].bias.requires_grad)
    assert (
        torch.equal(torch.get_rng_state(), drawn[0])
        and (random.getstate(), model.n_calls) == drawn[1:])
    assert not any(m.training for m in model.modules())
    loss = model(torch.randn(5, 3)).sum()
    n_dead(model, 16, 3)
    # would fail if a weight had been written to
    loss.backward()


def test_dead_weights_leaves_out_the_frozen_and_finds_the_unused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model[1].register_parameter('spare', nn.Parameter(torch.zeros(5)))
    # it turns gradients on by itself
    with torch.no_grad(): dead = dead_weights(model, (4, 3))
    assert (
        set(dead) == {'1.weight', '1.bias', '1.spare'} and dead['1.spare'].all()
        and not dead['1.weight'].any())


# ---- bad input -----------------------------------------------------------------------

@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: ResBlock(4, 4, 3), 'stride must be 1 or 2, got 3'),
        (lambda: ResBlock(4, 4, 0), 'stride'),
        (lambda: ResBlock(4, 4, True), 'stride'),
        (lambda: ResBlock(4, 4, (2, 2)), 'stride'),
        (lambda: ResBlock(0, 4), 'n_in'),
        (lambda: dead_weights(nn.Linear(1, 1), (1, 1), 0), 'patience must be a whole'),
        (lambda: resnet(()), 'widths is empty'),
        (lambda: resnet((4, 8), strides=(1,)), 'strides must be 2 numbers'),
        (lambda: resnet((4, 8), strides=(1, 3)), '1 or 2'),
        (lambda: resnet(n_blocks=0), 'n_blocks'),
        (lambda: resnet(n_classes=0), 'n_classes'),
        (lambda: resnet((4, 0)), 'n_out'),
        (
            lambda: ResBlock(4, 4)(torch.zeros(2, 3, 8, 8)),
            'takes (N, 4, H, W), got (2, 3, 8, 8)'),
        (lambda: ResBlock(4, 4)(torch.zeros(4, 8, 8)), 'got (4, 8, 8)'),
        (lambda: resnet()(torch.zeros(1, 28, 28)), 'got (1, 28, 28)'),
        (lambda: dead_weights(nn.ReLU(), (2, 2)), 'no parameter'),
    ],
)
def test_bad_input_is_refused_with_a_reason(make, message):
    with pytest.raises(ValueError) as e: make()
    assert message in str(e.value)
