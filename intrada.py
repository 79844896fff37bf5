r"""IntraDA: unsupervised intra-domain adaptation for semantic segmentation (Pan et al., CVPR 2020).

Stage 1 is AdvEnt (Vu et al., CVPR 2019): the network G learns from labelled source images. It also
learns to make its entropy maps of target images look like source maps to a discriminator D. Stage 2
ranks the target images by entropy: low entropy is easy, high entropy is hard. Stage 3 is stage 1
once more: easy images with pseudo labels are the source, and hard images are the target.

    python intrada.py                                    demo: drawn scenes, a small network
    python intrada.py --data-root DIR --out runs/gta5    GTA5 -> Cityscapes, ResNet-101, one GPU
    torchrun --nproc_per_node=4 intrada.py --data-root DIR --out runs/four     batch 4 + 4
    python intrada.py --stage 1 --alignment none --out runs/source             source only
    python intrada.py --stage 1 --alignment batchnorm --out runs/control       the control

In the control, target images move BatchNorm's statistics only. A run resumes by the same command.

Where this differs from the paper (P) or from the released code (R):
D1  R's optimizer lists a parameter n times and steps it n times: n = 1 for conv1 and the heads, 4
    for shortcut convolutions, 3 for the others. Step k of the n adds k times the weight decay. Here
    a parameter is listed once. --recipe released multiplies its learning rate by n and its weight
    decay of 5e-4 by (n + 1)/2. --recipe paper multiplies by 1, as in P's text.
D2  Cross-entropy is the mean over labelled pixels. For a batch without any it is 0, not NaN.
D3  log P comes from log-softmax, which is exact and finite for any logits. R: log(P + 1e-30).
D4  The split has floor(ratio * N) easy images, computed exactly. Equal scores are sorted by name.
D5  Stage 2 uses stage 1's last checkpoint. R uses the best one on validation labels, an oracle. For
    R's way: --stage 2 --ckpt OUT/stage1/best.pth --out NEW, then --stage 3 --out NEW.
D6  --init imagenet loads torchvision's ResNet, whose strides are on the 3x3 convolutions. Here they
    are on the 1x1, as in R's Caffe-style file DeepLab_resnet_pretrained_*, which --init reads, too.
D7  Every epoch is a new permutation of the images. R shuffles a list that repeats them.
D8  Under torchrun, gradients and BatchNorm's running statistics are averaged over the processes.
    Each process has its own batch statistics and its own mean over labelled pixels, so that two
    processes of one image and one process of two give different results. --lr is not scaled.
D9  On GPUs that have bfloat16, training runs the convolutions in it (--no-amp: in float32). Their
    outputs become float32 before entropies and losses. Ranking and evaluation are float32. TF32 is
    off.
D10 The demo (DEMO) is short, with a batch of 2 + 2. It starts from demo/initial.pth, a network that
    was trained on drawn source scenes. Its adversarial weights are 20 times the defaults, its rates
    12 times (G) and 3 times (D). The factor on the heads' rate is 0.3.

Not supported: other networks, several target domains at once, Windows.
"""

import argparse
import csv
import json
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import IGNORE, UserError

# ====================================================================== arguments

