"""Rows of prompt files of every kind: numbered, read from anywhere, and broken ones by themselves."""

from __future__ import annotations

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toprovar_jax.distributed.batch import rows as rows_module
from toprovar_jax.distributed.batch import source
from toprovar_jax.distributed.batch.rows import BrokenRow, PromptRows, Row
from toprovar_jax.errors import UserInputError


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def everything(url):
    with PromptRows(url) as rows:
        return rows.read(0, rows.count)


def reasons(rows):
    return [row.reason if isinstance(row, BrokenRow) else None for row in rows]


def test_lines_of_text_are_rows_but_for_blank_ones_and_comments(tmp_path):
    url = written(tmp_path, "p.txt", "\ufeffa sphere\r\n\r\n  # no\n\ta cube \n\u00a0\na cone\rthe end")
    assert everything(url) == [
        Row(k, str(k), text) for k, text in enumerate(["a sphere", "a cube", "a cone", "the end"])
    ]


def test_lines_of_json_carry_ids_seeds_and_settings(tmp_path):
    url = written(
        tmp_path,
        "p.jsonl",
        '{"prompt": "a", "id": "first", "seed": 7, "guidance": [1, 2]}\n\n# no\n{"prompt": "b", "id": 12}\n',
    )
    assert everything(url) == [Row(0, "first", "a", 7, {"guidance": (1.0, 2.0)}), Row(1, "12", "b")]


def test_tables_of_text_have_empty_cells_and_line_ends_in_quotes(tmp_path):
    url = written(
        tmp_path,
        "p.csv",
        'id,prompt,seed,guidance,positive_prompt\r\n,"a ""red""\nsphere",,"1,2",\r\n\r\nx,b,3,,TRUE\nc,a cone\n',
    )
    assert everything(url) == [
        Row(0, "0", 'a "red"\nsphere', None, {"guidance": (1.0, 2.0)}),
        Row(1, "x", "b", 3, {"positive_prompt": True}),
        Row(2, "c", "a cone"),
    ]


def parquet(tmp_path, **columns):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


def test_parquet_tables_are_read_from_any_row_of_any_group(tmp_path):
    url = parquet(tmp_path, prompt=[f"p{k}" for k in range(10)], seed=[None, *map(float, range(9))])
    with PromptRows(url) as rows:
        assert rows.read(7, 2) == [Row(7, "7", "p7", 6), Row(8, "8", "p8", 7)]
        assert rows.read(0, 1) == [Row(0, "0", "p0", None)]
        assert [row.number for row in rows.read(1, 100)] == list(range(1, 10))


def test_a_parquet_cell_that_is_not_text_breaks_its_row_alone(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    found = everything(parquet(tmp_path, prompt=bad))
    assert reasons(found) == [None, "row 1: must be UTF-8 text", None]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a"', "must be a JSON object"),
        (b"[1]", "must be a JSON object, not list"),
        (b'{"prompt": "\xff"}', "must be UTF-8 text"),
        (b'{"prompt": " "}', "prompt ' ': must be text that says something"),
        (b'{"id": "x"}', 'must have the key "prompt"'),
        (b'{"prompt": "a", "sede": 1}', "key 'sede': must be one of"),
        (b'{"prompt": "a", "seed": -1}', "seed -1: must be an integer from 0"),
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "key 'seed': must not be given twice"),
        (b'{"prompt": "a\\u0000"}', "prompt 'a\\x00': must be text"),
        (b'{"prompt": "\\ud800"}', "prompt '\\ud800': must be text"),
        (b'{"prompt": "a", "id": ""}', "id '': must be a number or a printable text"),
        (b'{"prompt": "a", "id": [1]}', "id [1]: must be a number or a printable text"),
        (b'{"prompt": "a", "num_images": 1001}', "num_images 1001: must be at most 1000"),
        (b'{"prompt": ' + b"[" * 100_000, "must be a JSON object"),
        (b'{"prompt": "' + b"a" * (source.MAX_LINE + 1) + b'"}', "must be a line of at most 1048576 bytes"),
    ],
)
def test_a_broken_line_is_a_row_with_its_reason_and_the_next_is_read(tmp_path, line, reason):
    found = everything(written(tmp_path, "p.jsonl", line + b'\n{"prompt": "good"}\n'))
    assert found[1] == Row(1, "1", "good")
    assert found[0].reason.startswith(f"row 0: {reason}")
    assert "\n" not in found[0].reason
    found[0].prompt.encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a,1,2", "has 3 cells, the header 2"),
        (b"a,x", "seed 'x': must be an integer"),
        (b"\xff,1", "must be UTF-8 text"),
        (b",1", 'must have the key "prompt"'),
        (b'"a"b,1', "must be a row of comma-separated values"),
    ],
)
def test_a_broken_row_of_a_table_is_a_row_with_its_reason(tmp_path, line, reason):
    found = everything(written(tmp_path, "p.csv", b"prompt,seed\n" + line + b"\ngood,3\n"))
    assert found[1] == Row(1, "1", "good", 3)
    assert found[0].reason.startswith(f"row 0: {reason}")


