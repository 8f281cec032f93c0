"""Transforms with a draw for each image, soft targets, dropout, averaged predictions:
properties over random shapes, uniform coverage, and what must stay as it was."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from nntrain.augment import AugmentCB
from nntrain.erase import RandomCopy, RandomErase
from nntrain.transforms import ImageTransform, PerImage, RandomCrop, RandomFlip, black
from nntrain.dropout import Dropout, Dropout2d
from nntrain.ensembles import ensemble, mean_predictions, tta
from nntrain.predict import get_preds
from nntrain.soft_targets import (CutMixCB, MixUpCB, cutmix, mix_targets, mixup,
                                  smooth_labels)
from nntrain.accumulate import GradientAccumulationCB
from nntrain.average import WeightAveragingCB
from nntrain.clip import GradientClipCB
from nntrain.precision import MixedPrecisionCB
from nntrain.checkpoint import CheckpointCB
from nntrain.data import DataLoaders
from nntrain.prepare import DeviceCB, NormalizeCB
from nntrain.callback import Callback
from nntrain.lr_finder import lr_find
from nntrain.learner import Learner
from nntrain.metrics import Accuracy, MetricsCB
from nntrain.history import RecorderCB

quick = settings(max_examples=25, deadline=None)
shapes = st.tuples(
    st.integers(1, 9), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**31)
TRANSFORMS = {
    'flip': RandomFlip,
    'crop': lambda generator=None: RandomCrop(2, generator=generator),
    'erase': lambda generator=None: RandomErase(1.0, generator=generator),
    'erase with a colour': lambda generator=None: RandomErase(
        1.0, fill=0, generator=generator),
    'copy': lambda generator=None: RandomCopy(1.0, share=0.4, generator=generator),
}
DEVICES = [
    'cpu',
    pytest.param(
        'cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
    ),
]


def seeded(seed, device='cpu'): return torch.Generator(device).manual_seed(seed)


def pictures(shape, seed=0, byte=False):
    x = torch.rand(shape, generator=seeded(seed))
    return (x*255).byte() if byte else x


def chi2_ok(counts, expected):
    """Within five standard deviations of the chi-square distribution's mean (degrees of
    freedom: one less than the counts)"""
    dof = counts.numel() - 1
    return abs(
        ((counts - expected) ** 2 / expected).sum().item() - dof
    ) < 5 * math.sqrt(2 * dof)


# ---- every transform -----------------------------------------------------------------

@pytest.mark.parametrize('make', TRANSFORMS.values(), ids=TRANSFORMS)
@given(shape=shapes, seed=seeds, byte=st.booleans())
@quick
def test_shape_type_and_source_stay_and_seeds_repeat(make, shape, seed, byte):
    x = pictures(shape, seed, byte)
    kept = x.clone()
    first, again = make(generator=seeded(seed))(x), make(generator=seeded(seed))(x)
    assert (
        first.shape == x.shape and first.dtype == x.dtype
        and first.data_ptr() != x.data_ptr())
    assert torch.equal(x, kept) and torch.equal(first, again)
    torch.manual_seed(seed); from_global = make()(x)
    torch.manual_seed(seed); assert torch.equal(from_global, make()(x))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('make', TRANSFORMS.values(), ids=TRANSFORMS)
def test_every_image_has_its_own_draw_on_its_device(make, device):
    x = pictures((1, 2, 12, 10)).repeat(64, 1, 1, 1).to(device)
    # a generator of the CPU works for images anywhere
    out = make(generator=seeded(0))(x)
    assert_close(out.cpu(), make(generator=seeded(0))(x.cpu()), rtol=0, atol=0)
    assert out.device == x.device and len(out.unique(dim=0)) >= 2 + 10 * (
        make is not RandomFlip)
    assert make(generator=seeded(0, device))(x).device == x.device


@pytest.mark.parametrize('make', TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_layout_of_the_memory_does_not_matter(make):
    x = pictures((6, 3, 8, 8))
    assert_close(
        make(generator=seeded(1))(x.to(memory_format=torch.channels_last)),
        make(generator=seeded(1))(x)) if make is not TRANSFORMS['erase'] else None
    half = make(generator=seeded(1))(x.half())
    assert half.dtype == torch.float16


@pytest.mark.parametrize('make', TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(
    'bad',
    [
        torch.rand(28, 28), torch.rand(1, 28, 28), torch.rand(1, 1, 1, 1, 1),
        torch.zeros(2, 1, 4, 4, dtype=torch.long), [1, 2]],
    ids=lambda bad: str(getattr(bad, 'shape', bad)),
)
def test_what_is_no_batch_of_images_is_refused(make, bad):
    with pytest.raises(ValueError, match='wants a batch of images'): make()(bad)


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: RandomFlip(-0.1), r'p must lie in \[0, 1\], got -0.1'),
        (lambda: RandomFlip(float('nan')), 'p must'),
        (lambda: RandomFlip('a'), 'p must'),
        (lambda: RandomFlip(True), 'p must'),
        (lambda: RandomErase(p=2), 'p must'),
        (lambda: RandomErase(share=0), 'share must be a finite number above 0'),
        (lambda: RandomErase(max_num=1.5), 'max_num must'),
        (lambda: RandomErase(fill=None), 'fill must'),
        (lambda: RandomErase(fill='noise'), "fill must be 'pixels', a number"),
        (lambda: RandomCopy(share=1.1), 'share must'),
        (lambda: RandomCrop(1.5), 'padding must'),
        (lambda: RandomCrop(size=(1, 2, 3)), 'size must'),
        (lambda: RandomCrop(-1), 'padding must'),
        (lambda: RandomCrop(size=0), 'size must'),
        (lambda: MixUpCB(0.0), 'alpha must'),
        (lambda: CutMixCB(float('inf')), 'alpha must'),
        (lambda: MixUpCB(None), 'alpha must'),
        (lambda: Dropout(1.0), r'p must lie in \[0, 1\), got 1.0'),
        (lambda: Dropout(-0.1), 'p must'),
        (lambda: Dropout2d(2), 'p must'),
        (lambda: black(0.0, 0.0), 'std must'),
        (lambda: smooth_labels(torch.tensor([0, 3]), 3), 'must lie in 0'),
        (lambda: smooth_labels(torch.rand(3), 4), 'targets must be class numbers'),
        (
            lambda: mixup(
                torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.tensor([1, 0]),
                torch.tensor([0.6, 0.6])),
            'mixup blends float images, got torch.uint8'),
        (lambda: smooth_labels(torch.tensor([0]), 3, -0.1), 'eps must'),
        (
            lambda: RandomCrop(0, size=5)(torch.rand(2, 1, 4, 9)),
            'does not fit into 4×9'),
        (
            lambda: RandomCrop(1, fill=(0, 1))(torch.rand(2, 3, 4, 4)),
            'one for each of 3 channels'),
        (
            lambda: RandomErase(1.0, fill=-1)(
                torch.zeros(2, 1, 4, 4, dtype=torch.uint8)),
            'bytes reach',
        ),
        (
            lambda: RandomCrop(1, fill=256)(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)),
            'bytes reach'),
        (lambda: mean_predictions([]), 'no predictions'),
        (lambda: mean_predictions([torch.rand(3)]), 'one shape'),
        (lambda: mean_predictions([torch.rand(2, 2)], 'max'), 'of must be'),
        (lambda: ensemble([]), 'at least one'),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.parametrize(
    'make',
    [lambda: AugmentCB(RandomFlip), lambda: AugmentCB(3), lambda: PerImage(nn.ReLU)])
def test_no_transform(make):
    with pytest.raises(TypeError, match='is not a transform'): make()


def test_what_is_drawn_never_or_always():
    x = torch.arange(1., 31.).view(5, 1, 2, 3)
    assert torch.equal(RandomFlip(1.)(x), x.flip(-1))
    for still in RandomFlip(0.), RandomErase(0., fill=9), RandomCopy(0.), RandomCrop(0):
        assert torch.equal(still(x), x), still


def test_a_transform_of_ones_own_draws_from_its_generator():
    class Darker(ImageTransform):
        def apply(self, x): return x*self.uniform(x, len(x), 1, 1, 1)
    x = torch.ones(5, 1, 2, 3)
    drawn = torch.rand(5, 1, 1, 1, generator=seeded(7))
    assert torch.equal(Darker(seeded(7))(x), x*drawn)
    drawn = torch.randint(1, 5, (50,), generator=seeded(7))  # both ends may come
    assert torch.equal(Darker(seeded(7)).whole(x, 1, 4, 50), drawn)
    assert set(drawn.tolist()) == {1, 2, 3, 4}


# ---- crop ----------------------------------------------------------------------------

@given(
    shape=shapes, padding=st.integers(0, 3), fill=st.floats(-3, 3), seed=seeds,
    data=st.data())
@quick
def test_a_crop_is_a_window_of_the_padded_image(shape, padding, fill, seed, data):
    x = pictures(shape, seed)
    size = tuple(data.draw(st.integers(1, side + 2*padding)) for side in shape[2:])
    padded, out = (
        F.pad(x, (padding,) * 4, value=fill),
        RandomCrop(padding, size, fill, seeded(seed))(x))
    for whole, part in zip(padded, out):
        assert any(
            torch.equal(whole[:, i : i + size[0], j : j + size[1]], part)
            for i in range(whole.shape[1] - size[0] + 1)
            for j in range(whole.shape[2] - size[1] + 1))


def test_crops_are_torchvisions_and_all_equally_frequent():
    "25 windows of a picture whose nine pixels all differ"
    from torchvision.transforms import v2
    ramp = torch.arange(1., 10.).view(1, 1, 3, 3)
    draws = RandomCrop(2, generator=seeded(7))(ramp.repeat(10_000, 1, 1, 1)).flatten(1)
    kinds, counts = draws.unique(dim=0, return_counts=True)
    torch.manual_seed(0)
    theirs = [v2.RandomCrop(3, padding=2)(ramp[0]) for _ in range(500)]
    assert_close(kinds, torch.stack(theirs).flatten(1).unique(dim=0))
    assert len(kinds) == 25 and chi2_ok(counts, 400)


def test_a_transform_image_by_image_draws_anew():
    from torchvision.transforms import v2
    x = pictures((8, 1, 6, 6))
    assert_close(PerImage(lambda image: image + 1)(x), x + 1)
    torch.manual_seed(0)
    moved = PerImage(v2.RandomCrop(6, padding=4))(x[:1].repeat(8, 1, 1, 1))
    assert len(moved.unique(dim=0)) > 5  # of the 81 possible ones, instead of one
    with pytest.raises(ValueError, match='PerImage wants a batch of images'):
        PerImage(v2.RandomCrop(6, padding=4))(x[0])


def test_a_transform_image_by_image_trains_like_ours():
    drawn = []
    class Noted:
        "A transform of single images"
        def __call__(self, image): drawn.append(image.shape); return image + len(drawn)
    seen = []
    class LookCB(Callback):
        order = 5
        def before_batch(self, learn): seen.append(learn.batch[0])
    x, y = torch.zeros(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    Learner(
        net(), SimpleNamespace(train=[(x, y)], valid=[(x, y)]), F.cross_entropy,
        cbs=[AugmentCB(PerImage(Noted())), LookCB()]).fit(1)
    assert drawn == [(1, 6, 6)]*4  # in training only
    assert [t.flatten(1).unique(dim=1).flatten().tolist() for t in seen] == [
        [1., 2., 3., 4.], [0.]*4]


def test_a_rectangle_lies_in_the_picture_as_often_as_the_formula_says():
    hits = RandomErase(1., .2, 1, fill=0., generator=seeded(7))(
        torch.ones(10_000, 1, 28, 28)) == 0
    assert abs(hits.sum().item()/10_000/36 - (28/33)**2) < .02  # of a 6×6 rectangle


def test_crop_then_normalise_is_normalise_then_crop_with_black():
    mean, std = torch.tensor([.2, .5, .7]), torch.tensor([.3, .1, .5])
    x = pictures((20, 3, 6, 6))
    def normalise(x): return (x - mean.view(1, 3, 1, 1))/std.view(1, 3, 1, 1)
    assert_close(
        RandomCrop(2, fill=black(mean, std), generator=seeded(0))(normalise(x)),
        normalise(RandomCrop(2, generator=seeded(0))(x)))


def test_a_padded_or_erased_pixel_has_all_its_channels_from_one_colour():
    black_picture = torch.zeros(50, 3, 1, 1)
    moved = RandomCrop(1, fill=(1., 2., 3.))(black_picture)
    colours = {tuple(r) for r in moved[:, :, 0, 0].tolist()}
    assert colours == {(0., 0., 0.), (1., 2., 3.)}
    erased = RandomErase(1., share=1., fill=(1., 2., 3.))(black_picture)
    assert {tuple(r) for r in erased[:, :, 0, 0].tolist()} == {(1., 2., 3.)}
    # a pixel that is drawn from the batch has all its channels: red stays red
    red = torch.tensor([1., 0., 0.]).view(1, 3, 1, 1).expand(4, 3, 8, 8)
    assert_close(RandomErase(1.)(red), red)
    assert RandomErase(1.)(red[:0]).shape == (0, 3, 8, 8)


def test_erase_and_copy_draw_the_same_rectangles():
    x = torch.rand(4, 1, 28, 28)
    a = RandomErase(generator=seeded(0)).rectangles(x)
    b = RandomCopy(generator=seeded(0)).rectangles(x)
    for ours, theirs in zip(a[:4], b[:4]): assert torch.equal(ours, theirs)


def test_bytes_are_erased_with_a_byte():
    out = RandomErase(1., fill=7)(pictures((20, 1, 8, 8), byte=True))
    assert out.dtype == torch.uint8 and (out == 7).any()


# ---- coverage ------------------------------------------------------------------------

@pytest.mark.parametrize('kind', [RandomErase, RandomCopy])
@pytest.mark.parametrize('share, side', [(0.25, 12), (0.5, 7), (1.0, 5)])
def test_all_positions_of_a_rectangle_that_touch_the_image_are_equally_likely(
    kind, share, side):
    length = max(1, round(share*side))
    top, left, rows, columns, (high, wide) = kind(
        1.0, share, 1, generator=seeded(0)
    ).rectangles(torch.rand(10_000, 1, side, side))
    assert (high, wide) == (length, length)
    for start, places in ((top, rows), (left, columns)):
        counts = torch.bincount(start[:, 0] + length - 1, minlength=side + length - 1)
        assert len(counts) == side + length - 1 and chi2_ok(counts, 10_000/len(counts))
        # the same for every row
        q = length/(side + length - 1)
        assert (places[:, 0].float().mean(0) - q).abs().max() < 5 * math.sqrt(
            q * (1 - q) / 10_000)


def test_every_pixel_is_erased_equally_often():
    hits = (
        RandomErase(1.0, share=0.01, max_num=1, fill=0.0, generator=seeded(0))(
            torch.ones(10_000, 1, 12, 12))
        == 0
    ).sum((0, 1))
    assert hits.sum() == 10_000 and chi2_ok(hits, 10_000/144)


def test_p_and_the_number_of_rectangles():
    *_, rows, _, _ = RandomErase(0.8, max_num=4, generator=seeded(0)).rectangles(
        torch.rand(10_000, 1, 5, 5))
    counts = torch.bincount(rows.any(-1).sum(1), minlength=5)
    # 0, 1, 2, 3 and 4 of them: as in miniai
    assert chi2_ok(counts, 2000)


@given(shape=shapes, seed=seeds)
@quick
def test_erase_with_pixels_takes_pixels_of_the_batch_and_copy_those_of_the_image(
    shape, seed):
    # all different
    x = torch.randperm(math.prod(shape), generator=seeded(seed)).float().view(shape)
    assert torch.isin(RandomErase(1., generator=seeded(seed))(x), x).all()
    out = RandomCopy(1., share=.5, generator=seeded(seed))(x)
    for image, before in zip(out.flatten(1), x.flatten(1)):
        assert torch.isin(image, before).all()
    # channels stay apart
    assert torch.isin(out[:, 0].contiguous(), x[:, 0].contiguous()).all()


def test_copied_rectangles_move_as_a_whole():
    side, x = 10, torch.arange(100.).view(1, 1, 10, 10).repeat(500, 1, 1, 1)
    top, left, rows, columns, (high, wide) = RandomCopy(
        1.0, share=0.3, max_num=1, generator=seeded(3)).rectangles(x)
    out = RandomCopy(1., share=.3, max_num=1, generator=seeded(3))(x)
    hit = rows[:, 0, :, None] & columns[:, 0, None]
    assert torch.equal(out[:, 0][~hit], x[:, 0][~hit])
    offsets = (out - x)[:, 0]
    for image, where in zip(offsets, hit): assert len(image[where].unique()) == 1
    came_from = out[:, 0][hit].long()
    assert came_from.min() >= 0 and came_from.max() < side*side


# ---- labels --------------------------------------------------------------------------

@given(n=st.integers(1, 9), c=st.integers(2, 6), eps=st.floats(0, 1), seed=seeds)
@quick
def test_smooth_labels_are_torchs(n, c, eps, seed):
    logits, y = (
        torch.randn(n, c, generator=seeded(seed)),
        torch.randint(c, (n,), generator=seeded(seed)))
    assert_close(
        F.cross_entropy(logits, smooth_labels(y, c, eps)),
        F.cross_entropy(logits, y, label_smoothing=eps))
    assert_close(smooth_labels(y, c, eps).sum(1), torch.ones(n))


@given(
    shape=st.tuples(
        st.integers(2, 8), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9)),
    seed=seeds,
)
@quick
def test_mixed_images_and_their_targets(shape, seed):
    torch.manual_seed(seed)
    n = shape[0]
    x, y, other, lam = (
        torch.rand(shape), torch.randint(5, (n,)), torch.randperm(n), torch.rand(n))
    mixed, same = mixup(x, other, lam)
    for i in range(n): assert_close(mixed[i], lam[i]*x[i] + (1-lam[i])*x[other[i]])
    assert same is lam
    # mixing and normalising: either may come first
    assert_close((mixed - .3)/.6, mixup((x - .3)/.6, other, lam)[0])
    board = torch.arange(n).view(n, 1, 1, 1).expand(shape).float()
    cut, own = cutmix(board, other, lam)
    assert (own >= lam - 1e-6).all()
    for i in range(n):
        assert torch.isin(cut[i], torch.tensor([i, other[i]]).float()).all()
        if other[i] != i: assert_close((cut[i] == i).float().mean(), own[i])
        foreign = cut[i, 0] != i
        # a rectangle
        assert foreign.any(0).sum()*foreign.any(1).sum() == foreign.sum()
    targets = mix_targets(y, other, own, 5)
    assert_close(targets.sum(1), torch.ones(n))
    assert_close(
        F.cross_entropy(x.flatten(1)[:, :1].repeat(1, 5).cumsum(1), targets),
        (
            own
            * F.cross_entropy(
                x.flatten(1)[:, :1].repeat(1, 5).cumsum(1), y, reduction='none')
            + (1 - own)
            * F.cross_entropy(
                x.flatten(1)[:, :1].repeat(1, 5).cumsum(1), y[other], reduction='none')
        ).mean(),
    )


@given(n=st.integers(1, 6), h=st.integers(1, 12), w=st.integers(1, 12), seed=seeds)
@quick
def test_cutmix_is_the_published_rule(n, h, w, seed):
    """Yun et al. 2019: sides √(1-λ), the centre any pixel, cut at the border; then λ is
    counted"""
    x, other = (
        torch.arange(n).view(n, 1, 1, 1).expand(n, 1, h, w).float(),
        torch.arange(n).roll(1))
    lam = torch.rand(n, generator=seeded(seed))
    torch.manual_seed(seed); cut, own = cutmix(x, other, lam)
    torch.manual_seed(seed)
    rows, columns = (torch.randint(side, (n,)).tolist() for side in (h, w))
    for i, (row, column) in enumerate(zip(rows, columns)):
        halves = [int(side*math.sqrt(1-lam[i].item())/2 + 1e-6) for side in (h, w)]
        (top, bottom), (left, right) = (
            (max(0, at - half), min(side, at + half))
            for at, half, side in zip((row, column), halves, (h, w)))
        want = x[i].clone()
        want[:, top:bottom, left:right] = other[i]
        assert_close(cut[i], want)
        assert_close(own[i], torch.tensor(1 - (bottom-top)*(right-left)/(h*w)))


def test_cutmix_leaves_the_share_that_the_rule_leaves():
    """A mean foreign share of .296 on 28×28 with every λ equally likely, and at all
    shares"""
    mixing, n = CutMixCB(), 20_000
    torch.manual_seed(0)
    batch = torch.zeros(n, 1, 28, 28), torch.zeros(n, dtype=torch.long)
    mixing.before_batch(SimpleNamespace(training=True, batch=batch, yb=batch[1]))
    foreign = 1 - mixing.lam
    assert abs(foreign.mean() - .296) < 5*foreign.std()/math.sqrt(n)
    assert (
        foreign.max() > 0.8 and 0.1 < (foreign > 0.5).float().mean() < 0.2
        and (foreign < 0.05).float().mean() < 0.15)


def test_after_cutmix_the_batch_has_the_class_of_the_larger_part():
    mixing, n = CutMixCB(), 400
    torch.manual_seed(0)
    x, y = torch.arange(n).view(n, 1, 1, 1).expand(n, 1, 8, 8).float(), torch.arange(n)
    learn = SimpleNamespace(training=True, batch=dict(label=y, image=x), yb=y)
    mixing.before_batch(learn)
    counts = (
        (learn.batch['image'] == learn.batch['label'].view(n, 1, 1, 1)) .flatten(1)
        .sum(1))
    assert (counts >= 32).all() and (learn.batch['label'] != y).float().mean() > .05
    learn.preds, learn.loss_func = torch.randn(n, n), F.cross_entropy
    mixing.get_loss(learn)
    # of both classes, by their shares
    assert_close(
        learn.loss,
        F.cross_entropy(learn.preds, mix_targets(y, mixing.other, mixing.lam, n)))
    # the loader's own are untouched
    assert torch.equal(y, torch.arange(n))


@pytest.mark.parametrize(
    'keys', [('image', 'label'), ('label', 'image'), ('target', 'image')])
def test_the_images_of_a_dict_are_found_wherever_the_label_stands(keys):
    parts = dict(
        image=torch.rand(8, 1, 6, 6), label=torch.arange(8) % 3,
        target=torch.arange(8) % 3)
    batch, seen = {key: parts[key] for key in keys}, []
    class LookCB(Callback):
        order = 5
        def before_batch(self, learn): seen.append(learn.batch)
    Learner(
        net(), SimpleNamespace(train=[batch], valid=None), F.cross_entropy,
        cbs=[AugmentCB(RandomFlip(1.0)), LookCB()]).fit(1)
    assert list(seen[0]) == list(keys) and torch.equal(
        seen[0]['image'], parts['image'].flip(-1))
    label = next(key for key in keys if key != 'image')
    assert torch.equal(seen[0][label], parts[label])
    Learner(
        net(), SimpleNamespace(train=[batch], valid=None), F.cross_entropy,
        cbs=[MixUpCB(), LookCB()]).fit(1)
    assert list(seen[1]) == list(keys) and seen[1]['image'].shape == (8, 1, 6, 6)


def test_shares_follow_beta_and_the_larger_part_gives_the_class():
    mixing, x = MixUpCB(.4), torch.zeros(20_000, 1, 1, 1)
    torch.manual_seed(0)
    mixing.before_batch(
        SimpleNamespace(
            training=True, batch=(x, torch.zeros(20_000, dtype=torch.long)),
            yb=torch.zeros(20_000, dtype=torch.long)))
    assert mixing.lam.min() >= 0.5 and sorted(mixing.other.tolist()) == list(
        range(20_000))
    draws = torch.distributions.Beta(.4, .4).sample((20_000,))
    expected = torch.maximum(draws, 1-draws)
    assert abs(mixing.lam.mean() - expected.mean()) < 5 * expected.std() * math.sqrt(
        2 / 20_000)


# ---- dropout -------------------------------------------------------------------------

@pytest.mark.parametrize(
    'ours, theirs', [(Dropout, nn.Dropout), (Dropout2d, nn.Dropout2d)])
@pytest.mark.parametrize('p', [0.0, 0.1, 0.5, 0.9])
def test_dropout_is_torchs_in_distribution(ours, theirs, p):
    torch.manual_seed(0)
    x = torch.full((100, 40, 3, 3), 2.)
    a, b = ours(p)(x), theirs(p)(x)
    assert_close(a.unique(), b.unique())
    n = 4000 if ours is Dropout2d else 36_000
    for out in (a, b):
        assert abs((out == 0).float().mean().item() - p) <= 5 * math.sqrt(
            p * (1 - p) / n)
    assert ours(p).eval()(x) is x and ours(p)(x.half()).dtype == torch.float16


# ---- a transform's own generator -----------------------------------------------------

def test_the_state_of_augmentation_is_that_of_its_own_generators():
    g, x = seeded(3), torch.rand(64, 1, 1, 3)
    augment = AugmentCB(
        RandomFlip(generator=g), RandomCrop(1, generator=g), RandomFlip())
    def draw(): return augment.tfms[1](augment.tfms[0](x))
    # somewhere in the middle of a training
    draw()
    stood, then = augment.state_dict(), draw()
    assert not torch.equal(draw(), then)
    augment.load_state_dict(stood)
    # the same pictures again
    assert_close(draw(), then)
    with pytest.raises(ValueError, match='have 1 generators of their own, these'):
        AugmentCB(RandomFlip()).load_state_dict(stood)


def test_two_callbacks_cannot_both_mix():
    with pytest.raises(ValueError, match="have the method 'get_loss'"):
        learner(MixUpCB(), CutMixCB()).fit(1)


# ---- in the learner ------------------------------------------------------------------

def small_dls(n=40):
    torch.manual_seed(0)
    x, y = torch.rand(n, 1, 6, 6), torch.randint(3, (n,))
    return DataLoaders.from_tensors((x, y), (x, y), batch_size=8)


def net():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def learner(*cbs, dls=None):
    return Learner(
        net(), dls or small_dls(), F.cross_entropy, lr=0.05,
        cbs=[MetricsCB(Accuracy()), *cbs])


@pytest.mark.parametrize('mixing', [MixUpCB, CutMixCB])
def test_mixing_trains_beside_everything_else(mixing):
    learn = learner(
        NormalizeCB(0.5, 0.3), mixing(), AugmentCB(RandomFlip(), RandomErase()),
        MixedPrecisionCB(torch.bfloat16))
    x = learn.dls.train.x.clone()
    learn.fit(3)
    assert len(learn.history) == 3 and all(
        math.isfinite(v) for v in learn.history[-1].values())
    assert torch.equal(learn.dls.train.x, x)
    assert lr_find(learn, n_steps=8).losses
    soft = Learner(
        net(), learn.dls, lambda p, y: F.cross_entropy(p, y, label_smoothing=0.1),
        lr=0.05, cbs=[mixing()])
    soft.fit(1)


@pytest.mark.parametrize('at', [None, 5], ids=['between epochs', 'in an epoch'])
def test_an_interrupted_training_goes_on_with_the_same_pictures(at, tmp_path):
    class StopCB(Callback):
        order, watches, n_batches = 2000, True, 0
        def after_batch(self, learn):
            self.n_batches += learn.training
            if self.n_batches == 2 * len(learn.dls.train) + (at or 1):
                raise KeyboardInterrupt
    def train(*cbs):
        torch.manual_seed(1)
        own, shared = seeded(2), seeded(3)
        learn = learner(
            AugmentCB(
                RandomFlip(generator=shared), RandomCrop(1, generator=shared),
                RandomErase(generator=own), RandomCopy()),
            MixUpCB(),
            dls=small_dls(),
        )
        learn.fit(
            4, cbs=[CheckpointCB(tmp_path / f'{len(cbs)}.pt', every_batches=at), *cbs])
        return learn
    with pytest.raises(KeyboardInterrupt): train(StopCB())
    (tmp_path/'1.pt').rename(tmp_path/'0.pt')
    resumed = train()
    (tmp_path/'0.pt').unlink()
    whole = train()
    for (name, one), other in zip(
        resumed.model.state_dict().items(),
        whole.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(one, other), name
    assert [row['train_loss'] for row in resumed.history] == [
        row['train_loss'] for row in whole.history]


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(p=0.3), 'tfms of AugmentCB'),
        (dict(on_valid=True), 'on_valid of AugmentCB'),
        (dict(alpha=0.2), 'alpha of MixUpCB')],
)
def test_a_checkpoint_is_refused_where_a_number_of_a_transform_differs(
    change, said, tmp_path):
    class StopCB(Callback):
        order, watches = 2000, True
        def before_epoch(self, learn):
            if learn.epoch == 1: raise KeyboardInterrupt
    def train(*cbs, p=.5, on_valid=False, alpha=.4):
        learn = learner(
            AugmentCB(RandomFlip(p), on_valid=on_valid), MixUpCB(alpha),
            dls=small_dls(16))
        learn.fit(2, cbs=[CheckpointCB(tmp_path/'run.pt', quiet=True), *cbs])
    with pytest.raises(KeyboardInterrupt): train(StopCB())
    with pytest.raises(ValueError, match=said): train(**change)
    train()


def test_augment_and_mix_take_batches_that_are_dicts():
    batches = [dict(image=torch.rand(8, 1, 6, 6), label=torch.randint(3, (8,)))]
    seen = []
    class LookCB(Callback):
        order = 5
        def before_batch(self, learn): seen.append((learn.phase, learn.batch))
    Learner(
        net(), SimpleNamespace(train=batches, valid=batches), F.cross_entropy,
        cbs=[AugmentCB(RandomFlip(1.0)), MixUpCB(), LookCB()]).fit(1)
    assert (
        list(seen[0][1]) == ['image', 'label']
        and torch.equal(seen[1][1]['image'], batches[0]['image'])
        and torch.equal(seen[0][1]['label'], batches[0]['label']))


def test_soft_or_float_targets_cannot_be_mixed():
    batches = [(torch.rand(8, 1, 6, 6), torch.rand(8, 3))]
    with pytest.raises(ValueError, match='wants class numbers'):
        Learner(
            net(), SimpleNamespace(train=batches, valid=None), F.cross_entropy,
            cbs=[MixUpCB()]).fit(1)


def test_predictions_leave_everything_as_it_was():
    learn = learner(DeviceCB('cpu'), NormalizeCB(.5, .3), AugmentCB(RandomErase()))
    learn.fit(2)
    learn.model.train(); learn.model[2].eval()
    before, weights, epoch = (
        dict(vars(learn)), {k: v.clone() for k, v in learn.model.state_dict().items()},
        learn.dls.train.epoch)
    for dl in (None, learn.dls.train, learn.dls.valid):
        preds, targets = get_preds(learn, dl)
    assert vars(learn).keys() == before.keys() and all(
        vars(learn)[k] is before[k] for k in before)
    assert (
        learn.model.training and not learn.model[2].training
        and learn.dls.train.epoch == epoch)
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, weights[k])
    learn.model.eval()
    assert_close(preds, learn.model((learn.dls.valid.x - 0.5) / 0.3))
    assert torch.equal(targets, learn.dls.valid.y)
    class Failing(ImageTransform):
        def apply(self, x): raise RuntimeError('stop')
    with pytest.raises(RuntimeError, match='stop'): get_preds(learn, tfms=[Failing()])
    assert all(vars(learn)[k] is before[k] for k in before)


def test_predictions_can_be_asked_for_in_the_middle_of_a_training():
    def train(*cbs):
        torch.manual_seed(1)
        learn = learner(*cbs)
        learn.fit(3)
        return learn
    class AskCB(Callback):
        # so it is left out of its own question
        watches = True
        def __init__(self): self.accuracies = []
        def after_epoch(self, learn):
            preds, targets = tta(learn)
            self.accuracies.append((preds.argmax(1) == targets).float().mean().item())
    asking = AskCB()
    with_, without = train(asking), train()
    assert len(asking.accuracies) == 3 and [
        row['valid_accuracy'] for row in with_.history
    ] == [row['valid_accuracy'] for row in without.history]


class AskCB(Callback):
    """Ask for predictions at one event; not `watches`, so it would also be asked in its
    own question"""
    def __init__(self, event, how=get_preds):
        self.how, self.n_asked, self.answers = how, 0, []
        setattr(self, event, self._ask)
    def _ask(self, learn):
        self.n_asked += 1
        assert self.n_asked < 99, 'endless'
        self.answers.append(self.how(learn))


@pytest.mark.parametrize(
    'event',
    [
        'before_fit', 'before_phase', 'before_batch', 'after_predict', 'after_loss',
        'after_backward', 'after_step', 'after_batch', 'after_epoch', 'after_fit'],
)
@pytest.mark.parametrize('how', [get_preds, tta])
def test_questions_in_the_middle_of_a_training_leave_no_trace(event, how):
    def train(*cbs):
        torch.manual_seed(1)
        dls, own = small_dls(16), seeded(5)
        scaler = torch.amp.GradScaler('cpu', init_scale=2.**6, growth_interval=3)
        learn = learner(
            AugmentCB(RandomFlip(generator=own)), GradientAccumulationCB(2),
            RecorderCB(lr=lambda learn: learn.opt.param_groups[0]['lr']),
            MixedPrecisionCB(torch.float16, scaler=scaler), GradientClipCB(1.0), *cbs,
            dls=dls)
        learn.fit(2)
        return learn
    asking = AskCB(event, how)
    asked, plain = train(asking), train()
    assert asking.n_asked and all(len(preds) == 16 for preds, _ in asking.answers)
    for (name, one), other in zip(
        asked.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert [row['train_loss'] for row in asked.history] == [
        row['train_loss'] for row in plain.history]
    for one, other in zip(asked.cbs, plain.cbs):
        for name in ('values', 'norms', 'n_skipped', 'scale'):
            assert getattr(one, name, None) == getattr(other, name, None), (one, name)
    assert (asked.n_taken, asked.n_steps) == (plain.n_taken, plain.n_steps)


def test_predictions_after_a_fit_leave_its_records_and_gradients():
    clip, recorder = GradientClipCB(1.), RecorderCB()
    learn = learner(
        clip,
        recorder,
        MixedPrecisionCB(
            torch.float16, scaler=torch.amp.GradScaler('cpu', init_scale=2.0**4)))
    learn.fit(2)
    for p in learn.model.parameters(): p.grad = torch.ones_like(p)
    losses, norms, history = (
        list(recorder.values['loss']), list(clip.norms), copy.deepcopy(learn.history))
    own = seeded(1)
    loader = small_dls().train
    epoch = loader.epoch
    for ask in (
        get_preds,
        tta,
        lambda learn: ensemble([learn, learn], [RandomErase(generator=own)]),
        lambda learn: get_preds(learn, loader),
    ):
        ask(learn)
    assert (
        recorder.values['loss'] == losses and clip.norms == norms and losses and norms)
    assert learn.history == history and loader.epoch == epoch
    assert all(
        torch.equal(p.grad, torch.ones_like(p)) for p in learn.model.parameters())


def test_predictions_use_the_weights_that_were_validated():
    averaging = WeightAveragingCB(.9)
    learn = learner(averaging)
    learn.fit(2)
    def loss(preds, targets): return F.cross_entropy(preds, targets).item()
    valid_loss = learn.history[-1]['valid_loss']
    assert abs(loss(*get_preds(learn)) - valid_loss) < 1e-5
    assert (
        abs(loss(*tta(learn, tfms=())) - valid_loss) < 1e-5
        and abs(loss(*ensemble([learn, learn])) - valid_loss) < 1e-5)
    learn.cbs = [cb for cb in learn.cbs if cb is not averaging]
    # the trained weights are still in the model
    assert abs(loss(*get_preds(learn)) - valid_loss) > 1e-4
    asking = AskCB('after_epoch')  # an average that was given to `fit`
    learn.fit(2, cbs=[WeightAveragingCB(.9), asking])
    assert abs(loss(*asking.answers[-1]) - learn.history[-1]['valid_loss']) < 1e-5


def test_predictions_under_autocast_use_the_weights_of_the_average():
    """Autocast keeps 16-bit copies of weights: those of the training must not answer
    for the average, nor the other way round"""
    asked = []
    class CompareCB(Callback):
        order = 50
        def after_step(self, learn):
            if learn.iter == 4:
                asked.append(
                    (get_preds(learn)[0], copy.deepcopy(averaging.average.mean)))
    averaging = WeightAveragingCB(.5)
    learn = learner(MixedPrecisionCB(torch.bfloat16), averaging, CompareCB())
    learn.fit(1)
    (preds, means), other = asked[0], net().eval()
    with torch.no_grad():
        for t, mean in zip(
            [t for t in other.state_dict().values() if t.is_floating_point()],
            means,
            strict=True,
        ):
            t.copy_(mean)
        want = other(learn.dls.valid.x)
    assert_close(preds, want, rtol=.05, atol=.02)


@pytest.mark.parametrize(
    'kind',
    [
        lambda x: [x[:20], x[20:]], lambda x: [(x[:20],), [x[20:]]],
        lambda x: [dict(image=x[:20]), dict(image=x[20:])],
        lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 7),
        lambda x: torch.utils.data.DataLoader(x, 7)],
)
def test_predictions_of_a_loader_without_labels(kind):
    learn = learner(
        DeviceCB('cpu'), NormalizeCB(0.5, 0.3), MixUpCB(), AugmentCB(RandomFlip()))
    learn.fit(1)
    x, want = learn.dls.valid.x, get_preds(learn)[0]
    preds, targets = get_preds(learn, kind(x))
    assert targets is None
    assert_close(preds, want)
    log_probs, targets = tta(learn, dl=kind(x))
    assert targets is None and log_probs.shape == want.shape


def test_predictions_with_a_callback_that_needs_others():
    class DoubleCB(Callback):
        "Acts on the inputs, and reads the metrics after each epoch"
        needs = (MetricsCB,)
        def before_batch(self, learn):
            learn.batch = (2 * learn.batch[0], *learn.batch[1:])
        def after_epoch(self, learn):
            self.seen = learn.history[-1]['valid_loss'] if learn.history else None
    learn = learner(DoubleCB())
    learn.fit(1)
    learn.model.eval()
    assert_close(get_preds(learn)[0], learn.model(2*learn.dls.valid.x))


def test_what_cannot_be_predicted_is_said_in_words():
    learn = learner()
    learn.dls = SimpleNamespace(train=learn.dls.train, valid=None)
    for ask in get_preds, tta, lambda learn: ensemble([learn]):
        with pytest.raises(ValueError, match='no validation loader: say which'):
            ask(learn)
    class Two(nn.Module):
        def forward(self, x): return x, x
    with pytest.raises(
        TypeError, match='predictions must be a tensor to be put together, got a tuple'
    ):
        get_preds(Learner(Two(), small_dls(), F.cross_entropy))


def test_settings_show_transforms_with_their_numbers_and_phases():
    for made, want in (
        (
            AugmentCB(RandomFlip(0.3), RandomCrop(1), on_valid=True),
            'AugmentCB(RandomFlip(p=0.3), RandomCrop(padding=1, size=None, fill=0.0), '
            'on_valid=True)'),
        (
            AugmentCB(RandomErase(0.5), on_train=False),
            "AugmentCB(RandomErase(p=0.5, share=0.2, max_num=4, fill='pixels'), "
            "on_train=False)"),
        (AugmentCB(), 'AugmentCB()'),
    ):
        assert repr(made) == want
        assert made.settings() == dict(
            tfms=made.tfms, on_train=made.on_train, on_valid=made.on_valid)
    assert (
        MixUpCB(0.3).settings() == dict(alpha=0.3)
        and CutMixCB().settings() == dict(alpha=1.0)
        and repr(CutMixCB(0.5)) == 'CutMixCB(alpha=0.5)')


@given(n=st.integers(1, 5), c=st.integers(2, 5), k=st.integers(1, 4), seed=seeds)
@quick
def test_a_mean_of_predictions_is_a_distribution_and_no_worse_than_the_mean_loss(
    n, c, k, seed):
    g = seeded(seed)
    preds, y = (
        [3 * torch.randn(n, c, generator=g) for _ in range(k)],
        torch.randint(c, (n,), generator=g))
    for of in ('probs', 'logits'):
        mean = mean_predictions(preds, of)
        assert_close(mean.exp().sum(1), torch.ones(n))
        assert (
            F.cross_entropy(mean, y)
            <= torch.stack([F.cross_entropy(p, y) for p in preds]).mean() + 1e-5)
        assert_close(mean_predictions(preds[:1], of), preds[0].log_softmax(1))


def test_views_draw_anew_and_orders_must_agree():
    learn = learner()
    learn.fit(1)
    one = RandomErase(1.)
    plain, a = get_preds(learn)[0], get_preds(learn, tfms=[one])[0]
    # the second view is another draw
    assert not torch.allclose(
        ensemble([learn], [one, one])[0], mean_predictions([plain, a, a]))
    with pytest.raises(ValueError, match='does not shuffle'):
        ensemble([learn], [RandomFlip()], learn.dls.train)
    assert_close(ensemble([learn, learn])[0], get_preds(learn)[0].log_softmax(1))
