"""Attacks against the field's own libraries, and checks against fooling oneself."""

import copy
from dataclasses import replace

from common.attacks import (
    clamped_cross_entropy,
    fgsm,
    in_batches,
    input_gradient,
    pgd,
    project,
    random_noise,
    saliency,
    trades_perturbation,
    universal_perturbation,
)
from common.data import to_float
from common.model import Classifier, build_model, predict_logits
from common.recipes import NAIVE
from common.train import train as train_model

import foolbox
import pytest
import torch
import torchattacks
from conftest import make_dataset
from torch import nn
from torch.distributions import Categorical, kl_divergence

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """Return a model that classifies all clean images correctly, and some of the attacked ones."""
    torch.set_num_threads(1)
    recipe = replace(NAIVE, sampler="balanced", epochs=30, batch_size=16)
    return train_model(recipe, make_dataset("train"), 0, CPU)


@pytest.fixture
def images(dev):
    return to_float(dev.images)


class Linear(Classifier):
    """A model whose gradients can be worked out by hand; it keeps all images that it is shown."""

    def __init__(self, **settings):
        super().__init__(pixel_range=(0.0, 1.0), **settings)
        self.layer = nn.Linear(3 * 32 * 32, 3)
        self.shown = []

    def logits(self, x):
        self.shown.append(x.detach())
        return self.layer(x.flatten(start_dim=1))


def accuracy(model, images, labels):
    return (predict_logits(model, images).argmax(dim=1) == labels).float().mean().item()


def loss_on(model, images, labels):
    return nn.functional.cross_entropy(predict_logits(model, images), labels).item()


# ---- FGSM and PGD ---------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.1, 1.0])
def test_fgsm_equals_torchattacks(model, dev, images, epsilon):
    expected = torchattacks.FGSM(model, eps=epsilon)(images, dev.labels)
    torch.testing.assert_close(fgsm(model, images, dev.labels, epsilon), expected)


def test_fgsm_moves_inner_pixels_by_exactly_epsilon(model, dev, images):
    attacked = fgsm(model, images, dev.labels, 0.03)
    gradient, _ = input_gradient(model, images, dev.labels)
    inner = (images > 0.03) & (images < 0.97) & (gradient != 0)
    assert inner.float().mean() > 0.5
    moved = (attacked - images).abs()[inner]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.03), atol=1e-6, rtol=0)


def test_fgsm_is_pgd_with_one_full_step(model, dev, images):
    settings = {"alpha": 0.05, "steps": 1, "random_start": False, "stop_early": False}
    one_step = pgd(model, images, dev.labels, 0.05, **settings)
    torch.testing.assert_close(one_step, fgsm(model, images, dev.labels, 0.05), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("epsilon", "steps", "alpha"),
    [(0.03, 1, 0.03), (0.03, 5, 0.01), (0.03, 20, 0.004), (0.15, 20, None)],
)
def test_pgd_equals_torchattacks(model, dev, images, epsilon, steps, alpha):
    step_size = alpha or 2.5 * epsilon / steps  # the default
    attack = torchattacks.PGD(model, epsilon, step_size, steps, random_start=False)
    settings = {"random_start": False, "stop_early": False}
    ours = pgd(model, images, dev.labels, epsilon, alpha, steps, **settings)
    same = (ours - attack(images, dev.labels)).abs() < 1e-5  # but for gradients that are nearly 0
    assert same.float().mean() > 0.995


@pytest.mark.parametrize("epsilon", [0.06, 0.1, 0.15])
def test_pgd_is_never_weaker_than_foolbox(model, dev, images, epsilon):
    foolbox_model = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    # Both from the image itself: a random start may favor either by an image or two.
    attack = foolbox.attacks.LinfPGD(steps=20, rel_stepsize=0.125, random_start=False)
    _, theirs, _ = attack(foolbox_model, images, dev.labels, epsilons=epsilon)
    ours = pgd(model, images, dev.labels, epsilon, steps=20, random_start=False)
    assert accuracy(model, ours, dev.labels) <= accuracy(model, theirs, dev.labels)


def test_black_box_attack_finds_nothing_that_pgd_misses(model, dev, images):
    square = torchattacks.Square(model, eps=0.1, n_queries=100, seed=0)(images, dev.labels)
    ours = pgd(model, images, dev.labels, 0.1, steps=20)
    assert accuracy(model, ours, dev.labels) <= accuracy(model, square, dev.labels)


@pytest.mark.parametrize("stop_early", [False, True])
def test_pgd_stays_in_the_ball_and_in_range(model, dev, images, stop_early):
    attacked = pgd(model, images, dev.labels, 0.1, alpha=0.07, steps=5, stop_early=stop_early)
    assert (attacked - images).abs().max() <= 0.1 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1


