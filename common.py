"""What both methods share: classes, DeepLab-V2, weight files, readers, mIoU, runs, pictures.

This file holds no flag, no loss and no training loop. Those are the methods, and each method is one
file. Sizes are (W, H). Tensors are (B, C, H, W). Labels are trainIds 0..C-1, and 255 means ignore.
Images travel as uint8 RGB; `normalize` makes them float BGR minus the mean.

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

# TF32 is off, everywhere. Training has bfloat16 where the GPU has it; all else is float32.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False  # NVIDIA's containers switch it on

# ====================================================================== errors and files


class UserError(Exception):
    """A mistake that the user can correct: one sentence says what was found and what to do."""


def launch(main):
    """Run a script's main(). Exit status: 0 at the end, 2 and one sentence for what a user can
    correct, 130 after Ctrl-C, 1 and a traceback for anything else."""
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


resume_hint = ""  # `resume` and `save` say here where the run would resume


def explain(error: Exception):
    """The sentence for an exception that a user can correct; None for anything else."""
    text = str(error).strip()
    # An error in a reading process arrives as a printed traceback. Its last line is the message.
    line = text.split("\n")[-1]
    if isinstance(error, UserError):
        return line.split("UserError: ")[-1]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of GPU memory. Use smaller images or batches, or --checkpoint-activations."
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "out of memory. Lower --workers, the batch size or the image sizes."
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"a process that reads images ended ({line}). Lower --workers; memory may be short."
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(text.split("\n")[:2])[:200]
        return f"--compile failed ({reason}). Install g++, free $TMPDIR, or leave it out."
    if isinstance(error, BrokenPipeError):
        return "the program that read the output has ended."
    if isinstance(error, OSError) and "Too many open files" in text:
        return f"{line}. Raise the limit with `ulimit -n 4096`, or lower --workers."
    if isinstance(error, OSError) and "Permission denied" in text:
        return f"{line}. Change its permissions."
    if isinstance(error, OSError):
        return f"{line}. Check the path and the disk."
    return None


@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for binary writing. The file appears whole or not at all, whenever the process is
    killed. Its folder is made. UserError if it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a full disk a RuntimeError
        if isinstance(error.__context__, KeyboardInterrupt):  # and Ctrl-C, too
            raise KeyboardInterrupt from None
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}). Check the path and the disk's space.")


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


def lock(out):
    """Keep other runs out of the folder `out` until this process ends. Keep the returned file."""
    file = None
    if rank() == 0:
        Path(out).mkdir(parents=True, exist_ok=True)
        file = open(Path(out, ".lock"), "w")
        try:
            # fcntl's lock is not inherited by reading processes, so that kill -9 frees it at once.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out} is in use by another run. Wait, or choose another --out.")
        except OSError as error:  # some file systems of clusters have no locks
            print(f"{out} cannot be locked ({error.strerror}). Start no other run there.")
    barrier()
    return file


def digest(data: bytes) -> str:
    """The first 16 hex digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def fingerprint(names) -> str:
    """A short hash of a list of names, in this order. What the files hold does not matter."""
    return digest("\n".join(names).encode())


def refuse_inside(out, folder):
    """Refuse an output folder inside a folder of images: the next run would read its pictures."""
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{out} lies inside {folder}, whose images are read. Write elsewhere.")


def WxH(text: str) -> tuple:
    """A size: "1024x512" to (1024, 512). A ValueError, here and below, is reported by argparse."""
    width, height = text.lower().split("x")
    return int(width), int(height)


def block_counts(text: str) -> tuple:
    """Blocks of the four stages of a ResNet: "3,4,23,3" to (3, 4, 23, 3)."""
    one, two, three, four = map(int, text.split(","))
    return one, two, three, four


# ====================================================================== classes

IGNORE = 255
# class, Cityscapes id (also of GTA5, Synscapes, ACDC, Dark Zurich), SYNTHIA id, colour; in the
# order of the trainIds
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
ABSENT = {"synthia": (9, 14, 16)}  # trainIds of which a source has no pixel: terrain, truck, train
SUBSET_16 = tuple(c for c in range(19) if c not in ABSENT["synthia"])
SUBSET_13 = tuple(c for c in SUBSET_16 if c not in (3, 4, 5))  # also without wall, fence, pole


def class_names(num_classes: int) -> tuple:
    """Cityscapes' names for 19 classes, else numbers."""
    if num_classes == 19:
        return CLASSES
    return tuple(str(c) for c in range(num_classes))


def palette(classes: tuple) -> np.ndarray:
    """(256,3) uint8 colours of trainIds, so that `palette(classes)[labels]` is (H,W,3). Cityscapes'
    classes have their own colours, other class sets get hues far apart. 255 is black."""
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

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)


def normalize(images: Tensor) -> Tensor:
    """RGB 0..255 (B,3,H,W), uint8 or float, to the network's input: float32 BGR 0..255 minus the
    mean, no division, channels last. ValueError for another shape."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"normalize takes (B, 3, H, W) images in RGB, not {tuple(images.shape)}")
    bgr = torch.empty(
        images.shape, device=images.device, memory_format=torch.channels_last
    )  # (B, 3, H, W) float32
    for channel, mean in enumerate(MEAN_BGR):  # numbers: a tensor would make the host wait for CUDA
        torch.sub(images[:, 2 - channel], mean, out=bgr[:, channel])
    return bgr


class Prediction(NamedTuple):
    main: Tensor  # (B, C, h, w) logits of layer6, at stride 8
    aux: Tensor  # (B, C, h, w) logits of layer5, or None for a network without the auxiliary head
    features: Tensor  # (B, D, h, w) encoder output (layer4), D = 32 * width: 2048 in the papers


class AtrousHead(nn.Module):
    """Four parallel 3x3 convolutions of dilation 6, 12, 18, 24, summed: features (B,D,h,w) to
    logits (B,C,h,w)."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=d, dilation=d) for d in (6, 12, 18, 24)
        )
        for conv in self.conv2d_list:
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        # Under autocast convolutions give bfloat16; their sum and the losses are taken in float32.
        return sum(conv(features).float() for conv in self.conv2d_list)


