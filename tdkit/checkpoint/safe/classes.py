"""The classes that may stand in a model file: a fixed list, never a prefix, never the file's word.

The list names classes one by one. What is on it only holds data when it is read: no class here
runs code of the file's choosing while it is unpickled, and the functions here are never called
by the reader (see :mod:`tdkit.checkpoint.safe.pickles`).
"""

from __future__ import annotations

import enum
import functools
import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from tdkit.checkpoint.safe.imports import import_named, said
from tdkit.checkpoint.text import shown
from tdkit.errors import UnreadableFileError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Kind = Literal["module", "plain", "tuple", "enum", "partial", "function"]

_NN: Mapping[str, str] = {
    "activation": """CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU
        LogSigmoid LogSoftmax Mish MultiheadAttention PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid
        Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold""",
    "adaptive": "AdaptiveLogSoftmaxWithLoss",
    "batchnorm": "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm",
    "channelshuffle": "ChannelShuffle",
    "container": "ModuleDict ModuleList ParameterDict ParameterList Sequential",
    "conv": "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d",
    "distance": "CosineSimilarity PairwiseDistance",
    "dropout": "AlphaDropout Dropout Dropout1d Dropout2d Dropout3d FeatureAlphaDropout",
    "flatten": "Flatten Unflatten",
    "fold": "Fold Unfold",
    "instancenorm": "InstanceNorm1d InstanceNorm2d InstanceNorm3d",
    "linear": "Bilinear Identity Linear NonDynamicallyQuantizableLinear",
    "loss": """BCELoss BCEWithLogitsLoss CTCLoss CosineEmbeddingLoss CrossEntropyLoss
        GaussianNLLLoss HingeEmbeddingLoss HuberLoss KLDivLoss L1Loss MSELoss MarginRankingLoss
        MultiLabelMarginLoss MultiLabelSoftMarginLoss MultiMarginLoss NLLLoss NLLLoss2d
        PoissonNLLLoss SmoothL1Loss SoftMarginLoss TripletMarginLoss""",
    "module": "Module",
    "normalization": "CrossMapLRN2d GroupNorm LayerNorm LocalResponseNorm RMSNorm",
    "padding": """CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d
        ConstantPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d
        ReplicationPad2d ReplicationPad3d ZeroPad1d ZeroPad2d ZeroPad3d""",
    "pixelshuffle": "PixelShuffle PixelUnshuffle",
    "pooling": """AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d
        AdaptiveMaxPool2d AdaptiveMaxPool3d AvgPool1d AvgPool2d AvgPool3d FractionalMaxPool2d
        FractionalMaxPool3d LPPool1d LPPool2d LPPool3d MaxPool1d MaxPool2d MaxPool3d MaxUnpool1d
        MaxUnpool2d MaxUnpool3d""",
    "rnn": "GRU GRUCell LSTM LSTMCell RNN RNNCell",
    "sparse": "Embedding EmbeddingBag",
    "transformer": """Transformer TransformerDecoder TransformerDecoderLayer TransformerEncoder
        TransformerEncoderLayer""",
    "upsampling": "Upsample UpsamplingBilinear2d UpsamplingNearest2d",
}

