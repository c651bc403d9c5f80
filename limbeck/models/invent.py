"""A generator of images, from a code (b d) to images (b c h w): the one of DAFL (Chen et al.; ICCV 2019;
arXiv:1904.01186), which CMI and others use too.

A linear layer makes a map of a quarter of the image's size; twice it is enlarged to double size and
convolved. What comes out is squashed by tanh and then normalised over the batch, channel by channel, by a
BatchNorm without weights, so that it has the mean 0 and the spread 1 of data that went through its own
normalisation. The BatchNorms after the convolutions have an eps of 0.8, as in the authors' code.

Departure: sizes that 4 does not divide are rounded up and cut.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Invent(nn.Module):
    """Args: channels and size of the (square) images; codes, the width of a code; width, channels of the
    first map (the authors' 128)."""

    def __init__(self, channels: int = 3, size: int = 32, codes: int = 100, width: int = 128) -> None:
        super().__init__()
        self.codes, self._size, self._grid = codes, size, -(-size // 4)
        self.first = nn.Linear(codes, width * self._grid**2)
        self.norm = nn.BatchNorm2d(width)
        self.middle = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, eps=0.8), nn.LeakyReLU(0.2)
        )
        self.last = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2, eps=0.8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b c h w"]:
        x = self.norm(self.first(z).unflatten(1, (-1, self._grid, self._grid)))
        x = self.middle(F.interpolate(x, scale_factor=2))
        x = self.last(F.interpolate(x, scale_factor=2))
        return x[..., : self._size, : self._size]


MODELS = {"invent": Invent}
