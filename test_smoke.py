"""Tests of the whole repository: formulas against plain loops, files made by hand, every script from end to end.

    python -m pytest -q test_smoke.py          about two minutes on 2 CPU cores; no network, no downloads

Contents   1 helpers and fixtures   2 IntraDA's and the evaluation's maths   3 BCL's maths   4 networks
           5 labels, readers, sampler   6 weight files   7 street scenes   8 training, step by step as the papers have it
           9 IntraDA end to end   10 BCL end to end   11 eval.py   12 pictures   13 bad inputs
           14 speed: processes, batches, precision, memory   15 dependable: signals, numbers, snapshots   16 the README's commands
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

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the scripts that run as processes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import bcl
import common
import eval as eval_script
import intrada
from common import UserError

# ---------------------------------------------------------------- 1 helpers and fixtures

NETWORK = dict(layers=(1, 1, 1, 1), width=4)
SHARED = "--layers 1,1,1,1 --width 4 --init none --target-size 64x64 --batch-size 2 --log-every 1 --save-every 2 --workers 0 --device cpu"
INTRADA = f"{SHARED} --source-size 64x64 --warmup-iters 2 --max-iters 6 --stop-iters 4 --eval-every 3".split()
BCL = f"{SHARED} --crop 64 --short-side 64 --warmup-crop 64 --warmup-short-side 64 --scales 1.0,1.5 --warmup-iters 2 --rounds 2".split()
BCL += "--round-iters 3 --eval-every 0 --tau 0.5 --momentum 0.9".split()
FLAGS = {intrada: INTRADA, bcl: BCL, eval_script: []}


def process(script, *flags, cwd):
    """A script in a process of its own, as a user starts it."""
    return subprocess.run([sys.executable, HERE / script, *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=200)


def call(module, *flags):
    """A script's main in this process, which saves importing torch again: (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, flags)]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = common.launch(module.main) or 0
            except SystemExit as stop:
                status = stop.code
    return status, out.getvalue(), err.getvalue()


def succeed(module, *flags):
    status, out, err = call(module, *flags)
    assert status == 0, err
    return out


def last(folder, name="last.pth"):
    return torch.load(Path(folder) / name, weights_only=True)


def difference(a, b):
    """Largest difference of two state dicts, relative to each tensor's largest value if that is above 1."""
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() / max(1, a[k].double().abs().max().item()) for k in a)


def records(folder, event=None):
    lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return [r for r in lines if r.get("event") == event]


def softmax(logits):
    exp = [math.exp(z - max(logits)) for z in logits]
    return [e / sum(exp) for e in exp]


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def full(logits, size=(64, 64)):
    return F.interpolate(logits, size, mode="bilinear", align_corners=True)


def read_rgb(path, size=(64, 64)):
    return torch.from_numpy(np.array(Image.open(path).resize(size, Image.BICUBIC))).permute(2, 0, 1)[None]  # (1, 3, H, W)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    common.write_scenes(root, 0, (64, 64), (64, 64), 8, 10, 5, synthia=True, synscapes=True)
    return root


@pytest.fixture
def broken(scenes, tmp_path):
    """A copy of the scenes for a test to damage."""
    return shutil.copytree(scenes, tmp_path / "broken")


@pytest.fixture(scope="session")
def trained(scenes, tmp_path_factory):
    """trained(module) -> output folder of the whole script, run once as a process."""

    @functools.cache
    def train(module):
        out = tmp_path_factory.mktemp("trained") / "run"
        done = process(f"{module.__name__}.py", "--data-root", scenes, "--out", out, *FLAGS[module], cwd=out.parent)
        assert done.returncode == 0 and "mIoU 19" in done.stdout, done.stderr
        return out

    return train


# ---------------------------------------------------------------- 2 IntraDA's and the evaluation's maths


def test_self_information():
    logits = torch.randn(2, 5, 3, 4) * 4
    logits[0, :, 0, 0], logits[1, :, 0, 0] = torch.tensor([1000.0, 0, 0, 0, -1000]), 7
    maps = intrada.self_information(logits.requires_grad_())
    for b, h, w in product(range(2), range(3), range(4)):
        for c, p in enumerate(softmax(logits[b, :, h, w].tolist())):
            assert maps[b, c, h, w].item() == pytest.approx(-p * math.log(p) / math.log(5) if p else 0, rel=1e-5, abs=1e-7)
    assert maps[1, :, 0, 0].sum().item() == pytest.approx(1, abs=1e-6)  # a uniform pixel
    maps.sum().backward()
    assert logits.grad.isfinite().all()


def test_segmentation_loss():
    logits, labels = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randint(0, 3, (2, 4, 5))
    labels[0, 1:] = 255  # the mean is over pixels, so image 0 weighs less
    pixels = [(b, h, w) for b, h, w in product(range(2), range(4), range(5)) if labels[b, h, w] != 255]
    terms = [-math.log(softmax(logits[b, :, h, w].tolist())[labels[b, h, w]]) for b, h, w in pixels]
    assert intrada.segmentation_loss(logits, labels).item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    nothing = intrada.segmentation_loss(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing.item() == 0 and (logits.grad == 0).all()


def test_rarity_factor():
    rare = "wall,fence,pole,traffic light,traffic sign,terrain,rider,truck,bus,train,motorcycle".split(",")
    for chosen in (set(), {0, 1, 10}, {3, 4, 18}, set(range(19)), *({c} for c in range(19))):
        r = sum(common.CLASSES[c] in rare for c in chosen)
        assert intrada.rarity_factor(chosen) == pytest.approx((11 - r) / 11 + 0.5)


def test_confusion_matrix_and_iou():
    labels, predictions, expected = torch.randint(0, 5, (6, 7)), torch.randint(0, 5, (6, 7)), [[0] * 5 for _ in range(5)]
    labels[labels == 3], labels[labels == 4], predictions[predictions == 3] = 255, 200, 0  # 3 is in neither, 4 in the predictions
    for y, p in zip(labels.flatten().tolist(), predictions.flatten().tolist()):
        if y < 5:
            expected[y][p] += 1
    confusion = common.confusion_matrix(labels.to(torch.uint8), predictions.to(torch.uint8), 5)
    assert confusion.tolist() == expected and confusion.dtype == torch.int64
    for c, value in enumerate(common.iou(confusion).tolist()):
        union = sum(expected[c]) + sum(row[c] for row in expected) - expected[c][c]
        assert value == pytest.approx(expected[c][c] / union if union else math.nan, nan_ok=True) and (c != 3 or math.isnan(value))


def test_scores_over_19_16_and_13_classes():
    confusion = torch.randint(1, 50, (19, 19))
    confusion[6], confusion[:, 6] = 0, 0  # absent: left out of every mean
    score, each = common.scores(confusion), 100 * common.iou(confusion)
    for key, left_out in (("miou19", ()), ("miou16", (9, 14, 16)), ("miou13", (9, 14, 16, 3, 4, 5))):
        members = [each[c].item() for c in range(19) if c not in (*left_out, 6)]
        assert score[key] == pytest.approx(sum(members) / len(members))
    assert score["iou"]["traffic light"] is None and score["iou"]["bicycle"] == pytest.approx(each[18].item())
    assert [key for key in common.scores(confusion[:7, :7]) if "miou" in key] == ["miou7"]


@pytest.mark.parametrize("source, size", [((5, 9), (33, 20)), ((17, 33), (128, 64)), ((1, 1), (3, 2)), ((4, 6), (5, 3)), ((3, 2), (7, 1))])
@pytest.mark.parametrize("rows", [0, 1, 7, 100])
def test_upsample_blocks(source, size, rows):
    logits = torch.randn(2, 3, *source)
    blocks = dict(common.upsample_blocks(logits, size, rows))
    assert not rows or list(blocks) == list(range(0, size[1], rows))
    assert (torch.cat(list(blocks.values()), 2) - full(logits.double(), size[::-1])).abs().max() < 1e-5


# ---------------------------------------------------------------- 3 BCL's maths

C, D, H, W = 5, 6, 4, 3
POSITIONS = list(product(range(H), range(W)))


def bcl_inputs():
    """Features (D,H,W), labels (H,W) with 255 and without class 3, prototypes (C,D), present (C,) without 1 and 4."""
    labels = torch.tensor([[255, 0, 2], [4, 255, 0], [1, 2, 2], [1, 0, 255]])
    return torch.randn(D, H, W), labels, torch.randn(C, D), torch.tensor([True, False, True, True, False])


def test_class_prototypes():
    features, labels, _, _ = bcl_inputs()
    prototypes, present = bcl.class_prototypes(features, labels, C)
    for c, d in product(range(C), range(D)):
        values = [features[d, h, w].item() for h, w in POSITIONS if labels[h, w] == c]
        assert present[c] == bool(values) and prototypes[c, d].item() == pytest.approx(sum(values) / max(len(values), 1), abs=1e-6)


def test_contrastive_loss():
    (features, labels, prototypes, present), terms = bcl_inputs(), []
    for h, w in POSITIONS:
        similar = {c: math.exp(cosine(features[:, h, w], prototypes[c]) / 0.1) for c in range(C) if present[c]}
        if labels[h, w].item() in similar:
            terms.append(-math.log(similar[labels[h, w].item()] / sum(similar.values())))
    assert bcl.contrastive_loss(features, labels, prototypes, present, 0.1).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    leaves = features.double().requires_grad_(), prototypes.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f, p: bcl.contrastive_loss(f, labels, p, present, 0.1), leaves)


@pytest.mark.parametrize("case", ["no class in common", "all ignore", "nothing present", "one class present"])
def test_contrastive_loss_is_zero(case):
    features, labels, prototypes, present = bcl_inputs()
    labels = {"no class in common": labels.where(labels == 255, 1), "all ignore": labels * 0 + 255}.get(case, labels)
    present = {"nothing present": present & False, "one class present": torch.arange(C) == 2}.get(case, present)  # softmax of one: 1
    features.requires_grad_(), prototypes.requires_grad_()
    loss = bcl.contrastive_loss(features, labels, prototypes, present, 0.1)
    loss.backward()
    assert loss.item() == 0 and (features.grad == 0).all() and (prototypes.grad == 0).all()


def test_prototype_ema_and_calibrate():
    """A made-up sequence of images with classes coming and going."""
    emas, means = [bcl.PrototypeEMA(C, D, 0.9) for _ in "ST"], [{}, {}]
    for seen in (("ac", "b"), ("", "a"), ("ab", ""), ("bce", "ab"), ("abc", "bd")):
        both = [(torch.randn(C, D), torch.tensor([c in classes for c in "abcde"])) for classes in seen]
        for ema, mean, (prototypes, present) in zip(emas, means, both):
            ema.update(prototypes, present)
            for c in (c for c in range(C) if present[c]):
                mean[c] = 0.9 * mean[c] + 0.1 * prototypes[c] if c in mean else prototypes[c]
            assert ema.seen.tolist() == [c in mean for c in range(C)] and set(ema.state_dict()) == {"mean", "seen"}
            assert all(torch.allclose(ema.mean[c], mean.get(c, torch.zeros(D)), atol=1e-6) for c in range(C))
        prototypes, present = both[0][0] * both[0][1][:, None], both[0][1]
        for c, calibrated in enumerate(bcl.calibrate(prototypes, present, *emas)):
            bias = means[1][c] - means[0][c] if c in means[0] and c in means[1] and present[c] else 0
            assert torch.allclose(calibrated, prototypes[c] + bias, atol=1e-6)
    (a, b), one = torch.randn(2, 3, D), torch.tensor([True, False, False])  # fed with the mean over the images that have the class
    mean, present = bcl.batch_mean([(a, torch.tensor([True, True, False])), (b * one[:, None], one)])
    assert torch.allclose(mean[0], (a[0] + b[0]) / 2) and torch.equal(mean[1], a[1]) and present.tolist() == [True, True, False]


@pytest.mark.parametrize("tau", [-1, 0, 0.3, 0.6, 0.99])
def test_dynamic_labels(tau):
    features, _, prototypes, present = bcl_inputs()
    features[:, 0, 0] = 3 * prototypes[1]  # most similar to a class that is not present
    labels = bcl.dynamic_labels(features, prototypes, present, tau)
    for h, w in POSITIONS:
        similar = {c: cosine(features[:, h, w], prototypes[c]) for c in range(C) if present[c]}
        best = max(similar, key=similar.get)
        assert labels[h, w] == (best if similar[best] > tau else 255)
    assert labels.shape == (H, W) and (bcl.dynamic_labels(features, prototypes, present & False, tau) == 255).all()


