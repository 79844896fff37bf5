"""Look at what was trained: evaluate checkpoints, segment your own images, compare runs, sample features.

    python eval.py                                                the newest last.pth under runs/, on the built-in scenes
    python eval.py --ckpt A.pth B.pth --data-root DIR             on Cityscapes val; two files are averaged
    python eval.py --ckpt A.pth --save-dir out --json out.json    coloured predictions, entropy maps, all numbers
    python eval.py --ckpt A.pth --images photo.jpg DIR "*.png" --save-dir out       your own images, without labels
    python eval.py --compare runs --save-dir out                  one table over methods and seeds, and its picture
    python eval.py --ckpt A.pth --features out.npz                encoder features of both domains, for t-SNE; a PCA picture

Reads our checkpoints and the published kinds (AdvEnt, IntraDA, BCL release, single-level DeepLab); the architecture is
read off the file. The input is resized, the logits are upsampled to the label's or the image's own size.
"""

import argparse
import glob
import json
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
from torch.utils.data import Subset

import common
from bcl import downsample
from common import UserError
from intrada import INDIFFERENT, POSITIVE, WARMUP_FLAGS, WHOLE, file_path, new_parser, number, self_information, size


def parse_args() -> argparse.Namespace:
    parser, add = new_parser(__doc__, {})
    g = parser.add_argument_group("what to do (without any of these: evaluate on labelled images)")
    image_help = "segment these files, folders (with sub-folders) and globs, of any size; needs --save-dir, no labels"
    add(g, "--images", image_help, nargs="+", metavar="PATH")
    add(g, "--compare", "log.jsonl files, folders or globs of training runs: table over methods and seeds", nargs="+", metavar="LOG")
    add(g, "--features", "write encoder features of source and target pixels to this .npz, and a PCA picture beside it", type=file_path)

    g = parser.add_argument_group("network")
    add(g, "--ckpt", "checkpoints, averaged if several; without a path the newest last.pth under runs/", nargs="*", type=file_path)
    size_help = "network input, WxH (default: what the checkpoint was trained with, else 1024x512; --images keep their own"
    add(g, "--input-size", f"{size_help} aspect and get the same area)", type=size)
    add(g, "--flip", "average with the prediction of the mirrored image: twice the time, a little better", action="store_true")
    scale_help = "average over these factors of the input size, say 0.75 1.0 1.25; does not always help, compare first"
    add(g, "--multi-scale", scale_help, nargs="+", type=number(float, 0.1, 10), default=[1.0], metavar="FACTOR")

    g = parser.add_argument_group("labelled images")
    add(g, "--data-root", "folder that holds Cityscapes/ (and GTA5/, ...); without it the built-in scenes", type=file_path)
    add(g, "--target", "layout of the labelled images", choices=("cityscapes", "folder"), default="cityscapes")
    add(g, "--target-root", "the dataset's own folder, if not under --data-root", type=file_path)
    add(g, "--split", "train, val or test", default="val")
    add(g, "--subset", "only the images named in this file, a name or stem a line, say data/scenes/hard.txt", type=file_path)
    add(g, "--panel", "write one picture: image, label and each checkpoint's own prediction of --rows images", type=file_path)
    add(g, "--rows", "images in --panel, spread over the set", type=POSITIVE, default=6)

    g = parser.add_argument_group("features")
    add(g, "--source", "labelled source domain", choices=("gta5", "synthia", "synscapes", "folder"), default="gta5")
    add(g, "--source-root", "the source's own folder, if not under --data-root", type=file_path)
    add(g, "--points", "pixels sampled per class and domain, at random over all images read", type=POSITIVE, default=50)
    add(g, "--max-images", "images read per domain, spread over the set", type=POSITIVE, default=500)
    add(g, "--seed", "of the sampling", type=WHOLE, default=0)

    g = parser.add_argument_group("output and speed")
    add(g, "--save-dir", "write pictures for every image, or the comparison's files, into this folder", type=file_path)
    add(g, "--json", "write miou19, miou16, miou13, iou (percent), confusion (rows are labels), images, seconds", type=file_path)
    add(g, "--batch-size", "images of --images predicted at once; only those of one input size share a batch", type=POSITIVE, default=1)
    add(g, "--device", "cpu or cuda; cuda if there is one", choices=("cpu", "cuda"))
    add(g, "--workers", "processes that read images", type=WHOLE, default=2)
    args = parser.parse_args()
    if sum(map(bool, (args.images, args.compare, args.features))) > 1:
        raise UserError("--images, --compare and --features are different jobs: give one of them")
    if args.images and not args.save_dir:
        raise UserError("--images writes several files per image: add --save-dir DIR")
    if args.features and args.features.suffix != ".npz":
        raise UserError(f"--features {args.features}: give a name that ends in .npz")
    return args


