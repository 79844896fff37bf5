r"""BCL: bi-directional contrastive learning for domain adaptive segmentation (ECCV 2022).

Lee, Eom, Lee, Park, Ham. A prototype is the mean feature of a class in one image. Features of one
domain are pulled towards the other domain's prototype of their class and pushed away from its other
prototypes, in both directions. Target labels are hybrid. Static labels are confident predictions of
the network G and are made anew every round. Dynamic labels fill the gaps: a position gets the class
of the nearest prototype of its source image, after the bias between the domains was added to it.

    python bcl.py --tau 0.8 --momentum 0.999             demo: drawn scenes, a small network
    python bcl.py --data-root DIR --out runs/bcl_gta5    GTA5 -> Cityscapes, ResNet-101, one GPU
    torchrun --nproc_per_node=2 bcl.py --data-root DIR --out runs/bcl_two             batch 4 + 4
    python bcl.py --data-root DIR --init FILE --warmup-iters 0 --out runs/bcl_x       own start
    python bcl.py --target-weight 0 --lambda-fcl 0 --lambda-bcl 0 --out runs/control  the control

In the control, target images move BatchNorm's running statistics only (not with --bn running). A
run resumes by the same command.

Where this differs from the paper (P) or from the released code (R). R has neither calibration nor
EMA prototypes, and its dynamic labels are dead code. This file follows P.
D1  Encoder features are layer4's output (2048-d). R: 76 concatenated classifier logits.
D2  R's optimizer lists a parameter n times (conv1, heads 1, shortcuts 4, others 3) and steps it n
    times; step k adds k times the weight decay. Here it is listed once. --recipe released takes n
    times its rate and (n + 1)/2 times its weight decay; --recipe paper takes both once.
D3  The domains share all weights, as in P. R has another stem and layer1 for the target.
D4  The EMA moves by a class's mean prototype over the images of the batch that have the class. The
    losses use each pair's own prototypes. Batch size is free. R's must be 2.
D5  FCL and BCL are taken on the stride-8 map, over positions whose class has a prototype on the
    other side, against all prototypes of that side. R takes them at full size. Its BCL covers all
    source pixels, with similarity -1 to a missing class (cosine of its gradient with ours 0.53).
D6  Entropy is normalised to 0..1. R applies softmax twice and gets 2.03 to 2.94.
D7  Poly decays over 1.2 x the round, and each round has half the rate of the last, as in R's
    configuration for upsizing, which R's script loads: its 10,004 iterations end at 0.20 of the
    rate. R makes a new SGD every round, so its momentum starts at 0. Here momentum is kept.
D8  Static labels are made with each image's own BatchNorm statistics, as in R; P does not say. With
    --label-bn running, which knows the source, 79 instead of 91 % of them were right in a trial on
    drawn scenes. In R, running statistics move while labels are made.
D9  Static thresholds come from confidence histograms of 65,536 bins, linear in -log(1 - p). They
    reach the last float32 below 1; bins linear in p merge all above 0.99998. The image's own top r
    is over all its pixels, of any class. R counts every fifth confidence. R labels a pixel where
    any class's probability reaches that class's threshold; here only the predicted class counts. R
    upsamples twice and writes labels of 2048x1024.
D10 A position of the stride-8 map stands for the pixel where align_corners puts its logits. Labels
    are picked there and enlarged by the inverse. R's nearest is 3 to 8 pixels off at the borders.
    On drawn scenes the network's own map agrees with 75.6 % of R's labels and 85.4 % of ours.
D11 A class without a source pixel (SYNTHIA: terrain, truck, train) gets no target label.
D12 A loss over no pixel is 0 with zero gradient. R: NaN.
D13 An image is never scaled below the crop, so nothing is padded: at R's sizes the factor 0.8
    becomes 730/850. Every epoch is a new permutation of the images; R's loaders do not shuffle.
D14 --init imagenet loads torchvision's weights. R starts from a Caffe-style file, read by --init.
    Length and rate of the source-only warm-up are ours: P and R give none for P's method (R's
    source-only configuration: 6 rounds of 2 x 5,000 iterations at 7.5e-5). The rate decays to 0
    over the whole warm-up. Its loss is CE on the source, without --lambda-ce.
D15 Under torchrun there is one EMA, of the prototypes of all processes. Gradients and BatchNorm's
    running statistics are averaged. --lr is not scaled. Each process has its own batch statistics
    and its own mean over labelled pixels. So two processes of one image and one process of two
    images give different results.
D16 The last checkpoint is the result. best.pth is chosen on validation labels: it is an oracle.
D17 FCL and BCL weigh 0.1, as in R's damnet_config.yml (2,496 iterations a round, which ends at 0.52
    of the rate). R's file for upsizing has 0.2, that for SYNTHIA 0 (9,398 iterations a round).
    --target-weight is 1, as in P's equation. R weighs the target's CE and entropy by 0.3.
D18 On GPUs that have bfloat16, training runs the convolutions in it (--no-amp: in float32). Their
    outputs become float32 before prototypes and losses. Static labels and evaluation are float32.
    TF32 is off.
D19 The demo (DEMO) is short. It starts from demo/initial.pth and has no warm-up and no entropy
    terms. It has r = 0.5, two rounds, scales 1.0 and 1.2, a learning rate of 2e-3 and a factor of
    0.3 on the head's rate.

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

# Defaults of the demo: a run without a data root. Its 800 iterations of a small network need a
# larger rate than the 100,000 of a ResNet-101. D19 says what changes numbers.
DEMO = dict(
    init="demo", layers=(1, 1, 1, 1), width=16,
    target_size=(256, 128), short_side=128, crop=128, scales=(1.0, 1.2), warmup_iters=0,
    warmup_short_side=128, warmup_crop=128, warmup_lr=1e-2, rounds=2, round_iters=400, lr=2e-3,
    lr_head_mult=0.3, static_ratio=0.5, lambda_ent=0.0,
    eval_every=400, save_every=100, log_every=20, workers=0,
)  # fmt: skip
# Flags that may change when a run resumes. Lists and folders are checked by their images' names.
FREE = (
    "data_root", "source_root", "target_root", "source_list", "target_list", "out", "demo",
    "eval_every", "save_every", "log_every", "device", "amp", "compile", "checkpoint_activations",
    "workers",
)  # fmt: skip


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def scale_factors(text: str) -> tuple:
    """Numbers with commas between them: "0.8,1.2" to (0.8, 1.2)."""
    return tuple(map(float, text.split(",")))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]",
        description=__doc__.split("\nWhere this differs")[0],
        epilog="Without a data root, the demo runs. Its defaults are in DEMO in this file.",
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
    g.add_argument("--target", choices=common.TARGETS, default="cityscapes", help="unlabelled set")
    g.add_argument("--num-classes", type=int, default=19, help="C; 19, or any for folders")
    text = "WxH of images for static labels and for validation (released)"
    g.add_argument("--target-size", type=common.WxH, default="1460x730", help=text)
    g.add_argument("--short-side", type=int, default=850, help="pixels before crop (released)")
    text = "factors on --short-side, at random (released)"
    g.add_argument("--scales", type=scale_factors, default="0.8,1.0,1.2", help=text)
    g.add_argument("--crop", type=int, default=730, help="side of the random crop (released)")
    g.add_argument("--flip", action=on_off, default=True, help="mirror half the images (released)")

    g = parser.add_argument_group("warm-up")
    text = "source-only iterations (ours); 0: --init has source-only weights already"
    g.add_argument("--warmup-iters", type=int, default=40_000, help=text)
    g.add_argument("--warmup-lr", type=float, default=2.5e-4, help="learning rate (ours)")
    g.add_argument("--warmup-short-side", type=int, default=720, help="pixels pre-crop (released)")
    g.add_argument("--warmup-crop", type=int, default=600, help="side of the crop (released)")

    g = parser.add_argument_group("schedule")
    g.add_argument("--rounds", type=int, default=10, help="each has new y_F, half lr (released)")
    text = "iterations a round (paper; released for upsizing: 10004)"
    g.add_argument("--round-iters", type=int, default=10_000, help=text)
    g.add_argument("--lr", type=float, default=7.5e-5, help="lr of round 0 (released)")
    g.add_argument("--batch-size", type=int, default=2, help="pairs of images (released)")
    g.add_argument("--seed", type=int, default=0, help="seeds weights, order, augmentation")

    g = parser.add_argument_group("method")
    text = "τ (ours; paper .5 to .9); higher: fewer and surer y_D; see coverage_y_d in the log"
    g.add_argument("--tau", type=float, default=0.8, help=text)
    text = "λ of μ (ours; paper .99 to .9999); higher for longer rounds"
    g.add_argument("--momentum", type=float, default=0.999, help=text)
    g.add_argument("--temperature", type=float, default=0.1, help="T_c (paper)")
    text = "weight of both CEs (paper)"
    g.add_argument("--lambda-ce", type=float, default=1.0, help=text)
    g.add_argument("--lambda-ent", type=float, default=0.4, help="weight of entropy (released)")
    text = "λ_FCL (released: damnet_config; paper .1 to .7)"
    g.add_argument("--lambda-fcl", type=float, default=0.1, help=text)
    text = "λ_BCL (released: damnet_config; paper .1 to .7)"
    g.add_argument("--lambda-bcl", type=float, default=0.1, help=text)
    text = "weight of target CE, entropy (paper; released: 0.3)"
    g.add_argument("--target-weight", type=float, default=1.0, help=text)
    text = "r: y_F labels this top share of each class and image (released)"
    g.add_argument("--static-ratio", type=float, default=0.1, help=text)
    modes = ("batch", "running")
    text = "y_F is made with the image's own statistics (released) or the running ones"
    g.add_argument("--label-bn", choices=modes, default="batch", help=text)
    kinds = ("static", "dynamic", "hybrid")
    g.add_argument("--labels", choices=kinds, default="hybrid", help="kind of y_T (paper)")
    g.add_argument("--calibrate", action=on_off, default=True, help="add domain bias ξ (paper)")

    g = parser.add_argument_group("network")
    text = "imagenet, demo, none (random) or a weight file"
    g.add_argument("--init", default="imagenet", help=text)
    text = "blocks of each stage"
    g.add_argument("--layers", type=common.block_counts, default="3,4,23,3", help=text)
    g.add_argument("--width", type=int, default=64, help="channels of the stem")
    text = "training uses the batch's statistics (released), or the running ones, kept fixed"
    g.add_argument("--bn", choices=modes, default="batch", help=text)
    text = "rates and weight decay: D2 in this file"
    g.add_argument("--recipe", choices=("released", "paper"), default="released", help=text)
    text = "factor on head's lr (released)"
    g.add_argument("--lr-head-mult", type=float, default=10.0, help=text)

    g = parser.add_argument_group("run")
    g.add_argument("--eval-every", type=int, default=2_000, help="iterations apart; 0: at end")
    text = "iterations between saves; a kill loses at most these"
    g.add_argument("--save-every", type=int, default=1_000, help=text)
    g.add_argument("--log-every", type=int, default=50, help="iterations between log records")

    g = parser.add_argument_group("speed")
    g.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    g.add_argument("--amp", action=on_off, help="bfloat16 convolutions; on if the GPU has it")
    g.add_argument("--compile", action=on_off, default=False, help="G, CE and entropy; slow start")
    text = "compute activations twice: saves memory"
    g.add_argument("--checkpoint-activations", action=on_off, default=False, help=text)
    text = "readers per domain; raise it if the log's data_seconds is high"
    g.add_argument("--workers", type=int, default=4, help=text)

    args = parser.parse_args()
    demo = not (args.data_root or args.source_root or args.target_root)
    if demo:  # known after a first parse; the second puts the demo's defaults below the flags
        parser.set_defaults(**DEMO)
        args = parser.parse_args()
    args.demo = demo
    return args


def check(args):
    """Refuse values that would silently do harm, and flags that contradict each other."""
    lowest = {"batch_size": 1, "rounds": 1, "round_iters": 1, "save_every": 1, "log_every": 1}
    lowest.update(eval_every=0, warmup_iters=0, seed=0, workers=0, width=1, lr=0, warmup_lr=0)
    lowest.update(lr_head_mult=0, lambda_ce=0, lambda_ent=0, lambda_fcl=0, lambda_bcl=0)
    lowest.update(target_weight=0)
    lowest.update(crop=32, short_side=32, warmup_crop=32, warmup_short_side=32)
    both_folders = args.source == args.target == "folder"
    same_images = args.source == args.target == "cityscapes"
    if args.source_root and args.target_root:
        same_images = args.source_root == args.target_root
    is_resnet101 = args.layers == (3, 4, 23, 3) and args.width == 64
    checks = []
    for name, low in lowest.items():
        value = getattr(args, name)
        sentence = f"--{name.replace('_', '-')} is {value}. It must be {low} or more."
        checks.append((not value >= low, sentence))  # not `<`, which is False for NaN
    checks += [
        (min(args.target_size) < 32, "--target-size must have sides of 32 pixels or more."),
        (not all(0 < scale < 100 for scale in args.scales), "--scales must lie between 0 and 100."),
        (min(args.layers) < 1, "--layers needs 1 block or more in each stage."),
        (not 0 <= args.momentum <= 1, "--momentum is λ of μ. Give a number from 0 to 1."),
        (not 0 <= args.static_ratio <= 1, "--static-ratio is a share. It must be from 0 to 1."),
        (not -1 <= args.tau <= 1, "--tau is a cosine. Give a number from -1 to 1."),
        (not args.temperature > 0, "--temperature must be above 0."),
        (not 2 <= args.num_classes <= 255, "--num-classes must be from 2 to 255."),
        (args.num_classes != 19 and not both_folders,
         "--num-classes other than 19 needs --source folder and --target folder."),
        (args.source == "folder" and not args.source_root,
         "--source folder needs --source-root, with images/ and labels/ in it."),
        (args.target == "folder" and not args.target_root,
         "--target folder needs --target-root, with images/ in it."),
        (same_images,
         "source and target are the same folder. Name two. To train on the target's labels, "
         "use intrada.py --stage 1 --alignment none."),
        (args.init == "imagenet" and not is_resnet101,
         "--init imagenet is a ResNet-101. It needs --layers 3,4,23,3 --width 64."),
        (args.compile and args.checkpoint_activations,
         "--compile and --checkpoint-activations cannot be combined. Drop one."),
    ]  # fmt: skip
    for violated, sentence in checks:
        if violated:
            raise UserError(sentence)


# ====================================================================== the method's maths
# In the paper's order. f: encoder features of one image, (D, h, w) at stride 8; y: its labels,
# (h, w) trainIds with 255 = none; p: a position of the map; p(c): a prototype; C classes.


class Prototypes(NamedTuple):
    vectors: Tensor  # (C, D), zero for a class that is not present
    present: Tensor  # (C,) bool


def class_prototypes(features: Tensor, labels: Tensor, num_classes: int) -> Prototypes:
    """Masked average pooling: p(c) = Σ_p f(p) y(p,c) / Σ_p y(p,c), of features (D,h,w) and labels
    (h,w), 255 = none. A class is present if it has a pixel. Gradients reach the features."""
    classes = torch.arange(num_classes, device=labels.device)
    # One product pools all classes. The gradient reaches the features; labels carry none.
    one_hot = (labels.flatten() == classes[:, None]).to(features.dtype)  # (C, hw); 255 matches none
    count = one_hot.sum(1, keepdim=True)  # (C, 1)
    vectors = one_hot @ features.flatten(1).T / count.clamp(min=1)  # (C, hw) @ (hw, D) -> (C, D)
    return Prototypes(vectors, count[:, 0] > 0)


def similarities(features: Tensor, prototypes: Prototypes) -> Tensor:
    """Cosine s(f(p), p(c)) of positions and prototypes: (D,h,w), (C,D) -> (C,hw) in [-1, 1]; 0 for
    a class that is not present."""
    # eps is not the default 1e-12: the gradient at a zero vector is divided by it.
    unit = F.normalize(features.flatten(1), dim=0, eps=1e-4)  # (D, hw); zeros stay zeros
    return F.normalize(prototypes.vectors, dim=1, eps=1e-4) @ unit


def contrastive_loss(
    features: Tensor, labels: Tensor, prototypes: Prototypes, temperature: float
) -> Tensor:
    """-(1/|Ω|) Σ_{p∈Ω} log[ exp(s(f(p),p(y(p)))/T_c) / Σ_{c present} exp(s(f(p),p(c))/T_c) ].

    features (D,h,w) and labels (h,w) of one domain, prototypes of the other: target pixels and
    source prototypes make FCL, source pixels and target prototypes BCL. Ω: positions whose label
    is a present class. A scalar >= 0; without such a position 0 with zero gradient. Gradients reach
    features and prototypes.
    """
    present = prototypes.present
    logits = similarities(features, prototypes) / temperature  # (C, hw)
    # -1e30, not -inf: no NaN where no class is present
    log_p = logits.masked_fill(~present[:, None], -1e30).log_softmax(0)
    y = labels.flatten().long()  # (hw,)
    any_class = y.clamp(max=len(present) - 1)  # any valid class where the label is 255
    omega = (y < len(present)) & present[any_class]  # (hw,): Ω
    log_p_y = log_p.gather(0, any_class[None])[0]  # (hw,)
    return -(log_p_y * omega).sum() / omega.sum().clamp(min=1)


class PrototypeEMA(nn.Module):
    """μ(c) <- λ μ(c) + (1-λ) p(c) for the classes present. The first p(c) of a class becomes μ(c).

    Buffers: mean (C,D) and seen (C,) bool. They move with .to() and live in the checkpoint.
    """

    def __init__(self, num_classes: int, dim: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(num_classes, dim))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, prototypes: Prototypes):
        """Move μ by one batch: the result of `mean_prototypes`, vectors (C,D), present (C,)."""
        vectors = prototypes.vectors
        moved = torch.lerp(vectors, self.mean, self.momentum)  # λ μ + (1-λ) p
        moved = torch.where(self.seen[:, None], moved, vectors)
        self.mean.copy_(torch.where(prototypes.present[:, None], moved, self.mean))
        self.seen |= prototypes.present


def mean_prototypes(prototypes: list) -> Prototypes:
    """The mean of each class's prototypes over the images of a batch that have the class, on all
    ranks, without gradient. The EMA is updated with it."""
    # One EMA for all ranks: with its own, each rank would have a different ξ, and so labels.
    count = common.all_reduce(sum(p.present.float() for p in prototypes))  # (C,)
    total = common.all_reduce(sum(p.vectors.detach() for p in prototypes))  # (C, D)
    return Prototypes(total / count.clamp(min=1)[:, None], count > 0)


def calibrate(source: Prototypes, ema_source: PrototypeEMA, ema_target: PrototypeEMA) -> Prototypes:
    """p_{S→T}(c) = p_S(c) + ξ(c), the class-wise domain bias ξ(c) = μ_T(c) - μ_S(c), 0 while μ_S(c)
    or μ_T(c) is unseen. vectors (C,D); a class is present where it is in `source`."""
    known = ema_source.seen & ema_target.seen & source.present  # else ξ = 0
    calibrated = source.vectors + ema_target.mean - ema_source.mean
    return Prototypes(torch.where(known[:, None], calibrated, source.vectors), source.present)


@torch.no_grad()
def dynamic_labels(features: Tensor, prototypes: Prototypes, tau: float) -> Tensor:
    """y_D(p) = argmax_c s(f_T(p), p_{S→T}(c)) over present classes if the maximum is > τ, else 255.

    features f_T (D,h,w), prototypes p_{S→T} (C,D), tau in [-1, 1] -> (h,w) int64 trainIds.
    """
    # -2 is below every cosine and every τ: an absent class is never chosen.
    absent = ~prototypes.present[:, None]
    similarity = similarities(features, prototypes).masked_fill(absent, -2)
    best, label = similarity.max(0)  # (hw,)
    return torch.where(best > tau, label, IGNORE).view(features.shape[1:])


def target_labels(kind: str, static: Tensor, dynamic: Tensor) -> Tensor:
    """y_T: y_F for "static", y_D for "dynamic"; for "hybrid" y_F where it has a label, else y_D.
    All have one shape, int64."""
    if kind == "static":
        return static
    if kind == "dynamic":
        return dynamic
    return torch.where(static != IGNORE, static, dynamic)


def pixel_entropy(logits: Tensor) -> Tensor:
    """-Σ_c P log P / log C, P = softmax(logits): (B,C,H,W) to (B,H,W) in [0, 1]. Always finite."""
    log_p = logits.log_softmax(1)  # (B, C, H, W)
    return (-log_p.exp() * log_p / math.log(logits.shape[1])).sum(1)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, the mean over labelled pixels, a scalar; 0 if no pixel has a label.

    logits (B,C,H,W), labels (B,H,W) int64 trainIds with 255 = ignore.
    """
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def enlarge(labels: Tensor, height: int, width: int) -> Tensor:
    """Map labels (B,h,w) to (B,height,width). `common.pick` of the result gives them back."""
    return common.pick(labels, height, width)  # pixel y lies at position round(y (h-1)/(H-1))


