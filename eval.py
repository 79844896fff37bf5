"""Score checkpoints on labelled images, or segment images that have no labels.

    python eval.py                                       newest last.pth below runs/, drawn scenes
    python eval.py --ckpt A.pth B.pth --data-root DIR    mean of two networks, Cityscapes val
    python eval.py --images photo.jpg DIR "*.png" --save-dir out     your own images, no labels
    python eval.py --ckpt A.pth --data-root DIR --label-ids --save-dir ids
                                                         files for Cityscapes' own evaluator
    python eval.py --ckpt A.pth --data-root DIR --label-ids --save-dir ids --split test
                                                         files for its test server; no label is read

Checkpoints are ours or of the published kinds (AdvEnt, IntraDA, BCL, single-level DeepLab). A file
tells its architecture. Logits are upsampled to the label's or the image's own size.

--save-dir receives <name>_trainids.png and <name>_entropy.png (black 0, white 1); for labelled
images also scores.json and panel.png; for --images also <name>_overlay.png. --label-ids replaces an
image's pictures by <name>_pred_labelIds.png: Cityscapes' evaluator refuses two of one image.

Not supported: averages over scales or mirror images, several processes (torchrun).
"""

import argparse
import glob
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import common
from common import UserError

# ====================================================================== arguments


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description=__doc__, formatter_class=Help, allow_abbrev=False
    )

    g = parser.add_argument_group("network")
    text = "weight files; several are averaged; none: the newest last.pth below runs/"
    g.add_argument("--ckpt", type=Path, nargs="*", metavar="FILE", help=text)
    text = "WxH that the network sees; default: the first file's, but see --images"
    g.add_argument("--input-size", type=common.WxH, help=text)
    g.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")

    g = parser.add_argument_group("labelled images")
    text = "folder with Cityscapes/, ...; none: drawn scenes"
    g.add_argument("--data-root", type=Path, help=text)
    g.add_argument("--target", choices=common.TARGETS, default="cityscapes", help="dataset")
    g.add_argument("--target-root", type=Path, help="own folder, if not in --data-root")
    g.add_argument("--split", choices=("train", "val", "test"), default="val", help="which part")
    g.add_argument("--target-list", type=Path, help="text file: the images to score, one a line")
    text = "reader processes; raise it if the GPU waits for images"
    g.add_argument("--workers", type=int, default=2, help=text)

    g = parser.add_argument_group("your images")
    text = "files, folders, globs to segment without scores; aspect is kept"
    g.add_argument("--images", nargs="+", metavar="PATH", help=text)

    g = parser.add_argument_group("output")
    g.add_argument("--save-dir", type=Path, metavar="DIR", help="folder for all output")
    text = "with --save-dir: Cityscapes' label ids, for its evaluator and server"
    g.add_argument("--label-ids", action="store_true", help=text)
    return parser.parse_args()


def check(args):
    """Refuse flags that contradict each other, and scores that would mean nothing."""
    if dist.is_torchelastic_launched():
        raise UserError("eval.py runs as one process. Start it without torchrun.")
    if args.input_size and min(args.input_size) < 32:
        raise UserError("--input-size needs sides of 32 pixels or more.")
    if args.workers < 0:
        raise UserError("--workers must be 0 or more.")
    if args.images and not args.save_dir:
        raise UserError("--images writes pictures of every image. Add --save-dir DIR.")
    if args.images and (args.data_root or args.target_root or args.target_list or args.label_ids):
        flags = "--data-root, --target-root, --target-list and --label-ids"
        raise UserError(f"--images segments pictures and scores nothing. Leave out {flags}.")
    if args.label_ids and not args.save_dir:
        raise UserError("--label-ids writes a picture of every image. Add --save-dir DIR.")
    if args.label_ids and args.target == "folder":
        raise UserError("--label-ids are Cityscapes' ids. A plain folder has none. Leave it out.")
    if args.target == "folder" and not args.target_root:
        raise UserError("--target folder needs --target-root, with images/ and labels/ in it.")
    if args.target == "cityscapes" and args.split == "test" and not args.label_ids:
        raise UserError("Cityscapes' test labels are empty. Use --split val, or add --label-ids.")


# ====================================================================== labelled images


