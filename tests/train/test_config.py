"""Settings: presets, YAML, overrides, what a resume may change; and the command line around them."""

import errno
import os
import sys
from pathlib import Path

import pytest
import yaml

from fused_nce import cli
from fused_nce.losses.amdim import PRESETS as LOSS_PRESETS
from fused_nce.train import command, config, limits
from fused_nce.train.data import augment
from fused_nce.train.methods.amdim import PRESETS, AMDIMConfig, ModelConfig
from fused_nce.train.settings import AugmentConfig
from tests.refusals import unlike
from tests.train.runs import ill_refused

RULES = set(limits.rules(AMDIMConfig()))
DOCS = Path(__file__).resolve().parents[2] / "docs"
NAN, INF = float("nan"), float("inf")
GEOMETRY = "augment.geometry: must be one of 'translate', 'affine', 'crop', 'none', got warp"


def parse(tmp_path, *argv):
    return command.parse("amdim", [*argv, "--out", str(tmp_path / "run")])[0]


TIMED = [f"cifar10-{minutes}min" for minutes in (12, 30, 60)]
OURS = ("digits", "cifar10-tiny", *TIMED)
UPSTREAM = [name for name in PRESETS if name not in OURS]


def of_preset(preset):
    return config.from_dict({"method": "amdim", **PRESETS[preset]})


@pytest.mark.parametrize("preset", UPSTREAM)
def test_presets_from_upstream_train_with_its_loss_and_optimizer(preset):
    settings = of_preset(preset)
    upstream = LOSS_PRESETS["amdim-public"]
    assert {key: getattr(settings.loss, key) for key in upstream} == upstream
    imagenet, cifar = preset.startswith("imagenet"), preset.startswith(("cifar", "default"))
    assert (settings.optim.lr, settings.optim.betas, settings.optim.weight_decay) == (2e-4, (0.8, 0.999), 1e-5)
    assert (settings.optim.warmup_updates, settings.optim.schedule, settings.optim.gamma) == (500, "step", 0.2)
    assert (settings.optim.epochs, settings.optim.milestones) == ((50, (30, 45)) if imagenet else (300, (250, 280)))
    assert settings.augment.geometry == ("translate" if cifar else "crop")
    assert settings.augment.jitter[3] == (0.1 if imagenet else 0.2)
    if not cifar:
        mean, std = (
            ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if imagenet else ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27))
        )
        assert (settings.augment.mean, settings.augment.std) == (mean, std)


def test_our_presets_take_the_penalty_of_the_paper():
    assert [of_preset(preset).loss.penalty for preset in OURS] == [0.04] * len(OURS)


def test_the_presets_of_a_time_differ_from_the_tiny_one_by_optimizer_width_and_epochs_alone():
    tiny = of_preset("cifar10-tiny")
    changed = {
        "name: adam -> muon",
        "lr: 0.002 -> 0.005",
        "momentum: 0.9 -> 0.95",
        "ndf: 64 -> 80",
        "n_rkhs: 256 -> 448",
    }
    for preset, epochs in zip(TIMED, (set(), {"epochs: 3 -> 8"}, {"epochs: 3 -> 16"}), strict=True):
        lines = config.differences(tiny, of_preset(preset))
        assert {line.partition(".")[2] for line in lines} == changed | epochs


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    parse(tmp_path, "--preset", "digits")
    with pytest.raises(ValueError, match="holds a run already; use --resume"):
        parse(tmp_path, "--preset", "digits")
    (tmp_path / "run" / "old").touch()
    parse(tmp_path, "--preset", "digits", "--overwrite")
    assert not (tmp_path / "run" / "old").exists()


def test_the_run_of_the_folder_that_the_command_is_given_in_is_moved_aside(tmp_path, monkeypatch):
    parse(tmp_path, "--preset", "digits")
    monkeypatch.chdir(tmp_path / "run")
    assert command.parse("amdim", ["--preset", "digits", "--out", ".", "--overwrite"])[1] == tmp_path / "run"
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["run", "run.replaced"]
    assert (tmp_path / "run" / "config.yaml").is_file()


