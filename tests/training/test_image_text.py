"""Pictures with captions: what is found, what is passed over, how pixels come out, and in which order."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from toprovar_jax.errors import UserInputError
from toprovar_jax.schedule import ASPECT_RATIOS
from toprovar_jax.training.image_text import (
    ImageTextData,
    Problems,
    decode_picture,
    find_samples,
    nearest_aspect_ratio,
)


def encoded(colour=(200, 10, 30), size=(8, 8), format="PNG", **options):
    """A flat picture, ``size`` as (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format, **options)
    return file.getvalue()


def write_pairs(folder, count, size=(8, 8)):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number:02d}.png").write_bytes(encoded((number, 0, 0), size))
        (folder / f"{number:02d}.txt").write_text(f"picture {number}\n")
    return folder


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_folder_pairs_pictures_with_their_texts(tmp_path):
    write_pairs(tmp_path, 2)
    (tmp_path / "alone.png").write_bytes(encoded())
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    (tmp_path / "broken.txt").write_text("a caption")
    samples, problems = find_samples(tmp_path)
    assert [(sample.name, sample.caption) for sample in samples] == [("00.png", "picture 0"), ("01.png", "picture 1")]
    assert sorted(problems.lines()) == [
        "1 skipped, no caption: alone.png",
        "1 skipped, picture cannot be read: broken.jpg",
    ]


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl"])
def test_a_listing_gives_captions_and_cannot_name_files_outside(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(encoded())
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.png").write_bytes(encoded())
    records = [
        {"file_name": "sub/a.png", "text": " two\n words "},
        {"file_name": "../secret.png", "text": "x"},
        {"file_name": str(tmp_path / "secret.png"), "text": "x"},
        {"file_name": "gone.png", "text": "x"},
        {"text": "nameless"},
    ]
    (folder / name).write_text("\n".join(map(json.dumps, records)) + "\nnot json\n")
    samples, problems = find_samples(folder)
    assert [(sample.name, sample.caption) for sample in samples] == [("sub/a.png", "two words")]
    assert sorted(problems.lines()) == [
        "1 skipped, no such file: gone.png",
        f"2 skipped, leaves the folder: {name} line 2 and others",
        f"2 skipped, not an object with file_name and text: {name} line 5 and others",
    ]


@pytest.mark.parametrize("listed", [False, True])
def test_links_that_lead_outside_are_passed_over_and_counted(tmp_path, listed):
    outside = write_pairs(tmp_path / "outside", 1)
    real = write_pairs(tmp_path / "real", 2)
    (real / "inner.png").symlink_to("00.png")
    (real / "inner.txt").write_text("a link that stays inside")
    (real / "l.png").symlink_to("../outside/00.png")
    (real / "l.txt").write_text("secret")
    (real / "sub").symlink_to(outside, target_is_directory=True)
    if listed:
        files = ["00.png", "01.png", "inner.png", "l.png", "sub/00.png", f"{'long' * 100}.png"]
        listing = "\n".join(json.dumps({"file_name": file, "text": "x"}) for file in files)
        (real / "metadata.jsonl").write_text(listing)
    else:
        (real / "t.png").write_bytes(encoded())
        (real / "t.txt").symlink_to("../outside/00.txt")
    folder = tmp_path / "data"
    folder.symlink_to(real, target_is_directory=True)  # the folder itself may be a link
    samples, problems = find_samples(folder)
    assert [sample.name for sample in samples] == ["00.png", "01.png", "inner.png"]
    assert sorted(problems.lines()) == (
        [f"1 skipped, no such file: {'long' * 100}.png", "2 skipped, leaves the folder: l.png and others"]
        if listed
        else [
            "1 skipped, a link to a folder: sub",
            "1 skipped, leaves the folder: l.png",
            "1 skipped, no caption: t.png",
        ]
    )


MARK = b"\xef\xbb\xbf"


def test_a_mark_before_utf8_is_no_part_of_a_caption(tmp_path):
    beside = write_pairs(tmp_path / "beside", 1)
    (beside / "00.txt").write_bytes(MARK + b"a cat")
    listed = write_pairs(tmp_path / "listed", 1)
    (listed / "metadata.jsonl").write_bytes(MARK + b'{"file_name": "00.png", "text": "a cat"}\n')
    members = [("1.png", encoded()), ("1.txt", MARK + b"a cat")]
    members += [("2.png", encoded()), ("2.json", MARK + b'{"text": "a cat"}')]
    for data in (beside, listed, write_shard(tmp_path / "0.tar", members)):
        samples, problems = find_samples(data)
        assert {sample.caption for sample in samples} == {"a cat"}
        assert problems.lines() == []


def test_whatever_a_shard_holds_beside_samples_is_counted(tmp_path):
    shard = write_shard(
        tmp_path / "0.tar",
        [
            ("1.png", encoded()),
            ("1.txt", b"one"),
            ("1.json", b"{}"),
            ("1.webp", encoded(format="WEBP")),
            ("photo.v2.png", encoded()),
            ("photo.v2.txt", b"two"),
            ("3.txt", b"three"),
            ("3.gif", b"GIF89a"),
        ],
    )
    samples, problems = find_samples(shard)
    assert [sample.name for sample in samples] == ["0.tar/1.png"]
    assert sorted(problems.lines()) == [
        "1 skipped, neither picture nor caption by its ending: 0.tar/3.gif",
        "1 skipped, no picture of its key: 0.tar/3.txt",
        "1 skipped, second picture of its key: 0.tar/1.webp",
        "2 skipped, more than one dot in its name (webdataset keys end at the first): 0.tar/photo.v2.png and others",
    ]


def test_what_lies_beside_shards_is_counted(tmp_path):
    write_shard(tmp_path / "0.tar", [("1.png", encoded()), ("1.txt", b"one")])
    write_pairs(tmp_path, 2)
    (tmp_path / "1.tar.gz").write_bytes(b"")
    samples, problems = find_samples(tmp_path)
    assert [sample.name for sample in samples] == ["0.tar/1.png"]
    assert sorted(problems.lines()) == [
        "1 skipped, compressed shard beside plain ones: 1.tar.gz",
        "2 skipped, picture beside .tar shards, which alone are read: 00.png and others",
    ]


def test_a_webdataset_is_read_in_place(tmp_path):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    shard = write_shard(
        tmp_path / "0000.tar",
        [
            ("x/1.jpg", encoded((0, 0, 250), format="JPEG")),
            ("x/1.json", json.dumps({"caption": "blue", "text": "not this"}).encode()),
            ("2.txt", b"a text before its picture"),
            ("2.webp", encoded((0, 250, 0), format="WEBP", lossless=True)),
            ("../3.png", encoded()),
            ("../3.txt", b"x"),
            (link, b""),
            ("5.png", encoded()),
        ],
    )
    before = sorted(tmp_path.rglob("*"))
    for path in (shard, tmp_path):
        samples, problems = find_samples(path)
        assert [sample.caption for sample in samples] == ["a text before its picture", "blue"]
        assert sorted(problems.lines()) == [
            "1 skipped, no caption: 0000.tar/5.png",
            "3 skipped, no plain file of the shard: 0000.tar/../3.png and others",
        ]
    assert decode_picture(samples[0].read(), (4, 4))[0, 0].tolist() == [0, 250, 0]
    assert abs(decode_picture(samples[1].read(), (4, 4))[2, 2].astype(int) - [0, 0, 250]).max() <= 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shard_cut_short_gives_what_it_still_holds(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [("1.txt", b"one"), ("1.png", encoded()), ("2.png", encoded())])
    shard.write_bytes(shard.read_bytes()[: 4 * 512 + 700])
    samples, problems = find_samples(shard)
    assert [sample.caption for sample in samples] == ["one"]
    assert any("damaged" in line or "cannot be read" in line for line in problems.lines())


def test_data_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "a.tar.gz").write_bytes(b"")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "a.png").write_bytes(encoded())
    cases = [
        (tmp_path / "none", "does not exist"),
        (tmp_path / "empty", "holds no picture with a caption; put NAME.png"),
        (packed, "a compressed one cannot be read from the middle"),
        (alone, "holds no picture with a caption \\(1 skipped, no caption: a.png\\)"),
        ("\0", "cannot be looked up|does not exist"),
    ]
    for path, message in cases:
        with pytest.raises(UserInputError, match=message) as raised:
            find_samples(path)
        assert "\n" not in str(raised.value)


