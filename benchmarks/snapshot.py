"""Record what normswap computes, so that a refactoring can be shown to change nothing, bit for bit.

    python benchmarks/snapshot.py record before.json [--part zoo|pretrained] [--tree ../base] [--fraction 0.1]
    python benchmarks/snapshot.py compare before.json after.json [--common]

A case is a network × a recipe × a way to initialize; its items are the plan, the report's rows, each tensor of the
converted and of the folded state dict, the outputs of both and of the ONNX file, or the error that came instead. A
tensor is recorded as the SHA-256 of its bytes, with the sum and the largest of its absolute values to tell how far two
records are apart. Only normswap's public API is called, so that a record of older code compares with one of newer code.

Records are comparable on one machine and one version of torch: both decide the last digit of a sum.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import platform
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

Items = dict[str, Any]
INPUTS_MODULES = ("normswap.inputs", "normswap.runs.inputs")  # where the sizes of made-up inputs were, and are
EXPORTED = {"zoo": ("gn+ws", "wn+mobn", "ln"), "pretrained": ("gn+ws", "wn+mobn")}


@dataclass(frozen=True)
class Network:
    """A network, its inputs, how it is called on them, and how to convert it: options of ``convert`` by name.

    Options that are tried with one recipe only are under ``more``.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    run: Callable[[nn.Module], Any]
    ways: Mapping[str, dict[str, Any]]
    more: Mapping[str, dict[str, Any]] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------- networks


def zoo() -> Iterator[Network]:
    """The tests' small awkward models, on batches of noise."""
    from zoo import ZOO

    for entry in ZOO:
        inputs = entry.inputs()
        given = {"example_inputs": inputs}
        data = {**given, "calibration": [inputs, *(noise_like(inputs, seed) for seed in range(15))]}
        yield Network(
            entry.name,
            entry.model,
            inputs,
            entry.run,
            ways={"no data": given, "calibrated": data},
            more={
                "no inputs": {},
                "absorbed with data": {**data, "init": "absorb"},
                "tuned": {**data, "init": "tune", "tune_steps": 10},
                "auto groups": {**data, "num_groups": "auto"},
                "unscaled": {**data, "scale": False, "spread": 0.0},
            },
        )


