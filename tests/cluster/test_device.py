"""How a process computes: what ``prepare`` switches, and what a fingerprint depends on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.device import cpu_name, fingerprint, fingerprint_detail, prepare
from cluster.errors import ConfigError

WORDS = st.text(st.characters(exclude_characters="=\n", exclude_categories=["Cs"]), max_size=12)


@pytest.fixture(autouse=True)
def switches_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything ``prepare`` switches, as it was; the environment variable is not set at first."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = cudnn.benchmark, cudnn.allow_tf32, cuda.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    cudnn.benchmark, cudnn.allow_tf32, cuda.allow_tf32 = flags


def cuda_is(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)


@pytest.mark.parametrize("threads", [2, 1])
def test_prepare_makes_the_process_deterministic(threads: int) -> None:
    torch.use_deterministic_algorithms(False)
    assert prepare("cpu", threads) == torch.device("cpu")
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "refused by name, not merely warned of"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_prepare_keeps_a_workspace_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare("cpu", 1)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_is(False, monkeypatch)
    with pytest.raises(ConfigError, match=r"device cuda.*--device cpu"):
        prepare("cuda", 1)


@pytest.mark.parametrize(
    ("asked", "available", "given"),
    [("cpu", True, "cpu"), ("auto", False, "cpu"), ("auto", True, "cuda"), ("cuda", True, "cuda")],
)
def test_device_is_what_was_asked_for(asked: str, available: bool, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_is(available, monkeypatch)
    assert prepare(asked, 1).type == given


def test_cuda_computes_without_benchmarking_and_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_is(True, monkeypatch)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    prepare("cuda", 1)
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_detail_names_what_decides_the_bits() -> None:
    detail = fingerprint_detail(torch.device("cpu"))
    assert set(detail) == {"cpu", "capability", "torch", "threads"}
    assert all(value.strip() for value in detail.values())
    assert detail["torch"] == torch.__version__
    assert detail == fingerprint_detail(torch.device("cpu"))


def test_another_number_of_threads_is_another_class() -> None:
    found = []
    for threads in (1, 2, 1):
        prepare("cpu", threads)
        found.append(fingerprint(fingerprint_detail(torch.device("cpu"))))
    assert found[0] == found[2] != found[1]


def test_a_gpu_is_part_of_the_detail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary 100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90100)
    detail = fingerprint_detail(torch.device("cuda"))
    assert detail["gpu"] == "Imaginary 100" and "90100" in detail["cuda"]
    assert detail.items() > fingerprint_detail(torch.device("cpu")).items()


@given(detail=st.dictionaries(WORDS, WORDS, min_size=1, max_size=4), index=st.integers(0, 3), word=WORDS)
def test_fingerprint_is_short_and_changes_with_every_word(detail: dict[str, str], index: int, word: str) -> None:
    short = fingerprint(detail)
    assert len(short) == 16 and int(short, 16) >= 0
    assert fingerprint(dict(reversed(detail.items()))) == short
    name = list(detail)[index % len(detail)]
    assert (fingerprint(detail | {name: word}) == short) == (detail[name] == word)


def test_cpus_are_told_apart_by_model_and_vector_instructions() -> None:
    intel = "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon\nflags\t\t: fpu avx2 fma"
    arm = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd40"
    names = {
        cpu_name(text)
        for text in (intel, intel + " avx512f", arm, arm.replace("0xd40", "0xd4f"), arm.replace(" sve", ""))
    }
    assert cpu_name(intel) == "GenuineIntel 6 143 Xeon avx2 fma"
    assert len(names) == 5 and all(name.strip() for name in names)
