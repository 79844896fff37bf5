"""IntraDA: unsupervised intra-domain adaptation for semantic segmentation through self-supervision (CVPR 2020).

Pan, Shin, Rameau, Lee, Kweon. Stage 1 aligns source and target (this is AdvEnt: Vu et al., CVPR 2019), stage 2 ranks the
target images by entropy and splits them into easy and hard, stage 3 aligns easy (with pseudo labels) and hard. Stages 1
and 3 are one function, `train`, with other inputs.

    python intrada.py                                             demo: built-in scenes, small network, CPU
    python intrada.py --data-root DIR                             GTA5 -> Cityscapes, ResNet-101, the paper's constants
    torchrun --nproc_per_node=4 intrada.py --data-root DIR        the same on four GPUs, batch 4 + 4
    python intrada.py --data-root DIR --check                     open every file first, train nothing
    python intrada.py --data-root DIR --stage 2 --ckpt FILE       rank with any checkpoint, say a published AdvEnt one
    python intrada.py --stage 1 --lambda-adv-main 0 --lambda-adv-aux 0      the source-only baseline

Where this differs from the paper or from the released code:
D1  Each parameter is listed once in the optimizer. The released list held every backbone convolution three times, so the
    backbone moved about 3x faster than its learning rate says; --lr-backbone-mult 3 keeps that, 1 is the paper's text.
D2  Cross-entropy is the mean over labelled pixels and 0, not NaN, for a batch without any.
D3  log P comes from log-softmax instead of log(P + 1e-30): exact, and finite for any logits.
D4  D's forward on the target serves its own loss and the adversarial one; the released code runs it twice, for the same
    numbers.
D5  The split has floor(ratio * N) easy images in exact arithmetic; ties are broken by name.
D6  The demo has no ImageNet weights, so it first trains on source alone (--warmup-iters) and both adversarial stages start
    from that. On real data this is off.
D7  Several processes (torchrun) or --grad-accum make a batch larger: losses and gradients are those of the whole batch, but
    BatchNorm normalises each part by its own statistics, and --lr is not scaled. Running statistics are averaged.
D8  On CUDA the convolutions run in bfloat16 (--no-amp: TF32); losses, entropies and the ranking are float32.
"""

import argparse
import csv
import difflib
import functools
import hashlib
import importlib.util
import io
import math
import shutil
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import UserError

# ---------------------------------------------------------------- arguments

# flag: (paper, demo); --help shows both.
DEFAULTS = {
    "init": ("imagenet", "none"),
    "layers": ((3, 4, 23, 3), (1, 1, 1, 1)),
    "width": (64, 16),
    "source_size": ("1280x720, SYNTHIA 1280x760", (256, 128)),  # the paper's depend on the dataset: see parse_args
    "target_size": ((1024, 512), (256, 128)),
    "batch_size": (1, 2),
    "warmup_iters": (0, 800),
    "max_iters": (250_000, 400),
    "stop_iters": ("120000, SYNTHIA 90000", "all of --max-iters"),
    "lr": (2.5e-4, 3e-3),
    "lr_d": (1e-4, 1e-4),
    "eval_every": (2_000, 200),
    "save_every": (1_000, 100),
    "log_every": (50, 20),
    "workers": (4, 0),
    "bn": ("batch", "batch"),
    "lr_backbone_mult": (3.0, 3.0),
    "lr_head_mult": (10.0, 0.3),
    "warmup_lr": (2.5e-4, 1e-2),
}
SOURCE_SIZES = {"gta5": (1280, 720), "synthia": (1280, 760), "synscapes": (1440, 720), "folder": (1280, 720)}


def size(text: str) -> tuple:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and 32 <= min(int(width), int(height)) <= max(int(width), int(height)) <= 16384):
        raise argparse.ArgumentTypeError(f"{text!r}: give WxH, at least 32x32 (D halves a map five times), say 1024x512")
    return int(width), int(height)


def layers(text: str) -> tuple:
    counts = text.split(",")
    if len(counts) != 4 or not all(c.isdecimal() and 0 < int(c) < 1000 for c in counts):
        raise argparse.ArgumentTypeError(f"{text!r}: give four block counts, say 3,4,23,3")
    return tuple(map(int, counts))


def number(kind, low, high=math.inf):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            limit = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r}: give a {'whole ' * (kind is int)}number {limit}")
        return value

    return parse


