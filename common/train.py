"""The training loop, and what it uses: samplers, augmentation, optimizers, parallel runs."""

import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from common import metrics
from common.attacks import trades_perturbation
from common.cli import UserError
from common.data import CLASS_NAMES, Dataset, to_float
from common.model import Classifier, autocast, build_model, predict_logits
from common.recipes import Recipe

import torch
import torch.nn.functional as F
from joblib import cpu_count  # knows the limits of containers, and Windows' 61 processes
from torch import Tensor, nn
from torch.distributions import Beta
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

IGNORE_INDEX = -1  # in place of a label that is not to be learned
WARMUP = 0.1  # fraction of a run in which warmup-cosine raises the learning rate
MAX_SHIFT = 4  # pixels that a random crop moves an image by, at most
FOLDS = 4  # an even number: two cores train them in pairs

# ---- the loop -------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    dataset: Dataset,
    seed: int,
    device: torch.device,
    after_epoch: Callable[["Run", list[float]], None] = lambda run, losses: None,
    state: dict[str, Any] | None = None,
) -> Classifier:
    """Train a new model to the recipe's last epoch.

    The whole set is in the device's memory, and a batch is an index into it. All randomness in an
    epoch depends on the seed and the epoch's number only, so a resumed run ends like one that was
    never stopped.

    Args:
        dataset: images whose label is IGNORE_INDEX are left out.
        after_epoch: called with the run and the losses of the epoch's steps.
        state: of an earlier run with the same arguments, to resume from.

    Returns:
        the model of the last epoch, in eval mode. Choosing the epoch with the best score would
        bias that score upward.
    """
    torch.set_num_threads(recipe.threads)  # the order of floating-point sums depends on it
    torch.manual_seed(seed)
    kept = dataset.subset(dataset.labels != IGNORE_INDEX)
    images, labels = kept.images.to(device), kept.labels.to(device)
    order = draw_indices(recipe, kept.labels).to(device)
    run = Run(recipe, len(kept), device)
    if state:
        run.load_state_dict(state)
    prior = sampled_prior(recipe, kept.labels).clamp(min=1e-9)  # a fold may lack a class
    log_prior = (recipe.logit_adjustment * prior.log()).to(device)

    def step(index: Tensor, flip_and_crop: bool) -> Tensor:
        batch, targets = augment(images[index], recipe, flip_and_crop), labels[index]
        if recipe.mixup:
            batch, targets = mixup(batch, targets, recipe.mixup)
        loss = compute_loss(run.model, batch, targets, recipe, log_prior)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        return loss.detach()

    if device.type == "cuda":
        step = GraphedStep(step)
    while run.epoch < recipe.epochs:
        torch.manual_seed(1_000_003 * seed + run.epoch)  # a different one for each seed and epoch
        run.model.train()
        flip_and_crop = recipe.augment_from is not None and run.epoch >= recipe.augment_from
        losses = []
        for index in order[run.epoch].split(recipe.batch_size):
            losses.append(step(index, flip_and_crop))
            run.scheduler.step()
            if run.ema:
                run.ema.update_parameters(run.model)
        run.epoch += 1
        after_epoch(run, torch.stack(losses).tolist())
    return run.result


class GraphedStep:
    """A training step on a GPU whose kernels are recorded once and then replayed: a CUDA graph.

    Launching hundreds of small kernels from Python takes longer than running them.
    """

    WARMUP_CALLS = 3  # without a graph: they choose algorithms and allocate the optimizer's state

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self.step = step
        self.calls: Counter[tuple[Any, ...]] = Counter()
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, index: Tensor, *options: bool) -> Tensor:
        """Take a step on the images at these indices; return its loss.

        Batches of another length, and other options, are recorded on their own.
        """
        key = (len(index), *options)
        self.calls[key] += 1
        if self.calls[key] <= self.WARMUP_CALLS:
            return self._warm_up(index, *options)
        if key not in self.graphs:
            self.graphs[key] = self._record(index, *options)
        graph, static_index, loss = self.graphs[key]
        static_index.copy_(index)
        graph.replay()
        return loss.clone()

    def _warm_up(self, *arguments: Any) -> Tensor:
        """Take a step on a stream of its own: what runs on the default one can't be recorded."""
        stream, default = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(default)
        with torch.cuda.stream(stream):
            loss = self.step(*arguments)
        default.wait_stream(stream)
        return loss

    def _record(self, index: Tensor, *options: bool) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Return the step's graph, and the tensors that it reads the index from and writes to."""
        graph, static_index = torch.cuda.CUDAGraph(), index.clone()
        with torch.cuda.graph(graph):
            loss = self.step(static_index, *options)
        return graph, static_index, loss


