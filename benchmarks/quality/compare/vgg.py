"""A small VGG-like network, which Transformers does not have: convolutions in stages, each of which halves the picture."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class VGGConfig(PreTrainedConfig):
    """`widths` and `depths`: channels of each stage, and its convolutions."""

    model_type = "small_vgg"

    def __init__(self, widths=(32, 64, 128, 128), depths=(2, 2, 2, 2), image_size=32, num_channels=3, **kwargs):
        self.widths, self.depths, self.image_size, self.num_channels = widths, depths, image_size, num_channels
        super().__init__(**kwargs)


class Convolution(nn.Sequential):
    """3 x 3 convolution, batch normalization, ReLU, and a pooling layer at the end of a stage."""

    def __init__(self, inputs: int, outputs: int, pool: bool):
        parts = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*parts, *([nn.MaxPool2d(2)] if pool else []))


class VGGForImageClassification(PreTrainedModel):
    config_class = VGGConfig
    main_input_name = "pixel_values"

    def __init__(self, config: VGGConfig):
        super().__init__(config)
        layers, inputs = [], config.num_channels
        for width, depth in zip(config.widths, config.depths, strict=True):
            for number in range(depth):
                layers.append(Convolution(inputs, width, number == depth - 1))
                inputs = width
        self.layers = nn.ModuleList(layers)
        self.classifier = nn.Linear(inputs, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        hidden = pixel_values
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.classifier(hidden.mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("small_vgg", VGGConfig)
AutoModelForImageClassification.register(VGGConfig, VGGForImageClassification)
