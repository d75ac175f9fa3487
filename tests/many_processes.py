"""What each process does in the tests of many processes: torchrun starts this file, once for each of them.

Each scenario is also called in one process, with all the data: ``rank`` 0 of 1.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import normswap as ns
from normswap.initialization import sampling
from normswap.initialization.tune import tune_to
from normswap.runs.processes import together


class Net(nn.Module):
    """Two blocks and a head; of what is dark the second one sees nothing, if it is told so."""

    def __init__(self, *, choosy: bool = False, statistics: bool = True) -> None:
        super().__init__()
        self.choosy = choosy
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=statistics), nn.ReLU()
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if not self.choosy or float(x.mean()) > 0:
            y = y + self.second(y)
        return self.head(y.mean((2, 3)))


def net(dtype: torch.dtype = torch.float32, **options: bool) -> Net:
    torch.manual_seed(0)
    model = Net(**options).train()
    for _ in range(10):
        model(images(16, seed=1))
    return model.eval().to(dtype)


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = 0.5 + torch.rand(count, 3, 1, 1, generator=generator)
    return torch.randn(count, 3, 6, 6, generator=generator) * size + 0.3


def batches(rank: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """This process's batches: every ``size``-th of all."""
    return list(images(48).to(dtype).split(6))[rank::size]


def uneven(rank: int, size: int) -> list[Tensor]:
    """The same, but that all processes but the first have one batch of two samples."""
    x = images(48).double()
    rest = 2 * max(size - 1, 0)
    given = [x[6:26], *x[26 + rest :].split(5)] if rank == 0 else [x[26 + 2 * (rank - 1) :][:2]]
    return given if size > 1 else [x[6:]]


def converted(data: Any, to: Any = "gn+ws", model: nn.Module | None = None, **options: Any) -> dict[str, Any]:
    result = ns.convert(model or net(data[0].dtype), to, calibration=data, **options)
    return {"state": result.model.state_dict(), "init": str(result.init), "plan": result.plan.to_json()}


def matched_on_some_positions(rank: int, size: int) -> dict[str, Any]:
    before = sampling._MOST_PATCHES, sampling._MOST_OUTPUTS
    sampling._MOST_PATCHES, sampling._MOST_OUTPUTS = 2**15, 2**12
    try:
        return converted(batches(rank, size, torch.float64))
    finally:
        sampling._MOST_PATCHES, sampling._MOST_OUTPUTS = before


