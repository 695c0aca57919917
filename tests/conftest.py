"""What every test may ask for: the folder of real data, a tiny Phi on disk, rows for it, and a repeatable torch."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Python's collector walks torch, transformers and all other modules each time: a tenth of what the tests take.
gc.set_threshold(50_000, 50, 1000)

os.fsync = lambda file: None  # nothing that a test writes has to outlive the machine, and a disk takes its time

torch.set_num_threads(1)
CACHES = itertools.count()
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: tests run side by side


def shorten_interpreter() -> None:
    """Of Triton's interpreter: a quarter of its time goes to these two, at every call and at every operation."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, everywhere = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    numpy_type, types = interpreter._get_np_dtype, {}

    def patch_language(function):
        """The interpreter takes its language's place once a launch, not anew in each device function."""
        is_there = not tl.core.is_builtin(tl.load)
        return interpreter._LangPatchScope() if is_there else patch(everywhere)

    def remembered_type(dtype):
        name = dtype.scalar.name
        return types[name] if name in types else types.setdefault(name, numpy_type(dtype))

    interpreter._patch_lang, interpreter._get_np_dtype = patch_language, remembered_type


if not torch.cuda.is_available():  # Triton's kernels on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    shorten_interpreter()


@pytest.fixture(scope="session", autouse=True)
def cache_of_session(tmp_path_factory) -> None:
    """What runs keep between them is kept in a folder of the tests: for fixtures that several tests share."""
    os.environ["PHI2_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """No test finds what another one kept."""
    path = tmp_path_factory.getbasetemp() / "cache" / str(next(CACHES))
    monkeypatch.setenv("PHI2_CACHE", str(path))
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real tokenizers, configs and data slices (environment variable PHI2_SHARED)."""
    if "PHI2_SHARED" not in os.environ:
        pytest.skip("PHI2_SHARED is not set: real tokenizers and data are not here")
    return Path(os.environ["PHI2_SHARED"])


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE with ChatML: 256 bytes, one merge ("th"), then <|endoftext|>, <|im_start|>, <|im_end|>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    from phi2.tokenizer import Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "th"])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, {}).with_chatml()


