"""Attacks against the field's own libraries, and checks against fooling oneself."""

from dataclasses import replace

import foolbox
import pytest
import torch
import torchattacks
from conftest import make_dataset

from common.attacks import (
    add_noise,
    change_answers,
    fgsm,
    fit_one_noise,
    loss_gradient,
    margin,
    pgd,
    random_noise,
)
from common.dataset import as_input
from common.network import predict_logits
from common.trainer import Recipe, divergence, fit
from training import NAIVE


@pytest.fixture(scope="module", params=["CourseNet", "BestNet"])
def net(request):
    """Return a net that has the easy pictures right, and half of them at epsilon 0.1."""
    torch.set_num_threads(1)
    epochs = {"CourseNet": 20, "BestNet": 6}[request.param]
    recipe = replace(NAIVE, network=request.param, epochs=epochs, batch_size=16, mixup=1.0)
    recipe = replace(recipe, sampler="weighted", learning_rate=3e-3)
    return fit(recipe, make_dataset(), 0, torch.device("cpu"))


@pytest.fixture
def pictures(dev):
    return as_input(dev.pictures)


def accuracy(net, pictures, labels):
    return (predict_logits(net, pictures).argmax(dim=1) == labels).float().mean().item()


def loss_on(net, pictures, labels):
    return torch.nn.functional.cross_entropy(predict_logits(net, pictures), labels).item()


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.1, 1.0])
def test_fgsm_equals_torchattacks(net, dev, pictures, epsilon):
    expected = torchattacks.FGSM(net, eps=epsilon)(pictures, dev.labels)
    ours = fgsm(net, pictures, dev.labels, epsilon)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_fgsm_moves_inner_pixels_by_exactly_epsilon_and_stays_in_range(net, dev, pictures):
    epsilon = 0.03
    attacked = fgsm(net, pictures, dev.labels, epsilon)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    moved = (attacked - pictures).abs()
    gradient, _ = loss_gradient(net, pictures, dev.labels)
    inner = (pictures > epsilon) & (pictures < 1 - epsilon) & (gradient != 0)
    assert inner.float().mean() > 0.5
    torch.testing.assert_close(
        moved[inner], torch.full_like(moved[inner], epsilon), atol=1e-6, rtol=0
    )
    assert moved.max() <= epsilon + 1e-6


@pytest.mark.parametrize(("steps", "step_size"), [(1, 0.03), (5, 0.01), (20, 0.004)])
@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_equals_torchattacks(net, dev, pictures, steps, step_size, targeted):
    attack = torchattacks.PGD(net, 0.03, step_size, steps, random_start=False)
    labels = dev.labels
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
        labels = (labels + 1) % 3
    settings = {"steps": steps, "step_size": step_size, "targeted": targeted}
    ours = pgd(net, pictures, labels, 0.03, random_start=False, stop_early=False, **settings)
    torch.testing.assert_close(ours, attack(pictures, labels), atol=1e-5, rtol=0)


def test_one_full_step_of_pgd_is_fgsm(net, dev, pictures):
    settings = {"steps": 1, "step_size": 0.05, "random_start": False, "stop_early": False}
    one_step = pgd(net, pictures, dev.labels, 0.05, **settings)
    torch.testing.assert_close(one_step, fgsm(net, pictures, dev.labels, 0.05), atol=1e-6, rtol=0)


@pytest.mark.parametrize("epsilon", [0.06, 0.1, 0.15])
def test_pgd_is_never_weaker_than_foolbox(net, dev, pictures, epsilon):
    foolbox_net = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    # Both from the picture itself: a start by chance may favour either by a picture or two.
    attack = foolbox.attacks.LinfPGD(steps=20, rel_stepsize=0.125, random_start=False)
    _, theirs, _ = attack(foolbox_net, pictures, dev.labels, epsilons=epsilon)
    ours = pgd(net, pictures, dev.labels, epsilon, steps=20, random_start=False)
    assert accuracy(net, ours, dev.labels) <= accuracy(net, theirs, dev.labels)


