"""A cache of what a reference says: shards that survive a kill, serve any run, and are never a wrong one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from phi2.checkpoints.weights import load_model
from phi2.data.encode import EncodedPreference
from phi2.data.records import PAIR, Origin
from phi2.training import reference_shards
from phi2.training.packing import TokenRow, row_of_answers
from phi2.training.reference import another_model
from phi2.training.reference_cache import Precomputed, Reference, precomputed
from phi2.training.reference_shards import Shards, shard_files, shard_of

NAME, CPU = "a" * 64, torch.device("cpu")


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> EncodedPreference:
    parts = [np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)]
    return EncodedPreference(parts[0], (parts[1], parts[2]), PAIR, Origin("rows.jsonl", 1), {})


PAIRS = [pair([1, 2], [3, 4, 5], [6]), pair([7], [8], [9, 10, 11, 12]), pair([1, 2, 3], [4], [5, 6])]


class Counted:
    """A reference that knows how many tokens and how many answers it was asked for in each pass."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.tokens: list[int] = []
        self.answers: list[int] = []

    def __call__(self, pairs: Sequence[EncodedPreference], row: TokenRow) -> Tensor:
        self.tokens.append(sum(each.tokens for each in pairs))
        self.answers.append(sum(len(each.answers) for each in pairs))
        return self.reference(pairs, row)


@pytest.fixture
def live(tiny_phi) -> Counted:
    return Counted(another_model(load_model(tiny_phi)))


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """No rows are scored again: what a reference is asked for is what was lacking."""
    monkeypatch.setattr("phi2.training.reference_cache.require_agreement", lambda *given: None)


@pytest.fixture
def cache(live, tmp_path) -> Callable[..., Precomputed]:
    """`precomputed` in a folder of the test's own: cache(pairs, tokens of a pass)."""

    def make(pairs: Sequence[EncodedPreference] = PAIRS, tokens: int = 12, reference: Reference = live, **others):
        return precomputed(reference, NAME, pairs, tokens, others.pop("folder", tmp_path), CPU, **others)

    return make


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / NAME[:16]


def ask(reference: Reference, pairs: Sequence[EncodedPreference] = PAIRS) -> Tensor:
    return reference(pairs, row_of_answers(pairs))


def interrupted(passes: int, reference: Reference) -> Reference:
    """Stops as Ctrl-C does, after so many passes."""
    left = iter(range(passes))

    def ask(pairs: Sequence[EncodedPreference], row: TokenRow) -> Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return reference(pairs, row)

    return ask


# ---- what it serves ----


def test_precomputed_log_probabilities_are_the_live_ones(live, cache):
    reference = cache()
    torch.testing.assert_close(ask(reference), ask(live), rtol=0, atol=1e-5)
    assert ask(reference).dtype == torch.float32


