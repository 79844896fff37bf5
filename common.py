"""What both methods share: classes, DeepLab-V2, weight files, readers, mIoU, runs, pictures.

This file holds no flag, no loss and no training loop: these are in the file of each method. Sizes
are (W, H). Tensors are (B, C, H, W). Labels are trainIds 0..C-1, and 255 means ignore. Images are
uint8 RGB until `normalize` converts them to float BGR minus the mean.

Contents: errors and files · classes · network · weight files · readers · sampling · evaluation ·
          device and ranks · resume, save, log · pictures
"""

import colorsys
import contextlib
import copy
import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import Bottleneck

# TF32 is off: it rounds float32 inputs to 10 bits. Only training may use less (`autocast`).
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False  # NVIDIA's containers switch it on

# ====================================================================== errors and files


class UserError(Exception):
    """A mistake that the user can correct. Its message says what was found and what to do."""


def launch(main):
    """Run a script's main(), then exit: with 0 if it ended, with 2 and a message for an error that
    the user can correct, with 130 after Ctrl-C, with 1 and a traceback for any other error."""
    status = 0
    message = None
    try:
        main()
    except KeyboardInterrupt:
        status = 130
        message = f"\nstopped{resume_hint}"
    except Exception as error:
        sentence = explain(error)
        status = 2 if sentence else 1
        message = f"error: {sentence}" if sentence else traceback.format_exc()
    if message:
        with contextlib.suppress(OSError):  # stderr may be on a full disk
            print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():  # a normal exit waits for other ranks, and may hang in torch 2.4
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


resume_hint = ""  # what Ctrl-C prints about resuming; `resume` and `save` set it


def explain(error: Exception):
    """Return the message for an error that the user can correct, None for any other error."""
    text = str(error).strip()
    # An error in a reading process arrives as a printed traceback. Its last line is the message.
    line = text.split("\n")[-1]
    if isinstance(error, UserError):
        return " ".join(text.split("UserError: ")[-1].splitlines())
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "the GPU is out of memory. Use smaller images or --checkpoint-activations."
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "the computer is out of memory. Lower --workers, the batch or the image size."
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"a process that reads images ended ({line}). Memory may be short: lower --workers."
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(text.split("\n")[:2])[:200]
        return f"--compile failed ({reason}). Install g++, make room in $TMPDIR, or drop the flag."
    if isinstance(error, BrokenPipeError):
        return "the program that reads the output has ended. Write the output to a file."
    if isinstance(error, OSError) and "Too many open files" in text:
        return f"{line}. Raise the limit with `ulimit -n 4096`, or lower --workers."
    if isinstance(error, OSError) and "Permission denied" in text:
        return f"{line}. Change its permissions."
    if isinstance(error, OSError):
        return f"{line}. Check the path and the disk."
    return None


@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for binary writing and make its folder. The file appears complete or not at all,
    even if the process is killed. Raises UserError if the file cannot be written."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        if isinstance(error.__context__, KeyboardInterrupt):  # and Ctrl-C as well
            raise KeyboardInterrupt from None
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}). Check the path and the free disk space.")


def write_text(path, text: str):
    with atomic_write(path) as file:
        file.write(text.encode())


def write_png(path, array: np.ndarray, classes: tuple = None):
    """Write a uint8 picture (H,W,3) or (H,W) as PNG. With class names, (H,W) trainIds keep their
    values, and a palette lets viewers show them in colour."""
    image = Image.fromarray(array)
    if classes is not None:
        image.putpalette(palette(classes).tobytes())
    with atomic_write(path) as file:
        image.save(file, format="PNG")


lock_file = None  # closing it would unlock


def lock(out):
    """Lock the folder `out` until this process ends."""
    global lock_file
    if rank() == 0:
        Path(out).mkdir(parents=True, exist_ok=True)
        lock_file = open(Path(out, ".lock"), "w")
        try:
            # Reading processes do not inherit fcntl's lock: kill -9 of this one frees it at once.
            fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out} is in use by another run. Wait, or choose another --out.")
        except OSError as error:  # some file systems of clusters have no locks
            print(f"{out} cannot be locked ({error.strerror}). Do not start another run in it.")
    barrier()


