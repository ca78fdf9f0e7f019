import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import COURSE_DATA, make_dataset, needs_course_data
from scipy.stats import binomtest

import adversarial
from adversarial import ATTACK_TITLES, choose_examples, rates_of, run_attacks
from common.attacks import add_noise, fgsm, fit_one_noise, in_batches
from common.dataset import as_input, open_source
from common.network import load_checkpoint, predict_logits
from common.trainer import fit
from training import NAIVE


@pytest.fixture(scope="module")
def net():
    """Return a net that has most of the easy pictures right."""
    recipe = replace(NAIVE, batch_size=16, sampler="weighted", learning_rate=3e-3, mixup=1.0)
    return fit(recipe, make_dataset("train"), 0, torch.device("cpu"))


def test_both_kinds_of_rate_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    before = torch.tensor([0, 0, 0, 1, 1, 1, 2, 0])  # 6 of 8 right
    after = torch.tensor([0, 0, 1, 0, 1, 0, 2, 0])  # 5 of 8 right; 2 of the 6 fooled
    rates = rates_of(labels, before, after, seed=0)
    assert rates["accuracy"] == pytest.approx(5 / 8)
    assert rates["success_rate"] == pytest.approx(2 / 6)
    interval = binomtest(2, 6).proportion_ci(method="wilson")
    assert rates["interval"]["success_rate"] == pytest.approx(list(interval))
    assert rates["favourite"] == {"class": "car", "share": pytest.approx(5 / 8)}
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


def test_attacks_keep_to_their_epsilon_and_pgd_gets_stronger_with_it(net, train, dev):
    epsilons = [0.01, 0.03, 0.06]
    attacks = run_attacks(net, train, dev, epsilons, seed=0, quick=True)
    clean = as_input(dev.pictures)
    for found in attacks.values():
        for attacked, epsilon in zip(found, epsilons, strict=True):
            assert attacked.epsilon == epsilon
            assert (attacked.pictures - clean).abs().max() <= epsilon + 1e-6
            assert attacked.pictures.min() >= 0
            assert attacked.pictures.max() <= 1
            said = predict_logits(net, attacked.pictures).argmax(dim=1)
            assert torch.equal(attacked.predicted, said)
    right = [(each.predicted == dev.labels) for each in attacks["pgd"]]
    for smaller, larger in zip(right, right[1:], strict=False):
        assert not (larger & ~smaller).any()


def test_gradient_map_is_the_size_of_the_gradient(net, dev):
    picture, label = as_input(dev.pictures[0]), int(dev.labels[0])
    shown = adversarial.gradient_map(net, picture, label)
    assert shown.shape == (32, 32)
    assert shown.max() == 1
    # Finite differences at the brightest and at a darker pixel, in all colours.
    losses = {}
    places = {"brightest": shown.argmax().item(), "darker": shown.flatten().argsort()[512].item()}
    for name, place in places.items():
        total = 0.0
        for colour in range(3):
            pair = picture.repeat(2, 1, 1, 1).double()
            pair[0, colour, place // 32, place % 32] += 1e-4
            pair[1, colour, place // 32, place % 32] -= 1e-4
            logits = net.double()(pair)
            loss = torch.nn.functional.cross_entropy(
                logits, torch.tensor([label, label]), reduction="none"
            )
            total += abs((loss[0] - loss[1]).item())
        losses[name] = total
    net.float()
    ratio = losses["darker"] / losses["brightest"]
    assert shown.flatten()[places["darker"]].item() == pytest.approx(ratio, rel=0.05)


def test_script_writes_rates_per_net_attack_and_epsilon(run_script, course_folder, tmp_path):
    options = ("--data", course_folder, "--out", "out", "--quick", "--epsilons", "0.02", "0.1")
    models = adversarial.console.PROJECT / "models"
    options += ("--robust", models / "tuned.ckpt", "--save-pictures")
    status, printed, _ = run_script(adversarial, *options)
    assert status == 0
    assert "One noise of 0.1: the net says" in printed
    nets = json.loads((tmp_path / "out/adversarial.json").read_text())["nets"]
    assert set(nets) == {"plain", "robust"}
    assert nets["robust"]["checkpoint"]["file"] == "tuned.ckpt"
    assert set(nets["plain"]["attacks"]) == set(adversarial.ATTACK_TITLES)
    for by_epsilon in nets["plain"]["attacks"].values():
        assert list(by_epsilon) == ["0.02", "0.1"]
        assert {"accuracy", "success_rate", "interval"} <= set(by_epsilon["0.1"])
    for name in ("4-fgsm", "5-one-noise", "5-noises", "5-epsilons", "5-gradients"):
        assert (tmp_path / f"out/{name}.png").exists()
    with np.load(tmp_path / "out/attacked-plain.npz", allow_pickle=False) as saved:
        names = {f"{attack} {epsilon}" for attack in ATTACK_TITLES for epsilon in ("0.02", "0.1")}
        assert set(saved) == {"clean", "labels"} | names
        for name in names:
            epsilon = float(name.split()[1])
            assert np.abs(saved[name] - saved["clean"]).max() <= epsilon + 1e-6
            assert saved[name].min() >= 0
            assert saved[name].max() <= 1


def test_script_without_training_set_leaves_the_one_noise_out(run_script, course_folder, tmp_path):
    (course_folder / "train.pickle").unlink()
    options = ("--data", course_folder, "--out", "out", "--quick")
    status, _, error = run_script(adversarial, *options)
    assert status == 2
    assert "name one by --checkpoint" in error
    checkpoint = ("--checkpoint", adversarial.console.PROJECT / "models/pre_trained.ckpt")
    status, printed, _ = run_script(adversarial, *options, *checkpoint)
    assert status == 0
    assert "left out" in printed
    nets = json.loads((tmp_path / "out/adversarial.json").read_text())["nets"]
    assert set(nets["plain"]["attacks"]) == {"random_noise", "fgsm", "pgd"}


def test_robust_net_is_of_the_same_data_or_the_shipped_one(train, tmp_path):
    class Folder:
        folder = tmp_path

    dev = make_dataset("dev")
    _, about = adversarial.load_robust(None, Folder, train, dev)
    assert about["trained_on"]["source"] == "course-data"
    assert adversarial.load_robust(None, Folder, train, replace(dev, source="sketches")) is None


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
    clean = as_input(dev.pictures)
    attacked = in_batches(fgsm, net, clean, dev.labels, epsilon=0.05)
    after = predict_logits(net, attacked).argmax(1)
    assert rates_of(dev.labels, before, after, 0)["accuracy"] < 0.15
    for epsilon, at_most in ((0.1, 0.35), (0.05, 0.60)):
        noise = fit_one_noise(net, train, epsilon, seed=0)
        after = predict_logits(net, add_noise(clean, noise)).argmax(1)
        rates = rates_of(dev.labels, before, after, 0)
        assert rates["balanced_accuracy"] <= at_most
        assert rates["accuracy"] > 0.85  # all are cars now, and accuracy does not see it