# Defaults of the demo: a run without a data root. Its 400 iterations of a small network need larger
# rates and adversarial weights than the 120,000 of a ResNet-101. D10 says what changes numbers.
DEMO = dict(
    init="demo", layers=(1, 1, 1, 1), width=16,
    source_size=(256, 128), target_size=(256, 128), batch_size=2, max_iters=400, lr=3e-3,
    lr_head_mult=0.3, lr_d=3e-4, lambda_adv_main=2e-2, lambda_adv_aux=4e-3,
    eval_every=200, save_every=100, log_every=20, workers=0,
)  # fmt: skip
# (W, H). Whole images are resized, without a crop. Any other source gets the target's size.
SOURCE_SIZES = {"gta5": (1280, 720), "synthia": (1280, 760), "synscapes": (1440, 720)}
# Flags that may change when a run resumes. Lists and folders are checked by image names, the
# schedule by --max-iters. Stage 3 adds ratio and normalize_entropy to its settings.
FREE = (
    "data_root", "source_root", "target_root", "source_list", "target_list", "out", "ckpt",
    "ranking", "demo", "stage", "stop_iters", "ratio", "normalize_entropy", "eval_every",
    "save_every", "log_every", "device", "amp", "compile", "checkpoint_activations", "workers",
)  # fmt: skip


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


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
    g.add_argument("--out", type=Path, default="runs/intrada", help="folder of this run's files")
    g.add_argument("--ckpt", type=Path, help="stage 2: rank with this file, not stage1/last.pth")
    g.add_argument("--ranking", type=Path, help="stage 3: stage2/ folder of another run")

    g = parser.add_argument_group("data")
    g.add_argument("--source", choices=common.SOURCES, default="gta5", help="labelled domain")
    g.add_argument("--target", choices=common.TARGETS, default="cityscapes", help="unlabelled set")
    g.add_argument("--num-classes", type=int, default=19, help="C; 19, or any for folders")
    text = "WxH: GTA5 1280x720, SYNTHIA 1280x760 (released), Synscapes 1440x720; or target's"
    g.add_argument("--source-size", type=common.WxH, help=text)
    text = "WxH of target, ranking, stage 3, validation (released)"
    g.add_argument("--target-size", type=common.WxH, default="1024x512", help=text)

    g = parser.add_argument_group("schedule")
    g.add_argument("--batch-size", type=int, default=1, help="images per domain (released)")
    g.add_argument("--max-iters", type=int, default=250_000, help="poly ends here (released)")
    text = "end here: 120000, SYNTHIA 90000 (released), <= --max-iters"
    g.add_argument("--stop-iters", type=int, help=text)
    g.add_argument("--lr", type=float, default=2.5e-4, help="SGD learning rate of G (paper)")
    g.add_argument("--lr-d", type=float, default=1e-4, help="Adam learning rate of D (paper)")
    g.add_argument("--seed", type=int, default=0, help="seeds weights and image order")

    g = parser.add_argument_group("method")
    kinds = ("adversarial", "batchnorm", "none")
    text = "target is aligned, moves BatchNorm alone (the control), or is not used"
    g.add_argument("--alignment", choices=kinds, default="adversarial", help=text)
    g.add_argument("--lambda-seg-main", type=float, default=1.0, help="weight of main CE (paper)")
    g.add_argument("--lambda-seg-aux", type=float, default=0.1, help="weight of aux CE (released)")
    text = "λ_adv, main head (paper); larger: aligns more; too large: forgets the source"
    g.add_argument("--lambda-adv-main", type=float, default=0.001, help=text)
    g.add_argument("--lambda-adv-aux", type=float, default=0.0002, help="λ_adv, aux (released)")

    g = parser.add_argument_group("ranking")
    text = "λ, share of easy images (paper); 1: all easy, self-training alone"
    g.add_argument("--ratio", type=float, default=0.67, help=text)
    text = "rank by R(X) times rarity_factor: rare classes first (paper's best)"
    g.add_argument("--normalize-entropy", action=on_off, default=False, help=text)

    g = parser.add_argument_group("network")
    text = "imagenet, demo, none (random) or a weight file"
    g.add_argument("--init", default="imagenet", help=text)
    text = "blocks of each stage"
    g.add_argument("--layers", type=common.block_counts, default="3,4,23,3", help=text)
    g.add_argument("--width", type=int, default=64, help="channels of stem and D")
    text = "training uses the batch's statistics (released), or the running ones, kept fixed"
    g.add_argument("--bn", choices=("batch", "running"), default="batch", help=text)
    text = "rates and weight decay: D1 in this file"
    g.add_argument("--recipe", choices=("released", "paper"), default="released", help=text)
    text = "factor on heads' lr (released)"
    g.add_argument("--lr-head-mult", type=float, default=10.0, help=text)

    g = parser.add_argument_group("run")
    g.add_argument("--stage", choices=("1", "2", "3", "all"), default="all", help="what to run")
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
    # Defaults that depend on other flags, which argparse cannot express.
    if args.source_size is None:
        args.source_size = SOURCE_SIZES.get(args.source, args.target_size)
    if args.stop_iters is None:
        released = 90_000 if args.source == "synthia" else 120_000
        args.stop_iters = min(args.max_iters, released)
    return args


