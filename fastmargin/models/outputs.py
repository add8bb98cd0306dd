"""From the last map to the embedding: the output options of ArcFace (arXiv 1801.07698v1, section 3.2.2).

    A  GP                     the embedding is the channels of the last map
    B  GP - FC
    C  GP - FC - BN
    D  GP - FC - BN - PReLU
    E  BN - dropout - FC - BN       the paper's choice; the FC sees the whole map

GP is global average pooling. The gamma of the last BN of C, D and E is fixed at 1 (`last_norm`).
"""

from torch import nn

from fastmargin.models.layers import last_norm, linear

DROPOUT = 0.4  # of option E, as in the paper


def output(option: str, channels: int, size: tuple[int, int], dim: int, dropout: float | None = None) -> nn.Sequential:
    """Layers from a map [B, channels, *size] to embeddings [B, dim].

    dropout: share of the features dropped in training, for option E alone; None: 0.4. ValueError for an
    unknown option, a dropout outside [0, 1) or with another option, and A with another dim than channels.
    """
    if option == "E":
        return whole_map(channels, size, dim, DROPOUT if dropout is None else dropout)
    if option not in ("A", "B", "C", "D"):
        raise ValueError(f"model.output is {option!r}; want one of A, B, C, D, E")
    if dropout is not None:
        raise ValueError(f"model.dropout is {dropout}; want none: output {option} has no dropout, E has")
    if option == "A" and dim != channels:
        raise ValueError(f"dim is {dim}; want {channels}: output A has no layer of its own")
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if option != "A":
        layers.append(linear(channels, dim, bias=option == "B"))
    if option in ("C", "D"):
        layers.append(last_norm(dim))
    if option == "D":
        layers.append(nn.PReLU(dim))
    return nn.Sequential(*layers)


def whole_map(channels: int, size: tuple[int, int], dim: int, dropout: float) -> nn.Sequential:
    """Option E. The FC has no bias: the last BN has one."""
    if not 0 <= dropout < 1:
        raise ValueError(f"model.dropout is {dropout}; want a share from 0 to below 1")
    flatten = nn.Sequential(nn.Dropout(dropout), nn.Flatten())
    height, width = size
    return nn.Sequential(
        nn.BatchNorm2d(channels), flatten, linear(channels * height * width, dim, bias=False), last_norm(dim)
    )
