"""How a net is trained: all settings of a run as a `Recipe`, and the loop that follows it."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from common import machine
from common.attacks import change_answers
from common.batches import (
    all_shifts,
    change_colours,
    cut_out,
    flip_and_shift,
    least_sampled,
    mix_up,
    shuffled,
    weighted,
)
from common.dataset import CLASS_NAMES, Dataset, as_input, draw_practice
from common.label_noise import LEFT_OUT, leave_out_doubted
from common.muon import Muon
from common.network import build_network, fast_precision, predict_logits


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run. They go into its checkpoint.

    Attributes:
        name: what `--recipe` calls it.
        network: the kind of net, a name in NETWORKS.
        epochs: an epoch draws as many pictures as the set has.
        batch_size: pictures a step. The report's 4 makes an epoch 32 times as many steps.
        optimizer: `adam` (Kingma and Ba, 2015) or `muon` (common/muon.py).
        learning_rate: of the optimizer.
        schedule: how the rate changes: in `steps`, or in `one-cycle`: up for the first tenth of
            the run, then down to 0 along half a cosine (Smith and Topin, 2018).
        decay_share: with `steps`, the rate falls each time this share of the epochs is over; 1
            for never.
        decay_factor: what it is multiplied with then.
        weight_decay: Adam adds this times the weights to the gradient (L2 penalty); Muon shrinks
            the weights themselves, by this times the learning rate each step.
        sampler: how pictures are drawn: `shuffled`, `strict` or `weighted`.
        class_weights: how often each class is drawn, relative to others; of `weighted` only.
        balance: of `weighted` only. 1 draws the classes as class_weights say, 0 in the set's own
            shares, 0.5 in the ratio of the square roots of their sizes.
        adjust_logits: adds so many times the log of each class's share in the draws to its logit
            in training, so that without it the net is fair to classes that are drawn less (Menon
            et al., 2021). 0 for nothing; more than 1 favours them, as they are learnt less well.
        plain_share: share of the epochs before flips and shifts start; 1 for never.
        colour_change: how much brightness, contrast and colours are altered, 0 to 1.
        cutout: sides, in pixels, of the square of each picture that is painted grey; 0 for none.
        mixup: alpha of mixup; 0 for none.
        attack_epsilon: adversarial training: each picture is learnt from with and without noise
            of this size against it, in pixel units; 0 for never.
        trades_beta: how much it counts that the net's answer stays the same under such noise,
            beside that it is right (beta of Zhang et al., 2019).
        sketch_epochs: before the training, the net learns from pictures that the project draws
            itself (common/sketches.py), as many as the set has and equally many of each class,
            for so many epochs; 0 for none.
        judge: before the training, nets are trained by this recipe on parts of the set, and each
            judges the labels of the part left out; where another is more likely than the one
            given, the picture is not learnt from. None for no judges.
        average_weights: the net that counts is a moving average of the weights; each step keeps
            this share of it (Polyak and Juditsky, 1992). 0 for the last weights.
        average_flips: the net, once trained, gives the mean of a picture's logits and its mirror
            image's.
        average_shifts: and of the picture moved by so many pixels to each side; 0 for none.
    """

    name: str
    network: str = "CourseNet"
    epochs: int = 30
    batch_size: int = 128
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    schedule: str = "steps"
    decay_share: float = 1.0
    decay_factor: float = 0.3
    weight_decay: float = 0.0
    sampler: str = "shuffled"
    class_weights: tuple[float, ...] = (1.0,) * len(CLASS_NAMES)
    balance: float = 1.0
    adjust_logits: float = 0.0
    plain_share: float = 1.0
    colour_change: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    attack_epsilon: float = 0.0
    trades_beta: float = 0.0
    sketch_epochs: int = 0
    judge: "Recipe | None" = None
    average_weights: float = 0.0
    average_flips: bool = False
    average_shifts: int = 0


WARM_UP = 0.1  # share of a one-cycle run in which the rate rises


def learning_rate_at(recipe: Recipe, progress: float) -> float:
    """Return the learning rate when this share of the run is over, 0 to 1."""
    if recipe.schedule == "steps":
        falls = int(progress / recipe.decay_share + 1e-9)  # 0.6 / 0.2 is a little less than 3
        return recipe.learning_rate * recipe.decay_factor**falls
    if progress < WARM_UP:
        return recipe.learning_rate * progress / WARM_UP
    angle = math.pi * (progress - WARM_UP) / (1 - WARM_UP)
    return recipe.learning_rate * (1 + math.cos(angle)) / 2


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer; Adam fused, as one step for all weights is the fastest."""
    if recipe.optimizer == "muon":
        return Muon(net.parameters(), recipe.learning_rate, recipe.weight_decay)
    return torch.optim.Adam(
        net.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )


def drawn_shares(recipe: Recipe, labels: Tensor) -> Tensor:
    """Return the share of each class among the pictures that the recipe's sampler draws, [C]."""
    counts = torch.bincount(labels, minlength=len(CLASS_NAMES)).double()
    if recipe.sampler == "strict":
        counts = torch.ones_like(counts)
    if recipe.sampler == "weighted":
        counts = torch.tensor(recipe.class_weights) * counts ** (1 - recipe.balance)
    return counts / counts.sum()


