"""More negatives than a forward pass, activations made twice, and a restart after a process was lost."""

from types import SimpleNamespace

import pytest
import torch

from fused_nce.distributed import Processes
from fused_nce.train import command, loop, scale
from fused_nce.train.loop import Trainer
from fused_nce.train.saving import lock
from fused_nce.train.step import LossTimer, TrainStep
from tests.marks import nightly_but
from tests.train.runs import TINY, assert_the_same, differing, resumed, tensors, trainer

SMALL = [*TINY, "--loss.antecedents=all", "--precision=fp32", "--probes=false"]


def gradients(out, *argv, method="amdim"):
    """Of the first batch, in float64."""
    run = Trainer(*command.parse(method, [*argv, f"--out={out}"])[:2])
    run.step_module.double()
    images, labels, _ = next(run.loader.batches(0))
    torch.manual_seed(0)
    batch = tuple(view.double() for view in run.views(images)) + ((labels,) if method == "supcon" else ())
    if method != "amdim":
        run.step_module.eval()  # its BatchNorms see a part at a time
    numbers = run._differentiate(batch, labels, True)
    return numbers, {name: p.grad for name, p in run.step_module.named_parameters()}


@pytest.mark.parametrize("method", nightly_but(["simclr"], ["amdim", "simclr", "supcon"]))
def test_negatives_beyond_a_forward_pass_have_the_gradient_of_one(tmp_path, method):
    options = SMALL[1:] if method == "amdim" else ["--precision=fp32", "--probes=false"]
    options = [word for word in options if not word.startswith("--batch-size")]
    whole = gradients(tmp_path / "a", "--preset=digits", *options, "--batch-size=12", method=method)
    parts = gradients(tmp_path / "b", "--preset=digits", *options, "--batch-size=4", "--negatives=12", method=method)
    assert torch.allclose(parts[0], whole[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    # A bias before a BatchNorm has the gradient 0: what is left of it is measured by the largest gradient.
    largest = max(g.abs().max() for g in whole[1].values())
    assert {n for n, g in whole[1].items() if (parts[1][n] - g).abs().max() > 1e-12 * largest} == set()


@pytest.mark.nightly
@pytest.mark.parametrize("options", [["--negatives=16"], ["--checkpoint-activations=true"]])
def test_a_resume_is_exact(tmp_path, options):
    trainer(tmp_path / "a", *options, "--max-steps=4").run()
    trainer(tmp_path / "b", *options, "--max-steps=2").run()
    resumed(tmp_path / "b", "--max-steps=4").run()
    assert_the_same(tmp_path / "b", tmp_path / "a", 4)


@pytest.mark.parametrize("options", [["--model.use_bn=true"], ["--negatives=16"]])
def test_activations_made_twice_change_no_bit(tmp_path, options):
    trainer(tmp_path / "a", *options, "--max-steps=2").run()
    trainer(tmp_path / "b", *options, "--max-steps=2", "--checkpoint-activations=true").run()
    assert differing(tensors(tmp_path / "b", 2), tensors(tmp_path / "a", 2)) == []


def test_a_block_keeps_its_input_alone(tmp_path):
    def kept(out, *options):
        """Numbers that a block saves for its backward, its weights aside."""
        block = trainer(out, *options).model.encoder.to5
        weights = {p.data_ptr() for p in block.parameters()}
        saved = []

        def pack(x):
            saved.append(0 if x.data_ptr() in weights else x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            block(torch.ones(8, 16, 7, 7, requires_grad=True))
        return sum(saved)

    assert kept(tmp_path / "a", "--checkpoint-activations=true") == 8 * 16 * 49
    assert kept(tmp_path / "b") > 2 * 8 * 16 * 49


@pytest.mark.parametrize("method", ["moco", "npid", "dim", "cpc", "cpc-vision"])
def test_a_method_without_parts_refuses_negatives(tmp_path, method):
    with pytest.raises(ValueError, match=r"scale\.negatives: must be null for .*, got 4096"):
        command.parse(method, ["--negatives=4096", f"--out={tmp_path}/a"])


def test_a_sharded_model_refuses_parts(tmp_path):
    with pytest.raises(ValueError, match=r"run\.shard: must be none where scale\.negatives is given, got fsdp2"):
        command.parse("amdim", [*TINY, "--negatives=16", "--run.shard=fsdp2", f"--out={tmp_path}/a"])


def test_negatives_are_a_whole_number_of_passes_of_every_process(tmp_path):
    settings = command.parse("amdim", [*TINY, "--negatives=48", f"--out={tmp_path}/a"])[0]
    assert (settings.local_batch(1), settings.local_batch(3)) == (48, 16)
    with pytest.raises(ValueError, match=r"multiple of optim.batch_size x processes = 8 x 4, got 48"):
        settings.local_batch(4)


def step(config):
    return TrainStep(config.build(), None, LossTimer(), None, config)


@pytest.mark.parametrize("method", ["amdim", "simclr", "supcon", "dim", "cpc-vision"])
def test_negatives_come_from_everywhere_unless_told_otherwise(tmp_path, method):
    def groups(*options, world=2):
        config = command.parse(method, ["--preset=digits", *options, f"--out={tmp_path / str(len(made))}"])[0]
        made.append(config)
        module = step(config)
        scale.prepare(module, config, world)
        return {loss.group for loss in module.modules() if hasattr(loss, "group")}

    made = []
    assert groups() == {Processes()}
    assert groups("--scale.ring=true") == {Processes(ring=True)}
    assert groups("--scale.everywhere=false") == groups(world=1) == {None}


def test_norms_are_synchronised_on_gpus_alone(tmp_path):
    config = command.parse("simclr", ["--preset=digits", "--sync-norm=true", f"--out={tmp_path}/a"])[0]
    if torch.cuda.is_available():
        scale.prepare(module := step(config), config, 2)
        assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in module.modules())
    else:
        with pytest.raises(ValueError, match=r"scale\.sync_norm: must be false without a GPU, got true"):
            scale.prepare(step(config), config, 2)


def test_a_process_that_begins_at_another_update_stops_all(tmp_path, monkeypatch):
    """One that torchrun has put in another's place was never restarted, and takes the run for a new one."""
    run = trainer(tmp_path / "a")
    run.accelerator = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(loop, "gather_object", lambda own: [(own[0][0], 7), *own])
    with pytest.raises(ValueError, match=r"^processes: must begin at one update, got 7 \(process 0\), 0 \(this one\)$"):
        run._same_settings(0)
    run._same_settings(7)


def test_a_resume_without_its_negatives_keeps_the_batch_of_its_settings(tmp_path):
    trainer(tmp_path / "a", "--negatives=16", "--probes=false", "--max-steps=1").run()
    lock.release(tmp_path / "a")
    changed = ["--allow-changed", "scale.negatives", "--scale.negatives=null"]
    run = resumed(tmp_path / "a", "--max-steps=2", *changed)
    assert run.loader.order.batch_size == run.config.optim.batch_size == 8
