"""Distillation: a run is fine-tuned from the command line, and a student learns its answers without labels."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

from fused_nce import cli
from fused_nce.models.distil import DistillationLoss, Distilled
from fused_nce.train import command, teacher
from fused_nce.train.evaluation import fine_tune
from fused_nce.train.loop import Trainer
from fused_nce.train.saving import checkpoint
from tests.train.runs import assert_the_same, log, resumed

DIGITS = ["--preset=digits", "--precision=fp32", "--run.log_every=4"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run with a classifier beside it."""
    out = tmp_path_factory.mktemp("runs") / "simclr"
    assert cli.main(["train", "simclr", *DIGITS, "--batch-size=64", "--max-steps=12", "--out", str(out)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tune, "MIN_UPDATES", 20)
        patch.setattr(fine_tune, "EPOCHS", 1)
        assert cli.main(["fine-tune", str(out), "--labels_per_class=10", "--tap=h"]) == 0
    return out


def test_fine_tuning_refuses_a_class_that_training_lacks_or_leaves_it_out(taught, tmp_path, capsys, monkeypatch):
    for split, name, count in (("train", "a", 12), ("train", "b", 12), ("test", "b", 3), ("test", "owl", 2)):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (32, 32), (9 * i, 90, 200 if name == "a" else 0)).save(
                tmp_path / split / name / f"{i}.png"
            )
    run = tmp_path / "run"
    shutil.copytree(taught, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("data: digits", f"data: {tmp_path}"))
    for name in ("MIN_UPDATES", "EPOCHS"):
        monkeypatch.setattr(fine_tune, name, 1)
    argv = ["fine-tune", str(run), "--labels_per_class=2", "--tap=h"]
    assert cli.main(argv) == 2
    assert "no training image has class 'owl', which 2 test images have" in capsys.readouterr().err
    assert cli.main([*argv, "--leave_out_unseen", "true"]) == 0
    assert "2 images of classes that training lacks" in capsys.readouterr().out


def student(taught, out, *argv):
    words = [*DIGITS, "--batch-size=32", f"--model.teacher={taught}", "--optim.warmup_updates=2", "--out", str(out)]
    return Trainer(*command.parse("distil", [*words, *argv])[:2])


def test_the_loss_is_the_cross_entropy_with_the_teachers_softmax():
    own, other = torch.randn(2, 5, 4, dtype=torch.float64)
    own.requires_grad_()
    out = DistillationLoss(0.5)(own, other)
    p, q = (other / 0.5).softmax(1), (own / 0.5).softmax(1)
    divergence = functional.kl_div(q.log(), p, reduction="batchmean")
    torch.testing.assert_close(out.loss, divergence - (p * p.log()).sum(1).mean())
    out.loss.backward()
    torch.testing.assert_close(own.grad, (q - p) / 0.5 / 5)
    assert DistillationLoss()(other, other).stats["agreement"] == 1
    with pytest.raises(ValueError, match=r"^temperature: got 0, need a finite number > 0$"):
        DistillationLoss(0)


def test_a_classifier_comes_back_as_it_was_written(taught):
    torch.manual_seed(5)
    first, second = teacher.load(str(taught)), teacher.load(str(taught))
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(first.predict(images), second.predict(images))
    assert (first.tap, len(first.head.bias)) == ("h", 10)
    assert first.head.weight.any()
    model, _ = checkpoint.load_model(taught)
    assert not torch.equal(
        model.state_dict()["encoder.conv1.weight"], first.encoder.state_dict()["encoder.conv1.weight"]
    )


def test_a_student_learns_its_teachers_answers(taught, tmp_path):
    student(taught, tmp_path / "a", "--max-steps=24").run()
    lines = log(tmp_path / "a")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert lines[-1]["agreement"] > lines[0]["agreement"] + 0.1


@pytest.mark.nightly
def test_a_student_resumes_exactly(taught, tmp_path):
    student(taught, tmp_path / "a", "--max-steps=24").run()
    student(taught, tmp_path / "b", "--max-steps=9").run()
    torch.manual_seed(999)
    resumed(tmp_path / "b", "--max-steps=24", method="distil").run()
    assert_the_same(tmp_path / "b", tmp_path / "a", 24)


def test_a_student_outlives_its_teacher(taught, tmp_path):
    copy = shutil.copytree(taught, tmp_path / "teacher")
    run = student(copy, tmp_path / "run", "--max-steps=1")
    run.run()
    assert [key for key in run.model.state_dict() if not key.startswith(("encoder.", "head."))] == []
    shutil.rmtree(copy)
    model, settings = checkpoint.load_model(tmp_path / "run")
    assert set(settings.taps) <= set(model.encode(settings.sample()))


def test_a_student_goes_on_with_the_teacher_that_it_had(taught, tmp_path):
    copy = shutil.copytree(taught, tmp_path / "teacher")
    student(copy, tmp_path / "run", "--max-steps=1").run()
    with safe_open(copy / teacher.NAME, "pt") as file:
        tensors, facts = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["head.bias"] += 1
    save_file(tensors, copy / teacher.NAME, facts)
    again = command.parse("distil", ["--resume", str(tmp_path / "run"), "--max-steps=2"])
    with pytest.raises(ValueError, match=r"have changed since step 1 \(the teacher's classifier\); bring them back"):
        Trainer(*again[:2], resume=True)
    assert Trainer(*again[:2], resume=True, other_data=True).step == 1


def test_a_teacher_that_does_not_fit_is_refused_before_any_work(taught, tmp_path):
    def refused(words, *argv):
        with pytest.raises(ValueError, match=words):
            student(taught, tmp_path / str(len(list(tmp_path.iterdir()))), *argv)

    refused("^model.classes: must be the teacher's 10, got 9$", "--model.classes=9")
    refused("^model.image_size: must be the teacher's 16, got 24$", "--model.image_size=24")
    refused(r"^augment.std: must be the teacher's \(0.35, 0.35, 0.35\), got", "--augment.std=0.3,0.3,0.3")
    refused("^model.teacher: must be the folder of a fine-tuned run, got null$", "--model.teacher=null")
    bare = tmp_path / "bare"
    shutil.copytree(taught, bare)
    (bare / teacher.NAME).unlink()
    refused("holds no fine-tuned.safetensors; make it by: fused-nce fine-tune", f"--model.teacher={bare}")


def test_a_model_without_a_teacher_encodes_and_does_not_train():
    model = Distilled(teacher=None, classes=3, backbone="mini")
    images = torch.rand(2, 3, 16, 16)
    assert model.encode(images)["z"].shape == (2, 3)
    with pytest.raises(RuntimeError, match=r"^teacher: none was given"):
        model(images)
    with pytest.raises(ValueError, match=r"^classes: got 3, need the teacher's 4$"):
        Distilled(teacher=lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4)), classes=3,
                  backbone="mini")(images)  # fmt: skip
