"""The paper's losses (EfficientAD, sections 3.2 and 3.3, algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate.convolution import convolve
from calibrate.options import LossOptions
from pipeline.architecture import TEACHER_CHANNELS
from pipeline.geometry import Tile
from pipeline.networks import EfficientAD


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
    described: Tensor,
    image: Tensor,
    augmented: Tensor,
    natural: Tensor | None,
    tile: Tile,
    options: LossOptions,
    *,
    batched: bool = True,
) -> Losses:
    """Compute the losses of one training step.

    The student runs once over all images of the step; of its last convolution, each image needs only the half
    that imitates the teacher or the half that imitates the autoencoder.

    Args:
        model: in training mode.
        described: (N, 384, h, w), the teacher's normalised features of the image's tile.
        image: (N, 3, H, W), good images.
        augmented: the same after the autoencoder branch's augmentation; teacher, student and autoencoder
            of that branch all see it.
        natural: (N, 3, tile height, tile width), images from outside the task; None: no penalty.
        tile: the piece that teacher and student see; the autoencoder sees the whole image.
        options: which terms, which quantile.
        batched: one student pass; False: one after the other, in a third of the memory.
    """
    zero = image.new_zeros(())
    as_teacher = [image[:, :, tile.y_px, tile.x_px]]
    if options.penalty and natural is not None:
        as_teacher.append(natural)
    as_autoencoder = [augmented[:, :, tile.y_px, tile.x_px]] if options.autoencoder else []
    imitates = _student(model, as_teacher, as_autoencoder, batched)
    hard = hard_feature_loss((described.float() - imitates[0].float()).square(), options.hard_quantile)
    penalty = imitates[1].float().square().mean() if len(as_teacher) > 1 else zero
    autoencoder = student_autoencoder = zero
    if options.autoencoder:
        predicted = model.autoencode(augmented)[:, :, tile.rows, tile.columns].float()
        with torch.no_grad():
            target = model.describe(as_autoencoder[0]).float()
        autoencoder = (target - predicted).square().mean()
        # Not detached from the autoencoder, as in the public reference.
        student_autoencoder = (predicted - imitates[-1].float()).square().mean()
    return Losses(hard, penalty, autoencoder, student_autoencoder)


def _student(
    model: EfficientAD, as_teacher: list[Tensor], as_autoencoder: list[Tensor], batched: bool
) -> list[Tensor]:
    """Run the student: the teacher's channels for the first images, the autoencoder's for the others."""
    if batched:
        trunk, last = model.student[:-1], model.student[-1]
        count = as_teacher[0].shape[0]
        hidden = trunk(torch.cat([*as_teacher, *as_autoencoder]))
        split = len(as_teacher) * count
        outputs = []
        for here, channels in (
            (hidden[:split], slice(None, TEACHER_CHANNELS)),
            (hidden[split:], slice(TEACHER_CHANNELS, None)),
        ):
            if here.shape[0]:
                found = convolve(here, last.weight[channels], last.bias[channels])  # type: ignore[index]
                outputs += list(torch.split(found, count))
        return outputs
    passes = [model.student(piece) for piece in (*as_teacher, *as_autoencoder)]
    halves = [slice(None, TEACHER_CHANNELS)] * len(as_teacher) + [slice(TEACHER_CHANNELS, None)] * len(
        as_autoencoder
    )
    return [output[:, half] for output, half in zip(passes, halves, strict=True)]
