# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints and FP8 KV cache: drafts run through the same layers and scales.

Catches a draft or a verify step with other weights, other scales or a KV cache of another
type. Rounding of activations depends on batch shapes, so tokens are compared up to near ties:
where LayerSkip's token first differs, plain decoding must have scored both alike.

The same tests run on a GPU with vLLM's defaults: ``python -m pytest -m gpu tests/engine``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from engines import ON_GPU
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import EngineArgs, SamplingParams
from vllm.inputs import TokensPrompt

EXIT_LAYER, NUM_LAYERS, NUM_DRAFTS = 2, 4, 3
GROUP_SIZE = 128
NEAR_TIE = 0.2
"""Nats; a token of another layer or scale is off by whole nats."""
GATE_UP = ("gate", "up")
PROMPTS = [[0, *range(3, 3 + length)] for length in (4, 21, 40)]

Tensors = dict[str, torch.Tensor]


def quantized(
    weight: torch.Tensor,  # [N, K]
    group_size: int,
    largest: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric: ``[N, K]`` float values of the quantised type, ``[N, K / group]`` scales."""
    groups = weight.unflatten(1, (-1, group_size))
    # A layer of zeros stays one.
    scale = groups.abs().amax(2).clamp(min=1e-8) / largest
    return (groups / scale[..., None]).flatten(1), scale


def int8_weight(weight: torch.Tensor) -> Tensors:
    values, scale = quantized(weight, weight.shape[1], 127)
    return {"weight": values.round().to(torch.int8), "weight_scale": scale}


def fp8_weight(weight: torch.Tensor) -> Tensors:
    """One scale for a square block, as in DeepSeek's and Qwen's FP8 checkpoints."""
    blocks = weight.unflatten(0, (-1, GROUP_SIZE)).unflatten(2, (-1, GROUP_SIZE))
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-8) / largest
    values = (blocks / scale[:, None, :, None]).view(weight.shape)
    return {"weight": values.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def int4_weight(weight: torch.Tensor) -> Tensors:
    values, scale = quantized(weight, GROUP_SIZE, 7)
    return {
        "weight_packed": pack_to_int32(values.round().to(torch.int8), 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def gptq_weight(weight: torch.Tensor) -> Tensors:
    values, scale = quantized(weight, GROUP_SIZE, 7)
    signed = values.round().to(torch.int8)
    num_outputs, num_inputs = weight.shape
    num_groups = num_inputs // GROUP_SIZE
    return {
        "qweight": pack_to_int32(signed.t(), 4, packed_dim=0).contiguous(),
        "scales": scale.t().contiguous().half(),
        # Zero points of 8, less one, eight to a word.
        "qzeros": torch.full((num_groups, num_outputs // 8), 0x77777777, dtype=torch.int32),
        "g_idx": (torch.arange(num_inputs) // GROUP_SIZE).int(),
    }


def compressed_tensors(
    checkpoint_format: str, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": checkpoint_format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


INT8 = compressed_tensors(
    "int-quantized",
    {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
    {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True},
)
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [GROUP_SIZE, GROUP_SIZE],
}
INT4 = compressed_tensors(
    "pack-quantized",
    {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": GROUP_SIZE,
        "symmetric": True,
        "dynamic": False,
    },
)
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
}


@dataclass(frozen=True)
class Scheme:
    """A way to quantise: by checkpoint, by engine settings, or both."""

    write: Callable[[torch.Tensor], Tensors] | None = None
    config: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    cpu_dtype: str = "float32"
    cpu_problem: str | None = None
    """Why a CPU, or this one, does not run it."""


_NO_AMX = None if torch.cpu._is_amx_tile_supported() else "needs a CPU with AMX"
_NO_AVX512 = None if torch.cpu._is_avx512_supported() else "needs a CPU with AVX-512"

SCHEMES = {
    "int8": Scheme(int8_weight, INT8, cpu_dtype="bfloat16"),
    "int4": Scheme(int4_weight, INT4, cpu_dtype="bfloat16", cpu_problem=_NO_AVX512),
    "gptq": Scheme(gptq_weight, GPTQ, cpu_dtype="bfloat16", cpu_problem=_NO_AVX512),
    "fp8": Scheme(fp8_weight, FP8, cpu_dtype="bfloat16", cpu_problem=_NO_AMX),
    "fp8-online": Scheme(
        settings={"quantization": "fp8"}, cpu_problem="vLLM's CPU build has no FP8 quantiser"
    ),
    "fp8-kv": Scheme(settings={"kv_cache_dtype": "fp8"}, cpu_problem=_NO_AVX512),
    "fp8-and-fp8-kv": Scheme(
        fp8_weight, FP8, {"kv_cache_dtype": "fp8"}, "bfloat16", cpu_problem=_NO_AMX
    ),
}


def cases() -> Iterator[Any]:
    for name, scheme in SCHEMES.items():
        on_gpu = ON_GPU or name == "fp8-online"
        problem = None if ON_GPU else scheme.cpu_problem
        marks = [pytest.mark.gpu] if on_gpu else []
        if problem is not None:
            marks.append(pytest.mark.skip(reason=problem))
        yield pytest.param(name, marks=marks)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """``make(scheme, late_gain)``: the checkpoint, made once."""
    made: dict[tuple[Any, float], Path] = {}

    def make(scheme: Scheme, late_gain: float) -> Path:
        key = (scheme.write, late_gain)
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized") / "model"
            write_checkpoint(folder, scheme, late_gain)
            made[key] = folder
        return made[key]

    return make


def write_checkpoint(folder: Path, scheme: Scheme, late_gain: float) -> None:
    """A random Llama whose late layers add ``late_gain`` of what they would."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        # Sizes that every GPU kernel takes.
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers[EXIT_LAYER:]:
            layer.self_attn.o_proj.weight.mul_(late_gain)
            layer.mlp.down_proj.weight.mul_(late_gain)
    model.save_pretrained(folder)
    if scheme.write is None:
        return
    file = folder / "model.safetensors"
    tensors: Tensors = {}
    for name, tensor in load_file(file).items():
        module, is_linear, _ = name.rpartition("_proj.weight")
        parts = scheme.write(tensor) if is_linear else {}
        tensors |= {f"{module}_proj.{part}": value for part, value in parts.items()}
        if not is_linear:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = scheme.config
    (folder / "config.json").write_text(json.dumps(settings))


def settings_of(scheme: Scheme) -> dict[str, Any]:
    if ON_GPU:
        defaults = {"attention_backend": None, "max_num_batched_tokens": 2048}
        return {"dtype": "bfloat16"} | defaults | scheme.settings
    return {"dtype": scheme.cpu_dtype} | scheme.settings


def assert_quantized(engine: Any, scheme: Scheme) -> None:
    if scheme.write is not None or "quantization" in scheme.settings:
        methods = {
            type(layer.mlp.down_proj.quant_method) for layer in engine.runner.model.model.layers
        }
        assert "Unquantized" not in str(methods)
    if "kv_cache_dtype" in scheme.settings:
        sizes = {cache.element_size() for cache in engine.runner.kv_caches}
        assert sizes == {1}


def assert_equal_up_to_near_ties(
    plain: Any, prompts: list[list[int]], expected: list[list[int]], actual: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)
    for prompt, wanted, got in zip(prompts, expected, actual, strict=True):
        assert len(got) == len(wanted)
        first = next(
            (i for i, pair in enumerate(zip(wanted, got, strict=True)) if pair[0] != pair[1]), None
        )
        if first is None:
            continue
        inputs = TokensPrompt(prompt_token_ids=prompt + wanted[:first])
        output = plain.llm.generate([inputs], params, use_tqdm=False)[0].outputs[0]
        logprobs = output.logprobs[0]
        assert got[first] in logprobs, f"token {first} is none of the 20 most likely"
        best = max(entry.logprob for entry in logprobs.values())
        assert best - logprobs[got[first]].logprob < NEAR_TIE, f"token {first}"


@pytest.mark.parametrize("name", cases())
def test_tokens_are_plain_decodings(pool, checkpoint_of, name):
    scheme = SCHEMES[name]
    model, settings = checkpoint_of(scheme, late_gain=0.3), settings_of(scheme)
    plain = pool.get(model, **settings)
    expected = plain.greedy(PROMPTS, 40)
    assert all(len(set(tokens)) > 8 for tokens in expected)
    engine = pool.layerskip(model, EXIT_LAYER, NUM_DRAFTS, **settings)
    assert_quantized(engine, scheme)
    with engine.counting() as counts:
        actual = engine.greedy(PROMPTS, 40)
    assert_equal_up_to_near_ties(plain, PROMPTS, expected, actual)
    counts.assert_speculated()
    assert counts.num_accepted_tokens < counts.num_draft_tokens
    assert counts.num_verify_steps_reused > 0


@pytest.mark.parametrize("name", cases())
def test_drafts_of_late_layers_that_add_nothing_are_accepted(pool, checkpoint_of, name):
    """Drafts and verification then compute the same, if weights and scales are the same."""
    scheme = SCHEMES[name]
    model, settings = checkpoint_of(scheme, late_gain=0.0), settings_of(scheme)
    engine = pool.layerskip(model, EXIT_LAYER, NUM_DRAFTS, **settings)
    assert_quantized(engine, scheme)
    with engine.counting() as counts:
        engine.greedy(PROMPTS, 60)
    counts.assert_speculated()
    # Near ties may fall differently for one token and for four.
    assert counts.num_accepted_tokens >= 0.95 * counts.num_draft_tokens
    assert counts.num_verify_steps_reused > 0


@pytest.mark.parametrize("name", [case for case in cases() if case.values == ("int4",)])
def test_other_weights_are_told_apart(pool, checkpoint_of, name):
    """Negative control: four-bit weights differ from the weights themselves by more than ties."""
    scheme, original = SCHEMES[name], Scheme(cpu_dtype="bfloat16")
    plain = pool.get(checkpoint_of(scheme, late_gain=0.3), **settings_of(scheme))
    other = pool.get(checkpoint_of(original, late_gain=0.3), **settings_of(original))
    expected, actual = plain.greedy(PROMPTS, 40), other.greedy(PROMPTS, 40)
    with pytest.raises(AssertionError):
        assert_equal_up_to_near_ties(plain, PROMPTS, expected, actual)


@pytest.mark.parametrize("name", [case for case in cases() if case.values[0] in ("int8", "fp8")])
def test_a_twin_of_fewer_bits_drafts_for_a_quantised_target(pool, checkpoint_of, name):
    """Its weights come from what the target's own quantised layers compute."""
    scheme = SCHEMES[name]
    model, settings = checkpoint_of(scheme, late_gain=0.3), settings_of(scheme)
    plain = pool.get(model, **settings)
    expected = plain.greedy(PROMPTS, 40)
    engine = pool.layerskip(
        model, NUM_LAYERS, NUM_DRAFTS, spec={"draft_quantization": "int4"}, **settings
    )
    assert_quantized(engine, scheme)
    twin = engine.runner.model.draft_twin
    assert len(twin.linears) == NUM_LAYERS * 4
    original = load_file(checkpoint_of(Scheme(), late_gain=0.3) / "model.safetensors")
    for linear, layer in zip(twin.linears[2::4], range(NUM_LAYERS), strict=True):
        gate, up = (original[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in GATE_UP)
        weight, seen = torch.cat([gate, up]), linear._responses().float()
        assert (seen - weight).norm() < 0.04 * weight.norm()  # Eight bits of it.
    with engine.counting() as counts:
        actual = engine.greedy(PROMPTS, 40)
    assert_equal_up_to_near_ties(plain, PROMPTS, expected, actual)
    counts.assert_speculated()


@pytest.mark.parametrize(
    ("name", "kind"), [("int8", "int8"), ("int8", "fp8"), ("int4", "int4"), ("gptq", "int8")]
)
def test_a_twin_without_fewer_bits_is_refused(checkpoint_of, name, kind):
    spec = {"method": "layerskip", "exit_layer": "all", "draft_quantization": kind}
    args = EngineArgs(
        str(checkpoint_of(SCHEMES[name], late_gain=0.3)),
        skip_tokenizer_init=True,
        speculative_config={**spec, "num_speculative_tokens": 2},
    )
    with pytest.raises(ValueError, match=f"draft_quantization='{kind}' cannot go with this") as e:
        args.create_engine_config()
    assert "bits would not be fewer. Set draft_quantization to 'none'" in str(e.value)
