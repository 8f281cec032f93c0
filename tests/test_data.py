"""Properties and faults of the modules of the chapters on data and on where the
pictures come from: what they have no room for. No test here uses the network, and none
measures speed (the time limits are those that a reader is promised, with the waiting
done by a stand-in)."""
import gzip
import json
import os
import socket
import struct
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nntrain import hub
from nntrain import sources as S
from nntrain.budgets import Budget, budget, default_device, to_device
from nntrain.collate import collate, collate_tuple
from nntrain.data import DataLoaders, fashion_dls, n_batches, stratified_split
from nntrain.show import show_image, show_images
from nntrain.sources import (FASHION_CLASSES, FashionTensors, fashion_mnist,
                             fashion_tensors, read_idx, toy_fashion)
from nntrain.tensor_loader import TensorLoader, as_numbers
from nntrain.toy import draw_clothes

sizes = dict(
    n=st.integers(1, 200), bs=st.integers(1, 70), shuffle=st.booleans(),
    drop_last=st.booleans(), seed=st.one_of(st.none(), st.integers(0, 2**40)))


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    "No variables from outside, no memory of earlier answers"
    for k in ('NNTRAIN_DATA', 'NNTRAIN_BUDGET', 'IN_TEST', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(k, raising=False)
    kept = hub.hub_dataset, S._no_hub, S._warn_toy, S._tensors
    for f in kept: f.cache_clear()
    yield
    for f in kept: f.cache_clear()


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    "An empty hub cache"
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'empty')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', False)


def ids(n): return torch.arange(n)
def epoch(loader): return [b.tolist() for _,b in loader]


# ---- TensorLoader ----

