"""BCL: bi-directional contrastive learning for domain adaptive semantic segmentation (ECCV 2022).

Lee, Eom, Lee, Park, Ham. Pixels of one domain are pulled towards the class prototypes of the other, in both directions.
Target labels are hybrid: static pseudo labels, refreshed every round, filled up with dynamic ones that come from source
prototypes calibrated by the class-wise domain bias. The released code has neither calibration nor EMA prototypes, and
its dynamic labels are dead code; this file follows the paper.

    python bcl.py --tau 0.8 --momentum 0.999                         demo: built-in scenes, small network, CPU
    python bcl.py --tau 0.8 --momentum 0.999 --data-root DIR         GTA5 -> Cityscapes, ResNet-101, the paper's constants
    python bcl.py --data-root DIR --init FILE --warmup-iters 0       start from given source-only weights
    torchrun --nproc_per_node=2 bcl.py --data-root DIR               on two GPUs, batch 4 + 4

Where the paper leaves a choice, or this differs from the released code:
D1  Encoder features are layer4's output (2048-d), not concatenated classifier logits.
D2  Each parameter is in the optimizer once; --lr-backbone-mult 3 keeps the speed of the released list, which repeats them.
D3  Prototypes of a class are averaged over the images of a batch that hold it before the EMA moves; the losses use each
    pair's own prototypes. Batch size is free.
D4  The poly decay runs within a round and starts again, at half the learning rate, in the next.
D5  Static thresholds come from confidence histograms of 65,536 bins, linear in -log(1 - p): they tell confidences apart as
    long as float32 does, which bins linear in p do not where networks are sure (above 0.99998). "The image's
    own top r" is over all its pixels, of any class.
D6  Labels made for the stride-8 map and for the full image agree: a static label is picked by nearest-exact, a dynamic one
    is enlarged by nearest-exact.
D7  A loss over no pixel is 0 with zero gradient (no class in common, a crop that is all ignore).
D8  An image is never scaled below the crop, so nothing is padded: at the paper's sizes the factor 0.8 becomes 730/850.
D9  Under torchrun the batch is that of all processes: one EMA, one mean cross-entropy. With --grad-accum each batch moves
    the EMA and has its own target cross-entropy; only the optimizer step is shared. --lr is not scaled.
"""

import argparse
import copy
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import StackDataset, Subset

import common
from common import IGNORE
from intrada import (
    POSITIVE, REAL, SHARE, SIDE, SWITCH, WHOLE, add_shared_flags, batch_text, finish_args, labelled_pixels, new_parser, number,
    precision_and_compiler, segmentation_loss, self_information, size, training_config, upsample,
)  # fmt: skip

# ---------------------------------------------------------------- arguments

# flag: (paper, demo)
DEFAULTS = {
    "init": ("imagenet", "none"),
    "layers": ((3, 4, 23, 3), (1, 1, 1, 1)),
    "width": (64, 16),
    "target_size": ((1024, 512), (256, 128)),
    "short_side": (850, 128),
    "crop": (730, 128),
    "scales": ((0.8, 1.0, 1.2), (1.0, 1.2)),
    "warmup_short_side": (720, 128),
    "warmup_crop": (600, 128),
    "batch_size": (2, 2),
    "warmup_iters": (40_000, 600),
    "warmup_lr": (2.5e-4, 1e-2),
    "rounds": (6, 2),
    "round_iters": (10_000, 150),
    "lr": (7.5e-5, 5e-3),
    "bn": ("batch", "batch"),
    "lambda_ent": (0.4, 0.02),
    "lambda_fcl": (0.1, 0.3),
    "lambda_bcl": (0.1, 0.3),
    "target_weight": (1.0, 0.3),
    "lr_backbone_mult": (3.0, 3.0),
    "lr_head_mult": (10.0, 0.3),
    "eval_every": (2_000, 200),
    "save_every": (1_000, 100),
    "log_every": (50, 20),
    "workers": (4, 0),
}


def scales(text: str) -> tuple:
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < v <= 10 for v in values):
        raise argparse.ArgumentTypeError(f"{text!r}: give factors above 0, say 0.8,1.0,1.2")
    return values


