"""What the files beside a vocabulary decide: special tokens, what ends a text, and the chat template of a run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from phi2.tokenizer import CHATML_TEMPLATE, Tokenizer

OWN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
END_OF_TEXT, END, PAD = 256, 257, 258


def backend(*added: str) -> tokenizers.Tokenizer:
    """256 bytes, <|endoftext|> (256), <end> (257), <pad> (258), and what is `added`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<end>", "<pad>", *added])
    return made


def write(folder: Path, template: str | None = None, **files: Any) -> Path:
    """A folder of tokenizer.json and of one JSON file for each keyword."""
    folder.mkdir(exist_ok=True)
    backend().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def one_line(match: str):
    return pytest.raises(ValueError, match=rf"\A[^\n]*{match}[^\n]*\Z")


# special_tokens_map.json


def test_the_map_tells_what_the_config_leaves_out(tmp_path):
    told = {"eos_token": "<end>", "pad_token": {"content": "<pad>", "lstrip": False}, "bos_token": None}
    tokenizer = Tokenizer.from_folder(write(tmp_path, special_tokens_map=told))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (END, PAD, None)


@pytest.mark.parametrize(("decoder", "pad"), [({}, PAD), ({"added_tokens_decoder": {}}, END)])
def test_the_map_wins_over_a_config_that_does_not_describe_its_tokens(tmp_path, decoder, pad):
    config = {"pad_token": "<end>", **decoder}
    folder = write(tmp_path, tokenizer_config=config, special_tokens_map={"pad_token": "<pad>", "eos_token": "<end>"})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (pad, END)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token": "<nope>"}', '{"pad_token": 3}', '{"eos_token": {"content": 1}}']
)
def test_a_damaged_map_is_named(tmp_path, content):
    with one_line("special_tokens_map.json: "):
        Tokenizer.from_folder(write(tmp_path, special_tokens_map=content))


@pytest.mark.parametrize("described", [{"999": {"content": "<new>"}}, {"257": {"content": "<pad>"}}])
def test_an_added_token_with_another_id_is_refused(tmp_path, described):
    with one_line(r"tokenizer_config.json: '<(new|pad)>' has id \d+ here, and \d+ in tokenizer.json"):
        Tokenizer.from_folder(write(tmp_path, tokenizer_config={"added_tokens_decoder": described}))


@pytest.mark.parametrize(
    "described", [{"x": {"content": "a"}}, {"257": "<end>"}, {"257": {"contents": "<end>"}}, {"1": []}, [3]]
)
def test_damaged_added_tokens_are_named(tmp_path, described):
    with one_line(
        "tokenizer_config.json: added_tokens_decoder must hold the fields of an added token for each id, got"
    ):
        Tokenizer.from_folder(write(tmp_path, tokenizer_config={"added_tokens_decoder": described}))


def test_saving_over_an_older_checkpoint_keeps_what_was_read(tmp_path):
    folder = write(tmp_path, special_tokens_map={"eos_token": "<end>", "pad_token": "<pad>"})
    base = Tokenizer.from_folder(folder)
    base.with_chatml().save(folder)
    saved = Tokenizer.from_folder(folder)
    assert saved.decode([saved.eos_id, saved.pad_id], False) == "<|im_end|><|im_end|>"
    assert {END_OF_TEXT, END} < saved.stop_ids


def test_templates_know_every_named_special_token(tmp_path):
    config = {
        "unk_token": "<pad>",
        "mask_token": {"content": "<end>"},
        "tool_token": "<tool>",
        "extra_special_tokens": {"image_token": "<image>"},
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "add_bos_token": True,
    }
    source = "{{ unk_token ~ mask_token ~ tool_token ~ image_token }}{{ additional_special_tokens }}{{ add_bos_token }}"
    tokenizer = Tokenizer.from_folder(write(tmp_path, source, tokenizer_config=config))
    assert tokenizer.render([]) == "<pad><end><tool><image>['<a>', '<b>']"


def test_variables_win_over_special_tokens():
    assert Tokenizer(backend(), {}, "{{ eos_token }}").render([], eos_token="x") == "x"


