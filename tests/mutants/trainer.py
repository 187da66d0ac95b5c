"""Faults in encoders, augmentation, training and evaluation, each with the test file that must notice it."""

from __future__ import annotations

from tests.mutants.faults import Fault

TRAIN, MODELS = "fused_nce/train", "fused_nce/models"


def fault(reason: str, file: str, find: str, replace: str, *tests: str) -> Fault:
    return Fault(reason, file, find, replace, tests)


TRAINER = (
    # ---- encoder
    fault(
        "activation after the residual sum",
        f"{MODELS}/encoders/blocks.py",
        "        return branch + shortcut\n",
        "        return F.relu(branch + shortcut)\n",
        "tests/models/test_encoder.py",
    ),
    fault(
        "branches of the blocks not zero at the start",
        f"{MODELS}/encoders/blocks.py",
        "        nn.init.zeros_(weight)",
        "        kaiming_(weight)",
        "tests/models/test_encoder.py",
    ),
    fault(
        "both views in one batch: BatchNorm mixes them",
        f"{MODELS}/amdim.py",
        "return self._embedded((self.encode(view1), self.encode(view2)))",
        "both = self.encode(__import__('torch').cat((view1, view2)))\n"
        "        return self._embedded(tuple({k: v.chunk(2)[i] for k, v in both.items()} for i in (0, 1)))",
        "tests/models/test_amdim.py",
    ),
    # ---- data and augmentation
    fault(
        "flip drawn for each view",
        f"{TRAIN}/augment.py",
        "flipped = geometry.flip(cut.reshape(one_draw, -1, *size[1:]), c.flip_p)",
        "flipped = geometry.flip(cut.reshape(2 * count, -1, *size[1:]), c.flip_p)",
        "tests/train/test_augment.py",
    ),
    fault(
        "one draw of grayscale for the whole batch",
        f"{TRAIN}/colour.py",
        "chosen = (torch.rand(len(x)) < p).nonzero()",
        "chosen = (torch.rand(1) < p).expand(len(x)).nonzero()",
        "tests/train/test_augment.py",
    ),
    fault(
        "the same crops of an image in every epoch",
        f"{TRAIN}/loader.py",
        "torch.manual_seed(hash((self.seed, position, asked)))",
        "torch.manual_seed(hash((self.seed, asked)))",
        "tests/train/test_data.py",
    ),
    fault(
        "small sets cropped from a centre square",
        f"{TRAIN}/loader.py",
        'if config.augment.geometry != "crop":',
        "if True:",
        "tests/train/test_data.py",
    ),
    fault(
        "a damaged image's label on its replacement",
        f"{TRAIN}/data.py",
        "labels[i] = source.labels[index]",
        "labels[i] = source.labels[i]",
        "tests/train/test_data.py",
    ),
    # ---- training
    fault(
        "upstream presets with the paper's λ",
        f"{TRAIN}/methods/amdim.py",
        "penalty: float = 0.05",
        "penalty: float = 0.04",
        "tests/train/test_config.py",
    ),
    fault(
        "warm-up starts at rate 0",
        f"{TRAIN}/optim.py",
        "min(1.0, (update + 1) / config.warmup_updates)",
        "min(1.0, update / config.warmup_updates)",
        "tests/train/test_optim_probes.py",
    ),
    fault(
        "AdamW for Adam",
        f"{TRAIN}/optim.py",
        "return torch.optim.Adam(groups",
        "return torch.optim.AdamW(groups",
        "tests/train/test_optim_probes.py",
    ),
    fault(
        "online probes train the encoder",
        f"{TRAIN}/online_probes.py",
        "x = features.detach().flatten(1)",
        "x = features.flatten(1)",
        "tests/train/test_optim_probes.py",
    ),
    fault(
        "a resumed run starts its epoch anew",
        f"{TRAIN}/loop.py",
        "batches = self.loader.batches(self.step * config.optim.accumulate)",
        "batches = self.loader.batches(0)",
        "tests/train/test_loop.py",
    ),
    fault(
        "a skipped update leaves its NaN in BatchNorm",
        f"{TRAIN}/loop.py",
        "            self._restore(buffers)\n            self._skip(",
        "            self._skip(",
        "tests/train/test_nonfinite.py",
    ),
    fault(
        "a broken probe holds up the encoder",
        f"{TRAIN}/loop.py",
        "        if bad:\n",
        "        if bad or bad_probes:\n",
        "tests/train/test_nonfinite.py",
    ),
    fault(
        "success without a single update",
        f"{TRAIN}/loop.py",
        "if self.skipped == self.step > 0 and",
        "if False and",
        "tests/train/test_nonfinite.py",
    ),
    fault(
        "moments in another memory format than their weights",
        f"{TRAIN}/checkpoint.py",
        "fits = torch.empty_like(like, dtype=value.dtype) if value.dim() else torch.empty_like(value)",
        "fits = torch.empty_like(value)",
        "tests/train/test_checkpoint.py",
        "tests/train/test_loop.py",
    ),
    # ---- methods
    fault(
        "the key encoder follows at the complement of its momentum",
        f"{MODELS}/moco.py",
        "key.mul_(self.momentum).add_(query, alpha=1 - self.momentum)",
        "key.mul_(1 - self.momentum).add_(query, alpha=self.momentum)",
        "tests/models/test_moco.py",
    ),
    fault(
        "a key is its own negative: enqueued before the loss",
        f"{MODELS}/moco.py",
        "            self._pending.add(keys[0])",
        "            self.queue.update(keys[0])",
        "tests/models/test_moco.py",
    ),
    fault(
        "keys in the order of the shuffle",
        f"{MODELS}/moco.py",
        "encoded = processes.unshuffle(self.key_encoder(shuffled), order)",
        "encoded = self.key_encoder(shuffled)",
        "tests/models/test_moco.py",
    ),
    fault(
        "a skipped update moves the key encoder and the queue",
        f"{MODELS}/moco.py",
        "        if skipped:\n",
        "        if False:\n",
        "tests/models/test_projected.py",
    ),
    fault(
        "the loop does not say that an update was skipped",
        f"{TRAIN}/loop.py",
        "self.model.after_step(skipped=bad)",
        "self.model.after_step()",
        "tests/train/test_methods.py::test_an_update_that_is_skipped_leaves_memory_and_keys_alone",
    ),
    fault(
        "split BatchNorm keeps the statistics of the last part",
        f"{MODELS}/encoders/split_norm.py",
        "mean.copy_(torch.stack(means).mean(0))",
        "mean.copy_(means[-1])",
        "tests/models/test_backbones.py",
    ),
    fault(
        "zero branches by the second norm of a bottleneck",
        f"{MODELS}/encoders/backbones.py",
        'block.bn3 if hasattr(block, "bn3") else block.bn2',
        "block.bn2",
        "tests/models/test_backbones.py",
    ),
    fault(
        "the bank's momentum on the wrong side",
        f"{MODELS}/npid.py",
        "torch.lerp(features.float(), self.vectors[indices], self.momentum)",
        "torch.lerp(self.vectors[indices], features.float(), self.momentum)",
        "tests/models/test_projected.py",
    ),
    fault(
        "the bank off the sphere",
        f"{MODELS}/npid.py",
        "self.vectors.index_copy_(0, indices, functional.normalize(mixed, dim=1))",
        "self.vectors.index_copy_(0, indices, mixed)",
        "tests/models/test_projected.py",
    ),
    fault(
        "a bank of one image in the evaluation",
        f"{TRAIN}/checkpoint.py",
        'config.build(images=int(load_state(path).get("images", 1)))',
        "config.build(images=1)",
        "tests/train/test_methods.py::test_a_run_loads_without_its_data",
    ),
    fault(
        "labels beside the wrong views",
        f"{MODELS}/supcon.py",
        "extras[0].repeat(2)",
        "extras[0].repeat_interleave(2)",
        "tests/models/test_projected.py",
    ),
    fault(
        "SimCLR's views normalised apart",
        f"{MODELS}/simclr.py",
        "return halves(self.encode(torch.cat(views_of(batch))))",
        "return tuple(map(self.encode, views_of(batch)))",
        "tests/models/test_projected.py",
    ),
    fault(
        "LARS's ratio without the decay",
        f"{TRAIN}/optim.py",
        "own, other = p.norm(), update.norm()",
        "own, other = p.norm(), p.grad.norm()",
        "tests/train/test_optim_probes.py",
    ),
    fault(
        "views flipped together",
        f"{TRAIN}/augment.py",
        "one_draw = count if c.flip_shared else count * self.count",
        "one_draw = count",
        "tests/train/test_augment.py",
    ),
    fault(
        "crops of small images from a resized copy",
        f"{TRAIN}/data.py",
        "image if image.shape[1:] == (size, size) else None",
        "fit(image, size, size)",
        "tests/train/test_data.py",
    ),
    # ---- evaluation
    fault(
        "features with the statistics of the test batch",
        f"{TRAIN}/features.py",
        "    model.eval()\n    encode",
        "    model.train()\n    encode",
        "tests/train/test_eval_features.py",
    ),
    fault(
        "test images in the standardisation",
        f"{TRAIN}/probes.py",
        "mean = bank.mean(axis=0, dtype=np.float64)",
        "mean = np.concatenate([bank, queries]).mean(axis=0, dtype=np.float64)",
        "tests/train/test_eval_probes.py",
    ),
    fault(
        "the penalty chosen on rows that were fitted",
        f"{TRAIN}/probes.py",
        "found = fit_predict(known, labels[rows], features[held], c, own, kind)",
        "held = rows\n            found = fit_predict(known, labels[rows], features[held], c, own, kind)",
        "tests/train/test_eval_probes.py",
    ),
    fault(
        "the probe's penalty not divided by the rows",
        f"{TRAIN}/logistic.py",
        "weight.square().sum() / (2 * c * n)",
        "weight.square().sum() / (2 * c)",
        "tests/train/test_eval_probes.py",
    ),
    fault(
        "kNN by dot product",
        f"{TRAIN}/knn.py",
        "bank = functional.normalize(bank.float(), dim=1)",
        "bank = bank.float()",
        "tests/train/test_eval_knn.py",
    ),
)
