from __future__ import annotations

import os

import pytest
import torch

from pipelines.devices import assigned_device, deterministic, prepare_cpu, prepare_process


def test_process_takes_its_share_of_the_cores() -> None:
    former = torch.get_num_threads()
    try:
        prepare_cpu(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(former)


@pytest.mark.parametrize("cuda", [True, False])
def test_process_without_an_assigned_gpu_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """Ray does not hide the GPUs of a node from a task that asked for none."""
    monkeypatch.setattr("ray.get_gpu_ids", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert assigned_device() == torch.device("cpu")


def test_assigned_gpu_is_used_or_refused_but_never_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get_gpu_ids", lambda: [3])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert assigned_device() == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="GPU 3"):
        assigned_device()
    monkeypatch.setattr("ray.get_gpu_ids", lambda: [0, 1])
    with pytest.raises(ValueError, match="2 GPUs to one process"):
        assigned_device()


def test_process_computes_float32_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch allows TF32 in the convolutions of a GPU by default."""
    monkeypatch.setattr("ray.get_gpu_ids", lambda: [0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert prepare_process(1) == torch.device("cuda:0")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_deterministic_block_refuses_other_algorithms_and_restores_the_settings() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
