"""t-SNE of encoder features of both domains, with the class prototypes of each.

    python tools/tsne.py --ckpt runs/bcl/last.pth                  drawn scenes, tsne.npz, tsne.png
    python tools/tsne.py --ckpt FILE --data-root DIR --out x       GTA5 and Cityscapes, x.npz, x.png

The .npz has features (N,D) float32, label (N,) trainIds, domain (N,) 0 source (train) or 1 target
(val), is_prototype (N,) bool and names (C,). Drawing needs matplotlib and scikit-learn.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from common import UserError


@torch.no_grad()
def sample_features(network, dataset, images: int, points: int, seed: int, device) -> tuple:
    """(features (N,D), label (N,), is_prototype (N,)) of at most `images` images of a dataset.
    First come at most `points` random positions of each class, then the prototypes. A prototype is
    the mean over all positions of a class in these images, drawn or not."""
    generator = torch.Generator().manual_seed(seed)
    C = len(dataset.classes)
    D = 32 * network.width
    total = torch.zeros(C, D, dtype=torch.float64)
    count = torch.zeros(C, 1)
    # Every position gets a random number. A class keeps the positions with its largest numbers.
    draws = [torch.zeros(0)] * C
    kept = [torch.zeros(0, D)] * C
    chosen = Subset(dataset, common.evenly_spaced(len(dataset), images))
    for item in common.one_by_one(chosen, workers=0):
        x = common.image_tensor(item["image"], device)  # (1, 3, H, W)
        maps = network(common.normalize(x)).features[0].cpu()  # (D, h, w)
        y = common.pick(torch.from_numpy(item["label"])[None], *maps.shape[1:]).flatten()  # (hw,)
        f = maps.flatten(1).T  # (hw, D)
        for c in range(C):
            own = f[y == c]
            total[c] += own.double().sum(0)
            count[c] += len(own)
            drawn = torch.cat([draws[c], torch.rand(len(own), generator=generator)])
            draws[c], best = drawn.topk(min(points, len(drawn)))
            kept[c] = torch.cat([kept[c], own])[best]
    present = np.flatnonzero(count)
    prototypes = (total[present] / count[present]).float()
    of_points = np.repeat(np.arange(C), [len(own) for own in kept])
    label = np.concatenate([of_points, present])
    is_prototype = np.arange(len(label)) >= len(of_points)
    return torch.cat([*kept, prototypes]).numpy(), label, is_prototype


def draw(path, features, label, domain, is_prototype, classes: tuple):
    """Write the picture: o is source, x is target, prototypes are larger, colours are classes."""
    try:
        from matplotlib.figure import Figure
        from sklearn.manifold import TSNE
    except ImportError:
        hint = "Run pip install matplotlib scikit-learn."
        raise UserError(f"matplotlib or scikit-learn is not installed. {hint}") from None
    unit = F.normalize(torch.from_numpy(features), dim=1).numpy()  # as in BCL's losses
    perplexity = min(30, (len(unit) - 1) / 3)
    xy = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)
    figure = Figure((11, 8), layout="constrained")
    axes = figure.subplots()
    for c in np.unique(label):
        colour = common.palette(classes)[c] / 255
        axes.scatter([], [], color=colour, label=classes[c])  # the legend's entry
        for side, marker in enumerate("oX"):
            own = (label == c) & (domain == side)
            size = np.where(is_prototype[own], 150, 20)
            edge = np.where(is_prototype[own], 1.0, 0.0)  # none around points
            style = {"color": colour, "marker": marker, "edgecolors": "black"}
            axes.scatter(*xy[own].T, size, linewidths=edge, **style)
    axes.set_title("t-SNE of encoder features: source o, target x, prototypes large")
    axes.set_axis_off()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    with common.atomic_write(path) as file:
        figure.savefig(file, format="png")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, metavar="FILE", help="trained checkpoint")
    add("--data-root", type=Path, help="folder with GTA5/, Cityscapes/, ...; none: drawn scenes")
    add("--source", choices=common.SOURCES, default="gta5", help="its train is read (gta5)")
    add("--source-root", type=Path, help="source folder, if not below --data-root")
    add("--target", choices=common.TARGETS, default="cityscapes", help="its val is read")
    add("--target-root", type=Path, help="target folder, if not below --data-root")
    add("--images", type=int, default=500, help="at most so many of each domain (500)")
    add("--points", type=int, default=50, help="at most so many of a class in a domain (50)")
    add("--out", default="tsne", help="write OUT.npz and OUT.png (tsne)")
    add("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    args = parser.parse_args()
    if min(args.images, args.points) < 1:
        raise UserError("--images and --points must be 1 or more.")
    device = common.set_up_device(args.device)
    network = common.inference_copy(common.load(args.ckpt)).to(device)
    if not (args.data_root or args.source_root or args.target_root):
        from demo.scenes import demo_scenes

        print("Built-in scenes. Real data: --data-root DIR")
        args.data_root = demo_scenes(args.source)
    target_root = common.dataset_root(args.target, args.data_root, args.target_root)
    source_root = common.dataset_root(args.source, args.data_root, args.source_root)
    classes = common.dataset_classes(args.target, target_root, network.num_classes)
    common.check_classes(args.source, source_root, classes)
    if len(classes) != 19 and not args.source == args.target == "folder":
        hint = "Give --source folder and --target folder."
        raise UserError(f"{args.ckpt} predicts {len(classes)} classes, datasets have 19. {hint}")
    sides = [
        (args.source, common.list_pairs(args.source, source_root)),
        (args.target, common.list_pairs(args.target, target_root, "val")),
    ]
    parts = []
    for side, (kind, pairs) in enumerate(sides):
        dataset = common.Labelled(pairs, kind, classes, network.input_size, native_labels=True)
        found = sample_features(network, dataset, args.images, args.points, side, device)
        parts.append((*found, np.full(len(found[1]), side)))
    features, label, is_prototype, domain = map(np.concatenate, zip(*parts))
    if len(label) < 4:
        raise UserError("t-SNE needs 4 features, and fewer have a class. Raise --images.")
    arrays = {"features": features, "label": label, "domain": domain}
    arrays.update(is_prototype=is_prototype, names=np.array(classes))
    with common.atomic_write(f"{args.out}.npz") as file:
        np.savez(file, **arrays)
    print(f"{args.out}.npz: {len(label)} features and prototypes")
    draw(f"{args.out}.png", features, label, domain, is_prototype, classes)
    print(f"{args.out}.png: their t-SNE")


if __name__ == "__main__":
    common.launch(main)
