"""Files of rows: what is read, what is refused, and what the messages say."""

import base64
import io
import json
import pickle

import grain
import numpy as np
import pytest
from PIL import Image

from p2r_jax.data.rows import Row, RowError
from p2r_jax.data.sources import SourceError, load_source
from p2r_jax.data.visual_search import VisualSearch

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def png(pixels: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    return tmp_path


def record(**changes):
    row = {
        "id": "r1",
        "image": "images/a.png",
        "question": "Which colour?",
        "answer": "B",
        "answer_form": "mca",
        "options": ["red", "blue"],
        "boxes": [[10, 20, 30, 40]],
        "category": "colour",
        "source": "somewhere",
    }
    row.update(changes)
    return {key: value for key, value in row.items() if value is not None}


def write(folder, *records, name="rows.jsonl"):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# Rows


def test_options_are_lettered_under_the_question():
    row = Row("1", "Which?", "B", "mca", options=("red", "blue"))
    assert row.question_with_options == "Which?\nA. red\nB. blue"
    assert Row("1", "How many?", "3", "na").question_with_options == "How many?"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("id", {"id": ""}),
        ("question", {"question": "  "}),
        ("answer", {"answer": ""}),
        ("answer_form", {"answer_form": "choice"}),
        ("answer", {"answer": "b"}),
        ("answer", {"answer": "C"}),
        ("answer", {"answer": "AB"}),
        ("options", {"options": "red"}),
        ("options", {"options": ("red", "")}),
        ("options", {"options": ("red", "red")}),
        ("boxes", {"boxes": ((1, 2, 3),)}),
        ("boxes", {"boxes": ((1, 2, 3, None),)}),
        ("boxes", {"boxes": ((1, 2, 3, float("nan")),)}),
        ("boxes", {"boxes": ((1, 2, 3, 1001),)}),
        ("boxes", {"boxes": ((30, 2, 3, 40),)}),
        ("category", {"category": 3}),
    ],
)
def test_an_invalid_row_names_itself_and_the_field(field, changes):
    good = {
        "id": "r1",
        "question": "Which?",
        "answer": "B",
        "answer_form": "mca",
        "options": ("red", "blue"),
    }
    with pytest.raises(RowError, match=f"field '{field}'") as caught:
        Row(**{**good, **changes})
    assert repr(caught.value.row_id) in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.field, str(again)) == (field, str(caught.value))


def test_images_load_from_whatever_holds_them(folder):
    path = folder / "images" / "a.png"
    for source in (PIXELS, png(), path, str(path), Image.fromarray(PIXELS), lambda: path):
        row = Row("1", "Which?", "x", "free_form", image_source=source)
        np.testing.assert_array_equal(row.load_image(), PIXELS)


def test_images_become_rgb_and_are_not_rotated():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    Image.fromarray(PIXELS[..., 0]).save(buffer, "PNG", exif=exif)
    image = Row("1", "Which?", "x", "free_form", image_source=buffer.getvalue()).load_image()
    np.testing.assert_array_equal(image, PIXELS[..., :1].repeat(3, axis=-1))


