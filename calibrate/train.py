"""Train a bundle: EfficientAD's algorithm 1 and 2 on a folder of good images."""

from __future__ import annotations

import datetime
import importlib.metadata
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from calibrate.augment import augment, natural_image, read_natural_image
from calibrate.checkpoint import (
    CheckpointError,
    Progress,
    delete_checkpoint,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from calibrate.dataset import DatasetError, GoodImages, ImageFile, PreparedImages, load_good_images
from calibrate.losses import Losses, LossOptions, efficientad_losses
from calibrate.normalize import QUANTILE_A, QUANTILE_B, choose_threshold, map_quantiles, score_maps
from calibrate.teacher import channel_statistics, random_teacher
from drivers.frame import Image, PixelFormat
from drivers.replay import decode_image, format_of, list_images
from pipeline.bundle import Bundle, Model, is_bundle, sha256_hex, write_bundle
from pipeline.engine import RawMaps
from pipeline.engines import make_engine
from pipeline.geometry import Geometry
from pipeline.networks import EfficientAD, PdnSize
from pipeline.preprocess import Preprocessor, PreprocessSpec, check_correction, correction_for
from pipeline.scoring import Scorer

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-5
LATE_LEARNING_RATE_FACTOR, LATE_FROM_SHARE = 0.1, 0.95

Precision = Literal["auto", "fp32", "bf16"]


class TrainingError(Exception):
    """Training cannot begin or go on; the message says why and what to change."""


class TrainingStopped(Exception):
    """Training was asked to stop and left a checkpoint."""


@dataclass(frozen=True)
class TrainOptions:
    """What `inspectord train` can be told."""

    dataset: Path
    out: Path
    size: PdnSize = "small"
    geometry: Geometry = field(default_factory=Geometry)
    preprocess: PreprocessSpec = field(default_factory=lambda: PreprocessSpec(256, 256))
    pixel_format: PixelFormat | None = None
    steps: int = 2000
    seed: int = 0
    learning_rate: float = LEARNING_RATE
    held_out_share: float = 0.1
    false_reject_rate: float = 0.01
    losses: LossOptions = field(default_factory=LossOptions)
    quantile_levels: tuple[float, float] = (QUANTILE_A, QUANTILE_B)
    natural: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "auto"
    cache_mib: int = 2048
    checkpoint_s: float = 30.0
    restart: bool = False
    overwrite: bool = False


class Listener:
    """Hears what training says; the command line prints it, tests need not."""

    def say(self, message: str) -> None:
        """Tell a fact that the user should know."""

    def step(self, done: int, total: int, losses: dict[str, float]) -> None:
        """Tell how far training is."""

    def should_stop(self) -> bool:
        """Return True to end after this step with a checkpoint."""
        return False


def train(options: TrainOptions, listener: Listener | None = None) -> Bundle:
    """Train, calibrate and write a bundle; goes on from the last checkpoint of the same run.

    Raises TrainingError, DatasetError, CheckpointError, TrainingStopped, or OSError from the disk.
    """
    listener = listener or Listener()
    if is_bundle(options.out) and not options.overwrite:
        raise TrainingError(f"{options.out.absolute()} holds a finished bundle; add --overwrite to replace it")
    options.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written to is said at once
    device = _device(options.device)
    precision = _precision(options.precision, device)
    preprocess = Preprocessor(options.preprocess)
    good = load_good_images(
        options.dataset, options.held_out_share, options.seed, lambda image: _fit(image, preprocess, options)
    )
    _tell_of_images(good, listener)
    run = _Run(options, good, preprocess, device, precision, listener)
    settings = run.settings()
    progress = _progress_to_resume(options, settings)
    if progress is not None:
        load_checkpoint(options.out, run.model, run.optimizer)
        listener.say(f"resuming from the checkpoint at step {progress.step} of {options.steps}")
    else:
        listener.say(f"teacher: random weights, seed {options.seed} (a stand-in: no trained teacher ships yet)")
        run.prepare_teacher()
    start = 0 if progress is None else progress.step
    listener.say(f"training {options.size} on {device.type} in {precision}, {options.steps} steps")
    _train_steps(run, start, settings, listener)
    listener.say(f"calibrating on {len(good.held_out)} held-out images")
    bundle = _calibrate(run, settings)
    bundle = write_bundle(bundle, options.out)
    delete_checkpoint(options.out)
    return bundle


class _Run:
    """Networks, optimiser and data of one training run."""

    def __init__(
        self,
        options: TrainOptions,
        good: GoodImages,
        preprocess: Preprocessor,
        device: torch.device,
        precision: str,
        listener: Listener,
    ) -> None:
        self.options, self.good, self.device, self.precision = options, good, device, precision
        self.listener = listener
        self.images = PreparedImages(good.train, preprocess, options.pixel_format, options.cache_mib)
        self.tiles = options.geometry.tiles()
        try:
            self.scorer = Scorer(options.geometry, options.preprocess.ignored_in_roi())
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.natural_files = _natural_files(options)
        self.unreadable_natural: set[str] = set()
        # float32 means float32: no TF32 behind its name on a GPU.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(options.seed)
        self.model = EfficientAD(options.size, options.geometry).to(device)
        if device.type == "cpu":
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        learnt = [*self.model.student.parameters(), *self.model.autoencoder.parameters()]
        self.optimizer = torch.optim.Adam(learnt, lr=options.learning_rate, weight_decay=WEIGHT_DECAY)

    def prepare_teacher(self) -> None:
        """Put the teacher in and measure its channels over the training images."""
        options = self.options
        teacher = random_teacher(options.size, options.geometry, options.seed)
        self.model.teacher.load_state_dict(teacher.state_dict())
        mean, std = channel_statistics(self.model.teacher, self.images, options.geometry, self.device)
        self.model.teacher_mean.copy_(mean)
        self.model.teacher_std.copy_(std)

    def settings(self) -> dict[str, Any]:
        """Everything that determines the outcome, to tell whether a checkpoint belongs to this run."""
        o, spec = self.options, self.options.preprocess
        arrays = {name: getattr(spec, name) for name in _ARRAY_FIELDS}
        return {
            "steps": o.steps,
            "seed": o.seed,
            "learning_rate": o.learning_rate,
            "size": o.size,
            "geometry": o.geometry.to_json(),
            "roi": None if spec.roi is None else asdict(spec.roi),
            "corrections": {n: None if a is None else sha256_hex(a.tobytes()) for n, a in arrays.items()},
            "pixel_format": None if o.pixel_format is None else o.pixel_format.value,
            "held_out_share": o.held_out_share,
            "losses": asdict(o.losses),
            "quantile_levels": list(o.quantile_levels),
            "natural_images": sha256_hex(
                "\n".join(f"{f.name} {f.path.stat().st_size}" for f in self.natural_files).encode()
            ),
            "precision": self.precision,
            "device": self.device.type,
            "pixel_formats": self.good.pixel_formats,
            "images_train": len(self.good.train),
            "images_held_out": len(self.good.held_out),
            "fingerprint": self.good.fingerprint,
        }

    def step(self, step: int) -> Losses:
        """Do one training step; all its randomness follows from the seed and the step's number."""
        options = self.options
        rng = np.random.default_rng([options.seed, 1, step])
        torch.manual_seed(int(rng.integers(2**31)))  # dropout
        epoch, place = divmod(step, len(self.images))
        order = np.random.default_rng([options.seed, 2, epoch]).permutation(len(self.images))
        image = self.images[int(order[place])]
        tile = self.tiles[int(rng.integers(len(self.tiles)))]
        augmented = augment(image, rng)
        natural = self._natural(rng) if options.losses.penalty and self.natural_files else None
        late = step >= int(LATE_FROM_SHARE * options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * (LATE_LEARNING_RATE_FACTOR if late else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            losses = efficientad_losses(
                self.model,
                self._tensor(image),
                self._tensor(augmented),
                None if natural is None else self._tensor(natural),
                tile,
                options.losses,
            )
        losses.total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return losses

    def _tensor(self, image: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
        tensor = torch.from_numpy(image)[None].to(self.device)
        return tensor.contiguous(memory_format=torch.channels_last)

    def _natural(self, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
        tile = self.tiles[0]
        height, width = tile.y_px.stop - tile.y_px.start, tile.x_px.stop - tile.x_px.start
        for _ in range(_NATURAL_TRIES):
            file = self.natural_files[int(rng.integers(len(self.natural_files)))]
            try:
                return natural_image(read_natural_image(file.path), width, height, rng)
            except (OSError, ValueError) as error:
                if file.name not in self.unreadable_natural:
                    self.listener.say(f"skipped natural image {file.name}: {error}")
                self.unreadable_natural.add(file.name)
        raise DatasetError(f"{_NATURAL_TRIES} natural images in a row cannot be read; check --natural")

    def held_out_maps(self, model: Model) -> list[RawMaps]:
        """Run the held-out images through the very engine that the daemon uses."""
        engine = make_engine(model, "cpu" if self.device.type == "cpu" else "auto").engine
        maps = []
        for file in self.good.held_out:
            try:
                image = decode_image(file.path)
                maps.append(engine.raw_maps(image, format_of(image, self.options.pixel_format)))
            except (OSError, ValueError) as error:
                raise DatasetError(f"{file.path.absolute()}: {error}") from error
        return maps


_ARRAY_FIELDS = ("dark", "flat", "ignore")
_NATURAL_TRIES = 10


def _train_steps(run: _Run, start: int, settings: dict[str, Any], listener: Listener) -> None:
    options, model = run.options, run.model
    model.train()
    saved_s, done = time.monotonic(), start

    def save() -> None:
        save_checkpoint(options.out, model, run.optimizer, Progress(done, settings))

    for step in range(start, options.steps):
        losses = run.step(step)
        done = step + 1
        values = {name: float(getattr(losses, name).detach()) for name in _LOSS_NAMES}
        if not all(np.isfinite(value) for value in values.values()):
            raise TrainingError(
                f"a loss is not finite at step {step}: {values}; the last checkpoint is intact"
                + ("; try --precision fp32" if run.precision == "bf16" else "")
            )
        listener.step(done, options.steps, values)
        if done == options.steps or time.monotonic() - saved_s >= options.checkpoint_s:
            save()
            saved_s = time.monotonic()
        if listener.should_stop() and done < options.steps:
            save()
            raise TrainingStopped(f"stopped at step {done} of {options.steps}; the same command goes on")


_LOSS_NAMES = ("hard", "penalty", "autoencoder", "student_autoencoder")


def _calibrate(run: _Run, settings: dict[str, Any]) -> Bundle:
    options = run.options
    weights = {name: tensor.detach().cpu() for name, tensor in run.model.state_dict().items()}
    model = Model(options.size, options.geometry, options.preprocess, weights)
    maps = run.held_out_maps(model)
    levels, autoencoder = options.quantile_levels, options.losses.autoencoder
    quantiles = map_quantiles(maps, run.scorer, levels, autoencoder=autoencoder)
    threshold = choose_threshold(score_maps(maps, run.scorer, quantiles), options.false_reject_rate)
    return Bundle(
        model=model,
        quantiles=quantiles,
        threshold=threshold.value,
        teacher={"origin": "random weights, no training", "seed": options.seed},
        calibration={
            "quantile_levels": list(levels),
            "held_out_images": threshold.held_out,
            "wanted_false_reject_rate": options.false_reject_rate,
            "false_reject_bound": threshold.false_reject_bound,
        },
        training={**settings, "dataset": str(options.dataset.absolute())},
        versions={
            name: importlib.metadata.version(name)
            for name in ("inspectord", "torch", "numpy", "opencv-python-headless")
        },
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _progress_to_resume(options: TrainOptions, settings: dict[str, Any]) -> Progress | None:
    if options.restart:
        delete_checkpoint(options.out)
    progress = read_progress(options.out)
    if progress is None or progress.settings == settings:
        return progress
    changed = sorted(k for k in settings if settings[k] != progress.settings.get(k))
    raise CheckpointError(
        f"{options.out.absolute()} holds a checkpoint of another run (step {progress.step}); different: "
        f"{', '.join(changed)}. Repeat that run's command, or add --restart to begin anew"
    )


def _fit(image: Image, preprocess: Preprocessor, options: TrainOptions) -> PixelFormat:
    """Check that format, region, mask and corrections fit an image. Raises ValueError."""
    pixel_format = format_of(image, options.pixel_format)
    area = preprocess.spec.area(image.shape[1], image.shape[0])
    correction_for(preprocess.spec, pixel_format, area)
    return pixel_format


def _tell_of_images(good: GoodImages, listener: Listener) -> None:
    listener.say(f"{len(good.train)} good images to learn from, {len(good.held_out)} held out")
    for name, why in good.corrupt:
        listener.say(f"skipped {name}: {why}")
    if len(good.train) + len(good.held_out) < 20:
        listener.say("fewer than 20 images: expect a threshold that rejects good parts; photograph more")


def _natural_files(options: TrainOptions) -> list[ImageFile]:
    if options.natural is None:
        return []
    files = [ImageFile(*pair) for pair in list_images(options.natural)]
    if not files:
        raise DatasetError(f"{options.natural.absolute()}: no natural images there")
    return files


def _device(choice: str) -> torch.device:
    if choice == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


def _precision(choice: Precision, device: torch.device) -> str:
    """Resolve `auto`: bfloat16 where the hardware multiplies it natively, else float32."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def load_correction(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Load a dark frame or flat field: an image or a .npy of raw values; colour becomes R, G, B.

    Raises DatasetError.
    """
    try:
        if path.suffix == ".npy":
            array = np.asarray(np.load(path, allow_pickle=False), np.float32)
        else:
            image = decode_image(path)
            array = np.ascontiguousarray(image[..., ::-1] if image.ndim == 3 else image, np.float32)
        check_correction(array)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path.absolute()}: {error}") from error
    return array


def load_mask(path: Path) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Load an ignore mask: a grey PNG in full-frame pixels, ignored where not black. Raises DatasetError."""
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) if path.is_file() else None
    if mask is None:
        raise DatasetError(f"{path.absolute()}: not a readable image")
    return np.asarray(mask > 0)