# ====================================================================== static labels
# Most confidences are close to 1, where equal bins of p would merge them. They are counted in bins
# that are linear in u = -log(1 - p), from 0 to U_MAX: float32's last p below 1 has u = 16.6.
BINS = 65_536
U_MAX = 17.0


def confidence_bins(confidence: Tensor) -> Tensor:
    """Confidences p in [0, 1] to bins (int64): floor(-log(1 - p) BINS / U_MAX), below BINS."""
    bins = -torch.log1p(-confidence.double()) * (BINS / U_MAX)
    return bins.clamp(max=BINS - 1).long()


def bin_lower_edge(bins: Tensor) -> Tensor:
    """Confidences (float64) at the lower edges of bins; 1 for BINS, which no pixel reaches."""
    return torch.where(bins < BINS, 1 - torch.exp(-bins.double() * U_MAX / BINS), 1.0)


def top_bins(histogram: Tensor, ratio: float) -> Tensor:
    """For each row, the bin from which on the top `ratio` of its pixels lies.

    histogram (R,BINS): pixels of every confidence bin -> (R,) int64, the highest bin b such that
    the bins from b up hold at least ratio of the row's pixels. A row without a pixel gets BINS,
    which no pixel reaches, as does every row at ratio 0.

    Example: of the pixels (3, 0, 2, 5) in four bins the top 0.6 are 6 of 10. From bin 2 up lie 7,
    from bin 3 up 5: the bin is 2, and a little more than the ratio is labelled.
    """
    from_top = histogram.double().flip(1).cumsum(1).flip(1)  # (R, BINS): pixels in bin b and above
    enough = (from_top >= ratio * from_top[:, :1]).sum(1)  # (R,): b + 1, as it holds for bins 0..b
    some = (from_top[:, 0] > 0) & (ratio > 0)
    return torch.where(some, enough - 1, BINS)


