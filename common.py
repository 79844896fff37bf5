"""What both methods share: class tables, DeepLab-V2, weight files, dataset readers, evaluation, checkpoints, log, scenes.

No losses, no training loop and no argument parsing live here: those are the methods, and each method is one file.
Conventions: sizes are (W, H); tensors are (B, C, H, W); labels are trainIds 0..C-1 with 255 = ignore; images travel as
uint8 RGB and become float BGR minus the mean in `normalize`, on the device.

Contents   1 errors and files   2 classes   3 network   4 weight files   5 readers   6 sampling   7 evaluation
           8 look before you train   9 runs: device, checkpoints, log   10 pictures   11 built-in street scenes
"""

import colorsys
import contextlib
import copy
import functools
import io
import json
import math
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageFont, PngImagePlugin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck

# ---------------------------------------------------------------- 1 errors and files


DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, zlib.error, struct.error)  # what Pillow raises on broken files


class UserError(Exception):
    """Something the user can put right: one sentence that names the file or flag and what to do."""

    def __init__(self, message: str):
        # A DataLoader worker hands an exception on inside its printed traceback, which ends with "UserError: " and the sentence.
        super().__init__(" ".join(message.split("UserError: ")[-1].splitlines()))


def as_sentence(error: Exception):
    """What to tell the user about an exception that their input or machine causes; None for one that may be a bug here."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, torch.cuda.OutOfMemoryError) or ("CUDA" in text and "out of memory" in text):
        return (
            "out of GPU memory: lower --batch-size (in training --grad-accum makes up for it) or the image sizes (--source-size,"
            " --target-size, --crop, --input-size); in training also add --amp or --checkpoint-activations"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "out of memory: lower --batch-size, --workers or the image sizes (--source-size, --target-size, --crop, --input-size)"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"a process that reads images died ({text}): lower --workers or --batch-size, or give it more (shared) memory"
    if isinstance(error, dist.DistError) or (world() > 1 and isinstance(error, RuntimeError) and "peer" in text):
        return "another of torchrun's processes ended; its message says why"
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or text}; check the path, its permissions and the disk"
    return None


def launch(main):
    """Call a script's main(); what `as_sentence` knows becomes one line on stderr and exit status 2, an interrupt 130."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leaves through the clean-up of half-written files
    for stream in (sys.stdout, sys.stderr):  # a terminal without λ, a path that is no UTF-8: print escapes, do not fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, say head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except Exception as error:
        sentence = as_sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        if dist.is_initialized():  # without the clean-up of its processes, which may wait for the others
            os._exit(2)
        sys.exit(2)


@contextlib.contextmanager
def writing(path):
    """A full disk, a missing permission or a folder in the way become a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): free the disk or choose another folder")


@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for binary writing; the file appears whole or not at all (temporary file, fsync, rename)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def nearest_folder(path) -> Path:
    """The folder itself or, where it is not made yet, the one that it would be made in; a file if one is in the way."""
    path = Path(path).absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def writable(out, *below):
    """Refuse the output folder `out` at the start if it, or one of these subfolders, cannot be written. Makes nothing."""
    for path in map(nearest_folder, (out, *(Path(out, name) for name in below))):
        if not path.is_dir():
            raise UserError(f"--out {out}: {path} is in the way, it is not a folder; remove it or choose another --out")
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"--out {out}: {path} cannot be written; change its permissions or choose another --out")


def write_text(path, text: str):
    with atomic_write(path) as file:
        file.write(text.encode())


def write_png(path, array: np.ndarray, palette=None, text=None, compress_level: int = 6):
    """(H,W) uint8 labels, in colour if a palette (C,3) is given, or an (H,W,3) uint8 image, as PNG.

    text: {key: value} kept inside the file, for `png_text`. compress_level: 1 is five times as fast for noisy content.
    """
    image, info = Image.fromarray(array), PngImagePlugin.PngInfo()
    if palette is not None:  # trainId PNGs stay readable as numbers: the palette only changes how they look
        image.putpalette(np.pad(palette, ((0, 256 - len(palette)), (0, 0))).astype(np.uint8).tobytes())
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with atomic_write(path) as file:
        image.save(file, format="PNG", pnginfo=info, compress_level=compress_level)


def png_text(path) -> dict:
    """The texts inside a PNG, read without decoding it; {} for a file that is missing or no PNG."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return {key: value for key, value in image.info.items() if isinstance(value, str)}
    except (*DAMAGE, Image.DecompressionBombError):
        return {}


def link(old, new):
    """Let `new` be the same file as `old`, or a copy where the file system knows no links; replaces `new`."""
    new = Path(new)
    with writing(new):
        new.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:
        with atomic_write(new) as file:
            file.write(Path(old).read_bytes())


# ---------------------------------------------------------------- 2 classes

IGNORE = 255
#     class            Cityscapes id  SYNTHIA id  colour           (Cityscapes ids are also those of GTA5 and Synscapes)
_TABLE = (
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
CLASSES = tuple(row[0] for row in _TABLE)
CITYSCAPES_IDS = tuple(row[1] for row in _TABLE)
SYNTHIA_IDS = tuple(row[2] for row in _TABLE)
PALETTE = np.array([row[3] for row in _TABLE], dtype=np.uint8)
SUBSET_16 = tuple(c for c in range(19) if c not in (9, 14, 16))  # SYNTHIA has no terrain, truck and train
SUBSET_13 = tuple(c for c in SUBSET_16 if c not in (3, 4, 5))  # and is also reported without wall, fence and pole


def palette_for(num_classes: int) -> np.ndarray:
    """(num_classes, 3) uint8 colours: the Cityscapes palette for up to 19 classes, well spread fixed ones beyond."""
    extra = np.random.default_rng(0).integers(30, 256, (max(0, num_classes - 19), 3), dtype=np.uint8)
    return np.concatenate([PALETTE, extra])[:num_classes]


def colour(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(H,W) trainIds to (H,W,3) uint8; 255 and whatever is not a class is black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:num_classes] = palette_for(num_classes)
    return table[labels]


def class_names(num_classes: int) -> tuple:
    return CLASSES if num_classes == 19 else tuple(str(c) for c in range(num_classes))


def trainid_table(ids) -> np.ndarray:
    """256-entry uint8 table from a dataset's label id to trainId; every id that is not listed maps to 255."""
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[list(ids)] = np.arange(len(ids), dtype=np.uint8)
    return table


# ---------------------------------------------------------------- 3 network

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)


def normalize(images: Tensor) -> Tensor:
    """RGB 0..255 (B,3,H,W), uint8 or float, to the network's input: float32 BGR 0..255 minus the mean, no division."""
    bgr = images.flip(1).float()
    for channel, mean in enumerate(MEAN_BGR):  # as numbers: a tensor of them would make the host wait for the GPU
        bgr[:, channel] -= mean
    return bgr


class Prediction(NamedTuple):
    main: Tensor  # (B, C, h, w) logits of layer6, at stride 8
    aux: Tensor  # (B, C, h, w) logits of layer5, or None for a network without the auxiliary head
    features: Tensor  # (B, D, h, w) encoder output (layer4), D = 32 * width: 2048 in the papers; bfloat16 under autocast


class AtrousHead(nn.Module):
    """Four parallel 3x3 convolutions with dilation 6, 12, 18, 24, summed: (B,D,h,w) features to (B,C,h,w) logits."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.conv2d_list = nn.ModuleList(nn.Conv2d(channels, num_classes, 3, padding=d, dilation=d) for d in (6, 12, 18, 24))
        for conv in self.conv2d_list:
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        return sum(conv(features) for conv in self.conv2d_list)


class DeepLabV2(nn.Module):
    """DeepLab-V2 on a Caffe-style dilated ResNet: images (B,3,H,W) from `normalize` to a `Prediction` at stride 8.

    layers and width are blocks per stage and channels of the stem: (3,4,23,3) and 64 make the papers' ResNet-101, whose
    published checkpoints load by name. aux=False leaves out layer5, the auxiliary head on layer3. BatchNorm's affine
    parameters are frozen; its statistics are not (see `set_mode`). A 1024x512 image gives a 129x65 map. Weights and
    activations lie channels last, which convolutions are faster with. checkpoint_activations=True keeps only the input of
    every block for the backward pass and computes the rest again: less memory, one more forward pass.
    """

    checkpoint_activations = False

    def __init__(self, num_classes: int = 19, layers=(3, 4, 23, 3), width: int = 64, aux: bool = True):
        super().__init__()
        self.num_classes, self.layers, self.width = num_classes, tuple(layers), width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        channels = width
        for i, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
            stage, planes = [], width * 2**i
            for b in range(layers[i]):
                shortcut = None
                if b == 0:
                    conv = nn.Conv2d(channels, 4 * planes, 1, stride=stride, bias=False)
                    shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))
                block = Bottleneck(channels, planes, downsample=shortcut, dilation=dilation)
                if b == 0:
                    block.conv1.stride = (stride, stride)  # Caffe strides on the 1x1; torchvision would on the 3x3
                stage.append(block)
                channels = 4 * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.layer5 = AtrousHead(channels // 2, num_classes) if aux else None
        self.layer6 = AtrousHead(channels, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Prediction:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images.contiguous(memory_format=torch.channels_last)))))
        x = self.blocks(self.layer2, self.blocks(self.layer1, x))  # (B, 8*width, H/8, W/8); layer1 is at H/4
        middle = self.blocks(self.layer3, x)  # (B, 16*width, H/8, W/8)
        features = self.blocks(self.layer4, middle)  # (B, 32*width, H/8, W/8)
        # float(): under autocast the convolutions give bfloat16, but losses and entropies are taken in float32.
        return Prediction(self.layer6(features).float(), self.layer5(middle).float() if self.layer5 else None, features)

    def blocks(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return stage(x)
        for block in stage:
            contexts = functools.partial(_once_only_statistics, block)
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return x

    def parameter_groups(self, backbone_mult: float, head_mult: float) -> list:
        """Optimizer groups, each parameter exactly once, with the factor on the learning rate under "lr_mult"."""
        trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
        heads = [p for name, p in trainable.items() if name.startswith(("layer5.", "layer6."))]
        trunk = [p for name, p in trainable.items() if not name.startswith(("layer5.", "layer6."))]
        assert len({id(p) for p in trunk + heads}) == len(trunk) + len(heads) == len(trainable)
        return [{"params": trunk, "lr_mult": backbone_mult}, {"params": heads, "lr_mult": head_mult}]


def _once_only_statistics(block: nn.Module) -> tuple:
    """The contexts of a checkpointed block's two forward passes: the second must not move the running statistics again."""

    @contextlib.contextmanager
    def second():
        norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for norm, values in zip(norms, before):
                norm.momentum, norm.num_batches_tracked = values

    return contextlib.nullcontext(), second()


def set_mode(model: nn.Module, bn: str):
    """Training mode. bn="batch" (both papers): BatchNorm uses batch statistics and moves its running ones, even at
    batch size 1. bn="running": it normalises by the running statistics, which stay as they are."""
    model.train()
    for module in model.modules():
        if bn == "running" and isinstance(module, nn.BatchNorm2d):
            module.eval()


def upsample_blocks(maps, size: tuple, rows: int = 0):
    """Bilinear align_corners=True upsampling of logits (B,C,h,w) to size (W,H), in blocks of output rows.

    maps may be a list of such tensors, of any h and w: the mean of their upsampled versions. Yields (first row,
    (B, C, rows, W)). rows=0 chooses: on the CPU few enough rows to stay in cache, so that the full (C, H, W) map never
    exists; on CUDA all rows at once.
    """
    maps, (width, height) = [maps] if isinstance(maps, Tensor) else maps, size
    rows, corners = rows or (height if maps[0].is_cuda else 16), []
    for logits in maps:
        # Output row i of H reads input row i(h-1)/(H-1) of h: mix the two neighbours here, leave x to F.interpolate.
        h = logits.shape[2]
        position = torch.arange(height, dtype=torch.float64, device=logits.device) * ((h - 1) / max(height - 1, 1))
        above = position.long().clamp(max=max(h - 2, 0))
        corners.append((above, (above + 1).clamp(max=h - 1), (position - above).to(logits.dtype).view(-1, 1)))
    for first in range(0, height, rows):
        part, total = slice(first, first + rows), 0
        for logits, (above, below, weight) in zip(maps, corners):
            lines = torch.lerp(logits[:, :, above[part]], logits[:, :, below[part]], weight[part])  # (B, C, rows, w)
            total = total + F.interpolate(lines, (lines.shape[2], width), mode="bilinear", align_corners=True)
        yield first, total / len(maps) if len(maps) > 1 else total


# ---------------------------------------------------------------- 4 weight files


# kind of file: heads that it may leave at their initial value
WEIGHT_KINDS = {
    "our checkpoint": ("layer5.",),  # BCL's networks have no auxiliary head
    "AdvEnt / IntraDA checkpoint": (),
    "BCL release": ("layer5.",),
    "single-level DeepLab": ("layer5.",),
    "initial weights (Scale.*)": ("layer5.", "layer6."),
    "torchvision ResNet": ("layer5.", "layer6."),
}


