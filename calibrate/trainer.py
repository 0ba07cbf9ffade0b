"""Networks, optimiser and images of one training run, and its single step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibrate.augment import augment, natural_image, read_natural_image, turn
from calibrate.convolution import use_winograd
from calibrate.dataset import GoodImages, ImageCache, PreparedImages
from calibrate.expected import expect_difference
from calibrate.layouts import DatasetError, ImageFile
from calibrate.losses import Losses, efficientad_losses
from calibrate.options import TrainOptions
from calibrate.procedural import natural_like
from calibrate.teacher import (
    Teacher,
    channel_statistics,
    fold_into_last,
    layout_share,
    teacher_features,
    whitening,
)
from drivers.replay import list_images
from pipeline.allocator import keep_freed_memory
from pipeline.architecture import TEACHER_CHANNELS
from pipeline.bundle import sha256_hex
from pipeline.geometry import Tile
from pipeline.networks import EfficientAD
from pipeline.scoring import BoolMap

WEIGHT_DECAY = 1e-5
LATE_LEARNING_RATE_FACTOR, LATE_FROM_SHARE = 0.1, 0.95
_NATURAL_TRIES = 10
_FINGERPRINTED_BYTES = 1 << 16
_FINGERPRINTED_FILES = 1000
"""ImageNet has a thousand times as many."""
_WHITENED_OVER = 200
"""Images over which features are whitened; their channels are normalised over all."""
_LAYOUT_OF = 40
"""Images whose common layout is looked for."""
_PROCEDURAL_POOL = 128
"""Different procedural images of a run's penalty; each is drawn when first needed, and cropped at random."""
_PROCEDURAL_MARGIN_PX = 64
_PROCEDURAL_LARGEST_PX = 320
"""Larger ones are mirrored on: the marks' number, and so the time, grows with the fourth power of the side."""
_BATCHED_UP_TO_PX = 512 * 512
"""Tiles up to this size go through the student together."""

Pixels = NDArray[np.float32]


