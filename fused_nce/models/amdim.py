"""AMDIM as an `nn.Module`: two views in, losses out; no trainer needed."""

from collections.abc import Sequence

from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.losses import AMDIMLoss, MultiscaleMixtureLoss
from fused_nce.models.base import Embedded, Model, check_images, split_views, views_of
from fused_nce.models.encoders.amdim import AMDIMEncoder
from fused_nce.models.encoders.blocks import Init
from fused_nce.models.mixture import Components


class AMDIM(Model):
    """Augmented multiscale Deep InfoMax (arXiv 1906.00910).

    ```
    model = AMDIM(image_size=32, ndf=64, n_rkhs=256)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for view1, view2 in loader:                    # two augmentations of the same images
        optimizer.zero_grad()
        model((view1, view2)).loss.backward()
        optimizer.step()
    ```

    BatchNorm sees the statistics of one view at a time; up to it both views are one batch, unless `use_bn`.

    Args:
        image_size: 32, 64 or 128 px.
        ndf: channels of the first stage.
        n_rkhs: width of the embeddings, at least `4·ndf` (32 px) or `8·ndf`.
        n_depth: layers of each residual block.
        use_bn: BatchNorm inside the blocks.
        init: `"amdim"` (zero-initialised branches) or `"kaiming"`.
        mixture: components in the place of f1 in the loss; 1 is f1 itself.
        loss: called with the tap dictionaries of the two views, which with a mixture have its components "m1" (B, m,
            n_rkhs) too; `AMDIMLoss()`, with a mixture `MultiscaleMixtureLoss()`, if left out.

    Shape:
        batch: (B, 2, 3, H, H), or two tensors (B, 3, H, H), H = `image_size`.

    Raises:
        ValueError: for a size outside these.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        ndf: int = 128,
        n_rkhs: int = 1024,
        n_depth: int = 3,
        use_bn: bool = False,
        init: Init = "amdim",
        mixture: int = 1,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = AMDIMEncoder(
            image_size=image_size, ndf=ndf, n_rkhs=n_rkhs, n_depth=n_depth, use_bn=use_bn, init=init
        )
        mixture = checks.checked_int("mixture", mixture, at_least=1)
        self.components = Components(n_rkhs, mixture) if mixture > 1 else None
        own: nn.Module = MultiscaleMixtureLoss() if mixture > 1 else AMDIMLoss()
        self.loss = own if loss is None else loss
        self.image_size, self.n_rkhs, self.mixture = image_size, n_rkhs, mixture

    def loss_shape(self) -> tuple[list[tuple[int, int]], int] | None:
        """Every pair, in both directions."""
        if not isinstance(self.loss, AMDIMLoss | MultiscaleMixtureLoss):
            return None
        sides = [[int(side) ** 2 for side in pair.split(">")] for pair in self.loss.pairs]
        rows_of = {rows: rows if self.loss.antecedents == "all" else 1 for rows, _ in sides} | {1: self.mixture}
        return [(rows_of[rows], columns) for rows, columns in sides for _ in range(2)], self.n_rkhs

    def encode(
        self,
        x: Tensor,  # (B, 3, H, H) normalised images, H = image_size
    ) -> dict[str, Tensor]:
        """Feature maps of a batch of images.

        Returns:
            `f1 (B, n_rkhs, 1, 1)`, `f5 (B, n_rkhs, 5, 5)` and `f7 (B, n_rkhs, 7, 7)`, the embeddings that the loss
            compares, and `h5`, `h7`, the trunk's maps before their heads (`4·ndf` or `8·ndf` channels).

        Raises:
            TypeError, ValueError: for images of integers, or of another shape.
        """
        check_images(x, self.image_size)
        taps: dict[str, Tensor] = self.encoder(x)
        return taps

    def embed(
        self,
        batch: Tensor | Sequence[Tensor],  # (B, 2, 3, H, H), or two tensors (B, 3, H, H)
    ) -> Embedded:
        """The maps of both views, and with a mixture its components: the arguments of the loss.

        Raises:
            ValueError: if there are not two views of one shape, or only one image (no negatives).
        """
        views = split_views(batch)
        check_images(views[0], self.image_size)
        first, second = self.encoder(views)  # fault: both-views-one
        return self._embedded((first, second))

    def begin(
        self,
        batch: Tensor | Sequence[Tensor],  # (B, 2, 3, H, H), or two tensors (B, 3, H, H)
    ) -> tuple[dict[str, Tensor], ...]:  # f1, f5 and f7 of each view
        """The maps before the output BatchNorms. Without `use_bn` they depend on one image only."""
        views = views_of(batch)
        check_images(views[0], self.image_size)
        taps = self.encoder.before_norms_of(views)
        return tuple({name: tap for name, tap in view.items() if name[0] == "f"} for view in taps)

    def finish(self, begun: Sequence[dict[str, Tensor]], extras: Sequence[Tensor] = ()) -> Embedded:
        """The three BatchNorms, each over all images of a view."""
        first, second = map(self.encoder.normalise, begun)
        return self._embedded((first, second))

    def _embedded(self, taps: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Embedded:
        if self.components is None:
            return Embedded(taps, taps)
        return Embedded(taps, tuple({**maps, "m1": self.components(maps["f1"])} for maps in taps))
