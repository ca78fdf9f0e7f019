"""Step 5: noise that people hardly notice fools a model; a robust model withstands more of it.

    python adversarial.py
    python adversarial.py --epsilons 0.01 0.02 0.05 --checkpoint models/best.ckpt
    python adversarial.py --robust models/robust.ckpt --images 200

Epsilon is the largest change of any pixel, as a fraction of full brightness. The attacks
themselves are in common/attacks.py.
"""

import argparse
import textwrap
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, zip_longest
from pathlib import Path
from typing import Any

from common import attacks, cli, metrics, plots
from common.cli import PROJECT, Results, UserError
from common.data import CLASS_NAMES, Dataset, describe, open_data, to_float
from common.metrics import SCORE_TITLES
from common.model import (
    Checkpoint,
    Classifier,
    choose_device,
    finite_logits,
    load_checkpoint,
    predict_logits,
    save_checkpoint,
)
from common.recipes import FINAL, ROBUST, with_epochs
from common.train import describe_run, parallel_map, train

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

SHIPPED_ROBUST = PROJECT / "models" / "robust.ckpt"  # trained on photographs
REPORT_EPSILONS = (0.05, 0.1)
EPSILONS = (0.02, 0.0314, *REPORT_EPSILONS)  # 0.0314 is 8/255, the usual value
PGD_STEPS = 20
RUNS = 3  # seeds of noise that is the same for all images
BUDGET = 1e11  # FLOPs of one forward pass of all images; the attacks then take a few minutes
EXAMPLES = 6  # images in a row of a figure
SALIENCY_EXAMPLES = 4
ATTACKS = {
    "random_noise": "random noise",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "universal": "universal",
    "universal_to_next_label": "universal, to label + 1",
}
# The report's scores by attack and epsilon. It does not say to which epsilon those of FGSM belong;
# they leave out images that were misclassified already. Its universal perturbation had no bound.
REPORT_ATTACKS = {
    ("FGSM", "0.05, 0.1"): {"accuracy": "0.105", "balanced_accuracy": "0.128"},
    ("universal, to label + 1", "unbounded"): {"accuracy": "0.638", "balanced_accuracy": "0.475"},
}

Cell = tuple[Tensor, str] | None  # of a figure: an image or a map, and its caption


@dataclass
class Attacked:
    """The dev images under one attack with one epsilon."""

    epsilon: float
    images: Tensor  # of the first run, float [N, 3, 32, 32]
    logits: Tensor  # of all runs, [runs, N, C]
    noise: Tensor | None = None  # the same for all images, [runs, 3, 32, 32]; else None

    @property
    def predicted(self) -> Tensor:
        """The predicted classes, [runs, N]."""
        return self.logits.argmax(dim=2)


@dataclass
class Target:
    """A model, its logits for the clean images, [N, C], and the attacks on it, by epsilon."""

    model: Classifier
    metadata: dict[str, Any]
    logits: Tensor
    attacks: dict[str, dict[str, Attacked]]

    @property
    def predicted(self) -> Tensor:
        """The classes predicted for the clean images, [N]."""
        return self.logits.argmax(dim=1)


# ---- attacks --------------------------------------------------------------------------------


