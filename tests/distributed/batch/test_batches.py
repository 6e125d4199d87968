"""Batches: a function of the rows and the settings, so that any worker makes the same ones."""

from __future__ import annotations

from toprovar_jax.distributed.batch.batches import Planner, padding_of
from toprovar_jax.distributed.batch.rows import BrokenRow, Row

from .painting import SETTINGS, PaintingPipeline


def planned(*rows, batch_size=4, pipeline=None, padded=True, cut=False, **settings):
    pipeline = pipeline or PaintingPipeline()
    planner = Planner(pipeline, SETTINGS | settings, batch_size=batch_size, padded=padded, cut_long_prompts=cut)
    return planner.chunk(rows)


def row(number, prompt="a", seed=None, **settings):
    return Row(number, f"id{number}", prompt, seed, settings)


def shape(chunk):
    return [(batch.name, [(one.row, one.image) for one in batch.pictures]) for batch in chunk.batches]


def test_rows_that_run_the_same_programs_share_batches_in_their_order():
    chunk = planned(
        row(0),
        row(1, aspect_ratio="2:1"),
        row(2, guidance=3.0),  # the default
        row(3, guidance=4.0),
        row(4, negative_prompt="fog"),
        row(5, negative_prompt="  "),
        row(6, negative_prompt="rain"),
        row(7, policy="fastvar"),
        row(8, aspect_ratio="2:1"),
    )
    assert shape(chunk) == [
        ("0000", [(0, 0), (2, 0), (5, 0)]),
        ("0001", [(1, 0), (8, 0)]),
        ("0002", [(3, 0)]),
        ("0003", [(4, 0), (6, 0)]),
        ("0004", [(7, 0)]),
    ]
    assert len({batch.key for batch in chunk.batches}) == 5
    assert padding_of(chunk.batches) == (9, 11)


def test_texts_of_other_lengths_are_in_other_batches():
    lengths = {0: 10, 1: 63, 2: 64, 3: 127, 4: 128, 5: 255, 6: 256, 7: 299}  # words, to which the end token comes
    chunk = planned(*(row(number, "w " * words) for number, words in lengths.items()))
    assert [(batch.text_length, [one.row for one in batch.pictures]) for batch in chunk.batches] == [
        (64, [0, 1]),
        (128, [2, 3]),
        (256, [4, 5]),
        (300, [6, 7]),
    ]


def test_a_long_negative_prompt_counts_as_text_too():
    assert planned(row(0, negative_prompt="w " * 100)).batches[0].text_length == 128


def test_seeds_count_up_from_the_rows_own_or_from_the_jobs():
    chunk = planned(row(0, num_images=2), row(3, seed=2**32 - 1, num_images=2), row(4), seed=2**32 - 3, batch_size=9)
    assert [one.seed for one in chunk.batches[0].pictures] == [2**32 - 3, 2**32 - 2, 2**32 - 1, 0, 3997]


def test_no_two_pictures_of_a_job_share_a_seed():
    chunk = planned(*(row(number, num_images=1000) for number in range(3)), batch_size=4000)
    assert len({one.seed for one in chunk.batches[0].pictures}) == 3000


def drawn(planner, pipeline, chunk):
    """Per call and batch, how many pictures came back."""
    return [[len(images) for images in call.draw(pipeline)] for call in planner.calls(chunk.batches)]


def test_calls_are_padded_with_the_last_picture_and_give_back_the_others():
    pipeline = PaintingPipeline()
    planner = Planner(pipeline, SETTINGS, batch_size=2)
    chunk = planner.chunk(row(number, f"p{number}") for number in range(3))
    assert drawn(planner, pipeline, chunk) == [[2], [1]]
    assert [(prompts, seeds) for prompts, seeds, _ in pipeline.calls] == [
        (["p0", "p1"], [0, 1000]),
        (["p2"] * 2, [2000] * 2),
    ]
    (batch,) = planned(row(0), padded=False).batches
    assert batch.size == 1


def test_copies_of_the_model_get_a_batch_each_and_those_left_over_repeat_a_picture():
    pipeline = PaintingPipeline(copies=2)
    planner = Planner(pipeline, SETTINGS, batch_size=2, copies=2)
    chunk = planner.chunk(
        row(number, f"p{number}", **({"aspect_ratio": "2:1"} if number == 1 else {})) for number in range(6)
    )
    assert drawn(planner, pipeline, chunk) == [[2, 2], [1], [1]]
    assert [prompts for prompts, _, _ in pipeline.calls] == [["p0", "p2", "p3", "p4"], ["p5"] * 4, ["p1"] * 4]


def test_texts_are_computed_at_the_length_of_their_bucket():
    pipeline = PaintingPipeline()
    planner = Planner(pipeline, SETTINGS, batch_size=2)
    drawn(planner, pipeline, planner.chunk([row(0, "w " * 10), row(1, "w " * 100)]))
    assert [options["text_length"] for _, _, options in pipeline.calls] == [64, 128]


def test_negative_prompts_and_lists_reach_the_call():
    pipeline = PaintingPipeline()
    planner = Planner(pipeline, SETTINGS, batch_size=3)
    rows = [row(k, negative_prompt=text, guidance=(1.0, 2.0)) for k, text in enumerate(["fog", "rain"])]
    drawn(planner, pipeline, planner.chunk(rows))
    options = pipeline.calls[0][2]
    assert (options["negative_prompt"], options["guidance_scale"]) == (["fog", "rain", "rain"], [1.0, 2.0])


def test_words_for_faces_are_appended_where_the_row_says_so():
    chunk = planned(row(0, "a man"), row(1, "a man", positive_prompt=False), positive_prompt=True)
    faces, plain = chunk.batches[0].pictures
    assert faces.prompt.startswith("a man. very smooth faces")
    assert plain.prompt == "a man"


def test_a_row_that_the_model_refuses_is_broken_and_takes_no_other_with_it():
    chunk = planned(
        row(0),
        row(1, "w " * 300),
        BrokenRow(2, "2", "?", "row 2: no"),
        row(3, pixels="9M"),
        row(4),
    )
    assert shape(chunk) == [("0000", [(0, 0), (4, 0)])]
    assert [(one.number, one.reason) for one in chunk.broken] == [
        (1, "row 1: prompt of 301 tokens: must have at most 300; shorten it"),
        (2, "row 2: no"),
        (3, "row 3: pixels '9M': must be one of tiny, 1M; choose one"),
    ]


def test_long_prompts_are_cut_where_that_is_allowed():
    assert shape(planned(row(0, "w " * 300), cut=True)) == [("0000", [(0, 0)])]


def test_warnings_are_passed_on_once():
    assert planned(row(0, "cat"), row(1, "cat"), row(2, "cat", pixels="1M")).warnings == ("'cat' is about cats",)
