import copy
import io
import os
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from dataclasses import asdict

from common.cli import MAX_EPOCHS, PROJECT, UserError
from common.data import open_data, to_float
from common.metrics import evaluate
from common.model import (
    COURSE_RANGE,
    MAX_FILE_SIZE,
    NETWORKS,
    Normalize,
    autocast,
    build_model,
    choose_device,
    describe_checkpoint,
    load_checkpoint,
    predict_logits,
    save_checkpoint,
    with_pixel_range,
)
from common.recipes import BEST, PRE_TRAINED, RECIPES
from data.pickles import read_torch_file

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COURSE_DATA, make_dataset, needs_course_data
from torch import nn

IMAGES = make_dataset(counts=(4, 2, 2)).images


class CourseScript(nn.Module):
    """The network as a student's own script has it: no normalization, pixels in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(16, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = self.dropout(F.relu(self.fc1(x)))
        x = self.dropout(F.relu(self.fc2(x)))
        return self.fc3(x)


def new_model(*arguments, **settings):
    torch.manual_seed(0)
    return build_model(*arguments, **settings).eval()


# ---- networks -------------------------------------------------------------------------------


def test_weights_load_in_the_courses_script_and_give_the_same_logits_on_its_pixels(tmp_path):
    model = new_model()
    save_checkpoint(tmp_path / "ours.ckpt", model, {})
    script = CourseScript().eval()
    content = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    script.load_state_dict(content["model_state_dict"])
    assert sum(weight.numel() for weight in model.parameters()) == 66_171
    pixels = to_float(IMAGES)
    assert torch.allclose(model(pixels), script(2 * pixels - 1), atol=1e-5)


def test_dropout_acts_in_training_as_in_the_courses_script():
    model, script = new_model().train(), CourseScript().train()
    script.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    logits = model(to_float(IMAGES))
    torch.manual_seed(1)
    assert torch.allclose(logits, script(2 * to_float(IMAGES) - 1), atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-0.5, 3.0)])
def test_normalize_maps_0_and_1_to_the_range(low, high):
    pixels = torch.tensor([0.0, 1.0, 0.25])
    expected = [low, high, low + 0.25 * (high - low)]
    assert Normalize(low, high)(pixels).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_network_learns_in_every_weight_and_does_not_mix_images(network):
    model = new_model(network)
    logits = model(to_float(IMAGES))
    assert logits.shape == (8, 3)
    assert torch.allclose(model(to_float(IMAGES[3:4])), logits[3:4], atol=1e-5)
    logits.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_small_vgg_is_small():
    assert 250_000 < sum(w.numel() for w in build_model("SmallVGG").parameters()) < 350_000


def test_with_pixel_range_feeds_a_copy_other_pixels():
    model = new_model()
    other, pixels = with_pixel_range(model, (0.0, 1.0)), to_float(IMAGES)
    assert torch.allclose(other(pixels), model((pixels + 1) / 2), atol=1e-6)
    assert (model.pixel_range, other.pixel_range) == ((-1, 1), (0, 1))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 3])
def test_test_time_augmentation_is_the_mean_over_shifted_and_mirrored_views(network, flip, shift):
    model = new_model(network, tta_flip=flip, tta_shift=shift)
    plain = new_model(network)
    plain.load_state_dict(model.state_dict())
    pixels = torch.rand(4, 3, 32, 32)
    views = [pixels]
    for rows, columns in ((-shift, 0), (shift, 0), (0, -shift), (0, shift)) if shift else ():
        place = [abs(i) if i < 32 else 62 - i for i in range(-shift, 32 + shift)]  # reflected
        moved = pixels[:, :, place[shift + rows : shift + rows + 32]]
        views.append(moved[:, :, :, place[shift + columns : shift + columns + 32]])
    if flip:
        views += [view.flip(-1) for view in views]
    expected = torch.stack([plain(view) for view in views]).mean(dim=0)
    assert torch.allclose(model(pixels), expected, atol=1e-5)
    assert torch.equal(model.single_view(pixels), plain(pixels))
    assert torch.equal(predict_logits(model, pixels, tta=False), plain(pixels).detach())
    if network == "SmallVGG":  # it has no dropout: in training mode it sees the image alone
        assert torch.equal(model.train()(pixels), plain.train()(pixels))


def test_weights_are_channels_last_but_not_on_a_mac(monkeypatch):
    for is_mac in (False, True):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda is_mac=is_mac: is_mac)
        weight = build_model("SmallVGG").stages[0][0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) != is_mac


# ---- prediction -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_prediction_is_in_eval_mode_and_leaves_the_model_as_it_is(training, network):
    model = new_model(network)
    with torch.no_grad():
        expected = model(to_float(IMAGES))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits = predict_logits(model.train(training), IMAGES)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert not logits.requires_grad
    assert model.training is training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_prediction_is_the_same_for_uint8_for_float_and_in_other_batches(monkeypatch):
    model = new_model()
    logits = predict_logits(model, IMAGES)
    assert torch.equal(predict_logits(model, to_float(IMAGES)), logits)
    monkeypatch.setattr("common.model.PREDICTION_BATCH", 3)
    assert torch.allclose(predict_logits(model, IMAGES), logits, atol=1e-6)


def test_device_that_is_not_there_is_named():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device abacus: not on this machine, which has cpu"):
        choose_device("abacus")


@pytest.mark.parametrize(
    ("cuda", "mps", "kind"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_prefers_cuda_then_mps_then_the_cpu(cuda, mps, kind, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert choose_device("auto") == torch.device(kind)


# ---- checkpoints that are taken -------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_a_checkpoint_rebuilds_its_model_alone(network, tmp_path):
    model = new_model(network, (0.0, 1.0), tta_flip=True, tta_shift=2)
    model.train()(torch.rand(8, 3, 32, 32))  # moves the statistics of batch norm
    metadata = {
        "recipe": asdict(BEST),
        "seed": 7,
        "trained_on": {"name": "synthetic", "class_counts": {"car": 40}},
    }
    training = {"history": [{"loss": 1.0}], "logits": torch.rand(2, 3)}
    save_checkpoint(tmp_path / "it.ckpt", model, metadata, training)
    found = load_checkpoint(tmp_path / "it.ckpt")
    loaded, loaded_training = found.model, found.training
    assert type(loaded).__name__ == network
    assert (loaded.pixel_range, loaded.tta_flip, loaded.tta_shift) == ((0, 1), True, 2)
    assert torch.equal(predict_logits(loaded, IMAGES), predict_logits(model, IMAGES))
    assert not loaded.training
    assert found.metadata == metadata
    assert torch.equal(loaded_training.pop("logits"), training.pop("logits"))
    assert loaded_training == training
    assert not found.bare and not found.assumed_range
    expected = "recipe best, 30 epochs, seed 7, trained on synthetic"
    assert describe_checkpoint(found.metadata) == expected
    once = metadata | {"recipe": asdict(PRE_TRAINED)}
    assert describe_checkpoint(once) == "recipe pre_trained, 1 epoch, seed 7, trained on synthetic"


def test_a_bare_checkpoint_is_read_in_the_range_that_it_is_said_to_have(tmp_path):
    model, path = new_model(), tmp_path / "bare.ckpt"
    torch.save({"model_state_dict": model.state_dict()}, path)
    for pixel_range in (None, (-1.0, 1.0), (0.0, 1.0)):
        found = load_checkpoint(path, pixel_range)
        expected = with_pixel_range(model, pixel_range or COURSE_RANGE)
        assert torch.equal(predict_logits(found.model, IMAGES), predict_logits(expected, IMAGES))
        assert (found.metadata, found.training, found.bare) == ({}, {}, True)
        assert found.assumed_range == (pixel_range is None)


def test_a_run_of_the_most_epochs_can_be_loaded(tmp_path):
    recalls = [0.1, 0.2, 0.3]
    epoch = {"loss": 0.5, "seconds": 0.25, "accuracy": 0.75, "balanced_accuracy": 0.2}
    epoch |= {"g_mean": 0.6, "recall": recalls, "precision": recalls}
    history = [{key: copy.copy(value) for key, value in epoch.items()} for _ in range(MAX_EPOCHS)]
    save_checkpoint(tmp_path / "it.ckpt", new_model("SmallVGG"), {}, {"history": history})
    assert load_checkpoint(tmp_path / "it.ckpt").training["history"] == history


@pytest.mark.parametrize("metadata", [{}, {"recipe": {}}, {"trained_on": {}}, {"recipe": "best"}])
def test_training_that_a_checkpoint_does_not_state_is_unknown(metadata):
    assert describe_checkpoint(metadata) == "of unknown training"


def test_a_range_for_a_checkpoint_that_has_its_own_is_refused(tmp_path):
    save_checkpoint(tmp_path / "it.ckpt", new_model(), {})
    with pytest.raises(UserError, match="its own pixel range, -1,1; omit --pixel-range"):
        load_checkpoint(tmp_path / "it.ckpt", (-1.0, 1.0))
    found = load_checkpoint(tmp_path / "it.ckpt", (0.0, 1.0), strict_range=False)
    assert found.model.pixel_range == (-1.0, 1.0)


def prefixed(prefix):
    return {prefix + name: weight for name, weight in new_model().state_dict().items()}


@pytest.mark.parametrize(
    "content",
    [
        prefixed(""),
        OrderedDict(prefixed("")),
        prefixed("module."),
        {"model_state_dict": prefixed("_orig_mod.")},
        {"model_state_dict": prefixed("module._orig_mod.")},
        {"model_state_dict": prefixed("_orig_mod.module.")},
        {"state_dict": prefixed("model."), "epoch": 3, "pytorch-lightning_version": "2.0"},
        {"state_dict": prefixed("net."), "hyper_parameters": {"lr": 0.1}},
        {"net": prefixed("module."), "acc": 95.0, "epoch": 199},
        {"state_dict": prefixed("module.") | {"n_averaged": torch.tensor(3)}},
        {"model": prefixed(""), "optimizer": {"state": {}}, "loss": 0.1, "best": None},
        {"model_state_dict": {name: w.double() for name, w in prefixed("").items()}},
        {"model_state_dict": {name: nn.Parameter(w) for name, w in prefixed("").items()}},
        {"model_state_dict": prefixed(""), "pixel_range": [-1, 1]},
        {"model_state_dict": prefixed(""), "pixel_range": (-1.0, 1)},
    ],
    ids=range(15),
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_common_tools_write_is_taken(content, zipped):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint(file.getvalue()).model
    assert loaded.pixel_range == (-1, 1)
    assert torch.equal(predict_logits(loaded, IMAGES), predict_logits(new_model(), IMAGES))


@needs_course_data
def test_the_reports_model_gives_the_reports_two_rows():
    dev = open_data(str(COURSE_DATA)).load("dev")
    expected = {(0.0, 1.0): (0.891, 0.779, 0.773), (-1.0, 1.0): (0.872, 0.609, 0.526)}
    for pixel_range, row in expected.items():
        model = load_checkpoint(COURSE_DATA / "seed-model.ckpt", pixel_range).model
        scores = evaluate(dev.labels, predict_logits(model, dev.images).argmax(dim=1))
        ours = (scores["accuracy"], scores["balanced_accuracy"], scores["g_mean"])
        assert ours == pytest.approx(row, abs=0.0005)


def test_a_description_is_one_short_line_whatever_the_metadata_holds():
    metadata = {
        "recipe": {"name": "final\nerror: all is lost", "epochs": [["x" * 900] * 9] * 9},
        "trained_on": {"name": {"a": None}},
    }
    text = describe_checkpoint(metadata)
    assert text.startswith("recipe final error: all is lost, [['xxx")
    assert text.endswith("seed None, trained on {'a': None}")
    assert len(text) < 300


# ---- checkpoints that are refused -----------------------------------------------------------


def refusal_of(content, path):
    """Save content, load it as a checkpoint, and return the message, which must be one line."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as refusal:
        load_checkpoint(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200
    assert "weights_only" not in message
    return message.removeprefix(f"{path}: ")


def with_weight(name, weight):
    return {"model_state_dict": new_model().state_dict() | {name: weight}}


def without(name):
    return {key: weight for key, weight in new_model().state_dict().items() if key != name}


PLAIN = "not a plain tensor of numbers"
TYPE = "holds tensors of type "
NOT_FINITE = "has weights that are NaN or infinite"


@pytest.mark.filterwarnings("ignore")  # sparse, nested and quantized tensors may change
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: with_weight("conv1.weight", torch.zeros(8, 3, 5, 5)),
            "'conv1.weight': [8, 3, 5, 5] here, [16, 3, 5, 5] in CourseNet",
        ),
        (lambda: without("fc3.bias"), "'fc3.bias': missing here, [3] in CourseNet"),
        (lambda: with_weight("extra", torch.zeros(1)), "'extra': [1] here, missing in CourseNet"),
        (lambda: with_weight("fc3.bias", "text"), PLAIN),
        (lambda: with_weight("fc3.bias", [0.0, 0.0, 0.0]), PLAIN),
        (lambda: with_weight("fc3.bias", torch.tensor([0.0, torch.nan, 0.0])), NOT_FINITE),
        (lambda: with_weight("fc3.bias", torch.tensor([0.0, torch.inf, 0.0])), NOT_FINITE),
        (lambda: with_weight("fc3.bias", torch.full((3,), 1e300, dtype=torch.double)), NOT_FINITE),
        (lambda: with_weight("fc3.bias", torch.zeros(3, device="meta")), PLAIN),
        (lambda: with_weight("fc3.bias", torch.ones(3).to_sparse()), PLAIN),
        (lambda: with_weight("fc3.weight", torch.ones(3, 84).to_sparse_csr()), PLAIN),
        (lambda: with_weight("fc3.bias", torch.zeros(3).to(torch.float8_e4m3fn)), TYPE),
        (lambda: with_weight("fc3.bias", torch.zeros(3, dtype=torch.complex64)), TYPE),
        (lambda: with_weight("fc3.bias", torch.nested.nested_tensor([torch.zeros(3)])), ""),
        (
            lambda: with_weight(
                "fc3.bias", torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
            ),
            "",
        ),
        (
            lambda: with_weight("fc3.bias", torch.zeros(1).expand([6] * 12)),
            "here, [3] in CourseNet",
        ),
        (lambda: with_weight(3, torch.zeros(1)), "weight 3: [1] here"),
        (lambda: with_weight("\x1b[31m" * 10**6, torch.zeros(1)), "neither short text nor"),
        (lambda: with_weight("\x1b[31m" * 10**4, torch.zeros(1)), "missing in CourseNet"),
        (lambda: {"model_state_dict": {}}, "holds no weights"),
        (lambda: {"model_state_dict": 3}, "holds no weights"),
        (lambda: {}, "holds no weights"),
        (lambda: [1, 2], "holds no dict of weights"),
        (lambda: torch.zeros(3), "holds no dict of weights"),
        (
            lambda: {"network": "SmallVGG", **with_weight("x", None)},
            "here, [16, 3, 2, 2] in SmallVGG",
        ),
    ],
    ids=range(25),
)
def test_weights_that_do_not_fit_are_named(make, message, tmp_path):
    refusal = refusal_of(make(), tmp_path / "it.ckpt")
    assert message in refusal  # of huge weights, pytest would print each number


