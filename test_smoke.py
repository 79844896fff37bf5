"""Tests: formulas against plain loops, files made by hand, every script from end to end.

    python -m pytest -q test_smoke.py        about two minutes on 2 CPU cores; no network needed

Contents: helpers · IntraDA's formulas · evaluation · BCL's formulas · network · weight files ·
          labels and images · dataset layouts · readers · the training loops · IntraDA's stages ·
          BCL's rounds · resume · processes and precision · pictures · mistakes of users ·
          eval.py · tools · demo and house
"""

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
    """The words of a command line. A string is split at spaces; a path or number is one word."""
    found = []
    for flag in flags:
        found += flag.split() if isinstance(flag, str) else [str(flag)]
    return found


def call(module, *flags):
    """Run a script's main in this process, so that torch is not imported again. Returns (exit
    status, stdout, stderr)."""
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
    """Run a script, which must succeed. Returns what it prints."""
    status, out, err = call(module, *flags)
    assert status == 0, err
    return out


def refuses(culprit, module, *flags):
    """Run a script. It must exit with 2 and end with one error sentence that holds `culprit`."""
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
    """Start a child process. Its exit status is what the function returns there."""
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
    """Run a script in a child process, which gets kill -9 at the count-th call of a function."""
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
    """Names of all files below a folder, without the lock."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix() for path in paths}


def assert_same_run(found, whole):
    """Two output folders have the same files to the last bit. Logs may differ in times, and in how
    often the run was started."""
    assert files_of(found) == files_of(whole)
    for name in files_of(whole):
        a, b = Path(found, name), Path(whole, name)
        if a.suffix == ".pth":
            assert same(last(a.parent, a.name), last(b.parent, b.name)), name
        elif a.name == "log.jsonl":
            scores = [[r["iou"] for r in records(p.parent, "evaluation")] for p in (a, b)]
            assert terms(a.parent) == terms(b.parent) and scores[0] == scores[1], name
        else:
            assert a.read_bytes() == b.read_bytes(), name


def draw(path, value=None, size=(8, 6)):
    """Write an image file of coloured noise, or of grey pixels that repeat `value`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if value is not None:
        pixels = np.resize(np.array(value, np.uint8), (size[1], size[0]))
    Image.fromarray(pixels).save(path)
    return path


def plain_folder(root, split="", ids=(0, 1, 2, 255)):
    """Write three images with labels of these ids. Returns the names of the three classes."""
    for name in "012":
        draw(Path(root, "images", split, f"{name}.png"), size=(64, 64))
        draw(Path(root, "labels", split, f"{name}.png"), ids, (64, 64))
    Path(root, "classes.txt").write_text("cat\ndog\nhen\n")
    return "cat", "dog", "hen"


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
    """A network with random weights, changed BatchNorm statistics, and logits of about 3."""
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
    keys = ("name", "entropy", "normalized_entropy")
    rows = [dict(zip(keys, (f"{i:04d}", *pair))) for i, pair in enumerate(values)]
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
    predictions[predictions == 6] = 0  # class 6 occurs nowhere, class 3 in predictions only
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


def test_confidence_bins_and_top_bins():
    """top_bins must find the highest bin that a search over all bins finds."""
    confidence = torch.tensor([0.0, 0.3, 0.9, 0.99998, 0.99999, 1.0])
    bins = bcl.confidence_bins(confidence)
    assert (bins.diff() > 0).all() and bins[0] == 0 and bins[-1] == bcl.BINS - 1
    assert (bcl.bin_lower_edge(bins) <= confidence).all()
    assert (confidence[:-1] < bcl.bin_lower_edge(bins + 1)[:-1]).all()
    rows = torch.tensor([[3, 0, 2, 5], [0, 0, 0, 0], [1, 0, 0, 0], [0, 7, 0, 1]])
    for ratio in (0, 0.1, 0.5, 0.6, 0.7, 0.71, 1):
        for row, found in zip(rows.tolist(), bcl.top_bins(rows, ratio).tolist()):
            fits = [b for b in range(4) if sum(row[b:]) >= ratio * sum(row)]
            assert found == (max(fits) if sum(row) and ratio else bcl.BINS)


def test_map_positions_stand_for_pixels_at_their_centres():
    labels = torch.randint(0, 19, (2, 33, 70))
    picked = common.pick(labels, 5, 9)
    for i, j in product(range(5), range(9)):
        assert torch.equal(picked[:, i, j], labels[:, round(i * 32 / 4), round(j * 69 / 8)])
    columns = torch.arange(1068)[None, None]  # position 30 of 133 lies midway between two pixels
    wanted = [round(i * 1067 / 132) for i in range(133)]
    assert common.pick(columns, 1, 133).tolist() == [[wanted]]
    for side, more in product(range(32, 1101, 3), (0, 1, 2)):  # what is enlarged is picked again
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


def test_discriminator():
    steps = list(intrada.discriminator(19))
    channels = (19, 64, 128, 256, 512, 1)
    for i, conv in enumerate(steps[::2]):
        assert (conv.in_channels, conv.out_channels) == channels[i : i + 2]
        assert (conv.kernel_size, conv.stride, conv.padding) == ((4, 4), (2, 2), (1, 1))
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
    """A factor is how often the released optimizer lists it: once for each enclosing module."""
    net = common.DeepLabV2(19, (3, 4, 23, 3), 2)
    listed = []
    for part in (net.conv1, net.bn1, net.layer1, net.layer2, net.layer3, net.layer4):
        for module in part.modules():
            listed += [id(parameter) for parameter in module.parameters()]
    groups = net.parameter_groups("released", 10)
    assert [len(group["params"]) for group in groups] == [1, 99, 4, 16]  # no BatchNorm: frozen
    for group, n in zip(groups, (1, 3, 4)):
        assert {listed.count(id(p)) for p in group["params"]} == {n}
    numbers = [(group["lr_factor"], group["weight_decay"]) for group in groups]
    assert numbers == [(1, 5e-4), (3, 1e-3), (4, 1.25e-3), (10, 5e-4)]
    paper = [(g["lr_factor"], g["weight_decay"]) for g in net.parameter_groups("paper", 9)]
    assert paper == [(1, 5e-4), (1, 5e-4), (1, 5e-4), (9, 5e-4)]


@pytest.mark.parametrize("drift, noise", [(0.1, 0.0), (0.1, 0.1), (0.0, 0.0)])
def test_released_recipe_follows_the_old_optimizer(drift, noise):
    """2,000 steps of a weight that torch 0.4.1's SGD lists n times, and of the same in ours."""
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
        moved = np.subtract(path[-1], path[300])  # after the momenta have built up
        assert moved[0] / moved[1] == approx(1, abs=0.01)
        if drift == 0:  # weight decay alone
            assert ours.item() == approx(old, abs=1e-4) and old < 0.998


def test_checkpointed_activations_change_memory_alone():
    image = 50 * torch.randn(1, 3, 128, 128)
    plain = common.DeepLabV2(19, (2, 1, 1, 1), 4)
    less = copy.deepcopy(plain)
    less.checkpoint_activations = True
    initial = copy.deepcopy(plain.state_dict())
    memory = []
    for net in (plain, less):
        kept = []
        hooks = (lambda tensor: [kept.append(tensor.numel()), tensor], lambda pair: pair[1])
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            prediction = net(image)
        memory.append(sum(kept))  # before the backward pass, which computes parts again
        (prediction.main.square().mean() + prediction.aux.square().mean()).backward()
    assert memory[1] < 0.6 * memory[0] and same(plain.state_dict(), less.state_dict())
    assert not same(initial, plain.state_dict())  # the statistics moved, once
    for a, b in zip(plain.parameters(), less.parameters()):
        assert same(a.grad, b.grad)