@given(**sizes)
def test_every_index_once(n, bs, shuffle, drop_last, seed):
    if drop_last and n < bs: return
    loader = TensorLoader(
        ids(n), ids(n), bs, shuffle=shuffle, drop_last=drop_last, seed=seed)
    batches = epoch(loader)
    flat = sum(batches, [])
    assert len(batches)==len(loader)
    assert all(len(b)==bs for b in batches[:-1]) and 1 <= len(batches[-1]) <= bs
    assert len(set(flat))==len(flat)==(n//bs*bs if drop_last else n)
    if not drop_last: assert sorted(flat)==list(range(n))
    if not shuffle: assert flat==list(range(len(flat)))


@given(
    n=st.integers(2, 100), bs=st.integers(1, 40), seed=st.integers(0, 2**40),
    k=st.integers(0, 50))
def test_order_is_a_function_of_seed_and_epoch(n, bs, seed, k):
    a, b = [TensorLoader(ids(n), ids(n), bs, shuffle=True, seed=seed) for _ in range(2)]
    # the global generator has no say
    torch.manual_seed(k)
    for _ in range(3): torch.rand(3); last = epoch(a)
    b.epoch = 2
    assert epoch(b)==last and b.epoch==3
    assert sum(last, [])==b.order(2).tolist()


@given(bs=st.integers(1, 40), seed=st.integers(0, 1000))
def test_seeds_and_epochs_differ(bs, seed):
    orders = [
        tuple(
            TensorLoader(ids(50), ids(50), bs, shuffle=True, seed=seed + i) .order(e)
            .tolist())
        for i in range(3)
        for e in range(3)
    ]
    assert len(set(orders))==9


def test_order_without_a_seed_follows_torch():
    loader = TensorLoader(ids(50), ids(50), 7, shuffle=True)
    torch.manual_seed(3); a = epoch(loader)
    torch.manual_seed(3); b = epoch(loader)
    assert a==b!=epoch(loader)


def test_two_passes_at_once_do_not_disturb_each_other():
    loader = TensorLoader(ids(20), ids(20), 3, shuffle=True, seed=1)
    a, b = iter(loader), iter(loader)
    mixed = [(next(a)[1].tolist(), next(b)[1].tolist()) for _ in range(len(loader))]
    assert [sum(o, []) for o in zip(*mixed)] == [
        loader.order(0).tolist(), loader.order(1).tolist()]


@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize(
    'dtype', [torch.uint8, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize('norm', [{}, dict(mean=0.5, std=0.5)])
def test_batches_are_fresh_memory(shuffle, dtype, norm):
    if norm and dtype==torch.int64: return
    x, y = torch.ones(9, 2, dtype=dtype), torch.ones(9)
    loader = TensorLoader(x, y, 4, shuffle=shuffle, **norm)
    for _ in range(2):
        for xb,yb in loader: xb.zero_(); yb.zero_()
    assert x.all() and y.all() and loader.x.all() and loader.y.all()


@given(n=st.integers(1, 40), bs=st.integers(1, 20))
def test_bytes_are_scaled_like_a_division(n, bs):
    x = torch.randint(0, 256, (n,2,3), dtype=torch.uint8)
    got = torch.cat([b for b,_ in TensorLoader(x, ids(n), bs)])
    assert got.dtype==torch.float32 and torch.equal(got, x.float()/255)


def test_other_types_stay_as_they_are():
    for x in (
        torch.randn(5, 2),
        torch.randn(5, 2).double(),
        torch.randint(0, 1000, (5, 2)),
    ):
        (xb, _), = TensorLoader(x, ids(5), 8)
        assert xb.dtype==x.dtype and torch.equal(xb, x)


def test_normalisation_per_channel_and_by_a_number():
    x = torch.randint(0, 256, (6,3,4,4), dtype=torch.uint8)
    mean, std = [.1,.2,.3], [.4,.5,.6]
    (xb, _), = TensorLoader(x, ids(6), 8, mean=mean, std=std)
    torch.testing.assert_close(
        xb, (x.float() / 255 - torch.tensor(mean).view(3, 1, 1))
        / torch.tensor(std).view(3, 1, 1))
    (xb, _), = TensorLoader(x, ids(6), 8, mean=.1, std=.2)
    torch.testing.assert_close(xb, (x.float()/255-.1)/.2)


@pytest.mark.parametrize(
    'kw, text',
    [
        (dict(batch_size=0), 'at least 1, got 0'), (dict(batch_size=-3), 'got -3'),
        (dict(batch_size=2.0), 'got 2.0'), (dict(batch_size=True), 'got True'),
        (dict(batch_size='8'), "got '8'"),
        (dict(batch_size=9, drop_last=True), 'drop_last leaves no batch'),
        (dict(batch_size=2, mean=0.1), 'both mean and std'),
        (dict(batch_size=2, mean=0.1, std=[0.1, 0.0]), 'std must be positive'),
        (dict(batch_size=2, mean=0.1, std=float('nan')), 'std must be positive'),
        (dict(batch_size=2, mean=float('nan'), std=1.0), 'mean must be a finite'),
        (dict(batch_size=2, mean=0.1, std=float('inf')), 'std must be a finite number'),
        (dict(batch_size=2, mean=[0.1]*3, std=1.0), 'each of 2 channels, got'),
        (dict(batch_size=2, mean=[], std=1.0), 'each of 2 channels, got'),
        *((dict(batch_size=2, seed=seed), 'seed must be a whole number')
          for seed in ('x', 1.5, float('nan'), (1,), -1))],
)
def test_bad_arguments(kw, text):
    with pytest.raises(ValueError, match=text):
        TensorLoader(torch.zeros(4, 2, 1, 1), torch.zeros(4), **kw)


def test_bad_tensors():
    with pytest.raises(ValueError, match='no samples'):
        TensorLoader(torch.zeros(0, 2), torch.zeros(0), 2)
    with pytest.raises(ValueError, match='no samples'):
        TensorLoader(torch.tensor(1.0), torch.zeros(0), 2)
    with pytest.raises(ValueError, match='one row per sample.*4.*3'):
        TensorLoader(torch.zeros(4, 2), torch.zeros(3), 2)


def test_a_seed_of_numpy_is_a_seed():
    def order(seed):
        return TensorLoader(ids(50), ids(50), 8, shuffle=True, seed=seed).order(1)
    assert torch.equal(order(np.int64(3)), order(3))


@pytest.mark.parametrize('epoch', ['x', None, 1.5, -1])
def test_an_epoch_is_a_whole_number(epoch):
    loader = TensorLoader(ids(5), ids(5), 2, shuffle=True, seed=0)
    with pytest.raises(ValueError, match='epoch must be a whole number of at least 0'):
        loader.order(epoch)
    loader.epoch = epoch
    with pytest.raises(ValueError, match='epoch must be a whole number'): iter(loader)
    assert loader.epoch == epoch


@pytest.mark.parametrize('value', ['x', ['a']])
def test_mean_and_std_are_numbers(value):
    with pytest.raises(TypeError, match='mean must hold numbers'):
        TensorLoader(torch.zeros(4, 2), ids(4), 2, mean=value, std=1.)


# ---- DataLoaders and collate ----

def test_one_shot_iterators_are_refused():
    ok = [1]
    for bad in ((b for b in ok), iter(ok), map(str, ok), zip(ok)):
        with pytest.raises(TypeError, match='train is a one-shot'): DataLoaders(bad, ok)
        with pytest.raises(TypeError, match='test is a one-shot'):
            DataLoaders(ok, ok, bad)
    with pytest.raises(TypeError, match='valid must be a loader'): DataLoaders(ok, 3)


@pytest.mark.parametrize('bad', ['ab', torch.zeros(3, 2), list])
def test_what_only_looks_like_a_loader(bad):
    with pytest.raises(TypeError, match='train must be a loader'): DataLoaders(bad, [1])


@pytest.mark.parametrize('pair', [None, 3, 'xy', torch.zeros(4), (ids(4),), (1, 2, 3)])
def test_from_tensors_wants_pairs(pair):
    good = torch.zeros(4, 1), ids(4)
    for at in range(3):
        if at == 2 and pair is None: continue                # no test set
        args = [good]*3
        args[at] = pair
        with pytest.raises(TypeError, match=r'must be a pair \(x, y\), got') as e:
            DataLoaders.from_tensors(*args)
        assert str(e.value).startswith(('train', 'valid', 'test')[at])


@pytest.mark.parametrize('y, where', [
    ([0., float('nan')], 'label nan at index 1'),
    ([[0], [7]], r'label 7 at index \(1, 0\)')])
def test_labels_that_are_no_number_or_a_column(y, where):
    pair = torch.zeros(2, 1), torch.tensor(y)
    with pytest.raises(ValueError, match=f'train: {where} is outside the 3 classes'):
        DataLoaders.from_tensors(pair, pair, classes='abc')


def test_only_the_test_loader_may_be_left_out():
    assert DataLoaders([1], [1], None).test is None
    with pytest.raises(TypeError, match='valid must be a loader .* got NoneType'):
        DataLoaders([1], None)


@pytest.mark.parametrize(
    'names, valid, found',
    [
        (('train', 'test'), None, ('test', None)),
        (('train', 'validation'), None, ('validation', None)),
        (('train', 'validation', 'test'), None, ('validation', 'test')),
        (('train', 'validation', 'test'), 'test', ('test', None)),
        (('train', 'dev'), 'dev', ('dev', None))],
)
def test_two_or_three_splits(names, valid, found):
    sizes = {k: i+5 for i,k in enumerate(names)}
    dd = {k: [(torch.tensor(float(i)), i) for i in range(n)] for k,n in sizes.items()}
    dls = DataLoaders.from_dataset_dict(dd, 2, valid=valid)
    assert len(dls.valid.dataset)==sizes[found[0]] and dls.valid.batch_size==4
    assert (dls.test is None)==(found[1] is None)
    assert sum(epoch(dls.valid), [])==list(range(sizes[found[0]]))
    assert sorted(sum(epoch(dls.train), []))==list(range(sizes['train']))


def test_dataset_dict_faults():
    rows = [(torch.zeros(1), 0)]*3
    for dd, kw in [
        (dict(train=rows), {}),
        (dict(test=rows), {}),
        (dict(train=rows, dev=rows), {}),
        (dict(train=rows, test=rows), dict(valid='nope')),
        (dict(train=rows, test=rows), dict(valid='train')),
    ]:
        with pytest.raises(ValueError, match="need a split 'train'"):
            DataLoaders.from_dataset_dict(dd, 2, **kw)
    with pytest.raises(ValueError, match="split 'train' is empty"):
        DataLoaders.from_dataset_dict(dict(train=[], test=rows), 2)
    for bs in (0, -1, 1.5):
        with pytest.raises(ValueError, match='batch_size'):
            DataLoaders.from_dataset_dict(dict(train=rows, test=rows), bs)
    for seed in 'x', 1.5:
        with pytest.raises(ValueError, match='seed must be a whole number'):
            DataLoaders.from_dataset_dict(dict(train=rows, test=rows), 2, seed=seed)
    with pytest.raises(ValueError, match='no batch: 3 samples, batch_size 4'):
        DataLoaders.from_dataset_dict(dict(train=rows, test=rows), 4, drop_last=True)


def test_one_data_set_is_no_dict_of_splits():
    "The rows are not even looked at: they may be 60,000 files"
    class Rows:
        def __len__(self): return 3
        def __getitem__(self, i): raise AssertionError('read')
    for bad in Rows(), None, [1]:
        with pytest.raises(TypeError, match='give a dict of splits, .* got '):
            DataLoaders.from_dataset_dict(bad, 2)


@pytest.mark.parametrize('name', ['test', 'validation'])
def test_an_empty_split_goes_by_its_own_name(name):
    rows = [(torch.zeros(1), 0)]*3
    with pytest.raises(ValueError, match=f"split '{name}' is empty"):
        DataLoaders.from_dataset_dict({'train': rows, name: []}, 2)


def test_dataset_dict_of_pictures():
    dd = toy_fashion(30, 20)
    dls = DataLoaders.from_dataset_dict(dd, 8, seed=1)
    (xb, yb), *_ = dls.valid
    x, y = draw_clothes(20, [0,1])
    assert (
        torch.equal(xb, x[:16].float() / 255) and torch.equal(yb, y[:16])
        and dls.classes == FASHION_CLASSES)
    again = DataLoaders.from_dataset_dict(dd, 8, seed=1)
    assert epoch(dls.train)==epoch(again.train)
    dd['train'] = dd['train'].map(lambda r: dict(label=-1), keep_in_memory=True)
    with pytest.raises(ValueError, match='train: label -1 at index 0'):
        DataLoaders.from_dataset_dict(dd, 8)
    as_dict = DataLoaders.from_dataset_dict(dict(train=dd['test'], test=dd['test']), 4,
                                            collate_fn=collate, seed=0)
    assert set(next(iter(as_dict.train)))=={'image', 'label'}


def test_from_tensors_checks_labels_and_drops_only_in_training():
    xy = torch.zeros(10, 1), torch.arange(10)
    with pytest.raises(
        ValueError, match='valid: label 9 at index 9 is outside the 9 classes 0…8'
    ):
        DataLoaders.from_tensors(
            (xy[0][:9], xy[1][:9]), xy, batch_size=2, classes=range(9))
    dls = DataLoaders.from_tensors(
        xy, xy, xy, batch_size=4, drop_last=True, seed=1, classes=range(10),
        source='mine')
    assert (len(dls.train), len(dls.valid), len(dls.test), dls.source) == (
        2, 2, 2, 'mine')
    assert sum(epoch(dls.test), [])==list(range(10))
    with pytest.raises(ValueError, match='at least 1, got 0'):
        DataLoaders.from_tensors(xy, xy, batch_size=0)


def test_a_shuffled_validation_set_loses_the_names():
    xy = torch.arange(10), torch.arange(10) % 3
    dls = DataLoaders.from_tensors(xy, xy, batch_size=2, seed=0)
    right = sum(epoch(dls.valid), [])
    wrong = sum(epoch(TensorLoader(*xy, 4, shuffle=True, seed=0)), [])
    assert right==xy[1].tolist()!=wrong and sorted(wrong)==sorted(right)


def test_modes_of_pictures():
    from PIL import Image
    red = Image.new('RGB', (4, 2), (255, 0, 0))          # 4 wide, 2 high
    want = torch.stack([torch.ones(2, 4), torch.zeros(2, 4), torch.zeros(2, 4)])
    torch.testing.assert_close(collate([red])[0], want)
    torch.testing.assert_close(collate([red.quantize(2)])[0], want)     # a palette
    assert collate([Image.new('1', (4, 2), 1)]).equal(torch.ones(1, 1, 2, 4))
    for mode in ('I;16', 'I;16B'):                       # 13,107 of 65,535
        deep = collate([Image.new(mode, (4, 2), 13107)])
        torch.testing.assert_close(deep, torch.full((1, 1, 2, 4), .2))
    with pytest.raises(ValueError, match="picture of mode 'F'"):
        collate([Image.new('F', (4, 2))])
    with pytest.raises(ValueError, match='empty list'): collate([])


def test_collate():
    from PIL import Image
    rows = [
        dict(
            image=Image.new('RGB', (5, 4), (255, 0, 51)), label=i,
            more=(torch.ones(2), 1.0))
        for i in range(3)
    ]
    out = collate(rows)
    assert out['image'].shape == (3, 3, 4, 5) and out['image'][
        0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert out['label'].tolist() == [0, 1, 2] and [o.shape for o in out['more']] == [
        (3, 2), (3,)]
    assert isinstance(collate_tuple(rows), tuple) and collate_tuple(rows, flat=True)[
        0].shape == (3, 60)
    for rows in [(1,2),(1,)], [(1,2),(1,2,3)]:           # of different length
        with pytest.raises(ValueError): collate(rows)


@pytest.mark.parametrize(
    'names',
    [
        ('label', 'image'), ('image', 'label'), ('id', 'label', 'image'),
        ('y', 'image', 'id')],
)
def test_columns_go_by_name(names):
    "The target comes last, wherever it stands in the row"
    rows = [
        {k: dict(id=10.0, image=torch.zeros(2)).get(k, i) for k in names}
        for i in range(3)]
    batch = collate_tuple(rows)
    assert batch[-1].tolist()==[0,1,2] and len(batch)==len(names)
    target = next(k for k in names if k not in ('image', 'id'))
    assert [o.shape for o in collate_tuple(rows, keys=('image', target))]==[(3,2), (3,)]
    # a dict keeps them as they are
    assert list(collate(rows))==list(names)


def test_columns_that_cannot_be_told_apart():
    rows = [dict(label=1, labels=2, image=3)]
    with pytest.raises(
        ValueError, match="which of \\['label', 'labels'\\] is the target"
    ):
        collate_tuple(rows)
    assert [o.item() for o in collate_tuple(rows, keys=('image', 'labels'))]==[3, 2]
    with pytest.raises(ValueError, match="no column 'text': a row has"):
        collate_tuple(rows, keys=('text', 'label'))
    # no name of a target: as they are
    assert [o.item() for o in collate_tuple([dict(b=1, a=2)])]==[1, 2]
    with pytest.raises(ValueError, match='empty list'): collate_tuple([])


@pytest.mark.parametrize(
    'value, kind', [('cat', 'str'), (None, 'NoneType'), (b'cat', 'bytes'), ({1}, 'set')]
)
def test_what_is_no_number_is_named(value, kind):
    with pytest.raises(
        TypeError, match=f"values such as .* \\({kind}\\): give numbers"
    ):
        collate([dict(image=1., label=value)]*2)


def test_arrays_and_numbers_of_numpy():
    out = collate(
        [
            (np.ones((2, 3), np.float32), np.int64(i), np.zeros((), np.int16))
            for i in range(3)]
    )
    assert [(o.shape, o.dtype) for o in out] == [
        ((3, 2, 3), torch.float32), ((3,), torch.int64), ((3,), torch.int16)]


def test_what_does_not_fit_together():
    from PIL import Image
    grey, colour, large = (
        Image.new('L', (4, 4)), Image.new('RGB', (4, 4)), Image.new('RGB', (5, 4)))
    for other, shape in (grey, '(1, 4, 4)'), (large, '(3, 4, 5)'):
        with pytest.raises(ValueError, match="bring all to one mode and size") as e:
            collate([dict(image=colour), dict(image=other)])
        assert shape in str(e.value) and '(3, 4, 4)' in str(e.value)
    for make in torch.zeros, np.zeros:
        with pytest.raises(
            ValueError, match=r'tensors of different shapes, such as \(2,\) and \(3,\)'
        ):
            collate([make(2), make(3)])


@pytest.mark.parametrize('rows, error, words', [
    (None, TypeError, 'give a list of rows, got NoneType'),
    ({'a': 1}, TypeError, 'give a list of rows, got dict'),
    ([(1, 2), (1,)], ValueError, 'alike, got 1 and 2 columns'),
    ([(1,), 3], TypeError, 'alike, got tuple and int'),
    ([{'a': 1}, 3], TypeError, 'alike, got dict and int'),
    ([{'a': 1}, {'b': 1}], ValueError, r"no column 'a': a row has \['b'\]"),
    ([torch.ones(2), 1.], TypeError, 'alike, got Tensor and float'),
    ([np.ones(2), 1], TypeError, 'alike, got ndarray and int'),
    ([1, 'cat'], TypeError, r"such as 'cat' \(str\)"),
    ([np.array(['cat'])], TypeError, 'such as .*cat')])
def test_rows_that_are_not_alike(rows, error, words):
    for make in collate, collate_tuple:
        with pytest.raises(error, match=words): make(rows)


def test_pictures_and_other_things_do_not_mix():
    from PIL import Image
    for other in None, torch.ones(1, 4, 4):
        with pytest.raises(TypeError, match='alike, got Image and'):
            collate([Image.new('L', (4, 4)), other])


def test_an_array_read_backwards():
    flipped = np.arange(3.)[::-1]
    assert collate([flipped, flipped]).tolist() == [[2, 1, 0]]*2


def test_keys_are_a_list():
    with pytest.raises(ValueError, match=r"keys is a list, such as \['label'\]"):
        collate_tuple([dict(image=1, label=2)], keys='label')


def test_labels_that_are_names():
    x = torch.zeros(2, 1)
    for y in ['cat', 'dog'], np.array(['cat', 'dog']):
        with pytest.raises(TypeError, match='y must hold numbers'):
            TensorLoader(x, y, 2)
        with pytest.raises(TypeError, match='y must hold numbers'): as_numbers('y', y)
        with pytest.raises(TypeError, match='the labels must hold numbers'):
            DataLoaders.from_tensors((x, y), (x, y), classes=['cat', 'dog'])


def test_target_column_of_any_name_is_checked():
    import datasets
    features = datasets.Features(
        labels=datasets.ClassLabel(names=['a', 'b']), x=datasets.Value('float32'))
    good = datasets.Dataset.from_dict(
        dict(labels=[0, 1], x=[1.0, 2.0]), features=features)
    bad = good.map(lambda row: dict(labels=-1), keep_in_memory=True)
    dls = DataLoaders.from_dataset_dict(dict(train=good, test=good), 2)
    assert dls.classes==('a', 'b') and next(iter(dls.valid))[1].tolist()==[0, 1]
    with pytest.raises(ValueError, match='label -1 at index 0'):
        DataLoaders.from_dataset_dict(dict(train=good, test=bad), 2)
    names = datasets.Dataset.from_dict(dict(label=['a', 'b'], x=[1., 2.]))
    dls = DataLoaders.from_dataset_dict(dict(train=names, test=names), 2)
    with pytest.raises(TypeError, match='class_encode_column'): next(iter(dls.train))


class Stream(torch.utils.data.IterableDataset):
    "Samples one by one, without a length"
    def __init__(self, n): self.n = n
    def __iter__(self): return ((torch.tensor([float(i)]), i) for i in range(self.n))


def test_streams():
    dls = DataLoaders.from_dataset_dict(
        dict(train=Stream(5), valid=[(torch.zeros(1), 0)] * 3), 2)
    assert [yb.tolist() for _, yb in dls.train] == [[0, 1], [2, 3], [4]] and n_batches(
        dls.train) is None
    assert n_batches(dls.valid)==1
    dls = DataLoaders.from_dataset_dict(
        dict(train=Stream(5), valid=Stream(3)), 2, drop_last=True)
    assert [len(list(dl)) for dl in (dls.train, dls.valid)]==[2, 1]
    with pytest.raises(ValueError, match='a stream comes in its own order'):
        DataLoaders.from_dataset_dict(dict(train=Stream(5), valid=Stream(3)), 2, seed=0)


@pytest.mark.parametrize(
    'loader, n',
    [
        ([1, 2], 2), (TensorLoader(torch.zeros(5), torch.zeros(5), 2), 3),
        (torch.utils.data.DataLoader(Stream(5), 2), None), (iter([]), None)],
)
def test_length_of_any_loader(loader, n):
    assert n_batches(loader) == n


def test_validation_loses_no_sample():
    rows = [(torch.zeros(1), 0)]*7
    dls = DataLoaders.from_dataset_dict(
        dict(train=rows, valid=rows, test=rows), 2, drop_last=True)
    assert [
        sum(len(yb) for _, yb in dl) for dl in (dls.train, dls.valid, dls.test)
    ] == [6, 7, 7]


@pytest.mark.parametrize(
    'dtype', [torch.int16, torch.int64, torch.bool, torch.float64, torch.bfloat16])
def test_normalisation_of_any_type(dtype):
    x = torch.tensor([[0.], [1.]]).to(dtype)
    out, _ = next(iter(TensorLoader(x, torch.zeros(2), 2, mean=.5, std=2.)))
    assert out.tolist() == [[-0.25], [0.25]] and out.dtype == (
        dtype if dtype.is_floating_point else torch.float32)
    assert x.dtype==dtype and x.tolist()==[[0], [1]]


def test_batches_that_know_how_to_move():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    class Graph:
        def to(self, device): self.device = device; return self
    moved, graph = to_device((packed, Graph()), 'meta')
    assert (
        moved.data.device.type == 'meta' and moved.batch_sizes.device.type == 'cpu'
        and graph.device == 'meta')


@pytest.mark.parametrize(
    'sizes, n, held',
    [
        ((13, 5, 2), 4, [3, 1, 0]), ((2, 5, 13), 4, [0, 1, 3]),
        ((7, 7, 6), 4, [2, 1, 1]), ((6, 6, 8), 4, [1, 1, 2])],
)
def test_the_largest_remainders_are_rounded_up(sizes, n, held):
    y = torch.cat([torch.full((k,), c) for c, k in enumerate(sizes)])
    assert y[stratified_split(y, n)[1]].bincount(minlength=3).tolist()==held


@pytest.mark.parametrize('args, error, words', [
    (([0, 1, 0], 1.5), ValueError, 'n_valid must be from 1 to 2 for 3 samples'),
    (([0, 1, 0], '1'), ValueError, 'n_valid must be from 1 to 2 for 3 samples'),
    (([0, 1, 0], None), ValueError, 'n_valid must be from 1 to 2 for 3 samples'),
    (([0, 1, 0], True), ValueError, 'n_valid must be from 1 to 2 for 3 samples'),
    (([0, 1, 0], 1, 's'), ValueError, 'seed must be a whole number'),
    (([0, 1, 0], 1, None), ValueError, 'seed must be a whole number'),
    ((None, 1), TypeError, 'y must hold numbers, got NoneType'),
    ((['a', 'b'], 1), TypeError, 'y must hold numbers'),
    ((torch.zeros(4, 2), 1), ValueError, r'labels .* got shape \(4, 2\)'),
    ((torch.tensor(3), 1), ValueError, r'got shape \(\)'),
    (([], 1), ValueError, r'two or more labels .* got shape \(0,\)'),
    ((torch.full((4,), float('nan')), 2), ValueError, 'none of them nan')])
def test_what_cannot_be_split(args, error, words):
    with pytest.raises(error, match=words): stratified_split(*args)


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=300), st.data(), st.integers(0, 10)
)
def test_stratified_split(labels, data, seed):
    y, n = torch.tensor(labels), data.draw(st.integers(1, len(labels)-1))
    train, valid = stratified_split(y, n, seed)
    assert len(valid) == n and sorted([*train.tolist(), *valid.tolist()]) == list(
        range(len(y)))
    for c in y.unique():
        assert abs((y[valid]==c).sum().item()-(y==c).sum().item()*n/len(y)) < 1
    assert torch.equal(valid, stratified_split(y, n, seed)[1])
    for n in (0, len(y), -1):
        with pytest.raises(ValueError, match=f'from 1 to {len(y)-1} for {len(y)}'):
            stratified_split(y, n)


# ---- files ----

NAMES = list(S._MD5)


def idx(shape, body):
    return struct.pack(f'>4B{len(shape)}I', 0, 0, 8, len(shape), *shape) + body


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A small data set in the right form; the fingerprints are those of these files"
    root = tmp_path/'fashion-mnist'
    root.mkdir()
    raws = {
        f: idx((20, 28, 28), bytes(20 * 784)) if 'images' in f
        else idx((20,), bytes(range(10)) * 2) for f in NAMES}
    import hashlib
    for f,raw in raws.items(): (root/f).write_bytes(gzip.compress(raw))
    monkeypatch.setattr(
        S, '_MD5', {f: hashlib.md5(raw).hexdigest() for f, raw in raws.items()})
    monkeypatch.setenv('NNTRAIN_DATA', str(tmp_path))
    return root


def test_local_folder(folder):
    data = fashion_tensors()
    assert (
        data.source == 'local' and data['train'][0].shape == (20, 1, 28, 28)
        and data['test'][1].tolist() == list(range(10)) * 2)
    assert fashion_dls(budget='quick').source=='local'
    assert fashion_mnist()['train'].features['label'].names==list(FASHION_CLASSES)


@pytest.mark.parametrize('name', NAMES)
def test_missing_file_is_an_error_even_for_auto(folder, name):
    (folder/name).unlink()
    for source in ('auto', 'local'):
        with pytest.raises(
            FileNotFoundError, match=f'{name} not found.*NNTRAIN_DATA=FOLDER'
        ):
            fashion_tensors(source)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
    'harm, text',
    [
        (lambda b: b[:-20], 'cut short'),
        (lambda b: b[:5], 'cut short'),
        (lambda b: b'', 'damaged|not an IDX'),
        (lambda b: b'<html>no</html>', 'cut short'),
        (lambda b: gzip.compress(b'hello'), 'not an IDX file'),
        (lambda b: gzip.compress(gzip.decompress(b)[:-1]), 'header.*promises'),
        (
            lambda b: gzip.compress(gzip.decompress(b)[:-1] + b'x'),
            'has MD5 .*, expected'),
    ],
)
def test_damaged_file(folder, name, harm, text):
    (folder/name).write_bytes(harm((folder/name).read_bytes()))
    with pytest.raises(ValueError, match=f'{name} .*({text})') as e: fashion_tensors()
    assert 'download it again' in str(e.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.gz not found in .*NNTRAIN_DATA'):
        read_idx(tmp_path/'none.gz')


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.binary(max_size=30))
def test_read_idx_gives_the_tensor_or_a_clear_error(tmp_path_factory, shape, body):
    import math
    path = tmp_path_factory.getbasetemp()/'any.gz'
    path.write_bytes(gzip.compress(idx(shape, body)))
    if len(body)!=math.prod(shape):
        with pytest.raises(ValueError, match='promises'): read_idx(path)
    else:
        out = read_idx(path)
        assert out.shape==tuple(shape) and bytes(out.flatten().tolist())==body


def test_unknown_sources_and_splits():
    for f in (fashion_tensors, fashion_mnist, lambda s: fashion_dls(source=s)):
        with pytest.raises(
            ValueError,
            match="unknown source 'tarball': choose one of auto, local, hub, toy",
        ):
            f('tarball')
    with pytest.raises(ValueError, match='needs the variable NNTRAIN_DATA'):
        fashion_tensors('local')
    with pytest.raises(ValueError, match="choose 'test' or 'split'"):
        fashion_dls(valid='valid')


# ---- hub ----

def refused(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')

def hanging(monkeypatch):
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *a, **k: time.sleep(30))

def no_name(monkeypatch):
    def fail(*a, **k): raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', fail)

def error_page(monkeypatch):
    class Session:
        def get(self, *a, **k): return type('R', (), dict(status_code=403))
    monkeypatch.setattr('huggingface_hub.utils.get_session', Session)


@pytest.mark.parametrize(
    'trouble, text',
    [
        (refused, 'cannot be reached'), (hanging, 'no answer within 6 s'),
        (no_name, 'cannot be reached'), (error_page, 'status 403')],
)
def test_unreachable_hub_is_found_out_in_time(monkeypatch, no_cache, trouble, text):
    trouble(monkeypatch)
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match=f'{text}.*NNTRAIN_DATA=FOLDER'):
        fashion_mnist('hub')
    assert time.perf_counter()-start < 10


