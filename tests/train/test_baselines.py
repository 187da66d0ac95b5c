"""DIM's baselines and its generator in the loop: they learn, they are compared, and what they make is drawn."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fused_nce import cli
from fused_nce.train import command
from fused_nce.train.evaluation import figures
from fused_nce.train.loop import Trainer
from fused_nce.train.saving import checkpoint
from tests.marks import nightly_but
from tests.train.runs import log, moved, tensors

TINY = ["--preset=digits", "--model.width=0.1", "--batch-size=32", "--run.log_every=4", "--precision=fp32"]
SMALL = [*TINY, "--model.decoder=8"]


def trainer(name, out, *argv):
    return Trainer(*command.parse(name, [*(TINY if name == "nat" else SMALL), "--out", str(out), *argv])[:2])


@pytest.mark.parametrize(("name", "part"), nightly_but((("vae", "nce"), ("nat", "nce")), [
    ("vae", "nce"), ("nat", "nce"), ("aae", "error"), ("bigan", None), ("dim-generator", None)
]))  # fmt: skip
def test_it_learns_the_digits(tmp_path, name, part):
    """The autoencoders to decode, NAT its points; a game has no such measure: see the next test."""
    run = trainer(name, tmp_path / "a", "--max-steps=32")
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.run()
    first, *_, last = log(tmp_path / "a")
    assert part is None or last[part] < 0.95 * first[part]
    holding = (part for part in run.model.named_children() if part[1].state_dict())
    assert moved(run.model, before) == {name for name, _ in holding}
    rivals = run.model.rivals()
    assert list(run.optimizers) == ["optimizer"] + ["discriminator"] * (rivals is not None)
    kept = [k for k in tensors(tmp_path / "a", 32) if k.startswith("discriminator/") and k.endswith("exp_avg_sq")]
    assert len(kept) == (len(list(rivals.parameters())) if rivals is not None else 0)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["bigan", "dim-generator"])
def test_a_generator_comes_to_the_mean_of_the_images(tmp_path, name):
    """Its images are gray at first; within 400 updates most of what parted them from the mean digit is gone."""
    run = trainer(name, tmp_path / "a", "--max-steps=400", "--lr=1e-3", "--model.decoder=16")
    known = torch.cat([run.views(images)[0] for (images, *_), _ in zip(run.loader.batches(0), range(8), strict=False)])

    def apart():
        with torch.no_grad():
            return (run.model.eval().generate(256).mean(0) - known.mean(0)).square().mean()

    before = apart()
    run.model.train()
    run.run()
    assert apart() < 0.4 * before


def test_train_evaluate_and_compare_from_the_command_line(tmp_path, capsys):
    names = ("vae", "dim", "dim-generator")
    for name in names:
        out, settings = str(tmp_path / name), TINY if name == "dim" else SMALL
        assert cli.main(["train", name, *settings, "--max-steps=6", "--out", out]) == 0
        assert cli.main(["eval", out, "--draws=2", "--baselines=false", "--taps=Y", "--neighbours=3"]) == 0
    assert "DIM's generator on digits (digits): architecture dcgan32, width 0.1, code 64" in capsys.readouterr().out
    assert not (tmp_path / "dim" / "samples.png").exists()
    for name, width in (("vae", 64), ("dim-generator", 1)):
        result = json.loads((tmp_path / name / "eval.json").read_text())
        assert {row["width"] for row in result["probes"]} == {width}
        assert Image.open(tmp_path / name / "samples.png").size == (8 * 70, 8 * 74)
        assert "What the generator makes" in (tmp_path / name / "report.html").read_text()
    for metric in ("cosine", "l1"):
        assert Image.open(tmp_path / "dim" / f"neighbours-{metric}.png").size == (4 * 70, 12 * 74)
    assert cli.main(["compare", *(str(tmp_path / name) for name in names), "--out", str(tmp_path / "all")]) == 0
    page = (tmp_path / "all.html").read_text()
    assert all(f"{name}<small> · {name}</small>" in page for name in names)
    for count in (0, 101):
        assert cli.main(["eval", str(tmp_path / "vae"), f"--neighbours={count}"]) == 2
        assert f"neighbours: {count}; need 1 to 100" in capsys.readouterr().err


def test_the_sheet_of_samples_is_of_the_trained_model_and_of_one_seed(tmp_path):
    trainer("vae", tmp_path / "run", "--max-steps=2").run()
    model, _ = checkpoint.load_model(tmp_path / "run")
    state = torch.get_rng_state()
    png = figures.samples(model, 3)
    assert png == figures.samples(model, 3) != figures.samples(model, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    with torch.no_grad():
        made = model.generate(64)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(png or b""))))
    assert made is not None
    cell = pixels[74 + 3 : 74 + 67 : 2, 70 + 3 : 70 + 67 : 2].permute(2, 0, 1)  # the second of the second row
    torch.testing.assert_close(cell.float(), ((made[9] + 1) * 127.5).round())
