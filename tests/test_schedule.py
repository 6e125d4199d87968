import itertools

import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.schedule import ASPECT_RATIOS, PIXEL_BUDGETS, ScaleSchedule, parse_aspect_ratio

BUDGETS = ("0.06M", "0.25M", "0.60M", "1M")
# Height and width in pixels and the number of tokens, for every budget (MODEL_SPEC 3).
SIZES = {
    "1:1": ((256, 256, 521), (512, 512, 2521), (768, 768, 6425), (1024, 1024, 10521)),
    "5:4": ((320, 256, 614), (560, 448, 2814), (880, 704, 6854), (1120, 896, 10774)),
    "4:3": ((320, 240, 665), (576, 432, 2657), (960, 720, 7085), (1152, 864, 10973)),
    "3:2": ((336, 224, 533), (624, 416, 2759), (1008, 672, 6941), (1248, 832, 10997)),
    "7:4": ((336, 192, 472), (672, 384, 2628), (1120, 640, 7220), (1344, 768, 11252)),
    "2:1": ((352, 176, 451), (736, 368, 2681), (1184, 592, 7219), (1440, 720, 11269)),
    "5:2": ((400, 160, 555), (800, 320, 2555), (1280, 512, 6805), (1600, 640, 10805)),
    "3:1": ((432, 144, 509), (864, 288, 2588), (1440, 480, 7016), (1776, 592, 11123)),
}
CASES = [(ratio, budget, *size) for ratio, sizes in SIZES.items() for budget, size in zip(BUDGETS, sizes, strict=True)]
ORDER = ["1:1", "5:4", "4:5", "4:3", "3:4", "3:2", "2:3", "7:4", "4:7", "2:1", "1:2", "5:2", "2:5", "3:1", "1:3"]


def inverse(ratio: str) -> str:
    return ":".join(reversed(ratio.split(":")))


@pytest.mark.parametrize(("ratio", "budget", "height", "width", "tokens"), CASES)
def test_sizes_and_token_totals(ratio, budget, height, width, tokens):
    tall, wide = (ScaleSchedule.for_budget(name, budget) for name in (ratio, inverse(ratio)))
    assert (tall.pixel_size, tall.num_tokens) == ((height, width), tokens)
    assert (wide.pixel_size, wide.num_tokens) == ((width, height), tokens)


def test_there_are_fifteen_templates_in_the_original_order():
    assert list(ASPECT_RATIOS) == ORDER
    assert tuple(PIXEL_BUDGETS) == BUDGETS


@pytest.mark.parametrize("ratio", ORDER)
def test_every_template_grows_over_thirteen_scales(ratio):
    grids = ASPECT_RATIOS[ratio]
    assert len(grids) == 13
    assert grids[:2] == ((1, 1), (2, 2))
    for smaller, larger in itertools.pairwise(grids):
        assert smaller[0] <= larger[0]
        assert smaller[1] <= larger[1]
        assert smaller != larger


@pytest.mark.parametrize("ratio", ORDER)
def test_budgets_are_prefixes_and_share_the_finest_grid(ratio):
    full = ScaleSchedule.for_budget(ratio, "1M")
    assert full.finest_grid == full.grids[-1]
    for budget in BUDGETS:
        part = ScaleSchedule.for_budget(ratio, budget)
        assert part.grids == full.grids[: len(part)]
        assert part.offsets == full.offsets[: len(part) + 1]
        assert part.finest_grid == full.finest_grid


def test_offsets_are_where_scales_start():
    schedule = ScaleSchedule.of("2:3", 4)
    assert schedule.grids == ((1, 1), (2, 2), (2, 3), (4, 6))
    assert schedule.token_counts == (1, 4, 6, 24)
    assert schedule.offsets == (0, 1, 5, 11, 35)
    assert schedule.num_tokens == 35
    assert len(schedule) == 4


def test_patchified_tokens_are_two_by_two_cells_of_the_same_picture():
    plain, patchified = (ScaleSchedule.of("4:3", 7, latent_per_token=factor) for factor in (1, 2))
    assert patchified.grids == plain.grids == plain.latent_grids
    assert patchified.latent_grids[-1] == (40, 30)
    assert patchified.pixel_size == plain.pixel_size


