"""What the planner knows of a model: sizes of its layers and of what stands around them. Torch-free.

`planning.read_facts` reads them from a `config.json`; bytes, seconds and plans are worked out from them alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """Sizes of one decoder layer.

    Attributes:
        hidden: columns of the residual stream (D).
        inner: columns of the gated activation (I).
        heads: query heads; kv_heads: key/value heads; head_dim: columns of each.
        rotary_dim: leading columns of a head that rotate; 0 where the layer has no rotary positions.
        gated: whether the MLP has a gate beside its up projection.
        qkv_parts: matrices that hold q, k and v, 3 or 1.
        gate_up_parts: 2, or 1 where they are one or there is no gate.
        norms: whether a norm stands before attention, behind it, before the MLP and behind it.
        layer_norm: whether norms subtract the mean, as layer norms do.
        norm_bias: whether norms have a bias besides their weight.
        qk_norm: whether q and k are normed; qk_full: over all heads of a token at once.
        parallel: whether both blocks read the layer's input.
        qkv_bias, output_bias, gate_up_bias, down_bias: whether the projections have a bias.
        window: keys that a query sees, None for all before it.
        softcap: whether attention scores are capped.
        expert_inner: columns of `inner` that are of experts. All experts of a layer lie in one tensor, which neither
            quantisation nor adapters on linear layers reach.
        idle_parameters: elements of the layer that a token does not meet: experts it is not sent to, their router.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    gated: bool = True
    qkv_parts: int = 3
    gate_up_parts: int = 2
    norms: tuple[bool, bool, bool, bool] = (True, False, True, False)
    layer_norm: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    qk_full: bool = False
    parallel: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False
    window: int | None = None
    softcap: bool = False
    expert_inner: int = 0
    idle_parameters: int = 0

    @property
    def q_columns(self) -> int:
        """Columns of q, and of the output of attention."""
        return self.heads * self.head_dim

    @property
    def kv_columns(self) -> int:
        """Columns of k, and of v."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_columns(self) -> int:
        """Columns of the fused q, k, v buffer."""
        return self.q_columns + 2 * self.kv_columns

    @property
    def gate_up_columns(self) -> int:
        """Columns of gate and up side by side, or of up alone."""
        return self.inner * (2 if self.gated else 1)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(output columns, input columns) of each group of projections."""
        return {
            "qkv": (self.qkv_columns, self.hidden),
            "output": (self.hidden, self.q_columns),
            "gate_up": (self.gate_up_columns, self.hidden),
            "down": (self.hidden, self.inner),
        }

    def outputs(self, group: str) -> tuple[int, ...]:
        """Output columns of each matrix of a group."""
        if group == "qkv" and self.qkv_parts == 3:
            return self.q_columns, self.kv_columns, self.kv_columns
        parts = self.gate_up_parts if group == "gate_up" else 1
        return (self.matrices[group][0] // parts,) * parts

    @property
    def linear(self) -> LayerFacts:
        """The layer without its experts: the linear layers, which quantisation and adapters reach."""
        if not self.expert_inner:
            return self
        return replace(self, inner=self.inner - self.expert_inner, expert_inner=0, idle_parameters=0)

    @property
    def matrix_parameters(self) -> int:
        """Elements of all projection weights."""
        return sum(rows * columns for rows, columns in self.matrices.values())

    @property
    def small_parameters(self) -> int:
        """Elements of norms and biases."""
        norm = self.hidden * (2 if self.norm_bias else 1)
        # a norm that both blocks share is one module
        standing = 1 if self.parallel else sum(self.norms)
        qk = (self.q_columns + self.kv_columns if self.qk_full else 2 * self.head_dim) if self.qk_norm else 0
        biases = (
            self.qkv_bias * self.qkv_columns
            + self.output_bias * self.hidden
            + self.gate_up_bias * self.gate_up_columns
            + self.down_bias * self.hidden
        )
        return standing * norm + qk + biases


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A whole model.

    Attributes:
        name: as the user called it.
        model_type: of its config.
        layers: from the first to the last.
        vocabulary: rows of embeddings and head (V).
        tied: whether the head is the embedding matrix.
        longest: positions that the model was made for.
        unfused: why its layers are not fused, empty where they are.
        stock_last_norm: whether transformers computes the norm behind the layers, in float32, as it does where any
            layer is not fused.
        other_parameters: elements beside the language model that lie frozen: a vision tower.
    """

    name: str
    model_type: str
    layers: tuple[LayerFacts, ...]
    vocabulary: int
    tied: bool
    longest: int | None = None
    unfused: str = ""
    stock_last_norm: bool = False
    other_parameters: int = 0

    @property
    def hidden(self) -> int:
        """Columns of the residual stream."""
        return self.layers[0].hidden

    @property
    def embedding_parameters(self) -> int:
        """Elements of the embeddings, and of the head where it is a matrix of its own."""
        return self.table_parameters * (1 if self.tied else 2)

    @property
    def table_parameters(self) -> int:
        """Elements of the input embedding."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Elements of everything, the last norm included."""
        layers = sum(
            layer.matrix_parameters + layer.small_parameters + layer.idle_parameters for layer in self.layers
        )
        last_norm = self.hidden * (2 if self.layers[0].norm_bias else 1)
        return layers + self.embedding_parameters + last_norm + self.other_parameters


@dataclass(frozen=True, slots=True)
class Work:
    """How the model trains, and on what.

    Attributes:
        documents: lengths of the documents of a micro-batch, one row without padding.
        supervised: tokens of them that train.
        quantize: `none`, `nf4` or `int8`, how the layers' matrices are held.
        rank: of the LoRA adapters; 0 for full fine-tuning.
        adapted: groups that carry an adapter, of `qkv`, `output`, `gate_up` and `down`.
        dropout: whether adapters drop.
        optimizer: a name of `planning.fit.STATE_BYTES`.
        tile_tokens: tokens beyond which the MLP of a layer that does not keep gate and up is computed in tiles of at
            most as many, None for never; as `models.tiles` has it.
        host_embedding: whether the input embedding lies in pinned host memory.
        itemsize: bytes of the type that everything is computed in.
        trained_itemsize: bytes of a trained parameter, and of its gradient.
    """

    documents: tuple[int, ...]
    supervised: int
    quantize: str = "none"
    rank: int = 16
    adapted: tuple[str, ...] = ("qkv", "output", "gate_up", "down")
    dropout: bool = False
    optimizer: str = "adamw"
    tile_tokens: int | None = 16_384
    host_embedding: bool = False
    itemsize: int = 2
    trained_itemsize: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch (T)."""
        return sum(self.documents)

    @property
    def full(self) -> bool:
        """Whether all weights train."""
        return self.rank == 0

    def ranks(self, layer: LayerFacts, group: str) -> int:
        """Columns of all adapters of a group side by side, 0 where it has none."""
        if group not in self.adapted or (layer.expert_inner and not all(layer.linear.matrices[group])):
            return 0
        return self.rank * len(layer.outputs(group))


def trained_parameters(model: ModelFacts, work: Work) -> int:
    """Elements that train."""
    if work.full:
        return model.parameters - model.other_parameters
    return sum(
        work.ranks(layer, group) * inputs + work.rank * outputs
        for layer in model.layers
        for group, (outputs, inputs) in layer.linear.matrices.items()
        if work.ranks(layer, group)
    )


def embedding_stays(model: ModelFacts, work: Work) -> str:
    """Why the input embedding cannot lie in host memory, empty where it can; `models.host_embedding` moves it."""
    if model.tied:
        return "the input embedding is the head as well"
    if work.full:
        return "the input embedding trains"
    return f"layers are not fused ({model.unfused})" if model.unfused else ""
