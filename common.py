"""What both methods share: classes, DeepLab-V2, weight files, readers, evaluation, runs, pictures.

No argument parser, no loss and no training loop is in this file: those are the methods, and each
method is one file. Conventions: sizes are (W, H), tensors are (B, C, H, W), labels are trainIds
0..C-1 with 255 = ignore. Images travel as uint8 RGB and become float BGR minus the mean in
`normalize`.

Contents: errors and files · values from text · classes · network · weight files · readers ·
          sampling · evaluation · device and ranks · resume, save, log · pictures
"""

import contextlib
import copy
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import Bottleneck
from torchvision.transforms.functional import pil_to_tensor

# ====================================================================== errors and files


class UserError(Exception):
    """Something the user can put right: one sentence that names the file or flag and what to do."""


def as_sentence(error: Exception):
    """What to tell about an exception that input or machine caused; None for a possible bug."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):  # a reading process's arrives as a printed traceback
        return text.split("UserError: ")[-1]
    if isinstance(error, torch.cuda.OutOfMemoryError) or ("CUDA" in text and "out of mem" in text):
        return "out of GPU memory: lower batch or image size; training has --checkpoint-activations"
    if isinstance(error, MemoryError) or "DefaultCPUAlloc" in text or "bad_alloc" in text:
        return "out of memory: lower --workers, the batch size or the image sizes"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"a process that reads images died ({text}): lower --workers, or add shared memory"
    if isinstance(error, dist.DistError) or (world_size() > 1 and "peer" in text):
        return "another of torchrun's processes ended; its message says why"
    if isinstance(error, OSError):
        name = error.filename or "input or output"
        reason = error.strerror or text.split("Error: ")[-1]  # a reading process's: as above
        return f"{name}: {reason}; check the path, its permissions and the disk"
    return None


def launch(main):
    """Run a script's main(). A user's mistake becomes one line on stderr and exit status 2."""
    # sys.exit, so that temporary files are removed on the way out
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without λ prints an escape
            stream.reconfigure(errors="backslashreplace")
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of our output, say head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 141
    except Exception as error:
        sentence = as_sentence(error)
        with contextlib.suppress(OSError):  # stderr may be on a full disk
            if sentence is None:  # a bug
                traceback.print_exc()
                status = 1
            else:
                print(f"error: {sentence}", file=sys.stderr, flush=True)
                status = 2
    finally:
        for reader in multiprocessing.active_children():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report the reader's end
            reader.kill()  # a normal exit would wait for it: readers see no signal of ours
    if dist.is_initialized():
        # A normal exit waits for processes that may wait for this one, and gloo of torch 2.4 may
        # hang in it.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def writing(path):
    """A full disk, a missing permission or a folder in the way become a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error)[:80]
        raise UserError(f"cannot write {path} ({reason}): choose another place, or free the disk")