class WeightReport(NamedTuple):
    kind: str  # one of WEIGHT_KINDS
    loaded: list  # names of the tensors taken from the file
    skipped: list  # names in the file that this network has no use for
    initialised: list  # names in the network that keep their initial value

    def __str__(self):
        def some(names):
            return f"{len(names)}" + (f" ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})" if names else "")

        loaded, skipped, initialised = len(self.loaded), some(self.skipped), some(self.initialised)
        return f"{self.kind}: loaded {loaded} tensors, skipped {skipped}, kept initial {initialised}"


def read_checkpoint(path) -> dict:
    """The dict of tensors and plain values in a .pth file. Code in a file is never run (weights_only)."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: name the .pth file in it")
    try:
        with warnings.catch_warnings():  # of formats that `parse_weights` refuses
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: check the path")
    except PermissionError:
        raise UserError(f"cannot read {path}: change its permissions")
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not a file of plain tensors (loading it would run code, or it is no checkpoint): refused")
    except Exception as error:  # a damaged pickle can make torch stumble anywhere
        raise UserError(f"{path} is truncated or not a checkpoint ({type(error).__name__}): download or train it again")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: bring a checkpoint of a DeepLab-V2")
    return content


def parse_weights(content: dict, path="weights") -> tuple:
    """(kind, state dict under our names, skipped names) of any of the WEIGHT_KINDS, told apart by content alone."""
    ours = content.get("format") == FORMAT
    for key in ("model", "state_dict", "model", "state_dict"):  # containers, also one in the other
        content = content[key] if isinstance(content.get(key), dict) else content
    state = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            while name.startswith(("module.", "_orig_mod.")):
                name = name.split(".", 1)[1]
            if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_meta or value.is_complex():
                raise UserError(f"{path}: {name} is no plain dense tensor (sparse, quantised, complex or without data): save it as float32")
            if value.is_floating_point() and not value.float().isfinite().all():  # float(): float8 knows no isfinite
                raise UserError(f"{path}: {name} holds NaN or infinite values; take an earlier checkpoint")
            state[name] = value

    def without(*prefixes):
        dropped = [name for name in state if name.startswith(prefixes)]
        return {name: value for name, value in state.items() if name not in dropped}, dropped

    def layer5_as_main(state):
        return {name.replace("layer5.", "layer6."): value for name, value in state.items()}

    def head_channels(layer):
        weight = state.get(f"{layer}.conv2d_list.0.weight")
        return weight.shape[1] if weight is not None and weight.dim() == 4 else 0

    aux, main = head_channels("layer5"), head_channels("layer6")
    if ours:
        return "our checkpoint", state, []
    if state and all(name.startswith("Scale.") for name in state):
        kept, skipped = without("Scale.layer5.")
        return "initial weights (Scale.*)", {name[len("Scale.") :]: value for name, value in kept.items()}, skipped
    if "fc.weight" in state and "conv1.weight" in state:
        kept, skipped = without("fc.")
        # torchvision's input is RGB, 0..1, divided by std; ours is BGR, 0..255. The means agree to one grey level.
        std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
        return "torchvision ResNet", {**kept, "conv1.weight": (kept["conv1.weight"] / (255 * std)).flip(1)}, skipped
    if any(name.startswith("target_conv1.") for name in state):
        stem = {name[len("target_") :]: value for name, value in state.items() if name.startswith("target_")}
        kept, skipped = without("target_", "layer6.", *stem)
        return "BCL release", layer5_as_main({**kept, **stem}), [name for name in skipped if not name.startswith("target_")]
    if aux and main == 2 * aux:
        return "AdvEnt / IntraDA checkpoint", state, []
    if aux and not main:
        return "single-level DeepLab", layer5_as_main(state), []
    raise UserError(f"{path} is none of the weight files this project knows (see README): bring one of a DeepLab-V2 on ResNet")


def load_weights(model: DeepLabV2, source, path="weights") -> WeightReport:
    """Load a weight file (a path, or its content as a dict, read from `path`) into the network; says what was loaded,
    skipped and kept.

    Only the heads that WEIGHT_KINDS names may keep their initial value. Raises UserError if the file is unreadable, of
    another architecture or class count, or lacks anything else (num_batches_tracked apart).
    """
    path = path if isinstance(source, dict) else source
    kind, state, skipped = parse_weights(source if isinstance(source, dict) else read_checkpoint(source), path)
    if model.layer5 is None:
        skipped = skipped + [name for name in state if name.startswith("layer5.")]
        state = {name: value for name, value in state.items() if not name.startswith("layer5.")}
    own = model.state_dict()
    absent = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    initialised = [name for name in absent if name.startswith(WEIGHT_KINDS[kind])] if WEIGHT_KINDS[kind] else []
    wrong = [name for name in state if name not in own or own[name].shape != state[name].shape]
    wrong += [name for name in absent if name not in initialised]
    whole = [n for n in state if n in own and own[n].is_floating_point() and not state[n].is_floating_point()]
    if whole:
        raise UserError(f"{path} ({kind}): {whole[0]} has type {state[whole[0]].dtype}; bring weights in floating point")
    if wrong:
        found, wanted = (tuple(d[wrong[0]].shape) if wrong[0] in d else "missing" for d in (state, own))
        raise UserError(
            f"{path} ({kind}) does not fit: {wrong[0]} is {found} in the file and {wanted} in the network;"
            f" check --num-classes {model.num_classes}, --layers {','.join(map(str, model.layers))}, --width {model.width}"
        )
    model.load_state_dict({**own, **state})
    return WeightReport(kind, list(state), skipped, initialised)


def build_model(path, content=None) -> tuple:
    """(DeepLabV2, WeightReport) for a checkpoint with trained heads: its architecture is read off its tensors. content:
    what `read_checkpoint` gave of it, if that is known already."""
    content = read_checkpoint(path) if content is None else content
    _, state, _ = parse_weights(content, path)
    try:
        layers = [1 + max(int(n.split(".")[1]) for n in state if n.startswith(f"layer{i}.")) for i in (1, 2, 3, 4)]
        num_classes, width = state["layer6.conv2d_list.0.bias"].shape[0], state["conv1.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{path} has no trained classifier (layer6): evaluate a checkpoint, not initial weights")
    if not (2 <= num_classes <= 255 and 2 <= width <= 1024 and max(layers) <= len(state)):  # before it is built
        raise UserError(f"{path}: {num_classes} classes, width {width}, blocks {layers} are no DeepLab-V2: the file is damaged")
    model = DeepLabV2(num_classes, layers, width, aux=any(n.startswith("layer5.") for n in state))
    return model, load_weights(model, content, path)


def imagenet_weights() -> dict:
    """torchvision's ImageNet state dict of ResNet-101, fetched through torchvision (and cached by it)."""
    weights = torchvision.models.ResNet101_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (urllib.error.URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"cannot fetch ImageNet weights ({error}): put {weights.url.split('/')[-1]} into {folder},"
            " or name a weight file with --init FILE"
        )


def initial_weights(init: str):
    """What --init names: None for none, torchvision's state dict for imagenet, else the path of a weight file."""
    if init == "imagenet":
        return imagenet_weights()
    if init != "none" and not Path(init).is_file():
        raise UserError(f"no weight file at --init {init}: give imagenet, none or a file")
    return None if init == "none" else Path(init)


# ---------------------------------------------------------------- 5 readers


class Layout(NamedTuple):
    roots: tuple  # names of the dataset's folder under --data-root
    images: str  # below the root; {split} is train or val
    labels: str
    image_suffix: tuple
    label_suffix: str
    ids: tuple  # label id of every trainId
    last_id: int  # ids run from 0 to this one; 255 is the -1 of ids kept in 8 bits. Any other value is no id


LAYOUTS = {
    "gta5": Layout(("GTA5",), "images", "labels", (".png",), ".png", CITYSCAPES_IDS, 33),
    "synthia": Layout(("SYNTHIA", "RAND_CITYSCAPES"), "RGB", "GT/LABELS", (".png",), ".png", SYNTHIA_IDS, 22),
    "synscapes": Layout(("Synscapes",), "img/rgb", "img/class", (".png",), ".png", CITYSCAPES_IDS, 33),
    "cityscapes": Layout(
        ("Cityscapes",), "leftImg8bit/{split}", "gtFine/{split}", ("_leftImg8bit.png",), "_gtFine_labelIds.png", CITYSCAPES_IDS, 33
    ),
    "folder": Layout(("",), "images", "labels", (".png", ".jpg", ".jpeg"), ".png", tuple(range(255)), 254),
}  # fmt: skip


def dataset_root(kind: str, data_root, override=None) -> Path:
    """Where a dataset lies: `override` (--source-root, --target-root) or its usual folder under --data-root."""
    names = LAYOUTS[kind].roots
    candidates = [Path(override)] if override else [Path(data_root or ".") / name for name in names]
    found = next((c for c in candidates if c.is_dir()), None)
    if found is None:
        raise UserError(f"no {kind} data at {candidates[0]}: check --data-root, or --source-root / --target-root")
    return found / "RAND_CITYSCAPES" if kind == "synthia" and (found / "RAND_CITYSCAPES").is_dir() else found


def _files(folder: Path, suffixes, kind: str) -> dict:
    """{name below the folder without suffix: path}, numbers in numeric order. Accepts a nested images/images."""
    if (folder / folder.name).is_dir():
        folder = folder / folder.name
    if not folder.is_dir():
        raise UserError(f"no folder {folder} for {kind}: check the dataset's root and that the archive is unpacked")

    def unreadable(error):
        raise UserError(f"cannot read folder {error.filename} ({error.strerror}): change its permissions")

    found, seen = {}, set()
    for parent, _, names in os.walk(folder, followlinks=True, onerror=unreadable):
        if os.path.realpath(parent) in seen:
            raise UserError(f"{parent} is {os.path.realpath(parent)} once more: remove the link")
        seen.add(os.path.realpath(parent))
        for name in names:
            suffix = next((s for s in suffixes if name.lower().endswith(s.lower())), None)
            if suffix and not name.startswith("."):
                path = Path(parent, name)
                key = Path(parent, name[: -len(suffix)]).relative_to(folder).as_posix()
                if not key.isprintable():  # names become lines of text files
                    raise UserError(f"{str(path)!a}: the name holds a line break, a control character or no UTF-8; rename it")
                if key in found:
                    raise UserError(f"{found[key]} and {path} are two files of one name: remove one")
                found[key] = path

    def natural(key):
        head, _, tail = key.rpartition("/")
        return (head, int(tail) if tail.isdigit() else -1, tail)

    if not found:
        raise UserError(f"no *{suffixes[0]} files in {folder}: check the dataset's root")
    return {key: found[key] for key in sorted(found, key=natural)}


def _split_folder(root: Path, kind: str, which: str, split: str) -> Path:
    """A plain folder has splits only if images/ holds one of train/, val/, test/."""
    folder = root / which.format(split=split)
    has_splits = kind == "folder" and any((root / "images" / name).is_dir() for name in ("train", "val", "test"))
    return folder / split if has_splits else folder


def list_images(kind: str, root, split: str = "train") -> dict:
    """{name: image path} of a dataset, in order. Knows nothing of labels: the target reader is built from this."""
    layout = LAYOUTS[kind]
    return _files(_split_folder(Path(root), kind, layout.images, split), layout.image_suffix, kind)


def list_pairs(kind: str, root, split: str = "train") -> dict:
    """{name: (image path, label path)} of a dataset; images without a label, or labels without an image, are refused."""
    layout, images = LAYOUTS[kind], list_images(kind, root, split)
    folder = _split_folder(Path(root), kind, layout.labels, split)
    labels = _files(folder, (layout.label_suffix,), kind)
    lonely = [n for n in images if n not in labels] + [n for n in labels if n not in images]
    if lonely:
        raise UserError(
            f"{len(images)} images but {len(labels)} labels ({folder}): {len(lonely)} without a partner, first"
            f" {', '.join(lonely[:3])}; complete the download or remove them"
        )
    return {name: (images[name], labels[name]) for name in images}


def open_image(path, low_bytes: bool = False, formats=("PNG", "JPEG")) -> Image.Image:
    """A decoded Pillow image; a UserError that names the file if it has none of the formats, is broken or absurdly large.

    low_bytes: of a 16-bit RGB file, whose channels Pillow cuts to the high byte, give the low byte instead.
    """
    if not os.path.isfile(path):
        raise UserError(f"no image at {path}: check the path; a folder or a broken link may be in its place")
    try:
        with warnings.catch_warnings():  # up to twice the limit of pixels Pillow would only warn
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=formats)
        if low_bytes:
            if str(image.tile[0][3]) != "RGB;16B":
                raise UserError(f"{path} is no 16-bit RGB file (mode {image.mode}): bring GT/LABELS as downloaded")
            image.tile = [(*tile[:3], "RGB;16L") for tile in image.tile]  # read big-endian pairs as little-endian ones
        image.load()
        return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{path} claims absurd dimensions (more than {Image.MAX_IMAGE_PIXELS} pixels): replace the file")
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is no {' or '.join(formats)} file, or is cut off in its first bytes: bring it again")
    except PermissionError:
        raise UserError(f"cannot read {path}: change its permissions")
    except DAMAGE as error:
        raise UserError(f"cannot read {path} ({error}): the file is damaged, bring it again")


