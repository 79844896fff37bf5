r"""BCL: bi-directional contrastive learning for domain adaptive segmentation (ECCV 2022).

Lee, Eom, Lee, Park, Ham. Features of one domain are pulled towards the other domain's prototype of
their class and pushed away from those of other classes, in both directions; a prototype is the mean
feature of a class in an image. Target labels are hybrid. Static ones, confident predictions, are
made anew every round. Dynamic ones fill the gaps: the class of the nearest prototype of the paired
source image, after the bias between the domains has been added to that prototype.

    python bcl.py --tau 0.8 --momentum 0.999             demo: drawn scenes, a small network
    python bcl.py --data-root DIR --out runs/bcl_gta5    GTA5 -> Cityscapes, ResNet-101, one GPU
    torchrun --nproc_per_node=2 bcl.py --data-root DIR --out runs/bcl_two             batch 4 + 4
    python bcl.py --data-root DIR --init FILE --warmup-iters 0 --out runs/bcl_x       own start
    python bcl.py --target-weight 0 --lambda-fcl 0 --lambda-bcl 0 --out runs/control  the control

The control sends target images through BatchNorm alone (not with --bn running). The same command
resumes a stopped run.

Where this differs from the paper (P) or from the released code (R), which has neither calibration
nor EMA prototypes, and whose dynamic labels are dead code. This file follows P.
D1  Encoder features are layer4's output (2048-d). R: 76 concatenated classifier logits.
D2  R's optimizer lists a parameter n times (conv1 and heads 1, shortcuts 4, others 3) and steps it
    n times, each with more weight decay. Here each is listed once, with n as a factor on its
    rate and (n + 1)/2 on its weight decay (--recipe released), or with 1 for all (paper).
D3  All weights are shared, as in P. R has a stem and a layer1 of its own for the target.
D4  Prototypes of a class are averaged over the images of a batch that hold it before the EMA moves;
    the losses use each pair's own prototypes. Batch size is free. R: 2, fixed.
D5  FCL and BCL are taken on the stride-8 map, over positions whose class has a prototype on the
    other side, against all prototypes of that side. R's backward loss runs over all source pixels,
    with -1 as the similarity of a missing class (cosine of the two gradients 0.53), at full size.
D6  Entropy is normalised to 0..1. R applies softmax twice: 2.03 to 2.94.
D7  Poly decay over 1.2 x the round, and half the rate in each next round, as in R's configuration
    for upsizing, which R's script loads: 10,004 iterations that end at 0.20 of the rate. R makes a
    new SGD every round, whose momentum starts at 0; here it is kept.
D8  Static labels are made with each image's own BatchNorm statistics, as R; P does not say.
    --label-bn running takes the running ones, which know the source: 79 instead of 91 % of the
    labels were right in a trial on drawn scenes. R's running statistics move while it makes labels.
D9  Static thresholds come from confidence histograms of 65,536 bins, linear in -log(1 - p), which
    tell confidences apart up to float32's last before 1. Linear bins merge all above 0.99998.
    "The image's own top r" is over all its pixels, of any class. R counts every fifth confidence,
    labels a pixel where any class's probability reaches that class's threshold (here: that of the
    predicted class), and writes labels of 2048x1024 after upsampling twice.
D10 A position of the stride-8 map stands for the pixel where align_corners puts its logits: labels
    are picked there and enlarged by the inverse. R's nearest is 3 to 8 pixels off at the borders:
    75.6 instead of 85.4 % agreement with the network's own map on drawn scenes.
D11 Classes of which the source has no pixel (SYNTHIA: terrain, truck, train) get no target label.
D12 A loss over no pixel is 0 with zero gradient. R: NaN.
D13 An image is never scaled below the crop, so nothing is padded: at R's sizes the factor 0.8
    becomes 730/850. Every epoch is a new permutation of the images; R's loaders do not shuffle.
D14 --init imagenet takes torchvision's weights; R starts from a Caffe-style file, which is read.
    Length and rate of the source-only warm-up are ours: neither P nor R gives them for P's method
    (R's source-only configuration: 6 rounds of 2 x 5,000 iterations at 7.5e-5). Its rate decays to
    0 over its whole length; its loss is CE on the source, without --lambda-ce.
D15 Under torchrun there is one EMA, of the prototypes of all processes; gradients and BatchNorm's
    running statistics are averaged; --lr is not scaled. Each process has its own batch statistics
    and takes the mean over its own labelled pixels, so that two processes of one image and one of
    two do not agree.
D16 The last checkpoint is the result; best.pth is chosen on validation labels: an oracle.
D17 Weights are 0.1 for FCL and BCL, as in R's damnet_config.yml (2,496 iterations a round, ending
    at 0.52 of the rate); R's configuration for upsizing has 0.2, that for SYNTHIA 0 for both (9,398
    iterations). --target-weight is 1, as in P's equation; R weighs the target's CE and entropy 0.3.
D18 On GPUs that have bfloat16 the convolutions of training run in it (--no-amp: in float32).
    Prototypes and losses are computed in float32 from what they give. Static labels and evaluation
    are float32. TF32 is off.
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
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common
from common import IGNORE, UserError

# ====================================================================== arguments

# Defaults of the demo, that is, of a run without a data root.
DEMO = dict(
    init="demo", layers=(1, 1, 1, 1), width=16,
    target_size=(256, 128), short_side=128, crop=128, scales=(1.0, 1.2), warmup_iters=0,
    warmup_short_side=128, warmup_crop=128, warmup_lr=1e-2, rounds=2, round_iters=400, lr=2e-3,
    lr_head_mult=0.3, static_ratio=0.5, lambda_ent=0.0,
    eval_every=400, save_every=100, log_every=20, workers=0,
)  # fmt: skip
# Flags that may change when a run resumes. The lists, and the folders, are known by their images.
FREE = (
    "data_root", "source_root", "target_root", "source_list", "target_list", "out", "demo",
    "eval_every", "save_every", "log_every", "device", "amp", "compile", "checkpoint_activations",
    "workers",
)  # fmt: skip


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def factors(text: str) -> tuple:
    """ "0.8,1.0,1.2" to (0.8, 1.0, 1.2)."""
    return tuple(map(float, text.split(",")))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]",
        description=__doc__.split("\nWhere this differs")[0],
        epilog="Without a data root the demo runs. DEMO in this file has its own defaults.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    on_off = argparse.BooleanOptionalAction

    g = parser.add_argument_group("files")
    g.add_argument("--data-root", type=Path, help="folder with GTA5/, Cityscapes/, ...")
    g.add_argument("--source-root", type=Path, help="source folder, if not below --data-root")
    g.add_argument("--target-root", type=Path, help="target folder, if not below --data-root")
    g.add_argument("--source-list", type=Path, help="text file: the source images to train on")
    g.add_argument("--target-list", type=Path, help="text file: the target images to train on")
    g.add_argument("--out", type=Path, default="runs/bcl", help="folder of this run's files")

    g = parser.add_argument_group("data")
    g.add_argument("--source", choices=common.SOURCES, default="gta5", help="labelled domain")
    g.add_argument("--target", choices=common.TARGETS, default="cityscapes", help="unlabelled one")
    g.add_argument("--num-classes", type=int, default=19, help="C; not 19: folder data only")
    text = "WxH at which static labels are made and validation images seen (released)"
    g.add_argument("--target-size", type=common.WxH, default="1460x730", help=text)
    g.add_argument("--short-side", type=int, default=850, help="pixels before crop (released)")
    g.add_argument("--scales", type=factors, default="0.8,1.0,1.2", help="factors on it (released)")
    g.add_argument("--crop", type=int, default=730, help="side of the random crop (released)")
    g.add_argument("--flip", action=on_off, default=True, help="mirror half the images (released)")

    g = parser.add_argument_group("warm-up")
    text = "iterations on the source alone (ours); 0: --init is source-only weights already"
    g.add_argument("--warmup-iters", type=int, default=40_000, help=text)
    g.add_argument("--warmup-lr", type=float, default=2.5e-4, help="its learning rate (ours)")
    g.add_argument("--warmup-short-side", type=int, default=720, help="before the crop (released)")
    g.add_argument("--warmup-crop", type=int, default=600, help="side of the crop (released)")

    g = parser.add_argument_group("schedule")
    g.add_argument("--rounds", type=int, default=10, help="each: new y_F, half the lr (released)")
    text = "iterations of a round (paper; released, upsizing: 10004)"
    g.add_argument("--round-iters", type=int, default=10_000, help=text)
    g.add_argument("--lr", type=float, default=7.5e-5, help="SGD, first round (released)")
    g.add_argument("--batch-size", type=int, default=2, help="pairs of images (released)")
    g.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")

    g = parser.add_argument_group("method")
    text = "τ (ours; paper .5 to .9): a similarity above it makes a dynamic label; see coverage_* "
    text += "in the log"
    g.add_argument("--tau", type=float, default=0.8, help=text)
    text = "λ of μ (ours; paper .99 to .9999); higher for longer rounds"
    g.add_argument("--momentum", type=float, default=0.999, help=text)
    g.add_argument("--temperature", type=float, default=0.1, help="T_c (paper)")
    text = "of both cross-entropies (paper)"
    g.add_argument("--lambda-ce", type=float, default=1.0, help=text)
    g.add_argument("--lambda-ent", type=float, default=0.4, help="of both entropies (released)")
    text = "of L_FCL (released, damnet_config; paper .1 to .7)"
    g.add_argument("--lambda-fcl", type=float, default=0.1, help=text)
    text = "of L_BCL (released, damnet_config; paper .1 to .7)"
    g.add_argument("--lambda-bcl", type=float, default=0.1, help=text)
    text = "of the target's CE and entropy (paper; released: 0.3)"
    g.add_argument("--target-weight", type=float, default=1.0, help=text)
    text = "r, top share of every class and image that is labelled (released)"
    g.add_argument("--static-ratio", type=float, default=0.1, help=text)
    modes = ("batch", "running")
    text = "y_F is made with each image's own statistics (released), or with running ones"
    g.add_argument("--label-bn", choices=modes, default="batch", help=text)
    kinds = ("static", "dynamic", "hybrid")
    g.add_argument("--labels", choices=kinds, default="hybrid", help="target's y_T (paper)")
    g.add_argument("--calibrate", action=on_off, default=True, help="add domain bias ξ (paper)")

    g = parser.add_argument_group("network")
    text = "imagenet, demo, none (random) or a weight file"
    g.add_argument("--init", default="imagenet", help=text)
    text = "blocks of each stage"
    g.add_argument("--layers", type=common.block_counts, default="3,4,23,3", help=text)
    g.add_argument("--width", type=int, default=64, help="channels of the stem")
    text = "training normalises by batch statistics (released), or by running ones, then fixed"
    g.add_argument("--bn", choices=modes, default="batch", help=text)
    text = "learning rates and weight decay, see D2"
    g.add_argument("--recipe", choices=("released", "paper"), default="released", help=text)
    text = "factor on head's lr (released)"
    g.add_argument("--lr-head-mult", type=float, default=10.0, help=text)

    g = parser.add_argument_group("run")
    g.add_argument("--eval-every", type=int, default=2_000, help="iterations; 0: only at the end")
    text = "iterations between saves; a kill loses at most these"
    g.add_argument("--save-every", type=int, default=1_000, help=text)
    g.add_argument("--log-every", type=int, default=50, help="iterations between log records")

    g = parser.add_argument_group("speed")
    g.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    g.add_argument("--amp", action=on_off, help="bfloat16 convolutions; on if the GPU has it")
    g.add_argument("--compile", action=on_off, default=False, help="G, CE and entropy; slow start")
    text = "compute activations twice, which saves memory"
    g.add_argument("--checkpoint-activations", action=on_off, default=False, help=text)
    text = "reading processes per domain; raise it if the log's data_seconds grows"
    g.add_argument("--workers", type=int, default=4, help=text)

    args = parser.parse_args()
    demo = not (args.data_root or args.source_root or args.target_root)
    if demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args()
    args.demo = demo
    return args


def check(args):
    """Refuse values that would do harm in silence, and flags that contradict each other."""
    least = {"batch_size": 1, "rounds": 1, "round_iters": 1, "save_every": 1, "log_every": 1}
    least.update(eval_every=0, warmup_iters=0, seed=0, workers=0, width=1, lr=0, warmup_lr=0)
    least.update(lr_head_mult=0, lambda_ce=0, lambda_ent=0, lambda_fcl=0, lambda_bcl=0)
    least.update(target_weight=0)
    least.update(crop=32, short_side=32, warmup_crop=32, warmup_short_side=32)
    folders = args.source == args.target == "folder"
    resnet101 = args.layers == (3, 4, 23, 3) and args.width == 64
    mistakes = []
    for name, low in least.items():
        flag = f"--{name.replace('_', '-')}"
        fine = getattr(args, name) >= low  # not so for nan
        mistakes.append((not fine, f"{flag} must be {low} or more."))
    mistakes += [
        (min(args.target_size) < 32, "--target-size needs sides of 32 pixels or more."),
        (not all(0 < scale < 100 for scale in args.scales), "--scales must be above 0."),
        (min(args.layers) < 1, "--layers needs 1 block or more in each stage."),
        (not 0 <= args.momentum <= 1, "--momentum is λ. Give 0 to 1."),
        (not 0 <= args.static_ratio <= 1, "--static-ratio is a share. Give 0 to 1."),
        (not -1 <= args.tau <= 1, "--tau is a cosine. Give -1 to 1."),
        (not args.temperature > 0, "--temperature must be above 0."),
        (not 2 <= args.num_classes <= 255, "--num-classes must be 2 to 255."),
        (args.num_classes != 19 and not folders,
         "--num-classes other than 19 needs --source folder and --target folder."),
        (args.source == "folder" and not args.source_root,
         "--source folder needs --source-root, with images/ and labels/ in it."),
        (args.target == "folder" and not args.target_root,
         "--target folder needs --target-root, with images/ in it."),
        (args.source_root and args.source_root == args.target_root,
         "--source-root and --target-root are the same folder. Name two."),
        (args.source == args.target == "cityscapes",
         "--source cityscapes is the target, too. To train on the target's labels use "
         "intrada.py --stage 1 --alignment none."),
        (args.init == "imagenet" and not resnet101,
         "--init imagenet is a ResNet-101. It needs --layers 3,4,23,3 --width 64."),
        (args.compile and args.checkpoint_activations,
         "--compile and --checkpoint-activations exclude each other. Drop one."),
    ]  # fmt: skip
    for found, sentence in mistakes:
        if found:
            raise UserError(sentence)


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
    """-(1/|Ω|) Σ_{p∈Ω} log[ exp(s(f(p),p(y(p)))/T_c) / Σ_{c present} exp(s(f(p),p(c))/T_c) ].

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
    """The inverse of `common.pick`, which gives them back: map labels (B,h,w) to (B,H,W)."""
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

    Example: of the pixels (3, 0, 2, 5) in four bins the top 0.6 are 6 of 10. From bin 2 up lie 7,
    from bin 3 up 5: the bin is 2, and a little more than the ratio is labelled.
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