def newest_checkpoint() -> Path:
    found = sorted(Path("runs").rglob("last.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no last.pth under runs/: train with intrada.py first, or name a file with --ckpt")
    return found[-1]


def load_models(args, device) -> list:
    """The networks of --ckpt; fills in args.ckpt and args.input_size."""
    args.ckpt = args.ckpt or [newest_checkpoint()]
    contents = [common.read_checkpoint(path) for path in args.ckpt]
    loaded = [common.build_model(path, content) for path, content in zip(args.ckpt, contents)]
    models, num_classes = [model.to(device) for model, _ in loaded], loaded[0][0].num_classes
    for path, (model, report) in zip(args.ckpt, loaded):
        print(f"{path}: {report}")
        if model.num_classes != num_classes:
            raise UserError(f"{path} predicts {model.num_classes} classes, {args.ckpt[0]} {num_classes}: only like can be averaged")
    known = contents[0].get("input_size")
    ours = isinstance(known, (tuple, list)) and len(known) == 2 and all(isinstance(side, int) and side >= 32 for side in known)
    trained = tuple(known) if ours else (1024, 512)
    args.keep_aspect, args.input_size = not args.input_size, args.input_size or trained
    return models


def largest(args, size: tuple) -> tuple:
    """The size (W,H) to read at: `predict_maps` makes the smaller scales from the largest."""
    return tuple(round(side * max(args.multi_scale)) for side in size)


# ---------------------------------------------------------------- labelled images


def labelled_root(args, kind: str, override, num_classes: int) -> Path:
    """Folder of a labelled dataset, under --data-root or the built-in scenes."""
    if num_classes != 19 and kind != "folder":
        flag = "target" if kind == args.target else "source"
        raise UserError(f"{args.ckpt[0]} predicts {num_classes} classes, {kind} has 19: give --{flag} folder --{flag}-root DIR")
    if kind == "folder" and not override:
        raise UserError("a dataset of kind folder needs --target-root DIR (or --source-root), which holds images/ and labels/")
    demo = not (args.data_root or args.source_root or args.target_root)
    return common.dataset_root(kind, common.demo_scenes(args.source) if demo else args.data_root, override)


def select(pairs: dict, subset: Path) -> dict:
    """The pairs whose name, or last part of it, is listed in the file."""
    try:
        wanted = set(subset.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --subset {subset} ({error}): give a text file with a name a line")
    chosen = {name: pair for name, pair in pairs.items() if name in wanted or name.split("/")[-1] in wanted}
    if not chosen:
        raise UserError(f"--subset {subset} names none of the {len(pairs)} images")
    return chosen


def spread(length: int, count: int) -> list:
    """At most `count` indices, spread evenly over range(length)."""
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(count)})


def picture_writer(folder: Path, num_classes: int):
    """An on_image callback for `common.evaluate` that writes the coloured prediction and the entropy map (white: 1)."""

    def write(name, maps, label, prediction):
        entropy = common.grey(common.entropy_map(maps, tuple(label.shape[::-1]), self_information))
        common.write_png(folder / f"{name}_colour.png", prediction.cpu().numpy(), common.palette_for(num_classes))
        common.write_png(folder / f"{name}_entropy.png", entropy)

    return write


