"""Where the numbers of a run are shown as it trains: TensorBoard where it is installed, W&B where it is asked for.

A run is worth more than its curves: a board that fails is left out, which is said, and the training goes on.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fused_nce.train import config
from fused_nce.train.files import one_line, write_text
from fused_nce.train.method import Method
from fused_nce.train.settings import RunConfig

log = logging.getLogger("fused_nce")

WANDB_ID = "wandb_id"  # in a run's folder: the run of the project that it is, so that a resumed one goes on in it


class TensorBoard:
    """Events in `RUN/tensorboard`; those after `step` are void."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def add(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of a project; what one that went back logs again has the same numbers, and W&B drops it."""

    name = "W&B"

    def __init__(self, run_dir: Path, project: str, settings: dict[str, Any]) -> None:
        import wandb

        file = run_dir / WANDB_ID
        if not file.exists():
            write_text(file, secrets.token_hex(8))
        self.run: Any = wandb.init(
            project=project, id=file.read_text(encoding="utf-8"), name=run_dir.resolve().name, dir=str(run_dir),
            config=settings, resume="allow",
            settings=wandb.Settings(console="off"),  # the terminal is the run's own
        )  # fmt: skip

    def add(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def check(run: RunConfig) -> None:
    """Refuse what is asked for by name and is not installed.

    Raises:
        ValueError: naming the setting.
    """
    if run.wandb is not None and find_spec("wandb") is None:
        raise ValueError(f"run.wandb: must be null without wandb (pip install wandb), got {run.wandb}")


class Boards:
    """Those of a run, each until it fails.

    Args:
        run_dir: folder of the run.
        step: that a resumed run continues from.
        settings: say which; W&B shows them beside the numbers.
    """

    def __init__(self, run_dir: Path, step: int, settings: Method) -> None:
        run, shown = settings.run, config.to_dict(settings)
        self.open: list[Any] = []
        self.failed: list[Any] = []
        if run.tensorboard and find_spec("tensorboard") is not None:
            self._try(lambda: self.open.append(TensorBoard(run_dir, step)), "TensorBoard: no events are written")
        if (project := run.wandb) is not None:
            self._try(lambda: self.open.append(WeightsAndBiases(run_dir, project, shown)), "W&B: nothing is logged")

    def add(self, values: dict[str, float], step: int) -> None:
        """The numbers of a step."""
        for board in list(self.open):
            words = f"{board.name}: no more events are written"
            if not self._try(lambda board=board: board.add(values, step), words):  # type: ignore[misc]
                self.open.remove(board)
                self.failed.append(board)

    def close(self) -> None:
        """Flush everything."""
        for board in self.open:
            self._try(board.close, f"{board.name}: the last events are lost", "")
        for board in self.failed:  # at the end: one may wait for a service that is gone
            with suppress(Exception):  # that was said
                board.close()

    def _try(self, action: Callable[[], Any], otherwise: str, then: str = "; training goes on") -> bool:
        try:
            action()
        except Exception as error:  # of a writer's own thread, of a service
            log.warning("%s (%s)%s", otherwise, one_line(str(error)), then)
            return False
        return True
