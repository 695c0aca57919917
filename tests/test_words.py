"""Ids looked up word by word are those of the whole text, for every text, or the text is given whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from phi2.text import words
from phi2.text.words import WordEncoder

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "t"), ("!", "!"), ("Ċ", "Ċ"), ("1", "2")]


def backend(*added: AddedToken, cut=None, normalizer=None) -> Tokenizer:
    """Bytes, some merges across letters, spaces and signs, and runs of spaces as added tokens, as Phi-2 has them."""
    vocabulary = {token: i for i, token in enumerate([*ALPHABET, *("".join(merge) for merge in MERGES)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    made.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)] + list(added))
    return made


def ids(vocabulary: Tokenizer, text: str) -> list[int]:
    return vocabulary.encode(text, add_special_tokens=False).ids


PLAIN = backend()
PIECES = [
    "the",
    " the",
    "'s",
    "12",
    "!!",
    "_",
    " ",
    "  ",
    "     ",
    "\n\n",
    "\t",
    "\r",
    "\x1c",
    "\x85",
    "\xa0",
    "\u3000",
]
PIECES += ["é", "中", "\u200b", "<|im_end|>", "<|im_start|>", "<|im"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=12).map("".join)


@settings(deadline=None)
@given(st.lists(TEXTS, max_size=4))
def test_ids_are_those_of_the_whole_text(texts):
    found = WordEncoder(PLAIN).encode([[text] for text in texts])
    assert [array.tolist() for (array,) in found] == [ids(PLAIN, text) for text in texts]


@settings(deadline=None)
@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_texts_that_begin_alike_have_the_ids_of_each_alone(prompt, answers):
    group = [prompt, *(prompt + answer for answer in answers)]
    (found,) = WordEncoder(PLAIN).encode([group])
    assert [array.tolist() for array in found] == [ids(PLAIN, text) for text in group]


def test_every_white_space_and_control_character_is_cut_as_the_vocabulary_does():
    characters = [chr(i) for i in range(0x3100) if chr(i).isspace() or not chr(i).isprintable()]
    texts = [f"a{c}b {c}!{c}{c} {c}\n1{c}" for c in characters]
    encoder = WordEncoder(PLAIN)
    assert encoder.by_words
    found = encoder.encode([[text] for text in texts])
    assert [array.tolist() for (array,) in found] == [ids(PLAIN, text) for text in texts]


OTHER_RULES = {
    "a space in front of a text": backend(cut=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "other words": backend(cut=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "another cut": backend(cut=pre_tokenizers.Metaspace()),
    "a normalizer": backend(normalizer=normalizers.Replace("a b", "c")),
    "a token that takes space": backend(AddedToken("<mask>", lstrip=True)),
    "a token that must be a word": backend(AddedToken("the!", single_word=True)),
    "a token with a space inside": backend(AddedToken("a b")),
}


@pytest.mark.parametrize("rule", OTHER_RULES)
def test_a_vocabulary_of_other_rules_is_given_whole_texts(rule):
    vocabulary, text = OTHER_RULES[rule], "a b  <mask> the! a the"
    encoder = WordEncoder(vocabulary)
    assert not encoder.by_words
    assert encoder.encode([[text, text + " b"]])[0][0].tolist() == ids(vocabulary, text)


def test_words_that_are_not_remembered_are_encoded_all_the_same(monkeypatch):
    monkeypatch.setattr(words, "KNOWN_WORDS", 1)
    monkeypatch.setattr(words, "LONGEST_WORD", 3)
    encoder, text = WordEncoder(PLAIN), "the the12 <|im_end|> b the"
    for _ in range(2):
        assert encoder.encode([[text]])[0][0].tolist() == ids(PLAIN, text)
    assert 0 < len(encoder.known) <= 4


@pytest.mark.real_data
def test_ids_of_real_rows_are_those_of_the_whole_text(shared):
    from phi2.tokenizer import Tokenizer

    real = Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")
    lines = (shared / "data" / "sft" / "gpteacher_roleplay_800.jsonl").read_text().splitlines()[:200]
    texts = [f"<|im_start|>user\n{line}<|im_end|>\n    {line[::-1]}" for line in lines]
    assert real.words.by_words
    found = real.words.encode([[text] for text in texts])
    assert [array.tolist() for (array,) in found] == [real.encode(text) for text in texts]
