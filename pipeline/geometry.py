"""Where a cell of the anomaly map lies in the network's input, and how large images are cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

RECEPTIVE_FIELD_PX = 33
"""Side of the square that one PDN output sees (paper, section 3.1)."""
CELL_PX = 4
"""Step between neighbouring PDN outputs: two poolings by 2."""
MAP_PADDING_CELLS = 4
"""Cells of zeros around an unpadded PDN's map before it is upsampled, as in the public reference."""
MIN_IMAGE_PX = 64
MIN_TILE_CELLS = 4
AUTOENCODER_PX = 256
"""The autoencoder always sees the whole image at this size (paper, table 6)."""


class GeometryError(ValueError):
    """A combination of image size, tiles and padding that cannot work; the message says what would."""


class Tile(NamedTuple):
    """One piece of the input and the cells of the map that it yields."""

    rows: slice
    """Rows of the map."""
    columns: slice
    """Columns of the map."""
    y_px: slice
    """Rows of the network's input."""
    x_px: slice
    """Columns of the network's input."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes from the network's input to the score, all in the bundle and in every map's metadata.

    An unpadded PDN (the public reference) turns 256×256 px into 56×56 cells; `MAP_PADDING_CELLS` zeros on
    each side make 64×64 before upsampling. The padded PDN (the paper) yields 64×64 at once.

    Tiles bound memory and the cost of a training step. They overlap by the receptive field, so the map is
    the same as without them. Raises GeometryError.
    """

    image_width: int = 256
    image_height: int = 256
    padded: bool = False
    tile_rows: int = 1
    tile_columns: int = 1
    score_width: int = 0
    """Pixels to which the map is upsampled for the score; 0 means the image's width."""
    score_height: int = 0
    """Pixels to which the map is upsampled for the score; 0 means the image's height."""

    def __post_init__(self) -> None:
        for name, size_px in (("width", self.image_width), ("height", self.image_height)):
            if size_px < MIN_IMAGE_PX:
                raise GeometryError(f"image {name} {size_px} px is too small: at least {MIN_IMAGE_PX}")
            if size_px % CELL_PX:
                near_px = size_px - size_px % CELL_PX
                raise GeometryError(
                    f"image {name} {size_px} px is not a multiple of {CELL_PX}: "
                    f"take {near_px} or {near_px + CELL_PX}"
                )
        if self.tile_rows < 1 or self.tile_columns < 1:
            raise GeometryError(f"tiles {self.tile_rows}x{self.tile_columns}: at least 1x1")
        if self.padded and self.is_tiled:
            raise GeometryError(
                "tiles need the unpadded geometry: a padded PDN would put a false border around every tile"
            )
        for name, cells, tiles in (
            ("rows", self.map_height, self.tile_rows),
            ("columns", self.map_width, self.tile_columns),
        ):
            if tiles > 1 and (cells // tiles < MIN_TILE_CELLS or -(-cells // tiles) * (tiles - 1) >= cells):
                raise GeometryError(
                    f"{tiles} {name} of tiles are too many for a map of {cells} {name}: "
                    f"{max(1, cells // (2 * MIN_TILE_CELLS))} at most, or a larger image size"
                )
        object.__setattr__(self, "score_width", self.score_width or self.image_width)
        object.__setattr__(self, "score_height", self.score_height or self.image_height)

    @property
    def is_tiled(self) -> bool:
        """True with more than one tile."""
        return self.tile_rows * self.tile_columns > 1

    @property
    def map_width(self) -> int:
        """Columns of the map."""
        return self._cells(self.image_width)

    @property
    def map_height(self) -> int:
        """Rows of the map."""
        return self._cells(self.image_height)

    @property
    def padding_cells(self) -> int:
        """Cells to add on each side of the map before it is stretched over the image."""
        return 0 if self.padded else MAP_PADDING_CELLS

    def _cells(self, size_px: int) -> int:
        if self.padded:
            return size_px // CELL_PX
        return (size_px - RECEPTIVE_FIELD_PX) // CELL_PX + 1

    def tiles(self) -> list[Tile]:
        """List the tiles, equal in size; together they cover every cell, some of them twice."""
        if not self.is_tiled:
            whole = slice(0, self.map_height), slice(0, self.map_width)
            return [Tile(*whole, slice(0, self.image_height), slice(0, self.image_width))]
        rows = _spans(self.map_height, self.tile_rows)
        columns = _spans(self.map_width, self.tile_columns)
        return [Tile(r, c, _pixels(r), _pixels(c)) for r in rows for c in columns]

    def to_json(self) -> dict[str, Any]:
        """Describe the geometry for a bundle or a map's metadata."""
        return {
            "image_width": self.image_width,
            "image_height": self.image_height,
            "padded": self.padded,
            "tile_rows": self.tile_rows,
            "tile_columns": self.tile_columns,
            "map_width": self.map_width,
            "map_height": self.map_height,
            "padding_cells": self.padding_cells,
            "score_width": self.score_width,
            "score_height": self.score_height,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` wrote. Raises GeometryError, KeyError or TypeError when it is not that."""
        names = ("image_width", "image_height", "tile_rows", "tile_columns", "score_width", "score_height")
        if not all(type(data[name]) is int for name in names) or type(data["padded"]) is not bool:
            raise TypeError("sizes must be integers and `padded` a boolean")
        geometry = cls(padded=data["padded"], **{name: data[name] for name in names})
        for name in ("map_width", "map_height", "padding_cells"):
            if data[name] != getattr(geometry, name):
                raise GeometryError(f"{name} is {data[name]}, which these sizes do not give")
        return geometry


def _spans(cells: int, parts: int) -> list[slice]:
    length = -(-cells // parts)
    starts = [min(part * length, cells - length) for part in range(parts)]
    return [slice(start, start + length) for start in starts]


def _pixels(cells: slice) -> slice:
    return slice(cells.start * CELL_PX, (cells.stop - 1) * CELL_PX + RECEPTIVE_FIELD_PX)
