"""The tokenizer: encoding, special tokens, chat templates, streaming, and the files it reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from phi2.tokenizer import CHATML_TEMPLATE, Tokenizer

HI_YO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
REPLACEMENT = "\ufffd"


def byte_backend() -> tokenizers.Tokenizer:
    """A vocabulary of the 256 bytes (ids 0 to 255) and <|endoftext|> (256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


BYTES = Tokenizer(byte_backend(), {})


def write_folder(folder: Path, config: dict | str | None = None, template: str | None = None) -> Path:
    byte_backend().save(str(folder / "tokenizer.json"))
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "tokenizer_config.json").write_text(text)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def one_line_error(match: str):
    """Expects a ValueError whose whole message is one line that contains `match`."""
    return pytest.raises(ValueError, match=rf"\A[^\n]*{match}[^\n]*\Z")


@pytest.fixture(scope="session")
def phi2_tokenizer(shared: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared / "tokenizer" / "phi-2")


@pytest.fixture(scope="session")
def instruct_tokenizer(shared: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")


# Encoding and decoding


@settings(deadline=None)
@given(st.text())
def test_decode_inverts_encode(text):
    assert BYTES.decode(BYTES.encode(text), skip_special_tokens=False) == text


def test_special_tokens_written_in_the_text_become_one_id():
    assert BYTES.encode("<|endoftext|>") == [256]


def test_special_tokens_are_left_out_of_decoded_text_unless_asked_for():
    ids = BYTES.encode("a<|endoftext|>b")
    assert (BYTES.decode(ids), BYTES.decode(ids, skip_special_tokens=False)) == ("ab", "a<|endoftext|>b")


def test_lone_surrogates_are_refused():
    with one_line_error("lone surrogates"):
        BYTES.encode("a\ud800b")


def test_decode_takes_arrays():
    assert BYTES.decode(np.array(BYTES.encode("héllo"), dtype=np.int32)) == "héllo"


def test_decode_refuses_a_label_mask():
    with one_line_error("-100"):
        BYTES.decode([1, -100])


def test_length_is_one_past_the_last_id():
    assert (len(BYTES), BYTES.decode([len(BYTES) - 1], skip_special_tokens=False)) == (257, "<|endoftext|>")


def test_truncation_and_padding_saved_in_the_file_are_ignored(tmp_path):
    backend = byte_backend()
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_folder(tmp_path).encode("abcdef")) == 6


@pytest.mark.real_data
def test_runs_of_spaces_are_split_off_before_the_bpe(phi2_tokenizer):
    assert phi2_tokenizer.encode("a   b") == [64, 50285, 65]


@pytest.mark.real_data
def test_the_longest_run_of_spaces_comes_first(phi2_tokenizer):
    assert phi2_tokenizer.encode(" " * 40) == [50257, 50279]


@pytest.mark.real_data
def test_decode_cleans_up_no_spaces(phi2_tokenizer):
    assert phi2_tokenizer.decode(phi2_tokenizer.encode("wait , what ?  do n't .")) == "wait , what ?  do n't ."


# Special tokens


@pytest.mark.real_data
def test_phi2_ends_and_pads_with_endoftext(phi2_tokenizer):
    t = phi2_tokenizer
    assert (t.eos_id, t.bos_id, t.pad_id, t.stop_ids, len(t)) == (50256, 50256, 50256, {50256}, 50295)


@pytest.mark.real_data
def test_phi2_instruct_stops_at_both_ends(instruct_tokenizer):
    t = instruct_tokenizer
    assert (t.eos_id, t.bos_id, t.pad_id, t.stop_ids, len(t)) == (50296, 50295, 50296, {50256, 50296}, 50297)


def test_special_tokens_may_be_written_as_added_tokens():
    assert Tokenizer(byte_backend(), {"bos_token": {"content": "<|endoftext|>", "special": True}}).bos_id == 256


def test_the_configured_pad_token_wins_over_the_end():
    assert Tokenizer(byte_backend(), {"pad_token": "!"}).pad_id == BYTES.token_id("!")


def test_a_special_token_outside_the_vocabulary_is_refused():
    with one_line_error("pad_token '<pad>' is not in the vocabulary"):
        Tokenizer(byte_backend(), {"pad_token": "<pad>"})


def test_a_special_token_that_is_not_text_is_refused():
    with one_line_error("eos_token must be text"):
        Tokenizer(byte_backend(), {"eos_token": 50256})


@pytest.mark.real_data
def test_with_chatml_takes_the_next_free_ids(phi2_tokenizer):
    t = phi2_tokenizer.with_chatml()
    assert (t.bos_id, t.eos_id, t.pad_id, len(t), t.prompt_style) == (50295, 50296, 50296, 50297, "chatml")


@pytest.mark.real_data
def test_with_chatml_leaves_the_original_alone(phi2_tokenizer):
    phi2_tokenizer.with_chatml()
    assert phi2_tokenizer.token_id("<|im_end|>") is None


@pytest.mark.real_data
def test_with_chatml_of_a_chatml_tokenizer_changes_no_id(instruct_tokenizer):
    assert (instruct_tokenizer.with_chatml().eos_id, len(instruct_tokenizer.with_chatml())) == (50296, 50297)


# Chat templates and prompts


@pytest.mark.real_data
def test_a_conversation_has_the_ids_the_published_model_was_trained_on(instruct_tokenizer):
    expected = [50295, 7220, 198, 17250, 50296, 198, 50295, 562, 10167, 198, 38101, 50296, 198]
    assert instruct_tokenizer.encode(instruct_tokenizer.render(HI_YO)) == expected