class DeepLabV2(nn.Module):
    """DeepLab-V2 on a Caffe-style dilated ResNet: images (B,3,H,W) from `normalize` to a
    `Prediction` at stride 8; 1024x512 gives a 129x65 map.

    layers and width are blocks per stage and channels of the stem; (3,4,23,3) and 64 make the
    papers' ResNet-101, whose published checkpoints load by name. aux=False leaves out layer5, the
    auxiliary head on layer3. BatchNorm's affine parameters are frozen, its statistics are not (see
    `set_mode`). Weights are stored channels last, because convolutions are then faster.
    """

    checkpoint_activations = False  # True: less memory; the backward pass runs blocks once more
    input_size = (1024, 512)  # (W, H) to which `predict` scales images; `load` sets its own
    iterations = None  # of our own training, and its settings; `load` sets them
    settings = {}

    def __init__(self, num_classes: int = 19, layers=(3, 4, 23, 3), width: int = 64, aux=True):
        super().__init__()
        self.num_classes = num_classes
        self.layers = tuple(layers)
        self.width = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = residual_stage(width, width, layers[0], stride=1, dilation=1)
        self.layer2 = residual_stage(4 * width, 2 * width, layers[1], stride=2, dilation=1)
        self.layer3 = residual_stage(8 * width, 4 * width, layers[2], stride=1, dilation=2)
        self.layer4 = residual_stage(16 * width, 8 * width, layers[3], stride=1, dilation=4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
                module.num_batches_tracked = None  # not used here; counting costs a kernel
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
            passes = (contextlib.nullcontext(), statistics_stay(block))
            # checkpoint calls context_fn at once, so that `passes` is this block's
            x = checkpoint(block, x, context_fn=lambda: passes, **options)
        return x

    def parameter_groups(self, recipe: str, head_factor: float) -> list:
        """Optimizer groups that list each parameter once, with its "lr_factor" (for the training
        loop) and its "weight_decay".

        The released optimizer lists a parameter n times and steps it n times: n = 1 for conv1 and
        the heads, 4 for shortcut convolutions, 3 for all others. "released" gives each parameter
        once, with n as a factor on its rate. The old SGD added the weight decay in place into the
        gradient, so that step k of n carried k times the decay: (n + 1)/2 times on average.
        "paper" has n = 1 for all. The heads get head_factor in both.
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
            weight_decay = 5e-4 * (n + 1) / 2
            group = {"params": members[kind], "lr_factor": lr_factor, "weight_decay": weight_decay}
            groups.append(group)
        return groups


def residual_stage(channels, planes: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
    """`blocks` bottlenecks from `channels` to 4 * planes channels; all their 3x3s are dilated."""
    shortcut = nn.Conv2d(channels, 4 * planes, 1, stride=stride, bias=False)
    downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * planes))
    first = Bottleneck(channels, planes, downsample=downsample, dilation=dilation)
    first.conv1.stride = (stride, stride)  # Caffe's place for it; torchvision's is the 3x3
    rest = [Bottleneck(4 * planes, planes, dilation=dilation) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


@contextlib.contextmanager
def statistics_stay(block: nn.Module):
    """Restore BatchNorm's running statistics on leaving: the second forward pass of a checkpointed
    block must not move them again."""
    before = [buffer.clone() for buffer in block.buffers()]
    try:
        yield
    finally:  # torch leaves that pass early, by an exception
        for buffer, value in zip(block.buffers(), before):
            buffer.copy_(value)


def set_mode(network: nn.Module, bn: str):
    """Training mode. bn="batch" (both papers): BatchNorm uses batch statistics and moves its
    running ones, even at batch size 1. bn="running": it uses its running statistics, which stay."""
    network.train()
    for module in network.modules():
        if bn == "running" and isinstance(module, nn.BatchNorm2d):
            module.eval()


def inference_copy(network: DeepLabV2) -> DeepLabV2:
    """A copy for prediction: eval mode, no auxiliary head, and BatchNorm folded into the
    convolutions, which saves 7 to 9 % of an evaluation on the CPU. `network` stays as it is."""
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
    kind: str  # of file, as `parse_weights` names it
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
    """The dict of tensors and plain values in a weight file. No code in the file runs. UserError
    for a file that is missing, damaged or not a dict."""
    if not Path(path).is_file():
        raise UserError(f"no weight file at {path}. Check the path; name the file, not its folder.")
    file = io.BytesIO(Path(path).read_bytes())  # at once: a run may replace it meanwhile
    try:
        if zipfile.is_zipfile(file):  # torch's own reader does not look at the checksums
            damaged = zipfile.ZipFile(file).testzip()
            if damaged:
                raise ValueError(f"wrong checksum of {damaged}")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make torch stumble anywhere
        reason = str(error).split("\n")[0][:100]
        if isinstance(error, (pickle.UnpicklingError, EOFError)):  # torch would advise to unpickle
            reason = "it is not a weight file, or holds more than tensors and plain values"
        hint = "Copy or download it again, or save its state dict alone."
        raise UserError(f"{path} cannot be read as weights ({reason}). {hint}") from None
    return content


def flatten(content: dict, prefix: str = "") -> dict:
    """{dotted name: tensor} of nested dicts. Values that are not tensors are left out."""
    flat = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        elif isinstance(value, Tensor):
            flat[f"{prefix}{name}"] = value
    return flat


def parse_weights(content: dict, path="weights") -> tuple:
    """(kind, state, skipped) of a weight file, told apart by its content alone: state {our name:
    tensor}, skipped [name in the file]. BatchNorm's counters are in neither.

    The network may lie anywhere in nested dicts and behind any prefix. UserError if there is none,
    or more than one.
    """
    flat = flatten(content)
    flat = {name: x for name, x in flat.items() if not name.endswith("num_batches_tracked")}
    landmark = "layer1.0.conv1.weight"
    found = [name.removesuffix(landmark) for name in flat if name.endswith(landmark)]
    prefixes = [prefix for prefix in found if prefix == "" or prefix.endswith(".")]
    if len(prefixes) > 1:
        names = " and ".join(prefix.rstrip(".") or "the top level" for prefix in prefixes)
        raise UserError(f"{path} holds several networks: {names}. Save one of them in a file.")
    if not prefixes:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise UserError(f"{path} holds no ResNet (its top keys: {keys}). See README, Weights.")
    prefix = prefixes[0]
    names = {}  # our name: name in the file
    for name in flat:
        if name.startswith(prefix):
            names[name.removeprefix(prefix)] = name
    heads = {name[:6] for name in names} & {"layer5", "layer6"}
    if "target_conv1.weight" in names:
        kind = "BCL release"
        for name in [name for name in names if name.startswith("target_")]:
            names[name.removeprefix("target_")] = names[name]  # a stem and layer1 of its own
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
        kind = "trunk without heads, taken as Caffe's (BGR, 0..255)"

    state = {}
    for name, file_name in names.items():
        if name.startswith(TRUNK) or name[:6] in heads:
            state[name] = flat[file_name]
            if not state[name].isfinite().all():
                raise UserError(f"{path}: {name} has NaN or infinite values. Take an earlier file.")
    used = {names[name] for name in state}
    skipped = [name for name in flat if name not in used]
    if heads == {"layer5"}:  # a single head has the name of the auxiliary one
        state = {name.replace("layer5.", "layer6."): tensor for name, tensor in state.items()}
    if kind == "torchvision ResNet":
        # Its input is RGB, 0..1, divided by std; ours is BGR, 0..255. The means differ by less
        # than 1 of 255.
        std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
        state["conv1.weight"] = (state["conv1.weight"].float() / (255 * std)).flip(1)
    return kind, state, skipped


def load_weights(network: DeepLabV2, content, path="weights"):
    """Load a weight file's content into the network. Returns a WeightReport, or for no content
    (None) a sentence that says so.

    A head keeps its initial value if the file has none, or one of another class count. UserError if
    anything else is missing or has another shape.
    """
    if content is None:
        return "random initial weights"
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
    """The trained network in a checkpoint of ours or of a published kind, in eval mode, on the CPU.

    The architecture is read off the tensors. `input_size` (W,H) is what it was trained with, the
    release's where the file does not say. `weight_report` tells what was loaded, `digest` is a hash
    of the weights.
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
    network.digest = digest(b"".join(tensor.numpy().tobytes() for tensor in weights))
    if kind == "BCL release":
        network.input_size = (1460, 730)
    if kind == "our checkpoint":
        network.input_size = tuple(content["input_size"])
        network.iterations = content.get("iter")
        network.settings = content.get("settings", {})
    return network.eval()


def initial_weights(init: str):
    """Content of a weight file for an --init flag: None for "none", torchvision's ImageNet weights
    for "imagenet", demo/initial.pth for "demo", else that of the file."""
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
        hint = f"Copy it to {cached}, or give a file with --init."
        raise UserError(f"cannot fetch torchvision's ImageNet weights ({error}). {hint}")


# ====================================================================== readers

class Layout(NamedTuple):
    """Where a dataset keeps its files below its root, and what its label pixels say.

    {split} is train, val or test; a * stands for one level of folders.
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
# The first layout of a dataset whose image folder exists is taken.
LAYOUTS = {
    "gta5": (
        Layout("images", "labels"),
        Layout("*_images/images", "*_labels/labels"),  # ten archives, unpacked
    ),
    "synthia": (
        Layout("RAND_CITYSCAPES/RGB", "RAND_CITYSCAPES/GT/LABELS", ids=SYNTHIA_IDS),  # the archive
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
    """Where a dataset lies: its own root if given, else the folder of its name below the data root,
    in upper or lower case, with or without _."""
    if own_root:
        if not Path(own_root).is_dir():
            raise UserError(f"no folder {own_root} for {kind}. Check the path.")
        return Path(own_root)
    if not data_root:
        raise UserError(f"no folder is given for {kind}. Give --data-root, or its own folder.")
    names = ROOT_NAMES.get(kind, (kind,))
    found = []
    for root in sorted(Path(data_root).glob("*")):
        if root.is_dir() and root.name.lower().replace("_", "") in names:
            found.append(root)
    if not found:
        raise UserError(f"no {kind} folder in {data_root}. Check the path, or give its own folder.")
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} are both {kind}. Name one by its own root.")
    return found[0]


def find_layout(kind: str, root: Path, split: str) -> Layout:
    """The first layout whose image folder this copy has; if it has none, the first of all, which
    messages then name."""
    if kind == "folder":  # has splits if there is a folder for one
        splits = [name for name in ("train", "val", "test") if (root / "images" / name).is_dir()]
        return LAYOUTS[kind][0 if splits else 1]
    for layout in LAYOUTS[kind]:
        if any(root.glob(layout.images.format(split=split))):
            return layout
    return LAYOUTS[kind][0]


def image_folder(kind: str, root, split: str = "train") -> Path:
    """The folder below a dataset's root in which the images of all splits lie."""
    first = find_layout(kind, Path(root), split).images.split("/")[0]
    return Path(root) if "*" in first else Path(root, first)


def hidden(name: str) -> bool:
    """True for hidden files and folders, and for @eaDir, a file server's thumbnails."""
    return name.startswith((".", "@eaDir"))


def files_below(folder) -> list:
    """The paths of all files in a folder and its folders, sorted. Links are followed; what is
    hidden is left out."""

    def stop(error):  # os.walk would leave out a folder that may not be read
        raise error

    found = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        folders[:] = [name for name in folders if not hidden(name)]
        found += [Path(parent, name) for name in names if not hidden(name)]
    return sorted(found)


def list_files(kind: str, root: Path, pattern: str, suffixes: tuple) -> dict:
    """{name: path} of the files below the folders that match the pattern, in order.

    The name is the path without the suffix, below the part of the pattern that has no *; for GTA5,
    whose archives unpack to 01_images/, 01_labels/ and so on, the file's own name.
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
        converted = path.name.endswith("_labelTrainIds.png")  # other projects put it beside labels
        if suffix is None or converted:
            continue
        below = path.name if kind == "gta5" else path.relative_to(base).as_posix()
        name = below[: -len(suffix)]
        if name in found:
            raise UserError(f"{found[name]} and {path} have the same name. Remove one.")
        found[name] = path
    if not found:
        raise UserError(f"no file *{', *'.join(suffixes)} in {folders[0]}. Check the root.")
    return {name: found[name] for name in sorted(found, key=numeric_order)}


def numeric_order(name: str) -> tuple:
    """Synscapes has 1.png, 2.png, ..., 10.png."""
    folder, _, last = name.rpartition("/")
    return folder, int(last) if last.isdecimal() else -1, last


def list_images(kind: str, root, split: str = "train") -> dict:
    """{name: image path} of a dataset. Knows nothing of labels: the target is read from this."""
    layout = find_layout(kind, Path(root), split)
    return list_files(kind, Path(root), layout.images.format(split=split), layout.image_suffixes)


def list_pairs(kind: str, root, split: str = "train") -> dict:
    """{name: (image path, label path)}. UserError for an image or a label without a partner."""
    layout = find_layout(kind, Path(root), split)
    images = list_images(kind, root, split)
    pattern = layout.labels.format(split=split)
    labels = list_files(kind, Path(root), pattern, (layout.label_suffix,))
    lonely = sorted(images.keys() ^ labels.keys())
    if lonely:
        counts = f"{len(images)} images but {len(labels)} labels"
        names = f"{len(lonely)} have no partner (first: {', '.join(lonely[:3])})"
        raise UserError(f"{root}: {counts}; {names}. Complete the download, or remove them.")
    return {name: (images[name], labels[name]) for name in images}


def keep_listed(files: dict, list_file) -> dict:
    """Those of {name: path, or (image path, label path)} that a text file lists, in the order of
    `files`; all of them without a list file.

    A line is a name with or without folders in front and with or without the file's ending, as in
    AdaptSegNet's and DACS's lists. UserError if a line fits no image, or several.
    """
    if not list_file:
        return files
    names = {}  # every way to write an image: its names
    for name, value in files.items():
        path = value[0] if isinstance(value, tuple) else value
        for text in (name, path.as_posix(), path.with_suffix("").as_posix()):
            parts = text.split("/")
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
        raise UserError(f"{list_file}: {several[0]} fits several images. Write its folder, too.")
    kept = set().union(*(names[line] for line in wanted))
    return {name: value for name, value in files.items() if name in kept}


def dataset_classes(kind: str, root, num_classes: int) -> tuple:
    """The class names in a plain folder's classes.txt, one a line; else those of `class_names`."""
    path = Path(root, "classes.txt")
    if kind != "folder" or not path.is_file():
        return class_names(num_classes)
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    if not len(names) == len(set(names)) == num_classes:
        counts = f"{len(set(names))} different names in {len(names)} lines"
        raise UserError(f"{path} has {counts}. It needs {num_classes}, one a line.")
    return tuple(names)


def check_classes(kind: str, root, classes: tuple):
    """Refuse a source whose classes are not those of the target."""
    if dataset_classes(kind, root, len(classes)) != classes:
        hint = "Make both classes.txt equal, or remove them."
        raise UserError(f"{root} and the target have different classes. {hint}")


def open_image(path, formats=None, low_bytes: bool = False) -> Image.Image:
    """A decoded Pillow image, upright by its EXIF orientation. UserError for a file that is
    missing, damaged or not an image. formats: Pillow's names; None takes all that Pillow reads.

    low_bytes: the low byte of each channel of a 16-bit RGB file. Pillow by itself keeps the high
    one, and torchvision's reader, deprecated by now, refuses such files before version 0.20.
    """
    try:
        image = Image.open(path, formats=formats)
        if low_bytes:
            if image.tile[0][3] != "RGB;16B":
                raise ValueError("it does not have 16 bits a channel")
            # big-endian pairs, read as little-endian ones
            image.tile = [(*tile[:3], "RGB;16L") for tile in image.tile]
        return ImageOps.exif_transpose(image)
    except Exception as error:  # a broken file can make Pillow stumble anywhere
        if isinstance(error, MemoryError) or getattr(error, "errno", None):  # not its content
            raise
        raise UserError(f"cannot read {path} ({error}). Copy or download it again.") from None


def open_rgb(path) -> Image.Image:
    """An image file as 8-bit RGB. UserError for 16 or more bits of grey."""
    image = open_image(path)
    if image.mode.startswith(("I", "F")):  # `convert` would clip it to white
        raise UserError(f"{path} has {image.mode} pixels of 16 bits or more. Convert to 8 bits.")
    return image.convert("RGB")


def read_ids(path) -> np.ndarray:
    """(H,W) uint8 label ids of a PNG: the palette's index (never converted), or 8-bit grey."""
    image = open_image(path, ("PNG",))  # JPEG would blur ids
    with open(path, "rb") as file:
        bits = file.read(25)[24]  # in every PNG's header
    # Pillow stretches grey of fewer bits to 0..255: an id would become another one.
    if image.mode != "P" and (image.mode != "L" or bits != 8):
        found = f"{image.mode} pixels of {bits} bits"
        hint = "Convert to 8 bits: one channel of class ids, not colours."
        raise UserError(f"{path} has {found}. {hint}")
    return np.asarray(image)


def read_label(path, kind: str, num_classes: int) -> Image.Image:
    """A label file as an 8-bit Pillow image of trainIds 0..num_classes-1 and 255.

    UserError if too many pixels have no id of this dataset: more than half; in a plain folder,
    whose ids are the trainIds themselves, more than one in a thousand.
    """
    class_ids = list(LAYOUTS[kind][0].ids[:num_classes])
    last_id = max(class_ids)
    share = 0.001 if kind == "folder" else 0.5
    if kind == "synthia":  # 16 bits a channel, class id in R; ids are below 256
        ids = np.asarray(open_image(path, ("PNG",), low_bytes=True))[:, :, 0]
    else:
        ids = read_ids(path)
    foreign = np.bincount(ids.ravel(), minlength=256)[last_id + 1 : IGNORE]
    if foreign.sum() > share * ids.size:
        percent = f"{100 * foreign.sum() / ids.size:.1f} % of the pixels are outside 0..{last_id}"
        value = last_id + 1 + int(np.argmax(foreign))
        hint = "Are these colours, ids of another dataset, or is --num-classes too low?"
        raise UserError(f"{path}: {percent} (mostly {value}). {hint}")
    trainids = np.full(256, IGNORE, dtype=np.uint8)  # an id without a class becomes 255
    trainids[class_ids] = np.arange(len(class_ids))
    return Image.fromarray(trainids[ids])


def resize(image: Image.Image, size: tuple, kind: str) -> Image.Image:
    """To size (W, H), aspect not kept: an "image" by Pillow's antialiased bicubic, a "label" by
    nearest."""
    return image.resize(size, {"image": Image.BICUBIC, "label": Image.NEAREST}[kind])


def evenly_spaced(length: int, count: int) -> list:
    """At most `count` indices, evenly spaced over range(length)."""
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(count)})


