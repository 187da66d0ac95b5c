"""Pictures that a test makes, and the folders and shards they lie in."""

import gzip
import io
import tarfile

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF


def encoded(image, kind="PNG", **options):
    """The file of an image, or of an array of its values."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def picture(value, size=(32, 32)):
    """A file whose corner has this red; its lower right quarter is orange."""
    image = Image.new("RGB", size, (value % 256, 2 * value % 256, 7))
    image.paste((200, 100, 0), (size[0] // 2, size[1] // 2, size[0], size[1]))
    return encoded(image)


def write_folder(root, count, classes=("ant", "bee"), split="", size=(32, 32)):
    for i in range(count):
        folder = root / split / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:04d}.png").write_bytes(picture(i, size))
    return root


def write_images(folder, count):
    """Of noise, of two classes."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = torch.randint(256, (3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        TF.to_pil_image(values).save(path)


def archive(members):
    """Bytes of a tar of (name, content), or (name, type, link's target)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = content, target[0]
            else:
                info.size = len(content)
            tar.addfile(info, None if target else io.BytesIO(content))
    return raw.getvalue()


def write_shard(path, members):
    """An `archive`, compressed where its name says so."""
    raw = archive(members)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def samples(values):
    """Members of a shard: pictures of three classes."""
    return [
        member for v in values for member in ((f"s{v:04d}.png", picture(v)), (f"s{v:04d}.cls", str(v % 3).encode()))
    ]