def test_pgd_is_no_weaker_and_no_larger_when_it_stops_early(net, dev, pictures):
    epsilon, results = 0.1, []
    for stop_early in (True, False):
        torch.manual_seed(0)
        attacked = pgd(net, pictures, dev.labels, epsilon, steps=10, stop_early=stop_early)
        assert (attacked - pictures).abs().max() <= epsilon + 1e-6
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        results.append(accuracy(net, attacked, dev.labels))
    assert results[0] <= results[1]


def test_pgd_leaves_alone_what_is_wrong_already(net, dev, pictures):
    wrong_labels = (predict_logits(net, pictures).argmax(dim=1) + 1) % 3
    assert torch.equal(pgd(net, pictures, wrong_labels, 0.1), pictures)


def test_targeted_pgd_makes_the_net_say_the_target(net, dev, pictures):
    for target in range(3):
        targets = torch.full_like(dev.labels, target)
        attacked = pgd(net, pictures, targets, 0.3, targeted=True)
        assert accuracy(net, attacked, targets) == 1


def test_restarts_without_a_random_start_are_refused(net, dev, pictures):
    with pytest.raises(ValueError, match="restarts need a random start"):
        pgd(net, pictures, dev.labels, 0.1, random_start=False, restarts=2)


def test_random_restarts_never_hurt_the_attacker(net, dev, pictures):
    by_restarts = []
    for restarts in (1, 2, 4):
        torch.manual_seed(0)  # the first start is the same for all
        attacked = pgd(net, pictures, dev.labels, 0.1, steps=3, restarts=restarts)
        by_restarts.append(accuracy(net, attacked, dev.labels))
    assert by_restarts == sorted(by_restarts, reverse=True)
    assert 0 < by_restarts[0] < 1


def test_loss_rises_with_epsilon_and_with_steps(net, dev, pictures):
    def loss_after(epsilon, steps):
        settings = {"random_start": False, "stop_early": False}
        return loss_on(net, pgd(net, pictures, dev.labels, epsilon, steps, **settings), dev.labels)

    by_epsilon = [loss_after(epsilon, 10) for epsilon in (0.01, 0.02, 0.04, 0.08, 0.16)]
    assert by_epsilon == sorted(by_epsilon)
    assert by_epsilon[0] > loss_on(net, pictures, dev.labels)
    by_steps = [loss_after(0.1, steps) for steps in (1, 4, 16)]
    assert by_steps == sorted(by_steps)


def test_unbounded_attack_leaves_nothing_right(net, dev, pictures):
    assert accuracy(net, pgd(net, pictures, dev.labels, 1.0), dev.labels) == 0


@pytest.mark.parametrize("epsilon", [0.06, 0.1])
def test_gradients_are_not_masked(net, dev, pictures, epsilon):
    """A black-box attack, which needs no gradient, must not find what PGD misses."""
    square = torchattacks.Square(net, eps=epsilon, n_queries=300, seed=0)(pictures, dev.labels)
    ours = pgd(net, pictures, dev.labels, epsilon)
    assert accuracy(net, ours, dev.labels) <= accuracy(net, square, dev.labels)


def test_margin_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    assert margin(logits, torch.tensor([0, 2])).tolist() == [-1.0, 4.0]


def test_margin_has_a_gradient_where_cross_entropy_is_flat(net, dev, pictures):
    class Sure(torch.nn.Module):
        def forward(self, x):
            return 1e4 * net(x)

    right = predict_logits(net, pictures).argmax(dim=1) == dev.labels
    pictures, labels = pictures[right], dev.labels[right]
    sure = Sure().eval()
    flat, _ = loss_gradient(sure, pictures, labels)
    steep, _ = loss_gradient(sure, pictures, labels, margin)
    assert (flat == 0).all(dim=(1, 2, 3)).float().mean() > 0.5
    assert (steep != 0).any(dim=3).any(dim=2).any(dim=1).all()


