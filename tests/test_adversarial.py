"""What adversarial.py says of attacks, and which models it attacks."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import adversarial
from adversarial import ATTACKS, Attacked, Target, attack_all, choose_images, summarize_attack
from common.attacks import fgsm, in_batches, universal_perturbation
from common.data import open_data, to_float
from common.model import build_model, load_checkpoint, predict_logits, save_checkpoint
from common.recipes import FINAL, NAIVE
from common.train import train as train_model

import numpy as np
import pytest
import torch
from conftest import COURSE_DATA, make_dataset, needs_course_data
from scipy.stats import binomtest

QUICK = ("--out", "out", "--quick")


@pytest.fixture(scope="module")
def model():
    """Return a model that classifies most of the easy images correctly."""
    torch.set_num_threads(1)
    recipe = replace(NAIVE, batch_size=16, sampler="balanced", learning_rate=3e-3, epochs=20)
    return train_model(recipe, make_dataset("train"), 0, torch.device("cpu"))


@pytest.fixture
def checkpoint(model, tmp_path):
    save_checkpoint(tmp_path / "mine.ckpt", model, {})
    return tmp_path / "mine.ckpt"


def predicting(*runs):
    """Return an attack after which the model predicts these classes, a list for each run."""
    logits = torch.nn.functional.one_hot(torch.tensor(runs), 3).float()
    noise = torch.zeros(len(runs), 3, 32, 32) if len(runs) > 1 else None
    return Attacked(0.1, torch.zeros(logits.shape[1], 3, 32, 32), logits, noise)


# ---- numbers --------------------------------------------------------------------------------

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
BEFORE = torch.tensor([0, 0, 0, 1, 1, 1, 2, 0])  # 6 of 8 correct


def test_scores_are_over_all_images_and_success_over_those_correct_before():
    attacked = predicting([0, 0, 1, 0, 1, 0, 2, 0])  # 5 of 8 correct; it succeeds on 2 of the 6
    summary = summarize_attack(LABELS, BEFORE, attacked)
    assert summary["accuracy"] == pytest.approx(5 / 8)
    assert summary["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)
    assert summary["success_rate"] == pytest.approx(2 / 6)
    interval = binomtest(2, 6).proportion_ci(method="wilson")
    assert summary["interval"]["success_rate"] == pytest.approx(list(interval))
    assert summary["most_predicted"] == {"class": "car", "fraction": pytest.approx(5 / 8)}
    assert "runs" not in summary


def test_no_success_rate_where_nothing_was_correct():
    summary = summarize_attack(LABELS, (LABELS + 1) % 3, predicting([0] * 8))
    assert summary["success_rate"] is None
    assert summary["interval"]["success_rate"] is None


def test_several_runs_are_given_by_mean_and_standard_deviation():
    one, other = [0, 0, 1, 0, 1, 0, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]
    single = [summarize_attack(LABELS, BEFORE, predicting(run)) for run in (one, other)]
    both = summarize_attack(LABELS, BEFORE, predicting(one, other))
    for name in ("accuracy", "g_mean", "success_rate"):
        values = [each[name] for each in single]
        assert both[name] == pytest.approx(np.mean(values))
        assert both["spread"][name] == pytest.approx(np.std(values, ddof=1))
        assert [run[name] for run in both["runs"]] == values
    assert both["recall"]["truck"] == pytest.approx((0.5 + 1) / 2)
    assert both["interval"] == single[0]["interval"]
    assert both["most_predicted"] == {"class": "truck", "fraction": pytest.approx(10 / 16)}


def test_models_are_compared_on_the_same_images():
    robust = Target(None, {}, None, {"fgsm": {"0.1": predicting([0, 0, 0, 0, 1, 1, 2, 2])}})
    plain = Target(None, {}, None, {"fgsm": {"0.1": predicting([0, 0, 1, 1, 1, 0, 2, 0])}})
    comparison = adversarial.compare(robust, plain, LABELS)["fgsm"]["0.1"]
    assert comparison["difference"] == pytest.approx(0.5)


# ---- attacks --------------------------------------------------------------------------------


def test_attacks_keep_to_their_epsilon_and_pgd_gets_stronger_with_it(model, train, dev):
    epsilons = [0.01, 0.03, 0.06]
    attacks = attack_all(model, train, dev, epsilons, seed=0, quick=True)
    assert set(attacks) == set(ATTACKS)
    clean = to_float(dev.images)
    for found in attacks.values():
        assert [attacked.epsilon for attacked in found.values()] == epsilons
        for key, attacked in found.items():
            epsilon = float(key)
            assert attacked.epsilon == epsilon
            assert (attacked.images - clean).abs().max() <= epsilon + 1e-6
            assert attacked.images.min() >= 0
            assert attacked.images.max() <= 1
            predicted = predict_logits(model, attacked.images).argmax(dim=1)
            assert torch.equal(attacked.predicted[0], predicted)
    correct = [attacked.predicted[0] == dev.labels for attacked in attacks["pgd"].values()]
    for smaller, larger in zip(correct, correct[1:], strict=False):
        assert not (larger & ~smaller).any()


def test_chosen_images_keep_the_proportions_of_the_classes():
    dataset = make_dataset("dev", (400, 90, 2))
    chosen = choose_images(dataset, 50, seed=0)
    assert chosen.class_counts == [41, 9, 1]
    assert torch.equal(choose_images(dataset, 50, seed=0).images, chosen.images)
    assert not torch.equal(choose_images(dataset, 50, seed=1).images, chosen.images)


def test_more_expensive_models_are_attacked_on_fewer_images(dev):
    one_view, ten_views = (
        build_model("SmallVGG"),
        build_model("SmallVGG", tta_flip=True, tta_shift=2),
    )
    many = adversarial.count_affordable([one_view.eval()], dev)
    few = adversarial.count_affordable([ten_views.eval()], dev)
    assert 200 <= few < many / 8
    assert adversarial.count_affordable([build_model().eval()], dev) > 5000


# ---- figures --------------------------------------------------------------------------------


def test_examples_are_images_on_which_the_attack_succeeded_with_the_classes_in_turn():
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 1])
    before = torch.tensor([0, 0, 0, 0, 1, 2, 2, 0])
    after = torch.tensor([0, 1, 1, 1, 0, 0, 2, 2])
    assert adversarial.choose_examples(labels, before, after) == [1, 4, 5, 2, 3]
    assert adversarial.choose_examples(labels, before, before) == []


def test_report_epsilons_are_shown_if_they_are_there():
    def attacks(*epsilons):
        return {f"{each:g}": replace(predicting([0]), epsilon=each) for each in epsilons}

    def chosen(*epsilons):
        return [float(key) for key in adversarial.choose_epsilons(attacks(*epsilons))]

    assert chosen(0.02, 0.05, 0.1, 0.3) == [0.05, 0.1]
    assert chosen(0.02, 0.05, 0.3) == [0.05, 0.3]
    assert chosen(0.02) == [0.02]


def test_fgsm_figure_shows_clean_image_perturbation_and_attacked_image(model, dev):
    attacks = attack_all(model, None, dev, [0.1, 0.2], seed=0, quick=True)
    target = Target(model, {}, predict_logits(model, dev.images), attacks)
    figure = adversarial.draw_fgsm(dev, target)
    shown = attacks["fgsm"]["0.1"]
    index = adversarial.choose_examples(dev.labels, target.predicted, shown.predicted[0])[0]
    axes = [ax for ax in figure.axes if ax.get_ylabel()]  # the first column
    clean, noise, attacked = (torch.tensor(ax.images[0].get_array()) for ax in axes[:3])
    assert torch.allclose(clean.permute(2, 0, 1), to_float(dev.images[index]))
    assert torch.allclose(attacked.permute(2, 0, 1), shown.images[index])
    assert torch.allclose((noise - 0.5) / 5, attacked - clean, atol=1e-6)  # "times 5"
    assert axes[1].get_ylabel() == "perturbation,\ntimes 5"
    probabilities = target.logits[index].softmax(0), shown.logits[0, index].softmax(0)
    confidences = " -> ".join(f"{each.max():.0%}" for each in probabilities)
    assert axes[2].get_title().splitlines()[1] == confidences


def test_each_attack_has_a_curve_of_its_own(model, train, dev, monkeypatch):
    monkeypatch.setitem(ATTACKS, "sixth", "a sixth attack")
    attacks = attack_all(model, train, dev, [0.1], seed=0, quick=True)
    attacks["sixth"] = attacks["fgsm"]
    target = Target(model, {}, predict_logits(model, dev.images), attacks)
    summary = adversarial.summarize(target, dev.labels)
    figure = adversarial.draw_epsilons({"plain": summary})
    assert len(figure.axes) == 3
    for ax in figure.axes:
        curves = [line for line in ax.lines if len(line.get_xdata()) > 1]
        styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in curves}
        assert {line.get_label() for line in curves} == set(ATTACKS.values())
        assert len(styles) == len(ATTACKS)
        seeds = sum(
            len(each.get("runs", [])) for by in summary["attacks"].values() for each in by.values()
        )
        assert len(ax.lines) == len(curves) + seeds


def test_figures_say_so_where_the_attack_never_succeeded(model, dev):
    target = Target(model, {}, predict_logits(model, dev.images), {})
    unchanged = Attacked(0.1, to_float(dev.images), target.logits[None])
    target.attacks["fgsm"] = {"0.1": unchanged}
    figure = adversarial.draw_fgsm(dev, target)
    assert "the attack succeeded on no image" in " ".join(figure.get_suptitle().split())


# ---- the script -----------------------------------------------------------------------------


def test_script_writes_scores_by_model_attack_and_epsilon(
    run_script, course_folder, checkpoint, tmp_path
):
    options = ("--data", course_folder, *QUICK, "--checkpoint", checkpoint)
    epsilons = ("--epsilons", "0.1", "0.0501", "0.0502", "0.1")  # alike in two digits, and twice
    robust = ("--robust", checkpoint)
    status, printed, error = run_script(adversarial, *options, *epsilons, *robust)
    assert status == 0, error
    assert "attacking 60 dev images" in printed
    written = json.loads((tmp_path / "out/adversarial.json").read_text())
    assert set(written["models"]) == {"plain", "robust"}
    plain = written["models"]["plain"]
    assert plain["checkpoint"]["file"] == "mine.ckpt"
    assert set(plain["attacks"]) == set(ATTACKS)
    for by_epsilon in plain["attacks"].values():
        assert list(by_epsilon) == ["0.0501", "0.0502", "0.1"]
        for scores in by_epsilon.values():
            keys = {"accuracy", "balanced_accuracy", "g_mean", "recall", "success_rate"}
            assert keys <= set(scores["interval"])
            assert keys | {"most_predicted"} <= set(scores)
    assert {"runs", "spread"} <= set(plain["attacks"]["universal"]["0.1"])
    assert "pgd" in written["comparison"]
    for name in ("4-fgsm", "5-universal", "5-epsilons", "5-saliency"):
        assert (tmp_path / f"out/{name}.png").exists()


def test_script_trains_the_final_recipe_once(run_script, course_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(adversarial, "SHIPPED_ROBUST", tmp_path / "out/final.ckpt")
    options = ("--data", course_folder, *QUICK, "--epsilons", "0.1", "--images", "10")
    status, printed, error = run_script(adversarial, *options)
    assert status == 0, error
    assert "training a model first" in printed
    metadata = load_checkpoint(tmp_path / "out/final.ckpt").metadata
    assert metadata["recipe"]["name"] == "final"
    status, printed, error = run_script(adversarial, *options)
    assert status == 0, error
    assert "training a model first" not in printed
    dataset = make_dataset("train", (5, 5, 5))
    metadata["trained_on"] = dataset.metadata()
    save_checkpoint(tmp_path / "out/final.ckpt", build_model(), metadata)
    content = (tmp_path / "out/final.ckpt").read_bytes()
    status, _, error = run_script(adversarial, *options)
    assert status == 2
    assert "out/final.ckpt: was trained on other images" in error
    assert (tmp_path / "out/final.ckpt").read_bytes() == content


def test_script_without_training_set_leaves_universal_perturbations_out(
    run_script, course_folder, checkpoint, tmp_path
):
    (course_folder / "train.pickle").unlink()
    options = ("--data", course_folder, *QUICK, "--robust", checkpoint, "--epsilons", "0.1")
    status, _, error = run_script(adversarial, *options)
    assert status == 2
    assert error.count("\n") == 1
    assert "--checkpoint" in error
    status, printed, error = run_script(adversarial, *options, "--checkpoint", checkpoint)
    assert status == 0, error
    assert "left out" in printed
    models = json.loads((tmp_path / "out/adversarial.json").read_text())["models"]
    assert set(models["plain"]["attacks"]) == {"random_noise", "fgsm", "pgd"}


def test_pixel_range_is_that_of_both_bare_checkpoints(
    run_script, course_folder, checkpoint, model, dev, tmp_path, monkeypatch
):
    monkeypatch.setattr(adversarial, "save_figures", lambda *_: None)
    (course_folder / "train.pickle").unlink()  # or fitting universal perturbations takes seconds
    bare = tmp_path / "bare.pt"  # of a model that was trained on [-1, 1]
    torch.save({"model_state_dict": model.state_dict()}, bare)
    options = ("--data", course_folder, *QUICK, "--epsilons", "0.1", "--images", "60")
    options += ("--checkpoint", bare, "--robust", bare)
    clean = {}
    for pixel_range in ("-1,1", "0,1"):
        status, _, error = run_script(adversarial, *options, "--pixel-range", pixel_range)
        assert status == 0, error
        models = json.loads((tmp_path / "out/adversarial.json").read_text())["models"]
        clean[pixel_range] = models["plain"]["clean"]
        assert models["robust"]["clean"] == models["plain"]["clean"]
    correct = predict_logits(model, dev.images).argmax(dim=1) == dev.labels
    assert clean["-1,1"]["accuracy"] == pytest.approx(correct.float().mean().item())
    assert clean["0,1"] != clean["-1,1"]
    options = (*options[:-4], "--checkpoint", checkpoint, "--robust", checkpoint)
    status, _, error = run_script(adversarial, *options, "--pixel-range", "0,1")
    assert status == 2
    assert "--pixel-range" in error


def test_robust_model_is_of_this_very_data_or_the_shipped_one(train, dev, tmp_path):
    def find(training_set, dev):
        results = SimpleNamespace(folder=tmp_path)
        return adversarial.find_robust(SimpleNamespace(robust=None), results, training_set, dev)

    assert find(train, dev) == adversarial.SHIPPED_ROBUST
    assert find(train, replace(dev, name="synthetic")) is None
    own = tmp_path / "robust.ckpt"
    metadata = {"recipe": asdict(FINAL), "trained_on": {"name": "tiny", **train.metadata()}}
    save_checkpoint(own, build_model(), metadata)
    assert find(train, dev) == own
    assert find(make_dataset("train", (5, 5, 5)), dev) == adversarial.SHIPPED_ROBUST


def test_a_model_whose_logits_are_not_finite_is_refused(run_script, course_folder, checkpoint):
    huge = build_model()
    for weight in huge.parameters():
        torch.nn.init.constant_(weight, 1e38)
    save_checkpoint(checkpoint.with_name("huge.ckpt"), huge, {})
    options = ("--data", course_folder, *QUICK, "--images", 3, "--robust", checkpoint)
    status, _, error = run_script(adversarial, *options, "--checkpoint", "huge.ckpt")
    assert (status, error) == (2, "error: huge.ckpt: its logits are NaN or infinite\n")


@pytest.mark.parametrize("epsilon", ["-1", "0", "1.5", "nan", "much"])
def test_bad_epsilon_ends_with_one_line(run_script, course_folder, epsilon):
    status, _, error = run_script(adversarial, "--data", course_folder, "--epsilons", epsilon)
    assert status == 2
    assert error.count("\n") == 1
    assert f"'{epsilon}' is " in error


@needs_course_data
@pytest.mark.slow
def test_attacks_break_the_reports_own_model():
    folder = open_data(str(COURSE_DATA))
    train, dev = folder.load("train"), folder.load("dev")
    model = load_checkpoint(COURSE_DATA / "seed-model.ckpt", (0.0, 1.0)).model
    before, clean = predict_logits(model, dev.images).argmax(dim=1), to_float(dev.images)

    def summarize(images):
        attacked = Attacked(0.05, images, predict_logits(model, images)[None])
        return summarize_attack(dev.labels, before, attacked)

    attacked = in_batches(fgsm, model, clean, dev.labels, epsilon=0.05)
    assert summarize(attacked)["accuracy"] < 0.15
    for seed in (0, 1, 2):  # no lottery
        scores = [
            summarize((clean + universal_perturbation(model, train, epsilon, seed)).clamp(0, 1))
            for epsilon in (0.02, 0.05, 0.1)
        ]
        balanced = [each["balanced_accuracy"] for each in scores]
        assert balanced[0] < 0.779  # without an attack
        assert balanced[1] < 0.68
        assert balanced[2] < 0.45
        assert scores[2]["accuracy"] > 0.85  # all are cars now, and accuracy does not see it
