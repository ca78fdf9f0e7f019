"""Step 2: one checkpoint, the ranking of many, and images of one's own."""

import csv
import json
import pickle
import re
import zipfile
from pathlib import Path

import evaluation
from common import metrics
from common.cli import UserError
from common.data import CLASS_NAMES, Dataset, to_float
from common.model import MAX_FILE_SIZE, build_model, predict_logits, save_checkpoint

import numpy as np
import pytest
import torch
from conftest import write_course_pickle
from imblearn.metrics import geometric_mean_score
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score

# The images are plain colors. A class has its channel `lead` gray levels above the next class's,
# which is at 100; the third is at 60. The model below predicts the brightest channel.
LEADS = {
    0: [15] * 40 + [5] * 15 + [-9] * 5,
    1: [15] * 18 + [-9] * 2,
    2: [15] * 8 + [3] + [-9],
}


@pytest.fixture
def dev_set(tmp_path) -> Dataset:
    """90 images in a folder called hidden, of which the model gets 82 right."""
    labels = torch.tensor([label for label, leads in LEADS.items() for _ in leads])
    leads = torch.tensor([lead for leads in LEADS.values() for lead in leads])
    colors = torch.full((len(labels), 3), 60)
    rows = torch.arange(len(labels))
    colors[rows, labels] = 100 + leads
    colors[rows, (labels + 1) % 3] = 100
    images = colors[:, :, None, None].expand(-1, -1, 32, 32).to(torch.uint8).contiguous()
    dataset = Dataset("hidden", "dev", images, labels)
    (tmp_path / "hidden").mkdir()
    write_course_pickle(tmp_path / "hidden" / "dev.pickle", dataset)
    return dataset


def brightest_channel(bias=(0, 0, 0), pixel_range=(-1.0, 1.0)):
    """Return a CourseNet whose logits are a tenth of the channels' gray levels plus a bias."""
    model = build_model(pixel_range=pixel_range)
    low, high = pixel_range
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        for channel in range(3):
            model.conv1.weight[channel, channel, 2, 2] = 1
            model.conv1.bias[channel] = -low  # no pixel is below 0 then, where ReLU would cut it
            model.conv2.weight[channel, channel, 2, 2] = 1
            model.fc1.weight[channel, 25 * channel : 25 * (channel + 1)] = 1 / 25
            model.fc2.weight[channel, channel] = 1
            model.fc3.weight[channel, channel] = 25.5 / (high - low)
        model.fc3.bias += torch.tensor(bias) / 10
    return model.eval()


def infinite_logits():
    """Return a CourseNet whose weights are finite, but not its logits."""
    model = brightest_channel()
    with torch.no_grad():
        model.fc2.weight *= 1e30
        model.fc3.weight *= 1e30
    return model


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- one checkpoint -------------------------------------------------------------------------


def test_numbers_of_one_checkpoint(run_script, dev_set):
    save_checkpoint(Path("mine.ckpt"), brightest_channel(), {})
    options = ("--data", "hidden", "--checkpoint", "mine.ckpt", "--out", "out")
    status, printed, _ = run_script(evaluation, *options)
    assert status == 0
    assert "Only 10 images of cat: one changes the recall by 10.0 percentage points." in printed
    assert "report" not in printed.splitlines()[3]
    numbers = json.loads(Path("out/evaluation.json").read_text())
    logits = predict_logits(brightest_channel(), dev_set.images)
    expected = metrics.evaluate(dev_set.labels, logits.argmax(dim=1))
    for key in ("accuracy", "balanced_accuracy", "g_mean", "recall", "interval", "confusion"):
        assert numbers[key] == expected[key]
        if key in metrics.SCORE_TITLES:
            low, high = numbers["interval"][key]
            assert f"{numbers[key]:.3f}  [{low:.3f}, {high:.3f}]" in printed
    probabilities = logits.softmax(dim=1)
    assert numbers["ece"] == metrics.expected_calibration_error(probabilities, dev_set.labels)
    rows = read_csv(Path("out/predictions.csv"))
    labels, predicted = ([row[key] for row in rows] for key in ("label", "predicted"))
    assert numbers["g_mean"] == pytest.approx(geometric_mean_score(labels, predicted))
    for name in ("confusion", "errors", "calibration"):
        assert Image.open(f"out/{name}.png").width > 500


