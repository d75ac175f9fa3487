"""Convert a timm model: print the plan, convert, save, load, fold.

pip install timm
python examples/convert_timm.py                    # resnet10t, random weights, nothing is downloaded
python examples/convert_timm.py resnet18 --pretrained
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

import normswap as ns
from normswap.loading.importing import import_quietly

try:
    timm = import_quietly("timm")  # as `import timm`, and works beside a torchvision that was built for another torch
except ImportError as cause:
    sys.exit(print(f"skipped: this example needs timm (pip install timm): {cause}"))


def main() -> None:
    """Convert the model that the command line names."""
    parser = argparse.ArgumentParser(description="Convert a timm model.")
    parser.add_argument("name", nargs="?", default="resnet10t", help="timm's name of the model")
    parser.add_argument("--to", default="gn+ws", help=f"the recipe: {', '.join(ns.all_recipes())}")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument("--size", type=int, default=96, help="height and width of the example images")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    def build() -> torch.nn.Module:
        return timm.create_model(arguments.name, pretrained=arguments.pretrained)

    model = build()
    x = torch.randn(4, 3, arguments.size, arguments.size)
    if not arguments.pretrained:
        with torch.no_grad():
            model.train()(x)  # so that the running statistics say something
    model.eval()

    print(ns.plan(model, to=arguments.to, example_inputs=(x,)), "\n")
    start = time.perf_counter()
    conversion = ns.convert(model, to=arguments.to, example_inputs=(x,))
    print(f"converted in {time.perf_counter() - start:.1f} s")
    if conversion.check is not None:  # the recipe is exact, so it must have kept the outputs
        print(f"  the outputs moved by {conversion.check.max_rel:.0e} of their magnitude")
    for note in conversion.init.notes:
        print(f"  note: {note}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        ns.save(conversion.model, path)
        loaded = ns.load(path, model=build()).eval()
        check = ns.verify(conversion.model, loaded, (x,))
        print(f"saved ({path.stat().st_size / 1e6:.1f} MB) and loaded: outputs differ by {check.max_rel:.0e}")

    folding = ns.fold_with_report(conversion.model, example_inputs=(x,))
    check = ns.verify(conversion.model, folding.model, (x,))
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, conversion.model, folding.model)]
    print(f"folded {len(folding.rows)} parts, {len(folding.left)} left: outputs differ by {check.max_rel:.0e}")
    print("parameters: {:,} with BatchNorm, {:,} converted, {:,} folded".format(*counts))


if __name__ == "__main__":
    main()
