"""How fast training steps are, beside a straightforward implementation of the published recipe."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate.augment import augment
from calibrate.device import device_of, resolve_precision
from calibrate.listener import Listener
from calibrate.options import TrainOptions
from calibrate.teacher import find_teacher
from calibrate.train import good_images, image_cache
from calibrate.trainer import WEIGHT_DECAY, Trainer
from drivers.replay import read_image
from pipeline.architecture import TEACHER_CHANNELS
from pipeline.machine import describe_machine
from pipeline.networks import EfficientAD
from pipeline.preprocess import Preprocessor

_ROUNDS = 5
_QUANTILE_OF_AT_MOST = 1 << 24
"""Values that `torch.quantile` takes."""


class _Straightforward:
    """The published recipe as one would write it down: float32, one network pass after the other.

    It decodes and prepares each image anew, sorts for its quantiles, and computes all of the student's outputs.
    It draws what `Trainer` draws, so that both sides see the same images in the same order.
    """

    def __init__(self, trainer: Trainer, options: TrainOptions) -> None:
        self._trainer, self._options = trainer, options
        self._preprocess = Preprocessor(options.preprocess)
        self.model = EfficientAD(options.size, options.geometry)
        self.model.load_state_dict(trainer.model.state_dict())
        self.model = self.model.to(trainer.device).train()
        learnt = [*self.model.student.parameters(), *self.model.autoencoder.parameters()]
        self._optimizer = torch.optim.Adam(learnt, lr=options.learning_rate, weight_decay=WEIGHT_DECAY)

    def step(self, step: int) -> float:
        """Do one step; returns the total loss."""
        # TF32 is what PyTorch's convolutions use by themselves; the other side has turned it off.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            return self._step(step)

    def _step(self, step: int) -> float:
        rng = np.random.default_rng([self._options.seed, 1, step])
        torch.manual_seed(int(rng.integers(2**31)))
        file = self._trainer.file_of(step)
        prepared = self._preprocess(*read_image(file.path, self._options.pixel_format))
        (tile,) = self._options.geometry.tiles()
        rng.integers(1)  # the tile, drawn by the other side
        augmented = augment(prepared, rng)
        natural = self._trainer.natural.draw(tile, rng)
        device = self._trainer.device
        x, a, n = (torch.from_numpy(pixels)[None].to(device) for pixels in (prepared, augmented, natural))
        model = self.model
        with torch.no_grad():
            described = model.describe(x)
        distance = (described - model.student(x)[:, :TEACHER_CHANNELS]).square()
        hard = distance[distance >= _quantile(distance.detach(), self._options.losses.hard_quantile)].mean()
        penalty = model.student(n)[:, :TEACHER_CHANNELS].square().mean()
        predicted = model.autoencode(a)
        with torch.no_grad():
            target = model.describe(a)
        imitated = model.student(a)[:, TEACHER_CHANNELS:]
        loss = hard + penalty + (target - predicted).square().mean() + (predicted - imitated).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())


def _quantile(values: Tensor, level: float) -> float:
    if values.numel() <= _QUANTILE_OF_AT_MOST:
        return float(torch.quantile(values, level))
    return float(np.quantile(values.float().cpu().numpy(), level))


def bench_train(options: TrainOptions, steps: int, listener: Listener) -> dict[str, Any]:
    """Time both sides in turns in one process.

    Args:
        options: as for training; untiled, with the penalty and the autoencoder.
        steps: timed steps a side and round; one round more warms up.
        listener: told how many of how many rounds are done.

    Returns:
        `machine` and `results`, one result a side with steps_per_s and ratio_to_reference.

    Raises DatasetError or TrainingStopped.
    """
    device = device_of(options.device)
    precision = resolve_precision(options.precision, device)
    cache = image_cache(options)
    good = good_images(options, cache, listener)
    trainer = Trainer(options, good, cache, device, precision)
    trainer.prepare_teacher(
        find_teacher(options.teacher, options.size, options.seed),
        whiten=False,  # a step costs the same
        on_image=lambda: listener.go_on("before the first round"),
    )
    reference = _Straightforward(trainer, options)
    trainer.natural.fill(options.geometry.tiles()[0])  # or the side that comes first would pay for both
    trainer.model.train()
    sides: dict[str, Callable[[int], float]] = {
        "reference": reference.step,
        "inspectord": lambda step: float(trainer.step(step).total.detach()),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(_ROUNDS + 1):
        for name, do in sides.items() if turn % 2 else reversed(sides.items()):
            begun = time.perf_counter()
            losses[name] += [do(turn * steps + index) for index in range(steps)]
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(steps / (time.perf_counter() - begun))
        listener.step(turn + 1, _ROUNDS + 1, {})
        listener.go_on(f"after round {turn + 1} of {_ROUNDS + 1}")
    base = statistics.median(times["reference"])
    return {
        "machine": describe_machine(device.type),
        "results": [
            {
                "side": name,
                "size": options.size,
                "precision": "fp32" if name == "reference" else precision,
                "image_size": [options.geometry.image_width, options.geometry.image_height],
                "steps_per_s": statistics.median(rates),
                "slowest_steps_per_s": min(rates),
                "fastest_steps_per_s": max(rates),
                "mean_loss": statistics.fmean(losses[name]),
                "ratio_to_reference": statistics.median(rates) / base,
            }
            for name, rates in times.items()
        ],
    }