def test_pictures_go_to_the_nearest_template_in_octaves():
    assert nearest_aspect_ratio(512, 512) == "1:1"
    assert nearest_aspect_ratio(1000, 10) == "3:1"
    for name in ASPECT_RATIOS:
        tall, wide = map(int, name.split(":"))
        assert nearest_aspect_ratio(100 * tall, 100 * wide) == name
        assert nearest_aspect_ratio(101 * tall, 100 * wide) == name
        # Turning the picture turns the template.
        assert nearest_aspect_ratio(130 * wide, 100 * tall) == ":".join(
            reversed(nearest_aspect_ratio(100 * tall, 130 * wide).split(":"))
        )


def test_exif_rotation_counts_for_the_bucket_and_the_pixels(tmp_path):
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise: what is left comes to the top
    image.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("turned")
    (sample,) = find_samples(tmp_path)[0]
    assert sample.bucket == "2:1"
    pixels = decode_picture(sample.read(), (20, 10))
    assert pixels[:8].min() > 250
    assert pixels[-8:].max() < 5


def test_transparency_becomes_white_and_every_mode_becomes_rgb():
    def saved(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return decode_picture(file.getvalue(), (2, 2))[0, 0].tolist()

    assert saved(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == [255, 255, 255]
    assert saved(Image.new("RGBA", (4, 4), (255, 0, 0, 128))) == [255, 127, 127]
    assert saved(Image.new("LA", (4, 4), (0, 0))) == [255, 255, 255]
    assert saved(Image.new("L", (4, 4), 7)) == [7, 7, 7]
    assert saved(Image.new("P", (4, 4), 0)) == [0, 0, 0]
    assert saved(Image.fromarray(np.full((4, 4), 0x80FF, np.uint16))) == [128, 128, 128]


def test_cropping_keeps_the_middle_and_resizing_is_antialiased():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "PNG")
    assert decode_picture(file.getvalue(), (8, 8)).min() == 255
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "PNG")
    small = decode_picture(file.getvalue(), (8, 8)).astype(int)
    # Taking every eighth pixel would give 0 or 255.
    assert abs(small[:, 1:-1] - 127.5).max() < 12


