"""Fine-tuning a pruned network with its memory bank in Lightning: `python examples/lightning_ekg.py [EPOCHS]`.

Needs `pip install pytorch-lightning`. Only two things are particular to ekgfx: the batches hold the samples' indices,
and the loss is `ekgfx.EKGLoss`.
"""

import sys

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.models import digits_cnn


class Guided(lightning.LightningModule):
    """A pruned network, and the bank of its interim sub-networks that teaches it."""

    def __init__(self, network: nn.Module, bank: ekgfx.Bank, lr: float = 0.02) -> None:
        super().__init__()
        self.network = network.train()  # Lightning leaves a module in the mode in which it finds it
        self.loss, self.lr = ekgfx.EKGLoss(bank), lr

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        views, labels, index = batch  # views × batch × channels × height × width; batch; batch
        outputs = self.network(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        loss = self.loss(outputs, labels, index)
        self.log("loss", loss, batch_size=len(labels), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> None:
        images, labels, _index = batch
        right = (self.network(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, nesterov=True)


class NextEpoch(lightning.Callback):
    """Every epoch draws its own order and augmentation."""

    def __init__(self, loader: object) -> None:
        self.loader = loader

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.loader.set_epoch(trainer.current_epoch)


def main(epochs: int = 5) -> float:
    """Prune the digits network to 60% of its MACs and fine-tune it; returns the accuracy on the test split."""
    torch.manual_seed(0)
    data = ekgfx.data.load("digits", classes=10)
    network = digits_cnn()
    ekgfx.finetune(network, data, epochs=5, batch_size=64, lr=0.05)

    traced = ekgfx.trace(network, torch.zeros(2, 1, 8, 8))
    _, chosen = data.search_subset(0, 32, seed=0)
    result = ekgfx.search(traced, list(data.loader("train", 64, subset=chosen)), flops=0.6)
    pruned = ekgfx.prune(network, result.plan, traced)
    bank = ekgfx.build_bank(traced, result, data.loader("train", 256), teachers=3)

    loader = data.loader("train", 64, shuffle=True, augment=True, views=2)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[NextEpoch(loader)],
    )
    trainer.fit(Guided(pruned, bank), loader, data.loader("test", 256))
    return float(trainer.callback_metrics["accuracy"])


if __name__ == "__main__":
    print(f"accuracy {100 * main(*map(int, sys.argv[1:])):.2f}%")