def test_auto_falls_back_once_with_a_reason(monkeypatch, no_cache):
    refused(monkeypatch)
    with pytest.warns(
        UserWarning,
        match='toy_fashion.*127.0.0.1:9.*cannot be reached.*NNTRAIN_DATA=FOLDER',
    ):
        data = fashion_tensors()
    assert data.source=='toy'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (
            fashion_dls(budget='short').source == 'toy')  # neither asked nor told again


def test_refused_proxy(monkeypatch, tmp_path):
    "In a process of its own, since clients read the proxy variables once"
    code = (
        "import time, warnings; from nntrain.data import fashion_tensors\n"
        "t = time.perf_counter()\n"
        "with warnings.catch_warnings(record=True) as w:\n    "
        "warnings.simplefilter('always'); s = fashion_tensors().source\n"
        "print(s, time.perf_counter()-t < 12, len([o for o in w if 'toy_fashion' in "
        "str(o.message)]))")
    env = {k: v for k,v in os.environ.items() if not k.lower().endswith('_proxy')}
    env |= dict(
        HTTPS_PROXY='http://127.0.0.1:9', HTTP_PROXY='http://127.0.0.1:9',
        HF_HOME=str(tmp_path), NNTRAIN_BUDGET='short')
    out = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True,
        timeout=100)
    assert out.stdout.split()==['toy', 'True', '1'], out.stdout+out.stderr


