"""Anti-aliased, textured objects composed onto photographs, with exact visible masks.

Reproducible bytes are the aim: random numbers come from `numpy.random.RandomState`, whose stream is
frozen, and pixels from integer arithmetic or from the IEEE-exact float operations (+ - * / and
comparisons). Trigonometry is used for a few scalars only, rounded before use.

Legend: H, W image height and width in pixels; h, w those of an object's window; S sub-samples
per pixel side; u, v an object's own coordinates, its outline inside [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

SUBSAMPLES = 4
# Pixels with at least half of their area covered belong to the object.
ALPHA_MAX = SUBSAMPLES * SUBSAMPLES
ALPHA_MIN_INSIDE = ALPHA_MAX // 2

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


# Outlines: u, v -> bool ------------------------------------------------------------------------
def disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Unit disc."""
    return u * u + v * v <= 1


def ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Unit disc with a round hole of half its radius."""
    r2 = u * u + v * v
    return (r2 <= 1) & (r2 >= 0.25)


def rectangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Square of side 2 (a rectangle once the axes differ)."""
    return (np.abs(u) <= 1) & (np.abs(v) <= 1)


def diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Square standing on its corner."""
    return np.abs(u) + np.abs(v) <= 1


def triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Triangle with its base below (v = 0.9) and its apex above."""
    return (v <= 0.9) & (2 * np.abs(u) <= v + 1)