# What ends a text


@pytest.mark.parametrize("name", ["generation_config", "config"])
@pytest.mark.parametrize("value", [END, [END, PAD], [], None])
def test_a_checkpoints_ends_stop(tmp_path, name, value):
    listed = value if isinstance(value, list) else [] if value is None else [value]
    tokenizer = Tokenizer.from_folder(write(tmp_path, **{name: {"eos_token_id": value}}))
    assert tokenizer.stop_ids == {END_OF_TEXT, *listed}


def test_the_ends_of_both_files_stop(tmp_path):
    folder = write(tmp_path, generation_config={"eos_token_id": END}, config={"eos_token_id": [PAD]})
    assert Tokenizer.from_folder(folder).stop_ids == {END_OF_TEXT, END, PAD}


@pytest.mark.parametrize("name", ["generation_config", "config"])
@pytest.mark.parametrize("value", ["257", "<end>", -1, True, 2.0, [257, "x"], [[257]], {}, 259, [0, 10**30]])
def test_an_end_that_is_no_id_is_refused_with_its_file(tmp_path, name, value):
    folder = write(tmp_path, **{name: {"eos_token_id": value}})
    with one_line(rf"{tmp_path / name}\.json: eos_token_id must be an id from 0 to 258, or a list of them, got "):
        Tokenizer.from_folder(folder)


@settings(deadline=None, max_examples=50)
@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4))
def test_an_end_is_read_or_refused(tmp_path_factory, value):
    folder = write(tmp_path_factory.getbasetemp() / "any", generation_config={"eos_token_id": value})
    values = value if isinstance(value, list) else [] if value is None else [value]
    if all(type(v) is int and 0 <= v <= 258 for v in values):
        assert Tokenizer.from_folder(folder).stop_ids == {END_OF_TEXT, *values}
    else:
        with one_line("generation_config.json: eos_token_id must be"):
            Tokenizer.from_folder(folder)


def test_rows_without_a_token_are_within_the_vocabulary(tmp_path):
    folder = write(tmp_path, config={"vocab_size": 300, "eos_token_id": 299})
    assert Tokenizer.from_folder(folder).stop_ids == {END_OF_TEXT, 299}


@pytest.mark.parametrize("change", [Tokenizer.with_chatml, lambda t: t.with_stop_ids([PAD])])
def test_ends_survive_changes_and_saving(tmp_path, change):
    tokenizer = change(Tokenizer.from_folder(write(tmp_path / "base", generation_config={"eos_token_id": [END]})))
    tokenizer.save(tmp_path / "adapter")
    saved = Tokenizer.from_folder(tmp_path / "adapter")
    assert END in saved.stop_ids and saved.stop_ids == tokenizer.stop_ids


def test_saving_keeps_the_other_generation_settings(tmp_path):
    folder = write(tmp_path, generation_config={"eos_token_id": 1, "temperature": 0.7})
    Tokenizer(backend(), {"eos_token": "<end>"}).save(folder)
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": [END_OF_TEXT, END],
        "temperature": 0.7,
    }


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (OWN, {END}),
        ("{% for m in messages %}{{ m.content }} {{ pad_token }}{% endfor %}", {PAD}),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", set()),
        ("{% for m in messages %}<end>{{ m.content }}{% endfor %}", set()),
        ("{{ raise_exception('no') }}", set()),
        ("{% if %}", set()),
        ("{{ messages | length }}", set()),
    ],
)
def test_the_token_behind_the_assistants_words_stops(template, ends):
    assert Tokenizer(backend(), {"pad_token": "<pad>"}, template).stop_ids == {END_OF_TEXT, *ends}


# The chat template of a run


def own() -> Tokenizer:
    return Tokenizer(backend(), {}, OWN)


def test_auto_keeps_the_models_own_template():
    chosen = own().with_chat_template("auto")
    assert (chosen.chat_template, chosen.template_origin) == (OWN, "the model's own")