def test_quick_budget_never_touches_the_network(monkeypatch):
    def fail(*a, **k): raise AssertionError('network')
    monkeypatch.setattr(S, 'hub_dataset', fail)
    for name in 'hub_problem', '_cached_dataset': monkeypatch.setattr(hub, name, fail)
    with pytest.warns(UserWarning, match='quick budget'):
        assert fashion_dls(budget='quick').source == 'toy'
    monkeypatch.setenv('IN_TEST', '1')
    assert fashion_tensors().source=='toy'


def test_offline_mode_says_so(monkeypatch, no_cache):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(ConnectionError, match='offline mode is on'):
        fashion_mnist('hub')


@pytest.fixture
def filled_cache(monkeypatch, tmp_path):
    "A hub cache as `load_dataset` leaves it, with a small data set in it"
    import datasets
    want = toy_fashion(40, 20, seed=5)
    for k,ds in want.items(): ds.to_parquet(tmp_path/f'{k}.parquet')
    cache = tmp_path/'cache'
    datasets.load_dataset(
        'parquet', data_files={k: str(tmp_path / f'{k}.parquet') for k in want},
        cache_dir=str(cache))
    made, = (cache/'parquet').glob('*/*/*/dataset_info.json')
    goal = cache/'zalando-datasets___fashion_mnist'/'fashion_mnist'/'0.0.0'/'abc'
    goal.parent.mkdir(parents=True)
    made.parent.rename(goal)
    for f in goal.glob('parquet-*.arrow'):
        f.rename(goal / f.name.replace('parquet-', 'fashion_mnist-'))
    info = json.loads(
        (goal / 'dataset_info.json').read_text().replace('"parquet"', '"fashion_mnist"')
    )
    (goal / 'dataset_info.json').write_text(
        json.dumps(info | dict(config_name='fashion_mnist')))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(cache))
    return want


