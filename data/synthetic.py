"""Synthetic images of cars, trucks and cats, for use without the photographs.

    python data/synthetic.py --seed 3 --out my_folder

Each image is drawn from its class and a seed. Only shape distinguishes the classes: size,
position, light, background and clutter do not depend on the class, and cars and trucks come in the
colors of cats as well. Some images are degraded so much that no model can classify all of them
correctly, as with photographs. Some training labels are wrong, as in the report's data.
"""

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, not imported: `common` is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

Color = tuple[int, int, int]
Points = list[tuple[float, float]] | np.ndarray
LabeledImages = tuple[np.ndarray, np.ndarray, np.ndarray]  # images, given labels, true labels

# Cars, trucks and cats: the report's counts of train, and about the same fractions in dev.
CLASS_COUNTS = {"train": (4951, 450, 225), "dev": (880, 80, 40)}
# The fraction of wrong labels in each class. The report found many among the cats, but does not
# say how many. All labels in dev are correct, since models are evaluated on it.
WRONG_FRACTIONS = {"train": (0.01, 0.05, 0.25), "dev": (0.0, 0.0, 0.0)}

IMAGE_SIZE = 32
# Drawing three times too large and shrinking gives soft edges, as a lens does.
CANVAS_SIZE = 3 * IMAGE_SIZE

# All settings below were tuned together: with easier images, even naive training recognizes the
# rare cats; with harder ones, better training gains nothing. FRACTION is how many of
# the images have a property, STD a standard deviation. Numbers in the drawing functions further
# down are coordinates.

# How the object lies in the image. Lengths are fractions of the canvas.
HALF_WIDTH_RANGE = (0.36, 0.50)
STRETCH_RANGE = (0.90, 1.12)  # height against width
SHIFT_STD = 0.04  # the usual, slightly careless framing
ROTATION_STD = 0.05  # radians, about 3 degrees
LEAN_STD = 0.05  # sideways slant, as from a camera held low or high
TINY_FRACTION = 0.04  # far away
TINY_FACTOR = 0.5
CUT_FRACTION = 0.05  # so far to one side that the border of the image cuts the object
CUT_SHIFT = 0.3

# What else is in the image.
FLOOR_FRACTION = 0.7  # with a floor, road or lawn; the others have one plain backdrop
HORIZON_RANGE = (0.4, 0.85)  # fraction of the canvas above the floor
STRIPES_FRACTION = 0.3  # with planks, a fence or road markings
SHADOW_FRACTION = 0.6  # with a dark patch on the ground
UNEVENNESS = 18.0  # gray levels by which the backdrop varies from place to place
MAX_CLUTTER_BEHIND = 3
MAX_CLUTTER_IN_FRONT = 1
CLUTTER_SIZE_RANGE = (0.06, 0.2)  # fraction of the canvas
HIDDEN_FRACTION = 0.06  # half of the object is behind a wall

# What the camera does to the image. Gray levels run from 0 to 255.
CONTRAST_RANGE = (0.7, 1.15)
BRIGHTNESS_STD = 12.0  # gray levels
COLOR_CAST_STD = 6.0  # gray levels, separately for red, green and blue
SLOPE_STD = 14.0  # gray levels from one side of the image to the other
DARK_FRACTION = 0.04  # taken at night: most of the contrast is gone
DARK_FACTOR = 0.25
DARK_LOSS = 60.0  # gray levels
BLUR_FRACTION = 0.2
BLUR_RANGE = (0.4, 1.2)  # radius in pixels of the finished image
NOISE_RANGE = (2.0, 8.0)  # gray levels

# Cats wear coats; cars, trucks and clutter wear any paint. Coats are counted twice among the
# paints, so that most cars and trucks have the color of some cat and color proves little.
COATS = [(40, 38, 40), (95, 95, 100), (150, 148, 145), (225, 222, 215), (200, 120, 55)]
COATS += [(120, 82, 52), (205, 175, 130), (80, 60, 50)]
PAINTS = [(190, 40, 35), (40, 80, 170), (50, 130, 70), (220, 180, 50), (70, 150, 180)]
PAINTS += COATS + COATS
COLOR_STD = 9.0  # gray levels by which a color differs from its palette
OUTLINE_STD = 0.03  # how far corners move, where 1 is half the object's width
STRIPED_FRACTION = 0.5  # of the cats
AWAY_FRACTION = 0.35  # of the cats look away, so that eyes alone do not find them all