def digest(data: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()[:16]


def fingerprint(names) -> str:
    """Hash a list of names, in this order. The contents of the files do not count."""
    return digest("\n".join(names).encode())


def refuse_inside(out, folder):
    """Refuse an output folder inside a folder of images: the next run would read its pictures."""
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{out} lies inside the image folder {folder}. Write elsewhere.")


def WxH(text: str) -> tuple:
    """Convert "1024x512" to (1024, 512). argparse reports a ValueError, here and below."""
    width, height = text.lower().split("x")
    return int(width), int(height)


def block_counts(text: str) -> tuple:
    """Convert "3,4,23,3", the blocks of a ResNet's four stages, to (3, 4, 23, 3)."""
    one, two, three, four = map(int, text.split(","))
    return one, two, three, four


# ====================================================================== classes

IGNORE = 255
# A row for each trainId, in order: class, Cityscapes id (GTA5, Synscapes, ACDC and Dark Zurich use
# the same ids), SYNTHIA id, colour.
CLASS_TABLE = (
    ("road",            7,   3, (128, 64, 128)),
    ("sidewalk",        8,   4, (244, 35, 232)),
    ("building",       11,   2, (70, 70, 70)),
    ("wall",           12,  21, (102, 102, 156)),
    ("fence",          13,   5, (190, 153, 153)),
    ("pole",           17,   7, (153, 153, 153)),
    ("traffic light",  19,  15, (250, 170, 30)),
    ("traffic sign",   20,   9, (220, 220, 0)),
    ("vegetation",     21,   6, (107, 142, 35)),
    ("terrain",        22,  16, (152, 251, 152)),
    ("sky",            23,   1, (70, 130, 180)),
    ("person",         24,  10, (220, 20, 60)),
    ("rider",          25,  17, (255, 0, 0)),
    ("car",            26,   8, (0, 0, 142)),
    ("truck",          27,  18, (0, 0, 70)),
    ("bus",            28,  19, (0, 60, 100)),
    ("train",          31,  20, (0, 80, 100)),
    ("motorcycle",     32,  12, (0, 0, 230)),
    ("bicycle",        33,  11, (119, 11, 32)),
)  # fmt: skip
CLASSES, CITYSCAPES_IDS, SYNTHIA_IDS, COLOURS = zip(*CLASS_TABLE)
ABSENT = {"synthia": (9, 14, 16)}  # trainIds that a source never has: terrain, truck, train
SUBSET_16 = tuple(c for c in range(19) if c not in ABSENT["synthia"])
SUBSET_13 = tuple(c for c in SUBSET_16 if c not in (3, 4, 5))  # also without wall, fence, pole


def class_names(num_classes: int) -> tuple:
    """Return Cityscapes' names for 19 classes, numbers as names for any other count."""
    if num_classes == 19:
        return CLASSES
    return tuple(str(c) for c in range(num_classes))


def palette(classes: tuple) -> np.ndarray:
    """Return (256,3) uint8 colours of trainIds: `palette(classes)[labels]` is (H,W,3). Cityscapes'
    classes have their own colours, other class sets get distant hues. 255 is black."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    if tuple(classes) == CLASSES:
        colours[:19] = COLOURS
        return colours
    for c in range(len(classes)):
        hue = c / len(classes)
        value = (1.0, 0.6)[c % 2]  # neighbours differ in brightness, too
        colours[c] = [round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.8, value)]
    return colours


# ====================================================================== network

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)  # as the Caffe-style weights expect


def normalize(images: Tensor) -> Tensor:
    """Convert RGB 0..255 (B,3,H,W), uint8 or float, to the network's input: float32 BGR minus the
    mean, not divided, channels last. Raises ValueError for a different shape."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"normalize takes (B, 3, H, W) images in RGB, not {tuple(images.shape)}")
    bgr = torch.empty(
        images.shape, device=images.device, memory_format=torch.channels_last
    )  # (B, 3, H, W) float32
    for channel, mean in enumerate(MEAN_BGR):  # floats: a tensor would make the host wait for CUDA
        torch.sub(images[:, 2 - channel], mean, out=bgr[:, channel])
    return bgr


class Prediction(NamedTuple):
    main: Tensor  # (B, C, h, w) logits of layer6, at stride 8
    aux: Tensor  # (B, C, h, w) logits of layer5, or None for a network without the auxiliary head
    features: Tensor  # (B, D, h, w) encoder output (layer4), D = 32 * width: 2048 in the papers


class AtrousHead(nn.Module):
    """Sum of four parallel 3x3 convolutions of dilation 6, 12, 18 and 24. It converts features
    (B,D,h,w) to logits (B,C,h,w)."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.conv2d_list = nn.ModuleList(  # its name in the published checkpoints
            nn.Conv2d(channels, num_classes, 3, padding=d, dilation=d) for d in (6, 12, 18, 24)
        )
        for conv in self.conv2d_list:
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        # Under autocast the convolutions return bfloat16. Their sum and the losses are float32.
        return sum(conv(features).float() for conv in self.conv2d_list)


class DeepLabV2(nn.Module):
    """DeepLab-V2 on a Caffe-style dilated ResNet. It turns images (B,3,H,W) from `normalize` into a
    `Prediction` at stride 8; 1024x512 gives a 129x65 map.

    `layers` counts the blocks of each stage, `width` the channels of the stem. (3,4,23,3) and 64
    are the papers' ResNet-101; its published files load by name. aux=False leaves out layer5, the
    auxiliary head on layer3. BatchNorm's affine parameters are frozen, its statistics are not (see
    `set_mode`). Weights are stored channels last, because convolutions are then faster.
    """

    checkpoint_activations = False  # True saves memory: the backward pass runs each block again
    input_size = (1024, 512)  # (W, H) of target images; `predict` takes its area

    def __init__(self, num_classes: int = 19, layers=(3, 4, 23, 3), width: int = 64, aux=True):
        super().__init__()
        self.num_classes = num_classes
        self.layers = tuple(layers)
        self.width = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        # Caffe rounds the pooled size up. So 1024x512 becomes 129x65, and not 128x64.
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = residual_stage(width, width, layers[0], stride=1, dilation=1)
        self.layer2 = residual_stage(4 * width, 2 * width, layers[1], stride=2, dilation=1)
        self.layer3 = residual_stage(8 * width, 4 * width, layers[2], stride=1, dilation=2)
        self.layer4 = residual_stage(16 * width, 8 * width, layers[3], stride=1, dilation=4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)  # as in both released codes
                module.num_batches_tracked = None  # not used here, and counting costs a kernel
        self.layer5 = AtrousHead(16 * width, num_classes) if aux else None
        self.layer6 = AtrousHead(32 * width, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Prediction:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # (B, width, H/4, W/4)
        x = self.run_blocks(self.layer1, x)  # (B, 4 * width, H/4, W/4)
        x = self.run_blocks(self.layer2, x)  # (B, 8 * width, H/8, W/8)
        middle = self.run_blocks(self.layer3, x)  # (B, 16 * width, H/8, W/8)
        features = self.run_blocks(self.layer4, middle)  # (B, 32 * width, H/8, W/8)
        aux = None if self.layer5 is None else self.layer5(middle)
        return Prediction(self.layer6(features), aux, features)

    def run_blocks(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return stage(x)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        for block in stage:
            passes = (contextlib.nullcontext(), preserve_statistics(block))  # first, second
            # checkpoint calls context_fn at once, so `passes` is still this block's
            x = checkpoint(block, x, context_fn=lambda: passes, **options)
        return x

    def parameter_groups(self, recipe: str, head_factor: float) -> list:
        """Return optimizer groups that list each parameter once. The training loop multiplies a
        group's "lr_factor" with the learning rate.

        The released optimizer lists a parameter n times and steps it n times: n = 1 for conv1 and
        the heads, 4 for shortcut convolutions, 3 for all others. "released" multiplies the rate by
        n instead. SGD of torch <= 1.4 added the weight decay to the gradient in place, so step k of
        n had k times the decay. The mean over k is (n + 1)/2. "paper" takes n = 1 for all. The
        heads get head_factor in both.
        """
        repeats = {"conv1": 1, "convolution": 3, "shortcut": 4, "head": 1}
        if recipe == "paper":
            repeats.update(convolution=1, shortcut=1)
        members = {kind: [] for kind in repeats}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:  # BatchNorm's
                continue
            kind = "convolution"
            if name.startswith(("layer5.", "layer6.")):
                kind = "head"
            elif name.startswith("conv1."):
                kind = "conv1"
            elif ".downsample." in name:
                kind = "shortcut"
            members[kind].append(parameter)
        groups = []
        for kind, n in repeats.items():
            lr_factor = head_factor if kind == "head" else float(n)
            weight_decay = 5e-4 * (n + 1) / 2  # 5e-4 in both papers; the factor: see above
            group = {"params": members[kind], "lr_factor": lr_factor, "weight_decay": weight_decay}
            groups.append(group)
        return groups


def residual_stage(channels, planes: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
    """Return `blocks` bottlenecks from `channels` to 4 * planes channels. All 3x3s are dilated."""
    shortcut = nn.Conv2d(channels, 4 * planes, 1, stride=stride, bias=False)
    downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * planes))
    first = Bottleneck(channels, planes, downsample=downsample, dilation=dilation)
    first.conv1.stride = (stride, stride)  # as in Caffe; torchvision's 3x3 has the stride
    rest = [Bottleneck(4 * planes, planes, dilation=dilation) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


@contextlib.contextmanager
def preserve_statistics(block: nn.Module):
    """Restore BatchNorm's running statistics at the end: the second forward pass of a checkpointed
    block must not update them again."""
    before = [buffer.clone() for buffer in block.buffers()]
    try:
        yield
    finally:  # torch ends that pass early with an exception
        for buffer, value in zip(block.buffers(), before):
            buffer.copy_(value)


def set_mode(network: nn.Module, bn: str):
    """Set training mode. bn="batch" (both papers): BatchNorm uses batch statistics and updates the
    running ones, even at batch size 1. bn="running": it uses the running ones and keeps them."""
    network.train()
    for module in network.modules():
        if bn == "running" and isinstance(module, nn.BatchNorm2d):
            module.eval()


def inference_copy(network: DeepLabV2) -> DeepLabV2:
    """Return a copy for prediction: in eval mode, without the auxiliary head, BatchNorm folded into
    the convolutions. That saves 7 to 9 % of an evaluation on the CPU. `network` does not change."""
    # A copy, because folding overwrites the weights that training continues with.
    network = copy.deepcopy(network).eval()
    network.layer5 = None
    for module in network.modules():
        for i in (1, 2, 3):
            if hasattr(module, f"bn{i}"):  # the stem has one, a block three
                conv = fuse_conv_bn_eval(getattr(module, f"conv{i}"), getattr(module, f"bn{i}"))
                setattr(module, f"conv{i}", conv)
                setattr(module, f"bn{i}", nn.Identity())
        if isinstance(module, Bottleneck) and module.downsample is not None:
            module.downsample = fuse_conv_bn_eval(*module.downsample)
    return network


# ====================================================================== weight files

FORMAT = "intrada-bcl 3"  # header of our own checkpoints
TRUNK = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
ADVENT = "AdvEnt / IntraDA checkpoint"  # AdaptSegNet's files have the same names and shapes


class WeightReport(NamedTuple):
    kind: str  # the kind of file, as `parse_weights` names it
    loaded: list  # names of the tensors taken from the file
    skipped: list  # names in the file that this network has no use for
    initialised: list  # names in the network that keep their initial value

    def __str__(self):
        text = f"{self.kind}: loaded {len(self.loaded)} tensors"
        for verb, names in (("not used", self.skipped), ("kept initial", self.initialised)):
            if names:
                text += f", {verb} {len(names)} ({names[0]}, ...)"
        if self.kind == ADVENT:
            text += " (AdaptSegNet's own files look the same and are not supported)"
        return text


def read_checkpoint(path) -> dict:
    """Return the dict of tensors and plain values in a weight file. No code in it runs. Raises
    UserError if the file is missing, damaged or not a dict."""
    if not Path(path).is_file():
        raise UserError(f"no weight file at {path}. Check it, and name the file, not its folder.")
    file = io.BytesIO(Path(path).read_bytes())  # read in one go: a run may replace the file
    try:
        if zipfile.is_zipfile(file):  # torch's own reader does not verify checksums
            damaged = zipfile.ZipFile(file).testzip()
            if damaged:
                raise ValueError(f"wrong checksum of {damaged}")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in torch
        reason = str(error).split("\n")[0][:100]
        if isinstance(error, (pickle.UnpicklingError, EOFError)):  # torch would advise to run it
            reason = "it is not a weight file, or holds more than tensors and plain values"
        hint = "Copy or download it again, or save only its state dict."
        raise UserError(f"{path} cannot be read as weights ({reason}). {hint}") from None
    return content


def flatten(content: dict, prefix: str = "") -> dict:
    """Return {dotted name: tensor} of nested dicts. Values that are not tensors are left out."""
    flat = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        elif isinstance(value, Tensor):
            flat[f"{prefix}{name}"] = value
    return flat


def parse_weights(content: dict, path="weights") -> tuple:
    """Return (kind, state, skipped) of a weight file; only its content tells the kind. state: {our
    name: tensor}, skipped: [name in the file]. BatchNorm's counters are in neither.

    The network may lie in any nested dict and behind any prefix. Raises UserError if there is none
    or more than one.
    """
    flat = {n: x for n, x in flatten(content).items() if not n.endswith("num_batches_tracked")}
    landmark = "layer1.0.conv1.weight"  # every ResNet has it; what stands before it is the prefix
    found = [name.removesuffix(landmark) for name in flat if name.endswith(landmark)]
    prefixes = [prefix for prefix in found if prefix == "" or prefix.endswith(".")]
    if len(prefixes) > 1:
        places = " and ".join(prefix.rstrip(".") or "the top level" for prefix in prefixes)
        raise UserError(f"{path} holds several networks: {places}. Save one in a file of its own.")
    if not prefixes:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise UserError(f"{path} holds no ResNet (top keys: {keys}). Give one of README, Weights.")
    prefix = prefixes[0]
    # our name: name in the file
    names = {name.removeprefix(prefix): name for name in flat if name.startswith(prefix)}
    heads = {name[:6] for name in names} & {"layer5", "layer6"}
    if "target_conv1.weight" in names:
        kind = "BCL release"
        for name in [name for name in names if name.startswith("target_")]:
            names[name.removeprefix("target_")] = names[name]  # the target's own stem and layer1
        heads = {"layer5"}  # its layer6 never runs
    elif prefix.endswith("Scale."):
        kind = "initial weights (Scale.*)"
        heads = set()  # its head was trained for another task
    elif "fc.weight" in names:
        kind = "torchvision ResNet"
    elif str(content.get("format")).startswith("intrada-bcl"):
        kind = "our checkpoint"
    elif heads == {"layer5", "layer6"}:
        kind = ADVENT
    elif heads == {"layer6"}:
        kind = "AdvEnt, single level"
    elif heads == {"layer5"}:
        kind = "single-level DeepLab"
    else:
        kind = "trunk without heads, assumed to be Caffe's (BGR, 0..255)"

    state = {}
    for name, file_name in names.items():
        if name.startswith(TRUNK) or name[:6] in heads:
            state[name] = flat[file_name]
            if not state[name].isfinite().all():
                raise UserError(f"{path}: {name} has NaN or infinite values. Use an earlier file.")
    used = {names[name] for name in state}
    skipped = [name for name in flat if name not in used]
    if heads == {"layer5"}:  # in these files the only head is called layer5
        state = {name.replace("layer5.", "layer6."): tensor for name, tensor in state.items()}
    if kind == "torchvision ResNet":
        # Its input is RGB in 0..1, divided by std. Ours is BGR in 0..255. Their means differ by
        # less than 1 of 255.
        std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
        state["conv1.weight"] = (state["conv1.weight"].float() / (255 * std)).flip(1)
    return kind, state, skipped


def load_weights(network: DeepLabV2, content, path="weights"):
    """Load a weight file's content into the network, nothing for None. Return a WeightReport.

    A head keeps its initial values if the file lacks it or has a different class count. Raises
    UserError if any other tensor is missing or has a different shape.
    """
    if content is None:
        return WeightReport("random initial weights", [], [], list(network.state_dict()))
    kind, state, skipped = parse_weights(content, path)
    own = network.state_dict()
    initialised = []
    for head in ("layer5.", "layer6."):
        bias = f"{head}conv2d_list.0.bias"
        if bias not in own or bias not in state or own[bias].shape != state[bias].shape:
            skipped += [name for name in state if name.startswith(head)]
            state = {name: x for name, x in state.items() if not name.startswith(head)}
            initialised += [name for name in own if name.startswith(head)]
    for name in sorted((own.keys() | state.keys()) - set(initialised)):
        found = tuple(state[name].shape) if name in state else "missing"
        wanted = tuple(own[name].shape) if name in own else "missing"
        if found != wanted:
            where = f"{name} is {found} in the file and {wanted} in the network"
            layers = ",".join(map(str, network.layers))
            flags = f"--layers {layers} and --width {network.width}"
            raise UserError(f"{path} ({kind}) does not fit: {where}. Check {flags}.")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return WeightReport(kind, list(state), skipped, initialised)


def load(path) -> DeepLabV2:
    """Return the trained network of our own or a published checkpoint, in eval mode, on the CPU.

    The architecture follows from the tensors. `input_size` (W,H) is the run's --target-size, or the
    release's if the file does not say. `weight_report` says what was loaded. `digest` is a hash of
    the weights.
    """
    content = read_checkpoint(path)
    kind, state, _ = parse_weights(content, path)
    bias = state.get("layer6.conv2d_list.0.bias")
    if bias is None or "bn1.weight" not in state:
        raise UserError(f"{path} ({kind}) has no trained classifier. Name a trained checkpoint.")
    blocks = []
    for i in (1, 2, 3, 4):
        numbers = [int(name.split(".")[1]) for name in state if name.startswith(f"layer{i}.")]
        blocks.append(1 + max(numbers, default=0))
    width = len(state["bn1.weight"])
    network = DeepLabV2(len(bias), blocks, width, aux="layer5.conv2d_list.0.bias" in state)
    network.weight_report = load_weights(network, content, path)
    weights = network.state_dict().values()
    # IntraDA refuses a ranking that different weights made.
    network.digest = digest(b"".join(tensor.numpy().tobytes() for tensor in weights))
    if kind == "BCL release":
        network.input_size = (1460, 730)
    ours = content if kind == "our checkpoint" else {}
    network.input_size = tuple(ours.get("input_size", network.input_size))
    network.iterations = ours.get("iter", 0)
    network.settings = ours.get("settings", {})
    return network.eval()


def initial_weights(init: str):
    """Return the content of the weight file that --init names. "none" gives None, "imagenet" gives
    torchvision's ImageNet weights, "demo" gives demo/initial.pth."""
    if init == "none":
        return None
    if init == "demo":
        return read_checkpoint(Path(__file__).with_name("demo") / "initial.pth")
    if init != "imagenet":
        return read_checkpoint(init)
    weights = torchvision.models.ResNet101_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        cached = Path(torch.hub.get_dir(), "checkpoints", weights.url.split("/")[-1])
        hint = f"Copy the file to {cached}, or name another one with --init."
        raise UserError(f"cannot download torchvision's ImageNet weights ({error}). {hint}")