def deep_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def wide_list(depth):
    """Return lists in lists: a small file of the same list again and again, of 190**depth items."""
    value = [0] * 190
    for _ in range(depth - 1):
        value = [value] * 190
    return value


def endless_list():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("network", "ResNet50", "network is 'ResNet50'; it must be CourseNet or SmallVGG"),
        ("network", "\x1b]0;" + "x" * 3_000_000, "it must be CourseNet or SmallVGG"),
        ("network", ["CourseNet"], "network is of type list"),
        ("network", 10**500, "network is a very large int"),
        ("pixel_range", None, "must be two numbers"),
        ("pixel_range", "01", "must be two numbers"),
        ("pixel_range", (0.0, 0.5, 1.0), "must be two numbers"),
        ("pixel_range", (0.0, float("nan")), "must be two numbers"),
        ("pixel_range", (False, True), "must be two numbers"),
        ("pixel_range", (0, 10**400), "must be two numbers"),
        ("pixel_range", torch.zeros(1).expand([6] * 12), "must be two numbers"),
        ("tta_shift", True, "tta_shift is True; it must be a whole number from 0 to 8"),
        ("tta_shift", 10**18, "tta_shift is a very large int"),
        ("tta_shift", -1, "tta_shift is -1"),
        ("tta_shift", 9, "tta_shift is 9"),
        ("tta_shift", 2.0, "tta_shift is 2.0"),
        ("tta_shift", "2", "tta_shift is '2'"),
        ("metadata", 3, "metadata must be"),
        ("metadata", {"recipe": {"name": torch.zeros(3)}}, "metadata must be"),
        ("metadata", {"name": "x" * 3_000_000}, "metadata must be"),
        ("metadata", {"name": "\ud800"}, "metadata must be"),
        ("metadata", {"\ud800": 1}, "metadata must be"),
        ("metadata", {"seed": 10**500}, "metadata must be"),
        (
            "metadata",
            {("a", "b"): 1},
            "has dict keys that are neither short text nor small numbers",
        ),
        ("metadata", {"list": [0] * 10_000}, "metadata must be"),
        ("metadata", {"list": deep_list(300)}, "metadata must be"),
        ("metadata", {"list": wide_list(4)}, "metadata must be"),
        ("metadata", {"list": endless_list()}, "metadata must be"),
    ],
    ids=range(28),
)
def test_spoiled_fields_are_named(field, value, message, tmp_path):
    content = {"model_state_dict": new_model().state_dict(), field: value}
    assert message in refusal_of(content, tmp_path / "it.ckpt")