class Images(Dataset):
    """Images without labels. It is given image paths alone: training cannot open a target label.

    An item is {"name", "image": (H,W,3) uint8 RGB array}, resized to `size` if given, or made by
    transform(image, None, random generator of (seed, sample position)).
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
        position, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.open(index)
        if self.transform:
            rng = np.random.default_rng((self.seed, position))
            image, label = self.transform(image, label, rng)
        elif self.size:
            image = resize(image, self.size, "image")
            if label is not None and not self.native_labels:
                label = resize(label, self.size, "label")
        item = {"name": self.names[index], "image": np.array(image)}
        if label is not None:
            item["label"] = np.array(label)
        return item

    def open(self, index: int) -> tuple:
        """(image, label or None) as stored, in Pillow's form."""
        return open_rgb(self.paths[index]), None

    def check_samples(self):
        """Open a few files, so that what is wrong with the set shows before training."""
        for index in evenly_spaced(len(self), 8):
            self.open(index)


class Labelled(Images):
    """Images with labels of one dataset kind; an item also has "label": (H,W) uint8 trainIds.

    native_labels=True keeps labels at their own size (evaluation), otherwise they are resized like
    the image. pseudo=True: labels that a network made; they may have another size, and no labelled
    pixel.
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
            raise UserError(f"{path} is {sizes}. They do not belong together; check their names.")
        return image, label

    def check_samples(self):
        """Also print the classes that a few labels do not have, and refuse labels in which almost
        no pixel has a class, trainIds where ids are expected, and labels of a single class."""
        labels = [np.asarray(self.open(index)[1]) for index in evenly_spaced(len(self), 8)]
        known = [np.mean(label != IGNORE) for label in labels]
        occurring = set(np.concatenate([np.unique(label) for label in labels]).tolist())
        found = sorted(occurring - {IGNORE})
        # Read as ids, trainIds 0 to 18 give no class above pole (id 17), and most pixels none.
        expects_ids = LAYOUTS[self.kind][0].ids is CITYSCAPES_IDS
        above_pole = max(found, default=0) > CLASSES.index("pole")
        trainids = expects_ids and np.mean(known) < 0.7 and not above_pole
        where = f"{self.label_paths[0]} and {len(labels) - 1} more"
        if trainids or max(known) < 0.02:
            hint = f"Are they colours, trainIds instead of ids, or not labels of {self.kind}?"
            raise UserError(f"{where}: few pixels have a class. {hint}")
        if len(found) == 1:
            what = f"only class {found[0]} occurs"
            if IGNORE in occurring:
                what = f"only class {found[0]} and 255 (ignored) occur"
            raise UserError(f"{where}: {what}. Number the classes 0, 1, 2, ...")
        missing = [name for c, name in enumerate(self.classes) if c not in occurring]
        if missing:
            root = os.path.commonpath(self.label_paths)
            print(f"{root}: in {len(labels)} labels no pixel has class {', '.join(missing)}")


def validation_set(kind: str, root, classes: tuple, size):
    """The labelled val images for `evaluate`, after a look at a few; None where there are none."""
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
    """(position, index) pairs of the iterations start..stop-1: epoch after epoch of seeded
    permutations of range(length).

    The order depends on (length, seed) alone and can start at any iteration, so that a run resumes
    exactly. Of the world * batch positions of an iteration, every rank takes its own `batch`.
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
    """This rank's batches of a dataset, of the iterations start..stop-1, on the device.

    next() gives images (B,3,H,W) uint8, channels last, and labels (B,H,W) int64, or None for an
    unlabelled set. `waited` is the seconds spent in waiting for them; the log sets it back to 0.
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
        images = to_device(images, self.device).permute(0, 3, 1, 2)
        if "label" not in items[0]:
            return images, None
        labels = np.stack([item["label"] for item in items])
        return images, to_device(labels, self.device).long()


def one_by_one(dataset: Dataset, workers: int):
    """This rank's share of a dataset's items (every world-th), in order, not batched."""
    share = range(rank(), len(dataset), world_size())
    return read_items(dataset, workers, batch_size=None, sampler=share)


def read_items(dataset: Dataset, workers: int, **options):
    """An iterator of the items, or lists of items, that `workers` processes read.

    The processes start with the first item. They hand over numpy arrays, which travel by pipe:
    tensors would need shared memory, of which containers have little.
    """
    if workers:
        options.update(num_workers=workers, prefetch_factor=4, worker_init_fn=set_up_reader)
    yield from DataLoader(dataset, collate_fn=as_read, **options)


def as_read(items):
    return items


def set_up_reader(worker: int):
    """A reading process ends with the main one, and does not see Ctrl-C, which reaches all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # without waiting for someone to empty its pipe

    threading.Thread(target=end_with_parent, daemon=True).start()


