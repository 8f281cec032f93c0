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
from nntrain.processes import Processes
from nntrain.sequences import ModelResetCB, RNNRegularizerCB
from nntrain.steering import ScheduleCB
from nntrain.trial import (failure, first_difference, fit_once, quiet_folder,
                           small_learner, without_chance)
from pair_checks import PAIRS, QUESTIONS, Walk, faults, missing, stored

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
