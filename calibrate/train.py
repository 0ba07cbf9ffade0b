"""Train a bundle: EfficientAD's algorithm 1 and 2 on a folder of good images."""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from calibrate.checkpoint import (
    CheckpointError,
    Progress,
    delete_checkpoint,
    has_checkpoint,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from calibrate.dataset import GoodImages, ImageCache, PreparedImages, load_good_images
from calibrate.device import device_of, resolve_precision
from calibrate.layouts import DatasetError, ImageFile, refuse_among_images
from calibrate.listener import Listener, TrainingError, TrainingStopped
from calibrate.normalize import NOT_RELATIVE, LevelRanges, choose_threshold, level_ranges, map_quantiles, score_maps
from calibrate.options import TrainOptions
from calibrate.report import TrainingRecord, write_training_report
from calibrate.teacher import Teacher, find_teacher
from calibrate.trainer import Trainer
from drivers.frame import Image, PixelFormat
from pipeline.bundle import Bundle, Model, check_writable, is_bundle, sha256_hex, write_bundle
from pipeline.engine import Prepared, RawMaps
from pipeline.engines import make_float_engine
from pipeline.machine import available_memory_mib
from pipeline.networks import weights_of
from pipeline.preprocess import Preprocessor
from pipeline.scoring import Scorer

RECIPE = 2
"""Raised when losses, augmentation or procedural images change, so that no checkpoint mixes two recipes."""
REPORT = "report"
"""Folder of training's report inside the bundle's folder."""
_FEW_IMAGES = 10
_LOOKS = 5
"""How often training looks at held-out images."""
_LOOKED_AT = 12
"""Held-out images looked at during training; calibration takes all of them."""
MIN_EXPLAINED = 0.05
"""An autoencoder that explains less of the held-out features' variance than this has learnt nothing: its map
is noise that quantile normalisation would blow up to the other map's size."""
MIN_LAYOUT_SHARE = 0.25
"""Below it, good images show a surface and not parts in one position, and the teacher's features are whitened:
that finds finer differences, and fewer coarse ones such as a hole that is missing. Seen: magnetic tiles -0.05,
photographs -0.05, the simulated line 0.70 to 0.88."""
_SHOW_A_LAYOUT = 4
"""Fewer images show no layout; channels are normalised then."""
_LEVELS_OF = 64
"""Training images whose maps' levels are looked at."""
_BEFORE_STEPS = "before the first step"
_LOSS_POINTS = 400
"""Points of the report's loss curves."""
_WHILE_CALIBRATING = "while calibrating; the same command does that anew"


def train(options: TrainOptions, listener: Listener | None = None) -> Bundle:
    """Train, calibrate and write a bundle; goes on from the last checkpoint of the same run.

    Raises TrainingError, DatasetError, CheckpointError, TrainingStopped, or OSError from the disk.
    """
    try:
        with folder_of_the_run(options):
            return _train(options, listener or Listener())
    except torch.OutOfMemoryError as error:
        kept = (
            ". There is a checkpoint, but these make another model and need --restart with them"
            if has_checkpoint(options.out)
            else ""
        )
        raise TrainingError(
            f"the GPU's memory is full: {str(error).splitlines()[0]} Try --tiles 2x2, --size small, a smaller "
            f"--image-size, or --device cpu{kept}"
        ) from error


@contextmanager
def folder_of_the_run(options: TrainOptions) -> Iterator[None]:
    """Make the bundle's folder, for this run alone; one that stays empty goes again.

    Raises TrainingError or OSError.
    """
    out, made = options.out, not options.out.exists()
    if not (made or out.is_dir()):
        raise TrainingError(f"{out.absolute()} is a file; name the folder of a bundle")
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    handle = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system that knows no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(f"another training writes to {out.absolute()}") from None
        if is_bundle(out) and not options.overwrite:
            raise TrainingError(f"{out.absolute()} holds a finished bundle; add --overwrite to replace it")
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):  # there is something in it
                out.rmdir()


