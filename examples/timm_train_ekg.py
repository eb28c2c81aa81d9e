"""timm's own training script on a pruned network, taught by the run's memory bank.

    git clone https://github.com/huggingface/pytorch-image-models
    python examples/timm_train_ekg.py RUN pytorch-image-models/train.py --data-dir images --epochs 30 --lr 0.05

RUN is a run of a timm model on `folder:images` (its bank holds what the teachers say of images/train). The script gets
`--model local-dir:RUN/timm --pretrained`; the other arguments are its own, and work as ever, but for what mixes images
(mixup, cutmix), since a mixed image has no row in the bank.

The script calls its loss with outputs and targets alone. So the training set gives targets that hold the label and the
sample's index in one number, and the loss takes them apart.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import timm.data
import timm.loss
import torch
from torch import Tensor, nn

import ekgfx
import ekgfx.hub  # teaches timm the architecture of pruned models
from ekgfx.bank import Bank


def indexed(dataset: Any, classes: int) -> Any:
    """The same data set with targets label + classes · index."""

    class Indexed(type(dataset)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> tuple[Any, int]:
            image, label = super().__getitem__(index)
            return image, label + classes * index

    dataset.__class__ = Indexed
    return dataset


class Guided(nn.Module):
    """Stands in for timm's LabelSmoothingCrossEntropy: label loss and the bank's guidance (eq. 11), for one view."""

    def __init__(self, bank: Bank, classes: int, smoothing: float = 0.1) -> None:
        super().__init__()
        self.classes = classes
        self.loss = ekgfx.EKGLoss(bank, loss=nn.CrossEntropyLoss(label_smoothing=smoothing))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        index = torch.div(target, self.classes, rounding_mode="floor")
        return self.loss([output], target % self.classes, index)


def main(run: Path, script: Path, arguments: list[str]) -> None:
    """Run the training script with the run's pruned model and bank."""
    ekgfx.hub.save(run, run / "timm")
    bank, classes = Bank.open(run / "bank"), ekgfx.load(run).num_classes
    create = timm.data.create_dataset

    def create_dataset(*positional: Any, is_training: bool = False, **named: Any) -> Any:
        dataset = create(*positional, is_training=is_training, **named)
        return indexed(dataset, classes) if is_training else dataset

    timm.data.create_dataset = create_dataset
    timm.loss.LabelSmoothingCrossEntropy = lambda smoothing=0.1: Guided(bank, classes, smoothing)
    sys.argv = [str(script), "--model", f"local-dir:{run / 'timm'}", "--pretrained", *arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
