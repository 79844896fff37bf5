"""Look at what was trained: scores, your own images, comparisons of runs, encoder features.

    python eval.py                                                  newest last.pth below runs/
    python eval.py --ckpt A.pth B.pth --data-root DIR               average of two, Cityscapes val
    python eval.py --ckpt A.pth --data-root DIR --label-ids ids     files for the official evaluator
    python eval.py --ckpt A.pth --data-root DIR --label-ids ids --split test     and for its server
    python eval.py --images photo.jpg DIR "*.png" --save-dir out    your own images, no labels
    python eval.py --compare runs --save-dir out                    one table over methods and seeds
    python eval.py --curves runs/intrada/stage1                     losses and mIoU of a run
    python eval.py --features out.npz --tsne                        encoder features of both domains

Checkpoints are ours or of the published kinds (AdvEnt, IntraDA, BCL, AdaptSegNet, single-level
DeepLab); the architecture is read off the file. The input is resized, the logits are upsampled to
the label's or the image's own size. --compare, --curves and --tsne draw with matplotlib, --tsne
also needs scikit-learn; nothing else does.

Not supported: averaging over scales or mirror images, several processes (torchrun).
"""

import argparse
import glob
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Subset

import common
from common import UserError

# --features reads at most so many images of a domain, spread over the set, ...
FEATURE_IMAGES = 500
# ... and keeps at most so many positions of a class and domain, drawn at random.
FEATURE_POINTS = 50
PANEL_ROWS = 6

# ====================================================================== arguments

NETWORK = {"--ckpt", "--branches", "--input-size", "--device", "--workers"}
DATA = {"--data-root", "--target", "--target-root", "--split"}
# The flag that asks for a job: the other flags which that job uses.
JOBS = {
    "--images": {"--save-dir", *NETWORK},
    "--compare": {"--save-dir"},
    "--curves": set(),
    "--features": {"--tsne", "--source", "--source-root", *DATA, *NETWORK},
}
LABELLED = {"--subset", "--save-dir", "--label-ids", "--panel", "--json", *DATA, *NETWORK}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists all flags)")


def size(text: str) -> tuple:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(s.isdecimal() and 32 <= int(s) <= 16384 for s in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: give WxH, at least 32x32, say 1024x512")
    return int(sides[0]), int(sides[1])


def workers(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 256):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 0 to 256")
    return int(text)


def parse() -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    g = parser.add_argument_group("jobs (none of these: score labelled images)")
    g.add_argument("--images", nargs="+", metavar="PATH", help="files, folders, globs to segment")
    g.add_argument("--compare", nargs="+", metavar="LOG", help="log.jsonl files, folders, globs")
    g.add_argument("--curves", type=Path, metavar="RUN", help="a log.jsonl or its folder")
    g.add_argument("--features", type=Path, metavar="NPZ", help="features of source and target")

    g = parser.add_argument_group("network")
    g.add_argument("--ckpt", type=Path, nargs="+", help="averaged; default: newest below runs/")
    g.add_argument("--branches", type=int, choices=(2, 4), default=4, help="2: AdaptSegNet's files")
    g.add_argument("--input-size", type=size, help="WxH; default: what the checkpoint says")

    g = parser.add_argument_group("data")
    g.add_argument("--data-root", type=Path, help="folder with Cityscapes/, ...; default: scenes")
    g.add_argument("--target", choices=common.TARGETS, default="cityscapes", help="labelled images")
    g.add_argument("--target-root", type=Path, help="the target's folder, if not below --data-root")
    g.add_argument("--split", choices=("train", "val", "test"), default="val", help="of the target")
    g.add_argument("--subset", type=Path, help="text file: an image name a line, the others go")
    g.add_argument("--source", choices=common.SOURCES, default="gta5", help="for --features")
    g.add_argument("--source-root", type=Path, help="the source's folder, if not below --data-root")

    g = parser.add_argument_group("output")
    g.add_argument("--save-dir", type=Path, help="folder of pictures, or of the comparison's files")
    g.add_argument("--label-ids", type=Path, help="folder of PNGs for Cityscapes' evaluator")
    g.add_argument("--panel", type=Path, help="one picture: images, labels, predictions")
    g.add_argument("--json", type=Path, help="all scores and the confusion (rows are labels)")
    g.add_argument("--tsne", action="store_true", help="draw --features beside the .npz")

    g = parser.add_argument_group("speed")
    g.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    g.add_argument("--workers", type=workers, default=2, help="processes that read images")
    args = parser.parse_args()
    check(args)
    return args


def check(args):
    """Refuse flags that the chosen job doesn't use, and what concerns more than one flag."""
    given = [text.split("=")[0] for text in sys.argv[1:] if text.startswith("--")]
    job = next((flag for flag in given if flag in JOBS), None)
    for flag in given:
        if flag != job and flag not in JOBS.get(job, LABELLED):
            raise UserError(f"{flag} is not used by {job or 'the scoring of images'}: leave it out")
    if args.images and not args.save_dir:
        raise UserError("--images writes several files per image: add --save-dir DIR")
    if args.features and args.features.suffix != ".npz":
        raise UserError(f"--features {args.features}: give a name that ends in .npz")
    if args.features and args.ckpt and len(args.ckpt) > 1:
        raise UserError("--features takes the encoder of one network: give one --ckpt")
    if args.target == "folder" and not args.target_root:
        raise UserError("--target folder needs --target-root, which holds images/ and labels/")
    if args.source == "folder" and not args.source_root:
        raise UserError("--source folder needs --source-root, which holds images/ and labels/")
    if args.label_ids and args.target == "folder":
        raise UserError("--label-ids are Cityscapes' ids: a plain folder has none, leave it out")
    if args.label_ids and args.split == "test" and (args.json or args.panel):
        raise UserError("--label-ids --split test reads no labels: leave --json and --panel out")


# ====================================================================== files


def expand(patterns: list, flag: str, wanted) -> list:
    """(folder or None, file) pairs of files, of folders (files below for which wanted(path) holds)
    and of globs that the shell left alone; a file that is named twice is taken once."""
    found = {}
    for pattern in patterns:
        matches = [pattern]
        if not os.path.exists(pattern):
            matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"{flag} {pattern} matches no file: check the path")
        for path in map(Path, matches):
            if path.is_dir():
                below = [file for file in sorted(path.rglob("*")) if file.is_file()]
                pairs = [(path, file) for file in below if wanted(file)]
                if not pairs and path == Path(pattern):
                    raise UserError(f"{flag} {path} holds no file that fits: check the folder")
            else:
                pairs = [(None, path)]
            for folder, file in pairs:
                found.setdefault(file.resolve(), (folder, file))
    return list(found.values())


