"The challenge: recipes as data, loaders by epoch, the search, the command, the scripts"
import json
import math
import runpy
import sys
import warnings
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from nntrain import challenge, recipe_data
from nntrain.callback import Callback
from nntrain.challenge import (
    CHOICE_SEED,
    PHOTO_TRIES,
    RECIPES,
    SEEDS,
    TRIES,
    challenge_jobs,
    find_recipe,
    run_challenge,
    try_recipe,
)
from nntrain.challenge_parts import (
    DATA,
    LOOKS,
    NETWORKS,
    OPT_FUNCS,
    SHAPES,
    EpochLoader,
    Look,
)
from nntrain.command import nntrain_fit
from nntrain.kept import KeptRuns
from nntrain.learner import Learner
from nntrain.recipe import resume_fashion, train_recipe
from nntrain.recipe_data import (
    Recipe,
    changes,
    recipe_callbacks,
    recipe_parts,
    run_recipe,
)
from nntrain.speed_run import GOALS, SPRINT_TRIES, SPRINTS, speed_runs, sprint_tries
from nntrain.steering import ScheduleCB
from nntrain.tensor_loader import TensorLoader

SCRIPTS = Path(__file__).parents[1]/'scripts'
TINY = Recipe(epochs=2, widths=(4, 8), optimizer='muon', lr=.02, batch=64, move=1,
              flip='alternating', grow=((.5, 20),), smoothing=.1, average=.9,
              looks='six')
QUICK = dict(budget='quick', source='toy', device='cpu')


@pytest.fixture
def tiny(monkeypatch):
    "A recipe that takes a second, by name"
    monkeypatch.setenv('NNTRAIN_BUDGET', 'quick')
    monkeypatch.setitem(RECIPES, 'tiny', TINY)
    return 'tiny'


@pytest.mark.parametrize('bad, message', [
    (dict(network='vgg'), 'network must be one of resnet'),
    (dict(optimizer=None), 'optimizer must be one of adamw'),
    (dict(flip=True), "flip must be one of none, random, alternating; got True"),
    (dict(epochs=0), 'epochs must be a whole number of at least 1'),
    (dict(epochs=2.5), 'epochs must be a whole number'),
    (dict(lr=float('nan')), 'lr must be a finite number above 0'),
    (dict(decay=-1), 'decay must be a finite number of at least 0'),
    (dict(smoothing=2), 'smoothing must lie in'), (dict(average=1), 'average must lie'),
    (dict(move=-1), 'move must be a whole number of at least 0'),
    (dict(grow=((.5, 0),)), 'grow: pixels'), (dict(grow=((2, 20),)), 'grow: share')])
def test_a_bad_recipe_is_refused(bad, message):
    with pytest.raises(ValueError, match=message): Recipe(**bad)


def test_a_recipe_is_data():
    with pytest.raises(FrozenInstanceError): Recipe().lr = 1
    assert changes(Recipe()) == {} and changes(TINY, TINY) == {}
    assert replace(Recipe(), **changes(TINY)) == TINY
    as_json = json.loads(json.dumps({f.name: getattr(TINY, f.name)
                                     for f in fields(TINY)}))
    assert as_json['grow'] == [[.5, 20]]


@pytest.mark.parametrize('change', [
    dict(optimizer=name, schedule=shape) for name, shape in zip(OPT_FUNCS, [
        *SHAPES, 'triangle', 'steady'])] + [
    dict(network='cnn', widths=(4, 8)), dict(act='gelu', zero_init=False),
    dict(mixup=.4, average=0., grow=()), dict(erase=1., flip='random'),
    dict(strides=(2, 2), n_blocks=2, batch=256)], ids=str)
def test_every_word_of_a_recipe_runs(change):
    recipe = replace(TINY, **{'average': 0., 'epochs': 1, **change})
    found = run_recipe(recipe, 0, **QUICK)
    assert set(found) == {'accuracy', 'loss', 'mirror', 'six', 'seconds', 'cpu'}
    assert 0 <= found['accuracy'] <= 1 and found['loss'] < 3


def test_held_out_pictures_are_others_than_those_of_the_test(monkeypatch):
    judged = {}
    real = recipe_data._judged
    def watched(learn, dl):
        judged[len(judged)] = dl.x, learn.dls.train.x
        return real(learn, dl)
    monkeypatch.setattr(recipe_data, '_judged', watched)
    for valid in 'split', 'test':
        run_recipe(replace(TINY, epochs=1, flip='none', grow=()), 0, valid, **QUICK)
    (held, train), (test, _) = judged[0], judged[1]
    assert not torch.equal(held, test)
    rows = {row.numpy().tobytes() for row in train}
    assert not any(row.numpy().tobytes() in rows for row in held)


