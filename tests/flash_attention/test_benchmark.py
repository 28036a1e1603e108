"""The benchmark runs, believes nobody unseen, and writes what a figure needs to be quoted."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch

from benchmarks import attention_peers, goals, machine, run
from benchmarks import flash_attention as benchmark
from benchmarks.attention_cases import (
    BATCH,
    FULL_BATCH,
    ONE_ROW,
    PACKED,
    BenchCase,
    cpu_cases,
    draw,
    gpu_cases,
    skewed_lengths,
)
from benchmarks.attention_peers import Prepared, Refused, flex_attention_peer, peers, reason_of
from course_lib.flash_attention import reference_attention
from course_lib.runtime.measure import Timing

CPU = torch.device("cpu")
CPU_CASES = [pytest.param(case, id=case.name) for case in cpu_cases()]


def bench_case(kind, q_lengths, k_lengths=None, **options) -> BenchCase:
    return BenchCase(f"{kind}/x", kind, q_lengths, k_lengths or q_lengths, 4, 2, 16, **options)


# ---- the whole, on CPU ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    arguments = ["flash_attention", "--smoke", "--device", "cpu", "--repeats", "1"]
    assert run.main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_smoke_has_every_case_direction_and_implementation(smoke):
    everyone = {"ours_torch", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math"}
    everyone |= {"varlen_attn", "flex", "plain"}
    seen: dict[tuple[str, str], set[str]] = {}
    for record in smoke["ops"]["flash_attention"]["records"]:
        key = record["case"], record["direction"]
        seen.setdefault(key, set()).add(record["implementation"])
    for case in cpu_cases():
        padded = {"ours_padded"} if case.kind == "varlen" else set()
        assert seen.pop((case.name, "forward")) == everyone | padded
        backward = seen.pop((case.name, "backward"), None)
        assert (backward is None) == (case.kind == "decode")
    assert not seen


def test_smoke_says_what_was_measured_and_why_not(smoke):
    assert {"date", "torch", "triton", "device", "python"} <= set(smoke["environment"])
    op = smoke["ops"]["flash_attention"]
    assert "4*D" in op["flop_formula"]
    for record in op["records"]:
        if "refused" in record:
            assert record["refused"]
            assert "\n" not in record["refused"]
            continue
        assert record["seconds"]["median"] > 0
        assert record["peak_bytes"] > 0
        speed = record["flops"] / record["seconds"]["median"] / 1e12
        assert record["tflops_per_second"] == pytest.approx(speed)


def test_smoke_refusals_are_those_of_a_cpu_and_never_ours(smoke):
    refused = {
        r["implementation"]: r["refused"]
        for r in smoke["ops"]["flash_attention"]["records"]
        if "refused" in r
    }
    assert set(refused) == {"sdpa_cudnn", "sdpa_efficient", "varlen_attn", "flex", "plain"}
    assert "GPU only" in refused["flex"]
    assert "No viable backend" in refused["sdpa_cudnn"]
    assert "lengths of single sequences" in refused["plain"]


def test_smoke_backward_counts_two_and_a_half_times_the_forward(smoke):
    flops = {
        (r["case"], r["direction"]): r["flops"]
        for r in smoke["ops"]["flash_attention"]["records"]
        if r["implementation"] == "ours_torch"
    }
    for (case, direction), count in flops.items():
        if direction == "backward":
            assert count == 2.5 * flops[case, "forward"]


def test_smoke_padding_counts_only_for_the_kernel_whose_problem_it_is(smoke):
    flops = {
        (r["case"], r["implementation"]): r["flops"]
        for r in smoke["ops"]["flash_attention"]["records"]
        if r["direction"] == "forward" and "refused" not in r
    }
    for case in cpu_cases():
        if case.kind == "varlen":
            assert flops[case.name, "ours_torch"] == flops[case.name, "sdpa_math"] == case.flops()
            assert flops[case.name, "ours_padded"] == case.padded().flops() > 1.5 * case.flops()


def test_smoke_ratios_are_of_speeds(smoke):
    op = smoke["ops"]["flash_attention"]
    speed = {
        (r["case"], r["direction"], r["implementation"]): r["tflops_per_second"]
        for r in op["records"]
        if "refused" not in r
    }
    assert len(op["ratios"]) == sum(name != "ours_torch" for _, _, name in speed)
    for entry in op["ratios"]:
        place = entry["case"], entry["direction"]
        ours, peer = speed[*place, "ours_torch"], speed[*place, entry["peer"]]
        assert entry["ratio"] == pytest.approx(ours / peer)
        assert "goal" not in entry  # they are for bf16


def test_smoke_decoding_says_tokens_and_bandwidth(smoke):
    for record in smoke["ops"]["flash_attention"]["records"]:
        if not record["case"].startswith("decode") or "refused" in record:
            continue
        shape, seconds = record["shape"], record["seconds"]["median"]
        keys = shape.get("keys", shape["B"] * shape["Tk"])
        assert record["kv_bytes"] == 2 * keys * shape["Hkv"] * shape["D"] * 4
        assert record["kv_bytes_per_second"] == pytest.approx(record["kv_bytes"] / seconds)
        assert record["tokens_per_second"] == pytest.approx(shape["B"] / seconds)


# ---- nobody is believed unseen -------------------------------------------------------------


def run_with(monkeypatch, case, *, dtype=torch.float32, **implementations):
    """Records of a case, with these attentions [B, H, T, D] for implementations."""
    prepared = {
        name: (lambda function=function: Prepared(function, BATCH))
        for name, function in implementations.items()
    }
    monkeypatch.setattr(benchmark, "peers", lambda case, device: prepared)
    return list(benchmark.CaseRun(case, dtype, CPU, 1).records())


def refusals(records):
    return {(r["implementation"], r["direction"]): r["refused"] for r in records if "refused" in r}


def right(q, k, v):
    return reference_attention(q, k, v, causal=True)


def top_left(q, k, v):
    """Causal as SDPA means it: aligned at the other corner."""
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(hidden, -math.inf)
    return torch.softmax(scores, dim=-1) @ v


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return 1.1 * grads[0]


def test_a_peer_with_another_corner_is_not_timed(monkeypatch):
    case = bench_case("dense", (33,), (70,), causal=True)
    records = run_with(monkeypatch, case, ours_torch=right, peer=top_left)
    (found,) = refusals(records).items()
    assert found[0] == ("peer", "forward")
    assert "out differs from ours_torch" in found[1]
    # Where the corners agree it is as good as any other.
    records = run_with(
        monkeypatch, bench_case("dense", (33,), causal=True), ours_torch=right, peer=top_left
    )
    assert len(records) == 4
    assert not refusals(records)


def test_ours_is_compared_with_the_formula(monkeypatch):
    case = bench_case("dense", (33,), (70,), causal=True)
    records = run_with(monkeypatch, case, ours_torch=top_left, peer=right)
    assert "out differs from the formula" in refusals(records)["ours_torch", "forward"]
    assert ("peer", "forward") not in refusals(records)


def test_nan_is_no_result(monkeypatch):
    case = bench_case("dense", (33,))
    records = run_with(monkeypatch, case, ours_torch=lambda q, k, v: q * math.nan)
    assert "nan" in refusals(records)["ours_torch", "forward"]


def test_a_wrong_gradient_is_found(monkeypatch):
    def wrong(q, k, v):
        return right(q, k, WrongGradient.apply(v))

    case = bench_case("dense", (40,), causal=True)
    records = run_with(monkeypatch, case, ours_torch=right, peer=wrong)
    (found,) = refusals(records).items()
    assert found[0] == ("peer", "backward")
    assert found[1].startswith("dv differs from ours_torch by 1.0e-01")


def test_an_error_is_a_refusal_and_the_others_go_on(monkeypatch):
    def broken(q, k, v):
        raise NotImplementedError("not for D = 16\nand a long explanation")

    records = run_with(monkeypatch, bench_case("dense", (9,), causal=True), peer=broken, last=right)
    assert refusals(records) == {("peer", "forward"): "NotImplementedError: not for D = 16"}
    assert {r["direction"] for r in records if r["implementation"] == "last"} == {
        "forward",
        "backward",
    }


def test_memory_that_runs_out_while_timing_is_recorded(monkeypatch):
    def out_of_memory(functions, **options):
        raise torch.OutOfMemoryError("all of it")

    monkeypatch.setattr(benchmark, "time_interleaved", out_of_memory)
    records = run_with(monkeypatch, bench_case("dense", (9,), causal=True), ours_torch=right)
    assert set(refusals(records).values()) == {"timing failed: OutOfMemoryError: all of it"}


@pytest.mark.parametrize("window_size", [(-1, -1), (5, 0), (5, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_sampled_formula_is_the_definition(causal, window_size):
    case = bench_case("varlen", (70, 3, 101), causal=causal, window_size=window_size)
    packed = draw(case, torch.float32, CPU)
    out, start = [], 0
    for length in case.q_lengths:
        q, k, v = (x[start : start + length].mT.mT for x in (packed.q, packed.k, packed.v))
        one = (x.transpose(0, 1)[None] for x in (q, k, v))
        attention = reference_attention(*one, causal=causal, window_size=window_size)
        out.append(attention[0].transpose(0, 1))
        start += length
    right = torch.cat(out)
    assert benchmark.sample_distance(case, packed, right) < 1e-5
    # A sequence longer or shorter by one would have everything after it out of place.
    assert benchmark.sample_distance(case, packed, right.roll(1, dims=0)) > 0.1


def test_a_window_that_is_one_key_too_wide_is_seen():
    """In bf16, with the tolerance of bf16, at the widths of the GPU's cases."""
    case = BenchCase("x", "dense", (1500,), (1500,), 2, 2, 64, causal=True, window_size=(1023, 0))
    packed = draw(case, torch.bfloat16, CPU)
    q, k, v = (BATCH.there(x, (1500,)).float() for x in (packed.q, packed.k, packed.v))
    tolerance = benchmark.TOLERANCE["forward", torch.bfloat16]
    for left, seen in ((1023, False), (1024, True)):
        out = reference_attention(q, k, v, causal=True, window_size=(left, 0)).bfloat16()
        assert (
            benchmark.sample_distance(case, packed, BATCH.back(out, (1500,))) > tolerance
        ) == seen


