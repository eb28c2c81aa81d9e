"""`--tensorboard` and `--wandb`: the figures that the terminal shows, also for those who watch trainings elsewhere."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from ekgfx.cli.progress import Terminal
from ekgfx.errors import RecipeError
from ekgfx.search import Step
from ekgfx.training.keeping import Epoch

FOLDER = "tensorboard"


class Logging(Terminal, ABC):
    """A `Terminal` that also logs scalars, as STAGE/NAME by step or epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._stage = ""

    @abstractmethod
    def scalars(self, number: int, values: dict[str, float]) -> None:
        """Logs values by name; number: of the step or epoch."""

    @abstractmethod
    def close(self) -> None:
        """What was logged is complete."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.close()

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
            val_loss=epoch.val_loss,
            val_accuracy=epoch.val_accuracy,
            test_loss=epoch.test_loss,
            test_accuracy=epoch.test_accuracy,
            seconds=epoch.seconds,
        )

    def _log(self, number: int, beside: str = "", **values: float | None) -> None:
        stage = f"{self._stage}{beside}"
        self.scalars(number, {f"{stage}/{name}": value for name, value in values.items() if value is not None})


class TensorBoard(Logging):
    """Logs to the run's folder `tensorboard`. A run that goes on adds a file there; TensorBoard shows them as one."""

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RecipeError(
                "--tensorboard needs the package tensorboard, which is not here: pip install tensorboard"
            ) from error
        super().__init__()
        # Made with the first figure: a job that fails before leaves nothing behind.
        self._writer = cache(lambda: SummaryWriter(str(run / FOLDER)))

    def scalars(self, number: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer().add_scalar(name, value, number)
        self._writer().flush()

    def close(self) -> None:
        if self._writer.cache_info().currsize:
            self._writer().close()


class WandB(Logging):
    """Logs to Weights & Biases, as the project `ekgfx` (WANDB_PROJECT names another) and a run of the run's name. A
    stage counts its own steps or epochs."""

    def __init__(self, run: Path) -> None:
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise RecipeError("--wandb needs the package wandb, which is not here: pip install wandb") from error
        super().__init__()
        name = run.resolve().name

        def started() -> Any:
            project = os.environ.get("WANDB_PROJECT", "ekgfx")
            return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(run))

        self._run = cache(started)

    def scalars(self, number: int, values: dict[str, float]) -> None:
        self._run().log({**values, f"{self._stage}/number": number})

    def close(self) -> None:
        if self._run.cache_info().currsize:
            self._run().finish()


LOGGERS: dict[str, Callable[[Path], Logging]] = {"tensorboard": TensorBoard, "wandb": WandB}
