"""Photographs: archives that nobody should trust, the cache, crops, Grad-CAM, tables"""
import io
import json
import multiprocessing
import os
import re
import tarfile
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.transforms import v2

from nntrain import (archive, imagenette, photo_cache, photo_runs, photo_tables,
                     photo_transforms, toy_photos)
from nntrain.archive import check_md5, download, read_archive, unpack_archive
from nntrain.gradcam import grad_cam, heat_in
from nntrain.imagenette import find_imagenette, photo_dls
from nntrain.kept import KeptRuns, _alone
from nntrain.lock import RunLock
from nntrain.photo_cache import cached_photos, decoded
from nntrain.photo_runs import ProgressiveCB
from nntrain.photo_transforms import (
    RandomResizedCrop, resample, resized, squared, windows_to)
from nntrain.toy_photos import ToyPhotos

KINDS = [f'kind{i}' for i in range(3)]


def as_file(picture, kind='PNG', **kwargs):
    file = io.BytesIO()
    picture.save(file, kind, **kwargs)
    return file.getvalue()

def entry(name, kind=tarfile.REGTYPE, size=0, linkname=''):
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, linkname
    return made

def pack(path, files, *more):
    with tarfile.open(path, 'w:gz') as tar:
        for name, content in files.items():
            tar.addfile(entry(name, size=len(content)), io.BytesIO(content))
        for made in more: tar.addfile(made, io.BytesIO(bytes(made.size)))
    return path

def pictures(n=6, split='train'):
    "Files of plain pictures: number i has the grey value 40·i in red"
    return {f'set/{split}/kind{i % 3}/{i}.png': as_file(
        Image.new('RGB', (20, 12), (40*i, 0, 255))) for i in range(n)}

@pytest.fixture
def good(tmp_path): return pack(tmp_path/'good.tgz', pictures())


# ---- archives ------------------------------------------------------------------------

BAD = {
    'up': entry('../x'), 'far up': entry('a/../../x'), 'absolute': entry('/x'),
    'drive': entry('C:/x'), 'backslash': entry('a\\..\\..\\x'),
    'symbolic link': entry('a', tarfile.SYMTYPE, linkname='/'),
    'hard link': entry('a', tarfile.LNKTYPE, linkname='/etc/passwd'),
    'pipe': entry('a', tarfile.FIFOTYPE), 'device': entry('a', tarfile.CHRTYPE),
    'block device': entry('a', tarfile.BLKTYPE)}

@pytest.mark.parametrize('bad', BAD.values(), ids=BAD)
def test_bad_entries_are_refused_by_name(tmp_path, bad):
    path = pack(tmp_path/'a.tgz', pictures(), bad)
    for use in partial(unpack_archive, path, tmp_path/'out'), lambda: list(
            read_archive(path)):
        with pytest.raises(ValueError, match=re.escape(repr(bad.name))): use()
    assert [p.name for p in tmp_path.iterdir()] == ['a.tgz']      # nothing is left

def test_folders_and_dots_are_fine(tmp_path):
    path = pack(tmp_path/'a.tgz', {'./a/./b': b'x'}, entry('./', tarfile.DIRTYPE),
                entry('./a', tarfile.DIRTYPE))
    assert list(read_archive(path)) == [('a/b', b'x')]

def test_a_huge_entry_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, 'LARGEST', 1000)
    path = pack(tmp_path/'a.tgz', {}, entry('a', size=1001))
    with pytest.raises(ValueError, match='1,001 bytes'): list(read_archive(path))

@pytest.mark.parametrize('lost', [1, 4, 8, 9, 100, 0.5, 0.9])
def test_a_cut_archive_is_noticed(good, lost):
    whole = good.read_bytes()
    keep = len(whole) - lost if isinstance(lost, int) else int(len(whole)*(1-lost))
    good.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match='delete it and download it again'):
        list(read_archive(good))

@pytest.mark.parametrize('content', [b'', b'<html>please log in</html>', bytes(5000)])
def test_what_is_no_archive_is_noticed(tmp_path, content):
    path = tmp_path/'a.tgz'
    path.write_bytes(content)
    with pytest.raises(ValueError, match='damaged or cut short'):
        list(read_archive(path))