def to_device(array: np.ndarray, device) -> Tensor:
    """A tensor on the device. From pinned memory CUDA copies while the host goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ====================================================================== evaluation


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """(C,C) int64 counts of pixels, rows = label, columns = prediction.

    Both inputs are integer tensors of one shape, predictions in 0..C-1; pixels whose label is not
    in 0..C-1 (255, ignore) are left out.
    """
    known = (labels >= 0) & (labels < num_classes)
    rows = torch.where(known, labels, num_classes).int()  # row C: ignore
    pairs = (rows * num_classes + predictions.int()).flatten()
    counts = torch.bincount(pairs, minlength=(num_classes + 1) * num_classes)
    return counts[: num_classes**2].view(num_classes, num_classes)


def iou(confusion: Tensor) -> Tensor:
    """(C,) float64 intersection over union in 0..1 of a (C,C) confusion matrix: diag / (row +
    column - diag). A class without a pixel in labels and predictions is NaN."""
    confusion = confusion.double()
    hit = confusion.diagonal()
    return hit / (confusion.sum(0) + confusion.sum(1) - hit)


def scores(confusion: Tensor, classes: tuple) -> dict:
    """{"miou19", "miou16", "miou13", "iou": {class: value}} in percent, means without NaN.

    For classes other than Cityscapes' "miou<C>" alone. None stands for undefined.
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


