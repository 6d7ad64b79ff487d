"""Patterns of files: the same matches as `re`, in bounded time; what is not followed is refused."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion_jax.io.peft.patterns import Pattern, PatternError, Steps, Text

_ITEMS = ["a", "b", ".", r"\.", r"\d", r"\W", "[ab]", "[^a-c]", r"[\w.]", "^", "$", r"\b", r"\B", r"\Z", "(?!)", ""]


def _combined(parts):
    repeats = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?", "{3,}"])
    return st.one_of(
        st.tuples(parts, parts).map("".join),
        st.tuples(parts, parts).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(parts, repeats).map(lambda pair: f"({pair[0]}){pair[1]}"),
        st.tuples(st.sampled_from(["?=", "?!"]), parts).map(lambda pair: f"({pair[0]}{pair[1]})"),
        st.tuples(st.sampled_from(["?<=", "?<!"]), st.sampled_from(["a", r"[.b]", r"a\d"])).map(
            lambda p: f"({p[0]}{p[1]})"
        ),
    )


_PATTERNS = st.recursive(st.sampled_from(_ITEMS), _combined, max_leaves=8)


@settings(max_examples=300)
@given(_PATTERNS, st.lists(st.text("abc.1_\n", max_size=6), min_size=1, max_size=6))
def test_a_pattern_matches_what_re_matches(text, paths):
    pattern, steps = Pattern(text), Steps()
    for path in paths:
        assert pattern.fullmatch(Text(path, steps)) == bool(re.fullmatch(text, path)), (text, path)
        assert pattern.match(Text(path, steps)) == bool(re.match(text, path)), (text, path)


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        (r"(\w+\.?)+x", "x"),
        ("(a|a)*b", "b"),
        ("((a*)*)*b", "b"),
        ("(a?){80}b", "b"),
        (".*.*.*.*.*.*b", "b"),
        ("(a|a|aa)+$", ""),
        ("(?:(?=(a+)+b)a)*b", "b"),
    ],
)
def test_patterns_that_re_tries_without_end_match_at_once(text, yes):
    pattern, began = Pattern(text), time.process_time()
    assert pattern.fullmatch(Text("a" * 60 + yes, Steps()))
    assert not pattern.fullmatch(Text("a" * 60 + "c", Steps()))
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "text",
    [
        "(?:(?=)a?)*" * 900,
        "(" + "|" * 9_000 + ")*a",
        "[" + "a-b" * 3_000 + "]*",
        "(((a*b?)*a?)*b?)*" * 500,
        "(?!a)" * 2_000,
    ],
)
def test_steps_bound_the_time_of_every_part_of_a_pattern(text):
    pattern, steps = Pattern(text), Steps()
    steps.left = 20_000
    began = time.process_time()
    with pytest.raises(PatternError, match="take more than"):
        while True:
            pattern.fullmatch(Text("ab" * 200, steps))
    # 0.02 s, and 50 times as long where types are checked at run time.
    assert time.process_time() - began < 5


def test_what_cannot_be_matched_in_bounded_time_is_refused():
    for text, reason in (
        ("(" * 4_000 + "a" + ")" * 4_000, "recursion"),
        ("(" * 40 + "a" + ")*" * 40, "nests deeper than 30 levels"),
        ("q{99999999999}", "repetition number is too large"),
        (r"(q)\1", "has a groupref, which is not supported"),
        ("(?i)q", "sets flags"),
        ("(?s:q)", "has a subpattern"),
        ("q++", "has a possessive repeat"),
        ("(?>q)", "has a atomic group"),
        ("(q", "missing"),
        ("q" * 20_000, "has 20,000 characters: wanted at most 10,000"),
    ):
        with pytest.raises(PatternError, match=reason):
            Pattern(text)
    steps, pattern = Steps(), Pattern("(((a*b?)*c?)*d?)*e")
    steps.left = 1_000
    with pytest.raises(PatternError, match="take more than 10,000,000 steps"):
        for _ in range(100):
            pattern.fullmatch(Text("abcd" * 20, steps))