def test_unpacking_needs_a_new_folder_and_files_of_one_name_each(tmp_path, good):
    assert len(list(unpack_archive(good, tmp_path/'out').rglob('*.png'))) == 6
    with pytest.raises(ValueError, match='exists'):
        unpack_archive(good, tmp_path/'out')
    twice = pack(tmp_path/'twice.tgz', {'a/b': b'x'}, entry('a/./b'))
    with pytest.raises(ValueError, match='twice'): unpack_archive(twice, tmp_path/'new')
    assert {p.name for p in tmp_path.iterdir()} == {'good.tgz', 'out', 'twice.tgz'}

def test_a_download_gets_its_name_last(tmp_path, good):
    known = {'0'*32: 'the real thing'}
    goal = tmp_path/'new'/'x.tgz'
    with pytest.raises(ValueError, match='what file:.*is not the real thing'):
        download(good.as_uri(), goal, known)
    with pytest.raises(OSError, match='cannot be reached'):
        download((tmp_path/'nothing').as_uri(), goal, known)
    assert not list(goal.parent.iterdir())
    md5 = archive.hashlib.md5(good.read_bytes()).hexdigest()
    download(good.as_uri(), goal, {md5: 'it'})
    assert check_md5(goal, {md5: 'it'}) == md5


# ---- one picture ---------------------------------------------------------------------

@pytest.mark.parametrize('mode, grey', [
    ('RGB', False), ('L', True), ('1', True), ('LA', True), ('I;16', True),
    ('P', False), ('RGBA', False)])
def test_every_mode_becomes_rgb_and_grey_is_known(mode, grey):
    picture, was_grey = decoded(as_file(Image.new(mode, (6, 4))))
    assert (picture.mode, picture.size, was_grey) == ('RGB', (6, 4), grey)

def test_a_picture_is_turned_as_its_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 6                                   # lying on its side
    turned = as_file(Image.new('RGB', (6, 4)), 'JPEG', exif=exif)
    assert decoded(turned)[0].size == (4, 6)

def test_damage_is_told_in_words(monkeypatch):
    torn = as_file(Image.fromarray(np.random.default_rng(0).integers(
        0, 255, (50, 50, 3), np.uint8)))[:3000]
    with pytest.raises(ValueError, match='truncated|broken'): decoded(torn)
    with pytest.raises(ValueError, match='UnidentifiedImageError'): decoded(b'')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match='Decompression'):
        decoded(as_file(Image.new('L', (20, 20))))

def test_squared():
    wide = Image.new('RGB', (60, 20), (255, 255, 255))
    bars = np.asarray(squared(wide, 30, 'pad'))
    assert bars.shape == (30, 30, 3) and (bars[15] == 255).all()
    assert (bars[0] == 128).all()
    assert squared(Image.new('L', (7, 9)), 5, 'squash').size == (5, 5)
    with pytest.raises(ValueError, match="unknown shape 'stretch'"):
        squared(wide, 30, 'stretch')


# ---- windows -------------------------------------------------------------------------

@pytest.mark.parametrize('antialias', [True, False])
@pytest.mark.parametrize('length, size', [(40, 12), (40, 40), (11, 25), (1, 3), (7, 1)])
def test_resample_is_interpolation(length, size, antialias):
    x = torch.rand(1, 1, 50, 50)
    start, n = torch.tensor([5.]), torch.tensor([float(length)])
    matrix = resample(start, n, 50, size, antialias)[0]
    ours = matrix @ x[0, 0] @ matrix.T
    want = F.interpolate(x[..., 5:5+length, 5:5+length], (size, size), mode='bilinear',
                         antialias=antialias)
    assert_close(ours, want[0, 0])
    assert_close(matrix.sum(1), torch.ones(size))

def test_bytes_stay_bytes_and_equal_those_of_torchvision():
    x = torch.randint(256, (3, 3, 40, 30), dtype=torch.uint8)
    place = [torch.tensor([v]*3) for v in (4, 2, 30, 25)]
    ours = windows_to(x, *place, 16)
    want = v2.functional.resized_crop(x, 4, 2, 30, 25, (16, 16), antialias=True)
    assert ours.dtype == torch.uint8
    assert (ours.int() - want.int()).abs().max() <= 1
    assert resized(x, 20).dtype == torch.uint8 and resized(x[..., :30, :], 30).shape
    square = x[..., :30, :]
    assert resized(square, 30) is square

def test_windows_come_from_the_generator_given():
    x = torch.rand(8, 3, 30, 30)
    def crop(seed): return RandomResizedCrop(16, generator=torch.Generator()
                                             .manual_seed(seed))(x)
    state = torch.get_rng_state()
    assert_close(crop(1), crop(1))
    assert not torch.equal(crop(1), crop(2))
    assert torch.equal(state, torch.get_rng_state())
    assert 'size=16' in repr(RandomResizedCrop(16))