# ====================================================================== weight files

PUBLISHED = {  # kind of file: {how our name begins: how it begins there, None if it is not there}
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
    "bcl": ("conv1.weight", "layer1.0.conv1.weight", "layer6.conv2d_list.0.weight"),
    "scale": ("Scale.layer5.conv2d_list.0.weight",),
    "torchvision": ("fc.weight", "fc.bias"),
}


def file_name(kind, name):
    for ours, theirs in PUBLISHED[kind].items():
        if name.startswith(ours):
            return None if theirs is None else name.replace(ours, theirs, 1)
    return name


def published(kind):
    """What a published file holds: its names, random values, the size of the tests' network."""
    state = {file_name(kind, name): v for name, v in noisy_network().state_dict().items()}
    state.pop(None, None)
    state.update({name: torch.rand(4, 4) for name in UNUSED.get(kind, ())})
    return state


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


WRAPS = {
    "containers and prefixes": lambda state: {
        "ema": {"state_dict": prefixed("_orig_mod.module.", state)}, "epoch": 3,
    },
    "more tensors": lambda state: {"model": state, "a": {"b": torch.ones(2)}, "c": torch.ones(1)},
    "counters": lambda state: {**state, "bn1.num_batches_tracked": torch.tensor(7)},
}  # fmt: skip
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
            value = value.flip(1) * torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1) * 255
        assert_close(value, expected, rtol=1e-5, atol=0, msg=name)
    assert set(report.initialised) == {name for name in sources if sources[name] is None}
    beside = {"a.b", "c"} if wrap == "more tensors" else set()
    assert set(report.skipped) == state.keys() - set(sources.values()) | beside
    assert f"loaded {len(report.loaded)} tensors" in str(report)
    if kind in ("scale", "torchvision", "trunk"):
        refused("no trained classifier", common.load, "weights.bin")
    else:  # the architecture can be read off trained weights
        loaded = common.load("weights.bin")
        assert (loaded.num_classes, loaded.layers, loaded.width) == (19, (1, 1, 1, 1), 4)
        assert (loaded.layer5 is not None) == (kind == "advent") and not loaded.training
        assert loaded.input_size == ((1460, 730) if kind == "bcl" else (1024, 512))


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
BAD_WEIGHTS = [  # how a good content is made bad; what the sentence says
    (lambda fine: {"state_dict": fine, "ema": fine}, "state_dict and ema"),
    (lambda fine: {"encoder.a": STEM, "epoch": 3}, "encoder.a, epoch"),
    (lambda fine: {"state_dict": Malicious()}, "cannot be read as weights"),
    (lambda fine: {**fine, "conv1.weight": STEM * math.nan}, "conv1.weight has NaN"),
    (lambda fine: {**fine, "bn1.bias": torch.ones(8)}, "bn1.bias is .8,.*--width"),
    (lambda fine: {**fine, "layer2.1.conv1.weight": STEM}, "layer2.1.*--layers"),
]


def test_bad_and_damaged_weight_files_are_refused():
    fine = {**published("advent"), "conv1.weight": STEM}
    for change, sentence in BAD_WEIGHTS:
        torch.save(change(fine), "bad.pth")
        net = common.DeepLabV2(19, **NETWORK)
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(UserError, match=f"bad.pth.*{sentence}"):
            common.load_weights(net, common.read_checkpoint("bad.pth"), "bad.pth")
        assert same(net.state_dict(), before) and not Path("executed").exists()
    torch.save(fine, "fine.pth")
    content = Path("fine.pth").read_bytes()
    ones = b"\x00\x00\x80\x3f" * 9
    flipped = content.replace(ones, ones[:-1] + b"\x3e", 1)  # torch's own reader sees nothing
    assert flipped != content
    for damaged in (content[:30_000], b"404: not found\n", flipped):
        Path("bad.pth").write_bytes(damaged)
        refused("bad.pth cannot be read as weights", common.read_checkpoint, "bad.pth")
    refused("no weight file at nowhere.pth", common.read_checkpoint, "nowhere.pth")
    weights = torchvision.models.ResNet101_Weights
    with mock.patch.object(weights, "get_state_dict", side_effect=OSError("no network")):
        refused("no network.*resnet101-63fe2227.pth", common.initial_weights, "imagenet")


# ====================================================================== labels and images

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
SYNTHIA_IDS = (3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11)


def palette_png(path, ids, bits):
    """The index is the id. The palette has no meaning."""
    image = Image.fromarray(ids)
    image.putpalette(np.random.default_rng(1).bytes(3 * 2**bits))
    image.save(path, bits=bits)


def grey_png(path, ids, bits=8):
    """Pillow writes 2 and 4 bits only with a palette. This removes the palette from its file."""
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


def test_files_that_are_no_labels_are_refused():
    draw("colours.png")
    draw("photo.jpg", 7)
    Image.fromarray(np.full((6, 8), 7, np.uint16)).save("deep.png")
    Path("cut.png").write_bytes(draw("whole.png", 7, (200, 200)).read_bytes()[:60])
    for name in ("colours.png", "photo.jpg", "deep.png", "cut.png"):
        refused(name, common.read_label, name, "gta5", 19)
    refused("colours.png.*16 bits", common.read_label, "colours.png", "synthia", 19)
    refused("outside 0..33", common.read_label, draw("foreign.png", 200), "cityscapes", 19)
    for bits in (1, 2, 4):  # Pillow stretches them to 0..255
        grey_png("grey.png", np.ones((6, 8), np.uint8), bits)
        refused(f"grey.png has .* {bits} bits", common.read_label, "grey.png", "gta5", 19)
    pixels = np.zeros((40, 50), np.uint8)
    pixels[0, :2] = 40  # of 2,000 pixels: in a plain folder one in a thousand may be foreign
    grey_png("stray.png", pixels)
    assert (np.asarray(common.read_label("stray.png", "folder", 19)) == 255).sum() == 2
    pixels[0, 2] = 40
    grey_png("stray.png", pixels)
    refused("outside 0..18 .mostly 40", common.read_label, "stray.png", "folder", 19)


def test_photos_are_turned_and_labels_have_their_shape():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
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
        draw(root / label, ids)
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


def test_files_and_folders_in_order_behind_links_missing_or_twice(tmp_path):
    fine = ["a,b", "²", "9", "10", "more/2", "more/10"]  # numbers in their order
    for name in fine:
        draw(f"images/{name}.png".replace("more", "elsewhere"))
        draw(f"labels/{name}.png", 2)
    Path("images/elsewhere").rename("elsewhere")
    Path("images/more").symlink_to("../elsewhere")
    assert list(common.list_pairs("folder", tmp_path)) == fine
    draw("A/rgb_anon/fog/train/x_rgb_anon.png")
    for copy_of in (".fog_old", "@eaDir"):
        shutil.copytree("A/rgb_anon/fog", f"A/rgb_anon/{copy_of}")
    assert list(common.list_images("acdc", tmp_path / "A")) == ["fog/train/x"]
    Path("link").symlink_to(tmp_path / "images")
    refused("lies inside", common.refuse_inside, "link/run", "images")
    draw("images/d.png")
    refused("7 images but 6 labels.*first: d", common.list_pairs, "folder", tmp_path)
    draw("images/9.jpg")
    refused("9.jpg and .*9.png have the same name", common.list_images, "folder", tmp_path)
    shutil.rmtree("images")
    Path("images").mkdir()
    refused(r"no file .*\.tif.*webp", common.list_images, "folder", tmp_path)  # what is read
    refused("nowhere", common.dataset_root, "folder", None, tmp_path / "nowhere")
    refused("no gta5 folder in", common.dataset_root, "gta5", tmp_path)
    Path("GTA5").mkdir()
    Path("gta").mkdir()
    refused("are both gta5", common.dataset_root, "gta5", tmp_path)