def file_path(text: str) -> Path:
    if not text.strip():  # Path("") would be the current folder
        raise argparse.ArgumentTypeError(f"{text!r}: give a path")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are one sentence, with the flag that a mistyped one may stand for."""

    def error(self, message: str):
        kind, _, unknown = message.partition("unrecognized arguments: ")
        if unknown and not kind:
            flag = unknown.split()[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            message = f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}" + (f": did you mean {near[0]}?" if near else "")
        raise UserError(f"{message} (--help lists all flags)")


def new_parser(doc: str, defaults: dict) -> tuple:
    """(parser, add) where add(group, flag, help, **options) ends the help with the default, or with both of a table
    {name: (paper, demo)}."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=doc, formatter_class=raw, allow_abbrev=False)

    def add(group, flag, help, **options):
        if flag[2:].replace("-", "_") in defaults:
            paper, demo = map(as_text, defaults[flag[2:].replace("-", "_")])
            help += f" (paper: {paper}, demo: {demo})"
        elif options.get("default") is not None:
            several = isinstance(options["default"], list)
            help += f" (default: {' '.join(map(str, options['default']))})" if several else " (default: %(default)s)"
        group.add_argument(flag, help=help, **options)

    def as_text(value):
        is_size = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int)
        return str(value).strip("()").replace(", ", "x" if is_size else ",") if isinstance(value, tuple) else value

    return parser, add


WHOLE, POSITIVE, REAL, SHARE = number(int, 0, 10**9), number(int, 1, 10**9), number(float, 0, 1e6), number(float, 0, 1)
SIDE = number(int, 32, 16384)
SWITCH = {"action": argparse.BooleanOptionalAction}


def add_shared_flags(parser, add, out: str):
    """The flags that intrada.py and bcl.py have in common: run, data, network and speed."""
    g = parser.add_argument_group("run")
    add(g, "--out", "folder of this run's files", type=file_path, default=Path(out))
    add(g, "--check", "open every file of the datasets, report, train nothing; exit status 2 if something is wrong", action="store_true")
    add(g, "--resume", "continue an unfinished run from its last.pth", action="store_true")
    add(g, "--overwrite", "start over where --out holds another run", action="store_true")
    add(g, "--eval-every", "iterations between evaluations, 0: only at the end", type=WHOLE)
    add(g, "--save-every", "iterations between saves of last.pth", type=POSITIVE)
    add(g, "--keep", "how many older snapshots to keep beside last.pth", type=WHOLE, default=0)
    add(g, "--log-every", "iterations between records in log.jsonl", type=POSITIVE)
    add(g, "--tensorboard", "write TensorBoard events, too; needs the package tensorboard", action="store_true")
    add(g, "--seed", "fixes initial weights, the order of images and augmentation", type=number(int, 0, 2**32 - 1), default=0)

    g = parser.add_argument_group("data")
    add(g, "--data-root", "folder that holds GTA5/, Cityscapes/, SYNTHIA/, Synscapes/; without it the demo runs", type=file_path)
    add(g, "--source", "labelled domain", choices=("gta5", "synthia", "synscapes", "folder"), default="gta5")
    add(g, "--target", "unlabelled domain", choices=("cityscapes", "folder"), default="cityscapes")
    add(g, "--source-root", "the source's own folder, if not under --data-root", type=file_path)
    add(g, "--target-root", "the target's own folder, if not under --data-root", type=file_path)
    add(g, "--num-classes", "C; other than 19 needs --source folder and --target folder", type=number(int, 2, 255), default=19)

    g = parser.add_argument_group("network")
    add(g, "--init", "initial weights: imagenet, none (random) or a weight file")
    add(g, "--layers", "blocks per ResNet stage", type=layers)
    add(g, "--width", "channels of the stem, and of D's first layer", type=number(int, 2, 1024))
    add(g, "--bn", "statistics BatchNorm trains with: the batch's (the papers) or the running ones", choices=("batch", "running"))
    add(g, "--lr-backbone-mult", "factor on the backbone's learning rate: 3 as the released code, 1 as the paper's text", type=REAL)
    add(g, "--lr-head-mult", "factor on the heads' learning rate", type=REAL)

    g = parser.add_argument_group("speed")
    add(g, "--workers", "processes that read images, for each domain", type=number(int, 0, 256))
    add(g, "--device", "cpu or cuda; cuda if there is one", choices=("cpu", "cuda"))
    add(g, "--amp", "convolutions in bfloat16, losses in float32 (default: on with CUDA)", **SWITCH)
    add(g, "--compile", "compile network and losses, which takes a while at the start", default=False, **SWITCH)
    add(g, "--grad-accum", "batches per optimizer step, one after the other, where a larger batch does not fit", type=POSITIVE, default=1)
    checkpoint_help = "compute activations again in the backward pass instead of keeping them: less memory, one more forward pass"
    add(g, "--checkpoint-activations", checkpoint_help, default=False, **SWITCH)


