"""How long a match takes with several processes on one machine, and how far it is from that of one process.

    python benchmarks/processes.py [--processes 2] [--samples 1000] [--recipe gn+ws]

The pretrained CIFAR-10 ResNet-20 is matched on so many images, by one process and by several, each of which has one
thread and its share of the images. Printed are the seconds of a second match in the same process, whether all processes
have the same bits, and the largest distance of a parameter from that of one process, relative to its length.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pretrained import cifar10_train, load

import normswap as ns

BATCH = 50


def match(given: argparse.Namespace, rank: int, size: int) -> tuple[float, dict[str, Tensor]]:
    """Match twice, and return how long the second one took, and its values."""
    torch.set_num_threads(1)
    model, _ = load("cifar10_resnet20")
    batches = cifar10_train()[0][: given.samples].split(BATCH)[rank::size]
    for _ in range(2):
        if size > 1:
            dist.barrier()
        start = time.perf_counter()
        result = ns.convert(model, given.recipe, calibration=list(batches))
        seconds = time.perf_counter() - start
    return seconds, result.model.state_dict()


def work(rank: int, given: argparse.Namespace, folder: str) -> None:
    """Be one of several processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=given.processes)
    torch.save(match(given, rank, given.processes), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--recipe", default="gn+ws")
    given = parser.parse_args()
    alone, one = match(given, 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (given, folder), nprocs=given.processes)
        many = [torch.load(f"{folder}/{rank}.pt") for rank in range(given.processes)]
    first = many[0][1]
    same = all(torch.equal(state[name], value) for _, state in many for name, value in first.items())
    apart = max(
        float((first[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12))
        for name, value in one.items()
    )
    print(f"1 process           {alone:6.1f} s")
    print(f"{given.processes} processes         {max(seconds for seconds, _ in many):6.1f} s")
    print(f"all the same bits   {same}")
    print(f"from one process    {apart:.1e}")


if __name__ == "__main__":
    main()
