"""How good the target labels of a finished BCL run are, measured on labelled validation images.

    python tools/label_quality.py runs/bcl                          a run on the drawn scenes
    python tools/label_quality.py runs/bcl --data-root DIR --images 100 --save labels.png

Each validation image is paired with one source image, augmented as in training. The target image
is whole, at the size at which static labels are made. A batch holds one pair, so that BatchNorm
sees less than in training. Two tables in percent:

1. Static labels y_F, dynamic ones y_D and hybrid ones at the run's τ. Coverage is the labelled
   share of the pixels that have a class; right is the correct share of the labelled pixels.
2. The nearest calibrated prototype, for each τ. Coverage is the share of the map's positions whose
   similarity to it exceeds τ (τ = -1: all). On these positions stand the correct shares of the
   nearest prototype and of the classifier; over all positions that have a class, and over those
   of them without a static label. Three rows of ξ: that of the run, none, and the true one, which
   is the mean prototype of the validation images minus that of the paired source images, both by
   true labels.

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
    """What a BCL run has left: its settings {flag: value}, networks and thresholds."""

    settings: dict
    encoder: torch.nn.Module  # in training's mode
    predictor: torch.nn.Module  # makes static labels
    ema_source: bcl.PrototypeEMA
    ema_target: bcl.PrototypeEMA
    thresholds: Tensor  # (C,) bins of the last round


def read_run(folder: Path, device) -> Run:
    if not (folder / "last.pth").exists():
        raise UserError(f"no run in {folder}. Name the --out of a run of bcl.py.")
    content = common.read_checkpoint(folder / "last.pth")
    if "ema_source" not in content:
        raise UserError(f"{folder} is not a run of bcl.py. Name the --out of one.")
    settings = {}
    for name, text in content["settings"].items():
        try:
            settings[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):  # a word
            settings[name] = text
    total = settings["rounds"] * settings["round_iters"]
    if content["iter"] < total:
        raise UserError(f"{folder} has {content['iter']} of {total} iterations. Resume it first.")
    G = common.load(folder / "last.pth").to(device)
    predictor = bcl.label_network(G, settings["label_bn"])
    common.set_mode(G, settings["bn"])
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
    """`target` and `source` are items of `common.Labelled`."""
    x_s = common.to_device(source["image"], device).permute(2, 0, 1)[None]  # (1, 3, H, W)
    x_t = common.to_device(target["image"], device).permute(2, 0, 1)[None]
    y_s_full = common.to_device(source["label"], device).long()[None]  # (1, H, W)
    truth_full = common.to_device(target["label"], device).long()[None]
    S = run.encoder(common.normalize(x_s))
    T = run.encoder(common.normalize(x_t))
    h, w = T.features.shape[2:]
    size = (x_t.shape[3], x_t.shape[2])
    prediction, bins = bcl.confident_prediction(run.predictor, x_t[0], size)
    absent = common.ABSENT.get(run.settings["source"], ())
    ratio = run.settings["static_ratio"]
    y_f = bcl.choose_static(prediction, bins, run.thresholds, ratio, absent)  # at the input's size
    return Seen(
        f_s=S.features[0],
        y_s=common.pick(y_s_full, *S.features.shape[2:])[0],
        f_t=T.features[0],
        truth=common.pick(truth_full, h, w)[0],
        classified=T.main[0].argmax(0),
        y_f_full=common.pick(y_f[None], *truth_full.shape[1:])[0],
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
    """Counts of positions: members; those labelled; those of them on which each answer, a mask, is
    right."""
    labelled = labelled & members
    counts = [members.sum(), labelled.sum(), *((labelled & right).sum() for right in answers)]
    return torch.stack(counts).cpu().numpy()


def percentages(counts: np.ndarray) -> str:
    """Coverage and the shares right of what is labelled, of `count`."""
    members, labelled, *hits = counts
    cells = [f"{100 * labelled / members:8.1f}" if members else f"{'-':>8}"]
    for right in hits:
        cells.append(f"{100 * right / labelled:12.1f}" if labelled else f"{'-':>12}")
    return "".join(cells)


def true_bias(run: Run, pairs, device) -> tuple:
    """(μ_S, μ_T) by true labels: a `PrototypeEMA` each, of the mean prototypes of the pairs."""
    p_s = []
    p_t = []
    C = len(run.thresholds)
    for target, source in pairs:
        seen = see(run, target, source, device)
        p_s.append(bcl.class_prototypes(seen.f_s, seen.y_s, C))
        p_t.append(bcl.class_prototypes(seen.f_t, seen.truth, C))
    means = []
    for prototypes in (p_s, p_t):
        mean = bcl.PrototypeEMA(C, len(seen.f_s), momentum=0.0).to(device)
        mean.update(bcl.batch_mean(prototypes))
        means.append(mean)
    return tuple(means)


def report(run: Run, pairs, device):
    """Print both tables. pairs: a dataset of (target item, source item), gone through twice."""
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
    add("--images", type=int, default=100, metavar="N", help="validation images, at most (100)")
    add("--save", type=Path, metavar="PNG", help="write the paper's figure")
    add("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    args = parser.parse_args()
    device = common.set_up(args.device)
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
        raise UserError(f"labels are measured on labelled images. {target_root} has none in val.")
    transform = functools.partial(
        bcl.augment,
        short_side=settings["short_side"],
        scales=settings["scales"],
        crop=settings["crop"],
        flip=settings["flip"],
    )
    pairs = common.list_pairs(settings["source"], source_root)
    files = [*pairs, *common.list_images(settings["target"], target_root)]
    if drawn and settings["images"] != common.fingerprint(files):
        what = f"{args.run} was trained on other images than all built-in scenes"
        raise UserError(f"{what}. Name them; for a list of these scenes: --data-root data/scenes.")
    seed = settings["seed"]
    source = common.Labelled(pairs, settings["source"], classes, transform=transform, seed=seed)

    indices = common.evenly_spaced(len(validation), args.images)
    # (i, j): source image j, augmented as sample i; a prime step mixes them well
    partners = [(i, i * 7919 % len(source)) for i in indices]
    report(run, StackDataset(Subset(validation, indices), Subset(source, partners)), device)
    if args.save:
        shown = [(validation[0], source[0, j]) for j in (0, len(source) // 2)]
        draw_figure(args.save, run, shown, classes, device)


if __name__ == "__main__":
    common.launch(main)
