# SPDX-License-Identifier: Apache-2.0
"""Catch a vLLM that no longer has what this plugin touches, and a check that would not see it."""

import inspect
import sys
import types
from typing import get_args

import pytest

from vllm_layerskip.architectures import SUPPORTED_ARCHITECTURES
from vllm_layerskip.host import check, contacts, environment, version
from vllm_layerskip.host.wrap import wrap, wrap_init_speculator


def fake_contact(path, parameters=()):
    return contacts.HostContact(path, "called", "every", "for a test", parameters)


@pytest.mark.parametrize("contact", contacts.all_contacts(), ids=lambda contact: contact.path)
def test_the_installed_vllm_has_what_we_touch(contact):
    assert check.contact_problem(contact) is None


def test_every_contact_is_listed_once_and_says_why():
    assert {contact.path for contact in contacts.CONTACTS} <= {
        c.path for c in contacts.all_contacts()
    }
    paths = [contact.path for contact in contacts.CONTACTS]
    assert len(set(paths)) == len(paths)
    assert all(contact.why for contact in contacts.CONTACTS)


def test_the_contacts_of_every_model_are_listed():
    paths = {contact.path for contact in contacts.all_contacts()}
    for model in SUPPORTED_ARCHITECTURES.values():
        for path in (f"{model.vllm.causal_lm}.forward", f"{model.vllm.layer}.forward"):
            assert path in paths


def test_the_installed_vllm_is_supported():
    check.require_supported_vllm()


@pytest.fixture
def fake_host(monkeypatch):
    """A module ``fake_host`` with one function and one class of each kind of method."""

    def function(first, second, *, third=None):
        return first

    class Owner:
        def method(self, first, second):
            return "method", first

        @staticmethod
        def static(first, second):
            return "static", first

        @classmethod
        def of_class(cls, first, second):
            return cls.__name__, first

        @property
        def size(self):
            return 1

    class Child(Owner):
        pass

    module = types.ModuleType("fake_host")
    module.function, module.Owner, module.Child = function, Owner, Child
    monkeypatch.setitem(sys.modules, "fake_host", module)
    return module


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("fake_host:function", ()),
        ("fake_host:function", ("first", "second", "third")),
        ("fake_host:function", ("first", "third")),
        ("fake_host:Owner.method", ("self", "first")),
        ("fake_host:Owner.static", ("first", "second")),
        ("fake_host:Owner.of_class", ("first", "second")),
        ("fake_host:Child.of_class", ("first", "second")),
        ("fake_host:Owner.size", ()),
    ],
)
def test_a_contact_that_is_there_is_no_problem(fake_host, path, parameters):
    assert check.contact_problem(fake_contact(path, parameters)) is None


@pytest.mark.parametrize(
    ("path", "parameters", "says"),
    [
        ("no_such_module:function", (), "missing"),
        ("fake_host:gone", (), "missing"),
        ("fake_host:Owner.gone", ("self",), "missing"),
        ("fake_host:Gone.method", (), "missing"),
        ("fake_host:function", ("first", "renamed"), "takes (first, second, third)"),
        ("fake_host:function", ("second", "first"), "takes (first, second, third)"),
        ("fake_host:Owner.method", ("first", "third"), "takes (self, first, second)"),
        ("fake_host:Owner.of_class", ("first", "second", "third"), "takes (first, second)"),
    ],
)
def test_a_contact_that_moved_is_named(fake_host, path, parameters, says):
    problem = check.contact_problem(fake_contact(path, parameters))
    assert problem is not None
    assert path in problem
    assert says in problem
    assert all(name in problem for name in parameters if says != "missing")


def test_a_vllm_that_does_not_fit_is_refused_with_every_problem(monkeypatch, fake_host):
    misfits = (
        fake_contact("fake_host:gone"),
        fake_contact("fake_host:Owner.method", ("self", "renamed")),
        fake_contact("fake_host:function", ("first",)),
    )
    monkeypatch.setattr(check, "CONTACTS", misfits)
    check.check_contacts.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"update vllm-layerskip\.$") as error:
            check.require_supported_vllm()
    finally:
        check.check_contacts.cache_clear()
    assert "fake_host:gone" in str(error.value)
    assert "fake_host:Owner.method" in str(error.value)
    assert "fake_host:function" not in str(error.value)