def places(paths) -> set:
    """What must not be written: where these files lie, and where they point if they are links."""
    found = set()
    for path in paths:
        found.add(path.parent.resolve() / path.name)
        found.add(path.resolve())
    return found


def refuse_output(path: Path, inputs: set, folder: Path = None):
    """Refuse to write what is no regular file, is an input, or lies outside of `folder`."""
    place = path.parent.resolve() / path.name
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path} is no regular file: give another name to write to")
    if place in inputs or path.resolve() in inputs:
        raise UserError(f"{path} is an input and would be overwritten: write elsewhere")
    if folder and not place.is_relative_to(folder.resolve()):
        raise UserError(f"{path} lies outside of {folder}, through a link: write elsewhere")
    with common.writing(path):  # what would fail after hours fails now
        path.parent.mkdir(parents=True, exist_ok=True)


def matplotlib_figure(width: float, height: float):
    """A figure of this size in inches. Drawing needs no screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing this picture needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save_figure(path, figure):
    with common.atomic_write(path) as file:
        figure.savefig(file, format="png")


# ====================================================================== networks


def newest_checkpoint() -> Path:
    found = sorted(Path("runs").rglob("last.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no last.pth below runs/: train first, or name a file with --ckpt")
    return found[-1]


def load_networks(paths: list, branches: int, kind: str, device) -> list:
    """The networks of these files, for a dataset of this kind; reports what was loaded."""
    networks = []
    for path in paths:
        network = common.load(path)
        print(f"{path}: {network.report}")
        if networks and network.num_classes != networks[0].num_classes:
            counts = f"{network.num_classes} classes, {paths[0]} {networks[0].num_classes}"
            raise UserError(f"{path} predicts {counts}: only networks of like classes average")
        # AdaptSegNet's released head returns inside its loop: the other branches are untrained.
        network.layer6.conv2d_list = network.layer6.conv2d_list[:branches]
        networks.append(network.to(device))
    if kind != "folder" and networks[0].num_classes == 16:
        for network in networks:
            widen_head(network)
    return networks


def widen_head(network):
    """Turn SYNTHIA's 16 outputs into Cityscapes' 19, of which three never win."""
    for i, conv in enumerate(network.layer6.conv2d_list):
        weight = conv.weight.new_zeros(19, *conv.weight.shape[1:])
        bias = conv.bias.new_zeros(19)
        weight[list(common.SUBSET_16)] = conv.weight.detach()
        bias[list(common.SUBSET_16)] = conv.bias.detach()
        if i == 0:  # the branches are summed
            bias[[c for c in range(19) if c not in common.SUBSET_16]] = -1e4
        conv.weight = torch.nn.Parameter(weight)
        conv.bias = torch.nn.Parameter(bias)
    network.num_classes = 19
    network.report = None


def dataset_root(kind: str, own_root, data_root, source: str, other_root=None) -> Path:
    """Where a dataset lies; below the built-in scenes if no folder at all is named."""
    if own_root or data_root:
        return common.dataset_root(kind, data_root, own_root)
    if other_root or kind not in ("cityscapes", source):
        raise UserError(f"no folder is named for {kind}: give --data-root, or a root of its own")
    from demo.scenes import demo_scenes

    return common.dataset_root(kind, demo_scenes(source))


def pixel_entropy(logits: Tensor) -> Tensor:
    """Normalised entropy of every pixel: logits (B,C,H,W) to (B,H,W) in [0, 1]."""
    log_p = logits.log_softmax(1)  # (B, C, H, W)
    return -(log_p.exp() * log_p).sum(1) / math.log(logits.shape[1])
