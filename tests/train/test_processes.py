"""A run that other processes take up, in processes: what stays the same, and what is said to differ."""

import logging
import os
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

from fused_nce.models.encoders import backbones
from fused_nce.train import command, rehearsal, step
from fused_nce.train.loop import Trainer
from fused_nce.train.methods.nat import NATConfig
from fused_nce.train.saving import resumed, trained_on
from tests.distributed import launch
from tests.marks import nightly_but
from tests.train.pictures import write_images
from tests.train.runs import assert_the_same, log, tensors, trainer

# Nothing is drawn at random, and no image's features depend on another image.
PLAIN = [
    "--preset=digits", "--model.backbone=plain", "--augment.flip_p=0", "--augment.geometry=none", "--augment.gray_p=0",
    "--augment.blur_p=0", "--augment.jitter=0,0,0,0", "--precision=fp32", "--probes=false", "--optim.name=sgd",
    "--optim.lr=0.1", "--optim.schedule=constant", "--optim.warmup_updates=0", "--run.threads=1", "--run.log_every=1",
]  # fmt: skip
WAYS = {
    "simclr": ["--model.norm=false", "--optim.accumulate=2"],
    "simclr in parts": ["--model.norm=false", "--negatives=24"],
    "moco": ["--model.splits=1", "--model.queue_size=48"],
}


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 16 * 16, 24), nn.Tanh())


def train(rank, size, method, argv, patched=True, hook=None):
    """One process of a run: the images of its passes, the first number that it draws, and the lines that it says."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in place.items() if size > 1}
    if patched:
        backbones._torchvision = lambda name: (Plain(), 24)
    said, seen = [], []
    handler: Any = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("fused_nce").addHandler(handler)
    settings, run_dir, resume = command.parse(method, argv)
    run: Any = Trainer(settings, run_dir, resume=resume)
    drawn, state = torch.get_rng_state(), torch.rand(3).tolist()
    torch.set_rng_state(drawn)
    if hook is not None:
        hook(run)
    batches = run.loader.batches

    def recorded(position):
        for batch in batches(position):
            seen.append(batch.indices.tolist())
            yield batch

    run.loader.batches = recorded
    run.run()
    return {"seen": seen, "drawn": state, "said": said}


def go(folder, size, method, *argv, patched=True, hook=None):
    """A run of so many processes, by rank."""
    folder.mkdir()
    return launch.run(folder, size, train, size, method.split()[0], list(argv), patched, hook)


def together(results):
    """The images of every pass, those of one process after the other's."""
    return [list(chain(*parts)) for parts in zip(*(r["seen"] for r in results), strict=True)]