def noise_like(inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Noise of the inputs' shapes, dtypes, memory formats and means, of a spread that changes with the seed."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.5 + 0.25 * (seed % 4)
    return tuple(torch.empty_like(x).normal_(0.0, spread, generator=generator).add_(x.mean()) for x in inputs)


def pretrained() -> Iterator[Network]:
    """The tests' published networks, on at most 64 samples of real data."""
    from pretrained import MODELS, cifar10_train, data, load

    samples: dict[str, Callable[[], list[Any]]] = {
        "cifar10_resnet20": lambda: list(cifar10_train(64)[0].split(32)),
        "cifar10_resnet32": lambda: list(cifar10_train(64)[0].split(32)),
        "cifar10_resnet8": lambda: list(data.cifar10_images("train", 64)[0].split(32)),
        "kws_dscnn": lambda: list(data.speech_commands()[0][32:96].split(32)),
        "vww_mobilenetv1": lambda: list(data.visual_wake_words_stand_in(96)[32:].split(32)),
        "anomaly_autoencoder": lambda: list(data.log_mel_windows()[32:96].split(32)),
        "crepe_tiny": lambda: list(data.pitch_frames()[0][32:96].split(32)),
        "phasenet": lambda: list(data.seismic_phases()[0][4:20].split(4)),
        "gtcrn_dns3": lambda: list(data.noisy_speech()[0][:, :, 48:240].split(48, 2)),
    }
    for name in MODELS:
        inputs = load(name)[1]
        if name == "gtcrn_dns3":  # its recurrences over all 611 frames of the clip take as long as all other networks
            inputs = (inputs[0][:, :, :48],)
        given = {"example_inputs": inputs}
        batches = samples[name]() if name in samples else [inputs]
        yield Network(
            name,
            lambda name=name: load(name)[0],  # type: ignore[misc]
            inputs,
            lambda model, inputs=inputs: model(*inputs),  # type: ignore[misc]
            ways={"no data": given, "calibrated": {**given, "calibration": batches}},
            more={"absorbed with data": {**given, "calibration": batches, "init": "absorb"}},
        )


PARTS: dict[str, Callable[[], Iterator[Network]]] = {"zoo": zoo, "pretrained": pretrained}

# --------------------------------------------------------------------------------------------------- recording


def record(part: str, only: str, fraction: float) -> Items:
    """Return the items of the part's cases, by ``network/recipe/way/…``."""
    import normswap as ns

    items: Items = {}
    with small_made_up_inputs() if part == "zoo" else contextlib.nullcontext():
        for network in PARTS[part]():
            start = time.perf_counter()
            for recipe in ns.all_recipes():
                for way, options in {**network.ways, **(network.more if recipe == "gn+ws" else {})}.items():
                    case = f"{network.name}/{recipe}/{way}"
                    if fnmatchcase(case, only) and zlib.crc32(case.encode()) < fraction * 2**32:
                        export = way == "no data" and recipe in EXPORTED[part]
                        found = record_case(network, recipe, options, export)
                        items |= {f"{case}/{key}": value for key, value in found.items()}
            print(f"{network.name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return items


def record_case(network: Network, recipe: str, options: dict[str, Any], export: bool) -> Items:
    """Return one case's items."""
    import normswap as ns

    torch.manual_seed(0)
    items: Items = {}
    converted = None
    with errors_in(items, "convert"):
        converted = ns.convert(network.make(), recipe, **options)
    if converted is None:
        with errors_in(items, "plan"):
            data = {name: options[name] for name in ("example_inputs", "calibration") if name in options}
            items["plan"] = plan_of(ns.plan(network.make(), recipe, **data).to_json())
        return items
    items["plan"] = plan_of(converted.plan.to_json())
    items["init"] = init_of(converted.init.to_json())
    items |= state("state", converted.model)
    with errors_in(items, "output"):
        items |= outputs("output", network.run(converted.model))
    folded = None
    with errors_in(items, "folded"):
        folded = ns.fold(converted.model.eval(), example_inputs=network.inputs)
        items |= state("folded", folded)
        items |= outputs("folded output", network.run(folded))
    if export and folded is not None:
        with errors_in(items, "onnx"), tempfile.TemporaryDirectory() as folder:
            path, batched = Path(folder) / "model.onnx", len({len(x) for x in network.inputs}) == 1
            artifact = ns.export_onnx(folded, path, example_inputs=network.inputs, dynamic_batch=batched)
            items["onnx"] = dict(artifact.ops)
            items |= outputs("onnx output", run_onnx(artifact.path, network.inputs))
    return items


@contextlib.contextmanager
def errors_in(items: Items, stage: str) -> Iterator[None]:
    """Without gradients; an error becomes the item ``stage error``: its class and its code, if it has one."""
    try:
        with torch.no_grad():
            yield
    except Exception as error:
        code = getattr(error, "code", None)
        items[f"{stage} error"] = [type(error).__name__, code if isinstance(code, str) else None]


def small_made_up_inputs() -> contextlib.AbstractContextManager[Any]:
    """Let inputs that normswap makes up be as small as the zoo's own, as the tests do."""
    for name in INPUTS_MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            if hasattr(importlib.import_module(name), "_SIDES"):
                return mock.patch.dict(f"{name}._SIDES", {1: (12,), 2: (8,), 3: (6,)})
    sys.exit(f"no _SIDES in {' or '.join(INPUTS_MODULES)}: name the module that has the sizes of made-up inputs")


def run_onnx(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What onnxruntime gives, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = zip(session.get_inputs(), inputs, strict=True)
    return [torch.from_numpy(np.array(y)) for y in session.run(None, {x.name: value.numpy() for x, value in feeds})]


# ------------------------------------------------------------------------------------------ what becomes an item


def tensor_item(tensor: Tensor) -> dict[str, Any]:
    """The digest of dtype, shape and bytes, and a summary in floats."""
    flat = tensor.detach().cpu().contiguous().flatten()
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    digest = hashlib.sha256(kind.encode() + flat.view(torch.uint8).numpy().tobytes()).hexdigest()
    size = flat.double().abs()
    return {"sha": digest, "is": kind, "sum": float(size.sum()), "max": float(size.max()) if len(size) else 0.0}


def state(stage: str, model: nn.Module) -> Items:
    """The state dict: its keys in order, and an item for each value."""
    values = model.state_dict()
    named = {k: tensor_item(v) if isinstance(v, Tensor) else repr(v) for k, v in values.items()}
    return {f"{stage} keys": list(named), **{f"{stage} {k}": item for k, item in named.items()}}


def outputs(stage: str, output: Any) -> Items:
    """An item for each tensor of an output."""
    from zoo import leaves

    return {f"{stage} {i}": tensor_item(tensor) for i, tensor in enumerate(leaves(output))}


def plan_of(text: str) -> dict[str, Any]:
    """What a plan decides: of its JSON, which may gain fields, those that every version has."""
    plan = json.loads(text)
    steps = [
        [*(step.get("site", step)[key] for key in ("norm", "layer")), step["weight"], step["norm"], step["num_groups"]]
        for step in plan["steps"]
    ]
    return {"steps": steps, "skips": [[skip["name"], skip["what"], skip["code"]] for skip in plan["skips"]]}


def init_of(text: str) -> dict[str, Any]:
    """The report of an initialization: its rows with the floats of what is nested in them, whatever its name."""
    report = json.loads(text)
    return {
        "method": report["method"],
        "rows": [[row["name"], row["method"], row["notes"], *floats_in(row.values())] for row in report["rows"]],
        "assumptions": (report["assumptions"] if "assumptions" in report else report["notes"]),
        "agreement": floats_in(report.values()),
    }


def floats_in(values: Iterable[Any]) -> list[float]:
    """The floats of the dicts among ``values``, in order."""
    return [x for value in values if isinstance(value, dict) for x in value.values() if isinstance(x, float)]


# --------------------------------------------------------------------------------------------------- comparing


def compare(before: dict[str, Any], after: dict[str, Any], common: bool) -> int:
    """Print what differs between two records; return how many items do."""
    for key in before["about"].keys() & after["about"].keys() - {"tree", "seconds"}:
        if before["about"][key] != after["about"][key]:
            print(f"recorded under another {key}: {before['about'][key]} and {after['about'][key]}")
    a, b = before["items"], after["items"]
    cases = {case_of(key) for key in a}, {case_of(key) for key in b}
    if common:
        a, b = ({k: v for k, v in items.items() if case_of(k) in cases[0] & cases[1]} for items in (a, b))
    keys = list({**a, **b})
    different = Counter[str]()
    for key in keys:
        if key not in a or key not in b:
            change = f"only in the {'second' if key in b else 'first'} record: {shorten(b.get(key, a.get(key)))}"
        elif json.dumps(a[key]) == json.dumps(b[key]):  # NaN equals NaN there
            continue
        else:
            change = difference(a[key], b[key])
        print(f"{key}: {change}")
        different[key.split("/", 3)[3].split(" ")[0]] += 1
    number = sum(different.values())
    print(f"{len(cases[0])} and {len(cases[1])} cases; {len(keys) - number} of {len(keys)} items are identical", end="")
    print("".join(f", {count} {kind} differ" for kind, count in different.most_common()))
    return number


def case_of(key: str) -> str:
    """The case that an item belongs to."""
    return "/".join(key.split("/", 3)[:3])


def difference(a: Any, b: Any) -> str:
    """How two values of an item differ, and by how much."""
    if isinstance(a, dict) and isinstance(b, dict) and "sha" in a and "sha" in b:
        if a["is"] != b["is"]:
            return f"{a['is']} → {b['is']}"
        return f"{a['is']}, sum |x| {relative(a['sum'], b['sum'])}, max |x| {relative(a['max'], b['max'])}"
    pairs = list(zip(parts(a), parts(b), strict=False))
    changed = [(x, y) for x, y in pairs if json.dumps(x) != json.dumps(y)]
    numbers = [(x, y) for x, y in changed if isinstance(x, float) and isinstance(y, float)]
    if numbers and numbers == changed and len(parts(a)) == len(parts(b)):
        largest = max(numbers, key=lambda pair: abs(pair[1] - pair[0]))
        return f"{len(numbers)} of {len(pairs)} values, the most {relative(*largest)}"
    return f"{shorten([x for x, _ in changed] or a)} → {shorten([y for _, y in changed] or b)}"


def relative(a: float, b: float) -> str:
    """A change of a number, and its share."""
    if a == b:
        return f"{a:g} (the same)"
    return f"{a:.9g} → {b:.9g} ({abs(b - a) / max(abs(a), 1e-300):.1e})"


def parts(value: Any) -> list[Any]:
    """The numbers and texts of a nested value, in order."""
    if isinstance(value, dict):
        return [part for key, item in value.items() for part in (key, *parts(item))]
    return [part for item in value for part in parts(item)] if isinstance(value, list) else [value]


def shorten(value: Any, length: int = 100) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else f"{text[:length]}…"


# -------------------------------------------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("record")
    command.add_argument("file", type=Path)
    command.add_argument("--part", choices=list(PARTS), default="zoo")
    command.add_argument("--tree", type=Path, default=Path(__file__).parent.parent, help="the repository to record")
    command.add_argument("--only", default="*", help="a glob of cases: 'chain/gn+ws/*'")
    command.add_argument("--fraction", type=float, default=1.0, help="the share of cases, always the same ones")
    command = commands.add_parser("compare")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command.add_argument("--common", action="store_true", help="leave out cases that only one of the records has")
    given = parser.parse_args()
    if given.command == "compare":
        before, after = (json.loads(path.read_text()) for path in (given.before, given.after))
        sys.exit(1 if compare(before, after, given.common) else 0)
    tree = given.tree.resolve()
    sys.path[:0] = [str(tree), str(tree / "tests")]
    import normswap

    if tree not in Path(normswap.__file__).parents:
        sys.exit(f"normswap comes from {normswap.__file__}, not from {tree}")
    torch.set_num_threads(1)
    start = time.perf_counter()
    items = record(given.part, given.only, given.fraction)
    about = {
        "tree": str(tree),
        "seconds": round(time.perf_counter() - start),
        "part": given.part,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    given.file.write_text(json.dumps({"about": about, "items": items}, indent=0, ensure_ascii=False))
    print(f"{given.file}: {len({case_of(key) for key in items})} cases, {len(items)} items in {about['seconds']} s")


if __name__ == "__main__":
    main()