def test_dynamic_labels_change_with_the_source_image_and_fill_up_static_ones():
    target, first, second = torch.rand(3, D, H, W)
    ids = torch.arange(H * W).view(H, W)
    one, two = (bcl.dynamic_labels(target, *bcl.class_prototypes(*source, C), 0.1) for source in ((first, ids % 3), (second, ids % 2 + 2)))
    assert set(one.unique().tolist()) <= {0, 1, 2} and set(two.unique().tolist()) <= {2, 3} and (one != two).any()

    static, dynamic = torch.tensor([[0, 255, 3], [255, 255, 2]], dtype=torch.uint8), torch.tensor([[1, 1, 255], [255, 0, 2]])
    assert bcl.hybrid_labels(static, dynamic).tolist() == [[0, 1, 3], [255, 0, 2]]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 1.0])
def test_class_thresholds(ratio):
    binned = [(50 * np.random.default_rng(c).beta(5, c + 1, (40 * c + 3) * (c != 3))).astype(int) for c in range(C)]  # class 3: no pixel
    histogram = torch.stack([torch.from_numpy(np.bincount(b, minlength=50)) for b in binned])
    for threshold, b in zip(bcl.class_thresholds(histogram, ratio).tolist(), binned):
        top = sorted(b, reverse=True)[: math.ceil(ratio * len(b))]
        assert threshold == (top[-1] if top else 50)


def test_confidence_bins():
    p = torch.cat([torch.linspace(0, 1, 1001), 1 - torch.logspace(-7, -1, 200)]).sort().values  # float32
    bins = bcl.confidence_bins(p)
    assert bins.min() == 0 and bins.max() == bcl.BINS - 1 and (bins.diff() >= 0).all()
    assert (bcl.bin_confidence(bins) <= p.double() + 1e-12).all() and (bcl.bin_confidence(bins + 1) >= p.double()).all()
    sure = torch.softmax(torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0], [4]]) + torch.tensor([[0], [10]]), 0)[1]
    histogram = torch.bincount(bcl.confidence_bins(sure), minlength=bcl.BINS)[None]  # of a network that is sure: margins of 10 and more
    assert (bcl.confidence_bins(sure) >= bcl.class_thresholds(histogram, 0.1)).double().mean() == pytest.approx(0.1, abs=0.01)


def test_choose_static():
    prediction, bins, thresholds = torch.randint(0, 3, (6, 7)).to(torch.uint8), torch.randint(0, 30, (6, 7)), torch.tensor([12, 25, 65536])
    static, own = bcl.choose_static(prediction, bins, thresholds, 0.1), sorted(bins.flatten().tolist())[-math.ceil(0.1 * 42)]
    for h, w in product(range(6), range(7)):
        keep = bins[h, w] >= thresholds[int(prediction[h, w])] or bins[h, w] >= own
        assert static[h, w] == (prediction[h, w] if keep else 255)


# ---------------------------------------------------------------- 4 networks


def test_discriminator():
    net = intrada.Discriminator(19)
    convs, leaks = list(net)[::2], list(net)[1::2]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(19, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    assert all((c.kernel_size, c.stride, c.padding) == ((4, 4), (2, 2), (1, 1)) and c.bias is not None for c in convs)
    assert len(leaks) == 4 and all(isinstance(a, torch.nn.LeakyReLU) and a.negative_slope == 0.2 for a in leaks)
    assert intrada.Discriminator(3, 2)(torch.rand(1, 3, 512, 1024)).shape == (1, 1, 16, 32)


def test_network():
    net, pool = common.DeepLabV2(19, (3, 4, 23, 3), 2), common.DeepLabV2(19, **NETWORK).maxpool
    assert [len(getattr(net, f"layer{i}")) for i in (1, 2, 3, 4)] == [3, 4, 23, 3]
    for i, dilation in ((1, 1), (2, 1), (3, 2), (4, 4)):
        for b, block in enumerate(getattr(net, f"layer{i}")):
            stride = (2, 2) if (i, b) == (2, 0) else (1, 1)
            assert block.conv1.stride == stride and block.conv1.kernel_size == block.conv3.kernel_size == (1, 1)
            assert block.conv2.stride == block.conv3.stride == (1, 1) and block.conv2.kernel_size == (3, 3)
            assert block.conv2.dilation == block.conv2.padding == (dilation, dilation)
            assert (block.downsample is None) if b else block.downsample[0].stride == stride
    assert (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (3, 2, 1, True)
    for head, channels in ((net.layer5, 32), (net.layer6, 64)):
        assert [c.dilation for c in head.conv2d_list] == [c.padding for c in head.conv2d_list] == [(d, d) for d in (6, 12, 18, 24)]
        assert all((c.in_channels, c.out_channels, c.kernel_size) == (channels, 19, (3, 3)) and c.bias is not None for c in head.conv2d_list)
        assert all(abs(c.weight.std().item() - 0.01) < 1e-3 for c in head.conv2d_list)
    with torch.device("meta"):
        names = set(torchvision.models.resnet101().state_dict()) - {"fc.weight", "fc.bias"}
    assert {n for n in net.state_dict() if not n.startswith(("layer5.", "layer6."))} == names

    net = common.DeepLabV2(7, **NETWORK).eval()
    main, aux, features = net(torch.randn(1, 3, 512, 1024))
    assert main.shape == aux.shape == (1, 7, 65, 129) and features.shape == (1, 128, 65, 129)
    assert torch.allclose(main, sum(conv(features) for conv in net.layer6.conv2d_list), atol=1e-5)
    assert common.DeepLabV2(7, **NETWORK, aux=False)(torch.randn(1, 3, 64, 64)).aux is None


def test_parameter_groups_hold_every_parameter_once():
    net = common.DeepLabV2(19, **NETWORK)
    trunk, heads = net.parameter_groups(3, 10)
    affine = {id(p) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters() if not p.requires_grad}
    ids = [id(p) for group in (trunk, heads) for p in group["params"]]
    assert (trunk["lr_mult"], heads["lr_mult"]) == (3, 10) and len(affine) == 2 * 17  # BatchNorm is frozen
    assert {id(p) for p in heads["params"]} == {id(p) for head in (net.layer5, net.layer6) for p in head.parameters()}
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in net.parameters()} - affine


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_batchnorm_mode(bn):
    net, image = common.DeepLabV2(3, **NETWORK), torch.randn(1, 3, 64, 64) * 50
    common.set_mode(net, bn)
    before = {k: v.clone() for k, v in net.named_buffers()}
    first = net(image).main
    assert (difference(dict(net.named_buffers()), before) > 0) == (bn == "batch")  # batch: they move; running: they stay
    net.layer2[0].bn2.running_mean += 1
    assert torch.equal(net(image).main, first) == (bn == "batch")  # batch: not used; running: used


# ---------------------------------------------------------------- 5 labels, readers, sampler

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
SYNTHIA_IDS = (3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11)


def draw(path, size=(8, 6), value=None):
    """A PNG or JPEG: grey (one id everywhere), or coloured noise."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise if value is None else np.full(size[::-1], value, np.uint8)).save(path)


def expect_ids(path, kind, ids, table, num_classes=19):
    found = np.asarray(common.read_label(path, kind, num_classes))
    assert found.dtype == np.uint8 and found.tolist() == [[table.index(i) if i in table else 255 for i in row] for row in ids.tolist()]


def test_synthia_label_of_16_bits(tmp_path):
    path, ids = tmp_path / "label.png", np.arange(24).reshape(4, 6)
    common.write_png16(path, np.stack([ids, 1000 + 7 * ids, 0 * ids], 2))  # class, instance, nothing
    assert path.read_bytes()[24:26] == bytes([16, 2])  # bit depth and colour type in IHDR
    expect_ids(path, "synthia", ids, SYNTHIA_IDS)
    with contextlib.suppress(RuntimeError):  # torchvision below 0.21 refuses such files, or gives 8 bits
        decoded = torchvision.io.decode_image(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8), torchvision.io.ImageReadMode.UNCHANGED)
        assert decoded.dtype != torch.uint16 or decoded[0].tolist() == ids.tolist()
    for value in (3, None):  # flattened to 8 bits, grey or RGB
        draw(path, value=value)
        with pytest.raises(UserError, match="label.png"):
            common.read_label(path, "synthia", 19)


LABEL_FILES = [("P", 8, "gta5"), ("P", 4, "gta5"), ("P", 2, "folder"), ("P", 1, "folder"), ("L", 8, "gta5"), ("L", 8, "cityscapes"),
               ("L", 8, "synscapes"), ("1", 1, "folder")]  # fmt: skip


@pytest.mark.parametrize("mode, bits, kind", LABEL_FILES)
def test_label_encodings(mode, bits, kind, tmp_path):
    path, ids = tmp_path / "label.png", (np.arange(256) % 2**bits).astype(np.uint8).reshape(8, 32)  # id -1 is stored as 255
    ids = np.concatenate([ids, 0 * ids])  # with more foreign ids the file would be refused
    image = Image.fromarray(ids.astype(bool) if mode == "1" else ids)
    if mode == "P":  # with a palette that means nothing: the index counts
        image.putpalette(np.random.default_rng(1).integers(0, 256, 3 * 2**bits, dtype=np.uint8).tobytes())
    image.save(path, bits=bits)
    assert path.read_bytes()[24:26] == bytes([bits, 3 if mode == "P" else 0])  # bit depth and colour type in IHDR
    expect_ids(path, kind, ids, *((tuple(range(255)), 255) if kind == "folder" else (CITYSCAPES_IDS, 19)))
    expect_ids(path, "folder", ids, (0, 1, 2), 3)  # what is beyond the number of classes is ignored


def test_resize():
    pixels = np.random.default_rng(0).integers(0, 256, (21, 31, 3), dtype=np.uint8)
    label, image = (np.asarray(common.resize(Image.fromarray(pixels), (12, 8), kind)).astype(int) for kind in ("label", "image"))
    nearest = [[pixels[int((y + 0.5) * 21 / 8), int((x + 0.5) * 31 / 12)] for x in range(12)] for y in range(8)]
    bicubic = F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), (8, 12), mode="bicubic", antialias=True)
    assert np.array_equal(label, nearest) and np.abs(image - bicubic[0].permute(1, 2, 0).clamp(0, 255).numpy()).max() < 2


def test_gta5_nested_folders_and_uneven_sizes(tmp_path):
    draw("GTA5/images/images/00001.png", (191, 105)), draw("GTA5/labels/labels/00001.png", (191, 104), 26)
    pairs = common.list_pairs("gta5", common.dataset_root("gta5", tmp_path))
    item, native = common.Labelled(pairs, "gta5", 19, (96, 48))[0], common.Labelled(pairs, "gta5", 19, (96, 48), native_labels=True)[0]
    assert item["name"] == "00001" and item["image"].shape == native["image"].shape == (3, 48, 96)
    assert item["label"].shape == (48, 96) and native["label"].shape == (104, 191) and (item["label"] == 13).all()


@pytest.mark.parametrize("kind, images, labels, names", [
    ("synscapes", "Synscapes/img/rgb", "Synscapes/img/class", ["1", "2", "10", "100"]),  # not padded: in order of numbers
    ("synthia", "SYNTHIA/RGB", "SYNTHIA/GT/LABELS", ["0000000"]),
    ("synthia", "RAND_CITYSCAPES/RGB", "RAND_CITYSCAPES/GT/LABELS", ["0000000"]),
    ("synthia", "SYNTHIA/RAND_CITYSCAPES/RGB", "SYNTHIA/RAND_CITYSCAPES/GT/LABELS", ["0000000"])])  # fmt: skip
def test_dataset_layouts(kind, images, labels, names, tmp_path):
    for name in names[::-1]:
        draw(f"{images}/{name}.png"), draw(f"{labels}/{name}.png")
    assert list(common.list_pairs(kind, common.dataset_root(kind, tmp_path))) == names


def test_plain_folder_with_jpg_images(tmp_path):
    for stem, suffix in (("a/1", "jpg"), ("b", "JPEG"), ("c", "png")):
        draw(f"images/{stem}.{suffix}"), draw(f"labels/{stem}.png", value=2)
    data = common.Labelled(common.list_pairs("folder", tmp_path), "folder", 3)
    assert sorted(data.names) == ["a/1", "b", "c"] and all((data[i]["label"] == 2).all() for i in range(3))
    draw("images/d.png")
    with pytest.raises(UserError, match="4 images but 3 labels.* d"):
        common.list_pairs("folder", tmp_path)


@pytest.mark.parametrize("start", [0, 5])
def test_sampler_order(start, scenes):
    data = common.Images(common.list_images("cityscapes", scenes / "Cityscapes"))
    whole = [index for _, index in common.EndlessSampler(10, 3, 0, 12, 2)]
    assert sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10)) and whole[:10] != whole[10:20]
    assert whole != [index for _, index in common.EndlessSampler(10, 4, 0, 12, 2)]
    for workers in (0, 2):  # any number of workers gives the same order; starting at step k gives its tail
        batches = common.training_batches(data, 3, 2, start, 12, workers, torch.device("cpu"))
        assert [name for batch in batches for name in batch["name"]] == [data.names[i] for i in whole[2 * start :]]


# ---------------------------------------------------------------- 6 weight files


def published(kind):
    """What a published file of each kind holds: the right names, random values, the size of the tests' network."""
    state = {k: torch.rand(v.shape) + 0.5 if v.is_floating_point() else v for k, v in common.DeepLabV2(19, **NETWORK).state_dict().items()}
    trunk = {k: v for k, v in state.items() if not k.startswith(("layer5.", "layer6."))}
    head = {k.replace("layer6", "layer5"): v for k, v in state.items() if k.startswith("layer6.")}
    stem = {f"target_{k}": v + 1 for k, v in trunk.items() if k.startswith(("conv1", "bn1"))}
    return {
        "advent": state,
        "scale": {f"Scale.{k}": v for k, v in {**trunk, "layer5.conv2d_list.0.weight": torch.rand(21, 128, 3, 3)}.items()},
        "torchvision": {**trunk, "fc.weight": torch.rand(1000, 128), "fc.bias": torch.rand(1000)},
        "bcl": {**trunk, **stem, **head, **{k.replace("layer5", "layer6"): v + 1 for k, v in head.items()}},
        "single": {**trunk, **head},
    }[kind]


WRAPS = {
    "plain": lambda s: s,
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}, "iter": 3},
    "container": lambda s: {"state_dict": s, "epoch": 3},
    "without counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", ["advent", "scale", "torchvision", "bcl", "single"])