def upsample(logits: Tensor, size: tuple) -> Tensor:
    """(B,C,h,w) to (B,C,H,W) for size (W,H): bilinear, align_corners=True, as in both methods."""
    return F.interpolate(logits, size[::-1], mode="bilinear", align_corners=True)


def map_centres(h: int, side: int, device) -> Tensor:
    """(h,) int64: the pixel of `side` that each position of a map of h stands for.

    round(i (side-1)/(h-1)): where align_corners=True puts the logits, and within a pixel of the
    receptive field's centre. (Nearest resizing is 3 to 8 pixels off at the borders.)
    """
    positions = torch.arange(h, dtype=torch.float64, device=device)
    return torch.round(positions * (side - 1) / max(h - 1, 1)).long()


def pick(labels: Tensor, h: int, w: int) -> Tensor:
    """Labels (B,H,W) at the centres of the positions of an (h,w) map -> (B,h,w)."""
    rows = map_centres(h, labels.shape[1], labels.device)
    columns = map_centres(w, labels.shape[2], labels.device)
    return labels[:, rows[:, None], columns]


def upsampled_argmax(logits: Tensor, size: tuple) -> Tensor:
    """(B,C,h,w) logits to (B,H,W) uint8 predictions at size (W,H)."""
    return upsample(logits, size).argmax(1).byte()


