from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from common import machine, trainer
from common.dataset import as_input, draw_practice
from common.network import build_network, predict_logits
from common.trainer import Recipe, Trainer, drawn_shares, fit, learning_rate_at, train_step
from evaluation import evaluate

CPU = torch.device("cpu")


def test_train_step_returns_the_loss_before_the_step_and_lowers_it(train):
    torch.manual_seed(0)
    net = build_network().eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    expected = nn.functional.cross_entropy(net(as_input(train.pictures)), train.labels).item()
    first = train_step(net, optimizer, as_input(train.pictures), train.labels)
    second = train_step(net, optimizer, as_input(train.pictures), train.labels)
    assert first == pytest.approx(expected, rel=0.02)
    assert second < first


QUICK = Recipe("quick", epochs=3, batch_size=16)


def test_same_seed_same_net_and_other_seed_other_net(train):
    nets = [fit(QUICK, train, seed, CPU) for seed in (0, 0, 1)]
    logits = [predict_logits(net, train.pictures) for net in nets]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_fit_learns_what_is_easy_and_takes_the_last_epoch(train, dev):
    epochs = []
    recipe = replace(QUICK, epochs=25, sampler="weighted", learning_rate=3e-3)
    net = fit(recipe, train, 0, CPU, after_epoch=lambda net, losses: epochs.append(losses))
    assert evaluate(net, dev)["g_mean"] > 0.9
    assert len(epochs) == 25
    assert all(len(losses) == 4 for losses in epochs)  # 60 pictures, 16 a batch
    assert np.mean(epochs[-1]) < 0.5 * np.mean(epochs[0])
    assert not net.training


def test_recipe_decides_when_transforms_start_and_rates_fall(train, monkeypatch):
    transformed, rates = [], []
    original_shift, original = trainer.flip_and_shift, trainer.train_step

    def spy_on_shift(*batch):
        transformed.append(1)
        return original_shift(*batch)

    def spy(net, optimizer, *batch):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(net, optimizer, *batch)

    monkeypatch.setattr(trainer, "flip_and_shift", spy_on_shift)
    monkeypatch.setattr(trainer, "train_step", spy)
    recipe = replace(
        QUICK, epochs=6, batch_size=60, plain_share=1 / 3, decay_share=1 / 3, decay_factor=0.1
    )
    fit(recipe, train, 0, CPU)
    assert len(transformed) == 4
    assert rates == pytest.approx([1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)


def test_kept_memory_changes_no_result(train):
    before = predict_logits(fit(QUICK, train, 0, CPU), train.pictures)
    machine.prepare_torch(threads=1)
    assert torch.equal(before, predict_logits(fit(QUICK, train, 0, CPU), train.pictures))


def test_a_run_that_goes_on_from_a_state_ends_like_one_that_never_stopped(train, monkeypatch):
    monkeypatch.setattr(trainer, "judge_by_folds", lambda *settings: doubting_logits(train.labels))
    mixing = {
        "network": "BestPair",
        "optimizer": "muon",
        "sampler": "weighted",
        "mixup": 0.5,
        "sketch_epochs": 1,
        "judge": QUICK,
        "average_weights": 0.9,
    }
    for changes in ({"sampler": "strict"}, mixing):
        recipe = replace(QUICK, epochs=4, plain_share=0.5, schedule="one-cycle", **changes)
        whole = fit(recipe, train, 0, CPU)
        first, second = (Trainer(recipe, train, 0, CPU) for _ in range(2))
        for _ in range(3):
            first.run_epoch()
        weights = {name: weight.clone() for name, weight in first.net.state_dict().items()}
        second.go_on_from(weights, first.state())
        assert second.epoch == 3
        second.run_epoch()
        for name, weight in whole.state_dict().items():
            assert torch.equal(second.net.state_dict()[name], weight)


def test_one_cycle_rises_for_a_tenth_and_falls_to_nothing():
    recipe = replace(QUICK, schedule="one-cycle", learning_rate=2.0)
    rates = [learning_rate_at(recipe, progress) for progress in (0, 0.05, 0.1, 0.55, 1)]
    assert rates == pytest.approx([0, 1, 2, 1, 0])


def test_steps_fall_when_their_share_is_over():
    recipe = replace(QUICK, decay_share=0.2, decay_factor=0.1, learning_rate=1.0)
    rates = [learning_rate_at(recipe, epoch / 10) for epoch in (0, 1, 2, 6, 9)]
    assert rates == pytest.approx([1, 1, 0.1, 1e-3, 1e-4])


def test_drawn_shares_go_from_the_sets_own_to_equal_ones():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([81, 16, 4]))
    weighted = replace(QUICK, sampler="weighted")
    assert drawn_shares(weighted, labels).tolist() == pytest.approx([1 / 3] * 3)
    by_root = drawn_shares(replace(weighted, balance=0.5), labels)
    assert by_root.tolist() == pytest.approx([9 / 15, 4 / 15, 2 / 15])
    as_they_come = drawn_shares(replace(weighted, balance=0.0), labels)
    assert as_they_come.tolist() == pytest.approx(drawn_shares(QUICK, labels).tolist())
    twice_cars = drawn_shares(replace(weighted, class_weights=(2.0, 1.0, 1.0)), labels)
    assert twice_cars.tolist() == pytest.approx([0.5, 0.25, 0.25])


