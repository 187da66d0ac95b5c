"""Every method in the one loop: exact resume, learning, what it refuses, and the command line end to end."""

import dataclasses
import json
import pathlib
import re

import pytest
import torch

from fused_nce import cli
from fused_nce.train import command, config, limits, methods, words
from fused_nce.train.loop import Trainer
from fused_nce.train.saving import checkpoint
from tests.marks import nightly_but
from tests.train.runs import assert_the_same, differing, ill_refused, log, moved, own_rules, resumed, tensors

NAN = float("nan")
OTHERS = [name for name in methods.METHODS if name != "amdim"]  # which has files of its own
IMAGES = [name for name in OTHERS if name not in ("cpc", "distil")]  # which have files of their own, too
PROJECTED = ("moco", "simclr", "supcon", "npid")
TINY = ["--preset=digits", "--batch-size=8", "--run.log_every=4", "--precision=fp32"]
PRESETS = [(name, preset) for name in methods.METHODS for preset in methods.get(name).presets]
# The first of each method.
QUICK = list({name: (name, preset) for name, preset in reversed(PRESETS)}.values())


def trainer(name, out, *argv):
    return Trainer(*command.parse(name, [*TINY, "--out", str(out), *argv])[:2])


# --- settings -----------------------------------------------------------------------------------------------------


def test_every_preset_is_made_of_settings_that_pass():
    for name in methods.METHODS:
        for preset, values in methods.get(name).presets.items():
            found = config.flatten(config.to_dict(config.from_dict({"method": name, **values})))
            wrong = {key: found.get(key) for key, value in config.flatten(values).items() if found.get(key) != value}
            assert not wrong, f"{name} {preset}"


@pytest.mark.parametrize(("name", "preset"), nightly_but(QUICK, PRESETS))
def test_every_preset_parses_builds_and_survives_the_disk(tmp_path, name, preset):
    settings = command.parse(name, ["--preset", preset, "--out", str(tmp_path / "run")])[0]
    assert config.load(tmp_path / "run") == settings
    assert (settings.method, config.to_dict(settings)["method"]) == (name, name)
    wanted, flat = config.flatten(methods.get(name).presets[preset]), config.flatten(config.to_dict(settings))
    assert {key: flat[key] for key in wanted} == wanted
    default = config.flatten(config.to_dict(methods.get(name)()))
    assert [key for key in flat if flat[key] != default[key] and key not in wanted and key != "preset"] == []
    with torch.device("meta"):
        settings.build(images=9)


@pytest.mark.parametrize("name", methods.METHODS)
def test_bytes_are_no_images(name):
    """One line that says what is, not a convolution's own; for recordings of integers too."""
    settings = methods.get(name)()
    with torch.device("meta"):
        model, x = settings.build(images=9), settings.sample()
    for integers in (x.to(torch.uint8), x.to(torch.int16)):
        with pytest.raises(TypeError, match=rf"^x: must be float (images, less|wave).*, got {integers.dtype}$"):
            model.encode(integers)
        if name == "dim-generator":  # which draws like its images before it encodes any
            with pytest.raises(TypeError, match=r"^x: must be float images, less"):
                model.embed(integers.expand(2, -1, -1, -1))


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_number_has_a_rule_and_every_rule_a_setting(name):
    settings = methods.get(name)()
    flat = config.flatten(dataclasses.asdict(settings))
    chosen = {key for key, value in flat.items() if isinstance(value, bool | str) or key == "channels_last"}
    assert set(flat) - chosen <= set(limits.rules(settings)) <= set(flat)