def test_lists_of_names_in_every_form():
    pairs = common.list_pairs("cityscapes", "scenes/Cityscapes", "val")
    name = list(pairs)[1]
    image, _ = pairs[name]
    forms = [name, image.name, image.stem, name.split("/")[-1], f"/val/{name}_leftImg8bit.png"]
    forms += [image.as_posix(), image.relative_to("scenes/Cityscapes").as_posix()]
    for form in forms:
        Path("list.txt").write_text(f"\ufeff{form}  \r\n\n", encoding="utf-8")
        assert common.keep_listed(pairs, "list.txt") == {name: pairs[name]}, form
    Path("list.txt").write_text("\n".join(reversed(pairs)))
    assert list(common.keep_listed(pairs, "list.txt")) == list(pairs)  # in the set's order
    Path("list.txt").write_text(f"{name}\nstranger\n")
    refused("list.txt: 1 of 2 names found.*stranger", common.keep_listed, pairs, "list.txt")


def test_a_look_at_the_classes_of_a_few_labels(capsys):
    def look(ids):
        plain_folder("own", ids=ids)
        common.Labelled(common.list_pairs("folder", "own"), "folder", CLASSES[:3]).check_samples()
        return capsys.readouterr().out

    assert "in 3 labels no pixel has class sidewalk\n" in look((0, 2, 255))
    assert "no pixel" not in look((0, 1, 2))
    # 255 is "ignore": one class is left, and every network would score 100 %
    refused("only class 0 and 255 .ignored. occur", look, (0, 255))
    refused("only class 2 occurs", look, 2)


# ====================================================================== readers


