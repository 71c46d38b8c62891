"""Models in training mode, each as a training loop has it, for ``scripts/zoo.py``.

A row of ``ROWS`` makes a model, its inputs and the terms of its loss, by random weights alone. The
inputs are small, and so is every model whose size is a matter of options.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

CLASSES, BATCH, SIZE = 4, 10, 32


@dataclass(frozen=True, eq=False)
class Loop:
    """A model in training mode, and how a loop comes to its loss.

    The loss is the mean of ``values`` of the output, or their sum over ``divisor``; or, where
    there are no values, ``loss`` of the ``predictions``.
    """

    model: nn.Module
    forward: Callable[[nn.Module], Any]
    groups: Tensor
    values: Callable[[Any], Tensor] | None = None
    predictions: Callable[[Any], Tensor] | None = None  # then the loop is watched by through()
    loss: Callable[[Any], Tensor] | None = None
    class_dim: int = -1
    divisor: float | None = None


@dataclass(frozen=True)
class Row:
    """A model of the table."""

    name: str
    make: Callable[[], Loop]
    optimizer: str = "SGD"
    options: dict[str, Any] = field(default_factory=dict)
    needs: str = ""  # a package beside torch
    double: bool = True  # whether it can be computed in float64
    tolerance: float = 1e-6  # of shares
    refused: str = ""  # what a refusal says
    rest: bool = False  # whether a part of the gradient is in no class
    moved: bool = True  # whether the step can be foretold
    note: str = ""


# Loops ---


def labels_of(number: int = BATCH) -> Tensor:
    """Return labels of which class 0 has the most."""
    return torch.arange(number) * 3 % 7 % CLASSES


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def classifier(
    model: nn.Module, *shape: int, of: Callable[[Any], Tensor] = lambda out: out
) -> Loop:
    """Return a loop of a classifier with inputs of a shape, ``(batch, *shape)``."""
    x, y = torch.randn(BATCH, *(shape or (3, SIZE, SIZE))), labels_of()
    return Loop(model, lambda m: m(x), y, lambda out: entropy(of(out), y))


def small(body: nn.Module, width: int = 16, inputs: int = 8) -> Loop:
    """Return a loop of a body of ``(batch, width)`` to the same between two linear layers."""
    ends = nn.Linear(inputs, width), nn.Linear(width, CLASSES)
    return classifier(nn.Sequential(ends[0], nn.Tanh(), body, ends[1]), inputs)


# torch ---


class Recurrent(nn.Module):
    """The last state of a recurrent network of two layers with dropout."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body = kind(6, 16, num_layers=2, dropout=0.3, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Gnn(nn.Module):
    """Two rounds of means over neighbours, by a dense adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        mean = adjacency / adjacency.sum(1, keepdim=True)
        return self.two(mean @ F.dropout(self.one(mean @ x).relu(), 0.2, self.training))


def gnn() -> Loop:
    nodes = 24
    x, near = torch.randn(nodes, 6), (torch.rand(nodes, nodes) < 0.2).to(torch.get_default_dtype())
    near, y = ((near + near.T + torch.eye(nodes)) > 0).to(near), labels_of(nodes)
    y[::5] = -1  # nodes without a label
    known = (y >= 0).to(x)
    return Loop(
        Gnn(), lambda m: m(x, near), y,
        lambda out: entropy(out, y.clamp(min=0)) * known, divisor=float(known.sum()),
    )  # fmt: skip


class UNet(nn.Module):
    """One step down, one up, with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        low = self.up(self.deep(F.max_pool2d(high, 2)))
        return self.head(torch.cat([high, low], 1))


def by_pixel(model: nn.Module, size: int = 16, key: str = "") -> Loop:
    x, y = torch.randn(4, 3, size, size), labels_of(4 * size * size).reshape(4, size, size)
    return Loop(
        model, lambda m: m(x)[key] if key else m(x), y, lambda out: entropy(out, y),
        predictions=lambda out: out, loss=lambda out: F.cross_entropy(out, y), class_dim=1,
    )  # fmt: skip