def parse_args() -> argparse.Namespace:
    parser, add = new_parser(__doc__, DEFAULTS)
    g = parser.add_argument_group("method")
    tau_help = "τ, least cosine similarity of a dynamic label: higher is sparser and purer; the paper tries 0.5 to 0.9"
    add(g, "--tau", tau_help, type=number(float, -1, 1), default=0.8)
    add(g, "--momentum", "λ of the EMA prototypes; the paper tries 0.99, 0.999, 0.9999", type=SHARE, default=0.999)
    add(g, "--temperature", "T_c of the contrastive softmax", type=number(float, 1e-3), default=0.1)
    add(g, "--lambda-ce", "weight of the two cross-entropies", type=REAL, default=1.0)
    add(g, "--lambda-ent", "weight of the two entropies", type=REAL)
    add(g, "--lambda-fcl", "weight of FCL (target pixels, source prototypes); the paper tries 0.1 to 0.7", type=REAL)
    add(g, "--lambda-bcl", "weight of BCL (source pixels, target prototypes); the paper tries 0.1 to 0.7", type=REAL)
    add(g, "--target-weight", "weight of the target's half of both; 0.3 in the released configuration", type=REAL)
    add(g, "--static-ratio", "r, share of most confident pixels that get a static label", type=SHARE, default=0.1)
    kinds = ("static", "dynamic", "hybrid")
    add(g, "--labels", "target labels; hybrid is static where there is one, else dynamic", choices=kinds, default="hybrid")
    add(g, "--calibrate", "move source prototypes by the domain bias ξ before they label", default=True, **SWITCH)

    g = parser.add_argument_group("schedule")
    add(g, "--warmup-iters", "source-only iterations before the first round", type=WHOLE)
    add(g, "--warmup-lr", "SGD learning rate of the warm-up", type=REAL)
    add(g, "--rounds", "rounds; each starts with new static labels and half the learning rate of the one before", type=POSITIVE)
    add(g, "--round-iters", "iterations per round", type=POSITIVE)
    add(g, "--lr", "SGD learning rate of the first round; decays by poly 0.9 within a round", type=REAL)
    add(g, "--batch-size", "pairs of a source and a target image per iteration", type=POSITIVE)

    g = parser.add_argument_group("images")
    add(g, "--short-side", "short side of an image before the crop, times one of --scales", type=number(int, 1, 16384))
    add(g, "--scales", "factors, one is drawn per image", type=scales)
    add(g, "--crop", "side of the random square crop", type=SIDE)
    add(g, "--warmup-short-side", "--short-side of the warm-up", type=number(int, 1, 16384))
    add(g, "--warmup-crop", "--crop of the warm-up", type=SIDE)
    add(g, "--flip", "mirror an image with probability 1/2", default=True, **SWITCH)
    add(g, "--target-size", "whole target images are resized to WxH for static labels and evaluation", type=size)

    add_shared_flags(parser, add, "runs/bcl")
    return finish_args(parser, DEFAULTS)


# ---------------------------------------------------------------- the method's maths, in the paper's order
# f: encoder features of one image, (D, h, w) at stride 8; y: its labels, (h, w) trainIds with 255 = none; C classes.


def class_prototypes(features: Tensor, labels: Tensor, num_classes: int) -> tuple:
    """Masked average pooling: p(c) = Σ_p f(p) y(p,c) / Σ_p y(p,c).

    features (D,h,w), labels (h,w) -> prototypes (C,D), zero for a class without a pixel, and present (C,) bool.
    """
    classes = torch.arange(num_classes, device=labels.device)
    one_hot = (labels.flatten() == classes[:, None]).to(features.dtype)  # (C, hw); 255 matches no class
    count = one_hot.sum(1, keepdim=True)  # (C, 1)
    return one_hot @ features.flatten(1).T / count.clamp(min=1), count[:, 0] > 0  # (C, hw) @ (hw, D) -> (C, D)


