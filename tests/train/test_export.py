"""`fused-nce export`: the encoder alone, which gives the run's features wherever it is loaded."""

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fused_nce import cli
from fused_nce.models.frozen import FrozenEncoder
from fused_nce.train import command, config, export, methods
from fused_nce.train.report import model_card
from fused_nce.train.saving import checkpoint
from tests.marks import nightly_but

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
RESNET = ["--model.backbone=resnet18", "--model.image_size=32"]


def make_run(folder, method="simclr", *argv):
    """A run as the trainer leaves it, without the training; its norms' statistics are not those of a new model."""
    presets = list(methods.get(method).presets)  # the smallest that there is
    preset = "digits" if "digits" in presets else presets[-1]
    settings, run, _ = command.parse(method, ["--preset", preset, "--out", str(folder), *argv])
    torch.manual_seed(0)
    model = settings.build(images=7)
    shape = (8, *settings.sample().shape[1:])
    model.train().encode(torch.randn(shape) + 1)
    state = {"step": 2, "images": 7, "time_s": 90.0, "environment": {"processes": 1, "device": "CPU", "commit": "abc"}}
    checkpoint.save(run, 2, {"model": model.state_dict()}, state, keep=2)
    return run


def features(run, images=None):
    model, settings = checkpoint.load_model(run)
    if images is None:
        images = torch.randn((3, *settings.sample().shape[1:]), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.encode(images), images


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    run = make_run(folder / "run", "simclr", *RESNET)
    export.export(str(run), str(folder / "out"), onnx=False)
    return run, folder / "out"


@pytest.mark.parametrize("method", nightly_but(("amdim", "distil", "cpc"), methods.METHODS))
def test_the_exported_encoder_gives_the_runs_features(tmp_path, method):
    run = make_run(tmp_path / "run", method)
    export.export(str(run), str(tmp_path / "out"), onnx=False)
    wanted, images = features(run)
    encoder = export.load_encoder(tmp_path / "out")
    found = encoder(images)
    kept = [name for name in wanted if name not in encoder.model.head_taps]
    assert kept
    assert list(found) == kept
    for name in kept:
        torch.testing.assert_close(found[name], wanted[name])  # a GRU of frozen weights may sum in another order
    whole = checkpoint.load_model(run)[0].state_dict()
    exported = load_file(tmp_path / "out" / "model.safetensors")
    prefixes = tuple(f"{name}." for name in encoder.model.encoders)
    assert sum(v.numel() for v in exported.values()) == sum(
        v.numel() for k, v in whole.items() if k.startswith(prefixes)
    )


def test_torchvision_loads_the_weights_by_its_own_names(resnet):
    from torchvision.models import get_model

    run, out = resnet
    model = get_model("resnet18")
    keys = model.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    assert keys.unexpected_keys == []
    assert set(keys.missing_keys) == {"fc.weight", "fc.bias"}
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(out))
    names = {"x": IMAGES}
    with torch.inference_mode():
        exec(code, names)
        assert torch.equal(names["features"], features(run, IMAGES)[0]["h"])


def test_the_cards_code_takes_off_a_classifier_wherever_it_is():
    for backbone, place in (("vgg11", "model.classifier[6]"), ("vit_b_16", "model.heads.head")):
        settings = config.from_dict({"method": "simclr", "model": {"backbone": backbone}})
        assert f"{place} = torch.nn.Identity()" in model_card._code(settings)


def test_timm_resizes_as_the_evaluation_does(monkeypatch):
    for side, resize in ((224, 256), (32, 32), (8, 93), (128, 146)):
        assert math.floor(side / export.crop_share(side, resize)) == resize  # timm's own rule
    monkeypatch.setattr(export, "timm_layers", lambda name: {})
    settings = config.from_dict(
        {"method": "simclr", "model": {"backbone": "timm/resnet18", "image_size": 224}, "augment": {"geometry": "crop"}}
    )
    known = export.describe(settings, {})["pretrained_cfg"]
    assert (known["crop_pct"], known["interpolation"]) == (224 / 256, "bicubic")


def test_timm_loads_the_folder(tmp_path):
    timm = pytest.importorskip("timm")
    run = make_run(tmp_path / "run", "simclr", "--model.backbone=timm/resnet18", "--model.image_size=32")
    export.export(str(run), str(tmp_path / "out"), onnx=False)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(IMAGES), features(run, IMAGES)[0]["h"])
        for changed, shape in (({"num_classes": 7}, (3, 7)), ({"in_chans": 1, "num_classes": 0}, (3, 512))):
            other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, **changed).eval()
            assert other(IMAGES[:, : changed.get("in_chans", 3)]).shape == shape
            assert torch.equal(other.layer4[1].conv2.weight, model.layer4[1].conv2.weight)