def finish_args(parser: argparse.ArgumentParser, defaults: dict) -> argparse.Namespace:
    """Parse, fill in the paper's or the demo's defaults, check what concerns more than one flag."""
    args = parser.parse_args()
    args.demo = not (args.data_root or args.source_root or args.target_root)
    for name, (paper, demo) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, demo if args.demo else paper)
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite contradict each other: give one of them")
    for side in ("source", "target"):
        if getattr(args, side) == "folder" and not getattr(args, f"{side}_root"):
            raise UserError(f"--{side} folder needs --{side}-root DIR, the folder that holds images/ and labels/")
    if args.source_root and args.target_root and args.source_root.resolve() == args.target_root.resolve():
        raise UserError("--source-root and --target-root are the same folder: training would read target labels")
    if args.num_classes != 19 and (args.source != "folder" or args.target != "folder"):
        raise UserError("--num-classes other than 19 needs --source folder and --target folder")
    common.writable(args.out, "warmup", "stage1", "stage2", "stage3")
    if args.init == "imagenet" and getattr(args, "stage", "1") != "2" and (args.layers, args.width) != ((3, 4, 23, 3), 64):
        raise UserError("--init imagenet is a ResNet-101: it needs --layers 3,4,23,3 --width 64")
    if args.compile and args.checkpoint_activations:
        raise UserError("--compile and --checkpoint-activations exclude each other: the compiler decides itself what to keep")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard, or leave the flag out")
    args.device = common.set_up(args.device)
    args.amp = args.device.type == "cuda" if args.amp is None else args.amp
    args.ranks = common.world()
    return args


def parse_args() -> argparse.Namespace:
    parser, add = new_parser(__doc__, DEFAULTS)
    g = parser.add_argument_group("stages")
    stages = ("1", "2", "3", "all")
    add(g, "--stage", "1 inter-domain, 2 ranking and pseudo labels, 3 intra-domain", choices=stages, default="all")
    add(g, "--ckpt", "stage 2: rank with this checkpoint instead of stage 1's", type=file_path)
    select_help = "checkpoint that stage 2 takes of stage 1; best is chosen on validation labels, an oracle"
    add(g, "--select", select_help, choices=("last", "best"), default="last")

    g = parser.add_argument_group("schedule")
    add(g, "--source-size", "source images are resized to WxH, in stage 3 to --target-size", type=size)
    add(g, "--target-size", "target images are resized to WxH", type=size)
    add(g, "--batch-size", "images per iteration, of each domain", type=POSITIVE)
    add(g, "--warmup-iters", "source-only iterations that make the initial weights of stages 1 and 3", type=WHOLE)
    add(g, "--warmup-lr", "learning rate of the warm-up, whose poly schedule ends with it", type=REAL)
    add(g, "--max-iters", "horizon of the poly schedule lr (1 - it/max)^0.9", type=POSITIVE)
    add(g, "--stop-iters", "iterations really trained", type=POSITIVE)
    add(g, "--lr", "SGD learning rate of G", type=REAL)
    add(g, "--lr-d", "Adam learning rate of the discriminators", type=REAL)

    g = parser.add_argument_group("method")
    add(g, "--lambda-seg-aux", "weight of the auxiliary cross-entropy", type=REAL, default=0.1)
    add(g, "--lambda-adv-main", "weight of the adversarial loss on the main head; both 0: source only", type=REAL, default=0.001)
    add(g, "--lambda-adv-aux", "weight of the adversarial loss on the auxiliary head", type=REAL, default=0.0002)
    ratio_help = "λ, share of easy images; 1 is self-training alone; stage 2 takes several (default: 0.67, the paper's best)"
    add(g, "--ratio", ratio_help, type=SHARE, nargs="+")
    add(g, "--normalize-entropy", "rank by R x ((11 - rare classes)/11 + 0.5), the paper's best row", default=False, **SWITCH)

    add_shared_flags(parser, add, "runs/intrada")
    args = finish_args(parser, DEFAULTS)
    if isinstance(args.source_size, str):
        args.source_size = SOURCE_SIZES[args.source]
    if isinstance(args.stop_iters, str):
        args.stop_iters = args.max_iters if args.demo else min(args.max_iters, 90_000 if args.source == "synthia" else 120_000)
    if args.stop_iters > args.max_iters:
        raise UserError(f"--stop-iters {args.stop_iters} is beyond --max-iters {args.max_iters}, where the learning rate is 0")
    if args.ckpt and args.stage in ("1", "3"):
        raise UserError(f"--ckpt is what stage 2 ranks with; stage {args.stage} starts from --init")
    if args.ratio is None and args.stage != "3":  # stage 3 finds it in the ranking
        args.ratio = [0.67]
    if args.stage != "2" and args.ratio and len(args.ratio) > 1:
        raise UserError(f"--ratio: several values are for --stage 2, which writes a split for each; --stage {args.stage} takes one")
    if args.num_classes != 19 and args.normalize_entropy:
        raise UserError("--normalize-entropy counts 11 rare classes of the 19: it needs --num-classes 19")
    return args


