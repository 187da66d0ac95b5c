"""SimCLR on scikit-learn's digits under Hugging Face's `Trainer`.

    pip install ".[train]" transformers
    python examples/hf_trainer.py
    torchrun --nproc-per-node 2 examples/hf_trainer.py     # or accelerate launch: the negatives of both processes

`Trainer` passes a batch by keyword and minimises `loss` of the dict that it is given; nothing else is asked of a model.
"""

import argparse
import os
import tempfile

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fused_nce.losses import NTXentLoss
from fused_nce.models import SimCLR
from fused_nce.train.data.augment import Normalise, Views
from fused_nce.train.data.images import load_split
from fused_nce.train.evaluation.knn import knn_predict
from fused_nce.train.settings import AugmentConfig

AUGMENT = AugmentConfig(geometry="affine", flip_p=0.0)


class TwoViews(nn.Module):
    """Images to the loss of two views of them."""

    def __init__(self, model: SimCLR) -> None:
        super().__init__()
        self.model, self.views = model, Views(AUGMENT, 16)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(self.views(images)).loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = SimCLR(backbone="mini", dim=64, loss=NTXentLoss(temperature=0.5, group="world" if world > 1 else None))
    train, test = (load_split("digits", split, 16) for split in ("train", "test"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=options.epochs, per_device_train_batch_size=128 // world,
            dataloader_drop_last=True, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=7,
            save_strategy="no", report_to="none", use_cpu=True, ddp_find_unused_parameters=False,
        )  # fmt: skip
        trainer = Trainer(TwoViews(model), arguments, train_dataset=[{"images": image} for image in train.images])
        trainer.train()

    if trainer.is_world_process_zero():
        normalise = Normalise(AUGMENT)
        model.eval()
        with torch.no_grad():
            bank, queries = (model.encode(normalise(split.images))["h"] for split in (train, test))
        right = knn_predict(bank, train.labels, queries) == test.labels
        print(f"kNN accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