def verify_file(path):
    """UserError if a checksum in a PNG file is wrong or its end is missing: Pillow decodes such files where it can."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            image.verify()
    except DAMAGE as error:
        raise UserError(f"{path} can be decoded, but is damaged ({error}): bring it again")


def read_image(path) -> Image.Image:
    image = open_image(path)
    if image.mode.startswith(("I", "F")):  # conversion would clip all of it to white
        raise UserError(f"{path} has mode {image.mode}, 16 or more bits of grey: bring 8-bit images")
    return image.convert("RGB")


def read_label(path, kind: str, num_classes: int) -> Image.Image:
    """A label file as an 8-bit Pillow image of trainIds 0..num_classes-1 and 255. A file most of whose pixels hold
    values that are no ids of this kind of dataset is refused."""
    if kind == "synthia":  # 16 bits a channel, class id in R (ids are below 256); torchvision reads these only from 0.21 on
        ids = np.asarray(open_image(path, low_bytes=True))[:, :, 0]
    else:
        image = open_image(path)
        if image.mode not in ("P", "L", "1"):  # for a palette file the index is the id: never convert
            bits = " (16 bits)" if image.mode.startswith("I") else ""
            raise UserError(f"{path} has mode {image.mode}{bits}, not one 8-bit id per pixel: bring label ids, not colours")
        if image.format != "PNG":
            raise UserError(f"{path} is a {image.format} file, which blurs ids: bring the label as PNG")
        ids = np.asarray(image).astype(np.uint8)
    last_id = min(LAYOUTS[kind].last_id, num_classes - 1 if kind == "folder" else IGNORE)
    foreign = Image.fromarray(ids).histogram()[last_id + 1 : IGNORE]
    if 2 * sum(foreign) > ids.size:
        value = last_id + 1 + int(np.argmax(foreign))
        hint = "or is --num-classes too low?" if kind == "folder" else f"or is it no {kind} file?"
        raise UserError(
            f"{path}: {100 * sum(foreign) / ids.size:.0f} % of its pixels are no ids 0 to {last_id} (most often {value});"
            f" is it colour-coded, or 16 bits flattened to 8, {hint}"
        )
    return Image.fromarray(trainid_table(LAYOUTS[kind].ids[:num_classes])[ids])


def resize(image: Image.Image, size: tuple, kind: str) -> Image.Image:
    """To size (W, H), aspect not kept: Pillow's antialiased bicubic for an image, nearest for a label."""
    return image.resize(size, {"image": Image.BICUBIC, "label": Image.NEAREST}[kind])


def to_tensor(image: Image.Image) -> Tensor:
    """Pillow RGB to (3,H,W), Pillow L to (H,W), both uint8."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


class Images(Dataset):
    """Images without labels. It is given image paths and nothing else, so training cannot open a target label.

    An item is {"name", "image": (3,H,W) uint8 RGB}, resized to `size` if given, else through
    transform(image, None, random generator of (seed, sample position)) if given.
    """

    def __init__(self, images: dict, size=None, transform=None, seed: int = 0):
        self.names, self.paths = list(images), list(images.values())
        self.size, self.transform, self.seed = size, transform, seed

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        position, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.open(index)
        if self.transform:
            image, label = self.transform(image, label, np.random.default_rng((self.seed, position)))
        elif self.size:
            image = resize(image, self.size, "image")
            label = label and self.resize_label(label)
        item = {"name": self.names[index], "image": to_tensor(image)}
        return item if label is None else {**item, "label": to_tensor(label)}

    def open(self, index):
        return read_image(self.paths[index]), None


class Labelled(Images):
    """Images with labels of one dataset kind; an item also has "label": (H,W) uint8 trainIds.

    native_labels=True keeps the label at its own size (evaluation), otherwise it is resized like the image. A label of
    another aspect than its image is refused, unless same_aspect=False (pseudo labels have the size the network sees).
    """

    def __init__(
        self, pairs: dict, kind: str, num_classes: int, size=None, native_labels=False, same_aspect=True, transform=None, seed=0
    ):
        super().__init__({name: image for name, (image, _) in pairs.items()}, size, transform, seed)
        self.label_paths, self.kind = [label for _, label in pairs.values()], kind
        self.num_classes, self.native_labels, self.same_aspect = num_classes, native_labels, same_aspect

    def open(self, index):
        image, path = read_image(self.paths[index]), self.label_paths[index]
        label = read_label(path, self.kind, self.num_classes)
        ratio = image.width / image.height * label.height / label.width
        if self.same_aspect and not 0.9 < ratio < 1.1:  # GTA5 has pairs of 1914x1052 and 1914x1046; more than that is another picture
            sizes = f"{label.width}x{label.height} but its image {image.width}x{image.height}"
            raise UserError(f"{path} is {sizes}: this is not its label, repair the pair")
        return image, label

    def resize_label(self, label):
        return label if self.native_labels else resize(label, self.size, "label")

    def look(self, count: int = 8):
        """Open `count` pairs spread over the set; a UserError if one is unreadable, if next to none of their pixels, under
        2 % in every one of them, is of a known class, or if the ids look like trainIds. For labels that the user brings:
        pseudo labels may be empty."""
        chosen = sorted({i * (len(self) - 1) // max(count - 1, 1) for i in range(count)})
        labels = [np.asarray(self.open(index)[1]) for index in chosen]
        known = [np.mean(label != IGNORE) for label in labels]
        if max(known) < 0.02:
            raise UserError(
                f"{self.label_paths[0]}: next to no pixel is of one of the {self.num_classes} classes, nor in other labels of"
                f" this folder; are they colour-coded, trainIds, 16 bits flattened to 8, or no {self.kind} labels?"
            )
        # Of trainIds taken for ids, road to sky vanish and sign, vegetation to car turn into what has ids up to 18.
        highest = max(label[label != IGNORE].max(initial=0) for label in labels)
        if LAYOUTS[self.kind].ids is CITYSCAPES_IDS and np.mean(known) < 0.7 and highest < CLASSES.index("traffic light"):
            raise UserError(f"{self.label_paths[0]}: no id above 18 in this and other labels, they look like trainIds: bring label ids")


# ---------------------------------------------------------------- 6 sampling


class EndlessSampler(Sampler):
    """(position, index) pairs: epoch after epoch of seeded permutations of range(length).

    The order depends on (length, seed) alone, not on workers, and can start at any iteration: resuming is exact. Of the
    world * batch positions of an iteration, every rank takes its own `batch`.
    """

    def __init__(self, length: int, seed: int, start: int, stop: int, batch: int, rank: int = 0, world: int = 1):
        """Covers the iterations start..stop-1."""
        self.length, self.seed = length, seed
        self.positions = [(i * world + rank) * batch + b for i in range(start, stop) for b in range(batch)]

    def __len__(self):
        return len(self.positions)

    def __iter__(self):
        epoch, order = -1, None
        for position in self.positions:
            if position // self.length != epoch:
                epoch = position // self.length
                order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            yield position, int(order[position % self.length])


def training_batches(dataset: Dataset, seed: int, batch: int, start: int, stop: int, workers: int, device):
    """Iterator over this rank's batches start..stop-1: {"name", "image", ("label")}, in a fixed order per seed."""
    sampler = EndlessSampler(len(dataset), seed, start, stop, batch, rank(), world())
    return iter(_loader(dataset, workers, device, batch_size=batch, sampler=sampler))


def one_by_one(dataset: Dataset, workers: int, device) -> DataLoader:
    """This rank's share of the items of a dataset (every world-th), in order, without a batch dimension."""
    return _loader(dataset, workers, device, batch_size=None, sampler=range(rank(), len(dataset), world()))


def _loader(dataset, workers, device, **options):
    ahead = {"prefetch_factor": 4} if workers else {}
    pin = device.type == "cuda"
    return DataLoader(dataset, num_workers=workers, pin_memory=pin, worker_init_fn=leave_signals, **ahead, **options)


def leave_signals(worker: int):
    """In a reading process: signals to the whole group of processes are the training process's business alone."""
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---------------------------------------------------------------- 7 evaluation


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """(C,C) int64 counts of pixels, rows = label, columns = prediction. Both inputs are integer tensors of one shape,
    predictions in 0..C-1; pixels whose label is not in 0..C-1 (255, ignore) are left out."""
    rows = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes).int()  # row C: ignore
    pairs = (rows * num_classes + predictions.int()).flatten()
    counts = torch.bincount(pairs, minlength=(num_classes + 1) * num_classes)
    return counts[: num_classes**2].view(num_classes, num_classes)


def iou(confusion: Tensor) -> Tensor:
    """(C,) float64 intersection over union in 0..1 from a (C,C) confusion matrix: diag / (row + column - diag).
    A class without a pixel in labels and predictions is NaN, which the means leave out."""
    confusion = confusion.double()
    hit = confusion.diagonal()
    return hit / (confusion.sum(0) + confusion.sum(1) - hit)


def scores(confusion: Tensor) -> dict:
    """{"miou19", "miou16", "miou13", "iou": {class: value}} in percent; with other than 19 classes "miou<C>" alone.
    None stands for undefined."""
    per_class, num_classes = iou(confusion) * 100, len(confusion)
    subsets = {num_classes: range(num_classes)}
    if num_classes == 19:
        subsets.update({16: SUBSET_16, 13: SUBSET_13})

    def value(x):
        return None if x.isnan() else x.item()

    means = {f"miou{n}": value(per_class[list(members)].nanmean()) for n, members in subsets.items()}
    return {**means, "iou": {name: value(x) for name, x in zip(class_names(num_classes), per_class)}}


class LeanBlock(nn.Module):
    """A Bottleneck for prediction on the CPU (channels_last): BatchNorm folded, result added into the input's memory."""

    def __init__(self, block: Bottleneck):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        def fold(conv, bn):  # at every call: cheap, and no second set of weights is held
            scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
            return conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale

        def convolve(conv, bn, x):
            return F.conv2d(x, *fold(conv, bn), conv.stride, conv.padding, conv.dilation)

        def pixels(x):  # (B, C, h, w) to a view (B*h*w, C)
            return x.permute(0, 2, 3, 1).view(-1, x.shape[1])

        block = self.block
        hidden = convolve(block.conv2, block.bn2, convolve(block.conv1, block.bn1, x).relu_()).relu_()
        x = convolve(*block.downsample, x) if block.downsample else x
        weight, bias = fold(block.conv3, block.bn3)
        pixels(x).addmm_(pixels(hidden), weight.flatten(1).T).add_(bias).relu_()
        return x


class LeanHead(nn.Module):
    """An AtrousHead for prediction on the CPU: output channels padded to a multiple of 16, which is 3 times as fast."""

    def __init__(self, head: AtrousHead):
        super().__init__()
        self.convs = head.conv2d_list

    def forward(self, x: Tensor) -> Tensor:
        C = len(self.convs[0].bias)
        padded = [F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, -C % 16)) for conv in self.convs]
        maps = sum(F.conv2d(x, weight, None, 1, conv.padding, conv.dilation) for weight, conv in zip(padded, self.convs))
        return maps[:, :C] + sum(conv.bias for conv in self.convs)[:, None, None]


def inference_copy(model: DeepLabV2) -> DeepLabV2:
    """The network for prediction only: eval mode, no auxiliary head; on the CPU in channels_last, leaner and faster. It
    shares its tensors with `model`, which stays as it is, its mode included."""
    model = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())}).eval()
    model.layer5 = None
    if not next(model.parameters()).is_cuda:
        for name in ("layer1", "layer2", "layer3", "layer4"):
            setattr(model, name, nn.Sequential(*map(LeanBlock, getattr(model, name))))
        model.layer6 = LeanHead(model.layer6)
    return model


