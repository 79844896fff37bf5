r"""BCL: bi-directional contrastive learning for domain adaptive segmentation (ECCV 2022).

Lee, Eom, Lee, Park, Ham. Pixels of one domain are pulled towards the class prototypes of the other,
in both directions. Target labels are hybrid: static pseudo labels, refreshed every round, filled up
with dynamic ones, which come from source prototypes that the class-wise domain bias calibrates.

    python bcl.py --tau 0.8 --momentum 0.999             demo: built-in scenes, small network
    python bcl.py --data-root DIR --out runs/bcl_gta5    GTA5 -> Cityscapes, ResNet-101
    python bcl.py --data-root DIR --out runs/bcl_x --init FILE --warmup-iters 0       own start
    torchrun --nproc_per_node=2 bcl.py --data-root DIR --out runs/bcl_two             batch 4 + 4
    python bcl.py --data-root DIR --init runs/bcl_gta5/warmup/last.pth --warmup-iters 0 --tau 0.7 \
        --out runs/bcl_tau07                             a sweep, without a second warm-up
    python bcl.py --target-weight 0 --lambda-fcl 0 --lambda-bcl 0 --out runs/bcl_control
                                                     the control: target images through BatchNorm

The same command again goes on where the run stopped.

The released code (R) has neither calibration nor EMA prototypes, and its dynamic labels are dead
code; this file follows the paper (P). Where P leaves a choice, or R differs:
D1  Encoder features are layer4's output (2048-d). R: 76 concatenated classifier logits.
D2  Each parameter is in the optimizer once, with the factor by which R's list repeats it
    (--backbone-lr released: conv1 1, shortcuts 4, other convolutions 3) or with 1 (paper).
D3  All weights are shared, as in P. R has a stem and a layer1 of its own for the target.
D4  Prototypes of a class are averaged over the images of a batch that hold it before the EMA moves;
    the losses use each pair's own prototypes. Batch size is free. R: 2, fixed.
D5  FCL and BCL are taken on the stride-8 map, over classes that both sides have. R's backward loss
    runs over all source pixels, with -1 as the similarity of a missing class (cosine of the two
    gradients 0.53), and at full size.
D6  Entropy is normalised to 0..1. R applies softmax twice: 2.03 to 2.94.
D7  Poly decay over 1.2 x the round, and half the rate in each next round, as R.
D8  Static labels are made with each image's own BatchNorm statistics, as R; P does not say.
    --label-bn running takes the running ones, which know the source: 79 instead of 91 % of the
    labels were right in a trial on drawn scenes.
D9  Static thresholds come from confidence histograms of 65,536 bins, linear in -log(1 - p), which
    tell confidences apart up to float32's last before 1. Linear bins merge all above 0.99998.
    "The image's own top r" is over all its pixels, of any class.
D10 A position of the stride-8 map stands for the pixel where align_corners puts its logits: labels
    are picked there and enlarged by the inverse. R's nearest is 3 to 8 pixels off at the borders:
    75.6 instead of 85.4 % agreement with the network's own map on drawn scenes.
D11 Classes of which the source has no pixel (SYNTHIA: terrain, truck, train) get no target label.
D12 A loss over no pixel is 0 with zero gradient. R: NaN.
D13 An image is never scaled below the crop, so nothing is padded: at R's sizes the factor 0.8
    becomes 730/850. Every epoch is a new permutation of the images.
D14 --init imagenet takes torchvision's weights; R starts from a Caffe-style file, which is read.
    Length and rate of the source-only warm-up are ours: no source gives them for P's method (R's
    source-only configuration: 6 rounds of 2 x 5,000 iterations at 7.5e-5). Its rate decays to 0
    over its whole length; its loss is CE on the source, without --lambda-ce.
D15 Under torchrun there is one EMA, of the prototypes of all processes; gradients and BatchNorm's
    running statistics are averaged; --lr is not scaled.
D16 The last checkpoint is the result; best.pth is chosen on validation labels: an oracle.
D17 --target-weight is 1, as in P's equation. R's configuration weighs the target's CE and entropy
    by 0.3, its configuration for upsizing weighs FCL and BCL by 0.2.
D18 On GPUs that have bfloat16 the convolutions of training run in it (--no-amp: in TF32).
    Prototypes and losses are computed in float32 from what they give. Static labels and evaluation
    are float32.
D19 The demo (DEMO) is short: it starts from demo/initial.pth, without the entropy terms, with
    r = 0.5, two rounds, scales 1.0 and 1.2, a learning rate of 2e-3, and 0.3 as the factor on the
    head's.

Not supported: other networks, several target domains at once, Windows.
"""

import argparse
import copy
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import StackDataset, Subset

import common
from common import IGNORE, UserError, number, place

# ====================================================================== arguments

