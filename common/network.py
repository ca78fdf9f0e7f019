"""The nets, the course's and our own, and checkpoints that can rebuild them alone."""

import copy
import functools
import io
import itertools
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.console import UserError
from common.dataset import CLASS_NAMES, as_input

COURSE_RANGE = (-1.0, 1.0)  # the course's own pictures, and bare checkpoints, are in this range
PREDICTION_BATCH = 500
MOST_SHIFT = 8  # pixels; a net that looks further aside sees little of the picture


class PixelRange(nn.Module):
    """The first layer of every net: moves pixels from [0, 1] to the range it was trained on.

    As part of the net it can't be forgotten, applied twice, or differ between training and test.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, pictures: Tensor) -> Tensor:
        """Map 0 to `low` and 1 to `high`."""
        return pictures * (self.high - self.low) + self.low


class Network(nn.Module):
    """What all nets share: the pixel range, and several looks at a picture.

    In evaluation mode a net may give the mean of the logits of several views of a picture: neither
    which way a car drives nor where it stands makes it another thing.

    Args:
        pixel_range: the range that the layers behind it are trained on.
        average_flips: look at the mirror image as well.
        average_shifts: look at the picture moved by so many pixels up, down, left and right as
            well; 0 for none.
    """

    def __init__(
        self,
        pixel_range: tuple[float, float] = COURSE_RANGE,
        average_flips: bool = False,
        average_shifts: int = 0,
    ) -> None:
        super().__init__()
        self.pixel_range = PixelRange(*pixel_range)
        self.average_flips, self.average_shifts = average_flips, average_shifts

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits, [N, 3], of pictures, float32 [N, 3, 32, 32] in [0, 1]."""
        if self.training:
            return self.look_once(pictures)
        return torch.stack([self.look_once(view) for view in self._views(pictures)]).mean(dim=0)

    def look_once(self, pictures: Tensor) -> Tensor:
        """Return logits, [N, 3], of pictures in [0, 1], whatever views the net averages over."""
        return self.logits(self.pixel_range(pictures))

    def _views(self, pictures: Tensor) -> list[Tensor]:
        views, shift = [pictures], self.average_shifts
        if shift:
            height, width = pictures.shape[-2:]
            padded = F.pad(pictures, [shift] * 4, mode="reflect")
            views += [
                padded[..., down : down + height, right : right + width]
                for down, right in ((0, shift), (2 * shift, shift), (shift, 0), (shift, 2 * shift))
            ]
        if self.average_flips:
            views += [view.flip(-1) for view in views]
        return views

    def logits(self, x: Tensor) -> Tensor:
        """Return logits, [N, 3], of pictures in the pixel range."""
        raise NotImplementedError