@pytest.fixture(scope="session")
def make_phi(tiny_tokenizer, tmp_path_factory) -> Callable[..., Path]:
    """Writes a random Phi of two layers with `tiny_tokenizer`: make_phi(seed=0, **fields of Phi2Config) -> folder."""
    from phi2.checkpoints.weights import save_pretrained
    from phi2.config import Phi2Config
    from phi2.model import Phi2ForCausalLM

    shape = dict(vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    fixed = dict(max_position_embeddings=256, initializer_range=0.2, resid_pdrop=0.0)

    def make(seed: int = 0, **changes) -> Path:
        model = Phi2ForCausalLM(Phi2Config(**{**shape, **fixed, **changes}))
        model.init_weights(seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # biases and LayerNorms as no fresh model has them, so that none can be forgotten
            for parameter in (p for p in model.parameters() if p.ndim == 1):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        folder = tmp_path_factory.mktemp("phi")
        save_pretrained(model, tiny_tokenizer, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_phi(make_phi) -> Path:
    """A tiny Phi without dropout."""
    return make_phi()


@pytest.fixture(scope="session")
def tiny_phi_with_dropout(make_phi) -> Path:
    return make_phi(resid_pdrop=0.2, attention_dropout=0.1, embd_pdrop=0.1)


@pytest.fixture(scope="session")
def write_rows(tmp_path_factory) -> Callable[[list[dict]], str]:
    """Writes rows to a new .jsonl file and returns its path."""

    def write(rows: list[dict]) -> str:
        path = tmp_path_factory.mktemp("data") / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="session")
def sft_data(write_rows) -> str:
    """Eleven rows: questions of different lengths, a text without a prompt, a conversation."""
    turns = [("user", "hi"), ("assistant", "the boat"), ("user", "and then?"), ("assistant", "it sank")]
    rows = [{"prompt": f"Q{'?' * i}", "completion": " the" * (1 + i % 4) + f" {i}"} for i in range(9)]
    rows += [{"text": "that is the end"}]
    return write_rows([*rows, {"messages": [{"role": role, "content": text} for role, text in turns]}])


@pytest.fixture(scope="session")
def pair_data(write_rows) -> str:
    """Eleven pairs of different lengths, each with a numeric column; answers share no, one or many first tokens."""
    return write_rows(
        [
            {
                "prompt": f"Q{'?' * (i % 5)}",
                "chosen": f" the {i}" * (1 + i % 3),
                "rejected": " then" * (1 + (i + 1) % 4),
                "weight": 1.0 + i,
            }
            for i in range(11)
        ]
    )


@pytest.fixture(scope="session")
def task_data(tmp_path_factory) -> str:
    """A folder with rows of GSM8K, and of two subjects of MMLU."""
    folder = tmp_path_factory.mktemp("tasks")
    sums = [{"question": f"What is {i} and {i}?", "answer": f"Add.\n#### {2 * i}"} for i in range(1, 9)]
    choices = [
        {"question": f"Is {i} even?", "subject": subject, "choices": ["yes", "no", "both", "none"], "answer": i % 2}
        for subject in ("anatomy", "virology")
        for i in range(6)
    ]
    for name, rows in {"gsm8k_test": sums[:4], "gsm8k_train": sums, "mmlu_test": choices, "mmlu_dev": choices}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def sft_config(tiny_phi, sft_data, tmp_path) -> Callable[..., object]:
    """An SFTConfig for a run of six updates on the tiny Phi: sft_config(**changes)."""
    from phi2.lora import LoraConfig
    from phi2.training.sft import SFTConfig

    def config(**changes) -> SFTConfig:
        lora = LoraConfig(r=4, target_modules=("q_proj", "v_proj", "fc1", "lm_head"))
        where = dict(model=str(tiny_phi), data=sft_data, output=str(tmp_path / "run"), device="cpu", lora=lora)
        size = dict(max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2)
        return SFTConfig(**{**where, **size, **changes})

    return config


@pytest.fixture
def dpo_config(tiny_phi, pair_data, tmp_path) -> Callable[..., object]:
    """A DPOConfig for a run of six updates on the tiny Phi: dpo_config(**changes)."""
    from phi2.lora import LoraConfig
    from phi2.training.dpo import DPOConfig

    def config(**changes) -> DPOConfig:
        lora = LoraConfig(r=4, target_modules=("q_proj", "v_proj", "fc1", "lm_head"))
        where = dict(model=str(tiny_phi), data=pair_data, output=str(tmp_path / "run"), device="cpu", lora=lora)
        size = dict(max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2)
        return DPOConfig(**{**where, **size, **changes})

    return config


@pytest.fixture(scope="session")
def compare_config(tiny_phi, pair_data, tmp_path_factory) -> Callable[..., object]:
    """A CompareConfig for runs of four updates on the tiny Phi: compare_config(**changes)."""
    from phi2.lab.compare_config import CompareConfig
    from phi2.lora_config import LoraConfig

    def config(**changes):
        lora = LoraConfig(r=4, target_modules=("q_proj", "v_proj", "fc1", "lm_head"))
        where = dict(model=str(tiny_phi), data=pair_data, eval_data=pair_data, device="cpu", lora=lora)
        size = dict(max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2)
        what = dict(losses="sigmoid,simpo(beta=2.0)", seeds=2, eval_steps=2)
        output = str(tmp_path_factory.mktemp("compare") / "out")
        return CompareConfig(**{**where, **size, **what, "output": output, **changes})

    return config


@pytest.fixture(autouse=True)
def registry() -> Iterator[dict]:
    """The losses by name; those that a test registers, or a file that it names, are gone after it."""
    from phi2.losses.registry import PREFERENCE_LOSSES

    before = dict(PREFERENCE_LOSSES)
    yield PREFERENCE_LOSSES
    PREFERENCE_LOSSES.clear()
    PREFERENCE_LOSSES.update(before)


@pytest.fixture(scope="session")
def plain() -> Callable[[object], object]:
    """An encoded row as values to compare, with the dtypes of its arrays and the order of its columns."""
    from phi2.data.encoded import EncodedPreference, EncodedSequence

    def values(value: object) -> object:
        if isinstance(value, np.ndarray):
            return value.dtype.str, value.tolist()
        if isinstance(value, EncodedSequence | EncodedPreference):
            return [values(getattr(value, field.name)) for field in dataclasses.fields(value)]
        if isinstance(value, dict):
            return [(name, type(item), item) for name, item in value.items()]
        return [values(part) for part in value] if type(value) is tuple else value

    return values


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager]:
    """`with full_disk(size):` no file can grow beyond `size` bytes; the system stands for a disk without more room."""
    import resource

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


KILLED_RUN = """
import os, signal, torch

from phi2.lora_config import LoraConfig
from phi2.training import loop
from phi2.training.{module} import {config.__class__.__name__}, train

def kill(loss, step):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads({threads})
loop.require_finite = kill  # called between an update and its line in metrics.jsonl
train({config!r})
"""


@pytest.fixture
def train_and_kill() -> Callable[[object, int], None]:
    """Starts a run in another process, which is killed (SIGKILL) behind update `step`, before anything tells of it."""

    def run(config, step: int) -> None:
        module = type(config).__name__.removesuffix("Config").lower()  # sft or dpo
        code = KILLED_RUN.format(module=module, config=config, step=step, threads=torch.get_num_threads())
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr

    return run


def read_metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without the one value that no two runs share."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], list[dict]]:
    return read_metrics


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    """What a run trained: its adapter, or its model."""
    name = "adapter/adapter_model.safetensors" if (run / "adapter").exists() else "model/model.safetensors"
    return load_file(run / name)


@pytest.fixture(scope="session")
def weights_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    return read_weights


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[Path, Path], None]:
    """Of two runs, bit for bit."""

    def check(run: Path, other: Path) -> None:
        ours, theirs = read_weights(run), read_weights(other)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    return check