def test_flips_take_turns_and_pictures_grow():
    x, y = torch.rand(50, 1, 8, 8), torch.arange(50)
    loader = EpochLoader(x, y, 16, True, [(1, 4)], draw=3, shuffle=True, seed=1)
    plain = TensorLoader(x, y, 16, shuffle=True, seed=1)
    epochs = [[torch.cat(o) for o in zip(*loader)] for _ in range(3)]
    for k, (seen, targets) in enumerate(epochs):
        want, same = (torch.cat(o) for o in zip(*plain))
        assert torch.equal(targets, same)               # the order stays as it was
        if k == 0: assert seen.shape[-1] == 4; continue
        mirrored = loader.half[targets] ^ (k % 2 == 1)
        want = torch.where(mirrored[:, None, None, None], want.flip(-1), want)
        assert_close(seen, want, rtol=0, atol=0)
    assert 10 < loader.half.sum() < 40
    loader.epoch = 1                                    # where a resumed run begins
    again = torch.cat([xb for xb, _ in loader])
    assert_close(again, epochs[1][0], rtol=0, atol=0)


def test_looks():
    p = torch.rand(3, 2, 5, 6)
    for look in LOOKS['six']:
        seen = look(p)
        assert seen.shape == p.shape and seen.data_ptr() != p.data_ptr()
        back = Look(False, -look.down, -look.right)(seen)
        if look.mirror: back = back.flip(-1)
        inner = back[..., 1:-1, 1:-1]
        assert_close(inner, p[..., 1:-1, 1:-1], rtol=0, atol=0)
    assert LOOKS['mirror'][0] in LOOKS['six'] and len(LOOKS['six']) == 5


def test_the_lists_keep_the_rules():
    for name in TRIES: try_recipe(name)
    for name, recipe in RECIPES.items():
        if not name.startswith('challenge'): continue
        dls = type('Dls', (), {})()
        dls.train = TensorLoader(torch.rand(4, 1, 28, 28), torch.arange(4), 4)
        model = recipe_parts(recipe, dls, torch.device('cpu'))['model']
        assert sum(p.numel() for p in model.parameters()) <= 1_300_000, name
    assert set(SPRINTS) == set(GOALS)
    with pytest.raises(ValueError, match="'challenge-6': choose one of challenge-5"):
        find_recipe('challenge-6')


@pytest.fixture
def pretended(monkeypatch):
    "Runs that take no time"
    made = []
    def run(recipe, seed, valid, budget):
        made.append((recipe, seed, valid))
        if pretended_stop and len(made) > pretended_stop[-1]: raise KeyboardInterrupt
        return dict(accuracy=.9, mirror=.9, six=.9, loss=.3, seconds=1., cpu=1.)
    pretended_stop = []
    monkeypatch.setattr(challenge, 'run_recipe', run)
    run.made, run.stop = made, pretended_stop
    return run


def test_a_stopped_search_goes_on_with_what_is_missing(pretended, tmp_path, capsys):
    path = tmp_path/'runs.json'
    n = len(TRIES) + 2*len(PHOTO_TRIES) + len(SEEDS)*len(RECIPES)
    assert run_challenge(KeptRuns(path), 0) == 1            # then time is up
    pretended.stop.append(3)
    with pytest.raises(KeyboardInterrupt): run_challenge(KeptRuns(path))
    pretended.stop.clear()
    assert len(list(challenge_jobs(KeptRuns(path)))) == n - 3
    assert run_challenge(KeptRuns(path)) == n - 3
    assert run_challenge(KeptRuns(path)) == 0
    splits = [(seed, valid) for _, seed, valid in pretended.made]
    assert set(splits) == {(CHOICE_SEED, 'split'), (CHOICE_SEED + 1, 'split'),
                           *((s, 'test') for s in SEEDS)}
    last_try = max(i for i, (_, valid) in enumerate(splits) if valid == 'split')
    assert last_try == len(TRIES) + 2*len(PHOTO_TRIES)  # one was stopped


