"""Tests: formulas against plain loops, files made by hand, every script from end to end.

    python -m pytest -q test_smoke.py        about 90 seconds on 2 CPU cores; no network needed

Contents: helpers · IntraDA's formulas · evaluation · BCL's formulas · network · weight files ·
          labels and images · dataset layouts · readers · the training loops · IntraDA's stages ·
          BCL's rounds · resume · processes and precision · pictures · mistakes of users ·
          eval.py · tools · demo and house
"""

import collections
import contextlib
import copy
import csv
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from itertools import product
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the scripts' processes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from pytest import approx
from torch.testing import assert_close

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import bcl
import common
import eval as eval_script
import intrada
from common import CLASSES, UserError
from demo import scenes as demo

# ====================================================================== helpers

NETWORK = {"layers": (1, 1, 1, 1), "width": 4}
CPU = "--device cpu --workers 0"
PLACES = "--data-root scenes --out run"  # of training
SHARED = (
    f"{PLACES} {CPU} --layers 1,1,1,1 --width 4 --init none --target-size 64x64 --batch-size 2"
    " --log-every 1 --save-every 2"
)
INTRADA = f"{SHARED} --source-size 64x64 --max-iters 6 --stop-iters 4 --eval-every 3"
BCL = (
    f"{SHARED} --crop 64 --short-side 64 --warmup-crop 64 --warmup-short-side 64 --scales 1.0,1.5"
    " --warmup-iters 2 --rounds 2 --round-iters 3 --eval-every 0 --tau 0.5 --momentum 0.9"
)
FLAGS = {intrada: INTRADA, bcl: BCL}
BOTH = pytest.mark.parametrize("module", [intrada, bcl])


def words(flags):
    """Of a command line: a string is split at its spaces, a path or a number is one word."""
    found = []
    for flag in flags:
        found += flag.split() if isinstance(flag, str) else [str(flag)]
    return found


def process(*command):
    """A Python command in a process of its own, as a user starts it."""
    command = [sys.executable, *words(command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def call(module, *flags):
    """A script's main in this process, which saves importing torch again: (exit status, stdout,
    stderr)."""
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    common.resume_hint = ""  # as in a new process
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *words(flags)]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                common.launch(module.main)
            except SystemExit as stop:
                status = stop.code
    return status, out.getvalue(), err.getvalue()


def succeed(module, *flags):
    """What a script prints that has to end well."""
    status, out, err = call(module, *flags)
    assert status == 0, err
    return out


def refuses(culprit, module, *flags):
    """Exit status 2 and one sentence that names the culprit; argparse puts its usage above it."""
    status, _, err = call(module, *flags)
    *usage, sentence = err.splitlines() or [""]
    assert status == 2 and culprit in sentence and "error: " in sentence, (status, err)
    assert not usage or (len(usage) == 1 and usage[0].startswith("usage: ")), err


def refused(culprit, function, *inputs):
    """A call must end in a UserError of one line that matches the regex `culprit`."""
    with pytest.raises(UserError, match=culprit) as caught:
        function(*inputs)
    assert "\n" not in str(caught.value)


def forked(function):
    """A child process that ends with the status that the function returns."""
    child = os.fork()
    if child == 0:
        status = 99
        with contextlib.suppress(BaseException):
            status = function()
        os._exit(status)
    return child


def exit_status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(owner, name, count, module, *flags):
    """Run a script in a child process, and end it by kill -9 at the count-th call of a function."""
    real = getattr(owner, name)
    calls = itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, counted):
        child = forked(lambda: call(module, *flags)[0])
    assert exit_status(child) == -signal.SIGKILL, (name, count)


def last(folder, name="last.pth"):
    return torch.load(Path(folder) / name, weights_only=True)


def records(folder, event=None):
    """Records of a log: of losses, or of an event ("start", "evaluation")."""
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record.get("event") == event]


def terms(folder):
    """The losses of every record."""
    return [[v for k, v in r.items() if k.startswith("loss")] for r in records(folder)]


def same(a, b):
    """Whether two nested contents of checkpoints are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def files_of(folder):
    """Names of all files below a folder but the lock."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix() for path in paths}


def assert_same_run(found, whole):
    """Two output folders have the same files to the last bit. Logs may differ in times, and in how
    often the run was started."""
    assert files_of(found) == files_of(whole)
    timed = ("seconds", "data_seconds", "it_per_s", "peak_memory_mb")
    for name in files_of(whole):
        contents = []
        for path in (Path(found, name), Path(whole, name)):
            if path.suffix == ".pth":
                content = last(path.parent, path.name)
            elif path.name == "log.jsonl":
                lines = records(path.parent) + records(path.parent, "evaluation")
                content = [{k: v for k, v in line.items() if k not in timed} for line in lines]
            else:
                content = path.read_bytes()
            contents.append(content)
        assert same(*contents), name


def draw(path, value=None, size=(8, 6)):
    """An image file: coloured noise, or grey of one value everywhere."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if value is not None:
        pixels = np.full((size[1], size[0]), value, np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def stripes(path, ids, size=(64, 64)):
    """A label file whose columns have these ids in turn."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.resize(np.array(ids, np.uint8), size[0])
    Image.fromarray(np.tile(columns, (size[1], 1))).save(path)
    return path


def read(path):
    return np.asarray(Image.open(path))


def bigger(logits, size=(64, 64)):
    """Plain upsampling of (B,C,h,w) to size (W,H)."""
    return F.interpolate(logits, size[::-1], mode="bilinear", align_corners=True)