def test_order_is_a_permutation_in_every_epoch_and_starts_anywhere():
    order = list(common.endless_order(7, 3, 0, 14, 2))
    assert [position for position, _ in order] == list(range(28))
    epochs = [[index for _, index in order[i : i + 7]] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert list(common.endless_order(7, 3, 5, 14, 2)) == order[10:]
    with mock.patch.multiple(common, rank=lambda: 1, world_size=lambda: 2):
        assert list(common.endless_order(7, 3, 0, 14, 1)) == order[1::2]  # half of each batch


def test_items_are_arrays_that_need_no_shared_memory():
    """A tensor would travel through shared memory, of which containers have little."""
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
        """The mean prototype of each class over the images that hold it."""
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
        assert all(r["data_seconds"] > 0 and r["peak_memory_mb"] > 50 for r in log)
        best = max(scores, key=lambda r: r["miou19"])
        assert last(folder, "best.pth")["iter"] == best["iter"] and last(folder)["iter"] == 4
        assert last(folder)["input_size"] == (64, 64)
    start = records(folder, "start")[0]
    assert start["settings"] == last(folder)["settings"] and start["torch"] == torch.__version__


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


def test_stage_2_refuses_the_unfinished_stage_1_of_its_out():
    killed_at(common, "save", 3, intrada, INTRADA)
    assert last("run/stage1")["iter"] == 2
    refuses("2 of --stop-iters 4 iterations", intrada, INTRADA, "--stage 2")
    assert not Path("run/stage2").exists()
    named = "--stage 2 --ckpt run/stage1/last.pth"  # a named file is used as it is (D5)
    succeed(intrada, INTRADA, named)
    refuses("stage 1 is not finished, but there is run/stage2", intrada, INTRADA)
    assert "already ranked" in succeed(intrada, INTRADA, named)


def test_a_ranking_of_something_else_is_refused(trained):
    """It was made with different weights, images or input size."""
    shutil.copytree(trained(intrada), "run", ignore=shutil.ignore_patterns("stage3"))
    names = list(common.list_images("cityscapes", "scenes/Cityscapes"))
    Path("nine.txt").write_text("\n".join(names[:9]))
    shutil.copy(trained(intrada) / "stage3/last.pth", "other.pth")
    for stage in ("2", "3"):
        flags = f"{INTRADA} --stage {stage}"
        refuses("made with different images", intrada, flags, "--target-list nine.txt")
        refuses("different input size", intrada, flags, "--target-size 96x64")
    refuses("made with weights other than", intrada, INTRADA, "--stage 2 --ckpt other.pth")
    shutil.copy("other.pth", "run/stage1/last.pth")
    refuses("made with weights other than", intrada, INTRADA, "--stage 3")
    refuses("Run --stage 1 first", intrada, INTRADA, "--stage 2 --out new")
    refuses("Run --stage 2, or name", intrada, INTRADA, "--stage 3 --out new")


# ====================================================================== BCL's rounds


def test_bcl_files_and_log(trained):
    run = trained(bcl)
    assert files_of(run) >= {"warmup/last.pth", "best.pth", "last.pth", "panel.png"}
    assert [(r["iter"], r["round"]) for r in records(run)] == [(i + 1, i // 3) for i in range(6)]
    assert [len(values) for values in terms(run)] == [7] * 6
    for r in records(run):
        assert 0 < max(r["coverage_y_f"], r["coverage_y_d"]) <= r["coverage_y_t"] <= 1
    for k in (0, 1):
        labels = [read(path) for path in (run / f"round{k}/labels").rglob("*.png")]
        coverage = json.loads((run / f"round{k}/labels.json").read_text())["coverage"]
        assert coverage == approx(100 * np.mean(np.stack(labels) != 255)) and len(labels) == 10
        assert 10 <= coverage < 50  # ratio 0.1


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


KILLS = [
    [(common, "save", count) for count in (1, 2, 3, 4, 5)],
    [  # before a file gets its name, among the labels, before their folder appears, at scores
        (os, "replace", 2), (common, "write_png", 4), (os, "rename", 1), (common, "evaluate", 1),
        (common.Log, "evaluation", 1), (common, "write_panel", 1),
    ],
]  # fmt: skip


@pytest.mark.parametrize("points", KILLS)
@BOTH
def test_kill_9_again_and_again(module, points, trained):
    """One kill after the other in one folder: the same files as undisturbed, to the last bit."""
    for i, point in enumerate(points):
        killed_at(*point, module, FLAGS[module], f"--save-every 1 --workers {i % 4 // 3 * 2}")
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


def test_ctrl_c_in_a_terminal_and_the_lock():
    """It reaches the whole group, reading processes included. The folder is locked until then."""
    flags = f"{INTRADA} --stage 1 --max-iters 100000 --stop-iters 100000 --eval-every 0"

    def in_a_group_of_its_own():
        os.setsid()
        status, _, err = call(intrada, flags, "--workers 2")
        Path("err").write_text(err)
        return status

    child = forked(in_a_group_of_its_own)
    begin = time.monotonic()
    while not Path("run/stage1/last.pth").exists() or last("run/stage1")["iter"] < 4:
        assert time.monotonic() - begin < 60 and not Path("err").exists()
        time.sleep(0.05)
    refuses("--out run is in use", intrada, flags)
    os.killpg(child, signal.SIGINT)
    assert exit_status(child) == 130
    it = last("run/stage1")["iter"]
    sentence = f"stopped; run the same command to resume from iteration {it}"
    assert Path("err").read_text().strip() == sentence


def test_a_full_disk_ends_in_a_sentence():
    """A limit on files' size fails as a full disk does. The earlier file stays."""
    save("last.pth", noisy_network())
    before = Path("last.pth").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        refused("cannot write last.pth", common.save, "last.pth", 1, {}, {"model": noisy_network()})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert Path("last.pth").read_bytes() == before


@BOTH
def test_a_finished_run_is_not_trained_again(module, broken, trained):
    """Also if the data lie elsewhere and the intervals are different."""
    shutil.copytree(trained(module), "run")
    flags = f"{FLAGS[module]} --data-root broken --workers 1 --log-every 3 --save-every 1"
    with mock.patch.object(common.Log, "losses") as trains:
        out = succeed(module, flags)
    assert out.count("already trained") == 2 and "mIoU 19" in out and not trains.called
    assert "on 5 validation images" in out
    assert_same_run("run", trained(module))


OTHER = {  # flags that change settings, and the names of these settings
    intrada: ("--lr 0.5 --bn running --alignment none --seed 3", "alignment bn images lr seed"),
    bcl: ("--tau 0.1 --crop 32 --warmup-lr 0.5 --rounds 3", "crop rounds tau warmup_lr"),
}


@BOTH
def test_a_folder_of_other_settings_images_or_scripts_is_refused(module, trained, broken):
    for inside in ("GTA5/images/run", "Cityscapes/leftImg8bit/run"):
        refuses("lies inside", module, FLAGS[module], "--out", Path("scenes", inside))
    shutil.copytree(trained(module), "run")
    flags, names = OTHER[module]
    _, _, err = call(module, FLAGS[module], flags)
    found = re.findall(r"(\w+) is \S+ there and \S+ here", err)
    assert found == names.split() and "needs an --out of its own" in err, err
    for folder in ("images", "labels"):
        Path(broken, "GTA5", folder, "00002.png").unlink()
    refuses("images is", module, FLAGS[module], "--data-root broken")
    assert_same_run("run", trained(module))
    sibling = {intrada: bcl, bcl: intrada}[module]
    refuses(f"holds a run of {module.__name__}.py", sibling, FLAGS[sibling])
    for stray in ("best.pth", "round0/labels/x.png"):
        part = "stage1" if module is intrada else "."
        common.write_text(Path(f"of {stray[:4]}", part, stray), "")
        refuses("but no last.pth", module, FLAGS[module], "--out", Path(f"of {stray[:4]}"))


@BOTH
def test_a_repaired_image_lets_the_run_resume(module, broken):
    """The first look opens only some files, so that training stops at a damaged one. The identity
    of a run is the names of its images, not their content."""
    flags = f"{FLAGS[module]} --data-root broken"
    flags += " --rounds 1" if module is bcl else " --stop-iters 6 --stage 1"
    reading = "--workers 1" if module is intrada else ""
    paths = sorted((broken / TRAIN).rglob("*.png"))
    unseen = [paths[i] for i in range(10) if i not in common.evenly_spaced(10, 8)]
    for path in unseen:
        path.write_bytes(HALF)
    refuses("error: cannot read broken/Cityscapes/leftImg8bit", module, flags, reading)
    for path in unseen:
        draw(path, size=(100, 80))
    succeed(module, flags)
    assert len(records("run/stage1" if module is intrada else "run", "start")) == 2


def test_stop_iters_may_grow(trained):
    """Stopped at 4 and resumed to 6, or 6 from the start: the same to the last bit."""
    shutil.copytree(trained(intrada) / "stage1", "run/stage1")
    assert last("run/stage1")["iter"] == 4
    for out in ("run", "whole"):
        succeed(intrada, INTRADA, "--stage 1 --stop-iters 6 --out", Path(out))
    assert last("run/stage1")["iter"] == 6 and same(last("run/stage1"), last("whole/stage1"))


def test_what_is_not_finite_is_named_and_not_saved():
    flags = f"{INTRADA} --stage 1 --lr 1e35 --log-every 100 --eval-every 0 --save-every 1"
    refuses("a weight is not finite at iteration", intrada, flags)
    saved = last("run/stage1")
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    nan = lambda logits, domain: logits.mean() * math.nan  # noqa: E731
    with mock.patch.object(intrada, "domain_loss", nan):
        refuses("loss_adv_main is nan at iteration 1", intrada, INTRADA, "--stage 1 --out nan")


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
    """Run a script in two forked processes, with the variables that torchrun sets. Returns the exit
    statuses. The second process kills itself when it logs iteration dies_at."""
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
    """Two networks moved away from the start, and to nearly the same place."""
    moved = sum((one[name] - start[name]).abs().sum() for name in start)
    apart = sum((one[name] - two[name]).abs().sum() for name in start)
    assert moved > 0 and apart < 0.1 * moved


def test_two_processes_follow_one(trained):
    """Each has half of the batch. One of the two is killed, and both resume."""
    init = trained(intrada) / "stage1/last.pth"
    flags = [INTRADA, "--bn running --lr 1e-3 --init", init]
    succeed(intrada, *flags, "--out one")
    flags += ["--out two --batch-size 1"]
    assert -signal.SIGKILL in two_processes(intrada, flags, dies_at=3)
    assert last("two/stage1")["iter"] == 2
    assert two_processes(intrada, flags) == [0, 0]
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
    different = "batch_size is 1 there and 2 here; processes is 2 there and 1 here"
    refuses(different, intrada, *flags[:3], "--out two")


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


def test_torchrun(monkeypatch):
    """The launcher itself, as README types it: only the first process prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", HERE / "bcl.py"]
    done = subprocess.run(
        [*command, *BCL.split(), "--rounds", "1"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and last("run")["iter"] == 3, done.stderr
    assert done.stdout.count("pictures: run/panel.png") == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    refuses("without torchrun", eval_script, EVAL)


def test_local_rank_alone_is_no_torchrun(monkeypatch):
    """Some clusters set it for every job."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert common.set_up_device("cpu") == torch.device("cpu") and common.world_size() == 1


def test_a_bug_shows_its_traceback_and_ends_the_readers():
    with mock.patch.object(common, "average_over_ranks", lambda *modules: 1 / 0):
        status, _, err = call(intrada, INTRADA, "--stage 1 --workers 2")
    assert status == 1 and "ZeroDivisionError" in err and "Traceback" in err
    assert not multiprocessing.active_children()


WAYS = [("--amp", 0.03), ("--compile", 1e-4)]  # flags, how far from float32 on the CPU
if torch.cuda.is_available():
    WAYS += [("--device cuda --no-amp", 0.03), ("--device cuda --amp --compile", 0.03)]


def test_fast_ways_follow_float32_on_the_cpu(trained):
    """On the CPU --compile traces and differentiates but generates no code, which takes long."""
    options = [INTRADA, "--stage 1 --eval-every 0 --init", trained(intrada) / "stage1/last.pth"]
    succeed(intrada, *options)
    expected = terms("run/stage1")
    for i, (flags, tolerance) in enumerate(WAYS):
        backend = "inductor" if "cuda" in flags else "aot_eager"
        real = functools.partial(torch.compile, backend=backend)
        with mock.patch.object(torch, "compile", side_effect=real) as compiled:
            succeed(intrada, *options, flags, f"--out way{i}")
        found = terms(f"way{i}/stage1")
        assert len(found) == 4 and np.allclose(expected, found, rtol=tolerance)
        assert "--amp" not in flags or found != expected
        assert (compiled.call_count >= 3) == ("--compile" in flags)  # G, I and CE
        weights = [last(f"{out}/stage1")["model"] for out in ("run", f"way{i}")]
        assert_close(*weights, rtol=tolerance / 2, atol=tolerance / 2)
        if "cuda" in flags:
            succeed(bcl, BCL, flags, f"--out bcl{i}")
            assert np.isfinite(terms(f"bcl{i}")).all()


# ====================================================================== pictures


def test_colours_of_classes_and_of_changes():
    """Cityscapes' classes have their own colours, other sets colours far apart and never black."""
    table = common.palette(CLASSES)
    assert table[[0, 13]].tolist() == [[128, 64, 128], [0, 0, 142]] and not table[19:].any()
    for count in (2, 11, 19, 20):
        colours = common.palette(tuple(map(str, range(count))))[:count].astype(int)
        apart = np.abs(colours[:, None] - colours[None]).sum(2)
        assert (apart + 999 * np.eye(count)).min() > 40 and colours.sum(1).min() > 90
    before, after, truth = np.array([[[1, 2, 1]], [[2, 1, 1]], [[2, 2, 1]]], np.uint8)
    right, wrong, equal = common.changes(before, after, truth)[0].tolist()
    assert right[1] > 150 > right[0] and wrong[0] > 200 > wrong[1] and equal == [40] * 3


def test_a_grid_keeps_the_aspects_and_has_a_legend_of_the_classes_that_occur():
    image = read(draw("image.png", size=(64, 32)))
    label = np.full((32, 32), 255, np.uint8)
    label[:16] = 13
    label[16:, :16] = 0
    common.write_grid("grid.png", ["a", "b"], [[image, label]], CLASSES)
    grid = np.asarray(Image.open("grid.png").convert("RGB"))
    larger = Image.fromarray(image).resize((320, 160), Image.BICUBIC)
    assert grid.shape[1] == 322 + 162 and np.array_equal(grid[20:180, :320], np.asarray(larger))
    for c, size in ((13, 160 * 80), (0, 80 * 80)):
        assert (grid == common.palette(CLASSES)[c]).all(2).sum() == size + 12 * 12


def test_training_leaves_pictures(trained):
    """Panels whose last column is entropy, from easy to hard, and a gallery."""
    paths = common.list_images("cityscapes", "scenes/Cityscapes", "val").values()
    for module, last_stage in ((intrada, "stage3"), (bcl, ".")):
        panel = read(trained(module) / "panel.png")
        G = common.load(trained(module) / last_stage / "last.pth")
        means = []
        for y in range(20, 740, 180):
            images = [Image.open(path).resize((160, 160), Image.BICUBIC) for path in paths]
            found = [(np.asarray(image) == panel[y : y + 160, :160]).all() for image in images]
            entropy = 255 * plain_entropy(plain_logits(G, list(paths)[found.index(True)]))
            assert panel[y : y + 160, -162:-2].mean() == approx(entropy.mean(), abs=1)
            means.append(entropy.mean())
        assert means == sorted(means)
    assert Image.open(trained(intrada) / "stage2/gallery.png").height >= 20 + 6 * 180 + 20


# ====================================================================== mistakes of users

EITHER = [  # flags that both scripts refuse; what the sentence names
    ("--target-size 20x20", "--target-size"), ("--target-size 64", "--target-size"),
    ("--layers 1,2,3", "--layers"), ("--num-classes 7", "--num-classes"),
    ("--batch-size 0", "--batch-size"), ("--save-every 0", "--save-every"),
    ("--init imagenet", "--init"), ("--init nowhere.pth", "nowhere.pth"),
    ("--init file", "file cannot be read"), ("--init trunk.pth", "trunk.pth"),
    ("--data-root nowhere", "nowhere"), ("--target-root nowhere", "nowhere"),
    ("--target folder", "--target-root"),
    ("--source cityscapes", "same folder"), ("--source-root folder", "folder/images"),
    ("--source folder --source-root folder --target folder --target-root folder", "same folder"),
    ("--compile --checkpoint-activations", "--compile"), ("--out file/run", "file"),
    ("--target-list nowhere.txt", "nowhere.txt"), ("--workers -1", "--workers"),
    ("--seed -1", "--seed"), ("--lr-head-mult -1", "--lr-head-mult"), ("--lr nan", "--lr"),
    ("--layers 0,1,1,1", "--layers"),
    ("--source-list file", "file: 0 of 1 names found"),
]  # fmt: skip
MISTAKES = [(module, *row) for module in (intrada, bcl) for row in EITHER]
MISTAKES += [
    (intrada, "--stop-iters 7", "--stop-iters"), (intrada, "--ckpt file --stage 3", "--ckpt"),
    (intrada, "--ranking folder", "--ranking"), (intrada, "--ratio 0.09", "--ratio"),
    (intrada, "--ratio 67", "--ratio"), (intrada, "--stage 3 --ranking folder", "folder"),
    (intrada, "--stage 2 --ckpt seven.pth", "seven.pth"),
    (bcl, "--tau 2", "--tau"), (bcl, "--momentum 1.5", "--momentum"), (bcl, "--crop 16", "--crop"),
    (bcl, "--temperature 0", "--temperature"), (bcl, "--static-ratio 10", "--static-ratio"),
    (bcl, "--lambda-fcl -1", "--lambda-fcl"), (bcl, "--scales inf", "--scales"),
    (bcl, "--scales 1,x", "--scales"),
]  # fmt: skip


@pytest.mark.parametrize("module, flags, culprit", MISTAKES)
def test_mistakes_in_flags(module, flags, culprit):
    Path("file").write_text("neither a checkpoint nor a list")
    Path("folder").mkdir()
    torch.save({"conv1.weight": STEM}, "trunk.pth")
    save("seven.pth", noisy_network(0, 7))
    before = files_of(".")
    refuses(culprit, module, FLAGS[module], flags)
    assert files_of(".") == before


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
        refuses(culprit, module, FLAGS[module], "--data-root broken")
        assert not [*Path("run").rglob("last.pth")]


@BOTH
def test_lists_and_plain_folders_of_three_classes(module):
    """An --out inside a folder of images is refused: the next run would read its pictures."""
    for root in ("source/train", "target/train", "target/val"):
        plain_folder(*root.split("/"))
    Path("source.txt").write_text("1.png\n")
    Path("target.txt").write_text("1.png\n2\n")
    flags = "--source folder --source-root source --target folder --target-root target"
    flags += " --num-classes 3 --source-list source.txt --target-list target.txt"
    flags += " --stop-iters 2 --ratio 1" if module is intrada else " --rounds 1"
    out = succeed(module, FLAGS[module], flags)
    assert "mIoU 3" in out and "hen" in out and "mIoU 19" not in out
    data = records("run/stage1" if module is intrada else "run", "start")[0]["data"]
    assert data.startswith("1 ") and ", 2 target images" in data
    labels = "run/stage2/labels" if module is intrada else "run/round0/labels"
    assert files_of(labels) == {"1.png", "2.png"}
    for inside in ("source/images/run", "target/images/train/run"):
        refuses("lies inside", module, FLAGS[module], flags, "--out", Path(inside))
    if module is intrada:  # at ratio 1 stage 3 is self-training
        assert "2 labelled images, no target" in records("run/stage3", "start")[0]["data"]
        refuses("ratio is 1.0 there and 0.5 here", module, INTRADA, flags, "--ratio 0.5")
        refuses("--normalize-entropy", module, INTRADA, flags, "--normalize-entropy --out n")
        ceiling = "--source-root target --source-list target.txt --stage 1 --out ceiling"
        succeed(module, INTRADA, flags, ceiling, "--alignment none")
        refuses("same folder", module, INTRADA, flags, ceiling)
    Path("source/classes.txt").write_text("cat\nhen\ndog\n")
    refuses("different classes", module, FLAGS[module], flags, "--out new")


def test_a_failure_that_cannot_be_printed_has_its_status():
    """On a full disk, or without standard error."""
    full = open("/dev/full", "w", buffering=1)  # Linux has it
    for stream in (full, None):
        with mock.patch.object(sys, "argv", ["intrada.py", "--ratio", "5"]):
            with mock.patch.object(sys, "stderr", stream), pytest.raises(SystemExit) as end:
                common.launch(intrada.main)
        assert end.value.code == 2
    with contextlib.suppress(OSError):
        full.close()


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
    if sentence is None:
        assert found is None
    else:
        assert sentence in found and "\n" not in found


@BOTH
def test_help_shows_flags_soon_and_whose_each_number_is(module):
    lines = succeed(module, "--help").splitlines()
    assert any(line.startswith("  --data-root") for line in lines[:30])
    text = " ".join(" ".join(lines).split())
    default = "0.67" if module is intrada else "0.1"
    assert "(paper)" in text and "(released)" in text and f"(default: {default})" in text


# ====================================================================== eval.py

EVAL = f"--data-root scenes {CPU}"


def save(path, network, size=(64, 64)):
    content = {"format": common.FORMAT, "model": network.state_dict(), "input_size": size}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def val_pairs():
    return common.list_pairs("cityscapes", Path("scenes/Cityscapes"), "val")


def test_scores_and_pictures():
    """Two averaged checkpoints against a plain forward pass at the labels' size."""
    networks = [noisy_network(0), noisy_network(1)]
    save("a.pth", networks[0], (96, 64))
    save("b.pth", networks[1], (32, 32))  # the first file says the input size
    out = succeed(eval_script, EVAL, "--ckpt a.pth b.pth --save-dir out")
    succeed(eval_script, EVAL, "--ckpt a.pth b.pth --save-dir ids --label-ids")
    expected = np.zeros((19, 19), int)
    for name, (image, label) in val_pairs().items():
        logits = sum(plain_logits(network, image, (96, 64)) for network in networks) / 2
        prediction = logits.argmax(0).numpy()
        for c, value in enumerate(CITYSCAPES_IDS):
            expected[c] += np.bincount(prediction[read(label) == value], minlength=19)
        picture = Image.open(f"out/{name}_trainids.png")
        assert (np.asarray(picture) != prediction).mean() < 1e-3
        colours = common.palette(CLASSES)[np.asarray(picture)]
        assert np.array_equal(picture.convert("RGB"), colours)
        entropy = read(f"out/{name}_entropy.png")[..., 0]
        assert np.abs(entropy - 255 * plain_entropy(logits)).max() < 1
        # the official evaluator looks for exactly one <city>_<seq>_<frame>*.png of its mask
        (path,) = Path("ids").rglob(f"{name.split('/')[-1]}*.png")
        assert path.name.endswith("_pred_labelIds.png") and Image.open(path).mode == "L"
        assert np.array_equal(read(path), np.array(CITYSCAPES_IDS)[np.asarray(picture)])
    found = json.loads(Path("out/scores.json").read_text())
    assert np.abs(found["confusion"] - expected).sum() <= 4  # of 20,480 pixels
    assert np.sum(found["confusion"], 1).tolist() == expected.sum(1).tolist()  # rows are labels
    scores = common.scores(torch.tensor(found["confusion"]), CLASSES)
    assert scores == {name: found[name] for name in scores}
    assert found["ckpt"] == ["a.pth", "b.pth"] and found["input_size"] == [96, 64]
    assert (found["target"], found["split"], found["images"]) == ("cityscapes", "val", 5)
    for text in ("cityscapes val, input 96x64", "mIoU 13", "5 images"):
        assert text in out
    assert f"{'road':16}{found['iou']['road']:>14.1f}" in out and Path("out/panel.png").exists()


def test_test_labels_are_not_read():
    save("net.pth", noisy_network())
    name = "berlin_000000_000019"
    draw(f"data/Cityscapes/leftImg8bit/test/berlin/{name}_leftImg8bit.png", size=(100, 50))
    flags = f"{CPU} --data-root data --ckpt net.pth --split test"
    with mock.patch.object(common, "read_label", side_effect=AssertionError):
        succeed(eval_script, flags, "--label-ids --save-dir ids")
    assert files_of("ids") == {f"{name}_pred_labelIds.png"}
    ids = read(f"ids/{name}_pred_labelIds.png")
    assert ids.shape == (50, 100) and set(np.unique(ids)) <= set(CITYSCAPES_IDS)


@pytest.mark.parametrize("flag", ["", "--ckpt"])
def test_the_newest_checkpoint_and_a_list(flag):
    for name, age in {"b/last": 30, "a/stage3/last": 10, "c/last": 20, "d/best": 0}.items():
        save(f"runs/{name}.pth", noisy_network(), (96, 32))
        os.utime(f"runs/{name}.pth", (1e9 - age, 1e9 - age))
    names = list(val_pairs())
    Path("names.txt").write_text("\n".join(names[:2]))
    flags = f"{EVAL} --target-list names.txt --save-dir out"
    out = succeed(eval_script, flags, flag)
    assert "runs/a/stage3/last.pth: our checkpoint" in out
    assert "2 images" in out and "input 96x32" in out
    assert json.loads(Path("out/scores.json").read_text())["target_list"] == "names.txt"
    Path("names.txt").write_text(f"{names[0]}\nnobody\n")
    refuses("1 of 2 names found, not found: nobody", eval_script, flags, flag)


def test_eval_of_a_plain_folder():
    save("net.pth", noisy_network(0, 3))
    classes = plain_folder("own")
    flags = f"{CPU} --ckpt net.pth --target folder --target-root own"
    out = succeed(eval_script, flags, "--save-dir out")
    assert "all images of own, input" in out and "folder val" not in out and "no pixel" not in out
    for name in (*classes, "mIoU 3"):
        assert f"\n{name}" in out
    picture = Image.open("out/0_trainids.png")
    colours = common.palette(classes)[np.asarray(picture)]
    assert np.array_equal(picture.convert("RGB"), colours)
    refuses("--label-ids", eval_script, flags, "--label-ids --save-dir ids")
    refuses("own/images", eval_script, flags, "--save-dir own/images/out")
    Path("own/classes.txt").write_text("cat\ndog\n")
    refuses("classes.txt", eval_script, flags)
    shutil.rmtree("own")
    plain_folder("own", "val", (0, 1))
    out = succeed(eval_script, flags)
    assert "folder val, input" in out and "3 images" in out and "no pixel has class hen" in out


def test_your_images():
    """Folders, globs and files of any mode and size; broken files are named, the rest is done."""
    network = noisy_network(0, 5)
    save("net.pth", network, (96, 64))
    rgb = read(draw("rgb.png", size=(70, 50)))
    for folder in ("in/a", "other"):
        Path(folder).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
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
    palette = np.array(Image.open("in/palette.PNG").convert("RGB"))
    pixels = {"a/turned": np.rot90(rgb, -1), "palette": palette, "alpha": rgb, "rgb": rgb}
    kinds = ("trainids", "overlay", "entropy")
    assert files_of("out") == {f"{name}_{kind}.png" for name in pixels for kind in kinds}
    succeed(eval_script, CPU, "--ckpt net.pth --images rgb.png --input-size 64x32 --save-dir b")
    cases = [("out", name, (93, 66)) for name in ("rgb", "palette", "alpha")]
    cases += [("out", "a/turned", (66, 93)), ("b", "rgb", (64, 32))]
    for folder, name, input_size in cases:  # the trained area, the photo's own aspect
        height, width = pixels[name].shape[:2]
        Image.fromarray(pixels[name]).save("upright.png")
        logits = plain_logits(network, "upright.png", input_size, (width, height))
        ids, overlay, entropy = [read(f"{folder}/{name}_{kind}.png").astype(int) for kind in kinds]
        assert (ids != logits.argmax(0).numpy()).mean() < 2e-3
        colours = common.palette(common.class_names(5))[ids].astype(int)
        assert np.array_equal(overlay, (pixels[name] + colours) // 2)
        assert np.abs(entropy[..., 0] - 255 * plain_entropy(logits)).max() <= 1
    network.input_size = (96, 64)
    assert np.array_equal(common.predict(network, photo), read("out/rgb_trainids.png"))


def test_your_images_overwrite_nothing():
    save("net.pth", noisy_network())
    for name in ("one/a.png", "two/a.jpg"):
        draw(name)
    flags = "--ckpt net.pth --device cpu --images"
    refuses("would both be written as", eval_script, flags, "one two --save-dir out")
    refuses("Write elsewhere", eval_script, flags, "two --save-dir two/out")
    refuses("holds two/a.jpg", eval_script, flags, "tw*/*.jpg --save-dir two")
    assert files_of("two") == {"a.jpg"} and not Path("out").exists()


REFUSED = [  # flags, what the sentence says
    ("--ckpt", "no last.pth below runs/"), ("--ckpt file", "file cannot be read"),
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
def test_mistakes_of_eval(flags, culprit):
    Path("file").write_text("neither a checkpoint nor a name")
    Path("folder").mkdir()
    save("net.pth", noisy_network())
    save("seven.pth", noisy_network(0, 7))
    refuses(culprit, eval_script, flags, CPU)
    assert not Path("out").exists()


# ====================================================================== tools


def tool(name):
    """A script of tools/ or demo/ as a module."""
    path = HERE / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_log(path, stage, seed, values, **settings):
    """A made-up log: mIoU `values` at iterations 10, 20, ...; the first class has twice that."""
    settings = {"seed": str(seed), "source": "gta5", "ranking": f"{seed:016x}", **settings}
    lines = [{"iter": 0, "event": "start", "stage": stage, "iters": 20, "settings": settings}]
    for i, value in enumerate(values, 1):
        score = {"miou19": value, "miou16": value + 1, "iou": {**dict.fromkeys(CLASSES)}}
        score["iou"]["road"] = 2 * value
        lines.append({"iter": 10 * i, "event": "evaluation", **score})
    common.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def test_compare(trained):
    compare = tool("tools/compare")
    for seed, values in enumerate(((30, 20), (10, 24), (10, 31))):
        write_log(f"runs/warm{seed}/log.jsonl", "warm-up", seed, (1, 2))
        init = f"runs/warm{seed}/last.pth"
        write_log(f"runs/a{seed}/log.jsonl", "bcl", seed, values, init=init)
    for seed, values in enumerate(((8, 9), (8, 12), (8, 18), (8, 50)), 1):
        write_log(f"runs/b{seed}/log.jsonl", "bcl", seed, values, labels="static")
    out = succeed(compare, "BCL=runs/a? static=runs/b?/log.jsonl --minus static")
    # last 20, 24, 31; best 30, 24, 31; at the seeds 1 and 2 last is 15 and 19 more
    assert "| BCL | 3 | 25.0 ± 5.6 | 28.3 ± 3.8 | +17.0 ± 2.0 (2) |" in out
    assert "| static | 4 |" in out and "| +0.0 ± 0.0 (4) |" in out
    assert "| road | 50.0 ± 11.1 |" in out and "| sky | - | - |" in out
    write_log("runs/s/log.jsonl", "bcl", 0, (10, 20), source="synthia")
    out = succeed(compare, "x=runs/s")
    assert "mIoU 16, last" in out and "| 21.0 | 21.0 |" in out and "terrain" not in out
    folder = trained(intrada)
    out = succeed(compare, f"A={folder}/stage1 B={folder}/stage3 --minus A")
    assert f"| B | 1 | {records(folder / 'stage3', 'evaluation')[-1]['miou19']:.1f} |" in out


def test_compare_stops_at_runs_that_differ_in_more_than_their_seed():
    for seed in (0, 1):
        write_log(f"runs/w{seed}/log.jsonl", "warm-up", seed, (1, 2), lr=f"{seed}")
        write_log(f"runs/i{seed}/log.jsonl", "bcl", seed, (1, 2), init=f"runs/w{seed}/last.pth")
        write_log(f"runs/t{seed}/log.jsonl", "bcl", seed, (1, 2), tau=f"0.{seed}", lr="1")
        write_log(f"runs/e{seed}/log.jsonl", "bcl", 7, (1, 2))
        write_log(f"runs/n{seed}/log.jsonl", "bcl", seed, (1,) * (2 - seed))
        ranked = {"ranking": f"{seed}", "ranking_settings": f"of {seed}"}
        write_log(f"runs/r{seed}/log.jsonl", "stage3", seed, (1, 2), **ranked)
    refusals = {"x=runs/t?": "tau is 0.0 and 0.1.", "x=runs/i?": "lr of --init is 0 and 1."}
    refusals.update({"x=runs/e?": "seed 7 occurs twice", "x=runs/n?": "n1/log.jsonl has 10 of 20"})
    refusals["x=runs/r?"] = "ranking_settings is of 0 and of 1"
    refusals.update({"x=nowhere*": "matches no run", "runs/t0": "write NAME=GLOB"})
    for row, culprit in refusals.items():
        refuses(culprit, tool("tools/compare"), row)


def test_tsne():
    """A prototype is the mean over all positions of its class, of which some are drawn."""
    pytest.importorskip("sklearn")
    tsne = tool("tools/tsne")
    save("net.pth", noisy_network())
    succeed(tsne, "--ckpt net.pth --device cpu --data-root scenes --points 2 --out x/a")
    assert Image.open("x/a.png").width > 500
    found = np.load("x/a.npz")
    drawn = ~found["is_prototype"]
    data = common.Labelled(val_pairs(), "cityscapes", CLASSES, (64, 64))
    network = common.inference_copy(common.load("net.pth"))
    whole = tsne.sample_features(network, data, 5, 999, 1, torch.device("cpu"))
    for c in np.unique(whole[1]):
        every = whole[0][(whole[1] == c) & ~whole[2]]
        own = (found["domain"] == 1) & (found["label"] == c)
        mean = every.mean(0, keepdims=True)
        np.testing.assert_allclose(found["features"][own & ~drawn], mean, rtol=1e-4, atol=1e-4)
        points = found["features"][own & drawn]
        assert len(points) == min(2, len(every))
        assert all((every == point).all(1).any() for point in points)


def test_label_quality(trained):
    """The tables of a map of four positions, of which three have a true class."""
    quality = tool("tools/label_quality")
    unseen = [bcl.PrototypeEMA(2, 2, 0.9) for _ in "ST"]
    run = quality.Run({"calibrate": True, "tau": 0.8}, None, None, *unseen, torch.zeros(2))
    truth = torch.tensor([[0, 1], [1, 255]])
    seen = quality.Seen(
        f_s=torch.eye(2)[:, None],
        y_s=torch.tensor([[0, 1]]),
        f_t=torch.tensor([[[1, 0.1], [1, 1]], [[0.1, 1], [0.8, 0]]]),  # third: cosine 0.78
        truth=truth,
        classified=torch.tensor([[0, 0], [1, 1]]),
        y_f_full=torch.tensor([[255, 0], [255, 255]]),
        truth_full=truth,
    )
    out = io.StringIO()
    with mock.patch.object(quality, "see", lambda *_: seen), contextlib.redirect_stdout(out):
        quality.report(run, [(None, None)], torch.device("cpu"))
    table = [line.split() for line in out.getvalue().splitlines()]
    assert ["static", "33.3", "0.0"] in table and ["dynamic", "66.7", "100.0"] in table
    assert ["hybrid", "66.7", "50.0"] in table
    head = ["ξ", "=", "0"]
    assert [*head, "all", "0.7", "100.0", "66.7", "66.7"] in table
    assert [*head, "all", "0.8", "66.7", "100.0", "50.0"] in table
    assert [*head, "without", "y_F", "0.7", "100.0", "50.0", "100.0"] in table
    flags = "--data-root scenes --device cpu --images 2 --save lq.png"
    assert "true ξ" in succeed(quality, trained(bcl), flags)
    assert Image.open("lq.png").width > 7 * 150
    refuses("not a run of bcl.py", quality, trained(intrada) / "stage1")


# ====================================================================== demo/camvid.py, initial.py


def test_camvid():
    camvid = tool("demo/camvid")
    places = {
        "train/0001TP_1": ("dusk/{}/train", "mixed/{}/train"),
        "train/0006R0_1": ("day/{}", "mixed/{}/train"),
        "train/0006R0_2": ("day/{}", "mixed/{}/val"),
        "val/0016E5_1": ("day/{}",),
        "test/0001TP_2": ("dusk/{}/val", "mixed/{}/val"),
    }
    label = np.random.default_rng(0).integers(0, 12, (360, 480), dtype=np.uint8)
    for place in places:
        draw(f"cv/{place}.png", size=(480, 360))
        common.write_png("cv/{}annot/{}.png".format(*place.split("/")), label)
    succeed(camvid, "cv out")
    ids = np.asarray(Image.fromarray(label).resize((320, 240), Image.NEAREST))
    for place, folders in places.items():
        name = place.split("/")[1]
        for folder in folders:
            assert Image.open(f"out/{folder.format('images')}/{name}.png").size == (320, 240)
            found = read(f"out/{folder.format('labels')}/{name}.png")
            assert np.array_equal(found, np.where(ids == 11, 255, ids))
    assert len(files_of("out")) == 2 * sum(map(len, places.values())) + 3 + 1
    assert Path("out/day/without_0006R0.txt").read_text() == "0016E5_1.png\n"
    classes = common.dataset_classes("folder", Path("out/dusk"), 11)
    assert classes[0] == "sky" and classes[10] == "bicyclist"
    refuses("out exists", camvid, "cv out")
    shutil.rmtree("cv/test")
    refuses("test: no image", camvid, "cv other")


def test_initial_weights_are_written_where_they_are_told():
    initial = tool("demo/initial")
    tracked = (HERE / "demo/initial.pth").read_bytes()
    refuses("OUT", initial)
    every = initial.draw
    short = {"SCENES": 4, "ITERATIONS": 1, "RAMP": 1, "draw": lambda seed, _: every(seed, 4)}
    with mock.patch.multiple(initial, **short):
        succeed(initial, "out.pth --threads 1")
    assert common.load("out.pth").input_size == (256, 128)
    assert (HERE / "demo/initial.pth").read_bytes() == tracked


# ====================================================================== demo and house


def test_scenes():
    kinds = (("source",), ("target",), ("target", True), ("source",))
    drawn = [demo.draw_scene(np.random.default_rng(7), (96, 64), *kind) for kind in kinds]
    images = [image.tobytes() for image, _ in drawn]
    assert all(np.array_equal(label, drawn[0][1]) for _, label in drawn)
    assert images[0] == images[3] and len(set(images)) == 3  # they differ in appearance alone
    for kind in ("gta5", "synthia", "cityscapes"):
        pairs = common.list_pairs(kind, common.dataset_root(kind, "scenes"))
        data = common.Labelled(pairs, kind, CLASSES)
        found = {value for item in data for value in np.unique(item["label"]).tolist()}
        assert found == {*range(19), 255} - set(common.ABSENT.get(kind, ()))
    assert len(Path("scenes/train_easy.txt").read_text().split()) == 6
    demo.write_scenes("again", 0, (64, 64), (64, 64), 2, 10, 0)
    name = "GTA5/images/00002.png"
    assert Path("again", name).read_bytes() == Path("scenes", name).read_bytes()


def test_without_a_data_root_the_demo_and_its_defaults_hold():
    for module in (intrada, bcl):
        with mock.patch.object(sys, "argv", [module.__name__, "--lr", "7"]):
            args = module.parse()
        assert args.demo and args.lr == 7  # a flag comes before the demo's default
        for name, value in module.DEMO.items():
            assert name == "lr" or getattr(args, name) == value, name
        with mock.patch.object(sys, "argv", [module.__name__, "--data-root", "x"]):
            args = module.parse()
        assert not args.demo and (args.layers, args.width) == ((3, 4, 23, 3), 64)
        assert args.init == "imagenet"
    with mock.patch.object(demo, "write_scenes", lambda root, **_: shutil.copytree("scenes", root)):
        out = succeed(bcl, BCL.removeprefix(PLACES), "--rounds 1 --warmup-iters 0")
        assert "Demo" in out.splitlines()[0] and Path("runs/bcl/last.pth").exists()
        out = succeed(eval_script, CPU, "--save-dir out")
    assert "Built-in scenes" in out and "runs/bcl/last.pth" in out and "5 images" in out


def test_the_house():
    """No script imports another. common imports none of them and uses no flag."""
    files = {path.name for path in HERE.iterdir() if path.is_file() and path.name[0] != "."}
    scripts = {"intrada.py", "bcl.py", "eval.py", "common.py", "test_smoke.py"}
    assert files == scripts | {"README.md", "requirements.txt", "LICENSE"}
    for name in ("common", "demo/scenes", "intrada", "bcl", "eval"):
        text = (HERE / f"{name}.py").read_text()
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M))
        assert not imported & {"intrada", "bcl", "eval", "tools"}, name
        if name == "common":
            assert not imported & {"argparse", "demo"} and not re.search(r"\bargs\b", text)
    for path in [*HERE.glob("*.py"), *HERE.glob("demo/*.py"), *HERE.glob("tools/*.py")]:
        assert max(map(len, path.read_text().splitlines())) <= 100, path


def test_commands_of_the_documents_parse():
    """A shell variable is replaced by what the page sets it to, the variable of a loop by 1."""
    modules = {"intrada": intrada, "bcl": bcl, "eval": eval_script}
    parsed = []
    for name in ("README.md", "docs/results.md"):
        text = (HERE / name).read_text().replace("\\\n", " ")
        for variable, flags in re.findall(r'^(\w+)="(.*)"$', text, re.M):
            text = text.replace(f"${variable} ", f"{flags} ")
        text = re.sub(r"\$\{?\w+(%[\w.]+)?\}?", "1", text)
        for command in re.findall(r"(?:python|torchrun)[^\n`;#]* (\w+\.py[^\n`;#]*)", text):
            script, *flags = shlex.split(command)
            module = modules.get(script.removesuffix(".py"))
            if module:
                with mock.patch.object(sys, "argv", [script, *flags]):
                    module.check(module.parse())
                parsed.append(script)
    assert len(parsed) > 20 and len(set(parsed)) == 3
