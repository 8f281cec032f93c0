"Metrics, history, progress and comparisons: what the chapter on measuring shows once"
import contextlib
import io
import math
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nntrain.callback import Callback
from nntrain.compare import MomentumLearner, Runs, run_seeds, set_seed
from nntrain.data import DataLoaders
from nntrain.events import CancelPhase
from nntrain.history import (
    COLORS, RecorderCB, history_table, last_metric, plot_history)
from nntrain.learner import Learner
from nntrain.metrics import Accuracy, Mean, MetricsCB
from nntrain.prepare import SingleBatchCB
from nntrain.progress import ProgressCB, _TerminalScreen

X, Y = torch.randn(8, 3), torch.randint(0, 2, (8,))
BATCHES = list(zip(X.split(3), Y.split(3)))  # 3, 3 and 2 samples


def learner(*cbs, **kw):
    return Learner(
        nn.Linear(3, 2), DataLoaders(BATCHES, BATCHES), F.cross_entropy, cbs=cbs, **kw)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(2, 5))
def test_metrics_do_not_depend_on_the_cut_into_batches(sizes, n_classes):
    logits, targets = (
        torch.randn(sum(sizes), n_classes), torch.randint(0, n_classes, (sum(sizes),)))
    accuracy, loss = Accuracy(), Mean()
    for lg, tg in zip(logits.split(sizes), targets.split(sizes)):
        accuracy.update(lg, tg)
        loss.update(F.cross_entropy(lg, tg), len(tg))
    assert math.isclose(
        accuracy.compute().item(), (logits.argmax(1) == targets).float().mean().item(),
        abs_tol=1e-6)
    assert math.isclose(
        loss.compute().item(), F.cross_entropy(logits, targets).item(), rel_tol=1e-5)


def test_accuracy_per_pixel():
    "Class dimension 1, as in F.cross_entropy"
    accuracy = Accuracy()
    # (1, 2, 1, 2) and (1, 1, 2)
    accuracy.update(torch.tensor([[[[1., 0.]], [[0., 1.]]]]), torch.tensor([[[0, 0]]]))
    assert accuracy.compute().item() == .5


@pytest.mark.parametrize('shape', [(4, 1), (4, 1, 2, 2)])
def test_accuracy_of_one_number_per_sample(shape):
    logits = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    right = (logits > 0).float()
    with pytest.raises(
        ValueError, match=r'say where class 1 begins: Accuracy\(threshold=0'
    ):
        Accuracy().update(logits, right.squeeze(1))
    for preds, limit in (logits, 0.), (logits.sigmoid(), .5):
        for targets in right, right.squeeze(1), right.long():
            accuracy = Accuracy(threshold=limit)
            accuracy.update(preds, targets)
            assert accuracy.compute() == 1.
        wrong = Accuracy(threshold=limit)
        wrong.update(preds, 1-right)
        assert wrong.compute() == 0.
    with pytest.raises(ValueError, match='Accuracy wants'):
        Accuracy(0.0).update(logits, right[:2])


def test_accuracy_says_that_the_classes_come_last():
    with pytest.raises(
        ValueError, match=r'got \(4, 7, 3\) and \(4, 7\): the classes seem to come last'
    ):
        Accuracy().update(torch.zeros(4, 7, 3), torch.zeros(4, 7))
    with pytest.raises(ValueError, match='got tuple and'):
        Accuracy().update((1,), torch.zeros(4))
    class Sequence(Learner):
        def get_loss(self):
            self.loss = F.cross_entropy(self.preds.flatten(0, 1), self.yb.flatten())
    batches = [(torch.ones(4, 7, 3), torch.zeros(4, 7, dtype=torch.long))]
    learn = Sequence(
        nn.Linear(3, 2), DataLoaders(batches, batches), None,
        cbs=[MetricsCB(Accuracy())])
    with pytest.raises(ValueError, match='the classes seem to come last'): learn.fit(1)


class Several(Mean):
    "A metric that gives what it is told to give"
    def __init__(self, value): super().__init__(); self.value = value
    def update(self, preds, targets): self.n += len(targets)
    def compute(self): return self.value