def similarities(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine s(f(p), p(c)) of every position with every prototype: (D,h,w) and (C,D) -> (C, h*w) in [-1, 1]."""
    unit = F.normalize(features.flatten(1), dim=0, eps=1e-4)  # a feature of all zeros gets similarity 0
    return F.normalize(prototypes, dim=1, eps=1e-4) @ unit


def contrastive_loss(features: Tensor, labels: Tensor, prototypes: Tensor, present: Tensor, temperature: float) -> Tensor:
    """-(1/|Ω|) Σ_{p∈Ω} Σ_c y(p,c) log [ exp(s(f(p),p(c))/T) / Σ_{c' present} exp(s(f(p),p(c'))/T) ], a scalar >= 0.

    features (D,h,w) and labels (h,w) of one domain, prototypes (C,D) and present (C,) of the other: target pixels and
    source prototypes make FCL, source pixels and target prototypes BCL. Ω: positions whose label is a present class;
    where there is none the loss is 0 with zero gradient.
    """
    logits = similarities(features, prototypes) / temperature  # (C, hw)
    log_p = logits.masked_fill(~present[:, None], -1e30).log_softmax(0)  # -1e30, not -inf: no NaN if none is present
    labels = labels.flatten().long()
    label = labels.clamp(max=len(present) - 1)  # any valid index where the label is 255
    chosen = (labels < len(present)) & present[label]  # (hw,): Ω
    picked = log_p.gather(0, label[None])[0]  # (hw,)
    return -(picked * chosen).sum() / chosen.sum().clamp(min=1)


class PrototypeEMA(nn.Module):
    """μ(c) <- λ μ(c) + (1-λ) p(c) for the classes present; the first sight of a class initialises it.

    Buffers: mean (C,D) and seen (C,) bool. They move with .to() and live in the checkpoint.
    """

    def __init__(self, num_classes: int, dim: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(num_classes, dim))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, prototypes: Tensor, present: Tensor):
        """prototypes (C,D), present (C,) bool."""
        moved = torch.where(self.seen[:, None], torch.lerp(prototypes, self.mean, self.momentum), prototypes)
        self.mean.copy_(torch.where(present[:, None], moved, self.mean))
        self.seen |= present


def calibrate(source_prototypes: Tensor, present: Tensor, ema_source: PrototypeEMA, ema_target: PrototypeEMA) -> Tensor:
    """p_{S→T}(c) = p_S(c) + ξ(c), with the class-wise domain bias ξ(c) = μ_T(c) - μ_S(c), 0 while either is unseen.

    source_prototypes (C,D), present (C,) -> (C,D); a class that is not present stays zero.
    """
    known = (ema_source.seen & ema_target.seen & present)[:, None]
    return torch.where(known, source_prototypes + ema_target.mean - ema_source.mean, source_prototypes)


@torch.no_grad()
def dynamic_labels(features: Tensor, prototypes: Tensor, present: Tensor, tau: float) -> Tensor:
    """y_D(p) = argmax_c s(f_T(p), p_{S→T}(c)) over the present classes if that similarity is > τ, else 255.

    features (D,h,w), prototypes (C,D), present (C,) -> (h,w) int64.
    """
    similarity, label = similarities(features, prototypes).masked_fill(~present[:, None], -2).max(0)  # (hw,)
    return torch.where(similarity > tau, label, IGNORE).view(features.shape[1:])


def hybrid_labels(static: Tensor, dynamic: Tensor) -> Tensor:
    """y_T = y_F where the static label y_F exists, else the dynamic label y_D: two (h,w) integer maps to one (int64)."""
    return torch.where(static != IGNORE, static.long(), dynamic.long())


BINS, TOP = 65_536, 17.0  # bins of the confidence histograms, over -log(1 - p) from 0 to TOP, where float32 ends


def confidence_bins(confidence: Tensor) -> Tensor:
    """Confidences in [0, 1] to bins 0..BINS-1 (int64), which are kept as 16 bits between counting and cutting."""
    return (-torch.log1p(-confidence.double()) * (BINS / TOP)).clamp(max=BINS - 1).long()


def bin_confidence(bins: Tensor) -> Tensor:
    """The lower edge of bins as a confidence (float64); 1 from bin BINS on."""
    return torch.where(bins < BINS, 1 - torch.exp(-bins.double() * TOP / BINS), 1.0)


def class_thresholds(histogram: Tensor, ratio: float) -> Tensor:
    """Bin of each class from which on the top `ratio` of its pixels lie.

    histogram (C,bins): pixels predicted as class c by confidence bin -> (C,) int64, the highest bin b such that the bins
    from b up hold at least ratio of the class's pixels. A class without a pixel gets the number of bins, which no pixel
    reaches, as does every class at ratio 0.
    """
    from_top = histogram.double().flip(1).cumsum(1).flip(1)  # (C, bins): pixels in bin b and above
    enough = (from_top >= ratio * from_top[:, :1]).sum(1)  # from_top falls with b, so this counts b = 0 .. the one sought
    return torch.where((from_top[:, 0] > 0) & (ratio > 0), enough - 1, histogram.shape[1])


def entropy_loss(logits: Tensor) -> Tensor:
    """Mean over pixels of -Σ_c P log P / log C: logits (B,C,H,W) -> a scalar in [0, 1]."""
    return self_information(logits).sum(1).mean()


def downsample(labels: Tensor, like: Tensor) -> Tensor:
    """Labels (B,H,W) picked at the positions of a map (..,h,w), nearest-exact -> (B,h,w)."""
    return F.interpolate(labels[:, None].float(), like.shape[-2:], mode="nearest-exact")[:, 0].long()


def batch_mean(prototypes: list) -> tuple:
    """What the EMA is fed: [(prototypes (C,D), present (C,))] of the images to their mean over the images with the class,
    on all ranks."""
    count = common.over_ranks(sum(present.float() for _, present in prototypes))  # (C,)
    total = common.over_ranks(sum(p.detach() * present[:, None] for p, present in prototypes))  # (C, D)
    return total / count.clamp(min=1)[:, None], count > 0


# ---------------------------------------------------------------- static labels


def choose_static(prediction: Tensor, bins: Tensor, threshold_bins: Tensor, ratio: float) -> Tensor:
    """y_F: the prediction where its confidence is in the top ratio of its class over the whole set, or of this image.

    prediction (H,W) trainIds, bins (H,W) confidence in 0..BINS-1, threshold_bins (C,) -> (H,W) int64 with 255.
    """
    top = max(1, math.ceil(ratio * bins.numel()))
    own = bins.flatten().float().topk(top).values[-1] if ratio > 0 else BINS  # least of the image's own top r
    keep = (bins >= threshold_bins[prediction.long()]) | (bins >= own)
    return torch.where(keep, prediction.long(), IGNORE)


@torch.no_grad()
def predict(G, image: Tensor, out_size: tuple) -> tuple:
    """Eval-mode prediction of one image (3,H,W) uint8: (label (H,W) uint8, confidence bins (H,W) int64) at out_size (W,H)."""
    logits = G(common.normalize(image[None])).main
    best = [block[0].softmax(0).max(0) for _, block in common.upsample_blocks(logits, out_size)]
    confidence, label = torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
    return label.to(torch.uint8), confidence_bins(confidence)


@torch.no_grad()
def make_static_labels(args, G, images: dict, folder: Path) -> tuple:
    """Write <folder>/labels/<name>.png and <folder>/colour/<name>.png for every target image.

    Returns the thresholds (C,) in bins and the share of labelled pixels in percent.

    One pass of the network leaves prediction and confidence on disk, as a draft for each image; the files fill the
    histograms, and are cut at the thresholds. Memory does not grow with the number of images. Every file says inside which
    network and settings it is of; what is there already is not made again. Ranks share the images.
    """
    C, palette, draft, device = args.num_classes, common.palette_for(args.num_classes), folder / "draft", args.device
    digest = hashlib.sha256(str((args.target_size, args.static_ratio, len(images))).encode())
    for tensor in G.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    origin = {"origin": digest.hexdigest()}

    def finished(path):
        return common.png_text(path).get("origin") == origin["origin"]

    labels = {name: folder / "labels" / f"{name}.png" for name in images}
    if not all(map(finished, labels.values())) or read_thresholds(folder).get("origin") != origin["origin"]:
        missing, G = {name: path for name, path in images.items() if not finished(draft / f"{name}.png")}, common.inference_copy(G)
        common.wait_for_ranks()  # until all have looked
        for item in common.one_by_one(common.Images(missing, args.target_size), args.workers, device):
            label, bins = predict(G, item["image"].to(device, non_blocking=True), args.target_size)
            both = torch.stack([label.long(), bins // 256, bins % 256], 2).byte()  # (H, W, 3)
            common.write_png(draft / f"{item['name']}.png", both.cpu().numpy(), text=origin, compress_level=1)
        common.wait_for_ranks()
        histogram = torch.zeros(C, BINS, dtype=torch.int64)
        mine = list(images)[common.rank() :: common.world()]
        for name in mine:
            label, bins = read_draft(draft / f"{name}.png")
            histogram += torch.bincount((label * BINS + bins).flatten(), minlength=C * BINS).view(C, BINS)
        thresholds = class_thresholds(common.over_ranks(histogram), args.static_ratio)
        for name in mine:
            if not finished(labels[name]):
                static = choose_static(*read_draft(draft / f"{name}.png"), thresholds, args.static_ratio).byte().numpy()
                common.write_png(folder / "colour" / f"{name}.png", static, palette)
                common.write_png(labels[name], static, text={**origin, "labelled": str((static != IGNORE).mean())})
        common.wait_for_ranks()
        if common.rank() == 0:
            content = {**origin, "confidence": bin_confidence(thresholds).tolist(), "bins": thresholds.tolist()}
            common.write_text(folder / "thresholds.json", json.dumps(content))
        common.wait_for_ranks()
    if common.rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
    labelled = sum(float(common.png_text(path)["labelled"]) for path in labels.values())
    return torch.tensor(read_thresholds(folder)["bins"]), 100 * labelled / len(images)


def read_thresholds(folder: Path) -> dict:
    """{"origin", "confidence", "bins"} of a round's static labels; {} while they are not finished."""
    path = folder / "thresholds.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read_draft(path) -> tuple:
    """Prediction and confidence bins, (H,W) int64 each, of `make_static_labels`' first pass."""
    label, high, low = torch.from_numpy(np.array(common.open_image(path)).astype(np.int64)).unbind(2)
    return label, high * 256 + low