# Defaults of the demo, that is, of a run without a data root.
DEMO = dict(
    init=str(Path(__file__).with_name("demo") / "initial.pth"), layers=(1, 1, 1, 1), width=16,
    target_size=(256, 128), short_side=128, crop=128, scales=(1.0, 1.2), warmup_iters=0,
    warmup_short_side=128, warmup_crop=128, warmup_lr=1e-2, rounds=2, round_iters=400, lr=2e-3,
    lr_head_mult=0.3, static_ratio=0.5, lambda_ent=0.0,
    eval_every=400, save_every=100, log_every=20, workers=0,
)  # fmt: skip
RECIPES = ("released", "paper")
LABEL_KINDS = ("static", "dynamic", "hybrid")


class Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help
        return f"{action.help} [%(default)s]"


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists all flags)")


def scales(text: str) -> tuple:
    return tuple(map(number(float, 0.01, 10), text.split(",")))


scales.__name__ = "scales (factors of 0.01 to 10, say 0.8,1.0,1.2)"  # in argparse's messages


def parse() -> tuple:
    """(args, settings): settings {flag: text} are those that make the run what it is."""
    parser = Parser(
        usage="%(prog)s [flags]",
        description=__doc__,
        epilog=f"Without a data root the demo runs, whose defaults are {DEMO}.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    on_off = argparse.BooleanOptionalAction
    count = number(int, 1, 10**9)
    count_or_0 = number(int, 0, 10**9)
    real = number(float, 0, 1e6)
    share = number(float, 0, 1)
    side = number(int, 32, 4096)

    g = parser.add_argument_group("files")
    g.add_argument("--data-root", type=place, help="parent of GTA5/, Cityscapes/ ...; none: demo")
    g.add_argument("--source-root", type=place, help="source folder, if not below --data-root")
    g.add_argument("--target-root", type=place, help="target folder, if not below --data-root")
    g.add_argument("--out", type=place, default="runs/bcl", help="folder of this run's files")

    g = parser.add_argument_group("data")
    g.add_argument("--source", choices=common.SOURCES, default="gta5", help="labelled domain")
    g.add_argument("--target", choices=common.TARGETS, default="cityscapes", help="unlabelled one")
    classes = number(int, 2, 255)
    g.add_argument("--num-classes", type=classes, default=19, help="C; not 19: folder data only")
    text = "WxH at which static labels are made and validation images seen (released)"
    g.add_argument("--target-size", type=common.size, default="1460x730", help=text)
    g.add_argument("--short-side", type=side, default=850, help="pixels before crop (released)")
    g.add_argument("--scales", type=scales, default="0.8,1.0,1.2", help="factors on it (released)")
    g.add_argument("--crop", type=side, default=730, help="side of the random crop (released)")
    g.add_argument("--flip", action=on_off, default=True, help="mirror half the images (released)")

    g = parser.add_argument_group("warm-up")
    g.add_argument("--warmup-iters", type=count_or_0, default=40_000, help="source only (ours)")
    g.add_argument("--warmup-lr", type=real, default=2.5e-4, help="its learning rate (ours)")
    g.add_argument("--warmup-short-side", type=side, default=720, help="before the crop (released)")
    g.add_argument("--warmup-crop", type=side, default=600, help="side of the crop (released)")

    g = parser.add_argument_group("schedule")
    g.add_argument("--rounds", type=count, default=10, help="each: new y_F, half the lr (released)")
    g.add_argument("--round-iters", type=count, default=10_000, help="iterations each (released)")
    g.add_argument("--lr", type=real, default=7.5e-5, help="SGD, first round (released)")
    g.add_argument("--batch-size", type=count, default=2, help="pairs of images (released)")
    g.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="weights and order")

    g = parser.add_argument_group("method")
    g.add_argument("--tau", type=number(float, -1, 1), default=0.8, help="τ (ours); paper .5-.9")
    g.add_argument("--momentum", type=share, default=0.999, help="λ of μ (ours); paper .99-.9999")
    g.add_argument("--temperature", type=number(float, 1e-3, 1e6), default=0.1, help="T_c (paper)")
    g.add_argument("--lambda-ce", type=real, default=1.0, help="of both cross-entropies (paper)")
    g.add_argument("--lambda-ent", type=real, default=0.4, help="of both entropies (released)")
    g.add_argument("--lambda-fcl", type=real, default=0.1, help="of L_FCL (released); paper .1-.7")
    g.add_argument("--lambda-bcl", type=real, default=0.1, help="of L_BCL (released); paper .1-.7")
    text = "of the target's CE and entropy (paper; released configuration: 0.3)"
    g.add_argument("--target-weight", type=real, default=1.0, help=text)
    text = "r, top share of every class and image that is labelled (released)"
    g.add_argument("--static-ratio", type=share, default=0.1, help=text)
    modes = ("batch", "running")
    g.add_argument("--label-bn", choices=modes, default="batch", help="BatchNorm, y_F (released)")
    g.add_argument("--labels", choices=LABEL_KINDS, default="hybrid", help="target's y_T (paper)")
    g.add_argument("--calibrate", action=on_off, default=True, help="add domain bias ξ (paper)")

    g = parser.add_argument_group("network")
    g.add_argument("--init", default="imagenet", help="imagenet, none (random) or a weight file")
    g.add_argument("--layers", type=common.layers, default="3,4,23,3", help="blocks of each stage")
    g.add_argument("--width", type=number(int, 2, 1024), default=64, help="channels of the stem")
    text = "BatchNorm statistics in training (released)"
    g.add_argument("--bn", choices=modes, default="batch", help=text)
    g.add_argument("--backbone-lr", choices=RECIPES, default="released", help="see D2")
    g.add_argument("--lr-head-mult", type=real, default=10.0, help="factor on head's lr (released)")

    g = parser.add_argument_group("run")
    g.add_argument("--eval-every", type=count_or_0, default=2_000, help="iterations; 0: at the end")
    g.add_argument("--save-every", type=count, default=1_000, help="iterations between saves")
    g.add_argument("--log-every", type=count, default=50, help="iterations between log records")

    g = parser.add_argument_group("speed")
    g.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    g.add_argument("--amp", action=on_off, help="bfloat16 convolutions; default: on GPUs with it")
    g.add_argument("--compile", action=on_off, default=False, help="G, CE and entropy; slow start")
    g.add_argument("--checkpoint-activations", action=on_off, default=False, help="saves memory")
    g.add_argument("--workers", type=number(int, 0, 256), default=4, help="readers per domain")

    args = parser.parse_args()
    args.demo = not (args.data_root or args.source_root or args.target_root)
    if args.demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args(namespace=argparse.Namespace(demo=True))
    check(args)
    settings = {}  # flags of other groups may change when a run goes on
    for group in parser._action_groups:
        if group.title in ("data", "warm-up", "schedule", "method", "network"):
            for action in group._group_actions:
                settings[action.dest] = str(getattr(args, action.dest))
    return args, settings


