# SPDX-License-Identifier: Apache-2.0
"""Score every exit layer of a checkpoint on held-out text, in one pass.

For each exit: perplexity, next-token accuracy, and agreement with the last layer (the share of
tokens at which both have the same argmax: the share of greedy drafts that verification would
accept behind this text). With --compare the same for a second checkpoint, such as the one that
was not trained with LayerSkip.

Protocol: documents are joined to one stream of tokens, an end-of-sequence token behind each, and
cut into windows of --seq-len tokens. Each token counts once. Perplexity is exp of the mean
negative log likelihood of a token over all windows. With --stride equal to --seq-len (the
default) windows do not overlap and the first token of each does not count; a smaller stride gives
each token more context and costs more passes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_layerskip.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from vllm_layerskip.evaluation.data import BeginOfSequence, EncodedText, Windows
    from vllm_layerskip.evaluation.report import Result

DEFAULT_SEQ_LEN = 2048
"""Or the model's longest, if that is shorter."""
_DTYPES = ("float32", "bfloat16")
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="MODEL", help="Folder or name of the checkpoint.")
    what.add_argument(
        "--from-json",
        type=Path,
        metavar="FILE",
        help="Measure nothing: show the result in a file that --json wrote.",
    )
    parser.add_argument(
        "--compare", metavar="OTHER", help="A second checkpoint with the same tokenizer."
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="Names of the checkpoints in table and plot. Default: their folders' names.",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="UTF-8 text files; .jsonl files, of which each line is a JSON string or an object "
        "with the text in --text-field; folders of such files; or 'stdlib': the modules of "
        "Python's standard library that the embedded checkpoint was not trained on.",
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="Default: text.")
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="T",
        help=f"Tokens of a window. Default: {DEFAULT_SEQ_LEN}, or the model's maximum if less.",
    )
    parser.add_argument(
        "--stride", type=int, metavar="S", help="Tokens between windows' starts. Default: T."
    )
    parser.add_argument(
        "--bos",
        choices=("document", "window", "none"),
        default="document",
        help="Where the beginning-of-sequence token stands, if the tokenizer has one: before each "
        "document (default), at the head of each window, or nowhere.",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="Use the first N tokens. Default: all."
    )
    parser.add_argument(
        "--batch-size", type=int, default=4, metavar="B", help="Windows at once. Default: 4."
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="Default: float32.")
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result.")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="Write the table.")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="Draw it: .png, .svg or .pdf, by the name's end."
    )


def run(args: argparse.Namespace) -> None:
    _check_outputs(args)
    try:
        import rich  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed. Install it (pip install 'vllm-layerskip[train]')."
        ) from None
    from vllm_layerskip.evaluation import report

    if args.from_json is not None:
        _refuse_with_from_json(args)
        result = report.read_json(args.from_json)
    else:
        result = evaluate(args)
    _print(result)
    if args.json is not None:
        report.write_json(result, args.json)
    if args.markdown is not None:
        args.markdown.write_text(report.markdown(result), encoding="utf-8")
    if args.plot is not None:
        from vllm_layerskip.evaluation.plot import write_plot

        write_plot(result, args.plot)


def _check_outputs(args: argparse.Namespace) -> None:
    """Before minutes of work are spent."""
    for option in ("json", "markdown", "plot"):
        path: Path | None = getattr(args, option)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"--{option} {path} must be a file in a folder that exists.")
    if args.plot is not None:
        from vllm_layerskip.evaluation.plot import check_path

        check_path(args.plot)


def _refuse_with_from_json(args: argparse.Namespace) -> None:
    for option in ("compare", "labels", "data", "seq_len", "stride", "max_tokens"):
        if getattr(args, option) is not None:
            flag = "--" + option.replace("_", "-")
            raise UserError(f"{flag} and --from-json exclude each other: nothing is measured.")


