# SPDX-License-Identifier: Apache-2.0
"""The roofline, the sizes of the shapes, the GPUs and the window of steady decoding."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_layerskip.measuring import hardware
from vllm_layerskip.measuring.roofline import BYTES_ONLY, Decoding, Roofline, scheduled_drafts
from vllm_layerskip.measuring.shapes import SHAPES, Shape
from vllm_layerskip.measuring.timing import Step, steady_window

H200 = hardware.GPUS["NVIDIA H200"]


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "num_weights"),
        [  # As the models' cards state them.
            ("llama-2-7b", 6.74e9),
            ("llama-2-13b", 13.02e9),
            ("llama-3-8b", 8.03e9),
            ("llama-3.2-1b", 1.236e9),
        ],
    )
    def test_sizes_are_the_published_ones(self, name, num_weights):
        assert SHAPES[name].num_weights == pytest.approx(num_weights, rel=1e-3)

    @pytest.mark.parametrize("name", SHAPES)
    def test_a_written_config_is_read_back(self, name, tmp_path):
        folder = SHAPES[name].write_config(tmp_path, 256)
        config = json.loads((folder / "config.json").read_text())
        assert Shape.from_config(config) == SHAPES[name]


class TestRoofline:
    def test_speedup_of_the_7b_shape(self):
        """E = 8, K = 12, acceptance length 9.27: 2.22, worked out by hand from the weights."""
        roofline = Roofline(SHAPES["llama-2-7b"], BYTES_ONLY)
        assert roofline.speedup(Decoding("layerskip", 8, 12, 9.27), 1, 0) == pytest.approx(
            2.22, abs=0.005
        )

    @pytest.mark.parametrize(
        ("kind", "layers", "num_drafts", "length", "speedup"),
        [
            # A / (1 + K * c), c = draft bytes / full bytes: README's formula.
            ("none", 8, 12, 9.27, 9.27 / (1 + 12 * 0.26488)),
            ("fp8", 8, 12, 9.27, 9.27 / (1 + 12 * 0.26488 / 2)),
            ("int8", 8, 12, 9.27, 9.27 / (1 + 12 * 0.26488 / 2)),
            ("int4", 8, 12, 9.27, 9.27 / (1 + 12 * 0.26488 * 4.3125 / 16)),
            ("int4", 32, 4, 3.8, 3.8 / (1 + 4 * 4.3125 / 16)),
        ],
    )
    def test_a_twins_bytes_are_those_of_its_weights(
        self, kind, layers, num_drafts, length, speedup
    ):
        decoding = Decoding("layerskip", layers, num_drafts, length, draft_quantization=kind)
        roofline = Roofline(SHAPES["llama-2-7b"], BYTES_ONLY)
        assert roofline.speedup(decoding, 1, 0) == pytest.approx(speedup, rel=1e-3)

    def test_a_twin_reuses_nothing_and_keeps_the_width_of_kv(self):
        roofline = Roofline(SHAPES["llama-2-7b"], H200)
        plain = Decoding("layerskip", 8, 12, 9.27)
        twin = replace(plain, draft_quantization="int8")
        assert plain.reuses_exit_states
        assert not twin.reuses_exit_states
        # K/V alone: as many bytes, so nothing is won where they are all.
        alone = Roofline(replace(SHAPES["llama-2-7b"], intermediate_size=1), BYTES_ONLY)
        assert alone.step_s(twin, 1, 1e9) == pytest.approx(alone.step_s(plain, 1, 1e9), rel=1e-3)
        # FLOPs decide: the first layers run for every token.
        without = replace(plain, mode="layerskip-no-reuse")
        verify_s = [
            roofline.step_s(one, 4096, 0)
            - 12 * roofline.stage_s(8, 4096 * 32000, 4096, 4096, 0, one.draft_quantization)
            for one in (twin, without)
        ]
        assert verify_s[0] == pytest.approx(verify_s[1])

    def test_in_float32_a_twin_is_a_reference_at_full_width(self):
        roofline = Roofline(SHAPES["llama-2-7b"], BYTES_ONLY, "float32")
        steps = {
            roofline.step_s(Decoding("layerskip", 8, 4, 3.0, draft_quantization=kind), 1, 100)
            for kind in ("none", "int4")
        }
        assert len(steps) == 1

    def test_plain_7b_on_an_h200(self):
        """13.2 GB of weights without the embedding, at 4.8 TB/s: 363 tokens/s."""
        roofline = Roofline(SHAPES["llama-2-7b"], H200)
        assert roofline.tokens_per_s(Decoding("plain"), 1, 0) == pytest.approx(363, abs=1)

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_drafting_for_nothing_costs_more_than_plain_decoding(self, shape):
        roofline = Roofline(shape, H200)
        assert roofline.speedup(Decoding("layerskip", 1, 1, 1.0), 1, 0) < 1.0
        assert roofline.speedup(Decoding("layerskip", 1, 1, 2.0), 1, 0) > 1.0

    def test_reuse_saves_early_flops_and_no_bytes(self):
        """At batch 1 nothing; where compute decides, K of K + 1 tokens of the early stage."""
        shape = SHAPES["llama-2-7b"]
        roofline, decoding = Roofline(shape, H200), Decoding("layerskip", 8, 12, 9.27)
        without = replace(decoding, mode="layerskip-no-reuse")
        assert roofline.step_s(decoding, 1, 128) == roofline.step_s(without, 1, 128)
        saved_s = roofline.step_s(without, 128, 0) - roofline.step_s(decoding, 128, 0)
        layers = 8 * shape.layer_weights
        all_tokens_s = 2 * 128 * 13 * layers / H200.flops
        assert saved_s == pytest.approx(all_tokens_s - 2 * layers / H200.bandwidth)

    def test_kv_cache_counts_once_a_request(self):
        """2,000 tokens of 32 heads of 128 in 32 layers, K and V, two bytes each, per request."""
        roofline, plain = Roofline(SHAPES["llama-2-7b"], H200), Decoding("plain")
        extra_s = roofline.step_s(plain, 4, 2000) - roofline.step_s(plain, 4, 0)
        assert extra_s == pytest.approx(4 * 2000 * 2 * 32 * 128 * 32 * 2 / 4.8e12)

    def test_a_draft_vocabulary_shrinks_the_draft_alone(self):
        shape = SHAPES["llama-3-8b"]
        roofline, decoding = Roofline(shape, BYTES_ONLY), Decoding("layerskip", 4, 4, 3.0)
        sliced = replace(decoding, draft_vocab=32000)
        saved = roofline.step_s(decoding, 1, 0) - roofline.step_s(sliced, 1, 0)
        assert saved == pytest.approx(2 * 4 * (128256 - 32000) * 4096)
        assert replace(sliced, mode="draft-model") != sliced

    @pytest.mark.parametrize("mode", ["layerskip", "draft-model", "ngram"])
    def test_no_drafts_cost_what_plain_costs(self, mode):
        roofline = Roofline(SHAPES["llama-3-8b"], H200)
        decoding = Decoding(mode, 4, 0)
        assert roofline.speedup(decoding, 64, 1000) == pytest.approx(1.0)

    def test_early_exit_is_the_cut_models_plain_decoding(self):
        shape = SHAPES["llama-3-8b"]
        cut = Roofline(shape.first_layers(4), H200).step_s(Decoding("plain"), 8, 500)
        assert Roofline(shape, H200).step_s(Decoding("early-exit", 4), 8, 500) == cut

    @given(
        ends=st.lists(st.integers(1, 60), min_size=1, max_size=4, unique=True),
        drafts=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    )
    def test_schedule_is_read_as_vllm_reads_it(self, ends, drafts):
        from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

        starts = [1, *(end + 1 for end in sorted(ends))]
        schedule = [
            [start, end, k] for start, end, k in zip(starts, sorted(ends), drafts, strict=False)
        ]
        lookup = build_dynamic_sd_schedule_lookup(schedule, 64, 8)
        assert [scheduled_drafts(schedule, 8, size) for size in range(1, 65)] == lookup[1:]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA H200 NVL", "NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("NVIDIA L40", None),
        (None, None),
    ],
)
def test_gpu_by_name(name, known):
    assert hardware.find_gpu(name) == (hardware.GPUS[known] if known else None)
    assert hardware.find_gpu(name, bandwidth_tb=4.0).bandwidth == 4e12


class TestWindow:
    @staticmethod
    def steps(*tokens: dict[str, int], finished: int) -> list[Step]:
        return [Step(float(i), t, i >= finished) for i, t in enumerate(tokens)]

    def test_all_requests_decode_in_it(self):
        """b starts late, a ends first: from b's first token to the step before a's last."""
        steps = self.steps(
            {"a": 1}, {"a": 3, "b": 1}, {"a": 2, "b": 4}, {"b": 1}, {"a": 1, "b": 5}, finished=4
        )
        window = steady_window(steps, 2)
        assert (window.seconds, window.num_tokens, window.num_steps) == (2.0, 7, 2)
        assert window.tokens_per_s == 3.5

    def test_too_short_a_run_is_an_error(self):
        with pytest.raises(ValueError, match="raise --output-len"):
            steady_window(self.steps({"a": 1}, {"a": 1, "b": 1}, {"a": 1}, finished=2), 2)