def test_the_script_of_the_challenge(pretended, tmp_path, capsys):
    main = runpy.run_path(str(SCRIPTS/'challenge.py'))['main']
    runs = ['--runs', str(tmp_path/'runs.json')]
    main([*runs, '--names', 'Muon; challenge-5'])
    assert [seed for _, seed, _ in pretended.made] == [CHOICE_SEED, *SEEDS]
    capsys.readouterr()
    main([*runs, '--list'])
    missing = capsys.readouterr().out.splitlines()
    assert f'start {CHOICE_SEED}' in missing and f'Muon {CHOICE_SEED}' not in missing
    main([*runs, '--tries', '--list'])                  # no row of the test
    missing = capsys.readouterr().out.splitlines()
    assert len(missing) == len(TRIES) - 1 + 2*len(PHOTO_TRIES)
    assert {line.rsplit(' ', 1)[1] for line in missing} == {
        str(CHOICE_SEED), str(CHOICE_SEED + 1)}
    with pytest.raises(SystemExit, match="challenge.py: no 'challenge-6': choose from"):
        main([*runs, '--names', 'challenge-6'])
    (tmp_path/'bad.json').write_text('{')
    with pytest.raises(SystemExit, match='is damaged'):
        main(['--runs', str(tmp_path/'bad.json')])
    pretended.stop.append(0)
    with pytest.raises(SystemExit) as e: main(runs)
    assert e.value.code == 130


def test_a_recipe_by_name_gives_the_row(tiny, tmp_path, capsys):
    status = nntrain_fit(['--recipe', tiny, '--source', 'toy', '--device', 'cpu',
                          '--seed', '7', '--out', str(tmp_path)])
    shown = capsys.readouterr().out
    assert status == 0 and 'recipe tiny, seed 7' in shown and 'valid' not in shown
    (run,) = tmp_path.iterdir()
    test = json.loads((run/'test.json').read_text())
    row = run_recipe(TINY, 7, **QUICK)
    assert test['accuracy'] == pytest.approx(row['accuracy'], abs=1e-7)
    assert test['looks'] == pytest.approx(row['six'], abs=1e-7)
    assert f'{row["six"]:.4f} with second looks, with the average' in shown
    assert json.loads((run/'options.json').read_text())['recipe'] == tiny


def test_an_interrupted_recipe_goes_on(tiny, tmp_path, capsys, monkeypatch):
    whole = train_recipe(tiny, 'toy', 1, 'cpu', tmp_path/'whole')

    class CtrlCCB(Callback):
        watches = True
        def before_batch(self, learn):
            if learn.epoch == 1: raise KeyboardInterrupt
    real = recipe_data.recipe_callbacks
    with monkeypatch.context() as m:
        m.setattr(recipe_data, 'recipe_callbacks',
                  lambda r, device: [*real(r, device), CtrlCCB()])
        with pytest.raises(KeyboardInterrupt) as e:
            train_recipe(tiny, 'toy', 1, 'cpu', tmp_path/'stopped')
    run = e.value.folder
    with pytest.raises(ValueError, match='a run of recipe tiny, not of challenge'):
        resume_fashion(run, recipe='challenge-5')
    with pytest.raises(ValueError, match='recipe tiny takes 2 epochs: leave out'):
        resume_fashion(run, epochs=3)
    assert nntrain_fit(['--recipe', tiny, '--resume', str(run)]) == 0
    capsys.readouterr()
    for name in 'test.json', 'options.json':
        assert (run/name).read_text() == (whole/name).read_text()


@pytest.mark.parametrize('words, message', [
    (['--recipe', 'challenge-6'], 'invalid choice'),
    (['--recipe', 'challenge-5', '--epochs', '3'], 'leave out --epochs'),
    (['--recipe', 'challenge-5', '--batch-size', '3', '--preflight'],
     'leave out --batch-size, --preflight'),
    (['--recipe', 'challenge-5', '--seed', '-1'], 'must be a whole number from 0'),
    (['--recipe', 'challenge-5', '--device', 'tpu'], 'unknown device'),
    (['--resume', 'nowhere', '--recipe', 'challenge-5'], 'is not the folder of a run')])
