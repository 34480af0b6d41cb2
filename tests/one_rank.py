"""One of some gloo ranks: `python one_rank.py RANK WORLD DIRECTORY TEST_FILE` (conftest.py).

Calls the test file's `one_rank(case, rank)` for each of its CASES and writes the tensors that it
returns to DIRECTORY/RANK.CASE.safetensors.
"""

import importlib.util
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file


def main(rank: int, world: int, directory: Path, test_file: Path) -> None:
    spec = importlib.util.spec_from_file_location(test_file.stem, test_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world
    )
    for number, case in enumerate(module.CASES):
        save_file(module.one_rank(case, rank), directory / f"{rank}.{number}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