@pytest.mark.parametrize(
    "release",
    [
        "0.32.0",
        "0.32.0+cpu",
        "0.32.1",
        "0.33.1",
        "0.33.0rc2.dev14+g1a2b3c4d5",
        # A build from source without a release number: the contacts decide.
        "dev",
        "unknown",
        "main-1a2b3c4",
    ],
)
def test_a_version_in_the_range_or_without_a_number_is_no_problem(release):
    assert version.version_problem(release) is None


@pytest.mark.parametrize(
    "release", ["0.31.9", "0.9.2", "0.34.0", "0.34.0rc1.dev3+gabc", "1.0.0", "1.32.0", "0.3.2"]
)
def test_another_version_is_refused_with_the_range_and_a_remedy(monkeypatch, release):
    monkeypatch.setattr(version, "vllm_version", lambda: release)
    with pytest.raises(RuntimeError, match="pip install") as error:
        check.require_supported_vllm()
    assert f"vLLM {release} is installed" in str(error.value)
    assert ">=0.32,<0.34" in str(error.value)


@pytest.fixture
def newer_vllm(monkeypatch):
    monkeypatch.setattr(version, "vllm_version", lambda: "0.34.0")
    monkeypatch.delenv(environment.ALLOW_UNTESTED, raising=False)
    version.warn_of_untested_vllm.cache_clear()
    yield monkeypatch
    version.warn_of_untested_vllm.cache_clear()


def warnings_of(log):
    """The handler also hears the root logger: the same record may come twice."""
    records = {id(record): record for record in log.records if record.levelname == "WARNING"}
    return list(records.values())


def test_a_newer_vllm_is_refused_on_use_and_the_override_named(newer_vllm):
    newer_vllm.setenv(environment.ALLOW_UNTESTED, "0")
    with pytest.raises(RuntimeError, match="LAYERSKIP_ALLOW_UNTESTED_VLLM=1"):
        check.require_supported_vllm()


def test_a_newer_vllm_runs_with_the_override_and_says_so(newer_vllm, layerskip_log):
    newer_vllm.setenv(environment.ALLOW_UNTESTED, "1")
    check.require_supported_vllm()
    (record,) = warnings_of(layerskip_log)
    assert "not tested on vLLM 0.34.0" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_the_override_does_not_reach_over_contacts_that_moved(newer_vllm, fake_host):
    newer_vllm.setenv(environment.ALLOW_UNTESTED, "1")
    newer_vllm.setattr(check, "CONTACTS", (fake_contact("fake_host:gone"),))
    check.check_contacts.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="fake_host:gone is missing"):
            check.require_supported_vllm()
    finally:
        check.check_contacts.cache_clear()


@pytest.mark.parametrize("value", ["", "yes", "true", "2"])
def test_an_override_of_another_value_is_an_error(newer_vllm, value):
    newer_vllm.setenv(environment.ALLOW_UNTESTED, value)
    with pytest.raises(ValueError, match="LAYERSKIP_ALLOW_UNTESTED_VLLM=.* must be 1 or 0"):
        check.require_supported_vllm()


def test_loading_the_plugin_warns_once_of_a_newer_vllm(newer_vllm, layerskip_log):
    from vllm_layerskip.plugin import register

    for _ in range(3):
        register()
    (record,) = warnings_of(layerskip_log)
    assert record.exc_info is None
    message = record.getMessage()
    assert "vLLM 0.34.0 is installed" in message
    assert "do not ask for LayerSkip are unaffected" in message
    assert "\n" not in message


def test_an_engines_other_processes_do_not_repeat_the_warning(newer_vllm, layerskip_log):
    newer_vllm.setattr(version.multiprocessing, "parent_process", lambda: object())
    version.warn_of_untested_vllm()
    assert layerskip_log.records == []


def test_a_supported_vllm_is_loaded_silently(layerskip_log):
    version.warn_of_untested_vllm.cache_clear()
    version.warn_of_untested_vllm()
    assert layerskip_log.records == []


def test_plain_engines_run_on_a_newer_vllm(newer_vllm, engine_config):
    assert engine_config().speculative_config is None
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    assert engine_config(ngram).speculative_config.method == "ngram"
    with pytest.raises(RuntimeError, match="vLLM 0.34.0 is installed"):
        engine_config({"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": 3})


