import json
from collections import Counter
from dataclasses import FrozenInstanceError, asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COURSE_DATA, needs_course_data
from scipy.stats import chisquare
from torch import nn

import training
from common import machine
from common.dataset import as_input, open_source
from common.network import load_checkpoint, predict_logits, with_pixel_range
from training import FINAL, NAIVE, RECIPES, fit, flip_and_shift, least_sampled, shuffled, weighted

CPU = torch.device("cpu")


def labels_of(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def test_shuffled_draws_each_picture_once():
    torch.manual_seed(0)
    for epoch in islice(shuffled(labels_of((100, 20, 5))), 3):
        assert sorted(epoch.tolist()) == list(range(125))


def test_least_sampled_draws_42_42_41():
    torch.manual_seed(0)
    labels = labels_of((100, 20, 5))
    epoch = next(least_sampled(labels))
    assert sorted(Counter(labels[epoch].tolist()).values()) == [41, 42, 42]


def test_least_sampled_counts_never_differ_by_more_than_1_even_across_epochs():
    torch.manual_seed(1)
    labels = labels_of((50, 9, 5))
    counts = np.zeros(3, dtype=int)
    for epoch in islice(least_sampled(labels), 7):
        for label in labels[epoch].tolist():
            counts[label] += 1
            assert np.ptp(counts) <= 1


def test_least_sampled_breaks_ties_evenly_and_reaches_each_picture():
    torch.manual_seed(2)
    labels = labels_of((6, 3, 3))
    first, drawn = Counter(), Counter()
    sampler = least_sampled(labels)
    for epoch in islice(sampler, 600):
        first[labels[epoch[0]].item()] += 1
        drawn.update(epoch.tolist())
    assert chisquare([first[label] for label in range(3)]).pvalue > 0.001
    assert chisquare([drawn[i] for i in range(6)]).pvalue > 0.001
    assert set(drawn) == set(range(12))


def test_samplers_follow_torchs_seed():
    labels = labels_of((50, 9, 5))
    for sampler in (shuffled, least_sampled, lambda labels: weighted(labels, (1, 1, 1))):
        runs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            runs.append(next(sampler(labels)).tolist())
        assert runs[0] == runs[1] != runs[2]


def test_weighted_draws_classes_in_the_ratio_of_their_weights():
    torch.manual_seed(0)
    labels = labels_of((880, 80, 40))
    drawn = torch.cat(list(islice(weighted(labels, (2.0, 1.0, 1.0)), 20)))
    counts = torch.bincount(labels[drawn])
    assert chisquare(counts, [10000, 5000, 5000]).pvalue > 0.001


def test_flip_and_shift_equals_padding_cropping_and_mirroring_one_by_one():
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    padded = np.pad(pictures.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    seen = set()
    for result, source in zip(flip_and_shift(pictures).numpy(), padded, strict=True):
        matches = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if np.array_equal(_crop(source, top, left, mirrored), result)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {mirrored for *_, mirrored in seen} == {False, True}
    assert {0, 8} <= {top for top, *_ in seen}


def _crop(source, top, left, mirrored):
    crop = source[:, top : top + 32, left : left + 32]
    return crop[:, :, ::-1] if mirrored else crop


def test_train_step_returns_the_loss_before_the_step_and_lowers_it(train):
    torch.manual_seed(0)
    net = training.build_network().eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    expected = nn.functional.cross_entropy(net(as_input(train.pictures)), train.labels).item()
    first = training.train_step(net, optimizer, train.pictures, train.labels)
    second = training.train_step(net, optimizer, train.pictures, train.labels)
    assert first == pytest.approx(expected, rel=0.02)
    assert second < first


QUICK = replace(NAIVE, name="quick", epochs=3, batch_size=16)


def test_same_seed_same_net_and_other_seed_other_net(train):
    nets = [fit(QUICK, train, seed, CPU) for seed in (0, 0, 1)]
    logits = [predict_logits(net, train.pictures) for net in nets]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_fit_learns_what_is_easy_and_takes_the_last_epoch(train, dev):
    epochs = []
    recipe = replace(QUICK, epochs=25, sampler="weighted", learning_rate=3e-3)
    net = fit(recipe, train, 0, CPU, after_epoch=lambda net, losses: epochs.append(losses))
    assert training.evaluate(net, dev)["g_mean"] > 0.9
    assert len(epochs) == 25
    assert all(len(losses) == 4 for losses in epochs)  # 60 pictures, 16 a batch
    assert np.mean(epochs[-1]) < 0.5 * np.mean(epochs[0])
    assert not net.training


def test_recipe_decides_when_transforms_start_and_rates_fall(train, monkeypatch):
    transformed, rates = [], []
    monkeypatch.setattr(training, "flip_and_shift", lambda x: transformed.append(1) or x)
    original = training.train_step

    def spy(net, optimizer, pictures, labels):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(net, optimizer, pictures, labels)

    monkeypatch.setattr(training, "train_step", spy)
    recipe = replace(
        QUICK, epochs=6, batch_size=60, plain_share=1 / 3, decay_share=1 / 3, decay_factor=0.1
    )
    fit(recipe, train, 0, CPU)
    assert len(transformed) == 4
    assert rates == pytest.approx([1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)


def test_recipes_are_frozen_and_each_is_an_earlier_one_with_little_changed():
    with pytest.raises(FrozenInstanceError):
        NAIVE.epochs = 1
    assert {recipe.name for recipe in RECIPES.values()} == set(RECIPES)
    recipes = [asdict(recipe) for recipe in RECIPES.values()]
    for number, recipe in enumerate(recipes[1:], start=1):
        changes = [
            {key for key in recipe if recipe[key] != earlier[key]} for earlier in recipes[:number]
        ]
        assert min(len(change - {"name"}) for change in changes) <= 3
        assert all(change for change in changes)


def test_runs_side_by_side_equal_runs_alone(train, dev):
    recipes = [QUICK, replace(QUICK, name="strict", sampler="strict")]
    together = list(training.train_all(recipes, [0, 1], train, dev, CPU))
    for run in together:
        alone = training.train_and_evaluate(run.recipe, run.seed, train, dev, CPU, False)
        assert alone.scores == run.scores
        assert alone.curves == run.curves
    assert [(run.recipe.name, run.seed) for run in together] == [
        ("quick", 0),
        ("quick", 1),
        ("strict", 0),
        ("strict", 1),
    ]


def test_summary_has_means_and_spread_over_seeds(train, dev):
    runs = [training.train_and_evaluate(QUICK, seed, train, dev, CPU, False) for seed in (0, 1, 2)]
    summary = training.summarise(runs)
    scores = [run.scores["accuracy"] for run in runs]
    assert summary["accuracy"] == pytest.approx(np.mean(scores))
    assert summary["spread"]["accuracy"] == pytest.approx(np.std(scores, ddof=1))
    assert summary["recall"]["cat"] == pytest.approx(
        np.mean([run.scores["recall"]["cat"] for run in runs])
    )
    assert len(summary["runs"][0]["curves"]["recall"]) == QUICK.epochs


def test_script_trains_and_its_checkpoint_gives_the_json_files_numbers(
    run_script, course_folder, tmp_path, dev
):
    options = ("--data", course_folder, "--out", "out", "--epochs", 2)
    status, printed, _ = run_script(training, *options, "--recipe", "naive")
    assert status == 0
    assert "report" in printed
    numbers = json.loads((tmp_path / "out/training.json").read_text())["recipes"]["naive"]
    net, about = load_checkpoint(tmp_path / "out/naive.ckpt")
    assert training.evaluate(net, dev)["accuracy"] == numbers["accuracy"]
    assert numbers["recipe"]["epochs"] == about["recipe"]["epochs"] == 2
    assert numbers["report"]["accuracy"] == 0.904
    assert about["trained_on"]["source"] == "course"
    assert (tmp_path / "out/training-naive.png").exists()


@pytest.mark.slow
def test_script_trains_all_recipes_with_several_seeds(run_script, course_folder, tmp_path):
    options = ("--data", course_folder, "--out", "out", "--quick", "--seed", "0,1")
    assert run_script(training, *options, "--recipe", "all")[0] == 0
    numbers = json.loads((tmp_path / "out/training.json").read_text())["recipes"]
    assert list(numbers) == list(training.REPORT_RECIPES)
    assert (tmp_path / "out/training-recipes.png").exists()
    assert (tmp_path / "out/final-seed1.ckpt").exists()


def test_mismatch_shows_two_ranges_of_one_net(run_script, course_folder, tmp_path, dev):
    options = ("--data", course_folder, "--out", "out", "--quick")
    status, printed, _ = run_script(training, *options, "--show-mismatch")
    assert status == 0
    assert "training recipe final" in printed
    numbers = json.loads((tmp_path / "out/mismatch.json").read_text())
    net, about = load_checkpoint(tmp_path / "out/final.ckpt")
    other = with_pixel_range(net, (0.0, 1.0))
    for which, fed in (("right_range", net), ("wrong_range", other)):
        logits = predict_logits(fed, dev.pictures)
        scores = training.evaluate(fed, dev)
        assert numbers[which]["confusion"] == scores["confusion"], logits
    assert not torch.equal(predict_logits(net, dev.pictures), predict_logits(other, dev.pictures))
    assert numbers["checkpoint"] == {"file": "final.ckpt", **about} | {
        "recipe": {**about["recipe"], "class_weights": [1.0, 1.0, 1.0]}
    }
    assert "training recipe final" not in run_script(training, *options, "--show-mismatch")[1]


def test_options_that_do_not_go_together_end_with_one_line(run_script, course_folder):
    options = ("--data", course_folder, "--quick", "--out", "out")
    status, _, error = run_script(training, *options, "--checkpoint", "some.ckpt")
    assert status == 2
    assert "--checkpoint and --pixel-range go with --show-mismatch" in error
    status, _, error = run_script(training, *options, "--show-mismatch", "--recipe", "naive")
    assert status == 2
    assert "--show-mismatch trains nothing" in error
    status, _, error = run_script(training, *options, "--show-mismatch", "--pixel-range", "0,1")
    assert status == 2
    assert "name one by --checkpoint" in error


def test_a_net_that_a_user_trained_is_used_and_not_overwritten(run_script, course_folder):
    options = ("--data", course_folder, "--out", "out")
    assert run_script(training, *options, "--epochs", 1)[0] == 0
    assert "training recipe" not in run_script(training, *options, "--show-mismatch")[1]
    assert load_checkpoint(Path("out/final.ckpt"))[1]["recipe"]["epochs"] == 1


def test_comparison_figure_shows_ours_and_the_reports(train, dev):
    run = training.train_and_evaluate(
        replace(NAIVE, epochs=1), 0, train, dev, CPU, show_progress=False
    )
    figure = training.draw_comparison({"naive": training.summarise([run])})
    points = {line.get_marker(): line.get_xdata() for line in figure.axes[0].lines[:3]}
    assert points["D"].item() == 0.904
    assert points["o"].item() == run.scores["accuracy"]


def test_kept_memory_changes_no_result(train):
    before = predict_logits(fit(QUICK, train, 0, CPU), train.pictures)
    machine.prepare_torch(threads=1)
    assert torch.equal(before, predict_logits(fit(QUICK, train, 0, CPU), train.pictures))


@pytest.mark.slow
def test_the_reports_lesson_shows_on_sketches():
    train, dev = (open_source("sketches").load(part) for part in ("train", "dev"))
    naive, final = (run.scores for run in training.train_all([NAIVE, FINAL], [0], train, dev, CPU))
    assert naive["accuracy"] > 0.9
    assert min(naive["recall"], key=naive["recall"].get) == "cat"
    assert naive["g_mean"] < naive["accuracy"] - 0.1
    assert naive["g_mean"] + 0.1 < final["g_mean"] < 0.99


@needs_course_data
@pytest.mark.slow
def test_final_recognises_all_classes_of_the_courses_pictures_and_naive_does_not():
    train, dev = (open_source(str(COURSE_DATA)).load(part) for part in ("train", "dev"))
    runs = list(training.train_all([NAIVE, FINAL], [0, 1, 2], train, dev, CPU))
    g_mean = {
        name: training.summarise(part)["g_mean"]
        for name, part in (("naive", runs[:3]), ("final", runs[3:]))
    }
    assert g_mean["final"] > 0.65
    assert g_mean["naive"] < g_mean["final"] - 0.05
