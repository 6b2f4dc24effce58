"""Images for training: of files with their shape and share, of folders cropped and flipped at random."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mumoe_tensor.training.data import Dataset  # noqa: E402
from mumoe_tensor.training.images import MEAN, ImageData, ImageFiles  # noqa: E402

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Ten images in IDX; all pixels of the k-th are k, and so is its label."""
    x = np.repeat(np.arange(10, dtype=np.uint8), 12).reshape(10, 3, 4)
    paths = {"inputs": tmp_path / "x.gz", "labels": tmp_path / "y.gz"}
    paths["inputs"].write_bytes(idx(x))
    paths["labels"].write_bytes(idx(np.arange(10, dtype=np.uint8)))
    return {name: str(path) for name, path in paths.items()}


def images_of(folder: Path, count: int = 6, size: tuple[int, int] = (40, 30)) -> str:
    """A folder a colour, with images of it whose left half is dark."""
    image = pytest.importorskip("PIL.Image")
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for k in range(count):
            picture = image.new("RGB", size, colour)
            picture.paste((0, 0, 0), (0, 0, size[0] // 2, size[1]))
            picture.save(folder / name / f"{k}.png")
    return str(folder)


# ---- files that are read whole ----------------------------------------------------------------------------


def test_a_share_of_the_rows_is_for_validation(files: dict[str, str]) -> None:
    training, validation = ImageData(**files, validation=0.3, seed=1).read(28)
    assert isinstance(training, Dataset) and isinstance(validation, Dataset)
    assert training.x.shape == (7, 1, 3, 4) and validation.x.shape == (3, 1, 3, 4)
    assert sorted([*training.y.tolist(), *validation.y.tolist()]) == list(range(10))
    for part in (training, validation):
        torch.testing.assert_close(part.x[:, 0, 0, 0] * 255, part.y.float())
    again, other = (ImageData(**files, validation=0.3, seed=seed).read(28)[1] for seed in (1, 2))
    assert isinstance(again, Dataset) and isinstance(other, Dataset)
    assert again.y.tolist() == validation.y.tolist() != other.y.tolist()


def test_an_archive_may_have_channels(tmp_path: Path) -> None:
    path = str(tmp_path / "d.npz")
    np.savez(path, x=np.random.rand(8, 3, 5, 5), y=np.arange(8))
    assert ImageData(path).read(5)[0].batch(torch.tensor([0]))[0].shape == (1, 3, 5, 5)
    np.savez(path, x=np.random.rand(8, 25), y=np.arange(8))
    with pytest.raises(ValueError, match=r"have shape \(rows, height, width\).*\(8, 25\)"):
        ImageData(path).read(5)


def test_choices_that_do_not_fit(files: dict[str, str], tmp_path: Path) -> None:
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=f"validation must be a fraction between 0 and 1, got {share}"):
            ImageData("x.npz", validation=share)
    for augment in ((0, 3), (2, 31), (2, -1)):
        with pytest.raises(ValueError, match="augment must be a number of operations and a magnitude"):
            ImageData("x.npz", augment=augment)
    for options in ({"validation": str(tmp_path)}, {"augment": (2, 15)}):
        with pytest.raises(ValueError, match="can only be used with a folder of images"):
            ImageData(**files, **options).read(28)


# ---- folders ----------------------------------------------------------------------------------------------

folders = pytest.mark.usefixtures("torchvision_schemas")


@folders
def test_images_of_folders(tmp_path: Path) -> None:
    data = ImageData(
        images_of(tmp_path / "train"), validation=images_of(tmp_path / "val", count=2), augment=(2, 15)
    )
    training, validation = data.read(16)
    assert (len(training), len(validation), training.classes, validation.classes) == (18, 6, 3, 3)
    x, y = training.batch(torch.tensor([17, 0]))
    assert x.shape == (2, 3, 16, 16) and x.dtype == torch.float32 and y.tolist() == [2, 0]
    x, y = validation.batch(torch.arange(6))
    assert y.tolist() == [0, 0, 1, 1, 2, 2]  # in the order of the names
    # The middle of each, normalised: dark on the left, its colour on the right.
    for row, label in zip(x, y.tolist(), strict=True):
        channel = 2 - label
        assert row[:, 8, 15].argmax() == channel and row[channel, 8, 15] > 2
        torch.testing.assert_close(row[0, 8, 0], torch.tensor(-MEAN[0] / 0.229), rtol=1e-3, atol=0)


@folders
@pytest.mark.parametrize("augment", [None, (2, 15)])
def test_chance_comes_from_torchs_random_numbers(augment: tuple[int, int] | None, tmp_path: Path) -> None:
    rows = torch.arange(18)
    training, validation = ImageData(images_of(tmp_path), validation=0.2, augment=augment).read(16)
    rows = torch.arange(len(training))

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return training.batch(rows)[0]

    with torch.random.fork_rng():
        first, again, other = drawn(0), drawn(0), drawn(1)
        assert torch.equal(first, again) and not torch.equal(first, other)
        # Some are flipped, some are not.
        left, right = first[..., 0].amax((1, 2)), first[..., -1].amax((1, 2))
        assert bool((left > right).any()) and bool((left < right).any())
        rows = torch.arange(len(validation))
        assert torch.equal(validation.batch(rows)[0], validation.batch(rows)[0])


@folders
def test_augmentation_changes_images(tmp_path: Path) -> None:
    inputs = images_of(tmp_path)
    actual = []
    for augment in (None, (2, 15)):
        training, _ = ImageData(inputs, validation=0.2, augment=augment).read(16)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            actual.append(training.batch(torch.arange(len(training)))[0])
    assert not torch.equal(*actual)


@folders
def test_a_share_of_a_folder_is_for_validation(tmp_path: Path) -> None:
    training, validation = ImageData(images_of(tmp_path), validation=1 / 3).read(16)
    assert isinstance(training, ImageFiles) and isinstance(validation, ImageFiles)
    assert (len(training), len(validation)) == (12, 6)
    names = {path for path, _ in training.files} | {path for path, _ in validation.files}
    assert len(names) == 18 and all(
        Path(path).parent.name == sorted(COLOURS)[y] for path, y in training.files
    )


@folders
def test_folders_that_do_not_fit(tmp_path: Path, files: dict[str, str]) -> None:
    inputs, other = images_of(tmp_path / "train"), images_of(tmp_path / "val")
    with pytest.raises(ValueError, match="labels must be None for a folder of images"):
        ImageData(inputs, labels=files["labels"]).read(16)
    (Path(other) / "red").rename(Path(other) / "violet")
    with pytest.raises(ValueError, match="both folders must have the same classes"):
        ImageData(inputs, validation=other).read(16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a subfolder of images for each class"):
        ImageData(str(tmp_path / "empty")).read(16)