def test_published_weights(kind, wrap):
    state, net = published(kind), common.DeepLabV2(19, **NETWORK)
    torch.save(WRAPS[wrap](state), "weights.bin", _use_new_zipfile_serialization=wrap == "plain")  # the others: the old format
    initial = copy.deepcopy(net.state_dict())
    report = common.load_weights(net, "weights.bin")
    own, state = ({k: v for k, v in tensors.items() if "num_batches" not in k} for tensors in (net.state_dict(), state))
    origin = {"advent": {"layer5": "layer5", "layer6": "layer6"}, "bcl": {"layer6": "layer5"}, "single": {"layer6": "layer5"}}.get(kind, {})
    kept = [k for k in own if k.startswith(("layer5", "layer6")) and k[:6] not in origin]
    for name in own.keys() - kept - ({"conv1.weight"} if kind == "torchvision" else set()):
        prefix = {"scale": "Scale.", "bcl": "target_" if name.startswith(("conv1", "bn1")) else ""}.get(kind, "")
        assert torch.equal(own[name], state[prefix + origin.get(name[:6], name[:6]) + name[6:]]), name
    skipped = {"scale": "Scale.layer5", "torchvision": "fc.", "bcl": ("conv1", "bn1", "layer6")}.get(kind, "nothing")
    assert {k for k in report.skipped if "num_batches" not in k} == {k for k in state if k.startswith(skipped)}
    assert sorted(report.initialised) == sorted(kept) and all(torch.equal(own[k], initial[k]) for k in kept)
    assert sorted(k for k in report.loaded if "num_batches" not in k) == sorted(own.keys() - kept)
    if origin:  # the architecture can be read off trained weights
        rebuilt, _ = common.build_model("weights.bin")
        assert (rebuilt.layer5 is None) == (kind != "advent") and torch.equal(rebuilt.layer6.conv2d_list[0].weight, own["layer6.conv2d_list.0.weight"])
    if kind == "torchvision":  # the same picture in both conventions, with the same mean
        image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
        mean, std = torch.tensor(common.MEAN_BGR[::-1]).view(1, 3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        expected = F.conv2d((image - mean) / 255 / std, state["conv1.weight"], stride=2, padding=3)
        assert torch.allclose(net.conv1(common.normalize(image)), expected, rtol=1e-4, atol=1e-3)


def test_our_own_checkpoints():
    for ours in (common.DeepLabV2(5, (1, 2, 3, 1), 8, aux=False), common.DeepLabV2(19, **NETWORK)):
        common.save_checkpoint("weights.pth", ours, iter=1)
        net, report = common.build_model("weights.pth")
        assert (net.num_classes, net.layers, net.width) == (ours.num_classes, ours.layers, ours.width)
        assert difference(net.state_dict(), ours.state_dict()) == 0 and not report.initialised and not report.skipped


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def without(kind, name):
    return {k: v for k, v in published(kind).items() if k != name}


BAD_WEIGHTS = {
    "another class count": lambda: common.DeepLabV2(7, **NETWORK).state_dict(),
    "another width": lambda: common.DeepLabV2(19, (1, 1, 1, 1), 8).state_dict(),
    "another depth": lambda: common.DeepLabV2(19, (1, 1, 2, 1), 4).state_dict(),
    "a trunk tensor is missing": lambda: without("advent", "layer3.0.conv2.weight"),
    "a trunk tensor of Scale is missing": lambda: without("scale", "Scale.layer3.0.conv2.weight"),
    "a head tensor is missing": lambda: without("advent", "layer5.conv2d_list.1.bias"),
    "no trunk": lambda: {"fc.weight": torch.zeros(3)},
    "no network": lambda: {"weight": torch.zeros(3)},
    "no tensors": lambda: {"a": 1},
    "a tensor": lambda: torch.zeros(3),
    "code": lambda: {"state_dict": Malicious()},
    "NaN": lambda: {**published("advent"), "conv1.weight": torch.full((4, 3, 7, 7), math.nan)},
    "integers": lambda: {**published("advent"), "conv1.weight": torch.ones(4, 3, 7, 7, dtype=torch.int8)},
    "sparse": lambda: {**published("advent"), "conv1.weight": torch.ones(4, 3, 7, 7).to_sparse()},
}


@pytest.mark.parametrize("case", [*BAD_WEIGHTS, "truncated", "text", "empty", "missing"])
def test_bad_weights_are_refused(case):
    path = Path("weights.pth")
    if case != "missing":
        torch.save(BAD_WEIGHTS.get(case, lambda: published("advent"))(), path)
        path.write_bytes({"truncated": path.read_bytes()[:30_000], "text": b"404: not found\n", "empty": b""}.get(case, path.read_bytes()))
    with pytest.raises(UserError, match="weights.pth"):
        common.load_weights(common.DeepLabV2(19, **NETWORK), path)
    assert not Path("executed").exists()
    if case == "code":
        torch.load(path, weights_only=False)
        assert Path("executed").exists()  # the trap was armed


# ---------------------------------------------------------------- 7 street scenes


def test_scenes_have_the_real_encodings(scenes):
    encodings = {"GTA5/labels/00001.png": (8, 3), "SYNTHIA/GT/LABELS/0000000.png": (16, 2), "Synscapes/img/class/1.png": (8, 0),
                 "Cityscapes/gtFine/val/dornfeld/dornfeld_000000_000019_gtFine_labelIds.png": (8, 0)}  # fmt: skip
    for name, header in encodings.items():
        assert (scenes / name).read_bytes()[24:26] == bytes(header), name  # bit depth, colour type
    for kind, absent in (("gta5", set()), ("synthia", {9, 14, 16}), ("synscapes", set()), ("cityscapes", set())):
        data = common.Labelled(common.list_pairs(kind, common.dataset_root(kind, scenes)), kind, 19)
        found = set(np.unique([data[i]["label"].numpy() for i in range(len(data))]).tolist())
        assert len(data) == (10 if kind == "cityscapes" else 8) and data[0]["image"].shape == (3, 64, 64)
        assert found == {*range(19), 255} - absent


def test_scenes_differ_in_appearance_alone_and_are_reproducible(scenes, tmp_path):
    draws = [common.draw_scene(np.random.default_rng(7), (96, 64), *kind) for kind in (("source",), ("target",), ("target", True), ("source",))]
    images, labels = zip(*draws)
    assert all(np.array_equal(label, labels[0]) for label in labels)
    assert np.array_equal(images[0], images[3]) and len({image.tobytes() for image in images}) == 3
    hard, easy = ((scenes / f"{name}.txt").read_text().split() for name in ("hard", "easy"))
    names = [name.split("/")[-1] for split in ("train", "val") for name in common.list_images("cityscapes", scenes / "Cityscapes", split)]
    assert len(hard) == 0.4 * len(names) and sorted(hard + easy) == sorted(names)

    for name, seed in (("again", 0), ("other", 1)):
        common.write_scenes(tmp_path / name, seed, (64, 64), (64, 64), 2, 10, 0)
    for name in ("GTA5/images/00002.png", "GTA5/labels/00002.png", "Cityscapes/leftImg8bit/train/brennau/brennau_000002_000019_leftImg8bit.png"):
        assert (tmp_path / "again" / name).read_bytes() == (scenes / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


# ---------------------------------------------------------------- 8 training, step by step as the papers have it


def one_pair():
    """Draw one image of each kind: no order to know of. (source image, source label, target image) as the network takes them."""
    pair = Path("pair")
    common.write_scenes(pair, 0, (64, 64), (64, 64), 1, 1, 1)
    source, target = (read_rgb(next((pair / f).rglob("*.png"))).flip(1).float() for f in ("GTA5/images", "Cityscapes/leftImg8bit/train"))
    mean = torch.tensor([104.00698793, 116.66876762, 122.67891434]).view(1, 3, 1, 1)
    table = torch.tensor([CITYSCAPES_IDS.index(i) if i in CITYSCAPES_IDS else 255 for i in range(256)])
    return source - mean, table[torch.from_numpy(np.array(Image.open(pair / "GTA5/labels/00001.png"))).long()][None], target - mean


def information(logits):
    p = full(logits).softmax(1)
    return -p * (p + 1e-30).log() / math.log(19)


def cross_entropy(logits, labels):
    return F.cross_entropy(full(logits), labels, ignore_index=255)


def sgd(net):
    parts = {mult: [p for n, p in net.named_parameters() if p.requires_grad and n.startswith(("layer5", "layer6")) == (mult == 10)] for mult in (3, 10)}
    return torch.optim.SGD([{"params": params, "mult": mult} for mult, params in parts.items()], lr=1, momentum=0.9, weight_decay=5e-4)


def test_intrada_training_is_the_textbook(monkeypatch):
    (source, label, target), G, nets, Discriminator = one_pair(), common.DeepLabV2(19, **NETWORK), [], intrada.Discriminator
    common.save_checkpoint("init.pth", G)
    monkeypatch.setattr(intrada, "Discriminator", lambda *a, **k: nets.append(Discriminator(*a, **k)) or copy.deepcopy(nets[-1]))
    flags = "--stage 1 --init init.pth --warmup-iters 0 --batch-size 1 --max-iters 4 --stop-iters 3 --lr 1e-3 --lr-d 3e-4 --out run"
    succeed(intrada, "--data-root", "pair", *INTRADA, *f"{flags} --lambda-seg-aux 0.3 --lambda-adv-main 0.5 --lambda-adv-aux 0.2".split())
    optimizers = [sgd(G.train()), *(torch.optim.Adam(D.parameters(), lr=1, betas=(0.9, 0.99)) for D in nets)]
    bce = lambda logits, domain: F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, domain))  # 0 source, 1 target
    for it in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = (1e-3 * group["mult"] if "mult" in group else 3e-4) * (1 - it / 4) ** 0.9
        for D in nets:
            D.requires_grad_(False)
        S = G(source)
        (cross_entropy(S.main, label) + 0.3 * cross_entropy(S.aux, label)).backward()
        T = G(target)
        (0.5 * bce(nets[0](information(T.main)), 0.0) + 0.2 * bce(nets[1](information(T.aux)), 0.0)).backward()
        for D, s, t in zip(nets, S, T):
            D.requires_grad_(True)
            (bce(D(information(s.detach())), 0.0) / 2).backward()
            (bce(D(information(t.detach())), 1.0) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    state = last("run/stage1")
    assert difference(state["model"], G.state_dict()) < 1e-5
    discriminators = {f"{name}.{k}": v for name, D in zip(("main", "aux"), nets) for k, v in D.state_dict().items()}
    assert difference(state["discriminators"], discriminators) < 1e-5
    assert [r["lr"] for r in records("run/stage1")] == [pytest.approx(1e-3 * (1 - it / 4) ** 0.9) for it in range(3)]


def test_bcl_training_is_in_the_papers_order():
    (source, y_source, target), G = one_pair(), common.DeepLabV2(19, **NETWORK, aux=False)
    common.save_checkpoint("init.pth", G)
    flags = "--init init.pth --warmup-iters 0 --batch-size 1 --scales 1.0 --no-flip --lr 1e-3 --momentum 0.5 --tau 0.6 --temperature 0.2 --out run"
    weights = "--lambda-ce 0.9 --lambda-ent 0.3 --lambda-fcl 0.4 --lambda-bcl 0.7 --target-weight 0.6"
    succeed(bcl, "--data-root", "pair", *BCL, *f"{flags} {weights}".split())
    optimizer, ema_source, ema_target = sgd(G.train()), bcl.PrototypeEMA(19, 128, 0.5), bcl.PrototypeEMA(19, 128, 0.5)
    nearest = lambda labels, size: F.interpolate(labels[None].float(), size, mode="nearest-exact")[0].long()
    for it in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / 2 ** (it // 3) * (1 - it % 3 / 3) ** 0.9 * group["mult"]
        S, T = G(source), G(target)
        f_s, f_t, size = S.features[0], T.features[0], S.main.shape[2:]
        static = torch.from_numpy(np.array(Image.open(next(Path(f"run/round{it // 3}/labels").rglob("*.png"))))).long()[None]
        y_s = nearest(y_source, size)[0]
        p_s, in_s = bcl.class_prototypes(f_s, y_s, 19)
        ema_source.update(p_s, in_s)
        dynamic = bcl.dynamic_labels(f_t, bcl.calibrate(p_s, in_s, ema_source, ema_target), in_s, 0.6)
        y_t, y_target = bcl.hybrid_labels(nearest(static, size)[0], dynamic), bcl.hybrid_labels(static, nearest(dynamic[None], (64, 64)))
        p_t, in_t = bcl.class_prototypes(f_t, y_t, 19)
        ema_target.update(p_t, in_t)
        loss = 0.9 * (cross_entropy(S.main, y_source) + 0.6 * cross_entropy(T.main, y_target))
        loss = loss + 0.3 * (information(S.main).sum(1).mean() + 0.6 * information(T.main).sum(1).mean())
        loss = loss + 0.4 * bcl.contrastive_loss(f_t, y_t, p_s, in_s, 0.2) + 0.7 * bcl.contrastive_loss(f_s, y_s, p_t, in_t, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, part in (("model", G), ("ema_source", ema_source), ("ema_target", ema_target)):
        assert difference(last("run")[name], part.state_dict()) < 1e-5, name


# ---------------------------------------------------------------- 9 IntraDA end to end


def ranking(folder):
    return list(csv.DictReader(io.StringIO((Path(folder) / "ranking.csv").read_text())))


def label_names(folder):
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.png"))


def test_intrada_files(trained):
    fields = "loss_seg_main loss_seg_aux loss_adv_main loss_adv_aux loss_d_main loss_d_aux lr seconds".split()
    for folder in (trained(intrada) / "stage1", trained(intrada) / "stage3"):
        log, scores = records(folder), records(folder, "evaluation")
        assert [r["iter"] for r in log] == [1, 2, 3, 4] and all(math.isfinite(r[field]) for r in log for field in fields)
        assert [r["iter"] for r in scores] == [3, 4] and all({"miou19", "miou16", "miou13"} <= r.keys() and len(r["iou"]) == 19 for r in scores)
        assert last(folder, "best.pth")["iter"] == max(scores, key=lambda r: r["miou19"])["iter"] and last(folder)["iter"] == 4


def test_ranking_and_pseudo_labels(trained, scenes):
    """Entropies, order, split and pseudo labels from a plain forward pass of stage 1's network."""
    folder, images = trained(intrada) / "stage2", common.list_images("cityscapes", scenes / "Cityscapes")
    rows, G = ranking(folder), common.build_model(trained(intrada) / "stage1/last.pth")[0].eval()
    assert [float(r["entropy"]) for r in rows] == sorted(float(r["entropy"]) for r in rows) and {r["name"] for r in rows} == set(images)
    assert [r["split"] for r in rows] == ["easy"] * 6 + ["hard"] * 4  # floor(0.67 * 10)
    for split in ("easy", "hard"):
        assert (folder / f"{split}.txt").read_text().split() == [r["name"] for r in rows if r["split"] == split]
    assert label_names(folder / "labels") == label_names(folder / "colour") == sorted(r["name"] for r in rows[:6])
    for row in rows:
        p = full(G(common.normalize(read_rgb(images[row["name"]]))).main).double().softmax(1).detach()
        prediction, entropy = p[0].argmax(0).numpy(), -(p * p.log()).sum().item() / math.log(19) / (19 * 64 * 64)
        rare = len(set(prediction.flat) & {3, 4, 5, 6, 7, 9, 12, 14, 15, 16, 17})
        assert float(row["entropy"]) == pytest.approx(entropy, abs=1e-6)
        assert float(row["normalized_entropy"]) == pytest.approx(entropy * ((11 - rare) / 11 + 0.5), abs=1e-6)
        if row["split"] == "easy":
            label, colour = (Image.open(folder / kind / f"{row['name']}.png") for kind in ("labels", "colour"))
            assert label.mode == "L" and (np.asarray(label) != prediction).mean() < 1e-3
            assert np.array_equal(np.asarray(colour.convert("RGB")), common.PALETTE[np.asarray(label)])


@pytest.mark.parametrize("flag, column", [("--no-normalize-entropy", "entropy"), ("--normalize-entropy", "normalized_entropy")])
def test_stage_2_with_any_checkpoint(flag, column, scenes):
    torch.save({"state_dict": {k: v * (0.02 if "layer6" in k else 1) for k, v in published("advent").items()}}, "published.pth")
    succeed(intrada, "--data-root", scenes, *INTRADA, "--stage", 2, "--ckpt", "published.pth", "--out", "run", "--ratio", 0.3, flag)
    values = [float(r[column]) for r in ranking("run/stage2")]
    assert values == sorted(values) and [r["split"] for r in ranking("run/stage2")] == ["easy"] * 3 + ["hard"] * 7
    common.save_checkpoint("other/stage1/best.pth", common.DeepLabV2(19, **NETWORK))  # best is handed over on request only
    flags = ["--data-root", scenes, *INTRADA, "--stage", 2, "--out", "other"]
    assert call(intrada, *flags)[0] == 2 and call(intrada, *flags, "--select", "best")[0] == 0


def test_lambda_1_is_self_training(trained, scenes):
    shutil.copytree(trained(intrada), "run", ignore=shutil.ignore_patterns("stage3"))
    for stage in (2, 3):
        succeed(intrada, "--data-root", scenes, *INTRADA, "--stage", stage, "--out", "run", "--ratio", 1)
    assert {r["split"] for r in ranking("run/stage2")} == {"easy"} and records("run/stage3")[0].get("loss_adv_main") is None


def test_several_splits_from_one_inference_pass(trained, scenes):
    shutil.copytree(trained(intrada) / "stage1", "run/stage1")
    flags = ["--data-root", scenes, *INTRADA, "--stage", 2, "--out", "run", "--ratio"]
    with mock.patch.object(common, "predict_maps", wraps=common.predict_maps) as network:
        succeed(intrada, *flags, 0.3, 0.67, 1.0)
        assert network.call_count == 10
        succeed(intrada, *flags, 0.5)  # nor does another λ later on need the network
        assert network.call_count == 10
    for ratio, easy in (("0.3", 3), ("0.67", 6), ("1", 10)):
        folder = Path(f"run/ratio{ratio}/stage2")
        assert [r["split"] for r in ranking(folder)] == ["easy"] * easy + ["hard"] * (10 - easy) and len(label_names(folder / "labels")) == easy
        assert [r["name"] for r in ranking(folder)] == [r["name"] for r in ranking("run/stage2")]
    succeed(intrada, "--data-root", scenes, *INTRADA, "--stage", 3, "--out", "run/ratio0.3")
    assert [r["args"]["ratio"] for r in records("run/ratio0.3/stage3", "start")] == [[0.3]]
    status, _, err = call(intrada, "--data-root", scenes, *INTRADA, "--stage", 3, "--out", "run/ratio1", "--ratio", 0.5)
    assert status == 2 and "--ratio 0.5" in err
    for path in Path("run/ratio0.3/stage2/labels").rglob("*.png"):
        path.unlink()
    assert call(intrada, "--data-root", scenes, *INTRADA, "--stage", 3, "--out", "run/ratio0.3", "--overwrite")[0] == 2
    succeed(intrada, *flags, 0.3, 0.67)  # brings them back
    assert len(label_names(Path("run/ratio0.3/stage2/labels"))) == 3
    status, _, err = call(intrada, "--data-root", scenes, *INTRADA, "--stage", "all", "--ratio", 0.3, 0.5)
    assert status == 2 and "--stage 2" in err


def test_source_only_reads_no_target_image(broken):
    for path in (broken / "Cityscapes/leftImg8bit/train").rglob("*.png"):
        path.write_bytes(b"garbage")
    flags = ["--data-root", broken, *INTRADA, "--stage", 1, "--out", "run", "--lambda-adv-main", 0]
    succeed(intrada, *flags, "--lambda-adv-aux", 0)
    assert records("run/stage1")[0].get("loss_d_main") is None
    status, _, err = call(intrada, *flags, "--out", "other")
    assert status == 2 and "leftImg8bit" in err


BOTH = pytest.mark.parametrize("module, stages", [(intrada, ["warmup", "stage1", "stage3"]), (bcl, ["warmup", "."])])


@BOTH
@pytest.mark.parametrize("labels", ["garbage", "deleted"])
def test_training_opens_no_target_label(module, stages, labels, broken, trained):
    folder = broken / "Cityscapes/gtFine/train"
    shutil.rmtree(folder) if labels == "deleted" else [path.write_bytes(b"garbage") for path in folder.rglob("*.png")]
    succeed(module, "--data-root", broken, *FLAGS[module], "--out", "run")
    assert difference(last(Path("run", stages[-1]))["model"], last(trained(module) / stages[-1])["model"]) == 0


class Killed(BaseException):
    pass


def numbers(folder):
    """What a log says, but for times and speeds."""
    timed = ("seconds", "data_seconds", "it_per_s", "tflops", "peak_memory_mb", "args", "about")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@BOTH
def test_killed_again_and_again(module, stages, scenes, trained):
    """Killed just before or just after some file is put in its place (of a checkpoint, a prediction, a label, a table),
    with other numbers of workers on the way: files, weights and logs as if nothing had happened."""
    replace, whole, attempt, status = os.replace, trained(module), 0, None

    def replace_and_die(old, new):
        nonlocal left
        left -= 1
        if left == 0 and attempt % 2:
            raise Killed
        replace(old, new)
        if left == 0:
            raise Killed

    while status is None and attempt < 40:
        attempt += 1
        left, flags = 2 + 3 * attempt, ["--out", "run", "--resume", "--workers", int(attempt == 5)]
        with mock.patch.object(os, "replace", replace_and_die), contextlib.suppress(Killed):
            status, _, err = call(module, "--data-root", scenes, *FLAGS[module], *flags)
    assert status == 0 and attempt > 5, err
    for stage in stages:
        a, b = last(Path("run", stage)), last(whole / stage)
        assert difference(a["model"], b["model"]) == 0 and a["scores"]["iou"] == b["scores"]["iou"]
        assert numbers(Path("run", stage)) == numbers(whole / stage)
    content = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.suffix in (".png", ".csv", ".txt", ".json")} for f in (Path("run"), whole)]
    assert content[0].keys() == content[1].keys() and not [p for p in Path("run").rglob("*") if p.suffix == ".tmp"]
    ours = [p for p in content[0] if "trainids" not in p.name and "labels" not in p.parts]  # these hold the digest of a checkpoint
    assert all(content[0][p] == content[1][p] for p in ours)


def test_a_run_is_not_overwritten(trained, scenes):
    shutil.copytree(trained(intrada) / "stage1", "run/stage1")
    before, flags = Path("run/stage1/last.pth").read_bytes(), ["--data-root", scenes, *INTRADA, "--stage", 1, "--out", "run"]
    assert "stage1: already trained" in succeed(intrada, *flags)
    status, _, err = call(intrada, *flags, "--lr", 0.01)
    assert status == 2 and "(lr, schedule)" in err and "--overwrite" in err
    assert Path("run/stage1/last.pth").read_bytes() == before
    succeed(intrada, *flags, "--lr", 0.01, "--overwrite")
    torch.save({**last("run/stage1"), "iter": 2}, "run/stage1/last.pth")
    status, _, err = call(intrada, *flags, "--lr", 0.01)
    assert status == 2 and "--resume" in err


def test_demo_says_so_first(scenes, monkeypatch):
    monkeypatch.setattr(common, "write_scenes", lambda root, *a, **k: shutil.copytree(scenes, root))
    for module, flags in ((intrada, [*INTRADA, "--stage", 1]), (bcl, [*BCL, "--rounds", 1])):
        first = succeed(module, *flags).splitlines()[0]
        assert "Demo" in first and "--data-root" in first
    assert Path("data/scenes/GTA5").is_dir() and Path("runs/intrada/stage1/last.pth").exists() and Path("runs/bcl/last.pth").exists()


# ---------------------------------------------------------------- 10 BCL end to end


def test_bcl_files_and_log(trained, scenes):
    images, log = common.list_images("cityscapes", scenes / "Cityscapes"), records(trained(bcl))
    assert all((trained(bcl) / name).exists() for name in ("warmup/last.pth", "best.pth")) and last(trained(bcl)).keys() >= {"ema_source", "ema_target"}
    for round_, kind in product((0, 1), ("labels", "colour")):
        assert label_names(trained(bcl) / f"round{round_}" / kind) == sorted(images)
    assert [r["iter"] for r in log] == [1, 2, 3, 4, 5, 6] and [r["round"] for r in log] == [0, 0, 0, 1, 1, 1]
    assert all(math.isfinite(r[f"loss_{term}"]) for r in log for term in "ce_source ce_target ent_source ent_target fcl bcl".split())
    assert [r["lr"] / log[0]["lr"] for r in log] == [pytest.approx((1 - i / 3) ** 0.9 * half) for half in (1, 0.5) for i in range(3)]

    statistics = records(trained(bcl), "labels")
    assert [r["round"] for r in statistics] == [0, 1] and any(r["hybrid"]["coverage"] > r["static"]["coverage"] for r in statistics)
    for r in statistics:
        assert 0 < max(r["static"]["coverage"], r["dynamic"]["coverage"]) <= r["hybrid"]["coverage"] <= 100 and 0 <= r["hybrid"]["accuracy"] <= 100
        assert all(len(r[kind][f"{key}_per_class"]) == 19 for kind in ("static", "dynamic", "hybrid") for key in ("coverage", "accuracy"))


def test_static_labels_are_the_most_confident_pixels(trained, scenes):
    """Round 0 from a plain forward pass of the warm-up's network and sorting."""
    G, images = common.build_model(trained(bcl) / "warmup/last.pth")[0].eval(), common.list_images("cityscapes", scenes / "Cityscapes")
    with torch.no_grad():
        p = torch.stack([full(G(common.normalize(read_rgb(path))).main)[0].softmax(0) for path in images.values()])
    confidence, label = (x.numpy() for x in p.max(1))  # (N, H, W)
    cut = {c: np.sort(confidence[label == c])[-math.ceil(0.1 * (label == c).sum())] for c in np.unique(label)}
    for name, conf, y in zip(images, confidence, label):
        keep = (conf >= np.vectorize(cut.get)(y)) | (conf >= np.sort(conf.ravel())[-math.ceil(0.1 * 64 * 64)])
        assert (np.asarray(Image.open(trained(bcl) / f"round0/labels/{name}.png")) != np.where(keep, y, 255)).mean() < 5e-3


ABLATIONS = [  # flags of two runs; what only the second has; does that change the weights?
    ("--labels static", "--tau 1", False),  # dynamic labels are not used
    ("--labels static", "--static-ratio 0.5", True),
    ("--labels dynamic", "--static-ratio 0.5", False),  # nor static ones
    ("--labels dynamic", "--tau 1", True),
    ("--labels hybrid", "--tau 1", True),
    ("--labels hybrid", "--static-ratio 0.5", True),
    ("--labels dynamic --no-calibrate", "--momentum 0", False),  # plain source prototypes: the EMA does not matter
    ("--labels dynamic", "--momentum 0", True),
    ("--labels dynamic", "--no-calibrate", True),
    ("--lambda-fcl 0 --lambda-bcl 0", "--temperature 0.5", False),
    ("--lambda-fcl 0", "--temperature 0.5", True),
    ("--lambda-bcl 0", "--temperature 0.5", True),
    ("--lambda-fcl 0", "--lambda-bcl 0", True),
    ("--lambda-bcl 0", "--lambda-fcl 0", True),
    ("--lambda-fcl 0 --lambda-bcl 0 --target-weight 0", "--labels static", False),  # no term is left that labels act on
    ("--lambda-fcl 0 --lambda-bcl 0", "--target-weight 0", True),
    ("--lambda-fcl 0 --lambda-bcl 0", "--lambda-ent 0.4", True),
]


@pytest.fixture(scope="session")
def ablation(trained, scenes, tmp_path_factory):
    """ablation(flags) -> the weights after one short round from the warm-up; each set of flags is run once."""
    done, setup = {}, "--warmup-iters 0 --rounds 1 --lr 1e-2 --tau 0.6 --lambda-fcl 0.7 --lambda-bcl 0.7 --lambda-ent 0".split()

    def train(flags):
        if flags not in done:
            out = tmp_path_factory.mktemp("ablation")
            succeed(bcl, "--data-root", scenes, *BCL, "--init", trained(bcl) / "warmup/last.pth", *setup, *flags.split(), "--out", out)
            done[flags] = last(out)["model"]
        return done[flags]

    return train


@pytest.mark.parametrize("flags, switch, matters", ABLATIONS)
def test_each_switch_changes_what_it_names(flags, switch, matters, ablation):
    assert (difference(ablation(flags), ablation(f"{flags} {switch}")) > 0) == matters


def test_batch_of_one_without_a_labelled_pixel(broken):
    for path in sorted((broken / "GTA5/labels").iterdir())[1:]:  # with none left the set would be refused
        draw(path, (64, 64), 1)
    succeed(bcl, "--data-root", broken, *BCL, "--warmup-iters", 0, "--rounds", 1, "--batch-size", 1, "--out", "run")
    assert all(r["loss_fcl"] == r["loss_bcl"] == r["loss_ce_source"] == 0 and math.isfinite(r["loss"]) for r in records("run"))


def test_augment():
    label = Image.fromarray(np.random.default_rng(0).integers(0, 200, (40, 60), dtype=np.uint8))
    columns = Image.fromarray(np.repeat(np.arange(60, dtype=np.uint8)[None], 40, 0))

    def crops(crop, scales, flip, label=label):
        parts = [bcl.augment(40, scales, crop, flip)(Image.merge("RGB", [label] * 3), label, np.random.default_rng(s)) for s in range(20)]
        return [tuple(map(np.asarray, both)) for both in parts]

    first = crops(32, (1.0,), True)
    np.random.seed(3)
    assert all(x.shape == (32, 32, 3) and np.array_equal(x[..., 0], y) for x, y in first)  # image and label move together
    assert len({y.tobytes() for _, y in first}) > 10 and all(np.array_equal(a[1], b[1]) for a, b in zip(first, crops(32, (1.0,), True)))
    falling = [sum(y[0, 0] > y[0, -1] for _, y in crops(40, (1.0,), flip, columns)) for flip in (True, False)]
    assert 3 < falling[0] < 17 and falling[1] == 0  # every second image is mirrored
    assert {len(np.unique(y)) for _, y in crops(32, (1.0, 2.0), True, columns)} == {16, 17, 32}  # half as many columns at scale 2


# ---------------------------------------------------------------- 11 eval.py


def test_eval(trained, scenes, tmp_path):
    """Two averaged checkpoints against a plain forward pass at the labels' size."""
    paths, confusion = [trained(intrada) / stage / "last.pth" for stage in ("stage1", "stage3")], np.zeros((19, 19), int)
    flags = ["--data-root", scenes, "--input-size", "96x64", "--json", "out/scores.json", "--save-dir", "pictures", "--device", "cpu"]
    done = process("eval.py", "--ckpt", *paths, *flags, cwd=tmp_path)
    assert done.returncode == 0 and "mIoU 13" in done.stdout, done.stderr
    found, models = json.loads(Path("out/scores.json").read_text()), [common.build_model(path)[0].eval() for path in paths]
    for name, (image, label) in common.list_pairs("cityscapes", scenes / "Cityscapes", "val").items():
        logits = sum(full(m(common.normalize(read_rgb(image, (96, 64)))).main.detach()) for m in models) / 2
        prediction = logits[0].argmax(0).numpy()
        for y, p in zip(np.asarray(Image.open(label)).flat, prediction.flat):
            if y in CITYSCAPES_IDS:
                confusion[CITYSCAPES_IDS.index(y), p] += 1
        colour, entropy = (np.asarray(Image.open(f"pictures/{name}_{kind}.png").convert(mode)) for kind, mode in (("colour", "RGB"), ("entropy", "L")))
        expected = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)[0].numpy() / math.log(19) * 255
        assert (colour != common.PALETTE[prediction]).any(2).mean() < 1e-3 and np.abs(entropy - expected).max() < 1
    assert np.abs(found["confusion"] - confusion).sum() <= 4 and np.sum(found["confusion"]) == confusion.sum()
    assert found["images"] == 5 and found["seconds"] > 0 and list(found["iou"]) == list(common.CLASSES)
    expected = common.scores(torch.tensor(found["confusion"]))
    assert all(found[key] == pytest.approx(expected[key]) for key in ("miou19", "miou16", "miou13"))


