"""The version gate, the capability probe and the CPU shim."""

import sys

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


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A directory for packages of the test's own making."""
    monkeypatch.syspath_prepend(str(tmp_path))
    compat.apex_is_foreign.cache_clear()
    yield tmp_path
    compat.apex_is_foreign.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "broken_build")]:
        del sys.modules[name]


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def test_the_web_framework_called_apex_is_named_without_being_imported_and_hidden_from_megatron(packages, caplog):
    write(packages / "apex", __init__="raise AttributeError('must not be imported')", views="")
    assert compat.apex_is_foreign()
    compat.prepare_import()
    assert "'apex' is not NVIDIA's" in caplog.text and "pip uninstall apex" in caplog.text
    with pytest.raises(ImportError):
        import apex  # noqa: F401
    assert "'apex' is not NVIDIA's" in compat.apex_problem()
    assert compat.capabilities().apex is False


def test_nvidias_apex_without_its_cuda_extensions_is_of_no_use(packages):
    write(packages / "apex", __init__="")
    write(packages / "apex/optimizers", __init__="class FusedAdam: ...")
    write(packages / "apex/normalization", __init__="class MixedFusedRMSNorm: ...")
    assert not compat.apex_is_foreign()
    assert compat.apex_problem() == "built without its CUDA extensions: no amp_C, fused_layer_norm_cuda"


def test_symbols_are_looked_up_and_not_names(packages):
    write(packages / "broken_build", __init__="raise OSError('libcudart.so.11: cannot open shared object file')")
    assert compat.problem("json.decoder", "JSONDecoder") == ""
    assert compat.problem("json.decoder", "NoSuchThing") == "json.decoder has no NoSuchThing"
    assert compat.problem("json.no_such_module", "X").startswith("cannot be imported: ModuleNotFoundError")
    assert compat.problem("no_such_package_at_all", "anything") == "not installed"
    assert compat.problem("broken_build", "X").startswith("cannot be imported: OSError: libcudart.so.11")


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
