"""Decoding against a cache: the fp64 oracle, what may never be read, splits, and the interface."""

import dataclasses
import inspect
import math

import pytest
import torch

from course_lib.flash_attention import decode, flash_attention, reference_attention
from course_lib.flash_attention.decode import flash_attention_decode, launch_decode
from course_lib.flash_attention.decode_launches import (
    MOST_SPLITS,
    TABLE,
    choose_splits,
    decode_config,
)
from course_lib.flash_attention.launches import table_architecture
from course_lib.runtime.interpreter import interpreted
from course_lib.runtime.numerics import poisoned_copy, poisoned_view
from course_lib.runtime.tile import HAS_TRITON
from tests.flash_attention.decode_harness import (
    CASES,
    DecodeCase,
    assert_matches_oracle,
    make,
    run_if,
    seen_keys,
)

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")
IMPLEMENTATIONS = [pytest.param("triton", marks=needs_triton), "torch"]
ALL = [pytest.param(case, id=case.name) for case in CASES]
BY_NAME = {case.name: case for case in CASES}


# ---- numbers -------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("case", ALL)
def test_triton_fp32(case):
    with interpreted() as run:
        assert_matches_oracle(case, torch.float32, "triton")
    some = case.B * case.Tq > 0
    assert len(run.launches) == (0 if not some else 1 if case.splits is None else 2)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["lengths", "group_of_7_by_5", "window", "heavy_tailed", "padded_80", "late_max"]
)
def test_triton_half(name, dtype):
    with interpreted():
        assert_matches_oracle(BY_NAME[name], dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALL)
def test_torch(case, dtype):
    assert_matches_oracle(case, dtype, "torch")


@pytest.mark.parametrize("case", ALL)
def test_torch_fp64(case):
    assert_matches_oracle(case, torch.float64, "auto")


@pytest.mark.parametrize("case", ALL)
def test_torch_in_many_blocks(case, monkeypatch):
    monkeypatch.setattr(decode, "SCORE_ELEMENTS", 1)  # blocks of 16 keys
    assert_matches_oracle(case, torch.float32, "torch")


@needs_triton
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("name", ["lengths", "group_of_7_by_5", "window_of_some_queries"])
def test_any_number_of_splits(name, splits):
    with interpreted():
        assert_matches_oracle(BY_NAME[name], torch.float32, "triton", splits=splits)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("case", ALL)
def test_triton_more_seeds(case, seed):
    with interpreted():
        assert_matches_oracle(case, torch.float32, "triton", seed=seed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_what_flash_attention_gives_for_the_last_queries(implementation):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 50, 16, generator=generator) for h in (4, 2, 2))
    whole = flash_attention(q, k, v, causal=True, implementation="torch")
    with run_if(implementation):
        last = flash_attention_decode(q[:, :, -3:], k, v, implementation=implementation)
    torch.testing.assert_close(last, whole[:, :, -3:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_without_keys(implementation):
    case = DecodeCase("x", 3, 4, 2, 3, 40, 16, lengths=(0, 2, 40), splits=3)
    x = make(case, torch.float32)
    with run_if(implementation):
        out, lse = flash_attention_decode(
            *x, splits=3, return_lse=True, implementation=implementation
        )
    blind = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    blind = blind[:, None].expand(3, 4, 3)
    assert (out[blind] == 0).all()
    assert (lse[blind] == -math.inf).all()
    assert lse[~blind].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_future_does_not_leak(implementation):
    """Change the last key and value: only the last query moves."""
    x = make(BY_NAME["five_queries"], torch.float32)
    q, k, v = x.q[:1], x.k_cache[:1], x.v_cache[:1]
    options = {"splits": 3, "implementation": implementation}
    with run_if(implementation):
        before = flash_attention_decode(q, k, v, **options)
        k, v = k.clone(), v.clone()
        k[:, :, -1] += 3.0
        v[:, :, -1] -= 2.0
        after = flash_attention_decode(q, k, v, **options)
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])
    assert not torch.isclose(before[:, :, -1], after[:, :, -1]).all(dim=-1).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_equal_to_the_bit(implementation):
    case = BY_NAME["heavy_tailed"]
    with run_if(implementation):
        first, second = (
            flash_attention_decode(
                *make(case, torch.float32), splits=3, implementation=implementation
            )
            for _ in range(2)
        )
    assert torch.equal(first, second)


