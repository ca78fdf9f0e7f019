import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from common import attacks, metrics
from common.cli import PROJECT, UserError
from common.data import CLASS_NAMES, to_float
from common.model import build_model, predict_logits
from common.recipes import NAIVE, TUNED
from common.train import (
    IGNORE_INDEX,
    MAX_SHIFT,
    Muon,
    Run,
    augment,
    color_jitter,
    compute_loss,
    cross_val_logits,
    cutout,
    draw_balanced,
    draw_indices,
    filter_labels,
    make_folds,
    make_optimizer,
    make_scheduler,
    mixup,
    orthogonalize,
    parallel_map,
    random_flip_and_crop,
    same_layout,
    sampled_prior,
    train,
)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_dataset
from scipy.stats import beta, chisquare, kstest
from torch import nn

CPU = torch.device("cpu")
QUICK = replace(NAIVE, epochs=3, batch_size=16)
BALANCED = replace(NAIVE, sampler="balanced")
WEIGHTED = replace(NAIVE, sampler="weighted", sampling_exponent=0.5)
# Everything that has a state: two optimizers, schedules, an average, batch norm.
STATEFUL = replace(
    TUNED,
    network="SmallVGG",
    epochs=2,
    batch_size=32,
    cutout=10,
    mixup=0.2,
    epsilon=8 / 255,
    trades_beta=4.0,
    ema_decay=0.9,
    threads=1,
)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Compute in float32 on machines with bfloat16 too, to compare digits."""
    monkeypatch.setattr("common.train.autocast", lambda device: nullcontext())


def labels_of(*counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def assert_equal_weights(model, other):
    for (name, weight), expected in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, expected), name


# ---- samplers -------------------------------------------------------------------------------


def test_shuffle_draws_each_image_once_an_epoch():
    torch.manual_seed(0)
    order = draw_indices(QUICK, labels_of(100, 20, 5))
    assert order.sort(dim=1).values.tolist() == [list(range(125))] * QUICK.epochs
    assert not torch.equal(order[0], order[1])


def test_balanced_counts_differ_by_at_most_1_at_any_time():
    torch.manual_seed(0)
    labels = labels_of(100, 20, 5)
    drawn = labels[draw_balanced(labels, 125)]
    assert sorted(Counter(drawn.tolist()).values()) == [41, 42, 42]
    order = draw_indices(replace(BALANCED, epochs=7), labels).flatten()
    so_far = F.one_hot(labels[order]).cumsum(dim=0)
    assert (so_far.amax(dim=1) - so_far.amin(dim=1)).max() == 1


def test_balanced_breaks_ties_evenly_and_draws_members_evenly_and_with_replacement():
    torch.manual_seed(0)
    labels = labels_of(6, 3, 3)
    order = draw_indices(replace(BALANCED, epochs=1000), labels)
    first = torch.bincount(labels[order[:, 0]])
    assert chisquare(first).pvalue > 0.001
    counts = torch.bincount(order.flatten(), minlength=12)
    for label in range(3):
        assert chisquare(counts[labels == label]).pvalue > 0.001
    # Of the first two cars drawn, one in six pairs is twice the same.
    cars = torch.stack([row[row < 6][:2] for row in order])
    repeated = (cars[:, 0] == cars[:, 1]).sum().item()
    assert chisquare([repeated, 1000 - repeated], [1000 / 6, 5000 / 6]).pvalue > 0.001


def test_weighted_draws_as_torchs_sampler_does():
    labels = labels_of(81, 16, 4)
    torch.manual_seed(3)
    drawn = draw_indices(replace(WEIGHTED, epochs=50), labels)
    torch.manual_seed(3)
    # Classes in the ratio of the roots of their sizes, 9 : 4 : 2.
    weights = torch.tensor([9 / 81, 4 / 16, 2 / 4])[labels]
    theirs = torch.utils.data.WeightedRandomSampler(weights, 50 * 101)
    assert drawn.flatten().tolist() == list(theirs)
    counts = torch.bincount(labels[drawn.flatten()])
    assert chisquare(counts, 5050 * np.array([9, 4, 2]) / 15).pvalue > 0.001


@pytest.mark.parametrize("recipe", [NAIVE, BALANCED, WEIGHTED], ids=lambda recipe: recipe.sampler)
def test_samplers_follow_torchs_seed(recipe):
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(draw_indices(recipe, labels_of(50, 9, 5)).tolist())
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (NAIVE, [81, 16, 4]),
        (BALANCED, [1, 1, 1]),
        (replace(WEIGHTED, sampling_exponent=0.0), [1, 1, 1]),
        (replace(WEIGHTED, sampling_exponent=0.5), [9, 4, 2]),
        (replace(WEIGHTED, sampling_exponent=1.0), [81, 16, 4]),
    ],
)
def test_sampled_prior_by_hand(recipe, expected):
    prior = sampled_prior(recipe, labels_of(81, 16, 4))
    assert prior.tolist() == pytest.approx(np.array(expected) / sum(expected))


def test_a_class_without_images_is_never_expected():
    assert sampled_prior(BALANCED, labels_of(5, 3, 0)).tolist() == [0.5, 0.5, 0]


# ---- augmentation ---------------------------------------------------------------------------


def test_flip_and_crop_takes_each_of_the_crops_of_a_padded_image_equally_often():
    torch.manual_seed(0)
    image = torch.rand(3, 10, 14)
    padded = np.pad(image.numpy(), [(0, 0), (MAX_SHIFT,) * 2, (MAX_SHIFT,) * 2], mode="reflect")
    crops = {}
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 10, left : left + 14]
            crops[crop.tobytes()] = (top, left, "as it is")
            crops[crop[:, :, ::-1].tobytes()] = (top, left, "mirrored")
    assert len(crops) == 162
    # Copies of one image in one batch: each is changed on its own.
    changed = random_flip_and_crop(image.expand(4050, -1, -1, -1)).numpy()
    counts = Counter(crops[each.tobytes()] for each in changed)
    assert chisquare([counts[crop] for crop in crops.values()]).pvalue > 0.001


def test_flip_and_crop_leaves_each_image_in_its_place():
    torch.manual_seed(0)
    images = torch.arange(50.0)[:, None, None, None].expand(-1, 3, 32, 32)
    assert torch.equal(random_flip_and_crop(images), images)


def test_color_jitter_equals_its_formula_image_by_image():
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    changed = color_jitter(images, 0.4)
    torch.manual_seed(0)
    contrast = torch.empty(20).uniform_(0.6, 1.4)
    balance = torch.empty(20, 3).uniform_(0.8, 1.2)
    brightness = torch.empty(20).uniform_(-0.2, 0.2)
    for i, image in enumerate(images.numpy()):
        mean = image.mean()
        for channel in range(3):
            expected = (image[channel] - mean) * contrast[i].item()
            expected += mean * balance[i, channel].item() + brightness[i].item()
            assert changed[i, channel].numpy() == pytest.approx(expected.clip(0, 1), abs=1e-6)


def test_color_jitter_keeps_the_range_and_strength_0_changes_nothing():
    torch.manual_seed(0)
    images = torch.rand(50, 3, 32, 32).round()  # black and white: clipped at both ends
    changed = color_jitter(images, 1.0)
    assert (changed.min(), changed.max()) == (0, 1)
    assert torch.allclose(color_jitter(images, 0.0), images, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 10])
def test_cutout_grays_out_one_square_with_its_center_anywhere(size):
    torch.manual_seed(0)
    images = torch.rand(6400, 1, 16, 20) / 3
    changed = cutout(images, size)
    grayed = (changed != images)[:, 0]
    assert torch.equal(changed, images.masked_fill(grayed[:, None], 0.5))
    rows, columns = grayed.any(dim=2), grayed.any(dim=1)
    assert torch.equal(grayed, rows[:, :, None] & columns[:, None, :])  # a rectangle
    for inside in (rows, columns):
        side, start = inside.shape[1], inside.float().argmax(dim=1)
        length = inside.sum(dim=1)
        steps = torch.arange(side)
        assert torch.equal(inside, (steps >= start[:, None]) & (steps < (start + length)[:, None]))
        assert length.max() == size
        assert length.min() == (size + 1) // 2  # at most half of it sticks out
        # The square's center, or the pixel left of it, is any pixel equally often.
        last = start + length - 1
        first = torch.where(start > 0, start, last + 1 - size)
        assert chisquare(torch.bincount(first + (size - 1) // 2, minlength=side)).pvalue > 0.001


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_blends_each_image_with_another_by_a_fraction_of_its_own(alpha):
    torch.manual_seed(0)
    images, labels = torch.eye(800)[:, None, None], torch.arange(800) % 3
    mixed, targets = mixup(images, labels, alpha)
    shares = mixed[:, 0, 0]  # what each image is made of
    own, others = shares.diagonal(), shares - shares.diagonal().diag()
    fraction, other = others.max(dim=1)
    mixed_ones = fraction > 0
    assert torch.allclose(own + fraction, torch.ones(800))
    assert own.min() >= 0.5
    assert len(set(other[mixed_ones].tolist())) == mixed_ones.sum() > 780  # by a permutation
    # The smaller of the two fractions that a draw from Beta(alpha, alpha) gives.
    drawn = fraction[mixed_ones].numpy()
    assert kstest(drawn, lambda x: 2 * beta.cdf(np.minimum(x, 0.5), alpha, alpha)).pvalue > 0.001
    expected = own[:, None] * F.one_hot(labels) + fraction[:, None] * F.one_hot(labels[other])
    assert torch.allclose(targets, expected, atol=1e-6)


def test_images_are_augmented_as_the_recipe_says():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(augment(images, NAIVE, False), to_float(images))
    for recipe, flip_and_crop in (
        (NAIVE, True),
        (replace(NAIVE, color_jitter=0.3), False),
        (replace(NAIVE, cutout=4), False),
    ):
        assert not torch.equal(augment(images, recipe, flip_and_crop), to_float(images))


def test_flips_and_crops_start_in_the_epoch_that_the_recipe_names(monkeypatch):
    seen = []

    def spy(images, recipe, flip_and_crop):
        seen.append(flip_and_crop)
        return augment(images, recipe, flip_and_crop)

    monkeypatch.setattr("common.train.augment", spy)
    for start, steps in ((2, 8), (None, 12)):  # four steps an epoch
        seen.clear()
        train(replace(QUICK, augment_from=start), make_dataset(), 0, CPU)
        assert seen == [False] * steps + [True] * (12 - steps)


# ---- schedules and optimizers ---------------------------------------------------------------


def rates_of(recipe, steps_per_epoch):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make_scheduler(optimizer, recipe, steps_per_epoch)
    rates = []
    for _ in range(recipe.epochs * steps_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def test_warmup_cosine_rises_for_a_tenth_and_then_falls_as_torchs_cosine():
    recipe = replace(QUICK, schedule="warmup-cosine", epochs=20)
    rates = rates_of(recipe, 5)
    assert rates[:10] == pytest.approx(np.linspace(0.1, 1.9, 10))
    assert rates.max() == pytest.approx(2.0, rel=0.01)
    assert 0 < rates[-1] < 0.01
    # Our rates are those of the middle of each step: the odd ones of twice as many.
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=180)
    expected = []
    for _ in range(180):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert rates[10:] == pytest.approx(expected[1::2])


def test_step_schedule_is_torchs_by_epochs_and_constant_is_constant():
    recipe = replace(QUICK, schedule="step", step_size=2, gamma=0.3, epochs=6)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.3)
    expected = []
    for _ in range(6):
        expected += [optimizer.param_groups[0]["lr"]] * 4
        optimizer.step()
        theirs.step()
    assert rates_of(recipe, 4) == pytest.approx(expected)
    assert set(rates_of(QUICK, 4)) == {2.0}


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (16, 16), (1, 9), (9, 1)])
def test_orthogonalize_keeps_singular_vectors_and_makes_the_values_about_1(shape):
    generator = np.random.default_rng(0)
    left, _ = np.linalg.qr(generator.standard_normal((shape[0], min(shape))))
    right, _ = np.linalg.qr(generator.standard_normal((shape[1], min(shape))))
    values = np.geomspace(1, 0.02, min(shape))
    matrix = torch.tensor(left * values @ right.T, dtype=torch.float32)
    turned = left.T @ orthogonalize(matrix).numpy() @ right
    assert turned == pytest.approx(np.diag(np.diag(turned)), abs=1e-4)
    assert 0.65 < np.diag(turned).min() <= np.diag(turned).max() < 1.25


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_move_as_with_torchs_muon(shape, weight_decay):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    optimizers = (
        Muon([ours], 0.01, weight_decay),
        torch.optim.Muon([theirs], 0.01, weight_decay, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()  # theirs computes in bfloat16, to two or three digits
    assert (ours - theirs).norm() < 0.03 * moved


def test_muon_moves_a_convolution_like_the_matrix_of_its_filters():
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(8, 27))
    kernels = nn.Parameter(matrix.detach().view(8, 3, 3, 3).to(memory_format=torch.channels_last))
    matrix.grad = torch.randn(8, 27)
    kernels.grad = matrix.grad.view(8, 3, 3, 3)
    Muon([matrix, kernels], 0.1, 0.0).step()
    assert torch.allclose(kernels.flatten(1), matrix, atol=1e-6)


def test_muon_moves_biases_and_norms_like_matrices_of_one_row_without_decay():
    weight, bias = torch.ones(1, 4), torch.ones(4)
    for value in (weight, bias):
        value.grad = torch.tensor([3.0, 0.0, 4.0, 0.0]).view_as(value)
    Muon([weight, bias], 0.1, 0.5).step()
    step = torch.tensor([0.6, 0.0, 0.8, 0.0]) * 0.1 * 0.2 * 4**0.5  # direction, rate, size
    assert torch.allclose(bias, 1 - step)
    assert torch.allclose(weight[0], 1 - step - 0.1 * 0.5)  # weight decay is for matrices


@pytest.mark.parametrize(("optimizer", "kind"), [("adam", torch.optim.Adam), ("muon", Muon)])
def test_the_optimizer_moves_every_weight_of_a_model(optimizer, kind):
    model = build_model("SmallVGG")
    made = make_optimizer(model, replace(QUICK, optimizer=optimizer))
    assert type(made) is kind
    moved = [weight for group in made.param_groups for weight in group["params"]]
    assert {id(weight) for weight in moved} == {id(weight) for weight in model.parameters()}


# ---- the loss -------------------------------------------------------------------------------


def batch_of(count):
    dataset = make_dataset(counts=(count, count, count))
    return to_float(dataset.images), dataset.labels


def test_training_adjusts_by_the_prior_of_what_is_drawn(monkeypatch):
    seen = []

    def spy(model, images, targets, recipe, log_prior):
        seen.append(log_prior)
        return compute_loss(model, images, targets, recipe, log_prior)

    monkeypatch.setattr("common.train.compute_loss", spy)
    recipe = replace(WEIGHTED, epochs=1, logit_adjustment=1.2)
    train(recipe, make_dataset(counts=(36, 16, 4)), 0, CPU)
    expected = 1.2 * torch.tensor([6 / 12, 4 / 12, 2 / 12]).log()  # roots of the counts
    torch.testing.assert_close(seen[0], expected)


def test_logit_adjustment_adds_the_log_prior():
    torch.manual_seed(0)
    model, (images, labels) = build_model().eval(), batch_of(4)
    prior = torch.tensor([0.7, 0.2, 0.1])
    loss = compute_loss(model, images, labels, QUICK, 1.2 * prior.log())
    odds = model(images).double().exp() * prior.double() ** 1.2
    expected = -(odds / odds.sum(dim=1, keepdim=True))[range(12), labels].log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_trades_loss_equals_its_formula_and_its_inner_step_leaves_batch_norm_alone():
    torch.manual_seed(0)
    model, (images, labels) = build_model("SmallVGG").train(), batch_of(4)
    recipe, log_prior = replace(STATEFUL, trades_beta=4.0), torch.tensor([-1.0, -2.0, -3.0])
    other = build_model("SmallVGG").train()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    loss = compute_loss(model, images, labels, recipe, log_prior)
    torch.manual_seed(1)
    attacked = attacks.trades_perturbation(other.eval(), images, 8 / 255)
    logits, attacked_logits = other.train()(torch.cat([images, attacked])).split(12)
    clean = nn.CrossEntropyLoss()(logits + log_prior, labels)
    divergence = nn.KLDivLoss(reduction="batchmean")(
        nn.LogSoftmax(dim=1)(attacked_logits), nn.Softmax(dim=1)(logits)
    )
    assert divergence > 0
    assert loss.item() == pytest.approx((clean + 4.0 * divergence).item(), rel=1e-5)
    assert_equal_weights(model, other)  # statistics of batch norm: of one forward pass
    assert model.training


# ---- the loop -------------------------------------------------------------------------------


def plain_loop(dataset, seed, epochs, batch_size):
    """Train as a tutorial would, with the same random numbers."""
    torch.manual_seed(seed)
    orders = [torch.randperm(len(dataset)) for _ in range(epochs)]
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for epoch in range(epochs):
        torch.manual_seed(1_000_003 * seed + epoch)
        model.train()
        for start in range(0, len(dataset), batch_size):
            index = orders[epoch][start : start + batch_size]
            optimizer.zero_grad()
            logits = model(dataset.images[index].float() / 255)
            loss = nn.CrossEntropyLoss()(logits, dataset.labels[index])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model, losses


def test_naive_equals_the_plainest_loop():
    dataset, losses = make_dataset(), []

    def after_epoch(run, of_epoch):
        losses.extend(of_epoch)
        assert not run.result.training  # a model in eval mode must not stay so

    model = train(QUICK, dataset, 5, CPU, after_epoch)
    expected, expected_losses = plain_loop(dataset, 5, QUICK.epochs, QUICK.batch_size)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-5)
    assert not model.training


def test_the_schedule_moves_with_each_step():
    recipe = replace(
        QUICK, optimizer="muon", schedule="warmup-cosine", learning_rate=2.0, batch_size=30
    )
    rates = []  # of the step that would come next

    def remember(run, losses):
        rates.append(run.optimizer.param_groups[0]["lr"])

    train(recipe, make_dataset(), 0, CPU, remember)
    expected = rates_of(recipe, 2)[2::2]
    assert rates[:-1] == pytest.approx(expected)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_the_models_settings_are_those_of_the_recipe(ema_decay):
    recipe = replace(QUICK, network="SmallVGG", tta_flip=True, tta_shift=2, ema_decay=ema_decay)
    run = Run(recipe, 10, CPU)
    assert (run.ema is not None) == (ema_decay > 0)
    for model in (run.model, run.result):
        assert type(model).__name__ == recipe.network
        assert (model.tta_flip, model.tta_shift) == (True, 2)


def test_layouts_by_hand():
    example = {"a": [1, 2.0], "b": torch.zeros(2, 3)}
    assert same_layout({"a": [7, 0.5], "b": torch.ones(2, 3)}, example)
    numbers = ([1], [1, 2.0, 3.0], [1, 2], (1, 2.0), [1, [2.0]], None)
    tensors = (torch.zeros(3, 2).T, torch.zeros(2, 3).long(), torch.zeros(6), [[0.0] * 3] * 2)
    others = [{"a": each, "b": example["b"]} for each in numbers]
    others += [{"a": example["a"], "b": each} for each in tensors]
    for value in (*others, {"a": example["a"]}, {**example, "c": 0}, list(example)):
        assert same_layout(value, example) is False


def test_same_seed_same_weights_and_other_seed_other_weights():
    recipe = replace(QUICK, epochs=2, augment_from=0, color_jitter=0.3, cutout=8, mixup=0.2)
    dataset = make_dataset()
    first, again, other = (train(recipe, dataset, seed, CPU) for seed in (1, 1, 2))
    assert_equal_weights(first, again)
    assert not torch.equal(first.fc3.weight, other.fc3.weight)
    unmixed = train(replace(recipe, mixup=0.0), dataset, 1, CPU)
    assert not torch.equal(first.fc3.weight, unmixed.fc3.weight)


def test_an_easy_imbalanced_set_is_learned():
    recipe = replace(WEIGHTED, epochs=25, batch_size=16, learning_rate=3e-3)
    epochs, dev = [], make_dataset("dev")
    model = train(recipe, make_dataset(), 0, CPU, lambda run, losses: epochs.append(losses))
    predicted = predict_logits(model, dev.images).argmax(dim=1)
    assert metrics.evaluate(dev.labels, predicted)["g_mean"] > 0.9
    assert [len(losses) for losses in epochs] == [4] * 25  # 60 images, 16 a batch
    assert np.mean(epochs[-1]) < 0.5 * np.mean(epochs[0])


def test_ignored_labels_change_nothing():
    dataset = make_dataset()
    keep = torch.arange(len(dataset)) % 3 > 0
    ignoring = replace(dataset, labels=dataset.labels.where(keep, IGNORE_INDEX))
    recipe = replace(WEIGHTED, epochs=2, batch_size=16, logit_adjustment=1.0)
    assert_equal_weights(
        train(recipe, ignoring, 0, CPU), train(recipe, dataset.subset(keep), 0, CPU)
    )


@pytest.mark.parametrize("recipe", [QUICK, BALANCED, WEIGHTED], ids=lambda recipe: recipe.sampler)
@pytest.mark.parametrize("logit_adjustment", [0.0, 1.2])
def test_a_class_without_images_does_no_harm(recipe, logit_adjustment):
    recipe = replace(recipe, epochs=1, batch_size=16, logit_adjustment=logit_adjustment)
    model = train(recipe, make_dataset(counts=(20, 10, 0)), 0, CPU)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


@pytest.mark.parametrize(
    "recipe", [STATEFUL, replace(QUICK, epochs=2, schedule="step", step_size=1)]
)
def test_a_run_that_goes_on_from_a_saved_state_ends_like_one_that_never_stopped(recipe):
    dataset, files = make_dataset(), []

    def save(run, losses):
        files.append(io.BytesIO())
        torch.save(run.state_dict(), files[-1])

    whole = train(recipe, dataset, 0, CPU, save)
    epochs = []
    files[0].seek(0)
    state = torch.load(files[0], weights_only=True)
    resumed = train(recipe, dataset, 0, CPU, lambda run, _: epochs.append(run.epoch), state)
    assert epochs == [2]
    assert_equal_weights(resumed, whole)


def trained_run(recipe):
    run = Run(recipe, 10, CPU)
    run.model(torch.zeros(2, 3, 32, 32)).sum().backward()
    run.optimizer.step()
    run.scheduler.step()
    return run


@pytest.mark.parametrize("recipe", [NAIVE, TUNED])
def test_optimizer_state_that_would_be_written_beyond_is_refused(recipe):
    def load(change):
        state = trained_run(recipe).state_dict()
        values = state["optimizer"][0]
        name = next(name for name in values if name != "step")
        change(state, values, name)
        run = Run(recipe, 10, CPU)
        run.load_state_dict(state)
        return run.optimizer.state[next(run.model.parameters())][name]

    assert load(lambda state, values, name: None).abs().sum() > 0
    for change in (
        lambda state, values, name: values.update({name: values[name].flatten()[:2]}),
        lambda state, values, name: values.update({name: torch.zeros(0)}),
        lambda state, values, name: values.update({name: torch.ones(1).expand(values[name].shape)}),
        lambda state, values, name: values.pop(name),
        lambda state, values, name: values.update({name: [1.0]}),
        lambda state, values, name: state["optimizer"].pop(1),
        lambda state, values, name: state["optimizer"].update({0: state["optimizer"][1]}),
        lambda state, values, name: state.update(epoch=1.0),
    ):
        with pytest.raises(ValueError, match="not the state of this run"):
            load(change)


def test_the_models_weights_are_the_average_that_the_recipe_asks_for():
    recipe = replace(QUICK, network="SmallVGG", batch_size=60, epochs=4, ema_decay=0.7)
    weights = []  # of each epoch, which is one step

    def remember(run, losses):
        weights.append({name: w.detach().clone() for name, w in run.model.state_dict().items()})

    model = train(recipe, make_dataset(), 0, CPU, remember)
    average = weights[0]
    for step in weights[1:]:
        average = {name: 0.7 * average[name] + 0.3 * step[name] for name in step}
    for name, weight in model.state_dict().items():
        if weight.is_floating_point():
            assert torch.allclose(weight, average[name], atol=1e-6), name
    assert not torch.allclose(model.head.weight, weights[-1]["head.weight"], atol=1e-6)


def test_the_moving_average_includes_the_statistics_of_batch_norm():
    run = Run(replace(NAIVE, network="SmallVGG", ema_decay=0.9), 10, CPU)
    for value in (1.0, 2.0):  # the first update copies
        for buffer in run.model.buffers():
            buffer.fill_(value)
        run.ema.update_parameters(run.model)
    averages = {name: each for name, each in run.result.named_buffers() if "running" in name}
    assert averages
    for each in averages.values():
        torch.testing.assert_close(each, torch.full_like(each, 1.1))


# ---- out of fold ----------------------------------------------------------------------------


def test_each_image_is_predicted_once_by_a_model_that_saw_neither_it_nor_its_like(monkeypatch):
    dataset = make_dataset(counts=(40, 12, 8))
    images = dataset.images.clone()
    images[1], images[2] = images[0].flip(-1), (0.9 * images[0]).to(torch.uint8)
    images[7] = images[6]
    dataset, alike = replace(dataset, images=images), [{0, 1, 2}, {6, 7}]
    numbers = {image.numpy().tobytes(): number for number, image in enumerate(dataset.images)}
    numbers[images[7].numpy().tobytes()] = 6  # an exact copy can't be told from its original
    ignored = torch.arange(60) % 5 == 0
    jobs_seen = []

    def predict_own_number(function, jobs, device, description):
        for recipe, inside, outside, seed, job_device in jobs:
            assert (recipe, seed, job_device, device) == (filtered, 4, CPU, CPU)
            inside = inside.subset(inside.labels != IGNORE_INDEX)
            trained_on, predicted = (
                [numbers[image.numpy().tobytes()] for image in each]
                for each in (inside.images, outside)
            )
            jobs_seen.append((set(trained_on), set(predicted), inside.class_counts))
            yield torch.tensor(predicted)[:, None].expand(-1, len(CLASS_NAMES)).float()

    def leave_out(recipe, dataset, seed, device):
        assert (recipe, seed, device) == (filtered, 4, CPU)
        return replace(dataset, labels=dataset.labels.masked_fill(ignored, IGNORE_INDEX))

    monkeypatch.setattr("common.train.parallel_map", predict_own_number)
    monkeypatch.setattr("common.train.filter_labels", leave_out)
    filtered = replace(QUICK, label_filter=QUICK)
    logits = cross_val_logits(filtered, dataset, 4, CPU)
    expected = torch.arange(60)
    expected[7] = 6
    assert logits[:, 0].tolist() == expected.tolist()
    for trained_on, predicted, class_counts in jobs_seen:
        assert not trained_on & predicted
        assert trained_on <= set(torch.nonzero(~ignored).flatten().tolist()) | {6}
        assert min(class_counts) > 0
        for group in alike:
            assert not (trained_on & group and predicted & group)
    assert sum(len(predicted) for _, predicted, _ in jobs_seen) == 59


def test_folds_follow_the_seed_and_have_the_same_class_fractions():
    dataset = make_dataset(counts=(60, 30, 9))
    once, again, other = (make_folds(dataset, 3, seed) for seed in (0, 0, 1))
    held_out = [outside.tolist() for _, outside in once]
    assert held_out == [outside.tolist() for _, outside in again]
    assert held_out != [outside.tolist() for _, outside in other]
    assert sorted(sum(held_out, [])) == list(range(99))
    for inside, outside in once:
        assert not set(inside.tolist()) & set(outside.tolist())
        counts = torch.bincount(dataset.labels[outside]).tolist()
        assert counts == pytest.approx([20, 10, 3], abs=1)


def test_a_class_of_one_image_is_predicted_without_a_librarys_words(recwarn):
    logits = cross_val_logits(QUICK, make_dataset(counts=(5, 2, 1)), 0, CPU)
    assert logits.isfinite().all()
    assert not recwarn.list


def test_too_few_images_for_the_folds_are_said_in_our_words():
    alike = make_dataset(counts=(8, 4, 4))
    alike = replace(alike, images=alike.images[:1].expand(16, -1, -1, -1))
    for dataset in (make_dataset(counts=(3, 2, 1)), alike):
        with pytest.raises(UserError, match="^tiny: no class has 4 different images, one for each"):
            cross_val_logits(QUICK, dataset, 0, CPU)
    just_enough = make_dataset(counts=(4, 2, 1))
    assert len(cross_val_logits(replace(QUICK, epochs=1), just_enough, 0, CPU)) == 7


def test_filter_ignores_wrong_labels_and_empties_no_class(monkeypatch):
    dataset = make_dataset(counts=(60, 30, 12))
    wrong = torch.cat([torch.nonzero(dataset.labels == label)[:3, 0] for label in range(3)])
    labels = dataset.labels.clone()
    labels[wrong] = (labels[wrong] + 1) % 3
    planted = replace(dataset, labels=labels)
    logits = 5 * F.one_hot(dataset.labels, 3).float()
    monkeypatch.setattr("common.train.cross_val_logits", lambda *arguments: logits)
    recipe = replace(QUICK, label_filter=QUICK)
    filtered = filter_labels(recipe, planted, 0, CPU)
    ignored = filtered.labels == IGNORE_INDEX
    assert torch.nonzero(ignored).flatten().tolist() == sorted(wrong.tolist())
    assert torch.equal(filtered.labels[~ignored], labels[~ignored])
    corrected = filter_labels(replace(recipe, correct_labels=True), planted, 0, CPU)
    assert torch.equal(corrected.labels, dataset.labels)
    assert filter_labels(QUICK, planted, 0, CPU) is planted
    # Even where models are sure that all cats are something else, some must stay.
    logits = 9 * F.one_hot(torch.zeros_like(labels), 3).float()
    for correct_labels in (False, True):
        recipe = replace(recipe, correct_labels=correct_labels)
        remaining = filter_labels(recipe, planted, 0, CPU).labels
        assert set(remaining.tolist()) >= {0, 1, 2}


def test_corrected_labels_by_hand(monkeypatch):
    posterior = [[0.9, 0.1, 0], [0.55, 0.25, 0.2], [0.3, 0.7, 0], [0.4, 0.6, 0], [0.7, 0.3, 0]]
    monkeypatch.setattr("common.train.cross_val_logits", lambda *arguments: None)
    monkeypatch.setattr("common.metrics.label_posterior", lambda *_: np.array(posterior))
    dataset = make_dataset(counts=(4, 1, 0))
    dataset = replace(dataset, labels=torch.tensor([0, 0, 0, 0, 1]))
    for correct_labels, changed in ((False, IGNORE_INDEX), (True, 1)):
        recipe = replace(QUICK, label_filter=QUICK, correct_labels=correct_labels)
        labels = filter_labels(recipe, dataset, 0, CPU).labels.tolist()
        # trusted; uncertain; another is certain; 0.6 is not certain; the only one of its class
        assert labels == [0, IGNORE_INDEX, changed, IGNORE_INDEX, 1]


# ---- several processes ----------------------------------------------------------------------


def divide(number, divisor):
    return number / divisor, torch.get_num_threads(), os.getpid()


def is_alive(process):
    """Tell whether a process is there and not just waiting to be reaped."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")")[-1].split()[0] not in "ZX"


