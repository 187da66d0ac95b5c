"""CPC on recordings in the loop: shards of WAV, windows, exact resume, probes of digit and speaker."""

import csv
import json
import logging
import math
import re

import numpy as np
import pytest
import torch

from fused_nce import cli
from fused_nce.train import command
from fused_nce.train.data import log_mel, recordings
from fused_nce.train.evaluation import recordings as evaluate_audio
from fused_nce.train.evaluation.scoring import Asked
from fused_nce.train.loop import Trainer
from tests.marks import nightly_but
from tests.train import speech
from tests.train.pictures import write_shard
from tests.train.runs import assert_the_same, log, resumed

TINY = [
    "--preset=fsdd-tiny", "--model.channels=12", "--model.hidden=8", "--model.steps=3", "--augment.window=800",
    "--batch-size=8", "--optim.warmup_updates=0", "--run.log_every=4", "--precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return speech.make(tmp_path_factory.mktemp("speech"))


def trainer(data, out, *argv):
    return Trainer(*command.parse("cpc", [*TINY, "--data", str(data), "--out", str(out), *argv])[:2])


# --- recordings ---------------------------------------------------------------------------------------------------


def test_a_split_is_what_was_written(data):
    found = recordings.load(str(data), "test")
    assert (len(found.waves), found.rate, found.damaged) == (18, speech.RATE, 0)
    assert all(
        torch.equal(found.waves[i], torch.tensor(speech.tone(i % 3, i // 3 % 2, 10_000 + i)).short()) for i in (0, 17)
    )
    assert found.tags == {"digit": [str(i % 3) for i in range(18)], "speaker": [f"s{i // 3 % 2}" for i in range(18)]}
    assert found.labels("speaker", ["s1"]).tolist() == [0 if i // 3 % 2 else -1 for i in range(18)]
    assert len(recordings.load(str(data), "probe").waves) == 36


def test_classes_are_in_the_order_of_numbers():
    assert recordings.classes(["10", "2", "b", "", "a", "2"]) == ["2", "10", "a", "b"]


def test_level():
    wave = torch.tensor([16384, -16384], dtype=torch.int16)
    assert recordings.scaled(wave, 0.25).tolist() == [2.0, -2.0]
    assert recordings.scaled(wave, None).tolist() == [1.0, -1.0]
    assert recordings.scaled(torch.zeros(3, dtype=torch.int16), None).tolist() == [0.0] * 3  # silence is no NaN


GOOD = speech.wav([1, 2, 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([("a.json", b"{}")], "no recording in"),
        ([("a.wav", GOOD), ("a.json", b"[1]")], "a .json member must hold an object"),
        (
            [("a.wav", GOOD), ("b.wav", speech.wav([1], rate=16000))],
            "must have the 16000 Hz of most recordings, got 1 channels, 16 bit and 8000 Hz",
        ),
        ([("a.wav", GOOD), ("b.wav", speech.wav([1, 2], channels=2))], "got 2 channels, 16 bit"),
        ([("a.wav", GOOD), ("b.wav", GOOD[:-2])], "holds 2 of 3 samples"),
        ([("a.wav", GOOD), ("b.wav", b"RIFFxxxx")], "damaged, above 1 %"),
        ([("a.wav", GOOD), ("b.wav", speech.wav([]))], "holds 0 of 0 samples"),
    ],
)
def test_recordings_that_are_refused(tmp_path, content, message):
    write_shard(tmp_path / "train-0.tar", content)
    with pytest.raises(ValueError, match=f"^data: .*{re.escape(message)}"):
        recordings.load(str(tmp_path), "train")


def test_one_damaged_recording_in_many_is_replaced_with_its_labels(tmp_path):
    content = [(f"{i}.wav", speech.wav([i] * 5)) for i in range(200)]
    content += [(f"{i}.cls", str(i).encode()) for i in range(200)]
    content[7] = ("7.wav", b"RIFF")
    write_shard(tmp_path / "train-0.tar", content)
    found = recordings.load(str(tmp_path), "train")
    assert (found.damaged, found.waves[7].tolist(), found.tags["class"][6:9]) == (1, [8] * 5, ["6", "8", "8"])


def test_a_window_is_a_piece_of_its_recording_and_places_differ(data, tmp_path):
    run = trainer(data, tmp_path / "a", "--augment.window=700")
    seen = [next(run.loader.batches(position)) for position in range(12)]
    places = set()
    for batch in seen:
        for window, index in zip(batch.images, batch.indices.tolist(), strict=True):
            whole = recordings.scaled(run.loader.waves[index], run.config.augment.level)
            if len(whole) <= 700:
                assert torch.equal(window[: len(whole)], whole)
                assert not window[len(whole) :].any()
            else:
                starts = [s for s in range(len(whole) - 699) if torch.equal(whole[s : s + 700], window)]
                assert len(starts) == 1
                places.add(starts[0] / (len(whole) - 700))
    assert min(places) < 0.1
    assert max(places) > 0.9
    again = next(run.loader.batches(5))
    assert torch.equal(again.images, seen[5].images)


def test_log_mel_of_a_tone_and_of_silence():
    rate = 8000
    t = torch.arange(4000) / rate
    low, high = (log_mel.log_mel(torch.sin(2 * math.pi * f * t), rate) for f in (300.0, 2000.0))
    bank = log_mel.filters(rate, 256, 40)
    assert low.shape == (51, 40)
    # Where a tone is: the band whose triangle is highest at its frequency.
    for found, f in ((low, 300.0), (high, 2000.0)):
        assert found[25].argmax() == bank[:, round(f * 256 / rate)].argmax()
    assert torch.equal(log_mel.log_mel(torch.zeros(800), rate), torch.full((11, 40), math.log(log_mel.FLOOR)))
    # The power of a sine of amplitude 1 is ½, spread by the window over the bins: Parseval, one side of the spectrum.
    spectrum = np.abs(np.fft.rfft(np.hanning(201)[:-1] * np.sin(2 * np.pi * 2000 * np.arange(200) / rate), 256)) ** 2
    expected = np.log((bank.double().numpy() @ (spectrum / (np.hanning(201)[:-1] ** 2).sum())).max())
    assert high[25].max() == pytest.approx(expected, abs=0.02)


# --- settings -----------------------------------------------------------------------------------------------------


def test_a_window_too_short_for_the_steps_and_an_unknown_label_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"augment\.window: must give more than the 3 frames of model.steps, got 240"):
        trainer(data, tmp_path / "a", "--augment.window=240")
    with pytest.raises(ValueError, match=r"augment\.label: must be null or one of digit, speaker, got word"):
        trainer(data, tmp_path / "a", "--augment.label=word")
    with pytest.raises(ValueError, match=r"absent does not exist; it must be a folder of recordings, or \.tar"):
        recordings.load(str(tmp_path / "absent"), "train")


# --- the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("negatives", ["batch", "sampled"])
def test_resume_is_exact(data, tmp_path, negatives):
    """Weights, moments, windows, sampled negatives, classifiers and log, bit by bit."""
    extra = [f"--loss.negatives={negatives}"]
    trainer(data, tmp_path / "a", "--max-steps=5", *extra).run()
    trainer(data, tmp_path / "b", "--max-steps=2", *extra).run()
    torch.manual_seed(999)
    resumed(tmp_path / "b", "--max-steps=5", method="cpc").run()
    assert_the_same(tmp_path / "b", tmp_path / "a", 5)


@pytest.mark.parametrize("negatives", nightly_but(["sampled"], ["batch", "sequence", "sampled"]))
def test_it_learns_the_tones(data, tmp_path, negatives):
    trainer(data, tmp_path / "a", "--max-steps=80", "--lr=5e-3", f"--loss.negatives={negatives}").run()
    first, *_, last = log(tmp_path / "a")
    assert last["loss"] < first["loss"] - 0.3
    assert (last["nce_minus_chance"] is None) == (negatives == "sequence")
    if negatives != "sequence":
        assert last["nce_minus_chance"] < -0.3


def test_processes_share_the_windows_of_one(data):
    def windows(rank, world):
        loader = recordings.WindowLoader(
            str(data), recordings.WindowConfig(600), 8 // world, seed=0, rank=rank, world=world
        )
        return next(loader.batches(3)).images

    assert torch.equal(torch.cat([windows(0, 2), windows(1, 2)]), windows(0, 1))


def test_without_a_label_there_are_no_online_classifiers(data, tmp_path):
    run = trainer(data, tmp_path / "a", "--augment.label=null")
    assert run.probes is None


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_features_are_the_mean_over_the_frames_of_the_whole_recording(data, tmp_path):
    model = trainer(data, tmp_path / "a").model.eval()
    waves = recordings.load(str(data), "test").waves[:3]
    found = evaluate_audio.extract(model, waves, 0.1, ["c_t", "z_t"])
    for i, wave in enumerate(waves):
        with torch.no_grad():
            taps = model.encode(wave.float()[None] / 32768 / 0.1)
        for tap, values in found.items():
            torch.testing.assert_close(values[i], taps[tap][0].mean(1))
    assert evaluate_audio.extract(model, [waves[0][:3]], None, ["c_t"])["c_t"].shape == (1, 8)


def find(probe, test, *, unseen=False, labels=None, protocols=("linear",)):
    asked = Asked([], list(protocols), [1], 2, 2, 0, False, unseen, print, labels=labels)
    return evaluate_audio.find_targets(probe, test, "shards", asked)


def test_a_test_label_that_no_training_recording_has_is_refused():
    known = recordings.Recordings([], {"digit": ["0", "1"] * 2}, 8000)
    new = recordings.Recordings([torch.empty(0)] * 3, {"digit": ["1", "2", "2"]}, 8000, names=["a", "b", "c"])
    wanted = (
        "data: no training recording has digit '2', which 2 test recordings have, the first b; .*--leave_out_unseen"
    )
    with pytest.raises(ValueError, match=wanted):
        find(known, new)
    (target,), said = find(known, new, unseen=True)
    assert (target.plan.truth.tolist(), target.rows.tolist()) == ([1], [0])
    assert said == ["'digit': 2 test recordings of classes that training lacks left out"]
    with pytest.raises(ValueError, match="data: shards has no label of 2 or more classes on every recording"):
        find(known, recordings.Recordings([torch.empty(0)], {"digit": [""]}, 8000))


@pytest.mark.parametrize("leave_out_unseen", [False, True])
def test_a_label_that_names_recordings_is_left_out_with_a_line(leave_out_unseen):
    digits = [str(i % 2) for i in range(120)]
    words = [f"word {max(i, 40)}" for i in range(120)]  # 79 stand alone
    known = recordings.Recordings([], {"digit": digits, "text": words, "speaker": digits}, 8000)
    new = recordings.Recordings([torch.empty(0)] * 2, {"digit": ["1", "0"], "text": [words[0], "new"]}, 8000)
    new.tags["speaker"] = ["7", "8"]
    targets, said = find(known, new, unseen=leave_out_unseen)
    assert [target.name for target in targets] == ["digit"]
    assert said == [
        "label 'text' is not evaluated: 79 training recordings have one of their own",
        "label 'speaker' is not evaluated: no test recording is of a class that training has",
    ]
    del known.tags["digit"]
    with pytest.raises(ValueError, match=r"no label of 2 or more classes on every recording \(label 'text' is not"):
        find(known, new, unseen=leave_out_unseen)


def test_a_label_that_cannot_be_judged_is_passed_over_and_those_asked_for_are_not():
    digits, long = [str(i % 2) for i in range(60)], [str(100 + i % 29) for i in range(59)]
    known = recordings.Recordings([], {"ms": [*long, "500"], "digit": digits, "speaker": digits}, 8000)
    tags = {"ms": ["100", "600"], "digit": ["1", "0"], "speaker": ["0", "1"]}
    new = recordings.Recordings([torch.empty(0)] * 2, tags, 8000, names=["a", "b"])
    why = {
        False: "no training recording has ms '600', which 1 test recordings have, the first b; .*--leave_out_unseen",
        True: "labels: class '500' of ms has 1 example; need 2 or more a class",
    }
    for unseen, reason in why.items():
        targets, (said,) = find(known, new, unseen=unseen)
        assert [target.name for target in targets] == ["digit", "speaker"]
        assert re.match(f"label 'ms' is not evaluated: {reason}", said)
        with pytest.raises(ValueError, match=f"^labels: 'ms' cannot be evaluated: {reason}"):
            find(known, new, unseen=unseen, labels=["speaker", "ms"])
        alone = [recordings.Recordings(x.waves, {"ms": x.tags["ms"]}, 8000, names=x.names) for x in (known, new)]
        with pytest.raises(ValueError, match=reason):
            find(*alone, unseen=unseen)
    targets, said = find(known, new, labels=["speaker", "digit"])
    assert ([target.name for target in targets], said) == (["speaker", "digit"], [])
    assert [target.name for target in find(known, new, unseen=True, protocols=["knn"])[0]] == ["ms", "digit", "speaker"]
    with pytest.raises(ValueError, match=r"^labels: must be of ms, digit, speaker; got 'take'"):
        find(known, new, labels=["take"])


def test_train_and_evaluate_from_the_command_line(data, tmp_path, capsys, caplog):
    out = tmp_path / "run"
    with caplog.at_level(logging.INFO, logger="fused_nce"):
        assert cli.main(["train", "cpc", *TINY, "--data", str(data), "--max-steps=4", "--out", str(out)]) == 0
    assert "CPC on" in capsys.readouterr().out
    holds = "recordings of 8000 Hz, 3 classes of 'digit', 2 classes of 'speaker'"
    assert f"{data}, train: 36 {holds}" in caplog.messages
    assert cli.main(["eval", str(out), "--draws=2", "--labels_per_class=3"]) == 0
    printed = capsys.readouterr().out
    assert "c_t, digit  trained" in printed
    fast = [
        (n, speech.wav(speech.tone(0, 0, 1), 16000) if n.endswith("wav") else c) for n, c in speech.members("train")
    ]
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}-0.tar", fast)
    assert cli.main(["eval", str(out), "--data", str(tmp_path)]) == 2
    assert f"data: must have the 8000 Hz that {out} was trained on, got 16000 Hz\n" in capsys.readouterr().err
    assert cli.main(["fine-tune", str(out)]) == 2
    assert "fused-nce: run: must be of images, got one of cpc (recordings)\n" in capsys.readouterr().err
    result = json.loads((out / "eval.json").read_text())
    assert result["read"] == printed.splitlines()[:2] == [f"{data}, probe: 36 {holds}", f"{data}, test: 18 {holds}"]
    assert result["taps"] == ["c_t, digit", "c_t, speaker", "z_t, digit", "z_t, speaker"]
    encoders = ["trained", "random, torch's init", "random, Kaiming init", "log-mel mean"]
    for tap in result["taps"]:
        rows = [row for row in result["probes"] if row["tap"] == tap]
        assert list(dict.fromkeys(row["encoder"] for row in rows)) == encoders
        assert len(rows) == 4 * len(encoders)
    widths = {(row["encoder"], row["tap"]): row["width"] for row in result["probes"]}
    assert (widths["trained", "c_t, digit"], widths["trained", "z_t, digit"]) == (8, 12)
    assert widths["log-mel mean", "c_t, speaker"] == 40
    assert (result["splits"], result["classes"]) == ({"probe": 36, "test": 18}, ["0", "1", "2"])
    assert np.sum(result["confusion"]["matrix"]) == 18
    # A tone's pitch is in its spectrum: the baseline must see it.
    spectra = next(r for r in result["probes"] if r["encoder"] == "log-mel mean" and r["tap"] == "c_t, digit")
    assert spectra["accuracy_pct"] == 100
    page = (out / "report.html").read_text()
    assert "12 numbers a recording" in page
    assert "images" not in page.split("<h2>What the loss costs")[0]
    with (out / "eval.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result["probes"])
    assert cli.main(["eval", str(out), "--labels=speaker", "--protocols=knn", "--baselines=false", "--cost=false"]) == 0
    result = json.loads((out / "eval.json").read_text())
    assert (result["labels"], result["taps"]) == (["speaker"], ["c_t, speaker", "z_t, speaker"])