def pennant(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Triangle lying on its side, apex to the right."""
    return (u >= -1) & (2 * np.abs(v) <= 1 - u)


def blob(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two joined discs: the shape of no category."""
    left = (u + 0.35) * (u + 0.35) + (v + 0.2) * (v + 0.2) <= 0.4
    right = (u - 0.4) * (u - 0.4) + (v - 0.3) * (v - 0.3) <= 0.34
    return left | right


# Patterns: u, v -> bool, True where the second colour goes ------------------------------------
def _odd(cells: np.ndarray) -> np.ndarray:
    return np.floor(cells).astype(np.int64) % 2 == 1


def rings_pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Concentric bands."""
    return _odd((u * u + v * v) * 3)


def stripes_pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Eight bands across u."""
    return _odd((u + 1) * 4)


def slats_pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Eight bands across v."""
    return _odd((v + 1) * 4)


def dots_pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Dots on a square grid."""
    du = u * 3 - np.floor(u * 3) - 0.5
    dv = v * 3 - np.floor(v * 3) - 0.5
    return du * du + dv * dv <= 0.12


def quarters_pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Opposite quarters share a colour."""
    return (u > 0) ^ (v > 0)


def checks_pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Chessboard."""
    return _odd((u + 1) * 3) ^ _odd((v + 1) * 3)


def frame_pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A wide border."""
    return (np.abs(u) > 0.7) | (np.abs(v) > 0.7)


def panes_pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Border and a cross, as in a window."""
    return ((np.abs(u) > 0.85) | (np.abs(v) > 0.85) | (np.abs(u) < 0.12) | (np.abs(v) < 0.12))


def hands_pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Rim and two hands, as on a clock."""
    rim = u * u + v * v > 0.72
    hands = ((np.abs(u) < 0.1) & (v < 0.1) & (v > -0.7)) | (
        (np.abs(v) < 0.1) & (u > -0.1) & (u < 0.55))
    return rim | hands


def plain_pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The first colour only."""
    return np.zeros(np.broadcast(u, v).shape, dtype=bool)


@dataclass(frozen=True)
class Kind:
    """How one category looks. Colours are not part of it: they are drawn at random per object.

    Attributes:
        name: Category name of the data set.
        outline: u, v -> bool.
        pattern: u, v -> bool, where the second colour goes.
        aspect: Range of half height over half width.
        tilt: Largest rotation either way in degrees.
        scale: Factor on the sizes drawn for the scene.
    """

    name: str
    outline: Field
    pattern: Field
    aspect: tuple[float, float] = (0.8, 1.25)
    tilt: float = 15.0
    scale: float = 1.0


@dataclass(frozen=True)
class Placed:
    """One object: window corner on the canvas, alpha and pattern share, both (h, w) in 0..16."""

    kind: int
    top: int
    left: int
    alpha: np.ndarray
    pattern: np.ndarray

    def inside(self) -> np.ndarray:
        """Pixels of the window that belong to the object, (h, w) bool."""
        return self.alpha >= ALPHA_MIN_INSIDE

    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the window on the canvas."""
        h, w = self.alpha.shape
        return slice(self.top, self.top + h), slice(self.left, self.left + w)


def rasterize(kind: Kind, index: int, center: tuple[float, float], half: tuple[float, float],
              degrees: float, canvas: tuple[int, int]) -> Placed | None:
    """Cover the pixels of one object, clipped to the canvas.

    Args:
        kind: Outline and pattern.
        index: Number that identifies the kind in the scene.
        center: x, y in pixels.
        half: Half width and half height in pixels.
        degrees: Rotation, clockwise on the screen.
        canvas: H, W.

    Returns:
        The object, or None where it lies wholly outside.
    """
    cos = round(math.cos(math.radians(degrees)), 6)
    sin = round(math.sin(math.radians(degrees)), 6)
    reach_x = abs(half[0] * cos) + abs(half[1] * sin)
    reach_y = abs(half[0] * sin) + abs(half[1] * cos)
    left, top = max(0, math.floor(center[0] - reach_x)), max(0, math.floor(center[1] - reach_y))
    right = min(canvas[1], math.ceil(center[0] + reach_x))
    bottom = min(canvas[0], math.ceil(center[1] + reach_y))
    w, h = right - left, bottom - top
    if w <= 0 or h <= 0:
        return None
    # Sub-sample centres, (1, w*S) and (h*S, 1).
    x = (np.arange(w * SUBSAMPLES) + 0.5) / SUBSAMPLES + (left - center[0])
    y = (np.arange(h * SUBSAMPLES) + 0.5) / SUBSAMPLES + (top - center[1])
    x, y = x[None, :], y[:, None]
    u, v = (x * cos + y * sin) / half[0], (y * cos - x * sin) / half[1]
    covered = kind.outline(u, v)
    second = kind.pattern(u, v) & covered

    def per_pixel(samples: np.ndarray) -> np.ndarray:
        blocks = samples.reshape(h, SUBSAMPLES, w, SUBSAMPLES)
        return blocks.sum(axis=(1, 3), dtype=np.int32)

    return Placed(index, top, left, per_pixel(covered), per_pixel(second))


def random_colors(rng: np.random.RandomState, around: np.ndarray) -> np.ndarray:
    """Draw two colours that differ from each other and from the surroundings.

    Args:
        rng: Source of randomness.
        around: Mean colour under the object, (3,).

    Returns:
        Two colours, (2, 3) int32. They do not depend on the category.
    """
    while True:
        colors = rng.randint(16, 240, size=(2, 3)).astype(np.int32)
        if (np.abs(colors[0] - colors[1]).sum() >= 180
                and np.abs(colors - around.astype(np.int32)).sum(axis=1).min() >= 120):
            return colors


def paint(canvas: np.ndarray, placed: Placed, rng: np.random.RandomState) -> None:
    """Blend one object over the canvas in place.

    Args:
        canvas: (H, W, 3) uint8.
        placed: The object.
        rng: Source of colours, light and grain.
    """
    rows, columns = placed.window()
    below = canvas[rows, columns].astype(np.int32)
    inside = placed.inside()
    around = below[inside].mean(axis=0) if inside.any() else below.reshape(-1, 3).mean(axis=0)
    first, second = random_colors(rng, around)
    h, w = inside.shape
    alpha, share = placed.alpha[..., None], placed.pattern[..., None]
    color = (first * (alpha - share) + second * share) // np.maximum(alpha, 1)
    # Light falls off linearly across the object, in 1/256 of full brightness.
    slope_x, slope_y = rng.randint(-48, 49, size=2)
    light = 256 + (slope_x * (2 * np.arange(w) - w) // w)[None, :] \
        + (slope_y * (2 * np.arange(h) - h) // h)[:, None]
    grain = rng.randint(-10, 11, size=(h, w, 1))
    color = np.clip(color * light[..., None] // 256 + grain, 0, 255)
    blended = (below * (ALPHA_MAX - alpha) + color * alpha + ALPHA_MAX // 2) // ALPHA_MAX
    canvas[rows, columns] = blended.astype(np.uint8)


def background(photograph: np.ndarray, size: tuple[int, int],
               rng: np.random.RandomState) -> np.ndarray:
    """Cut a random piece of a photograph and resize it.

    Args:
        photograph: (H0, W0, 3) uint8.
        size: H, W of the result.
        rng: Source of randomness.

    Returns:
        (H, W, 3) uint8: cropped, perhaps mirrored, with another brightness and tint per channel.
    """
    H0, W0 = photograph.shape[:2]
    H, W = size
    # Largest window with the wanted aspect ratio, then 50 to 100 % of it.
    w_max = min(W0, H0 * W // H)
    w = w_max * rng.randint(50, 101) // 100
    h = min(H0, w * H // W)
    top, left = rng.randint(0, H0 - h + 1), rng.randint(0, W0 - w + 1)
    piece = photograph[top:top + h, left:left + w]
    if rng.randint(2):
        piece = piece[:, ::-1]
    piece = np.asarray(Image.fromarray(np.ascontiguousarray(piece)).resize((W, H), Image.BILINEAR))
    gain = rng.randint(180, 290) + rng.randint(-30, 31, size=3)
    return np.clip(piece.astype(np.int32) * gain // 256, 0, 255).astype(np.uint8)


def visible_masks(placed: list[Placed], size: tuple[int, int]) -> list[np.ndarray]:
    """Masks of what can be seen of each object, later ones in front.

    Args:
        placed: Objects from back to front.
        size: H, W.

    Returns:
        One (H, W) bool mask per object; no pixel is in two of them.
    """
    owner = np.full(size, -1, dtype=np.int32)
    for number, item in enumerate(placed):
        view = owner[item.window()]
        view[item.inside()] = number
    return [owner == number for number in range(len(placed))]


def place_objects(rng: np.random.RandomState, kinds: list[Kind], wanted: list[int],
                  size: tuple[int, int], half_range: tuple[float, float],
                  min_visible: float = 0.45, tries: int = 12,
                  already: list[Placed] | None = None) -> list[Placed]:
    """Place objects so that they overlap, but every one stays recognisable.

    Args:
        rng: Source of randomness.
        kinds: The categories of the scene.
        wanted: Kind numbers, back to front.
        size: H, W.
        half_range: Smallest and largest half side in pixels.
        min_visible: Smallest share of an object that later ones must leave visible.
        tries: Positions tried before an object is left out.
        already: Objects already there (kept, and never covered below `min_visible`).

    Returns:
        The placed objects, back to front.
    """
    H, W = size
    placed = list(already or [])
    full = [int(item.inside().sum()) for item in placed]
    for index in wanted:
        kind = kinds[index]
        for _ in range(tries):
            half = rng.uniform(*half_range) * kind.scale
            aspect = rng.uniform(*kind.aspect)
            # Equal area whatever the aspect; rounded so that one ulp in sqrt cannot matter.
            root = round(math.sqrt(aspect), 6)
            halves = (half / root, half * root)
            center = (rng.uniform(0.7 * half, W - 0.7 * half),
                      rng.uniform(0.7 * half, H - 0.7 * half))
            degrees = rng.uniform(-kind.tilt, kind.tilt)
            item = rasterize(kind, index, center, halves, degrees, size)
            if item is None or item.inside().sum() < 80:
                continue
            candidate = [*placed, item]
            sizes = [*full, int(item.inside().sum())]
            seen = visible_masks(candidate, size)
            if all(mask.sum() >= min_visible * area
                   for mask, area in zip(seen, sizes, strict=True)):
                placed, full = candidate, sizes
                break
    return placed