def predict_maps(models: list, images: Tensor, scales=(1.0,), flip: bool = False) -> list:
    """Main-head logits of uint8 RGB (B,3,H,W): for each scale one map (B,C,h,w), the mean over the models and, with flip,
    over the image and its mirror image. `upsample_blocks` takes the list and averages over the scales.

    The images have the size of the largest scale; smaller ones are made from them by antialiased bicubic resizing.
    """
    maps = []
    for scale in scales:
        x, size = images, [round(side * scale / max(scales)) for side in images.shape[2:]]
        if scale != max(scales):
            x = F.interpolate(x.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
        x = normalize(x)
        logits = sum(model(x).main for model in models)
        if flip:  # mirrored back here: with align_corners, upsampling and mirroring commute
            logits = (logits + sum(model(x.flip(3)).main for model in models).flip(3)) / 2
        maps.append(logits / len(models))
    return maps


def predict_labels(maps, size: tuple, per_block=None) -> Tensor:
    """(H,W) uint8 argmax of one image's logits, upsampled to size (W,H) by `upsample_blocks`; per_block(block), if given,
    sees every block (1,C,rows,W) of upsampled logits."""
    parts = []
    for _, block in upsample_blocks(maps, size):
        if block.is_cuda:
            label = block[0].argmax(0).to(torch.uint8)
        else:  # a running maximum over whole planes: torch's argmax over the first dimension takes 6 times as long
            best, label = block[0, 0].clone(), torch.zeros(block.shape[2:], dtype=torch.uint8)
            for c in range(1, block.shape[1]):
                label.masked_fill_(block[0, c] > best, c)
                torch.maximum(best, block[0, c], out=best)
        parts.append(label)
        if per_block:
            per_block(block)
    return torch.cat(parts)


@torch.inference_mode()
def evaluate(models: list, dataset: Labelled, device, workers: int = 0, on_image=None, scales=(1.0,), flip=False) -> dict:
    """The one evaluation loop: `scores` of the averaged predictions of `models` over a dataset with native-size labels,
    with "confusion" (C,C) int64, "images" and "seconds".

    Eval mode, main head, logits upsampled to the label's size, argmax; scales and flip as in `predict_maps`, so the
    dataset reads at the size of the largest scale. The models stay as they are, their mode included. With several ranks
    each takes every world-th image, and all get the result. on_image(name, maps, label (H,W), prediction (H,W) uint8),
    if given, is called for every image; maps are for `upsample_blocks`.
    """
    models, start = [inference_copy(model) for model in models], time.perf_counter()
    num_classes = models[0].num_classes
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for item in one_by_one(dataset, workers, device):
        maps = predict_maps(models, item["image"][None].to(device, non_blocking=True), scales, flip)
        label = item["label"].to(device, non_blocking=True)
        prediction = predict_labels(maps, (label.shape[1], label.shape[0]))
        confusion += confusion_matrix(label, prediction, num_classes)
        if on_image:
            on_image(item["name"], maps, label, prediction)
    confusion = over_ranks(confusion)
    return {**scores(confusion), "confusion": confusion.cpu(), "images": len(dataset), "seconds": time.perf_counter() - start}


def score_table(columns: dict) -> str:
    """A text table, one column per name of {name: scores}: per-class IoU and the means, in percent; and the best mean of
    a training run, where there is one, marked as the oracle that it is."""
    first = next(iter(columns.values()))
    lines = [" " * 16 + "".join(f"{name:>14}" for name in columns)]
    for row in [*first["iou"], *(key for key in first if key.startswith("miou"))]:
        values = [s["iou"].get(row, s.get(row)) for s in columns.values()]
        lines.append(f"{row.replace('miou', 'mIoU '):16}" + "".join(f"{'-' if v is None else f'{v:.1f}':>14}" for v in values))
    if "best" in first:
        lines.append(f"{'best (oracle)':16}" + "".join(f"{s['best']:>14.1f}" for s in columns.values()))
    return "\n".join(lines)


def print_results(columns: dict):
    """The table at the end of a script, over the stages {name: scores or None} that were evaluated."""
    columns = {name: scores for name, scores in columns.items() if scores}
    if columns:
        images = next(iter(columns.values()))["images"]
        print(f"\nIoU in percent on {images} validation images, last checkpoint of each stage:\n{score_table(columns)}")


# ---------------------------------------------------------------- 8 look before you train


class Inspection(Dataset):
    """What --check notes about each item of an Images or Labelled dataset: {"error"} for one that training would stumble
    over or that is damaged, else {"size", "odd"} and of a label {"encoding", "pixels" (256 counts of trainIds)}."""

    def __init__(self, dataset: Images):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index) -> dict:
        data = self.dataset
        try:
            image, label = data.open(index)
            for path in [data.paths[index]] + ([] if label is None else [data.label_paths[index]]):
                verify_file(path)
        except UserError as error:
            return {"error": str(error)}
        except MemoryError:
            return {"error": f"{data.paths[index]} does not fit into memory"}
        note = {"size": f"{image.width}x{image.height}", "odd": ""}
        if min(image.size) < 32 or max(image.size) > 8 * min(image.size):
            note["odd"] = f"{data.paths[index]} is {note['size']}"
        if label is not None:
            head = Path(data.label_paths[index]).read_bytes()[24:26]  # bit depth and colour type in a PNG's IHDR
            note["encoding"] = f"{head[0]}-bit {({0: 'grey', 2: 'RGB', 3: 'palette'}).get(head[1], 'other')}"
            note["pixels"] = label.histogram()
            if label.size != image.size:
                note["odd"] = f"{data.label_paths[index]} is {label.width}x{label.height}, its image {note['size']}"
            elif note["pixels"][IGNORE] > 0.98 * image.width * image.height:
                note["odd"] = f"{data.label_paths[index]} has next to no pixel of a known class"
        return note


def check_data(title: str, dataset: Images, workers: int) -> tuple:
    """Open every file of a dataset and print what is in it: (number of errors, the first three of them).

    Memory does not grow with the number of files, but with that of distinct image sizes.
    """
    seen, first = {key: Counter() for key in ("size", "encoding", "odd", "error")}, {"odd": [], "error": []}
    pixels = np.zeros(256, np.int64)
    live, shown = sys.stdout.isatty(), 0.0
    loader = DataLoader(Inspection(dataset), batch_size=None, num_workers=max(1, workers), worker_init_fn=leave_signals)
    for i, note in enumerate(loader):
        for key in ("size", "encoding"):
            seen[key].update([note[key]] if key in note else [])
        for key in first:
            if note.get(key):
                seen[key]["all"] += 1
                first[key] += [note[key]] if len(first[key]) < 3 else []
        pixels += np.array(note.get("pixels", 0))
        if live and time.perf_counter() - shown > 0.2:
            shown = time.perf_counter()
            print(f"\r\033[K{title} {i + 1}/{len(dataset)}", end="", flush=True)

    def counts(counter):
        some = ", ".join(f"{key} ({n})" for key, n in counter.most_common(5))
        return some + (f" and {len(counter) - 5} others" if len(counter) > 5 else "")

    print("\r\033[K" * live + f"{title}: {len(dataset)} {'pairs' if isinstance(dataset, Labelled) else 'images'}")
    print(f"  image sizes   {counts(seen['size'])}")
    if pixels.any():
        share = 100 * pixels / pixels.sum()
        shares = [f"{name} {x:.1f}" for name, x in zip(class_names(dataset.num_classes), share)]
        print(f"  labels        {counts(seen['encoding'])}\n  % of pixels   {', '.join(shares)}; ignored {share[IGNORE]:.1f}")
    for key, name in (("odd", "odd"), ("error", "unusable")):
        if first[key]:
            print(f"  {name:14}{seen[key]['all']}: {'; '.join(first[key])}{'; ...' * (seen[key]['all'] > 3)}")
    return seen["error"]["all"], first["error"]


def training_bytes(parts: list, model: DeepLabV2, keep: int) -> int:
    """Most that one training writes: last.pth, a temporary copy of it, `keep` older ones, and best.pth with the model alone.

    parts: [(module in last.pth, numbers kept per weight: with SGD's momentum 2, with Adam's moments 3)].
    """

    def size(module):
        return sum(tensor.nbytes for tensor in module.state_dict().values())

    return (2 + keep) * sum(size(module) * numbers for module, numbers in parts) + size(model)


def check(args, datasets: dict, model: DeepLabV2, files: float):
    """--check: report on the datasets {title: dataset or None}, on loading --init into the model, and on the disk, where
    the run will write at most `files` bytes. Returns if all is well, else raises a UserError with the first problem."""
    problems, more = [], 0

    def attempt(call):
        try:
            call()
        except UserError as error:
            problems.append(str(error))

    for title, dataset in datasets.items():
        if dataset:
            errors, first = check_data(title, dataset, args.workers)
            problems, more = problems + first, more + errors - len(first)
            if isinstance(dataset, Labelled) and dataset.same_aspect and not errors:
                attempt(dataset.look)
    if args.init not in ("none", "imagenet"):
        attempt(lambda: print(f"--init {args.init}: {load_weights(model, initial_weights(args.init))}"))
    folder, present = nearest_folder(args.out), sum({s.st_ino: s.st_size for s in (path.stat() for path in args.out.rglob("*") if path.is_file())}.values())
    free = shutil.disk_usage(folder).free
    print(f"disk: the run writes up to {files / 1e9:.2f} GB, {present / 1e9:.2f} are there; {folder} has {free / 1e9:.2f} free")
    if files - present > free:
        problems.append(f"--out {args.out} lacks {(files - present - free) / 1e9:.2f} GB: free the disk or choose another folder")
    if problems:
        found = len(problems) + more
        raise UserError(f"--check found {found} problem{'s' * (found > 1)}, the first: {problems[0]}")
    print("all is well")


# ---------------------------------------------------------------- 9 runs: device, checkpoints, log

FORMAT = "intrada-bcl 1"  # header of our checkpoints


def rank() -> int:
    """Number of this process among those that torchrun started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def over_ranks(tensor: Tensor, operation: str = "SUM") -> Tensor:
    """The tensor, replaced in place by its SUM, MIN or MAX over the ranks; as it is without torchrun."""
    if world() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def merge_ranks(own: dict) -> dict:
    """The dicts of all ranks in one."""
    parts = [own] * world()
    if world() > 1:
        dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def wait_for_ranks():
    if world() > 1:
        dist.barrier()


def share_gradients(*modules: nn.Module):
    """Average the gradients and BatchNorm's running statistics over the ranks, so that all go on with the same networks."""
    if world() == 1:
        return
    parameters = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    tensors = parameters + [b for module in modules for b in module.buffers() if b.is_floating_point()]
    flat = over_ranks(torch.cat([t.reshape(-1) for t in tensors])) / world()  # one message instead of hundreds
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