def test_a_peer_whose_window_is_one_key_too_wide_is_not_timed(monkeypatch):
    def windowed(left):
        def attention(q, k, v):
            q, k, v = (x.float() for x in (q, k, v))
            return reference_attention(q, k, v, causal=True, window_size=(left, 0)).bfloat16()

        return attention

    case = BenchCase("x", "dense", (1500,), (1500,), 2, 2, 64, causal=True, window_size=(1023, 0))
    records = run_with(
        *(monkeypatch, case),
        dtype=torch.bfloat16,
        ours_torch=windowed(1023),
        peer=windowed(1024),
        other=windowed(1023),
    )
    assert set(refusals(records)) == {("peer", "forward")}


# ---- reasons -------------------------------------------------------------------------------


def test_a_reason_is_one_line_with_what_was_said_before():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warnings.warn("Flash attention kernel not used because:", stacklevel=1)
        warnings.warn("Memory efficient attention has been runtime disabled.", stacklevel=1)
        warnings.warn("it wants D <= 256 (Triggered internally at /a/b.cpp:1.)", stacklevel=1)
    reason = reason_of(RuntimeError("No available kernel.\nAborting."), heard)
    assert reason == "RuntimeError: No available kernel.; it wants D <= 256"


def test_a_reason_names_no_folder_and_no_novel():
    assert reason_of(Refused("see /a/b-c/d.py, line 3"), []) == "see d.py, line 3"
    assert len(reason_of(ValueError("x" * 999), [])) < 260