def _shout(original):
    return lambda *args, **kwargs: ("wrapped", *original(*args, **kwargs))


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("method", types.FunctionType, ("wrapped", "method", 1)),
        ("static", staticmethod, ("wrapped", "static", 1)),
        ("of_class", classmethod, ("wrapped", "Child", 1)),
    ],
)
def test_wrap_keeps_the_kind_of_a_method_and_is_applied_once(fake_host, name, kind, expected):
    signature = inspect.signature(getattr(fake_host.Owner, name))
    for _ in range(3):
        wrap(fake_host.Owner, name, _shout)
    assert type(inspect.getattr_static(fake_host.Owner, name)) is kind
    assert getattr(fake_host.Child(), name)(1, 2) == expected
    assert getattr(fake_host.Child(), name)(1, second=2) == expected
    if kind is not types.FunctionType:
        assert getattr(fake_host.Child, name)(1, 2) == expected
    # check_contacts() runs after register(): it must still see vLLM's own parameters.
    assert inspect.signature(getattr(fake_host.Owner, name)) == signature


def test_wrapping_an_inherited_method_does_not_wrap_the_wrapper(fake_host):
    wrap(fake_host.Owner, "method", _shout)
    wrap(fake_host.Child, "method", _shout)
    assert fake_host.Child().method(1, 2) == ("wrapped", "method", 1)


@pytest.fixture
def fake_spec_decode(monkeypatch):
    package = types.ModuleType("vllm.v1.worker.gpu.spec_decode")
    package.init_speculator = lambda *args: ("vllm", *args)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.delitem(sys.modules, contacts.MODEL_RUNNER_MODULE, raising=False)
    return package


def _runner(monkeypatch, init_speculator):
    runner = types.ModuleType(contacts.MODEL_RUNNER_MODULE)
    runner.init_speculator = init_speculator
    monkeypatch.setitem(sys.modules, runner.__name__, runner)
    return runner


def test_a_runner_imported_later_finds_the_wrapped_init_speculator(fake_spec_decode):
    for _ in range(2):
        wrap_init_speculator(_shout)
    assert fake_spec_decode.init_speculator(1) == ("wrapped", "vllm", 1)


def test_a_runner_imported_already_gets_the_wrapped_init_speculator(monkeypatch, fake_spec_decode):
    runner = _runner(monkeypatch, fake_spec_decode.init_speculator)
    for _ in range(2):
        wrap_init_speculator(_shout)
    assert runner.init_speculator(1) == ("wrapped", "vllm", 1)


def test_a_runner_with_a_function_of_its_own_keeps_it(monkeypatch, fake_spec_decode):
    runner = _runner(monkeypatch, lambda *args: ("somebody else's", *args))
    wrap_init_speculator(_shout)
    assert runner.init_speculator(1) == ("somebody else's", 1)


def test_every_contact_says_what_we_do_with_it_and_where():
    kinds, processes = get_args(contacts.Kind), get_args(contacts.Process)
    for contact in contacts.all_contacts():
        assert contact.kind in kinds, contact.path
        assert contact.process in processes, contact.path
        # What goes around vLLM's interfaces would go if vLLM had one for it.
        assert contact.remove_when or contact.kind != "wrapped", contact.path


def test_what_is_called_overridden_is_overridden_and_nothing_else():
    for cls in our_classes():
        bases = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
        defined = {
            name
            for name, value in vars(cls).items()
            if getattr(getattr(value, "fget", value), "__module__", "") == cls.__module__
        }
        overridden = {name for name in defined if any(name in vars(base) for base in bases)}
        kinds = {
            contact.path.rpartition(".")[2]: contact.kind
            for contact in contacts.all_contacts()
            if contact.path.partition(":")[2].partition(".")[0] in {b.__name__ for b in bases}
        }
        said = {name for name, kind in kinds.items() if kind in ("overridden", "subclassed")}
        assert said <= overridden, cls
        # A dataclass makes __eq__, and its __repr__ is for logs. A wrapped name may be overridden
        # as well.
        others = overridden - said - {"__eq__", "__repr__"}
        assert {kinds.get(name) for name in others} <= {"wrapped"}, cls


def our_classes():
    from vllm_layerskip.config.layerskip_config import LayerSkipConfig
    from vllm_layerskip.worker.draft_graphs import DraftCudaGraphManager
    from vllm_layerskip.worker.model_state import LayerSkipModelState
    from vllm_layerskip.worker.speculator import LayerSkipSpeculator

    return LayerSkipConfig, DraftCudaGraphManager, LayerSkipModelState, LayerSkipSpeculator