@pytest.fixture(scope="session")
def shift_logps() -> Callable[[Path, float], None]:
    """Takes a number from everything that a shard of a reference cache says, as another model would have said it."""
    from phi2.training.reference_shards import shard_of

    def shift(shard: Path, by: float) -> None:
        with safe_open(shard, framework="pt") as file:
            fingerprint = file.metadata()["fingerprint"]
        tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
        shard.write_bytes(shard_of({**tensors, "logps": tensors["logps"] - by}, fingerprint))

    return shift


class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph on a CPU: every operator call of a launch, with the very tensors it was given.

    A replay runs the calls again on that memory; the first one has run while it was recorded, and what a launch changes
    must change once. Numbers that came from the host are frozen, as in a CUDA graph, and a call that asks the device
    for a number cannot be recorded.

    Attributes:
        replays: how often it was replayed.
        is_replaying: whether that is what happens now.
    """

    ASKING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self.calls = []
        self.replays, self.is_replaying = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.ASKING, f"{function} cannot be recorded"
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        self.is_replaying = self.replays > 1
        for function, args, kwargs, recorded in self.calls if self.is_replaying else ():
            again = function(*args, **kwargs)
            for memory, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                if isinstance(memory, torch.Tensor) and memory.data_ptr() != new.data_ptr():
                    memory.copy_(new)
        self.is_replaying = False


@pytest.fixture
def recordings(monkeypatch) -> list[Recording]:
    """Lets the CPU record decode steps; each recording is in the list."""
    import phi2.inference.engine
    import phi2.inference.kept_engine
    import phi2.inference.step

    made = []

    def record(launch, device=None):
        with Recording() as recording:
            result = launch()
        made.append(recording)
        return recording.replay, result

    monkeypatch.setattr(phi2.inference.step, "record", record)
    for module in (phi2.inference.engine, phi2.inference.kept_engine):
        monkeypatch.setattr(module, "can_record", lambda device: True)
    return made
