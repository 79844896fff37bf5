"""Tests: formulas against plain loops, files made by hand, every script from end to end.

    python -m pytest -q test_smoke.py        about 90 seconds on 2 CPU cores; no network needed

Contents: helpers · IntraDA's formulas · evaluation · BCL's formulas · networks · labels,
images · dataset layouts · weight files and prediction · the training loops ·
IntraDA's stages · BCL's rounds · going on · signals and numbers · processes and
precision · pictures · bad input · eval.py · demo and house
"""

import contextlib
import copy
import csv
import functools
import importlib.util
import io
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
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
from PIL import Image, ImageOps
from pytest import approx
from torch.testing import assert_close

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import bcl
import common
import eval as eval_script
import intrada
from common import UserError
from demo import scenes as demo

# ====================================================================== helpers

NETWORK = {"layers": (1, 1, 1, 1), "width": 4}
CPU = "--device cpu --workers 0"
EVAL = f"--data-root scenes {CPU}"
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
    stderr). The usual handlers of signals are put back afterwards."""
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *words(flags)]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                common.launch(module.main)
            except SystemExit as stop:
                status = stop.code
            finally:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return status, out.getvalue(), err.getvalue()


def succeed(module, *flags):
    """What a script prints that has to end well."""
    status, out, err = call(module, *flags)
    assert status == 0, err
    return out


def refuses(culprit, module, *flags):
    """Exit status 2 and one sentence that names the culprit."""
    status, _, err = call(module, *flags)
    assert status == 2, (status, err)
    assert culprit in err and err.startswith("error: ") and len(err.splitlines()) == 1, err


def refused(culprit, function, *inputs):
    """A call must end in a UserError of one line that matches the regex `culprit`."""
    with pytest.raises(UserError, match=culprit) as caught:
        function(*inputs)
    assert "\n" not in str(caught.value)


def last(folder, name="last.pth"):
    return torch.load(Path(folder) / name, weights_only=True)


def records(folder, event=None):
    """Records of a log: of losses, or of an event ("start", "evaluation", "labels")."""
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


def draw(path, value=None, size=(8, 6)):
    """An image file: coloured noise, or grey of one value everywhere."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if value is not None:
        pixels = np.full((size[1], size[0]), value, np.uint8)
    Image.fromarray(pixels).save(path)
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
    """trained(module) -> output folder of the whole script, run once as a process."""

    @functools.cache
    def train(module):
        out = tmp_path_factory.mktemp("trained") / "run"
        done = process(HERE / f"{module.__name__}.py", FLAGS[module], "--out", out)
        assert done.returncode == 0 and "mIoU 19" in done.stdout, done.stderr
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
    terms = []
    for b, h, w in product(range(2), range(3), range(4)):
        p = logits[b, :, h, w].softmax(0).tolist()
        parts = [-x * math.log(x or 1) / math.log(5) for x in p]
        expected[b, :, h, w] = torch.tensor(parts, dtype=torch.float64)
        if labels[b, h, w] != 255:
            terms.append(-math.log(p[labels[b, h, w]]))
    logits.requires_grad_()
    maps = intrada.self_information(logits)
    assert (maps - expected).abs().max() < 1e-12 and maps[1, :, 0, 0].sum().item() == approx(1)
    for module in (intrada, bcl):
        module.pixel_entropy(logits).sum().backward()
        assert logits.grad.isfinite().all()
        loss = module.segmentation_loss(logits, labels)
        assert loss.item() == approx(sum(terms) / len(terms), rel=1e-12)
        logits.grad = None
        nothing = module.segmentation_loss(logits, torch.full_like(labels, 255))
        nothing.backward()
        assert nothing.item() == 0 and (logits.grad == 0).all()
    for module in (intrada, bcl, eval_script):
        assert torch.allclose(module.pixel_entropy(logits), expected.sum(1), rtol=0, atol=1e-12)
    larger = intrada.pixel_entropy(bigger(logits, (9, 7)))
    assert torch.allclose(eval_script.pixel_entropy(logits, (9, 7)), larger)


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
    result = common.scores(confusion)
    for key, absent in (("19", ()), ("16", (9, 14, 16)), ("13", (9, 14, 16, 3, 4, 5))):
        members = [value for c, value in each.items() if c not in absent]
        assert result[f"miou{key}"] == approx(100 * sum(members) / len(members))
    assert result["iou"]["traffic light"] is None
    assert result["iou"]["bicycle"] == approx(100 * each[18])
    many = torch.arange(255, dtype=torch.uint8)  # products of large ids must not overflow
    assert torch.equal(common.confusion_matrix(many, many, 255), torch.eye(255).long())


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


# ====================================================================== networks


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
    assert shapes.keys() == {"fc.weight", "fc.bias"}
    main, aux, features = net.eval()(torch.randn(1, 3, 512, 1024))
    assert main.shape == aux.shape == (1, 19, 65, 129) and features.shape == (1, 64, 65, 129)
    assert torch.allclose(main, sum(conv(features) for conv in net.layer6.conv2d_list), atol=1e-5)


def test_factors_follow_the_released_optimizer():
    """It lists a parameter once for every module that holds it, and torch 0.4.1 steps one entry
    after the other, all with one momentum buffer. 1,000 such steps on a scalar, and ours."""
    net = common.DeepLabV2(19, (3, 4, 23, 3), 2)
    listed = []
    for part in (net.conv1, net.bn1, net.layer1, net.layer2, net.layer3, net.layer4):
        for module in part.modules():
            listed += [id(p) for p in module.parameters() if p.requires_grad]
    factors = [group["lr_factor"] for group in net.parameter_groups("paper", 9)]
    assert factors == [1, 1, 1, 9]
    groups = net.parameter_groups("released", 10)
    assert [group["lr_factor"] for group in groups] == [1, 3, 4, 10]
    assert [len(group["params"]) for group in groups] == [1, 99, 4, 16]  # no BatchNorm: frozen
    assert len(listed) == 1 + 3 * 99 + 4 * 4
    slopes = (0.1 + 0.1 * torch.randn(1_000)).tolist()  # gradients: a drift with noise
    for group, times in zip(groups, (1, 3, 4)):
        assert all(listed.count(id(p)) == times for p in group["params"])
        ours = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        optimizer = torch.optim.SGD([ours], lr=1, momentum=0.9, weight_decay=5e-4)
        released = 1.0
        buffer = 0.0
        for it, slope in enumerate(slopes):
            lr = 2.5e-4 * (1 - it / 250_000) ** 0.9
            optimizer.param_groups[0]["lr"] = lr * group["lr_factor"]
            ours.grad = torch.full_like(ours, slope)
            optimizer.step()
            gradient = slope
            for _ in range(times):
                gradient += 5e-4 * released  # in place: each entry decays the same gradient again
                buffer = 0.9 * buffer + gradient
                released -= lr * buffer
        assert (ours.item() - 1) / (released - 1) == approx(1, abs=0.02)


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
    (grey_png, 0, 8, "cityscapes", CITYSCAPES_IDS), (grey_png, 0, 4, "gta5", CITYSCAPES_IDS),
    (grey_png, 0, 2, "folder", range(255)), (grey_png, 0, 1, "folder", range(255)),
    (grey_png, 0, 8, "bdd100k", range(19)), (rgb16_png, 2, 16, "synthia", SYNTHIA_IDS),
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


def test_labels_that_are_none_are_refused():
    draw("colours.png")
    draw("photo.jpg", 7)
    Image.fromarray(np.full((6, 8), 7, np.uint16)).save("deep.png")
    Path("cut.png").write_bytes(draw("whole.png", 7, (200, 200)).read_bytes()[:60])
    os.mkfifo("pipe.png")
    for name in ("colours.png", "photo.jpg", "deep.png", "cut.png", "none.png", "pipe.png"):
        refused(name, common.read_label, name, "gta5", 19)
    refused("colours.png", common.read_label, "colours.png", "synthia", 19)  # 8 bits
    refused("no ids 0 to 33", common.read_label, draw("foreign.png", 200), "cityscapes", 19)
    pixels = np.zeros((40, 50), np.uint8)
    pixels[0, :2] = 40  # of 2,000 pixels: one in a thousand may be foreign, not more
    grey_png("stray.png", pixels)
    assert (np.asarray(common.read_label("stray.png", "folder", 19)) == 255).sum() == 2
    pixels[0, 2] = 40
    grey_png("stray.png", pixels)
    refused("stray.png.*no ids 0 to 18", common.read_label, "stray.png", "folder", 19)


