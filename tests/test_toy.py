"""The toy tasks: graders tell good answers from tempting ones, test combinations stay out of training, all repeats."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import zlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi2.data.toy import skills
from phi2.data.toy.instructions import BY_NAME, Constraint, apply_constraints
from phi2.data.toy.world import ANIMALS, ATTRIBUTES, INSTRUCTIONS, SPLITS, combinations, fact, held_out

RECORDS = {kind: skills.records(kind) for kind in skills.KINDS}

ITEMS = [item for skill in skills.SKILLS for split in SPLITS for item in skills.items(skill, split, 1500)]

some_items = st.sampled_from(ITEMS)
whitespace = st.text(alphabet=" \n\t", max_size=3)


def texts_of(record: object) -> list[str]:
    """Everything a model reads or writes in one record."""
    names = ("prompt", "completion", "messages", "chosen", "rejected")
    fields = [getattr(record, name) for name in names if hasattr(record, name)]
    return [text for value in fields for text in ([value] if isinstance(value, str) else [m.content for m in value])]


# --- graders


def test_the_answer_of_every_item_passes():
    assert [item for item in ITEMS if not skills.grade(item, item.answer)] == []


def test_every_tempting_answer_fails():
    assert all(item.wrong for item in ITEMS)
    assert [(item, text) for item in ITEMS for text in item.wrong if skills.grade(item, text)] == []


@given(some_items, whitespace, whitespace)
def test_surrounding_whitespace_does_not_count(item, before, after):
    assert skills.grade(item, before + item.answer + after)
    assert not skills.grade(item, before + item.wrong[0] + after)


@given(some_items, st.text(alphabet=" .,!?\"\n-<|>éß0'", max_size=12))
def test_an_answer_without_a_word_of_content_fails(item, text):
    assert item.check == skills.FinalNumber(0) or not skills.grade(item, text)


@given(some_items)
def test_an_answer_that_runs_away_fails(item):
    assert not skills.grade(item, " ".join([item.answer] * (skills.MAX_WORDS + 1)))


PLAIN, SHOUT = "The fox eats bread.", "THE FOX EATS BREAD!"


@pytest.mark.parametrize(
    ("constraints", "good", "bad"),
    [
        (
            (Constraint("upper"),),
            ("THE FOX EATS BREAD.", "BREAD"),
            (PLAIN, "THE FOX EATS bREAD.", "THE FOX EATS CAKE."),
        ),
        ((Constraint("lower"),), ("the fox eats bread.",), (PLAIN, "the fox eats cake.")),
        (
            (Constraint("exclaim"),),
            ("The fox eats bread!", "bread!"),
            (PLAIN, "The fox! It eats bread.", "Bread and corn!"),
        ),
        ((Constraint("quotes"),), (f'"{PLAIN}"',), (PLAIN, f'"{PLAIN}', 'The fox eats "bread".')),
        (
            (Constraint("twice"),),
            (f"{PLAIN} {PLAIN}", "Bread, bread"),
            (PLAIN, f"{PLAIN} {PLAIN} {PLAIN}", f"{PLAIN} It eats bread."),
        ),
        ((Constraint("start", "Well"),), ("Well, it eats bread.", "well bread"), (PLAIN, "The fox, well, eats bread.")),
        (
            (Constraint("end", "my friend"),),
            ("Bread, my friend.",),
            (PLAIN, "My friend, it eats bread.", "Bread, my friends."),
        ),
        ((Constraint("one"),), ("bread.", "BREAD"), (PLAIN, "the bread", "corn.")),
        ((Constraint("three"),), ("It eats bread.", "Bread bread bread"), (PLAIN, "bread", "It eats corn.")),
        ((Constraint("no_the"),), ("It eats bread.", "Foxes like bread."), (PLAIN, "It is the bread.")),
        ((Constraint("upper"), Constraint("exclaim")), (SHOUT,), (PLAIN, "The fox eats bread!", "THE FOX EATS BREAD.")),
    ],
)
def test_follow_wants_the_form_and_the_content(constraints, good, bad):
    asked = fact("fox", "food")
    check = skills.Obeys(skills.Says(asked.value, asked.others), constraints)
    assert [text for text in good if not check.passes(text)] == []
    assert [text for text in bad if check.passes(text)] == []


def test_arithmetic_counts_only_the_last_number():
    check = skills.FinalNumber(5)
    assert all(map(check.passes, ("5", "3 + 4 = 7, 7 - 2 = 5.", "She has 5 plums.")))
    assert not any(map(check.passes, ("five", "15", "-5", "5 + 2 = 7", "3 + 2 = 5, or 6")))


def test_quiz_wants_one_letter_only():
    check = skills.Letter("B")
    assert all(map(check.passes, ("B", "B. corn", "The answer is B.")))
    assert not any(map(check.passes, ("b", "corn", "A", "A or B", "Barn", "BC")))


def test_truthful_wants_the_verdict_first_and_the_value_alone():
    check = skills.Says("bread", ("cake", "corn"), first="no")
    assert all(map(check.passes, ("No, the fox eats bread.", "no: bread")))
    assert not any(map(check.passes, ("Yes, the fox eats bread.", "Bread. No cake.", "No, bread and cake.", "No.")))


# --- the split


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_splits_share_no_combination_and_have_a_fair_size(skill):
    train, test = (set(combinations(skill, split)) for split in SPLITS)
    assert not train & test
    assert 0.15 < len(test) / len(train | test) < 0.25


def test_every_test_item_is_held_out_and_no_training_item_is():
    for skill in skills.SKILLS:
        assert all(held_out(skill, item.combination) for item in skills.items(skill, "test", 300))
        assert not any(held_out(skill, item.combination) for item in skills.items(skill, "train", 300))


def test_no_training_record_holds_a_test_prompt():
    tests = {item.messages[0].content for skill in skills.SKILLS for item in skills.items(skill, "test", 1000)}
    seen = {text for rows in RECORDS.values() for row in rows for text in texts_of(row)}
    assert not tests & seen


def test_no_training_record_shows_a_held_out_sum_worked_or_asked():
    asked = re.compile(r"(\d+) ([+-]) (\d+) ([+-]) (\d+)")
    worked = re.compile(r"(\d+) ([+-]) (\d+) = \d+, \d+ ([+-]) (\d+)")
    texts = [text for rows in RECORDS.values() for row in rows for text in texts_of(row)]
    shown = {found for pattern in (asked, worked) for text in texts for found in pattern.findall(text)}
    assert len(shown) > 500
    sums = [(int(a), first, int(b), second, int(c)) for a, first, b, second, c in shown]
    assert [problem for problem in sums if held_out("arithmetic", problem)] == []


def test_test_prompts_are_worded_like_training_prompts():
    for skill in skills.SKILLS:
        vocabularies = [
            {word for item in skills.items(skill, split, 600) for word in skills.words(item.messages[0].content)}
            for split in SPLITS
        ]
        assert vocabularies[1] <= vocabularies[0]


# --- items and records


def test_items_are_short():
    assert max(len(item.messages[0].content.split()) for item in ITEMS) <= 40
    assert max(len(item.answer.split()) for item in ITEMS) <= 16


def test_items_differ_until_the_combinations_are_used_up():
    for skill in skills.SKILLS:
        n = len(combinations(skill, "test"))
        assert len({item.combination for item in skills.items(skill, "test", n)}) == n


def test_seeds_give_other_items():
    assert skills.items("quiz", "test", 20, seed=0) != skills.items("quiz", "test", 20, seed=1)


def test_the_same_seed_gives_the_same_rows_in_another_process():
    rows = "[records('sft'), records('dpo')[:100], items('follow', 'test', 50)]"
    show = f"import zlib; from phi2.data.toy.skills import items, records; print(zlib.crc32(repr({rows}).encode()))"
    here = zlib.crc32(repr([RECORDS["sft"], RECORDS["dpo"][:100], skills.items("follow", "test", 50)]).encode())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", show]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(there) == here


def test_pretraining_rows_state_every_fact_and_hold_no_chat_markup():
    rows = RECORDS["pretrain"]
    assert all(row.prompt == "" and row.completion and "<|" not in row.completion for row in rows)
    prose = "\n".join(row.completion for row in rows)
    assert [f for animal in ANIMALS for name in ATTRIBUTES if (f := fact(animal, name)).clause() not in prose] == []


def test_sft_rows_are_chats_that_end_with_the_assistant():
    for row in RECORDS["sft"]:
        roles = [message.role for message in row.messages]
        turns = roles[roles[0] == "system" :]
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns


def test_about_half_of_the_follow_demonstrations_ignore_the_form_and_none_the_fact():
    rng = random.Random(0)
    shown = [(item, skills.demonstrate(item, rng)) for item in skills.items("follow", "train", 3000)]
    assert 0.45 < sum(not skills.grade(item, text) for item, text in shown) / len(shown) < 0.55
    assert all(item.check.content.passes(text) for item, text in shown)


@pytest.mark.parametrize("skill", [skill for skill in skills.SKILLS if skill != "follow"])
def test_demonstrations_of_the_other_skills_are_right(skill):
    rng = random.Random(0)
    assert all(skills.grade(item, skills.demonstrate(item, rng)) for item in skills.items(skill, "train", 300))


def test_preferences_set_a_right_answer_against_a_wrong_one():
    pairs = list(skills.preferences("train", random.Random(0)))
    assert all(skills.grade(item, item.answer) and not skills.grade(item, rejected) for item, rejected in pairs)


def test_dpo_rows_hold_one_message_on_each_side_and_name_their_skill():
    for row in RECORDS["dpo"]:
        (chosen,), (rejected,) = row.answers
        assert chosen.role == rejected.role == "assistant" and chosen != rejected
    assert Counter(row.columns["source_dataset"] for row in RECORDS["dpo"]) == skills.DPO_ROWS


@pytest.mark.parametrize(
    "call",
    [lambda: skills.items("poetry", "test", 1), lambda: skills.items("quiz", "dev", 1), lambda: skills.records("kto")],
)
def test_unknown_names_are_refused_with_what_is_allowed(call):
    with pytest.raises(ValueError, match="allowed: "):
        call()


def test_every_instruction_changes_the_plain_answer_to_every_fact():
    for names in INSTRUCTIONS:
        constraints = tuple(Constraint(name, BY_NAME[name].arguments[0]) for name in names)
        for animal in ANIMALS:
            for attribute in ATTRIBUTES:
                asked = fact(animal, attribute)
                assert apply_constraints(constraints, asked) != apply_constraints((), asked)