def multi_label() -> Loop:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 5))
    x, y = torch.randn(BATCH, 8), (torch.rand(BATCH, 5) < 0.4).to(torch.get_default_dtype())
    bce = F.binary_cross_entropy_with_logits
    groups = torch.arange(5).expand(BATCH, 5)
    return Loop(model, lambda m: m(x), groups, lambda out: bce(out, y, reduction="none"))


def by_sign() -> Loop:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    x, y = torch.randn(BATCH, 8), labels_of() % 2
    bce, target = F.binary_cross_entropy_with_logits, y.to(torch.get_default_dtype())
    return Loop(model, lambda m: m(x)[:, 0], y, lambda out: bce(out, target, reduction="none"))


class Experts(nn.Module):
    """Each row goes through its two best experts of four."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores, best = self.gate(x).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, place = (best == number).nonzero(as_tuple=True)
            if len(row):
                weight = scores.softmax(1)[row, place, None]
                out = out.index_add(0, row, weight * expert(x[row]).relu())
        return out


class Checkpointed(nn.Module):
    """A body that is computed twice."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


class Tied(nn.Module):
    """A language model whose last layer is its embedding."""

    def __init__(self, sparse: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(20, 16, sparse=sparse), nn.Linear(16, 16)
        self.head = nn.Linear(16, 20)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)).tanh())


def words(model: nn.Module) -> Loop:
    ids = torch.randint(0, 20, (4, 9))
    after = ids[:, 1:]
    return Loop(model, lambda m: m(ids[:, :-1]), after % 3, lambda out: entropy(out.mT, after))


class Keeps(nn.Module):
    """It keeps what it computed, with the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(16, 16), []

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [*self.kept[-1:], out := self.layer(x).relu()]
        return out


class Locked(nn.Module):
    """It has a lock, which can be neither copied nor pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lock = nn.Linear(16, 16), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.layer(x).relu()


class InDict(nn.Module):
    """Its output is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": (h := self.body(x).relu()), "logits": self.head(h)}


def frozen() -> Loop:
    loop = small(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()))
    for p in loop.model[0].parameters():
        p.requires_grad_(False)
    return loop


def quantised() -> Loop:
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import get_default_qat_qconfig

    return small(
        nn.Sequential(Linear(16, 16, qconfig=get_default_qat_qconfig("fbgemm")), nn.ReLU())
    )


def triplet() -> Loop:
    """Return a loop whose terms are anchors, each against the batch's others."""
    model, y = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6)), labels_of()
    x, same = torch.randn(BATCH, 8), y[:, None] == y

    def values(out: Tensor) -> Tensor:
        apart = (out[:, None] - out).pow(2).sum(-1)
        far = apart.masked_fill(~same, -1.0).amax(1)
        near = apart.masked_fill(same, 1e9).amin(1)
        return (far - near + 1.0).relu()

    return Loop(model, lambda m: m(x), y, values)


def contrastive() -> Loop:
    """Return a loop whose loss of all embeddings has no terms that are an example's own."""
    model, y = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 6)), labels_of()
    x, same = torch.randn(BATCH, 8), (y[:, None] == y).to(torch.get_default_dtype())

    def loss(out: Tensor) -> Tensor:
        near = F.normalize(out, dim=1)
        return -(same * (near @ near.T / 0.5).log_softmax(1)).mean()

    return Loop(model, lambda m: m(x), y, predictions=lambda out: out, loss=loss)


def two_heads() -> Loop:
    """Return a loop whose loss has a penalty that is of no class."""
    loop = small(nn.Linear(16, 16))
    x, y, model = torch.randn(BATCH, 8), loop.groups, loop.model

    def forward(m: nn.Module) -> tuple[Tensor, Tensor]:
        return m(x), sum(p.pow(2).sum() for p in m.parameters())

    return Loop(
        model, forward, y, lambda out: entropy(out[0], y), predictions=lambda out: out[0],
        loss=lambda out: F.cross_entropy(out[0], y) + 1e-2 * out[1],
    )  # fmt: skip