def check(args):
    """Refuse values that would silently do harm, and flags that contradict each other."""
    lowest = {"batch_size": 1, "max_iters": 1, "stop_iters": 1, "save_every": 1, "log_every": 1}
    lowest.update(eval_every=0, seed=0, workers=0, width=1, lr=0, lr_d=0, lr_head_mult=0)
    lowest.update(lambda_seg_main=0, lambda_seg_aux=0, lambda_adv_main=0, lambda_adv_aux=0)
    sides = (*args.source_size, *args.target_size)
    both_folders = args.source == args.target == "folder"
    is_resnet101 = args.layers == (3, 4, 23, 3) and args.width == 64
    same_images = args.source == args.target == "cityscapes"
    if args.source_root and args.target_root:
        same_images = args.source_root == args.target_root
    checks = []
    for name, low in lowest.items():
        value = getattr(args, name)
        sentence = f"--{name.replace('_', '-')} is {value}. It must be {low} or more."
        checks.append((not value >= low, sentence))  # not `<`, which is False for NaN
    checks += [
        (min(sides) < 32, "--source-size and --target-size must have sides of 32 pixels or more."),
        (not 0 <= args.ratio <= 1, "--ratio is a share. Give a number from 0 to 1."),
        (not 2 <= args.num_classes <= 255, "--num-classes must be from 2 to 255."),
        (args.stop_iters > args.max_iters, "--stop-iters is above --max-iters. Lower it."),
        (args.ckpt and args.stage != "2", "Only stage 2 uses --ckpt. Add --stage 2."),
        (args.ranking and args.stage != "3", "Only stage 3 uses --ranking. Add --stage 3."),
        (args.num_classes != 19 and not both_folders,
         "--num-classes other than 19 needs --source folder and --target folder."),
        (args.source == "folder" and not args.source_root,
         "--source folder needs --source-root, with images/ and labels/ in it."),
        (args.target == "folder" and not args.target_root,
         "--target folder needs --target-root, with images/ in it."),
        (min(args.layers) < 1, "--layers needs 1 block or more in each stage."),
        (same_images and args.alignment != "none",
         "source and target are the same folder. Name two. To train on the target's labels, "
         "add --alignment none."),
        (args.bn == "running" and args.alignment == "batchnorm",
         "--alignment batchnorm has no effect with --bn running. Use --bn batch."),
        (args.init == "imagenet" and not is_resnet101 and args.stage != "2",
         "--init imagenet is a ResNet-101. It needs --layers 3,4,23,3 --width 64."),
        (args.compile and args.checkpoint_activations,
         "--compile and --checkpoint-activations cannot be combined. Drop one."),
    ]  # fmt: skip
    for violated, sentence in checks:
        if violated:
            raise UserError(sentence)


# ====================================================================== the method's maths


def self_information(logits: Tensor) -> Tensor:
    """Weighted self-information maps I = -P log P / log C (AdvEnt, 3.2), P = softmax(logits).

    Logits (B,C,H,W) give maps (B,C,H,W) in [0, 1]; a certain pixel gives 0. Their sum over C is the
    normalised entropy of a pixel (AdvEnt, eq. 2). Maps and gradients are finite for finite logits.
    """
    # Not P.log(): where P is 0 in float32, P log P and its gradient would be NaN.
    log_p = logits.log_softmax(1)  # (B, C, H, W)
    return -log_p.exp() * log_p / math.log(logits.shape[1])