@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for binary writing. The file appears whole or not at all."""
    path = Path(path)
    # Short, as the file's own name may have any length; with the rank, as processes on two machines
    # can have one pid.
    temporary = path.with_name(f".{rank()}.{os.getpid()}.tmp")
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


def write_text(path, text: str):
    with atomic_write(path) as file:
        file.write(text.encode())


def read_lines(path: Path) -> list:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text: save it as UTF-8") from None


def write_png(path, array: np.ndarray, num_classes: int = None):
    """An (H,W,3) or (H,W) uint8 picture as PNG. With num_classes, (H,W) trainIds: the pixels stay
    trainIds, and a palette lets viewers show them in colour."""
    image = Image.fromarray(array)
    if num_classes is not None:
        image.putpalette(palette(num_classes).tobytes())
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def lock(out):
    """Keep other runs out of the folder `out` until this process ends; returns what must be kept.

    A lock of fcntl belongs to this process: readers do not inherit it, and kill -9 ends it.
    Temporary files whose process is gone, as such a kill leaves them, are removed; that of a living
    one may be of a run whose --out lies inside this one.
    """
    import fcntl  # not on Windows, where evaluation still works

    if rank() > 0:
        barrier()
        return None
    with writing(out):
        Path(out).mkdir(parents=True, exist_ok=True)
        file = open(Path(out) / ".lock", "a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out} is in use by another run: wait, or choose another --out")
        for leftover in Path(out).rglob(".*.tmp"):
            owner = re.fullmatch(r"\.\d+\.(\d{1,9})\.tmp", leftover.name)
            if owner and leftover.is_file():
                try:
                    os.kill(int(owner[1]), 0)  # sends nothing: is there such a process?
                except ProcessLookupError:
                    leftover.unlink()
                except PermissionError:  # yes, another user's
                    pass
    barrier()
    return file


def digest(chunks) -> str:
    """A short hash of pieces of bytes."""
    result = hashlib.sha256()
    for chunk in chunks:
        result.update(chunk)
    return result.hexdigest()[:16]


def fingerprint(paths) -> str:
    """Tells sets of files apart by names and sizes, wherever they lie."""
    return digest(f"{Path(path).name} {os.stat(path).st_size}\n".encode() for path in paths)


def content_digest(paths) -> str:
    return digest(Path(path).read_bytes() for path in paths)


# ====================================================================== values from text
# A value that does not fit raises a ValueError; argparse reports it with the flag and the
# function's __name__.


def number(kind, low, high):
    """A function from text to an int or float (`kind`) from low to high."""

    def read_number(text: str):
        value = kind(text)
        if not low <= value <= high:  # true of nan, too
            raise ValueError
        return value

    read_number.__name__ = f"{kind.__name__} ({low} to {high})"
    return read_number


def size(text: str) -> tuple:
    """(W, H), no side below 32: a discriminator halves a map five times."""
    width, height = text.lower().split("x")
    side = number(int, 32, 4096)
    return side(width), side(height)


def layers(text: str) -> tuple:
    """Blocks of the four stages of a ResNet."""
    counts = tuple(map(number(int, 1, 999), text.split(",")))
    if len(counts) != 4:
        raise ValueError
    return counts


def place(text: str) -> Path:
    if not text:  # an unset variable of the shell; Path("") is the current folder
        raise ValueError
    return Path(text)


place.__name__ = "path (not empty)"
size.__name__ = "size (WxH, sides of 32 to 4096)"
layers.__name__ = "layers (four block counts, say 3,4,23,3)"

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
PALETTE = np.array(COLOURS, dtype=np.uint8)
ABSENT = {"synthia": (9, 14, 16)}  # trainIds of which a source has no pixel: terrain, truck, train
SUBSET_16 = tuple(c for c in range(19) if c not in ABSENT["synthia"])
SUBSET_13 = tuple(c for c in SUBSET_16 if c not in (3, 4, 5))  # also without wall, fence, pole


def palette(num_classes: int) -> np.ndarray:
    """(256,3) uint8 colours of trainIds: Cityscapes' for 0..18, fixed ones beyond, black for 255
    and whatever else is no class. `palette(C)[labels]` is (H,W,3)."""
    colours = np.random.default_rng(0).integers(30, 256, (256, 3), dtype=np.uint8)
    colours[:19] = PALETTE
    colours[num_classes:] = 0
    return colours


def class_names(num_classes: int) -> tuple:
    if num_classes == 19:
        return CLASSES
    return tuple(str(c) for c in range(num_classes))


# ====================================================================== network

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)


def normalize(images: Tensor) -> Tensor:
    """RGB 0..255 (B,3,H,W), uint8 or float, to the network's input: float32 BGR 0..255 minus the
    mean, no division. ValueError for another shape."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"normalize takes (B, 3, H, W) images in RGB, not {tuple(images.shape)}")
    bgr = images.flip(1).float()
    for channel, mean in enumerate(MEAN_BGR):  # numbers: a tensor would make the host wait for CUDA
        bgr[:, channel] -= mean
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
    `set_mode`). Weights lie channels last, with which convolutions are faster.
    """

    checkpoint_activations = False  # True: the backward pass computes what lies inside blocks again
    input_size = (1024, 512)  # (W, H) to which `predict` scales images; `load` sets its own

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
        self.layer5 = AtrousHead(16 * width, num_classes) if aux else None
        self.layer6 = AtrousHead(32 * width, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Prediction:
        x = images.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, width, H/4, W/4)
        x = self.run_blocks(self.layer1, x)
        x = self.run_blocks(self.layer2, x)  # (B, 8 * width, H/8, W/8)
        middle = self.run_blocks(self.layer3, x)  # (B, 16 * width, H/8, W/8)
        features = self.run_blocks(self.layer4, middle)  # (B, 32 * width, H/8, W/8)
        main = self.layer6(features)[:, : self.num_classes]  # see inference_copy
        aux = None if self.layer5 is None else self.layer5(middle)
        return Prediction(main, aux, features)

    def run_blocks(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return stage(x)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        for block in stage:
            passes = (contextlib.nullcontext(), statistics_stay(block))
            # the function is called at once, with this block's contexts
            x = checkpoint(block, x, context_fn=lambda: passes, **options)
        return x

    def parameter_groups(self, backbone_lr: str, head_factor: float) -> list:
        """Optimizer groups that list each parameter once, with its factor on the learning rate.

        The released optimizer lists a parameter several times and steps it as often. "released"
        gives each once, with that factor: conv1 1, shortcut convolutions 4, all others 3. "paper"
        gives the whole backbone 1. The heads get head_factor in both.
        """
        factors = {"conv1": 1.0, "convolution": 3.0, "shortcut": 4.0, "head": head_factor}
        if backbone_lr == "paper":
            factors.update(convolution=1.0, shortcut=1.0)
        groups = {kind: [] for kind in factors}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            kind = "convolution"
            if name.startswith(("layer5.", "layer6.")):
                kind = "head"
            elif name.startswith("conv1."):
                kind = "conv1"
            elif ".downsample." in name:
                kind = "shortcut"
            groups[kind].append(parameter)
        return [{"params": groups[kind], "lr_factor": factors[kind]} for kind in factors]


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
    """BatchNorm's running statistics are afterwards what they were: a checkpoint's second forward
    pass must not move them again."""
    before = [buffer.clone() for buffer in block.buffers()]
    try:
        yield
    finally:  # torch ends that pass with an exception
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
    """A copy for prediction: eval mode, BatchNorm folded into the convolutions, no auxiliary head.
    `network` stays as it is."""
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
    # CPUs are 3 times as fast where the number of output channels is a multiple of 16.
    extra = -network.num_classes % 16
    for conv in network.layer6.conv2d_list:
        conv.weight.data = F.pad(conv.weight.data, (0, 0, 0, 0, 0, 0, 0, extra))
        conv.bias.data = F.pad(conv.bias.data, (0, extra))
    return network


# ====================================================================== weight files

FORMAT = "intrada-bcl 2"  # header of our own checkpoints
CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "ema_model")
PREFIXES = ("module.", "_orig_mod.", "model.")
ADAPTSEGNET = ("AdvEnt / IntraDA checkpoint", "single-level DeepLab")  # its files look like these


class WeightReport(NamedTuple):
    kind: str  # of file, as parse_weights names it
    loaded: list  # names of the tensors taken from the file
    skipped: list  # names in the file that this network has no use for
    initialised: list  # names in the network that keep their initial value

    def __str__(self):
        text = f"{self.kind}: loaded {len(self.loaded)} tensors"
        for verb, names in (("skipped", self.skipped), ("kept initial", self.initialised)):
            examples = f" ({names[0]}, ...)" if names else ""
            text += f", {verb} {len(names)}{examples}"
        if self.kind in ADAPTSEGNET:
            text += " (if this is AdaptSegNet's own file: eval.py --branches 2)"
        return text


def read_checkpoint(path) -> dict:
    """The dict of tensors and plain values in a .pth or .safetensors file. Code in it never runs.

    UserError for a file that is missing, damaged (a zip knows its checksums) or no dict.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: check the path, and name the file, not a folder")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            if zipfile.is_zipfile(path):  # torch's own reader does not look at the checksums
                with zipfile.ZipFile(path) as archive:
                    # a folder: torch reads nothing of what has this attribute
                    folders = [entry for entry in archive.infolist() if entry.external_attr & 0x10]
                    if archive.testzip() or folders:
                        raise ValueError
            with warnings.catch_warnings():  # torch warns of TorchScript files, and refuses them
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError(f"{path}: reading it needs a package: pip install safetensors")
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # a damaged file can make torch stumble anywhere
        if "DefaultCPUAlloc" in str(error):  # torch's MemoryError
            raise
        content = None
    if not isinstance(content, dict):
        hint = "bring it again, or save the state dict alone (a run's own: remove its folder)"
        raise UserError(f"{path} is damaged, no state dict, or holds objects beside it: {hint}")
    return content


def plain_state(content: dict, path) -> dict:
    """{name: tensor} of a file: out of its containers, without prefixes, each tensor looked at."""
    for _ in range(3):  # a container may be in a container
        found = [key for key in CONTAINERS if isinstance(content.get(key), dict)]
        if len(found) > 1:
            raise UserError(f"{path} holds {' and '.join(found)}: save one of them in a file")
        if found:
            content = content[found[0]]
    state = {}
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            continue
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if name in state:
            raise UserError(f"{path} holds {name} under two prefixes: save one network in one file")
        state[name] = value
        counter = name.endswith("num_batches_tracked")
        dense = value.layout is torch.strided and not (value.is_nested or value.is_meta)
        if not dense or not (counter or value.is_floating_point()):
            kind = f"{value.layout}, {value.dtype}"
            raise UserError(f"{path}: {name} is no dense float tensor ({kind}): save it as float32")
        if not value.float().isfinite().all():  # float(): for float8
            raise UserError(f"{path}: {name} holds NaN or infinite values: take an earlier file")
        if name.endswith("running_var") and (value.float() < 0).any():
            raise UserError(f"{path}: {name} holds a variance below 0: the file is damaged")
    return state


