"""The variational autoencoder as an `nn.Module`: images in, losses out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.losses import NCEOutput, gaussian_kl
from fused_nce.losses.common import widened
from fused_nce.models.base import Embedded
from fused_nce.models.coded import Decoded


class VAELoss(nn.Module):
    """‖x − x̂‖² + β·KL(N(μ, σ²) ‖ N(0, 1)), sums over an image and its code, a mean over images, in nats.

    The squared error is −log p(x | x̂), less a constant, of a Gaussian of variance ½ around each pixel.

    Args:
        beta: β; 1 is the bound on the likelihood of an image.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        checks.check_number("beta", beta, at_least=0)
        self.beta = beta

    def forward(
        self,
        images: Tensor,  # (B, 3, H, H)
        made: Tensor,  # (B, 3, H, H)
        mean: Tensor,  # (B, D)
        log_variance: Tensor,  # (B, D)
    ) -> NCEOutput:
        """`nce` is the squared error, `penalty` the weighted divergence; `stats` has both, without the weight."""
        error = (widened(images) - widened(made)).square().flatten(1).sum(1).mean()
        kl = gaussian_kl(mean, log_variance).loss
        stats = {"error": error.detach(), "kl": kl.detach()}
        return NCEOutput(error + self.beta * kl, error, self.beta * kl, stats)


class VAE(Decoded):
    """The variational autoencoder (Kingma, Welling 2013, arXiv:1312.6114), and β-VAE (Higgins et al. 2017).

    ```
    model = VAE(architecture="dcgan32", beta=0.5)
    for images in loader:                          # in [-1, 1]
        optimizer.zero_grad()
        model(images).loss.backward()
        optimizer.step()
    ```

    Y is the mean of the code; its log-variance is a linear layer on the encoder's last hidden one.

    Args:
        architecture: of the encoder, see `DIM`.
        width: multiplies the encoder's channels; 1 is DIM's.
        code: units of Y.
        decoder: channels of the decoder's 4 × 4 map; 512 is DIM's.
        beta: weight of the divergence.
        loss: called with images, the decoder's images, means and log-variances; `VAELoss(beta)` if left out.

    Shape:
        batch: (B, 3, H, H) in [−1, 1], alone or as the one view of a batch.

    Raises:
        TypeError, ValueError: for a setting outside these.
    """

    def __init__(
        self,
        *,
        architecture: str = "dcgan32",
        width: float = 1.0,
        code: int = 64,
        decoder: int = 512,
        beta: float = 1.0,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(architecture, code, width, decoder)
        self.log_variance = nn.Linear(self.encoder.top.fc_units, code)
        own = VAELoss(beta)
        self.loss = own if loss is None else loss

    def embedded(self, images: Tensor) -> Embedded:  # (B, 3, H, H)
        """The taps; the images, those decoded from a sample of each code, and the code's law."""
        taps = self.encode(images)
        mean, log_variance = widened(taps["Y"]), widened(self.log_variance(taps["fc"]))
        # fault: vae-variance-for-deviation
        sampled = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return Embedded((taps,), (images, self.decode(sampled.to(taps["Y"].dtype)), mean, log_variance))
