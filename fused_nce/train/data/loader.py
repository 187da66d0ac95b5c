"""Batches of uint8 images in an order that depends on seed and position alone, so that a run resumes exactly."""

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import accumulate
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fused_nce.train.data.augment import crops
from fused_nce.train.data.image_source import Damage, ImageSource, fit
from fused_nce.train.data.images import (
    DEFAULT_LIMIT_BYTES,
    ImageSet,
    decode,
    decode_native,
    decoded_bytes,
    load_split,
)
from fused_nce.train.data.readers import Readers
from fused_nce.train.seeded import seeded
from fused_nce.train.settings import AugmentConfig

AHEAD = 4  # batches that the disk has, beyond those that a buffer holds, before they are asked for


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
        runs: how many images lie one behind the other in each file, where they are to be read so.
        buffer: images that are read ahead of the one that is drawn among them; None draws among all.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        kind: str = "images",
        *,
        runs: Sequence[int] = (),
        buffer: int | None = None,
    ) -> None:
        self.per_epoch = count // (batch_size * world)
        if self.per_epoch == 0:
            raise ValueError(f"optim.batch_size: {batch_size} x {world} processes must be at most the {count} {kind}")
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self.runs, self.buffer = runs, buffer
        self._epoch, self._shuffled, self._stream = -1, torch.empty(0, dtype=torch.int64), None

    _stream: Tensor | None

    def indices(self, position: int) -> Tensor:  # (batch_size,)
        """The images of the batch at a position, counted from the start of the run."""
        epoch, batch = divmod(position, self.per_epoch)
        self._shuffle(epoch)
        start = (batch * self.world + self.rank) * self.batch_size
        return self._shuffled[start : start + self.batch_size]

    def ahead(self, position: int, *, first: bool) -> Tensor:
        """What enters the buffer while a batch is drawn from it, in the order of the files; at first, all in it too."""
        epoch, batch = divmod(position, self.per_epoch)
        self._shuffle(epoch)
        if self._stream is None or self.buffer is None:
            return torch.empty(0, dtype=torch.int64)
        drawn = self.batch_size * self.world
        start = batch * drawn + self.buffer + AHEAD * drawn
        first = first or batch == 0
        return self._stream[batch * drawn if first else start : start + drawn]

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.buffer is None:
            self._shuffled = torch.randperm(self.count, generator=generator)
        else:
            self._stream, self._shuffled = through_buffer(self.runs, self.buffer, generator)
        self._epoch = epoch