@pytest.fixture
def saved(tmp_path):
    from fused_nce.train.saving import checkpoint

    settings = parse(tmp_path, "--model.ndf=4", "--model.n_rkhs=16", "--model.n_depth=1")
    model = settings.build()
    checkpoint.save(tmp_path / "run", 1, {"model": model.state_dict()}, {}, keep=2)
    return str(tmp_path / "run")


def test_a_resume_keeps_the_settings(saved):
    settings, _, resume = command.parse("amdim", ["--resume", saved, "--max-steps", "9", "--run.log_every=3"])
    assert resume
    assert (settings.model.ndf, settings.run.max_steps, settings.run.log_every) == (4, 9, 3)


def test_a_resume_with_other_settings_is_refused_with_the_difference(saved):
    with pytest.raises(ValueError, match=r"model\.ndf: 4 -> 3.*--allow-changed") as caught:
        command.parse("amdim", ["--resume", saved, "--lr", "0.5", "--model.ndf=3"])
    assert "optim.lr: 0.0002 -> 0.5" in str(caught.value)
    settings, _, _ = command.parse("amdim", ["--resume", saved, "--lr", "0.5", "--allow-changed", "optim.lr"])
    assert settings.optim.lr == 0.5


def test_what_is_no_resume(saved, tmp_path):
    other = "resume: goes on in .*run itself; leave out --out, --overwrite and --go-on"
    calls = {
        ("amdim", saved, "--out", str(tmp_path / "other")): other,
        ("amdim", saved, "--overwrite"): other,
        ("amdim", str(tmp_path / "nothing")): r"holds no config\.yaml",
        ("simsiam", saved): "method: must be one of amdim",
    }
    run = {(lambda x=x: command.parse(x[0], ["--resume", *x[1:]])): words for x, words in calls.items()}
    assert unlike([(call, ValueError, words) for call, words in run.items()]) == []
    assert not (tmp_path / "nothing").exists()