def recurrent(rank: int, size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.LSTM(4, 6, batch_first=True).double()
    data = [x.mean(3)[:, :, :4] for x in batches(rank, size, torch.float64)]
    return converted(data, None, model, recurrent="ws")


def tuned_alike(rank: int, size: int) -> dict[str, Any]:
    """Tune with the same data in all processes, which is what one process does with it."""
    data = [(x,) for x in batches(0, 1, torch.float64)]
    model = net(torch.float64)
    other = ns.convert(model, "gn+ws", init="absorb").model
    with together():
        before, after = tune_to(model, other, ["first", "second"], list(other.parameters()), data, steps=8)
    assert after < before
    return {"state": other.state_dict(), "init": f"{before:.6g} to {after:.6g}"}


def initialized(rank: int, size: int) -> dict[str, Any]:
    model = net(torch.float64)
    report = ns.initialize(model, torch.cat(batches(rank, size, torch.float64)), fresh=True)
    return {"state": model.state_dict(), "init": str(report)}


def initialized_over_time(rank: int, size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.GRU(4, 6, batch_first=True, bidirectional=True).double()
    data = [x.mean(3)[:, :, :4] for x in batches(rank, size, torch.float64)]
    report = ns.initialize(model, torch.cat(data), recurrent=True)
    return {"state": model.state_dict(), "init": str(report)}


def estimated(rank: int, size: int) -> dict[str, Any]:
    model = net(torch.float64)
    report = ns.update_statistics(model, batches(rank, size, torch.float64))
    return {"state": model.state_dict(), "init": str(report)}


def synchronized(rank: int, size: int) -> dict[str, Any]:
    """One step of training: the mean of all processes' batches, and the gradient that all their losses give."""
    model = ns.convert(net(torch.float64), "mobn", synchronized=True).model.train()
    (model(images(16).double().chunk(size)[rank]) ** 3).sum().backward()
    gradient = model.first[0].weight.grad
    assert gradient is not None
    if size > 1:
        dist.all_reduce(gradient)
    return {"state": {"mean": model.first[1].running_mean, "gradient": gradient}}


def ranked(rank: int, size: int) -> dict[str, Any]:
    costs = ns.rank_sites(net(torch.float64), calibration=batches(rank, size, torch.float64))
    return {"state": {cost.norm: torch.tensor(cost.error) for cost in costs}}


def _wide(options: dict[str, Any]) -> Callable[[int, int], dict[str, Any]]:
    return lambda rank, size: converted(batches(rank, size, torch.float64), **options)


EQUAL: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "match": _wide({}),
    "match in float32": lambda rank, size: converted(batches(rank, size)),
    "match, some positions": matched_on_some_positions,
    "match, uneven": lambda rank, size: converted(uneven(rank, size)),
    "match, groups": _wide({"to": "gn", "num_groups": "auto"}),
    "match, ln": _wide({"to": "ln", "axes": "channel"}),
    "absorb": _wide({"init": "absorb"}),
    "ws": _wide({"to": "ws"}),
    "in place": _wide({"to": "gn", "inplace": True}),
    "exact": _wide({"to": "wn+mobn"}),
    "no statistics": lambda rank, size: converted(
        batches(rank, size, torch.float64), "gn", net(torch.float64, statistics=False)
    ),
    "recurrent": recurrent,
    "tune": tuned_alike,
    "initialize": initialized,
    "initialize, recurrent": initialized_over_time,
    "update_statistics": estimated,
    "rank_sites": ranked,
    "synchronized": synchronized,
}
"""What must be equal in all processes, and equal to one process with all data."""


def tuned(rank: int, size: int) -> dict[str, Any]:
    return converted(batches(rank, size), init="tune", tune_steps=8)


def by_itself(rank: int, size: int) -> dict[str, Any]:
    return converted(batches(rank, size), processes=False)


def not_finite_in_one(rank: int, size: int) -> dict[str, Any]:
    data = batches(rank, size)
    data[-1][0, 0, 0, 0] = float("nan") if rank == 1 else 0.0
    return converted(data)


def fails_in_one(rank: int, size: int) -> dict[str, Any]:
    calls = 0

    def run(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls > 5:
            raise RuntimeError("a disk is full")
        found: Tensor = model(x)
        return found

    return converted(batches(rank, size), forward_fn=run)


def no_data_in_one(rank: int, size: int) -> dict[str, Any]:
    return {"init": str(ns.initialize(net(), [] if rank == 1 else batches(rank, size)))}


def other_ways(rank: int, size: int) -> dict[str, Any]:
    data = [x - 3 if rank == 1 else x + 3 for x in batches(rank, size)]
    return converted(data, "gn", net(choosy=True), example_inputs=images(2) + 3)


def other_models(rank: int, size: int) -> dict[str, Any]:
    model = net()
    with torch.no_grad():
        model.first[0].weight[0, 0, 0, 0] += 1e-6 * rank
    return converted(batches(rank, size), model=model)


def other_recipes(rank: int, size: int) -> dict[str, Any]:
    return converted(batches(rank, size), "gn" if rank == 1 else "ln")


def other_calls(rank: int, size: int) -> dict[str, Any]:
    return initialized(rank, size) if rank == 1 else converted(batches(rank, size))


APART: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "tune on shares": tuned,
    "auto": _wide({"to": "auto"}),
    "by itself": by_itself,
    "not finite in one": not_finite_in_one,
    "fails in one": fails_in_one,
    "no data in one": no_data_in_one,
    "other ways": other_ways,
    "other models": other_models,
    "other recipes": other_recipes,
    "other calls": other_calls,
    "at last": lambda rank, size: converted(batches(rank, size)),
}


def train(model: nn.Module, rank: int) -> None:
    """Take a few steps on data of this process's own."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-2)
    for step in range(3):
        model(images(8, seed=10 * step + rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


def on_meta(to: str, **options: Any) -> nn.Module:
    """The converted network, without values, sharded as FSDP2 does it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = ns.convert(Net(), to, **options).model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device="cpu")


def sharded(rank: int, size: int) -> dict[str, Any]:
    """Convert on the meta device, shard, load, train, store and read with DCP, gather and fold."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    found: dict[str, Any] = {}
    x, everything = images(8), StateDictOptions(full_state_dict=True)
    for name, options in {"wn+mobn, synchronized": {"synchronized": True}, "wn+mobn": {}, "gn+ws": {}}.items():
        recipe = name.partition(",")[0]
        plain = ns.convert(net(), recipe, **options).model
        model = on_meta(recipe, **options)
        set_model_state_dict(model, plain.state_dict(), options=everything)
        loaded = apart(model.eval()(x), plain.eval()(x))
        refused = []
        for verb in (ns.fold, ns.convert, lambda m: ns.save(m, os.devnull + ".safetensors")):
            try:
                verb(model)
            except ns.NormswapError as error:
                refused.append(error.code)
        train(model, rank)
        output = model(x)
        means = [torch.empty(8) for _ in range(size)]
        dist.all_gather(means, getattr(model.first[1], "running_mean", torch.zeros(8)))
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=FOLDER / name)
        again = on_meta(recipe, **options)
        state = get_model_state_dict(again)
        dcp.load({"model": state}, checkpoint_id=FOLDER / name)
        set_model_state_dict(again, state)
        gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        folded = 0.0
        if rank == 0:
            plain.load_state_dict(gathered)
            folded = apart(ns.fold(plain)(x), output)
        found[name] = {
            "loaded": loaded,
            "refused": refused,
            "means": apart(*means[:2]),
            "again": apart(again.eval()(x), output),
            "folded": folded,
        }
    return found


APART["sharded"] = sharded
FOLDER = Path()


def main(folder: str, names: list[str]) -> None:
    global FOLDER
    FOLDER = Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    results: dict[str, dict[str, Any]] = {}
    for name in names or [*EQUAL, *APART]:
        try:
            results[name] = (EQUAL | APART)[name](rank, size)
        except Exception as error:  # is told, and the others go on
            results[name] = {"error": f"{error}" if isinstance(error, ns.NormswapError) else traceback.format_exc()}
    torch.save(results, FOLDER / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