# ---------------------------------------------------------------- the method's maths


def self_information(logits: Tensor) -> Tensor:
    """Weighted self-information maps I = -P log P / log C (AdvEnt eq. 2): logits (B,C,H,W) to (B,C,H,W) in [0, 1].

    Their sum over C is the normalised entropy of a pixel. Finite, with finite gradient, for any logits.
    """
    log_p = logits.log_softmax(1)  # (B, C, H, W)
    return -log_p.exp() * log_p / math.log(logits.shape[1])


def Discriminator(num_classes: int, width: int = 64) -> nn.Sequential:
    """D of AdvEnt: maps I (B,C,H,W) to domain logits (B,1,H/32,W/32), below 0 for source and above for target."""
    channels = [num_classes, width, 2 * width, 4 * width, 8 * width]
    steps = []
    for i in range(4):
        steps += [nn.Conv2d(channels[i], channels[i + 1], 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*steps, nn.Conv2d(channels[4], 1, 4, stride=2, padding=1))


SOURCE, TARGET = 0.0, 1.0  # the discriminators' labels


def domain_loss(domain_logits: Tensor, domain: float) -> Tensor:
    """Binary cross-entropy of D's logits (any shape) with one domain label for all of them: a float32 scalar >= 0."""
    domain_logits = domain_logits.float()
    return F.binary_cross_entropy_with_logits(domain_logits, torch.full_like(domain_logits, domain))


def segmentation_loss(logits: Tensor, labels: Tensor, pixels=None) -> Tensor:
    """Cross-entropy, mean over the labelled pixels: logits (B,C,H,W), labels (B,H,W) with 255 = ignore. 0 if none is.

    pixels: another number to divide the sum by, the `labelled_pixels` of several batches.
    """
    total = F.cross_entropy(logits, labels, ignore_index=common.IGNORE, reduction="sum")
    return total / (labelled_pixels([labels]) if pixels is None else pixels)


def labelled_pixels(labels: list) -> Tensor:
    """Labelled pixels per batch, at least 1: the mean over the batches of an optimizer step, on all ranks.

    With it a batch that is split over --grad-accum or over torchrun's processes has the loss of the whole batch.
    """
    count = sum((batch != common.IGNORE).sum() for batch in labels)
    return (common.over_ranks(count) / (len(labels) * common.world())).clamp(min=1)


def upsample(logits: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=True)  # (B, C, h, w) -> (B, C, H, W)


RARE_CLASSES = (3, 4, 5, 6, 7, 9, 12, 14, 15, 16, 17)  # wall fence pole light sign terrain rider truck bus train motorcycle


def rarity_factor(classes: set) -> float:
    """(11 - r)/11 + 0.5, r = rare classes among the predicted trainIds: images rich in rare classes rank as easier."""
    return (11 - len(classes & set(RARE_CLASSES))) / 11 + 0.5


# ---------------------------------------------------------------- stages 1 and 3: adversarial training


def train(args, name: str, source, target, validation, initial, iters: int, horizon: int, lr: float) -> dict:
    """Train G on labelled `source` while aligning its entropy maps on `target` (None: source only) with the source's.

    source, target, validation are datasets, initial a weight file or dict or None; files go to <out>/<name>/. Returns
    the scores of the last evaluation.
    """
    device, n = args.device, args.grad_accum
    torch.manual_seed(args.seed)
    G = common.DeepLabV2(args.num_classes, args.layers, args.width)
    report = common.load_weights(G, initial) if initial is not None else "random initial weights"
    D_main, D_aux = Discriminator(args.num_classes, args.width), Discriminator(args.num_classes, args.width)
    D = nn.ModuleDict({"main": D_main, "aux": D_aux}).to(device, memory_format=torch.channels_last)
    G.to(device).checkpoint_activations = args.checkpoint_activations
    d_params = list(D.parameters())
    g_groups = G.parameter_groups(args.lr_backbone_mult, args.lr_head_mult)
    g_optimizer = torch.optim.SGD(g_groups, lr=lr, momentum=0.9, weight_decay=5e-4)
    d_optimizer = torch.optim.Adam(d_params, lr=args.lr_d, betas=(0.9, 0.99))

    parts = {"discriminators": D, "g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    about = f"{len(source)} labelled images, {len(target) if target else 'no'} target images, {report}, {batch_text(args)}"
    config = training_config(args, name, [*source.names, *(target.names if target else ())], horizon, lr)
    run = common.Run(args, name, args.out / name, config, iters, G, parts, validation, about, self_information)
    if run.finished:
        return run.result
    autocast, (information, ce) = precision_and_compiler(args, G, [self_information, segmentation_loss])
    rest = (args.batch_size, run.start * n, iters * n, args.workers, device)
    source_batches = common.training_batches(source, args.seed, *rest)
    target_batches = target and common.training_batches(target, args.seed + 1, *rest)
    common.set_mode(G, args.bn)
    for it in range(run.start, iters):
        decay = (1 - it / horizon) ** 0.9
        for group in g_optimizer.param_groups:
            group["lr"] = lr * decay * group["lr_mult"]
        for group in d_optimizer.param_groups:
            group["lr"] = args.lr_d * decay
        g_optimizer.zero_grad(set_to_none=True)
        d_optimizer.zero_grad(set_to_none=True)
        with run.waiting_for_data():
            batches = [(next(source_batches), target and next(target_batches)) for _ in range(n)]
        pixels = labelled_pixels([source_batch["label"] for source_batch, _ in batches]).to(device, non_blocking=True)
        terms, names = [], []
        for source_batch, target_batch in batches:
            # -------- G on source: L_seg = CE(main) + 0.1 CE(aux)
            labels = source_batch["label"].to(device, non_blocking=True).long()  # (B, H, W)
            with autocast:
                prediction = G(common.normalize(source_batch["image"].to(device, non_blocking=True)))
            source_main, source_aux, full = prediction.main, prediction.aux, labels.shape[1:]  # (B, C, h, w) and (H, W)
            loss_seg_main = ce(upsample(source_main, *full), labels, pixels)
            loss_seg_aux = ce(upsample(source_aux, *full), labels, pixels)
            ((loss_seg_main + args.lambda_seg_aux * loss_seg_aux) / n).backward()

            loss_adv_main = loss_adv_aux = loss_d_main = loss_d_aux = None
            if target:
                # -------- G on target: its maps should look like the source's. L_adv = 0.001 BCE(D(I_t), source) + aux
                images = common.normalize(target_batch["image"].to(device, non_blocking=True))
                with autocast:
                    prediction = G(images)
                target_maps = [information(upsample(level, *images.shape[2:])) for level in prediction[:2]]  # 2 x (B, C, H, W)
                d_inputs = [maps.detach().requires_grad_() for maps in target_maps]  # D's graph ends here, and serves two losses
                with autocast:
                    target_main, target_aux = D_main(d_inputs[0]), D_aux(d_inputs[1])  # (B, 1, H/32, W/32)
                loss_adv_main, loss_adv_aux = domain_loss(target_main, SOURCE), domain_loss(target_aux, SOURCE)
                loss_adv = args.lambda_adv_main * loss_adv_main + args.lambda_adv_aux * loss_adv_aux
                (loss_adv / n).backward(inputs=d_inputs, retain_graph=True)  # D stays as it is ...
                torch.autograd.backward(target_maps, [maps.grad for maps in d_inputs])  # ... and on through G

                # -------- D tells the domains apart: 1/2 BCE(D(I_s), source) + 1/2 BCE(D(I_t), target), on both heads
                source_maps = [information(upsample(level.detach(), *full)) for level in (source_main, source_aux)]
                with autocast:
                    domain_main, domain_aux = D_main(source_maps[0]), D_aux(source_maps[1])
                loss_d_main = (domain_loss(domain_main, SOURCE) + domain_loss(target_main, TARGET)) / 2
                loss_d_aux = (domain_loss(domain_aux, SOURCE) + domain_loss(target_aux, TARGET)) / 2
                ((loss_d_main + loss_d_aux) / n).backward(inputs=d_params)  # G stays as it is
            terms.append({
                "loss_seg_main": loss_seg_main, "loss_seg_aux": loss_seg_aux, "loss_adv_main": loss_adv_main,
                "loss_adv_aux": loss_adv_aux, "loss_d_main": loss_d_main, "loss_d_aux": loss_d_aux,
            })  # fmt: skip
            names += source_batch["name"] + (target_batch["name"] if target else [])
        common.share_gradients(G, D)
        g_optimizer.step()
        if target:
            d_optimizer.step()
        # -------- end of the method; the rest reports, saves and evaluates
        run.after_iteration(it + 1, terms, names, lr * decay)
    return run.result


def batch_text(args) -> str:
    images = args.batch_size * args.grad_accum * args.ranks
    parts = f"--batch-size {args.batch_size} x --grad-accum {args.grad_accum} x {args.ranks} processes"
    return f"{images} images per step and domain ({parts}; learning rates as given, not scaled)"


def precision_and_compiler(args, G: nn.Module, functions: list) -> tuple:
    """What --amp and --compile stand for: the context in which networks run, and the functions, compiled or as they are.

    G is compiled in place, which leaves the names in its state_dict alone. Shapes are fixed: one compilation for the
    source's and one for the target's. Upsampling stays outside: torch 2.4 compiles its backward pass to wrong gradients.
    """
    if args.compile:
        G.compile(dynamic=False)
        functions = [torch.compile(function, dynamic=False) for function in functions]
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp), functions


# Flags that do not make another experiment of a run. Where the data lie is one of them: their names are compared.
INDIFFERENT = set("""stage check out ckpt resume overwrite select stop_iters workers device keep tensorboard eval_every save_every
    log_every compile checkpoint_activations data_root source_root target_root""".split())


def training_config(args, name: str, images: list, *schedule) -> dict:
    """What makes two runs of a stage the same run, as plain values: kept in last.pth and compared when it is found."""
    config = {key: str(value) for key, value in vars(args).items() if key not in INDIFFERENT | {"ratio", "normalize_entropy"}}
    if name == "warmup":  # shared by runs that differ only in what comes after it
        config = {key: value for key, value in config.items() if key in WARMUP_FLAGS}
    config["init"] = Path(args.init).name  # a moved file is the same file
    ranking = (args.out / "stage2" / "ranking.csv").read_text() if name == "stage3" else ""
    digests = (hashlib.sha256(text.encode()).hexdigest()[:12] for text in ("\n".join(images), ranking))
    return {**config, "schedule": str(schedule), **dict(zip(("images", "ranking"), digests))}


WARMUP_FLAGS = """source num_classes init layers width source_size bn lr_backbone_mult lr_head_mult batch_size
    warmup_lr lambda_seg_aux seed amp grad_accum ranks scales warmup_short_side warmup_crop flip""".split()


# ---------------------------------------------------------------- stage 2: ranking, split, pseudo labels


@torch.no_grad()
def predict_target(args, checkpoint: Path, images: dict) -> dict:
    """{name: (entropy, normalised entropy)}: R(X) = mean over pixels and classes of I (main head, eval mode).

    Writes below <out>/stage2/predictions/: <name>_trainids.png (argmax without threshold; holds also the entropies and
    what it was made of), <name>_colour.png and <name>_entropy.png (0..255 for an entropy of 0..1). An image that is there
    already, from this checkpoint and size, is not predicted again: a killed run goes on, another λ costs nothing.
    """
    folder, C, device = args.out / "stage2" / "predictions", args.num_classes, args.device
    origin = f"{hashlib.sha256(checkpoint.read_bytes()).hexdigest()} {args.target_size}"

    def finished(name):
        text = common.png_text(folder / f"{name}_trainids.png")
        return tuple(map(float, text["entropy"].split())) if text.get("origin") == origin else None

    known = {name: finished(name) for name in images}
    missing = {name: path for name, path in images.items() if not known[name]}
    common.wait_for_ranks()  # until all have looked
    if missing:
        G, report = common.build_model(checkpoint)
        if G.num_classes != C:
            raise UserError(f"{checkpoint} predicts {G.num_classes} classes: give --num-classes {G.num_classes}")
        print(f"stage 2: predicting {len(missing)} of {len(images)} target images with {checkpoint}, {report}")
        G, start = common.inference_copy(G.to(device)), time.perf_counter()
        for item in common.one_by_one(common.Images(missing, args.target_size), args.workers, device):
            maps = common.predict_maps([G], item["image"][None].to(device, non_blocking=True))
            label, pixels = common.predict_with(maps, args.target_size, self_information)  # (H, W) each
            label, stem, entropy = label.cpu().numpy(), folder / item["name"], pixels.mean(dtype=torch.float64).item() / C
            both = entropy, entropy * (rarity_factor(set(np.unique(label).tolist())) if C == 19 else 1.0)
            common.write_png(f"{stem}_entropy.png", common.grey(pixels), compress_level=1)
            common.write_png(f"{stem}_colour.png", label, common.palette_for(C))
            common.write_png(f"{stem}_trainids.png", label, text={"origin": origin, "entropy": "{!r} {!r}".format(*both)})
        print(f"stage 2: {len(missing)} images in {time.perf_counter() - start:.0f} s")
        common.wait_for_ranks()
    else:
        print(f"stage 2: {len(images)} target images are already predicted with {checkpoint}")
    return {name: known[name] or finished(name) for name in images}


def rank_target(args, checkpoint: Path, images: dict):
    """Sort the target images by entropy; the floor(λN) lowest are easy, the rest hard.

    Writes into `split_folder` of every --ratio: for the easy images labels/<name>.png (trainIds) and colour/<name>.png,
    then easy.txt, hard.txt, gallery.png, histogram.png and, last, ranking.csv (name, entropy, normalized_entropy, split; in
    the order of the ranking).
    """
    predictions, entropies = args.out / "stage2" / "predictions", predict_target(args, checkpoint, images)
    key = 1 if args.normalize_entropy else 0
    names = sorted(images, key=lambda name: (entropies[name][key], name))
    for ratio in args.ratio if common.rank() == 0 else ():
        folder, easy = split_folder(args, ratio), easy_count(ratio, names)
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["name", "entropy", "normalized_entropy", "split"])
        writer.writerows([name, *entropies[name], "easy" if i < easy else "hard"] for i, name in enumerate(names))
        ranking = folder / "ranking.csv"
        known = ranking.read_text(errors="replace") if ranking.exists() else ""
        if known != table.getvalue() or not all((folder / "labels" / f"{name}.png").exists() for name in names[:easy]):
            if known:
                print(f"stage 2: replacing the split in {folder}")
            ranking.unlink(missing_ok=True)  # absent while the rest is being replaced
            for kind, source in (("labels", "trainids"), ("colour", "colour")):
                shutil.rmtree(folder / kind, ignore_errors=True)
                for name in names[:easy]:
                    common.link(predictions / f"{name}_{source}.png", folder / kind / f"{name}.png")
            common.write_text(folder / "easy.txt", "".join(f"{name}\n" for name in names[:easy]))
            common.write_text(folder / "hard.txt", "".join(f"{name}\n" for name in names[easy:]))
            draw_split(folder, names, images, predictions, {name: entropies[name][key] for name in names}, easy, args.num_classes)
            common.write_text(ranking, table.getvalue())
        print(f"stage 2: {easy} easy and {len(names) - easy} hard images, {ranking}")
    common.wait_for_ranks()