def attack_all(
    model: Classifier,
    training_set: Dataset | None,
    dev: Dataset,
    epsilons: list[float],
    seed: int,
    quick: bool = False,
    to_next_label: bool = True,
) -> dict[str, dict[str, Attacked]]:
    """Run all attacks on the dev images; return their results by attack and epsilon.

    Args:
        training_set: to fit universal perturbations on; None leaves them out.
        epsilons: in ascending order.
        to_next_label: also fit the report's kind of universal perturbation.
    """
    found: dict[str, dict[str, Attacked]] = {name: {} for name in ATTACKS}
    clean = after_pgd = to_float(dev.images)
    steps, fit_steps, runs = (2, 10, 1) if quick else (PGD_STEPS, attacks.UNIVERSAL_STEPS, RUNS)
    seeds = range(seed, seed + runs)
    fit = partial(attacks.universal_perturbation, model, training_set, steps=fit_steps)
    correct = predict_logits(model, clean).argmax(dim=1) == dev.labels
    for epsilon in tqdm(epsilons, desc="epsilons", disable=None):
        key = f"{epsilon:g}"
        torch.manual_seed(seed)
        noise = {"random_noise": [attacks.random_noise(epsilon) for _ in seeds]}
        if training_set:
            noise["universal"] = [fit(epsilon, each) for each in seeds]
            if to_next_label:
                noise["universal_to_next_label"] = [fit(epsilon, each, True) for each in seeds]
        for name, draws in noise.items():
            images = [(clean + each).clamp(0, 1) for each in draws]
            logits = torch.stack([predict_logits(model, each) for each in images])
            found[name][key] = Attacked(epsilon, images[0], logits, torch.stack(draws))

        images = attacks.in_batches(attacks.fgsm, model, clean, dev.labels, epsilon=epsilon)
        found["fgsm"][key] = Attacked(epsilon, images, predict_logits(model, images)[None])
        # Where PGD succeeded with a smaller epsilon, its image is kept; the others are attacked.
        after_pgd = after_pgd.clone()
        after_pgd[correct] = attacks.in_batches(
            attacks.pgd, model, clean[correct], dev.labels[correct], epsilon=epsilon, steps=steps
        )
        logits = predict_logits(model, after_pgd)
        found["pgd"][key] = Attacked(epsilon, after_pgd, logits[None])
        correct = logits.argmax(dim=1) == dev.labels
    return {name: by_epsilon for name, by_epsilon in found.items() if by_epsilon}


def choose_images(dataset: Dataset, count: int, seed: int) -> Dataset:
    """Return about `count` random images: the same fraction of each class, at least one.

    If there are no more than `count`, all are returned.
    """
    if count >= len(dataset):
        return dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    members = [order[dataset.labels[order] == label] for label in range(len(CLASS_NAMES))]
    chosen = [own[: max(1, round(len(own) * count / len(dataset)))] for own in members]
    return dataset.subset(torch.cat(chosen).sort().values)