def test_attacks_leave_net_and_pictures_as_they_were(net, dev, train, pictures):
    kept = pictures.clone()
    weights = {name: weight.clone() for name, weight in net.state_dict().items()}
    fgsm(net, pictures, dev.labels, 0.1)
    pgd(net, pictures, dev.labels, 0.1, steps=2, restarts=2)
    fit_one_noise(net, train, 0.1, seed=0, steps=5)
    assert torch.equal(pictures, kept)
    assert not pictures.requires_grad
    assert not net.training
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_gradient_of_a_picture_depends_on_others_in_its_scale_only(net, dev, pictures):
    together, _ = loss_gradient(net, pictures, dev.labels)
    alone, _ = loss_gradient(net, pictures[:1], dev.labels[:1])
    torch.testing.assert_close(together[:1] * len(pictures), alone, atol=1e-6, rtol=1e-4)


def test_attack_of_trades_goes_up_the_divergence(net, pictures):
    torch.manual_seed(0)
    attacked = change_answers(net, pictures, 0.1)
    torch.manual_seed(0)
    nearby = (pictures + torch.empty_like(pictures).uniform_(-0.01, 0.01)).clamp(0, 1)
    nearby.requires_grad_()
    clean = torch.distributions.Categorical(logits=net(pictures).detach())
    answers = torch.distributions.Categorical(logits=net(nearby))
    torch.distributions.kl_divergence(clean, answers).sum().backward()
    moved = nearby.detach() + 0.1 * nearby.grad.sign()
    expected = torch.clamp(moved, pictures - 0.1, pictures + 0.1).clamp(0, 1)
    same = (attacked - expected).abs() < 1e-5  # but for signs of gradients that are nearly 0
    assert same.float().mean() > 0.99
    answers = torch.distributions.Categorical(logits=net(attacked))
    change = torch.distributions.kl_divergence(clean, answers).mean()
    assert divergence(net(pictures), net(attacked)).item() == pytest.approx(change.item(), rel=1e-3)
    net.zero_grad()


def test_adversarial_training_makes_a_net_that_withstands():
    plain = Recipe("plain", "BestNet", epochs=40, batch_size=16, learning_rate=3e-3)
    plain = replace(plain, sampler="weighted")
    robust = replace(plain, name="robust", attack_epsilon=0.1, trades_beta=4.0)
    dev, left = make_dataset("dev"), {}
    for recipe in (plain, robust):
        net = fit(recipe, make_dataset(), 0, torch.device("cpu"))
        attacked = pgd(net, as_input(dev.pictures), dev.labels, 0.1)
        left[recipe.name] = accuracy(net, attacked, dev.labels)
    assert left["plain"] < 0.5
    assert left["robust"] > 0.9


def test_fgsm_does_more_than_random_noise_of_the_same_size(net, dev, pictures):
    epsilon = 0.1
    torch.manual_seed(0)
    by_chance = loss_on(net, add_noise(pictures, random_noise(epsilon)), dev.labels)
    assert loss_on(net, fgsm(net, pictures, dev.labels, epsilon), dev.labels) > 2 * by_chance


@pytest.mark.parametrize("to_next_label", [False, True])
def test_one_noise_stays_in_its_ball_and_follows_the_seed(net, train, to_next_label):
    noises = [fit_one_noise(net, train, 0.05, seed, to_next_label, 10) for seed in (0, 0, 1)]
    assert noises[0].shape == (3, 32, 32)
    assert noises[0].abs().max() <= 0.05
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])


def test_one_noise_works_on_pictures_it_was_not_fitted_on(net, train, dev, pictures):
    epsilon = 0.2
    fitted = add_noise(pictures, fit_one_noise(net, train, epsilon, seed=0, steps=40))
    torch.manual_seed(0)
    by_chance = add_noise(pictures, random_noise(epsilon))
    assert loss_on(net, fitted, dev.labels) > 2 * loss_on(net, by_chance, dev.labels)


def test_random_noise_is_as_strong_as_allowed():
    torch.manual_seed(0)
    noise = random_noise(0.1)
    assert noise.abs().unique().tolist() == pytest.approx([0.1])
    assert 0.4 < (noise > 0).float().mean() < 0.6
