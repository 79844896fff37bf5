"""Evaluate one checkpoint, or the averaged predictions of several, on labelled target images.

    python eval.py                                                the newest last.pth under runs/, on the built-in scenes
    python eval.py --ckpt A.pth B.pth --data-root DIR             on Cityscapes val; two files are averaged
    python eval.py --ckpt A.pth --save-dir out --json out.json    coloured predictions, entropy maps, all numbers

Reads our checkpoints and the published kinds (AdvEnt, IntraDA, BCL release, single-level DeepLab); the architecture is
read off the file. The input is resized to --input-size, logits are upsampled to the label's own size.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from torch.utils.data import Subset

import common
from common import UserError
from intrada import POSITIVE, Parser, WHOLE, self_information, size


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def add(flag, help, **options):
        help += " (default: %(default)s)" if options.get("default") else ""
        parser.add_argument(flag, help=help, **options)

    add("--ckpt", "checkpoints, averaged if several; without a path the newest last.pth under runs/", nargs="*", type=Path)
    add("--data-root", "folder that holds Cityscapes/; without it the built-in scenes", type=Path)
    add("--target", "layout of the labelled images", choices=("cityscapes", "folder"), default="cityscapes")
    add("--target-root", "the dataset's own folder, if not under --data-root", type=Path)
    add("--split", "train, val or test", default="val")
    add("--subset", "evaluate only the images named in this file, a name or stem a line, say data/scenes/hard.txt", type=Path)
    add("--input-size", "images are resized to WxH (default: 1024x512, built-in scenes 256x128)", type=size)
    add("--json", "write miou19, miou16, miou13, iou (percent), confusion (rows are labels), images, seconds", type=Path)
    add("--save-dir", "write <name>_colour.png and <name>_entropy.png for every image", type=Path)
    add("--panel", "write one picture: image, label and each checkpoint's own prediction of --rows images", type=Path)
    add("--rows", "images in --panel, spread over the set", type=POSITIVE, default=6)
    add("--device", "cpu or cuda; cuda if there is one", choices=("cpu", "cuda"))
    add("--workers", "processes that read images", type=WHOLE, default=2)
    return parser.parse_args()


def newest_checkpoint() -> Path:
    found = sorted(Path("runs").rglob("last.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no last.pth under runs/: train with intrada.py first, or name a file with --ckpt")
    return found[-1]


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


def picture_writer(folder: Path, num_classes: int):
    """An on_image callback for `common.evaluate` that writes the coloured prediction and the entropy map (white: 1)."""

    def write(name, logits, label, prediction):
        entropy = [self_information(block).sum(1)[0] for _, block in common.upsample_blocks(logits, tuple(label.shape[::-1]))]
        entropy = np.concatenate([block.mul(255).round().byte().cpu().numpy() for block in entropy])  # (H, W), 0..1 -> 0..255
        common.write_png(folder / f"{name}_colour.png", prediction.cpu().numpy(), common.palette_for(num_classes))
        common.write_png(folder / f"{name}_entropy.png", entropy)

    return write


def write_panel(path: Path, checkpoints: list, models: list, dataset, rows: int, device):
    """One PNG: a row per image, with columns image, label and the prediction of each model alone."""
    chosen = sorted({round(i * (len(dataset) - 1) / max(rows - 1, 1)) for i in range(rows)})
    columns = [[], []]
    for index in chosen:
        image, label = dataset.open(index)
        columns[0].append(np.asarray(image))
        columns[1].append(common.colour(np.asarray(label), dataset.num_classes))
    for model in models:
        predictions = []

        def keep(name, logits, label, prediction, predictions=predictions):
            predictions.append(common.colour(prediction.cpu().numpy(), dataset.num_classes))

        common.evaluate([model], Subset(dataset, chosen), device, on_image=keep)
        columns.append(predictions)
    titles = ["image", "label", *(checkpoint.parent.name for checkpoint in checkpoints)]
    common.write_grid(path, titles, list(zip(*columns)))


def main():
    args = parse_args()
    device = common.set_up(args.device)
    paths = args.ckpt or [newest_checkpoint()]
    loaded = [common.build_model(path) for path in paths]
    models, num_classes = [model.to(device) for model, _ in loaded], loaded[0][0].num_classes
    for path, (model, report) in zip(paths, loaded):
        print(f"{path}: {report}")
        if model.num_classes != num_classes:
            raise UserError(f"{path} predicts {model.num_classes} classes, {paths[0]} {num_classes}: only like can be averaged")
    if num_classes != 19 and args.target != "folder":
        raise UserError(f"{paths[0]} predicts {num_classes} classes, {args.target} has 19: give --target folder --target-root DIR")
    demo = not (args.data_root or args.target_root)
    args.data_root = common.demo_scenes("gta5") if demo else args.data_root
    args.input_size = args.input_size or ((256, 128) if demo else (1024, 512))
    root = common.dataset_root(args.target, args.data_root, args.target_root)
    pairs = common.list_pairs(args.target, root, args.split)
    pairs = select(pairs, args.subset) if args.subset else pairs
    dataset = common.Labelled(pairs, args.target, num_classes, args.input_size, native_labels=True)
    pictures = picture_writer(args.save_dir, num_classes) if args.save_dir else None
    result = common.evaluate(models, dataset, device, args.workers, pictures)
    print(f"\nIoU in percent, {args.target} {args.split}:\n{common.score_table({'IoU': result})}")
    print(f"{result['images']} images, {result['images'] / result['seconds']:.2f} images/s")
    if args.panel:
        write_panel(args.panel, paths, models, dataset, args.rows, device)
    if args.json:
        common.write_text(args.json, json.dumps({**result, "confusion": result["confusion"].tolist()}, indent=1) + "\n")


if __name__ == "__main__":
    common.run(main)
