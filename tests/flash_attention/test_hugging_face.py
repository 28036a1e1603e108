"""Models of transformers on flash_attention: equal to their own attention, and nothing leaks."""

# torch.compiler.disable hides the arguments of what it decorates.
# pyright: reportCallIssue=false

from __future__ import annotations

import copy
import functools
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from course_lib.flash_attention import hugging_face, hugging_face_masks, reference_attention
from course_lib.flash_attention.band import EVERYTHING, Band
from course_lib.flash_attention.hugging_face import REFUSED, attention, register_attention
from course_lib.flash_attention.hugging_face_masks import CAUSAL, Pattern, flash_mask
from course_lib.runtime.interpreter import interpreted
from course_lib.runtime.numerics import assert_within_budget, budget
from course_lib.runtime.tile import HAS_TRITON

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'course_lib[wild]'"
)
masking_utils = pytest.importorskip("transformers.masking_utils")

OURS = register_attention("course_test", implementation="torch")
TRITON = register_attention("course_test_triton", implementation="triton")
# With this name, vision towers hand over all their images in one call.
VARLEN = register_attention("course_test_flash", implementation="torch")

T, VOCABULARY, WINDOW = 19, 64, 5
LENGTHS = [5, 1, 13]
KINDS = ["llama", "mistral", "gemma3"]
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
}


@functools.cache
def tiny(kind: str, **changes) -> Any:
    """A random model in fp64, the same in every call."""
    t = transformers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES | changes))
        elif kind == "mistral":
            model = t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=WINDOW))
        elif kind == "gemma3":  # layers with a window and layers without, a scale of its own
            layers = ["sliding_attention", "full_attention"]
            config = t.Gemma3TextConfig(
                **SIZES, head_dim=16, layer_types=layers, sliding_window=WINDOW
            )
            model = t.Gemma3ForCausalLM(config)
        elif kind == "bart":  # an encoder, a decoder, and attention from one to the other
            sizes = {"d_model": 64, "vocab_size": VOCABULARY, "dropout": 0.0}
            for part in ("encoder", "decoder"):
                sizes |= {f"{part}_layers": 1, f"{part}_ffn_dim": 48}
                sizes[f"{part}_attention_heads"] = 4
            model = t.BartForConditionalGeneration(t.BartConfig(**sizes))
        elif kind == "modernbert":  # no causality, and a window on both sides
            sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
            special = dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id"), 0)
            special |= dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
            config = t.ModernBertConfig(**sizes, **special, local_attention=6)
            model = t.ModernBertForMaskedLM(config)
        else:
            raise ValueError(kind)
    return model.double().eval()