# ---- cases ---------------------------------------------------------------------------------


def test_case_names_are_unique_and_say_their_kind():
    for cases in (list(gpu_cases()), list(cpu_cases())):
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.name.startswith(case.kind + "/") for case in cases)


def test_lengths_are_skewed_and_the_same_for_a_seed():
    lengths = skewed_lengths(4000, median=600, longest=8192, seed=3)
    assert lengths == skewed_lengths(4000, median=600, longest=8192, seed=3)
    assert lengths != skewed_lengths(4000, median=600, longest=8192, seed=4)
    ordered = sorted(lengths)
    assert 560 < ordered[2000] < 640
    assert ordered[0] >= 16
    assert ordered[-1] == 8192
    assert sum(lengths) / 4000 > 1.3 * ordered[2000]  # a long tail


@pytest.mark.parametrize("case", CPU_CASES)
def test_flops_count_the_visible_pairs(case):
    pairs = 0
    for Tq, Tk in zip(case.q_lengths, case.k_lengths, strict=True):
        pairs += int(case.band.visible(Tq, Tk).sum())
    assert case.flops() == 4 * case.D * case.Hq * pairs


def test_kv_bytes_are_of_the_keys_that_are_seen():
    assert bench_case("decode", (1, 1), (100, 7)).kv_bytes(2) == 2 * 107 * 2 * 16 * 2
    windowed = bench_case("decode", (1, 1), (100, 7), causal=True, window_size=(9, 0))
    assert windowed.kv_bytes(2) == 2 * (10 + 7) * 2 * 16 * 2


