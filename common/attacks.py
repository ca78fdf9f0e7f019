"""Attacks: how to change pictures a little so that a net gets them wrong.

All take pictures in [0, 1] and give back pictures in [0, 1]. Epsilon is in pixel units: 0.05 lets
each pixel change by 5% of full brightness, whatever the net does to pixels inside. The norm is
L-infinity everywhere: no pixel of no channel moves by more than epsilon. The net has to be in
evaluation mode, and is left as it was; `change_answers` alone, of training, takes it as it is.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.batches import least_sampled
from common.dataset import CLASS_NAMES, Dataset, as_input
from common.network import fast_precision

ATTACK_BATCH = 250
NOISE_STEPS = 100  # of the one noise for all; twice as many, or larger batches, change little
NOISE_BATCH = 64
FIRST_NOISE_STEP = 0.2  # of epsilon; later steps shrink to 0

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each picture's cross-entropy, [B]: what training makes small."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the best wrong logit beats the right one, [B] (Carlini and Wagner, 2017).

    Above 0 the net is wrong. Unlike cross-entropy it has a gradient even where the net is so sure
    that the softmax is 1 to the last digit.
    """
    right = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(dim=1) - logits[right]


def loss_gradient(
    net: nn.Module, pictures: Tensor, labels: Tensor, loss: Loss = cross_entropy
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the loss by the pixels, [B, 3, 32, 32], and the logits, [B, C].

    The loss is the batch's mean: of a picture's gradient, only the scale depends on others.
    """
    pictures = pictures.detach().requires_grad_()
    logits = net(pictures).float()
    return torch.autograd.grad(loss(logits, labels).mean(), pictures)[0], logits.detach()


def add_noise(pictures: Tensor, noise: Tensor) -> Tensor:
    """Add noise, [3, 32, 32] or [B, 3, 32, 32], to pictures in [0, 1] and keep them there."""
    return (pictures + noise).clamp(0, 1)


def random_noise(epsilon: float) -> Tensor:
    """Return noise that knows nothing of the net, [3, 32, 32]: plus or minus epsilon by chance.

    It is as strong as an attack of this epsilon may be, so it shows what strength alone does.
    """
    return epsilon * (2.0 * torch.randint(0, 2, (3, 32, 32)) - 1)


def fgsm(net: nn.Module, pictures: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., 2015): one step of full size, up the loss.

    Args:
        pictures: float32 [B, 3, 32, 32] in [0, 1].
        labels: int64 [B].
        epsilon: in pixel units, 0 to 1.

    Returns:
        the attacked pictures, float32 [B, 3, 32, 32] in [0, 1].
    """
    gradient, _ = loss_gradient(net, pictures, labels)
    return add_noise(pictures, epsilon * gradient.sign())


def change_answers(net: nn.Module, pictures: Tensor, epsilon: float) -> Tensor:
    """Return pictures, [B, 3, 32, 32], that change what the net says: the attack of TRADES.

    One step of size epsilon up the divergence between the answers, from close to the pictures:
    at the pictures themselves there is no divergence yet, and no gradient. (Zhang et al., 2019,
    take ten small steps, which costs four times as much.)
    """
    with torch.no_grad():
        answers = net(pictures).float().softmax(dim=1)
    nearby = _start(pictures, 0.1 * epsilon)
    gradient, _ = loss_gradient(net, nearby, answers)  # the divergence's is the same
    return into_ball(nearby + epsilon * gradient.sign(), pictures, epsilon)


def pgd(
    net: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int = 40,
    step_size: float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    targeted: bool = False,
    loss: Loss = cross_entropy,
    stop_early: bool = True,
) -> Tensor:
    """Projected gradient descent (Madry et al., 2018): FGSM in small steps, kept in the ball.

    Without a random start it is the iterated FGSM (Kurakin et al., 2017). A picture is left alone
    as soon as the net has it wrong, which is all that an attack wants and saves most of the work;
    so more steps or restarts never make the attack weaker.

    Args:
        pictures: float32 [B, 3, 32, 32] in [0, 1].
        labels: int64 [B]: the right classes; with `targeted`, those that the net shall say.
        epsilon: in pixel units, 0 to 1.
        steps: at most so many for a picture, in each restart.
        step_size: in pixel units; None for 2.5 epsilon / steps, with which a picture can cross
            the ball and come back a little.
        random_start: start anywhere in the ball, governed by torch's seed, not at the picture.
        restarts: how often to try pictures that the net still has right, each from another
            random start.
        targeted: go down the loss of `labels` instead of up.
        loss: of logits and labels, [B]: cross_entropy or margin.
        stop_early: False attacks every picture to the last step, as the paper does.

    Returns:
        the attacked pictures, float32 [B, 3, 32, 32] in [0, 1].

    Raises:
        ValueError: several restarts without a random start would all be the same.
    """
    if restarts > 1 and not random_start:
        raise ValueError("restarts need a random start: without it each is the same")
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    step_size = -step_size if targeted else step_size
    attacked, active = pictures.clone(), torch.arange(len(pictures), device=pictures.device)
    for _ in range(restarts):
        if stop_early:
            with torch.no_grad():
                active = active[~_has_worked(net(attacked[active]), labels[active], targeted)]
        attacked[active] = _start(pictures[active], epsilon if random_start else 0.0)
        climbing = active
        for _ in range(steps):
            gradient, logits = loss_gradient(net, attacked[climbing], labels[climbing], loss)
            if stop_early:
                left = ~_has_worked(logits, labels[climbing], targeted)
                climbing, gradient = climbing[left], gradient[left]
            moved = attacked[climbing] + step_size * gradient.sign()
            attacked[climbing] = into_ball(moved, pictures[climbing], epsilon)
    return attacked


def into_ball(moved: Tensor, pictures: Tensor, epsilon: float) -> Tensor:
    """Return the nearest to `moved` that lies within epsilon of the pictures and in [0, 1]."""
    return add_noise(pictures, (moved - pictures).clamp(-epsilon, epsilon))


def _start(pictures: Tensor, radius: float) -> Tensor:
    return add_noise(pictures, torch.empty_like(pictures).uniform_(-radius, radius))


def _has_worked(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    return (logits.argmax(dim=1) == labels) == targeted


def fit_one_noise(
    net: nn.Module,
    train: Dataset,
    epsilon: float,
    seed: int,
    to_next_label: bool = False,
    steps: int = NOISE_STEPS,
) -> Tensor:
    """Fit one noise for all pictures: a universal perturbation (Moosavi-Dezfooli et al., 2017).

    It starts at random within the epsilon ball; each step goes up the loss of the right labels,
    then back into the ball. Classes are drawn in equal parts, so that it can't win by fooling
    cars alone.

    Args:
        train: fitted on these; an attack that is tested on the pictures it was fitted on
            looks stronger than it is.
        epsilon: in pixel units; no pixel of the noise is larger.
        seed: of the start and of the order of the pictures.
        to_next_label: go down the loss of the wrong label (label + 1) instead, as the report
            did. That asks one noise to push cars to trucks, trucks to cats and cats to cars.
        steps: how many; their size shrinks to 0.

    Returns:
        noise, float32 [3, 32, 32].
    """
    torch.manual_seed(seed)
    device = next(net.parameters()).device
    noise = torch.empty(3, 32, 32).uniform_(-epsilon, epsilon).to(device)
    direction, shift = (-1, 1) if to_next_label else (1, 0)
    epochs = least_sampled(train.labels)
    batches = chain.from_iterable(epoch.split(NOISE_BATCH) for epoch in epochs)
    bar = tqdm(range(steps), desc=f"one noise, epsilon {epsilon:.3g}", leave=False, disable=None)
    for step, index in zip(bar, batches, strict=False):
        pictures = as_input(train.pictures[index]).to(device)
        labels = ((train.labels[index] + shift) % len(CLASS_NAMES)).to(device)
        with fast_precision(device):  # the sum over a batch needs no more
            gradient, _ = loss_gradient(net, add_noise(pictures, noise), labels)
        step_size = direction * FIRST_NOISE_STEP * epsilon * (1 - step / steps)
        noise = (noise + step_size * gradient.sum(dim=0).sign()).clamp(-epsilon, epsilon)
    return noise.cpu()


def in_batches(
    attack: Callable[..., Tensor], net: nn.Module, pictures: Tensor, labels: Tensor, **settings: Any
) -> Tensor:
    """Attack many pictures, [N, 3, 32, 32], a batch at a time, on the device of the net."""
    device = next(net.parameters()).device
    batches = zip(pictures.split(ATTACK_BATCH), labels.split(ATTACK_BATCH), strict=True)
    attacked = [attack(net, *(half.to(device) for half in batch), **settings) for batch in batches]
    return torch.cat([batch.cpu() for batch in attacked])
