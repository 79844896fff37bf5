"""How good the target labels of a finished BCL run are, measured on labelled validation images.

    python tools/label_quality.py runs/bcl                          a run on the drawn scenes
    python tools/label_quality.py runs/bcl --data-root DIR --images 100 --save labels.png

Each validation image is paired with one source image, which is augmented as in training. The target
image is not cropped; it has the size at which static labels are made. BatchNorm sees one image at
a time, in training a batch. Two tables in percent are printed:

1. Static labels y_F, dynamic labels y_D and hybrid labels at the run's τ, over the pixels whose
   true class is known. "coverage": the labelled share. "right": the correct share of the labelled.
2. The nearest calibrated prototype for each τ, over the map's positions whose true class is known:
   all of them, or those without a static label. "coverage": the share of positions whose similarity
   to the prototype is above τ (τ = -1: all). "prototype", "classifier": how often the nearest
   prototype and the classifier are right there. Three ξ are compared: the run's, zero, and the true
   one. The true ξ is the mean target prototype minus the mean source prototype, by true labels.

--save writes the paper's figure: one target image beside two source images.
"""

import argparse
import ast
import functools
import json
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import StackDataset, Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bcl
import common
from common import IGNORE, UserError

TAUS = (-1, 0.5, 0.6, 0.7, 0.8, 0.9)


class Run(NamedTuple):
    """What a finished BCL run holds: settings {flag: value}, networks and thresholds."""

    settings: dict
    encoder: torch.nn.Module  # G, its BatchNorm as in training (--bn)
    predictor: torch.nn.Module  # G as it makes static labels (--label-bn)
    ema_source: bcl.PrototypeEMA
    ema_target: bcl.PrototypeEMA
    thresholds: Tensor  # (C,) bins of the last round


def read_run(folder: Path, device) -> Run:
    if not (folder / "last.pth").exists():
        raise UserError(f"no last.pth in {folder}. Name the --out folder of bcl.py.")
    content = common.read_checkpoint(folder / "last.pth")
    if "ema_source" not in content:
        raise UserError(f"{folder} is not a run of bcl.py. Name the --out folder of bcl.py.")
    settings = {}
    for name, text in content["settings"].items():
        try:
            settings[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):  # not a number, a tuple or True
            settings[name] = text
    settings["images"] = content["settings"]["images"]  # a hash, never a number
    # Before its end a run has labels of one round and thresholds of another.
    total = settings["rounds"] * settings["round_iters"]
    if content["iter"] < total:
        raise UserError(f"{folder} has {content['iter']} of {total} iterations. Resume it first.")
    G = common.load(folder / "last.pth").to(device)
    predictor = bcl.label_network(G, settings["label_bn"])
    common.set_mode(G, settings["bn"])  # features as the loop sees them, not as evaluation does
    emas = []
    for side in ("ema_source", "ema_target"):
        ema = bcl.PrototypeEMA(G.num_classes, 32 * G.width, settings["momentum"])
        ema.load_state_dict(content[side])
        emas.append(ema.to(device))
    labels = folder / f"round{settings['rounds'] - 1}" / "labels.json"
    thresholds = torch.tensor(json.loads(labels.read_text())["bins"], device=device)
    return Run(settings, G, predictor, *emas, thresholds)


class Seen(NamedTuple):
    """A pair of images as the method sees them, with the target's true labels."""

    f_s: Tensor  # (D, h, w) features of the source image
    y_s: Tensor  # (h, w) its labels
    f_t: Tensor  # (D, h, w) features of the target image
    truth: Tensor  # (h, w) the target's true labels
    classified: Tensor  # (h, w) the classifier's answer
    y_f_full: Tensor  # (H, W) static labels at the size of the true labels
    truth_full: Tensor  # (H, W)