# ====================================================================== readers

class Layout(NamedTuple):
    """Where a dataset has its files below its root, and what its label pixels mean.

    {split} is train, val or test. A * stands for one level of folders.
    """

    images: str
    labels: str
    image_suffixes: tuple = (".png",)
    label_suffix: str = ".png"
    ids: tuple = CITYSCAPES_IDS  # label id of every trainId


TRAIN_IDS = tuple(range(19))
PHOTOS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FINE = (("_leftImg8bit.png",), "_gtFine_labelIds.png")  # suffixes of Cityscapes
ANON = (("_rgb_anon.png",), "_gt_labelIds.png")  # of ACDC and Dark Zurich
# `find_layout` takes the first layout whose image folder exists.
LAYOUTS = {
    "gta5": (
        Layout("images", "labels"),
        Layout("*_images/images", "*_labels/labels"),  # ten archives, each in a folder of its own
    ),
    "synthia": (
        Layout("RAND_CITYSCAPES/RGB", "RAND_CITYSCAPES/GT/LABELS", ids=SYNTHIA_IDS),  # as unpacked
        Layout("RGB", "GT/LABELS", ids=SYNTHIA_IDS),
    ),
    "synscapes": (Layout("img/rgb", "img/class"),),
    "cityscapes": (Layout("leftImg8bit/{split}", "gtFine/{split}", *FINE),),
    "acdc": (
        Layout("rgb_anon/*/{split}", "gt/*/{split}", *ANON),
        Layout("rgb_anon/{split}", "gt/{split}", *ANON),  # flattened, as for DAFormer
    ),
    "darkzurich": (Layout("rgb_anon/{split}/night", "gt/{split}/night", *ANON),),
    "bdd100k": (
        Layout("images/10k/{split}", "labels/sem_seg/masks/{split}", PHOTOS, ".png", TRAIN_IDS),
        Layout("seg/images/{split}", "seg/labels/{split}", PHOTOS, "_train_id.png", TRAIN_IDS),
    ),
    "folder": (
        Layout("images/{split}", "labels/{split}", PHOTOS, ".png", tuple(range(255))),
        Layout("images", "labels", PHOTOS, ".png", tuple(range(255))),
    ),
}
ROOT_NAMES = {"gta5": ("gta5", "gta"), "synthia": ("synthia", "randcityscapes")}
SOURCES = ("gta5", "synthia", "synscapes", "cityscapes", "folder")
TARGETS = ("cityscapes", "acdc", "darkzurich", "bdd100k", "folder")