def check(args):
    """Refuse what concerns more than one flag."""
    if args.num_classes != 19 and (args.source != "folder" or args.target != "folder"):
        raise UserError("--num-classes other than 19 needs --source folder and --target folder")
    for side in ("source", "target"):
        if getattr(args, side) == "folder" and not getattr(args, f"{side}_root"):
            raise UserError(f"--{side} folder needs --{side}-root, which holds images/ and labels/")
    if args.source_root and args.target_root:
        if args.source_root.resolve() == args.target_root.resolve():
            raise UserError("--source-root and --target-root are one folder: name two folders")
    if args.source == args.target == "cityscapes":
        raise UserError("--source cityscapes has the target's labels: for a ceiling see intrada.py")
    if args.init == "imagenet" and (args.layers != (3, 4, 23, 3) or args.width != 64):
        raise UserError("--init imagenet is a ResNet-101: it needs --layers 3,4,23,3 --width 64")
    if args.compile and args.checkpoint_activations:
        raise UserError("--compile and --checkpoint-activations exclude each other: drop one")


# ====================================================================== the method's maths
# In the paper's order. f: encoder features of one image, (D, h, w) at stride 8; y: its labels,
# (h, w) trainIds with 255 = none; C classes.


class Prototypes(NamedTuple):
    vectors: Tensor  # (C, D), zero for a class that is not present
    present: Tensor  # (C,) bool


def class_prototypes(features: Tensor, labels: Tensor, num_classes: int) -> Prototypes:
    """Masked average pooling: p(c) = Σ_p f(p) y(p,c) / Σ_p y(p,c), of features (D,h,w) and labels
    (h,w). A class is present if it has a pixel."""
    classes = torch.arange(num_classes, device=labels.device)
    one_hot = (labels.flatten() == classes[:, None]).to(features.dtype)  # (C, hw); 255 matches none
    count = one_hot.sum(1, keepdim=True)  # (C, 1)
    vectors = one_hot @ features.flatten(1).T / count.clamp(min=1)  # (C, hw) @ (hw, D) -> (C, D)
    return Prototypes(vectors, count[:, 0] > 0)


def similarities(features: Tensor, prototypes: Prototypes) -> Tensor:
    """Cosine s(f(p), p(c)) of positions and prototypes: (D,h,w), (C,D) -> (C,hw) in [-1, 1]."""
    unit = F.normalize(features.flatten(1), dim=0, eps=1e-4)  # zeros stay zeros
    return F.normalize(prototypes.vectors, dim=1, eps=1e-4) @ unit


def contrastive_loss(
    features: Tensor, labels: Tensor, prototypes: Prototypes, temperature: float
) -> Tensor:
    """L = -(1/|Ω|) Σ_{p∈Ω} log[ exp(s(f(p),p(y(p)))/T) / Σ_{c present} exp(s(f(p),p(c))/T) ].

    features (D,h,w) and labels (h,w) of one domain, prototypes of the other: target pixels and
    source prototypes make FCL, source pixels and target prototypes BCL. Ω: positions whose label
    is a present class; where there is none the loss is 0 with zero gradient.
    """
    present = prototypes.present
    logits = similarities(features, prototypes) / temperature  # (C, hw)
    # -1e30, not -inf: no NaN where no class is present
    log_p = logits.masked_fill(~present[:, None], -1e30).log_softmax(0)
    y = labels.flatten().long()  # (hw,)
    index = y.clamp(max=len(present) - 1)  # any valid class where the label is 255
    chosen = (y < len(present)) & present[index]  # (hw,): Ω
    picked = log_p.gather(0, index[None])[0]  # (hw,)
    return -(picked * chosen).sum() / chosen.sum().clamp(min=1)


