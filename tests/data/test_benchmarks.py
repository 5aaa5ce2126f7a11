"""Published layouts: what each record becomes, and which are refused."""

from __future__ import annotations

import base64
import math
import string
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from p2r_jax.data.benchmarks import (
    benchmarks,
    choice_row,
    from_base64,
    hrbench_row,
    image_of,
    lettered_options,
    mme_realworld_row,
    p2r_10k_row,
    plain,
)
from p2r_jax.data.rows import RowError
from p2r_jax.data.sources import SourceError
from p2r_jax.data.tables import Table, _first_page, _integers
from p2r_jax.data.vstar import boxes_of, split_text, vstar_row
from tests.data.published import (
    INSTRUCTION,
    hrbench_records,
    mme_record,
    p2r_record,
    picture,
    vstar_folder,
    vstar_record,
    vstar_text,
    write_parquet,
)

TABLE = Path("table.parquet")
LINE = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=9)


def rows(name: str, source: Path) -> list:
    """What a benchmark makes of its files: rows and errors."""
    return [row for _, row in benchmarks()[name].rows(source)[1]]


# --- V* -----------------------------------------------------------------------------------------


def test_vstar_options_and_boxes_come_from_the_folder(tmp_path):
    first, second, third = rows("vstar", vstar_folder(tmp_path))
    assert (first.id, first.question) == ("0", "What colour is thing 0?")
    assert first.options == ("red", "blue", "dark brown", "white")
    assert [row.answer for row in (first, second, third)] == ["A", "B", "C"]
    # 10, 6 and 20 x 3 pixels of 40 x 30.
    assert first.boxes == ((250.0, 200.0, 750.0, 300.0),)
    assert first.meta["target_object"] == ["cup"]
    assert first.meta["asked"] == vstar_text(0)
    assert first.load_image().shape == (30, 40, 3)


@pytest.mark.parametrize("name", ["V-Star-with-BBox", "V-Star", "vstar-bench"])
def test_vstar_folders_may_be_inside_the_source(tmp_path, name):
    assert len(rows("vstar", vstar_folder(tmp_path / name).parent)) == 3


def test_vstar_parquet_has_no_boxes_and_the_same_questions(tmp_path):
    records = [vstar_record(i, image={"bytes": picture(i), "path": "sa.jpg"}) for i in range(3)]
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", records)
    found = rows("vstar", tmp_path)
    folder = rows("vstar", vstar_folder(tmp_path / "again"))
    same = [(r.id, r.question, r.options, r.answer, r.category) for r in folder]
    assert [(r.id, r.question, r.options, r.answer, r.category) for r in found] == same
    assert [r.boxes for r in found] == [()] * 3
    assert found[1].image_source == picture(1)


def test_vstar_ids_may_be_numbers():
    image = {"bytes": picture(), "path": None}
    assert vstar_row(vstar_record(7, question_id=7, image=image), TABLE, 1).id == "7"


@given(LINE, st.lists(LINE, min_size=2, max_size=6))
def test_a_vstar_text_is_its_question_and_options(question, options):
    lettered = [f"({x}) {o}" for x, o in zip(string.ascii_uppercase, options, strict=False)]
    asked = "\n".join([question, *lettered])
    assert split_text(f"{asked}\n{INSTRUCTION}") == (question, options, asked)


@given(st.text())
def test_any_vstar_text_keeps_what_is_asked(text):
    question, options, asked = split_text(text)
    assert options or question == asked
    assert asked in text


@given(
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4),
)
def test_true_boxes_are_in_the_image_or_refused(width, height, box):
    try:
        ((x1, y1, x2, y2),) = boxes_of([box], width, height)
    except ValueError:
        x, y, w, h = box
        outside = x + w <= 0 or y + h <= 0 or x >= width or y >= height
        assert outside or w <= 1e-9 or h <= 1e-9
    else:
        assert 0 <= x1 < x2 <= 1000
        assert 0 <= y1 < y2 <= 1000
        assert math.isclose(x1 * width / 1000, max(box[0], 0), abs_tol=1e-6)
        assert math.isclose(y2 * height / 1000, min(box[1] + box[3], height), abs_tol=1e-6)