class Intruder:
    """A pickle of it makes a folder when it is loaded without care."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def saved(content, **settings):
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def compressed(raw, suffix="", compression=zipfile.ZIP_DEFLATED):
    """Return the same zip file with its members, or those with this suffix, compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            kind = compression if name.endswith(suffix) else zipfile.ZIP_STORED
            target.writestr(name, source.read(name), kind)
    return file.getvalue()


def test_what_is_not_a_safe_whole_file_of_torch_save_is_refused(tmp_path):
    path, folder = tmp_path / "it.ckpt", tmp_path / "broken-into"
    whole = saved({"model_state_dict": new_model().state_dict()})
    bomb = compressed(saved({"model_state_dict": {"x": torch.zeros(10_000_000)}}))
    assert len(bomb) < 100_000
    files = [
        b"",
        b"just some text\n",
        b"PK\x03\x04 cut short",
        whole[: len(whole) // 2],
        whole[:-30],
        bomb,
        pickle.dumps({"model_state_dict": {"fc3.bias": [0.0]}}, protocol=4)[:20],
        b"\x80\x02" + b"]" + b"r" + struct.pack("<I", 2**27) + b".",
    ]
    for content in files:
        assert refusal_of(content, path) == "not a file of torch.save, or cut short"
    intruder = {"model_state_dict": Intruder(folder)}
    files = [pickle.dumps(intruder), old_format(pickle.dumps(intruder, protocol=4))]
    files += [saved(intruder, _use_new_zipfile_serialization=zipped) for zipped in (True, False)]
    expected = "mkdir', which is refused; save only the state_dict()"
    for content in files:
        assert refusal_of(content, path).endswith(
            (expected, "not a file of torch.save, or cut short")
        )
    assert expected in refusal_of(files[-1], path)
    assert not folder.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_beside_the_weights_is_named(tmp_path, zipped):
    raw = saved({"net": prefixed(""), "x": np.zeros(3)}, _use_new_zipfile_serialization=zipped)
    assert "holds NumPy values other than plain numbers" in refusal_of(raw, tmp_path / "x")
    assert "asks for 'common.model.CourseNet'" in refusal_of(new_model(), tmp_path / "x")


def with_pickle(opcodes, others=None):
    """Return a file of torch.save with another pickle in it, and other files."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({}))) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            whole = b"\x80\x02" + opcodes + b"."
            target.writestr(name, whole if name.endswith("data.pkl") else source.read(name))
        for name, content in (others or {}).items():
            target.writestr(name, content)
    return file.getvalue()


def old_format(content):
    """Return a file of torch.save's old format with a pickle in it that has no tensors."""
    empty = b"\x80\x02}q\x00."
    whole = saved({}, _use_new_zipfile_serialization=False)
    assert whole.count(empty) == 1
    return whole.replace(empty, content)


ZEROS = b"cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**20) + b"\x85R"  # 2**31 would do, too
GREEDY = {
    "bytearray": ZEROS,
    "Size of a bytearray": b"ctorch\nSize\n" + ZEROS + b"\x85R",
    "set of a bytearray": b"c__builtin__\nset\n" + ZEROS + b"\x85R",
    "Tensor": b"ctorch\nTensor\nK\3\x85R",
    "FloatTensor": b"ctorch\nFloatTensor\nK\3\x85R",
    "new object": b"ctorch\nTensor\nK\3\x85\x81",
    "by reference": b"(cbuiltins\nbytearray\nq\0K\3\x85q\1h\0h\1Rt",
    "encoded": b"c_codecs\nencode\nX\1\0\0\0xX\5\0\0\0utf-8\x86R",
    "dict of a tensor": b"ccollections\nOrderedDict\nctorch\ndevice\n)R\x85R",
    "Counter of a tensor": b"ccollections\nCounter\nctorch\ndevice\n)R\x85R",
    "state that is a tensor": b"ccollections\nOrderedDict\n)Rctorch\ndevice\n)Rb",
    "tensor as a list": b"ctorch\nSize\nctorch\ndevice\n)RNa\x85R",
    "tensor as a dict": b"ctorch\nSize\nctorch\ndevice\n)R(NNu\x85R",
    "many lists": b"(" + b"]" * 200_000 + b"t",
}


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_ask_for_more_than_they_hold_are_refused(name, zipped, tmp_path):
    whole = b"\x80\x02" + GREEDY[name] + b"."
    refusal = refusal_of(with_pickle(GREEDY[name]) if zipped else old_format(whole), tmp_path / "x")
    assert refusal.startswith(("not a file of torch.save", "asks for ", "has "))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (-1, (1,), (1,)),
        (3, (4,), (-1,)),
        (0, (-2, -2), (1, 1)),
        (0, (2**32, 2**32), (0, 0)),
        (0, (2,), (1, 1)),
        (0, (2.0,), (1,)),
    ],
)
def test_tensors_that_reach_beyond_their_storage_are_refused(offset, size, stride, tmp_path):
    def tensor(*place):
        place = b"".join(pickle.dumps(part, protocol=2)[2:-1] for part in place)
        storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0aX\3\0\0\0cpuK\4tQ"
        hooks = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + b"\x89" + hooks + b"tR"

    content = with_pickle(tensor(0, (4,), (1,)), {"archive/data/a": bytes(16)})
    assert refusal_of(content, tmp_path / "x").startswith("holds no dict of weights")
    content = with_pickle(tensor(offset, size, stride), {"archive/data/a": bytes(16)})
    assert refusal_of(content, tmp_path / "x") == "not a file of torch.save, or cut short"


