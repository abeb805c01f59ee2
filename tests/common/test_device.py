"""Device, precision and threads."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alone import records_of, samples
from forked_python import Run
from recomputed_models import batch_of, tiny

from fedveil.common.config.text import read_settings_file
from fedveil.common.errors import ConfigError
from fedveil.common.model.device import (
    autocast,
    choose_attention,
    choose_device,
    choose_precision,
    worker_count,
)
from fedveil.common.threads import CORES, OURS, THREADS, own_threads, site_cores
from fedveil.strategies.job import configure

CPU = torch.device("cpu")


def test_the_cpu_can_always_be_asked_for() -> None:
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(("gpus", "chosen"), [(0, "cpu"), (2, "cuda")])
def test_auto_takes_a_gpu_where_there_is_one(gpus: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert choose_device("auto") == torch.device(chosen)


@pytest.mark.parametrize(
    ("wanted", "gpus", "fits"),
    [("cuda", 0, False), ("cuda:0", 0, False), ("cuda", 1, True), ("cuda:1", 1, False), ("cuda:1", 2, True)],
)
def test_a_gpu_that_is_not_there_is_refused_with_the_number_of_gpus(
    wanted: str, gpus: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if fits:
        assert choose_device(wanted) == torch.device(wanted)
        return
    with pytest.raises(ConfigError, match=f"{wanted}.*{gpus} GPUs") as refusal:
        choose_device(wanted)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("wanted", ["gpu", "", "cuda:x", "CPU", "cuda:-1"])
def test_a_word_that_is_no_device_is_refused_in_one_line(wanted: str) -> None:
    with pytest.raises(ConfigError, match="auto, cpu, cuda or cuda:N") as refusal:
        choose_device(wanted)
    assert "\n" not in str(refusal.value)


def test_a_precision_is_taken_by_its_name() -> None:
    assert choose_precision("float32", CPU) == torch.float32
    assert choose_precision("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("avx", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_auto_is_bfloat16_only_where_the_cpu_computes_in_it(
    avx: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision("auto", CPU) == (torch.bfloat16 if avx or amx else torch.float32)


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_a_gpu_does_not_count_emulated_bfloat16(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert choose_precision("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_forward_pass_computes_in_the_chosen_precision_on_float32_weights(precision: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 3)
    with autocast(CPU, precision):
        output = layer(torch.ones(2, 4))
    assert output.dtype == precision
    output.float().sum().backward()
    assert layer.weight.dtype == torch.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("device", "asked"), [("cpu", ["eager"]), ("cuda", [])])
def test_only_a_cpu_leaves_the_fused_attention_kernel(device: str, asked: list[str]) -> None:
    calls: list[str] = []
    choose_attention(SimpleNamespace(set_attn_implementation=calls.append), torch.device(device))
    assert calls == asked


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that pretends there are this quota file and so many cores, of the machine and of the site."""

    def pretend(available: int, quota: str | None = None, cores: str | None = None) -> None:
        real = builtins.open

        def opened(file: Any, *args: Any, **kwargs: Any) -> Any:
            if file != "/sys/fs/cgroup/cpu.max":
                return real(file, *args, **kwargs)
            if quota is None:
                raise FileNotFoundError(file)
            return io.StringIO(quota)

        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(available)), raising=False)
        monkeypatch.setattr(builtins, "open", opened)
        for variable, value in ((CORES, cores), (THREADS, None)):
            monkeypatch.delenv(variable, raising=False)
            if value is not None:
                monkeypatch.setenv(variable, value)

    return pretend


@pytest.mark.parametrize(
    ("available", "quota", "cores", "own"),
    [
        (8, None, None, 8),
        (8, "max 100000", None, 8),
        (8, "300000 100000", None, 3),
        (8, "50000 100000", None, 1),
        (2, "400000 100000", None, 2),
        (8, "nonsense", None, 8),
        (8, None, "2", 2),
        (8, None, "64", 8),
        (8, None, "", 8),
        (8, None, "0", 1),
        (8, "300000 100000", "5", 3),
    ],
)
def test_a_site_has_the_least_of_affinity_quota_and_the_cores_that_it_was_given(
    available: int, quota: str | None, cores: str | None, own: int, machine: Any
) -> None:
    machine(available, quota, cores)
    assert site_cores() == own_threads() == own