def test_they_are_served_for_any_pairs_in_any_order(live, cache):
    reference, chosen = cache(), [PAIRS[2], PAIRS[0], PAIRS[2]]
    torch.testing.assert_close(ask(reference, chosen), ask(live, chosen), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_each_pair_is_scored_once_for_all_runs(live, cache):
    cache(PAIRS[:2])
    cache(PAIRS[:2], tokens=6)
    assert live.answers == [4]
    reference = cache()  # one pair more
    assert torch.equal(ask(cache()), ask(reference))
    assert live.answers == [4, 2]


@pytest.mark.usefixtures("unchecked")
def test_swapped_pairs_lists_and_answers_alone_share_what_is_known(live, cache):
    one, other = [1, 2, 3], [4, 5]
    cache([pair([7, 8], one, other)])
    prompt, *answers = (np.array(ids, dtype=np.int32) for ids in ([7, 8], other, one, [6]))
    alone = EncodedPreference(prompt, (answers[0],), (1.0,), Origin("rows.jsonl", 1), {})
    ranked = EncodedPreference(prompt, tuple(answers), (3.0, 2.0, 1.0), Origin("rows.jsonl", 2), {})
    reference = cache([pair([7, 8], other, one), alone, ranked])
    assert live.answers == [2, 1]  # the pair at first, then the third answer of the list alone
    torch.testing.assert_close(ask(reference, [ranked]), ask(live, [ranked]), rtol=0, atol=1e-5)


def test_an_answer_that_stands_in_many_rows_is_scored_once(live, cache):
    cache([PAIRS[0], PAIRS[0], pair([1, 2], [6], [3, 4, 5])])
    assert live.answers == [2]


def test_a_pass_holds_so_many_tokens_and_the_longest_rows_go_first(live, cache):
    cache([pair([i], [i + 1] * length, [3]) for i, length in enumerate((1, 7, 2, 20, 3))], tokens=14)
    assert live.tokens == [22, 9 + 5, 4 + 3]


def test_another_reference_has_a_folder_of_its_own(live, tmp_path):
    for name in ("a" * 64, "b" * 64):
        precomputed(live, name, PAIRS, 12, tmp_path, CPU)
    assert sum(live.answers) == 2 * 6 and len(list(tmp_path.iterdir())) == 2


def test_what_another_fit_scored_is_written_and_not_scored(live, cache, tmp_path):
    first = cache(PAIRS[:2])
    live.answers.clear()
    second = cache(folder=tmp_path / "other", known=first.shards)
    assert live.answers == [2] and not second.complete
    assert cache(folder=tmp_path / "another", known=second.shards).complete
    assert torch.equal(ask(second, PAIRS[:2]), ask(first, PAIRS[:2]))


# ---- shards ----


def test_shards_are_written_while_rows_are_scored(cache, folder, monkeypatch):
    monkeypatch.setattr(reference_shards, "TOKENS", 1)
    reference = cache(tokens=6)
    assert len(shard_files(folder)) == 3
    monkeypatch.undo()
    assert torch.equal(ask(cache()), ask(reference))


def test_after_some_time_a_shard_is_written_however_small(cache, folder, monkeypatch):
    monkeypatch.setattr(reference_shards, "SECONDS", 0.0)
    cache()
    assert len(shard_files(folder)) == 2


def test_a_person_can_read_what_is_in_the_folder(cache, folder, monkeypatch):
    monkeypatch.setattr(reference_shards, "TOKENS", 1)
    cache(dtype=torch.bfloat16, about={"reference": "adapters_off", "model": "microsoft/phi-2"})
    told = json.loads((folder / "reference.json").read_text())
    assert (told["reference"], told["model"]) == ("adapters_off", "microsoft/phi-2")
    assert (told["dtype"], told["fingerprint"]) == ("torch.bfloat16", NAME)
    assert (told["answers"], told["tokens"]) == (6, sum(row.target_tokens for row in PAIRS))
    assert [*told["shards"]] == [path.name for path in shard_files(folder)]
    assert [each["answers"] for each in told["shards"].values()] == [4, 2]


def test_what_was_scored_before_an_interruption_is_kept(live, cache):
    with pytest.raises(KeyboardInterrupt):
        cache(reference=interrupted(1, live))
    reference = cache()
    assert sum(live.answers) == 6 + 2 * 2  # and the two rows that are known again
    torch.testing.assert_close(ask(reference), ask(live), rtol=0, atol=1e-5)


def test_an_interruption_before_the_first_score_leaves_no_shard(live, cache, folder):
    with pytest.raises(KeyboardInterrupt):
        cache(reference=interrupted(0, live))
    assert shard_files(folder) == []


KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_reference_cache import CPU, NAME, PAIRS
from phi2.training import reference_shards
from phi2.training.reference_cache import precomputed

reference_shards.TOKENS = 1

def reference(pairs, row):
    if len(reference_shards.shard_files(Path({folder!r}) / NAME[:16])) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.full(row.targets.shape, -1.0)

precomputed(reference, NAME, PAIRS, 6, Path({folder!r}), CPU)
"""


def test_a_kill_loses_no_more_than_what_was_no_shard_yet(cache, folder, tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(shard_files(folder)) == 2
    constant = Counted(lambda pairs, row: torch.full(row.targets.shape, -1.0))
    assert ask(cache(reference=constant)).eq(-1).all()
    assert constant.answers == [4, 2]  # two rows again, to see that they agree, and the third


def test_side_by_side_two_writers_spoil_nothing(live, cache, folder, monkeypatch):
    """Each scores all of it and writes shards of single rows, in step with the other."""
    monkeypatch.setattr(reference_shards, "TOKENS", 1)
    monkeypatch.setattr(os, "getpid", iter(range(10**6)).__next__)  # two processes have two ids
    with ThreadPoolExecutor(2) as pool:
        references = [*pool.map(lambda _: cache(tokens=6), range(2))]
    assert torch.equal(ask(references[0]), ask(cache()))
    told = json.loads((folder / "reference.json").read_text())
    assert [*told["shards"]] == [path.name for path in shard_files(folder)]


def test_of_an_answer_that_is_there_twice_the_earlier_shard_counts(cache, folder, shift_logps):
    expected = ask(cache())
    (first,) = shard_files(folder)
    later = first.with_name(f"9{first.name}")
    later.write_bytes(first.read_bytes())
    shift_logps(later, 0.5)
    assert torch.equal(ask(cache()), expected)
    assert len(np.unique(Shards(folder, NAME).keys)) == 6


# ---- never a wrong one ----


def test_some_rows_are_scored_again_before_a_cache_is_used(live, cache):
    rows = [pair([i], [i + 1], [i + 2, i + 3]) for i in range(1, 40)]
    cache(rows)
    live.answers.clear()
    cache(rows)
    assert sum(live.answers) == 2 * 4


@pytest.mark.parametrize(("dtype", "by"), [(torch.float32, 0.01), (torch.float16, 0.05), (torch.bfloat16, 0.2)])
def test_a_cache_that_the_reference_contradicts_is_named_and_left_as_it_is(cache, folder, shift_logps, dtype, by):
    cache(PAIRS[:2], dtype=dtype)
    (path,) = shard_files(folder)
    shift_logps(path, by)
    before = {each: each.read_bytes() for each in folder.iterdir()}
    with pytest.raises(ValueError) as caught:
        cache(dtype=dtype)
    assert f"{path}: not what the reference says now, by up to {by:.2g} nats per token (allowed" in str(caught.value)
    assert f"delete {folder} to score it again" in str(caught.value) and "\n" not in str(caught.value)
    assert {each: each.read_bytes() for each in folder.iterdir()} == before


def test_a_difference_that_rounding_explains_is_none(cache, folder, shift_logps):
    cache(dtype=torch.bfloat16)
    shift_logps(shard_files(folder)[0], 0.05)
    assert cache(dtype=torch.bfloat16).complete


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def rename_tensors(path: Path) -> None:
    safetensors.torch.save_file({"other": torch.zeros(3)}, path)


def drop_a_key(path: Path) -> None:
    stored = safetensors.torch.load_file(path)
    path.write_bytes(shard_of({**stored, "keys": stored["keys"][1:].clone()}, NAME))


def drop_a_token(path: Path) -> None:
    stored = safetensors.torch.load_file(path)
    path.write_bytes(shard_of({**stored, "logps": stored["logps"][1:].clone()}, NAME))


def change_a_number(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_shard_of_an_earlier_version_has_no_crc_and_is_read(cache, folder):
    cache()
    (path,) = shard_files(folder)
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), {"fingerprint": NAME}))
    assert cache().complete


@pytest.mark.parametrize("damage", [truncate, rename_tensors, drop_a_key, drop_a_token, change_a_number])
def test_a_damaged_shard_is_named_in_one_line_with_the_remedy(cache, folder, damage: Callable[[Path], None]):
    cache()
    (path,) = shard_files(folder)
    damage(path)
    with pytest.raises(ValueError, match="safetensors: not a shard of a reference cache .*; delete it to") as caught:
        cache()
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_shard_of_another_reference_is_refused(live, cache, folder, tmp_path):
    cache()
    folder.rename(tmp_path / ("b" * 16))
    with pytest.raises(ValueError, match=f"of the reference {NAME}, not of {'b' * 64}; it does not belong"):
        precomputed(live, "b" * 64, PAIRS, 12, tmp_path, CPU)


# ---- a folder that cannot be written ----


def test_on_a_full_disk_the_shards_that_are_there_stay(cache, folder, full_disk):
    cache(PAIRS[:1])
    before = {path: path.read_bytes() for path in shard_files(folder)}
    with full_disk(len(*before.values())), pytest.raises(OSError) as caught:
        cache([pair([i], [i] * 9, [3]) for i in range(1, 30)])
    assert f"{folder}: log-probabilities of the reference cannot be written (File too large)" in str(caught.value)
    assert "make room, or give another reference_cache" in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in shard_files(folder)} == before


def test_a_place_that_cannot_be_written_is_told_before_anything_is_scored(live, cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written .Not a directory.; the shards"):
        cache(folder=tmp_path / "file")
    assert live.answers == []


def test_a_complete_cache_is_read_where_nothing_can_be_written(cache, full_disk):
    expected = ask(cache())
    with full_disk(0):
        assert torch.equal(ask(cache()), expected)
