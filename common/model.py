"""Networks, prediction, and checkpoints that are enough to rebuild a model."""

import copy
import io
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli
from common.cli import UserError
from common.data import CLASS_NAMES, to_float
from data.pickles import RefusedError, read_torch_file

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COURSE_RANGE = (-1.0, 1.0)  # of the course's pixels; its checkpoints (weights only) expect it
PREDICTION_BATCH = 500
MAX_FILE_SIZE = 2**26  # bytes, of a checkpoint; those in models/ have up to 1.2 million
ASSUMED_RANGE = "assuming pixels in [-1, 1]; if it was trained on [0, 1], use --pixel-range 0,1"
MAX_TTA_SHIFT = 8  # pixels: a larger shift loses much of the image
MAX_PIXEL = 1000  # after normalization


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` prefers CUDA, then MPS, then the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, there in available.items() if there), "cpu")
    if name != "cpu" and not available.get(name, False):
        usable = ", ".join(["cpu", *(kind for kind, there in available.items() if there)])
        raise UserError(f"--device {name}: not on this machine, which has {usable}")
    return torch.device(name)


def autocast(device: torch.device) -> AbstractContextManager:
    """Return the context for a training step's forward pass: bfloat16 where it is faster.

    That is on GPUs and CPUs with bfloat16 instructions (an epoch takes 35% less time on a CPU).
    Weights and loss stay float32.
    """
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = device.type == "cpu" and _cpu_has_bfloat16()
    return torch.autocast(device.type, torch.bfloat16) if faster else nullcontext()


def _cpu_has_bfloat16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch can't tell
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


# ---- networks -------------------------------------------------------------------------------


class Normalize(nn.Module):
    """The first layer of every model: maps pixels from [0, 1] to the range it was trained on.

    As part of the model, it can't be forgotten, applied twice, or differ between training and
    testing.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, images: Tensor) -> Tensor:
        """Map 0 to `low` and 1 to `high`."""
        return images * (self.high - self.low) + self.low


class Classifier(nn.Module):
    """What all models share: normalization and test-time augmentation.

    Args:
        pixel_range: the range that the layers after `Normalize` are trained on.
        tta_flip: in eval mode, average the logits with those of the mirrored image.
        tta_shift: in eval mode, average with those of the image shifted by this many pixels up,
            down, left and right; 0 for none.
    """

    def __init__(
        self,
        pixel_range: tuple[float, float] = COURSE_RANGE,
        tta_flip: bool = False,
        tta_shift: int = 0,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(*pixel_range)
        self.tta_flip, self.tta_shift = tta_flip, tta_shift

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The range that pixels are mapped to, (low, high)."""
        return self.normalize.low, self.normalize.high

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, [N, 3], of images, float32 [N, 3, 32, 32] in [0, 1]."""
        if self.training:
            return self.single_view(images)
        return torch.stack([self.single_view(view) for view in self.views(images)]).mean(dim=0)

    def single_view(self, images: Tensor) -> Tensor:
        """Return logits, [N, 3], of images in [0, 1], without test-time augmentation."""
        return self.logits(self.normalize(images))

    def views(self, images: Tensor) -> list[Tensor]:
        """Return the views for test-time augmentation, the images themselves first."""
        views, shift = [images], self.tta_shift
        if shift:
            height, width = images.shape[-2:]
            padded = F.pad(images, [shift] * 4, mode="reflect")
            views += [
                padded[..., top : top + height, left : left + width]
                for top, left in ((0, shift), (2 * shift, shift), (shift, 0), (shift, 2 * shift))
            ]
        if self.tta_flip:
            views += [view.flip(-1) for view in views]
        return views

    def logits(self, x: Tensor) -> Tensor:
        """Return logits, [N, 3], of normalized images."""
        raise NotImplementedError


class CourseNet(Classifier):
    """The course's CNN: two convolutions and three linear layers, 66,171 parameters.

    LeCun et al., "Gradient-based learning applied to document recognition" (1998), with ReLU,
    max pooling and dropout. The names of the layers are the course's own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv1 = nn.Conv2d(3, 16, kernel_size=5)  # 32x32 -> 28x28, pooled to 14x14
        self.conv2 = nn.Conv2d(16, 16, kernel_size=5)  # 14x14 -> 10x10, pooled to 5x5
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, len(CLASS_NAMES))
        self.dropout = nn.Dropout(0.5)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits, [N, 3], of normalized images."""
        # Pooling before ReLU gives the same result with a quarter of ReLU's work.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = x.flatten(start_dim=1)
        x = self.dropout(F.relu(self.fc1(x)))
        x = self.dropout(F.relu(self.fc2(x)))
        return self.fc3(x)


class SmallVGG(Classifier):
    """A small VGG (Simonyan and Zisserman, 2015): seven convolutions, 0.3 million parameters.

    Stages of two 3x3 convolutions, each stage with half the resolution and twice the channels of
    the one before. The first batch normalization (Ioffe and Szegedy, 2015) of a stage follows the
    pooling, where it has a quarter of the work.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stem = nn.Conv2d(3, 16, kernel_size=2)  # 32x32 -> 31x31
        # 31x31 -> 15x15 -> 7x7 -> 3x3
        self.stages = nn.Sequential(self._stage(16, 32), self._stage(32, 64), self._stage(64, 128))
        self.head = nn.Linear(128, len(CLASS_NAMES))

    @staticmethod
    def _stage(width_in: int, width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(width_in, width, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )

    def logits(self, x: Tensor) -> Tensor:
        """Return logits, [N, 3], of normalized images."""
        x = self.stages(F.relu(self.stem(x)))
        return self.head(x.amax(dim=(2, 3)))


NETWORKS: dict[str, type[Classifier]] = {"CourseNet": CourseNet, "SmallVGG": SmallVGG}


def build_model(
    network: str = "CourseNet",
    pixel_range: tuple[float, float] = COURSE_RANGE,
    tta_flip: bool = False,
    tta_shift: int = 0,
) -> Classifier:
    """Return a new model of a network in NETWORKS.

    Its weights are stored channels last: on a CPU, an epoch of `best` takes a fifth less time.
    Not on a Mac, whose GPU may then compute wrong gradients in batch norm (PyTorch issue 175189).
    """
    model = NETWORKS[network](pixel_range, tta_flip, tta_shift)
    if torch.backends.mps.is_available():
        return model
    return model.to(memory_format=torch.channels_last)


def with_pixel_range(model: Classifier, pixel_range: tuple[float, float]) -> Classifier:
    """Return a copy of the model that is fed pixels in another range: the bug of step 3g."""
    other = copy.deepcopy(model)
    other.normalize = Normalize(*pixel_range)
    return other


def predict_logits(model: Classifier, images: Tensor, tta: bool = True) -> Tensor:
    """Return the logits, float32 [N, 3] on the CPU, of images, uint8 or float in [0, 1].

    The model predicts in eval mode and is returned to the mode that it was in. Without `tta`, it
    sees only one view of each image, which is faster.
    """
    forward = model if tta else model.single_view
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    logits = []
    with torch.no_grad():
        for batch in images.split(PREDICTION_BATCH):
            batch = to_float(batch) if batch.dtype == torch.uint8 else batch
            logits.append(forward(batch.to(device)).cpu())
    model.train(was_training)
    return torch.cat(logits)


def finite_logits(model: Classifier, images: Tensor, name: str) -> Tensor:
    """Return `predict_logits` of the model that was read from the file `name`.

    Raises:
        UserError: the logits are not finite, for example because the weights are huge.
    """
    logits = predict_logits(model, images)
    if not logits.isfinite().all():
        raise UserError(f"{name}: its logits are NaN or infinite")
    return logits


# ---- checkpoints ----------------------------------------------------------------------------


def save_checkpoint(
    path: Path,
    model: Classifier,
    metadata: dict[str, Any],
    training: dict[str, Any] | None = None,
) -> None:
    """Write a model's weights and settings, and where it came from.

    Args:
        metadata: recipe, seed and data: numbers, short texts, lists and dicts of them.
        training: the state to resume training from.
    """
    content = {
        "model_state_dict": {name: w.detach().cpu() for name, w in model.state_dict().items()},
        "network": type(model).__name__,
        "pixel_range": model.pixel_range,
        "tta_flip": model.tta_flip,
        "tta_shift": model.tta_shift,
        "metadata": metadata,
        "training": training or {},
    }
    buffer = io.BytesIO()  # on a full disk, torch.save would not raise an OSError
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    model: Classifier  # in eval mode
    metadata: dict[str, Any]  # recipe, seed and data; {} if the checkpoint is bare
    training: dict[str, Any]  # what `save_checkpoint` was given as `training`
    bare: bool  # it holds weights only
    assumed_range: bool  # nobody has named the pixel range of a bare one

    def describe(self) -> str:
        """Return in a few words how it was trained, and whether its pixel range is assumed."""
        note = f"; {ASSUMED_RANGE}" if self.assumed_range else ""
        return f"{describe_checkpoint(self.metadata)}{note}"


def load_checkpoint(
    file: Path | bytes,
    pixel_range: tuple[float, float] | None = None,
    name: str = "",
    strict_range: bool = True,
) -> Checkpoint:
    """Read one of our checkpoints, or a bare one (weights only).

    Args:
        file: the checkpoint's path, or its content.
        pixel_range: the range that a bare checkpoint was trained on; None means [-1, 1].
        name: the file's name in messages; its path if empty.
        strict_range: refuse a pixel range for a checkpoint that has its own. False, for commands
            with several checkpoints, uses it for the bare ones only.

    Raises:
        UserError: no such file, not a checkpoint, or weights of another network.
    """
    name = name or str(file)
    content = _read(file, name)
    settings, training = _settings_of(content, name), content.get("training")
    bare = "pixel_range" not in settings
    if strict_range and pixel_range and not bare:
        text = "{:g},{:g}".format(*settings["pixel_range"])
        raise UserError(f"{name}: has its own pixel range, {text}; omit --pixel-range")
    model = build_model(**({"pixel_range": pixel_range or COURSE_RANGE} | settings))
    weights = _weights_of(content, name)
    _check_weights(weights, model, name)
    model.load_state_dict(weights)
    training = training if isinstance(training, dict) else {}
    assumed = bare and pixel_range is None
    return Checkpoint(model.eval(), _metadata_of(content, name), training, bare, assumed)


def describe_checkpoint(metadata: dict[str, Any]) -> str:
    """Return in a few words how a checkpoint was trained."""
    recipe, data = metadata.get("recipe"), metadata.get("trained_on")
    if not isinstance(recipe, dict) or not isinstance(data, dict):
        return "of unknown training"
    values = (recipe.get("name"), recipe.get("epochs"), metadata.get("seed"), data.get("name"))
    name, epochs, seed, trained_on = (cli.one_line(str(value)[:60]) for value in values)
    plural = "" if epochs == "1" else "s"
    return f"recipe {name}, {epochs} epoch{plural}, seed {seed}, trained on {trained_on}"


def _read(file: Path | bytes, name: str) -> dict[str, Any]:
    """Return the dict in a file of torch.save; nothing else is accepted."""
    raw = file if isinstance(file, bytes) else cli.read_bytes(file, MAX_FILE_SIZE)
    try:
        content = read_torch_file(raw)
    except RefusedError as error:
        raise UserError(f"{name}: {error}; save only the state_dict()") from error
    except Exception as error:  # a broken or hostile file can fail in any way
        raise UserError(f"{name}: not a file of torch.save, or cut short") from error
    if not isinstance(content, dict):
        raise UserError(f"{name}: holds no dict of weights; save the model's state_dict()")
    return content


def _weights_of(content: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Return the state dict, under the keys and prefixes that common tools use."""
    keys = ("model_state_dict", "state_dict", "model", "net")
    weights = next((content[key] for key in keys if isinstance(content.get(key), dict)), content)
    if not any(isinstance(weight, Tensor) for weight in weights.values()):
        raise UserError(f"{name}: holds no weights under 'model_state_dict' or at its top level")
    weights = {key: weight for key, weight in weights.items() if key != "n_averaged"}  # of an EMA
    for prefix in ("module.", "_orig_mod.", "model.", "net.") * 2:  # DDP, compile, Lightning
        if all(isinstance(key, str) and key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): weight for key, weight in weights.items()}
    return weights


def _check_weights(weights: dict[str, Any], model: Classifier, name: str) -> None:
    """Refuse weights of another network, naming the first that does not fit."""
    expected = model.state_dict()
    for key in [*expected, *weights]:
        ours, theirs = (_shape_of(w[key]) if key in w else "missing" for w in (expected, weights))
        if ours != theirs:
            kind = type(model).__name__
            raise UserError(f"{name}: weight {cli.safe_repr(key)}: {theirs} here, {ours} in {kind}")
    if not all(torch.isfinite(weight.float()).all() for weight in weights.values()):
        raise UserError(f"{name}: has weights that are NaN or infinite: its training diverged")


def _shape_of(weight: Any) -> str:
    """Describe a weight by its shape, or say that it is not a plain dense tensor."""
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
    if not isinstance(weight, Tensor) or weight.dtype not in dtypes:
        return "not a plain tensor of numbers"
    return str(list(weight.shape))


def _settings_of(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments for `build_model` that a checkpoint holds, checked."""
    checks = {
        "network": (lambda value: type(value) is str and value in NETWORKS, " or ".join(NETWORKS)),
        "pixel_range": (_is_pixel_range, f"two numbers from -{MAX_PIXEL} to {MAX_PIXEL}"),
        "tta_flip": (lambda value: type(value) is bool, "True or False"),
        "tta_shift": (
            lambda value: type(value) is int and 0 <= value <= MAX_TTA_SHIFT,
            f"a whole number from 0 to {MAX_TTA_SHIFT}",
        ),
    }
    settings = {key: content[key] for key in checks if key in content}
    for key, value in settings.items():
        is_valid, expected = checks[key]
        if not is_valid(value):
            raise UserError(f"{name}: {key} is {cli.safe_repr(value)}; it must be {expected}")
    return settings


def _is_pixel_range(value: Any) -> bool:
    numbers = isinstance(value, tuple | list) and all(type(end) in (int, float) for end in value)
    return numbers and len(value) == 2 and all(abs(end) <= MAX_PIXEL for end in value)


def _metadata_of(content: dict[str, Any], name: str) -> dict[str, Any]:
    metadata = content.get("metadata", {})
    if not isinstance(metadata, dict) or not _is_plain(metadata):
        raise UserError(f"{name}: its metadata must be numbers, short texts, lists and dicts")
    return metadata


def _is_plain(value: Any) -> bool:
    """Return whether a value is small and can be stored as JSON."""
    items, count = [(value, 0)], 0
    while items:
        item, depth = items.pop()
        if isinstance(item, dict) and all(isinstance(key, str) for key in item):
            item = [*item.keys(), *item.values()]
        if isinstance(item, list | tuple):
            count += len(item)  # a small file can hold the same list a thousand times
            if count > 1000 or depth > 4:
                return False
            items += [(each, depth + 1) for each in item]
        elif isinstance(item, str):
            if len(item) > 1000 or re.search("[\ud800-\udfff]", item):  # UTF-8 can't hold these
                return False
        elif type(item) not in (bool, float, int, type(None)) or abs(item or 0) >= 2**63:
            return False
    return True
