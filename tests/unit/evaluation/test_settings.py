# SPDX-License-Identifier: Apache-2.0
"""Catch checkpoints that cannot be told apart, and settings that only torch would refuse."""

import subprocess
import sys

import pytest

from vllm_layerskip.errors import UserError
from vllm_layerskip.evaluation.settings import EvalSettings, TextSettings, TwinSettings

TEXT = TextSettings(("stdlib",))


@pytest.mark.parametrize(
    ("names", "given", "labels"),
    [
        (("runs/one", None), None, ["one"]),
        (("runs/one", "other/two"), None, ["one", "two"]),
        (("runs/one", "other/one"), None, ["runs/one", "other/one"]),
        (("runs/one", "other/one"), ("plain", "LayerSkip"), ["plain", "LayerSkip"]),
    ],
)
def test_a_label_tells_the_checkpoints_apart(names, given, labels):
    settings = EvalSettings(names[0], TEXT, compare=names[1], labels=given)
    assert [checkpoint.label for checkpoint in settings.checkpoints] == labels
    assert [checkpoint.option for checkpoint in settings.checkpoints] == [
        "--model",
        "--compare",
    ][: len(labels)]


@pytest.mark.parametrize(
    ("given", "labels"),
    [(None, ["one", "one int4"]), (("plain", "twin"), ["plain", "twin"])],
)
def test_a_twin_has_a_label_of_its_own(given, labels):
    settings = EvalSettings("runs/one", TEXT, twin=TwinSettings("int4"), labels=given)
    (checkpoint,) = settings.checkpoints
    assert [checkpoint.label, settings.twin_label] == labels


def test_a_twin_is_the_second_model():
    with pytest.raises(UserError, match="--compare and --draft-quantization int8 exclude"):
        EvalSettings("one", TEXT, compare="two", twin=TwinSettings("int8"))
    with pytest.raises(UserError, match="there must be 2, one for each model"):
        EvalSettings("one", TEXT, twin=TwinSettings("int8"), labels=("one",))


def test_settings_are_refused_by_option_before_torch_is_imported():
    with pytest.raises(UserError, match="--data is missing"):
        TextSettings(())
    with pytest.raises(UserError, match="--max-tokens 1 must be at least 2"):
        TextSettings(("stdlib",), max_tokens=1)
    with pytest.raises(UserError, match="--batch-size 0 must be at least 1"):
        EvalSettings("model", TEXT, batch_size=0)
    code = (
        "import sys, vllm_layerskip.evaluation.settings;"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