_TORCHVISION: Mapping[str, str] = {
    "models._utils": "IntermediateLayerGetter",
    "models.alexnet": "AlexNet",
    "models.convnext": "CNBlock ConvNeXt LayerNorm2d",
    "models.densenet": "DenseNet _DenseBlock _DenseLayer _Transition",
    "models.detection._utils": "BalancedPositiveNegativeSampler BoxCoder BoxLinearCoder Matcher "
    "SSDMatcher",
    "models.detection.anchor_utils": "AnchorGenerator DefaultBoxGenerator",
    "models.detection.backbone_utils": "BackboneWithFPN",
    "models.detection.faster_rcnn": "FastRCNNConvFCHead FastRCNNPredictor FasterRCNN TwoMLPHead",
    "models.detection.fcos": "FCOS FCOSClassificationHead FCOSHead FCOSRegressionHead",
    "models.detection.generalized_rcnn": "GeneralizedRCNN",
    "models.detection.keypoint_rcnn": "KeypointRCNN KeypointRCNNHeads KeypointRCNNPredictor",
    "models.detection.mask_rcnn": "MaskRCNN MaskRCNNHeads MaskRCNNPredictor",
    "models.detection.retinanet": "RetinaNet RetinaNetClassificationHead RetinaNetHead "
    "RetinaNetRegressionHead",
    "models.detection.roi_heads": "RoIHeads",
    "models.detection.rpn": "RPNHead RegionProposalNetwork",
    "models.detection.ssd": """SSD SSDClassificationHead SSDFeatureExtractorVGG SSDHead
        SSDRegressionHead SSDScoringHead""",
    "models.detection.ssdlite": """SSDLiteClassificationHead SSDLiteFeatureExtractorMobileNet
        SSDLiteHead SSDLiteRegressionHead""",
    "models.detection.transform": "GeneralizedRCNNTransform",
    "models.efficientnet": "EfficientNet FusedMBConv MBConv",
    "models.googlenet": "BasicConv2d GoogLeNet Inception InceptionAux",
    "models.inception": """BasicConv2d Inception3 InceptionA InceptionAux InceptionB InceptionC
        InceptionD InceptionE""",
    "models.maxvit": """MBConv MaxVit MaxVitBlock MaxVitLayer PartitionAttentionLayer
        RelativePositionalMultiHeadAttention SwapAxes WindowDepartition WindowPartition""",
    "models.mnasnet": "MNASNet _InvertedResidual",
    "models.mobilenetv2": "InvertedResidual MobileNetV2",
    "models.mobilenetv3": "InvertedResidual MobileNetV3",
    "models.optical_flow.raft": """BottleneckBlock ConvGRU CorrBlock FeatureEncoder FlowHead
        MaskPredictor MotionEncoder RAFT RecurrentBlock ResidualBlock UpdateBlock
        _pass_through_h""",
    "models.regnet": "AnyStage BottleneckTransform RegNet ResBottleneckBlock SimpleStemIN",
    "models.resnet": "BasicBlock Bottleneck ResNet",
    "models.segmentation._utils": "_SimpleSegmentationModel",
    "models.segmentation.deeplabv3": "ASPP ASPPConv ASPPPooling DeepLabHead DeepLabV3",
    "models.segmentation.fcn": "FCN FCNHead",
    "models.segmentation.lraspp": "LRASPP LRASPPHead",
    "models.shufflenetv2": "InvertedResidual ShuffleNetV2",
    "models.squeezenet": "Fire SqueezeNet",
    "models.swin_transformer": """PatchMerging PatchMergingV2 ShiftedWindowAttention
        ShiftedWindowAttentionV2 SwinTransformer SwinTransformerBlock SwinTransformerBlockV2""",
    "models.vgg": "VGG",
    "models.video.mvit": "MViT MultiscaleAttention MultiscaleBlock Pool PositionalEncoding",
    "models.video.resnet": """BasicBlock BasicStem Bottleneck Conv2Plus1D Conv3DNoTemporal
        Conv3DSimple R2Plus1dStem VideoResNet""",
    "models.video.s3d": "S3D SepInceptionBlock3D TemporalSeparableConv",
    "models.video.swin_transformer": "PatchEmbed3d ShiftedWindowAttention3d SwinTransformer3d",
    "models.vision_transformer": "Encoder EncoderBlock MLPBlock VisionTransformer",
    "ops.boxes": "box_iou",
    "ops.deform_conv": "DeformConv2d",
    "ops.drop_block": "DropBlock2d DropBlock3d",
    "ops.feature_pyramid_network": "ExtraFPNBlock FeaturePyramidNetwork LastLevelMaxPool "
    "LastLevelP6P7",
    "ops.misc": """Conv2dNormActivation Conv3dNormActivation ConvNormActivation FrozenBatchNorm2d
        MLP Permute SqueezeExcitation""",
    "ops.poolers": "MultiScaleRoIAlign",
    "ops.ps_roi_align": "PSRoIAlign",
    "ops.ps_roi_pool": "PSRoIPool",
    "ops.roi_align": "RoIAlign",
    "ops.roi_pool": "RoIPool",
    "ops.stochastic_depth": "StochasticDepth",
}