def test_the_head_of_a_frozen_encoder_is_gone(resnet):
    model, _ = checkpoint.load_model(resnet[0])
    encoder = FrozenEncoder(model)
    assert not any(key.startswith(("head", "loss")) for key in encoder.model.state_dict())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training


@pytest.mark.parametrize(("method", "argv"), [("amdim", []), ("simclr", RESNET), ("cpc", [])])
def test_onnx_gives_the_same_features_for_any_batch(tmp_path, method, argv):
    for package in (*export.ONNX_NEEDS, "onnxruntime"):
        pytest.importorskip(package)
    run = make_run(tmp_path / "run", method, *argv)
    facts = export.export(str(run), str(tmp_path / "out"), onnx=True)
    assert "differs from torch by at most" in facts["onnx"]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == list(facts["taps"])
    wanted, images = features(run)
    for name, found in zip(facts["taps"], session.run(None, {"x": images.numpy()}), strict=True):
        scale = float(wanted[name].abs().max())
        assert float((torch.from_numpy(found) - wanted[name]).abs().max()) <= export.ONNX_TOLERANCE * scale


@pytest.mark.parametrize(
    ("method", "changed"),
    nightly_but(
        (("cpc", {}), ("cpc-vision", {"context": "gru"})),
        [*((method, {}) for method in methods.METHODS), ("cpc-vision", {"context": "gru"})],
    ),
)
def test_an_exported_graph_takes_any_batch(method, changed):
    presets = methods.get(method).presets
    preset = presets["digits" if "digits" in presets else list(presets)[-1]]
    settings = config.from_dict({"method": method, **preset, "model": {**preset["model"], **changed}})
    module = export._Tuple(FrozenEncoder(settings.build(images=7))).eval()
    shape = settings.sample().shape[1:]
    free = ({0: torch.export.Dim("batch")},)
    graph = torch.export.export(module, (torch.zeros(2, *shape),), dynamic_shapes=free).module()
    other = torch.randn((3, *shape), generator=torch.Generator().manual_seed(1))
    for wanted, found in zip(module(other), graph(other), strict=True):
        torch.testing.assert_close(found, wanted)


def test_an_onnx_file_that_fails_withholds_no_weights(resnet, tmp_path, monkeypatch, capsys):
    def fail(encoder, batch, taps, path):
        path.write_text("half")
        raise TypeError("no operator\nfor this")

    monkeypatch.setattr(export, "write_onnx", fail)
    monkeypatch.setattr(export, "ONNX_NEEDS", ())
    assert cli.main(["export", str(resnet[0]), "--out", str(tmp_path / "a")]) == 0
    assert "onnx: not written: TypeError: no operator for this\n" in capsys.readouterr().out
    assert "`model.onnx`: not written: TypeError" in (tmp_path / "a" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    with pytest.raises(TypeError, match="no operator"):
        export.export(str(resnet[0]), str(tmp_path / "b"), onnx=True)
    assert not (tmp_path / "b").exists()


def test_onnx_without_its_packages_is_one_line(resnet, tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in export.ONNX_NEEDS else real(name))
    assert cli.main(["export", str(resnet[0]), "--out", str(tmp_path / "a"), "--onnx", "true"]) == 2
    assert capsys.readouterr().err == f"fused-nce: onnx: needs onnx and onnxscript: {export.ONNX_ADD}\n"
    assert cli.main(["export", str(resnet[0]), "--out", str(tmp_path / "a")]) == 0
    assert f"onnx: not written: needs onnx and onnxscript: {export.ONNX_ADD}\n" in capsys.readouterr().out
    assert not (tmp_path / "a" / "model.onnx").exists()
    assert "not written: needs onnx and onnxscript" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("mask", [0o002, 0o027])
def test_every_file_has_the_mode_that_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        export.export(str(make_run(tmp_path / "run")), str(tmp_path / "out"), onnx=False)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
    assert len([path for path in files if path.suffix == ".safetensors"]) == 2
    # All weights are written by one function, the fine-tuned ones too.
    sources = Path(cli.__file__).parent.rglob("*.py")
    assert [path.stem for path in sources if "save_file(" in path.read_text("utf-8")] == ["checkpoint"]


def test_weights_that_cannot_be_written_leave_nothing(tmp_path, monkeypatch):
    def full(values, path, facts):
        raise checkpoint.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    (tmp_path / "a").write_text("as it was")
    for name in ("a", "b"):
        with pytest.raises(OSError, match=f"^{name}: No space left on device$"):
            checkpoint.write_tensors({}, tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "as it was")]


def test_the_card_says_where_the_weights_come_from(resnet):
    _, out = resnet
    card = (out / "README.md").read_text()
    for fact in (
        "| data | digits, 7 images |",
        "| updates | 2 of 128 images |",
        "| commit | abc |",
        "| device | CPU |",
    ):
        assert fact in card
    assert 'get_model("resnet18")' in card
    assert "None yet: `fused-nce eval RUN`" in card
    assert "backbone: resnet18" in card