def make_sampler(recipe: Recipe, labels: Tensor) -> Iterator[Tensor]:
    """Return the recipe's sampler for pictures with these labels."""
    if recipe.sampler == "strict":
        return least_sampled(labels)
    if recipe.sampler == "weighted":
        return weighted(labels, drawn_shares(recipe, labels))
    return shuffled(labels)


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence of these answers from others, both [B, C]."""
    return F.kl_div(others.log_softmax(dim=1), logits.softmax(dim=1), reduction="batchmean")


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    pictures: Tensor,
    targets: Tensor,
    log_prior: Tensor | float = 0.0,
    attack_epsilon: float = 0.0,
    trades_beta: float = 0.0,
) -> float:
    """Take one step on a batch; return the loss before it.

    Args:
        pictures: float in [0, 1], [B, 3, 32, 32].
        targets: labels, int64 [B], or the chance of each class, float [B, C].
        log_prior: added to the logits for the loss, [C].
        attack_epsilon: of adversarial training, in pixel units; 0 for none.
        trades_beta: weight of the change that an attack makes to the net's answers.
    """
    with fast_precision(pictures.device):
        if attack_epsilon:  # in one batch, so that batch normalisation sees both at once
            attacked = change_answers(net, pictures, attack_epsilon)
            logits, moved = net(torch.cat([pictures, attacked])).float().chunk(2)
        else:
            logits = net(pictures).float()
    loss = F.cross_entropy(logits + log_prior, targets)
    if attack_epsilon:
        loss = loss + trades_beta * divergence(logits, moved)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class Trainer:
    """A training run that can be stopped after any epoch, saved, and gone on with.

    The whole set lies in the device's memory and a batch is an index into it: no Python runs for
    single pictures. What is random in an epoch follows from the run's seed and the epoch's
    number, so that a run that goes on from a saved state ends like one that never stopped.

    Attributes:
        net: the net as it stands, in evaluation mode: the average, if the recipe has one. No
            epoch is chosen by its dev score: that would make the score too good to be true.
        epoch: number of epochs done.
    """

    def __init__(self, recipe: Recipe, train: Dataset, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.recipe, self.seed, self.epoch, self.steps = recipe, seed, 0, 0
        views = {"average_flips": recipe.average_flips, "average_shifts": recipe.average_shifts}
        self.training_net = build_network(recipe.network, **views).to(device).train()
        self.net = copy.deepcopy(self.training_net).eval()
        self.values = list(zip(_values(self.net), _values(self.training_net), strict=True))
        self.optimizer = make_optimizer(self.training_net, recipe)
        self.train, self.device, self.pictures = train, device, train.pictures.to(device)
        self.shifts = all_shifts(self.pictures) if recipe.plain_share < 1 else None
        self._learn_from(train.labels)

    def _learn_from(self, labels: Tensor) -> None:
        """Learn these labels from now on, none of those that are LEFT_OUT."""
        self.labels = labels.to(self.device)
        self.trusted = torch.nonzero(self.labels != LEFT_OUT).flatten()
        kept = labels[labels != LEFT_OUT]
        self.sampler = make_sampler(self.recipe, kept)
        prior = drawn_shares(self.recipe, kept).float().to(self.device)
        self.log_prior = self.recipe.adjust_logits * prior.log()

    def _judge_labels(self) -> None:
        logits = judge_by_folds(self.recipe.judge, self.train, self.seed, self.device)
        self._learn_from(leave_out_doubted(logits, self.train.labels))

    def _learn_from_sketches(self) -> None:
        recipe = replace(self.recipe, epochs=self.recipe.sketch_epochs, sketch_epochs=0, judge=None)
        sketches = draw_practice(len(self.train), self.seed)
        with machine.progress_bar(recipe.epochs, "sketches") as bar:
            net = fit(recipe, sketches, self.seed, self.device, lambda *_: bar.update())
        self.training_net.load_state_dict(net.state_dict())

    def _draw_epoch(self) -> Tensor:
        torch.manual_seed(self.seed * 1_000_003 + self.epoch)  # far apart for any two seeds
        return self.trusted[next(self.sampler).to(self.trusted.device)]

    def run_epoch(self) -> list[float]:
        """Train for one epoch; return the losses of its steps."""
        if self.epoch == 0 and self.recipe.sketch_epochs:
            self._learn_from_sketches()
        if self.epoch == 0 and self.recipe.judge:
            self._judge_labels()
        losses = []
        batches = self._draw_epoch().split(self.recipe.batch_size)
        for number, index in enumerate(batches):
            progress = (self.epoch + number / len(batches)) / self.recipe.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate_at(self.recipe, progress)
            pictures, targets = self._prepare(index)
            losses.append(
                train_step(
                    self.training_net,
                    self.optimizer,
                    pictures,
                    targets,
                    self.log_prior,
                    self.recipe.attack_epsilon,
                    self.recipe.trades_beta,
                )
            )
            self.steps += 1
            if self.recipe.average_weights:  # starts with what little past there is
                self._keep(min(self.recipe.average_weights, self.steps / (self.steps + 10)))
        if not self.recipe.average_weights:
            self._keep(0.0)
        self.epoch += 1
        return losses

    def _keep(self, share: float) -> None:
        """Move the net to the one in training, but for this share of what it is."""
        for mine, theirs in self.values:
            mine.lerp_(theirs, 1 - share)

    def _prepare(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return pictures and targets of a batch, altered as the recipe says."""
        recipe = self.recipe
        if self.epoch < recipe.plain_share * recipe.epochs:
            pictures = as_input(self.pictures[index])
        else:
            pictures = as_input(flip_and_shift(self.shifts, index))
        targets = self.labels[index]
        if recipe.colour_change:
            pictures = change_colours(pictures, recipe.colour_change)
        if recipe.cutout:
            pictures = cut_out(pictures, recipe.cutout)
        if recipe.mixup:
            targets = F.one_hot(targets, len(CLASS_NAMES)).float()
            pictures, targets = mix_up(pictures, targets, recipe.mixup)
        return pictures, targets

    def state(self) -> dict[str, Any]:
        """Return what is needed to go on from here, beside the net's weights."""
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "labels": self.labels,
            "training_net": self.training_net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def go_on_from(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on where a run with the same recipe, data, seed and number of threads got to."""
        self.net.load_state_dict(weights)
        if "optimizer" in state:  # a run that is over needs none
            self.optimizer.load_state_dict(state["optimizer"])
            self.training_net.load_state_dict(state["training_net"])
            self.steps = state["steps"]
            self._learn_from(state["labels"].cpu())
        while self.epoch < state["epoch"]:
            self._draw_epoch()  # a sampler may remember what it has drawn
            self.epoch += 1


def _values(net: nn.Module) -> list[Tensor]:
    """Return all that a net has learnt: weights, and what batch normalisation has measured."""
    return [value for value in net.state_dict().values() if value.is_floating_point()]


def fit(
    recipe: Recipe,
    train: Dataset,
    seed: int,
    device: torch.device,
    after_epoch: Callable[[nn.Module, list[float]], None] = lambda net, losses: None,
) -> nn.Module:
    """Train a new net to the recipe's last epoch.

    Args:
        after_epoch: called with the net and the losses of the epoch's steps.

    Returns:
        the net, in evaluation mode.
    """
    trainer = Trainer(recipe, train, seed, device)
    while trainer.epoch < recipe.epochs:
        losses = trainer.run_epoch()
        after_epoch(trainer.net, losses)
    return trainer.net


# An even number of folds keeps two cores busy to the end; more of them leave each net more to
# learn from, but take longer.
FOLDS = 4


def judge(
    recipe: Recipe, learnt: Dataset, judged: Tensor, seed: int, device: torch.device
) -> Tensor:
    """Train a net on one set; return the logits, [N, C], that it gives other pictures."""
    return predict_logits(fit(recipe, learnt, seed, device), judged)


def judge_by_folds(
    recipe: Recipe,
    train: Dataset,
    seed: int,
    device: torch.device,
    trusted: Tensor | None = None,
) -> Tensor:
    """Return logits for each picture of the set, [N, C], by a net that has not learnt from it.

    Args:
        trusted: which pictures may be learnt from, bool [N]; None for all.
    """
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    folds = [
        (torch.from_numpy(learnt), torch.from_numpy(left_out))
        for learnt, left_out in splitter.split(train.pictures, train.labels)
    ]
    if trusted is not None:
        folds = [(learnt[trusted[learnt]], left_out) for learnt, left_out in folds]
    jobs = [
        (recipe, train.take(learnt), train.pictures[left_out], seed, device)
        for learnt, left_out in folds
    ]
    logits = torch.empty(len(train), len(CLASS_NAMES))
    judged = machine.side_by_side(judge, jobs, device, "folds")
    for (_, left_out), logits_of_fold in zip(folds, judged, strict=True):
        logits[left_out] = logits_of_fold
    return logits
