"""SimCLR on scikit-learn's digits in a loop of your own, under Lightning Fabric.

    pip install ".[train]" lightning
    python examples/fabric.py --devices 2     # two processes; each image's negatives are those of both

The loss knows nothing of Fabric: `group="world"` is all that it needs to take the negatives of every process.
"""

import argparse

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

from fused_nce.losses import NTXentLoss
from fused_nce.models import SimCLR
from fused_nce.train.data.augment import Normalise, Views
from fused_nce.train.data.images import load_split
from fused_nce.train.evaluation.knn import knn_predict
from fused_nce.train.settings import AugmentConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    fabric = Fabric(accelerator="cpu", devices=options.devices)
    fabric.launch()
    fabric.seed_everything(0)
    group = "world" if fabric.world_size > 1 else None
    model = SimCLR(backbone="mini", dim=64, loss=NTXentLoss(temperature=0.5, group=group))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=1e-3))

    train, test = (load_split("digits", split, 16) for split in ("train", "test"))
    augment = AugmentConfig(geometry="affine", flip_p=0.0)
    views = Views(augment, 16)
    batch = 128 // fabric.world_size
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(train.images), batch, shuffle=True, drop_last=True))
    for epoch in range(options.epochs):
        losses = []
        for (images,) in loader:
            out = model(views(images))
            optimizer.zero_grad()
            fabric.backward(out.loss)
            optimizer.step()
            losses.append(out.loss.detach())
        fabric.print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.3f}")

    if fabric.is_global_zero:
        encoder, normalise = model.module.eval(), Normalise(augment)
        with torch.no_grad():
            bank, queries = (encoder.encode(normalise(split.images))["h"] for split in (train, test))
        right = knn_predict(bank, train.labels, queries) == test.labels
        print(f"kNN accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