def test_the_generation_prompt_opens_the_assistant_turn():
    text = BYTES.with_chatml().render(HI_YO[:1], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_chatml_tokens_without_a_template_mean_chatml():
    backend = byte_backend()
    backend.add_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    assert Tokenizer(backend, {}).chat_template == CHATML_TEMPLATE


def test_templates_know_the_special_tokens():
    assert Tokenizer(byte_backend(), {}, "{{ eos_token }}").render([]) == "<|endoftext|>"


def test_templates_may_break_out_of_loops():
    template = "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}"
    assert Tokenizer(byte_backend(), {}, template).render(HI_YO) == "Hi"


def test_generation_tags_leave_their_content():
    template = "{% for m in messages %}{% generation %}{{ m.content }};{% endgeneration %}{% endfor %}"
    assert Tokenizer(byte_backend(), {}, template).render(HI_YO) == "Hi;Yo;"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% if %}", "chat template: Expected an expression"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[5].content + 1 }}", "chat template"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_failing_template_is_one_line(template, match):
    with one_line_error(match):
        Tokenizer(byte_backend(), {}, template).render(HI_YO)


@pytest.mark.parametrize("message", ["hi", {"role": "user"}, {"role": "user", "content": None}, {"content": "Hi"}])
def test_a_malformed_message_is_named_by_its_number(message):
    with one_line_error("message 2 must be"):
        BYTES.with_chatml().render([HI_YO[0], message])


def test_rendering_without_a_template_says_what_to_do():
    with one_line_error("with_chatml"):
        BYTES.render(HI_YO)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("raw", "2+2?"),
        ("instruct", "Instruct: 2+2?\nOutput:"),
        ("chatml", "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_prompt_styles(style, expected):
    assert BYTES.with_chatml().render_prompt("2+2?", style) == expected


def test_an_unknown_prompt_style_lists_the_known_ones():
    with one_line_error("raw, instruct, chatml, chat, got 'alpaca'"):
        BYTES.render_prompt("2+2?", "alpaca")


# Streaming


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [*(decoder.step(token_id) for token_id in ids), decoder.flush()]


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), max_size=40))
def test_streamed_bytes_join_to_the_decoded_text(ids):
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids)


@pytest.mark.real_data
@settings(deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 51199), st.integers(94, 260)), max_size=40))
def test_streamed_random_ids_join_to_the_decoded_text(instruct_tokenizer, ids):
    assert "".join(streamed(instruct_tokenizer, ids)) == instruct_tokenizer.decode(ids)


@pytest.mark.real_data
@settings(deadline=None)
@given(text=st.text(st.sampled_from("a b\t\n.,é漢字仮名😀👩\u200d👧🏽\ufffd\u0301")))
def test_streamed_text_holds_no_broken_characters(instruct_tokenizer, text):
    ids = instruct_tokenizer.encode(text)
    assert "".join(streamed(instruct_tokenizer, ids)) == text


def test_a_character_comes_out_when_its_last_byte_does():
    assert streamed(BYTES, BYTES.encode("é!")) == ["", "é", "!", ""]


def test_an_unfinished_character_is_flushed_as_the_replacement_character():
    assert streamed(BYTES, BYTES.encode("a😀")[:3]) == ["a", "", "", REPLACEMENT]


def test_a_flushed_decoder_starts_afresh():
    decoder = BYTES.stream()
    decoder.step(BYTES.encode("é")[0])
    decoder.flush()
    assert decoder.step(BYTES.encode("z")[0]) == "z"


# Files


def test_a_missing_tokenizer_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"\Ano tokenizer.json in {tmp_path}[^\n]*\Z"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"model": 3}', b"[]"])
def test_a_damaged_tokenizer_names_the_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with one_line_error("tokenizer.json: not a readable tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"eos_token": "<|nope|>"}', '{"chat_template": 3}', '{"chat_template": [3]}']
)
def test_a_damaged_config_names_the_file(tmp_path, config):
    with one_line_error("tokenizer_config.json: "):
        Tokenizer.from_folder(write_folder(tmp_path, config))


def test_the_jinja_file_wins_over_the_config(tmp_path):
    folder = write_folder(tmp_path, {"chat_template": "config"}, template="file")
    assert Tokenizer.from_folder(folder).render([]) == "file"


def test_a_list_of_templates_gives_its_default(tmp_path):
    named = [{"name": "rag", "template": "documents"}, {"name": "default", "template": "plain"}]
    with pytest.warns(UserWarning, match=r"only 'default' is used, not rag\Z"):
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path, {"chat_template": named}))
    assert tokenizer.render([]) == "plain"


def test_a_list_of_templates_without_a_default_is_refused(tmp_path):
    with one_line_error("one named 'default'"):
        Tokenizer.from_folder(write_folder(tmp_path, {"chat_template": [{"name": "rag", "template": "x"}]}))


def test_what_is_saved_loads_as_the_same_tokenizer(tmp_path):
    saved = BYTES.with_chatml()
    saved.save(tmp_path / "new")
    loaded = Tokenizer.from_folder(tmp_path / "new")
    assert (loaded.eos_id, loaded.bos_id, loaded.chat_template) == (saved.eos_id, saved.bos_id, saved.chat_template)


def test_saving_without_a_template_leaves_no_old_one_behind(tmp_path):
    BYTES.with_chatml().save(tmp_path)
    BYTES.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).chat_template is None


def test_saving_leaves_only_finished_files(tmp_path):
    BYTES.with_chatml().save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
