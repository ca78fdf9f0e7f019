"""Adversarial attacks: small perturbations of images that make a model misclassify them.

Images are float32 [B, 3, 32, 32] in [0, 1], before and after; labels are the true classes, int64
[B]. The norm is L-infinity: no pixel of any channel moves by more than epsilon, so 0.05 is 5% of
full brightness, whatever range the model was trained on, since normalization is its first layer.
Models are in eval mode.

The gradients of FGSM and PGD include test-time augmentation, if the model has it: with the gradient
of a single view, they would be much weaker.
"""

from collections.abc import Callable
from typing import Any

from common.data import CLASS_NAMES, IMAGE_SIZE, Dataset, to_float
from common.model import Classifier, predict_logits

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
BATCH_SIZE = 250
# Settings of the universal perturbation; twice as many steps or images change little.
UNIVERSAL_STEPS = 50
FIRST_STEP_SIZE = 0.4  # of epsilon; it decays linearly to 0
IMAGES_PER_CLASS = 20  # in a batch
LOSS_CAP = 1.5  # an image with a higher loss is clearly misclassified
CHECKED_PER_CLASS = 50  # images of the final check

Model = Callable[[Tensor], Tensor]  # from images to logits
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image, [B]; labels are classes or probabilities."""
    return F.cross_entropy(logits, labels, reduction="none")


def clamped_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image, [B], at most LOSS_CAP (Shafahi et al., 2020).

    Images that are clearly misclassified have no gradient, so they can't outweigh the others.
    """
    return cross_entropy(logits, labels).clamp(max=LOSS_CAP)


def next_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return minus the cross-entropy of the next label, [B]: cars should become trucks, etc."""
    return -cross_entropy(logits, (labels + 1) % len(CLASS_NAMES))


def input_gradient(
    model: Model, images: Tensor, labels: Tensor, loss: Loss = cross_entropy
) -> tuple[Tensor, Tensor]:
    """Return the gradient of each image's loss, [B, 3, 32, 32], and the logits, [B, C].

    The gradients of the parameters are not changed.
    """
    images = images.detach().requires_grad_()
    logits = model(images).float()
    (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), images)
    return gradient, logits.detach()


def saliency(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return saliency maps, [B, 32, 32]: how much the loss changes with each pixel.

    That is the input gradient's absolute value, the largest of the three colors (Simonyan et al.,
    "Deep inside convolutional networks", 2014).
    """
    device = next(model.parameters()).device
    gradient, _ = input_gradient(model, images.to(device), labels.to(device))
    return gradient.abs().amax(dim=1).cpu()


def project(images: Tensor, originals: Tensor, epsilon: float) -> Tensor:
    """Project images onto the L-infinity ball around the originals, and onto [0, 1]."""
    return (originals + (images - originals).clamp(-epsilon, epsilon)).clamp(0, 1)


def random_noise(epsilon: float) -> Tensor:
    """Return random noise, [3, 32, 32]: each pixel +epsilon or -epsilon.

    It is as large as an attack may be, so it is the baseline for attacks.
    """
    return epsilon * (2.0 * torch.randint(0, 2, IMAGE_SHAPE) - 1)