def through_buffer(runs: Sequence[int], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An order of files, each from front to back, and the order in which a buffer gives what it is given so.

    From a full buffer one is drawn at random, and the next of the stream takes its place. A function of the generator
    alone, so that any position is known without what came before it.

    Args:
        runs: lengths of the files.
        size: of the buffer.
        generator: of both orders.

    Returns:
        (n,) the stream, and (n,) what leaves the buffer.
    """
    order = torch.randperm(len(runs), generator=generator).tolist()
    starts = [0, *accumulate(runs)]
    stream = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
    entering = stream.tolist()
    buffer, left = entering[:size], []
    slots = torch.randint(len(buffer), (len(entering) - len(buffer),), generator=generator).tolist()
    for slot, new in zip(slots, entering[size:], strict=True):
        left.append(buffer[slot])
        buffer[slot] = new  # fault: buffer-lets-go
    rest = torch.tensor(buffer)[torch.randperm(len(buffer), generator=generator)]
    return stream, torch.cat([torch.tensor(left, dtype=torch.int64), rest])


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
        buffer: shards are read from front to back, through a buffer of so many images; None: any image is next.

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
        buffer: int | None = None,
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
        runs = self.held.runs if self.held else self.source.samples.runs() if self.source else ()
        if buffer is not None and not runs:
            raise ValueError(f"shuffle_buffer: must be null for {data}, which is no shards, got {buffer}")
        self.order = Order(self.count, local_batch, seed, rank, world, runs=runs, buffer=buffer)
        self.reader = Reader(self.source, augment, image_size, view_count, seed, self.side)

    @property
    def labelled(self) -> bool:
        """Whether there is anything for a classifier to learn."""
        return len(self.classes) > 1 and bool((self.labels >= 0).any())

    @property
    def damaged(self) -> int:
        """Images that could not be read so far."""
        return self.held.damaged if self.held else self.damage.count

    def side(self, position: int) -> int:
        """Of the views of a batch, in px: smaller in the stages that come before the model's own size."""
        epoch = position // self.order.per_epoch
        return next((side for until, side in self.augment.stages if epoch < until), self.image_size)

    @property
    def streamed(self) -> bool:
        """Whether images are read as the run goes, so that a batch may fail."""
        return self.held is None

    @property
    def seeded(self) -> bool:
        """Whether crops are drawn from a seed of image and position, not from the run's generator."""
        return self.streamed and self.augment.geometry == "crop"

    def batches(self, position: int) -> Generator[Batch, None, None] | Readers[Batch]:
        """Endless, from a position on; `close` ends what they came from."""
        if self.source is None:
            return self._held(position)
        keys = Keys(self.order, position, self.source.samples.ahead)
        return Readers(self.reader, keys, self.workers, self.seed, self._batch)

    def _held(self, position: int) -> Generator[Batch, None, None]:
        assert self.held is not None
        while True:
            chosen = self.order.indices(position)
            images = self.held.images[chosen]
            if self.side(position) != self.image_size:
                pairs = zip(images, chosen.tolist(), strict=True)
                images = torch.stack([self.reader.prepare(image, position, index) for image, index in pairs])
            yield Batch(images, self.held.labels[chosen], chosen)
            position += 1

    def _batch(self, read: tuple[Tensor, Tensor, Tensor, Sequence[str]]) -> Batch:
        assert self.source is not None
        images, indices, asked, damage = read
        for index, why in zip(asked.tolist(), damage, strict=True):
            if why:
                self.damage.report(index, why)
        return Batch(images, torch.tensor([self.source.labels[i] for i in indices.tolist()]), indices)


class Keys:
    """The `(position, index)` of every image, batch by batch, for workers that seed their crops by them.

    Args:
        order: of the images.
        position: of the first batch.
        ahead: told of images that will be read soon, if the order has a buffer.
    """

    def __init__(self, order: Order, position: int, ahead: Callable[[list[int]], None]) -> None:
        self.order, self.position, self.ahead = order, position, ahead

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.position
        while True:
            if soon := self.order.ahead(position, first=position == self.position).tolist():
                Thread(target=self.ahead, args=(soon,), daemon=True).start()  # a disk may keep it waiting for ever
            yield [(position, index) for index in self.order.indices(position).tolist()]
            position += 1


class Reader(Dataset[tuple[Tensor, int, int, str]]):
    """Reads, decodes and, if the geometry is "crop", cuts the views from the whole image.

    Args:
        source: of the images; None where they are held.
        augment: the geometry.
        size: side in px.
        views: crops of an image.
        seed: of the crops.
        side: in px of what a batch at a position has, where that differs.
    """

    def __init__(
        self,
        source: ImageSource | None,
        augment: AugmentConfig,
        size: int,
        views: int,
        seed: int,
        side: Callable[[int], int] | None = None,
    ) -> None:
        self.augment, self.size, self.views, self.seed, self.side = augment, size, views, seed, side
        self.source, self.damage = source, Damage(len(source or ()), said=False)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, str]:
        """The image of a (position, index), its own index, the one asked for, and what is amiss with that."""
        position, asked = key
        assert self.source is not None
        image, index = self.damage.read(self.source, asked)
        return self.prepare(image, position, asked), index, asked, self.damage.bad.get(asked, "")

    def prepare(self, image: Tensor, position: int, asked: int) -> Tensor:
        """What a batch at a position has of an image."""
        side = self.side(position) if self.side is not None else self.size
        if self.augment.geometry != "crop":
            return fit(fit(image, self.size, self.size), side, side)
        with seeded(hash((self.seed, position, asked))):  # fault: same-crops-image
            return crops(image, self.augment, side, self.views)


def open_data(
    data: str, augment: AugmentConfig, size: int, limit_bytes: int = DEFAULT_LIMIT_BYTES
) -> tuple[ImageSet | None, ImageSource | None]:
    """The training images: decoded, if they fit in memory, or else the source to read them from.

    The images of a batch are the same either way; crops of those that are held are drawn later, for the whole batch.
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