def static_labels(
    prediction: Tensor, bins: Tensor, thresholds: Tensor, ratio: float, absent: tuple = ()
) -> Tensor:
    """y_F: the prediction where its confidence is in the top ratio of its class or of this image.

    prediction (H,W) trainIds, bins (H,W) confidence in 0..BINS-1, thresholds (C,) of `top_bins` ->
    (H,W) int64. absent: classes of which the source has no pixel; they get no label.
    """
    # By its own threshold, an image that is hard throughout gets labels, too.
    histogram = bins.flatten().bincount(minlength=BINS)
    own_threshold = top_bins(histogram[None], ratio)  # (1,)
    keep = (bins >= thresholds[prediction]) | (bins >= own_threshold)
    for c in absent:
        keep &= prediction != c
    return torch.where(keep, prediction, IGNORE)


def label_network(G: nn.Module, label_bn: str) -> nn.Module:
    """A copy of G that makes static labels, an image at a time. G's statistics do not move. "batch"
    (released): training mode, the image's own statistics. "running": eval mode."""
    if label_bn == "running":
        return common.inference_copy(G)
    return copy.deepcopy(G).train()


def confident_prediction(network, image: Tensor, out_size: tuple) -> tuple:
    """Image (3,H,W) uint8 RGB to prediction and confidence bins, (h,w) int64 at out_size (w,h)."""
    logits = network(common.normalize(image[None])).main
    confidence, prediction = common.upsample(logits, out_size)[0].softmax(0).max(0)
    return prediction, confidence_bins(confidence)