def test_adjusted_logits_make_the_loss_that_of_the_drawn_shares(train):
    net = build_network().eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    pictures, prior = as_input(train.pictures), torch.tensor([0.6, 0.3, 0.1]).log()
    expected = nn.functional.cross_entropy(net(pictures) + prior, train.labels).item()
    loss = train_step(net, optimizer, pictures, train.labels, prior)
    assert loss == pytest.approx(expected, rel=0.02)


def doubting_logits(labels):
    """Logits of judges who are sure that the first two labels are wrong, and all others right."""
    thought = labels.clone()
    thought[:2] = (thought[:2] + 1) % 3
    return 9 * nn.functional.one_hot(thought, 3).float()


def test_what_judges_doubt_is_not_learnt_from(train, monkeypatch):
    monkeypatch.setattr(trainer, "judge_by_folds", lambda *settings: doubting_logits(train.labels))
    judged = Trainer(replace(QUICK, sampler="weighted", judge=QUICK), train, 0, CPU)
    judged.run_epoch()
    assert judged.labels.tolist() == [-1, -1, *train.labels[2:].tolist()]
    assert not {0, 1} & set(torch.cat([judged._draw_epoch() for _ in range(20)]).tolist())


def test_a_run_starts_from_what_sketches_have_taught_the_net(train):
    one_step = replace(QUICK, batch_size=len(train), schedule="one-cycle")  # the first, at rate 0
    net = fit(replace(one_step, epochs=1, sketch_epochs=2), train, 3, CPU)
    expected = fit(replace(one_step, epochs=2), draw_practice(len(train), 3), 3, CPU)
    for name, weight in expected.state_dict().items():
        assert torch.equal(net.state_dict()[name], weight)


def test_a_last_batch_of_one_picture_teaches_one_net_of_the_pair(train):
    recipe = replace(QUICK, network="BestPair", optimizer="muon", batch_size=len(train) - 1)
    assert predict_logits(fit(recipe, train, 0, CPU), train.pictures).isfinite().all()


def test_the_net_is_the_average_that_the_recipe_asks_for(train):
    averaged = Trainer(replace(QUICK, batch_size=60, average_weights=0.5), train, 0, CPU)
    start = averaged.net.fc3.bias.clone()
    averaged.run_epoch()  # of one step, of which the average keeps 1 / (1 + 10)
    expected = start / 11 + averaged.training_net.fc3.bias.detach() * 10 / 11
    assert torch.allclose(averaged.net.fc3.bias, expected, atol=1e-6)
    last = Trainer(QUICK, train, 0, CPU)
    last.run_epoch()
    assert torch.equal(last.net.fc3.bias, last.training_net.fc3.bias)