@pytest.mark.parametrize('trouble', [refused, no_name, None])
def test_a_filled_cache_needs_no_network(monkeypatch, filled_cache, trouble):
    import datasets
    def fail(*a): raise AssertionError('asked the network')
    if trouble: trouble(monkeypatch)
    monkeypatch.setattr(hub, 'hub_problem', fail)
    before = datasets.config.HF_HUB_OFFLINE
    data = fashion_tensors()
    assert data.source=='hub' and datasets.config.HF_HUB_OFFLINE==before
    x, y = draw_clothes(40, [5,0])
    assert torch.equal(data['train'][0], x) and torch.equal(data['train'][1], y)
    assert len(fashion_mnist('hub')['test'])==20


# ---- toy, budget, devices, pictures, import ----

@settings(max_examples=10, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**31))
def test_toy(n, seed):
    x, y = draw_clothes(n, seed)
    assert x.shape==(n,1,28,28) and x.dtype==torch.uint8 and y.dtype==torch.int64
    assert torch.equal(x, draw_clothes(n, seed)[0])
    # no empty picture
    assert x.flatten(1).amax(1).min() > 40
    counts = y.bincount(minlength=10)
    assert counts.max()-counts.min() <= 1


def test_toy_train_and_test_share_no_picture():
    data = FashionTensors('toy')
    as_set = [{p.numpy().tobytes() for p in data[k][0]} for k in ('train','test')]
    assert not as_set[0] & as_set[1]