def test_eval_takes_the_newest_checkpoint_and_a_subset(scenes):
    for name, age in (("runs/b/last.pth", 30), ("runs/a/stage3/last.pth", 10), ("runs/c/last.pth", 20), ("runs/d/best.pth", 0)):
        common.save_checkpoint(name, common.DeepLabV2(19, **NETWORK))
        os.utime(name, (1e9 - age, 1e9 - age))
    flags = ["--data-root", scenes, "--input-size", "64x64", "--workers", 0]
    out = succeed(eval_script, *flags, "--ckpt")
    assert "runs/a/stage3/last.pth" in out and "5 images" in out
    assert "2 images" in succeed(eval_script, *flags, "--subset", scenes / "hard.txt")


def noisy_network(seed, classes=19):
    """Random weights whose BatchNorm statistics are not the initial ones, in training mode."""
    torch.manual_seed(seed)
    net = common.DeepLabV2(classes, **NETWORK)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
        elif isinstance(module, torch.nn.Conv2d):
            module.weight.data.mul_(3)
    return net


def naive(models, image, size, scales, flip):
    """Averaged upsampled logits, plainly: image (1,3,H,W) uint8, already at the largest scale."""
    maps, height, width = [], *image.shape[2:]
    for scale in scales:
        hw = (round(height * scale / max(scales)), round(width * scale / max(scales)))
        x = image.float() if hw == (height, width) else F.interpolate(image.float(), hw, mode="bicubic", antialias=True).clamp(0, 255)
        for model, mirrored in product(models, (False, True) if flip else (False,)):
            y = full(model.eval()(common.normalize(x.flip(3) if mirrored else x)).main, size).detach()
            maps.append(y.flip(3) if mirrored else y)
    return sum(maps) / len(maps)