def load_networks(paths, device) -> dict:
    """Load checkpoints as {path: network on the device} and print what was loaded. Without a path,
    load the newest last.pth below runs/. UserError if their class counts differ."""
    if not paths:
        # The file that was written last is what one has just trained.
        trained = glob.glob("runs/**/last.pth", recursive=True)
        if not trained:
            raise UserError("no last.pth below runs/. Train first, or name a file with --ckpt.")
        paths = [Path(max(trained, key=os.path.getmtime))]
    networks = {}
    for path in paths:
        networks[path] = common.load(path).to(device)
        print(f"{path}: {networks[path].weight_report}")
    counts = {path: network.num_classes for path, network in networks.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{path} has {count}" for path, count in counts.items())
        raise UserError(f"networks of different class counts have no average: {found}. Drop one.")
    return networks


def find_dataset(args, num_classes: int) -> tuple:
    """(root, class names) of the flags' dataset, for networks of `num_classes` classes. Without a
    folder: the built-in scenes. UserError if classes do not fit, or --save-dir lies inside."""
    # A plain folder's labels are trainIds of any number; the ids of other datasets map to 19.
    if args.target != "folder" and num_classes != 19:
        hint = "Use a network of 19 classes, or --target folder."
        raise UserError(f"the network predicts {num_classes} classes, {args.target} has 19. {hint}")
    data_root = args.data_root
    if args.target == "cityscapes" and not (data_root or args.target_root):
        from demo.scenes import demo_scenes

        print("Built-in scenes. Real data: --data-root DIR")
        data_root = demo_scenes("gta5")
    root = common.dataset_root(args.target, data_root, args.target_root)
    classes = common.dataset_classes(args.target, root, num_classes)
    if args.save_dir:
        common.refuse_inside(args.save_dir, common.image_folder(args.target, root, args.split))
    return root, classes


def write_pictures(folder, name: str, logits: Tensor, prediction: Tensor, classes: tuple):
    """Write <folder>/<name>_trainids.png, with a palette, and <name>_entropy.png (black 0, white 1)
    at the size of the prediction (H,W) uint8 trainIds, from logits (1,C,h,w) at stride 8."""
    trainids = prediction.cpu().numpy()
    # Pixel values stay trainIds; the palette only shows them in colour.
    common.write_png(folder / f"{name}_trainids.png", trainids, classes)
    entropy = common.entropy_map(logits, trainids.shape[::-1])[0]  # (H, W)
    common.write_png(folder / f"{name}_entropy.png", common.grey(entropy))


def write_label_ids(folder, name: str, prediction: Tensor):
    """Write <folder>/<file name>_pred_labelIds.png: trainIds (H,W) as Cityscapes' label ids."""
    # Cityscapes' evaluator reads label ids, not trainIds; and it finds a file by its image's name.
    ids = np.array(common.CITYSCAPES_IDS, dtype=np.uint8)[prediction.cpu().numpy()]
    common.write_png(folder / f"{name.split('/')[-1]}_pred_labelIds.png", ids)


def score(args, networks: dict, device):
    """Print IoU in percent of the networks' mean logits on labelled images. With --save-dir write
    scores.json (percent; confusion in pixels), panel.png and the pictures of every image."""
    first = next(iter(networks.values()))
    root, classes = find_dataset(args, first.num_classes)
    pairs = common.keep_listed(common.list_pairs(args.target, root, args.split), args.target_list)
    # All networks see one size, since logits of different shapes have no mean.
    size = args.input_size or first.input_size
    dataset = common.Labelled(pairs, args.target, classes, size, native_labels=True)
    dataset.check_samples()
    # A dataset without splits is scored as a whole, whatever --split says.
    has_splits = "{split}" in common.find_layout(args.target, root, args.split).images
    title = f"{args.target} {args.split}" if has_splits else f"all images of {root}"

    def write(name, logits, prediction):
        if args.label_ids:
            write_label_ids(args.save_dir, name, prediction)
        elif args.save_dir:
            write_pictures(args.save_dir, name, logits, prediction, classes)

    result = common.evaluate(list(networks.values()), dataset, device, args.workers, write)
    print(f"\nIoU in percent, {title}, input {size[0]}x{size[1]}:")
    print(common.score_table({"IoU": result}))
    print(f"{result['images']} images, {result['images'] / result['seconds']:.2f} images/s")
    if not args.save_dir:
        return
    provenance = {
        "ckpt": [str(path) for path in networks],
        "input_size": size,
        "target": args.target,
        "split": args.split if has_splits else None,
        "target_list": args.target_list and str(args.target_list),
    }
    result["confusion"] = result["confusion"].tolist()
    common.write_text(args.save_dir / "scores.json", json.dumps({**provenance, **result}) + "\n")
    # The panel shows each network by itself, not their mean.
    columns = {"prediction": common.inference_copy(first)}
    if len(networks) > 1:
        columns = {str(path): common.inference_copy(network) for path, network in networks.items()}
    shown = common.evenly_spaced(len(dataset), 6)
    names = [dataset.names[i] for i in shown]
    panel = args.save_dir / "panel.png"
    common.write_panel(panel, columns, dataset, shown, classes, device, names)
    print(f"scores and pictures: {args.save_dir}")


# ====================================================================== your images


def find_images(patterns: list, save_dir) -> dict:
    """{name: path} of the images that the files, folders and globs give. A name is the path below
    the given folder, or the file's name, without the ending. UserError if two share a name."""
    found = {}
    for pattern in patterns:
        matches = [pattern]
        if not os.path.exists(pattern):  # a glob that the shell did not expand
            matches = sorted(glob.glob(pattern, recursive=True))
        own = {}
        for path in map(Path, matches):
            if path.is_dir():
                common.refuse_inside(save_dir, path)
                for file in common.files_below(path):
                    if file.suffix.lower() in common.PHOTOS:
                        own[file] = file.relative_to(path).with_suffix("").as_posix()
            else:
                own[path] = path.stem
        if not own:
            hint = f"Check the path. In a folder, {', '.join(common.PHOTOS)} are read."
            raise UserError(f"--images {pattern}: no image found. {hint}")
        for path, name in own.items():
            # Otherwise the next run would take its own pictures for images.
            if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(save_dir)):
                raise UserError(f"--save-dir {save_dir} holds {path}. Choose another folder.")
            if name in found and os.path.abspath(found[name]) != os.path.abspath(path):
                both = f"{found[name]} and {path} would both be written as {name}_*.png"
                raise UserError(f"{both}. Rename one, or give each a --save-dir of its own.")
            found[name] = path
    return found


