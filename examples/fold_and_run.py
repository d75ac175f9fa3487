"""Swap, fold, export, and run the file in onnxruntime; compare accuracy and outputs at every stage.

python examples/fold_and_run.py                  # the file goes to a temporary folder
python examples/fold_and_run.py digits.onnx
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from torch.nn.utils import parametrize

import normswap as ns
from normswap.demo.data import load_calibration, load_digits, load_network


def main(path: Path) -> None:
    """Take the demo network from BatchNorm to an ONNX file with group norms."""
    images, labels = load_digits()

    def top1(logits: torch.Tensor) -> str:
        return f"{100 * (logits.argmax(1) == labels).float().mean().item():.1f} %"

    model = load_network()
    with torch.no_grad():
        print("BatchNorm           ", top1(model(images)))
        model = ns.swap_norms(model, to="gn+ws", calibration=load_calibration())
        print("swapped for gn+ws   ", top1(model(images)), "  (this is the model to fine-tune)")
        deploy = ns.fold(model, example_inputs=images)
        print("folded              ", top1(deploy(images)))

    weights = sum(parametrize.is_parametrized(module) for module in model.modules())
    left = sum(parametrize.is_parametrized(module) for module in deploy.modules())
    print(f"parametrized layers   {weights} before folding, {left} after")
    print(f"folded against swapped: {ns.verify(model, deploy, images).max_rel:.1e} of the output's magnitude\n")

    artifact = ns.export_onnx(deploy, path, example_inputs=images[:2])
    print(artifact, "\n")

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    start = time.perf_counter()
    (logits,) = session.run(None, {artifact.inputs[0].name: images.numpy()})
    seconds = time.perf_counter() - start
    print("onnxruntime         ", top1(torch.from_numpy(logits)), f"  {len(images)} digits in {seconds:.3f} s")
    ns.verify(deploy, path, (images,)).raise_if_failed()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "digits.onnx")