def _train(options: TrainOptions, listener: Listener) -> Bundle:
    device = device_of(options.device)
    precision = resolve_precision(options.precision, device)
    try:
        scorer = Scorer(options.geometry, options.preprocess.ignored_in_roi())
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if options.turns.any and options.preprocess.ignore is not None:
        raise TrainingError(
            "--flip and --rotate would turn the ignored areas with the part, but they stay where they are when "
            "parts are inspected: leave one of the two out"
        )
    cache = image_cache(options)
    good = good_images(options, cache, listener)
    held_out = PreparedImages(good.held_out, cache)
    tell_of_images(good, listener)
    teacher = find_teacher(options.teacher, options.size, options.seed)
    listener.say(f"teacher: {teacher.facts['name']} ({teacher.facts['origin']})")
    trainer = Trainer(options, good, cache, device, precision)
    if options.restart:
        delete_checkpoint(options.out)
    progress = read_progress(options.out)
    whiten = _resolve_whitening(trainer, teacher, progress, listener)
    relative_map = whiten if options.relative_map is None else options.relative_map
    settings = _settings(trainer, good, teacher.facts, whiten)
    if progress is not None:
        _check_same_run(options, progress, settings)
        load_checkpoint(options.out, trainer.model, trainer.optimizer)
        listener.say(f"resuming from the checkpoint at step {progress.step} of {options.steps}")
    else:
        listener.say(f"looking at the teacher's features of {len(good.train)} images")
        trainer.prepare_teacher(teacher, whiten=whiten, on_image=lambda: listener.go_on(_BEFORE_STEPS))
    penalty = f"{'procedural' if options.natural is None else 'natural'} images for the penalty"
    listener.say(
        f"training {options.size} on {device.type} in {precision}, {options.steps} steps, "
        f"{penalty if options.losses.penalty else 'no penalty'}"
    )
    losses = _train_steps(
        trainer, held_out, scorer, progress or Progress(0, settings), listener, relative_map=relative_map
    )
    for name, why in trainer.natural.unreadable.items():
        listener.say(f"skipped natural image {name}: {why}")
    use_autoencoder = options.losses.autoencoder
    if use_autoencoder and options.autoencoder_map == "auto":
        explained = trainer.explained_by_autoencoder(asking(held_out, listener))
        use_autoencoder = explained >= MIN_EXPLAINED
        listener.say(
            f"the autoencoder explains {explained:.1%} of the held-out features' variance"
            + ("" if use_autoencoder else ": its map would be noise and is left out (--autoencoder keeps it)")
        )
    some = trainer.some_images(_LEVELS_OF)
    if relative_map:
        listener.say(f"looking at what the student misses in {len(some)} training images")
        largest = trainer.expect_difference(lambda: asking(some, listener), scorer.counted_cells)
        listener.say(
            f"maps are relative to what is expected (a cell is divided by up to {largest:.1f}) and to their own "
            f"level, as {len(some)} images show both (--no-relative-map)"
        )
    model = Model(options.size, options.geometry, options.preprocess, weights_of(trainer.model))
    ranges = NOT_RELATIVE
    if relative_map:
        ranges = level_ranges(raw_maps(model, some, options, listener), scorer, autoencoder=use_autoencoder)
    listener.say(f"calibrating on {len(good.held_out)} held-out images")
    maps = raw_maps(model, held_out, options, listener)
    bundle, scores = calibrated(
        model,
        maps,
        scorer,
        options,
        autoencoder=use_autoencoder,
        ranges=ranges,
        teacher=teacher.facts,
        training={**_training_facts(settings, good, options), "relative_map": relative_map},
    )
    bundle = write_bundle(with_precisions(bundle, held_out, maps, scorer, options, listener), options.out)
    delete_checkpoint(options.out)
    names = [file.name for file in good.held_out]
    tell_of_threshold(bundle, scores, names, listener)
    record = TrainingRecord(
        losses=losses,
        loss_names=_LOSS_NAMES,
        held_out_names=names,
        held_out_paths=[file.path for file in good.held_out],
        held_out_scores=scores,
        held_out_maps=[scorer.combine(m.student_teacher, m.autoencoder, bundle.quantiles) for m in maps],
    )
    try:
        listener.say(f"report: {write_training_report(record, bundle, options.out / REPORT).absolute()}")
    except (OSError, ValueError) as error:
        raise OSError(
            f"{options.out.absolute()} is finished and can be used, but its report was not written: {error}"
        ) from error
    return bundle