@pytest.mark.parametrize(("threads", "own"), [("2", 2), ("64", 4), ("", 4), ("0", 1), ("3,2", 3)])
def test_threads_of_a_process_are_no_cores_of_a_site(
    threads: str, own: int, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(8, cores="4")
    monkeypatch.setenv(THREADS, threads)
    assert (site_cores(), own_threads()) == (4, own)


def test_this_machine_has_a_core() -> None:
    assert 1 <= own_threads() <= site_cores() <= (os.cpu_count() or 1)


def test_sites_that_keep_what_a_pass_costs_share_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.common.model.device.site_cores", lambda: 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert [worker_count(8, asked, keeps=False) for asked in (0, 2, 9)] == [4, 2, 4]
    assert [worker_count(8, asked, keeps=True) for asked in (0, 2, 9)] == [1, 2, 4]
    assert worker_count(3, 0, keeps=False) == 3
    assert configure({"recipe": "plain"}).config.timeline.computes_ahead is False
    for name in ("metric", "probe", "head-only"):
        assert configure(read_settings_file(Path(f"experiments/configs/{name}.toml"))).config.timeline.computes_ahead


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_gradients_under_the_fused_attention_are_each_records_own_and_those_of_plain_products(
    model_folder: Callable[[str], str], family: str
) -> None:
    """What a GPU computes by; its kernel for CPUs is the one that can be looked at everywhere."""
    plain, fused = (tiny(model_folder(family), family, again=False) for _ in range(2))
    plain.base.module.set_attn_implementation("eager")
    fused.base.module.set_attn_implementation("sdpa")
    assert fused.base.module.config._attn_implementation == "sdpa"
    records = records_of(fused)
    found = samples(fused, batch_of(fused, records))
    for mine, theirs in zip(found, samples(plain, batch_of(plain, records)), strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    for row, record in enumerate(records):
        beside = samples(fused, batch_of(fused, [records[row - 1], record]))
        for mine, sample in zip(beside, found, strict=True):
            torch.testing.assert_close(mine[1], sample[row], rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_gpus_fused_attention_has_the_gradients_of_plain_products_on_a_processor(
    model_folder: Callable[[str], str], family: str
) -> None:
    plain, fused = (tiny(model_folder(family), family, again=False, device=device) for device in ("cpu", "cuda"))
    plain.base.module.set_attn_implementation("eager")
    assert fused.base.module.config._attn_implementation == "sdpa", "a GPU computes by something else"
    records = records_of(fused)
    found = samples(fused, batch_of(fused, records))
    for mine, theirs in zip(found, samples(plain, batch_of(plain, records)), strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-5)
    for row, record in enumerate(records):
        beside = samples(fused, batch_of(fused, [records[row - 1], record]))
        for mine, sample in zip(beside, found, strict=True):
            torch.testing.assert_close(mine[1], sample[row], rtol=1e-4, atol=1e-6)


FLUSHED = """
import torch
from fedveil.client import app
from fedveil.common.model.device import denormals_flushed
app.process.set_threads()
tiny = torch.full((torch.get_num_threads() << 18,), 1e-40)
with denormals_flushed():
    print(int((tiny * 1.0).count_nonzero()), torch.get_num_threads())
print(float(torch.tensor(1e-40) * 1.0) > 0)
"""


def test_every_thread_of_a_sites_process_flushes_denormals_and_its_own_prices_do_not(fresh_python: Run) -> None:
    """In a process of its own, as a worker's: threads that were made before flush none."""
    done = fresh_python(FLUSHED)
    threads = own_threads()
    flushes = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    if flushes:
        assert done.stdout.split() == ["0", str(threads), "True"]


def test_nothing_is_set_in_a_users_own_process(fresh_python: Run) -> None:
    """Neither the number of its threads nor how they count."""
    begin = f"import os, torch; del os.environ[{OURS!r}]; torch.set_num_threads(2)"
    done = fresh_python(f"{begin}\n{FLUSHED}")
    assert done.stdout.split() == [str(2 << 18), "2", "True"]