SKIES_AND_WALLS = [(150, 185, 215), (200, 205, 210), (215, 205, 180), (170, 140, 130)]
SKIES_AND_WALLS += [(100, 130, 85), (75, 80, 100)]
FLOORS = [(120, 120, 125), (75, 75, 80), (115, 145, 80), (165, 125, 85), (200, 190, 170)]
GLASS = [(45, 55, 65), (95, 115, 130), (170, 195, 205)]
EYES = [(190, 200, 70), (220, 170, 50), (110, 170, 110), (130, 180, 210)]
BLACK = (22, 22, 25)
PALE = (225, 225, 205)
PINK = (215, 150, 145)
RED_LIGHT = (185, 45, 40)

# Roof lines of sedan, hatchback, station wagon and sports car, from the rear to the hood.
CAR_ROOFS = [
    [(-0.62, 0.0), (-0.40, -0.38), (0.15, -0.40), (0.48, 0.0)],
    [(-0.90, 0.0), (-0.74, -0.42), (0.10, -0.44), (0.45, 0.0)],
    [(-0.97, 0.0), (-0.90, -0.42), (0.15, -0.44), (0.50, 0.0)],
    [(-0.75, 0.0), (-0.20, -0.30), (0.05, -0.30), (0.42, 0.0)],
]

ANGLES = np.linspace(0, 2 * np.pi, 16, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)


def prepare(folder: Path, seed: int = 0) -> None:
    """Draw the data set and write it to `folder` in the course's form."""
    cli.say(f"Drawing synthetic images into {folder} (only once).")
    splits = {}
    for number, split in enumerate(CLASS_COUNTS):
        given, true = draw_labels(split, seed)
        splits[split] = (draw_images(true, seed * len(CLASS_COUNTS) + number), given, true)
    write_course_form(folder, splits)


