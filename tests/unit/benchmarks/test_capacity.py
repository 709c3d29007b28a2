# SPDX-License-Identifier: Apache-2.0
"""Catch a wrong term of the capacity plan, and a table of its page that was not made again."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.pages.capacity_formula import (
    Assumptions,
    Engine,
    RequestKind,
    best_engine_plan,
    gpu_hours_per_million,
    layerskip,
    layerskip_up_to,
    plan_engine,
)
from benchmarks.pages.capacity_tables import PAGE, TABLES
from benchmarks.pages.tables import with_tables
from vllm_layerskip.measuring.hardware import GPUS, Gpu
from vllm_layerskip.measuring.roofline import Decoding
from vllm_layerskip.measuring.shapes import SHAPES, Shape

H100 = GPUS["NVIDIA H100 80GB HBM3"]
PLAIN = Decoding("plain")
# 2 layers of 4 * 2 * 2 * (2 + 1) + 3 * 4 * 8 = 144 weights, a head of 4 * 10 = 40.
SMALL = Shape(4, 8, 2, 2, 1, 2, 10)
IDEAL = Assumptions(decode_efficiency=1.0, prefill_efficiency=1.0, all_reduce_s=0.0)


def test_the_sizes_of_the_small_shape():
    assert (SMALL.layer_weights, SMALL.head_weights, SMALL.num_weights) == (144, 40, 368)


def test_a_step_and_a_prefill_by_hand():
    engine = Engine(SMALL, Gpu(bandwidth=100.0, flops=1e9), assumptions=IDEAL)
    # (2 * 144 + 40) weights, 3 requests * 5 tokens * 2 layers * 4 K/V values, 2 bytes each.
    assert engine.step_s(PLAIN, 3, 5.0) == pytest.approx((328 + 120) * 2 / 100)
    engine = Engine(SMALL, Gpu(bandwidth=1e9, flops=1000.0), assumptions=IDEAL)
    # 7 tokens * (2 * 288 + 2 * 7 * 2 layers * 2 heads * 2) FLOPs.
    assert engine.prefill_s(7) == pytest.approx(7 * (576 + 112) / 1000)


def test_the_largest_batch_by_hand():
    # 736 bytes of weights; a request of 10 + 2 tokens has 12 * 2 * 4 * 2 = 192 bytes of K/V and
    # 2 * 2 * 4 * 2 = 32 of exit states.
    gpu = Gpu(1.0, 1.0, memory=2000.0)
    engine = Engine(SMALL, gpu, assumptions=Assumptions(memory_share=1.0))
    assert engine.max_batch(10, 2) == (2000 - 736) // (192 + 32) == 5
    assert engine.max_batch(10, 0) == (2000 - 736) // 160 == 7
    assert Engine(SMALL, Gpu(1.0, 1.0, memory=700.0)).max_batch(10, 0) == 0


def test_all_reduces_by_hand():
    shape = Shape(4, 8, 2, 2, 2, 2, 10)
    gpu = Gpu(1e9, 1e9, link=50.0)
    engine = Engine(shape, gpu, tp=2, assumptions=Assumptions(1.0, 1.0, all_reduce_s=0.5))
    # 2 a layer; 3 tokens * 4 values * 2 bytes, of which a ring of two moves 2 * 1/2.
    assert engine.all_reduces_s(2, 3) == pytest.approx(2 * 2 * (0.5 + 24 / 50))
    ours = layerskip(1, 1, 1.5, 1)
    alone = Engine(shape, Gpu(2e9, 2e9), assumptions=IDEAL).step_s(ours, 1, 0.0)
    # A draft and the last draft's early layer with a token each, the late layer with two.
    reduces = 2 * engine.all_reduces_s(1, 1) + engine.all_reduces_s(1, 2)
    assert engine.step_s(ours, 1, 0.0) == pytest.approx(alone + reduces)


def test_throughput_of_a_plan_by_hand():
    engine = Engine(SMALL, Gpu(1e6, 1e6, memory=2000.0), assumptions=IDEAL)
    kind = RequestKind(prompt_len=6, output_len=4)
    found = plan_engine(engine, kind, PLAIN)
    batch = found.batch_size
    step = engine.step_s(PLAIN, batch, 8.0)
    assert found.tokens_per_s == pytest.approx(batch * 4 / (batch * engine.prefill_s(6) + 4 * step))
    assert gpu_hours_per_million(engine, found) == pytest.approx(1e6 / found.tokens_per_s / 3600)
    assert found.num_engines(2 * found.tokens_per_s, 0.25) == 3


KINDS = st.builds(RequestKind, st.integers(1, 4000), st.integers(1, 1000), st.floats(0.002, 0.2))


@given(KINDS, st.floats(1.0, 4.9), st.integers(1, 31))
def test_more_acceptance_never_costs(kind, length, exit_layer):
    engine = Engine(SHAPES["llama-3-8b"], H100)
    less = plan_engine(engine, kind, layerskip(exit_layer, 4, length, 4))
    more = plan_engine(engine, kind, layerskip(exit_layer, 4, length + 0.1, 4))
    if less is not None:
        assert more is not None
        assert more.tokens_per_s >= less.tokens_per_s > 0


@given(KINDS)
def test_no_drafts_are_plain_decoding_and_the_best_k_is_never_worse(kind):
    engine = Engine(SHAPES["llama-3-8b"], H100)
    plain = plan_engine(engine, kind, PLAIN)
    assert plan_engine(engine, kind, layerskip(4, 4, 3.0, 0)) == plain
    best = best_engine_plan(engine, kind, layerskip_up_to(4, 3.0))
    if plain is not None:
        assert best.tokens_per_s >= plain.tokens_per_s
        assert plain.tpot_s <= kind.max_tpot_s
        assert best.tpot_s <= kind.max_tpot_s


@given(st.integers(1, 8000), st.integers(1, 8000), st.integers(0, 8))
def test_longer_requests_fit_less_often(num_tokens, more, num_drafts):
    engine = Engine(SHAPES["llama-3-70b"], H100, 4)
    fits = engine.max_batch(num_tokens, num_drafts)
    assert 0 <= engine.max_batch(num_tokens + more, num_drafts) <= fits <= 256


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--gpu", "abacus"], "--gpu abacus is none of NVIDIA H200"),
        (["--exit-layer", "32"], "--exit-layer 32 must be from 1 to 31"),
        (["--acceptance-length", "6"], "--acceptance-length 6.0 must be from 1 to 5"),
        (["--tp", "3"], "--tp 3 must divide the 8 K/V heads. Use 1, 2, 4, 8."),
        (["--tp", "2", "--gpu", "l4"], "--tp 2: no link between these GPUs is known"),
        (["--output", "0"], "--output: '0' must be an integer of at least 1"),
    ],
)
def test_wrong_options(options, error):
    command = [sys.executable, "-m", "benchmarks.pages.capacity", *options]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert error in process.stderr


def test_a_plan_from_the_command_line():
    command = [sys.executable, "-m", "benchmarks.pages.capacity", "--price", "2"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cells = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| ")][2:]
    (plain, ours) = [[cell.strip() for cell in row] for row in cells]
    assert (plain[0], plain[1], ours[0]) == ("plain", "0", "LayerSkip")
    for row in (plain, ours):
        # Cost: GPU hours * price * headroom.
        assert float(row[7]) == pytest.approx(float(row[6]) * 2 * 1.25, rel=0.01)


def test_the_pages_tables_are_the_commands():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page, TABLES) == page