class Trainer:
    """Networks, optimiser and images of one training run."""

    def __init__(
        self,
        options: TrainOptions,
        good: GoodImages,
        cache: ImageCache,
        device: torch.device,
        precision: str,
    ) -> None:
        self.options, self.device, self.precision = options, device, precision
        keep_freed_memory()
        self._cache = cache
        self.images = PreparedImages(good.train, cache)
        self.natural = _NaturalImages(options)
        self._tiles = options.geometry.tiles()
        self._order: tuple[int, NDArray[np.int64]] | None = None
        # float32 means float32: no TF32 behind its name on a GPU.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(options.seed)
        self.model = EfficientAD(options.size, options.geometry).to(device)
        for network in (self.model.teacher, self.model.student):
            use_winograd(network)
        self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        learnt = [*self.model.student.parameters(), *self.model.autoencoder.parameters()]
        self.optimizer = torch.optim.Adam(learnt, lr=options.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
        self._trunks: dict[int, Tensor] = {}
        self._features: dict[int, Tensor] = {}
        self._cacheable = self._cacheable_features(cache.room_bytes)

    def layout_share(self, teacher: Teacher, on_image: Callable[[], None] = lambda: None) -> float:
        """Find how much of the teacher's features on some training images lies in where they are (`layout_share`).

        Calls `on_image` before each image that is looked at.
        """
        self.model.teacher.load_state_dict(teacher.weights)
        images = ([index] for index in self._some(_LAYOUT_OF))  # in no order: neighbours may show one part twice
        return layout_share(torch.cat(list(self._features_of(image, on_image)), dim=1) for image in images)

    def prepare_teacher(
        self, teacher: Teacher, *, whiten: bool, on_image: Callable[[], None] = lambda: None
    ) -> None:
        """Put the teacher in, with its features whitened or its channels normalised over the training images.

        Calls `on_image` before each image that is looked at.
        """
        network = self.model.teacher
        network.load_state_dict(teacher.weights)
        if whiten:
            fold_into_last(network, *whitening(self._features_of(sorted(self._some(_WHITENED_OVER)), on_image)))
        mean, std = channel_statistics(self._features_of(range(len(self.images)), on_image))
        fold_into_last(network, mean, torch.diag(1 / std.double()))

    def some_images(self, count: int) -> PreparedImages:
        """Choose so many training images at random, the same each time; all where there are fewer."""
        return PreparedImages([self.images.files[index] for index in self._some(count)], self._cache)

    def _some(self, count: int) -> list[int]:
        chosen: list[int] = (
            np.random.default_rng([self.options.seed, 4]).permutation(len(self.images))[:count].tolist()
        )
        return chosen

    @torch.no_grad()
    def _features_of(self, indices: Iterable[int], on_image: Callable[[], None]) -> Iterator[Tensor]:
        for index in indices:
            on_image()
            with self._autocast():
                image = self._tensor(self.images[index])
                if self._cacheable:
                    features = self.model.teacher[-1](self._trunk(index, image))
                    # One after the other in memory, as tiles are: sums in another order would differ.
                    yield features[0].flatten(1).float().contiguous()
                else:
                    yield from teacher_features(self.model.teacher, image, self.options.geometry)

    def step(self, step: int) -> Losses:
        """Do one training step; all its randomness follows from the seed and the step's number."""
        options = self.options
        rng = np.random.default_rng([options.seed, 1, step])
        torch.manual_seed(int(rng.integers(2**31)))  # dropout
        index = self._image_of(step)
        image = self.images[index]
        tile = self._tiles[int(rng.integers(len(self._tiles)))]
        if options.turns.any:
            image = turn(image, options.turns, rng)
        augmented = augment(image, rng)
        natural = self.natural.draw(tile, rng) if options.losses.penalty else None
        late = step >= int(LATE_FROM_SHARE * options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * (LATE_LEARNING_RATE_FACTOR if late else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            tensor = self._tensor(image)
            losses = efficientad_losses(
                self.model,
                self._described(index, tensor, tile),
                tensor,
                self._tensor(augmented),
                None if natural is None else self._tensor(natural),
                tile,
                options.losses,
                batched=(tile.y_px.stop - tile.y_px.start) * (tile.x_px.stop - tile.x_px.start)
                <= _BATCHED_UP_TO_PX,
            )
        losses.total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return losses

    @torch.inference_mode()
    def maps(self, image: Pixels) -> tuple[Pixels, Pixels]:
        """Return both raw maps of a prepared image, (map_height, map_width) each, in training's precision."""
        with self._autocast():
            st, ae = self.model(self._tensor(image))
        return st[0].float().cpu().numpy(), ae[0].float().cpu().numpy()

    @torch.inference_mode()
    def explained_by_autoencoder(self, images: Iterable[Pixels]) -> float:
        """Return which share of the teacher's features' variance over images the autoencoder predicts."""
        self.model.eval()
        missed, total = 0.0, 0.0
        with self._autocast():
            for image in images:
                tensor = self._tensor(image)
                predicted = self.model.autoencode(tensor).float()
                for tile in self._tiles:
                    described = self.model.describe(tensor[:, :, tile.y_px, tile.x_px]).float()
                    # Normalised over the training images: the features' mean is 0 there.
                    missed += float((described - predicted[:, :, tile.rows, tile.columns]).square().mean())
                    total += float(described.square().mean())
        return 1 - missed / total

    def expect_difference(self, images: Callable[[], Iterable[Pixels]], counted: BoolMap) -> float:
        """Tell the networks how far the student is off on good images (`expected.expect_difference`)."""
        return expect_difference(self.model, lambda: map(self._tensor, images()), counted)

    def file_of(self, step: int) -> ImageFile:
        """Name the file that a step learns from."""
        return self.images.files[self._image_of(step)]

    def _image_of(self, step: int) -> int:
        epoch, place = divmod(step, len(self.images))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.options.seed, 2, epoch]).permutation(len(self.images))
        return int(self._order[1][place])

    @torch.no_grad()
    def _described(self, index: int, image: Tensor, tile: Tile) -> Tensor:
        """Return the teacher's features; those of whole, unturned images are computed once."""
        if not self._cacheable:
            return self.model.describe(image[:, :, tile.y_px, tile.x_px])
        known = self._features.get(index)
        if known is not None:
            return known
        described = self.model.describe_trunk(self._trunk(index, image))
        # The teacher's normalisation is folded into its weights, so under autocast these are bfloat16 values.
        described = described.bfloat16() if self.precision == "bf16" else described
        if index in self._trunks:
            del self._trunks[index]
            self._features[index] = described
        return described

    def _trunk(self, index: int, image: Tensor) -> Tensor:
        """Return what the teacher's last convolution reads of a whole image, computed once.

        Normalisation only changes that last convolution, so this holds before and after.
        """
        known = self._trunks.get(index)
        if known is None:
            known = self.model.teacher[:-1](image)
            if len(self._trunks) + len(self._features) < self._cacheable:
                self._trunks[index] = known
        return known

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _tensor(self, image: Pixels) -> Tensor:
        tensor = torch.from_numpy(image)[None].to(self.device)
        return tensor.contiguous(memory_format=torch.channels_last)

    def _cacheable_features(self, room_bytes: int) -> int:
        """Return how many images' features, or what they come from, fit into memory; a GPU computes them anew."""
        options, g = self.options, self.options.geometry
        if self.device.type != "cpu" or g.is_tiled or options.turns.any:
            return 0
        # Before the last convolution there are no more channels than after it, and up to 3 cells more a side.
        numbers = TEACHER_CHANNELS * (g.map_height + 3) * (g.map_width + 3)
        return room_bytes // (numbers * (2 if self.precision == "bf16" else 4))


class _NaturalImages:
    """Images for the pretraining penalty: the user's, else procedural ones."""

    def __init__(self, options: TrainOptions) -> None:
        self._seed = options.seed
        self._drawn: dict[int, NDArray[np.uint8]] = {}
        self._files: list[ImageFile] | None = None
        self.unreadable: dict[str, str] = {}
        """Names and reasons of files that were skipped."""
        if options.natural is not None:
            self._files = [ImageFile(*pair) for pair in list_images(options.natural)]
            if not self._files:
                raise DatasetError(f"{options.natural.absolute()}: no natural images there")

    @property
    def fingerprint(self) -> str:
        """What tells these images from others: all names, and some of the files."""
        if self._files is None:
            return "procedural"
        lines = [file.name for file in self._files]
        for file in self._files[:: -(-len(self._files) // _FINGERPRINTED_FILES)]:
            try:
                with file.path.open("rb") as opened:
                    lines.append(f"{file.path.stat().st_size} {sha256_hex(opened.read(_FINGERPRINTED_BYTES))}")
            except OSError as error:  # skipped and said when it is drawn
                lines.append(str(error.strerror))
        return sha256_hex("\n".join(lines).encode())

    def fill(self, tile: Tile) -> None:
        """Draw all procedural images at once, before a time is taken."""
        if self._files is None:
            for number in range(_PROCEDURAL_POOL):
                self._procedural(number, tile)

    def _procedural(self, number: int, tile: Tile) -> NDArray[np.uint8]:
        """Return a procedural image with a margin around a tile's size."""
        if number not in self._drawn:
            side = max(tile.y_px.stop - tile.y_px.start, tile.x_px.stop - tile.x_px.start) + _PROCEDURAL_MARGIN_PX
            drawing = np.random.default_rng([self._seed, 3, number])
            image = natural_like(drawing, min(side, _PROCEDURAL_LARGEST_PX))
            more = max(0, side - _PROCEDURAL_LARGEST_PX)
            self._drawn[number] = np.pad(image, ((0, more), (0, more), (0, 0)), mode="symmetric")
        return self._drawn[number]

    def draw(self, tile: Tile, rng: np.random.Generator) -> Pixels:
        """Draw one image of a tile's size, (3, height, width), ImageNet-normalised. Raises DatasetError."""
        height, width = tile.y_px.stop - tile.y_px.start, tile.x_px.stop - tile.x_px.start
        if self._files is None:
            image = self._procedural(int(rng.integers(_PROCEDURAL_POOL)), tile)
            top, left = rng.integers(_PROCEDURAL_MARGIN_PX + 1, size=2)
            crop = image[top : top + height, left : left + width]
            return natural_image(crop, width, height, rng, enlarge=False)
        last: Exception | None = None
        for _ in range(_NATURAL_TRIES):
            file = self._files[int(rng.integers(len(self._files)))]
            try:
                return natural_image(read_natural_image(file.path), width, height, rng)
            except (OSError, ValueError) as error:
                self.unreadable[file.name] = str(error)
                last = error
        raise DatasetError(f"{_NATURAL_TRIES} natural images in a row cannot be read; check --natural") from last