def _print(result: Result) -> None:
    from rich.console import Console

    from vllm_layerskip.evaluation.report import terminal_table

    # Of a pipe rich would take 80 columns and fold numbers.
    Console(width=None if sys.stdout.isatty() else 160).print(terminal_table(result))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Score the checkpoints of a command line.

    Raises:
        UserError: a checkpoint, the data or a setting is not usable; the message says why.
    """
    from vllm_layerskip.evaluation import data as evaluation_data
    from vllm_layerskip.evaluation.report import KIND, labels_of

    names = [args.model] if args.compare is None else [args.model, args.compare]
    labels = labels_of(names, args.labels)
    _check_numbers(args)
    device = _device(args.device)
    configs = [_load_config(name, args.trust_remote_code) for name in names]
    seq_len = _seq_len(args, dict(zip(names, configs, strict=True)))
    encoded, bos_id = _encode(args, names, configs)
    window_bos = bos_id if args.bos == "window" else None
    longest = seq_len - (window_bos is not None)
    stride = longest if args.stride is None else args.stride
    if not 1 <= stride <= longest:
        raise UserError(
            f"--stride {stride} must be from 1 to {longest}, the tokens of text in a window."
        )
    windows = evaluation_data.cut_windows(encoded.token_ids, seq_len, stride, window_bos)
    return {
        "kind": KIND,
        "argv": args.argv,
        "versions": _versions(),
        "settings": {
            "seq_len": seq_len,
            "stride": stride,
            "bos": args.bos if bos_id is not None else "none",
            "dtype": args.dtype,
            "device": device,
            "batch_size": args.batch_size,
        },
        "data": _describe(args.data, encoded, windows),
        "models": [
            {"label": label, "model": name, **_score(args, name, device, windows)}
            for name, label in zip(names, labels, strict=True)
        ],
    }


def _check_numbers(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("--data is missing: text to score, or 'stdlib'.")
    for option, least in (("seq_len", 2), ("max_tokens", 2), ("batch_size", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            flag = "--" + option.replace("_", "-")
            raise UserError(f"{flag} {value} must be at least {least}.")


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--device {name}: {_first_line(error)}.") from None
    return name


def _load_config(name: str, trust_remote_code: bool) -> Any:
    """A checkpoint's config, if it is a decoder-only causal language model.

    Raises:
        UserError: it cannot be read, or is another kind of model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no config could be read ({_first_line(error)}). Give a folder with "
            "config.json, or a name on the model hub."
        ) from None
    architectures = list(config.architectures or ())
    if config.is_encoder_decoder or not any("CausalLM" in name for name in architectures):
        raise UserError(
            f"{name}: its architecture {architectures} is no decoder-only causal language model, "
            "so its layers predict no next tokens. Give a ...ForCausalLM, such as a Llama, "
            "Mistral, Qwen2 or Qwen3."
        )
    return config


def _seq_len(args: argparse.Namespace, configs: dict[str, Any]) -> int:
    limits = {
        name: limit
        for name, config in configs.items()
        if (limit := getattr(config, "max_position_embeddings", None)) is not None
    }
    seq_len = args.seq_len or min([DEFAULT_SEQ_LEN, *limits.values()])
    for name, limit in limits.items():
        if seq_len > limit:
            raise UserError(
                f"--seq-len {seq_len} must be at most {limit}, the max_position_embeddings of "
                f"{name}."
            )
    return seq_len