def compute_loss(
    model: nn.Module, images: Tensor, targets: Tensor, recipe: Recipe, log_prior: Tensor
) -> Tensor:
    """Return a batch's loss: cross-entropy of adjusted logits, and the TRADES term if any.

    Args:
        images: float in [0, 1], [B, 3, 32, 32].
        targets: labels, int64 [B], or a probability of each class, float [B, C].
        log_prior: added to the logits, [C]: logit adjustment (Menon et al., 2021). With tau = 1,
            the model learns as if all classes were equally frequent.
    """
    if not recipe.epsilon:
        with autocast(images.device):
            logits = model(images).float()
        return F.cross_entropy(logits + log_prior, targets)
    attacked = trades_perturbation(model, images, recipe.epsilon)
    with autocast(images.device):  # as one batch, so that batch norm sees both kinds of images
        logits, attacked_logits = model(torch.cat([images, attacked])).float().chunk(2)
    log_probabilities = attacked_logits.log_softmax(dim=1)
    divergence = F.kl_div(log_probabilities, logits.softmax(dim=1), reduction="batchmean")
    return F.cross_entropy(logits + log_prior, targets) + recipe.trades_beta * divergence


class Run:
    """All state that changes during training, to be saved and loaded as a whole."""

    def __init__(self, recipe: Recipe, count: int, device: torch.device) -> None:
        self.epoch = 0  # number of completed epochs
        tta = {"tta_flip": recipe.tta_flip, "tta_shift": recipe.tta_shift}
        self.model = build_model(recipe.network, **tta).to(device)
        self.ema = None  # or the exponential moving average of the model's weights
        if recipe.ema_decay:
            average = get_ema_multi_avg_fn(recipe.ema_decay)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.optimizer = make_optimizer(self.model, recipe)
        self.steps_per_epoch = math.ceil(count / recipe.batch_size)
        self.scheduler = make_scheduler(self.optimizer, recipe, self.steps_per_epoch)

    @property
    def result(self) -> Classifier:
        """The model to evaluate, in eval mode: the EMA, if there is one."""
        return (self.ema.module if self.ema else self.model).eval()

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to resume."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "ema": self.ema.state_dict() if self.ema else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; the settings stay those of the recipe.

        Raises:
            ValueError: it is that of another run, or damaged.
        """
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()  # creates a state to compare with: loading one checks no layout
        if not same_layout(state, self.state_dict()):
            raise ValueError("not the state of this run")
        self.model.load_state_dict(state["model"])
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": settings})
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        for _ in range(state["epoch"] * self.steps_per_epoch):
            self.scheduler.step()
        self.epoch = state["epoch"]


def same_layout(value: Any, example: Any) -> bool:
    """Return whether a value has an example's types, keys and lengths, and its tensors' layout."""
    if isinstance(example, dict):
        same_keys = isinstance(value, dict) and value.keys() == example.keys()
        return same_keys and all(same_layout(value[key], example[key]) for key in example)
    if type(value) is not type(example):
        return False
    if isinstance(example, Tensor):
        forms = [(each.dtype, each.shape, each.stride()) for each in (value, example)]
        return forms[0] == forms[1]  # with other strides, fused Adam may write beyond a tensor
    if isinstance(example, list | tuple):
        return len(value) == len(example) and all(map(same_layout, value, example))
    return True


def describe_run(
    recipe: Recipe, dataset: Dataset, seed: int, device: torch.device
) -> dict[str, Any]:
    """Return a checkpoint's metadata about its training."""
    trained_on = {"name": dataset.name, **dataset.metadata()}
    return {"recipe": asdict(recipe), "seed": seed, "device": device.type, "trained_on": trained_on}


# ---- samplers: which images an epoch draws --------------------------------------------------


