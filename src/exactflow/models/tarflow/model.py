"""TarFlow: an autoregressive flow of transformer blocks over image patches.

Zhai et al., Normalizing Flows are Capable Generative Models, arXiv 2412.06329. Patches are tokens;
every block maps token t by an affine function whose shift and log-scale a causal transformer reads
off the tokens before it (eq. 4), and every other block runs over the tokens backwards. Written from
the paper's mathematics.
"""

from collections.abc import Iterator
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from exactflow.core.density_flow import DensityFlow
from exactflow.core.model import ParameterRule
from exactflow.core.prior import DiagonalGaussian
from exactflow.core.shapes import GreyLevels, Images, Labels, PerSample, Tokens
from exactflow.core.transform import AutoregressiveTransform, Decoding, Solver, Transform
from exactflow.models.tarflow.config import TarFlowConfig
from exactflow.nn.decoding import DecodingCache
from exactflow.nn.transformer import NetworkWeights, TransformerLayer, causal_network
from exactflow.parallel import shared_batch as batch

EMBEDDING_STD = 0.01  # initial spread of position and class embeddings
VARIANCE_MOMENTUM = 0.1  # weight of a new batch in the volume-preserving prior's variance


@final
class TokenMixing(Transform):
    """z = (I + N) x for every token, N learned and strictly lower triangular, 0 at first.

    The linear dependence between the numbers of a token that is the same in all tokens: the network
    need not predict it. The determinant is 1.

    Args:
        dim: numbers of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, x: Tokens, label: Labels | None = None) -> tuple[Tokens, PerSample]:
        with torch.autocast(x.device.type, enabled=False):
            return x + x @ self._coupling(x).mT, x.new_zeros(len(x))

    def inverse(self, z: Tokens, label: Labels | None = None) -> Tokens:
        """The x of z, by forward substitution."""
        upper = self._coupling(z).mT
        return torch.linalg.solve_triangular(upper, z, upper=True, unitriangular=True, left=False)

    def _coupling(self, like: Tensor) -> Float[Tensor, "dim dim"]:
        return self.weight.tril(-1).to(like.dtype)


@final
class TarFlowBlock(AutoregressiveTransform):
    """One block in generation order: z_t = g(x_t; theta_t(x_<t)), theta a causal transformer's.

    g is affine in the paper (eq. 4), z_t = (x_t - mu_t) exp(-alpha_t). Token 0 is not changed,
    unless a start token gives its parameters.

    Args:
        config: the model's configuration.
        reverse: whether generation order is the image's order backwards.
    """

    def __init__(self, config: TarFlowConfig, reverse: bool) -> None:
        super().__init__()
        self.config = config
        self.reverse = reverse
        self.num_tokens, self.predicts_first = config.num_tokens, config.start_token
        self.conditional = config.make_conditional()
        channels, dim = config.width, config.token_dim
        self.input = nn.Linear(dim, channels)
        self.position = nn.Parameter(torch.randn(self.num_tokens, channels) * EMBEDDING_STD)
        self.class_embedding = None
        if config.num_classes:
            table = torch.randn(config.num_classes, channels) * EMBEDDING_STD
            self.class_embedding = nn.Parameter(table)
        self.layers = nn.ModuleList(
            TransformerLayer(channels) for _ in range(config.layers_per_block)
        )
        self.norm = nn.RMSNorm(channels) if config.final_norm else None
        size = dim if config.volume_preserving else self.conditional.size
        self.output = nn.Linear(channels, size)
        nn.init.zeros_(self.output.weight)  # the bias keeps its default: near, not at, identity
        self.start_token = None
        if config.start_token:
            self.start_token = nn.Parameter(torch.randn(dim) * EMBEDDING_STD)
            if not config.volume_preserving:
                with torch.no_grad():
                    self.output.bias.copy_(self.conditional.start)

    def arrange(self, tokens: Tokens) -> Tokens:
        """Image order to generation order and back: the permutation is its own inverse."""
        return tokens.flip(1) if self.reverse else tokens

    def new_cache(self, x: Tokens, decoding: Decoding | None = None) -> DecodingCache:
        how = decoding or Decoding()
        head_dim, tokens = self.config.head_dim, self.num_tokens - (not self.predicts_first)
        return DecodingCache(
            self._network, head_dim, len(x), tokens, how.dtype, how.step, how.memory
        )

    def conditioner(
        self,
        x: Float[Tensor, "batch stop dim"],
        label: Labels | None = None,
        cache: DecodingCache | None = None,
        start: int = 0,
        temperature: PerSample | None = None,
    ) -> Float[Tensor, "batch window size"]:
        """See `AutoregressiveTransform.conditioner`.

        The network's output at a token parametrises the next one, at the start token the first.
        """
        stop = x.shape[1]
        if self.start_token is not None:  # position t holds token t - 1
            token = self.start_token.to(x.dtype)
            if cache is None:
                read = torch.cat([token.expand(len(x), 1, -1), x[:, :-1]], dim=1)
            else:
                read = cache.behind(token, x, start)
            first, missing = start, 0
        else:  # position t holds token t; the last one is evaluated where there is no cache
            read, first, missing = x if cache is None else x[:, :-1], max(start - 1, 0), 1
        if stop == missing:  # token 0 has nothing before it
            return self._theta(x.new_zeros(len(x), 1, self.output.out_features))
        if cache is None:  # N positions suit fast kernels better than N - 1
            condition = self._condition(label)[:, :stop]
            head_dim = self.config.head_dim
            raw = causal_network(self._network, read, condition, head_dim, temperature)
        else:
            cache.condition(lambda: self._condition(label))
            raw = cache(read, first, temperature)
        raw = raw.to(x.dtype).view(len(x), read.shape[1] - first, -1)
        if start == 0 and missing:  # no change of token 0; the raw output 0 stands for it
            raw = F.pad(raw, (0, 0, 1, stop - 1 - raw.shape[1]))
        return self._theta(raw)

    @property
    def _network(self) -> NetworkWeights:
        return NetworkWeights(
            self.input.weight,
            self.input.bias,
            tuple(layer.weights() for layer in self.layers if isinstance(layer, TransformerLayer)),
            None if self.norm is None else self.norm.weight,
            self.output.weight,
            self.output.bias,
        )

    def _condition(self, label: Tensor | None) -> Float[Tensor, "batch_or_1 tokens channels"]:
        """Position embedding in generation order plus the class vector, the mean when dropped."""
        position = self.arrange(self.position[None])
        if self.class_embedding is None:
            return position
        dropped = self.class_embedding.mean(0, keepdim=True)
        if label is None:
            return position + dropped
        table = torch.cat([self.class_embedding, dropped])
        return position + table[label][:, None]

    def _theta(self, raw: Tensor) -> Tensor:
        """Parameters from raw outputs, in the dtype of the tokens, which is never below float32."""
        if self.config.soft_clip:
            raw = self.config.soft_clip * torch.tanh(raw / self.config.soft_clip)
        if self.config.volume_preserving:  # shifts only
            return torch.cat([torch.zeros_like(raw), raw], dim=-1)
        return self.conditional.constrain(raw)


@final
class TarFlow(DensityFlow):
    """z = f_T o ... o f_1(x), blocks f over patches in alternating directions (eq. 3).

    With affine blocks, z_t = (x_t - mu_t(x_<t)) exp(-alpha_t(x_<t)) for every token t, and

        ln p(x) = ln N(z; 0, I) - sum over blocks and tokens of alpha_t.

    Latents keep the published token layout (batch, N, C P P), in the order of the image.

    >>> model = TarFlow(TarFlowConfig((1, 8, 8), patch_size=2, width=64, blocks=2))
    >>> z, log_abs_det = model.encode(torch.zeros(3, 1, 8, 8))
    >>> tuple(z.shape), tuple(log_abs_det.shape)
    ((3, 16, 4), (3,))
    """

    kind: ClassVar[str] = "tarflow"
    parameter_rules: ClassVar[tuple[ParameterRule, ...]] = (
        ParameterRule(r"blocks\.\d+\.layers\.\d+\.qkv\.weight", matrices=3),
        ParameterRule(r"blocks\.\d+\.layers\.\d+\.(proj|expand|contract)\.weight", matrices=1),
    )

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            TarFlowBlock(config, reverse=index % 2 == 1) for index in range(config.blocks)
        )
        self.mixings = nn.ModuleList(
            TokenMixing(config.token_dim) for _ in range(config.blocks if config.mixing else 0)
        )
        self.register_buffer("variance", torch.ones(config.num_tokens, config.token_dim))

    @property
    def stages(self) -> list[nn.Module]:
        return list(self.blocks)

    @property
    def prior(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.get_buffer("variance"))

    @property
    def _steps(self) -> list[tuple[TokenMixing | None, TarFlowBlock]]:
        """From data to latent."""
        blocks = [block for block in self.blocks if isinstance(block, TarFlowBlock)]
        mixings = [mixing for mixing in self.mixings if isinstance(mixing, TokenMixing)]
        return list(zip(mixings or [None] * len(blocks), blocks, strict=True))

    def patchify(self, x: Images) -> Tokens:
        """Patches in raster order; within one, channel slowest, then row, then column."""
        return F.pixel_unshuffle(x, self.config.patch_size).flatten(2).transpose(1, 2)

    def unpatchify(self, tokens: Tokens) -> Images:
        """Inverse of `patchify`."""
        _, height, width = self.event_shape
        side = self.config.patch_size
        grid = tokens.transpose(1, 2).unflatten(2, (height // side, width // side))
        return F.pixel_shuffle(grid, side)

    def encode(self, x: Images, label: Labels | None = None) -> tuple[Tokens, PerSample]:
        """See `Flow.encode`. Raises ValueError for a wrong shape, dtype or label."""
        self.check_input(x, label)
        tokens = self.patchify(x).to(torch.promote_types(x.dtype, torch.float32))
        log_abs_det = tokens.new_zeros(len(x))
        for mixing, block in self._steps:
            if mixing is not None:
                tokens, _ = mixing(tokens)
            moved, change = block(block.arrange(tokens), label)
            tokens, log_abs_det = block.arrange(moved), log_abs_det + change
        return tokens, log_abs_det

    @torch.no_grad()
    def trajectory(
        self, z: Tokens, label: Labels | None = None, *, solver: Solver | None = None
    ) -> Iterator[Images]:
        """See `Flow.trajectory`: blocks in reverse order. Raises ValueError for a wrong shape."""
        self.check_input(z, label, latent=True)
        tokens = z
        yield self.unpatchify(tokens)
        for mixing, block in reversed(self._steps):
            v = block.arrange(tokens)
            u = block.inverse(v, label) if solver is None else solver(block, v, label)
            tokens = block.arrange(u)
            if mixing is not None:
                tokens = mixing.inverse(tokens)
            yield self.unpatchify(tokens)

    def loss(
        self,
        images: GreyLevels,
        label: Labels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PerSample:
        """-ln p(x) / D in nats per dimension under N(0, I) (eq. 6, with its constant).

        In training, labels are dropped with probability `label_dropout`, and a volume-preserving
        model updates its prior's variance, which the loss itself does not contain.
        """
        x = self.add_noise(images, generator)
        z, log_abs_det = self.encode(x, self.drop_labels(label, generator))
        if self.config.volume_preserving and self.training:
            second_moment = batch.mean(z.detach().square().mean(0))
            self.get_buffer("variance").lerp_(second_moment, VARIANCE_MOMENTUM)
        standard = DiagonalGaussian(torch.ones_like(z[0]))
        return -(standard.log_prob(z) + log_abs_det) / self.dims
