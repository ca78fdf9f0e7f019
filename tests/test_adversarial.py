import json
from dataclasses import replace

import pytest
import torch
import torchattacks
from conftest import COURSE_DATA, make_dataset, needs_course_data

import adversarial
from adversarial import add_noise, choose_examples, fgsm, fit_one_noise, random_noise, rates_of
from common.dataset import as_input, open_source
from common.network import load_checkpoint, predict_logits
from common.trainer import fit
from training import NAIVE


@pytest.fixture(scope="module")
def net():
    """Return a net that has most of the easy pictures right."""
    recipe = replace(NAIVE, batch_size=16, sampler="weighted", learning_rate=3e-3, epochs=25)
    return fit(recipe, make_dataset("train"), 0, torch.device("cpu"))


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.1, 1.0])
def test_fgsm_equals_torchattacks(net, dev, epsilon):
    pictures = as_input(dev.pictures)
    expected = torchattacks.FGSM(net, eps=epsilon)(pictures, dev.labels)
    ours = fgsm(net, pictures, dev.labels, epsilon)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_fgsm_moves_inner_pixels_by_exactly_epsilon_and_stays_in_range(net, dev):
    pictures, epsilon = as_input(dev.pictures), 0.03
    attacked = fgsm(net, pictures, dev.labels, epsilon)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    moved = (attacked - pictures).abs()
    gradient = adversarial.loss_gradient(net, pictures, dev.labels)
    inner = (pictures > epsilon) & (pictures < 1 - epsilon) & (gradient != 0)
    assert inner.float().mean() > 0.5
    torch.testing.assert_close(
        moved[inner], torch.full_like(moved[inner], epsilon), atol=1e-6, rtol=0
    )
    assert moved.max() <= epsilon + 1e-6


def test_attacks_leave_net_and_pictures_as_they_were(net, dev, train):
    pictures = as_input(dev.pictures)
    kept = pictures.clone()
    weights = {name: weight.clone() for name, weight in net.state_dict().items()}
    fgsm(net, pictures, dev.labels, 0.1)
    fit_one_noise(net, train, 0.1, seed=0, steps=5)
    assert torch.equal(pictures, kept)
    assert not pictures.requires_grad
    assert not net.training
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_gradient_of_a_picture_does_not_depend_on_others(net, dev):
    pictures = as_input(dev.pictures)
    together = adversarial.loss_gradient(net, pictures, dev.labels)
    alone = adversarial.loss_gradient(net, pictures[:1], dev.labels[:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=1e-4)


def loss_on(net, pictures, labels):
    return torch.nn.functional.cross_entropy(predict_logits(net, pictures), labels).item()


def test_fgsm_does_more_than_random_noise_of_the_same_size(net, dev):
    pictures, epsilon = as_input(dev.pictures), 0.1
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


def test_one_noise_works_on_pictures_it_was_not_fitted_on(net, train, dev):
    pictures, epsilon = as_input(dev.pictures), 0.2
    fitted = add_noise(pictures, fit_one_noise(net, train, epsilon, seed=0, steps=40))
    torch.manual_seed(0)
    by_chance = add_noise(pictures, random_noise(epsilon))
    assert loss_on(net, fitted, dev.labels) > 2 * loss_on(net, by_chance, dev.labels)


def test_random_noise_is_as_strong_as_allowed():
    torch.manual_seed(0)
    noise = random_noise(0.1)
    assert noise.abs().unique().tolist() == pytest.approx([0.1])
    assert 0.4 < (noise > 0).float().mean() < 0.6


def test_both_kinds_of_rate_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    before = torch.tensor([0, 0, 0, 1, 1, 1, 2, 0])  # 6 of 8 right
    after = torch.tensor([0, 0, 1, 0, 1, 0, 2, 0])  # 5 of 8 right; 2 of the 6 fooled
    rates = rates_of(labels, before, after, seed=0)
    assert rates["accuracy"] == pytest.approx(5 / 8)
    assert rates["success_rate"] == pytest.approx(2 / 6)
    nothing_right = rates_of(labels, (labels + 1) % 3, after, seed=0)
    assert nothing_right["success_rate"] is None


def test_examples_are_fooled_pictures_with_classes_in_turn():
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 1])
    before = torch.tensor([0, 0, 0, 0, 1, 2, 2, 0])
    after = torch.tensor([0, 1, 1, 1, 0, 0, 2, 2])
    assert choose_examples(labels, before, after) == [1, 4, 5, 2, 3]
    assert choose_examples(labels, before, before) == []