def without(state: dict, *prefixes) -> tuple:
    """(the state without the names that start with a prefix, those names)."""
    kept = {name: value for name, value in state.items() if not name.startswith(prefixes)}
    return kept, [name for name in state if name not in kept]


def layer5_as_main(state: dict) -> dict:
    return {name.replace("layer5.", "layer6."): value for name, value in state.items()}


def head_channels(state: dict, layer: str) -> int:
    """Input channels of a head, 0 without that head."""
    weight = state.get(f"{layer}.conv2d_list.0.weight")
    return weight.shape[1] if weight is not None and weight.dim() == 4 else 0


def parse_weights(content: dict, path="weights") -> tuple:
    """(kind, state dict under our names, skipped names), told apart by the content alone."""
    state = plain_state(content, path)
    aux_channels = head_channels(state, "layer5")
    main_channels = head_channels(state, "layer6")
    if content.get("format") == FORMAT:
        return "our checkpoint", state, []
    if state and all(name.startswith("Scale.") for name in state):
        kept, skipped = without(state, "Scale.layer5.")
        kept = {name.removeprefix("Scale."): value for name, value in kept.items()}
        return "initial weights (Scale.*)", kept, skipped
    stem = state.get("conv1.weight")
    if "fc.weight" in state and stem is not None and stem.shape[1:] == (3, 7, 7):
        kept, skipped = without(state, "fc.")
        # torchvision's input is RGB, 0..1, divided by std; ours is BGR, 0..255. The means differ
        # by less than 1 of 255.
        std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
        kept["conv1.weight"] = (stem.float() / (255 * std)).flip(1)
        return "torchvision ResNet", kept, skipped
    if any(name.startswith("target_conv1.") for name in state):
        of_target = [name for name in state if name.startswith("target_")]
        of_source = [name.removeprefix("target_") for name in of_target]
        kept, skipped = without(state, "layer6.", *of_source)
        kept = {name.removeprefix("target_"): value for name, value in kept.items()}
        return "BCL release", layer5_as_main(kept), skipped
    if aux_channels and main_channels == 2 * aux_channels:
        return "AdvEnt / IntraDA checkpoint", state, []
    if main_channels and not aux_channels:
        return "AdvEnt, single level", state, []
    if aux_channels and not main_channels:
        return "single-level DeepLab", layer5_as_main(state), []
    first = ", ".join(list(state)[:3]) or "no tensor"
    raise UserError(f"{path} is no DeepLab-V2 (it begins with {first}): README says what is read")


def load_weights(network: DeepLabV2, content, path="weights"):
    """Load a weight file's content into the network. Returns a WeightReport, or for no content
    (None) a sentence that says so.

    Only a head of which the file has no tensor may keep its initial value. UserError if the file is
    of another architecture or class count, or lacks anything else (num_batches_tracked apart).
    """
    if content is None:
        return "random initial weights"
    kind, state, skipped = parse_weights(content, path)
    if network.layer5 is None:
        state, unused = without(state, "layer5.")
        skipped = skipped + unused
    own = network.state_dict()
    heads = ("layer5.", "layer6.")
    absent = tuple(head for head in heads if not any(name.startswith(head) for name in state))
    initialised = [name for name in own if name.startswith(absent)]
    wrong = [name for name in state if name not in own or own[name].shape != state[name].shape]
    missing = [name for name in own if name not in state and name not in initialised]
    wrong += [name for name in missing if not name.endswith("num_batches_tracked")]
    if wrong:
        name = wrong[0]
        found = tuple(state[name].shape) if name in state else "missing"
        wanted = tuple(own[name].shape) if name in own else "missing"
        flags = f"--num-classes {network.num_classes}, --width {network.width}"
        flags += f", --layers {','.join(map(str, network.layers))}"
        where = f"{name} is {found} in the file and {wanted} in the network"
        raise UserError(f"{path} ({kind}) does not fit: {where}; check {flags}")
    network.load_state_dict({**own, **state})
    return WeightReport(kind, list(state), skipped, initialised)


def load(path) -> DeepLabV2:
    """The trained network in a checkpoint of ours or of a published kind, in eval mode, on the CPU.

    The architecture is read off the tensors. `input_size` (W,H) is what it was trained with, the
    release's where the file does not say; `report` tells what was loaded.
    """
    content = read_checkpoint(path)
    kind, state, _ = parse_weights(content, path)
    try:
        blocks = []
        for i in (1, 2, 3, 4):
            names = [name for name in state if name.startswith(f"layer{i}.")]
            blocks.append(1 + max(int(name.split(".")[1]) for name in names))
        num_classes = state["layer6.conv2d_list.0.bias"].shape[0]
        width = state["conv1.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{path} has no trained classifier (layer6): name a trained checkpoint")
    plausible = 2 <= num_classes <= 255 and 2 <= width <= 1024 and max(blocks) <= len(state)
    if not plausible:  # before it is built
        shape = f"{num_classes} classes, width {width}, blocks {blocks}"
        raise UserError(f"{path} is damaged ({shape}): bring the file again")
    network = DeepLabV2(num_classes, blocks, width, aux=head_channels(state, "layer5") > 0)
    network.report = load_weights(network, content, path)
    network.input_size = (1460, 730) if kind == "BCL release" else (1024, 512)
    with contextlib.suppress(KeyError, TypeError, ValueError):  # not there, or no size
        network.input_size = size("x".join(map(str, content["input_size"])))
    return network.eval()


def initial_weights(init: str) -> tuple:
    """(content, identity) of an --init flag: the content is None for none, torchvision's state dict
    for imagenet, else a file's; the identity is the flag itself, or the file's digest."""
    if init == "none":
        return None, init
    if init != "imagenet":
        if not Path(init).is_file():
            raise UserError(f"no weight file at --init {init}: give imagenet, none or a file")
        return read_checkpoint(init), content_digest([init])
    weights = torchvision.models.ResNet101_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True), init
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.split("/")[-1]
        raise UserError(f"cannot fetch ImageNet weights ({error}): bring {cached}, or give --init")


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
PHOTOS = (".png", ".jpg", ".jpeg")
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
    "acdc": (Layout("rgb_anon/*/{split}", "gt/*/{split}", *ANON),),
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
SOURCES = ("gta5", "synthia", "synscapes", "cityscapes", "folder")
TARGETS = ("cityscapes", "acdc", "darkzurich", "bdd100k", "folder")