def fgsm(model: Model, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., 2015): one step of size epsilon up the loss."""
    gradient, _ = input_gradient(model, images, labels)
    return (images + epsilon * gradient.sign()).clamp(0, 1)


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    alpha: float | None = None,
    steps: int = 40,
    random_start: bool = True,
    stop_early: bool = True,
) -> Tensor:
    """Projected gradient descent (Madry et al., 2018): FGSM steps, projected onto the epsilon ball.

    Without a random start it is the iterative FGSM of Kurakin et al. (2017).

    Args:
        alpha: step size in pixel units; None means 2.5 epsilon / steps, as in the paper.
        random_start: start at a random point of the ball, not at the image.
        stop_early: stop changing an image once it is misclassified. This saves most of the work,
            and further steps can't undo a success.
    """
    alpha = 2.5 * epsilon / steps if alpha is None else alpha
    adversarial = images.clone()
    active = torch.arange(len(images), device=images.device)
    if stop_early:
        with torch.no_grad():
            active = active[model(images).argmax(dim=1) == labels]
    if random_start:
        adversarial[active] = _random_start(images[active], epsilon)
    for _ in range(steps):
        if len(active) == 0:
            break
        gradient, logits = input_gradient(model, adversarial[active], labels[active])
        if stop_early:
            correct = logits.argmax(dim=1) == labels[active]
            active, gradient = active[correct], gradient[correct]
        moved = adversarial[active] + alpha * gradient.sign()
        adversarial[active] = project(moved, images[active], epsilon)
    return adversarial


def _random_start(images: Tensor, radius: float) -> Tensor:
    return (images + torch.empty_like(images).uniform_(-radius, radius)).clamp(0, 1)


def trades_perturbation(model: Classifier, images: Tensor, epsilon: float) -> Tensor:
    """Return images that change the model's output: the inner maximization of TRADES, in one step.

    One step of size epsilon up the KL divergence between the outputs for the images and for
    others close by (at the images themselves its gradient is 0). Zhang et al. (2019) take ten
    small steps. As in their code, the model is in eval mode during this step: batch norm's
    statistics do not change, and dropout does not weaken the attack.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        probabilities = model.single_view(images).float().softmax(dim=1)
    nearby = _random_start(images, 0.1 * epsilon)
    # The KL divergence is this cross-entropy less a constant, so the gradient is the same.
    gradient, _ = input_gradient(model.single_view, nearby, probabilities)
    model.train(was_training)
    return project(nearby + epsilon * gradient.sign(), images, epsilon)


def universal_perturbation(
    model: Classifier,
    dataset: Dataset,
    epsilon: float,
    seed: int,
    to_next_label: bool = False,
    steps: int = UNIVERSAL_STEPS,
) -> Tensor:
    """Fit one perturbation for all images (Moosavi-Dezfooli et al., 2017; Shafahi et al., 2020).

    It starts at random in the epsilon ball. Each step increases the clamped loss of a batch, then
    projects onto the ball. Batches are class-balanced: otherwise, success on cars alone would
    be enough.

    Args:
        dataset: training images; on images that it was fitted to, it looks stronger than it is.
        seed: for the start and the batches.
        to_next_label: decrease the loss of the next label (label + 1) instead, as the report did:
            cars should become trucks, trucks cats, and cats cars.

    Returns:
        [3, 32, 32]; zeros if it does not lower the balanced accuracy on training images.
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    noise = torch.empty(IMAGE_SHAPE, device=device).uniform_(-epsilon, epsilon)
    loss = next_label_loss if to_next_label else clamped_cross_entropy
    for step in range(steps):
        index = _draw_per_class(dataset.labels, IMAGES_PER_CLASS)
        images = to_float(dataset.images[index]).to(device)
        labels = dataset.labels[index].to(device)
        attacked = (images + noise).clamp(0, 1)
        gradient, _ = input_gradient(lambda x: _random_view(model, x), attacked, labels, loss)
        step_size = FIRST_STEP_SIZE * epsilon * (1 - step / steps)
        noise = (noise + step_size * gradient.sum(dim=0).sign()).clamp(-epsilon, epsilon)

    noise = noise.cpu()
    index = _draw_per_class(dataset.labels, CHECKED_PER_CLASS)
    clean, labels = to_float(dataset.images[index]), dataset.labels[index]
    correct, still_correct = (
        (predict_logits(model, images).argmax(dim=1) == labels).sum()
        for images in (clean, (clean + noise).clamp(0, 1))
    )
    return noise if still_correct < correct else torch.zeros_like(noise)


def _draw_per_class(labels: Tensor, count: int) -> Tensor:
    """Return the indices of `count` images of each class, drawn with replacement."""
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    return torch.cat([own[torch.randint(len(own), (count,))] for own in members])


def _random_view(model: Classifier, images: Tensor) -> Tensor:
    """Return the logits of one random view instead of test-time augmentation.

    Their gradient is the same in expectation (Athalye et al., 2018), in a fraction of the time.
    """
    views = model.views(images)
    return model.single_view(views[torch.randint(len(views), ())])


def in_batches(
    attack: Callable[..., Tensor], model: nn.Module, images: Tensor, labels: Tensor, **settings: Any
) -> Tensor:
    """Attack many images, [N, 3, 32, 32], a batch at a time, on the model's device."""
    device = next(model.parameters()).device
    attacked = [
        attack(model, x.to(device), y.to(device), **settings).cpu()
        for x, y in zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    ]
    return torch.cat(attacked)
