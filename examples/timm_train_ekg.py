"""timm's own training script on a pruned network, taught by the run's memory bank.

    git clone https://github.com/huggingface/pytorch-image-models
    python examples/timm_train_ekg.py RUN pytorch-image-models/train.py --data-dir images --epochs 30 --lr 0.05

RUN is a run of a timm model on `folder:images` (its bank holds what the teachers say of images/train). The script gets
`--model local-dir:RUN/timm --pretrained`; the other arguments are its own, and work as ever, but for those that choose
another loss than the script's usual one: `--smoothing` must stay above 0, and images cannot be mixed (mixup, cutmix),
since a mixed image has no row in the bank.

The script calls its loss with outputs and targets alone. So the training set gives targets that hold the label and the
sample's index in one number, and the loss takes them apart. It is timm's own class that learns to, so that scripts that
name it and scripts that have timm.task make it are served alike.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.data
import torch
from timm.loss import LabelSmoothingCrossEntropy
from torch import Tensor, nn
from torch.utils.data import Dataset

import ekgfx
import ekgfx.hub  # teaches timm the architecture of pruned models
from ekgfx.bank import Bank

UNFIT = {"--mixup", "--cutmix", "--cutmix-minmax", "--aug-splits", "--jsd-loss", "--bce-loss", "--loss"}
"""Options of the script that mix images or take another loss."""


class Indexed(Dataset):
    """A data set with targets label + classes · index. A class of this module, not made in a function, since worker
    processes that are spawned, as on macOS and Windows, get it pickled."""

    def __init__(self, dataset: Any, classes: int) -> None:
        self.dataset, self.classes = dataset, classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[index]
        return image, label + self.classes * index

    @property
    def transform(self) -> Any:
        """timm's loader sets it."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


def guided(bank: Bank, classes: int) -> Callable[[LabelSmoothingCrossEntropy, Tensor, Tensor], Tensor]:
    """The new `forward` of timm's loss: label loss and the bank's guidance (eq. 11), for one view."""

    def forward(self: LabelSmoothingCrossEntropy, output: Tensor, target: Tensor) -> Tensor:
        loss = ekgfx.EKGLoss(bank, loss=nn.CrossEntropyLoss(label_smoothing=self.smoothing))
        return loss([output], target % classes, torch.div(target, classes, rounding_mode="floor"))

    return forward


def main(run: Path, script: Path, arguments: list[str]) -> None:
    """Run the training script with the run's pruned model and bank."""
    given = {argument.partition("=")[0] for argument in arguments}
    if unfit := sorted(given & UNFIT):
        sys.exit(f"{', '.join(unfit)}: not with a memory bank, which knows images one by one, through the usual loss")
    ekgfx.hub.save(run, run / "timm")
    bank, classes = Bank.open(run / "bank"), ekgfx.load(run).num_classes
    create = timm.data.create_dataset

    def create_dataset(*positional: Any, is_training: bool = False, **named: Any) -> Any:
        dataset = create(*positional, is_training=is_training, **named)
        return Indexed(dataset, classes) if is_training else dataset

    timm.data.create_dataset = create_dataset
    LabelSmoothingCrossEntropy.forward = guided(bank, classes)
    sys.argv = [str(script), "--model", f"local-dir:{run / 'timm'}", "--pretrained", *arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    import timm_train_ekg  # under its own name, by which workers find Indexed: `__main__` is soon timm's script

    timm_train_ekg.main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