def calibrated(
    model: Model,
    maps: list[RawMaps],
    scorer: Scorer,
    options: TrainOptions,
    *,
    autoencoder: bool,
    ranges: LevelRanges = NOT_RELATIVE,
    teacher: dict[str, Any],
    training: dict[str, Any],
) -> tuple[Bundle, np.ndarray[Any, np.dtype[np.float64]]]:
    """Take quantiles and threshold from the raw maps of held-out images; the bundle and their scores."""
    levels = options.quantile_levels
    quantiles = map_quantiles(maps, scorer, levels, autoencoder=autoencoder, ranges=ranges)
    scores = score_maps(maps, scorer, quantiles)
    threshold = choose_threshold(scores, options.false_reject_rate)
    bundle = Bundle(
        model=model,
        quantiles=quantiles,
        threshold=threshold.value,
        teacher=teacher,
        calibration={
            "quantile_levels": list(levels),
            "held_out_images": threshold.held_out,
            "wanted_false_reject_rate": options.false_reject_rate,
            "false_reject_bound": threshold.false_reject_bound,
        },
        training=training,
        versions={
            name: importlib.metadata.version(name)
            for name in ("inspectord", "torch", "numpy", "opencv-python-headless")
        },
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return bundle, scores


def tell_of_threshold(
    bundle: Bundle, scores: np.ndarray[Any, np.dtype[np.float64]], names: list[str], listener: Listener
) -> None:
    """Say which held-out image alone makes the threshold: what is wrong with it lets defects pass."""
    order = np.argsort(-scores)
    if len(order) > 1 and bundle.threshold >= scores[order[0]]:
        listener.say(
            f"the threshold is the score of {names[order[0]]} alone (the next highest is {scores[order[1]]:.4f}): "
            "if that is no good part, or photographed otherwise, take it out and train anew"
        )


def with_precisions(
    bundle: Bundle,
    held_out: PreparedImages,
    maps: list[RawMaps],
    scorer: Scorer,
    options: TrainOptions,
    listener: Listener,
) -> Bundle:
    """Calibrate the precisions that this machine has; none on one that only trains, without OpenVINO."""
    try:
        from calibrate.precision import calibrate_precisions
    except ImportError as error:
        listener.say(f"precisions are not calibrated: {error}")
        return bundle
    calibrated = calibrate_precisions(
        bundle, held_out, maps, scorer, options, listener.say, lambda: listener.go_on(_WHILE_CALIBRATING)
    )
    for name, found in calibrated.precisions.items():
        listener.say(
            f"{name}: {found.infer_ms:.1f} ms, threshold {found.threshold:.4f}, scores deviate by up to "
            f"{found.largest_deviation:.0%} of the tolerance" + ("" if found.trusted else ": not trusted")
        )
    return calibrated


def _resolve_whitening(trainer: Trainer, teacher: Teacher, progress: Progress | None, listener: Listener) -> bool:
    options = trainer.options
    if options.whiten is not None:
        return options.whiten
    if progress is not None:
        return bool(progress.settings.get("whiten"))
    if len(trainer.images) < _SHOW_A_LAYOUT:
        return False
    share = trainer.layout_share(teacher, lambda: listener.go_on(_BEFORE_STEPS))
    whiten = share < MIN_LAYOUT_SHARE
    listener.say(
        f"{max(0.0, share):.0%} of the teacher's features is the good images' common layout: "
        + ("a surface; features are whitened (--no-whiten)" if whiten else "parts in one position")
    )
    return whiten


def _settings(trainer: Trainer, good: GoodImages, teacher: dict[str, Any], whiten: bool) -> dict[str, Any]:
    """Everything that determines the outcome, to tell whether a checkpoint belongs to this run."""
    o, spec = trainer.options, trainer.options.preprocess
    arrays = {name: getattr(spec, name) for name in _ARRAY_FIELDS}
    return {
        "recipe": RECIPE,
        "preset": o.preset,
        "steps": o.steps,
        "seed": o.seed,
        "learning_rate": o.learning_rate,
        "whiten": whiten,
        "size": o.size,
        "teacher": teacher,
        "geometry": o.geometry.to_json(),
        "roi": None if spec.roi is None else asdict(spec.roi),
        "corrections": {n: None if a is None else sha256_hex(a.tobytes()) for n, a in arrays.items()},
        "pixel_format": None if o.pixel_format is None else o.pixel_format.value,
        "turns": asdict(o.turns),
        "held_out_share": o.held_out_share,
        "part": o.part,
        "losses": asdict(o.losses),
        "quantile_levels": list(o.quantile_levels),
        "natural_images": trainer.natural.fingerprint,
        "precision": trainer.precision,
        "device": trainer.device.type,
        "pixel_formats": good.pixel_formats,
        "images_train": len(good.train),
        "images_held_out": len(good.held_out),
        "fingerprint": good.fingerprint,
    }


def _training_facts(settings: dict[str, Any], good: GoodImages, options: TrainOptions) -> dict[str, Any]:
    """What a bundle remembers of its training."""
    facts = {name: value for name, value in settings.items() if name != "teacher"}
    return {**facts, **image_facts(good, options)}


def image_facts(good: GoodImages, options: TrainOptions) -> dict[str, Any]:
    """What a bundle remembers of its good images."""
    return {
        "dataset": str(options.dataset.absolute()),
        "images_unreadable": len(good.corrupt),
        "digests": good.digests,
        "held_out_digests": good.held_out_digests,
    }


def asking(images: PreparedImages, listener: Listener) -> Iterator[Prepared]:
    """Go through images, (3, height, width) each, for as long as the listener wants. Raises TrainingStopped."""
    for index in range(len(images)):
        listener.go_on(_WHILE_CALIBRATING)
        yield images[index]


def raw_maps(model: Model, images: PreparedImages, options: TrainOptions, listener: Listener) -> list[RawMaps]:
    """Run images through the float32 engine of the daemon."""
    engine = make_float_engine(model, "cpu" if options.device == "cpu" else "auto")
    return [RawMaps(*engine.infer(image), 0, 0) for image in asking(images, listener)]


_ARRAY_FIELDS = ("dark", "flat", "ignore")


def _train_steps(
    trainer: Trainer,
    held_out: PreparedImages,
    scorer: Scorer,
    start: Progress,
    listener: Listener,
    *,
    relative_map: bool,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Do the remaining steps; returns the losses on the way, (points, 1 + terms), those before `start` included."""
    options, model = trainer.options, trainer.model
    model.train()
    saved_s, done = time.monotonic(), start.step
    curve, recent = list(start.losses), []
    every = max(1, options.steps // _LOSS_POINTS)
    looks = {round(options.steps * share / _LOOKS) for share in range(1, _LOOKS)}

    def save() -> None:
        try:
            save_checkpoint(options.out, model, trainer.optimizer, Progress(done, start.settings, curve))
        except OSError as error:
            kept = has_checkpoint(options.out)
            go_on = "; the one before it is whole, and the same command goes on from there" if kept else ""
            raise OSError(f"the checkpoint at step {done} was not written: {error}{go_on}") from error

    for step in range(start.step, options.steps):
        losses = trainer.step(step)
        done = step + 1
        values = {name: float(getattr(losses, name).detach()) for name in _LOSS_NAMES}
        if not all(np.isfinite(value) for value in values.values()):
            raise TrainingError(
                f"a loss is not finite at step {step}: {values}; the last checkpoint is intact"
                + ("; try --precision fp32" if trainer.precision == "bf16" else "")
            )
        recent.append([done, *values.values()])
        if done % every == 0 or done == options.steps:
            curve.append(np.mean(recent, axis=0).tolist())
            recent = []
        listener.step(done, options.steps, values)
        if done == options.steps or time.monotonic() - saved_s >= options.checkpoint_s:
            save()
            saved_s = time.monotonic()
        if listener.should_stop() and done < options.steps:
            save()
            raise TrainingStopped(f"stopped at step {done} of {options.steps}; the same command goes on")
        if done in looks:
            listener.say(f"step {done}: {_look(trainer, held_out, scorer, relative_map=relative_map)}")
    return np.array(curve).reshape(-1, 1 + len(_LOSS_NAMES))


_LOSS_NAMES = ("hard", "penalty", "autoencoder", "student_autoencoder")


@torch.inference_mode()
def _look(trainer: Trainer, held_out: PreparedImages, scorer: Scorer, *, relative_map: bool) -> str:
    """Say how the scores of a few held-out images are spread, by quantiles of their own maps.

    Networks that have learnt next to nothing may give flat maps, which is no reason to stop.
    """
    trainer.model.eval()
    maps = []
    for prepared in (held_out[i] for i in range(min(len(held_out), _LOOKED_AT))):
        st, ae = trainer.maps(prepared)
        maps.append(RawMaps(st, ae, 0, 0))
    trainer.model.train()
    options = trainer.options
    autoencoder = options.losses.autoencoder
    try:
        ranges = level_ranges(maps, scorer, autoencoder=autoencoder) if relative_map else NOT_RELATIVE
        quantiles = map_quantiles(maps, scorer, options.quantile_levels, autoencoder=autoencoder, ranges=ranges)
    except DatasetError as error:
        return f"no scores yet: {error}"
    scores = np.sort(score_maps(maps, scorer, quantiles))
    counts, _ = np.histogram(scores, bins=16)
    bars = "".join(_BARS[min(len(_BARS) - 1, int(np.ceil(c * (len(_BARS) - 1) / counts.max())))] for c in counts)
    return f"scores of {len(scores)} held-out images {scores[0]:.2f} |{bars}| {scores[-1]:.2f}"


_BARS = " ▁▂▃▄▅▆▇█"


def _check_same_run(options: TrainOptions, progress: Progress, settings: dict[str, Any]) -> None:
    if progress.settings == settings:
        return
    every = settings.keys() | progress.settings.keys()
    changed = sorted(k for k in every if settings.get(k) != progress.settings.get(k))
    raise CheckpointError(
        f"{options.out.absolute()} holds a checkpoint of another run (step {progress.step}); different: "
        f"{', '.join(changed)}. Repeat that run's command, or add --restart to begin anew"
    )


def image_cache(options: TrainOptions) -> ImageCache:
    """Make the cache of a run's images, of at most half of the free memory: a small PC has other work, too."""
    budget_mib = min(options.cache_mib, available_memory_mib() // 2)
    return ImageCache(Preprocessor(options.preprocess), options.pixel_format, budget_mib)


def good_images(options: TrainOptions, cache: ImageCache, listener: Listener) -> GoodImages:
    """Load the good images of a run, each checked against its preprocessing, none where the run writes.

    Raises DatasetError or TrainingStopped.
    """

    def fit(file: ImageFile, image: Image) -> PixelFormat:
        listener.go_on("while reading the images")
        return cache.add(file, image)

    part = None if options.part is None else re.compile(options.part)
    good = load_good_images(options.dataset, options.held_out_share, options.seed, fit, part)
    refuse_among_images(options.out, good.train + good.held_out)
    return good


def tell_of_images(good: GoodImages, listener: Listener) -> None:
    """Say what was found among the good images: how many, copies, sizes, formats, unreadable files."""
    listener.say(f"{len(good.train)} good images to learn from, {len(good.held_out)} held out ({good.layout})")
    if good.left_out:
        listener.say(f"{good.left_out} more photographs of held-out parts are left out: of each one counts")
    for name, why in good.corrupt:
        listener.say(f"skipped {name}: {why}")
    for names in good.duplicates:
        listener.say(f"the same image twice, kept on one side of the split: {', '.join(names[:5])}")
    if len(good.sizes) > 1:
        widths, heights = zip(*good.sizes, strict=True)
        listener.say(
            f"images of {len(good.sizes)} sizes, {min(widths)}x{min(heights)} to {max(widths)}x{max(heights)} px: "
            "each is resized to the network's input"
        )
    if len(good.pixel_formats) > 1:
        listener.say(f"pixel formats are mixed: {', '.join(good.pixel_formats)}")
    if good.corrupt:
        listener.say(f"{len(good.corrupt)} unreadable files were skipped")
    count = len(good.digests)
    if count < _FEW_IMAGES:
        listener.say(
            f"only {count} different images: expect defects like the training images' own differences to escape, "
            f"and about 1 good part in {len(good.held_out) + 1} to be rejected; photograph at least 20, better 100"
        )
