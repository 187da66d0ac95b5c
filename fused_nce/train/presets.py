"""The named settings: data, not code. A preset lists only what differs from the defaults of `config.py`."""

from typing import Any

STL_AUGMENT = {"geometry": "crop", "mean": [0.43, 0.42, 0.39], "std": [0.27, 0.26, 0.27]}
IMAGENET_AUGMENT = {
    "geometry": "crop",
    "jitter": [0.4, 0.4, 0.4, 0.1],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
IMAGENET_OPTIM = {"epochs": 50, "milestones": [30, 45]}

# `default` is amdim-public's train.py, loss and optimiser included, and all the others start from it. `cifar10-small`
# and `stl10-small` are its settings for those sets, `imagenet-small` its recipe for four V100, `imagenet-medium` and
# `imagenet-large` its released models. The encoder sizes of `*-large` are lightning-bolts' too (which trains them with
# eps 1e-7 and, since its clip is not passed on, a clip of 10). `digits` and `cifar10-tiny` are ours.
PAPER_PENALTY = {"penalty": 0.04}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "digits": {
        "model": {"ndf": 32, "n_rkhs": 256, "n_depth": 2},
        "loss": PAPER_PENALTY,
        "augment": {
            "flip_p": 0.0,
            "geometry": "affine",
            "geometry_p": 1.0,
            "jitter": [0.4, 0.4, 0.0, 0.0],
            "gray_p": 0.0,
            "mean": [0.3, 0.3, 0.3],
            "std": [0.35, 0.35, 0.35],
        },
        "optim": {
            "epochs": 80,
            "batch_size": 128,
            "lr": 1e-3,
            "warmup_updates": 50,
            "schedule": "cosine",
        },
        "run": {"log_every": 5},
    },
    "cifar10-tiny": {
        "model": {"ndf": 64, "n_rkhs": 256, "n_depth": 2},
        "loss": PAPER_PENALTY,
        "optim": {"epochs": 3, "batch_size": 128, "lr": 1e-3, "warmup_updates": 100, "schedule": "cosine"},
    },
    "cifar10-small": {"model": {"ndf": 128, "n_rkhs": 1024, "n_depth": 3}},
    "cifar10-large": {"model": {"ndf": 320, "n_rkhs": 1280, "n_depth": 10}},
    "stl10-small": {"model": {"image_size": 64, "ndf": 128, "n_rkhs": 1024, "n_depth": 3}, "augment": STL_AUGMENT},
    "stl10-large": {"model": {"image_size": 64, "ndf": 192, "n_rkhs": 1536, "n_depth": 8}, "augment": STL_AUGMENT},
    "imagenet-small": {
        "model": {"image_size": 128, "ndf": 192, "n_rkhs": 1536, "n_depth": 8},
        "augment": IMAGENET_AUGMENT,
        "optim": IMAGENET_OPTIM | {"batch_size": 480},
    },
    "imagenet-medium": {
        "model": {"image_size": 128, "ndf": 256, "n_rkhs": 2048, "n_depth": 10},
        "augment": IMAGENET_AUGMENT,
        "optim": IMAGENET_OPTIM,
    },
    "imagenet-large": {
        "model": {"image_size": 128, "ndf": 320, "n_rkhs": 2560, "n_depth": 10},
        "augment": IMAGENET_AUGMENT,
        "optim": IMAGENET_OPTIM,
    },
}