PROJECTION = [
    ("model.image_size", 7, "at least 8"),
    ("model.backbone", "", "the name of an encoder"),
    ("model.dim", 0, "at least 1"),
    ("model.layers", 0, "at least 1"),
    ("model.hidden", 0, "null or at least 1"),
    ("loss.temperature", NAN, "above 0"),
    ("loss.backend", "fast", "null or one of"),
]
CODE = [
    ("model.architecture", "dcgan", "one of dcgan32"),
    ("model.width", 0.0, "above 0"),
    ("model.code", 0, "at least 1"),
]
EIGHTS = ("model.decoder", 12, "a multiple of 8")
GAME = [("loss.gradient_penalty", -1.0, "at least 0"), ("loss.game", "go", "one of minimax, non-saturating")]
BAD = {
    "moco": [
        *PROJECTION,
        ("model.queue_size", 0, "at least 1"),
        ("model.momentum", 1.1, "in [0, 1]"),
        ("model.splits", 0, "at least 1"),
        ("model.splits", 5, "divide optim.batch_size 256"),
    ],
    "npid": [
        *PROJECTION,
        ("model.momentum", 1.0, "in [0, 1)"),
        ("loss.proximal", -0.1, "at least 0"),
        ("loss.noise", 0, "at least 1"),
    ],
    "simclr": PROJECTION,
    "supcon": [*PROJECTION, ("loss.variant", "both", "one of out, in")],
    "dim": [
        *CODE,
        ("loss.mi_units", 0, "at least 1"),
        ("loss.critic_negatives", 0, "null or at least 1"),
        ("loss.alpha", -1.0, "at least 0"),
        ("loss.beta", -1.0, "at least 0"),
        ("loss.gamma", -1.0, "at least 0"),
        ("loss.gradient_penalty", -1.0, "at least 0"),
        ("loss.absolute", -1.0, "at least 0"),
        ("loss.relative", -1.0, "at least 0"),
        ("loss.occlusion", 1.0, "in [0, 1)"),
        ("loss.estimator", "mine", "one of jsd, dv, nce"),
    ],
    "vae": [*CODE, EIGHTS, ("loss.beta", -1.0, "at least 0")],
    "aae": [*CODE, EIGHTS, *GAME, ("loss.gamma", -1.0, "at least 0")],
    "bigan": [*CODE, EIGHTS, *GAME],
    "dim-generator": [*CODE, EIGHTS, *GAME, ("loss.apart", 0.0, "above 0")],
    "nat": [*CODE, ("loss.every", 0, "at least 1")],
    "cpc": [
        ("loss.negatives", "all", "one of batch, sequence, sampled"),
        ("loss.sampled", 0, "at least 1"),
        ("loss.backend", "fast", "null or one of"),
        ("model.channels", 0, "at least 1"),
        ("model.kernels", (), "at least one layer"),
        ("model.strides", (5, 0), "each at least 1"),
        ("model.paddings", (-1,), "at least 0"),
        ("model.hidden", 0, "at least 1"),
        ("model.steps", 0, "at least 1"),
        ("augment.window", 0, "at least 1"),
        ("augment.level", 0.0, "null or above 0"),
        ("augment.label", "", "the name of a label"),
    ],
    "cpc-vision": [
        ("loss.sampled", 0, "at least 1"),
        ("loss.backend", "fast", "null or one of"),
        ("model.image_size", 0, "at least 1"),
        ("model.patch_size", 0, "at least 1"),
        ("model.width", 0, "at least 1"),
        ("model.stages", (1, 1), "three numbers"),
        ("model.jitter", -1, "at least 0"),
        ("model.hidden", 0, "null or at least 1"),
        ("model.layers", 0, "at least 1"),
        ("model.steps", 0, "at least 1"),
        ("model.skip", -1, "at least 0"),
    ],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_is_named_with_what_it_must_be_and_what_it_is(name):
    """Every rule is tried."""
    assert own_rules(name) <= {key for key, _, _ in BAD[name]}
    assert ill_refused(name, BAD[name]) == []


APART = [
    ("dim", ["--loss.alpha=0", "--loss.beta=0"], "no information to maximise"),
    ("dim", ["--loss.estimator=jsd", "--loss.anchor=local"], "anchor: got 'local' with estimator='jsd'"),
    (
        "dim", ["--loss.critic=concat", "--model.architecture=crops-resnet19-32-several"],
        "need 'dot' for several globals",
    ),
    ("vae", ["--augment.mean=[0.3,0.3,0.3]"], r"augment.mean: must be 0.5 x 3 for VAE, whose .* in \[-1, 1\]"),
    ("bigan", ["--augment.std=[1,1,1]"], "augment.std: must be 0.5 x 3 for BiGAN"),
    ("dim-generator", ["--run.shard=fsdp2"], "run.shard: must be none for DIM's generator, got fsdp2"),
    (
        "dim-generator", ["--checkpoint-activations=true"],
        "scale.checkpoint_activations: must be false for DIM's generator, got true",
    ),
    ("cpc-vision", ["--preset=digits", "--model.patch_size=6"], "patch_size: must be"),
    ("cpc-vision", ["--preset=digits", "--model.steps=6"], "steps: must be below the grid's 7 rows .* = 1, got 6"),
    ("cpc-vision", ["--preset=digits", "--model.jitter=4"], r"jitter: must be in \[0, 4 px\), got 4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argv", "message"), APART)
def test_settings_that_do_not_fit_each_other_are_refused_before_any_work(tmp_path, name, argv, message):
    with pytest.raises(ValueError, match=message):
        command.parse(name, [*argv, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_docs_list_every_method_and_preset(name):
    lines = (pathlib.Path(__file__).parents[2] / "docs" / "methods.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| `{name}` |")]
    assert len(rows) == 2
    assert set(re.findall(r"`([\w-]+)`", rows[1])) == {name, *methods.get(name).presets}


def test_a_preset_says_where_its_rate_is_for_other_images_an_update():
    """SimCLR's on ImageNet is of eight processes."""
    simclr = methods.get("simclr")()
    said = words.other_batch(simclr, 512)
    assert said.startswith("optim.lr 4.8 of preset default is for 4,096 images an update; this run has 512 (")
    assert said.endswith(", for which 0.6 is in proportion")
    own_rate = dataclasses.replace(simclr, optim=dataclasses.replace(simclr.optim, lr=0.6))
    assert words.other_batch(simclr, 4096) == words.other_batch(own_rate, 512) == ""
    amdim = methods.get("amdim")()  # whose rate is Adam's
    assert words.other_batch(dataclasses.replace(amdim, optim=dataclasses.replace(amdim.optim, name="sgd")), 9) == ""
    assert words.other_batch(methods.get("moco")(), 256) == words.other_batch(methods.get("amdim")(), 9) == ""
    assert all(set(each.processes) <= set(each.presets) for each in map(methods.get, methods.METHODS))


def test_npids_published_run_on_imagenet_samples_its_noise(tmp_path):
    loss = command.parse("npid", [f"--out={tmp_path / 'a'}"])[0].loss
    assert (loss.loss, loss.noise, loss.temperature) == ("nce", 4096, 0.07)


def test_supcontrast_divides_its_loss_by_a_temperature_that_its_rates_make_up_for():
    for name, preset in (("simclr", "cifar10-supcontrast"), ("supcon", "default")):
        found = config.flatten(config.to_dict(methods.get(name)())) | config.flatten(methods.get(name).presets[preset])
        factor = found["loss.temperature"] / 0.07
        assert found["optim.lr"] / factor == pytest.approx(0.5)
        assert found["optim.weight_decay"] * factor == pytest.approx(1e-4)


# --- the loop -----------------------------------------------------------------------------------------------------

EXTRA = {
    "moco": ["--model.splits=2", "--model.queue_size=20"],
    "npid": ["--loss.proximal=0.1", "--loss.loss=nce", "--loss.noise=7"],
}


WAYS = [
    *((name, EXTRA.get(name, [])) for name in IMAGES),
    ("moco", ["--model.layers=1", "--model.splits=2", "--model.queue_size=20", "--optim.name=sgd"]),  # v1
    ("simclr", ["--model.layers=3"]),  # v2's head
    ("npid", []),  # the exact softmax
    ("dim", ["--loss.estimator=jsd", "--loss.occlusion=0.5", "--loss.absolute=1", "--loss.relative=1"]),
    ("dim", ["--loss.estimator=dv", "--loss.critic=concat", "--loss.alpha=1"]),
]


@pytest.mark.parametrize(("name", "extra"), nightly_but(WAYS[:1], WAYS))
def test_resume_is_exact(tmp_path, name, extra):
    """Weights, moments, queue, bank, momentum encoder, classifiers and log, bit by bit."""
    assert trainer(name, tmp_path / "a", "--max-steps=5", *extra).run() == "finished"
    trainer(name, tmp_path / "b", "--max-steps=2", *extra).run()
    torch.manual_seed(999)  # nothing may depend on the state of the new process
    resumed(tmp_path / "b", "--max-steps=5", method=name).run()
    assert_the_same(tmp_path / "b", tmp_path / "a", 5)
    early, late = (tensors(tmp_path / "b", step) for step in (2, 5))
    memory = {"moco": "queue.keys", "npid": "bank.vectors", "nat": "targets.vectors"}.get(name)
    assert memory is None or not torch.equal(early[f"model/{memory}"], late[f"model/{memory}"])


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "muon"])
def test_resume_is_exact_for_every_optimizer(tmp_path, optimizer):
    extra = [f"--optim.name={optimizer}", "--optim.decay_all=false", "--optim.accumulate=2"]
    trainer("moco", tmp_path / "a", "--max-steps=4", *extra).run()
    trainer("moco", tmp_path / "b", "--max-steps=2", *extra).run()
    resumed(tmp_path / "b", "--max-steps=4", method="moco").run()
    assert_the_same(tmp_path / "b", tmp_path / "a", 4)
    assert any("momentum_buffer" in key for key in tensors(tmp_path / "a", 4))


