"""What `inspectord train` can be told, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from calibrate.normalize import QUANTILE_A, QUANTILE_B
from drivers.frame import PixelFormat
from pipeline.architecture import PdnSize
from pipeline.geometry import Geometry
from pipeline.preprocess import PreprocessSpec

Precision = Literal["auto", "fp32", "bf16"]
PresetName = Literal["quick", "standard", "paper"]


class Preset(NamedTuple):
    """How long and how boldly to learn."""

    steps: int
    learning_rate: float
    """Adam's, a tenth of it from 95% of the steps on."""


PRESETS: dict[PresetName, Preset] = {
    "quick": Preset(500, 1e-3),
    "standard": Preset(3000, 5e-4),
    "paper": Preset(70_000, 1e-4),
}
"""`paper` is the published recipe; the shorter ones take larger steps to get as far as they can."""


@dataclass(frozen=True, slots=True)
class LossOptions:
    """What the paper fixes about the losses and its ablations vary."""

    hard_quantile: float = 0.999
    """p_hard: only differences at or above this quantile are learnt from; 0 learns from all of them."""
    penalty: bool = True
    """Pretraining penalty."""
    autoencoder: bool = True
    """Autoencoder and student-autoencoder losses."""


@dataclass(frozen=True, slots=True)
class Turns:
    """How else a good part may appear: training sees it so, too."""

    flip_horizontal: bool = False
    flip_vertical: bool = False
    rotate_deg: float = 0.0
    """Turned by up to so many degrees to either side; 180: by any angle."""

    @property
    def any(self) -> bool:
        """True where there is anything to do."""
        return self.flip_horizontal or self.flip_vertical or self.rotate_deg > 0


@dataclass(frozen=True)
class TrainOptions:
    """What `inspectord train` can be told."""

    dataset: Path
    out: Path
    size: PdnSize = "small"
    teacher: str | None = None
    """Name of a shipped teacher, `random`, or a file; None: the default that ships."""
    geometry: Geometry = field(default_factory=Geometry)
    preprocess: PreprocessSpec = field(default_factory=lambda: PreprocessSpec(256, 256))
    pixel_format: PixelFormat | None = None
    preset: PresetName = "standard"
    steps: int = PRESETS["standard"].steps
    learning_rate: float = PRESETS["standard"].learning_rate
    whiten: bool | None = None
    """Whiten the teacher's features over the training images instead of normalising each channel alone; None: where
    the images have no common layout (see MIN_LAYOUT_SHARE)."""
    relative_map: bool | None = None
    """Divide maps by what is expected (`calibrate.expected`) and by their own levels (`pipeline.relative`); None:
    where features are whitened."""
    seed: int = 0
    turns: Turns = field(default_factory=Turns)
    held_out_share: float = 0.1
    part: str | None = None
    """Regular expression whose first group, in a photograph's name, says which part it shows."""
    false_reject_rate: float = 0.01
    losses: LossOptions = field(default_factory=LossOptions)
    quantile_levels: tuple[float, float] = (QUANTILE_A, QUANTILE_B)
    natural: Path | None = None
    """Images for the pretraining penalty; None: procedural ones."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "auto"
    cache_mib: int = 4096
    checkpoint_s: float = 30.0
    autoencoder_map: Literal["auto", "always"] = "auto"
    """`auto` leaves the autoencoder's map out where that branch has learnt nothing (see MIN_EXPLAINED)."""
    restart: bool = False
    overwrite: bool = False
