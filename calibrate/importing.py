"""Make an inspectord bundle of another project's trained model: what its file lacks comes from good images."""

from __future__ import annotations

from dataclasses import replace

import torch

from calibrate.dataset import PreparedImages
from calibrate.foreign import ForeignModel, ImportFailed
from calibrate.listener import Listener
from calibrate.options import TrainOptions
from calibrate.teacher import channel_statistics, teacher_features
from calibrate.train import (
    asking,
    calibrated,
    folder_of_the_run,
    good_images,
    image_cache,
    image_facts,
    raw_maps,
    tell_of_images,
    tell_of_threshold,
    with_precisions,
)
from pipeline.bundle import Bundle, Model, write_bundle
from pipeline.networks import EfficientAD, weights_of
from pipeline.scoring import Scorer


def import_model(foreign: ForeignModel, options: TrainOptions, listener: Listener | None = None) -> Bundle:
    """Calibrate a foreign model on good images and write it as a bundle.

    Args:
        foreign: what `read_foreign` found.
        options: `dataset` holds the good images, `out` takes the bundle; geometry as the model was trained.
        listener: told what is found about precisions.

    Raises ImportFailed when the weights are not EfficientAD's, TrainingError when another run writes there,
    DatasetError, TrainingStopped, or OSError.
    """
    sides = {options.geometry.image_width, options.geometry.image_height}
    if foreign.padded not in (None, options.geometry.padded):
        raise ImportFailed(
            f"{foreign.origin}: was trained {'with' if foreign.padded else 'without'} padding; "
            f"{'add' if foreign.padded else 'leave out'} --padded"
        )
    if foreign.image_px is not None and sides != {foreign.image_px}:
        raise ImportFailed(
            f"{foreign.origin}: at another image size than {foreign.image_px}x{foreign.image_px} its autoencoder "
            "works otherwise than ours, and its map would be wrong; train anew with --teacher instead"
        )
    networks = EfficientAD(foreign.size, options.geometry).eval()
    wanted = {n: t for n, t in networks.state_dict().items() if not n.startswith("teacher_")}
    for name, tensor in wanted.items():
        if name not in foreign.weights:
            raise ImportFailed(f"{foreign.origin}: tensor {name} is missing")
        if foreign.weights[name].shape != tensor.shape:
            found = tuple(foreign.weights[name].shape)
            raise ImportFailed(f"{foreign.origin}: tensor {name} is {found}, not {tuple(tensor.shape)}")
    networks.load_state_dict({n: foreign.weights[n] for n in wanted}, strict=False)
    with folder_of_the_run(options):
        return _calibrated_import(foreign, networks, options, listener or Listener())


def _calibrated_import(
    foreign: ForeignModel, networks: EfficientAD, options: TrainOptions, listener: Listener
) -> Bundle:
    cache = image_cache(options)
    good = good_images(options, cache, listener)
    tell_of_images(good, listener)
    listener.say(
        f"the threshold comes from {len(good.held_out)} good images; it is too low if the model was trained on them"
    )
    statistics = foreign.statistics
    if statistics is None:
        with torch.inference_mode():
            statistics = channel_statistics(
                piece
                for image in asking(PreparedImages(good.train, cache), listener)
                for piece in teacher_features(networks.teacher, torch.from_numpy(image)[None], options.geometry)
            )
    networks.teacher_mean.copy_(statistics[0])
    networks.teacher_std.copy_(statistics[1])
    held_out = PreparedImages(good.held_out, cache)
    model = Model(foreign.size, options.geometry, options.preprocess, weights_of(networks))
    scorer = Scorer(options.geometry, options.preprocess.ignored_in_roi())
    maps = raw_maps(model, held_out, replace(options, device="cpu"), listener)
    bundle, scores = calibrated(
        model,
        maps,
        scorer,
        options,
        autoencoder=True,
        teacher={"name": "imported", "origin": foreign.origin},
        training={
            "imported_from": foreign.origin,
            "teacher_statistics": "from the file" if foreign.statistics is not None else "from the good images",
            "pixel_format": None if options.pixel_format is None else options.pixel_format.value,
            "pixel_formats": good.pixel_formats,
            **image_facts(good, options),
        },
    )
    tell_of_threshold(bundle, scores, [file.name for file in good.held_out], listener)
    bundle = with_precisions(bundle, held_out, maps, scorer, options, listener)
    return write_bundle(bundle, options.out)
