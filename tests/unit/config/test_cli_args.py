# SPDX-License-Identifier: Apache-2.0
"""Catch flags of ``vllm serve`` that are lost, misread or clash on their way to EngineArgs."""

import argparse
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_layerskip.config import cli_args
from vllm_layerskip.host.wrap import wrap


def _stand_in():
    """The few lines of EngineArgs that our flags touch, on argparse's own parser."""

    @dataclasses.dataclass
    class StandIn:
        model: str
        speculative_config: dict | None = None
        spec_method: str | None = None
        spec_model: str | None = None
        spec_tokens: int | None = None

        @staticmethod
        def add_cli_args(parser):
            parser.add_argument("--model")
            parser.add_argument("--speculative-config", type=json.loads)
            parser.add_argument("--spec-method", choices=["ngram", "eagle3"])
            parser.add_argument("--spec-model")
            parser.add_argument("--spec-tokens", type=int)
            return parser

        @classmethod
        def from_cli_args(cls, args):
            return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})

    wrap(StandIn, "add_cli_args", cli_args.wrap_add_cli_args)
    wrap(StandIn, "from_cli_args", cli_args.wrap_from_cli_args)
    return StandIn, argparse.ArgumentParser()


def _vllm(name):
    import vllm.engine.arg_utils
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_layerskip.plugin import register

    register()
    return getattr(vllm.engine.arg_utils, name), FlexibleArgumentParser()


@pytest.fixture(scope="module", params=["stand-in", "EngineArgs", "AsyncEngineArgs"])
def parse(request, checkpoint):
    """``parse(*argv)``: what the command line makes of EngineArgs."""
    cls, parser = _stand_in() if request.param == "stand-in" else _vllm(request.param)
    parser = cls.add_cli_args(parser)

    def parse(*argv):
        engine_args = cls.from_cli_args(parser.parse_args(["--model", checkpoint, *argv]))
        assert type(engine_args) is cls
        return engine_args

    return parse


# A command line, and the spec_method, spec_model, spec_tokens and speculative_config it means.
COMMAND_LINES = [
    ("", (None, None, None, None)),
    (
        "--spec-model [self] --spec-tokens 5 --exit-layer 2",
        (None, "[self]", 5, {"exit_layer": 2}),
    ),
    (
        "--speculative-model [self] --num-speculative-tokens 5 --exit-layer 2",
        (None, "[self]", 5, {"exit_layer": 2}),
    ),
    ("--spec-model [self]", (None, "[self]", None, None)),
    ("--spec-model [self] --exit-layer auto", (None, "[self]", None, {"exit_layer": "auto"})),
    ("--spec-model [self] --exit-layer=-1", (None, "[self]", None, {"exit_layer": -1})),
    (
        "--spec-model [self] --no-reuse-exit-states",
        (None, "[self]", None, {"reuse_exit_states": False}),
    ),
    (
        "--spec-model [self] --reuse-exit-states --exit-layer 1",
        (None, "[self]", None, {"exit_layer": 1, "reuse_exit_states": True}),
    ),
    (
        "--spec-model [self] --draft-vocab ids.json --exit-layer 2",
        (None, "[self]", None, {"draft_vocab": "ids.json", "exit_layer": 2}),
    ),
    ("--spec-model [self] --draft-vocab none", (None, "[self]", None, {"draft_vocab": "none"})),
    ("--spec-method layerskip --spec-tokens 5", ("layerskip", None, 5, None)),
    ("--spec-method ngram --spec-tokens 3", ("ngram", None, 3, None)),
    (
        '--speculative-config {"method":"layerskip","exit_layer":2}',
        (None, None, None, {"method": "layerskip", "exit_layer": 2}),
    ),
    (
        '--speculative-config {"method":"layerskip","num_speculative_tokens":4} --exit-layer 3',
        (None, None, None, {"method": "layerskip", "num_speculative_tokens": 4, "exit_layer": 3}),
    ),
]


@pytest.mark.parametrize(("command_line", "expected"), COMMAND_LINES)
def test_flags_reach_engine_args(parse, command_line, expected):
    args = parse(*command_line.split())
    assert (
        args.spec_method,
        args.spec_model,
        args.spec_tokens,
        args.speculative_config,
    ) == expected