@pytest.mark.parametrize(
    "known", ['{"bbox": [[1, 2, 3]]}', '{"bbox": [[1, 2, null, 4]]}', "[", "3"]
)
def test_a_damaged_annotation_is_a_bad_row(tmp_path, known):
    folder = vstar_folder(tmp_path)
    (folder / "direct_attributes" / "sa_1.json").write_text(known)
    _, bad, _ = rows("vstar", folder)
    assert (bad.row_id, bad.field) == ("1", "boxes")


# --- HR-Bench -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".tsv"])
def test_hrbench_is_the_same_from_parquet_and_tsv(tmp_path, suffix):
    records = hrbench_records()
    path = tmp_path / f"hr_bench_4k{suffix}"
    if suffix == ".parquet":
        write_parquet(path, records)
    else:
        lines = [list(records[0]), *(map(str, record.values()) for record in records)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines))
    found = rows("hrbench_4k", tmp_path)
    assert [row.id for row in found] == [str(i) for i in range(8)]
    assert [row.answer for row in found[:4]] == ["A", "D", "C", "B"]
    assert found[1].options == ("green", "blue", "black", "red")
    assert found[1].meta["cycle_category"] == "cycle 1"
    assert found[1].meta["asked"] == (
        "What colour is thing 0?\nOptions:\nA. green\nB. blue\nC. black\nD. red"
    )
    assert found[4].category == "cross"
    assert found[0].image_source == picture(0, form="JPEG")


def test_each_half_of_hrbench_takes_its_own_file(tmp_path):
    write_parquet(tmp_path / "HR-Bench" / "hr_bench_4k.parquet", hrbench_records(1))
    write_parquet(tmp_path / "HR-Bench" / "hr_bench_8k.parquet", hrbench_records(2))
    assert (len(rows("hrbench_4k", tmp_path)), len(rows("hrbench_8k", tmp_path))) == (4, 8)
    (tmp_path / "HR-Bench" / "hr_bench_8k.parquet").unlink()
    with pytest.raises(SourceError, match=r"no file of hrbench_8k: looked for \.parquet or \.tsv"):
        rows("hrbench_8k", tmp_path)


def hrbench_record(**changes):
    record = {**hrbench_records(1)[0], **changes}
    return {key: value for key, value in record.items() if value is not None}


def test_hrbench_options_may_be_fewer():
    assert hrbench_row(hrbench_record(C=None, D=None), TABLE, 1).options == ("red", "green")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"B": None}, "options"),
        ({"B": " "}, "options"),
        ({"B": None, "C": None, "D": None}, "options"),
        ({"D": None, "answer": "D"}, "answer"),
        ({"answer": "E"}, "answer"),
        ({"answer": "AB"}, "answer"),
        ({"answer": None}, "answer"),
        ({"image": None}, "image"),
        ({"image": "not base64!"}, "image"),
        ({"question": None}, "question"),
    ],
)
def test_a_bad_hrbench_record_names_its_field(changes, field):
    with pytest.raises(RowError) as caught:
        hrbench_row(hrbench_record(**changes), TABLE, 1)
    assert (caught.value.row_id, caught.value.field) == ("0", field)


def test_nothing_in_a_table_is_a_missing_field(tmp_path):
    nothing = [None, float("nan")]
    records = [{**hrbench_record(index=i), "D": value} for i, value in enumerate(nothing)]
    write_parquet(tmp_path / "hr_bench_4k.parquet", [{**r, "C": None} for r in records])
    assert [row.options for row in rows("hrbench_4k", tmp_path)] == [("red", "green")] * 2


# --- MME-RealWorld ------------------------------------------------------------------------------


def test_mme_realworld_options_lose_their_letters(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [mme_record(0)])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [mme_record(1, answer=" b ")])
    first, second = rows("mme_realworld_lite", tmp_path)
    assert first.options == ("1", "2", "3", "4", "There are none.")
    assert (first.answer, second.answer) == ("E", "B")
    assert first.category == "Perception/Monitoring"
    assert first.meta["asked"].startswith("How many cars?\nOptions:\n(A) 1\n(B) 2\n")
    assert second.image_source == picture(1)