@pytest.mark.parametrize(
    'value, names',
    [
        (torch.tensor([0.1, 0.2]), ['m_0', 'm_1']),
        (torch.tensor([0.5]), ['m']),
        (0.5, ['m']),
        (
            {'f1': torch.tensor(0.5), 'per': torch.tensor([0.1, 0.2])},
            ['f1', 'per_0', 'per_1']),
    ],
)
def test_metrics_that_give_several_numbers(value, names):
    learn = learner(MetricsCB(m=Several(value)))
    learn.fit(1)
    assert list(learn.history[0])[1:-1] == [
        f'{p}_{k}' for p in ('train', 'valid') for k in ['loss', *names]]
    assert all(isinstance(learn.history[0][f'valid_{k}'], float) for k in names)


def test_metrics_that_do_not_fit_into_a_row():
    with pytest.raises(ValueError, match=r"'m' gives a tensor of shape \(2, 2\)"):
        learner(MetricsCB(m=Several(torch.ones(2, 2)))).fit(1)
    with pytest.raises(ValueError, match='two metrics give train_f1'):
        learner(MetricsCB(m=Several({'f1': 1.}), f1=Several(1.))).fit(1)


def test_collections_of_torchmetrics():
    tm = pytest.importorskip('torchmetrics')
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
    both = tm.MetricCollection({'acc': MulticlassAccuracy(2, average='micro'),
                                'f1': MulticlassF1Score(2, average=None)})
    learn = learner(MetricsCB(Accuracy(), both))
    learn.fit(2)
    row = learn.history[-1]
    assert math.isclose(row['valid_accuracy'], row['valid_acc'], abs_tol=1e-6)
    assert {'train_f1_0', 'valid_f1_1'} <= set(row)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_means_of_16_bit_losses(dtype):
    mean = Mean()
    for i in range(3000):
        mean.update(torch.tensor(1.25 if i % 2 else 0.75, dtype=dtype), 1)
    assert mean.compute().dtype == torch.float32 and mean.compute() == 1.


def wrong_targets(y): return F.one_hot(y, 2).float()


def test_metrics_do_not_hide_what_was_wrong():
    batches = [(x, wrong_targets(y)) for x, y in BATCHES]
    learn = Learner(nn.Linear(3, 2), DataLoaders(batches, batches), F.cross_entropy,
                    cbs=[MetricsCB(Accuracy())])
    with pytest.raises(ValueError, match='Accuracy wants'): learn.fit(1)
    class Interrupt(Callback):
        def after_predict(self, learn): raise KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        learner(MetricsCB(Accuracy()), Interrupt()).fit(1)


@pytest.mark.parametrize(
    'loss',
    [
        partial(F.cross_entropy, ignore_index=0),
        nn.CrossEntropyLoss(torch.tensor([1.0, 5.0])),
        nn.CrossEntropyLoss(torch.tensor([1.0, 5.0]), ignore_index=1), F.cross_entropy],
)
def test_the_loss_of_an_epoch_is_that_of_all_its_samples(loss):
    targets = torch.tensor([0, 1, 1, 0, 0, 0, 1, 1])
    batches = list(zip(X.split(3), targets.split(3)))
    learn = Learner(
        nn.Linear(3, 2), DataLoaders(batches, batches), loss, cbs=[MetricsCB()])
    learn.fit(1, train=False)
    with torch.no_grad(): whole = loss(learn.model(X), targets).item()
    assert abs(learn.history[-1]['valid_loss'] - whole) < 1e-6


def test_a_batch_of_ignored_targets_does_not_spoil_the_epoch():
    batches = [(X[:4], torch.tensor([0, 1, -100, 0])), (X[4:], torch.full((4,), -100))]
    learn = Learner(nn.Linear(3, 2), DataLoaders(batches, batches), F.cross_entropy,
                    cbs=[MetricsCB()])
    learn.fit(1)
    assert math.isfinite(learn.history[-1]['train_loss'])
    assert all(p.isfinite().all() for p in learn.model.parameters())
    mean = Mean()                                  # a weight that stays on the device
    mean.update(torch.tensor(2.), torch.tensor(3.))
    mean.update(torch.tensor(math.nan), torch.tensor(0.))
    mean.update(torch.tensor(4.), 1)
    assert mean.compute() == 2.5