def test_another_optimizer_begins_without_the_moments_of_the_one_before(tmp_path, monkeypatch, caplog):
    trainer("moco", tmp_path / "a", "--max-steps=1", "--optim.name=sgd").run()
    words = ["--allow-changed", "optim.name", "optim.decay_all", "--optim.decay_all=false", "--optim.name"]
    saved = checkpoint.load_state
    for older in (False, True):  # a checkpoint that does not say which optimizer it had
        if older:
            monkeypatch.setattr(checkpoint, "load_state", lambda path: {**saved(path), "optimizer": None})
        run = resumed(tmp_path / "a", "--max-steps=2", *words, "adam", method="moco")
        assert "optim.name sgd -> adam, optim.decay_all True -> False: what the optimizer" in caplog.text
        assert run.optimizers["optimizer"].state == {}
        caplog.clear()
    monkeypatch.undo()
    run.run()
    assert resumed(tmp_path / "a", "--max-steps=3", *words, "adam", method="moco").optimizers["optimizer"].state
    assert "begins anew" not in caplog.text


@pytest.mark.parametrize("name", ["moco", "npid"])
def test_an_update_that_is_skipped_leaves_memory_and_keys_alone(tmp_path, name):
    run = trainer(name, tmp_path / "a", "--max-steps=1")
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    real = run.views
    run.views = lambda images: tuple(view * float("nan") for view in real(images))
    run._update(run.loader.batches(0), False)
    assert run.skipped == 1
    assert differing(run.model.state_dict(), before) == []
    run.views = real
    run._update(run.loader.batches(0), False)
    assert moved(run.model, before) == {"encoder", "head"} | ({"key_encoder", "queue"} if name == "moco" else {"bank"})


