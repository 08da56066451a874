from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sparse_mlp.data import AugmentConfig, DataConfig, ImageData, build_datasets, display_name, eval_loader, find_images
from sparse_mlp.data.decode import read_image

MakeFolder = Callable[..., Path]


def build(root: Path, **options) -> ImageData:
    return build_datasets(DataConfig(name="folder", root=str(root), image_size=8), AugmentConfig(), **options)


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, "png")
    return path


@pytest.fixture
def photos(make_folder: MakeFolder) -> Path:
    """Two classes of four images, and whatever else lies about in a folder of photos."""
    root = make_folder("photos")
    picture(root / ".ipynb_checkpoints" / "a.png")
    picture(root / "__MACOSX" / "a.png")
    picture(root / "cat" / "._00.png")
    (root / "cat" / ".DS_Store").write_text("x")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "dog" / "notes.TXT").write_text("x")
    (root / "dog" / "README").write_text("x")
    picture(root / "loose.png")
    return root


def special(folder: Path) -> None:
    """A pipe, a socket, a link to a device and one to nowhere, all named like images. Nothing may open them."""
    os.mkfifo(folder / "pipe.png")
    where = Path.cwd()
    os.chdir(folder)  # the path of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind("socket.png")
    finally:
        os.chdir(where)
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "nowhere.png").symlink_to("nothing.png")


def within(seconds: float, call: Callable[[], object]) -> None:
    """Fail rather than hang."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "hangs"


def test_what_is_left_out_of_a_folder_is_said_once_with_a_count(photos: Path):
    data = build(photos)
    assert data.classes == ["cat", "dog"] and len(data.train) + len(data.test) == 8
    (note,) = data.notes
    assert note.startswith(f"left out of {photos}: ") and "\n" not in note
    for part in ("4 hidden (leading dot)", "2 ending in .txt", "1 without an ending", "1 in no class"):
        assert part in note
    assert build(photos).notes == data.notes


def test_a_folder_with_nothing_else_has_no_notes(make_folder: MakeFolder):
    assert build(make_folder("set")).notes == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_pipes_sockets_and_devices_are_counted_and_never_opened(make_folder: MakeFolder):
    root = make_folder("set")
    special(root / "cat")
    config, found = DataConfig(name="folder", root=str(root), image_size=8), []

    def read() -> None:
        data = build(root)
        found.append((len(data.train) + len(data.test), data.notes))
        list(eval_loader(data, config))
        found.append(len(find_images([root])))

    within(30, read)
    assert found == [(8, [f"left out of {root}: 4 not regular files"]), 8]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["pipe.png", "socket.png", "device.png"])
def test_a_special_file_named_itself_is_refused(tmp_path: Path, name: str):
    special(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name} is not a regular file"):
        find_images([tmp_path / name])


def test_other_formats_are_images_too(make_folder: MakeFolder):
    root = make_folder("set", count=0)
    for name in ("a.jfif", "b.gif", "c.JPG", "d.bmp", "e.tif"):
        Image.new("RGB", (8, 8)).save(root / "cat" / name, Image.registered_extensions()[Path(name).suffix.lower()])
    picture(root / "dog" / "a.png"), picture(root / "dog" / "b.png")
    data = build(root)
    assert len(data.train) + len(data.test) == 7 and data.notes == []
    list(eval_loader(data, DataConfig()))


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("10", "2", "0", "1"), ["0", "1", "2", "10"]),
        (("10", "2", "a"), ["10", "2", "a"]),
        (("007", "12", "8"), ["007", "8", "12"]),
    ],
)
def test_numbered_classes_are_sorted_as_numbers_where_all_are(
    make_folder: MakeFolder, names: tuple[str, ...], order: list[str]
):
    assert build(make_folder("set", classes=names)).classes == order


ODD = ("-rf", "two words", "[a-z]*", "čau 猫", "a'b\"c", "#1;$HOME", "%s{0}")


def test_odd_names_are_names(make_folder: MakeFolder):
    root = make_folder("set", classes=ODD, count=0)
    for name in ODD:
        for other in ODD:
            picture(root / name / f"{other}.png")
    data = build(root)
    assert data.classes == sorted(ODD)
    batches = list(eval_loader(data, DataConfig(eval_batch_size=5)))
    assert sum(len(batch["target"]) for batch in batches) == len(data.test) == len(ODD)
    named = root / "[a-z]*" / "[a-z]*.png"
    assert find_images([named]) == [named], "a file that is there is no pattern"
    assert len(find_images([root / "[a-z]*"])) == len(ODD)


def test_names_that_are_not_utf8_can_be_shown_and_stored(make_folder: MakeFolder):
    root = make_folder("set", classes=("cat",))
    odd = Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9"))
    try:
        picture(odd / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("a file system that takes UTF-8 only")
    picture(odd / "new\nline.png")
    data = build(root)
    assert data.classes == [r"caf\xe9", "cat"]
    names = [*data.split["train"], *data.split["test"]]
    assert {r"caf\xe9/\xff.png", r"caf\xe9/new\nline.png"} < set(names)
    "".join(names).encode()
    again = build(root, split=data.split)
    assert again.split == data.split and not again.notes
    list(eval_loader(again, DataConfig()))
    for path in find_images([root]):
        display_name(path).encode()
    (odd / "bad.png").write_text("x")
    with pytest.raises(OSError) as error:
        read_image(odd / "bad.png", 3)
    str(error.value).encode()


def test_links_in_a_circle_end(make_folder: MakeFolder):
    root = make_folder("set")
    (root / "cat" / "up").symlink_to(root)
    (root / "dog" / "self").symlink_to(root / "dog")
    (root / "cat" / "deep").mkdir()
    (root / "cat" / "deep" / "back").symlink_to(root / "cat")
    found: list[int] = []
    within(30, lambda: found.append(len(find_images([root]))))
    assert found == [8]
    within(30, lambda: build(root))


def test_prediction_inputs(photos: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    cats, dogs = (sorted((photos / name).glob("0*.png")) for name in ("cat", "dog"))
    with caplog.at_level(logging.WARNING):
        assert find_images([photos]) == [photos / "loose.png", *cats, *dogs]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"left out of {photos}: 4 hidden (leading dot), 2 ending in .txt")
    assert find_images([photos], recursive=False) == [photos / "loose.png"]
    assert find_images([photos / "cat", cats[0], str(photos / "*" / "00.png")]) == [*cats, dogs[0]], "each once"
    assert find_images([str(photos / "[cd]*")]) == [*cats, *dogs]
    assert find_images([str(photos / "**" / "0*.png")]) == [*cats, *dogs]
    assert find_images([photos / "cat" / "notes.txt"]) == [photos / "cat" / "notes.txt"], "what is named is read"
    monkeypatch.chdir(photos)
    assert find_images(["cat"]) == [Path("cat", path.name) for path in cats]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing", "there are no images in missing$"),
        ("*.jpg", r"there are no images in \*\.jpg$"),
        ("texts", r"there are no images in texts \(left out of texts: 1 ending in \.txt\)$"),
        ("texts/*", r"there are no images in texts/\* \(left out of texts/\*: 1 ending in \.txt\)$"),
        ("empty", "there are no images in empty$"),
    ],
)
def test_what_holds_no_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=message):
        find_images([given])