def set_up(name) -> torch.device:
    """The device of this process: --device, or CUDA where there is one, else the CPU. Joins the other processes if
    torchrun started this one; of these, only rank 0 prints."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to torch; use --device cpu or repair the driver")
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True  # TF32 in convolutions alone
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            local, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= visible:
                raise UserError(f"torchrun started process {local + 1} on a machine with {visible} GPUs: lower --nproc_per_node")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def save_checkpoint(path, model: DeepLabV2, **state):
    """The one place where a checkpoint is made: header, network (architecture readable off the tensors), the rest."""
    content = {"format": FORMAT, "model": model.state_dict(), **state}
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's writer turns a full disk into a RuntimeError
        reason = "the disk may be full" if "enforce fail" in str(error) else str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}): free the disk or choose another --out")


class StopSignal:
    """While open, SIGTERM and SIGINT set `number`, so that a loop can save before it leaves; a second one ends at once."""

    def __init__(self):
        self.number, self.since = 0, 0.0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        if self.number and (world() == 1 or time.monotonic() - self.since > 3):  # torchrun repeats a Ctrl-C to its processes
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()
            os.write(2, b"\nstopping: one more iteration, then a save; --resume goes on from there\n")  # print may be at work

    def agree(self) -> int:
        """The signal that came, to this or another rank; 0 for none."""
        if world() > 1:
            known, self.number = self.number, int(over_ranks(torch.tensor(self.number), "MAX"))
            self.since = self.since if known else time.monotonic()
        return self.number

    def leave(self):
        """Exit with 143 or 130 if a signal came."""
        if self.number:
            sys.exit(128 + self.number)

    @contextlib.contextmanager
    def at_once(self):
        """Inside, where everything worth saving is saved, a signal ends the process without delay."""
        self.close()
        self.leave()
        yield
        for number in self.before:
            signal.signal(number, self.note)

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class RunLog:
    """JSON lines in a file, one record a line, flushed; and a line on the terminal, live where it is a terminal."""

    def __init__(self, path, header: dict, keep, tensorboard=None, start: int = 0):
        """Starts the file with `header`, or, when resuming after iteration `start`, with the records of the old file that
        are to be kept. The numbers also become TensorBoard events in the folder `tensorboard`, if given."""
        self.path, self.live, self.file, self.events = Path(path), sys.stdout.isatty(), None, None
        if rank():
            return
        kept = []
        if self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    if keep(json.loads(line)):
                        kept.append(line)
        if not kept or '"event": "start"' not in kept[0]:
            kept.insert(0, json.dumps({**versions(), **header}, default=str))
        write_text(path, "".join(line + "\n" for line in kept))
        with writing(self.path):
            self.file = open(path, "a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(tensorboard), purge_step=start + 1)

    def write(self, **record):
        if self.file:
            with writing(self.path):
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
        for key, value in record.items() if self.events else ():
            if isinstance(value, (int, float)) and key != "iter":
                self.events.add_scalar(f"{record['event']}/{key}" if "event" in record else key, value, record["iter"])

    def show(self, text: str, last: bool = False):
        print(f"\r\033[K{text}" if self.live else text, end="\n" if last or not self.live else "", flush=True)

    def close(self):
        for file in filter(None, (self.file, self.events)):
            file.close()


def versions() -> dict:
    git = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty"]
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10).stdout.strip() or None
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "git": git}


def start_over(folders: list):
    """--overwrite: remove what earlier trainings left in these folders, all at once and before the first of the new ones."""
    if rank() == 0:
        for folder in folders:
            for name in ("last.pth", "best.pth", "iter*.pth", "pictures", "curves.png", "tensorboard", "round*"):
                for path in folder.glob(name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    wait_for_ranks()


def resume_state(folder, config: dict, iters: int, resume: bool):
    """The checkpoint to go on from, or None for a fresh start; refuses to mix or overwrite runs silently."""
    last = Path(folder) / "last.pth"
    if not last.exists():
        return None
    state = read_checkpoint(last)
    kinds = {"config": dict, "iter": int, "best": (int, float), "model": dict}
    if state.get("format") != FORMAT or "scores" not in state or not all(isinstance(state.get(k), t) for k, t in kinds.items()):
        raise UserError(f"{last} is not a training checkpoint of this project: use another --out, or --overwrite")
    changed = [key for key in config if state["config"].get(key) != config[key]]
    if changed:
        raise UserError(
            f"{last} is of a run with other settings ({', '.join(changed[:4])}):"
            " use another --out, or --overwrite to start over"
        )
    if state["iter"] < iters and not resume:
        raise UserError(
            f"{last} stopped at iteration {state['iter']} of {iters}: add --resume to go on, or --overwrite to start over"
        )
    return state


FIRST = 3  # iterations of a run that are left out of its speed


class Run:
    """What surrounds a training loop and is no method: resuming, log, evaluation, checkpoints, signals.

    In `folder`: log.jsonl, last.pth (all that --resume needs), best.pth (chosen on validation labels: an oracle), with
    --keep iter<number>.pth, and pictures: curves.png and, of every evaluation, pictures/<iteration>.png. `config` tells
    runs apart, `parts` are the objects besides the network that have a state_dict to keep, `entropy` is what the pictures
    show of certainty (see `predict_with`), draw(path, done) makes one more picture. Afterwards `start` is the iteration to
    begin with, `finished` says that there is none left, `result` holds the last scores.
    """

    def __init__(
        self, args, name: str, folder, config: dict, iters: int, model, parts: dict, validation, about: str, entropy, draw=None
    ):
        self.args, self.name, self.folder, self.config, self.iters = args, name, Path(folder), config, iters
        self.model, self.parts, self.validation, self.entropy, self.draw = model, parts, validation, entropy, draw
        state = resume_state(folder, config, iters, args.resume)
        progress = state or {"iter": 0, "best": -1.0, "scores": None}
        self.start, self.best, self.result = progress["iter"], progress["best"], progress["scores"]
        self.flops, self.panel = progress.get("flops"), progress.get("panel")  # panel: validation images in the pictures
        pending = progress.get("pending")  # saved, but not yet evaluated
        self.finished = self.start >= iters and not pending
        if self.finished:
            return print(f"{name}: already trained, {self.folder / 'last.pth'}")
        self.saved = self.start
        if state:
            try:
                model.load_state_dict(state["model"])
                for key, part in parts.items():
                    part.load_state_dict(state[key])
                    for p, kept in part.state.items() if isinstance(part, torch.optim.Optimizer) else ():
                        if any(isinstance(v, Tensor) and v.dim() and v.shape != p.shape for v in kept.values()):
                            raise ValueError(f"{key} is of other shapes")
            except (RuntimeError, KeyError, ValueError, TypeError) as error:
                raise UserError(f"{self.folder / 'last.pth'} does not fit this run ({str(error).splitlines()[0]}): --overwrite starts over")
        header = {"event": "start", "stage": name, "about": about, "args": vars(args)}

        def keep(record):
            evaluation = record.get("event") == "evaluation"
            return state and record.get("iter", 0) <= self.start - (pending and evaluation)

        self.log = RunLog(self.folder / "log.jsonl", header, keep, self.folder / "tensorboard" if args.tensorboard else None, self.start)
        self.signal = StopSignal()
        print(f"{name}: {about}" + (f"; goes on from iteration {self.start}" if self.start else ""))
        self.since_check, self.counter, self.spent = [], None, [0, 0.0, 0.0]  # spent: iterations, seconds, of these on data
        reset_peak_memory()
        if pending:
            self.evaluate(self.start)
        self.finished = self.start >= iters
        if self.finished:
            self.close()
        self.restart_clock(self.start)

    def restart_clock(self, done: int):
        self.last, self.clock, self.waited = done, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting_for_data(self):
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start
        # The first iteration of a run counts its operations, until after_iteration; torch 2.4 cannot while it compiles.
        if self.flops is None and not (self.args.compile and torch.__version__ < "2.6"):
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()

    def after_iteration(self, done: int, terms: list, names: list, lr: float, keep: bool = False, **more):
        """Log, save and evaluate after iteration `done`, where it is time for it; leave if a signal asked for that.

        terms: {name: scalar tensor, or None for a term that this run does not have} of every batch of the iteration,
        names: its images, keep: save in any case, more: further entries of the log record. The only place that waits
        for the GPU.
        """
        args = self.args
        if self.counter:
            self.counter.__exit__(None, None, None)
            self.flops, self.counter = self.counter.get_total_flops(), None
            self.log.write(iter=done, event="flops", flops_per_iteration=self.flops)
        active = [term for term, value in terms[0].items() if value is not None]
        values = torch.stack([torch.stack([batch[term].detach().float() for term in active]) for batch in terms]).mean(0)
        self.since_check.append((done, names, values))
        stopping = self.signal.agree()  # once: a signal from here on waits for the next iteration
        evaluating = self.validation and (done == self.iters or (args.eval_every and done % args.eval_every == 0))
        saving = evaluating or keep or done == self.iters or done % args.save_every == 0 or stopping
        logging = evaluating or done == self.iters or done % args.log_every == 0
        if saving or logging:
            values = over_ranks(self.check_numbers(active)) / world()
        pause = time.perf_counter()
        if logging:
            seconds = pause - self.clock
            rate = (done - self.last) / seconds
            speed = {"seconds": seconds, "data_seconds": self.waited, "it_per_s": rate, "tflops": self.flops and rate * self.flops / 1e12}
            losses = {**dict.fromkeys(terms[0]), **dict(zip(active, values.tolist()))}
            self.log.write(iter=done, **losses, lr=lr, **more, **speed, peak_memory_mb=peak_memory_mb(args.device))
            text = "  ".join(f"{term.removeprefix('loss_')} {losses[term]:.3f}" for term in active)
            left = (self.iters - done) / rate / 60
            if self.last >= self.start + FIRST:
                self.spent = [a + b for a, b in zip(self.spent, (done - self.last, seconds, self.waited))]
            self.log.show(f"{self.name} {done}/{self.iters}  {text}  {rate:.2f} it/s  {left:.1f} min left", done == self.iters)
        if saving:
            self.save(done, pending=bool(evaluating))
        if stopping:
            wait_for_ranks()  # for the save: torchrun ends all processes when the first one leaves
            self.signal.leave()
        if evaluating:
            self.evaluate(done)
        self.clock += time.perf_counter() - pause  # neither logging, saving nor evaluating counts as training time
        if logging or done == self.start + FIRST:  # nor do the first iterations, which set up memory and choose kernels
            self.restart_clock(done)
        if done == self.start + FIRST:
            reset_peak_memory()
        if done == self.iters:
            count, seconds, waited = self.spent
            if count:
                rate, share = count / seconds, 100 * waited / seconds
                text = f"{rate:.2f} it/s, {rate * (self.flops or 0) / 1e12:.3f} TFLOP/s, {share:.1f} % of the time waiting for data"
                self.log.show(f"{self.name}: {text}, peak memory {peak_memory_mb(args.device):.0f} MB", True)
            self.close()

    def check_numbers(self, active: list) -> Tensor:
        """The last iteration's losses; a UserError that names iteration, term and images if one since the last check, or
        a weight, is not finite."""
        values = torch.stack([values for _, _, values in self.since_check]).double().cpu()  # (iterations, terms)
        bad = ~values.isfinite()
        first = next((i for i, row in enumerate(bad.any(1).tolist()) if row), len(values))
        everywhere = int(over_ranks(torch.tensor(first), "MIN"))  # gradients are shared: one rank's NaN is soon everybody's
        if first == everywhere < len(values):
            (done, names, _), term = self.since_check[first], active[bad[first].int().argmax()]
            what = f"{term} is {values[first][active.index(term)]:g} at iteration {done}"
            raise UserError(f"{what} (images {', '.join(names)}): lower --lr or look at these images; nothing was saved")
        if everywhere < len(values):
            sys.exit(2)  # the other rank says why
        modules = [self.model, *(part for part in self.parts.values() if isinstance(part, nn.Module))]
        if not torch.stack([t.isfinite().all() for module in modules for t in module.state_dict().values()]).all():
            done, names, _ = self.since_check[-1]
            raise UserError(f"a weight is not finite at iteration {done} (images {', '.join(names)}): lower --lr; nothing was saved")
        self.since_check = []
        return values[-1]

    def save(self, done: int, pending: bool):
        """last.pth. No random states: order and augmentation depend on the seed and the sampler's position alone, and that
        follows from the iteration."""
        if rank():
            return
        last, args = self.folder / "last.pth", self.args
        states = {key: part.state_dict() for key, part in self.parts.items()}
        progress = {"iter": done, "best": self.best, "scores": self.result, "config": self.config}
        progress.update(flops=self.flops, panel=self.panel, input_size=args.target_size)
        if args.keep and 0 < self.saved < done:
            link(last, self.folder / f"iter{self.saved:07d}.pth")  # saving replaces last.pth and leaves this file as it is
            for old in sorted(self.folder.glob("iter*.pth"))[: -args.keep]:
                old.unlink()
        save_checkpoint(last, self.model, **states, **progress, pending=pending)
        self.saved = done

    def evaluate(self, done: int):
        device, entropies = next(self.model.parameters()).device, {}

        def note(name, maps, label, prediction):
            entropies[name] = self.entropy(maps[0]).sum(1).mean().item()

        with self.signal.at_once():
            outcome = evaluate([self.model], self.validation, device, self.args.workers, None if self.panel else note)
            if not self.panel:  # from now on the same images, from the easiest to the hardest of this first evaluation
                entropies = merge_ranks(entropies)
                order = sorted(entropies, key=lambda name: (entropies[name], name))
                self.panel = list(dict.fromkeys(order[round(share * (len(order) - 1))] for share in (0, 1 / 3, 2 / 3, 1)))
            mean = outcome[f"miou{self.model.num_classes}"] or 0.0
            improved, self.best = mean > self.best, max(mean, self.best)
            self.result = {**{key: value for key, value in outcome.items() if key != "confusion"}, "best": self.best}
            self.log.write(iter=done, event="evaluation", **self.result)
            self.log.show(f"{self.name} {done}/{self.iters}  mIoU {mean:.1f} on {outcome['images']} validation images", True)
            if rank() == 0:
                picture = self.folder / "pictures" / f"{done:07d}.png"
                write_panel(picture, [("prediction", self.model)], self.validation, self.panel, device, self.entropy)
                write_curves(self.folder / "curves.png", self.log.path)
                if self.draw:
                    self.draw(picture.with_stem(f"{done:07d}_labels"), done)
                if improved:
                    content = {"iter": done, "scores": self.result, "input_size": self.args.target_size, "oracle": True}
                    save_checkpoint(self.folder / "best.pth", self.model, **content)
        self.save(done, pending=False)

    def close(self):
        self.log.close()
        if rank() == 0 and not self.validation:
            write_curves(self.folder / "curves.png", self.log.path)
        self.signal.close()
        self.signal.leave()
        wait_for_ranks()  # until last.pth is there for all


def reset_peak_memory():
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb(device) -> float:
    """Most memory used, in MiB: torch's on the GPU since the last reset, on the CPU all of this process's so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def validation_set(kind: str, root, num_classes: int, size):
    """The target's val split with native labels for `evaluate`; None for a plain folder without a labelled val/."""
    if kind == "folder" and not all((Path(root) / which / "val").is_dir() for which in ("images", "labels")):
        return None
    return Labelled(list_pairs(kind, root, "val"), kind, num_classes, size, native_labels=True)


# ---------------------------------------------------------------- 10 pictures

GREY, LIGHT = (90, 90, 90), (225, 225, 225)
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 170, 190), (140, 86, 75), (227, 119, 194))


def font(size: int = 13):
    return ImageFont.load_default(size)


def legend(entries: list, width: int) -> np.ndarray:
    """Coloured boxes with names, [(name, RGB)], in as many rows as `width` needs: (H, width, 3) uint8."""
    places, x, y = [], 6, 4
    for name, _ in entries:
        needed = round(font().getlength(name)) + 32
        x, y = (6, y + 20) if x > 6 and x + needed > width else (x, y)
        places.append((x, y))
        x += needed
    sheet = Image.new("RGB", (width, y + 20), "white")
    pen = ImageDraw.Draw(sheet)
    for (name, rgb), (x, y) in zip(entries, places):
        pen.rectangle((x, y, x + 12, y + 12), tuple(map(int, rgb)), GREY)
        pen.text((x + 17, y + 6), name, "black", font(), anchor="lm")
    return np.asarray(sheet)


def class_legend(num_classes: int, width: int) -> np.ndarray:
    return legend([*zip(class_names(num_classes), palette_for(num_classes)), ("no label", (0, 0, 0))], width)


def stack(pictures: list) -> np.ndarray:
    """Pictures (H,W,3) uint8 below each other, white where one is narrower."""
    width = max(p.shape[1] for p in pictures)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures])