@pytest.mark.parametrize(
    ("flag", "config"),
    [
        ("--exit-layer=2", {"exit_layer": 2}),
        ("--exit-layer=2", {"exit-layer": 3}),
        ("--exit-layer=auto", {"exit_layer": 2}),
        ("--no-reuse-exit-states", {"reuse_exit_states": True}),
        ("--reuse-exit-states", {"reuse-exit-states": False}),
        ("--draft-vocab=ids.json", {"draft-vocab": "other.json"}),
    ],
)
def test_an_option_given_both_ways_is_an_error(parse, flag, config):
    config = json.dumps({"method": "layerskip"} | config)
    with pytest.raises(ValueError, match="mutually exclusive") as error:
        parse("--speculative-config", config, flag)
    assert flag.split("=")[0].replace("--no-", "--") in str(error.value)
    assert "Give one" in str(error.value)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--exit-layer", "x"), ("--exit-layer", "'x'", "an integer, 'auto' or 'all'")),
        (("--exit-layer", "2.5"), ("--exit-layer", "'2.5'", "an integer, 'auto' or 'all'")),
        (("--num-speculative-tokens", "many"), ("--num-speculative-tokens", "'many'")),
        (("--spec-method", "layer_skip"), ("--spec-method", "'layer_skip'", "layerskip")),
    ],
)
def test_a_malformed_flag_stops_the_command_line_and_names_the_valid_set(parse, capsys, argv, says):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for words in says:
        assert words in message


def test_parsing_one_command_line_leaves_nothing_behind_for_the_next(parse):
    parse("--spec-model", "[self]", "--exit-layer", "2", "--no-reuse-exit-states")
    assert parse().speculative_config is None


def test_vllms_dotted_spelling_of_the_json_reaches_engine_args(checkpoint):
    cls, parser = _vllm("EngineArgs")
    parser = cls.add_cli_args(parser)
    argv = ["--model", checkpoint, "-sc.method", "layerskip", "-sc.exit_layer", "2"]
    args = cls.from_cli_args(parser.parse_args(argv))
    assert args.speculative_config == {"method": "layerskip", "exit_layer": 2}


def test_flags_become_a_layerskip_engine(checkpoint):
    from vllm_layerskip.config.layerskip_config import LayerSkipConfig

    cls, parser = _vllm("EngineArgs")
    parser = cls.add_cli_args(parser)
    argv = ["--model", checkpoint, "--tokenizer", checkpoint, "--skip-tokenizer-init"]
    argv += ["--dtype", "float32", "--max-model-len", "64"]
    argv += ["--spec-model", "[self]", "--spec-tokens", "4", "--exit-layer", "3"]
    config = cls.from_cli_args(parser.parse_args(argv)).create_engine_config().speculative_config
    assert type(config) is LayerSkipConfig
    assert (config.exit_layer, config.num_speculative_tokens) == (3, 4)
    assert config.reuse_exit_states is True


SPELLINGS = {
    "long": ["--speculative-model", "[self]", "--num-speculative-tokens", "4", "--exit-layer", "3"],
    "short": ["--spec-model", "[self]", "--spec-tokens", "4", "--exit-layer", "3"],
    "json": [
        "--speculative-config",
        json.dumps({"method": "layerskip", "num_speculative_tokens": 4, "exit_layer": 3}),
    ],
}


def test_vllm_serve_makes_the_same_engine_of_every_spelling(checkpoint):
    """Through the parser of `vllm serve` itself; engine/serving/test_serve.py starts servers."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_layerskip.plugin import register

    register()
    parser = make_arg_parser(FlexibleArgumentParser())
    common = [checkpoint, "--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "64"]
    configs = {}
    for name, flags in SPELLINGS.items():
        args = parser.parse_args([*common, *flags])
        args.model = args.model_tag  # As `vllm serve` does.
        configs[name] = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    own, others = configs.pop("long"), configs.values()
    assert (own.speculative_config.exit_layer, own.num_speculative_tokens) == (3, 4)
    fields = [
        field.name
        for field in dataclasses.fields(own.speculative_config)
        if not field.name.endswith(("_model_config", "_parallel_config"))
    ]
    assert {"exit_layer", "method", "num_speculative_tokens", "reuse_exit_states"} <= set(fields)
    for other in others:
        assert other.compute_hash() == own.compute_hash()
        for name in fields:
            expected = getattr(own.speculative_config, name)
            assert getattr(other.speculative_config, name) == expected, name


@given(st.text().filter(lambda text: text not in ("all", "auto")))
def test_only_integers_auto_and_all_parse_as_an_exit_layer(text):
    try:
        expected = int(text)
    except ValueError:
        with pytest.raises(
            argparse.ArgumentTypeError, match="must be an integer, 'auto' or 'all'"
        ) as error:
            cli_args.exit_layer_argument(text)
        assert repr(text) in str(error.value)
    else:
        assert cli_args.exit_layer_argument(text) == expected


@given(st.integers())
def test_an_exit_layer_survives_the_command_line(exit_layer):
    assert cli_args.exit_layer_argument(str(exit_layer)) == exit_layer
    assert [cli_args.exit_layer_argument(word) for word in ("auto", "all")] == ["auto", "all"]
