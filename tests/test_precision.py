"""The choice of the number format of convolutions."""

import logging

import pytest
import torch
from torch.nn import functional as F

from bundle import precision
from bundle.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch):
    """``cpu(relative)``: a CPU on which bfloat16 takes so much of float32's time."""
    clock = [0.0]

    def of(relative):
        def conv2d(x, weight, padding):
            clock[0] += 0.001 * (relative if x.dtype == torch.bfloat16 else 1)

        precision._fastest_of_cpu.cache_clear()
        monkeypatch.setattr(F, "conv2d", conv2d)
        monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    yield of
    precision._fastest_of_cpu.cache_clear()


@pytest.mark.parametrize(("relative", "chosen"), [(0.5, "bfloat16"), (0.9, "float32"), (20, "float32")])
def test_a_trial_decides_and_the_log_tells(relative, chosen, cpu, caplog):
    cpu(relative)
    with caplog.at_level(logging.INFO):
        assert precision.choose("auto", CPU) == chosen
    assert f"computing in {chosen}" in caplog.text and f"{relative:.2f} of its time" in caplog.text


def test_a_trial_on_this_machine_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    precision._fastest_of_cpu.cache_clear()
    assert precision.choose("auto", CPU) in ("float32", "bfloat16")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_what_is_asked_for_is_not_tried(given, monkeypatch):
    monkeypatch.setattr(precision, "_fastest_of_cpu", lambda: pytest.fail("tried"))
    assert precision.choose(given, CPU) == given


@pytest.mark.parametrize(("native", "chosen"), [(True, "bfloat16"), (False, "float16")])
def test_gpus_compute_in_half_precision(native, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert precision.choose("auto", torch.device("cuda", 0)) == chosen


@pytest.mark.parametrize("given", ["half", True, None])
def test_other_formats_are_refused(given):
    with pytest.raises(InputError, match=f"precision must be auto, float32 or bfloat16, got {given!r}"):
        precision.choose(given, CPU)


def test_the_result_is_float32_whatever_the_network_computes_in():
    x = torch.rand(1, 1, 8, 8)
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    assert precision.in_precision(network, "float32") is network
    rounded = precision.in_precision(network, "bfloat16")(x)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - network(x)).abs().max() < 0.02