def test_pairs_as_they_are_seen():
    """A photo is turned as its EXIF says; a label of another shape is refused."""
    exif = Image.Exif()
    for orientation in (0, 1, 2, 3, 4, 5, 7, 8, 9, 6):  # 0 and 9 mean nothing
        exif[0x0112] = orientation
        Image.open(draw("noise.png")).save("turned.png", exif=exif)
        photo = Image.open("turned.png")
        assert np.array_equal(common.upright(photo), ImageOps.exif_transpose(photo))
    Image.new("RGB", (80, 40)).save("photo.jpg", exif=exif)  # rows are columns
    dataset = common.Labelled({"a": ("photo.jpg", "label.png")}, "folder", 19, (20, 40))
    draw("label.png", 3, (41, 80))  # GTA5 has pairs of 1914x1052 and 1914x1046
    assert dataset[0]["image"].shape == (3, 40, 20) and dataset[0]["label"].shape == (40, 20)
    draw("label.png", 3, (80, 40))
    refused("label.png", dataset.open, 0)


# ====================================================================== dataset layouts

TREES = [  # dataset, its folder below the data root, first image, its label, its name
    ("gta5", "gta5", "images/images/00001.png", "labels/labels/00001.png", "00001"),
    ("gta5", "GTA5", "01_images/images/00001.png", "01_labels/labels/00001.png", "00001"),
    ("synthia", "synthia", "RAND_CITYSCAPES/RGB/0.png", "RAND_CITYSCAPES/GT/LABELS/0.png", "0"),
    ("synthia", "RAND_CITYSCAPES", "RGB/0.png", "GT/LABELS/0.png", "0"),
    ("synscapes", "Synscapes", "img/rgb/1.png", "img/class/1.png", "1"),
    ("cityscapes", "Cityscapes", "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png",
     "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png", "ulm/ulm_000000_000019"),
    ("acdc", "ACDC", "rgb_anon/fog/train/GP01/GP01_frame_000041_rgb_anon.png",
     "gt/fog/train/GP01/GP01_frame_000041_gt_labelIds.png", "fog/train/GP01/GP01_frame_000041"),
    ("darkzurich", "Dark_Zurich", "rgb_anon/train/night/GP01/GP01_frame_000041_rgb_anon.png",
     "gt/train/night/GP01/GP01_frame_000041_gt_labelIds.png", "GP01/GP01_frame_000041"),
    ("bdd100k", "BDD100K", "images/10k/train/a-1.jpg", "labels/sem_seg/masks/train/a-1.png", "a-1"),
    ("bdd100k", "bdd100k", "seg/images/train/a-1.jpg", "seg/labels/train/a-1_train_id.png", "a-1"),
    ("folder", "mine", "images/a/1.JPEG", "labels/a/1.png", "a/1"),
    ("folder", "mine", "images/train/a/1.png", "labels/train/a/1.png", "a/1"),
]  # fmt: skip


@pytest.mark.parametrize("kind, folder, image, label, name", TREES)
def test_dataset_layouts(kind, folder, image, label, name, tmp_path):
    root = tmp_path / folder
    car = 13 if kind in ("folder", "bdd100k") else 26  # everywhere
    draw(root / image)
    draw(root / label, car)
    if kind == "synthia":
        demo.write_png16(root / label, np.full((6, 8, 3), 8))
    draw(root / f"{label[:-4]}_color.jpg")  # other files of the download do not matter
    found = common.dataset_root(kind, tmp_path, root if kind == "folder" else None)
    pairs = common.list_pairs(kind, found)
    assert pairs == {name: (root / image, root / label)}
    assert common.list_images(kind, found) == {name: root / image}
    assert (common.Labelled(pairs, kind, 19)[0]["label"] == 13).all()
    assert common.validation_set(kind, found, 19, (64, 64)) is None
    if "train" in image:
        draw(root / image.replace("train", "val"))
        draw(root / label.replace("/train/", "/val/"), car)
        dataset = common.validation_set(kind, found, 19, (64, 32))
        assert dataset.names == [name.replace("train", "val")]
        assert dataset[0]["image"].shape == (3, 32, 64)
        assert dataset[0]["label"].tolist() == [[13] * 8] * 6  # at its own size


def test_names_and_what_is_missing_or_twice(tmp_path):
    fine = ["a\u00a0b", "a,b;'\"c", "²", "\U0001f469\u200d\U0001f4bb", "٣", "9", "10"]
    fine = [*sorted(fine[:4]), *fine[4:], "sub/2", "sub/10"]  # ٣ is a 3
    for name in fine:
        draw(f"images/{name}.png")
        draw(f"labels/{name}.png", 2)
    Path("images/sub/back").symlink_to("..")  # a link that leads back is not followed
    draw("images/.thumbnails/0.png")
    assert list(common.list_pairs("folder", tmp_path)) == fine  # numbers in their order
    for name in ("para\u2029graph", "tab\t", "odd\udcff"):
        path = draw(f"images/{name}.png")
        refused("rename", common.list_images, "folder", tmp_path)
        path.unlink()
    draw("images/d.png")
    refused("10 images but 9 labels.* d;", common.list_pairs, "folder", tmp_path)
    draw("images/9.jpg")
    refused("one name", common.list_images, "folder", tmp_path)
    refused("nowhere", common.dataset_root, "folder", None, tmp_path / "nowhere")
    refused("gta5.*--data-root", common.dataset_root, "gta5", tmp_path)
    refused("leftImg8bit/train", common.list_images, "cityscapes", tmp_path)
    Path("Dark_Zurich").mkdir()
    Path("DarkZurich").mkdir()
    refused("are both darkzurich", common.dataset_root, "darkzurich", tmp_path)
    Path("classes.txt").write_text("a\nb\n", encoding="utf-16")
    refused("classes.txt is no UTF-8", common.dataset_classes, "folder", tmp_path, 2)
    Path("classes.txt").write_text("a\na\nb")
    refused("2 different", common.dataset_classes, "folder", tmp_path, 2)


# ====================================================================== weight files and prediction