def discriminator(num_classes: int, width: int = 64) -> nn.Sequential:
    """D of AdvEnt: maps I (B,C,H,W), sides 32 or more, to domain logits (B,1,H//32,W//32).

    Positive logits mean target. width: channels after the first convolution (AdvEnt: 64).
    """
    channels = [num_classes, width, 2 * width, 4 * width, 8 * width]
    # Five convolutions of stride 2: a logit judges a patch of the map, not the whole image.
    steps = []
    for i in range(4):
        steps.append(nn.Conv2d(channels[i], channels[i + 1], 4, stride=2, padding=1))
        steps.append(nn.LeakyReLU(0.2, inplace=True))
    steps.append(nn.Conv2d(channels[4], 1, 4, stride=2, padding=1))
    return nn.Sequential(*steps)


SOURCE = 0.0  # the discriminators' labels
TARGET = 1.0


def domain_loss(domain_logits: Tensor, domain: float) -> Tensor:
    """Mean binary cross-entropy of D's logits (any shape) and SOURCE or TARGET: float32 scalar."""
    logits = domain_logits.float()  # under autocast D gives bfloat16
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, domain))


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, the mean over labelled pixels, a scalar; 0 if no pixel has a label.

    logits (B,C,H,W), labels (B,H,W) int64 trainIds with 255 = ignore.
    """
    # Not reduction="mean": it is 0/0 for a batch without a labelled pixel (D2).
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


# IntraDA's list: wall, fence, pole, light, sign, terrain, rider, truck, bus, train, motorcycle
RARE_CLASSES = (3, 4, 5, 6, 7, 9, 12, 14, 15, 16, 17)


def rarity_factor(classes: set) -> float:
    """(11 - r)/11 + 0.5, from 0.5 to 1.5; r is the number of rare classes in `classes` (trainIds).

    `classes` are those of an image's prediction. R(X) times this factor ranks an image that is rich
    in rare classes as easier.
    """
    rare = len(classes.intersection(RARE_CLASSES))
    return (11 - rare) / 11 + 0.5


def easy_count(ratio: float, images: int) -> int:
    """floor(λN) in exact arithmetic. In floats 0.29 * 100 is 28.999..."""
    return int(Fraction(str(ratio)) * images)


# ====================================================================== stages 1 and 3


def train(args, settings, folder, source, target, validation, device):
    """Train G on labelled `source` and align its entropy maps of `target` with those of `source`.

    source: `common.Labelled`; target: `common.Images`, empty to train on the source alone;
    validation: `common.Labelled`, or None to train without evaluation. settings {flag: text}: a
    checkpoint of different ones is refused. Writes last.pth, best.pth and log.jsonl to `folder`.
    UserError if a loss or a weight is not finite.
    """
    # Stage 3 starts here, too: from --init and new discriminators, not from stage 1's weights.
    torch.manual_seed(args.seed)
    G = common.DeepLabV2(args.num_classes, args.layers, args.width)
    weight_report = common.load_weights(G, common.initial_weights(args.init), args.init)
    D_main = discriminator(args.num_classes, args.width)
    D_aux = discriminator(args.num_classes, args.width)
    D = nn.ModuleDict({"main": D_main, "aux": D_aux})
    D.to(device, memory_format=torch.channels_last)
    G.to(device)
    G.checkpoint_activations = args.checkpoint_activations
    G.input_size = args.target_size
    g_params = [p for p in G.parameters() if p.requires_grad]  # not BatchNorm's: frozen
    g_groups = G.parameter_groups(args.recipe, args.lr_head_mult)
    g_optimizer = torch.optim.SGD(g_groups, lr=args.lr, momentum=0.9)
    d_optimizer = torch.optim.Adam(D.parameters(), lr=args.lr_d, betas=(0.9, 0.99))
    state = {
        "model": G,
        "discriminators": D,
        "g_optimizer": g_optimizer,
        "d_optimizer": d_optimizer,
    }

    start = common.resume(folder, settings, state)
    # Poly ends at --max-iters; training stops at --stop-iters, or at once where it is further.
    iters = max(start, args.stop_iters)
    if start == 0:  # the first file: it makes the folder this run's
        common.save(folder / "last.pth", 0, settings, state)
    counts = f"{len(source)} labelled images, {len(target) or 'no'} target images"
    description = f"{counts}, {weight_report}"
    log = common.Log(folder, folder.name, description, start, iters, settings)
    source_batches = common.Batches(source, args.batch_size, start, iters, args.workers, device)
    target_batches = common.Batches(target, args.batch_size, start, iters, args.workers, device)
    # At --ratio 1 stage 3 has no hard images: it is self-training, and nothing is aligned.
    alignment = args.alignment if len(target) > 0 else "none"

    # Once is enough: evaluation works on copies, and G stays in training mode.
    common.set_mode(G, args.bn)
    if args.compile:
        G.compile(dynamic=False)  # in place, so that names in checkpoints stay
    autocast = common.autocast(device, args.amp)
    information = common.compiled(self_information, args.compile)
    cross_entropy = common.compiled(segmentation_loss, args.compile)

    for it in range(start, iters + 1):
        # ---- when due: save, then evaluate; a run killed between them evaluates on resuming
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

        # ============================== the method ==============================
        # The schedule is set before each step, from `it` alone, so that a run resumes exactly.
        decay = (1 - it / args.max_iters) ** 0.9
        for group in g_optimizer.param_groups:
            group["lr"] = args.lr * decay * group["lr_factor"]
        for group in d_optimizer.param_groups:
            group["lr"] = args.lr_d * decay
        g_optimizer.zero_grad(set_to_none=True)
        d_optimizer.zero_grad(set_to_none=True)

        # G on the labelled source: L_seg = λ_main CE(main) + λ_aux CE(aux)
        x_s, y_s = next(source_batches)  # (B, 3, H, W), (B, H, W)
        with autocast:
            S = G(common.normalize(x_s))  # S.main, S.aux: logits (B, C, h, w)
        size_s = (y_s.shape[2], y_s.shape[1])
        loss_seg_main = cross_entropy(common.upsample(S.main, size_s), y_s)
        loss_seg_aux = cross_entropy(common.upsample(S.aux, size_s), y_s)
        loss_seg = args.lambda_seg_main * loss_seg_main + args.lambda_seg_aux * loss_seg_aux
        loss_seg.backward()  # now: it frees the source's activations

        if alignment == "batchnorm":
            x_t, _ = next(target_batches)
            # The control: target images move BatchNorm's running statistics, and nothing else.
            with torch.no_grad(), autocast:
                G(common.normalize(x_t))
        if alignment == "adversarial":
            x_t, _ = next(target_batches)
            # G on the target: its maps should look like source maps to D (AdvEnt, 3.2).
            # L_adv = λ_main BCE(D(I_t), source) + λ_aux BCE(D(I_t), source)
            size_t = (x_t.shape[3], x_t.shape[2])
            with autocast:
                T = G(common.normalize(x_t))
            I_t_main = information(common.upsample(T.main, size_t))  # (B, C, H, W)
            I_t_aux = information(common.upsample(T.aux, size_t))
            with autocast:
                d_out_main = D_main(I_t_main)  # (B, 1, H/32, W/32)
                d_out_aux = D_aux(I_t_aux)
            loss_adv_main = domain_loss(d_out_main, SOURCE)
            loss_adv_aux = domain_loss(d_out_aux, SOURCE)
            loss_adv = args.lambda_adv_main * loss_adv_main + args.lambda_adv_aux * loss_adv_aux
            # The gradient passes through D, but only G's parameters receive it. If D's received it
            # too, D would learn to call the target source.
            loss_adv.backward(inputs=g_params)

            # D learns to tell the domains apart. The maps are detached: G must not help D.
            # L_D = 1/2 BCE(D(I_s), source) + 1/2 BCE(D(I_t), target) (AdvEnt, 3.2)
            I_s_main = information(common.upsample(S.main.detach(), size_s))
            I_s_aux = information(common.upsample(S.aux.detach(), size_s))
            with autocast:
                d_s_main = D_main(I_s_main)
                d_s_aux = D_aux(I_s_aux)
                d_t_main = D_main(I_t_main.detach())
                d_t_aux = D_aux(I_t_aux.detach())
            loss_d_main = (domain_loss(d_s_main, SOURCE) + domain_loss(d_t_main, TARGET)) / 2
            loss_d_aux = (domain_loss(d_s_aux, SOURCE) + domain_loss(d_t_aux, TARGET)) / 2
            (loss_d_main + loss_d_aux).backward()

        common.average_over_ranks(G, D)  # gradients and running statistics; why not DDP: see there
        g_optimizer.step()
        if alignment == "adversarial":
            d_optimizer.step()
        # =========================== end of the method ===========================

        # Reading a loss makes the host wait for the GPU: at log steps only.
        if common.due(it + 1, args.log_every, iters):
            losses = {"loss_seg_main": loss_seg_main, "loss_seg_aux": loss_seg_aux}
            if alignment == "adversarial":
                losses.update(loss_adv_main=loss_adv_main, loss_adv_aux=loss_adv_aux)
                losses.update(loss_d_main=loss_d_main, loss_d_aux=loss_d_aux)
            batches = [source_batches, target_batches]
            log.losses(it + 1, batches, device, losses, lr=args.lr * decay)


# ====================================================================== stage 2: ranking


@torch.no_grad()
def rank_images(G, dataset, folder: Path, classes: tuple, workers: int, device) -> list:
    """Predict every image once. Rows {name, entropy, normalized_entropy}, lowest entropy first.

    entropy is R(X), the mean of I over pixels and classes: in [0, 1/C], in float64 from the float32
    map. normalized_entropy is R(X) times `rarity_factor`; for other classes than Cityscapes' it is
    R(X). Writes <folder>/<name>.png, the pseudo labels of every image: argmax of the main head at
    the dataset's size (W,H), without a threshold. Ranks share the images; all get all rows.
    """
    rows = {}
    for item in common.one_by_one(dataset, workers):
        name = item["name"]
        x = common.image_tensor(item["image"], device)  # (1, 3, H, W)
        logits = common.upsample(common.mean_logits([G], x), dataset.size)  # (1, C, H, W)
        prediction = logits.argmax(1)[0].byte()  # (H, W)
        I_t = self_information(logits)
        entropy = I_t.mean(dtype=torch.float64).item()  # close means keep their order
        # Both scores are kept: another λ or --normalize-entropy needs no second pass.
        factor = 1.0
        if classes == common.CLASSES:
            factor = rarity_factor(set(prediction.unique().tolist()))
        rows[name] = {"name": name, "entropy": entropy, "normalized_entropy": entropy * factor}
        common.write_png(folder / f"{name}.png", prediction.cpu().numpy(), classes)
    rows = common.merge_ranks(rows)  # when all ranks have written their labels
    return sorted(rows.values(), key=lambda row: (row["entropy"], row["name"]))


def easy_and_hard(rows: list, ratio: float, normalized: bool) -> tuple:
    """(easy, hard) names: the floor(λN) of lowest entropy, and the others. Names break ties."""
    key = "normalized_entropy" if normalized else "entropy"
    names = [row["name"] for row in sorted(rows, key=lambda row: (row[key], row["name"]))]
    count = easy_count(ratio, len(names))
    return names[:count], names[count:]


def read_ranking(folder: Path, images: dict, input_size: tuple, classes: tuple) -> tuple:
    """(rows {name, entropy, normalized_entropy}, content of ranking.json) of a folder's ranking.
    UserError if it was made with different images, input size or class count."""
    if not (folder / "ranking.json").exists():
        raise UserError(f"no ranking in {folder}. Run --stage 2, or name one by --ranking.")
    made_with = json.loads((folder / "ranking.json").read_text())
    expected = {
        "images": common.fingerprint(images),
        "input_size": list(input_size),
        "num_classes": len(classes),
    }
    for entry, value in expected.items():
        if made_with.get(entry) != value:
            what = f"{folder} was made with different {entry.replace('_', ' ')}"
            raise UserError(f"{what}. Use those flags and data, or remove it and run --stage 2.")
    with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["entropy"] = float(row["entropy"])
        row["normalized_entropy"] = float(row["normalized_entropy"])
    return rows, made_with


def check_weights(folder: Path, made_with: dict, network, checkpoint: Path):
    """Refuse a ranking that was not made with the network's weights, which the checkpoint holds."""
    if made_with["weights"] != network.digest:
        what = f"{folder} was made with weights other than those now in {checkpoint}"
        raise UserError(f"{what}. Remove it and run --stage 2.")