def test_stopping_early_makes_pgd_no_weaker(model, dev, images):
    left = []
    for stop_early in (True, False):
        torch.manual_seed(0)
        attacked = pgd(model, images, dev.labels, 0.1, steps=10, stop_early=stop_early)
        left.append(accuracy(model, attacked, dev.labels))
    assert left[0] <= left[1] < 0.9


def test_stopping_early_leaves_an_image_at_its_first_success(model, dev, images):
    settings = {"alpha": 0.03, "random_start": False}
    whole = [pgd(model, images, dev.labels, 0.3, steps=k, **settings) for k in range(1, 9)]
    for before, after in zip(whole, whole[1:], strict=False):
        wrong = predict_logits(model, before).argmax(dim=1) != dev.labels
        assert torch.equal(before[wrong], after[wrong])
    assert wrong.any()


def test_pgd_starts_at_random_points_of_the_ball(dev, images):
    model = Linear().eval()
    settings = {"alpha": 0.0, "steps": 1, "stop_early": False}
    gray = torch.full_like(images, 0.5)
    torch.manual_seed(0)
    moved = pgd(model, gray, dev.labels, 0.1, **settings) - gray
    assert moved.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.01)  # of a uniform distribution
    assert 0.0999 < moved.abs().max() <= 0.1 + 1e-6
    torch.manual_seed(1)
    assert not torch.equal(pgd(model, gray, dev.labels, 0.1, **settings) - gray, moved)


def test_pgd_leaves_alone_what_is_misclassified_already(model, images):
    wrong_labels = (predict_logits(model, images).argmax(dim=1) + 1) % 3
    assert torch.equal(pgd(model, images, wrong_labels, 0.1), images)


def test_pgd_ends_once_all_images_are_misclassified(dev, images):
    model = Linear().eval()
    settings = {"steps": 7, "random_start": False}
    left = pgd(model, images, dev.labels, 1.0, alpha=1.0, **settings)  # one step is enough
    assert accuracy(model, left, dev.labels) == 0
    model.shown.clear()
    pgd(model, images, dev.labels, 1.0, alpha=1.0, **settings)
    assert len(model.shown) == 3  # clean images, first step, and the check that all are wrong
    model.shown.clear()
    pgd(model, images, dev.labels, 1.0, stop_early=False, **settings)
    assert len(model.shown) == 7


def test_pixels_without_a_gradient_stay_as_they_are(dev, images):
    model = Linear().eval()
    with torch.no_grad():
        model.layer.weight[:, :100] = 0
    untouched = images.flatten(1)[:, :100]
    attacked = fgsm(model, images, dev.labels, 0.1)
    assert torch.equal(attacked.flatten(1)[:, :100], untouched)
    attacked = trades_perturbation(model, images, 0.1)
    assert (attacked.flatten(1)[:, :100] - untouched).abs().max() <= 0.01 + 1e-6  # its start
    own = replace(dev, labels=model(images).argmax(dim=1))
    noise = universal_perturbation(model, own, 0.5, seed=0, steps=10)
    torch.manual_seed(0)
    start = torch.empty(3, 32, 32).uniform_(-0.5, 0.5)
    assert torch.equal(noise.flatten()[:100], start.flatten()[:100])


def test_models_are_shown_possible_images_only(train, dev, images):
    model = Linear(tta_flip=True).eval()
    images = images.round()  # black and white: any change may leave the range
    pgd(model, images, dev.labels, 0.5, steps=3)
    trades_perturbation(model, images, 0.5)
    universal_perturbation(model, replace(train, images=255 * (train.images > 90).byte()), 0.5, 0)
    shown = torch.cat(model.shown)
    assert shown.min() == 0
    assert shown.max() == 1


def test_loss_rises_with_epsilon(model, dev, images):
    settings = {"steps": 10, "random_start": False, "stop_early": False}
    losses = [loss_on(model, images, dev.labels)]
    for epsilon in (0.01, 0.02, 0.04, 0.08, 0.16):
        losses.append(
            loss_on(model, pgd(model, images, dev.labels, epsilon, **settings), dev.labels)
        )
    assert losses == sorted(losses)


def test_unbounded_attack_leaves_nothing_correct(model, dev, images):
    assert accuracy(model, pgd(model, images, dev.labels, 1.0), dev.labels) == 0


def test_attacks_go_through_all_views_of_test_time_augmentation(dev, images):
    torch.manual_seed(0)
    model = Linear(tta_flip=True, tta_shift=2).eval()
    leaf = images.clone().requires_grad_()
    nn.functional.cross_entropy(model(leaf), dev.labels, reduction="sum").backward()
    expected = (images + 0.05 * leaf.grad.sign()).clamp(0, 1)
    attacked = fgsm(model, images, dev.labels, 0.05)
    torch.testing.assert_close(attacked, expected)
    single = torchattacks.FGSM(SingleView(model), eps=0.05)(images, dev.labels)
    assert (attacked - single).abs().gt(0.04).float().mean() > 0.2


