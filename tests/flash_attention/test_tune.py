"""Looking for launch configurations: what is planned, what is discarded, who wins."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import tune
from benchmarks.attention_cases import BenchCase
from benchmarks.tune import Plan, make_plan, ranking, space, table_row, time_plan
from course_lib.flash_attention import flash_attention, launches
from course_lib.flash_attention.launches import LaunchConfig, launch_config
from course_lib.runtime.crosscompile import GateReport
from course_lib.runtime.measure import Timing
from course_lib.runtime.tile import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")

A, B, C = LaunchConfig(64, 32, 4, 2), LaunchConfig(64, 64, 4, 2), LaunchConfig(128, 32, 8, 3)
CPU = torch.device("cpu")


def plan_of(*candidates: LaunchConfig, kernel: str = "fwd") -> Plan:
    table = launch_config(kernel, 90, 128, 2)
    return Plan(kernel, 90, 128, "bf16", 0, "3", table, candidates, {})


@pytest.fixture
def gate(monkeypatch):
    """The launches that were compiled; four warps fail for windows."""
    asked = []

    def check(listed):
        asked.extend(listed)
        failing = [x.name for x in listed if x.num_warps == 4 and "window" in x.name]
        return GateReport({}, [], [f"{name}: spills" for name in failing], {})

    monkeypatch.setattr(tune, "check_launches", check)
    return asked


def test_space_is_every_combination():
    assert len(set(space([64, 128], [32, 64], [4, 8], [1, 2, 3]))) == 24


def test_a_candidate_passes_in_every_mode_of_the_table(gate):
    plan = make_plan("fwd", 90, 128, "bf16", [C])
    assert plan.candidates == (C,)
    modes = {launch.name.split("/", 4)[4] for launch in gate}
    assert modes == {"full", "causal", "window", "causal/varlen", "window/varlen"}
    assert {launch.constexprs["BLOCK_M"] for launch in gate} == {128}


def test_what_fails_in_one_mode_is_discarded_with_the_reason(gate):
    plan = make_plan("fwd", 90, 128, "bf16", [A, C])
    assert plan.candidates == (C,)
    assert plan.discarded == {"(64, 32, 4, 2)": "fwd/sm_90/d128/bf16/window: spills"}


def test_the_table_is_no_candidate_of_itself(gate):
    table = launch_config("fwd", 90, 128, 2)
    assert make_plan("fwd", 90, 128, "bf16", [table]).candidates == ()
    assert not gate


def test_sums_that_no_register_holds_need_no_compiler(gate):
    huge = LaunchConfig(256, 128, 4, 2)
    assert "registers" in make_plan("fwd", 90, 128, "bf16", [huge]).discarded[tune.words(huge)]
    assert not gate
    # Blackwell keeps sums elsewhere, and dK, dV are two sums of BLOCK_N rows.
    assert make_plan("fwd", 100, 64, "bf16", [LaunchConfig(256, 128, 4, 2)]).candidates == ()
    assert gate
    gate.clear()
    tall, wide = LaunchConfig(128, 16, 4, 2), LaunchConfig(16, 128, 4, 2)
    plan = make_plan("bwd_dkdv", 90, 128, "bf16", [tall, wide])
    assert "registers" in plan.discarded[tune.words(wide)]
    assert "registers" not in plan.discarded[tune.words(tall)]


def test_admitted_bytes_reach_the_gate(gate):
    make_plan("fwd", 90, 128, "bf16", [C], admit=64)
    assert {launch.admitted_spills for launch in gate} == {64}


def test_decoding_is_compiled_with_and_without_splits(gate):
    make_plan("decode", 90, 128, "bf16", [C])
    assert {launch.name.rsplit("/")[-1] for launch in gate} == {"split", "whole"}


def test_no_row_no_plan():
    with pytest.raises(ValueError, match="sm_75, fp16 and D = 256"):
        make_plan("fwd", 75, 256, "fp16", [A])


def test_the_compiler_is_asked():
    """One that passes, and one whose scores fill the registers."""
    small, huge = LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 512, 8, 4)
    plan = make_plan("fwd", 86, 16, "bf16", [small, huge])
    assert plan.candidates == (small,)
    assert "spills" in plan.discarded[tune.words(huge)]


def test_a_row_is_the_table_s_for_a_while_only():
    plan = plan_of(A)
    before = launch_config("fwd", 90, 128, 2)

    def tuning() -> None:
        with table_row(plan) as use:
            use(A)
            assert launch_config("fwd", 90, 128, 2) == A
            assert launch_config("fwd", 90, 64, 2) != A
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuning()
    assert launch_config("fwd", 90, 128, 2) == before


def test_a_plan_is_read_as_it_was_written():
    plan = plan_of(A, B)
    assert Plan.from_json(plan.as_json()) == plan
    for spoilt in ("[]", "{}", '{"table": 3}', "?"):
        with pytest.raises(ValueError, match="not a plan"):
            Plan.from_json(spoilt)


def timings(**medians: float) -> dict[LaunchConfig, Timing]:
    configs = {"A": A, "B": B, "C": C, "table": plan_of().table}
    return {configs[n]: Timing(t, t * 0.99, t * 1.01, 9) for n, t in medians.items()}


def test_the_winner_is_best_over_all_cases():
    plan = plan_of(A, B, C)
    found = {
        "full": timings(table=1.0, A=0.5, B=0.8, C=0.1),
        "causal": timings(table=1.0, A=1.5, B=0.8),
    }
    assert [(c, round(s, 3), beyond) for c, s, beyond in ranking(plan, found)] == [
        (B, 1.25, True),
        (A, 1.155, False),  # slower in one of them
    ]
    assert "(64, 64, 4, 2) is × 1.250 of" in tune.verdict(plan, found)


def test_within_the_spread_the_table_stays():
    found = {"full": timings(table=1.0, A=0.995)}
    assert "Nothing beats the table's" in tune.verdict(plan_of(A), found)


def fake_attention(wrong: LaunchConfig):
    """Attention whose result depends on the table's row, as a kernel's with a bad tile would."""

    def attention(q, k, v, **options):
        config = launch_config("fwd", 90, 128, 2)
        if config == C:
            raise RuntimeError("out of resources")
        out = flash_attention(q, k, v, causal=options["causal"], implementation="torch")
        return 1.1 * out if config == wrong else out

    return attention


@pytest.mark.parametrize("kernel", ["fwd", "bwd_dq"])
def test_only_what_computes_the_same_is_timed(kernel, monkeypatch, capsys):
    plan = plan_of(A, B, C, kernel="fwd")
    # The backward of the fake is that of PyTorch, whatever row it runs with.
    monkeypatch.setattr(tune, "flash_attention", fake_attention(B if kernel == "fwd" else A))
    case = BenchCase("x", "dense", (40,), (40,), 2, 2, 128, causal=True)
    if kernel != "fwd":
        plan = dataclasses.replace(plan_of(A, B, kernel=kernel))
    found = time_plan(plan, [case], CPU, repeats=1)["x"]
    if kernel == "fwd":
        assert set(found) == {plan.table, A}
        said = capsys.readouterr().out
        assert "(64, 64, 4, 2): differs from the table's by 1.0e-01" in said
        assert "(128, 32, 8, 3): cannot be launched, RuntimeError: out of resources" in said
    else:
        assert set(found) == {plan.table, A, B}
    assert all(timing.n == 1 for timing in found.values())


def test_the_quick_round_keeps_the_table_and_the_best(monkeypatch):
    many = [LaunchConfig(64, 64, 4, stages) for stages in range(2, 20)]
    plan = plan_of(*many)
    rounds = []

    def time_all(functions, *, repeats, device):
        rounds.append(list(functions))
        # The later, the faster; the table's, first, is the slowest.
        return {n: Timing(1.0 / (i + 1), 0.0, 9.0, repeats) for i, n in enumerate(functions)}

    monkeypatch.setattr(tune, "time_interleaved", time_all)
    monkeypatch.setattr(tune, "flash_attention", fake_attention(C))
    case = BenchCase("x", "dense", (9,), (9,), 2, 2, 128)
    assert set(time_plan(plan, [case], CPU, repeats=3)["x"]) == {plan.table, *many[-8:]}
    assert len(rounds[0]) == 19


def test_tuning_cases_are_grouped_where_the_kernel_is():
    for kernel, group in (("fwd", 1), ("bwd_dkdv_grouped", 4)):
        for case in tune.tuning_cases(plan_of(kernel=kernel)):
            assert case.Hq == group * case.Hkv
    for kernel, few in (("decode", True), ("decode_rows", False)):
        for case in tune.tuning_cases(dataclasses.replace(plan_of(), kernel=kernel)):
            assert (case.Hq // case.Hkv <= 16) == few


def test_splits_are_timed_against_the_rule():
    cases = [BenchCase("c", "decode", (1,) * 2, (70,) * 2, 4, 2, 16)]
    found = tune.time_splits([1, 3], cases, CPU, repeats=1, implementation="torch")
    assert list(found["c"]) == ["rule", "1", "3"]
    rule = Timing(2e-6, 0, 0, 1)
    line = tune.splits_in_words({"c": {"rule": rule, "4": Timing(3e-6, 0, 0, 1)}})
    assert "2.0 µs   4: 1.50" in line


def test_the_command_plans_here_and_times_there(gate, tmp_path, capsys):
    path = tmp_path / "plan.json"
    tiles = ["--block-m", "128", "--block-n", "32", "--warps", "4,8", "--stages", "3"]
    assert tune.main(["flash_attention", *tiles, "--write-plan", str(path)]) == 0
    plan = Plan.from_json(path.read_text())
    assert plan.candidates == (C,)
    gate.clear()
    assert tune.main(["flash_attention", "--plan", str(path)]) == 0
    assert "Nothing is timed" in capsys.readouterr().out
    assert not gate  # the same Triton
    path.write_text(dataclasses.replace(plan, triton="3.0").as_json())
    assert tune.main(["flash_attention", "--plan", str(path)]) == 0
    assert "Planned with Triton 3.0" in capsys.readouterr().out
    assert gate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-m", "48"], "powers of two"),
        (["--plan", "nowhere.json"], "nowhere.json"),
        (["--arch", "75", "--head-dim", "256", "--dtype", "fp16"], "no fwd for sm_75"),
        (["--kernel", "bwd_all"], "invalid choice"),
    ],
)
def test_unusable_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(["flash_attention", *arguments])
    assert message in capsys.readouterr().err


def test_all_kernels_of_the_tables_can_be_planned():
    for kernel in tune.TABLES:
        listed = list(tune.modes_of(kernel, 90, 128, "bf16", launches.LaunchConfig(64, 32, 4, 2)))
        assert len({launch.name for launch in listed}) == len(listed) >= 2