def entropy_map(logits: Tensor, size: tuple) -> Tensor:
    """Normalised entropy -Σ P log P / log C, (B,H,W) in [0, 1], of logits (B,C,h,w) upsampled to
    size (W,H). For pictures; class by class, as the (C,H,W) map of a large photo fills memory."""
    C = logits.shape[1]
    logits = logits - logits.amax(1, keepdim=True)  # exp can't overflow; P stays what it is
    total = 0
    weighted = 0
    for c in range(C):
        z = upsample(logits[:, c : c + 1], size)[:, 0]  # (B, H, W)
        exp = z.exp()
        total = total + exp
        weighted = weighted + exp * z
    # -Σ P log P with P = exp(z) / total. Midway between positions whose logits differ by over
    # 140, exp is 0 for every class, and the entropy reads 0.
    total = total.clamp(min=1e-30)
    return (total.log() - weighted / total).clamp(0, np.log(C)) / np.log(C)


def main_logits(networks: list, images: Tensor) -> Tensor:
    """The main head's logits (B,C,h,w), mean over networks, of uint8 RGB images (B,3,H,W)."""
    x = normalize(images)
    return sum(network(x).main for network in networks) / len(networks)


def as_input(image: Image.Image, size: tuple, device) -> Tensor:
    """An RGB Pillow image at size (W,H) as a tensor (1,3,H,W) uint8 on the device."""
    return to_device(np.array(resize(image, size, "image")), device).permute(2, 0, 1)[None]


@torch.no_grad()
def predict(network: DeepLabV2, image: Image.Image, size=None) -> Tensor:
    """(H,W) uint8 trainIds of a Pillow image at its own size.

    The network, in eval mode, sees the image at `size` (W,H): by default with the image's own
    aspect and the area of network.input_size. ValueError for a network in training mode.
    """
    if network.training:
        raise ValueError("predict takes a network in eval mode: call network.eval() first")
    size = size or same_area(image.size, network.input_size)
    x = as_input(image.convert("RGB"), size, network.conv1.weight.device)
    return upsampled_argmax(main_logits([network], x), image.size)[0]


def same_area(size: tuple, like: tuple) -> tuple:
    """The size (W,H) of the aspect of `size` and the area of `like`; no side is below 32."""
    factor = (like[0] * like[1] / (size[0] * size[1])) ** 0.5
    return tuple(max(32, round(side * factor)) for side in size)


@torch.no_grad()
def evaluate(networks: list, dataset: Labelled, device, workers: int = 0, on_image=None) -> dict:
    """`scores` of the networks' mean logits over a dataset with native-size labels, with
    "confusion" (C,C) int64, "images" and "seconds".

    Eval mode, main head, logits upsampled to the label's size, argmax. The networks stay as they
    are, their mode included. Ranks share the images, and all get the result. on_image(name, logits
    (1,C,h,w), prediction (H,W) uint8), if given, sees every image.
    """
    begin = time.perf_counter()
    networks = [inference_copy(network) for network in networks]
    C = len(dataset.classes)
    confusion = torch.zeros(C, C, dtype=torch.int64, device=device)
    for item in one_by_one(dataset, workers):
        image = to_device(item["image"], device).permute(2, 0, 1)[None]
        label = to_device(item["label"], device)
        logits = main_logits(networks, image)  # (1, C, h, w)
        prediction = upsampled_argmax(logits, label.shape[::-1])[0]
        confusion += confusion_matrix(label, prediction, C)
        if on_image:
            on_image(item["name"], logits, prediction)
    confusion = all_reduce(confusion).cpu()
    result = scores(confusion, dataset.classes)
    seconds = time.perf_counter() - begin
    return {**result, "confusion": confusion, "images": len(dataset), "seconds": seconds}


def score_table(columns: dict) -> str:
    """A text table, a column per name of {name: scores}: per-class IoU and means, in percent."""
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
    """Number of this process among those that torchrun started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world_size() > 1:
        dist.barrier()


def all_reduce(tensor: Tensor) -> Tensor:
    """The tensor, replaced in place by its sum over the ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def merge_ranks(own: dict) -> dict:
    """The dicts of all ranks in one."""
    parts = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def average_over_ranks(*modules: nn.Module):
    """Average gradients and BatchNorm's running statistics over the ranks, in one message.

    By hand and not by DistributedDataParallel, which expects one backward pass through a network
    per step: IntraDA's G has two, and the second also runs through D, which it must not change.
    """
    if world_size() == 1:
        return
    tensors = []
    for module in modules:
        tensors += [p.grad for p in module.parameters() if p.grad is not None]
        tensors += list(module.buffers())
    flat = all_reduce(torch.cat([t.reshape(-1) for t in tensors])) / world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