def write_grid(path, titles: list, rows: list, num_classes: int, height: int = 128):
    """A PNG of rows of pictures, all `height` pixels high, with a title over each column and the classes' colours below.
    A picture is an image (H,W,3) uint8 or a label (H,W) uint8 of trainIds, which is coloured."""

    def fit(picture):
        size = max(1, round(height * picture.shape[1] / picture.shape[0])), height
        if picture.ndim == 3:
            return resize(Image.fromarray(picture), size, "image")
        return Image.fromarray(colour(np.asarray(resize(Image.fromarray(picture), size, "label")), num_classes))

    pictures, gap, head = [[fit(picture) for picture in row] for row in rows], 4, 22
    columns = [[round(font().getlength(title)) + 8, *(p.width for p in column)] for title, column in zip(titles, zip(*pictures))]
    widths = [max(column) + gap for column in columns]
    sheet = Image.new("RGB", (sum(widths) - gap, head + len(rows) * (height + gap)), "white")
    for c, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((sum(widths[:c]) + 4, head // 2), title, "black", font(), anchor="lm")
        for r, row in enumerate(pictures):
            sheet.paste(row[c], (sum(widths[:c]), head + r * (height + gap)))
    write_png(path, stack([np.asarray(sheet), class_legend(num_classes, sheet.width)]))


def grey(map: Tensor) -> np.ndarray:
    """(H,W) values in 0..1 to uint8 0..255."""
    return map.clamp(0, 1).mul(255).round().byte().cpu().numpy()


def predict_with(maps, size: tuple, entropy) -> tuple:
    """(prediction (H,W) uint8, normalised entropy (H,W) float in 0..1) of one image's logits at size (W,H).
    entropy: logits (1,C,h,w) to maps (1,C,h,w) whose sum over C is the entropy, `intrada.self_information`."""
    rows = []
    prediction = predict_labels(maps, size, lambda block: rows.append(entropy(block)[0].sum(0)))
    return prediction, torch.cat(rows)


def entropy_map(maps, size: tuple, entropy) -> Tensor:
    """The entropy (H,W) of `predict_with` alone."""
    return torch.cat([entropy(block)[0].sum(0) for _, block in upsample_blocks(maps, size)])


@torch.inference_mode()
def write_panel(path, models: list, dataset: Labelled, names: list, device, entropy=None, truth="ground truth", **options):
    """One PNG with a row for each named image of the dataset: image, ground truth, the prediction of each (title, model) on
    its own and, if `entropy` is given (as in `predict_with`), the entropy of the last. The models stay as they are; options
    are those of `predict_maps`."""
    copies, rows = [inference_copy(model) for _, model in models], []
    for index in map(dataset.names.index, names):
        image, label = dataset.open(index)
        inputs = dataset[index]["image"][None].to(device)
        maps = [predict_maps([model], inputs, **options) for model in copies]
        row = [np.asarray(image), np.asarray(label), *(predict_labels(m, label.size).cpu().numpy() for m in maps)]
        rows.append(row + ([np.repeat(grey(entropy_map(maps[-1], label.size, entropy))[..., None], 3, 2)] if entropy else []))
    titles = ["image", truth, *(title for title, _ in models), *(["entropy (black 0, white 1)"] if entropy else [])]
    write_grid(path, titles, rows, copies[0].num_classes)


class Series(NamedTuple):
    """What `chart` draws. kind "line" or "bar" (from 0, `width` wide): x, y are numbers; "dot" and "cross": points of
    `width` pixels; "hbar": values y from the left at rows x, with whiskers of length `error` to both sides."""

    name: str  # in the legend; empty: left out of it
    kind: str
    x: list
    y: list
    rgb: tuple
    width: float = 2
    error: list = ()


def chart(title: str, x_name: str, y_name: str, series: list, size=(900, 360), log=False, rows=(), ticks=True) -> np.ndarray:
    """A plot as (H,W,3) uint8: box, grid, ticks, names, legend below. log: of the y axis; values that are not positive are
    left out. rows: texts along the y axis in place of numbers, the first at the top. ticks=False: an axis without units."""
    def nice(low, high):  # 4 to 8 round numbers, or for a logarithmic axis powers of ten times 1, 2, 5
        if high - low <= 0:
            return [low]
        step = next(s for e in range(-9, 12) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if (high - low) / s <= 7)
        return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

    swap, pairs = any(s.kind == "hbar" for s in series), [p for s in series for p in zip(s.x, s.y) if not log or p[1] > 0]
    errors = [e for s in series for e in s.error] or [0]
    xs, ys = (np.array([p[i] for p in pairs] or [0.1, 1.0], float) for i in (0, 1))
    (x0, x1), (y0, y1) = (xs.min(), xs.max()), (ys.min(), ys.max())
    if swap:
        x0, x1, y0, y1 = 0, 1.12 * (y1 + max(errors)), len(rows) - 0.5, -0.5
    elif log:
        y0, y1 = y0 / 1.2, y1 * 1.2
    else:
        bars = [s.width / 2 for s in series if s.kind == "bar"]
        x0, x1 = (x0 - max(bars), x1 + max(bars)) if bars else (x0 - 0.02 * (x1 - x0 or 1), x1 + 0.02 * (x1 - x0 or 1))
        y0, y1 = 0 if bars else y0 - 0.06 * (y1 - y0 or 1), y1 + 0.06 * (y1 - y0 or 1)
    decades = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)] if log else []
    y_ticks = list(range(len(rows))) if rows else [v for v in decades if y0 <= v <= y1] if log else nice(y0, y1) if ticks else []
    x_ticks = nice(x0, x1) if ticks else []
    y_texts = list(rows) or [f"{v:.6g}" for v in y_ticks]
    left = 14 + 20 * bool(y_name) + max([round(font().getlength(text)) for text in y_texts] or [0])
    size = (round(max(size[0], left + 500, font(15).getlength(title) + 16)), size[1])  # nothing is cut: wider where texts need it
    right, top, bottom = size[0] - 24, 34, size[1] - (52 if ticks else 32)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)

    def at(x, y):
        f = math.log if log else float
        return left + (right - left) * (x - x0) / (x1 - x0 or 1), bottom - (bottom - top) * (f(y) - f(y0)) / (f(y1) - f(y0) or 1)

    for v in x_ticks:
        pen.line((at(v, y0), at(v, y1)), LIGHT)
        pen.text((at(v, y0)[0], bottom + 5), f"{v:.6g}", "black", font(), anchor="mt")
    for v, text in zip(y_ticks, y_texts):
        pen.line((at(x0, v), at(x1, v)), LIGHT)
        pen.text((left - 6, at(x0, v)[1]), text, "black", font(), anchor="rm")
    for s in series:
        points = [at(x, y) for x, y in zip(s.x, s.y) if not log or y > 0] if s.kind != "hbar" else []
        if s.kind == "line":
            pen.line(points, s.rgb, round(s.width), joint="curve")
        for x, y in points if s.kind == "dot" else ():
            pen.ellipse((x - s.width, y - s.width, x + s.width, y + s.width), s.rgb, "black" if s.width > 5 else None)
        for x, y in points if s.kind == "cross" else ():
            for slope in (-1, 1):
                for rgb, wide in ((("black", 6), (s.rgb, 3)) if s.width > 5 else ((s.rgb, 1),)):
                    pen.line((x - s.width, y - slope * s.width, x + s.width, y + slope * s.width), rgb, wide)
        for x, y in zip(s.x, s.y) if s.kind == "bar" else ():
            pen.rectangle((at(x - s.width / 2, y), (at(x + s.width / 2, y)[0] - 1, bottom)), s.rgb)
        for row, value, error in zip(s.x, s.y, s.error) if s.kind == "hbar" else ():
            (x, y), half = at(value, row), s.width / 2 * (bottom - top) / len(rows)
            pen.rectangle((left, y - half, x, y + half), s.rgb)
            low, high = at(value - error, row)[0], at(value + error, row)[0]
            pen.line((low, y, high, y), "black", 2)
            for end in (low, high):
                pen.line((end, y - 4, end, y + 4), "black", 2)
            pen.text((high + 6, y), f"{value:.1f}", "black", font(), anchor="lm")
    pen.rectangle((left, top, right, bottom), None, GREY)
    pen.text((min(left, size[0] - font(15).getlength(title) - 8), 17), title, "black", font(15), anchor="lm")
    pen.text(((left + right) / 2, size[1] - 14), x_name, "black", font(), anchor="mm")
    if y_name:
        text = Image.new("L", (round(font().getlength(y_name)) + 4, 18))
        ImageDraw.Draw(text).text((2, 9), y_name, 255, font(), anchor="lm")
        text = text.rotate(90, expand=True)
        sheet.paste("black", (4, (top + bottom - text.height) // 2), text)
    named = [(s.name, s.rgb) for s in series if s.name]
    return stack([np.asarray(sheet), legend(named, size[0])]) if named else np.asarray(sheet)


def read_log(path) -> tuple:
    """(header, iteration records, evaluations) of a run's log.jsonl; a UserError if it is none."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        if lines and lines[0].get("event") == "start" and "args" in lines[0]:
            return lines[0], [r for r in lines if "event" not in r], [r for r in lines if r.get("event") == "evaluation"]
    except FileNotFoundError:
        raise UserError(f"no log at {path}: check the path")
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(f"{path} is not a log.jsonl of a training run: name one that intrada.py or bcl.py wrote")


def write_curves(path, log_path):
    """One PNG of a run from its log.jsonl: loss terms over iterations, smoothed, and mIoU with the best so far (oracle)."""
    header, records, evaluations = read_log(log_path)
    window, losses = max(1, len(records) // 20), []
    for name in dict.fromkeys(key for r in records for key in r if key.startswith("loss")):
        x, y = np.array([(r["iter"], r[name]) for r in records if r.get(name) is not None] or np.zeros((0, 2)), float).T
        kernel = np.ones(window)
        y = np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same") if len(y) >= window else y
        if (y > 0).any():
            losses.append(Series(name.removeprefix("loss_"), "line", x, y, COLOURS[len(losses) % len(COLOURS)]))
    note = f", mean of {window} records" if window > 1 else ""
    pictures = [chart(f"{header['stage']}: loss terms{note}", "iteration", "loss (logarithmic)", losses, log=True)]
    if evaluations:
        key, x = next(k for k in evaluations[0] if k.startswith("miou")), [r["iter"] for r in evaluations]
        best = np.maximum.accumulate([r[key] or 0 for r in evaluations])
        lines = [Series("best so far (oracle)", "line", x, best, (170, 170, 170), 2)]
        y = [r[key] or 0 for r in evaluations]
        lines += [Series("", "line", x, y, COLOURS[0], 3), Series(key.replace("miou", "mIoU "), "dot", x, y, COLOURS[0], 3)]
        last = evaluations[-1][key] or 0
        title = f"{header['stage']}: mIoU on {evaluations[-1]['images']} validation images, last {last:.1f}, best {best[-1]:.1f}"
        pictures.append(chart(title, "iteration", "percent", lines))
    write_png(path, stack(pictures))


def write_histogram(path, groups: dict, title: str, x_name: str, bins: int = 30):
    """One PNG: how many of each group's values {name: values} lie in each of `bins` intervals, stacked."""
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v, float) for v in groups.values()]), bins)
    total, series, middle, width = 0, [], (edges[1:] + edges[:-1]) / 2, 0.92 * (edges[1] - edges[0])
    for (name, values), rgb in zip(groups.items(), COLOURS):
        total = total + np.histogram(values, edges)[0]
        series.insert(0, Series(f"{name} ({len(values)})", "bar", middle, total, rgb, width))  # the highest is drawn first
    write_png(path, chart(title, x_name, "images", series))


# ---------------------------------------------------------------- 11 built-in street scenes


def demo_scenes(source: str) -> Path:
    """The folder of built-in scenes with this source domain; drawn on first use (some 10 s)."""
    root = Path("data/scenes" if source == "gta5" else f"data/scenes-{source}")
    if not root.exists() and rank() == 0:
        print(f"drawing the built-in street scenes into {root} ...", flush=True)
        try:
            with writing(root):
                write_scenes(root, synthia=source == "synthia", synscapes=source == "synscapes")
        finally:  # also of a full disk or Ctrl-C
            shutil.rmtree(root.with_name(f"{root.name}.{os.getpid()}.partial"), ignore_errors=True)
    wait_for_ranks()
    return root


# fmt: off (tables of polygons read best as tables)
# Both domains draw the same geometry; they differ only in GAP, HARD and PAINT. Lengths are fractions of the width,
# opacities and amplitudes fractions of 1.
VARIETY = dict(surface=0.15, light=0.20, tint=0.06)  # spread between the images of either domain; more: a smaller gap
GAP = dict(palette=0.3,  # 0: the source column of PAINT, 1: the target column; what BatchNorm cannot undo
           desaturate=0.25, contrast=0.87, cast=(1.03, 1.0, 0.88),  # grey share; gain about mid-grey; gain of R, G, B
           texture=0.7, blur=0.0015, noise=0.02, source_noise=0.006)  # texture: relative to source
HARD = dict(share=0.4, kinds=("fog", "night", "rain"),  # share of the target images; one kind each
            fog=0.40, night=0.60, rain=0.40, streaks=90, reflection=0.4,  # night: light that is left
            # In every hard image, local or directional, so that BatchNorm cannot undo it (plurals are counts):
            motion=0.008, shadow=0.4, shadows=2, glare=0.6, glares=1, dirt=0.4, dirts=3, drop=0.8, drops=5,
            noise=0.01)  # added to GAP's
PAINT = dict(  # (source RGB, target RGB)
    road=((84, 80, 92), (112, 112, 110)), line=((250, 250, 250), (190, 190, 182)),
    sidewalk=((196, 160, 150), (140, 139, 136)), tile=((160, 122, 114), (116, 116, 114)),
    terrain=((150, 190, 60), (124, 122, 84)), sky=((96, 164, 240), (206, 208, 208)),
    leaf=((52, 132, 40), (78, 94, 62)), trunk=((96, 64, 36), (84, 76, 66)),
    brick=((188, 100, 72), (144, 130, 122)), mortar=((226, 206, 190), (108, 102, 98)),
    fence=((150, 100, 50), (92, 94, 96)), metal=((128, 132, 146), (104, 108, 106)),
    glass=((50, 70, 100), (62, 68, 72)), dark=((22, 22, 26), (40, 40, 40)), skin=((232, 180, 140), (170, 136, 116)),
    white=((250, 250, 250), (214, 214, 208)), red=((230, 20, 20), (170, 50, 46)), blue=((20, 60, 220), (56, 76, 130)),
    yellow=((250, 210, 0), (190, 168, 70)), green=((20, 220, 90), (60, 170, 110)), lamp=((255, 246, 214),) * 2)