def test_what_stands_beside_a_recipe(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nntrain_fit(words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count('\n') == 1
    if words[1] == 'challenge-6': assert all(name in said for name in RECIPES)
    assert not list(tmp_path.iterdir())


def test_a_missed_goal_and_a_damaged_file_of_the_speed_run(tmp_path):
    kept, asked = KeptRuns(tmp_path/'speed.json'), []
    def run(n, seed, valid, goal):
        asked.append((n, seed, valid, goal))
        return dict(accuracy=.8 + .05*n, seconds=float(n))
    assert speed_runs(kept, 'ours', .90, run, 3) == 'ours, 0.90'
    assert asked == [(1, CHOICE_SEED, 'split', .9), (2, CHOICE_SEED, 'split', .9),
                     *((2, seed, 'test', .9) for seed in range(3))]
    assert kept.row('ours, 0.90', 'epochs')['values'] == [2., 2., 2.]
    assert speed_runs(kept, 'slow', .99, run, lengths=(1, 2)) is None
    speed_runs(KeptRuns(tmp_path/'speed.json'), 'ours', .90, run, 3)
    assert len(asked) == 7                              # all is there
    assert speed_runs(kept, 'long', .99, run, within=2.5) is None
    assert [n for n, *_ in asked[7:]] == [1, 2, 3]      # the third took too long
    assert speed_runs(kept, 'just', .90, run, 1, within=.5) is None
    assert speed_runs(kept, 'at once', .85, run, 1, within=.5) == 'at once, 0.85'


def test_a_way_drops_out_after_five_times_our_seconds(tmp_path):
    longest = runpy.run_path(str(SCRIPTS/'speed_run.py'))['longest']
    kept = KeptRuns(tmp_path/'speed.json')
    assert longest(kept, .9) == math.inf
    for seed, seconds in enumerate((2., 4.)):
        kept.get('ours, 0.90', seed, lambda: dict(accuracy=.9, seconds=seconds))
    assert longest(kept, .9) == 15. and longest(kept, .92) == math.inf


def test_the_script_of_the_speed_run(tmp_path, capsys, monkeypatch):
    script = runpy.run_path(str(SCRIPTS/'speed_run.py'))
    main, ways = script['main'], script['WAYS']
    runs = ['--runs', str(tmp_path/'speed.json'), '--budget', 'quick', '--lengths', '1']
    monkeypatch.setenv('NNTRAIN_DATA', '')
    n = torch.get_num_threads()
    main([*runs, '--ways', 'ours', '--goals', '.9', '--n', '1', '--threads', str(n)])
    assert 'ours to 0.90: ' in capsys.readouterr().out
    for words, message in [(['--ways', 'keras'], 'no way keras: choose from ours'),
                           (['--goals', '.5'], 'no goal 0.5: choose from 0.9')]:
        with pytest.raises(SystemExit, match=message): main([*runs, *words])
    monkeypatch.setitem(sys.modules, 'fastai', None)
    monkeypatch.setitem(script['main'].__globals__, 'find_spec', lambda name: None)
    main([*runs, '--ways', 'fastai'])
    assert 'fastai is not installed: left out' in capsys.readouterr().out
    assert set(ways) == {'ours', 'miniai', 'fastai', 'lightning', 'airbench'}


def test_the_tries_of_the_speed_run(tmp_path, capsys, monkeypatch):
    script = runpy.run_path(str(SCRIPTS/'speed_run.py'))
    monkeypatch.setenv('NNTRAIN_DATA', '')
    two = {name: SPRINT_TRIES[name] for name in ('CNN', 'ResNet, two blocks')}
    asked = []
    def tries(kept, run):
        def counted(*words):
            asked.append(words)
            return run(*words)
        return sprint_tries(kept, counted, two)
    monkeypatch.setitem(script['main'].__globals__, 'sprint_tries', tries)
    for _ in range(2):                                     # the second time: all there
        script['main'](['--tries', '--runs', str(tmp_path/'speed.json'),
                        '--budget', 'quick'])
        said = capsys.readouterr().out
        assert [line.split(':')[0] for line in said.splitlines()] == [
            f'try, {name}' for name in two] and len(asked) == 4
    assert SPRINTS[.92] in SPRINT_TRIES.values()
    for recipe in SPRINT_TRIES.values():
        model = NETWORKS[recipe.network](recipe, 1)
        assert sum(p.numel() for p in model.parameters()) <= 1_300_000


def test_the_networks_of_others_are_as_they_were_published():
    script = runpy.run_path(str(SCRIPTS/'speed_run.py'))
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(script['miniai_net']()) == 4_907_588
    images = torch.rand(64, 1, 28, 28)
    net = script['AirNet'](images)
    assert net(images[:2]).shape == (2, 10)
    patches = torch.conv2d(images, net.whiten.weight)[:, :4]    # uncorrelated
    rows = patches.transpose(0, 1).flatten(1)
    square = rows.detach() @ rows.detach().T/rows.shape[1]
    assert_close(square, torch.eye(4), rtol=0, atol=.02)


@pytest.mark.parametrize('fields, said', [
    (dict(widths=5), 'widths must be a tuple of at least two'),
    (dict(widths=()), 'widths must be a tuple of at least two'),
    (dict(widths=(8, .5)), 'widths: channels'),
    (dict(strides=(1, 2)), 'strides must be None or a tuple of 4 numbers'),
    (dict(grow=3), 'grow must be a tuple of pairs'),
    (dict(grow=((.4,),)), 'grow must be a tuple of pairs'),
    (dict(grow=((1.4, 20),)), 'grow: share of the epochs'),
    (dict(cycle_momentum='yes'), "cycle_momentum must be None, True or False; got"),
    (dict(cycle_momentum=True, schedule='steady'),
     "cycle_momentum=True needs the schedule one-cycle; got 'steady'"),
])
def test_a_recipe_says_what_is_wrong_with_its_tuples(fields, said):
    with pytest.raises(ValueError, match=said): Recipe(**fields)


@pytest.mark.parametrize('optimizer, given, moves', [
    ('adamw', None, True), ('adamw', False, False),
    ('muon', None, False), ('muon', True, True)])
def test_momentum_moves_in_a_cycle_when_the_recipe_says_so(optimizer, given, moves):
    recipe = replace(TINY, optimizer=optimizer, cycle_momentum=given,
                     schedule='one-cycle')
    cbs = recipe_callbacks(recipe, torch.device('cpu'))
    schedule, = [cb for cb in cbs if isinstance(cb, ScheduleCB)]
    assert ('momentum' in schedule.schedules) == moves


def test_names_in_place_of_recipes_are_answered(tmp_path):
    with pytest.raises(TypeError, match="got 'challenge-5': find_recipe gives one"):
        run_recipe('challenge-5', 0)
    with pytest.raises(ValueError, match="unknown try 'x': choose one of start"):
        try_recipe('x')
    with pytest.raises(ValueError, match='unknown recipe'): find_recipe(['a'])
    with pytest.raises(ValueError, match="no 'strat': choose from start"):
        run_challenge(KeptRuns(tmp_path/'challenge.json'), names='strat')


def test_photographs_have_a_recipe():
    recipe = find_recipe('imagenette-5')
    dls = DATA['imagenette'][0](32, 'split', 'toy', torch.device('cpu'), 'quick')
    cbs = {type(cb).__name__ for cb in recipe_callbacks(recipe, torch.device('cpu'))}
    assert dls.train.n == 356 and {'AugmentCB', 'NormalizeCB'} <= cbs
    sides = []
    class Sides(Callback):
        def after_batch(self, learn):
            sides.append((learn.training, learn.xb[0].shape[-1]))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        parts = recipe_parts(replace(recipe, widths=(4, 8), strides=(2, 2)), dls,
                             torch.device('cpu'))
    parts['cbs'].append(Sides())
    Learner(**parts).fit(1)
    assert set(sides) == {(True, recipe.crop), (False, recipe.size)}



@pytest.mark.parametrize('make, says', [
    (lambda: EpochLoader(torch.rand(4, 1, 8, 8), torch.arange(4), 4, sizes=3), 'pairs'),
    (lambda: EpochLoader(torch.rand(4, 1, 8, 8), torch.arange(4), 4, sizes=[(1, 0)]),
     'sizes: pixels must be a whole number'),
    (lambda: Look(down=.5), 'down must be a whole number of pixels, got 0.5'),
    (lambda: list(challenge_jobs({}, ['Muoon'])), "no 'Muoon'"),
    (lambda: run_challenge({}, -1), 'seconds must be a finite number of at least 0'),
    (lambda: run_recipe(TINY, 0, device='gpu'), "unknown device 'gpu'")])
def test_wrong_input_gets_a_sentence(make, says):
    with pytest.raises(ValueError, match=says): make()



def test_the_data_of_the_caller_stay_as_they_are():
    dls = DATA['fashion'][0](64, 'test', 'toy', torch.device('cpu'), 'quick')
    before = dls.train
    recipe = replace(TINY, flip='alternating')
    parts = recipe_parts(recipe, dls, torch.device('cpu'))
    assert dls.train is before and isinstance(parts['dls'].train, EpochLoader)
    assert parts['dls'].valid is dls.valid and parts['dls'].source == dls.source