@pytest.mark.parametrize("scales, flip", [((1.0,), False), ((0.75, 1.0, 1.5), True)])
def test_test_time_options_against_plain_averaging(scales, flip):
    models, image = [noisy_network(0), noisy_network(1)], torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    before = copy.deepcopy(models[0].state_dict())
    lean = [common.inference_copy(model) for model in models]
    assert models[0].training and models[0].layer5 is not None and not lean[0].training
    assert {p.data_ptr() for p in lean[0].parameters()} <= {p.data_ptr() for p in models[0].parameters()}  # no second set of weights
    with torch.no_grad():
        maps, blocks = common.predict_maps(lean, image, scales, flip), []
        label = common.predict_labels(maps, (70, 50), blocks.append)
    expected = naive(models, image, (50, 70), scales, flip)
    assert difference(before, models[0].state_dict()) == 0 and label.dtype == torch.uint8
    assert (torch.cat(blocks, 2) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (label != expected[0].argmax(0)).float().mean() < 2e-3 and len(label.unique()) > 2


def test_predict_labels_takes_the_first_of_equals():
    logits = torch.tensor([0.0, 2, 2, 1, -1]).view(1, 5, 1, 1).expand(1, 5, 3, 4)
    assert (common.predict_labels(logits, (9, 40)) == 1).all()


def test_segment_images(capsys):
    """Any mode, size and orientation; equal names; against a plain forward pass at the photo's size."""
    model = noisy_network(0)
    common.save_checkpoint("net.pth", model, input_size=(96, 64))
    rgb = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Path("in/a/b").mkdir(parents=True), Path("other").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    Image.fromarray(rgb).save("in/a/b/turned.png", exif=exif)
    Image.fromarray(rgb).convert("P").save("in/palette.png"), Image.fromarray(rgb).convert("RGBA").save("other/palette.webp", lossless=True)
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save("other/deep.png")
    Path("in/broken.jpg").write_bytes(b"no image"), Path("in/notes.txt").write_text("no image")
    status, out, err = call(eval_script, "--ckpt", "net.pth", "--images", "in", "oth*/*", "other/deep.png", "--save-dir", "out",
                            "--flip", "--multi-scale", 0.5, 1, "--batch-size", 3, "--workers", 0, "--device", "cpu")  # fmt: skip
    assert status == 2 and "in/broken.jpg" in err and "1 of 5" in err and "4 images, " in out and "Traceback" not in err
    names, kinds = ["a/b/turned", "palette", "palette_2", "deep"], ("trainids", "colour", "overlay", "entropy")
    assert {p.relative_to("out").as_posix() for p in Path("out").rglob("*.png")} == {f"{n}_{k}.png" for n in names for k in kinds}
    pixels = {"a/b/turned": np.rot90(rgb, -1), "palette": np.array(Image.open("in/palette.png").convert("RGB")),
              "palette_2": rgb, "deep": np.repeat(rgb[..., :1], 3, 2)}  # fmt: skip
    for name, photo in pixels.items():
        height, width = photo.shape[:2]
        factor = math.sqrt(96 * 64 / (width * height))  # the area it was trained with, the photo's own aspect
        small = Image.fromarray(np.ascontiguousarray(photo)).resize((round(width * factor), round(height * factor)), Image.BICUBIC)
        logits = naive([model], torch.from_numpy(np.array(small)).permute(2, 0, 1)[None], (height, width), (0.5, 1), True)
        ids, colour, overlay, entropy = (np.asarray(Image.open(f"out/{name}_{kind}.png")).astype(int) for kind in kinds)
        expected = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)[0].numpy() / math.log(19) * 255
        assert ids.shape == entropy.shape == (height, width) and (ids != logits[0].argmax(0).numpy()).mean() < 2e-3
        assert np.array_equal(colour, common.PALETTE[ids]) and np.array_equal(overlay, (photo.astype(int) + colour) // 2)
        assert np.abs(entropy - expected).max() <= 1
    assert len(np.unique(ids)) > 2
    label = np.asarray(Image.open("out/deep_trainids.png"))
    assert label.dtype == np.uint8 and call(eval_script, "--ckpt", "net.pth", "--images", "other/deep.png", "--save-dir", "out2", "--input-size", "64x32", "--workers", 0)[0] == 0


def test_features(scenes):
    """Sampled points are pixels of the encoder's map; prototypes are masked means over all of them."""
    model = noisy_network(0)
    common.save_checkpoint("net.pth", model)
    flags = ["--ckpt", "net.pth", "--data-root", scenes, "--input-size", "64x64", "--points", 7, "--workers", 0, "--device", "cpu"]
    assert "128" in succeed(eval_script, *flags, "--features", "a.npz") and Path("a.png").exists()
    found = dict(np.load("a.npz"))
    assert found["features"].dtype == np.float32 and list(found["names"]) == list(common.CLASSES)
    for domain, (kind, root, split) in enumerate((("gta5", "GTA5", "train"), ("cityscapes", "Cityscapes", "val"))):
        features, labels = [], []
        for image, label in common.list_pairs(kind, scenes / root, split).values():
            f = model.eval()(common.normalize(read_rgb(image))).features[0].detach()
            y = F.interpolate(torch.from_numpy(np.array(common.read_label(label, kind, 19)))[None, None].float(), f.shape[1:], mode="nearest-exact")
            features.append(f.flatten(1).T), labels.append(y.flatten())
        features, labels = torch.cat(features), torch.cat(labels)
        scale = features.abs().max().item()
        own = found["domain"] == domain
        for c in range(19):
            points, all_of_class = found["features"][own & (found["label"] == c) & ~found["is_prototype"]], features[labels == c].numpy()
            prototype = found["features"][own & (found["label"] == c) & found["is_prototype"]]
            assert len(points) == min(7, len(all_of_class)) and len(prototype) == min(1, len(all_of_class))
            if len(points):
                distances = np.abs(all_of_class[None] - points[:, None]).max(2)  # every point is another pixel
                assert distances.min(1).max() < 1e-5 * scale and len(np.unique(distances.argmin(1))) == len(points)
                assert np.allclose(prototype[0], all_of_class.mean(0), atol=1e-5 * scale)
    succeed(eval_script, *flags, "--features", "b.npz"), succeed(eval_script, *flags, "--features", "c.npz", "--seed", 1)
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes() and not np.array_equal(np.load("c.npz")["features"], found["features"])


def write_log(path, stage, seed, values, stop=20, **flags):
    """A made-up log: mIoU `values` at iterations 10, 20, ...; road has twice that, the other classes are absent."""
    args = {"seed": seed, "out": str(path), "stop_iters": stop, "warmup_iters": 20, "rounds": 2, "round_iters": 10, "ratio": 0.67, **flags}
    lines, best = [{"event": "start", "stage": stage, "about": "", "args": args}], 0
    for i, value in enumerate(values, 1):
        best, iou = max(best, value), {name: None for name in common.CLASSES} | {"road": 2 * value}
        lines.append({"iter": 10 * i, "loss_seg": 1.0 / i, "loss_adv": None, "lr": 1e-3})
        lines.append({"iter": 10 * i, "event": "evaluation", "miou19": value, "iou": iou, "best": best, "images": 5})
    common.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def test_compare():
    for seed, values in enumerate(((30, 20), (10, 24), (10, 31))):
        write_log(f"runs/a{seed}/log.jsonl", "bcl", seed, values, labels="hybrid", tau=0.8)
    for i, (labels, tau) in enumerate((("static", 0.8), ("hybrid", 0.5))):
        write_log(f"runs/b{i}/log.jsonl", "bcl", 0, (10, 12 + i), labels=labels, tau=tau)
    write_log("runs/c/stage1/log.jsonl", "stage1", 0, (8, 9), ratio=0.5), write_log("runs/d/stage1/log.jsonl", "stage1", 1, (8, 10))  # ratio: not stage 1's
    write_log("runs/e/log.jsonl", "stage3", 0, (8, 9), stop=30)
    os.utime("runs/a0/log.jsonl", (1, 1))
    write_log("runs/f/log.jsonl", "bcl", 0, (10, 20), labels="hybrid", tau=0.8)  # a0 once more, newer
    out = succeed(eval_script, "--compare", "runs/[ab]*", "runs", "--save-dir", "out")
    assert "runs/e/log.jsonl: did not end" in out and "1 older runs" in out
    rows = {row["label"]: row for row in json.loads(Path("out/compare.json").read_text())}
    assert list(rows) == ["bcl", "bcl --labels static", "bcl --tau 0.5", "stage1"] and rows["bcl"]["seeds"] == [0, 1, 2] and rows["stage1"]["seeds"] == [0, 1]
    assert rows["bcl"]["last"]["mean"] == 25 and rows["bcl"]["last"]["std"] == pytest.approx(math.sqrt((25 + 1 + 36) / 2))
    assert rows["bcl"]["best"]["values"] == [20, 24, 31] and rows["bcl"]["iou"]["road"]["mean"] == 50 and rows["bcl --tau 0.5"]["last"]["std"] is None
    text = Path("out/compare.md").read_text()
    assert re.search(r"\| 1 +\| bcl +\| 3 +\| 25\.0 ± 5\.6 +\| 25\.0 ± 5\.6 +\|", text) and re.search(r"\| road +\| 50\.0 ± 11\.1 \| 24\.0", text) and text in out
    assert Image.open("out/compare.png").width >= 900


# ---------------------------------------------------------------- 12 pictures


def drawn(picture, rgb):
    """Share of the pixels that have exactly this colour."""
    return (np.asarray(picture) == rgb).all(2).mean()


def test_training_leaves_pictures(trained):
    """Of every evaluation a panel, BCL's with its labels beside two source images; curves; the ranking's gallery."""
    for folder, names in ((trained(intrada) / "stage1", ["0000003.png", "0000004.png"]), (trained(bcl), ["0000006.png", "0000006_labels.png"])):
        assert [p.name for p in sorted((folder / "pictures").iterdir())] == names and (folder / "curves.png").exists()
    for name in ("gallery.png", "histogram.png"):
        assert min(Image.open(trained(intrada) / "stage2" / name).size) > 100
    labels = np.asarray(Image.open(trained(bcl) / "pictures/0000006_labels.png").convert("RGB"))
    x = sum(max(128, round(common.font().getlength(t)) + 8) + 4 for t in ("source image", "its label"))
    assert np.array_equal(labels[22:150, x : x + 128], labels[154:282, x : x + 128])  # one target image ...
    assert (labels[22:150, :128] != labels[154:282, :128]).any()  # beside two source images
    best = torch.load(trained(intrada) / "stage1/best.pth", weights_only=True)
    warmup = torch.load(trained(intrada) / "warmup/last.pth", weights_only=True)
    assert best["input_size"] == warmup["input_size"] == (64, 64) and best["oracle"]  # what eval.py takes the input's size from


def test_pictures(trained, scenes):
    dataset = common.validation_set("cityscapes", scenes / "Cityscapes", 19, (64, 64))
    model, names = common.build_model(trained(intrada) / "stage3/last.pth")[0].train(), dataset.names[3:0:-2]
    common.write_panel("out/panel.png", [("prediction", model)], dataset, names, torch.device("cpu"), intrada.self_information)
    panel = np.asarray(Image.open("out/panel.png").convert("RGB"))
    image, label = dataset.open(dataset.names.index(names[0]))
    truth = common.colour(np.asarray(label.resize((128, 128), Image.NEAREST)), 19)
    assert model.training and np.array_equal(panel[22:150, :128], image.resize((128, 128), Image.BICUBIC))
    assert np.array_equal(panel[22:150, 132:260], truth) and panel.shape[1] >= 4 * 132 - 4
    assert drawn(panel[22 + 2 * 132 :], common.PALETTE[18]) > 0  # the legend
    common.write_curves("out/curves.png", trained(bcl) / "log.jsonl")
    assert all(drawn(Image.open("out/curves.png"), rgb) > 1e-4 for rgb in common.COLOURS[:7])  # seven terms
    write_log("log.jsonl", "stage1", 0, ())
    common.write_curves("out/empty.png", "log.jsonl")  # stopped before the first record
    common.write_histogram("out/histogram.png", {"easy": [1, 2, 2], "hard": [3]}, "title", "entropy", bins=2)
    chart = np.asarray(Image.open("out/histogram.png"))
    assert drawn(chart[40:300], common.COLOURS[0]) == pytest.approx(3 * drawn(chart[40:300], common.COLOURS[1]), rel=0.1)  # 1 + 2 against 1
    common.write_grid("out/grid.png", ["a title that is longer than sixteen pixels"], [[np.zeros((4, 4, 3), np.uint8)]], 19, 16)
    assert Image.open("out/grid.png").width > 200


# ---------------------------------------------------------------- 13 bad inputs

BAD_FLAGS = [  # script, flags, what the message names
    *((intrada, flags, flags.split()[0]) for flags in (
        "--ratio 1.5", "--ratio x", "--target-size 20x20", "--source-size 64", "--stage 4", "--layers 1,2,3", "--width 0",
        "--max-iters 0", "--stop-iters 7", "--lr -1", "--device tpu", "--bn none", "--batch-size 0", "--num-classes 1",
        "--num-classes 7", "--source kitti", "--unknown 1", "--seed x", "--init imagenet", "--save-every 0")),
    *((bcl, flags, flags.split()[0]) for flags in (
        "--tau 1.5", "--momentum 2", "--temperature 0", "--labels both", "--crop 8", "--scales a,b", "--scales 0",
        "--rounds 0", "--static-ratio -1", "--lambda-fcl x")),
    (intrada, "--data-root nowhere", "nowhere"), (intrada, "--target-root nowhere", "nowhere"), (bcl, "--source-root nowhere", "nowhere"),
    (intrada, "--init nowhere.pth", "nowhere.pth"), (intrada, "--stage 2 --ckpt nowhere.pth", "nowhere.pth"),
    (intrada, "--stage 2", "--stage 1"), (intrada, "--stage 3", "--stage 2"), (bcl, "--init nowhere.pth --warmup-iters 0", "nowhere.pth"),
    (intrada, "--out file/run", "file"), (bcl, "--out file", "file"), (eval_script, "--ckpt", "runs"), (eval_script, "--ckpt file", "file"),
    *([] if torch.cuda.is_available() else [(intrada, "--device cuda", "--device cuda")]),
    (eval_script, "--input-size 10x10 --ckpt file", "--input-size"), (eval_script, "--ckpt nowhere.pth", "nowhere.pth"),
    (bcl, "--tua 0.8", "did you mean --tau?"), (intrada, "--lr-bakbone-mult 1", "--lr-backbone-mult?"), (intrada, "stage1", "stage1"),
    *((intrada, flags, flags.split("=")[0].split()[0]) for flags in (
        "--lr nan", "--lr inf", "--max-iters 1e3", "--max-iters 99999999999", "--target-size 99999x99999", "--workers 999", "--layers 9999,1,1,1",
        "--out=", "--data-root=", "--ckpt=")),
    (intrada, "--ckpt folder", "folder is a folder"), (eval_script, "--ckpt folder", "folder is a folder"), (bcl, "--init folder", "--init folder"),
    (bcl, "--data-root file", "file"), (intrada, "--out occupied", "occupied/stage3"), (intrada, "--out link", "link"),
    (eval_script, "--images file", "--save-dir"), (eval_script, "--images file --compare file", "--compare"),
    (eval_script, "--compare file", "file"), (eval_script, "--compare nowhere", "nowhere"), (eval_script, "--compare empty", "empty"),
    (eval_script, "--features out.txt", "--features"), (eval_script, "--multi-scale 0", "--multi-scale"),
    *((eval_script, f"--ckpt net.pth --images {path} --save-dir out", path) for path in ("nowhere.png", "empty", "*.jpg")),
    *((eval_script, f"--ckpt seven.pth {flags}", "7 classes") for flags in ("--features a.npz", "--json a.json")),
]  # fmt: skip
HALF = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x40\0\0\0\x40"


def resaved(kind, mode="RGB"):
    return lambda path: Image.open(path).convert(mode).save(path, kind)


def cut(part, more):
    return lambda path: path.write_bytes(path.read_bytes()[: path.read_bytes().index(part) + more])


def filled(value, dtype=np.uint8):
    return lambda path: Image.fromarray(np.full((64, 64), value, dtype)).save(path)


def each(change):
    return lambda folder: [change(path) for path in folder.rglob("*.png")]


def as_trainids(path):
    Image.fromarray(common.trainid_table(CITYSCAPES_IDS)[np.asarray(Image.open(path))]).save(path)


def bomb(path):
    header = b"IHDR" + (10_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    path.write_bytes(HALF[:12] + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\0IDAT\0\0\0\0")


def replaced(make):
    return lambda path: (path.unlink(), make(path))


IMAGE, LABEL, TRAIN = "GTA5/images/00001.png", "GTA5/labels/00001.png", "Cityscapes/leftImg8bit/train"
BAD_DATA = [  # file or folder below the data root; what is done to it: bytes or a function; what the message names
    (IMAGE, HALF, "00001.png"), (IMAGE, b"", "00001.png"), (LABEL, b"<html>", "00001.png"), (LABEL, Path.unlink, "00001"),
    ("GTA5/images/00002.png", Path.unlink, "00002"), (LABEL, lambda path: draw(path, (64, 20), 7), "64x20"), (LABEL, lambda path: draw(path, (64, 64)), "00001.png"),
    ("GTA5/labels", shutil.rmtree, "labels"), ("GTA5", shutil.rmtree, "GTA5"), ("Cityscapes/gtFine/val", shutil.rmtree, "gtFine"),
    (TRAIN, shutil.rmtree, "leftImg8bit"), (f"{TRAIN}/aldenburg/aldenburg_000000_000019_leftImg8bit.png", HALF, "aldenburg_000000_000019_leftImg8bit.png"),
    (IMAGE, cut(b"IDAT", 90), "00001.png"), (LABEL, cut(b"PLTE", 9), "00001.png"), (IMAGE, resaved("GIF"), "00001.png"), (IMAGE, bomb, "absurd"),
    (IMAGE, filled(3000, np.uint16), "00001.png"), (LABEL, filled(7, np.uint16), "16 bits"), (LABEL, resaved("PNG", "LA"), "LA"),
    (LABEL, resaved("JPEG", "L"), "JPEG"), (LABEL, filled(128), "128"), ("GTA5/labels", each(filled(1)), "00001.png"), ("GTA5/labels", each(as_trainids), "trainIds"),
    ("Cityscapes/gtFine/val", each(filled(255)), "gtFine/val"), (IMAGE, replaced(Path.mkdir), "00001"), (IMAGE, replaced(os.mkfifo), "00001.png"),
    (IMAGE, replaced(lambda path: path.symlink_to("nowhere")), "00001.png"), (TRAIN, lambda path: (path / "loop").symlink_to(path), "loop"),
    (TRAIN, lambda path: draw(f"{path}/a\nb_leftImg8bit.png"), "rename"), ("GTA5/images", lambda path: (path / "images").mkdir(), "images/images"),
]  # fmt: skip


def expect_refusal(module, flags, culprit):
    """Exit status 2, one sentence that names the culprit, no traceback, no result."""
    status, _, err = call(module, *flags)
    assert status == 2 and culprit in err and "Traceback" not in err and len(err.splitlines()) == 1 and err.startswith("error: ")
    assert not list(Path(".").rglob("last.pth"))


@pytest.mark.parametrize("module, flags, culprit", BAD_FLAGS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_bad_flags(module, flags, culprit, scenes):
    Path("file").write_text("not a checkpoint"), Path("folder").mkdir(), Path("empty").mkdir(), Path("link").symlink_to("nowhere")
    Path("occupied").mkdir(), Path("occupied/stage3").write_text("a file")
    for name, classes in (("net.pth", 19), ("seven.pth", 7)) if module is eval_script else ():
        common.save_checkpoint(name, common.DeepLabV2(classes, **NETWORK))
    expect_refusal(module, ["--data-root", scenes, *FLAGS[module], *flags.split()], culprit)


@pytest.mark.parametrize("name, change, culprit", BAD_DATA, ids=str)
def test_damaged_data(name, change, culprit, broken):
    (broken / name).write_bytes(change) if isinstance(change, bytes) else change(broken / name)
    workers = int(change == HALF)  # a worker's message goes through a DataLoader
    expect_refusal(intrada, ["--data-root", broken, *INTRADA, "--warmup-iters", 0, "--out", "run", "--workers", workers], culprit)
    expect_refusal(bcl, ["--data-root", broken, *BCL, "--check"], culprit)


def test_check(broken, monkeypatch):
    for module, kind, encoding in ((intrada, "gta5", "8-bit palette (8)"), (bcl, "synthia", "16-bit RGB (8)")):
        flags = ["--data-root", broken, *FLAGS[module], "--source", kind, "--check", "--out", "run"]
        out = succeed(module, *flags)
        assert encoding in out and "source: 8 pairs" in out and "target: 10 images" in out and "64x64 (8)" in out and "road 1" in out
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=1000))
            expect_refusal(module, flags, "--out run")
    label = bytearray((broken / LABEL).read_bytes())
    label[-13] ^= 1  # the last checksum of the pixels: decoding does not look at it
    (broken / LABEL).write_bytes(label)
    expect_refusal(intrada, ["--data-root", broken, *INTRADA, "--check"], "00001.png")
    assert not Path("run").exists() and not Path("runs").exists()


DAMAGES = {"cut": lambda t: t[: len(t) // 2], "word": lambda t: t.replace("easy", "esay", 1), "header": lambda t: t.replace("split", "part"),
           "more": lambda t: t + t[-60:], "zeros": lambda t: "\0" * 40}  # fmt: skip


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_damaged_ranking(change, trained, scenes):
    ranking = Path(shutil.copytree(trained(intrada) / "stage2", "run/stage2")) / "ranking.csv"
    ranking.write_text(change(ranking.read_text()))
    expect_refusal(intrada, ["--data-root", scenes, *INTRADA, "--stage", 3, "--out", "run"], "ranking.csv")


def test_a_full_disk_leaves_the_last_checkpoint(trained, scenes):
    """A limit on the size of a file makes writing fail as a full disk does."""
    shutil.copytree(trained(intrada), "run")
    torch.save({**last("run/stage1"), "iter": 2}, "run/stage1/last.pth")
    before, limit = Path("run/stage1/last.pth").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        status, _, err = call(intrada, "--data-root", scenes, *INTRADA, "--stage", 1, "--out", "run", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 2 and "cannot write run/stage1" in err and Path("run/stage1/last.pth").read_bytes() == before


def test_out_of_memory_is_one_sentence(scenes):
    cuda, cpu = torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate")
    for error, remedy in ((MemoryError(), "--batch-size"), (cuda, "--amp"), (cpu, "--workers")):
        with mock.patch.object(common, "list_images", side_effect=error):
            expect_refusal(intrada, ["--data-root", scenes, *INTRADA], remedy)
    assert common.as_sentence(RuntimeError("a bug")) is None


def test_a_refusal_is_one_line_and_writes_nothing(scenes, tmp_path):
    done = process("intrada.py", "--data-root", scenes, *INTRADA, "--stage", "3", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2 and "--stage 2" in done.stderr and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- 14 speed: processes, batches, precision, memory


def stage1(scenes, init, out, *flags):
    """Losses of a few iterations of stage 1 from given weights, and the weights afterwards."""
    more = ["--stage", 1, "--init", init, "--warmup-iters", 0, "--eval-every", 0, "--out", out, *flags]
    succeed(intrada, "--data-root", scenes, *INTRADA, *more)
    return losses(Path(out, "stage1")), last(Path(out, "stage1"))


def losses(folder):
    return [[v for k, v in r.items() if k.startswith("loss_")] for r in records(folder)]


@pytest.fixture(scope="session")
def warm(scenes, tmp_path_factory):
    """Weights whose running statistics fit the scenes."""
    out = tmp_path_factory.mktemp("warm")
    succeed(intrada, "--data-root", scenes, *INTRADA, "--stage", 1, "--warmup-iters", 40, "--stop-iters", 1, "--eval-every", 0, "--out", out)
    return out / "warmup/last.pth"


@BOTH
def test_two_processes_follow_one(module, stages, scenes, warm, tmp_path):
    """torchrun with batch 1 on each of two processes, against batch 2 on one: losses, weights, EMA, labels, scores."""
    flags = ["--data-root", scenes, *FLAGS[module], "--init", warm, "--warmup-iters", 0, "--bn", "running"]
    flags += ["--stop-iters", 5] if module is intrada else ["--rounds", 1, "--round-iters", 5]
    succeed(module, *flags, "--out", "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, HERE / f"{module.__name__}.py"]
    command = [*map(str, torchrun), *map(str, flags), "--out", "two", "--batch-size", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("mIoU 19") == 1, done.stderr
    for stage in stages[1:]:
        a, b = last(Path("one", stage)), last(Path("two", stage))
        parts = ["model", "discriminators"] if module is intrada else ["model", "ema_source", "ema_target"]
        assert all(difference(a[part], b[part]) < 1e-4 for part in parts)
        assert np.allclose(losses(Path("one", stage)), losses(Path("two", stage)), rtol=1e-4, atol=1e-4) and len(losses(Path("two", stage))) == 5
        assert a["scores"]["miou19"] == pytest.approx(b["scores"]["miou19"], abs=0.1)
    for one in Path("one").rglob("*.png"):
        assert np.abs(np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(str(one).replace("one", "two", 1)))).mean() < 0.5
    if module is intrada:
        assert [r["name"] for r in ranking("one/stage2")] == [r["name"] for r in ranking("two/stage2")]


def test_two_batches_per_step_are_one_of_twice_the_size(scenes, warm):
    a, b = (stage1(scenes, warm, out, "--bn", "running", *flags) for out, flags in (("one", ()), ("two", ("--batch-size", 1, "--grad-accum", 2))))
    assert np.allclose(a[0], b[0], rtol=1e-5) and difference(a[1]["model"], b[1]["model"]) < 1e-5
    succeed(bcl, "--data-root", scenes, *BCL, "--init", warm, "--warmup-iters", 0, "--rounds", 1, "--batch-size", 1, "--grad-accum", 2, "--out", "three")
    assert len(losses("three")) == 3 and np.isfinite(losses("three")).all()


def test_checkpointed_activations_change_memory_alone(scenes, warm):
    a, b = (stage1(scenes, warm, out, flag) for out, flag in (("one", "--no-checkpoint-activations"), ("two", "--checkpoint-activations")))
    assert a[0] == b[0] and difference(a[1]["model"], b[1]["model"]) == 0  # running statistics moved once, too
    kept = []
    for switch in (False, True):
        net, sizes = common.DeepLabV2(19, **NETWORK), []
        net.checkpoint_activations = switch
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            net(torch.randn(1, 3, 256, 256))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_bfloat16_follows_float32(scenes, warm):
    flags = ["--max-iters", 30, "--stop-iters", 20]
    (a, state), (b, _) = (stage1(scenes, warm, out, flag, *flags) for out, flag in (("one", "--no-amp"), ("two", "--amp")))
    assert len(a) == 20 and a != b and np.allclose(a, b, rtol=0.02) and all(p.dtype != torch.bfloat16 for p in state["model"].values())


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_follows_eager(scenes, warm):
    (a, one) = stage1(scenes, warm, "one", "--no-compile")
    with mock.patch.object(torch.nn.Module, "compile", autospec=True, side_effect=torch.nn.Module.compile) as compiled:
        (b, two) = stage1(scenes, warm, "two", "--compile")
    assert compiled.called and np.allclose(a, b, rtol=1e-4) and difference(one["model"], two["model"]) < 1e-4  # and the same names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", ["--no-amp", "--amp", "--amp --compile", "--amp --checkpoint-activations"])
def test_cuda_follows_the_cpu(flags, scenes, warm):
    a, b = stage1(scenes, warm, "cpu"), stage1(scenes, warm, "cuda", "--device", "cuda", *flags.split())
    assert np.allclose(a[0], b[0], rtol=0.03) and records("cuda/stage1")[-1]["peak_memory_mb"] < 1000
    succeed(bcl, "--data-root", scenes, *BCL, "--rounds", 1, "--out", "bcl", "--device", "cuda", *flags.split())
    assert np.isfinite(losses("bcl")).all()


def test_speed_is_in_the_log(trained):
    flops = records(trained(intrada) / "stage1", "flops")
    assert [r["iter"] for r in flops] == [1] and all(r["tflops"] == pytest.approx(r["it_per_s"] * flops[0]["flops_per_iteration"] / 1e12)
        and 0 <= r["data_seconds"] <= r["seconds"] and r["peak_memory_mb"] > 50 for r in records(trained(intrada) / "stage1"))  # fmt: skip
    net, (a, b) = common.DeepLabV2(19, **NETWORK), torch.randn(2, 2, 3, 64, 64)
    with common.FlopCounterMode(display=False) as counter:
        for image in (a, b):
            (net(image).main.sum() + net(image).aux.sum()).backward()
    assert counter.get_total_flops() / 2 < flops[0]["flops_per_iteration"] < 3 * counter.get_total_flops()


# ---------------------------------------------------------------- 15 dependable: signals, numbers, snapshots, full disks


LONG = "--stage 1 --warmup-iters 0 --eval-every 0 --max-iters 100000 --stop-iters 100000 --save-every 100000 --out run".split()
SLOW = """import sys, time
sys.path.insert(0, {here!r})
import common, intrada
save = common.save_checkpoint
common.save_checkpoint = lambda *args, **state: (time.sleep(4), save(*args, **state))
common.launch(intrada.main)"""


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_first(number, processes, scenes, tmp_path):
    """Sent to the whole group, readers included, as by Ctrl-C and timeout; with torchrun to one that trains, with slow saves."""
    Path("slow.py").write_text(SLOW.format(here=str(HERE)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "slow.py"] if processes == 2 else [HERE / "intrada.py"]
    command = [sys.executable, *torchrun, "--data-root", scenes, *INTRADA, *LONG, "--workers", 2 - processes + 1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen([*map(str, command)], cwd=tmp_path, start_new_session=True, **pipes)
    while "stage1 5/" not in running.stdout.readline():
        assert running.poll() is None, running.stderr.read()
    if processes == 1:
        os.killpg(running.pid, number)
    else:
        status = {int(p.name): (p / "status").read_text() for p in Path("/proc").iterdir() if p.name.isdigit()}
        os.kill(max(pid for pid, text in status.items() if f"\nPPid:\t{running.pid}\n" in text), number)
    _, err = running.communicate(timeout=60)
    assert "--resume" in err and (running.returncode == 128 + number if processes == 1 else running.returncode != 0)
    assert last("run/stage1")["iter"] == records("run/stage1")[-1]["iter"] >= 5


def test_a_loss_that_is_not_finite_is_named(scenes, monkeypatch):
    real, seen = intrada.domain_loss, []

    def broken(logits, domain):
        seen.append(domain)
        return real(logits, domain) * (math.nan if len(seen) == 4 * 6 + 1 else 1)  # 6 calls an iteration; the fifth iteration

    monkeypatch.setattr(intrada, "domain_loss", broken)
    flags = [*INTRADA, "--stage", 1, "--warmup-iters", 0, "--max-iters", 9, "--stop-iters", 9, "--log-every", 8, "--save-every", 4, "--eval-every", 0]
    status, _, err = call(intrada, "--data-root", scenes, *flags, "--out", "run", "--seed", 3)
    order = [intrada.common.EndlessSampler(n, seed, 4, 5, 2) for n, seed in ((8, 3), (10, 4))]
    names = [list(images)[i] for images, order in zip((common.list_images("gta5", scenes / "GTA5"), common.list_images("cityscapes", scenes / "Cityscapes")), order) for _, i in order]
    assert status == 2 and "loss_adv_main is nan at iteration 5" in err and all(name in err for name in names)
    assert last("run/stage1")["iter"] == 4  # from before


def test_overwrite_clears_the_whole_run_at_once(trained, scenes):
    """Stopped in the middle of the new run, --resume must not meet what was to be replaced."""
    shutil.copytree(trained(intrada), "run")
    flags = ["--data-root", scenes, *INTRADA, "--out", "run", "--lr", 1e-3]
    with mock.patch.object(common, "predict_maps", mock.Mock(side_effect=Killed)), contextlib.suppress(Killed):
        call(intrada, *flags, "--overwrite")
    assert not Path("run/stage3/last.pth").exists() and not Path("run/stage1/pictures/0000004.png").exists()
    succeed(intrada, *flags, "--resume")
    assert last("run/stage3")["config"]["lr"] == "0.001"


def test_data_may_move_between_jobs(trained, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "elsewhere"), shutil.copytree(trained(intrada) / "stage1", "run/stage1")
    torch.save({**last("run/stage1"), "iter": 2}, "run/stage1/last.pth")
    flags = [*INTRADA, "--stage", 1, "--out", "run", "--resume", "--data-root"]
    (tmp_path / "other/GTA5/images").mkdir(parents=True), (tmp_path / "other/GTA5/labels").mkdir()
    shutil.copytree(scenes / "Cityscapes", tmp_path / "other/Cityscapes")
    for kind in ("images", "labels"):
        shutil.copy(scenes / f"GTA5/{kind}/00001.png", tmp_path / f"other/GTA5/{kind}/00001.png")
    status, _, err = call(intrada, *flags, "other")
    assert status == 2 and "(images)" in err  # not the same data
    shutil.copytree(trained(intrada) / "warmup", "run/warmup", dirs_exist_ok=True)
    succeed(intrada, *flags, "elsewhere")


def test_killed_while_evaluating(scenes, monkeypatch):
    flags = ["--data-root", scenes, *INTRADA, "--stage", 1, "--warmup-iters", 0, "--out"]
    succeed(intrada, *flags, "whole")
    with mock.patch.object(common, "scores", mock.Mock(side_effect=Killed)), contextlib.suppress(Killed):
        call(intrada, *flags, "run")
    assert last("run/stage1")["iter"] == 3 and not records("run/stage1", "evaluation")  # saved before
    succeed(intrada, *flags, "run", "--resume")
    assert numbers("run/stage1") == numbers("whole/stage1") and difference(last("run/stage1")["model"], last("whole/stage1")["model"]) == 0


def test_tensorboard(scenes, monkeypatch):
    events, flags = [], ["--data-root", scenes, *INTRADA, "--stage", 1, "--warmup-iters", 0, "--tensorboard", "--out", "run"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = call(intrada, *flags)
    assert status == 2 and "pip install tensorboard" in err and not Path("run").exists()
    writer = mock.Mock(add_scalar=lambda *event: events.append(event))  # in place of the package
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", mock.Mock(SummaryWriter=lambda *args, **options: writer))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    succeed(intrada, *flags)
    log, scores = records("run/stage1"), records("run/stage1", "evaluation")
    assert [e[1:] for e in events if e[0] == "loss_seg_main"] == [(r["loss_seg_main"], r["iter"]) for r in log]
    assert [e[1:] for e in events if e[0] == "evaluation/miou19"] == [(r["miou19"], r["iter"]) for r in scores] and writer.close.called


def test_older_snapshots_are_kept(scenes):
    flags = [*INTRADA, "--stage", 1, "--warmup-iters", 0, "--max-iters", 9, "--stop-iters", 9, "--eval-every", 0, "--out", "run"]
    succeed(intrada, "--data-root", scenes, *flags, "--keep", 2)  # saves after 2, 4, 6, 8 and 9
    assert [p.name for p in sorted(Path("run/stage1").glob("iter*"))] == ["iter0000006.pth", "iter0000008.pth"]
    assert [last("run/stage1", name)["iter"] for name in ("iter0000006.pth", "iter0000008.pth", "last.pth")] == [6, 8, 9]


# ---------------------------------------------------------------- 16 the README's commands


def test_commands_of_the_readme_parse(monkeypatch):
    blocks = re.findall(r"^```\w*\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\$\{?\w+\}?", "1", line.split("#")[0]).split(";")[0] for line in lines]  # $s of a shell loop: a number
    commands = [found.groups() for found in (re.match(r".*\bpython (\w+\.py)(.*)", line) for line in lines) if found]
    assert len(commands) >= 5
    for script, flags in commands:
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags)])
        {"intrada.py": intrada, "bcl.py": bcl, "eval.py": eval_script}[script].parse_args()
