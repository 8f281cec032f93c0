"""Every pair of callbacks in two processes: as in one, or refused in one sentence"""
import json

import pytest

from conftest import ROOT
from nntrain.processes import Processes
from pair_checks import Walk, faults, missing, stored

STORED = ROOT/'results'/'pairs'/'pairs.json'


@pytest.fixture(scope='module')
def answers():
    "What all pairs answer in two processes: takes a minute"
    assert not missing(), missing()
    with Processes(2) as two: return Walk(two).together()


def test_no_pair_is_silent(answers):
    assert all('processes' in its for its in answers.values())
    assert not (found := faults(answers)), '\n'.join(found)


def test_the_page_shows_what_is_found(answers):
    then = json.loads(STORED.read_text())['answers']
    for question, found in stored(answers).items():
        assert found == then[question], 'it has changed: run python scripts/pairs.py'