def test_report_stands_beside_the_pre_trained_model_on_dev_only(
    run_script, dev_set, course_folder, monkeypatch
):
    save_checkpoint(Path("pre_trained.ckpt"), brightest_channel((99, 0, 0)), {})
    monkeypatch.setattr(evaluation, "PRE_TRAINED", Path("pre_trained.ckpt").resolve())
    monkeypatch.setattr(evaluation, "ERRORS_SHOWN", 1)
    options = ("--data", "hidden", "--out", "out")
    _, printed, _ = run_script(evaluation, *options)
    assert re.search(r"accuracy +0\.88 +0\.667 ", printed)
    assert re.search(r"G-mean +0\.00 +0\.000 +\[0\.000, 0\.[1-9]", printed)
    _, named, _ = run_script(evaluation, *options, "--checkpoint", "pre_trained.ckpt")
    assert named == printed
    _, printed, _ = run_script(
        evaluation, "--data", course_folder, "--out", "out", "--split", "train"
    )
    assert " report " not in printed


def test_bare_checkpoint_is_tried_in_both_pixel_ranges(run_script, dev_set):
    model = brightest_channel(pixel_range=(0.0, 1.0))
    torch.save({"model_state_dict": model.state_dict()}, "bare.ckpt")
    options = ("--data", "hidden", "--checkpoint", "bare.ckpt", "--out", "out")
    status, printed, _ = run_script(evaluation, *options)
    assert status == 0
    taken = json.loads(Path("out/evaluation.json").read_text())
    other = taken["other_range"]
    text = " ".join(printed.split())
    assert "Assumed: [-1, 1], as in the course, with G-mean 0.000 and accuracy 0.667." in text
    scores = f"{other['g_mean']:.3f} and 0.911"
    assert f"With [0, 1], they are {scores}, which is better: use --pixel-range 0,1" in text
    assert other["comparison"]["difference"] == pytest.approx(other["g_mean"] - taken["g_mean"])

    _, printed, _ = run_script(evaluation, *options, "--pixel-range", "0,1")
    assert json.loads(Path("out/evaluation.json").read_text())["g_mean"] == other["g_mean"]
    assert "does not state" not in printed


@pytest.mark.parametrize(
    ("file", "named", "right", "wrong"),
    [
        ("mine.ckpt", None, "[0, 1]", "[-1, 1]"),
        ("bare.ckpt", "0,1", "[0, 1]", "[-1, 1]"),
        ("bare.ckpt", "-1,1", "[-1, 1]", "[0, 1]"),
    ],
)
def test_mismatch_evaluates_one_model_in_two_ranges(run_script, dev_set, file, named, right, wrong):
    model = brightest_channel(pixel_range=(0.0, 1.0))
    save_checkpoint(Path("mine.ckpt"), model, {})
    torch.save(model.state_dict(), "bare.ckpt")
    options = ["--data", "hidden", "--out", "out", "--checkpoint", file, "--show-mismatch"]
    options += ["--pixel-range", named] if named else []
    status, printed, _ = run_script(evaluation, *options)
    assert status == 0
    found = json.loads(Path("out/evaluation.json").read_text())
    other = found["other_range"]
    assert other["pixel_range"] == json.loads(wrong)
    pixels = to_float(dev_set.images)
    predicted = {}
    for scores, pixel_range in ((found, right), (other, wrong)):
        low, high = json.loads(pixel_range)
        with torch.no_grad():
            classes = model.logits(pixels * (high - low) + low).argmax(dim=1)
        assert scores["accuracy"] == accuracy_score(dev_set.labels, classes)
        assert scores["g_mean"] == pytest.approx(geometric_mean_score(dev_set.labels, classes))
        predicted[pixel_range] = classes
    expected = metrics.compare(dev_set.labels, predicted[wrong], predicted[right])
    assert other["comparison"] == expected
    assert (
        f"With pixels in {wrong} instead of {right}, the range it was trained on, {file} has a "
        f"G-mean of {other['g_mean']:.3f} instead of {found['g_mean']:.3f}: {expected['text']}."
    ) in printed
    assert "--pixel-range" not in printed