def rect(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def disc(x, y, rx, ry, hole=0.0):
    """Ellipse as a polygon; hole: the part of the radius that is left out (a tyre)."""
    angle = np.linspace(0, 2 * np.pi, 21)
    rim = np.stack([np.cos(angle) * rx, np.sin(angle) * ry], 1)
    return (np.concatenate([rim, rim[::-1] * hole]) if hole else rim) + (x, y)


def stroke(x0, y0, x1, y1, width):
    side = np.array([y0 - y1, x1 - x0]) / np.hypot(x1 - x0, y1 - y0) * width / 2
    return [(x0, y0) + side, (x1, y1) + side, (x1, y1) - side, (x0, y0) - side]


def bars(colour, xs, width, y0, y1):
    return [(None, colour, rect(x, y0, x + width, y1)) for x in xs]


def wheels(train_id, xs, y, rx, ry):
    tyres = [(train_id, "dark", disc(x, y, rx, ry)) for x in xs]
    return tyres + [(None, "metal", disc(x, y, rx / 2, ry / 2)) for x in xs]


# A sprite is a list of (trainId, or None to leave the label; colour, or None to leave the image; polygon), painted in
# this order, in a unit square with x to the right and y down. The colours "body" and "trim" are drawn for each object.
SHADE = (None, "dark", disc(.5, .99, .5, .05))
CAR = [SHADE, (13, "body", [(0, .5), (.16, .44), (.3, .02), (.74, .02), (.9, .44), (1, .52), (1, .86), (0, .86)]),
       (None, "glass", [(.23, .44), (.34, .12), (.5, .12), (.5, .44)]), (None, "lamp", rect(0, .54, .06, .66)),
       (None, "glass", [(.54, .44), (.54, .12), (.7, .12), (.82, .44)]), (None, "red", rect(.95, .54, 1, .66)),
       (None, "dark", rect(0, .76, 1, .86)), *wheels(13, (.22, .78), .83, .11, .17)]
TRUCK = [SHADE, (14, "dark", rect(.03, .7, .98, .86)), (14, "trim", rect(.32, 0, 1, .76)),
         *bars("body", (.49, .66, .83), .012, .06, .7),
         (14, "body", [(0, .45), (.08, .2), (.28, .2), (.28, .84), (0, .84)]),
         (None, "glass", [(.03, .46), (.1, .26), (.2, .26), (.2, .46)]), (None, "lamp", rect(0, .62, .04, .72)),
         *wheels(14, (.16, .72, .88), .86, .07, .14)]
BUS = [SHADE, (15, "body", rect(0, 0, 1, .88)), (None, "trim", rect(0, .56, 1, .66)),
       *bars("glass", (.03, .32, .47, .62, .77), .12, .12, .48), (None, "glass", rect(.18, .12, .29, .84)),
       (None, "lamp", rect(0, .7, .03, .78)), (None, "white", rect(.02, .02, .16, .09)),
       *wheels(15, (.2, .78), .87, .07, .13)]
TRAIN = [(16, "body", [(0, .62), (.1, .14), (1, .14), (1, .94), (0, .94)]), (16, "metal", rect(.12, .08, 1, .15)),
         (None, "glass", [(.03, .54), (.1, .24), (1, .24), (1, .46), (.15, .46), (.13, .54)]),
         *bars("white", (.24, .5, .76), .07, .2, .88), *bars("dark", (.27, .53, .79), .012, .2, .88),
         (None, "trim", rect(.01, .66, 1, .72)), (16, "dark", rect(.02, .9, 1, 1)),
         (16, "dark", stroke(.55, .08, .65, 0, .02)), (None, "lamp", disc(.05, .76, .02, .05))]
PERSON = [(11, "trim", [(.24, .5), (.76, .5), (.86, 1), (.6, 1), (.5, .66), (.38, 1), (.12, 1)]),
          (11, "body", [(.16, .19), (.84, .19), (1, .54), (.82, .56), (.76, .34), (.76, .56), (.24, .56), (.24, .34),
                        (.18, .56), (0, .54)]),
          (11, "skin", disc(.5, .1, .2, .1)), (None, "dark", [(.3, .1), (.34, .01), (.66, .01), (.7, .1), (.5, .05)])]
RIDER = [(12, "trim", [(.28, .1), (.5, .1), (.62, .34), (.54, .7), (.44, .68), (.48, .4), (.28, .3)]),
         (12, "body", [(.28, .16), (.26, -.36), (.4, -.5), (.58, -.46), (.76, .02), (.68, .1), (.54, -.1), (.5, .18)]),
         (12, "skin", disc(.5, -.62, .09, .16)),
         (12, "trim", [(.4, -.62), (.42, -.78), (.5, -.82), (.58, -.78), (.6, -.64)])]
BICYCLE = [*[(18, None, disc(x, .62, .24, .38)) for x in (.24, .76)],  # wheels count whole, as in Cityscapes
           (18, None, [(.24, .62), (.38, .14), (.7, .14), (.76, .62), (.48, .66)]),
           *[(None, "metal", stroke(x - c, .62 - s, x + c, .62 + s, .014)) for x in (.24, .76)
             for c, s in ((.2, 0), (0, .32), (.14, .22), (.14, -.22))],
           *[(None, "dark", disc(x, .62, .24, .38, hole=.8)) for x in (.24, .76)],
           *[(18, "body", stroke(*ends, .045)) for ends in (
               (.24, .62, .38, .2), (.38, .2, .68, .2), (.68, .2, .48, .66), (.48, .66, .24, .62), (.66, .1, .76, .6))],
           (18, "dark", rect(.28, .1, .46, .18)), (18, "dark", stroke(.58, .07, .7, .07, .06))]
MOTORCYCLE = [SHADE, *wheels(17, (.22, .78), .66, .22, .34), (17, "dark", stroke(.62, .06, .82, .62, .06)),
              (17, "body", [(.1, .3), (.42, .36), (.52, .16), (.7, .2), (.84, .5), (.66, .86), (.34, .88), (.26, .58)]),
              (None, "metal", [(.36, .58), (.62, .54), (.6, .84), (.38, .84)]), (17, "dark", rect(.12, .24, .46, .36)),
              (17, "lamp", disc(.8, .22, .05, .08)), (17, "metal", stroke(.05, .82, .45, .82, .07))]
POST = (5, "metal", rect(.36, .02, .64, 1))
POLE = [POST, (5, "metal", [(.36, .02), (1.5, 0), (1.5, .03), (.64, .06)]), (None, "lamp", rect(1.1, .02, 1.5, .045))]
SIGNS = [[POST, (7, "red", disc(.5, .16, 1, .16)), (None, "white", rect(-.2, .12, 1.2, .2))],
         [POST, (7, "red", [(.5, -.04), (1.6, .32), (-.6, .32)]), (None, "white", [(.5, .06), (1.1, .28), (-.1, .28)]),
          (None, "dark", rect(.4, .12, .6, .26))],
         [POST, (7, "blue", rect(-.45, 0, 1.45, .32)),
          (None, "white", [(.5, .03), (1.1, .15), (.68, .15), (.68, .28), (.32, .28), (.32, .15), (-.1, .15)])]]
LIGHTS = [[POST, (6, "yellow", rect(-.08, -.005, 1.08, .275)), (None, "dark", rect(.06, .005, .94, .265)),
           *[(None, lamp, disc(.5, .05 + .085 * i, .24, .034)) for i, lamp in enumerate(lamps)]]
          for lamps in (("red", "glass", "glass"), ("glass", "yellow", "glass"), ("glass", "glass", "green"))]
# Sprites; range of widths; height / width, both as fractions of the image; range of nearness, 0 horizon to 1 bottom.
OBJECTS = dict(
    car=([CAR], (.20, .29), .85, (.25, .62)), truck=([TRUCK], (.30, .40), 1.0, (.2, .5)),
    bus=([BUS], (.32, .42), .92, (.2, .5)), train=([TRAIN], (.38, .48), .7, (.2, .45)),
    bicycle=([BICYCLE, BICYCLE + RIDER, BICYCLE + RIDER], (.16, .20), 1.3, (.45, .85)),
    motorcycle=([MOTORCYCLE, MOTORCYCLE + RIDER, MOTORCYCLE + RIDER], (.16, .20), 1.3, (.45, .85)),
    person=([PERSON], (.058, .075), 4.6, (.4, .85)), pole=([POLE], (.050, .056), 12.0, (.3, .7)),
    light=(LIGHTS, (.062, .075), 8.5, (.35, .75)), sign=(SIGNS, (.046, .056), 10.5, (.35, .75)))


class Brush:
    """Draws the same polygons into image (RGB), label (trainIds) and remoteness (0 near to 255 horizon)."""

    def __init__(self, rng, size, palette):
        self.size, self.lamps = np.array(size), []
        layers = [Image.new(mode, size) for mode in ("RGB", "L", "L")]
        self.image, self.label, self.remoteness = layers
        self.pens = [ImageDraw.Draw(layer) for layer in layers]
        source, target = np.array(list(PAINT.values()), float).transpose(1, 0, 2)  # (surfaces, 3) each
        variety = np.exp(VARIETY["surface"] * rng.standard_normal(source.shape))
        colours = np.clip((source + palette * (target - source)) * variety, 0, 255).astype(int)
        self.paint = dict(zip(PAINT, map(tuple, colours.tolist())))

    def draw(self, parts, corners, remoteness=1.0, **paint):
        """corners: place of the unit square, clockwise from top left, in fractions of the image; remoteness: 0..1."""
        corners, paint = np.asarray(corners) * self.size, {**self.paint, **paint}
        for train_id, colour, polygon in parts:
            u, v = np.asarray(polygon, float).T[..., None]  # (points, 1) each
            points = (1 - v) * ((1 - u) * corners[0] + u * corners[1]) + v * ((1 - u) * corners[3] + u * corners[2])
            depth = None if train_id is None else int(255 * remoteness)
            for pen, fill in zip(self.pens, (paint.get(colour), train_id, depth)):
                if fill is not None:
                    pen.polygon(points.round().ravel().tolist(), fill=fill)
            if colour == "lamp":
                self.lamps.append(points.mean(0) / self.size)


def random_paint(rng, saturation=0.85):
    colour = colorsys.hsv_to_rgb(rng.random(), saturation * rng.random(), rng.uniform(.25, .95))
    return tuple(int(255 * c) for c in colour)


def noise_field(rng, size, columns, rows):
    """Smooth noise (H,W) of standard deviation near 1, the same columns x rows cells at every image size."""
    grid = rng.standard_normal((rows, columns)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize(size, Image.BICUBIC))


def draw_street(rng, brush):
    """All that stands still: sky, houses, trees, ground, walls, fences. Returns the horizon in image heights."""
    horizon, vanish = rng.uniform(.40, .48), rng.uniform(.42, .58)
    brush.draw([(10, "sky", rect(0, 0, 1, 1)), (9, "terrain", rect(0, horizon, 1, 1))], rect(0, 0, 1, 1))
    for x in np.arange(-.05, 1, .14) + rng.uniform(-.03, .03, 8):  # houses and trees, lower towards the vanishing point
        width, aside = rng.uniform(.14, .22), abs(x + .07 - vanish)
        top = horizon - rng.uniform(.10, .18) - aside * rng.uniform(.3, .6)
        columns, rows = rng.integers(3, 5), max(2, int((horizon - top) / .1))
        house = [(2, "body", rect(0, 0, 1, 1)), (None, "trim", rect(0, 0, 1, .05))]
        for j in range(rows):
            house += bars("glass", (np.arange(columns) + .25) / columns, .5 / columns, (j + .3) / rows, (j + .8) / rows)
        crown = disc(0, 0, .6, .5) * (1 + .12 * rng.standard_normal((21, 1))) + (.5, .5)
        tree = [(8, "trunk", rect(.44, .6, .56, 1)), (8, "leaf", crown)]
        paint = dict(body=random_paint(rng, .6), trim=random_paint(rng, .6))
        corners = rect(x, top, x + width, horizon + .01)
        brush.draw(tree if rng.random() < .4 else house, corners, .9 - .6 * aside, **paint)
    edges = rng.uniform(-.12, .10), rng.uniform(.90, 1.12)  # of the road at the bottom of the image
    joints = [(None, "tile", rect(0, y, 1, 1.03 * y + .004)) for y in np.linspace(.1, 1, 9) ** 2]
    pavement = [(1, "sidewalk", rect(0, 0, 1, 1)), *joints, *bars("tile", (0, .48), .04, 0, 1)]
    rows = np.arange(5) / 5
    bricks = [(3, "brick", rect(0, 0, 1, 1)), *[(None, "mortar", rect(0, y, 1, y + .035)) for y in rows]]
    for i, y in enumerate(rows):
        bricks += bars("mortar", np.arange(.06 * (i % 2), 1, .125), .018, y, y + .2)
    pickets = [(4, None, rect(0, 0, 1, 1)), *[(None, "fence", rect(0, y, 1, y + .08)) for y in (.15, .75)],
               *bars("fence", np.arange(0, 1, .095), .05, 0, 1)]
    for side, edge in zip((-1, 1), edges):
        inner, outer, reach = vanish + side * .05, vanish + side * .14, edge + side * rng.uniform(.25, .7)
        ground = [(inner, horizon), (outer, horizon), (reach, 1), (edge, 1)]
        brush.draw(pavement, ground)
        ends = rng.uniform((.3, .15, .02), (.6, .25, .1))  # nearness along the outer edge of the pavement
        for k, (near, far) in zip(rng.permutation(2), zip(ends, ends[1:])):
            t = np.array([near, far])
            feet = np.stack([outer + side * .04 + t * (reach - outer), horizon + t * (1 - horizon)], 1)
            tops = feet - np.stack([0 * t, .10 + .22 * t], 1)
            if rng.random() < .8:
                brush.draw((bricks, pickets)[k], [tops[0], tops[1], feet[1], feet[0]], 1 - near)
    road = [(0, "road", rect(0, 0, 1, 1)), *bars("line", (.04, .94), .02, 0, 1)]
    for y in (.03, .08, .18, .4, .8):
        road += bars("line", (.35, .63), .024, y, 1.5 * y)
    brush.draw(road, [(vanish - .05, horizon), (vanish + .05, horizon), (edges[1], 1), (edges[0], 1)])
    return horizon


def draw_objects(rng, brush, horizon):
    kinds = ["pole", "light", "sign", rng.choice(["pole", "light", "sign"])]
    kinds += ["car"] * rng.integers(1, 3) + ["person"] * rng.integers(1, 3)
    kinds += [*rng.permutation(["truck", "bus", "train"])[:rng.integers(1, 3)]]
    kinds += [*rng.permutation(["bicycle", "motorcycle"])[:rng.integers(1, 3)]]
    slots = (rng.permutation(len(kinds)) + rng.uniform(.2, .8, len(kinds))) / len(kinds)
    nearness = [rng.uniform(*OBJECTS[kind][3]) for kind in kinds]
    for near, kind, x in sorted(zip(nearness, kinds, slots)):  # far to near
        sprites, widths, aspect, _ = OBJECTS[kind]
        width, y = rng.uniform(*widths) * (.75 + .5 * near), horizon + near * (1 - horizon)
        if kind in ("pole", "light", "sign"):
            x = .5 + np.sign(x - .5) * (.16 + .64 * abs(x - .5))  # beside the road
        elif kind != "person":
            x = .15 + .7 * x  # large, so away from the image border
        left, right = (x - width / 2, x + width / 2)[::rng.choice((-1, 1))]  # facing either way
        sprite, paint = sprites[rng.integers(len(sprites))], dict(body=random_paint(rng), trim=random_paint(rng))
        brush.draw(sprite, rect(left, y - width * aspect, right, y), 1 - near, **paint)


def blend(image, colour, opacity):
    return image + opacity * (np.asarray(colour, np.float32) - image)


def mask(size, polygons, blur):
    """Soft mask (H,W,1), 0..1, of polygons in fractions of the image; blur: sigma as a fraction of the width."""
    layer = Image.new("L", size)
    for polygon in polygons:
        ImageDraw.Draw(layer).polygon((np.asarray(polygon) * size).round().ravel().tolist(), fill=255)
    return np.asarray(layer.filter(ImageFilter.GaussianBlur(blur * size[0])), np.float32)[..., None] / 255


def spots(rng, count, radii, y_range=(0, 1)):
    low, high = zip((0, 1), y_range, radii)
    return [disc(x, y, r, 2 * r) for x, y, r in rng.uniform(low, high, (count, 3))]


def motion_blur(image, dx, dy):
    """Mean over a line of (dx, dy) pixels around each pixel, by halving: log2(length) passes instead of length."""
    image = np.roll(image, (-round(dy / 2), -round(dx / 2)), (0, 1))
    while max(abs(dx), abs(dy)) >= 1:
        dx, dy = dx / 2, dy / 2
        image = (image + np.roll(image, (round(dy), round(dx)), (0, 1))) / 2
    return image


def render_hard(image, label, remoteness, lamps, horizon, rng):
    """Fog, night or rain, and in each of them shadows, glare, motion blur, dirt and drops on the lens.

    image (H,W,3) float32, 0..255; remoteness (H,W,1), 0..1; lamps [(x, y)] in fractions of the image.
    """
    height, width = label.shape
    size, kind = (width, height), rng.choice(HARD["kinds"])
    for _ in range(HARD["shadows"]):  # of houses and trees that stand outside the picture
        x, w, slant = rng.uniform((-.2, .06, -.4), (1, .2, .4))
        band = [(x, horizon), (x + w, horizon), (x + w + slant, 1.1), (x + slant - .1, 1.1)]
        image = image * (1 - HARD["shadow"] * mask(size, [band], .004))
    if kind == "fog":
        density = HARD["fog"] * (1 + .15 * noise_field(rng, size, 6, 4)[..., None]) * (.25 + .75 * remoteness)
        image = blend(image, (198, 200, 202), np.clip(density, 0, .95))
    elif kind == "night":
        beam = mask(size, [[(.42, horizon + .08), (.58, horizon + .08), (.95, 1), (.05, 1)]], .03)
        image = image * (HARD["night"] * np.float32((.9, .95, 1.15)) + .5 * beam)
        glow = mask(size, [disc(x, y, .022, .044) for x, y in lamps] + spots(rng, 3, (.01, .02), (0, .45)), .014)
        image = blend(image, (255, 222, 160), .8 * glow)
    else:
        mirrored = image[np.clip(2 * int(horizon * height) - np.arange(height), 0, height - 1)]
        image = blend(image, mirrored, HARD["reflection"] * np.isin(label, (0, 1))[..., None])  # wet ground
        xs, ys, lengths = rng.uniform((-.1, -.1, .06), (1.1, 1, .2), (HARD["streaks"], 3)).T
        slant = rng.uniform(-.15, .15)
        streaks = [stroke(x, y, x + slant * n, y + n, .005) for x, y, n in zip(xs, ys, lengths)]
        image = blend(.85 * image, (205, 210, 215), HARD["rain"] * mask(size, streaks, .0006))
    image = blend(image, (255, 244, 220), HARD["glare"] * mask(size, spots(rng, HARD["glares"], (.03, .08)), .02))
    length, angle = HARD["motion"] * width * rng.uniform(.5, 1.5), rng.uniform(-.4, .4)
    image = motion_blur(image, length * np.cos(angle), length * np.sin(angle))
    dirt = mask(size, spots(rng, HARD["dirts"], (.02, .06)), .01)
    image = blend(image, random_paint(rng, .3), HARD["dirt"] * dirt)
    refracted = 8 + 1.1 * np.roll(image, (int(.12 * height), int(.05 * width)), (0, 1))  # a drop shows another place
    return blend(image, refracted, HARD["drop"] * mask(size, spots(rng, HARD["drops"], (.012, .04)), .002))


def draw_scene(rng, size, domain, hard=False):
    """One street scene. size: (W,H); domain: "source" or "target"; hard: fog, night or rain, target only.

    Returns image (H,W,3) uint8 RGB and label (H,W) uint8 of trainIds, IGNORE on the bonnet of the own car.
    The same rng state shows the same street at every size and in either domain: only sensor noise is drawn per pixel.
    """
    scene_rng, weather_rng, sensor_rng = (np.random.default_rng(seed) for seed in rng.integers(2 ** 62, size=3))
    target = domain == "target"
    brush = Brush(scene_rng, size, GAP["palette"] if target else 0)
    horizon = draw_street(scene_rng, brush)
    draw_objects(scene_rng, brush, horizon)
    bonnet = disc(.5, 1.05, .62, scene_rng.uniform(.08, .11))
    brush.draw([(IGNORE, "dark", bonnet)], rect(0, 0, 1, 1), 0)
    image, label = np.array(brush.image, np.float32), np.array(brush.label)
    # Textures that tell classes apart without colour: leaves, upright blades of grass, clouds and stains on the ground.
    amplitude = np.zeros((3, 256), np.float32)
    amplitude[0, [8, 9, 2]] = .28, .10, .04
    amplitude[1, [9, 8]] = .22, .04
    amplitude[2, [10, 0, 1]] = .06, .05, .05
    fields = [noise_field(scene_rng, size, *cells) for cells in ((96, 48), (128, 16), (12, 8))]
    texture = sum(row[label] * field for row, field in zip(amplitude, fields))[..., None]
    light = VARIETY["light"] * scene_rng.standard_normal() + VARIETY["tint"] * scene_rng.standard_normal(3)
    image *= (1 + (GAP["texture"] if target else 1) * texture) * np.exp(light).astype(np.float32)
    noise = GAP["noise"] + hard * HARD["noise"] if target else GAP["source_noise"]
    if target:
        image = blend(image, image.mean(2, keepdims=True), GAP["desaturate"])
        image = (128 + GAP["contrast"] * (image - 128)) * np.float32(GAP["cast"])
        if hard:
            remoteness = np.array(brush.remoteness, np.float32) / 255
            slope = (1 - np.linspace(0, 1, size[1], dtype=np.float32)[:, None]) / (1 - horizon)
            remoteness = np.where(np.isin(label, (0, 1, 9)), np.clip(slope, 0, 1), remoteness)[..., None]
            image = render_hard(image, label, remoteness, brush.lamps, horizon, weather_rng)
        soft = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        image = np.asarray(soft.filter(ImageFilter.GaussianBlur(GAP["blur"] * size[0])), np.float32)
    image = image + 255 * noise * sensor_rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), label