@torch.no_grad()
def make_static_labels(args, G, images: dict, folder: Path, classes: tuple, device):
    """Write the static labels y_F of a round: <folder>/labels/<name>.png and labels.json, with the
    labelled share of the pixels and the threshold of every class.

    Two passes of the network over all target images: histograms, then labels cut at the class
    thresholds. (Keeping the first pass's answers would take 3 bytes a pixel: 10 GB on Cityscapes.)
    Ranks share the images. The folder appears when it is whole; one that is there stays.
    """
    if folder.exists():
        return
    predictor = label_network(G, args.label_bn)
    dataset = common.Images(images, args.target_size)
    absent = common.ABSENT.get(args.source, ())
    C = len(classes)

    def predictions():
        for item in common.one_by_one(dataset, args.workers):
            image = common.to_device(item["image"], device).permute(2, 0, 1)  # (3, H, W)
            yield item["name"], *confident_prediction(predictor, image, args.target_size)

    histogram = torch.zeros(C, BINS, dtype=torch.int64, device=device)
    for _, label, bins in predictions():
        cells = (label * BINS + bins).flatten()
        histogram += torch.bincount(cells, minlength=C * BINS).view(C, BINS)
    thresholds = top_bins(common.all_reduce(histogram), args.static_ratio)
    labelled = torch.zeros((), dtype=torch.float64)
    partial = folder.with_name(f"{folder.name}.partial")
    for name, label, bins in predictions():
        y_f = choose_static(label, bins, thresholds, args.static_ratio, absent).byte()
        labelled += (y_f != IGNORE).double().mean().cpu()
        common.write_png(partial / "labels" / f"{name}.png", y_f.cpu().numpy(), classes)
    coverage = 100 * common.all_reduce(labelled).item() / len(images)  # all have written theirs
    print(f"{folder.name}: static labels on {coverage:.1f} % of the target's pixels", flush=True)
    if common.rank() == 0:
        confidences = dict(zip(classes, bin_confidence(thresholds).tolist()))
        found = {"coverage": coverage, "thresholds": confidences, "bins": thresholds.tolist()}
        common.write_text(partial / "labels.json", json.dumps(found, indent=1) + "\n")
        os.rename(partial, folder)
    common.barrier()


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


