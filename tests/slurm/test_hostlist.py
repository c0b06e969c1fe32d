# SPDX-License-Identifier: Apache-2.0
"""Host lists: what Slurm writes, and what nobody should."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_kv_cache.slurm.hostlist import compress, expand

PREFIXES = st.text("abc-.", min_size=1, max_size=4)
NAMES = st.lists(
    st.one_of(
        PREFIXES,
        st.builds(lambda prefix, number: f"{prefix}{number}", PREFIXES, st.integers(0, 1200)),
        st.builds(
            lambda prefix, number, width: f"{prefix}{number:0{width}}",
            PREFIXES,
            st.integers(0, 120),
            st.integers(1, 4),
        ),
        st.builds("{}{}x{}".format, PREFIXES, st.integers(0, 9), st.integers(0, 99)),
    )
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("p0", ["p0"]),
        ("p[0-2,5],d1", ["p0", "p1", "p2", "p5", "d1"]),
        ("p[08-10]", ["p08", "p09", "p10"]),
        ("p[8-10]", ["p8", "p9", "p10"]),
        ("p[098-100]", ["p098", "p099", "p100"]),
        ("r[0-1]n[1,3]", ["r0n1", "r0n3", "r1n1", "r1n3"]),
        ("gpu[3]-ib.site.org", ["gpu3-ib.site.org"]),
        ("login", ["login"]),
        ("[1-2]", ["1", "2"]),
        ("b,a", ["b", "a"]),
    ],
)
def test_expand(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["p0", "p1", "p2", "p5", "d1"], "p[0-2,5],d1"),
        (["d1", "p0", "d2"], "d1,p0,d2"),
        (["p08", "p09", "p10", "p11"], "p[08-11]"),
        (["p9", "p10", "p011"], "p[9-10,011]"),
        (["p2", "p1"], "p[2,1]"),
        (["head", "head"], "head,head"),
    ],
)
def test_compress(names: list[str], text: str) -> None:
    assert compress(names) == text


@given(NAMES)
def test_what_is_compressed_expands_to_the_same(names: list[str]) -> None:
    assert expand(compress(names)) == names


@given(st.text("p0123[],- ", max_size=12))
def test_any_text_is_a_list_or_an_error(text: str) -> None:
    with suppress(ValueError):
        names = expand(text)
        assert expand(compress(names)) == names


@pytest.mark.parametrize(
    ("text", "spot", "words"),
    [
        ("p[0-2", 2, "[ without ]"),
        ("p0]", 3, "] without ["),
        ("p[0-[1]]", 2, "a bracket within a bracket"),
        ("p[0-2,x]", 7, "'x' is neither a number nor a range"),
        ("p[]", 3, "'' is neither"),
        ("p[5-2]", 3, "the range 5-2 runs backwards"),
        ("p0,,p1", 4, "a name is missing before the comma"),
        ("p0,", 4, "a name is missing after the comma"),
        (",p0", 1, "a name is missing before the comma"),
        ("p0, p1", 4, "a blank"),
        ("p[0-99999999999]", 3, "more than 65536 names"),
        ("a[0-999]b[0-999]", 17, "more than 65536 names"),
    ],
)
def test_what_is_wrong_is_told_with_its_spot(text: str, spot: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"character {spot}: ") as caught:
        expand(text)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["", "p[0]", "a,b", "a b", "a\n"])
def test_no_host_name(name: str) -> None:
    with pytest.raises(ValueError, match="is no host name"):
        compress([name])