def label_networks(args, G) -> tuple:
    """Copies of G that label validation images, with G's weights: one in training mode with running statistics of its own,
    for the features, and one for static predictions. Neither is compiled."""
    own = copy.deepcopy(G, {id(p): p for p in G.parameters()})
    common.set_mode(own, args.bn)
    return own, common.inference_copy(G)


@torch.no_grad()
def pair_labels(args, networks: tuple, ema_source, ema_target, thresholds, item: dict, pair: dict) -> dict:
    """{"static", "dynamic", "hybrid": (H,W) int64 labels} of a validation item, at its label's size, beside a source item."""
    device, (G, lean) = args.device, networks
    label, bins = predict(lean, item["image"].to(device), args.target_size)
    static = choose_static(label, bins, thresholds.to(device), args.static_ratio)
    S = G(common.normalize(pair["image"][None].to(device))).features
    T = G(common.normalize(item["image"][None].to(device))).features
    prototypes, present = class_prototypes(S[0], downsample(pair["label"][None].to(device), S)[0], args.num_classes)
    calibrated = calibrate(prototypes, present, ema_source, ema_target) if args.calibrate else prototypes
    dynamic = dynamic_labels(T[0], calibrated, present, args.tau)
    static, dynamic = (downsample(y[None], item["label"])[0] for y in (static, dynamic))
    return {"static": static, "dynamic": dynamic, "hybrid": hybrid_labels(static, dynamic)}