def dataset_root(kind: str, data_root, own_root=None) -> Path:
    """Return a dataset's folder: its own root if given, else the folder of its name below the data
    root. Upper or lower case and _ make no difference."""
    if own_root:
        if not Path(own_root).is_dir():
            raise UserError(f"no folder {own_root} for {kind}. Check the path.")
        return Path(own_root)
    if not data_root:
        raise UserError(f"no folder is given for {kind}. Give --data-root, or {kind}'s folder.")
    names = ROOT_NAMES.get(kind, (kind,))
    found = []
    for root in sorted(Path(data_root).glob("*")):
        if root.is_dir() and root.name.lower().replace("_", "") in names:
            found.append(root)
    if not found:
        raise UserError(f"no {kind} folder in {data_root}. Check it, or give {kind}'s own folder.")
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} are both {kind}. Rename one of them.")
    return found[0]


def find_layout(kind: str, root: Path, split: str) -> Layout:
    """Return the first layout whose image folder exists below root. If none exists, return the
    first layout of all, so that the error message names it."""
    if kind == "folder":  # it has splits if images/ has a folder for one
        has_splits = any((root / "images" / name).is_dir() for name in ("train", "val", "test"))
        return LAYOUTS[kind][0 if has_splits else 1]
    for layout in LAYOUTS[kind]:
        if any(root.glob(layout.images.format(split=split))):
            return layout
    return LAYOUTS[kind][0]


def image_folder(kind: str, root, split: str = "train") -> Path:
    """Return the folder below a dataset's root that holds the images of all splits."""
    first = find_layout(kind, Path(root), split).images.split("/")[0]
    return Path(root) if "*" in first else Path(root, first)


def hidden(name: str) -> bool:
    """Return True for hidden files and folders, and for a file server's thumbnails in @eaDir."""
    return name.startswith((".", "@eaDir"))


def files_below(folder) -> list:
    """Return the paths of all files below a folder, sorted. Links are followed. Hidden files and
    folders are left out."""

    def stop(error):  # by itself, os.walk skips a folder that it may not read
        raise error

    found = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        folders[:] = [name for name in folders if not hidden(name)]
        found += [Path(parent, name) for name in names if not hidden(name)]
    return sorted(found)


def list_files(kind: str, root: Path, pattern: str, suffixes: tuple) -> dict:
    """Return {name: path} of the files below the folders that match the pattern, in order.

    The name is the path without suffix, below the part of the pattern that precedes *. GTA5's
    archives unpack to 01_images/, 01_labels/ and so on: there it is the name of the file alone.
    """
    folders = []
    for path in sorted(root.glob(pattern)):
        if path.is_dir() and not any(map(hidden, path.relative_to(root).parts)):
            folders.append(path)
    if not folders:
        hint = "Check the dataset's root, and that every archive is unpacked."
        raise UserError(f"no folder {root / pattern} for {kind}. {hint}")
    base = root / pattern.split("/*")[0]
    found = {}
    for path in itertools.chain(*map(files_below, folders)):
        suffix = next((s for s in suffixes if path.name.lower().endswith(s.lower())), None)
        converted = path.name.endswith("_labelTrainIds.png")  # of other projects, beside the labels
        if suffix is None or converted:
            continue
        below = path.name if kind == "gta5" else path.relative_to(base).as_posix()
        name = below[: -len(suffix)]
        if name in found:
            raise UserError(f"{found[name]} and {path} have the same name. Rename or remove one.")
        found[name] = path
    if not found:
        raise UserError(f"no file *{', *'.join(suffixes)} in {folders[0]}. Check the set's root.")
    return {name: found[name] for name in sorted(found, key=numeric_order)}


def numeric_order(name: str) -> tuple:
    """Return a sort key that puts 10 after 9: Synscapes has 1.png, 2.png, ..., 10.png."""
    folder, _, last = name.rpartition("/")
    return folder, int(last) if last.isdecimal() else -1, last


def list_images(kind: str, root, split: str = "train") -> dict:
    """Return {name: image path} of a dataset. It looks for no labels, so it serves the target."""
    layout = find_layout(kind, Path(root), split)
    return list_files(kind, Path(root), layout.images.format(split=split), layout.image_suffixes)


def list_pairs(kind: str, root, split: str = "train") -> dict:
    """Return {name: (image path, label path)}. Raises UserError if one of a pair is missing."""
    layout = find_layout(kind, Path(root), split)
    image_paths = list_images(kind, root, split)
    pattern = layout.labels.format(split=split)
    label_paths = list_files(kind, Path(root), pattern, (layout.label_suffix,))
    lonely = sorted(image_paths.keys() ^ label_paths.keys())
    if lonely:
        counts = f"{len(image_paths)} images but {len(label_paths)} labels"
        names = f"{len(lonely)} have no partner (first: {', '.join(lonely[:3])})"
        raise UserError(f"{root} has {counts}; {names}. Complete the download or remove them.")
    return {name: (image_paths[name], label_paths[name]) for name in image_paths}


