r"""IntraDA: unsupervised intra-domain adaptation for semantic segmentation (CVPR 2020).

Pan, Shin, Rameau, Lee, Kweon. Stage 1 aligns source and target: this is AdvEnt (Vu et al., CVPR
2019). Stage 2 ranks the target images by entropy and splits them into easy and hard. Stage 3 aligns
easy images (with pseudo labels) and hard ones. Stages 1 and 3 are one function, `train`, with other
inputs: that symmetry is the method.

    python intrada.py                                    demo: built-in scenes, small network
    python intrada.py --data-root DIR --out runs/gta5    GTA5 -> Cityscapes, ResNet-101
    torchrun --nproc_per_node=4 intrada.py --data-root DIR --out runs/four     batch 4 + 4
    python intrada.py --data-root DIR --out runs/x --stage 2 --ckpt FILE       rank with any file
    python intrada.py --stage 1 --alignment none --out runs/source             source only
    python intrada.py --stage 1 --alignment batchnorm --out runs/control       the control
    python intrada.py --stage 3 --ratio 1 --ranking RUN/stage2 --out runs/self        self-training
    python intrada.py --stage 3 --init RUN/stage1/last.pth --ranking RUN/stage2 --out runs/align \
        --lambda-seg-main 0 --lambda-seg-aux 0      intra-domain alignment alone, in our reading

The control sends target images through BatchNorm alone. RUN is an earlier run's --out.
The same command again goes on where the run stopped.

Where this differs from the paper (P) or from the released code (R):
D1  R steps a parameter as often as its optimizer lists it: conv1 once, shortcut convolutions four
    times, the other convolutions three times. Here each is listed once, with that factor on its
    learning rate (--backbone-lr released) or with 1, as P's text has it (paper).
D2  Cross-entropy is the mean over labelled pixels and 0, not NaN, for a batch without any.
D3  log P comes from log-softmax instead of log(P + 1e-30): exact, and finite for any logits.
D4  The split has floor(ratio * N) easy images in exact arithmetic; ties are broken by name.
D5  Stage 2 takes the last checkpoint of stage 1. R takes the best on the validation labels, which
    is an oracle: --stage 2 --ckpt OUT/stage1/best.pth --out NEW, then --stage 3 --out NEW.
D6  --init imagenet takes torchvision's weights, R the Caffe-style DeepLab_resnet_pretrained_* file.
    The network strides on the 1x1 convolutions, torchvision's on the 3x3. R's file is read, too.
D7  Every epoch is a new permutation of the images. R shuffles a list that repeats them.
D8  With several processes (torchrun) gradients and BatchNorm's running statistics are averaged.
    Each process takes the mean over its own labelled pixels and normalises by its own batch
    statistics; --lr is not scaled.
D9  On GPUs that have bfloat16 the convolutions of training run in it (--no-amp: in TF32). Entropies
    and losses are computed in float32 from what they give. Ranking and evaluation are float32.
D10 The demo (DEMO) is short. It starts from demo/initial.pth, a network trained on drawn source
    scenes. Its adversarial weights are 20 times the defaults, its learning rates 12 times (G) and 3
    times (D); the factor on the heads' is 0.3.

Not supported: other networks, several target domains at once, Windows.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import IGNORE, UserError, number, place

# ====================================================================== arguments

# Defaults of the demo, that is, of a run without a data root.
DEMO = dict(
    init=str(Path(__file__).with_name("demo") / "initial.pth"), layers=(1, 1, 1, 1), width=16,
    source_size=(256, 128), target_size=(256, 128), batch_size=2, max_iters=400, lr=3e-3,
    lr_head_mult=0.3, lr_d=3e-4, lambda_adv_main=2e-2, lambda_adv_aux=4e-3,
    eval_every=200, save_every=100, log_every=20, workers=0,
)  # fmt: skip
RECIPES = ("released", "paper")
SOURCE_SIZES = {"gta5": (1280, 720), "synthia": (1280, 760), "synscapes": (1440, 720)}


class Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help
        return f"{action.help} [%(default)s]"


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists all flags)")


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

    g = parser.add_argument_group("files")
    g.add_argument("--data-root", type=place, help="parent of GTA5/, Cityscapes/ ...; none: demo")
    g.add_argument("--source-root", type=place, help="source folder, if not below --data-root")
    g.add_argument("--target-root", type=place, help="target folder, if not below --data-root")
    g.add_argument("--out", type=place, default="runs/intrada", help="folder of this run's files")
    g.add_argument("--ckpt", type=place, help="stage 2: rank with this file, not stage1/last.pth")
    g.add_argument("--ranking", type=place, help="stage 3: folder of another run's ranking.csv")

    g = parser.add_argument_group("data")
    g.add_argument("--source", choices=common.SOURCES, default="gta5", help="labelled domain")
    g.add_argument("--target", choices=common.TARGETS, default="cityscapes", help="unlabelled one")
    classes = number(int, 2, 255)
    g.add_argument("--num-classes", type=classes, default=19, help="C; not 19: folder data only")
    text = "WxH; GTA5 1280x720, SYNTHIA 1280x760 (released), Synscapes 1440x720; else --target-size"
    g.add_argument("--source-size", type=common.size, help=text)
    g.add_argument("--target-size", type=common.size, default="1024x512", help="WxH (released)")

    g = parser.add_argument_group("schedule")
    g.add_argument("--batch-size", type=count, default=1, help="images of each domain (released)")
    g.add_argument("--max-iters", type=count, default=250_000, help="horizon of poly (released)")
    text = "default: 120000, SYNTHIA 90000 (released), but at most --max-iters"
    g.add_argument("--stop-iters", type=count, help=text)
    g.add_argument("--lr", type=real, default=2.5e-4, help="SGD learning rate of G (paper)")
    g.add_argument("--lr-d", type=real, default=1e-4, help="Adam learning rate of D (paper)")
    g.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="weights and order")

    g = parser.add_argument_group("method")
    kinds = ("adversarial", "batchnorm", "none")
    text = "target images: aligned, through BatchNorm alone (the control), or unread"
    g.add_argument("--alignment", choices=kinds, default="adversarial", help=text)
    g.add_argument("--lambda-seg-main", type=real, default=1.0, help="weight of CE, main (paper)")
    g.add_argument("--lambda-seg-aux", type=real, default=0.1, help="weight of CE, aux (released)")
    g.add_argument("--lambda-adv-main", type=real, default=0.001, help="λ_adv, main head (paper)")
    g.add_argument("--lambda-adv-aux", type=real, default=0.0002, help="λ_adv, aux (released)")

    g = parser.add_argument_group("ranking")
    g.add_argument("--ratio", type=number(float, 0, 1), default=0.67, help="λ, easy share (paper)")
    text = "multiply R(X) by the rarity factor, which favours rare classes (paper)"
    g.add_argument("--normalize-entropy", action=on_off, default=False, help=text)

    g = parser.add_argument_group("network")
    g.add_argument("--init", default="imagenet", help="imagenet, none (random) or a weight file")
    g.add_argument("--layers", type=common.layers, default="3,4,23,3", help="blocks of each stage")
    g.add_argument("--width", type=number(int, 2, 1024), default=64, help="stem channels, also D's")
    text = "BatchNorm statistics in training (released)"
    g.add_argument("--bn", choices=("batch", "running"), default="batch", help=text)
    g.add_argument("--backbone-lr", choices=RECIPES, default="released", help="see D1")
    g.add_argument("--lr-head-mult", type=real, default=10.0, help="factor on heads' lr (released)")

    g = parser.add_argument_group("run")
    g.add_argument("--stage", choices=("1", "2", "3", "all"), default="all", help="what to run")
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
    if args.source_size is None:
        args.source_size = SOURCE_SIZES.get(args.source, args.target_size)
    if args.stop_iters is None:
        released = 90_000 if args.source == "synthia" else 120_000
        args.stop_iters = min(args.max_iters, released)
    check(args)
    # Flags of these groups make a run what it is (for stage 3 those of "ranking", too). The others
    # may change when it goes on.
    settings = {}
    for group in parser._action_groups:
        if group.title in ("data", "schedule", "method", "network"):
            for action in group._group_actions:
                settings[action.dest] = str(getattr(args, action.dest))
    return args, settings


def check(args):
    """Refuse what concerns more than one flag."""
    if args.stop_iters > args.max_iters:
        raise UserError(f"--stop-iters {args.stop_iters} is beyond --max-iters {args.max_iters}")
    if args.ckpt and args.stage != "2":
        raise UserError("--ckpt is the file that stage 2 ranks with: it needs --stage 2")
    if args.ranking and args.stage != "3":
        raise UserError("--ranking is for --stage 3, which trains on another run's ranking")
    if args.num_classes != 19 and (args.source != "folder" or args.target != "folder"):
        raise UserError("--num-classes other than 19 needs --source folder and --target folder")
    for side in ("source", "target"):
        if getattr(args, side) == "folder" and not getattr(args, f"{side}_root"):
            raise UserError(f"--{side} folder needs --{side}-root, which holds images/ and labels/")
    if args.source_root and args.target_root:
        if args.source_root.resolve() == args.target_root.resolve():
            raise UserError("--source-root and --target-root are one folder: name two folders")
    if args.source == args.target == "cityscapes" and args.alignment != "none":
        raise UserError("--source cityscapes is the target, too: its ceiling has --alignment none")
    resnet101 = args.layers == (3, 4, 23, 3) and args.width == 64
    if args.init == "imagenet" and not resnet101 and args.stage != "2":
        raise UserError("--init imagenet is a ResNet-101: it needs --layers 3,4,23,3 --width 64")
    if args.compile and args.checkpoint_activations:
        raise UserError("--compile and --checkpoint-activations exclude each other: drop one")


# ====================================================================== the method's maths


def self_information(logits: Tensor) -> Tensor:
    """Weighted self-information maps I = -P log P / log C (AdvEnt, 3.2).

    Logits (B,C,H,W) to (B,C,H,W) in [0, 1]. The sum over C is a pixel's normalised entropy (AdvEnt
    eq. 2). Finite, with finite gradient, for any logits.
    """
    log_p = logits.log_softmax(1)  # (B, C, H, W)
    return -log_p.exp() * log_p / math.log(logits.shape[1])


def pixel_entropy(logits: Tensor) -> Tensor:
    """Normalised entropy of every pixel: logits (B,C,H,W) to (B,H,W) in [0, 1]."""
    return self_information(logits).sum(1)


def discriminator(num_classes: int, width: int = 64) -> nn.Sequential:
    """D of AdvEnt: maps I (B,C,H,W) to domain logits (B,1,H/32,W/32), high for target."""
    channels = [num_classes, width, 2 * width, 4 * width, 8 * width]
    steps = []
    for i in range(4):
        steps.append(nn.Conv2d(channels[i], channels[i + 1], 4, stride=2, padding=1))
        steps.append(nn.LeakyReLU(0.2, inplace=True))
    steps.append(nn.Conv2d(channels[4], 1, 4, stride=2, padding=1))
    return nn.Sequential(*steps)


SOURCE = 0.0  # the discriminators' labels
TARGET = 1.0


def domain_loss(domain_logits: Tensor, domain: float) -> Tensor:
    """Binary cross-entropy of D's logits (any shape) with one domain label: float32, >= 0."""
    logits = domain_logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, domain))


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, mean over labelled pixels; 0 if there is none.

    logits (B,C,H,W), labels (B,H,W) int64 trainIds with 255 = ignore.
    """
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


# wall, fence, pole, light, sign, terrain, rider, truck, bus, train, motorcycle
RARE_CLASSES = (3, 4, 5, 6, 7, 9, 12, 14, 15, 16, 17)


def rarity_factor(classes: set) -> float:
    """(11 - r)/11 + 0.5 with r = rare classes among the predicted trainIds.

    Multiplied with R(X), it ranks images that are rich in rare classes as easier.
    """
    rare = len(classes.intersection(RARE_CLASSES))
    return (11 - rare) / 11 + 0.5


def easy_count(ratio: float, images: int) -> int:
    """floor(λN), exactly: as a float, 0.29 * 100 is 28.999..."""
    return int(Fraction(str(ratio)) * images)


# ====================================================================== stages 1 and 3


def train(args, settings, folder, source, target, validation, initial, device):
    """Train G on labelled `source` while aligning its entropy maps on `target` with the source's.

    source, target, validation: datasets; an empty target trains on source alone, validation None
    is never evaluated. settings {flag: text}: what a checkpoint to go on from must agree with.
    initial: content of a weight file, or None. Checkpoints and log go to `folder`.
    """
    iters = args.stop_iters  # of a poly schedule that would end at --max-iters
    torch.manual_seed(args.seed)
    G = common.DeepLabV2(args.num_classes, args.layers, args.width)
    report = common.load_weights(G, initial, args.init)
    D_main = discriminator(args.num_classes, args.width)
    D_aux = discriminator(args.num_classes, args.width)
    D = nn.ModuleDict({"main": D_main, "aux": D_aux})
    D.to(device, memory_format=torch.channels_last)
    G.to(device)
    G.checkpoint_activations = args.checkpoint_activations
    G.input_size = args.target_size
    g_params = [p for p in G.parameters() if p.requires_grad]
    g_groups = G.parameter_groups(args.backbone_lr, args.lr_head_mult)
    g_optimizer = torch.optim.SGD(g_groups, lr=args.lr, momentum=0.9, weight_decay=5e-4)
    d_optimizer = torch.optim.Adam(D.parameters(), lr=args.lr_d, betas=(0.9, 0.99))
    state = {
        "model": G,
        "discriminators": D,
        "g_optimizer": g_optimizer,
        "d_optimizer": d_optimizer,
    }

    start, _ = common.resume(folder, settings, state)
    targets = len(target) or "no"
    about = f"{len(source)} labelled images, {targets} target images, {report}"
    log = common.Log(folder, folder.name, about, start, iters, settings)
    stop_signal = common.StopSignal()
    source_batches = common.Batches(source, args.batch_size, start, iters, args.workers, device)
    batches = [source_batches]
    if target:
        target_batches = common.Batches(target, args.batch_size, start, iters, args.workers, device)
        batches.append(target_batches)

    common.set_mode(G, args.bn)
    if args.compile:
        G.compile(dynamic=False)  # in place: the names in checkpoints stay
    autocast = common.autocast(device, args.amp)
    information = common.compiled(self_information, args.compile)
    cross_entropy = common.compiled(segmentation_loss, args.compile)

    for it in range(start, iters + 1):
        # ---- once in a while: save, then evaluate; a run killed in between evaluates later
        stop = stop_signal.agreed()
        save_due = common.due(it, args.save_every, iters) or common.due(it, args.eval_every, iters)
        if it > start and (stop or save_due):
            common.save(folder / "last.pth", it, settings, state)
        if stop:
            sys.exit(128 + stop)
        if validation and common.due(it, args.eval_every, iters) and it not in log.evaluated:
            result = common.evaluate([G], validation, device, args.workers)
            if log.is_best(result):
                common.save(folder / "best.pth", it, settings, {"model": G})
            log.evaluation(it, result)
        if it == iters:
            break

        # ============================== the method ==============================
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
            S = G(common.normalize(x_s))
        size_s = (y_s.shape[2], y_s.shape[1])
        loss_seg_main = cross_entropy(common.upsample(S.main, size_s), y_s)
        loss_seg_aux = cross_entropy(common.upsample(S.aux, size_s), y_s)
        loss_seg = args.lambda_seg_main * loss_seg_main + args.lambda_seg_aux * loss_seg_aux
        loss_seg.backward()

        loss_adv_main = loss_adv_aux = loss_d_main = loss_d_aux = None
        if target:
            x_t, _ = next(target_batches)
        if target and args.alignment == "batchnorm":
            # The control: target images move BatchNorm's running statistics, and nothing else.
            with torch.no_grad(), autocast:
                G(common.normalize(x_t))
        elif target:
            # G on the target: D should take its maps for the source's (AdvEnt, 3.2).
            # L_adv = λ_main BCE(D(I_t), source) + λ_aux BCE(D(I_t), source)
            size_t = (x_t.shape[3], x_t.shape[2])
            with autocast:
                T = G(common.normalize(x_t))
            I_t_main = information(common.upsample(T.main, size_t))  # (B, C, H, W)
            I_t_aux = information(common.upsample(T.aux, size_t))
            with autocast:
                fooled_main = D_main(I_t_main)  # (B, 1, H/32, W/32)
                fooled_aux = D_aux(I_t_aux)
            loss_adv_main = domain_loss(fooled_main, SOURCE)
            loss_adv_aux = domain_loss(fooled_aux, SOURCE)
            loss_adv = args.lambda_adv_main * loss_adv_main + args.lambda_adv_aux * loss_adv_aux
            loss_adv.backward(inputs=g_params)  # through D, which stays as it is

            # D tells the domains apart, on detached maps (AdvEnt, 3.2), on both heads:
            # L_D = 1/2 BCE(D(I_s), source) + 1/2 BCE(D(I_t), target)
            I_s_main = information(common.upsample(S.main.detach(), size_s))
            I_s_aux = information(common.upsample(S.aux.detach(), size_s))
            with autocast:
                source_main = D_main(I_s_main)
                source_aux = D_aux(I_s_aux)
                target_main = D_main(I_t_main.detach())
                target_aux = D_aux(I_t_aux.detach())
            loss_d_main = (domain_loss(source_main, SOURCE) + domain_loss(target_main, TARGET)) / 2
            loss_d_aux = (domain_loss(source_aux, SOURCE) + domain_loss(target_aux, TARGET)) / 2
            (loss_d_main + loss_d_aux).backward()

        common.average_over_ranks(G, D)  # gradients and running statistics
        g_optimizer.step()
        if target and args.alignment == "adversarial":
            d_optimizer.step()
        # =========================== end of the method ===========================

        log.add(
            batches,
            loss_seg_main=loss_seg_main,
            loss_seg_aux=loss_seg_aux,
            loss_adv_main=loss_adv_main,
            loss_adv_aux=loss_adv_aux,
            loss_d_main=loss_d_main,
            loss_d_aux=loss_d_aux,
        )
        if common.due(it + 1, args.log_every, iters):
            log.losses(it + 1, device, lr=args.lr * decay)

    stop_signal.close()


# ====================================================================== stage 2: ranking


@common.predicting()
def rank_target(args, checkpoint: Path, images: dict, device):
    """Predict all target images once and write <out>/stage2/.

    labels/<name>.png: argmax of the main head at --target-size, no threshold, for every image.
    ranking.csv: name, entropy R(X) = mean of I over pixels and classes, normalized_entropy.
    ranking.json: which checkpoint, images and input size it was made from. gallery.png: the easiest
    and the hardest images. The folder appears when it is whole; a finished one stays.
    """
    folder = args.out / "stage2"
    if folder.exists():
        print(f"stage 2: already ranked, {folder / 'ranking.csv'}")
        return
    G = common.inference_copy(common.load(checkpoint)).to(device)
    C = G.num_classes
    if C != args.num_classes:
        wanted = f"--num-classes {args.num_classes}"
        raise UserError(f"{checkpoint} predicts {C} classes, not {wanted}: name another file")
    what = f"{len(images)} target images with {checkpoint}, {G.report}"
    print(f"stage 2: ranking {what}", flush=True)
    partial = args.out / "stage2.partial"
    dataset = common.Images(images, args.target_size)
    rows = {}
    for item in common.one_by_one(dataset, args.workers, device):
        name = item["name"]
        x = item["image"][None].to(device, non_blocking=True)
        logits = common.main_logits([G], x)  # (1, C, h, w)
        label = common.upsampled_argmax(logits, args.target_size)[0]  # (H, W)
        I_t = self_information(common.upsample(logits, args.target_size))  # (1, C, H, W)
        entropy = I_t.mean(dtype=torch.float64).item()
        factor = rarity_factor(set(label.unique().tolist())) if C == 19 else 1.0
        rows[name] = {"name": name, "entropy": entropy, "normalized_entropy": entropy * factor}
        common.write_png(partial / "labels" / f"{name}.png", label.cpu().numpy(), C)
    rows = common.merge_ranks(rows)  # when all ranks have written their labels
    if common.rank() == 0:
        ranked = sorted(rows.values(), key=lambda row: (row["entropy"], row["name"]))
        table = io.StringIO()
        writer = csv.DictWriter(table, ranked[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(ranked)
        common.write_text(partial / "ranking.csv", table.getvalue())
        about = {
            "checkpoint": os.path.relpath(checkpoint, args.out),
            "checkpoint_digest": common.content_digest([checkpoint]),
            "input_size": list(args.target_size),
            "num_classes": C,
            "images": common.fingerprint(images.values()),
            "content": ranking_content(partial, ranked),
        }
        common.write_text(partial / "ranking.json", json.dumps(about, indent=1) + "\n")
        ends = dict.fromkeys(row["name"] for row in ranked[:3] + ranked[-3:])  # each name once
        shown = [dataset.names.index(name) for name in ends]
        gallery = partial / "gallery.png"
        common.write_panel(gallery, {"prediction": G}, dataset, shown, device, pixel_entropy)
        with common.writing(folder):
            os.rename(partial, folder)
    common.barrier()


def ranking_content(folder: Path, rows: list) -> str:
    """A digest of the table and of all labels."""
    labels = [folder / "labels" / f"{row['name']}.png" for row in rows]
    return common.content_digest([folder / "ranking.csv", *labels])


def read_ranking(folder: Path, checkpoint, images: dict, num_classes: int, size: tuple) -> list:
    """The rows {name, entropy, normalized_entropy} of a ranking; refuses one that is damaged, of
    other images, classes or input size, or of another checkpoint than `checkpoint` (None: any; the
    file that it names, if it is still there, must not have changed)."""
    again = f"remove {folder} and run --stage 2 again"
    if not (folder / "ranking.csv").exists():
        raise UserError(f"no {folder / 'ranking.csv'}: run --stage 2, after removing any {folder}")
    try:
        about = json.loads((folder / "ranking.json").read_text())
        with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["entropy"] = float(row["entropy"])
            row["normalized_entropy"] = float(row["normalized_entropy"])
        content = ranking_content(folder, rows)
        named = folder.absolute().parent / about["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise UserError(f"{folder} is damaged or not whole ({error}): {again}")
    expected = {
        "content": content,
        "images": common.fingerprint(images.values()),
        "num_classes": num_classes,
        "input_size": list(size),
    }
    ranked_with = checkpoint or named
    if ranked_with.exists():
        expected["checkpoint_digest"] = common.content_digest([ranked_with])
    for entry, value in expected.items():
        if about.get(entry) != value:
            hint = f"give its flags and data, or {again}"
            raise UserError(f"{folder} changed, or is of another run (other {entry}): {hint}")
    return rows


def split(rows: list, ratio: float, normalized: bool) -> tuple:
    """(easy, hard) names: the floor(λN) of least entropy, the rest. Ties are broken by name."""
    key = "normalized_entropy" if normalized else "entropy"
    names = [row["name"] for row in sorted(rows, key=lambda row: (row[key], row["name"]))]
    count = easy_count(ratio, len(names))
    return names[:count], names[count:]


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
    stages = "123" if args.stage == "all" else args.stage
    checkpoint = args.ckpt or args.out / "stage1" / "last.pth"
    ranking = args.ranking or args.out / "stage2"
    C = args.num_classes

    if (args.out / "warmup").exists() or (args.out / "last.pth").exists():
        raise UserError(f"--out {args.out} holds a run of bcl.py: choose another --out")

    # What the stages need is looked at before anything is trained.
    target_root = common.dataset_root(args.target, args.data_root, args.target_root)
    images = common.list_images(args.target, target_root, "train")
    classes = common.dataset_classes(args.target, target_root, C)
    if args.normalize_entropy and classes != common.CLASSES:
        raise UserError("--normalize-entropy counts rare classes of Cityscapes: leave it out")
    aligned = {} if args.alignment == "none" else images  # what training reads without labels
    if aligned or "2" in stages:
        common.Images(images).look()
    if ("2" in stages or "3" in stages) and easy_count(args.ratio, len(images)) == 0:
        raise UserError(f"--ratio {args.ratio} of {len(images)} images leaves none easy: raise it")
    if args.stage == "2" and not checkpoint.is_file():
        raise UserError(f"no {checkpoint}: run --stage 1 first, or name a file with --ckpt")
    if "1" in stages or "3" in stages:
        initial, settings["init"] = common.initial_weights(args.init)
        validation = common.validation_set(args.target, target_root, C, args.target_size)
    if "1" in stages:
        source_root = common.dataset_root(args.source, args.data_root, args.source_root)
        pairs = common.list_pairs(args.source, source_root)
        source = common.Labelled(pairs, args.source, C, args.source_size, seed=args.seed)
        source.look()
        common.check_classes(args.source, source_root, args.target, target_root, C)
        files = [*source.files, *aligned.values()]
        settings_1 = {**settings, "images": common.fingerprint(files)}
        found = common.earlier_run(args.out / "stage1", settings_1) or {"iter": 0}
        if args.stage == "all" and found["iter"] < args.stop_iters and ranking.exists():
            raise UserError(f"{ranking} is there, but stage 1 is not finished: remove the folder")
    split_flags = {"ratio": str(args.ratio), "normalize_entropy": str(args.normalize_entropy)}
    settings_3 = {**settings, **split_flags}
    if args.stage == "2":  # easy.txt and hard.txt must stay those of the stage 3 beside them
        common.earlier_run(args.out / "stage3", split_flags)
    elif "3" in stages:
        common.earlier_run(args.out / "stage3", settings_3)

    runs = {}
    if "1" in stages:
        runs["stage 1"] = args.out / "stage1"
        target = common.Images(aligned, args.target_size, seed=args.seed + 1)
        train(args, settings_1, runs["stage 1"], source, target, validation, initial, device)
    if "2" in stages:
        rank_target(args, checkpoint, images, device)
    if "2" in stages or "3" in stages:
        ranked_with = checkpoint if "2" in stages else None
        rows = read_ranking(ranking, ranked_with, images, C, args.target_size)
        easy, hard = split(rows, args.ratio, args.normalize_entropy)
    if "2" in stages:
        if common.rank() == 0:  # for people: stage 3 computes the split
            common.write_text(ranking / "easy.txt", "".join(f"{name}\n" for name in easy))
            common.write_text(ranking / "hard.txt", "".join(f"{name}\n" for name in hard))
        print(f"stage 2: {len(easy)} easy and {len(hard)} hard images, {ranking / 'ranking.csv'}")
    if "3" in stages:
        labels = ranking / "labels"
        easy_set = common.Labelled(
            {name: (images[name], labels / f"{name}.png") for name in easy},
            "folder", C, args.target_size, pseudo=True, seed=args.seed,
        )  # fmt: skip
        hard_images = {name: images[name] for name in hard} if aligned else {}
        hard_set = common.Images(hard_images, args.target_size, seed=args.seed + 1)
        ranked = [ranking / "ranking.csv", ranking / "ranking.json"]
        settings_3["ranking"] = common.content_digest(ranked)
        runs["stage 3"] = args.out / "stage3"
        train(args, settings_3, runs["stage 3"], easy_set, hard_set, validation, initial, device)
    if runs and validation and common.rank() == 0:
        common.report(args.out, runs, validation, device, pixel_entropy)


if __name__ == "__main__":
    common.launch(main)
