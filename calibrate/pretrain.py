"""Make a teacher: a PDN that describes patches so richly that what is unusual stands out.

Without a large pretrained network at hand, the PDN learns several things about each patch at once: which
program drew its texture and with which parameters, which marks lie near its centre, what it looks like (its
low cosine frequencies), and, where labelled photographs are given, what they show. Batch normalisation
speeds this up and is folded away; at the end the features are whitened (every direction in which patches
differ counts the same), which helps to tell the unusual from the usual.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from calibrate.backbone import ResNetFeatures
from calibrate.device import device_of, resolve_precision
from calibrate.distill import STATISTICS_BATCHES, distill
from calibrate.distill import STEPS as DISTILLATION_STEPS
from calibrate.foreign import ImportFailed, read_state
from calibrate.layouts import DatasetError, ImageFile
from calibrate.listener import Listener, TrainingError
from calibrate.options import Precision
from calibrate.patches import (
    SCENE_MARKS,
    SCENE_PARAMETERS,
    LabelledPhotographs,
    ProceduralLabels,
    ProceduralPatches,
    draw_scenes,
    read_labelled,
    stack_patches,
)
from calibrate.procedural import FIELDS, SHAPES
from calibrate.teacher import Teacher, fold_into_last, whitening, write_teacher
from drivers.replay import list_images
from pipeline.allocator import keep_freed_memory
from pipeline.architecture import TEACHER_CHANNELS, PdnSize
from pipeline.bundle import check_result
from pipeline.geometry import RECEPTIVE_FIELD_PX
from pipeline.networks import pdn
from pipeline.preprocess import IMAGENET_MEAN, IMAGENET_STD

Target = Literal["procedural", "photographs", "backbone"]
STEPS = 2500
_BATCH = 192
_LEARNING_RATE, _WEIGHT_DECAY, _WARM_UP_SHARE = 3e-3, 1e-2, 0.1
_STATISTICS_MOMENTUM = 0.05
_LABEL_SMOOTHING = 0.05
_COSINES = 11
"""Cosine frequencies an axis; only those whose sum stays below are kept."""
_WINDOW_PX = 9.0
"""Standard deviation of the window under which a patch's appearance is described."""
_WHITENING_BATCHES = 64