def test_one_transfer_per_phase(monkeypatch):
    "Metrics and recorder must not read the device batch by batch"
    reads = Counter()
    for method in 'item', 'tolist', '__float__', '__bool__', 'cpu':
        original = getattr(torch.Tensor, method)
        def counted(self, *args, _original=original, _method=method, **kw):
            reads[_method] += 1
            return _original(self, *args, **kw)
        monkeypatch.setattr(torch.Tensor, method, counted)
    learn = learner(
        MetricsCB(Accuracy()),
        RecorderCB(lr=lambda learn: learn.opt.param_groups[0]['lr']))
    learn.fit(3)
    # an epoch: one for the history, one for the recorder
    assert 0 < sum(reads.values()) <= 3*2, reads


def test_recorder_notes_numbers():
    recorder = RecorderCB(
        one=lambda learn: torch.ones(1), logits=lambda learn: learn.preds.detach())
    with pytest.raises(ValueError, match=r'logits gave a tensor of shape \(3, 2\)'):
        learner(recorder).fit(1)


def test_terminal_table_and_no_bar_in_a_log(capsys):
    learn = learner(MetricsCB(Accuracy()), ProgressCB())
    learn.fit(3)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == [
        'epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy',
        'seconds']
    assert [line.split()[0] for line in lines[1:]] == ['0', '1', '2'] and err == ''


def test_harness_keeps_seeds_apart():
    runs = run_seeds('x', lambda: learner(MetricsCB(Accuracy())), 1, [3, 4, 3])
    assert (
        runs.histories[0][0]['train_loss'] == runs.histories[2][0]['train_loss']
        != runs.histories[1][0]['train_loss'])


@pytest.mark.parametrize('seed', [10**20, -10**20, 1.5, True, 'one'])
def test_seeds_that_no_generator_takes_are_named(seed):
    with pytest.raises(ValueError, match='seed must be a whole number'): set_seed(seed)


# --- what the chapter shows in one case only

def test_seeds():
    def drawn(): return torch.rand(2).tolist(), random.random(), np.random.rand()
    draws = []
    for seed in 1, 1, 2: set_seed(seed); draws.append(drawn())
    assert draws[0] == draws[1] != draws[2]
    set_seed(1, deterministic=True); assert torch.are_deterministic_algorithms_enabled()
    set_seed(1); assert not torch.are_deterministic_algorithms_enabled()


def test_means_of_more_than_is_kept():
    mean = Mean()
    for i in range(2500): mean.update(torch.tensor(float(i % 2)), 1 + i % 2)
    torch.testing.assert_close(mean.compute(), torch.tensor(2/3))
    assert len(mean.values) < 1000
    copied = Mean()
    copied.load_state_dict(mean.state_dict())
    assert copied.compute() == mean.compute()


def test_names_of_metrics():
    learn = learner(MetricsCB(Accuracy(), also=Accuracy()))
    learn.fit(2)
    assert [row['epoch'] for row in learn.history] == [0, 1]
    assert list(learn.history[0])[1:-1] == [
        f'{phase}_{name}' for phase in ('train', 'valid')
        for name in ('loss', 'accuracy', 'also')]
    assert all(isinstance(v, float) for v in list(learn.history[0].values())[1:])
    for args, named in ([Accuracy(), Accuracy()], {}), ([], dict(loss=Accuracy())):
        with pytest.raises(ValueError, match='give each a name of its own'):
            MetricsCB(*args, **named)
    with pytest.raises(ValueError, match='Accuracy wants'):
        Accuracy().update(torch.zeros(4, 2), torch.zeros(4, 1))


def test_no_row_reports_training_as_validation():
    class Rarely(Callback):
        def before_phase(self, learn):
            if not learn.training and learn.epoch % 2 == 0: raise CancelPhase()
    learn = learner(MetricsCB(Accuracy()), Rarely())
    learn.fit(3)
    assert ['valid_loss' in row for row in learn.history] == [False, True, False]


def test_a_phase_that_is_left_early_is_recorded():
    recorder = RecorderCB()
    learn = learner(SingleBatchCB(), MetricsCB(Accuracy()), recorder)
    learn.fit(3)
    losses = [row['train_loss'] for row in learn.history]      # of one batch each
    assert len(losses) == 3 and losses == pytest.approx(recorder.values['loss'])


