# SPDX-License-Identifier: Apache-2.0
"""Catch a supported vLLM that lacks what we touch, without having it installed; and a tool
that would not see that: the tool must see in the installed vLLM what Python sees."""

import inspect
import json
import zipfile
from pathlib import Path

import check_vllm
import pytest
from check_vllm import NotFound, Resolver, Signature, Sources, inspect_sources

from vllm_layerskip.host import check, contacts, version

DATA = Path(__file__).parent / "data"
RECORDED = {
    path.name.split("-")[1]: json.loads(path.read_text())["contacts"]
    for path in DATA.glob("vllm-*-contacts.json")
}
OLD, NEW = "0.32.0", "0.33.0"
RECORD_AGAIN = (
    "record the contacts again: python tools/check_vllm.py VERSION "
    "--record tests/unit/tools/data/vllm-VERSION-contacts.json"
)


@pytest.fixture(scope="module")
def installed():
    """Signatures by contact path, from the installed vLLM's files."""
    return inspect_sources(Sources(check_vllm.installed_root()), version.vllm_version()).signatures


def as_python_sees_it(path):
    """Parameters of a contact of the installed vLLM, in the tool's notation."""
    found = inspect.unwrap(check.resolve(path), stop=lambda f: hasattr(f, "__signature__"))
    if hasattr(found, "arg_names"):  # A Triton kernel.
        return tuple(found.arg_names)
    if not callable(found) or isinstance(found, property):
        return None
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:
        return None
    notation = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            notation.append(f"*{parameter.name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            notation.append(f"**{parameter.name}")
        else:
            if parameter.kind is parameter.KEYWORD_ONLY and not any(
                name.startswith("*") for name in notation
            ):
                notation.append("*")
            notation.append(parameter.name + "=" * (parameter.default is not parameter.empty))
    is_classmethod = "." in path.partition(":")[2] and notation[:1] == ["cls"]
    return tuple(notation[1:] if is_classmethod else notation)


@pytest.mark.parametrize("contact", contacts.all_contacts(), ids=lambda contact: contact.path)
def test_the_tool_sees_the_installed_vllm_as_python_does(installed, contact):
    found = installed[contact.path]
    assert found is not None
    if found.kind == "kernel":
        assert tuple(found.names) == as_python_sees_it(contact.path)
    elif found.kind in ("function", "class"):
        seen = as_python_sees_it(contact.path)
        if check.resolve(contact.path).__module__ == "vllm.compilation.decorators":
            # A class's constructor within the compiler's, which hands everything on.
            assert set(found.names) <= {name.strip("*=") for name in seen}
        else:
            assert found.parameters == seen
    else:
        assert found.parameters is None


def test_the_record_of_the_installed_version_is_current(installed):
    release = version.release_of(version.vllm_version())
    if release != version.release_of(OLD):
        pytest.skip(f"vLLM {version.vllm_version()} is installed")
    recorded = {
        path: (kind, None if parameters is None else tuple(parameters))
        for path, (kind, parameters) in RECORDED[OLD].items()
    }
    assert recorded == {path: tuple(found) for path, found in installed.items()}, RECORD_AGAIN


@pytest.mark.parametrize("release", RECORDED)
def test_every_contact_fits_each_supported_version(release):
    recorded = RECORDED[release]
    assert recorded.keys() == {contact.path for contact in contacts.all_contacts()}, RECORD_AGAIN
    assert None not in recorded.values()
    problems = [
        check.parameters_problem(contact, Signature(*recorded[contact.path]).names)
        for contact in contacts.all_contacts()
        if contact.parameters
    ]
    assert [problem for problem in problems if problem is not None] == []


def required(parameters):
    return {name for name in parameters or () if name[0] != "*" and name[-1] != "="}


def test_a_later_version_wants_no_argument_that_we_do_not_give():
    for path, (kind, parameters) in RECORDED[NEW].items():
        if kind in ("function", "class"):
            old = {name.strip("*=") for name in RECORDED[OLD][path][1] or ()}
            assert required(parameters) <= old, path


def contact(path, parameters=()):
    return contacts.HostContact(path, "called", "every", "for a test", parameters)


def overrides():
    """Our methods that take the place of vLLM's, by the contact that they override."""
    from vllm_layerskip.config.layerskip_config import LayerSkipConfig
    from vllm_layerskip.models.llama import LayerSkipLlamaForCausalLM
    from vllm_layerskip.worker.logprob_rejection_sampler import LogprobRejectionSampler
    from vllm_layerskip.worker.model_state import LayerSkipModelState
    from vllm_layerskip.worker.speculator import LayerSkipSpeculator

    for cls in (
        LayerSkipConfig,
        LayerSkipModelState,
        LayerSkipSpeculator,
        LogprobRejectionSampler,
        LayerSkipLlamaForCausalLM,
    ):
        vllms = {base.__qualname__: base for base in cls.__mro__ if base.__module__[:5] == "vllm."}
        for contact in contacts.all_contacts():
            owner, _, name = contact.path.partition(":")[2].rpartition(".")
            ours = inspect.getattr_static(cls, name, None)
            if owner in vllms and inspect.isfunction(ours) and ours.__module__[:6] == "vllm_l":
                yield contact.path, ours


def test_our_overrides_take_what_every_version_passes():
    found = dict(overrides())
    for name in ("propose", "set_attn", "load_draft_model", "prepare_attn", "add_request"):
        assert any(path.endswith(f".{name}") for path in found), name
    for path, ours in found.items():
        taken = inspect.signature(ours).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            continue
        for release, recorded in RECORDED.items():
            passed = Signature(*recorded[path]).names
            named = [
                name for name in taken if taken[name].kind is not inspect.Parameter.VAR_POSITIONAL
            ]
            if len(named) < len(taken):
                passed = passed[: len(named)]  # *args takes the others.
            assert [name for name in passed if name in taken] == named[: len(passed)], (
                release,
                path,
            )


MODULES = {
    "pkg/__init__.py": """
        from pkg.parts import *
        from .parts import Part as Renamed, circular
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from pkg.parts import only_typed
        else:
            def only_typed(at_runtime): ...
        registry = Registry()
        alias = work
    """,
    "pkg/parts.py": """
        import pkg.base as base
        from typing import ClassVar, NamedTuple, overload
        from dataclasses import dataclass, field
        from external import Unknown
        from pkg import circular
        __all__ = ["Part", "Registry", "work", "Data", "Wide", "Pair"]

        class Part(base.Base, Unknown):
            size: int = 1
            def own(self, a, *, b, c=1, **more): ...
            @property
            def length(self): ...
            @staticmethod
            def static(a, b=2): ...
            @classmethod
            def of_class(cls, a): ...

        class Registry:
            def register(self, name, cls): ...

        @overload
        def work(a: int): ...
        @overload
        def work(a: str): ...
        def work(a, b=None, *rest): ...

        @dataclass
        class Data:
            first: int
            second: int = 0
            shared: ClassVar[int] = 3
            third: list = field(default_factory=list)
            hidden: int = field(default=0, init=False)

        @dataclass
        class Wide(Data):
            fourth: int = 4

        class Pair(NamedTuple):
            left: int
            right: int = 0

        def _private(): ...
        def unexported(): ...
    """,
    "pkg/base.py": """
        try:
            from fast import helper
        except ImportError:
            def helper(slow): ...

        class Base:
            def __init__(self, x, y=1): ...
            def inherited(self, p): ...
    """,
}


@pytest.fixture(params=["folder", "wheel"])
def sources(tmp_path, request):
    if request.param == "folder":
        for name, text in MODULES.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(inspect.cleandoc(text))
        return Sources(tmp_path, "pkg")
    wheel = tmp_path / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in MODULES.items():
            archive.writestr(name, inspect.cleandoc(text))
    return Sources(zipfile.Path(wheel), "pkg")


@pytest.mark.parametrize(
    ("path", "kind", "parameters"),
    [
        ("pkg.parts:Part.own", "function", ("self", "a", "*", "b", "c=", "**more")),
        ("pkg:Part.inherited", "function", ("self", "p")),
        ("pkg:Renamed.inherited", "function", ("self", "p")),
        ("pkg:Part.__init__", "function", ("self", "x", "y=")),
        ("pkg:Part", "class", ("x", "y=")),
        ("pkg:Part.length", "property", None),
        ("pkg:Part.size", "attribute", None),
        ("pkg:Part.static", "function", ("a", "b=")),
        ("pkg:Part.of_class", "function", ("a",)),
        ("pkg:work", "function", ("a", "b=", "*rest")),
        ("pkg:alias", "function", ("a", "b=", "*rest")),
        ("pkg:only_typed", "function", ("at_runtime",)),
        ("pkg:registry", "value", None),
        ("pkg:registry.register", "function", ("self", "name", "cls")),
        ("pkg:Data", "class", ("first", "second=", "third=")),
        ("pkg:Wide.__init__", "function", ("self", "first", "second=", "third=", "fourth=")),
        ("pkg:Pair", "class", ("left", "right=")),
        ("pkg.parts:_private", "function", ()),
    ],
)
def test_a_name_is_bound_as_python_binds_it(sources, path, kind, parameters):
    assert Resolver(sources).signature(path) == (kind, parameters)


@pytest.mark.parametrize(
    "path",
    [
        "pkg:gone",
        "pkg.gone:work",
        "pkg.parts:circular",
        "gone:work",
        "pkg:Part.gone",
        "pkg:unexported",
        "pkg:_private",
        "pkg:work.attribute",
    ],
)
def test_a_name_that_is_gone_is_not_found(sources, path):
    with pytest.raises(NotFound):
        Resolver(sources).signature(path)


def test_problems_name_the_contact_and_what_is_wrong(sources):
    contacts = (
        contact("pkg:work", ("a", "b")),
        contact("pkg:work_moved", ("a",)),
        contact("pkg:Part.own", ("self", "a", "renamed")),
    )
    report = inspect_sources(sources, "1.0", contacts)
    missing, renamed = report.problems
    assert "pkg:work_moved is missing" in missing
    assert "pkg:Part.own takes (self, a, b, c, more)" in renamed
    assert json.loads(report.to_json()) == {
        "vllm": "1.0",
        "contacts": {
            "pkg:work": ["function", ["a", "b=", "*rest"]],
            "pkg:work_moved": None,
            "pkg:Part.own": ["function", ["self", "a", "*", "b", "c=", "**more"]],
        },
    }


def test_changes_since_a_record_are_told(sources):
    report = inspect_sources(sources, "2.0", [contact("pkg:work"), contact("pkg:Part")])
    old = {"vllm": "1.0", "contacts": {"pkg:work": ["function", ["a"]]}}
    (change,) = check_vllm.changes(old, report)
    assert change.startswith("pkg:work\n")
    assert list(check_vllm.changes(json.loads(report.to_json()), report)) == []


@pytest.mark.slow
def test_the_record_of_the_next_version_is_that_of_its_wheel():
    """Needs a package index: downloads the wheel, some 340 MB, once."""
    sources = Sources(zipfile.Path(check_vllm.download(NEW)))
    report = inspect_sources(sources, NEW)
    assert report.problems == []
    assert json.loads(report.to_json())["contacts"] == RECORDED[NEW], RECORD_AGAIN