def dataset_root(kind: str, data_root, own_root=None) -> Path:
    """Where a dataset lies: its own root if given, else the folder of its name below the data root,
    in upper or lower case, with or without _."""
    if not own_root and not data_root:
        raise UserError(f"no folder is named for {kind}: give --data-root, or both domains' roots")
    names = ("synthia", "randcityscapes") if kind == "synthia" else (kind,)
    candidates = [Path(own_root)] if own_root else sorted(Path(data_root).glob("*"))
    found = []
    for root in candidates:
        if root.is_dir() and (own_root or root.name.lower().replace("_", "") in names):
            found.append(root)
    if not found:
        flags = "--data-root, --source-root or --target-root"
        raise UserError(f"no {kind} data in {own_root or data_root}: check {flags}")
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} are both {kind}: name one by its own root")
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


def files_below(folder) -> list:
    """The paths of all files in a folder and its folders, links followed, hidden ones left out;
    none if it is no folder."""

    def unreadable(error):
        raise UserError(f"cannot read folder {error.filename}: change its permissions")

    found = []
    if not os.path.isdir(folder):
        return found
    for parent, inner, names in os.walk(folder, followlinks=True, onerror=unreadable):
        above = [os.path.realpath(outer) for outer in Path(parent).absolute().parents]
        if os.path.islink(parent) and os.path.realpath(parent) in above:  # it leads back
            inner.clear()
            continue
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return found


def list_files(kind: str, root: Path, pattern: str, suffixes: tuple) -> dict:
    """{name: path} of the files below the folders that match the pattern, in order.

    The name is the path below the pattern's part before a *, without the suffix; for GTA5, whose
    archives unpack to 01_images/, 01_labels/ and so on, the file's own name.
    """
    folders = sorted(path for path in root.glob(pattern) if path.is_dir())
    if not folders:
        raise UserError(f"no folder {root / pattern} for {kind}: check the root and the archives")
    base = root / pattern.split("/*")[0]
    found = {}
    for path in itertools.chain(*map(files_below, folders)):
        suffix = next((s for s in suffixes if path.name.lower().endswith(s.lower())), None)
        if suffix is None:
            continue
        below = path.name if kind == "gta5" else path.relative_to(base).as_posix()
        key = below[: -len(suffix)]
        # Names become lines of text files: no line breaks, and nothing but UTF-8.
        if re.search("[\0-\x1f\x85\u2028\u2029\ud800-\udfff]", key):
            raise UserError(f"{str(path)!a}: control character or no UTF-8, rename it")
        if key in found:
            raise UserError(f"{found[key]} and {path} have one name: remove one")
        found[key] = path
    if not found:
        raise UserError(f"no *{suffixes[0]} files in {folders[0]}: check the dataset's root")
    return {key: found[key] for key in sorted(found, key=numeric_order)}


def numeric_order(key: str) -> tuple:
    """Synscapes has 1.png, 2.png, ..., 10.png."""
    folder, _, name = key.rpartition("/")
    return folder, int(name) if name.isdecimal() else -1, name


def list_images(kind: str, root, split: str = "train") -> dict:
    """{name: image path} of a dataset. Knows nothing of labels: the target is read from this."""
    layout = find_layout(kind, Path(root), split)
    return list_files(kind, Path(root), layout.images.format(split=split), layout.image_suffixes)


def list_pairs(kind: str, root, split: str = "train") -> dict:
    """{name: (image path, label path)}; an image or a label without a partner is refused."""
    layout = find_layout(kind, Path(root), split)
    images = list_images(kind, root, split)
    pattern = layout.labels.format(split=split)
    labels = list_files(kind, Path(root), pattern, (layout.label_suffix,))
    lonely = sorted(images.keys() ^ labels.keys())
    if lonely:
        counts = f"{len(images)} images but {len(labels)} labels"
        names = f"{len(lonely)} without a partner, first {', '.join(lonely[:3])}"
        raise UserError(f"{root}: {counts}, {names}; complete the download or remove them")
    return {name: (images[name], labels[name]) for name in images}


def dataset_classes(kind: str, root, num_classes: int) -> tuple:
    """The class names in a plain folder's classes.txt, one a line; else those of `class_names`."""
    path = Path(root) / "classes.txt"
    if kind != "folder" or not path.is_file():
        return class_names(num_classes)
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if not len(names) == len(set(names)) == num_classes:
        counts = f"{len(names)} names, {len(set(names))} different ones"
        raise UserError(f"{path} has {counts}: give one for each of --num-classes {num_classes}")
    return tuple(names)


def check_classes(source: str, source_root, target: str, target_root, num_classes: int):
    """Refuse domains of other classes; source and target are their kinds."""
    of_source = dataset_classes(source, source_root, num_classes)
    if of_source != dataset_classes(target, target_root, num_classes):
        raise UserError(f"{source_root} and {target_root} have other classes: align classes.txt")


def open_image(path, formats=("PNG", "JPEG"), low_bytes: bool = False) -> Image.Image:
    """A decoded Pillow image; a UserError names a file that is missing, broken, huge or no image.

    low_bytes: the low byte of each channel of a 16-bit RGB file. Pillow by itself keeps the high,
    and torchvision's reader, deprecated by now, refuses such files before version 0.20.
    """
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise UserError(f"no image at {path}: check the path; a folder or broken link may be there")
    try:
        image = Image.open(path, formats=formats)
        if low_bytes:
            if str(image.tile[0][3]) != "RGB;16B":
                raise UserError(f"{path} is no 16-bit RGB file: bring GT/LABELS as downloaded")
            # big-endian pairs, read as little-endian ones
            image.tile = [(*tile[:3], "RGB;16L") for tile in image.tile]
        image.load()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a broken file can make Pillow stumble anywhere
        raise UserError(f"cannot read {path} ({error}): bring it again as {' or '.join(formats)}")
    return image