def build(args, init, device) -> tuple:
    """(G, its optimizer, what its weights are), G on the device."""
    torch.manual_seed(args.seed)
    G = common.DeepLabV2(args.num_classes, args.layers, args.width, aux=False)
    weight_report = common.load_weights(G, common.initial_weights(init), init)
    G.to(device)
    G.checkpoint_activations = args.checkpoint_activations
    G.input_size = args.target_size
    groups = G.parameter_groups(args.recipe, args.lr_head_mult)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    if args.compile:
        G.compile(dynamic=False)  # in place: the names in checkpoints stay
    return G, optimizer, weight_report


def warm_up(args, settings, pairs: dict, classes, validation, device):
    """Train G on the labelled source alone, with cross-entropy. Files go to <out>/warmup/.

    pairs {name: (image, label)}; validation: a dataset, or None.
    """
    folder = args.out / "warmup"
    iters = args.warmup_iters
    G, optimizer, weight_report = build(args, args.init, device)
    state = {"model": G, "optimizer": optimizer}
    transform = functools.partial(
        augment,
        short_side=args.warmup_short_side,
        scales=args.scales,
        crop=args.warmup_crop,
        flip=args.flip,
    )
    source = common.Labelled(pairs, args.source, classes, transform=transform, seed=args.seed)
    start = common.resume(folder, settings, state)
    if start == 0:
        common.save(folder / "last.pth", 0, settings, state)
    data = f"{len(source)} source images, {weight_report}"
    log = common.Log(folder, "warm-up", data, start, iters, settings)
    batches = common.Batches(source, args.batch_size, start, iters, args.workers, device)
    common.set_mode(G, args.bn)
    autocast = common.autocast(device, args.amp)
    cross_entropy = common.compiled(segmentation_loss, args.compile)

    for it in range(start, iters + 1):
        evaluation_due = common.due(it, args.eval_every, iters)
        if it > start and (evaluation_due or common.due(it, args.save_every, iters)):
            common.save(folder / "last.pth", it, settings, state)
        if validation and evaluation_due and it not in log.evaluated:
            result = common.evaluate([G], validation, device, args.workers)
            if log.is_best(result):
                common.save(folder / "best.pth", it, settings, {"model": G})
            log.evaluation(it, result)
        if it == iters:
            break

        lr = args.warmup_lr * (1 - it / iters) ** 0.9
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.zero_grad(set_to_none=True)
        x_s, y_s = next(batches)  # (B, 3, H, W), (B, H, W)
        with autocast:
            S = G(common.normalize(x_s))
        loss = cross_entropy(common.upsample(S.main, (args.warmup_crop, args.warmup_crop)), y_s)
        loss.backward()
        common.average_over_ranks(G)  # gradients and running statistics
        optimizer.step()

        if common.due(it + 1, args.log_every, iters):
            log.losses(it + 1, [batches], device, {"loss_ce_source": loss}, lr=lr)