@pytest.mark.parametrize('given', [
    dict(size=0), dict(size=9, scale=(0, 1)), dict(size=9, scale=(.5, 1.1)),
    dict(size=9, ratio=(2, 1)), dict(size=9, ratio=1.), dict(size=9, scale=(.1,))])
def test_windows_that_cannot_be(given):
    with pytest.raises(ValueError, match='must be'): RandomResizedCrop(**given)


# ---- the cache -----------------------------------------------------------------------

@pytest.fixture
def cache(tmp_path, good):
    return partial(cached_photos, good, 'train', KINDS, 8, folder=tmp_path/'cache')

def test_a_cache_holds_what_the_archive_holds(cache, tmp_path):
    photos = cache()
    assert photos.x.shape == (6, 3, 8, 8) and photos.y.tolist() == [0, 1, 2]*2
    assert photos.x[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 200]
    pixels = photos.x.float()/255
    assert_close(torch.tensor(photos.mean), pixels.mean((0, 2, 3)))
    assert_close(torch.tensor(photos.std), pixels.transpose(0, 1).flatten(1).std(
        1, correction=0))
    assert len(list((tmp_path/'cache').iterdir())) == 2

def test_it_is_read_again_and_never_written_to(cache, monkeypatch):
    cache().x.fill_(7)                                 # in memory only
    def stop(path): raise AssertionError('decoded twice')
    monkeypatch.setattr(photo_cache, 'read_archive', stop)
    assert cache().x[1, 0, 0, 0] == 40

def test_what_is_wrong_with_a_cache_is_told_and_can_be_rebuilt(cache):
    photos = cache()
    pixels = photos.path.with_suffix('.bin')
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(ValueError, match='cut short: say rebuild=True'): cache()
    assert cache(rebuild=True).x[1, 0, 0, 0] == 40
    with pytest.raises(ValueError, match="archive '.*' and not 'another'"):
        cache(key='another')
    about = json.loads(photos.path.read_text())
    about['settings']['version'] = 0
    photos.path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match='version 0 and not 1'): cache()
    photos.path.write_text('{"settings": {}}')
    with pytest.raises(ValueError, match='damaged'): cache()
    photos.path.write_text('{"sett')
    with pytest.raises(ValueError, match='damaged'): cache()
    assert len(cache(rebuild=True)) == 6

def test_damaged_pictures_are_never_passed_over_in_silence(tmp_path):
    bad = pack(tmp_path/'bad.tgz', {**pictures(), 'set/train/kind0/torn.png': b'x',
                                    'set/train/kind1/torn.png': b'x'})
    cache = partial(cached_photos, bad, 'train', KINDS, 8, folder=tmp_path/'cache')
    with pytest.raises(ValueError, match='kind0/torn.png .*skip_damaged=True'): cache()
    left = (tmp_path/'cache').iterdir()
    assert not [p for p in left if p.suffix in ('.bin', '.json')]
    for _ in range(2):                                 # built, then read
        with pytest.warns(UserWarning, match='2 pictures.*kind1/torn.png'):
            photos = cache(skip_damaged=True)
        assert len(photos) == 6 and len(photos.skipped) == 2
    with pytest.raises(ValueError, match='kind0/torn.png .* and 1 more'): cache()

def test_a_foreign_archive_is_told(tmp_path, good):
    folder = tmp_path/'cache'
    with pytest.raises(ValueError, match='no pictures in …/val/…/'):
        cached_photos(good, 'val', KINDS, 8, folder=folder)
    with pytest.raises(ValueError, match='of no known class'):
        cached_photos(good, 'train', KINDS[:2], 8, folder=folder)

def test_an_interrupted_build_leaves_nothing(cache, tmp_path, monkeypatch):
    def stop(content): raise KeyboardInterrupt
    monkeypatch.setattr(photo_cache, 'decoded', stop)
    with pytest.raises(KeyboardInterrupt): cache()
    assert not list((tmp_path/'cache').iterdir())

def _build(cache, ready, go, said):
    original = photo_cache._build
    def slow(*args):
        said.put('built')
        original(*args)
    photo_cache._build = slow
    ready.put(1), go.wait(60)
    said.put(cache().x.sum().item())

@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(),
                    reason='processes are forked')