def test_figure_shows_clean_noise_and_result(net, dev):
    pictures = as_input(dev.pictures)
    before = predict_logits(net, pictures).argmax(1)
    attacked = fgsm(net, pictures, dev.labels, 0.2)
    after = predict_logits(net, attacked).argmax(1)
    attack = adversarial.Attacked(0.2, attacked, after)
    figure = adversarial.draw_attacks("FGSM", dev, before, [attack])
    index = choose_examples(dev.labels, before, after)[0]
    first_column = figure.axes[:: adversarial.SHOWN]
    clean, noise, result = (ax.images[0].get_array() for ax in first_column)
    assert torch.allclose(torch.tensor(clean).permute(2, 0, 1), pictures[index])
    assert torch.allclose(torch.tensor(result).permute(2, 0, 1), attacked[index])
    assert {0.0, 1.0} <= set(torch.tensor(noise).round(decimals=3).unique().tolist())


def test_script_writes_rates_per_attack_and_epsilon(run_script, course_folder, tmp_path):
    options = ("--data", course_folder, "--out", "out", "--quick")
    status, printed, _ = run_script(adversarial, *options, "--epsilons", "0.02", "0.1")
    assert status == 0
    assert "fooled" in printed
    attacks = json.loads((tmp_path / "out/adversarial.json").read_text())["attacks"]
    assert set(attacks) == set(adversarial.ATTACK_TITLES)
    for by_epsilon in attacks.values():
        assert list(by_epsilon) == ["0.02", "0.1"]
        assert {"accuracy", "success_rate", "interval"} <= set(by_epsilon["0.1"])
    assert (tmp_path / "out/4-fgsm.png").exists()
    assert (tmp_path / "out/5-one-noise.png").exists()


def test_script_without_training_set_leaves_the_one_noise_out(run_script, course_folder, tmp_path):
    (course_folder / "train.pickle").unlink()
    options = ("--data", course_folder, "--out", "out")
    status, _, error = run_script(adversarial, *options)
    assert status == 2
    assert "name one by --checkpoint" in error
    checkpoint = ("--checkpoint", adversarial.console.PROJECT / "models/pre_trained.ckpt")
    status, printed, _ = run_script(adversarial, *options, *checkpoint)
    assert status == 0
    assert "left out" in printed
    attacks = json.loads((tmp_path / "out/adversarial.json").read_text())["attacks"]
    assert set(attacks) == {"random_noise", "fgsm"}


@pytest.mark.parametrize("epsilon", ["-1", "0", "1.5", "nan", "much"])
def test_bad_epsilon_ends_with_one_line(run_script, course_folder, epsilon):
    status, _, error = run_script(adversarial, "--data", course_folder, "--epsilons", epsilon)
    assert status == 2
    assert error.count("\n") == 1
    assert f"'{epsilon}' is " in error


@needs_course_data
@pytest.mark.slow
def test_attacks_break_the_reports_own_net():
    source = open_source(str(COURSE_DATA))
    train, dev = source.load("train"), source.load("dev")
    net, _ = load_checkpoint(COURSE_DATA / "seed-model.ckpt", (0.0, 1.0))
    before = predict_logits(net, dev.pictures).argmax(1)
    attacked = adversarial.fgsm_all(net, dev, 0.05)
    after = predict_logits(net, attacked).argmax(1)
    assert rates_of(dev.labels, before, after, 0)["accuracy"] < 0.15
    noise = fit_one_noise(net, train, 0.1, seed=0)
    after = predict_logits(net, add_noise(as_input(dev.pictures), noise)).argmax(1)
    assert rates_of(dev.labels, before, after, 0)["balanced_accuracy"] < 0.4