# ---- memory --------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("name", ["lengths", "group_of_7_by_5", "window", "padded_72", "plain"])
def test_the_cache_is_read_once_a_group_and_nowhere_else(name):
    """Every key and value that some query sees, once for all query heads of its group."""
    case = BY_NAME[name]
    with interpreted(trace=True) as run:
        flash_attention_decode(
            *make(case, torch.float32),
            window_size=(case.left, 0),
            splits=case.splits,
            implementation="triton",
        )
    seen = sum(keys.stop - keys.start for keys in seen_keys(case))
    for tensor in ("k", "v"):
        accesses = [a for a in run.launches[0].accesses if a.tensor == tensor]
        assert sum(a.elements for a in accesses) == seen * case.Hkv * case.D


@needs_triton
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("Tq", "D"), [(1, 24), (3, 72)])
def test_kernels_stay_inside_their_tensors(Tq, D, splits):
    case = DecodeCase("x", 2, 6, 2, Tq, 70, D, lengths=(70, 37))
    x = make(case, torch.float32)
    rows = x.q.reshape(2, 2, 3 * Tq, D)
    inputs = {
        "q": poisoned_copy(rows),
        "k": poisoned_copy(x.k_cache),
        "v": poisoned_copy(x.v_cache),
    }
    sizes = {"parts": (splits, *rows.shape), "lses": (splits, *rows.shape[:3])}
    results = {n: poisoned_view((math.prod(size),), torch.float32) for n, size in sizes.items()}
    parts, lses = (results[name].view.view(size) for name, size in sizes.items())
    config = decode_config(None, rows.shape[2], D, 4)
    with interpreted():
        views = [poisoned.view for poisoned in inputs.values()]
        given = (*views, x.cache_seqlens, parts, lses)
        launch_decode(*given, Tq=Tq, left=-1, scale=D**-0.5, config=config)  # pyright: ignore[reportCallIssue]
    for name, poisoned in {**inputs, **results}.items():
        poisoned.assert_border_untouched(name=name)
    assert not parts.isnan().any()
    assert not lses.isnan().any()


@needs_triton
@pytest.mark.parametrize("splits", [1, 4])
def test_lengths_that_nobody_checked_reach_no_other_memory(splits, monkeypatch):
    """While a CUDA graph is captured no length is looked at; the interpreter guards the bounds."""
    monkeypatch.setattr(decode, "_check_lengths", lambda *_: None)
    x = make(BY_NAME["group_of_4"], torch.float32)
    whole = make(dataclasses.replace(BY_NAME["group_of_4"], lengths=None), torch.float32)
    wrong = torch.tensor([2**31 - 1, -5], dtype=torch.int32)
    for implementation in ("triton", "torch"):
        with interpreted():
            options = {"splits": splits, "implementation": implementation}
            out = flash_attention_decode(x.q, *whole[1:3], wrong, **options)
            full = flash_attention_decode(x.q, *whole[1:3], **options)
        assert torch.equal(out[0], full[0])
        assert (out[1] == 0).all()


# ---- splits --------------------------------------------------------------------------------


def test_splits_fill_the_gpu_and_no_more():
    for multiprocessors in (40, 108, 132):
        for programs in (1, 8, 40, 264, 1000):
            for keys in (0, 1, 255, 256, 5000, 10**6):
                splits = choose_splits(programs, keys, multiprocessors)
                assert 1 <= splits <= MOST_SPLITS
                if splits > 1:
                    assert programs * splits <= 2 * multiprocessors
                    assert splits * 256 <= keys
    assert choose_splits(8, 10**6, 132) == 33  # 264 programs: two a multiprocessor
    assert choose_splits(8, 4096, 132) == 16  # 256 keys each
    assert choose_splits(1, 10**7, 132) == 128


@needs_triton
def test_the_choice_counts_batch_heads_rows_and_window(monkeypatch):
    seen = []
    monkeypatch.setattr(decode, "choose_splits", lambda *args: seen.append(args) or 1)
    q, cache = torch.zeros(3, 28, 5, 16), torch.zeros(3, 2, 300, 16)
    with interpreted():
        flash_attention_decode(q, cache, cache, implementation="triton")
        flash_attention_decode(q[:, :, :1], cache, cache, implementation="triton")
        flash_attention_decode(q, cache, cache, window_size=(99, 0), implementation="triton")
    # 14 heads a group: 70 rows are two tiles of 64, and 14 rows one of 16.
    assert [args[:2] for args in seen] == [(12, 300), (6, 300), (12, 104)]


def test_the_launch_table_covers_every_gpu_and_head_dimension():
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        arch = table_architecture(capability)
        for rows in (1, 16, 17, 1000):
            for itemsize in (2, 4):
                for D in (16, 17, 64, 72, 80, 128, 129, 256)[: 6 if arch == 75 else 8]:
                    config = decode_config(arch, rows, D, itemsize)
                    assert config.BLOCK_M in ((16,) if rows <= 16 else (16, 32, 64))
                    assert config.num_warps in (4, 8)
    with pytest.raises(ValueError, match=r"no decode configuration for sm_75 and head dim.* 256"):
        decode_config(75, 1, 256, 2)
    assert set(TABLE) == {"decode", "decode_rows"}


