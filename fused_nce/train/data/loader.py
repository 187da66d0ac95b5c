"""Batches of uint8 images in an order that depends on seed and position alone, so that a run resumes exactly."""

import signal
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fused_nce.train.data.augment import crops
from fused_nce.train.data.images import (
    DEFAULT_LIMIT_BYTES,
    ImageSet,
    decode,
    decode_native,
    decoded_bytes,
    load_split,
)
from fused_nce.train.data.sources import Damage, ImageSource, fit
from fused_nce.train.interrupt import ENDING, PREEMPTION
from fused_nce.train.settings import AugmentConfig

WORKER_TIMEOUT_S = 300  # a stuck reader is an error, not a wait for ever


class Batch(NamedTuple):
    """Images of one forward pass of one process."""

    images: Tensor  # (B, 3, S, S) uint8, or (B, V, 3, H, H): V crops, taken by a worker
    labels: Tensor  # (B,)
    indices: Tensor  # (B,) into the set


class Order:
    """The shuffled order of every epoch, cut into batches; incomplete batches are left out.

    Args:
        count: images.
        batch_size: images of one process.
        seed: of the shuffles.
        rank: of this process.
        world: processes.
        kind: what the images are, in words.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, kind: str = "images"
    ) -> None:
        self.per_epoch = count // (batch_size * world)
        if self.per_epoch == 0:
            raise ValueError(f"optim.batch_size: {batch_size} x {world} processes must be at most the {count} {kind}")
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self._epoch, self._shuffled = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, position: int) -> Tensor:  # (batch_size,)
        """The images of the batch at a position, counted from the start of the run."""
        epoch, batch = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._shuffled = epoch, torch.randperm(self.count, generator=generator)
        start = (batch * self.world + self.rank) * self.batch_size
        return self._shuffled[start : start + self.batch_size]


class Loader:
    """Batches from any position, of a set that is held decoded or read as it goes.

    Args:
        data: "digits", a folder or shards: see `images.load_split`.
        augment: says whether views are cut from the whole image.
        image_size: side in px.
        local_batch: images of this process in one batch.
        seed: of the order and of the crops.
        view_count: crops of an image, where they are cut while reading.
        workers: processes that read images that are not held.
        limit_bytes: a set that takes more as uint8 is not held.
        rank: of this process.
        world: processes.

    Attributes:
        account: one line: images, classes, and what was left out and why.
        digest: of the images' names and labels.
    """

    kind = "images"

    def __init__(
        self,
        data: str,
        augment: AugmentConfig,
        image_size: int,
        local_batch: int,
        *,
        seed: int,
        view_count: int = 2,
        workers: int = 0,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.augment, self.image_size, self.view_count = augment, image_size, view_count
        self.seed, self.workers = seed, workers
        self.held, self.source = open_data(data, augment, image_size, limit_bytes)
        if self.held:
            self.classes, self.labels = self.held.classes, self.held.labels
            self.account, self.digest = self.held.account, self.held.digest
        elif self.source:
            self.classes, self.labels = self.source.classes, torch.tensor(self.source.labels)
            self.account, self.digest = self.source.account(), self.source.samples.digest()
        self.count = len(self.labels)
        self.damage = Damage(self.count)
        self.order = Order(self.count, local_batch, seed, rank, world)

    @property
    def labelled(self) -> bool:
        """Whether there is anything for a classifier to learn."""
        return len(self.classes) > 1 and bool((self.labels >= 0).any())

    @property
    def damaged(self) -> int:
        """Images that could not be read so far."""
        return self.held.damaged if self.held else self.damage.count

    @property
    def streamed(self) -> bool:
        """Whether images are read as the run goes, so that a batch may fail."""
        return self.held is None

    def batches(self, position: int) -> Generator[Batch, None, None]:
        """Endless, from a position on."""
        if self.held:
            while True:
                chosen = self.order.indices(position)
                yield Batch(self.held.images[chosen], self.held.labels[chosen], chosen)
                position += 1
        yield from self._streamed(position)

    def _streamed(self, position: int) -> Iterator[Batch]:
        assert self.source is not None
        reader = Reader(self.source, self.augment, self.image_size, self.view_count, self.seed)
        loader: DataLoader[Any] = DataLoader(
            reader,
            batch_sampler=Keys(self.order, position),
            num_workers=self.workers,
            timeout=WORKER_TIMEOUT_S if self.workers else 0,
            worker_init_fn=_ignore_interrupts,
            # Its own: the loader draws a seed when it starts, and a resumed run starts it once more.
            generator=torch.Generator().manual_seed(self.seed),
        )
        try:
            for images, indices, asked in loader:
                for index in asked[asked != indices].tolist():
                    self.damage.report(index, self.source.samples.name(index))
                labels = torch.tensor([self.source.labels[i] for i in indices.tolist()])
                yield Batch(images, labels, indices)
        except ValueError as error:  # a worker's comes with its traceback as the message
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _ignore_interrupts(worker: int) -> None:
    """A signal may reach every process of the terminal or job: the readers must live until the loop has saved."""
    for number in (*ENDING, *PREEMPTION):
        signal.signal(number, signal.SIG_IGN)


class Keys:
    """The `(position, index)` of every image, batch by batch, for workers that seed their crops by them."""

    def __init__(self, order: Order, position: int) -> None:
        self.order, self.position = order, position

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.position
        while True:
            yield [(position, index) for index in self.order.indices(position).tolist()]
            position += 1


class Reader(Dataset[tuple[Tensor, int, int]]):
    """Reads, decodes and, if the geometry is "crop", cuts the views from the whole image."""

    def __init__(self, source: ImageSource, augment: AugmentConfig, size: int, views: int, seed: int) -> None:
        self.source, self.augment, self.size, self.views, self.seed = source, augment, size, views, seed
        self.damage = Damage(len(source))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        position, asked = key
        image, index = self.damage.read(self.source, asked)
        if self.augment.geometry != "crop":
            return fit(image, self.size, self.size), index, asked
        with torch.random.fork_rng(devices=[]):  # without workers this is the trainer's own generator
            torch.manual_seed(hash((self.seed, position, asked)))  # fault: same-crops-image
            return crops(image, self.augment, self.size, self.views), index, asked


def open_data(
    data: str, augment: AugmentConfig, size: int, limit_bytes: int = DEFAULT_LIMIT_BYTES
) -> tuple[ImageSet | None, ImageSource | None]:
    """The training images: decoded, if they fit in memory, or else the source to read them from.

    The images of a batch are the same either way.
    """
    if data == "digits":
        return load_split("digits", "train", size), None
    source = ImageSource(data, "train", upright=augment.upright)
    if decoded_bytes(source, size) > limit_bytes:
        return None, source
    if augment.geometry != "crop":  # fault: small-sets-cropped
        return decode(source, size, size), None
    # A crop is cut from the whole image: unless all have the wanted size, they are read anew each time.
    held = decode_native(source, size)
    return held, None if held else source
