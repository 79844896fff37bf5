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
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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


class Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help
        return f"{action.help} [%(default)s]"


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists all flags)")


def size(text: str) -> tuple:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(s.isdecimal() and 32 <= int(s) <= 4096 for s in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: give WxH, sides of 32 to 4096, say 1024x512")
    return int(sides[0]), int(sides[1])


def workers(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 256):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 0 to 256")
    return int(text)


def parse() -> argparse.Namespace:
    parser = Parser(
        usage="%(prog)s [flags]",
        description=__doc__,
        formatter_class=Help,
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
    for side in ("source", "target"):
        if getattr(args, side) == "folder" and not getattr(args, f"{side}_root"):
            raise UserError(f"--{side} folder needs --{side}-root, which holds images/ and labels/")
    one_root = (args.source_root is None) != (args.target_root is None)
    if args.features and one_root and not args.data_root:
        raise UserError("--features needs both --source-root and --target-root, or --data-root")
    if args.label_ids and args.target == "folder":
        raise UserError("--label-ids are Cityscapes' ids: a plain folder has none, leave it out")
    dummies = args.split == "test" and args.target == "cityscapes"
    if dummies and not args.label_ids and not args.images:
        raise UserError("Cityscapes' test labels are dummies: use --split val, or add --label-ids")
    if args.label_ids and args.split == "test" and (args.json or args.panel):
        raise UserError("--label-ids --split test reads no labels: leave --json and --panel out")


# ====================================================================== files


def expand(patterns: list, flag: str, wanted) -> list:
    """(folder, file) pairs of files, of folders (files below for which wanted(path) holds) and of
    globs that the shell left alone. A file that is named twice is taken once."""
    found = {}
    for pattern in patterns:
        matches = [pattern]
        if not os.path.exists(pattern):
            matches = sorted(glob.glob(pattern, recursive=True))
        pairs = []
        for path in map(Path, matches):
            if path.is_dir():
                below = [file for file in sorted(path.rglob("*")) if file.is_file()]
                pairs += [(path, file) for file in below if wanted(file)]
            else:
                pairs.append((path.parent, path))
        if not pairs:
            raise UserError(f"{flag} {pattern}: no file that fits, check the path")
        for folder, file in pairs:
            found.setdefault(file.resolve(), (folder, file))
    return list(found.values())


def refuse_outputs(outputs: list, inputs: list, folder: Path = None):
    """Before anything is done, refuse to write what is no regular file, is an input, or lies
    outside of `folder` (through a link)."""

    def place(path):
        return path.parent.resolve() / path.name

    taken = {place(path) for path in inputs} | {path.resolve() for path in inputs}
    if len(set(map(place, outputs))) < len(outputs):
        raise UserError(f"{outputs[-1]} would be written twice: give each output a name of its own")
    for path in outputs:
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path} is no regular file: give another name to write to")
        if place(path) in taken or path.resolve() in taken:
            raise UserError(f"{path} is an input and would be overwritten: write elsewhere")
        if folder and not place(path).is_relative_to(folder.resolve()):
            raise UserError(f"{path} lies outside of {folder}, through a link: write elsewhere")
        with common.writing(path):
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


def load_networks(args) -> tuple:
    """(networks on the device, their files, input size (W,H), device); says what was loaded."""
    device = common.set_up(args.device)
    paths = args.ckpt or [newest_checkpoint()]
    networks = []
    for path in paths:
        network = common.load(path)
        print(f"{path}: {network.report}")
        if networks and network.num_classes != networks[0].num_classes:
            counts = f"{network.num_classes} classes, {paths[0]} {networks[0].num_classes}"
            raise UserError(f"{path} predicts {counts}: only networks of like classes average")
        # AdaptSegNet's released head returns inside its loop: the other branches are untrained.
        network.layer6.conv2d_list = network.layer6.conv2d_list[: args.branches]
        networks.append(network)
    for network in networks:
        # Published networks of 16 classes have SYNTHIA's; ours of 16 have those of a plain folder.
        published = network.report.kind != "our checkpoint"
        network.widened = published and network.num_classes == 16 and args.target != "folder"
        if network.widened:
            widen(network)
        network.to(device)
    return networks, paths, args.input_size or networks[0].input_size, device


def widen(network):
    """Give a network of SYNTHIA's 16 classes Cityscapes' 19 outputs, of which three never win (nor
    count in the entropy, apart from log 19)."""
    places = torch.nn.Conv2d(16, 19, 1)
    places.weight.data.zero_()
    places.bias.data.fill_(-1e30)
    for i, c in enumerate(common.SUBSET_16):
        places.weight.data[c, i] = 1
        places.bias.data[c] = 0
    network.layer6 = torch.nn.Sequential(network.layer6, places)
    network.num_classes = 19


def dataset_root(kind: str, own_root, data_root, source: str) -> Path:
    """Where a dataset lies; below the built-in scenes if no folder is named."""
    if own_root or data_root:
        return common.dataset_root(kind, data_root, own_root)
    if kind not in ("cityscapes", source):
        raise UserError(f"no folder is named for {kind}: give --data-root or --target-root")
    from demo.scenes import demo_scenes

    return common.dataset_root(kind, demo_scenes(source))


def open_labelled(kind: str, root: Path, split: str, num_classes: int, size: tuple, subset=None):
    """The labelled images of a dataset, labels at native size, after a look at a few of them."""
    if kind != "folder" and num_classes != 19:
        roots = "give --target folder --target-root DIR (and --source, for --features)"
        raise UserError(f"the network predicts {num_classes} classes, {kind} has 19: {roots}")
    pairs = select(common.list_pairs(kind, root, split), subset)
    classes = common.folder_classes(root, num_classes) if kind == "folder" else None
    dataset = common.Labelled(pairs, kind, num_classes, size, native_labels=True, classes=classes)
    dataset.look()
    return dataset


def select(files: dict, subset) -> dict:
    """The entries whose name, or last part of it, is a line of the file `subset`; all without."""
    if subset is None:
        return files
    try:
        lines = subset.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --subset {subset} ({error}): give a name a line") from None
    wanted = {line.strip() for line in lines}
    chosen = {}
    for name, entry in files.items():
        if name in wanted or name.split("/")[-1] in wanted:
            chosen[name] = entry
    if not chosen:
        raise UserError(f"--subset {subset} names none of the {len(files)} images")
    print(f"--subset {subset}: {len(chosen)} of {len(files)} images")
    return chosen


def pixel_entropy(logits: Tensor, size: tuple = None) -> Tensor:
    """Normalised entropy (B,H,W) in [0, 1] of logits (B,C,h,w), upsampled to `size` (W,H) if given.

    Class by class: the (C,H,W) map of a large photo would fill the memory."""
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


# ====================================================================== labelled images


def column_titles(paths: list) -> list:
    """The part of each path in which they differ: stage1 and stage3 of runs/a/stage*/last.pth."""
    if len(paths) == 1:
        return ["prediction"]
    parts = [list(path.parts) for path in paths]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({path[end] for path in parts}) == 1:
            for path in parts:
                path.pop(end)
    return ["/".join(path) for path in parts]


def write_maps(folder: Path, name: str, logits: Tensor, prediction: Tensor, num_classes: int):
    """NAME_trainids.png, coloured by its palette, and NAME_entropy.png (black 0, white 1)."""
    entropy = pixel_entropy(logits, (prediction.shape[1], prediction.shape[0]))[0]
    trainids = prediction.cpu().numpy()
    common.write_png(folder / f"{name}_trainids.png", trainids, common.palette_for(num_classes))
    common.write_png(folder / f"{name}_entropy.png", common.grey(entropy))


def pictures(folder: Path, names, kinds: tuple) -> list:
    return [folder / f"{name}_{kind}.png" for name in names for kind in kinds]


def label_id_path(folder: Path, name: str) -> Path:
    return folder / f"{name.split('/')[-1]}_pred_labelIds.png"


def score_images(args):
    """Score checkpoints on labelled images; with --label-ids --split test only predict."""
    networks, paths, input_size, device = load_networks(args)
    num_classes = networks[0].num_classes
    root = dataset_root(args.target, args.target_root, args.data_root, args.source)
    if args.label_ids and num_classes != 19:
        raise UserError(f"--label-ids needs Cityscapes' 19 classes, the network has {num_classes}")
    predict_only = args.label_ids and args.split == "test"
    if predict_only:  # the labels of Cityscapes' test images are dummies
        images = select(common.list_images(args.target, root, args.split), args.subset)
        dataset = Photos(images, input_size)
    else:
        dataset = open_labelled(args.target, root, args.split, num_classes, input_size, args.subset)

    inputs = [*paths, *dataset.files()]
    if args.subset:
        inputs.append(args.subset)
    refuse_outputs([path for path in (args.json, args.panel) if path], inputs)
    if args.save_dir:
        outputs = pictures(args.save_dir, dataset.names, ("trainids", "entropy"))
        refuse_outputs(outputs, inputs, args.save_dir)
    if args.label_ids:
        outputs = [label_id_path(args.label_ids, name) for name in dataset.names]
        refuse_outputs(outputs, inputs, args.label_ids)
        output, count = Counter(outputs).most_common(1)[0]
        if count > 1:
            raise UserError(f"--label-ids: {count} images would be {output}, use --subset")

    def write_files(name, logits, prediction, photo=None):
        if args.save_dir:
            write_maps(args.save_dir, name, logits, prediction, num_classes)
        if args.label_ids:
            ids = np.array(common.CITYSCAPES_IDS, dtype=np.uint8)[prediction.cpu().numpy()]
            common.write_png(label_id_path(args.label_ids, name), ids)

    if predict_only:
        errors = predict_photos(networks, dataset, device, args.workers, write_files)
        count = len(dataset) - len(errors)
        print(f"{count} images of {args.target} {args.split}, in {args.label_ids}")
        report_errors(errors)
        return
    result = common.evaluate(networks, dataset, device, args.workers, write_files)
    if networks[0].widened:  # three classes are never predicted
        del result["miou19"]
        for c in common.ABSENT["synthia"]:
            result["iou"][common.CLASSES[c]] = None
    width, height = input_size
    print(f"\nIoU in percent, {args.target} {args.split}, input {width}x{height}:")
    print(common.score_table({"IoU": result}))
    print(f"{result['images']} images, {result['images'] / result['seconds']:.2f} images/s")
    if args.panel:
        columns = dict(zip(column_titles(paths), networks))
        rows = common.spread(len(dataset), PANEL_ROWS)
        common.write_panel(args.panel, columns, dataset, rows, input_size, device, pixel_entropy)
    if args.json:
        result["confusion"] = result["confusion"].tolist()
        about = {"ckpt": [str(path) for path in paths], "input_size": input_size}
        common.write_text(args.json, json.dumps({**about, **result}, indent=1) + "\n")


# ====================================================================== your images

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")


class Photos(common.Images):
    """Images as cameras and tools write them: {"name", "photo": (H,W,3) uint8 upright, "image":
    (3,h,w) the network's input}, or {"name", "error"} for a file that cannot be read.

    The input has the size `size` (W,H), or with keep_aspect the photo's own aspect and that area.
    """

    def __init__(self, images: dict, size: tuple, keep_aspect: bool = False):
        super().__init__(images, size)
        self.keep_aspect = keep_aspect

    def open(self, index: int) -> tuple:
        path = self.paths[index]
        photo = common.upright(common.open_image(path, FORMATS))
        if photo.mode == "F":
            raise UserError(f"{path} holds floating point values: bring 8 or 16 bits")
        if photo.mode.startswith("I"):  # 16-bit grey, which Pillow's convert would cut off at 255
            high = np.clip(np.asarray(photo) // 256, 0, 255)
            photo = Image.fromarray(high.astype(np.uint8))
        return photo.convert("RGB"), None

    def __getitem__(self, index):
        try:
            photo, _ = self.open(index)
        except UserError as error:
            return {"name": self.names[index], "error": str(error)}
        size = self.size
        if self.keep_aspect:
            size = common.same_area(photo.size, self.size)
        small = common.resize(photo, size, "image")
        pixels = torch.from_numpy(np.array(photo))
        return {"name": self.names[index], "photo": pixels, "image": common.to_tensor(small)}


@torch.inference_mode()
def predict_photos(networks: list, photos: Photos, device, workers: int, on_photo) -> list:
    """Call on_photo(name, logits (1,C,h,w), prediction (H,W) uint8, photo (H,W,3) uint8) for every
    image; returns the errors of those that cannot be read."""
    networks = [common.inference_copy(network) for network in networks]
    errors = []
    with common.full_precision():
        for item in common.one_by_one(photos, workers, device):
            if "error" in item:
                errors.append(item["error"])
                continue
            height, width = item["photo"].shape[:2]
            logits = common.main_logits(networks, item["image"][None].to(device))
            prediction = common.upsampled_argmax(logits, (width, height))[0]
            on_photo(item["name"], logits, prediction, item["photo"].numpy())
    return errors


def report_errors(errors: list):
    """Name the images that could not be read; exit status 2 if there are any."""
    for error in errors[:-1]:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        raise UserError(f"{errors[-1]}; {len(errors)} images were left out")


def own_output(path: Path) -> bool:
    """Whether an earlier call of this script wrote the file: its siblings lie beside it."""
    name = re.sub(r"_(trainids|overlay|entropy)\.png$", "", path.name)
    siblings = pictures(path.parent, [name], ("trainids", "entropy"))
    return name != path.name and all(sibling.is_file() for sibling in siblings)


def find_images(patterns: list) -> dict:
    """{name: path}: the path below a named folder, or the file's own name, without its suffix. A
    second image of one name gets _2."""

    def wanted(path):
        return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")

    found = {}
    for folder, path in expand(patterns, "--images", wanted):
        name = path.relative_to(folder).as_posix().removesuffix(path.suffix)
        while name in found:
            name += "_2"
        if not own_output(path):
            found[name] = path
    if not found:
        raise UserError("--images: these are all results of this script, name other images")
    return found


def segment_images(args):
    """Write NAME_trainids.png (coloured by its palette), NAME_overlay.png and NAME_entropy.png of
    every image, at its own size. A file that cannot be read is named and left out: exit status 2.
    """
    images = find_images(args.images)
    networks, paths, input_size, device = load_networks(args)
    num_classes = networks[0].num_classes
    outputs = pictures(args.save_dir, images, ("trainids", "overlay", "entropy"))
    refuse_outputs(outputs, [*paths, *images.values()], args.save_dir)
    photos = Photos(images, input_size, keep_aspect=args.input_size is None)

    def write_files(name, logits, prediction, photo):
        write_maps(args.save_dir, name, logits, prediction, num_classes)
        coloured = common.colour(prediction.cpu().numpy(), num_classes)
        overlay = (photo.astype(np.uint16) + coloured) // 2
        common.write_png(args.save_dir / f"{name}_overlay.png", overlay.astype(np.uint8))

    begin = time.perf_counter()
    errors = predict_photos(networks, photos, device, args.workers, write_files)
    done = len(images) - len(errors)
    rate = done / (time.perf_counter() - begin)
    print(f"{done} images, {rate:.2f} images/s, in {args.save_dir}:")
    print("NAME_trainids.png, NAME_overlay.png, NAME_entropy.png (black 0, white 1)")
    report_errors(errors)


# ====================================================================== comparison and curves


def number_or_none(value):
    """A finite number as float; None for whatever else a log may hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int) and abs(value) > 1e300 or not math.isfinite(value):
        return None
    return float(value)


def read_run(path: Path) -> dict:
    """A run that ended with an evaluation, as a value of `group_runs`. A UserError says why another
    log is none."""
    records = common.read_log(path)
    start = None
    scores = []
    for record in records:
        metric = next((name for name in record if name.startswith("miou")), None)
        if record.get("event") == "start" and isinstance(record.get("settings"), dict):
            start = record
        elif metric and isinstance(record.get("iou"), dict):
            last = record
            scores.append(number_or_none(record[metric]))
    if start is None or not isinstance(start.get("iters"), int):
        raise UserError(f"{path} is no log of a training run")
    reached = max(record["iter"] for record in records)
    if reached < start["iters"]:
        raise UserError(f"{path} stopped at iteration {reached} of {start['iters']}")
    if not scores or last["iter"] < start["iters"]:
        raise UserError(f"{path} was not evaluated at its end")
    settings = {name: str(value) for name, value in start["settings"].items()}
    settings.pop("ranking", None)  # a digest of its stage 1's results: other for every seed
    if re.fullmatch("[0-9a-f]{16}", settings.get("init", "")):
        settings["init"] = "file"
    return {
        "seed": settings.pop("seed", "?"),
        "stage": str(start.get("stage")),
        "settings": settings,
        "metric": next(name for name in last if name.startswith("miou")),
        "iou": {name: number_or_none(value) for name, value in last["iou"].items()},
        "last": scores[-1],
        "best": max((score for score in scores if score is not None), default=None),
    }


def mean_std(values: list) -> dict:
    """Mean and sample standard deviation (n - 1; None of one value), leaving out None."""
    known = [value for value in values if value is not None]
    result = {"mean": None, "std": None, "values": values}
    if known:
        result["mean"] = statistics.fmean(known)
    if len(known) > 1:
        result["std"] = statistics.stdev(known)
    return result


def group_runs(paths: list) -> list:
    """A row for the runs that differ by seed alone: {"label", "stage", "settings", "metric",
    "seeds", "last", "best", "iou"}, in the order of the labels. Says which logs have no row."""
    groups = {}  # what the runs share to {seed: run}
    for path in sorted(paths, key=os.path.getmtime):  # of one seed, the newest comes last
        try:
            run = read_run(path)
        except (UserError, OSError) as error:
            print(f"left out: {error}")
            continue
        shared = [run["stage"], run["settings"], run["metric"], list(run["iou"])]
        group = groups.setdefault(json.dumps(shared, sort_keys=True), {})
        if run["seed"] in group:
            print(f"left out: {group[run['seed']]['path']}, {path} has its flags and is newer")
        group[run["seed"]] = {**run, "path": path}
    if not groups:
        raise UserError("--compare: none of these runs ended with an evaluation, train on first")
    rows = []
    for group in groups.values():
        runs = [group[seed] for seed in sorted(group)]
        row = {name: runs[0][name] for name in ("stage", "settings", "metric")}
        row["seeds"] = sorted(group)
        row["last"] = mean_std([run["last"] for run in runs])
        row["best"] = mean_std([run["best"] for run in runs])
        row["iou"] = {c: mean_std([run["iou"][c] for run in runs]) for c in runs[0]["iou"]}
        rows.append(row)
    labelled = [{"label": label_of(row, rows), **row} for row in rows]
    return sorted(labelled, key=lambda row: row["label"])


def label_of(row: dict, rows: list) -> str:
    """A row's stage, and the settings in which it differs from most rows of that stage."""
    peers = [other["settings"] for other in rows if other["stage"] == row["stage"]]
    words = [row["stage"]]
    for name, value in row["settings"].items():
        counts = Counter(peer.get(name) for peer in peers).most_common(2)
        tie = len(counts) == 2 and counts[0][1] == counts[1][1]
        if tie or value != counts[0][0]:
            words.append(f"{name}={value}")
    return " ".join(words)


def as_text(score: dict) -> str:
    if score["mean"] is None:
        return "-"
    if score["std"] is None:
        return f"{score['mean']:.1f}"
    return f"{score['mean']:.1f} ± {score['std']:.1f}"


def markdown_table(*rows) -> str:
    """A table as GitHub reads it, its columns aligned; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rules = ["-" * width for width in widths]
    lines = []
    for row in (rows[0], rules, *rows[1:]):
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def comparison_text(rows: list) -> str:
    """Two tables for every set of classes: the means, and the IoU of every class."""
    text = "Percent, mean ± sample standard deviation over seeds. A run is named by what sets it\n"
    text += "apart from most runs of its stage.\n"
    tables = {}
    for row in rows:
        tables.setdefault((row["metric"], *row["iou"]), []).append(row)
    for (metric, *classes), members in tables.items():
        means = [["", "run", "seeds", f"mIoU {metric[4:]}, last", "best (oracle)"]]
        per_class = [["last, IoU of"], *([name] for name in classes)]
        for i, row in enumerate(members, 1):
            scores = [as_text(row["last"]), as_text(row["best"])]
            means.append([str(i), row["label"], str(len(row["seeds"])), *scores])
            per_class[0].append(str(i))
            for line, name in zip(per_class[1:], classes):
                line.append(as_text(row["iou"][name]))
        text += f"\n{markdown_table(*means)}\n{markdown_table(*per_class)}"
    return text


def compare_runs(args):
    """Print the tables; with --save-dir write compare.md, compare.json and compare.png."""
    pairs = expand(args.compare, "--compare", lambda path: path.name == "log.jsonl")
    paths = [path for _, path in pairs]
    if args.save_dir:
        figure = matplotlib_figure(10, 1)
        outputs = [args.save_dir / f"compare.{suffix}" for suffix in ("md", "json", "png")]
        refuse_outputs(outputs, paths)
    rows = group_runs(paths)
    text = comparison_text(rows)
    print(text)
    if not args.save_dir:
        return
    common.write_text(outputs[0], text)
    common.write_text(outputs[1], json.dumps(rows, indent=1) + "\n")
    figure.set_figheight(1 + 0.35 * len(rows))
    axes = figure.subplots()
    for i, row in enumerate(rows):
        axes.barh(i, row["last"]["mean"] or 0, xerr=row["last"]["std"], color="tab:blue", capsize=3)
    axes.set_yticks(range(len(rows)), [f"{row['label']} (n = {len(row['seeds'])})" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("mIoU of the last checkpoint in percent, mean and standard deviation")
    save_figure(outputs[2], figure)
    print(f"in {args.save_dir}: compare.md, compare.json, compare.png")


def draw_curves(args):
    """Losses and mIoU of a run over its iterations, to curves.png beside its log.jsonl."""
    log = args.curves
    if log.is_dir():
        log = log / "log.jsonl"
        below = sorted(args.curves.rglob("log.jsonl"))
        if not log.is_file() and below:
            raise UserError(f"{args.curves} holds several runs: name one, say {below[0].parent}")
    output = log.parent / "curves.png"
    figure = matplotlib_figure(9, 6)
    curves = {}  # name to (iterations, values)
    for record in common.read_log(log):
        for name, value in record.items():
            value = number_or_none(value)
            if name.startswith(("loss_", "miou")) and value is not None:
                iterations, values = curves.setdefault(name, ([], []))
                iterations.append(record["iter"])
                values.append(value)
    if not curves:
        raise UserError(f"{log} holds no losses and no scores yet: train on first")
    refuse_outputs([output], [log])
    losses, scores = figure.subplots(2, sharex=True)
    for name, (iterations, values) in curves.items():
        if name.startswith("loss_"):
            losses.plot(iterations, values, label=name.removeprefix("loss_"), linewidth=1)
        else:
            scores.plot(iterations, values, "o-", label=name.replace("miou", "mIoU "))
    losses.set_yscale("symlog", linthresh=1e-3)  # terms of very different size, some exactly 0
    losses.set_ylabel("losses, not weighted")
    scores.set_ylabel("percent")
    scores.set_xlabel("iteration")
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(output, figure)
    print(f"in {output}")


# ====================================================================== features


def pick(labels: Tensor, height: int, width: int) -> Tensor:
    """Labels (H,W) at the positions of a map: (height,width). Position i of h stands for pixel
    round(i (H-1) / (h-1)), where align_corners=True puts it."""

    def pixels(count, length):
        steps = torch.arange(count, dtype=torch.float64) * (length - 1) / max(count - 1, 1)
        return steps.round().long()

    return labels[pixels(height, labels.shape[0])][:, pixels(width, labels.shape[1])]


@torch.inference_mode()
def sample_features(network, dataset: common.Labelled, workers: int, seed: int, device) -> tuple:
    """Of one domain: features (N,D), labels (N,), is_prototype (N,). At most FEATURE_POINTS of a
    class, every position as likely as any other, and then the masked-average prototypes."""
    generator = torch.Generator().manual_seed(seed)
    num_classes = dataset.num_classes
    total = torch.zeros(num_classes, 32 * network.width, dtype=torch.float64)  # (C, D)
    count = torch.zeros(num_classes, 1)
    kept = {}  # class to (draws, features): every position draws a number, the largest stay
    images = Subset(dataset, common.spread(len(dataset), FEATURE_IMAGES))
    for item in common.one_by_one(images, workers, device):
        x = common.normalize(item["image"][None].to(device))
        with common.full_precision():
            f = network(x).features[0].cpu()  # (D, h, w)
        y = pick(item["label"], *f.shape[1:]).flatten()  # (hw,)
        f = f.flatten(1).T  # (hw, D)
        draws = torch.rand(len(y), generator=generator)
        for c in y[y < num_classes].unique().tolist():
            own = f[y == c]
            total[c] += own.double().sum(0)
            count[c] += len(own)
            old_draws, old_points = kept.get(c, (draws[:0], f[:0]))
            all_draws = torch.cat([old_draws, draws[y == c]])
            best = all_draws.topk(min(FEATURE_POINTS, len(all_draws))).indices
            kept[c] = (all_draws[best], torch.cat([old_points, own])[best])
    if not kept:
        raise UserError(f"no labelled pixel in {dataset.label_paths[0]} and others: check labels")
    classes = sorted(kept)
    labels = np.repeat(classes, [len(kept[c][0]) for c in classes])
    prototypes = (total[classes] / count[classes]).float()
    features = torch.cat([*(kept[c][1] for c in classes), prototypes])
    is_prototype = np.arange(len(features)) >= len(labels)
    return features.numpy(), np.append(labels, classes), is_prototype


def write_features(args):
    """The .npz: features (N,D) float32, label (N,), domain (N,) 0 source (train) or 1 target
    (--split), is_prototype (N,) bool, names (C,). With --tsne a picture of the same name."""
    picture = args.features.with_suffix(".png")
    if args.tsne:
        figure = matplotlib_figure(11, 8)
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise UserError("--tsne needs scikit-learn: pip install scikit-learn") from None
    networks, paths, size, device = load_networks(args)
    sides = (
        (args.source, args.source_root, "train"),
        (args.target, args.target_root, args.split),
    )
    datasets = []
    for kind, own_root, split in sides:
        root = dataset_root(kind, own_root, args.data_root, args.source)
        datasets.append(open_labelled(kind, root, split, networks[0].num_classes, size))
    inputs = [*paths, *datasets[0].files(), *datasets[1].files()]
    refuse_outputs([args.features, picture], inputs)

    network = common.inference_copy(networks[0])
    parts = []
    for d, dataset in enumerate(datasets):
        sampled = sample_features(network, dataset, args.workers, d, device)
        parts.append((*sampled, np.full(len(sampled[0]), d)))
    features, labels, is_prototype, domain = (np.concatenate(part) for part in zip(*parts))
    names = datasets[0].classes
    with common.atomic_write(args.features) as file:
        about = {"domain": domain, "is_prototype": is_prototype, "names": np.array(names)}
        np.savez(file, features=features, label=labels, **about)
    count = is_prototype.sum()
    print(f"{args.features}: {len(labels) - count} features, {count} prototypes")
    if not args.tsne:
        return

    unit = F.normalize(torch.from_numpy(features), dim=1).numpy()  # as the losses compare them
    perplexity = min(30, (len(unit) - 1) / 3)
    xy = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)
    axes = figure.subplots()
    for c in np.unique(labels):
        colour = common.palette_for(len(names))[c] / 255
        axes.scatter([], [], color=colour, label=names[c])  # the legend's entry
        for d, marker in enumerate("oX"):
            own = (labels == c) & (domain == d)
            sizes = np.where(is_prototype[own], 150, 20)
            axes.scatter(*xy[own].T, s=sizes, color=colour, marker=marker, edgecolors="none")
    axes.set_title("t-SNE of encoder features: source o, target x, prototypes large")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(picture, figure)
    print(f"t-SNE in {picture}")


def main():
    args = parse()
    if "LOCAL_RANK" in os.environ:
        raise UserError("eval.py is one process: start it without torchrun")
    if args.images:
        segment_images(args)
    elif args.compare:
        compare_runs(args)
    elif args.curves:
        draw_curves(args)
    elif args.features:
        write_features(args)
    else:
        score_images(args)


if __name__ == "__main__":
    common.launch(main)