def on(model: Any, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of the model that runs on an attention."""
    model = copy.deepcopy(model).to(dtype)
    # A name with "flash" in it cannot be set in another way.
    parts = {"text_config": name, "vision_config": name}
    model.set_attn_implementation(parts if name == VARLEN else name)
    return model


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(rows: int = 2, length: int = T) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator)


def packed_positions(lengths: list[int] = LENGTHS) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def cu_seq_lens(lengths: list[int], rows: int = 1) -> dict[str, object]:
    cu = torch.tensor([0, *lengths * rows]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def padding(side: str, hidden: int = 6) -> torch.Tensor:
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, slice(hidden) if side == "left" else slice(-hidden, None)] = 0
    return mask


def situation(name: str) -> tuple[dict, dict, torch.Tensor]:
    """Arguments for our attention, those for the others to do the same, and which tokens count."""
    everything = torch.ones(2, T, dtype=torch.bool)
    positions = packed_positions().expand(2, -1)
    separate = {"position_ids": positions, "use_cache": False}
    match name:
        case "plain":
            return {}, {}, everything
        case "without cache":
            return {"use_cache": False}, {"use_cache": False}, everything
        case "left padding" | "right padding":
            mask = padding(name.split()[0])
            return {"attention_mask": mask}, {"attention_mask": mask}, mask.bool()
        case "positions":
            return separate, separate, everything
        case "cu_seq_lens":
            # With a cache, which hides the packing from the mask function.
            return {"position_ids": positions} | cu_seq_lens(LENGTHS, 2), separate, everything
        case "positions and cu_seq_lens":
            return separate | cu_seq_lens(LENGTHS, 2), separate, everything
    raise ValueError(name)


def run(model, arguments: dict, keep: Any) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of all parameters."""
    dtype = next(model.parameters()).dtype
    logits = model(**arguments).logits[keep]
    model.zero_grad()
    (logits * draw(*logits.shape).to(dtype)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | gradients


def assert_equal_to_theirs(model, ours: dict, theirs: dict, keep: torch.Tensor, name=OURS) -> None:
    """In fp32 and fp64, logits and gradients, within what fp32 costs transformers itself."""
    # Eager attention takes its softmax in fp32 always, so it is no oracle.
    oracle = run(on(model, "sdpa", torch.float64), as_dtype(theirs, torch.float64), keep)
    eager = run(on(model, "eager"), as_dtype(theirs, torch.float32), keep)
    precision = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    dtypes = (torch.float32,) if name == TRITON else (torch.float32, torch.float64)
    for dtype in dtypes:
        results = run(on(model, name, dtype), as_dtype(ours, dtype), keep)
        assert results.keys() == oracle.keys()
        for part, exact in oracle.items():
            allowed = budget(eager[part], exact, torch.float32)
            if part.endswith("k_proj.bias"):
                # It moves all scores of a query alike, so its gradient is 0, a sum of terms that
                # cancel. They are as large as those of the weight, and so is their rounding.
                weight = part.replace("bias", "weight")
                allowed += budget(eager[weight], oracle[weight], torch.float32)
            if dtype == torch.float64:
                allowed *= precision
            assert_within_budget(results[part], exact, allowed, name=f"{part} ({dtype})")


def as_dtype(arguments: dict, dtype: torch.dtype) -> dict:
    return {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }


# ---- equal to the attention of transformers ------------------------------------------------


CAUSAL_SITUATIONS = [
    *("plain", "without cache", "left padding", "right padding", "positions", "cu_seq_lens"),
    "positions and cu_seq_lens",
]


@pytest.mark.parametrize("name", CAUSAL_SITUATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind, name):
    ours, theirs, keep = situation(name)
    ids = {"input_ids": tokens()}
    assert_equal_to_theirs(tiny(kind), ids | ours, ids | theirs, keep)


@pytest.mark.parametrize("name", ["plain", "left padding", "right padding"])
def test_two_sided_window(name):
    _, arguments, keep = situation(name)
    arguments = {"input_ids": tokens()} | arguments
    assert_equal_to_theirs(tiny("modernbert"), arguments, arguments, keep)


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder_and_decoder(side):
    call = {"input_ids": tokens(), "attention_mask": padding(side)}
    call["decoder_input_ids"] = tokens(length=7)
    everything = torch.ones(2, 7, dtype=torch.bool)
    assert_equal_to_theirs(tiny("bart"), call, call, everything)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")
@pytest.mark.parametrize("name", ["plain", "left padding", "cu_seq_lens"])
def test_triton_kernels(name):
    ours, theirs, keep = situation(name)
    ids = {"input_ids": tokens()}
    with interpreted() as log:
        assert_equal_to_theirs(tiny("mistral"), ids | ours, ids | theirs, keep, TRITON)
    assert {launch.kernel for launch in log.launches} >= {
        "flash_attention_fwd_kernel",
        "flash_attention_bwd_dq_kernel",
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padding"])
def test_generates_the_same_tokens(kind, padded):
    mask = padding("left") if padded else torch.ones(2, T, dtype=torch.long)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = [
        on(tiny(kind), name).generate(tokens(), attention_mask=mask, **options)
        for name in ("eager", OURS)
    ]
    assert texts[0].shape == (2, T + 12)
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padding"])
@torch.no_grad()
def test_a_prompt_in_pieces(kind, padded):
    """Several queries after a cache: the diagonal moves to the bottom right."""
    mask = padding("left") if padded else torch.ones(2, T, dtype=torch.long)
    expected = on(tiny(kind), "sdpa", torch.float64)(tokens(), attention_mask=mask).logits
    model = on(tiny(kind), OURS, torch.float64)
    cache, pieces = None, []
    for start, end in ((0, 7), (7, 8), (8, T)):
        part = model(
            tokens()[:, start:end],
            attention_mask=mask[:, :end],
            # Pieces of a padded row are told where they are, as `generate` does.
            position_ids=torch.arange(start, end)[None],
            past_key_values=cache,
            use_cache=True,
        )
        cache = part.past_key_values
        pieces.append(part.logits)
    # Padded rows are nonsense on both sides; what is measured here is far above rounding.
    difference = (torch.cat(pieces, dim=1) - expected)[mask.bool()].abs().max()
    assert difference < 1e-12
    assert cache.get_seq_length() == T


@pytest.mark.parametrize("use_cache", [False, True])
def test_autocast(use_cache):
    """q and k are rotated in fp32 then, v stays as it is: all are brought to the lower dtype."""
    call = {"input_ids": tokens(), "use_cache": use_cache}
    oracle = on(tiny("llama"), "sdpa", torch.float64)(**call).logits
    with torch.autocast("cpu", torch.bfloat16):
        eager = on(tiny("llama"), "eager")(**call).logits
        ours = on(tiny("llama"), OURS)(**call).logits
    allowed = budget(eager, oracle, torch.bfloat16)
    assert_within_budget(ours, oracle, allowed, name="logits")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    call, _, keep = situation("left padding")
    call = {"input_ids": tokens(), "use_cache": False} | call
    expected = run(on(tiny("llama"), OURS), call, keep)
    model = on(tiny("llama"), OURS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.model.gradient_checkpointing
    found = run(model.train(), call, keep)
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        assert torch.equal(found[part], value), part


# dynamo looks at the .grad of everything between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    "name", ["without cache", pytest.param("left padding", marks=pytest.mark.slow)]
)
def test_compiles(name):
    torch._dynamo.reset()
    small = tiny("llama", num_hidden_layers=1)
    call, _, keep = situation(name)
    call = {"input_ids": tokens()} | call
    eager = run(on(small, OURS), call, keep)
    model = on(small, OURS)
    compiled = torch.compile(model, backend="aot_eager")
    logits = compiled(**call).logits[keep]
    (logits * draw(*logits.shape).float()).sum().backward()
    oracle = run(on(small, OURS, torch.float64), call, keep)
    for part, value in [("logits", logits), *((n, p.grad) for n, p in model.named_parameters())]:
        allowed = budget(eager[part], oracle[part], torch.float32)
        assert_within_budget(value, oracle[part], allowed, name=part)


# ---- nothing leaks, not by one bit ---------------------------------------------------------


def moved(model, call: dict, changed: dict) -> torch.Tensor:
    """Which tokens' logits change when the arguments do: [rows, T] booleans."""
    with torch.no_grad():
        before, after = model(**call).logits, model(**(call | changed)).logits
    return (before != after).any(dim=-1)


def with_another_token(ids: torch.Tensor, row: int, at: int) -> torch.Tensor:
    ids = ids.clone()
    ids[row, at] = ids[row, at] % (VOCABULARY - 1) + 1
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CAUSAL_SITUATIONS)
def test_the_future_stays_hidden(kind, name):
    call, _, keep = situation(name)
    call = {"input_ids": tokens()} | call
    at = 10
    other = {"input_ids": with_another_token(call["input_ids"], 0, at)}
    change = moved(on(tiny(kind), OURS), call, other)
    assert not change[0, :at].any(), "an earlier token saw it"
    assert not change[1].any(), "another row saw it"
    assert change[0, at:][keep[0, at:]].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["positions", "cu_seq_lens"])
@pytest.mark.parametrize("at", [0, 4, 5, 6])
def test_samples_of_a_pack_stay_apart(kind, name, at):
    call, _, _ = situation(name)
    call = {"input_ids": tokens()} | call
    other = {"input_ids": with_another_token(call["input_ids"], 0, at)}
    change = moved(on(tiny(kind), OURS), call, other)
    sample = slice(0, 5) if at < 5 else slice(5, 6) if at == 5 else slice(6, T)
    assert change[0, at]
    assert change.sum() == change[0, sample].sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_hidden(side):
    mask = padding(side)
    call = {"input_ids": tokens(), "attention_mask": mask}
    for at in (~mask[0].bool()).nonzero().flatten().tolist():
        other = {"input_ids": with_another_token(call["input_ids"], 0, at)}
        assert not moved(on(tiny("llama"), OURS), call, other)[mask.bool()].any()


@pytest.mark.parametrize("visible", [0, 1])
def test_rows_that_see_little_or_nothing_are_finite(visible):
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, : T - visible] = 0
    results = run(on(tiny("llama"), OURS), {"input_ids": tokens(), "attention_mask": mask}, ...)
    for part, value in results.items():
        assert value.isfinite().all(), part


