"""The version, written once: packaging, the extension's stamp and ``fused_nce.__version__`` all read it here."""

__version__ = "0.2.0"