def test_the_token_stride_sets_the_picture_size():
    assert ScaleSchedule.of("1:1", 5, token_stride=8).pixel_size == (64, 64)


def test_schedules_are_equal_and_hash_alike_whichever_way_they_are_named():
    one, other = ScaleSchedule.of("8:6", 7), ScaleSchedule.for_budget("1.333", "0.06M")
    assert one == other
    assert hash(one) == hash(other)
    assert one.aspect_ratio == "4:3"


@pytest.mark.parametrize(
    ("text", "ratio"),
    [
        *((name, name) for name in ORDER),
        *(("8:6", "4:3"), ("1024:1024", "1:1"), (" 3 : 2 ", "3:2"), ("1.5:1", "3:2"), ("1:2.5", "2:5")),
        *(("1", "1:1"), ("1.0", "1:1"), ("1.000", "1:1"), ("1.25", "5:4"), ("0.8", "4:5"), ("1.333", "4:3")),
        *(("0.75", "3:4"), ("1.5", "3:2"), ("0.666", "2:3"), ("0.667", "2:3"), ("1.75", "7:4"), ("0.571", "4:7")),
        *(("2", "2:1"), ("0.5", "1:2"), ("2.5", "5:2"), ("0.4", "2:5"), ("3.000", "3:1"), ("0.333", "1:3")),
    ],
)
def test_ratios_that_name_a_template(text, ratio):
    assert parse_aspect_ratio(text) == ratio


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        *(("16:9", "7:4 and 2:1"), ("9:16", "4:7 and 1:2"), ("1.3", "4:3 and 5:4"), ("1.3333", "4:3 and 5:4")),
        *(("1.34", "4:3 and 5:4"), ("1001:1000", "1:1 and 4:5"), ("100000000:1", "3:1 and 5:2")),
        *(("1:100000000", "1:3 and 2:5"), ("0.66", "2:3 and 4:7"), ("1.333:1", "4:3 and 5:4")),
    ],
)
def test_other_ratios_are_refused_with_the_nearest_legal_ones(text, nearest):
    with pytest.raises(UserInputError) as caught:
        parse_aspect_ratio(text)
    message = str(caught.value)
    assert message.startswith(f"aspect ratio {text!r} (height:width): must be one of 1:1, 5:4, ")
    assert message.endswith(f"; the nearest are {nearest}")


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ":", "abc", "square", "4x3", "4/3", "4:3:2", "4:", ":3", "0", "0:1", "1:0", "0:0", "0.0", "-4:3"),
        *("4:-3", "-4:-3", "+4:3", "nan", "inf", "1e3", "1e999999999:1", "1_0:1_0", "9" * 5000, "4,3", "4:3\n2"),
    ],
    ids=lambda text: repr(text[:14]),
)
def test_what_is_not_a_ratio_is_refused_in_one_line_at_once(text):
    with pytest.raises(UserInputError, match=r"must be height:width, one of 1:1, .* 1:3; for example") as caught:
        parse_aspect_ratio(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_schedules_refuse_what_they_cannot_be():
    with pytest.raises(UserInputError, match="the nearest are 7:4 and 2:1"):
        ScaleSchedule.of("16:9", 7)
    for count in (0, 14, -1):
        with pytest.raises(UserInputError, match=f"^{count} scales: must be 1 to 13; "):
            ScaleSchedule.of("1:1", count)


@pytest.mark.parametrize(("pixels", "hint"), [("0.6M", "0.60M or 0.06M"), ("1 MP", "1M"), ("1024", None), ("", None)])
def test_unknown_budgets_are_refused_with_the_known_ones(pixels, hint):
    with pytest.raises(UserInputError) as caught:
        ScaleSchedule.for_budget("1:1", pixels)
    remedy = f"did you mean {hint}?" if hint else "choose one of them"
    assert str(caught.value) == f"pixel budget {pixels!r}: must be one of 0.06M, 0.25M, 0.60M, 1M; {remedy}"