class PrototypeEMA(nn.Module):
    """μ(c) <- λ μ(c) + (1-λ) p(c) for the classes present; the first sight initialises μ(c).

    Buffers: mean (C,D) and seen (C,) bool. They move with .to() and live in the checkpoint.
    """

    def __init__(self, num_classes: int, dim: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(num_classes, dim))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, prototypes: Prototypes):
        vectors = prototypes.vectors
        moved = torch.lerp(vectors, self.mean, self.momentum)
        moved = torch.where(self.seen[:, None], moved, vectors)
        self.mean.copy_(torch.where(prototypes.present[:, None], moved, self.mean))
        self.seen |= prototypes.present


def batch_mean(prototypes: list) -> Prototypes:
    """What the EMA is fed: the mean of the `Prototypes` of a batch's images, of each class over the
    images that hold it, on all ranks."""
    count = common.all_reduce(sum(p.present.float() for p in prototypes))  # (C,)
    total = common.all_reduce(sum(p.vectors.detach() for p in prototypes))  # (C, D)
    return Prototypes(total / count.clamp(min=1)[:, None], count > 0)


def calibrate(source: Prototypes, ema_source: PrototypeEMA, ema_target: PrototypeEMA) -> Prototypes:
    """p_{S→T}(c) = p_S(c) + ξ(c), with the class-wise domain bias ξ(c) = μ_T(c) - μ_S(c),
    0 while either side is unseen."""
    known = ema_source.seen & ema_target.seen & source.present
    calibrated = source.vectors + ema_target.mean - ema_source.mean
    return Prototypes(torch.where(known[:, None], calibrated, source.vectors), source.present)


@torch.no_grad()
def dynamic_labels(features: Tensor, prototypes: Prototypes, tau: float) -> Tensor:
    """y_D(p) = argmax_c s(f_T(p), p_{S→T}(c)) over present classes if that is > τ, else 255.

    features (D,h,w), prototypes p_{S→T} -> (h,w) int64.
    """
    absent = ~prototypes.present[:, None]
    similarity = similarities(features, prototypes).masked_fill(absent, -2)
    best, label = similarity.max(0)  # (hw,)
    return torch.where(best > tau, label, IGNORE).view(features.shape[1:])


def target_labels(kind: str, static: Tensor, dynamic: Tensor) -> Tensor:
    """y_T. "static": y_F; "dynamic": y_D; "hybrid": y_F where it has a label, else y_D. All of one
    shape, int64."""
    if kind == "static":
        return static
    if kind == "dynamic":
        return dynamic
    return torch.where(static != IGNORE, static, dynamic)


def pixel_entropy(logits: Tensor) -> Tensor:
    """-Σ_c P log P / log C: logits (B,C,H,W) to (B,H,W) in [0, 1]. Finite for any logits."""
    log_p = logits.log_softmax(1)  # (B, C, H, W)
    return (-log_p.exp() * log_p / math.log(logits.shape[1])).sum(1)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, mean over labelled pixels; 0 if there is none.

    logits (B,C,H,W), labels (B,H,W) int64 trainIds with 255 = ignore.
    """
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def enlarge(labels: Tensor, height: int, width: int) -> Tensor:
    """The inverse: labels (B,h,w) of a map at full size, (B,H,W); `pick` gives them back."""
    return common.pick(labels, height, width)  # pixel y lies at position round(y (h-1)/(H-1))


# ====================================================================== static labels
# Confidences are counted in bins that are linear in -log(1 - p), from 0 to TOP, where float32 ends.
BINS = 65_536
TOP = 17.0


def confidence_bins(confidence: Tensor) -> Tensor:
    """Confidences in [0, 1] to bins 0..BINS-1 (int64)."""
    bins = -torch.log1p(-confidence.double()) * (BINS / TOP)
    return bins.clamp(max=BINS - 1).long()


def bin_confidence(bins: Tensor) -> Tensor:
    """The lower edge of bins as a confidence (float64); 1 from bin BINS on."""
    return torch.where(bins < BINS, 1 - torch.exp(-bins.double() * TOP / BINS), 1.0)


def top_bins(histogram: Tensor, ratio: float) -> Tensor:
    """Bin of each row from which on the top `ratio` of its pixels lie.

    histogram (R,BINS): pixels of every confidence bin -> (R,) int64, the highest bin b such that
    the bins from b up hold at least ratio of the row's pixels. A row without a pixel gets BINS,
    which no pixel reaches, as does every row at ratio 0.
    """
    from_top = histogram.double().flip(1).cumsum(1).flip(1)  # (R, BINS): pixels in bin b and above
    enough = (from_top >= ratio * from_top[:, :1]).sum(1)  # true for the bins 0..b: b + 1 of them
    some = (from_top[:, 0] > 0) & (ratio > 0)
    return torch.where(some, enough - 1, BINS)


def choose_static(
    prediction: Tensor, bins: Tensor, thresholds: Tensor, ratio: float, absent: tuple = ()
) -> Tensor:
    """y_F: the prediction where its confidence is in the top ratio of its class or of this image.

    prediction (H,W) trainIds, bins (H,W) confidence in 0..BINS-1, thresholds (C,) of `top_bins` ->
    (H,W) int64. absent: classes of which the source has no pixel; they get no label.
    """
    histogram = bins.flatten().bincount(minlength=BINS)
    own = top_bins(histogram[None], ratio)  # (1,)
    keep = (bins >= thresholds[prediction]) | (bins >= own)
    for c in absent:
        keep &= prediction != c
    return torch.where(keep, prediction, IGNORE)


def label_network(G: nn.Module, label_bn: str) -> nn.Module:
    """A copy of G that makes static labels. "batch", as the released code does: training mode, each
    image normalised by its own statistics. "running": eval mode. G's statistics do not move."""
    if label_bn == "running":
        return common.inference_copy(G)
    return copy.deepcopy(G).train()


