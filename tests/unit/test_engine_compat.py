"""The version gate, the capability probe and the CPU shim."""

import sys
from types import ModuleType

import pytest
import torch

from hope_pt import engine
from hope_pt.engine import compat, cpu
from hope_pt.errors import ConfigError
from hope_pt.testing import tiny_run


@pytest.mark.parametrize("version", ["0.16.1", "0.17.0", "0.19.2", "0.19.2+abc"])
def test_tested_versions_pass(monkeypatch, version):
    monkeypatch.setattr(compat, "version", lambda name: version)
    assert str(compat.check_megatron()) == version


@pytest.mark.parametrize("version", ["0.12.0", "0.16.0", "0.20.0", "1.0"])
def test_other_versions_are_refused_in_one_line(monkeypatch, version):
    monkeypatch.setattr(compat, "version", lambda name: version)
    with pytest.raises(ConfigError, match=rf"^megatron-core {version} is outside the tested range .*; install it with .*$"):
        compat.check_megatron()


def test_the_web_framework_called_apex_is_recognised(monkeypatch):
    apex = ModuleType("apex")
    apex.__spec__ = compat.find_spec("json")
    monkeypatch.setitem(sys.modules, "apex", apex)
    with pytest.raises(ConfigError, match="'apex' is not NVIDIA's"):
        compat.capabilities()


def test_symbols_are_looked_up_and_not_names():
    assert compat.has_symbol("json.decoder", "JSONDecoder")
    assert not compat.has_symbol("json.decoder", "NoSuchThing")
    assert not compat.has_symbol("json.no_such_module", "JSONDecoder")
    assert not compat.has_symbol("no_such_package_at_all", "anything")


def test_accepted_drops_what_a_function_does_not_take():
    assert compat.accepted(lambda a, *, b: None, a=1, b=2, c=3) == {"a": 1, "b": 2}
    assert compat.accepted(lambda **kwargs: None, c=3) == {"c": 3}


@pytest.fixture
def started():
    plan = engine.start(tiny_run())
    yield plan
    engine.stop(plan)


def test_every_redirected_module_is_loaded_and_has_its_torch(started):
    assert cpu.is_redirected()
    for name in cpu.REDIRECTED_MODULES:
        substitute = sys.modules[name].torch
        assert substitute is not torch
        assert substitute.zeros(2, device="cuda").device.type == "cpu"
        assert substitute.cuda.current_device() == "cpu"


def test_the_redirection_is_done_once(started):
    assert cpu.redirect() is False


def test_nothing_outside_megatron_sees_the_shim(started):
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_type_names_are_cudas_within_the_context_only():
    with cpu.cuda_type_names(torch.device("cpu")):
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.BFloat16Tensor"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_one_clear_line():
    config = tiny_run()
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"device": "cuda"})})
    with pytest.raises(ConfigError, match='engine.device = "cuda" but torch sees no GPU'):
        engine.start(config)


def test_notices_are_silent_inside_quiet_and_heard_outside(recwarn):
    with compat.quiet():
        exec(compile("import warnings\nwarnings.warn('inside', UserWarning)", "x", "exec"), {"__name__": "megatron.core.x"})
    assert not recwarn.list