@pytest.mark.parametrize(
    ("way", "sizes"), nightly_but([("moco", (1, 2))], [("moco", (1, 2)), *((way, (3, 2, 1)) for way in WAYS)])
)
def test_other_processes_go_on_with_the_same_images_and_weights(tmp_path, way, sizes):
    whole, parts, last = tmp_path / "whole", tmp_path / "parts", 2 * len(sizes)
    size = 12 // sizes[0]
    options = [*PLAIN, *WAYS[way], f"--batch-size={size}"]
    straight = go(tmp_path / "0", sizes[0], way, *options, f"--out={whole}", f"--max-steps={last}")
    seen = []
    for i, count in enumerate(sizes):
        start = [f"--resume={parts}"] if i else [*options, f"--out={parts}"]
        found = go(tmp_path / f"{i + 1}", count, way, *start, f"--max-steps={2 * i + 2}")
        seen += together(found)
        assert len({tuple(r["drawn"]) for r in found}) == count
        lines = [line for line in found[0]["said"] if "processes go on with" in line]
        assert lines == (i > 0) * [
            f"{count} processes go on with a run of {sizes[i - 1]}: the same images in every update, "
            f"{(24 if 'parts' in way else 12) // count} a process; not the same: sums by rounding, what is drawn at "
            "random (augmentation, dropout)"
        ]
    assert seen == together(straight)
    ours, theirs = tensors(parts, last), tensors(whole, last)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert yaml.safe_load((parts / "config.yaml").read_text())["optim"]["batch_size"] == size
    losses = [[line["loss"] for line in log(folder)] for folder in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # of all processes, so their number does not show


def other_data(rank, folder, argv):
    """What a process says whose copy of the data, under the path that all were told, is its own."""
    os.chdir(folder / str(rank))
    try:
        train(rank, 2, "simclr", [*argv, "--data=images"])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.nightly
def test_processes_with_other_data_stop_before_they_train(tmp_path):
    for rank, count in ((0, 24), (1, 20)):
        write_images(tmp_path / f"{rank}/images", count)
    (tmp_path / "meet").mkdir()
    options = [*PLAIN, "--batch-size=4", "--max-steps=3", f"--out={tmp_path / 'run'}"]
    found = launch.run(tmp_path / "meet", 2, other_data, tmp_path, options)
    for said, numbers in zip(found, ("20 -> 24", "24 -> 20"), strict=True):
        assert "processes: differ in their data, images " + numbers in said


def test_data_and_end_are_those_of_all_processes(monkeypatch):
    labels = torch.tensor([0, 0, 1])
    own, less = (trained_on.facts(SimpleNamespace(labels=x, classes=["a", "b"], count=len(x)), {})
                 for x in (labels, labels[:2]))  # fmt: skip
    for other, said in (((less, 4), "images 2 -> 3; images of classes: b 0 -> 1"), ((own, 3), "last update 3 -> 4")):
        monkeypatch.setattr(trained_on, "gather_object", lambda mine, other=other: [*mine, other])
        with pytest.raises(ValueError, match=f"processes: differ in their data, {said} .process 1 -> this one.$"):
            trained_on.same(own, 4)
    monkeypatch.setattr(trained_on, "gather_object", lambda mine: mine * 3)
    trained_on.same(own, 4)


def straight_and_resumed(rank, folder, options):
    """One process of a run, and of the same in two halves."""
    for argv in ([f"--out={folder}/whole", "--max-steps=4"], [f"--out={folder}/parts", "--max-steps=2"],
                 [f"--resume={folder}/parts", "--max-steps=4"]):  # fmt: skip
        train(rank, 3, "simclr", argv if "--resume" in argv[0] else [*options, *argv], patched=False)
        dist.barrier()


@pytest.mark.nightly
def test_three_processes_go_on_to_the_bit(tmp_path):
    """Two add up in one order only; three in the one that DDP took from their first backward."""
    options = ["--preset=digits", "--batch-size=4", "--run.threads=1", "--precision=fp32", "--run.log_every=1"]
    (tmp_path / "meet").mkdir()
    launch.run(tmp_path / "meet", 3, straight_and_resumed, tmp_path, options)
    assert_the_same(tmp_path / "parts", tmp_path / "whole", 4)


def test_after_the_rehearsal_ddp_has_the_order_of_its_sums(tmp_path):
    run = trainer(tmp_path / "a")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(run.step_module)
        assert not wrapped.reducer._rebuild_buckets()
        rehearsal.rehearse(run.step_module, wrapped, None, run.config, run._batch, torch.zeros(8, dtype=torch.int64))
        assert wrapped.reducer._rebuild_buckets()
    finally:
        dist.destroy_process_group()


def test_a_line_of_the_log_is_of_all_processes_whoever_goes_on():
    means, parts = step.MEANS, [[2.0] * 9, [4.0] * 9]
    meters = [{"sums": sums, "passes": passes} for sums, passes in zip(parts, (1, 3), strict=True)]
    one, two = (step.Meter.shared(means, meters, rank, 2) for rank in (0, 1))
    together = one.close(lambda numbers: numbers + torch.cat([two.sums, two.sums.new_tensor([two.passes])]))
    assert together["loss"] == (2 + 4) / (1 + 3)
    assert together["linear_acc"] == 1
    assert step.Meter.shared(means, meters, 0, 1).close() == together
    later = [step.Meter.shared(means, meters, rank, 3).state() for rank in (0, 1, 2)]
    assert [(meter["passes"], meter["sums"][0]) for meter in later] == [(4, 6.0), (0, 0.0), (0, 0.0)]


def test_what_cannot_stay_is_said_and_what_cannot_be_shared_refused(tmp_path):
    def settings(*argv):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return command.parse("simclr", ["--preset=digits", "--batch-size=8", *argv, f"--out={folder}"])[0]

    plain, home = settings(), settings("--scale.everywhere=false")
    state = {"rng": [{}] * 3, "batch": resumed.batch(plain, plain, 3)}
    assert state["batch"] == {"asked": 8, "all": 24, "negatives": None}
    for world, share in ((1, 24), (2, 12), (3, 8), (12, 2)):
        assert resumed.for_processes(plain, state, world).optim.batch_size == share
        assert resumed.for_processes(plain, {"rng": [{}] * 3}, world).optim.batch_size == share  # of an older version
    assert plain.optim.batch_size == 8
    for world, words in ((5, "processes: must divide the 24 images of a pass of this run, got 5"),
                         (24, r"optim\.batch_size: must be at least 2 .*, got 1")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            resumed.for_processes(plain, state, world)
    changed = settings("--batch-size=6")  # allowed by --allow-changed: it holds as it is
    assert resumed.for_processes(changed, state, 2) == changed
    parts = settings("--negatives=96")
    of_parts = {"rng": [{}] * 3, "batch": resumed.batch(parts, parts, 3)}
    for world in (1, 2, 3):  # without the negatives that a resume may take away, a part is the whole again
        assert resumed.for_processes(plain, of_parts, world) == plain
        assert resumed.for_processes(parts, of_parts, world) == resumed.for_processes(parts, state, world) == parts
    again = resumed.batch(plain, resumed.for_processes(plain, state, 1), 1)
    assert again == state["batch"]  # whoever goes on next divides the same images
    model = plain.build()
    said = resumed.inexact(model, resumed.for_processes(plain, state, 1), state, 1)
    assert said.endswith("24 a process; not the same: sums by rounding, what is drawn at random (augmentation, "
                         "dropout), BatchNorm's statistics (of 24 images)")  # fmt: skip
    said = resumed.inexact(model, resumed.for_processes(home, state, 2), state, 2)
    assert said.endswith(", the negatives (scale.everywhere is false: those of a process)")
    nat = NATConfig()
    said = resumed.inexact(nat.build(images=8), nat, state, 2)
    assert said.endswith(", which images may exchange their targets (those of a process)")