def set_up(name) -> torch.device:
    """The device of this process: cpu or cuda as named, or CUDA where there is one. Joins the other
    processes if torchrun started this one; of these, only rank 0 prints."""
    if name == "cuda" and not torch.cuda.is_available():
        hint = "Use --device cpu, or install a driver and a CUDA build of torch."
        raise UserError(f"--device cuda: torch sees no CUDA device. {hint}")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    torch.backends.cudnn.benchmark = True  # image sizes are fixed
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        visible = torch.cuda.device_count()
        if local >= visible:
            raise UserError(f"torchrun started more processes than {visible} GPUs. Start fewer.")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # One group: gloo takes CPU tensors (names, barriers, log), NCCL those of the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def autocast(device, wanted):
    """A context in which convolutions run in bfloat16. wanted: True, False, or None, which means:
    on a GPU that computes in bfloat16 and does not emulate it."""
    if wanted is None:
        wanted = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def compiled(function, wanted: bool):
    """The function, compiled for fixed shapes if that is wanted. `upsample` never is: torch 2.4
    compiles its backward pass to wrong gradients."""
    return torch.compile(function, dynamic=False) if wanted else function


# ====================================================================== resume, save, log


def due(it: int, every: int, iters: int) -> bool:
    """True if work done every `every` iterations, and at the end, is due after `it` iterations.
    every = 0: at the end alone."""
    return it == iters or (it > 0 and every > 0 and it % every == 0)


def identity(arguments: dict, free: tuple) -> dict:
    """The settings of a run, {flag: text}: those that must stay the same when it resumes. `free`
    are the flags that may change."""
    settings = {name: str(value) for name, value in arguments.items() if name not in free}
    return {**settings, "processes": str(world_size())}


def earlier_run(folder, settings: dict):
    """The content of last.pth in `folder`, or None for a fresh start. UserError for a run of other
    settings, and for a folder with files that look like a run's, but without a last.pth."""
    folder = Path(folder)
    path = folder / "last.pth"
    if not path.exists():
        for pattern in ("best.pth", "log.jsonl", "round*"):
            for stray in folder.glob(pattern):
                what = f"{folder} has {stray.name} but no last.pth: it cannot resume"
                raise UserError(f"{what}. Choose another --out.")
        return None
    content = read_checkpoint(path)
    if content.get("format") != FORMAT or "settings" not in content:
        raise UserError(f"{path} was not written by this version's training. Choose another --out.")
    found = content["settings"]
    names = sorted(found.keys() | settings.keys())
    different = []
    for name in names:
        if found.get(name) != settings.get(name):
            different.append(f"{name} is {found.get(name)} there and {settings.get(name)} here")
    if different:
        hint = "A run of these settings needs an --out of its own."
        if found.get("images") != settings.get("images"):
            hint += " (images: a hash of their names; another folder or list has others.)"
        raise UserError(f"{path} is of a run of other settings: {'; '.join(different)}. {hint}")
    return content


def resume(folder, settings: dict, state: dict) -> int:
    """Load last.pth of `folder` into the networks and optimizers of `state`, and return its
    iteration; 0 for a fresh start."""
    global resume_hint
    content = earlier_run(folder, settings)
    if content is None:
        return 0
    for name, part in state.items():
        part.load_state_dict(content[name])
    resume_hint = f"; run the same command to resume from iteration {content['iter']}"
    return content["iter"]


def save(path, it: int, settings: dict, state: dict):
    """The one place where a checkpoint is written: state_dicts of `state` {"model": network, ...},
    iteration, settings and the network's input size. UserError for weights that are not finite.

    No random state is needed: order and augmentation follow from seed and iteration.
    """
    global resume_hint
    networks = nn.ModuleList(part for part in state.values() if isinstance(part, nn.Module))
    finite = [tensor.isfinite().all() for tensor in networks.state_dict().values()]
    if not torch.stack(finite).all():
        hint = "Start with a lower learning rate and another --out. The earlier last.pth stays."
        raise UserError(f"a weight is not finite at iteration {it}. {hint}")
    if rank() == 0:
        content = {name: part.state_dict() for name, part in state.items()}
        content.update(format=FORMAT, iter=it, settings=settings)
        content.update(input_size=state["model"].input_size)
        with atomic_write(path) as file:
            torch.save(content, file)
    resume_hint = f"; run the same command to resume from iteration {it}"
    barrier()