def test_the_pattern_is_the_table_of_transformers():
    """For lengths, caches, windows and padding: every query that is a token sees the same keys."""
    generator = torch.Generator().manual_seed(2)

    def up_to(n: int) -> int:
        return int(torch.randint(0, n + 1, (), generator=generator))

    compared = 0
    for _ in range(300):
        rows, queries, before = 1 + up_to(2), 1 + up_to(7), up_to(5)
        forgotten = up_to(before)
        rule = [
            masking_utils.causal_mask_function,
            masking_utils.bidirectional_mask_function,
            masking_utils.sliding_window_causal_mask_function(1 + up_to(5)),
            masking_utils.sliding_window_bidirectional_mask_function(up_to(4)),
        ][up_to(3)]
        keys = before - forgotten + queries
        # A mask may have room for tokens to come, which says nothing.
        mask = torch.ones(rows, before + queries + up_to(2), dtype=torch.bool)
        for row in range(rows):
            hidden = up_to(keys)
            mask[row, slice(hidden) if up_to(1) else slice(before + queries - hidden, None)] = False
        call = {"q_offset": before, "kv_offset": forgotten, "mask_function": rule}
        call["attention_mask"] = mask if up_to(3) else None
        theirs = masking_utils.sdpa_mask(rows, queries, keys, allow_is_causal_skip=False, **call)
        ours = flash_mask(rows, queries, keys, **call).table()
        counts = mask[:, before : before + queries]
        if call["attention_mask"] is None:
            counts = torch.ones_like(counts)
        assert torch.equal(ours[counts], theirs[:, 0][counts]), call
        compared += int(counts.sum())
    assert compared > 1000