def autocast() -> Loop:
    loop = classifier(UNet())
    x, y = torch.randn(4, 3, 16, 16), labels_of(4 * 16 * 16).reshape(4, 16, 16)

    def forward(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    return Loop(loop.model, forward, y, lambda out: entropy(out.float(), y))


def bfloat16() -> Loop:
    model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, CLASSES))
    x, y = torch.randn(BATCH, 8).bfloat16(), labels_of()
    return Loop(model.bfloat16(), lambda m: m(x), y, lambda out: entropy(out.float(), y))


def compiled() -> Loop:
    import torch._functorch.config as config

    config.donated_buffer = False  # before the first call: the graph is used once per class
    torch.compiler.reset()
    loop = small(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)))
    model = torch.compile(loop.model, backend="aot_eager")
    return Loop(model, loop.forward, loop.groups, loop.values)


def scripted() -> Loop:
    loop = small(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    torch.jit.set_fusion_strategy([])  # else a first run is not the second to the bit
    return Loop(torch.jit.script(loop.model), loop.forward, loop.groups, loop.values)


class FullyShardedDataParallel(nn.Sequential):
    """Named as torch's, which needs several processes."""


class GradSampleModule(nn.Sequential):
    """Named as Opacus'."""


def wrapped(kind: Callable[[nn.Module], nn.Module]) -> Loop:
    loop = small(nn.Linear(16, 16))
    return Loop(kind(loop.model), loop.forward, loop.groups, loop.values)


# torchvision ---


def vision(name: str, *, size: int = SIZE, **options: Any) -> Loop:
    from torchvision import models

    return classifier(getattr(models, name)(num_classes=CLASSES, **options), 3, size, size)


def vgg() -> Loop:
    from torchvision.models import vgg

    model = vgg.VGG(vgg.make_layers([16, "M", 32, "M"], batch_norm=True), CLASSES)
    model.classifier = nn.Sequential(
        nn.Linear(32 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, CLASSES)
    )
    return classifier(model)


def convnext() -> Loop:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    return classifier(ConvNeXt(blocks, stochastic_depth_prob=0.2, num_classes=CLASSES))


def swin() -> Loop:
    from torchvision.models import SwinTransformer

    return classifier(
        SwinTransformer(
            [2, 2],
            16,
            [2, 2],
            [2, 4],
            [4, 4],
            dropout=0.1,
            stochastic_depth_prob=0.2,
            num_classes=CLASSES,
        )  # fmt: skip
    )


def vit() -> Loop:
    from torchvision.models import VisionTransformer

    return classifier(VisionTransformer(32, 8, 2, 2, 32, 64, dropout=0.1, num_classes=CLASSES))


def densenet() -> Loop:
    from torchvision.models import DenseNet

    return classifier(DenseNet(8, (2, 2, 2), 16, drop_rate=0.1, num_classes=CLASSES))


def googlenet() -> Loop:
    loop = vision("googlenet", size=64, init_weights=False)
    y = loop.groups

    def values(out: Any) -> Tensor:
        aux = entropy(out.aux_logits1, y) + entropy(out.aux_logits2, y)
        return entropy(out.logits, y) + 0.3 * aux

    return Loop(loop.model, loop.forward, y, values)


def segmentation() -> Loop:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return by_pixel(
        lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES), 32, "out"
    )


# timm ---


def timm(name: str, *, of: Callable[[Any], Tensor] = lambda out: out, **options: Any) -> Loop:
    from timm import create_model

    model = create_model(name, pretrained=False, num_classes=CLASSES, **options)
    return classifier(model.train(), of=of)