def keep_listed(files: dict, list_file) -> dict:
    """Return those of `files` that a text file lists, in the order of `files`; without a list file,
    return all. files is {name: path} or {name: (image path, label path)}.

    A line is a name, with or without folders and suffix, as in AdaptSegNet's and DACS's lists.
    Raises UserError if a line matches no image or several.
    """
    if not list_file:
        return files
    names = {}  # {a way to write an image: the names that it can mean}
    for name, value in files.items():
        path = value[0] if isinstance(value, tuple) else value
        for form in (name, path.as_posix(), path.with_suffix("").as_posix()):
            parts = form.split("/")
            for i in range(len(parts)):
                names.setdefault("/".join(parts[i:]), set()).add(name)
    try:
        lines = Path(list_file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{list_file} is not UTF-8 text. Save it as UTF-8.") from None
    wanted = {line.strip().removeprefix("./").lstrip("/") for line in lines} - {""}
    unknown = sorted(wanted - names.keys())
    several = sorted(line for line in wanted - set(unknown) if len(names[line]) > 1)
    example = f"Write lines like {next(iter(files))}."
    if not wanted:
        raise UserError(f"{list_file} names no image. {example}")
    if unknown:
        counts = f"{len(wanted) - len(unknown)} of {len(wanted)} names found"
        raise UserError(f"{list_file}: {counts}, not found: {', '.join(unknown[:3])}. {example}")
    if several:
        raise UserError(f"{list_file}: {several[0]} matches several images. Add its folder.")
    kept = set().union(*(names[line] for line in wanted))
    return {name: value for name, value in files.items() if name in kept}


def dataset_classes(kind: str, root, num_classes: int) -> tuple:
    """Return the class names in a plain folder's classes.txt, one a line, else `class_names`."""
    path = Path(root, "classes.txt")
    if kind != "folder" or not path.is_file():
        return class_names(num_classes)
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    if not len(names) == len(set(names)) == num_classes:
        counts = f"{len(set(names))} different names in {len(names)} lines"
        raise UserError(f"{path} has {counts}. Write {num_classes}, one for each class.")
    return tuple(names)


def check_classes(kind: str, root, classes: tuple):
    """Refuse a source whose classes differ from the target's."""
    if dataset_classes(kind, root, len(classes)) != classes:
        hint = "Write the same names into both classes.txt, or remove both."
        raise UserError(f"{root} and the target have different classes. {hint}")


def open_image(path, formats=None, low_bytes: bool = False) -> Image.Image:
    """Return a decoded Pillow image, upright by its EXIF orientation. Raises UserError if the file
    is damaged or not an image. formats: Pillow's names; None means all that Pillow reads.

    low_bytes: read the low byte of each channel of a 16-bit RGB file. Pillow itself reads the high
    one. torchvision's reader is deprecated, and before version 0.20 it refuses such files.
    """
    try:
        image = Image.open(path, formats=formats)
        if low_bytes:
            if image.tile[0][3] != "RGB;16B":
                raise ValueError("it does not have 16 bits a channel")
            # The file is big-endian. Read as little-endian, Pillow keeps the low byte.
            image.tile = [(*tile[:3], "RGB;16L") for tile in image.tile]
        return ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged file can fail anywhere in Pillow
        if isinstance(error, MemoryError) or getattr(error, "errno", None):  # not the file's fault
            raise
        raise UserError(f"cannot read {path} ({error}). Copy or download it again.") from None


def open_rgb(path) -> Image.Image:
    """Return an image file as 8-bit RGB. Raises UserError for grey of 16 or more bits."""
    image = open_image(path)
    if image.mode.startswith(("I", "F")):  # `convert` would clip it to white
        raise UserError(f"{path} has {image.mode} pixels (16 bits or more). Convert it to 8 bits.")
    return image.convert("RGB")


def read_ids(path) -> np.ndarray:
    """Return (H,W) uint8 label ids of a PNG: the palette's index, not its colour, or 8-bit grey."""
    image = open_image(path, ("PNG",))  # JPEG would change ids
    with open(path, "rb") as file:
        bits = file.read(25)[24]  # bit depth, in every PNG's header
    # Pillow stretches grey of fewer bits to 0..255, which would change the ids.
    if image.mode != "P" and (image.mode != "L" or bits != 8):
        found = f"{image.mode} pixels of {bits} bits"
        hint = "Convert it to one 8-bit channel of class ids, not colours."
        raise UserError(f"{path} has {found}. {hint}")
    return np.asarray(image)


def read_label(path, kind: str, num_classes: int) -> Image.Image:
    """Return a label file as an 8-bit Pillow image of trainIds 0..num_classes-1 and 255.

    Raises UserError if too many pixels have an id above this dataset's: more than half; in a plain
    folder, whose ids are the trainIds themselves, more than one in a thousand.
    """
    class_ids = list(LAYOUTS[kind][0].ids[:num_classes])
    last_id = max(class_ids)
    # Datasets have many ids without a class. A plain folder has none: few strays mean a mistake.
    tolerance = 0.001 if kind == "folder" else 0.5
    if kind == "synthia":  # 16 bits a channel, class id in R; ids are below 256
        ids = np.asarray(open_image(path, ("PNG",), low_bytes=True))[:, :, 0]
    else:
        ids = read_ids(path)
    foreign = np.bincount(ids.ravel(), minlength=256)[last_id + 1 : IGNORE]
    if foreign.sum() > tolerance * ids.size:
        percent = f"{100 * foreign.sum() / ids.size:.1f} % of the pixels are outside 0..{last_id}"
        value = last_id + 1 + int(np.argmax(foreign))
        hint = "Give labels with ids of this dataset, not colours. Is --num-classes too low?"
        raise UserError(f"{path}: {percent} (mostly {value}). {hint}")
    trainids = np.full(256, IGNORE, dtype=np.uint8)  # an id without a class becomes 255
    trainids[class_ids] = np.arange(len(class_ids))
    return Image.fromarray(trainids[ids])


def resize(image: Image.Image, size: tuple, content: str) -> Image.Image:
    """Resize to (W, H) without keeping the aspect: an "image" with Pillow's antialiased bicubic, a
    "label" with nearest."""
    return image.resize(size, {"image": Image.BICUBIC, "label": Image.NEAREST}[content])


def evenly_spaced(length: int, count: int) -> list:
    """Return at most `count` indices, evenly spaced over range(length)."""
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(count)})


class Images(Dataset):
    """Images without labels. It gets only image paths, so training cannot open a target label.

    An item is {"name", "image": (H,W,3) uint8 RGB array}. If given, transform(image, label, random
    generator of (seed, position)) makes it; else it is resized to `size`, if that is given.
    """

    native_labels = False  # True: labels keep their own size

    def __init__(self, images: dict, size=None, transform=None, seed: int = 0):
        self.names = list(images)
        self.paths = list(images.values())
        self.size = size
        self.transform = transform
        self.seed = seed

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        # `endless_order` gives (position, index). The random numbers follow from the position,
        # so a resumed run augments as an undisturbed one does. Evaluation gives an index alone.
        position, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.open(index)
        if self.transform:
            rng = np.random.default_rng((self.seed, position))
            image, label = self.transform(image, label, rng)
        elif self.size:
            image = resize(image, self.size, "image")
            if label is not None and not self.native_labels:
                label = resize(label, self.size, "label")
        # np.array copies: torch.from_numpy needs memory that may be written.
        item = {"name": self.names[index], "image": np.array(image)}
        if label is not None:
            item["label"] = np.array(label)
        return item

    def open(self, index: int) -> tuple:
        """Return (image, label or None) in their own sizes, as Pillow images."""
        return open_rgb(self.paths[index]), None

    def check_samples(self):
        """Open a few files, so that errors in the dataset show before training."""
        for index in evenly_spaced(len(self), 8):
            self.open(index)


class Labelled(Images):
    """Images with labels of one dataset kind. An item also has "label": (H,W) uint8 trainIds.

    native_labels=True keeps labels at their own size (evaluation), otherwise they are resized like
    the image. pseudo=True: a network made the labels, and their size may differ from the image's.
    """

    def __init__(self, pairs: dict, kind: str, classes: tuple, size=None, *, native_labels=False,
                 pseudo=False, transform=None, seed: int = 0):  # fmt: skip
        images = {name: image for name, (image, _) in pairs.items()}
        super().__init__(images, size, transform, seed)
        self.label_paths = [label for _, label in pairs.values()]
        self.kind = kind
        self.classes = classes
        self.native_labels = native_labels
        self.pseudo = pseudo

    def open(self, index: int) -> tuple:
        image, _ = super().open(index)
        path = self.label_paths[index]
        label = read_label(path, self.kind, len(self.classes))
        ratio = image.width / image.height * label.height / label.width
        if not self.pseudo and not 0.9 < ratio < 1.1:  # some GTA5 labels have 6 rows fewer
            sizes = f"{label.width}x{label.height}, its image {image.width}x{image.height}"
            raise UserError(f"{path} is {sizes}. They do not belong together. Check their names.")
        return image, label

    def check_samples(self):
        """Print the classes that a few labels do not have. Refuse labels in which almost no pixel
        has a class, trainIds where ids are expected, and labels of a single class."""
        labels = [np.asarray(self.open(index)[1]) for index in evenly_spaced(len(self), 8)]
        labelled_shares = [np.mean(label != IGNORE) for label in labels]
        occurring = set(np.concatenate([np.unique(label) for label in labels]).tolist())
        found = sorted(occurring - {IGNORE})
        # TrainIds 0..18, read as ids, give no class above pole (id 17), and few pixels a class.
        expects_ids = LAYOUTS[self.kind][0].ids is CITYSCAPES_IDS
        above_pole = max(found, default=0) > CLASSES.index("pole")
        are_trainids = expects_ids and np.mean(labelled_shares) < 0.7 and not above_pole
        where = f"{self.label_paths[0]} and {len(labels) - 1} more"
        if are_trainids or max(labelled_shares) < 0.02:
            hint = f"Give labels with the ids of {self.kind}, not with colours or trainIds."
            if self.kind in ("folder", "bdd100k"):
                hint = "Give labels with trainIds 0, 1, 2, ...; 255 is for pixels without a class."
            raise UserError(f"{where}: few pixels have a class. {hint}")
        if len(found) == 1:
            what = f"only class {found[0]} occurs"
            if IGNORE in occurring:
                what = f"only class {found[0]} and 255 (ignored) occur"
            hint = "Number the classes 0, 1, 2, ..., or list images of more classes."
            raise UserError(f"{where}: {what}. {hint}")
        missing = [name for c, name in enumerate(self.classes) if c not in occurring]
        if missing:
            root = os.path.commonpath(self.label_paths)
            print(f"{root}: in {len(labels)} labels no pixel has class {', '.join(missing)}")


def validation_set(kind: str, root, classes: tuple, size):
    """Check a few labelled val images and return all for `evaluate`, or None if there are none."""
    layout = find_layout(kind, Path(root), "val")
    patterns = (layout.images.format(split="val"), layout.labels.format(split="val"))
    has_both = all(any(Path(root).glob(pattern)) for pattern in patterns)
    if "{split}" not in layout.images or not has_both:
        print(f"no labelled val images in {root}: training is not evaluated")
        return None
    pairs = list_pairs(kind, root, "val")
    dataset = Labelled(pairs, kind, classes, size, native_labels=True)
    dataset.check_samples()
    return dataset


# ====================================================================== sampling