def read_rgb(path, size=(64, 64)):
    """An image file, resized: (1,3,H,W) uint8."""
    pixels = np.array(Image.open(path).convert("RGB").resize(size, Image.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def plain_logits(network, path, input_size=(64, 64), size=(64, 64)):
    """Logits (C,H,W) of an image file, step by step."""
    with torch.no_grad():
        return bigger(network(common.normalize(read_rgb(path, input_size))).main, size)[0]


def plain_entropy(logits):
    """(H,W) in 0..1 of logits (C,H,W)."""
    p = logits.double().softmax(0)
    return (-(p * p.log()).sum(0) / math.log(len(p))).numpy()


def noisy_network(seed=0, classes=19):
    """Random weights, BatchNorm statistics that are not the initial ones, logits of about 3."""
    torch.manual_seed(seed)
    network = common.DeepLabV2(classes, **NETWORK).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
    with torch.no_grad():
        logits = network(common.normalize(torch.randint(0, 256, (1, 3, 64, 64)))).main
    for conv in network.layer6.conv2d_list:
        conv.weight.data.mul_(3 / logits.std())
    return network


@pytest.fixture(scope="session")
def drawn_once(tmp_path_factory):
    """Data root of small scenes: GTA5, SYNTHIA, Synscapes (8 each), Cityscapes (10 and 5)."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    demo.write_scenes(root, 0, (64, 64), (64, 64), 8, 10, 5, synthia=True, synscapes=True)
    return root


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(drawn_once, tmp_path, monkeypatch):
    """Each test runs in an empty folder beside a link to the data: `scenes`."""
    monkeypatch.chdir(tmp_path)
    Path("scenes").symlink_to(drawn_once)
    torch.manual_seed(0)


@pytest.fixture
def broken():
    """A copy of the scenes for a test to damage."""
    return shutil.copytree("scenes", Path("broken"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(module) -> output folder of the whole script, run once."""

    @functools.cache
    def train(module):
        out = tmp_path_factory.mktemp("trained") / "run"
        assert "mIoU 19" in succeed(module, FLAGS[module], "--out", out)
        return out

    return train


# ====================================================================== IntraDA's formulas


def test_entropy_and_segmentation_loss():
    logits = 4 * torch.randn(2, 5, 3, 4, dtype=torch.float64)
    logits[0, :, 0, 0] = torch.tensor([1000.0, 0, 0, 0, -1000])  # certain
    logits[1, :, 0, 0] = 7  # uniform
    labels = torch.randint(0, 5, (2, 3, 4))
    labels[0] = 255
    labels[0, 2, 2] = 3  # the mean is over pixels: image 0 weighs less
    expected = torch.zeros_like(logits)
    parts = []
    for b, h, w in product(range(2), range(3), range(4)):
        p = logits[b, :, h, w].softmax(0).tolist()
        information = [-x * math.log(x or 1) / math.log(5) for x in p]
        expected[b, :, h, w] = torch.tensor(information, dtype=torch.float64)
        if labels[b, h, w] != 255:
            parts.append(-math.log(p[labels[b, h, w]]))
    logits.requires_grad_()
    maps = intrada.self_information(logits)
    assert (maps - expected).abs().max() < 1e-12 and maps[1, :, 0, 0].sum().item() == approx(1)
    entropy = bcl.pixel_entropy(logits)
    assert (entropy - expected.sum(1)).abs().max() < 1e-12
    (maps.sum() + entropy.sum()).backward()
    assert logits.grad.isfinite().all()
    for module in (intrada, bcl):
        loss = module.segmentation_loss(logits, labels)
        assert loss.item() == approx(sum(parts) / len(parts), rel=1e-12)
        logits.grad = None
        nothing = module.segmentation_loss(logits, torch.full_like(labels, 255))
        nothing.backward()
        assert nothing.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("column", ["entropy", "normalized_entropy"])
def test_split_for_every_ratio(column):
    values = np.random.default_rng(0).integers(0, 1500, (2975, 2)).tolist()  # with ties
    rows = []
    for i, (entropy, normalized) in enumerate(values):
        rows.append({"name": f"{i:04d}", "entropy": entropy, "normalized_entropy": normalized})
    order = [r["name"] for r in sorted(rows, key=lambda r: (r[column], r["name"]))]
    assert intrada.easy_count(0.29, 100) == 29  # as a float, 28.999...
    for hundredths in range(1, 101):
        easy, hard = intrada.easy_and_hard(rows[::-1], hundredths / 100, column != "entropy")
        assert len(easy) == hundredths * 2975 // 100 and easy + hard == order


# ====================================================================== evaluation


def test_confusion_matrix_iou_and_scores():
    labels = torch.randint(0, 22, (60, 70))
    labels[labels > 18] = 255
    labels[labels == 3] = 255
    labels[labels == 6] = 255
    predictions = torch.randint(0, 19, (60, 70))
    predictions[predictions == 6] = 0  # 6 occurs nowhere; 3 is predicted alone
    expected = torch.zeros(19, 19, dtype=torch.int64)
    for label, prediction in zip(labels.flatten().tolist(), predictions.flatten().tolist()):
        if label < 19:
            expected[label, prediction] += 1
    confusion = common.confusion_matrix(labels.byte(), predictions.byte(), 19)
    assert torch.equal(confusion, expected)
    each = {}
    for c, value in enumerate(common.iou(confusion).tolist()):
        union = (expected[c].sum() + expected[:, c].sum() - expected[c, c]).item()
        assert (c == 6) == (union == 0) == math.isnan(value)
        if union:
            each[c] = expected[c, c].item() / union
            assert value == approx(each[c])
    result = common.scores(confusion, CLASSES)
    for key, absent in (("19", ()), ("16", (9, 14, 16)), ("13", (9, 14, 16, 3, 4, 5))):
        members = [value for c, value in each.items() if c not in absent]
        assert result[f"miou{key}"] == approx(100 * sum(members) / len(members))
    assert result["iou"]["traffic light"] is None
    assert result["iou"]["bicycle"] == approx(100 * each[18])
    assert list(common.scores(confusion, tuple("abcdefghijklmnopqrs"))) == ["miou19", "iou"]
    many = torch.arange(255, dtype=torch.uint8)  # products of large ids must not overflow
    assert torch.equal(common.confusion_matrix(many, many, 255), torch.eye(255).long())


def test_entropy_map_and_argmax_of_upsampled_logits():
    logits = 5 * torch.randn(2, 5, 3, 4)
    logits[0, :, 0, 0] = torch.tensor([300.0, 0, 0, 0, -300])
    larger = bigger(logits, (9, 7))
    found = common.entropy_map(logits, (9, 7))
    for b in range(2):
        assert found[b].numpy() == approx(plain_entropy(larger[b]), abs=1e-5)
    assert common.entropy_map(torch.zeros(1, 5, 1, 1), (2, 2)).flatten().tolist() == approx([1] * 4)
    assert torch.equal(common.upsampled_argmax(logits, (9, 7)), larger.argmax(1).byte())


# ====================================================================== BCL's formulas

C, D, H, W = 5, 6, 4, 3
POSITIONS = list(product(range(H), range(W)))


def bcl_inputs():
    """Features (D,H,W), labels (H,W) with 255 and no 3, prototypes (C,D), present without 1, 4."""
    labels = torch.tensor([[255, 0, 2], [4, 255, 0], [1, 2, 2], [1, 0, 255]])
    features = torch.randn(D, H, W, dtype=torch.float64)
    prototypes = torch.randn(C, D, dtype=torch.float64)
    return features, labels, prototypes, torch.tensor([True, False, True, True, False])


def cosines(feature, prototypes, present):
    """{class: cosine of a position's feature (D,) with its prototype} of the present classes."""
    unit = feature / feature.norm()
    return {c: (unit @ p / p.norm()).item() for c, p in enumerate(prototypes) if present[c]}


def test_class_prototypes():
    features, labels, _, _ = bcl_inputs()
    prototypes, present = bcl.class_prototypes(features, labels, C)
    assert present.tolist() == [True, True, True, False, True]
    for c, d in product(range(C), range(D)):
        values = [features[d, h, w].item() for h, w in POSITIONS if labels[h, w] == c]
        mean = sum(values) / max(len(values), 1)
        assert prototypes[c, d].item() == approx(mean, abs=1e-12)


def test_contrastive_loss():
    features, labels, prototypes, present = bcl_inputs()
    parts = []
    for h, w in POSITIONS:
        similar = cosines(features[:, h, w], prototypes, present)
        exp = {c: math.exp(s / 0.1) for c, s in similar.items()}
        if labels[h, w].item() in exp:
            parts.append(-math.log(exp[labels[h, w].item()] / sum(exp.values())))
    loss = bcl.contrastive_loss(features, labels, bcl.Prototypes(prototypes, present), 0.1)
    assert loss.item() == approx(sum(parts) / len(parts), rel=1e-12)

    def function(f, p):
        return bcl.contrastive_loss(f, labels, bcl.Prototypes(p, present), 0.1)

    leaves = (features.requires_grad_(), prototypes.requires_grad_())  # gradients reach both
    assert torch.autograd.gradcheck(function, leaves)
    without_loss = [
        (labels.where(labels == 255, 1), present),  # no class in common
        (labels * 0 + 255, present),
        (labels, present & False),
        (labels, torch.arange(C) == 2),  # the softmax of one class is 1
    ]
    for y, seen in without_loss:
        loss = bcl.contrastive_loss(features, y, bcl.Prototypes(prototypes, seen), 0.1)
        for gradient in torch.autograd.grad(loss, leaves):
            assert loss.item() == 0 and (gradient == 0).all()


def test_prototype_ema_and_calibrate():
    """A made-up sequence of images in which classes come and go."""
    emas = [bcl.PrototypeEMA(C, D, 0.9).double() for _ in "ST"]
    means = [{}, {}]
    for seen in (("ac", "b"), ("", "a"), ("ab", ""), ("bce", "ab"), ("abc", "bd")):
        pairs = []
        for ema, mean, classes in zip(emas, means, seen):
            present = torch.tensor([letter in classes for letter in "abcde"])
            prototypes = torch.randn(C, D, dtype=torch.float64) * present[:, None]
            pairs.append(bcl.Prototypes(prototypes, present))
            ema.update(pairs[-1])
            for c in present.nonzero().flatten().tolist():
                mean[c] = 0.9 * mean.get(c, prototypes[c]) + 0.1 * prototypes[c]
            for c in range(C):
                assert ema.seen[c] == (c in mean)
                assert torch.allclose(ema.mean[c], mean.get(c, torch.zeros(D).double()), atol=1e-12)
        prototypes, present = pairs[0]
        for c, calibrated in enumerate(bcl.calibrate(pairs[0], *emas).vectors):
            known = present[c] and c in means[0] and c in means[1]
            bias = means[1][c] - means[0][c] if known else 0
            assert torch.allclose(calibrated, prototypes[c] + bias, atol=1e-12)


@pytest.mark.parametrize("tau", [-1, 0.3, 0.99])
def test_dynamic_labels(tau):
    features, _, prototypes, present = bcl_inputs()
    features[:, 0, 0] = 3 * prototypes[1]  # most similar to a class that is not present
    features[:, 0, 1] = 2 * prototypes[2]  # surely labelled
    labels = bcl.dynamic_labels(features, bcl.Prototypes(prototypes, present), tau)
    for h, w in POSITIONS:
        similar = cosines(features[:, h, w], prototypes, present)
        best = max(similar, key=similar.get)
        assert labels[h, w] == (best if similar[best] > tau else 255)
    assert labels.shape == (H, W) and labels[0, 1] == 2
    none = bcl.Prototypes(prototypes, present & False)
    assert (bcl.dynamic_labels(features, none, tau) == 255).all()


def test_top_bins():
    """The highest bin above which the share lies, found by trying all of them."""
    rows = torch.tensor([[3, 0, 2, 5], [0, 0, 0, 0], [1, 0, 0, 0], [0, 7, 0, 1]])
    for ratio in (0, 0.1, 0.5, 0.6, 0.7, 0.71, 1):
        for row, found in zip(rows.tolist(), bcl.top_bins(rows, ratio).tolist()):
            fits = [b for b in range(4) if sum(row[b:]) >= ratio * sum(row)]
            assert found == (max(fits) if sum(row) and ratio else bcl.BINS)
    assert bcl.top_bins(rows, 0.6)[0] == 2  # the docstring's example


def test_confidence_bins_tell_high_confidences_apart():
    confidence = torch.tensor([0.0, 0.3, 0.9, 0.99998, 0.99999, 1.0])
    bins = bcl.confidence_bins(confidence)
    assert (bins.diff() > 0).all() and bins[0] == 0 and bins[-1] == bcl.BINS - 1
    lower, upper = bcl.bin_confidence(bins), bcl.bin_confidence(bins + 1)
    assert (lower <= confidence).all() and (confidence[:-1] < upper[:-1]).all()


def test_map_positions_stand_for_pixels_at_their_centres():
    labels = torch.randint(0, 19, (2, 33, 70))
    picked = common.pick(labels, 5, 9)
    for i, j in product(range(5), range(9)):
        assert torch.equal(picked[:, i, j], labels[:, round(i * 32 / 4), round(j * 69 / 8)])
    columns = torch.arange(1068)[None, None]  # position 30 of 133 lies midway between two pixels
    wanted = [round(i * 1067 / 132) for i in range(133)]
    assert common.pick(columns, 1, 133).tolist() == [[wanted]]
    assert common.pick(labels, 1, 1).tolist() == labels[:, :1, :1].tolist()
    for side, more in product(range(32, 1101), (0, 1, 2)):  # what is enlarged is picked again
        labels = torch.arange(side // 8 + more)[None, :, None]
        assert torch.equal(common.pick(bcl.enlarge(labels, side, 1), side // 8 + more, 1), labels)


@pytest.mark.parametrize("label_bn", ["batch", "running"])
def test_static_labels_use_these_statistics(label_bn):
    G = noisy_network(classes=5).double()
    before = copy.deepcopy(G.state_dict())
    plain = copy.deepcopy(G).train(label_bn == "batch")
    network = bcl.label_network(G, label_bn)
    for image in 50 * torch.randn(3, 1, 3, 64, 64, dtype=torch.float64):
        found = network(image).main  # earlier images leave no trace
        assert torch.allclose(found, plain(image).main, rtol=1e-9, atol=1e-9)
    assert same(G.state_dict(), before)


def test_augmentation_keeps_pairs_together():
    augment = functools.partial(bcl.augment, short_side=16, scales=(1.0,), crop=16, flip=True)
    augment = pickle.loads(pickle.dumps(augment))  # as readers that are not forked get it
    label = Image.effect_noise((48, 16), 100)
    for seed in range(9):
        image, own = augment(label.convert("RGB"), label, np.random.default_rng(seed))
        assert np.array_equal(image.getchannel("R"), own) and own.size == (16, 16)


# ====================================================================== network


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    found = common.normalize(images)
    mean = (104.00698793, 116.66876762, 122.67891434)  # of B, G, R
    for b, c, h, w in product(range(2), range(3), range(4), range(5)):
        value = images[b, 2 - c, h, w].item() - mean[c]
        assert found[b, c, h, w].item() == approx(value, abs=1e-4)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(common.normalize(images.float()), found)
    for wrong in (images[0], images[:, :2]):
        with pytest.raises(ValueError, match="normalize"):
            common.normalize(wrong)


def test_discriminator():
    steps = list(intrada.discriminator(19))
    channels = (19, 64, 128, 256, 512, 1)
    for i, conv in enumerate(steps[::2]):
        assert (conv.in_channels, conv.out_channels) == channels[i : i + 2]
        assert (conv.kernel_size, conv.stride, conv.padding) == ((4, 4), (2, 2), (1, 1))
        assert conv.bias is not None
    assert len(steps) == 9 and [leak.negative_slope for leak in steps[1::2]] == [0.2] * 4


def test_network_is_the_papers_resnet():
    net = common.DeepLabV2(19, (3, 4, 23, 3), 2)
    for i, count, dilation in ((1, 3, 1), (2, 4, 1), (3, 23, 2), (4, 3, 4)):
        stage = getattr(net, f"layer{i}")
        assert len(stage) == count and stage[0].downsample[0].stride == stage[0].conv1.stride
        for b, block in enumerate(stage):
            stride = (2, 2) if (i, b) == (2, 0) else (1, 1)  # Caffe's, on the 1x1
            assert block.conv1.stride == stride and block.conv2.stride == (1, 1)
            assert block.conv2.dilation == block.conv2.padding == (dilation, dilation)
    pool = net.maxpool
    assert (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (3, 2, 1, True)
    for conv, d in zip((*net.layer5.conv2d_list, *net.layer6.conv2d_list), 2 * (6, 12, 18, 24)):
        assert conv.dilation == conv.padding == (d, d) and conv.kernel_size == (3, 3)
        assert conv.bias is not None and conv.weight.std().item() == approx(0.01, abs=1e-3)
    with torch.device("meta"):
        shapes = {name: v.shape for name, v in torchvision.models.resnet101().state_dict().items()}
    for name, value in net.state_dict().items():
        if not name.startswith(("layer5", "layer6")):
            assert value.dim() == len(shapes[name]) and value.shape[2:] == shapes.pop(name)[2:]
    left = {name for name in shapes if not name.endswith("num_batches_tracked")}
    assert left == {"fc.weight", "fc.bias"}  # our BatchNorm does not count
    main, aux, features = net.eval()(torch.randn(1, 3, 512, 1024))
    assert main.shape == aux.shape == (1, 19, 65, 129) and features.shape == (1, 64, 65, 129)
    assert torch.allclose(main, sum(conv(features) for conv in net.layer6.conv2d_list), atol=1e-5)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_parameter_groups_list_each_parameter_once():
    """With factors for how often the released optimizer lists it: once for every module."""
    net = common.DeepLabV2(19, (3, 4, 23, 3), 2)
    listed = []
    for part in (net.conv1, net.bn1, net.layer1, net.layer2, net.layer3, net.layer4):
        for module in part.modules():
            listed += [id(parameter) for parameter in module.parameters()]
    groups = net.parameter_groups("released", 10)
    assert [len(group["params"]) for group in groups] == [1, 99, 4, 16]  # no BatchNorm: frozen
    for group, n in zip(groups, (1, 3, 4)):
        assert {listed.count(id(p)) for p in group["params"]} == {n}
        assert (group["lr_factor"], group["weight_decay"]) == (n, 5e-4 * (n + 1) / 2)
    assert (groups[3]["lr_factor"], groups[3]["weight_decay"]) == (10, 5e-4)
    paper = [(g["lr_factor"], g["weight_decay"]) for g in net.parameter_groups("paper", 9)]
    assert paper == [(1, 5e-4), (1, 5e-4), (1, 5e-4), (9, 5e-4)]


@pytest.mark.parametrize("drift, noise", [(0.1, 0.0), (0.1, 0.1), (0.0, 0.0)])
def test_released_recipe_follows_the_old_optimizer(drift, noise):
    """2,000 iterations of a weight that torch 0.4.1 was given n times, beside ours."""
    groups = common.DeepLabV2(19, **NETWORK).parameter_groups("released", 10)
    for group, n in zip(groups, (1, 3, 4)):
        ours = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        sgd = torch.optim.SGD([{**group, "params": [ours]}], lr=1, momentum=0.9)
        old = 1.0
        buffer = 0.0  # one for all n entries
        path = []
        for it, slope in enumerate((drift + noise * torch.randn(2_000)).tolist()):
            lr = 2.5e-4 * (1 - it / 250_000) ** 0.9
            sgd.param_groups[0]["lr"] = lr * group["lr_factor"]
            ours.grad = torch.full_like(ours, slope)
            sgd.step()
            gradient = slope
            for _ in range(n):
                gradient += 5e-4 * old  # in place: the next entry decays the same gradient again
                buffer = 0.9 * buffer + gradient
                old -= lr * buffer
            path.append((ours.item(), old))
        moved = np.subtract(path[-1], path[300])  # the momentum starts up at another speed
        assert moved[0] / moved[1] == approx(1, abs=0.01)
        if drift == 0:  # weight decay alone
            assert ours.item() == approx(old, abs=1e-4) and old < 0.998


def test_checkpointed_activations_change_memory_alone():
    net = common.DeepLabV2(19, (2, 1, 1, 1), 4)
    image = 50 * torch.randn(1, 3, 128, 128)
    memory = []
    states = []
    for switch in (False, True):
        one = copy.deepcopy(net)
        one.checkpoint_activations = switch
        kept = []
        pack = lambda tensor: kept.append(tensor.numel()) or tensor  # noqa: B023, E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prediction = one(image)
        memory.append(sum(kept))  # before the backward pass, which computes parts again
        (prediction.main.square().mean() + prediction.aux.square().mean()).backward()
        gradients = {name: p.grad for name, p in one.named_parameters() if p.requires_grad}
        states.append((one.state_dict(), gradients))
    assert memory[1] < 0.6 * memory[0] and same(*states)
    assert not same(states[0][0], net.state_dict())  # the statistics moved, once


def test_predict():
    net = noisy_network()
    net.input_size = (96, 48)
    image = Image.open(draw("image.png", size=(160, 40)))
    label = common.predict(net, image)
    # the network sees it with its own aspect and the area of 96x48
    expected = plain_logits(net, "image.png", (136, 34), (160, 40)).argmax(0)
    assert label.shape == (40, 160) and label.dtype == torch.uint8
    assert (label != expected).double().mean() < 0.001  # rounding, at ties
    assert torch.equal(common.predict(net, image.convert("RGBA")), label)
    assert not torch.equal(common.predict(net, image, (64, 64)), label)
    with pytest.raises(ValueError, match="eval mode"):
        common.predict(net.train(), image)


# ====================================================================== weight files

PUBLISHED = {  # kind of file: how names of ours begin there; None: it has no such tensor
    "advent": {},
    "single-level advent": {"layer5.": None},
    "bcl": {"conv1.": "target_conv1.", "bn1.": "target_bn1.", "layer1.": "target_layer1.",
            "layer5.": None, "layer6.": "layer5."},
    "single-level deeplab": {"layer5.": None, "layer6.": "layer5."},
    "scale": {"layer5.": None, "layer6.": None, "": "Scale."},
    "torchvision": {"layer5.": None, "layer6.": None},
    "trunk": {"layer5.": None, "layer6.": None},
}  # fmt: skip
UNUSED = {  # what else is in such a file: the source's stem and layer1, other heads
    "bcl": {"conv1.weight": (4, 3, 7, 7), "layer1.0.conv1.weight": (4, 4, 1, 1),
            "layer6.conv2d_list.0.weight": (19, 128, 3, 3)},
    "scale": {"Scale.layer5.conv2d_list.0.weight": (21, 128, 3, 3)},
    "torchvision": {"fc.weight": (1000, 128), "fc.bias": (1000,)},
}  # fmt: skip


def file_name(kind, name):
    for ours, theirs in PUBLISHED[kind].items():
        if name.startswith(ours):
            return None if theirs is None else name.replace(ours, theirs, 1)
    return name


def published(kind):
    """What a published file holds: its names, random values, the size of the tests' network."""
    state = {file_name(kind, name): v for name, v in noisy_network().state_dict().items()}
    state.pop(None, None)
    state.update({name: torch.rand(shape) for name, shape in UNUSED.get(kind, {}).items()})
    return state


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


WRAPS = {
    "two prefixes": lambda state: {"model": prefixed("_orig_mod.module.", state), "iter": 3},
    "two containers": lambda state: {"ema_model": {"state_dict": state}, "epoch": 3},
    "both": lambda state: {"net": {"model_state_dict": prefixed("model.", state)}, "args": None},
    "any name": lambda state: prefixed("a.b.", state),
    "more tensors": lambda state: {"model": state, "a": {"b": torch.ones(2)}, "c": torch.ones(1)},
    "counters": lambda state: {**state, "bn1.num_batches_tracked": torch.tensor(7)},
}
WEIGHT_FILES = [(kind, None) for kind in PUBLISHED] + [("advent", wrap) for wrap in WRAPS]


@pytest.mark.parametrize("kind, wrap", WEIGHT_FILES)
def test_published_weights(kind, wrap):
    state = published(kind)
    content = WRAPS[wrap](state) if wrap else state
    torch.save(content, "weights.bin", _use_new_zipfile_serialization=wrap is None)
    net = common.DeepLabV2(19, **NETWORK)
    initial = copy.deepcopy(net.state_dict())
    report = common.load_weights(net, common.read_checkpoint("weights.bin"))
    sources = {name: file_name(kind, name) for name in initial}
    for name, value in net.state_dict().items():
        expected = initial[name] if sources[name] is None else state[sources[name]]
        if (kind, name) == ("torchvision", "conv1.weight"):  # RGB over std, in 0..1
            std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
            value = value.flip(1) * std * 255
        assert torch.allclose(value, expected, rtol=1e-5, atol=0), name
    assert set(report.initialised) == {name for name in sources if sources[name] is None}
    beside = {"a.b", "c"} if wrap == "more tensors" else set()
    assert set(report.skipped) == state.keys() - set(sources.values()) | beside
    assert f"loaded {len(report.loaded)} tensors" in str(report)
    assert (f"not used {len(report.skipped)} (" in str(report)) == bool(report.skipped)
    if kind in ("scale", "torchvision", "trunk"):
        refused("no trained classifier", common.load, "weights.bin")
    else:  # the architecture can be read off trained weights
        loaded = common.load("weights.bin")
        assert (loaded.num_classes, loaded.layers, loaded.width) == (19, (1, 1, 1, 1), 4)
        assert (loaded.layer5 is not None) == (kind == "advent") and not loaded.training
        assert loaded.input_size == ((1460, 730) if kind == "bcl" else (1024, 512))
        assert torch.equal(loaded.layer6.conv2d_list[0].weight, net.layer6.conv2d_list[0].weight)


def test_initial_weights_of_another_class_count_keep_their_trunk():
    net = common.DeepLabV2(11, (1, 1, 1, 1), 16)
    head = net.layer6.conv2d_list[0].weight.clone()
    report = common.load_weights(net, common.read_checkpoint(HERE / "demo/initial.pth"))
    own = net.state_dict()
    heads = {name for name in own if name.startswith(("layer5.", "layer6."))}
    assert set(report.initialised) == heads and set(report.loaded) == own.keys() - heads
    assert torch.equal(net.layer6.conv2d_list[0].weight, head)
    assert f"kept initial {len(heads)}" in str(report)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


STEM = torch.ones(4, 3, 7, 7)
BAD_WEIGHTS = {  # a fine content to one that is refused; what the sentence says
    "two networks": (lambda fine: {"state_dict": fine, "ema": fine}, "state_dict and ema"),
    "no network": (lambda fine: {"encoder.a": STEM, "epoch": 3}, "encoder.a, epoch"),
    "a tensor": (lambda fine: STEM, "a Tensor, not a dict"),
    "code": (lambda fine: {"state_dict": Malicious()}, "cannot be read as weights"),
    "NaN": (lambda fine: {**fine, "conv1.weight": STEM * math.nan}, "conv1.weight has NaN"),
    "another width": (lambda fine: {**fine, "bn1.bias": torch.ones(8)}, "bn1.bias is .8,.*--width"),
    "another depth": (lambda fine: {**fine, "layer2.1.conv1.weight": STEM}, "layer2.1.*--layers"),
    "a head without a part": (
        lambda fine: {k: v for k, v in fine.items() if k != "layer6.conv2d_list.1.bias"},
        "layer6.conv2d_list.1.bias is missing in the file",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused(case):
    change, sentence = BAD_WEIGHTS[case]
    torch.save(change(published("advent")), "bad.pth")
    net = common.DeepLabV2(19, **NETWORK)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match=f"bad.pth.*{sentence}"):
        common.load_weights(net, common.read_checkpoint("bad.pth"), "bad.pth")
    assert same(net.state_dict(), before) and not Path("executed").exists()
    if case == "code":
        torch.load("bad.pth", weights_only=False)
        assert Path("executed").exists()  # the trap was armed


def test_damaged_and_missing_weight_files_are_refused():
    torch.save({**published("advent"), "conv1.weight": STEM}, "fine.pth")
    fine = Path("fine.pth").read_bytes()
    ones = b"\x00\x00\x80\x3f" * 9
    flipped = fine.replace(ones, ones[:-1] + b"\x3e", 1)  # torch's own reader sees nothing
    assert flipped != fine
    for content in (fine[:30_000], b"404: not found\n", flipped):
        Path("bad.pth").write_bytes(content)
        refused("bad.pth cannot be read as weights", common.read_checkpoint, "bad.pth")
    refused("no weight file at nowhere.pth", common.read_checkpoint, "nowhere.pth")
    refused("no weight file at scenes", common.read_checkpoint, "scenes")
    weights = torchvision.models.ResNet101_Weights
    with mock.patch.object(weights, "get_state_dict", side_effect=OSError("no network")):
        refused("no network.*resnet101-63fe2227.pth", common.initial_weights, "imagenet")


# ====================================================================== labels and images

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
SYNTHIA_IDS = (3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11)


def palette_png(path, ids, bits):
    """The index counts: the palette means nothing."""
    image = Image.fromarray(ids)
    image.putpalette(np.random.default_rng(1).bytes(3 * 2**bits))
    image.save(path, bits=bits)


def grey_png(path, ids, bits=8):
    """Pillow writes 2 and 4 bits with a palette alone: this is its file without one."""
    palette_png(path, ids, bits)
    content = Path(path).read_bytes()
    header = content[12:25] + b"\0" + content[26:29]  # colour type 0
    checksum = zlib.crc32(header).to_bytes(4, "big")
    pixels = content[content.index(b"IDAT") - 4 :]  # from the chunk's length on
    Path(path).write_bytes(content[:12] + header + checksum + pixels)


def rgb16_png(path, ids, bits):
    """SYNTHIA's: class and instance as 16-bit channels."""
    demo.write_png16(path, np.stack([ids, 1000 + 7 * ids.astype(int), 0 * ids], 2))


LABEL_FILES = [  # writer, colour type in the file, bits, dataset, its ids in the order of trainIds
    (palette_png, 3, 8, "gta5", CITYSCAPES_IDS), (palette_png, 3, 2, "folder", range(255)),
    (palette_png, 3, 1, "folder", range(255)), (palette_png, 3, 4, "gta5", CITYSCAPES_IDS),
    (grey_png, 0, 8, "cityscapes", CITYSCAPES_IDS), (grey_png, 0, 8, "bdd100k", range(19)),
    (rgb16_png, 2, 16, "synthia", SYNTHIA_IDS),
]  # fmt: skip


@pytest.mark.parametrize("write, colour_type, bits, kind, table", LABEL_FILES)
def test_label_encodings(write, colour_type, bits, kind, table):
    """Ids become their places in the table, all others 255 (half a file of these is refused)."""
    ids = (np.arange(256) % 2 ** min(bits, 8)).astype(np.uint8).reshape(8, 32)
    ids = np.concatenate([ids, 0 * ids])
    write("label.png", ids, bits)
    assert Path("label.png").read_bytes()[24:26] == bytes([bits, colour_type])  # in IHDR
    found = np.asarray(common.read_label("label.png", kind, 255 if kind == "folder" else 19))
    expected = [[table.index(i) if i in table else 255 for i in row] for row in ids.tolist()]
    assert found.dtype == np.uint8 and found.tolist() == expected


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_labels_of_fewer_bits_are_refused(bits):
    """Pillow stretches them to 0..255."""
    grey_png("grey.png", np.ones((6, 8), np.uint8), bits)
    refused(f"grey.png has .* {bits} bits. Convert to 8", common.read_label, "grey.png", "gta5", 19)


def test_files_that_are_no_labels_are_refused():
    draw("colours.png")
    draw("photo.jpg", 7)
    Image.fromarray(np.full((6, 8), 7, np.uint16)).save("deep.png")
    Path("cut.png").write_bytes(draw("whole.png", 7, (200, 200)).read_bytes()[:60])
    for name in ("colours.png", "photo.jpg", "deep.png", "cut.png"):
        refused(name, common.read_label, name, "gta5", 19)
    refused("colours.png.*16 bits", common.read_label, "colours.png", "synthia", 19)
    refused("outside 0..33", common.read_label, draw("foreign.png", 200), "cityscapes", 19)
    pixels = np.zeros((40, 50), np.uint8)
    pixels[0, :2] = 40  # of 2,000 pixels: in a plain folder one in a thousand may be foreign
    grey_png("stray.png", pixels)
    assert (np.asarray(common.read_label("stray.png", "folder", 19)) == 255).sum() == 2
    pixels[0, 2] = 40
    grey_png("stray.png", pixels)
    refused("stray.png.*outside 0..18 .mostly 40", common.read_label, "stray.png", "folder", 19)


def test_photos_are_turned_and_labels_have_their_shape():
    exif = Image.Exif()
    exif[0x0112] = 6  # rows are columns
    Image.new("RGB", (80, 40)).save("photo.jpg", exif=exif)
    dataset = common.Labelled({"a": ("photo.jpg", "label.png")}, "folder", CLASSES, (20, 40))
    draw("label.png", 3, (41, 80))  # GTA5 has pairs of 1914x1052 and 1914x1046
    assert dataset[0]["image"].shape == (40, 20, 3) and dataset[0]["label"].shape == (40, 20)
    draw("label.png", 3, (80, 40))
    refused("label.png is 80x40, its image 40x80", dataset.open, 0)


# ====================================================================== dataset layouts

TREES = [  # dataset, its folder below the data root, first image, its label, its name
    ("gta5", "gta5", "images/images/00001.png", "labels/labels/00001.png", "00001"),
    ("gta5", "GTA5", "01_images/images/00001.png", "01_labels/labels/00001.png", "00001"),
    ("gta5", "gta", "images/00001.png", "labels/00001.png", "00001"),
    ("synthia", "synthia", "RAND_CITYSCAPES/RGB/0.png", "RAND_CITYSCAPES/GT/LABELS/0.png", "0"),
    ("synthia", "RAND_CITYSCAPES", "RGB/0.png", "GT/LABELS/0.png", "0"),
    ("synscapes", "Synscapes", "img/rgb/1.png", "img/class/1.png", "1"),
    ("cityscapes", "Cityscapes", "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png",
     "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png", "ulm/ulm_000000_000019"),
    ("acdc", "ACDC", "rgb_anon/fog/train/GP01/GP01_frame_000041_rgb_anon.png",
     "gt/fog/train/GP01/GP01_frame_000041_gt_labelIds.png", "fog/train/GP01/GP01_frame_000041"),
    ("acdc", "acdc", "rgb_anon/train/GP01_frame_000041_rgb_anon.png",
     "gt/train/GP01_frame_000041_gt_labelIds.png", "GP01_frame_000041"),
    ("darkzurich", "Dark_Zurich", "rgb_anon/train/night/GP01/GP01_frame_000041_rgb_anon.png",
     "gt/train/night/GP01/GP01_frame_000041_gt_labelIds.png", "GP01/GP01_frame_000041"),
    ("bdd100k", "BDD100K", "images/10k/train/a-1.jpg", "labels/sem_seg/masks/train/a-1.png", "a-1"),
    ("bdd100k", "bdd100k", "seg/images/train/a-1.jpg", "seg/labels/train/a-1_train_id.png", "a-1"),
    ("folder", "mine", "images/a/1.JPEG", "labels/a/1.png", "a/1"),
    ("folder", "mine", "images/train/a/1.tif", "labels/train/a/1.png", "a/1"),
    ("folder", "mine", "images/train/1.webp", "labels/train/1.png", "1"),
    ("folder", "mine", "images/1.bmp", "labels/1.png", "1"),
]  # fmt: skip


@pytest.mark.parametrize("kind, folder, image, label, name", TREES)
def test_dataset_layouts(kind, folder, image, label, name, tmp_path):
    root = tmp_path / folder
    ids = {"gta5": (26, 7), "folder": (13, 0), "bdd100k": (13, 0)}.get(kind, (26, 7))  # car, road

    def write_pair(image, label):
        draw(root / image)
        stripes(root / label, ids, (8, 6))
        if kind == "synthia":
            demo.write_png16(root / label, np.resize([8, 0, 0, 3, 0, 0], (6, 8, 3)))

    write_pair(image, label)
    for other in ("_color.jpg", "_labelTrainIds.png"):  # of the download, of other projects
        draw((root / label).with_suffix("").as_posix() + other)
    for hidden in ("@eaDir", ".thumbnails"):
        draw((root / image).parent / hidden / Path(image).name)
    found = common.dataset_root(kind, tmp_path, root if kind == "folder" else None)
    pairs = common.list_pairs(kind, found)
    assert pairs == {name: (root / image, root / label)}
    assert common.list_images(kind, found) == {name: root / image}
    assert common.Labelled(pairs, kind, CLASSES)[0]["label"].tolist() == [[13, 0] * 4] * 6
    assert common.validation_set(kind, found, CLASSES, (64, 64)) is None
    if "train" in image:
        write_pair(image.replace("train", "val"), label.replace("/train/", "/val/"))
        dataset = common.validation_set(kind, found, CLASSES, (64, 32))
        assert dataset.names == [name.replace("train", "val")]
        assert dataset[0]["image"].shape == (32, 64, 3)
        assert dataset[0]["label"].tolist() == [[13, 0] * 4] * 6  # at its own size


def test_names_in_order_and_links_are_followed(tmp_path):
    fine = [*sorted(("a\u00a0b", "a,b;'\"c", "²")), "9", "10", "more/2", "more/10"]
    for name in fine:
        draw(f"images/{name}.png".replace("more", "elsewhere"))
        draw(f"labels/{name}.png", 2)
    Path("images/elsewhere").rename("elsewhere")
    Path("images/more").symlink_to("../elsewhere")
    assert list(common.list_pairs("folder", tmp_path)) == fine  # numbers in their order


def test_files_and_folders_that_are_missing_or_twice(tmp_path):
    for name in "abc":
        draw(f"images/{name}.png")
        draw(f"labels/{name}.png", 2)
    draw("images/d.png")
    refused("4 images but 3 labels.*first: d", common.list_pairs, "folder", tmp_path)
    draw("images/a.jpg")
    refused("a.jpg and .*a.png have the same name", common.list_images, "folder", tmp_path)
    shutil.rmtree("images")
    Path("images").mkdir()
    refused(r"no file .*\.tif.*webp", common.list_images, "folder", tmp_path)  # what is read
    refused("nowhere", common.dataset_root, "folder", None, tmp_path / "nowhere")
    refused("no gta5 folder in", common.dataset_root, "gta5", tmp_path)
    refused("leftImg8bit/train", common.list_images, "cityscapes", tmp_path)
    Path("GTA5").mkdir()
    Path("gta").mkdir()
    refused("are both gta5", common.dataset_root, "gta5", tmp_path)


def test_class_names_of_a_plain_folder(tmp_path):
    Path("classes.txt").write_text("cat\n\n dog\n", encoding="utf-8-sig")
    assert common.dataset_classes("folder", tmp_path, 2) == ("cat", "dog")
    common.check_classes("folder", tmp_path, ("cat", "dog"))
    refused("different classes", common.check_classes, "folder", tmp_path, ("cat", "hen"))
    refused("2 different names in 2 lines", common.dataset_classes, "folder", tmp_path, 3)
    Path("classes.txt").write_text("a\na\nb")
    refused("2 different names in 3 lines", common.dataset_classes, "folder", tmp_path, 3)
    assert common.dataset_classes("gta5", tmp_path, 19) == CLASSES


def test_lists_of_names_in_every_form():
    pairs = common.list_pairs("cityscapes", "scenes/Cityscapes", "val")
    name = list(pairs)[1]
    image, _ = pairs[name]
    forms = [name, image.name, image.stem, name.split("/")[-1], f"/val/{name}_leftImg8bit.png"]
    forms += [image.as_posix(), image.relative_to("scenes/Cityscapes").as_posix()]
    for form in forms:
        Path("list.txt").write_text(f"\ufeff{form}  \r\n\n", encoding="utf-8")
        assert common.keep_listed(pairs, "list.txt") == {name: pairs[name]}, form
    images = common.list_images("cityscapes", "scenes/Cityscapes", "val")
    Path("list.txt").write_text("\n".join(reversed(images)))
    assert list(common.keep_listed(images, "list.txt")) == list(images)  # in the set's order
    assert common.keep_listed(images, None) == images
    Path("list.txt").write_text(f"{name}\nstranger\n")
    refused("list.txt: 1 of 2 names found.*stranger", common.keep_listed, pairs, "list.txt")
    Path("list.txt").write_text("\n")
    refused("list.txt names no image", common.keep_listed, pairs, "list.txt")


# ====================================================================== a look at a few files


def labelled_folder(ids, classes=tuple("abcde")):
    """Three images with labels of these ids, as a plain folder."""
    for name in "012":
        draw(f"own/images/{name}.png")
        stripes(f"own/labels/{name}.png", ids)
        draw(f"own/images/{name}.png", size=(64, 64))
    return common.Labelled(common.list_pairs("folder", "own"), "folder", classes)


def test_masks_of_0_and_255_are_refused():
    """255 is "ignore": one class is left, and every network would score 100 %."""
    masks = labelled_folder((0, 255), ("road", "rest"))
    refused("only class 0 and 255 .ignored. occur", masks.check_samples)
    refused("only class 3 occurs", labelled_folder((3,)).check_samples)


def test_classes_that_do_not_occur_are_printed(capsys):
    labelled_folder((0, 2, 255, 3)).check_samples()
    assert "in 3 labels no pixel has class b, e\n" in capsys.readouterr().out
    labelled_folder((0, 1, 2, 3, 4)).check_samples()
    assert "no pixel" not in capsys.readouterr().out


# ====================================================================== readers


def test_order_is_a_permutation_in_every_epoch_and_starts_anywhere():
    order = list(common.endless_order(7, 3, 0, 14, 2))
    assert [position for position, _ in order] == list(range(28))
    epochs = [[index for _, index in order[i : i + 7]] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert list(common.endless_order(7, 3, 5, 14, 2)) == order[10:]
    parts = []
    for rank in (0, 1):
        with mock.patch.multiple(common, rank=lambda: rank, world_size=lambda: 2):  # noqa: B023
            parts.append(list(common.endless_order(7, 3, 0, 14, 1)))
    assert list(itertools.chain(*zip(*parts))) == order  # two processes share a batch


def test_items_are_arrays_that_need_no_shared_memory():
    """A tensor would come from a reading process by shared memory, and a batch as a tensor."""
    pairs = common.list_pairs("gta5", "scenes/GTA5")
    dataset = common.Labelled(pairs, "gta5", CLASSES, (64, 32))
    for batch_size in (None, 2):
        found = common.read_items(dataset, 2, batch_size=batch_size, sampler=[3, 1])
        items = list(found) if batch_size is None else next(found)
        assert [item["name"] for item in items] == [dataset.names[3], dataset.names[1]]
        for item in items:
            assert type(item["image"]) is type(item["label"]) is np.ndarray
            assert item["image"].shape == (32, 64, 3) and item["label"].dtype == np.uint8


def test_a_killed_reader_ends_the_run_in_a_sentence():
    real = common.Labelled.open

    def dying(dataset, index):
        if torch.utils.data.get_worker_info() and index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(dataset, index)

    begin = time.monotonic()
    with mock.patch.object(common.Labelled, "open", dying):
        refuses("a process that reads images ended", intrada, INTRADA, "--stage 1 --workers 2")
    assert time.monotonic() - begin < 60


def test_a_reading_process_passes_its_sentence_on(broken):
    """A file that the first look does not open, met by a reader in the middle of training."""
    damage_unseen(broken)
    flags = "--data-root broken --stage 1 --stop-iters 6 --workers 2"
    refuses("error: cannot read broken/Cityscapes/leftImg8bit", intrada, INTRADA, flags)


def damage_unseen(broken):
    """Cut the target images that the look at a few files leaves out. Returns their paths."""
    paths = sorted((broken / TRAIN).rglob("*.png"))
    unseen = [paths[i] for i in range(10) if i not in common.evenly_spaced(10, 8)]
    for path in unseen:
        path.write_bytes(HALF)
    return unseen


HALF = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x40\0\0\0\x40"
TRAIN = "Cityscapes/leftImg8bit/train"


# ====================================================================== the training loops


@pytest.fixture
def pairs():
    """Two images of each kind, as the network takes them: (sources, their labels, targets)."""
    demo.write_scenes("pair", 0, (64, 64), (64, 64), 2, 2, 1)
    mean = torch.tensor([104.00698793, 116.66876762, 122.67891434]).view(1, 3, 1, 1)
    table = [CITYSCAPES_IDS.index(i) if i in CITYSCAPES_IDS else 255 for i in range(256)]
    folders = [Path("pair/GTA5/images"), Path("pair/Cityscapes/leftImg8bit/train")]
    paths = [sorted(folder.rglob("*.png")) for folder in folders]
    sources, targets = [[read_rgb(p).flip(1).float() - mean for p in kind] for kind in paths]
    labels = [np.array(table)[read(p)] for p in sorted(Path("pair/GTA5/labels").iterdir())]
    return sources, [torch.from_numpy(label)[None] for label in labels], targets


def batch_of(images, seed, it):
    """Both images, in the order of epoch `it`."""
    return torch.cat([images[i] for i in np.random.default_rng((seed, it)).permutation(2)])


def information(logits):
    return intrada.self_information(bigger(logits))


def sgd_of(net, recipe="released"):
    return torch.optim.SGD(net.parameter_groups(recipe, 10), lr=1, momentum=0.9)


def assert_sgd(saved, decays):
    """Momentum and weight decays of the groups of a saved optimizer."""
    assert [group["momentum"] for group in saved["param_groups"]] == [0.9] * 4
    assert [group["weight_decay"] for group in saved["param_groups"]] == decays


LOOPS = [  # alignment, recipe, BatchNorm's statistics in training
    ("adversarial", "released", "batch"), ("adversarial", "paper", "running"),
    ("batchnorm", "released", "batch"), ("none", "paper", "running"),
]  # fmt: skip


@pytest.mark.parametrize("alignment, recipe, bn", LOOPS)
def test_intrada_is_the_textbook(alignment, recipe, bn, pairs):
    sources, labels, targets = pairs
    flags = "--data-root pair --stage 1 --max-iters 5 --stop-iters 4 --lr 1e-3 --lr-d 3e-4"
    flags += " --lambda-seg-main 0.9 --lambda-seg-aux 0.3 --lambda-adv-main 0.5"
    flags += f" --lambda-adv-aux 0.2 --alignment {alignment} --recipe {recipe} --bn {bn}"
    succeed(intrada, INTRADA, flags)

    torch.manual_seed(0)
    G = common.DeepLabV2(19, **NETWORK).train()
    if bn == "running":
        for norm in G.modules():
            norm.train(not isinstance(norm, torch.nn.BatchNorm2d))
    Ds = torch.nn.ModuleDict({name: intrada.discriminator(19, 4) for name in ("main", "aux")})
    Ds.to(memory_format=torch.channels_last)  # convolutions add up in another order
    sgd = sgd_of(G, recipe)
    adam = torch.optim.Adam(Ds.parameters(), lr=1, betas=(0.9, 0.99))
    for it in range(4):
        decay = (1 - it / 5) ** 0.9
        for group in sgd.param_groups:
            group["lr"] = 1e-3 * group["lr_factor"] * decay
        adam.param_groups[0]["lr"] = 3e-4 * decay
        sgd.zero_grad()
        S = G(batch_of(sources, 0, it))
        label = batch_of(labels, 0, it)
        loss = 0.9 * intrada.segmentation_loss(bigger(S.main), label)
        loss = loss + 0.3 * intrada.segmentation_loss(bigger(S.aux), label)
        loss.backward()
        if alignment != "none":
            T = G(batch_of(targets, 1, it))
        if alignment == "adversarial":
            # -log(1 - sigmoid(z)), for source, is softplus(z); -log sigmoid(z) is softplus(-z)
            loss = 0.5 * F.softplus(Ds["main"](information(T.main))).mean()
            loss = loss + 0.2 * F.softplus(Ds["aux"](information(T.aux))).mean()
            loss.backward()
            adam.zero_grad()
            for D, s, t in zip(Ds.values(), S, T):
                (F.softplus(D(information(s.detach()))).mean() / 2).backward()
                (F.softplus(-D(information(t.detach()))).mean() / 2).backward()
            adam.step()
        sgd.step()
    data = records("run/stage1", "start")[0]["data"]
    assert ("no target images" in data) == (alignment == "none")
    saved = last("run/stage1")
    decays = [5e-4, 1e-3, 1.25e-3, 5e-4] if recipe == "released" else [5e-4] * 4
    assert_sgd(saved["g_optimizer"], decays)
    assert saved["d_optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)
    for name, part in (("model", G), ("discriminators", Ds)):
        assert_close(saved[name], part.state_dict(), rtol=5e-6, atol=5e-6)
    rates = [record["lr"] for record in records("run/stage1")]
    assert rates == approx([1e-3 * (1 - it / 5) ** 0.9 for it in range(4)])


def picked(labels, h):
    """Labels of square maps, at the centres of h positions a side."""
    centres = torch.tensor([round(i * (labels.shape[1] - 1) / (h - 1)) for i in range(h)])
    return labels[:, centres[:, None], centres]


@pytest.mark.parametrize("kind", ["static", "dynamic", "hybrid", "dynamic --no-calibrate"])
def test_bcl_is_in_the_papers_order(kind, pairs):
    sources, labels, targets = pairs
    flags = "--data-root pair --warmup-iters 0 --scales 1.0 --no-flip --lr 1e-3 --momentum 0.5"
    flags += " --lambda-ce 0.9 --lambda-ent 0.3 --lambda-fcl 0.4 --lambda-bcl 0.7 --eval-every 2"
    flags += f" --target-weight 0.6 --temperature 0.2 --tau 0.5 --labels {kind}"
    succeed(bcl, BCL, flags)
    kind, *uncalibrated = kind.split()

    torch.manual_seed(0)
    G = common.DeepLabV2(19, **NETWORK, aux=False).train()
    sgd = sgd_of(G)
    ema_s = bcl.PrototypeEMA(19, 128, 0.5)
    ema_t = bcl.PrototypeEMA(19, 128, 0.5)

    def mean_prototypes(prototypes):
        """Of each class over the images that hold it."""
        present = torch.stack([p[1] for p in prototypes])
        total = sum(p[0].detach() * p[1][:, None] for p in prototypes)
        return bcl.Prototypes(total / present.sum(0).clamp(min=1)[:, None], present.any(0))

    coverage = []
    for it in range(6):
        round_, step = divmod(it, 3)
        for group in sgd.param_groups:
            group["lr"] = 1e-3 / 2**round_ * (1 - step / 3.6) ** 0.9 * group["lr_factor"]
        files = sorted(Path(f"run/round{round_}/labels").rglob("*.png"))
        static = [torch.from_numpy(np.array(Image.open(p))).long()[None] for p in files]
        y_s = batch_of(labels, 0, it)
        y_f = batch_of(static, 1, it)
        S = G(batch_of(sources, 0, it))
        T = G(batch_of(targets, 1, it))
        f_s, f_t = S.features, T.features
        h = f_s.shape[2]
        y_s_map = picked(y_s, h)
        p_s = [bcl.class_prototypes(f_s[b], y_s_map[b], 19) for b in (0, 1)]
        ema_s.update(mean_prototypes(p_s))
        y_d = []
        for b in (0, 1):
            p_st = p_s[b] if uncalibrated else bcl.calibrate(p_s[b], ema_s, ema_t)
            y_d.append(bcl.dynamic_labels(f_t[b], p_st, 0.5))
        y_d = torch.stack(y_d)
        y_t = {"static": y_f, "dynamic": picked(y_d, 64)}
        y_t["hybrid"] = torch.where(y_f == 255, picked(y_d, 64), y_f)
        y_map = {"static": picked(y_f, h), "dynamic": y_d}
        y_map["hybrid"] = torch.where(picked(y_f, h) == 255, y_d, picked(y_f, h))
        maps = (picked(y_f, h), y_d, y_map[kind])
        coverage.append([(y != 255).double().mean().item() for y in maps])
        p_t = [bcl.class_prototypes(f_t[b], y_map[kind][b], 19) for b in (0, 1)]
        ema_t.update(mean_prototypes(p_t))
        loss = 0
        for logits, y, weight in ((S.main, y_s, 1), (T.main, y_t[kind], 0.6)):
            loss = loss + 0.9 * weight * bcl.segmentation_loss(bigger(logits), y)
            loss = loss + 0.3 * weight * bcl.pixel_entropy(bigger(logits)).mean()
        for b in (0, 1):
            fcl = bcl.contrastive_loss(f_t[b], y_map[kind][b], p_s[b], 0.2)
            back = bcl.contrastive_loss(f_s[b], y_s_map[b], p_t[b], 0.2)
            loss = loss + (0.4 * fcl + 0.7 * back) / 2
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    saved = last("run")
    assert_sgd(saved["optimizer"], [5e-4, 1e-3, 1.25e-3, 5e-4])
    for name, part in (("model", G), ("ema_source", ema_s), ("ema_target", ema_t)):
        found = saved[name]
        assert_close(found, part.state_dict(), rtol=5e-5, atol=5e-5)  # a label may flip at τ
    found = [[r[f"coverage_{y}"] for y in ("y_f", "y_d", "y_t")] for r in records("run")]
    assert np.allclose(found, coverage, atol=0.02)


def test_warm_up_is_cross_entropy_on_the_source(pairs):
    sources, labels, _ = pairs
    flags = "--data-root pair --scales 1.0 --no-flip --warmup-lr 1e-3 --rounds 1 --round-iters 1"
    succeed(bcl, BCL, flags, "--warmup-iters 3 --lambda-ce 0.1")
    torch.manual_seed(0)
    G = common.DeepLabV2(19, **NETWORK, aux=False).train()
    sgd = sgd_of(G)
    for it in range(3):
        for group in sgd.param_groups:
            group["lr"] = 1e-3 * (1 - it / 3) ** 0.9 * group["lr_factor"]
        sgd.zero_grad()
        S = G(batch_of(sources, 0, it))
        bcl.segmentation_loss(bigger(S.main), batch_of(labels, 0, it)).backward()
        sgd.step()
    saved = last("run/warmup")
    assert_close(saved["model"], G.state_dict(), rtol=5e-6, atol=5e-6)
    assert saved.keys() >= {"model", "optimizer"} and "ema_source" not in saved


# ====================================================================== IntraDA's stages


def ranking_of(folder):
    return list(csv.DictReader(io.StringIO((Path(folder) / "ranking.csv").read_text())))


def test_intrada_files(trained):
    for folder in (trained(intrada) / "stage1", trained(intrada) / "stage3"):
        log = records(folder)
        scores = records(folder, "evaluation")
        assert [r["iter"] for r in log] == [1, 2, 3, 4] and [r["iter"] for r in scores] == [3, 4]
        assert [len(values) for values in terms(folder)] == [6] * 4
        assert all(r["data_seconds"] > 0 and r["peak_memory_mb"] > 50 for r in log)
        best = max(scores, key=lambda r: r["miou19"])
        assert last(folder, "best.pth")["iter"] == best["iter"] and last(folder)["iter"] == 4
        assert last(folder)["input_size"] == last(folder, "best.pth")["input_size"] == (64, 64)
    start = records(trained(intrada) / "stage1", "start")[0]
    assert start["settings"]["lr"] == "0.00025" and start["torch"] == torch.__version__
    assert start["settings"] == last(trained(intrada) / "stage1")["settings"]


def test_ranking_and_pseudo_labels(trained):
    """Against a plain forward pass of stage 1's network."""
    folder = trained(intrada) / "stage2"
    images = common.list_images("cityscapes", Path("scenes/Cityscapes"))
    G = common.load(trained(intrada) / "stage1/last.pth")
    rows = ranking_of(folder)
    assert sorted(row["name"] for row in rows) == sorted(images)
    assert len([*folder.rglob("labels/*/*.png")]) == len(images)
    assert rows == sorted(rows, key=lambda row: float(row["entropy"]))
    for row in rows:
        logits = plain_logits(G, images[row["name"]])
        prediction = logits.argmax(0).numpy()
        entropy = plain_entropy(logits).mean() / 19
        rare = len(set(prediction.flat) & {3, 4, 5, 6, 7, 9, 12, 14, 15, 16, 17})
        factor = (11 - rare) / 11 + 0.5
        assert float(row["entropy"]) == approx(entropy, rel=1e-5)
        assert float(row["normalized_entropy"]) == approx(entropy * factor, rel=1e-5)
        label = Image.open(folder / f"labels/{row['name']}.png")
        assert label.mode == "P" and (np.asarray(label) != prediction).mean() < 1e-3
        assert np.array_equal(label.convert("RGB"), common.palette(CLASSES)[np.asarray(label)])


def test_stage_3_gets_the_split_of_its_flags(trained):
    """From another run's ranking: easy images with its labels, hard ones without."""
    folder = trained(intrada) / "stage2"
    rows = sorted(ranking_of(folder), key=lambda row: float(row["normalized_entropy"]))
    names = [row["name"] for row in rows]
    flags = "--stage 3 --ratio 0.3 --normalize-entropy --ranking"
    with mock.patch.object(intrada, "train") as train, mock.patch.object(common, "print_results"):
        succeed(intrada, INTRADA, flags, folder)
    source, target = train.call_args.args[3:5]
    assert sorted(source.names) == sorted(names[:3]) and source.size == (64, 64)
    assert source.label_paths == [folder / f"labels/{name}.png" for name in source.names]
    assert sorted(target.names) == sorted(names[3:])


def test_the_split_is_part_of_a_run_and_ratio_1_is_self_training(trained):
    shutil.copytree(trained(intrada), "run", ignore=shutil.ignore_patterns("stage3"))
    succeed(intrada, INTRADA, "--stage 3 --ratio 1")
    assert "10 labelled images, no target images" in records("run/stage3", "start")[0]["data"]
    refuses("normalize_entropy", intrada, INTRADA, "--stage 3 --ratio 1 --normalize-entropy")
    refuses("ratio is 1.0 there and 0.5 here", intrada, INTRADA, "--ratio 0.5")


def test_stage_2_refuses_the_unfinished_stage_1_of_its_out():
    killed_at(common, "save", 3, intrada, INTRADA)
    assert last("run/stage1")["iter"] == 2
    refuses("2 of --stop-iters 4 iterations", intrada, INTRADA, "--stage 2")
    assert not Path("run/stage2").exists()
    named = "--stage 2 --ckpt run/stage1/last.pth"  # is meant (D5: the best by hand)
    succeed(intrada, INTRADA, named)
    refuses("run/stage2 is older than stage 1", intrada, INTRADA)
    assert "already ranked" in succeed(intrada, INTRADA, named)
    succeed(intrada, INTRADA, "--stage 3")


def test_a_ranking_of_something_else_is_refused(trained):
    """Of another checkpoint, of other images, of another input size."""
    shutil.copytree(trained(intrada), "run", ignore=shutil.ignore_patterns("stage3"))
    names = list(common.list_images("cityscapes", "scenes/Cityscapes"))
    Path("nine.txt").write_text("\n".join(names[:9]))
    for stage in ("2", "3"):
        flags = f"{INTRADA} --stage {stage}"
        refuses("made with different images", intrada, flags, "--target-list nine.txt")
        refuses("different input size", intrada, flags, "--target-size 96x64")
    other = trained(intrada) / "stage3/last.pth"
    refuses("made with weights other than", intrada, INTRADA, "--stage 2 --ckpt", other)
    shutil.copy(other, "run/stage1/last.pth")
    refuses("made with weights other than", intrada, INTRADA, "--stage 3")
    assert not Path("run/stage3").exists()
    refuses("Run --stage 1 first", intrada, INTRADA, "--stage 2 --out new")
    refuses("Run --stage 2 first", intrada, INTRADA, "--stage 3 --out new")


# ====================================================================== BCL's rounds


def test_bcl_files_and_log(trained):
    run = trained(bcl)
    assert files_of(run) >= {"warmup/last.pth", "best.pth", "last.pth", "panel.png"}
    assert all(len([*run.glob(f"round{k}/labels/*/*.png")]) == 10 for k in (0, 1))
    assert [(r["iter"], r["round"]) for r in records(run)] == [(i + 1, i // 3) for i in range(6)]
    assert [len(values) for values in terms(run)] == [7] * 6
    assert [r["lr"] for r in records(run / "warmup")] == approx([2.5e-4, 2.5e-4 * 0.5**0.9])
    for r in records(run):
        assert 0 < max(r["coverage_y_f"], r["coverage_y_d"]) <= r["coverage_y_t"] <= 1
    found = [json.loads((run / f"round{k}/labels.json").read_text()) for k in (0, 1)]
    for k in (0, 1):
        labels = [read(path) for path in (run / f"round{k}/labels").rglob("*.png")]
        assert found[k]["coverage"] == approx(100 * np.mean(np.stack(labels) != 255))
        assert 10 <= found[k]["coverage"] < 50  # ratio 0.1


def test_static_labels_are_the_most_confident_pixels(trained):
    """By sorting; each image by its own BatchNorm statistics."""
    images = common.list_images("cityscapes", Path("scenes/Cityscapes"))
    G = common.load(trained(bcl) / "warmup/last.pth").train()
    predicted = [plain_logits(G, path).softmax(0).max(0) for path in images.values()]
    confidence, label = (np.stack(x) for x in zip(*predicted))  # (N, H, W)
    cut = np.full(19, 2.0)
    for c in np.unique(label):
        cut[c] = np.sort(confidence[label == c])[-math.ceil(0.1 * (label == c).sum())]
    own = np.sort(confidence.reshape(len(images), -1))[:, -math.ceil(0.1 * 64 * 64)]
    keep = (confidence >= cut[label]) | (confidence >= own[:, None, None])
    found = [Image.open(trained(bcl) / f"round0/labels/{name}.png") for name in images]
    assert np.mean(np.where(keep, label, 255) != np.stack(found)) < 5e-3
    assert all(picture.getpalette()[:3] == [128, 64, 128] for picture in found)
    thresholds = json.loads((trained(bcl) / "round0/labels.json").read_text())["thresholds"]
    assert list(thresholds) == list(CLASSES)
    assert list(thresholds.values()) == approx(np.minimum(cut, 1), abs=1e-3)


@pytest.mark.parametrize("source, coverage", [("gta5", 100), ("synthia", 0)])
def test_classes_that_the_source_lacks_get_no_label(source, coverage):
    """A network that sees terrain everywhere, of which SYNTHIA has no pixel."""
    G = common.DeepLabV2(19, **NETWORK, aux=False)
    G.layer6.conv2d_list[0].bias.data[CLASSES.index("terrain")] = 100
    torch.save(G.state_dict(), "terrain.pth")
    flags = "--init terrain.pth --warmup-iters 0 --rounds 1 --round-iters 1 --static-ratio 1"
    out = succeed(bcl, BCL, flags, "--source", source)
    assert out.count("no pixel has class terrain, truck, train") == (source == "synthia")
    assert json.loads(Path("run/round0/labels.json").read_text())["coverage"] == coverage
    values = {v for p in Path("run/round0/labels").rglob("*.png") for v in np.unique(read(p))}
    assert values == {9 if coverage else 255}


# ====================================================================== resume


@BOTH
def test_killed_at_the_first_to_fifth_save(module, trained):
    """One kill after the other in one folder: the same files as undisturbed, to the last bit."""
    for count in (1, 2, 3, 4, 5):
        flags = f"--save-every 1 --workers {count % 2 * 2}"
        killed_at(common, "save", count, module, FLAGS[module], flags)
    succeed(module, FLAGS[module])
    assert_same_run("run", trained(module))


def test_kill_9_leaves_no_reading_process_behind():
    """A reader whose run is gone would wait for ever to hand over its next image."""
    read_end, write_end = os.pipe()  # which all forked processes hold
    flags = "--stage 1 --workers 2 --source-size 256x256"  # more than a pipe holds
    killed_at(common.Log, "losses", 1, intrada, INTRADA, flags)
    os.close(write_end)
    ended, _, _ = select.select([read_end], [], [], 20)
    os.close(read_end)
    assert ended  # the last of them is gone


@BOTH
def test_killed_while_files_are_written(module, trained):
    """Before a file gets its name, among the labels, before their folder appears, before and after
    an evaluation."""
    points = [(os, "replace", 2), (common, "write_png", 4), (os, "rename", 1)]
    points += [(common, "evaluate", 1), (common.Log, "evaluation", 1), (common, "write_panel", 1)]
    for point in points:
        killed_at(*point, module, FLAGS[module])
    succeed(module, FLAGS[module])
    assert_same_run("run", trained(module))


def test_ctrl_c_in_a_terminal_and_the_lock():
    """It reaches the whole group, reading processes included. The folder is locked until then."""
    flags = f"{INTRADA} --stage 1 --max-iters 100000 --stop-iters 100000 --eval-every 0"
    command = [sys.executable, HERE / "intrada.py", *flags.split(), "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, start_new_session=True, **pipes)
    lines = iter(running.stdout.readline, "")
    next(line for line in lines if line.startswith("stage1 5/"))
    refuses("--out run is in use", intrada, flags)
    os.killpg(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=60)
    it = last("run/stage1")["iter"]
    sentence = f"stopped; run the same command to resume from iteration {it}"
    assert running.returncode == 130 and err.strip() == sentence


@BOTH
def test_a_full_disk_ends_in_a_sentence(module, trained):
    """A limit on files' size fails as a full disk does."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = common.Log.losses

    def full(log, it, *args, **more):
        real(log, it, *args, **more)
        if it == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))

    try:
        with mock.patch.object(common.Log, "losses", full):
            refuses("last.pth", module, FLAGS[module])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    succeed(module, FLAGS[module])
    assert_same_run("run", trained(module))


@BOTH
def test_a_finished_run_is_not_trained_again(module, broken, trained):
    """Wherever the data lie, at whatever intervals."""
    shutil.copytree(trained(module), "run")
    flags = f"{FLAGS[module]} --data-root broken --workers 1 --log-every 3 --save-every 1"
    with mock.patch.object(common.Log, "losses") as trains:
        out = succeed(module, flags)
    assert out.count("already trained") == 2 and "mIoU 19" in out and not trains.called
    assert "on 5 validation images" in out
    assert_same_run("run", trained(module))


OTHER = {  # flags of other settings, their names
    intrada: ("--lr 0.5 --bn running --alignment none --seed 3", "alignment bn lr seed"),
    bcl: ("--tau 0.1 --crop 32 --warmup-lr 0.5 --rounds 3", "crop rounds tau warmup_lr"),
}


@BOTH
def test_other_settings_and_images_are_refused_and_all_named(module, trained, broken):
    shutil.copytree(trained(module), "run")
    flags, names = OTHER[module]
    _, _, err = call(module, FLAGS[module], flags)
    found = re.findall(r"(\w+) is \S+ there and \S+ here", err)
    assert [name for name in found if name != "images"] == names.split(), err
    refuses("needs an --out of its own", module, FLAGS[module], flags)
    torch.save(common.DeepLabV2(19, **NETWORK).state_dict(), "init.pth")
    refuses("init is none there and init.pth here", module, FLAGS[module], "--init init.pth")
    for folder in ("images", "labels"):
        Path(broken, "GTA5", folder, "00002.png").unlink()
    refuses("images is", module, FLAGS[module], "--data-root broken")
    assert_same_run("run", trained(module))


@BOTH
def test_files_of_no_run_and_of_the_other_script_are_refused(module, trained):
    for stray in ("best.pth", "log.jsonl", "round0/labels/x.png"):
        out = Path(f"of {stray[:4]}")
        path = Path(out, "stage1" if module is intrada else ".", stray)
        common.write_text(path, "")
        refuses("but no last.pth", module, FLAGS[module].replace("--out run", ""), "--out", out)
    sibling = {intrada: bcl, bcl: intrada}[module]
    flags = [FLAGS[sibling], "--out", trained(module)]
    refuses(f"holds a run of {module.__name__}.py", sibling, *flags)


@BOTH
def test_a_repaired_image_lets_the_run_resume(module, broken):
    """The identity of a run has the names of its images alone, not their sizes."""
    flags = f"{FLAGS[module]} --data-root broken"
    flags += " --stop-iters 6 --stage 1" if module is intrada else ""
    unseen = damage_unseen(broken)
    refuses("cannot read broken", module, flags)
    for path in unseen:
        draw(path, size=(100, 80))
    succeed(module, flags)
    assert len(records("run/stage1" if module is intrada else "run", "start")) == 2


def test_stop_iters_may_grow():
    """Stopped at 4 and resumed to 6, or 6 from the start: the same to the last bit."""
    flags = f"{INTRADA} --stage 1 --eval-every 2"
    succeed(intrada, flags)
    assert last("run/stage1")["iter"] == 4
    succeed(intrada, flags, "--stop-iters 6")
    succeed(intrada, flags, "--stop-iters 6 --out whole")
    assert_same_run("run", "whole")


@BOTH
def test_what_is_not_finite_is_not_saved(module):
    flags = "--lr 1e35 --log-every 100 --eval-every 0 --save-every 1"
    flags += " --stage 1" if module is intrada else " --warmup-iters 0"
    refuses("a weight is not finite at iteration", module, FLAGS[module], flags)
    saved = last("run/stage1" if module is intrada else "run")
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_loss_that_is_not_finite_is_named():
    real = intrada.domain_loss
    calls = itertools.count()

    def broken_loss(logits, domain):  # the fourth iteration; 6 calls in each
        return real(logits, domain) * (math.nan if next(calls) == 3 * 6 else 1)

    with mock.patch.object(intrada, "domain_loss", broken_loss):
        refuses("loss_adv_main is nan at iteration 4", intrada, INTRADA, "--stage 1")
    assert last("run/stage1")["iter"] == 3  # from before


@BOTH
def test_labels_of_target_training_images_are_never_opened(module, broken, trained):
    """Without them, a run ends at the same weights."""
    shutil.rmtree(broken / "Cityscapes/gtFine/train")
    succeed(module, FLAGS[module], "--data-root broken")
    for path in trained(module).rglob("last.pth"):
        own = last(Path("run", path.relative_to(trained(module)).parent))
        assert same(own["model"], last(path.parent)["model"])


# ====================================================================== processes and precision


def two_processes(module, flags, dies_at=None):
    """A script in two processes as torchrun starts them, forked, which saves importing torch: their
    exit statuses. The second kills itself at the losses of iteration dies_at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    real = common.Log.losses

    def losses(log, it, *args, **more):
        if it == dies_at and common.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(log, it, *args, **more)

    def run(rank):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in variables.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test")
        with mock.patch.object(common.Log, "losses", losses):
            return call(module, *flags)[0]

    children = [forked(functools.partial(run, rank)) for rank in (0, 1)]
    return [exit_status(child) for child in children]


def assert_moved_alike(start, one, two):
    """Two networks moved away from the start, and by nearly the same."""
    moved = sum((one[name] - start[name]).abs().sum() for name in start)
    apart = sum((one[name] - two[name]).abs().sum() for name in start)
    assert moved > 0 and apart < 0.1 * moved


def test_two_processes_follow_one(trained):
    """With half of the batch each. One of the two is killed, and both resume under torchrun."""
    init = trained(intrada) / "stage1/last.pth"
    flags = [INTRADA, "--bn running --lr 1e-3 --init", init]
    succeed(intrada, *flags, "--out one")
    flags += ["--out two --batch-size 1"]
    assert -signal.SIGKILL in two_processes(intrada, flags, dies_at=3)
    assert last("two/stage1")["iter"] == 2
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2"
    done = process(torchrun, HERE / "intrada.py", *flags)
    assert done.returncode == 0 and done.stdout.count("mIoU 19") == 1, done.stderr
    assert [r["iter"] for r in records("two/stage1", "start")] == [0, 2]
    for stage in ("stage1", "stage3"):
        one = last(f"one/{stage}")
        two = last(f"two/{stage}")
        for part in ("model", "discriminators"):
            assert_moved_alike(torch.load(init, weights_only=True)[part], one[part], two[part])
        assert np.allclose(terms(f"one/{stage}"), terms(f"two/{stage}"), rtol=0.01)
        scores = [records(f"{run}/{stage}", "evaluation")[-1]["miou19"] for run in ("one", "two")]
        assert scores[0] == approx(scores[1], abs=0.1)
    rankings = [ranking_of(f"{run}/stage2") for run in ("one", "two")]
    assert [row["name"] for row in rankings[0]] == [row["name"] for row in rankings[1]]
    refuses("batch_size is 1 there and 2 here; processes is 2 there and 1 here",
            intrada, *flags[:3], "--out two")  # fmt: skip


def test_two_processes_of_bcl_follow_one(trained):
    """The labels of a round are those of one process; the EMA is one, of both."""
    init = trained(bcl) / "warmup/last.pth"
    flags = [BCL, "--warmup-iters 0 --bn running --lr 1e-3 --round-iters 2 --init", init]
    succeed(bcl, *flags, "--out one")
    assert two_processes(bcl, [*flags, "--out two --batch-size 1"]) == [0, 0]
    labels = sorted(name for name in files_of("one") if name.startswith("round0/labels"))
    assert len(labels) == 11
    for name in labels:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes(), name
    one, two = last("one"), last("two")
    assert_moved_alike(torch.load(init, weights_only=True)["model"], one["model"], two["model"])
    for ema in ("ema_source", "ema_target"):
        assert torch.equal(one[ema]["seen"], two[ema]["seen"])
        assert torch.allclose(one[ema]["mean"], two[ema]["mean"], rtol=0.02, atol=0.02)


def test_local_rank_alone_is_no_torchrun(monkeypatch):
    """Some clusters set it for every job."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert common.set_up("cpu") == torch.device("cpu") and common.world_size() == 1


def test_a_bug_shows_its_traceback_and_ends_the_readers():
    with mock.patch.object(common, "average_over_ranks", lambda *modules: 1 / 0):
        status, _, err = call(intrada, INTRADA, "--stage 1 --workers 2")
    assert status == 1 and "ZeroDivisionError" in err and "Traceback" in err
    assert not multiprocessing.active_children()


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WAYS = [  # flags, how far from float32 on the CPU
    ("--amp", 0.03), ("--compile", 1e-4),
    pytest.param("--device cuda --no-amp", 0.03, marks=CUDA),
    pytest.param("--device cuda --amp --compile", 0.03, marks=CUDA),
]  # fmt: skip


@pytest.mark.parametrize("flags, tolerance", WAYS)
def test_fast_ways_follow_float32_on_the_cpu(flags, tolerance, trained):
    """On the CPU compiled code is traced and differentiated, but not generated: that takes long."""
    options = [INTRADA, "--stage 1 --eval-every 0 --init", trained(intrada) / "stage1/last.pth"]
    succeed(intrada, *options, "--out a")
    backend = "inductor" if "cuda" in flags else "aot_eager"
    real = functools.partial(torch.compile, backend=backend)
    with mock.patch.object(torch, "compile", side_effect=real) as compiled:
        succeed(intrada, *options, "--out b", flags)
    a = terms("a/stage1")
    b = terms("b/stage1")
    assert len(a) == 4 and np.allclose(a, b, rtol=tolerance)
    assert "--amp" not in flags or a != b
    assert (compiled.call_count >= 3) == ("--compile" in flags)  # G, I and CE
    one = last("a/stage1")["model"]
    other = last("b/stage1")["model"]
    assert_close(other, one, rtol=tolerance / 2, atol=tolerance / 2)
    if "cuda" in flags:
        succeed(bcl, BCL, flags)
        assert np.isfinite(terms("run")).all()


# ====================================================================== pictures


def test_colours_of_classes():
    """Cityscapes' own; far apart and never black for another set."""
    table = common.palette(CLASSES)
    assert table[[0, 13]].tolist() == [[128, 64, 128], [0, 0, 142]] and not table[19:].any()
    for count in (2, 11, 19, 20):
        colours = common.palette(tuple(map(str, range(count)))).astype(int)
        apart = np.abs(colours[:count, None] - colours[None, :count]).sum(2)
        assert (apart + 999 * np.eye(count)).min() > 40 and colours[:count].sum(1).min() > 90
        assert not colours[count:].any()


def test_changes():
    rows = ((1, 2, 2, 1), (2, 1, 3, 1), (2, 2, 4, 1))
    before, after, truth = (np.array([row], np.uint8) for row in rows)
    right, wrong, other, equal = common.changes(before, after, truth)[0].tolist()
    assert right[1] > 150 > right[0] and wrong[0] > 200 > wrong[1]
    assert other[0] > 150 and other[1] > 150 and equal == [40] * 3
    ignored = common.changes(before, after, truth * 0 + 255)
    assert (ignored == 40).all()


def test_grid_and_its_legend():
    """Each picture with its own aspect, and the colours of the classes that occur."""
    image = read(draw("image.png", size=(64, 32)))
    label = np.full((32, 32), 255, np.uint8)
    label[:16] = 13
    label[:, :16] = 0
    common.write_grid("grid.png", ["a", "b"], [[image, label]] * 2, CLASSES, ["x", "y"])
    grid = np.asarray(Image.open("grid.png").convert("RGB"))
    colours = common.palette(CLASSES)
    assert grid.shape[1] == 320 + 2 + 160 + 2
    larger = Image.fromarray(image).resize((320, 160), Image.BICUBIC)
    for top in (20, 20 + 160 + 20):  # below the titles and the first row's caption
        assert np.array_equal(grid[top : top + 160, :320], np.asarray(larger))
        cell = colours[np.repeat(np.repeat(label, 5, 0), 5, 1)]
        assert np.array_equal(grid[top : top + 160, 322:482], cell)
        assert grid[top + 160 : top + 180].min() < 99  # the caption
    squares = [(grid[380:] == colours[c]).all(2).sum() for c in range(19)]  # of the legend
    assert squares[0] == squares[13] == 12 * 12 and sum(n > 20 for n in squares) == 2


def test_training_leaves_pictures(trained):
    """Panels of the image, its labels, two predictions, what changed and the entropy."""
    paths = list(common.list_images("cityscapes", "scenes/Cityscapes", "val").values())
    for module, last_stage in ((intrada, "stage3"), (bcl, ".")):
        panel = np.asarray(Image.open(trained(module) / "panel.png").convert("RGB"))
        assert panel.shape[1] == 6 * 162 and panel.shape[0] >= 20 + 4 * 180 + 20
        means = {}
        for path in paths:
            larger = Image.open(path).resize((160, 160), Image.BICUBIC)
            places = [y for y in range(20, 740, 180) if (panel[y : y + 160, :160] == larger).all()]
            G = common.load(trained(module) / last_stage / "last.pth")
            entropy = 255 * plain_entropy(plain_logits(G, path))
            means.update({y: entropy.mean() for y in places})
            for y in places:
                assert panel[y : y + 160, -162:-2].mean() == approx(entropy.mean(), abs=1)
        assert len(means) == 4 and means[20] <= means[200] <= means[380] <= means[560]
    gallery = Image.open(trained(intrada) / "stage2/gallery.png")
    assert gallery.width == 3 * 162 and gallery.height >= 20 + 6 * 180 + 20


# ====================================================================== mistakes of users

EITHER = [  # flags that both scripts refuse; what the sentence names
    ("--unknown 1", "--unknown"), ("--source kitti", "--source"), ("--lr x", "--lr"),
    ("--target-size 20x20", "--target-size"), ("--target-size 64", "--target-size"),
    ("--layers 1,2,3", "--layers"), ("--num-classes 7", "--num-classes"),
    ("--batch-size 0", "--batch-size"), ("--save-every 0", "--save-every"),
    ("--init imagenet", "--init"), ("--init nowhere.pth", "nowhere.pth"), ("--init file", "file"),
    ("--init folder", "folder"), ("--init trunk.pth", "trunk.pth"),
    ("--data-root nowhere", "nowhere"), ("--target-root nowhere", "nowhere"),
    ("--data-root folder", "folder"), ("--target folder", "--target-root"),
    ("--source cityscapes", "--source cityscapes"), ("--source-root folder", "folder/images"),
    ("--source folder --source-root folder --target folder --target-root folder", "same folder"),
    ("--compile --checkpoint-activations", "--compile"), ("--out file/run", "file"),
    ("--out scenes/GTA5/images/run", "lies inside"), ("--target-list nowhere.txt", "nowhere.txt"),
    ("--out scenes/Cityscapes/leftImg8bit/train/run", "lies inside"),
    ("--source-list file", "file: 0 of 1 names found"), ("--workers -1", "--workers"),
]  # fmt: skip
MISTAKES = [(module, *row) for module in (intrada, bcl) for row in EITHER]
MISTAKES += [
    (intrada, "--stop-iters 7", "--stop-iters"), (intrada, "--ckpt file --stage 3", "--ckpt"),
    (intrada, "--ranking folder", "--ranking"), (intrada, "--ratio 0.09", "--ratio"),
    (intrada, "--ratio 67", "--ratio"), (intrada, "--stage 3 --ranking folder", "folder"),
    (intrada, "--stage 2 --ckpt file", "file"),
    (intrada, "--stage 2 --ckpt seven.pth", "seven.pth"),
    (bcl, "--tau 2", "--tau"), (bcl, "--momentum 1.5", "--momentum"), (bcl, "--crop 16", "--crop"),
    (bcl, "--temperature 0", "--temperature"), (bcl, "--static-ratio 10", "--static-ratio"),
    (bcl, "--labels mine", "--labels"), (bcl, "--scales 1,x", "--scales"),
]  # fmt: skip


def refuses_and_writes_nothing(culprit, module, *flags):
    before = files_of(".")
    refuses(culprit, module, *flags)
    assert files_of(".") == before


@pytest.mark.parametrize("module, flags, culprit", MISTAKES)
def test_mistakes_in_flags(module, flags, culprit):
    Path("file").write_text("neither a checkpoint nor a list")
    Path("folder").mkdir()
    torch.save({"conv1.weight": STEM}, "trunk.pth")
    if "seven" in flags:
        torch.save(noisy_network(0, 7).state_dict(), "seven.pth")
    try:
        refuses_and_writes_nothing(culprit, module, FLAGS[module], flags)
    finally:
        for folder in ("GTA5/images", TRAIN):  # the data are all tests'
            shutil.rmtree(f"scenes/{folder}/run", ignore_errors=True)


BAD_DATA = [  # files below the data root; what they become; what the sentence names
    ("GTA5/images/00001.png", HALF, "00001.png"),
    ("GTA5/images/00001.png", np.full((64, 64), 3000, np.uint16), "00001.png"),
    ("GTA5/labels/00001.png", np.zeros((64, 64, 3), np.uint8), "00001.png has RGB"),
    ("GTA5/labels/00001.png", np.full((64, 30), 7, np.uint8), "do not belong together"),
    ("GTA5/labels/*", np.full((64, 64), 1, np.uint8), "00001.png"),
    ("GTA5/labels/*", np.full((64, 64), [1, 8] * 32, np.uint8), "trainIds"),  # few ids, low ones
    ("Cityscapes/gtFine/val/*/*", np.full((64, 64), 255, np.uint8), "gtFine/val"),
    (f"{TRAIN}/aldenburg/*", HALF, TRAIN),
]


@pytest.mark.parametrize("pattern, content, culprit", BAD_DATA)
def test_damaged_data(pattern, content, culprit, broken):
    for path in broken.glob(pattern):
        if content is HALF:
            path.write_bytes(HALF)
        else:
            Image.fromarray(content).save(path)
    for module in (intrada, bcl):
        refuses_and_writes_nothing(culprit, module, FLAGS[module], "--data-root broken")


@BOTH
def test_an_out_inside_a_plain_folder_of_images_is_refused(module):
    """The next run would read its pictures; also where all images lie one folder deeper."""
    for folder in ("flat/images", "deep/images/a"):
        for name in "01":
            draw(f"{folder}/{name}.png", size=(64, 64))
    for root in ("flat", "deep"):
        flags = f"--target folder --target-root {root} --out {root}/images/run"
        refuses("lies inside", module, FLAGS[module], flags)


@BOTH
def test_lists_choose_the_images_of_training(module):
    Path("source.txt").write_text("00003.png\n00007.png\n00001.png\n")
    names = list(common.list_images("cityscapes", "scenes/Cityscapes"))[2:6]
    Path("target.txt").write_text("\n".join(names))
    flags = "--source-list source.txt --target-list target.txt"
    flags += " --stage 1" if module is intrada else " --warmup-iters 0 --rounds 1 --round-iters 1"
    succeed(module, FLAGS[module], flags)
    data = records("run/stage1" if module is intrada else "run", "start")[0]["data"]
    assert data.startswith("3 ") and ", 4 target images" in data
    if module is bcl:
        labels = Path("run/round0/labels")
        assert files_of(labels) == {f"{name}.png" for name in names}


@BOTH
def test_plain_folders_of_three_classes(module):
    for part in ("source/{}/train", "target/{}/train", "target/{}/val"):
        for name in "0123":
            draw(f"{part.format('images')}/{name}.png", size=(64, 64))
            stripes(f"{part.format('labels')}/{name}.png", (0, 1, 2, 255))
    for root in ("source", "target"):
        Path(root, "classes.txt").write_text("cat\ndog\nhen\n")
    flags = "--source folder --source-root source --target folder --target-root target"
    flags += " --num-classes 3"
    flags += " --stop-iters 2" if module is intrada else " --rounds 1"
    out = succeed(module, FLAGS[module], flags)
    assert "mIoU 3" in out and "hen" in out and "mIoU 19" not in out
    if module is intrada:
        refuses("--normalize-entropy", module, FLAGS[module], flags, "--normalize-entropy --out n")
    Path("source/classes.txt").write_text("cat\nhen\ndog\n")
    refuses("different classes", module, FLAGS[module], flags, "--out new")


def test_a_failure_that_cannot_be_printed_has_its_status():
    """On a full disk, or without standard error."""
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        for stream in (full, None):
            with mock.patch.object(sys, "argv", ["intrada.py", "--ratio", "5"]):
                with mock.patch.object(sys, "stderr", stream), pytest.raises(SystemExit) as end:
                    common.launch(intrada.main)
            assert end.value.code == 2


SENTENCES = [  # an exception, what is said of it
    (torch.cuda.OutOfMemoryError("CUDA out of memory"), "--checkpoint-activations"),
    (MemoryError(), "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (OSError(24, "Too many open files"), "ulimit -n"),
    (PermissionError(13, "Permission denied", "a.png"), "a.png'. Change its permissions"),
    (FileNotFoundError(2, "No such file", "a.png"), "a.png"),
    (KeyError("x"), None), (RuntimeError("shape"), None), (ValueError("x"), None),
]  # fmt: skip


@pytest.mark.parametrize("error, sentence", SENTENCES)
def test_what_is_said_of_an_exception(error, sentence):
    found = common.explain(error)
    assert found is sentence is None or (sentence in found and "\n" not in found)


@BOTH
def test_help_shows_flags_soon_and_whose_each_number_is(module):
    lines = succeed(module, "--help").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("  --data-root"))
    assert first < 30
    text = " ".join(" ".join(lines).split())
    assert "Where this differs" not in text and "(paper)" in text and "(released)" in text
    default = "0.67" if module is intrada else "0.1"
    assert f"(default: {default})" in text


# ====================================================================== eval.py

EVAL = f"--data-root scenes {CPU}"


def save(path, network, size=(64, 64), **more):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    content = {"format": common.FORMAT, "model": network.state_dict(), "input_size": size}
    torch.save({**content, **more}, path)


def val_pairs():
    return common.list_pairs("cityscapes", Path("scenes/Cityscapes"), "val")


def plain_score(networks, pairs, input_size):
    """(confusion (19,19), {name: (prediction, entropy)}) step by step, from label ids."""
    confusion = np.zeros((19, 19), int)
    answers = {}
    for name, (image, label) in pairs.items():
        logits = sum(plain_logits(network, image, input_size) for network in networks)
        logits = logits / len(networks)
        prediction = logits.argmax(0).numpy()
        for c, value in enumerate(CITYSCAPES_IDS):
            confusion[c] += np.bincount(prediction[read(label) == value], minlength=19)
        answers[name] = (prediction, plain_entropy(logits))
    return confusion, answers


def test_scores_and_pictures():
    """Two averaged checkpoints against a plain forward pass at the labels' size."""
    networks = [noisy_network(0), noisy_network(1)]
    save("a.pth", networks[0], (96, 64))
    save("b.pth", networks[1], (32, 32))  # the first file says the input size
    out = succeed(eval_script, EVAL, "--ckpt a.pth b.pth --save-dir out")
    confusion, answers = plain_score(networks, val_pairs(), (96, 64))
    for name, (prediction, entropy) in answers.items():
        picture = Image.open(f"out/{name}_trainids.png")
        assert (np.asarray(picture) != prediction).mean() < 1e-3
        colours = common.palette(CLASSES)[np.asarray(picture)]
        assert np.array_equal(picture.convert("RGB"), colours)
        assert np.abs(read(f"out/{name}_entropy.png")[..., 0] - 255 * entropy).max() < 1
    found = json.loads(Path("out/scores.json").read_text())
    assert np.abs(found["confusion"] - confusion).sum() <= 4  # of 20,480 pixels
    assert np.sum(found["confusion"], 1).tolist() == confusion.sum(1).tolist()  # rows are labels
    expected = common.scores(torch.tensor(found["confusion"]), CLASSES)
    assert all(found[name] == expected[name] for name in expected) and found["seconds"] > 0
    assert found["ckpt"] == ["a.pth", "b.pth"] and found["input_size"] == [96, 64]
    assert (found["target"], found["split"]) == ("cityscapes", "val")
    assert found["target_list"] is None and found["images"] == 5
    for text in ("cityscapes val, input 96x64", "mIoU 13", "5 images", "images/s"):
        assert text in out
    assert f"{'road':16}{found['iou']['road']:>14.1f}" in out
    assert Image.open("out/panel.png").width > 5 * 160  # image, truth, two, changes, entropy
    assert len([path for path in Path("out").rglob("*") if path.is_file()]) == 2 + 2 * 5


def test_label_ids_have_the_names_that_the_official_evaluator_reads():
    """It looks for exactly one <city>_<seq>_<frame>*.png of every image below the folder."""
    network = noisy_network()
    save("net.pth", network)
    succeed(eval_script, EVAL, "--ckpt net.pth --label-ids --save-dir ids")
    _, answers = plain_score([network], val_pairs(), (64, 64))
    for name, (prediction, _) in answers.items():
        (path,) = Path("ids").rglob(f"{name.split('/')[-1]}*.png")
        assert path.name.endswith("_pred_labelIds.png") and Image.open(path).mode == "L"
        assert (read(path) != np.array(CITYSCAPES_IDS)[prediction]).mean() < 1e-3
    assert json.loads(Path("ids/scores.json").read_text())["images"] == 5


def test_test_labels_are_not_read():
    save("net.pth", noisy_network())
    name = "berlin/berlin_000000_000019"
    draw(f"data/Cityscapes/leftImg8bit/test/{name}_leftImg8bit.png", size=(100, 50))
    flags = f"{CPU} --data-root data --ckpt net.pth --split test"
    with mock.patch.object(common, "read_label", side_effect=AssertionError):
        succeed(eval_script, flags, "--label-ids --save-dir ids")
    assert [path.name for path in Path("ids").rglob("*")] == [f"{name[7:]}_pred_labelIds.png"]
    ids = read(f"ids/{name[7:]}_pred_labelIds.png")
    assert ids.shape == (50, 100) and set(np.unique(ids)) <= set(CITYSCAPES_IDS)
    refuses("test labels are empty", eval_script, flags)


@pytest.mark.parametrize("flag", ["", "--ckpt"])
def test_the_newest_checkpoint_and_a_list(flag):
    network = noisy_network()
    for name, age in {"b/last": 30, "a/stage3/last": 10, "c/last": 20, "d/best": 0}.items():
        save(f"runs/{name}.pth", network, (96, 32))
        os.utime(f"runs/{name}.pth", (1e9 - age, 1e9 - age))
    names = [name.split("/")[-1] for name in val_pairs()]
    Path("names.txt").write_text("\n".join(names[:2]))
    flags = f"{EVAL} --target-list names.txt --save-dir out"
    out = succeed(eval_script, flags, flag)
    assert "runs/a/stage3/last.pth: our checkpoint" in out
    assert "2 images" in out and "input 96x32" in out
    assert json.loads(Path("out/scores.json").read_text())["target_list"] == "names.txt"
    Path("names.txt").write_text(f"{names[0]}\nnobody\n")
    refuses("1 of 2 names found, not found: nobody", eval_script, flags, flag)


def test_without_a_data_root_the_drawn_scenes_are_scored():
    save("net.pth", noisy_network())
    with mock.patch.object(demo, "demo_scenes", lambda source: Path("scenes")):
        out = succeed(eval_script, CPU, "--ckpt net.pth")
    assert "Built-in scenes" in out and "--data-root DIR" in out and "5 images" in out
    assert not list(Path().glob("*.json")) and not list(Path().rglob("*trainids*"))


def test_classes_of_a_plain_folder():
    save("net.pth", noisy_network(0, 3))
    for name in "ab":
        draw(f"own/images/{name}.png", size=(64, 64))
        stripes(f"own/labels/{name}.png", (0, 1))
    Path("own/classes.txt").write_text("cat\ndog\nhen\n")
    flags = f"{CPU} --ckpt net.pth --target folder --target-root own"
    out = succeed(eval_script, flags, "--save-dir out")
    assert "all images of own, input" in out and "folder val" not in out
    for name in ("cat", "dog", "hen", "mIoU 3"):
        assert f"\n{name}" in out
    picture = Image.open("out/a_trainids.png")
    colours = common.palette(("cat", "dog", "hen"))[np.asarray(picture)]
    assert np.array_equal(picture.convert("RGB"), colours)
    assert json.loads(Path("out/scores.json").read_text())["split"] is None
    refuses("--label-ids", eval_script, flags, "--label-ids --save-dir ids")
    refuses("own/images", eval_script, flags, "--save-dir own/images/out")
    Path("own/classes.txt").write_text("cat\ndog\n")
    refuses("classes.txt", eval_script, flags)
    for part in ("images", "labels"):
        Path(f"own/{part}/val").mkdir()
        Path(f"own/{part}/a.png").rename(f"own/{part}/val/a.png")
    Path("own/classes.txt").unlink()
    out = succeed(eval_script, flags)
    assert "folder val, input" in out and "1 images" in out and "no pixel has class 2" in out


def test_your_images():
    """Folders, globs and files of any mode and size; broken files are named, the rest is done."""
    network = noisy_network(0, 5)
    save("net.pth", network, (96, 64))
    rgb = read(draw("rgb.png", size=(70, 50)))
    for folder in ("in/a", "other"):
        Path(folder).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    photo = Image.fromarray(rgb)
    photo.save("in/a/turned.png", exif=exif)
    photo.convert("P").save("in/palette.PNG")
    photo.convert("RGBA").save("other/alpha.webp", lossless=True)
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save("in/deep.png")
    Path("in/broken.jpg").write_bytes(b"no image")
    Path("in/notes.txt").write_text("no image")
    flags = "--ckpt net.pth --device cpu --images in oth*/*.webp rgb.png in/palette.PNG --save-dir"
    status, out, err = call(eval_script, flags, "out")
    assert status == 2 and err == "error: 2 of 6 images could not be read. See above.\n"
    assert "left out: cannot read in/broken.jpg" in out and "left out: in/deep.png has" in out
    assert "4 images segmented" in out
    palette = np.array(Image.open("in/palette.PNG").convert("RGB"))
    pixels = {"a/turned": np.rot90(rgb, -1), "palette": palette, "alpha": rgb, "rgb": rgb}
    kinds = ("trainids", "overlay", "entropy")
    written = {path.relative_to("out").as_posix() for path in Path("out").rglob("*.png")}
    assert written == {f"{name}_{kind}.png" for name in pixels for kind in kinds}

    def check(folder, name, input_size):
        height, width = pixels[name].shape[:2]
        Image.fromarray(pixels[name]).save("upright.png")
        logits = plain_logits(network, "upright.png", input_size, (width, height))
        ids, overlay, entropy = [read(f"{folder}/{name}_{kind}.png").astype(int) for kind in kinds]
        assert (ids != logits.argmax(0).numpy()).mean() < 2e-3
        colours = common.palette(common.class_names(5))[ids].astype(int)
        assert np.array_equal(overlay, (pixels[name] + colours) // 2)
        assert np.abs(entropy[..., 0] - 255 * plain_entropy(logits)).max() <= 1

    for name, photo in pixels.items():  # the trained area, the photo's own aspect
        height, width = photo.shape[:2]
        factor = math.sqrt(96 * 64 / (width * height))
        check("out", name, (round(width * factor), round(height * factor)))
    pixels["turned"] = pixels["a/turned"]
    succeed(eval_script, CPU, "--ckpt net.pth --images in/a --input-size 64x32 --save-dir b")
    check("b", "turned", (64, 32))


def test_your_images_overwrite_nothing():
    save("net.pth", noisy_network())
    for name in ("one/a.png", "two/a.jpg", "one/b.png", "one/b.jpg"):
        draw(name)
    flags = "--ckpt net.pth --device cpu --images"
    for images in ("one/a.png two", "one", "one/*.png two"):
        refuses("would both be written as", eval_script, flags, images, "--save-dir out")
    for folder in ("two", "two/out"):
        refuses("Write elsewhere", eval_script, flags, "two --save-dir", folder)
    refuses("holds two/a.jpg", eval_script, flags, "tw*/*.jpg --save-dir two")
    assert not Path("out").exists() and len(list(Path("two").iterdir())) == 1
    succeed(eval_script, flags, "two two/a.jpg --save-dir out")  # the same file twice is one
    assert len(list(Path("out").iterdir())) == 3


REFUSED = [  # flags, what the sentence says
    ("", "runs/"), ("--ckpt", "no last.pth below runs/"), ("--ckpt file", "file cannot be read"),
    ("--ckpt folder", "name the file"), ("--input-size 10x64", "--input-size needs"),
    ("--images folder --save-dir out --ckpt net.pth", "--images folder: no image"),
    ("--images *.jpg --save-dir out --ckpt net.pth", "--images *.jpg: no image"),
    ("--images a.png", "Add --save-dir"), ("--label-ids", "Add --save-dir"),
    ("--images a.png --save-dir out --data-root scenes", "Leave out --data-root"),
    ("--ckpt net.pth --data-root nowhere", "nowhere"),
    ("--ckpt net.pth --target acdc --data-root scenes", "no acdc folder"),
    ("--target folder", "--target-root"), ("--split test", "test labels are empty"),
    ("--ckpt net.pth seven.pth --data-root scenes", "seven.pth has 7"),
    ("--ckpt seven.pth --data-root scenes", "predicts 7 classes, cityscapes has 19"),
    ("--ckpt net.pth --data-root scenes --target-list file", "file: 0 of 1 names found"),
    ("--ckpt net.pth --data-root scenes --save-dir file", "cannot write file"),
    ("--ckpt net.pth --data-root scenes --save-dir scenes/Cityscapes/leftImg8bit", "lies inside"),
]  # fmt: skip


@pytest.mark.parametrize("flags, culprit", REFUSED)
def test_refusals_of_eval(flags, culprit, monkeypatch):
    Path("file").write_text("neither a checkpoint nor a name")
    Path("folder").mkdir()
    save("net.pth", noisy_network())
    save("seven.pth", noisy_network(0, 7))
    refuses(culprit, eval_script, flags, CPU)
    assert not Path("out").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    refuses("without torchrun", eval_script, "--ckpt net.pth")


# ====================================================================== tools


def tool(name):
    """A script of tools/ or demo/ as a module."""
    path = HERE / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_log(path, stage, seed, values, iters=20, classes=CLASSES, **settings):
    """A made-up log: mIoU `values` at iterations 10, 20, ...; the first class has twice that."""
    settings = {"seed": str(seed), "source": "gta5", "ranking": f"{seed:016x}", **settings}
    lines = [{"iter": 0, "event": "start", "stage": stage, "iters": iters, "settings": settings}]
    for i, value in enumerate(values, 1):
        iou = {**dict.fromkeys(classes), classes[0]: 2 * value}
        lines.append({"iter": 10 * i, "loss_seg": 1 / i, "lr": 1e-3})
        score = {f"miou{len(classes)}": value, "miou16": value + 1, "iou": iou}
        lines.append({"iter": 10 * i, "event": "evaluation", **score})
    common.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def test_compare():
    compare = tool("tools/compare")
    for seed, values in enumerate(((30, 20), (10, 24), (10, 31))):
        write_log(f"runs/warm{seed}/log.jsonl", "warm-up", seed, (1, 2))
        init = f"runs/warm{seed}/last.pth"
        write_log(f"runs/a{seed}/log.jsonl", "bcl", seed, values, init=init)
    for seed, values in enumerate(((8, 9), (8, 12), (8, 18), (8, 50)), 1):
        write_log(f"runs/b{seed}/log.jsonl", "bcl", seed, values, labels="static")
    out = succeed(compare, "BCL=runs/a? static=runs/b?/log.jsonl --minus static")
    last = (20, 24, 31)
    mean = sum(last) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in last) / 2)
    best = "28.3 ± 3.8"  # of 30, 24, 31
    row = f"| BCL | 3 | {mean:.1f} ± {deviation:.1f} | {best} |"
    differences = (24 - 9, 31 - 12)  # at the seeds 1 and 2
    error = math.sqrt(sum((x - 17) ** 2 for x in differences) / 1) / math.sqrt(2)
    assert f"{row} +17.0 ± {error:.1f} (2) |" in out
    assert "| static | 4 |" in out and "| +0.0 ± 0.0 (4) |" in out
    assert f"| road | {2 * mean:.1f} ± {2 * deviation:.1f} | 44.5 ± " in out
    assert "| sky | - | - |" in out and "mIoU 19, last" in out
    assert "minus" not in succeed(compare, "one=runs/b1").lower()


def test_compare_stops_at_runs_that_differ_in_more_than_their_seed():
    compare = tool("tools/compare")
    for seed in (0, 1):
        write_log(f"runs/w{seed}/log.jsonl", "warm-up", seed, (1, 2), lr=f"{seed}")
        write_log(f"runs/i{seed}/log.jsonl", "bcl", seed, (1, 2), init=f"runs/w{seed}/last.pth")
        write_log(f"runs/t{seed}/log.jsonl", "bcl", seed, (1, 2), tau=f"0.{seed}", lr="1")
        write_log(f"runs/s{seed}/log.jsonl", f"stage{seed}", seed, (1, 2))
        write_log(f"runs/e{seed}/log.jsonl", "bcl", 7, (1, 2))
        write_log(f"runs/n{seed}/log.jsonl", "bcl", seed, (1,) * (2 - seed))
        write_log(f"runs/f{seed}/log.jsonl", "bcl", seed, (1, 2), init=f"file{seed}")
        classes = ("cat", "dog")[: 2 - seed]
        write_log(f"runs/c{seed}/log.jsonl", "bcl", seed, (1, 2), classes=classes)
    refuses("tau is 0.0 and 0.1.", compare, "x=runs/t?")
    refuses("lr of --init is 0 and 1.", compare, "x=runs/i?")
    refuses("init is file0 and file1.", compare, "x=runs/f?")
    refuses("stage is stage0 and stage1", compare, "x=runs/s?")
    refuses("seed 7 occurs twice", compare, "x=runs/e?")
    refuses("runs/n1/log.jsonl has 10 of 20 iterations", compare, "x=runs/n?")
    refuses("different classes", compare, "x=runs/c0 y=runs/c1")
    refuses("matches no run", compare, "x=nowhere*")
    Path("runs/empty").mkdir()
    refuses("no runs/empty/log.jsonl", compare, "x=runs/empty")
    refuses("write NAME=GLOB", compare, "runs/t0")
    refuses("write NAME=GLOB", compare, "x=runs/t0 x=runs/t1")
    refuses("--minus z is not a row", compare, "x=runs/t0 --minus z")


def test_compare_leaves_out_classes_of_which_the_source_has_no_pixel():
    write_log("runs/s/log.jsonl", "bcl", 0, (10, 20), source="synthia")
    out = succeed(tool("tools/compare"), "x=runs/s")
    assert "mIoU 16, last" in out and "| 21.0 | 21.0 |" in out
    assert "terrain" not in out and "| sky |" in out


def test_compare_reads_runs_of_ours(trained):
    folder = trained(intrada)
    out = succeed(tool("tools/compare"), f"A={folder}/stage1 B={folder}/stage3 --minus A")
    last = records(folder / "stage3", "evaluation")[-1]["miou19"]
    assert f"| B | 1 | {last:.1f} |" in out


def test_tsne():
    """Points are positions of the encoder's map; prototypes are means over all positions."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    network = noisy_network()
    save("net.pth", network)
    flags = "--ckpt net.pth --device cpu --data-root scenes --points 7 --out x/a"
    succeed(tool("tools/tsne"), flags)
    assert Image.open("x/a.png").width > 500
    found = np.load("x/a.npz")
    assert list(found["names"]) == list(CLASSES)
    source_pairs = common.list_pairs("gta5", Path("scenes/GTA5"))
    for domain, pairs in enumerate((source_pairs, val_pairs())):
        features = []
        labels = []
        for image, label in pairs.values():
            with torch.no_grad():
                features.append(network(common.normalize(read_rgb(image))).features[0].flatten(1))
            y = np.array(common.read_label(label, "cityscapes", 19))  # GTA5 has the same ids
            labels.append(picked(torch.from_numpy(y)[None], 9).flatten())
        features = torch.cat(features, 1).T
        labels = torch.cat(labels)
        assert len(labels[labels < 19].unique()) > 5
        for c in labels[labels < 19].unique().tolist():
            own = (found["domain"] == domain) & (found["label"] == c)
            points = torch.from_numpy(found["features"][own & ~found["is_prototype"]])
            prototype = torch.from_numpy(found["features"][own & found["is_prototype"]])
            every = features[labels == c]
            assert (prototype - every.mean(0, keepdim=True)).abs().max() < 1e-5 * features.max()
            distance, place = (every[None] - points[:, None]).abs().amax(2).min(1)
            assert distance.max() < 1e-5 * features.max()
            assert len(place.unique()) == len(points) == min(7, len(every))


def test_label_quality(trained):
    """Both tables against loops over pixels and positions, from last.pth and labels.json."""
    folder = trained(bcl)
    flags = "--data-root scenes --device cpu --save lq.png"
    out = succeed(tool("tools/label_quality"), folder, flags)
    assert Image.open("lq.png").width > 7 * 150
    content = last(folder)
    G = common.load(folder / "last.pth").train()
    bins = json.loads((folder / "round1/labels.json").read_text())["bins"]
    shapes = {"short_side": 64, "scales": (1.0, 1.5), "crop": 64, "flip": True}
    transform = functools.partial(bcl.augment, **shapes)
    pairs = common.list_pairs("gta5", Path("scenes/GTA5"))
    source = common.Labelled(pairs, "gta5", CLASSES, transform=transform)
    images = []
    for i, (image, label) in enumerate(val_pairs().values()):
        item = source[i, i * 7919 % 8]
        x_s = torch.from_numpy(item["image"]).permute(2, 0, 1)[None]
        with torch.no_grad():
            f_s = G(common.normalize(x_s)).features[0].double()
            T = G(common.normalize(read_rgb(image)))
        y_s = picked(torch.from_numpy(item["label"])[None], 9)[0]
        truth = torch.from_numpy(np.array(common.read_label(label, "cityscapes", 19)))
        confidence, answer = bigger(T.main)[0].softmax(0).max(0)
        own_bins = bcl.confidence_bins(confidence)
        static = torch.full((64, 64), 255)
        enough = torch.sort(own_bins.flatten(), descending=True).values[math.ceil(409.6) - 1]
        for h, w in product(range(64), range(64)):
            if own_bins[h, w] >= min(bins[answer[h, w]], enough):
                static[h, w] = answer[h, w]
        f_t = T.features[0].double()
        images.append((f_s, y_s, f_t, truth, static, T.main[0].argmax(0)))

    def prototypes(f, y):
        return {c: f[:, y == c].mean(1) for c in y.unique().tolist() if c < 19}

    def mean_over_images(each):
        counts = collections.Counter(c for own in each for c in own)
        return {c: sum(own[c] for own in each if c in own) / n for c, n in counts.items()}

    mu = []
    for name in ("ema_source", "ema_target"):
        seen = content[name]["seen"].nonzero().flatten().tolist()
        mu.append({c: content[name]["mean"][c].double() for c in seen})
    biases = {"ξ of the run": mu, "ξ = 0": [{}, {}]}
    biases["true ξ"] = [
        mean_over_images([prototypes(x[0], x[1]) for x in images]),
        mean_over_images([prototypes(x[2], picked(x[3][None], 9)[0]) for x in images]),
    ]
    tables = {}
    for f_s, y_s, f_t, truth, static, classified in images:
        true_map = picked(truth[None], 9)[0]
        static_map = picked(static[None], 9)[0]
        for bias, (mu_s, mu_t) in biases.items():
            p_st = prototypes(f_s, y_s)
            for c in p_st:
                if c in mu_s and c in mu_t:
                    p_st[c] = p_st[c] + mu_t[c] - mu_s[c]
            nearest = torch.full((9, 9), 255)
            for h, w in product(range(9), range(9)):
                similar = {c: F.cosine_similarity(f_t[:, h, w], p, dim=0) for c, p in p_st.items()}
                best = max(similar, key=similar.get)
                for tau in (-1, 0.5, 0.6, 0.7, 0.8, 0.9):
                    for group in ("all", "without y_F"):
                        counts = tables.setdefault((bias, group, tau), np.zeros(4))
                        y = true_map[h, w]
                        if y < 19 and (group == "all" or static_map[h, w] == 255):
                            sure = similar[best].item() > tau
                            right = [1, 1, best == y, classified[h, w] == y]
                            counts += np.array(right) * [1, sure, sure, sure]
                if similar[best] > 0.5:  # the run's τ
                    nearest[h, w] = best
            if bias == "ξ of the run":
                for h, w in product(range(64), range(64)):
                    y_d = nearest[round(h * 8 / 63), round(w * 8 / 63)]
                    hybrid = y_d if static[h, w] == 255 else static[h, w]
                    for kind, y in (("static", static[h, w]), ("dynamic", y_d), ("hybrid", hybrid)):
                        counts = tables.setdefault(kind, np.zeros(3))
                        if truth[h, w] < 19:
                            counts += [1, y < 255, y == truth[h, w]]
    printed = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    for key, (members, labelled, *hits) in tables.items():
        expected = [100 * labelled / members, *(100 * x / labelled for x in hits if labelled)]
        head = [key] if isinstance(key, str) else [*key[:2], str(key[2])]
        (row,) = [cells for cells in printed if cells[: len(head)] == head]
        numbers = [float(cell) for cell in row[len(head) :] if cell != "-"]
        assert len(numbers) == len(expected), key
        assert numbers == approx(expected, abs=0.06 + 300 / members), key  # few ties may differ


def test_label_quality_refuses_what_is_not_a_finished_run(trained):
    quality = tool("tools/label_quality")
    refuses("not a run of bcl.py", quality, trained(intrada) / "stage1")
    refuses("no run in nowhere", quality, "nowhere")
    content = last(trained(bcl))
    Path("half").mkdir()
    torch.save({**content, "iter": 3}, "half/last.pth")
    refuses("half has 3 of 6 iterations", quality, "half")


# ====================================================================== demo/camvid.py, initial.py


def camvid_tree(names):
    for part, stem in names:
        draw(f"cv/{part}/{stem}.png", size=(480, 360))
        label = np.random.default_rng(0).integers(0, 12, (360, 480), dtype=np.uint8)
        common.write_png(f"cv/{part}annot/{stem}.png", label)


def test_camvid():
    camvid = tool("demo/camvid")
    names = [("train", "0001TP_1"), ("train", "0006R0_1"), ("val", "0016E5_1")]
    names += [("test", "0001TP_2"), ("test", "Seq05VD_1")]
    camvid_tree(names)
    succeed(camvid, "cv out")
    written = {path.relative_to("out").as_posix() for path in Path("out").rglob("*.*")}
    places = {"0006R0_1": "day/{}", "0016E5_1": "day/{}", "Seq05VD_1": "day/{}"}
    places.update({"0001TP_1": "dusk/{}/train", "0001TP_2": "dusk/{}/val"})
    expected = {"day/classes.txt", "dusk/classes.txt"}
    for part, stem in names:
        image, label = [f"{places[stem].format(kind)}/{stem}.png" for kind in ("images", "labels")]
        expected |= {image, label}
        resized = Image.open(f"cv/{part}/{stem}.png").resize((320, 240), Image.BICUBIC)
        assert np.array_equal(read(f"out/{image}"), np.asarray(resized))
        nearest = Image.open(f"cv/{part}annot/{stem}.png").resize((320, 240), Image.NEAREST)
        ids = np.asarray(nearest)
        assert np.array_equal(read(f"out/{label}"), np.where(ids == 11, 255, ids))
    assert written == expected
    classes = common.dataset_classes("folder", Path("out/dusk"), 11)
    assert classes[0] == "sky" and classes[10] == "bicyclist"
    common.check_classes("folder", Path("out/day"), classes)
    assert len(common.list_pairs("folder", Path("out/dusk"), "val")) == 1
    assert len(common.list_pairs("folder", Path("out/day"))) == 3
    refuses("out exists", camvid, "cv out")


def test_camvid_writes_all_or_nothing():
    camvid = tool("demo/camvid")
    refuses("scenes/train: no image", camvid, "scenes out")
    camvid_tree([("train", "0001TP_1"), ("val", "0016E5_1"), ("test", "0016E5_2")])
    refuses("not both dusk", camvid, "cv out")
    camvid_tree([("test", "0001TP_2")])
    bad = np.full((360, 480), 12, np.uint8)
    common.write_png("cv/testannot/0001TP_2.png", bad)
    refuses("has the value 12", camvid, "cv out")
    assert not Path("out").exists()
    camvid_tree([("test", "0001TP_2")])
    Path("out.partial/day/images").mkdir(parents=True, exist_ok=True)
    draw("out.partial/day/images/old.png")  # of a call that was killed
    succeed(camvid, "cv out")
    assert not list(Path("out").rglob("old.png")) and not Path("out.partial").exists()
    Path("cv/valannot/0016E5_1.png").unlink()
    refuses("not of the same names", camvid, "cv other")


def test_initial_weights_train_with_one_weight_decay_and_write_where_they_are_told():
    initial = tool("demo/initial")
    tracked = (HERE / "demo/initial.pth").read_bytes()
    status, _, err = call(initial)
    assert status == 2 and "OUT" in err
    groups = []
    step = torch.optim.SGD.step

    def spy(optimizer, *inputs):
        groups.extend((g["lr"], g["lr_factor"], g["weight_decay"]) for g in optimizer.param_groups)
        return step(optimizer, *inputs)

    every = initial.draw
    short = {"SCENES": 8, "ITERATIONS": 2, "RAMP": 1}
    short["draw"] = lambda seed, count: every(seed, min(count, 8))
    with mock.patch.multiple(initial, **short), mock.patch.object(torch.optim.SGD, "step", spy):
        succeed(initial, "out.pth --threads 1")
    for i, (lr, factor, decay) in enumerate(groups):  # four groups in each of two iterations
        poly = (1 - i // 4 / 2) ** 0.9
        assert lr == approx(0.01 * poly * factor) and decay == 5e-4
    assert sorted(factor for _, factor, _ in groups[:4]) == [1, 1, 3, 4]
    network = common.load("out.pth")
    assert len(groups) == 8 and network.input_size == (256, 128)
    assert (HERE / "demo/initial.pth").read_bytes() == tracked


# ====================================================================== demo and house


def test_scenes():
    kinds = (("source",), ("target",), ("target", True), ("source",))
    drawn = [demo.draw_scene(np.random.default_rng(7), (96, 64), *kind) for kind in kinds]
    images = [image.tobytes() for image, _ in drawn]
    assert all(np.array_equal(label, drawn[0][1]) for _, label in drawn)
    assert images[0] == images[3] and len(set(images)) == 3  # they differ in appearance alone
    for kind, encoding in (("gta5", (8, 3)), ("synthia", (16, 2)), ("cityscapes", (8, 0))):
        root = common.dataset_root(kind, "scenes")
        data = common.Labelled(common.list_pairs(kind, root), kind, CLASSES)
        found = {value for item in data for value in np.unique(item["label"]).tolist()}
        assert found == {*range(19), 255} - set(common.ABSENT.get(kind, ()))
        assert data.label_paths[0].read_bytes()[24:26] == bytes(encoding)  # bits, colour type
    for part, count in (("train_easy", 6), ("train_hard", 4), ("val_easy", 3), ("val_hard", 2)):
        assert len(Path(f"scenes/{part}.txt").read_text().split()) == count
    demo.write_scenes("again", 0, (64, 64), (64, 64), 2, 10, 0)
    demo.write_scenes("other", 1, (64, 64), (64, 64), 2, 2, 0)
    for name in ("GTA5/images/00002.png", "GTA5/labels/00002.png"):
        assert Path("again", name).read_bytes() == Path("scenes", name).read_bytes()
        assert Path("other", name).read_bytes() != Path("scenes", name).read_bytes()
    with pytest.raises(FileExistsError):
        demo.write_scenes("again", 0, (64, 64), (64, 64), 1, 1, 0)


def test_demo_says_so_first():
    with mock.patch.object(demo, "write_scenes", lambda root, **_: shutil.copytree("scenes", root)):
        for module, flags in ((intrada, "--stage 1"), (bcl, "--rounds 1")):
            first = succeed(module, FLAGS[module].removeprefix(PLACES), flags).splitlines()[0]
            assert "Demo" in first and "--data-root" in first
    assert Path("runs/intrada/stage1/last.pth").exists() and Path("runs/bcl/last.pth").exists()


@BOTH
def test_defaults_of_the_demo_hold_without_a_data_root(module):
    with mock.patch.object(sys, "argv", [module.__name__, "--lr", "7"]):
        args = module.parse()
    assert args.demo and args.lr == 7  # a flag comes before the demo's default
    for name, value in module.DEMO.items():
        assert name == "lr" or getattr(args, name) == value, name
    with mock.patch.object(sys, "argv", [module.__name__, "--data-root", "x"]):
        args = module.parse()
    assert not args.demo and (args.layers, args.width) == ((3, 4, 23, 3), 64)
    assert args.init == "imagenet"


def test_the_house():
    """The scripts are siblings: none imports another; common knows none of them and no flag."""
    files = {path.name for path in HERE.iterdir() if path.is_file() and path.name[0] != "."}
    scripts = {"intrada.py", "bcl.py", "eval.py", "common.py", "test_smoke.py"}
    assert files == scripts | {"README.md", "requirements.txt", "LICENSE"}
    allowed = {"common": set(), "demo/scenes": {"common"}}
    allowed.update(intrada={"common"}, bcl={"common"}, eval={"common"})
    for name, ours in allowed.items():
        text = (HERE / f"{name}.py").read_text()
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M))
        assert imported & {"intrada", "bcl", "eval", "common", "tools"} == ours, name
        if name == "common":
            assert not imported & {"argparse", "demo"} and not re.search(r"\bargs\b", text)


REMOVED = "StopSignal pthread_sigmask _action_groups ranking_content labels_digest refuse_outputs"
REMOVED += " plan_outputs win32"


def test_lines_are_short_and_removed_mechanisms_are_gone():
    paths = [*HERE.glob("*.py"), *HERE.glob("demo/*.py"), *HERE.glob("tools/*.py")]
    for path in paths:
        text = path.read_text()
        long = [line for line in text.splitlines() if len(line) > 100]
        assert not long, (path, long)
        if path.name != "test_smoke.py":
            assert not [name for name in REMOVED.split() if name in text], path


def test_commands_of_the_documents_parse():
    """A variable of the shell stands for 1, or for what $from is in the tables' preambles."""
    modules = {"intrada": intrada, "bcl": bcl, "eval": eval_script}
    commands = []
    for name in ("README.md", "docs/results.md"):
        text = (HERE / name).read_text().replace("\\\n", " ")
        for common_flags in re.findall(r'^from="(.*)"$', text, re.M):
            text = text.replace("$from", common_flags)
        text = re.sub(r"\$\{?\w+(%[\w.]+)?\}?", "1", text)
        commands += re.findall(r"(?:python|torchrun)[^\n`;#]* (\w+)\.py([^\n`;#]*)", text)
    commands = [(modules[script], flags) for script, flags in commands if script in modules]
    assert len(commands) > 20 and {module for module, _ in commands} == set(modules.values())
    for module, flags in commands:
        with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *shlex.split(flags)]):
            module.parse()