def with_compressed_pickle(compression):
    """Return a checkpoint, otherwise good, whose small pickle is compressed."""
    return compressed(
        saved({"model_state_dict": new_model().state_dict()}), "data.pkl", compression
    )


GREEDY_FILES = {
    "deflate": with_compressed_pickle(zipfile.ZIP_DEFLATED),
    "bzip2": with_compressed_pickle(zipfile.ZIP_BZIP2),
    "large memo keys": with_pickle(b"}p%d\n" % 2**61),
    "negative memo keys": with_pickle(b"}p-1\n"),
    "a name of many words": with_pickle(b"cab" + b" ab" * 10**6 + b"\nx\n)R"),
    "many members": with_pickle(b"}", {f"archive/{n}": b"" for n in range(10_001)}),
}


@pytest.mark.parametrize("name", GREEDY_FILES)
def test_files_that_would_take_much_time_or_memory_are_refused(name, tmp_path):
    refusal = refusal_of(GREEDY_FILES[name], tmp_path / "x")
    assert refusal.startswith(("not a file of torch.save, or cut short", "asks for"))


def test_a_storage_that_is_used_often_is_read_once():
    base = torch.zeros(1000)
    parts = read_torch_file(saved([base[n:] for n in range(100)]))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_tuples_of_tuples_of_tuples_take_no_time(tmp_path):
    """40 levels, each of the one below twice: to hash, compare or print it takes forever."""
    huge = b")" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(40))
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\n" + huge + b"X\3\0\0\0cpuK\4tQ"
    named = storage.replace(b"ctorch\nFloatStorage\n" + huge, huge + b"X\1\0\0\0a")
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    keyed = storage.replace(huge, b"X\1\0\0\0a")
    view = rebuild + b"(" + keyed + b"K\0" + huge + b")\x89}tR"
    for opcodes in (
        b"}" + huge + b"Ns",
        storage,
        named,
        view,
        huge + b")R",
        b"}X\1\0\0\0x" + huge + b"s",
    ):
        for content in (
            with_pickle(opcodes, {"archive/data/a": bytes(16)}),
            old_format(b"\x80\x02" + opcodes + b"."),
        ):
            assert refusal_of(content, tmp_path / "x")
    keys = old_format(b"\x80\x02}.").replace(b"\x80\x02]q\x00.", b"\x80\x02]" + huge + b"a.")
    assert huge in keys
    assert refusal_of(keys, tmp_path / "x")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_read_as_torch_reads_them(protocol, zipped):
    types = (
        torch.float,
        torch.double,
        torch.half,
        torch.bfloat16,
        torch.long,
        torch.int,
        torch.bool,
    )
    base = torch.arange(24.0)
    model = new_model()
    optimizer = torch.optim.Adam(model.parameters())
    model(IMAGES).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "types": [torch.ones(3, 2).to(dtype) for dtype in types],
        "views": [base[3:9], base.view(4, 6).T, base.view(2, 3, 4)[:, 1:, ::2], torch.tensor(1.5)],
        "empty": [torch.empty(0), torch.empty(0, 3), torch.empty(3, 0), base[::2][:0]],
        "expanded": torch.zeros(1).expand(3, 2),
        "parameter": nn.Parameter(torch.ones(2)),
        "plain": (None, True, -1, 2**40, 0.5, "text", [], {}, (1, [2, {"a": 3}])),
    }
    raw = saved(content, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    ours, theirs = read_torch_file(raw), torch.load(io.BytesIO(raw), weights_only=False)
    assert_same(ours, theirs, {})


def assert_same(ours, theirs, shared):
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)
        shared.setdefault(theirs.untyped_storage().data_ptr(), ours.untyped_storage().data_ptr())
        if theirs.untyped_storage().nbytes():
            known = shared[theirs.untyped_storage().data_ptr()]
            assert known == ours.untyped_storage().data_ptr()
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        assert_same(list(ours.values()), list(theirs.values()), shared)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for own, their in zip(ours, theirs, strict=True):
            assert_same(own, their, shared)
    else:
        assert (type(ours), ours) == (type(theirs), theirs)