def draw_labels(split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the labels of an imbalanced split in which some are wrong.

    Returns:
        given and true labels, int64 [N] each, in random order. The given ones have exactly
        CLASS_COUNTS, and in each class the fraction WRONG_FRACTIONS of them is wrong.
    """
    counts = CLASS_COUNTS[split]
    generator = np.random.default_rng((seed, list(CLASS_COUNTS).index(split)))
    given = np.repeat(np.arange(len(counts)), counts)
    true = given.copy()
    for label, fraction in enumerate(WRONG_FRACTIONS[split]):
        members = np.flatnonzero(given == label)
        wrong = generator.choice(members, size=round(fraction * len(members)), replace=False)
        true[wrong] = (label + generator.integers(1, len(counts), len(wrong))) % len(counts)
    order = generator.permutation(len(given))
    return given[order], true[order]


def write_course_form(folder: Path, splits: dict[str, LabeledImages]) -> None:
    """Write the course's pickles, and the true labels in true_labels.json next to them.

    The pickles are written last: if they exist, the data set is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cli.remove_leftovers(folder)
    for split in splits:  # old pickles must not be combined with new true labels
        (folder / f"{split}.pickle").unlink(missing_ok=True)
    text = json.dumps({split: true.tolist() for split, (_, _, true) in splits.items()})
    cli.write_text(folder / "true_labels.json", text)
    for split, (images, given, _) in splits.items():
        pixels = torch.from_numpy(images).float() / 127.5 - 1
        items = [(x.clone(), int(y)) for x, y in zip(pixels, given, strict=True)]
        content = pickle.dumps(items, protocol=4)
        cli.write_atomic(folder / f"{split}.pickle", partial(Path.write_bytes, data=content))


def draw_images(labels: np.ndarray, seed: int) -> np.ndarray:
    """Draw one image per label: 0 a car, 1 a truck, 2 a cat.

    Returns:
        uint8 [N, 3, 32, 32]. Image i depends on labels[i], seed and i alone (and on the
        releases of NumPy and Pillow).
    """
    images = np.empty((len(labels), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    # disable=None: a progress bar on a terminal, none in a file
    for index, label in enumerate(tqdm(labels, "drawing images", leave=False, disable=None)):
        images[index] = draw_image(int(label), np.random.default_rng((seed, index)))
    return images


def draw_image(label: int, generator: Generator) -> np.ndarray:
    """Draw one image from back to front, uint8 [3, 32, 32]: what comes later covers the rest."""
    image = draw_background(generator)
    canvas = ImageDraw.Draw(image)
    draw_clutter(canvas, MAX_CLUTTER_BEHIND, generator)
    brush = place_object(canvas, generator)
    draw_view, ground = pick(VIEWS[label], generator)
    draw_shadow(brush, ground, generator)
    draw_view(brush, pick_color(COLORS[label], generator), generator)
    draw_clutter(canvas, MAX_CLUTTER_IN_FRONT, generator)
    if generator.random() < HIDDEN_FRACTION:
        draw_wall_in_front(brush, generator)
    return simulate_camera(image, generator)


# ---- tools ----------------------------------------------------------------------------------


@dataclass
class Brush:
    """Draws in the object's own coordinates: from -1 to 1 across and down, (0, 0) the middle.

    Size, tilt and mirroring are all in `matrix`, so that the code that knows what a cat looks
    like need not know where in the image the cat is.
    """

    canvas: ImageDraw.ImageDraw
    matrix: np.ndarray
    middle: np.ndarray

    def place(self, points: Points) -> np.ndarray:
        """Where on the canvas the object's points lie."""
        return np.asarray(points) @ self.matrix.T + self.middle

    def part(self, x: float, y: float, change: np.ndarray) -> "Brush":
        """A brush for a part of the object, around its own middle (x, y)."""
        return Brush(self.canvas, self.matrix @ change, self.place(np.array([x, y])))

    def polygon(self, points: Points, color: Color) -> None:
        """Fill the outline through the points."""
        self.canvas.polygon(self.place(points).ravel().tolist(), fill=color)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        """Fill an upright rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)

    def ellipse(self, x: float, y: float, width: float, height: float, color: Color) -> None:
        """Fill an ellipse around (x, y)."""
        self.polygon(CIRCLE * (width / 2, height / 2) + (x, y), color)

    def line(self, points: Points, thickness: float, color: Color) -> None:
        """Draw through the points; the thickness shrinks and grows with the object."""
        scale = np.sqrt(np.abs(np.linalg.det(self.matrix)))
        width = max(1, round(thickness * scale))
        self.canvas.line(self.place(points).ravel().tolist(), color, width, joint="curve")


def pick(choices: list, generator: Generator) -> Any:
    """One of the choices, all equally likely."""
    return choices[generator.integers(len(choices))]


def pick_color(palette: list[Color], generator: Generator) -> Color:
    """A color close to one of those in the palette."""
    return to_color(np.array(pick(palette, generator)) + generator.normal(0, COLOR_STD, size=3))


def shade(color: Color, factor: float) -> Color:
    """The same color in more light (factor above 1) or less (below 1)."""
    return to_color(np.array(color) * factor)


def to_color(values: np.ndarray) -> Color:
    """Whole numbers from 0 to 255, as Pillow wants them."""
    red, green, blue = np.clip(values, 0, 255).astype(int).tolist()
    return red, green, blue


def wobble(points: Points, generator: Generator) -> np.ndarray:
    """Move every corner a little, so that no two outlines are the same."""
    return np.array(points) + generator.normal(0, OUTLINE_STD, size=(len(points), 2))


def rotation(angle: float) -> np.ndarray:
    """The matrix that turns points by the angle, in radians."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


# ---- the scene ------------------------------------------------------------------------------


def place_object(canvas: ImageDraw.ImageDraw, generator: Generator) -> Brush:
    """Choose size, direction, tilt and place, without looking at the class."""
    width = generator.uniform(*HALF_WIDTH_RANGE) * CANVAS_SIZE
    if generator.random() < TINY_FRACTION:
        width *= TINY_FACTOR
    height = width * generator.uniform(*STRETCH_RANGE)
    mirror = pick([-1, 1], generator)
    lean = generator.normal(0, LEAN_STD)
    shape = np.array([[width * mirror, 0.0], [width * lean, height]])
    shift = generator.normal(0, SHIFT_STD, size=2)
    if generator.random() < CUT_FRACTION:
        shift[0] = pick([-CUT_SHIFT, CUT_SHIFT], generator)
    turn = rotation(generator.normal(0, ROTATION_STD))
    return Brush(canvas, turn @ shape, (0.5 + shift) * CANVAS_SIZE)


def draw_background(generator: Generator) -> Image.Image:
    """An uneven wall or sky, often with a floor, sometimes with stripes."""
    wall = pick_color(SKIES_AND_WALLS, generator)
    patches = np.array(wall) + generator.normal(0, UNEVENNESS, size=(4, 4, 1))
    image = Image.fromarray(np.clip(patches, 0, 255).astype(np.uint8))
    image = image.resize((CANVAS_SIZE, CANVAS_SIZE), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(image)
    if generator.random() < FLOOR_FRACTION:
        horizon = generator.uniform(*HORIZON_RANGE) * CANVAS_SIZE
        floor = pick_color(FLOORS, generator)
        canvas.rectangle((0, horizon, CANVAS_SIZE, CANVAS_SIZE), floor)
    if generator.random() < STRIPES_FRACTION:
        draw_stripes(canvas, generator)
    return image


def draw_stripes(canvas: ImageDraw.ImageDraw, generator: Generator) -> None:
    """Parallel lines, upright or level, across the whole canvas."""
    color = pick_color(FLOORS, generator)
    width = int(generator.integers(1, 5))
    slope = generator.uniform(-20, 20)
    upright = generator.random() < 0.5
    step = int(generator.integers(9, 30))
    for start in range(0, CANVAS_SIZE, step):
        across = (start, 0, start + slope, CANVAS_SIZE)
        level = (0, start, CANVAS_SIZE, start + slope)
        canvas.line(across if upright else level, color, width)


def draw_clutter(canvas: ImageDraw.ImageDraw, most: int, generator: Generator) -> None:
    """Up to `most` things that belong to no class, anywhere in the image."""
    for _ in range(generator.integers(most + 1)):
        size = generator.uniform(*CLUTTER_SIZE_RANGE) * CANVAS_SIZE
        brush = Brush(canvas, size * np.eye(2), generator.uniform(0, CANVAS_SIZE, size=2))
        draw_thing = pick(CLUTTER, generator)
        draw_thing(brush, generator)


def draw_box(brush: Brush, generator: Generator) -> None:
    """A crate if it comes out wide, a pole if narrow."""
    paint = pick_color(PAINTS, generator)
    width, height = generator.uniform(0.2, 1.0), generator.uniform(0.7, 4.0)
    brush.box(-width, -height, width, height, paint)
    brush.box(-width, -height, width, 0.2 - height, shade(paint, 1.25))


def draw_bush(brush: Brush, generator: Generator) -> None:
    """A few round clumps of leaves, fresh or dry."""
    green = pick_color(FLOORS, generator)
    for x, y in generator.normal(0, 0.5, size=(5, 2)):
        brush.ellipse(x, y, 1.2, 1.2, shade(green, generator.uniform(0.7, 1.1)))


def draw_disc(brush: Brush, generator: Generator) -> None:
    """Looks like a wheel, so that a wheel alone does not make a car."""
    draw_wheel(brush, 0, 0, 1.4, generator)


def draw_wedges(brush: Brush, generator: Generator) -> None:
    """Look like a pair of ears, so that ears alone do not make a cat."""
    paint = pick_color(PAINTS, generator)
    for x in (-0.6, 0.6):
        brush.polygon([(x - 0.5, 0.6), (x, -0.7), (x + 0.5, 0.6)], paint)


CLUTTER = [draw_box, draw_bush, draw_disc, draw_wedges]


def draw_shadow(brush: Brush, ground: float, generator: Generator) -> None:
    """Often a dark patch where the object touches the ground, whatever the object is."""
    if generator.random() < SHADOW_FRACTION:
        gray = int(generator.integers(40, 90))
        brush.ellipse(0, ground, 2.0, 0.22, (gray, gray, gray))


def draw_wall_in_front(brush: Brush, generator: Generator) -> None:
    """Hide one side of the object, or its lower half."""
    wall = pick_color(SKIES_AND_WALLS, generator)
    edge = generator.uniform(-0.25, 0.25)
    left, top = pick([(edge, -3), (-3, edge)], generator)
    brush.box(left, top, 3, 3, wall)


# ---- cars -----------------------------------------------------------------------------------


def draw_wheel(brush: Brush, x: float, y: float, size: float, generator: Generator) -> None:
    """A tire with a paler hub."""
    gray = int(generator.integers(80, 220))
    brush.ellipse(x, y, size, size, BLACK)
    brush.ellipse(x, y, size / 2, size / 2, (gray, gray, gray))


def draw_car_side(brush: Brush, paint: Color, generator: Generator) -> None:
    """A roof on a long, low body between two wheels, headlight to the right."""
    draw_car_roof(brush, paint, generator)
    body = [(-1, 0.05), (-0.95, -0.05), (0.5, -0.05), (0.95, 0.05), (1, 0.3), (-1, 0.3)]
    brush.polygon(wobble(body, generator), paint)
    brush.box(-0.95, 0.2, 0.97, 0.32, shade(paint, 0.7))
    brush.box(0.86, 0.06, 0.98, 0.16, PALE)
    brush.box(-0.99, 0.05, -0.9, 0.16, RED_LIGHT)
    size = generator.uniform(0.36, 0.46)
    for x in (-0.6, 0.6):
        draw_wheel(brush, x, 0.32, size, generator)


def draw_car_roof(brush: Brush, paint: Color, generator: Generator) -> None:
    """The windows repeat the roof line, a little smaller, with a post between them."""
    roof = wobble(pick(CAR_ROOFS, generator), generator)
    middle = roof.mean(axis=0)
    brush.polygon(roof, paint)
    brush.polygon((roof - middle) * (0.82, 0.72) + middle, pick_color(GLASS, generator))
    post = middle[0] + generator.uniform(-0.1, 0.1)
    brush.box(post - 0.03, -0.36, post + 0.03, 0, paint)


def draw_car_corner(brush: Brush, paint: Color, generator: Generator) -> None:
    """Three-quarter view: a shortened, slanting side and the front, slanting the other way."""
    slanting = np.array([[0.72, 0.0], [0.10, 1.0]])
    draw_car_side(brush.part(-0.25, 0.0, slanting), paint, generator)
    brush.polygon([(0.42, 0.02), (0.84, -0.06), (0.84, 0.3), (0.45, 0.44)], shade(paint, 0.85))
    for x, y in ((0.5, 0.17), (0.78, 0.09)):
        brush.ellipse(x, y, 0.16, 0.14, PALE)


def draw_car_end(brush: Brush, paint: Color, generator: Generator) -> None:
    """Front or rear view: a cabin narrowing upwards on a wide, low body."""
    light = pick([RED_LIGHT, PALE], generator)
    roof = wobble([(-0.72, 0.0), (-0.5, -0.52), (0.5, -0.52), (0.72, 0.0)], generator)
    brush.polygon(roof, paint)
    brush.polygon(roof * (0.86, 0.84), pick_color(GLASS, generator))
    brush.polygon([(-0.8, -0.06), (0.8, -0.06), (0.86, 0.48), (-0.86, 0.48)], paint)
    brush.box(-0.84, 0.34, 0.84, 0.5, shade(paint, 0.7))
    brush.box(-0.4, 0.14, 0.4, 0.27, shade(paint, 0.45))
    for x in (-0.63, 0.63):
        brush.box(x - 0.14, 0.5, x + 0.14, 0.62, BLACK)
        brush.ellipse(x, 0.16, 0.3, 0.2, light)


# ---- trucks ---------------------------------------------------------------------------------


def draw_truck_side(brush: Brush, paint: Color, generator: Generator) -> None:
    """A cab in front, one of several loads behind it, on two or three axles."""
    cab = generator.uniform(0.35, 0.5)
    brush.box(-1, 0.2, 0.95, 0.34, BLACK)
    draw_load = pick(LOADS, generator)
    draw_load(brush, cab - 0.06, generator)
    draw_cab(brush, cab, paint, generator)
    size = generator.uniform(0.28, 0.38)
    for x in pick([(-0.7, 0.7), (-0.8, -0.42, 0.7)], generator):
        draw_wheel(brush, x, 0.36, size, generator)


def draw_cab(brush: Brush, left: float, paint: Color, generator: Generator) -> None:
    """A steep cab from `left` to the front bumper, with a side window."""
    top = generator.uniform(-0.65, -0.45)
    brush.polygon([(left, top), (0.85, top), (0.97, 0), (1, 0.32), (left, 0.32)], paint)
    window = [(left + 0.1, top + 0.1), (0.82, top + 0.1), (0.9, 0), (left + 0.1, 0)]
    brush.polygon(window, pick_color(GLASS, generator))
    brush.box(left, 0.24, 1.0, 0.34, shade(paint, 0.65))
    brush.box(0.88, 0.12, 0.99, 0.22, PALE)


def draw_box_load(brush: Brush, right: float, generator: Generator) -> None:
    """A closed box, as high as the cab or higher, with a stripe of lettering."""
    paint = pick_color(PAINTS, generator)
    top = generator.uniform(-0.85, -0.6)
    brush.box(-1, top, right, 0.24, paint)
    brush.box(-1, top, right, top + 0.07, shade(paint, 1.25))
    brush.box(-0.9, -0.2, right - 0.1, -0.08, pick_color(PAINTS, generator))


def draw_tank_load(brush: Brush, right: float, generator: Generator) -> None:
    """A tank with a highlight along its back."""
    paint = pick_color(PAINTS, generator)
    middle, length = (right - 1) / 2, right + 1
    brush.ellipse(middle, -0.12, length, 0.72, paint)
    brush.ellipse(middle, -0.26, length * 0.8, 0.16, shade(paint, 1.3))


def draw_flatbed_load(brush: Brush, right: float, generator: Generator) -> None:
    """An open platform with a row of crates."""
    brush.box(-1, 0.1, right, 0.24, pick_color(PAINTS, generator))
    for left in np.arange(-0.95, right - 0.3, 0.4):
        top = generator.uniform(-0.5, -0.05)
        brush.box(left, top, left + 0.34, 0.1, pick_color(PAINTS, generator))


def draw_tipper_load(brush: Brush, right: float, generator: Generator) -> None:
    """A ribbed tub heaped with earth."""
    paint = pick_color(PAINTS, generator)
    brush.ellipse((right - 1) / 2, -0.22, right + 0.7, 0.4, pick_color(FLOORS, generator))
    brush.polygon([(-1.05, -0.25), (right, -0.25), (right - 0.1, 0.22), (-0.8, 0.22)], paint)
    for x in (-0.7, -0.35, 0.0):
        brush.box(x, -0.25, x + 0.06, 0.22, shade(paint, 0.7))


LOADS = [draw_box_load, draw_tank_load, draw_flatbed_load, draw_tipper_load]


def draw_truck_front(brush: Brush, paint: Color, generator: Generator) -> None:
    """A tall, upright cab with a wide windshield, mirrors on both sides and low lights."""
    brush.box(-0.7, generator.uniform(-1.1, -0.7), 0.7, 0.4, pick_color(PAINTS, generator))
    cab = [(-0.6, -0.85), (0.6, -0.85), (0.64, 0.55), (-0.64, 0.55)]
    brush.polygon(wobble(cab, generator), paint)
    brush.box(-0.54, -0.66, 0.54, -0.16, pick_color(GLASS, generator))
    brush.box(-0.4, 0.02, 0.4, 0.3, shade(paint, 0.5))
    brush.box(-0.66, 0.4, 0.66, 0.56, shade(paint, 0.7))
    for side in (-1, 1):
        brush.box(0.48 * side - 0.15, 0.56, 0.48 * side + 0.15, 0.74, BLACK)
        brush.box(0.78 * side - 0.07, -0.55, 0.78 * side + 0.07, -0.12, BLACK)
        brush.ellipse(0.5 * side, 0.4, 0.22, 0.18, PALE)


# ---- cats -----------------------------------------------------------------------------------


def draw_tail(brush: Brush, points: Points, coat: Color, generator: Generator) -> None:
    """A smooth curve from the first point, bending towards the second, to the third."""
    start, bend, end = wobble(points, generator)
    steps = np.linspace(0, 1, 8)[:, None]
    curve = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * bend + steps**2 * end
    brush.line(curve, generator.uniform(0.1, 0.18), shade(coat, 0.85))


def draw_tabby(brush: Brush, x: float, y: float, coat: Color, generator: Generator) -> None:
    """Some cats have dark stripes around (x, y)."""
    if generator.random() < STRIPED_FRACTION:
        for shift in (-0.36, -0.12, 0.12, 0.36):
            ends = [(x + shift, y - 0.15), (x + shift + 0.04, y + 0.15)]
            brush.line(ends, 0.07, shade(coat, 0.6))


def draw_head(
    brush: Brush, x: float, y: float, radius: float, coat: Color, generator: Generator
) -> None:
    """A round head around (x, y) with two pointed ears."""
    head = brush.part(x, y, radius * rotation(generator.normal(0, 0.15)))
    tip = generator.uniform(0.7, 0.9)
    for side in (-1, 1):
        ear = np.array([(0.95, -0.15), (tip, -1.3), (0.1, -0.75)]) * (side, 1)
        middle = ear.mean(axis=0)
        head.polygon(ear, coat)
        head.polygon((ear - middle) * 0.55 + middle, shade(coat, 0.75))
    head.ellipse(0, 0, 2.0, 1.7, coat)
    if generator.random() > AWAY_FRACTION:
        draw_face(head, coat, generator)


def draw_face(head: Brush, coat: Color, generator: Generator) -> None:
    """Eyes with narrow or wide pupils, a paler muzzle, a nose and whiskers."""
    iris = pick_color(EYES, generator)
    pupil = generator.uniform(0.12, 0.3)
    head.ellipse(0, 0.42, 0.8, 0.5, shade(coat, 1.3))
    head.polygon([(-0.13, 0.25), (0.13, 0.25), (0, 0.42)], PINK)
    for side in (-1, 1):
        head.ellipse(0.42 * side, -0.1, 0.46, 0.4, iris)
        head.ellipse(0.42 * side, -0.1, pupil, 0.38, BLACK)
        for y in (0.3, 0.45, 0.6):
            head.line([(0.3 * side, 0.42), (1.3 * side, y)], 0.03, PALE)


def draw_cat_sitting(brush: Brush, coat: Color, generator: Generator) -> None:
    """Upright, tail to one side, front paws together."""
    draw_tail(brush, [(0.3, 0.75), (1.0, 0.8), (0.7, 0.1)], coat, generator)
    brush.ellipse(0, 0.35, generator.uniform(0.8, 1.05), 1.2, coat)
    draw_tabby(brush, 0, 0.3, coat, generator)
    brush.ellipse(0, 0.35, 0.35, 0.6, shade(coat, 1.25))
    for x in (-0.17, 0.17):
        brush.ellipse(x, 0.88, 0.3, 0.2, shade(coat, 1.15))
    draw_head(brush, generator.normal(0, 0.08), -0.35, 0.4, coat, generator)


def draw_cat_lying(brush: Brush, coat: Color, generator: Generator) -> None:
    """Stretched out, front paws forward, head up."""
    draw_tail(brush, [(-0.8, 0.4), (-1.2, 0.5), (-0.5, 0.56)], coat, generator)
    brush.ellipse(-0.15, 0.2, 1.6, generator.uniform(0.6, 0.8), coat)
    brush.ellipse(-0.55, 0.25, 0.75, 0.65, shade(coat, 0.9))
    draw_tabby(brush, -0.2, 0.05, coat, generator)
    for y in (0.44, 0.54):
        brush.ellipse(0.55, y, 0.6, 0.14, shade(coat, 1.1))
    draw_head(brush, 0.55, generator.uniform(-0.2, 0.1), 0.33, coat, generator)


def draw_cat_curled(brush: Brush, coat: Color, generator: Generator) -> None:
    """Asleep: a ball with the head tucked in and the tail around it."""
    brush.ellipse(-0.05, 0.18, 1.5, generator.uniform(0.75, 1.0), coat)
    draw_tabby(brush, -0.1, -0.05, coat, generator)
    draw_head(brush, 0.5, 0.12, 0.36, shade(coat, 1.12), generator)
    draw_tail(brush, [(-0.7, 0.2), (-0.4, 0.75), (0.45, 0.58)], coat, generator)


def draw_cat_walking(brush: Brush, coat: Color, generator: Generator) -> None:
    """On four legs, tail in the air."""
    tip = (generator.uniform(-1.3, -0.7), generator.uniform(-0.9, -0.2))
    draw_tail(brush, [(-0.65, -0.05), (-1.05, -0.1), tip], coat, generator)
    for hip in (-0.6, -0.45, 0.3, 0.45):
        paw = hip + generator.normal(0, 0.12)
        brush.line([(hip, 0.1), (paw, 0.65)], 0.15, shade(coat, 0.85))
    brush.ellipse(-0.08, 0.08, 1.4, generator.uniform(0.45, 0.6), coat)
    draw_tabby(brush, -0.15, 0.02, coat, generator)
    draw_head(brush, 0.65, -0.2, 0.3, coat, generator)


def draw_cat_close(brush: Brush, coat: Color, generator: Generator) -> None:
    """Head and shoulders only."""
    brush.ellipse(0, 1.1, 1.5, 1.2, shade(coat, 0.85))
    draw_head(brush, 0, 0.1, 0.75, coat, generator)
    draw_tabby(brush, 0, -0.35, coat, generator)


# Cars, trucks, cats: the colors they come in.
COLORS = [PAINTS, PAINTS, COATS]

# Cars, trucks, cats: the ways to draw them, each with the height at which it touches the ground.
# The side of a truck counts twice, because its loads differ more than fronts do.
VIEWS = [
    [(draw_car_side, 0.5), (draw_car_corner, 0.5), (draw_car_end, 0.6)],
    [(draw_truck_side, 0.5), (draw_truck_side, 0.5), (draw_truck_front, 0.7)],
    [
        (draw_cat_sitting, 0.9),
        (draw_cat_lying, 0.55),
        (draw_cat_curled, 0.6),
        (draw_cat_walking, 0.62),
        (draw_cat_close, 0.95),
    ],
]


# ---- the camera -----------------------------------------------------------------------------


def simulate_camera(image: Image.Image, generator: Generator) -> np.ndarray:
    """Shrink and degrade a drawing as a camera would; return uint8 [3, 32, 32]."""
    small = image.reduce(CANVAS_SIZE // IMAGE_SIZE)
    if generator.random() < BLUR_FRACTION:
        small = small.filter(ImageFilter.GaussianBlur(generator.uniform(*BLUR_RANGE)))
    pixels = change_light(np.asarray(small, dtype=float), generator)
    noise = generator.normal(0, generator.uniform(*NOISE_RANGE), size=pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8).transpose(2, 0, 1)


def change_light(pixels: np.ndarray, generator: Generator) -> np.ndarray:
    """Change contrast, brightness and color cast, and darken the left or the right side."""
    contrast = generator.uniform(*CONTRAST_RANGE)
    brightness = generator.normal(0, BRIGHTNESS_STD)
    if generator.random() < DARK_FRACTION:
        contrast *= DARK_FACTOR
        brightness -= DARK_LOSS
    cast = generator.normal(0, COLOR_CAST_STD, size=3)
    slope = np.linspace(-0.5, 0.5, IMAGE_SIZE) * generator.normal(0, SLOPE_STD)
    return (pixels - 128) * contrast + 128 + brightness + cast + slope[:, None]


def prepare_by_hand(
    prepare: Callable[[Path, int], None], folder: Path, description: str | None
) -> None:
    """Prepare a data set with the seed and the folder that the options name."""
    parser = cli.new_parser(description)
    parser.add_argument("--seed", type=cli.natural_number, default="0", help="random seed")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=folder, help="folder to write to"
    )
    arguments = parser.parse_args()
    prepare(arguments.out, arguments.seed)


def main() -> None:
    """Write a data set with another seed, or to another folder."""
    prepare_by_hand(prepare, cli.PROJECT / "data" / "synthetic", __doc__)


if __name__ == "__main__":
    cli.run(main)