class CourseNet(Network):
    """The course's CNN: two convolutions and three linear layers, 66,171 parameters.

    LeCun et al., "Gradient-based learning applied to document recognition" (1998), with ReLU,
    max pooling and dropout.
    """

    def __init__(self, *settings: Any, **more_settings: Any) -> None:
        super().__init__(*settings, **more_settings)
        self.conv1 = nn.Conv2d(3, 16, kernel_size=5)  # 32x32 -> 28x28, pooled to 14x14
        self.conv2 = nn.Conv2d(16, 16, kernel_size=5)  # 14x14 -> 10x10, pooled to 5x5
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, len(CLASS_NAMES))
        self.dropout = nn.Dropout(0.5)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits, [N, 3], of pictures in the pixel range."""
        # The course applies ReLU, then pooling. The largest of four values is the same before
        # and after ReLU, so pooling first gives the same net, with a quarter of the ReLU's work.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = x.flatten(start_dim=1)
        x = self.dropout(F.relu(self.fc1(x)))
        x = self.dropout(F.relu(self.fc2(x)))
        return self.fc3(x)


class BestNet(Network):
    """A net of our own for the recipe `best`: seven convolutions, 0.3 million parameters.

    The plan is that of VGG (Simonyan and Zisserman, 2015): stages of two 3x3 convolutions, each
    stage with half the resolution and twice the channels of the one before. The first batch
    normalisation (Ioffe and Szegedy, 2015) of a stage stands behind the pooling, where it has a
    quarter of the work.
    """

    WIDTHS = (16, 32, 64, 128)

    def __init__(self, *settings: Any, **more_settings: Any) -> None:
        super().__init__(*settings, **more_settings)
        self.stem = nn.Conv2d(3, self.WIDTHS[0], kernel_size=2)  # 32x32 -> 31x31
        self.stages = nn.Sequential(  # 31x31 -> 15x15 -> 7x7 -> 3x3
            *(self._stage(*widths) for widths in itertools.pairwise(self.WIDTHS))
        )
        self.classify = nn.Linear(self.WIDTHS[-1], len(CLASS_NAMES))

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
        """Return logits, [N, 3], of pictures in the pixel range."""
        x = self.stages(F.relu(self.stem(x)))
        return self.classify(x.amax(dim=(2, 3)))


class BestPair(Network):
    """Two BestNets side by side, whose logits are averaged, as their mistakes differ.

    Hansen and Salamon, "Neural network ensembles" (1990). In training each learns from its own
    half of a batch, so that an epoch takes no longer than with one.
    """

    def __init__(self, *settings: Any, **more_settings: Any) -> None:
        super().__init__(*settings, **more_settings)
        self.nets = nn.ModuleList([BestNet(), BestNet()])

    def logits(self, x: Tensor) -> Tensor:
        """Return logits, [N, 3], of pictures in the pixel range."""
        if self.training:
            halves = x.chunk(len(self.nets))  # just one, of a batch of one picture
            return torch.cat(
                [net.logits(half) for net, half in zip(self.nets, halves, strict=False)]
            )
        return torch.stack([net.logits(x) for net in self.nets]).mean(dim=0)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    network.__name__: network for network in (CourseNet, BestNet, BestPair)
}


def build_network(
    name: str = "CourseNet",
    pixel_range: tuple[float, float] = COURSE_RANGE,
    average_flips: bool = False,
    average_shifts: int = 0,
) -> nn.Module:
    """Return a new net of a kind in NETWORKS, in the memory layout that CPUs are fastest with."""
    return NETWORKS[name](pixel_range, average_flips, average_shifts).to(
        memory_format=torch.channels_last
    )


def with_pixel_range(net: nn.Module, pixel_range: tuple[float, float]) -> nn.Module:
    """Return a copy of the net that is fed pixels in another range: the bug of step 3g."""
    other = copy.deepcopy(net)
    other.pixel_range = PixelRange(*pixel_range)
    return other


def fast_precision(device: torch.device) -> AbstractContextManager:
    """Return the context in which to compute a training step's logits.

    Processors with instructions for bfloat16 multiply its 16 bits twice as fast as float32's 32;
    weights and loss stay in float32. Nets come out as good: with recipe `tuned`, 24 times on two
    thirds of the course's training set, G-mean on the third left out was 0.866 with it and without
    it. Elsewhere bfloat16 would be slower, so nothing changes.
    """
    if device.type == "cpu" and _cpu_has_bfloat16():
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


@functools.cache
def _cpu_has_bfloat16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # older torch can't tell
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def predict_logits(net: nn.Module, pictures: Tensor, one_view: bool = False) -> Tensor:
    """Return the logits, [N, 3], of pictures, uint8 or in [0, 1]; without dropout.

    The net's mode (training or not) is what it was before. `one_view` saves the time of all
    other views that the net averages over.
    """
    look = net.look_once if one_view else net
    device, was_training = next(net.parameters()).device, net.training
    net.eval()
    logits = []
    with torch.no_grad():
        for batch in pictures.split(PREDICTION_BATCH):
            batch = as_input(batch) if batch.dtype == torch.uint8 else batch
            logits.append(look(batch.to(device)).cpu())
    net.train(was_training)
    return torch.cat(logits)


def save_checkpoint(
    path: Path, net: nn.Module, about: dict[str, Any], training: dict[str, Any] | None = None
) -> None:
    """Write the net's weights, kind and pixel range, and `about`: what it was trained on.

    How the training went, and what it needs to go on, may stand beside them.

    The weights of CourseNet have the course's own names and are trained on the course's own
    range, so that the course's evaluation script loads its files as well.
    """
    weights = {name: weight.detach().cpu() for name, weight in net.state_dict().items()}
    content = {
        "model_state_dict": weights,
        "network": type(net).__name__,
        "pixel_range": (net.pixel_range.low, net.pixel_range.high),
        "average_flips": net.average_flips,
        "average_shifts": net.average_shifts,
        "about": about,
        "training": training or {},
    }
    buffer = io.BytesIO()  # first to memory: a full disk is then an OSError like any other
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())


def load_checkpoint(
    path: Path, pixel_range: tuple[float, float] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a net from its checkpoint alone: ours, or one in the course's bare form.

    Args:
        pixel_range: the range a bare checkpoint was trained on; None means the course's [-1, 1].

    Returns:
        the net in evaluation mode, and what the file says of its training ({} for a bare one).

    Raises:
        UserError: no such file, no checkpoint, weights of another net, or a pixel range
            given for a checkpoint that carries its own.
    """
    net, about, _ = load_training(path, pixel_range)
    return net, about


