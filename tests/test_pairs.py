"""Every pair of callbacks, asked in one process: equal, or refused in one sentence.

The table of callbacks is in pair_checks.py. The answers are stored by
`python scripts/pairs.py`, and chapter `pairs` shows them."""
import copy
import json
from functools import partial

import pytest
import torch

import pair_checks
from conftest import ROOT
from nntrain.accumulate import GradientAccumulationCB
from nntrain.annealing import AnnealCB
from nntrain.average import WeightAveragingCB
from nntrain.callback import Callback
from nntrain.callbacks import BatchLimitCB
from nntrain.clip import GradientClipCB
from nntrain.history import RecorderCB
from nntrain.lr_finder import LRFinderCB
from nntrain.pairs import Asker, check_pair, name_of
from nntrain.precision import MixedPrecisionCB
from nntrain.sequences import ModelResetCB, _of_all
from nntrain.small_runs import (failure, first_difference, fit_once, quiet_folder,
                           small_learner, without_chance)
from pair_checks import PAIRS, Walk, faults, missing, stored

STORED = ROOT/'results'/'pairs'/'pairs.json'



@pytest.fixture(scope='module')
def answers():
    "What all pairs answer in one process: takes half a minute"
    assert not missing(), missing()
    return Walk().alone()


def test_every_exported_callback_is_asked():
    assert not missing(), missing()


def test_no_pair_is_silent(answers):
    assert all({*its} == {'steps', 'settings', 'resume'} for its in answers.values())
    assert not (found := faults(answers)), '\n'.join(found)


def test_the_page_shows_what_is_found(answers):
    then = json.loads(STORED.read_text())['answers']
    for question, found in stored(answers).items():
        assert found == then[question], 'it has changed: run python scripts/pairs.py'


def test_a_new_callback_without_an_entry_is_named(monkeypatch):
    class NewCB(Callback): pass
    known = pair_checks.exported()
    monkeypatch.setattr(pair_checks, 'exported', lambda: known | {'NewCB': NewCB})
    assert 'NewCB' in missing() and 'PAIRS' in missing()


# ---- planted faults are found --------------------------------------------------------

def ask(question, *names):
    asker = pair_checks.Asker(pair_checks.learner)
    if question == 'steps': return pair_checks.steps_of(asker, *names)
    return getattr(asker, question)(*(pair_checks.MAKE[name] for name in names))


@pytest.mark.parametrize(
    'question, names, cls, change',
    [
        # clipped before the gradient is divided
        ('steps', ('GradientClipCB', 'MixedPrecisionCB float16'), GradientClipCB,
         dict(order=-4)),
        # a schedule that does not know that epochs are short
        ('steps', ('BatchLimitCB', 'ScheduleCB'), BatchLimitCB,
         dict(before_fit=lambda self, learn: None)),
        # the plain mean of batches of 8, 8 and 1
        ('steps', ('GradientAccumulationCB', 'BatchTransformCB'),
         GradientAccumulationCB, dict(weight=lambda self, learn: 1)),
        ('steps', ('RecorderCB', 'GradientClipCB'), RecorderCB,
         dict(after_backward=lambda self, learn: learn.opt.zero_grad())),
        ('resume', ('WeightAveragingCB', 'GradientClipCB'), WeightAveragingCB,
         dict(state_dict=None)),
        ('resume', ('ModelResetCB', 'GradientClipCB'), ModelResetCB,
         dict(state_dict=None)),
        ('resume', ('MixedPrecisionCB float16', 'GradientAccumulationCB'),
         GradientAccumulationCB, dict(state_dict=None)),
    ],
    ids=lambda value: value if isinstance(value, str) else '')
def test_planted_faults_are_found(monkeypatch, question, names, cls, change):
    assert ask(question, *names).kind == 'equal'
    for name, value in change.items():
        if value is None: monkeypatch.delattr(cls, name)
        else: monkeypatch.setattr(cls, name, value, raising=False)
    answer = ask(question, *names)
    assert answer.kind in ('silent', 'crash'), answer


def test_a_setting_that_is_not_noticed_is_found(monkeypatch):
    clip, other = partial(GradientClipCB, .3), partial(GradientClipCB, .4)
    asker = Asker()
    assert asker.settings(clip, AnnealCB, [(other, AnnealCB)]).kind == 'equal'
    assert asker.settings(clip, AnnealCB).kind == 'none'
    monkeypatch.setattr(GradientClipCB, 'settings', lambda self: {})
    assert asker.settings(clip, AnnealCB, [(other, AnnealCB)]).kind == 'silent'


# ---- two of one kind -----------------------------------------------------------------

TWICE = {   # two of these do their work twice
    'AugmentCB', 'BatchTransformCB', 'NormalizeCB', 'GradientClipCB', 'BatchLimitCB',
    'EarlyStoppingCB', 'SingleBatchCB', 'ModelResetCB', 'ProgressiveCB'}


@pytest.mark.parametrize('name', PAIRS)
def test_two_of_one_kind_watch_twice_or_are_refused(name):
    make, asker = PAIRS[name].make, Asker(pair_checks.learner)
    if name == 'ProfileCB': pytest.skip("torch's profiler runs once at a time")
    with pair_checks.cheaply(), quiet_folder():
        both = fit_once(pair_checks.learner, make, make)
        if name in TWICE: assert both.answer is None
        elif asker.watches(make) and both.answer is None:
            assert asker.differs(asker.left(), both) is None
        else: assert both.answer.kind == 'refused'


# ---- small runs, and what they leave -------------------------------------------------