@pytest.mark.parametrize(
    'env, name',
    [
        ({}, 'full' if torch.cuda.is_available() else 'short'),
        (dict(IN_TEST='1'), 'quick'),
        (dict(IN_TEST='1', NNTRAIN_BUDGET='full'), 'full'),
        (dict(NNTRAIN_BUDGET='quick'), 'quick')],
)
def test_budget_resolution(monkeypatch, env, name):
    for k,v in env.items(): monkeypatch.setenv(k, v)
    assert budget().name==name and budget('short').name=='short'


def test_budget_faults(monkeypatch):
    with pytest.raises(ValueError, match='quick, short, full'): budget('huge')
    monkeypatch.setenv('NNTRAIN_BUDGET', 'fast')
    with pytest.raises(ValueError, match="'fast'.*NNTRAIN_BUDGET"):
        fashion_dls(source='toy')
    with pytest.raises(AttributeError): budget('quick').name = 'full'


def test_announce(capsys):
    calls = []
    assert budget('full').announce(lambda: calls.append(1), 10, 'nothing') < 1
    assert (
        len(calls) == 6
        and f'full budget, {default_device().type}: nothing takes under a second'
        in capsys.readouterr().out)
    calls.clear()
    budget('quick').announce(lambda: calls.append(1), 10)
    assert len(calls) == 1   # a chapter of four sections waits four times