def count_affordable(models: list[Classifier], dataset: Dataset) -> int:
    """Return how many images can be attacked in a few minutes on two cores."""
    with FlopCounterMode(display=False) as counter:
        for model in models:
            model(torch.zeros(1, *dataset.images.shape[1:]))
    return max(50, int(BUDGET / counter.get_total_flops()) // 50 * 50)


# ---- numbers --------------------------------------------------------------------------------


def summarize(target: Target, labels: Tensor) -> dict[str, Any]:
    """Return a model's entry in the JSON file: its scores, clean and under each attack."""
    by_attack = {
        name: {key: summarize_attack(labels, target.predicted, each) for key, each in found.items()}
        for name, found in target.attacks.items()
    }
    clean = metrics.evaluate(labels, target.predicted)
    return {"checkpoint": target.metadata, "clean": clean, "attacks": by_attack}


def summarize_attack(labels: Tensor, before: Tensor, attacked: Attacked) -> dict[str, Any]:
    """Return the scores under an attack, its success rate, and the most predicted class.

    Over several runs, the scores are means and `spread` is their standard deviation; `interval`
    (the uncertainty from the choice of images) and `confusion` are the first run's.

    Args:
        before: the classes predicted without an attack, [N].
    """
    runs = [summarize_run(labels, before, after) for after in attacked.predicted]
    fraction, label = (attacked.predicted.flatten().bincount() / attacked.predicted.numel()).max(0)
    names = (*SCORE_TITLES, "recall", "precision", "success_rate")
    scores = [{name: run[name] for name in names} for run in runs]
    summary = runs[0] | metrics.mean_over_runs(scores)
    summary["most_predicted"] = {"class": CLASS_NAMES[label], "fraction": fraction.item()}
    if attacked.noise is not None:
        summary |= {"spread": metrics.spread_over_runs(scores), "runs": runs}
    return summary


def summarize_run(labels: Tensor, before: Tensor, after: Tensor) -> dict[str, Any]:
    """Return scores, and the success rate over the images that were classified correctly."""
    correct = before == labels
    succeeded, total = int((after != labels)[correct].sum()), int(correct.sum())
    scores = metrics.evaluate(labels, after)
    scores["success_rate"] = scores["interval"]["success_rate"] = None
    if total:
        scores["success_rate"] = succeeded / total
        scores["interval"]["success_rate"] = list(metrics.wilson_interval(succeeded, total))
    return scores


def compare(robust: Target, plain: Target, labels: Tensor) -> dict[str, Any]:
    """Compare the robust model with the plain one under each attack, on the same images."""
    comparison = {name: {} for name in robust.attacks}
    for name, found in robust.attacks.items():
        for key, ours in found.items():
            pair = ours.predicted, plain.attacks[name][key].predicted
            comparison[name][key] = metrics.compare(labels, *pair, "balanced_accuracy")
    return comparison


def print_summaries(numbers: dict[str, Any]) -> None:
    """Print a row for each model, attack and epsilon, and the report's."""
    rows = []
    for name, summary in numbers["models"].items():
        rows.append([name, "none", "", *_cells(summary["clean"])])
        for attack, by_epsilon in summary["attacks"].items():
            rows += [[name, ATTACKS[attack], key, *_cells(by_epsilon[key])] for key in by_epsilon]
    for attack, scores in REPORT_ATTACKS.items():
        rows.append(["report", *attack, *(scores.get(name, "") for name in SCORE_TITLES), "", ""])
    columns = ["model", "attack", "epsilon", *SCORE_TITLES.values()]
    cli.print_table([*columns, "attack success rate", "most predicted"], rows)
    cli.say(
        "\nAttack success rate: over the images classified correctly without an attack. All else:"
        "\nover all images (the report's FGSM leaves out misclassified ones). Random noise and"
        "\nuniversal perturbations: mean of several seeds ± standard deviation. In brackets: 95%"
        "\nintervals, of the first seed if there are several. A universal perturbation that does"
        "\nnot lower the balanced accuracy on train is set to 0."
    )
    for epsilon, comparison in numbers.get("comparison", {}).get("pgd", {}).items():
        cli.say(f"PGD with epsilon {epsilon}, balanced accuracy of robust: {comparison['text']}")


def _cells(scores: dict[str, Any]) -> list[str]:
    """Return the cells of a row of the table."""
    cells = []
    for name in (*SCORE_TITLES, "success_rate"):
        known = scores.get(name) is not None
        text = metrics.format_mean(scores, name) if known else ""
        if known and name in ("g_mean", "success_rate"):
            text += " [{:.2f}, {:.2f}]".format(*scores["interval"][name])
        cells.append(text)
    most = scores.get("most_predicted")
    return [*cells, f"{most['class']}, {most['fraction']:.0%}" if most else ""]


# ---- figures --------------------------------------------------------------------------------


def draw_fgsm(dataset: Dataset, target: Target) -> Figure:
    """Return figure 4: clean images, their perturbations, attacked images for two epsilons."""
    shown = choose_epsilons(target.attacks["fgsm"])
    first = next(iter(shown.values()))
    examples = choose_examples(dataset.labels, target.predicted, first.predicted[0])
    noise = rescale((first.images - to_float(dataset.images))[examples], first.epsilon)
    rows = {"clean": show_clean(dataset, examples)}
    rows[f"perturbation,\n{describe_scale(first)}"] = [(each, "") for each in noise]
    for epsilon, attacked in shown.items():
        rows[f"epsilon {epsilon}"] = show_attacked(target, attacked, examples)
    title = "FGSM: each image has its own perturbation. Predictions before -> after"
    return draw_rows(title, rows, bool(examples))


def draw_universal(dataset: Dataset, target: Target) -> Figure:
    """Return figure 5: the one perturbation for two epsilons, and images with it added."""
    shown = choose_epsilons(target.attacks["universal"])
    first = next(iter(shown.values()))
    examples = choose_examples(dataset.labels, target.predicted, first.predicted[0])
    rows = {"clean": [None, *show_clean(dataset, examples)]}
    for epsilon, attacked in shown.items():
        noise = rescale(attacked.noise[0], attacked.epsilon)
        cell = (noise, f"perturbation,\n{describe_scale(attacked)}")
        rows[f"epsilon {epsilon}"] = [cell, *show_attacked(target, attacked, examples)]
    title = "One universal perturbation for all images (first seed). Predictions before -> after"
    return draw_rows(title, rows, bool(examples))


def draw_saliency(dataset: Dataset, targets: dict[str, Target]) -> Figure:
    """Return a figure of each model's saliency maps before and after FGSM."""
    plain = targets["plain"]
    epsilon, shown = next(iter(choose_epsilons(plain.attacks["fgsm"]).items()))
    examples = choose_examples(dataset.labels, plain.predicted, shown.predicted[0])
    rows = {}
    for index in examples[:SALIENCY_EXAMPLES]:
        clean, label = to_float(dataset.images[index]), int(dataset.labels[index])
        cells = [(clean, "clean")]
        for name, target in targets.items():
            attacked = target.attacks["fgsm"][epsilon]
            images = torch.stack([clean, attacked.images[index]])
            before, after = attacks.saliency(target.model, images, torch.tensor([label, label]))
            cells.append((before, f"{name}, clean:\nmaximum {before.max():.2g}"))
            cells += show_attacked(target, attacked, [index])
            cells.append((after, f"{name}, attacked:\nmaximum {after.max():.2g}"))
        rows[f"image {index}: {CLASS_NAMES[label]}"] = cells
    title = f"Saliency before and after FGSM of {epsilon}: how much the loss changes with"
    title += " each pixel. Each map is scaled to its own maximum"
    return draw_rows(title, rows, bool(examples))


def choose_epsilons(found: dict[str, Attacked]) -> dict[str, Attacked]:
    """Return the attacks with the report's two epsilons, or else with the largest two."""
    of_report = {key: each for key, each in found.items() if each.epsilon in REPORT_EPSILONS}
    return of_report if len(of_report) == 2 else dict(list(found.items())[-2:])


def choose_examples(labels: Tensor, before: Tensor, after: Tensor) -> list[int]:
    """Return a few images on which the attack succeeded, alternating classes, as in the report."""
    succeeded = torch.nonzero((before == labels) & (after != labels)).flatten()
    members = [succeeded[labels[succeeded] == y].tolist() for y in range(len(CLASS_NAMES))]
    in_turn = chain.from_iterable(zip_longest(*members))
    return [index for index in in_turn if index is not None][:EXAMPLES]


def show_clean(dataset: Dataset, examples: list[int]) -> list[Cell]:
    """Return clean images, each with its class."""
    return [(to_float(dataset.images[i]), CLASS_NAMES[dataset.labels[i]]) for i in examples]


def show_attacked(target: Target, attacked: Attacked, examples: list[int]) -> list[Cell]:
    """Return attacked images, each with prediction and confidence before -> after."""
    cells = []
    for index in examples:
        before = target.logits[index].softmax(dim=0)
        after = attacked.logits[0, index].softmax(dim=0)
        names = f"{CLASS_NAMES[before.argmax()]} -> {CLASS_NAMES[after.argmax()]}"
        cells.append((attacked.images[index], f"{names}\n{before.max():.0%} -> {after.max():.0%}"))
    return cells


def rescale(noise: Tensor, epsilon: float) -> Tensor:
    """Return noise as an image: -epsilon is black, 0 gray, +epsilon full brightness."""
    return (noise / (2 * epsilon) + 0.5).clamp(0, 1)


def describe_scale(attacked: Attacked) -> str:
    """Return the factor by which `rescale` multiplies the noise, as text."""
    none = attacked.noise is not None and not attacked.noise[0].any()
    return "none found" if none else f"times {1 / (2 * attacked.epsilon):.3g}"


def draw_rows(title: str, rows: dict[str, list[Cell]], has_examples: bool) -> Figure:
    """Return a figure of labeled rows of images and maps, each under its caption."""
    title = title if has_examples else f"{title} (the attack succeeded on no image)"
    columns = max([1, *map(len, rows.values())])
    width = max(4, columns)  # a title needs some width too
    figure, axes = plots.new_figure(
        max(1, len(rows)), columns, width=1.35 * width + 0.5, height=1.7 * len(rows) + 1
    )
    figure.suptitle(textwrap.fill(title, plots.CHARACTERS_PER_COLUMN * width), fontsize=11)
    for ax in axes:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for row, (label, cells) in enumerate(rows.items()):
        axes[row * columns].set_ylabel(label, fontsize=8)
        for ax, cell in zip(axes[row * columns :], cells, strict=False):
            if cell and cell[0].ndim == 3:
                plots.show_image(ax, *cell)
            elif cell:
                ax.imshow(cell[0].numpy(), cmap="magma", vmin=0)
                ax.set_title(cell[1], fontsize=8)
    return figure


def draw_epsilons(summaries: dict[str, dict[str, Any]]) -> Figure:
    """Return a figure of all models, a row each, and scores, a column each, by epsilon."""
    rows = len(summaries)
    figure, axes = plots.new_figure(rows, len(SCORE_TITLES), width=12, height=3.4 * rows + 0.8)
    styles = zip(cycle(plots.PALETTE), cycle(plots.MARKERS), cycle(plots.LINE_STYLES), strict=False)
    looks = dict(zip(ATTACKS, styles, strict=False))
    panels = [(name, score) for name in summaries for score in SCORE_TITLES]
    for ax, (name, score) in zip(axes, panels, strict=True):
        for attack, by_epsilon in summaries[name]["attacks"].items():
            points = [summaries[name]["clean"], *by_epsilon.values()]
            epsilons = [0.0, *map(float, by_epsilon)]
            values = [point[score] for point in points]
            low, high = zip(*(point["interval"][score] for point in points), strict=True)
            color, marker, style = looks[attack]
            settings = {"color": color, "marker": marker, "ls": style, "ms": 4}
            ax.plot(epsilons, values, label=ATTACKS[attack], **settings)
            ax.fill_between(epsilons, low, high, color=color, alpha=0.12, lw=0)
            for epsilon, point in zip(epsilons, points, strict=True):
                for run in point.get("runs", []):
                    ax.plot(epsilon, run[score], ".", color=color, ms=3)
        ax.set(title=f"{name} model: {SCORE_TITLES[score]}", ylim=(-0.02, 1.02))
        ax.set_xlabel("epsilon (dots: each seed; bands: 95%, first seed)")
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


# ---- models and files -----------------------------------------------------------------------


def find_plain(
    arguments: argparse.Namespace, results: Results, training_set: Dataset | None
) -> Path:
    """Return the checkpoint to attack: the one named, or the report's final model, trained here."""
    if arguments.checkpoint:
        return arguments.checkpoint
    if training_set is None:
        raise UserError("no training set to train a model on; name a model by --checkpoint")
    own = results.folder / f"{FINAL.name}.ckpt"
    if not own.exists():
        recipe, device = with_epochs(FINAL, None, arguments.quick), choose_device(arguments.device)
        cli.say(f"training a model first: recipe {recipe.name}, {recipe.epochs} epochs")
        job = (recipe, training_set, arguments.seed, device)
        # With parallel_map, which restores the number of threads that `train` sets.
        [model] = parallel_map(train, [job], device, recipe.name)
        results.save(own.name, partial(save_checkpoint, model=model, metadata=describe_run(*job)))
    elif not is_trained_on(own, training_set):
        raise UserError(f"{own}: was trained on other images; name a model by --checkpoint")
    return own


def find_robust(
    arguments: argparse.Namespace, results: Results, training_set: Dataset | None, dev: Dataset
) -> Path | None:
    """Return the checkpoint to compare with: the one named, or else one that fits the data."""
    if arguments.robust:
        return arguments.robust
    own = results.folder / f"{ROBUST.name}.ckpt"
    if training_set and own.exists() and is_trained_on(own, training_set):
        return own
    return None if dev.name == "synthetic" else SHIPPED_ROBUST


def is_trained_on(path: Path, dataset: Dataset) -> bool:
    """Return whether a checkpoint was trained on these images, whatever their labels."""
    trained_on = load_checkpoint(path).metadata.get("trained_on")
    images = dataset.image_fingerprint
    return isinstance(trained_on, dict) and trained_on.get("image_fingerprint") == images


def load_all(
    paths: dict[str, Path], pixel_range: tuple[float, float] | None
) -> dict[str, Checkpoint]:
    """Read checkpoints, and say what they are; the pixel range applies to bare ones only.

    Raises:
        UserError: a pixel range is given, but each of them has its own.
    """
    loaded = {}
    for name, path in paths.items():
        loaded[name] = found = load_checkpoint(path, pixel_range, strict_range=False)
        cli.say(f"{path}: {found.describe()}")
    if pixel_range and not any(each.bare for each in loaded.values()):
        raise UserError("--pixel-range: each of these checkpoints has its own; omit the option")
    return loaded


def save_figures(
    results: Results, dev: Dataset, targets: dict[str, Target], summaries: dict[str, Any]
) -> None:
    """Write the report's figures 4 and 5, of the plain model, and others."""
    plain = targets["plain"]
    results.save_figure("4-fgsm", draw_fgsm(dev, plain))
    if "universal" in plain.attacks:
        results.save_figure("5-universal", draw_universal(dev, plain))
    results.save_figure("5-epsilons", draw_epsilons(summaries))
    results.save_figure("5-saliency", draw_saliency(dev, targets))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = cli.make_parser(__doc__)
    cli.add_checkpoint_option(parser, "results/<data>/final.ckpt, trained first if need be")
    parser.add_argument(
        "--robust",
        type=Path,
        metavar="FILE",
        help="the robust model to compare with (default: results/<data>/robust.ckpt if it was "
        "trained on this data, else models/robust.ckpt, but none for synthetic images)",
    )
    parser.add_argument(
        "--epsilons",
        type=cli.epsilon,
        nargs="+",
        default=EPSILONS,
        metavar="E",
        help=cli.EPSILON_HELP,
    )
    parser.add_argument(
        "--images",
        type=cli.positive_int,
        metavar="N",
        help="number of random dev images to attack (default: as many as a few minutes allow)",
    )
    return parser


def main() -> None:
    """Attack a model on the dev set, and a robust one for comparison."""
    arguments = make_parser().parse_args()
    device = choose_device(arguments.device)
    data = open_data(arguments.data)
    dev = data.load("dev", arguments.quick)
    training_set = data.load("train", arguments.quick) if data.has("train") else None
    results = Results(arguments, describe(training_set, dev))
    paths = {"plain": find_plain(arguments, results, training_set)}
    if robust := find_robust(arguments, results, training_set, dev):
        paths["robust"] = robust
    loaded = load_all(paths, arguments.pixel_range)
    if training_set is None:
        cli.say("no training set to fit universal perturbations on: they are left out")

    count = arguments.images or count_affordable([each.model for each in loaded.values()], dev)
    dev = choose_images(dev, count, arguments.seed)
    epsilons = sorted({f"{epsilon:g}": epsilon for epsilon in arguments.epsilons}.values())
    cli.say(f"attacking {len(dev)} dev images\n")
    targets = {}
    for name, checkpoint in loaded.items():
        model = checkpoint.model.to(device)
        metadata = {"file": paths[name].name, **checkpoint.metadata}
        logits = finite_logits(model, dev.images, str(paths[name]))
        found = attack_all(
            model, training_set, dev, epsilons, arguments.seed, arguments.quick, name == "plain"
        )
        targets[name] = Target(model, metadata, logits, found)

    summaries = {name: summarize(each, dev.labels) for name, each in targets.items()}
    numbers = {"images": len(dev), "models": summaries}
    if "robust" in targets:
        numbers["comparison"] = compare(targets["robust"], targets["plain"], dev.labels)
    results.save_json("adversarial", numbers)
    save_figures(results, dev, targets, summaries)
    print_summaries(numbers)
    results.print_written()


if __name__ == "__main__":
    cli.run(main)