@dataclass(frozen=True)
class PretrainOptions:
    """What `inspectord pretrain` can be told."""

    out: Path
    size: PdnSize = "small"
    target: Target = "procedural"
    images: Path | None = None
    backbone: Path | None = None
    steps: int | None = None
    scenes: int = 60_000
    seed: int = 0
    precision: Precision = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a backbone is distilled; the other targets learn on the CPU."""
    overwrite: bool = False


def pretrain(options: PretrainOptions, listener: Listener | None = None) -> str:
    """Make a teacher and write it; returns the file's SHA-256.

    Raises DatasetError, ImportFailed, TrainingError, TrainingStopped, or OSError.
    """
    listener = listener or Listener()
    _check(options)
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    check_result(options.out)
    try:
        network = _distilled(options, listener) if options.target == "backbone" else _taught(options, listener)
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"the GPU's memory is full: {str(error).splitlines()[0]} Try --device cpu") from error
    origin = {
        "procedural": "procedural images with procedural labels, no photographs",
        "photographs": f"labelled photographs ({_name(options.images)}) and procedural images",
        "backbone": f"distilled from {_name(options.backbone)} on {_name(options.images)}",
    }[options.target]
    facts = {
        "name": options.out.stem.removesuffix(f"-{options.size}"),
        "origin": origin,
        "target": options.target,
        "seed": options.seed,
        "steps": options.steps or (DISTILLATION_STEPS if options.target == "backbone" else STEPS),
        "scenes": 0 if options.target == "backbone" else options.scenes,
    }
    return write_teacher(Teacher(options.size, network.state_dict(), facts), options.out)


def _check(options: PretrainOptions) -> None:
    """Refuse what would be ignored, or fail at the very end. Raises TrainingError."""
    if options.out.is_dir():
        raise TrainingError(f"{options.out.absolute()} is a folder; name a file")
    if options.out.exists() and not options.overwrite:
        raise TrainingError(f"{options.out.absolute()} exists; add --overwrite to replace it")
    if options.images is not None and options.target == "procedural":
        raise TrainingError("--images: the procedural target takes no photographs; add --target photographs")
    if options.backbone is not None and options.target != "backbone":
        raise TrainingError("--backbone needs --target backbone")
    if options.device == "cuda" and options.target != "backbone":
        raise TrainingError("--device cuda: only --target backbone computes there")


def _name(path: Path | None) -> str:
    return "" if path is None else path.name


def _distilled(options: PretrainOptions, listener: Listener) -> nn.Sequential:
    if options.backbone is None or options.images is None:
        raise TrainingError("--target backbone needs --backbone FILE and --images DIR")
    images = [ImageFile(*pair) for pair in list_images(options.images)]
    if not images:
        raise DatasetError(f"{options.images.absolute()}: no images there")
    try:
        extractor = ResNetFeatures(read_state(options.backbone))
    except ValueError as error:
        raise ImportFailed(f"{options.backbone.absolute()}: {error}") from error
    steps = options.steps or DISTILLATION_STEPS
    listener.say(f"distilling {options.backbone.name} into a {options.size} PDN on {len(images)} images")

    def on_step(done: int, losses: dict[str, float]) -> None:
        listener.step(done, steps, losses)
        listener.go_on(f"at step {done} of {steps}; nothing was written")

    def on_statistics(done: int) -> None:
        listener.step(done, STATISTICS_BATCHES, {})
        listener.go_on(f"at batch {done} of the statistics; nothing was written")

    return distill(
        extractor,
        images,
        options.size,
        seed=options.seed,
        steps=steps,
        device=device_of(options.device),
        on_step=on_step,
        on_statistics=on_statistics,
    )


class _Batch(NamedTuple):
    patches: Tensor
    """(N, 3, 33, 33), R, G, B, 0 … 1; procedural ones first."""
    procedural: ProceduralLabels
    photographs: NDArray[np.int64]


def _taught(options: PretrainOptions, listener: Listener) -> nn.Sequential:
    precision = resolve_precision(options.precision, torch.device("cpu"))
    photographs = None
    if options.target == "photographs":
        if options.images is None:
            raise TrainingError("--target photographs needs --images: a folder for each class, or an .npz")
        photographs = read_labelled(options.images)
        listener.say(f"{len(photographs.labels)} photographs of {photographs.classes} classes")
    listener.say(f"drawing {options.scenes} procedural scenes")
    scenes = draw_scenes(
        options.scenes, options.seed, lambda done: listener.go_on(f"at scene {done}; nothing was written")
    )
    keep_freed_memory()
    torch.manual_seed(options.seed)
    network = _with_batch_norm(pdn(options.size, TEACHER_CHANNELS, padded=False))
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    heads = _Heads(0 if photographs is None else photographs.classes)
    steps = options.steps or STEPS
    optimizer = torch.optim.AdamW(
        [*network.parameters(), *heads.parameters()], lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        # Warming up takes two steps at least.
        *(optimizer, _LEARNING_RATE),
        total_steps=steps + 2,
        pct_start=max(_WARM_UP_SHARE, 2 / (steps + 2)),
    )
    listener.say(f"teaching a {options.size} PDN in {precision}, {steps} steps of {_BATCH} patches")
    batches = _batches(scenes, photographs, options.seed)
    for step in range(steps):
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            features = network(_normalised(batch.patches))[:, :, 0, 0]
        losses = heads(features.float(), batch)
        total = sum(losses.values(), torch.zeros(()))
        if not torch.isfinite(total):
            raise TrainingError(f"a loss is not finite at step {step}; try --precision fp32")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        schedule.step()
        listener.step(step + 1, steps, {name: float(loss.detach()) for name, loss in losses.items()})
        listener.go_on(f"at step {step + 1} of {steps}; nothing was written")
    folded = fold_batch_norm(network, options.size)
    listener.say("whitening")
    fold_into_last(folded, *whitening(_some_features(folded, batches)))
    return folded


def _batches(scenes: ProceduralPatches, photographs: LabelledPhotographs | None, seed: int) -> Iterator[_Batch]:
    """Draw batches for ever, the next one while this one is learnt from."""
    rng = np.random.default_rng([seed, 1])
    of_photographs = 0 if photographs is None else _BATCH // 2

    def draw() -> _Batch:
        patches, labels = scenes.draw(rng, _BATCH - of_photographs)
        pieces, shown = [patches], np.zeros(0, np.int64)
        if photographs is not None:
            more, shown = photographs.draw(rng, of_photographs)
            pieces.append(more)
        return _Batch(torch.from_numpy(stack_patches(pieces)), labels, shown)

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(draw)
        while True:
            batch = coming.result()
            coming = ahead.submit(draw)
            yield batch


def _normalised(patches: Tensor) -> Tensor:
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    return ((patches - mean) / std).contiguous(memory_format=torch.channels_last)


class _Heads(nn.Module):
    """What is asked about each patch; thrown away once the PDN has learnt to answer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.field = nn.Linear(TEACHER_CHANNELS, len(FIELDS))
        self.shape = nn.Linear(TEACHER_CHANNELS, len(SHAPES))
        self.parameter = nn.Linear(TEACHER_CHANNELS, SCENE_PARAMETERS)
        self.marks = nn.Linear(TEACHER_CHANNELS, SCENE_MARKS)
        self.shown = nn.Linear(TEACHER_CHANNELS, classes) if classes else None
        kernels = _appearance_kernels()
        self.register_buffer("kernels", kernels)
        self.appearance = nn.Linear(TEACHER_CHANNELS, len(kernels))
        # Follows the first batches' spread, so that every frequency counts the same.
        self.spread = nn.BatchNorm1d(len(kernels), affine=False, momentum=_STATISTICS_MOMENTUM)

    def forward(self, features: Tensor, batch: _Batch) -> dict[str, Tensor]:
        """Return the losses of a batch, (N, 384) features."""
        with torch.no_grad():
            seen = self.spread(F.conv2d(batch.patches, self.kernels)[:, :, 0, 0])  # type: ignore[arg-type]
            seen = seen.sign() * torch.log1p(2 * seen.abs())
        answers = F.relu(features)
        count = len(batch.procedural.field)
        drawn = answers[:count]
        labels = [torch.from_numpy(values) for values in batch.procedural]
        losses = {
            "appearance": F.mse_loss(self.appearance(features), seen),
            "field": F.cross_entropy(self.field(drawn), labels[0]) / 2,
            "shape": F.cross_entropy(self.shape(drawn), labels[1]) / 2,
            "parameters": 2 * F.smooth_l1_loss(self.parameter(drawn), labels[2]),
            "marks": 8 * F.binary_cross_entropy_with_logits(self.marks(drawn), labels[3]),
        }
        if self.shown is not None:
            shown = torch.from_numpy(batch.photographs)
            losses["shown"] = F.cross_entropy(self.shown(answers[count:]), shown, label_smoothing=_LABEL_SMOOTHING)
        return losses


