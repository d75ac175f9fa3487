"""Train with differential privacy: Opacus on a network whose BatchNorms are swapped.

    pip install opacus
    python examples/private_training.py

BatchNorm mixes the samples of a batch, so no gradient belongs to one sample and Opacus refuses it. Of the recipes,
those that look at one sample at a time can be trained privately (``gn``, ``gn+ws``, ``gn+aws``, ``ln``), and so can
those without any norm (``wn``, ``none``).

DO NOT use ``wn+mobn`` or ``mobn``: mean-only BatchNorm takes the mean over the batch, and so every sample's output
depends on all the others. Opacus refuses to wrap it, but ``ModuleValidator`` does not know the module and lets it pass.
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap as ns
from normswap.demo.data import load_calibration, load_digits, load_network

try:
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator
except ImportError:
    sys.exit(print("skipped: this example needs Opacus (pip install opacus)"))

# What Opacus says on each run: that this noise is not drawn by a cryptographic generator (secure_mode=True, which a
# real private training needs), and that images need no gradient.
warnings.filterwarnings("ignore", message="Secure RNG turned off|Full backward hook is firing")

DELTA = 1e-3  # less than one in the number of samples


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 in percent."""
    with torch.no_grad():
        return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def gradients_one_by_one(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return each sample's gradients, (samples, …) by parameter, out of one backward pass per sample."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameters)
        for x, y in zip(images, labels, strict=True)
    ]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def train_privately(recipe: str) -> None:
    """Swap, take one epoch of private steps on the digits that the network has not seen, and print what came out."""
    images, labels = load_digits()
    # Calibration reads data without any privacy, so it must be public; these digits belong to nobody who trains here.
    model = ns.swap_norms(load_network(), to=recipe, calibration=load_calibration()).train()
    if errors := ModuleValidator.validate(model):
        raise SystemExit(f"{recipe}: {errors[0]}")
    expected = gradients_one_by_one(model, images[:8], labels[:8])

    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=DataLoader(TensorDataset(images[:450], labels[:450]), batch_size=50),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="hooks",  # reads the parametrizations' gradients through functorch
    )
    F.cross_entropy(private(images[:8]), labels[:8]).backward()
    worst = max(
        ((p.grad_sample - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-12)).item()
        for name, p in model.named_parameters()
    )
    optimizer.zero_grad()

    before = accuracy(model, images[450:], labels[450:])
    private.train()
    for x, y in loader:
        loss = F.cross_entropy(private(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = accuracy(model, images[450:], labels[450:])
    print(f"{recipe:8}{len(loader)} private steps, ε = {engine.get_epsilon(DELTA):.1f} at δ = {DELTA}")
    print(f"{'':8}top-1 {before:.1f} % before, {after:.1f} % after")
    print(f"{'':8}per-sample gradients differ from one backward pass per sample by {worst:.0e}")
    check = ns.verify(model.eval(), ns.fold(model), images)
    print(f"{'':8}folded for deployment: the output moved by {check.max_rel:.0e}")


def main() -> None:
    """Train three recipes privately, and show what Opacus says of the two kinds of BatchNorm."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"BatchNorm  {type(ModuleValidator.validate(load_network().train())[0]).__name__} from ModuleValidator")
    for recipe in ("gn+ws", "ln", "wn"):
        train_privately(recipe)
    mean_only = ns.swap_norms(load_network(), to="wn+mobn").train()
    try:
        PrivacyEngine().make_private(
            module=mean_only,
            optimizer=torch.optim.SGD(mean_only.parameters(), lr=0.05),
            data_loader=DataLoader(TensorDataset(*load_digits()), batch_size=50),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    except NotImplementedError:
        print("wn+mobn is refused by make_private, rightly: a batch mean is no private function. Take wn instead.")


if __name__ == "__main__":
    main()
