"""SigLIP's vision encoder (Zhai et al., 2023; Tschannen et al., 2025), as nanoVLM has it.

Patches of an image in, one hidden state for each out: patch embedding with learned positions,
pre-norm blocks, final norm. It attends in both directions, so it has no cache and no part in the
language model's step. Other image sizes than the one it was trained on are not its business.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvist.errors import ConfigError


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer over square images.

    Args:
        image_size: pixels of a side, a multiple of `patch_size`.
        patch_size: pixels of a patch's side.
        class_token: a learned first token stands for the whole image, and only its hidden state
            comes out.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6
    class_token: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that do not divide."""
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"the vision encoder's hidden size {self.hidden_size} is not a multiple of its "
                f"{self.num_heads} heads"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"the vision encoder's image size {self.image_size} is not a multiple of its patch "
                f"size {self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size


class PatchEmbedding(nn.Module):
    """A patch's pixels to a vector, plus the vector learned for its place."""

    def __init__(self, config: VisionConfig) -> None:
        """A convolution that steps from patch to patch."""
        super().__init__()
        hidden, patch = config.hidden_size, config.patch_size
        self.conv = nn.Conv2d(3, hidden, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden)) if config.class_token else None
        places = config.grid**2 + config.class_token
        self.position_embedding = nn.Parameter(torch.zeros(1, places, hidden))

    def forward(self, pixels: Tensor) -> Tensor:
        """`[n, 3, H, W]` -> `[n, places, hidden]`, patches row by row."""
        x = self.conv(pixels).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1)
        return x + self.position_embedding  # type: ignore[no-any-return]


class VisionAttention(nn.Module):
    """Multi-head attention of every patch to every patch."""

    def __init__(self, config: VisionConfig) -> None:
        """Queries, keys and values come from one projection."""
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, places, hidden]` -> the same."""
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [n, heads, places, head_dim]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x))), with GELU's tanh approximation."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        """Two projections."""
        super().__init__()
        self.fc1 = nn.Linear(hidden, intermediate)
        self.fc2 = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, places, hidden]` -> the same."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class VisionBlock(nn.Module):
    """One layer: norm, attention, norm, MLP, with the residual stream around each."""

    def __init__(self, config: VisionConfig) -> None:
        """All layers are alike."""
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, places, hidden]` -> the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class VisionEncoder(nn.Module):
    """The tower without its pooling head, which a language model has no use for."""

    def __init__(self, config: VisionConfig) -> None:
        """Build the modules; weights are the loader's business."""
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixels: `[n, 3, image_size, image_size]`, in the encoder's dtype.

        Returns:
            `[n, patches, hidden]`, or `[n, hidden]` of the class token where there is one.
        """
        x = self.patch_embedding(pixels)
        for block in self.blocks:
            x = block(x)
        if self.config.class_token:
            x = x[:, 0]
        return self.norm(x)  # type: ignore[no-any-return]
