"""The teacher: where it comes from, and the statistics of its channels over the training images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibrate.dataset import PreparedImages
from pipeline.geometry import Geometry
from pipeline.networks import TEACHER_CHANNELS, PdnSize, pdn

_DEAD_CHANNEL_STD = 1e-6


def random_teacher(size: PdnSize, geometry: Geometry, seed: int) -> nn.Sequential:
    """Make a teacher with seeded random weights, the stand-in until a trained teacher ships."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = pdn(size, TEACHER_CHANNELS, padded=geometry.padded)
        for layer in teacher:
            if isinstance(layer, nn.Conv2d):  # He et al. 2015: features keep their scale through the depth
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        # Most first filters look at structure, not at brightness: random edge and texture detectors.
        structural = teacher[0].weight.data[teacher[0].out_channels // 8 :]  # type: ignore[index,operator]
        structural -= structural.mean(dim=(1, 2, 3), keepdim=True)
    return teacher.requires_grad_(False).eval()


def teacher_features(teacher: nn.Module, image: Tensor, geometry: Geometry) -> list[Tensor]:
    """Return the raw features of one image, tile by tile, each cell once; (384, cells) each."""
    pieces = []
    seen = torch.zeros(geometry.map_height, geometry.map_width, dtype=torch.bool)
    for tile in geometry.tiles():
        features = teacher(image[:, :, tile.y_px, tile.x_px])[0].float().cpu()
        new = ~seen[tile.rows, tile.columns]
        seen[tile.rows, tile.columns] = True
        pieces.append(features[:, new])
    return pieces


@torch.inference_mode()
def channel_statistics(
    teacher: nn.Module, images: PreparedImages, geometry: Geometry, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each teacher channel over all training images.

    Two passes merged image by image in float64 (Chan et al.), so no digits are lost to E[x²] − E[x]².

    Returns:
        Mean and standard deviation, (384,) float32 each; a channel that never changes gets 1.
    """
    count = 0
    mean = torch.zeros(TEACHER_CHANNELS, dtype=torch.float64)
    squares = torch.zeros(TEACHER_CHANNELS, dtype=torch.float64)
    for index in range(len(images)):
        image = torch.from_numpy(images[index])[None].to(device)
        features = torch.cat(teacher_features(teacher, image, geometry), dim=1).double()
        here = features.shape[1]
        here_mean = features.mean(dim=1)
        shift = here_mean - mean
        squares += (features - here_mean[:, None]).square().sum(dim=1)
        squares += shift.square() * (count * here / (count + here))
        mean += shift * (here / (count + here))
        count += here
    std = (squares / count).sqrt()
    std = torch.where(std < _DEAD_CHANNEL_STD, torch.ones_like(std), std)
    return mean.float(), std.float()
