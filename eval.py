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
the label's or the image's own size. --compare --save-dir, --curves and --tsne draw with
matplotlib, --tsne also needs scikit-learn; nothing else does.

Not supported: averaging over scales or mirror images, several processes (torchrun).
"""

import argparse
import functools
import glob
import importlib
import itertools
import json
import math
import os
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from torchvision.transforms.functional import pil_to_tensor

import common
from common import UserError, place

PANEL_ROWS = 6
FEATURE_IMAGES = 500  # read at most so many of a domain, spread over the set
FEATURE_POINTS = 50  # keep at most so many of a class and domain, drawn at random

# ====================================================================== arguments

NETWORK = {"--ckpt", "--branches", "--input-size", "--device", "--workers"}
DATA = {"--data-root", "--target", "--target-root", "--split"}
# The flag that asks for a job (None: to score labelled images): the other flags which that job uses
JOBS = {
    None: {"--subset", "--save-dir", "--label-ids", "--panel", "--json", *DATA, *NETWORK},
    "--images": {"--save-dir", *NETWORK},
    "--compare": {"--save-dir"},
    "--curves": set(),
    "--features": {"--tsne", "--source", "--source-root", *DATA, *NETWORK},
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists all flags)")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog="Defaults are in parentheses.", allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    g = parser.add_argument_group("jobs (none of these: score labelled images)")
    g.add_argument("--images", nargs="+", metavar="PATH", help="files, folders, globs to segment")
    g.add_argument("--compare", nargs="+", metavar="LOG", help="log.jsonl files, folders, globs")
    g.add_argument("--curves", type=place, metavar="RUN", help="a log.jsonl or its folder")
    g.add_argument("--features", type=place, metavar="NPZ", help="features of source and target")

    g = parser.add_argument_group("network")
    g.add_argument("--ckpt", type=place, nargs="+", help="averaged (newest last.pth below runs/)")
    text = "convolutions of a head, 2 for AdaptSegNet's files (%(default)s)"
    g.add_argument("--branches", type=int, choices=(2, 4), default=4, help=text)
    g.add_argument("--input-size", type=common.size, help="WxH (what the first checkpoint says)")
    g.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")

    g = parser.add_argument_group("data")
    g.add_argument("--data-root", type=place, help="folder with Cityscapes/, ... (built-in scenes)")
    g.add_argument("--target", choices=common.TARGETS, default="cityscapes", help="(%(default)s)")
    g.add_argument("--target-root", type=place, help="target folder, if not below --data-root")
    g.add_argument("--split", choices=("train", "val", "test"), default="val", help="(%(default)s)")
    g.add_argument("--subset", type=place, help="text file: an image name a line, the others go")
    g.add_argument("--source", choices=common.SOURCES, default="gta5", help="(%(default)s)")
    g.add_argument("--source-root", type=place, help="source folder, if not below --data-root")
    workers = common.number(int, 0, 256)
    g.add_argument("--workers", type=workers, default=2, help="reading processes (%(default)s)")

    g = parser.add_argument_group("output")
    g.add_argument("--save-dir", type=place, help="folder of pictures or of the comparison")
    g.add_argument("--label-ids", type=place, help="folder of PNGs for Cityscapes' evaluator")
    g.add_argument("--panel", type=place, help="one picture: images, labels, predictions")
    g.add_argument("--json", type=place, help="all scores and the confusion (rows are labels)")
    g.add_argument("--tsne", action="store_true", help="draw --features beside the .npz")
    args = parser.parse_args()
    given = [text.split("=")[0] for text in sys.argv[1:] if text.startswith("--")]
    job = next((flag for flag in given if flag in JOBS), None)
    for flag in given:
        if flag != job and flag not in JOBS[job]:
            raise UserError(f"{flag} is not used by {job or 'the scoring of images'}: leave it out")
    if args.images and not args.save_dir:
        raise UserError("--images writes several files per image: add --save-dir DIR")
    if args.features and args.features.suffix != ".npz":
        raise UserError(f"--features {args.features}: give a name that ends in .npz")
    if args.features and args.ckpt and len(args.ckpt) > 1:
        raise UserError("--features takes the encoder of one network: give one --ckpt")
    for side in ("source", "target"):
        if getattr(args, side) == "folder" and not getattr(args, f"{side}_root"):
            raise UserError(f"--{side} folder needs --{side}-root, which holds images/ and labels/")
    if args.label_ids and args.target == "folder":
        raise UserError("--label-ids are Cityscapes' ids: a plain folder has none, leave it out")
    if args.split == "test" and args.target == "cityscapes" and not args.label_ids:
        raise UserError("Cityscapes' test labels are dummies: use --split val, or add --label-ids")
    if args.split == "test" and args.label_ids and (args.json or args.panel):
        raise UserError("--label-ids --split test reads no labels: leave --json and --panel out")
    return args


# ====================================================================== files, networks, data


def expand(patterns: list, flag: str, endings: tuple) -> dict:
    """{file: folder} of files, of folders (the files below whose names end so; "/log.jsonl" is a
    whole name) and of globs that the shell left alone."""
    found = {}
    for pattern in patterns:
        matches = [pattern]
        if not os.path.exists(pattern):
            matches = sorted(glob.glob(pattern, recursive=True))
        own = {}
        for path in map(Path, matches):
            if path.is_file():
                own.setdefault(path, path.parent)
            for file in sorted(common.files_below(path)):
                if file.is_file() and f"/{file.name.lower()}".endswith(endings):
                    own.setdefault(file, path)
        if not own:
            raise UserError(f"{flag} {pattern}: no file that fits, check the path")
        for file, folder in own.items():
            found.setdefault(file, folder)
    return found


def refuse_outputs(outputs: list, inputs: list):
    """Refuse, before anything is computed, an output that is no regular file, an input or named
    twice; make the folders of the others. None is a flag that was not given."""
    taken = {path.resolve() for path in inputs if path}
    for path in filter(None, outputs):
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path} is no regular file: give another name to write to")
        if path.resolve() in taken:
            raise UserError(f"{path} is an input, or written twice: give another name to write to")
        taken.add(path.resolve())
        with common.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)


def library(module: str):
    """A module of matplotlib or scikit-learn, with which pictures are drawn."""
    try:
        importlib.import_module("matplotlib").rcParams["text.parse_math"] = False  # $ in names
        return importlib.import_module(module)
    except ImportError:
        raise UserError("drawing needs packages: pip install matplotlib scikit-learn") from None


def load_networks(args) -> tuple:
    """(networks on the device, their files, the device); says what was loaded."""
    device = common.set_up(args.device)
    trained = [path for path in common.files_below("runs") if path.name == "last.pth"]
    paths = args.ckpt or sorted(trained, key=os.path.getmtime)[-1:]
    if not paths:
        raise UserError("no last.pth below runs/: train first, or name a file with --ckpt")
    networks = [common.load(path) for path in paths]
    for path, network in zip(paths, networks):
        print(f"{path}: {network.report}")
        # AdaptSegNet's released head returns inside its loop: the other branches are untrained.
        network.layer6.conv2d_list = network.layer6.conv2d_list[: args.branches]
        # Published networks of 16 classes have SYNTHIA's; ours of 16 have those of a plain folder.
        published = network.report.kind != "our checkpoint"
        network.widened = published and network.num_classes == 16 and args.target != "folder"
        if network.widened:
            # 19 outputs, of which three never win (nor count in the entropy, apart from log 19):
            # these are appended to the 16, and all are put in the order of the trainIds
            network.num_classes = 19
            order = torch.tensor(common.SUBSET_16 + common.ABSENT["synthia"]).argsort()
            for conv in network.layer6.conv2d_list:
                conv.weight.data = F.pad(conv.weight.data, (0, 0, 0, 0, 0, 0, 0, 3))[order]
                conv.bias.data = F.pad(conv.bias.data, (0, 3), value=-1e30)[order]
        network.to(device)
    if len({(network.num_classes, network.widened) for network in networks}) > 1:
        counts = [network.num_classes for network in networks]
        raise UserError(f"--ckpt: networks of {counts} classes have no average, name like ones")
    return networks, paths, device


def find(list_files, args, domain: str, num_classes: int) -> tuple:
    """(what list_files says of the images of the "source" or "target", or of those that --subset
    names; their root). The built-in scenes if no folder is named. Refuses a dataset of other
    classes than the network's."""
    kind = getattr(args, domain)
    if kind != "folder" and num_classes != 19:
        roots = "give --target folder --target-root DIR (and --source, for --features)"
        raise UserError(f"the network predicts {num_classes} classes, {kind} has 19: {roots}")
    data_root = args.data_root
    if args.target == "cityscapes" and not (data_root or args.source_root or args.target_root):
        from demo.scenes import demo_scenes

        print("Built-in scenes. Real data: --data-root DIR")
        data_root = demo_scenes(args.source)
    root = common.dataset_root(kind, data_root, getattr(args, f"{domain}_root"))
    split = args.split if domain == "target" else "train"
    files = list_files(kind, root, split)
    if args.subset:
        wanted = {line.strip() for line in common.read_lines(args.subset)}
        chosen = [name for name in files if wanted & {name, name.split("/")[-1]}]
        if not chosen:
            first = next(iter(files))
            raise UserError(f"--subset {args.subset} names no image: give lines like {first}")
        files = {name: files[name] for name in chosen}
    return files, root