def endless_order(length: int, seed: int, start: int, stop: int, batch: int):
    """Yield (position, index) for the iterations start..stop-1. Every epoch is a new seeded
    permutation of range(length).

    The order depends only on (length, seed) and can start at any iteration, so a run resumes
    exactly. Of the world * batch positions of an iteration, each rank takes its own `batch`.
    """
    epoch = -1
    for iteration in range(start, stop):
        first = (iteration * world_size() + rank()) * batch
        for position in range(first, first + batch):
            if position // length != epoch:
                epoch = position // length
                order = np.random.default_rng((seed, epoch)).permutation(length)
            yield position, int(order[position % length])


class Batches:
    """This rank's batches of a dataset, for the iterations start..stop-1, on the device.

    next() returns images (B,3,H,W) uint8, channels last, and labels (B,H,W) int64, or None for an
    unlabelled set. `waited` counts the seconds of waiting for them; the log resets it to 0.
    """

    def __init__(self, dataset: Images, batch: int, start: int, stop: int, workers: int, device):
        order = endless_order(len(dataset), dataset.seed, start, stop, batch)
        self.batches = read_items(dataset, workers, batch_size=batch, sampler=order)
        self.device = device
        self.waited = 0.0

    def __next__(self):
        begin = time.perf_counter()
        items = next(self.batches)
        self.waited += time.perf_counter() - begin
        images = np.stack([item["image"] for item in items])  # (B, H, W, 3)
        images = to_device(images, self.device).permute(0, 3, 1, 2)  # a view: channels last
        if "label" not in items[0]:
            return images, None
        labels = np.stack([item["label"] for item in items])
        return images, to_device(labels, self.device).long()


def one_by_one(dataset: Dataset, workers: int):
    """Yield this rank's share of a dataset's items (every world-th), in order, one at a time."""
    own_indices = range(rank(), len(dataset), world_size())
    return read_items(dataset, workers, batch_size=None, sampler=own_indices)


def read_items(dataset: Dataset, workers: int, **options):
    """Yield the items, or lists of items, that `workers` processes read.

    The processes start when the first item is asked for. They send numpy arrays through a pipe:
    tensors would need shared memory, and containers have little of it.
    """
    if workers:
        options.update(num_workers=workers, prefetch_factor=4, worker_init_fn=set_up_reader)
    yield from DataLoader(dataset, collate_fn=no_collate, **options)


def no_collate(items):
    return items


def set_up_reader(worker: int):
    """Make a reading process ignore Ctrl-C, which reaches all, and end with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()  # os.getppid() may be the fork server (Python 3.14)
        os._exit(1)  # a normal exit would wait until its pipe is read

    threading.Thread(target=end_with_parent, daemon=True).start()


def to_device(array: np.ndarray, device) -> Tensor:
    """Copy an array to the device. CUDA copies pinned memory while the host continues."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ====================================================================== evaluation


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count pixels: (C,C) int64, rows = label, columns = prediction.

    Both inputs are integer tensors of the same shape, predictions in 0..C-1. Pixels whose label is
    not in 0..C-1 (255, ignore) are left out.
    """
    known = (labels >= 0) & (labels < num_classes)
    rows = torch.where(known, labels, num_classes).int()  # row C: ignore
    cells = (rows * num_classes + predictions.int()).flatten()
    counts = torch.bincount(cells, minlength=(num_classes + 1) * num_classes)
    return counts[: num_classes**2].view(num_classes, num_classes)


def iou(confusion: Tensor) -> Tensor:
    """Return (C,) float64 intersection over union, 0..1, of a (C,C) confusion matrix: diag / (row +
    column - diag). It is NaN for a class without a pixel in labels and predictions."""
    confusion = confusion.double()
    intersection = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return intersection / union


def scores(confusion: Tensor, classes: tuple) -> dict:
    """Return {"miou19", "miou16", "miou13", "iou": {class: value}} in percent, means without NaN.

    Classes other than Cityscapes' have only "miou<C>". None means undefined.
    """
    per_class = 100 * iou(confusion)
    subsets = {len(classes): range(len(classes))}
    if tuple(classes) == CLASSES:
        subsets.update({16: SUBSET_16, 13: SUBSET_13})

    def value(x):
        return None if x.isnan() else x.item()

    result = {}
    for count, members in subsets.items():
        result[f"miou{count}"] = value(per_class[list(members)].nanmean())
    result["iou"] = {name: value(x) for name, x in zip(classes, per_class)}
    return result


def image_tensor(image: np.ndarray, device) -> Tensor:
    """Copy an image (H,W,3) to the device as (1,3,H,W), channels last."""
    return to_device(image, device).permute(2, 0, 1)[None]


def upsample(logits: Tensor, size: tuple) -> Tensor:
    """Upsample (B,C,h,w) to (B,C,H,W) for size (W,H): bilinear, align_corners=True, as released."""
    return F.interpolate(logits, size[::-1], mode="bilinear", align_corners=True)


def map_centres(h: int, side: int, device) -> Tensor:
    """Return (h,) int64: the pixel, of `side` pixels, for which each of h map positions stands.

    It is round(i (side-1)/(h-1)). There align_corners=True puts the logits, within a pixel of the
    receptive field's centre. (Nearest resizing is 3 to 8 pixels off at the borders.)
    """
    positions = torch.arange(h, dtype=torch.float64, device=device)
    return torch.round(positions * (side - 1) / max(h - 1, 1)).long()


def pick(labels: Tensor, h: int, w: int) -> Tensor:
    """Take labels (B,H,W) at the centres of the positions of an (h,w) map: (B,h,w)."""
    rows = map_centres(h, labels.shape[1], labels.device)
    columns = map_centres(w, labels.shape[2], labels.device)
    return labels[:, rows[:, None], columns]


def upsampled_argmax(logits: Tensor, size: tuple) -> Tensor:
    """Convert (B,C,h,w) logits to (B,H,W) uint8 predictions at size (W,H)."""
    return upsample(logits, size).argmax(1).byte()


def entropy_map(logits: Tensor, size: tuple) -> Tensor:
    """Return the normalised entropy -Σ P log P / log C, (B,H,W) in [0, 1], of logits (B,C,h,w)
    upsampled to size (W,H). For pictures: class by class, because (C,H,W) may not fit in memory."""
    C = logits.shape[1]
    logits = logits - logits.amax(1, keepdim=True)  # exp cannot overflow, and P does not change
    total = 0
    weighted = 0
    for c in range(C):
        z = upsample(logits[:, c : c + 1], size)[:, 0]  # (B, H, W)
        exp = z.exp()
        total = total + exp
        weighted = weighted + exp * z
    # -Σ P log P with P = exp(z) / total. Halfway between positions whose logits differ by more
    # than 140, exp is 0 for every class. The entropy is then 0.
    total = total.clamp(min=1e-30)
    return (total.log() - weighted / total).clamp(0, np.log(C)) / np.log(C)


def mean_logits(networks: list, images: Tensor) -> Tensor:
    """Return the main head's logits (B,C,h,w) of uint8 RGB (B,3,H,W), averaged over networks."""
    x = normalize(images)
    return sum(network(x).main for network in networks) / len(networks)


def as_input(image: Image.Image, size: tuple, device) -> Tensor:
    """Convert an RGB Pillow image to a tensor (1,3,H,W) uint8 of size (W,H) on the device."""
    return image_tensor(np.array(resize(image, size, "image")), device)


@torch.no_grad()
def predict(network: DeepLabV2, image: Image.Image, size=None) -> Tensor:
    """Return (H,W) uint8 trainIds of a Pillow image at its own size.

    The network sees the image at `size` (W,H): by default with the image's own aspect and the area
    of network.input_size. Raises ValueError for a network in training mode.
    """
    if network.training:
        raise ValueError("predict takes a network in eval mode: call network.eval() first")
    size = size or same_area(image.size, network.input_size)
    x = as_input(image.convert("RGB"), size, network.conv1.weight.device)
    return upsampled_argmax(mean_logits([network], x), image.size)[0]


def same_area(size: tuple, like: tuple) -> tuple:
    """Return a size (W,H) with the aspect of `size` and the area of `like`. No side is below 32."""
    factor = (like[0] * like[1] / (size[0] * size[1])) ** 0.5
    return tuple(max(32, round(side * factor)) for side in size)


