"""Parameter groups with parts of their own"""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from optimizer_checks import ALL, Split, adam, by_shape, parameters, set_gradients
from optimizer_checks import OneAdamW
from torch import nn
from torch.optim import lr_scheduler

import nntrain.steering  # noqa: F401  adds fit_one_cycle
from nntrain.average import WeightAveragingCB
from nntrain.clip import GradientClipCB
from nntrain.compose import compose, needs
from nntrain.data import DataLoaders
from nntrain.learner import Learner
from nntrain.parts import add_decay, average_grad, sgd_step
from nntrain.split import Split as Base
from nntrain.split import split
from nntrain.zoo import LAMB


def some_groups(ps): return ps[::3], ps[1:3]     # with several axes, and the others


@pytest.mark.parametrize('foreach', [True, False])
def test_one_split_optimizer_is_two_optimizers(foreach):
    ps, qs = parameters(0), parameters(0)
    one = Split(ps, lr=.01, foreach=foreach, matrix=dict(betas=(.8, .9)),
                rest=dict(weight_decay=.1, lr=.03))
    matrix, rest = some_groups(qs)
    two = (LAMB(matrix, lr=.01, betas=(.8, .9), foreach=foreach),
           OneAdamW(rest, lr=.03, weight_decay=.1, foreach=foreach))
    gen = torch.Generator().manual_seed(1)
    for _ in range(20):
        set_gradients(gen, ps, qs)
        for opt in (one, *two): opt.step()
    assert all(p.equal(q) for p, q in zip(ps, qs))


def test_what_a_call_sets_for_one_kind_beats_what_it_sets_for_all():
    made = split(dict(a=LAMB, b=OneAdamW), lambda name, p: 'a' if p.ndim else 'b',
                 lr=.1, b=dict(lr=.2))
    ps = parameters(0)
    def rates(**hypers): return [g['lr'] for g in made(ps, **hypers).param_groups]
    assert rates() == [.1, .2]
    assert rates(lr=.3) == [.3, .3]
    assert rates(lr=.3, a=dict(lr=.4)) == [.4, .3]
    assert rates(b=dict(lr=.5)) == [.1, .5]
    group = dict(params=ps, lr=.6)
    assert [g['lr'] for g in made([group]).param_groups] == [.6, .6]
    assert group == dict(params=ps, lr=.6)                   # is only read


def test_groups_may_say_their_kind_and_come_in_any_order():
    ps = parameters(0)
    groups = [dict(params=ps[:1], kind='rest', lr=.2), dict(params=ps[1:])]
    opt = Split(groups, lr=.1)
    assert [(g['kind'], g['lr'], len(g['params'])) for g in opt.param_groups] == [
        ('rest', .2, 1), ('matrix', .1, 1), ('rest', .1, 2)]
    without = split(dict(matrix=LAMB, rest=OneAdamW))
    assert without([dict(params=ps, kind='matrix')]).param_groups[0]['kind'] == 'matrix'


def test_the_rule_sees_names_where_there_are_some():
    seen = []
    def rule(name, p):
        seen.append((name, p.shape))
        return 'all'
    made, model = split(dict(all=OneAdamW), rule), nn.Linear(2, 3)
    opt = made(model.named_parameters(), lr=.1)
    assert seen == [('weight', (3, 2)), ('bias', (3,))]
    assert opt.param_groups[0]['param_names'] == ['weight', 'bias']
    made(model.parameters(), lr=.1)
    assert seen[2:] == [(None, (3, 2)), (None, (3,))]


@pytest.mark.parametrize('make, error, text', [
    (lambda: split({}, by_shape), ValueError,
     'at least one name and its parts, got {}'),
    (lambda: split([LAMB], by_shape), ValueError, 'kinds must be a dict'),
    (lambda: split(dict(a=())), ValueError, "kind 'a' needs a tuple of parts"),
    (lambda: split(dict(a=torch.optim.AdamW)), ValueError, "kind 'a' needs a tuple"),
    (lambda: split(dict(a=(average_grad,))), ValueError,
     "kind 'a': no part asks for p"),
    (lambda: split(dict(a=(sgd_step, 3))), TypeError, 'a part must be a function'),
    (lambda: split(dict(a=LAMB), 'a'), TypeError, 'rule must be a function'),
    (lambda: split(dict(lr=LAMB)), ValueError, r"the name of a setting, \['lr'\]"),
    (lambda: split(dict(params=LAMB)), ValueError, 'the name of a setting'),
    (lambda: split(dict(a=LAMB), momentum=.9), TypeError,
     "no hyperparameter 'momentum'"),
    (lambda: Base(parameters()), TypeError, r'call split\(…\)'),
    (lambda: Split(parameters(), rest=.1), TypeError,
     'takes a dict of hyperparameters'),
    (lambda: Split(parameters(), rest=dict(max_trust=1.)), TypeError,
     "kind 'rest', has"),
    (lambda: Split(parameters(), lr=-1), ValueError,
     'lr must be a number of at least 0'),
    (lambda: Split(parameters(), rest=dict(lr=-1)), ValueError, 'lr must be a number'),
    (lambda: Split([]), ValueError, 'no parameters to optimize'),
    (lambda: Split([dict(params=parameters(), kind='x')]), ValueError,
     r"is of kind 'x'; there are \['matrix', 'rest'\]"),
    (lambda: Split([dict(params=parameters(), mom=1)]), TypeError, "parameter 'mom'"),
    (lambda: Split([dict(params=parameters(), kind='rest', max_trust=1.)]), TypeError,
     "no hyperparameter 'max_trust'"),
    (lambda: split(dict(a=(sgd_step,)), lambda name, p: 'a')(parameters()), TypeError,
     'needs a value for lr'),
    (lambda: Split([3]), TypeError, 'optimizer can only optimize Tensors')])