def train(args, settings, init, pairs: dict, images: dict, classes, validation, device):
    """Train G by BCL for all rounds. Checkpoints, log and static labels go to args.out.

    init: as --init, or the warm-up's checkpoint; pairs: the source's {name: (image, label)};
    images: the target's {name: image}; validation: a dataset, or None.
    """
    C = args.num_classes
    iters = args.round_iters
    total = args.rounds * iters
    G, optimizer, weight_report = build(args, init, device)
    ema_source = PrototypeEMA(C, 32 * args.width, args.momentum).to(device)
    ema_target = PrototypeEMA(C, 32 * args.width, args.momentum).to(device)
    state = {
        "model": G,
        "optimizer": optimizer,
        "ema_source": ema_source,
        "ema_target": ema_target,
    }
    transform = functools.partial(
        augment, short_side=args.short_side, scales=args.scales, crop=args.crop, flip=args.flip
    )
    source = common.Labelled(pairs, args.source, classes, transform=transform, seed=args.seed)

    start = common.resume(args.out, settings, state)
    if start == 0:  # before anything else is written: now the folder, and round*/, are this run's
        common.save(args.out / "last.pth", 0, settings, state)
    data = f"{len(source)} source images, {len(images)} target images, {weight_report}"
    log = common.Log(args.out, "bcl", data, start, total, settings)
    source_batches = common.Batches(source, args.batch_size, start, total, args.workers, device)
    common.set_mode(G, args.bn)
    autocast = common.autocast(device, args.amp)
    cross_entropy = common.compiled(segmentation_loss, args.compile)
    entropy = common.compiled(pixel_entropy, args.compile)

    for it in range(start, total + 1):
        # ---- once in a while: save, then evaluate; a run killed in between evaluates later
        round_, step = divmod(it, iters)
        evaluation_due = common.due(it, args.eval_every, total)
        save_due = evaluation_due or common.due(it, args.save_every, total) or step == 0
        if it > start and save_due:
            common.save(args.out / "last.pth", it, settings, state)
        if validation and evaluation_due and it not in log.evaluated:
            result = common.evaluate([G], validation, device, args.workers)
            if log.is_best(result):
                common.save(args.out / "best.pth", it, settings, {"model": G})
            log.evaluation(it, result)
        if it == total:
            break

        # ---- a new round, or a resumed one: static labels, and batches with them
        folder = args.out / f"round{round_}"
        if step == 0:
            make_static_labels(args, G, images, folder, classes, device)
        if step == 0 or it == start:
            labelled = {}
            for name, path in images.items():
                labelled[name] = (path, folder / "labels" / f"{name}.png")
            target = common.Labelled(
                labelled, "folder", classes, pseudo=True, transform=transform, seed=args.seed + 1
            )
            end = (round_ + 1) * iters
            target_batches = common.Batches(target, args.batch_size, it, end, args.workers, device)
            log.restart_clock(it)  # making labels is not training time

        # ============================== the method ==============================
        # Half the rate in each next round. Poly over 1.2 rounds (R), so that a round ends at 0.2 of
        # its rate. With 0 at the end, the last iterations would learn almost nothing.
        lr = args.lr * 0.5**round_ * (1 - step / (1.2 * iters)) ** 0.9
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.zero_grad(set_to_none=True)

        # source: features f_s (B, D, h, w), logits (B, C, H, W), ground truth y_s
        x_s, y_s_full = next(source_batches)  # (B, 3, H, W), (B, H, W)
        crop = (args.crop, args.crop)  # (W, H), of both domains
        with autocast:
            S = G(common.normalize(x_s))
        logits_s = common.upsample(S.main, crop)
        f_s = S.features.float()  # (B, D, h, w)
        y_s = common.pick(y_s_full, *f_s.shape[2:])  # (B, h, w)

        # target: features f_t, logits, static labels y_F
        x_t, y_f_full = next(target_batches)
        with autocast:
            T = G(common.normalize(x_t))
        logits_t = common.upsample(T.main, crop)
        f_t = T.features.float()
        y_f = common.pick(y_f_full, *f_t.shape[2:])
        batch = range(len(x_s))

        # p_S -> μ_S, for every pair of a source and a target image. μ_S moves before ξ is taken,
        # so that a class seen here for the first time already has a μ_S.
        p_s = [class_prototypes(f_s[b], y_s[b], C) for b in batch]
        ema_source.update(batch_mean(p_s))

        # ξ, p_{S→T} -> y_D. Between the two updates: μ_T needs y_T, which needs ξ.
        p_st = p_s
        if args.calibrate:
            p_st = [calibrate(p, ema_source, ema_target) for p in p_s]
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
        loss_ce_s = cross_entropy(logits_s, y_s_full)
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
        common.average_over_ranks(G)  # gradients and running statistics; by hand, see there
        optimizer.step()
        # =========================== end of the method ===========================

        if common.due(it + 1, args.log_every, total):
            losses = {
                "loss_ce_source": loss_ce_s,
                "loss_ce_target": loss_ce_t,
                "loss_ent_source": loss_ent_s,
                "loss_ent_target": loss_ent_t,
                "loss_fcl": loss_fcl,
                "loss_bcl": loss_bcl,
                "loss": loss,
            }
            coverage = {}  # labelled share of the map's positions in this batch (of rank 0)
            for name, labels in (("y_f", y_f), ("y_d", y_d), ("y_t", y_t)):
                coverage[f"coverage_{name}"] = (labels != IGNORE).double().mean().item()
            batches = [source_batches, target_batches]
            log.losses(it + 1, batches, device, losses, lr=lr, round=round_, **coverage)