def evaluate_labelled(args, models: list, device):
    num_classes = models[0].num_classes
    pairs = common.list_pairs(args.target, labelled_root(args, args.target, args.target_root, num_classes), args.split)
    pairs = select(pairs, args.subset) if args.subset else pairs
    dataset = common.Labelled(pairs, args.target, num_classes, largest(args, args.input_size), native_labels=True)
    pictures = picture_writer(args.save_dir, num_classes) if args.save_dir else None
    options = {"scales": args.multi_scale, "flip": args.flip}
    result = common.evaluate(models, dataset, device, args.workers, pictures, **options)
    print(f"\nIoU in percent, {args.target} {args.split}, input {'x'.join(map(str, args.input_size))}:")
    print(common.score_table({"IoU": result}))
    print(f"{result['images']} images, {result['images'] / result['seconds']:.2f} images/s")
    if args.panel:
        columns = [(checkpoint.parent.name, model) for checkpoint, model in zip(args.ckpt, models)]
        names = [dataset.names[i] for i in spread(len(dataset), args.rows)]
        common.write_panel(args.panel, columns, dataset, names, device, truth="label", **options)
    if args.json:
        common.write_text(args.json, json.dumps({**result, "confusion": result["confusion"].tolist()}, indent=1) + "\n")


# ---------------------------------------------------------------- images without labels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")


def expand(patterns: list, flag: str, below) -> list:
    """[(folder or None, file)] of files, folders (the files that `below` accepts) and globs the shell left alone."""
    found = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"{flag} {pattern} matches no file: check the path")
        for path in map(Path, matches):
            files = sorted(p for p in path.rglob("*") if p.is_file() and below(p)) if path.is_dir() else [path]
            if path.is_dir() and not files and path == Path(pattern):
                raise UserError(f"{flag} {path} holds no file that fits: check the folder")
            found += [(path if path.is_dir() else None, file) for file in files]
    return found


def find_images(patterns: list) -> dict:
    """{name: path}: the path below a named folder, or the file's own name, without suffix. A second image of a name gets
    _2, and so on; a file that is named twice is taken once."""
    found, seen = {}, set()
    for folder, path in expand(patterns, "--images", lambda p: p.suffix.lower() in SUFFIXES and not p.name.startswith(".")):
        if path.resolve() not in seen:
            seen.add(path.resolve())
            stem = (path.relative_to(folder) if folder else Path(path.name)).with_suffix("").as_posix()
            name, count = stem, 1
            while name in found:
                count += 1
                name = f"{stem}_{count}"
            found[name] = path
    return found