def test_both_sizes_of_mme_realworld_may_share_a_folder(tmp_path):
    write_parquet(tmp_path / "MME-RealWorld" / "train.parquet", [mme_record(i) for i in range(3)])
    write_parquet(tmp_path / "MME-RealWorld-Lite" / "train.parquet", [mme_record()])
    assert len(rows("mme_realworld", tmp_path)) == 3
    assert len(rows("mme_realworld_lite", tmp_path)) == 1
    (tmp_path / "MME-RealWorld").rename(tmp_path / "data")
    assert len(rows("mme_realworld", tmp_path)) == 3


def test_equal_options_stay_in_the_question():
    same = mme_record(**{"multi-choice options": ["(A) 1", "(B) 1", "(C) 2"], "answer": "B"})
    row = mme_realworld_row(same, TABLE, 1)
    assert (row.options, row.answer) == ((), "B")
    assert row.question_with_options == "How many cars?\nOptions:\n(A) 1\n(B) 1\n(C) 2"
    with pytest.raises(RowError, match="the options are A-C"):
        mme_realworld_row({**same, "answer": "D"}, TABLE, 1)


@given(st.lists(LINE, max_size=26))
def test_lettered_options_give_back_what_was_lettered(texts):
    lines = [f"({x}) {t}" for x, t in zip(string.ascii_uppercase, texts, strict=False)]
    assert lettered_options(lines) == texts
    if len(lines) > 1:
        assert lettered_options(lines[::-1]) == []


@given(
    st.lists(st.text(max_size=8), min_size=2, max_size=5),
    st.one_of(st.sampled_from("ABCDEFabc"), st.text(max_size=3)),
)
def test_a_choice_is_a_row_or_a_bad_answer(options, answer):
    asked = "Which?\n" + "\n".join(options)
    letters = string.ascii_uppercase[: len(options)]
    if answer.strip().upper() not in list(letters):
        with pytest.raises(RowError, match="field 'answer'"):
            choice_row("1", "Which?", asked, options, answer)
        return
    row = choice_row("1", "Which?", asked, options, answer)
    assert row.answer in letters
    assert row.options in ((), tuple(o.strip() for o in options))
    assert row.options or row.question == asked.strip()


# --- P2R-10k and plain files --------------------------------------------------------------------


def test_p2r_10k_reads_verls_layout(tmp_path):
    (tmp_path / "b.png").write_bytes(picture(1))
    records = [
        p2r_record(0),
        p2r_record(0, images=[{"bytes": None, "path": "b.png"}, {"bytes": b"x", "path": None}]),
        p2r_record(1, extra_info={"answer_form": None, "index": 1}),
    ]
    write_parquet(tmp_path / "train.parquet", records)
    write_parquet(tmp_path / "val.parquet", records)
    first, second, third = rows("p2r_10k", tmp_path)
    assert first.question_with_options == "What is it?\nA. cup\nB. hat"
    assert (first.id, second.id) == ("train:1", "train:2")
    assert (first.answer, first.answer_form, third.answer_form) == ("B", "mca", "free_form")
    assert (first.image_source, second.image_source) == (picture(0), tmp_path / "b.png")
    assert first.category == "zwz"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images": [{"bytes": None, "path": None}]}, "bytes: None"),
        ({"images": []}, "is empty"),
        ({"images": ["gone.png"]}, "file not found: gone.png"),
        ({"reward_model": {"style": "rule"}}, "is missing"),
        ({"prompt": [{"role": "user", "content": "<image>\n "}]}, "must be a non-empty string"),
        ({"extra_info": {"answer_form": "essay"}}, "use one of"),
    ],
)
def test_a_bad_training_record_says_why(changes, problem):
    with pytest.raises(RowError, match=problem):
        p2r_10k_row(p2r_record(**changes), TABLE, 4)


def test_questions_may_be_in_parts():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "<image>Who?"}]
    record = p2r_record(prompt=[{"role": "user", "content": parts}])
    assert p2r_10k_row(record, TABLE, 1).question == "Who?"