# ====================================================================== stages, main


def stage_1(args, settings, images, classes, validation, device):
    """Run AdvEnt on the labelled source and the target images {name: path}."""
    source_root = common.dataset_root(args.source, args.data_root, args.source_root)
    source_pairs = common.keep_listed(common.list_pairs(args.source, source_root), args.source_list)
    common.check_classes(args.source, source_root, classes)
    common.refuse_inside(args.out, common.image_folder(args.source, source_root))
    source = common.Labelled(source_pairs, args.source, classes, args.source_size, seed=args.seed)
    source.check_samples()
    folder = args.out / "stage1"
    target_images = {} if args.alignment == "none" else images
    settings = {**settings, "images": common.fingerprint([*source_pairs, *target_images])}
    # Training on would change the weights from which the later stages were made.
    later_stages = [args.out / name for name in ("stage2", "stage3") if (args.out / name).exists()]
    if args.stage == "all" and later_stages:
        earlier = common.earlier_checkpoint(folder, settings)
        if earlier is None or earlier["iter"] < args.stop_iters:
            names = " and ".join(map(str, later_stages))
            raise UserError(f"stage 1 is not finished, but there is {names}. Remove that first.")
    target = common.Images(target_images, args.target_size, seed=args.seed + 1)  # another order
    train(args, settings, folder, source, target, validation, device)