def upright_rgb(image: Image.Image, name="the image") -> Image.Image:
    """8-bit RGB, turned upright by the EXIF orientation; UserError for 16 or more bits of grey."""
    if image.mode.startswith(("I", "F")):  # conversion would clip all of it to white
        raise UserError(f"{name} has 16 or more bits of grey: bring 8-bit images")
    return upright(image).convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Turned by the EXIF orientation; without a legible one the image stays as it is.

    ImageOps.exif_transpose also rewrites other tags, and gives up where one of them is odd.
    """
    orientation = None
    with contextlib.suppress(Exception):  # odd EXIF makes Pillow stumble anywhere
        orientation = image.getexif().get(0x0112)
    if orientation not in range(2, 9):
        return image
    T = Image.Transpose
    mirrored = (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM)  # orientations 2, 3, 4
    turned = (T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90)  # 5, 6, 7, 8
    return image.transpose((mirrored + turned)[orientation - 2])


def read_ids(path) -> np.ndarray:
    """(H,W) uint8 label ids of a PNG: palette index (never converted), or grey of 1 to 8 bits."""
    image = open_image(path, ("PNG",))  # JPEG would blur ids
    if image.mode not in ("P", "L", "1"):
        raise UserError(f"{path} has mode {image.mode}: bring ids of 8 bits a pixel, not colours")
    ids = np.asarray(image).astype(np.uint8)
    if image.mode == "L":  # Pillow stretches grey of 2 and 4 bits to 0..255
        with open(path, "rb") as file:
            bits = file.read(25)[24]  # in every PNG's first chunk
        ids = ids // (255 // (2**bits - 1))
    return ids


def read_label(path, kind: str, num_classes: int) -> Image.Image:
    """A label file as an 8-bit Pillow image of trainIds 0..num_classes-1 and 255.

    A file with many pixels that are no id of this kind of dataset is refused: more than half, and
    in a plain folder, whose ids are the trainIds themselves, more than one in a thousand.
    """
    class_ids = list(LAYOUTS[kind][0].ids[:num_classes])
    last_id = max(class_ids)
    share = 0.001 if kind == "folder" else 0.5
    if kind == "synthia":  # 16 bits a channel, class id in R; ids are below 256
        ids = np.asarray(open_image(path, low_bytes=True))[:, :, 0]
    else:
        ids = read_ids(path)
    foreign = np.bincount(ids.ravel(), minlength=256)[last_id + 1 : IGNORE]
    if foreign.sum() > share * ids.size:
        percent = f"{100 * foreign.sum() / ids.size:.1f} % of its pixels"
        value = last_id + 1 + int(np.argmax(foreign))
        hint = "colours, ids of another dataset, or too low a --num-classes?"
        raise UserError(f"{path}: {percent} are no ids 0 to {last_id} (but {value}); {hint}")
    trainids = np.full(256, IGNORE, dtype=np.uint8)  # an id that is no class's becomes 255
    trainids[class_ids] = np.arange(len(class_ids))
    return Image.fromarray(trainids[ids])


def resize(image: Image.Image, size: tuple, kind: str) -> Image.Image:
    """To size (W, H), aspect not kept: an "image" by Pillow's antialiased bicubic, a "label" by
    nearest."""
    return image.resize(size, {"image": Image.BICUBIC, "label": Image.NEAREST}[kind])


def spread(length: int, count: int) -> list:
    """At most `count` indices, spread evenly over range(length)."""
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(count)})


class Images(Dataset):
    """Images without labels. It is given image paths alone: training cannot open a target label.

    An item is {"name", "image": (3,H,W) uint8 RGB}, resized to `size` if given, or made by
    transform(image, None, random generator of (seed, sample position)).
    """

    native_labels = False  # True: labels keep their own size

    def __init__(self, images: dict, size=None, transform=None, seed: int = 0):
        self.names = list(images)
        self.paths = list(images.values())
        self.files = self.paths
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
        item = {"name": self.names[index], "image": pil_to_tensor(image)}
        if label is not None:
            item["label"] = pil_to_tensor(label)[0]
        return item

    def open(self, index: int) -> tuple:
        """(image, label or None) as stored, in Pillow's form."""
        path = self.paths[index]
        return upright_rgb(open_image(path), path), None

    def look(self):
        """Open a few files spread over the set: what is wrong with it shows before training."""
        for index in spread(len(self), 8):
            self.open(index)


class Labelled(Images):
    """Images with labels of one dataset kind; an item also has "label": (H,W) uint8 trainIds.

    native_labels=True keeps labels at their own size (evaluation), otherwise they are resized like
    the image. pseudo=True: labels that a network made, in a size of their own, perhaps empty.
    `classes` are the names in tables.
    """

    def __init__(self, pairs: dict, kind: str, num_classes: int, size=None, *, native_labels=False,
                 pseudo=False, transform=None, seed: int = 0, classes=None):  # fmt: skip
        images = {name: image for name, (image, _) in pairs.items()}
        super().__init__(images, size, transform, seed)
        self.label_paths = [label for _, label in pairs.values()]
        self.files = self.paths + self.label_paths
        self.kind = kind
        self.num_classes = num_classes
        self.native_labels = native_labels
        self.pseudo = pseudo
        self.classes = classes or class_names(num_classes)

    def open(self, index: int) -> tuple:
        image, _ = super().open(index)
        path = self.label_paths[index]
        label = read_label(path, self.kind, self.num_classes)
        ratio = image.width / image.height * label.height / label.width
        if not self.pseudo and not 0.9 < ratio < 1.1:  # GTA5 has 1914x1052 with 1914x1046; not more
            sizes = f"{label.width}x{label.height}, its image {image.width}x{image.height}"
            raise UserError(f"{path} is {sizes}: this is not its label, repair the pair")
        return image, label

    def look(self):
        """Also refuses labels of which almost no pixel has a class, and trainIds instead of ids."""
        labels = [np.asarray(self.open(index)[1]) for index in spread(len(self), 8)]
        known = [np.mean(label != IGNORE) for label in labels]
        # Read as ids, trainIds 0 to 18 give no class above pole (id 17), and most pixels none.
        highest = max(label[label != IGNORE].max(initial=0) for label in labels)
        expects_ids = LAYOUTS[self.kind][0].ids is CITYSCAPES_IDS
        trainids = expects_ids and np.mean(known) < 0.7 and highest < CLASSES.index("traffic light")
        if trainids or max(known) < 0.02:
            hint = f"are they colours, trainIds instead of ids, or no {self.kind} labels?"
            raise UserError(f"{self.label_paths[0]} and others: few pixels have a class; {hint}")


def validation_set(kind: str, root, num_classes: int, size):
    """The labelled val images for `evaluate`, after a look at a few; None where there are none."""
    layout = find_layout(kind, Path(root), "val")
    patterns = (layout.images.format(split="val"), layout.labels.format(split="val"))
    has_both = all(any(Path(root).glob(pattern)) for pattern in patterns)
    if "{split}" not in layout.images or not has_both:
        print(f"no labelled val images in {root}: training is not evaluated")
        return None
    return to_evaluate(list_pairs(kind, root, "val"), kind, root, num_classes, size)