@torch.no_grad()
def write_static_labels(args, G, images: dict, folder: Path, classes: tuple, device):
    """Write the static labels y_F of a round: <folder>/labels/<name>.png and labels.json, with the
    labelled share of the pixels and the threshold of every class.

    Two passes of the network over all target images: histograms, then labels cut at the class
    thresholds. (Keeping the first pass's answers would take 3 bytes a pixel: 10 GB on Cityscapes.)
    Ranks share the images. The folder appears when it is complete; an earlier one is kept.
    """
    # Made once a round: a resumed run must train on the labels with which the round began.
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
        # a (C, BINS) histogram by one bincount: cell c * BINS + b
        cells = (label * BINS + bins).flatten()
        histogram += torch.bincount(cells, minlength=C * BINS).view(C, BINS)
    thresholds = top_bins(common.all_reduce(histogram), args.static_ratio)
    labelled = torch.zeros((), dtype=torch.float64)
    partial = folder.with_name(f"{folder.name}.partial")  # renamed when complete
    for name, label, bins in predictions():
        y_f = static_labels(label, bins, thresholds, args.static_ratio, absent).byte()
        labelled += (y_f != IGNORE).double().mean().cpu()
        common.write_png(partial / "labels" / f"{name}.png", y_f.cpu().numpy(), classes)
    coverage = 100 * common.all_reduce(labelled).item() / len(images)  # also a barrier
    print(f"{folder.name}: static labels on {coverage:.1f} % of the target's pixels", flush=True)
    if common.rank() == 0:
        confidences = dict(zip(classes, bin_lower_edge(thresholds).tolist()))
        found = {"coverage": coverage, "thresholds": confidences, "bins": thresholds.tolist()}
        common.write_text(partial / "labels.json", json.dumps(found, indent=1) + "\n")
        os.rename(partial, folder)
    common.barrier()