@pytest.mark.parametrize("layout", [PACKED, ONE_ROW, BATCH, FULL_BATCH])
def test_a_layout_comes_back(layout):
    lengths = (5, 1, 9)
    x = torch.randn(15, 2, 4)
    for there in (layout.there, layout.there_for_dout):
        assert torch.equal(layout.back(there(x, lengths), lengths), x)


def test_padding_is_random_but_for_the_gradient():
    x = torch.randn(6, 2, 4)
    assert BATCH.there(x, (5, 1))[1, :, 1:].abs().min() > 0
    assert BATCH.there_for_dout(x, (5, 1))[1, :, 1:].abs().max() == 0
    assert FULL_BATCH.there_for_dout(x, (5, 1))[1, :, 1:].abs().min() > 0


WINDOWED_CHUNK = BenchCase(
    "chunk", "dense", (40,), (90,), 2, 2, 16, causal=True, window_size=(9, 0)
)


@pytest.mark.parametrize("case", [*CPU_CASES, pytest.param(WINDOWED_CHUNK, id="windowed chunk")])
def test_flex_attention_means_the_same_masks(case):
    """Uncompiled on CPU: the masks, the layouts, the grouped heads."""
    packed = draw(case, torch.float32, CPU)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        prepared = flex_attention_peer(case, CPU)
        lengths = (case.q_lengths, case.k_lengths, case.k_lengths)
        inputs = [
            prepared.layout.there(x, n)
            for x, n in zip((packed.q, packed.k, packed.v), lengths, strict=True)
        ]
        out = prepared.layout.back(prepared.run(*inputs), case.q_lengths)
    assert benchmark.sample_distance(case, packed, out) < 1e-5


def test_a_mask_hides_padding_and_leaves_every_row_a_key():
    case = bench_case("varlen", (3, 5))
    mask = attention_peers._mask(case, CPU)
    assert mask.shape == (2, 1, 5, 5)
    assert mask[1].all()
    assert mask[0, 0, :3].tolist() == [[True] * 3 + [False] * 2] * 3
    assert mask.any(dim=-1).all()


def test_a_score_matrix_that_is_too_large_is_left_out():
    huge = BenchCase("dense/x", "dense", (30000,) * 4, (30000,) * 4, 16, 16, 64)
    for name in ("plain", "sdpa_math"):
        with pytest.raises(Refused, match="too large"):
            peers(huge, CPU)[name]()


# ---- goals ---------------------------------------------------------------------------------


def measured(implementation, speed, *, case="dense/T4096/D128/causal", direction="forward", **more):
    return {
        "case": case,
        "direction": direction,
        "implementation": implementation,
        "dtype": "bfloat16",
        "causal": "causal" in case,
        "window_size": [-1, -1],
        "shape": {"Tq": 4096, "D": 128},
        "tflops_per_second": speed,
    } | more


def judged(*records, device="NVIDIA H200"):
    return goals.ratios("flash_attention", "ours_triton", records, device)