def confident_prediction(network, image: Tensor, out_size: tuple) -> tuple:
    """One image (3,H,W) uint8 to its label (H,W) and confidence bins (H,W) int64 at out_size."""
    logits = network(common.normalize(image[None])).main
    confidence, label = common.upsample(logits, out_size)[0].softmax(0).max(0)
    return label, confidence_bins(confidence)


@common.predicting()
def make_static_labels(args, settings, G, images: dict, folder: Path, device) -> dict:
    """Write the static labels of a round: <folder>/labels/<name>.png and <folder>/labels.json.

    Two passes of the network over all target images: histograms, then labels cut at the class
    thresholds. Memory does not grow with the number of images. Ranks share the images. The folder
    appears when it is whole; one that is there stays. Returns {entry: value} that labels.json must
    have, for `read_static_labels`.
    """
    network = common.digest(t.cpu().numpy().tobytes() for t in G.state_dict().values())
    about = {"network": network, "settings": settings}
    if folder.exists():
        return about
    predictor = label_network(G, args.label_bn)
    absent = common.ABSENT.get(args.source, ())
    dataset = common.Images(images, args.target_size)
    C = args.num_classes

    def predictions():
        for item in common.one_by_one(dataset, args.workers, device):
            image = item["image"].to(device, non_blocking=True)
            yield item["name"], *confident_prediction(predictor, image, args.target_size)

    histogram = torch.zeros(C, BINS, dtype=torch.int64, device=device)
    for _, label, bins in predictions():
        cells = (label * BINS + bins).flatten()
        histogram += torch.bincount(cells, minlength=C * BINS).view(C, BINS)
    thresholds = top_bins(common.all_reduce(histogram), args.static_ratio)
    labelled = torch.zeros((), dtype=torch.float64)
    partial = folder.with_name(f"{folder.name}.partial")
    for name, label, bins in predictions():
        static = choose_static(label, bins, thresholds, args.static_ratio, absent).byte()
        labelled += (static != IGNORE).double().mean().cpu()
        common.write_png(partial / "labels" / f"{name}.png", static.cpu().numpy(), C)
    covered = common.all_reduce(labelled).item()  # when all ranks have written their labels
    if common.rank() == 0:
        about["thresholds"] = thresholds.tolist()
        about["coverage"] = 100 * covered / len(images)
        about["labels"] = labels_digest(partial, images, about["thresholds"])
        common.write_text(partial / "labels.json", json.dumps(about) + "\n")
        with common.writing(folder):
            os.rename(partial, folder)
    common.barrier()
    return about


def labels_digest(folder: Path, images: dict, thresholds: list) -> str:
    """Tells the static labels of one round, files and thresholds, from all others."""
    paths = [folder / "labels" / f"{name}.png" for name in images]
    return f"{common.content_digest(paths)} {common.digest([str(thresholds).encode()])}"


