"""The readers of images by the names that they had before `fused_nce.train.data`."""

from fused_nce.train.data.image_source import Damage, ImageSource, fit, to_rgb

FolderSource = ShardSource = ImageSource

__all__ = ["Damage", "FolderSource", "ImageSource", "ShardSource", "fit", "to_rgb"]
