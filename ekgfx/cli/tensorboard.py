"""`--tensorboard`: the figures that the terminal shows, as scalars for TensorBoard too."""

from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from ekgfx.cli.progress import Terminal
from ekgfx.errors import RecipeError
from ekgfx.search import Step
from ekgfx.training.finetune import Epoch

FOLDER = "tensorboard"


class TensorBoard(Terminal):
    """A `Terminal` that also logs to `folder`. A run that goes on adds a file there; TensorBoard shows them as one."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RecipeError(
                "--tensorboard needs the package tensorboard, which is not here: pip install 'ekgfx[tensorboard]'"
            ) from error
        super().__init__()
        self._stage = ""
        # Made with the first figure: a job that fails before leaves nothing behind.
        self._writer = cache(lambda: SummaryWriter(str(folder)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._writer.cache_info().currsize:
            self._writer().close()

    def stage(self, title: str) -> None:
        super().stage(title)
        self._stage = title.replace(" ", "-")

    def step(self, step: Step, keep: float) -> None:
        super().step(step, keep)
        measure = step.measure
        self._log(
            step.number,
            "" if step.towards is None else f"-{step.towards}",
            loss=measure.loss,
            reward=measure.reward,
            accuracy=measure.accuracy,
            kept_fraction=step.kept_fraction,
            MACs=measure.macs,
            parameters=measure.params,
            candidates=len(step.candidates),
            seconds=step.seconds,
        )

    def epoch(self, epoch: Epoch, epochs: int) -> None:
        super().epoch(epoch, epochs)
        self._log(
            epoch.number,
            loss=epoch.loss,
            lr=epoch.lr,
            test_loss=epoch.test_loss,
            test_accuracy=epoch.test_accuracy,
            seconds=epoch.seconds,
        )

    def _log(self, number: int, beside: str = "", **values: Any) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer().add_scalar(f"{self._stage}{beside}/{name}", value, number)
        self._writer().flush()
