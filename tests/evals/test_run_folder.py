"""What of a large run is shown: a fair choice, stable between runs of the report."""

from __future__ import annotations

import json

from p2r_jax.evals import run_folder


def test_every_stratum_gets_its_share():
    items = [{"id": i, "kind": "rare" if i < 3 else "common"} for i in range(1000)]
    chosen = run_folder.stratified(items, 10, lambda item: (item["kind"],))
    assert sum(item["kind"] == "rare" for item in chosen) == 3
    assert len(chosen) == 10
    assert chosen == sorted(chosen, key=lambda item: item["id"])


def test_the_same_questions_are_chosen_from_every_stratum():
    items = [{"id": i, "mode": m} for m in ("default", "p2r") for i in range(100)]
    chosen = run_folder.stratified(items, 20, lambda item: (item["mode"],))
    ids = [{c["id"] for c in chosen if c["mode"] == m} for m in ("default", "p2r")]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 10


def test_answers_with_a_picture_come_first_in_their_stratum():
    items = [{"id": i, "right": i % 2, "image": f"{i}.jpg" if i >= 90 else None} for i in range(98)]
    chosen = run_folder.stratified(items, 12, lambda item: (item["right"],))
    assert [item["id"] for item in chosen if item["image"]] == list(range(90, 98))
    assert [sum(item["right"] == right for item in chosen) for right in (0, 1)] == [6, 6]


def test_samples_come_as_whole_groups_from_all_over_the_run(tmp_path):
    for step in range(100):
        rows = [
            {"step": step, "role": "reasoner", "id": i, "reward": float(i == 1 and g == 0)}
            for i in range(4)
            for g in range(8)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"step_{step:06d}.jsonl").write_text(lines)
    files = sorted(tmp_path.iterdir())
    samples, used = run_folder.pick_samples(files, 48, notes := [])
    assert (len(samples), used, notes) == (48, 6, [])
    assert {s["step"] for s in samples} == {0, 20, 40, 59, 79, 99}
    assert {s["id"] for s in samples} == {1}  # The group with mixed rewards.


def test_names_sort_by_number():
    assert sorted(["s_100", "s_20", "s"], key=run_folder.natural) == ["s", "s_20", "s_100"]


def test_boxes_are_read_in_either_form_and_junk_is_dropped():
    boxes = [{"bbox_2d": [1, 2, 3, 4], "label": "cup"}, [5, 6, 7, 8], [1, 2, 3], {"bbox_2d": None}]
    assert run_folder.boxes_of(boxes) == [
        {"bbox": [1.0, 2.0, 3.0, 4.0], "label": "cup"},
        {"bbox": [5.0, 6.0, 7.0, 8.0], "label": ""},
    ]
    assert run_folder.boxes_of("no list") == []