@pytest.mark.parametrize(
    ("ours", "met", "said"), [(74, False, "MISSED"), (75, True, ": met"), (85, True, "stretch")]
)
def test_a_goal_is_met_or_missed(ours, met, said):
    (entry,) = judged(measured("ours_triton", ours), measured("sdpa_cudnn", 100))
    assert entry["goal"] == 0.75
    assert entry["met"] is met
    report = goals.report([entry])
    assert said in report
    assert f"{int(met)} of 1 goals met." in report


def test_goals_differ_by_what_they_are_for():
    def goal(peer, **where):
        entries = judged(measured("ours_triton", 50, **where), measured(peer, 100, **where))
        return entries[0].get("goal")

    full = "dense/T4096/D128/full"
    small = {"Tq": 512, "D": 128}
    assert goal("sdpa_cudnn", case=full) == 0.82
    assert goal("sdpa_cudnn", case=full, shape=small) is None
    assert goal("sdpa_cudnn", shape={"Tq": 512, "D": 64}) == 0.95
    assert goal("sdpa_flash", case=full, shape=small) == 1.25
    assert goal("sdpa_cudnn", direction="backward") == 0.60
    assert goal("sdpa_cudnn", direction="backward", shape={"Tq": 512, "D": 64}) == 0.70
    assert goal("sdpa_cudnn", window_size=[1023, 0]) is None
    assert goal("varlen_attn") is None
    assert goal("varlen_attn", case="varlen/x", window_size=[1023, 0]) == 0.75
    assert goal("ours_padded", case="varlen/x", direction="backward") == 0.90
    assert goal("sdpa_cudnn", dtype="float32") is None
    assert goal("plain") is None


def test_goals_are_judged_on_their_own_device_only():
    (entry,) = judged(measured("ours_triton", 50), measured("sdpa_cudnn", 100), device="NVIDIA L4")
    assert entry["ratio"] == 0.5
    assert entry["met"] is None
    assert "not judged here" in goals.report([entry])


def test_refusing_misses_the_goal_and_a_peer_that_refuses_sets_none():
    mine = measured("ours_triton", 0) | {"refused": "why"}
    (entry,) = judged(mine, measured("sdpa_cudnn", 100), measured("plain", 1))
    assert entry["met"] is False
    assert "(ours refused: why)" in goals.report([entry])
    assert judged(measured("ours_triton", 9), measured("sdpa_cudnn", 0) | {"refused": "x"}) == []


def test_the_ratio_to_the_padded_kernel_is_of_flops():
    """Packed in 1 s what the dense kernel does 4 times of in 2 s: half its speed."""
    entries = judged(
        measured("ours_triton", 1.0, case="varlen/x"), measured("ours_padded", 2.0, case="varlen/x")
    )
    assert entries[0]["ratio"] == 0.5


# ---- the runner ----------------------------------------------------------------------------


def test_helpers_are_no_ops():
    assert "flash_attention" in run.ops()
    assert not {"run", "tune", "goals", "machine", "attention_cases"} & set(run.ops())