PUBLISHED = {  # kind of file: how names of ours begin there; None: it has no such tensor
    "advent": {},
    "single-level advent": {"layer5.": None},
    "bcl": {"conv1.": "target_conv1.", "bn1.": "target_bn1.", "layer5.": None,
            "layer6.": "layer5."},
    "single-level deeplab": {"layer5.": None, "layer6.": "layer5."},
    "scale": {"layer5.": None, "layer6.": None, "": "Scale."},
    "torchvision": {"layer5.": None, "layer6.": None},
}  # fmt: skip
UNUSED = {  # what else is in such a file: a second stem and head, another head, a classifier
    "bcl": {"conv1.weight": (4, 3, 7, 7), "layer6.conv2d_list.0.weight": (19, 128, 3, 3)},
    "scale": {"Scale.layer5.conv2d_list.0.weight": (21, 128, 3, 3)},
    "torchvision": {"fc.weight": (1000, 128), "fc.bias": (1000,)},
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
    state.update({name: torch.rand(shape) for name, shape in UNUSED.get(kind, {}).items()})
    return state


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


WRAPS = {
    "two prefixes": lambda state: {"model": prefixed("_orig_mod.module.", state), "iter": 3},
    "two containers": lambda state: {"ema_model": {"state_dict": state}, "epoch": 3},
    "both": lambda state: {"net": {"model_state_dict": prefixed("model.", state)}, "args": None},
    "no counters": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
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
    assert set(report.skipped) == state.keys() - set(sources.values())
    if kind in ("scale", "torchvision"):
        refused("layer6", common.load, "weights.bin")
    else:  # the architecture can be read off trained weights
        loaded = common.load("weights.bin")
        assert (loaded.num_classes, loaded.layers, loaded.width) == (19, (1, 1, 1, 1), 4)
        assert (loaded.layer5 is not None) == (kind == "advent") and not loaded.training
        assert loaded.input_size == ((1460, 730) if kind == "bcl" else (1024, 512))
        assert torch.equal(loaded.layer6.conv2d_list[0].weight, net.layer6.conv2d_list[0].weight)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


STEM = torch.ones(4, 3, 7, 7)
BAD_WEIGHTS = {  # a fine content, to one that is refused
    "another class count": lambda fine: common.DeepLabV2(7, **NETWORK).state_dict(),
    "incomplete heads": lambda fine: {k: v for k, v in fine.items() if "list.1.bias" not in k},
    "no network": lambda fine: {"encoder.a": torch.zeros(2), "encoder.b": torch.zeros(2)},
    "a tensor": lambda fine: torch.zeros(3),
    "code": lambda fine: {"state_dict": Malicious()},
    "two networks": lambda fine: {"state_dict": fine, "ema_model": fine},
    "a name twice": lambda fine: {**fine, "module.conv1.weight": STEM},
    "NaN": lambda fine: {**fine, "conv1.weight": STEM * math.nan},
    "integers": lambda fine: {**fine, "conv1.weight": STEM.to(torch.int8)},
    "sparse": lambda fine: {**fine, "conv1.weight": STEM.to_sparse()},
    "negative variance": lambda fine: {**fine, "bn1.running_var": torch.tensor([1, 1, -0.1, 1])},
    # absurd sizes, refused before anything is built
    "vast width": lambda fine: {**fine, "conv1.weight": torch.zeros(1).expand(2_000, 3, 7, 7)},
    "vast depth": lambda fine: {**fine, "layer3.999999.conv1.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused(case):
    torch.save(BAD_WEIGHTS[case](published("advent")), "weights.pth")
    net = common.DeepLabV2(19, **NETWORK)
    before = copy.deepcopy(net.state_dict())
    named = "begins with encoder.a, encoder.b" if case == "no network" else "weights.pth"
    with pytest.raises(UserError, match=named):
        common.load_weights(net, common.read_checkpoint("weights.pth"), "weights.pth")
    assert same(net.state_dict(), before)
    if case != "another class count":
        with mock.patch.object(common, "DeepLabV2", return_value=net) as built:
            refused(named, common.load, "weights.pth")
        assert not (built.called and case.startswith("vast"))
    assert not Path("executed").exists()
    if case == "code":
        torch.load("weights.pth", weights_only=False)
        assert Path("executed").exists()  # the trap was armed


def test_damaged_and_missing_weight_files_are_refused():
    torch.save({**published("advent"), "conv1.weight": STEM}, "fine.pth")
    fine = Path("fine.pth").read_bytes()
    ones = b"\x00\x00\x80\x3f" * 9
    flipped = fine.replace(ones, ones[:-1] + b"\x3e", 1)  # torch's own reader sees nothing
    assert flipped != fine
    folder = bytearray(fine)  # an entry's attribute says so: torch would read nothing of it
    folder[fine.rindex(b"PK\1\2", 0, fine.rindex(b"/data/0")) + 38] ^= 0x10
    for content in (fine[:30_000], b"404: not found\n", flipped, folder):
        Path("bad.pth").write_bytes(content)
        refused("bad.pth", common.read_checkpoint, "bad.pth")
    unreadable = PermissionError(13, "Permission denied", "bad.pth")
    for error in (unreadable, RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with mock.patch.object(torch, "load", side_effect=error), pytest.raises(type(error)):
            common.read_checkpoint("fine.pth")
    os.mkfifo("pipe.pth")
    refused("no checkpoint at pipe.pth", common.read_checkpoint, "pipe.pth")
    refused("nowhere.pth", common.read_checkpoint, "nowhere.pth")
    refused("nowhere.pth.*imagenet, none or a file", common.initial_weights, "nowhere.pth")
    weights = torchvision.models.ResNet101_Weights
    with mock.patch.object(weights, "get_state_dict", side_effect=OSError("no network")):
        refused("no network.*resnet101-63fe2227.pth", common.initial_weights, "imagenet")
    Path("weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with mock.patch.dict(sys.modules, {"safetensors.torch": None}):
        refused("pip install safetensors", common.read_checkpoint, "weights.safetensors")
    package = mock.Mock(load_file=lambda path: published("advent"))  # in place of the real one
    with mock.patch.dict(sys.modules, {"safetensors": package, "safetensors.torch": package}):
        assert common.load("weights.safetensors").width == 4


def test_predict():
    net = noisy_network()
    net.input_size = (96, 48)
    image = Image.open(draw("image.png", size=(160, 40)))
    label = common.predict(net, image)
    # the network sees it with its own aspect and the area of 96x48
    expected = plain_logits(net, "image.png", (136, 34), (160, 40)).argmax(0)
    assert label.shape == (40, 160) and label.dtype == torch.uint8
    assert (label != expected).double().mean() < 0.001  # rounding, at ties
    tensor = common.pil_to_tensor(image)
    assert torch.equal(common.predict(net, image.convert("RGBA")), label)
    batch = common.predict(net, torch.stack([255 - tensor, tensor]))
    assert batch.shape == (2, 40, 160) and torch.equal(batch[1], label)
    assert not torch.equal(common.predict(net, tensor, (64, 64)), label)
    for wrong in (tensor.float(), tensor[:2], tensor[None, None], "image.png"):
        with pytest.raises(ValueError, match="predict"):
            common.predict(net, wrong)


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
    groups = net.parameter_groups(recipe, 10)
    return torch.optim.SGD(groups, lr=1, momentum=0.9, weight_decay=5e-4)


LOOPS = [  # alignment, learning-rate factors, BatchNorm's statistics in training
    ("adversarial", "released", "batch"), ("adversarial", "paper", "running"),
    ("batchnorm", "released", "batch"), ("none", "paper", "running"),
]  # fmt: skip


@pytest.mark.parametrize("alignment, recipe, bn", LOOPS)
def test_intrada_is_the_textbook(alignment, recipe, bn, pairs):
    sources, labels, targets = pairs
    if alignment == "none":  # opens no target image
        for path in Path("pair/Cityscapes/leftImg8bit/train").rglob("*.png"):
            path.write_bytes(b"garbage")
    flags = "--data-root pair --stage 1 --max-iters 5 --stop-iters 4 --lr 1e-3 --lr-d 3e-4"
    flags += " --lambda-seg-main 0.9 --lambda-seg-aux 0.3 --lambda-adv-main 0.5"
    flags += f" --lambda-adv-aux 0.2 --alignment {alignment} --backbone-lr {recipe} --bn {bn}"
    succeed(intrada, INTRADA, flags)

    torch.manual_seed(0)
    G = common.DeepLabV2(19, **NETWORK).train()
    if bn == "running":
        for norm in G.modules():
            norm.train(not isinstance(norm, torch.nn.BatchNorm2d))
    Ds = torch.nn.ModuleDict({name: intrada.discriminator(19, 4) for name in ("main", "aux")})
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
    saved = last("run/stage1")
    sgd_0 = saved["g_optimizer"]["param_groups"][0]
    assert (sgd_0["momentum"], sgd_0["weight_decay"]) == (0.9, 5e-4)
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
    sgd_0 = saved["optimizer"]["param_groups"][0]
    assert (sgd_0["momentum"], sgd_0["weight_decay"]) == (0.9, 5e-4)
    for name, part in (("model", G), ("ema_source", ema_s), ("ema_target", ema_t)):
        found = saved[name]
        assert_close(found, part.state_dict(), rtol=5e-5, atol=5e-5)  # a label may flip at τ


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


def test_ranking_and_pseudo_labels(trained):
    """Against a plain forward pass of stage 1's network."""
    folder = trained(intrada) / "stage2"
    images = common.list_images("cityscapes", Path("scenes/Cityscapes"))
    G = common.load(trained(intrada) / "stage1/last.pth")
    rows = ranking_of(folder)
    names = [row["name"] for row in rows]
    assert sorted(names) == sorted(images)
    assert len([*folder.rglob("labels/*/*.png")]) == len(images)
    assert rows == sorted(rows, key=lambda row: float(row["entropy"]))
    assert (folder / "easy.txt").read_text().split() == names[:6]  # floor(0.67 * 10)
    assert (folder / "hard.txt").read_text().split() == names[6:]
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
        assert np.array_equal(label.convert("RGB"), common.PALETTE[np.asarray(label)])


@pytest.mark.parametrize("column", ["entropy", "normalized_entropy"])
def test_split_for_every_ratio(column):
    values = np.random.default_rng(0).integers(0, 1500, (2975, 2)).tolist()  # with ties
    rows = []
    for i, (entropy, normalized) in enumerate(values):
        rows.append({"name": f"{i:04d}", "entropy": entropy, "normalized_entropy": normalized})
    order = [r["name"] for r in sorted(rows, key=lambda r: (r[column], r["name"]))]
    assert intrada.easy_count(0.29, 100) == 29  # as a float, 28.999...
    for hundredths in range(1, 101):
        easy, hard = intrada.split(rows[::-1], hundredths / 100, column != "entropy")
        assert len(easy) == hundredths * 2975 // 100 and easy + hard == order


def test_stage_3_gets_the_split_of_its_flags(trained):
    """From another run's ranking: easy images with its labels, hard ones without."""
    folder = trained(intrada) / "stage2"
    rows = sorted(ranking_of(folder), key=lambda row: float(row["normalized_entropy"]))
    names = [row["name"] for row in rows]
    flags = "--stage 3 --ratio 0.3 --normalize-entropy --ranking"
    with mock.patch.object(intrada, "train") as train, mock.patch.object(common, "report"):
        succeed(intrada, INTRADA, flags, folder)
    source, target = train.call_args.args[3:5]
    assert sorted(source.names) == sorted(names[:3]) and source.size == (64, 64)
    assert source.label_paths == [folder / f"labels/{name}.png" for name in source.names]
    assert sorted(target.names) == sorted(names[3:])


def test_the_split_is_part_of_a_run_and_lambda_1_is_self_training(trained):
    shutil.copytree(trained(intrada), "run", ignore=shutil.ignore_patterns("stage3"))
    succeed(intrada, INTRADA, "--stage 3 --ratio 1")
    assert "10 labelled images, no target images" in records("run/stage3", "start")[0]["about"]
    refuses("normalize_entropy", intrada, INTRADA, "--stage 3 --ratio 1 --normalize-entropy")
    easy = Path("run/stage2/easy.txt").read_bytes()  # --stage all is refused before it touches it
    refuses("ratio", intrada, INTRADA, "--ratio 0.5")
    assert Path("run/stage2/easy.txt").read_bytes() == easy


DAMAGES = [  # a file, what is replaced in it
    ("run/stage2/ranking.csv", b"0.", b"0.9"), ("run/stage2/ranking.json", b"}", b""),
    ("run/stage2/ranking.json", b"64", b"65"), ("run/stage2/labels/*/*.png", b"IDAT", b"IDAt"),
    ("run/stage1/last.pth", b"PK", b"pk"),
    ("broken/Cityscapes/leftImg8bit/train/*/*.png", b"B`\x82", b"B`\x82 of another size"),
]  # fmt: skip


@pytest.mark.parametrize("pattern, old, new", DAMAGES)
def test_a_ranking_that_does_not_fit_is_refused(pattern, old, new, trained, broken):
    shutil.copytree(trained(intrada), "run", ignore=shutil.ignore_patterns("stage3"))
    path = next(Path(".").glob(pattern))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    for stage in (3, 2):
        refuses("run/stage2", intrada, INTRADA, f"--data-root broken --stage {stage}")
    assert not Path("run/stage3").exists()


def test_stages_need_the_one_before_or_a_checkpoint(trained):
    refuses("--stage 1", intrada, INTRADA, "--stage 2")
    refuses("--stage 2", intrada, INTRADA, "--stage 3")
    flags = f"{INTRADA} --stage 2 --ckpt"
    best = trained(intrada) / "stage1/best.pth"
    succeed(intrada, flags, best)
    refuses("run/stage2", intrada, flags, trained(intrada) / "stage3/last.pth")
    refuses("run/stage2", intrada, INTRADA)  # a ranking of which network?
    assert not Path("run/stage1").exists()
    succeed(intrada, flags, best, "--ratio 0.3")  # another split needs no network
    assert len(Path("run/stage2/easy.txt").read_text().split()) == 3


# ====================================================================== BCL's rounds


def test_bcl_files_and_log(trained):
    run = trained(bcl)
    assert (run / "warmup/last.pth").exists() and (run / "best.pth").exists()
    assert all(len([*run.glob(f"round{k}/labels/*/*.png")]) == 10 for k in (0, 1))
    assert [(r["iter"], r["round"]) for r in records(run)] == [(i + 1, i // 3) for i in range(6)]
    assert [len(values) for values in terms(run)] == [7] * 6
    assert [r["lr"] for r in records(run / "warmup")] == approx([2.5e-4, 2.5e-4 * 0.5**0.9])
    assert [r["round"] for r in records(run, "labels")] == [0, 1]
    for r in records(run, "labels"):
        covered = [r[kind]["coverage"] for kind in ("static", "dynamic", "hybrid")]
        assert 0 < covered[0] < 50 and max(covered[:2]) <= covered[2] <= 100
        assert 10 <= r["train_static_coverage"] < 50  # ratio 0.1


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


@pytest.mark.parametrize("source, coverage", [("gta5", 100), ("synthia", 0)])
def test_classes_that_the_source_lacks_get_no_label(source, coverage):
    """A network that sees terrain everywhere, of which SYNTHIA has no pixel."""
    G = common.DeepLabV2(19, **NETWORK, aux=False)
    G.layer6.conv2d_list[0].bias.data[common.CLASSES.index("terrain")] = 100
    torch.save(G.state_dict(), "terrain.pth")
    flags = "--init terrain.pth --warmup-iters 0 --rounds 1 --round-iters 1 --static-ratio 1"
    succeed(bcl, BCL, flags, "--source", source)
    record = records("run", "labels")[0]
    assert record["train_static_coverage"] == record["static"]["coverage"] == coverage
    values = {v for p in Path("run/round0/labels").rglob("*.png") for v in np.unique(read(p))}
    assert values == {9 if coverage else 255}


# ====================================================================== going on

STAGES = {intrada: ("stage1", "stage3"), bcl: ("warmup", ".")}
DISK_FULL, KILLED, CTRL_C, SIGTERM = 2, 9, 130, 143  # exit status


def ends(module, flags, owner, name, count, status):
    """Run until the count-th call of this function; before it comes what makes the run end."""
    real = getattr(owner, name)
    calls = []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def patched(*args, **kwargs):
        calls.append(name)
        if len(calls) == count and status == KILLED:
            sys.exit(KILLED)
        elif len(calls) == count and status == DISK_FULL:  # a limit on files' size fails as that
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
        elif len(calls) == count:
            signal.raise_signal(status - 128)
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, patched):
        found, _, err = call(module, flags)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert found == status and ("cannot write run" in err or status != DISK_FULL), (name, err)


def what_a_log_says(folder):
    """Losses and events, without times, speeds, and how often the run was started."""
    timed = ("seconds", "data_seconds", "it_per_s", "peak_memory_mb")
    lines = []
    for event in (None, "evaluation", "labels"):
        lines += records(folder, event)
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


LOSSES = (common.Log, "losses", 2, KILLED)
EVALUATE = (common, "evaluate", 1, KILLED)
FULL = [(common, "save", 1, DISK_FULL), (common.Log, "losses", 1, DISK_FULL)]
ENDS = {  # (owner, function, call before which the run ends, exit status), one after the other
    intrada: [
        (common, "save", 1, KILLED), LOSSES, *FULL, (os, "replace", 3, KILLED), EVALUATE,
        (common.Log, "evaluation", 1, KILLED), (common, "evaluate", 1, SIGTERM),
        (common, "write_png", 4, KILLED), (common, "write_png", 4, CTRL_C),
        (os, "replace", 11, KILLED), (os, "rename", 1, KILLED), (intrada, "split", 1, KILLED),
        LOSSES, (common, "save", 2, KILLED), EVALUATE, (common, "write_panel", 1, KILLED),
    ],
    bcl: [
        LOSSES, *FULL, (os, "replace", 2, KILLED), EVALUATE, (common, "evaluate", 1, SIGTERM),
        (common, "write_png", 4, KILLED), (os, "rename", 1, KILLED),
        (bcl, "report_labels", 1, KILLED), (bcl, "label_statistics", 1, KILLED),
        (bcl, "label_statistics", 1, SIGTERM), LOSSES, (common, "save", 1, KILLED),
        (os, "rename", 1, KILLED), (common, "write_png", 4, CTRL_C), LOSSES,
        (common, "save", 2, KILLED), (bcl, "draw_labels", 1, KILLED),
    ],
}  # fmt: skip
FOREIGN = "notes.txt pictures/a.png round7/labels/x.png stage1/iter5.pth .cache/x.tmp .notes.tmp"


@BOTH
def test_ended_again_and_again(module, broken, trained):
    """At many points, with 0 and 2 workers: files, weights and logs as if nothing had happened,
    and files that the run did not write are still there. Target labels are never opened."""
    for path in (broken / "Cityscapes/gtFine/train").rglob("*.png"):
        path.write_bytes(b"garbage")
    for name in FOREIGN.split():
        common.write_text(Path("run", name), "mine")
    flags = f"{FLAGS[module]} --data-root broken"
    for turn, point in enumerate(ENDS[module]):
        ends(module, f"{flags} --workers 2" if turn % 4 == 2 else flags, *point)
    succeed(module, flags)
    whole = trained(module)
    for stage in STAGES[module]:
        assert same(last(Path("run", stage)), last(whole / stage)), stage
        assert what_a_log_says(Path("run", stage)) == what_a_log_says(whole / stage)
    for path in whole.rglob("*"):
        if path.suffix in (".png", ".csv", ".txt", ".json"):
            assert Path("run", path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    assert not [*Path("run").rglob("*.partial"), *Path("run").rglob(f".0.{os.getpid()}.tmp")]
    assert all(Path("run", name).read_text() == "mine" for name in FOREIGN.split())


OTHER = {  # a flag of every group that makes a run what it is
    intrada: ("--target-size 64x32", "--lr 0.5", "--alignment batchnorm", "--bn running"),
    bcl: ("--crop 32", "--warmup-lr 0.5", "--rounds 3", "--tau 0.1", "--bn running"),
}


@BOTH
def test_the_same_command_again(module, broken, trained):
    """Finished stages are skipped, wherever the data lie; other settings and data are refused by
    name, other intervals are not."""
    shutil.copytree(trained(module), "run")
    before = {p: p.read_bytes() for p in Path("run").rglob("*.pth")}
    flags = f"{FLAGS[module]} --data-root broken"
    for folder in ("leftImg8bit", "gtFine"):  # scores are of the images that were there
        min((broken / f"Cityscapes/{folder}/val").rglob("*.png")).unlink()
    with mock.patch.object(common.Log, "add") as trains:
        out = succeed(module, flags, "--workers 1 --log-every 3 --save-every 1")
        assert out.count("already trained") == 2 and "mIoU 19" in out and not trains.called
        assert "on 5 validation images" in out
    sibling = {intrada: bcl, bcl: intrada}[module]
    refuses(f"holds a run of {module.__name__}.py", sibling, FLAGS[sibling])
    torch.save(common.DeepLabV2(19, **NETWORK).state_dict(), "init.pth")
    for other in (*OTHER[module], "--init init.pth"):
        name = other.split()[0].strip("-").replace("-", "_")
        refuses(f"({name} is", module, flags, other)
    with next((broken / "GTA5/labels").iterdir()).open("ab") as file:
        file.write(b"of another size")
    refuses("(images is", module, flags)
    assert {p: p.read_bytes() for p in Path("run").rglob("*.pth")} == before
    Path("run", STAGES[module][1], "last.pth").unlink()
    refuses("holds best.pth", module, FLAGS[module])
    common.write_text(Path("new", STAGES[module][1], "log.jsonl"), '{"step": 1}\n')
    refuses("log.jsonl", module, FLAGS[module], "--out new")


@BOTH
def test_edited_scores_are_measured_anew(module, trained):
    shutil.copytree(trained(module), "run")
    whole = records(Path("run", STAGES[module][1]), "evaluation")[-1]
    log = Path("run", STAGES[module][1], "log.jsonl")
    log.write_text(log.read_text().replace('"iou": {', '"iou": 3, "x": {'))
    succeed(module, FLAGS[module])
    again = records(log.parent, "evaluation")[-1]
    assert again["iou"] == whole["iou"] and again["miou19"] == whole["miou19"]


def test_static_labels_that_do_not_fit_are_refused():
    """Within the second round, and at its start with its labels made."""
    ends(bcl, f"{BCL} --out border", bcl, "report_labels", 2, KILLED)
    shutil.copytree("border", "within")
    ends(bcl, f"{BCL} --out within", common.Log, "add", 1, SIGTERM)
    assert last("within")["iter"] == 4 and last("border")["iter"] == 3
    for out, damage in product(("within", "border"), ("of round 0", "flipped", "cut")):
        shutil.copytree(out, f"{out} {damage}")
        labels = Path(f"{out} {damage}", "round1")
        if damage == "of round 0":
            shutil.copytree(labels.with_name("round0"), labels, dirs_exist_ok=True)
        elif damage == "flipped":
            path = next(labels.rglob("*.png"))
            common.write_png(path, read(path) % 18)
        else:
            (labels / "labels.json").write_text("{")
        refuses(str(labels), bcl, BCL, "--out", labels.parent)


# ====================================================================== signals and numbers


def test_ctrl_c_saves_and_kill_9_leaves_no_lock():
    """Ctrl-C reaches the whole group, reading processes included; those of the process that is
    killed live on for a while."""
    flags = f"{INTRADA} --stage 1 --max-iters 100000 --stop-iters 100000 --eval-every 0"
    flags += " --save-every 4 --workers 2"
    command = [sys.executable, HERE / "intrada.py", *flags.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for number, send in ((signal.SIGINT, os.killpg), (signal.SIGKILL, os.kill)):
        running = subprocess.Popen(command, start_new_session=True, **pipes)
        for _ in range(8):  # of which the first does not report an iteration
            running.stdout.readline()
        refuses("--out run", intrada, flags)
        send(running.pid, number)
        _, err = running.communicate(timeout=60)
        if number == signal.SIGINT:
            assert running.returncode == CTRL_C and "Traceback" not in err, err
            assert last("run/stage1")["iter"] == records("run/stage1")[-1]["iter"] >= 5
    common.write_text("run/.0.99999999.tmp", "half a file")
    ends(intrada, flags, common.Log, "add", 2, SIGTERM)
    assert not Path("run/.0.99999999.tmp").exists()
    starts = [r["iter"] for r in records("run/stage1", "start")]
    assert len(starts) == 3 and last("run/stage1")["iter"] == starts[2] + 2 >= starts[1] + 6


def test_a_signal_that_comes_while_ranks_agree_is_kept():
    """Also without a terminal that could be told of it."""

    def all_reduce(tensor, operation):
        signal.raise_signal(signal.SIGTERM)
        return tensor  # what the ranks had before

    stop = common.StopSignal()
    gone = mock.patch.object(os, "write", side_effect=BrokenPipeError)
    with mock.patch.object(common, "all_reduce", all_reduce), gone:
        assert stop.agreed() == 0
    assert stop.agreed() == signal.SIGTERM
    stop.number = 0  # else closing would raise it again
    stop.close()


def test_what_is_not_finite_is_named_and_not_saved():
    real = intrada.domain_loss
    calls = iter(range(100))

    def broken_loss(logits, domain):  # the fifth iteration; 6 calls in each
        return real(logits, domain) * (math.nan if next(calls) == 4 * 6 else 1)

    flags = "--stage 1 --max-iters 9 --stop-iters 9 --log-every 8 --save-every 4 --eval-every 0"
    with mock.patch.object(intrada, "domain_loss", broken_loss):
        status, _, err = call(intrada, INTRADA, flags, "--seed 3")
    assert status == 2 and "loss_adv_main is nan at iteration 5" in err
    for kind, root, seed in (("gta5", "GTA5", 3), ("cityscapes", "Cityscapes", 4)):
        names = list(common.list_images(kind, Path("scenes", root)))
        for _, index in common.endless_order(len(names), seed, 4, 5, 2):
            assert names[index] in err
    assert last("run/stage1")["iter"] == 4  # from before
    flags = "--warmup-iters 0 --lr 1e6 --log-every 100 --save-every 1 --out bcl"
    refuses("not finite", bcl, BCL, flags)
    assert all(tensor.isfinite().all() for tensor in last("bcl")["model"].values())


# ====================================================================== processes and precision


def patched(name, patch):
    """A script: intrada.py after this patch."""
    start = f"import os, signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport common, intrada\n"
    Path(name).write_text(f"{start}{patch}\ncommon.launch(intrada.main)\n")
    return name


STOPPED = """
real = common.Log.losses
def losses(log, it, *args, **more):
    if it == 2 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    real(log, it, *args, **more)
common.Log.losses = losses
"""


def test_two_processes_follow_one(trained):
    """With half of the batch each; a signal to one of the two stops both, and they go on."""
    init = trained(intrada) / "stage1/last.pth"
    flags = [INTRADA, "--bn running --lr 1e-3 --init", init]
    succeed(intrada, *flags, "--out one")
    flags += ["--out two --batch-size 1"]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2"
    done = process(torchrun, patched("stopped.py", STOPPED), *flags)
    assert done.returncode != 0 and last("two/stage1")["iter"] == 2, done.stderr
    done = process(torchrun, HERE / "intrada.py", *flags)
    assert done.returncode == 0 and done.stdout.count("mIoU 19") == 1, done.stderr
    assert [r["iter"] for r in records("two/stage1", "start")] == [0, 2]
    for stage in ("stage1", "stage3"):
        one = last(f"one/{stage}")
        two = last(f"two/{stage}")
        for part in ("model", "discriminators"):  # both moved, and by nearly the same
            start = torch.load(init, weights_only=True)[part]
            moved = sum((one[part][name] - start[name]).abs().sum() for name in start)
            apart = sum((one[part][name] - two[part][name]).abs().sum() for name in start)
            assert moved > 0 and apart < 0.1 * moved
        assert np.allclose(terms(f"one/{stage}"), terms(f"two/{stage}"), rtol=0.01)
        scores = [records(f"{run}/{stage}", "evaluation")[-1]["miou19"] for run in ("one", "two")]
        assert scores[0] == approx(scores[1], abs=0.1)
    rankings = [ranking_of(f"{run}/stage2") for run in ("one", "two")]
    assert [row["name"] for row in rankings[0]] == [row["name"] for row in rankings[1]]
    refuses("processes", intrada, *flags)


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


def test_training_leaves_pictures(trained):
    """Grids, 22 pixels above; BCL's figure is one target image beside two source images."""
    sheets = [trained(module) / "panel.png" for module in (intrada, bcl)]
    sheets += [trained(intrada) / "stage2/gallery.png", trained(bcl) / "labels.png"]
    sheets = [np.asarray(Image.open(path).convert("RGB")) for path in sheets]
    grids = [((sheet.shape[0] - 22) / 130, (sheet.shape[1] - 2) / 130) for sheet in sheets]
    assert grids == [(4, 5), (4, 5), (6, 3), (2, 7)]
    rows = [sheets[3][y : y + 128] for y in (22, 152)]
    cells = [[row[:, 2 + 130 * c :][:, :128] for c in range(7)] for row in rows]
    validation = common.validation_set("cityscapes", Path("scenes/Cityscapes"), 19, None)
    image, label = validation.open(0)
    truth = common.palette(19)[np.asarray(label.resize((128, 128), Image.NEAREST))]
    assert np.array_equal(cells[0][2], image.resize((128, 128), Image.BICUBIC))
    assert np.array_equal(cells[0][6], truth)
    equal = [np.array_equal(a, b) for a, b in zip(*cells)]  # dynamic labels change, static do not
    assert equal[:5] + equal[6:] == [False, False, True, True, False, True]


# ====================================================================== bad input

EITHER = [  # flags that both scripts refuse; what the message names
    ("--unknown 1", "--unknown"), ("--source kitti", "--source"), ("--lr x", "--lr"),
    ("--lr nan", "--lr"), ("--target-size 20x20", "--target-size"),
    ("--layers 1,2,3", "--layers"), ("--num-classes 7", "--num-classes"),
    ("--init imagenet", "--init"), ("--target folder", "--target-root"),
    ("--source cityscapes", "--source cityscapes"),
    ("--source folder --source-root folder --target folder --target-root folder", "one folder"),
    ("--compile --checkpoint-activations", "--compile"), ("--data-root nowhere", "nowhere"),
    ("--init nowhere.pth", "nowhere.pth"), ("--out file/run", "file"), ("--out=", "--out"),
]  # fmt: skip
BAD_FLAGS = [(module, *row) for module in (intrada, bcl) for row in EITHER]
BAD_FLAGS += [
    (bcl, "--scales 0", "--scales"), (intrada, "--stop-iters 7", "--stop-iters"),
    (intrada, "--ckpt file --stage 3", "--ckpt"), (intrada, "--ranking folder", "--ranking"),
    (intrada, "--ratio 0.09", "--ratio"), (intrada, "--stage 3 --ranking folder", "folder"),
    (intrada, "--out occupied", "occupied/stage1"),
]  # fmt: skip


def refuses_and_writes_nothing(culprit, module, *flags):
    before = {p for p in Path(".").rglob("*") if p.is_file()}
    refuses(culprit, module, *flags)
    written = {p for p in Path(".").rglob("*") if p.is_file()} - before
    assert {p.name for p in written} <= {".lock"}


@pytest.mark.parametrize("module, flags, culprit", BAD_FLAGS)
def test_bad_flags(module, flags, culprit):
    Path("file").write_text("not a checkpoint")
    Path("folder").mkdir()
    common.write_text("occupied/stage1", "a file")
    refuses_and_writes_nothing(culprit, module, FLAGS[module], flags)


HALF = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x40\0\0\0\x40"
TRAIN = "Cityscapes/leftImg8bit/train"
BAD_DATA = [  # files below the data root; what they become; what the message names
    ("GTA5/images/00001.png", HALF, "00001.png"),
    ("GTA5/images/00001.png", np.full((64, 64), 3000, np.uint16), "00001.png"),
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


def test_a_reading_process_passes_its_sentence_on(broken):
    """A file that the first look does not open, met by a worker in the middle of training."""
    paths = sorted((broken / TRAIN).rglob("*.png"))
    for index in {*range(10)} - {*common.spread(10, 8)}:
        paths[index].write_bytes(HALF)
    flags = "--data-root broken --stage 1 --stop-iters 6 --workers 1"
    done = process(HERE / "intrada.py", INTRADA, flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and ".png" in done.stderr


def test_a_bug_shows_its_traceback_and_ends_the_readers():
    """Else the process would wait for them for ever."""
    bug = patched("bug.py", "common.average_over_ranks = lambda *modules: 1 / 0")
    done = process(bug, INTRADA, "--stage 1 --workers 2")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


# ====================================================================== eval.py


def save(path, network, size=(64, 64)):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    content = {"format": common.FORMAT, "model": network.state_dict(), "input_size": size}
    torch.save(content, path)


def val_pairs():
    return common.list_pairs("cityscapes", Path("scenes/Cityscapes"), "val")


def test_scores_pictures_and_label_ids():
    """Two averaged checkpoints against a plain forward pass at the labels' size."""
    networks = [noisy_network(0), noisy_network(1)]
    paths = [Path("runs/a/stage1/last.pth"), Path("runs/a/stage3/last.pth")]
    for path, network in zip(paths, networks):
        save(path, network)
    assert eval_script.column_titles(paths) == ["stage1", "stage3"]
    flags = "--input-size 96x64 --json out/x.json --save-dir maps --label-ids ids --panel p.png"
    out = succeed(eval_script, EVAL, flags, "--ckpt", *paths)
    confusion = np.zeros((19, 19), int)
    for name, (image, label) in val_pairs().items():
        logits = sum(plain_logits(network, image, (96, 64)) for network in networks) / 2
        prediction = logits.argmax(0).numpy()
        for c, value in enumerate(CITYSCAPES_IDS):
            confusion[c] += np.bincount(prediction[read(label) == value], minlength=19)
        picture = Image.open(f"maps/{name}_trainids.png")
        assert (np.asarray(picture) != prediction).mean() < 1e-3
        assert np.array_equal(picture.convert("RGB"), common.PALETTE[np.asarray(picture)])
        entropy = read(f"maps/{name}_entropy.png")[..., 0]
        assert np.abs(entropy - 255 * plain_entropy(logits)).max() < 1
        ids = Image.open(f"ids/{name.split('/')[-1]}_pred_labelIds.png")
        assert ids.mode == "L" and np.array_equal(ids, np.array(CITYSCAPES_IDS)[picture])
    found = json.loads(Path("out/x.json").read_text())
    assert np.abs(found["confusion"] - confusion).sum() <= 4
    assert np.sum(found["confusion"]) == confusion.sum()
    assert found["split"] == "val" and found["subset"] is None
    expected = common.scores(torch.tensor(found["confusion"]))
    assert all(found[name] == expected[name] for name in expected)
    assert "mIoU 13" in out and "5 images" in out and found["images"] == 5
    assert len(list(Path("ids").iterdir())) == 5 and Image.open("p.png").width > 128


def test_newest_checkpoint_subset_and_branches():
    network = noisy_network()
    ages = {"b/last.pth": 30, "a/stage3/last.pth": 10, "c/last.pth": 20, "d/best.pth": 0}
    for name, age in ages.items():
        save(f"runs/{name}", network, (96, 32))
        os.utime(f"runs/{name}", (1e9 - age, 1e9 - age))
    Path("runs/a").rename("elsewhere")
    Path("runs/a").symlink_to("../elsewhere")
    names = [name.split("/")[-1] for name in val_pairs()]
    Path("names.txt").write_text("\n".join(names[:2]))
    flags = f"{EVAL} --subset names.txt --json x.json"
    out = succeed(eval_script, flags)
    assert "runs/a/stage3/last.pth" in out and "2 images" in out and "input 96x32" in out
    succeed(eval_script, flags, "--branches 2")  # is the network whose other branches are 0
    two = json.loads(Path("x.json").read_text())["confusion"]
    for conv in network.layer6.conv2d_list[2:]:
        conv.weight.data.zero_()
        conv.bias.data.zero_()
    save("runs/new/last.pth", network, (96, 32))
    succeed(eval_script, flags)
    assert json.loads(Path("x.json").read_text())["confusion"] == two


def test_test_labels_are_not_read():
    save("net.pth", noisy_network())
    name = "berlin/berlin_000000_000019"
    draw(f"data/Cityscapes/leftImg8bit/test/{name}_leftImg8bit.png", size=(100, 50))
    flags = "--ckpt net.pth --data-root data --split test --label-ids ids"
    with mock.patch.object(common, "read_label", side_effect=AssertionError):
        succeed(eval_script, EVAL, flags)
    ids = read("ids/berlin_000000_000019_pred_labelIds.png")
    assert ids.shape == (50, 100) and set(np.unique(ids)) <= set(CITYSCAPES_IDS)


def test_a_folder_with_nineteen_classes_of_its_own():
    for name in "01":
        draw(f"own/images/{name}.png")
    seven = "--source folder --source-root scenes --target folder --target-root own --num-classes 7"
    refuses("--normalize-entropy", intrada, INTRADA, seven, "--normalize-entropy")
    names = "abcdefghijklmnopqrs"
    Path("own/classes.txt").write_text("\n".join(names))
    own = "--target folder --target-root own"
    refuses("--normalize-entropy", intrada, INTRADA, own, "--normalize-entropy")
    for module in (intrada, bcl):
        refuses("have other classes", module, FLAGS[module], own)
    found = common.scores(torch.ones(19, 19).long(), tuple(names))
    assert list(found) == ["miou19", "iou"] and list(found["iou"]) == list(names)


def test_other_classes_than_cityscapes_nineteen():
    """Published networks of 16 classes have SYNTHIA's; our own have those of a plain folder."""
    network = noisy_network(0, 16)
    save("net.pth", network)
    save("nineteen.pth", noisy_network())
    torch.save(network.state_dict(), "published.pth")
    for other in ("net.pth", "nineteen.pth"):  # neither has the published one's classes
        refuses("have no average", eval_script, EVAL, "--ckpt published.pth", other)
    flags = f"{EVAL} --ckpt net.pth --input-size 64x64"
    refuses("16 classes", eval_script, flags)
    torch.save(network.state_dict(), "net.pth")
    out = succeed(eval_script, flags, "--json x.json --save-dir m --panel p.png")
    found = json.loads(Path("x.json").read_text())
    assert "miou19" not in found and "mIoU 19" not in out and found["iou"]["truck"] is None
    assert found["miou16"] is not None and len(found["confusion"]) == 19
    for name, (image, _) in val_pairs().items():
        prediction = np.array(common.SUBSET_16)[plain_logits(network, image).argmax(0)]
        assert (read(f"m/{name}_trainids.png") != prediction).mean() < 2e-3
    save("net.pth", noisy_network(0, 3))
    draw("images/a.png", size=(64, 64))
    draw("labels/a.png", 1, size=(64, 64))
    Path("classes.txt").write_text("cat\ndog\nhen\n")
    flags = f"{CPU} --ckpt net.pth --target folder --target-root ."
    out = succeed(eval_script, flags)
    assert "hen" in out and "mIoU 3" in out
    refuses("--label-ids", eval_script, flags, "--label-ids ids")


def test_images_of_any_kind():
    """Any mode, size and orientation; equal names; broken files are named, the rest is done."""
    network = noisy_network()
    save("net.pth", network, (96, 64))
    rgb = read(draw("rgb.png", size=(70, 50)))
    Path("in/a/b").mkdir(parents=True)
    Path("other").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    photo = Image.fromarray(rgb)
    photo.save("in/a/b/turned.png", exif=exif)
    photo.convert("P").save("in/palette.png")
    photo.convert("RGBA").save("other/palette.webp", lossless=True)
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save("other/deep.png")
    Path("in/broken.jpg").write_bytes(b"no image")
    Path("in/notes.txt").write_text("no image")
    flags = "--ckpt net.pth --device cpu --images in oth*/* other/deep.png --save-dir"
    status, out, err = call(eval_script, flags, "out")
    assert status == 2 and "in/broken.jpg" in err and "1 of 5" in err and "4 images" in out
    assert "other/palette.webp is written as palette_2" in out
    pixels = {
        "a/b/turned": np.rot90(rgb, -1),
        "palette": np.array(Image.open("in/palette.png").convert("RGB")),
        "palette_2": rgb,
        "deep": np.repeat(rgb[..., :1], 3, 2),
    }
    kinds = ("trainids", "overlay", "entropy")
    written = {path.relative_to("out").as_posix() for path in Path("out").rglob("*.png")}
    assert written == {f"{name}_{kind}.png" for name in pixels for kind in kinds}
    for name, photo in pixels.items():
        height, width = photo.shape[:2]
        factor = math.sqrt(96 * 64 / (width * height))  # the trained area, the photo's own aspect
        Image.fromarray(photo).save("upright.png")
        input_size = (round(width * factor), round(height * factor))
        logits = plain_logits(network, "upright.png", input_size, (width, height))
        ids, overlay, entropy = [read(f"out/{name}_{kind}.png").astype(int) for kind in kinds]
        assert (ids != logits.argmax(0).numpy()).mean() < 2e-3
        assert np.array_equal(overlay, (photo + common.PALETTE[ids].astype(int)) // 2)
        assert np.abs(entropy[..., 0] - 255 * plain_entropy(logits)).max() <= 1
    Path("in/broken.jpg").unlink()
    succeed(eval_script, flags, "in")
    before = sorted(Path("in").rglob("*"))
    succeed(eval_script, flags, "in")  # its own outputs are no images
    assert sorted(Path("in").rglob("*")) == before


def test_outputs_stay_in_their_folder_and_overwrite_no_input():
    save("net.pth", noisy_network())
    for name in ("dots/..png", "dots/...png", "x/a.png", "x/a_trainids.png", "in/sub/b.png"):
        draw(f"{name}.png").rename(name)
    before = Path("x/a_trainids.png").read_bytes()
    flags = "--ckpt net.pth --device cpu --images"
    succeed(eval_script, flags, "dots/..png dots/...png --save-dir out/in")
    assert len(list(Path("out/in").iterdir())) == 6 and len(list(Path("out").iterdir())) == 1
    refuses("x/a_trainids.png", eval_script, flags, "x --save-dir x")
    assert Path("x/a_trainids.png").read_bytes() == before
    Path("link").mkdir()
    Path("link/sub").symlink_to("../x")
    refuses("link", eval_script, flags, "in --save-dir link")
    label = next(iter(val_pairs().values()))[1]
    before = label.read_bytes()
    refuses("is an input", eval_script, EVAL, "--ckpt net.pth --json", label)
    assert label.read_bytes() == before


def write_log(path, stage, seed, values, iters=20, classes=common.CLASSES, **settings):
    """A made-up log: mIoU `values` at iterations 10, 20, ...; road has twice that."""
    settings = {"seed": str(seed), "source": "gta5", "ranking": f"{seed:016x}", **settings}
    lines = [{"iter": 0, "event": "start", "stage": stage, "iters": iters, "settings": settings}]
    for i, value in enumerate(values, 1):
        iou = {**dict.fromkeys(classes), classes[0]: 2 * value}
        lines.append({"iter": 10 * i, "loss_seg": 1 / i, "loss_adv": 0.0, "lr": 1e-3})
        score = {f"miou{len(classes)}": value, "miou16": value + 1, "iou": iou}
        lines.append({"iter": 10 * i, "event": "evaluation", **score})
    common.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def test_compare():
    pytest.importorskip("matplotlib")
    for seed, values in enumerate(((30, 20), (10, 24), (10, 31))):
        write_log(f"runs/a{seed}/log.jsonl", "bcl", seed, values, labels="hybrid", tau="0.8")
    write_log("runs/b0/log.jsonl", "bcl", 0, (10, 12), labels="static", tau="0.8")
    write_log("runs/b1/log.jsonl", "bcl", 0, (10, 13), labels="hybrid", tau=r"$\frac{$")
    write_log("runs/c/stage1/log.jsonl", "stage1", 0, (8, 9), init="0123456789abcdef")
    write_log("runs/d/stage1/log.jsonl", "stage1", 1, (8, 10), init="fedcba9876543210")
    write_log("runs/e/log.jsonl", "stage3", 0, (8, 9), iters=30)
    write_log("runs/g/log.jsonl", "stage1", 0, (40, 45), classes=("cat", "dog"), init="file")
    write_log("runs/h/log.jsonl", "stage3", 0, (), iters=0)
    os.utime("runs/a0/log.jsonl", (1, 1))
    write_log("runs/f/log.jsonl", "bcl", 0, (10, 20), labels="hybrid", tau="0.8")  # a0 once more
    out = succeed(eval_script, "--compare runs/[ab]* runs --save-dir out")
    assert "runs/e/log.jsonl stopped at iteration 20 of 30" in out
    assert "runs/h/log.jsonl was not evaluated" in out and "left out: runs/a0" in out
    rows = json.loads(Path("out/compare.json").read_text())
    labels = ["stage1", "bcl", "bcl labels=static", r"bcl tau=$\frac{$", "stage1"]
    assert [row["label"] for row in rows] == labels and rows[0]["classes"] == ["cat", "dog"]
    assert dict(zip(rows[1]["seed"], rows[1]["last"])) == {"0": 20, "1": 24, "2": 31}
    assert sorted(rows[1]["best"]) == [20, 24, 31]
    text = Path("out/compare.md").read_text()
    assert "| 1 | bcl | 3 | 25.0 ± 5.6 | 25.0 ± 5.6 |" in text and text in out
    assert "| road | 50.0 ± 11.1 | 24.0 | 26.0 | 19.0 ± 1.4 |" in text and "| sky | - |" in text
    assert "mIoU 2, last" in text and "| 1 | stage1 | 1 | 45.0 | 45.0 |" in text
    assert Image.open("out/compare.png").width > 500


def test_compare_leaves_out_classes_of_which_the_source_has_no_pixel():
    write_log("runs/s/log.jsonl", "bcl", 0, (10, 20), source="synthia")
    out = succeed(eval_script, "--compare runs")
    assert "mIoU 16, last" in out and "| 21.0 | 21.0 |" in out and "terrain" not in out


def test_compare_on_foreign_logs():
    write_log("runs/ours/log.jsonl", "bcl", 0, (10, 20))
    ours = Path("runs/ours/log.jsonl").read_text()
    foreign = '123\n[]\n"x"\n{\n{"iter": "x"}\nnull\n\n'
    changes = [("start", "begin"), ('"seed"', '"s"'), ("{", "["), ('"iou": {', '"i": {')]
    changes += [('"iou": {', '"iou": [{}], "x": {'), ('"miou19": 20', '"miou19": "high"')]
    for number, (old, new) in enumerate(changes):
        common.write_text(f"runs/{number}/log.jsonl", ours.replace(old, new))
    Path("runs/folder/log.jsonl").mkdir(parents=True)
    Path("runs/ours/log.jsonl").write_text(f"{foreign}\0\1\2")
    refuses("--compare", eval_script, "--compare runs")
    Path("runs/ours/log.jsonl").write_text(f"{foreign}{ours}{{'iter': 30, 'lo")
    out = succeed(eval_script, "--compare runs")
    assert out.count("is no log of a training run") == 3 and "20.0" in out
    assert out.count("was not evaluated at its end") == 3 and len(changes) == 6


def test_curves():
    write_log("run/stage1/log.jsonl", "stage1", 0, (10, 20))
    for flags in ("--curves run/stage1", "--compare run --save-dir out"):
        with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
            refuses("pip install matplotlib", eval_script, flags)
    refuses("run/log.jsonl", eval_script, "--curves run")
    pytest.importorskip("matplotlib")
    succeed(eval_script, "--curves run/stage1")
    assert Image.open("run/stage1/curves.png").width > 500


def test_features():
    """Points are positions of the encoder's map; prototypes are masked means over all of them."""
    network = noisy_network()
    save("net.pth", network)
    drawn = importlib.util.find_spec("sklearn") is not None
    tsne = "--tsne" if drawn else ""
    with mock.patch.object(eval_script, "FEATURE_POINTS", 7):
        succeed(eval_script, EVAL, "--ckpt net.pth --features a.npz", tsne)
    assert not drawn or Image.open("a.png").width > 500
    found = np.load("a.npz")
    assert list(found["names"]) == list(common.CLASSES)
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
        for c in labels[labels < 19].unique().tolist():
            own = (found["domain"] == domain) & (found["label"] == c)
            points = torch.from_numpy(found["features"][own & ~found["is_prototype"]])
            prototype = torch.from_numpy(found["features"][own & found["is_prototype"]])
            every = features[labels == c]
            assert (prototype - every.mean(0, keepdim=True)).abs().max() < 1e-5 * features.max()
            distance, place = (every[None] - points[:, None]).abs().amax(2).min(1)
            assert distance.max() < 1e-5 * features.max()
            assert len(place.unique()) == len(points) == min(7, len(every))
    label = np.full((64, 64), 255, np.uint8)
    label[3:5] = 0  # between the positions of the map
    common.write_png("own/labels/0.png", label)
    draw("own/images/0.png", size=(64, 64))
    own = "--source folder --source-root own --target folder --target-root own"
    flags = f"{CPU} --ckpt net.pth --input-size 64x64 --features empty.npz"
    refuses("no position", eval_script, own, flags)


REFUSED = [  # flags, what the message names
    ("", "runs/"), ("--ckpt file", "file"), ("--input-size 10x10", "--input-size"),
    ("--compare file --json x", "--json"), ("--source gta5", "--source"),
    ("--compare nowhere", "nowhere"), ("--ckpt net.pth --json folder", "folder"),
    ("--ckpt net.pth --images folder --save-dir out", "folder"),
    ("--ckpt net.pth --data-root nowhere", "nowhere"),
    ("--workers -1", "--workers"),
    ("--target folder", "--target-root"), ("--images file", "--save-dir"),
    ("--images file --compare file", "--compare"), ("--curves file --save-dir=x", "--save-dir"),
    ("--json x --tsne", "--tsne"), ("--features a.txt", "a.txt"),
    ("--ckpt net.pth --images *.jpg --save-dir out", "*.jpg"),
    ("--ckpt net.pth seven.pth", "[19, 7] classes"), ("--ckpt seven.pth", "7 classes"),
    ("--ckpt net.pth net.pth --features a.npz", "one --ckpt"),
    ("--ckpt net.pth --json pipe", "pipe is no regular file"),
    ("--ckpt net.pth --json x --panel x", "written twice"),
    ("--ckpt net.pth --json net.pth", "net.pth is an input"),
    ("--ckpt net.pth --panel file/x.png", "file/x.png"),
    ("--ckpt net.pth --subset nowhere", "nowhere"), ("--ckpt net.pth --subset file", "--subset"),
    ("--ckpt net.pth --target acdc", "acdc"), ("--split test", "test labels are dummies"),
    ("--split test --label-ids x --json x", "--json"),
]  # fmt: skip


@pytest.mark.parametrize("flags, culprit", REFUSED)
def test_refusals_of_eval(flags, culprit, monkeypatch):
    Path("file").write_text("neither a checkpoint nor a name")
    Path("folder").mkdir()
    os.mkfifo("pipe")
    save("net.pth", noisy_network())
    save("seven.pth", noisy_network(0, 7))
    if "--ckpt" in flags and "--images" not in flags and "--data-root" not in flags:
        flags += " --data-root scenes --workers 0"
    refuses(culprit, eval_script, flags)
    assert not list(Path(".").glob("out/*"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    refuses("torchrun", eval_script, "--ckpt net.pth")


# ====================================================================== demo and house


def test_scenes():
    kinds = (("source",), ("target",), ("target", True), ("source",))
    drawn = [demo.draw_scene(np.random.default_rng(7), (96, 64), *kind) for kind in kinds]
    images = [image.tobytes() for image, _ in drawn]
    assert all(np.array_equal(label, drawn[0][1]) for _, label in drawn)
    assert images[0] == images[3] and len(set(images)) == 3  # they differ in appearance alone
    for kind, encoding in (("gta5", (8, 3)), ("synthia", (16, 2)), ("cityscapes", (8, 0))):
        root = common.dataset_root(kind, "scenes")
        data = common.Labelled(common.list_pairs(kind, root), kind, 19)
        found = {value for item in data for value in item["label"].unique().tolist()}
        assert found == {*range(19), 255} - set(common.ABSENT.get(kind, ()))
        assert data.label_paths[0].read_bytes()[24:26] == bytes(encoding)  # bits, colour type
    for kind, count in (("easy", 9), ("hard", 6)):
        assert len(Path(f"scenes/{kind}.txt").read_text().split()) == count
    demo.write_scenes("again", 0, (64, 64), (64, 64), 2, 10, 0)
    demo.write_scenes("other", 1, (64, 64), (64, 64), 2, 2, 0)
    for name in ("GTA5/images/00002.png", "GTA5/labels/00002.png"):
        assert Path("again", name).read_bytes() == Path("scenes", name).read_bytes()
        assert Path("other", name).read_bytes() != Path("scenes", name).read_bytes()
    with pytest.raises(FileExistsError):
        demo.write_scenes("again", 0, (64, 64), (64, 64), 1, 1, 0)


def test_the_house():
    """The scripts are siblings: none imports another; common knows none of them and no flag."""
    allowed = {"common": set(), "demo/scenes": {"common"}}
    allowed.update(intrada={"common"}, bcl={"common"}, eval={"common"})
    for name, ours in allowed.items():
        text = (HERE / f"{name}.py").read_text()
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M))
        assert imported & {"intrada", "bcl", "eval", "common"} == ours, name
        if name == "common":
            assert not imported & {"argparse", "demo"} and not re.search(r"\bargs\b", text)
    for path in [*HERE.glob("*.py"), *HERE.glob("demo/*.py")]:
        long = [line for line in path.read_text().splitlines() if len(line) > 100]
        assert not long, (path, long)


def test_demo_says_so_first():
    with mock.patch.object(demo, "write_scenes", lambda root, **_: shutil.copytree("scenes", root)):
        for module, flags in ((intrada, "--stage 1"), (bcl, "--rounds 1")):
            first = succeed(module, FLAGS[module].removeprefix(PLACES), flags).splitlines()[0]
            assert "Demo" in first and "--data-root" in first
    assert Path("runs/intrada/stage1/last.pth").exists() and Path("runs/bcl/last.pth").exists()


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
    assert len(commands) > 50 and {module for module, _ in commands} == set(modules.values())
    for module, flags in commands:
        with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *shlex.split(flags)]):
            module.parse()