def test_ranking_compares_ranges_and_advises_on_assumed_ones_only(run_script, dev_set):
    model = brightest_channel(pixel_range=(0.0, 1.0))
    save_checkpoint(Path("mine.ckpt"), model, {})
    torch.save(model.state_dict(), "bare.ckpt")
    options = ("--data", "hidden", "--out", "out", "--checkpoint", "mine.ckpt", "bare.ckpt")
    ranges = {}
    for added in ((), ("--show-mismatch",), ("--show-mismatch", "--pixel-range", "-1,1")):
        _, printed, _ = run_script(evaluation, *options, *added)
        models = json.loads(Path("out/ranking.json").read_text())["models"]
        assert [each["name"] for each in models] == ["mine.ckpt", "bare.ckpt"]
        others = [each["other_range"] for each in models]
        ranges[added] = [other and other["pixel_range"] for other in others]
        text = " ".join(printed.split())
        assert ("bare.ckpt does not state its pixel range" in text) == (len(added) < 3)
        assert ("use --pixel-range 0,1" in text) == (len(added) < 3)
        assert ("trained on, mine.ckpt has a G-mean of 0.000" in text) == bool(added)
        column = [row["g_mean_in_other_range"] for row in read_csv(Path("out/ranking.csv"))]
        assert column == [f"{other['g_mean']:.4f}" if other else "" for other in others]
    assert list(ranges.values()) == [[None, [0, 1]], *[[[-1, 1], [0, 1]]] * 2]


def test_mismatch_of_a_model_whose_logits_are_not_finite_is_refused(run_script, dev_set):
    model = brightest_channel(pixel_range=(0.0, 1.0))
    with torch.no_grad():  # pixels below 0 overflow
        model.conv1.weight[3, :, 2, 2] = -1e30
        model.conv2.weight[3, 3] = 1e30
    save_checkpoint(Path("huge.ckpt"), model, {})
    options = ("--data", "hidden", "--out", "out", "--checkpoint", "huge.ckpt")
    assert run_script(evaluation, *options)[0] == 0
    status, _, error = run_script(evaluation, *options, "--show-mismatch")
    reason = "with pixels in [-1, 1]: its logits are NaN or infinite"
    assert (status, error) == (2, f"error: huge.ckpt: {reason}\n")


def test_pixel_range_is_refused_for_a_checkpoint_that_has_its_own(run_script, dev_set):
    save_checkpoint(Path("mine.ckpt"), brightest_channel(), {})
    options = ("--data", "hidden", "--checkpoint", "mine.ckpt", "--pixel-range", "0,1")
    status, _, error = run_script(evaluation, *options)
    assert status == 2
    assert "mine.ckpt: has its own pixel range, -1,1" in error


def test_most_confident_errors_come_first(dev):
    logits = torch.nn.functional.one_hot(dev.labels, 3).float() * 5
    for index, strength in ((4, 9.0), (9, 0.5)):
        logits[index] = strength * torch.eye(3)[(dev.labels[index] + 1) % 3]
    figure = evaluation.draw_errors(dev, logits.softmax(dim=1))
    captions = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert [caption.split("\n")[1] for caption in captions] == ["100%", "45%"]


# ---- the ranking ----------------------------------------------------------------------------