# ---- lengths -------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("values", [(-1, 5), (5, 71)])
def test_lengths_outside_the_cache(values, implementation):
    q, cache = torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 70, 16)
    lengths = torch.tensor(values, dtype=torch.int32)
    message = rf"cache_seqlens must lie between 0 and 70, .* from {min(values)} to {max(values)}"
    with run_if(implementation):
        for _ in range(2):  # a refused tensor is not remembered as a good one
            with pytest.raises(ValueError, match=message):
                flash_attention_decode(q, cache, cache, lengths, implementation=implementation)


def test_lengths_are_read_once_for_each_tensor_and_version(monkeypatch):
    reads = []
    aminmax = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda x: reads.append(x) or aminmax(x))
    q, cache = torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 70, 16)
    lengths = torch.tensor([3, 69], dtype=torch.int32)

    def reads_of_a_call(cache=cache, lengths=lengths):
        reads.clear()
        flash_attention_decode(q, cache, cache, lengths)
        return len(reads)

    assert reads_of_a_call() == 1
    assert reads_of_a_call() == 0  # the next layer
    lengths += 1
    assert reads_of_a_call() == 1  # the next step
    assert reads_of_a_call() == 0
    with pytest.raises(ValueError, match=r"between 0 and 69"):
        reads_of_a_call(cache=cache[:, :, :69])
    lengths += 1
    with pytest.raises(ValueError, match=r"from 5 to 71"):
        reads_of_a_call()
    assert reads_of_a_call(lengths=torch.zeros(2, dtype=torch.int32)) == 1
    with torch.inference_mode():
        unversioned = torch.ones(2, dtype=torch.int32)
        assert [reads_of_a_call(lengths=unversioned) for _ in range(2)] == [1, 0]


def test_lengths_are_not_remembered_longer_than_they_live():
    q, cache = torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 70, 16)
    before = len(decode._checked_lengths)
    for length in range(20):
        flash_attention_decode(q, cache, cache, torch.full((2,), length, dtype=torch.int32))
    assert len(decode._checked_lengths) <= before + 1


# ---- the interface -------------------------------------------------------------------------


def test_messages():
    q, k, v = torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 7, 16), torch.zeros(2, 2, 7, 16)
    lengths = torch.ones(2, dtype=torch.int32)
    call: object = flash_attention_decode

    def refuses(error, message, q=q, k=k, v=v, lengths=lengths, **options):
        with pytest.raises(error, match=message):
            call(q, k, v, lengths, **options)  # pyright: ignore[reportCallIssue]

    refuses(ValueError, r"q must have 4 dimensions \[B, H, T, D\], got .*\(4, 1, 16\)", q=q[0])
    refuses(ValueError, r"k_cache must have the batch size of q, 2, got 1", k=k[:1])
    refuses(ValueError, r"v_cache must have the head dimension of q, 16, got 8", v=v[..., :8])
    refuses(ValueError, r"v_cache must have .* k_cache, \(2, 7\), got \(2, 6\)", v=v[:, :, 1:])
    refuses(ValueError, r"heads of q must be a multiple .* got 3 and 2", q=q[:, :3])
    refuses(ValueError, r"head dimension of at least 1", q=q[..., :0])
    strided = k.transpose(2, 3).contiguous().transpose(2, 3)
    refuses(ValueError, r"k_cache must have stride 1 in its last .* \(224, 112, 1, 7\)", k=strided)
    refuses(TypeError, r"k_cache must have the dtype of q, torch.float32, got .*16", k=k.half())
    refuses(TypeError, r"v_cache must be a torch.Tensor, got list", v=[1.0])
    refuses(ValueError, r"v_cache must be on the device of q, cpu, got meta", v=v.to("meta"))
    refuses(TypeError, r"cache_seqlens must be a torch.Tensor or None, got list", lengths=[1, 2])
    refuses(TypeError, r"cache_seqlens must be int32, got torch.int64", lengths=lengths.long())
    refuses(
        ValueError, r"cache_seqlens must have shape \[B\], \(2,\), got \(1,\)", lengths=lengths[:1]
    )
    refuses(ValueError, r"cache_seqlens must be on the device of q", lengths=lengths.to("meta"))
    refuses(TypeError, r"window_size must be a pair of ints .* got 5", window_size=5)
    refuses(
        TypeError, r"window_size must be a pair of ints .* got \(1.0, 0\)", window_size=(1.0, 0)
    )
    refuses(ValueError, r"window_size must .* got \(-2, 0\)", window_size=(-2, 0))
    refuses(ValueError, r"scale must be positive and finite, got 0.0", scale=0.0)
    refuses(TypeError, r"splits must be an int or None, got 2.0", splits=2.0)
    refuses(ValueError, r"splits must be at least 1, got 0", splits=0)
    refuses(ValueError, r"one of \('auto', 'triton', 'torch'\), got 'x'", implementation="x")