# Attributes such as TransformerEncoderLayer.activation hold functions; the reader never calls them.
_OTHERS: Mapping[str, str] = {
    "functools": "partial",
    "torch.nn.functional": "elu leaky_relu mish relu relu6 selu silu hardswish hardsigmoid "
    "sigmoid tanh",
    "torch._C._nn": "gelu softplus",
    "torch.nn.parallel.data_parallel": "DataParallel",
}


def _listed() -> dict[str, str]:
    modules = {f"torch.nn.modules.{module}": names for module, names in _NN.items()}
    modules |= {f"torchvision.{module}": names for module, names in _TORCHVISION.items()}
    modules |= _OTHERS
    return {f"{module}.{name}": module for module in modules for name in modules[module].split()}


STATIC: Mapping[str, str] = _listed()
"""Every name on the list, such as ``torch.nn.modules.linear.Linear``, with its module."""


@dataclass(frozen=True)
class Allowed:
    """A name from a file that may be looked up.

    Args:
        path: The name as it stands in the file.
        value: What it means here.
        kind: What a file may do with it.
    """

    path: str
    value: Any
    kind: Kind


@dataclass(frozen=True)
class Allowlist:
    """The static list, with what registered models and the user add.

    Args:
        registered: Dotted name to ``package.module:Class``, imported when a file names it.
        chosen: Dotted name to the class the user allowed.
    """

    registered: Mapping[str, str] = field(default_factory=dict)
    chosen: Mapping[str, type] = field(default_factory=dict)

    def find(self, path: str) -> Allowed | None:
        """What a dotted name from a file stands for, or None if it is not on the list.

        Args:
            path: The name, such as ``torch.nn.modules.linear.Linear``.

        Raises:
            UnreadableFileError: If the name is on the list and cannot be imported here.
        """
        if path in self.chosen:
            return _allowed(path, self.chosen[path])
        if path in self.registered:
            return _allowed(path, _class_named(self.registered[path], None))
        if path in STATIC:
            return _allowed(path, _static(path))
        return None


def allowlist(registered: Iterable[str], chosen: Sequence[str]) -> Allowlist:
    """Make the list for one file.

    Args:
        registered: ``package.module:Class`` names that registered models bring.
        chosen: ``package.module:Class`` names that the user typed; they are imported now. Each
            also stands for the class of that name in ``__main__``, where training scripts have it.

    Raises:
        UsageError: If a chosen name cannot be imported or is not a class that only holds data.
    """
    classes: dict[str, type] = {}
    for text in chosen:
        cls = _class_named(text, "allow_classes")
        classes[text.replace(":", ".")] = cls
        classes[f"{cls.__module__}.{cls.__qualname__}"] = cls
        classes.setdefault(f"__main__.{cls.__qualname__}", cls)
    return Allowlist({text.replace(":", "."): text for text in registered}, classes)


def _class_named(text: str, key: str | None) -> type:
    cls = import_named(text, key)
    reason = _refusal(cls)
    if reason is not None:
        raise UsageError(
            f"{said(text, key)}: {reason}",
            "only nn.Module classes and classes that merely hold data can be allowed",
        )
    found: type = cls
    return found


def _refusal(cls: Any) -> str | None:
    if not isinstance(cls, type):
        return f"this is a {type(cls).__name__}, not a class; reading a file could call it"
    if issubclass(cls, nn.Module | enum.Enum):
        return None
    if hasattr(cls, "__del__") or hasattr(cls, "__setstate__"):
        return "this class runs code of its own when it is restored or thrown away"
    if cls.__new__ not in (object.__new__, tuple.__new__) and not _is_named_tuple(cls):
        return "this class runs code of its own when it is made"
    return None


def _is_named_tuple(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def _static(path: str) -> Any:
    module = STATIC[path]
    name = path[len(module) + 1 :]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnreadableFileError(
            f"the file uses {shown(path)}, which the installed {module.split('.')[0]} lacks",
            "install the version of the package that the file was made with",
        ) from error


def _allowed(path: str, value: Any) -> Allowed:
    return Allowed(path, value, _kind(value))


def _kind(value: Any) -> Kind:
    if value is functools.partial:
        return "partial"
    if not isinstance(value, type):
        return "function"
    if issubclass(value, nn.Module):
        return "module"
    if issubclass(value, enum.Enum):
        return "enum"
    return "tuple" if issubclass(value, tuple) else "plain"
