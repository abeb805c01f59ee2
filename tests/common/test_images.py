"""Which cells hold an image: pixels tell images apart, limits come before decoding, paths stay in their folder."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
from digits import digits, encoded, write_folder
from PIL import Image

from fedveil.common.config.flat import Columns
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import load_dataset, load_protected
from fedveil.common.errors import DataError, UnreadableFile
from fedveil.common.tasks import images
from fedveil.common.tasks.cell_files import MOST_BYTES, is_labelled_folder, read_labelled_folder
from fedveil.common.tasks.cells import Misfit
from fedveil.common.tasks.images import IMAGE, MOST_PIXELS, SUFFIXES, read_image

TASK = "image-classification"
CONFIG = DataConfig(labels="0,1", partition="iid")
PIXELS = digits(count=1)[0][0]
PHOTO = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def picture(kind: str = "PNG", **options: object) -> bytes:
    return encoded(PHOTO, kind, **options)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def stated(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that states a size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\x00")) + chunk(b"IEND", b"")


def grey(depth: type = np.uint16) -> bytes:
    return encoded((np.arange(600, dtype=depth).reshape(20, 30) * (100 if depth is np.uint16 else 1)).astype(depth))


# Which image it is.


def test_an_image_encoded_otherwise_without_loss_is_the_same() -> None:
    plain = read_image(picture())
    for other in (picture(compress_level=0), picture(optimize=True), picture("PNG", dpi=(72, 72))):
        assert other != picture()
        assert read_image(other) == plain
        assert read_image(other).pixels == plain.pixels
    transparent = np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)])
    assert read_image(encoded(transparent)) == plain


def test_other_pixels_or_another_shape_are_another_image() -> None:
    changed = PHOTO.copy()
    changed[3, 4, 1] ^= 1
    found = [PHOTO, changed, PHOTO.reshape(30, 20, 3), PHOTO.transpose(1, 0, 2)]
    assert len({read_image(encoded(np.ascontiguousarray(pixels))).pixels for pixels in found}) == 4
    assert read_image(picture("JPEG")) != read_image(picture()), "a loss is another image"


def test_a_grey_image_is_the_same_in_one_channel_and_in_three() -> None:
    assert read_image(encoded(PIXELS)) == read_image(encoded(np.dstack([PIXELS] * 3)))


def test_sixteen_bits_keep_what_they_show() -> None:
    """Pillow's own conversion cuts at 255: every brighter pixel would be white."""
    tones = np.asarray(images.decoded(grey()))[..., 0]
    assert tones.max() == 599 * 100 >> 8
    assert len(np.unique(tones)) > 200
    assert len(np.unique(np.asarray(Image.open(io.BytesIO(grey())).convert("RGB")))) < 5, "the fault is not found"


def test_a_photograph_is_turned_as_its_mark_says() -> None:
    mark = Image.Exif()
    mark[0x0112] = 6  # turned by a quarter
    turned = encoded(PHOTO, "PNG", exif=mark.tobytes())
    assert images.decoded(turned).size == (20, 30)
    assert read_image(turned) == read_image(encoded(np.ascontiguousarray(np.rot90(PHOTO, -1))))


# What is no image.

BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "nothing": (lambda: None, "has no value"),
    "blank": (lambda: "  ", "has no value"),
    "no bytes": (lambda: b"", "has no value"),
    "a number": (lambda: 3, "has no bytes and no path"),
    "a list": (lambda: [1, 2], "has no bytes and no path"),
    "text": (lambda: b"hello", "cannot be decoded"),
    "cut short": (lambda: picture()[:-200], "cannot be decoded"),
    "a jpeg cut short": (lambda: picture("JPEG")[:400], "cannot be decoded"),
    "another format": (lambda: picture("GIF"), "cannot be decoded"),
    "a format of many": (lambda: picture("TIFF"), "cannot be decoded"),
    "a bomb": (lambda: stated(100_000, 100_000), f"of more than {MOST_PIXELS} pixels"),
    "a long bomb": (lambda: stated(1, MOST_PIXELS + 1), f"of more than {MOST_PIXELS} pixels"),
    "a heap": (lambda: picture() + bytes(MOST_BYTES), "of more than 64 MiB"),
    "no size": (lambda: stated(0, 5), "cannot be decoded"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_image_is_a_misfit_in_words_that_quote_nothing(what: str) -> None:
    make, words = BROKEN[what]
    with pytest.raises(Misfit, match=words):
        read_image(make())


def test_a_stated_size_is_held_against_the_limit_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: decoded.append(image))
    with pytest.raises(Misfit, match="pixels"):
        read_image(stated(10_000, 10_000))
    assert not decoded
    monkeypatch.setattr(images, "MOST_PIXELS", 1 << 40)
    with pytest.raises(Misfit, match="decoded"):
        read_image(stated(10_000, 10_000))
    assert decoded, "the fault is not found: without the limit nothing was decoded"


