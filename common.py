"""What both methods share: classes, DeepLab-V2, weight files, dataset readers, evaluation,
checkpoints, log, pictures.

No flag, no loss and no training loop is in this file: those are the methods, and each method is one
file. Conventions: sizes are (W, H), tensors are (B, C, H, W), labels are trainIds 0..C-1 with 255 =
ignore. Images travel as uint8 RGB and become float BGR minus the mean in `normalize`, on the
device.

Contents: errors and files · classes · network · weight files · readers · sampling · evaluation · device and ranks ·
          resume, save, log · pictures


"""

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import urllib.error
import warnings
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
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.models.resnet import Bottleneck

# ====================================================================== errors and files


class UserError(Exception):
    """Something the user can put right: one sentence that names the file or flag and what to do."""

    def __init__(self, message: str):
        # A DataLoader worker passes its exception on as a printed traceback that ends in
        # "UserError: <the sentence>".
        sentence = message.split("UserError: ")[-1]
        super().__init__(" ".join(sentence.splitlines()))


def as_sentence(error: Exception) -> str | None:
    """What to tell the user about an exception that input or machine caused; None for what may be a
    bug of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, torch.cuda.OutOfMemoryError) or ("CUDA" in text and "out of memory" in text):
        return "out of GPU memory: lower the batch or image sizes, or add --amp or --checkpoint-activations"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "out of memory: lower --workers, the batch size or the image sizes"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"a process that reads images died ({text}): lower --workers, or give it more (shared) memory"
    if isinstance(error, dist.DistError) or (world() > 1 and "peer" in text):
        return "another of torchrun's processes ended; its message says why"
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or text}; check path, permissions and disk"
    return None


def launch(main):
    """Run a script's main(). A user's mistake becomes one line on stderr and exit status 2, an
    interrupt 130."""
    # so that temporary files are removed
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal without λ prints an escape instead of failing
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
        if dist.is_initialized():
            # a normal exit would wait for the other processes, which may wait for this one
            os._exit(2)
        sys.exit(2)


@contextlib.contextmanager
def writing(path):
    """A full disk, a missing permission or a folder in the way become a UserError that names
    `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path} ({reason}): free the disk, or choose another folder") from None


@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for binary writing. The file appears whole or not at all: temporary file, fsync,
    rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def write_png(path, array: np.ndarray, palette=None):
    """(H,W) uint8 labels, in colour if a palette (C,3) is given, or an (H,W,3) uint8 image, as PNG.

    The pixels of a label file stay trainIds: the palette inside it only changes how viewers show
    them.
    """
    image = Image.fromarray(array)
    if palette is not None:
        colours = np.zeros((256, 3), dtype=np.uint8)  # 255, no label, stays black
        colours[: len(palette)] = palette
        image.putpalette(colours.tobytes())
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def lock(out):
    """Keep other runs out of the folder `out`, until this process ends. Returns what must be kept
    alive.

    A lock of fcntl belongs to the process: reading processes do not inherit it, and kill -9 ends
    it. Temporary files that such a kill left behind are removed, now that no other run can be
    writing them.
    """
    import fcntl  # not on Windows, where evaluation still works

    if rank() > 0:
        return None
    with writing(out):
        Path(out).mkdir(parents=True, exist_ok=True)
        file = open(Path(out) / ".lock", "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out} is in use by another run: wait for it, or choose another --out") from None
        for leftover in Path(out).rglob(".*.tmp"):
            leftover.unlink()
    return file


def fingerprint(paths) -> str:
    """A digest of files by name and size, which tells data sets apart wherever they lie."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{Path(path).name} {os.stat(path).st_size}\n".encode())
    return digest.hexdigest()[:16]


def content_digest(paths) -> str:
    """A digest of what files contain, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def network_digest(network: nn.Module) -> str:
    """A digest of all weights and statistics of a network."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ====================================================================== classes

IGNORE = 255
# class, Cityscapes id (also that of GTA5, Synscapes, ACDC and Dark Zurich), SYNTHIA id, colour; the
# row is the trainId
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
CLASSES = tuple(row[0] for row in CLASS_TABLE)
CITYSCAPES_IDS = tuple(row[1] for row in CLASS_TABLE)
SYNTHIA_IDS = tuple(row[2] for row in CLASS_TABLE)
PALETTE = np.array([row[3] for row in CLASS_TABLE], dtype=np.uint8)
# SYNTHIA has no terrain, truck and train
SUBSET_16 = tuple(c for c in range(19) if c not in (9, 14, 16))
# and is also reported without wall, fence and pole
SUBSET_13 = tuple(c for c in SUBSET_16 if c not in (3, 4, 5))


def palette_for(num_classes: int) -> np.ndarray:
    """(num_classes, 3) uint8 colours: Cityscapes' for up to 19 classes, well spread fixed ones
    beyond."""
    extra = np.random.default_rng(0).integers(30, 256, (max(0, num_classes - 19), 3), dtype=np.uint8)
    return np.concatenate([PALETTE, extra])[:num_classes]


def colour(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(H,W) trainIds to (H,W,3) uint8. 255, and whatever else is no class, is black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:num_classes] = palette_for(num_classes)
    return table[labels]


def class_names(num_classes: int) -> tuple:
    if num_classes == 19:
        return CLASSES
    if num_classes == 16:  # networks trained on SYNTHIA's classes alone
        return tuple(CLASSES[c] for c in SUBSET_16)
    return tuple(str(c) for c in range(num_classes))


def trainid_table(ids) -> np.ndarray:
    """256-entry uint8 table from a dataset's label id to trainId. Every id that is not listed maps
    to 255."""
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[list(ids)] = np.arange(len(ids), dtype=np.uint8)
    return table


# ====================================================================== network

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)


def normalize(images: Tensor) -> Tensor:
    """RGB 0..255 (B,3,H,W), uint8 or float, to the network's input: float32 BGR 0..255 minus the
    mean, no division."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"normalize takes (B, 3, H, W) images in RGB, not {tuple(images.shape)}")
    bgr = images.flip(1).float()
    # as numbers: a tensor of them would make the host wait for the GPU
    for channel, mean in enumerate(MEAN_BGR):
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
        dilations = (6, 12, 18, 24)
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=d, dilation=d) for d in dilations
        )
        for conv in self.conv2d_list:
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        return sum(conv(features) for conv in self.conv2d_list)


class DeepLabV2(nn.Module):
    """DeepLab-V2 on a Caffe-style dilated ResNet: images (B,3,H,W) from `normalize` to a
    `Prediction` at stride 8.

    layers and width are blocks per stage and channels of the stem; (3,4,23,3) and 64 make the
    papers' ResNet-101, whose published checkpoints load by name. aux=False leaves out layer5, the
    auxiliary head on layer3. BatchNorm's affine parameters are frozen, its statistics are not (see
    `set_mode`). A 1024x512 image gives a 129x65 map. Weights and activations lie channels last,
    with which convolutions are faster.
    """

    # True: keep each block's input alone, and compute the rest again going backward
    checkpoint_activations = False

    def __init__(self, num_classes: int = 19, layers=(3, 4, 23, 3), width: int = 64, aux: bool = True):
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
        # float(): under autocast convolutions give bfloat16, but losses and entropies are taken in
        # float32.
        main = self.layer6(features).float()
        aux = None if self.layer5 is None else self.layer5(middle).float()
        return Prediction(main, aux, features)

    def run_blocks(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return stage(x)
        for block in stage:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            x = checkpoint(block, x, context_fn=lambda: once_only_statistics(block), **options)
        return x

    def parameter_groups(self, backbone_factor: float, head_factor: float) -> list:
        """Optimizer groups that list each parameter once, with its factor on the learning rate as
        "lr_factor"."""
        heads = []
        trunk = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                group = heads if name.startswith(("layer5.", "layer6.")) else trunk
                group.append(parameter)
        return [{"params": trunk, "lr_factor": backbone_factor}, {"params": heads, "lr_factor": head_factor}]


def residual_stage(channels: int, planes: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
    """`blocks` bottlenecks from `channels` to 4 * planes channels. Every 3x3 convolution has the
    dilation."""
    shortcut = nn.Sequential(
        nn.Conv2d(channels, 4 * planes, 1, stride=stride, bias=False),
        nn.BatchNorm2d(4 * planes),
    )
    first = Bottleneck(channels, planes, downsample=shortcut, dilation=dilation)
    # Caffe strides on the 1x1 convolution, torchvision would on the 3x3
    first.conv1.stride = (stride, stride)
    rest = [Bottleneck(4 * planes, planes, dilation=dilation) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def once_only_statistics(block: nn.Module) -> tuple:
    """The contexts of a checkpointed block's two forward passes. The second must not move running
    statistics again."""

    @contextlib.contextmanager
    def second_pass():
        norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None
        try:
            yield
        finally:
            for norm, (momentum, count) in zip(norms, before):
                norm.momentum = momentum
                norm.num_batches_tracked = count

    return contextlib.nullcontext(), second_pass()


def set_mode(network: nn.Module, bn: str):
    """Training mode. bn="batch" (both papers): BatchNorm uses batch statistics and moves its
    running ones, even at batch size 1. bn="running": it normalises by its running statistics,
    which stay as they are."""
    network.train()
    for module in network.modules():
        if bn == "running" and isinstance(module, nn.BatchNorm2d):
            module.eval()


def inference_copy(network: DeepLabV2) -> DeepLabV2:
    """A copy for prediction: eval mode, BatchNorm folded into the convolutions, no auxiliary head.
    `network` stays."""
    network = copy.deepcopy(network).eval()
    network.layer5 = None
    network.conv1 = fuse_conv_bn_eval(network.conv1, network.bn1)
    network.bn1 = nn.Identity()
    for block in network.modules():
        if isinstance(block, Bottleneck):
            for i in (1, 2, 3):
                conv = getattr(block, f"conv{i}")
                setattr(block, f"conv{i}", fuse_conv_bn_eval(conv, getattr(block, f"bn{i}")))
                setattr(block, f"bn{i}", nn.Identity())
            if block.downsample is not None:
                block.downsample = fuse_conv_bn_eval(*block.downsample)
    return network


# ====================================================================== weight files

FORMAT = "intrada-bcl 2"  # header of our own checkpoints
CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "ema_model")
PREFIXES = ("module.", "_orig_mod.", "model.")
# kind of file: heads that it may leave at their initial value
WEIGHT_KINDS = {
    "our checkpoint": ("layer5.",),  # BCL's networks have no auxiliary head
    "AdvEnt / IntraDA checkpoint": (),
    "AdvEnt, single level": ("layer5.",),
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
        text = f"{self.kind}: loaded {len(self.loaded)} tensors"
        for names, verb in ((self.skipped, "skipped"), (self.initialised, "kept initial")):
            text += f", {verb} {len(names)}"
            if names:
                text += f" ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        return text


def read_checkpoint(path) -> dict:
    """The dict of tensors and plain values in a .pth file. Code in a file is never run
    (weights_only)."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: name the .pth file in it")
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    try:
        if zipfile.is_zipfile(path):  # torch's own reader does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path} is damaged ({damaged} fails its checksum): download or train it again")
        with warnings.catch_warnings():  # about formats that are refused below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: check the path") from None
    except PermissionError:
        raise UserError(f"cannot read {path}: change its permissions") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no file of plain tensors (loading it would run code, or it is damaged)") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can make torch stumble anywhere
        kind = type(error).__name__
        raise UserError(f"{path} is truncated or no checkpoint ({kind}): download or train it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: bring one of a DeepLab-V2")
    return content


def read_safetensors(path) -> dict:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: reading it needs a package, pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): bring the file again") from None


def plain_state(content: dict, path) -> dict:
    """{name: tensor} of a checkpoint's content: out of its containers, without prefixes, each
    tensor looked at."""
    while True:
        inner = [content[key] for key in CONTAINERS if isinstance(content.get(key), dict)]
        if not inner:
            break
        content = inner[0]
    state = {}
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            continue
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if name in state:
            raise UserError(f"{path} holds {name} twice, under two prefixes: save one network in one file")
        state[name] = value
        if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            raise UserError(f"{path}: {name} is no plain dense tensor: save it as float32")
        if value.is_complex():
            raise UserError(f"{path}: {name} is complex: save it as float32")
        # float(): float8 knows no isfinite
        if value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; take an earlier checkpoint")
        if name.endswith("running_var") and (value < 0).any():
            raise UserError(f"{path}: {name} holds a variance below 0: the file is damaged, bring it again")
    return state


def without(state: dict, *prefixes) -> tuple:
    """(state without the names that start with a prefix, those names)."""
    kept = {name: value for name, value in state.items() if not name.startswith(prefixes)}
    return kept, [name for name in state if name not in kept]


def layer5_as_main(state: dict) -> dict:
    return {name.replace("layer5.", "layer6."): value for name, value in state.items()}


def head_channels(state: dict, layer: str) -> int:
    """Input channels of a head, 0 without that head."""
    weight = state.get(f"{layer}.conv2d_list.0.weight")
    return weight.shape[1] if weight is not None and weight.dim() == 4 else 0


def parse_weights(content: dict, path="weights") -> tuple:
    """(kind, state dict under our names, skipped names) of any of WEIGHT_KINDS, told apart by
    content alone."""
    state = plain_state(content, path)
    aux_channels = head_channels(state, "layer5")
    main_channels = head_channels(state, "layer6")
    if content.get("format") == FORMAT:
        return "our checkpoint", state, []
    if state and all(name.startswith("Scale.") for name in state):
        kept, skipped = without(state, "Scale.layer5.")
        return "initial weights (Scale.*)", {name[len("Scale.") :]: kept[name] for name in kept}, skipped
    if "fc.weight" in state and "conv1.weight" in state:
        kept, skipped = without(state, "fc.")
        # torchvision's input is RGB, 0..1, divided by std; ours is BGR, 0..255. The means agree to
        # one grey level.
        std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
        kept["conv1.weight"] = (kept["conv1.weight"] / (255 * std)).flip(1)
        return "torchvision ResNet", kept, skipped
    if any(name.startswith("target_conv1.") for name in state):
        stem = {name[len("target_") :]: state[name] for name in state if name.startswith("target_")}
        kept, skipped = without(state, "target_", "layer6.", *stem)
        skipped = [name for name in skipped if not name.startswith("target_")]
        return "BCL release", layer5_as_main({**kept, **stem}), skipped
    if aux_channels and main_channels == 2 * aux_channels:
        return "AdvEnt / IntraDA checkpoint", state, []
    if main_channels and not aux_channels:
        return "AdvEnt, single level", state, []
    if aux_channels and not main_channels:
        return "single-level DeepLab", layer5_as_main(state), []
    first = ", ".join(list(state)[:3]) or "no tensor"
    raise UserError(f"{path} is no weight file of a DeepLab-V2 (it begins with {first}): see README for what is read")


def load_weights(network: DeepLabV2, source, path="weights") -> WeightReport:
    """Load a weight file (a path, or its content as a dict) into the network; says what was loaded,
    skipped and kept.

    Only the heads that WEIGHT_KINDS names may keep their initial value. UserError if the file is
    unreadable, of another architecture or class count, or lacks anything else (num_batches_tracked
    apart).
    """
    if not isinstance(source, dict):
        path = source
        source = read_checkpoint(source)
    kind, state, skipped = parse_weights(source, path)
    if network.layer5 is None:
        state, unused = without(state, "layer5.")
        skipped = skipped + unused
    own = network.state_dict()
    absent = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    initialised = [name for name in absent if WEIGHT_KINDS[kind] and name.startswith(WEIGHT_KINDS[kind])]
    wrong = [name for name in state if name not in own or own[name].shape != state[name].shape]
    wrong += [name for name in absent if name not in initialised]
    if wrong:
        found = tuple(state[wrong[0]].shape) if wrong[0] in state else "missing"
        wanted = tuple(own[wrong[0]].shape) if wrong[0] in own else "missing"
        layers = ",".join(map(str, network.layers))
        raise UserError(
            f"{path} ({kind}) does not fit: {wrong[0]} is {found} in the file and {wanted} in the network;"
            f" check --num-classes {network.num_classes}, --layers {layers}, --width {network.width}"
        )
    for name in state:
        if own[name].is_floating_point() and not state[name].is_floating_point():
            raise UserError(f"{path} ({kind}): {name} has type {state[name].dtype}; bring floating point weights")
    network.load_state_dict({**own, **state})
    return WeightReport(kind, list(state), skipped, initialised)


def build_network(path, content: dict) -> tuple:
    """(DeepLabV2, WeightReport) of a checkpoint with trained heads. The architecture is read off
    its tensors."""
    _, state, _ = parse_weights(content, path)
    try:
        layers = []
        for i in (1, 2, 3, 4):
            blocks = {int(name.split(".")[1]) for name in state if name.startswith(f"layer{i}.")}
            layers.append(1 + max(blocks))
        num_classes = state["layer6.conv2d_list.0.bias"].shape[0]
        width = state["conv1.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{path} has no trained classifier (layer6): name a checkpoint, not initial weights") from None
    # before it is built
    if not (2 <= num_classes <= 255 and 2 <= width <= 1024 and max(layers) <= len(state)):
        raise UserError(f"{path}: {num_classes} classes, width {width}, blocks {layers}: this file is damaged")
    network = DeepLabV2(num_classes, layers, width, aux=head_channels(state, "layer5") > 0)
    return network, load_weights(network, content, path)


def load(path) -> DeepLabV2:
    """The trained network in a checkpoint of ours or of a published kind, in eval mode, on the CPU.

    Its `input_size` (W,H) is what it was trained with, 1024x512 where the file does not say;
    `report` what was loaded.
    """
    content = read_checkpoint(path)
    network, network.report = build_network(path, content)
    known = content.get("input_size")
    whole = isinstance(known, (tuple, list)) and len(known) == 2 and all(isinstance(s, int) and s >= 32 for s in known)
    network.input_size = tuple(known) if whole else (1024, 512)
    return network.eval()


def initial_weights(init: str):
    """What an --init flag names: None for none, torchvision's state dict for imagenet, else the
    content of the file."""
    if init == "none":
        return None
    if init != "imagenet":
        if not Path(init).is_file():
            raise UserError(f"no weight file at --init {init}: give imagenet, none or a file")
        return read_checkpoint(init)
    weights = torchvision.models.ResNet101_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (urllib.error.URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        name = weights.url.split("/")[-1]
        raise UserError(
            f"cannot fetch ImageNet weights ({error}): put {name} into {folder}, or name a file with --init"
        ) from None


# ====================================================================== readers

# Pillow on broken files
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, zipfile.zlib.error)


class Layout(NamedTuple):
    """Where a dataset keeps its files below its root, and what its label pixels say. {split} is
    train, val or test."""

    images: str  # folder; may hold a * for one level of folders
    labels: str
    image_suffixes: tuple
    label_suffix: str
    ids: tuple = CITYSCAPES_IDS  # label id of every trainId
    last_id: int = 33  # ids run from 0 to this one; 255 is the -1 of ids kept in 8 bits
    by_file_name: bool = False  # images and labels pair by the file's name alone, not by its path


# The first layout of a dataset whose image folder exists is taken.
LAYOUTS = {
    "gta5": (
        Layout("images", "labels", (".png",), ".png"),
        # ten archives, unpacked
        Layout("*_images/images", "*_labels/labels", (".png",), ".png", by_file_name=True),
    ),
    "synthia": (
        Layout("RAND_CITYSCAPES/RGB", "RAND_CITYSCAPES/GT/LABELS", (".png",), ".png", SYNTHIA_IDS, 22),
        Layout("RGB", "GT/LABELS", (".png",), ".png", SYNTHIA_IDS, 22),
    ),
    "synscapes": (Layout("img/rgb", "img/class", (".png",), ".png"),),
    "cityscapes": (
        Layout("leftImg8bit/{split}", "gtFine/{split}", ("_leftImg8bit.png",), "_gtFine_labelIds.png"),
    ),
    "acdc": (Layout("rgb_anon/*/{split}", "gt/*/{split}", ("_rgb_anon.png",), "_gt_labelIds.png"),),
    "darkzurich": (Layout("rgb_anon/{split}/night", "gt/{split}/night", ("_rgb_anon.png",), "_gt_labelIds.png"),),
    "bdd100k": (
        Layout("images/10k/{split}", "labels/sem_seg/masks/{split}", (".jpg",), ".png", tuple(range(19)), 18),
        Layout("seg/images/{split}", "seg/labels/{split}", (".jpg",), "_train_id.png", tuple(range(19)), 18),
    ),
    "folder": (
        Layout("images/{split}", "labels/{split}", (".png", ".jpg", ".jpeg"), ".png", tuple(range(255)), 254),
        Layout("images", "labels", (".png", ".jpg", ".jpeg"), ".png", tuple(range(255)), 254),
    ),
}
ROOTS = {  # names of a dataset's folder below the data root; lower case is fine, too
    "gta5": ("GTA5",),
    "synthia": ("SYNTHIA", "RAND_CITYSCAPES"),
    "synscapes": ("Synscapes",),
    "cityscapes": ("Cityscapes",),
    "acdc": ("ACDC",),
    "darkzurich": ("Dark_Zurich", "DarkZurich"),
    "bdd100k": ("BDD100K",),
}
SOURCES = ("gta5", "synthia", "synscapes", "folder")
TARGETS = ("cityscapes", "acdc", "darkzurich", "bdd100k", "folder")


def dataset_root(kind: str, data_root, own_root=None) -> Path:
    """Where a dataset lies: its own root if given, else its usual folder below the data root."""
    candidates = [Path(own_root)] if own_root else []
    if not own_root:
        for name in ROOTS[kind]:
            candidates += [Path(data_root) / name, Path(data_root) / name.lower()]
    for candidate in candidates:
        if candidate.is_dir():
            if candidate.name.lower() == "rand_cityscapes":
                return candidate.parent  # the layout names this folder itself
            return candidate
    raise UserError(f"no {kind} data at {candidates[0]}: check --data-root, or --source-root / --target-root")


def find_layout(kind: str, root: Path, split: str) -> Layout:
    """The layout that this copy of a dataset has, or the usual one, for whose folders later
    messages ask."""
    splits = [name for name in ("train", "val", "test") if (root / "images" / name).is_dir()]
    if kind == "folder":
        return LAYOUTS[kind][0 if splits else 1]
    for layout in LAYOUTS[kind]:
        if next(root.glob(layout.images.format(split=split)), None):
            return layout
    return LAYOUTS[kind][-1 if kind == "synthia" else 0]


def list_files(root: Path, pattern: str, suffixes: tuple, kind: str, by_file_name: bool = False) -> dict:
    """{name: path} of the files in the folders that match the pattern, numbers in numeric order.

    The name is the path below the pattern's part without *, less the suffix. A nested images/images
    is accepted.
    """
    folders = sorted(path for path in root.glob(pattern) if path.is_dir())
    base = root / pattern.split("/*")[0] if "/*" in pattern else root / pattern
    if folders == [base] and (base / base.name).is_dir():
        base = base / base.name
        folders = [base]
    if not folders:
        raise UserError(f"no folder {root / pattern} for {kind}: check the dataset's root, and unpack all of its archives")

    def unreadable(error):
        raise UserError(f"cannot read folder {error.filename} ({error.strerror}): change its permissions")

    found = {}
    seen = set()
    for folder in folders:
        for parent, _, names in os.walk(folder, followlinks=True, onerror=unreadable):
            real = os.path.realpath(parent)
            if real in seen:
                raise UserError(f"{parent} is {real} once more: remove the link")
            seen.add(real)
            for name in names:
                suffix = next((s for s in suffixes if name.lower().endswith(s.lower())), None)
                if suffix is None or name.startswith("."):
                    continue
                path = Path(parent, name)
                below = Path(name) if by_file_name else path.relative_to(base)
                key = below.as_posix()[: -len(suffix)]
                check_name(key, path)
                if key in found:
                    raise UserError(f"{found[key]} and {path} are two files of one name: remove one")
                found[key] = path
    if not found:
        raise UserError(f"no *{suffixes[0]} files in {folders[0]}: check the dataset's root")
    return {key: found[key] for key in sorted(found, key=natural_order)}


def check_name(key: str, path: Path):
    """Names become lines of text files: refuse line breaks and what cannot be written as UTF-8."""
    try:
        key.encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a}: the name is no UTF-8; rename the file") from None
    if len(key.splitlines()) > 1 or any(ord(letter) < 32 for letter in key):
        raise UserError(f"{str(path)!a}: the name holds a line break or a control character; rename the file")


def natural_order(key: str) -> tuple:
    folder, _, name = key.rpartition("/")
    number = int(name) if name.isdecimal() else -1
    return folder, number, name


def list_images(kind: str, root, split: str = "train") -> dict:
    """{name: image path} of a dataset, in order. Knows nothing of labels: the target reader is
    built from this."""
    layout = find_layout(kind, Path(root), split)
    return list_files(Path(root), layout.images.format(split=split), layout.image_suffixes, kind, layout.by_file_name)


def list_pairs(kind: str, root, split: str = "train") -> dict:
    """{name: (image path, label path)} of a dataset; an image or a label without a partner is
    refused."""
    root = Path(root)
    layout = find_layout(kind, root, split)
    images = list_images(kind, root, split)
    labels = list_files(root, layout.labels.format(split=split), (layout.label_suffix,), kind, layout.by_file_name)
    lonely = [name for name in images if name not in labels]
    lonely += [name for name in labels if name not in images]
    if lonely:
        raise UserError(
            f"{root}: {len(images)} images but {len(labels)} labels, {len(lonely)} without a partner, first"
            f" {', '.join(lonely[:3])}; complete the download or remove them"
        )
    return {name: (images[name], labels[name]) for name in images}


def has_labels(kind: str, root, split: str) -> bool:
    """Whether this copy of a dataset holds images and labels of the split."""
    layout = find_layout(kind, Path(root), split)
    if kind == "folder" and "{split}" not in layout.images:
        return split == "train"
    patterns = (layout.images.format(split=split), layout.labels.format(split=split))
    return all(next(Path(root).glob(pattern), None) for pattern in patterns)


def folder_classes(root, num_classes: int) -> tuple:
    """The class names in a plain folder's classes.txt, one a line; else those of `class_names`."""
    path = Path(root) / "classes.txt"
    if not path.is_file():
        return class_names(num_classes)
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): give one class name a line, as UTF-8") from None
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise UserError(f"{path} names {len(set(names))} classes, but --num-classes is {num_classes}: make them agree")
    return tuple(names)


def open_image(path, formats=("PNG", "JPEG"), low_bytes: bool = False) -> Image.Image:
    """A decoded Pillow image; a UserError that names the file if it has none of the formats, is
    broken or too large.

    low_bytes: of a 16-bit RGB file, whose channels Pillow cuts to the high byte, give the low byte
    instead.
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
            # read big-endian pairs as little-endian
            image.tile = [(*tile[:3], "RGB;16L") for tile in image.tile]
        image.load()
        return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{path} claims more than {Image.MAX_IMAGE_PIXELS} pixels: replace the file") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is no {' or '.join(formats)} file, or is cut off: bring it again") from None
    except PermissionError:
        raise UserError(f"cannot read {path}: change its permissions") from None
    except DAMAGE as error:
        raise UserError(f"cannot read {path} ({error}): the file is damaged, bring it again") from None


def read_image(path, formats=("PNG", "JPEG")) -> Image.Image:
    """An image file as 8-bit RGB, turned upright by its EXIF orientation."""
    image = ImageOps.exif_transpose(open_image(path, formats))
    if image.mode.startswith(("I", "F")):  # conversion would clip all of it to white
        raise UserError(f"{path} has mode {image.mode}, 16 or more bits of grey: bring 8-bit images")
    return image.convert("RGB")


def read_ids(path) -> np.ndarray:
    """(H,W) uint8 label ids of a PNG with one id per pixel: palette index, or grey of 1, 2, 4 or 8
    bits."""
    image = open_image(path)
    raw_mode = str(image.tile[0][3]) if image.tile else ""
    if image.mode not in ("P", "L", "1"):  # for a palette file the index is the id: never convert
        depth = "16 bits" if image.mode.startswith("I") else "not one id per pixel"
        raise UserError(f"{path} has mode {image.mode} ({depth}): bring 8-bit label ids, not colours")
    if image.format != "PNG":
        raise UserError(f"{path} is a {image.format} file, which blurs ids: bring the label as PNG")
    ids = np.asarray(image).astype(np.uint8)
    bits = Path(path).read_bytes()[24]  # bit depth, in every PNG's first chunk
    if image.mode == "L" and bits in (2, 4):
        ids = ids // (255 // (2**bits - 1))  # Pillow stretches grey of few bits to 0..255
    return ids


def read_label(path, kind: str, num_classes: int) -> Image.Image:
    """A label file as an 8-bit Pillow image of trainIds 0..num_classes-1 and 255.

    A file with many pixels that are no id of this kind of dataset is refused: more than half, and
    in a plain folder, whose ids are the trainIds themselves, more than one in a thousand.
    """
    layout = LAYOUTS[kind][0]
    if kind == "synthia":  # 16 bits a channel, class id in R; ids are below 256
        ids = np.asarray(open_image(path, low_bytes=True))[:, :, 0]
    else:
        ids = read_ids(path)
    last_id = num_classes - 1 if kind == "folder" else layout.last_id
    share = 0.001 if kind == "folder" else 0.5
    foreign = np.bincount(ids.ravel(), minlength=256)[last_id + 1 : IGNORE]
    if foreign.sum() > share * ids.size:
        value = last_id + 1 + int(np.argmax(foreign))
        raise UserError(
            f"{path}: {100 * foreign.sum() / ids.size:.1f} % of its pixels are no ids 0 to {last_id} (most often {value});"
            f" are these colours, 16 bits flattened to 8, ids of another dataset, or is --num-classes too low?"
        )
    return Image.fromarray(trainid_table(layout.ids[:num_classes])[ids])


def resize(image: Image.Image, size: tuple, kind: str) -> Image.Image:
    """To size (W, H), aspect not kept: Pillow's antialiased bicubic for an "image", nearest for a
    "label"."""
    return image.resize(size, {"image": Image.BICUBIC, "label": Image.NEAREST}[kind])


def to_tensor(image: Image.Image) -> Tensor:
    """Pillow RGB to (3,H,W), Pillow L to (H,W), both uint8."""
    array = np.array(image)
    if array.ndim == 3:
        array = np.ascontiguousarray(array.transpose(2, 0, 1))
    return torch.from_numpy(array)


class Images(Dataset):
    """Images without labels. It is given image paths and nothing else, so training cannot open a
    target label.

    An item is {"name", "image": (3,H,W) uint8 RGB}, resized to `size` if given, or made by
    transform(image, None, random generator of (seed, sample position)).
    """

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
            image, label = self.transform(image, label, np.random.default_rng((self.seed, position)))
        elif self.size:
            image = resize(image, self.size, "image")
            label = self.resize_label(label)
        item = {"name": self.names[index], "image": to_tensor(image)}
        if label is not None:
            item["label"] = to_tensor(label)
        return item

    def open(self, index: int) -> tuple:
        """(image, label or None) as stored, in Pillow's form."""
        return read_image(self.paths[index]), None

    def resize_label(self, label):
        return None

    def files(self) -> list:
        return self.paths

    def look(self):
        """Open a few files spread over the set, so that what is wrong with it shows before training
        starts."""
        for index in spread(len(self), 8):
            self.open(index)


class Labelled(Images):
    """Images with labels of one dataset kind; an item also has "label": (H,W) uint8 trainIds.

    native_labels=True keeps the label at its own size (evaluation), otherwise it is resized like
    the image. pseudo=True: labels that a network made, in a size of their own and perhaps empty.
    `classes` are the names in tables.
    """

    def __init__(
        self, pairs: dict, kind: str, num_classes: int, size=None, native_labels=False, pseudo=False, transform=None,
        seed: int = 0, classes=None,
    ):  # fmt: skip
        super().__init__({name: image for name, (image, _) in pairs.items()}, size, transform, seed)
        self.label_paths = [label for _, label in pairs.values()]
        self.kind = kind
        self.num_classes = num_classes
        self.native_labels = native_labels
        self.pseudo = pseudo
        self.classes = classes or class_names(num_classes)

    def open(self, index: int) -> tuple:
        image = read_image(self.paths[index])
        path = self.label_paths[index]
        label = read_label(path, self.kind, self.num_classes)
        ratio = image.width / image.height * label.height / label.width
        # GTA5 has pairs of 1914x1052 and 1914x1046; this is another picture
        if not self.pseudo and not 0.9 < ratio < 1.1:
            sizes = f"{label.width}x{label.height} but its image {image.width}x{image.height}"
            raise UserError(f"{path} is {sizes}: this is not its label, repair the pair")
        return image, label

    def resize_label(self, label):
        return label if self.native_labels else resize(label, self.size, "label")

    def files(self) -> list:
        return self.paths + self.label_paths

    def look(self):
        """Also refuses labels with next to no pixel of a known class, and trainIds where label ids
        are expected."""
        labels = [np.asarray(self.open(index)[1]) for index in spread(len(self), 8)]
        if self.pseudo:
            return
        known = [np.mean(label != IGNORE) for label in labels]
        if max(known) < 0.02:
            raise UserError(
                f"{self.label_paths[0]}: next to no pixel of this and other labels is of a known class; are they colours,"
                f" trainIds, 16 bits flattened to 8, or no {self.kind} labels?"
            )
        # Of trainIds taken for ids, road to sky vanish, and sign, vegetation to car turn into what
        # has ids up to 18.
        highest = max(label[label != IGNORE].max(initial=0) for label in labels)
        expects_ids = LAYOUTS[self.kind][0].ids is CITYSCAPES_IDS
        if expects_ids and np.mean(known) < 0.7 and highest < CLASSES.index("traffic light"):
            raise UserError(f"{self.label_paths[0]}: no id above 18 here and in others, are they trainIds? Bring label ids")


def validation_set(kind: str, root, num_classes: int, size, split: str = "val"):
    """The labelled images of a split for `evaluate`, labels at native size; None where the dataset
    has none."""
    if not has_labels(kind, root, split):
        return None
    classes = folder_classes(root, num_classes) if kind == "folder" else None
    return Labelled(list_pairs(kind, root, split), kind, num_classes, size, native_labels=True, classes=classes)


def spread(length: int, count: int) -> list:
    """At most `count` indices, spread evenly over range(length)."""
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(count)})


# ====================================================================== sampling


class EndlessSampler(Sampler):
    """(position, index) pairs: epoch after epoch of seeded permutations of range(length).

    The order depends on (length, seed) alone and can start at any iteration, so going on after a
    stop is exact. Of the world * batch positions of an iteration, every rank takes its own `batch`.
    """

    def __init__(self, length: int, seed: int, start: int, stop: int, batch: int):
        """Covers the iterations start..stop-1."""
        self.length = length
        self.seed = seed
        self.positions = []
        for iteration in range(start, stop):
            first = (iteration * world() + rank()) * batch
            self.positions += range(first, first + batch)

    def __len__(self):
        return len(self.positions)

    def __iter__(self):
        epoch = -1
        for position in self.positions:
            if position // self.length != epoch:
                epoch = position // self.length
                order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            yield position, int(order[position % self.length])


class Batches:
    """This rank's batches of the iterations start..stop-1: next() gives images (B,3,H,W) uint8 and
    labels (B,H,W) int64, None of an unlabelled set, on the device. `names` are those of the last
    batch, `seconds` the time waited in all."""

    def __init__(self, dataset: Images, seed: int, batch: int, start: int, stop: int, workers: int, device):
        sampler = EndlessSampler(len(dataset), seed, start, stop, batch)
        self.batches = iter(make_loader(dataset, workers, device, batch_size=batch, sampler=sampler))
        self.device = device
        self.seconds = 0.0

    def __next__(self):
        begin = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - begin
        self.names = batch["name"]
        images = batch["image"].to(self.device, non_blocking=True)
        if "label" not in batch:
            return images, None
        return images, batch["label"].to(self.device, non_blocking=True).long()


def one_by_one(dataset: Dataset, workers: int, device) -> DataLoader:
    """This rank's share of the items of a dataset (every world-th), in order, without a batch
    dimension."""
    return make_loader(dataset, workers, device, batch_size=None, sampler=range(rank(), len(dataset), world()))


def make_loader(dataset, workers: int, device, **options) -> DataLoader:
    if workers:
        options["prefetch_factor"] = 4
    pin = device.type == "cuda"
    return DataLoader(dataset, num_workers=workers, pin_memory=pin, worker_init_fn=ignore_signals, **options)


def ignore_signals(worker: int):
    """A reading process leaves when the training process does; signals to all of a job are that
    one's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ====================================================================== evaluation


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """(C,C) int64 counts of pixels, rows = label, columns = prediction. Both inputs are integer
    tensors of one shape, predictions in 0..C-1; pixels whose label is not in 0..C-1 (255,
    ignore) are left out."""
    # row C: ignore
    rows = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes).int()
    pairs = (rows * num_classes + predictions.int()).flatten()
    counts = torch.bincount(pairs, minlength=(num_classes + 1) * num_classes)
    return counts[: num_classes**2].view(num_classes, num_classes)


def iou(confusion: Tensor) -> Tensor:
    """(C,) float64 intersection over union in 0..1 from a (C,C) confusion matrix: diag / (row +
    column - diag). A class without a pixel in labels and predictions is NaN, which the means
    leave out."""
    confusion = confusion.double()
    hit = confusion.diagonal()
    return hit / (confusion.sum(0) + confusion.sum(1) - hit)


def scores(confusion: Tensor, classes=None) -> dict:
    """{"miou19", "miou16", "miou13", "iou": {class: value}} in percent; with other than 19 classes
    "miou<C>" alone. None stands for undefined."""
    num_classes = len(confusion)
    per_class = 100 * iou(confusion)
    subsets = {num_classes: range(num_classes)}
    if num_classes == 19:
        subsets.update({16: SUBSET_16, 13: SUBSET_13})

    def value(x):
        return None if x.isnan() else x.item()

    result = {f"miou{count}": value(per_class[list(members)].nanmean()) for count, members in subsets.items()}
    names = classes or class_names(num_classes)
    result["iou"] = {name: value(x) for name, x in zip(names, per_class)}
    return result


def upsample(logits: Tensor, size: tuple) -> Tensor:
    """(B,C,h,w) to (B,C,H,W) for size (W,H): bilinear, align_corners=True, as everywhere in both
    methods."""
    return F.interpolate(logits, size[::-1], mode="bilinear", align_corners=True)


def upsampled_argmax(logits: Tensor, size: tuple) -> Tensor:
    """(B,C,h,w) logits to (B,H,W) uint8 predictions at size (W,H).

    Class by class, keeping the larger: the full (B,C,H,W) map never exists, and on the CPU it is
    faster than argmax.
    """
    best = upsample(logits[:, :1], size)[:, 0]  # (B, H, W)
    label = torch.zeros(best.shape, dtype=torch.uint8, device=logits.device)
    for c in range(1, logits.shape[1]):
        plane = upsample(logits[:, c : c + 1], size)[:, 0]
        label.masked_fill_(plane > best, c)
        torch.maximum(best, plane, out=best)
    return label


def main_logits(networks: list, images: Tensor) -> Tensor:
    """Mean over the networks of the main head's logits (B,C,h,w), for uint8 RGB images (B,3,H,W)."""
    x = normalize(images)
    return sum(network(x).main for network in networks) / len(networks)


@torch.inference_mode()
def predict(network: DeepLabV2, image, size=None) -> Tensor:
    """(H,W) uint8 trainIds of one image at its own size; (B,H,W) of a batch.

    image: a Pillow image, or a uint8 RGB tensor (3,H,W) or (B,3,H,W). The network sees it at `size`
    (W,H); by default with its own aspect and the area of network.input_size. The network must be in
    eval mode.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() not in (3, 4) or image.shape[-3] != 3:
            raise ValueError(f"predict takes uint8 RGB (3,H,W) or (B,3,H,W), not {image.dtype} {tuple(image.shape)}")
        if image.dim() == 4:
            return torch.stack([predict(network, one, size) for one in image])
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    image = image.convert("RGB")
    small = resize(image, size or same_area(image.size, network.input_size), "image")
    device = next(network.parameters()).device
    return upsampled_argmax(main_logits([network], to_tensor(small)[None].to(device)), image.size)[0]


def same_area(size: tuple, like: tuple) -> tuple:
    """The size (W,H) that keeps the aspect of `size` and has the area of `like`; no side below 32."""
    factor = (like[0] * like[1] / (size[0] * size[1])) ** 0.5
    return tuple(max(32, round(side * factor)) for side in size)


@torch.inference_mode()
def evaluate(networks: list, dataset: Labelled, device, workers: int = 0, on_image=None) -> dict:
    """`scores` of the averaged logits of the networks over a dataset with native-size labels, with
    "confusion" (C,C) int64, "images" and "seconds".

    Eval mode, main head, logits upsampled to the label's size, argmax. The networks stay as they
    are, their mode included. With several ranks each takes every world-th image, and all get the
    result. on_image(name, logits (1,C,h,w), prediction (H,W) uint8), if given, sees every image.
    """
    begin = time.perf_counter()
    networks = [inference_copy(network) for network in networks]
    C = networks[0].num_classes
    confusion = torch.zeros(C, C, dtype=torch.int64, device=device)
    with full_precision():
        for item in one_by_one(dataset, workers, device):
            # (1, C, h, w)
            logits = main_logits(networks, item["image"][None].to(device, non_blocking=True))
            label = item["label"].to(device, non_blocking=True)
            prediction = upsampled_argmax(logits, label.shape[::-1])[0]
            confusion += confusion_matrix(label, prediction, C)
            if on_image:
                on_image(item["name"], logits, prediction)
    confusion = over_ranks(confusion).cpu()
    result = scores(confusion, dataset.classes)
    return {**result, "confusion": confusion, "images": len(dataset), "seconds": time.perf_counter() - begin}


def score_table(columns: dict) -> str:
    """A text table, one column per name of {name: scores}: per-class IoU and the means, in percent."""
    first = next(iter(columns.values()))
    lines = [" " * 16 + "".join(f"{name:>14}" for name in columns)]
    for row in [*first["iou"], *(key for key in first if key.startswith("miou"))]:
        line = f"{row.replace('miou', 'mIoU '):16}"
        for column in columns.values():
            value = column["iou"].get(row, column.get(row))
            line += f"{'-':>14}" if value is None else f"{value:>14.1f}"
        lines.append(line)
    return "\n".join(lines)


# ====================================================================== device and ranks


def rank() -> int:
    """Number of this process among those that torchrun started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def over_ranks(tensor: Tensor, operation: str = "SUM") -> Tensor:
    """The tensor, replaced in place by its SUM or MAX over the ranks; as it is without torchrun."""
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
    """Average gradients and BatchNorm's running statistics over the ranks, so that all go on with
    the same networks."""
    if world() == 1:
        return
    tensors = []
    for module in modules:
        tensors += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        tensors += [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    # one message instead of hundreds
    flat = over_ranks(torch.cat([t.reshape(-1) for t in tensors])) / world()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


def set_up(name) -> torch.device:
    """The device of this process: cpu or cuda as named, or CUDA where there is one. Joins the other
    processes if torchrun started this one; of these, only rank 0 prints."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to torch; use --device cpu or repair the driver")
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        # TF32 in convolutions alone; `full_precision` turns it off
        torch.backends.cudnn.allow_tf32 = True
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        visible = torch.cuda.device_count()
        if local >= visible:
            raise UserError(f"torchrun started process {local + 1} on {visible} GPUs: lower --nproc_per_node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


@contextlib.contextmanager
def full_precision():
    """Inside, CUDA's convolutions do without TF32: predictions and rankings are those of float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compiled(function, wanted: bool):
    """The function, compiled for fixed shapes if that is wanted."""
    return torch.compile(function, dynamic=False) if wanted else function


class StopSignal:
    """SIGTERM and SIGINT set a flag, so that the training loop can save before it leaves. A second
    one ends at once."""

    def __init__(self):
        self.number = 0
        self.since = 0.0
        signal.signal(signal.SIGTERM, self.note)
        signal.signal(signal.SIGINT, self.note)

    def note(self, number, frame):
        # torchrun repeats a Ctrl-C to its processes
        if self.number and time.monotonic() - self.since > 3:
            os._exit(128 + number)
        if not self.number:
            self.number = number
            self.since = time.monotonic()
            # print may be at work
            os.write(2, b"\nstopping after a save; run the same command again to go on\n")

    def agreed(self) -> int:
        """The signal that came, to this or to another rank; 0 for none."""
        if world() > 1:
            self.number = int(over_ranks(torch.tensor(self.number), "MAX"))
        return self.number


# ====================================================================== resume, save, log


def due(it: int, every: int, iters: int) -> bool:
    """Whether what happens every so many iterations (0: only at the end) happens after `it` of
    `iters`."""
    return it == iters or (it > 0 and every > 0 and it % every == 0)


def check_settings(folder, settings: dict):
    """The content of last.pth in `folder`, None without one; refuses a file of a run with other
    settings."""
    path = Path(folder) / "last.pth"
    if not path.exists():
        return None
    content = read_checkpoint(path)
    found = content.get("settings")
    if content.get("format") != FORMAT or not isinstance(found, dict) or not isinstance(content.get("iter"), int):
        raise UserError(f"{path} is no training checkpoint of this version: choose another --out or remove the folder")
    changed = [name for name in settings if found.get(name) != settings[name]]
    if changed:
        names = ", ".join(f"{name} {found.get(name)} there, {settings[name]} here" for name in changed[:3])
        raise UserError(f"{path} is of a run of other settings ({names}): choose another --out or remove the folder")
    return content


def resume(folder, settings: dict, state: dict) -> tuple:
    """Load last.pth of `folder` into the networks and optimizers of `state`: (its iteration, its
    content), or (0, {}) for a fresh start."""
    content = check_settings(folder, settings)
    if content is None:
        return 0, {}
    try:
        for name, part in state.items():
            part.load_state_dict(content[name])
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{Path(folder) / 'last.pth'} does not fit this run ({reason}): remove the folder") from None
    return content["iter"], content


def save(path, it: int, settings: dict, state: dict, **more):
    """The one place where a checkpoint is written: state_dicts of `state` {name: network,
    optimizer, ...}, iteration, settings and plain values. Refuses weights that are not finite.
    No random state is needed: order and augmentation follow from the seed and the iteration."""
    for part in state.values():
        if isinstance(part, nn.Module):
            floats = [tensor for tensor in part.state_dict().values() if tensor.is_floating_point()]
            if not torch.stack([tensor.isfinite().all() for tensor in floats]).all():
                raise UserError(f"a weight is not finite at iteration {it}: lower --lr; {path} was not written")
    if rank() == 0:
        content = {name: part.state_dict() for name, part in state.items()}
        try:
            with atomic_write(path) as file:
                torch.save({"format": FORMAT, **content, "iter": it, "settings": settings, **more}, file)
        except RuntimeError as error:  # torch's writer turns a full disk into a RuntimeError
            reason = "the disk may be full" if "enforce fail" in str(error) else str(error).splitlines()[0]
            raise UserError(f"cannot write {path} ({reason}): free the disk or choose another --out") from None
    wait_for_ranks()


def read_log(path) -> list:
    """The records of a log.jsonl, each a dict with an "iter". Lines that are none, say one cut by a
    kill, are left out."""
    records = []
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"no log at {path}: check the path") from None
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("iter"), int):
                records.append(record)
    return records


class Log:
    """log.jsonl of a run: a JSON line for every start, every record of losses and every evaluation;
    and a line each on the terminal. Scores live here and nowhere else."""

    def __init__(self, folder, stage: str, about: str, start: int, iters: int, settings: dict):
        """Keeps an earlier log's records up to iteration `start`."""
        self.path = Path(folder) / "log.jsonl"
        self.stage = stage
        self.iters = iters
        self.pending = []  # (iteration, image names, {term: scalar tensor}) since the last record
        self.since = start
        self.clock = time.perf_counter()
        self.waited = 0.0
        kept = read_log(self.path) if self.path.exists() else []
        self.records = [record for record in kept if record["iter"] <= start]
        if start >= iters and self.scores(iters):
            return print(f"{stage}: already trained, {self.path.parent / 'last.pth'}")
        header = {"iter": start, "event": "start", "stage": stage, "about": about, "settings": settings, **versions()}
        self.records.append(header)
        if rank() == 0:
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        goes_on = f"; goes on from iteration {start}" if start else ""
        print(f"{stage}: {about}{goes_on}", flush=True)

    def write(self, **record):
        self.records.append(record)
        if rank() == 0:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def add(self, names: list, **losses):
        """Note an iteration's images and loss terms (scalar tensors, None for a term that this run
        has not)."""
        losses = {term: value.detach().float() for term, value in losses.items() if value is not None}
        self.pending.append((names, losses))

    def losses(self, it: int, waited: float, device, **more):
        """A record of the last iteration's losses, with speed and peak memory since the record
        before. The only place that waits for the GPU. Refuses NaN and infinity, naming term,
        iteration and images.

        waited: seconds spent waiting for data since the start of the run; more: further values of
        the record.
        """
        terms = list(self.pending[-1][1])
        # (its, terms)
        values = torch.stack([torch.stack(list(losses.values())) for _, losses in self.pending]).cpu()
        for i, t in (~values.isfinite()).nonzero().tolist()[:1]:
            number = it - len(values) + 1 + i
            images = ", ".join(self.pending[i][0])
            raise UserError(f"{terms[t]} is {values[i, t]:g} at iteration {number} (images {images}): lower --lr")
        last = over_ranks(values[-1].clone()) / world()
        now = time.perf_counter()
        rate = (it - self.since) / max(now - self.clock, 1e-9)
        losses = dict(zip(terms, last.tolist()))
        speed = {"it_per_s": rate, "seconds": now - self.clock, "data_seconds": waited - self.waited}
        self.write(iter=it, **losses, **more, **speed, peak_memory_mb=peak_memory_mb(device))
        text = "  ".join(f"{term.removeprefix('loss_')} {value:.3f}" for term, value in losses.items())
        minutes = (self.iters - it) / rate / 60
        print(f"{self.stage} {it}/{self.iters}  {text}  {rate:.2f} it/s  {minutes:.1f} min left", flush=True)
        self.pending = []
        self.since = it
        self.waited = waited
        self.clock = time.perf_counter()

    def evaluation(self, it: int, result: dict):
        """Record the result of `evaluate`."""
        record = {name: value for name, value in result.items() if name != "confusion"}
        self.write(iter=it, event="evaluation", **record)
        mean = next(value for name, value in result.items() if name.startswith("miou"))
        print(f"{self.stage} {it}/{self.iters}  mIoU {mean or 0:.1f} on {result['images']} validation images", flush=True)
        self.clock = time.perf_counter()  # an evaluation is no training time
        self.since = it

    def evaluations(self) -> list:
        return [record for record in self.records if record.get("event") == "evaluation"]

    def scores(self, it: int):
        """The evaluation after iteration `it`, None if there was none."""
        return next((record for record in self.evaluations() if record["iter"] == it), None)

    def is_best(self, result: dict) -> bool:
        """Whether a result's mIoU is above all that are recorded: an oracle, as it is chosen on
        validation labels."""
        key = next(name for name in result if name.startswith("miou"))
        return (result[key] or 0) > max((record.get(key) or 0 for record in self.evaluations()), default=-1)


def versions() -> dict:
    """torch, torchvision and git revision, for the log."""
    revision = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty"]
        output = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
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
    """A PNG of rows of pictures of one size with a title over each column. A picture is an image
    (H,W,3) uint8 or a label (H,W) uint8 of trainIds, which is coloured."""
    first = rows[0][0]
    size = (round(height * first.shape[1] / first.shape[0]), height)
    cells = []
    for picture in (picture for row in rows for picture in row):
        kind = "image" if picture.ndim == 3 else "label"
        cell = np.asarray(resize(Image.fromarray(picture), size, kind))
        cells.append(to_tensor(cell if picture.ndim == 3 else colour(cell, num_classes)))
    # (3, H, W)
    sheet = torchvision.utils.make_grid(torch.stack(cells), nrow=len(titles), padding=2, pad_value=255)
    sheet = F.pad(sheet, (0, 0, 20, 0), value=255)  # room for the titles
    picture = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    for column, title in enumerate(titles):
        place = (column * (size[0] + 2) + 4, 4)
        ImageDraw.Draw(picture).text(place, title, "black", ImageFont.load_default(13))
    write_png(path, np.asarray(picture))


@torch.inference_mode()
def write_panel(path, networks: dict, dataset: Images, indices: list, size: tuple, device, entropy):
    """One PNG with a row for each of these images of the dataset: image, ground truth if it has
    labels, prediction of each of the networks {title: network}, entropy of the last one's (black
    0, white 1).

    The networks see images at `size` (W,H). entropy: logits (1,C,h,w) to (1,H,W) in 0..1.
    """
    networks = {title: inference_copy(network) for title, network in networks.items()}
    rows = []
    for index in indices:
        image, label = dataset.open(index)
        x = to_tensor(resize(image, size, "image"))[None].to(device)
        row = [np.asarray(image)]
        if label is not None:
            row.append(np.asarray(label))
        for network in networks.values():
            logits = main_logits([network], x)
            row.append(upsampled_argmax(logits, image.size)[0].cpu().numpy())
        row.append(grey(entropy(upsample(logits, image.size))[0]))
        rows.append(row)
    titles = ["image", *(["ground truth"] if label is not None else []), *networks, "entropy"]
    write_grid(path, titles, rows, network.num_classes)


@torch.inference_mode()
def easy_and_hard(network: DeepLabV2, dataset: Images, size: tuple, device, entropy, among: int = 24) -> list:
    """Indices of the two images of lowest and the two of highest mean entropy, of at most `among`
    spread over the set."""
    network = inference_copy(network)
    means = {}
    for index in spread(len(dataset), among):
        image = resize(dataset.open(index)[0], size, "image")
        logits = main_logits([network], to_tensor(image)[None].to(device))
        means[index] = entropy(logits).mean().item()
    order = sorted(means, key=means.get)
    return list(dict.fromkeys(order[:2] + order[-2:]))