def to_evaluate(pairs: dict, kind: str, root, num_classes: int, size: tuple) -> Labelled:
    """The dataset of these pairs, labels at native size, after a look at a few."""
    classes = dataset_classes(kind, root, num_classes)
    dataset = Labelled(pairs, kind, num_classes, size, native_labels=True, classes=classes)
    dataset.look()
    return dataset


# ====================================================================== sampling


def endless_order(length: int, seed: int, start: int, stop: int, batch: int):
    """(position, index) pairs of the iterations start..stop-1: epoch after epoch of seeded
    permutations of range(length).

    The order depends on (length, seed) alone and can start at any iteration, so going on after a
    stop is exact. Of the world * batch positions of an iteration, every rank takes its own `batch`.
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

    next() gives images (B,3,H,W) uint8 and labels (B,H,W) int64, or None for an unlabelled set.
    `names` are the images of the last batch, `waited` the seconds that it took to come.
    """

    def __init__(self, dataset: Images, batch: int, start: int, stop: int, workers: int, device):
        order = endless_order(len(dataset), dataset.seed, start, stop, batch)
        self.batches = read_items(dataset, workers, device, batch_size=batch, sampler=order)
        self.device = device

    def __next__(self):
        begin = time.perf_counter()
        batch = next(self.batches)
        self.waited = time.perf_counter() - begin
        self.names = batch["name"]
        images = batch["image"].to(self.device, non_blocking=True)
        if "label" not in batch:
            return images, None
        return images, batch["label"].to(self.device, non_blocking=True).long()


def one_by_one(dataset: Dataset, workers: int, device):
    """This rank's share of a dataset's items (every world-th), in order, not batched."""
    share = range(rank(), len(dataset), world_size())
    return read_items(dataset, workers, device, batch_size=None, sampler=share)


def read_items(dataset: Dataset, workers: int, device, **options):
    """An iterator of what `workers` processes read, which start with the first item.

    Forked after CUDA has started, they never touch it: they decode and resize on the CPU.
    They start with SIGINT and SIGTERM blocked: a signal to the whole group reaches this process
    alone, which saves and then ends them.
    """
    if workers:
        options.update(num_workers=workers, prefetch_factor=4)
    loader = DataLoader(dataset, pin_memory=device.type == "cuda", **options)
    if sys.platform == "win32":  # where signals cannot be blocked
        yield from loader
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        items = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    yield from items


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


def scores(confusion: Tensor, classes=None) -> dict:
    """{"miou19", "miou16", "miou13", "iou": {class: value}} in percent, means without NaN.

    With other classes than Cityscapes' "miou<C>" alone. None stands for undefined.
    """
    num_classes = len(confusion)
    per_class = 100 * iou(confusion)
    names = classes or class_names(num_classes)
    subsets = {num_classes: range(num_classes)}
    if tuple(names) == CLASSES:
        subsets.update({16: SUBSET_16, 13: SUBSET_13})

    def value(x):
        return None if x.isnan() else x.item()

    result = {}
    for count, members in subsets.items():
        result[f"miou{count}"] = value(per_class[list(members)].nanmean())
    result["iou"] = {name: value(x) for name, x in zip(names, per_class)}
    return result


def upsample(logits: Tensor, size: tuple) -> Tensor:
    """(B,C,h,w) to (B,C,H,W) for size (W,H): bilinear, align_corners=True, as in both methods."""
    return F.interpolate(logits, size[::-1], mode="bilinear", align_corners=True)


def map_centres(h: int, side: int, device=None) -> Tensor:
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
    """(B,C,h,w) logits to (B,H,W) uint8 predictions at size (W,H).

    Class by class, keeping the larger: lean, and on the CPU faster than argmax over all planes.
    """
    best = upsample(logits[:, :1], size)[:, 0]  # (B, H, W)
    label = torch.zeros(best.shape, dtype=torch.uint8, device=logits.device)
    for c in range(1, logits.shape[1]):
        plane = upsample(logits[:, c : c + 1], size)[:, 0]
        label.masked_fill_(plane > best, c)
        torch.maximum(best, plane, out=best)
    return label


@contextlib.contextmanager
def predicting():
    """Inside, no gradients, and CUDA's convolutions do without TF32: predictions are float32's."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def main_logits(networks: list, images: Tensor) -> Tensor:
    """The main head's logits (B,C,h,w), mean over networks, of uint8 RGB images (B,3,H,W)."""
    x = normalize(images)
    return sum(network(x).main for network in networks) / len(networks)


@predicting()
def predict(network: DeepLabV2, image, size=None) -> Tensor:
    """(H,W) uint8 trainIds of one image at its own size; (B,H,W) of a batch.

    image: a Pillow image, or a uint8 RGB tensor (3,H,W) or (B,3,H,W). The network, in eval mode,
    sees it at `size` (W,H): by default its own aspect with the area of network.input_size.
    """
    if network.training:
        raise ValueError("predict takes a network in eval mode: call network.eval() first")
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() not in (3, 4) or image.shape[-3] != 3:
            shape = f"{image.dtype} {tuple(image.shape)}"
            raise ValueError(f"predict takes uint8 RGB (3, H, W) or (B, 3, H, W), not {shape}")
        if image.dim() == 4:
            return torch.stack([predict(network, one, size) for one in image])
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    if not isinstance(image, Image.Image):
        raise ValueError(f"predict takes a Pillow image or a uint8 tensor, not {type(image)}")
    image = upright_rgb(image)
    small = resize(image, size or same_area(image.size, network.input_size), "image")
    x = pil_to_tensor(small)[None].to(next(network.parameters()).device)
    return upsampled_argmax(main_logits([network], x), image.size)[0]


def same_area(size: tuple, like: tuple) -> tuple:
    """The size (W,H) of the aspect of `size` and the area of `like`; no side is below 32."""
    factor = (like[0] * like[1] / (size[0] * size[1])) ** 0.5
    return tuple(max(32, round(side * factor)) for side in size)


@predicting()
def evaluate(networks: list, dataset: Labelled, device, workers: int = 0, on_image=None) -> dict:
    """`scores` of the networks' mean logits over a dataset with native-size labels, with
    "confusion" (C,C) int64, "images" and "seconds".

    Eval mode, main head, logits upsampled to the label's size, argmax. The networks stay as they
    are, their mode included. Ranks share the images, and all get the result. on_image(name, logits
    (1,C,h,w), prediction (H,W) uint8), if given, sees every image.
    """
    begin = time.perf_counter()
    networks = [inference_copy(network) for network in networks]
    C = dataset.num_classes
    confusion = torch.zeros(C, C, dtype=torch.int64, device=device)
    for item in one_by_one(dataset, workers, device):
        image = item["image"][None].to(device, non_blocking=True)
        label = item["label"].to(device, non_blocking=True)
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