class Photos(common.Images):
    """Photos of any size. An item is {"photo": (H,W,3) uint8 RGB at its own size, "image": as the
    network sees it}. A file that cannot be read gives {"error": a sentence}.

    The network sees `size`, or without one the photo's own aspect with the area of `like` (W,H).
    """

    def __init__(self, images: dict, size, like: tuple):
        super().__init__(images, size)
        self.like = like

    def __getitem__(self, index: int) -> dict:
        try:
            photo, _ = self.open(index)
        except (UserError, OSError) as error:
            return {"error": str(error)}
        # As many pixels as in training: the network knows objects of that scale.
        size = self.size or common.same_area(photo.size, self.like)
        return {"photo": np.array(photo), "image": np.array(common.resize(photo, size, "image"))}


@torch.no_grad()
def segment(args, networks: dict, device):
    """Write the pictures of --images, or with --label-ids the ids of a test split (no label is
    opened). An unreadable file is named and left out, and in the end a UserError counts them."""
    first = next(iter(networks.values()))
    if args.images:
        classes = common.class_names(first.num_classes)
        images = find_images(args.images, args.save_dir)
        size = args.input_size
    else:
        root, classes = find_dataset(args, first.num_classes)
        files = common.list_images(args.target, root, args.split)
        images = common.keep_listed(files, args.target_list)
        size = args.input_size or first.input_size  # as `score` sees a dataset
    photos = Photos(images, size, first.input_size)
    torch.backends.cudnn.benchmark = False  # it times its algorithms for every new size
    copies = [common.inference_copy(network) for network in networks.values()]
    left_out = 0
    for name, item in zip(images, common.one_by_one(photos, args.workers)):
        if "error" in item:
            left_out += 1
            print(f"left out: {item['error']}")
            continue
        x = common.image_tensor(item["image"], device)  # (1, 3, h, w)
        photo = item["photo"]  # (H, W, 3)
        logits = common.mean_logits(copies, x)
        prediction = common.upsampled_argmax(logits, (photo.shape[1], photo.shape[0]))[0]  # (H, W)
        if args.label_ids:
            write_label_ids(args.save_dir, name, prediction)
            continue
        write_pictures(args.save_dir, name, logits, prediction, classes)
        # Half photo, half class colour, so that both can be seen.
        colours = common.palette(classes)[prediction.cpu().numpy()]  # (H, W, 3)
        overlay = (photo.astype(np.uint16) + colours) // 2  # a sum of two bytes needs 16 bits
        common.write_png(args.save_dir / f"{name}_overlay.png", overlay.astype(np.uint8))
    print(f"{len(images) - left_out} images segmented: {args.save_dir}")
    # Only now, so that one bad file does not cost the others.
    if left_out:
        raise UserError(f"{left_out} of {len(images)} images could not be read. See above.")


# ====================================================================== main


def main():
    args = parse()
    check(args)
    device = common.set_up_device(args.device)
    networks = load_networks(args.ckpt, device)
    if args.images or (args.label_ids and args.split == "test"):
        segment(args, networks, device)
    else:
        score(args, networks, device)


if __name__ == "__main__":
    common.launch(main)