def test_the_seed_sets_the_order_only():
    b = Budget('mine', n_train=100, n_valid=30)
    one, other = (fashion_dls(budget=b, source='toy', seed=s).train for s in (0, 1))
    assert one.y.bincount().tolist() == [10]*10                      # stratified
    assert torch.equal(one.x, other.x)
    assert not torch.equal(one.order(0), other.order(0))


def test_fashion_dls_sizes():
    b = Budget('mine', n_train=100, n_valid=30)
    dls = fashion_dls(
        batch_size=16, valid='split', source='toy', budget=b, device='cpu', seed=3)
    assert [o.n for o in (dls.train, dls.valid, dls.test)]==[100, 30, 30]
    assert dls.train.y.bincount().tolist() == [10] * 10 and (
        dls.train.batch_size, dls.valid.batch_size) == (16, 32)
    quick = fashion_dls(valid='split', budget='quick', source='toy')
    assert [o.n for o in (quick.train, quick.valid, quick.test)]==[2048, 512, 512]
    whole = fashion_dls(budget='full', source='toy')
    assert (whole.train.n, whole.valid.n, whole.test)==(30_000, 5_000, None)
    full = fashion_dls(valid='split', source='toy', budget='full')
    assert [o.n for o in (full.train, full.valid, full.test)]==[27_500, 2_500, 5_000]
    pictures = [{p.numpy().tobytes() for p in o.x} for o in (full.train, full.valid)]
    # nothing in both
    assert not pictures[0] & pictures[1]