def test_the_card_has_the_images_of_an_update_whoever_went_on_with_the_run(resnet):
    state, settings = checkpoint.load_state(checkpoint.newest(resnet[0])), config.load(resnet[0])
    shared = {"batch": {"asked": 128, "all": 256}, "environment": {"processes": 1}}  # of two, and one goes on
    settings.optim.accumulate = 2
    assert "| updates | 2 of 512 images |" in model_card._training(resnet[0], settings, state | shared)
    assert "| updates | 2 of 256 images |" in model_card._training(resnet[0], settings, state)


def test_the_card_has_the_evaluation(tmp_path):
    run = make_run(tmp_path / "run", "simclr", *RESNET)
    row = {"encoder": "trained", "tap": "h", "probe": "linear", "labels": "all", "accuracy_pct": 71.26, "sd_pct": None}
    found = {"taps": ["h"], "data_name": "digits", "training": {"steps": 9}, "protocol": ["Fair."], "probes": [row]}
    (run / "eval.json").write_text(json.dumps(found))
    export.export(str(run), str(tmp_path / "out"), onnx=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| trained | h | linear | all | 71.3 |" in card
    assert "value: 71.26" in card.split("---")[1]
    assert "Of the run after 9 updates; these weights are of 2." in card


def test_the_card_has_measures_that_are_no_accuracy_and_no_table_without_rows(tmp_path):
    row = {"encoder": "trained", "tap": "h", "probe": "ndm", "labels": "units", "value": 0.25, "unit": "nats"}
    found = {"taps": ["h"], "probes": [], "measures": [row], "training": {"steps": 2}, "protocol": ["Fair."]}
    words = model_card._evaluation(found, 2)
    assert words == "||NDM, units|\n|---|---|\n|h  trained|0.25 nats|\n\n- Fair.\n"


@pytest.mark.parametrize(("level", "words"), [(0.063, "0.063"), (None, "its own root mean square")])
def test_the_card_says_what_recordings_the_input_is(level, words):
    settings = config.from_dict({"method": "cpc", "augment": {"level": level}})
    facts = export.describe(settings, {}, 16000)
    assert facts["input"] == {"shape": [20480], "rate_hz": 16000, "level": level}
    assert f"Mono at 16,000 Hz; samples as shares of full scale, each recording divided by {words}." in (
        model_card._use(settings, facts)
    )


def test_the_folder_may_be_the_one_that_the_command_is_given_in(resnet, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export.export(str(resnet[0]), ".", onnx=False)
    assert sorted(os.listdir()) == ["README.md", "config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(ValueError, match=r"^out: \.\. holds something already"):
        export.export(str(resnet[0]), "..", onnx=False)


def test_no_path_of_the_machine_is_published(tmp_path):
    (tmp_path / "secret" / "birds").mkdir(parents=True)
    run = make_run(tmp_path / "run", "simclr", *RESNET, f"--data={tmp_path / 'secret' / 'birds'}")
    export.export(str(run), str(tmp_path / "out"), onnx=False)
    written = [path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".md", ".json")]
    assert len(written) == 2
    assert not any("secret" in words for words in written)
    assert all("birds" in words for words in written)


def test_the_place_of_a_teacher_is_not_published(tmp_path):
    run = make_run(tmp_path / "run", "distil", f"--model.teacher={tmp_path / 'secret' / 'wise'}")
    export.export(str(run), str(tmp_path / "out"), onnx=False)
    for name in ("README.md", "config.json"):
        words = (tmp_path / "out" / name).read_text()
        assert "wise" in words
        assert "secret" not in words


def test_weights_that_read_back_otherwise_are_refused_and_leave_nothing(resnet, tmp_path, monkeypatch):
    real = FrozenEncoder.encoder_state
    monkeypatch.setattr(FrozenEncoder, "encoder_state", lambda self: {k: v + 1 for k, v in real(self).items()})
    with pytest.raises(RuntimeError, match=r"model\.safetensors: h of the weights read back differs"):
        export.export(str(resnet[0]), str(tmp_path / "out"), onnx=False)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_one_line(resnet, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert cli.main(["export", str(resnet[0]), "--out", str(tmp_path / "full")]) == 2
    assert cli.main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new")]) == 2
    assert cli.main(["export", str(resnet[0])]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "full holds something already; need a new or an empty folder" in lines[0]
    assert "no checkpoint" in lines[1]
    assert "out" in lines[2]
    assert len(lines) == 3
    with pytest.raises(ValueError, match=r"holds no config\.json; it must be one that `fused-nce export` wrote"):
        export.load_encoder(tmp_path)