def test_jobs_keep_their_order_and_an_error_reaches_the_caller(monkeypatch):
    monkeypatch.setattr("common.train.cpu_count", lambda: 2)
    jobs, results = [(6, 3), (6, 2), (6, 1), (6, 0)], []
    with pytest.raises(ZeroDivisionError):
        for result in parallel_map(divide, jobs, CPU, "divisions"):
            results.append(result)
    quotients, threads, processes = zip(*results, strict=True)
    assert quotients == (2.0, 3.0, 6.0)
    assert set(threads) == {1}
    assert os.getpid() not in processes
    assert not multiprocessing.active_children()


NOTEBOOK = """
import multiprocessing, sys, types

for name in ("earlier", "later"):  # as `%run` does it: a new main module in the same process
    script = types.ModuleType("__main__")
    script.__file__ = f"{name}.py"
    sys.modules["__main__"] = script
    exec(compile(open(script.__file__).read(), script.__file__, "exec"), vars(script))
"""
RUN_IN_NOTEBOOK = """
from dataclasses import dataclass
import common.train, torch

@dataclass
class Result:
    number: int

if __name__ == "__main__":
    common.train.cpu_count = lambda: 2
    jobs = [(1,), (2,)]
    print(list(common.train.parallel_map(Result, jobs, torch.device("cpu"), "results")))
"""