def open_labelled(args, domain: str, network: common.DeepLabV2) -> common.Labelled:
    """The labelled images of a domain at the network's input size, after a look at a few."""
    pairs, root = find(common.list_pairs, args, domain, network.num_classes)
    size = args.input_size or network.input_size
    return common.to_evaluate(pairs, getattr(args, domain), root, network.num_classes, size)


# ====================================================================== labelled images

KINDS = ("trainids", "entropy", "overlay")  # of pictures below --save-dir


def plan_outputs(names, kinds: tuple, save_dir, label_ids, others: list, inputs: list) -> dict:
    """{name: {kind: path}} of the pictures in save_dir and the ids in label_ids (folders, or None).
    Refuses these paths, and `others`, if they are inputs or lie outside of their folder."""
    plan = {name: {} for name in names}
    outputs = [*others]
    for name, paths in plan.items():
        if save_dir:
            for kind in kinds:
                paths[kind] = save_dir / f"{name}_{kind}.png"
            folder = paths["trainids"].parent
            if not folder.resolve().is_relative_to(save_dir.resolve()):
                raise UserError(f"{folder} is a link out of {save_dir}: write elsewhere")
        if label_ids:
            paths["ids"] = label_ids / f"{name.split('/')[-1]}_pred_labelIds.png"
        outputs += paths.values()
    refuse_outputs(outputs, inputs)
    return plan


