"""Trains demo/initial.pth, the initial weights of the demo. (The papers start from ImageNet.)

The small network is trained on drawn source scenes alone, for about fifteen minutes on two cores.
The scenes have a seed that the demo does not use. Another machine gives other weights, because
differences of rounding grow over thousands of iterations; the scores agree within a few tenths of a
point. Weights are stored in half precision.

    python demo/initial.py demo/initial.pth       overwrites the tracked file
    python demo/initial.py OUT --threads 1        writes elsewhere, on one core
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

if __name__ == "__main__":  # as a script, Python looks for common.py in demo/ and not above it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from demo.scenes import draw_scene

SEED = 1000  # the scenes are the GTA5 tree of `demo/scenes.py --seed 1000`
SIZE = (256, 128)  # (W, H)
SCENES = 3000
ITERATIONS = 6000
BATCH = 4
LEARNING_RATE = 0.01
RAMP = 100  # iterations over which the learning rate rises; the first gradients are large


def draw(seed, count):
    """Source scenes: images (N,3,H,W) and labels (N,H,W), uint8."""
    width, height = SIZE
    images = np.empty((count, 3, height, width), np.uint8)
    labels = np.empty((count, height, width), np.uint8)
    for i in range(count):
        image, labels[i] = draw_scene(np.random.default_rng((seed, 0, i)), SIZE, "source")
        images[i] = image.transpose(2, 0, 1)
    return torch.from_numpy(images), torch.from_numpy(labels)


def batch_of(images, labels, iteration):
    """Batch number `iteration`. Every epoch has a new order. Half of the images are mirrored."""
    epoch, first = divmod(iteration * BATCH, SCENES)
    order = np.random.default_rng((SEED, 1, epoch)).permutation(SCENES)
    chosen = order[first : first + BATCH]
    mirrored = torch.from_numpy(np.random.default_rng((SEED, 2, iteration)).random(BATCH) < 0.5)
    x = images[chosen]
    y = labels[chosen].long()
    x[mirrored] = x[mirrored].flip(3)
    y[mirrored] = y[mirrored].flip(2)
    return x, y


def cross_entropy(logits, labels):
    """Logits (B,C,h,w) against labels (B,H,W); a scalar."""
    full = common.upsample(logits, SIZE)  # (B, C, H, W)
    return F.cross_entropy(full, labels, ignore_index=common.IGNORE)


def train(images, labels):
    torch.manual_seed(SEED)
    network = common.DeepLabV2(num_classes=19, layers=(1, 1, 1, 1), width=16)
    network.train()
    # The heads have factor 1: the trunk is random, too, and needs the same high rate.
    groups = network.parameter_groups("released", 1.0)
    for group in groups:
        group["weight_decay"] = 5e-4  # as the tracked file was made, not the released decay
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9)
    start = time.perf_counter()
    for it in range(ITERATIONS):
        ramp = min(1, (it + 1) / RAMP)
        lr = LEARNING_RATE * ramp * (1 - it / ITERATIONS) ** 0.9
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        x, y = batch_of(images, labels, it)
        prediction = network(common.normalize(x))
        loss = cross_entropy(prediction.main, y) + 0.1 * cross_entropy(prediction.aux, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (it + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"{it + 1} of {ITERATIONS}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    return network


def score(network):
    """mIoU in percent on 100 source scenes of a third seed."""
    images, labels = draw(SEED + 1, 100)
    network.eval()
    confusion = torch.zeros(19, 19, dtype=torch.int64)
    for image, label in zip(images, labels):
        prediction = common.predict(network, Image.fromarray(image.permute(1, 2, 0).numpy()), SIZE)
        confusion += common.confusion_matrix(label, prediction, 19)
    return common.scores(confusion, common.CLASSES)["miou19"]


def save(path, network, minutes):
    """Write the weights in half precision, with a header that says how they were made."""
    weights = {}
    for name, tensor in network.state_dict().items():
        weights[name] = tensor.half() if tensor.is_floating_point() else tensor
    header = {
        "format": common.FORMAT,
        "command": f"python demo/initial.py {path}",
        "trained_on": f"{SCENES} drawn source scenes, seed {SEED}, {ITERATIONS} iterations",
        "minutes": minutes,
        "miou_source_scenes": score(network),
        "input_size": SIZE,
    }
    with common.atomic_write(path) as file:
        torch.save({**header, "model": weights}, file)
    print(f"wrote {path}: {header}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    print(f"drawing {SCENES} source scenes ...", flush=True)
    images, labels = draw(SEED, SCENES)
    network = train(images, labels)
    save(args.out, network, round((time.perf_counter() - start) / 60, 1))


if __name__ == "__main__":
    common.launch(main)