# ====================================================================== training


def augment(image, label, rng, short_side: int, scales: tuple, crop: int, flip: bool) -> tuple:
    """A Pillow image and its label (any size), scaled, cropped to crop x crop, mirrored at random.

    short_side: pixels of the shorter side, times one of `scales`, before the crop. Not
    nested in `train`, because readers that are not forked (macOS, Python 3.14) get it by pickle.
    """
    short = max(crop, round(short_side * scales[rng.integers(len(scales))]))  # D13
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
    """The network G on the device, its SGD optimizer, and a report of its initial weights."""
    torch.manual_seed(args.seed)
    G = common.DeepLabV2(args.num_classes, args.layers, args.width, aux=False)
    weight_report = common.load_weights(G, common.initial_weights(init), init)
    G.to(device)
    G.checkpoint_activations = args.checkpoint_activations
    G.input_size = args.target_size
    groups = G.parameter_groups(args.recipe, args.lr_head_mult)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    if args.compile:
        G.compile(dynamic=False)  # in place, so that names in checkpoints stay
    return G, optimizer, weight_report


def warm_up(args, settings, pairs: dict, classes, validation, device):
    """Train G on the labelled source alone, with cross-entropy. Writes to <out>/warmup/.

    pairs {name: (image path, label path)}; validation: `common.Labelled`, or None; settings as in
    `train`. UserError if a loss or a weight is not finite.
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
    description = f"{len(source)} source images, {weight_report}"
    log = common.Log(folder, "warm-up", description, start, iters, settings)
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
    """Train G by BCL for all rounds. last.pth, best.pth, log.jsonl and round*/ go to args.out.

    init: as --init, or the warm-up's checkpoint; pairs: the source's {name: (image, label)} paths;
    images: the target's {name: path}; validation: `common.Labelled`, or None; settings as given by
    `common.run_settings`: a checkpoint of different ones is refused. UserError if a loss or weight
    is not finite.
    """
    C = args.num_classes
    round_iters = args.round_iters
    iters = args.rounds * round_iters
    G, optimizer, weight_report = build(args, init, device)
    ema_source = PrototypeEMA(C, 32 * args.width, args.momentum).to(device)
    ema_target = PrototypeEMA(C, 32 * args.width, args.momentum).to(device)
    # The EMAs are saved, too: a resumed run must calibrate with the same ξ.
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
    if start == 0:  # the first file: it makes the folder, and round*/, this run's
        common.save(args.out / "last.pth", 0, settings, state)
    description = f"{len(source)} source images, {len(images)} target images, {weight_report}"
    log = common.Log(args.out, "bcl", description, start, iters, settings)
    source_batches = common.Batches(source, args.batch_size, start, iters, args.workers, device)
    common.set_mode(G, args.bn)
    autocast = common.autocast(device, args.amp)
    cross_entropy = common.compiled(segmentation_loss, args.compile)
    entropy = common.compiled(pixel_entropy, args.compile)
    crop_size = (args.crop, args.crop)  # (W, H) of both domains

    for it in range(start, iters + 1):
        # ---- when due: save, then evaluate; a run killed between them evaluates on resuming
        round_, step = divmod(it, round_iters)
        evaluation_due = common.due(it, args.eval_every, iters)
        # Also where a round starts: its labels are made from weights that are on disk.
        save_due = evaluation_due or common.due(it, args.save_every, iters) or step == 0
        if it > start and save_due:
            common.save(args.out / "last.pth", it, settings, state)
        if validation and evaluation_due and it not in log.evaluated:
            result = common.evaluate([G], validation, device, args.workers)
            if log.is_best(result):
                common.save(args.out / "best.pth", it, settings, {"model": G})
            log.evaluation(it, result)
        if it == iters:
            break

        # ---- a new round, or a resumed one: static labels, and batches with them
        round_folder = args.out / f"round{round_}"
        if step == 0:
            write_static_labels(args, G, images, round_folder, classes, device)
        if step == 0 or it == start:
            target_pairs = {}
            for name, path in images.items():
                target_pairs[name] = (path, round_folder / "labels" / f"{name}.png")
            # seed + 1: the target has an order of its own, so that pairs change.
            options = {"pseudo": True, "transform": transform, "seed": args.seed + 1}
            target = common.Labelled(target_pairs, "folder", classes, **options)
            end = (round_ + 1) * round_iters
            target_batches = common.Batches(target, args.batch_size, it, end, args.workers, device)
            log.restart_clock(it)  # making labels is not training time

        # ============================== the method ==============================
        # The rate halves each round. Poly over 1.2 rounds (R) ends a round at 0.2 of its rate. With
        # 0 at the end, the last iterations would learn almost nothing.
        lr = args.lr * 0.5**round_ * (1 - step / (1.2 * round_iters)) ** 0.9
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.zero_grad(set_to_none=True)

        # source: features f_s (B, D, h, w), logits (B, C, H, W), ground truth y_s
        x_s, y_s_full = next(source_batches)  # (B, 3, H, W), (B, H, W)
        with autocast:
            S = G(common.normalize(x_s))
        logits_s = common.upsample(S.main, crop_size)
        f_s = S.features.float()  # (B, D, h, w); under autocast bfloat16
        y_s = common.pick(y_s_full, *f_s.shape[2:])  # (B, h, w)

        # target: features f_t, logits, static labels y_F
        x_t, y_f_full = next(target_batches)
        with autocast:
            T = G(common.normalize(x_t))
        logits_t = common.upsample(T.main, crop_size)
        f_t = T.features.float()
        y_f = common.pick(y_f_full, *f_t.shape[2:])
        batch = range(len(x_s))

        # p_S -> μ_S, for every pair of a source and a target image. μ_S moves before ξ is taken,
        # so that a class seen here for the first time already has a μ_S.
        p_s = [class_prototypes(f_s[b], y_s[b], C) for b in batch]
        ema_source.update(mean_prototypes(p_s))

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
        ema_target.update(mean_prototypes(p_t))

        # L = λ_ce (CE_S + w CE_T) + λ_ent (H_S + w H_T) + λ_FCL L_FCL + λ_BCL L_BCL
        # with w = 1 in P
        loss_ce_s = cross_entropy(logits_s, y_s_full)
        loss_ce_t = cross_entropy(logits_t, y_t_full)
        loss_ent_s = entropy(logits_s).mean()
        loss_ent_t = entropy(logits_t).mean()
        # The losses compare with p_S itself. p_{S→T} only makes labels.
        fcl_of_pairs = [contrastive_loss(f_t[b], y_t[b], p_s[b], args.temperature) for b in batch]
        bcl_of_pairs = [contrastive_loss(f_s[b], y_s[b], p_t[b], args.temperature) for b in batch]
        loss_fcl = sum(fcl_of_pairs) / len(fcl_of_pairs)
        loss_bcl = sum(bcl_of_pairs) / len(bcl_of_pairs)
        loss = (
            args.lambda_ce * (loss_ce_s + args.target_weight * loss_ce_t)
            + args.lambda_ent * (loss_ent_s + args.target_weight * loss_ent_t)
            + args.lambda_fcl * loss_fcl
            + args.lambda_bcl * loss_bcl
        )
        loss.backward()
        common.average_over_ranks(G)  # gradients and running statistics; why not DDP: see there
        optimizer.step()
        # =========================== end of the method ===========================

        # Reading a loss makes the host wait for the GPU: at log steps only.
        if common.due(it + 1, args.log_every, iters):
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
            for name, y in (("y_f", y_f), ("y_d", y_d), ("y_t", y_t)):
                coverage[f"coverage_{name}"] = (y != IGNORE).double().mean().item()
            batches = [source_batches, target_batches]
            log.losses(it + 1, batches, device, losses, lr=lr, round=round_, **coverage)


# ====================================================================== main


def main():
    args = parse()
    check(args)
    device = common.set_up_device(args.device)
    # After set_up_device, since the number of processes is one of the settings.
    settings = common.run_settings(vars(args), FREE)
    common.lock(args.out)
    if args.demo:
        from demo.scenes import demo_scenes

        print("Demo: drawn scenes, small network, short schedule. Real data: --data-root DIR")
        args.data_root = demo_scenes(args.source)
    if any(args.out.glob("stage?")):
        raise UserError(f"--out {args.out} holds a run of intrada.py. Choose another --out.")

    # Check what the run needs before anything is trained.
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
    # The warm-up sees no target image: with different ones it resumes all the same.
    warmup_settings = {**settings, "images": common.fingerprint(pairs)}
    settings["images"] = common.fingerprint([*pairs, *images])
    common.earlier_checkpoint(args.out, settings)  # another run's --out is refused now

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