def test_bad_kinds_rules_and_settings_are_named(make, error, text):
    with pytest.raises(error, match=text): make()


@pytest.mark.parametrize('answer, text', [
    (None, r'no kind takes parameter weight of shape \(2, 3\), since the rule'),
    ('c', "the rule returned 'c': return one of"),
    (('a', 'b'), r"gives parameter weight of shape \(2, 3\) to 2 kinds, \['a', 'b'\]"),
    (['a'], 'no kind takes parameter weight'), (1, 'no kind takes parameter weight')])
def test_a_parameter_that_no_kind_takes_or_two_is_named(answer, text):
    made = split(dict(a=LAMB, b=OneAdamW), lambda name, p: answer)
    with pytest.raises(ValueError, match=text):
        made(nn.Linear(3, 2).named_parameters(), lr=.1)
    with pytest.raises(ValueError, match='since there is no rule'):
        split(dict(a=LAMB))(parameters(), lr=.1)


def test_a_saved_state_fits_its_own_kinds_only():
    ps = parameters(0)
    saved = Split(ps, lr=.1).state_dict()
    turned = Split([dict(params=ps[1:3], kind='rest'),
                    dict(params=ps[::3], kind='matrix')], lr=.1)
    with pytest.raises(ValueError, match=r"kinds \['matrix', 'rest'\], those of Split"):
        turned.load_state_dict(saved)
    for group in saved['param_groups']: del group['kind']
    with pytest.raises(ValueError, match=r'of the kinds \[None, None\]'):
        Split(ps, lr=.1).load_state_dict(saved)


def test_copies_and_pickles_remember_what_each_kind_was_given():
    opt = Split(parameters(0), lr=.1, rest=dict(lr=.2))
    for again in copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)):
        again.add_param_group(dict(params=[nn.Parameter(torch.ones(1))]))
        assert [g['lr'] for g in again.param_groups] == [.1, .2, .2]


def _learner(opt_func, *cbs):
    torch.manual_seed(0)
    rows = [(torch.randn(6), i % 3) for i in range(40)]
    dls = DataLoaders.from_dataset_dict(dict(train=rows, valid=rows[:8]), 8, seed=1,
                                        collate_fn=_collate)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return Learner(model, dls, F.cross_entropy, opt_func, .05, list(cbs))

def _collate(rows): return torch.stack([x for x, _ in rows]), torch.tensor(
    [y for _, y in rows])


def test_with_a_schedule_each_kind_keeps_its_share_of_the_rate():
    def make(params, lr): return Split(params, lr=lr, rest=dict(lr=lr/10))
    learn = _learner(make, GradientClipCB(1.), WeightAveragingCB(.9))
    learn.fit_one_cycle(2, [.05, .005])
    matrix, rest = (group['lr'] for group in learn.opt.param_groups)
    assert rest == pytest.approx(matrix/10)
    ps = parameters(0)
    opt = Split(ps, lr=.1, rest=dict(lr=.01))
    cycle = lr_scheduler.OneCycleLR(opt, max_lr=[.1, .01], total_steps=11)
    for _ in range(10):
        opt.step()
        cycle.step()
    assert ALL['Split'] is Split and opt.param_groups[0]['lr'] < 1e-3


def test_parts_alone_make_a_kind():
    plain = split(dict(all=(*adam, add_decay, sgd_step)), lambda name, p: 'all', lr=.1)
    ps, qs = parameters(0), parameters(0)
    mine, theirs = plain(ps), compose(*adam, add_decay, sgd_step)(qs, lr=.1)
    gen = torch.Generator().manual_seed(1)
    for _ in range(5):
        set_gradients(gen, ps, qs)
        mine.step()
        theirs.step()
    assert all(p.equal(q) for p, q in zip(ps, qs))


def test_groups_are_added_all_or_not_at_all():
    opt, more = Split(parameters(0), lr=.1), parameters(1)
    with pytest.raises(ValueError, match='lr must be a number'):
        opt.add_param_group(dict(params=more, lr=-1))
    assert len(opt.param_groups) == 2

    @needs(axes=2)
    def flat_step(p, update, *, lr): p -= lr*update
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    made = split(dict(a=OneAdamW, b=(flat_step,)), lambda name, p: 'ab'[p is one])
    opt = made([two], lr=.1)
    with pytest.raises(ValueError, match='flat_step takes tensors with 2 axes or more'):
        opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2)), one]))
    assert [len(group['params']) for group in opt.param_groups] == [1]
    with pytest.raises(ValueError, match=r'number 0 has shape \(3,\): see `split`'):
        compose(flat_step)([one], lr=.1)
