"""Encoding against trl's dataset preparation on real rows: same ids, same targets, the same rows kept.

Known differences, none of which these rows show: trl puts a second end token behind text that ends in one and white
space, and keeps pairs whose answers are the same after truncation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi2.data.encode import EncodeConfig, EncodedPreference, EncodedSequence, encode_records
from phi2.data.formats import parse_row
from phi2.data.records import PAIR, Chat, Message, Origin, Plain, Preference, Record
from phi2.tokenizer import CHATML_TEMPLATE, Tokenizer

pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.real_data

MARKED_CHATML = (  # ChatML that tells transformers which part of the text each assistant turn is
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS_ONLY = (  # marks the words and not the end of a turn
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLING = (  # ChatML with tools and calls of them
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] or '' }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")


@pytest.fixture(scope="module")
def alpaca(shared: Path) -> Rows:
    return _first_rows(shared / "data" / "sft" / "alpaca_600.jsonl")


@pytest.fixture(scope="module")
def gsm8k(shared: Path) -> Rows:
    return _first_rows(shared / "data" / "sft" / "gsm8k_train_1500.jsonl")


@pytest.fixture(scope="module")
def pairs(shared: Path) -> list[Preference]:
    rows = _first_rows(shared / "data" / "preference" / "dpo_en_200.jsonl")
    return [parse_row(row, Origin("dpo_en", number)) for number, row in enumerate(rows, start=1)]


@pytest.fixture(scope="module")
def prepare(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rows]:
    """Rows as the named trainer, given these options, would train on them."""
    import trl

    theirs = transformers.AutoTokenizer.from_pretrained(shared / "tokenizer" / "phi-2-instruct")
    config = transformers.PhiConfig(
        vocab_size=len(theirs), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model, reference = transformers.PhiForCausalLM(config), transformers.PhiForCausalLM(config)

    def prepare(trainer: str, rows: Rows, template: str = CHATML_TEMPLATE, **options: Any) -> Rows:
        theirs.chat_template = template
        args = getattr(trl, f"{trainer}Config")(
            output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, report_to=[], bf16=False, **options
        )
        extra = {"ref_model": reference} if trainer == "DPO" else {}
        dataset = datasets.Dataset.from_list(rows)
        trainer = getattr(trl, f"{trainer}Trainer")
        return trainer(
            model, args=args, train_dataset=dataset, processing_class=theirs, **extra
        ).train_dataset.to_list()

    return prepare


def _first_rows(path: Path, count: int = 60) -> Rows:
    with path.open() as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def _dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _encode(records: list[Record], tokenizer: Tokenizer, kind: str, **options: Any) -> list:
    return encode_records(records, tokenizer, EncodeConfig(**options), kind)[0]


def _labels(row: EncodedSequence) -> list[int]:
    return [token_id if target else -100 for token_id, target in zip(row.ids.tolist(), row.mask.tolist(), strict=True)]


def _assert_same_sequences(ours: list[EncodedSequence], theirs: Rows) -> None:
    assert [row.ids.tolist() for row in ours] == [row["input_ids"] for row in theirs]
    assert [_labels(row) for row in ours] == [row["labels"] for row in theirs]


def _assert_same_pairs(ours: list[EncodedPreference], theirs: Rows, max_length: int) -> None:
    """trl prepares whole answers and cuts them when it makes a batch; the cut is repeated here."""
    assert [row.prompt.tolist() for row in ours] == [row["prompt_ids"] for row in theirs]
    for name in ("chosen", "rejected"):
        cut = [row[f"{name}_ids"][: max_length - len(row["prompt_ids"])] for row in theirs]
        assert [getattr(row, name).tolist() for row in ours] == cut


@pytest.mark.parametrize("max_length", [1024, 100])
def test_chat_rows_are_trl_conversational_prompt_completion_rows(tokenizer, alpaca, prepare, max_length):
    chats = [parse_row(row, Origin("alpaca", number)) for number, row in enumerate(alpaca, start=1)]
    rows = [{"prompt": _dicts(c.messages[:-1]), "completion": _dicts(c.messages[-1:])} for c in chats]
    theirs = prepare("SFT", rows, max_length=max_length)
    _assert_same_sequences(_encode(chats, tokenizer, "supervised", max_length=max_length), theirs)


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_plain_rows_are_trl_text_prompt_completion_rows(tokenizer, gsm8k, prepare, separator):
    rows = [{"prompt": row["question"] + separator, "completion": row["answer"]} for row in gsm8k]
    plain = [Plain(row["prompt"], row["completion"], Origin("gsm8k", n)) for n, row in enumerate(rows, start=1)]
    _assert_same_sequences(_encode(plain, tokenizer, "supervised"), prepare("SFT", rows))


def test_templated_text_that_ends_in_an_end_token_is_as_in_trl(tokenizer, gsm8k, prepare):
    chats = [parse_row(row, Origin("gsm8k", number)) for number, row in enumerate(gsm8k, start=1)]
    texts = [tokenizer.render(_dicts(chat.messages)).rstrip() for chat in chats]
    plain = [Plain("", text, Origin("gsm8k", number)) for number, text in enumerate(texts, start=1)]
    theirs = prepare("SFT", [{"text": text} for text in texts])
    _assert_same_sequences(_encode(plain, tokenizer, "supervised", train_on="all"), theirs)


def test_all_tokens_of_chats_are_trl_messages_rows(tokenizer, gsm8k, prepare):
    chats = [parse_row(row, Origin("gsm8k", number)) for number, row in enumerate(gsm8k, start=1)]
    theirs = prepare("SFT", [{"messages": _dicts(chat.messages)} for chat in chats])
    _assert_same_sequences(_encode(chats, tokenizer, "supervised", train_on="all"), theirs)


def test_assistant_turns_of_long_chats_are_trl_assistant_only_loss(tokenizer, pairs, prepare):
    chats = [Chat(pair.prompt + pair.answers[0], pair.origin) for pair in pairs]
    assert max(sum(message.role == "assistant" for message in chat.messages) for chat in chats) > 2
    rows = [{"messages": _dicts(chat.messages)} for chat in chats]
    theirs = prepare("SFT", rows, template=MARKED_CHATML, assistant_only_loss=True)
    _assert_same_sequences(_encode(chats, tokenizer, "supervised", train_on="assistant"), theirs)


@pytest.mark.parametrize("template", [MARKED_CHATML, WORDS_ONLY], ids=["words and end", "words only"])
def test_what_a_template_marks_is_what_trl_learns(shared, pairs, prepare, template):
    tokenizer = Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")
    tokenizer.chat_template = template
    chats = [Chat(pair.prompt + pair.answers[0], pair.origin) for pair in pairs]
    theirs = prepare("SFT", [{"messages": _dicts(c.messages)} for c in chats], template, assistant_only_loss=True)
    _assert_same_sequences(_encode(chats, tokenizer, "supervised", train_on="assistant"), theirs)


def test_tools_and_their_calls_are_written_as_trl_writes_them(shared, prepare):
    tokenizer = Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")
    tokenizer.chat_template = CALLING
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich & <Bern>"}}}
    tool = {"type": "function", "function": {"name": "weather", "description": 'It\'s "fine"', "parameters": {}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "sun"},
        {"role": "assistant", "content": "Sunny."},
    ]
    rows = [{"messages": messages, "tools": json.dumps([tool])}, {"messages": messages[:2], "tools": "[]"}]
    chats = [parse_row(row, Origin("tools", number)) for number, row in enumerate(rows, start=1)]
    _assert_same_sequences(_encode(chats, tokenizer, "supervised", train_on="all"), prepare("SFT", rows, CALLING))


def test_tools_of_a_pair_are_written_as_trl_writes_them(shared, prepare):
    tokenizer = Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")
    tokenizer.chat_template = CALLING
    answers = [{"role": "assistant", "content": text} for text in ("Sunny.", "I cannot know.")]
    row = {"prompt": [{"role": "user", "content": "Weather?"}], "tools": json.dumps([{"name": "weather"}])}
    rows = [
        {**row, "chosen": answers[:1], "rejected": answers[1:]},
        {**row, "chosen": answers[1:], "rejected": answers[:1]},
    ]
    pairs = [parse_row(row, Origin("tools", number)) for number, row in enumerate(rows, start=1)]
    theirs = prepare("DPO", rows, CALLING, max_length=1024)
    _assert_same_pairs(_encode(pairs, tokenizer, "preference"), theirs, 1024)


@pytest.mark.parametrize("max_length", [1024, 256])
def test_message_pairs_are_trl_conversational_pairs(tokenizer, pairs, prepare, max_length):
    names = "prompt", "chosen", "rejected"
    rows = [dict(zip(names, map(_dicts, (pair.prompt, *pair.answers)), strict=True)) for pair in pairs]
    theirs = prepare("DPO", rows, max_length=max_length)
    ours = _encode(pairs, tokenizer, "preference", max_length=max_length)
    assert max_length == 1024 or len(ours) < len(pairs)  # the short limit does drop rows
    _assert_same_pairs(ours, theirs, max_length)


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_text_pairs_are_trl_text_pairs(tokenizer, alpaca, prepare, end):
    answers = [row["output"] + end for row in alpaca]
    rejected = answers[1:] + answers[:1]
    rows = [
        {"prompt": row["instruction"] + "\n", "chosen": good, "rejected": bad}
        for row, good, bad in zip(alpaca, answers, rejected, strict=True)
    ]
    pairs = [
        Preference(row["prompt"], (row["chosen"], row["rejected"]), PAIR, Origin("alpaca", number), {})
        for number, row in enumerate(rows, start=1)
    ]
    _assert_same_pairs(_encode(pairs, tokenizer, "preference"), prepare("DPO", rows, max_length=1024), 1024)


def test_pairs_whose_answer_begins_inside_a_token_are_cut_where_trl_cuts_them(tokenizer, alpaca, prepare):
    words = [row["output"].split(" ") for row in alpaca]
    rows = [{"prompt": "Say: " + w[0][:2], "chosen": w[0][2:] + " one", "rejected": " " + w[-1]} for w in words]
    pairs = [
        Preference(row["prompt"], (row["chosen"], row["rejected"]), PAIR, Origin("alpaca", number), {})
        for number, row in enumerate(rows, start=1)
    ]
    ours, audit = encode_records(pairs, tokenizer, EncodeConfig(), "preference")
    assert audit.flags["boundary_merged"] > 20
    _assert_same_pairs(ours, prepare("DPO", rows, max_length=1024), 1024)