@torch.no_grad()
def see(run: Run, target: dict, source: dict, device) -> Seen:
    """Run the networks on a pair. `target` and `source` are items of `common.Labelled`."""
    x_s = common.image_tensor(source["image"], device)  # (1, 3, H, W)
    x_t = common.image_tensor(target["image"], device)
    y_s_full = common.to_device(source["label"], device).long()[None]  # (1, H, W)
    truth_full = common.to_device(target["label"], device).long()[None]
    S = run.encoder(common.normalize(x_s))
    T = run.encoder(common.normalize(x_t))
    h, w = T.features.shape[2:]
    size = (x_t.shape[3], x_t.shape[2])
    prediction, bins = bcl.confident_prediction(run.predictor, x_t[0], size)
    absent = common.ABSENT.get(run.settings["source"], ())
    ratio = run.settings["static_ratio"]
    y_f = bcl.static_labels(prediction, bins, run.thresholds, ratio, absent)  # at the input's size
    return Seen(
        f_s=S.features[0],
        y_s=common.pick(y_s_full, *S.features.shape[2:])[0],
        f_t=T.features[0],
        truth=common.pick(truth_full, h, w)[0],
        classified=T.main[0].argmax(0),
        y_f_full=bcl.enlarge(y_f[None], *truth_full.shape[1:])[0],
        truth_full=truth_full[0],
    )


def labels_of(run: Run, seen: Seen) -> dict:
    """{"static", "dynamic", "hybrid": (H,W) labels} of the pair at the run's τ, at full size."""
    p_st = bcl.class_prototypes(seen.f_s, seen.y_s, len(run.thresholds))
    if run.settings["calibrate"]:
        p_st = bcl.calibrate(p_st, run.ema_source, run.ema_target)
    y_d = bcl.dynamic_labels(seen.f_t, p_st, run.settings["tau"])  # (h, w)
    y_d_full = bcl.enlarge(y_d[None], *seen.truth_full.shape)[0]
    kinds = ("static", "dynamic", "hybrid")
    return {kind: bcl.target_labels(kind, seen.y_f_full, y_d_full) for kind in kinds}


def count(members: Tensor, labelled: Tensor, *answers: Tensor) -> np.ndarray:
    """Three or more counts of positions: the members, the labelled members, and for each answer
    (True where it is right) the labelled members on which it is right."""
    # Counts, not shares: images of different sizes must weigh by their pixels.
    labelled = labelled & members
    counts = [members.sum(), labelled.sum(), *((labelled & right).sum() for right in answers)]
    return torch.stack(counts).cpu().numpy()


def percentages(counts: np.ndarray) -> str:
    """The result of `count` as text: the coverage, then the right share of each answer."""
    members, labelled, *hits = counts
    cells = [f"{100 * labelled / members:8.1f}" if members else f"{'-':>8}"]
    for right in hits:
        cells.append(f"{100 * right / labelled:12.1f}" if labelled else f"{'-':>12}")
    return "".join(cells)


def true_bias(run: Run, pairs, device) -> tuple:
    """(μ_S, μ_T) by true labels: each a `PrototypeEMA` that holds the mean over all pairs."""
    p_s = []
    p_t = []
    C = len(run.thresholds)
    for target, source in pairs:
        seen = see(run, target, source, device)
        p_s.append(bcl.class_prototypes(seen.f_s, seen.y_s, C))
        p_t.append(bcl.class_prototypes(seen.f_t, seen.truth, C))
    means = []
    for prototypes in (p_s, p_t):
        # calibrate() takes EMAs; with momentum 0 one holds the mean itself.
        mean = bcl.PrototypeEMA(C, len(seen.f_s), momentum=0.0).to(device)
        mean.update(bcl.mean_prototypes(prototypes))
        means.append(mean)
    return tuple(means)