def test_a_weight_that_is_none_is_refused(tmp_path):
    weights = {**build_model().state_dict(), "scheduler": None}
    refusal = refusal_of(saved(weights), tmp_path / "x")
    assert "'scheduler': not a plain tensor of numbers here, missing in CourseNet" in refusal


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("native", [False, True])
def test_autocast_is_not_used_on_gpus_that_only_emulate_bfloat16(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    context = autocast(torch.device("cuda"))
    assert isinstance(context, torch.autocast) == native


@pytest.mark.parametrize(
    ("device", "capabilities", "faster"),
    [
        ("cpu", {"avx2": True, "avx512_bf16": False}, False),
        ("cpu", {"avx512_bf16": True}, True),
        ("cpu", {"amx_bf16": True}, True),
        ("mps", {"amx_bf16": True}, False),
    ],
)
def test_autocast_is_used_on_cpus_with_bfloat16_instructions(
    device, capabilities, faster, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    context = autocast(torch.device(device))
    assert isinstance(context, torch.autocast) == faster


# ---- the shipped checkpoints ----------------------------------------------------------------

SHIPPED = ("pre_trained", "tuned", "best", "robust")
MAX_SHIPPED_SIZE = 4_000_000  # bytes


def shipped(name):
    return PROJECT / "models" / f"{name}.ckpt"


def is_unchanged(stored, current):
    """Return whether each stored setting has its value still; newer settings may be missing."""
    if isinstance(stored, dict) and isinstance(current, dict):
        return all(is_unchanged(stored[key], current[key]) for key in stored)
    return stored == current


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_checkpoint_is_of_its_recipe_as_it_stands(name):
    found, recipe = load_checkpoint(shipped(name)), RECIPES[name]
    assert is_unchanged(found.metadata["recipe"], asdict(recipe))
    assert type(found.model) is NETWORKS[recipe.network]
    assert (found.model.tta_flip, found.model.tta_shift) == (recipe.tta_flip, recipe.tta_shift)
    assert found.metadata["seed"] == 0
    assert shipped(name).stat().st_size < MAX_SHIPPED_SIZE


@needs_course_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "low", "high"), [("pre_trained", 0, 0), ("tuned", 0.8, 1), ("best", 0.9, 1)]
)
def test_shipped_checkpoint_recognizes_the_courses_images(name, low, high):
    dev = open_data(str(COURSE_DATA)).load("dev")
    model = load_checkpoint(shipped(name)).model
    predicted = predict_logits(model, dev.images).argmax(dim=1)
    assert low <= evaluate(dev.labels, predicted)["g_mean"] <= high


def test_what_training_leaves_beside_the_weights_is_taken():
    content = {"state_dict": prefixed(""), "milestones": Counter({3: 1}), "size": torch.Size([3])}
    content |= {"classes": {1, 2}, "device": torch.device("cpu"), "names": {"a": (1, ["b"])}}
    content |= {
        "best": np.bool_(True),
        "accuracy": np.float64(0.5),
        "epoch": np.int64(3),
        "hash": b"x",
        "type": torch.half,
    }
    assert load_checkpoint(saved(content)).metadata == {}


def test_files_that_can_not_be_read_are_named(tmp_path):
    for path, reason in ((tmp_path / "missing", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"^{path}: {reason}"):
            load_checkpoint(path)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_FILE_SIZE + 1)
    with pytest.raises(UserError, match="large: is larger than 64 MB"):
        load_checkpoint(tmp_path / "large")
    with pytest.raises(UserError, match=r"^a.zip/it.ckpt: not a file of torch.save, or cut short"):
        load_checkpoint(b"text", name="a.zip/it.ckpt")
