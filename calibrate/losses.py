"""The paper's losses (EfficientAD, sections 3.2 and 3.3, algorithm 1) with its ablations as options."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.geometry import Tile
from pipeline.networks import TEACHER_CHANNELS, EfficientAD


@dataclass(frozen=True, slots=True)
class LossOptions:
    """What the paper fixes and its ablations vary."""

    hard_quantile: float = 0.999
    """p_hard: only differences at or above this quantile are learnt from; 0 learns from all of them."""
    penalty: bool = True
    """Pretraining penalty, where natural images are given."""
    autoencoder: bool = True
    """Autoencoder and student-autoencoder losses."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Loss terms of one step; scalars."""

    hard: Tensor
    penalty: Tensor
    autoencoder: Tensor
    student_autoencoder: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, as in the paper, unweighted."""
        return self.hard + self.penalty + self.autoencoder + self.student_autoencoder


def hard_feature_loss(difference: Tensor, quantile: float) -> Tensor:
    """Return the mean of the squared differences at or above their own quantile.

    Args:
        difference: squared differences, any shape; the quantile runs over all elements.
        quantile: p_hard, from 0 to 1.

    The elements at or above the (linearly interpolated) quantile are the largest n − ceil(p·(n−1)), so no
    quantile is computed and any number of elements will do (`torch.quantile` refuses more than 2**24).
    """
    if quantile <= 0:
        return difference.mean()
    values = difference.flatten()
    # Rounding first: 0.9 × 10 must not become 9.000000000000002 and lose an element.
    below = math.ceil(round(quantile * (values.numel() - 1), 6))
    return torch.topk(values, max(1, values.numel() - below), sorted=False).values.mean()


def efficientad_losses(
    model: EfficientAD,
    image: Tensor,
    augmented: Tensor,
    natural: Tensor | None,
    tile: Tile,
    options: LossOptions,
) -> Losses:
    """Compute the losses of one training step.

    Args:
        model: in training mode.
        image: (N, 3, H, W), good images.
        augmented: the same after the autoencoder branch's augmentation; teacher, student and autoencoder
            of that branch all see it.
        natural: (N, 3, h, w), images from outside the task, h and w at least a tile's; None: no penalty.
        tile: the piece that teacher and student see; the autoencoder sees the whole image.
        options: which terms, which quantile.
    """
    zero = image.new_zeros(())
    piece = image[:, :, tile.y_px, tile.x_px]
    with torch.no_grad():
        described = model.describe(piece)
    student = model.student(piece)[:, :TEACHER_CHANNELS]
    hard = hard_feature_loss((described - student).float().square(), options.hard_quantile)

    penalty = zero
    if options.penalty and natural is not None:
        penalty = model.student(natural)[:, :TEACHER_CHANNELS].float().square().mean()

    autoencoder = student_autoencoder = zero
    if options.autoencoder:
        predicted = model.autoencode(augmented)[:, :, tile.rows, tile.columns].float()
        augmented_piece = augmented[:, :, tile.y_px, tile.x_px]
        with torch.no_grad():
            target = model.describe(augmented_piece).float()
        imitated = model.student(augmented_piece)[:, TEACHER_CHANNELS:].float()
        autoencoder = (target - predicted).square().mean()
        # Not detached from the autoencoder, as in the public reference.
        student_autoencoder = (predicted - imitated).square().mean()
    return Losses(hard, penalty, autoencoder, student_autoencoder)