def stage_2(args, images, classes, device):
    """Rank the target images {name: path} and write <out>/stage2/, which appears when complete.

    Files: ranking.csv; labels/<name>.png; ranking.json, which names checkpoint, images and input
    size; gallery.png, the easiest and the hardest images.
    """
    checkpoint = args.ckpt or args.out / "stage1" / "last.pth"
    if not checkpoint.is_file():
        raise UserError(f"no file {checkpoint}. Run --stage 1 first, or name a file with --ckpt.")
    network = common.load(checkpoint)
    if not args.ckpt and not network.settings:
        raise UserError(f"{checkpoint} is not of a run of this script. Name the file with --ckpt.")
    if not args.ckpt and network.iterations < args.stop_iters:
        done = f"{checkpoint} has {network.iterations} of --stop-iters {args.stop_iters} iterations"
        raise UserError(f"{done}. Resume --stage 1 first, or name the file with --ckpt.")
    if network.num_classes != len(classes):
        wanted = f"--num-classes {len(classes)}. Name another file by --ckpt"
        raise UserError(f"{checkpoint} predicts {network.num_classes} classes, not {wanted}.")
    folder = args.out / "stage2"
    if folder.exists():
        _, made_with = read_ranking(folder, images, args.target_size, classes)
        check_weights(folder, made_with, network, checkpoint)
        print(f"stage2: already ranked, {folder / 'ranking.csv'}")
        return
    print(f"stage2: ranking {len(images)} target images with {checkpoint}, "
          f"{network.weight_report}", flush=True)  # fmt: skip
    G = common.inference_copy(network).to(device)
    partial = args.out / "stage2.partial"  # renamed when complete
    if common.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # a killed run left it
    common.barrier()
    dataset = common.Images(images, args.target_size)
    rows = rank_images(G, dataset, partial / "labels", classes, args.workers, device)
    easy, hard = easy_and_hard(rows, args.ratio, args.normalize_entropy)
    if common.rank() == 0:
        # A hash without the seed: tools/compare.py takes runs of different seeds as one row.
        of_any_seed = [f"{k}={v}" for k, v in network.settings.items() if k != "seed"]
        with open(partial / "ranking.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        made_with = {
            "checkpoint": os.path.relpath(checkpoint, args.out),
            "weights": network.digest,
            "settings": common.fingerprint(of_any_seed),
            "images": common.fingerprint(images),
            "input_size": list(args.target_size),
            "num_classes": len(classes),
        }
        common.write_text(partial / "ranking.json", json.dumps(made_with, indent=1) + "\n")
        key = "normalized_entropy" if args.normalize_entropy else "entropy"
        values = {row["name"]: row[key] for row in rows}
        order = easy + hard
        shown = list(dict.fromkeys(order[:3] + order[-3:]))
        captions = []
        for name in shown:
            part = "easy" if name in easy else "hard"
            captions.append(f"{part}: {name}, {key.replace('_', ' ')} {values[name]:.4f}")
        indices = [dataset.names.index(name) for name in shown]
        gallery = partial / "gallery.png"
        common.write_panel(gallery, {"prediction": G}, dataset, indices, classes, device, captions)
        os.rename(partial, folder)
    common.barrier()
    print(f"stage2: {len(easy)} easy and {len(hard)} hard images, {folder / 'ranking.csv'}")