def _encode(
    args: argparse.Namespace, names: Sequence[str], configs: Sequence[Any]
) -> tuple[EncodedText, int | None]:
    """The text as token ids, which must be the same for all models; and the id that begins it."""
    from vllm_layerskip.evaluation.data import encode, read_documents

    documents = read_documents(args.data, args.text_field)
    found: list[tuple[EncodedText, int | None]] = []
    for name, config in zip(names, configs, strict=True):
        tokenizer = _load_tokenizer(name, args.trust_remote_code)
        bos: BeginOfSequence = args.bos if tokenizer.bos_token_id is not None else "none"
        encoded = encode(tokenizer, documents, bos, args.max_tokens)
        if len(encoded.token_ids) < 2:
            raise UserError(f"--data {' '.join(args.data)}: there are fewer than two tokens in it.")
        if (largest := max(encoded.token_ids)) >= config.vocab_size:
            raise UserError(
                f"{name}: its tokenizer yields token id {largest}, but its config.json has "
                f"vocab_size={config.vocab_size}. Give a checkpoint with its own tokenizer."
            )
        found.append((encoded, tokenizer.bos_token_id))
    for name, (encoded, bos_id) in zip(names[1:], found[1:], strict=True):
        if encoded.token_ids != found[0][0].token_ids or bos_id != found[0][1]:
            raise UserError(
                f"--compare {name}: its tokenizer is not that of {names[0]} "
                f"({len(encoded.token_ids)} and {len(found[0][0].token_ids)} tokens for the same "
                "text), so scores per token cannot be compared. Compare checkpoints with one "
                "tokenizer."
            )
    return found[0]


def _load_tokenizer(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no tokenizer could be read ({_first_line(error)}). Give a checkpoint with "
            "the tokenizer's files."
        ) from None


def _describe(sources: Sequence[str], encoded: EncodedText, windows: Windows) -> dict[str, Any]:
    return {
        "sources": list(sources),
        "num_documents": encoded.num_documents,
        "num_bytes": encoded.num_bytes,
        "sha256": encoded.sha256,
        "num_tokens": len(encoded.token_ids),
        "num_windows": len(windows.token_ids),
        "num_scored_tokens": windows.num_scored_tokens,
    }


def _score(args: argparse.Namespace, name: str, device: str, windows: Windows) -> dict[str, Any]:
    """Load one model, score its exits, and let go of it."""
    from tqdm import tqdm

    from vllm_layerskip.evaluation.scores import score_exits

    model = load_model(name, args.dtype, device, args.trust_remote_code)
    check_exit_head(name, model, windows, _TOLERANCE[args.dtype])
    with tqdm(total=len(windows.token_ids), unit="window", desc=f"Scoring {name}") as progress:
        scores = score_exits(
            model,
            windows.token_ids,
            args.batch_size,
            scored=windows.scored,
            progress=progress.update,
        )
    return {
        "architecture": type(model).__name__,
        "num_layers": model.config.num_hidden_layers,
        "num_parameters": model.num_parameters(),
        "exits": [score.to_dict() for score in scores],
    }


def load_model(name: str, dtype: str, device: str, trust_remote_code: bool = False) -> Any:
    """A checkpoint's causal language model, complete.

    Raises:
        UserError: it cannot be read, weights are missing, or it has no exits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_layerskip.evaluation.exits import check_decoder

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: the model could not be read ({_first_line(error)}).") from None
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{name}: {len(missing)} weights are missing, {missing[0]} first. Give a complete "
            "checkpoint."
        )
    try:
        check_decoder(model)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return model.to(device).eval()


def check_exit_head(name: str, model: nn.Module, windows: Windows, tolerance: float) -> None:
    """The last layer's exit must predict what the model itself predicts.

    Raises:
        UserError: it does not, as where a model scales its logits in a way that we do not know.
    """
    import torch

    from vllm_layerskip.evaluation.scores import last_exit_difference

    with torch.inference_mode():
        difference = last_exit_difference(model, windows.token_ids[:1, :64].to(model.device))
    if difference > tolerance:
        raise UserError(
            f"{name}: the logits of {type(model).__name__} are not those of its final norm and LM "
            f"head on the last layer's output (relative difference {difference:.1e}), so its exits "
            "cannot be scored."
        )


def _versions() -> dict[str, str]:
    import platform

    import torch
    import transformers

    from vllm_layerskip import __version__

    return {
        "vllm_layerskip": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