def write_pictures(plan: dict, name: str, logits: Tensor, prediction: Tensor, photo=None):
    """Write the planned pictures of an image: trainids with a palette, entropy (black 0, white 1),
    overlay on the photo, Cityscapes' ids. From logits (1,C,h,w), prediction (H,W) and, for an
    overlay, the photo as a Pillow image."""
    paths = plan[name]
    num_classes = logits.shape[1]
    trainids = prediction.cpu().numpy()
    if "trainids" in paths:
        common.write_png(paths["trainids"], trainids, num_classes)
        entropy = pixel_entropy(logits, trainids.shape[::-1])[0]
        common.write_png(paths["entropy"], common.grey(entropy))
    if "overlay" in paths:
        overlay = (np.asarray(photo, np.uint16) + common.palette(num_classes)[trainids]) // 2
        common.write_png(paths["overlay"], overlay.astype(np.uint8))
    if "ids" in paths:
        ids = np.array(common.CITYSCAPES_IDS, dtype=np.uint8)[trainids]
        common.write_png(paths["ids"], ids)


def pixel_entropy(logits: Tensor, size: tuple = None) -> Tensor:
    """Normalised entropy (B,H,W) in [0, 1] of logits (B,C,h,w), upsampled to `size` (W,H) if given;
    class by class, as the (C,H,W) map of a large photo would fill the memory."""
    num_classes, height, width = logits.shape[1:]
    logits = logits - logits.amax(1, keepdim=True)  # exp can't overflow; P stays what it is
    total = 0
    weighted = 0
    for c in range(num_classes):
        z = common.upsample(logits[:, c : c + 1], size or (width, height))[:, 0]  # (B, H, W)
        exp = z.exp()
        total = total + exp
        weighted = weighted + exp * z
    # -sum P log P with P = exp(z) / total. Midway between positions whose logits differ by over
    # 140, exp is 0 for every class, and the entropy reads 0.
    total = total.clamp(min=1e-30)
    return (total.log() - weighted / total).clamp(0, math.log(num_classes)) / math.log(num_classes)