def test_auto_gives_chatml_to_a_base_model():
    chosen = Tokenizer(backend(), {}).with_chat_template("auto")
    assert (chosen.chat_template, chosen.prompt_style) == (CHATML_TEMPLATE, "chatml")
    assert chosen.template_origin == "ChatML, given to a base model without one"


def test_chatml_replaces_by_name_only():
    chosen = own().with_chat_template("chatml")
    assert (chosen.chat_template, chosen.eos_id) == (CHATML_TEMPLATE, chosen.token_id("<|im_end|>"))
    assert chosen.template_origin == "ChatML, in place of the model's own"


def test_chatml_of_a_chatml_model_changes_nothing():
    tokenizer = Tokenizer(backend(), {}).with_chatml()
    assert tokenizer.with_chat_template("chatml") is tokenizer


def test_none_leaves_a_base_model_as_it_is():
    tokenizer = Tokenizer(backend(), {})
    assert tokenizer.with_chat_template("none") is tokenizer


def test_none_does_not_take_a_template_away():
    with one_line("chat_template none is for a tokenizer without one"):
        own().with_chat_template("none")


def test_a_file_is_used_and_its_turn_end_stops(tmp_path):
    (tmp_path / "mine.jinja").write_text(OWN)
    chosen = Tokenizer(backend(), {}).with_chatml().with_chat_template(str(tmp_path / "mine.jinja"))
    assert chosen.render(TURNS) == "[user] Hi\n[assistant] Yo<end>\n"
    assert END in chosen.stop_ids and chosen.prompt_style == "chat"
    assert chosen.template_origin == f"{tmp_path / 'mine.jinja'}, in place of the model's own"


def test_a_file_that_writes_an_unknown_token_is_said(tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ '<|user|>' + m.content }}<|endoftext|>{% endfor %}")
    with pytest.warns(
        UserWarning, match=r"mine.jinja writes '<\|user\|>', which is no token [^\n]* as 8 tokens of text"
    ):
        Tokenizer(backend(), {}).with_chat_template(str(tmp_path / "mine.jinja"))


def test_a_file_of_known_tokens_warns_of_nothing(tmp_path):
    (tmp_path / "mine.jinja").write_text(CHATML_TEMPLATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer(backend("<|im_start|>", "<|im_end|>"), {}).with_chat_template(str(tmp_path / "mine.jinja"))


@pytest.mark.parametrize(("content", "match"), [("{% if %}", "chat template: "), (" \n", "an empty chat template")])
def test_a_file_that_is_no_template_is_named(tmp_path, content, match):
    (tmp_path / "bad.jinja").write_text(content)
    with one_line(rf"bad\.jinja: {match}"):
        own().with_chat_template(str(tmp_path / "bad.jinja"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jinja"):
        own().with_chat_template(str(tmp_path / "nowhere.jinja"))


@pytest.mark.parametrize("choice", ["ChatML", "", "alpaca", "template.txt"])
def test_another_choice_lists_what_is_allowed(choice):
    with one_line("chat_template must be auto, chatml, none or the path of a .jinja file, got "):
        own().with_chat_template(choice)


# Prompt styles


def test_a_model_with_its_own_template_speaks_it():
    tokenizer = own()
    assert tokenizer.prompt_style == "chat"
    assert tokenizer.render_prompt("2+2?", "chat") == "[user] 2+2?\n[assistant] "


def test_chatml_tokens_do_not_make_another_template_chatml():
    tokenizer = Tokenizer(backend("<|im_start|>", "<|im_end|>"), {}, OWN)
    assert tokenizer.prompt_style == "chat"
    with one_line("prompt style 'chatml' is not this tokenizer's"):
        tokenizer.render_prompt("2+2?", "chatml")


def test_a_saved_template_is_the_models_own(tmp_path):
    Tokenizer(backend(), {}).with_chat_template("auto").save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).template_origin == "the model's own"


def test_an_added_token_that_is_not_special_ends_a_turn_too():
    made = backend()
    made.add_tokens([AddedToken("<stop>")])
    tokenizer = Tokenizer(made, {}, OWN.replace("<end>", "<stop>"))
    assert tokenizer.token_id("<stop>") in tokenizer.stop_ids