def data_of(folder, **options):
    samples, _ = find_samples(folder)
    return ImageTextData(samples, dict.fromkeys(ASPECT_RATIOS, (4, 4)), **options)


def names(batch):
    return [sample.name for sample in batch.samples]


def test_batches_depend_on_seed_and_number_alone(tmp_path):
    folder = write_pairs(tmp_path, 10)
    one, other = (data_of(folder, batch_size=4, seed=3) for _ in range(2))
    forwards = [names(one.batch(i)) for i in range(7)]
    assert [names(other.batch(i)) for i in reversed(range(7))] == forwards[::-1]
    assert [names(data_of(folder, batch_size=4, seed=4).batch(i)) for i in range(7)] != forwards
    assert one.batches_per_epoch == 2
    for start in (0, 2, 4):
        assert len({name for batch in forwards[start : start + 2] for name in batch}) == 8
    assert forwards[:2] != forwards[2:4]
    batch = one.batch(0)
    assert [sample.caption for sample in batch.samples] == [f"picture {red}" for red in batch.images[:, 0, 0, 0]]


def test_batches_are_of_one_bucket_and_small_buckets_repeat(tmp_path):
    write_pairs(tmp_path / "square", 5)
    write_pairs(tmp_path / "tall", 2, size=(8, 16))
    data = data_of(tmp_path, batch_size=4)
    batches = [data.batch(i) for i in range(data.batches_per_epoch)]
    assert sorted(batch.bucket for batch in batches) == ["1:1", "2:1"]
    for batch in batches:
        assert {sample.bucket for sample in batch.samples} == {batch.bucket}
        assert len(batch.images) == 4
    tall = next(batch for batch in batches if batch.bucket == "2:1")
    assert sorted(names(tall)) == ["tall/00.png"] * 2 + ["tall/01.png"] * 2


def test_held_out_pictures_are_never_trained_on_and_all_measured_once(tmp_path):
    data = data_of(write_pairs(tmp_path, 20), batch_size=3, held_out=0.2)
    held_out = [name for batch, count in data.held_out_batches() for name in names(batch)[:count]]
    assert len(held_out) == len(set(held_out)) == 4
    assert all(len(batch.images) == 3 for batch, _ in data.held_out_batches())
    trained = {name for i in range(3 * data.batches_per_epoch) for name in names(data.batch(i))}
    assert trained == {f"{i:02d}.png" for i in range(20)} - set(held_out)
    assert sum(map(len, data_of(tmp_path, batch_size=3, held_out=0.001).held_out.values())) == 1
    assert data_of(tmp_path, batch_size=3).held_out == {}


def test_a_picture_that_breaks_while_decoding_is_replaced_and_counted_once(tmp_path):
    folder = write_pairs(tmp_path, 4, size=(64, 64))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "01.png")
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:4000])
    problems = Problems()
    data = data_of(folder, batch_size=4, problems=problems)
    for number in (0, 1):
        assert sorted(names(data.batch(number))) == ["00.png", "02.png", "02.png", "03.png"]
    assert problems.lines() == ["1 skipped, picture cannot be decoded: 01.png"]


def test_a_bucket_without_one_good_picture_is_an_error(tmp_path):
    folder = write_pairs(tmp_path, 2)
    data = data_of(folder, batch_size=2)
    for file in folder.glob("*.png"):
        file.write_bytes(b"gone bad")
    with pytest.raises(UserInputError, match=r"aspect ratio 1:1: holds no picture that can be decoded \(00.png and 1"):
        data.batch(0)