def test_no_gradients():
    q, cache = torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 7, 16)
    with pytest.raises(RuntimeError, match=r"no backward, and q requires a gradient"):
        flash_attention_decode(q.clone().requires_grad_(), cache, cache)
    with pytest.raises(RuntimeError, match=r"v_cache requires a gradient.*torch.no_grad"):
        flash_attention_decode(q, cache, cache.clone().requires_grad_())
    with torch.no_grad():
        out = flash_attention_decode(q.clone().requires_grad_(), cache, cache)
    assert not out.requires_grad


def test_the_right_side_of_the_window_is_causal_anyway():
    x = make(BY_NAME["window"], torch.float32)
    results = [flash_attention_decode(*x, window_size=(40, right)) for right in (-1, 0, 3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_triton
def test_triton_runs_triton_or_raises():
    q, cache = torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 7, 16)
    with pytest.raises(RuntimeError, match=r'"triton" needs CUDA tensors, got device cpu'):
        flash_attention_decode(q, cache, cache, implementation="triton")
    with interpreted() as run:
        with pytest.raises(TypeError, match=r"must be fp16, bf16 or fp32 .* got torch.float64"):
            flash_attention_decode(
                *(x.double() for x in (q, cache, cache)), implementation="triton"
            )
        with pytest.raises(ValueError, match=r"head dimension of 16 to 256 .* got 8"):
            flash_attention_decode(
                *(x[..., :8] for x in (q, cache, cache)), implementation="triton"
            )
        flash_attention_decode(q, cache, cache)
        flash_attention_decode(q, cache, cache, implementation="torch")
        assert not run.launches
        flash_attention_decode(q, cache, cache, implementation="triton")
        assert [launch.kernel for launch in run.launches] == ["flash_attention_decode_kernel"]
        flash_attention_decode(q, cache, cache, splits=2, implementation="triton")
        assert run.launches[-1].kernel == "merge_attention_states_fwd_kernel"


def test_defaults_are_those_of_the_reference():
    ours = inspect.signature(flash_attention_decode).parameters
    reference = inspect.signature(reference_attention).parameters
    for name in ("window_size", "scale", "return_lse"):
        assert ours[name].default == reference[name].default
        assert ours[name].kind == reference[name].kind


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["lengths", "plain", "no_batch"])
def test_opcheck(name, implementation):
    case = BY_NAME[name]
    x = make(case, torch.float32)
    x = [t.nan_to_num(0.0) if t is not None and t.is_floating_point() else t for t in x]
    with run_if(implementation):
        torch.library.opcheck(
            torch.ops.course_lib.flash_attention_decode,
            (*x, -1, 0.25, case.splits, implementation),
        )


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("return_lse", [False, True])
def test_compile_fullgraph(implementation, return_lse):
    torch._dynamo.reset()
    x = make(BY_NAME["lengths"], torch.float32)

    def step(q, k, v, lengths):
        result = flash_attention_decode(
            2.0 * q,
            k,
            v,
            lengths,
            splits=2,
            window_size=(60, 0),
            return_lse=return_lse,
            implementation=implementation,
        )
        return result[0].sin() + result[1][..., None] if return_lse else result.sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with run_if(implementation), torch.no_grad():
        torch.testing.assert_close(compiled(*x), step(*x))


def test_compiled_code_checks_lengths_too():
    torch._dynamo.reset()
    compiled = torch.compile(flash_attention_decode, fullgraph=True, backend="aot_eager")
    q, cache = torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 70, 16)
    lengths = torch.tensor([3, 70], dtype=torch.int32)
    compiled(q, cache, cache, lengths)
    lengths += 1
    with pytest.raises(ValueError, match=r"from 4 to 71"):
        compiled(q, cache, cache, lengths)


def test_compile_follows_a_growing_cache():
    torch._dynamo.reset()
    compiled = torch.compile(
        flash_attention_decode, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for T in (5, 9, 17):
        q, cache = torch.randn(1, 4, 1, 16), torch.randn(1, 2, T, 16)
        assert torch.equal(compiled(q, cache, cache), flash_attention_decode(q, cache, cache))