def test_two_processes_build_one_cache(cache):
    context = multiprocessing.get_context('fork')
    ready, go, said = context.Queue(), context.Event(), context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                # of threads and forks
        both = [context.Process(target=_build, args=(cache, ready, go, said))
                for _ in range(2)]
        for p in both: p.start()
    for _ in both: ready.get(timeout=60)
    go.set()
    found = [said.get(timeout=60) for _ in range(3)]
    for p in both: p.join(60)
    assert sorted(map(str, found)).count('built') == 1
    assert len({v for v in found if v != 'built'}) == 1


# ---- the set -------------------------------------------------------------------------

@pytest.fixture
def places(tmp_path, monkeypatch):
    for name in 'data', 'cache': (tmp_path/name).mkdir()
    monkeypatch.setenv('NNTRAIN_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('NNTRAIN_CACHE', str(tmp_path/'cache'))
    imagenette._warn_toy.cache_clear()
    return tmp_path

def test_it_is_found_in_the_data_then_among_the_caches(places):
    name = 'imagenette2-160.tgz'
    with pytest.raises(FileNotFoundError, match=f'{name} is not in .*data'):
        find_imagenette('local')
    for folder in 'cache', 'data':
        (places/folder/name).touch()
        assert find_imagenette() == places/folder/name

def test_the_network_is_left_alone_in_quick_runs_and_toys_are_told(places, monkeypatch):
    def stop(*args): raise AssertionError('a download')
    monkeypatch.setattr(imagenette, 'download', stop)
    with pytest.warns(UserWarning, match='drawn by code: the quick budget'):
        assert find_imagenette(budget='quick') is None
    def no(*args): raise OSError('cannot be reached')
    monkeypatch.setattr(imagenette, 'download', no)
    with pytest.warns(UserWarning, match='cannot be reached'):
        assert find_imagenette(budget='short') is None
    with pytest.raises(OSError, match='cannot be reached'): find_imagenette('download')

def test_half_a_download_is_one_sentence(places):
    path = places/'data'/'imagenette2-160.tgz'
    path.write_bytes(b'half')
    with pytest.raises(ValueError, match='4 bytes.*cut short or another archive'):
        imagenette.imagenette(8, budget='quick')

def test_the_cache_goes_beside_no_data(places, monkeypatch):
    files = {f'imagenette2-160/{split}/{folder}/{i}.png': as_file(
                 Image.new('L', (9, 9))) for split in ('train', 'val')
             for i, folder in enumerate(imagenette.IMAGENETTE)}
    path = pack(places/'data'/'imagenette2-160.tgz', files)
    md5 = archive.hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(imagenette, 'KNOWN', {md5: 'it'})
    os.chmod(places/'data', 0o555)
    try: photos = imagenette.imagenette(8, budget='quick')
    finally: os.chmod(places/'data', 0o755)
    assert photos['source'] == 'imagenette' and photos['val'].n_grey == 10
    assert [p.name for p in (places/'data').iterdir()] == [path.name]

@pytest.fixture(scope='module')
def toys():
    return dict(train=ToyPhotos(90, 0, 16), val=ToyPhotos(20, 1, 16), source='toy')

def test_toys_are_the_same_everywhere_and_of_many_shapes(toys):
    again = ToyPhotos(90, 0, 16)
    assert torch.equal(again.x, toys['train'].x)
    assert len({p.size for p in again.pictures}) > 60
    assert torch.bincount(again.y).tolist() == [9]*10
    for p, (left, top, right, bottom) in zip(again.pictures, again.boxes):
        assert 0 <= left < right <= p.width and 0 <= top < bottom <= p.height

def test_what_is_held_out_does_not_depend_on_the_seed(toys):
    first, second = (photo_dls(toys, 10, 'split', seed=s) for s in (0, 1))
    assert torch.equal(first.valid.x, second.valid.x) and first.valid.n == 10
    assert first.train.n == 80
    assert not torch.equal(next(iter(first.train))[1], next(iter(second.train))[1])
    with pytest.raises(ValueError, match="unknown valid 'train'"):
        photo_dls(toys, valid='train')

def test_few_labels_and_wrong_ones(toys):
    few = photo_dls(toys, share=.5).train
    assert few.n == 90 and len(few.x.unique(dim=0)) == 45
    y, wrong = toys['train'].y, photo_dls(toys, noise=.2).train.y
    assert (wrong != y).sum() == 18 and wrong.max() < 10
    assert torch.equal(wrong, photo_dls(toys, noise=.2).train.y)
    for given in dict(share=0.), dict(share=1.5), dict(noise=-.1):
        with pytest.raises(ValueError): photo_dls(toys, **given)


# ---- Grad-CAM ------------------------------------------------------------------------

def test_grad_cam_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x, before = torch.rand(2, 3, 9, 9), {k: v.clone() for k, v in
                                         model.state_dict().items()}
    with torch.no_grad(): maps = grad_cam(model, x, model[2])
    assert maps.shape == (2, 9, 9) and 0 <= maps.min() and maps.max() <= 1
    assert model.training and not model[2]._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items(): assert_close(value, before[name])
    with pytest.raises(ValueError, match='before the mean'):
        grad_cam(model, x, model[4])
    assert model.training and not model[4]._forward_hooks


# ---- tables --------------------------------------------------------------------------

@pytest.fixture
def pretend(monkeypatch):
    "Runs without training: the best rate is .1 · √10 of what was asked first"
    calls = []
    def run(photos, lr, seed, **given):
        calls.append((given.get('valid', 'test'), lr, seed))
        return dict(accuracy=1/(1 + abs(np.log10(lr/.3))), loss=1., rate=lr,
                    seconds=0.), None
    monkeypatch.setattr(photo_tables, 'photo_run', run)
    monkeypatch.setattr(photo_tables, 'imagenette', lambda *a, **k: dict(source='x'))
    return calls

def test_tables_choose_on_held_out_pictures_then_go_on_where_they_were(
        tmp_path, pretend):
    path = tmp_path/'p.json'
    for _ in range(30):                                # stopped after each run
        photo_tables.run_tables(['T1'], path, seconds=0, n_seeds=2,
                                rows=['SGD', 'Adam'])
    tries = [lr for valid, lr, _ in pretend if valid == 'split']
    finals = [(lr, seed) for valid, lr, seed in pretend if valid == 'test']
    # Adam's best rate is above its first four: two more, and no further
    assert tries == [.03, .095, .3, .95, 3e-4, 9.5e-4, 3e-3, 9.5e-3, .03, .095]
    assert finals == [(.3, 0), (.095, 0), (.3, 1), (.095, 1)]
    assert photo_tables.best_of(photo_tables.tried(KeptRuns(path), 'SGD')) == .3

def test_rows_can_be_chosen(tmp_path, pretend):
    kept = photo_tables.run_tables(['T2'], tmp_path/'p.json', n_seeds=1,
                                   rows=['small CNN'])
    assert [n for n in kept.found['runs'] if 'choose' not in n] == ['T2 small CNN']

def test_tables_refuse_toys_and_unknown_tables(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no table 'T9'; there are T1"):
        photo_tables.run_tables(['T9'], tmp_path/'p.json')
    with pytest.raises(ValueError, match='there are none'):
        photo_tables.run_tables(['T1'], tmp_path/'p.json', source='toy', budget='quick')
    assert not (tmp_path/'p.json').exists()

def test_a_run_that_overflows_counts_as_a_guess(toys):
    def refusing(model, lr):
        made = photo_runs.OPTIMIZERS['Adam'][0](model, lr)
        def step(*args):
            raise ValueError('a gradient of shape (3,) has infinite or missing numbers')
        made.step = step
        return made
    made, _ = photo_runs.photo_run(toys, photo_tables.small_cnn, refusing, 1e-3, 0, 1)
    assert made['accuracy'] == .1 and made['loss'] == 99.

@pytest.mark.parametrize('table', ['T2', 'T3', 'T4', 'T5'])
def test_every_row_can_be_made(table):
    for given in photo_tables.ROWS[table]().values():
        model = given['make_model']().eval()
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
        x = torch.rand(2, 3, 96, 96)
        for tfm in given['tfms']: x = tfm(x)
        assert x.shape[2] == x.shape[3] and x.shape[2] in (64, 96, 128, 160)


@pytest.mark.parametrize('start, length', [(-3., 4.), (8., 4.), (0., 0.)])
def test_a_window_outside_the_image_is_refused(start, length):
    with pytest.raises(ValueError, match='inside the image of 10 pixels'):
        photo_transforms.resample(torch.tensor([start]), torch.tensor([length]), 10, 4)


def test_a_toy_picture_has_one_of_ten_things():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match='label must be 0 … 9, got 10'):
        toy_photos.draw_photo(10, rng)
    with pytest.raises(ValueError, match='longest must be at least 1, got 0.5'):
        toy_photos.draw_photo(0, rng, longest=.5)


@pytest.mark.parametrize('share', [.05, .3, .66, .9])
def test_an_epoch_of_few_pictures_is_as_long(share, tmp_path):
    x, y = torch.zeros(100, 4, 4, 3, dtype=torch.uint8), torch.arange(100) % 10
    split = SimpleNamespace(x=x.permute(0, 3, 1, 2), y=y, mean=0., std=1.)
    photos = dict(train=split, val=split, source='toy')
    dls = imagenette.photo_dls(photos, 10, share=share, device='cpu')
    assert dls.train.n == 100


# ---- careless calls ------------------------------------------------------------------

def says(error, match, f):
    with pytest.raises(error, match=match): f()


def test_labels_mean_the_classes_that_you_name(cache, tmp_path, good):
    cache()
    folder = tmp_path/'cache'
    says(ValueError, 'classes in another order: set/train/kind0/0.png has number 0',
         lambda: cached_photos(good, 'train', KINDS[::-1], 8, folder=folder))
    says(ValueError, 'another order',
         lambda: cached_photos(good, 'train', KINDS[:2], 8, folder=folder))
    more = cached_photos(good, 'train', dict.fromkeys([*KINDS, 'kind3']), 8,
                         folder=folder)
    assert more.y.tolist() == [0, 1, 2]*2


def test_another_archive_of_the_same_name_is_another_cache(cache, good):
    cache()
    pack(good, pictures(3))
    says(ValueError, "cache of other settings .archive '", cache)
    assert len(cache(rebuild=True)) == 3


def test_a_rebuild_that_fails_leaves_the_old_cache(cache, good):
    kept = cache().path.read_bytes()
    content = good.read_bytes()
    pack(good, {**pictures(), 'set/train/kind0/torn.png': b'x'})
    says(ValueError, 'torn.png', lambda: cache(rebuild=True))
    good.unlink()
    for key in None, '':
        says(FileNotFoundError, 'good.tgz is not a file: give the path of an archive',
             lambda: cache(rebuild=True, key=key))
    good.write_bytes(content)
    assert cache().path.read_bytes() == kept and len(cache()) == 6


def test_a_missing_archive_is_not_called_a_cache_that_cannot_be_written(tmp_path):
    for key in None, 'x':
        says(FileNotFoundError, 'no.tgz is not a file', lambda: cached_photos(
            tmp_path/'no.tgz', 'train', KINDS, 8, folder=tmp_path/'cache', key=key))
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


@pytest.mark.parametrize('change', [
    dict(settings=[]), dict(settings=None), dict(labels=[0, 1]), dict(names=[1]*6),
    dict(labels=['0']*6), dict(labels=[-1]*6), dict(names=['x']*6), dict(skipped=None),
    dict(mean=0)])
def test_notes_that_somebody_edited_are_damaged(cache, change):
    path = cache().path
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    says(ValueError, 'is damaged.*say rebuild=True', cache)


@pytest.mark.parametrize('given, match', [
    (dict(split='../train'), 'split must be the name of a folder'),
    (dict(split=3), 'split must be the name of a folder'),
    (dict(shape='zoom'), "unknown shape 'zoom': choose one of squash, crop, pad"),
    (dict(shape='/../../x'), 'unknown shape')])
def test_words_of_a_file_name_stay_inside(tmp_path, good, given, match):
    given = dict(split='train') | given
    says(ValueError, match, lambda: cached_photos(
        good, classes=KINDS, size=8, folder=tmp_path/'cache', **given))
    assert [p.name for p in tmp_path.iterdir()] == ['good.tgz']


def test_a_folder_that_cannot_be_is_told(tmp_path, good):
    (tmp_path/'file').touch()
    for folder in tmp_path/'file', tmp_path/'file'/'below':
        says(OSError, 'cannot be a folder for caches .*folder=…, or as NNTRAIN_CACHE',
             lambda: cached_photos(good, 'train', KINDS, 8, folder=folder))


def test_names_that_are_no_text_can_be_kept(tmp_path):
    odd = pack(tmp_path/'odd.tgz', {**pictures(), 'set/train/kind0/\udcff.png': as_file(
        Image.new('L', (9, 9)))})
    for _ in range(2):
        assert len(cached_photos(odd, 'train', KINDS, 8, folder=tmp_path/'cache')) == 7


def test_equal_pictures_have_a_deviation(tmp_path):
    plain = {f'set/train/kind0/{i}.png': as_file(Image.new('RGB', (9, 9), (51, 77, 1)))
             for i in range(7)}
    photos = cached_photos(pack(tmp_path/'p.tgz', plain), 'train', ['kind0'], 8,
                           folder=tmp_path/'cache')
    assert np.isfinite(photos.std).all()


@pytest.mark.parametrize('value', [0, 100*257, 65535])
def test_sixteen_bits_are_scaled_and_not_cut_off(value):
    deep = Image.fromarray(np.full((4, 4), value, np.uint16))
    picture, grey = decoded(as_file(deep))
    assert grey and picture.getpixel((0, 0)) == (round(value/257),)*3


def test_what_cannot_be_decoded_says_so():
    floats = as_file(Image.fromarray(np.ones((4, 4), np.float32)), 'TIFF')
    says(ValueError, 'floats, whose range nobody knows', lambda: decoded(floats))
    says(ValueError, "a bytes-like object is required, not 'str'", lambda: decoded('x'))
    with pytest.raises(ValueError, match='UnidentifiedImageError') as e: decoded(b'')
    assert ' at 0x' not in str(e.value)             # the same in every run


def test_one_damaged_picture_is_one_picture(tmp_path):
    bad = pack(tmp_path/'bad.tgz', {**pictures(), 'set/train/kind0/torn.png': b'x'})
    with pytest.warns(UserWarning, match='^1 picture of .*left out'):
        cached_photos(bad, 'train', KINDS, 8, folder=tmp_path/'c', skip_damaged=True)


def test_nobody_waits_for_ever(tmp_path, capsys):
    lock = RunLock(tmp_path/'x.json')
    lock.take()
    says(TimeoutError, 'x.json is in use by .* .waited for 0 minutes.',
         lambda: _alone(tmp_path/'x.json', list, 'waiting', every=.01, patience=.05))
    assert capsys.readouterr().out == 'waiting\n'      # once
    lock.release()
    assert _alone(tmp_path/'x.json', lambda: 3) == 3
    assert not list(tmp_path.iterdir())


def test_unpacking_names_the_folder_that_you_gave(tmp_path, good):
    (tmp_path/'file').touch()
    for content, folder, error, match in [
            (None, 'new', FileNotFoundError, 'no.tgz is not a file'),
            (pictures(), 'file/new', OSError, 'file/new could not be written'),
            ({'a': b'', 'a/b/c': b''}, 'new', OSError, 'new could not be written'),
            ({'a': b'', 'a/b': b''}, 'new', ValueError, 'holds a file twice: a$')]:
        path = tmp_path/'no.tgz' if content is None else pack(good, content)
        says(error, match, lambda: unpack_archive(path, tmp_path/folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'good.tgz']


def test_a_download_of_another_file_names_no_file_that_is_gone(tmp_path, good):
    with pytest.raises(ValueError, match='is not it, so it is not kept') as e:
        download(good.as_uri(), tmp_path/'new'/'x.tgz', {'0'*32: 'it'})
    assert 'unfinished' not in str(e.value) and 'delete' not in str(e.value)
    says(ValueError, 'good.tgz is a file, not a folder',
         lambda: download(good.as_uri(), good/'x.tgz', {}))


NAN, ONE = torch.tensor([float('nan')]), torch.ones(1)

@pytest.mark.parametrize('error, match, call', [
    (ValueError, 'inside the image', lambda: resample(NAN, ONE, 4, 2)),
    (ValueError, 'inside the image', lambda: resample(ONE, NAN, 4, 2)),
    (ValueError, 'size must be a whole number', lambda: resample(ONE, ONE, 4, 0)),
    (ValueError, r'tensors of shape \(N,\)', lambda: resample(0, 1, 4, 2)),
    (ValueError, 'for a single image', lambda: windows_to(ONE.view(1, 1, 1), 0, 0, 1, 1,
                                                          1)),
    (ValueError, 'a type of floats', lambda: windows_to(
        torch.zeros(1, 3, 4, 4), *[ONE]*4, 2, dtype=torch.uint8)),
    (ValueError, 'a type of floats', lambda: RandomResizedCrop(4, dtype='bfloat16')),
    (TypeError, 'a picture of PIL, got a Tensor', lambda: photo_transforms.squared(
        torch.zeros(3, 4, 4), 2)),
    (ValueError, 'short must be a whole number of at least 16', lambda:
        toy_photos.draw_photo(0, 0, short=1)),
    (ValueError, "unknown optimizer 'adam': choose one of SGD", lambda:
        photo_runs.photo_rates('adam')),
    (ValueError, 'no rate was tried yet', lambda: photo_tables.best_of({}))])
def test_careless_numbers_get_a_sentence(error, match, call): says(error, match, call)


@pytest.mark.parametrize('error, match, given', [
    (ValueError, 'photos must be a dictionary with train, val', dict(photos=3)),
    (ValueError, 'photos must be a dictionary with train, val', dict(photos={})),
    (ValueError, 'test_size must be a whole number', dict(test_size=0)),
    (TypeError, r'write tfms=\(RandomResizedCrop', dict(tfms=RandomResizedCrop(8))),
    (TypeError, 'make_model must be a function', dict(make_model=nn.Linear(2, 2))),
    (TypeError, 'optimizer must be a function', dict(optimizer='Adam')),
    (ValueError, 'give the same object to both', dict(cbs=[
        ProgressiveCB(RandomResizedCrop(8), [8])]))])
def test_a_run_that_must_fail_fails_before_it_trains(toys, monkeypatch, error, match,
                                                     given):
    def stop(*args): raise AssertionError('trained')
    monkeypatch.setattr(photo_runs.Learner, '_one_batch', stop)
    usual = dict(photos=toys, make_model=photo_runs.small_cnn, lr=1e-3, seed=0,
                 optimizer=photo_runs.muon, n_epochs=1)
    says(error, match, lambda: photo_runs.photo_run(**usual | given))


def test_crops_grow_and_are_put_back(toys):
    crop, seen = RandomResizedCrop(16), []
    def note(x): seen.append(x.shape[-1]); return x
    def stop(x): raise KeyboardInterrupt
    def run(last, sizes): photo_runs.photo_run(
        toys, photo_runs.small_cnn, photo_runs.OPTIMIZERS['Adam'][0], 1e-3, 0, 3,
        tfms=(crop, last), batch_size=90, cbs=[ProgressiveCB(crop, sizes)])
    run(note, (16, 20))
    assert (seen, crop.size) == ([16, 20, 20], 16)
    with pytest.raises(KeyboardInterrupt): run(stop, [24])
    assert crop.size == 16


@pytest.mark.parametrize('sizes', [(), [0], '64', None, [8, float('nan')], [8.]])
def test_sizes_that_cannot_be(sizes):
    says(ValueError, 'sizes: pixels must be a whole number',
         lambda: ProgressiveCB(RandomResizedCrop(8), sizes))
    says(TypeError, 'crop must be a RandomResizedCrop', lambda: ProgressiveCB(8, [8]))


def test_grad_cam_explains_what_you_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(4, 2))
    x = torch.rand(2, 3, 9, 9)
    assert_close(grad_cam(model, x, model[1], [0, 1]),
                 grad_cam(model, x, model[1], torch.tensor([0, 1])))
    assert grad_cam(model, x[:0], model[1]).shape == (0, 9, 9)      # no pictures
    for wrong in [0], torch.rand(2), [0, 2], [-1, 0], 1:
        says(ValueError, 'classes must be from 0 to 1, a whole number for each of 2',
             lambda: grad_cam(model, x, model[1], wrong))
    assert heat_in(torch.ones(1, 2, 2), [[0, 0, 1, 2]]).item() == .5


@pytest.mark.parametrize('match, given', [
    ("no row 'Adm'; there are SGD; ", dict(tables=['T1'], rows=['Adm'])),
    ("no row 'Adam'; there are ResNet; ", dict(tables='T2', rows='Adam')),
    ('n_seeds must be', dict(tables=['T1'], n_seeds=0)),
    ('seconds must be', dict(tables=['T1'], seconds=float('nan')))])
def test_a_misspelt_row_is_not_one_that_is_done(tmp_path, pretend, match, given):
    says(ValueError, match, lambda: photo_tables.run_tables(path=tmp_path/'p.json',
                                                            **given))
    assert not pretend


def test_the_wider_network_takes_about_as_many_macs():
    from torch.utils.flop_counter import FlopCounterMode
    counts = []
    for name in 'ResNet', 'wider, fewer stages':
        model = photo_tables.ROWS['T2']()[name]['make_model']().eval()
        with FlopCounterMode(display=False) as count: model(torch.zeros(1, 3, 128, 128))
        counts.append(count.get_total_flops())
    assert .95 < counts[1]/counts[0] < 1.05
