import subprocess
import sys

import pytest
import torch

from diffusion_core.networks.memory import best_memory_format

KEEP = """
import resource, sys
import torch
from diffusion_core.networks.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.ones(10_000_000).sum()  # 40 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(10_000_000).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_layout_is_channels_last_except_for_bfloat16_on_a_cpu():
    assert best_memory_format("cpu", torch.float32) == torch.channels_last
    assert best_memory_format("cpu", torch.bfloat16) == torch.contiguous_format
    assert best_memory_format(torch.device("cuda", 0), torch.bfloat16) == torch.channels_last


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_reused_without_page_faults():
    def faults(mode: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", KEEP, mode], capture_output=True, text=True, check=True).stdout
        )

    assert faults("keep") < faults("default") / 3
