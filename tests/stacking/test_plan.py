"""Plans: what every operator does, how a plan is written, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from stacking.plan import HOWS, Plan, custom_plan, make_plan

OPERATORS = ("stack", "interleave", "overlap", "middle", "identity", "random")


@st.composite
def plans(draw) -> Plan:
    """Any plan for a few layers."""
    n = draw(st.integers(1, 9))
    sources = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    how = draw(st.lists(st.sampled_from(HOWS), min_size=len(sources), max_size=len(sources)))
    return Plan("custom", n, tuple(sources), tuple(how))


# Written out by hand, after the papers that each operator is named in.
@pytest.mark.parametrize(
    "operator, n, factor, sources, how",
    [
        ("stack", 3, None, "0 1 2 0 1 2", "cccccc"),
        ("stack", 4, 1.5, "0 1 2 3 0 1", "cccccc"),
        ("stack", 2, 4, "0 1 0 1 0 1 0 1", "cccccccc"),
        ("stack", 1, 64, " ".join("0" * 64), "c" * 64),
        ("interleave", 3, None, "0 0 1 1 2 2", "cccccc"),
        ("interleave", 2, 3, "0 0 0 1 1 1", "cccccc"),
        ("overlap", 4, None, "0 1 2 1 2 3", "cccccc"),
        ("overlap", 6, 4 / 3, "0 1 2 3 2 3 4 5", "cccccccc"),
        ("middle", 4, None, "0 1 2 1 2 3", "cccccc"),
        ("middle", 6, 4 / 3, "0 1 2 3 2 3 4 5", "cccccccc"),
        ("middle", 5, 1.2, "0 1 2 2 3 4", "cccccc"),
        ("middle", 3, 2, "0 1 2 0 1 2", "cccccc"),
        ("overlap", 3, 2, "0 1 2 0 1 2", "cccccc"),
        ("identity", 3, None, "0 1 2 0 1 2", "ccciii"),
        ("random", 3, None, "0 1 2 0 1 2", "cccfff"),
    ],
)
def test_operators(operator, n, factor, sources, how):
    plan = make_plan(operator, n, factor)
    assert plan.sources == tuple(map(int, sources.split()))
    assert plan.how == tuple({"c": "copy", "i": "identity", "f": "fresh"}[letter] for letter in how)


def test_overlap_is_solar():
    """SOLAR 10.7B: 32 layers, 8 dropped on either side of the seam, 48 in all."""
    assert make_plan("overlap", 32).sources == (*range(24), *range(8, 32))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_factor_of_one_changes_nothing(operator):
    plan = make_plan(operator, 6, 1)
    assert plan.is_noop and plan.preserves
    assert not make_plan(operator, 8).is_noop


def test_what_preserves_the_function():
    assert make_plan("identity", 4).preserves and not make_plan("stack", 4).preserves
    assert custom_plan("0,0:identity,1,2", 3).preserves
    assert not custom_plan("0,2", 3).preserves  # a layer is gone
    assert not custom_plan("0,1,2,2:fresh", 3).preserves
    assert not custom_plan("1,0,2", 3).preserves


@given(plans())
def test_a_plan_can_be_read_as_it_is_written(plan):
    assert custom_plan(plan.ranges(), plan.n_source) == plan


@given(plans())
def test_the_picture_names_every_layer_and_its_source(plan):
    lines = plan.picture().splitlines()
    numbers = {
        label: [int(x) for line in lines if line.startswith(label) for x in line.split()[1:]]
        for label in ("new", "old")
    }
    assert numbers == {"new": list(range(plan.n_layers)), "old": list(plan.sources)}


def test_the_picture_marks_what_is_no_copy_and_says_how():
    plan = custom_plan("0-1,2:identity,0-29,3:fresh", 30)  # the third of a line of 24, and the last of two
    assert plan.picture().splitlines() == [
        "custom: 30 -> 34 layers (0-1,2:identity,0-29,3:fresh)",
        "new     0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19 20 21 22 23",
        "        ▁  ▁  ▁  ▁  ▁  ▁  ▁  ▁  ▂  ▂  ▂  ▂  ▃  ▃  ▃  ▃  ▄  ▄  ▄  ▄  ▅  ▅  ▅  ▅",
        "old     0  1  2  0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19 20",
        "              0",
        "new    24 25 26 27 28 29 30 31 32 33",
        "        ▆  ▆  ▆  ▆  ▇  ▇  ▇  ▇  █  ▁",
        "old    21 22 23 24 25 26 27 28 29  3",
        "                                   *",
        "      0: an identity block, its o and down zeroed",
        "      *: newly drawn",
    ]
    assert custom_plan("0:identity,0-29", 30).picture().splitlines()[4] == "        0"
    assert custom_plan("0-29", 30).picture().count("\n") == 6  # without a line of marks


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_plan("stack", 7, 1.5), "factor of 1.5 does not fit 7 layers.*as 1.42857 does"),
        (lambda: make_plan("stack", 6, 0.5), "must be at least 1"),
        (lambda: make_plan("stack", 6, -2), "must be at least 1"),
        (lambda: make_plan("stack", 6, float("nan")), "does not fit"),
        (lambda: make_plan("stack", 6, 65), r"\(and at most 64\) .* as 2 does"),
        (lambda: make_plan("middle", 6, 3), "at most twice the layers, not 18 out of 6"),
        (lambda: make_plan("overlap", 6, 1.5), "an even number, not 9 out of 6"),
        (lambda: custom_plan("0-11,0-12", 12), "'0-12' names layer 12, but the model has 12 layers, 0 to 11"),
        (lambda: custom_plan("3-1", 12), "runs backwards: write 1-3"),
        (lambda: custom_plan("0-x", 12), "is not a range of layers"),
        (lambda: custom_plan("0-3:dead", 12), "is not a range of layers"),
        (lambda: custom_plan("", 12), "is not a range of layers"),
        (lambda: Plan("custom", 2, (0, 2), ("copy", "copy")), "there is no layer 2: the model has 2"),
        (lambda: Plan("custom", 2, (), ()), "at least one layer"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UserError, match=message):
        make()