def report(run: Run, pairs, device):
    """Print both tables. pairs: a dataset of (target item, source item). It is read twice."""
    C = len(run.thresholds)
    biases = {
        "ξ of the run": (run.ema_source, run.ema_target),
        "ξ = 0": None,
        "true ξ": true_bias(run, pairs, device),
    }
    of_kinds = {}
    of_taus = {}  # (bias, positions, τ): counts
    for target, source in pairs:
        seen = see(run, target, source, device)
        known = seen.truth_full != IGNORE
        for kind, label in labels_of(run, seen).items():
            counts = count(known, label != IGNORE, label == seen.truth_full)
            of_kinds[kind] = of_kinds.get(kind, 0) + counts

        p_s = bcl.class_prototypes(seen.f_s, seen.y_s, C)
        y_f = common.pick(seen.y_f_full[None], *seen.truth.shape)[0]  # (h, w)
        known = seen.truth != IGNORE
        groups = {"all": known, "without y_F": known & (y_f == IGNORE)}
        # The question of the second table: does a sure prototype know more than the classifier?
        classifier_right = seen.classified == seen.truth
        for bias, emas in biases.items():
            p_st = bcl.calibrate(p_s, *emas) if emas else p_s
            for tau in TAUS:
                y_d = bcl.dynamic_labels(seen.f_t, p_st, tau)  # (h, w)
                for group, members in groups.items():
                    key = (bias, group, tau)
                    counts = count(members, y_d != IGNORE, y_d == seen.truth, classifier_right)
                    of_taus[key] = of_taus.get(key, 0) + counts

    print(f"\nlabels at τ = {run.settings['tau']}, in percent of the pixels that have a class")
    print(f"{'':24}coverage       right")
    for kind, counts in of_kinds.items():
        print(f"{kind:24}{percentages(counts)}")
    print("\nnearest prototypes, in percent of the map's positions that have a class")
    print(f"{'':14}{'positions':13}{'τ':>5}  coverage   prototype  classifier")
    for bias, group, tau in product(biases, groups, TAUS):
        counts = of_taus[bias, group, tau]
        print(f"{bias:14}{group:13}{tau:>5}  {percentages(counts)}")


def draw_figure(path, run: Run, pairs, classes: tuple, device):
    """The paper's figure: the dynamic labels of a target image change with its source image."""
    rows = []
    for target, source in pairs:
        seen = see(run, target, source, device)
        row = [source["image"], source["label"], target["image"]]
        row += [label.byte().cpu().numpy() for label in labels_of(run, seen).values()]
        rows.append([*row, target["label"]])
    titles = ["source image", "its label", "target image", "static", "dynamic", "hybrid"]
    common.write_grid(path, [*titles, "ground truth"], rows, classes)
    print(f"\nfigure: {path}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="--out of a finished run of bcl.py")
    add("--data-root", type=Path, help="as in the run; none: drawn scenes")
    add("--source-root", type=Path, help="as in the run")
    add("--target-root", type=Path, help="as in the run")
    add("--images", type=int, default=100, metavar="N", help="at most N validation images (100)")
    add("--save", type=Path, metavar="PNG", help="write the paper's figure")
    add("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    args = parser.parse_args()
    device = common.set_up_device(args.device)
    run = read_run(args.run, device)
    settings = run.settings
    if args.images < 1:
        raise UserError("--images must be 1 or more.")
    drawn = not (args.data_root or args.source_root or args.target_root)
    if drawn and "folder" in (settings["source"], settings["target"]):
        roots = "Give --source-root and --target-root."
        raise UserError(f"{args.run} was trained on plain folders. {roots}")
    if drawn:
        from demo.scenes import demo_scenes

        print("Built-in scenes. Real data: --data-root DIR")
        args.data_root = demo_scenes(settings["source"])
    target_root = common.dataset_root(settings["target"], args.data_root, args.target_root)
    source_root = common.dataset_root(settings["source"], args.data_root, args.source_root)
    classes = common.dataset_classes(settings["target"], target_root, len(run.thresholds))
    size = settings["target_size"]
    validation = common.validation_set(settings["target"], target_root, classes, size)
    if validation is None:
        raise UserError(f"no labelled val images in {target_root}. Name a target that has some.")
    transform = functools.partial(
        bcl.augment,
        short_side=settings["short_side"],
        scales=settings["scales"],
        crop=settings["crop"],
        flip=settings["flip"],
    )
    pairs = common.list_pairs(settings["source"], source_root)
    names = [*pairs, *common.list_images(settings["target"], target_root)]
    if drawn and settings["images"] != common.fingerprint(names):
        what = f"{args.run} was not trained on exactly the built-in scenes"
        raise UserError(f"{what}. Name its data with --data-root (data/scenes for a part of them).")
    seed = settings["seed"]
    source = common.Labelled(pairs, settings["source"], classes, transform=transform, seed=seed)

    indices = common.evenly_spaced(len(validation), args.images)
    # (i, j): source image j, augmented as sample i. Steps of a prime spread j over the source.
    partners = [(i, i * 7919 % len(source)) for i in indices]
    report(run, StackDataset(Subset(validation, indices), Subset(source, partners)), device)
    if args.save:
        shown = [(validation[0], source[0, j]) for j in (0, len(source) // 2)]
        draw_figure(args.save, run, shown, classes, device)


if __name__ == "__main__":
    common.launch(main)
