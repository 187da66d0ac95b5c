"""The training loop: one process or many (DDP), resumable to the bit, and safe to interrupt."""

import functools
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from fused_nce import GradientCache
from fused_nce.train import config as config_module
from fused_nce.train import optim, scale, words
from fused_nce.train.evaluation import features
from fused_nce.train.files import one_line, settle
from fused_nce.train.machine import host, threads
from fused_nce.train.machine.interrupt import Interrupt
from fused_nce.train.method import Method
from fused_nce.train.monitor import boards, journal
from fused_nce.train.monitor.online_probes import OnlineProbes
from fused_nce.train.monitor.profile import Profile, part
from fused_nce.train.monitor.window import Window
from fused_nce.train.rehearsal import rehearse, trainable
from fused_nce.train.saving import checkpoint, resumed, saves, sharding, trained_on
from fused_nce.train.step import Kept, LossTimer, Meter, TrainStep, gradient_norm, memory_names

log = logging.getLogger("fused_nce")

MAX_SKIPPED_IN_A_ROW = 3
BROKEN = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Timed out", re.I)  # collectives, in torch's words


class Diverged(RuntimeError):
    """The loss was not finite for more updates in a row than can be skipped, or for all updates of a run."""


class Trainer:
    """Trains the model of a configuration, and writes log and checkpoints to a folder.

    Args:
        config: settings.
        run_dir: folder of the run; it holds the configuration already.
        resume: continue from the newest whole checkpoint of the folder.
        other_data: the data may differ from those that the checkpoint knows.
        profile: stop after a few updates, and keep in `profile` where their time went.

    Raises:
        ValueError: for settings or data that cannot be used, a model that cannot be trained or saved, or a resume
            without a checkpoint.
    """

    def __init__(
        self, config: Method, run_dir: Path, *, resume: bool = False, other_data: bool = False, profile: bool = False
    ) -> None:
        config.check()
        boards.check(config.run)
        self.asked = self.config = config
        self.run_dir = run_dir
        self.threads = threads.Threads(config.run.threads)
        # Precision is the step's own (see TrainStep): accelerate's wrapper is a setting of the whole process.
        with host.own_settings():
            self.accelerator = Accelerator(
                cpu=not torch.accelerator.is_available(),  # without this it ignores torchrun where there is no GPU
                mixed_precision="no",
                gradient_accumulation_steps=config.optim.accumulate,
                kwargs_handlers=scale.handlers(config),
            )
        self.device = self.accelerator.device
        self.bf16 = host.use_bf16(config.precision, self.device)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        path = checkpoint.newest(run_dir) if resume else None
        state = checkpoint.load_state(path) if path else {}
        self.other_optimizer = resumed.other_optimizer(run_dir, config, state) if path else ""
        self._same_settings(state.get("step", 0))
        if state:
            self.config = config = resumed.for_processes(config, state, world)
        self.environment = resumed.environment(state, world)  # now: the code may change while it runs
        self.loader = config.open_loader(rank, world)
        log.info("%s", self.loader.account)
        self.views = config.make_views()
        self.data = trained_on.facts(self.loader, config.beside_data())
        self.end = optim.updates(config.optim, self.loader.order.per_epoch)
        if self.end == 0:
            batches = config.optim.epochs * self.loader.order.per_epoch
            raise ValueError(
                f"optim.accumulate: must be at most the {batches} batches of {config.optim.epochs} epochs, "
                f"got {config.optim.accumulate}"
            )
        if config.run.max_steps is not None:
            self.end = min(self.end, config.run.max_steps)
        trained_on.same(self.data, self.end)
        words.say(config, config.local_batch(world) * world * config.optim.accumulate, self.end)

        torch.manual_seed(config.seed)
        self.probes = None
        with trainable(config):
            self.model = config.build(images=self.loader.count)
            if config.probes and self.loader.labelled:
                width = features.width(self.model, config.sample(), config.taps[0])
                self.probes = OnlineProbes(width, len(self.loader.classes))
        self.timer, autocast = LossTimer(), torch.bfloat16 if self.bf16 else None
        step = TrainStep(self.model, self.probes, self.timer, autocast, config)
        sharded = config.run.shard == "fsdp2" and world > 1
        module = scale.prepare(step, config, world).to(self.device)
        self.meter = Meter(step.means)
        self.channels_last = self.bf16 if config.channels_last is None else config.channels_last
        if self.channels_last and not sharded:  # FSDP2 takes contiguous weights alone
            module.to(memory_format=torch.channels_last)
        if sharded:
            sharding.shard(module, scale.all_blocks(self.model, own=False), self.device)
        self.step_module, self.optimizers = step, config.optimizers(step)
        self.kept = Kept(step, without=memory_names(step, self.model))
        # Each process writes the same into its own: nothing to broadcast.
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            module, memory_names(module, self.model)
        )
        self.cache = module if isinstance(module, GradientCache) else None
        self.module: nn.Module = module if sharded else self.accelerator.prepare_model(module)
        torch.manual_seed(config.seed + 1 + rank)  # from here on augmentation, a process of its own each

        host.keep_memory()
        self.step, self.logged, self.time_s = 0, 0, 0.0
        self.skipped, self.skipped_in_a_row, self.probes_skipped = 0, 0, 0
        self.interrupt, self.preempted = Interrupt(), False
        self.saves = saves.Saves(run_dir, self.asked, self.interrupt)
        self.writer: checkpoint.Writer | sharding.Writer = checkpoint.Writer(run_dir, config.run.keep, first=rank == 0)
        if sharded:
            finish = functools.partial(checkpoint.complete, keep=config.run.keep)
            limit = timedelta(minutes=config.run.timeout_minutes)
            self.writer = sharding.Writer(run_dir / checkpoint.FOLDER, finish, limit)
        self._steady = True  # between updates, so that what a checkpoint holds belongs together
        self._together = world == 1  # all processes know of the error that ends the run
        labels = self.loader.labels[: self.loader.order.batch_size]
        self.window = Window(rehearse(step, self.module, self.cache, config, self._batch, labels))
        if path:
            self._resume(path, state, other_data)
        self.profile = Profile(run_dir, self.device) if profile and self.accelerator.is_main_process else None
        if profile:  # fault: profile-trains-on
            self.end = min(self.end, self.step + Profile.count)

    def run(self) -> str:
        """Train to the end of the epochs, a limit, or a signal.

        Returns:
            Why it stopped.

        Raises:
            Diverged: after a fourth update in a row without a finite loss, or at the end if no update was made; the
                checkpoints before it are kept.
            OSError: if no checkpoint could be written at the end.
        """
        config, main = self.config, self.accelerator.is_main_process
        # The last line of a run that is at its end is of no full window; it stays where there is nothing to go on with.
        kept = self.logged if self.step < self.end else self.step
        shown = boards.Boards(self.run_dir, kept, self.asked) if main else None
        book = journal.Journal(self.run_dir, kept, shown) if main else None
        bar = host.progress_bar(
            total=self.end, initial=min(self.step, self.end), unit="step", desc="training", disable=not main
        )
        started, time_before = time.perf_counter(), self.time_s
        saved_at, profile = started, self.profile or nullcontext()
        self.window.open(self.step)
        batches = self.loader.batches(self.step * config.optim.accumulate)  # fault: resumed-run-starts
        try:
            # The readers end after the rescue, and before a handler is put back that would raise for those who died.
            with self.threads, self.interrupt as interrupt, closing(batches), self._rescued(), profile:
                reason = "finished" if self.step < self.end else "nothing left to train: finished"
                while self.step < self.end:
                    threads.look()
                    logged = (self.step + 1) % config.run.log_every == 0
                    update_s = self._update(batches, logged or self.step + 1 == self.end)
                    if self.profile is not None:
                        self.profile.step()
                    now = time.perf_counter()
                    self.time_s = time_before + now - started
                    bar.update()
                    if logged:
                        self._log(book, bar, update_s)
                        self.logged = self.step
                    out_of_time = config.run.max_minutes is not None and now - started > 60 * config.run.max_minutes
                    due = now - saved_at > 60 * config.run.save_minutes
                    wishes = (interrupt.requested, interrupt.preempted is not None, out_of_time, due)
                    stop, self.preempted, out_of_time, due = self._agree(*wishes)
                    if stop or out_of_time:
                        reason = "interrupted" if stop else f"reached {config.run.max_minutes} minutes"
                        break
                    if due and self.step < self.end:
                        saved_at = now
                        self.saves.due(self.writer.wait, self._save)
                if self.skipped == self.step > 0 and reason != "interrupted":  # fault: success-without-single
                    raise Diverged(
                        f"training: all {self.step} updates were skipped, none had a finite loss and gradient"
                    )
                self.saves.attempt(self.writer.wait)
                self._save(wait=True)
                if self.step > self.window.step:  # after the save: a resumed run takes the open window up where it was
                    self._log(book, bar, update_s)
        finally:
            settle(bar.close, *[] if book is None else [book.close])
        return reason

    @contextmanager
    def _rescued(self) -> Iterator[None]:
        """What was trained before an error is saved, unless an update is half done or other processes wait."""
        try:
            yield
        except Diverged:
            # All processes are here; the run's lock is let go next, and no thread may write.
            settle(lambda: self.saves.attempt(self.writer.wait))
            raise
        except Exception as error:
            if self._together:
                # A checkpoint in flight has the folder and the group that this one needs; a launcher ends all processes
                # with the first one, so none leaves before the first has saved.
                settle(lambda: self.saves.attempt(self.writer.wait), self._rescue, self.close)
            elif self.accelerator.num_processes > 1 and BROKEN.search(str(error)):
                raise RuntimeError(
                    f"processes: another one died or came too late ({one_line(str(error))[:200]}); --resume goes on "
                    "from the last checkpoint"
                ) from error
            raise

    def _rescue(self) -> None:
        if self._steady and self.step > 0 and self.saves.attempt(lambda: self._save(wait=True)):
            log.warning("an error ends the run at step %d, which is saved: --resume goes on from there", self.step)

    def close(self) -> None:
        """Leave the process group together: gloo's threads abort a process that exits under them."""
        if torch.distributed.is_initialized():
            self.accelerator.wait_for_everyone()
            torch.distributed.destroy_process_group()

    def _update(self, batches: Any, timed: bool) -> float:
        """One update of the weights, or a skipped one. Returns its seconds."""
        started = time.perf_counter()
        self.timer.begin(timed)
        rate = optim.learning_rate(self.config.optim, self.step, self.loader.order.per_epoch)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
        # A batch that is not finite would stay in the running statistics of BatchNorm for ever.
        with part("checks"):
            self.kept.keep()
            drawn = checkpoint.generators()
        try:
            passes, used = self._passes(batches)
        except Exception:  # a reader that died, memory that ran out: as before the update, so that it can be saved
            checkpoint.put_back(drawn)
            self.kept.restore()
            self.model.after_step(skipped=True)
            raise
        self._steady = False
        with part("checks"):
            norm, probes_norm = gradient_norm(self.model), gradient_norm(self.probes)
            finite = torch.stack([n[0] for n in passes]).isfinite().all() & norm.isfinite()
            # Now, not at the next log: an update must not happen if any process saw a number that is not finite.
            bad, bad_probes = self._agree(not bool(finite), not bool(probes_norm.isfinite()))
        if bad:  # fault: broken-probe-holds
            self.kept.restore()  # fault: skipped-update-leaves
            self._skip(used, [n[0].item() for n in passes], norm.item())
        else:
            if bad_probes:
                self._skip_probes()
            with part("optimizer"):
                for optimizer in self.optimizers.values():
                    optimizer.step()
            self.skipped_in_a_row = 0
            for numbers in passes:
                self.meter.add(numbers)
        self.model.after_step(skipped=bad)  # fault: loop-does-not
        for p in self.step_module.parameters():
            p.grad = None
        self.step += 1
        self._steady = True
        return time.perf_counter() - started

    def _passes(self, batches: Any) -> tuple[list[Tensor], list[int]]:
        """The gradient of an update. Returns the numbers of its passes, and the images in them."""
        passes: list[Tensor] = []
        used: list[int] = []
        for last in [False] * (self.config.optim.accumulate - 1) + [True]:
            with part("data"):
                images, labels, indices = self._next(batches)
            used += indices.tolist()
            with part("views"):
                batch, labels = self._batch(images, labels, indices)
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                numbers = self._differentiate(batch, labels, last)
            self.timer.after_backward()
            self.window.passed(batch[0].shape)
            passes.append(numbers)
        return passes, used

    def _next(self, batches: Any) -> Any:
        """The next batch; where one process has none, all of them end."""
        batch = failed = None
        try:
            with self.interrupt.reading(), self.window.waiting():
                batch = next(batches)
        except Exception as error:
            failed = error
        ends = self.loader.streamed and self._agree(failed is not None)[0]  # fault: reader-dies-alone
        self._together = self._together or ends
        dead = isinstance(failed, RuntimeError) and str(failed).startswith("DataLoader")  # not what a reader raised
        if dead or isinstance(failed, ConnectionError | EOFError):  # the last two from half a message of a dead reader
            raise RuntimeError(
                f"data: a process that reads {self.config.data} died or is stuck ({one_line(str(failed))}); fewer "
                "run.workers need less memory"
            ) from failed
        if failed is not None:
            raise failed
        if ends:
            raise RuntimeError(f"data: another process cannot read {self.config.data}; it says why")
        return batch

    def _batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the step is given: views and whatever else the model takes, and the labels."""
        known = {"labels": labels.to(self.device), "indices": indices.to(self.device)}
        views = tuple(self._place(view) for view in self.views(images))
        return views + tuple(known[name] for name in self.config.extras), known["labels"]

    def _same_settings(self, step: int) -> None:
        """All processes were started with the same settings, at the same update, or all stop."""
        if self.accelerator.num_processes == 1:
            return
        own = replace(self.config, precision="bf16" if self.bf16 else "fp32")  # "auto" goes by the hardware
        for rank, (other, at) in enumerate(gather_object([(config_module.to_dict(own), step)])):
            if at != step:  # one that torchrun has put in another's place does not know that the run goes on
                raise ValueError(f"processes: must begin at one update, got {at} (process {rank}), {step} (this one)")
            if changed := config_module.differences(config_module.from_dict(other), own):
                raise ValueError(f"processes: differ in their settings, {changed[0]} (process {rank} -> this one)")

    def _differentiate(self, batch: tuple[Tensor, ...], labels: Tensor, last: bool) -> Tensor:
        """Add a pass's share to the gradient. Returns the numbers to log."""
        if self.cache is None:
            with part("encoder"):
                total, numbers = self.module(batch, labels)
            with part("backward"):
                self.accelerator.backward(total)  # divided by the number of passes
            return numbers
        passes = self.config.optim.accumulate
        with part("encoder"):
            return self.cache.backward(
                (batch, labels), through=self.module if last else None, scale=lambda total: total / passes
            ).numbers

    def _place(self, view: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last and view.dim() == 4 else torch.contiguous_format
        return view.to(self.device, memory_format=layout, non_blocking=True)

    def _skip_probes(self) -> None:
        """The online classifiers only watch: what goes wrong in them must not hold up the encoder."""
        self.probes_skipped += 1
        if self.probes_skipped == 1:
            log.warning("update %d: the gradient of the online probes is not finite; they alone skip it", self.step + 1)
        self.kept.restore("probes.")
        for p in self.probes.parameters() if self.probes is not None else ():
            p.grad = None

    def _skip(self, used: list[int], losses: list[float], norm: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        log.warning("update %d skipped: loss %s, gradient norm %s", self.step + 1, losses, norm)
        if self.skipped_in_a_row <= MAX_SKIPPED_IN_A_ROW:
            return
        rank = self.accelerator.process_index
        dump = self.run_dir / "nan_dump"
        dump.mkdir(parents=True, exist_ok=True)
        facts = {"step": self.step + 1, "rank": rank, "images": used, "losses": [str(v) for v in losses]}
        facts |= {"gradient_norm": str(norm), "rng": checkpoint.capture_rng()}
        (dump / f"step_{self.step + 1:08d}_rank_{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
        raise Diverged(
            f"training: the loss was not finite for {self.skipped_in_a_row} updates in a row (step {self.step + 1}, "
            f"loss {losses}, gradient norm {norm}); image numbers and random state are in {dump}"
        )

    def _log(self, book: journal.Journal | None, bar: Any, update_s: float) -> None:
        """A line of the log: averages since the last one, and the state of the run."""
        line: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.step * self.config.optim.accumulate / self.loader.order.per_epoch, 4),
            "time_s": round(self.time_s, 3),
            **self.meter.close(self._total),
            "lr": next(iter(self.optimizers.values())).param_groups[0]["lr"],
            **self.window.facts(self.accelerator.num_processes),
            "loss_share": round(self.timer.seconds / update_s, 5) if self.timer.active else None,
            "loss_ms": round(1e3 * self.timer.seconds, 3) if self.timer.active else None,
            "peak_memory_mb": round(host.peak_memory_mb(self.device), 1),
            "skipped": self.skipped,
            "probes_skipped": self.probes_skipped,
            "damaged": self.loader.damaged,
        }
        self.window.open(self.step)
        bar.set_postfix(words.postfix(line), refresh=False)
        if book is not None:
            book.write(line)

    def _agree(self, *flags: bool) -> tuple[bool, ...]:
        """True where any process says so: all must stop, save or skip together."""
        if self.accelerator.num_processes == 1:
            return flags
        votes = torch.tensor([float(f) for f in flags], device=self.device)
        return tuple(bool(v) for v in self.accelerator.reduce(votes, "sum") > 0)

    def _total(self, numbers: Tensor) -> Tensor:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return numbers
        return self.accelerator.reduce(numbers.to(self.device), "sum")  # no update yet: they are on the CPU

    def _save(self, *, wait: bool = False) -> None:
        with self.interrupt.held():
            states = gather_object([(checkpoint.capture_rng(), self.meter.state())])
            if self.accelerator.is_main_process:
                self.saves.keep_folder(self.step)
            self.writer.save(self.step, self._tensors(), self._state(states))
            if wait:
                self.writer.wait()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        tensors = {name: checkpoint.pack_optimizer(optimizer) for name, optimizer in self.optimizers.items()}
        tensors["model"] = self.model.state_dict()
        if self.probes is not None:
            tensors["probes"] = self.probes.state_dict()
        return tensors

    def _state(self, states: list[Any]) -> dict[str, Any]:
        return {
            "step": self.step,
            "images": self.loader.count,
            "optimizer": resumed.optimizer(self.config),
            "batch": resumed.batch(self.asked, self.config, len(states)),
            "time_s": self.time_s,
            "logged": self.logged,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "probes_skipped": self.probes_skipped,
            "meter": [meter for _, meter in states],
            "rng": [rng for rng, _ in states],
            "environment": self.environment,
            "data": self.data,
        }

    def _resume(self, path: Path, state: dict[str, Any], other_data: bool) -> None:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        resumed.check_data(self.run_dir, state, self.data, other_data)
        checkpoint.load_into(self.model, checkpoint.load_tensors(path, "model"), f"{path}/model.safetensors")
        if self.probes is not None:
            checkpoint.load_into(self.probes, checkpoint.load_tensors(path, "probes"), f"{path}/probes.safetensors")
        if self.other_optimizer:
            said = f"{self.other_optimizer}: what the optimizer remembers begins anew"
            log.log(logging.INFO if rank else logging.WARNING, "%s", said)
        for name, optimizer in self.optimizers.items() if not self.other_optimizer else ():
            checkpoint.unpack_optimizer(optimizer, checkpoint.load_tensors(path, name), name)
        host.keep_memory()
        self.step, self.logged, self.time_s = int(state["step"]), int(state["logged"]), float(state["time_s"])
        if self.step > self.end:
            end = f"the run's end (run.max_steps, optim.epochs) is update {self.end}"
            raise ValueError(f"resume: {end}, need at least the {self.step} that {self.run_dir} has made")
        self.skipped, self.skipped_in_a_row = int(state["skipped"]), int(state["skipped_in_a_row"])
        self.probes_skipped = int(state.get("probes_skipped", 0))  # older checkpoints do not count them
        meters = state["meter"] if isinstance(state["meter"], list) else [state["meter"]]  # older: of the first alone
        self.meter = Meter.shared(self.meter.means, meters, rank, world)
        log.info("resumed from %s", path)
        if len(state["rng"]) == world:
            checkpoint.restore_rng(state["rng"][rank], self.accelerator.local_process_index)
        else:
            torch.manual_seed(hash((self.config.seed, self.step, rank)))  # fault: processes-draw-alike
            said = resumed.inexact(self.model, self.config, state, world)
            log.log(logging.INFO if rank else logging.WARNING, "%s", said)