class SingleView(nn.Module):
    """A model without its test-time augmentation, for libraries that want a module."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, images):
        return self.model.single_view(images)


# ---- losses and gradients -------------------------------------------------------------------


def test_clamped_loss_has_no_gradient_for_images_that_are_lost():
    logits = torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0]], requires_grad=True)
    losses = clamped_cross_entropy(logits, torch.tensor([1, 1]))  # ln 3 = 1.10, and 5.01
    assert losses.tolist() == pytest.approx([1.0986, 1.5], abs=1e-4)
    losses.sum().backward()
    assert logits.grad[0].abs().min() > 0.1
    assert not logits.grad[1].any()


def test_input_gradient_equals_finite_differences(model, dev, images):
    model = copy.deepcopy(model).double()
    image, label = images[:1].double(), (dev.labels[:1] + 1) % 3  # a wrong label: a large loss
    gradient, _ = input_gradient(model, image, label)
    for place in gradient.abs().flatten().argsort(descending=True)[[0, 10, 100]]:
        losses = []
        for step in (1e-5, -1e-5):
            moved = image.clone()
            moved.view(-1)[place] += step
            losses.append(nn.functional.cross_entropy(model(moved), label).item())
        slope = (losses[0] - losses[1]) / 2e-5
        assert gradient.flatten()[place].item() == pytest.approx(slope, rel=1e-2)


def test_gradient_of_an_image_does_not_depend_on_the_batch(model, dev, images):
    together, _ = input_gradient(model, images, dev.labels)
    alone, _ = input_gradient(model, images[:1], dev.labels[:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=1e-4)


def test_saliency_is_the_largest_gradient_over_the_colors(model, dev, images):
    gradient, _ = input_gradient(model, images[:3], dev.labels[:3])
    maps = saliency(model, images[:3], dev.labels[:3])
    assert torch.equal(maps, torch.maximum(gradient.max(dim=1)[0], -gradient.min(dim=1)[0]))


def test_projection_by_hand():
    originals = torch.tensor([0.5, 0.5, 0.02, 0.5])
    moved = torch.tensor([0.9, 0.1, -0.05, 0.53])
    expected = torch.tensor([0.6, 0.4, 0.0, 0.53])
    torch.testing.assert_close(project(moved, originals, 0.1), expected)


def test_batches_give_what_one_batch_gives(model):
    dev = make_dataset("dev", (300, 5, 5))
    images = to_float(dev.images)
    attacked = in_batches(fgsm, model, images, dev.labels, epsilon=0.05)
    torch.testing.assert_close(attacked, fgsm(model, images, dev.labels, 0.05))
    nothing = in_batches(pgd, model, images[:0], dev.labels[:0], epsilon=0.05)
    assert nothing.shape == (0, 3, 32, 32)


def test_attacks_leave_model_and_images_as_they_were(model, train, dev, images):
    before = images.clone()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.zero_grad()
    fgsm(model, images, dev.labels, 0.1)
    pgd(model, images, dev.labels, 0.1, steps=2)
    universal_perturbation(model, train, 0.1, seed=0, steps=5)
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert not model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert all(weight.grad is None for weight in model.parameters())


# ---- TRADES ---------------------------------------------------------------------------------


def test_trades_perturbation_goes_up_the_kl_divergence(images):
    torch.manual_seed(0)
    model = build_model().eval()  # a trained one is so sure that rounding decides
    torch.manual_seed(0)
    attacked = trades_perturbation(model, images, 0.1)
    torch.manual_seed(0)
    nearby = (images + torch.empty_like(images).uniform_(-0.01, 0.01)).clamp(0, 1)
    leaf = nearby.clone().requires_grad_()
    clean = Categorical(logits=model(images).detach())
    divergence = kl_divergence(clean, Categorical(logits=model(leaf))).sum()
    (gradient,) = torch.autograd.grad(divergence, leaf)
    expected = torch.clamp(nearby + 0.1 * gradient.sign(), images - 0.1, images + 0.1).clamp(0, 1)
    same = (attacked - expected).abs() < 1e-5  # but for gradients that are nearly 0
    assert same.float().mean() > 0.98
    after = kl_divergence(clean, Categorical(logits=model(attacked))).mean()
    assert after > 5 * kl_divergence(clean, Categorical(logits=model(nearby))).mean()


@pytest.mark.parametrize("network", ["CourseNet", "SmallVGG"])
@pytest.mark.parametrize("training", [True, False])
def test_trades_perturbation_is_made_in_eval_mode_and_leaves_no_trace(images, network, training):
    model = build_model(network, tta_flip=True).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = []
    model.register_forward_hook(lambda *_: modes.append("forward"))
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.BatchNorm2d):
            module.register_forward_hook(lambda module, *_: modes.append(module.training))
    torch.manual_seed(0)
    attacked = trades_perturbation(model, images, 0.1)
    assert set(modes) == {False}  # neither training mode nor test-time augmentation
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert not attacked.requires_grad
    torch.manual_seed(0)
    assert torch.equal(trades_perturbation(model, images, 0.1), attacked)  # no dropout


# ---- the same noise for all images ----------------------------------------------------------


@pytest.mark.parametrize("to_next_label", [False, True])
def test_universal_perturbation_stays_in_the_ball_and_follows_the_seed(model, train, to_next_label):
    noises = [
        universal_perturbation(model, train, 0.3, seed, to_next_label, 20) for seed in (0, 0, 1)
    ]
    assert noises[0].shape == (3, 32, 32)
    assert 0 < noises[0].abs().max() <= 0.3
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])


def test_universal_perturbation_works_on_images_it_was_not_fitted_on(model, train, dev, images):
    def balanced_accuracy(noise):
        correct = predict_logits(model, (images + noise).clamp(0, 1)).argmax(dim=1) == dev.labels
        return sum(correct[dev.labels == label].float().mean().item() for label in range(3)) / 3

    fitted = balanced_accuracy(universal_perturbation(model, train, 0.25, seed=0))
    torch.manual_seed(0)
    assert fitted < 0.7 < balanced_accuracy(random_noise(0.25))


def test_universal_perturbation_goes_down_the_loss_of_the_next_label(model, train, dev, images):
    noise = universal_perturbation(model, train, 0.25, seed=0, to_next_label=True)
    attacked = (images + noise).clamp(0, 1)
    next_labels = (dev.labels + 1) % 3
    assert loss_on(model, attacked, next_labels) < 0.7 * loss_on(model, images, next_labels)


@pytest.mark.parametrize("to_next_label", [False, True])
def test_universal_perturbation_by_hand(model, dev, to_next_label):
    three = dev.first(1)  # each batch holds these three, equally often
    images, labels, steps, epsilon = to_float(three.images), three.labels, 6, 0.5
    found = universal_perturbation(model, three, epsilon, 5, to_next_label, steps)
    torch.manual_seed(5)
    expected = torch.empty(3, 32, 32).uniform_(-epsilon, epsilon)
    for step in range(steps):
        leaf = (images + expected).clamp(0, 1).requires_grad_()
        log_probabilities = model(leaf).log_softmax(dim=1)
        if to_next_label:
            log_probabilities[range(3), (labels + 1) % 3].sum().backward()
        else:
            (-log_probabilities[range(3), labels]).clamp(max=1.5).sum().backward()
        expected += 0.4 * epsilon * (1 - step / steps) * leaf.grad.sum(dim=0).sign()
        expected.clamp_(-epsilon, epsilon)
    correct = [model(each).argmax(dim=1) == labels for each in (images, images + expected)]
    assert correct[1].sum() < correct[0].sum()  # else there is no perturbation
    same = (found - expected).abs() < 1e-5  # but for gradients that are nearly 0
    assert same.float().mean() > 0.99


def test_universal_perturbation_is_fitted_to_all_classes_alike():
    dataset = make_dataset("train", (50, 5, 2))
    bright = torch.arange(3)[:, None, None, None] * 100 + 20
    dataset = replace(dataset, images=bright[dataset.labels].expand(-1, 3, 32, 32).byte())
    model = Linear().eval()
    universal_perturbation(model, dataset, 0.05, seed=0, steps=2)
    for batch, of_each_class in zip(model.shown, (20, 20, 50, 50), strict=True):
        labels = (batch.mean(dim=(1, 2, 3)) * 2.55).round()
        assert labels.unique(return_counts=True)[1].tolist() == [of_each_class] * 3


def test_universal_perturbation_that_does_no_harm_is_none_at_all(train):
    class Constant(Linear):
        def logits(self, x):
            return super().logits(x) * 0 + torch.tensor([1.0, 0.0, 0.0])

    noise = universal_perturbation(Constant().eval(), train, 0.1, seed=0, steps=3)
    assert noise.shape == (3, 32, 32)
    assert not noise.any()


def test_random_noise_is_as_large_as_allowed():
    torch.manual_seed(0)
    noise = random_noise(0.1)
    assert noise.abs().unique().tolist() == pytest.approx([0.1])
    assert 0.4 < (noise > 0).float().mean() < 0.6


def test_fgsm_does_more_than_random_noise_of_the_same_size(model, dev, images):
    torch.manual_seed(0)
    random = loss_on(model, (images + random_noise(0.1)).clamp(0, 1), dev.labels)
    assert loss_on(model, fgsm(model, images, dev.labels, 0.1), dev.labels) > 2 * random