def all_reduce(tensor: Tensor, operation: str = "SUM") -> Tensor:
    """The tensor, replaced in place by its SUM or MAX over the ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def merge_ranks(own: dict) -> dict:
    """The dicts of all ranks in one."""
    parts = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def barrier():
    if world_size() > 1:
        dist.barrier()


def average_over_ranks(*modules: nn.Module):
    """Average gradients and BatchNorm's running statistics over the ranks, in one message."""
    if world_size() == 1:
        return
    tensors = []
    for module in modules:
        tensors += [p.grad for p in module.parameters() if p.grad is not None]
        tensors += [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    flat = all_reduce(torch.cat([t.reshape(-1) for t in tensors])) / world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


def set_up(name) -> torch.device:
    """The device of this process: cpu or cuda as named, or CUDA where there is one. Joins the other
    processes if torchrun started this one; of these, only rank 0 prints."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use cpu or repair the driver")
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True  # in training; see predicting
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        visible = torch.cuda.device_count()
        if local >= visible:
            raise UserError(f"torchrun's process {local + 1} has no GPU of {visible}: start fewer")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # One group: gloo takes CPU tensors (signals, log, names, barriers), NCCL those of the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
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


class StopSignal:
    """SIGTERM and SIGINT set a flag, so that the training loop can save before it leaves. A second
    one, more than 3 seconds later, ends the process at once. `close` puts the old handlers back and
    raises again a signal that came after the loop's last look."""

    def __init__(self):
        self.number = 0
        self.since = 0.0
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        if not self.number:
            self.number = number
            self.since = time.monotonic()
            with contextlib.suppress(OSError):  # the terminal, or tee, may be gone
                # not print, which may be at work
                os.write(2, b"\nstopping after a save; run the same command again to go on\n")
        elif time.monotonic() - self.since > 3:  # torchrun repeats a Ctrl-C to its processes
            os._exit(128 + number)

    def agreed(self) -> int:
        """The signal that came, to this or to another rank; 0 for none. Of a tensor on the CPU, so
        that it waits for the other ranks and not for the GPU."""
        return int(all_reduce(torch.tensor(self.number), "MAX"))

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number:
            signal.raise_signal(self.number)


# ====================================================================== resume, save, log


def due(it: int, every: int, iters: int) -> bool:
    """Whether what happens every so many iterations and at the end is due when `it` are done;
    every = 0: at the end alone."""
    return it == iters or (it > 0 and every > 0 and it % every == 0)


def earlier_run(folder, settings: dict):
    """The content of last.pth in `folder`, None without one; refuses a run of other settings."""
    path = Path(folder) / "last.pth"
    if not path.exists():
        log = Path(folder) / "log.jsonl"
        opening = log.read_text(errors="replace")[:8] if log.exists() else ""
        # a run writes neither of the two like this, and would overwrite them
        if (Path(folder) / "best.pth").exists() or not '{"iter":'.startswith(opening):
            raise UserError(f"{folder} holds best.pth or log.jsonl of no run: choose another --out")
        return None
    other = "choose another --out or remove the folder"
    content = read_checkpoint(path)
    found = content.get("settings")
    ours = content.get("format") == FORMAT and isinstance(content.get("iter"), int)
    if not ours or not isinstance(found, dict):
        raise UserError(f"{path} is no training checkpoint of this version: {other}")
    for name, value in settings.items():
        if found.get(name) != value:
            difference = f"{name} is {found.get(name)} there and {value} here"
            raise UserError(f"{path} is of a run of other settings ({difference}): {other}")
    return content


def resume(folder, settings: dict, state: dict) -> tuple:
    """Load last.pth of `folder` into the networks and optimizers of `state`: (its iteration, its
    other entries), or (0, {}) for a fresh start."""
    content = earlier_run(folder, settings)
    if content is None:
        return 0, {}
    try:
        for name, part in state.items():
            part.load_state_dict(content[name])
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"last.pth in {folder} does not fit this run ({reason}): remove the folder")
    return content["iter"], {name: value for name, value in content.items() if name not in state}


def save(path, it: int, settings: dict, state: dict, **more):
    """The one place where a checkpoint is written: state_dicts of `state` {"model": network, ...},
    iteration, settings, the network's input size, and plain values. Refuses weights that are not
    finite.

    No random state is needed: order and augmentation follow from seed and iteration.
    """
    networks = nn.ModuleList(part for part in state.values() if isinstance(part, nn.Module))
    finite = [tensor.isfinite().all() for tensor in networks.state_dict().values()]
    if not torch.stack(finite).all():
        raise UserError(f"a weight is not finite at iteration {it}: lower --lr; not saved")
    if rank() == 0:
        content = {name: part.state_dict() for name, part in state.items()}
        input_size = state["model"].input_size
        content.update(format=FORMAT, iter=it, settings=settings, input_size=input_size, **more)
        with atomic_write(path) as file:
            torch.save(content, file)
    barrier()


def read_log(path) -> list:
    """The records of a log.jsonl, each a dict with "iter", scores in percent or None; other lines,
    say one that a kill cut or a hand edited, are left out."""
    records = []
    for line in Path(path).read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
            record = json.loads(line)
            percents = [value for name, value in record.items() if name.startswith("miou")]
            if record.get("event") == "evaluation":
                percents += record["iou"].values()
            fine = all(value is None or 0 <= value <= 100 for value in percents)
            if fine and 0 <= record["iter"] < 10**12:
                records.append(record)
    return records


def evaluations(records: list) -> list:
    return [record for record in records if record.get("event") == "evaluation"]