# ---- Qwen3-VL: images, three axes of positions, samples packed into one row ----------------

IMAGE, VISION_START, VISION_END = 60, 61, 62
# Grids (frames, rows, columns of patches) of each sample's images, and how much text follows.
SAMPLES = [([(1, 4, 4)], 5), ([], 1), ([(1, 2, 6), (1, 4, 2)], 7), ([], 9)]


@functools.cache
def qwen() -> Any:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(
        text_config=SIZES | {"head_dim": 16, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=63,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.Qwen3VLForConditionalGeneration(config).double().eval()


@functools.cache
def sample(number: int) -> dict[str, torch.Tensor]:
    grids, length = SAMPLES[number]
    generator = torch.Generator().manual_seed(10 + number)
    ids = []
    for frames, height, width in grids:
        ids += [VISION_START, *[IMAGE] * (frames * height * width // 4), VISION_END]
    ids += torch.randint(1, 59, (length,), generator=generator).tolist()
    ids = torch.tensor([ids])
    call = {"input_ids": ids}
    if grids:
        patches = sum(t * h * w for t, h, w in grids)
        call["pixel_values"] = draw(patches, 3 * 2 * 4 * 4, seed=20 + number)
        call["image_grid_thw"] = torch.tensor(grids)
    kinds = (ids == IMAGE).long()
    axes, _ = qwen().model.get_rope_index(
        ids, mm_token_type_ids=kinds, image_grid_thw=call.get("image_grid_thw")
    )
    text = torch.arange(ids.shape[1])[None, None]
    return call | {"position_ids": torch.cat([text, axes])}  # [4, 1, T]


def pack() -> tuple[dict, list[int]]:
    """All samples in one row, with positions (4, 1, T), and how long each is."""
    samples = [sample(i) for i in range(len(SAMPLES))]

    def joined(name: str, dim: int) -> torch.Tensor:
        return torch.cat([s[name] for s in samples if name in s], dim=dim)

    call = {"input_ids": joined("input_ids", 1), "position_ids": joined("position_ids", 2)}
    call |= {"pixel_values": joined("pixel_values", 0)}
    call |= {"image_grid_thw": joined("image_grid_thw", 0)}
    return call, [s["input_ids"].shape[1] for s in samples]


def ways_to_pack() -> dict[str, dict]:
    call, lengths = pack()
    return {
        "cu_seq_lens": call | {"position_ids": call["position_ids"][1:]} | cu_seq_lens(lengths),
        "positions": call | {"use_cache": False},
        "both": call | cu_seq_lens(lengths),
    }


class OneByOne(torch.nn.Module):
    """A model that is given samples in a row, and runs each by itself."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def named_parameters(self, *args, **kwargs):
        return self.model.named_parameters(*args, **kwargs)

    def set_attn_implementation(self, name) -> None:
        self.model.set_attn_implementation(name)

    def forward(self, **_: object) -> SimpleNamespace:
        dtype = next(self.model.parameters()).dtype
        calls = [as_dtype(sample(i), dtype) for i in range(len(SAMPLES))]
        return SimpleNamespace(logits=torch.cat([self.model(**c).logits for c in calls], dim=1))


@pytest.mark.parametrize("name", [OURS, VARLEN])
@pytest.mark.parametrize("way", ["cu_seq_lens", "positions", "both"])
def test_packed_qwen_is_each_sample_by_itself(name, way):
    keep = torch.ones(1, sum(pack()[1]), dtype=torch.bool)
    oracle = run(OneByOne(on(qwen(), "sdpa", torch.float64)), {}, keep)
    eager = run(OneByOne(on(qwen(), "eager")), {}, keep)
    precision = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    for dtype in (torch.float32, torch.float64):
        found = run(on(qwen(), name, dtype), as_dtype(ways_to_pack()[way], dtype), keep)
        assert found.keys() == oracle.keys()
        assert any("visual" in part for part in found)
        for part, exact in oracle.items():
            allowed = budget(eager[part], exact, torch.float32)
            allowed *= 1.0 if dtype == torch.float32 else precision
            assert_within_budget(found[part], exact, allowed, name=f"{part} ({dtype})")


@pytest.mark.parametrize("name", [OURS, VARLEN])
@pytest.mark.parametrize("way", ["cu_seq_lens", "positions", "both"])
def test_an_image_of_another_sample_changes_nothing(name, way):
    call = as_dtype(ways_to_pack()[way], torch.float32)
    pixels = call["pixel_values"].clone()
    pixels[20] += 1.0  # the third sample's first image: patches 16 to 27
    change = moved(on(qwen(), name), call, {"pixel_values": pixels})
    lengths = pack()[1]
    before, mine = sum(lengths[:2]), lengths[2]
    # It stands after one token, so that token does not see it either.
    assert not change[0, : before + 1].any()
    assert change[0, before + 1 : before + mine].all()
    assert not change[0, before + mine :].any()


@pytest.mark.parametrize(
    "call",
    [
        pytest.param({}, id="three axes of positions, and a cache"),
        pytest.param({"use_cache": False}, id="three axes of positions"),
        pytest.param({"attention_mask": True, "use_cache": False}, id="a mask of ones"),
        pytest.param({"text": True}, id="positions of the text, and a cache"),
        pytest.param({"text": True, "attention_mask": True}, id="of the text, and a mask of ones"),
    ],
)
def test_packed_qwen_refuses_what_leaks_elsewhere(call):
    packed, lengths = pack()
    packed = as_dtype(packed, torch.float32)
    call = dict(call)
    if not call.pop("text", False):
        packed["position_ids"] = packed["position_ids"][1:]
    if call.pop("attention_mask", False):
        packed["attention_mask"] = torch.ones(1, sum(lengths), dtype=torch.long)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        on(qwen(), OURS)(**packed, **call)


def test_qwen_generates_the_same_tokens():
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    call = as_dtype(sample(0), torch.float32)
    call["mm_token_type_ids"] = (call["input_ids"] == IMAGE).long()
    del call["position_ids"]
    texts = [on(qwen(), name).generate(**call, **options) for name in ("eager", OURS, VARLEN)]
    assert texts[0].shape[1] == call["input_ids"].shape[1] + 6
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


# ---- what cannot be done is refused --------------------------------------------------------


def layer(causal: bool = True) -> torch.nn.Module:
    module = torch.nn.Module()
    module.is_causal = causal
    return module


def call_attention(mask="causal", *, module=None, queries=4, keys=4, **arguments):
    """The attention function by itself, as a layer calls it."""
    q, k = torch.randn(1, 2, queries, 16), torch.randn(1, 2, keys, 16)
    if mask == "causal":
        mask = Pattern.dense(CAUSAL, (1, queries, keys))
    module = layer() if module is None else module
    return attention(module, q, k, k, mask, implementation="torch", **arguments)


def test_what_a_layer_gets():
    out, weights = call_attention(queries=3, keys=5)
    assert out.shape == (1, 3, 2, 16)
    assert weights is None
    call_attention(softcap=None, output_attentions=False, use_cache=True, sliding_window=None)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_result_is_refused(name):
    value = True if name == "output_attentions" else torch.ones(2)
    with pytest.raises(NotImplementedError, match=name):
        call_attention(**{name: value})


def test_dropout_is_refused():
    model = on(tiny("llama", attention_dropout=0.1), OURS)
    model(tokens())  # not while it is evaluated
    with pytest.raises(NotImplementedError, match=r"dropout=0\.1"):
        model.train()(tokens())


def test_models_with_a_softcap_or_sinks_are_refused():
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=16))
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    oss = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, **experts, head_dim=16, pad_token_id=0)
    )
    for model, what in ((gemma, "softcap"), (oss, "s_aux")):
        model.set_attn_implementation(OURS)
        with pytest.raises(NotImplementedError, match=what):
            model.eval()(tokens())


def test_attention_weights_are_refused():
    with pytest.raises(NotImplementedError, match="output_attentions"):
        on(tiny("llama"), OURS)(tokens(), output_attentions=True)


def test_every_argument_that_a_layer_passes_is_known():
    """All models of transformers that is installed: an unknown name would be ignored in silence."""
    harmless = {"max_length_q", "max_length_k", "deterministic"}
    known = {*REFUSED, *attention.__annotations__, *harmless}
    called = re.compile(r"attention_interface\(\n(.*?)\n +\)", re.DOTALL)
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for body in called.findall(path.read_text()):
            names.update(re.findall(r"^ +(\w+)=", body, re.MULTILINE))
    assert {"scaling", "sliding_window", "softcap", "cu_seq_lens_q"} <= names, "found too little"
    # `query=query`: the tensors themselves, and eight tables of DeepSeek that come with `indices`.
    assert names <= known, f"new: {names - known}"


@pytest.mark.parametrize("shape", [(2, 1, T, T), (2, 4, T, T)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_ones_own_is_refused(shape, dtype):
    with pytest.raises(NotImplementedError, match=r"of shape \(2, "):
        on(tiny("llama"), OURS)(tokens(), attention_mask=torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    "rule",
    [
        {"and_mask_function": lambda b, h, q, k: k != 3},
        {"or_mask_function": lambda b, h, q, k: k < 4},
        {"block_sequence_ids": torch.tensor([[0] * 3 + [-1] * (T - 3)]).expand(2, -1)},
    ],
    ids=["and", "or", "blocks"],
)
def test_rules_of_ones_own_are_refused(rule):
    config = copy.deepcopy(tiny("llama").config)
    config._attn_implementation = OURS
    make = functools.partial(
        masking_utils.create_causal_mask, config, torch.empty(2, T, 0), None, None
    )
    assert make().is_dense
    with pytest.raises(NotImplementedError, match="cannot apply"):
        make(**rule)


def test_chunks_are_refused():
    rule = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="chunked_overlay"):
        flash_mask(1, 8, 8, mask_function=rule)


def test_a_namesake_of_a_known_rule_is_refused():
    def causal_mask_function(batch, head, query, key):
        return key >= query

    with pytest.raises(NotImplementedError, match="one's own"):
        flash_mask(1, 8, 8, mask_function=causal_mask_function)
    with pytest.raises(NotImplementedError, match="one's own"):
        flash_mask(1, 8, 8)


def test_padding_between_tokens_is_refused():
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, 7] = 0
    with pytest.raises(NotImplementedError, match="at the ends of a row only"):
        on(tiny("llama"), OURS)(tokens(), attention_mask=mask)


@pytest.mark.parametrize("shape", [(2, T - 1), (1, T)])
def test_a_mask_for_other_lengths_is_refused(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask must have 2 rows"):
        flash_mask(2, T, T, mask_function=masking_utils.causal_mask_function, attention_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_is_refused(kind):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    ones = torch.ones(2, T, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="static cache"):
        on(tiny(kind), OURS).generate(
            tokens(), attention_mask=ones, cache_implementation="static", **options
        )


def test_room_behind_the_last_query_is_refused():
    """What a static cache has, where somebody passes one to the model."""
    rule = masking_utils.causal_mask_function
    assert flash_mask(1, 3, 7, 4, mask_function=rule).is_dense
    for offset in (3, torch.tensor(3)):
        with pytest.raises(NotImplementedError, match="3 queries after 3 of 7 keys"):
            flash_mask(1, 3, 7, offset, mask_function=rule)
    model = on(tiny("llama"), OURS)
    cache = transformers.StaticCache(config=model.config, max_cache_len=T + 5)
    with pytest.raises(NotImplementedError, match="static cache"):
        model(tokens(), past_key_values=cache)


@pytest.mark.parametrize("mask", [False, True], ids=["cache", "mask of ones"])
def test_packing_that_the_mask_function_cannot_see_is_refused(mask):
    call = {"position_ids": packed_positions().expand(2, -1)}
    if mask:
        call |= {"attention_mask": torch.ones(2, T), "use_cache": False}
    with pytest.raises(ValueError, match=r"position_ids jump .*cu_seq_lens_q"):
        on(tiny("llama"), OURS)(tokens(), **call)


def test_cu_seq_lens_with_padding_is_refused():
    with pytest.raises(NotImplementedError, match="padding"):
        on(tiny("llama"), OURS)(tokens(), attention_mask=padding("left"), **cu_seq_lens(LENGTHS, 2))


def test_lengths_of_keys_differ_from_those_of_queries():
    """Two samples, of which the cache holds some keys; each ends at its own bottom right."""
    q, k = draw(1, 2, 5, 16), draw(1, 2, 9, 16)
    cu_q, cu_k = torch.tensor([0, 2, 5]), torch.tensor([0, 6, 9])
    out, _ = attention(
        layer(), q, k, k, None, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k, implementation="torch"
    )
    first = reference_attention(q[:, :, :2], k[:, :, :6], k[:, :, :6], causal=True)
    second = reference_attention(q[:, :, 2:], k[:, :, 6:], k[:, :, 6:], causal=True)
    expected = torch.cat([first, second], dim=2).transpose(1, 2)
    assert (out - expected).abs().max() < 1e-14


def test_half_of_cu_seq_lens():
    lengths = cu_seq_lens(LENGTHS, 2)
    model = on(tiny("llama"), OURS)
    whole = model(tokens(), **lengths).logits
    assert torch.equal(model(tokens(), cu_seq_lens_q=lengths["cu_seq_lens_q"].long()).logits, whole)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_k without cu_seq_lens_q"):
        model(tokens(), cu_seq_lens_k=lengths["cu_seq_lens_k"])


def test_cu_seq_lens_that_do_not_count_the_cache_are_refused():
    model = on(tiny("llama"), OURS)
    cache = model(tokens()[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cu_seqlens_k must end with"):
        model(tokens()[:, 4:], past_key_values=cache, **cu_seq_lens([T - 4], 2))


def test_a_causal_layer_without_a_mask_is_refused():
    with pytest.raises(ValueError, match="attention_mask is None in a causal Module"):
        call_attention(None)
    with pytest.raises(ValueError, match="attention_mask is None in a causal Module"):
        call_attention(None, module=torch.nn.Module())
    call_attention(None, module=layer(causal=False))
    call_attention(None, is_causal=False)
    with pytest.raises(ValueError, match="attention_mask is None in a causal Module"):
        call_attention(None, module=layer(causal=False), is_causal=True)


def test_a_mask_for_another_layer_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 4, 5\), the layer has \(1, 4, 4\)"):
        call_attention(Pattern.dense(CAUSAL, (1, 4, 5)))
    with pytest.raises(ValueError, match="sliding_window=3"):
        call_attention(sliding_window=3)
    with pytest.raises(ValueError, match="sliding_window=3"):
        call_attention(None, is_causal=False, sliding_window=3)
    call_attention(Pattern.dense(Band(2, 0), (1, 4, 4)), sliding_window=3)


def test_without_text_positions_a_causal_layer_is_refused():
    with pytest.raises(ValueError, match="position_ids of the text do not reach"):
        call_attention(position_ids=None)
    with pytest.raises(ValueError, match="position_ids of the text do not reach"):
        call_attention(position_ids=torch.arange(4).expand(3, 1, 4))
    call_attention(position_ids=None, queries=1)
    call_attention(Pattern.dense(EVERYTHING, (1, 4, 4)), position_ids=None)


def test_positions_of_an_encoder():
    """They are looked at too, where there are tokens."""
    jump = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="position_ids jump"):
        call_attention(Pattern.dense(EVERYTHING, (1, 4, 4)), position_ids=jump)
    padded = Pattern(EVERYTHING, (1, 4, 4), [(0, 0, 4, 2, 2)])
    call_attention(padded, position_ids=torch.tensor([[1, 1, 0, 1]]))
    with pytest.raises(ValueError, match="position_ids jump"):
        call_attention(padded, position_ids=torch.tensor([[0, 0, 0, 0]]))


# ---- the registration ----------------------------------------------------------------------


def test_a_taken_name_is_refused():
    for name in ("sdpa", "eager", "flash_attention_2"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            register_attention(name)
    assert register_attention(OURS, implementation="torch") == OURS
    with pytest.raises(ValueError, match="implementation"):
        register_attention("course_test_other", implementation="cuda")


def test_it_is_reversible():
    model = on(tiny("llama"), "sdpa")
    before = model(tokens()).logits
    model.set_attn_implementation(OURS)
    model(tokens())
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(tokens()).logits, before)


def test_another_transformers_is_refused(monkeypatch):
    def sdpa_mask(batch_size, q_length, kv_length, visible_length, **kwargs):
        raise AssertionError("not called")

    def top_left(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx < q_idx

    top_left.__module__, top_left.__qualname__ = (
        "transformers.masking_utils",
        "causal_mask_function",
    )

    from transformers import modeling_flash_attention_utils
    from transformers.integrations import flash_attention

    def flash_attention_forward(module, query, key, value, attention_mask, sink_tokens=None):
        raise AssertionError("not called")

    renamed = type("FlashAttentionKwargs", (dict,), {"__annotations__": {"cu_seqlens_q": object}})
    for module, name, value, message in (
        (
            masking_utils,
            "sdpa_mask",
            sdpa_mask,
            r"sdpa_mask has new arguments \['visible_length'\]",
        ),
        (masking_utils, "causal_mask_function", top_left, "its causal mask is another"),
        (masking_utils, "and_masks", masking_utils.or_masks, "or_masks"),
        (flash_attention, "flash_attention_forward", flash_attention_forward, "sink_tokens"),
        (modeling_flash_attention_utils, "FlashAttentionKwargs", renamed, "cu_seq_lens_q"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with pytest.raises(RuntimeError, match=rf"transformers 5.*{message}"):
                register_attention("course_test_never")
    assert "course_test_never" not in transformers.AttentionInterface()


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"course_lib\[wild\]"):
        hugging_face.register_attention("course_test_never")


def test_importing_costs_no_transformers():
    for module in (hugging_face, hugging_face_masks):
        source = Path(module.__file__).read_text()
        assert "import transformers" in source or "from transformers" in source
        assert not re.search(r"^(import|from) transformers", source, re.MULTILINE)