def column_titles(paths: list) -> list:
    """The part of each path in which they differ: stage1 and stage3 of runs/a/stage*/last.pth."""
    parts = [path.parts for path in paths]
    start = len(os.path.commonprefix(parts))
    tail = len(os.path.commonprefix([part[::-1] for part in parts]))
    titles = ["/".join(part[start : len(part) - tail]) or part[-1] for part in parts]
    if len(set(titles)) < len(titles):
        return [str(path) for path in paths]
    return titles


def score_images(args):
    """Score checkpoints on labelled images."""
    networks, paths, device = load_networks(args)
    dataset = open_labelled(args, "target", networks[0])
    outputs = [args.json, args.panel]
    inputs = [*paths, *dataset.files, args.subset]
    plan = plan_outputs(dataset.names, KINDS[:2], args.save_dir, args.label_ids, outputs, inputs)
    write = functools.partial(write_pictures, plan)
    result = common.evaluate(networks, dataset, device, args.workers, write)
    if networks[0].widened:  # three classes are never predicted
        del result["miou19"]
        for c in common.ABSENT["synthia"]:
            result["iou"][common.CLASSES[c]] = None
    width, height = dataset.size
    print(f"\nIoU in percent, {args.target} {args.split}, input {width}x{height}:")
    print(common.score_table({"IoU": result}))
    print(f"{result['images']} images, {result['images'] / result['seconds']:.2f} images/s")
    if args.panel:
        columns = {}
        for title, network in zip(column_titles(paths), networks):
            columns[title] = common.inference_copy(network)
        rows = common.spread(len(dataset), PANEL_ROWS)
        common.write_panel(args.panel, columns, dataset, rows, device, pixel_entropy)
    if args.json:
        result["confusion"] = result["confusion"].tolist()
        about = {"ckpt": [str(path) for path in paths], "input_size": dataset.size}
        about.update(target=args.target, split=args.split, subset=args.subset and str(args.subset))
        common.write_text(args.json, json.dumps({**about, **result}, indent=1) + "\n")


# ====================================================================== images without labels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")


def find_images(patterns: list) -> dict:
    """{name: path}: the path below a named folder, or the file's own name, without its suffix. A
    second image of one name gets _2. Pictures that an earlier call wrote are left out."""
    found = {}
    for path, folder in expand(patterns, "--images", SUFFIXES).items():
        stem = path.stem.rpartition("_")[0]
        results = [path.with_name(f"{stem}_{kind}.png") for kind in KINDS]
        if path in results and all(result.is_file() for result in results[:2]):
            continue
        name = path.relative_to(folder).as_posix().removesuffix(path.suffix)
        if name in found:
            while name in found:
                name += "_2"
            print(f"{path} is written as {name}")
        found[name] = path
    if not found:
        raise UserError("--images: these are all results of this script, name other images")
    return found


class Photos(common.Images):
    """Items are (photo as RGB Pillow image, network input (3,h,w) uint8), or a file's error.
    Reads what cameras and tools write. The input has `size`, or without one the photo's own aspect
    and as many pixels as `area` (W,H)."""

    area = (1024, 512)

    def __getitem__(self, index: int):
        path = self.paths[index]
        try:
            photo = common.open_image(path, FORMATS)
            if photo.mode.startswith("I"):  # 16-bit grey, which convert would cut off at 255
                grey = np.asarray(common.upright(photo)) // 256
                photo = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            photo = common.upright_rgb(photo, path)
        except UserError as error:
            return str(error)
        size = self.size or common.same_area(photo.size, self.area)
        return photo, pil_to_tensor(common.resize(photo, size, "image"))