class Log:
    """log.jsonl of a stage: a JSON line for every start, record of losses, evaluation and, in BCL,
    round of labels, with a line each on the terminal. Scores live here and nowhere else."""

    def __init__(self, folder, stage: str, about: str, start: int, iters: int, settings: dict):
        """Keeps an earlier log's records up to iteration `start`."""
        self.path = Path(folder) / "log.jsonl"
        self.stage = stage
        self.iters = iters
        self.pending = []  # (image names, {term: scalar tensor}) of the iterations since a record
        self.restart_clock(start)
        kept = read_log(self.path) if self.path.exists() else []
        self.records = [record for record in kept if record["iter"] <= start]
        self.evaluated = {r["iter"]: mean_iou(r) for r in evaluations(self.records)}
        if rank() == 0:
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        if start >= iters and self.records:
            print(f"{stage}: already trained, {self.path.parent / 'last.pth'}")
        else:
            header = {"event": "start", "stage": stage, "iters": iters, "about": about}
            self.write(iter=start, **header, settings=settings, **versions())
            goes_on = f"; goes on from iteration {start}" if start else ""
            print(f"{stage}: {about}{goes_on}", flush=True)

    def restart_clock(self, it: int):
        self.since = it
        self.waited = 0.0
        self.clock = time.perf_counter()

    def write(self, **record):
        self.records.append(record)
        if rank() == 0:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def add(self, batches: list, **losses):
        """Note an iteration's `Batches` and loss terms (scalar tensors, or None)."""
        names = [name for source in batches for name in source.names]
        terms = {term: x.detach().float() for term, x in losses.items() if x is not None}
        self.pending.append((names, terms))
        self.waited += sum(source.waited for source in batches)

    def losses(self, it: int, device, **more):
        """A record of the last iteration's losses and `more`, with speed since the record before
        and peak memory. Apart from saves, evaluations and BCL's new rounds, the loop's only wait
        for the GPU. Refuses losses that are not finite.
        """
        terms = list(self.pending[-1][1])
        values = torch.stack([torch.stack(list(losses.values())) for _, losses in self.pending])
        values = values.cpu()  # (iterations, terms)
        bad = (~values.isfinite()).nonzero().tolist()
        if bad:
            i, t = bad[0]
            iteration = it - len(values) + 1 + i
            images = ", ".join(self.pending[i][0])
            what = f"{terms[t]} is {values[i, t]:g} at iteration {iteration} (images {images})"
            raise UserError(f"{what}: lower --lr, or look at these images; nothing is saved")
        last = all_reduce(values[-1].clone()) / world_size()
        losses = dict(zip(terms, last.tolist()))
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        rate = (it - self.since) / seconds
        speed = {"it_per_s": rate, "seconds": seconds, "data_seconds": self.waited}
        speed["peak_memory_mb"] = peak_memory_mb(device)
        self.write(iter=it, **losses, **more, **speed)
        text = "  ".join(f"{term.removeprefix('loss_')} {x:.3f}" for term, x in losses.items())
        left = f"{rate:.2f} it/s  {(self.iters - it) / max(rate, 1e-9) / 60:.1f} min left"
        print(f"{self.stage} {it}/{self.iters}  {text}  {left}", flush=True)
        self.pending = []
        self.restart_clock(it)

    def evaluation(self, it: int, result: dict):
        """Record the result of `evaluate`."""
        record = {name: value for name, value in result.items() if name != "confusion"}
        self.write(iter=it, event="evaluation", **record)
        self.evaluated[it] = mean_iou(result)
        mean = f"mIoU {mean_iou(result):.1f} on {result['images']} validation images"
        print(f"{self.stage} {it}/{self.iters}  {mean}", flush=True)
        self.restart_clock(it)  # an evaluation is no training time

    def is_best(self, result: dict) -> bool:
        """Whether a result is above all recorded ones: an oracle, chosen on validation labels."""
        return mean_iou(result) > max(self.evaluated.values(), default=-1.0)


def mean_iou(result: dict) -> float:
    """The first mean of a result or record; 0, the lowest, where no class has a pixel."""
    return next((value or 0.0 for name, value in result.items() if name.startswith("miou")), 0.0)


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
    import resource  # not on Windows

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ====================================================================== pictures


def grey(values: Tensor) -> np.ndarray:
    """(H,W) values in 0..1 to an (H,W,3) uint8 picture."""
    plane = values.clamp(0, 1).mul(255).round().byte().cpu().numpy()
    return np.repeat(plane[..., None], 3, axis=2)


def write_grid(path, titles: list, rows: list, num_classes: int, height: int = 128):
    """A PNG of rows of pictures, all in one size, with a title over each column. A picture is an
    image (H,W,3) uint8 or a label (H,W) uint8 of trainIds, which is coloured."""
    first = rows[0][0]
    size = (round(height * first.shape[1] / first.shape[0]), height)
    cells = []
    for picture in itertools.chain(*rows):
        if picture.ndim == 3:
            cell = resize(Image.fromarray(picture), size, "image")
        else:
            label = resize(Image.fromarray(picture), size, "label")
            cell = Image.fromarray(palette(num_classes)[np.asarray(label)])
        cells.append(pil_to_tensor(cell))
    grid = torchvision.utils.make_grid(torch.stack(cells), len(titles), pad_value=255)  # (3, H, W)
    grid = F.pad(grid, (0, 0, 20, 0), value=255)  # room for the titles
    sheet = Image.fromarray(grid.permute(1, 2, 0).numpy())
    for column, title in enumerate(titles):
        corner = (column * (size[0] + 2) + 4, 4)
        ImageDraw.Draw(sheet).text(corner, title, "black", ImageFont.load_default(13))
    write_png(path, np.asarray(sheet))


@predicting()
def write_panel(path, networks: dict, dataset: Images, indices, device, entropy):
    """One PNG with a row for each of these images of the dataset: image, ground truth if it has
    labels, prediction of each of {title: network}, entropy of the last (black 0, white 1).

    The networks are of `inference_copy` and see images at the dataset's size. entropy: a function
    of logits (1,C,H,W) to (1,H,W) in 0..1.
    """
    rows = []
    for index in indices:
        image, label = dataset.open(index)
        row = [np.asarray(image)]
        titles = ["image"]
        if label is not None:
            row.append(np.asarray(label))
            titles.append("ground truth")
        x = pil_to_tensor(resize(image, dataset.size, "image"))[None].to(device)
        for network in networks.values():
            logits = main_logits([network], x)
            row.append(upsampled_argmax(logits, image.size)[0].cpu().numpy())
        row.append(grey(entropy(upsample(logits, image.size))[0]))
        rows.append(row)
    write_grid(path, [*titles, *networks, "entropy"], rows, network.num_classes)


@predicting()
def report(out, runs: dict, validation: Labelled, device, entropy):
    """Print the last scores of runs {title: folder} and draw their predictions, out/panel.png, for
    the two images of lowest and the two of highest mean entropy, of at most 24 that are spread over
    the set; entropy as in `write_panel`, of the last run."""
    columns = {}
    networks = {}
    for title, folder in runs.items():
        columns[title] = evaluations(read_log(Path(folder) / "log.jsonl"))[-1]
        networks[title] = inference_copy(load(Path(folder) / "last.pth")).to(device)
    images = columns[title].get("images")  # which the set had then
    print(f"\nIoU in percent on {images} validation images, last checkpoints:")
    print(score_table(columns))
    means = {}
    for index in spread(len(validation), 24):
        image = validation[index]["image"][None].to(device)
        logits = main_logits([networks[title]], image)  # of the last run
        means[index] = entropy(logits).mean().item()
    order = sorted(means, key=means.get)
    shown = list(dict.fromkeys(order[:2] + order[-2:]))
    write_panel(Path(out) / "panel.png", networks, validation, shown, device, entropy)
    print(f"\npictures: {Path(out) / 'panel.png'}")