# Paths.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table's folder with one image, and another image beside it."""
    (tmp_path / "own" / "deep").mkdir(parents=True)
    (tmp_path / "own" / "deep" / "a.png").write_bytes(picture())
    (tmp_path / "other.png").write_bytes(picture())
    return tmp_path / "own"


def test_a_path_below_the_tables_folder_is_read(folder: Path) -> None:
    assert read_image("deep/a.png", folder) == read_image(picture())
    assert read_image({"bytes": None, "path": "deep/a.png"}, folder) == read_image({"bytes": picture(), "path": "x"})
    (folder / "link.png").symlink_to("deep/a.png")
    assert read_image("link.png", folder) == read_image(picture()), "a link inside the folder leads nowhere else"


@pytest.mark.parametrize(
    "name",
    [
        "../other.png",
        "deep/../../other.png",
        "ABSOLUTE",
        "..\\other.png",
        "C:other.png",
        "link.png",
        "linked/other.png",
    ],
)
def test_a_path_that_leaves_the_folder_is_a_misfit(name: str, folder: Path) -> None:
    (folder / "link.png").symlink_to("../other.png")
    (folder / "linked").symlink_to("..")
    asked = str(folder.parent / "other.png") if name == "ABSOLUTE" else name
    with pytest.raises(Misfit, match="outside the table's own folder"):
        read_image(asked, folder)