def write_png16(path, channels):
    """channels (H,W,3) of 16-bit values as an RGB PNG, which Pillow cannot write."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    height, width, _ = channels.shape
    rows = np.pad(channels.astype(">u2").view(np.uint8).reshape(height, -1), ((0, 0), (1, 0)))  # filter byte 0 per row
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)  # 16 bits, RGB
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 3)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def write_scenes(root, seed=0, source_size=(256, 128), target_size=(256, 128), num_source=400, num_target=400,
                 num_val=100, synthia=False, synscapes=False):
    """Write GTA5, Cityscapes (train and val) and, on request, SYNTHIA and Synscapes trees of drawn scenes below root.

    Sizes are (W,H). An image depends on (seed, tree, index) alone. hard.txt and easy.txt list the target images as
    <city>_<seq>_<frame>; training never reads them. root appears when complete; a killed run leaves root.<pid>.partial.
    """
    root = Path(root)
    partial = root.with_name(f"{root.name}.{os.getpid()}.partial")  # two first runs at once do not meet
    if root.exists():
        raise FileExistsError(f"{root} exists already")
    partial.mkdir(parents=True)
    cityscapes, synthia_ids = np.ones(256, np.uint8), np.zeros(256, np.uint16)  # IGNORE: 1 (ego vehicle), 0 (void)
    cityscapes[:19], synthia_ids[:19] = CITYSCAPES_IDS, SYNTHIA_IDS
    synthia_ids[[9, 14, 16]] = 0  # terrain, truck and train do not occur in the real labels
    palette = np.zeros((256, 3), np.uint8)
    palette[cityscapes[:19]] = PALETTE
    trees = {"GTA5": num_source, "train": num_target, "val": num_val, "SYNTHIA": num_source * synthia,
             "Synscapes": num_source * synscapes}
    cities = dict(train=("aldenburg", "brennau", "castelmar"), val=("dornfeld", "eastmere"))
    splits = {"hard": [], "easy": []}
    for number, (tree, count) in enumerate(trees.items()):
        target = tree in cities
        domain, size = ("target", target_size) if target else ("source", source_size)
        shuffled = np.random.default_rng((seed, number)).permutation(count)
        hard = set(shuffled[:round(HARD["share"] * count)]) if target else ()
        for index in range(count):
            rng = np.random.default_rng((seed, number, index))
            image, label = draw_scene(rng, size, domain, index in hard)
            ids = Image.fromarray(cityscapes[label])
            if target:
                city = cities[tree][index % len(cities[tree])]
                stem = f"{city}_{index // len(cities[tree]):06d}_000019"
                splits["hard" if index in hard else "easy"].append(stem)
                names = (f"leftImg8bit/{tree}/{city}/{stem}_leftImg8bit.png",
                         f"gtFine/{tree}/{city}/{stem}_gtFine_labelIds.png")
            elif tree == "GTA5":
                ids.putpalette(palette.tobytes())  # the pixel stays the label id, as a palette index
                names = f"images/{index + 1:05d}.png", f"labels/{index + 1:05d}.png"
            elif tree == "SYNTHIA":
                names = f"RGB/{index:07d}.png", f"GT/LABELS/{index:07d}.png"
            else:
                names = f"img/rgb/{index + 1}.png", f"img/class/{index + 1}.png"
            image_path, label_path = (partial / ("Cityscapes" if target else tree) / name for name in names)
            for path in (image_path, label_path):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(image_path, compress_level=3)
            if tree == "SYNTHIA":
                column = np.broadcast_to(np.arange(label.shape[1]) // 32, label.shape)  # in place of an instance id
                write_png16(label_path, np.stack([synthia_ids[label], column, 0 * column], 2))
            else:
                ids.save(label_path, compress_level=3)
    for name, stems in splits.items():
        (partial / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    try:
        os.replace(partial, root)
    except OSError:
        if not root.exists():
            raise
        shutil.rmtree(partial)  # another process was faster, with the same scenes
