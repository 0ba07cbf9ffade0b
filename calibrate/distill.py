"""The paper's way to a teacher: distil a pretrained backbone's features into a PDN (section 3.1, algorithm 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from calibrate.augment import LUMA, read_natural_image
from calibrate.dataset import MAX_CORRUPT_SHARE
from calibrate.layouts import DatasetError, ImageFile
from pipeline.architecture import TEACHER_CHANNELS, PdnSize
from pipeline.networks import pdn
from pipeline.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipeline.resample import resize

BATCH, STEPS = 16, 60_000
STATISTICS_BATCHES = 625
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-5
PDN_PX = 256
BACKBONE_PX = 512
_GREY_PROBABILITY = 0.1
_PATCHCORE_CHANNELS = 1024

OnStep = Callable[[int, dict[str, float]], None]


def patchcore_target(features: Sequence[Tensor], channels: int = TEACHER_CHANNELS) -> Tensor:
    """Combine a backbone's layers as PatchCore does (Roth et al. 2022, section 3.1).

    Every 3×3 neighbourhood is averaged into 1,024 numbers by adaptive pooling along channels, coarser layers
    are stretched to the finest one's grid, and all of them are pooled together.

    Args:
        features: of one batch, (N, channels, h, w) each, the finest grid first.
        channels: of the result.

    Returns:
        (N, channels, h, w) on the first layer's grid.
    """
    grid = features[0].shape[-2:]
    pooled = []
    for layer in features:
        count, _, height, width = layer.shape
        patches = F.unfold(layer, 3, padding=1).transpose(1, 2)
        means = F.adaptive_avg_pool1d(patches, _PATCHCORE_CHANNELS).transpose(1, 2)
        means = means.reshape(count, _PATCHCORE_CHANNELS, height, width)
        if (height, width) != tuple(grid):
            means = F.interpolate(means, size=grid, mode="bilinear", align_corners=False)
        pooled.append(means)
    together = torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)
    result = F.adaptive_avg_pool1d(together, channels).transpose(1, 2)
    return result.reshape(-1, channels, *grid)


def distill(
    extractor: nn.Module,
    images: Sequence[ImageFile],
    size: PdnSize,
    *,
    seed: int,
    steps: int = STEPS,
    batch: int = BATCH,
    statistics_batches: int = STATISTICS_BATCHES,
    backbone_px: int = BACKBONE_PX,
    device: torch.device | None = None,
    on_step: OnStep | None = None,
    on_statistics: Callable[[int], None] | None = None,
) -> nn.Sequential:
    """Train a PDN to give an extractor's features, channel by channel normalised.

    Args:
        extractor: takes (N, 3, backbone_px, backbone_px), ImageNet-normalised, and returns a list of feature
            maps, the finest first; any module will do.
        images: photographs; drawn at random, grey with probability 0.1.
        size: of the PDN.
        seed: of weights and draws.
        steps: of Adam.
        batch: images a step.
        statistics_batches: batches over which the channels' mean and standard deviation are taken.
        backbone_px: side of the extractor's input; the PDN's is 256.
        device: that computes; None: the CPU.
        on_step: told the step and its loss.
        on_statistics: told how many batches the statistics have seen.

    Returns:
        The PDN, unpadded. It is trained padded, so that its grid is the extractor's.

    Raises DatasetError when more than 5% of the images cannot be read; fewer are passed over.
    """
    device = device or torch.device("cpu")
    # float32 means float32: no TF32 behind its name on a GPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    extractor = extractor.to(device)
    draws = _draws(images, batch, np.random.default_rng([seed, 0]))
    large = (_resized(next(draws), backbone_px, device) for _ in range(statistics_batches))
    mean, std = _statistics(extractor, large, on_statistics)
    torch.manual_seed(seed)
    student = pdn(size, TEACHER_CHANNELS, padded=True).to(device)
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step in range(steps):
        drawn = next(draws)
        target = (_target(extractor, _resized(drawn, backbone_px, device)) - mean) / std
        found = student(_resized(drawn, PDN_PX, device))
        if target.shape[-2:] != found.shape[-2:]:
            target = F.interpolate(target, size=found.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.mse_loss(found, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, {"distillation": float(loss.detach())})
    unpadded = pdn(size, TEACHER_CHANNELS, padded=False)
    unpadded.load_state_dict(student.state_dict())
    return unpadded.requires_grad_(False).eval()


@torch.no_grad()
def _target(extractor: nn.Module, images: Tensor) -> Tensor:
    return patchcore_target(extractor(images))


def _statistics(
    extractor: nn.Module,
    batches: Iterator[Tensor],
    on_batch: Callable[[int], None] | None,
) -> tuple[Tensor, Tensor]:
    """Take mean and standard deviation of the target's channels, (1, 384, 1, 1) each, in float64."""
    count = 0
    shift, total, squares = torch.zeros(3, TEACHER_CHANNELS).double()
    for index, images in enumerate(batches):
        target = _target(extractor, images).double().transpose(0, 1).flatten(1)
        if index == 0:
            shift = target.mean(dim=1)
            total, squares = total.to(shift.device), squares.to(shift.device)
        centred = target - shift[:, None]
        count += target.shape[1]
        total += centred.sum(dim=1)
        squares += centred.square().sum(dim=1)
        if on_batch is not None:
            on_batch(index + 1)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return (shift + mean).float()[None, :, None, None], std.float()[None, :, None, None]


def _draws(
    images: Sequence[ImageFile], batch: int, rng: np.random.Generator
) -> Iterator[list[NDArray[np.float32]]]:
    """Draw batches of photographs for ever, (height, width, 3) each, R, G, B, 0 … 1."""
    unreadable: set[str] = set()
    while True:
        drawn: list[NDArray[np.float32]] = []
        while len(drawn) < batch:
            file = images[int(rng.integers(len(images)))]
            try:
                pixels = read_natural_image(file.path)
            except (OSError, ValueError) as error:
                unreadable.add(file.name)
                if len(unreadable) > MAX_CORRUPT_SHARE * len(images):
                    raise DatasetError(
                        f"{file.path.absolute()}: {error}; {len(unreadable)} of {len(images)} images cannot be read"
                    ) from error
                continue
            shades = pixels.astype(np.float32) / np.float32(255)
            rgb = np.repeat(shades[..., None], 3, 2) if shades.ndim == 2 else shades[..., ::-1]
            if rng.random() < _GREY_PROBABILITY:
                rgb = np.repeat((rgb @ LUMA)[..., None], 3, 2)
            drawn.append(np.ascontiguousarray(rgb, np.float32))
        yield drawn


def _resized(images: list[NDArray[np.float32]], side: int, device: torch.device) -> Tensor:
    """Resize to a network's input, (N, 3, side, side), ImageNet-normalised."""
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
    resized = [(resize(image, side, side) - mean) / std for image in images]
    return torch.from_numpy(np.ascontiguousarray(np.stack(resized).transpose(0, 3, 1, 2))).to(device)