def segment_images(args):
    """Predict --images, or with --label-ids those of --split test, whose labels are never read. A
    file that cannot be read is named and left out: exit status 2."""
    networks, paths, device = load_networks(args)
    if args.images:
        images = find_images(args.images)
    else:
        images, _ = find(common.list_images, args, "target", networks[0].num_classes)
    inputs = [*paths, *images.values(), args.subset]
    plan = plan_outputs(images, KINDS, args.save_dir, args.label_ids, [], inputs)
    networks = [common.inference_copy(network) for network in networks]
    torch.backends.cudnn.benchmark = False  # which would look at every new size of photo
    photos = Photos(images, args.input_size)
    photos.area = networks[0].input_size
    if not args.images:  # all of one dataset, seen as evaluation sees it
        photos.size = args.input_size or photos.area
    errors = []
    for name, item in zip(images, common.one_by_one(photos, args.workers, device)):
        if isinstance(item, str):
            errors.append(item)
            print(f"left out: {item}")
            continue
        photo, image = item
        with common.predicting():
            logits = common.main_logits(networks, image[None].to(device))
            prediction = common.upsampled_argmax(logits, photo.size)[0]
        write_pictures(plan, name, logits, prediction, photo)
    print(f"{len(images) - len(errors)} images, in {args.save_dir or args.label_ids}")
    if errors:
        raise UserError(f"{len(errors)} of {len(images)} images could not be read: {errors[0]}")


# ====================================================================== comparison and curves


def add_run(rows: dict, path: Path):
    """Add a run to the row of those that differ from it by seed alone. A UserError says why it is
    left out; another error, that the file is no log of ours."""
    records = common.read_log(path)
    start = [record for record in records if record.get("event") == "start"][-1]
    evaluations = common.evaluations(records)
    reached = max(record["iter"] for record in records)
    if reached < start["iters"]:
        raise UserError(f"stopped at iteration {reached} of {start['iters']}")
    if not evaluations or evaluations[-1]["iter"] < start["iters"]:
        raise UserError("was not evaluated at its end")
    settings = start["settings"]
    names = list(evaluations[-1]["iou"])
    absent = [names[c] for c in common.ABSENT.get(settings.get("source"), ())]
    iou = {name: value for name, value in evaluations[-1]["iou"].items() if name not in absent}
    means = [record[f"miou{len(iou)}"] or 0.0 for record in evaluations]
    seed = settings.pop("seed")
    settings.pop("ranking", None)  # a digest of its stage 1's results: other for every seed
    if len(str(settings.get("init"))) == 16:  # a digest, too
        settings["init"] = "file"
    shared = {"stage": start["stage"], "settings": settings, "classes": list(iou)}
    empty = {"seed": [], "last": [], "best": [], "iou": []}
    row = rows.setdefault(json.dumps(shared, sort_keys=True), {**shared, **empty})
    if seed in row["seed"]:
        raise UserError("has the settings and seed of a newer run")
    row["seed"].append(seed)
    row["last"].append(means[-1])
    row["best"].append(max(means))
    row["iou"].append(list(iou.values()))


def group_runs(paths: list) -> list:
    """A row for the runs that differ by seed alone: what they share ("stage", "settings",
    "classes"), lists of what is their own ("seed", "last", "best", "iou"), and "label": the stage,
    and settings that no more than half of that stage's rows have."""
    rows = {}
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        try:
            add_run(rows, path)
        except UserError as error:
            print(f"left out: {path} {error}")
        except (AttributeError, LookupError, OSError, TypeError, ValueError):
            print(f"left out: {path} is no log of a training run")
    if not rows:
        raise UserError("--compare: none of these runs ended with an evaluation, train on first")
    for row in rows.values():
        peers = [other["settings"] for other in rows.values() if other["stage"] == row["stage"]]
        row["label"] = str(row["stage"])
        for name, value in row["settings"].items():
            values = [peer.get(name) for peer in peers]
            if 2 * values.count(value) <= len(peers):
                row["label"] += f" {name}={value}"
    return sorted(rows.values(), key=lambda row: (row["classes"], row["label"]))


