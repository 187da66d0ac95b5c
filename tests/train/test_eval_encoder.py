"""Protocols that need the encoder or the images: fine-tuning, reconstruction, and what a code knows."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from fused_nce import cli
from fused_nce.train.evaluation import dependence, fine_tune, protocols, reconstruction
from fused_nce.train.evaluation import images as evaluate_images
from fused_nce.train.evaluation import recordings as evaluate_audio
from fused_nce.train.evaluation.fine_tune import Subject
from fused_nce.train.evaluation.scoring import Asked
from fused_nce.train.methods.amdim import AMDIMConfig, ModelConfig
from tests.train.test_eval_protocols import make_plan
from tests.train.test_eval_run import make_run


class Channels(torch.nn.Module):
    """An encoder that keeps each channel's mean, and can learn."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(3, 3)
        self.norm = torch.nn.BatchNorm1d(3)

    def encode(self, x):
        return {"h": self.norm(self.mix(x.mean((2, 3))))}


def colours(count, classes=3, seed=0, spread=50):
    """Images of one colour a class, with noise upon it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    base = torch.randint(60, 196, (classes, 3, 1, 1), generator=torch.Generator().manual_seed(9))
    noise = torch.randint(-spread, spread, (count, 3, 16, 16), generator=generator)
    return (base[labels] + noise).to(torch.uint8), labels.numpy()


def subject(count=60, tests=30):
    torch.manual_seed(0)
    images, labels = colours(count)
    made = Subject(Channels().eval(), "h", lambda x: x.float() / 255, images, colours(tests, seed=1)[0])
    with torch.no_grad():
        return made, made.model.encode(made.transform(images))["h"], labels  # type: ignore[operator]


# --- fine-tuning --------------------------------------------------------------------------------------------------


def test_fine_tuning_learns_the_classes_and_leaves_the_encoder_itself_alone():
    made, bank, labels = subject()
    before = {name: x.clone() for name, x in made.model.state_dict().items()}
    state = torch.get_rng_state()
    draws, held = [np.arange(9), np.arange(9, 18)], np.arange(30, 60)
    found, rate = fine_tune.fine_tune(made, bank, labels, draws, held, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert [x for name, x in made.model.state_dict().items() if not torch.equal(x, before[name])] == []
    assert rate in fine_tune.RATES
    assert all((predicted == np.arange(30) % 3).mean() > 0.9 for predicted in found)
    again, _ = fine_tune.fine_tune(made, bank, labels, draws, held, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_the_encoder_learns_too_and_its_batch_norm_keeps_its_statistics():
    made, bank, labels = subject()
    net = fine_tune.Tuned.of(made, bank, 3)
    assert not net(made.transform(made.test)).any()  # starts at zero: every class alike
    fine_tune.tune(net, made.probe[:9], torch.from_numpy(labels[:9]), rate=1e-3, seed=0)
    changed = {k for k, v in net.encoder.state_dict().items() if not torch.equal(v, made.model.state_dict()[k])}
    assert changed == {name for name, _ in made.model.named_parameters()}
    together = net.predict(made.test)
    assert torch.equal(together, torch.cat([net.predict(one) for one in made.test.split(1)]))


def test_the_rate_is_chosen_on_images_that_no_draw_contains(monkeypatch):
    made, bank, labels = subject()
    monkeypatch.setattr(fine_tune, "RATES", (1e30, 1e-3))
    assert fine_tune.fine_tune(made, bank, labels, [np.arange(9)], np.arange(30, 60), seed=0)[1] == 1e-3


# --- reconstruction -----------------------------------------------------------------------------------------------


def naive_ssim(a, b):
    """Wang et al. 2004, equation 13, window by window."""
    place = np.arange(11) - 5
    weight = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    luminance, structure = [], []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (weight * x).sum(), (weight * y).sum()
            vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
            both = (weight * (x - mx) * (y - my)).sum()
            luminance.append((2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4))
            structure.append((2 * both + 9e-4) / (vx + vy + 9e-4))
    return np.mean(np.multiply(luminance, structure)), np.mean(structure)


def test_ssim_is_its_formula_at_one_scale_and_at_two():
    rng = np.random.default_rng(0)
    a = rng.random((24, 24))
    b = np.clip(a + 0.2 * rng.standard_normal((24, 24)), 0, 1)
    x, y = (torch.from_numpy(v)[None, None] for v in (a, b))
    single, structure = naive_ssim(a, b)
    half_a, half_b = (v.reshape(12, 2, 12, 2).mean((1, 3)) for v in (a, b))
    weights = np.array([0.0448, 0.2856]) / (0.0448 + 0.2856)
    several = structure ** weights[0] * naive_ssim(half_a, half_b)[0] ** weights[1]
    # float64 images; the weights are float32's: 2⁻²⁴ of an exponent below 1.
    assert float(reconstruction.ms_ssim(x, y, 1)) == pytest.approx(single, abs=1e-6)
    assert float(reconstruction.ms_ssim(x, y, 2)) == pytest.approx(several, abs=1e-6)
    assert float(reconstruction.ms_ssim(x, x, 2)) == pytest.approx(1, abs=1e-6)


def test_as_many_scales_as_the_window_fits_into():
    assert [reconstruction.scales(side) for side in (11, 16, 32, 64, 176, 1000)] == [1, 1, 2, 3, 5, 5]
    with pytest.raises(ValueError, match=r"^protocols: ms-ssim needs images of 11 px or more, got 8$"):
        reconstruction.scales(8)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_a_decoder_makes_images_of_the_size(side):
    made = reconstruction.Decoder(5, side)(torch.randn(2, 5)).detach()
    assert made.shape == (2, 3, side, side)
    assert 0 <= float(made.min()) <= float(made.max()) <= 1


def test_a_decoder_must_be_able_to_make_the_size():
    with pytest.raises(ValueError, match=r"^side: must be 4 times a power of two"):
        reconstruction.Decoder(5, 24)


@pytest.mark.parametrize(("side", "need"), [(8, "11 px or more"), (24, "16, 32, 64"), (224, "16, 32, 64")])
def test_images_that_ms_ssim_cannot_take_are_refused_before_they_are_read(side, need):
    settings = AMDIMConfig(model=ModelConfig(image_size=side), data="nowhere")
    asked = Asked(["f1"], ["linear", "ms-ssim"], [], 2, 2, 0, False, False, print)
    with pytest.raises(ValueError, match=f"^protocols: ms-ssim needs images of {need}.*, got {side}$"):
        evaluate_images.evaluate(Channels(), settings, asked)


def test_features_that_know_the_image_reconstruct_it_better_than_noise():
    images, _ = colours(60, spread=5)
    scores = []
    for features in (4 * (images.float().mean((2, 3)) / 255 - 0.5), torch.randn(60, 3)):
        decoder = reconstruction.train_decoder(features[:40], images[:40], seed=0, updates=60)
        scores.append(reconstruction.similarity(features[40:], images[40:], decoder)[1])
    assert scores[0] > scores[1] + 0.1


# --- information --------------------------------------------------------------------------------------------------


def test_ndm_bounds_the_dependence_of_two_correlated_units():
    rho = 0.9
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 2, generator=generator)
    joined = torch.stack((x[:, 0], rho * x[:, 0] + math.sqrt(1 - rho**2) * x[:, 1]), 1)
    truth = -0.5 * math.log(1 - rho**2)  # 0.83 nats
    found = dependence.ndm(joined[:1500], joined[1500:], seed=0, updates=60)
    free = dependence.ndm(x[:1500], x[1500:], seed=0, updates=60)
    # A bound in the mean; its error on 1,500 samples is the deviation of T and e^T over √1500, about 0.07.
    assert 0.6 * truth < found < truth + 0.15
    assert abs(free) < 0.05


def test_shuffling_keeps_every_column_and_mixes_the_rows():
    codes = torch.arange(200.0).view(50, 4)
    mixed = dependence.shuffled(codes)
    assert torch.equal(mixed.sort(0).values, codes)
    assert not torch.equal(mixed[:, 1] - mixed[:, 0], torch.ones(50))


def test_mine_tells_a_code_of_the_image_from_a_stranger():
    (images, labels), (tests, _) = colours(150), colours(90, seed=1)
    code = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).float()
    queries = torch.nn.functional.one_hot(torch.arange(90) % 3, 3).float()
    found = dependence.mine(code, images, queries, tests, seed=0, updates=50)
    stranger = dependence.mine(torch.randn(150, 3), images, torch.randn(90, 3), tests, seed=0, updates=50)
    assert 0.6 < found < math.log(3) + 0.05  # the class is all that they share
    assert stranger < 0.1


def test_no_row_is_compared_with_itself():
    assert all((dependence._elsewhere(7) != torch.arange(7)).all() for _ in range(20))


# --- the command --------------------------------------------------------------------------------------------------


def test_by_name_they_are_in_every_table(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "run")
    monkeypatch.setattr(fine_tune, "MIN_UPDATES", 2)
    monkeypatch.setattr(fine_tune, "EPOCHS", 0)
    for name in ("train_decoder", "similarity"):
        real = getattr(reconstruction, name)
        short = {"updates": 2} if name == "train_decoder" else {}
        monkeypatch.setattr(reconstruction, name, lambda *a, real=real, short=short, **k: real(*a, **k, **short))
    monkeypatch.setattr(dependence, "mine", lambda *a, seed: 1.25)
    monkeypatch.setattr(dependence, "ndm", lambda *a, seed: math.nan)
    options = ["--protocols=fine-tune,ms-ssim,mine,ndm", "--draws=2", "--labels_per_class=2", "--taps=f1"]
    assert cli.main(["eval", str(folder), *options, "--cost=false"]) == 0
    printed = capsys.readouterr().out
    assert "MINE, image" in printed
    assert "1.25 nats" in printed
    result = json.loads((folder / "eval.json").read_text())
    names = ["trained", "random, AMDIM init", "random, Kaiming init"]  # pixels have no encoder
    assert [(row["encoder"], row["probe"], row["labels"]) for row in result["probes"]] == [
        (name, "fine-tune", "2/class") for name in names
    ]
    kinds = ["ms-ssim", "ms-ssim", "mine", "ndm", "ndm"]
    assert [(row["encoder"], row["probe"]) for row in result["measures"]] == [(n, k) for n in names for k in kinds]
    assert {row["value"] for row in result["measures"] if row["probe"] == "ndm"} == {None}
    with (folder / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows if row["probe"] == "mine"] == ["1.25"] * 3
    page = (folder / "report.html").read_text()
    assert "<td>1.25 nats</td>" in page
    assert "<td>not finite</td>" in page
    assert "Fine-tuned, 2 labels a class" in page


def test_recordings_have_no_images_to_reconstruct():
    with pytest.raises(ValueError, match=r"^protocols: mine needs images; recordings have linear, knn"):
        evaluate_audio.evaluate(Channels(), None, Asked([], ["mine"], [], 2, 2, 0, False, False, print))


def test_a_protocol_without_its_encoder_says_so():
    features = protocols.FeatureSet(torch.randn(4, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"^features: without an encoder"):
        protocols.PROTOCOLS["mine"].run(features, make_plan())
