"""Small batches that show how a model runs: made up from its configuration, or the first rows of the training data."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.utils import logging

from .generators import generators_left_as_found

logger = logging.get_logger(__name__)

AUDIO_SAMPLES, AUDIO_FRAMES = 4000, 64
FEATURE_SIZES = ("feature_projection_input_dim", "input_feat_per_channel")
ROWS = 2


def tiny_batches(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """
    Batches on which a model may run: its main input alone, then all of its arguments that are known here.

    Args:
        model ([`~transformers.PreTrainedModel`]): its configuration tells sizes.
    """
    config, device, main = model.config, model.device, model.main_input_name
    takes = inspect.signature(model.forward).parameters
    text = {name: value.to(device) for name, value in model.dummy_inputs.items() if value is not None}
    rows = len(text[main]) if main in text else 1
    nested = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]

    def size(*keys: str) -> Any:
        values = (getattr(part, key, None) for key in keys for part in (config, *nested))
        return next((value for value in values if value is not None), None)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros((rows, *shape), device=device, dtype=model.dtype)

    # A network without positions takes any size that its strides do not bring to nothing.
    image = size("image_size") or 64
    height, width = (image, image) if isinstance(image, int) else image
    picture = (size("num_channels") or 3, height, width)
    known = text | {"pixel_values": zeros(*picture), "input_values": zeros(AUDIO_SAMPLES)}
    mels, frames, features = size("num_mel_bins"), size("max_source_positions"), size(*FEATURE_SIZES)
    if mels and frames:  # Whisper
        known["input_features"] = zeros(mels, 2 * frames)
    elif features:
        known["input_features"] = zeros(AUDIO_FRAMES, features)
    if mels and (frames := size("max_length")):  # AST
        known["input_values"] = zeros(frames, mels)
    if main in known:
        yield text if main in text else {main: known[main]}
    known["decoder_input_ids"] = torch.ones(rows, 2, dtype=torch.long, device=device)
    yield {name: value for name, value in known.items() if name in takes}
    if frames := size("num_frames"):
        known["pixel_values"] = zeros(frames, *picture)
        yield {name: value for name, value in known.items() if name in takes}


def first_rows_of(loader: Any, device: torch.device) -> Mapping[str, Any] | None:
    """
    The first rows of a data set, as a data loader makes a batch of them. The loader does not start, and draws nothing.

    Args:
        loader (`torch.utils.data.DataLoader`): plain or prepared by Accelerate.
        device (`torch.device`): where the batch goes.

    Returns:
        `Mapping`, or `None` if the data can only be read in order, or a batch is no mapping.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return None
    with generators_left_as_found(device):
        batch = loader.collate_fn([dataset[row] for row in range(min(ROWS, len(dataset)))])
    return send_to_device(batch, device) if isinstance(batch, Mapping) else None