def test_plain_files_of_both_kinds(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(3))
    row = {"question": "Who?", "answer": "me", "answer_form": "free_form"}
    lines = '{"question": "Who?", "answer": "me", "answer_form": "free_form", "image": "a.png"}\n[]'
    (tmp_path / "rows.jsonl").write_text(lines)
    write_parquet(tmp_path / "rows.parquet", [{**row, "image": picture(3)}])
    good, bad = (r for _, r in plain("mine").rows(tmp_path / "rows.jsonl")[1])
    (embedded,) = (r for _, r in plain("mine").rows(tmp_path / "rows.parquet")[1])
    assert bad.problem == "is not a JSON object"
    assert good.load_image().tolist() == embedded.load_image().tolist()
    assert (good.question, good.answer) == ("Who?", "me")


FIELDS = [*mme_record(), *hrbench_record(), *p2r_record(), *vstar_record(0)]
ODD = st.one_of(
    st.none(),
    st.text(max_size=4),
    st.integers(),
    st.floats(),
    st.lists(st.text(max_size=3)),
    st.dictionaries(st.text(max_size=3), st.none()),
)


@given(st.dictionaries(st.sampled_from(FIELDS), ODD))
def test_a_record_of_unexpected_types_is_one_bad_row(record):
    for benchmark in benchmarks().values():

        class Odd:
            def __iter__(self):
                return iter([(TABLE, 1, record)])

        ((where, row),) = benchmark._rows(Odd())
        assert where == "table.parquet:1"
        assert isinstance(row, RowError)


# --- images and tables --------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=300), st.sampled_from(["", "data:image/png;base64,"]))
def test_base64_gives_back_what_went_in(data, prefix):
    text = prefix + base64.b64encode(data).decode()
    assert from_base64(text, "1") == data
    wrapped = prefix + base64.encodebytes(data).decode()
    assert from_base64(wrapped, "1") == data


@given(st.binary(min_size=1, max_size=30), st.sampled_from("!-_.é"), st.integers(0, 40))
def test_other_text_is_no_base64(data, odd, where):
    text = base64.b64encode(data).decode()
    with pytest.raises(RowError, match="row 'r1', field 'image': is not base64"):
        from_base64(text[:where] + odd + text[where:], "r1")


def test_encoded_images_in_a_text_column_are_taken_as_they_are():
    assert from_base64(picture(), "1") == picture()
    assert from_base64(base64.b64encode(picture()), "1") == picture()


def test_an_image_of_huggingface_prefers_its_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(b"file")
    assert image_of({"bytes": b"data", "path": "a.png"}, "1", [tmp_path]) == b"data"
    assert image_of({"path": "a.png"}, "1", [tmp_path]) == tmp_path / "a.png"


def test_parquet_is_read_one_record_at_a_time(tmp_path):
    """In file order, over files and row groups."""
    first = write_parquet(tmp_path / "0.parquet", [{"n": i, "image": b"x"} for i in range(7)])
    second = write_parquet(tmp_path / "1.parquet", [{"n": 7, "image": None}])
    table = Table([first, second], "image")
    assert table.count() == 8
    found = list(table)
    assert [record["n"] for _, _, record in found] == list(range(8))
    assert [number for _, number, _ in found] == [1, 2, 3, 4, 5, 6, 7, 1]
    assert "image" not in found[7][2]


@pytest.mark.parametrize("size", [10, 5000, 3_000_000])
def test_the_first_page_of_images_is_measured(tmp_path, size):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    table = pa.table({"n": [1], "image": [bytes(size)]})
    parquet.write_table(table, path, use_dictionary=False, compression=None)
    measured = _first_page(path, parquet.ParquetFile(path).metadata, "image")
    assert size < measured < size + 100
    assert _first_page(path, parquet.ParquetFile(path).metadata, "other") == 0
    parquet.write_table(table, path, use_dictionary=True)
    assert _first_page(path, parquet.ParquetFile(path).metadata, "image") == 0


@given(st.binary(max_size=40))
def test_a_page_header_of_any_bytes_is_no_error(header):
    assume(header)
    assert len(list(_integers(header))) <= len(header)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "hr_bench_4k.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SourceError, match=r"cannot read .*hr_bench_4k\.parquet as parquet"):
        rows("hrbench_4k", tmp_path)