@torch.no_grad()
def evaluate(networks: list, dataset: Labelled, device, workers: int = 0, on_image=None) -> dict:
    """Return `scores` of the networks' mean logits on a dataset with native-size labels, and also
    "confusion" (C,C) int64, "images" and "seconds".

    Eval mode, main head, logits upsampled to the label's size, argmax. The networks and their modes
    do not change. Ranks share the images, and all get the result. on_image(name, logits (1,C,h,w),
    prediction (H,W) uint8), if given, is called for every image.
    """
    begin = time.perf_counter()
    # Copies: a network in training must keep its mode and its statistics.
    networks = [inference_copy(network) for network in networks]
    C = len(dataset.classes)
    confusion = torch.zeros(C, C, dtype=torch.int64, device=device)
    for item in one_by_one(dataset, workers):
        image = image_tensor(item["image"], device)
        label = to_device(item["label"], device)
        logits = mean_logits(networks, image)  # (1, C, h, w)
        prediction = upsampled_argmax(logits, label.shape[::-1])[0]
        confusion += confusion_matrix(label, prediction, C)
        if on_image:
            on_image(item["name"], logits, prediction)
    confusion = all_reduce(confusion).cpu()
    result = scores(confusion, dataset.classes)
    seconds = time.perf_counter() - begin
    return {**result, "confusion": confusion, "images": len(dataset), "seconds": seconds}


def score_table(columns: dict) -> str:
    """Return a text table with a column for each of {name: scores}: IoU and means, in percent."""
    first = next(iter(columns.values()))
    lines = [" " * 16 + "".join(f"{name:>14}" for name in columns)]
    means = [name for name in first if name.startswith("miou")]
    for name in [*first["iou"], *means]:
        line = f"{name.replace('miou', 'mIoU '):16}"
        for column in columns.values():
            value = {**column, **column["iou"]}.get(name)
            line += f"{'-':>14}" if value is None else f"{value:>14.1f}"
        lines.append(line)
    return "\n".join(lines)


# ====================================================================== device and ranks


def rank() -> int:
    """Return the number of this process among torchrun's processes; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world_size() > 1:
        dist.barrier()


def all_reduce(tensor: Tensor) -> Tensor:
    """Replace the tensor by its sum over the ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def merge_ranks(own: dict) -> dict:
    """Merge the dicts of all ranks into one."""
    parts = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def average_over_ranks(*modules: nn.Module):
    """Average gradients and BatchNorm's running statistics over the ranks, in one message.

    By hand: DistributedDataParallel expects one backward pass through a network per step. IntraDA's
    G has two, and the second one also runs through D, whose gradients it must not touch.
    """
    if world_size() == 1:
        return
    tensors = []
    for module in modules:
        tensors += [p.grad for p in module.parameters() if p.grad is not None]
        tensors += list(module.buffers())  # or every rank would evaluate a different network
    flat = all_reduce(torch.cat([t.reshape(-1) for t in tensors])) / world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


def set_up_device(name) -> torch.device:
    """Return the device of this process: the named one, else CUDA if there is one, else the CPU. If
    torchrun started this process, join the others; then only rank 0 prints."""
    if name == "cuda" and not torch.cuda.is_available():
        hint = "Use --device cpu, or install a driver and a CUDA build of torch."
        raise UserError(f"--device cuda: torch sees no CUDA device. {hint}")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    torch.backends.cudnn.benchmark = True  # faster, because image sizes are fixed
    if not dist.is_torchelastic_launched():
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        visible = torch.cuda.device_count()
        if local >= visible:
            raise UserError(f"torchrun started more processes than GPUs ({visible}). Start fewer.")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # One group: gloo takes CPU tensors (names, barriers, log), NCCL those of the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def autocast(device, wanted):
    """Return a context in which convolutions run in bfloat16 if wanted. None means: only on a GPU
    that computes in bfloat16 and does not emulate it."""
    if wanted is None:
        wanted = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def compiled(function, wanted: bool):
    """Return the function, compiled for fixed shapes if wanted. Never compile `upsample`: torch 2.4
    would compute wrong gradients."""
    return torch.compile(function, dynamic=False) if wanted else function


# ====================================================================== resume, save, log


def due(it: int, every: int, iters: int) -> bool:
    """Return True if work is due after `it` iterations: every `every` iterations, and at the end.
    every = 0: only at the end."""
    return it == iters or (it > 0 and every > 0 and it % every == 0)


def run_settings(arguments: dict, free: tuple) -> dict:
    """Return the settings of a run, {flag: text}, which must be the same when it resumes. The flags
    in `free` may change."""
    settings = {name: str(value) for name, value in arguments.items() if name not in free}
    # The batch and the order of the images depend on the number of processes.
    return {**settings, "processes": str(world_size())}


def earlier_checkpoint(folder, settings: dict):
    """Return the content of last.pth in `folder`, or None for a fresh start. Raises UserError for a
    run with different settings, and for a folder with a run's files but no last.pth."""
    folder = Path(folder)
    path = folder / "last.pth"
    if not path.exists():
        # A new run would take these files for its own.
        patterns = ("best.pth", "log.jsonl", "round*")
        strays = [stray.name for pattern in patterns for stray in folder.glob(pattern)]
        if strays:
            what = f"{folder} has {strays[0]} but no last.pth, so no run can resume in it"
            raise UserError(f"{what}. Choose another --out.")
        return None
    content = read_checkpoint(path)
    if content.get("format") != FORMAT or "settings" not in content:
        raise UserError(f"{path} is not of this version of the code. Choose another --out.")
    saved = content["settings"]
    names = sorted(saved.keys() | settings.keys())
    different = []
    for name in names:
        if saved.get(name) != settings.get(name):
            different.append(f"{name} is {saved.get(name)} there and {settings.get(name)} here")
    if different:
        hint = "A run with these settings needs an --out of its own."
        if saved.get("images") != settings.get("images"):
            hint += " (images is a hash of their names. More, fewer or different images change it.)"
        raise UserError(f"{path} has a run of different settings: {'; '.join(different)}. {hint}")
    return content


def resume(folder, settings: dict, state: dict) -> int:
    """Load last.pth of `folder` into the networks and optimizers of `state`. Return its iteration,
    or 0 for a fresh start."""
    global resume_hint
    content = earlier_checkpoint(folder, settings)
    if content is None:
        return 0
    for name, part in state.items():
        part.load_state_dict(content[name])
    resume_hint = f"; run the same command to resume from iteration {content['iter']}"
    return content["iter"]


def save(path, it: int, settings: dict, state: dict):
    """Write a checkpoint: state_dicts of `state` {"model": network, ...}, iteration, settings and
    the network's input size. Raises UserError if a weight is not finite.

    It needs no random state: order and augmentation follow from seed and iteration.
    """
    global resume_hint
    networks = nn.ModuleList(part for part in state.values() if isinstance(part, nn.Module))
    # Checked before writing: no run can resume from a last.pth that holds NaN.
    finite = [tensor.isfinite().all() for tensor in networks.state_dict().values()]
    if not torch.stack(finite).all():
        hint = "Start with a lower learning rate and another --out. The earlier last.pth is kept."
        raise UserError(f"a weight is not finite at iteration {it}. {hint}")
    if rank() == 0:
        content = {name: part.state_dict() for name, part in state.items()}
        content.update(format=FORMAT, iter=it, settings=settings)
        content.update(input_size=state["model"].input_size)
        with atomic_write(path) as file:
            torch.save(content, file)
    resume_hint = f"; run the same command to resume from iteration {it}"
    barrier()  # all ranks may read the file next, as BCL does after its warm-up


def read_log(path) -> list:
    """Return the records of a log.jsonl, each a dict with "iter", without a line cut by a kill."""
    records = []
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def evaluations(records: list) -> list:
    return [record for record in records if record.get("event") == "evaluation"]


def mean_iou(result: dict) -> float:
    """Return the mean over all classes of a result or record; 0 if no class has a pixel."""
    return result[f"miou{len(result['iou'])}"] or 0.0