def draw_split(folder: Path, names: list, images: dict, predictions: Path, entropies: dict, easy: int, num_classes: int):
    """gallery.png: the easiest and the hardest images with prediction and entropy map; histogram.png: the entropies."""

    def row(name):
        label, entropy = (common.open_image(predictions / f"{name}_{kind}.png") for kind in ("trainids", "entropy"))
        return [np.asarray(common.read_image(images[name])), np.asarray(label), np.asarray(entropy.convert("RGB"))]

    count = min(4, len(names) // 2) or 1
    rows = [row(first) + row(last) for first, last in zip(names[:count], names[::-1][:count])]
    titles = ["image, easiest first", "prediction", "entropy (white: 1)", "image, hardest first", "prediction", "entropy (white: 1)"]
    common.write_grid(folder / "gallery.png", titles, rows, num_classes)
    groups = {"easy": [entropies[name] for name in names[:easy]], "hard": [entropies[name] for name in names[easy:]]}
    title = f"{easy} easy and {len(names) - easy} hard target images"
    common.write_histogram(folder / "histogram.png", groups, title, "entropy R, mean over pixels and classes")


def split_folder(args, ratio: float) -> Path:
    """Where stage 2 puts the split by this λ: <out>/stage2, or, of several, <out>/ratio<λ>/stage2 for a stage 3 each."""
    return args.out / f"ratio{ratio:g}" / "stage2" if len(args.ratio) > 1 else args.out / "stage2"


def easy_count(ratio: float, images) -> int:
    return int(Fraction(str(ratio)) * len(images))  # as a float, 0.29 * 100 is 28.999...


def read_split(args, images: dict) -> tuple:
    """Stage 2's result: ({name: (image, pseudo label)} of the easy images, {name: image} of the hard ones). Fills in
    args.ratio if stage 3 was not given one."""
    folder, ranking = args.out / "stage2", args.out / "stage2" / "ranking.csv"
    if not ranking.exists():
        raise UserError(f"no {ranking}: run intrada.py --stage 2 --out {args.out} first")
    try:
        rows = list(csv.DictReader(ranking.read_text().splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {ranking} ({error}): remove it and run --stage 2 again")
    splits = {row.get("name"): row.get("split") for row in rows}
    strange = [name for name in splits if name not in images]
    if strange:
        raise UserError(f"{ranking} ranks {strange[0]}, which is no target image: run --stage 2 again on this target")
    if len(rows) != len(images) or len(splits) != len(images) or not set(splits.values()) <= {"easy", "hard"}:
        raise UserError(f"{ranking} does not rank each of the {len(images)} target images once as easy or hard: run --stage 2 again")
    easy = [name for name, split in splits.items() if split == "easy"]
    if args.ratio is None:
        args.ratio = [0.67 if len(easy) == easy_count(0.67, images) else round(len(easy) / len(images), 4)]
    elif len(easy) != easy_count(args.ratio[0], images):
        raise UserError(f"--ratio {args.ratio[0]:g} is not that of {ranking}: run --stage 2 with it, or leave it out")
    if not easy:
        raise UserError(f"the easy split in {ranking} is empty: raise --ratio and run --stage 2 again")
    pairs = {name: (images[name], folder / "labels" / f"{name}.png") for name in easy}
    missing = [label for _, label in pairs.values() if not label.is_file()]
    if missing:
        raise UserError(f"{len(missing)} pseudo labels are missing, first {missing[0]}: run --stage 2 again")
    return pairs, {name: images[name] for name, split in splits.items() if split == "hard"}


# ---------------------------------------------------------------- main


def main():
    args = parse_args()
    if args.demo:
        print("Demo: built-in street scenes, a small network and a short schedule. For real data: --data-root DIR (see README).")
        args.data_root = common.demo_scenes(args.source)
    C, columns, checkpoint = args.num_classes, {}, args.ckpt or args.out / "stage1" / f"{args.select}.pth"
    # What the chosen stages need is looked at before anything is trained or fetched.
    target_root = common.dataset_root(args.target, args.data_root, args.target_root)
    target_images = common.list_images(args.target, target_root, "train")
    if args.stage in ("2", "all") and (args.ckpt or args.stage == "2") and not checkpoint.exists():
        raise UserError(f"no {checkpoint}: run intrada.py --stage 1 --out {args.out} first, or name a checkpoint with --ckpt")
    pseudo = None
    if args.stage == "3":
        pseudo = common.Labelled(read_split(args, target_images)[0], "folder", C, args.target_size, same_aspect=False)
        pseudo.open(0)
    if (args.ckpt and args.stage == "all") or (args.check and args.stage == "2"):
        print(f"{checkpoint}: {common.build_model(checkpoint)[1]}")  # readable at all, before stage 1 is trained
    if args.stage == "all" and easy_count(args.ratio[0], target_images) == 0:
        raise UserError(f"--ratio {args.ratio[0]:g} of {len(target_images)} target images leaves no easy one: raise it")
    validation = source = None
    if args.stage != "2":
        validation = common.validation_set(args.target, target_root, C, args.target_size)
    if args.stage in ("1", "all") or (args.stage == "3" and args.warmup_iters):
        source_root = common.dataset_root(args.source, args.data_root, args.source_root)
        pairs = common.list_pairs(args.source, source_root)
        source = common.Labelled(pairs, args.source, C, args.source_size, seed=args.seed)
    if args.check:
        datasets = {"source": source, "target": common.Images(target_images), "pseudo labels": pseudo, "validation": validation}
        G, D = common.DeepLabV2(C, args.layers, args.width), Discriminator(C, args.width)
        trainings = {"1": 1, "2": 0, "3": 1, "all": 2}[args.stage] + bool(args.warmup_iters and args.stage != "2")
        checkpoints = trainings * common.training_bytes([(G, 2), (D, 6)], G, args.keep)
        # Of a target image an entropy map of 8 bits a pixel, a label and its colour of 2, amply; splits are links to them.
        pictures = (args.stage in ("2", "all")) * len(target_images) * math.prod(args.target_size) * 1.5
        return common.check(args, datasets, G, checkpoints + pictures)
    for labelled in (source, validation):
        if labelled:
            labelled.look()
    if args.overwrite:
        stages = {"1": ("warmup", "stage1"), "2": (), "3": ("stage3",), "all": ("warmup", "stage1", "stage3")}[args.stage]
        common.start_over([args.out / stage for stage in stages])

    @functools.cache  # trained or fetched once
    def initial_weights():
        """Path or content of the weights that stages 1 and 3 both start from; None for random ones."""
        weights = common.initial_weights(args.init)
        if not args.warmup_iters:
            return weights
        schedule = (args.warmup_iters, args.warmup_iters, args.warmup_lr)
        columns["warm-up"] = train(args, "warmup", source, None, validation, weights, *schedule)
        return args.out / "warmup" / "last.pth"

    adversarial = args.lambda_adv_main > 0 or args.lambda_adv_aux > 0
    schedule = (args.stop_iters, args.max_iters, args.lr)
    if args.stage in ("1", "all"):
        target = common.Images(target_images, args.target_size) if adversarial else None
        columns["stage 1"] = train(args, "stage1", source, target, validation, initial_weights(), *schedule)
    if args.stage in ("2", "all"):
        rank_target(args, checkpoint, target_images)
    if args.stage in ("3", "all"):
        easy, hard = read_split(args, target_images)
        easy = common.Labelled(easy, "folder", C, args.target_size, same_aspect=False, seed=args.seed)
        hard = common.Images(hard, args.target_size) if hard and adversarial else None  # λ = 1: self-training alone
        columns["stage 3"] = train(args, "stage3", easy, hard, validation, initial_weights(), *schedule)
    common.print_results(columns)


if __name__ == "__main__":
    common.launch(main)