def read_static_labels(folder: Path, images: dict, expected: dict) -> dict:
    """labels.json of a round's finished static labels; refuses damaged ones, and those whose
    entries differ from the expected ones {entry: value}."""
    try:
        about = json.loads((folder / "labels.json").read_text())
        content = labels_digest(folder, images, about["thresholds"])
        about["coverage"] = float(about["coverage"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is damaged or not whole ({error}): choose another --out")
    for entry, value in [("labels", content), *expected.items()]:
        if about.get(entry) != value:
            text = f"{folder} changed, or is of another run (other {entry})"
            raise UserError(f"{text}: choose another --out")
    return about


# ====================================================================== label statistics


def labels_of_pairs(args, state: dict, thresholds: list, pairs, device):
    """Yields of every (target, source) pair of dataset items: target, source, and the target's
    labels {"static", "dynamic", "hybrid": (H,W) int64}. `state`, as in `train`, stays as it is."""
    predictor = label_network(state["model"], args.label_bn)
    encoder = copy.deepcopy(state["model"])  # in training's mode; its statistics may move
    bounds = torch.tensor(thresholds, device=device)
    absent = common.ABSENT.get(args.source, ())
    for item, pair in pairs:
        with common.predicting():
            image_t = item["image"].to(device)
            image_s = pair["image"].to(device)
            prediction, bins = confident_prediction(predictor, image_t, args.target_size)
            static = choose_static(prediction, bins, bounds, args.static_ratio, absent)
            f_s = encoder(common.normalize(image_s[None])).features
            f_t = encoder(common.normalize(image_t[None])).features
            y_s = common.pick(pair["label"][None].to(device), *f_s.shape[2:])
            prototypes = class_prototypes(f_s[0], y_s[0], args.num_classes)
            if args.calibrate:
                prototypes = calibrate(prototypes, state["ema_source"], state["ema_target"])
            dynamic = dynamic_labels(f_t[0], prototypes, args.tau)
        y_f = common.pick(static[None], *item["label"].shape)[0]
        y_d = enlarge(dynamic[None], *item["label"].shape)[0]
        yield item, pair, {kind: target_labels(kind, y_f, y_d) for kind in LABEL_KINDS}


def draw_labels(path, labelled_pairs, num_classes: int):
    """The paper's figure: labels of a target image beside source images, with which dynamic labels
    change."""
    rows = []
    for item, pair, labels in labelled_pairs:
        row = [pair["image"].permute(1, 2, 0).numpy(), pair["label"].numpy()]
        row.append(item["image"].permute(1, 2, 0).numpy())
        row += [labels[kind].byte().cpu().numpy() for kind in LABEL_KINDS]
        row.append(item["label"].numpy())
        rows.append(row)
    titles = ["source image", "its label", "target image", *LABEL_KINDS, "ground truth"]
    common.write_grid(path, titles, rows, num_classes)


def label_statistics(labelled_pairs, device) -> dict:
    """{kind: {"coverage", "accuracy"}} in percent. Coverage: the labelled share of the pixels that
    have a class; accuracy: the right share of the labelled ones, None without any."""
    counts = {kind: torch.zeros(3, dtype=torch.int64, device=device) for kind in LABEL_KINDS}
    for item, _, labels in labelled_pairs:
        truth = item["label"].to(device).long()
        known = truth != IGNORE
        for kind, label in labels.items():
            labelled = known & (label != IGNORE)
            right = known & (label == truth)
            counts[kind] += torch.stack([known.sum(), labelled.sum(), right.sum()])
    result = {}
    for kind, own in counts.items():
        pixels, covered, hits = common.all_reduce(own).tolist()
        accuracy = 100 * hits / covered if covered else None
        result[kind] = {"coverage": 100 * covered / pixels, "accuracy": accuracy}
    return result


# ====================================================================== training


def augment(image, label, rng, short_side: int, scales: tuple, crop: int, flip: bool) -> tuple:
    """A Pillow image and its label, scaled, cropped to crop x crop and mirrored at random.

    short_side: pixels of the shorter side, times one of `scales`, before the crop. At top level, as
    readers that are not forked (macOS, Python 3.14) receive it by pickle.
    """
    short = max(crop, round(short_side * scales[rng.integers(len(scales))]))
    factor = short / min(image.size)
    full = tuple(round(side * factor) for side in image.size)
    x = int(rng.integers(full[0] - crop + 1))
    y = int(rng.integers(full[1] - crop + 1))
    box = (x, y, x + crop, y + crop)
    image = common.resize(image, full, "image").crop(box)
    label = common.resize(label, full, "label").crop(box)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
        label = label.transpose(Image.FLIP_LEFT_RIGHT)
    return image, label


def train(args, settings, source, target_images, validation, initial, device):
    """Train G for all rounds. Without target images, on the source alone: the warm-up.

    source: dataset of labelled images, whose augmentation is set here; target_images {name: path};
    initial: content of a weight file, or None. Checkpoints, log and static labels go to args.out.
    """
    stage = "bcl" if target_images else "warm-up"
    C = args.num_classes
    iters = args.round_iters
    total = args.rounds * iters
    horizon = 1.2 * iters if target_images else iters
    source.transform = functools.partial(
        augment, short_side=args.short_side, scales=args.scales, crop=args.crop, flip=args.flip
    )
    torch.manual_seed(args.seed)
    G = common.DeepLabV2(C, args.layers, args.width, aux=False)
    report = common.load_weights(G, initial, args.init)
    G.to(device)
    G.checkpoint_activations = args.checkpoint_activations
    G.input_size = args.target_size
    groups = G.parameter_groups(args.backbone_lr, args.lr_head_mult)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=5e-4)
    ema_source = PrototypeEMA(C, 32 * args.width, args.momentum).to(device)
    ema_target = PrototypeEMA(C, 32 * args.width, args.momentum).to(device)
    state = {
        "model": G,
        "optimizer": optimizer,
        "ema_source": ema_source,
        "ema_target": ema_target,
    }

    start, found = common.resume(args.out, settings, state)
    labels = found.get("labels")  # digest of this round's static labels
    targets = len(target_images) or "no"
    about = f"{len(source)} source images, {targets} target images, {report}"
    log = common.Log(args.out, stage, about, start, total, settings)
    source_batches = common.Batches(source, args.batch_size, start, total, args.workers, device)
    batches = [source_batches]
    common.set_mode(G, args.bn)
    if args.compile:
        G.compile(dynamic=False)  # in place: the names in checkpoints stay
    autocast = common.autocast(device, args.amp)
    cross_entropy = common.compiled(segmentation_loss, args.compile)
    entropy = common.compiled(pixel_entropy, args.compile)
    stop_signal = common.StopSignal()

    for it in range(start, total + 1):
        # ---- once in a while: save, then evaluate; a run killed in between evaluates later
        round_, step = divmod(it, iters)
        stop = stop_signal.agreed()
        save_due = common.due(it, args.save_every, total) or common.due(it, args.eval_every, total)
        if it > start and (stop or save_due or step == 0):
            common.save(args.out / "last.pth", it, settings, state, labels=labels)
        if stop:
            sys.exit(128 + stop)
        if validation and common.due(it, args.eval_every, total) and it not in log.evaluated:
            result = common.evaluate([G], validation, device, args.workers)
            if log.is_best(result):
                common.save(args.out / "best.pth", it, settings, {"model": G})
            log.evaluation(it, result)
        if it == total:
            break

        # ---- a new round, or the one to go on with: static labels and batches with them
        if target_images and (it == start or step == 0):
            folder = args.out / f"round{round_}"
            if step == 0:
                expected = make_static_labels(args, settings, G, target_images, folder, device)
            else:  # going on within a round
                expected = {"labels": labels}
            static = read_static_labels(folder, target_images, expected)
            labels = static["labels"]
            reported = [r.get("round") for r in log.records if r.get("event") == "labels"]
            if round_ not in reported:
                statistics = {}
                if validation:
                    # (i, j): source image j, augmented as sample i; a prime step mixes them well
                    partners = [(i, i * 7919 % len(source)) for i in range(len(validation))]
                    dataset = StackDataset(validation, Subset(source, partners))
                    pairs = common.one_by_one(dataset, args.workers, device)
                    labelled = labels_of_pairs(args, state, static["thresholds"], pairs, device)
                    statistics = label_statistics(labelled, device)
                report_labels(log, it, round_, static, statistics)
            files = {}
            for name, path in target_images.items():
                files[name] = (path, folder / "labels" / f"{name}.png")
            target = common.Labelled(
                files, "folder", C, pseudo=True, transform=source.transform, seed=args.seed + 1
            )
            end = it - step + iters
            target_batches = common.Batches(target, args.batch_size, it, end, args.workers, device)
            batches = [source_batches, target_batches]
            log.restart_clock(it)  # making labels is no training time

        # ============================== the method ==============================
        lr = args.lr * 0.5**round_ * (1 - step / horizon) ** 0.9
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.zero_grad(set_to_none=True)

        # source: features f_s (B, D, h, w), logits (B, C, H, W), ground truth y_s
        x_s, y_s_full = next(source_batches)  # (B, 3, H, W), (B, H, W)
        crop = (args.crop, args.crop)  # (W, H), of both domains
        with autocast:
            S = G(common.normalize(x_s))
        logits_s = common.upsample(S.main, crop)
        loss_ce_s = cross_entropy(logits_s, y_s_full)
        loss = loss_ce_s
        loss_ce_t = loss_ent_s = loss_ent_t = loss_fcl = loss_bcl = None

        if target_images:
            # target: features f_t, logits, static labels y_F
            x_t, y_f_full = next(target_batches)
            with autocast:
                T = G(common.normalize(x_t))
            logits_t = common.upsample(T.main, crop)
            f_s = S.features.float()  # (B, D, h, w)
            f_t = T.features.float()
            y_s = common.pick(y_s_full, *f_s.shape[2:])  # (B, h, w)
            y_f = common.pick(y_f_full, *f_t.shape[2:])
            batch = range(len(x_s))

            # p_S -> μ_S, for every pair of a source and a target image
            p_s = [class_prototypes(f_s[b], y_s[b], C) for b in batch]
            ema_source.update(batch_mean(p_s))

            # ξ, p_{S→T} -> y_D
            if args.calibrate:
                p_st = [calibrate(p, ema_source, ema_target) for p in p_s]
            else:
                p_st = p_s
            y_d = torch.stack([dynamic_labels(f_t[b], p_st[b], args.tau) for b in batch])
            y_d_full = enlarge(y_d, *y_f_full.shape[1:])  # (B, h, w) -> (B, H, W)

            # y_T, on the map and at full size
            y_t = target_labels(args.labels, y_f, y_d)
            y_t_full = target_labels(args.labels, y_f_full, y_d_full)

            # p_T -> μ_T
            p_t = [class_prototypes(f_t[b], y_t[b], C) for b in batch]
            ema_target.update(batch_mean(p_t))

            # L = λ_ce (CE_S + w CE_T) + λ_ent (H_S + w H_T) + λ_FCL L_FCL + λ_BCL L_BCL
            # with w = 1 in P
            loss_ce_t = cross_entropy(logits_t, y_t_full)
            loss_ent_s = entropy(logits_s).mean()
            loss_ent_t = entropy(logits_t).mean()
            fcl = [contrastive_loss(f_t[b], y_t[b], p_s[b], args.temperature) for b in batch]
            bcl = [contrastive_loss(f_s[b], y_s[b], p_t[b], args.temperature) for b in batch]
            loss_fcl = sum(fcl) / len(fcl)
            loss_bcl = sum(bcl) / len(bcl)
            loss = (
                args.lambda_ce * (loss_ce_s + args.target_weight * loss_ce_t)
                + args.lambda_ent * (loss_ent_s + args.target_weight * loss_ent_t)
                + args.lambda_fcl * loss_fcl
                + args.lambda_bcl * loss_bcl
            )
        loss.backward()
        common.average_over_ranks(G)  # gradients and running statistics
        optimizer.step()
        # =========================== end of the method ===========================

        log.add(
            batches,
            loss_ce_source=loss_ce_s,
            loss_ce_target=loss_ce_t,
            loss_ent_source=loss_ent_s,
            loss_ent_target=loss_ent_t,
            loss_fcl=loss_fcl,
            loss_bcl=loss_bcl,
            loss=loss,
        )
        if common.due(it + 1, args.log_every, total):
            log.losses(it + 1, device, lr=lr, round=round_)

    if target_images and validation and common.rank() == 0:
        folder = args.out / f"round{args.rounds - 1}"
        static = read_static_labels(folder, target_images, {"labels": labels})
        pairs = [(validation[0], source[0, i]) for i in (0, len(source) // 2)]
        labelled = labels_of_pairs(args, state, static["thresholds"], pairs, device)
        draw_labels(args.out / "labels.png", labelled, C)
    stop_signal.close()


def report_labels(log, it: int, round_: int, static: dict, statistics: dict):
    """How good the labels of a new round are, on the terminal and in the log. static: what is in
    labels.json; statistics: of `label_statistics`, {} without validation images."""
    coverage = static["coverage"]
    print(f"round {round_}: static labels on {coverage:.1f} % of the target's pixels", flush=True)
    for kind, s in statistics.items():
        right = "" if s["accuracy"] is None else f", {s['accuracy']:.1f} % right"
        print(f"round {round_}: {kind} labels on {s['coverage']:.1f} % of val{right}", flush=True)
    thresholds = bin_confidence(torch.tensor(static["thresholds"])).tolist()
    record = {"round": round_, "train_static_coverage": coverage, "thresholds": thresholds}
    log.write(iter=it, event="labels", **record, **statistics)


# ====================================================================== main


def main():
    args, settings = parse()
    device = common.set_up(args.device)
    settings["processes"] = str(common.world_size())
    held = common.lock(args.out)  # noqa: F841, kept until the process ends
    if args.demo:
        from demo.scenes import demo_scenes

        print("Demo: built-in scenes, small network, short schedule. Real data: --data-root DIR")
        args.data_root = demo_scenes(args.source)

    if any(args.out.glob("stage?/last.pth")) or any(args.out.glob("stage2/ranking.csv")):
        raise UserError(f"--out {args.out} holds a run of intrada.py: choose another --out")

    # What the run needs is looked at before anything is trained.
    target_root = common.dataset_root(args.target, args.data_root, args.target_root)
    images = common.list_images(args.target, target_root, "train")
    common.Images(images).look()
    validation = common.validation_set(args.target, target_root, args.num_classes, args.target_size)
    source_root = common.dataset_root(args.source, args.data_root, args.source_root)
    pairs = common.list_pairs(args.source, source_root)
    common.check_classes(args.source, source_root, args.target, target_root, args.num_classes)

    source = common.Labelled(pairs, args.source, args.num_classes, seed=args.seed)
    source.look()
    initial, settings["init"] = common.initial_weights(args.init)
    warmup_settings = {**settings, "images": common.fingerprint(source.files)}
    settings["images"] = common.fingerprint([*source.files, *images.values()])
    common.earlier_run(args.out, settings)

    runs = {}
    if args.warmup_iters:  # the warm-up: one round on the source alone, with values of its own
        warmup = copy.copy(args)
        warmup.out = args.out / "warmup"
        warmup.rounds = 1
        warmup.round_iters = args.warmup_iters
        warmup.lr = args.warmup_lr
        warmup.short_side = args.warmup_short_side
        warmup.crop = args.warmup_crop
        runs["warm-up"] = warmup.out
        train(warmup, warmup_settings, source, {}, validation, initial, device)
        initial = common.read_checkpoint(warmup.out / "last.pth")
    train(args, settings, source, images, validation, initial, device)
    runs["BCL"] = args.out
    if validation and common.rank() == 0:
        common.report(args.out, runs, validation, device, pixel_entropy)


if __name__ == "__main__":
    common.launch(main)
