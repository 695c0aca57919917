"""The GPU cases without a GPU: what they count, what they gate, and what they say; the clock alone needs the device.

Where there is one, the same gates run on it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import run
from benchmarks.cases import attention, attention_packed, block, decode, dpo_step, elementwise, head, prefix, quantized
from benchmarks.cases.prefix import Layout, Pair
from benchmarks.harness import comparison, gpu
from benchmarks.harness.comparison import OURS, Comparison, Implementation, Work
from benchmarks.harness.gpu import Rates
from benchmarks.registry import CASES, Case, GateError
from phi2.config import Phi2Config
from phi2_kernels.attention import attention_ref
from phi2_kernels.visibility import Visibility

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
GPU_CASES = [
    "training_step",
    "attention_forward",
    "attention_forward_backward",
    "attention_as_sm80",
    "attention_packed",
    "prefix_sharing",
    "head",
    "block",
    "elementwise",
    "decode_ops",
]
SMALL = Phi2Config(hidden_size=160, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1)
SMALL_MODEL = replace(SMALL, vocab_size=120, eos_token_id=0, bos_token_id=0)
PAIRS = [Pair(5, 3, 4), Pair(2, 4, 1)]
POSITIONS = torch.arange(9, device=DEVICE)[None]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
COMPARISONS = {
    "attention forward": lambda dtype: attention.compare_attention(DEVICE, dtype, 2, 2, 21, 80, False),
    "attention": lambda dtype: attention.compare_attention(DEVICE, dtype, 2, 2, 21, 80, True),
    "head frozen": lambda dtype: head.compare_head(DEVICE, dtype, 12, 32, 77, False),
    "head trainable": lambda dtype: head.compare_head(DEVICE, dtype, 12, 32, 77, True),
    "layer_norm": lambda dtype: elementwise.compare_layer_norm(DEVICE, dtype, 9, 48, True),
    "gelu": lambda dtype: elementwise.compare_gelu(DEVICE, dtype, 9, 48),
    "rotary": lambda dtype: elementwise.compare_rotary(DEVICE, dtype, 1, 7, 2, 80, 32),
    "decode_attention": lambda dtype: decode.compare_decode_attention(DEVICE, dtype, 2, 2, 33, 80),
    **{
        f"gemv {form}": lambda dtype, form=form: decode.compare_gemv(DEVICE, dtype, form, 1, 48, 64)
        for form in decode.WEIGHT_FORMS
    },
    "many rows": lambda dtype: quantized.compare_forward(DEVICE, dtype, "int4", 20, 48, 64),
    "many rows, gradient": lambda dtype: quantized.compare_backward(DEVICE, dtype, "int8", 20, 48, 64),
}
BLOCKS = {
    "DPO step": lambda dtype: dpo_step.compare_dpo_step(DEVICE, dtype, SMALL_MODEL, pairs=2, answer=9),
    "block LoRA": lambda dtype: block.compare_block(dtype, SMALL, 4, 1, POSITIONS),
    "block": lambda dtype: block.compare_block(dtype, SMALL, 0, 1, POSITIONS),
    "pairs": lambda dtype: prefix.compare_attention(Layout(PAIRS, DEVICE), dtype, 2, 80),
    "pairs block LoRA": lambda dtype: prefix.compare_block(Layout(PAIRS, DEVICE), dtype, SMALL, 4),
}


def test_attention_counts_pairs_that_see_each_other():
    assert attention.attention_work(2, 3, 2, 4, backward=False) == Work(2 * 2 * 2 * 3 * 4, 4 * 2 * 2 * 4 * 2)
    assert attention.attention_work(2, 3, 2, 4, backward=True) == Work(336, 384)
    whole = attention.compare_attention(DEVICE, BFLOAT16, 8, 32, 2048, 80, False)
    assert whole.work.flops == 171_882_577_920


def test_the_head_counts_one_matmul_for_the_logits_and_one_for_each_gradient():
    assert head.head_work(2, 3, 5, trainable=False) == Work(2 * 60, 2 * (6 + 6 + 15))
    assert head.head_work(2, 3, 5, trainable=True) == Work(3 * 60, 2 * (6 + 6 + 15 + 15))


def test_a_layer_of_phi2_counts_its_weights_its_adapters_and_its_attention():
    pairs, weights = 4 * 2048 * 2049 // 2, 78_643_200
    full = block.block_work(Phi2Config(), 8192, pairs, rank=0)
    assert full.flops == 6 * 8192 * weights + 300_794_511_360
    assert full.bytes == 2 * (4 * 8192 * 2560 + 3 * weights)
    lora = block.block_work(Phi2Config(), 8192, pairs, rank=16)
    assert lora.flops == 4 * 8192 * weights + 6 * 8192 * 16 * 46_080 + 300_794_511_360


def test_decoding_counts_the_bytes_of_weights_and_cache():
    assert decode.decode_attention_work(1, 2, 3, 4) == Work(96, 2 * (2 * 2 * 3 * 4) + 2 * (2 * 2 * 4))
    sizes = {form: decode.gemv_work(form, 1, 2, 64) for form in decode.WEIGHT_FORMS}
    assert sizes == {"bf16": Work(256, 256 + 132), "int8": Work(256, 132 + 132), "int4": Work(256, 64 + 16 + 132)}


@pytest.mark.parametrize(("name", "tensors"), [("layer_norm", 5 * 9 * 48), ("gelu", 5 * 9 * 48), ("rotary", 4 * 1120)])
def test_elementwise_ops_count_what_both_passes_read_and_write(name, tensors):
    assert COMPARISONS[name](BFLOAT16).work == Work(0, 2 * tensors)


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    rates = Rates(tflops=100, gbytes=1000)
    assert rates.floor(Work(2 * 10**12, 10**9)) == pytest.approx(20)
    assert rates.floor(Work(10**9, 5 * 10**9)) == pytest.approx(5)


def test_both_layouts_hold_the_scores_of_their_pairs():
    """(5, 3, 4): 36 + 45 in two sequences, and 15 fewer with one prompt; (2, 4, 1): 21 + 6, and 3 fewer."""
    layout = Layout(PAIRS, torch.device("cpu"))
    for row, count in ((layout.unshared, 108), (layout.shared, 90)):
        assert attention.scores_of(row.input_ids.shape[1], row.visible_until) == count
    assert attention.scores_of(8, None) == 36
    assert layout.index[layout.first].tolist() == list(range(19))
    assert layout.index[8:17].tolist() == [*range(5), *range(8, 12)]  # the prompt again, and the rejected answer


def test_pair_lengths_are_the_same_in_every_run():
    pairs = prefix.sample_pairs(16384)
    assert pairs == prefix.sample_pairs(16384) != prefix.sample_pairs(16384, seed=1)
    assert pairs[:2] == [Pair(165, 230, 367), Pair(163, 181, 310)] and len(pairs) == 16
    assert 15000 < sum(pair.prompt + sum(pair) for pair in pairs) <= 16384


def test_pair_lengths_follow_their_distribution_within_the_limit():
    pairs = prefix.sample_pairs(2_000_000)
    prompts, answers = sorted(p.prompt for p in pairs), sorted(n for p in pairs for n in p[1:])
    assert prompts[len(prompts) // 2] == pytest.approx(150, rel=0.1)
    assert answers[len(answers) // 2] == pytest.approx(250, rel=0.1)
    assert max(p.prompt + max(p[1:]) for p in pairs) == 1024 and min(prompts[0], answers[0]) >= 1


@pytest.mark.parametrize("name", [*COMPARISONS, *BLOCKS])
def test_our_side_and_the_peers_of_this_machine_pass_the_gate(name):
    one = (COMPARISONS | BLOCKS)[name](FLOAT32)
    found = comparison.gate(one)
    assert len(found.implementations) >= 2
    compared = [error for name, error in found.errors.items() if found.implementations[name].is_compared]
    assert max(compared) < 2e-6
    assert found.implementations.keys() | found.absent.keys() == {OURS, *one.peers}


@pytest.mark.parametrize("name", [*COMPARISONS, "pairs"])
def test_half_precision_passes_the_gate(name):
    assert comparison.gate((COMPARISONS | BLOCKS)[name](BFLOAT16)).errors[OURS] < 1e-2


@pytest.mark.parametrize("until", [None, [[5, 5, 3, 5, 5, 9, 9, 9, 0]]])
def test_flex_attention_sees_what_ours_sees(until):
    until = until and torch.tensor(until, dtype=torch.int32)
    q, k, v = comparison.random(0, DEVICE, FLOAT32)(3, 1, 2, 9, 16)
    visibility = Visibility(9, 9, until, DEVICE)
    output = attention.flex(9, DEVICE, until).run(q, k, v)["output"]
    torch.testing.assert_close(output, attention_ref(q, k, v, visibility), rtol=1e-5, atol=1e-6)


def packed(monkeypatch, change=lambda window: window) -> dict[str, comparison.Passed]:
    """What passes the gate, by task; sequences one by one stand for torch's varlen_attn, which wants a GPU."""

    def one_by_one(q, k, v, ends, ends_of_keys, longest, longest_of_keys, *, window_size):
        assert torch.equal(ends, ends_of_keys) and longest == longest_of_keys == ends.diff().max()
        is_causal = change(window_size) == (-1, 0)
        heads = ([x.transpose(0, 1) for x in tokens.split(ends.diff().tolist())] for tokens in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        parts = [attend(*part, is_causal=is_causal) for part in zip(*heads, strict=True)]
        return torch.cat(parts, dim=1).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", one_by_one)
    compared = attention_packed.attention_packed(DEVICE, FLOAT32, H=2, pairs=PAIRS)
    return {one.name.split(" float32")[0]: comparison.gate(one) for one in compared}


def test_varlen_attention_computes_what_packed_and_shared_rows_do(monkeypatch):
    found = packed(monkeypatch)
    assert found.keys() == {"packed", "shared prompts"}
    assert all(passed.errors["varlen_attn"] < 2e-6 for passed in found.values())


def test_varlen_attention_that_sees_ahead_is_left_out(monkeypatch):
    found = packed(monkeypatch, lambda window: (-1, -1))
    assert all("output is off" in passed.absent["varlen_attn"] for passed in found.values())


def broken(one: Comparison, change) -> Comparison:
    """With an output of ours changed: change(name, tensor)."""

    def run_(*inputs):
        outputs = one.ours.run(*inputs)
        return {name: change(name, x) for name, x in outputs.items()}

    return replace(one, ours=replace(one.ours, run=run_))


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_output_of_ours_is_gated(name):
    one = COMPARISONS[name](FLOAT32)
    for output in one.ours.run(*one.ours.prepare(*one.inputs(0))):
        with pytest.raises(GateError, match=f"{output} is off by 1.0e-02 of its size"):
            comparison.gate(broken(one, lambda name, x, output=output: x * (1.01 if name == output else 1)))


def test_nan_never_passes():
    def one_nan(name, x):
        x = x.clone()
        x.view(-1)[3] = math.nan
        return x

    with pytest.raises(GateError, match="output is off by nan"):
        comparison.gate(broken(COMPARISONS["gelu"](FLOAT32), one_nan))


def test_an_output_that_nobody_writes_is_seen():
    with pytest.raises(GateError, match="output is off by nan"):
        comparison.gate(broken(COMPARISONS["gelu"](FLOAT32), lambda name, x: torch.empty(x.shape, device=x.device)))


def test_a_dropped_causal_mask_is_seen():
    one = COMPARISONS["attention forward"](FLOAT32)
    blind = Implementation(lambda q, k, v: {"output": torch.nn.functional.scaled_dot_product_attention(q, k, v)})
    with pytest.raises(GateError, match="forward float32 B2 S21: output is off"):
        comparison.gate(replace(one, ours=blind))


def test_a_gradient_of_the_prompt_that_is_not_added_up_is_seen():
    one = BLOCKS["pairs"](FLOAT32)
    peer = one.peers["without sharing"]()
    lost = replace(peer, finish=lambda outputs: {**peer.finish(outputs), "grad of k": outputs["grad of k"][:, :, :19]})
    found = comparison.gate(replace(one, peers={"lost": lambda: lost}))
    assert "grad of k is off" in found.absent["lost"]


def test_peers_that_are_ours_are_held_to_what_ours_is():
    one = COMPARISONS["gelu"](FLOAT32)
    off = replace(one.ours, finish=lambda outputs: {name: x * 1.01 for name, x in outputs.items()})
    unwritten = Implementation(lambda *x: {name: torch.empty_like(y) for name, y in one.ours.run(*x).items()})
    peers = {"off": lambda: off, "unwritten": lambda: unwritten}
    assert comparison.gate(replace(one, peers={"off": lambda: off})).implementations.keys() == {OURS, "off"}
    assert comparison.gate(replace(one, peers=peers, peers_are_ours=True)).absent == {
        "off": "output is off by 1.0e-02 of its size", "unwritten": "output is off by nan of its size",
    }  # fmt: skip


def test_a_peer_that_is_wrong_missing_or_failing_is_left_out_and_named():
    def missing() -> Implementation:
        raise ModuleNotFoundError("No module named 'liger_kernel'")

    def fail(*inputs):
        raise RuntimeError("No available kernel.\nmore lines")

    one = COMPARISONS["gelu"](FLOAT32)
    wrong = lambda: Implementation(lambda *x: {name: -y for name, y in one.ours.run(*x).items()})  # noqa: E731
    peers = {"wrong": wrong, "missing": missing, "failing": lambda: Implementation(fail), **one.peers}
    found = comparison.gate(replace(one, peers=peers))
    assert list(found.implementations) == [OURS, *one.peers]
    assert found.absent == {
        "wrong": "output is off by 2.0e+00 of its size",
        "missing": "ModuleNotFoundError: No module named 'liger_kernel'",
        "failing": "RuntimeError: No available kernel.",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", [*GPU_CASES, "decode_step", "decode_loop", "quantized_matmul"])
def test_without_a_gpu_a_case_ends_with_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    assert run.main(["--case", name]) == 1
    said = capsys.readouterr()
    assert said.out == "" and not (tmp_path / "results").exists()
    assert said.err == f"{name}: no number: it needs a CUDA GPU, and torch sees none on this machine\n"


@pytest.fixture
def clock(monkeypatch) -> dict[str, float]:
    """Stands for the GPU's clock, ceilings and memory: milliseconds by name, 1 unless said otherwise."""
    times: dict[str, float] = {}

    def timed(calls, turns):
        for call in calls.values():
            call()
        return {name: [times.get(name, 1.0)] * turns for name in calls}

    monkeypatch.setattr(gpu, "timed", timed)
    monkeypatch.setattr(gpu, "device", lambda: DEVICE)
    monkeypatch.setattr(gpu, "measured_rates", lambda: Rates(200, 1000))
    monkeypatch.setattr(gpu, "peak_memory", lambda implementation, inputs: 0.5)
    monkeypatch.setattr(gpu, "_captured", lambda calls: lambda: [call() for call in calls])
    return times


def test_a_report_weighs_ours_against_each_peer_and_the_fastest_of_a_kind(clock):
    clock |= {OURS: 2.0, "slow": 8.0, "SDPA a": 4.0, "SDPA b": 3.0}
    one = COMPARISONS["gelu"](FLOAT32)
    peers = {name: lambda: one.plain for name in ("slow", "SDPA a", "SDPA b")}
    peers["gone"] = lambda: exec("import no_such_package")
    work = Work(4 * 10**11, 10**9)  # 2 ms on this clock's device
    limits = dict(targets={"SDPA *": 1.6, "slow": 3.0}, peak_limit=0.4)
    report = gpu.report([replace(one, peers=peers, work=work, **limits)], 5, {"tokens": 9})
    found = {measure.name: (measure.ratio, measure.target, measure.is_met) for measure in report.measures}
    assert found == {
        "gelu: slow": (pytest.approx(4.0), 3.0, True),
        "gelu: SDPA a": (pytest.approx(2.0), None, True),
        "gelu: SDPA b": (pytest.approx(1.5), None, True),
        "gelu: best SDPA *": (pytest.approx(1.5), 1.6, False),
        "gelu: peak, allowed": (pytest.approx(1.25), 1.0, False),
    }
    ours, slow = report.table[0], report.table[1]
    assert (ours["side"], ours["ms"], ours["TFLOP/s"], ours["GB/s"], ours["share"]) == (OURS, 2.0, 200.0, 500, 1.0)
    assert (slow["side"], slow["share"]) == ("slow", 0.25)
    assert report.facts["gelu, without gone"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert report.facts["tokens"] == 9 and "measured 200 TFLOP/s and 1000 GB/s" in report.facts["limits"]


def test_a_red_gate_of_one_task_leaves_no_number_of_any(clock):
    compared = [COMPARISONS["gelu"](FLOAT32), broken(COMPARISONS["rotary"](FLOAT32), lambda name, x: x + 1)]
    with pytest.raises(GateError, match="rotary"):
        gpu.report(compared, 3, {})


def test_a_case_prints_and_keeps_its_report(clock, tmp_path, monkeypatch, capsys):
    compared = [COMPARISONS["gemv int8"](BFLOAT16), COMPARISONS["gelu"](BFLOAT16)]
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setitem(CASES, "toy", Case(lambda turns: gpu.report(compared, turns, {}), 2, "a toy"))
    assert run.main(["--case", "toy"]) == 0
    out = capsys.readouterr().out
    assert "gemv int8 48x64: F.linear" in out and "roofline ms" in out and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", GPU_CASES)
def test_each_case_sets_the_targets_of_the_project(name, monkeypatch):
    seen: list[Comparison] = []
    monkeypatch.setattr(gpu, "report_of_gate", seen.extend)
    CASES[name].tiny()
    found = {target for one in seen for target in one.targets.items()}
    expected = {
        "training_step": {("transformers, peft", 1.25)},
        "attention_forward": {("SDPA *", 1.2)},
        "attention_forward_backward": {("SDPA *", 1.2)},
        "attention_as_sm80": {("SDPA flash", 1.2)},
        "attention_packed": {("FlexAttention", 1.3), ("varlen_attn", 1.3)},
        "prefix_sharing": {("without sharing", 1.4)},
        "head": {("its 2 matmuls", 1 / 1.1), ("its 3 matmuls", 1 / 1.15)},
        "block": {("transformers", 1.25), ("transformers, torch.compile", 1.1)},
        "elementwise": set(),
        "decode_ops": set(),
    }
    if DEVICE.type == "cpu":  # which counts as an A100
        assert found == expected[name]
    assert len({one.name for one in seen}) == len(seen) > 1
    assert all(target in one.peers or target.endswith("*") for one in seen for target in one.targets)


def test_on_a_hopper_attention_has_other_targets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert attention._targets(torch.device("cuda", 0)) == {"SDPA cuDNN": 0.85, "SDPA flash": 1.3}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the clock needs a GPU")
def test_the_clock_times_calls_and_graphs_and_memory():
    for name in ("gelu", "gemv bf16"):  # calls, and a graph
        one = COMPARISONS[name](BFLOAT16)
        times = gpu.bench(one, comparison.gate(one).implementations, 3)
        assert times.keys() >= {OURS} and all(len(t) == 3 and min(t) > 0 for t in times.values())
    x = torch.zeros(1, device=DEVICE)
    assert gpu.peak_memory(Implementation(lambda x: {"y": x.new_empty(10**8)}), (x,)) == pytest.approx(0.4, rel=0.01)