def distilled() -> Loop:
    loop = timm("deit_tiny_distilled_patch16_224", img_size=SIZE, depth=3)
    y, model = loop.groups, loop.model
    model.set_distilled_training(True)
    return Loop(model, loop.forward, y, lambda out: entropy(out[0], y) + entropy(out[1], y))


# transformers ---

TINY = {"vocab_size": 50, "num_labels": CLASSES}
WIDTH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def transformer(name: str, **options: Any) -> nn.Module:
    """Return a model by a tiny configuration, in training mode."""
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**options)).train()


def text(model: nn.Module, own_loss: bool = False) -> Loop:
    """Return a loop of a classifier of texts with padding."""
    ids, y = torch.randint(5, 50, (BATCH, 12)), labels_of()
    there = torch.arange(12) < torch.randint(4, 13, (BATCH, 1))
    given = {"input_ids": ids, "attention_mask": there.long()}
    if not own_loss:
        return Loop(model, lambda m: m(**given), y, lambda out: entropy(out.logits, y))
    return Loop(
        model, lambda m: m(**given, labels=y), y, lambda out: entropy(out.logits, y),
        predictions=lambda out: out.logits, loss=lambda out: out.loss,
    )  # fmt: skip


def tagging(model: nn.Module, own_loss: bool) -> Loop:
    """Return a loop that tags tokens, of which those labelled -100 are padding."""
    ids, y = torch.randint(5, 50, (6, 12)), labels_of(72).reshape(6, 12)
    there = torch.arange(12) < torch.randint(4, 13, (6, 1))
    y = y.masked_fill(~there, -100)
    given = {"input_ids": ids, "attention_mask": there.long()}
    if own_loss:
        return Loop(
            model, lambda m: m(**given, labels=y), y, lambda out: entropy(out.logits.mT, y),
            predictions=lambda out: out.logits, loss=lambda out: out.loss,
            divisor=float(there.sum()),
        )  # fmt: skip
    return Loop(
        model, lambda m: m(**given), y, lambda out: entropy(out.logits.mT, y),
        divisor=float(there.sum()),
    )  # fmt: skip


def language(model: nn.Module) -> Loop:
    """Return a loop of a language model; the groups are thirds of the vocabulary."""
    ids = torch.randint(0, 50, (4, 12))
    after = ids[:, 1:]
    return Loop(
        model, lambda m: m(input_ids=ids), after // 17,
        lambda out: entropy(out.logits[:, :-1].mT, after),
    )  # fmt: skip


def seq2seq() -> Loop:
    model = transformer(
        "T5ForConditionalGeneration", vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2,
        num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    ids, target = torch.randint(1, 50, (6, 12)), torch.randint(1, 50, (6, 7))
    start = F.pad(target[:, :-1], (1, 0))
    return Loop(
        model, lambda m: m(input_ids=ids, decoder_input_ids=start), target // 17,
        lambda out: entropy(out.logits.mT, target),
    )  # fmt: skip


def checkpointed_text() -> Loop:
    model = transformer("RobertaForSequenceClassification", **TINY, **WIDTH)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return text(model)


def pictures(name: str) -> Loop:
    model = transformer(name, image_size=32, patch_size=8, num_labels=CLASSES, **WIDTH)
    return classifier(model, of=lambda out: out.logits)


def mixture() -> Loop:
    """Return a loop of a mixture of experts, whose balance of experts is in the loss."""
    model = transformer(
        "MixtralForCausalLM", vocab_size=50, **WIDTH, num_key_value_heads=2, num_local_experts=4,
        output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    ids = torch.randint(0, 50, (4, 12))
    after = F.pad(ids[:, 1:], (0, 1), value=-100)
    return Loop(
        model, lambda m: m(input_ids=ids, labels=ids), after.div(17, rounding_mode="floor"),
        lambda out: entropy(out.logits.mT, after), divisor=4 * 11.0,
        predictions=lambda out: out.logits, loss=lambda out: out.loss,
    )  # fmt: skip


def lora() -> Loop:
    from peft import LoraConfig, get_peft_model

    model = transformer("BertForSequenceClassification", **TINY, **WIDTH)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], lora_dropout=0.1)
    return text(get_peft_model(model, config).train())


