from __future__ import annotations

import torch

from pipelines.devices import prepare_cpu


def test_process_takes_its_share_of_the_cores() -> None:
    former = torch.get_num_threads()
    try:
        prepare_cpu(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(former)