def test_a_quote_that_nobody_closes_takes_no_other_row_with_it(tmp_path):
    others = "".join(f"picture {k},{k}\n" for k in range(20_000))
    found = everything(written(tmp_path, "p.csv", f'prompt,seed\nfirst,1\n"a red ball,2\n{others}'.encode()))
    assert [row.number for row in found] == list(range(20_002))
    assert [isinstance(row, BrokenRow) for row in found] == [False, True, *[False] * 20_000]
    assert found[-1] == Row(20_001, "20001", "picture 19999", 19999)


def test_a_damaged_table_is_refused_by_name(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": [f"picture {k}" for k in range(1000)]}), path)
    content = bytearray(path.read_bytes())
    content[10:60] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(UserInputError, match=r"p\.parquet: must be a Parquet file whose rows can be read"):
        everything(str(path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.xml", "a", "must end in .txt, .jsonl, .csv, .parquet"),
        ("p.txt", "# no\n\n", "must hold at least one prompt"),
        ("p.csv", "", "must begin with a header"),
        ("p.csv", "id,seed\n1,2\n", "must have the column prompt"),
        ("p.csv", "prompt,sede\n", "column 'sede': must be one of"),
        ("p.csv", "prompt,seed,seed\n", "column 'seed': is there twice"),
        ("p.parquet", "PAR1 no", "must be a Parquet file"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_one_line(tmp_path, name, content, said):
    with pytest.raises(UserInputError, match=said) as caught:
        PromptRows(written(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_no_file_and_no_filesystem_are_one_line(tmp_path):
    for url in (str(tmp_path / "no.txt"), str(tmp_path), "memory://no/such.txt", "nonsense://x.txt"):
        with pytest.raises(UserInputError, match="prompts file"):
            PromptRows(url)


def test_a_url_is_read_like_a_file():
    with fsspec.open("memory://rows/p.txt", "wb") as file:
        file.write(b"a\nb\nc\n")
    assert [row.prompt for row in everything("memory://rows/p.txt")] == ["a", "b", "c"]


@pytest.mark.parametrize("block", [1, 2, 7, 2**20])
def test_lines_do_not_depend_on_how_the_file_is_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(source, "_BLOCK", block)
    monkeypatch.setattr(source, "MAX_LINE", 9)
    url = written(tmp_path, "p.txt", b"one\r\ntwo\rthree\n\n\r\rlonger than nine\r\nfour\r")
    found = everything(url)
    assert [getattr(row, "prompt", None) for row in found] == ["one", "two", "three", "", "four"]
    assert isinstance(found[3], BrokenRow)


@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_reading_from_anywhere_gives_the_same_rows(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(rows_module, "_MARKS", 4)
    lines = [f'"p\n{k}",{k}' if ending == "csv" else f"p {k}" for k in range(3000)]
    url = written(tmp_path, f"p.{ending}", "\n".join((["prompt,seed"] if ending == "csv" else []) + lines))
    with PromptRows(url) as rows:
        whole = rows.read(0, 3000)
        assert [row.number for row in whole] == list(range(3000))
        for first in (2999, 0, 1024, 1023, 17, 2500):
            assert rows.read(first, 40) == whole[first : first + 40]


@pytest.mark.parametrize("name", ["p.txt", "p.parquet"])
@pytest.mark.parametrize("harm", ["vanished", "changed"])
def test_a_file_that_vanishes_or_changes_is_one_line_and_reading_goes_on_when_it_is_back(tmp_path, name, harm):
    url = parquet(tmp_path, prompt=["a"] * 9) if name == "p.parquet" else written(tmp_path, name, "a\n" * 9)
    path, aside = tmp_path / name, tmp_path / "aside"
    with PromptRows(url) as rows:
        rows.read(0, 2)
        path.rename(aside)
        if harm == "changed":
            path.write_text("b\n" * 9)
        with pytest.raises(UserInputError, match=f"has {harm} during the run; put it back"):
            rows.read(2, 2)
        aside.replace(path)
        assert [row.number for row in rows.read(2, 2)] == [2, 3]
