"""Texts that tokenizers and streams find hard, as hypothesis strategies."""

from hypothesis import strategies as st

HARD = (
    "def f(x):\n\treturn x[1:-1]  # 100%\n",
    "    if not (a_b == 'c'):\r\n\r\n        pass",
    "3.14159 1,000,000 0x1F 2024-12-31",
    "x  1   22\n 333",
    "١٢٣ ² ½ Ⅻ ३",
    "我能吞下玻璃而不伤身体。 한국어 日本語",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇸🇪 😀",
    "e\u0301 Å A\u030a ﬁ",  # not in composed form
    "don't I'LL we'Ve 'tis",
    "naïve Zürich Ångström",
    "<|im_start|>user\n<think></think><|im_end|>",
    "<|im_start |>|> <|im_end",
    " \t \u00a0\u2003\n\n\n   ",
    "\x00\x04\x1d\x7f",
    "\ufffd",
    "",
)

texts = st.lists(st.one_of(st.sampled_from(HARD), st.text(max_size=12)), max_size=5).map("".join)
