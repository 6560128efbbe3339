"""Canvases: a few pictures of clothing on a grid of nine cells, and questions whose answers can be read from them.

Most cells are black, so most of what a vision-language model sees of a canvas is redundant. Needs numpy and PIL alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE, GRID = 28, 3  # pixels of a cell, cells of a row
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
# of Fashion-MNIST's classes, in its order
NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
EMPTY = -1  # class of an empty cell
KINDS = ("which", "how many", "where")


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Canvas:
    """Pictures on a grid.

    Args:
        pixels: (84, 84), uint8, black where nothing is.
        cells: which cells a model is shown, as indices of `PLACES`, rising; all nine but for the first lessons.
        classes: of each of the nine cells, `EMPTY` where nothing is.
        images: which picture lies in each of the nine cells, `EMPTY` where none does.
    """

    pixels: np.ndarray
    cells: tuple[int, ...]
    classes: tuple[int, ...]
    images: tuple[int, ...]

    def picture(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def tiles(self) -> list[Image.Image]:
        """Pictures of the cells that are shown, 28 x 28 each, in reading order."""
        return [cut(self.picture())[cell] for cell in self.cells]

    def prompt(self) -> str:
        """The text before a question: where each tile is, and the `<image>` that stands for it."""
        return prompt(self.cells)

    def questions(self, random: np.random.Generator, per_kind: int) -> list[Question]:
        """Up to `per_kind` different questions of each kind, in random order.

        `which` asks for an empty cell once in five times; `how many` for the class that is repeated every other time,
        and else as often for one that is not there as for one that is there once; `where` for one that is there once.
        """
        shown = [self.classes[cell] for cell in self.cells]
        times = [shown.count(name) for name in range(len(NAMES))]
        empty = [place == EMPTY for place in shown]
        which = _draw(_shares(empty, (0.8, 0.2)), random, per_kind)
        many = _draw(_shares([min(n, 2) for n in times], (0.25, 0.25, 0.5)), random, per_kind)
        where = _draw(_shares([n != 1 for n in times], (1.0, 0.0)), random, per_kind)
        found = [ask_which(self.cells[i], shown[i]) for i in which]
        found += [ask_how_many(name, times[name]) for name in many]
        found += [ask_where(name, self.cells[shown.index(name)]) for name in where]
        return [found[i] for i in random.permutation(len(found))]


class Canvases:
    """Makes canvases of the pictures of one split.

    Args:
        images: (n, 28, 28), uint8.
        labels: (n,), from 0 to 9.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = np.asarray(images), np.asarray(labels)
        self.of_class = [np.flatnonzero(self.labels == name) for name in range(len(NAMES))]

    def draw(self, seed: Sequence[int], cells: int = GRID * GRID) -> Canvas:
        """A canvas of which `cells` random cells are shown; a third to two thirds of them hold a picture.

        Of n > 2 pictures, 2 to n - 1 are of one class and the others of one class each. Same seed, same canvas.
        """
        random = np.random.default_rng([cells, *seed])
        shown = np.sort(random.choice(GRID * GRID, cells, replace=False))
        count = int(random.integers(max(1, cells // 3), max(1, 2 * cells // 3) + 1))
        repeated = int(random.integers(2, count)) if count > 2 else 1
        names = random.permutation(len(NAMES))[: count - repeated + 1]
        names = np.concatenate([np.full(repeated - 1, names[0]), names])
        images = np.full(GRID * GRID, EMPTY)
        images[random.permutation(shown)[:count]] = [random.choice(self.of_class[name]) for name in names]
        classes = np.where(images == EMPTY, EMPTY, self.labels[images])
        tiles = self.images[images] * (images != EMPTY)[:, None, None].astype(np.uint8)
        return Canvas(paste(tiles), tuple(shown.tolist()), tuple(classes.tolist()), tuple(images.tolist()))


def paste(tiles: np.ndarray) -> np.ndarray:
    """Nine tiles (9, 28, 28) as a canvas (84, 84)."""
    return tiles.reshape(GRID, GRID, SIDE, SIDE).swapaxes(1, 2).reshape(GRID * SIDE, GRID * SIDE)


def cut(picture: Image.Image) -> list[Image.Image]:
    """The nine tiles of a canvas, in reading order."""
    corners = [(SIDE * (cell % GRID), SIDE * (cell // GRID)) for cell in range(GRID * GRID)]
    return [picture.crop((left, top, left + SIDE, top + SIDE)) for left, top in corners]


def prompt(cells: Sequence[int] = range(GRID * GRID)) -> str:
    """The text before a question about a canvas of which `cells` are shown.

    >>> prompt([0, 4])
    ' top left:<image> centre:<image>'
    """
    return "".join(f" {PLACES[cell]}:<image>" for cell in cells)


def ask_which(cell: int, name: int = EMPTY) -> Question:
    """
    >>> ask_which(0, 8)
    Question(kind='which', text='\\nWhich class is at the top left?', answer=' bag')
    """
    answer = "nothing" if name == EMPTY else NAMES[name]
    return Question("which", f"\nWhich class is at the {PLACES[cell]}?", f" {answer}")


def ask_how_many(name: int, count: int = 0) -> Question:
    """
    >>> ask_how_many(3, 2).text
    '\\nHow many dresses are there?'
    """
    plural = f"{NAMES[name]}{'es' if NAMES[name].endswith('s') else 's'}"
    return Question("how many", f"\nHow many {plural} are there?", f" {count}")


def ask_where(name: int, cell: int) -> Question:
    return Question("where", f"\nWhere is the {NAMES[name]}?", f" {PLACES[cell]}")


def _shares(groups: Sequence[int], shares: Sequence[float]) -> np.ndarray:
    """Weights that give all members of group g together the share `shares[g]`."""
    members = [list(groups).count(group) for group in range(len(shares))]
    return np.array([shares[group] / members[group] for group in groups])


def _draw(weights: np.ndarray, random: np.random.Generator, count: int) -> list[int]:
    """Up to `count` different indices, the likelier the larger their weight; never one of weight 0."""
    # exponential times over weights: the smallest are a weighted draw without replacement (Efraimidis and Spirakis)
    waits = random.exponential(size=len(weights)) / np.maximum(weights, 1e-30)
    return [int(i) for i in np.argsort(waits)[: min(count, int((weights > 0).sum()))]]