def draw_indices(recipe: Recipe, labels: Tensor) -> Tensor:
    """Return the images of all epochs in the order in which they are drawn, int64 [epochs, N]."""
    if recipe.sampler == "balanced":
        return draw_balanced(labels, recipe.epochs * len(labels)).view(recipe.epochs, -1)
    if recipe.sampler == "weighted":
        counts = torch.bincount(labels, minlength=len(CLASS_NAMES))
        weights = (sampled_prior(recipe, labels) / counts)[labels]
        drawn = torch.multinomial(weights, recipe.epochs * len(labels), replacement=True)
        return drawn.view(recipe.epochs, -1)
    return torch.stack([torch.randperm(len(labels)) for _ in range(recipe.epochs)])


def draw_balanced(labels: Tensor, count: int) -> Tensor:
    """Draw `count` images, always from the class drawn least so far, int64 [count].

    Ties are broken evenly: each round draws every class once, in random order. Within a class,
    images are drawn with replacement.
    """
    classes = labels.unique()
    rounds = torch.rand(-(-count // len(classes)), len(classes)).argsort(dim=1)
    drawn = classes[rounds].flatten()[:count]
    index = torch.empty_like(drawn)
    for label in classes:
        members, places = torch.nonzero(labels == label)[:, 0], torch.nonzero(drawn == label)[:, 0]
        index[places] = members[torch.randint(len(members), (len(places),))]
    return index


def sampled_prior(recipe: Recipe, labels: Tensor) -> Tensor:
    """Return the fraction of each class among the images that the sampler draws, [C]."""
    counts = torch.bincount(labels, minlength=len(CLASS_NAMES)).float()
    exponent = {"shuffle": 1.0, "balanced": 0.0, "weighted": recipe.sampling_exponent}
    weights = (counts > 0) * counts ** exponent[recipe.sampler]
    return weights / weights.sum()


# ---- augmentation, per image (torchvision's v2 transforms change a whole batch alike) -------


def augment(images: Tensor, recipe: Recipe, flip_and_crop: bool) -> Tensor:
    """Return a batch of uint8 images as float in [0, 1], augmented as the recipe says."""
    images = to_float(images)
    if flip_and_crop:
        images = random_flip_and_crop(images)
    if recipe.color_jitter:
        images = color_jitter(images, recipe.color_jitter)
    if recipe.cutout:
        images = cutout(images, recipe.cutout)
    return images


def random_flip_and_crop(images: Tensor) -> Tensor:
    """Mirror half of the images, [B, C, H, W], and shift each by up to MAX_SHIFT pixels.

    The border is filled by reflection, as in a random crop of a padded image.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, [MAX_SHIFT] * 4, mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # all crops, as views
    top, left = torch.randint(2 * MAX_SHIFT + 1, (2, count), device=images.device)
    cropped = windows[torch.arange(count, device=images.device), :, top, left]
    mirrored = torch.rand(count, 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, cropped.flip(3), cropped)


def color_jitter(images: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and color balance of each image at random.

    Args:
        images: float in [0, 1], [B, 3, H, W].
        strength: contrast is multiplied by 1 - strength to 1 + strength; brightness shifts by up
            to strength / 2, and each channel by up to strength / 2 of the image's mean.
    """

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(len(images), channels, 1, 1, device=images.device).uniform_(low, high)

    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    contrast = uniform(1 - strength, 1 + strength)
    balance = uniform(1 - strength / 2, 1 + strength / 2, channels=3)
    brightness = uniform(-strength / 2, strength / 2)
    # (images - mean) * contrast + mean * balance + brightness, in one pass over the pixels
    return torch.addcmul(mean * (balance - contrast) + brightness, images, contrast).clamp_(0, 1)


def cutout(images: Tensor, size: int) -> Tensor:
    """Gray out a square of each image, which may cross the border (DeVries and Taylor, 2017).

    Args:
        images: float in [0, 1], [B, C, H, W].
        size: side length of the square, in pixels.
    """

    def random_span(side: int) -> Tensor:
        center = torch.randint(side, (len(images), 1), device=images.device)
        start = center - (size - 1) // 2
        places = torch.arange(side, device=images.device)
        return (places >= start) & (places < start + size)

    rows, columns = random_span(images.shape[2]), random_span(images.shape[3])
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.5)


def mixup(images: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Blend each image and label with another one of the batch (Zhang et al., 2018).

    Args:
        images: float [B, C, H, W].
        labels: int64 [B].
        alpha: for each image, a fraction is drawn from Beta(alpha, alpha); it keeps the larger
            part of itself.

    Returns:
        images, and a probability of each class, float [B, C].
    """
    alphas = images.new_full((len(images), 1), alpha)
    fraction = Beta(alphas, alphas, validate_args=False).sample()  # a check would wait for the GPU
    fraction = torch.minimum(fraction, 1 - fraction)  # of the other image
    other = torch.randperm(len(images), device=images.device)
    targets = F.one_hot(labels, len(CLASS_NAMES)).float()
    mixed = torch.lerp(images, images[other], fraction[:, :, None, None])
    return mixed, torch.lerp(targets, targets[other], fraction)


# ---- optimizers -----------------------------------------------------------------------------


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Return the recipe's optimizer for all weights of a model."""
    weights, rate, decay = list(model.parameters()), recipe.learning_rate, recipe.weight_decay
    graphed = weights[0].device.type == "cuda"
    if graphed:  # a graph repeats the same numbers, but reads a tensor anew
        rate = torch.tensor(rate, device=weights[0].device)
    if recipe.optimizer == "muon":
        return Muon(weights, rate, decay)
    return Adam(weights, rate, weight_decay=decay, fused=True, capturable=graphed)


def make_scheduler(optimizer: Optimizer, recipe: Recipe, steps_per_epoch: int) -> LRScheduler:
    """Return the recipe's learning-rate schedule, to be stepped after each batch."""
    if recipe.schedule == "step":
        return StepLR(optimizer, recipe.step_size * steps_per_epoch, recipe.gamma)
    total = recipe.epochs * steps_per_epoch
    factor = warmup_cosine if recipe.schedule == "warmup-cosine" else lambda progress: 1.0
    return LambdaLR(optimizer, lambda step: factor((step + 0.5) / total))


def warmup_cosine(progress: float) -> float:
    """Return the learning-rate factor at a fraction of the run: linear warmup, cosine decay."""
    decay = max(0.0, progress - WARMUP) / (1 - WARMUP)
    return min(progress / WARMUP, (1 + math.cos(math.pi * decay)) / 2)


class Muon(Optimizer):
    """Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).

    Momentum, then an update whose singular values are all about the same, so that rare directions
    are learned as fast as those that dominate the gradient. A convolution's filters are the rows
    of one matrix (torch.optim.Muon takes no convolutions); biases and norms are matrices of one
    row. The step is as large as a typical step of Adam (Liu et al., "Muon is scalable for LLM
    training", 2025).

    Jordan leaves the first and the last layer to AdamW. Here that loses 0.035 of G-mean
    (docs/ablations.md).
    """

    MOMENTUM = 0.95
    ADAM_RMS = 0.2  # root mean square of a typical Adam step, in learning rates

    def __init__(self, weights: Sequence[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights once; biases and norms have no weight decay."""
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - self.MOMENTUM)
                nesterov = weight.grad.lerp(momentum, self.MOMENTUM)
                matrix = nesterov.flatten(start_dim=1) if weight.ndim > 1 else nesterov[None]
                size = group["lr"] * self.ADAM_RMS * max(matrix.shape) ** 0.5
                if weight.ndim > 1:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                size = torch.as_tensor(size, dtype=weight.dtype, device=weight.device)
                weight.addcmul_(orthogonalize(matrix).view_as(weight), size, value=-1)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors and singular values of about 1.

    Newton-Schulz iteration with Jordan's coefficients: five rounds take values from 0.0016 to 1
    of the matrix's norm to between 0.68 and 1.20; smaller ones end lower.
    """
    if matrix.shape[0] > matrix.shape[1]:  # then the products below are smaller
        return orthogonalize(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    if len(x) == 1:  # its only singular value is 1
        return x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


# ---- several models at once -----------------------------------------------------------------


def cross_val_logits(recipe: Recipe, dataset: Dataset, seed: int, device: torch.device) -> Tensor:
    """Return out-of-fold logits, [N, C]: each image's from a model that was not trained on it.

    Near-duplicates of an image are never in its model's training set either, nor are images whose
    label the recipe's own label filter leaves out.

    Raises:
        UserError: there are too few images.
    """
    different = len(dataset.duplicate_groups.unique())
    if min(max(dataset.class_counts), different) < FOLDS:
        raise UserError(f"{dataset.name}: no class has {FOLDS} different images, one for each fold")
    folds = make_folds(dataset, FOLDS, seed)
    dataset = filter_labels(recipe, dataset, seed, device)
    jobs = [
        (recipe, dataset.subset(inside), dataset.images[outside], seed, device)
        for inside, outside in folds
    ]
    logits = torch.empty(len(dataset), len(CLASS_NAMES))
    results = parallel_map(train_and_predict, jobs, device, "folds")
    for (_, outside), logits_of_fold in zip(folds, results, strict=True):
        logits[outside] = logits_of_fold
    return logits


def make_folds(dataset: Dataset, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return `count` folds as (indices to train on, indices held out), int64 each.

    Near-duplicates are always on the same side.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # takes seconds to import

    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings(action="ignore"):  # about a class that some folds lack
        folds = list(splitter.split(dataset.images, dataset.labels, dataset.duplicate_groups))
    return [(torch.from_numpy(inside), torch.from_numpy(outside)) for inside, outside in folds]


def train_and_predict(
    recipe: Recipe, dataset: Dataset, images: Tensor, seed: int, device: torch.device
) -> Tensor:
    """Train a model; return its logits, [N, C], for other images."""
    return predict_logits(train(recipe, dataset, seed, device), images)


def filter_labels(recipe: Recipe, dataset: Dataset, seed: int, device: torch.device) -> Dataset:
    """Return the data set after the recipe's label filter, if it has one.

    Labels that the filter does not trust become IGNORE_INDEX. With `correct_labels`, they become
    the most probable label, where that is certain enough.
    """
    if recipe.label_filter is None:
        return dataset
    logits = cross_val_logits(recipe.label_filter, dataset, seed, device)
    posterior = metrics.label_posterior(logits, dataset.labels)
    trusted = torch.from_numpy(metrics.trusted_labels(posterior, dataset.labels))
    labels = dataset.labels.where(trusted, IGNORE_INDEX)
    if recipe.correct_labels:
        probability, suggested = torch.from_numpy(posterior).max(dim=1)
        certain = probability > metrics.CORRECTION_THRESHOLD
        labels = suggested.where(~trusted & certain, labels)
    return replace(dataset, labels=labels)


def parallel_map(
    function: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    device: torch.device,
    description: str,
) -> Iterator[Any]:
    """Yield `function(*job)` for each job, in order; on a CPU, in parallel processes.

    Each job has one thread, unless it sets another number, as `train` does: a single thread never
    waits for another, so it does not stall when other processes are busy.

    Args:
        function: at module level, so that other processes can import it.
    """
    # On a GPU, one job after the other.
    workers = min(len(jobs), cpu_count()) if device.type == "cpu" else 1
    hidden = in_worker() or len(jobs) == 1 or None  # None: shown on a terminal only
    progress_bar = partial(tqdm, total=len(jobs), desc=description, leave=False, disable=hidden)
    if workers <= 1 or in_worker():  # in a worker, the cores are in use
        for job in progress_bar(jobs):
            yield _call(function, job)
        return
    # Workers name the script's classes by this module. After `%run` in a notebook, it may still be
    # an earlier script.
    sys.modules["__mp_main__"] = sys.modules["__main__"]
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        futures = [pool.submit(_call_in_worker, _ByValue((function, job))) for job in jobs]
        for future in progress_bar(futures):
            while not future.done():  # on Windows, Ctrl-C can't end a wait without a timeout
                wait([future], timeout=0.5)
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError("a process was killed, probably because the memory is full") from error
    except BaseException:  # Ctrl-C included: do not wait for the others
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def in_worker() -> bool:
    """Return whether this process is a worker of `parallel_map`."""
    return multiprocessing.parent_process() is not None


def _call(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    """Call the function with one thread, then restore the former number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(*job)
    finally:
        torch.set_num_threads(before)


class _ByValue:
    """An object that is sent to another process as plain bytes.

    Tensors would be sent as shared memory, through a socket whose folder is left behind if a
    process is killed.
    """

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (pickle.dumps(self.content),)


def _call_in_worker(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> _ByValue:
    return _ByValue(_call(*call))


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and exit when it ends, for whatever reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # tqdm's default is a semaphore, which a killed worker leaks
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
