"""Patterns of files: the same matches as `re`, in bounded time; what `regex` reads differently is refused."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion_jax.io.peft.patterns import Clock, PatternError, compiled

_ITEMS = ["a", "b", ".", r"\.", r"\d", r"\W", "[ab]", "[^a-c]", r"[\w.]", "[]a]"]
_ITEMS += ["^", "$", r"\b", r"\B", r"\Z", "(?!)", ""]


def _combined(parts):
    repeats = st.sampled_from(["*", "+", "?", "*?", "++", "{2}", "{1,3}", "{,2}", "{0,2}?", "{3,}"])
    return st.one_of(
        st.tuples(parts, parts).map("".join),
        st.tuples(parts, parts).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(parts, repeats).map(lambda pair: f"({pair[0]}){pair[1]}"),
        st.tuples(st.sampled_from(["?=", "?!", "?>"]), parts).map(lambda pair: f"({pair[0]}{pair[1]})"),
        st.tuples(st.sampled_from(["?<=", "?<!"]), st.sampled_from(["a", r"[.b]", r"a\d"])).map(
            lambda p: f"({p[0]}{p[1]})"
        ),
    )


_PATTERNS = st.recursive(st.sampled_from(_ITEMS), _combined, max_leaves=8)


@settings(max_examples=100)
@given(_PATTERNS, st.lists(st.text("abc.1_\n", min_size=1, max_size=6), min_size=1, max_size=6))
def test_a_pattern_matches_what_re_matches(text, paths):
    pattern, clock = compiled(text), Clock()
    for path in paths:
        assert clock.matches(pattern.fullmatch, path) == bool(re.fullmatch(text, path)), (text, path)
        assert clock.matches(pattern.match, path) == bool(re.match(text, path)), (text, path)


_PATHS = [
    f"{stack}.{layer}.{module}"
    for stack in ("model.layers", "model.language_model.layers", "model.vision_model.encoder.layers", "encoder.block")
    for layer in (0, 1, 9, 10, 27)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "layer.0.SelfAttention.q", "mlp.fc1")
]


@pytest.mark.parametrize(
    "text",
    [
        r"(.*\.)?(q|v)$",
        r"(.*\.)?(^model.layers.1.self_attn.q_proj)$",
        r"(.*\.)?(layers\.(1|2\d)\..*v_proj)$",
        r"^(model\.language_model(?=\.).*\.(down_proj|q_proj|o_proj|up_proj|k_proj|v_proj|gate_proj))$",
        r"(.*(language_model).*(down_proj|q_proj).*$|.*(custom_text_proj).*$)",
        r"(?:.*?(?:vision|language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|fc1|fc2))"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:q_proj|down_proj))",
        r"(?P<stack>.*)\.(\d)\.(.*)_proj",
        r"(.*)\.(\d)\2?\..*",
        r".*\.\d(?<!1)\..*",
        r"model\.layers\.(0|1\d|[2-9])\.self_attn\.[qv]_proj",
    ],
)
def test_patterns_as_adapters_have_them_match_what_re_matches(text):
    pattern, clock = compiled(text), Clock()
    for path in _PATHS:
        assert clock.matches(pattern.fullmatch, path) == bool(re.fullmatch(text, path))
        assert clock.matches(pattern.match, path) == bool(re.match(text, path))


def test_the_time_of_all_matches_of_a_file_is_bounded():
    pattern, clock = compiled("(a|a|aa)+$"), Clock()
    assert clock.left == 4.0
    clock.left = 0.1
    for _ in range(2):  # the second time nothing is left
        with pytest.raises(PatternError, match="take more than 4 s to match: use simpler ones"):
            clock.matches(pattern.match, "a" * 390 + "c")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a{40000}b{40000}", "its repeats come to more than 10,000 items"),
        ("((a{100}){100}){100}", "its repeats come to more than 10,000 items"),
        ("(" * 4_000 + "a" + ")" * 4_000, "recursion"),
        ("q{99999999999}", "its repeats come to more than"),
        ("(?i)q", "it has (?i"),
        ("(?#[)q{e<=1}(?#])", "it has (?#"),
        ("(q", "missing"),
        ("q" * 20_000, "expected at most 10,000 ASCII characters, got 20,000"),
        ("qü", "ASCII characters"),
        # Approximate matches, which `re` reads as text, and sets in sets, which it reads as characters.
        *((text, "it has {") for text in ("q{e<=1}", "(?:q_proj){s<=1,i<=1}", r"q[\]]{1<=e<=2}", "q{e}")),
        *(("[[:alpha:]]", "it has [["), ("[a||b]", "it has ||")),
        # What `re` does not have.
        *((r"\p{L}", "it has {"), ("(?|q|v)", "unknown extension"), ("(?e)q", "unknown extension")),
        ("q**", "multiple repeat"),
    ],
)
def test_what_regex_reads_differently_or_re_not_at_all_is_refused(text, reason):
    with pytest.raises(PatternError, match=re.escape(reason)):
        compiled(text)


def test_paths_beyond_ascii_are_not_matched():
    with pytest.raises(PatternError, match=r"'q\\xfc' has characters beyond ASCII"):
        Clock().matches(compiled(".*").match, "qü")