def draw_labels(args, path: Path, G, ema_source, ema_target, thresholds, source, validation):
    """The paper's figure: the labels of one target image beside two source images. Dynamic ones change with the source."""
    item, rows, networks = validation[0], [], label_networks(args, G)
    for index in (0, len(source) // 2):
        pair = source[0, index]
        labels = pair_labels(args, networks, ema_source, ema_target, thresholds, item, pair)
        source_image, target_image = (x["image"].permute(1, 2, 0).numpy() for x in (pair, item))
        source_label, *others = (y.byte().cpu().numpy() for y in (pair["label"], *labels.values(), item["label"]))
        rows.append([source_image, source_label, target_image, *others])
    titles = ["source image", "its label", "target image", *labels, "ground truth"]
    common.write_grid(path, titles, rows, args.num_classes)


@torch.no_grad()
def label_statistics(args, G, ema_source, ema_target, thresholds, source, validation) -> dict:
    """Coverage and accuracy in percent of static, dynamic and hybrid labels on the *val* images, each paired with a
    source image: {kind: {"coverage", "accuracy", "coverage_per_class", "accuracy_per_class"}}.

    Coverage is the share of labelled pixels (per class: of the class's true pixels), accuracy the share of right ones
    among the labelled (per class: among those given that label); 255 in the ground truth is left out.
    """
    C, device, networks = args.num_classes, args.device, label_networks(args, G)
    partners = Subset(source, [(i, i * 7919 % len(source)) for i in range(len(validation))])  # fixed and well mixed
    counts = {kind: torch.zeros(C, C + 1, dtype=torch.int64, device=device) for kind in ("static", "dynamic", "hybrid")}
    for item, pair in common.one_by_one(StackDataset(validation, partners), args.workers, device):
        truth = item["label"].to(device)
        for kind, y in pair_labels(args, networks, ema_source, ema_target, thresholds, item, pair).items():
            pairs = truth.long() * (C + 1) + y.clamp(max=C)  # column C: no label
            counts[kind] += torch.bincount(pairs[truth < C], minlength=C * (C + 1)).view(C, C + 1)

    def percent(part, whole):
        return [None if w == 0 else 100 * p / w for p, w in zip(part.flatten().tolist(), whole.flatten().tolist())]

    result = {}
    for kind, table in counts.items():
        table = common.over_ranks(table)
        labelled, right = table[:, :C], table.diagonal()
        result[kind] = {
            "coverage": percent(labelled.sum(), table.sum())[0], "accuracy": percent(right.sum(), labelled.sum())[0],
            "coverage_per_class": percent(labelled.sum(1), table.sum(1)), "accuracy_per_class": percent(right, labelled.sum(0)),
        }  # fmt: skip
    return result


# ---------------------------------------------------------------- training


def augment(short_side: int, scales: tuple, crop: int, flip: bool):
    """transform(image, label or None, rng): scale, crop at random, mirror. Draws depend on rng alone."""

    def transform(image, label, rng):
        short = max(crop, round(short_side * scales[rng.integers(len(scales))]))
        full = tuple(max(crop, round(side * short / min(image.size))) for side in image.size)
        x, y = (int(rng.integers(side - crop + 1)) for side in full)
        mirror = rng.random() < 0.5
        parts = []
        for part, kind in ((image, "image"), (label, "label")):
            if part is not None:
                part = common.resize(part, full, kind).crop((x, y, x + crop, y + crop))
                parts.append(part.transpose(Image.FLIP_LEFT_RIGHT) if flip and mirror else part)
        return parts if label is not None else (parts[0], None)

    return transform


def train(args, name: str, source_pairs: dict, target_images, validation, initial, rounds: int, iters: int, base_lr: float):
    """`rounds` rounds of `iters` iterations. target_images None: source-only cross-entropy (the warm-up).

    Returns the scores of the last evaluation.
    """
    device, n, C, warmup = args.device, args.grad_accum, args.num_classes, target_images is None
    folder = args.out / "warmup" if warmup else args.out
    torch.manual_seed(args.seed)
    G = common.DeepLabV2(C, args.layers, args.width, aux=False)
    report = common.load_weights(G, initial) if initial is not None else "random initial weights"
    G.to(device).checkpoint_activations = args.checkpoint_activations
    groups = G.parameter_groups(args.lr_backbone_mult, args.lr_head_mult)
    optimizer = torch.optim.SGD(groups, lr=base_lr, momentum=0.9, weight_decay=5e-4)
    ema_source, ema_target = (PrototypeEMA(C, 32 * args.width, args.momentum).to(device) for _ in range(2))
    total, names = rounds * iters, [*source_pairs, *(target_images or ())]
    config = training_config(args, name, names, rounds, iters, base_lr)
    parts = {"optimizer": optimizer, "ema_source": ema_source, "ema_target": ema_target}
    about = f"{len(source_pairs)} source images, {'no' if warmup else len(target_images)} target images, {report}, {batch_text(args)}"
    short_side, crop = (args.warmup_short_side, args.warmup_crop) if warmup else (args.short_side, args.crop)
    transform = augment(short_side, args.scales, crop, args.flip)
    source = common.Labelled(source_pairs, args.source, C, transform=transform, seed=args.seed)

    def draw(path, done):
        thresholds = torch.tensor(read_thresholds(folder / f"round{(done - 1) // iters}")["bins"])
        draw_labels(args, path, G, ema_source, ema_target, thresholds, source, validation)

    run = common.Run(
        args, name, folder, config, total, G, parts, validation, about, self_information, draw=None if warmup else draw
    )
    if run.finished:
        return run.result
    autocast, (ce, mean_entropy) = precision_and_compiler(args, G, [segmentation_loss, entropy_loss])

    for it in range(run.start, total):
        round_, step = divmod(it, iters)
        if it == run.start or step == 0:  # a new round, or the one to be gone on with
            rest = (args.batch_size, it * n, (round_ + 1) * iters * n, args.workers, device)
            source_batches = common.training_batches(source, args.seed, *rest)
            if not warmup:
                labels_folder = folder / f"round{round_}"
                if step == 0:
                    with run.signal.at_once():  # its files stay, and are found again
                        begin_round(args, run, it, round_, G, ema_source, ema_target, source, target_images, labels_folder)
                static_pairs = {key: (image, labels_folder / "labels" / f"{key}.png") for key, image in target_images.items()}
                target = common.Labelled(static_pairs, "folder", C, same_aspect=False, transform=transform, seed=args.seed + 1)
                target_batches = common.training_batches(target, args.seed + 1, *rest)
            common.set_mode(G, args.bn)
            run.restart_clock(it)
        lr = base_lr * 0.5**round_ * (1 - step / iters) ** 0.9
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        optimizer.zero_grad(set_to_none=True)
        with run.waiting_for_data():
            batches = [(next(source_batches), None if warmup else next(target_batches)) for _ in range(n)]
        source_pixels = labelled_pixels([source_batch["label"] for source_batch, _ in batches]).to(device, non_blocking=True)
        terms, names = [], []
        for source_batch, target_batch in batches:
            # -------- source: features f_S (B,D,h,w), logits (B,C,H,W), ground truth y_S
            y_source_full = source_batch["label"].to(device, non_blocking=True).long()  # (B, H, W)
            with autocast:
                S = G(common.normalize(source_batch["image"].to(device, non_blocking=True)))
            source_logits = upsample(S.main, *y_source_full.shape[1:])
            loss_ce_source = ce(source_logits, y_source_full, source_pixels)
            loss = loss_ce_source
            terms.append({"loss_ce_source": loss_ce_source})
            names += source_batch["name"]
            if not warmup:
                static_full = target_batch["label"].to(device, non_blocking=True).long()  # (B, H, W), y_F
                with autocast:
                    T = G(common.normalize(target_batch["image"].to(device, non_blocking=True)))
                target_logits = upsample(T.main, *static_full.shape[1:])
                y_source, static = downsample(y_source_full, S.main), downsample(static_full, T.main)  # (B, h, w)
                f_source, f_target = S.features.float(), T.features.float()  # (B, D, h, w)
                pairs = range(len(static))

                # -------- p_S -> μ_S -> ξ, p_{S→T} -> y_D -> y_T -> p_T -> μ_T, per pair of a source and a target image
                source_prototypes = [class_prototypes(f_source[b], y_source[b], C) for b in pairs]
                ema_source.update(*batch_mean(source_prototypes))
                y_target, y_target_full = static, static_full
                if args.labels != "static":
                    dynamic = []
                    for b in pairs:
                        prototypes, present = source_prototypes[b]
                        if args.calibrate:
                            prototypes = calibrate(prototypes, present, ema_source, ema_target)
                        dynamic.append(dynamic_labels(f_target[b], prototypes, present, args.tau))
                    y_target = torch.stack(dynamic)  # (B, h, w), y_D
                    y_target_full = downsample(y_target, static_full)  # enlarged to (B, H, W)
                    if args.labels == "hybrid":
                        y_target, y_target_full = hybrid_labels(static, y_target), hybrid_labels(static_full, y_target_full)
                target_prototypes = [class_prototypes(f_target[b], y_target[b], C) for b in pairs]
                ema_target.update(*batch_mean(target_prototypes))

                # -------- L = λ_ce (CE_S + CE_T) + λ_ent (H_S + H_T) + λ_FCL L_FCL + λ_BCL L_BCL
                loss_ce_target = ce(target_logits, y_target_full, labelled_pixels([y_target_full]))
                loss_ent_source, loss_ent_target = mean_entropy(source_logits), mean_entropy(target_logits)
                forward = [contrastive_loss(f_target[b], y_target[b], *source_prototypes[b], args.temperature) for b in pairs]
                backward = [contrastive_loss(f_source[b], y_source[b], *target_prototypes[b], args.temperature) for b in pairs]
                loss_fcl, loss_bcl = sum(forward) / len(pairs), sum(backward) / len(pairs)
                loss = (
                    args.lambda_ce * (loss_ce_source + args.target_weight * loss_ce_target)
                    + args.lambda_ent * (loss_ent_source + args.target_weight * loss_ent_target)
                    + args.lambda_fcl * loss_fcl
                    + args.lambda_bcl * loss_bcl
                )
                terms[-1].update(loss_ce_target=loss_ce_target, loss_ent_source=loss_ent_source, loss_ent_target=loss_ent_target)
                terms[-1].update(loss_fcl=loss_fcl, loss_bcl=loss_bcl)
                names += target_batch["name"]
            terms[-1]["loss"] = loss
            (loss / n).backward()
        common.share_gradients(G)
        optimizer.step()
        # -------- end of the method; the rest reports, saves and evaluates
        run.after_iteration(it + 1, terms, names, lr, keep=step + 1 == iters, round=round_)
    return run.result


def begin_round(args, run, it: int, round_: int, G, ema_source, ema_target, source, target_images: dict, folder: Path):
    """New static labels, and how good all three kinds are on the validation images, into the log."""
    thresholds, coverage = make_static_labels(args, G, target_images, folder)
    run.log.show(f"round {round_}: static labels on {coverage:.1f} % of the target's pixels", True)
    statistics = {}
    if run.validation:
        statistics = label_statistics(args, G, ema_source, ema_target, thresholds, source, run.validation)
        texts = (f"{kind} {s['coverage']:.0f} % at {s['accuracy'] or 0:.0f} % right" for kind, s in statistics.items())
        run.log.show(f"round {round_}: labels on val: {'  '.join(texts)}", True)
    record = {"round": round_, "train_static_coverage": coverage, "thresholds": bin_confidence(thresholds).tolist()}
    run.log.write(iter=it + 1, event="labels", **record, **statistics)


# ---------------------------------------------------------------- main


def main():
    args = parse_args()
    if args.demo:
        print("Demo: built-in street scenes, a small network and a short schedule. For real data: --data-root DIR (see README).")
        args.data_root = common.demo_scenes(args.source)
    target_root = common.dataset_root(args.target, args.data_root, args.target_root)
    target_images = common.list_images(args.target, target_root, "train")
    validation = common.validation_set(args.target, target_root, args.num_classes, args.target_size)
    source_root = common.dataset_root(args.source, args.data_root, args.source_root)
    source_pairs, columns = common.list_pairs(args.source, source_root), {}
    source = common.Labelled(source_pairs, args.source, args.num_classes)
    if args.check:
        datasets = {"source": source, "target": common.Images(target_images), "validation": validation}
        G = common.DeepLabV2(args.num_classes, args.layers, args.width, aux=False)
        checkpoints = (1 + bool(args.warmup_iters)) * common.training_bytes([(G, 2)], G, args.keep)
        # Of a target image a round's label and its colour, 2 bits a pixel, amply; for a while, confidences of 16 bits.
        pictures = len(target_images) * math.prod(args.target_size) * (args.rounds / 2 + 2.25)
        return common.check(args, datasets, G, checkpoints + pictures)
    for labelled in (source, validation):  # readable at all, before weights are fetched
        if labelled:
            labelled.look()
    if args.overwrite:
        common.start_over([args.out, *([args.out / "warmup"] if args.warmup_iters else [])])
    weights = common.initial_weights(args.init)
    if args.warmup_iters:
        schedule = (1, args.warmup_iters, args.warmup_lr)
        columns["warm-up"] = train(args, "warmup", source_pairs, None, validation, weights, *schedule)
        weights = args.out / "warmup" / "last.pth"
    schedule = (args.rounds, args.round_iters, args.lr)
    columns["BCL"] = train(args, "bcl", source_pairs, target_images, validation, weights, *schedule)
    common.print_results(columns)


if __name__ == "__main__":
    common.launch(main)