def as_text(values) -> str:
    """Mean ± sample standard deviation, leaving out None."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.1f}"
    return f"{statistics.fmean(known):.1f} ± {statistics.stdev(known):.1f}"


def compare_runs(args):
    """Print two Markdown tables for every set of classes: the means, and the IoU of every class.
    With --save-dir write compare.md, compare.json and compare.png."""
    paths = list(expand(args.compare, "--compare", ("/log.jsonl",)))
    rows = group_runs(paths)
    text = "Percent, mean ± sample standard deviation over seeds. A run is named by the settings\n"
    text += "that no more than half of its stage's runs have. Runs that start from different\n"
    text += "files count as seeds of one.\n"
    for classes, members in itertools.groupby(rows, key=lambda row: row["classes"]):
        means = [["", "run", "seeds", f"mIoU {len(classes)}, last", "best (oracle)"], ["---"] * 5]
        columns = [["last, IoU of", "---", *classes]]
        for i, row in enumerate(members, 1):
            scores = [as_text(row["last"]), as_text(row["best"])]
            means.append([str(i), row["label"], str(len(row["seed"])), *scores])
            columns.append([str(i), "---", *map(as_text, zip(*row["iou"]))])
        for table in (means, zip(*columns)):
            text += "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    print(text)
    if not args.save_dir:
        return
    size = (10, 1 + 0.35 * len(rows))
    figure = library("matplotlib.figure").Figure(size, layout="constrained")
    outputs = [args.save_dir / f"compare.{suffix}" for suffix in ("md", "json", "png")]
    refuse_outputs(outputs, paths)
    common.write_text(outputs[0], text)
    common.write_text(outputs[1], json.dumps(rows, indent=1) + "\n")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        axes.plot(row["last"], [i] * len(row["last"]), "o", color="tab:blue")
    axes.set_yticks(range(len(rows)), [row["label"][:60] for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel("mIoU of the last checkpoint in percent, a dot for each seed")
    with common.atomic_write(outputs[2]) as file:
        figure.savefig(file)
    print(f"in {args.save_dir}: compare.md, compare.json, compare.png")


def draw_curves(args):
    """Losses and mIoU of a run over its iterations, to curves.png beside its log.jsonl."""
    log = args.curves
    if log.is_dir():
        log = log / "log.jsonl"
    points = {}  # name to [(iteration, value), ...]
    for record in common.read_log(log):
        for name, value in record.items():
            finite = isinstance(value, (int, float)) and abs(value) < 1e300
            if finite and name.startswith(("loss_", "miou")):
                points.setdefault(name, []).append((record["iter"], value))
    if not points:
        raise UserError(f"{log} holds no losses and no scores yet: train on first")
    output = log.parent / "curves.png"
    refuse_outputs([output], [log])
    figure = library("matplotlib.figure").Figure((9, 6), layout="constrained")
    losses, scores = figure.subplots(2, sharex=True)
    losses.set_yscale("symlog", linthresh=1e-3)  # terms of very different size, some exactly 0
    losses.set_ylabel("losses, not weighted")
    scores.set_ylabel("percent")
    scores.set_xlabel("iteration")
    for name, curve in points.items():
        axes = scores if name.startswith("miou") else losses
        axes.plot(*zip(*curve), ".-", label=name)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    with common.atomic_write(output) as file:
        figure.savefig(file)
    print(f"in {output}")


# ====================================================================== features


@common.predicting()
def sample_features(network, dataset: common.Labelled, workers: int, domain: int, device) -> tuple:
    """(features (N,D), label (N,), domain (N,), is_prototype (N,)) of one domain. At most
    FEATURE_POINTS of a class, every position as likely as any other, and then the prototypes, each
    the mean over all positions of a class."""
    generator = torch.Generator().manual_seed(domain)
    C = dataset.num_classes
    D = 32 * network.width
    total = torch.zeros(C, D, dtype=torch.float64)
    count = torch.zeros(C, 1)
    # Every position draws a number. The positions with a class's largest numbers stay.
    draws = [torch.zeros(0)] * C
    points = [torch.zeros(0, D)] * C
    images = Subset(dataset, common.spread(len(dataset), FEATURE_IMAGES))
    for item in common.one_by_one(images, workers, device):
        x = common.normalize(item["image"][None].to(device))
        maps = network(x).features[0].cpu()  # (D, h, w)
        y = common.pick(item["label"][None], *maps.shape[1:]).flatten()  # (hw,)
        f = maps.flatten(1).T  # (hw, D)
        for c in range(C):
            own = f[y == c]
            total[c] += own.double().sum(0)
            count[c] += len(own)
            drawn = torch.cat([draws[c], torch.rand(len(own), generator=generator)])
            draws[c], best = drawn.topk(min(FEATURE_POINTS, len(drawn)))
            points[c] = torch.cat([points[c], own])[best]
    present = np.flatnonzero(count)
    prototypes = (total[present] / count[present]).float()
    features = torch.cat([*points, prototypes]).numpy()
    of_points = np.repeat(np.arange(C), [len(own) for own in points])
    is_prototype = np.repeat([False, True], [len(of_points), len(present)])
    label = np.concatenate([of_points, present])
    return features, label, np.full(len(label), domain), is_prototype


def write_features(args):
    """The .npz: features (N,D) float32, label (N,), domain (N,) 0 source (train) or 1 target
    (--split), is_prototype (N,) bool, names (C,). With --tsne a picture of the same name."""
    picture = args.features.with_suffix(".png")
    if args.tsne:
        figure = library("matplotlib.figure").Figure((11, 8), layout="constrained")
        TSNE = library("sklearn.manifold").TSNE
    networks, paths, device = load_networks(args)
    source = open_labelled(args, "source", networks[0])
    target = open_labelled(args, "target", networks[0])
    if source.classes != target.classes:
        raise UserError("--source and --target have other classes: align their classes.txt")
    refuse_outputs([args.features, picture], [*paths, *source.files, *target.files])

    network = common.inference_copy(networks[0])
    parts = [
        sample_features(network, source, args.workers, 0, device),
        sample_features(network, target, args.workers, 1, device),
    ]
    features, label, domain, is_prototype = map(np.concatenate, zip(*parts))
    if not len(label):
        raise UserError("--features: no position of the maps has a class, name other images")
    found = {"features": features, "label": label, "domain": domain, "is_prototype": is_prototype}
    with common.atomic_write(args.features) as file:
        np.savez(file, names=np.array(source.classes), **found)
    print(f"{args.features}: {len(label)} features and prototypes")
    if not args.tsne:
        return

    unit = F.normalize(torch.from_numpy(features), dim=1).numpy()  # as in the losses
    perplexity = min(30, (len(unit) - 1) / 3)
    xy = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)
    axes = figure.subplots()
    for c in np.unique(label):
        colour = common.palette(len(source.classes))[c] / 255
        axes.scatter([], [], color=colour, label=source.classes[c])  # the legend's entry
        for side, marker in enumerate("oX"):
            own = (label == c) & (domain == side)
            sizes = np.where(is_prototype[own], 150, 20)
            axes.scatter(*xy[own].T, s=sizes, color=colour, marker=marker, edgecolors="none")
    axes.set_title("t-SNE of encoder features: source o, target x, prototypes large")
    axes.set_axis_off()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    with common.atomic_write(picture) as file:
        figure.savefig(file)
    print(f"t-SNE in {picture}")


def main():
    args = parse()
    if "LOCAL_RANK" in os.environ:
        raise UserError("eval.py is one process: start it without torchrun")
    if args.compare:
        compare_runs(args)
    elif args.curves:
        draw_curves(args)
    elif args.features:
        write_features(args)
    elif args.images or (args.label_ids and args.split == "test"):
        segment_images(args)
    else:
        score_images(args)


if __name__ == "__main__":
    common.launch(main)