def test_to_device_keeps_the_structure():
    from collections import namedtuple
    P = namedtuple('P', 'a b')
    out = to_device([P(torch.ones(1), 'x'), dict(k=(torch.ones(2), None))], 'meta')
    assert (
        isinstance(out[0], P) and out[0].b == 'x' and out[1]['k'][0].is_meta
        and out[1]['k'][1] is None)


def test_to_device_waits_where_it_must(monkeypatch):
    """Towards the CPU a copy that does not wait would give numbers that are not there
    yet"""
    original, asked = torch.Tensor.to, {}
    def noted(self, device, non_blocking=False):
        asked[str(device)] = non_blocking
        return original(self, device)
    monkeypatch.setattr(torch.Tensor, 'to', noted)
    for device in ('cpu', torch.device('cpu'), 'meta'): to_device(torch.ones(1), device)
    assert asked=={'cpu': False, 'meta': True}


def test_pictures():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    assert show_image(torch.rand(3, 5, 6, requires_grad=True)).images[
        0].get_array().shape == (5, 6, 3)
    assert len(show_images(torch.rand(7,1,4,4), titles=range(7), ncols=3).axes)==9
    with pytest.raises(ValueError, match='no pictures'): show_images([])
    plt.close('all')


def test_import_is_cheap():
    "Nothing heavy is loaded before it is needed"
    code = ("import sys, torch; had = set(sys.modules); import nntrain.data; "
            "print(*sorted(set(sys.modules)-had))")
    new = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {m.split('.')[0] for m in new} & {
        'datasets', 'torchvision', 'matplotlib', 'PIL', 'pyarrow', 'huggingface_hub',
        'pandas', 'IPython'}


# ---- careless calls ------------------------------------------------------------------

@pytest.mark.parametrize('raw', [b'', b'\0', b'\0\0\x08', b'\0\0\x08\x01'])
def test_an_idx_file_without_its_header_is_damaged(tmp_path, raw):
    (tmp_path/'i.gz').write_bytes(gzip.compress(raw))
    with pytest.raises(ValueError, match='i.gz is not an IDX file of bytes'):
        read_idx(tmp_path/'i.gz')


def test_a_budget_is_a_name_or_an_object(monkeypatch):
    monkeypatch.delenv('NNTRAIN_DATA', raising=False)
    quick = Budget('quick', n_train=5)
    assert budget(quick) is quick
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert fashion_tensors(budget='quick').source == 'toy'
    with pytest.raises(ValueError, match="unknown budget 'quik'"):
        fashion_tensors(budget='quik')


def test_pictures_of_all_kinds_are_drawn_or_told():
    show_image(torch.rand(4, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r'cannot draw shape \(2, 8, 8\)'):
        show_image(torch.rand(2, 8, 8))


@pytest.mark.parametrize('n', [-1, 2.5, None])
def test_a_number_of_clothes_is_whole(n):
    with pytest.raises(ValueError, match='n must be a whole number of at least 0'):
        draw_clothes(n, 0)


@pytest.mark.parametrize('timeout', [0, -1, float('nan'), '6'])
def test_a_time_limit_of_the_hub_is_above_zero(monkeypatch, timeout):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    with pytest.raises(ValueError, match='timeout must be a finite number above 0'):
        hub.hub_problem(timeout)