def test_an_undecodable_image_names_row_and_file(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(png()[:40])
    for source, message in (
        (broken, r"row 'r7', field 'image': cannot decode .*broken\.jpg"),
        (tmp_path / "none.jpg", r"row 'r7', field 'image': file not found: .*none\.jpg"),
        (b"", "row 'r7', field 'image': cannot decode 0 bytes"),
        (PIXELS.astype(float), r"must be uint8 \[H, W, 3\], is float64 \[4, 6, 3\]"),
    ):
        with pytest.raises(RowError, match=message):
            Row("r7", "Which?", "x", "free_form", image_source=source).load_image()


# Sources


def test_the_procedural_task_is_a_source():
    source = load_source(
        "visual_search", split="test", seed=2, length=7, config={"tiles": 3, "shape_questions": 0}
    )
    assert isinstance(source, VisualSearch)
    assert len(source) == 7
    assert len(source[0].meta["tiles"]) == 3


def test_a_json_lines_row_has_all_its_fields(folder):
    (row,) = load_source(write(folder, record()))
    assert row == Row(
        "r1", "Which colour?", "B", "mca", ("red", "blue"), ((10, 20, 30, 40),), "colour"
    )
    assert row.meta == {"source": "somewhere"}
    np.testing.assert_array_equal(row.load_image(), PIXELS)


def test_optional_fields_may_be_missing(folder):
    path = write(
        folder, record(id=None, options=None, boxes=None, category=None, answer=4, answer_form="na")
    )
    (row,) = load_source(path)
    assert (row.id, row.answer, row.options, row.boxes) == ("rows.jsonl:1", "4", (), ())


def test_images_may_be_embedded_in_base64(folder):
    text = base64.b64encode(png()).decode()
    path = write(
        folder,
        record(id="1", image=text),
        record(id="2", image=f"data:image/png;base64,{text}"),
        record(id="3", image=None, images=[text]),
    )
    for row in load_source(path):
        np.testing.assert_array_equal(row.load_image(), PIXELS)


def test_rows_are_read_in_any_order_by_grain(folder):
    records = [record(id=f"r{i}", question=f"Frage {i} mit Umlaut ä?") for i in range(30)]
    path = write(folder, *records[:10], "", *records[10:])
    source = pickle.loads(pickle.dumps(load_source(path)))
    assert source[29].question == "Frage 29 mit Umlaut ä?"
    shuffled = [row.id for row in grain.MapDataset.source(source).shuffle(seed=1)]
    assert shuffled != sorted(shuffled)
    assert set(shuffled) == {f"r{i}" for i in range(30)}


BAD = [
    ("(line)", "{not json"),
    ("(line)", "[1, 2]"),
    ("question", record(id="b", question=None)),
    ("answer", record(id="b", answer="E")),
    ("answer_form", record(id="b", answer_form="letter")),
    ("options", record(id="b", options={"A": "red"})),
    ("boxes", record(id="b", boxes=[[1, 2]])),
    ("id", record(id="r1")),
    ("image", record(id="b", image=None)),
    ("image", record(id="b", image="images/missing.png")),
    ("image", record(id="b", image="not base64!")),
    ("images", record(id="b", image=None, images=["images/a.png", "images/a.png"])),
]


@pytest.mark.parametrize(("field", "bad"), BAD)
def test_a_bad_row_is_listed_and_skipped(folder, field, bad):
    path = write(folder, record(), bad, record(id="r3"))
    source = load_source(path, max_bad_fraction=0.5, bad_rows=folder / "out")
    assert [row.id for row in source] == ["r1", "r3"]
    assert source.bad == 1
    (listed,) = map(json.loads, (folder / "out" / "bad_rows.jsonl").read_text().splitlines())
    assert (listed["row"], listed["field"], listed["file"]) == (2, field, str(path))


def test_too_many_bad_rows_are_one_clear_error(folder):
    path = write(folder, record(), record(id="b", answer="E"), record(id="c", question=None))
    with pytest.raises(SourceError, match=r"2 of 3 rows are bad .*'b', field 'answer'.*bad_rows"):
        load_source(path)
    with pytest.raises(SourceError, match=r"All are listed in .*bad_rows\.jsonl"):
        load_source(path, bad_rows=folder)


def test_broken_image_files_are_found_on_request(folder):
    (folder / "images" / "b.png").write_bytes(png()[:40])
    path = write(folder, record(), record(id="b", image="images/b.png"))
    assert len(load_source(path)) == 2
    with pytest.raises(SourceError, match="1 of 2 rows"):
        load_source(path, check_images="decode")
    assert len(load_source(write(folder, record(image="x.png")), check_images="no")) == 1


def test_sources_that_cannot_be_opened_say_why(folder):
    for name, options, message in (
        ("gqa", {}, "unknown source 'gqa'"),
        (folder / "none.jsonl", {}, "source file not found: .*none.jsonl"),
        (write(folder, name="empty.jsonl"), {}, "empty.jsonl: has no rows"),
        (write(folder, record()), {"shuffle": True}, "shuffle"),
        (write(folder, record()), {"check_images": "all"}, "check_images is 'all'"),
        ("visual_search", {"speed": 3}, "speed"),
    ):
        with pytest.raises(SourceError, match=message):
            load_source(name, **options)


@pytest.mark.parametrize("embedded", [True, False])
def test_parquet_rows_equal_json_lines_rows(folder, embedded):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [record(id=f"r{i}") for i in range(10)]
    expected = list(load_source(write(folder, *records)))
    if embedded:
        records = [
            {**r, "image": {"bytes": png(PIXELS + i), "path": None}} for i, r in enumerate(records)
        ]
    path = folder / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=3)
    source = pickle.loads(pickle.dumps(load_source(path)))
    assert list(source) == expected
    for i in (7, 0, 9):
        np.testing.assert_array_equal(source[i].load_image(), PIXELS + i if embedded else PIXELS)
    assert source[1].meta == {"source": "somewhere"}


def test_a_parquet_row_with_a_null_is_a_row_without_the_field(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [record(), record(id="r2", boxes=None, category=None), record(id="b", answer=None)]
    path = folder / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    source = load_source(path, max_bad_fraction=0.5)
    assert [(row.id, row.boxes) for row in source][1] == ("r2", ())
    assert source.bad == 1