def read_log(path) -> list:
    """The records of a log.jsonl, each a dict with "iter". A line that a kill cut is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def evaluations(records: list) -> list:
    return [record for record in records if record.get("event") == "evaluation"]


def mean_iou(result: dict) -> float:
    """The mean over all classes of a result or record; 0, the lowest, where none has a pixel."""
    return result[f"miou{len(result['iou'])}"] or 0.0


class Log:
    """log.jsonl of a stage: a JSON line for every start, record of losses and evaluation, with a
    line each on the terminal. Scores live here and nowhere else."""

    def __init__(self, folder, stage: str, data: str, start: int, iters: int, settings: dict):
        """Keeps an earlier log's records up to iteration `start`. data: what it is trained on."""
        self.path = Path(folder, "log.jsonl")
        self.stage = stage
        self.iters = iters
        earlier = read_log(self.path) if self.path.exists() else []
        kept = [record for record in earlier if record["iter"] <= start]
        self.evaluated = {record["iter"]: mean_iou(record) for record in evaluations(kept)}
        self.restart_clock(start)
        if rank() == 0:
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        if start >= iters and any(record.get("iters") == iters for record in kept):
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
        """A record of an iteration's losses {term: scalar tensor} and `more`, with the speed since
        the record before, the seconds in which `batches` made it wait, and peak memory. The host
        waits for the GPU only at log steps. UserError if a loss is not finite.
        """
        values = torch.stack([x.detach().float() for x in losses.values()]).cpu()
        losses = dict(zip(losses, (all_reduce(values) / world_size()).tolist()))
        for term, value in losses.items():
            if not np.isfinite(value):
                hint = "Look at the images, or start with a lower learning rate and another --out."
                raise UserError(f"{term} is {value} at iteration {it}. {hint}")
        seconds = time.perf_counter() - self.clock
        rate = (it - self.since) / seconds
        speed = {"it_per_s": rate, "seconds": seconds}
        speed["data_seconds"] = sum(source.waited for source in batches)
        speed["peak_memory_mb"] = peak_memory_mb(device)
        self.write(iter=it, **losses, **more, **speed)
        text = "  ".join(f"{term.removeprefix('loss_')} {x:.3f}" for term, x in losses.items())
        left = f"{rate:.2f} it/s  {(self.iters - it) / rate / 60:.1f} min left"
        print(f"{self.stage} {it}/{self.iters}  {text}  {left}", flush=True)
        for source in batches:
            source.waited = 0.0
        self.restart_clock(it)

    def evaluation(self, it: int, result: dict):
        """Record the result of `evaluate`."""
        record = {name: value for name, value in result.items() if name != "confusion"}
        self.write(iter=it, event="evaluation", **record)
        self.evaluated[it] = mean_iou(result)
        classes = len(result["iou"])
        mean = f"mIoU {classes}: {mean_iou(result):.1f} on {result['images']} validation images"
        print(f"{self.stage} {it}/{self.iters}  {mean}", flush=True)
        self.restart_clock(it)  # an evaluation is not training time

    def is_best(self, result: dict) -> bool:
        """True if a result is above all recorded ones: an oracle, chosen on validation labels."""
        return mean_iou(result) > max(self.evaluated.values(), default=-1.0)


def versions() -> dict:
    """torch, torchvision and git revision, for the log."""
    revision = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10)
        revision = output.stdout.strip() or None
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "git": revision}


def peak_memory_mb(device) -> float:
    """Most memory used so far, in MiB: torch's on the GPU, on the CPU all of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ====================================================================== pictures


def grey(values: Tensor) -> np.ndarray:
    """(H,W) values in 0..1 to an (H,W,3) uint8 picture: black 0, white 1."""
    plane = values.mul(255).round().byte().cpu().numpy()
    return np.repeat(plane[..., None], 3, axis=2)


def changes(before: np.ndarray, after: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(H,W,3) picture of two predictions (H,W) of trainIds: green where the second became right,
    red where it became wrong, yellow where both are wrong in different ways."""
    picture = np.full((*truth.shape, 3), 40, np.uint8)
    different = (before != after) & (truth != IGNORE)
    picture[different] = (220, 200, 60)
    picture[different & (after == truth)] = (60, 200, 80)
    picture[different & (before == truth)] = (230, 50, 50)
    return picture


def write_grid(path, titles: list, rows: list, classes: tuple, captions=None, height: int = 160):
    """A PNG of rows of pictures, all of one height and each with its own aspect, with a title over
    each column, a caption below each row if given, and a legend of the classes that occur.

    A picture is an image (H,W,3) uint8 or a label (H,W) uint8 of trainIds, which is coloured.
    """
    colours = palette(classes)
    font = ImageFont.load_default(13)
    line = 20  # pixels of a line of text
    columns = [[round(height * p.shape[1] / p.shape[0]) for p in column] for column in zip(*rows)]
    lefts = list(itertools.accumulate((max(widths) + 2 for widths in columns), initial=0))
    labels = [picture for picture in itertools.chain(*rows) if picture.ndim == 2]
    occurring = set().union(*(np.unique(label).tolist() for label in labels)) - {IGNORE}
    legend_top = line + len(rows) * (height + line)
    per_line = max(1, lefts[-1] // 130)  # entries of the legend
    legend_height = line * -(-len(occurring) // per_line)
    sheet = Image.new("RGB", (lefts[-1], legend_top + legend_height), "white")
    draw = ImageDraw.Draw(sheet)
    for title, left, widths in zip(titles, lefts, columns):
        draw.text((left + 4, 2), title[-max(widths) // 7 :], "black", font)  # 7 pixels a letter
    for i, row in enumerate(rows):
        top = line + i * (height + line)
        for picture, left in zip(row, lefts):
            size = (round(height * picture.shape[1] / picture.shape[0]), height)
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
        top = legend_top + line * (i // per_line)
        draw.rectangle((left, top + 4, left + 11, top + 15), tuple(colours[c].tolist()))
        draw.text((left + 16, top + 2), classes[c], "black", font)
    write_png(path, np.asarray(sheet))


@torch.no_grad()
def write_panel(path, networks: dict, dataset: Images, indices, classes, device, captions=None):
    """One PNG with a row for each of these images of the dataset: image, ground truth if it has
    labels, prediction of each of {title: network}, for two networks what changed between them, and
    the entropy of the last (black 0, white 1).

    The networks are of `inference_copy` and see images at the dataset's size.
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
            logits = main_logits([network], x)
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
    """Print the last scores of runs {title: folder} and draw their predictions, out/panel.png, for
    the two images of lowest and the two of highest mean entropy under the last run, of at most 24
    that are evenly spaced over the set."""
    columns = {}
    networks = {}
    for title, folder in runs.items():
        columns[title] = evaluations(read_log(Path(folder, "log.jsonl")))[-1]
        networks[title] = inference_copy(load(Path(folder, "last.pth"))).to(device)
    images = columns[title]["images"]  # at the time of the evaluation
    print(f"\nIoU in percent on {images} validation images, last checkpoints:")
    print(score_table(columns))
    means = {}
    for index in evenly_spaced(len(validation), 24):
        image, _ = validation.open(index)
        logits = main_logits([networks[title]], as_input(image, validation.size, device))
        means[index] = entropy_map(logits, validation.size).mean().item()
    order = sorted(means, key=means.get)
    shown = list(dict.fromkeys(order[:2] + order[-2:]))
    captions = [f"{validation.names[i]}, mean entropy {means[i]:.3f}" for i in shown]
    path = Path(out, "panel.png")
    write_panel(path, networks, validation, shown, validation.classes, device, captions)
    print(f"\npictures: {path}")