def test_a_path_that_is_believed_is_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: whatever a cell names is opened."""
    monkeypatch.setattr(Path, "is_relative_to", lambda *_: True)
    (folder / "link.png").symlink_to("../other.png")
    assert read_image("link.png", folder) == read_image(picture()), "the fault is not found"


def test_what_is_no_plain_file_is_a_misfit_and_nothing_waits(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "big.png").write_bytes(b"")
    os.truncate(folder / "big.png", MOST_BYTES + 1)
    for name, words in (
        ("pipe.png", "no file"),
        ("circle.png", "cannot be opened"),
        ("deep", "cannot be opened"),
        ("big.png", "more than 64 MiB"),
        ("none.png", "not there"),
        ("a\0b.png", "not there"),
        ("x" * 5000, "not there"),
    ):
        with pytest.raises(Misfit, match=words):
            read_image(name, folder)
    with pytest.raises(Misfit, match="no folder is known"):
        read_image("a.png")


# Sources.


def test_folders_and_tables_of_the_same_images_are_one_data_set(tmp_path: Path) -> None:
    made = digits(count=12)
    by_folder = load_dataset(CONFIG, TASK, str(write_folder(tmp_path / "folder", made)))
    files = [encoded(pixels, compress_level=1) for pixels, _ in made]
    labels = [label for _, label in made]
    (tmp_path / "files").mkdir()
    for i, content in enumerate(files):
        (tmp_path / "files" / f"{i}.png").write_bytes(content)
    sources = {
        "bytes.parquet": pandas.DataFrame({"image": files, "label": labels}),
        "hub.parquet": pandas.DataFrame({"image": [{"bytes": f, "path": "a.png"} for f in files], "label": labels}),
        "paths.csv": pandas.DataFrame({"image": [f"files/{i}.png" for i in range(12)], "label": labels}),
    }
    for name, table in sources.items():
        write = table.to_parquet if name.endswith("parquet") else table.to_csv
        write(tmp_path / name, index=False)
        found = load_dataset(CONFIG, TASK, str(tmp_path / name))
        assert len(found.examples) == 12
        assert found.label_names == by_folder.label_names == ("0", "1")
        assert found.fingerprint() == by_folder.fingerprint(), name


def test_the_columns_are_settings(tmp_path: Path) -> None:
    table = pandas.DataFrame({"scan": [picture(), picture("PNG", compress_level=0)], "finding": ["0", "1"]})
    table.to_parquet(tmp_path / "scans.parquet")
    config = DataConfig(labels="0,1", columns=Columns({"image": "scan", "label": "finding"}))
    assert len(load_dataset(config, TASK, str(tmp_path / "scans.parquet")).examples) == 2
    with pytest.raises(DataError, match=r"has no column 'image' \(data\.image\)"):
        load_dataset(CONFIG, TASK, str(tmp_path / "scans.parquet"))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder of four images, one of a label that nobody named, and what is no image."""
    folder = write_folder(tmp_path / "odd", digits(labels=(0, 1, 7), count=5))
    (folder / "0" / "broken.png").write_bytes(b"\x89PNG")
    (folder / "0" / "bomb.png").write_bytes(stated(1 << 20, 1 << 20))
    (folder / "0" / "notes.txt").write_text("a secret")
    (folder / "0" / ".hidden").write_text("")
    (folder / "0" / "Thumbs.db").write_text("")
    (folder / "1" / "out.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "1" / "deeper").mkdir()
    (folder / "1" / "deeper" / "x.png").write_bytes(encoded(PIXELS))
    (folder / "linked").symlink_to(tmp_path)
    (tmp_path / "elsewhere.png").write_bytes(encoded(PIXELS))
    (folder / "README.txt").write_text("not in a sub-folder")
    return folder


def test_what_is_no_record_in_a_protected_folder_is_left_out_with_its_reason(odd: Path) -> None:
    reading = load_protected(CONFIG, TASK, str(odd))
    sevens = len(list((odd / "7").iterdir()))
    assert len(reading.dataset.examples) == 5 - sevens + 1
    reasons = sorted(unfit.reason for unfit in reading.unfit)
    column = "in column 'image' (data.image)"
    ending = "is no file that ends in .png, .jpg, .jpeg"
    assert reasons == sorted(
        [
            *["has a label that is not among data.labels"] * sevens,
            *[
                f"has an image that cannot be decoded {column}",
                f"has an image of more than {MOST_PIXELS} pixels {column}",
            ],
            *[ending, ending, "names a file outside the table's own folder"],
        ]
    )
    assert not any(word in reason for reason in reasons for word in ("broken", "notes", "secret", "out.png"))


def test_in_public_data_such_files_are_an_error_that_counts_them(odd: Path) -> None:
    with pytest.raises(DataError, match=r"odd row 3 has an image .* \([0-9]+ rows in all cannot be used: row 3, 4, 5"):
        load_dataset(CONFIG, TASK, str(odd))


def test_a_folder_is_of_images_if_it_has_sub_folders_and_no_table(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", digits(count=3))
    assert is_labelled_folder(folder)
    (folder / "labels.csv").write_text("image,label\n")
    assert not is_labelled_folder(folder), "a table beside its files is a table"
    assert not is_labelled_folder(folder / "0")
    assert not is_labelled_folder(folder / "labels.csv")
    assert not is_labelled_folder(tmp_path / "nowhere")


def test_a_folder_without_an_image_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "empty" / "0").mkdir(parents=True)
    with pytest.raises(UnreadableFile, match="one sub-folder a label"):
        read_labelled_folder(tmp_path / "empty", IMAGE, SUFFIXES)
    reading = load_protected(CONFIG, TASK, str(tmp_path / "empty"))
    assert reading.unreadable
    assert not reading.dataset.examples


def test_the_hubs_images_come_undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1"])})
    rows = {"image": [{"bytes": picture(), "path": None}] * 2, "label": [0, 1]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows, features))
    found = load_dataset(DataConfig(partition="iid"), TASK, "hub:someone/scans")
    assert [example.label for example in found.examples] == [0, 1]
    assert {example.likeness() for example in found.examples} == {read_image(picture()).pixels}


def test_the_textile_images_are_there_and_of_three_kinds() -> None:
    found = load_dataset(DataConfig(), TASK, "textile-images")
    assert found.label_names == ("nominal", "local", "global")
    assert [sum(example.label == i for example in found.examples) for i in range(3)] == [1000, 500, 500]
