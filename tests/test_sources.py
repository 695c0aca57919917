"""Files, folders, hub layouts and named sources as they are on disk."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from phi2.data import files
from phi2.data.audit import Audit
from phi2.data.columns import IGNORED, NOT_READ
from phi2.data.files import read_rows
from phi2.data.records import Chat, Origin, Plain, Preference
from phi2.data.sources import SOURCES, DataSpec, load_records, require_ignored

TEXTS = ["one", "zwei\u2028drei", "four"]
ROWS = [{"text": text} for text in TEXTS]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def completions(data) -> list[str]:
    return [record.completion for record in load_records(data, "supervised").records]


def numbered(count: int) -> list[dict]:
    return [{"text": str(i)} for i in range(count)]


# --- files


def write_any(path: Path) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    contents = {"rows.jsonl": lines, "rows.json": json.dumps(ROWS, indent=2).encode(), "lines.json": lines}
    contents |= {"bom.jsonl": b"\xef\xbb\xbf" + lines, "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode()}
    contents |= {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
    if path.name in contents:
        path.write_bytes(contents[path.name])
        return path
    return write_parquet(path, ROWS)


FILES = ["rows.jsonl", "rows.json", "lines.json", "bom.jsonl", "bom.json", "rows.jsonl.gz", "rows.json.gz", "r.parquet"]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows_and_origins(tmp_path, name):
    path = write_any(tmp_path / name)
    assert list(read_rows(path, name)) == [(Origin(name, i), row) for i, row in enumerate(ROWS, start=1)]


def test_a_row_is_named_by_its_line_also_after_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}')
    assert [origin.row for origin, _ in read_rows(path)] == [1, 4]


array_rows = st.lists(
    st.dictionaries(st.text(max_size=3), st.text(max_size=20) | st.floats(allow_nan=False)), max_size=6
)


@given(array_rows, st.integers(1, 50), st.sampled_from([None, 0, 3]))
def test_an_array_read_in_pieces_of_any_size_is_the_array(tmp_path_factory, rows, chunk, indent):
    path = tmp_path_factory.mktemp("array") / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8", newline="\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        assert [row for _, row in read_rows(path)] == rows


BROKEN = {
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "bad.jsonl row 2: invalid JSON"),
    "utf.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "utf.jsonl row 2: invalid UTF-8"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl row 1: invalid JSON"),
    "nested.jsonl": (b'{"a":' * 100_000, "nested.jsonl row 1: invalid JSON"),
    "digits.jsonl": (b'{"a": ' + b"1" * 5000 + b"}", "digits.jsonl row 1: invalid JSON"),
    "list.jsonl": (b'{"text": "a"}\n["b"]\n', "list.jsonl row 2: a row must be an object, got list"),
    "bad.json": (b'[{"text": "a"}, {"text" "b"}]', "bad.json row 2: invalid JSON"),
    "cut.json": (b'[{"text": "a"}, {"text": "b', "cut.json row 2: invalid JSON"),
    "open.json": (b'[{"text": "a"},', "open.json row 2: invalid JSON"),
    "comma.json": (b'[{"text": "a"} {"text": "b"}]', "comma.json row 2: invalid JSON"),
    "utf.json": (b'[{"text": "a"}, {"text": "\xff"}]', "utf.json row 2: invalid UTF-8"),
    "number.json": (b"[1, 2]", "number.json row 1: invalid JSON"),
    "twice.json": (b'[{"text": "a"}]\n[{"text": "b"}]', "twice.json: text after the end of the array"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 9)[:-9], "cut.jsonl.gz: damaged or truncated gzip"),
    "no.jsonl.gz": (b'{"text": "a"}\n', "no.jsonl.gz: damaged or truncated gzip"),
    "no.parquet": (b"PAR1 and no more", "no.parquet: damaged or truncated parquet file after row 0"),
    "empty.jsonl": (b"", "empty.jsonl: no usable row among 0: it is empty"),
    "empty.json": (b"[]", "empty.json: no usable row among 0: it is empty"),
    "rows.csv": (b"text\na\n", "must be one of .jsonl, .json, .jsonl.gz, .json.gz, .parquet, got 'rows.csv'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_with_the_file_and_the_row(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, message = BROKEN[name]
    Path(name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_records(name, "supervised")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_parquet_file_cut_short_is_a_value_error(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", numbered(3000))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="rows.parquet: damaged or truncated parquet"):
        list(read_rows(path))


@settings(max_examples=150)
@given(st.sampled_from(["x.jsonl", "x.json", "x.jsonl.gz", "x.parquet"]), st.binary(max_size=60), st.binary(max_size=8))
def test_any_bytes_give_rows_or_a_value_error(tmp_path_factory, name, content, start):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(start + b'[{"text": "' + content)
    try:
        load_records(str(path), "supervised")
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)


def test_a_missing_file_is_not_found():
    with pytest.raises(FileNotFoundError, match="missing.jsonl: no such file"):
        load_records("missing.jsonl", "supervised")


def test_a_name_that_is_nothing_lists_the_named_sources():
    with pytest.raises(FileNotFoundError, match="ultrafeedback_binarized.*toy-dpo"):
        load_records("ultrafeedbak", "preference")


# --- folders and splits


def test_a_folder_is_its_files_in_order(tmp_path):
    write_lines(tmp_path / "b.jsonl", numbered(2))
    write_parquet(tmp_path / "a.parquet", [{"text": "first"}])
    (tmp_path / "README.md").write_text("not data")
    assert completions(str(tmp_path)) == ["first", "0", "1"]


@pytest.mark.parametrize(
    "layout",
    ["default/{}/0000.parquet", "default/partial-{}/0000.parquet", "data/{}-00000-of-00001-0a1b.parquet", "{}.parquet"],
)
def test_a_folder_that_names_splits_gives_the_split_asked_for(tmp_path, layout):
    for split in ("train", "test", "train_prefs"):
        write_parquet(tmp_path / layout.format(split), [{"text": split}])
    assert completions(str(tmp_path)) == ["train"]
    assert completions(DataSpec(str(tmp_path), split="train_prefs")) == ["train_prefs"]
    with pytest.raises(ValueError, match="no files of split 'dev'.*train"):
        load_records(DataSpec(str(tmp_path), split="dev"), "supervised")


def test_several_configurations_are_not_mixed(tmp_path):
    for config in ("main", "socratic"):
        write_parquet(tmp_path / config / "train" / "0000.parquet", [{"text": config}])
    with pytest.raises(ValueError, match=r"several configurations \(main, socratic\): name one, as .*/main"):
        load_records(str(tmp_path), "supervised")
    assert completions(f"{tmp_path}/main") == ["main"]


def test_a_split_of_a_single_file_or_of_rows_is_an_error(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    for source in (str(path), ROWS):
        with pytest.raises(ValueError, match="split 'test' is for folders and data sets"):
            load_records(DataSpec(source, split="test"), "supervised")


# --- the hub: a cache as huggingface_hub leaves it, read offline


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def snapshot(hub_id: str, revision: str) -> Path:
        folder, commit = tmp_path / f"datasets--{hub_id.replace('/', '--')}", "0123456789" * 4
        ref = folder / "refs" / revision
        ref.parent.mkdir(parents=True)
        ref.write_text(commit)
        return folder / "snapshots" / commit

    return snapshot


def test_a_hub_data_set_is_read_from_its_parquet_conversion(hub_cache):
    folder = hub_cache("owner/name", "refs/convert/parquet")
    write_parquet(folder / "default" / "train" / "0000.parquet", [{"text": "a"}])
    write_parquet(folder / "default" / "test" / "0000.parquet", [{"text": "b"}])
    (record,) = load_records("owner/name", "supervised").records
    assert record == Plain("", "a", Origin("owner/name/default/train/0000.parquet", 1))
    assert completions({"source": "owner/name", "split": "test"}) == ["b"]


def test_a_hub_data_set_without_a_conversion_is_read_from_its_own_files(hub_cache):
    write_lines(hub_cache("owner/name", "main") / "openhermes2_5.jsonl", [{"text": "a"}])
    assert completions("owner/name") == ["a"]


def test_a_configuration_is_the_third_part_of_a_hub_id(hub_cache):
    folder = hub_cache("openai/gsm8k", "refs/convert/parquet")
    for config in ("main", "socratic"):
        write_parquet(folder / config / "train" / "0000.parquet", [{"text": config}])
    assert completions("openai/gsm8k/socratic") == ["socratic"]


def test_a_hub_data_set_out_of_reach_is_one_line(hub_cache):
    with pytest.raises(ValueError, match="nobody/nothing: .*hub") as caught:
        load_records("nobody/nothing", "supervised")
    assert "\n" not in str(caught.value)


# --- named sources


def turn_pair(ask: str, chosen: str, rejected: str) -> dict:
    user = {"role": "user", "content": ask}
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": ask} | {k: [user, {"role": "assistant", "content": text}] for k, text in answers.items()}


def orca(status="unchanged", score=9.0, in_gsm8k_train=False) -> dict:
    texts = {"system": "", "input": "q", "chosen": "a", "rejected": "b"}
    return texts | {"status": status, "chosen_score": score, "in_gsm8k_train": in_gsm8k_train}


HUB_ROWS = {  # name -> rows as the hub has them, how many stay, what becomes of the others
    "OpenHermes-2.5": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "q", "weight": None},
                    {"from": "gpt", "value": a, "weight": None},
                ]
            }
            for a in ("a", "")
        ],
        1,
        {"empty-answer": 1},
    ),
    "OpenHermes-SLM-384k": (
        [
            {
                "messages": turn_pair("q", "a", "b")["chosen"],
                "messages_templated": "x",
                "phi_token_count": 9,
                "length": 2,
            }
        ],
        1,
        {},
    ),
    "ultrafeedback_binarized": (
        [
            turn_pair("q", "a", "b") | {"score_chosen": 8.0, "score_rejected": 5.0, "messages": []},
            turn_pair("q", "a", "b") | {"score_chosen": 5.0, "score_rejected": 5.0, "messages": []},
            turn_pair("q", "a", "") | {"score_chosen": 8.0, "score_rejected": 5.0, "messages": []},
        ],
        1,
        {"tie": 1, "empty-answer": 1},
    ),
    "distilabel-intel-orca-dpo-pairs": (
        [orca(), orca(status="tie"), orca(score=7.5), orca(score=None), orca(in_gsm8k_train=True), orca(score=8.0)],
        2,
        {"tie": 1, "low-score": 2, "in-gsm8k": 1},
    ),
    "distilabel-math-preference-dpo": (
        [
            {"instruction": "q", "chosen_response": "a", "chosen_rating": 9.0, "rejected_response": "b"},
            {"instruction": "q", "chosen_response": "a", "chosen_rating": 9.0, "rejected_response": "a"},
        ],
        1,
        {"same-answers": 1},
    ),
    "ultrafeedback-orca-math-dpo": (
        [
            {"prompt": "<|im_start|>assistant\n", "chosen": f"{a}<|im_end|>", "rejected": "b<|im_end|>"}
            for a in ("a", "")
        ],
        1,
        {"empty-answer": 1},
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_named_source_keeps_and_drops_what_its_filter_says(hub_cache, name):
    rows, kept, dropped = HUB_ROWS[name]
    folder = hub_cache(SOURCES[name].hub_id, "refs/convert/parquet")
    write_parquet(folder / "default" / SOURCES[name].splits[0] / "0000.parquet", rows)
    kind = "supervised" if name.startswith("OpenHermes") else "preference"
    loaded = load_records(name, kind)
    assert len(loaded.records) == kept
    assert {rule: some.rows for rule, some in loaded.dropped.dropped.items()} == dropped


def test_a_named_source_knows_its_splits(hub_cache):
    with pytest.raises(ValueError, match="split must be one of train_prefs, test_prefs, got 'train'"):
        load_records({"source": "ultrafeedback_binarized", "split": "train"}, "preference")


def test_a_named_source_of_another_kind_is_an_error():
    for name in ("OpenHermes-2.5", "toy-sft"):
        with pytest.raises(ValueError, match=f"{name} holds supervised rows, and preference rows are needed"):
            load_records(name, "preference")


@pytest.mark.parametrize(
    ("name", "kind", "type_"), [("toy-sft", "supervised", Chat), ("toy-dpo", "preference", Preference)]
)
def test_toy_sources_take_rows_and_splits_like_any_other(name, kind, type_):
    train = load_records({"source": name, "rows": 5}, kind).records
    test = load_records({"source": name, "rows": 5, "split": "test", "shuffle_seed": 1}, kind).records
    assert {type(record) for record in train + test} == {type_} and len(train) == len(test) == 5
    assert not {record.origin.file for record in train} & {record.origin.file for record in test}


# --- real rows


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("file", "kind", "type_", "count"),
    [
        ("sft/alpaca_600.jsonl", "supervised", Chat, 600),
        ("sft/gpteacher_roleplay_800.jsonl", "supervised", Chat, 800),
        ("sft/gsm8k_train_1500.jsonl", "supervised", Chat, 1500),
        ("preference/dpo_en_200.jsonl", "preference", Preference, 200),
        ("preference/kto_en_200.jsonl", "preference", Preference, 200),
    ],
)
def test_every_row_of_the_real_files_becomes_a_record(shared, file, kind, type_, count):
    loaded = load_records(str(shared / "data" / file), kind)
    assert loaded.dropped.dropped == {}
    assert [type(record) for record in loaded.records] == [type_] * count


# --- columns that are not read


def test_columns_that_are_not_read_are_counted_over_the_rows_that_have_them():
    rows = [{"text": "a", "id": 1, "dataset": "x"}, {"text": "b", "id": 2, "dataset": None}, {"text": "", "id": 3}]
    counted = load_records(rows, "supervised").dropped.columns
    assert {status: dict(names) for status, names in counted.items() if names} == {NOT_READ: {"id": 2, "dataset": 1}}


def test_columns_that_a_filter_reads_are_not_counted_as_unread():
    rows = [{"text": "a", "phi_token_count": 3, "source_dataset": "x", "id": 1}]
    data = {"source": rows, "max_tokens": 9, "subsample": {"fraction": 1.0, "source_dataset": "x"}}
    assert dict(load_records(data, "supervised").dropped.columns[NOT_READ]) == {"id": 1}


def test_ignored_columns_are_counted_and_do_not_refuse_their_rows():
    rows = [{"text": "a", "images": ["x.png"]}, {"text": "b", "images": []}]
    assert load_records(rows, "supervised").dropped.dropped["not-read"].rows == 1
    loaded = load_records(rows, "supervised", ["images"])
    assert (len(loaded.records), dict(loaded.dropped.columns[IGNORED])) == (2, {"images": 1})


def test_a_part_of_a_mixture_ignores_columns_of_its_own():
    rows = [{"text": "a", "images": ["x.png"], "id": 1}]
    loaded = load_records([{"source": rows, "ignore_columns": ["images"]}, DataSpec([{"text": "b"}])], "supervised")
    assert len(loaded.records) == 2
    with pytest.raises(ValueError, match="ignore_columns: no row has anything in 'image'.*: id, images") as caught:
        load_records({"source": rows, "ignore_columns": ["image", "images"]}, "supervised")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no row has anything in 'note,id'; several are given as \[a, b\]; what"):
        load_records({"source": [{"text": "a", "note": 1, "id": 1}], "ignore_columns": ["note,id"]}, "supervised")


def test_a_name_to_ignore_is_found_in_columns_and_in_keys_of_messages():
    chat = [{"role": "user", "content": "q", "images": ["x.png"]}, {"role": "assistant", "content": "a", "id": 3}]
    audit = load_records([{"messages": chat, "video": "x"}], "supervised", ["images", "video"]).dropped
    require_ignored(["images", "video"], audit)
    with pytest.raises(ValueError, match="'imges'.*: messages.id, messages.images, video"):
        require_ignored(["images", "imges"], audit)
    require_ignored(["images"], Audit(), audit)  # one of several parts is enough


def test_openhermes_columns_are_null_and_do_not_matter(hub_cache):
    turns = [{"from": "human", "value": "q", "weight": None}, {"from": "gpt", "value": "a", "weight": None}]
    nulls = {"system_prompt": None, "model": None, "custom_instruction": None, "hash": None, "id": None}
    folder = hub_cache(SOURCES["OpenHermes-2.5"].hub_id, "refs/convert/parquet")
    write_parquet(folder / "train" / "0000.parquet", [{"conversations": turns, "source": "airoboros", **nulls}])
    loaded = load_records("OpenHermes-2.5", "supervised")
    assert (len(loaded.records), dict(loaded.dropped.columns[NOT_READ])) == (1, {"source": 1})