BAD = [
    ("data", "", "'digits', a folder or shards"),
    ("seed", -1, "in [0, 4294967295]"),
    ("seed", 2**32, "in [0, 4294967295]"),
    ("shuffle_buffer", 0, "null or at least 1"),
    ("model.image_size", 33, "one of 32, 64, 128"),
    ("model.ndf", 0, "at least 1"),
    ("model.n_rkhs", -1, "at least 1"),
    ("model.n_depth", 0, "at least 1"),
    ("model.mixture", 0, "at least 1"),
    ("loss.pairs", ["5>1x"], "different pairs A>C"),
    ("loss.pairs", ["1>3"], "different pairs A>C"),
    ("loss.pairs", ["1>5", "1>5"], "different pairs A>C"),
    ("loss.pairs", ["1-5"], "different pairs A>C"),
    ("loss.pairs", [], "different pairs A>C"),
    ("loss.scale", 0, "null or above 0"),
    ("loss.clip", -1, "null or above 0"),
    ("loss.clip", INF, "null or above 0"),
    ("loss.penalty", NAN, "at least 0"),
    ("loss.penalty", -0.1, "at least 0"),
    ("loss.tau", 0, "above 0"),
    ("loss.backend", "fast", "null or one of cpu"),
    ("augment.flip_p", 1.5, "in [0, 1]"),
    ("augment.geometry_p", -0.1, "in [0, 1]"),
    ("augment.translate_px", -1, "at least 0"),
    ("augment.translate_px", 32, "below the image's 32 px"),
    ("augment.degrees", NAN, "in [0, 180]"),
    ("augment.shift", 1.1, "in [0, 1]"),
    ("augment.zoom", [1.1, 0.9], "smallest <= largest, each above 0"),
    ("augment.zoom", [0.0, 1.0], "smallest <= largest, each above 0"),
    ("augment.shear_degrees", 90, "in [0, 90)"),
    ("augment.crop_area", [0.3, 1.1], "smallest <= largest, each in (0, 1]"),
    ("augment.crop_ratio", [0.7, INF], "smallest <= largest, each above 0"),
    ("augment.jitter", [0.4, 0.4, 0.4, 0.6], "hue in [0, 0.5]"),
    ("augment.jitter", [-0.4, 0.4, 0.4, 0.1], "hue in [0, 0.5]"),
    ("augment.jitter_p", NAN, "in [0, 1]"),
    ("augment.gray_p", 2, "in [0, 1]"),
    ("augment.blur_p", 1.1, "in [0, 1]"),
    ("augment.blur_sigma", [0.0, 2.0], "smallest <= largest, each above 0"),
    ("augment.mean", [0.5, 0.5, 125.3], "each in [0, 1]"),
    ("augment.std", [0.2, 0.0, 0.2], "each above 0"),
    ("augment.stages", [(3, 16), (1, 24)], "(epoch, px) pairs, rising epochs from 1 on and at least 8 px"),
    ("augment.stages", [(1, 4)], "at least 8 px"),
    ("optim.epochs", -1, "at least 1"),
    ("optim.batch_size", 1, "at least 2 (the negatives are the other images)"),
    ("optim.accumulate", 0, "at least 1"),
    ("optim.lr", 0, "above 0"),
    ("optim.lr", INF, "above 0"),
    ("optim.betas", [0.8, 1.0], "each in [0, 1)"),
    ("optim.eps", 0, "above 0"),
    ("optim.momentum", 1.0, "in [0, 1)"),
    ("optim.trust", 0, "above 0"),
    ("optim.weight_decay", -1e-5, "at least 0"),
    ("optim.warmup_updates", -1, "at least 0"),
    ("optim.milestones", [280, 250], "rising epochs from 1 on"),
    ("optim.milestones", [0], "rising epochs from 1 on"),
    ("optim.gamma", 0, "in (0, 1]"),
    ("scale.negatives", 1, "null or at least 2"),
    ("run.max_steps", 0, "null or at least 1"),
    ("run.max_minutes", NAN, "null or above 0"),
    ("run.log_every", 0, "at least 1"),
    ("run.save_minutes", -1, "at least 0"),
    ("run.timeout_minutes", 0, "above 0"),
    ("run.keep", 1, "at least 2 (a damaged checkpoint needs one before it)"),
    ("run.workers", -1, "at least 0"),
    ("run.memory_limit_mb", 0, "at least 1"),
    ("run.wandb", "", "null or the name of a project"),
    ("run.threads", 0, "auto or a whole number in [1, 1024]"),
]


def test_every_rule_is_tried():
    assert {key for key, _, _ in BAD} == RULES


def test_a_bad_setting_is_named_with_what_it_must_be_and_what_it_is():
    assert ill_refused("amdim", BAD) == []


def test_a_choice_outside_its_type_is_refused():
    with pytest.raises(ValueError, match=r"augment\.geometry: must be one of translate, affine, crop, none, got warp"):
        AMDIMConfig(augment=AugmentConfig(geometry="warp")).check()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"augment\.zoom: must be smallest <= largest, each above 0, got \[0.0, 1.0\]"):
        augment.Views(AugmentConfig(zoom=(0.0, 1.0)), 32)


@pytest.mark.parametrize(("image_size", "width"), [(32, 512), (64, 1024), (128, 1024)])
def test_embeddings_narrower_than_the_trunk_are_refused(image_size, width):
    AMDIMConfig(model=ModelConfig(image_size=image_size, n_rkhs=width)).check()
    with pytest.raises(ValueError, match=rf"model\.n_rkhs: must be at least {width} .* got {width - 1}"):
        AMDIMConfig(model=ModelConfig(image_size=image_size, n_rkhs=width - 1)).check()


def test_no_clip_is_legal(tmp_path):
    assert parse(tmp_path, "--loss.clip", "null").loss.clip is None
    assert config.load(tmp_path / "run").loss.clip is None