class Hostile:
    """Unpickled by Python's own unpickler, it would write a file."""

    def __reduce__(self):
        return Path.touch, (Path("hostile-code-ran"),)


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def hand_ins(dev_set) -> Path:
    """A folder of twelve hand-ins and more: good, identical, almost so, broken and hostile."""
    folder = Path("hand_ins")
    (folder / "eve").mkdir(parents=True)
    save_checkpoint(folder / "good.ckpt", brightest_channel(), {})
    save_checkpoint(folder / "eve" / "good.ckpt", brightest_channel(), {})
    save_checkpoint(folder / "nearly.ckpt", brightest_channel((0, 0, -4)), {})  # loses one cat
    save_checkpoint(folder / "no_cat.ckpt", brightest_channel((0, 0, -99)), {})
    save_checkpoint(folder / "always_car.ckpt", brightest_channel((99, 0, 0)), {})
    save_checkpoint(folder / "infinite.ckpt", infinite_logits(), {})

    raw = (folder / "good.ckpt").read_bytes()
    worse = (folder / "no_cat.ckpt").read_bytes()
    packed = {"../../ann/report/model.ckpt": raw, "ann/models/other.ckpt": worse}
    write_zip(folder / "ann.zip", packed | {"__MACOSX/ann/._model.ckpt": b"x"})
    long_name = f"{'long/' * 50}b.ckpt"
    write_zip(folder / "two.zip", {"a.PT": raw, long_name: worse})

    (folder / "text.ckpt").write_text("not a checkpoint")
    (folder / "cut.ckpt").write_bytes(raw[: len(raw) // 2])
    (folder / "hostile.ckpt").write_bytes(pickle.dumps(Hostile()))
    (folder / "=1+1 $x$ \x1b[31m.ckpt").write_bytes(b"")
    (folder / "cut.zip").write_bytes((folder / "ann.zip").read_bytes()[:-100])
    write_zip(folder / "none.zip", {"readme.txt": b"no checkpoint"})
    write_zip(folder / "bomb.zip", {"model.ckpt": bytes(MAX_FILE_SIZE + 1)})
    write_zip(folder / "lzma.zip", {"model.ckpt": raw}, zipfile.ZIP_LZMA)
    write_zip(folder / "hostile.zip", {"model.ckpt": pickle.dumps(Hostile())})
    return folder


GOOD = ["good.ckpt", "eve/good.ckpt", "ann.zip", "two.zip: a.PT"]
WORSE = ["no_cat.ckpt", f"two.zip: {'long/' * 50}b.ckpt", "always_car.ckpt"]
FAILED = {
    "text.ckpt": "not a file of torch.save",
    "cut.ckpt": "not a file of torch.save",
    "hostile.ckpt": "not a file of torch.save",
    "hostile.zip": "not a file of torch.save",
    "cut.zip": "broken, too large, or not a zip file",
    "none.zip": "holds no checkpoint, or more than 10",
    "bomb.zip": "more than 64 MB",
    "lzma.zip": "not readable",
    "infinite.ckpt": "NaN or infinite",
    "missing.ckpt": "no such file",
    "empty": "a folder without",
}


def test_ranking_of_good_identical_broken_and_hostile_hand_ins(run_script, hand_ins):
    Path("empty").mkdir()
    before = set(Path().iterdir())
    options = ("--data", "hidden", "--out", "out", "--checkpoint")
    status, printed, error = run_script(evaluation, *options, "hand_ins", "missing.ckpt", "empty")
    assert (status, error) == (0, "")
    assert set(Path().iterdir()) - before == {Path("out")}  # no code ran, nothing was unpacked
    assert "\x1b" not in printed

    numbers = json.loads(Path("out/ranking.json").read_text())
    models = {found["name"]: found for found in numbers["models"]}
    ranks = {name: found["rank"] for name, found in models.items()}
    assert ranks == dict.fromkeys(GOOD, 1) | {"nearly.ckpt": 5} | dict.fromkeys(WORSE, 6)
    failed = numbers["not_evaluated"]
    assert len(failed) == len(FAILED) + 1  # and the one with the odd name
    for name, reason in FAILED.items():
        assert reason in failed[name]
        line = rf"^{re.escape(name)} +not evaluated: .*{re.escape(reason)}"
        assert re.search(line, printed, re.MULTILINE)

    nearly, best = models["nearly.ckpt"], models["ann.zip"]
    assert nearly["to_best"]["difference"] == pytest.approx(nearly["g_mean"] - best["g_mean"])
    text = " ".join(printed.split())
    tied = re.search(r"Cannot be told apart from [^:]*: (.*?)\. Same predictions: (.*?)\. ", text)
    assert set(tied[2].split(", ")) == set(GOOD)
    others = {*GOOD, "nearly.ckpt"} - {numbers["models"][0]["name"]}
    assert set(tied[1].split(", ")) == others


def test_ranking_files_are_right_and_safe_to_open(run_script, hand_ins):
    run_script(evaluation, "--data", "hidden", "--out", "out", "--checkpoint", "hand_ins")
    rows = read_csv(Path("out/ranking.csv"))
    assert all(row["name"][0] not in "=+-@" for row in rows)
    assert sum("=1+1" in row["name"] for row in rows) == 1
    evaluated = [row for row in rows if row["rank"]]
    assert [int(row["rank"]) for row in evaluated] == [1, 1, 1, 1, 5, 6, 6, 6]
    assert {row["tied_with_best"] for row in evaluated[:5]} == {"yes"}
    assert {row["tied_with_best"] for row in evaluated[5:]} == {"no"}
    predictions = sorted(Path("out").glob("ranking-predictions-*.csv"))
    assert len(predictions) == len(evaluated)
    named = json.loads(Path("out/ranking.json").read_text())["models"]
    assert {each["predictions"] for each in named} == {path.name for path in predictions}
    # Each row's scores are those of one of the predictions files, by another library.
    recomputed = set()
    for path in predictions:
        labels, predicted = np.array([(r["label"], r["predicted"]) for r in read_csv(path)]).T
        reference = (accuracy_score, balanced_accuracy_score, geometric_mean_score)
        recomputed.add(tuple(f"{score(labels, predicted):.4f}" for score in reference))
    assert {tuple(row[key] for key in metrics.SCORE_TITLES) for row in evaluated} == recomputed
    for row in evaluated:
        assert float(row["g_mean_low"]) <= float(row["g_mean"]) <= float(row["g_mean_high"])
    assert Image.open("out/ranking.png").width > 1000


def test_ranking_changes_with_the_metric_and_says_so(run_script, dev_set):
    # The one knows no cat; the other takes a quarter of the cars for trucks.
    save_checkpoint(Path("no_cat.ckpt"), brightest_channel((0, 0, -99)), {})
    save_checkpoint(Path("trucks.ckpt"), brightest_channel((0, 8, 0)), {})
    options = ("--data", "hidden", "--out", "out", "--checkpoint", "no_cat.ckpt", "trucks.ckpt")
    first = {}
    for score in metrics.SCORE_TITLES:
        _, printed, _ = run_script(evaluation, *options, "--rank-by", score)
        ranking = json.loads(Path("out/ranking.json").read_text())["models"]
        first[score] = ranking[0]["name"]
        assert ranking[0][score] > ranking[1][score]
    assert first["accuracy"] == "no_cat.ckpt"
    assert first["balanced_accuracy"] == first["g_mean"] == "trucks.ckpt"
    text = " ".join(printed.split())
    assert (
        "scores 0.667. First here: no_cat.ckpt; pairs in the opposite order to G-mean: 1 of 1"
        in text
    )
    assert (
        "scores 0.333. First here: trucks.ckpt; pairs in the opposite order to G-mean: 0 of 1"
        in text
    )


def evaluated(name, labels, predicted):
    """Return a model that predicts these classes."""
    logits = torch.nn.functional.one_hot(predicted, 3).float()
    scores = metrics.scores(metrics.confusion_matrix(labels, predicted))
    return evaluation.Evaluated(name, {}, logits, scores)


def test_each_model_has_a_file_of_predictions_with_its_name():
    names = ["שרה.ckpt", "דוד.ckpt", "a/b.ckpt", "A b.ckpt", "a_b-2.ckpt", "a_b.ckpt"]
    names += [300 * "x" + end for end in ("y", "z.ckpt")]
    models = [evaluation.Evaluated(name, {}, None, {}) for name in names]
    expected = ["שרה", "דוד", "a_b", "A_b-2", "a_b-2-2", "a_b-3", 40 * "x", 40 * "x" + "-2"]
    assert evaluation.name_predictions(models) == [
        f"ranking-predictions-{name}.csv" for name in expected
    ]


def test_few_of_equally_good_models_are_called_worse_than_the_best(monkeypatch):
    monkeypatch.setattr(metrics, "DRAWS", 2000)
    generator, worse = np.random.default_rng(0), []
    labels = torch.arange(3).repeat_interleave(torch.tensor([300, 80, 60]))
    dataset = Dataset("many", "dev", torch.zeros(len(labels), 3, 1, 1), labels)
    for _ in range(5):
        correct = generator.random((20, len(labels))) < 0.75
        predicted = torch.where(torch.from_numpy(correct), labels, (labels + 1) % 3)
        best, *others = evaluation.rank(
            [evaluated("a model", labels, each) for each in predicted], dataset, "g_mean"
        )
        for model in others:
            single = metrics.compare(labels, model.predicted, best.predicted)
            worse.append((model.to_best["interval"][1] < 0, single["interval"][1] < 0))
    corrected, uncorrected = np.mean(worse, axis=0)
    assert corrected <= 0.05
    assert uncorrected > 0.15


def test_a_tie_is_not_reversed_in_either_order(dev):
    cars = evaluated("cars", dev.labels, torch.zeros_like(dev.labels))
    no_cat = evaluated("no cat", dev.labels, dev.labels % 2)  # G-mean 0, too
    for models in ([cars, no_cat], [no_cat, cars]):
        texts = evaluation.describe_metrics(evaluation.rank(models, dev, "g_mean"), dev, "g_mean")
        said = [text for text in texts if "pairs in the opposite order to G-mean: 0 of 0" in text]
        assert len(said) == 2


def test_pixel_range_in_a_ranking_is_for_bare_checkpoints_only(run_script, dev_set):
    save_checkpoint(Path("ours.ckpt"), brightest_channel(), {})
    torch.save(brightest_channel(pixel_range=(0.0, 1.0)).state_dict(), "bare.ckpt")
    options = ("--data", "hidden", "--out", "out", "--checkpoint", "ours.ckpt", "bare.ckpt")
    for pixel_range, ranks in (("0,1", [1, 1]), ("-1,1", [1, 2])):
        assert run_script(evaluation, *options, "--pixel-range", pixel_range)[0] == 0
        models = json.loads(Path("out/ranking.json").read_text())["models"]
        assert [model["rank"] for model in models] == ranks
        assert models[0]["name"] == "ours.ckpt"


def test_ranking_ends_with_one_line_if_nothing_can_be_evaluated(run_script, dev_set):
    Path("a.ckpt").write_text("x")
    options = ("--data", "hidden", "--out", "out", "--checkpoint", "a.ckpt", "b.ckpt")
    status, _, error = run_script(evaluation, *options)
    assert status == 2
    assert error.count("\n") == 1
    assert "none of 2 can be evaluated; a.ckpt: not a file of torch.save" in error


def test_missing_checkpoint_is_reported_before_the_data_is_read(run_script):
    status, _, error = run_script(evaluation, "--data", "nowhere", "--checkpoint", "typo.ckpt")
    assert (status, error) == (2, "error: typo.ckpt: no such file\n")


def test_a_pipe_among_the_hand_ins_costs_one_line(make_pipe, tmp_path, capsys):
    make_pipe(tmp_path / "eve.zip")
    assert evaluation.find_sources([tmp_path])[0].path == tmp_path
    assert capsys.readouterr().err.endswith("neither a checkpoint nor a zip file: eve.zip\n")
    (source,) = evaluation.find_sources([tmp_path / "eve.zip"])  # as a shell writes hand_ins/*
    with pytest.raises(UserError, match="^eve.zip: no such file$"):
        evaluation.read_source(source)


def test_a_checkpoint_named_twice_counts_once():
    assert len(evaluation.find_sources([Path("a.ckpt"), Path("a.ckpt")])) == 1


def test_hand_ins_keep_their_names_and_what_is_not_read_is_named(tmp_path, capsys):
    students = [f"{name} {'Maximilian ' * 6}_assignsubmission_file_" for name in ("Ann", "Eve")]
    for folder in (*students, "late", "later.ckpt"):
        (tmp_path / folder).mkdir()
    (tmp_path / "gone.ckpt").symlink_to("nowhere")
    for student in students:
        (tmp_path / student / "model.PT").touch()
    (tmp_path / "late" / "notes.txt").touch()
    (tmp_path / "late" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "late" / ".ipynb_checkpoints" / "model-checkpoint.ckpt").touch()
    names = [source.name for source in evaluation.find_sources([tmp_path])]
    assert names == [f"{student}/model.PT" for student in students]
    assert [evaluation._short(name)[:3] for name in names] == ["Ann", "Eve"]
    assert max(len(evaluation._short(name)) for name in names) <= evaluation.MAX_NAME_LENGTH
    assert "zip file: gone.ckpt, late/notes.txt, later.ckpt\n" in capsys.readouterr().err
    assert len({source.name for source in evaluation.find_sources([tmp_path, tmp_path])}) == 2


# ---- images of one's own --------------------------------------------------------------------


def test_image_files_of_any_size_are_classified(run_script):
    """What is seen is the square in the middle, scaled down with antialiasing."""
    save_checkpoint(Path("mine.ckpt"), brightest_channel(), {})
    wide = np.full((320, 480, 3), 255, np.uint8)
    wide[:, 80:400] = (90, 120, 100)
    Image.fromarray(wide).save("truck.png")
    striped = np.full((640, 640, 3), (0, 120, 160), np.uint8)
    striped[:, ::2, 0] = 255  # one pixel wide: 127.5 on average
    Image.fromarray(striped).save("$cat$.webp", lossless=True)
    Image.new("L", (1, 900)).save("thin.gif")
    Path("text.jpg").write_text("no image")
    options = ("--checkpoint", "mine.ckpt", "--out", "out", "--image")
    files = ("truck.png", "$cat$.webp", "thin.gif", "text.jpg", ".")
    status, printed, error = run_script(evaluation, *options, *files)
    assert status == 0
    assert error.count("\n") == 2
    assert error.startswith("not classified: text.jpg: not a readable")
    found = json.loads(Path("out/images.json").read_text())["images"]
    assert [each["file"] for each in found] == list(files[:3])
    for each, levels in zip(found, [(9, 12, 10), (12.75, 12, 16), (0, 0, 0)], strict=True):
        expected = torch.tensor(levels, dtype=torch.float64).softmax(dim=0).tolist()
        assert [each[name] for name in CLASS_NAMES] == pytest.approx(expected, abs=0.01)
        assert f"{each['file']}".ljust(10) + f"  {each['predicted']:>9}" in printed
    assert [each["predicted"] for each in found[:2]] == ["truck", "cat"]
    assert Image.open("out/images.png").height > 900


def test_no_readable_image_ends_with_status_2(run_script):
    save_checkpoint(Path("mine.ckpt"), brightest_channel(), {})
    options = ("--checkpoint", "mine.ckpt", "--out", "out", "--image", "missing.png")
    status, _, error = run_script(evaluation, *options)
    assert status == 2
    assert "none of the files" in error


def test_no_probabilities_of_nan_are_shown(run_script):
    save_checkpoint(Path("infinite.ckpt"), infinite_logits(), {})
    Image.new("RGB", (40, 40), "green").save("green.png")
    options = ("--checkpoint", "infinite.ckpt", "--out", "out", "--image", "green.png")
    status, _, error = run_script(evaluation, *options)
    assert (status, error) == (2, "error: infinite.ckpt: its logits are NaN or infinite\n")


def test_the_pixel_range_taken_for_a_bare_checkpoint_is_said(run_script):
    torch.save(brightest_channel().state_dict(), "bare.ckpt")
    Image.new("RGB", (40, 40), "green").save("green.png")
    options = ("--checkpoint", "bare.ckpt", "--out", "out", "--image", "green.png")
    assert "assuming pixels in [-1, 1]" in run_script(evaluation, *options)[1]
    assert "assuming pixels" not in run_script(evaluation, *options, "--pixel-range", "0,1")[1]