# ====================================================================== main


def main():
    args = parse()
    check(args)
    device = common.set_up(args.device)
    settings = common.identity(vars(args), FREE)
    held = common.lock(args.out)  # noqa: F841, kept until the process ends
    if args.demo:
        from demo.scenes import demo_scenes

        print("Demo: drawn scenes, small network, short schedule. Real data: --data-root DIR")
        args.data_root = demo_scenes(args.source)
    if any(args.out.glob("stage?")):
        raise UserError(f"--out {args.out} holds a run of intrada.py. Choose another --out.")

    # What the run needs is looked at before anything is trained.
    target_root = common.dataset_root(args.target, args.data_root, args.target_root)
    images = common.keep_listed(common.list_images(args.target, target_root), args.target_list)
    classes = common.dataset_classes(args.target, target_root, args.num_classes)
    common.refuse_inside(args.out, common.image_folder(args.target, target_root))
    common.Images(images).check_samples()
    validation = common.validation_set(args.target, target_root, classes, args.target_size)
    source_root = common.dataset_root(args.source, args.data_root, args.source_root)
    pairs = common.keep_listed(common.list_pairs(args.source, source_root), args.source_list)
    common.check_classes(args.source, source_root, classes)
    common.refuse_inside(args.out, common.image_folder(args.source, source_root))
    common.Labelled(pairs, args.source, classes).check_samples()
    warmup_settings = {**settings, "images": common.fingerprint(pairs)}
    settings["images"] = common.fingerprint([*pairs, *images])
    common.earlier_run(args.out, settings)  # refused now, and not after the warm-up

    runs = {}
    init = args.init
    if args.warmup_iters:
        warm_up(args, warmup_settings, pairs, classes, validation, device)
        init = args.out / "warmup" / "last.pth"
        runs["warm-up"] = args.out / "warmup"
    train(args, settings, init, pairs, images, classes, validation, device)
    runs["BCL"] = args.out
    if validation and common.rank() == 0:
        common.print_results(args.out, runs, validation, device)


if __name__ == "__main__":
    common.launch(main)