def test_cases_and_peers_are_chosen_by_name(capsys):
    arguments = ["flash_attention", "--smoke", "--device", "cpu", "--repeats", "1"]
    assert run.main([*arguments, "--cases=decode/*ragged*", "--skip=flex,sdpa_math"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  ")]
    assert any("ours_torch" in line for line in lines)
    assert not any("flex" in line or "sdpa_math" in line for line in lines)
    assert all(line.startswith("  decode/B3/ragged") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no such op: nothing"),
        (["flash_attention", "--smoke", "--cases=x*"], "matches no case"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--device", "cuda"], "sees no GPU"),
    ],
)
def test_unusable_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        run.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_that_is_stopped_keeps_what_it_measured(monkeypatch, tmp_path):
    def measure(device, only=None, skip=(), **options):
        for case in ("a", "a", "b"):
            yield measured("ours_torch", 1.0, case=case, peak_bytes=1, seconds={"median": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", measure)
    path = tmp_path / "a.json"
    with pytest.raises(KeyboardInterrupt):
        run.main(["flash_attention", "--device", "cpu", "--json", str(path)])
    records = json.loads(path.read_text())["ops"]["flash_attention"]["records"]
    assert [r["case"] for r in records] == ["a", "a"]


def test_the_file_has_one_record_a_line():
    document = {
        "environment": {"device": "x"},
        "ops": {"a": {"flop_formula": "f", "records": [{"n": 1}, {"n": 2}], "ratios": []}},
    }
    text = run.as_text(document)
    assert json.loads(text) == document
    assert '    {"n": 1},\n    {"n": 2}\n' in text


def test_what_the_gpu_says_is_read_field_by_field(monkeypatch):
    answers = {
        "driver_version": "580.1",
        "clocks.max.sm,clocks.max.mem,power.limit": "1980, 3201, [N/A]",
        "clocks.sm,clocks.mem,power.draw,temperature.gpu": "345, 3201, 75.5, 30",
    }

    class Properties:
        name, major, minor, total_memory, multi_processor_count = "NVIDIA H200", 9, 0, 150, 132
        uuid = "1234"

    def nvidia_smi(command, **options):
        assert command[1] == "--id=GPU-1234"
        fields = command[2].removeprefix("--query-gpu=")

        class Done:
            stdout = answers[fields] + "\n"

        return Done

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(machine.subprocess, "run", nvidia_smi)
    facts = machine.environment(torch.device("cuda"))
    assert facts["driver"] == "580.1"
    assert facts["max_sm_mhz"] == 1980
    assert "max_watt" not in facts
    assert facts["before"] == {"sm_mhz": 345, "memory_mhz": 3201, "watt": 75.5, "celsius": 30}

    def absent(command, **options):
        raise FileNotFoundError

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine.gpu_state(torch.device("cuda")) == {}
    assert machine.environment(torch.device("cuda"))["device"] == "NVIDIA H200"


def test_a_gpu_that_waits_for_its_host_is_marked():
    record = {"case": "x", "direction": "forward", "implementation": "ours_triton"}
    record |= {"seconds": {"median": 1e-5}, "tflops_per_second": 1.0, "peak_bytes": 1}
    assert "host" not in run.line(record | {"host_bound": False})
    assert "bound by the host" in run.line(record | {"host_bound": True})


def test_ours_on_a_gpu_is_the_triton_kernel():
    names = list(peers(bench_case("varlen", (9, 4)), torch.device("cuda")))
    assert names[:2] == ["ours_triton", "ours_padded"]


def test_timing_is_a_median_of_many(monkeypatch):
    seen = {}

    def spy(functions, *, repeats, device):
        seen.update(repeats=repeats, names=list(functions))
        return {name: Timing(2.0, 1.0, 3.0, repeats) for name in functions}

    monkeypatch.setattr(benchmark, "time_interleaved", spy)
    case = bench_case("dense", (9,), causal=True)
    prepared = {name: (lambda: Prepared(right, BATCH)) for name in ("ours_torch", "peer")}
    monkeypatch.setattr(benchmark, "peers", lambda case, device: prepared)
    forward = next(benchmark.CaseRun(case, torch.float32, CPU, 7).records())
    assert seen == {"repeats": 7, "names": ["ours_torch", "peer"]}
    assert forward["seconds"] == {"median": 2.0, "p20": 1.0, "p80": 3.0}
    assert forward["calls"] == 7


def test_decoding_is_timed_as_a_graph_where_that_can_be(monkeypatch):
    """Without a GPU: what is recorded, not the capture itself."""
    case = bench_case("decode", (1, 1), (20, 9))
    one = benchmark.CaseRun(case, torch.float32, CPU, 1)
    call, graph = (lambda: None), (lambda: None)
    assert one._timed(call) == (call, {})
    one.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(benchmark, "as_graph", lambda call: graph)
    assert one._timed(call) == (graph, {"timed": "replay of a CUDA graph"})

    def refuse(call):
        raise RuntimeError("cannot capture")

    monkeypatch.setattr(benchmark, "as_graph", refuse)
    assert one._timed(call) == (call, {"timed": "one by one: RuntimeError: cannot capture"})
    # Its launches by the host are no bound where one replay launches all.
    monkeypatch.setattr(benchmark, "_host_seconds", lambda call, device: 1.0)
    timing = Timing(0.5, 0.5, 0.5, 1)
    assert one._host(call, timing, {"timed": "one by one: x"})["host_bound"]
    assert not one._host(call, timing, {"timed": "replay of a CUDA graph"})["host_bound"]