class Photos(common.Images):
    """Images as cameras and tools write them: {"name", "photo": (H,W,3) uint8 upright, "image": (3,h,w) the network's
    input}, or {"name", "error"} for a file that cannot be read. size_of maps a photo's size (W,H) to the input's."""

    def __init__(self, images: dict, size_of):
        super().__init__(images)
        self.size_of = size_of

    def __getitem__(self, index):
        try:
            photo = ImageOps.exif_transpose(common.open_image(self.paths[index], formats=FORMATS))
        except UserError as error:
            return {"name": self.names[index], "error": str(error)}
        if photo.mode.startswith("I"):  # 16-bit grey, which Pillow's convert would cut off at 255
            photo = Image.fromarray((np.asarray(photo) // 256).astype(np.uint8))
        photo = photo.convert("RGB")
        small = common.resize(photo, self.size_of(photo.size), "image")
        return {"name": self.names[index], "photo": torch.from_numpy(np.array(photo)), "image": common.to_tensor(small)}


def grouped(items, most: int):
    """Lists of at most `most` consecutive items with inputs of one size."""
    group = []
    for item in items:
        if group and (len(group) == most or item["image"].shape != group[0]["image"].shape):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


@torch.inference_mode()
def segment(args, models: list, device):
    """Write <name>_trainids.png, _colour.png, _overlay.png and _entropy.png (white: 1) of every image, at its own size.

    A file that cannot be read is named, the others are done all the same, and the exit status is 2.
    """
    num_classes, images, errors, start = models[0].num_classes, find_images(args.images), [], time.perf_counter()
    models, pixels, entropies = [common.inference_copy(model) for model in models], np.zeros(num_classes, int), []

    def size_of(photo: tuple) -> tuple:
        area = args.input_size[0] * args.input_size[1]
        factor = (area / (photo[0] * photo[1])) ** 0.5
        kept = tuple(max(32, round(side * factor)) for side in photo)
        return largest(args, kept if args.keep_aspect else args.input_size)

    def readable(items):
        for item in items:
            if "error" in item:
                errors.append(item["error"])
            else:
                yield item

    for group in grouped(readable(common.one_by_one(Photos(images, size_of), args.workers, device)), args.batch_size):
        inputs = torch.stack([item["image"] for item in group]).to(device, non_blocking=True)
        maps = common.predict_maps(models, inputs, args.multi_scale, args.flip)
        for i, item in enumerate(group):
            photo, name = item["photo"].numpy(), args.save_dir / item["name"]
            prediction, entropy = common.predict_with([m[i : i + 1] for m in maps], photo.shape[1::-1], self_information)
            prediction, entropy = prediction.cpu().numpy(), common.grey(entropy)
            coloured = common.colour(prediction, num_classes)
            overlay = (photo.astype(np.uint16) + coloured) // 2
            pictures = {"trainids": prediction, "colour": coloured, "overlay": overlay.astype(np.uint8), "entropy": entropy}
            for kind, picture in pictures.items():
                common.write_png(name.with_name(f"{name.name}_{kind}.png"), picture)
            pixels += np.bincount(prediction.ravel(), minlength=num_classes)
            entropies.append(entropy.mean() / 255)
        if sys.stdout.isatty():
            rate = len(entropies) / (time.perf_counter() - start)
            print(f"\r\033[K{len(entropies)}/{len(images)} images, {rate:.2f} images/s", end="", flush=True)
    if entropies:
        rate, order = len(entropies) / (time.perf_counter() - start), np.argsort(-pixels, kind="stable")
        shares = [f"{common.class_names(num_classes)[c]} {100 * pixels[c] / pixels.sum():.1f} %" for c in order if pixels[c]]
        print(f"\n{len(entropies)} images, {rate:.2f} images/s, mean entropy {np.mean(entropies):.3f} (0 certain, 1 no idea)")
        print(f"share of the pixels: {', '.join(shares)}")
        print(f"in {args.save_dir}: NAME_trainids.png, NAME_colour.png, NAME_overlay.png, NAME_entropy.png")
    for error in errors[:-1]:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        raise UserError(f"{errors[-1]}; {len(errors)} of {len(images)} images left out")


# ---------------------------------------------------------------- features


@torch.inference_mode()
def sample_features(args, model, dataset, rng, device) -> tuple:
    """Of one domain: features (N,D) and labels (N,), at most --points a class, every pixel as likely as any other of its
    class; and the classes' masked-average prototypes (K,D) and labels (K,). One pass; memory does not grow with it."""
    C, total, count, kept = model.num_classes, 0, 0, {}
    for item in common.one_by_one(Subset(dataset, spread(len(dataset), args.max_images)), args.workers, device):
        f = model(common.normalize(item["image"][None].to(device))).features
        y = downsample(item["label"][None].to(device), f)[0].flatten()  # (hw,)
        f = f[0].flatten(1).T  # (hw, D)
        one_hot = (y == torch.arange(C, device=device)[:, None]).float()  # (C, hw)
        total, count = total + (one_hot @ f).double(), count + one_hot.sum(1).double()
        for c in y[y < C].unique().tolist():  # each pixel draws a number; the --points largest of the class so far stay
            here, (old_draws, old) = (y == c).nonzero()[:, 0], kept.get(c, (np.zeros(0), f[:0]))
            draws = rng.random(len(here))
            best = np.argsort(-draws)[: args.points]
            draws, points = np.append(old_draws, draws[best]), torch.cat([old, f[here[torch.from_numpy(best).to(device)]]])
            best = np.argsort(-draws)[: args.points]
            kept[c] = draws[best], points[torch.from_numpy(best).to(device)]
    classes = sorted(kept)
    if not classes:
        raise UserError("no labelled pixel in the images read: check the labels, or raise --max-images")
    prototypes = (total[classes] / count[classes, None]).float().cpu().numpy()
    labels = np.repeat(classes, [len(kept[c][1]) for c in classes])
    return torch.cat([kept[c][1] for c in classes]).cpu().numpy(), labels, prototypes, np.array(classes)


def write_features(args, models: list, device):
    """The .npz: features (N,D) float32, label (N,), domain (N,) 0 source (train) or 1 target (--split), is_prototype (N,)
    bool, names (C,); and a .png of the same name, their two main components after scaling every feature to length 1."""
    if len(models) > 1:
        raise UserError("--features takes the encoder of one network: give one --ckpt")
    model, num_classes, parts = common.inference_copy(models[0]), models[0].num_classes, []
    domains = (args.source, args.source_root, "train"), (args.target, args.target_root, args.split)
    roots = [labelled_root(args, kind, override, num_classes) for kind, override, _ in domains]
    for domain, ((kind, _, split), root) in enumerate(zip(domains, roots)):
        dataset = common.Labelled(common.list_pairs(kind, root, split), kind, num_classes, args.input_size)
        points, labels, prototypes, classes = sample_features(args, model, dataset, np.random.default_rng((args.seed, domain)), device)
        parts += [(points, labels, domain, False), (prototypes, classes, domain, True)]
    features, label = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    domain, is_prototype = (np.repeat([part[i] for part in parts], [len(part[1]) for part in parts]) for i in (2, 3))
    names, picture = np.array(common.class_names(num_classes)), args.features.with_suffix(".png")
    with common.atomic_write(args.features) as file:
        np.savez(file, features=features, label=label, domain=domain, is_prototype=is_prototype, names=names)

    unit = F.normalize(torch.from_numpy(features).double(), dim=1)
    values, axes = torch.linalg.eigh(torch.cov(unit.T))
    x, y = ((unit - unit.mean(0)) @ axes[:, [-1, -2]]).T.numpy()
    share = 100 * values[-2:].sum() / values.sum()
    series = []
    for prototype, d, c in ((p, d, c) for p in (False, True) for d in (0, 1) for c in range(num_classes)):
        own = (is_prototype == prototype) & (domain == d) & (label == c)
        if own.any():
            name = names[c] if prototype and not any(s.name == names[c] for s in series) else ""
            rgb = tuple(map(int, common.palette_for(num_classes)[c]))
            series.append(common.Series(name, "cross" if d else "dot", x[own], y[own], rgb, 8 if prototype else 3))
    title = f"Encoder features, 2 main components ({share:.0f} % of the variance): source o, target x, prototypes large"
    common.write_png(picture, common.chart(title, "", "", series, (900, 700), ticks=False))
    print(f"{(~is_prototype).sum()} features, {is_prototype.sum()} prototypes, dimension {features.shape[1]}: {args.features}, {picture}")


# ---------------------------------------------------------------- comparison of runs

def mean_std(values: list) -> dict:
    """Mean and sample standard deviation (n - 1; None of one value) of the values that are not None."""
    values = [value for value in values if value is not None]
    return {"mean": statistics.fmean(values) if values else None, "std": statistics.stdev(values) if len(values) > 1 else None}


def as_flag(name: str, value) -> str:
    """A logged argument as it is typed: --labels static, --no-calibrate, --ratio 0.5."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    values = [f"{v:g}" if isinstance(v, float) else str(v) for v in (value if isinstance(value, list) else [value])]
    return f"--{flag} {('x' if flag.endswith('size') else ',').join(values)}"


def as_text(score: dict) -> str:
    return "-" if score["mean"] is None else f"{score['mean']:.1f}" + ("" if score["std"] is None else f" ± {score['std']:.1f}")


def table(head: list, rows: list) -> str:
    """A GitHub table with its columns aligned."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [[text.ljust(width) for text, width in zip(row, widths)] for row in (head, ["-" * w for w in widths], *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def group_runs(paths: list) -> list:
    """[{"label", "stage", "flags", "seeds", "metric", "last", "best", "iou"}], a row for runs that differ by seed alone.

    A row is called by its stage and the flags in which it differs from most rows of that stage. Runs that did not end are
    left out, and of several runs with one seed all but the newest; both are said.
    """
    groups, skipped = {}, 0
    for path in sorted(paths, key=lambda p: p.stat().st_mtime):  # so that the newest of a seed comes last
        header, _, evaluations = common.read_log(path)
        stage, flags = header["stage"], header["args"]
        ends = {"warmup": flags.get("warmup_iters"), "bcl": (flags.get("rounds") or 0) * (flags.get("round_iters") or 0)}
        if not evaluations or evaluations[-1]["iter"] < (ends.get(stage, flags.get("stop_iters")) or 0):
            print(f"{path}: did not end, left out")
            continue
        indifferent = INDIFFERENT - {"stop_iters"} | {"seed"} | ({"ratio", "normalize_entropy"} if stage == "stage1" else set())
        kept = (*WARMUP_FLAGS, "warmup_iters") if stage == "warmup" else flags
        own = {key: value for key, value in flags.items() if key in kept and key not in indifferent}
        runs = groups.setdefault((stage, json.dumps(own, sort_keys=True)), {})
        skipped += flags["seed"] in runs
        runs[flags["seed"]] = (paths.index(path), evaluations[-1])
    if not groups:
        raise UserError("--compare: none of these runs ended with an evaluation; train on, with --resume")
    if skipped:
        print(f"{skipped} older runs with a seed that a newer one has were left out")
    order = sorted(groups, key=lambda key: min(place for place, _ in groups[key].values()))
    stages = list(dict.fromkeys(stage for stage, _ in order))
    order.sort(key=lambda key: stages.index(key[0]))  # as named, but the rows of a stage together
    settings, rows = {key: json.loads(key[1]) for key in order}, []
    for key in order:
        peers, differing = [settings[other] for other in order if other[0] == key[0]], {}
        for flag, value in settings[key].items():
            common_values = Counter(json.dumps(peer.get(flag)) for peer in peers).most_common(2)
            usual = common_values[0][0] if len(common_values) == 1 or common_values[0][1] > common_values[1][1] else None
            if json.dumps(value) != usual:
                differing[flag] = value
        seeds, evaluations = sorted(groups[key]), [groups[key][seed][1] for seed in sorted(groups[key])]
        metric = next(name for name in evaluations[0] if name.startswith("miou"))
        values = {"last": [e[metric] for e in evaluations], "best": [e["best"] for e in evaluations]}
        scores = {name: {**mean_std(v), "values": v} for name, v in values.items()}
        per_class = {name: mean_std([e["iou"][name] for e in evaluations]) for name in evaluations[0]["iou"]}
        label = " ".join([key[0], *(as_flag(name, value) for name, value in differing.items())])
        row = {"label": label, "stage": key[0], "flags": settings[key], "seeds": seeds, "metric": metric}
        rows.append({**row, **scores, "iou": per_class})
    return rows


def compare(args):
    paths = [path for _, path in expand(args.compare, "--compare", lambda p: p.name == "log.jsonl")]
    rows = group_runs(list(dict.fromkeys(paths)))
    first, metric = rows[0], rows[0]["metric"].replace("miou", "mIoU ")
    if any(row["metric"] != first["metric"] or row["iou"].keys() != first["iou"].keys() for row in rows):
        raise UserError("--compare: these runs have different classes; compare those with one number of classes")
    head = ["", "run", "seeds", f"{metric}, last", "best (oracle)"]
    lines = [[str(i), row["label"], str(len(row["seeds"])), as_text(row["last"]), as_text(row["best"])] for i, row in enumerate(rows, 1)]
    each = [[name, *(as_text(row["iou"][name]) for row in rows)] for name in first["iou"]]
    note = "Percent, mean ± sample standard deviation over seeds. A run is named by what sets it apart from most of its stage."
    per_class = table(["last, IoU of", *(str(i) for i in range(1, len(rows) + 1))], each)
    text = f"{note}\n\n{table(head, lines)}\n\n{per_class}\n"
    print(text)
    if args.save_dir:
        common.write_text(args.save_dir / "compare.md", text)
        common.write_text(args.save_dir / "compare.json", json.dumps(rows, indent=1) + "\n")
        names = [f"{row['label']} (n = {len(row['seeds'])})" for row in rows]
        values = [[row["last"][key] or 0 for row in rows] for key in ("mean", "std")]
        bars = common.Series("", "hbar", range(len(rows)), values[0], common.COLOURS[0], 0.6, values[1])
        title = f"{metric}, last checkpoint: mean and standard deviation over n seeds"
        common.write_png(args.save_dir / "compare.png", common.chart(title, "percent", "", [bars], (1000, 90 + 30 * len(rows)), rows=names))
        print(f"in {args.save_dir}: compare.md, compare.json, compare.png")


def main():
    args = parse_args()
    if "LOCAL_RANK" in os.environ:
        raise UserError("eval.py is one process: start it without torchrun")
    if args.compare:
        return compare(args)
    device = common.set_up(args.device)
    models = load_models(args, device)
    (segment if args.images else write_features if args.features else evaluate_labelled)(args, models, device)


if __name__ == "__main__":
    common.launch(main)