MOMENTUM = {"momentum": 0.9, "weight_decay": 1e-3}
ROWS = [
    # torch alone: the sample of the tests
    Row("U-Net, BatchNorm, by pixel", lambda: by_pixel(UNet()), options=MOMENTUM),
    Row("LSTM, dropout", lambda: classifier(Recurrent(nn.LSTM), 7, 6), "Adam"),
    Row("GRU, dropout", lambda: classifier(Recurrent(nn.GRU), 7, 6), "RMSprop"),
    Row("graph network, by node", gnn, "AdamW"),
    Row("multi-label, by label", multi_label, options={"momentum": 0.9, "nesterov": True}),
    Row("one logit, by sign", by_sign, "Adagrad"),
    Row("mixture of experts, top 2", lambda: small(Experts()), "NAdam"),
    Row("checkpoint, non-reentrant", lambda: small(Checkpointed(False)), "Adamax"),
    Row("checkpoint, reentrant", lambda: small(Checkpointed(True)),
        refused="checkpoint with use_reentrant=False"),
    Row("tied embedding", lambda: words(Tied()), "AdamW", {"weight_decay": 0.1}),
    Row("sparse embedding", lambda: words(Tied(sparse=True, tied=False))),
    Row("sparse embedding, momentum", lambda: words(Tied(sparse=True, tied=False)),
        options={"momentum": 0.9}),
    Row("weight_norm", lambda: small(parametrizations.weight_norm(nn.Linear(16, 16))), "RAdam"),
    Row("spectral_norm", lambda: small(parametrizations.spectral_norm(nn.Linear(16, 16))), "Adam"),
    Row("orthogonal", lambda: small(parametrizations.orthogonal(nn.Linear(16, 16))), "ASGD"),
    Row("keeps its activations", lambda: small(Keeps()), "Adadelta"),
    Row("has a lock", lambda: small(Locked()), options=MOMENTUM),
    Row("output in a dict", lambda: classifier(InDict(), 8, of=lambda out: out["logits"]), "Adam"),
    Row("frozen first layer", frozen, "Adam", {"amsgrad": True}),
    Row("triplet loss, by anchor", triplet, options=MOMENTUM),
    Row("contrastive loss", contrastive, "AdamW"),
    Row("a penalty in the loss", two_heads, options=MOMENTUM, rest=True),
    Row("batch of one class in GroupNorm", lambda: small(nn.GroupNorm(4, 16)), "Rprop",
        moved=False),
    Row("autocast, bfloat16", autocast, "AdamW", double=False, tolerance=0.02),
    Row("bfloat16 parameters", bfloat16, double=False, tolerance=0.05),
    Row("quantisation-aware", quantised, "Adam", double=False, tolerance=1e-3),
    Row("torch.compile, aot_eager", compiled, options=MOMENTUM),
    Row("TorchScript", scripted, options=MOMENTUM),
    Row("FullyShardedDataParallel", lambda: wrapped(FullyShardedDataParallel), refused="sharded"),
    Row("DataParallel", lambda: wrapped(nn.DataParallel), refused="DataParallel"),
    Row("GradSampleModule", lambda: wrapped(GradSampleModule), refused="Opacus"),
    # torchvision
    Row("resnet18", lambda: vision("resnet18"), options=MOMENTUM, needs="torchvision"),
    Row("VGG, small", vgg, "Adam", needs="torchvision"),
    Row("efficientnet_b0", lambda: vision("efficientnet_b0"), "RMSprop", {"momentum": 0.9},
        needs="torchvision"),
    Row("ConvNeXt, small", convnext, "AdamW", needs="torchvision"),
    Row("Swin, small", swin, "AdamW", needs="torchvision"),
    Row("VisionTransformer, small", vit, "Adam", needs="torchvision"),
    Row("DenseNet, small", densenet, options={"momentum": 0.9, "nesterov": True},
        needs="torchvision"),
    Row("mobilenet_v3_small", lambda: vision("mobilenet_v3_small"), "RMSprop", needs="torchvision"),
    Row("regnet_y_400mf", lambda: vision("regnet_y_400mf"), options=MOMENTUM, needs="torchvision"),
    Row("shufflenet_v2_x0_5", lambda: vision("shufflenet_v2_x0_5"), "NAdam", needs="torchvision"),
    Row("googlenet, auxiliary outputs", googlenet, options=MOMENTUM, needs="torchvision"),
    Row("lraspp_mobilenet_v3_large, by pixel", segmentation, "Adam", needs="torchvision"),
    # timm
    Row("vit_tiny_patch16_224, drop path",
        lambda: timm("vit_tiny_patch16_224", img_size=SIZE, drop_path_rate=0.2, depth=4), "AdamW",
        needs="timm"),
    Row("deit_tiny_distilled, two heads", distilled, "AdamW", needs="timm"),
    Row("ghostnet_050", lambda: timm("ghostnet_050", drop_rate=0.2), "Adam", needs="timm"),
    Row("convnextv2_atto", lambda: timm("convnextv2_atto", drop_path_rate=0.1), "AdamW",
        needs="timm"),
    Row("mobilenetv4_conv_small", lambda: timm("mobilenetv4_conv_small"), "RAdam", needs="timm"),
    Row("nf_resnet26, weight standardisation", lambda: timm("nf_resnet26"), options=MOMENTUM,
        needs="timm", double=False, tolerance=1e-3),
    # transformers
    Row("BERT", lambda: text(transformer("BertForSequenceClassification", **TINY, **WIDTH)),
        "AdamW", needs="transformers"),
    Row("BERT, its own loss",
        lambda: text(transformer("BertForSequenceClassification", **TINY, **WIDTH), True),
        "AdamW", needs="transformers"),
    Row("DistilBERT, tags, -100",
        lambda: tagging(transformer("DistilBertForTokenClassification", **TINY, dim=32, n_layers=2,
                                    n_heads=2, hidden_dim=64), False),
        "AdamW", needs="transformers"),
    Row("DistilBERT, tags, its own loss",
        lambda: tagging(transformer("DistilBertForTokenClassification", **TINY, dim=32, n_layers=2,
                                    n_heads=2, hidden_dim=64), True),
        "Adam", needs="transformers"),
    Row("GPT-2, by token",
        lambda: language(transformer("GPT2LMHeadModel", vocab_size=50, n_positions=32, n_embd=32,
                                     n_layer=2, n_head=2)),
        "AdamW", needs="transformers"),
    Row("Llama, by token",
        lambda: language(transformer("LlamaForCausalLM", vocab_size=50, **WIDTH)),
        "AdamW", needs="transformers"),
    Row("T5, by token", seq2seq, "Adafactor", needs="transformers", moved=False),
    Row("RoBERTa, gradient checkpointing", checkpointed_text, "AdamW", needs="transformers"),
    Row("ALBERT, shared layers",
        lambda: text(transformer("AlbertForSequenceClassification", **TINY, **WIDTH,
                                 embedding_size=16)),
        "AdamW", needs="transformers"),
    Row("ViT", lambda: pictures("ViTForImageClassification"), "Adam", needs="transformers"),
    Row("DeiT", lambda: pictures("DeiTForImageClassification"), "AdamW", needs="transformers"),
    Row("Mamba, by token",
        lambda: language(transformer("MambaForCausalLM", vocab_size=50, hidden_size=32,
                                     num_hidden_layers=2, state_size=8)),
        "AdamW", needs="transformers"),
    Row("Mixtral, balance of experts", mixture, "AdamW", needs="transformers", double=False,
        tolerance=1e-3, rest=True),
    Row("LoRA on BERT", lora, "AdamW", needs="peft"),
]  # fmt: skip
