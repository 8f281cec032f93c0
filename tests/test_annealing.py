"""The callbacks that anneal: when they cut the rate, and who else may write it."""
import pytest
import torch
from torch import nn

from nntrain.annealing import AnnealCB, AutoAnnealCB, _divide_rates
from nntrain.data import DataLoaders
from nntrain.callback import Callback
from nntrain.events import CancelPhase
from nntrain.learner import Learner
from nntrain.sgd import SGD


def fit(grads, cb, n_epochs=1):
    batches = [(torch.tensor([[g]]), torch.zeros(1, 1)) for g in grads]
    learn = Learner(
        nn.Linear(1, 1, bias=False), DataLoaders(batches, []),
        lambda preds, y: preds.sum(), SGD, lr=1.0, cbs=[cb])
    learn.fit(n_epochs, valid=False)
    return cb


def test_the_annealer_waits_for_the_running_minimum_to_halve():
    assert fit([2.0, 1.5, 1.4, 3.0, 1.0, 0.9], AutoAnnealCB(every='batch')).lrs == [
        1.0, 1.0, 0.25, 0.25, 0.25, 0.0625]
    cb = AutoAnnealCB(share=.9, factor=2.)
    # the same gradients each epoch: never less
    assert fit([2., 1.], cb, n_epochs=3).lrs == [1., 1., 1.]
    # a second fit starts fresh
    assert fit([2., 1.], cb, n_epochs=1).lrs == [1.]
    for bad in dict(share=1.), dict(share=0.), dict(factor=1.), dict(every='step'):
        with pytest.raises(ValueError): AutoAnnealCB(**bad)


def test_the_annealer_forgets_the_batches_of_an_interrupted_phase():
    """The first epoch is left after two batches; the mean of the second must not count
    them"""
    class Leave(Callback):
        order = 90
        def after_batch(self, learn):
            if learn.epoch == 0 and learn.iter == 1: raise CancelPhase
    batches = [(torch.tensor([[g]]), torch.zeros(1, 1)) for g in (100., 100., 1.)]
    cb = AutoAnnealCB()
    learn = Learner(nn.Linear(1, 1, bias=False), DataLoaders(batches, []),
                    lambda preds, y: preds.sum(), SGD, lr=1., cbs=[cb, Leave()])
    learn.fit(2, valid=False)
    assert cb.seen == [pytest.approx((1e4 + 1e4 + 1)/3)]


@pytest.mark.parametrize('tensor', [False, True])
def test_the_annealer_cuts_each_rate_once(tensor):
    "Groups that were given no rate of their own share the tensor of the constructor"
    ps = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    opt = SGD(
        [{'params': ps[:1]}, {'params': ps[1:]}],
        lr=torch.tensor(1.0) if tensor else 1.0)
    _divide_rates(opt.param_groups, 4.)
    assert [float(g['lr']) for g in opt.param_groups] == [.25, .25]
    assert AutoAnnealCB.owns == ('lr',)


def test_the_annealer_goes_on_from_its_state():
    cut = fit([2., 2., 1.5, 1.4, 1.4, 3., 1., .98], AutoAnnealCB(every='batch'))
    # squares: 4, 4, 2.25, 1.96 (a cut), 1.96, 9, 1, .96 (a cut)
    assert cut.lrs == [1., 1., 1., .25, .25, .25, .25, 1/16]
    again = AutoAnnealCB()
    again.load_state_dict(cut.state_dict())
    assert (again.level, again.seen) == (cut.level, cut.seen)


def test_gradients_in_float16_do_not_overflow_the_annealer():
    model = nn.Linear(1, 1, bias=False).half()
    cb = AutoAnnealCB(every='batch')
    cb.before_fit(None)
    # its square is above 65,504
    model.weight.grad = torch.full((1, 1), 300., dtype=torch.float16)
    class Fit: opt = SGD(model.parameters(), lr=1.)
    Fit.model = model
    cb.after_backward(Fit)
    assert cb.seen == [9e4]


def test_two_that_write_the_rate_do_not_train_together():
    batches = [(torch.ones(2, 1), torch.zeros(2, 1))]
    def learner(*cbs):
        dls = DataLoaders(batches, batches)
        return Learner(
            nn.Linear(1, 1), dls, nn.functional.mse_loss, SGD, lr=0.1, cbs=cbs)
    class Half(Callback):
        owns = ('lr',)
    for pair in [AnnealCB(), Half()], [AnnealCB(per='epoch'), AnnealCB()]:
        with pytest.raises(ValueError, match="would both write lr"):
            learner(*pair).fit(1)
    learner(AnnealCB()).fit(1)
