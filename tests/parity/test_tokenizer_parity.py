"""The tokenizer against transformers' AutoTokenizer on real text: same ids, same text, same rendered conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from phi2.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.real_data

CODE = [
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n",
    "class A:\n\tdef f(self):\n\t\tfor i in range(3):\n\t\t\t\tprint(i)\n",
    "\t" * 12 + "x" + " " * 70 + "y   \n\n\n  \t  z \t",
    " leading, trailing , and ' quoted ' .  Do n't clean this !",
    "naïve café 漢字 😀👩‍👧 \u00a0 \u3000 <|endoftext|>tail<|im_end|>",
]


class Twins(NamedTuple):
    ours: Tokenizer
    theirs: Any


def twins(folder: Path) -> Twins:
    return Twins(Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module", params=["phi-2", "phi-2-instruct"])
def pair(request: pytest.FixtureRequest, shared: Path) -> Twins:
    return twins(shared / "tokenizer" / request.param)


@pytest.fixture(scope="module")
def conversations(shared: Path) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in (shared / "data/sft/alpaca_600.jsonl").read_text().splitlines()]
    return [
        [
            {"role": "system", "content": "You are a careful assistant.\n"},
            {"role": "user", "content": f"{row['instruction']}\n{row['input']}"},
            {"role": "assistant", "content": row["output"]},
        ]
        for row in rows
    ]


@pytest.fixture(scope="module")
def texts(shared: Path, conversations: list) -> list[str]:
    chatml = Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")
    return CODE + [chatml.render(conversation) for conversation in conversations]


def test_ids_are_equal(pair, texts):
    assert [pair.ours.encode(text) for text in texts] == pair.theirs(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("skip", [True, False])
def test_decoded_text_is_equal(pair, texts, skip):
    ids = [pair.ours.encode(text) for text in texts]
    expected = [pair.theirs.decode(row, skip_special_tokens=skip, clean_up_tokenization_spaces=False) for row in ids]
    assert [pair.ours.decode(row, skip_special_tokens=skip) for row in ids] == expected


def test_special_ids_and_length_are_equal(pair):
    ours, theirs = pair
    assert (ours.eos_id, ours.bos_id, len(ours)) == (theirs.eos_token_id, theirs.bos_token_id, len(theirs))


@pytest.mark.parametrize("prompt", [True, False])
def test_rendered_conversations_are_equal(shared, conversations, prompt):
    ours, theirs = twins(shared / "tokenizer" / "phi-2-instruct")
    expected = theirs.apply_chat_template(conversations, tokenize=False, add_generation_prompt=prompt)
    assert [ours.render(c, add_generation_prompt=prompt) for c in conversations] == expected


@pytest.mark.parametrize(
    "template",
    [
        "{%- for m in messages %}\n  {%- if loop.last %}\n{{ bos_token }}{% endif %} {{ m.role | trim }}\n{% endfor %}",
        "{% if tools is not none %}T{% endif %}{% for m in messages %}{{ m.role ~ eos_token }}{% break %}{% endfor %}",
        "{% for m in messages %}{% generation %}\n  {{ m.content }}\n{% endgeneration %}{% endfor %}",
    ],
)
def test_other_templates_render_equally(shared, conversations, template):
    ours, theirs = twins(shared / "tokenizer" / "phi-2-instruct")
    ours.chat_template = template
    expected = theirs.apply_chat_template(conversations[:3], tokenize=False, chat_template=template)
    assert [ours.render(c) for c in conversations[:3]] == expected


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("told", [{"pad_token": "!"}, {"pad_token": {"content": "!"}, "eos_token": "a"}, {}])
def test_a_special_tokens_map_decides_as_in_transformers(shared, tmp_path, described, told):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shared / "tokenizer/phi-2" / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    decoder = config.pop("added_tokens_decoder", {})
    config |= {"eos_token": "<|endoftext|>", "pad_token": "#"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | ({"added_tokens_decoder": decoder} if described else {}))
    )
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(told))
    ours, theirs = twins(tmp_path)
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_added_tokens_that_only_the_config_describes_are_added_as_in_transformers(shared, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((shared / "tokenizer/phi-2/tokenizer.json").read_bytes())
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    described = {"50295": {"content": "<|im_start|>", **plain}, "50296": {"content": "<|im_end|>", **plain}}
    described["50297"] = {"content": "<tool>", **plain, "normalized": True, "special": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": described,
        "eos_token": "<|im_end|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = twins(tmp_path)
    text = "<|im_start|>user\na <tool> b<|im_end|>"
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.eos_id, len(ours)) == (theirs.eos_token_id, len(theirs)) == (50296, 50298)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Twins:
    """Phi-2's tokenizer after `with_chatml`, and what transformers reads from the folder it was saved in."""
    folder = tmp_path_factory.mktemp("saved")
    Tokenizer.from_folder(shared / "tokenizer" / "phi-2").with_chatml().save(folder)
    return twins(folder)


def test_a_saved_folder_gives_transformers_equal_ids(saved, texts):
    assert [saved.ours.encode(text) for text in texts] == saved.theirs(texts, add_special_tokens=False)["input_ids"]


def test_a_saved_folder_gives_transformers_the_same_conversations(saved, conversations):
    expected = saved.theirs.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    assert [saved.ours.render(c, add_generation_prompt=True) for c in conversations] == expected


def test_a_saved_folder_gives_transformers_the_same_special_ids(saved):
    theirs = saved.theirs
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (50295, 50296, 50296)


def test_with_chatml_equals_the_published_chatml_tokenizer(saved, shared, texts):
    published = Tokenizer.from_folder(shared / "tokenizer" / "phi-2-instruct")
    assert [saved.ours.encode(text) for text in texts] == [published.encode(text) for text in texts]