class Log:
    """The log.jsonl of a stage: a JSON line for every start, every record of losses and every
    evaluation. The terminal shows a line for each. Scores are kept nowhere else."""

    def __init__(self, folder, stage: str, data: str, start: int, iters: int, settings: dict):
        """Keep an earlier log's records up to iteration `start`. data says what G is trained on."""
        self.path = Path(folder, "log.jsonl")
        self.stage = stage
        self.iters = iters
        earlier = read_log(self.path) if self.path.exists() else []
        # Later iterations were lost with the kill. They will be trained, and logged, again.
        kept = [record for record in earlier if record["iter"] <= start]
        self.evaluated = {record["iter"]: mean_iou(record) for record in evaluations(kept)}
        self.restart_clock(start)
        if rank() == 0:
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        if start == iters and any(record.get("iters") == iters for record in kept):
            print(f"{stage}: already trained, {self.path.with_name('last.pth')}")
            return
        header = {"event": "start", "stage": stage, "iters": iters, "data": data}
        self.write(iter=start, **header, settings=settings, **versions())
        resumed = f"; resumed from iteration {start}" if start else ""
        print(f"{stage}: {data}{resumed}", flush=True)

    def restart_clock(self, it: int):
        self.since = it
        self.clock = time.perf_counter()

    def write(self, **record):
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def losses(self, it: int, batches: list, device, losses: dict, **more):
        """Record an iteration's losses {term: scalar tensor} and `more`, with the speed since the
        clock was restarted, the seconds of waiting for `batches`, and peak memory. Reading
        losses makes the host wait for the GPU. Raises UserError if a loss is not finite.
        """
        values = torch.stack([x.detach().float() for x in losses.values()]).cpu()  # one transfer
        means = dict(zip(losses, (all_reduce(values) / world_size()).tolist()))  # over the ranks
        for term, value in means.items():
            if not np.isfinite(value):
                hint = "Check the images, or start with a lower learning rate and another --out."
                raise UserError(f"{term} is {value} at iteration {it}. {hint}")
        seconds = time.perf_counter() - self.clock
        rate = (it - self.since) / seconds
        speed = {"it_per_s": rate, "seconds": seconds}
        speed["data_seconds"] = sum(stream.waited for stream in batches)
        speed["peak_memory_mb"] = peak_memory_mb(device)
        self.write(iter=it, **means, **more, **speed)
        text = "  ".join(f"{term.removeprefix('loss_')} {x:.3f}" for term, x in means.items())
        left = f"{rate:.2f} it/s  {(self.iters - it) / rate / 60:.1f} min left"
        print(f"{self.stage} {it}/{self.iters}  {text}  {left}", flush=True)
        for stream in batches:
            stream.waited = 0.0
        self.restart_clock(it)

    def evaluation(self, it: int, result: dict):
        """Record the result of `evaluate`."""
        record = {name: value for name, value in result.items() if name != "confusion"}
        self.write(iter=it, event="evaluation", **record)
        self.evaluated[it] = mean_iou(result)
        score = f"mIoU {len(result['iou'])}: {mean_iou(result):.1f}"
        mean = f"{score} on {result['images']} validation images"
        print(f"{self.stage} {it}/{self.iters}  {mean}", flush=True)
        self.restart_clock(it)  # an evaluation is not training time

    def is_best(self, result: dict) -> bool:
        """Return True if a result is the best so far. Validation labels decide: it is an oracle."""
        return mean_iou(result) > max(self.evaluated.values(), default=-1.0)


def versions() -> dict:
    """Return the versions of torch and torchvision and the git revision, for the log."""
    revision = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10)
        revision = output.stdout.strip() or None
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "git": revision}


def peak_memory_mb(device) -> float:
    """Return the peak memory so far in MiB: on the GPU torch's, on the CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ====================================================================== pictures


def grey(values: Tensor) -> np.ndarray:
    """Convert (H,W) values in 0..1 to an (H,W,3) uint8 picture: 0 is black, 1 is white."""
    plane = values.mul(255).round().byte().cpu().numpy()
    return np.repeat(plane[..., None], 3, axis=2)


def changes(before: np.ndarray, after: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return an (H,W,3) picture of two predictions (H,W) of trainIds: green where only the second
    is right, red where only the first is, yellow where two wrong ones differ, else dark grey."""
    picture = np.full((*truth.shape, 3), 40, np.uint8)
    different = (before != after) & (truth != IGNORE)
    picture[different] = (220, 200, 60)
    picture[different & (after == truth)] = (60, 200, 80)
    picture[different & (before == truth)] = (230, 50, 50)
    return picture


def write_grid(path, titles: list, rows: list, classes: tuple, captions=None):
    """Write a PNG of rows of pictures. All have the same height and keep their aspect. Columns have
    titles, rows may have captions, and below stands a legend of the classes that occur.

    A picture is an image (H,W,3) uint8, or a label (H,W) uint8 of trainIds, which is coloured.
    """
    colours = palette(classes)
    font = ImageFont.load_default(13)
    height = 160  # pixels of a picture
    line_height = 20  # pixels of a line of text
    columns = [[round(height * p.shape[1] / p.shape[0]) for p in column] for column in zip(*rows)]
    lefts = list(itertools.accumulate((max(widths) + 2 for widths in columns), initial=0))
    labels = [picture for picture in itertools.chain(*rows) if picture.ndim == 2]
    occurring = set().union(*(np.unique(label).tolist() for label in labels)) - {IGNORE}
    legend_top = line_height + len(rows) * (height + line_height)
    per_line = max(1, lefts[-1] // 130)  # entries of the legend
    legend_height = line_height * -(-len(occurring) // per_line)
    sheet = Image.new("RGB", (lefts[-1], legend_top + legend_height), "white")
    draw = ImageDraw.Draw(sheet)
    for title, left, widths in zip(titles, lefts, columns):
        draw.text((left + 4, 2), title[-max(widths) // 7 :], "black", font)  # 7 pixels a letter
    for i, row in enumerate(rows):
        top = line_height + i * (height + line_height)
        for picture, left, widths in zip(row, lefts, columns):
            size = (widths[i], height)
            if picture.ndim == 3:
                cell = resize(Image.fromarray(picture), size, "image")
            else:
                label = resize(Image.fromarray(picture), size, "label")
                cell = Image.fromarray(colours[np.asarray(label)])
            sheet.paste(cell, (left, top))
        if captions:
            draw.text((4, top + height + 2), captions[i], "black", font)
    for i, c in enumerate(sorted(occurring)):
        left = 4 + 130 * (i % per_line)
        top = legend_top + line_height * (i // per_line)
        draw.rectangle((left, top + 4, left + 11, top + 15), tuple(colours[c].tolist()))
        draw.text((left + 16, top + 2), classes[c], "black", font)
    write_png(path, np.asarray(sheet))


@torch.no_grad()
def write_panel(path, networks: dict, dataset: Images, indices, classes, device, captions):
    """Write a PNG with a row for each of these images of the dataset: image, ground truth if it has
    labels, the prediction of each of {title: network}, what changed between two networks, and the
    entropy of the last (0 is black, 1 is white).

    The networks come from `inference_copy`. They see images at the dataset's size.
    """
    rows = []
    for index in indices:
        image, label = dataset.open(index)
        x = as_input(image, dataset.size, device)
        row = [np.asarray(image)]
        titles = ["image"]
        if label is not None:
            row.append(np.asarray(resize(label, image.size, "label")))
            titles.append("ground truth")
        predictions = []
        for title, network in networks.items():
            logits = mean_logits([network], x)
            predictions.append(upsampled_argmax(logits, image.size)[0].cpu().numpy())
            titles.append(title)
        row += predictions
        if label is not None and len(networks) == 2:
            row.append(changes(*predictions, row[1]))
            titles.append("green: right, red: wrong")
        row.append(grey(entropy_map(logits, image.size)[0]))
        titles.append("entropy")
        rows.append(row)
    write_grid(path, titles, rows, classes, captions)


@torch.no_grad()
def print_results(out, runs: dict, validation: Labelled, device):
    """Print the last scores of runs {title: folder} and draw their predictions into out/panel.png.
    Of at most 24 evenly spaced images it shows the two with the lowest and the two with the highest
    mean entropy under the last run."""
    columns = {}
    networks = {}
    for title, folder in runs.items():
        columns[title] = evaluations(read_log(Path(folder, "log.jsonl")))[-1]
        # From the file: an earlier command may have trained this run.
        networks[title] = inference_copy(load(Path(folder, "last.pth"))).to(device)
    images = columns[title]["images"]  # at the time of the evaluation
    print(f"\nIoU in percent on {images} validation images, last checkpoints:")
    print(score_table(columns))
    means = {}
    for index in evenly_spaced(len(validation), 24):
        image, _ = validation.open(index)
        logits = mean_logits([networks[title]], as_input(image, validation.size, device))
        means[index] = entropy_map(logits, validation.size).mean().item()
    order = sorted(means, key=means.get)
    shown = list(dict.fromkeys(order[:2] + order[-2:]))
    captions = [f"{validation.names[i]}, mean entropy {means[i]:.3f}" for i in shown]
    path = Path(out, "panel.png")
    write_panel(path, networks, validation, shown, validation.classes, device, captions)
    print(f"\npictures: {path}")