@pytest.mark.slow
def test_results_reach_a_script_that_a_notebook_runs_after_another(tmp_path):
    (tmp_path / "earlier.py").write_text("")
    (tmp_path / "later.py").write_text(RUN_IN_NOTEBOOK)
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[Result(number=1), Result(number=2)]\n", done.stderr


def kill_oneself():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr("common.train.cpu_count", lambda: 2)
    with pytest.raises(UserError, match="a process was killed, probably because the memory"):
        list(parallel_map(kill_oneself, [(), ()], CPU, "jobs"))


def test_what_one_core_runs_stays_here_with_one_thread_and_leaves_the_number(monkeypatch):
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("common.train.cpu_count", lambda: 1)
            two = list(parallel_map(divide, [(6, 3), (6, 2)], CPU, "divisions"))
        assert two == [(2.0, 1, os.getpid()), (3.0, 1, os.getpid())]
        assert list(parallel_map(divide, [(6, 3)], CPU, "divisions")) == [(2.0, 1, os.getpid())]
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            list(parallel_map(divide, [(6, 0)], CPU, "divisions"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


SLEEPERS = """
import time, os
from pathlib import Path
from common import cli
from common.train import parallel_map
import torch
from tqdm import tqdm

def sleep(numbers):
    tqdm([], disable=True)
    Path(f"worker-{os.getpid()}").touch()
    time.sleep(600)

def main():
    jobs = [(torch.zeros(9),) for _ in range(3)]
    list(parallel_map(sleep, jobs, torch.device("cpu"), "naps"))

if __name__ == "__main__":
    import common.train
    common.train.cpu_count = lambda: 2
    cli.run(main)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("sent", "status", "printed"),
    [
        (signal.SIGKILL, -signal.SIGKILL, None),  # Python's own helper may complain
        (signal.SIGINT, 130, "stopped; files that were already written are complete"),
        (signal.SIGTERM, 130, "stopped; files that were already written are complete"),
    ],
)
def test_workers_end_with_their_parent(tmp_path, sent, status, printed):
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "sleepers.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # if run by `make &`
    )
    try:
        deadline = time.monotonic() + 300
        while len(workers := list(tmp_path.glob("worker-*"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # as a terminal does: all of them get it
        else:
            process.send_signal(sent)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == status
    assert printed is None or error.strip() == printed
    deadline = time.monotonic() + 10
    while any(is_alive(worker.name.split("-")[1]) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list((tmp_path / "tmp").iterdir()) == []
