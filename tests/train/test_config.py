"""Settings: presets, YAML, overrides, what a resume may change; and the command line around them."""

import pytest

from fused_nce import cli
from fused_nce.train import command, config
from fused_nce.train.config import TrainConfig
from fused_nce.train.presets import PRESETS


def parse(tmp_path, *argv):
    return command.parse([*argv, "--out", str(tmp_path / "run")])[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_parses_and_survives_the_disk(tmp_path, preset):
    settings = parse(tmp_path, "--preset", preset)
    assert config.load(tmp_path / "run") == settings
    wanted, flat = config.flatten(PRESETS[preset]), config.flatten(config.to_dict(settings))
    assert {key: flat[key] for key in wanted} == wanted
    default = config.flatten(config.to_dict(TrainConfig()))
    assert [key for key in flat if flat[key] != default[key] and key not in wanted and key != "preset"] == []


def test_the_published_settings():
    """facts of amdim-public and lightning-bolts, spelled out once more so that a slip in the table is seen."""
    default = TrainConfig()
    assert (default.optim.lr, default.optim.betas, default.optim.weight_decay) == (2e-4, (0.8, 0.999), 1e-5)
    assert (default.optim.warmup_updates, default.optim.epochs, default.optim.milestones) == (500, 300, (250, 280))
    assert (default.model.ndf, default.model.n_rkhs, default.model.n_depth) == (128, 1024, 3)
    assert (default.loss.clip, default.loss.penalty, default.optim.batch_size) == (20.0, 0.04, 200)
    assert PRESETS["cifar10-large"]["model"] == {"ndf": 320, "n_rkhs": 1280, "n_depth": 10}
    assert PRESETS["stl10-large"]["model"] == {"image_size": 64, "ndf": 192, "n_rkhs": 1536, "n_depth": 8}
    assert PRESETS["imagenet-large"]["model"] == {"image_size": 128, "ndf": 320, "n_rkhs": 2560, "n_depth": 10}
    assert PRESETS["imagenet-small"]["optim"] == {"epochs": 50, "milestones": [30, 45], "batch_size": 480}


def test_command_line_beats_yaml_beats_preset(tmp_path):
    (tmp_path / "my.yaml").write_text("optim:\n  lr: 0.5\n  epochs: 7\nmodel:\n  n_depth: 1\n")
    settings = parse(tmp_path, "--preset", "digits", "--config", str(tmp_path / "my.yaml"), "--epochs=9")
    assert settings.optim.epochs == 9
    assert settings.optim.lr == 0.5
    assert settings.model.n_depth == 1
    assert settings.augment.geometry == "affine"
    assert settings.preset == "digits"


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    parse(tmp_path, "--preset", "digits")
    with pytest.raises(ValueError, match="holds a run already; use --resume"):
        parse(tmp_path, "--preset", "digits")
    (tmp_path / "run" / "old").touch()
    parse(tmp_path, "--preset", "digits", "--overwrite")
    assert not (tmp_path / "run" / "old").exists()


@pytest.fixture
def saved(tmp_path):
    from fused_nce.train import checkpoint

    settings = parse(tmp_path, "--model.ndf=4", "--model.n_rkhs=16", "--model.n_depth=1")
    model = checkpoint.build_model(settings)
    checkpoint.save(tmp_path / "run", 1, {"model": model.state_dict()}, {}, keep=2)
    return str(tmp_path / "run")


def test_a_resume_keeps_the_settings(saved):
    settings, _, resume = command.parse(["--resume", saved, "--max-steps", "9", "--run.log_every=3"])
    assert resume
    assert (settings.model.ndf, settings.run.max_steps, settings.run.log_every) == (4, 9, 3)


def test_a_resume_with_other_settings_is_refused_with_the_difference(saved):
    with pytest.raises(ValueError, match=r"model\.ndf: 4 -> 3.*--allow-changed") as caught:
        command.parse(["--resume", saved, "--lr", "0.5", "--model.ndf=3"])
    assert "optim.lr: 0.0002 -> 0.5" in str(caught.value)
    settings, _, _ = command.parse(["--resume", saved, "--lr", "0.5", "--allow-changed", "optim.lr"])
    assert settings.optim.lr == 0.5


def test_a_resume_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.yaml"):
        command.parse(["--resume", str(tmp_path / "nothing")])
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-size", "1"], "optim.batch_size: must be at least 2"),
        (["--run.keep", "1"], "run.keep: must be at least 2"),
        (["--lr", "0"], "optim.lr: must be above 0, got 0"),
        (["--max-steps", "0"], "run.max_steps: must be above 0"),
        (["--augment.flip_p", "1.5"], r"augment.flip_p: must be in \[0, 1\], got 1.5"),
        (["--preset", "cifar"], "preset: must be one of default, digits"),
    ],
)
def test_refusals(tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, *argv)
    assert not (tmp_path / "run").exists()


def test_cli_errors_are_one_line_and_status_2(tmp_path, capsys):
    assert cli.main(["train", "amdim", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-nce: data: ")
    assert error.count("\n") == 1
    assert cli.main(["train", "simsiam"]) == 2
    assert cli.main(["tarin"]) == 2
    assert "command: must be one of train, eval, doctor" in capsys.readouterr().err


def test_cli_help_version_and_doctor(capsys):
    assert cli.main(["--help"]) == cli.main(["--version"]) == cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "usage: fused-nce COMMAND" in printed
    assert "backend" in printed


def test_a_command_that_could_not_start_leaves_no_run(tmp_path):
    run = tmp_path / "run"
    for _ in range(2):  # the second would be refused as "holds a run already"
        with pytest.raises(ValueError, match=r"data: .* does not exist"):
            command.main(["amdim", "--data", str(tmp_path / "absent"), "--out", str(run)])
        assert not run.exists()