def stage_3(args, settings, images, classes, validation, device):
    """Repeat stage 1 on {name: path}: easy images with pseudo labels as source, hard as target."""
    ranking = args.ranking or args.out / "stage2"
    rows, made_with = read_ranking(ranking, images, args.target_size, classes)
    # It may have been deleted since. If it is there, it must still be what ranked the images.
    checkpoint = ranking.absolute().parent / made_with["checkpoint"]
    if checkpoint.exists():
        check_weights(ranking, made_with, common.load(checkpoint), checkpoint)
    easy, hard = easy_and_hard(rows, args.ratio, args.normalize_entropy)
    if args.alignment == "none":
        hard = []
    pairs = {name: (images[name], ranking / "labels" / f"{name}.png") for name in easy}
    size = args.target_size
    source = common.Labelled(pairs, "folder", classes, size, pseudo=True, seed=args.seed)
    target = common.Images({name: images[name] for name in hard}, size, seed=args.seed + 1)
    # The identity names the ranking by its weights, not by its folder: a folder can be remade.
    settings = {
        **settings,
        "ratio": str(args.ratio),
        "normalize_entropy": str(args.normalize_entropy),
        "images": common.fingerprint(images),
        "ranking": made_with["weights"],
        "ranking_settings": made_with.get("settings"),
    }
    train(args, settings, args.out / "stage3", source, target, validation, device)


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
    if (args.out / "last.pth").exists() or (args.out / "warmup").exists():
        raise UserError(f"--out {args.out} holds a run of bcl.py. Choose another --out.")

    # Check what the stages share before anything is trained.
    target_root = common.dataset_root(args.target, args.data_root, args.target_root)
    images = common.keep_listed(common.list_images(args.target, target_root), args.target_list)
    classes = common.dataset_classes(args.target, target_root, args.num_classes)
    common.refuse_inside(args.out, common.image_folder(args.target, target_root))
    common.Images(images).check_samples()
    if args.normalize_entropy and classes != common.CLASSES:
        raise UserError("--normalize-entropy needs Cityscapes' classes. Leave it out.")
    if args.stage != "1" and easy_count(args.ratio, len(images)) == 0:
        raise UserError(f"--ratio {args.ratio} makes none of {len(images)} images easy. Raise it.")
    validation = None
    if args.stage != "2":
        validation = common.validation_set(args.target, target_root, classes, args.target_size)

    stages = "123" if args.stage == "all" else args.stage
    runs = {}
    if "1" in stages:
        stage_1(args, settings, images, classes, validation, device)
        runs["stage 1"] = args.out / "stage1"
    if "2" in stages:
        stage_2(args, images, classes, device)
    if "3" in stages:
        stage_3(args, settings, images, classes, validation, device)
        runs["stage 3"] = args.out / "stage3"
    if runs and validation and common.rank() == 0:
        common.print_results(args.out, runs, validation, device)


if __name__ == "__main__":
    common.launch(main)
