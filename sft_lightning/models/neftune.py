"""NEFTune: uniform noise on the embeddings while training (Jain et al., 2023, arXiv:2310.05914)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from sft_lightning.batch import DocumentLengths
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EmbeddingNoise:
    """Adds uniform noise within ±alpha / sqrt(L·d) to the input embeddings in training mode.

    L is the length of the token's document, not of the row, so that packing does not change the noise (transformers'
    own hook uses the row's length, padding included); d is the width of the embedding. The noise is drawn from torch's
    global generator, whose state is in checkpoints.

    Args:
        alpha: `model.neftune_alpha`; the paper tries 5, 10 and 15.

    Raises:
        UserError: If alpha is not above 0.
    """

    def __init__(self, alpha: float) -> None:
        if alpha <= 0:
            raise UserError(f"model.neftune_alpha: must be above 0 (got {alpha}); null adds no noise")
        self.alpha = alpha
        self._documents: DocumentLengths | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Add the noise to a model, with or without an adapter; evaluation and the state dict do not change."""
        # On the decoder, not on the model with its head: a chunked loss calls only the decoder.
        model.base_model.register_forward_pre_hook(self._note_documents, with_kwargs=True)
        model.get_input_embeddings().register_forward_hook(self._add_noise)

    def _note_documents(self, module: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
        documents = kwargs.get("document_lengths")
        if documents is not None and not isinstance(documents, DocumentLengths):
            documents = DocumentLengths(documents).to(module.device)
        self._documents = documents

    def _add_noise(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        rows, length, width = output.shape
        noise = torch.empty_like(output).uniform_(-1, 1)
        if self._documents is None:
            return output + noise * (self.alpha / math.sqrt(length * width))
        lengths = self._documents.starts[0].diff()
        of_tokens = lengths.repeat_interleave(lengths, output_size=rows * length).view(rows, length, 1)
        return output + noise * (self.alpha / (of_tokens.double() * width).sqrt()).to(output.dtype)