def _appearance_kernels() -> Tensor:
    """Make windowed cosines over a patch: 72 of brightness, 6 of each opponent colour; (84, 3, 33, 33)."""
    side = RECEPTIVE_FIELD_PX
    place = (np.arange(side) + 0.5) / side
    window = np.exp(-0.5 * ((np.arange(side) - side // 2) / _WINDOW_PX) ** 2)
    waves = [math.sqrt(2 / side) * np.cos(math.pi * k * place) * window for k in range(_COSINES)]
    waves[0] = waves[0] / math.sqrt(2)
    kernels = []
    for colour, highest in (((0.299, 0.587, 0.114), _COSINES), ((1, -1, 0), 2), ((0.5, 0.5, -1), 2)):
        for i in range(min(highest + 1, _COSINES)):
            for j in range(min(highest + 1, _COSINES)):
                if i + j <= highest:
                    kernels.append(np.outer(waves[i], waves[j])[None] * np.array(colour)[:, None, None])
    return torch.tensor(np.stack(kernels), dtype=torch.float32)


def _with_batch_norm(network: nn.Sequential) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in network:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # He et al. 2015
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
            layers.append(nn.BatchNorm2d(layer.out_channels, momentum=_STATISTICS_MOMENTUM))
    return nn.Sequential(*layers)


@torch.no_grad()
def fold_batch_norm(network: nn.Sequential, size: PdnSize) -> nn.Sequential:
    """Put each batch normalisation into the convolution before it; exact in evaluation mode."""
    folded = pdn(size, TEACHER_CHANNELS, padded=False)
    convolutions = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in network if isinstance(layer, nn.BatchNorm2d)]
    targets = [layer for layer in folded if isinstance(layer, nn.Conv2d)]
    for convolution, norm, target in zip(convolutions, norms, targets, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert convolution.bias is not None
        assert target.bias is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        target.weight.copy_(convolution.weight * scale[:, None, None, None])
        target.bias.copy_((convolution.bias - norm.running_mean) * scale + norm.bias)
    return folded.requires_grad_(False).eval()


@torch.inference_mode()
def _some_features(network: nn.Sequential, batches: Iterator[_Batch]) -> Iterator[Tensor]:
    for _ in range(_WHITENING_BATCHES):
        yield network(_normalised(next(batches).patches))[:, :, 0, 0].T