def load_training(
    path: Path, pixel_range: tuple[float, float] | None = None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Return what `load_checkpoint` does, and how the training went ({} if the file is silent)."""
    content = _read_checkpoint(path)
    if "pixel_range" in content and pixel_range is not None:
        own = "{:g},{:g}".format(*content["pixel_range"])
        raise UserError(f"{path}: carries its own pixel range, {own}; leave --pixel-range out")
    if "pixel_range" not in content and pixel_range is None:
        print(
            f"note: {path} does not say its pixel range; taken for the course's, [-1, 1]. "
            "If it was trained on [0, 1], say --pixel-range 0,1.",
            file=sys.stderr,
        )
    name = str(content.get("network", "CourseNet"))
    if name not in NETWORKS:
        raise UserError(f"{path}: net of an unknown kind, {name}; known are {', '.join(NETWORKS)}")
    net = build_network(
        name,
        content.get("pixel_range", pixel_range or COURSE_RANGE),
        content.get("average_flips") is True,
        _shifts_of(path, content),
    )
    weights = content["model_state_dict"]
    _check_weights(path, net, weights)
    net.load_state_dict(weights)
    return net.eval(), content.get("about", {}), content.get("training", {})


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # of other formats: they are refused anyway
            content = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
    except Exception as error:  # a broken or unsafe file can fail in any way
        raise UserError(
            f"{path}: not a whole checkpoint of torch.save, or not a safe one"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        raise UserError(f"{path}: holds no 'model_state_dict', which checkpoints here do")
    low_high = content.get("pixel_range", COURSE_RANGE)
    if not (isinstance(low_high, tuple) and len(low_high) == 2 and _are_finite(low_high)):
        raise UserError(f"{path}: pixel_range is {low_high!r}, it must be two numbers (low, high)")
    if not isinstance(content.get("about", {}), dict):
        raise UserError(f"{path}: 'about' is no dict of facts about the training")
    return content


def _shifts_of(path: Path, content: dict[str, Any]) -> int:
    shifts = content.get("average_shifts", 0)
    if not (isinstance(shifts, int) and 0 <= shifts <= MOST_SHIFT):
        right = f"0 to {MOST_SHIFT} pixels"
        raise UserError(f"{path}: average_shifts is {shifts!r}, it must be {right}")
    return shifts


def _are_finite(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, float) and math.isfinite(value) for value in values)


def _check_weights(path: Path, net: nn.Module, weights: dict[str, Any]) -> None:
    """Refuse weights of another net, naming the first that does not fit."""
    expected = net.state_dict()
    for name in [*expected, *weights]:
        ours, theirs = _shape_of(name, expected), _shape_of(name, weights)
        if ours != theirs:
            kind = type(net).__name__
            raise UserError(f"{path}: {name} is {theirs}, but {kind} has {ours}: another net")
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise UserError(f"{path}: has weights that are NaN or infinite: its training diverged")


def _shape_of(name: str, weights: dict[str, Any]) -> str:
    if name not in weights:
        return "no such weight"
    weight = weights[name]
    is_plain = isinstance(weight, Tensor) and weight.layout == torch.strided and not weight.is_meta
    return str(list(weight.shape)) if is_plain else "no plain tensor"
