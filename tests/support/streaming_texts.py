"""Texts in which tokenizers have something to decide."""

from hypothesis import strategies as st

ODD = [
    "🙂",
    "👩\u200d👩\u200d👧",
    "🇩🇪",
    "e\u0301",
    "e\u0323\u0301",
    "שלום",
    "مرحبا",
    "日本語。",
    "각",
    "\u202b",
    "ﬁ",
    "'s",
    "12345",
]
PIECES = st.one_of(
    st.sampled_from(
        [*ODD, " ", "  ", "\n", "\n\n", "don", "'", "t", ".", "...", "x", "1", "\u0301", "\u0323", "Hello"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)