@pytest.mark.parametrize(
    'a, b, tol, said',
    [
        (torch.ones(2), torch.ones(2).double(), 0., 'another shape'),
        (torch.ones(2), torch.ones(3), 0., 'another shape'),
        (torch.ones(2), torch.tensor([1., torch.nan]), 1., 'differs by nan'),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), 0., None),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), 9., 'differs by 1'),
        (torch.tensor([1e3]), torch.tensor([1e3 + 1e-4]), 1e-6, None),
        (torch.tensor([1e-3]), torch.tensor([2e-3]), 1e-6, 'differs by'),
        (dict(a=1), dict(b=1), 0., "the keys ['a'] and ['b']"),
        ([[1.], [2.]], [[1.], [2.5]], .1, 'state[1][0]: 2.0 and 2.5'),
        ((1,), [1], 0., '(1,) and [1]'), (1, 1., 0., '1 and 1.0'),
        (float('nan'), float('nan'), 0., None), (True, 1, 0., 'True and 1')],
)
def test_first_difference(a, b, tol, said):
    found = first_difference(a, b, tol)
    assert found is None if said is None else said in found


def test_two_small_learners_are_equal_and_keep_callers_chance():
    one, other = small_learner(), small_learner()
    assert first_difference(dict(one.model.state_dict()),
                            dict(other.model.state_dict())) is None
    draw = torch.rand
    with without_chance(): assert torch.rand(2, 3).shape == (2, 3)
    assert torch.rand is draw


def test_errors_are_refusals_only_in_time_and_in_words():
    def kind(error, began=False):
        try: raise error
        except Exception as e: return failure(e, began).kind
    assert kind(ValueError('one of both')) == 'refused'
    assert kind(ValueError('one of both'), began=True) == 'crash'
    assert kind(ValueError('two\nlines')) == kind(ValueError('')) == 'crash'
    assert kind(KeyError('lr')) == kind(AssertionError('no')) == 'crash'
    try: torch.ones(2) @ torch.ones(3)
    except RuntimeError as e: assert failure(e, False).kind == 'refused'  # our own line
    try: torch.nn.Linear(2, 3)(torch.ones(5))
    except RuntimeError as e: assert failure(e, False).kind == 'crash'    # torch's


def test_a_pair_whose_parts_fail_is_not_asked():
    class BrokenCB(Callback):
        def before_fit(self, learn): raise ValueError('not today')
    with pytest.raises(ValueError, match='BrokenCB fails alone: not today'):
        check_pair(BrokenCB, AnnealCB)
    assert name_of(partial(GradientClipCB, .3)) == 'GradientClipCB'


# ---- what the matrix has found -------------------------------------------------------

def test_a_short_epoch_is_whole():
    "It has all events, and nobody prepares a batch that is thrown away"
    prepared, ended = [], []
    class WatchCB(Callback):
        order = -20
        def before_batch(self, learn): prepared.append((learn.phase, learn.iter))
        def after_phase(self, learn): ended.append((learn.phase, len(learn.dl)))
    rates = RecorderCB(lr=lambda learn: learn.opt.param_groups[0]['lr'])
    learn = small_learner(BatchLimitCB(2, 9), AnnealCB(.5, 'epoch'), WatchCB(), rates)
    learn.fit(2)
    assert prepared == [('train', 0), ('train', 1), ('valid', 0)]*2
    assert ended == [('train', 2), ('valid', 1)]*2
    assert rates.values['lr'] == [.05, .05, .025, .025]


def test_a_range_test_that_is_resumed_stops_where_it_would_have():
    def singles(*cbs):
        learn = small_learner(*cbs)
        learn.dls.train.batch_size = 1
        return learn
    asker, find = Asker(singles), partial(LRFinderCB, 1e-3, 1e3, 40, 1., .5)
    assert asker.left(find).state['n_taken'] == 19          # of 51: it has exploded
    assert asker.resume(find, partial(GradientClipCB, 1e9)).kind == 'equal'


def test_numbers_of_a_scaler_are_settings():
    def half(**numbers):
        return MixedPrecisionCB(torch.float16, torch.amp.GradScaler('cpu', **numbers))
    one, same, other = half(init_scale=2.), half(init_scale=2.), half(growth_interval=3)
    assert one.settings() == same.settings() != other.settings()
    assert MixedPrecisionCB().settings() == dict(dtype=None, scaler=None)


def test_a_model_keeps_what_it_remembers():
    class Memory(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.size = torch.nn.Linear(1, 1), 3
            self.reset()
        def reset(self): self.memory = self.pair = None
    class Learn: model = Memory()
    cb = ModelResetCB()
    cb.before_fit(Learn)
    assert cb.state_dict() == {}
    Learn.model.memory = torch.ones(2)
    Learn.model.pair = torch.ones(1), torch.zeros(1)
    kept = copy.deepcopy(cb.state_dict())
    Learn.model.reset()
    cb.load_state_dict(kept)
    assert Learn.model.memory.tolist() == [1, 1] and Learn.model.pair[1].tolist() == [0]
    cb.load_state_dict({})
    assert Learn.model.memory is None


def test_penalties_of_two_processes_weigh_their_rows():
    "Three rows here and one there: the mean over all four"
    class World:
        size = 2
        def sum(self, t): return torch.tensor([4., 3*2. + 1*10.])   # ours: 3 rows, 2.
    class Learn:
        world = World()
        def count(self): return 3
    w = torch.tensor(1., requires_grad=True)
    loss = _of_all(2*w, Learn())
    loss.backward()
    assert loss.item() == 4. and w.grad.item() == pytest.approx(2*2*3/4)