@pytest.mark.parametrize("name", nightly_but(("npid", "moco"), PROJECTED))
def test_a_method_learns_the_digits(tmp_path, name):
    extra = ["--model.queue_size=64", "--model.momentum=0.9"] if name == "moco" else []
    run = trainer(name, tmp_path / "a", "--batch-size=64", "--max-steps=32", "--optim.warmup_updates=5", *extra)
    run.run()
    lines = log(tmp_path / "a")
    start = lines[2 if name == "moco" else 0]  # MoCo's queue is random at first, and easily told from keys
    assert lines[-1]["loss"] < start["loss"] - 0.2


def test_supcon_needs_a_label_for_every_image(tmp_path, monkeypatch):
    from fused_nce.train.data import loader

    real = loader.load_split

    def some(*args, **options):
        found = real(*args, **options)
        return dataclasses.replace(found, labels=found.labels.where(torch.arange(len(found.labels)) > 2, -1))

    monkeypatch.setattr(loader, "load_split", some)
    with pytest.raises(ValueError, match=r"data: 3 of \d+ images have no label; supcon needs one for each"):
        trainer("supcon", tmp_path / "a")


# --- the command line ---------------------------------------------------------------------------------------------


def test_train_resume_and_evaluate_from_the_command_line(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert cli.main(["train", "moco", *TINY, "--max-steps=4", "--out", out]) == 0
    assert "MoCo on digits (digits): image_size 16, backbone mini" in capsys.readouterr().out
    assert cli.main(["train", "simclr", "--resume", out]) == 2
    assert "is a run of moco; got method simclr, need the same" in capsys.readouterr().err
    assert cli.main(["train", "moco", "--resume", out, "--max-steps=6"]) == 0
    assert checkpoint.newest(tmp_path / "run").name == "step_00000006"
    assert cli.main(["eval", out, "--draws=2", "--baselines=false"]) == 0
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (result["method"], result["taps"], result["loss_cost"]) == ("moco", ["h", "z"], None)
    assert {row["tap"]: row["width"] for row in result["probes"]} == {"h": 128, "z": 64}
    assert "Online probes on detached h" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("name", nightly_but(("npid", "moco"), IMAGES))
def test_a_run_loads_without_its_data(tmp_path, name):
    """A bank has as many rows as the training set; how many, the checkpoint says."""
    run = trainer(name, tmp_path / "run", "--max-steps=1")
    run.run()
    model, settings = checkpoint.load_model(tmp_path / "run")
    assert differing(model.state_dict(), run.model.state_dict()) == []
    taps = model.encode(settings.sample())
    assert set(settings.taps) <= set(taps)


def test_untrained_encoders_are_the_runs_own_architecture():
    settings = methods.get("moco")()
    assert list(settings.untrained()) == ["random, zero-branch init", "random, Kaiming init"]
    inits = [other.model.init for other in settings.untrained().values()]
    assert inits == ["zero", "kaiming"]
    settings.model.backbone = "vgg11"
    assert list(settings.untrained()) == ["random"]