def test_what_was_counted_can_be_saved_in_the_middle_of_an_epoch():
    metrics = [MetricsCB(Accuracy()), MetricsCB(Accuracy())]
    class InTwo(Callback):
        "After the first batch, forget everything and put it back"
        order = 20
        def after_batch(self, learn):
            if learn.training and learn.iter == 0:
                state = metrics[1].state_dict()
                metrics[1].before_epoch(learn); metrics[1].before_phase(learn)
                metrics[1].load_state_dict(state)
    rows = []
    for m, cbs in zip(metrics, ([], [InTwo()])):
        set_seed(0)
        learn = learner(m, *cbs)
        learn.fit(1)
        rows.append(learn.history[0] | {'seconds': 0})
        assert m.state_dict() == {}
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match='the saved metrics are'):
        MetricsCB().load_state_dict({'metrics': {}, 'values': {}, 'seconds': 0})


GAP = [{'epoch': 0, 'train_loss': .5, 'seconds': 1.},
       {'epoch': 1, 'train_loss': .4, 'valid_loss': .6, 'seconds': 2.}]


def test_tables_of_a_history_with_gaps():
    assert history_table([]) == ''
    assert history_table(GAP).splitlines() == [
        '| epoch | train_loss | valid_loss | seconds |', '| --: | --: | --: | --: |',
        '| 0 | 0.5000 |  | 1.0 |', '| 1 | 0.4000 | 0.6000 | 2.0 |']
    heads = [history_table(h).splitlines()[0] for h in (GAP, GAP[::-1])]
    assert heads[0] == heads[1]
    plain = history_table(GAP[:1], plain=True).splitlines()
    assert plain[1] == '      0      0.5000      1.0'


def test_pictures_of_a_history_with_gaps():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    ax = plt.subplots()[1]
    for history in GAP, GAP[::-1]: plot_history(history, ax=ax)
    assert [line.get_label() for line in ax.lines] == ['train', 'valid']*2
    assert [line.get_color() for line in ax.lines] == [*COLORS[:2]]*2
    finite = [[math.isfinite(y) for y in line.get_ydata()] for line in ax.lines]
    assert finite == [[True, True], [False, True], [True, True], [True, False]]
    with pytest.raises(ValueError, match="no metric 'f1'"): plot_history(GAP, 'f1')
    plt.close('all')


def test_the_last_metric():
    assert last_metric(GAP, 'valid_loss') == .6
    with pytest.raises(ValueError, match="did you mean 'valid_loss'"):
        last_metric(GAP, 'val_loss')
    with pytest.raises(ValueError, match='MetricsCB'): last_metric([], 'valid_loss')


def test_the_terminal_gets_a_new_header_for_a_new_column():
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        screen = _TerminalScreen(plot=False)
        screen.start('1/1 train', 2, .2); screen.tick(); screen.stop()
        screen.row(GAP[:1]); screen.row(GAP); screen.row([*GAP, GAP[0]])
    first = [line.split()[0] for line in shown.getvalue().splitlines()]
    assert first == ['epoch', '0', 'epoch', '1', '0']


def test_a_recorder_can_be_saved():
    recorder = RecorderCB(lr=lambda learn: learn.opt.param_groups[0]['lr'])
    learner(recorder).fit(2)
    second = RecorderCB(lr=None)
    second.load_state_dict(recorder.state_dict())
    assert second.values == recorder.values and len(recorder.values['loss']) == 6


def test_runs():
    runs = run_seeds('x', lambda: learner(MetricsCB(Accuracy())), 2, [1, 2, 1])
    assert runs.values[0] == runs.values[2]
    assert math.isclose(runs.mean, sum(runs.values)/3) and '(n=3, 2 epochs' in str(runs)
    assert math.isnan(Runs('one', [.5], [1], [0], 1, []).se)
    assert '±' not in str(Runs('one', [.5], [1], [0], 1, []))
    with pytest.raises(ValueError, match="no metric 'f1'"):
        run_seeds('x', lambda: learner(MetricsCB()), 1, [0], metric='f1')
    with pytest.raises(ValueError, match='at least one seed'):
        run_seeds('x', learner, 1, [])


def test_momentum_by_keeping_the_gradient():
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    learn = MomentumLearner(model, DataLoaders(BATCHES, BATCHES), F.cross_entropy)
    before = model[0].weight.clone()
    learn.fit(1)                          # `p.grad is None` for frozen parameters
    assert torch.equal(model[0].weight, before)
    for bad in 1, -.1, True:
        with pytest.raises(ValueError, match='momentum must lie in'):
            MomentumLearner(model, None, None, momentum=bad)
