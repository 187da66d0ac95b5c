"""The methods, one file each: a `Method` with the settings, the presets and what the loop asks of a method."""

import importlib

from fused_nce.train.method import Method

# name on the command line: module and class, imported when it is asked for.
METHODS = {
    "amdim": ("amdim", "AMDIMConfig"),
    "moco": ("moco", "MoCoConfig"),
    "simclr": ("simclr", "SimCLRConfig"),
    "supcon": ("supcon", "SupConConfig"),
    "distil": ("distil", "DistilConfig"),
    "npid": ("npid", "NPIDConfig"),
    "dim": ("dim", "DIMConfig"),
    "dim-generator": ("dim_generator", "DIMGeneratorConfig"),
    "vae": ("vae", "VAEConfig"),
    "aae": ("aae", "AAEConfig"),
    "bigan": ("bigan", "BiGANConfig"),
    "nat": ("nat", "NATConfig"),
    "cpc": ("cpc", "CPCConfig"),
    "cpc-vision": ("cpc_vision", "CPCVisionConfig"),
}


def get(name: object) -> type[Method]:
    """The settings of a method.

    Raises:
        ValueError: for a name that is none.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method: must be one of {', '.join(METHODS)}, got {'nothing' if name is None else name}")
    module, settings = METHODS[name]
    found: type[Method] = getattr(importlib.import_module(f"{__name__}.{module}"), settings)
    return found