def test_a_refused_setting_leaves_no_folder(tmp_path):
    for argv in (["--batch-size", "1"], ["--preset", "cifar"]):
        with pytest.raises(ValueError, match="must be"):
            parse(tmp_path, *argv)
        assert not (tmp_path / "run").exists()


def test_cli_errors_are_one_line_and_status_2(tmp_path, capsys):
    assert cli.main(["train", "amdim", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-nce: data: ")
    assert error.count("\n") == 1
    assert cli.main(["train", "simsiam"]) == 2
    assert cli.main(["tarin"]) == 2
    assert f"command: must be one of {', '.join(cli.COMMANDS)}, got 'tarin'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("train amdim --optim.epochss 3", "--optim.epochss: no such option; did you mean --optim.epochs?"),
        ("train amdim --epoch 3", "--epoch: no such option; did you mean --optim.epochs?"),
        ("train amdim --zzzz", "--zzzz: no such option; --help lists them"),
        ("train amdim --lr abc", "optim.lr: must be a number, got abc"),
        ("train amdim --loss.clip abc", "loss.clip: must be a number or null, got abc"),
        ("train amdim --lr", "argument --optim.lr: expected one argument"),
        ("train amdim --augment.geometry warp", GEOMETRY),
        ("train amdim digits", "digits: no such option; data are named by --data digits"),
        ("train amdim --device cuda", f"--device: no such option; {command.DEVICE}"),
        ("train amdim --run.gpus=2", f"--run.gpus: no such option; {command.DEVICE}"),
        ("eval RUN --device cuda", "--device: no such option; this command runs on the CPU"),
        ("eval RUN other", "other: no such option; every option begins with --"),
        ("train amdim --augment.zoom [1]", "augment.zoom: Expected a tuple with 2 elements. Got value: [1]"),
        ("eval", "the following arguments are required: run; usage: fused-nce eval RUN [options]"),
        ("train amdim --allow-changed optim.lrr", "--allow-changed: optim.lrr is no setting; did you mean optim.lr?"),
        ("eval RUN --drawss 3", "--drawss: no such option; did you mean --draws?"),
    ],
)  # fmt: skip
def test_a_slip_on_the_command_line_is_one_line(argv, line, capsys):
    assert cli.main(argv.split()) == 2
    assert capsys.readouterr().err == f"fused-nce: {line}\n"


def test_ctrl_c_outside_the_loop_is_one_line_and_leaves_no_run(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fused_nce.train.data.loader.load_split", interrupted)
    assert cli.main(["train", "amdim", "--preset", "digits", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "fused-nce: interrupted\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv", ["--version", "doctor", "bench --help", "eval --help"])
def test_output_that_nobody_reads_ends_a_command_without_a_word(argv, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(argv.split()) == cli.UNREAD
    assert capsys.readouterr().err == ""


def test_output_that_was_closed_before_the_start_is_none(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["--version"]) == 0


def test_a_broken_pipe_that_is_not_the_outputs_is_an_error(capsys, monkeypatch):
    def broken(argv):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "doctor", broken)
    assert cli.main(["doctor"]) == cli.USERS
    assert capsys.readouterr().err == "fused-nce: [Errno 32] Broken pipe\n"


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


def test_the_committed_settings_of_a_run_before_methods_had_names_still_load():
    saved = yaml.safe_load((DOCS / "results" / "cifar10-tiny.config.yaml").read_text())
    settings = config.from_dict(saved)
    assert settings.method == "amdim"
    assert {k: v for k, v in config.flatten(config.to_dict(settings)).items() if k in config.flatten(saved)} == (
        config.flatten(saved)
    )
    assert (settings.augment.flip_shared, settings.augment.blur_p, settings.optim.name) == (True, 0.0, "adam")


def test_a_mixture_needs_a_pair_from_f1():
    settings = AMDIMConfig(model=ModelConfig(mixture=2))
    settings.check()
    settings.loss.pairs = ("5>5",)
    with pytest.raises(ValueError, match=r"^model\.mixture: must be 1 without a pair from map 1 in .*, got 2$"):
        settings.check()
